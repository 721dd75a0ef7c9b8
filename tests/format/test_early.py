"""FULL sections before RAM: where each ends, which its footer alone says."""

import pytest

from qmigrate.format.candidates import plausible_header
from qmigrate.format.command import Ping
from qmigrate.format.entry import DeviceState, Undecoded
from qmigrate.format.stream import SectionHeader, SectionType
from tests import streams
from tests.format.walked import HEAD, fault, names, of, same, walked
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


def test_each_of_many_early_sections_is_looked_at_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was once for each of those before it: 40 KB took 12 s."""
    looks = 0

    def looked(data: bytes | memoryview, at: int = 0) -> SectionHeader | None:
        nonlocal looks
        looks += 1
        return plausible_header(data, at)

    monkeypatch.setattr("qmigrate.format.early.plausible_header", looked)
    early = b"".join(device("early", b"", section_id=100 + number) for number in range(250))
    data = HEAD + streams.ram_start() + (early + streams.ram_part()) * 4 + streams.ram_end()
    found = walked(data + streams.devices() + streams.eof())
    assert names(found).count("early") == 4 * 250
    assert looks <= 4 * 4 * 250


def test_of_full_sections_those_before_a_part_of_ram_are_early_and_the_others_are_devices() -> None:
    early = b"".join(device("early", b"", section_id=100 + number) for number in range(3))
    data = HEAD + streams.ram_start() + early + streams.ram_part() + streams.devices() + streams.eof()
    found = walked(data + streams.devices_described())
    assert names(found) == ["ram", *["early"] * 3, "timer", "0000:00:04.0/serial"]
    assert len(of(found, DeviceState)) == 2
    assert len(of(found, Undecoded)) == 3
