"""The watchdog between ranks, run by threads with real connections."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time

import pytest
from helpers.launching import free_ports

from mlx_rgemma.distributed.rank_info import RankInfo
from mlx_rgemma.distributed.watchdog import Connection, Watchdog, timeout_seconds
from mlx_rgemma.errors import UserError

pytestmark = pytest.mark.network


def places(tmp_path, size: int, kind: str) -> list[RankInfo]:
    """The places of all processes, from what mlx.launch sets."""
    ports = free_ports(size)
    hosts, devices = tmp_path / "hosts.json", tmp_path / "devices.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
    devices.write_text(json.dumps([[None] * size] * size))
    variables = {
        "ring": {"MLX_HOSTFILE": str(hosts)},
        "jaccl": {
            "MLX_IBV_DEVICES": str(devices),
            "MLX_JACCL_COORDINATOR": f"127.0.0.1:{ports[0]}",
        },
        "nccl": {
            "NCCL_HOST_IP": "127.0.0.1",
            "NCCL_PORT": str(ports[0]),
            "MLX_WORLD_SIZE": str(size),
        },
    }[kind]
    found = [
        RankInfo.from_environment({"MLX_RANK": str(rank), **variables}) for rank in range(size)
    ]
    assert [(place.rank, place.size) for place in found] == [(r, size) for r in range(size)]
    return found


class Process:
    """A thread that stands for a process."""

    def __init__(self, place: RankInfo, timeout: float = 5.0) -> None:
        self.ended: list[str] = []
        self.problem: UserError | None = None
        self.watchdog = Watchdog(place, timeout, self.ended.append)
        self.thread = threading.Thread(target=self._rendezvous)
        self.thread.start()

    def _rendezvous(self) -> None:
        try:
            self.watchdog.rendezvous()
        except UserError as error:
            self.problem = error

    def wait_for_end(self, seconds: float = 10.0) -> str:
        deadline = time.monotonic() + seconds
        while not self.ended and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.ended, "was not told of it"
        return self.ended[0]


def started(places: list[RankInfo], timeout: float = 5.0) -> list[Process]:
    processes = [Process(place, timeout) for place in places]
    for process in processes:
        process.thread.join()
    return processes


@pytest.mark.parametrize("kind", ["ring", "jaccl", "nccl"])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_rendezvous_and_shutdown(tmp_path, kind, size):
    processes = started(places(tmp_path, size, kind))
    assert [p.problem for p in processes] == [None] * size
    partings = [threading.Thread(target=p.watchdog.shutdown_barrier) for p in processes]
    for parting in partings:
        parting.start()
        time.sleep(0.05)
    for parting in partings:
        parting.join(5)
        assert not parting.is_alive()
    assert [p.ended for p in processes] == [[]] * size


def test_addresses_are_free_for_mlx_after_rendezvous(tmp_path):
    for process, place in zip(started(found := places(tmp_path, 3, "ring")), found, strict=True):
        assert process.problem is None
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place.listen)
            listener.listen()


@pytest.mark.parametrize("kind", ["ring", "jaccl"])
def test_messages_are_forwarded_before_rendezvous_returns(tmp_path, kind, monkeypatch):
    """MLX, which comes next, lets no thread run that could do it later."""
    passed_on: dict[Connection, set[int]] = {}
    send = Connection.send

    def slowly(line, message):
        if "ready" in message:
            time.sleep(0.05)  # a thread that others keep from running
        send(line, message)
        if "ready" in message:
            passed_on.setdefault(line, set()).add(message["ready"])

    monkeypatch.setattr(Connection, "send", slowly)
    seen: dict[int, list[set[int]]] = {}

    class Watched(Process):
        def _rendezvous(self) -> None:
            super()._rendezvous()
            lines = self.watchdog._connections.values()
            seen[self.watchdog.info.rank] = [set(passed_on.get(line, ())) for line in lines]

    processes = [Watched(place) for place in places(tmp_path, 4, kind)]
    for process in processes:
        process.thread.join()
    assert [process.problem for process in processes] == [None] * 4
    for lines in seen.values():
        assert lines and all(ready == {0, 1, 2, 3} for ready in lines), seen


@pytest.mark.parametrize("kind", ["ring", "jaccl"])
def test_a_missing_rank_is_named_by_all(tmp_path, kind):
    all_places = places(tmp_path, 4, kind)
    processes = started(all_places[:2] + all_places[3:], timeout=1.5)
    for process in processes:
        text = str(process.problem) if process.problem else process.wait_for_end()
        assert "rank 2" in text or text == "", text  # empty where another one tells the user
    told = [str(p.problem) for p in processes if p.problem]
    assert any("1.5 s waiting for rank 2" in text and "hostfile" in text for text in told)


@pytest.mark.parametrize("kind", ["ring", "jaccl"])
@pytest.mark.parametrize("victim", [1, 3])
def test_a_lost_rank_ends_all(tmp_path, kind, victim):
    processes = started(places(tmp_path, 4, kind))
    processes[victim].watchdog._over = True  # the dead say nothing
    for line in list(processes[victim].watchdog._connections.values()):
        line.socket.shutdown(socket.SHUT_RDWR)  # as the kernel does for a process that was killed
    messages = [p.wait_for_end() for p in processes if p is not processes[victim]]
    named = f"rank {victim} of 4 has ended or cannot be reached"
    assert messages[0] == named
    assert set(messages) <= {named, ""}


def test_a_failure_is_forwarded_with_its_reason(tmp_path):
    processes = started(places(tmp_path, 3, "ring"))
    processes[2].watchdog.report_failure("stopped: the disk is full")
    assert processes[0].wait_for_end() == "rank 2 of 3 stopped: the disk is full"
    assert processes[1].wait_for_end() == ""  # the first one tells the user


def test_ranks_have_time_to_report_the_same_error(tmp_path, monkeypatch):
    processes = started(places(tmp_path, 4, "ring"))
    waited: list[float] = []
    monkeypatch.setattr("mlx_rgemma.distributed.watchdog.time.sleep", waited.append)
    processes[2].watchdog.report_failure("stopped: no such folder", grace=7.5)
    for process in (processes[0], processes[1], processes[3]):
        while not process.ended:
            threading.Event().wait(0.01)
    assert waited.count(7.5) == 3  # rank 0 hears of it from a neighbour


def test_a_silent_rank_is_lost(tmp_path, monkeypatch):
    found = places(tmp_path, 2, "ring")
    processes = started(found, timeout=1.0)
    monkeypatch.setattr(processes[1].watchdog, "_send", lambda message: None)
    assert processes[0].wait_for_end() == "rank 1 of 2 has been silent for 1 s"


def test_heartbeats_keep_ranks_alive(tmp_path):
    processes = started(places(tmp_path, 2, "ring"), timeout=1.0)
    time.sleep(2.5)
    assert [p.ended for p in processes] == [[], []]
    processes[0].watchdog.report_failure("is done with the test")


def test_connections_of_other_programs_are_refused(tmp_path):
    found = places(tmp_path, 2, "ring")
    first = Process(found[0])
    for greeting in (b"GET / HTTP/1.1\r\n\r\n", b'{"rank": 0}\n', b'{"rank": "x"}\n', b"\n"):
        for _ in range(50):
            try:
                caller = socket.create_connection(found[0].listen, timeout=1)
                break
            except OSError:
                time.sleep(0.05)
        with caller, contextlib.suppress(ConnectionResetError):
            caller.sendall(greeting)
            caller.settimeout(5)
            assert caller.recv(10) == b""
    second = Process(found[1])
    for process in (first, second):
        process.thread.join()
        assert process.problem is None


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n", b"[]\n"], ids=str)
def test_another_program_at_the_address_is_reported(tmp_path, answer):
    found = places(tmp_path, 2, "ring")
    with socket.create_server(found[1].listen) as stranger:
        first = Process(found[0])
        connection, _ = stranger.accept()
        with connection:
            connection.sendall(answer)
            expected = "another program answers at the address of rank 1 of 2; "
            assert first.wait_for_end().startswith(expected)
    first.watchdog._over = True


def test_an_address_of_another_machine_is_refused(tmp_path):
    (tmp_path / "hosts.json").write_text('[["192.0.2.1:3000"], ["127.0.0.1:3001"]]')
    variables = {"MLX_RANK": "0", "MLX_HOSTFILE": str(tmp_path / "hosts.json")}
    (first,) = started([RankInfo.from_environment(variables)], timeout=1.0)
    assert "cannot listen on 192.0.2.1:3000" in str(first.problem)
    assert "an address of this machine" in str(first.problem)


def test_an_address_in_use_is_refused(tmp_path):
    found = places(tmp_path, 2, "ring")
    with socket.socket() as taken:
        taken.bind(found[0].listen)
        taken.listen()
        (first,) = started(found[:1], timeout=1.0)
    assert "cannot listen on 127.0.0.1" in str(first.problem)
    assert "--starting-port" in str(first.problem)


def test_a_single_process_has_no_rank(tmp_path):
    empty = tmp_path / "hosts.json"
    empty.write_text("\n")  # what mlx.launch -n 1 leaves
    assert RankInfo.from_environment({}) is None
    assert RankInfo.from_environment({"MLX_RANK": "0"}) is None
    assert RankInfo.from_environment({"MLX_RANK": "0", "MLX_HOSTFILE": str(empty)}) is None


TWO_HOSTS = [["127.0.0.1:3"], ["127.0.0.1:4"]]


@pytest.mark.parametrize(
    "rank, hosts",
    [
        ("x", TWO_HOSTS),
        ("5", TWO_HOSTS),
        ("-1", TWO_HOSTS),
        ("0", None),
        ("0", 3),
        ("0", [["here"], ["there"]]),
        ("0", [[3], [4]]),
        ("0", [[], []]),
        ("0", [["127.0.0.1:3"], ["127.0.0.1:99999"]]),
        ("0", [["127.0.0.1:3"], ["127.0.0.1:3"]]),
        ("0", [["127.0.0.1:3"], ["a..b:4"]]),
        ("0", [["127.0.0.1:3"], [":4"]]),
    ],
    ids=str,
)
def test_inconsistent_hostfiles_are_refused(tmp_path, rank, hosts):
    path = tmp_path / "hosts.json"
    if hosts is not None:
        path.write_text(json.dumps(hosts))
    with pytest.raises(UserError, match=r"mlx\.launch sets are inconsistent"):
        RankInfo.from_environment({"MLX_RANK": rank, "MLX_HOSTFILE": str(path)})


@pytest.mark.parametrize(
    "variables",
    [
        {"MLX_JACCL_COORDINATOR": "127.0.0.1:3"},
        {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": "99999", "MLX_WORLD_SIZE": "2"},
        {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": "9", "MLX_WORLD_SIZE": "many"},
    ],
    ids=["jaccl without devices", "nccl port", "nccl size"],
)
def test_inconsistent_variables_are_refused(variables):
    with pytest.raises(UserError, match=r"mlx\.launch sets are inconsistent"):
        RankInfo.from_environment({"MLX_RANK": "0", **variables})


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_invalid_timeouts_are_refused(monkeypatch, text):
    monkeypatch.setenv("MLX_RGEMMA_PEER_TIMEOUT", text)
    with pytest.raises(UserError, match="MLX_RGEMMA_PEER_TIMEOUT"):
        timeout_seconds()
