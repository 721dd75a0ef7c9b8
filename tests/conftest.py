"""What all tests share: Hypothesis finds the same examples in every run; what they cache is not the user's."""

import os
import tempfile
from pathlib import Path

import hypothesis
import pytest

from qmigrate.capture.cache import cache_folder

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("ci")

OWN = ("indexes", "schemas")


def pytest_configure(config: pytest.Config) -> None:
    """A cache of our own, in which the QEMUs are those that are installed."""
    users = cache_folder("qemu").parent
    folder = tempfile.TemporaryDirectory(prefix="qmigrate-cache-")
    for each in users.iterdir() if users.is_dir() else ():
        if each.name not in OWN:
            (Path(folder.name) / each.name).symlink_to(each)
    os.environ["QMIGRATE_CACHE"] = folder.name
    config.add_cleanup(folder.cleanup)
