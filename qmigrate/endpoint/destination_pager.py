"""The pager's process: faults become page requests.

It owns the queue of faults and the preempt channel, sets ``requested`` in the page map (nobody else does), and writes
REQ_PAGES under the return path's lock.  S13: a fault on a page that is here already is answered without asking the
source: its waiter is woken, and a page that came as zeros before LISTEN, and is a hole, gets its zeros now.

Nothing else runs in this process: one busy thread beside it would delay each fault by milliseconds.

    python -m qmigrate.endpoint.destination_pager LIFELINE PARENT LISTENER
"""

import os
import select
import struct
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Final, NamedTuple

from qmigrate.endpoint.back import ReturnPath
from qmigrate.endpoint.link import Link, LinkClosedError, Said, end_with_parent
from qmigrate.endpoint.ram import Counts, GuestRam, Placer
from qmigrate.errors import QmigrateError
from qmigrate.format.return_path import MessageType, RequestPagesId, encode_message
from qmigrate.protocol.page_channel import PageChannel
from qmigrate.uffd.pager import FaultQueue, Range
from qmigrate.uffd.userfault import Userfaultfd

DRAIN_QUIET_MS: Final = 5000  # nothing more comes on the preempt channel, though pages are missing


_REQUEST: Final = struct.Struct(">HHQI")
_REQUEST_HEAD: Final = int(MessageType.REQ_PAGES), _REQUEST.size - 4  # the length counts what follows it


def request_pages(start: int, length: int) -> bytes:
    """REQ_PAGES as its declaration builds it, which takes ten times as long."""
    return _REQUEST.pack(*_REQUEST_HEAD, start, length)


class Pager:
    """From LISTEN on."""

    def __init__(self, said: Said, parent: Link) -> None:
        path, lock, faults, *descriptors = said.descriptors
        self.parent = parent
        self.lock = lock
        self.back: ReturnPath | None = ReturnPath(path, lock)
        os.close(path)
        self.ram = GuestRam.received(said.values["ram"], descriptors)
        addresses = said.values["addresses"]
        self.queue = FaultQueue(
            Userfaultfd(faults),
            [
                Range(address, memory.mapped_length, block.page_size)
                for address, memory, block in zip(addresses, self.ram.memory, self.ram.pages.blocks, strict=True)
            ],
        )
        self.counts = Counts()
        self.placer = Placer(self.ram, self.queue.userfaultfd, addresses, self.counts)
        # Another one: the first may have half a host page of the preempt channel; and what is found to be here
        # already, when a fault is answered, did not come twice.
        self.zeros = Placer(self.ram, self.queue.userfaultfd, addresses, Counts())
        self.requested = 0
        self.preempt: PreemptChannel | None = None
        self.preempt_bytes = 0
        self.faults = 0
        self._block: int | None = None  # of the last request on this connection

    def serve(self) -> None:
        """All faults that wait: what they ask for goes out in one piece.

        Each step here is one that every fault waits for: nothing is made that is not needed.
        """
        asked = b""
        for address in self.queue.userfaultfd.addresses():
            found = self.queue.find(address)
            if found is None:
                continue
            self.faults += 1
            block, start = found
            if self.ram.pages.request(block, start):
                asked += self._request(block, start)
            elif self.ram.pages.is_received(block, start):
                self.zeros.zero(block, start)
        if asked and self.back is not None:
            self.back.send(asked)

    def _request(self, block: int, start: int) -> bytes:
        """REQ_PAGES, with the block's name where it is not that of the request before.  Empty while it is paused.

        What is asked for meanwhile is so after the recovery.
        """
        if self.back is None:
            return b""
        self.requested += 1
        self.ram.asked(block, start)
        length = self.ram.block(block).page_size
        if block == self._block:
            return request_pages(start, length)
        self._block = block
        return encode_message(RequestPagesId(start=start, length=length, block=self.ram.block(block).name))

    def pause(self) -> None:
        """The connection broke, and with it that of the requested pages."""
        self.drop_preempt()
        if self.back is not None:
            self.back.close()
        self.back = None

    def resume(self, path: int) -> None:
        """A new one: what was asked for and has not come is asked for again, by name."""
        self.back, self._block = ReturnPath(path, self.lock), None
        os.close(path)
        for block, start in self.ram.pages.requested_missing():
            self.back.send(self._request(block, start))

    def tell(self, kind: str) -> None:
        """What was done so far."""
        self.parent.tell(
            kind,
            faults=self.faults,
            requested=self.requested,
            received_bytes=self.preempt_bytes,
            counts=asdict(self.counts),
            waited=asdict(self.placer.waited),
        )

    # -- the preempt channel

    def take_preempt(self, descriptor: int) -> None:
        """Requested pages come here from now on."""
        self.drop_preempt()
        lengths = {block.name: block.length for block in self.ram.pages.blocks}
        self.preempt = PreemptChannel(descriptor, PageChannel(lengths, self.ram.target_page))

    def drop_preempt(self) -> None:
        """What is cut of a page comes again, after a recovery."""
        if self.preempt is not None:
            os.close(self.preempt.descriptor)
            self.preempt = None
            self.placer.forget()

    def read_preempt(self) -> None:
        """What is there, and place it."""
        if self.preempt is None:
            return
        feed = self.preempt.pages.feed
        try:
            count = os.readv(self.preempt.descriptor, [feed.space()])
        except OSError:
            count = 0
        if not count:
            self.drop_preempt()
            return
        feed.received(count)
        self.preempt_bytes += count
        came = self.preempt.pages.plain_pages()
        if came is not None:
            self.placer.place(came)
            if self.preempt.pages.has_less_than_a_page:
                return
        for came in self.preempt.pages.events():
            self.placer.place(came)


class PreemptChannel(NamedTuple):
    """The connection, and what reads it."""

    descriptor: int
    pages: PageChannel


class _Process:
    """What this process waits for, and what it does then."""

    def __init__(self, parent: Link, listener: Link) -> None:
        self.parent = parent
        self.listener = listener
        self.pager: Pager | None = None
        self.is_over = False
        self._early: int | None = None  # a preempt channel that came before LISTEN
        self._draining = False
        self._waits: tuple[Pager | None, int | None, select.poll] | None = None

    def step(self) -> None:
        """Wait for the next thing, and do it."""
        ready = self._poll().poll(DRAIN_QUIET_MS if self._draining else None)
        pager = self.pager
        try:
            self._do([descriptor for descriptor, _ in ready])
        except QmigrateError as exc:
            self._broke(str(exc))
        if self._draining and pager is not None:
            self._drain(pager, is_quiet=not ready)

    def _poll(self) -> select.poll:
        """What is waited for; made anew where that is something else than the last time."""
        pager = self.pager
        preempt = None if pager is None or pager.preempt is None else pager.preempt.descriptor
        if self._waits is None or self._waits[0] is not pager or self._waits[1] != preempt:
            poll = select.poll()
            poll.register(self.parent, select.POLLIN)
            poll.register(self.listener, select.POLLIN)
            if pager is not None:
                poll.register(pager.queue, select.POLLIN)
            if preempt is not None:
                poll.register(preempt, select.POLLIN)
            self._waits = pager, preempt, poll
        return self._waits[2]

    def _do(self, ready: list[int]) -> None:
        if self.pager is not None:
            if self.pager.queue.fileno() in ready:
                self.pager.serve()
                if len(ready) == 1:
                    return
            if self.pager.preempt is not None and self.pager.preempt.descriptor in ready:
                self.pager.read_preempt()
        if self.listener.fileno() in ready:
            self._told(self.listener.hear())
        if self.parent.fileno() in ready:
            self._told(self.parent.hear())

    def _broke(self, message: str) -> None:
        """The preempt channel's bytes are wrong: to the source its connection breaks."""
        self.parent.tell("trouble", message=f"preempt channel: {message}")
        if self.pager is not None:
            self.pager.drop_preempt()

    def _told(self, said: Said) -> None:
        match said.kind, self.pager:
            case "none", _:
                self.is_over = True
            case "listen", _:
                self.pager = Pager(said, self.parent)
                if self._early is not None:
                    self.pager.take_preempt(self._early)
            case "preempt", None:
                self._early = said.descriptors[0]
            case "preempt", Pager() as pager:
                pager.take_preempt(said.descriptors[0])
            case "pause", Pager() as pager:
                pager.pause()
            case "resume", Pager() as pager:
                pager.resume(said.descriptors[0])
            case "drain", Pager():
                self._draining = True
            case "how", Pager() as pager:
                pager.tell("paging")
            case "stop", Pager() as pager:
                pager.tell("paged")
                self.is_over = True

    def _drain(self, pager: Pager, *, is_quiet: bool) -> None:
        """The main channel has ended: is there anything that the preempt channel still has to bring?"""
        if is_quiet or pager.preempt is None or not pager.ram.pages.missing_count:
            self._draining = False
            self.listener.tell("drained")


def main(lifeline: int, parent: Link, listener: Link) -> None:
    end_with_parent(lifeline)
    parent.tell("ready")
    process = _Process(parent, listener)
    while not process.is_over:
        process.step()


if __name__ == "__main__":
    with suppress(LinkClosedError):
        main(int(sys.argv[1]), Link.inherited(int(sys.argv[2])), Link.inherited(int(sys.argv[3])))
