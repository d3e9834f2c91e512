#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["urllib3>=2", "boto3>=1.34"]
# ///
"""The agent of kirosync: takes commands from the queue, executes them, reports how they ended.

It reaches the queue over a link: the state directory itself (--state, which needs kirosync.py and its
dependencies beside it, and works while the service is down), or the service (--server, from any machine).
It polls; an idle agent costs a few stat calls a second, or one held request.

    Executors   what a command does: a table {type: function}; a function takes the command and returns the result
    Links       where commands come from and reports go to: changes(seconds), report(id, patch)
    Loop        one turn: see what is new, queue it for the workers, renew what is running
    Main        argv, the environment, signals
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import difflib
import fcntl
import fnmatch
import hashlib
import itertools
import json
import logging
import os
import re
import secrets
import selectors
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

log = logging.getLogger("agent")
Record = dict[str, Any]

STREAM_BYTES = 256 << 10  # of stdout and of stderr that a result holds: head and tail
ANSWER_BYTES = 16 << 20  # of what an executor in a process of its own may answer
READ_BYTES = 8 << 20  # of a file that a result holds, unless it asks for less
ENTRIES = 10_000  # of a directory that a result holds
MATCHES = 1_000  # of a search that a result holds
LINE_CHARACTERS = 1_000  # of a line that a match shows
SEARCH_BYTES = 8 << 20  # larger files are no source code
IN_PROCESS_S = {"code_search": 60.0}  # takes no longer, unless it says so
RUN_S = 3600.0  # a command takes no longer, unless it says so
STEPS = ((0.0, signal.SIGINT), (2.0, signal.SIGTERM), (7.0, signal.SIGKILL))  # s after the wish to end it
DRAIN_S = 0.2  # for output to arrive after the command ended; a child left behind may hold the pipe for ever
NOTICE_S = 0.25  # between looks whether a running command is to end
LEASE_S = 45.0  # a claim that is not renewed for so long is lost
POLL_S = 0.02  # between looks at the folder
HOLD_S = 25.0  # a request that waits for news
PAUSE_S = 0.5  # before asking again a service that did not hold us
RETRY_S = 5.0  # the longest pause before trying to reach the service again; a lease must outlast it
STOP_S = 5.0  # for running commands when the agent is told to stop; then as long for their reports
OPEN = ("pending", "processing")
CLAIM = {"status": "processing", "lease": LEASE_S}  # and again, to renew it


# ---------------------------------------------------------------------------------------- Executors
# What a command does. Each takes the command and a way to know that it is to end, and returns the result.


class Failed(Exception):
    """A command did not do what it should; with its outcome, and a result where there is one."""

    def __init__(self, error: str, outcome: str = "error", result: Any = None) -> None:
        super().__init__(error)
        self.outcome, self.result = outcome, result


class Excerpt:
    """The head and the tail of a stream, and how long it was."""

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.head, self.tail = bytearray(), bytearray()

    def add(self, piece: bytes) -> None:
        self.size += len(piece)
        room = self.limit // 2 - len(self.head)
        self.head += piece[:room]
        self.tail += piece[room:]
        if len(self.tail) > self.limit:
            del self.tail[: -self.limit // 2]

    @property
    def left_out(self) -> int:
        return max(0, self.size - len(self.head) - self.limit // 2)

    def text(self) -> str:
        tail = bytes(self.tail[max(0, len(self.tail) - self.limit // 2) :])
        gap = f"\n[... {self.left_out} bytes left out ...]\n".encode() if self.left_out else b""
        return (bytes(self.head) + gap + tail).decode("utf-8", "replace")


class Ended(NamedTuple):
    """How a child ended: its exit code as a shell tells it, why it was ended if it was, and what it wrote."""

    code: int
    why: str
    stdout: Excerpt
    stderr: Excerpt
    milliseconds: int


def run_child(
    argv: list[str], command: Record, ending: threading.Event, limit: int, given: IO[bytes] | None = None
) -> Ended:
    """Run *argv* as *command* says (workingDir, env, timeout) until it ends, or *ending* is set."""
    started = time.monotonic()
    child = subprocess.Popen(
        argv,
        cwd=folder_of(command),
        env={**public_environment(), **command.get("env", {})},
        stdin=given or subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        streams = {child.stdout: Excerpt(limit), child.stderr: Excerpt(limit)}
        why = attend(child, streams, started + float(command.get("timeout", RUN_S)), ending)
    finally:
        for stream in (child.stdout, child.stderr):
            if stream:
                stream.close()
    code = child.wait()  # only now: until it is waited for, its number is its own, and so is the group's
    spent = round((time.monotonic() - started) * 1000)
    return Ended(128 - code if code < 0 else code, why, streams[child.stdout], streams[child.stderr], spent)


def attend(
    child: subprocess.Popen[bytes], streams: dict[IO[bytes] | None, Excerpt], until: float, ending: threading.Event
) -> str:
    """Collect what *child* writes until it has ended; return why it was ended, "" if it ended by itself."""
    why, steps, last = "", list(STEPS), float("inf")
    exited = os.pidfd_open(child.pid)
    with selectors.DefaultSelector() as selector:
        for stream in (exited, *streams):
            selector.register(stream, selectors.EVENT_READ)  # type: ignore[arg-type]
        while selector.get_map() and time.monotonic() < last:
            for key, _ in selector.select(min(NOTICE_S, max(0.0, last - time.monotonic()))):
                if key.fileobj == exited:
                    last = time.monotonic() + DRAIN_S
                    selector.unregister(exited)
                elif piece := os.read(key.fd, 1 << 16):
                    streams[key.fileobj].add(piece)  # type: ignore[index]
                else:
                    selector.unregister(key.fileobj)
            now, running = time.monotonic(), last == float("inf")
            if running and not why and (ending.is_set() or now >= until):
                why, until = "cancelled" if ending.is_set() else "timeout", now
            while running and why and steps and now >= until + steps[0][0]:
                os.killpg(child.pid, steps.pop(0)[1])
    os.close(exited)
    if why:  # whom the leader of the group has left behind
        os.killpg(child.pid, signal.SIGKILL)
    return why


def public_environment() -> dict[str, str]:
    """Return the environment without what belongs to the service, its token above all."""
    return {key: value for key, value in os.environ.items() if not key.startswith("KIROSYNC_")}


def folder_of(command: Record) -> Path:
    folder = Path(command.get("workingDir", ".")).expanduser()
    if not folder.is_dir():
        raise Failed(f"workingDir: {folder} is not a directory" if folder.exists() else f"workingDir: no {folder}")
    return folder.absolute()


def path_of(command: Record, default: str = "") -> Path:
    return folder_of(command) / Path(command.get("path", default)).expanduser()


def execute_bash(command: Record, ending: threading.Event) -> Record:
    """Run a command line; {stdout, stderr, exitCode, durationMs}, and truncated and size where one was cut."""
    ended = run_child([shutil.which("bash") or "/bin/sh", "-c", command["command"]], command, ending, STREAM_BYTES)
    result = {"stdout": ended.stdout.text(), "stderr": ended.stderr.text(), "exitCode": ended.code}
    result["durationMs"] = ended.milliseconds
    if ended.stdout.left_out or ended.stderr.left_out:
        result |= {"truncated": True, "size": {"stdout": ended.stdout.size, "stderr": ended.stderr.size}}
    if ended.why:
        raise Failed(reason_of(ended.why, command), ended.why, result)
    if ended.code:
        raise Failed(f"exit code {ended.code}", "exit", result)
    return result


def reason_of(why: str, command: Record) -> str:
    timeout = command.get("timeout", RUN_S)
    return f"timed out after {timeout:g} s and was ended" if why == "timeout" else "the agent was stopped"


def in_process(command: Record, ending: threading.Event) -> Any:
    """Run the executor of *command* in a process of its own: it can be ended, and leaves no memory behind."""
    limits = {"timeout": IN_PROCESS_S.get(command["type"], RUN_S), **command, "workingDir": "."}
    with tempfile.TemporaryFile() as given:
        given.write(json.dumps(command).encode())
        given.seek(0)
        argv = [sys.executable, str(Path(__file__).absolute()), "--execute"]
        ended = run_child(argv, limits, ending, 2 * ANSWER_BYTES, given)
    if ended.why:
        raise Failed(reason_of(ended.why, limits), ended.why)
    if ended.stdout.left_out:
        raise Failed(f"the answer has {ended.stdout.size} bytes, {ANSWER_BYTES} are possible; ask for less")
    try:
        answer = json.loads(ended.stdout.text())
    except ValueError:
        last = ended.stderr.text().strip().splitlines()[-1:] or [f"exit code {ended.code}"]
        raise Failed(f"{command['type']} broke off: {last[0]}") from None
    if "error" in answer:
        raise Failed(answer["error"], result=answer.get("result"))
    return answer["result"]


def execute_here() -> None:
    """Be the process that in_process() starts: a command on stdin, {"result"} or {"error"} on stdout."""
    command = json.load(sys.stdin)
    try:
        answer: Record = {"result": IN_PROCESS[command["type"]](command)}
    except Failed as failure:
        answer = {"error": str(failure), "result": failure.result}
    except OSError as error:
        answer = {"error": explain(error)}
    json.dump(answer, sys.stdout, default=plain)


def explain(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)


def open_file(path: Path) -> BufferedReader:
    """Open a plain file for reading; raise Failed for what would never end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Failed(f"{path} is a directory" if path.is_dir() else f"{path} is not a plain file")
    return open(fd, "rb")


def as_text(raw: bytes) -> Record:
    """Return {content, encoding}: text where it is UTF-8, else base64."""
    try:
        return {"content": raw.decode(), "encoding": "utf-8"}
    except UnicodeDecodeError:
        return {"content": base64.b64encode(raw).decode(), "encoding": "base64"}


def read_file(command: Record, ending: threading.Event) -> Record:
    """Read a file; {content, encoding, size, sha256}, of all or of offset/limit/tail bytes; truncated if cut."""
    with open_file(path_of(command)) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        size = file.tell()
        offset = max(0, size - command["tail"]) if "tail" in command else command.get("offset", 0)
        file.seek(offset)
        wanted = min(command.get("limit", size), max(0, size - offset))
        raw = file.read(min(wanted, READ_BYTES))
    result = {**as_text(raw), "size": size, "sha256": digest}
    return {**result, "truncated": True} if len(raw) < wanted else result


@contextlib.contextmanager
def writing_in(folder: Path) -> Iterator[None]:
    """Keep other writers of ours, in this agent and in others, out of *folder*."""
    if not folder.is_dir():
        raise Failed(f"{folder} does not exist; make it first")
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
        os.fsync(fd)
    finally:
        os.close(fd)


def write_file(command: Record, ending: threading.Event) -> Record:
    """Replace a file, whole or not at all; {bytesWritten, created, sha256}. Mode and owner stay."""
    path = path_of(command).resolve()
    try:
        content = command["content"]
        raw = base64.b64decode(content, validate=True) if command.get("encoding") == "base64" else content.encode()
    except ValueError:
        raise Failed("content: is not base64") from None
    with writing_in(path.parent):
        before = present(path)
        if "expectedSha256" in command:
            check_expected(path, before, command["expectedSha256"])
        whole = (before or b"") + raw if command.get("append") else raw
        replace(path, whole, command.get("mode"))
    digest = hashlib.sha256(whole).hexdigest()
    return {"bytesWritten": len(raw), "created": before is None, "sha256": digest}


def present(path: Path) -> bytes | None:
    """Return what the file holds, or None if there is none."""
    try:
        with open_file(path) as file:
            return file.read()
    except FileNotFoundError:
        return None


def check_expected(path: Path, before: bytes | None, expected: str | None) -> None:
    actual = None if before is None else hashlib.sha256(before).hexdigest()
    if actual != (expected and expected.lower()):
        there = f"its sha256 is {actual}" if actual else "there is no such file"
        raise Failed(f"{path} is not what was expected: {there}; nothing was written", result={"sha256": actual})


def replace(path: Path, content: bytes, mode: str | None) -> None:
    """Write beside *path*, sync, rename; with *mode* (octal), else the one it had, else that of new files."""
    if mode is not None and not re.fullmatch(r"(0o?)?[0-7]{3,4}", mode):
        raise Failed(f"mode: {mode!r} is not octal, such as 644")
    try:
        fd, temporary = tempfile.mkstemp(prefix=".kirosync-", dir=path.parent)
    except OSError as error:
        raise Failed(f"{path}: cannot be written: {error.strerror}") from None
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            if path.exists():
                status = path.stat()
                os.fchmod(fd, stat.S_IMODE(status.st_mode))
                if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                    os.fchown(fd, status.st_uid, status.st_gid)
            else:
                os.fchmod(fd, 0o666 & ~UMASK)
            if mode is not None:
                os.fchmod(fd, int(mode.removeprefix("0o"), 8))
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


UMASK = os.umask(0o077)  # can only be read by setting it
os.umask(UMASK)
TYPES = {stat.S_IFREG: "file", stat.S_IFDIR: "directory", stat.S_IFLNK: "symlink"}


def list_directory(command: Record, ending: threading.Event) -> Record:
    """List a directory; {entries: [{name, type, size, modified, mode}], truncated}, sorted by name."""
    root, limit = path_of(command), min(command.get("limit", ENTRIES), ENTRIES)
    pattern = command.get("glob", "*")
    names = (name for name in walk(root, command.get("recursive", False)) if fnmatch.fnmatch(Path(name).name, pattern))
    chosen = sorted(names)
    return {"entries": [entry_of(root, name) for name in chosen[:limit]], "truncated": len(chosen) > limit}


def walk(root: Path, recursive: bool) -> Iterator[str]:
    """Yield the names below *root*, relative to it; links are named, not followed."""
    if not recursive:
        yield from os.listdir(root)
        return
    os.listdir(root)  # a missing one is an error; one that goes missing on the way is not
    for folder, folders, files in os.walk(root):
        for name in itertools.chain(folders, files):
            yield os.path.relpath(os.path.join(folder, name), root)


def as_name(path: str | Path) -> str:
    """Return a path as text, with what is no UTF-8 in it as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def entry_of(root: Path, name: str) -> Record:
    shown = as_name(name)
    try:
        status = os.lstat(root / name)
    except FileNotFoundError:
        return {"name": shown, "type": "gone", "size": 0, "modified": 0, "mode": ""}
    kind = TYPES.get(stat.S_IFMT(status.st_mode), "other")
    mode = f"{stat.S_IMODE(status.st_mode):04o}"
    return {"name": shown, "type": kind, "size": status.st_size, "modified": status.st_mtime_ns // 10**6, "mode": mode}


SKIPPED = (".git", ".hg", ".svn", ".venv", "node_modules", "__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")


def code_search(command: Record) -> Record:
    """Search files for a text or a regular expression; {matches: [{path, line, column, text}], truncated}.

    ripgrep, where it is installed, only tells which files to look into, so the answer is the same without it.
    """
    root, limit = path_of(command, "."), min(command.get("limit", MATCHES), MATCHES)
    if not root.exists():
        raise FileNotFoundError(2, "No such file or directory", str(root))
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
    if not rg or not root.is_dir():
        return everything
    argv = [rg, "--files-with-matches", "--null", "--no-config", "--no-ignore", "--hidden", "--no-messages"]
    argv += [f"--glob=!**/{name}/**" for name in SKIPPED] + ["--text", f"--max-filesize={SEARCH_BYTES}"]
    argv += ["--ignore-case"] if command.get("ignoreCase") else []
    argv += [] if command.get("regex") else ["--fixed-strings"]
    ran = subprocess.run([*argv, "-e", command["query"], "--", str(root)], capture_output=True, check=False)
    if ran.returncode > 1:  # a regular expression that ripgrep does not know and Python does
        return everything
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
        if path.is_symlink() or not path.is_file() or path.stat().st_size > SEARCH_BYTES:
            return
        raw = path.read_bytes()
    except OSError:
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
        client = session.client(spelled("service", command["service"], session.get_available_services()))
        operations = client.meta.method_to_api_mapping
        operation = spelled("operation", command["operation"], operations)
        known = client.meta.service_model.operation_model(operations[operation]).input_shape
        members = known.members if known else {}
        parameters = {spelled("parameters", key, members): value for key, value in command["parameters"].items()}
        if command.get("paginate") and client.can_paginate(operation):
            return client.get_paginator(operation).paginate(**parameters).build_full_result()
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


def spelled(field: str, given: str, known: Iterable[str]) -> str:
    """Return the one of *known* that *given* spells: list-buckets, ListBuckets and list_buckets are one."""
    plain_names = {re.sub(r"[-_]", "", name).lower(): name for name in known}
    name = re.sub(r"[-_]", "", given).lower()
    if name not in plain_names:
        near = difflib.get_close_matches(name, plain_names, 3, 0.4) or sorted(plain_names)[:8]
        there = ", ".join(plain_names[each] for each in near)
        raise Failed(f"{field}: no {given!r} here; of {len(plain_names)} there are, perhaps {there}")
    return plain_names[name]


def plain(value: Any) -> Any:
    """Return as JSON what boto3 answers beside it: moments, bytes, streams, sets."""
    if hasattr(value, "isoformat"):
        return value.isoformat()
    if hasattr(value, "read"):
        value = value.read(READ_BYTES)
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return sorted(value) if isinstance(value, set) else str(value)


IN_PROCESS: dict[str, Callable[[Record], Any]] = {"aws_operation": aws_operation, "code_search": code_search}
EXECUTORS: dict[str, Callable[[Record, threading.Event], Any]] = {
    "execute_bash": execute_bash,
    "read_file": read_file,
    "write_file": write_file,
    "list_directory": list_directory,
    **dict.fromkeys(IN_PROCESS, in_process),
}


def execute(command: Record, ending: threading.Event) -> Record:
    """Execute *command* and return the report of how it ended."""
    try:
        return {"status": "completed", "outcome": "ok", "result": EXECUTORS[command["type"]](command, ending)}
    except Failed as failure:
        report: Record = {"status": "failed", "outcome": failure.outcome, "error": str(failure)}
        return report if failure.result is None else {**report, "result": failure.result}
    except OSError as error:
        return {"status": "failed", "outcome": "error", "error": explain(error)}
    except Exception as error:  # an executor's own defect must not leave its command without an end
        log.exception("a defect in %s", command["type"])
        return {"status": "failed", "outcome": "error", "error": f"the agent failed: {error!r}"}


# ---------------------------------------------------------------------------------------- Links
# Where commands come from and reports go to.


class Unreachable(Exception):
    """The queue cannot be reached now; later it may be."""


class Refused(Exception):
    """A report was not accepted as it is; the text says why."""


class Link(Protocol):
    def changes(self, seconds: float) -> dict[str, Record]:
        """Return the commands that are new or changed, waiting for one up to *seconds*."""

    def report(self, identity: str, patch: Record) -> Record | None:
        """Return the command after *patch*, or None if it went to another, or is gone."""

    def close(self) -> None:
        """Let go of who waits in changes(); reports are still taken."""


class FolderLink:
    """The queue reached through its state directory."""

    def __init__(self, directory: Path, poll: float = POLL_S) -> None:
        import kirosync  # noqa: PLC0415  only this link needs it

        self.rules, self.poll = kirosync, poll
        try:
            self.store = kirosync.Store(directory, kinds=("commands",))
        except kirosync.Refusal as refusal:
            raise Unreachable(f"the state directory {directory} cannot be opened: {refusal}") from None
        self.cursor: str | None = None
        self.revision = -1
        self.commands = os.fspath(self.store.directory / "commands")
        self.seen, self.looked = 0, 0.0  # its mtime in ns, and when it was last looked into

    def changes(self, seconds: float) -> dict[str, Record]:
        until = time.monotonic() + seconds
        try:
            while self.revision == self.store.revision and time.monotonic() < until and not self.store.closed:
                time.sleep(self.poll)
                self.look()
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

    def report(self, identity: str, patch: Record) -> Record | None:
        try:
            return dict(self.store.change(lambda pen: self.rules.report(pen, identity, patch)))
        except (self.rules.NotFound, self.rules.Conflict):
            return None
        except (self.rules.Busy, self.rules.Full, self.rules.Broken) as refusal:
            raise Unreachable(str(refusal)) from None
        except (self.rules.Refusal, ValueError, RecursionError) as refusal:
            raise Refused(str(refusal)) from None

    def close(self) -> None:
        self.store.release()


class HttpLink:
    """The queue reached through the service."""

    def __init__(self, server: str, token: str) -> None:
        import urllib3  # noqa: PLC0415  only this link needs it

        self.errors = urllib3.exceptions
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self.pool = urllib3.PoolManager(maxsize=8, headers=headers, retries=False)
        self.server, self.cursor = server.rstrip("/"), ""

    def ask(self, method: str, path: str, held: float = 0, body: Record | None = None) -> tuple[int, Record]:
        raw = None if body is None else json.dumps(body).encode()
        try:
            answer = self.pool.request(method, self.server + path, body=raw, timeout=held + 10)
        except self.errors.HTTPError as error:
            raise Unreachable(f"{self.server}: {error}") from None
        if answer.status == 401:
            raise Unreachable(f"{self.server} does not take the token; is it that service's?")
        try:
            said = json.loads(answer.data)
        except ValueError:
            said = {"error": answer.data[:200].decode("utf-8", "replace")}
        if answer.status == 429 or answer.status >= 500:
            raise Unreachable(f"{self.server} answered {answer.status}: {said.get('error')}")
        return answer.status, said

    def changes(self, seconds: float) -> dict[str, Record]:
        since = f"&since={self.cursor}&wait={seconds:.3f}" if self.cursor else ""
        asked = time.monotonic()
        status, said = self.ask("GET", f"/sync?only=commands&status=pending,processing{since}", held=seconds)
        if status != 200:
            raise Unreachable(f"{self.server} answered {status}: {said.get('error')}")
        if not said["commands"] and self.cursor and time.monotonic() - asked < min(seconds, PAUSE_S):
            time.sleep(PAUSE_S)  # the service has too many who wait, and did not hold us
        self.cursor = said["cursor"]
        return {identity: {"id": identity, **command} for identity, command in said["commands"].items()}

    def report(self, identity: str, patch: Record) -> Record | None:
        from urllib.parse import quote  # noqa: PLC0415

        status, said = self.ask("PATCH", f"/command/{quote(identity, safe='')}", body=patch)
        if status in (404, 409):
            return None
        if status != 200:
            raise Refused(str(said.get("error")))
        return {"id": identity, **said}

    def close(self) -> None:
        """Nothing: a held request ends by itself."""


# ---------------------------------------------------------------------------------------- Loop
# One turn: see what is new, queue it for the workers, renew what is running.


class Run:
    """A command that this agent has taken: from being seen until its end is reported."""

    def __init__(self, identity: str) -> None:
        self.identity = identity
        self.held: Record = {}  # what every report of it says: agent, claim, attempt
        self.again: Record | None = None  # the command, if it was seen pending meanwhile
        self.ending = threading.Event()


class Agent:
    """Takes commands of its types over a link and executes up to *jobs* at once."""

    def __init__(self, link: Link, name: str, jobs: int = 4, clock: Callable[[], float] = time.monotonic) -> None:
        self.link, self.name, self.clock = link, name, clock
        self.pool = ThreadPoolExecutor(jobs)
        self.taken: dict[str, Run] = {}
        self.renewed = clock()
        self.ear, self.mouth = os.pipe()  # whoever wants it to stop says so here; a signal cannot be missed
        os.set_blocking(self.mouth, False)
        self.stopping = threading.Event()  # nothing more is claimed

    def turn(self, seconds: float = HOLD_S) -> None:
        """Look once for what is new, for up to *seconds*, and renew the claims that are due."""
        due = self.renewed + LEASE_S / 3 - self.clock()
        for identity, command in self.link.changes(max(0.0, min(seconds, due))).items():
            self.consider(identity, command)
        if self.clock() >= self.renewed + LEASE_S / 3:
            self.renewed = self.clock()
            for run in [*self.taken.values()]:
                if run.held and not self.link.report(run.identity, {**CLAIM, **run.held}):
                    run.ending.set()  # it is no longer ours: its end was given up, or it was removed

    def consider(self, identity: str, command: Record) -> None:
        """Take *command* if it is for us; see to its end if it was ours in another life."""
        for_us = command["type"] in EXECUTORS and command.get("target", self.name) == self.name
        was_ours = command["status"] == "processing" and command.get("agent") == self.name
        if not (was_ours or (for_us and command["status"] == "pending")):
            return
        if identity in self.taken:
            self.taken[identity].again = command if command["status"] == "pending" else None
            return
        run = self.taken[identity] = Run(identity)
        self.pool.submit(self.see_to, run, self.give_up if was_ours else self.perform, command)

    def see_to(self, run: Run, work: Callable[[Run, Record], None], command: Record) -> None:
        """Do the *work*, as one of the pool's threads; whatever comes of it, the agent goes on."""
        try:
            work(run, command)
        except Refused as error:
            log.error("%s: the report was refused: %s", run.identity, error)
        except Unreachable as error:
            log.error("%s: not reported, the agent stops: %s", run.identity, error)
        except Exception:  # a defect of ours; a thread of the pool would keep it to itself
            log.exception("%s: the agent failed", run.identity)
        finally:
            del self.taken[run.identity]
            if run.again and not self.stopping.is_set():
                self.consider(run.identity, run.again)

    def perform(self, run: Run, command: Record) -> None:
        """Claim *command*, execute it and report how it ended."""
        if self.stopping.is_set():
            return
        holder = {"agent": self.name, "claim": secrets.token_hex(8)}
        claimed = self.insist(run, {**CLAIM, **holder})
        if not claimed:
            return
        run.held = {**holder, "attempt": claimed["attempt"]}
        ended = execute(claimed, run.ending)
        if ended["outcome"] == "cancelled" and claimed.get("retryable"):
            ended = {"status": "pending"}
        try:
            self.insist(run, {**ended, **run.held})
        except Refused as error:
            said = {"status": "failed", "outcome": "error", "error": f"the report was refused: {error}"}
            self.insist(run, {**said, **run.held})

    def give_up(self, run: Run, command: Record) -> None:
        """Say that *command* is lost, which this agent was running before it was stopped."""
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
        finally:
            self.stop()

    def stop(self) -> None:
        os.write(self.mouth, b"x")

    def run(self) -> None:
        """Work until told to stop; then let what runs finish for STOP_S, and end it."""
        follower = threading.Thread(target=self.follow, daemon=True)
        follower.start()
        os.read(self.ear, 1)
        failed = not follower.is_alive()
        self.stopping.set()
        self.link.close()
        until = time.monotonic() + STOP_S
        while self.taken and time.monotonic() < until:
            time.sleep(NOTICE_S / 5)
        for run in [*self.taken.values()]:
            run.ending.set()
        self.pool.shutdown()
        if failed:
            sys.exit("agent: stopped by a defect; see above")


# ---------------------------------------------------------------------------------------- Main
# argv, the environment, signals.


def hold_name(name: str, folder: Path) -> IO[str]:
    """Return a file whose lock says that *name* runs here; end the program if another holds it."""
    file = open(folder / f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)}.lock", "a")  # noqa: SIM115  held until the end
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
        service = re.sub(r"\W+", "_", arguments.server)
        return HttpLink(arguments.server, token), Path(tempfile.gettempdir(), f"kirosync-{os.getuid()}", service)
    except ModuleNotFoundError as error:
        sys.exit(
            f"agent: {error.name} is missing: --state needs kirosync.py and its packages beside it, --server urllib3"
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
    parser.add_argument("--execute", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.name = arguments.name or (f"{host}-remote" if arguments.server else host)
    return arguments


def main() -> None:
    arguments = arguments_of()
    if arguments.execute:
        return execute_here()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(process)d] %(levelname)s %(message)s")
    link, folder = link_of(arguments)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with hold_name(arguments.name, folder):
        agent = Agent(link, arguments.name, arguments.jobs)
        signal.set_wakeup_fd(agent.mouth, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: None)  # to be heard is enough
        ctypes.CDLL(None).prctl(4, 0)  # PR_SET_DUMPABLE: children of the same user cannot read its environment
        log.info("agent %s at %s", arguments.name, arguments.server or arguments.state)
        agent.run()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # it is ending already
    return None


if __name__ == "__main__":
    main()
