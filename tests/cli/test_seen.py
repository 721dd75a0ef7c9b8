"""--report and --json: files that appear whole or not at all, and are refused before anything begins."""

import argparse
import io
import json
import os
import socket
import stat
from pathlib import Path

import pytest

from qmigrate.cli.main import build_parser, main
from qmigrate.cli.newfile import NewFile
from qmigrate.cli.seen import Seen, looks_closely
from qmigrate.errors import RefusedError
from tests import stories


def parsed(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["migrate", "a", "b", *words])


def test_both_are_written_at_the_end(tmp_path: Path) -> None:
    report, data, out = tmp_path / "a.html", tmp_path / "a.json", io.StringIO()
    args = parsed("--report", str(report), "--json", str(data))
    assert looks_closely(args)
    with Seen(args, out) as seen:
        assert not report.exists()
        seen.write(stories.precopy().events)
    assert report.read_text().startswith("<!DOCTYPE html>")
    assert json.loads(data.read_text())["outcome"] == "completed"
    assert out.getvalue() == ""
    assert sorted(tmp_path.iterdir()) == [report, data]


def test_json_without_a_file_is_for_standard_output() -> None:
    out = io.StringIO()
    with Seen(parsed("--json"), out) as seen:
        seen.write(stories.failed().events)
    assert json.loads(out.getvalue())["exit_code"] == 3


def test_nothing_asked_for_is_nothing_made() -> None:
    out = io.StringIO()
    with Seen(parsed(), out) as seen:
        seen.write(stories.failed().events)
    assert (out.getvalue(), looks_closely(parsed())) == ("", False)


def test_two_kinds_of_data_on_one_output_are_refused() -> None:
    with pytest.raises(RefusedError, match="--json and --ndjson both want standard output"):
        Seen(parsed("--json", "--ndjson"), io.StringIO())


@pytest.mark.parametrize("command", ["migrate", "recover"])
@pytest.mark.parametrize("option", ["--report", "--json"])
def test_a_path_that_can_not_be_written_is_refused_before_anybody_is_asked(
    command: str, option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The addresses are of nobody: that would be told else."""
    for path, why in ((tmp_path / "no" / "a.html", "No such file or directory"), (tmp_path, "Is a directory")):
        assert main([command, "/nowhere/a", "/nowhere/b", option, str(path)]) == 2
        assert capsys.readouterr().err == f"qmigrate: {path}: {why}\n"
    assert list(tmp_path.iterdir()) == []


def test_what_is_refused_later_leaves_an_older_report_as_it_was(tmp_path: Path) -> None:
    report = tmp_path / "a.html"
    report.write_text("older")
    assert main(["migrate", "/nowhere/a", "/nowhere/b", "--report", str(report), "--json", str(tmp_path / "b")]) == 2
    assert report.read_text() == "older"
    assert list(tmp_path.iterdir()) == [report]


def test_one_that_can_not_be_made_takes_the_other_with_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Seen(parsed("--report", str(tmp_path / "a.html"), "--json", str(tmp_path / "no" / "b")), io.StringIO())
    assert list(tmp_path.iterdir()) == []


def test_an_address_behind_json_is_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        with pytest.raises(SystemExit):
            build_parser().parse_args(["migrate", "--json", path, "b"])
    assert "is a socket (addresses go before --json)" in capsys.readouterr().err


def test_a_disk_that_fills_up_is_told_and_changes_no_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with Seen(parsed("--report", str(tmp_path / "a.html")), io.StringIO()) as seen:
        monkeypatch.setattr(Path, "write_text", full)
        seen.write(stories.precopy().events)
    assert capsys.readouterr().err == f"qmigrate: {tmp_path / 'a.html'}: No space left on device\n"
    assert list(tmp_path.iterdir()) == []


# ---- the file ----


def test_a_new_file_has_the_usual_mode_and_an_old_one_keeps_its_own(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("older")
    old.chmod(0o640)
    mask = os.umask(0o027)
    try:
        for path in (new, old):
            with NewFile(str(path)) as file:
                file.finish("text")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(new.stat().st_mode) == 0o640
    assert (stat.S_IMODE(old.stat().st_mode), old.read_text()) == (0o640, "text")


def test_a_link_stays_one(tmp_path: Path) -> None:
    (tmp_path / "to").mkdir()
    link, target = tmp_path / "link", tmp_path / "to" / "file"
    link.symlink_to(target)
    with NewFile(str(link)) as file:
        file.finish("text")
    assert link.is_symlink()
    assert target.read_text() == "text"


def test_what_is_no_file_is_written_as_it_is() -> None:
    with NewFile("/dev/null") as file:
        file.finish("text")
    assert not Path("/dev/null").is_file()


def test_no_name_is_refused() -> None:
    with pytest.raises(OSError, match="Is a directory"):
        NewFile("")
