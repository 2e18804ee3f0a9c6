"""`relay completion` in the shells themselves."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from relay_process import run_relay, wait_until

COMMANDS = {"serve", "dev", "send", "tail", "top", "check", "schemas", "spool", "dead", "config", "token", "completion"}
#: What is typed, and what it must be completed to, among others perhaps.
CASES = [
    ("relay ", COMMANDS),
    ("relay top --", {"--url", "--interval", "--once", "--json", "--help"}),
    ("relay tail --f", {"--from-beginning"}),
    ("relay dev --", {"--play", "--registry", "--data"}),
    ("relay schemas ", {"list", "check", "register"}),
    ("relay spool ", {"status", "list", "export"}),
    ("relay dead ", {"list", "show", "export", "requeue", "replay"}),
    ("relay token ", {"new"}),
    ("relay completion ", {"bash", "zsh", "fish"}),
    ("relay send bod", {"body.json"}),
]


def needs(shell: str) -> str:
    """The path of *shell*, which a machine may not have."""
    return shutil.which(shell) or pytest.skip(f"needs {shell}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a file to complete and the scripts."""
    (tmp_path / "body.json").touch()
    for shell in ("bash", "zsh", "fish"):
        ended = run_relay(tmp_path, "completion", shell, settings={})
        assert (ended.returncode, ended.stderr) == (0, "")
        (tmp_path / f"relay.{shell}").write_text(ended.stdout)
    return tmp_path


@pytest.mark.parametrize(("typed", "offered"), CASES)
def test_bash_completes(folder: Path, typed: str, offered: set[str]) -> None:
    bash = needs("bash")
    words = " ".join(shlex.quote(word) for word in typed.split(" "))
    asked = f"""
        eval "$(<relay.bash)"
        COMP_WORDS=({words}) COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        $(complete -p relay | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    ended = subprocess.run([bash, "-c", asked], capture_output=True, text=True, cwd=folder, timeout=60, check=False)
    assert ended.stderr == ""
    assert offered <= set(ended.stdout.split())


@pytest.mark.parametrize(("typed", "offered"), CASES)
def test_fish_completes(folder: Path, typed: str, offered: set[str]) -> None:
    fish = needs("fish")
    asked = f"source ./relay.fish; complete --do-complete {shlex.quote(typed)}"
    environ = {**os.environ, "HOME": str(folder)}
    ended = subprocess.run(
        [fish, "--no-config", "-c", asked],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environ,
        timeout=60,
        check=False,
    )
    assert ended.stderr == ""
    assert offered <= {line.partition("\t")[0] for line in ended.stdout.splitlines()}


@pytest.fixture
def zsh(folder: Path) -> Iterator["Zsh"]:
    """Yield a zsh that has the script."""
    shell = Zsh(needs("zsh"), folder)
    yield shell
    shell.close()


class Zsh:
    """A zsh in a terminal: it completes nowhere else."""

    def __init__(self, zsh: str, folder: Path) -> None:
        self._terminal, other_end = pty.openpty()
        termios.tcsetwinsize(other_end, (50, 200))
        environ = {**os.environ, "HOME": str(folder), "ZDOTDIR": str(folder), "TERM": "xterm", "PS1": "> "}
        self._process = subprocess.Popen(
            [zsh, "-f", "-i"], cwd=folder, env=environ, stdin=other_end, stdout=other_end, stderr=other_end
        )
        os.close(other_end)
        self._written = b""
        self.type("autoload -U compinit; compinit -u -D; setopt no_list_beep; eval \"$(<relay.zsh)\"; echo rea''dy\n")
        wait_until(lambda: self.shows("\nready"), "zsh is ready")

    def type(self, text: str) -> None:
        self._written = b""
        os.write(self._terminal, text.encode())

    def shows(self, *texts: str) -> bool:
        """Whether all *texts* have been written since something was last typed."""
        while select.select([self._terminal], [], [], 0)[0]:
            self._written += os.read(self._terminal, 65536)
        return all(text in self._written.decode(errors="replace").replace("\r", "") for text in texts)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._terminal)


def test_zsh_completes(zsh: Zsh) -> None:
    for typed, offered in CASES:
        zsh.type(f"\x15{typed}\t\t")
        wait_until(lambda: zsh.shows(*offered), f"{offered} after {typed!r}")  # noqa: B023 - asked at once


def test_a_shell_that_it_does_not_know_is_wrong_usage(tmp_path: Path) -> None:
    assert run_relay(tmp_path, "completion", "tcsh", settings={}).returncode == 2
