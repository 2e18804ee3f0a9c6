"""The webhook port's certificate, read again when its files change."""

import logging
import ssl
from pathlib import Path

log = logging.getLogger(__name__)


class Certificate:
    """A certificate and its key, in a context that serves new connections with what was read last."""

    def __init__(self, certfile: Path, keyfile: Path) -> None:
        """Raises: OSError (so also ssl.SSLError)."""
        self._files = (certfile, keyfile)
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._stamp = self._stamp_now()
        self.context.load_cert_chain(*self._files)

    def reload(self) -> None:
        """Reads the files again if they have changed; keeps what there is if they cannot be read."""
        try:
            stamp = self._stamp_now()
            if stamp == self._stamp:
                return
            # Elsewhere first: a certificate without its key, as while the two are replaced, would break the context.
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(*self._files)
            self.context.load_cert_chain(*self._files)
            self._stamp = stamp
        except OSError as error:
            log.error("The certificate stays as it was: %s", error, extra={"action": "certificate_unreadable"})  # noqa: TRY400
        else:
            log.info("The certificate was read again.", extra={"action": "certificate_reloaded"})

    def _stamp_now(self) -> list[tuple[int, int]]:
        return [(path.stat().st_mtime_ns, path.stat().st_ino) for path in self._files]
