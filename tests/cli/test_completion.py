"""``qmigrate --print-completion``: what the shells themselves make of it."""

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

from qmigrate.cli.main import build_parser, main
from qmigrate.cli.man import commands_of

Output = pytest.CaptureFixture[str]


def needs(shell: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"no {shell}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a completion is typed: two streams, a directory, and the scripts in ``.scripts``."""
    (tmp_path / ".scripts").mkdir()
    for name in ("vm-one.mig", "vm-two.mig"):
        (tmp_path / name).touch()
    (tmp_path / "ram").mkdir()
    return tmp_path


@cache
def printed(shell: str) -> bytes:
    """The same each time."""
    command = [sys.executable, "-m", "qmigrate", "--print-completion", shell]
    return subprocess.run(command, capture_output=True, timeout=60, check=True).stdout


def script(shell: str, folder: Path) -> Path:
    path = folder / ".scripts" / {"zsh": "_qmigrate"}.get(shell, f"qmigrate.{shell}")
    path.write_bytes(printed(shell))
    return path


TYPED = [
    (["dis"], {"dissect"}),
    (["--print-completion", ""], {"bash", "zsh", "fish"}),
    (["dissect", "--str"], {"--structure"}),
    (["dissect", "vm"], {"vm-one.mig", "vm-two.mig"}),
    (["dissect", "--json", "vm-one.mig", "vm-t"], {"vm-two.mig"}),
    (["dissect", "--page-size", "8K", "vm-o"], {"vm-one.mig"}),
    (["extract", "--raw", "r"], {"ram"}),
    (["extract", "--raw", "ram/", "vm-o"], {"vm-one.mig"}),
]


@needs("bash")
@pytest.mark.parametrize(("words", "offered"), TYPED)
def test_bash_completes(words: list[str], offered: set[str], folder: Path) -> None:
    asked = """
        source "$1"; shift
        COMP_WORDS=(qmigrate "$@"); COMP_CWORD=$#
        _shtab_qmigrate
        printf '%s\\n' "${COMPREPLY[@]}"
    """
    ended = subprocess.run(
        ["bash", "--norc", "-c", asked, "bash", str(script("bash", folder)), *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (set(ended.stdout.split()), ended.stderr) == (offered, "")


@needs("bash")
def test_bash_offers_every_command(folder: Path) -> None:
    asked = 'source "$1"; COMP_WORDS=(qmigrate ""); COMP_CWORD=1; _shtab_qmigrate; echo "${COMPREPLY[@]}"'
    ended = subprocess.run(
        ["bash", "--norc", "-c", asked, "bash", str(script("bash", folder))],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stdout.split() == list(commands_of(build_parser()))


@needs("fish")
@pytest.mark.parametrize(("words", "offered"), TYPED)
def test_fish_completes(words: list[str], offered: set[str], folder: Path) -> None:
    line = " ".join(["qmigrate", *words])
    ended = subprocess.run(
        ["fish", "--no-config", "-c", f"source {script('fish', folder)}; complete -C '{line}'"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "HOME": str(folder)},
    )
    assert ({line.partition("\t")[0].rstrip("/") for line in ended.stdout.splitlines()}, ended.stderr) == (offered, "")


class Zsh:
    """An interactive zsh on a terminal, in which ``qmigrate`` prints its words."""

    def __init__(self, folder: Path) -> None:
        script("zsh", folder)
        setup = f"""
            fpath=({folder}/.scripts $fpath)
            autoload -Uz compinit
            compinit -u -D
            unsetopt auto_list list_beep zle_bracketed_paste
            PS1='> '
            qmigrate() {{ print -r -- "=$$=${{(j:,:)@}}=" }}
        """
        (folder / ".zshrc").write_text(setup)
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(folder)
            os.execvpe("zsh", ["zsh", "-d", "-i"], {**os.environ, "ZDOTDIR": str(folder), "TERM": "dumb"})
        self.until("> ")

    def until(self, pattern: str) -> "re.Match[str]":
        read, ends = "", time.monotonic() + 60
        while time.monotonic() < ends:
            if select.select([self.terminal], [], [], 1)[0]:
                read += os.read(self.terminal, 4096).decode()
            if (found := re.search(pattern, read)) is not None:
                return found
        raise AssertionError(f"zsh did not say {pattern!r}, but {read!r}")

    def complete(self, line: str) -> list[str]:
        """The words of ``line`` after Tab and Enter."""
        os.write(self.terminal, f"{line}\t\r".encode())
        return self.until(rf"={self.pid}=(.*)=")[1].split(",")

    def close(self) -> None:
        os.write(self.terminal, b"\x03\x04exit\r")
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


@needs("zsh")
def test_zsh_completes(folder: Path) -> None:
    zsh = Zsh(folder)
    try:
        for words, offered in TYPED:
            if len(offered) == 1:  # with several it waits to be told which
                completed = zsh.complete(" ".join(["qmigrate", *words]))
                assert [word.rstrip("/") for word in completed[-1:]] == list(offered)
    finally:
        zsh.close()


@needs("zsh")
def test_zsh_can_read_what_is_said_of_every_command(folder: Path) -> None:
    zsh = Zsh(folder)
    try:
        for command in commands_of(build_parser()):
            assert zsh.complete(f"qmigrate {command} --hel") == [command, "--help"]
    finally:
        zsh.close()


@needs("zsh")
def test_zsh_finds_no_fault_in_its_script(folder: Path) -> None:
    path = script("zsh", folder)
    ended = subprocess.run(["zsh", "-f", "-n", str(path)], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_another_shell_is_refused(capsys: Output) -> None:
    assert main(["--print-completion", "tcsh"]) == 2
    assert "argument --print-completion: invalid choice: 'tcsh'" in capsys.readouterr().err


def test_the_version_does_not_load_what_makes_completions() -> None:
    code = "import sys; from qmigrate.cli.main import main; main(['--version']); print('shtab' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.splitlines()[1] == "False"
