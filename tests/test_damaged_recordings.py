"""Whatever happens to the file of a recording: an answer of each command, and never one that says that all is well."""

from pathlib import Path

import pytest

from tests.damaged import KINDS, Damage, assert_all_answered, assert_answered, run, sample
from tests.test_mutations import little_memory

COUNTS = {"precopy": 15, "postcopy": 20, "preempt": 50, "multifd": 6, "multifd zlib": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(autouse=True)
def no_schemas(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMIGRATE_CACHE", str(folder / "cache"))


@pytest.mark.parametrize("name", KINDS)
def test_a_damaged_recording_gets_an_answer_of_each_command(name: str, folder: Path) -> None:
    with little_memory():
        assert_all_answered(sample(name, folder), name, COUNTS[name], folder)


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_recording_is_all_well(name: str, folder: Path) -> None:
    """Or the test above would prove nothing."""
    whole = sample(name, folder)
    assert_answered(whole, Damage("nothing", whole.data, is_told=False), folder)
    for words in (["dissect"], ["check"], ["extract", "--raw", folder / "ram"], ["diff", folder / f"{name}.tap"]):
        code, _, err = run(*words, folder / f"{name}.tap")
        assert (code, err) == (0, ""), (words, err)
