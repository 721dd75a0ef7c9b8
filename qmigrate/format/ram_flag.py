"""The flags of RAM's records, by themselves: who looks at nothing else need not import the declarations."""

from enum import IntFlag

__all__ = ["RamFlag"]


class RamFlag(IntFlag):
    """In the low bits of each record's first word.  migration/ram.h: RAM_SAVE_FLAG_*"""

    FULL = 0x001  # obsolete since 2009, never sent
    ZERO = 0x002
    MEM_SIZE = 0x004
    PAGE = 0x008
    EOS = 0x010
    CONTINUE = 0x020
    XBZRLE = 0x040
    HOOK = 0x080  # RDMA
    # 0x100 was RAM_SAVE_FLAG_COMPRESS_PAGE until QEMU 9.1; an older source may still send it.
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200  # since 8.1
