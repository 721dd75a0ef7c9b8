"""What is kept of a stream that is to be saved."""

from qmigrate.protocol.destination import Destination
from tests import streams
from tests.protocol.said import said_by


def test_what_is_kept_is_all_but_ram_and_commands() -> None:
    core = Destination(keep=True)
    list(said_by(core, [streams.minimal()]))
    kept = core.kept
    assert kept is not None
    assert kept.opening == streams.header() + streams.configuration()
    assert (bytes(kept.live), bytes(kept.devices)) == (b"", streams.devices())
    assert kept.closing == streams.eof() + streams.devices_described()
    assert (kept.footers, kept.ram and kept.ram.section_id) == (True, streams.RAM_ID)
