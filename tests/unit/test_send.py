import argparse
import asyncio
import io
import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from relay.dev.rocketchat import RULES, Attempt, RocketChat, Rule, rule_of
from relay.dev.send import Tally, add_arguments, play, run

BODY = '{"_id":"8qTgXo3LmZrK5wYcN","label":"Zoë"}'.encode()
NEVER = b""
CUT_OFF = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab"


def answer(status: int, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


class Peer:
    """A listener that keeps each connection's raw request and answers with the next of its answers, then the last."""

    def __init__(self, *answers: bytes, stalls: bool = False, reads_body: bool = True) -> None:
        self.requests: list[bytes] = []
        self.url = ""
        self.on_request: Callable[[], object] = lambda: None
        self._answers = list(answers) or [answer(200)]
        self._stalls = stalls  # Keeps the connection open after its answer.
        self._reads_body = reads_body

    @property
    def bodies(self) -> list[bytes]:
        return [request.partition(b"\r\n\r\n")[2] for request in self.requests]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length:"))
            body = await reader.readexactly(length) if self._reads_body else b""
            self.requests.append(head + body)
            self.on_request()
            given = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
            writer.write(given)
            if given == NEVER or self._stalls:
                await reader.read()
        except (EOFError, ConnectionError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator["Peer"]:
        async with await asyncio.start_server(self._serve, "127.0.0.1", 0) as server:
            self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/rocketchat"
            yield self


@pytest.fixture
def nobody() -> Iterator[str]:
    """A URL at which nothing listens, and nothing can start to."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}/rocketchat"


# --- The request


async def test_the_request_is_that_of_node_fetch() -> None:
    async with Peer().listening() as peer:
        await RocketChat(peer.url, "s3cret").deliver(BODY)

    host = peer.url.split("/")[2]
    assert peer.requests == [
        (
            "POST /rocketchat HTTP/1.1\r\n"
            "Content-Type: application/json\r\n"
            "X-RocketChat-Livechat-Token: s3cret\r\n"
            "Accept: */*\r\n"
            "Content-Length: 42\r\n"
            "User-Agent: node-fetch/1.0 (+https://github.com/bitinn/node-fetch)\r\n"
            "Accept-Encoding: gzip,deflate\r\n"
            f"Host: {host}\r\n"
            "Connection: close\r\n"
            "\r\n"
        ).encode()
        + BODY
    ]


@pytest.mark.parametrize("token", ["", None])
async def test_an_empty_token_sends_no_token_header(token: str | None) -> None:
    async with Peer().listening() as peer:
        await RocketChat(peer.url, token).deliver(BODY)

    assert b"Token" not in peer.requests[0]


async def test_credentials_and_query_of_the_url_are_sent() -> None:
    async with Peer().listening() as peer:
        await RocketChat(peer.url.replace("://", "://ada:p%40ss@") + "/a?b=c", "t").deliver(BODY)

    assert peer.requests[0].startswith(b"POST /rocketchat/a?b=c HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Basic YWRhOnBAc3M=\r\nConnection: close\r\n" in peer.requests[0]
    assert b"ada:" not in peer.requests[0]


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8080/rocketchat", "ftp://a/b", "http:///b", "http://a/b c", "http://a:b/", f"http://{'a' * 64}/"]
)
def test_a_url_that_is_not_absolute_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"URL|Port|label"):
        RocketChat(url, "t")


def test_a_token_cannot_smuggle_a_header() -> None:
    with pytest.raises(ValueError, match="no HTTP header can hold"):
        RocketChat("http://a/", "t\r\nX-Evil: 1")


# --- The rule, by version


@pytest.mark.parametrize(
    ("version", "rule"),
    [
        *(("9.0", RULES[0]), ("8.2.1", RULES[0]), ("7.11", RULES[0]), ("7.10.4", RULES[0]), ("10", RULES[0])),
        *(("7.10.3", RULES[1]), ("7.10", RULES[1]), ("6.13.0", RULES[1]), ("6.4.3", RULES[1])),
        *(("6.4.2", RULES[2]), ("6.4", RULES[2]), ("6.2.0-rc.3", RULES[2]), ("v6.2", RULES[2])),
        *(("6.1.9", RULES[3]), ("5.4.4", RULES[3]), ("0.74", RULES[3])),
    ],
)
def test_each_version_has_its_rule(version: str, rule: Rule) -> None:
    assert rule_of(version) is rule


@pytest.mark.parametrize("version", ["", "latest", "9.x", "9.0.0.0"])
def test_what_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(ValueError, match="not a version of Rocket"):
        rule_of(version)


@pytest.mark.parametrize(
    ("version", "timeout", "gap", "window"),
    [("9.0", 5, 20, 105), ("9.0", 10, 40, 210), ("7.10.3", 5, 20, 230), ("6.2", 5, 20, 230), ("6.1", 7, 10, 160)],
)
def test_the_wait_between_tries_follows_the_timeout(version: str, timeout: float, gap: float, window: float) -> None:
    player = RocketChat("http://a/", None, version=version, timeout=timeout)

    assert (player.gap, player.window) == (gap, window)


TIMES = {"9.0": 5, "7.10.3": 10, "6.4.2": 10, "6.1": 10}
DELIVERED = {
    "9.0": {200},
    "7.10.3": {200},
    "6.4.2": {200},
    "6.1": {200, 201, 202, 204},
}
DROPPED = {
    "9.0": {201, 202, 204, 301, 307, 400, 401, 403, 404, 408, 413},
    "7.10.3": set[int](),
    "6.4.2": {201, 202, 204, 301, 307, 400, 401, 403, 404, 408, 413, 429, 500, 503},
    "6.1": {301, 307},
}


@pytest.mark.parametrize("status", [200, 201, 202, 204, 301, 307, 400, 401, 403, 404, 408, 413, 429, 500, 503])
@pytest.mark.parametrize("version", TIMES)
async def test_each_version_retries_what_it_retries(version: str, status: int) -> None:
    async with Peer(answer(status, b"", "Location: /elsewhere", "Retry-After: 1")).listening() as peer:
        outcome = await RocketChat(peer.url, "t", version=version, gap=0).deliver(BODY)

    once = status in DELIVERED[version] | DROPPED[version]
    assert outcome.delivered is (status in DELIVERED[version])
    assert outcome.status == status
    assert peer.bodies == [BODY] * (1 if once else TIMES[version])


@pytest.mark.parametrize(("version", "tries"), TIMES.items())
async def test_every_version_retries_a_refused_connection(version: str, tries: int, nobody: str) -> None:
    outcome = await RocketChat(nobody, "t", version=version, gap=0).deliver(BODY)

    assert [attempt.error for attempt in outcome.attempts] == ["connection refused"] * tries
    assert (outcome.delivered, outcome.status) == (False, None)


async def test_a_503_then_a_200_is_delivered_by_the_same_bytes_on_a_new_connection() -> None:
    async with Peer(answer(503), answer(200)).listening() as peer:
        outcome = await RocketChat(peer.url, "t", gap=0).deliver(BODY)

    assert [attempt.status for attempt in outcome.attempts] == [503, 200]
    assert outcome.delivered
    assert peer.requests[0] == peer.requests[1]


async def test_the_next_try_comes_after_the_gap() -> None:
    loop = asyncio.get_running_loop()
    tried: list[float] = []
    async with Peer(answer(503), answer(200)).listening() as peer:
        await RocketChat(peer.url, "t", gap=0.1, on_attempt=lambda _: tried.append(loop.time())).deliver(BODY)

    assert tried[1] - tried[0] >= 0.1


async def test_every_attempt_is_told_before_the_next() -> None:
    told: list[tuple[Attempt, int]] = []
    async with Peer(answer(503, b"full"), CUT_OFF, answer(200)).listening() as peer:
        player = RocketChat(peer.url, "t", gap=0, on_attempt=lambda attempt: told.append((attempt, len(peer.requests))))
        outcome = await player.deliver(BODY)

    assert tuple(attempt for attempt, _ in told) == outcome.attempts
    assert [requests for _, requests in told] == [1, 2, 3]
    assert [(attempt.number, attempt.status, attempt.error) for attempt, _ in told] == [
        (1, 503, None),
        (2, 200, "answer cut off"),
        (3, 200, None),
    ]
    assert [(attempt.again_in, attempt.delivered) for attempt, _ in told] == [(0, False), (0, False), (None, True)]
    assert told[0][0].answer == b"full"
    assert {attempt.body for attempt, _ in told} == {BODY}


async def test_without_retry_there_is_one_try() -> None:
    async with Peer(answer(503)).listening() as peer:
        outcome = await RocketChat(peer.url, "t", retry=False).deliver(BODY)

    assert (len(outcome.attempts), outcome.delivered) == (1, False)


# --- The timeout


async def test_an_answer_that_does_not_come_is_a_timeout_and_retried() -> None:
    async with Peer(NEVER, answer(200)).listening() as peer:
        outcome = await RocketChat(peer.url, "t", timeout=0.2, gap=0).deliver(BODY)

    assert [attempt.error for attempt in outcome.attempts] == ["timeout", None]
    assert outcome.attempts[0].seconds >= 0.2


async def test_the_timeout_covers_the_body_of_the_answer() -> None:
    async with Peer(CUT_OFF, stalls=True).listening() as peer:
        outcome = await RocketChat(peer.url, "t", timeout=0.2, gap=0).deliver(BODY)

    assert [(attempt.status, attempt.error) for attempt in outcome.attempts] == [(200, "timeout")] * 5
    assert not outcome.delivered


@pytest.mark.parametrize("stalls", [True, False])
@pytest.mark.parametrize("version", ["6.2.0", "6.4.2", "6.13.0"])
async def test_a_broken_body_after_200_is_not_retried_by_6_2_to_7_10(version: str, stalls: bool) -> None:
    async with Peer(CUT_OFF, stalls=stalls).listening() as peer:
        outcome = await RocketChat(peer.url, "t", version=version, timeout=0.2, gap=0).deliver(BODY)

    assert (len(outcome.attempts), outcome.delivered) == (1, True)
    assert outcome.error == ("timeout" if stalls else "answer cut off")


async def test_a_broken_body_does_not_save_an_event_that_is_dropped() -> None:
    async with Peer(CUT_OFF.replace(b"200", b"400")).listening() as peer:
        outcome = await RocketChat(peer.url, "t", gap=0).deliver(BODY)

    assert (len(outcome.attempts), outcome.delivered, outcome.status) == (1, False, 400)


async def test_before_6_2_there_is_no_timeout() -> None:
    async with Peer(NEVER).listening() as peer:
        delivery = asyncio.create_task(RocketChat(peer.url, "t", version="6.1", timeout=0.01, gap=0).deliver(BODY))
        done, _ = await asyncio.wait([delivery], timeout=0.2)
        delivery.cancel()
        await asyncio.wait([delivery])

    assert not done
    assert len(peer.requests) == 1


# --- The answer


@pytest.mark.parametrize(
    ("given", "body"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n" + answer(200, b"after 100"), b"after 100"),
        (b"HTTP/1.1 200\r\ntransfer-encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nT: 1\r\n\r\n", b"abcde"),
        (b"HTTP/1.0 200 OK\r\n\r\nup to the end", b"up to the end"),
        (b"HTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\nab", b"ab"),
    ],
)
async def test_an_answer_is_understood_in_every_framing(given: bytes, body: bytes) -> None:
    async with Peer(given).listening() as peer:
        outcome = await RocketChat(peer.url, "t", retry=False).deliver(BODY)

    assert (outcome.delivered, outcome.error, outcome.attempts[0].answer) == (True, None, body)


async def test_no_body_is_awaited_after_204() -> None:
    async with Peer(b"HTTP/1.1 204 No Content\r\n\r\n", stalls=True).listening() as peer:
        outcome = await RocketChat(peer.url, "t").deliver(BODY)

    assert (outcome.status, outcome.error) == (204, None)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (b"SSH-2.0-OpenSSH\r\n\r\n", "not an HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nContent-", "answer cut off"),
        (b"x" * 200_000, "not an HTTP answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", "answer larger than 10 MiB"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "not an HTTP answer"),
    ],
)
async def test_what_is_no_answer_is_an_error(given: bytes, error: str) -> None:
    async with Peer(given).listening() as peer:
        outcome = await RocketChat(peer.url, "t", retry=False).deliver(BODY)

    assert (outcome.delivered, outcome.error) == (False, error)


async def test_an_early_answer_is_seen_before_the_body_is_out() -> None:
    async with Peer(answer(401), stalls=True, reads_body=False).listening() as peer:
        outcome = await RocketChat(peer.url, "t").deliver(b" " * 8_000_000)

    assert (len(outcome.attempts), outcome.status, outcome.error) == (1, 401, None)


async def test_what_does_not_speak_tls_is_an_error() -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(answer(400))
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        outcome = await RocketChat(url, "t", retry=False).deliver(BODY)

    assert str(outcome.error).startswith("TLS: ")


# --- The load


async def test_a_load_keeps_each_chat_in_order_and_counts_what_the_server_saw() -> None:
    seen: dict[str, list[str]] = {}
    busy: set[str] = set()
    overlaps: list[str] = []
    statuses: Counter[int] = Counter()

    async def accept(request: web.Request) -> web.Response:
        body = await request.json()
        chat, kind = body["_id"], body["type"]
        if chat in busy:
            overlaps.append(chat)
        busy.add(chat)
        await asyncio.sleep(0)  # Lets any other request in.
        busy.remove(chat)
        seen.setdefault(chat, []).append(kind)
        status = 503 if statuses.total() % 10 == 0 else 400 if statuses.total() % 25 == 1 else 200
        statuses[status] += 1
        return web.Response(status=status)

    app = web.Application()
    app.router.add_post("/rocketchat", accept)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    tally = Tally()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/rocketchat"
    player = RocketChat(url, "t", gap=0, on_attempt=tally.attempt)
    await play(player, tally, chats=8, rate=float("inf"), duration=1)
    await runner.cleanup()

    told = tally.as_dict()
    assert overlaps == []
    assert len(seen) >= 8
    assert all(kinds[0] == "LivechatSessionStart" for kinds in seen.values())
    assert told["answers"] == {str(status): count for status, count in sorted(statuses.items())}
    assert told["errors"] == {}
    assert told["delivered"] == statuses[200]
    assert told["retries"] == statuses[503]
    assert told["given_up"] == statuses[400]
    assert told["unfinished"] == 0
    assert told["attempts"] == statuses.total() == told["events"] + told["retries"]
    assert 0 < told["latency_ms"]["p50"] <= told["latency_ms"]["p99"] <= told["latency_ms"]["max"]


async def test_a_load_keeps_its_pace_while_one_chat_waits_for_its_retry() -> None:
    async with Peer(answer(503), answer(200)).listening() as peer:
        tally = Tally()
        player = RocketChat(peer.url, "t", gap=1, on_attempt=tally.attempt)
        await play(player, tally, chats=4, rate=100, duration=1)

    assert tally.behind < 0.5
    assert tally.delivered == tally.events <= 100
    assert tally.retries == 1


async def test_a_load_that_finds_every_chat_waiting_says_how_far_it_fell_behind() -> None:
    async with Peer(answer(503), answer(200)).listening() as peer:
        tally = Tally()
        player = RocketChat(peer.url, "t", gap=0.3, on_attempt=tally.attempt)
        await play(player, tally, chats=1, rate=100, duration=0.5)

    assert tally.behind > 0.2
    assert tally.delivered == tally.events


async def test_a_retry_at_the_end_of_a_load_is_waited_for() -> None:
    async with Peer(answer(503), answer(200)).listening() as peer:
        tally = Tally()
        player = RocketChat(peer.url, "t", gap=0.4, on_attempt=tally.attempt)
        await play(player, tally, chats=1, rate=10, duration=0.1)

    assert (tally.events, tally.delivered, tally.retries) == (1, 1, 1)


async def test_the_end_of_a_load_does_not_wait_for_ever() -> None:
    async with Peer(NEVER).listening() as peer:
        tally = Tally()
        player = RocketChat(peer.url, "t", version="6.1", timeout=0.01, gap=0, on_attempt=tally.attempt)
        await asyncio.wait_for(play(player, tally, chats=3, rate=100, duration=0.5), timeout=30)

    assert (tally.events, tally.attempts, tally.as_dict()["unfinished"]) == (3, 0, 3)


def test_latencies_are_told_to_one_percent() -> None:
    tally = Tally()
    for number in range(1, 1001):
        tally.attempt(Attempt(b"", 1, number / 1000, 200, None, b"", delivered=True, again_in=None))

    assert tally.latency(0.5) == pytest.approx(0.5, rel=0.011)
    assert tally.latency(0.99) == pytest.approx(0.99, rel=0.011)
    assert tally.latency(1) == pytest.approx(1, rel=0.011)


# --- The command


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="relay send")
    add_arguments(parser)
    return parser.parse_args(words)


async def test_files_are_sent_byte_for_byte_in_the_given_order(tmp_path: Path) -> None:
    bodies = {"b.json": b'{\n  "a": "\xc3\xbc" }\r\n', "a.json": b"not JSON \xff\x00", "c.json": b""}
    for name, body in bodies.items():
        (tmp_path / name).write_bytes(body)
    async with Peer().listening() as peer:
        code = await run(arguments("--url", peer.url, *(str(tmp_path / name) for name in bodies)))

    assert code == 0
    assert peer.bodies == list(bodies.values())


async def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(BODY)))
    async with Peer().listening() as peer:
        assert await run(arguments("--url", peer.url, "-")) == 0

    assert peer.bodies == [BODY]


async def test_a_whole_chat_is_sent_in_its_order(capsys: pytest.CaptureFixture[str]) -> None:
    async with Peer().listening() as peer:
        assert await run(arguments("--url", peer.url, "--chat")) == 0

    bodies = [json.loads(body) for body in peer.bodies]
    assert [body["type"] for body in (bodies[0], bodies[-1])] == ["LivechatSessionStart", "LivechatEdit"]
    assert len({body["type"] for body in bodies}) == 8
    assert len({body["_id"] for body in bodies}) == 1
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()[: len(bodies)]] == [
        body["type"] for body in bodies
    ]


async def test_the_same_seed_sends_the_same_chat() -> None:
    async with Peer().listening() as peer:
        for seed in ("1", "1", "2"):
            await run(arguments("--url", peer.url, "--chat", "--seed", seed))

    starts = [json.loads(body) for body in peer.bodies if b'"LivechatSessionStart"' in body]
    assert starts[0]["_id"] == starts[1]["_id"] != starts[2]["_id"]


async def test_a_load_of_chats_prints_its_summary_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    async with Peer().listening() as peer:
        words = ("--url", peer.url, "--chats", "3", "--rate", "50", "--duration", "0.5", "--json")
        assert await run(arguments(*words)) == 0

    told = json.loads(capsys.readouterr().out)
    assert told["events"] == told["delivered"] == told["answers"]["200"] == len(peer.bodies)
    assert 10 <= told["events"] <= 25


async def test_an_event_that_is_not_delivered_is_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_bytes(BODY)
    async with Peer(answer(401, b'{"title":"Unauthorized"}')).listening() as peer:
        assert await run(arguments("--url", peer.url, str(tmp_path / "a.json"))) == 1

    told = capsys.readouterr().out
    assert 'a.json: 401 \'{"title":"Unauthorized"}\' after' in told
    assert "0 delivered, 1 given up, 0 unfinished" in told


async def test_a_try_that_will_be_repeated_says_when(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], nobody: str
) -> None:
    (tmp_path / "a.json").write_bytes(BODY)

    assert await run(arguments("--url", nobody, "--gap", "0.01", str(tmp_path / "a.json"))) == 1
    told = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[2] for line in told[:5]] == ["again in 0.01 s"] * 4 + ["given up"]
    assert told[-1] == "5 tries, 4 of them retries: 5 x connection refused"


async def test_a_redirect_is_not_followed_and_not_delivered() -> None:
    async with Peer(answer(308, b"", "Location: /elsewhere")).listening() as peer:
        assert await run(arguments("--url", peer.url, "--chats", "1", "--rate", "5", "--duration", "0.1")) == 1

    assert all(request.startswith(b"POST /rocketchat HTTP/1.1") for request in peer.requests)
    assert len(peer.requests) == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ((), "nothing to send: give FILEs, or --chat, or --chats N"),
        (("--chat", "--chats", "2"), "one thing at a time"),
        (("--chat", "no-such-file.json"), "one thing at a time"),
        (("no-such-file.json",), "no-such-file.json: No such file or directory"),
        (("--chat", "--rate", "5"), "--rate and --duration go with --chats"),
        (("--chat", "--rocketchat", "newest"), "not a version of Rocket.Chat: 'newest'"),
        (("--chat", "--url", "localhost"), "not an absolute http or https URL: 'localhost'"),
    ],
)
async def test_wrong_usage_is_exit_code_2_and_says_why(
    words: tuple[str, ...], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await run(arguments(*words)) == 2
    assert reason in capsys.readouterr().err


async def test_nothing_is_sent_when_one_file_is_missing(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(BODY)
    async with Peer().listening() as peer:
        assert await run(arguments("--url", peer.url, str(tmp_path / "a.json"), str(tmp_path / "b.json"))) == 2

    assert peer.requests == []


@pytest.mark.parametrize("words", [("--chats", "0"), ("--rate", "0"), ("--gap", "-1"), ("--timeout", "nan")])
def test_a_number_that_makes_no_sense_is_exit_code_2(words: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        arguments(*words)

    assert exit_.value.code == 2


@pytest.mark.parametrize(
    ("given", "variable", "file", "sent"),
    [
        (["--token", "flag"], "variable", None, b"flag"),
        (["--token", ""], "variable", None, None),
        ([], "variable\nolder\n", "file", b"variable"),
        ([], None, "\n  file \nolder\n", b"file"),
        ([], None, None, None),
    ],
)
async def test_the_token_is_the_flag_or_the_first_of_the_settings(
    given: list[str],
    variable: str | None,
    file: str | None,
    sent: bytes | None,
    *,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if variable is not None:
        monkeypatch.setenv("RELAY_TOKEN", variable)
    if file is not None:
        (tmp_path / "token").write_text(file)
        monkeypatch.setenv("RELAY_TOKEN_FILE", str(tmp_path / "token"))
    (tmp_path / "a.json").write_bytes(BODY)
    async with Peer().listening() as peer:
        assert await run(arguments("--url", peer.url, *given, str(tmp_path / "a.json"))) == 0

    headers = dict(line.split(b": ") for line in peer.requests[0].split(b"\r\n\r\n")[0].split(b"\r\n")[1:])
    assert headers.get(b"X-RocketChat-Livechat-Token") == sent


async def test_ctrl_c_ends_with_the_summary_so_far(capsys: pytest.CaptureFixture[str]) -> None:
    reached = asyncio.Event()
    async with Peer(answer(200), answer(200), NEVER).listening() as peer:
        peer.on_request = lambda: reached.set() if len(peer.requests) == 3 else None
        sending = asyncio.create_task(run(arguments("--url", peer.url, "--chats", "1", "--rate", "inf", "--json")))
        await asyncio.wait_for(reached.wait(), timeout=30)
        sending.cancel()
        assert await sending == 1

    told = json.loads(capsys.readouterr().out)
    assert (told["events"], told["delivered"], told["unfinished"]) == (3, 2, 1)


def test_rich_is_loaded_for_a_terminal_only() -> None:
    code = "import sys, relay.dev.send; sys.exit('rich' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
