#!/usr/bin/env python3
"""Measure what a sync costs, each figure beside its reference from the same run, as a table in Markdown.

    .venv/bin/python bench/run.py [--quick] [--only PATTERN] [--without-peers]

Starts everything itself, in folders of its own below the repository: services, a server that answers a constant,
clients, and the peers of ``bench/peers.py``, which are installed into ``.peers`` if they are not (with ``--quick``
they are left out then). ``--only`` takes the rows whose name contains the PATTERN.

Machines are shared and noisy, so a figure is taken between two of its reference, many times: the ratio is the median
of the ratios of each such round, in parentheses between which half of them lie. The medians stand beside it, and
are no better than the machine was quiet. Answers are checked; the exit code is 1 if one was wrong, or a row failed
to run, but not if a goal was missed. A row without a goal explains the one above.
"""

import argparse
import contextlib
import datetime
import itertools
import json
import operator
import os
import platform
import resource
import selectors
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import peers
from load import (
    ROOT,
    TOKEN,
    Connection,
    Constant,
    Crowd,
    Service,
    check,
    conversation,
    documents,
    fill,
    kirosync,
    ms,
    request,
    seconds,
    stop,
)

CLIENTS = 8  # at once, where the rate is the figure
POLLERS = 200
BIG = 10_000_000  # bytes of the whole answer, and of a long conversation
PUSHED = 1000  # documents
SIZES = (10_000, 100_000, 5000, 10)  # records, many records, items of Radicale, conversations of 10 MB
QUICK_SIZES = (1000, 10_000, 1000, 3)
BASE = 60_000_000  # bytes of memory that the service may have without any state
PEERS = ROOT / ".peers"
ORDER = {"type": "execute_bash", "command": "true # " + "x" * 850}  # whose record is a file of about 1 KiB
ASK_ALL = request("GET", "/sync")
ASK_CONSTANT = request("GET", "/")


class Goal(NamedTuple):
    sense: str
    bound: float
    form: str = "{}"  # how the goal is written, if it is not a ratio

    def __str__(self):
        return f"{self.sense} {self.form.format(self.bound)}"

    def is_reached(self, value):
        return {"at least": operator.ge, "at most": operator.le, "over": operator.gt}[self.sense](value, self.bound)


AHEAD = Goal("over", 1)


class Row(NamedTuple):
    """A line of the table. Rows that stand together and have the same *measure* and *arguments* are one measurement."""

    what: str  # with the sizes of the run in braces
    goal: Goal | None
    measure: str  # the function below that yields its figure
    arguments: tuple = ()
    peer: str = ""  # what must be installed for it


TABLE = [
    Row("GET /sync, If-None-Match, nothing new, {few:,} records", Goal("at least", 0.75), "not_modified"),
    Row("GET /sync?since=head, {few:,} records", Goal("at least", 0.7), "nothing_new"),
    Row("GET /sync?since=head, {many:,} records over 100", Goal("at most", 1.2), "flat"),
    Row("GET /sync, whole, 10 MB", Goal("at least", 0.6), "whole"),
    Row("POST /command, durable, 8 clients", Goal("at least", 0.5, "{} of the smaller"), "commands"),
    Row("the same by the store alone, 8 threads, without HTTP", None, "store_alone"),
    Row("POST /sync, 1 new message in 10 MB", Goal("at most", 2.5), "append"),
    Row("the same, CPU time of the service (user)", None, "append"),
    Row("POST /sync, 1,000 new documents", Goal("at most", 1.5), "push"),
    Row("from POST /sync until who waits has the change", Goal("at most", 5, "{} ms above"), "seen"),
    Row("memory, {few:,} records of 1 KiB", Goal("at most", 2, "60 MB + {} x state"), "memory", ("records",)),
    Row(
        "memory, {talks} conversations of 10 MB", Goal("at most", 2, "60 MB + {} x state"), "memory", ("conversations",)
    ),
    Row("start at {few:,} records, above an empty state", Goal("at most", 3), "start", ("few",)),
    Row("start at {many:,} records, above an empty state", Goal("at most", 3), "start", ("many",)),
    Row("POST /command, p99, 200 waiting for documents", Goal("at most", 2), "beside", ("&only=documents",)),
    Row("POST /command, p99, 200 waiting for everything", Goal("at most", 2), "beside", ("",)),
    Row("pouchdb-server: put a document", AHEAD, "pouch", peer="npm"),
    Row("pouchdb-server: read what changed, one document", AHEAD, "pouch", peer="npm"),
    Row("Radicale, {items:,} items: put an item", AHEAD, "radicale", peer="pip"),
    Row('Radicale, {items:,} items: "anything new?"', AHEAD, "radicale", peer="pip"),
    Row("huey, SQLite: submit to result, no-op", AHEAD, "huey", ("sqlite", False), "pip"),
    Row("huey, SQLite, tuned: the same", AHEAD, "huey", ("sqlite", True), "pip"),
    Row("huey, files: the same", AHEAD, "huey", ("file", False), "pip"),
    Row("huey, files, tuned: the same", AHEAD, "huey", ("file", True), "pip"),
    Row("kirosync: `read_file`, no child process, instead of `true`", None, "no_child"),
]


# ---------------------------------------------------------------- rounds, and what comes of them


def in_rounds(rounds, figure, *references):
    """Return for each round the figure and each reference, this as the mean of what it was before and after.

    *figure* and *references* measure and return a number; each is called once before that counts.
    """
    for take in (figure, *references):
        take()
    before, taken = [take() for take in references], []
    for _ in range(rounds):
        value = figure()
        after = [take() for take in references]
        taken.append((value, *map(statistics.fmean, zip(before, after, strict=True))))
        before = after
    return taken


class Figure(NamedTuple):
    """The columns of a row, and the *value* that its goal is about."""

    figure: str
    reference: str
    ratio: str
    value: float


def compare(taken, form, *names, ratio=operator.truediv, shown="{:.2f}"):
    """Return the Figure of what ``in_rounds`` has *taken*: its *ratio* to each of the references, which *names* name.

    Of two the one that counts is the slower (a rate): it gives the greater ratio.
    """
    figures, *references = zip(*taken, strict=True)
    ratios = [sorted(map(ratio, figures, reference)) for reference in references]
    texts = [f"{name} {form(statistics.median(each))}" for name, each in zip(names, references, strict=True)]
    value = max(map(statistics.median, ratios))
    said = " / ".join(f"{shown.format(statistics.median(each))} ({spread(each, shown)})" for each in ratios)
    return Figure(form(statistics.median(figures)), " / ".join(texts), said, value)


def spread(ordered, shown):
    """Return between which two the middle half of *ordered* lies."""
    quarter = len(ordered) // 4
    return f"{shown.format(ordered[quarter])} to {shown.format(ordered[-1 - quarter])}"


def times_faster(ours, theirs):
    return theirs / ours


def per_second(value):
    return f"{value:,.0f}/s"


def megabytes(value):
    return f"{value / 1e6:,.0f} MB"


def megabytes_per_second(value):
    return f"{megabytes(value)}/s"


def rate(crowd, sent, count, status=200):
    """Return how many requests a second *crowd* gets answered."""
    return count / seconds(lambda: crowd.rush([sent] * count, status))


class Bench:
    """Where it is measured, at what sizes and how often."""

    def __init__(self, folder, quick):
        self.folder, self.quick, self.numbers, self.made = folder, quick, itertools.count(), {}
        names, sizes = ("few", "many", "items", "talks"), QUICK_SIZES if quick else SIZES
        self.sizes = dict(zip(names, sizes, strict=True))

    def rounds(self, full):
        return max(3, full // 6) if self.quick else full

    def new(self):
        """Return a path where nothing is yet."""
        return self.folder / str(next(self.numbers))

    def documents(self, count, size=1000):
        """Return the state directory of so many documents of *size* bytes, made once: it is only to be read."""
        if (count, size) not in self.made:
            self.made[count, size] = state = self.new()
            fill(state, documents(count, size))
            os.sync()  # else the syncs that are measured next pay for it
        return self.made[count, size]


# ---------------------------------------------------------------- reading


def not_modified(bench):
    """304, against the constant; both with 8 connections."""
    with Service(bench.documents(bench.sizes["few"])) as ours, Constant() as constant:
        connection = Connection(ours)
        connection.ask(ASK_ALL)
        sent = request("GET", "/sync", If_None_Match=connection.header("etag"))
        said = connection.ask(sent)
        check(connection.status() == 304 and not said, f"there is something new: {said[:300]}")
        yield compare(requests(bench, ours, constant, sent, 304), per_second, "a constant")


def nothing_new(bench):
    """A delta of nothing, against the constant; both with 8 connections."""
    with Service(bench.documents(bench.sizes["few"])) as ours, Constant() as constant:
        yield compare(requests(bench, ours, constant, ask_for_news(ours)), per_second, "a constant")


def requests(bench, ours, constant, sent, status=200):
    clients, others = Crowd(ours, CLIENTS), Crowd(constant, CLIENTS)
    figure, reference = lambda: rate(clients, sent, 300, status), lambda: rate(others, ASK_CONSTANT, 300)
    return in_rounds(bench.rounds(24), figure, reference)


def ask_for_news(service):
    """Return the request for what is new, after checking that nothing is."""
    connection = Connection(service)
    cursor = connection.json("GET", "/sync")["cursor"]
    sent = request("GET", f"/sync?since={cursor}")
    said = json.loads(connection.ask(sent))
    is_right = connection.status() == 200 and said["cursor"] == cursor and "full" not in said
    check(is_right and not any(said[kind] for kind in (*kirosync.KINDS, "deleted")), f"not nothing: {said}"[:500])
    return sent


def flat(bench):
    """The time of a delta of nothing with many records, against that with 100."""
    many, few = bench.documents(bench.sizes["many"]), bench.documents(100)
    with Service(many) as large, Service(few) as small:

        def turn(service):
            clients, sent = Crowd(service, CLIENTS), ask_for_news(service)
            return lambda: seconds(lambda: clients.rush([sent] * 300)) / 300

        yield compare(in_rounds(bench.rounds(24), turn(large), turn(small)), ms, "100 records")


def whole(bench):
    """The bytes of a whole answer, against a constant of the same size; each on one connection."""
    count = bench.sizes["few"]
    with Service(bench.documents(count, BIG // count)) as ours:
        connection = Connection(ours)
        size = len(raw := connection.ask(ASK_ALL))
        said = json.loads(raw)["documents"]
        check(len(said) == count and said["d7"]["content"].startswith("7 0: the queue"), "not the whole state")

        def answered(connection, sent):
            took = seconds(lambda: connection.ask(sent))
            got = sum(map(len, connection.chunks))
            check(connection.status() == 200 and abs(got - size) < 100, f"{connection.head} and {got} bytes")
            return got / took

        with Constant(size) as constant:
            other = Connection(constant)
            taken = in_rounds(
                bench.rounds(30), lambda: answered(connection, ASK_ALL), lambda: answered(other, ASK_CONSTANT)
            )
        yield compare(taken, megabytes_per_second, "a constant")


# ---------------------------------------------------------------- writing


def write_durably(path, text):
    """Write aside, sync, rename."""
    fd = os.open(f"{path}.aside", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        check(os.write(fd, text) == len(text), "the disk is full")
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(f"{path}.aside", path)


class Files:
    """Threads that each write one small file after the other, durably, the folder included."""

    def __init__(self, folder):
        folder.mkdir()
        self.folder, self.turns = folder, itertools.count()

    def rate(self, each=50):
        """Return how many files a second 8 threads write, *each* so many."""
        turn = next(self.turns)
        return rate_of_threads(lambda thread: self.write(f"{turn}-{thread}", each), each)

    def write(self, name, each):
        fd = os.open(self.folder, os.O_RDONLY)
        try:
            for number in range(each):
                write_durably(self.folder / f"{name}-{number}", b"x" * 1024)
                os.fsync(fd)
        finally:
            os.close(fd)


def rate_of_threads(work, each):
    """Return how much is done a second when as many threads as there are clients do *work*, *each* so much."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        return CLIENTS * each / seconds(lambda: [*pool.map(work, range(CLIENTS))])


def commands(bench):
    """Commands posted by 8 clients, against as many threads that write files, and against the constant."""
    state, posted, sent = bench.new(), itertools.count(), request("POST", "/command", ORDER)
    each = 100 if bench.quick else 400
    with Service(state) as ours, Constant() as constant:
        clients, others, files = Crowd(ours, CLIENTS), Crowd(constant, CLIENTS), Files(bench.new())

        def post():
            next(posted)
            return rate(clients, sent, each)

        taken = in_rounds(bench.rounds(10), post, files.rate, lambda: rate(others, ASK_CONSTANT, 400))
        count, queued = each * next(posted), Connection(ours).json("GET", "/sync")["commands"]
        check(len(queued) == count and count_files(state) == count, f"{len(queued)} of {count} commands")
        check({each["command"] for each in queued.values()} == {ORDER["command"]}, "not what was posted")
        yield compare(taken, per_second, "8 threads writing files", "a constant")


def count_files(state, kind="commands"):
    return sum(name.endswith(".json") for name in os.listdir(state / kind))


def store_alone(bench):
    """The store in this process, told by 8 threads to queue commands, against 8 threads that write files."""
    state, files, turns, each = bench.new(), Files(bench.new()), itertools.count(), 50
    with contextlib.closing(kirosync.Store(state)) as store:

        def queue(_):
            for _ in range(each):
                store.change(lambda pen: kirosync.queue(pen, dict(ORDER)))

        def turn():
            next(turns)
            return rate_of_threads(queue, each)

        taken = in_rounds(bench.rounds(10), turn, files.rate)
    count = CLIENTS * each * next(turns)
    check(count_files(state) == count, f"{count_files(state)} of {count} commands are there")
    yield compare(taken, per_second, "8 threads writing files")


class Writer:
    """A client that adds messages to a conversation, and asks for what has changed since it asked last."""

    numbers = itertools.count()  # of all of them: no message is sent twice

    def __init__(self, service, identity):
        self.connection, self.identity = Connection(service), identity
        self.cursor = self.connection.json("GET", "/sync?only=documents")["cursor"]

    def add(self):
        """Return how long (s) it took; fail unless the answer has exactly the new message."""
        message = {"role": "user", "content": "hi", "timestamp": 1_800_000_000_000 + next(self.numbers)}
        push = {"conversations": {self.identity: [message]}}
        sent = request("POST", f"/sync?since={self.cursor}", push)
        took = seconds(lambda: self.connection.ask(sent))
        said = json.loads(b"".join(self.connection.chunks)).get("data", {})
        check(self.connection.status() == 200 and "full" not in said, f"answered {self.connection.head}")
        check({kind: said[kind] for kind in kirosync.KINDS if said[kind]} == push, f"not the delta: {said}"[:500])
        self.cursor = said["cursor"]
        return took


def append(bench):
    """A message into 10 MB, against writing and syncing those 10 MB, and its CPU time against msgspec's."""
    state, file = bench.new(), bench.new()
    size = fill(state, [("big", {"messages": conversation(BIG)})], "conversations")
    os.sync()
    with Service(state) as ours:
        writer, text = Writer(ours, "big"), b"x" * size
        yield compare(
            in_rounds(bench.rounds(30), writer.add, lambda: seconds(lambda: write_durably(file, text))),
            ms,
            "write and sync 10 MB",
        )
        raw, times = Connection(ours).ask(ASK_ALL), 20
        check(len(json.loads(raw)["conversations"]["big"]) > BIG // 1000, "the conversation is not whole")

        def used():
            before = cpu_of(ours.process.pid)
            for _ in range(times):
                writer.add()
            return (cpu_of(ours.process.pid) - before) / times

        taken = in_rounds(bench.rounds(12), used, lambda: cpu_of_json(raw))
        yield compare(taken, ms, "decode and encode 10 MB by msgspec")


def cpu_of(pid):
    """Return the CPU time (s) that a process has spent as its own, to 10 ms."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]) / os.sysconf("SC_CLK_TCK")


def cpu_of_json(raw):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    msgspec.json.encode(msgspec.json.decode(raw))
    return resource.getrusage(resource.RUSAGE_SELF).ru_utime - before


def push(bench):
    """1,000 documents sent at once, against writing as many files of that size one after the other, durably."""
    state, folder, turns = bench.new(), bench.new(), itertools.count()
    folder.mkdir()
    with Service(state) as ours:
        connection = Connection(ours)
        cursor = connection.json("GET", "/sync")["cursor"]

        def send():
            nonlocal cursor
            turn = next(turns)
            sent = {f"{turn}-{identity}": document for identity, document in documents(PUSHED)}
            posted = request("POST", f"/sync?since={cursor}", {"documents": sent})
            took = seconds(lambda: connection.ask(posted))
            said = json.loads(b"".join(connection.chunks)).get("data", {})
            check(connection.status() == 200 and said["documents"] == sent, f"not the delta: {said}"[:500])
            cursor = said["cursor"]
            return took

        def write():
            turn, text = next(turns), b"x" * 1100
            return seconds(lambda: [write_durably(folder / f"{turn}-{n}", text) for n in range(PUSHED)])

        rounds = bench.rounds(8)
        taken = in_rounds(rounds, send, write)
    count = count_files(state, "documents")
    check(count == PUSHED * (rounds + 1), f"there are {count} documents")
    yield compare(taken, ms, "1,000 files written, synced, renamed")


# ---------------------------------------------------------------- waiting


def seen(bench):
    """From sending a document until another client, which waits, has it; against 3 bare round trips."""
    numbers = itertools.count()
    with Service(bench.new()) as ours, Constant() as constant:
        writer, waiter, other = Connection(ours), Connection(ours), Connection(constant)
        cursor = waiter.json("GET", "/sync")["cursor"]

        def change():
            nonlocal cursor
            push = {"documents": {f"d{next(numbers)}": {"content": "x" * 1000, "timestamp": 1}}}
            posted = request("POST", f"/sync?since={cursor}", push)
            waiter.send(request("GET", f"/sync?since={cursor}&wait=20"))
            time.sleep(0.03)  # until it is waited for
            started = time.perf_counter()
            writer.send(posted)
            while not waiter.receive():
                pass
            took = time.perf_counter() - started
            while not writer.receive():
                pass
            said = json.loads(b"".join(waiter.chunks))
            check(writer.status() == waiter.status() == 200, f"answered {writer.head} and {waiter.head}")
            check(said["documents"] == push["documents"], f"who waited was told {said}"[:500])
            cursor = said["cursor"]
            return took * 1000

        def round_trips():
            return 3 * statistics.median(seconds(lambda: other.ask(ASK_CONSTANT)) for _ in range(9)) * 1000

        taken = in_rounds(bench.rounds(100), change, round_trips)
        yield compare(taken, "{:.1f} ms".format, "3 round trips", ratio=operator.sub, shown="{:+.1f} ms")


class Pollers:
    """Another process with so many clients which wait for a change, and then for the next."""

    def __init__(self, service, query):
        argv = [sys.executable, __file__, "--poll", str(service.port), query]
        self.process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self):
        check(self.process.stdout.readline() == "waiting\n", "the clients that wait did not start")
        time.sleep(0.5)
        return self

    def told(self):
        """End it, and return of how many commands the first of them was told."""
        return int(self.process.communicate(timeout=20)[0] or -1)

    def __exit__(self, *_):
        stop(self.process)
        self.process.stdin.close()
        self.process.stdout.close()


def poll(port, query):
    """Be those clients, until stdin ends."""
    selector, service = selectors.DefaultSelector(), argparse.Namespace(port=int(port))
    first, *others = [Connection(service) for _ in range(POLLERS)]
    cursor, told = first.json("GET", "/sync?only=documents")["cursor"], 0
    selector.register(sys.stdin, selectors.EVENT_READ)
    for connection in (first, *others):
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send(request("GET", f"/sync?since={cursor}&wait=50{query}"))
    print("waiting", flush=True)
    while True:
        for key, _ in selector.select():
            if (connection := key.data) is None:
                return print(told)
            if connection.receive():
                check(connection.status() == 200, f"answered {connection.head}")
                if connection is first:
                    told += len(json.loads(b"".join(first.chunks)).get("commands", ()))
                cursor = connection.header("etag").removeprefix("W/").strip('"')
                connection.send(request("GET", f"/sync?since={cursor}&wait=50{query}"))


def beside(bench, query):
    """The p99 of one client's POST /command while 200 long-poll, against another service where none do."""
    laps, each, sent = itertools.count(), 60 if bench.quick else 150, request("POST", "/command", ORDER)
    with Service(bench.new()) as busy, Service(bench.new()) as alone, Pollers(busy, query) as pollers:
        one, other = Crowd(busy, 1), Crowd(alone, 1)

        def lap():
            next(laps)
            p99 = percentile(one.rush([sent] * each), 99)
            time.sleep(0.1 if query else 0.8)  # until all have been told
            return p99

        taken = in_rounds(bench.rounds(8), lap, lambda: percentile(other.rush([sent] * each), 99))
        wanted = 0 if query else each * next(laps)
        told = pollers.told()
        check(told == wanted, f"who waits was told of {told} commands, not of {wanted}")
        yield compare(taken, ms, "none waiting")


def percentile(values, part):
    return sorted(values)[int(len(values) * part / 100)]


# ---------------------------------------------------------------- memory, start


def memory(bench, kind):
    """The service's memory after a whole answer and ten changes, against the bytes of its state."""
    state = bench.new()
    if kind == "records":
        fill(state, documents(bench.sizes["few"], 1024))
    talks = bench.sizes["talks"]
    for number in range(talks):
        messages = conversation(1000 if kind == "records" else BIG)
        fill(state, [(f"c{number}", {"messages": messages})], "conversations")
    size = sum(path.stat().st_size for kind in kirosync.KINDS for path in (state / kind).iterdir())
    with Service(state) as ours:
        said = Connection(ours).json("GET", "/sync")
        check(len(said["conversations"]) == talks, "not the whole state")
        check(len(said["documents"]) == (bench.sizes["few"] if kind == "records" else 0), "not the whole state")
        del said
        for number in range(10):
            Writer(ours, f"c{number % talks}").add()
        used, what = memory_of(ours.process.pid)
    value = (used - BASE) / size
    yield Figure(f"{megabytes(used)} ({what})", f"state {megabytes(size)}", f"60 MB {value:+.2f} x state", value)


def memory_of(pid):
    """Return the memory (bytes) of a process, and what is counted: what it shares counts in parts, if we may know."""
    with contextlib.suppress(PermissionError):
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(text.partition("\nPss:")[2].split()[0]) * 1024, "Pss"
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize(), "Rss"


def start(bench, size):
    """From the service's start until it has read its state, less that with none, against reading the files once."""
    count = bench.sizes[size]
    state, empty = bench.documents(count), bench.documents(0)

    def started(state):
        with Service(state) as ours:
            return ours.started

    def read():
        for entry in os.scandir(state / "documents"):
            with open(entry.path, "rb") as file:
                file.read()

    check(count_files(state, "documents") == count, f"there are not {count} files")
    rounds = bench.rounds(3 if size == "many" else 8)
    taken = in_rounds(rounds, lambda: started(state) - started(empty), lambda: seconds(read))
    with Service(state) as ours:
        check(len(Connection(ours).json("GET", "/sync")["documents"]) == count, "not the whole state")
    yield compare(taken, ms, "read those files once")


# ---------------------------------------------------------------- peers


class Ours(peers.Server):
    """kirosync, asked by the same client as the peers are, and as they are by one at a time."""

    def __init__(self, service, folder):
        super().__init__(PEERS, folder)
        self.port, self.log = service.port, Path(service.log.name)

    def start(self):
        self.cursor = json.loads(self.ask("GET", "/sync"))["cursor"]

    def ask(self, method, path, body=None, **headers):
        return super().ask(method, path, body, Authorization=f"Bearer {TOKEN}", **headers)

    def post(self, path, body):
        return json.loads(self.ask("POST", path, json.dumps(body), Content_Type="application/json"))

    def put(self, number):
        """Put a new document of about 1 KiB."""
        document = {"content": f"{number} {peers.TEXT}", "timestamp": number}
        said = self.post(f"/sync?since={self.cursor}", {"documents": {f"p{number}": document}})["data"]
        check(said["documents"] == {f"p{number}": document}, f"not the delta: {said}"[:500])
        self.cursor = said["cursor"]

    def changes(self, since):
        return json.loads(self.ask("GET", f"/sync?since={since}"))["documents"]

    def run(self, order):
        """Have a command run, and return its result."""
        said = self.post("/command?wait=20", order)
        check(said.get("outcome") == "ok", f"the command ended so: {said}")
        return said["result"]


def repeat(times, work):
    """Return what times the *work*: a function that returns how long (s) it took on average."""
    return lambda: seconds(lambda: [work() for _ in range(times)]) / times


def pouch(bench):
    """A new document put, and a change read, by both; each in an empty database. Pouch syncs nothing to disk."""
    numbers = itertools.count(1)
    with (
        peers.Pouch(PEERS, bench.new()) as pouch,
        Service(bench.new()) as service,
        Ours(service, bench.new()) as ours,
    ):
        ways = [repeat(5, lambda each=each: each.put(next(numbers))) for each in (ours, pouch)]
        yield compare(in_rounds(bench.rounds(30), *ways), ms, "pouchdb-server", ratio=times_faster)
        head, cursor, newest = pouch.head(), ours.cursor, next(numbers)
        pouch.put(newest)
        ours.put(newest)
        check([each["id"] for each in pouch.changes(head)["results"]] == [f"d{newest}"], "not what pouch was given")
        check(ours.changes(cursor).keys() == {f"p{newest}"}, "not what changed")
        ways = [repeat(10, lambda: ours.changes(cursor)), repeat(10, lambda: pouch.changes(head))]
        yield compare(in_rounds(bench.rounds(30), *ways), ms, "pouchdb-server", ratio=times_faster)


def radicale(bench):
    """An item put, and its cheapest way to say that nothing is new; both have as many items."""
    count = bench.sizes["items"]
    ids, their_ids, state = itertools.count(count), itertools.count(count), bench.new()
    fill(state, documents(count))
    with (
        peers.Radicale(PEERS, bench.new()) as radicale,
        Service(state) as service,
        Ours(service, bench.new()) as ours,
    ):
        radicale.fill(count)
        os.sync()
        token = radicale.token()
        ways = [repeat(1, lambda: ours.put(next(ids))), repeat(1, lambda: radicale.put(next(their_ids)))]
        yield compare(in_rounds(bench.rounds(6), *ways), ms, "Radicale", ratio=times_faster)
        news, token = radicale.anything_new(token), radicale.token()
        check(len(news) == next(their_ids) - count, f"Radicale told of {len(news)} items")
        check(radicale.anything_new(token) == [] and ours.changes(ours.cursor) == {}, "something is new")
        questions = [radicale.token, radicale.ctag, lambda: radicale.anything_new(token)]
        cheapest = min(questions, key=lambda ask: min(seconds(ask) for _ in range(2)))
        ways = [repeat(3, lambda: ours.changes(ours.cursor)), repeat(1, cheapest)]
        yield compare(in_rounds(bench.rounds(6), *ways), ms, "Radicale", ratio=times_faster)


@contextlib.contextmanager
def working(bench):
    """A service and an agent on its folder, which has done something already."""
    state = bench.new()
    with Service(state) as service, Ours(service, bench.new()) as ours:
        argv = [sys.executable, ROOT / "agent.py", "--state", state, "--name", "bench"]
        process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        try:
            ours.run({"type": "execute_bash", "command": "true"})
            yield ours
        finally:
            stop(process)


def huey(bench, kind, tuned):
    """A command `true` from POST /command to its result, a child process included, against a task that does nothing,
    in a thread of huey's consumer."""
    order = {"type": "execute_bash", "command": "true"}
    with working(bench) as ours, peers.Huey(PEERS, bench.new(), kind, tuned) as huey:
        taken = in_rounds(bench.rounds(40 if tuned else 20), repeat(1, lambda: ours.run(order)), huey.round)
    yield compare(taken, ms, "huey", ratio=times_faster)


def no_child(bench):
    """A file of 2 bytes read by the agent, against a child process started by it."""
    path, child = bench.new(), {"type": "execute_bash", "command": "true"}
    path.write_text("hi")
    order = {"type": "read_file", "path": str(path)}
    with working(bench) as ours:
        check(ours.run(order)["content"] == "hi", "not what the file says")
        ways = [repeat(1, lambda each=each: ours.run(each)) for each in (order, child)]
        yield compare(in_rounds(bench.rounds(60), *ways), ms, "`true`")


# ---------------------------------------------------------------- the table


def line(*cells):
    print("|", " | ".join(cells), "|", flush=True)


def run_group(bench, rows):
    """Measure *rows*, (row, whether it is wanted), which are one measurement; print them, and return whether it ran."""
    first, printed = rows[0][0], 0
    os.sync()  # else the syncs of these rows pay for what those before have left
    try:
        with contextlib.closing(globals()[first.measure](bench, *first.arguments)) as figures:
            for (row, is_wanted), figure in zip(rows, figures, strict=True):
                reached = "yes" if row.goal and row.goal.is_reached(figure.value) else "no" if row.goal else ""
                cells = figure.figure, figure.reference, figure.ratio, str(row.goal or ""), reached
                if is_wanted:
                    line(row.what.format_map(bench.sizes), *cells)
                printed += 1
    except Exception:  # of a program of ours or a peer; the other rows may still be measured
        traceback.print_exc()
        for row, _ in rows[printed:]:
            line(row.what.format_map(bench.sizes), "failed", "", "", str(row.goal or ""), "")
        return False
    return True


def left_out(kinds, quick):
    """Return {kind: why} of the peers that there are not; install them, unless it is to be *quick*."""
    why = {}
    for kind in kinds:
        stamp = PEERS / f"installed-{kind}"
        if quick and not (stamp.exists() and stamp.read_text() == "\n".join(peers.PINS[kind])):
            why[kind] = "not installed, which --quick does not do"
            continue
        try:
            peers.install(PEERS, [kind])
        except peers.NotInstalled as error:
            why[kind] = str(error)
    return why


def footer(kinds):
    """Return when, where and against what it was measured."""
    versions = [pin.replace("==", " ").replace("@", " ") for kind in kinds for pin in peers.PINS[kind]]
    if "npm" in kinds:
        node = subprocess.run([shutil.which("node"), "--version"], capture_output=True, text=True, check=True)
        versions.append(f"node {node.stdout.strip().removeprefix('v')}")
    python = f"Python {platform.python_version()}"
    return ", ".join([f"{datetime.date.today()}", f"{os.cpu_count()} cores", python, *versions]) + "."


def arguments_of():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds and records, no peer installed")
    parser.add_argument("--only", metavar="PATTERN", default="", help="the rows whose name contains it")
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--poll", nargs=2, metavar=("PORT", "QUERY"), help=argparse.SUPPRESS)
    return parser.parse_args()


def end_by_signal(number, _):
    """Unwind, so that every process is ended and every folder removed; being told so twice does not hinder it."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main():
    arguments = arguments_of()
    if arguments.poll:
        return poll(*arguments.poll)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end_by_signal)
    for name in [name for name in os.environ if name.startswith("KIROSYNC_")]:
        del os.environ[name]
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-", ignore_cleanup_errors=True) as folder:
        bench = Bench(Path(folder), arguments.quick)
        wanted = [row for row in TABLE if arguments.only.lower() in row.what.format_map(bench.sizes).lower()]
        wanted = [row for row in wanted if not (row.peer and arguments.without_peers)]
        kinds = sorted({row.peer for row in wanted} - {""}, reverse=True)  # pip before npm
        missing = left_out(kinds, arguments.quick)
        line("what", "figure", "reference in the same run", "ratio", "goal", "reached")
        line(*["---"] * 6)
        has_run = []
        for _, group in itertools.groupby(TABLE, key=lambda row: row[2:]):
            rows = [(row, row in wanted) for row in group if row.peer not in missing]
            if any(is_wanted for _, is_wanted in rows):
                has_run.append(run_group(bench, rows))
        print(f"\n{footer([kind for kind in kinds if kind not in missing])}")
        for kind, reason in missing.items():
            print(f"Left out: {', '.join(peers.PINS[kind])}: {reason}")
    return 0 if all(has_run) and (arguments.quick or not missing) else 1


if __name__ == "__main__":
    sys.exit(main())
