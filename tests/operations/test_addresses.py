"""Where a destination listens, and where a source is to connect to."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from qmigrate.errors import RefusedError
from qmigrate.operations.addresses import check, reachable, uri_of, where_to_connect
from qmigrate.operations.recover import _is_there
from qmigrate.operations.watch import Watched


def inet(host: str, port: int) -> dict[str, Any]:
    return {"type": "inet", "host": host, "port": str(port)}


def listening(*addresses: dict[str, Any]) -> Watched:
    return cast(Watched, SimpleNamespace(info={"socket-address": list(addresses)} if addresses else {}))


@pytest.mark.parametrize(
    ("uri", "addresses", "connects"),
    [
        ("tcp:10.0.0.2:4444", [inet("10.0.0.2", 4444)], "tcp:10.0.0.2:4444"),
        ("tcp:10.0.0.2:0", [inet("10.0.0.2", 4711)], "tcp:10.0.0.2:4711"),
        ("tcp:[fe80::2]:0", [inet("fe80::2", 4711)], "tcp:[fe80::2]:4711"),
        # It is asked to listen at all addresses; the name is the user's, the port is its own.
        ("tcp:there.example:0", [inet("0.0.0.0", 4711)], "tcp:there.example:4711"),
        ("tcp:there.example:0", [inet("::", 1), inet("0.0.0.0", 4711)], "tcp:there.example:4711"),
        ("tcp:[fe80::2]:0", [inet("0.0.0.0", 1), inet("::", 4711)], "tcp:[fe80::2]:4711"),
        # The newest comes first, whatever there was before.
        ("tcp:there.example:0", [inet("10.0.0.2", 2), inet("10.0.0.2", 1)], "tcp:10.0.0.2:2"),
        ("unix:/run/there:0", [{"type": "unix", "path": "/run/there:0"}], "unix:/run/there:0"),
        ("tcp:there.example:0", [], "tcp:there.example:0"),
    ],
)
def test_a_port_that_was_any_is_the_one_that_the_destination_took(
    uri: str, addresses: list[dict[str, Any]], connects: str
) -> None:
    assert where_to_connect(uri, listening(*addresses)) == connects


def test_where_to_connect_is_never_guessed() -> None:
    for host in ("0.0.0.0", "::"):
        with pytest.raises(RefusedError, match="at any address of its host: say with --uri"):
            uri_of({"socket-address": [inet(host, 1)]})
        with pytest.raises(RefusedError, match="at any address of its host: say with --uri"):
            reachable(f"tcp:[{host}]:1")
    with pytest.raises(RefusedError, match="say with --uri"):
        uri_of({"socket-address": [{"type": "vsock", "cid": "3", "port": "1"}]})
    assert reachable("unix:/run/there") == "unix:/run/there"


def test_a_destination_that_listens_already_is_taken_only_where_it_was_asked_for() -> None:
    assert _is_there("tcp:there.example:1", "tcp:10.0.0.2:1")
    assert _is_there("tcp:there.example:0", "tcp:10.0.0.2:1")
    assert not _is_there("tcp:there.example:2", "tcp:10.0.0.2:1")
    assert not _is_there("unix:/a", "unix:/b")
    assert not _is_there("unix:/a:1", "tcp:10.0.0.2:1")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("tcp:there.example:65536", "the last port is 65535"),
        ("tcp:[::1]:99999,ipv6=on", "the last port is 65535"),
        (f"unix:/{'x' * 107}", "has 107 bytes at most"),
        (f"unix:/{'ß' * 54}", "has 107 bytes at most"),
    ],
)
def test_what_would_spoil_a_destination_is_refused_before_it_is_told(uri: str, message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        check(None, uri)


def test_all_else_is_for_qemu_to_judge() -> None:
    check(
        None, "", "tcp:0:65535", "tcp:host:4444,to=4450", "tcp:host:service", f"unix:/{'x' * 106}", "exec:cat", "2031:x"
    )
