"""Reports as text: on a terminal of any width, and in a file."""

import zlib
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

import qmigrate
from qmigrate.analysis.ram import describe_ram, tally_ram
from qmigrate.capture.migration import Migration
from qmigrate.errors import StreamError
from qmigrate.format.entry import Entry
from qmigrate.format.feed import Feed
from qmigrate.format.walk import walk
from qmigrate.report.device import write_devices
from qmigrate.report.paper import Paper
from qmigrate.report.ram import write_ram
from qmigrate.report.structure import write_structure
from qmigrate.report.text import write_story
from tests import streams
from tests.report import papers

CORPUS = sorted((Path(__file__).parents[1] / "corpus").glob("*.mig.xz"))
MANY = [path for path in CORPUS if path.name.startswith(("q35-many-5", "q35-many-11", "pc-postcopy-11"))]
Write = Callable[[Migration, Paper], None]


def story(migration: Migration, paper: Paper) -> None:
    write_story(migration.contents, "a.mig", paper)


def structure(migration: Migration, paper: Paper) -> None:
    write_structure(migration.entries(), paper)


def ram(migration: Migration, paper: Paper) -> None:
    write_ram(tally_ram(migration), paper)


def devices(migration: Migration, paper: Paper) -> None:
    write_devices([section for section in migration.sections if section.kind.name == "FULL"], paper)


VIEWS: dict[str, Write] = {"story": story, "structure": structure, "ram": ram, "devices": devices}


@pytest.fixture
def in_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Write, bytes], str]:
    """A view of a stream as a file gets it."""

    def view(write: Write, stream: bytes) -> str:
        path = tmp_path / "a.mig"
        path.write_bytes(stream)
        paper, out = papers.file(monkeypatch)
        with qmigrate.open(path) as migration:
            write(migration, paper)
        return out.getvalue()

    return view


InFile = Callable[[Write, bytes], str]


def test_the_story_of_a_precopy_stream(in_file: InFile) -> None:
    assert in_file(story, streams.minimal()) == """\
a.mig  complete, 21,752 bytes

Machine       pc-q35-10.0
Capabilities  none announced
Target page   4 KiB
Sections      ram (START, PART, END), 2 FULL, with footers
Description   827 bytes

RAM  2 blocks, 72 KiB, 2 passes, 20 pages sent, 75 % of them zero
  block     size  pages  normal  zero  again
  pc.ram  64 KiB     16       4    14      2
  pc.rom   8 KiB      2       1     1      0

Devices  2, all decoded, 115 bytes; the bytes of each:
  timer                41
  0000:00:04.0/serial  74

Commands  none
"""  # fmt: skip


def test_the_story_of_a_postcopy_stream(in_file: InFile) -> None:
    told = in_file(story, streams.postcopy())
    assert "RAM  2 blocks, 72 KiB, 1 pass, then postcopy, 20 pages sent, 90 % of them zero\n" in told
    assert "Devices  2 in the package, none decoded, 115 bytes; the bytes of each:\n" in told
    assert told.endswith("""\
Commands
  0x18        OPEN_RETURN_PATH
  0x1d        PING  1
  0x26        POSTCOPY_ADVISE  host pages 4 KiB, target pages 4 KiB
  0x128       POSTCOPY_RAM_DISCARD ×2  16 KiB in 2 ranges of 2 blocks
  0x164       PING  2
  0x16d       PACKAGED  143 bytes
              holds POSTCOPY_LISTEN, 2 sections, PING 3, PING 0x42, POSTCOPY_RUN
  0x205       PING  4

Odd  There is no description of the devices (postcopy sends none): they can't be decoded.
""")


def test_the_story_of_a_damaged_stream_says_where_and_what(in_file: InFile) -> None:
    told = in_file(story, streams.header() + streams.configuration() + streams.ram_start() + b"\x42")
    assert told.startswith("a.mig  damaged at 0x5c, 92 bytes were read\n")
    assert told.endswith(
        "Wrong  0x5c: found 0x42, expected a section type: START 0x1, PART 0x2, END 0x3, FULL 0x4, "
        "COMMAND 0x8 or EOF 0x0\n"
    )


def test_the_story_of_a_compressed_stream_that_is_cut_says_both_what_and_why(in_file: InFile) -> None:
    packed = zlib.compressobj(0, wbits=31)  # as it is, so that all of it can be unpacked up to the cut
    told = in_file(story, (packed.compress(streams.minimal()) + packed.flush())[: 10 + 5 + 0x20B7])
    assert told.startswith("a.mig  damaged at 0x20b7, ends too soon at 0x20b7, 8,375 bytes were read\n")


def test_pages_that_were_never_sent_are_counted(in_file: InFile) -> None:
    told = in_file(story, streams.minimal()[:0x20B7])
    assert told.startswith("a.mig  ends too soon at 0x20b7, 8,375 bytes were read\n")
    assert "  block     size  pages  normal  zero  never sent\n" in told
    assert "  pc.ram  64 KiB     16       2     7           7\n" in told


def test_the_structure_of_a_precopy_stream(in_file: InFile) -> None:
    assert in_file(structure, streams.minimal()) == """\
       0x0         8  HEADER  version 3
       0x8        16  CONFIGURATION  pc-q35-10.0
      0x18        17  START  ram/0  section 2, version 4
      0x29         8    MEM_SIZE  2 blocks, 72 KiB
      0x31        15      pc.ram  64 KiB
      0x40        15      pc.rom  8 KiB
      0x4f         8    EOS
      0x57         5    FOOTER  section 2
      0x5c         5  PART  ram/0
      0x61        43    ZERO  pc.ram  0x0–0x4000  4 pages  named
      0x8c      8208    PAGE  pc.ram  0x4000–0x6000  2 pages
    0x209c        90    ZERO  pc.ram  0x6000–0x10000  10 pages
    0x20f6      4111    PAGE  pc.rom  0x0–0x1000  1 page  named
    0x3105         9    ZERO  pc.rom  0x1000–0x2000  1 page
    0x310e         8    EOS
    0x3116         5    FOOTER  section 2
    0x311b         5  END  ram/0
    0x3120      8215    PAGE  pc.ram  0x4000–0x6000  2 pages  named
    0x5137         8    EOS
    0x513f         5    FOOTER  section 2
    0x5144        41  FULL  timer/0  section 0, version 2
    0x516d        74  FULL  0000:00:04.0/serial/1  section 7, version 3
    0x51b7         1  EOF
    0x51b8         5  VMDESCRIPTION  827 bytes
    0x51bd       827    DESCRIPTION  2 devices
"""  # fmt: skip


def test_a_package_is_indented(in_file: InFile) -> None:
    assert """\
     0x16d         9  PACKAGED  143 bytes
     0x176         5    POSTCOPY_LISTEN
     0x17b        41    FULL  timer/0  section 0, version 2, not decoded: no description in this stream
     0x1a4        74    FULL  0000:00:04.0/serial/1  section 7, version 3, not decoded: no description in this stream
     0x1ee         9    PING  3
     0x1f7         9    PING  0x42
     0x200         5    POSTCOPY_RUN
     0x205         9  PING  4
""" in in_file(structure, streams.postcopy())


@pytest.mark.parametrize("footers", [True, False])
def test_empty_parts_in_a_row_are_one_line_with_their_count(in_file: InFile, footers: bool) -> None:
    stream = b"".join(
        (
            streams.header(),
            streams.ram_start(footers=footers),
            streams.ram_part(footers=footers) * 1000,
            streams.ram_part(streams.zero(0, block="pc.ram"), footers=footers),
            streams.ram_part(footers=footers),
            streams.ram_end(footers=footers),
            streams.eof(),
        )
    )
    shown = [line.split(maxsplit=1)[1] for line in in_file(structure, stream).splitlines()]
    each = 18 if footers else 13
    assert f"{each * 1000}  PART  ram/0 ×1,000, empty" in shown
    assert f"{each}  PART  ram/0, empty" in shown
    assert shown.count("5  PART  ram/0") == 1


def test_a_structure_is_given_up_to_the_fault(in_file: InFile) -> None:
    stream = streams.header() + streams.ram_start() + streams.ram_part() * 3 + b"\x02\0\0\0\2\0\0\0\0\0\0\4\0"

    def write(migration: Migration, paper: Paper) -> None:
        with pytest.raises(StreamError, match="unknown flags 0x400"):
            write_structure(migration.entries(), paper)

    shown = in_file(write, stream).splitlines()
    assert shown[-2:] == ["      0x4c        54  PART  ram/0 ×3, empty", "      0x82         5  PART  ram/0"]


def test_a_device_is_a_tree_of_its_fields(in_file: InFile) -> None:
    assert in_file(devices, streams.minimal()) == """\
timer/0  FULL at 0x5144, 41 bytes, section 0, version 2
    0x5157  cpu_ticks_offset  int64             -5
    0x515f  unused            unused_buffer[8]  00 00 00 00 00 00 00 00
    0x5167  flag              bool              true

0000:00:04.0/serial/1  FULL at 0x516d, 74 bytes, section 7, version 3
    0x518e  divider    uint16      4660  0x1234
    0x5190  fifo       uint8[16]   16 × 0
    0x51a0  id         buffer[12]
    0x51a0  73 65 72 69 61 6c 00 01 02 03 04 05              serial......
    0x51ac  lines  struct[3]
    0x51ac    [0]  line
    0x51ac      level  uint8       1
    0x51ad      irq    uint8       4
    0x51ae    [1–2]  line  2 alike
    0x51ae      level  uint8       0
    0x51af      irq    uint8       3
"""  # fmt: skip


def test_equal_lines_of_a_buffer_are_shown_once(in_file: InFile) -> None:
    data = bytes(range(16)) + bytes(16) * 5 + b"\xff" * 4
    entry = streams.described("dev", streams.field("data", "buffer", len(data)))
    stream = (
        streams.header()
        + streams.ram_start()
        + streams.ram()
        + streams.device("dev", data, section_id=9)
        + streams.eof()
        + streams.description(entry)
    )
    assert in_file(devices, stream).splitlines()[2:] == [
        "    0x5145  00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f  ................",
        "    0x5155  00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00  ................",
        "         *",
        "    0x51a5  ff ff ff ff                                      ....",
    ]


def test_subsections_and_types_that_are_not_known_are_shown(in_file: InFile) -> None:
    state = b"\x07" + b"abcdefghij" + b"\x05\x09dev/extra\0\0\0\1" + (1 << 40).to_bytes(8)
    extra = streams.struct_of("dev/extra", streams.field("when", "timer", 8))
    entry = streams.described(
        "dev", streams.field("small", "uint8", 1), streams.field("odd", "a new type", 10), subsections=[extra]
    )
    stream = (
        streams.header()
        + streams.ram_start()
        + streams.ram()
        + streams.device("dev", state, section_id=9)
        + streams.eof()
        + streams.description(entry)
    )
    assert in_file(devices, stream).splitlines()[1:] == [
        "    0x5145  small   uint8       7",
        "    0x5146  odd     a new type  not decoded: the type 'a new type' is not known",
        "    0x5146  61 62 63 64 65 66 67 68 69 6a                    abcdefghij",
        "    0x5150  dev/extra  subsection, version 1",
        "    0x515f    when  timer       1099511627776 ns",
    ]


def test_ram_is_told_by_block_and_by_pass(in_file: InFile) -> None:
    assert in_file(ram, streams.minimal()) == """\
RAM  2 blocks, 72 KiB, pages of 4 KiB
  block     size  pages  sent  never  again  normal  zero  zero %  runs
  pc.ram  64 KiB     16    16      0      2       4    14      78     4
  pc.rom   8 KiB      2     2      0      0       1     1      50     2

Passes
  pass  pages  normal  zero  blocks
  1        18       3    15       2
  2         2       2     0       1
"""  # fmt: skip


def test_what_postcopy_sends_is_no_pass(in_file: InFile) -> None:
    assert in_file(ram, streams.postcopy()).endswith("""\
  pass      pages  normal  zero  blocks
  1            16       0    16       1
  postcopy      4       2     2       2
""")


def test_ram_for_programs_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.postcopy())
    with qmigrate.open(path) as migration:
        plain = describe_ram(tally_ram(migration))
    assert plain["passes"] == [{"normal": 0, "zero": 16, "blocks": 1}]
    assert plain["postcopy"] == {"normal": 2, "zero": 2, "blocks": 2}
    assert [(block["name"], block["runs"]) for block in plain["ram_blocks"]] == [("pc.ram", 2), ("pc.rom", 1)]


# -- however the bytes arrive


def dripped(pieces: list[bytes]) -> Iterator[Entry]:
    """The records of a stream that comes in pieces."""
    feed = Feed()
    left = iter(pieces)
    for entry in walk(feed):
        if entry is not None:
            yield entry
        elif (piece := next(left, None)) is not None:
            feed.receive(piece)
        else:
            feed.end()


LONG = (
    streams.header()
    + streams.ram_start()
    + streams.ram_part() * 3
    + streams.ram_part(streams.page(0, block="pc.ram"), *(streams.page(at * streams.PAGE) for at in range(1, 5)))
    + streams.ram_end(streams.zero(5 * streams.PAGE, 11))
    + streams.eof()
    + streams.description()
    + b"behind the end"
)


@given(st.lists(st.integers(0, len(LONG)), max_size=20))
@example(list(range(0, len(LONG), 64)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_structure_does_not_depend_on_how_the_bytes_arrive(
    monkeypatch: pytest.MonkeyPatch, cuts: list[int]
) -> None:
    shown = []
    for places in ([], sorted(cuts)):
        bounds = [0, *places, len(LONG)]
        pieces = [LONG[begin:end] for begin, end in pairwise(bounds) if begin < end]
        paper, out = papers.file(monkeypatch)
        write_structure(dripped(pieces), paper)
        shown.append(out.getvalue())
    assert shown[0] == shown[1]
    assert shown[0].endswith("        14  TRAILING  behind the end of the stream\n")


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name.removesuffix(".mig.xz"))
def test_every_byte_of_a_real_stream_is_on_one_line_of_its_structure(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper, out = papers.file(monkeypatch)
    with qmigrate.open(path) as migration:
        write_structure(migration.entries(), paper)
    at = 0
    for line in out.getvalue().splitlines():
        offset, length = line.split()[:2]
        assert int(offset, 16) == at, line
        at += int(length)
    with qmigrate.open(path) as migration:
        assert at == migration.contents.length


# -- on a terminal


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("path", MANY, ids=lambda path: path.name.removesuffix(".mig.xz"))
def test_no_line_is_wider_than_the_terminal(path: Path, width: int, view: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paper, out = papers.terminal(monkeypatch, width)
    with qmigrate.open(path) as migration:
        VIEWS[view](migration, paper)
    lines = papers.lines_without_colour(out)
    assert lines
    assert [line for line in lines if cell_len(line) > width] == []
    assert [line for line in lines if line != line.rstrip()] == []


def test_nothing_is_cut_off_where_the_terminal_is_narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "a-very-long-name-" * 10
    path = tmp_path / "a.mig"
    path.write_bytes(streams.header() + streams.configuration(name) + streams.ram_start({name: streams.PAGE}))
    for view in (story, ram):
        paper, out = papers.terminal(monkeypatch, 40)
        with qmigrate.open(path) as migration:
            view(migration, paper)
        joined = "".join(line.strip() for line in papers.lines_without_colour(out))
        assert name in joined


def test_a_table_that_is_too_wide_gives_its_names_lines_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    paper, out = papers.terminal(monkeypatch, 30)
    rows = [
        ["0000:00:01.0/vga.vram", "0000%3A00%3A01.0%2Fvga.vram", "1 MiB", "64 KiB"],
        ["ram", "ram", "8 MiB", "2 KiB"],
    ]
    paper.table(["block", "file", "size", "data"], rows, left=2)
    assert papers.lines_without_colour(out) == [
        "  block",
        "    file",
        "       size    data",
        "  0000:00:01.0/vga.vram",
        "    0000%3A00%3A01.0%2Fvga.vra",
        "    m",
        "      1 MiB  64 KiB",
        "  ram",
        "    ram",
        "      8 MiB   2 KiB",
    ]


def test_a_terminal_that_can_do_nothing_has_its_own_width_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    papers.terminal(monkeypatch, 40)
    monkeypatch.setenv("TERM", "dumb")
    assert Paper(papers.Terminal()).width == 40


def test_the_story_of_many_devices_stays_one_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    path = next((path for path in MANY if path.name.startswith("q35-many-11")), None)
    if path is None:
        pytest.skip("no corpus")
    paper, out = papers.terminal(monkeypatch, 120)
    with qmigrate.open(path) as migration:
        write_story(migration.contents, path.name, paper)
    assert len(papers.lines_without_colour(out)) <= 50


def test_a_terminal_gets_colours_and_no_color_takes_them_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.mig"
    path.write_bytes(streams.minimal())
    coloured = {}
    for colour in (True, False):
        paper, out = papers.terminal(monkeypatch, 80, colour=colour)
        with qmigrate.open(path) as migration:
            story(migration, paper)
        coloured[colour] = "\x1b[32mcomplete" in out.getvalue()
        assert "\x1b[3" in out.getvalue() or not colour
    assert coloured == {True: True, False: False}


# -- names are data

HOSTILE = [
    "[bold]x[/bold]",
    "[/]",
    ":smile:",
    "../../etc/passwd",
    "\x1b[31mred\x1b]0;title\x07",
    "two\r\nlines",
    b"\xff\xfe not utf-8".decode("utf-8", "surrogateescape"),
    "\u202eturned",
    "n" * 255,
]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("view", ["story", "structure", "ram"])
def test_a_hostile_name_of_a_block_is_shown_and_does_nothing(
    name: str, view: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = {
        "\x1b[31mred\x1b]0;title\x07": r"\x1b[31mred\x1b]0;title\x07",
        "two\r\nlines": r"two\x0d\x0alines",
        "\udcff\udcfe not utf-8": r"\xff\xfe not utf-8",
        "\u202eturned": r"\xe2\x80\xaeturned",
    }.get(name, name)
    path = tmp_path / "a.mig"
    path.write_bytes(
        streams.header()
        + streams.configuration(name)
        + streams.ram_start({name: streams.PAGE})
        + streams.ram_end(streams.zero(0, block=name))
        + streams.eof()
    )
    for paper, out in (papers.file(monkeypatch), papers.terminal(monkeypatch, 400)):
        with qmigrate.open(path) as migration:
            VIEWS[view](migration, paper)
        text = papers.ESCAPES.sub("", out.getvalue()) if paper.width else out.getvalue()
        assert shown in text
        assert "\x1b" not in text
        assert "\r" not in text
        text.encode("utf-8")


def test_hostile_names_of_devices_and_fields_are_shown_and_do_nothing(in_file: InFile) -> None:
    fields = [streams.field(name, "uint8", 1) for name in HOSTILE]
    entry = streams.described("[red]dev", *fields)
    stream = (
        streams.header()
        + streams.ram_start()
        + streams.ram()
        + streams.device("[red]dev", bytes(len(fields)), section_id=9)
        + streams.eof()
        + streams.description(entry)
    )
    shown = in_file(devices, stream)
    assert shown.startswith("[red]dev/0  FULL")
    assert "  [bold]x[/bold]  " in shown
    assert r"  \x1b[31mred\x1b]0;title\x07  " in shown
    assert "\x1b" not in shown
    assert "[red]dev  " in in_file(story, stream)


def test_our_own_few_signs_are_plainer_where_the_output_cannot_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    path, written = tmp_path / "a.mig", tmp_path / "out"
    path.write_bytes(streams.postcopy())
    with written.open("w", encoding="ascii") as out, qmigrate.open(path) as migration:
        story(migration, Paper(out))
    assert "POSTCOPY_RAM_DISCARD x2  16 KiB in 2 ranges of 2 blocks" in written.read_text()
