"""What tests of the kernel's part need: userfaultfd, or a reason."""

import os

import pytest

from qmigrate.uffd.userfault import UserfaultError, Userfaultfd


def _refusal() -> str:
    try:
        with Userfaultfd.open():
            return ""
    except UserfaultError as exc:
        return str(exc)


REFUSAL = _refusal()

# In CI it must be there.
needs_userfaultfd = pytest.mark.skipif(bool(REFUSAL) and os.environ.get("CI") != "true", reason=REFUSAL)
