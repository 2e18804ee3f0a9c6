import pytest

from relay.cluster import key_hash


@pytest.mark.parametrize(
    ("key", "signed"),
    [
        (b"21", -973932308),
        (b"foobar", -790332482),
        (b"a-little-bit-long-string", -985981536),
        (b"a-little-bit-longer-string", -1486304829),
        (b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58897971),
        (b"abc", 479470107),
    ],
)
def test_keys_are_hashed_as_the_java_client_does(key: bytes, signed: int) -> None:
    # The vectors of Kafka's own tests; its partitioner drops the sign bit.
    assert key_hash(key) == signed & 0x7FFFFFFF
