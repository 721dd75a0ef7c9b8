"""What the pager asks for."""

from hypothesis import given
from hypothesis import strategies as st

from qmigrate.endpoint.destination_pager import request_pages
from qmigrate.format.return_path import RequestPages, encode_message


@given(st.integers(0, (1 << 64) - 1), st.integers(0, (1 << 32) - 1))
def test_a_request_packed_fast_is_what_its_declaration_builds(start: int, length: int) -> None:
    assert request_pages(start, length) == encode_message(RequestPages(start=start, length=length))
