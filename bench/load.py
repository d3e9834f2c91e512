"""What the benchmarks share: a service of their own, raw connections to it, states of any size, medians in turns."""

import contextlib
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import msgspec  # noqa: E402

import kirosync  # noqa: E402

TOKEN = "bench"
CONSTANT = """
import sys, bottle, waitress
app = bottle.Bottle()
body, threads = b"x" * int(sys.argv[2]), int(sys.argv[3])

@app.get("/")
def constant():
    if bottle.request.get_header("Authorization") != "Bearer bench":
        bottle.abort(401)
    bottle.response.content_type = "application/json"
    return body

waitress.serve(app, host="127.0.0.1", port=int(sys.argv[1]), threads=threads)
"""


class Wrong(Exception):
    """What was measured did not do what it is measured for."""


def check(is_right, what):
    if not is_right:
        raise Wrong(what)


def seconds(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def ms(value):
    return f"{value * 1000:.1f} ms"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stop(process):
    """End *process* and wait for that, kindly for 10 s."""
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


class Program:
    """A process that listens on loopback, ended by ``end`` or at the end of a with block."""

    def __init__(self, argv, port, environment=None):
        self.port, self.url = port, f"http://127.0.0.1:{port}"
        self.log = tempfile.NamedTemporaryFile("r", suffix=".log")  # noqa: SIM115  as long as the process
        started = time.perf_counter()
        with open(self.log.name, "w") as said:
            argv = [sys.executable, *map(str, argv)]
            self.process = subprocess.Popen(argv, env={**os.environ, **(environment or {})}, stderr=said)
        try:
            while not self.is_ready():
                if self.process.poll() is not None:
                    raise Wrong(f"{argv[1]} ended: {Path(self.log.name).read_text()[-2000:]}")
                time.sleep(0.002)
        except BaseException:
            self.end()
            raise
        self.started = time.perf_counter() - started

    def is_ready(self):
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), 1).close()
            return True
        return False

    def end(self):
        stop(self.process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()


class Service(Program):
    """kirosync on a state directory, ready when it says so."""

    def __init__(self, state):
        port = free_port()
        argv = [ROOT / "kirosync.py", "serve", "--port", port, "--state", state]
        super().__init__(argv, port, {"KIROSYNC_TOKEN": TOKEN})

    def is_ready(self):
        return " on http://" in Path(self.log.name).read_text()


class Constant(Program):
    """bottle and waitress, which answer so many bytes to who has the token: what HTTP costs with these parts."""

    def __init__(self, size=100, threads=8):
        super().__init__(["-c", CONSTANT, port := free_port(), size, threads], port)


def request(method, path, body=None, **headers):
    """Return the bytes of a request; a name of *headers* has _ for -."""
    sent = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: Bearer {TOKEN}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += [f"Content-Length: {len(sent)}", "Content-Type: application/json"] if body is not None else []
    return "\r\n".join([*lines, "", ""]).encode() + sent


class Connection:
    """One connection, kept open: a request goes out in one piece, and what comes back is hardly looked at."""

    def __init__(self, program):
        self.socket = socket.create_connection(("127.0.0.1", program.port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.head, self.left, self.chunks = b"", 0, []

    def send(self, sent):
        self.head, self.left, self.chunks = b"", -1, []
        self.socket.sendall(sent)

    def receive(self):
        """Take in what has arrived; return whether the answer is whole."""
        piece = self.socket.recv(1 << 20)
        if not piece:
            raise ConnectionError(f"the server hung up after {self.head[:200]!r}")
        if self.left < 0:
            self.head += piece
            head, found, piece = self.head.partition(b"\r\n\r\n")
            if not found:
                return False
            self.head, status = head, head.split(b" ", 2)[1]
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            self.left = 0 if status in (b"304", b"204") else int(length)
        self.chunks.append(piece)
        self.left -= len(piece)
        return self.left == 0

    def ask(self, sent):
        """Return the body of the answer."""
        self.send(sent)
        while not self.receive():
            pass
        return b"".join(self.chunks)

    def json(self, method, path, body=None, **headers):
        return json.loads(self.ask(request(method, path, body, **headers)))

    def status(self):
        return int(self.head.split(b" ", 2)[1])

    def header(self, name):
        lines = (line.partition(": ") for line in self.head.decode().split("\r\n"))
        return next((value for given, _, value in lines if given.lower() == name.lower()), "")

    def close(self):
        self.socket.close()


class Crowd:
    """Some connections that ask at once, each the next thing as soon as it is answered; driven by one thread."""

    def __init__(self, program, size):
        self.connections = [Connection(program) for _ in range(size)]
        self.selector = selectors.DefaultSelector()
        for connection in self.connections:
            self.selector.register(connection.socket, selectors.EVENT_READ, connection)

    def rush(self, requests, status=200):
        """Send all *requests*; return how long each took (s). Fails if one is answered another *status*."""
        waiting, spent, asked = iter(requests), [], {}

        def go_on(connection):
            asked.pop(connection, None)
            if (following := next(waiting, None)) is not None:
                asked[connection] = time.perf_counter()
                connection.send(following)

        for connection in self.connections:
            go_on(connection)
        while asked:
            for key, _ in self.selector.select():
                if key.data.receive():
                    spent.append(time.perf_counter() - asked[key.data])
                    if key.data.status() != status:
                        raise Wrong(f"answered {key.data.head[:300]!r} {b''.join(key.data.chunks)[:300]!r}")
                    go_on(key.data)
        return spent


def conversation(size, content=1000):
    """Return messages of about *size* bytes in all, each of about so much *content* in real words."""
    words = "the queue holds what the agent has not taken yet, and a reader sees whole records only; "
    text = (words * (content // len(words) + 1))[: content - 80]
    return [
        {
            "role": ("user", "assistant")[number % 2],
            "content": f"{number}: {text}",
            "timestamp": 1_700_000_000_000 + number,
        }
        for number in range(size // content)
    ]


def fill(state, records, kind="documents", start=0):
    """Put *records*, (id, record), into a state directory as kirosync would, without syncing each: return the bytes."""
    store = kirosync.Store(state)
    revision, size, lines = store.revision, 0, []
    store.close()
    for identity, record in records:
        revision += 1
        more = {"revisions": f"{revision}*{len(record['messages'])}"} if kind == "conversations" else {}
        said = {"id": identity, "revision": revision, **more, **record}
        text = msgspec.json.format(msgspec.json.encode(said), indent=2) + b"\n"
        (state / kind / f"{kirosync.name_of(identity)}.json").write_bytes(text)
        size += len(text)
        lines.append(kirosync.Line(revision, 1.0, 1.0, kind, identity, "put", zlib.crc32(text)))
    with open(state / "journal.jsonl", "ab") as journal:
        journal.writelines(msgspec.json.encode(line) + b"\n" for line in lines)
    return size


def documents(count, size=1000):
    text = conversation(size * 2, size)[0]["content"]
    return ((f"d{number}", {"content": f"{number} {text}", "timestamp": number}) for number in range(count))
