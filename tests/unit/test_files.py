"""The files beside the spool's own."""

import os
import resource
import subprocess
from pathlib import Path

import pytest

from relay.errors import SpoolInUse
from relay.files import RESERVE_BYTES, Reserve, make_private, own, owner


def blocks_of(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_a_reserve_takes_its_space_and_gives_it_back_once(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve")
    reserve.keep()
    reserve.keep()

    assert blocks_of(tmp_path / "reserve") >= RESERVE_BYTES
    assert reserve.release()
    assert blocks_of(tmp_path / "reserve") == 0
    assert not reserve.release()


def test_a_reserve_that_finds_no_space_is_kept_later(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path / "reserve")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (RESERVE_BYTES // 2, hard))
    try:
        reserve.keep()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert not reserve.release()
    reserve.keep()
    assert reserve.release()


def test_a_spool_has_one_owner_who_is_named(tmp_path: Path) -> None:
    lock = own(tmp_path / "relay.db")

    with pytest.raises(SpoolInUse, match=f"process {os.getpid()}"):
        own(tmp_path / "relay.db")

    os.close(lock)
    os.close(own(tmp_path / "relay.db"))


def test_who_owns_a_spool_is_told_without_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert owner(tmp_path / "relay.db") is None
    lock = own(tmp_path / "relay.db")
    assert owner(tmp_path / "relay.db") == os.getpid()

    def somebody_elses(process: int, signal: int) -> None:
        assert (process, signal) == (os.getpid(), 0)
        raise PermissionError

    with monkeypatch.context() as patch:
        patch.setattr(os, "kill", somebody_elses)
        assert owner(tmp_path / "relay.db") == os.getpid()
    os.close(lock)
    # What a process left that has ended.
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    (tmp_path / "relay.db.lock").write_text(f"{ended.pid}\n")
    assert owner(tmp_path / "relay.db") is None
    (tmp_path / "relay.db.lock").write_text("")
    assert owner(tmp_path / "relay.db") is None


def test_a_new_file_is_its_owners_alone_and_an_old_one_stays_as_it_is(tmp_path: Path) -> None:
    make_private(tmp_path / "new")
    (tmp_path / "old").write_text("text")
    make_private(tmp_path / "old")

    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "old").read_text() == "text"
