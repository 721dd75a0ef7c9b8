"""Sizes on the command line."""

import argparse

import pytest

from qmigrate.cli.sizes import page_size, size


@pytest.mark.parametrize(
    ("argument", "length"),
    [("4096", 4096), ("64K", 1 << 16), ("64M", 64 << 20), ("1g", 1 << 30), ("2T", 2 << 40), ("1GiB", 1 << 30)],
)
def test_a_size_has_binary_units(argument: str, length: int) -> None:
    assert size(argument) == length


def test_a_size_may_be_in_hex() -> None:
    assert size("0x10K") == 0x10 << 10


@pytest.mark.parametrize("argument", ["", "K", "-1", "1.5G", "5Q", "1 2", "9" * 40, "0x", "16E", "٣"])
def test_what_is_no_size_is_refused(argument: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        size(argument)


@pytest.mark.parametrize("argument", ["0", "128", "4097", "128K"])
def test_what_is_no_page_size_is_refused(argument: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        page_size(argument)
