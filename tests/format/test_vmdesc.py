"""The description: its JSON in every dialect, and what is none."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from qmigrate.errors import StreamError
from qmigrate.format.vmdesc import FieldDescription, parse_description
from tests.streams import described, field, struct_of


def text_of(*fields: dict[str, Any], **top: Any) -> bytes:
    return json.dumps({"page_size": 4096, "devices": [described("dev", *fields)], **top}).encode()


def fields_of(*fields: dict[str, Any]) -> tuple[FieldDescription, ...]:
    return parse_description(text_of(*fields)).devices[0].body.fields


def counts(fields: Sequence[FieldDescription]) -> list[tuple[str, int | None]]:
    return [(one.type, one.count) for one in fields]


def test_a_description_says_page_size_devices_and_their_fields() -> None:
    inner = struct_of("line", field("level", "uint8", 1), subsections=[struct_of("line/irq", field("irq", "uint8", 1))])
    description = parse_description(
        text_of(
            field("ticks", "int64", 8),
            field("fifo", "uint8", 1, array_len=16),
            field("line", "struct", 8, index=2, struct=inner),
            configuration=struct_of("configuration", field("len", "uint32", 4)),
        )
    )
    assert description.page_size == 4096
    assert description.configuration is not None
    assert description.configuration.fields == (FieldDescription("len", "uint32", 4),)
    device = description.device("dev", 0)
    assert device is description.devices[0]
    assert (device.vmsd_name, device.version) == ("dev", 1)
    ticks, fifo, line = device.body.fields
    assert (ticks.count, fifo.count, line.index) == (None, 16, 2)
    assert line.elements[0].vmsd_name == "line"
    assert line.elements[0].subsections[0].fields[0].name == "irq"
    assert description.device("dev", 1) is None


def test_the_first_of_two_devices_of_one_name_is_found() -> None:
    text = json.dumps({"devices": [described("a", field("x", "bool", 1)), described("a")]}).encode()
    description = parse_description(text)
    assert description.page_size is None
    assert description.device("a", 0) is description.devices[0]


def test_an_old_style_handler_has_one_buffer_and_no_vmsd() -> None:
    text = (
        b'{"devices":[{"name":"slirp","instance_id":0,"size":9,"fields":[{"name":"data","size":9,"type":"buffer"}]}]}'
    )
    device = parse_description(text).devices[0]
    assert (device.vmsd_name, device.version, device.body.fields[0].size) == (None, None, 9)


def test_spaces_and_bytes_that_are_no_text_are_taken_as_they_are() -> None:
    text = b'{ "page_size" : 4096, "devices" : [ { "name" : "d\xff", "instance_id" : 1, "fields" : [  ] } ] }'
    assert parse_description(text).devices[0].name == "d\udcff"


# -- lists and trees: one set of keys for each element, in one object


def test_the_elements_of_a_list_repeat_their_keys() -> None:
    text = (
        b'{"devices":[{"name":"d","instance_id":0,"vmsd_name":"d","version":1,"fields":[{"name":"queue",'
        b'"type":"qtailq",'
        b'"vmsd_name":"one","version":1,"fields":[{"name":"x","type":"uint8","size":1}],'
        b'"vmsd_name":"two","version":2,"fields":[],"subsections":[{"vmsd_name":"two/s","version":1,"fields":[]}],'
        b'"size":9}]}]}'
    )
    queue = parse_description(text).devices[0].body.fields[0]
    assert queue.size == 9
    assert [(part.vmsd_name, part.version, len(part.fields)) for part in queue.elements] == [
        ("one", 1, 1),
        ("two", 2, 0),
    ]
    assert queue.elements[1].subsections[0].vmsd_name == "two/s"


def test_an_empty_list_has_no_elements() -> None:
    assert fields_of(field("queue", "qlist", 1))[0].elements == ()


@pytest.mark.parametrize("kind", ["tmp", "vstruct"])
def test_an_inline_struct_is_one_element(kind: str) -> None:
    entry = {"name": "t", "type": kind, **struct_of("inner", field("x", "uint8", 1)), "size": 1}
    (part,) = fields_of(entry)[0].elements
    assert (part.vmsd_name, len(part.fields)) == ("inner", 1)


# -- NULLs in arrays of pointers: stream-format.md 4.5


def run(kind: str, count: int | None = None, **more: Any) -> dict[str, Any]:
    size = 1 if kind in ("nullptr", "ptr-marker") else 4
    return field("dev", kind, size, **({} if count is None else {"array_len": count}), **more)


@pytest.mark.parametrize("null", ["nullptr", "ptr-marker"])
def test_a_first_run_that_counts_the_whole_array_is_cut_to_its_own_length(null: str) -> None:
    assert counts(fields_of(run("uint32", 10), run(null, 3), run("uint32", 2))) == [
        *(("uint32", 5), (null, 3), ("uint32", 2))
    ]
    assert counts(fields_of(run("uint32", 2), run(null))) == [("uint32", None), (null, None)]


@pytest.mark.parametrize("null", ["nullptr", "ptr-marker"])
def test_a_first_run_of_nulls_has_its_right_length(null: str) -> None:
    css = (run(null, 254), run("struct", struct=struct_of("css", field("x", "uint32", 4))), run(null))
    assert counts(fields_of(*css)) == [(null, 254), ("struct", None), (null, None)]


@pytest.mark.parametrize("null", ["nullptr", "ptr-marker"])
def test_nulls_that_have_an_entry_each_are_one_byte_each(null: str) -> None:
    element = run("struct", index=0, struct=struct_of("s", field("x", "uint32", 4)))
    # A run of two NULLs in an array of five: the first says the run's length, the second what is left.
    assert counts(fields_of(element, run(null, 2), run(null, 3), element, element)) == [
        *(("struct", None), (null, None), (null, None), ("struct", None), ("struct", None))
    ]


def test_a_null_alone_among_elements_with_an_entry_each_changes_nothing() -> None:
    element = run("struct", struct=struct_of("s", field("x", "uint32", 4)))
    assert counts(fields_of(element, run("nullptr"), element)) == [
        ("struct", None),
        ("nullptr", None),
        ("struct", None),
    ]


def test_arrays_of_other_names_are_left_alone() -> None:
    other = field("other", "uint32", 4, array_len=7)
    assert counts(fields_of(other, run("nullptr", 2), other)) == [("uint32", 7), ("nullptr", 2), ("uint32", 7)]


def test_a_count_that_is_less_than_the_runs_behind_it_is_left_alone() -> None:
    assert counts(fields_of(run("uint32", 3), run("nullptr", 3))) == [("uint32", 3), ("nullptr", 3)]


def test_the_old_null_is_a_struct_with_nothing_in_it() -> None:
    (null,) = fields_of(field("dev", "struct", 1, index=0, struct={}))
    assert null.elements[0].fields == ()


# -- what is no description


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "0x100: description: not JSON: Expecting value"),
        (b'{"a" 1}', "0x105: description: not JSON: Expecting ':' delimiter"),
        ('{"äöü" 1}'.encode(), "0x10a: description: not JSON: Expecting ':' delimiter"),
        (b'{"devices":[]}x', "0x10e: description: not JSON: Extra data"),
        (b"[" * 100_000, "0x100: description: nested too deep"),
        (b'{"devices":' + b'{"a":' * 100_000, "0x100: description: nested too deep"),
        (b"[]", "0x100: description: found a list, expected an object"),
        (b"7", "0x100: description: found a number, expected an object"),
        (b"{}", "0x100: description: devices: found nothing, expected a list"),
        (b'{"devices":{}}', "0x100: description: devices: found an object, expected a list"),
        (b'{"devices":[1.5]}', "0x100: description: devices[0]: found a number, expected an object"),
        (b'{"devices":[{}]}', "0x100: description: devices[0].name: found nothing, expected a string"),
        (
            b'{"devices":[{"name":"a","instance_id":true}]}',
            "0x100: description: devices[0].instance_id: found True, expected a number from 0 to 2^64",
        ),
        (
            b'{"devices":[{"name":"a","instance_id":-1}]}',
            "0x100: description: devices[0].instance_id: found -1, expected a number from 0 to 2^64",
        ),
        (
            b'{"devices":[{"name":"a","instance_id":NaN}]}',
            "0x100: description: devices[0].instance_id: found a number, expected a number from 0 to 2^64",
        ),
        (b'{"page_size":"4k","devices":[]}', None),
        (b'{"devices":[{"name":"a","instance_id":0,"fields":3}]}', None),
        (b'{"devices":[{"name":"a","instance_id":0,"vmsd_name":3}]}', None),
        (b'{"devices":[{"name":"a","instance_id":0,"fields":[{}]}]}', None),
        (b'{"devices":[{"name":"a","instance_id":0,"fields":[{"type":"bool","name":"x"}]}]}', None),
        (b'{"devices":[{"name":"a","instance_id":0,"fields":[{"type":"struct","name":"x","size":1}]}]}', None),
        (b'{"devices":[{"name":"a","instance_id":0,"fields":[],"subsections":[{}]}]}', None),
        (b'{"devices":[{"name":"a","instance_id":0,"size":' + b"9" * 5000 + b"}]}", None),
    ],
)
def test_what_is_no_description_is_refused_with_its_place(text: bytes, message: str | None) -> None:
    with pytest.raises(StreamError) as caught:
        parse_description(text, offset=0x100)
    assert message is None or str(caught.value) == message
    assert str(caught.value).startswith("0x1")
    assert caught.value.trail[0] == "description"


def nested(depth: int) -> dict[str, Any]:
    entry = field("x", "uint8", 1)
    for _ in range(depth):
        entry = field("s", "struct", 1, struct=struct_of("v", entry))
    return entry


def test_structs_nest_up_to_a_limit() -> None:
    assert fields_of(nested(63))
    with pytest.raises(StreamError, match=r"^0x0: description: structs are nested deeper than 64$"):
        fields_of(nested(64))
