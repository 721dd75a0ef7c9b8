"""What the README shows works."""

import lzma
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CAPTURE = ROOT / "tests" / "corpus" / "q35-many-11.1.mig.xz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vm.mig").write_bytes(lzma.decompress(CAPTURE.read_bytes()))
    return tmp_path


def blocks_of(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_library_example_runs(folder: Path) -> None:
    example, _ = blocks_of("python")
    ran = subprocess.run([sys.executable, "-c", example], cwd=folder, capture_output=True, text=True, check=True)
    assert "pc-q35-11.1" in ran.stdout
    assert "cpu_clock_offset int64" in ran.stdout


@pytest.mark.skipif(find_spec("dask") is None, reason="no dask")
def test_the_recipe_for_a_cluster_runs(folder: Path) -> None:
    _, recipe = blocks_of("python")
    (folder / "recipe.py").write_text(recipe)
    ran = subprocess.run([sys.executable, "recipe.py"], cwd=folder, capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.returncode) == ("vm.mig pc-q35-11.1\nnothing.mig No such file or directory\n", 0), (
        ran.stderr
    )


def commands() -> list[str]:
    lines = [line for block in blocks_of("sh") for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.startswith("qmigrate ")]


@pytest.mark.parametrize("command", [line for line in commands() if "SRC" not in line and "~" not in line])
def test_each_command_works(command: str, folder: Path) -> None:
    shell = command.replace("qmigrate", f"{sys.executable} -m qmigrate", 1).replace("< pipe", "< vm.mig")
    ran = subprocess.run(shell, shell=True, cwd=folder, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout
    assert not ran.stderr
