"""What is printed of names that somebody else chose."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmigrate.report.names import clean

NAMES = st.one_of(
    st.text(st.characters(codec=None, categories=None)),
    st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape")),
)


@pytest.mark.parametrize(
    "name",
    ["pc.ram", "0000:00:02.0/virtio-net", "/rom@etc/acpi/tables", "[bold]x[/bold]", "../up", "Größe", "日本", "a\\b"],
)
def test_a_name_that_can_be_printed_stays_as_it_is(name: str) -> None:
    assert clean(name) == name


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("two\nlines\r", r"two\x0alines\x0d"),
        ("nul\0", r"nul\x00"),
        ("del\x7f", r"del\x7f"),
        ("c1\x9b31m", r"c1\xc2\x9b31m"),
        (b"latin-\xe9".decode("utf-8", "surrogateescape"), r"latin-\xe9"),
        ("turned\u202e", r"turned\xe2\x80\xae"),
        ("lone\ud800", r"lone\xed\xa0\x80"),
    ],
)
def test_what_cannot_be_printed_is_its_bytes(name: str, printed: str) -> None:
    assert clean(name) == printed


@given(NAMES)
def test_a_cleaned_name_can_be_printed_and_encoded(name: str) -> None:
    cleaned = clean(name)
    assert cleaned.isprintable()
    cleaned.encode("utf-8")


@given(NAMES)
def test_cleaning_twice_changes_nothing_more(name: str) -> None:
    assert clean(clean(name)) == clean(name)
