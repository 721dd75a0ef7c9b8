"""Every real stream of the corpus: valid, the same again when rebuilt, wholly decoded, and as its recipe says."""

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import qmigrate
from qmigrate.analysis.check import Checked, check
from qmigrate.analysis.summary import summarize
from qmigrate.format.stream import SectionType
from tests.walking import CORPUS, InMemory, corpus

FOLDER = Path(__file__).parent / "corpus"
RECIPES: dict[str, dict[str, Any]] = tomllib.loads((FOLDER / "recipes.toml").read_text())
SCHEMA = json.loads((Path(qmigrate.__file__).parent / "report" / "dissect.schema.json").read_text())
MACHINES = {"pc": "pc-i440fx", "q35": "pc-q35"}
VERSIONS = ["5.2", "7.2", "10.0", "11.1"]
KINDS = ["pc-paused", "pc-running", "pc-postcopy", "q35-paused", "q35-running", "q35-advised", "q35-many"]


def test_each_kind_of_stream_is_here_of_each_version_with_its_recipe() -> None:
    expected = {f"{kind}-{version}" for kind in KINDS for version in VERSIONS}
    assert expected <= set(CORPUS) == set(RECIPES)


@pytest.fixture(params=CORPUS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def checked(name: str) -> Checked:
    return check(InMemory(corpus(name)))


def test_a_real_stream_is_valid_identical_decoded_and_as_its_recipe_says(name: str, checked: Checked) -> None:
    stream, recipe, contents = corpus(name), RECIPES[name], checked.gathering.contents
    assert contents.errors == []
    assert checked.valid
    assert checked.differences == []
    assert checked.length == contents.length == len(stream)
    has_description = contents.description is not None
    assert has_description == ("-postcopy-" not in name)
    undecoded = [section for section in contents.sections if section.kind == SectionType.FULL and section.state is None]
    assert contents.undecoded == []
    assert (undecoded == []) == has_description
    assert {section.reason for section in undecoded} <= {"no description in this stream"}
    check_recipe(name, recipe, checked)
    check_summary(summarize(contents))


def check_recipe(name: str, recipe: dict[str, Any], checked: Checked) -> None:
    contents = checked.gathering.contents
    version = name.rpartition("-")[2]
    assert recipe["qemu"].startswith(version)
    assert contents.machine_type == f"{MACHINES[name.partition('-')[0]]}-{version}"
    assert f"-machine {name.partition('-')[0]}" in recipe["arguments"]
    commands = [place.command.name for place in contents.commands]
    # Capabilities that are not announced show in the commands: those of postcopy.
    assert ("postcopy-ram" in recipe["capabilities"]) == ("POSTCOPY_ADVISE" in commands)
    assert set(recipe["capabilities"]) <= {"postcopy-ram", "return-path"}
    assert contents.capabilities == ()
    assert ("PACKAGED" in commands) == ("-postcopy-" in name)
    memory = int(recipe["arguments"].split("-m ")[1].split()[0]) << 20
    assert contents.blocks["pc.ram"].length == memory
    if "-paused-" in name:
        assert contents.passes == 1
        assert all(block.again == 0 for block in contents.blocks.values())
    if "-running-" in name:
        assert contents.passes > 1
    assert all(block.seen.count == block.length >> 12 for block in contents.blocks.values())


def check_summary(summary: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(summary))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(plain, SCHEMA)
    assert plain == summary


def test_no_field_of_a_known_type_stays_bytes(name: str, checked: Checked) -> None:
    # What QEMU names no type for, or whose layout is another's; and buffers.
    assert set(checked.opaque_types) <= {"unknown", "shpc", "scsi-requests", "virtio-gpu", "usb-redir-parser"}, name
