"""What holds no migration stream is said by its name, with what to do."""

import lzma
import re
import shlex
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from qmigrate.capture.migration import Migration
from qmigrate.capture.open import Source
from qmigrate.capture.saved import read_saved
from qmigrate.errors import NoStreamError
from qmigrate.format.command import PostcopyResume
from tests import streams

STREAM = streams.minimal()
CORPUS = Path(__file__).parents[1] / "corpus"


def saved_by_libvirt(*, magic: bytes = b"LibvirtQemudSave", order: str = "<", packed: int = 0) -> bytes:
    """Its header, XML with room to be edited, and QEMU's stream."""
    xml = b"<domain type='kvm'/>\0".ljust(66_000, b"\0")
    return magic + struct.pack(f"{order}5I", 2, len(xml), 1, packed, 0) + bytes(56) + xml + STREAM


FILES: dict[str, tuple[bytes, str]] = {
    "libvirt": (
        saved_by_libvirt(),
        "what libvirt saved: QEMU's stream begins at 0x1022c in it: tail -c +66093 FILE | ",
    ),
    "libvirt, unfinished, of another host": (
        saved_by_libvirt(magic=b"LibvirtQemudPart", order=">", packed=4),
        "what libvirt saved (not finished): QEMU's stream begins at 0x1022c in it: tail -c +66093 FILE | lzop -dc | ",
    ),
    "qcow2": (
        b"QFI\xfb\0\0\0\3" + bytes(600),
        "a qcow2 image; a snapshot in it is had by loading it: start QEMU with ",
    ),
    "pcap": (bytes.fromhex("d4c3b2a1 0200 0400") + bytes(90), "a packet capture; each connection in it must be a file"),
    "pcapng": (bytes.fromhex("0a0d0d0a 1c000000 4d3c2b1a") + bytes(90), "a packet capture; each connection in it"),
    "elf": (b"\x7fELF\2\1\1" + bytes(90), "an ELF file; a dump of memory holds no device state"),
    "lz4": (bytes.fromhex("04224d18 6440a7 00"), "compressed with lz4: lz4 -dc FILE | qmigrate dissect -"),
    "return path": (
        lzma.decompress((CORPUS / "pc-postcopy-10.0.back.xz").read_bytes()),
        "a return path (it begins with PONG, of the length that it has): give it by --return-path",
    ),
    "preempt": (
        streams.page(0, block="pc.ram"),
        "a preempt channel (it begins with a page of pc.ram, and no section is open): give it by --channel",
    ),
    "resumed": (streams.command(PostcopyResume()), "main, resumed after a pause (it begins with POSTCOPY_RESUME"),
    "TLS": (bytes.fromhex("16030101 00010000"), "a TLS connection (it begins with a TLS handshake"),
    "stream behind something": (bytes(4096) + STREAM, "one begins at 0x1000 in it: tail -c +4097 FILE | qmigrate"),
}


@pytest.mark.parametrize(("data", "said"), FILES.values(), ids=FILES)
def test_what_a_file_is_that_holds_no_stream_is_said(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with Migration(path) as migration:
        for read in (lambda: migration.contents, lambda: read_saved(migration)):
            with pytest.raises(NoStreamError) as caught:
                read()
            assert str(caught.value).startswith(f"no migration stream, but {said}")


@pytest.mark.parametrize(("data", "said"), FILES.values(), ids=FILES)
def test_of_a_pipe_too(data: bytes, said: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "qmigrate", "check", "-"], input=data, capture_output=True, timeout=60, check=False
    )
    assert ended.stderr.decode().startswith(f"qmigrate: standard input: no migration stream, but {said}")
    assert ended.returncode == 2


@pytest.mark.parametrize("kind", ["libvirt", "stream behind something"])
def test_what_it_says_to_do_gives_the_stream(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(FILES[kind][0])
    with Source(path) as source, pytest.raises(NoStreamError) as caught:
        list(source.entries())
    (command,) = re.findall(r"tail -c \+\d+ FILE", str(caught.value))
    ended = subprocess.run(
        [word.replace("FILE", str(path)) for word in shlex.split(command)], capture_output=True, timeout=60, check=True
    )
    assert ended.stdout == STREAM


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (bytes(100), "it begins with 00000000, expected 5145564d (QEVM)"),
        (b"#!/bin/sh\n", "it begins with 23212f62, expected 5145564d (QEVM)"),
        (b"LibvirtQemudSave", "it begins with 4c696276, expected 5145564d (QEVM)"),  # and ends before its fields
        (b"Q", "1 byte is there, its header has 8"),
    ],
)
def test_what_nothing_is_known_of_is_said_as_it_is(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(data)
    with Source(path) as source, pytest.raises(NoStreamError) as caught:
        list(source.entries())
    assert str(caught.value) == f"no migration stream: {said}"
