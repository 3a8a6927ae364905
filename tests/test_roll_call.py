"""The roll-call before a run of several processes: here each is a thread, and what is between them is real sockets."""

import dataclasses
import json
import socket
import threading
import time

import pytest

from nuner_jax.distributed.roll_call import Member, meet
from nuner_jax.errors import NunerError


@pytest.fixture
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def member(number, processes=3, **facts):
    return Member(number, processes, f"host-{number}", {"config.lr": "0.1", "version of jax": "1.0", **facts})


def connected(address) -> socket.socket:
    """A connection to process 0, as soon as it listens."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection((host, int(port)))
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


class Call(threading.Thread):
    """A process of the roll-call: what it is told is in `verdict`, empty where all is well."""

    def __init__(self, address, member, seconds=60.0):
        super().__init__(daemon=True)
        self._arguments, self.verdict = (address, member, seconds), None
        self.start()

    def run(self):
        try:
            meet(*self._arguments)
            self.verdict = ""
        except NunerError as error:
            self.verdict = str(error)


def verdicts(*calls):
    for call in calls:
        call.join(timeout=60)
    return [call.verdict for call in calls]


def one_verdict(*calls):
    """What all are told: the same."""
    told = set(verdicts(*calls))
    assert len(told) == 1, told
    return told.pop()


def test_processes_that_agree_go_on_together_and_the_port_is_free_for_jax(address):
    late = [Call(address, member(number)) for number in (2, 1)]
    time.sleep(0.3)
    assert all(call.is_alive() for call in late), "they wait for process 0"
    assert one_verdict(*late, Call(address, member(0))) == ""
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        pass


def test_a_process_alone_waits_for_nobody(address):
    assert one_verdict(Call(address, member(0, processes=1))) == ""


def test_who_is_missing_is_named_to_all_that_are_there(address):
    told = one_verdict(Call(address, member(0, 5), 2.0), Call(address, member(3, 5)), Call(address, member(1, 5)))
    assert told.startswith(f"processes 2, 4 of 5 did not join at {address} (--coordinator) within 2 s (--join_timeout)")
    assert "there: 0 on host-0, 1 on host-1, 3 on host-3. Start the same command on every host" in told


def test_a_process_that_finds_no_process_0_says_where_it_looked(address):
    told = one_verdict(Call(address, member(1), 1.0))
    assert told.startswith(f"process 1 on host-1 cannot reach process 0 at {address} (--coordinator) within 1 s")
    assert "firewall" in told


def test_what_differs_is_named_with_the_processes_of_each_value(address):
    calls = [
        Call(address, member(0)),
        Call(address, member(1, **{"config.lr": "0.2"})),
        Call(address, member(2, **{"nuner_jax/train.py": "sha256 ab"})),
    ]
    told = one_verdict(*calls)
    assert "config.lr: 0.1 (processes 0, 2), 0.2 (process 1)" in told
    assert "nuner_jax/train.py: missing (processes 0, 1), sha256 ab (process 2)" in told
    assert "version of jax" not in told


def test_of_many_differences_the_first_are_told_and_the_rest_counted(address):
    many = {f"file {number:02}": "other" for number in range(30)}
    told = one_verdict(Call(address, member(0, 2)), Call(address, member(1, 2, **many)))
    assert "file 07" in told and "file 08" not in told and "and 22 more" in told


@pytest.mark.parametrize(
    ("numbers", "hint"),
    [
        ([(0, 3), (1, 3), (1, 3)], "two processes have the number 1 (--process_id), on host-1 and on host-1"),
        (
            [(0, 2), (2, 3)],
            "process 2 on host-2 belongs to 3 processes (--num_processes), and process 0 on host-0 to 2",
        ),
        ([(0, 2), (1, 3)], "--num_processes: 2 (process 0), 3 (process 1)"),
    ],
)
def test_numbers_that_do_not_fit_together_are_told_at_once(address, numbers, hint):
    assert hint in one_verdict(*(Call(address, member(*number)) for number in numbers))


def test_a_process_that_ends_while_it_waits_may_come_again(address):
    first = Call(address, member(0))
    with connected(address) as gone:
        line = {"greeting": "nuner_jax roll-call, 1", "member": dataclasses.asdict(member(1, **{"config.lr": "9"}))}
        gone.sendall(json.dumps(line).encode() + b"\n")
        time.sleep(0.3)
    time.sleep(0.3)  # it was started again
    assert one_verdict(first, Call(address, member(2)), Call(address, member(1))) == ""


def test_strangers_at_the_port_are_not_counted(address):
    first = Call(address, member(0, 2))
    strangers = [connected(address) for _ in range(4)]
    greetings = (b"GET / HTTP/1.1\r\n\r\n", b"\x00\xff\x16\x03", b'{"greeting": "hello"}\n', b"")
    for stranger, said in zip(strangers, greetings, strict=True):
        stranger.sendall(said)
    assert one_verdict(first, Call(address, member(1, 2))) == ""
    for stranger in strangers:
        stranger.close()


def test_a_port_that_is_taken_is_named(address):
    with socket.create_server(("", int(address.rpartition(":")[2]))):
        told = one_verdict(Call(address, member(0)))
    assert told.startswith(f"process 0 cannot listen at {address} (--coordinator): another program has the port")


def test_another_program_at_the_port_is_not_taken_for_process_0(address):
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))) as server:
        call = Call(address, member(1), 1.0)
        connection, _ = server.accept()
        connection.sendall(b"220 mail.example ready\r\n")
        connection.close()
        server.close()
        told = one_verdict(call)
    assert f"cannot reach process 0 at {address}" in told
