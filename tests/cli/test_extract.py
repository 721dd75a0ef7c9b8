"""``qmigrate extract``."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qmigrate.cli.main import main
from qmigrate.format.ram import RamBlock
from tests import streams
from tests.streams import PAGE

Output = pytest.CaptureFixture[str]


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    return path


def test_each_block_becomes_a_file_of_its_length(stream: Path, tmp_path: Path, capsys: Output) -> None:
    folder = tmp_path / "out"
    assert main(["extract", str(stream), "--raw", str(folder)]) == 0
    assert capsys.readouterr() == (
        f"""\
{folder}  2 files and blocks.json
  block   file          size    data
  pc.ram  pc.ram.raw  64 KiB  16 KiB
  pc.rom  pc.rom.raw   8 KiB   4 KiB
""",
        "",
    )
    assert sorted(path.name for path in folder.iterdir()) == ["blocks.json", "pc.ram.raw", "pc.rom.raw"]
    assert (folder / "pc.ram.raw").stat().st_size == 64 * 1024


def test_what_was_written_is_told_to_programs(stream: Path, tmp_path: Path, capsys: Output) -> None:
    assert main(["extract", str(stream), "--raw", str(tmp_path / "out"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["blocks"][0] == {"name": "pc.ram", "file": "pc.ram.raw", "length": 65536, "data": 16384}
    assert told["complete"] is True


def test_what_was_good_of_a_damaged_stream_is_kept(stream: Path, tmp_path: Path, capsys: Output) -> None:
    stream.write_bytes(streams.minimal()[:0x20B7])
    folder = tmp_path / "out"
    assert main(["extract", str(stream), "--raw", str(folder)]) == 1
    assert capsys.readouterr().err.startswith(f"qmigrate: {stream}: 0x20b7: ram: pc.ram: ")
    assert (folder / "pc.ram.raw").stat().st_size == 64 * 1024


def test_a_stream_without_ram_is_said(stream: Path, tmp_path: Path, capsys: Output) -> None:
    stream.write_bytes(streams.header() + streams.configuration() + streams.eof())
    assert main(["extract", str(stream), "--raw", str(tmp_path / "out")]) == 1
    assert capsys.readouterr() == ("", f"qmigrate: {stream}: there is no RAM in this stream\n")


def test_a_folder_that_cannot_be_made_is_one_line(stream: Path, capsys: Output) -> None:
    assert main(["extract", str(stream), "--raw", str(stream / "out")]) == 2
    assert capsys.readouterr() == ("", f"qmigrate: {stream}/out: Not a directory\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_told_to_stop_it_leaves_nothing_half_written(number: signal.Signals, tmp_path: Path) -> None:
    pipe, folder = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(pipe)
    command = [sys.executable, "-m", "qmigrate", "extract", "--raw", str(folder), str(pipe)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
        pipe.open("wb", buffering=0) as writer,
    ):
        writer.write(streams.header() + streams.ram_start() + b"\2\0\0\0\2" + streams.page(0, block="pc.ram"))
        while not (folder.exists() and len(list(folder.iterdir())) == 2):
            time.sleep(0.01)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (128 + number, b"", b"")
    assert list(folder.iterdir()) == []


def test_an_index_that_can_not_be_written_leaves_nothing_half_written(
    stream: Path, tmp_path: Path, capsys: Output
) -> None:
    folder = tmp_path / "out"
    (folder / "blocks.json").mkdir(parents=True)
    assert main(["extract", str(stream), "--raw", str(folder)]) == 2
    assert capsys.readouterr().err == f"qmigrate: {folder}/blocks.json: Is a directory\n"
    assert not [each.name for each in folder.iterdir() if each.name.endswith(".part")]


def test_a_hostile_name_stays_in_the_folder(stream: Path, tmp_path: Path, capsys: Output) -> None:
    name = "../../[bold]\x1b[31m"
    ram = streams.ram_start({name: streams.PAGE}) + streams.ram_end(streams.zero(0, block=name))
    stream.write_bytes(streams.header() + ram + streams.eof())
    folder = tmp_path / "deep" / "out"
    assert main(["extract", str(stream), "--raw", str(folder)]) == 0
    assert r"  ../../[bold]\x1b[31m  ..%2F..%2F%5Bbold%5D%1B%5B31m.raw  " in capsys.readouterr().out
    assert len(list(folder.iterdir())) == 2
    assert list(folder.parent.iterdir()) == [folder]


def test_ram_that_was_left_out_is_named(tmp_path: Path, capsys: Output) -> None:
    blocks = [
        RamBlock(name="shared", used_length=4 * PAGE, page_size=None, address=0),
        RamBlock(name="rom", used_length=PAGE, page_size=None, address=1 << 32),
    ]
    head = streams.header() + streams.configuration(capabilities=["x-ignore-shared"])
    pages = streams.ram_end(streams.page(0, block="rom"))
    stream = tmp_path / "a.mig"
    stream.write_bytes(head + streams.ram_start(blocks) + pages + streams.devices() + streams.eof())
    assert main(["extract", str(stream), "--raw", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == (
        f"qmigrate: {stream}: x-ignore-shared: RAM that was shared is not in it, so all is zero here of shared\n"
    )


def test_an_input_is_never_written_over(tmp_path: Path, capsys: Output) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("pc.ram.raw", "pc.rom.raw", "blocks.json"):
        stream = folder / name
        stream.write_bytes(streams.minimal())
        assert main(["extract", str(stream), "--raw", str(folder)]) == 2
        assert capsys.readouterr() == (
            "",
            f"qmigrate: {stream}: an input, which would be overwritten: extract into another directory\n",
        )
        assert [(each.name, each.read_bytes()) for each in folder.iterdir()] == [(name, streams.minimal())]
        stream.unlink()


def test_another_of_the_inputs_is_never_written_over(stream: Path, tmp_path: Path, capsys: Output) -> None:
    other = tmp_path / "out" / "a.mig" / "pc.ram.raw"
    other.parent.mkdir(parents=True)
    other.write_bytes(streams.minimal())
    assert main(["extract", str(stream), str(other), "--raw", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"qmigrate: {other}: an input, which would be overwritten")
    assert other.read_bytes() == streams.minimal()
