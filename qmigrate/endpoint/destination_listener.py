"""The listener's process: owns the main channel and those of multifd, parses, and puts pages in place.

S6: it reads the package whole, hands it to the guest's process, and goes on reading.  S7: once the guest has obeyed
LISTEN, pages are placed by COPY, whatever the guest does meanwhile.  S11: at the end it waits for the parent's word,
which may have to save first, and says SHUT; when the connection breaks after RUN it waits for another.

    python -m qmigrate.endpoint.destination_listener LIFELINE PARENT GUEST PAGER
"""

import os
import select
import socket
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any, Final

from qmigrate.endpoint.back import SEND_TIMEOUT_S, ReturnPath, limit_sending, new_lock
from qmigrate.endpoint.link import Link, LinkClosedError, Said, end_with_parent
from qmigrate.endpoint.multifd import MultifdChannels
from qmigrate.endpoint.ram import Counts, GuestRam, Placer, write_encoded, write_pages
from qmigrate.errors import QmigrateError, StreamError
from qmigrate.format.walk import Limits
from qmigrate.protocol import destination_events as events
from qmigrate.protocol.destination import Destination
from qmigrate.protocol.package import Package, devices_of
from qmigrate.protocol.phases import Phase
from qmigrate.uffd.toucher import Histogram
from qmigrate.uffd.userfault import Userfaultfd

POSTCOPY_READ: Final = 1 << 18  # bytes: all that a unix socket holds, so that the source goes on meanwhile
PROGRESS_S: Final = 0.25
QUIET_S: Final = 0.5  # after which a tail that could be whole is taken to be
LATE: Final = (
    "a multifd channel came after RAM had begun, and what it brought is lost: say how many there are (--multifd N)"
)
GUEST_TIMEOUT_S: Final = 30.0  # to load a package of which all has come
STUCK_S: Final = 1.0  # after which a page that is still missing does not come any more


class Channel:
    """The descriptor of one connection.  ``way_back`` where it can be written to."""

    def __init__(self, descriptor: int, way_back: bool) -> None:
        self.descriptor = descriptor
        self.way_back = way_back
        if way_back:
            peer = socket.socket(fileno=os.dup(descriptor))
            limit_sending(peer)
            peer.close()

    def read_into(self, space: memoryview) -> int:
        """0 where it has ended, or broke."""
        try:
            return os.readv(self.descriptor, [space])
        except OSError:
            return 0

    def close(self) -> None:
        os.close(self.descriptor)


class Listener:
    """One migration, from its first byte to SHUT."""

    def __init__(self, parent: Link, guest: Link, pager: Link, *, keep: bool, limits: Limits) -> None:
        self.parent = parent
        self.guest = guest
        self.pager = pager
        self.core = Destination(keep=keep, limits=limits)
        self.package: events.PackageCame | None = None
        self.counts = Counts()
        self.lock = new_lock()
        self.ram: GuestRam | None = None
        self.placer: Placer | None = None
        self.multifd: MultifdChannels | None = None
        self.channel: Channel | None = None
        self.back: ReturnPath | None = None
        self.received_bytes = 0
        self._told = 0.0
        self._phase = self.core.phase

    # -- the course of it

    def run(self) -> None:
        """Connections until all is loaded, or it can't go on."""
        self._connect(self.parent.expect("connect"))
        while not self._receive():
            self._connect(self.parent.expect("connect"))
            self.core.recover()
            self._tell_phase()
        self._finish()

    def _connect(self, said: Said) -> None:
        (descriptor,) = said.descriptors
        self.channel = Channel(descriptor, said.values["way_back"])
        self.back = ReturnPath(descriptor, self.lock) if self.channel.way_back else None

    def _receive(self) -> bool:
        """One connection.  True: all is loaded.  False: it broke, and can be recovered.  Raises ``QmigrateError``."""
        try:
            self._read()
        except StreamError as exc:
            fault = self._fault(exc)
            if not self._pauses():
                raise fault from None
            self._disconnect(str(fault))
            return False
        return True

    def _read(self) -> None:
        core, channel = self.core, self.channel
        assert channel is not None
        while True:
            if not self._place_ahead():
                for event in core.events():
                    self._tell_phase()
                    self._take(event)
                    self._send()
                    if isinstance(event, events.Loaded):
                        return
                self._send()
                self._tell_phase()
            self._tell_progress()
            if (core.phase is Phase.LISTENING or self.multifd) and not self._wait(channel):
                continue
            if core.may_be_over and not _is_readable(channel.descriptor, QUIET_S):
                core.quiet()
                if core.feed.ended:
                    continue
            # In postcopy what is read ahead makes a requested page wait behind it.
            space = core.space() if self.placer is None else core.space()[:POSTCOPY_READ]
            count = channel.read_into(space)
            self.received_bytes += count
            if count:
                core.received(count)
            else:
                core.receive_eof()

    def _send(self) -> None:
        data = self.core.data_to_send()
        if data and self.back is not None:
            self.back.send(data)

    # -- what the stream says

    def _take(self, event: events.Event) -> None:
        match event:
            case events.PagesCame():
                self._place(event)
            case events.EncodedCame():
                self._write_encoded(event)
            case events.SyncPoint():
                self._sync()
            case events.Configured(machine_type=name):
                self._tell("configured", machine_type=name)
            case events.Advised(sizes=sizes):
                self._advised(None if sizes is None else sizes.summary)
            case events.BlocksListed(blocks=blocks, target_page_size=size):
                self.ram = GuestRam.create(blocks, size)
                self._tell("blocks", **self.ram.described())
            case events.Discarded():
                self._discard(event)
            case events.PackageCame():
                self._hand_over(event)
            case events.BitmapAsked(block=block):
                self._answer_bitmap(block)
            case events.Resumed():
                self._resume_pager()

    def _place(self, came: events.PagesCame) -> None:
        if self.ram is None:
            raise StreamError("pages before the block list", offset=came.offset, trail=("ram",))
        if self.placer is None:
            write_pages(self.ram, came, self.counts)
        else:
            self.placer.place(came)

    def _place_ahead(self) -> bool:
        """After LISTEN nearly all is plain pages, placed here.  True: the grammar has nothing to say yet."""
        if self.placer is None:
            return False
        came = self.core.plain_pages()
        if came is None:
            return False
        self.placer.place(came)
        return self.core.has_less_than_a_page

    def _write_encoded(self, came: events.EncodedCame) -> None:
        if self.ram is None:
            raise StreamError("a page before the block list", offset=came.offset, trail=("ram",))
        write_encoded(self.ram, came, self.counts)

    def _sync(self) -> None:
        """At the first one the source has connected all multifd channels: which there are, the parent knows."""
        if self.ram is None:
            return
        if self.multifd is None:
            self._tell("channels")
            descriptors = self.parent.expect("channels").descriptors
            self.multifd = MultifdChannels(descriptors, self.ram, self.counts)
        self.multifd.sync()

    def _discard(self, discarded: events.Discarded) -> None:
        if self.ram is None:
            raise StreamError("a discard before the block list", trail=("POSTCOPY_RAM_DISCARD",))
        for each in discarded.ranges:
            self.counts.discarded += self.ram.discard(discarded.block, each.start, each.length)

    def _answer_bitmap(self, block: str) -> None:
        assert self.ram is not None  # a recovery comes after LISTEN
        bitmap = self.ram.pages.bitmap(self.ram.number(block), self.ram.target_page)
        self.core.send_bitmap(block, bitmap)

    def _advised(self, summary: int | None) -> None:
        """S4: is this host able to?"""
        if summary is None:
            return
        with Userfaultfd.open():
            pass
        self._tell("advised", page_sizes=summary)

    def _hand_over(self, came: events.PackageCame) -> None:
        """The guest's process loads the package; we go on once it has obeyed LISTEN."""
        if self.ram is None:
            raise StreamError("a package before the block list", offset=came.offset, trail=("PACKAGED",))
        assert self.channel is not None
        self._send()  # what was asked before the package is answered before what is asked in it
        if self.core.kept is not None:
            self.package = came
        package = _in_memory("package", came.data)
        descriptors = [self.channel.descriptor, self.lock, package, *self.ram.descriptors]
        self.guest.tell(
            "package",
            ram=self.ram.described(),
            phase=self.core.phase.value,
            offset=came.offset,
            footers=came.footers,
            descriptors=descriptors,
        )
        os.close(package)
        said = self._heard_from_guest()
        self._listen(said)

    def _heard_from_guest(self) -> Said:
        said = self.guest.hear()
        if said.kind == "failed":
            raise QmigrateError(said.values["message"])
        return said

    def _listen(self, said: Said) -> None:
        assert self.ram is not None
        assert self.channel is not None
        (faults,) = said.descriptors
        addresses = said.values["addresses"]
        self.core.listening()
        self._tell_phase()
        if self.multifd is not None:
            self.multifd.postcopy = True
        self.placer = Placer(self.ram, Userfaultfd(faults), addresses, self.counts)
        self.pager.tell(
            "listen",
            ram=self.ram.described(),
            addresses=addresses,
            descriptors=[self.channel.descriptor, self.lock, faults, *self.ram.descriptors],
        )

    def _wait(self, channel: Channel) -> bool:
        """Until something comes.  True: it is the main channel, which is read next.

        Else a multifd channel was read, or the guest said that its package is loaded.
        """
        poll = select.poll()
        poll.register(channel.descriptor, select.POLLIN)
        if self.core.phase is Phase.LISTENING:
            poll.register(self.guest, select.POLLIN)
        poll.register(self.parent, select.POLLIN)
        for descriptor in self.multifd.descriptors() if self.multifd is not None else ():
            poll.register(descriptor, select.POLLIN)
        ready = {descriptor for descriptor, _ in poll.poll()}
        if self.guest.fileno() in ready:
            self._loaded_by_guest()
        if self.parent.fileno() in ready:
            self.parent.expect("late")
            raise QmigrateError(LATE)
        for descriptor in ready - {self.guest.fileno(), channel.descriptor}:
            assert self.multifd is not None
            self.multifd.read(descriptor)
        return channel.descriptor in ready

    def _loaded_by_guest(self) -> None:
        said = self._heard_from_guest()
        assert said.kind == "running", said.kind
        self.core.running()
        self._tell_phase()

    # -- breaks, and the end

    def _fault(self, exc: StreamError) -> StreamError:
        """What is told of it: a connection that ends where we have broken it has another reason."""
        if self.back is not None and self.back.is_stuck:
            return StreamError(f"the source has not read what it is told for {SEND_TIMEOUT_S:g} s")
        return exc

    def _pauses(self) -> bool:
        """The connection is of no more use: can it be recovered?  The phase says."""
        self._wait_for_guest()  # all of the package is here: it may still be loaded
        self.core.link_lost()
        return self.core.phase is Phase.PAUSED

    def _wait_for_guest(self) -> tuple[int, int] | None:
        """Nothing comes any more on main: until the package is loaded, or waits in vain for a page, which is given."""
        poll = select.poll()
        poll.register(self.guest, select.POLLIN)
        awaited = None
        until = time.monotonic() + GUEST_TIMEOUT_S
        while self.core.phase is Phase.LISTENING and time.monotonic() < until:
            if poll.poll(STUCK_S * 1000):
                self._loaded_by_guest()
                return None
            assert self.ram is not None
            before, awaited = awaited, next(self.ram.pages.requested_missing(), None)
            if awaited is not None and awaited == before:  # the preempt channel has not brought it either
                return awaited
        return None

    def _waits_in_vain(self, awaited: tuple[int, int]) -> StreamError:
        assert self.ram is not None
        number, start = awaited
        return StreamError(
            f"the package waits for the page at {start:#x}, and the source has ended without it",
            trail=("ram", self.ram.block(number).name),
        )

    def _disconnect(self, reason: str) -> None:
        assert self.channel is not None
        assert self.placer is not None
        self.placer.forget()
        self.pager.tell("pause")
        if self.back is not None:
            self.back.close()
        self.channel.close()
        self.channel = self.back = None
        self._tell_phase()
        self._tell("paused", reason=reason, **self._numbers())

    def _resume_pager(self) -> None:
        assert self.channel is not None
        self.pager.tell("resume", descriptors=[self.channel.descriptor])

    def _finish(self) -> None:
        """All is here: the parent does what it has to with it, and says what to answer."""
        if (awaited := self._wait_for_guest()) is not None:
            raise self._waits_in_vain(awaited)
        if self.placer is not None:
            self.pager.tell("drain")
            self.pager.expect("drained")
        self.core.finished()
        self._tell_phase()
        descriptors = [] if self.ram is None else self.ram.descriptors
        described = {} if self.ram is None else self.ram.described()
        missing = 0 if self.ram is None else self.ram.pages.missing_count
        kept = self._kept_files()
        self._tell(
            "loaded",
            ram=described,
            missing=missing,
            kept=list(kept),
            section=self._ram_section(),
            descriptors=[*descriptors, *kept.values()],
            **self._numbers(),
        )
        for descriptor in kept.values():
            os.close(descriptor)
        said = self.parent.expect("finish", "late")
        if said.kind == "late":
            raise QmigrateError(LATE)
        self._shut(said.values["value"])

    def _kept_files(self) -> dict[str, int]:
        """What a saved stream needs besides RAM, each part as a file in memory."""
        kept = self.core.kept
        if kept is None:
            return {}
        devices = bytes(kept.devices)
        if self.package is not None:
            package = Package(self.package.data, self.package.offset, self.package.footers)
            devices += devices_of(package)
        parts: dict[str, bytes | bytearray] = {
            "opening": kept.opening,
            "live": kept.live,
            "devices": devices,
            "closing": kept.closing,
        }
        return {name: _in_memory(name, part) for name, part in parts.items()}

    def _ram_section(self) -> dict[str, Any]:
        kept = self.core.kept
        if kept is None or kept.ram is None:
            return {}
        return {"id": kept.ram.section_id, "footers": kept.footers, "postcopy": self.placer is not None}

    def fail(self, message: str) -> None:
        """It can't go on: the source is told so, the parent why."""
        self._tell("failed", message=message, **self._numbers())
        self._shut(1)

    def _shut(self, value: int) -> None:
        self.core.send_shut(value)
        self._send()
        if self.channel is not None:
            self.channel.close()
        if self.back is not None:
            self.back.close()
        if self.multifd is not None:
            self.multifd.close()
        if self.placer is None:
            self.guest.tell("none")
            self.pager.tell("none")
        else:
            self.pager.tell("stop")
        waited = asdict(Histogram() if self.placer is None else self.placer.waited)
        self._tell("shut", value=value, waited=waited)

    # -- what the parent is told

    def _numbers(self) -> dict[str, Any]:
        received = self.received_bytes + (0 if self.multifd is None else self.multifd.received_bytes)
        return {**asdict(self.counts), "received_bytes": received}

    def _tell(self, kind: str, **values: Any) -> None:
        self.parent.tell(kind, time_us=time.time_ns() // 1000, **values)

    def _tell_phase(self) -> None:
        if self.core.phase is not self._phase:
            self._phase = self.core.phase
            self._tell("phase", phase=self._phase.value)

    def _tell_progress(self) -> None:
        if time.monotonic() >= self._told + PROGRESS_S:
            self._told = time.monotonic()
            waited = {} if self.placer is None else {"waited": asdict(self.placer.waited)}
            self._tell("progress", **self._numbers(), **waited)


def _is_readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def _in_memory(name: str, data: bytes | bytearray) -> int:
    """A file that other processes can be handed."""
    descriptor = os.memfd_create(f"qmigrate-{name}", os.MFD_CLOEXEC)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    return descriptor


def main(lifeline: int, parent: Link, guest: Link, pager: Link) -> None:
    end_with_parent(lifeline)
    parent.tell("ready")
    wishes = parent.expect("wishes").values
    listener = Listener(parent, guest, pager, keep=bool(wishes["keep"]), limits=Limits(**wishes["limits"]))
    try:
        listener.run()
    except QmigrateError as exc:
        listener.fail(str(exc))


if __name__ == "__main__":
    with suppress(LinkClosedError):
        main(int(sys.argv[1]), *(Link.inherited(int(number)) for number in sys.argv[2:5]))
