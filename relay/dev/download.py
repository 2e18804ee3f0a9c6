"""Pinned files from the Maven repository: fetched once, checked against their SHA-256, kept in the user's cache."""

import contextlib
import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from relay.errors import RelayError

Progress = Callable[[int, int, str], None]
"""Told how many steps are done, of how many, and the name of the step."""


_ATTEMPTS = 3


class DownloadError(RelayError):
    """A file could not be had, or is not the one that was pinned."""


@dataclass(frozen=True)
class Artifact:
    """One file of a Maven repository, and the digest it must have."""

    group: str
    name: str
    version: str
    sha256: str
    classifier: str = ""
    packaging: str = "jar"

    @property
    def filename(self) -> str:
        classifier = f"-{self.classifier}" if self.classifier else ""
        return f"{self.name}-{self.version}{classifier}.{self.packaging}"

    def __str__(self) -> str:
        return f"{self.group}:{self.name}:{self.version}"


Fetch = Callable[[Artifact, Path], Path]
"""Gets an artifact into a directory that nobody else uses; returns where it put it."""


def read_lock(file: Path) -> list[Artifact]:
    """
    Return the artifacts of a lock file, in its order.

    A line is `group:artifact:version[:classifier:packaging] sha256`; one that starts with # is a comment.
    """
    artifacts = []
    for line in file.read_text().splitlines():
        if line and not line.startswith("#"):
            coordinates, sha256 = line.split()
            group, name, version, *rest = coordinates.split(":")
            artifacts.append(Artifact(group, name, version, sha256, *rest))
    return artifacts


def digest_of(artifacts: Sequence[Artifact]) -> str:
    """Return a name for exactly these files."""
    return hashlib.sha256("\n".join(f"{artifact} {artifact.sha256}" for artifact in artifacts).encode()).hexdigest()


def cache_dir() -> Path:
    """Return the directory that keeps downloads between runs; deleting it is harmless."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "rocketchat-kafka-relay"


def fetch_with_jgo(artifact: Artifact, into: Path) -> Path:
    """Get one file from the public repository; its dependencies are none of jgo's business here."""
    try:
        from jgo.maven import MavenContext  # noqa: PLC0415 (only in the extra)
    except ImportError:
        raise DownloadError("jgo is missing. It comes with: pip install 'rocketchat-kafka-relay[dev]'") from None
    component = MavenContext(repo_cache=into, timeout=60).project(artifact.group, artifact.name)
    path: Path = component.at_version(artifact.version).artifact(artifact.classifier, artifact.packaging).resolve()
    return path


def install(
    artifacts: Sequence[Artifact], home: Path, *, on_progress: Progress | None = None, fetch: Fetch = fetch_with_jgo
) -> list[Path]:
    """
    Return the paths of *artifacts* in the directory *home*, in order, downloading them unless *home* is there.

    *home* appears only once all files are in it and checked, so it is never checked again. Processes that install at
    the same time wait for the first one; an interrupted download goes on where it was.

    Raises:
        DownloadError: a file could not be had, or has another SHA-256 than pinned (it is removed).
    """
    files = [home / artifact.filename for artifact in artifacts]
    if home.exists():
        return files
    home.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(home.with_name(f"{home.name}.lock")):
        if not home.exists():
            partial = home.with_name(f"{home.name}.partial")
            _download_all(artifacts, partial, on_progress or (lambda *_: None), fetch)
            partial.rename(home)
    return files


def _download_all(artifacts: Sequence[Artifact], into: Path, on_progress: Progress, fetch: Fetch) -> None:
    unchecked = into / "unchecked"
    shutil.rmtree(unchecked, ignore_errors=True)  # What an interrupted run left there may be half a file.
    into.mkdir(exist_ok=True)
    with ThreadPoolExecutor(8, thread_name_prefix="download") as threads:
        tasks = {threads.submit(_download, artifact, into, unchecked, fetch): artifact for artifact in artifacts}
        try:
            for done, task in enumerate(as_completed(tasks), start=1):
                task.result()
                on_progress(done, len(artifacts), tasks[task].filename)
        except BaseException:
            threads.shutdown(cancel_futures=True)
            raise
    shutil.rmtree(unchecked, ignore_errors=True)


def _download(artifact: Artifact, into: Path, unchecked: Path, fetch: Fetch) -> None:
    checked = into / artifact.filename
    if checked.exists():
        return
    path = _fetch_patiently(artifact, unchecked, fetch)
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != artifact.sha256:
        path.unlink()
        raise DownloadError(f"{artifact} has SHA-256 {found}, pinned is {artifact.sha256}: refused")
    path.rename(checked)


def _fetch_patiently(artifact: Artifact, unchecked: Path, fetch: Fetch) -> Path:
    for attempt in range(_ATTEMPTS):
        try:
            # Each attempt has a place of its own: what a broken one left would pass for the file.
            return fetch(artifact, unchecked / f"{artifact.filename}.{attempt}")
        except (OSError, RuntimeError) as error:  # Those of requests are OSErrors.
            failure = error
            time.sleep(attempt)
    raise DownloadError(f"{artifact} could not be downloaded: {failure}") from failure


@contextlib.contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold *lock* against every other thread and process; the kernel frees it if this process dies."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def console_progress(title: str) -> Iterator[Progress]:
    """Show the steps as a bar on standard error, from the first step on and only while there are some."""
    from rich.console import Console  # noqa: PLC0415 (`relay serve` never imports it)
    from rich.progress import Progress as Bar  # noqa: PLC0415

    with contextlib.ExitStack() as stack:
        bar: Bar | None = None

        def show(done: int, total: int, name: str) -> None:
            nonlocal bar
            if bar is None:
                bar = stack.enter_context(Bar(console=Console(stderr=True), transient=True))
                bar.add_task(title)
            bar.update(bar.task_ids[0], completed=done, total=total, description=f"{title}: {name}")

        yield show
