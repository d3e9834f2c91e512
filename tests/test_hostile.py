"""Clients that mean harm, or are broken, over real sockets: what they cost others, and how far they get."""

import collections
import contextlib
import gzip
import http.client
import itertools
import json
import os
import re
import selectors
import socket
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, TOKEN, Server, until
from noise import Noise

import kirosync

AUTH = f"Authorization: Bearer {TOKEN}\r\n".encode()
REQUESTS = int(os.environ.get("KIROSYNC_TEST_REQUESTS", "100000"))  # of the hostile run
SLACK_S = 2 * kirosync.TICK_S + 3  # of the times that the service promises, on a machine that has other work


def address_of(server):
    host, port = server.url.removeprefix("http://").split(":")
    return host, int(port)


def resident(server, name="VmRSS"):
    """MiB of memory."""
    status = Path(f"/proc/{server.popen.pid}/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def descriptors(server):
    return len(os.listdir(f"/proc/{server.popen.pid}/fd"))


def threads_of(server):
    return len(os.listdir(f"/proc/{server.popen.pid}/task"))


def exchange(server, request, seconds=10):
    """Send bytes, as far as they are taken, and return all that comes back until the connection is closed."""
    with socket.create_connection(address_of(server), timeout=seconds) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while piece := connection.recv(1 << 16):
                answer += piece
        return answer


# Many who are slow


class Crowd:
    """So many connections that send a *beginning*, then now and then a *drip* (or nothing), and read, or do not."""

    def __init__(self, server, beginning, drip=b"", reads=True, size=500):
        self.open, self.ended, self.heard = {}, [], set()
        self.drip, self.reads = drip, reads
        self.selector, self.over = selectors.DefaultSelector(), threading.Event()
        for _ in range(size):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(address_of(server))
            connection.setblocking(False)
            if beginning:
                connection.send(beginning)
            self.open[connection] = time.monotonic()
            self.selector.register(connection, selectors.EVENT_READ)
        self.thread = threading.Thread(target=self.live)
        self.thread.start()

    def live(self):
        while self.open and not self.over.is_set():
            for connection in [*self.open]:
                self.look(connection)
            self.over.wait(1)

    def look(self, connection):
        """Drip, and note what was said and when the connection ended; a reset is found by trying to send."""
        try:
            if self.drip:
                connection.send(self.drip)
            if self.reads and not (said := connection.recv(4096)):
                raise ConnectionResetError
            elif self.reads:
                self.heard.add(said.split(b"\r\n")[0])
            elif connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                raise ConnectionResetError
        except BlockingIOError:
            pass
        except ConnectionError:
            self.ended.append(time.monotonic() - self.open.pop(connection))
            connection.close()

    def close(self):
        self.over.set()
        self.thread.join()
        for connection in self.open:
            connection.close()


@pytest.fixture
def crowd(server):
    crowds = []

    def crowd(*arguments, **more):
        crowds.append(Crowd(server, *arguments, **more))
        return crowds[-1]

    yield crowd
    for each in crowds:
        each.close()


def paces(server, rounds=120):
    """How long (s) others wait for their answers: every second on a connection of its own."""
    kept, spent = http.client.HTTPConnection(*address_of(server), timeout=10), []
    for number in range(rounds):
        fresh = http.client.HTTPConnection(*address_of(server), timeout=10) if number % 2 else kept
        started = time.monotonic()
        fresh.request("GET", "/sync?only=commands", headers={"Authorization": f"Bearer {TOKEN}"})
        answer = fresh.getresponse()
        answer.read()
        spent.append(time.monotonic() - started)
        assert answer.status == 200
        if fresh is not kept:
            fresh.close()
        time.sleep(0.02)
    kept.close()
    return spent


def assert_nobody_waits(quiet, busy, what):
    """Fail if the busiest hundredth waited for long, absolutely and compared with the same before."""
    figures = [
        f"{statistics.quantiles(spent, n=100)[98] * 1000:.1f} ms, {max(spent) * 1000:.1f} ms" for spent in (quiet, busy)
    ]
    print(f"{what}: p99 and longest of {len(busy)}: {figures[1]}; without: {figures[0]}")
    p99 = statistics.quantiles(busy, n=100)[98]
    assert p99 < 0.1 or p99 < 5 * max(quiet)


HEAD = b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: "
BODY = b"POST /sync HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n"
SLOW = {  # what they send at first, then each second; and after how long (s) they are dropped, and told what
    "drip heads": (HEAD, b"x", kirosync.HEAD_S, b"HTTP/1.0 408 Request Timeout"),
    "drip empty lines": (b"\r\n", b"\r\n\r\n", kirosync.HEAD_S, None),
    "drip bodies": (BODY, b"x", kirosync.STALL_S, b"HTTP/1.1 408 Request Timeout"),
    "send nothing": (b"", b"", kirosync.HEAD_S, None),
}


@pytest.mark.parametrize("what", SLOW)
def test_500_clients_that_are_slow_keep_nobody_waiting_and_are_dropped_in_time(server, crowd, what):
    beginning, drip, seconds, told = SLOW[what]
    quiet = paces(server)
    slow = crowd(beginning, drip)
    assert_nobody_waits(quiet, paces(server), f"500 that {what}")
    until(lambda: not slow.open, seconds + SLACK_S)
    print(f"dropped after {min(slow.ended):.1f} to {max(slow.ended):.1f} s")
    assert min(slow.ended) > seconds - 1
    assert max(slow.ended) < seconds + SLACK_S
    assert not told or slow.heard == {told}


def test_500_clients_that_do_not_read_their_answers_are_dropped_and_cost_no_memory(server, crowd, state):
    identity = server.ask("POST", "/command", json={"type": "execute_bash", "command": "x"}).json()["commandId"]
    server.ask("PATCH", f"/command/{identity}", json={"status": "processing"})
    for piece in range(8):
        server.ask("POST", f"/command/{identity}/output?offset={piece << 20}", data=b"x" * (1 << 20))
    quiet, before = paces(server), resident(server)
    output = f"GET /command/{identity}/output HTTP/1.1\r\nHost: x\r\n".encode() + AUTH + b"\r\n"
    slow = [crowd(output, reads=False, size=250), crowd(b"GET /docs HTTP/1.1\r\n\r\n" * 300, reads=False, size=250)]
    time.sleep(2)
    assert_nobody_waits(quiet, paces(server), "500 that do not read")
    print(
        f"memory {before:.0f} MiB before, {resident(server):.0f} MiB now, {resident(server, 'VmHWM'):.0f} MiB at most"
    )
    assert resident(server, "VmHWM") < before + 150
    until(lambda: not any(each.open for each in slow), kirosync.STALL_S + SLACK_S)
    until(lambda: descriptors(server) < 60)


# Whatever a client sends


CLOSES = "closes"


class Talker:
    """A client of one connection after the other, all of noise; it counts what is answered, and keeps what is wrong."""

    def __init__(self, server):
        self.server, self.statuses, self.wrong, self.asked = server, collections.Counter(), [], 0

    def talk(self, seed):
        noise = Noise(seed)
        requests, unframed = noise.batch()
        self.asked += len(requests) + bool(unframed)
        connection = socket.create_connection(address_of(self.server), timeout=30)
        with connection, connection.makefile("rb") as answers, contextlib.suppress(ConnectionError):
            self.send(connection, b"".join(request for _, request in requests), noise)
            for method, request in requests:
                heard = self.hear(answers, method, (seed, request))
                if heard == CLOSES:
                    return
                if not heard:
                    self.wrong.append((seed, request, "no answer"))
            if unframed:
                connection.sendall(unframed)
                if noise.maybe(0.9):
                    with contextlib.suppress(OSError):  # it has been refused and reset before
                        connection.shutdown(socket.SHUT_WR)
                    while self.hear(answers, "", (seed, unframed)):
                        pass

    def send(self, connection, wire, noise):
        """Send all at once; now and then in two pieces with a pause between."""
        cut = noise.random.randrange(len(wire)) if noise.maybe(0.03) else 0
        if cut:
            connection.sendall(wire[:cut])
            time.sleep(noise.random.random() / 20)
        connection.sendall(wire[cut:])

    def hear(self, answers, method, what):
        """Read an answer, and check that it is one; return what becomes of the connection: "" if it has ended."""
        head = b"".join(iter(answers.readline, b"\r\n")) if (first := answers.readline()) else b""
        if not first:
            return ""
        if not (line := re.fullmatch(rb"HTTP/1\.[01] (\d{3}) [ -~]+\r\n", first)):
            self.wrong.append((*what, first))
            return ""
        status = int(line[1])
        if status == 100:
            return self.hear(answers, method, what)
        self.statuses[status] += 1
        headers = {
            name.lower(): value.strip() for name, _, value in (each.partition(b":") for each in head.split(b"\r\n"))
        }
        body = self.body(answers, headers, method, status)
        if status == 500:
            self.wrong.append((*what, first + head + body))
        if status >= 400 and method != "HEAD":
            with contextlib.suppress(ValueError):
                refusal = json.loads(body)
                if isinstance(refusal.get("error", refusal.get("code")), str):
                    body = b""
            if body:
                self.wrong.append((*what, first + head + body))
        return CLOSES if headers.get(b"connection") == b"close" else "goes on"

    def body(self, answers, headers, method, status):
        if method == "HEAD" or status == 304:
            return b""
        if headers.get(b"transfer-encoding") == b"chunked":
            body = b"".join(iter(lambda: answers.read(int(answers.readline(), 16) + 2)[:-2], b""))
        else:
            body = answers.read(int(headers[b"content-length"])) if b"content-length" in headers else answers.read()
        return gzip.decompress(body) if headers.get(b"content-encoding") == b"gzip" else body


def files_below(folder):
    return {path for path in folder.rglob("*") if not {".git", "__pycache__", "node_modules"} & {*path.parts}}


def files_beside(state):
    return (files_below(state.parent) | files_below(ROOT)) - files_below(state)


@pytest.fixture
def hostile_seed():
    seed = int(os.environ.get("KIROSYNC_TEST_SEED", "6"))
    print(f"{REQUESTS} requests, seed {seed}")
    return seed


def test_nothing_that_a_client_sends_makes_the_service_fail_or_grow(state, tmp_path, start, hostile_seed):
    server = start(Server, state, tmp_path / "log", "--execute-timeout", "0.2")
    paces(server, 10)
    before = resident(server), descriptors(server), threads_of(server)
    outside = files_beside(state)
    talkers = [Talker(server) for _ in range(16)]

    def talk(talker, number):
        for turn in itertools.count():
            if sum(each.asked for each in talkers) >= REQUESTS or any(each.wrong for each in talkers):
                return
            seed = f"{hostile_seed}-{number}-{turn}"
            try:
                talker.talk(seed)
            except (ValueError, OSError) as problem:
                talker.wrong.append((seed, repr(problem)))

    started = time.monotonic()
    with ThreadPoolExecutor(len(talkers)) as threads:
        [*threads.map(talk, talkers, range(len(talkers)))]
    statuses = sum((each.statuses for each in talkers), collections.Counter())
    print(
        f"{sum(each.asked for each in talkers)} requests in {time.monotonic() - started:.0f} s:",
        sorted(statuses.items()),
    )
    wrong = [each for talker in talkers for each in talker.wrong]
    assert not wrong, wrong[0]
    assert {status for status in statuses if status >= 500} <= {501, 503}
    assert server.ask("GET", "/sync").status_code == 200
    until(lambda: descriptors(server) <= before[1] + 10)
    print(f"memory {before[0]:.0f} MiB before, {resident(server, 'VmHWM'):.0f} at most, {resident(server):.0f} after")
    assert resident(server, "VmHWM") < before[0] + 150
    assert threads_of(server) <= before[2] + 2
    assert files_beside(state) == outside
    assert all(re.fullmatch(r"[\w.%-]+", path.name, re.ASCII) for path in files_below(state))
    assert not re.search("Traceback|ERROR|uncaptured", (tmp_path / "log").read_text())
    assert_nobody_waits(paces(server), paces(server), "afterwards")
