"""Made-up chats: bodies as Rocket.Chat 9.0 builds them, byte for byte in key order and escaping.

`JSON.stringify` and orjson agree on compact form, insertion order and what is escaped. All names, addresses and ids are
invented; addresses are of example.com, IP addresses of the range kept for documentation.
"""

import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import orjson

Json = dict[str, Any]
Clock = Callable[[], datetime]

# The characters of Meteor's Random.id(): none that can be mistaken for another.
_ID_ALPHABET = "23456789ABCDEFGHJKLMNPQRSTWXYZabcdefghijkmnopqrstuvwxyz"
_HEX = "0123456789abcdef"
_DEPARTMENTS = ("5rWkYb2nQxHs8uDfC", "tZ7vMp4cJa9gXeLhR")
_VISITORS = (
    ("Ada Visitor", "ada"),
    ("Björn Åkesson", "bjorn"),
    ("Chloé Dubois", "chloe"),
    ("Дарья Волкова", "darya"),
    ("江藤 恵美", "emi"),
    ("Fatima O'Neil", "fatima"),
)
_VISITOR_SAYS = (
    "Hi, my order has not arrived",
    "Grüße aus Köln 👋 ist mein Paket schon unterwegs?",
    "注文した商品がまだ届きません",
    'It says "delivered", but C:\\parcels is empty.\nSee <b>here</b> & there\u2028',
    "Ευχαριστώ, περιμένω 🙏🏽",
)
_AGENT_SAYS = (
    "Hello, let me check that for you.",
    "One moment, please…",
    "Je vérifie votre commande tout de suite.",
    "It left our depot this morning ✅",
)


class _Agent(NamedTuple):
    id: str
    username: str
    name: str


_AGENTS = (
    _Agent("Hn4sPq7xKd2vRt9uB", "nora.agent", "Nora Agent"),
    _Agent("w3EzJc8yLmF6aTqGp", "liam.agent", "Liam Agent"),
    _Agent("kS5gYb9tWn3hXr7Dz", "zoe.agent", "Zoë Agent"),
)


def conversation(rng: random.Random, *, started_at: datetime, messages: int = 6) -> Iterator[bytes]:
    """The bodies of one whole chat, in the order in which they happen.

    Start, Queued, Taken; *messages* messages of visitor and agent in turn; LivechatSession and LivechatEdit. With
    three messages or more also an edit and a LeadCapture, with four a forward (Taken, Forwarded), with five a file.
    The same *rng* state and *started_at* give the same bytes; time passes in steps of 0.3-20 s.
    """
    return _Chat(rng, _steps(rng, started_at)).events(messages)


def stream(
    rng: random.Random, *, chats: int = 1, now: Clock = lambda: datetime.now(UTC)
) -> Iterator[tuple[str, bytes]]:
    """Endless (chat id, body) of *chats* concurrent chats, mixed at random; a closed chat's place goes to a new one.

    Every body occurs once; its timestamps are those of *now* when it is asked for.
    """
    places = [_endless(random.Random(rng.getrandbits(64)), now) for _ in range(chats)]
    while True:
        yield next(rng.choice(places))


def offline_message(rng: random.Random, *, sent_at: datetime) -> bytes:
    """The body of a LivechatOfflineMessage: it belongs to no chat."""
    name, login = rng.choice(_VISITORS)
    visitor = {"name": name, "email": f"{login}.{rng.randrange(10**6)}@example.com"}
    text = "Nobody was online. Please call me back.\nThanks"
    return orjson.dumps(
        {"type": "LivechatOfflineMessage", "sentAt": _iso(sent_at), "visitor": visitor, "message": text}
    )


def _endless(rng: random.Random, now: Clock) -> Iterator[tuple[str, bytes]]:
    while True:
        chat = _Chat(rng, now)
        for body in chat.events(rng.randint(4, 12)):
            yield chat.id, body


class _Chat:
    """One room with its visitor, agent and transcript, as they stand at the next event."""

    def __init__(self, rng: random.Random, clock: Clock) -> None:
        self._rng = rng
        self._clock = clock
        self.id = _id(rng)
        self._department = rng.choice((*_DEPARTMENTS, None))
        self._created = self._last_message = _iso(clock())
        self._details: Json = {}
        self._custom = {"orderId": str(rng.randrange(10**5))} if rng.random() < 0.5 else None
        self._visitor, self._login = self._new_visitor()
        self._author = {key: self._visitor[key] for key in ("_id", "username", "name")}
        self._agent: _Agent | None = None
        self._served_by: Json | None = None
        self._transcript: list[Json] = []

    def events(self, messages: int) -> Iterator[bytes]:
        yield self._body("LivechatSessionStart", departmentId=self._department)
        yield self._body("LivechatSessionQueued", departmentId=self._department)
        yield self._taken(self._rng.choice(_AGENTS))
        for index in range(messages):
            if index == 3:
                yield from self._forwarded()
            yield self._message(index)
            if index == 2:
                yield self._lead()
                yield self._edited(self._transcript[1])
        yield self._closed()
        self._details["topic"] = "Late parcel (resolved)"
        yield self._body("LivechatEdit", self._transcript)

    def _body(self, kind: str, messages: list[Json] | None = None, **extra: object) -> bytes:
        agent = self._agent and {
            "_id": self._agent.id,
            "username": self._agent.username,
            "name": self._agent.name,
            "email": f"{self._agent.username}@example.com",
        }
        body = {
            "_id": self.id,
            "label": self._visitor["name"],
            "topic": self._details.get("topic"),
            "createdAt": self._created,
            "lastMessageAt": self._last_message,
            "tags": self._details.get("tags"),
            "customFields": self._custom,
            "visitor": self._visitor,
            "agent": agent,
            "type": kind,
            "messages": messages or [],
            **extra,
        }
        return orjson.dumps({key: value for key, value in body.items() if value is not None})

    def _taken(self, agent: _Agent) -> bytes:
        self._agent = agent
        self._served_by = {"_id": agent.id, "username": agent.username, "ts": _iso(self._clock())}
        return self._body(
            "LivechatSessionTaken", self._transcript, departmentId=self._department, servedBy=self._served_by
        )

    def _forwarded(self) -> Iterator[bytes]:
        before = self._served_by
        yield self._taken(self._rng.choice([agent for agent in _AGENTS if agent != self._agent]))
        yield self._body(
            "LivechatSessionForwarded",
            self._transcript,
            departmentId=self._department,
            servedBy=self._served_by,
            oldServedBy=before,
        )

    def _message(self, index: int) -> bytes:
        if index % 2:
            message = self._saved(self._agent, {"msg": self._rng.choice(_AGENT_SAYS)})
        elif index == 2:
            message = self._saved(None, {"msg": f"Write to {self._login}.work@example.com or call 55501-0123"})
        elif index == 4:
            message = self._saved(None, {}, self._upload())
        else:
            message = self._saved(None, {"msg": self._rng.choice(_VISITOR_SAYS)})
        # The room is told of its new message only after the webhook's body was built.
        body = self._body("Message", [message])
        self._last_message = message["ts"]
        return body

    def _saved(self, agent: _Agent | None, text: Json, rest: Json | None = None) -> Json:
        at = _iso(self._clock())
        author = {"_id": agent.id, "username": agent.username, "name": agent.name} if agent else self._author
        message = {"u": author, "_id": _id(self._rng), "username": author["username"], **text, "ts": at, "rid": self.id}
        if agent:
            message["agentId"] = agent.id
        message |= {**(rest or {}), "_updatedAt": at}
        self._transcript.append(message)
        return message

    def _edited(self, message: Json) -> bytes:
        at = self._clock()
        # An update of a key keeps its place, so `editedAt` has to be put before what follows it.
        edited = {}
        for key, value in message.items():
            edited[key] = value
            if key == "rid":
                edited["editedAt"] = _iso(at)
        edited |= {"msg": f"{message['msg']} (edited)", "_updatedAt": _iso(at + timedelta(milliseconds=8))}
        self._transcript[self._transcript.index(message)] = edited
        return self._body("Message", [edited])

    def _lead(self) -> bytes:
        self._visitor["email"] = [*self._visitor.get("email", ()), {"address": f"{self._login}.work@example.com"}]
        self._visitor["phone"] = [*self._visitor.get("phone", ()), {"phoneNumber": "55501-0123"}]
        return self._body("LeadCapture")

    def _closed(self) -> bytes:
        by_visitor = self._rng.random() < 0.3
        text = {} if by_visitor else {"msg": "Refund issued"}
        closing = self._saved(None if by_visitor else self._agent, text, {"closingMessage": True})
        self._details = {"topic": "Late parcel", "tags": ["refund", "shipping"]}
        return self._body(
            "LivechatSession",
            self._transcript,
            departmentId=self._department,
            servedBy=self._served_by,
            closedAt=closing["ts"],
            closedBy={key: closing["u"][key] for key in ("_id", "username")},
            closer="visitor" if by_visitor else "user",
        )

    def _new_visitor(self) -> tuple[Json, str]:
        rng = self._rng
        name, login = rng.choice(_VISITORS)
        number = rng.randrange(10**6)
        visitor: Json = {
            "_id": "".join(rng.choices(_HEX, k=24)),
            "token": "".join(rng.choices(_HEX, k=32)),
            "name": name,
            "username": f"guest-{number}",
            **({"department": self._department} if self._department else {}),
            "ip": f"203.0.113.{rng.randrange(1, 255)}",
            "os": rng.choice(("Windows 10", "Mac OS 15.1", "Android 16")),
            "browser": rng.choice(("Chrome 141.0.0.0", "Firefox undefined", "Mobile Safari 19.0")),
            "customFields": {"customerId": f"C-{number}"},
        }
        if rng.random() < 0.8:
            visitor["email"] = [{"address": f"{login}.{number}@example.com"}]
        if rng.random() < 0.5:
            visitor["phone"] = [{"phoneNumber": f"+1555{number:07d}"}]
        return visitor, f"{login}.{number}"

    def _upload(self) -> Json:
        file, name, size = _id(self._rng), "parcel label ü.png", self._rng.randrange(10**4, 10**5)
        path = f"/file-upload/{file}/parcel%20label%20%C3%BC.png"
        attachment = {
            "title": name,
            "type": "file",
            "title_link": path,
            "title_link_download": True,
            "image_url": path,
            "image_type": "image/png",
            "image_size": size,
            "image_dimensions": {"width": 640, "height": 480},
            "image_preview": "/9j/2wBDAAYEBQYFBAYGBQYHBwYIChAKCgkJChQODwwQFxQYGBcUFhYaHSUfGhsjHBYWICwgIyYnKSop",
            "fileId": file,
        }
        return {
            "file": {
                "_id": file,
                "name": name,
                "type": "image/png",
                "size": size,
                "format": "png",
                "typeGroup": "image",
            },
            "attachments": [attachment],
            "fileUpload": {"publicFilePath": f"https://chat.example.com{path}", "type": "image/png", "size": size},
        }


def _steps(rng: random.Random, at: datetime) -> Clock:
    def step() -> datetime:
        nonlocal at
        now = at
        at += timedelta(milliseconds=rng.randint(300, 20_000))
        return now

    return step


def _id(rng: random.Random) -> str:
    return "".join(rng.choices(_ID_ALPHABET, k=17))


def _iso(at: datetime) -> str:
    """As `Date.prototype.toISOString` writes it."""
    return at.astimezone(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
