"""The multifd channels of a migration that comes in: pages beside those of the main channel, before LISTEN.

Only SYNC orders pages between channels.  A channel is read up to its SYNC, and from there on once main has come to
the same point; main waits there until every channel has.  All of them are read while main is, for a source whose
channels are full sends nothing on main either.

After LISTEN no page comes this way, but the SYNCs of 5.2 do.

migration/multifd.c: multifd_recv_sync_main(), multifd_recv_thread()
"""

import os
import select
from collections.abc import Sequence
from typing import Final

from qmigrate.endpoint.ram import Counts, GuestRam, write_zeros
from qmigrate.errors import StreamError, UnsupportedError
from qmigrate.format.feed import Feed
from qmigrate.format.multifd import DeviceStatePacket, PagePacket
from qmigrate.format.multifd_channel import WINDOW, ChannelEntry, read_channel
from qmigrate.format.multifd_pages import PageDecoder
from qmigrate.format.ram import RamFlag

__all__ = ["MultifdChannels"]

_PAGE: Final = int(RamFlag.PAGE)


class _Channel:
    """One connection.  ``epoch`` counts its SYNCs so far."""

    def __init__(self, descriptor: int, ram: GuestRam) -> None:
        self.descriptor = descriptor
        self.epoch = 0
        self.decoder = PageDecoder()
        self.name = "multifd"
        self.feed = Feed(window=WINDOW)
        lengths = {block.name: block.length for block in ram.pages.blocks}
        self.steps = read_channel(self.feed, page_size=ram.target_page, blocks=lengths)

    def fill(self) -> int:
        """Take in what has come; how many bytes.  Waits where nothing has."""
        try:
            count = os.readv(self.descriptor, [self.feed.space()])
        except OSError:
            count = 0
        self.feed.received(count)
        if not count:
            self.feed.end()
        return count


class MultifdChannels:
    """All of them; the descriptors are ours.  Raises ``StreamError`` out of what reads."""

    def __init__(self, descriptors: Sequence[int], ram: GuestRam, counts: Counts) -> None:
        self._ram = ram
        self._counts = counts
        self._epoch = 0  # of main: how many sync points it has passed
        self._channels = [_Channel(descriptor, ram) for descriptor in descriptors]
        self.postcopy = False
        """LISTEN was obeyed: no page may come, and nobody waits for a SYNC."""
        self.received_bytes = 0

    def __bool__(self) -> bool:
        return bool(self._channels)

    def descriptors(self) -> list[int]:
        """Of those that may be read now: they are not ahead of main."""
        return [channel.descriptor for channel in self._channels if self._may_go_on(channel)]

    def read(self, descriptor: int) -> None:
        """What this one has; does not wait where the descriptor is readable."""
        (channel,) = [channel for channel in self._channels if channel.descriptor == descriptor]
        self.received_bytes += channel.fill()
        self._load(channel)

    def sync(self) -> None:
        """Main has come to a sync point: wait until every channel has."""
        if self.postcopy:
            return
        while behind := [channel for channel in self._channels if channel.epoch <= self._epoch]:
            poll = select.poll()
            for channel in behind:
                if channel.feed.ended:
                    raise StreamError(
                        "the channel ended before a SYNC that the main channel waits for",
                        offset=channel.feed.offset,
                        trail=(channel.name,),
                    )
                poll.register(channel.descriptor, select.POLLIN)
            for descriptor, _ in poll.poll():
                self.read(descriptor)
        self._epoch += 1
        for channel in self._channels:  # what has been read of the next epoch
            self._load(channel)

    def _may_go_on(self, channel: _Channel) -> bool:
        return not channel.feed.ended and (self.postcopy or channel.epoch <= self._epoch)

    def _load(self, channel: _Channel) -> None:
        """What is at hand, up to the SYNC at which main is not yet."""
        while self.postcopy or channel.epoch <= self._epoch:
            entry = next(channel.steps, None)
            if entry is None:
                return
            record = entry.record
            if isinstance(record, PagePacket):
                self._write(channel, entry, record)
                channel.epoch += record.header.is_sync
            elif isinstance(record, DeviceStatePacket):
                raise UnsupportedError(
                    f"device state of {record.header.idstr}, which receive does not take",
                    offset=entry.offset,
                    trail=(channel.name,),
                )
            else:
                channel.name = f"multifd {record.channel_id}"

    def _write(self, channel: _Channel, entry: ChannelEntry, packet: PagePacket) -> None:
        """Through our own mapping, as ``write_pages`` does: a run's contents stand in one piece."""
        header, page_size = packet.header, packet.page_size
        if not header.normal_pages + header.zero_pages:
            return
        if self.postcopy:
            raise StreamError("pages after LISTEN", offset=entry.offset, trail=(channel.name,))
        contents = memoryview(channel.decoder.contents(entry))
        number = self._ram.number(header.block)
        mapping = self._ram.memory[number].mapping
        for at, flag, start, count in packet.runs:
            length = count * page_size
            if flag == _PAGE:
                mapping[start : start + length] = contents[at : at + length]
            else:
                write_zeros(self._ram, number, start, length, 0)
            self._ram.pages.receive(number, start, length)
        self._counts.normal += header.normal_pages
        self._counts.zero += header.zero_pages

    def close(self) -> None:
        """Let them go: the source has said all, or is told no more."""
        for channel in self._channels:
            os.close(channel.descriptor)
        self._channels = []
