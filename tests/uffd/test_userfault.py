"""userfaultfd as the kernel gives it."""

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Iterator

import pytest

from qmigrate.uffd import userfault
from qmigrate.uffd.memory import BlockMemory, address_of, discard, touch
from qmigrate.uffd.pager import FaultQueue, Missing, Range
from qmigrate.uffd.userfault import Placed, UserfaultError, Userfaultfd
from tests.uffd.kernel import needs_userfaultfd

pytestmark = needs_userfaultfd

PAGE = mmap.PAGESIZE
TIMEOUT_S = 60.0


@pytest.fixture
def memory() -> Iterator[BlockMemory]:
    block = BlockMemory.create("pc.ram", 4 * PAGE, PAGE)
    yield block
    block.close()


@pytest.fixture
def faults(memory: BlockMemory) -> Iterator[Userfaultfd]:
    with Userfaultfd.open() as opened:
        opened.register(memory.address, memory.mapped_length)
        yield opened


@pytest.fixture
def page() -> mmap.mmap:
    """A page of the byte 7."""
    page = mmap.mmap(-1, PAGE)
    page[:] = b"\x07" * PAGE
    return page


class Reader(threading.Thread):
    """Reads one byte, and sleeps until it is there."""

    def __init__(self, address: int) -> None:
        super().__init__(daemon=True)
        self.address = address
        self.scratch = ctypes.create_string_buffer(1)
        self.start()

    def run(self) -> None:
        touch(self.address, ctypes.addressof(self.scratch), 1)

    def read(self) -> bytes:
        self.join(TIMEOUT_S)
        assert not self.is_alive()
        return self.scratch.raw


def next_missing(queue: FaultQueue) -> Missing:
    import select

    poll = select.poll()
    poll.register(queue, select.POLLIN)
    assert poll.poll(TIMEOUT_S * 1000), "nobody faults"
    (missing,) = queue.missing()
    return missing


def test_a_thread_that_reads_a_missing_page_gets_what_is_copied_there(
    memory: BlockMemory, faults: Userfaultfd, page: mmap.mmap
) -> None:
    queue = FaultQueue(faults, [Range(memory.address, memory.mapped_length, PAGE)])
    reader = Reader(memory.address + 2 * PAGE + 5)
    assert next_missing(queue) == Missing(0, 2 * PAGE, False)
    assert faults.copy(memory.address + 2 * PAGE, address_of(page), PAGE) == (Placed.DONE, PAGE)
    assert reader.read() == b"\x07"


def test_a_page_that_is_there_is_left_as_it_is(memory: BlockMemory, faults: Userfaultfd, page: mmap.mmap) -> None:
    assert faults.zero(memory.address, PAGE) == (Placed.DONE, PAGE)
    assert faults.copy(memory.address, address_of(page), PAGE) == (Placed.ALREADY, 0)
    assert Reader(memory.address).read() == b"\0"


def test_a_copy_stops_at_the_page_that_is_there_and_says_how_far_it_came(
    memory: BlockMemory, faults: Userfaultfd
) -> None:
    pages = mmap.mmap(-1, 3 * PAGE)
    faults.zero(memory.address + 2 * PAGE, PAGE)
    assert faults.copy(memory.address, address_of(pages), 3 * PAGE) == (Placed.LATER, 2 * PAGE)


def test_a_discarded_page_faults_again(memory: BlockMemory, faults: Userfaultfd, page: mmap.mmap) -> None:
    faults.zero(memory.address, memory.mapped_length)
    discard(memory.descriptor, PAGE, 2 * PAGE)
    assert faults.copy(memory.address + PAGE, address_of(page), PAGE) == (Placed.DONE, PAGE)
    assert faults.copy(memory.address + 3 * PAGE, address_of(page), PAGE) == (Placed.ALREADY, 0)
    assert Reader(memory.address + PAGE).read() == b"\x07"


def test_a_sleeper_whose_page_came_by_another_mapping_is_woken(memory: BlockMemory, faults: Userfaultfd) -> None:
    queue = FaultQueue(faults, [Range(memory.address, memory.mapped_length, PAGE)])
    reader = Reader(memory.address)
    assert next_missing(queue) == Missing(0, 0, False)
    os.pwrite(memory.descriptor, b"\x09", 0)
    faults.wake(memory.address, PAGE)
    assert reader.read() == b"\x09"


def test_unregistering_wakes_who_sleeps(memory: BlockMemory, faults: Userfaultfd) -> None:
    queue = FaultQueue(faults, [Range(memory.address, memory.mapped_length, PAGE)])
    reader = Reader(memory.address)
    next_missing(queue)
    faults.unregister(memory.address, memory.mapped_length)
    assert reader.read() == b"\0"


def test_a_write_is_told_from_a_read(memory: BlockMemory, faults: Userfaultfd) -> None:
    queue = FaultQueue(faults, [Range(memory.address, memory.mapped_length, PAGE)])
    scratch = ctypes.create_string_buffer(b"\x05", 1)
    writer = threading.Thread(
        target=touch, args=(memory.address, ctypes.addressof(scratch), 1), kwargs={"write": True}, daemon=True
    )
    writer.start()
    assert next_missing(queue) == Missing(0, 0, True)
    faults.zero(memory.address, PAGE)
    writer.join(TIMEOUT_S)
    assert os.pread(memory.descriptor, 1, 0) == b"\x05"


def test_where_the_kernel_refuses_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> int:
        raise PermissionError(1, "Operation not permitted")

    for way in ("_by_device", "_by_call", "_by_user_mode_call"):
        monkeypatch.setattr(userfault, way, refused)
    with pytest.raises(UserfaultError) as caught:
        Userfaultfd.open()
    for word in ("/dev/userfaultfd", "vm.unprivileged_userfaultfd", "CAP_SYS_PTRACE", "Operation not permitted"):
        assert word in str(caught.value)


@pytest.mark.parametrize("refusing", [[], ["_by_device"], ["_by_device", "_by_call"]])
def test_what_the_kernel_refuses_is_asked_for_in_another_way(
    monkeypatch: pytest.MonkeyPatch, refusing: list[str]
) -> None:
    asked: list[str] = []

    def watched(way: str, real: Callable[[], int]) -> Callable[[], int]:
        def open_it() -> int:
            asked.append(way)
            if way in refusing:
                raise PermissionError(1, "Operation not permitted")
            return real()

        return open_it

    ways = ["_by_device", "_by_call", "_by_user_mode_call"]
    for way in ways:
        monkeypatch.setattr(userfault, way, watched(way, getattr(userfault, way)))
    with Userfaultfd.open():
        assert asked == ways[: len(refusing) + 1]


def test_memory_that_no_host_has_is_refused() -> None:
    with pytest.raises(UserfaultError, match=r"pc\.ram: .* can't be had"):
        BlockMemory.create("pc.ram", 1 << 60, PAGE)


def test_huge_pages_that_are_not_free_are_asked_for() -> None:
    with pytest.raises(UserfaultError, match=r"huge pages of 2048 KiB are not free.*hugepages-2048kB/nr_hugepages"):
        BlockMemory.create("pc.ram", 1 << 46, 1 << 21)
