"""The guest's process: maps memory, makes it sensitive, loads the package, and touches.

S6, S7: the package is loaded here while the listener goes on reading, so that a page that is missing while a device
is loaded comes by the listener.  S9: LISTEN registers every block.  S10: RUN starts the touchers.

    python -m qmigrate.endpoint.destination_guest LIFELINE PARENT LISTENER
"""

import mmap
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from qmigrate.endpoint.back import ReturnPath
from qmigrate.endpoint.link import Link, LinkClosedError, Said, end_with_parent
from qmigrate.endpoint.ram import GuestRam
from qmigrate.errors import QmigrateError
from qmigrate.format.command import Ping
from qmigrate.format.return_path import Pong, encode_message
from qmigrate.protocol.destination_events import SectionBegan
from qmigrate.protocol.package import Package, package_events
from qmigrate.protocol.page_map import PageState
from qmigrate.protocol.phases import Phase
from qmigrate.uffd.memory import address_of, touch
from qmigrate.uffd.toucher import Histogram, Place, Toucher, Workload
from qmigrate.uffd.userfault import Userfaultfd


class Guest:
    """What stands for the guest.  ``wishes``: the workloads, how many touches, whether to touch in the package."""

    def __init__(self, parent: Link, listener: Link, wishes: dict[str, Any]) -> None:
        self.parent = parent
        self.listener = listener
        self.workloads = [Workload(**each) for each in wishes["workloads"]]
        self.traces: list[list[tuple[str, int, bool]]] = wishes["traces"]
        self.trace_rate: float | None = wishes["trace_rate"]
        self.touches_in_package = bool(wishes["touch_in_package"])
        self.touchers: list[Toucher] = []
        self.ram: GuestRam | None = None
        self.faults: Userfaultfd | None = None
        self.in_package = Histogram()
        self._loader: threading.Thread | None = None
        self._is_over = False

    def start_loading(self, said: Said) -> None:
        """In a thread of its own: it may wait for a page that never comes, and has to be told when all is over."""
        self._loader = threading.Thread(target=self._load, args=(said,), name="loader", daemon=True)
        self._loader.start()

    def _load(self, said: Said) -> None:
        try:
            self.load(said)
        except QmigrateError as exc:
            if not self._is_over:
                self.listener.tell("failed", message=str(exc))
        except LinkClosedError:
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)  # as where the main thread has a fault: the parent sees that this process ended

    def load(self, said: Said) -> None:
        """Load the package that the listener hands over."""
        path, lock, package, *descriptors = said.descriptors
        self.ram = ram = GuestRam.received(said.values["ram"], descriptors)
        data = os.pread(package, os.fstat(package).st_size, 0)
        missing = self._missing_places(ram)
        with ReturnPath(path, lock) as back:
            for descriptor in (path, lock, package):
                os.close(descriptor)
            phase = Phase(said.values["phase"])
            for event in package_events(Package(data, said.values["offset"], said.values["footers"]), phase):
                match event:
                    case Ping(token=token):
                        back.send(encode_message(Pong(token=token)))
                    case Phase.LISTENING:
                        self._listen(ram)
                    case Phase.RUNNING if not self._is_over:
                        self._start()
                        self.listener.tell("running")
                    case SectionBegan() if self.touches_in_package and self.faults is not None:
                        self._touch(next(missing, None))

    def _missing_places(self, ram: GuestRam) -> Iterator[Place]:
        """What the source sends last comes first: else it might just be coming."""
        for number, block in reversed([*enumerate(ram.pages.blocks)]):
            for start in reversed(range(0, block.length, block.page_size)):
                if ram.pages.state(number, start) is PageState.MISSING:
                    yield Place(number, start)

    def _touch(self, place: Place | None) -> None:
        """As a device does that reads guest memory while it is loaded."""
        import time

        if place is None or self.ram is None:
            return
        scratch = mmap.mmap(-1, mmap.PAGESIZE)
        began = time.perf_counter_ns()
        touch(self.ram.memory[place.block].address + place.start, address_of(scratch), 8)
        if self._is_over:  # it did not come: everything was given up
            return
        self.in_package.add(time.perf_counter_ns() - began)

    def _listen(self, ram: GuestRam) -> None:
        self.faults = Userfaultfd.open()
        for block in ram.memory:
            self.faults.register(block.address, block.mapped_length)
        addresses = [block.address for block in ram.memory]
        self.listener.tell("listening", addresses=addresses, descriptors=[self.faults.fileno()])

    def _start(self) -> None:
        ram = self.ram
        assert ram is not None
        addresses = [block.address for block in ram.memory]
        sizes = [(block.length, block.page_size) for block in ram.pages.blocks]

        def is_missing(place: Place) -> bool:
            return not ram.pages.is_received(place.block, place.start)

        self.touchers = [
            Toucher(workload, addresses, sizes, is_missing, name=f"toucher {number}")
            for number, workload in enumerate([*self.workloads, *self._traced(ram)])
        ]
        for toucher in self.touchers:
            toucher.start()

    def _traced(self, ram: GuestRam) -> Iterator[Workload]:
        """By this guest's blocks; what it has not is left out, and told."""
        lengths = {block.name: (number, block.length) for number, block in enumerate(ram.pages.blocks)}
        for trace in self.traces:
            places = tuple(
                Place(lengths[name][0], start - start % mmap.PAGESIZE, is_write)
                for name, start, is_write in trace
                if name in lengths and start < lengths[name][1]
            )
            if len(places) < len(trace):
                message = (
                    f"{len(trace) - len(places)} of {len(trace)} touches of the trace: this guest has no such pages"
                )
                self.parent.tell("trouble", message=message)
            if places:
                yield Workload(pattern="trace", trace=places, rate=self.trace_rate)

    def stop(self) -> None:
        """The end: nothing is sensitive any more, sleepers wake; tell what was measured."""
        self._is_over = True
        for toucher in self.touchers:
            toucher.stop()
        if self.faults is not None and self.ram is not None:
            for block in self.ram.memory:
                self.faults.unregister(block.address, block.mapped_length)
        if self._loader is not None:
            self._loader.join()
            for toucher in self.touchers:  # it may just have started them
                toucher.stop()
        for toucher in self.touchers:
            toucher.join()
        self.tell("touched")

    def tell(self, kind: str) -> None:
        """What was measured so far."""
        total = Histogram()
        for toucher in self.touchers:
            total.join(toucher.histogram)
        self.parent.tell(
            kind,
            touches=sum(toucher.touches for toucher in self.touchers),
            writes=sum(toucher.writes for toucher in self.touchers),
            latency=asdict(total),
            in_package=asdict(self.in_package),
        )


def main(lifeline: int, parent: Link, listener: Link) -> None:
    end_with_parent(lifeline)
    parent.tell("ready")
    guest = Guest(parent, listener, parent.expect("wishes").values)
    said = listener.expect("package", "none")
    if said.kind == "package":
        guest.start_loading(said)
    while parent.expect("how", "stop").kind == "how":
        guest.tell("touching")
    guest.stop()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), Link.inherited(int(sys.argv[2])), Link.inherited(int(sys.argv[3])))
    except LinkClosedError:
        os._exit(0)  # the others have gone; a toucher may sleep for ever
    os._exit(0)
