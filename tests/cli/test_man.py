"""The man page, and what man's own tools say of it."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qmigrate import __version__
from qmigrate.cli.main import build_parser, main
from qmigrate.cli.man import commands_of, man_page

ROOT = Path(__file__).parents[2]
COMMANDS = commands_of(build_parser())


@pytest.fixture(scope="module")
def page() -> str:
    return man_page(build_parser(), __version__)


def needs(tool: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(tool) is None, reason=f"no {tool}")


def shown(page: str) -> str:
    """As a terminal of 80 columns shows it, without bold and underlines."""
    ended = subprocess.run(
        ["groff", "-man", "-Tascii", "-P-c", "-P-b", "-P-u", "-rLL=78n", "-ww"],
        input=page,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert ended.stderr == ""
    return ended.stdout


@needs("groff")
def test_groff_warns_of_nothing_and_shows_every_command_and_option(page: str) -> None:
    text = " ".join(shown(page).split())
    for name, command in COMMANDS.items():
        assert f"qmigrate {name} [options]" in text
        for action in command._actions:
            if not isinstance(action, argparse._HelpAction):
                assert all(option in text for option in action.option_strings)


@needs("groff")
def test_the_page_reads_well(page: str) -> None:
    told = shown(page)
    assert "NAME\n       qmigrate - opens up QEMU live migration\n" in told
    assert "       qmigrate extract [options] --raw DIR FILE ...\n" in told
    assert "       --device NAME\n              the  fields  of a device: its name, " in told
    assert "       qmigrate dissect --device virtio-net vm.mig\n" in told


@needs("mandoc")
def test_mandoc_misses_only_the_date(page: str) -> None:
    ended = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning"], input=page, capture_output=True, text=True, timeout=60, check=False
    )
    assert [line for line in ended.stdout.splitlines() if "missing date" not in line] == []


@needs("man")
def test_man_shows_it(page: str, tmp_path: Path) -> None:
    path = tmp_path / "qmigrate.1"
    path.write_text(page)
    ended = subprocess.run(
        ["man", "--warnings", "-l", str(path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "MANWIDTH": "80"},
    )
    assert ended.stderr == ""
    assert ended.stdout.startswith("QMIGRATE(1)")


def test_the_page_can_be_made_where_no_dependency_is_installed(page: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-I", "-S", str(ROOT / "scripts" / "build_man")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (ended.stdout, ended.stderr) == (page, "")


def test_a_line_that_begins_like_a_macro_is_text() -> None:
    parser = argparse.ArgumentParser("qmigrate", description=r".SH 'x' \n")
    parser.add_subparsers()
    assert "\n\\&.SH 'x' \\en\n" in man_page(parser, "1")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_can_be_quiet_or_verbose_and_gives_an_example_that_is_right(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([name, "--help"]) == 0
    told = capsys.readouterr().out
    assert "  -q, --quiet  " in told
    assert "  -v, --verbose  " in told
    examples = [line.strip() for line in told.partition("\nExample")[2].splitlines()[1:]]
    assert examples
    for example in examples:
        program, *arguments = shlex.split(example)
        assert program == "qmigrate"
        assert build_parser().parse_args(arguments).command == name
