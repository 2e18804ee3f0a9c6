"""Which tokens are valid for which workspace, as the settings and their files say now."""

import hmac
import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from relay.errors import BadToken
from relay.event import DEFAULT_WORKSPACE
from relay.values import Secret, text_of

log = logging.getLogger(__name__)

#: Seconds between two looks at the files.
RELOAD_SECONDS = 1.0
_WORKSPACE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}")


class Match(NamedTuple):
    """A valid token that a sender showed."""

    workspace: str
    #: Its place among the workspace's tokens, from 1; "" where no token is asked for.
    slot: str


class Tokens:
    """The valid tokens. Files are read again when they change; what cannot be read leaves the tokens as they were."""

    def __init__(
        self,
        token: Secret | None,
        workspaces_dir: Path | None,
        *,
        on_change: Callable[[Mapping[str, tuple[bytes, ...]]], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Without *token* and *workspaces_dir* every sender is welcome at the default workspace.

        Raises: OSError, ValueError if they cannot be read now.
        """
        self._token = token
        self._workspaces_dir = workspaces_dir
        self._on_change = on_change
        self._clock = clock
        self._decoy = secrets.token_urlsafe(32).encode()
        self._stamp: object = None
        self._fault = ""
        self._looked_at = clock()
        self._load()

    @property
    def workspaces(self) -> list[str]:
        """The known workspaces."""
        return sorted(self._tokens)

    def match(self, workspace: str, shown: str | None) -> Match:
        """
        Whose token *shown* is. Takes the same time whether the workspace, the token or nothing is wrong.

        Raises: BadToken.
        """
        if self._clock() - self._looked_at >= RELOAD_SECONDS:
            self._reload()
        if self._open and workspace == DEFAULT_WORKSPACE:
            return Match(workspace, "")
        given = (shown or "").encode("utf-8", "surrogateescape")
        valid = self._tokens.get(workspace, ())
        found = 0
        # As many comparisons for every workspace, known or not.
        for slot in range(self._slots):
            token = valid[slot] if slot < len(valid) else self._decoy
            if hmac.compare_digest(given, token) and slot < len(valid):
                found = slot + 1
        if not found:
            raise BadToken
        return Match(workspace, str(found))

    def _reload(self) -> None:
        self._looked_at = self._clock()
        if self._stamp == self._stamp_now():
            return
        try:
            self._load()
        except (OSError, ValueError) as error:
            self._stamp = None  # It is looked at again, also if nothing but a right changes.
            if str(error) != self._fault:
                self._fault = str(error)
                log.error(  # noqa: TRY400 - the reason is enough
                    "The tokens stay as they were: %s", error, extra={"action": "tokens_unreadable"}
                )
        else:
            self._fault = ""
            log.info("The tokens were read again.", extra={"action": "tokens_reloaded"})

    def _load(self) -> None:
        self._stamp = self._stamp_now()
        tokens: dict[str, tuple[bytes, ...]] = {}
        if self._token is not None:
            tokens[DEFAULT_WORKSPACE] = _parse(self._token.read(), "RELAY_TOKEN")
        for path in self._files():
            if path.name in tokens:
                raise ValueError(f"{path}: the workspace {path.name} has its tokens from RELAY_TOKEN")
            tokens[path.name] = _parse(text_of(path), str(path))
        self._open = self._token is None and self._workspaces_dir is None
        if self._open:
            tokens[DEFAULT_WORKSPACE] = ()
        self._tokens = tokens
        self._slots = max(1, *(len(valid) for valid in tokens.values())) if tokens else 1
        self._on_change(tokens)

    def _files(self) -> list[Path]:
        if self._workspaces_dir is None:
            return []
        # Mounted secrets keep their versions in entries that begin with a dot.
        files = sorted(path for path in self._workspaces_dir.iterdir() if not path.name.startswith("."))
        for path in files:
            if not _WORKSPACE.fullmatch(path.name):
                raise ValueError(f"{path}: a workspace's name has letters, digits, '.', '_' and '-' only, at most 63")
        return files

    def _stamp_now(self) -> object:
        watched = [self._token.path] if self._token and self._token.path else []
        try:
            return [(path.name, path.stat().st_mtime_ns, path.stat().st_ino) for path in (*watched, *self._files())]
        except (OSError, ValueError) as error:
            return str(error)


def _parse(text: str, source: str) -> tuple[bytes, ...]:
    tokens = tuple(line.strip().encode() for line in text.splitlines() if line.strip())
    if not tokens:
        raise ValueError(f"{source} holds no token")
    return tokens
