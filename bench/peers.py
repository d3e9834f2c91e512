#!/usr/bin/env python3
"""Run three peers for real, on loopback, for the benchmarks to compare with.

    python bench/peers.py [FOLDER]

Installs them below FOLDER (.peers), once, and prints how long each question to each of them takes. Wants npm and
node for the first, and a Python with venv for the others; nothing but the standard library for itself.

- ``Pouch``: pouchdb-server on LevelDB, documents that are synced by a feed of changes.
- ``Radicale``: CardDAV, one file an item, synced by tokens.
- ``Huey``: a task queue in an SQLite database or in files.

Each is a context manager: its process runs within the with block, on a free port and a state folder, and not after.

What they sync to disk, as strace sees it with the versions below, is not the same, and belongs beside their figures:

- Pouch, a put: nothing. It writes to LevelDB without ``sync``; a power cut loses what the kernel had not written yet.
- Radicale, a PUT: six fsyncs: the item, its cache entry and its history entry, each time the file and then the folder.
  A question syncs nothing, but that the first that is answered a new token syncs what it keeps of that: file, folder.
- Huey with SQLite (WAL, synchronous=FULL): four fdatasyncs a round, one for each commit: the task in, the task out,
  the result in, the result out.
- Huey with files: nothing.
"""

import argparse
import contextlib
import http.client
import itertools
import json
import re
import select
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PINS = {"npm": ["pouchdb-server@4.2.0"], "pip": ["radicale==3.9.0", "huey==3.5.4"]}  # what the figures are of
PATIENCE_S = 120  # for a peer to start, or to answer: Radicale takes 15 s and more to be filled with 5,000 items
INSTALLATION_S = 900  # for npm or pip to give up a slow registry
TUNED = ["-d", "0.005", "-m", "0.01", "-b", "1"]  # huey's consumer looks every 5 ms, not every 0.1 s and ever seldomer
WORDS = "the queue holds what the agent has not taken yet, and a reader sees whole records only; "
TEXT = (WORDS * 12)[:1000]
TASKS = """
import sys, time, huey

queue = {queue}

@queue.task()
def nothing():
    return True  # of None huey keeps no result

def rounds():
    for _ in sys.stdin:
        started = time.perf_counter()
        nothing().get(blocking=True, timeout={patience}, **{waiting})
        print(time.perf_counter() - started, flush=True)
"""
QUEUES = {"sqlite": "huey.SqliteHuey(filename='queue.db')", "file": "huey.FileHuey(path='queue')"}
SYNC = """<sync-collection xmlns="DAV:"><sync-token>{token}</sync-token><sync-level>1</sync-level>
<prop><getetag/></prop></sync-collection>"""
PROPERTY = '<propfind xmlns="DAV:" xmlns:s="http://calendarserver.org/ns/"><prop><{name}/></prop></propfind>'


class PeerError(Exception):
    """Why there are no figures of a peer."""


class NotInstalled(PeerError):
    pass


# ---------------------------------------------------------------- installation


def install(folder, kinds=("pip", "npm")):
    """Make what the peers need below *folder*, once: with "pip" Radicale and Huey, with "npm" Pouch.

    Raises NotInstalled, with the reason; as pip comes first, what it made is there when it is npm that fails.
    """
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    for kind in kinds:
        stamp, pins = folder / f"installed-{kind}", "\n".join(PINS[kind])
        if not stamp.exists() or stamp.read_text() != pins:
            INSTALLERS[kind](folder, PINS[kind])
            stamp.write_text(pins)


def install_with_pip(folder, pins):
    run([sys.executable, "-m", "venv", "--clear", folder / "venv"])
    run([folder / "venv/bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pins])


def install_with_npm(folder, pins):
    """Without npm's scripts: all they would do is compile sqlite3, for a minute and a half, and LevelDB, which is used
    here, comes compiled."""
    if missing := [name for name in ("node", "npm") if not shutil.which(name)]:
        raise NotInstalled(f"pouchdb-server needs {' and '.join(missing)}, which this machine does not have")
    (folder / "package.json").write_text('{"private": true}\n')  # else npm looks for one in the folders above
    run(["npm", "install", "--prefix", folder, "--ignore-scripts", "--no-audit", "--no-fund", *pins])


INSTALLERS = {"pip": install_with_pip, "npm": install_with_npm}


def run(argv):
    argv = [str(part) for part in argv]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALLATION_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{' '.join(argv)}: {error}") from error
    if done.returncode:
        raise NotInstalled(f"{' '.join(argv)} failed: {last_lines(done.stdout + done.stderr)}")


def last_lines(text, count=15):
    return "\n".join(text.strip().splitlines()[-count:])


# ---------------------------------------------------------------- processes and connections


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Peer:
    """A peer installed below *peers*, with its state in *folder*: runs from ``start``, within a with block."""

    def __init__(self, peers, folder):
        self.peers, self.folder = peers.resolve(), folder.resolve()
        self.log = self.folder / "log"
        self.processes = []

    def __enter__(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_):
        self.end()

    def spawn(self, *argv, **options):
        """Start a process in the state folder; what it says goes to the log."""
        argv = [str(part) for part in argv]
        with open(self.log, "ab") as said:
            options = {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said, **options}
            try:
                self.processes.append(subprocess.Popen(argv, cwd=self.folder, **options))
            except OSError as error:
                raise NotInstalled(f"{argv[0]}: {error}") from error
        return self.processes[-1]

    def wait_until(self, is_ready, process):
        until = time.monotonic() + PATIENCE_S
        while not is_ready():
            if process.poll() is not None:
                raise self.failure(f"ended at its start with exit code {process.returncode}")
            if time.monotonic() > until:
                raise self.failure(f"is not ready after {PATIENCE_S} s")
            time.sleep(0.01)

    def end(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def failure(self, what):
        """Return the error that says *what* went wrong and what the peer said last."""
        said = self.log.read_text(errors="replace")
        return PeerError(f"{type(self).__name__} {what}; it said last: {last_lines(said)}")


class Server(Peer):
    """A peer that is asked over HTTP, on one connection which is kept open for as long as the peer lets it."""

    connection = None

    def listen(self, port, *argv):
        """Start the server, and return when it listens on *port*."""
        self.port = port
        self.wait_until(self.connect, self.spawn(*argv))

    def connect(self):
        """Return whether there is a connection now."""
        self.disconnect()
        with contextlib.suppress(ConnectionRefusedError):
            self.connection = socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self.connection is not None

    def is_hung_up(self):
        """Return whether the peer has ended the connection meanwhile, as node does after 5 s without a question."""
        poll = select.poll()
        poll.register(self.connection, select.POLLIN)
        return bool(poll.poll(0))

    def disconnect(self):
        if self.connection:
            self.connection.close()
        self.connection = None

    def ask(self, method, path, body=None, **headers):
        """Return the body of the answer; a name of *headers* has _ for -. The request goes out in one piece, which
        http.client would send in two."""
        if (self.connection is None or self.is_hung_up()) and not self.connect():
            raise self.failure("does not listen any more")
        sent = (body or "").encode()
        headers = {"Host": "127.0.0.1", **headers, **({} if body is None else {"Content-Length": len(sent)})}
        lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        try:
            self.connection.sendall("\r\n".join([f"{method} {path} HTTP/1.1", *lines, "", ""]).encode() + sent)
            answer = http.client.HTTPResponse(self.connection, method=method)
            answer.begin()
            said = answer.read()
        except (OSError, http.client.HTTPException) as error:
            raise self.failure(f"did not answer {method} {path} ({error!r})") from error
        if answer.will_close:
            self.disconnect()
        if answer.status >= 300:
            raise self.failure(f"answered {method} {path} with {answer.status} {said[:300]!r}")
        return said

    def end(self):
        self.disconnect()
        super().end()


# ---------------------------------------------------------------- the peers


class Pouch(Server):
    """pouchdb-server on LevelDB, with one database. Its log goes to a file, and is not followed on stdout as well."""

    def start(self):
        port, program = free_port(), self.peers / "node_modules/pouchdb-server/bin/pouchdb-server"
        where = ["--port", port, "--dir", self.folder, "--config", self.folder / "config.json"]
        self.listen(port, "node", program, *where, "-n")  # its long form, --no-stdout-logs, does not do it
        self.ask("PUT", "/bench", "")

    def put(self, number):
        """Put a new document of about 1 KiB."""
        document = json.dumps({"content": f"{number} {TEXT}", "timestamp": number})
        self.ask("PUT", f"/bench/d{number}", document, Content_Type="application/json")

    def head(self):
        """Return the number of the latest change."""
        return json.loads(self.ask("GET", "/bench"))["update_seq"]

    def changes(self, since):
        """Return what changed after *since*: ``results``, each with its ``doc``, and ``last_seq``."""
        said = json.loads(self.ask("GET", f"/bench/_changes?since={since}&include_docs=true"))
        if not all("content" in each["doc"] for each in said["results"]):
            raise self.failure(f"answered changes without their documents: {said}")
        return said


class Radicale(Server):
    """Radicale with one address book, in files, which it syncs to disk as it does by default.

    Its own server speaks HTTP/1.0 and hangs up after each answer, so that each question brings its connection; that
    is what Radicale's users have.
    """

    LOGIN = "Basic YmVuY2g6YmVuY2g="  # bench:bench, whom it believes; but who owns the address book must be said
    BOOK = "/bench/book/"

    def start(self):
        port = free_port()
        settings = ["--config", "", "--hosts", f"127.0.0.1:{port}", "--auth-type", "none"]
        settings += ["--storage-filesystem-folder", self.folder / "collections"]
        self.listen(port, self.peers / "venv/bin/radicale", *settings)
        self.fill(1)

    def ask(self, method, path, body=None, **headers):
        return super().ask(method, path, body, Authorization=self.LOGIN, **headers)

    def put(self, number):
        """Put a new item of about 1 KiB; *number* is not one that ``fill`` has put."""
        self.ask("PUT", f"{self.BOOK}i{number}.vcf", card(number), Content_Type="text/vcard")

    def fill(self, count):
        """Make the address book anew, of the items 0 to *count* - 1, with the caches that Radicale answers from."""
        self.ask("PUT", self.BOOK, "".join(map(card, range(count))), Content_Type="text/vcard")
        self.token()

    def token(self):
        """Return the sync-token, which says what state the address book is in."""
        return self.read_property("sync-token")

    def ctag(self):
        """Return the other such tag, of which it is only known whether it has changed."""
        return self.read_property("s:getctag")

    def read_property(self, name):
        said = self.ask("PROPFIND", self.BOOK, PROPERTY.format(name=name), Depth="0").decode()
        found = re.search(f"<[^<>/]*{name.rpartition(':')[2]}>([^<]+)<", said)
        if not found:
            raise self.failure(f"answered no {name}: {said}")
        return found[1]

    def anything_new(self, token):
        """Return the items (paths) that changed after *token*, none if nothing has: a REPORT sync-collection."""
        said = self.ask("REPORT", self.BOOK, SYNC.format(token=token)).decode()
        return re.findall("<href>([^<]+)</href>", said)


def card(number):
    """Return a vCard of about 1 KiB."""
    note = TEXT.replace(",", "\\,")
    lines = ["BEGIN:VCARD", "VERSION:3.0", f"UID:i{number}", f"FN:Item {number}", f"N:{number};Item;;;", f"NOTE:{note}"]
    return "\r\n".join([*lines, "END:VCARD", ""])


class Huey(Peer):
    """A huey of a *kind* ("sqlite" or "file"), its consumer, and a child that asks it, told over stdin.

    By default the consumer looks for tasks every 0.1 s, and when there are none after 1.15 times as long, and again,
    up to 10 s; who waits for a result looks after 50 ms, and so on. *tuned*, both look every 5 to 10 ms.
    """

    def __init__(self, peers, folder, kind, tuned=False):
        super().__init__(peers, folder)
        self.child = None
        self.kind, self.settings = kind, TUNED if tuned else []
        self.waiting = {"backoff": 1, "max_delay": 0.01} if tuned else {}

    def start(self):
        text = TASKS.format(queue=QUEUES[self.kind], patience=PATIENCE_S, waiting=self.waiting)
        (self.folder / "tasks.py").write_text(text)
        self.consumer = self.spawn(self.peers / "venv/bin/huey_consumer", "tasks.queue", *self.settings)
        self.wait_until(lambda: "consumer started" in self.log.read_text(), self.consumer)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        python = self.peers / "venv/bin/python"
        self.child = self.spawn(python, "-c", "import tasks; tasks.rounds()", **pipes)
        self.round()

    def round(self):
        """Enqueue a task that does nothing; return how long (s) it took until its result was there."""
        with contextlib.suppress(BrokenPipeError):
            self.child.stdin.write("\n")
            self.child.stdin.flush()
        if not (said := self.child.stdout.readline()):
            raise self.failure("did not do a round")
        return float(said)

    def end(self):
        super().end()
        if self.child:
            self.child.communicate()


# ---------------------------------------------------------------- self-test


def row(peer, what, work, times=30):
    """Print the median of what *work* takes (ms), or says that it took."""
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        said = work()
        spent.append(said if isinstance(said, float) else time.perf_counter() - started)
    print(f"{peer:20} {what:40} {statistics.median(spent) * 1000:8.2f} ms", flush=True)


def try_pouch(peers, folder):
    numbers = itertools.count(1)
    with Pouch(peers, folder) as pouch:
        row("pouch", "put", lambda: pouch.put(next(numbers)))
        row("pouch", "head", pouch.head)
        head, newest = pouch.head(), next(numbers)
        pouch.put(newest)
        row("pouch", "changes, one new", lambda: pouch.changes(head))
        row("pouch", "changes, none new", lambda: pouch.changes(head + 1))
        assert [each["id"] for each in pouch.changes(head)["results"]] == [f"d{newest}"], pouch.changes(head)


def try_radicale(peers, folder, items):
    numbers = itertools.count(items)
    with Radicale(peers, folder) as radicale:
        row(f"radicale, {items} items", "fill", lambda: radicale.fill(items), times=1)
        token, ctag = radicale.token(), radicale.ctag()
        assert (token, ctag) == (radicale.token(), radicale.ctag())
        row(f"radicale, {items} items", "token", radicale.token)
        row(f"radicale, {items} items", "ctag", radicale.ctag)
        row(f"radicale, {items} items", "anything_new, none", lambda: radicale.anything_new(token))
        newest = next(numbers)
        radicale.put(newest)
        assert radicale.anything_new(token) == [f"{radicale.BOOK}i{newest}.vcf"], radicale.anything_new(token)
        assert ctag != radicale.ctag()
        row(f"radicale, {items} items", "anything_new, one", lambda: radicale.anything_new(token))
        row(f"radicale, {items} items", "put", lambda: radicale.put(next(numbers)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / ".peers", help="where they are (.peers)")
    peers = parser.parse_args().folder
    started = time.monotonic()
    install(peers)
    print(f"installed in {time.monotonic() - started:.1f} s")
    with tempfile.TemporaryDirectory(dir=peers, prefix="state-") as name:
        folder = Path(name)
        try_pouch(peers, folder / "pouch")
        for items in (100, 1000):
            try_radicale(peers, folder / f"radicale-{items}", items)
        for kind in QUEUES:
            for tuned in (False, True):
                with Huey(peers, folder / f"huey-{kind}-{tuned}", kind, tuned) as huey:
                    row(f"huey, {kind}", "round, tuned" if tuned else "round", huey.round)


if __name__ == "__main__":
    main()
