"""Which of the installed QEMUs a test is run with."""

import pytest

from tests.live import versions

__all__ = ["every_qemu", "oldest_and_newest", "only_newest"]

_ALL = versions.installed()

every_qemu = pytest.mark.parametrize("qemu", _ALL, ids=lambda qemu: qemu.name)
oldest_and_newest = pytest.mark.parametrize("qemu", [*_ALL[:1], *_ALL[1:][-1:]], ids=lambda qemu: qemu.name)
"""For what does not differ from version to version; the rest is in the soak."""
only_newest = pytest.mark.parametrize("qemu", _ALL[-1:], ids=lambda qemu: qemu.name)
