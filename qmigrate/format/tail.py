"""Where a section of unknown length ends.

A FULL section has no length.  With the description it is decoded, and the footer proves it.  Without one, all
chains of plausible sections that use every byte are found: one is taken; where several agree nowhere, the span
between is left undecoded with both readings named; with none, the error is at the furthest place reached.

stream-format.md §4.8 says what may follow a footer.
"""

import heapq
import re
import struct
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple, Protocol

from qmigrate.errors import StreamError, TruncatedError, UnsupportedError
from qmigrate.format.command import COMMANDS, CommandNumber
from qmigrate.format.device import VmState, decode_state, decode_whole
from qmigrate.format.stream import SectionHeader, SectionType
from qmigrate.format.vmdesc import Description, DeviceDescription, StructDescription

__all__ = ["Chooser", "Item", "Tail", "plausible_header", "read_tail"]

FOOTER_BYTES: Final = 5
LONGEST_HEADER: Final = 6 + 255 + 8
_HIGHEST_VERSION: Final = 0xFFFF  # of a section header that we take for one without other proof
# What is tried before a hostile tail is given up.
_MOST_STEPS: Final = 200_000  # places where a section may end
_MOST_LOOKS: Final = 1_000_000  # at what may open something
_MOST_PLACES: Final = 20_000  # where something does, without footers
_NO_SECTION: Final = -1
_MOST_NAMED: Final = 4  # sections of a reading, in the reason that names it
_HEADER: Final = re.compile(rb"[\x01\x04](?s:.{4})([\x01-\xff])([\x21-\x7e][\x20-\x7e]*)")
# What may follow a section, by its first bytes, and a footer before it.
_OPENING: Final = re.compile(
    rb"\x04(?=(?s:.{5})[\x21-\x7e]|(?s:.{0,5})\Z)|\x00(?=\x06|\Z)|\x08(?=\x00[\x01-\x0b]|\x00?\Z)|\Z"
)
_FOOTER: Final = re.compile(
    rb"\x7e(?=((?s:.{4}))"
    rb"(?:\x04(?:(?s:.{5})[\x21-\x7e]|(?s:.{0,5})\Z)|\x00(?:\x06|\Z)|\x08(?:\x00[\x01-\x0b]|\x00?\Z)|\Z))"
)
_MOST_OPENINGS: Final = 16  # tried as the end of one section
_MOST_STRETCHES: Final = 4  # the same, of one that is decoded up to there


class Item(NamedTuple):
    """A piece of the tail, ``begin`` to ``end``: a section, a command, or (with no header) what is ambiguous.

    Of a section, ``body`` and ``body_end`` bound its data; ``state`` is None where it was not decoded, for
    ``reason``.  ``schema`` names whose description decoded it, where a ``Chooser`` found that.
    """

    begin: int
    end: int
    header: SectionHeader | None = None
    body: int = 0
    body_end: int = 0
    state: VmState | None = None
    reason: str | None = None
    command: CommandNumber | None = None
    schema: str | None = None


@dataclass(frozen=True, slots=True)
class Tail:
    """``items`` from the start to ``end``; ``error`` where no reading uses every byte."""

    items: list[Item]
    end: int
    error: StreamError | None = None


class Chooser(Protocol):
    """Finds a description for a stream that has none, by the sections that are in it."""

    def choose(self, read: Callable[[Description | None], Tail], machine_type: str | None) -> Tail:
        """The best of what ``read`` makes of the tail under each description that may fit, or under None."""


def plausible_header(data: bytes | memoryview, at: int = 0) -> SectionHeader | None:
    """A START or FULL header that could stand at ``at``: a printable name, a small version."""
    found = _HEADER.match(data, at, at + 6 + 255)
    if found is None or len(found[2]) < found[1][0]:
        return None
    end = at + 6 + found[1][0] + 8
    if int.from_bytes(data[end - 4 : end]) > _HIGHEST_VERSION:
        return None
    try:
        header, _ = SectionHeader.read_prefix(data[at : at + LONGEST_HEADER])
    except StreamError:
        return None
    return header


def read_tail(
    data: bytes,
    *,
    base: int,
    footers: bool | None,
    description: Description | None,
    package: bool,
    foreign: bool = False,
) -> Tail:
    """The sections (and, in a package, commands) at the front of ``data``, which stands at ``base``.

    ``footers`` says whether sections have them, None where that is not known.  A ``foreign`` description is another
    stream's: what is optional in a section is then told by the bytes.

    A package ends with its last byte; other tails with EOF, which is left for the caller.
    """
    search = _Search(data, base, footers, description, package, foreign)
    search.run()
    return search.result()


@dataclass(slots=True)
class _Search:
    """All chains of plausible pieces, as a graph: places, and the items that lead from one to the next."""

    data: bytes
    base: int
    footers: bool | None
    description: Description | None
    package: bool
    foreign: bool
    edges: dict[int, list[Item]] = field(default_factory=dict)
    steps: int = 0
    places: list[tuple[int, int]] | None = None
    footer_places: dict[int, list[tuple[int, int]]] | None = None
    ways_on: dict[int, bool] = field(default_factory=dict)
    repeated: frozenset[int] = frozenset()

    def run(self) -> None:
        """Find every place that can be reached, and what may stand there."""
        waiting = [0]
        while waiting:
            at = waiting.pop()
            if at in self.edges:
                continue
            self.edges[at] = [] if self.is_end(at) else list(self.items_at(at))
            waiting.extend(item.end for item in self.edges[at])

    def is_end(self, at: int) -> bool:
        if self.package:
            return at == len(self.data)
        return self.data[at : at + 1] == b"\0" and (at + 1 == len(self.data) or self._description_at(at + 1))

    def _description_at(self, at: int) -> bool:
        if self.data[at] != SectionType.VMDESCRIPTION or at + 5 > len(self.data):
            return False
        end = at + 5 + struct.unpack_from(">I", self.data, at + 1)[0]
        return end == len(self.data) or (end < len(self.data) and self.data[at + 5 : at + 6] == b"{")

    def is_cut_end(self, at: int) -> bool:
        """EOF and a description that is longer than the stream."""
        head = self.data[at : at + 7]
        if self.package or head[:2] != b"\0\6" or head[6:] not in (b"", b"{"):
            return False
        return len(head) < 6 or at + 6 + struct.unpack_from(">I", head, 2)[0] > len(self.data)

    def is_cut(self, at: int) -> bool:
        """Nothing, or too little to tell, is left of a stream that ends too soon."""
        if at == len(self.data) or self.is_cut_end(at):
            return True
        if self.package and (self.command_end(at) or 0) > len(self.data):
            return True
        if self.data[at : at + 1] != b"\x04" or at + LONGEST_HEADER <= len(self.data):
            return False
        try:
            SectionHeader.read_prefix(self.data[at : at + LONGEST_HEADER])
        except TruncatedError:
            return True
        except StreamError:
            pass
        return False

    def items_at(self, at: int) -> Iterator[Item]:
        match self.data[at : at + 1]:
            case b"\x04":
                yield from self.sections_at(at)
            case b"\x08" if self.package:
                yield from self.command_at(at)

    def command_at(self, at: int) -> Iterator[Item]:
        end = self.command_end(at)
        if end is not None and end <= len(self.data):
            number = int.from_bytes(self.data[at + 1 : at + 3])
            yield Item(at, end, command=CommandNumber(number))

    def command_end(self, at: int) -> int | None:
        """Where the command ends that may stand here, be it behind the data; None where none does."""
        if self.data[at : at + 1] != b"\x08":
            return None
        if at + 5 > len(self.data):
            return at + 5
        number, length = struct.unpack_from(">HH", self.data, at + 1)
        if number not in CommandNumber.__members__.values():
            return None
        fixed = COMMANDS[CommandNumber(number)].size
        if fixed is not None and fixed != length:
            return None
        end = at + 5 + length
        if number == CommandNumber.PACKAGED and end <= len(self.data):
            end += struct.unpack_from(">I", self.data, at + 5)[0]
        return int(end)

    def header_at(self, at: int) -> SectionHeader | None:
        """A plausible header, or one that the description names: a version may be anything (i82801's is)."""
        header = plausible_header(self.data, at)
        if header is not None or self.description is None:
            return header
        try:
            header, _ = SectionHeader.read_prefix(self.data[at : at + LONGEST_HEADER])
        except StreamError:
            return None
        return header if self.described(header) else None

    def described(self, header: SectionHeader) -> Sequence[DeviceDescription]:
        return () if self.description is None else self.description.devices_of(header.idstr, header.instance_id)

    def sections_at(self, at: int) -> Iterator[Item]:
        header = self.header_at(at)
        if header is None:
            return
        body = at + 6 + self.data[at + 5] + 8
        devices = self.described(header)
        reason = "no description in this stream" if self.description is None else "not in the description"
        ends: set[int] = set()
        for device in devices:
            try:
                item = self.decoded(at, header, body, device.body)
            except StreamError as exc:
                reason = f"the description does not fit: {exc}"
                stretched = self.stretched(at, header, body, device.body) if self.foreign else None
                if stretched is None:
                    continue
                item = stretched
            if item.end not in ends:
                ends.add(item.end)
                yield item
        if not ends:
            yield from self.by_footer(at, header, body, reason)

    def decoded(self, at: int, header: SectionHeader, body: int, described: StructDescription) -> Item:
        """The section by this description.  Raises ``StreamError`` where it does not fit."""
        state, used = decode_state(
            described,
            self.data,
            begin=body,
            offset=self.base + body,
            trail=(header.idstr,),
            foreign=self.foreign,
        )
        return self.closed(at, header, body, body + used, state)

    def stretched(self, at: int, header: SectionHeader, body: int, described: StructDescription) -> Item | None:
        """A section that is nothing but a virtio device, whose length the description knows only as it was.

        What is in it tells whether it ends at a footer: subsections of its own, up to the last byte.
        """
        if [field.type for field in described.fields] != ["virtio"]:
            return None
        for end, _ in islice(self.closings_from(header.section_id, body), _MOST_STRETCHES):
            try:
                state = decode_whole(described, self.data, begin=body, end=end, offset=self.base + body)
                return self.closed(at, header, body, end, state)
            except StreamError:
                continue
        return None

    def closings_from(self, section_id: int, begin: int) -> Iterator[tuple[int, int]]:
        """The places of ``closings`` of one section from ``begin`` on."""
        places = [] if self.footers is False else self.closings().get(section_id, [])
        return islice(places, bisect_left(places, (begin, _NO_SECTION)), None)

    def closed(self, at: int, header: SectionHeader, body: int, end: int, state: VmState) -> Item:
        """The section as decoded.  Raises ``StreamError`` where no footer closes it."""
        if self.footers is False or (self.footers is None and not self.footer_at(end, header)):
            return Item(at, end, header, body, end, state)
        if not self.footer_at(end, header):
            found = self.data[end : end + 5].hex() or "the end"
            raise StreamError(
                f"found {found}, expected the footer 7e{header.section_id:08x}",
                offset=self.base + end,
                trail=(header.idstr,),
            )
        return Item(at, end + FOOTER_BYTES, header, body, end, state)

    def footer_at(self, at: int, header: SectionHeader) -> bool:
        return self.data[at : at + FOOTER_BYTES] == struct.pack(">BI", SectionType.FOOTER, header.section_id)

    def by_footer(self, at: int, header: SectionHeader, body: int, reason: str) -> Iterator[Item]:
        """Each end that this section may have, by what follows there."""
        if self.footers is False:
            # Whatever plausibly opens takes the footer's place, the first that leads to the end: see result().
            length, places, most = 0, self.openings(), _MOST_OPENINGS
            reason += "; there are no footers, so it is taken to end where the next header stands"
        else:
            length, places, most = FOOTER_BYTES, self.closings().get(header.section_id, []), _MOST_STEPS
        first = bisect_left(places, (body, _NO_SECTION))
        for index in range(first, min(len(places), first + most)):
            end, following = places[index]
            self.steps += 1
            if self.has_given_up:
                return
            if following != header.section_id:
                yield Item(at, end + length, header, body, end, None, reason)

    @property
    def has_given_up(self) -> bool:
        return self.steps > _MOST_STEPS

    def openings(self) -> list[tuple[int, int]]:
        """Each place where something plausibly opens, and what: see ``opens``.  Found once."""
        if self.places is None:
            self.places = []
            for count, found in enumerate(_OPENING.finditer(self.data)):
                if count > _MOST_LOOKS or len(self.places) > _MOST_PLACES:
                    self.steps = _MOST_STEPS + 1
                    break
                what = self.opens(found.start())
                if what is not None:
                    self.places.append((found.start(), what))
        return self.places

    def closings(self) -> dict[int, list[tuple[int, int]]]:
        """Each place where a footer stands before such an opening, by its section id.  Found once."""
        if self.footer_places is None:
            self.footer_places = {}
            good = 0
            for count, found in enumerate(_FOOTER.finditer(self.data)):
                if count > _MOST_LOOKS or good > _MOST_STEPS:
                    self.steps = _MOST_STEPS + 1
                    break
                what = self.opens(found.start() + FOOTER_BYTES)
                if what is not None:
                    good += 1
                    places = self.footer_places.setdefault(int.from_bytes(found[1]), [])
                    places.append((found.start(), what))
        return self.footer_places

    def opens(self, at: int) -> int | None:
        """The id of the section that plausibly opens here, or that it is something else; None where nothing does."""
        if self.is_end(at) or self.is_cut(at) or (self.package and any(self.command_at(at))):
            return _NO_SECTION
        header = self.header_at(at) if self.data[at : at + 1] == b"\x04" else None
        return None if header is None else header.section_id

    # -- which of the chains

    def result(self) -> Tail:
        self.ways_on = self._ways_to_end()
        if self.has_given_up or not self.ways_on[0]:
            return self._failure()
        self.repeated = self._repeated_ids()
        items: list[Item] = []
        at = 0
        while self.edges[at]:
            good = self._good(at)
            items.append(good[0] if len(good) == 1 else self._ambiguous(at))
            at = items[-1].end
        return Tail(items, at)

    def _ways_to_end(self) -> dict[int, bool]:
        ways: dict[int, bool] = {}
        for at in sorted(self.edges, reverse=True):
            ways[at] = self.is_end(at) or any(ways[item.end] for item in self.edges[at])
        return ways

    def _repeated_ids(self) -> frozenset[int]:
        """Section ids that several headers have: one of these is none, as an id is there once in a stream."""
        seen: set[int] = set()
        repeated: set[int] = set()
        for at, items in self.edges.items():
            if self.ways_on[at] and items and (header := items[0].header) is not None:
                (repeated if header.section_id in seen else seen).add(header.section_id)
        return frozenset(repeated)

    def _ambiguous(self, at: int) -> Item:
        """One piece from here to the first place that all readings share."""
        end = self._meeting_place(at)
        one, other = [self._reading(item, end) for item in self._good(at)[:2]]
        return Item(at, end, reason=f"there are two readings: {one}; or {other}")

    def _good(self, at: int) -> list[Item]:
        """The items that lead to the end, without those that another makes needless."""
        good = [item for item in self.edges[at] if self.ways_on[item.end]]
        if self.footers is not False or len(good) < 2:
            return good
        # Without footers a section may go on over whatever stands in it, so the nearest opening counts, and
        # only what cannot be true together with it is another reading.
        nearest = good[0].end
        opened = self.edges[nearest][0] if self.edges[nearest] else None
        if opened is None or opened.header is None:
            return good[:1]
        rivals = [item for item in good[1:] if item.end < opened.body]
        if opened.header.section_id in self.repeated:
            rivals += [item for item in good[1:] if item.end >= opened.body][:1]
        return [good[0], *rivals]

    def _meeting_place(self, at: int) -> int:
        """The first place through which every way from here leads; where ways end apart, the last of their ends."""
        waiting = sorted({item.end for item in self._good(at)})
        seen = set(waiting)
        some_ended = False
        while True:
            place = heapq.heappop(waiting)
            following = self._good(place)
            if not waiting and not (some_ended and following):
                return place
            some_ended = some_ended or not following
            for item in following:
                if item.end not in seen:
                    seen.add(item.end)
                    heapq.heappush(waiting, item.end)

    def _reading(self, item: Item, end: int) -> str:
        """The sections from ``item`` to ``end``, with the first way on at each place."""
        named: list[str] = []
        while item.end <= end and len(named) <= _MOST_NAMED:
            if item.header is not None:
                named.append(f"{item.header.idstr} to {self.base + item.end:#x}")
            following = self._good(item.end)
            if not following:
                break
            item = following[0]
        if len(named) > _MOST_NAMED:
            named[_MOST_NAMED:] = ["more"]
        return " + ".join(named)

    def _failure(self) -> Tail:
        """No chain uses every byte: what leads to the furthest place is given, and what is wrong there."""
        came_by: dict[int, Item] = {}
        for at in sorted(self.edges):
            for item in self.edges[at]:
                came_by.setdefault(item.end, item)
        furthest = max(self.edges)
        items: list[Item] = []
        at = furthest
        while at:
            items.append(came_by[at])
            at = items[-1].begin
        return Tail(items[::-1], furthest, self._what_is_wrong(furthest))

    def _what_is_wrong(self, at: int) -> StreamError:
        offset, end = self.base + at, self.base + len(self.data)
        if self.has_given_up:
            return UnsupportedError(
                f"given up after {_MOST_STEPS} places where a section of unknown length might end", offset=offset
            )
        if at >= len(self.data):
            return TruncatedError("the stream ends here, expected a section or EOF", offset=offset)
        if self.is_cut_end(at):
            return TruncatedError("the stream ends here, in the description", offset=end, trail=("description",))
        if self.data[at] == SectionType.FULL:
            try:
                header, _ = SectionHeader.read_prefix(self.data[at : at + LONGEST_HEADER], offset=offset)
            except TruncatedError as exc:
                return exc
            except StreamError:
                pass  # not a header after all
            else:
                if self.header_at(at) is not None:
                    return TruncatedError(
                        f"no footer 7e{header.section_id:08x} closes this section before the stream ends",
                        offset=offset,
                        trail=(header.idstr,),
                    )
        return StreamError(f"found {self.data[at]:#x}, expected a section's header or the end", offset=offset)
