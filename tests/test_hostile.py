"""Clients that mean harm, or are broken, over real sockets: what they cost others, and how far they get."""

import collections
import contextlib
import gzip
import http.client
import itertools
import json
import os
import re
import resource
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


def anywhere(numbers=itertools.count(1)):  # noqa: B008  one counter for all
    """An address of this machine from which nobody has come yet: what one address may ask is limited elsewhere."""
    number = next(numbers)
    return f"127.{1 + number // 62_500 % 250}.{1 + number // 250 % 250}.{1 + number % 250}", 0


def resident(server, name="VmRSS"):
    """MiB of memory."""
    status = Path(f"/proc/{server.popen.pid}/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) / 1024


def descriptors(server):
    return len(os.listdir(f"/proc/{server.popen.pid}/fd"))


def is_idle(server):
    """Whether the service takes less than a fifth of a processor for half a second."""

    def used():
        fields = Path(f"/proc/{server.popen.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    before = used()
    time.sleep(0.5)
    return used() - before < 0.1


def threads_of(server):
    return len(os.listdir(f"/proc/{server.popen.pid}/task"))


def exchange(server, request, seconds=10, broken=ConnectionError):
    """Send bytes, as far as they are taken, and return all that comes back until the end, or until it is *broken*."""
    with socket.create_connection(address_of(server), seconds, anywhere()) as connection:
        answer = b""
        with contextlib.suppress(broken):
            connection.sendall(request)
        with contextlib.suppress(broken):
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
            connection.bind(anywhere())
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
            everyone = [*self.open]
            for tenth in range(10):
                for connection in everyone[tenth::10]:
                    self.look(connection)
                self.over.wait(0.1)

    def look(self, connection):
        """Drip, and note what was said and when the connection ended; a reset is found by trying to send."""
        try:
            if self.drip:
                connection.send(self.drip)
            if self.reads and not (said := connection.recv(4096)):
                raise ConnectionResetError
            if self.reads and said.startswith(b"HTTP"):
                self.heard.add(said.split(b"\r\n")[0])
            if not self.reads and connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
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


@pytest.mark.alone
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


@pytest.mark.alone
def test_500_clients_that_do_not_read_their_answers_are_dropped_and_cost_no_memory(server, crowd, state):
    identity = server.ask("POST", "/command", json={"type": "execute_bash", "command": "x"}).json()["commandId"]
    server.ask("PATCH", f"/command/{identity}", json={"status": "processing"})
    for piece in range(8):
        server.ask("POST", f"/command/{identity}/output?offset={piece << 20}", data=b"x" * (1 << 20))
    quiet, before = paces(server), resident(server)
    output = f"GET /command/{identity}/output HTTP/1.1\r\nHost: x\r\n".encode() + AUTH + b"\r\n"
    slow = crowd(output, reads=False)
    until(lambda: is_idle(server), 10)  # the kernel takes some 2 MB for each at first, as fast as it can
    assert_nobody_waits(quiet, paces(server), "500 that do not read")
    print(
        f"memory {before:.0f} MiB before, {resident(server):.0f} MiB now, {resident(server, 'VmHWM'):.0f} MiB at most"
    )
    assert resident(server, "VmHWM") < before + 150
    until(lambda: not slow.open, kirosync.STALL_S + SLACK_S + 10)  # from when the last of it went into the buffers
    until(lambda: descriptors(server) < 60)


@pytest.mark.alone
def test_more_clients_than_may_be_open_shut_nobody_out_and_who_is_held_stays(server, crowd):
    cursor = server.ask("GET", "/sync").json()["cursor"]
    with ThreadPoolExecutor(1) as threads:
        held = threads.submit(server.ask, "GET", f"/sync?since={cursor}&wait={kirosync.HEAD_S + kirosync.STALL_S}")
        time.sleep(0.2)
        quiet = paces(server, 60)
        silent = crowd(b"", size=kirosync.CONNECTIONS)
        dripping = crowd(HEAD, b"x", size=300)
        assert_nobody_waits(quiet, paces(server), "1300 that only take up room")
        until(lambda: len(silent.ended) >= 300, 5)
        assert min(silent.ended) < kirosync.HEAD_S
        assert descriptors(server) < kirosync.CONNECTIONS + 100
        until(lambda: not silent.open and not dripping.open, kirosync.HEAD_S + SLACK_S)
        assert not held.done()
        server.ask("POST", "/sync", json={"documents": {"d": {"content": "x", "timestamp": 1}}})
        assert [*held.result().json()["documents"]] == ["d"]


def test_where_few_descriptors_are_to_be_had_there_are_fewer_connections(state, tmp_path, start):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (450, limits[1]))
    service = kirosync.Service(None, TOKEN)
    try:
        server = kirosync.listen(service, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert server.adj.connection_limit == (450 - kirosync.OWN_FILES) // kirosync.DESCRIPTORS
    server.close()
    for door in service.doors:
        door.close()


def test_a_kept_connection_on_which_nothing_is_asked_is_closed(channel):
    channel.enter(kirosync.RESTING)
    channel.wait(kirosync.IDLE_S - 1)
    assert not channel.will_close
    channel.wait(2)
    assert channel.will_close


def test_requests_that_were_sent_ahead_are_not_even_looked_at_before_the_answer_has_gone(channel):
    channel.received(b"GET /docs HTTP/1.1\r\n\r\n" * 300)
    assert (len(channel.requests), channel.readable()) == (1, False)
    channel.requests.clear()
    channel.total_outbufs_len = 1
    channel.received()
    assert not channel.requests
    channel.total_outbufs_len = 0
    channel.received()
    assert len(channel.requests) == 1


@pytest.mark.parametrize("stage", [kirosync.SENDING, kirosync.READING])
def test_who_keeps_to_the_rate_is_waited_for_for_ever_and_half_of_it_is_too_little(channel, stage):
    channel.enter(stage)
    for _ in range(int(3 * kirosync.STALL_S)):
        channel.moved = kirosync.RATE
        channel.wait(1)
    assert channel.patience == kirosync.STALL_S
    for _ in range(int(2 * kirosync.STALL_S) - 1):
        channel.moved = kirosync.RATE // 2
        channel.wait(1)
    assert channel.connected and not channel.will_close
    channel.wait(1)
    assert channel.will_close or not channel.connected


def test_what_was_sent_at_once_long_ago_does_not_count_for_ever(channel):
    channel.enter(kirosync.SENDING)
    channel.moved = 1 << 30
    channel.wait(1)
    channel.wait(kirosync.STALL_S)
    assert channel.will_close


@pytest.fixture
def channel():
    """A connection to a server that does not run."""
    service = kirosync.Service(None, TOKEN)
    server = kirosync.listen(service, 1)
    theirs, ours = socket.socketpair()
    channel = kirosync.Channel(service.doors[0], ours, ("", 0), server.adj, map={})
    yield channel
    channel.handle_close()
    theirs.close()
    server.close()
    for door in service.doors:
        door.close()


# Bodies


def head_of(length, *headers):
    lines = ["POST /sync HTTP/1.1", "Host: x", "Connection: close", *headers]
    lines += [f"Content-Length: {length}"] if length is not None else ["Transfer-Encoding: chunked"]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


KNOWN = f"Authorization: Bearer {TOKEN}"
LARGE = 8 << 20


@pytest.mark.parametrize("headers", [[], ["Authorization: Bearer x"], ["Expect: 100-continue"]])
@pytest.mark.parametrize("length", [LARGE, None])
def test_who_has_no_token_sends_no_large_body_and_reads_why(server, headers, length):
    body = b"x" * LARGE if length else b"%x\r\n" % LARGE + b"x" * LARGE
    answer = exchange(server, head_of(length, *headers) + body, broken=())  # not cut before all was sent and read
    assert answer.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
    assert answer.endswith(b'{"error":"Unauthorized","message":"Valid API key required"}')
    assert b"Connection: close\r\n" in answer
    head = exchange(server, head_of(length, *headers))  # and it is said at once, not when the body is there
    assert head.startswith(b"HTTP/1.1 401 Unauthorized\r\n")


def test_a_small_body_without_a_token_is_refused_as_ever_and_the_connection_kept(server):
    connection = http.client.HTTPConnection(*address_of(server), timeout=10)
    for _ in range(2):
        connection.request("POST", "/sync", b"x" * kirosync.SMALL_BYTES)
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]) == (401, "Unauthorized")
    connection.close()


def test_bodies_that_are_on_their_way_have_a_bound_in_all(server, state):
    """As many are declared as there is room for; the next is told to come again, and when one has gone it is taken."""
    whole = kirosync.BODY_BYTES
    started = [socket.create_connection(address_of(server), timeout=10) for _ in range(kirosync.SPOOL_BYTES // whole)]
    for connection in started:
        connection.sendall(head_of(whole, KNOWN) + b" " * 100_000)
    time.sleep(0.5)
    for length in (whole, None):
        one_more = head_of(length, KNOWN) + (b" " * 200_000 if length else b"30d40\r\n" + b" " * 200_000)
        answer = exchange(server, one_more)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: " in answer
    assert exchange(server, head_of(2, KNOWN) + b"{}").startswith(b"HTTP/1.1 200 ")
    assert not set(os.listdir(state)) & set(os.listdir("/tmp")), "what is set aside has no name"
    spooled = [os.readlink(f"/proc/{server.popen.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{server.popen.pid}/fd")]
    assert len([path for path in spooled if path.startswith(str(state)) and "deleted" in path]) == len(started)
    for connection in started:
        connection.close()
    until(lambda: exchange(server, head_of(200_000, KNOWN) + b" " * 199_998 + b"{}").startswith(b"HTTP/1.1 200 "))


def test_bodies_that_are_read_at_the_same_time_have_a_bound_in_memory(server):
    """Nothing takes more memory than empty lists: some 850 MiB for one such body. Four take no more than one."""
    body = b'{"x":[' + b"[]," * (kirosync.BODY_BYTES // 3 - 10) + b"[]]}"
    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(exchange, server, head_of(len(body), KNOWN) + body, 60) for _ in range(4)]
        statuses = collections.Counter(int(each.result().split()[1]) for each in asked)
    print(f"{statuses}: {resident(server, 'VmHWM'):.0f} MiB at most, {resident(server):.0f} afterwards")
    assert statuses.keys() <= {200, 503}
    assert resident(server, "VmHWM") < 1500


def test_large_answers_that_are_not_read_have_a_bound_in_all(server):
    documents = {f"d{n}": {"content": "x" * (4 << 20), "timestamp": 1} for n in range(7)}
    for identity, document in documents.items():
        server.ask("POST", "/sync", json={"documents": {identity: document}})
    slow = [
        socket.create_connection(address_of(server), timeout=30) for _ in range(kirosync.SPOOL_BYTES // (28 << 20) + 4)
    ]
    heads = []
    for connection in slow:
        connection.sendall(b"GET /sync HTTP/1.1\r\n" + AUTH + b"\r\n")
        heads.append(connection.recv(12))
    assert {*heads} == {b"HTTP/1.1 200", b"HTTP/1.1 503"}
    for connection in slow:
        connection.close()
    until(lambda: server.ask("GET", "/sync").status_code == 200)


@pytest.mark.parametrize(
    ("what", "status"),
    [
        (b"GET http://" + b"1" * 32_000 + b" x\r\n\r\n", b"400"),  # took waitress two minutes
        (b"GET / HTTP/1.1\r\nX:" + b" " * 32_000 + b"\0\r\n\r\n", b"400"),  # and this six seconds
        (b"GET http://[ HTTP/1.1\r\n\r\n", b"400"),  # at these two it failed, and hung up
        (b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"X:\r\n" * 500 + b"\r\n", b"431"),
        (b"GET /" + b"x" * 40_000 + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nAuthorization: " + b"x" * 400_000 + b"\r\n\r\n", b"431"),
        (head_of(None, KNOWN) + b"1;" + b"x" * 1_000_000, b"400"),
        (head_of(None, KNOWN) + b"0\r\n" + b"x" * 1_000_000, b"400"),
        (head_of(1 << 40, KNOWN) + b"x", b"413"),
    ],
)
def test_what_is_no_request_is_refused_at_once_and_in_json(server, what, status):
    started = time.monotonic()
    answer = exchange(server, what)
    assert time.monotonic() - started < 1
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.split()[1] == status
    assert json.loads(body)["error"]


def test_an_expectation_is_met_also_where_no_body_comes_and_between_other_requests(server):
    waiting = b"GET /health HTTP/1.1\r\nExpect: 100-continue\r\n\r\n"
    sending = b"POST /sync HTTP/1.1\r\n" + AUTH + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n{}"
    last = b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"
    answer = exchange(server, waiting + sending * 200 + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 202
    assert answer.count(b"HTTP/1.1 100 Continue") == 200


def test_a_host_of_several_addresses_is_served_at_each_with_the_same_bounds(state, tmp_path, start, monkeypatch):
    found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM) + socket.getaddrinfo(
        "127.0.0.2", 0, type=socket.SOCK_STREAM
    )
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
    service = kirosync.Service(None, TOKEN, host="both")
    server = kirosync.listen(service, 2)
    monkeypatch.undo()
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    for host in ("127.0.0.1", "127.0.0.2"):
        with socket.create_connection((host, service.port), timeout=10) as connection:
            connection.sendall(b"NONSENSE\r\n\r\n")
            assert connection.makefile("rb").read().endswith(b',"field":""}')
    assert len(service.doors) == 2
    server.close()


def test_a_host_that_is_none_is_said_in_one_line(capsys):
    with pytest.raises(SystemExit, match="cannot listen on no such host"):
        kirosync.listen(kirosync.Service(None, TOKEN, host="no such host"), 1)


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
        connection = socket.create_connection(address_of(self.server), 30, anywhere())
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
                if isinstance(refusal.get("error", refusal.get("code", refusal.get("problem"))), str):
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


@pytest.mark.alone
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
