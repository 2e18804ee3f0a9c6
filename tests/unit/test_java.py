from pathlib import Path

import pytest

from relay.dev.java import Java, class_archive, reserve


@pytest.mark.parametrize(("version", "option"), [("25.0.2", "AOTCache"), ("21.0.1", "SharedArchiveFile")])
def test_the_archive_of_classes_is_made_once_and_used_from_then_on(tmp_path: Path, version: str, option: str) -> None:
    trained: list[str] = []

    def train(making: str) -> bool:
        trained.append(making)
        Path(making.partition("=")[2]).write_bytes(b"classes")
        return True

    java = Java(Path("java"), version, "PATH")
    (first,) = class_archive(java, tmp_path, train)
    assert class_archive(java, tmp_path, train) == (first,)
    assert len(trained) == 1
    assert first.startswith(f"-XX:{option}=")
    assert Path(first.partition("=")[2]).read_bytes() == b"classes"


@pytest.mark.parametrize("clean", [True, False])
def test_without_an_archive_the_program_starts_all_the_same(tmp_path: Path, clean: bool) -> None:
    def train(making: str) -> bool:
        if not clean:  # Killed while it wrote.
            Path(making.partition("=")[2]).write_bytes(b"cla")
        return clean

    assert class_archive(Java(Path("java"), "25.0.2", "PATH"), tmp_path, train) == ()


def test_a_reserved_port_is_given_to_nobody_else() -> None:
    with reserve(0) as reserved, pytest.raises(OSError, match="in use"):
        reserve(reserved.getsockname()[1])
