#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["urllib3>=2", "boto3>=1.34"]
# ///
"""The agent of kirosync: takes commands from the queue, executes them, reports how they ended.

It reaches the queue over a link: the state directory itself (--state, which needs kirosync.py and its
dependencies beside it, and works while the service is down), or the service (--server, from any machine, with
client.py beside it). It polls; an idle agent costs some fifty stat calls a second, or one held request.

Every command runs in a process of its own, below a supervisor that a fork server has forked: all that the
command starts can be ended with it, wherever it hides, and nothing of it outlives an agent that was killed.

    Children    how a process is started, and ended with all that it has started
    Redaction   what of a command's output is not shown: values that are known to be secret, and what looks so
    Executors   what a command does: a table {type: function}; a function takes the run and returns the result
    Policy      what this agent does at all, what it refuses, and what it asks a human for first
    Links       where commands come from and reports go to: changes(seconds), report(id, patch), and more
    Loop        one turn: see what is new, queue it for the workers, renew what is running
    Main        argv, the environment, signals
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import difflib
import errno
import fcntl
import fnmatch
import gc
import hashlib
import heapq
import itertools
import json
import logging
import os
import re
import secrets
import select
import selectors
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import tomllib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BufferedRandom, BufferedReader
from operator import itemgetter
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn, Protocol
from urllib.parse import quote

__version__ = "0.1.0"

log = logging.getLogger("agent")
Record = dict[str, Any]

STREAM_BYTES = 256 << 10  # of stdout and of stderr that a result holds: head and tail
OUTPUT_BYTES = 64 << 20  # of each that is kept in a file
RESERVE_BYTES = 16 << 20  # of a disk that output leaves free: for how the commands end
PIPE_BYTES = 256 << 10  # between a child and us: it need not wait for us so often
PIECE_BYTES = 1 << 20  # of output that is sent to the service at once
ANSWER_BYTES = 24 << 20  # of what an executor may answer: the service takes 32
READ_BYTES = 8 << 20  # of a file that a result holds, unless it asks for less
HASHED_BYTES = 4 << 30  # of a larger file no sha256 is told: it would take longer than reading its end
ENTRIES = 10_000  # of a directory that a result holds
MATCHES = 1_000  # of a search that a result holds
LINE_CHARACTERS = 1_000  # of a line that a match shows
SEARCH_BYTES = 8 << 20  # larger files are no source code
RUN_S = 3600.0  # a command takes no longer, unless it says so
FILES_S = 60.0  # nor does work with files
LONGEST_S = 7 * 24 * 3600.0  # whatever it says
STEPS = ((0.0, signal.SIGINT), (2.0, signal.SIGTERM), (7.0, signal.SIGKILL))  # s after the wish to end it
STRAY_S = 0.4  # between the steps for those whom the child has left behind
NOTICE_S = 1.0  # between looks whether it is to end
GIVE_UP_S = 5.0  # after the last step: what is left then cannot be ended
ENDING_POLL_S = 0.02  # between looks whether all have gone that were to end
FORK_PAUSE_S = 0.2  # before a process that could not be started is tried again
SECRET_BYTES = 6  # a shorter value is no secret: "true" or "none" as a token would spoil all output
PART_BYTES = 256  # of a long value that are looked for at once: so much may have to be held back
SIGN_BYTES = 512  # by which a secret is known, and which stand before it, at most
KEY_BYTES = 8 << 10  # of a private key in which its end is looked for: one of 8192 bits has 6.4 KB
DOUBT_S = 0.1  # after which is shown what may be the beginning of a secret, if it is short: a prompt ends so by chance
DOUBT_BYTES = 4  # that are no chance: they are held back until more comes, or the end
DRAIN_S = 0.2  # for output to arrive after the command ended; a child left behind may hold the pipe for ever
LEASE_S = 45.0  # a claim that is not renewed for so long is lost
POLL_S = 0.02  # between looks at the folder: to wake up so often costs the better part of a percent of a CPU
BRISK_S, BRISK_POLL_S = 2.0, 0.002  # for so long after a change there are so short pauses: one seldom comes alone
SEEN_S = 5.0  # between signs that it is there: after 15 s without one it counts as absent
RENEWED_S = 60.0  # between them for a service, which sees by itself who waits for news
CARRY_S = 0.05  # between looks for output to send, and input to fetch
HOLD_S = 25.0  # a request that waits for news
PAUSE_S = 0.5  # before asking again a service that did not hold us
RETRY_S = 5.0  # the longest pause before trying to reach the service again; a lease must outlast it
STOP_S = 5.0  # for running commands when the agent is told to stop; then as long for their reports
STOP_POLL_S = 0.05  # between looks whether they have ended
ANSWER_S = 600.0  # for a human's yes to come, and to be used
ASK_S = 1.0  # between looks whether a human has answered
PROMPT_CHARACTERS = 64_000  # of a command that a human can be shown
END_OF_INPUT = b"\x04"  # as one types it at a terminal
OPEN = ("pending", "processing")
CLAIM = {"status": "processing", "lease": LEASE_S}  # and again, to renew it


# ---------------------------------------------------------------------------------------- Children
# How a process is started, and ended with all that it has started.


class Failed(Exception):
    """A command did not do what it should; with its outcome, and a result where there is one."""

    def __init__(self, error: str, outcome: str = "error", result: Any = None) -> None:
        super().__init__(error)
        self.outcome, self.result = outcome, result


LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_CHILD_SUBREAPER = 1, 4, 36  # prctl(2)


class ForkServer:
    """A process forked while the agent is small and has one thread, which forks a supervisor for each child."""

    def __init__(self) -> None:
        self.line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.gone = False
        self.pid = os.fork()
        if self.pid == 0:
            self.line.close()
            serve_forks(theirs)
        theirs.close()

    def start(self, order: Record, streams: Iterable[int]) -> socket.socket:
        """Start what *order* says (see begin) on three *streams*; return the line to its supervisor (see supervise)."""
        with open(os.memfd_create("order"), "wb") as paper:
            paper.write(json.dumps(order).encode())
            paper.flush()
            line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                try:
                    socket.send_fds(self.line, [b"."], [paper.fileno(), theirs.fileno(), *streams])
                except OSError:
                    line.close()
                    self.gone = True
                    raise Failed("the agent's fork server is gone: the agent stops") from None
        return line

    def wake(self) -> None:
        """Have all of them go on that a child may have stopped (SIGSTOP)."""
        with contextlib.suppress(OSError):
            supervisors = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            signal_all([self.pid, *map(int, supervisors)], signal.SIGCONT)

    def close(self) -> None:
        self.line.close()


def serve_forks(line: socket.socket) -> NoReturn:
    """Have a supervisor ready, and as soon as that has something to do the next one, until the agent is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):  # the first two are for the agent to heed
        signal.signal(number, signal.SIG_IGN)
    os.setsid()
    for name in os.environ.keys() - public_environment().keys():
        del os.environ[name]
    for fd in map(int, os.listdir("/proc/self/fd")):  # what we were given is not for children
        if fd > 2:
            with contextlib.suppress(OSError):
                os.set_inheritable(fd, False)
    gc.freeze()
    said = TAKEN
    while said != GONE:
        heard, tell = os.pipe()
        pid = fork()
        if pid == 0:
            try:
                os.close(heard)
                supervise(line, tell)
            finally:
                os._exit(1)
        os.close(tell)
        said = os.read(heard, 1)
        os.close(heard)
        if not said:  # it could not be started, or was killed before it had anything to do
            time.sleep(FORK_PAUSE_S)
            said = GONE if select.select([line], [], [], 0)[0] and not line.recv(1, socket.MSG_PEEK) else said
    os._exit(0)


def fork() -> int:
    try:
        return os.fork()
    except OSError as error:
        log.error("no process can be started: %s; trying again", error.strerror)
        return -1


MARK = "KIROSYNC_CLAIM"  # in the environment of a child: by it is found what has lost its supervisor


def kill_marked(claim: str) -> None:
    """Kill what runs on of a claim whose supervisor was killed itself."""
    mark = f"{MARK}={claim}".encode()
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            if mark in Path("/proc", name, "environ").read_bytes().split(b"\0"):
                os.kill(int(name), signal.SIGKILL)


def public_environment() -> dict[str, str]:
    """Return the environment without what belongs to the service, its token above all."""
    return {key: value for key, value in os.environ.items() if not key.startswith("KIROSYNC_")}


UNSTARTED: Record = {"code": -signal.SIGKILL, "ended": True}  # it was given up while no process could be started
TAKEN, GONE = b"!", b"?"  # what a supervisor says of its order: it has one, or the agent is gone


def supervise(orders: socket.socket, tell: int) -> NoReturn:
    """Be the process between the agent and one child, which adopts whatever the child's children leave behind.

    Over a line of its own it is told to end the child by any message, and to kill it by the silence of an agent that
    died; it says once how the child ended: {"code": exit code, "ended": whether it was told to, "left": [pids
    that could not be killed]}, or {"error"}. What a child that ends by itself leaves behind lives on.
    """
    LIBC.prctl(PR_SET_CHILD_SUBREAPER, 1)
    ear, mouth = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):  # heard or not; what is ignored stays so in a child
        signal.signal(number, lambda *_: None)
    fds = socket.recv_fds(orders, 1, 5)[1]
    for fd in fds:
        os.set_inheritable(fd, False)  # recv_fds of Python 3.11 does not pass on a flag that would have it so
    if not fds:
        os.write(tell, GONE)
        os._exit(0)
    orders.close()
    paper, line_fd, *streams = fds
    line = socket.socket(fileno=line_fd)
    child, said = 0, UNSTARTED
    try:
        if not select.select([line], [], [], 0)[0]:
            with open(paper) as order:
                order.seek(0)
                child, said = begin(json.load(order), streams), {}
    except OSError as error:
        said = {"error": explain(error)}
    except Exception as error:  # a NUL byte in the command, a number where text belongs
        said = {"error": f"{type(error).__name__}: {error}"}
    with contextlib.suppress(OSError):  # the fork server was killed
        os.write(tell, TAKEN)  # only now: to fork the next one takes as long as all of this
    for fd in (tell, *streams):
        os.close(fd)
    said = said or attend(child, line, ear)
    with contextlib.suppress(OSError):  # nobody is left to hear it
        line.send(json.dumps(said).encode())
    os._exit(0)


def begin(order: Record, streams: Sequence[int]) -> int:
    """Start {argv, cwd, env}, or {command, roots} for an executor of ours; return the number of the process."""
    if "argv" in order:
        os.chdir(order["cwd"])
        places: list[Any] = [(os.POSIX_SPAWN_DUP2, fd, place) for place, fd in enumerate(streams)]
        if os.isatty(streams[1]):  # to open it in a session of its own is to have it as its terminal
            places.insert(0, (os.POSIX_SPAWN_OPEN, 0, os.ttyname(streams[1]), os.O_RDWR, 0))
        # What is ignored stays so in a child: Python ignores some signals, nohup another.
        heeded = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
        return os.posix_spawn(
            order["argv"][0], order["argv"], order["env"], file_actions=places, setsid=True, setsigdef=heeded
        )
    pid = os.fork()
    if pid == 0:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # should its supervisor be killed
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for place, fd in enumerate(streams):
            os.dup2(fd, place)
        os.closerange(3, max(map(int, os.listdir("/proc/self/fd"))) + 1)
        execute_here(**order)
    return pid


def attend(child: int, line: socket.socket, ear: int) -> Record:
    """Wait until *child* has ended, or until a word or silence on the *line* says that it is to end."""
    code = None
    while code is None:
        heard: list[Any] = select.select([line.fileno(), ear], [], [])[0]
        code = reap(child, code, ear)
        if code is None and line.fileno() in heard:
            return end_tree(child, STEPS if line.recv(1) else STEPS[-1:], line, ear)
    return {"code": code, "ended": False}


def end_tree(child: int, steps: Sequence[tuple[float, int]], line: socket.socket, ear: int) -> Record:
    """Signal all that came of *child*, step by step, until nothing is left of it or nothing helps."""
    begun = time.monotonic()
    due = [(begun + after - steps[0][0], number) for after, number in steps]
    last, code, alone, heeded = due[-1][0] + GIVE_UP_S, None, False, [line.fileno(), ear]
    while (tree := descendants() or descendants()) and (now := time.monotonic()) < last:
        if now >= due[0][0]:
            signal_all(tree, due[0][1])
            due = due[1:] or due  # the last one again and again: what is killed may have forked meanwhile
        if code is not None and not alone:
            alone, sooner = True, max(0.0, due[0][0] - now - STRAY_S)
            due = [(moment - sooner, number) for moment, number in due]
        if line.fileno() in select.select(heeded, [], [], ENDING_POLL_S)[0] and not line.recv(1):
            heeded, due = [ear], [(now, STEPS[-1][1])]
        code = reap(child, code, ear)
    code = reap(child, code, ear)
    return {"code": -signal.SIGKILL if code is None else code, "ended": True, "left": tree}


def reap(child: int, code: int | None, ear: int) -> int | None:
    """Take note of all that have ended; return the exit code of *child*, if it has one by now."""
    with contextlib.suppress(BlockingIOError):
        os.read(ear, 1 << 12)
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitpid(-1, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1]) if ended[0] == child else code
    return code


def descendants() -> list[int]:
    """Return the processes below this one, whatever session or group they have moved to."""
    below: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # gone meanwhile
            state, parent = Path("/proc", name, "stat").read_bytes().rpartition(b") ")[2].split()[:2]
            if state not in (b"Z", b"X"):
                below.setdefault(int(parent), []).append(int(name))
    found = below.get(os.getpid(), [])
    for process in found:
        found += below.get(process, [])
    return found


def signal_all(processes: Iterable[int], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # gone, or become another user's
            os.kill(process, number)


def explain(error: OSError) -> str:
    if error.errno == errno.E2BIG:
        return (
            "command and env are too long to be passed on (128 KiB for one string); put them into a file, and run that"
        )
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


# ---------------------------------------------------------------------------------------- Redaction
# What of a command's output is not shown: values that are known to be secret, and what looks so.


REDACTED = b"[redacted]"


class Shape(NamedTuple):
    """What a secret looks like: it stands behind a sign, which is shown."""

    words: Sequence[bytes]  # with which a sign begins, in lower case: to look for rare words is fast
    beginning: re.Pattern[bytes]  # the sign, and as group 1 the secret, or as much as there is of its first bytes
    least: int  # bytes of a secret
    rest: re.Pattern[bytes]  # of it, after its first bytes


def shaped(words: Sequence[bytes], sign: bytes, body: bytes, least: int) -> Shape:
    """Return the shape of *least* bytes, or more, each of which matches *body*."""
    beginning = rb"%b(%b{%d}|%b{0,%d}\Z)" % (sign, body, least, body, least - 1)
    return Shape(words, re.compile(beginning), least, re.compile(body + b"*"))


def spaced(first: bytes, second: bytes) -> Sequence[bytes]:
    return [first + space + second for space in (b"", b"_", b" ")]


# What may stand between a name and its value: as `aws configure` asks for it, in a shell, in JSON, in colors.
BETWEEN = rb"(?: \[(?:None|\*{1,32}\w{4})\])?+(?:\x1b\[[0-9;]{0,8}m|[^A-Za-z0-9/+]){1,32}+"
AWS = rb"[A-Za-z0-9/+=]"
ARMOUR = rb" (?:[A-Z0-9]{2,9} ){0,2}PRIVATE KEY(?: BLOCK)?-----"
KEY_END = re.compile(b"-----END" + ARMOUR)
KEY_REST = re.compile(rb"[A-Za-z0-9+/=\s\\\"',]*")  # where there is no end: base64, also as a string of a program
PRIVATE_KEY = Shape([b"-----begin"], re.compile(b"-----BEGIN" + ARMOUR + b"()"), 0, KEY_REST)
SHAPES = (  # no sign holds another with all that makes a secret of it: the first that is found is the right one
    PRIVATE_KEY,
    shaped([b"akia", b"asia"], rb"A[KS]IA", rb"[A-Z0-9]", 16),
    shaped(spaced(b"secret", b"access"), rb"(?i:secret[_ ]?access[_ ]?key)" + BETWEEN, AWS, 40),
    shaped(spaced(b"session", b"token"), rb"(?i:session[_ ]?token)" + BETWEEN, AWS, 40),
    shaped([b"bearer"], rb"(?i:bearer)[ \t]{1,8}", rb"[A-Za-z0-9._~+/=-]", 16),  # a shorter one may be a word
    shaped([b"kirosync_"], rb"kirosync_", rb"[A-Za-z0-9_-]", 43),
)


class Redactor:
    """Puts [redacted] in the place of secrets in a stream; where it is cut into pieces makes no difference.

    Values and shapes are looked for apart, each in what was printed; where they overlap or touch, they are one.
    Of the stream it keeps what may be the beginning of a secret or of its sign, SIGN_BYTES and some.
    """

    def __init__(self, values: Iterable[bytes] = ()) -> None:
        self.values = sorted({piece for value in values for piece in pieces(value)})
        self.longest = max(map(len, self.values), default=1)
        self.text = b""  # what is kept; all below are places in it
        self.known = self.looked = 0  # from where on values and shapes are looked for
        self.sure = self.shown = 0  # up to where all is decided, and up to where it was shown
        self.hidden = -1  # the end of what the last [redacted] stands for
        self.spans: list[tuple[int, int]] = []  # that are secret, and not passed yet
        self.inside: Shape | None = None  # of which a secret goes on
        self.left = 0  # bytes in which the end of a private key is looked for

    def feed(self, piece: bytes, last: bool = False) -> bytes:
        """Take the next *piece*; return what can be shown by now, which is all that is left if it is the *last*.

        >>> redactor = Redactor([b"hunter22"])
        >>> redactor.feed(b"it is hunt"), redactor.feed(b"er22, I said"), redactor.feed(b" hunt", last=True)
        (b'it is ', b'[redacted], I said', b' hunt')
        """
        self.text += piece
        self.sure = min(self.find_values(last), self.find_shapes(last))
        shown = self.show(self.sure)
        self.forget(min(self.shown, self.known, self.looked))
        return shown

    @property
    def doubt(self) -> int:
        """How many bytes are held back, if they are so few that they stand there by chance."""
        held = len(self.text) - self.sure
        return held if held < DOUBT_BYTES and self.shown < len(self.text) else 0

    def relent(self) -> bytes:
        """Return what is held back, if it is in so little doubt. Should it go on as a secret, the rest is redacted."""
        return self.show(len(self.text)) if self.doubt else b""

    def find_values(self, last: bool) -> int:
        """Take note of values; return up to where it is decided what is one."""
        end = len(self.text)
        found = [(at, at + len(value)) for value in self.values for at in places(self.text, value, self.known)]
        undecided = range(end if last else max(self.known, end - self.longest + 1), end)
        self.known = next((at for at in undecided if self.may_begin(self.text[at:])), end)
        self.spans += [span for span in found if span[0] < self.known]
        return self.known

    def may_begin(self, text: bytes) -> bool:
        """Return whether a value begins with *text*, and goes on."""
        after = bisect_right(self.values, text)
        return after < len(self.values) and self.values[after].startswith(text)

    def find_shapes(self, last: bool) -> int:
        """Take note of what looks like a secret; return up to where it is decided what does."""
        at, end = self.looked, len(self.text)
        if self.inside:
            at = self.leave(self.inside, at)
        for start, shape in signs(self.text, at):
            found = None if start < at or self.inside else shape.beginning.match(self.text, start)
            if found and len(found[1]) >= shape.least:
                self.left = KEY_BYTES if shape is PRIVATE_KEY else 0
                at = self.leave(shape, found.start(1))
            elif found and not last:
                self.looked = max(at, min(start, end - SIGN_BYTES))
                return found.start(1)
        self.looked = at if self.inside else max(at, end - SIGN_BYTES)
        return end

    def leave(self, shape: Shape, start: int) -> int:
        """Take note of what there is of a secret from *start* on; return where to go on."""
        self.inside, end, at = shape, len(self.text), start
        if self.left:
            until = min(end, start + self.left)
            if found := KEY_END.search(self.text, start, until):
                return self.out_of(start, found.end())
            if until == end:
                at = max(start, end - SIGN_BYTES)
                self.left -= at - start
                self.spans.append((start, end))
                return at
            at, self.left = until, 0
        rest = shape.rest.match(self.text, at)
        at = rest.end() if rest else at
        if at < end:
            return self.out_of(start, at)
        self.spans.append((start, end))
        return end

    def out_of(self, start: int, end: int) -> int:
        self.spans.append((start, end))
        self.inside, self.left = None, 0
        return end

    def show(self, until: int) -> bytes:
        """Return what was not shown yet, up to *until*, redacted."""
        shown = []
        for start, end in sorted(span for span in self.spans if span[0] < until):
            if start > self.hidden:
                shown += [self.text[self.shown : start], REDACTED]
            self.hidden = max(self.hidden, end)
            self.shown = max(self.shown, self.hidden)
        self.spans = [span for span in self.spans if span[0] >= until]
        shown.append(self.text[self.shown : until])
        self.shown = max(self.shown, until)
        return b"".join(shown)

    def forget(self, start: int) -> None:
        """Keep only what stands from *start* on."""
        self.text = self.text[start:]
        self.known, self.looked, self.sure = self.known - start, self.looked - start, self.sure - start
        self.shown, self.hidden = self.shown - start, self.hidden - start
        self.spans = [(first - start, end - start) for first, end in self.spans]


def signs(text: bytes, start: int) -> list[tuple[int, Shape]]:
    """Return where, from *start* on, a sign of which shape may be, in their order."""
    lower = text.lower()
    found = [(at, shape) for shape in SHAPES for word in shape.words for at in places(lower, word, start)]
    return sorted(found, key=itemgetter(0))


def places(text: bytes, part: bytes, start: int) -> Iterator[int]:
    """Yield where *part* stands in *text*, from *start* on.

    >>> list(places(b"aaa aa", b"aa", 1))
    [1, 4]
    """
    at = text.find(part, start)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


def pieces(value: bytes) -> Iterator[bytes]:
    """Yield what of a secret *value* is looked for: its lines, which a terminal ends otherwise, and parts of long ones.

    >>> list(pieces(b"-----BEGIN PRIVATE KEY-----\\nMIIEow\\n=\\n")), [len(piece) for piece in pieces(b"x" * 300)]
    ([b'MIIEow'], [256, 256])
    """
    for line in map(bytes.strip, value.splitlines()):
        if len(line) >= SECRET_BYTES and not line.startswith((b"-----BEGIN ", b"-----END ")):
            for at in range(0, len(line), PART_BYTES):
                yield line[max(0, min(at, len(line) - PART_BYTES)) :][:PART_BYTES]


def names_like(globs: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of names that match one of *globs*, in any case.

    >>> bool(names_like(["*_TOKEN"]).match("gh_token")), bool(names_like(["*_TOKEN"]).match("TOKEN_FILE"))
    (True, False)
    """
    return re.compile("|".join(map(fnmatch.translate, globs)), re.IGNORECASE)


SECRET_NAMES = (  # as Buildkite's agent has them, and some more: what holds a name, a path or a URL is none
    *("*PASSWORD", "*PASSWD", "*PASSPHRASE", "*SECRET", "*TOKEN", "*SECRETS", "*TOKENS"),
    *("*_ACCESS_KEY", "*_SECRET_KEY", "*_PRIVATE_KEY", "*_API_KEY", "*_CONNECTION_STRING"),
)


class Secrets(NamedTuple):
    """What must not be shown: the values of variables of these names, these values, and what looks like a secret."""

    names: re.Pattern[str] = names_like(SECRET_NAMES)
    values: Sequence[bytes] = ()

    def of(self, environment: Mapping[str, str]) -> Secrets:
        """Return these secrets and those of *environment*.

        >>> USUAL.of({"HOME": "/home/ada", "GH_TOKEN": "0123456789"}).values
        [b'0123456789']
        """
        named = [value for name, value in environment.items() if self.names.match(name)]
        return self._replace(values=[*self.values, *(value.encode(errors="surrogateescape") for value in named)])


USUAL = Secrets()


# ---------------------------------------------------------------------------------------- Executors
# What a command does: a table {type: function}. All work is done by children, so that each can be ended.


class Capture:
    """What a child writes to one stream: head and tail for the result, and all of it, up to a limit, in a file."""

    def __init__(self, limit: int, path: Path | None = None, redactor: Redactor | None = None) -> None:
        self.limit, self.size, self.path, self.redactor = limit, 0, path, redactor
        self.head, self.tail = bytearray(), bytearray()
        self.fd, self.room = -1, 0
        self.due = float("inf")  # when to relent, if nothing comes

    def add(self, piece: bytes) -> None:
        """Take what was printed; what is secret in it stays out of everything, sizes too."""
        if not self.redactor:
            return self.keep(piece)
        self.keep(self.redactor.feed(piece))
        self.due = time.monotonic() + DOUBT_S if self.redactor.doubt else float("inf")

    def relent(self) -> None:
        """Show what is held back but hardly a secret, if it is time to: it may be a prompt."""
        if self.redactor and time.monotonic() >= self.due:
            self.keep(self.redactor.relent())
            self.due = float("inf")

    def keep(self, piece: bytes) -> None:
        self.size += len(piece)
        room = self.limit // 2 - len(self.head)
        self.head += piece[:room]
        self.tail += piece[room:]
        if len(self.tail) > self.limit:
            del self.tail[: -self.limit // 2]
        if self.path and piece:
            self.write(piece)

    def write(self, piece: bytes) -> None:
        """Append *piece* to the file as far as there is room; a full disk is no reason to end the command."""
        try:
            if self.fd < 0 and self.path:
                self.fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
                self.room = OUTPUT_BYTES - os.fstat(self.fd).st_size
            free = os.fstatvfs(self.fd)
            if self.room > 0 and free.f_bavail * free.f_frsize < RESERVE_BYTES:
                raise OSError(errno.ENOSPC, f"less than {RESERVE_BYTES} bytes are free")
            while self.room > 0 and piece:
                written = os.write(self.fd, piece[: self.room])
                piece, self.room = piece[written:], self.room - written
        except OSError as error:
            log.warning("%s: the output is kept no further: %s", self.path, error.strerror)
            self.room = 0

    def close(self) -> None:
        """Take what is held back, as no more comes. Let go of the file, durable if the result does not hold it all."""
        if self.redactor:
            self.keep(self.redactor.feed(b"", last=True))
        if self.fd >= 0:
            with contextlib.suppress(OSError):
                if self.left_out:
                    os.fsync(self.fd)
            os.close(self.fd)

    @property
    def left_out(self) -> int:
        return max(0, self.size - len(self.head) - self.limit // 2)

    def text(self) -> str:
        tail = bytes(self.tail[max(0, len(self.tail) - self.limit // 2) :])
        gap = f"\n[... {self.left_out} bytes left out ...]\n".encode() if self.left_out else b""
        return (bytes(self.head) + gap + tail).decode("utf-8", "replace")


class Run:
    """A command that this agent has taken: from being seen until its end is reported."""

    def __init__(
        self,
        command: Record,
        forks: ForkServer,
        roots: Sequence[str] = (),
        secrets: Secrets | None = USUAL,
    ) -> None:
        self.identity, self.command, self.forks, self.roots = command["id"], command, forks, roots
        self.secrets = secrets  # that are redacted, if any are
        self.held: Record = {}  # what every report of it says: agent, claim, attempt
        self.again: Record | None = None  # the command, if it was seen pending meanwhile
        self.paths: dict[str, Path] = {}  # of the files that its output goes to, by stream
        self.stdin = -1  # through which its child is written to; the courier's
        self.typed, self.closed = 0, False  # how much was sent to its stdin, and whether that is all
        self.line: socket.socket | None = None  # to the supervisor of its child
        self.why = ""  # it is to end: one of WHY
        self.over = threading.Event()  # the child has ended
        self.told: set[str] = set()  # the streams that the result tells to the letter

    def redactor(self) -> Redactor | None:
        """Return a redactor for one stream of it, unless that is switched off."""
        return self.secrets and Redactor(self.secrets.of(self.command.get("env", {})).values)

    def redacted(self, text: str) -> str:
        redactor = self.redactor()
        return redactor.feed(text.encode(errors="replace"), last=True).decode(errors="replace") if redactor else text

    def see(self, command: Record) -> None:
        """Take note of what others want of it."""
        self.typed = max(self.typed, command.get("inputSize", 0))
        self.closed = self.closed or command.get("inputClosed", False)
        if command.get("cancelRequested"):
            self.end("cancelled")

    def end(self, why: str) -> None:
        """Have it end, and say *why*; at any time, and more than once."""
        self.why = self.why or why
        if line := self.line:
            with contextlib.suppress(OSError):  # it has ended
                line.send(b"end")
            self.forks.wake()


WHY = {  # a command was ended: the outcome, and what to say
    "timeout": ("timeout", "timed out after {timeout:g} s and was ended"),
    "cancelled": ("cancelled", "cancelled on request"),
    "stopped": ("cancelled", "the agent was stopped"),
    "given up": ("cancelled", "it is this agent's no longer: it was removed, or given up as lost"),
}


class Ended(NamedTuple):
    """How a child ended: its exit code as a shell tells it, and why it was ended if it was."""

    code: int
    why: str
    left: list[int]  # processes that could not be ended
    milliseconds: int

    def failure(self, command: Record, result: Any = None) -> Failed:
        outcome, said = WHY[self.why]
        left = f"; these processes could not be ended: {self.left}" if self.left else ""
        return Failed(said.format(timeout=command["timeout"]) + left, outcome, result)


def run_child(run: Run, order: Record, streams: dict[str, Capture], wants: Record) -> Ended:
    """Have the child that *order* says (see begin) run, and collect its *streams*, until it has ended or is ended."""
    started = time.monotonic()
    ours, theirs = plumb(wants)
    try:
        line = run.forks.start(order, theirs)
    except BaseException:
        close_all(ours.values())
        raise
    finally:
        close_all(set(theirs))
    try:
        run.line, run.stdin = line, ours.pop("stdin", -1)
        if run.why:
            run.end(run.why)
        said = collect(run, line, {fd: streams[name] for name, fd in ours.items()}, started)
    finally:
        run.line = None
        line.close()
        close_all(ours.values())
        for stream in streams.values():
            stream.close()
    if said == UNSUPERVISED and "claim" in run.held:
        kill_marked(run.held["claim"])
    if "error" in said:
        raise Failed(said["error"], said.get("outcome", "error"))
    code, why = said["code"], run.why if said["ended"] else ""
    return Ended(
        128 - code if code < 0 else code, why, said.get("left", []), round((time.monotonic() - started) * 1000)
    )


def plumb(wants: Record) -> tuple[dict[str, int], tuple[int, int, int]]:
    """Return our ends of a child's streams, by name, and its own three: of pipes, or of a terminal; as it *wants*."""
    typed = wants.get("stdin", False)
    made: list[int] = []
    try:
        if wants.get("pty"):
            made += os.openpty()
            made += [os.dup(made[1]), os.dup(made[0])] if typed else [os.open(os.devnull, os.O_RDONLY)]
            ours, own, asked, *typing = made
            fcntl.ioctl(
                own, termios.TIOCSWINSZ, struct.pack("4H", wants.get("rows", 24), wants.get("columns", 80), 0, 0)
            )
            os.set_blocking(ours, False)
            return {"stdout": ours, **dict(zip(["stdin"], typing, strict=False))}, (asked, own, own)
        for _ in ("stdout", "stderr"):
            made += wide_pipe()
        made += typing_pipe() if typed else [os.open(os.devnull, os.O_RDONLY)]
        out, own_out, err, own_err, asked, *typing = made
        return {"stdout": out, "stderr": err, **dict(zip(["stdin"], typing, strict=False))}, (asked, own_out, own_err)
    except BaseException:
        close_all(made)
        raise


def close_all(fds: Iterable[int]) -> None:
    for fd in fds:
        os.close(fd)


def typing_pipe() -> tuple[int, int]:
    ends = os.pipe()
    os.set_blocking(ends[1], False)
    return ends


def wide_pipe() -> tuple[int, int]:
    ends = os.pipe()
    with contextlib.suppress(OSError):  # a user may have so many of them only
        fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return ends


def collect(run: Run, line: socket.socket, captures: dict[int, Capture], started: float) -> Record:
    """Add what arrives to *captures* until the child has ended; return what its supervisor said (see supervise)."""
    said, until, last = UNSUPERVISED, started + run.command["timeout"], float("inf")
    with selectors.DefaultSelector() as selector:
        for fd in (line.fileno(), *captures):
            selector.register(fd, selectors.EVENT_READ)
        while selector.get_map() and (now := time.monotonic()) < last:
            due = min(until, last, *(capture.due for capture in captures.values()))
            for key, _ in selector.select(min(NOTICE_S, max(0.0, due - now))):
                piece = hear(line) if key.fd == line.fileno() else read_some(key.fd)
                if key.fd == line.fileno():
                    said = json.loads(piece) if piece else said
                    last, until = time.monotonic() + DRAIN_S, float("inf")
                elif piece:
                    captures[key.fd].add(piece)
                if key.fd == line.fileno() or piece == b"":
                    selector.unregister(key.fd)
            for capture in captures.values():
                capture.relent()
            if time.monotonic() >= until:
                until = float("inf")
                run.end("timeout")
            if run.why and last == float("inf"):  # its supervisor may be stopped for good
                last = time.monotonic() + STEPS[-1][0] + 2 * GIVE_UP_S
    return said


def hear(line: socket.socket) -> bytes:
    """Return what was said on a *line*; b"" if it was closed in silence."""
    for _ in range(2):  # when it is closed, what we said that was not heard comes first, as an error
        with contextlib.suppress(ConnectionResetError):
            return line.recv(1 << 16)
    return b""


UNSUPERVISED: Record = {"error": "the process that watched over it is gone; how it ended is unknown", "outcome": "lost"}


def read_some(fd: int) -> bytes | None:
    """Return what has arrived: b"" if nothing more will, None if there is nothing yet."""
    try:
        return os.read(fd, PIPE_BYTES)
    except BlockingIOError:
        return None
    except OSError:  # a terminal that nobody has open any more
        return b""


def folder_of(command: Record) -> Path:
    folder = home(command.get("workingDir", "."))
    if not folder.is_dir():
        raise Failed(f"workingDir: {folder} is not a directory" if folder.exists() else f"workingDir: no {folder}")
    return folder.absolute()


def path_of(command: Record, default: str = "") -> Path:
    """Return the path that *command* is about; raise Failed if it is outside of the roots, whatever is there."""
    named = home(command.get("path", default))
    path = home(command.get("workingDir", ".")).absolute() / named
    check_allowed(path, os.path.realpath(path))
    return path if named.is_absolute() else folder_of(command) / named


def home(path: str) -> Path:
    """Return *path*, with ~ as the home of the agent's user; raise Failed if it cannot be one."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise Failed(f"{path}: {error}") from None


def execute_bash(run: Run) -> Record:
    """Run a command line; {stdout, stderr, exitCode, durationMs}, and truncated and size where one was cut."""
    command = run.command
    terminal = {"TERM": "xterm-256color"} if command.get("pty") else {}
    shell = shutil.which("bash") or "/bin/sh"
    order: Record = {"argv": [shell, "-c", command["command"]], "cwd": str(folder_of(command))}
    mark = {MARK: run.held.get("claim", "")}
    order |= {"env": {**public_environment(), **terminal, **command.get("env", {}), **mark}}
    streams = {name: Capture(STREAM_BYTES, run.paths.get(name), run.redactor()) for name in ("stdout", "stderr")}
    ended = run_child(run, order, streams, command)
    result: Record = {name: stream.text() for name, stream in streams.items()}
    run.told = {name for name, stream in streams.items() if result[name].encode() == stream.head + stream.tail}
    result |= {"exitCode": ended.code, "durationMs": ended.milliseconds}
    if any(stream.left_out for stream in streams.values()):
        result |= {"truncated": True, "size": {name: stream.size for name, stream in streams.items()}}
    if ended.why:
        raise ended.failure(command, result)
    if ended.code:
        raise Failed(f"exit code {ended.code}", "exit", result)
    return result


def in_child(run: Run) -> Any:
    """Run one of the executors below in a process of its own: it can be ended, and leaves no memory behind."""
    streams = {"stdout": Capture(ANSWER_BYTES), "stderr": Capture(STREAM_BYTES)}
    ended = run_child(run, {"command": run.command, "roots": run.roots}, streams, {})
    if ended.why:
        raise ended.failure(run.command)
    if streams["stdout"].left_out:
        raise Failed(f"the answer has {streams['stdout'].size} bytes, {ANSWER_BYTES} are possible; ask for less")
    try:
        answer = json.loads(streams["stdout"].text())
    except ValueError:
        last = streams["stderr"].text().strip().splitlines()[-1:] or [f"exit code {ended.code}"]
        raise Failed(f"{run.command['type']} broke off: {last[0]}") from None
    if "error" in answer:
        raise Failed(**answer)
    return answer["result"]


def execute_here(command: Record, roots: list[str]) -> NoReturn:
    """Be the process that in_child() starts: say {"result"}, or what Failed takes, on stdout."""
    try:
        ROOTS[:] = roots
        answer: Record = {"result": IN_CHILD[command["type"]](command)}
    except Failed as failure:
        answer = {"error": str(failure), "outcome": failure.outcome, "result": failure.result}
    except OSError as error:
        answer = {"error": explain(error)}
    except Exception as error:  # of botocore, which has many; or a defect of ours
        answer = {"error": f"{type(error).__name__}: {error}"}
    except KeyboardInterrupt:  # it is to end
        os._exit(130)
    with open(1, "w") as stdout:
        json.dump(answer, stdout, default=plain)
        stdout.flush()
        os._exit(0)


ROOTS: list[str] = []  # set in the child of an executor: outside of these no file is touched; anywhere, if it is empty


def check_allowed(path: Path | str, real: str) -> None:
    """Raise Failed if *path*, which is *real* in truth, is outside of the roots."""
    if ROOTS and not any(real == root or real.startswith(root.rstrip("/") + "/") for root in ROOTS):
        raise Failed(f"{path} is outside of what this agent's policy allows: {', '.join(ROOTS)}", "refused")


def reach(path: Path | str) -> int:
    """Return a descriptor (O_PATH) of what *path* leads to; raise Failed if that is outside of the allowed roots.

    What was opened is checked, not only the name: a link that is changed meanwhile leads nowhere else.
    """
    check_allowed(path, os.path.realpath(path))  # first, so that nobody learns what is there
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        check_allowed(path, os.readlink(f"/proc/self/fd/{fd}"))
    except Failed:
        os.close(fd)
        raise
    return fd


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """Give a name for *folder* that goes on to mean this very one, whatever becomes of the names that led to it."""
    found = reach(folder)
    try:
        fd = os.open(f"/proc/self/fd/{found}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from None
    finally:
        os.close(found)
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


def open_file(path: Path) -> BufferedReader:
    """Open a plain file for reading; raise Failed for what would never end."""
    found = reach(path)
    try:
        if not stat.S_ISREG(mode := os.fstat(found).st_mode):
            raise Failed(f"{path} is a directory" if stat.S_ISDIR(mode) else f"{path} is not a plain file")
        return open(f"/proc/self/fd/{found}", "rb")
    except PermissionError as error:
        raise PermissionError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(found)


def as_content(raw: bytes) -> Record:
    """Return {content, encoding}: text where it is UTF-8 without a NUL, else base64."""
    try:
        text = raw.decode()
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        return {"content": base64.b64encode(raw).decode(), "encoding": "base64"}
    return {"content": text, "encoding": "utf-8"}


def read_file(command: Record) -> Record:
    """Read a file; {content, encoding, size, sha256}, of all or of offset/limit/tail bytes; truncated if cut."""
    with open_file(path_of(command)) as file:
        size, digest = os.fstat(file.fileno()).st_size, None
        if size <= HASHED_BYTES:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()  # of one in /proc it is not known before
        offset = max(0, size - command["tail"]) if "tail" in command else command.get("offset", 0)
        file.seek(offset)
        wanted = min(command.get("limit", size), max(0, size - offset))
        raw = file.read(min(wanted, READ_BYTES))
    result = {**as_content(raw), "size": size, "sha256": digest}
    return {**result, "truncated": True} if len(raw) < wanted else result


def write_file(command: Record) -> Record:
    """Replace a file, whole or not at all; {bytesWritten, created, sha256}. Mode and owner stay."""
    path = Path(os.path.realpath(path_of(command)))
    mode = command.get("mode")
    if mode is not None and not re.fullmatch(r"(0o?)?[0-7]{3,4}", mode):
        raise Failed(f"mode: {mode!r} is not octal, such as 644")
    try:
        content = command["content"]
        raw = base64.b64decode(content, validate=True) if command.get("encoding") == "base64" else content.encode()
    except ValueError:
        raise Failed("content: is not base64") from None
    if not path.parent.is_dir():
        raise Failed(f"{path.parent} does not exist; make it first")
    with inside(path.parent) as folder, other_writers_waiting(folder):
        before = present(folder / path.name, path)
        with before or contextlib.nullcontext():
            if "expectedSha256" in command:
                check_expected(path, before, command["expectedSha256"])
            added = before if command.get("append") else None
            digest = replace(folder / path.name, raw, added, mode, path)
    return {"bytesWritten": len(raw), "created": before is None, "sha256": digest}


@contextlib.contextmanager
def other_writers_waiting(folder: Path) -> Iterator[None]:
    """Keep other writers of ours, in this agent and in others, out of *folder*; sync it afterwards."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
        os.fsync(fd)
    finally:
        os.close(fd)


def present(file: Path, path: Path) -> BufferedReader | None:
    """Open *file*, known as *path*, or return None if there is none; a link is not followed."""
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        raise Failed(f"{path} is a directory") from None
    except OSError as error:
        raise Failed(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Failed(f"{path} is not a plain file")
    return open(fd, "rb")


def check_expected(path: Path, before: BufferedReader | None, expected: str | None) -> None:
    actual = hashlib.file_digest(before, "sha256").hexdigest() if before else None
    if actual != (expected and expected.lower()):
        there = f"its sha256 is {actual}" if actual else "there is no such file"
        raise Failed(f"{path} is not what was expected: {there}; nothing was written", result={"sha256": actual})


def replace(file: Path, content: bytes, before: BufferedReader | None, mode: str | None, path: Path) -> str:
    """Put *before* and *content* in place of *file*, synced; return the sha256.

    It has the *mode* (octal), else the one that *file* had, else that of new files. Until it is whole it has no name,
    where the file system can do that, so that nothing is left of it if this process is killed.
    """
    temporary = file.with_name(f".kirosync-{secrets.token_hex(8)}")
    try:
        with nameless(temporary) as written:
            if before:
                before.seek(0)
                shutil.copyfileobj(before, written, PIECE_BYTES)
            written.write(content)
            written.flush()
            dress(written.fileno(), file, mode)
            written.seek(0)
            digest = hashlib.file_digest(written, "sha256").hexdigest()
            os.fsync(written.fileno())
            fd = written.fileno()
            if not temporary.exists():  # without a descriptor, of no other use here, Python would not follow the link
                os.link(f"/proc/self/fd/{fd}", temporary, src_dir_fd=fd, follow_symlinks=True)
        os.replace(temporary, file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise Failed(f"{path}: cannot be written: {error.strerror}") from None
        raise
    return digest


def nameless(temporary: Path) -> BufferedRandom:
    """Open a new file in the folder of *temporary* that has no name; where that cannot be, it has this one."""
    try:
        return open(os.open(temporary.parent, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600), "w+b")
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
            raise
    return open(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600), "w+b")


def dress(fd: int, file: Path, mode: str | None) -> None:
    """Give a new file the owner and the mode of *file*, if there is one, or the *mode* that was ordered."""
    usual = 0o666 & ~UMASK
    if file.exists():
        status = file.stat()
        usual = stat.S_IMODE(status.st_mode)
        if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
            os.fchown(fd, status.st_uid, status.st_gid)  # before the mode: it takes setuid away
    os.fchmod(fd, usual if mode is None else int(mode.removeprefix("0o"), 8))


UMASK = os.umask(0o077)  # can only be read by setting it
os.umask(UMASK)
TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


def list_directory(command: Record) -> Record:
    """List a directory; {entries: [{name, type, size, modified, mode}], truncated}, sorted by name.

    Of more than ``limit`` entries those next ``after`` a name; ``next`` is the one to go on after.
    """
    root, limit = path_of(command), max(1, min(command.get("limit", ENTRIES), ENTRIES))
    pattern, after = command.get("glob", "*"), command.get("after", "")
    with inside(root) as folder:
        names = walk(folder) if command.get("recursive") else os.listdir(folder)
        wanted = (name for name in names if as_name(name) > after and fnmatch.fnmatch(os.path.basename(name), pattern))
        chosen = heapq.nsmallest(limit + 1, wanted, key=as_name)  # of any number, in bounded memory
        parents = itertools.groupby(chosen[:limit], os.path.dirname)  # each is opened once, not for every entry
        entries = [entry for parent, names in parents for entry in entries_of(folder / parent, names)]
    more = len(chosen) > limit
    return {"entries": entries, "truncated": more, **({"next": entries[-1]["name"]} if more else {})}


def walk(root: Path) -> Iterator[str]:
    """Yield the names below *root*, relative to it; links are named, not followed."""
    for folder, folders, files, _ in os.fwalk(f"{root}/."):
        for name in itertools.chain(folders, files):
            yield os.path.relpath(os.path.join(folder, name), root)


def as_name(path: str | Path) -> str:
    """Return a path as text: what is no UTF-8 in it as \\xNN, and a backslash as two, so that no two look the same."""
    return os.fsencode(path).replace(b"\\", b"\\\\").decode("utf-8", "backslashreplace")


def entries_of(parent: Path, names: Iterable[str]) -> Iterator[Record]:
    """Yield what there is to say of *names*, whose last parts are in *parent*; that they are gone, if it is."""
    with contextlib.ExitStack() as opened:
        folder = None
        with contextlib.suppress(OSError, Failed):  # gone, or moved outside
            folder = opened.enter_context(inside(parent))
        for name in names:
            yield {"name": as_name(name), **(status_of(folder / os.path.basename(name)) if folder else GONE_ENTRY)}


GONE_ENTRY = {"type": "gone", "size": 0, "modified": 0, "mode": ""}


def status_of(path: Path) -> Record:
    try:
        status = os.lstat(path)
    except OSError:
        return GONE_ENTRY
    kind = TYPES.get(stat.S_IFMT(status.st_mode), "other")
    mode = f"{stat.S_IMODE(status.st_mode):04o}"
    return {"type": kind, "size": status.st_size, "modified": status.st_mtime_ns // 10**6, "mode": mode}


SKIPPED = (".git", ".hg", ".svn", ".venv", "node_modules", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")


def code_search(command: Record) -> Record:
    """Search files for a text or a regular expression; {matches: [{path, line, column, text}], truncated}.

    ripgrep, where it is installed, only tells which files to look into, so the answer is the same without it.
    """
    root, limit = path_of(command, "."), min(command.get("limit", MATCHES), MATCHES)
    os.close(reach(root))
    if root.is_dir():
        os.scandir(root).close()  # one that may not be read is an error; one on the way is not
    source = command["query"] if command.get("regex") else re.escape(command["query"])
    try:
        pattern = re.compile(source, re.IGNORECASE if command.get("ignoreCase") else 0)
    except re.error as error:
        raise Failed(f"query: is not a regular expression: {error}") from None
    matches = itertools.chain.from_iterable(
        search_file(path, root, pattern, command.get("context", 0)) for path in sorted(candidates(command, root))
    )
    found = list(itertools.islice(matches, limit + 1))
    return {"matches": found[:limit], "truncated": len(found) > limit}


def candidates(command: Record, root: Path) -> Iterable[Path]:
    """Return the files that may hold a match: those that ripgrep names, or all."""
    rg, everything = shutil.which("rg"), (path for path in files_below(root) if wanted(path, command))
    if not rg or not root.is_dir() or command.get("regex") or "\ufffd" in command["query"]:
        return everything  # regular expressions of the two differ, and so does what stands for no UTF-8
    argv = [rg, "--files-with-matches", "--null", "--no-config", "--no-ignore", "--hidden", "--no-messages"]
    argv += [f"--glob=!**/{name}/**" for name in SKIPPED] + ["--text", f"--max-filesize={SEARCH_BYTES}"]
    argv += ["--ignore-case"] if command.get("ignoreCase") else []
    argv += ["--fixed-strings", "-e", command["query"], "--", str(root)]
    ran = subprocess.run(argv, capture_output=True, check=False)
    named = (Path(os.fsdecode(name)) for name in ran.stdout.split(b"\0") if name)
    return (path for path in named if wanted(path, command))


def files_below(root: Path) -> Iterator[Path]:
    if not root.is_dir():
        yield root
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in SKIPPED]
        yield from (Path(folder, name) for name in files)


def wanted(path: Path, command: Record) -> bool:
    return fnmatch.fnmatch(path.name, command.get("glob", "*")) or path.match(command.get("glob", "*"))


def search_file(path: Path, root: Path, pattern: re.Pattern[str], context: int) -> Iterator[Record]:
    """Yield a match for each line of *path* that has one; none for a file that is binary, too large or gone."""
    try:
        if path.is_symlink() or path.stat().st_size > SEARCH_BYTES:
            return
        with open_file(path) as file:
            raw = file.read(SEARCH_BYTES)
    except (OSError, Failed):
        return
    if b"\0" in raw:
        return
    lines = raw.decode("utf-8", "replace").split("\n")
    shown = as_name(path.relative_to(root) if path != root else path.name)
    for number, line in enumerate(lines):
        if hit := pattern.search(line.rstrip("\r")):
            match = {"path": shown, "line": number + 1, "column": hit.start() + 1, "text": clip(line)}
            if context:
                match["before"] = [clip(each) for each in lines[max(0, number - context) : number]]
                match["after"] = [clip(each) for each in lines[number + 1 : number + 1 + context]]
            yield match


def clip(line: str) -> str:
    return line.rstrip("\r")[:LINE_CHARACTERS]


def aws_operation(command: Record) -> Any:
    """Call an AWS operation, in the CLI's spelling or boto3's; the response as JSON."""
    import boto3  # noqa: PLC0415  it takes 60 MB: only who calls AWS pays
    import botocore.exceptions as refused  # noqa: PLC0415

    try:
        session = boto3.Session(profile_name=command.get("profile"), region_name=command.get("region"))
        services = session.get_available_services()
        client = session.client(spelled("service", command["service"], dict(zip(services, services, strict=True))))
        operations = client.meta.method_to_api_mapping  # boto3's name: the API's
        known_as = {**every_spelling(operations), **{api: name for name, api in operations.items()}}
        operation = spelled("operation", command["operation"], known_as)
        known = client.meta.service_model.operation_model(operations[operation]).input_shape
        members = every_spelling(known.members if known else ())
        parameters = {spelled("parameters", key, members): sent(value) for key, value in command["parameters"].items()}
        if len(parameters) < len(command["parameters"]):
            raise Failed("parameters: two of them are one, spelled in two ways")
        if command.get("paginate") and client.can_paginate(operation):
            pages = {"MaxItems": command["limit"]} if "limit" in command else {}
            return client.get_paginator(operation).paginate(**parameters, PaginationConfig=pages).build_full_result()
        return getattr(client, operation)(**parameters)
    except refused.ClientError as error:
        said = error.response.get("Error", {})
        result = {"code": said.get("Code"), "message": said.get("Message")}
        result["requestId"] = error.response.get("ResponseMetadata", {}).get("RequestId")
        raise Failed(f"{result['code']}: {result['message']}", result=result) from None
    except (refused.NoCredentialsError, refused.NoRegionError) as error:
        where = "on the agent's machine, in its environment or ~/.aws; or name a profile or region in the command"
        raise Failed(f"{error} ({where})") from None
    except refused.BotoCoreError as error:
        raise Failed(str(error)) from None


def spelled(field: str, given: str, there: dict[str, str]) -> str:
    """Return what *given* stands for in *there*, {spelling: name}; raise Failed with what comes near."""
    if given not in there:
        near = difflib.get_close_matches(given, there, 5, 0.4) or sorted(there)[:8]
        names = ", ".join(dict.fromkeys(there[each] for each in near))
        raise Failed(f"{field}: no {given!r} here; of {len(set(there.values()))} there are, perhaps {names}")
    return there[given]


def every_spelling(names: Iterable[str]) -> dict[str, str]:
    return {spelling: name for name in names for spelling in spellings(name)}


def spellings(name: str) -> tuple[str, ...]:
    """Return a name as it is, and as the CLI, boto3 and the API spell it.

    >>> spellings("list_objects_v2")
    ('list_objects_v2', 'list-objects-v2', 'list_objects_v2', 'ListObjectsV2')
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|[^-_a-zA-Z0-9]+", name)
    kebab = "-".join(words).lower()
    return name, kebab, kebab.replace("-", "_"), "".join(word[:1].upper() + word[1:] for word in words)


def sent(value: Any) -> Any:
    """Return a parameter as boto3 wants it: bytes for {"content", "encoding": "base64"}, however deep."""
    if isinstance(value, list):
        return [sent(each) for each in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"content", "encoding"} and value["encoding"] == "base64":
        try:
            return base64.b64decode(value["content"], validate=True)
        except (ValueError, TypeError):
            raise Failed("parameters: a content is not base64") from None
    return {key: sent(each) for key, each in value.items()}


def plain(value: Any) -> Any:
    """Return as JSON what boto3 answers beside it: moments as text, and bytes and streams too, if they are UTF-8.

    Other bytes are {"content", "encoding": "base64"}; of a stream that is cut "truncated" is true.
    """
    if hasattr(value, "isoformat"):
        return value.isoformat()
    cut = False
    if hasattr(value, "read"):
        raw = value.read(READ_BYTES + 1)
        value, cut = raw[:READ_BYTES], len(raw) > READ_BYTES
    if isinstance(value, bytes):
        content = as_content(value)
        whole = {**content, "truncated": True} if cut else content
        return content["content"] if whole == {**content, "encoding": "utf-8"} else whole
    return sorted(value) if isinstance(value, set) else str(value)


IN_CHILD: dict[str, Callable[[Record], Any]] = {
    "read_file": read_file,
    "write_file": write_file,
    "list_directory": list_directory,
    "code_search": code_search,
    "aws_operation": aws_operation,
}
FILES = ("read_file", "write_file", "list_directory", "code_search")
EXECUTORS: dict[str, Callable[[Run], Any]] = {"execute_bash": execute_bash, **dict.fromkeys(IN_CHILD, in_child)}


def execute(run: Run) -> Record:
    """Execute the command of *run* and return the report of how it ended."""
    try:
        return {"status": "completed", "outcome": "ok", "result": EXECUTORS[run.command["type"]](run)}
    except Failed as failure:
        report: Record = {"status": "failed", "outcome": failure.outcome, "error": run.redacted(str(failure))}
        return report if failure.result is None else {**report, "result": failure.result}
    except OSError as error:
        return {"status": "failed", "outcome": "error", "error": run.redacted(explain(error))}
    except Exception as error:  # an executor's own defect must not leave its command without an end
        log.exception("a defect in %s", run.command["type"])
        return {"status": "failed", "outcome": "error", "error": run.redacted(f"the agent failed: {error!r}")}


# ---------------------------------------------------------------------------------------- Policy
# What this agent does at all, what it refuses, and what it asks a human for first.


class Rule(NamedTuple):
    """Commands of which each of these fields holds its regular expression."""

    patterns: dict[str, re.Pattern[str]]
    reason: str

    def covers(self, command: Record) -> bool:
        """Return whether *command* is one of them; an AWS operation is, however it is spelled.

        >>> Rule({"operation": re.compile("^delete-")}, "").covers({"operation": "DeleteBucket"})
        True
        """
        return all(any(map(pattern.search, readings(field, command))) for field, pattern in self.patterns.items())


def readings(field: str, command: Record) -> tuple[str, ...]:
    """Return what a field of *command* may be read as."""
    value = command.get(field, "")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return spellings(text) if field == "operation" else (text,)


class Policy(NamedTuple):
    """What a policy file says; where there is none, everything is allowed."""

    types: Sequence[str] = ()  # that are executed; all of them, if there is none
    roots: Sequence[str] = ()  # outside of which files are out of reach; nowhere, if there is none
    timeout: float = RUN_S  # s of running for a command that does not say
    longest: float = LONGEST_S  # s of running for a command that says more
    answer: float = ANSWER_S  # s in which a yes must come, and be used
    refuse: Sequence[Rule] = ()
    ask: Sequence[Rule] = ()
    redact: bool = True  # secrets in what commands print
    secret_names: re.Pattern[str] = USUAL.names  # of variables whose values are secret
    secret_file: Sequence[bytes] = ()  # the values that it holds

    @property
    def secrets(self) -> Secrets | None:
        """Those of the agent, to which come those of a command."""
        return Secrets(self.secret_names, self.secret_file).of(os.environ) if self.redact else None

    def judge(self, command: Record) -> tuple[str, str]:
        """Return "refuse", "ask" or "run", and why.

        >>> Policy(refuse=[Rule({"command": re.compile("mkfs")}, "no disks")]).judge({"command": "sudo mkfs"})
        ('refuse', 'no disks')
        """
        if self.types and command.get("type") not in self.types:
            return "refuse", f"it does not do {command.get('type')}"
        for verdict, rules in (("refuse", self.refuse), ("ask", self.ask)):
            for rule in rules:
                if rule.covers(command):
                    return verdict, rule.reason
        return "run", ""

    def limited(self, command: Record) -> Record:
        """Return *command* with the timeout (s) that it gets here."""
        usual = min(FILES_S, self.timeout) if command["type"] in FILES else self.timeout
        return {**command, "timeout": min(command.get("timeout", usual), self.longest)}


class BadPolicy(Exception):
    """A policy that cannot be followed; where: the key, and for a rule which of which tables it is in."""

    def __init__(self, problem: str, key: str = "", table: str = "", number: int = 0) -> None:
        super().__init__(problem)
        self.where = key, table, number


def read_policy(path: Path) -> Policy:
    """Return what the TOML file *path* says; raise BadPolicy with the line and the reason if any of it is not clear."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadPolicy(explain(error) if isinstance(error, OSError) else f"{path}: {error}") from None
    try:
        said = tomllib.loads(text)
    except RecursionError:
        raise BadPolicy(f"{path}: it is nested too deep") from None
    except ValueError as error:  # it tells the line
        where = str(error).replace("at end of document", f"at line {text.count(chr(10)) + 1}, the end")
        raise BadPolicy(f"{path}: {where}") from None
    try:
        return Policy(**{key: meaning(key, value) for key, value in said.items()})
    except BadPolicy as problem:
        raise BadPolicy(f"{path}, line {line_of(text, *problem.where)}: {problem}") from None


def meaning(key: str, value: Any) -> Any:
    """Return what the *value* of a *key* of a policy means; raise BadPolicy."""
    if key not in MEANINGS:
        raise BadPolicy(f"{key} is not one of {', '.join(MEANINGS)}", key)
    wanted, understood = MEANINGS[key]
    if not understood(value):
        raise BadPolicy(f"{key} must be {wanted}", key)
    return UNDERSTOOD[key](value) if key in UNDERSTOOD else value


def real_folder(root: str) -> str:
    real = os.path.realpath(os.path.expanduser(root))
    if not os.path.isdir(real):
        raise BadPolicy(f"roots: {root} is not a folder", "roots")
    return real


def read_secrets(path: str) -> list[bytes]:
    """Return the lines of the file *path*; raise BadPolicy, which must not show any."""
    try:
        lines = [line.strip() for line in Path(path).expanduser().read_bytes().splitlines()]
    except (OSError, RuntimeError) as error:
        raise BadPolicy(
            f"secret_file: {explain(error) if isinstance(error, OSError) else error}", "secret_file"
        ) from None
    for number, line in enumerate(lines, 1):
        if 0 < len(line) < SECRET_BYTES:
            raise BadPolicy(f"secret_file: its line {number} has less than {SECRET_BYTES} bytes", "secret_file")
    return [line for line in lines if line]


def strings(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= LONGEST_S


def tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, dict) for each in value)


MEANINGS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "types": (
        f"a list of some of {', '.join(EXECUTORS)}",
        lambda value: strings(value) and set(value) <= EXECUTORS.keys(),
    ),
    "roots": ("a list of folders", strings),
    "timeout": (f"a number of seconds up to {LONGEST_S:.0f}", seconds),
    "longest": (f"a number of seconds up to {LONGEST_S:.0f}", seconds),
    "answer": (f"a number of seconds up to {LONGEST_S:.0f}", seconds),
    "refuse": ("tables: [[refuse]]", tables),
    "ask": ("tables: [[ask]]", tables),
    "redact": ("true or false", lambda value: isinstance(value, bool)),
    "secret_names": ("a list of names, with * for any text", strings),
    "secret_file": ("the name of a file", lambda value: isinstance(value, str)),
}
UNDERSTOOD: dict[str, Callable[[Any], Any]] = {  # the others mean what they say
    "roots": lambda roots: [real_folder(root) for root in roots],
    "refuse": lambda rules: [read_rule(table, "refuse", number) for number, table in enumerate(rules)],
    "ask": lambda rules: [read_rule(table, "ask", number) for number, table in enumerate(rules)],
    "secret_names": names_like,
    "secret_file": read_secrets,
}
FIELDS = (  # of a command that decide what is done when it is executed
    *("id", "type", "command", "path", "content", "query", "service", "operation", "parameters", "region", "profile"),
    *("workingDir", "env", "timeout", "stdin", "pty", "columns", "rows", "encoding", "mode", "append", "paginate"),
    *("expectedSha256", "offset", "limit", "tail", "recursive", "glob", "after", "regex", "ignoreCase", "context"),
)


def read_rule(table: Record, name: str, number: int) -> Rule:
    """Return the rule in the *number*-th table of that *name*; raise BadPolicy."""
    patterns: dict[str, re.Pattern[str]] = {}
    reason = table.get("reason", f"a rule of this agent: {json.dumps(table, ensure_ascii=False)}")
    for field, source in table.items():
        if field not in (*FIELDS, "reason"):
            raise BadPolicy(f"{field} is no field of a command; possible are {', '.join(FIELDS)}", field, name, number)
        if not isinstance(source, str):
            raise BadPolicy(f"{field} must be a string", field, name, number)
        try:
            as_spelled = re.IGNORECASE if field in ("service", "operation") else 0
            patterns |= {} if field == "reason" else {field: re.compile(source, as_spelled)}
        except re.error as error:
            raise BadPolicy(f"{field} is not a regular expression: {error}", field, name, number) from None
    if not patterns:
        raise BadPolicy(f"the rule names no field; possible are {', '.join(FIELDS)}", "", name, number)
    return Rule(patterns, reason)


def line_of(text: str, key: str, table: str, number: int) -> int:
    """Return the line in the TOML *text* that sets *key*, in the *number*-th [[table]] if there is one."""
    here, seen, found = "", {"": 0}, 1
    for line, content in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[+\s*([\w-]+)", content):
            here = header[1]
            seen[here] = seen.get(here, -1) + 1
            found = line if here == key or (here, seen[here]) == (table, number) else found
        elif key and (here, seen[here]) == (table, number) and re.match(rf"\s*[\"']?{re.escape(key)}\b", content):
            return line
    return found


# ---------------------------------------------------------------------------------------- Links
# Where commands come from and reports go to.


class Unreachable(Exception):
    """The queue cannot be reached now; later it may be."""


class Refused(Exception):
    """What was sent is not accepted as it is; the text says why."""


class Link(Protocol):
    remote: bool  # output has to be sent
    stays: float  # s between calls of stay

    def changes(self, seconds: float) -> dict[str, Record]:
        """Return the commands that are new or changed and have not ended, waiting for one up to *seconds*."""

    def get(self, identity: str) -> Record | None:
        """Return a command, or None if it is gone."""

    def report(self, identity: str, patch: Record) -> Record | None:
        """Return the command after *patch*, or None if it went to another, or is gone."""

    def post(self, order: Record, key: str) -> str:
        """Queue *order*, once for each *key*, and return its id; raise Refused."""

    def cancel(self, identity: str) -> None:
        """Cancel a command; one that has ended or is gone stays so."""

    def output(self, identity: str) -> dict[str, Path]:
        """Return the files that the output of a command goes to, by stream."""

    def size(self, identity: str, stream: str) -> int:
        """Return how much the service has of a stream."""

    def append(self, run: Run, stream: str, offset: int, piece: bytes) -> bool:
        """Send *piece*, which stands at *offset* of a stream; return whether it is wanted, and the run still ours."""

    def typed(self, identity: str, offset: int, until: int) -> bytes:
        """Return what was sent to the stdin of a command, from *offset* on, up to *until*, or a first part of it."""

    def open(self) -> None:
        """Begin, as the only agent of this name here."""

    def stay(self, name: str, said: Record, anew: bool) -> None:
        """Say that *name* is there; and what it says of itself, if that is *anew*, or was forgotten."""

    def leave(self, name: str) -> None:
        """Say that *name* has gone."""

    def now(self) -> float:
        """Return the moment (s) by the clock of the queue."""

    def close(self) -> None:
        """Let go of who waits in changes(); reports are still taken."""


class FolderLink:
    """The queue reached through its state directory."""

    remote, stays = False, SEEN_S

    def __init__(self, directory: Path, poll: float = POLL_S) -> None:
        import kirosync  # noqa: PLC0415  only this link needs it

        self.rules, self.poll = kirosync, poll
        try:
            self.store = kirosync.Store(directory, kinds=("commands",), by="agent")
        except kirosync.Refusal as refusal:
            raise Unreachable(f"the state directory {directory} cannot be opened: {refusal}") from None
        self.cursor: str | None = None
        self.revision = -1
        self.commands = os.fspath(self.store.directory / "commands")
        self.seen, self.looked = 0, 0.0  # its mtime in ns, and when it was last looked into
        self.stirred = 0.0  # when there was the last change

    def open(self) -> None:
        """Nothing: what an agent before this one has printed stays."""

    def stay(self, name: str, said: Record, anew: bool) -> None:
        if anew or not self.store.saw(name):
            self.change(lambda pen: pen.announce(name, said))

    def leave(self, name: str) -> None:
        with contextlib.suppress(OSError):
            self.store.forget(name)

    def now(self) -> float:
        return time.time()

    def changes(self, seconds: float) -> dict[str, Record]:
        until = time.monotonic() + seconds
        try:
            while self.revision == self.store.revision and time.monotonic() < until and not self.store.closed:
                brisk = time.monotonic() < self.stirred + BRISK_S
                time.sleep(min(self.poll, BRISK_POLL_S) if brisk else self.poll)
                self.look()
            if self.revision != self.store.revision:
                self.stirred = time.monotonic()
            delta = self.store.delta(self.cursor)
        except (self.rules.Refusal, OSError) as error:
            raise Unreachable(str(error)) from None
        self.cursor, self.revision = delta.cursor, delta.revision
        changed = delta.shown("commands", OPEN)
        return {identity: entry.record(identity) for identity, entry in changed.items()}

    def look(self) -> None:
        """Notice what is new: by the journal, or, put into the folder by hand, within two seconds."""
        self.store.refresh()
        if time.monotonic() - self.looked > self.rules.LOOK_S:
            modified = os.stat(self.commands).st_mtime_ns if os.path.exists(self.commands) else 0
            self.store.notice(None if modified != self.seen else set())
            self.seen, self.looked = modified, time.monotonic()

    def get(self, identity: str) -> Record | None:
        entry = self.store.get("commands", identity)
        return entry.record(identity) if entry else None

    def change(self, rule: Callable[[Any], Any]) -> Any:
        try:
            return self.store.change(rule)
        except (self.rules.NotFound, self.rules.Conflict):
            return None
        except (self.rules.Busy, self.rules.Full, self.rules.Broken) as refusal:
            raise Unreachable(str(refusal)) from None
        except (self.rules.Refusal, ValueError, RecursionError) as refusal:
            raise Refused(str(refusal)) from None

    def report(self, identity: str, patch: Record) -> Record | None:
        return self.change(lambda pen: self.rules.report(pen, identity, patch))  # type: ignore[no-any-return]

    def post(self, order: Record, key: str) -> str:
        return str(self.change(lambda pen: self.rules.queue(pen, order, key))[0]["id"])

    def cancel(self, identity: str) -> None:
        self.change(lambda pen: self.rules.cancel_command(pen, identity))

    def output(self, identity: str) -> dict[str, Path]:
        return {stream: self.store.stream(identity, stream) for stream in ("stdout", "stderr")}

    def size(self, identity: str, stream: str) -> int:
        return int(self.store.extent(identity, stream))

    def append(self, run: Run, stream: str, offset: int, piece: bytes) -> bool:
        raise NotImplementedError("it is there already")

    def typed(self, identity: str, offset: int, until: int) -> bytes:
        return bytes(self.store.read_stream(identity, "stdin", offset, min(PIECE_BYTES, until - offset)))

    def close(self) -> None:
        self.store.release()


class HttpLink:
    """The queue reached through the service."""

    remote, stays = True, RENEWED_S

    def __init__(self, server: str, token: str, spool: Path) -> None:
        import client  # noqa: PLC0415  only this link needs it

        self.errors = client.Unreachable, client.Refused
        self.service, self.cursor, self.name = client.Service(server, token), "", ""
        self.spool = spool  # the folder of what was printed and not sent yet
        self.ahead = time.time() - time.monotonic()  # of the service's clock against ours

    def open(self) -> None:
        shutil.rmtree(self.spool, ignore_errors=True)  # of an agent that was killed
        self.spool.mkdir(mode=0o700)

    def stay(self, name: str, said: Record, anew: bool) -> None:
        self.name = name
        if anew or self.ask("PATCH", agent_at(name), {}) is None:
            self.ask("PUT", agent_at(name), said)

    def leave(self, name: str) -> None:
        self.ask("DELETE", agent_at(name))

    @contextlib.contextmanager
    def in_our_words(self) -> Iterator[None]:
        unreachable, refused = self.errors
        try:
            yield
        except unreachable as problem:
            raise Unreachable(str(problem)) from None
        except refused as refusal:
            later = refusal.status == 403  # its scope may be set right, and no report is lost until then
            raise (Unreachable if later else Refused)(str(refusal)) from None

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Any:
        with self.in_our_words():
            return self.service.request(method, path, body, 0, **headers)

    def ask(self, method: str, path: str, body: Record | None = None, **headers: str) -> Record | None:
        with self.in_our_words():
            return self.service.ask(method, path, body, 0, **headers)

    def changes(self, seconds: float) -> dict[str, Record]:
        asked, query = time.monotonic(), {"only": "commands", "status": "pending,processing", "since": self.cursor}
        query |= {"agent": self.name} if self.name else {}
        with self.in_our_words():
            said = self.service.sync(query, wait=seconds if self.cursor else 0)
        if not said["commands"] and self.cursor and time.monotonic() - asked < min(seconds, PAUSE_S):
            time.sleep(PAUSE_S)  # the service has too many who wait, and did not hold us
        self.cursor, self.ahead = said["cursor"], said.get("serverTime", 0) / 1000 - time.monotonic()
        return {identity: {"id": identity, **command} for identity, command in said["commands"].items()}

    def now(self) -> float:
        return time.monotonic() + self.ahead

    def get(self, identity: str) -> Record | None:
        said = self.ask("GET", command_at(identity))
        return said and {"id": identity, **said}

    def report(self, identity: str, patch: Record) -> Record | None:
        said = self.ask("PATCH", command_at(identity), patch)
        return said and {"id": identity, **said}

    def post(self, order: Record, key: str) -> str:
        said = self.ask("POST", "/command", order, Idempotency_Key=key)
        if not said or "commandId" not in said:
            raise Unreachable(f"{self.service.url} does not take commands")
        return str(said["commandId"])

    def cancel(self, identity: str) -> None:
        self.ask("POST", command_at(identity, "cancel"))

    def output(self, identity: str) -> dict[str, Path]:
        self.spool.mkdir(mode=0o700, parents=True, exist_ok=True)  # some clean up where temporary files are
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return {stream: self.spool / f"{name}.{stream}" for stream in ("stdout", "stderr")}

    def size(self, identity: str, stream: str) -> int:
        answer = self.request("GET", command_at(identity, f"output?stream={stream}&tail=0"))
        return int(answer.headers.get("X-Output-Next", 0))

    def append(self, run: Run, stream: str, offset: int, piece: bytes) -> bool:
        held = "".join(f"&{name}={quote(str(value), safe='')}" for name, value in run.held.items())
        path = command_at(run.identity, f"output?stream={stream}&offset={offset}{held}")
        answer = self.request("POST", path, piece, Content_Type="application/octet-stream")
        return bool(answer.status == 200)

    def typed(self, identity: str, offset: int, until: int) -> bytes:
        answer = self.request("GET", command_at(identity, f"output?stream=stdin&offset={offset}"))
        return bytes(answer.data) if answer.status == 200 else b""

    def close(self) -> None:
        """Nothing: a held request ends by itself."""


def agent_at(name: str) -> str:
    return f"/agents/{quote(name, safe='')}"


def command_at(identity: str, part: str = "") -> str:
    return f"/command/{quote(identity, safe='')}{part and '/'}{part}"


# ---------------------------------------------------------------------------------------- Loop
# One turn: see what is new, queue it for the workers, renew what is running.


YES = ("yes", "y", "true")


class Yes(NamedTuple):
    """A human's permission: for the command of this sha256, until this moment (s)."""

    sha256: str
    until: float


class Question(NamedTuple):
    """What a human is asked: whether exactly this command may run. It is a user_input in the queue."""

    command: Record
    reason: str
    seconds: float  # in which a yes must come, and be used
    identity: str = ""  # of the user_input, once it has been posted
    stale: str = ""  # the one about the command as it was before someone changed it

    def order(self, agent: str) -> tuple[Record, str]:
        """Return the user_input, and the key by which it is one and the same for the same command; raise Refused."""
        exact = json.dumps(exactly(self.command), indent=2, ensure_ascii=False)
        shown = "".join(each if each.isprintable() or each == "\n" else ascii(each)[1:-1] for each in exact)
        if len(shown) > PROMPT_CHARACTERS:
            raise Refused(
                f"it cannot be shown to a human: it has {len(shown)} characters, {PROMPT_CHARACTERS} are possible"
            )
        order: Record = {
            "type": "user_input",
            "prompt": f"May {agent} run this? It asks because: {self.reason}\n{shown}",
        }
        order |= {"inputType": "confirmation", "executionId": self.command["id"], "expiresIn": self.seconds}
        order["metadata"] = {"agent": agent, "sha256": sha256_of(self.command)}
        attempt = self.command.get("attempt", 1)
        return order, f"ask-{digest_of(agent)[:16]}-{attempt}-{sha256_of(self.command)}"

    def answer(self, posted: Record | None) -> tuple[Yes | None, str]:
        """Return what the human said, from the user_input when it has ended: a yes, or None and why not."""
        if posted is None:
            return None, "the question whether it may run was removed"
        result = posted.get("result")
        value = result.get("value") if isinstance(result, dict) else result
        if posted["status"] == "completed" and (value is True or str(value).strip().lower() in YES):
            return Yes(sha256_of(self.command), posted["createdAt"] / 1000 + self.seconds), "yes"
        if posted["status"] == "completed":
            return None, "a human said no"
        return None, f"nobody allowed it ({self.reason}): {posted.get('error', posted.get('outcome'))}"


def exactly(command: Record) -> Record:
    """Return what of *command* decides what is done when it is executed."""
    return {field: command[field] for field in FIELDS if field in command}


def sha256_of(command: Record) -> str:
    return digest_of(json.dumps(exactly(command), sort_keys=True))


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class Delivery:
    """One stream of a run on its way to a service elsewhere."""

    def __init__(self, run: Run, stream: str) -> None:
        self.run, self.stream, self.sent, self.start = run, stream, 0, -1
        self.first, self.wanted = run.held.get("attempt", 1) == 1, True

    def move(self, link: Link) -> bool:
        """Send the next piece; return whether there may be more at once."""
        path = self.run.paths[self.stream]
        if not self.wanted or not path.exists():
            return False
        if self.first and self.start < 0 and self.stream in self.run.told:  # the result has it all
            return False
        with open(path, "rb") as file:
            piece = os.pread(file.fileno(), PIECE_BYTES, self.sent)
        if not piece:
            return False
        if self.start < 0:  # an earlier attempt may have left some
            self.start = 0 if self.first else link.size(self.run.identity, self.stream)
        self.wanted = link.append(self.run, self.stream, self.start + self.sent, piece)
        self.sent += len(piece)
        return len(piece) == PIECE_BYTES

    def close(self) -> None:
        self.run.paths[self.stream].unlink(missing_ok=True)


class Typing:
    """What is sent to the stdin of a run, on its way there."""

    def __init__(self, run: Run) -> None:
        self.run, self.taken, self.left, self.last = run, 0, b"", b"\n"

    def move(self, link: Link) -> bool:
        """Write the next piece, or close the stdin; return whether there may be more at once."""
        if self.run.stdin < 0:
            return False
        if not self.left and self.taken < self.run.typed:
            self.left = link.typed(self.run.identity, self.taken, self.run.typed)
            self.taken, self.last = self.taken + len(self.left), self.left[-1:]
        try:
            written = os.write(self.run.stdin, self.left) if self.left else 0
        except BlockingIOError:
            return False
        except OSError:  # the child reads no more
            self.close()
            return False
        self.left = self.left[written:]
        if self.run.closed and not self.left and self.taken >= self.run.typed:
            if self.run.command.get("pty"):  # where a line has begun, the first ends only that
                os.write(self.run.stdin, END_OF_INPUT if self.last == b"\n" else 2 * END_OF_INPUT)
            self.close()
        return written > 0

    def close(self) -> None:
        if self.run.stdin >= 0:
            os.close(self.run.stdin)
            self.run.stdin = -1


class Agent:
    """Takes commands of its types over a link and executes up to *jobs* at once."""

    def __init__(
        self,
        link: Link,
        name: str,
        forks: ForkServer,
        *,
        jobs: int = 4,
        policy: Policy | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.link, self.name, self.forks, self.policy, self.clock = link, name, forks, policy or Policy(), clock
        self.pool, self.clerk = ThreadPoolExecutor(jobs), ThreadPoolExecutor(1)  # for work, and for words
        self.secrets = self.policy.secrets
        self.taken: dict[str, Run] = {}
        self.asked: dict[str, Question] = {}  # by the command that waits for the answer
        self.renewed = clock()
        self.stayed = float("-inf")  # when it last said that it is there
        self.ear, self.mouth = os.pipe()  # whoever wants it to stop says so here; a signal cannot be missed
        os.set_blocking(self.mouth, False)
        self.stopping = threading.Event()  # nothing more is claimed
        self.guard = threading.RLock()  # of who takes what, against the workers
        self.failed = ""  # why it stops by itself

    def turn(self, seconds: float = HOLD_S) -> None:
        """Look once for what is new, for up to *seconds*, and renew the claims that are due."""
        self.stay()
        due = min(self.renewed + LEASE_S / 3, self.stayed + self.link.stays) - self.clock()
        news = self.link.changes(max(0.0, min(seconds, due, ASK_S if self.asked else due)))
        for command in sorted(news.values(), key=lambda command: command.get("createdAt", 0)):
            with self.guard:
                self.consider(command)
        if self.clock() >= self.renewed + LEASE_S / 3:
            for run in [*self.taken.values()]:
                if run.held and not self.link.report(run.identity, {**CLAIM, **run.held}):
                    run.end("given up")
            self.renewed = self.clock()
        for question in [*self.asked.values()]:
            self.ask(question)

    def stay(self) -> None:
        """Say that we are there, if it is time to. Not to be able to must keep nothing from being executed."""
        if self.clock() < self.stayed + self.link.stays:
            return
        said: Record = {"kind": "agent", "types": [*(self.policy.types or EXECUTORS)], "version": __version__}
        first, self.stayed = self.stayed < 0, self.clock()
        try:
            self.link.stay(self.name, said, first)
        except (Unreachable, Refused) as error:
            log.info("who is here is not known to others: %s", error)
            self.stayed -= self.link.stays - SEEN_S

    def consider(self, command: Record) -> None:
        """Take *command* if it is for us; see to its end if it was ours in another life."""
        run, pending = self.taken.get(command["id"]), command["status"] == "pending"
        if run:
            run.again = command if pending else None
            if not pending:
                run.see(command)
        elif not pending and command.get("agent") == self.name:
            self.take(command, self.give_up, self.clerk)
        elif pending and self.is_for_us(command):
            verdict, reason = self.policy.judge(command)
            if verdict == "ask":
                self.wonder(command, reason)
            else:
                self.settle(command, None, "" if verdict == "run" else reason)

    def wonder(self, command: Record, reason: str) -> None:
        """Have a question about *command*, if there is none about exactly this."""
        before = self.asked.get(command["id"])
        if not before or exactly(before.command) != exactly(command):
            stale = before.identity if before else ""
            self.asked[command["id"]] = Question(command, reason, self.policy.answer, stale=stale)

    def is_for_us(self, command: Record) -> bool:
        """Return whether *command* is ours to execute, or to refuse: of our types, or meant for us alone."""
        target, types = command.get("target", self.name), self.policy.types or EXECUTORS
        return target == self.name and command["type"] in (EXECUTORS if "target" in command else types)

    def settle(self, command: Record, yes: Yes | None, refusal: str) -> None:
        """Have *command* executed, or refused, if there is a reason to."""
        if refusal:
            self.take(command, partial(self.refuse, reason=refusal), self.clerk)
        else:
            self.take(command, partial(self.perform, yes=yes), self.pool)

    def take(self, command: Record, work: Callable[[Run], None], pool: ThreadPoolExecutor) -> None:
        run = self.taken[command["id"]] = Run(command, self.forks, self.policy.roots, self.secrets)
        pool.submit(self.see_to, run, work)

    def see_to(self, run: Run, work: Callable[[Run], None]) -> None:
        """Do the *work*, as one of the pool's threads; whatever comes of it, the agent goes on."""
        try:
            work(run)
        except Refused as error:
            log.error("%s: the report was refused: %s", run.identity, error)
        except Unreachable as error:
            log.error("%s: not reported, the agent stops: %s", run.identity, error)
        except Exception:  # a defect of ours; a thread of the pool would keep it to itself
            log.exception("%s: the agent failed", run.identity)
        finally:
            with self.guard:
                del self.taken[run.identity]
                if run.again and not self.stopping.is_set():
                    self.consider(run.again)
            if self.forks.gone:
                self.stop("its fork server is gone")

    def perform(self, run: Run, yes: Yes | None = None) -> None:
        """Claim the command of *run*, execute it and report how it ended."""
        if self.stopping.is_set():
            return
        if yes and self.link.now() > yes.until:
            return self.refuse(run, "the yes to it has expired")
        claimed = self.claim(run)
        if not claimed:
            return
        allowed = yes.sha256 == sha256_of(claimed) if yes else self.policy.judge(claimed)[0] == "run"
        if not (allowed and self.is_for_us(claimed)):
            self.insist(run, {"status": "pending", **run.held})  # it is no longer what was judged: once more
            return
        run.command = self.policy.limited(claimed)
        run.paths = self.link.output(run.identity)
        run.see(claimed)
        with self.carrying(run):
            ended = execute(run)
        unfinished = ended["outcome"] == "lost" or (ended["outcome"] == "cancelled" and run.why == "stopped")
        if unfinished and claimed.get("retryable"):
            ended = {"status": "pending"}
        try:
            self.insist(run, {**ended, **run.held})
        except Refused as error:
            said = {"status": "failed", "outcome": "error", "error": f"the report was refused: {error}"}
            self.insist(run, {**said, **run.held})

    @contextlib.contextmanager
    def carrying(self, run: Run) -> Iterator[None]:
        """Have its output brought to where it is wanted, and its input to its child, until all of it is there."""
        parts: list[Delivery | Typing] = [Delivery(run, stream) for stream in run.paths if self.link.remote]
        parts += [Typing(run)] if run.command.get("stdin") else []
        courier = threading.Thread(target=self.carry, args=(run, parts), daemon=True)
        if parts:
            courier.start()
        try:
            yield
        finally:
            run.over.set()
            if parts:
                courier.join()

    def carry(self, run: Run, parts: Sequence[Delivery | Typing]) -> None:
        """Move *parts* until *run* is over and nothing is left to move; be its courier."""
        more, over, until = False, False, float("inf")
        while more or not over:
            over = run.over.wait(0 if more else CARRY_S)
            try:
                more = any([part.move(self.link) for part in parts])  # noqa: C419  each of them
            except Unreachable as error:
                log.warning("%s: its output or input must wait: %s", run.identity, error)
                more = True
                if self.stopping.is_set():
                    until = min(until, time.monotonic() + STOP_S)
                if time.monotonic() > until:
                    break
                time.sleep(PAUSE_S)
            except (Refused, OSError) as error:
                log.error("%s: its output or input is lost: %s", run.identity, error)
                break
        for part in parts:
            part.close()

    def claim(self, run: Run) -> Record | None:
        """Return the command of *run* once it is ours, or None if it went to another, or has ended."""
        holder = {"agent": self.name, "claim": secrets.token_hex(8)}
        claimed = self.insist(run, {**CLAIM, **holder})
        if claimed:
            run.held = {**holder, "attempt": claimed["attempt"]}
        return claimed

    def refuse(self, run: Run, reason: str) -> None:
        """End the command of *run* before anything is done, and say why."""
        if self.claim(run):
            said = {"status": "failed", "outcome": "refused", "error": f"the agent {self.name} refuses it: {reason}"}
            self.insist(run, {**said, **run.held})

    def ask(self, question: Question) -> None:
        """Have a human asked whether a command may run; when there is an answer, run or refuse it."""
        command = question.command
        if question.stale:
            self.link.cancel(question.stale)
        current = self.link.get(command["id"])
        if current is None or current["status"] != "pending":
            del self.asked[command["id"]]
            if question.identity:
                self.link.cancel(question.identity)
            return
        try:
            identity = question.identity or self.link.post(*question.order(self.name))
            posted = self.link.get(identity)
        except Refused as error:
            posted = {"status": "failed", "error": str(error)}
        if posted and posted["status"] in OPEN:
            self.asked[command["id"]] = question._replace(identity=posted["id"], stale="")
            return
        del self.asked[command["id"]]
        yes, said = question.answer(posted)
        with self.guard:
            self.settle(command, yes, "" if yes else said)

    def give_up(self, run: Run) -> None:
        """Say that the command of *run* is lost, which this agent was executing before it was stopped."""
        command = run.command
        holder: Record = {key: command[key] for key in ("agent", "claim", "attempt") if key in command}
        lost = f"the agent {self.name} was restarted while it ran; how it ended is unknown"
        end = {"status": "failed", "outcome": "lost", "error": lost}
        self.insist(run, {**({"status": "pending"} if command.get("retryable") else end), **holder})

    def insist(self, run: Run, patch: Record) -> Record | None:
        """Report until it is taken: how a command ended must not be lost to a service that restarts."""
        until = float("inf")
        for pause in itertools.chain((0.1, 0.5, 1.0, 3.0), itertools.repeat(RETRY_S)):
            try:
                return self.link.report(run.identity, patch)
            except Unreachable as error:
                log.warning("%s: not reported yet: %s", run.identity, error)
                if self.stopping.is_set():
                    until = min(until, time.monotonic() + STOP_S)
                if time.monotonic() > until:
                    raise
                time.sleep(min(pause, 0.5) if self.stopping.is_set() else pause)
        raise AssertionError("unreachable")

    def follow(self) -> None:
        """Turn until told to stop; should that ever fail for a defect, stop, so that it is seen."""
        failures = 0
        try:
            while not self.stopping.is_set():
                try:
                    self.turn()
                    failures = 0
                except (Unreachable, Refused) as error:
                    failures = min(failures + 1, 8)
                    log.warning("%s; trying again", error)
                    self.stopping.wait(min(RETRY_S, 0.25 * 2**failures))
        except BaseException as error:
            self.stop(f"a defect: {error!r}")
            raise

    def stop(self, why: str) -> None:
        """Have it stop, which is a failure: *why*."""
        self.failed = self.failed or why
        with contextlib.suppress(BlockingIOError):
            os.write(self.mouth, b"x")

    def run(self) -> None:
        """Work until told to stop; then let what runs finish for STOP_S, and end it."""
        follower = threading.Thread(target=self.follow, daemon=True)
        follower.start()
        os.read(self.ear, 1)
        self.stopping.set()
        log.info("stopping; what runs has %.0f s: %s", STOP_S, ", ".join(self.taken) or "nothing")
        self.link.close()
        until = time.monotonic() + STOP_S
        while self.taken and time.monotonic() < until:
            time.sleep(STOP_POLL_S)
        for run in [*self.taken.values()]:
            run.end("stopped")
        self.pool.shutdown()
        self.clerk.shutdown()
        with contextlib.suppress(Unreachable, Refused):
            self.link.leave(self.name)
        if self.failed:
            sys.exit(f"agent: stopped: {self.failed}")


# ---------------------------------------------------------------------------------------- Main
# argv, the environment, signals.


def own_folder() -> Path:
    """Return a folder for temporary files that is this user's, and end the program if it is another's."""
    folder = Path(tempfile.gettempdir(), f"kirosync-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    status = os.lstat(folder)
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        sys.exit(f"agent: {folder} is not this user's own; have it removed, or set TMPDIR to another folder")
    folder.chmod(0o700)
    return folder


def hold_name(name: str, folder: Path) -> IO[str]:
    """Return a file whose lock says that *name* runs here; end the program if another holds it."""
    file = open(folder / f"{quote(name, safe='')}.lock", "a")  # noqa: SIM115  held until the end
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(f"agent: another agent named {name!r} runs here; choose another --name")
    return file


def link_of(arguments: argparse.Namespace) -> tuple[Link, Path]:
    """Return the link that *arguments* ask for, and the folder of the agents' locks."""
    try:
        if not arguments.server:
            return FolderLink(Path(arguments.state), arguments.poll), Path(arguments.state, "agents")
        if not re.match(r"https?://", arguments.server):
            sys.exit(f"agent: --server wants a URL, such as http://{arguments.server}")
        token = os.environ.get("KIROSYNC_TOKEN", "")
        token = Path(arguments.token_file).read_text().strip() if arguments.token_file else token
        if not token:
            sys.exit("agent: --server wants a token: give --token-file FILE, or set KIROSYNC_TOKEN")
        if not re.fullmatch(r"[!-~]+", token):
            sys.exit("agent: the token has characters that no token has: is it one line, of ASCII?")
        folder = own_folder() / re.sub(r"\W+", "_", arguments.server.rstrip("/").lower())
        return HttpLink(arguments.server, token, folder / f"{quote(arguments.name, safe='')}.output"), folder
    except ModuleNotFoundError as error:
        sys.exit(
            f"agent: {error.name} is missing: --state needs kirosync.py and its packages beside it, "
            "--server client.py and urllib3"
        )
    except Unreachable as error:
        sys.exit(f"agent: {error}")
    except OSError as error:
        sys.exit(f"agent: {explain(error)}")


def arguments_of() -> argparse.Namespace:
    """Return what argv says, and the environment where it is silent."""
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        "agent.py", description="Executes the commands of kirosync.", formatter_class=shown
    )
    beside = str(Path(__file__).absolute().with_name("state"))
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--state", default=os.environ.get("KIROSYNC_STATE", beside), help="the state directory")
    where.add_argument("--server", help="the service's URL, instead of the state directory")
    parser.add_argument("--token-file", help="holds the token for --server; else KIROSYNC_TOKEN does")
    host = socket.gethostname()
    parser.add_argument(
        "--name", help=f"what it is known by, one of a kind; else {host}, or {host}-remote with --server"
    )
    parser.add_argument("--jobs", type=int, default=4, help="commands at once")
    parser.add_argument("--poll", type=float, default=POLL_S, help="seconds between looks at the state directory")
    parser.add_argument("--policy", default=os.environ.get("KIROSYNC_POLICY"), help="a TOML file; see the README")
    arguments = parser.parse_args()
    if arguments.jobs < 1 or not arguments.poll > 0:
        parser.error("--jobs and --poll want more than 0")
    arguments.name = arguments.name or (f"{host}-remote" if arguments.server else host)
    if not re.fullmatch(r"[^\0-\x1f\x7f]{1,40}", arguments.name):
        parser.error("--name wants 1 to 40 characters")
    return arguments


def main() -> None:
    arguments = arguments_of()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(process)d] %(levelname)s %(message)s")
    try:
        policy = Policy() if arguments.policy is None else read_policy(Path(arguments.policy))
    except BadPolicy as problem:
        sys.exit(f"agent: the policy cannot be followed: {problem}")
    LIBC.prctl(PR_SET_DUMPABLE, 0)  # children of the same user cannot read our environment, nor that of our forks
    forks = ForkServer()  # before anything makes us large, or starts a thread
    link, folder = link_of(arguments)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with hold_name(arguments.name, folder):
        link.open()
        agent = Agent(link, arguments.name, forks, jobs=arguments.jobs, policy=policy)
        signal.set_wakeup_fd(agent.mouth, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # to be heard is enough
        log.info("agent %s at %s", arguments.name, arguments.server or arguments.state)
        if arguments.policy is not None:
            rules = f"{len(policy.refuse)} to refuse, {len(policy.ask)} to ask for"
            log.info("policy %s: types %s, roots %s, %s", arguments.policy, policy.types, policy.roots, rules)
        if not policy.redact:
            log.warning("secrets in what commands print are not redacted")
        agent.run()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # it is ending already
    forks.close()


if __name__ == "__main__":
    main()
