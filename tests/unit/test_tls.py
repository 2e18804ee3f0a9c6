import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from relay.tls import Certificate

# Two self-signed pairs, made for these tests: `openssl req -x509 -newkey ec -nodes -subj /CN=relay-1`.
CERTIFICATES = (
    """\
-----BEGIN CERTIFICATE-----
MIIBljCCAT2gAwIBAgIUU1D3/ZNwpLXVyGXTnbnGU95DzxYwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHcmVsYXktMTAgFw0yNjExMjIxODI5NTJaGA8yMTI2MTAyOTE4
Mjk1MlowEjEQMA4GA1UEAwwHcmVsYXktMTBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABKGEl63wyP1MO65epk5dn8XorE8p3OC/PS4fUODPQvQH9n0YEzgyDaW9lc+l
GPmairP6+lqGqTYP0uwOJJ8MCBejbzBtMB0GA1UdDgQWBBS1x3nbPIPNULvWs3rP
sASlfnzKRTAfBgNVHSMEGDAWgBS1x3nbPIPNULvWs3rPsASlfnzKRTAPBgNVHRMB
Af8EBTADAQH/MBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAKBggqhkjOPQQD
AgNHADBEAiAilDwHttd62CBb4lCocX1Zz46rTlPZwqsfrs4jtHM3cwIgSzb5yDOS
2ES9+CgzPg3ZGgyva1PS/1lWOITC0GHSlvs=
-----END CERTIFICATE-----
""",
    """\
-----BEGIN CERTIFICATE-----
MIIBlzCCAT2gAwIBAgIUQTJkL9gbFe41ZXrnpRGIQ6yfa2QwCgYIKoZIzj0EAwIw
EjEQMA4GA1UEAwwHcmVsYXktMjAgFw0yNjExMjIxODI5NTJaGA8yMTI2MTAyOTE4
Mjk1MlowEjEQMA4GA1UEAwwHcmVsYXktMjBZMBMGByqGSM49AgEGCCqGSM49AwEH
A0IABOhdE9ot7romUQ0lHLz2UVg9IiuqbAr1oTNC8LwLU1UG1hB8E73UYziqYOit
A3f12Bjl+FHfzuryuE0MLD1c1Q2jbzBtMB0GA1UdDgQWBBSl8eo+akAsjUH677cK
3F0EqzkKRzAfBgNVHSMEGDAWgBSl8eo+akAsjUH677cK3F0EqzkKRzAPBgNVHRMB
Af8EBTADAQH/MBoGA1UdEQQTMBGCCWxvY2FsaG9zdIcEfwAAATAKBggqhkjOPQQD
AgNIADBFAiEAubdKrqFcdJP4aU2qrwNV35vExCThhaMhto6SSe6xGbICIDOHrQRN
ie1TNIOyX/TU3tYs1IkwWRO9sASIjMnxulv4
-----END CERTIFICATE-----
""",
)
KEYS = (
    """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgR5w/0B13CQJ3u8oo
M7G08Gxc+isivCkrtSPgl/R0kMOhRANCAAShhJet8Mj9TDuuXqZOXZ/F6KxPKdzg
vz0uH1Dgz0L0B/Z9GBM4Mg2lvZXPpRj5moqz+vpahqk2D9LsDiSfDAgX
-----END PRIVATE KEY-----
""",
    """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgWGLb4ZRGmphxTlkp
L6/XD0rEA4Uu7R2eT7aSWxTWiaehRANCAAToXRPaLe66JlENJRy89lFYPSIrqmwK
9aEzQvC8C1NVBtYQfBO91GM4qmDorQN39dgY5fhR387q8rhNDCw9XNUN
-----END PRIVATE KEY-----
""",
)


class Pair:
    """The two files, replaced at once as a mounted secret's are."""

    def __init__(self, directory: Path) -> None:
        self.certfile, self.keyfile = directory / "tls.crt", directory / "tls.key"
        self.use(0)

    def use(self, number: int) -> None:
        self._replace(self.keyfile, KEYS[number])
        self._replace(self.certfile, CERTIFICATES[number])

    def spoil(self) -> None:
        self._replace(self.certfile, "not a certificate")

    @staticmethod
    def _replace(path: Path, text: str) -> None:
        new = path.with_suffix(".new")
        new.write_text(text)
        new.replace(path)


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return Pair(tmp_path)


@contextlib.asynccontextmanager
async def serving(certificate: Certificate) -> AsyncIterator[int]:
    async def close(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    server = await asyncio.start_server(close, "127.0.0.1", 0, ssl=certificate.context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()


async def shown(port: int) -> int:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    try:
        seen = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return [ssl.PEM_cert_to_DER_cert(certificate) for certificate in CERTIFICATES].index(seen)


async def test_new_connections_are_shown_the_certificate_that_was_read_last(
    pair: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    certificate = Certificate(pair.certfile, pair.keyfile)
    async with serving(certificate) as port:
        assert await shown(port) == 0
        pair.use(1)
        assert await shown(port) == 0
        certificate.reload()
        assert await shown(port) == 1
        certificate.reload()
    assert [getattr(record, "action", "") for record in caplog.records] == ["certificate_reloaded"]


async def test_what_cannot_be_read_leaves_the_certificate_as_it_was(pair: Pair) -> None:
    certificate = Certificate(pair.certfile, pair.keyfile)
    async with serving(certificate) as port:
        pair.spoil()
        certificate.reload()
        assert await shown(port) == 0
        pair.certfile.unlink()
        certificate.reload()
        assert await shown(port) == 0
        pair.use(1)
        certificate.reload()
        assert await shown(port) == 1


async def test_a_certificate_whose_key_has_not_come_yet_leaves_the_pair_as_it_was(pair: Pair) -> None:
    certificate = Certificate(pair.certfile, pair.keyfile)
    async with serving(certificate) as port:
        pair._replace(pair.certfile, CERTIFICATES[1])
        certificate.reload()
        assert await shown(port) == 0
        pair._replace(pair.keyfile, KEYS[1])
        certificate.reload()
        assert await shown(port) == 1


def test_a_pair_that_cannot_be_used_is_told_at_the_start(pair: Pair) -> None:
    pair.spoil()
    with pytest.raises(OSError, match="PEM"):
        Certificate(pair.certfile, pair.keyfile)
    pair.certfile.unlink()
    with pytest.raises(FileNotFoundError):
        Certificate(pair.certfile, pair.keyfile)
