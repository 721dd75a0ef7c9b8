"""The story of a stream on one screen."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Final

from rich.text import Text

from qmigrate.analysis.summary import oddities, target_page_bits
from qmigrate.capture.migration import Block, CommandPlace, Contents, Section
from qmigrate.errors import StreamError, TruncatedError, UnsupportedError
from qmigrate.format.command import Packaged, PostcopyRamDiscard
from qmigrate.format.stream import SectionType
from qmigrate.report.commands import details
from qmigrate.report.names import clean
from qmigrate.report.paper import BAD, DIM, GOOD, HEAD, KIND, ODD, Paper, Part, text
from qmigrate.report.units import count, plural, share, size

__all__ = ["verdict", "write_story"]

_MOST_LINES: Final = 24  # of commands, or oddities: a hostile stream may have any number


def write_story(contents: Contents, name: str, paper: Paper) -> None:
    """What the stream in the input ``name`` holds, as far as it was read."""
    paper.line(verdict(contents), lead=text((clean(name), HEAD), "  "))
    paper.line()
    paper.facts(_facts(contents))
    _channels(contents, paper)
    _ram(contents, paper)
    _devices(contents, paper)
    _commands(contents, paper)
    _list("Odd", [clean(sentence) for sentence in oddities(contents)], ODD, paper)
    _list("Wrong", [clean(str(error)) for error in contents.errors], BAD, paper)


def verdict(contents: Contents) -> Text:
    """In a line: is it whole, and how long?"""
    length = f"{contents.length:,} bytes"
    if contents.complete:
        return text(("complete", GOOD), f", {length}")
    ends = [part for error in contents.errors for part in (_end(error), ", ")]
    return text(*ends, f"{length} were read")


def _end(error: StreamError) -> Part:
    place = "" if error.offset is None else f" at {error.offset:#x}"
    if isinstance(error, TruncatedError):
        return (f"ends too soon{place}", BAD)
    if isinstance(error, UnsupportedError):
        return (f"can't be read on{place}", BAD)
    return (f"damaged{place}", BAD)


def _facts(contents: Contents) -> Iterator[tuple[str, Text | str]]:
    yield "Machine", "not said" if contents.machine_type is None else clean(contents.machine_type)
    names = [clean(name) for name in contents.capabilities]
    yield "Capabilities", ", ".join(names) or text(("none announced", DIM))
    yield "Target page", size(1 << target_page_bits(contents))
    if contents.sections:
        yield "Sections", ", ".join(_section_counts(contents))
    if contents.description_length is not None:
        yield "Description", size(contents.description_length)


def _section_counts(contents: Contents) -> Iterator[str]:
    live: dict[str, dict[SectionType, int]] = {}
    for section in contents.sections:
        if section.kind != SectionType.FULL:
            kinds = live.setdefault(clean(section.name), {})
            kinds[section.kind] = kinds.get(section.kind, 0) + 1
    for name, kinds in live.items():
        counts = (kind.name if number == 1 else f"{number:,} {kind.name}" for kind, number in kinds.items())
        yield f"{name} ({', '.join(counts)})"
    full = sum(1 for section in contents.sections if section.kind == SectionType.FULL)
    if full:
        yield f"{full:,} FULL"
    if contents.footers is not None:
        yield "with footers" if contents.footers else "without footers"


# -- channels


def _channels(contents: Contents, paper: Paper) -> None:
    """Each connection, where there are several: how much came over it, and of what."""
    channels = contents.channels
    if not channels:
        return
    paper.heading("Channels", count(len(channels)))
    kinds = sorted({kind for channel in channels for kind, number in channel.pages.items() if number})
    columns = [("bytes", [count(channel.length) for channel in channels])]
    columns += [(kind, [_number(channel.pages[kind]) for channel in channels]) for kind in kinds]
    if any(channel.syncs for channel in channels):
        columns.append(("SYNCs", [_number(channel.syncs) for channel in channels]))
    paper.table(
        ["channel", *(name for name, _ in columns)],
        [
            [clean(channel.name), *(cells[row] for _, cells in columns)]
            for row, channel in enumerate(channels)
        ],
    )  # fmt: skip
    for channel in channels:
        said = [f"{count(number)} {name}" for name, number in channel.messages.items()]
        said += [f"known by its {channel.known_by}"] if channel.known_by != "bytes" else []
        if said:
            paper.line(f"{clean(channel.name)}: {', '.join(said)}", lead="  ")


def _number(number: int) -> str:
    return count(number) if number else ""


# -- RAM


def switched(contents: Contents) -> bool:
    """Did postcopy start?  Its package is what starts it."""
    return any(isinstance(place.command, Packaged) for place in contents.commands)


def _passes(contents: Contents) -> Iterator[str]:
    """Nothing where main alone does not show them: multifd, mapped-ram."""
    if contents.passes:
        yield plural(contents.passes, "pass", "passes") + (", then postcopy" if switched(contents) else "")


def _ram(contents: Contents, paper: Paper) -> None:
    blocks = list(contents.blocks.values())
    if not blocks:
        return
    pages = sum(sum(block.counts.values()) for block in blocks)
    zero = sum(block.counts["zero"] for block in blocks)
    said = [
        plural(len(blocks), "block"),
        size(sum(block.length for block in blocks)),
        *_passes(contents),
        f"{plural(pages, 'page')} sent, {share(zero, pages)} of them zero",
    ]
    paper.heading("RAM", ", ".join(said))
    columns = [("size", [size(block.length) for block in blocks])]
    columns += _block_columns(blocks, contents.page_size)
    paper.table(
        ["block", *(name for name, _ in columns)],
        [
            [clean(block.name), *(cells[row] for _, cells in columns)]
            for row, block in enumerate(blocks)
        ],
    )  # fmt: skip


def _block_columns(blocks: Sequence[Block], page_size: int) -> Iterator[tuple[str, list[str]]]:
    """Those columns that say something; normal and zero pages always."""
    if any(block.page_size is not None for block in blocks):
        yield "host page", ["-" if block.page_size is None else size(block.page_size) for block in blocks]
    if any(block.address is not None for block in blocks):
        yield "address", ["-" if block.address is None else f"{block.address:#x}" for block in blocks]
    yield "pages", [count(block.length // page_size) for block in blocks]
    for kind in blocks[0].counts:
        numbers = [block.counts[kind] for block in blocks]
        if kind in ("normal", "zero") or any(numbers):
            yield kind, [count(number) for number in numbers]
    again = [block.again for block in blocks]
    if any(again):
        yield "again", [count(number) for number in again]
    unsent = [block.length // page_size - block.seen.count for block in blocks]
    if any(unsent):
        yield "never sent", [count(number) for number in unsent]


# -- devices


def _devices(contents: Contents, paper: Paper) -> None:
    devices = [section for section in contents.sections if section.kind == SectionType.FULL]
    if not devices:
        return
    decoded = sum(1 for device in devices if device.state is not None)
    packaged = any(device.package is not None for device in devices)
    said = [str(len(devices)) + (" in the package" if packaged else "")]
    said.append({len(devices): "all decoded", 0: "none decoded"}.get(decoded, f"{decoded:,} decoded"))
    said.append(size(sum(device.length for device in devices)))
    paper.heading("Devices", ", ".join(said), ("; the bytes of each:", DIM))
    paper.columns(list(_device_cells(devices, mark=0 < decoded < len(devices))))


def _device_cells(devices: Sequence[Section], *, mark: bool) -> Iterator[tuple[str, str, str]]:
    """Each name once; its instances are counted.  ``mark`` those that were not decoded with a ?."""
    by_name: dict[str, list[Section]] = {}
    for device in devices:
        by_name.setdefault(clean(device.name), []).append(device)
    for name, same in by_name.items():
        good = all(device.state is not None for device in same)
        instances = f" ×{len(same)}" if len(same) > 1 else ""
        length = count(sum(device.length for device in same))
        yield f"{name}{instances}{'' if good or not mark else ' ?'}", length, "" if good or not mark else ODD


# -- commands


def _commands(contents: Contents, paper: Paper) -> None:
    if not contents.commands:
        paper.heading("Commands", ("none", DIM))
        return
    paper.heading("Commands")
    lines = list(_command_lines(contents.commands))
    for offset, said in lines[:_MOST_LINES]:
        paper.line(said, lead=text(f"  {offset:<10}  "))
    if len(lines) > _MOST_LINES:
        paper.line(text((f"  … and {count(len(lines) - _MOST_LINES)} more lines: --structure", DIM)))


def _command_lines(places: Sequence[CommandPlace]) -> Iterator[tuple[str, Text]]:
    """One line each; the same command again and again is one line."""
    for name, group in groupby(places, key=lambda place: place.command.name):
        same = list(group)
        first = same[0]
        if len(same) > 1:
            yield f"{first.offset:#x}", text((name, KIND), f" ×{len(same):,}  ", _together(same))
        else:
            yield f"{first.offset:#x}", text((name, KIND), "  ", details(first.command))
        if len(same) == 1 and first.contents:
            yield "", text(*_package(first))


def _together(places: Sequence[CommandPlace]) -> str:
    discards = [place.command for place in places if isinstance(place.command, PostcopyRamDiscard)]
    if not discards:
        return ""
    ranges = [item for discard in discards for item in discard.ranges]
    blocks = {discard.block for discard in discards}
    total = size(sum(item.length for item in ranges))
    return f"{total} in {plural(len(ranges), 'range')} of {plural(len(blocks), 'block')}"


def _package(place: CommandPlace) -> Iterator[Part]:
    """What the package holds, in order."""
    yield ("holds ", DIM)
    first = True
    for is_command, group in groupby(place.contents, key=lambda item: isinstance(item, CommandPlace)):
        items = list(group)
        said = (
            [_in_a_word(item) for item in items if isinstance(item, CommandPlace)]
            if is_command
            else [plural(len(items), "section")]
        )
        for word in said[:_MOST_LINES]:
            yield word if first else f", {word}"
            first = False
        if len(said) > _MOST_LINES:
            yield ", …"


def _in_a_word(place: CommandPlace) -> str:
    said = details(place.command)
    return f"{place.command.name} {said}" if said else place.command.name


# -- what is odd, and what is wrong


def _list(title: str, sentences: Sequence[str], style: str, paper: Paper) -> None:
    if not sentences:
        return
    paper.line()
    lead = text((f"{title}  ", style))
    for sentence in sentences[:_MOST_LINES]:
        paper.line(sentence, lead=lead)
        lead = text(" " * lead.cell_len)
    if len(sentences) > _MOST_LINES:
        paper.line(text((f"… and {count(len(sentences) - _MOST_LINES)} more", DIM)), lead=lead)
