"""A file's answer as a pure function: for pools, and for clusters."""

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import qmigrate.report
from qmigrate.analysis.check import check_file
from qmigrate.analysis.summary import summarize_file
from qmigrate.format.walk import Limits
from tests import streams

SCHEMA = json.loads((Path(qmigrate.report.__file__).parent / "dissect.schema.json").read_text())
Answer = Callable[..., dict[str, Any]]
ANSWERS = [summarize_file, check_file]


@pytest.fixture
def stream(tmp_path: Path) -> Path:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    return path


def test_a_summary_is_what_the_schema_says_with_the_file_in_front(stream: Path) -> None:
    summary = summarize_file(stream)
    assert next(iter(summary.items())) == ("file", str(stream))
    jsonschema.validate(summary, SCHEMA)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize(
    ("made", "error"),
    [
        (lambda _: None, "No such file or directory"),
        (lambda path: path.mkdir(), "a directory, expected a migration stream"),
        (lambda path: path.write_bytes(b""), "no migration stream: 0 bytes are there, its header has 8"),
    ],
)
def test_a_file_that_is_no_stream_gives_its_error(
    answer: Answer, made: Callable[[Path], object], error: str, tmp_path: Path
) -> None:
    path = tmp_path / "x"
    made(path)
    found = answer(path)
    assert found == {"file": str(path), "error": error}
    jsonschema.validate(found, SCHEMA)  # of a check too: there is nothing but the error


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_damaged_stream_gives_what_was_good_and_its_faults(answer: Answer, stream: Path) -> None:
    stream.write_bytes(streams.minimal()[:0x20B7])
    found = answer(stream)
    assert found["complete"] is False
    assert [error["offset"] for error in found["errors"]] == [0x20B7]


def test_what_reading_is_told_is_passed_on(stream: Path) -> None:
    found = summarize_file(stream, limits=Limits(device_state=64))
    assert found["errors"][0]["message"] == "more than 64 bytes of device state (--max-device-state)"


@pytest.mark.parametrize("answer", ANSWERS)
def test_it_can_be_pickled_and_run_in_any_kind_of_process(answer: Answer, stream: Path) -> None:
    work = partial(answer, limits=Limits())
    assert pickle.loads(pickle.dumps(work))(stream) == work(stream)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert list(pool.map(work, [stream])) == [work(stream)]
