"""What may stand at a place of device state, by its looks."""

import pytest

from qmigrate.format.candidates import plausible_header
from qmigrate.format.stream import SectionType
from tests import streams


def opening(name: str, section_id: int) -> bytes:
    return streams.section(SectionType.FULL, name, section_id=section_id)


@pytest.mark.parametrize(
    ("data", "good"),
    [
        (opening("a", 1), True),
        (streams.section(SectionType.START, "ram", section_id=1, version_id=0xFFFF), True),
        (streams.section(SectionType.FULL, "a", section_id=1, version_id=0x10000), False),
        (opening("", 1), False),
        (opening("a\x01", 1), False),
        (opening(" a", 1), False),
        (opening("a b", 1), True),
        (opening("a" * 255, 1), True),
        (opening("a", 1)[:-1], False),
        (b"\2" + opening("a", 1)[1:], False),
        (b"", False),
    ],
)
def test_a_header_is_plausible_by_its_name_and_version(data: bytes, good: bool) -> None:
    assert (plausible_header(data) is not None) == good
    assert (plausible_header(memoryview(b"xx" + data), 2) is not None) == good
