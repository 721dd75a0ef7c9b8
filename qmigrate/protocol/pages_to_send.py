"""Which pages are still to be sent, and which is next: those that are asked for, then the others in their order.

S12, the maps.  ``dirty``: must be sent; ``sent``: was sent before the switch.  A host page is discarded that is
dirty or was never sent.  A saved guest's pages are all dirty and none was sent: each block is discarded whole, and
LISTEN never comes without a discard, with which 11.1 hangs (seen).  After the switch nothing gets dirty again: a page
that is taken to be sent is not dirty any more, so each is sent once, by request or in its turn.

migration/ram.c: get_queued_page(), ram_save_host_page(), ram_postcopy_send_discard_bitmap()
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Final, NamedTuple

from qmigrate.format.command import DiscardRange
from qmigrate.value import Value

__all__ = ["HostPages", "PagesToSend", "Span"]

_YES: Final = 1
_MISSING: Final = bytes([_YES if digit == ord("0") else 0 for digit in range(256)])


class HostPages(Value):
    """A block as the destination has it: ``length`` and ``page_size``, of its host pages, in bytes."""

    name: str
    length: int
    page_size: int

    @property
    def count(self) -> int:
        return -(-self.length // self.page_size)


class Span(NamedTuple):
    """Whole host pages of one block to be sent next, as target pages.  ``requested``: somebody waits for them."""

    block: str
    first: int
    page_count: int
    requested: bool = False


class PagesToSend:
    """The pages of ``blocks``, in the order of the stream; all of them are to be sent.

    ``page_size`` is the target's, in bytes.  ``at_once``: how many bytes of pages one span in its turn has at most, if
    a host page is no longer.
    """

    def __init__(self, blocks: Mapping[str, HostPages], *, page_size: int, at_once: int) -> None:
        self.blocks = blocks
        self.page_size = page_size
        self.at_once = at_once
        self.has: Callable[[str, int, int, bool], bool] | None = None
        """Are these target pages at hand, and does somebody wait for them (the last one)?  If not they are sent later.
        None: all are.
        """
        self.left = sum(block.count for block in blocks.values())
        """Host pages that are still to be sent."""
        self._order = list(blocks)
        self._dirty = {block.name: bytearray([_YES]) * block.count for block in blocks.values()}
        self._sent = {block.name: bytearray(block.count) for block in blocks.values()}
        self._wanted: deque[tuple[str, int]] = deque()
        self._queued: set[tuple[str, int]] = set()
        self._turn = (0, 0)  # the block and the host page where the search for the next one begins

    def to_discard(self, block: HostPages) -> Iterator[DiscardRange]:
        """What the destination shall forget of it: all that is dirty or was never sent."""
        dirty, sent = self._dirty[block.name], self._sent[block.name]
        forget = bytes(map(_is_to_discard, dirty, sent)) if sent.count(_YES) else b"\1" * block.count
        at = 0
        while (first := forget.find(_YES, at)) >= 0:
            at = forget.find(0, first)
            at = block.count if at < 0 else at
            yield DiscardRange(start=first * block.page_size, length=(at - first) * block.page_size)

    @property
    def has_taken(self) -> bool:
        """Has any page been given to be sent?"""
        return self.left < sum(block.count for block in self.blocks.values())

    @property
    def left_pages(self) -> int:
        """The same in target pages."""
        return sum(
            self._dirty[name].count(_YES) * (block.page_size // self.page_size) for name, block in self.blocks.items()
        )

    @property
    def waiting(self) -> int:
        """Host pages that were asked for and are still to be sent."""
        return len(self._wanted)

    def next_span(self) -> Span | None:
        """What to send next, requested pages first; it counts as sent.  None where all is, or nothing is at hand."""
        return self.next_requested() or self.next_in_turn()

    def next_requested(self) -> Span | None:
        """The next host page that somebody waits for; it counts as sent.  None where there is none that is at hand."""
        for _ in range(len(self._wanted)):
            name, page = self._wanted.popleft()
            if self._dirty[name][page] and not self._is_at_hand(name, page, 1, is_wanted=True):
                self._wanted.append((name, page))
                continue
            self._queued.discard((name, page))
            if self._dirty[name][page]:
                # What a guest wants next mostly stands behind what it wanted.
                self._turn = (self._order.index(name), page + 1)
                return self._take(name, page, 1, requested=True)
        return None

    def _is_at_hand(self, name: str, first: int, count: int, *, is_wanted: bool = False) -> bool:
        return self.has is None or self.has(name, *self._targets(name, first, count), is_wanted)

    def next_in_turn(self) -> Span | None:
        """The next pages in the order of the blocks, behind those that were asked for last; they count as sent.

        None where there is none, or they are not at hand.
        """
        for _ in range(len(self._order) + 1):
            number, page = self._turn
            name = self._order[number]
            first = self._dirty[name].find(_YES, page)
            if first < 0:
                self._turn = ((number + 1) % len(self._order), 0)
                continue
            return self._in_its_turn(number, name, first)
        return None

    def _in_its_turn(self, number: int, name: str, first: int) -> Span | None:
        most = max(self.at_once // self.blocks[name].page_size, 1)
        end = self._dirty[name].find(0, first, first + most)
        end = min(first + most, self.blocks[name].count) if end < 0 else end
        if not self._is_at_hand(name, first, end - first):
            return None
        self._turn = (number, end)
        return self._take(name, first, end - first)

    def _take(self, name: str, first: int, count: int, *, requested: bool = False) -> Span:
        self._dirty[name][first : first + count] = bytes(count)
        self.left -= count
        return Span(name, *self._targets(name, first, count), requested)

    def _targets(self, name: str, first: int, count: int) -> tuple[int, int]:
        """Host pages as target pages: the first one, and how many."""
        block = self.blocks[name]
        each, whole = block.page_size // self.page_size, block.length // self.page_size
        return first * each, min(count * each, whole - first * each)

    # -- what the destination says

    def ask(self, name: str, start: int, length: int) -> bool:
        """Somebody waits for these bytes; False where they are on their way, or there, already."""
        is_new = False
        page_size = self.blocks[name].page_size
        for page in range(start // page_size, -(-(start + length) // page_size)):
            if self._dirty[name][page] and (name, page) not in self._queued:
                self._wanted.append((name, page))
                self._queued.add((name, page))
                is_new = True
        return is_new

    def ask_anew(self) -> None:
        """What still waits asks again: so nothing is waited for."""
        self._wanted.clear()
        self._queued.clear()

    def arrived(self, name: str, bitmap: bytes) -> None:
        """What has not arrived is dirty, whatever was sent.  A bit a target page, the lowest first."""
        block = self.blocks[name]
        each = block.page_size // self.page_size
        digits = format(int.from_bytes(bitmap, "little"), f"0{len(bitmap) * 8}b")[::-1][: block.count * each : each]
        self.left -= self._dirty[name].count(_YES)
        self._dirty[name] = bytearray(digits.encode().translate(_MISSING))
        self.left += self._dirty[name].count(_YES)


def _is_to_discard(dirty: int, sent: int) -> int:
    return _YES if dirty or not sent else 0
