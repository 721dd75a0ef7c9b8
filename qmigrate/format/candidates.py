"""What may stand at each place of device state whose sections have no length.

With a description a section is decoded, and the footer proves it.  Without one it may end at each footer of its own,
or where there are none at each plausible header, behind which something plausible opens.

stream-format.md §4.8 says what may follow a footer.
"""

import re
import struct
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, NamedTuple

from qmigrate.errors import StreamError, TruncatedError, UnsupportedError
from qmigrate.format.command import COMMANDS, CommandNumber
from qmigrate.format.device import decode_state, decode_whole
from qmigrate.format.stream import FOOTER_BYTES, LONGEST_HEADER, SectionHeader, SectionType
from qmigrate.format.vm_state import VmState
from qmigrate.format.vmdesc import Description, DeviceDescription, StructDescription

__all__ = ["Candidates", "Item", "plausible_header"]

_HIGHEST_VERSION: Final = 0xFFFF  # of a section header that we take for one without other proof
# What is tried before a hostile tail is given up.
_MOST_STEPS: Final = 200_000  # places where a section may end
_MOST_LOOKS: Final = 1_000_000  # at what may open something
_MOST_PLACES: Final = 20_000  # where something does, without footers
_NO_SECTION: Final = -1
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


@dataclass(slots=True)
class Candidates:
    """What may stand where in ``data``, which stands at ``base``.  ``read_tail`` says what the others are."""

    data: bytes
    base: int
    footers: bool | None
    description: Description | None
    package: bool
    foreign: bool
    _steps: int = field(default=0, init=False)
    _opening_places: list[tuple[int, int]] | None = field(default=None, init=False)
    _footer_places: dict[int, list[tuple[int, int]]] | None = field(default=None, init=False)

    def is_end(self, at: int) -> bool:
        if self.package:
            return at == len(self.data)
        return self.data[at : at + 1] == b"\0" and (at + 1 == len(self.data) or self._description_at(at + 1))

    def _description_at(self, at: int) -> bool:
        if self.data[at] != SectionType.VMDESCRIPTION or at + 5 > len(self.data):
            return False
        end = at + 5 + struct.unpack_from(">I", self.data, at + 1)[0]
        return end == len(self.data) or (end < len(self.data) and self.data[at + 5 : at + 6] == b"{")

    def _is_cut_end(self, at: int) -> bool:
        """EOF and a description that is longer than the stream."""
        head = self.data[at : at + 7]
        if self.package or head[:2] != b"\0\6" or head[6:] not in (b"", b"{"):
            return False
        return len(head) < 6 or at + 6 + struct.unpack_from(">I", head, 2)[0] > len(self.data)

    def _is_cut(self, at: int) -> bool:
        """Nothing, or too little to tell, is left of a stream that ends too soon."""
        if at == len(self.data) or self._is_cut_end(at):
            return True
        if self.package and (self._command_end(at) or 0) > len(self.data):
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
                yield from self._sections_at(at)
            case b"\x08" if self.package:
                yield from self._command_at(at)

    def _command_at(self, at: int) -> Iterator[Item]:
        end = self._command_end(at)
        if end is not None and end <= len(self.data):
            number = int.from_bytes(self.data[at + 1 : at + 3])
            yield Item(at, end, command=CommandNumber(number))

    def _command_end(self, at: int) -> int | None:
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

    def _header_at(self, at: int) -> SectionHeader | None:
        """A plausible header, or one that the description names: a version may be anything (i82801's is)."""
        header = plausible_header(self.data, at)
        if header is not None or self.description is None:
            return header
        try:
            header, _ = SectionHeader.read_prefix(self.data[at : at + LONGEST_HEADER])
        except StreamError:
            return None
        return header if self._described(header) else None

    def _described(self, header: SectionHeader) -> Sequence[DeviceDescription]:
        return () if self.description is None else self.description.devices_of(header.idstr, header.instance_id)

    def _sections_at(self, at: int) -> Iterator[Item]:
        header = self._header_at(at)
        if header is None:
            return
        body = at + 6 + self.data[at + 5] + 8
        devices = self._described(header)
        reason = "no description in this stream" if self.description is None else "not in the description"
        ends: set[int] = set()
        for device in devices:
            try:
                item = self._decoded(at, header, body, device.body)
            except StreamError as exc:
                reason = f"the description does not fit: {exc}"
                stretched = self._stretched(at, header, body, device.body) if self.foreign else None
                if stretched is None:
                    continue
                item = stretched
            if item.end not in ends:
                ends.add(item.end)
                yield item
        if not ends:
            yield from self._by_footer(at, header, body, reason)

    def _decoded(self, at: int, header: SectionHeader, body: int, described: StructDescription) -> Item:
        """The section by this description.  Raises ``StreamError`` where it does not fit."""
        state, used = decode_state(
            described,
            self.data,
            begin=body,
            offset=self.base + body,
            trail=(header.idstr,),
            foreign=self.foreign,
        )
        return self._closed(at, header, body, body + used, state)

    def _stretched(self, at: int, header: SectionHeader, body: int, described: StructDescription) -> Item | None:
        """A section that is nothing but a virtio device, whose length the description knows only as it was.

        What is in it tells whether it ends at a footer: subsections of its own, up to the last byte.
        """
        if [field.type for field in described.fields] != ["virtio"]:
            return None
        for end, _ in islice(self._closings_from(header.section_id, body), _MOST_STRETCHES):
            try:
                state = decode_whole(described, self.data, begin=body, end=end, offset=self.base + body)
                return self._closed(at, header, body, end, state)
            except StreamError:
                continue
        return None

    def _closings_from(self, section_id: int, begin: int) -> Iterator[tuple[int, int]]:
        """The places of ``_closings`` of one section from ``begin`` on."""
        places = [] if self.footers is False else self._closings().get(section_id, [])
        return islice(places, bisect_left(places, (begin, _NO_SECTION)), None)

    def _closed(self, at: int, header: SectionHeader, body: int, end: int, state: VmState) -> Item:
        """The section as decoded.  Raises ``StreamError`` where no footer closes it."""
        if self.footers is False or (self.footers is None and not self._footer_at(end, header)):
            return Item(at, end, header, body, end, state)
        if not self._footer_at(end, header):
            found = self.data[end : end + 5].hex() or "the end"
            raise StreamError(
                f"found {found}, expected the footer 7e{header.section_id:08x}",
                offset=self.base + end,
                trail=(header.idstr,),
            )
        return Item(at, end + FOOTER_BYTES, header, body, end, state)

    def _footer_at(self, at: int, header: SectionHeader) -> bool:
        return self.data[at : at + FOOTER_BYTES] == struct.pack(">BI", SectionType.FOOTER, header.section_id)

    def _by_footer(self, at: int, header: SectionHeader, body: int, reason: str) -> Iterator[Item]:
        """Each end that this section may have, by what follows there."""
        if self.footers is False:
            # Whatever plausibly opens takes the footer's place, the first that leads to the end: see ``Chains``.
            length, places, most = 0, self._openings(), _MOST_OPENINGS
            reason += "; there are no footers, so it is taken to end where the next header stands"
        else:
            length, places, most = FOOTER_BYTES, self._closings().get(header.section_id, []), _MOST_STEPS
        first = bisect_left(places, (body, _NO_SECTION))
        for index in range(first, min(len(places), first + most)):
            end, following = places[index]
            self._steps += 1
            if self.has_given_up:
                return
            if following != header.section_id:
                yield Item(at, end + length, header, body, end, None, reason)

    @property
    def has_given_up(self) -> bool:
        return self._steps > _MOST_STEPS

    def _openings(self) -> list[tuple[int, int]]:
        """Each place where something plausibly opens, and what: see ``_opens``.  Found once."""
        if self._opening_places is None:
            self._opening_places = []
            for count, found in enumerate(_OPENING.finditer(self.data)):
                if count > _MOST_LOOKS or len(self._opening_places) > _MOST_PLACES:
                    self._steps = _MOST_STEPS + 1
                    break
                what = self._opens(found.start())
                if what is not None:
                    self._opening_places.append((found.start(), what))
        return self._opening_places

    def _closings(self) -> dict[int, list[tuple[int, int]]]:
        """Each place where a footer stands before such an opening, by its section id.  Found once."""
        if self._footer_places is None:
            self._footer_places = {}
            good = 0
            for count, found in enumerate(_FOOTER.finditer(self.data)):
                if count > _MOST_LOOKS or good > _MOST_STEPS:
                    self._steps = _MOST_STEPS + 1
                    break
                what = self._opens(found.start() + FOOTER_BYTES)
                if what is not None:
                    good += 1
                    places = self._footer_places.setdefault(int.from_bytes(found[1]), [])
                    places.append((found.start(), what))
        return self._footer_places

    def _opens(self, at: int) -> int | None:
        """The id of the section that plausibly opens here, or that it is something else; None where nothing does."""
        if self.is_end(at) or self._is_cut(at) or (self.package and any(self._command_at(at))):
            return _NO_SECTION
        header = self._header_at(at) if self.data[at : at + 1] == b"\x04" else None
        return None if header is None else header.section_id

    def fault_at(self, at: int) -> StreamError:
        offset, end = self.base + at, self.base + len(self.data)
        if self.has_given_up:
            return UnsupportedError(
                f"given up after {_MOST_STEPS} places where a section of unknown length might end", offset=offset
            )
        if at >= len(self.data):
            return TruncatedError("the stream ends here, expected a section or EOF", offset=offset)
        if self._is_cut_end(at):
            return TruncatedError("the stream ends here, in the description", offset=end, trail=("description",))
        if self.data[at] == SectionType.FULL:
            try:
                header, _ = SectionHeader.read_prefix(self.data[at : at + LONGEST_HEADER], offset=offset)
            except TruncatedError as exc:
                return exc
            except StreamError:
                pass  # not a header after all
            else:
                if self._header_at(at) is not None:
                    return TruncatedError(
                        f"no footer 7e{header.section_id:08x} closes this section before the stream ends",
                        offset=offset,
                        trail=(header.idstr,),
                    )
        return StreamError(f"found {self.data[at]:#x}, expected a section's header or the end", offset=offset)
