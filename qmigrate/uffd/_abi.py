"""The kernel's numbers, line by line as ``linux/userfaultfd.h`` has them, under its names.

Facts of the interface only; what they are good for is in ``userfault.py``.
"""

import platform
import struct
from typing import Final

__all__: list[str] = []

# Flags of the system call, and of USERFAULTFD_IOC_NEW.
UFFD_USER_MODE_ONLY: Final = 1  # since 5.11
USERFAULTFD_IOC_NEW: Final = 0xAA00  # on /dev/userfaultfd, since 6.1

# The system call's number.  asm/unistd.h
SYS_USERFAULTFD: Final = {"x86_64": 323, "ppc64": 364, "ppc64le": 364, "s390x": 355}.get(platform.machine(), 282)

UFFD_API: Final = 0xAA

# Features.
UFFD_FEATURE_MISSING_HUGETLBFS: Final = 1 << 4  # since 4.11
UFFD_FEATURE_MISSING_SHMEM: Final = 1 << 5  # since 4.11

# The ioctls: direction, size of the structure, 0xAA, number.
UFFDIO_API: Final = 0xC018AA3F
UFFDIO_REGISTER: Final = 0xC020AA00
UFFDIO_UNREGISTER: Final = 0x8010AA01
UFFDIO_WAKE: Final = 0x8010AA02
UFFDIO_COPY: Final = 0xC028AA03
UFFDIO_ZEROPAGE: Final = 0xC020AA04

# What can be done with a range, as UFFDIO_REGISTER answers.
COPY_BIT: Final = 1 << 3
ZEROPAGE_BIT: Final = 1 << 4

UFFDIO_REGISTER_MODE_MISSING: Final = 1 << 0

# struct uffdio_api: api, features, ioctls.
API: Final = struct.Struct("=QQQ")
# struct uffdio_range: start, len.
RANGE: Final = struct.Struct("=QQ")
# struct uffdio_register: range, mode, ioctls.
REGISTER: Final = struct.Struct("=QQQQ")
# struct uffdio_copy: dst, src, len, mode, copy (bytes copied, or a negative errno).
COPY: Final = struct.Struct("=QQQQq")
# struct uffdio_zeropage: range, mode, zeropage (as copy above).
ZEROPAGE: Final = struct.Struct("=QQQq")

# struct uffd_msg: event, reserved, reserved, reserved; of a page fault: flags, address, thread.
MESSAGE: Final = struct.Struct("=BBHIQQII")
# The same where only the event and the address count.
MESSAGE_ADDRESS: Final = struct.Struct("=B15xQ8x")
UFFD_EVENT_PAGEFAULT: Final = 0x12
UFFD_PAGEFAULT_FLAG_WRITE: Final = 1 << 0
