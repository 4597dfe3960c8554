"""Foreign web pages and clients without a key are refused before anything is done."""

from __future__ import annotations

import pytest

from mlx_rgemma.errors import UserError
from mlx_rgemma.server.access import ANY_CLIENT, KEYS_VARIABLE, Access, api_keys, is_loopback
from mlx_rgemma.server.validation import BadRequest

LOCAL = Access(host="127.0.0.1", loopback=True)
OPEN = Access(host="0.0.0.0", loopback=False)


def status(check) -> int:
    try:
        check()
    except BadRequest as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", 200),
        ("127.0.0.1:8080", 200),
        ("localhost:8080", 200),
        ("LOCALHOST", 200),
        ("[::1]:8080", 200),
        ("::1", 403),
        ("evil.example", 403),
        ("evil.example:8080", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("evil.example@127.0.0.1", 403),
        ("127.0.0.1:80@evil.example", 403),
        ("localhost:x", 403),
        ("localhost evil.example", 403),
        ("192.168.1.5:8080", 403),
        ("", 403),
    ],
)
def test_the_host_header_must_name_this_machine(host, expected):
    assert status(lambda: LOCAL.check_host([host])) == expected
    assert status(lambda: OPEN.check_host([host])) == 200


def test_hosts_that_are_given_twice_missing_or_by_name():
    assert status(lambda: LOCAL.check_host(["localhost", "evil.example"])) == 403
    assert status(lambda: LOCAL.check_host([])) == 200  # no browser leaves it out
    named = Access(host="My.Machine", loopback=True)
    assert status(lambda: named.check_host(["my.machine:8080"])) == 200


@pytest.mark.parametrize(
    ("origin", "host", "local", "remote"),
    [
        ("http://localhost:3000", "localhost:8080", 200, 200),
        ("https://127.0.0.1", "localhost:8080", 200, 200),
        ("http://[::1]:3000", "localhost:8080", 200, 200),
        ("https://evil.example", "127.0.0.1:8080", 403, 403),
        ("http://evil.example:8080", "evil.example:8080", 403, 403),  # DNS rebinding
        ("http://192.168.1.5:8080", "192.168.1.5:8080", 200, 200),  # refused by its Host if local
        ("http://192.168.1.6:8080", "192.168.1.5:8080", 403, 403),
        ("http://localhost.evil.example", "localhost:8080", 403, 403),
        ("http://evil.example/http://localhost", "localhost", 403, 403),
        ("http://evil.example@localhost", "localhost", 403, 403),
        ("file://", "localhost:8080", 403, 403),
        ("tauri://localhost", "localhost:8080", 403, 403),
        ("null", "localhost:8080", 403, 403),
        ("*", "localhost:8080", 403, 403),
        ("", "localhost:8080", 403, 403),
    ],
)
def test_foreign_origins_are_refused(origin, host, local, remote):
    assert status(lambda: LOCAL.check_origin([origin], [host])) == local
    assert status(lambda: OPEN.check_origin([origin], [host])) == remote


def test_allowed_origins():
    access = Access("127.0.0.1", True, frozenset({"https://good.example", "null"}))
    hosts = ["localhost"]
    assert access.check_origin(["https://GOOD.example"], hosts) == "https://GOOD.example"
    assert access.check_origin(["null"], hosts) == "null"
    assert access.check_origin([], hosts) is None
    assert status(lambda: access.check_origin(["http://good.example"], hosts)) == 403
    both = ["https://good.example", "https://evil.example"]
    assert status(lambda: access.check_origin(both, hosts)) == 403
    anybody = Access("127.0.0.1", True, frozenset({"*"}))
    assert anybody.check_origin(["https://evil.example"], hosts) == "*"


@pytest.mark.parametrize(
    ("authorizations", "expected"),
    [
        ([], 401),
        (["Bearer one"], 0),
        (["bearer  two "], 1),
        (["Bearer three"], 401),
        (["Bearer"], 401),
        (["Bearer "], 401),
        (["one"], 401),
        (["Basic one"], 401),
        (["Bearer on"], 401),
        (["Bearer oneX"], 401),
        (["Bearer \xff"], 401),
        (["Bearer one", "Bearer one"], 401),
    ],
)
def test_keys(authorizations, expected):
    access = Access("0.0.0.0", False, keys=("one", "two"))
    try:
        found = access.client(authorizations)
    except BadRequest as error:
        found = error.status
    assert found == expected
    assert "one" not in repr(access)


def test_clients_without_keys():
    assert LOCAL.client([]) == LOCAL.client(["Bearer any"]) == ANY_CLIENT
    assert OPEN.client([]) is None


def test_keys_are_compared_in_constant_time(monkeypatch):
    compared = []
    monkeypatch.setattr(
        "mlx_rgemma.server.access.hmac.compare_digest",
        lambda a, b: compared.append((len(a), len(b))) or a == b,
    )
    Access("0.0.0.0", False, keys=("one", "longer", "x")).client(["Bearer one"])
    assert compared == [(32, 32)] * 3


def test_keys_of_the_command_line_and_of_the_environment(monkeypatch):
    monkeypatch.setenv(KEYS_VARIABLE, "b, c,a")
    assert api_keys(["a"]) == ("a", "b", "c")
    monkeypatch.setenv(KEYS_VARIABLE, "")
    assert api_keys([]) == ()
    for wrong in (",", "a,,b", "a b", "ä", "x" * 257):
        monkeypatch.setenv(KEYS_VARIABLE, wrong)
        with pytest.raises(UserError, match=KEYS_VARIABLE) as caught:
            api_keys([])
        assert len(str(caught.value)) < 200


def test_loopback_addresses():
    assert all(map(is_loopback, ["127.0.0.1", "127.8.8.8", "::1"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.5", "fe80::1%eth0"]))
