"""FULL sections before RAM: where each ends, which its footer alone says."""

from qmigrate.format.command import Ping
from qmigrate.format.entry import Undecoded
from qmigrate.format.stream import SectionType
from tests import streams
from tests.format.walked import HEAD, fault, of, same, walked
from tests.streams import command, device


def test_an_early_section_before_ram_ends_at_its_footer() -> None:
    early = device("virtio-mem-early", b"\1\2\x7e\0\0\0\x09\3", section_id=9)
    ram = streams.ram_start()
    for data in (
        HEAD + early + ram + streams.eof(),
        HEAD + early + device("another", b"", section_id=10) + ram + streams.eof(),
        HEAD + early + command(Ping(token=1)) + ram + streams.eof(),
        HEAD + ram + early + streams.ram_part() + streams.ram_end() + streams.devices() + streams.eof(),
    ):
        assert b"\1\2\x7e\0\0\0\x09\3" in [record.data for record in of(walked(data), Undecoded)]
        assert same(walked(data, 1)) == same(walked(data))


def test_an_early_section_whose_footer_never_comes_is_cut() -> None:
    data = HEAD + streams.section(SectionType.FULL, "early", section_id=9) + bytes(1000)
    assert fault(data) == f"{len(data):#x}: early: the stream ends here, in a section whose footer has not come"
