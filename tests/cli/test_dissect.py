"""``qmigrate dissect``."""

import json
from pathlib import Path

import pytest

from qmigrate.cli.main import main
from tests import streams

Output = pytest.CaptureFixture[str]


@pytest.fixture
def stream(tmp_path: Path) -> str:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    return str(path)


@pytest.fixture
def postcopy(tmp_path: Path) -> str:
    path = tmp_path / "p.mig"
    path.write_bytes(streams.postcopy())
    return str(path)


def test_the_story_is_told_without_a_colour_where_it_is_no_terminal(stream: str, capsys: Output) -> None:
    assert main(["dissect", stream]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{stream}  complete, 21,752 bytes\n\nMachine       pc-q35-10.0\n")
    assert "\x1b" not in captured.out
    assert captured.err == ""


def test_the_structure_begins_with_the_header(stream: str, capsys: Output) -> None:
    assert main(["dissect", "--structure", stream]) == 0
    assert capsys.readouterr().out.startswith(
        "       0x0         8  HEADER  version 3\n       0x8        16  CONFIGURATION"
    )


@pytest.mark.parametrize("name", ["0000:00:04.0/serial/1", "0000:00:04.0/serial", "serial", "serial/1"])
def test_a_device_is_found_by_each_of_its_names(name: str, stream: str, capsys: Output) -> None:
    assert main(["dissect", "--device", name, stream]) == 0
    assert capsys.readouterr().out.startswith("0000:00:04.0/serial/1  FULL at 0x516d, 74 bytes, section 7, version 3\n")


def test_a_device_that_is_not_there_ends_with_1(stream: str, capsys: Output) -> None:
    assert main(["dissect", "--device", "serail", stream]) == 1
    assert capsys.readouterr() == (
        "",
        f"qmigrate: {stream}: no device 'serail' in this stream; did you mean serial?\n",
    )


def test_a_device_that_was_not_decoded_says_why(postcopy: str, capsys: Output) -> None:
    assert main(["dissect", "--device", "timer", postcopy]) == 0
    assert capsys.readouterr().out == (
        "timer/0  FULL at 0x17b, 41 bytes, section 0, version 2\nnot decoded: no description in this stream\n"
    )


def test_a_device_for_programs_is_its_fields(stream: str, capsys: Output) -> None:
    assert main(["dissect", "--device", "timer", "--json", stream]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "timer/0": {"cpu_ticks_offset": -5, "unused": "00" * 8, "flag": True}
    }


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("timer.cpu_ticks_offset", "-5\n"),
        ("timer/0.flag", "true\n"),
        ("serial.id", b"serial\0\1\2\3\4\5".hex() + "\n"),
        ("serial.lines[1].irq", "3\n"),
        ("serial.lines[0]", '{\n  "level": 1,\n  "irq": 4\n}\n'),
    ],
)
def test_a_field_is_its_value_alone(path: str, value: str, stream: str, capsys: Output) -> None:
    assert main(["dissect", "--field", path, stream]) == 0
    assert capsys.readouterr() == (value, "")


def test_a_field_for_programs_is_json(stream: str, capsys: Output) -> None:
    assert main(["dissect", "--field", "serial.id", "--json", stream]) == 0
    assert json.loads(capsys.readouterr().out) == b"serial\0\1\2\3\4\5".hex()


def test_a_field_that_is_not_there_says_what_is(stream: str, capsys: Output) -> None:
    assert main(["dissect", "--field", "serial.nothing", stream]) == 1
    assert capsys.readouterr() == (
        "",
        f"qmigrate: {stream}: no field 'serial.nothing' in this stream; 0000:00:04.0/serial/1 has divider, fifo, id, "
        "lines\n",
    )


def test_a_field_of_a_device_that_was_not_decoded_says_why(postcopy: str, capsys: Output) -> None:
    assert main(["dissect", "--field", "timer.flag", postcopy]) == 1
    assert capsys.readouterr() == (
        "",
        f"qmigrate: {postcopy}: no field 'timer.flag' in this stream; timer/0 was not decoded: "
        "no description in this stream\n",
    )


def test_ram_is_told_by_block(stream: str, capsys: Output) -> None:
    assert main(["dissect", "--ram", stream]) == 0
    assert capsys.readouterr().out.startswith("RAM  2 blocks, 72 KiB, pages of 4 KiB\n")
    assert main(["dissect", "--ram", "--json", stream]) == 0
    assert [block["name"] for block in json.loads(capsys.readouterr().out)["ram_blocks"]] == ["pc.ram", "pc.rom"]


def test_json_is_one_value_and_ndjson_one_a_line(stream: str, capsys: Output) -> None:
    assert main(["dissect", "--json", stream]) == 0
    assert json.loads(capsys.readouterr().out)["machine_type"] == "pc-q35-10.0"
    assert main(["dissect", "--ndjson", stream]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records[0] == {"offset": 0, "length": 8, "record": "HEADER", "version": 3}
    assert main(["dissect", "--structure", "--ndjson", stream]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == records


def test_the_page_size_can_be_told(tmp_path: Path, capsys: Output) -> None:
    path = tmp_path / "a.mig"
    part = streams.ram_part(streams.page(0, b"\1" * 8192, block="ram", page_size=8192))
    path.write_bytes(streams.header() + streams.configuration("pc-x") + streams.ram_start({"ram": 8192}) + part)
    assert main(["dissect", "--structure", "--page-size", "8K", str(path)]) == 1
    captured = capsys.readouterr()
    assert "8204    PAGE  ram  0x0–0x2000  1 page  named\n" in captured.out
    assert main(["dissect", str(path)]) == 1
    assert capsys.readouterr().err.endswith(": page header has the unknown combination of flags 0x101\n")


def test_a_limit_is_named_where_it_is_met(stream: str, postcopy: str, capsys: Output) -> None:
    assert main(["dissect", "--max-device-state", "64", stream]) == 1
    assert capsys.readouterr().err == (
        f"qmigrate: {stream}: 0x5144: more than 64 bytes of device state (--max-device-state)\n"
    )
    assert main(["dissect", "--max-package", "0x40", postcopy]) == 1
    assert capsys.readouterr().err == (
        f"qmigrate: {postcopy}: 0x172: PACKAGED: a package of 143 bytes, the limit is 64 (--max-package)\n"
    )


@pytest.mark.parametrize("depth", [10, 150, 200, 240, 300, 3000])
@pytest.mark.parametrize(
    "view", [[], ["--device", "deep"], ["--device", "deep", "--json"], ["--field", "deep.x"], ["--json"]]
)
def test_state_that_is_nested_deep_leaves_no_traceback(
    depth: int, view: list[str], tmp_path: Path, capsys: Output
) -> None:
    nested = '{"name": "x", "type": "uint8", "size": 1}'
    opening = '{"name": "x", "type": "struct", "size": 1, "struct": {"vmsd_name": "s", "version": 1, "fields": ['
    nested = opening * depth + nested + "]}}" * depth
    text = (
        '{"page_size": 4096, "devices": [{"name": "deep", "instance_id": 0, "vmsd_name": "deep", "version": 1, '
        f'"fields": [{nested}]}}]}}'
    ).encode()
    path = tmp_path / "a.mig"
    path.write_bytes(
        streams.header()
        + streams.ram_start()
        + streams.ram_end()
        + streams.device("deep", b"\x07", section_id=9)
        + streams.eof()
        + b"\x06"
        + len(text).to_bytes(4)
        + text
    )
    assert main(["dissect", *view, str(path)]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err
