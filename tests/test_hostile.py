"""Streams that lie, through the command: an answer or one line, in little memory.  ``test_mutations.py`` has the many.

Each runs in a process whose address space has a limit: memory that followed a claim would be more.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest

from qmigrate.format.ram import BlockListHeader, RamBlock, RamFlag
from qmigrate.format.stream import SectionType
from tests import streams
from tests.streams import PAGE

HEAD: Final = streams.header() + streams.configuration()
RAM: Final = streams.ram_start() + streams.ram()
ADDRESS_SPACE: Final = 160 << 20  # bytes; the command itself takes a third
EXABYTE: Final = 1 << 60
LIMITED: Final = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({ADDRESS_SPACE}, {ADDRESS_SPACE}))
from qmigrate.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, standard output and error of the command with little memory."""
    ended = subprocess.run(
        [sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True, timeout=60, check=False
    )
    return ended.returncode, ended.stdout, ended.stderr


def answered(path: Path, data: bytes) -> dict[str, Any]:
    """What dissect says; check has said the same with the same code, and extract nothing worse."""
    path.write_bytes(data)
    code, out, err = run("dissect", "--json", path)
    summary: dict[str, Any] = json.loads(out)
    assert code == int(bool(summary["errors"] or not summary["complete"])), err
    assert err.count("\n") == len(summary["errors"])
    assert "Traceback" not in err
    checked_code, checked, _ = run("check", "--json", path)
    answer = json.loads(checked)
    assert answer["identical"]
    assert (answer["complete"], answer["errors"]) == (summary["complete"], summary["errors"])
    assert checked_code == code
    extracted_code, _, err = run("extract", path, "--raw", path.with_suffix(".ram"))
    assert extracted_code in (0, 1, 2)
    assert err.count("\n") <= 1
    assert "Traceback" not in err
    return summary


def block_list(*blocks: tuple[str, int], total: int) -> bytes:
    opened = streams.section(SectionType.START, "ram", section_id=2, version_id=4)
    listed = b"".join(RamBlock(name=name, used_length=length).build() for name, length in blocks)
    return opened + BlockListHeader(word=total | RamFlag.MEM_SIZE).build() + listed


def test_an_exabyte_of_ram_takes_no_memory(tmp_path: Path) -> None:
    pages = [streams.page(EXABYTE - PAGE, block="pc.ram"), streams.zero(0), streams.zero(EXABYTE // 2, 3)]
    ram = streams.ram_start({"pc.ram": EXABYTE}) + streams.ram_part(*pages) + streams.ram_end()
    summary = answered(tmp_path / "a.mig", HEAD + ram + streams.eof())
    assert summary["complete"]
    assert summary["ram_blocks"][0]["pages"] == {"normal": 1, "zero": 4, "sent_again": 0, "seen": 5}


def test_pages_far_apart_take_no_more_memory_than_their_records(tmp_path: Path) -> None:
    count = 400_000
    records = b"".join((place << 40 | place >> 20 << 30 | 0x22).to_bytes(8) + b"\0" for place in range(1, 1 << 19))
    first = streams.zero(0, block="pc.ram")
    ram = streams.ram_start({"pc.ram": 1 << 63}) + streams.ram_part(first + records[: 9 * count]) + streams.ram_end()
    path = tmp_path / "a.mig"
    path.write_bytes(HEAD + ram + streams.eof())
    code, out, err = run("dissect", "--json", path)
    assert (code, err) == (0, "")
    assert json.loads(out)["ram_blocks"][0]["pages"]["seen"] == 1 + count


@pytest.mark.parametrize(
    ("data", "message"),
    [
        # Blocks of no length, as many as it likes: the total is never used up.
        (
            HEAD + block_list(*((f"{n:0255x}", 0) for n in range(4_000)), total=EXABYTE),
            "the list is longer than 1048576",
        ),
        (HEAD + block_list(("pc.ram", EXABYTE), total=EXABYTE), "the stream ends here"),
        (HEAD + block_list(("pc.ram", EXABYTE), total=PAGE), "0x1000 of the total are left"),
        (HEAD + block_list(("", PAGE), total=PAGE), "a block without a name"),
        (HEAD + RAM + streams.eof() + b"\6\xff\xff\xff\xff", "a description of 4294967295 bytes, the limit is"),
        (streams.header() + b"\7\xff\xff\xff\xff", "the machine type's name has 4294967295 bytes"),
        (HEAD + b"\x08\0\7\0\4\xff\xff\xff\xff", "the limit is 1073741824 (--max-package)"),
    ],
)
def test_a_count_or_length_of_four_billion_is_refused_in_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    (error,) = answered(tmp_path / "a.mig", data)["errors"]
    assert message in error["message"]


def test_as_many_blocks_as_go_into_a_list_take_little_memory(tmp_path: Path) -> None:
    """The list is refused before anybody has it, whatever the command: so one of them is enough."""
    blocks = b"".join(b"\x08%08x" % number + bytes(8) for number in range(62_000))
    assert blocks.startswith(RamBlock(name="00000000", used_length=0).build())
    path = tmp_path / "a.mig"
    path.write_bytes(HEAD + block_list(total=EXABYTE) + blocks)
    code, out, err = run("check", "--json", path)
    (error,) = json.loads(out)["errors"]
    assert (code, error["message"]) == (1, "the list is longer than 1048576 bytes")
    assert err.count("\n") == 1


def described(*fields: dict[str, Any], name: str = "dev") -> bytes:
    return streams.description(streams.described(name, *fields))


DEEP: Final = b'{"a":' * 200_000
MANY: Final = [streams.field(f"field{n}", "uint8", 1) for n in range(30_000)]
DEVICE: Final = streams.device("dev", bytes(64), section_id=9)
NOTHING: Final = streams.struct_of("v")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(b"\6" + len(DEEP).to_bytes(4) + DEEP, id="nested without end"),
        pytest.param(b"\6\0\x10\0\0" + b"\xff" * (1 << 20), id="no JSON"),
        pytest.param(described(*MANY), id="megabytes of it"),
        pytest.param(described(streams.field("x", "uint8", 1), name="another"), id="of another device"),
        pytest.param(described(streams.field("x", "uint8", 1, array_len=1 << 32)), id="2^32 elements"),
        pytest.param(described(streams.field("x", "buffer", 1 << 60)), id="an exabyte"),
        pytest.param(described(streams.field("x", "struct", 0, array_len=1 << 32, struct=NOTHING)), id="2^32 nothings"),
    ],
)
def test_a_description_that_lies_costs_the_device_and_nothing_else(text: bytes, tmp_path: Path) -> None:
    summary = answered(tmp_path / "a.mig", HEAD + RAM + DEVICE + streams.eof() + text)
    assert [section["name"] for section in summary["sections"] if section["type"] == "FULL"] == ["dev"]
    assert summary["devices"] == {}
    assert [block["pages"]["seen"] for block in summary["ram_blocks"]] == [16, 2]


def test_what_a_writer_gave_before_it_died_is_told(tmp_path: Path) -> None:
    pipe, stream = tmp_path / "pipe", tmp_path / "a.mig"
    os.mkfifo(pipe)
    stream.write_bytes((HEAD + RAM)[:-3])
    command = [sys.executable, "-c", LIMITED, "dissect", "--json", str(pipe)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as reader,
        subprocess.Popen(["sh", "-c", 'exec >"$1"; cat "$2"; kill -KILL $$', "sh", pipe, stream]) as writer,
    ):
        out, err = reader.communicate(timeout=60)
    assert writer.returncode == -signal.SIGKILL
    assert (reader.returncode, err.count("\n")) == (1, 1)
    summary = json.loads(out)
    assert not summary["complete"]
    assert [block["pages"]["seen"] for block in summary["ram_blocks"]] == [16, 2]
