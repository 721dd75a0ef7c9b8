"""``--description``: devices are decoded by the description of another stream."""

import json
from pathlib import Path

import pytest

from qmigrate.cli.main import main
from tests import streams

Output = pytest.CaptureFixture[str]


@pytest.fixture
def precopy(tmp_path: Path) -> str:
    path = tmp_path / "precopy.mig"
    path.write_bytes(streams.minimal())
    return str(path)


@pytest.fixture
def postcopy(tmp_path: Path) -> str:
    path = tmp_path / "postcopy.mig"
    path.write_bytes(streams.postcopy())
    return str(path)


def test_a_package_is_decoded_by_another_streams_description(precopy: str, postcopy: str, capsys: Output) -> None:
    arguments = ["--description", precopy, postcopy]
    assert main(["dissect", "--field", "timer.cpu_ticks_offset", *arguments]) == 0
    assert capsys.readouterr().out == "-5\n"
    assert main(["dissect", "--json", *arguments]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert list(answer["devices"]) == ["timer/0", "0000:00:04.0/serial/1"]
    assert answer["oddities"] == [
        "There is no description of the devices (postcopy sends none): another stream's was used."
    ]
    assert main(["check", "--strict", *arguments]) == 0
    capsys.readouterr()
    assert main(["check", "--strict", postcopy]) == 1


@pytest.mark.parametrize("command", ["dissect", "check"])
def test_many_files_are_decoded_by_it_in_processes(command: str, precopy: str, postcopy: str, capsys: Output) -> None:
    assert main([command, "--json", "--jobs", "2", "--description", precopy, postcopy, postcopy]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["file"] for answer in answers] == [postcopy, postcopy]
    if command == "dissect":
        assert [len(answer["devices"]) for answer in answers] == [2, 2]
    else:
        assert [answer["undecoded_sections"] for answer in answers] == [0, 0]


def test_a_streams_own_description_goes_first(precopy: str, tmp_path: Path, capsys: Output) -> None:
    other = tmp_path / "other.mig"
    head = streams.header() + streams.configuration() + streams.ram_start() + streams.ram() + streams.devices()
    other.write_bytes(head + streams.eof() + streams.description(streams.described("timer")))
    assert main(["dissect", "--field", "timer.cpu_ticks_offset", "--description", str(other), precopy]) == 0
    assert capsys.readouterr().out == "-5\n"


def test_a_description_that_is_not_there_is_an_error_of_usage(
    precopy: str, postcopy: str, tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "not-a-stream").write_bytes(b"\x7fELF and more")
    broken = tmp_path / "broken.mig"
    broken.write_bytes(streams.minimal()[:-1])
    for path, message in [
        (postcopy, "this stream has no description of its devices"),
        (str(tmp_path / "nowhere"), "No such file or directory"),
        (
            str(tmp_path / "not-a-stream"),
            "no migration stream, but an ELF file; a dump of memory holds no device state: migrate to a file instead",
        ),
        (str(broken), "the stream ends here, in the description"),
    ]:
        assert main(["check", "--description", path, precopy]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        last = captured.err.splitlines()[-1]
        assert last.startswith(f"qmigrate check: error: --description {path}: ")
        assert last.endswith(message)
