"""The grammar: any split of the bytes gives the same records, whatever the stream leaves out, wherever it is cut."""

from copy import copy

import pytest

from qmigrate.analysis.records import coalesce
from qmigrate.errors import NoStreamError, StreamError, TruncatedError, UnsupportedError
from qmigrate.format.command import (
    Command,
    OpenReturnPath,
    PageSizes,
    Ping,
    PostcopyAdvise,
    PostcopyResume,
    PostcopyRun,
    SwitchoverStart,
)
from qmigrate.format.entry import Configuration, DeviceState, RamPage, Trailing, Undecoded, VmDescription
from qmigrate.format.feed import Feed
from qmigrate.format.ram import BlockList, Pages, RamBlock, RamFlag, RamRecord
from qmigrate.format.stream import (
    EndOfFile,
    SectionHeader,
    SectionPart,
    SectionType,
    SubsectionHeader,
    VmDescriptionHeader,
)
from qmigrate.format.walk import Limits, Walker
from tests import streams
from tests.format.walked import HEAD, RAM, fault, names, of, same, walked
from tests.streams import PAGE, command, described, device, field
from tests.walking import CORPUS, corpus, entries, until_fault

ADVISE = PostcopyAdvise(sizes=PageSizes(summary=0x201000, target_page_size=PAGE))
MINIMAL, POSTCOPY = streams.minimal(), streams.postcopy()


# -- any split of the bytes


@pytest.mark.parametrize("stream", [MINIMAL, POSTCOPY], ids=["minimal", "postcopy"])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 100, 4095, 4097])
def test_any_split_of_the_bytes_gives_the_same_records(stream: bytes, step: int) -> None:
    assert same(walked(stream, step)) == same(walked(stream))


@pytest.mark.parametrize("name", CORPUS)
def test_any_split_of_a_real_stream_gives_the_same_records(name: str) -> None:
    stream = corpus(name)
    whole = same(walked(stream))
    for step in (997, 65_536):
        assert same(list(entries(stream, step))) == whole


# -- what a stream may hold


def test_a_whole_stream_gives_each_of_its_records() -> None:
    found = walked(MINIMAL)
    assert [type(entry.record).__name__ for entry in found] == [
        *("FileHeader", "Configuration"),
        *("SectionHeader", "BlockList", "RamRecord", "Footer"),
        *("SectionPart", "Pages", "Pages", "Pages", "Pages", "RamRecord", "Footer"),
        *("SectionPart", "Pages", "Pages", "RamRecord", "Footer"),
        *("SectionHeader", "DeviceState", "Footer") * 2,
        *("EndOfFile", "VmDescriptionHeader", "VmDescription"),
    ]
    assert of(found, Configuration)[0].machine_type == "pc-q35-10.0"
    (text,) = of(found, VmDescription)
    assert text.description is not None
    assert text.fault is None


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_parts_go_on_with_the_block_of_the_part_before(passes: int) -> None:
    data = HEAD + streams.ram_start() + streams.ram(passes=passes) + streams.ram_part(streams.zero(0)) + streams.eof()
    last = of(walked(data), Pages)[-1]
    assert (last.block, last.named) == ("pc.rom" if passes == 1 else "pc.ram", False)


def test_after_the_switch_the_block_is_named_again() -> None:
    data = HEAD + RAM + streams.package() + streams.ram_part(streams.zero(0)) + streams.eof()
    assert fault(data) == (f"{len(HEAD + RAM) + 14:#x}: ram: the first page continues a block, and none was named")


def test_odd_pages_are_given_one_by_one() -> None:
    part = streams.ram_part(
        streams.zero(0, 2, block="pc.ram", fill=9),
        streams.xbzrle(0x2000, b"\0\1\2"),
        streams.compressed(0x3000, b"zlib"),
        RamFlag.HOOK.to_bytes(8),
        RamFlag.MULTIFD_FLUSH.to_bytes(8),
    )
    found = walked(HEAD + streams.ram_start() + part + streams.eof())
    assert [(pages.fill, pages.named) for pages in of(found, Pages)] == [(9, True), (9, False)]
    assert [(page.block, page.page_size, page.record.word.start) for page in of(found, RamPage)] == [
        *(("pc.ram", PAGE, 0x2000), ("pc.ram", PAGE, 0x3000))
    ]
    assert [record.word.flags for record in of(found, RamRecord)] == [0x10, 0x80, 0x200, 0x10]


@pytest.mark.parametrize("bits", [10, 11, 12, 13, 14, 16])
def test_the_page_size_is_what_configuration_says(bits: int) -> None:
    size = 1 << bits
    part = streams.ram_part(
        streams.page(0, block="ram", page_size=size),
        *(streams.page(size * index, page_size=size) for index in range(1, 5)),
        streams.zero(5 * size, 3, page_size=size),
    )
    head = streams.header() + streams.configuration("virt-9.2", page_bits=bits)
    data = head + streams.ram_start({"ram": 8 * size}) + part + streams.eof()
    found = walked(data)
    assert {pages.page_size for pages in of(found, Pages)} == {size}
    assert sum(run[3] for pages in of(found, Pages) for run in pages.runs) == 8
    assert same(walked(data, 1000)) == same(found)


def test_the_page_size_is_what_advise_says() -> None:
    advise = command(PostcopyAdvise(sizes=PageSizes(summary=0x2000, target_page_size=0x2000)))
    part = streams.ram_part(streams.page(0x2000, block="ram", page_size=0x2000))
    data = HEAD + advise + streams.ram_start({"ram": 0x4000}) + part + streams.eof()
    assert of(walked(data), Pages)[0].page_size == 0x2000


def test_the_page_size_is_what_the_caller_knows() -> None:
    part = streams.ram_part(streams.page(0x2000, block="ram", page_size=0x2000))
    data = HEAD + streams.ram_start({"ram": 0x4000}) + part + streams.eof()
    assert of(walked(data, page_size=0x2000), Pages)[0].page_size == 0x2000
    sun = streams.header() + streams.configuration("sun4u") + data[len(HEAD) :]
    assert of(walked(sun), Pages)[0].page_size == 0x2000


@pytest.mark.parametrize("size", [0, 0x80, 0x1800, 0x20000])
def test_a_page_size_that_no_target_has_is_refused(size: int) -> None:
    advise = command(PostcopyAdvise(sizes=PageSizes(summary=PAGE, target_page_size=size)))
    assert fault(HEAD + advise) == (
        f"{len(HEAD) + 13:#x}: POSTCOPY_ADVISE: target page size is {size:#x}, "
        "expected a power of two from 0x100 to 0x10000"
    )


# -- what the block list does not announce

HUGE, SMALL = 0x200000, 0x1000


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("last_is_huge", [False, True])
@pytest.mark.parametrize("address", [0, 0x1000, 0x200000, 0x100000000])
def test_page_sizes_and_addresses_are_told_from_what_follows(shared: bool, last_is_huge: bool, address: int) -> None:
    blocks = [
        RamBlock(name="huge", used_length=2 * HUGE, page_size=HUGE, address=address if shared else None),
        RamBlock(name="small", used_length=4 * SMALL, address=address if shared else None),
    ]
    if last_is_huge:
        blocks.reverse()
    head = streams.header() + streams.configuration(capabilities=["x-ignore-shared"] if shared else [])
    data = head + command(ADVISE) + streams.ram_start(blocks) + streams.eof()
    (block_list,) = of(walked(data), BlockList)
    assert block_list.blocks == tuple(blocks)
    assert same(walked(data, 1)) == same(walked(data))


def test_without_advise_no_page_size_stands_in_the_list() -> None:
    blocks = (RamBlock(name="a", used_length=SMALL, address=0x200000),)
    head = streams.header() + streams.configuration(capabilities=["x-ignore-shared"])
    (block_list,) = of(walked(head + streams.ram_start(blocks) + streams.eof()), BlockList)
    assert block_list.blocks == blocks


# -- what a stream may leave out


def test_a_stream_without_configuration_is_read() -> None:
    found = walked(streams.header() + RAM + streams.eof())
    assert of(found, Configuration) == []


def test_a_stream_without_footers_is_read() -> None:
    parts = streams.ram_start(footers=False) + streams.ram_part(streams.zero(0, block="pc.ram"), footers=False)
    devices = device("a", b"\1\2", section_id=3, footers=False) + device("b", b"\3", section_id=4, footers=False)
    data = HEAD + parts + streams.ram_end(footers=False) + devices + streams.eof()
    found = walked(data)
    assert [record.data for record in of(found, Undecoded)] == [b"\1\2", b"\3"]
    known = streams.description(described("a", field("x", "uint16", 2)), described("b", field("x", "uint8", 1)))
    assert len(of(walked(data + known), DeviceState)) == 2


@pytest.mark.parametrize("devices", [b"", streams.devices()])
def test_a_description_of_length_0_is_none(devices: bytes) -> None:
    (text,) = of(walked(HEAD + RAM + devices + streams.eof() + b"\6\0\0\0\0"), VmDescription)
    assert (text.text, text.description, text.fault) == (b"", None, None)


@pytest.mark.parametrize("devices", [b"", streams.devices()])
def test_a_description_that_is_none_is_kept_with_what_is_wrong_in_it(devices: bytes) -> None:
    data = HEAD + RAM + devices + streams.eof() + b"\6\0\0\0\4{no}"
    (text,) = of(walked(data), VmDescription)
    assert (text.text, text.description) == (b"{no}", None)
    assert str(text.fault) == (
        f"{len(data) - 3:#x}: description: not JSON: Expecting property name enclosed in double quotes"
    )


def test_a_stream_of_devices_alone_is_read() -> None:
    found = walked(streams.header() + streams.devices() + streams.eof())
    assert names(found) == ["timer", "0000:00:04.0/serial"]
    assert len(of(found, Undecoded)) == 2


@pytest.mark.parametrize("behind", [b"x", bytes(100), MINIMAL])
def test_bytes_behind_the_end_are_given_as_such(behind: bytes) -> None:
    for whole in (MINIMAL, POSTCOPY, HEAD + RAM + streams.eof() + streams.description()):
        trailing = b"".join(record.data for record in of(walked(whole + behind), Trailing))
        assert trailing == behind


def test_commands_may_stand_between_sections() -> None:
    commands = command(OpenReturnPath()) + command(Ping(token=1))
    data = HEAD + commands + streams.ram_start() + streams.ram_part() + command(SwitchoverStart())
    found = walked(data + streams.ram_end() + streams.devices() + streams.eof() + streams.devices_described())
    assert [record.name for record in of(found, Command)] == ["OPEN_RETURN_PATH", "PING", "SWITCHOVER_START"]


def test_an_emptied_stream_is_whole() -> None:
    found = walked(HEAD + streams.eof() + b"\6\0\0\0\0")
    assert len(of(found, EndOfFile)) == 1


# -- what is wrong


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no migration stream: 0 bytes are there, its header has 8"),
        (b"QEVM\0\0\0", "no migration stream: 7 bytes are there, its header has 8"),
        (b"\x7fELF\2\1\1\0", "no migration stream: it begins with 7f454c46, expected 5145564d (QEVM)"),
        (streams.header(version=2), "a migration stream of version 2, expected 3"),
    ],
)
def test_what_is_no_stream_is_said_to_be_none(data: bytes, message: str) -> None:
    good, error = until_fault(data)
    assert good == []
    assert isinstance(error, NoStreamError)
    assert str(error) == message


SECTION_TYPES = "expected a section type: START 0x1, PART 0x2, END 0x3, FULL 0x4, COMMAND 0x8 or EOF 0x0"
H = len(HEAD)
S = len(HEAD + streams.ram_start())
UNKNOWN = streams.header() + streams.configuration("q") + SubsectionHeader(name="configuration/x", version=1).build()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (HEAD + b"\x09", f"{H:#x}: found 0x9, {SECTION_TYPES}"),
        (HEAD + HEAD[8:], f"{H:#x}: found 0x7, {SECTION_TYPES}"),
        (HEAD, f"{H:#x}: a section: the stream ends here, 1 bytes too soon"),
        (
            streams.header() + b"\7\xff\xff\xff\xff",
            "0x9: configuration: the machine type's name has 4294967295 bytes, expected at most 4096",
        ),
        (
            UNKNOWN,
            "0xe: configuration: unknown subsection 'configuration/x', expected one of "
            "configuration/target-page-bits, configuration/capabilities, configuration/uuid",
        ),
        (HEAD + streams.ram_part(section_id=5), f"{H + 1:#x}: PART names section 5, and no START did"),
        (HEAD + streams.ram_end(section_id=5), f"{H + 1:#x}: END names section 5, and no START did"),
        (
            HEAD + streams.section(SectionType.START, "ram", section_id=2, version_id=3),
            f"{H + 13:#x}: ram: version 3 of the ram section, expected 4",
        ),
        (
            HEAD + streams.section(SectionType.START, "novelty", section_id=2),
            f"{H + 21:#x}: novelty: the inside of this live section is not known",
        ),
        (
            HEAD + streams.ram_start(footers=False) + streams.footer(3),
            f"{S - 5:#x}: ram: footer names section 3, section 2 is open",
        ),
        (
            HEAD + streams.ram_start() + streams.ram_part(footers=False) + streams.eof() + bytes(4),
            f"{S + 13:#x}: ram: kind: found 0x0, expected FOOTER 0x7e",
        ),
        (
            HEAD + streams.ram_start() + streams.ram_part(streams.zero(0)),
            f"{S + 5:#x}: ram: the first page continues a block, and none was named",
        ),
        (
            HEAD + streams.ram_start() + streams.ram_part(streams.zero(0, block="vga")),
            f"{S + 13:#x}: ram: a page of the block 'vga', which the block list does not have",
        ),
        (
            HEAD + streams.ram_start() + streams.ram_part(streams.zero(0x10000, block="pc.ram")),
            f"{S + 5:#x}: ram: pc.ram: page at 0x10000, the block ends at 0x10000",
        ),
        (
            HEAD + streams.ram_start() + streams.ram_part((0x0400 | 0x08).to_bytes(8)),
            f"{S + 5:#x}: ram: word: page header has unknown flags 0x400",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_place(data: bytes, message: str) -> None:
    good, error = until_fault(data)
    assert isinstance(error, StreamError)
    assert str(error) == message
    assert all(entry.view == data[entry.offset : entry.offset + entry.length] for entry in good)
    _, again = until_fault(data, 1)
    assert str(again) == message


def block_list(*blocks: tuple[bytes, int], total: int, flags: int = 4) -> bytes:
    opened = streams.section(SectionType.START, "ram", section_id=2, version_id=4)
    listed = b"".join(bytes([len(name)]) + name + length.to_bytes(8) for name, length in blocks)
    return HEAD + opened + (total | flags).to_bytes(8) + listed


L = H + 17


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (block_list(total=0x1000, flags=0x10), f"{L:#x}: ram: block list: found flags 0x10, expected MEM_SIZE 0x4"),
        (
            block_list((b"a", 0x2000), total=0x1000),
            f"{L + 10:#x}: ram: block list: a has 0x2000 bytes, 0x1000 of the total are left",
        ),
        (block_list((b"", 0x1000), total=0x1000), f"{L + 8:#x}: ram: block list: a block without a name"),
        (
            block_list((b"a", 0x1000), (b"a", 0x1000), total=0x2000),
            f"{L:#x}: ram: block list: a is listed twice",
        ),
        (
            block_list(*((b"%08d" % index, 0) for index in range(70_000)), total=1 << 60),
            f"{L:#x}: ram: block list: the list is longer than 1048576 bytes",
        ),
        (block_list(total=1 << 60), f"{L + 8:#x}: ram: block list: name: the stream ends here"),
    ],
)
def test_a_block_list_that_lies_is_refused(data: bytes, message: str) -> None:
    assert fault(data) == message


def test_pages_before_a_bad_one_are_given_however_the_bytes_come() -> None:
    part = streams.ram_part(streams.zero(0, block="pc.rom"), streams.zero(0x1000, 4))
    data = HEAD + streams.ram_start() + part
    for step in (None, 1, 50):
        good, error = until_fault(data, step)
        assert [run.page_count for run in list(coalesce(good))[-1].record.runs] == [2]  # type: ignore[union-attr]
        assert str(error) == f"{S + 5 + 16 + 9:#x}: ram: pc.rom: page at 0x2000, the block ends at 0x2000"


def small(*, postcopy: bool) -> bytes:
    """A stream with everything in it and few bytes: its pages have 1 KiB."""
    head = streams.header() + streams.configuration("virt-9.2", page_bits=10)
    first = streams.page(0, block="ram", page_size=1024) + streams.zero(1024, 2, page_size=1024)
    again = streams.page(1024, block="ram", page_size=1024)
    start = streams.ram_start({"ram": 4096}) + streams.ram_part(first)
    if not postcopy:
        devices = streams.devices() + streams.eof() + streams.devices_described()
        return head + command(Ping(token=1)) + start + streams.ram_end(again) + devices
    sizes = PageSizes(summary=0x1000, target_page_size=1024)
    package = streams.package(command(Ping(token=3)), streams.devices(), command(PostcopyRun()))
    return head + command(PostcopyAdvise(sizes=sizes)) + start + package + streams.ram_end(again) + streams.eof()


@pytest.mark.parametrize("postcopy", [False, True])
def test_a_stream_that_is_cut_anywhere_ends_in_a_fault_and_gives_what_was_good_before(postcopy: bool) -> None:
    stream = small(postcopy=postcopy)
    whole = same(walked(stream))
    # Where devices go on to needs to be seen first, and how long the last block of the list is.
    late = DeviceState | Undecoded | EndOfFile | VmDescriptionHeader | VmDescription | BlockList | Pages
    sure = [entry for entry in whole if not isinstance(entry[2], late)]
    before_description = len(stream) - len(streams.devices_described())
    for cut in range(len(stream)):
        good, error = until_fault(stream[:cut])
        if cut < 8:
            assert isinstance(error, NoStreamError)
        elif postcopy or cut != before_description:
            assert isinstance(error, TruncatedError), (cut, error)
        given = same(good)
        assert sum(entry[1] for entry in given) <= cut
        for entry in sure:
            is_device = isinstance(entry[2], SectionHeader) and entry[2].kind == SectionType.FULL
            if entry[0] + entry[1] <= cut and not is_device:
                assert entry in given, (cut, entry)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (MINIMAL, "more than 20 bytes of device state (--max-device-state)"),
        (HEAD + device("early", bytes(99), section_id=3), "a section of more than 20 bytes (--max-device-state)"),
        (HEAD + RAM + streams.eof() + streams.description(), "the limit is 20 (--max-device-state)"),
        (POSTCOPY, "the limit is 20 (--max-package)"),
    ],
)
def test_what_is_kept_at_once_has_a_limit(data: bytes, message: str) -> None:
    _, error = until_fault(data, limits=Limits(device_state=20, package=20))
    assert isinstance(error, UnsupportedError)
    assert message in str(error)


def test_parts_are_given_with_their_kind() -> None:
    assert [record.kind for record in of(walked(MINIMAL), SectionPart)] == [SectionType.PART, SectionType.END]


def test_a_resumed_main_goes_on_with_the_blocks_of_before_which_its_first_record_names() -> None:
    feed, again = Feed(), Feed()
    walker = Walker(feed)
    head = HEAD + streams.ram_start() + streams.ram_part(streams.page(0, block="pc.ram"))
    feed.receive(head + streams.package(command(PostcopyRun())))
    before = walker.run()
    assert [entry for entry in iter(before.__next__, None) if entry.record == PostcopyRun()] != []
    resumed = copy(walker)
    after = resumed.resume(again)
    again.receive(command(PostcopyResume()) + streams.ram_part(streams.page(PAGE, block="pc.ram")))
    found = [entry.record for entry in iter(after.__next__, None)]
    assert PostcopyResume() in found
    assert [pages.block for pages in found if isinstance(pages, Pages)] == ["pc.ram"]
    # Who waits for the end of the connection that broke is not disturbed.
    feed.receive(streams.ram_part(streams.page(2 * PAGE, block="pc.ram"))[:-9])
    assert [entry.record.block for entry in iter(before.__next__, None) if isinstance(entry.record, Pages)] == [
        "pc.ram"
    ]
    again.receive(streams.ram_part(streams.page(3 * PAGE)) + streams.ram_end() + streams.eof())
    again.end()
    assert sum(isinstance(entry.record, Pages) for entry in after if entry is not None) == 1
    feed.end()
    with pytest.raises(TruncatedError, match="the stream ends here"):
        list(before)


def test_a_resumed_main_that_continues_a_block_is_refused() -> None:
    feed, again = Feed(), Feed()
    walker = Walker(feed)
    feed.receive(HEAD + streams.ram_start() + streams.ram_part(streams.page(0, block="pc.ram")))
    list(iter(walker.run().__next__, None))
    again.receive(streams.ram_part(streams.page(PAGE)))
    with pytest.raises(StreamError, match="the first page continues a block, and none was named"):
        list(walker.resume(again))
