"""``qmigrate check``."""

import json
import zlib
from pathlib import Path

import pytest

from qmigrate.cli.main import main
from tests import streams

Output = pytest.CaptureFixture[str]


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    return path


def test_a_good_stream_is_valid_and_identical(stream: Path, capsys: Output) -> None:
    assert main(["check", str(stream)]) == 0
    assert capsys.readouterr() == (
        f"""\
{stream}  valid, identical when rebuilt

  rebuilt from values        425
  page contents           20,480
  buffer fields               20
  fields of unknown type       0
  undecoded sections           0
  description                827
  in all                  21,752  bytes
""",
        "",
    )


def test_the_answer_for_programs_is_json(stream: Path, capsys: Output) -> None:
    assert main(["check", "--strict", "--json", str(stream)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["valid"] is True
    assert answer["identical"] is True
    assert answer["length"] == 21752
    assert answer["opaque"]["page contents"] == 20480
    assert answer["errors"] == []


def test_strict_says_no_where_a_device_was_not_decoded(stream: Path, capsys: Output) -> None:
    stream.write_bytes(streams.postcopy())
    assert main(["check", str(stream)]) == 0
    assert capsys.readouterr().out.endswith("\n2 device sections not decoded\n")
    assert main(["check", "--strict", str(stream)]) == 1
    assert capsys.readouterr().err == f"qmigrate: {stream}: --strict: not decoded: 2 device sections\n"


def test_bytes_behind_the_end_make_a_stream_invalid(stream: Path, capsys: Output) -> None:
    stream.write_bytes(streams.minimal() + b"more")
    assert main(["check", str(stream)]) == 1
    assert capsys.readouterr().out.startswith(
        f"{stream}  not valid, identical when rebuilt\n  4 bytes behind the end of the stream\n"
    )


def test_a_stream_that_ends_too_soon_is_not_valid(stream: Path, capsys: Output) -> None:
    stream.write_bytes(streams.minimal()[:0x20B7])
    assert main(["check", str(stream)]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{stream}  not valid, identical when rebuilt\n  0x20b7: ram: pc.ram: ")
    assert captured.err.startswith(f"qmigrate: {stream}: 0x20b7: ram: pc.ram: ")


def test_what_holds_no_stream_is_no_answer(stream: Path, capsys: Output) -> None:
    stream.write_bytes(b"")
    assert main(["check", str(stream)]) == 2
    assert capsys.readouterr().out == ""


def test_of_a_compressed_stream_that_is_cut_what_can_be_unpacked_is_checked(stream: Path, capsys: Output) -> None:
    packed = zlib.compressobj(0, wbits=31)  # as it is, so that all of it can be unpacked up to the cut
    stream.write_bytes((packed.compress(streams.minimal()) + packed.flush())[: 10 + 5 + 0x20B7])
    faults = (
        "0x20b7: the input can't be read on: gzip: Compressed file ended before the end-of-stream marker was reached",
        "0x20b7: ram: pc.ram: word: the stream ends here",
    )
    for argument in ([], ["--json"]):
        assert main(["check", *argument, str(stream)]) == 1
        output = capsys.readouterr()
        assert "8,375  bytes" in output.out if not argument else json.loads(output.out)["length"] == 0x20B7
        assert output.err.splitlines() == [f"qmigrate: {stream}: {fault}" for fault in faults]
    assert main(["dissect", "--structure", str(stream)]) == 1
    assert capsys.readouterr().err.splitlines() == [f"qmigrate: {stream}: {fault}" for fault in faults]
