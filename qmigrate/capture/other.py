"""What a file is that holds no migration stream, told from its first bytes, and what can be done with it."""

from typing import Final, Literal

from qmigrate.errors import NoStreamError
from qmigrate.format.channel import Channel, ChannelKind, classify
from qmigrate.format.feed import Feed

__all__ = ["no_stream"]

_STREAM_HEAD: Final = b"QEVM\0\0\0\3"
_SNAPSHOT: Final = (
    "a qcow2 image; a snapshot in it is had by loading it: start QEMU with -S and -loadvm NAME, and migrate to a file"
)
_CAPTURE: Final = (
    "a packet capture; each connection in it must be a file of its own (tcpflow, tshark), one direction only: main as "
    "FILE, others by --channel; or record with `qmigrate tap`"
)
_MAGICS: Final = (
    (b"QFI\xfb", _SNAPSHOT),
    (b"\xd4\xc3\xb2\xa1", _CAPTURE),
    (b"\xa1\xb2\xc3\xd4", _CAPTURE),
    (b"\x4d\x3c\xb2\xa1", _CAPTURE),
    (b"\xa1\xb2\x3c\x4d", _CAPTURE),
    (b"\x0a\x0d\x0d\x0a", _CAPTURE),
    (b"\x7fELF", "an ELF file; a dump of memory holds no device state: migrate to a file instead"),
    (b"KDUMP   ", "a dump of memory (kdump), which holds no device state: migrate to a file instead"),
    (b"\x04\x22\x4d\x18", "compressed with lz4: lz4 -dc FILE | qmigrate dissect -"),
    (b"\x89LZO\0\r\n\x1a\n", "compressed with lzop: lzop -dc FILE | qmigrate dissect -"),
    (b"LZIP", "compressed with lzip: lzip -dc FILE | qmigrate dissect -"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it first"),
    (b"PK\3\4", "a zip archive: unpack it first"),
)
_CHANNELS: Final = {
    ChannelKind.RETURN_PATH: "a return path ({reason}): give it by --return-path, and the main channel as FILE",
    ChannelKind.PREEMPT: "a preempt channel ({reason}): give it by --channel, and the main channel as FILE",
    ChannelKind.RESUMED: "main, resumed after a pause ({reason}): give it by --channel, and main's beginning as FILE",
    ChannelKind.TLS: "a TLS connection ({reason})",
}


def no_stream(feed: Feed) -> NoStreamError | None:
    """What to say of the input that begins with what is at hand in ``feed``; None where that tells nothing."""
    what = _what_it_is(bytes(feed.view()))
    return None if what is None else NoStreamError(f"no migration stream, but {what}")


def _what_it_is(head: bytes) -> str | None:
    if head.startswith((_LIBVIRT, _LIBVIRT_PART)) and len(head) >= _LIBVIRT_FIELDS.stop:
        return _libvirt(head)
    for magic, name in _MAGICS:
        if head.startswith(magic):
            return name
    channel = _channel(head)
    if channel.kind is not ChannelKind.UNKNOWN:
        words = _CHANNELS.get(channel.kind)
        return None if words is None else words.format(reason=channel.reason)
    at = head.find(_STREAM_HEAD)
    return f"one begins at {at:#x} in it: {_skipped(at)}" if at > 0 else None


def _skipped(count: int, unpacked: str = "") -> str:
    return f"tail -c +{count + 1} FILE | {unpacked}qmigrate dissect -"


# -- what `virsh save` writes.  libvirt: src/qemu/qemu_saveimage.h, struct _virQEMUSaveHeader

_LIBVIRT: Final = b"LibvirtQemudSave"
_LIBVIRT_PART: Final = b"LibvirtQemudPart"
_LIBVIRT_FIELDS: Final = slice(16, 32)  # version, data_len, was_running, format; in the byte order of its host
_LIBVIRT_HEADER: Final = 92
_LATEST_VERSION: Final = 2
_LZOP: Final = 4


def _libvirt(head: bytes) -> str:
    fields = head[_LIBVIRT_FIELDS]
    order: Literal["little", "big"] = "little" if int.from_bytes(fields[:4], "little") <= _LATEST_VERSION else "big"
    _, length, _, packed = (int.from_bytes(fields[at : at + 4], order) for at in range(0, len(fields), 4))
    unpacked = "lzop -dc | " if packed == _LZOP else ""
    unfinished = " (not finished)" if head.startswith(_LIBVIRT_PART) else ""
    begins = _LIBVIRT_HEADER + length
    return f"what libvirt saved{unfinished}: QEMU's stream begins at {begins:#x} in it: {_skipped(begins, unpacked)}"


def _channel(head: bytes) -> Channel:
    feed = Feed()
    feed.receive(head)
    feed.end()
    answer = classify(feed)
    try:
        while True:
            next(answer)
    except StopIteration as end:
        channel: Channel = end.value
        return channel
