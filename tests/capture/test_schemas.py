"""The cache of device schemas: what is kept, what is passed over, and which fits a stream."""

import json
import os
import pickle
import resource
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

import qmigrate
from qmigrate.analysis.devices import plain
from qmigrate.analysis.summary import oddities
from qmigrate.capture.schemas import Damaged, Schema, SchemaCache, SchemaError, cache_folder, read_schema
from qmigrate.format.command import PostcopyListen, PostcopyRun
from qmigrate.format.stream import SectionType
from tests import streams
from tests.streams import TIMER_FIELDS, described, device, field
from tests.walking import InMemory, corpus

SCHEMA = read_schema(InMemory(streams.minimal()), made_from="a.mig")


@pytest.fixture
def cache(tmp_path: Path) -> SchemaCache:
    return SchemaCache(tmp_path / "schemas")


def made(known: bytes, *devices: bytes, machine: str = "pc-q35-10.0", name: str = "made", at: float = 0.0) -> Schema:
    stream = streams.header() + streams.configuration(machine) + streams.ram_start() + streams.ram()
    schema = read_schema(InMemory(stream + b"".join(devices) + streams.eof() + known), made_from=name)
    return replace(schema, made_at=at)


def postcopy(tmp_path: Path, data: bytes | None = None) -> Path:
    path = tmp_path / "postcopy.mig"
    path.write_bytes(streams.postcopy() if data is None else data)
    return path


# -- what is kept


def test_a_schema_comes_back_as_it_was_kept(cache: SchemaCache) -> None:
    path = cache.add(SCHEMA)
    assert cache.schemas() == [SCHEMA]
    assert cache.named(SCHEMA.id[:4]) == SCHEMA
    assert path.name == f"{SCHEMA.id}.schema"
    assert SCHEMA.sections == (("timer", 0, 2), ("0000:00:04.0/serial", 1, 3))
    assert SCHEMA.machine_type == "pc-q35-10.0"


def test_it_is_for_its_user_alone_and_nothing_half_written_is_left(cache: SchemaCache) -> None:
    path = cache.add(SCHEMA)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700
    assert list(cache.folder.iterdir()) == [path]


def test_the_same_one_made_again_takes_its_place(cache: SchemaCache) -> None:
    for at in (1.0, 2.0):
        cache.add(replace(SCHEMA, made_at=at))
    (one,) = cache.schemas()
    assert one.made_at == 2.0


def test_another_machine_version_or_text_is_another_schema() -> None:
    others = [
        replace(SCHEMA, machine_type="pc"),
        replace(SCHEMA, qemu="7.2.22"),
        replace(SCHEMA, sections=SCHEMA.sections[:1]),
        replace(SCHEMA, text=SCHEMA.text + b" "),
    ]
    assert len({schema.id for schema in (SCHEMA, *others)}) == 5
    assert replace(SCHEMA, made_from="elsewhere", made_at=3.0).id == SCHEMA.id


def test_the_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("QMIGRATE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "qmigrate" / "schemas"
    monkeypatch.setenv("QMIGRATE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own" / "schemas"


def test_a_user_without_a_home_has_no_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> NoReturn:
        raise RuntimeError("Could not determine home directory.")

    for name in ("QMIGRATE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert cache_folder() == Path("/.cache/qmigrate/schemas")


def test_names_from_a_stream_are_kept_whatever_they_are(cache: SchemaCache) -> None:
    name = "../\x1b[31m\udc80"
    schema = made(streams.description(described("x", field("x", "uint8", 1))), device("x", b"1", section_id=3))
    schema = replace(schema, machine_type=name, sections=((name, 0, 1),), made_from=name)
    path = cache.add(schema)
    assert path.parent == cache.folder
    assert cache.schemas() == [schema]


def test_a_schema_is_made_of_whole_streams_with_a_description_that_fits() -> None:
    for data, message in [
        (streams.postcopy(), "this stream has no description of its devices"),
        (streams.minimal()[:-1], "the stream ends here, in the description"),
        (
            streams.minimal().replace(b'"divider"', b'"dividex"').replace(b'"size": 12', b'"size": 13'),
            "its own description does not decode 0000:00:04.0/serial/1: the description does not fit",
        ),
    ]:
        with pytest.raises(SchemaError, match=message):
            read_schema(InMemory(data), made_from="x")


# -- what is passed over


def spoiled(cache: SchemaCache, change: bytes) -> list[Damaged]:
    path = cache.add(SCHEMA)
    path.write_bytes(change)
    told: list[Damaged] = []
    assert SchemaCache(cache.folder, told.append).schemas() == []
    return told


def test_a_damaged_file_is_passed_over_and_told(cache: SchemaCache) -> None:
    whole = cache.add(SCHEMA).read_bytes()
    head, text = whole.split(b"\n", 1)
    said = json.loads(head)

    def with_head(**more: object) -> bytes:
        return json.dumps(said | more).encode() + b"\n" + text

    for change, reason in [
        (b"", "it does not begin with a line of JSON"),
        (b"[" * 100_000, "it does not begin with a line of JSON"),
        (b"[]\n", "no schema of version 1"),
        (with_head(qmigrate_schema=2), "no schema of version 1"),
        (whole[:-1], "its description is not what was written there"),
        (whole + b"x", "its description is not what was written there"),
        (with_head(made_at="now"), "its first line has no good made_at"),
        (with_head(made_at=float("nan")), "its first line has no good made_at"),
        (with_head(made_at=float("inf")), "its first line has no good made_at"),
        (with_head(sections=[["a", 0]]), "its first line has no good sections"),
        (with_head(sections=[["a", 0, True]]), "its first line has no good sections"),
        (with_head(qemu="9.9"), "it holds "),
    ]:
        (one,) = spoiled(cache, change)
        assert one.reason.startswith(reason), change[:80]


@given(data=st.data())
def test_any_byte_of_it_may_be_damaged(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = SchemaCache(tmp_path_factory.mktemp("cache"))
    path = cache.add(SCHEMA)
    whole = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(whole) - 1))
    whole[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(whole)
    for schema in cache.schemas():  # only what it says of itself may have changed
        assert (schema.id, schema.text, schema.sections) == (SCHEMA.id, SCHEMA.text, SCHEMA.sections)


def test_the_same_one_made_many_times_at_once_is_whole(cache: SchemaCache) -> None:
    """By threads, which have one process number, as processes of two containers may have."""
    begin = threading.Barrier(4)

    def add(_: int) -> None:
        begin.wait(timeout=60)
        for _ in range(50):
            cache.add(SCHEMA)
            assert cache.schemas() == [SCHEMA]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(add, range(4)))
    assert [path.name for path in cache.folder.iterdir()] == [f"{SCHEMA.id}.schema"]


def test_where_a_schema_has_no_room_its_name_is_told_and_nothing_is_left(cache: SchemaCache) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match=rf"File too large: '{cache.folder}/{SCHEMA.id}\.schema'"):
            cache.add(SCHEMA)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(cache.folder.iterdir()) == []


def test_where_the_folder_should_be_is_something_else(tmp_path: Path) -> None:
    for name in ("file", "dangling"):
        cache = SchemaCache(tmp_path / name)
        if name == "file":
            cache.folder.touch()
        else:
            cache.folder.symlink_to(tmp_path / "nowhere")
        with pytest.raises(NotADirectoryError, match=f"Not a directory: '{cache.folder}'"):
            cache.add(SCHEMA)
        assert cache.schemas() == []


def test_a_folder_in_which_nothing_can_be_made_is_named() -> None:
    folder = Path("/proc/self/task")  # as root may write elsewhere whatever it has no right to
    with pytest.raises(OSError, match=r"'/proc/self/task'$"):
        SchemaCache(folder).add(SCHEMA)


def test_a_folder_that_cannot_be_read_is_told_and_the_stream_is_read_without(tmp_path: Path) -> None:
    folder = tmp_path / "schemas"
    folder.symlink_to(folder)  # as root reads whatever it has no right to
    told: list[Damaged] = []
    cache = SchemaCache(folder, told.append)
    with qmigrate.open(postcopy(tmp_path), description=cache) as migration:
        assert migration.complete
        assert not migration.devices
    assert set(told) == {Damaged(folder, "Too many levels of symbolic links")}
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        cache.schemas()


def test_what_is_no_file_of_ours_is_left_alone(cache: SchemaCache, tmp_path: Path) -> None:
    path = cache.add(SCHEMA)
    os.mkfifo(cache.folder / "pipe.schema")
    (cache.folder / "folder.schema").mkdir()
    (cache.folder / "link.schema").symlink_to(path)
    (cache.folder / "readme").write_text("x")
    told: list[Damaged] = []
    assert SchemaCache(cache.folder, told.append).schemas() == [SCHEMA]
    assert sorted(each.path.name for each in told) == ["folder.schema", "link.schema", "pipe.schema"]
    assert SchemaCache(tmp_path / "nowhere").schemas() == []


# -- which one fits


def test_a_stream_without_a_description_is_decoded_by_the_schema_of_its_sections(
    cache: SchemaCache, tmp_path: Path
) -> None:
    cache.add(SCHEMA)
    with qmigrate.open(postcopy(tmp_path), description=cache) as migration:
        contents = migration.contents
    with qmigrate.open(postcopy(tmp_path), description=SCHEMA.description) as migration:
        expected = migration.contents
    assert contents.devices == expected.devices
    assert len(contents.devices) == 2
    assert (
        "There is no description of the devices (postcopy sends none): they are decoded by "
        f"schema {SCHEMA.id}, made from a.mig." in oddities(contents)
    )


def test_a_streams_own_description_goes_first(cache: SchemaCache, tmp_path: Path) -> None:
    other = made(
        streams.description(described("timer", field("other", "buffer", 17))),
        device("timer", streams.TIMER_STATE, section_id=0, version_id=2),
    )
    cache.add(other)
    path = postcopy(tmp_path, streams.minimal())
    with qmigrate.open(path, description=cache) as migration:
        assert migration.devices["timer/0"].fields[0].name == "cpu_ticks_offset"


def test_of_several_the_one_that_decodes_all_goes_first_then_the_machines_own_then_the_newest(
    cache: SchemaCache, tmp_path: Path
) -> None:
    path = postcopy(tmp_path)
    serial = described("0000:00:04.0/serial", *streams.SERIAL_FIELDS, instance_id=1)
    misfit = described("timer", field("y", "buffer", 16), field("z", "uint64", 8))

    def used(*schemas: Schema) -> str:
        for each in cache.folder.glob("*") if cache.folder.exists() else ():
            each.unlink()
        for schema in schemas:
            cache.add(schema)
        with qmigrate.open(path, description=cache) as migration:
            return next(section.schema or "" for section in migration.sections if section.name == "timer")

    good = made(streams.devices_described(), streams.devices(), name="good", at=1)
    newer = made(streams.devices_described(), streams.devices(), name="newer",
                 machine="pc-q35-9.0", at=5)  # fmt: skip
    bad = replace(good, text=json.dumps({"devices": [misfit, serial]}).encode(), made_from="bad", made_at=9)
    none = replace(good, sections=(("timer", 0, 2),), made_from="none", made_at=9)
    assert used(good, bad, none).endswith("made from good")
    assert used(good, newer).endswith("made from good")
    assert used(replace(newer, made_from="older", made_at=2, qemu="1"), newer).endswith("made from newer")
    assert used(none) == ""
    assert used(bad) == ""  # it decodes serial alone


def test_a_section_that_the_schema_does_not_fit_stays_bytes_with_the_reason(cache: SchemaCache, tmp_path: Path) -> None:
    serial = described("0000:00:04.0/serial", *streams.SERIAL_FIELDS, instance_id=1)
    text = json.dumps({"devices": [described("timer", *TIMER_FIELDS[:2]), serial]}).encode()
    schema = replace(SCHEMA, text=text)
    cache.add(schema)
    with qmigrate.open(postcopy(tmp_path), description=cache) as migration:
        contents = migration.contents
    assert list(contents.devices) == ["0000:00:04.0/serial/1"]
    (timer,) = [section for section in contents.sections if section.name == "timer"]
    assert timer.reason is not None
    assert timer.reason.startswith(f"schema {schema.id}, made from a.mig: the description does not fit: ")


def test_a_false_section_in_a_buffer_is_bytes_under_a_schema(cache: SchemaCache, tmp_path: Path) -> None:
    again = streams.section(SectionType.FULL, "a", section_id=3)
    inside = b"1" * 8 + streams.footer(3) + device("false", b"f" * 20, section_id=9) + again + b"2" * 8
    sections = device("b", b"b", section_id=1) + device("a", inside, section_id=3) + device("d", b"d", section_id=4)
    byte = field("x", "uint8", 1)
    known = streams.description(
        described("b", byte), described("a", field("x", "buffer", len(inside))), described("d", byte)
    )
    package = streams.package(streams.command(PostcopyListen()), sections, streams.command(PostcopyRun()))
    head = streams.header() + streams.configuration() + streams.ram_start() + streams.ram()
    path = postcopy(tmp_path, head + package + streams.ram_end() + streams.eof())
    with qmigrate.open(path, description=cache) as migration:
        (span,) = migration.contents.undecoded
        assert "there are two readings: a to " in span[2]
    cache.add(made(known, sections))
    with qmigrate.open(path, description=cache) as migration:
        assert migration.contents.undecoded == []
        assert list(migration.devices) == ["b/0", "a/0", "d/0"]


def test_a_text_that_is_no_description_fits_nothing(cache: SchemaCache, tmp_path: Path) -> None:
    cache.add(replace(SCHEMA, text=b"{}"))
    with qmigrate.open(postcopy(tmp_path), description=cache) as migration:
        assert migration.complete
        assert migration.devices == {}


def test_a_suppressed_description_is_found_too(cache: SchemaCache, tmp_path: Path) -> None:
    cache.add(SCHEMA)
    bare = streams.minimal()[: -len(streams.devices_described())]
    with qmigrate.open(postcopy(tmp_path, bare), description=cache) as migration:
        assert len(migration.devices) == 2


def test_a_cache_can_be_pickled(cache: SchemaCache) -> None:
    cache.add(SCHEMA)
    assert pickle.loads(pickle.dumps(cache)).schemas() == [SCHEMA]


@pytest.mark.parametrize("version", ["5.2", "7.2", "10.0", "11.1"])
def test_a_real_package_is_decoded_by_the_schema_of_another_capture(version: str, cache: SchemaCache) -> None:
    schema = read_schema(InMemory(corpus(f"pc-running-{version}")), made_from="pc-running")
    cache.add(schema)
    package = Path(__file__).parents[1] / "corpus" / f"pc-postcopy-{version}.mig.xz"
    with qmigrate.open(package, description=cache) as migration:
        contents = migration.contents
    with qmigrate.open(package, description=schema.description) as migration:
        assert {name: plain(state) for name, state in contents.devices.items()} == {
            name: plain(state) for name, state in migration.devices.items()
        }
    full = [section for section in contents.sections if section.kind == SectionType.FULL]
    assert {section.schema for section in full} == {f"schema {schema.id}, made from pc-running"}
