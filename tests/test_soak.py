"""``scripts/soak``: which units are run, and what a Python without our libraries says."""

import subprocess
import sys
from pathlib import Path

SOAK = Path(__file__).parents[1] / "scripts" / "soak"


def soak(*arguments: str, python: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, *python, str(SOAK), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def listed(pattern: str) -> list[str]:
    ended = soak("--minutes", "0", "--list", "--only", pattern)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def test_units_are_chosen_by_name_by_pattern_or_by_a_part_of_their_names() -> None:
    every = listed("")
    longer = [(name, other) for name in every for other in every if name != other and name in other]
    assert longer, "no unit's name is part of another's: this shows nothing"
    assert listed(longer[0][0]) == [longer[0][0]]
    begins = longer[0][0].split()[0]
    assert listed(f"{begins} *") == [name for name in every if name.startswith(f"{begins} ")]
    part = longer[0][0][1:-1]
    assert listed(part) == [name for name in every if part in name]


def test_a_python_without_our_libraries_is_told_which_one_to_take() -> None:
    ended = soak("--help", python=("-S",))  # without site-packages
    assert ended.returncode == 1
    assert ended.stderr.startswith("soak: this Python has no ")
    assert ended.stderr.endswith(": run .venv/bin/python scripts/soak (scripts/environment test makes it)\n")
