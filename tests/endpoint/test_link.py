"""Messages between the processes of one destination."""

import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qmigrate.endpoint.link import Link, NoDescriptorError


@contextmanager
def one_free_descriptor() -> Iterator[None]:
    """In this process."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    first, second = os.dup(0), os.dup(0)  # the lowest that are free
    os.close(first)
    os.close(second)
    resource.setrlimit(resource.RLIMIT_NOFILE, (second, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_descriptors_that_can_t_be_taken_are_an_error_and_no_wait() -> None:
    one, two = socket.socketpair()
    with one, two:
        Link(one).tell("these", descriptors=[0, 1, 2])
        before = set(Path("/proc/self/fd").iterdir())
        with one_free_descriptor(), pytest.raises(NoDescriptorError):
            Link(two).hear()
        assert set(Path("/proc/self/fd").iterdir()) == before
