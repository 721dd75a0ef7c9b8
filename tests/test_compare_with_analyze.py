"""`scripts/compare_with_analyze` counts what is equal and shows what is not; and QEMU's own program agrees with us."""

import json
import lzma
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import qmigrate

SCRIPT = Path(__file__).parents[1] / "scripts" / "compare_with_analyze"
CORPUS = Path(__file__).parent / "corpus"
STREAM = CORPUS / "pc-paused-7.2.mig.xz"
ANALYZE = os.environ.get("QMIGRATE_ANALYZE_MIGRATION")


def compare(analyze: str | Path, *files: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, analyze, *files], capture_output=True, text=True, check=False)


def stand_in(folder: Path, says: Mapping[str, Any] | str) -> Path:
    """A program that answers any stream with this, or ends with this error."""
    path = folder / "analyze"
    path.write_text(f"print({json.dumps(says)!r})" if not isinstance(says, str) else f"raise Exception({says!r})")
    return path


def test_fields_that_differ_are_shown_with_both_values(tmp_path: Path) -> None:
    with qmigrate.open(STREAM) as migration:
        (cpu,) = [f"{section.name} ({section.section_id})" for section in migration.sections if section.name == "cpu"]
    fields = {"env.eip": "0x1", "env.a20_mask": "0xffffffff (-1)", "env.dr": ["0x0", "0x7"], "more": "00"}
    ran = compare(stand_in(tmp_path, {cpu: fields}), "--most=1000", STREAM)
    assert ran.returncode == 1
    lines = [line.strip() for line in ran.stdout.splitlines()]
    assert "timer (0): we say decoded, it says not decoded" in lines
    assert any(line.startswith(f"{cpu}: env.eip: we say 0x") and line.endswith(", it says 0x1") for line in lines)
    assert f"{cpu}: env.dr, elements: we say 0x8, it says 0x2" in lines
    assert f"{cpu}: env.dr[1]: we say 0x0, it says 0x7" in lines
    assert f"{cpu}: more: we say no such field, it says 00" in lines
    assert not any("env.a20_mask" in line for line in lines)
    assert lines[0].endswith(f" fields compared, 2 equal, {len(lines) - 2} differ")


def test_a_stream_that_the_program_does_not_read_is_named_with_its_words(tmp_path: Path) -> None:
    ran = compare(stand_in(tmp_path, "Unknown QEMU_VM_COMMAND: 1"), STREAM, CORPUS / "pc-postcopy-7.2.mig.xz")
    assert ran.returncode == 2
    assert ran.stdout.splitlines() == [
        f"{STREAM.name}: not compared: it stops with 'Exception: Unknown QEMU_VM_COMMAND: 1'",
        "pc-postcopy-7.2.mig.xz: not compared: it stops with 'Exception: Unknown QEMU_VM_COMMAND: 1';"
        " the stream has no description",
        "0 of 2 files: 0 fields equal, 0 differ",
    ]


@pytest.mark.skipif(ANALYZE is None, reason="QMIGRATE_ANALYZE_MIGRATION does not name QEMU's analyze-migration.py")
def test_qemus_own_program_reads_the_same_fields_out_of_the_corpus() -> None:
    assert ANALYZE is not None
    ran = compare(ANALYZE, *sorted(CORPUS.glob("*.mig.xz")))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    unread = [line for line in ran.stdout.splitlines() if "not compared" in line]
    assert unread == [line for line in unread if line.startswith(("pc-postcopy-", "q35-advised-"))]


@pytest.mark.skipif(ANALYZE is None, reason="QMIGRATE_ANALYZE_MIGRATION does not name QEMU's analyze-migration.py")
def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    # A wrapper that shows the program another stream than us.
    assert ANALYZE is not None
    data = bytearray(lzma.decompress(STREAM.read_bytes()))
    place = data.index(b"\x0bglobalstate") + 12 + 8 + 4  # the run state's first letter
    data[place] ^= 1
    other = tmp_path / "other.mig"
    other.write_bytes(data)
    wrapper = tmp_path / "wrapper"
    command = [sys.executable, ANALYZE, "--file", str(other), "--dump", "state"]
    wrapper.write_text(f"import os\nos.execv({sys.executable!r}, {command!r})\n")
    ran = compare(wrapper, STREAM)
    assert ran.returncode == 1
    assert "1 differ" in ran.stdout
    assert "runstate: we say" in ran.stdout
