"""The frame: header, configuration, sections, footers.  Each record alone."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.errors import StreamError, TruncatedError
from qmigrate.format._record import Record
from qmigrate.format.stream import (
    MAGIC,
    VERSION,
    CapabilityName,
    ConfigurationCapabilities,
    ConfigurationHeader,
    ConfigurationTargetPageBits,
    ConfigurationUuid,
    EndOfFile,
    FileHeader,
    Footer,
    SectionHeader,
    SectionPart,
    SectionType,
    SubsectionHeader,
    VmDescriptionHeader,
)
from tests.walking import run

U32 = st.integers(0, 0xFFFFFFFF)
NAMES = st.binary(max_size=255).map(lambda raw: raw.decode("utf-8", "surrogateescape"))


def records() -> st.SearchStrategy[Record]:
    kinds = st.sampled_from(SectionType)
    return st.one_of(
        st.builds(FileHeader, magic=U32, version=U32),
        st.builds(ConfigurationHeader, length=U32),
        st.builds(SubsectionHeader, name=NAMES, version=U32),
        st.builds(ConfigurationTargetPageBits, target_page_bits=U32),
        st.lists(st.builds(CapabilityName, name=NAMES), max_size=4).map(
            lambda names: ConfigurationCapabilities(count=len(names), names=tuple(names))
        ),
        st.builds(ConfigurationUuid, uuid=st.binary(min_size=16, max_size=16)),
        st.builds(SectionHeader, kind=kinds, section_id=U32, idstr=NAMES, instance_id=U32, version_id=U32),
        st.builds(SectionPart, kind=kinds, section_id=U32),
        st.builds(Footer, section_id=U32),
        st.just(EndOfFile()),
        st.builds(VmDescriptionHeader, length=U32),
    )


@given(records(), st.binary(max_size=9), st.integers(1, 30))
def test_each_record_comes_back_from_its_bytes_however_they_come(record: Record, behind: bytes, step: int) -> None:
    data = record.build()
    assert type(record).read(data) == record
    assert run(lambda feed: feed.record(type(record)), data + behind) == (record, len(data))
    assert run(lambda feed: feed.record(type(record)), data, 1) == (record, len(data))
    assert run(lambda feed: feed.ahead(type(record), 0), data + behind, step) == (record, len(data))


@given(records(), st.data())
def test_each_record_that_is_cut_is_refused(record: Record, data: st.DataObject) -> None:
    whole = record.build()
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(TruncatedError) as caught:
        type(record).read(whole[:cut], offset=0x10)
    assert caught.value.offset == 0x10 + cut


@pytest.mark.parametrize(
    ("record", "data"),
    [
        (FileHeader(magic=MAGIC, version=VERSION), "5145564d 00000003"),
        (ConfigurationHeader(length=14), "07 0000000e"),
        (SubsectionHeader(name="a/b", version=1), "05 03 612f62 00000001"),
        (
            ConfigurationCapabilities(count=1, names=(CapabilityName(name="mapped-ram"),)),
            "00000001 0a 6d61707065642d72616d",
        ),
        (
            SectionHeader(kind=SectionType.START, section_id=2, idstr="ram", instance_id=0, version_id=4),
            "01 00000002 03 72616d 00000000 00000004",
        ),
        (SectionPart(kind=SectionType.END, section_id=2), "03 00000002"),
        (Footer(section_id=0x10), "7e 00000010"),
        (EndOfFile(), "00"),
        (VmDescriptionHeader(length=2), "06 00000002"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Record) else "",
)
def test_a_record_has_the_bytes_that_qemu_writes(record: Record, data: str) -> None:
    assert record.build() == bytes.fromhex(data)
    assert type(record).read(bytes.fromhex(data)) == record


def test_a_wrong_kind_is_refused_with_what_could_have_been() -> None:
    with pytest.raises(StreamError) as caught:
        Footer.read(bytes(5), offset=0x40, trail=("vga",))
    assert str(caught.value) == "0x40: vga: kind: found 0x0, expected FOOTER 0x7e"
    with pytest.raises(StreamError) as caught:
        SectionPart.read(b"\x09" + bytes(4))
    assert str(caught.value) == (
        "0x0: kind: found 0x9, expected one of EOF 0x0, START 0x1, PART 0x2, END 0x3, FULL 0x4, SUBSECTION 0x5, "
        "VMDESCRIPTION 0x6, CONFIGURATION 0x7, COMMAND 0x8, FOOTER 0x7e"
    )


def test_a_count_of_capabilities_that_lies_is_refused_when_written() -> None:
    with pytest.raises(StreamError, match="ConfigurationCapabilities can't be written: "):
        ConfigurationCapabilities(count=2, names=(CapabilityName(name="a"),)).build()
