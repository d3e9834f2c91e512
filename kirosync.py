#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["bottle>=0.13.2", "waitress>=3.0.1", "filelock>=3.30", "msgspec>=0.19"]
# ///
"""kirosync: one queue and one shared memory for an IDE, an agent and a human.

The directory is the database. Each conversation, document and command is one JSON file:

    state/conversations/NAME.json   {"id", "revision", "revisions", "messages": [...]}
    state/documents/NAME.json       {"id", "revision", "path", "content", "timestamp", ...}
    state/commands/NAME.json        {"id", "revision", "type", "status", ...}
    state/deleted/KIND/NAME.json    tombstones: the last version, and what may not come back
    state/archive/                  commands that ended long ago, with their output
    state/output/NAME.out .err .in  what a command prints, as it does, and what was sent to its stdin
    state/history/KIND/NAME/        what a merge replaced
    state/agents/NAME.json          who executes: what it said of itself; the file's time is when it was last seen
    state/agents/NAME.lock          held by the running agent of that name
    state/quarantine/               files that could not be read, each with its reason
    state/told.json                 of which ended commands someone has been told
    state/tokens.json used.json     who may ask what, by hashes; when each was last used
    state/journal.jsonl             a line a change: revision, at, lastUpdate, kind, id, op, crc, by, and more
    state/log/ audit.json           who changed what, if it is not kept elsewhere, and how far that account has come
    state/.lock                     held by whoever is changing something
    state/.service                  held by the service; there is one
    state/before-restore-TIME/      what was there before a backup was restored, until someone removes it
    state/.snapshot.* .restore.*    a backup, or a restore, under way; who does it holds the folder's lock

NAME is the id, with every byte outside A-Z a-z 0-9 . _ - percent-encoded, and a leading dot too.

A change is written aside and synced, entered in the journal and synced, then renamed into place.
The journal is the point of no return: before it nothing has happened (history and quarantine apart,
where one file too many does no harm), after it whoever next takes the lock completes the renames.
So a reader never sees half a record, what was acknowledged is durable, and every change has a
number, the revision, that grows by one over the whole directory. What a change costs is what it changes: a file
is written whole, but of a conversation only the new messages are encoded, the rest is copied from the file before.

A backup is a folder of links, made under the lock and packed without it. A restore is unpacked and checked beside the
state; its point of no return is the journal too, which is replaced by one whose last epoch has the name of the folder.

HTML of what people and models have written, and diffs, are made by a process of the service's own, `kirosync.py render`
(see Renderer): without secrets, with little memory and little time, for either may keep a processor busy for ever. What
of HTML is let through is a rule; the libraries are in requirements-page.txt, and without them text is shown as it is.

The sections, each of which uses only what stands above it, and the one rule of each:

    Errors    what is refused, and the status that says so
    Limits    every number with its unit and reason
    Rules     what may become what; no disk, no network, no clock, no randomness
    Store     the only code that touches the state directory
    Service   the only code that knows HTTP
    Main      the only code that knows argv and the environment
"""

from __future__ import annotations

import argparse
import array
import base64
import bisect
import collections
import contextlib
import contextvars
import ctypes
import datetime
import difflib
import errno
import functools
import gc
import getpass
import gzip
import hashlib
import hmac
import html
import http
import http.client
import importlib
import importlib.metadata
import inspect
import ipaddress
import itertools
import json
import keyword
import logging
import logging.handlers
import math
import operator
import os
import queue as queue_of
import re
import resource
import secrets
import select
import shlex
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tomllib
import urllib.error
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal, NamedTuple, Required, TypedDict, TypeVar, get_args, get_origin

import bottle
import filelock
import msgspec
import waitress.adjustments
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task

__version__ = "0.1.0"

log, access = logging.getLogger("kirosync"), logging.getLogger("kirosync.access")
Record = dict[str, Any]
T = TypeVar("T")


# ---------------------------------------------------------------------------------------- Errors
# What is refused, and the status that says so. A refusal is one sentence for the person who
# reads it, and details for the program.


class Refusal(Exception):
    """The base of everything that is refused; ``body()`` is what the caller is sent, which has these ``fields``."""

    status = 400
    headers: dict[str, str] = {}  # of the answer
    fields: dict[str, Any] = {"error": str}

    def __init__(self, sentence: str, **details: Any) -> None:
        super().__init__(sentence)
        self.details = details

    def body(self) -> Record:
        return {"error": str(self), **self.details}


class Malformed(Refusal):
    """A value is not what it must be; ``field`` names it."""

    fields = {"error": str, "field": str}

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}" if field else problem, field=field)


class Unauthorized(Refusal):
    """There is no token, or none that is valid."""

    status, headers = 401, {"WWW-Authenticate": "Bearer"}
    fields = {"error": Literal["Unauthorized"], "message": str}

    def __init__(self, message: str = "Valid API key required") -> None:
        super().__init__("Unauthorized", message=message)


class Forbidden(Refusal):
    """A token is known, and has not the scope for this."""

    status, headers = 403, {"WWW-Authenticate": 'Bearer error="insufficient_scope"'}
    fields = {"error": str, "scopes": list[str]}

    def __init__(self, scope: str, what: str, scopes: Sequence[str]) -> None:
        super().__init__(f"a token of the scope {scope} may not {what}; possible: {', '.join(scopes)}", scopes=scopes)


class NotFound(Refusal):
    """There is nothing of this id, or this path."""

    status = 404


class NotAllowed(Refusal):
    """The path has no such method; ``allowed`` are those that it has."""

    status = 405
    fields = {"error": str, "allowed": list[str]}


class TooSlow(Refusal):
    """The request was not sent in time."""

    status = 408


class Conflict(Refusal):
    """It cannot be as things stand; the details say how they do."""

    status = 409


class Coded(Refusal):
    """The base of what /api/kiro refuses in words of its own; ``recoverable`` says whether to try again helps."""

    code, recoverable = "", False
    fields = {"code": str, "message": str, "recoverable": bool, "timestamp": str}

    def body(self) -> Record:
        return {"code": self.code, "message": str(self), "recoverable": self.recoverable, **self.details}


class ValidationFailed(Coded):
    """What was sent for an editor, or as an answer, is not what it must be."""

    code = "VALIDATION_FAILED"


class TimedOut(Coded):
    """It has not ended in time, or was answered too late."""

    status, code, recoverable = 408, "OPERATION_TIMEOUT", True


class Unavailable(Coded):
    """No editor takes commands; ``reason`` is "not_running" or "not_responding"."""

    status, code, recoverable = 503, "KIRO_UNAVAILABLE", True
    headers = {"Retry-After": "1"}
    fields = {**Coded.fields, "reason": Literal["not_running", "not_responding"]}


class Unexecuted(Refusal):
    """An editor's command did not do what it should, or was not even begun."""

    status = 422
    fields = {"success": Literal[False], "output": str, "error": str, "executionTimeMs": int}

    def body(self) -> Record:
        return {"success": False, "output": "", "error": str(self), "executionTimeMs": 0, **self.details}


class Unfitting(Refusal):
    """What a human answered is no answer to the question."""

    fields = {"success": Literal[False], "error": str, "executionId": str}

    def body(self) -> Record:
        return {"success": False, "error": str(self), **self.details}


class TooLarge(Refusal):
    """More was sent than is taken; ``limit`` is how much that is."""

    status = 413
    fields = {"error": str, "limit": int}


class NotJson(Refusal):
    """The body is of another type than JSON."""

    status = 415


class Unprocessable(Refusal):
    """The Idempotency-Key was used for another body; ``commandId`` is what that became."""

    status = 422
    fields = {"error": str, "commandId": str}


class HeadTooLarge(Refusal):
    """The first line and the headers are too long."""

    status = 431


class TooMany(Refusal):
    """Someone asks for more than is theirs; ``pause`` (s) is how long to wait before the next try."""

    status = 429
    fields = {"error": str, "retryAfter": int}

    def __init__(self, sentence: str, pause: float) -> None:
        super().__init__(sentence, retryAfter=max(1, math.ceil(pause)))
        self.headers = {"Retry-After": str(self.details["retryAfter"])}


class Broken(Refusal):
    """The service failed; the log says more, under the request's id."""

    status = 500


class Busy(Refusal):
    """It cannot be done just now, or while the service starts or ends."""

    status, headers = 503, {"Retry-After": "1"}


class Full(Refusal):
    """The disk is full; what is there is safe."""

    status = 507


# ---------------------------------------------------------------------------------------- Limits
# Every number, its unit and its reason.

ID_CHARACTERS = 128  # the longest id
NAME_BYTES = 220  # the longest file name of an id; 255 less ".", ".json" and "." + a revision
BODY_BYTES = 32 << 20  # of one request: a long conversation is some megabytes
OUTPUT_BYTES = 64 << 20  # of a stream of a command that is kept
RESERVE_BYTES = 16 << 20  # of the disk that output leaves free: for how the commands end
INPUT_BYTES = 16 << 20  # sent to a command: more belongs into a file
KEY_CHARACTERS = 255  # of an Idempotency-Key
LAST_REVISION = 10**12  # a change each millisecond for thirty years
NESTING = 100  # levels of one record: msgspec stops near 1,000, hand editing long before
INTEGER = 8_640_000_000_000_000  # ms: the last moment that a JavaScript Date can hold
AHEAD_MS = 5 * 60_000  # a clock further ahead than this is wrong
HISTORY_FILES = 20  # superseded versions of one document
EXPIRES_S = 24 * 3600  # queue time of a command that does not say
RUN_S = 3600  # run time of a command that does not say
GRACE_S = 60  # to report: after the run time, for a claim without a lease; after the service was down, for all
LONGEST_RUN_S = 7 * 24 * 3600  # of a timeout or a lease
LONGEST_STAY_S = 365 * 24 * 3600  # in the queue
LOCK_S = 10.0  # wait for another process before saying 503
BLOCK_BYTES = 1 << 20  # read, copied or sent at once
COPIED_BYTES = 64 << 10  # of a file: fewer are laid out again sooner than copied
REPACKED = 32  # messages whose revisions are taken back one by one
OPEN_FILES = 200  # written at once; a process may often open 1024, and connections want theirs
GATHER_S = 0.0002  # a busy committer waits for company: a sync costs as much for many as for one
LOCK_POLL_S = 0.001  # filelock's own 0.05 starves whoever comes second
WAIT_S = 55  # a held answer: proxies cut at 60
PACE_S = 0.002  # between two who were told of the same change
GONE_S = 2.0  # between looks whether who waits has hung up
OUTPUT_POLL_S = 0.05  # between looks whether a command has printed more
SETTLE_S = 1.0  # a file written by hand may be half done for so long
LOOK_S = 1.5  # between looks at the whole directory, where the kernel does not tell
IN_VAIN_S = 0.0005  # longer, each time that it was our own work which the kernel told of, up to the next
LONGEST_IN_VAIN_S = 0.005
JOURNAL_POLL_S = 0.02  # between looks at the journal, where the kernel does not tell
KEPT_S = 30 * 24 * 3600  # an ended command stays so long among the others
RETIRED = 10  # of those too old, at once, and then a pause as long as that took: others want to write as well
ABSENT_S = 15.0  # an agent that was not seen for so long is not there
FORGOTTEN_S = 24 * 3600  # and after so long not even remembered
AGENTS = 256  # that have announced themselves; their files are read to say who is there
ANNOUNCED_BYTES = 1 << 20  # that an agent may say of itself: an editor has some 3,000 commands
EXECUTIONS = 3  # in editors, at once
EXECUTE_S = 300.0  # for one, unless the settings say otherwise
REJOIN_S = 60.0  # after its end the result of one whose caller hung up is kept for who asks the same again
AUDIT_S = 1.0  # between looks for what is to be entered in the audit log; the journal has it meanwhile
AUDIT_LINES = 10_000  # that are entered at once
AUDIT_BYTES = 32 << 20  # of a file of it, before another is begun
AUDIT_FILES = 16  # that are kept beside it: half a GiB, some two million changes
PATH_CHARACTERS = 300  # of a path in the access log
ACCESS_LINES = 1000  # of the access log that wait to be written, a second at most: each by itself makes all dearer
ACCESS_BYTES, ACCESS_FILES = 16 << 20, 4  # of the access log, and how many are kept beside it
NOTICES = 100  # that wait to be sent; more are dropped, which the log and /metrics say
NOTIFY_S = 10.0  # for one to be sent
NOTIFY_PAUSES_S = (0.0, 1.0, 5.0, 30.0, 120.0)  # before each try
NOTICE_CHARACTERS = 2000  # of a text for ntfy, which takes 4096 bytes
NOTIFY_AFTER_S = 60.0  # of running, after which the end is worth telling, unless the settings say otherwise
TEND_S = 60.0  # between looks for what has become too long or too old
SWEEP_S = 1.0  # between looks for commands that are overdue
SLACK_LINES = 1000  # a journal is compacted when it is twice its records and this long
SNAPSHOTS = 5  # tried, one after the other, where files are being edited by hand
GZIP_LEVEL = 6  # of a backup: the next ones take twice as long, and save a hundredth
HEADER_BYTES = 1 << 20  # read of a backup for one file's name: ours take some thousand
SCARCE_BYTES = 1 << 30  # free on the disk: fewer are soon none
SCARCE_FILES = 10_000  # that the disk has room for: likewise
SKEW_MS = 2000  # that clocks differ by without harm
ANSWER_S = 3.0  # the doctor waits for a service to answer
EPOCHS = 256  # starts of a service that cursors are remembered for
GZIP_BYTES = 1024  # smaller answers gain nothing
SPOOLED_BYTES = 1 << 40  # of an answer are set aside on disk for a slow reader, rather than that a thread waits for it
CONNECTIONS = 1000  # open at once: each takes a descriptor, few of them a thread
DESCRIPTORS = 2  # of a connection: its own, and that of a file in which a body or an answer is set aside
OWN_FILES = OPEN_FILES + 50  # that connections leave to the store and to the rest
ACCEPTED = 64  # connections in one turn of the server's loop, which costs a look at each that is open
TICK_S = 1.0  # between looks whether clients keep their times
HEAD_S = 10.0  # from the first byte of a request to the end of its head; and from connecting to that
IDLE_S = 120.0  # from an answer to the next request; proxies keep theirs for some 60
STALL_S = 15.0  # that a body, or the reading of an answer, may be behind its rate: a phone changes its cell
RATE = 4096  # bytes/s, the least: what a phone has in the country
SENT_BYTES = 64 << 10  # read at once of what was set aside: what the client does not take is read again
PARTING_S = 10.0  # a refused client, which may be sending still, has to read why
HEAD_BYTES = 32 << 10  # of the first line and the headers
HEADERS = 100  # lines of them: many short ones cost waitress much more than few long ones
CHUNK_LINE_BYTES = 8 << 10  # before a chunk, and after the last: waitress puts it together anew with each piece
SMALL_BYTES = 64 << 10  # of a body or an answer that is kept in memory, and of a body from who has no token
SPOOL_BYTES = 512 << 20  # of all larger bodies and answers on their way, which lie on the disk of the state
WORK_BYTES = 48 << 20  # of bodies that are being worked on: JSON takes up to 27 times as much when it is read
TOKENS = 256  # that may be known: each given one is compared with all
UNGUESSABLE = 32  # characters of a token that nobody finds by trying
TRIES_A_S, TRIES = 1 / 6, 10  # without a valid token, from one address: so many at once, and then one in so long
VISITS_A_S, VISITS = 20, 200  # to what is public, from one address
PUSHED = 10_000  # records at once: while they are written, some seconds, nobody else can write
OPEN_PAUSE_S = 10.0  # before who has too many commands open asks again
LOW_BYTES = 64 << 20  # of the disk: with less left the service says that it is not well
LOW_FILES = 1000  # that can still be made there, likewise
UNTAKEN_S = 60.0  # a command that waits for so long, while no agent for it is there
METERED = 4096  # addresses that are counted; the one that has been quiet the longest gives way
BURST_S = 10  # of requests that a token may have saved up
BURST_BYTES_S = 60  # and of bytes: a first copy of everything is large
RENDER_S = 2.0  # for one text to become HTML, and for a diff; a hostile one would take for ever
RENDER_WAIT_S = 6.0  # for all texts of a request, and for those of others before them
RENDER_START_S = 10.0  # for the process that does it to start: some 0.5 s, on a machine that has little else to do
RENDER_IDLE_S = 60.0  # without a text, after which it is ended: it takes 45 MB, as much as the service
RENDER_MEMORY = 256 << 20  # bytes of its address space: it has 60 MB at first, and 80 after 256 KiB of a README
RENDER_AGAIN_S = 600.0  # before a text that was too slow is tried once more
RENDERED = 256  # texts that were too slow which are known; the oldest gives way
TEXTS = 100  # to be shown at once
TEXT_BYTES = 256 << 10  # of one: more is no message, and longer than a page should have
TEXTS_BYTES = 2 << 20  # of all of them, and of the two sides of a diff
HTML_BYTES = 8 << 20  # of what is made of them: code is some ten times as long
THREADS = 320  # of the server; a long poll holds one, and three quarters may be held; one takes 16 KiB


class Quota(NamedTuple):
    """What a token may use: requests a second, bytes a second (both ways), requests held and commands open at once."""

    requests: int
    bytes: int
    held: int
    open: int


QUOTAS = {  # of each scope: above what such a client does at its busiest, below what would keep others waiting
    "read": Quota(50, 8 << 20, 32, 0),
    "client": Quota(50, 8 << 20, 64, 1000),
    "agent": Quota(500, 32 << 20, 32, 100),  # it sends output as it comes
    "ide": Quota(100, 8 << 20, 64, 1000),
    "admin": Quota(5000, 128 << 20, THREADS, 100_000),
}


# ---------------------------------------------------------------------------------------- Rules
# What may become what. Values in, new values out: no disk, no network, no clock, no randomness.

Kind = Literal["conversations", "documents", "commands"]
KINDS = get_args(Kind)


def number(kind: Any, **bounds: Any) -> Any:
    return Annotated[kind, msgspec.Meta(**bounds)]


def said(kind: Any, sentence: str, **more: Any) -> Any:
    """Return *kind* with what the documentation says of it."""
    return Annotated[kind, msgspec.Meta(description=sentence, **more)]


def without(record: Record, *names: str) -> Record:
    """Return *record* less the fields of these *names*."""
    return {key: value for key, value in record.items() if key not in names}


def digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def shape(name: str, required: dict[str, Any], optional: dict[str, Any]) -> Any:
    """Return the type of an object with these fields, and any others. What is in both is required.

    By its *name* the documentation knows it.
    """
    wanted = {key: Required[kind] for key, kind in required.items()}
    return TypedDict(name, {**wanted, **without(optional, *wanted)}, total=False)  # type: ignore


def many(kind: Any) -> Any:
    return list[kind]


def by_id(kind: Any, identity: Any = str) -> Any:
    return dict[identity, kind]


Text = Annotated[str, msgspec.Meta(min_length=1)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=ID_CHARACTERS)]
NO_CONTROLS = r"^[^\x00-\x1f\x7f-\x9f]*$"
Id = Annotated[Name, msgspec.Meta(pattern=NO_CONTROLS)]  # see check_id
Iso = Annotated[str, msgspec.Meta(examples=["2025-01-19T10:30:00Z"])]
Count = number(int, ge=0, le=INTEGER)
Time = number(float, ge=-INTEGER, le=INTEGER)
Seconds = number(float, ge=0, le=INTEGER)
Run = number(float, gt=0, le=LONGEST_RUN_S)
Stay = number(float, gt=0, le=LONGEST_STAY_S)
Cells = number(int, ge=1, le=9999)
Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Status = Literal["pending", "processing", "completed", "failed"]
Outcome = Literal["ok", "exit", "error", "timeout", "cancelled", "expired", "lost", "refused"]
Encoding = Literal["utf-8", "base64"]
InputType = Literal["text", "choice", "file", "confirmation"]
AgentKind = Literal["agent", "ide"]
Stream = Literal["stdout", "stderr", "stdin"]  # of a command
Printed = Literal["stdout", "stderr"]
Speaker = Annotated[str, msgspec.Meta(max_length=ID_CHARACTERS, pattern=NO_CONTROLS)]  # "" is nobody
Key = Annotated[str, msgspec.Meta(max_length=KEY_CHARACTERS, pattern="^[ -~]*$")]
Scope = Literal["read", "client", "agent", "ide", "admin"]
POSSIBLE = {"status": get_args(Status), "outcome": get_args(Outcome), "encoding": get_args(Encoding)}
POSSIBLE |= {
    "inputType": get_args(InputType),
    "type": get_args(InputType),
    "kind": get_args(AgentKind),
    "scope": get_args(Scope),
}

Own = Annotated[Any, msgspec.Meta(description="set by the service", extra_json_schema={"readOnly": True})]

MESSAGE = shape(
    "Message",
    {"role": said(Name, "user, assistant, system or another"), "content": str, "timestamp": Time},
    {"id": str | int, "metadata": dict[str, Any]},
)
MESSAGES = many(MESSAGE)
DOCUMENT = shape("Document", {"content": str, "timestamp": Time}, {"path": str, "language": str})
INPUT = shape(
    "Input",
    {},
    {
        "data": said(str, "text, or base64 if the encoding is that"),
        "encoding": Encoding,
        "offset": said(Count, "bytes that were sent before; so it can be sent again without harm"),
        "close": said(bool, "that nothing more will come"),
    },
)
ABOUT = {
    "version": str,
    "availableCommands": said(list[str], "of an IDE"),
    "workspaceFolders": said(list[str], "of an IDE: paths"),
    "focusedAt": said(Time, "when the window of an IDE was last in front"),
}
FOUND_OUT = {"present", "lastSeen"}  # of an agent, by the service
SAID = {**ABOUT, **dict.fromkeys(sorted(FOUND_OUT), Own)}
AGENT = shape("Agent", {"kind": AgentKind, "types": said(list[Name], "of commands that it executes")}, SAID)
AGENT_PATCH = shape("AgentPatch", {}, {"kind": AgentKind, "types": list[Name], **SAID})
USED = shape("Used", {"at": Time, "from": str}, {})  # of a token
TOKEN = shape("Token", {"scope": Scope, "sha256": Digest, "createdAt": Time}, {"expiresAt": Time})

# What an order may say: for every type, and for each its required and its optional fields, and its result.
ORDER = {
    "workingDir": said(Text, "where it is executed; else where the agent is"),
    "env": said(dict[str, str], "beside the agent's own; for execute_bash"),
    "timeout": said(Run, f"s that it may run; {RUN_S} if it does not say"),
    "expiresIn": said(Stay, f"s that it may wait; {EXPIRES_S} if it does not say"),
    "target": said(Name, "the name of the agent that is to take it"),
    "metadata": dict[str, Any],
    "retryable": said(bool, "whether it is tried again if its agent is lost"),
}
ORDERS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "execute_bash": (
        {"command": Text},
        {
            "stdin": said(bool, "that it reads what is sent to it"),
            "pty": said(bool, "that it runs in a terminal, of so many columns and rows"),
            "columns": Cells,
            "rows": Cells,
        },
        "stdout, stderr, exitCode, durationMs; truncated and size where one was cut",
    ),
    "read_file": (
        {"path": Text},
        {"offset": Count, "limit": Count, "tail": said(Count, "the last so many bytes")},
        "content, encoding (utf-8 or base64), size, sha256; truncated if it was cut",
    ),
    "write_file": (
        {"path": Text, "content": str},
        {
            "encoding": Encoding,
            "mode": str,
            "append": bool,
            "expectedSha256": said(str | None, "of what is there; null: nothing"),
        },
        "bytesWritten, created, sha256",
    ),
    "list_directory": (
        {"path": Text},
        {"recursive": bool, "glob": Text, "limit": Count, "after": said(Text, "where the answer before ended")},
        "entries [{name, type, size, modified, mode}], truncated; next, if so: give it as after",
    ),
    "aws_operation": (
        {"service": Text, "operation": Text, "parameters": dict[str, Any]},
        {"region": Text, "profile": Text, "paginate": bool, "limit": Count},
        "the response; if AWS refused: code, message, requestId",
    ),
    "code_search": (
        {"query": Text},
        {"path": Text, "glob": Text, "regex": bool, "ignoreCase": bool, "context": Count, "limit": Count},
        "matches [{path, line, column, text}], truncated",
    ),
    "kiro_command": (
        {"command": Text},
        {"args": list[str], "workspacePath": Text},
        "output; executed by an IDE, the one that has workspacePath open",
    ),
    "user_input": (
        {"prompt": Text},
        {"inputType": InputType, "choices": list[str], "executionId": Name},
        "value; answered by a human: the text, one of the choices, the path of a file, yes or no",
    ),
}
# What an agent may say of a command, and what a command says beside what was ordered.
REPORT = {
    "status": Status,
    "outcome": Outcome,
    "error": str,
    "agent": said(Name, "who has it, or reports on it"),
    "lease": said(Run, "s until it is lost, unless it is renewed"),
    "attempt": said(Count, "which it is, from 1 on; that of another is refused"),
    "claim": said(Name, "a random text: the same claim again is the same"),
    "result": Any,
    "metadata": dict[str, Any],
}
PATCH = shape("Report", {}, REPORT)
TIMES = dict.fromkeys(("createdAt", "updatedAt", "startedAt", "endedAt", "leaseUntil"), Time)
MARKS = {
    "cancelRequested": said(bool, "that someone wants it to end"),
    "inputSize": said(Count, "bytes that were sent to it"),
    "inputClosed": bool,
    "idempotencyKey": str,
    "orderSha256": str,
    "queuedBy": said(str, "the name of the token"),
}
COMMAND = shape("Command", {"type": Name, "status": Status}, {**ORDER, **REPORT, **TIMES, **MARKS})
OWN_FIELDS = {"id", "revision"}  # of every record; on the wire the key says the one and the cursor the other
SET_LATER = (
    OWN_FIELDS
    | MARKS.keys()
    | TIMES.keys() - {"createdAt", "updatedAt"}
    | {"result", "error", "outcome", "agent", "attempt"}
)
COMMANDS = {
    kind: shape(
        kind,
        {"type": Literal[kind], **required},
        {**ORDER, **optional, **dict.fromkeys(sorted(SET_LATER), Own)},
    )
    for kind, (required, optional, _) in ORDERS.items()
}
FIELDS = {kind: shape(kind, {}, {**ORDER, **required, **optional}) for kind, (required, optional, _) in ORDERS.items()}
TYPED = shape("Typed", {"type": Name}, {})
SETTLED = {field for required, optional, _ in ORDERS.values() for field in (*required, *optional, *ORDER)}
PUSHABLE = {"conversations": MESSAGES, "documents": DOCUMENT, "commands": COMMAND}
PUSH = shape("Push", {}, {**dict.fromkeys(KINDS, dict[str, Any]), "lastUpdate": Time})

# What /api/kiro/execute takes, each with what is said of anything else; and what /api/kiro/input takes.
EXECUTE: dict[str, tuple[Any, str]] = {
    "command": (Text, "Command is required and must be a string"),
    "args": (list[str], "Args must be an array of strings"),
    "workspacePath": (Text, "WorkspacePath must be a string, the path of a folder"),
}
EXECUTION = shape("Execute", {"command": Text}, {"args": list[str] | None, "workspacePath": Text | None})
ANSWER = shape("Answer", {"value": str | bool, "type": InputType, "executionId": Name}, {})

# What a file found in the state directory must be.
FOUND = {
    "conversations": shape("Found", {"messages": MESSAGES}, {}),
    "documents": shape("Found", {"content": str}, {"timestamp": Time, "path": str, "language": str}),
    "commands": shape("Found", {"type": Name}, {**ORDER, **REPORT, **TIMES, **MARKS}),
}


class Grant(NamedTuple):
    """What a token may do where its scope opens a route (see ROUTES): the records it reads, the types of commands it
    queues and cancels, those it takes and reports on, and what it announces itself as."""

    reads: tuple[str, ...] = KINDS
    queues: frozenset[str] = frozenset()
    takes: frozenset[str] = frozenset()
    announces: tuple[str, ...] = ()


EVERY = frozenset(ORDERS)
ASKED = frozenset({"user_input"})
REMOTE = frozenset({"kiro_command"})
HANDLED = EVERY - ASKED - REMOTE  # by agents
GRANTS = {  # a token of a client cannot claim, that of an agent can submit nothing but questions, and answers none
    "read": Grant(),
    "client": Grant(queues=EVERY, takes=ASKED),
    "agent": Grant(("commands",), queues=ASKED, takes=HANDLED, announces=("agent",)),
    "ide": Grant(queues=EVERY, takes=ASKED | REMOTE, announces=("ide",)),
    "admin": Grant(queues=EVERY, takes=EVERY, announces=get_args(AgentKind)),
}


class Token(NamedTuple):
    """Who asks: what tokens.json says of a token, by its name."""

    name: str
    scope: str
    sha256: str = ""
    expires: float = math.inf  # ms

    def shown(self) -> Record:
        """Return what who brings it is told of it."""
        ends = {"expiresAt": self.expires} if self.expires < math.inf else {}
        return {"name": self.name, "scope": self.scope, **ends}

    def can(self, right: str, wanted: str) -> bool:
        """Return whether the grant of its scope has *wanted* in its *right*."""
        return self.scope == "admin" or wanted in getattr(GRANTS[self.scope], right)

    def may(self, what: str, right: str, wanted: str) -> None:
        """Raise Forbidden unless it can; *what* says what that means."""
        if not self.can(right, wanted):
            possible = [scope for scope, grant in GRANTS.items() if wanted in getattr(grant, right)]
            raise Forbidden(self.scope, what, possible)


MASTER = "master"  # the name of the one token that is in the settings, or in the file token


def token_from(name: str, said: Record) -> Token:
    return Token(name, said["scope"], said["sha256"], said.get("expiresAt", math.inf))


def matching(tokens: Iterable[Token], secret: bytes) -> Token | None:
    """Return the one of *tokens* that *secret* is; it takes as long whichever it is, and if it is none.

    >>> matching([Token("a", "read", digest(b"x"))], b"x").name
    'a'
    """
    sha256, found = digest(secret), None
    for token in tokens:
        if hmac.compare_digest(token.sha256, sha256):
            found = token
    return found


def seconds_in(text: str) -> float:
    """Return how many seconds *text* is: a number and s, m, h or d; raise Malformed.

    >>> seconds_in("90d"), seconds_in("30m")
    (7776000.0, 1800.0)
    """
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    if not (found := re.fullmatch(r"([0-9]{1,6})([smhd])", text)) or not int(found[1]):
        raise Malformed("", f"{text!r} is not a time; write 90d, 12h, 30m or 45s")
    return float(int(found[1]) * units[found[2]])


def refilled(level: float, seconds: float, rate: float, burst: float) -> float:
    """Return the *level* (below zero is a debt) after *seconds* in which it filled at *rate* a second, up to *burst*.

    >>> refilled(-5, 4, rate=2, burst=10), refilled(9, 4, rate=2, burst=10)
    (3, 10)
    """
    return min(burst, level + seconds * rate)


def check(shape: Any, value: Any, where: str) -> Any:
    """Return *value* if it has the *shape*; raise Malformed with the path of what has not.

    >>> check(MESSAGE, {"role": "user", "content": "", "timestamp": "now"}, "m")
    Traceback (most recent call last):
        ...
    kirosync.Malformed: m.timestamp: expected number, got str
    >>> check(MESSAGE, {"role": "user", "timestamp": 1}, "m")
    Traceback (most recent call last):
        ...
    kirosync.Malformed: m.content: is required
    """
    try:
        msgspec.convert(value, shape)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        field = (where + path.rstrip("`")).lstrip(".")
        if missing := re.fullmatch(r"Object missing required field `(.*)`", problem):
            raise Malformed(f"{field}.{missing[1]}".lstrip("."), "is required") from None
        problem = problem[0].lower() + problem[1:].replace("`", "").replace("float", "number")
        if problem.startswith("invalid enum value"):
            problem += f", possible are {', '.join(POSSIBLE[field.rpartition('.')[2]])}"
        raise Malformed(field, problem) from None
    return value


def parse(raw: bytes) -> Any:
    """Return what the JSON *raw* says; raise Malformed with what is wrong with it."""
    try:
        return msgspec.json.decode(raw)
    except RecursionError:
        raise Malformed("", f"nested more than {NESTING} deep") from None
    except ValueError as error:
        half = re.search(rb"\\u[dD][89a-fA-F]", raw)
        problem = "it ends too early" if "truncated" in str(error) else str(error)
        raise Malformed("", f"not JSON: {'half of a surrogate pair is no text' if half else problem}") from None


PLAIN = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9_.-]{{0,{ID_CHARACTERS - 1}}}")  # an id that is its own file name


def check_id(identity: str, where: str = "id") -> str:
    """Return *identity* if it can be one: 1 to 128 characters of text, none of them a control character.

    >>> check_id("../etc")
    '../etc'
    >>> check_id("a\\0b")
    Traceback (most recent call last):
        ...
    kirosync.Malformed: id: an id has no control characters, this one has one at 1
    """
    if PLAIN.fullmatch(identity):
        return identity
    if not 1 <= len(identity) <= ID_CHARACTERS:
        raise Malformed(where, f"an id has 1 to {ID_CHARACTERS} characters, this one has {len(identity)}")
    if bad := re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", identity):
        raise Malformed(where, f"an id has no control characters, this one has one at {bad.start()}")
    if len(name := name_of(identity)) > NAME_BYTES:
        raise Malformed(where, f"the file name of this id would have {len(name)} bytes, {NAME_BYTES} fit")
    return identity


def name_of(identity: str) -> str:
    """Return the file name of an id; it never holds a slash and never begins with a dot.

    >>> name_of("../etc"), name_of("a~b"), name_of("Straße")
    ('%2E.%2Fetc', 'a%7Eb', 'Stra%C3%9Fe')
    """
    if PLAIN.fullmatch(identity):
        return identity
    name = urllib.parse.quote(identity, safe="").replace("~", "%7E")
    return "%2E" + name[1:] if name.startswith(".") else name


def is_name(name: str) -> bool:
    """Return whether *name* is the file name of some id.

    >>> is_name("a%20b"), is_name("a b"), is_name("")
    (True, False, False)
    """
    try:
        return name_of(check_id(urllib.parse.unquote(name))) == name
    except Malformed:
        return False


def canonical(value: Any) -> bytes:
    """Return bytes that are equal for equal values, whatever the order of their keys."""
    return msgspec.json.encode(value, order="deterministic")


def unite(mine: Record, theirs: Record) -> Record:
    """Return both records in one, key by key, metadata too; where they differ the greater value stays.

    >>> unite({"a": 1, "metadata": {"x": 1}}, {"a": 2, "metadata": {"y": 2}})
    {'a': 2, 'metadata': {'x': 1, 'y': 2}}
    """
    united = {**mine, **theirs}
    for key in mine.keys() & theirs.keys():
        one, other = mine[key], theirs[key]
        nested = key == "metadata" and isinstance(one, dict) and isinstance(other, dict)
        united[key] = unite(one, other) if nested else max(one, other, key=canonical)
    return united


def message_rank(message: Record) -> tuple[Any, ...]:
    return message["timestamp"], len(message["content"]), message["content"]


def document_rank(document: Record) -> tuple[Any, ...]:
    return document["timestamp"], document["content"]


def join(mine: Record, theirs: Record, rank: Callable[[Record], Any]) -> tuple[Record, list[Record]]:
    """Return the one that ranks higher, whole, and the losers; equals are united.

    The least upper bound of an order, so merging is idempotent, commutative and associative.

    >>> join({"timestamp": 1, "content": "b"}, {"timestamp": 2, "content": "a"}, document_rank)
    ({'timestamp': 2, 'content': 'a'}, [{'timestamp': 1, 'content': 'b'}])
    """
    if rank(mine) == rank(theirs):
        return unite(mine, theirs), []
    winner, loser = (mine, theirs) if rank(mine) > rank(theirs) else (theirs, mine)
    return winner, [loser]


def merge_messages(mine: Iterable[Record], theirs: Iterable[Record]) -> tuple[list[Record], list[Record]]:
    """Return the messages of both in one order, and the versions that lost.

    Messages with an id are the same if their id is. Those without are the same if their timestamp,
    role and content are; content that goes on where another's ends replaces it, and two contents of
    one moment are two messages. Equal timestamps stand as they were first seen with that timestamp.

    >>> part, whole = ({"role": "a", "content": text, "timestamp": 1} for text in ("Hel", "Hello"))
    >>> merge_messages([part], [whole])[0] == merge_messages([whole], [part])[0] == [whole]
    True
    """
    merged, losers = merge_places(enumerate(itertools.chain(mine, theirs)))
    return [message for _, message in merged], losers


def merge_places(seen: Iterable[tuple[int, Record]]) -> tuple[list[tuple[int, Record]], list[Record]]:
    """Merge (place, message) pairs as merge_messages does; what remains has the first place that it was seen at."""
    groups: dict[Any, list[tuple[int, Record]]] = {}
    losers: list[Record] = []
    for place, message in seen:
        losers += admit(groups.setdefault(identity_of(message), []), place, message)
    return sorted(itertools.chain(*groups.values()), key=lambda seen: (seen[1]["timestamp"], seen[0])), losers


def identity_of(message: Record) -> Any:
    """Return what a message shares with every other version of itself."""
    return ("id", message["id"]) if "id" in message else (message["timestamp"], message["role"])


def after(group: list[tuple[int, Record]], content: str) -> int:
    """Return where *content* stands in the order of a *group* of (place, message)."""
    return bisect.bisect_left(group, content, key=lambda seen: seen[1]["content"])


def covers(group: list[tuple[int, Record]], message: Record) -> bool:
    """Return whether *group* has *message* already, or one that is greater, or goes on where it ends."""
    if "id" in message:
        return bool(group) and message_rank(group[0][1]) >= message_rank(message)
    at = after(group, message["content"])
    return at < len(group) and bool(group[at][1]["content"].startswith(message["content"]))


def admit(group: list[tuple[int, Record]], place: int, message: Record) -> list[Record]:
    """Add *message* to the *group* of (place, message) that share its identity; return the losers.

    Without an id no content in a group begins another, and they stand in order: so the one that begins
    with this content is next to it, and so is the one that this content begins with.
    """
    at = after(group, message["content"])
    if "id" in message:
        rival = 0 if group else None
    elif covers(group, message):
        rival = at
    else:
        rival = at - 1 if at and message["content"].startswith(group[at - 1][1]["content"]) else None
    if rival is None:
        group.insert(at, (place, message))
        return []
    first, known = group[rival]
    winner, lost = join(known, message, message_rank)
    group[rival] = first if winner["timestamp"] == known["timestamp"] else place, winner
    return [loser for loser in lost if says_more(loser, winner)]


def says_more(loser: Record, winner: Record) -> bool:
    """Return whether *loser* holds anything that *winner* does not: other content, or a field."""
    fields = loser.keys() | loser.get("metadata", {}).keys()
    return not winner["content"].startswith(loser["content"]) or bool(
        fields - winner.keys() - winner.get("metadata", {}).keys()
    )


def trust_clock(document: Record, known: Record | None, now: int) -> Record:
    """Return *document* with a timestamp that is not from the future, and *known* if nothing else is new.

    >>> trust_clock({"content": "a", "timestamp": 9_000_000}, None, now=1)
    {'content': 'a', 'timestamp': 1}
    >>> trust_clock({"content": "a", "timestamp": 3}, {"content": "a", "timestamp": 2}, now=1)
    {'content': 'a', 'timestamp': 2}
    """
    if known is not None and canonical({**document, "timestamp": known["timestamp"]}) == canonical(known):
        return known
    return {**document, "timestamp": now} if document["timestamp"] > now + AHEAD_MS else document


def bury(record: Record, grave: Record | None, before: int, whole: bool) -> Record:
    """Return the tombstone of *record*: ``deletedBefore``, the latest time that is dead with it, and its last version.

    If it is not to be *whole*, it holds no more than it takes to tell old from new: no content of a
    document, and of a conversation the messages later than ``deletedBefore``. One that was deleted twice keeps both.
    """
    before = max(before, (grave or {}).get("deletedBefore", 0))
    if "messages" not in record:
        kept = record if whole else without(record, "content")
        return {**kept, "deletedBefore": max(before, record.get("timestamp", before))}
    dead = [message for message in record["messages"] if whole or message["timestamp"] > before]
    return {**record, "messages": merge_messages((grave or {}).get("messages", []), dead)[0], "deletedBefore": before}


def risen(messages: list[Record], grave: Record) -> tuple[list[Record], list[Record]]:
    """Return which of *messages* are newer than their conversation's *grave*, and which are dead.

    >>> grave = {"deletedBefore": 5, "messages": [{"role": "a", "content": "x", "timestamp": 9}]}
    >>> risen([{"role": "a", "content": text, "timestamp": 9} for text in "xy"], grave)[0]
    [{'role': 'a', 'content': 'y', 'timestamp': 9}]
    """
    alive: list[Record] = []
    dead: list[Record] = []
    groups: dict[Any, list[tuple[int, Record]]] = {}
    for place, message in enumerate(grave["messages"]):
        admit(groups.setdefault(identity_of(message), []), place, message)
    for message in messages:
        buried = message["timestamp"] <= grave["deletedBefore"] or covers(groups.get(identity_of(message), []), message)
        (dead if buried else alive).append(message)
    return alive, dead


NEXT: dict[str, set[str]] = {
    "pending": {"processing", "failed"},
    "processing": {"processing", "pending", "completed", "failed"},
    "completed": set(),
    "failed": set(),
}
ENDED = {status for status, following in NEXT.items() if not following}


def check_command(order: Record, where: str = "") -> Record:
    """Return *order* if it has all that its type requires; raise Malformed naming the field."""
    check(TYPED, order, where)
    if order["type"] not in COMMANDS:
        known = ", ".join(COMMANDS)
        raise Malformed(f"{where}.type".lstrip("."), f"{order['type']!r} is not one of {known}")
    check(COMMANDS[order["type"]], order, where)
    if order["type"] == "user_input" and order.get("inputType") == "choice" and not order.get("choices"):
        raise Malformed(f"{where}.choices".lstrip("."), "is required, and not empty, where inputType is choice")
    return order


def new_command(order: Record, now: int) -> Record:
    """Return the pending command that *order* (see COMMANDS) becomes when it is queued at *now*.

    >>> new_command({"type": "execute_bash", "command": "df"}, now=5)["status"]
    'pending'
    """
    return {**order, "status": "pending", "createdAt": now, "updatedAt": now}


HANDLED_FIELDS = {
    field for kind in HANDLED for table in ORDERS[kind][:2] for field in table
}  # hashed whatever the type
DECISIVE = {kind: {*required, *optional} for kind, (required, optional, _) in ORDERS.items()}
DECISIVE |= dict.fromkeys(HANDLED, HANDLED_FIELDS)


def hash_of(command: Record) -> str:
    """Return the sha256 of what decides what a *command* does when it is executed; agents ask humans by the same."""
    fields = {"id", "type", "workingDir", "env", "timeout"} | DECISIVE.get(command["type"], set())
    exact = {field: command[field] for field in fields & command.keys()}
    return digest(json.dumps(exact, sort_keys=True).encode())


def advance(command: Record, patch: Record, now: int) -> Record:
    """Return *command* after *patch* (see REPORT), if the rules let it go there.

    >>> advance({"id": "c", "status": "completed"}, {"status": "processing"}, now=1)
    Traceback (most recent call last):
        ...
    kirosync.Conflict: c is completed and cannot become processing
    """
    was, status = command["status"], patch.get("status", command["status"])
    told = without(patch, "lease", *TIMES, *MARKS)
    if was in ENDED and all(key in command and command[key] == told[key] for key in told):
        return command
    if was in ENDED or status not in NEXT[was] | {was}:
        raise Conflict(f"{command['id']} is {was} and cannot become {status}", status=was)
    if "outcome" in told and status not in ENDED:
        raise Conflict(f"{command['id']}: an outcome is how it ends; this report leaves it {status}", field="outcome")
    for key in (told.keys() & (command.keys() | SETTLED)) - REPORT.keys():
        if key not in command or command[key] != told[key]:
            raise Conflict(f"{command['id']}: {key} is set when it is queued and stays as it is", field=key)
    check_holder(command, patch)
    changed = {**command, **told, "status": status, "updatedAt": now}
    if status == "processing" and was == "pending":
        changed |= {"attempt": command.get("attempt", 1), "startedAt": now}
    if status == "pending" and was == "processing":
        changed = requeue(changed, now)
    if "lease" in patch and status == "processing":
        changed["leaseUntil"] = now + round(patch["lease"] * 1000)
    if status != "processing":
        changed.pop("leaseUntil", None)
    return end(changed, now) if status in ENDED else changed


def requeue(command: Record, now: int) -> Record:
    """Return a claimed *command* as it goes back to the queue, for its next attempt."""
    if command.get("cancelRequested"):
        return fail(command, "cancelled", "cancelled on request", now)
    kept = without(command, "agent", "claim", "startedAt", "leaseUntil")
    return {**kept, "status": "pending", "attempt": command.get("attempt", 1) + 1, "updatedAt": now}


def cancel(command: Record, now: int) -> Record:
    """Return *command* as it is once someone wants it to end: ended, or if it is being executed, with that wish.

    >>> cancel({"id": "c", "status": "processing"}, now=1)["cancelRequested"]
    True
    """
    if command.get("cancelRequested") or command.get("outcome") == "cancelled":
        return command
    if command["status"] in ENDED:
        raise Conflict(f"{command['id']} is {command['status']}: too late to cancel it", status=command["status"])
    if command["status"] == "pending":
        return fail(command, "cancelled", "cancelled before anyone took it", now)
    return {**command, "cancelRequested": True, "updatedAt": now}


def check_holder(command: Record, patch: Record) -> None:
    """Raise Conflict if *patch* is not of the attempt, the agent and the claim that hold *command*.

    A claim may carry a random ``claim``: repeated with the same, it is the same claim; that of another
    agent of the same name is not. Only who holds a command can renew it or hand it back.
    """
    attempt = command.get("attempt", 1)
    if patch.get("attempt", attempt) != attempt:
        raise Conflict(f"{command['id']} is in attempt {attempt}, not {patch['attempt']}", attempt=attempt)
    if command["status"] != "processing":
        return
    holder, given = ({key: said[key] for key in ("agent", "claim") if key in said} for said in (command, patch))
    renews = patch.get("status") in ("processing", "pending")
    if (not holder or given != holder) if renews else not given.items() <= holder.items():
        who = command.get("agent", "another agent")
        raise Conflict(f"{command['id']} is already claimed by {who}", status="processing")


def end(command: Record, now: int) -> Record:
    """Return *command*, which has just become completed or failed, with its outcome."""
    result = command.get("result")
    exited = isinstance(result, dict) and result.get("exitCode") not in (0, None)
    outcome = "ok" if command["status"] == "completed" else "exit" if exited else "error"
    outcome = command.get("outcome", outcome)
    if (outcome == "ok") != (command["status"] == "completed"):
        raise Malformed("outcome", f"a command that is {command['status']} cannot have the outcome {outcome}")
    return {**command, "outcome": outcome, "endedAt": now}


def deadline(command: Record, listening: float = 0) -> float | None:
    """Return the moment (ms) from which *command* is overdue, or None for one that has ended.

    *listening* is since when (ms) reports can be heard: an agent is given time to reach a service that was down.
    """
    if command["status"] == "pending":
        queued = command["updatedAt"] if "attempt" in command else command["createdAt"]
        return float(queued + command.get("expiresIn", EXPIRES_S) * 1000)
    if command["status"] == "processing":
        unheard = command.get("startedAt", command["createdAt"]) + (command.get("timeout", RUN_S) + GRACE_S) * 1000
        due = float(command.get("leaseUntil", unheard))
        return max(due, listening + GRACE_S * 1000) if command["updatedAt"] < listening else due
    return None


def overdue(command: Record, now: int, listening: float = 0) -> Record:
    """Return *command* as it stands at *now*: what nobody took has expired, what nobody reported is lost.

    >>> overdue({"id": "c", "type": "t", "status": "pending", "createdAt": 0, "expiresIn": 1}, now=1001)["outcome"]
    'expired'
    """
    due = deadline(command, listening)
    if due is None or due >= now:
        return command
    if command["status"] == "pending":
        who = f"the agent {command['target']}" if "target" in command else f"an agent for {command['type']}"
        waited = round((now - command["createdAt"]) / 1000)
        if command["type"] == "user_input":
            return fail(command, "expired", f"nobody answered in {waited} s", now)
        return fail(command, "expired", f"{who} did not take it in {waited} s; queue it again if still wanted", now)
    if command.get("retryable") and not command.get("cancelRequested"):
        return requeue(command, now)
    return fail(command, "lost", f"{command.get('agent', 'the agent')} stopped reporting; how it ended is unknown", now)


def fail(command: Record, outcome: str, error: str, now: int) -> Record:
    return advance(command, {"status": "failed", "outcome": outcome, "error": error}, now)


def merge_command(mine: Record | None, theirs: Record, now: int) -> Record:
    """Return the command as the server keeps it after a client sent *theirs*.

    The server's copy wins, but a client may report what the rules allow. A command that the server
    does not know is queued, unless it has ended or waited too long: no stale client runs an old one.
    """
    if mine is None:
        created = min(theirs.get("createdAt", now), now)
        stamped = {
            **without(theirs, *MARKS),
            "createdAt": created,
            "updatedAt": min(theirs.get("updatedAt", created), now),
        }
        if stamped["status"] == "processing":  # elsewhere: its report is waited for, for as long as it may run
            taken = without(stamped, "leaseUntil", "retryable", "agent", "claim")  # by no agent of ours
            return {**taken, "startedAt": now}
        return overdue(stamped, now) if stamped["status"] == "pending" else stamped
    if theirs["status"] in (mine["status"], "pending") or mine["status"] in ENDED:
        return mine
    said: Record = {"attempt": 1, **{key: theirs[key] for key in REPORT.keys() & theirs.keys()}}
    claim: Record = {"status": "processing", **{key: theirs[key] for key in ("agent", "claim") if key in theirs}}
    unclaimed = mine["status"] == "pending" and theirs["status"] == "completed"
    try:
        return advance(advance(mine, {**claim, "attempt": said["attempt"]}, now) if unclaimed else mine, said, now)
    except (Conflict, Malformed):
        return mine


def from_hand(kind: str, found: Record, edited: int, now: int) -> Record:
    """Return the record that a file, made or *edited* (ms) by hand, stands for; raise Malformed if none.

    >>> from_hand("documents", {"id": "d", "content": "by hand", "timestamp": 1}, edited=7, now=8)["timestamp"]
    7
    """
    found = without(found, "deletedBefore")  # brought back from deleted/
    if kind == "documents":
        return {**found, "timestamp": max(found.get("timestamp", edited), min(edited, now))}
    if kind == "commands" and found.get("status", "pending") == "pending":
        check_command(found)
    elif kind == "commands":
        check(FIELDS.get(found["type"], TYPED), found, "")
    if kind == "commands" and "status" not in found:
        return new_command(found, now)
    if kind == "commands" and found["status"] == "pending" and found.get("cancelRequested"):
        found = cancel({"createdAt": now, **without(found, "cancelRequested")}, now)
    if kind == "commands":
        return {**found, "createdAt": found.get("createdAt", now), "updatedAt": found.get("updatedAt", now)}
    return found


def execution_of(said: Record, seconds: float) -> Record:
    """Return the order that a request to /api/kiro/execute stands for; raise ValidationFailed.

    >>> execution_of({"command": 5}, seconds=300)
    Traceback (most recent call last):
        ...
    kirosync.ValidationFailed: Command is required and must be a string
    """
    order: Record = {"type": "kiro_command", "timeout": seconds, "expiresIn": seconds + GRACE_S}
    for field, (kind, sentence) in EXECUTE.items():
        value = said.get(field)
        if value is None and field != "command":
            continue
        try:
            order[field] = check(kind, value, field)
        except Malformed:
            raise ValidationFailed(sentence, field=field) from None
    return order


def window_for(path: str | None, windows: dict[str, Record]) -> str:
    """Return which of the *windows* (what agents said, by name) is to execute what is meant for *path*.

    That is the one with the innermost folder around it; without a path, or among equals, the one focused last.
    Raises Unexecuted if none has the path open.
    """

    def fit(name: str) -> tuple[int, float, str]:
        folders = windows[name].get("workspaceFolders", [])
        around = [len(folder) for folder in folders if path and contains(folder, path)]
        return max(around, default=0), windows[name].get("focusedAt", 0), name

    best = max(windows, key=fit)
    if path and not fit(best)[0]:
        folders = sorted({folder for said in windows.values() for folder in said.get("workspaceFolders", [])})
        raise Unexecuted(f"No editor window has {path} open; open are: {', '.join(folders) or 'no folders'}")
    return best


def contains(folder: str, path: str) -> bool:
    """Return whether *path* is *folder* or inside it, by their names, on whatever system they are.

    >>> contains("/srv/app", "/srv/app/src/"), contains("/srv/app", "/srv/apple"), contains("c:\\\\x", "C:/x/y")
    (True, False, True)
    """
    outer, inner = ([*filter(None, re.split(r"[/\\]", text))] for text in (folder, path))
    if outer and outer[0].endswith(":"):  # Windows, which knows no case
        outer, inner = ([part.lower() for part in parts] for parts in (outer, inner))
    return inner[: len(outer)] == outer


def execution_result(command: Record) -> Record:
    """Return what /api/kiro/execute answers of a *command* that has ended; raise TimedOut or Unexecuted.

    >>> execution_result({"id": "c", "status": "completed", "result": {"output": "x"}, "startedAt": 1, "endedAt": 3})
    {'success': True, 'output': 'x', 'executionTimeMs': 2, 'executionId': 'c'}
    """
    took = max(0, round(command["endedAt"] - command.get("startedAt", command["endedAt"])))
    said = {"executionTimeMs": took, "executionId": command["id"]}
    if command["status"] == "completed":
        result = command.get("result")
        output = result.get("output") if isinstance(result, dict) else result
        text = output if isinstance(output, str) else "" if output is None else canonical(output).decode()
        return {"success": True, "output": text, **said}
    outcome, limit = command.get("outcome"), command.get("timeout", EXECUTE_S) * 1000
    if outcome == "timeout" or (outcome == "cancelled" and command["endedAt"] >= command["createdAt"] + limit):
        raise execution_timed_out(command)
    if outcome == "expired":
        raise Unavailable("Kiro IDE is not responding to commands", reason="not_responding", executionId=command["id"])
    raise Unexecuted(f"Command '{command['command']}' failed: {command.get('error', outcome)}", **said)


def takes_too_long(command: Record, now: int) -> bool:
    """Return whether an editor has not ended *command* in its time, for whoever it executes it."""
    limit = command.get("timeout", RUN_S) * 1000
    running = command["type"] == "kiro_command" and command["status"] == "processing"
    return running and "cancelRequested" not in command and command.get("startedAt", now) + limit < now


def execution_timed_out(command: Record) -> TimedOut:
    limit = round(command.get("timeout", EXECUTE_S) * 1000)
    sentence = f"Operation 'command-execution' timed out after {limit}ms (limit: {limit}ms)"
    return TimedOut(sentence, timeoutMs=limit, executionId=command["id"])


def notice_of(command: Record, after_s: float) -> tuple[str, Record]:
    """Return what of *command*, as it stands, someone may want to be told, and that: asked, failed, or long, or "".

    It asks a human; it failed, and nobody wanted that; it has ended after more than *after_s* seconds.

    >>> command = {"id": "c", "type": "execute_bash", "status": "failed", "outcome": "exit", "error": "exit code 1"}
    >>> notice_of(command, 60)[0], notice_of({**command, "outcome": "cancelled"}, 60)[0]
    ('failed', '')
    """
    asks, status = command["type"] == "user_input", command["status"]
    took = command.get("endedAt", 0) - command.get("startedAt", math.inf)
    events = {
        "asked": asks and status == "pending",
        "failed": not asks and status == "failed" and command.get("outcome") != "cancelled",
        "long": not asks and status == "completed" and took > after_s * 1000,
    }
    event = next((name for name, happened in events.items() if happened), "")
    told = ("type", "status", "outcome", "error", "agent", "prompt", "inputType", "choices", "executionId")
    notice: Record = {
        "event": event,
        "commandId": command["id"],
        **{key: command[key] for key in told if key in command},
    }
    if asks and "sha256" in command.get("metadata", {}):  # an agent's, which goes on with the command, and its env
        notice["prompt"] = command["prompt"].partition("\n")[0]
    return event, notice | ({"durationMs": round(took)} if took > 0 else {})


def as_ntfy(topic: str, notice: Record) -> Record:
    """Return *notice* as ntfy takes it at its root: https://docs.ntfy.sh/publish/#publish-as-json.

    >>> as_ntfy("t", {"event": "failed", "commandId": "c", "type": "execute_bash", "error": "exit code 1"})["message"]
    'c: exit code 1'
    """
    titles = {"asked": "kirosync asks", "failed": "{type} failed", "long": "{type} has ended"}
    text = notice.get("prompt") or f"{notice['commandId']}: {notice.get('error', notice.get('outcome', ''))}"
    title = titles[notice["event"]].format(type=notice["type"])
    urgent = {"priority": 4} if notice["event"] != "long" else {}
    return {"topic": topic, "title": title, "message": text[:NOTICE_CHARACTERS], **urgent}


YES_OR_NO = {"yes": "yes", "y": "yes", "true": "yes", "no": "no", "n": "no", "false": "no"}
ANSWERS: dict[str, Callable[[Record, Any], str | None]] = {  # what a value says, None if it is no answer
    "text": lambda question, value: value if isinstance(value, str) else None,
    "choice": lambda question, value: value if value in question.get("choices", []) else None,
    "file": lambda question, value: value if isinstance(value, str) and value.strip("\0 ") else None,
    "confirmation": lambda question, value: YES_OR_NO.get(str(value).strip().lower()),
}


def meant(question: Record, said: Record) -> str | None:
    """Return the answer to *question* that a human *said*, None if it is none."""
    kind = question.get("inputType", "text")
    return ANSWERS[kind](question, said["value"]) if said["type"] == kind else None


def fitting(question: Record, said: Record) -> str:
    """Return the value that a human *said*, if it answers the *question*; raise Unfitting with what would.

    >>> fitting({"inputType": "confirmation"}, {"type": "confirmation", "value": True})
    'yes'
    """
    kind, value = question.get("inputType", "text"), meant(question, said)
    if value is None:
        possible = {"choice": f"one of {', '.join(question.get('choices', []))}", "confirmation": "yes or no"}
        wanted = possible.get(kind, "a text" if kind == "text" else "the path of a file")
        raise Unfitting(f"the question wants {wanted}, with the type {kind}", executionId=said["executionId"])
    return value


# What happens to a command while it is executed, without the claim becoming another.
MEANWHILE = ("updatedAt", "leaseUntil", "cancelRequested", "inputSize", "inputClosed")
RESTORED = {  # how a command that was open in a backup ends, and why
    "pending": (
        "expired",
        "restored from a backup: it may have been executed since that was taken; queue it again if not",
    ),
    "processing": ("lost", "restored from a backup: it was running when that was taken; how it ended is unknown"),
}


def restored(command: Record, present: Record | None, now: int) -> Record:
    """Return the *command* of a backup as it is once that is restored; *present* is what it is before that.

    One that was open may have been executed since, and ends; unless it is as it was, or still in the same execution.

    >>> restored({"id": "c", "status": "pending", "createdAt": 1}, None, now=9)["outcome"]
    'expired'
    """
    if command["status"] in ENDED:
        return command
    if present and without(present, *MEANWHILE) == without(command, *MEANWHILE):
        return present
    outcome, error = RESTORED[command["status"]]
    return fail(command, outcome, error, now)


# What is shown of a conversation or a document: the markup that is let through, and no other.

Manner = Literal["markdown", "code"]
POSSIBLE["as"] = get_args(Manner)
SHOWN = shape("Text", {"text": str, "as": Manner}, {"language": str, "path": str})
RENDER = shape("Texts", {"texts": Annotated[many(SHOWN), msgspec.Meta(max_length=TEXTS)]}, {})

TAGS = {"p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "code", "span", "em", "strong", "s"}
TAGS |= {"a", "ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td"}
ATTRIBUTES = {"a": {"href", "title"}, "ol": {"start"}, "code": {"class"}}
SCHEMES = {"http", "https", "mailto"}
ALIGN = {"align": {"left", "center", "right"}}  # of a cell


def attribute(tag: str, name: str, value: str) -> str | None:
    """Return the *value* that an attribute which a tag may have is to have, None if it is to have none.

    >>> attribute("code", "class", "language-c++"), attribute("code", "class", "button")
    ('language-c++', None)
    """
    wanted = {("code", "class"): r"language-[\w+#.-]{1,40}", ("ol", "start"): r"[0-9]{1,9}"}
    wanted |= {("a", "href"): r"(?is)(https?://|mailto:).*"}  # not a path of ours
    return value if re.fullmatch(wanted.get((tag, name), "(?s).*"), value, re.ASCII) else None


def measured(texts: Iterable[Record]) -> list[Record | None]:
    """Return *texts* with None in place of those that are too long, or for which there is no room beside the others."""
    left, chosen = TEXTS_BYTES, list[Record | None]()
    for each in texts:
        size = len(each["text"].encode())
        fits = size <= min(left, TEXT_BYTES)
        left -= size if fits else 0
        chosen.append(each if fits else None)
    return chosen


ADDRESS_IN_TEXT = re.compile(r"https?://[^\s<>\"'`]*[^\s<>\"'`.,;:!?)\]}*_~]")


def addresses_in(text: str) -> Iterator[tuple[str, bool]]:
    """Yield *text* in parts, each with whether it is an address of the web, as people write them into sentences.

    >>> [*addresses_in("(see https://a.example/b?c=d.)")]
    [('(see ', False), ('https://a.example/b?c=d', True), ('.)', False)]
    """
    at = 0
    for found in ADDRESS_IN_TEXT.finditer(text):
        yield from [(text[at : found.start()], False)] if found.start() > at else []
        yield found[0], True
        at = found.end()
    yield from [(text[at:], False)] if at < len(text) else []


CURRENT = "current"  # the name of the version of a document that it has now
REPLACED_AT = "[0-9]{16}-[0-9a-f]{12}"  # its timestamp, and the beginning of its sha256
Version = Annotated[str, msgspec.Meta(pattern=f"^({CURRENT}|{REPLACED_AT})$")]


def check_version(name: str, field: str) -> str:
    """Return *name* if it can be that of a version; raise Malformed with the *field* it was given in.

    >>> check_version("0000000000000007-0123456789ab", "from")
    '0000000000000007-0123456789ab'
    >>> check_version("../../token", "from")
    Traceback (most recent call last):
        ...
    kirosync.Malformed: from: is not the name of a version; GET /document/ID/versions lists them
    """
    if name != CURRENT and not re.fullmatch(REPLACED_AT, name):
        raise Malformed(field, "is not the name of a version; GET /document/ID/versions lists them")
    return name


def lines_of(text: str) -> list[str]:
    r"""Return the lines of *text* as a unified diff has them.

    >>> lines_of("a\nb")
    ['a\n', 'b\n\\ No newline at end of file\n']
    """
    *whole, rest = text.split("\n")
    return [f"{line}\n" for line in whole] + ([f"{rest}\n\\ No newline at end of file\n"] if rest else [])


def fine_diff(old: str, new: str, before: str, after: str) -> str:
    """Return the unified diff of two texts, which are called *before* and *after*. It may take very long."""
    return "".join(difflib.unified_diff(lines_of(old), lines_of(new), before, after))


def coarse_diff(old: str, new: str, before: str, after: str) -> str:
    r"""Return a unified diff in one piece, from the first line that differs to the last. It is soon made.

    >>> print(coarse_diff("a\nb\nc\n", "a\nc\n", "1", "2"), end="")
    --- 1
    +++ 2
    @@ -2,1 +1,0 @@
    -b
    """
    mine, theirs = lines_of(old), lines_of(new)
    first = in_common(mine, theirs)
    last = in_common(mine[first:][::-1], theirs[first:][::-1])
    gone, come = mine[first : len(mine) - last], theirs[first : len(theirs) - last]
    if not gone and not come:
        return ""
    where = f"@@ -{first + bool(gone)},{len(gone)} +{first + bool(come)},{len(come)} @@"
    changes = [*(f"-{line}" for line in gone), *(f"+{line}" for line in come)]
    return "".join([f"--- {before}\n+++ {after}\n{where}\n", *changes])


def in_common(mine: list[str], theirs: list[str]) -> int:
    """Return how many lines are the same in both, from the first on."""
    return sum(1 for _ in itertools.takewhile(bool, map(operator.eq, mine, theirs)))


class Finding(NamedTuple):
    """What the doctor has to say: ``level`` is ok, warn or bad; what to do about it, if it is not ok."""

    level: str
    sentence: str
    remedy: str = ""


def judge_space(free: float, files: float) -> Finding:
    """Judge by how many bytes are *free* on a disk, and for how many *files* there is room.

    >>> judge_space(0, math.inf).level
    'bad'
    """
    said = f"{free / (1 << 20):.0f} MiB are free" + (f", and room for {files:.0f} files" if files < math.inf else "")
    if free < LOW_BYTES or files < LOW_FILES:
        return Finding("bad", said, "make space: archive/, history/, quarantine/ and before-restore-* may be emptied")
    if free < SCARCE_BYTES or files < SCARCE_FILES:
        return Finding("warn", said, f"make space soon: with less than {LOW_BYTES >> 20} MiB the service is not well")
    return Finding("ok", said)


def judge_clock(now: float, then: float, what: str) -> Finding:
    """Judge the clock, which says *now* (ms), by the moment *then* of *what* has been already.

    >>> judge_clock(1, 600_001, "the last change").sentence
    'the clock is 600 s behind the last change'
    """
    behind = then - now
    if behind <= SKEW_MS:
        return Finding("ok", f"the clock is not behind {what}")
    level = "bad" if behind > AHEAD_MS else "warn"
    return Finding(level, f"the clock is {behind / 1000:.0f} s behind {what}", "set it: timedatectl set-ntp true")


# File systems that are elsewhere, or another program's: their locks and renames are only as good as that.
DISTANT = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "gluster", "lustre", "ocfs", "gfs", "virtiofs", "fuse", "vbox")


def judge_file_system(kind: str) -> Finding:
    """Judge whether the locks of a file system of this *kind* can be relied upon.

    >>> judge_file_system("nfs4").level, judge_file_system("ext4").level
    ('bad', 'ok')
    """
    if kind.startswith(DISTANT):
        level = "warn" if kind.startswith("fuse") else "bad"
        return Finding(level, f"the file system is {kind}, which is not local", "move the state to a local disk")
    return Finding("ok", f"the file system is {kind}")


def judge_package(wanted: str, found: str | None) -> Finding:
    """Judge the version *found* of what is *wanted*, as "name>=version".

    >>> judge_package("filelock>=3.30", "3.9").level
    'bad'
    """
    name, _, least = wanted.partition(">=")
    if found is None:
        return Finding("bad", f"{name} is not there", f"pip install '{wanted}'")
    if numbers_in(found) < numbers_in(least):
        return Finding("bad", f"{name} is {found}, older than {least}", f"pip install '{wanted}'")
    return Finding("ok", f"{name} is {found}")


def numbers_in(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


# What lies where in the state directory: each part of it, and the paths of its files.
KIND, NAME = f"(?P<kind>{'|'.join(KINDS)})", "(?P<name>[^/]+)"
LAYOUT = {
    "record": rf"{KIND}/{NAME}\.json",
    "tombstone": rf"(deleted|archive)/{KIND}/{NAME}\.json",
    "output": rf"(archive/)?output/{NAME}\.(out|err|in)",
    "version": rf"history/{KIND}/{NAME}/[0-9]{{16}}-[0-9a-f]{{12}}\.json",
    "agent": rf"agents/{NAME}\.json",
    "quarantined": r"quarantine/.+",
    "token": r"token|tokens\.json",
    "told": r"told\.json",
    "used": r"used\.json",
    "audit": r"audit\.json",
    "journal": r"journal\.jsonl",
}
PATHS = {part: re.compile(pattern, re.DOTALL) for part, pattern in LAYOUT.items()}


class Place(NamedTuple):
    """What a file in the state directory is for; ``kind`` and ``identity`` are of the record that it is about."""

    part: str
    kind: str
    identity: str


def place_of(path: str) -> Place | None:
    """Return what the file *path*, within the state directory, is for; None if it is nothing that kirosync writes.

    >>> place_of("documents/a%20b.json")
    Place(part='record', kind='documents', identity='a b')
    >>> place_of("documents/a b.json"), place_of("quarantine/../../etc/passwd"), place_of("/token")
    (None, None, None)
    """
    if {"", ".", ".."}.intersection(path.split("/")):
        return None
    for part, pattern in PATHS.items():
        if found := pattern.fullmatch(path):
            said = {"kind": "commands", "name": "x", **found.groupdict()}
            return Place(part, said["kind"], urllib.parse.unquote(said["name"])) if is_name(said["name"]) else None
    return None


# ---------------------------------------------------------------------------------------- Store
# The only code that touches the state directory.


Stamp = tuple[int, int, int]  # of a file: inode, mtime in ns, size


# What a change does to a record: each op, and those whose lines in the journal no longer matter after it.
REPLACES: dict[str, tuple[str, ...]] = {
    "put": ("put",),
    "delete": ("delete", "put"),
    "archive": ("archive", "put"),
    "quarantine": ("quarantine", "put"),
    "touch": ("touch",),
}
GRAVES = {"delete": "deleted", "archive": "archive"}  # where the last version of what has gone is
FOLDERS = [*GRAVES.values(), *(f"{folder}/{kind}" for folder in GRAVES.values() for kind in KINDS), *KINDS]
FOLDERS += ["agents", "archive/output", "history", "output", "quarantine"]


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One change in the journal. ``op`` is one of REPLACES, or open: a start of a store; or add or revoke, of a token.

    ``by`` is who wanted it: NAME@ADDRESS of a token, or what it was within the service. Of a command the line says
    what it is and how it stands, so that nobody who reads it later needs the record as it was.
    """

    revision: int
    at: float
    lastUpdate: float
    kind: str
    id: str
    op: str
    crc: int = 0
    by: str = ""
    type: str = ""
    status: str = ""
    outcome: str = ""
    sha256: str = ""  # see hash_of

    def topics(self) -> Iterator[tuple[str, ...]]:
        """Yield what those may wait for who are to be told of it."""
        yield (self.kind,)
        yield self.kind, self.id


def line_of(text: bytes) -> Line:
    """Return what a line of the journal says; raise ValueError or Malformed."""
    line = msgspec.json.decode(text, type=Line)
    if line.kind in KINDS:
        check_id(line.id)
    return line


class Whole(NamedTuple):
    """What is known of a document or a command: the record as /sync shows it, compact JSON, without id and revision."""

    wire: bytes
    status: str = ""  # of a command
    ended: float = 0  # when that was, ms

    def record(self) -> Record:
        return msgspec.json.decode(self.wire)  # type: ignore[no-any-return]

    def newer(self, since: int) -> list[bytes]:
        return [self.wire]

    def file(self, identity: str, revision: int, base: Entry | None = None) -> list[bytes | Span]:
        """Return what its file is made of: indented, id and revision first, a newline at the end."""
        head = msgspec.json.encode({"id": identity, "revision": revision})[:-1]
        text = msgspec.json.format(b",".join(filter(None, [head, self.wire[1:-1]])) + b"}", indent=2) + b"\n"
        return [not_too_deep(identity, text)]


class Talk(NamedTuple):
    """What is known of a conversation: its messages one by one, so that what stays is never decoded or encoded again.

    The lists stand side by side, a place a message, in the order of timestamps. None is ever changed: ``edited``
    copies them, which takes 28 bytes a message and no look at any.
    """

    more: Record  # what its file holds beside the messages
    packed: str  # the revisions, as its file holds them
    messages: list[bytes]  # as /sync shows them, compact JSON
    revisions: array.array[int]  # at which each last changed
    timestamps: array.array[float]  # of each, ms
    lengths: array.array[int]  # bytes that each takes in the file
    dated: dict[str | int, float]  # the timestamp of each message that has an id

    @property
    def status(self) -> str:
        return ""

    @property
    def ended(self) -> float:
        return 0

    def record(self) -> Record:
        return {**self.more, "messages": self.decoded(0, len(self.messages))}

    def decoded(self, start: int, stop: int) -> list[Record]:
        return msgspec.json.decode(b"[%s]" % b",".join(self.messages[start:stop]))  # type: ignore[no-any-return]

    def newer(self, since: int) -> list[bytes]:
        """Return the messages that have changed after revision *since*, as the pieces of a JSON list."""
        chosen = itertools.compress(self.messages, map(since.__lt__, self.revisions)) if since else self.messages
        return [b"[", *separated(chosen), b"]"]

    def merged(self, theirs: list[Record], revision: int) -> tuple[Talk, list[Record]]:
        """Return what merge_messages makes of it and *theirs*, and what lost. Only what is near them is decoded."""
        new = self.unknown(theirs)
        mine, known = self.near(new), len(self.messages)
        merged, losers = merge_places([*sorted(mine.items()), *enumerate(new, known)])
        edits = []
        for place, message in merged:
            wire = msgspec.json.encode(message)
            first, last = self.moment(message["timestamp"])
            if not first <= place < last:  # it has come, or it goes to another moment
                edits.append(Edit(last, last, wire))
            elif mine.pop(place) is not message and wire != self.messages[place]:
                edits.append(Edit(place, place + 1, wire))
        edits += [Edit(place, place + 1) for place in mine]
        return self.edited(edits, revision) if edits else self, losers

    def unknown(self, theirs: list[Record]) -> list[Record]:
        """Return those of *theirs* that are not here to the letter."""
        held = {moment: {*self.messages[slice(*self.moment(moment))]} for moment in {m["timestamp"] for m in theirs}}
        return [message for message in theirs if msgspec.json.encode(message) not in held[message["timestamp"]]]

    def near(self, new: list[Record]) -> dict[int, Record]:
        """Return the messages, by place, that any of *new* may be a version of."""
        wanted = {identity_of(message) for message in new}
        moments = {m["timestamp"] for m in new if "id" not in m}
        moments |= {self.dated[m["id"]] for m in new if m.get("id") in self.dated}
        runs = ((first, self.decoded(first, last)) for first, last in map(self.moment, moments))
        known = itertools.chain.from_iterable(enumerate(messages, first) for first, messages in runs)
        return {place: message for place, message in known if identity_of(message) in wanted}

    def moment(self, timestamp: float) -> tuple[int, int]:
        """Return the places, from and up to, of the messages with this *timestamp*."""
        return bisect.bisect_left(self.timestamps, timestamp), bisect.bisect_right(self.timestamps, timestamp)

    def edited(self, edits: list[Edit], revision: int) -> Talk:
        """Return it after *edits*: what they bring changed at *revision*."""
        edits = sorted(edits, key=lambda edit: edit[:2])
        old, at = self.parts(), 0
        new = [part[:0] for part in old]
        added = talk_of({}, [edit.wire for edit in edits if edit.wire], [revision] * len(edits))
        pieces = iter(zip(*added.parts(), strict=True))
        for edit in edits:
            for whole, part in zip(new, old, strict=True):
                whole.extend(part[at : edit.start])
            for whole, item in zip(new, next(pieces) if edit.wire else (), strict=False):
                whole.append(item)
            at = edit.stop
        for whole, part in zip(new, old, strict=True):
            whole.extend(part[at:])
        messages, revisions, timestamps, lengths = new
        packed = repack(self.packed, len(self.messages), edits[0].start, revisions)
        return Talk(self.more, packed, messages, revisions, timestamps, lengths, {**self.dated, **added.dated})

    def parts(self) -> tuple[Any, ...]:
        return self.messages, self.revisions, self.timestamps, self.lengths

    def file(self, identity: str, revision: int, base: Entry | None = None) -> list[bytes | Span]:
        """Return what its file is made of; what is the same in the file of *base* is copied from there."""
        said = {"id": identity, "revision": revision, "revisions": self.packed, **self.more}
        head = not_too_deep(identity, msgspec.json.format(msgspec.json.encode(said), indent=2))
        known = base.content.messages if base and isinstance(base.content, Talk) else []
        first = alike(known, self.messages)
        last = alike(known[first:][::-1], self.messages[first:][::-1])
        stop = len(self.messages) - last
        parts: list[Any] = [base.span(0, first)] if base and first else []
        parts += [b",".join(map(text_of, self.messages[first:stop]))] if stop > first else []
        parts += [base.span(len(known) - last, len(known))] if base and last else []
        foot = b"\n  ]\n}\n" if parts else b"]\n}\n"
        return [head[:-2] + MESSAGES_HERE, *separated(parts), foot]


class Edit(NamedTuple):
    """What comes (if anything) to where the messages from the place ``start`` up to ``stop`` were."""

    start: int
    stop: int
    wire: bytes = b""


class Span(NamedTuple):
    """Bytes of a file, as long as it has this stamp."""

    path: str
    stamp: Stamp
    offset: int
    length: int

    def blocks(self) -> Iterator[bytes]:
        """Yield the bytes, block by block; raise Busy if the file is not, or does not stay, what it was."""
        try:
            file = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            raise self.moved() from None
        try:
            end, at = self.offset + self.length, self.offset
            while at < end and (block := os.pread(file, min(BLOCK_BYTES, end - at), at)):
                at += len(block)
                yield block
            if at < end or stamp_of(os.fstat(file)) != self.stamp:
                raise self.moved()
        finally:
            os.close(file)

    def moved(self) -> Busy:
        return Busy(f"{os.path.basename(self.path)} is being changed by hand; try again")


class Entry(NamedTuple):
    """What is known of a record's file: enough to answer, and to notice a change, without reading it."""

    revision: int
    crc: int  # of the file's bytes
    path: str
    stamp: Stamp
    content: Whole | Talk

    def record(self, identity: str) -> Record:
        return {"id": identity, **self.content.record()}

    def newer(self, since: int = 0) -> bytes:
        """Return it as /sync shows it, less the messages that have not changed after revision *since*."""
        return b"".join(self.content.newer(since))

    def span(self, start: int, stop: int) -> bytes | Span:
        """Return the text that the messages from *start* up to *stop* have in its file."""
        talk = self.content
        assert isinstance(talk, Talk)
        length = sum(talk.lengths[start:stop]) + stop - start - 1
        if length < COPIED_BYTES:
            return b",".join(map(text_of, talk.messages[start:stop]))
        behind = sum(talk.lengths[start:]) + len(talk.lengths) - start - 1 + len(b"\n  ]\n}\n")
        return Span(self.path, self.stamp, self.stamp[2] - behind, length)


class Head(NamedTuple):
    """The cursor that stands for all that is known, and its revision."""

    cursor: str
    revision: int


class Delta(NamedTuple):
    """What changed after a cursor: the entries with the revision they are wanted from, and the deleted."""

    full: bool
    revision: int
    cursor: str
    changed: dict[str, dict[str, Entry]]
    deleted: dict[str, list[str]]
    since: int

    def shown(self, kind: str, statuses: Container[str] = ()) -> dict[str, Entry]:
        """Return the changed records of *kind*; of commands, if there are *statuses*, those that have one of them."""
        if kind != "commands" or not statuses:
            return self.changed[kind]
        return {identity: entry for identity, entry in self.changed[kind].items() if entry.content.status in statuses}

    def touches(self, kinds: Iterable[str], statuses: Container[str] = ()) -> bool:
        """Return whether it says anything of *kinds*."""
        return self.full or any(self.deleted[kind] or self.shown(kind, statuses) for kind in kinds)


class Agent(NamedTuple):
    """Who has announced itself: what it said, and when (ms) it was last seen."""

    said: Record
    seen: float

    def present(self, now: int) -> bool:
        return is_present(self.seen, now)


def is_present(seen: float, now: int) -> bool:
    """Return whether an agent last *seen* at a moment (ms) is there; a moment that is yet to come was set by hand."""
    return abs(now - seen) < ABSENT_S * 1000


class Unreadable(Exception):
    """A file in the state directory is not a record; the text says why."""


def unpack(revisions: Any) -> list[int]:
    """Return the numbers in "5 6*3": 5 once, 6 three times; none if it cannot be read.

    >>> unpack("5 6*3"), unpack("?")
    ([5, 6, 6, 6], [])
    """
    if not isinstance(revisions, str) or not re.fullmatch(r"(\d{1,15}(\*\d{1,7})?( |$))*", revisions):
        return []
    runs = (run.partition("*") for run in revisions.split())
    return [int(revision) for revision, _, times in runs for _ in range(int(times or 1))]


def pack(revisions: Sequence[int]) -> str:
    runs = ((revision, len(list(run))) for revision, run in itertools.groupby(revisions))
    return " ".join(str(revision) if times == 1 else f"{revision}*{times}" for revision, times in runs)


def repack(packed: str, count: int, first: int, revisions: Sequence[int]) -> str:
    """Return *revisions* packed, of which the *first* stand, so far as it is not cheaper to begin anew, in *packed*.

    >>> repack("5 6*3", 4, 3, [5, 6, 6, 9])
    '5 6*2 9'
    """
    if count - first > REPACKED:
        return pack(revisions)
    while count and (count > first or revisions[count - 1 : count] == revisions[count : count + 1]):
        packed, _, run = packed.rpartition(" ")
        count -= int(run.partition("*")[2] or 1)
    return f"{packed} {pack(revisions[count:])}".strip()


class Dated(msgspec.Struct):
    """What a message has to say of itself to be put in its place."""

    timestamp: float
    id: str | int | None = None


class Standing(msgspec.Struct):
    """What a command has to say of itself to be chosen."""

    status: str
    endedAt: float = 0


DATED, STANDING = msgspec.json.Decoder(Dated), msgspec.json.Decoder(Standing)
MESSAGES_HERE = b',\n  "messages": ['  # in a file, which has no line break within a string


def content_of(kind: str, record: Record, revision: int, known: Whole | Talk | None = None) -> Whole | Talk:
    """Return what there is to know of a *record*, whose messages have changed at *revision* if they are not *known*."""
    if kind != "conversations":
        said = without(record, "id", "revision")
        wire = msgspec.json.encode(said)
        return standing(wire) if kind == "commands" and "status" in said else Whole(wire)
    messages = [msgspec.json.encode(message) for message in record["messages"]]
    when = dict(zip(known.messages, known.revisions, strict=True)) if isinstance(known, Talk) else {}
    more = without(record, "id", "revision", "revisions", "messages")
    return talk_of(more, messages, [when.get(message, revision) for message in messages])


def standing(wire: bytes) -> Whole:
    """Return what there is to know of a command."""
    said = STANDING.decode(wire)
    return Whole(wire, sys.intern(said.status), said.endedAt)


def talk_of(more: Record, messages: list[bytes], revisions: list[int], texts: Iterable[bytes] | None = None) -> Talk:
    """Return a conversation of encoded *messages*, that changed at *revisions* and have these *texts* in its file."""
    dates = [*map(DATED.decode, messages)]
    timestamps = array.array("d", [date.timestamp for date in dates])
    lengths = array.array("I", map(len, map(text_of, messages) if texts is None else texts))
    dated = {date.id: date.timestamp for date in dates if date.id is not None}
    numbers = array.array("q", revisions[: len(messages)])
    return Talk(more, pack(numbers), messages, numbers, timestamps, lengths, dated)


def text_of(message: bytes) -> bytes:
    """Return an encoded *message* as it stands in the file of its conversation, from the line break before it on."""
    return not_too_deep("a message", msgspec.json.format(b'{"":[%s]}' % message, indent=2)[9:-6])


def not_too_deep(identity: str, text: bytes) -> bytes:
    if b"\n" + b"  " * NESTING in text:
        raise Malformed(identity, f"is nested more than {NESTING} deep")
    return text


def separated(pieces: Iterable[T]) -> Iterator[T | bytes]:
    """Yield *pieces* with a comma between each two.

    >>> b"".join(separated([b"1", b"2", b"3"]))
    b'1,2,3'
    """
    for number, piece in enumerate(pieces):
        if number:
            yield b","
        yield piece


def alike(known: list[bytes], messages: list[bytes]) -> int:
    """Return how many of *messages*, from the first on, are the very same objects as those *known*."""
    return sum(1 for _ in itertools.takewhile(bool, map(operator.is_, known, messages)))


def read_file(path: str) -> tuple[bytes, Stamp]:
    """Return the bytes and the stamp of a plain file; raise FileNotFoundError, or Unreadable."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not block
        try:
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise Unreadable("is not a plain file")
            raw = os.read(file, status.st_size + 1)
            while len(raw) != status.st_size and (block := os.read(file, BLOCK_BYTES)):
                raw += block  # it is growing, or larger than one call reads
            return raw, stamp_of(status)
        finally:
            os.close(file)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Unreadable(error.strerror) from None


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_record(kind: str, name: str, path: str) -> tuple[Entry, Record]:
    """Return the entry of a file and the record in it; raise FileNotFoundError, or Unreadable with the reason."""
    raw, stamp = read_file(path)
    identity = urllib.parse.unquote(name)
    try:
        record = check(dict[str, Any], parse(raw), "")
        revision = record.pop("revision", 0)
        if not isinstance(revision, int) or not 0 <= revision <= LAST_REVISION:
            revision = 0  # a number made up by hand
        record.pop("id", None)
        check(FOUND[kind], record, "")
        entry = Entry(revision, zlib.crc32(raw), path, stamp, content_of(kind, record, revision))
    except Malformed as error:
        raise Unreadable(str(error)) from None
    return entry, {"id": identity, **record}


def read_own(line: Line, path: str) -> Entry | None:
    """Return the entry of a file that is as the journal's *line* says, without a look at what it means; else None."""
    try:
        raw, stamp = read_file(path)
        if zlib.crc32(raw) == line.crc:
            return Entry(line.revision, line.crc, path, stamp, READERS[line.kind](line, raw))
    except (FileNotFoundError, Unreadable, ValueError, LookupError):
        pass  # then it is not ours: it is looked at as one that was changed by hand
    return None


def whole_in(line: Line, raw: bytes) -> Whole:
    wire = msgspec.json.format(raw, indent=-1)
    head = msgspec.json.encode({"id": line.id, "revision": line.revision})[:-1]
    if not wire.startswith(head):
        raise ValueError
    wire = b"{" + wire[len(head) :].removeprefix(b",")
    return standing(wire) if line.kind == "commands" else Whole(wire)


def talk_in(line: Line, raw: bytes) -> Talk:
    head, here, text = raw.partition(MESSAGES_HERE)
    more = msgspec.json.decode(head + b"}")
    texts = text.removesuffix(b"\n  ]\n}\n").split(b",\n    {") if here and text != b"]\n}\n" else []
    texts = [texts[0], *(b"\n    {" + text for text in texts[1:])] if texts else []
    messages = [msgspec.json.format(text, indent=-1) for text in texts]
    revisions = unpack(more["revisions"])
    if len(revisions) != len(messages):
        raise ValueError
    return talk_of(without(more, "id", "revision", "revisions"), messages, revisions, texts)


READERS: dict[str, Callable[[Line, bytes], Whole | Talk]] = {
    "conversations": talk_in,
    "documents": whole_in,
    "commands": whole_in,
}


class Watch:
    """Tells which files of the state directory were changed, by anyone, from the kernel's own notices.

    Where the kernel has no inotify, it says None now and then: look at everything.
    """

    CHANGED = 0x8 | 0x40 | 0x80 | 0x100 | 0x200  # closed after writing, moved from, moved to, linked, deleted
    MODIFIED = 0x2
    OVERFLOW, IGNORED = 0x4000, 0x8000  # notices were lost; the folder itself was removed

    def __init__(self, directory: Path, kinds: Iterable[str]) -> None:
        self.folders: dict[int, str] = {}
        self.looked, self.stale = time.monotonic(), False
        libc = ctypes.CDLL(None)
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC) if hasattr(libc, "inotify_init1") else -1
        for kind in (*kinds, "") if self.fd >= 0 else ():
            path, mask = os.fsencode(directory / kind), self.CHANGED if kind else self.CHANGED | self.MODIFIED
            self.folders[libc.inotify_add_watch(self.fd, path, mask)] = kind
        if -1 in self.folders:  # out of watches: the system's limit, not ours
            os.close(self.fd)
            self.fd = -1

    def wait(self, seconds: float) -> set[tuple[str, str]] | None:
        """Return the (kind, file name) pairs changed by now, waiting up to *seconds* for the first; or None."""
        if self.fd < 0:
            time.sleep(min(seconds, JOURNAL_POLL_S))
            return self._by_time()
        if not select.select([self.fd], [], [], seconds)[0]:
            return set()
        names, notices = set(), os.read(self.fd, 1 << 16)
        while notices:
            folder, mask, _, length = struct.unpack_from("iIII", notices)
            name = os.fsdecode(notices[16 : 16 + length].rstrip(b"\0"))
            moved = self.folders.get(folder) == "" and name in KINDS
            if moved or mask & (self.OVERFLOW | self.IGNORED):
                self.stale = True
                return None
            names.add((self.folders[folder], name))
            notices = notices[16 + length :]
        return names

    def _by_time(self) -> set[tuple[str, str]] | None:
        if time.monotonic() - self.looked < LOOK_S:
            return set()
        self.looked = time.monotonic()
        return None

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


STREAMS = {"stdout": "out", "stderr": "err", "stdin": "in"}  # of a command, and how their files end


class Pen:
    """What a rule writes with. The store hands it out under the lock, and to nobody else.

    All records written with one pen become durable and visible together, or not at all.
    """

    def __init__(self, store: Store, now: int) -> None:
        self.store, self.now, self.by = store, now, store.by
        self.revision, self.last_update = store.revision, store.last_update
        self.lines: list[Line] = []
        self.entries: dict[tuple[str, str], Entry | None] = {}
        self.files: dict[str, tuple[File, list[bytes | Span]]] = {}
        self.history: dict[File, list[bytes | Span]] = {}
        self.unwanted: dict[str, str] = {}  # files to be moved, or removed: of what has gone, or is in quarantine

    def fork(self) -> Pen:
        """Return a pen that goes on where this one is, to be dropped if its rule fails."""
        twin = Pen.__new__(Pen)
        parts = vars(self).items()
        vars(twin).update({name: part.copy() if isinstance(part, (list, dict, set)) else part for name, part in parts})
        return twin

    def get(self, kind: str, identity: str) -> Record | None:
        """Return the record, with its id, or None."""
        entry = self._entry(kind, identity)
        return entry.record(identity) if entry else None

    def put(self, kind: str, identity: str, record: Record) -> None:
        """Make *record* what its id stands for. One that is as it was is no change."""
        known = self._entry(kind, identity)
        told = {name: str(record.get(name, "")) for name in ("type", "status", "outcome")} if kind == "commands" else {}
        told |= {"sha256": hash_of(record)} if told else {}
        self._write(kind, identity, content_of(kind, record, self.revision + 1, known and known.content), **told)

    def merge(self, identity: str, messages: list[Record]) -> None:
        """Merge *messages* into a conversation; what they replace goes to its history."""
        known = self._entry("conversations", identity)
        talk = known.content if known and isinstance(known.content, Talk) else talk_of({}, [], [])
        merged, losers = talk.merged(messages, self.revision + 1)
        self.keep("conversations", identity, losers)
        self._write("conversations", identity, merged)

    def _write(self, kind: str, identity: str, content: Whole | Talk, **told: str) -> None:
        known = self._entry(kind, identity)
        if known and known.content == content:
            return
        file = self.store.file(kind, identity, "put", self.revision + 1)
        pieces = content.file(identity, self.revision + 1, self.store.entries[kind].get(identity))
        self._enter(kind, identity, "put", **told)
        self.entries[kind, identity] = Entry(self.revision, 0, file.path, (0, 0, 0), content)
        self.files[file.path] = file, pieces

    def delete(self, kind: str, identity: str, before: int, whole: bool = True, op: str = "delete") -> None:
        """Leave a tombstone (see bury) in place of the record; nothing as old as *before* (ms) comes back.

        With the *op* archive the tombstone and what a command has printed are in archive/.
        """
        record = self.get(kind, identity) or ({"messages": []} if kind == "conversations" else {})
        grave = bury(record, self.grave(kind, identity), before, whole)
        wire = msgspec.json.encode(without(grave, "id", "revision"))
        self._enter(kind, identity, op)
        self.entries[kind, identity] = None
        self.files.pop(self.store.path(kind, identity), None)
        file = self.store.file(kind, identity, op, self.revision)
        file = file if whole else file._replace(replaces="")  # it is gone; one that has come since is another
        if kind == "commands":
            self.unwanted |= self.store.leftovers(identity, op)
        self.files[file.path] = file, Whole(wire).file(identity, self.revision)

    def grave(self, kind: str, identity: str) -> Record | None:
        """Return the tombstone that *identity* has, or None."""
        for op in sorted(GRAVES, key=lambda op: -self.store.recent.get((kind, identity, op), 0)):
            path = self.store.grave(kind, identity, op)
            if path in self.files:
                return msgspec.json.decode(b"".join(self.files[path][1]))  # type: ignore
            if (kind, identity, op) in self.store.recent:
                # removed or spoiled by hand: then nothing is dead
                with contextlib.suppress(FileNotFoundError, Unreadable, msgspec.DecodeError, TypeError):
                    return {"deletedBefore": 0, "messages": [], **msgspec.json.decode(read_file(path)[0])}
        return None

    def keep(self, kind: str, identity: str, versions: Iterable[Record]) -> None:
        """Put *versions* into the history of a record."""
        folder = self.store.history(kind, identity)
        for version in versions:
            text = msgspec.json.format(canonical(version), indent=2) + b"\n"
            moment = max(0, int(version["timestamp"]))
            path = f"{folder}/{moment:016d}-{digest(text)[:12]}.json"
            aside = f"{self.store.directory}/history/.{digest(os.fsencode(path))[:24]}.json"
            if not os.path.exists(path):
                self.history[File(path, aside)] = [text]

    def type_in(self, identity: str, offset: int, typed: bytes) -> None:
        """Put *typed* at *offset* into what a command reads. It counts when the record says so, and not before."""
        path = self.store.stream(identity, "stdin")
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                os.lseek(fd, offset, os.SEEK_SET)
                write_all(fd, typed)
                os.fsync(fd)  # before the record
            finally:
                os.close(fd)
            sync_folder(path.parent)
        except OSError as error:
            raise refusal_of(error) from None

    def agent(self, name: str) -> Record | None:
        """Return what an agent said of itself, or None."""
        agent = self.store.agent(name)
        return agent and agent.said

    def announce(self, name: str, said: Record) -> None:
        """Keep what an agent *said* of itself, in place of what it said before; that is no change of the state.

        Where there are too many, the one that has been absent the longest gives way; raise Busy if none is.
        """
        path, text = self.store.path("agents", name), msgspec.json.format(msgspec.json.encode(said), indent=2) + b"\n"
        if len(text) > ANNOUNCED_BYTES:
            raise TooLarge(f"an agent may say {ANNOUNCED_BYTES} bytes of itself", limit=ANNOUNCED_BYTES)
        seen = self.store.agents_seen()
        if name not in seen and len(seen) >= AGENTS:
            longest = min(seen, key=lambda other: seen[other])
            if is_present(seen[longest], self.now) or not self.store.forget(longest):
                raise Busy(f"{AGENTS} agents are here already, which is as many as can be")
        file = File(path, f"{self.store.directory}/agents/.{name_of(name)}.json")
        try:
            set_aside({file: [text]})
            put_in_place([file])
        except OSError as error:
            raise refusal_of(error) from None
        self.store.saw(name)

    def entitle(self, name: str, token: Record | None) -> None:
        """Have *name* be the name of *token*, or of none: who has the one before is turned away at once.

        Raises Malformed if tokens.json cannot be read: it is not to be written over.
        """
        said = tokens_said(self.store.directory)  # all of it, also what does not count
        tokens = without(said, name) | ({name: token} if token else {})
        op = "add" if token else "revoke"
        file = self.store.file("tokens", name, op, self.revision + 1)
        self.files[file.path] = file, [msgspec.json.format(msgspec.json.encode(tokens), indent=2) + b"\n"]
        self._enter("tokens", name, op)

    def mark(self, kind: str, identity: str, op: str) -> None:
        """Enter in the journal what is no change of a record, for who accounts for it."""
        self._enter(kind, identity, op)

    def touch(self, moment: float) -> None:
        """Move lastUpdate to *moment* (ms), forwards only."""
        if moment > self.last_update:
            self.last_update = moment
            self._enter("lastUpdate", "", "touch")

    def adopt(self, kind: str, name: str, patient: bool = True) -> None:
        """Take in what someone did by hand to the file *name* (without .json) of *kind*.

        One that cannot be read is looked at again later if it may be half written and we are *patient*.
        """
        path = f"{self.store.directory}/{kind}/{name}.json"
        identity = urllib.parse.unquote(name)
        if not is_name(name):
            return self._turn_away(kind, name, "the name of this file is not as kirosync would write it")
        staged, known = (kind, identity) in self.entries, self._staged(kind, identity)
        self.entries[kind, identity] = known
        try:
            entry, found = read_record(kind, name, path)
            record = from_hand(kind, found, entry.stamp[1] // 1_000_000, self.now)
            not_too_deep(identity, msgspec.json.format(msgspec.json.encode(record), indent=2))
        except FileNotFoundError:
            log.info("%a was removed by hand", f"{kind}/{name}.json")
            return self.delete(kind, identity, self.now, whole=False)  # who makes room is to have it
        except (Unreadable, Malformed) as reason:
            if not (patient and self.store.postpone(kind, name, self.now)):
                self._quarantine(kind, name, str(reason))
            elif not staged:
                del self.entries[kind, identity]  # not looked at yet: whoever writes meanwhile is to look
            return
        if known and entry.crc == known.crc:
            self.store.entries[kind][identity] = self.entries[kind, identity] = known._replace(stamp=entry.stamp)
            return
        log.info("%a was changed by hand", f"{kind}/{name}.json")
        self._replace(kind, identity, known, record)

    def _replace(self, kind: str, identity: str, known: Entry | None, record: Record) -> None:
        """Put a record changed by hand, so that it also loses what was taken out of it."""
        old = known.record(identity) if known else None
        if kind == "documents" and old:
            self.keep(kind, identity, [old])
        if kind == "conversations":
            merged, losers = merge_messages([], record["messages"])
            self.keep(kind, identity, losers)
            record = {**record, "messages": merged}
            if not old or canonical(merge_messages(old["messages"], merged)[0]) != canonical(merged):
                kept = set(map(canonical, merged))
                lost = [message for message in old["messages"] if canonical(message) not in kept] if old else []
                self.entries[kind, identity] = known and known._replace(
                    content=content_of(kind, {**(old or {}), "messages": lost}, known.revision)
                )
                self.delete(kind, identity, 0)
        self.entries[kind, identity] = None
        self.put(kind, identity, record)

    def _quarantine(self, kind: str, name: str, reason: str) -> None:
        """Move a file that is no record aside, and put back what was last known of it."""
        identity = urllib.parse.unquote(name)
        known = self._staged(kind, identity)
        self._turn_away(kind, name, reason)
        self.entries[kind, identity] = None
        if known:
            self.put(kind, identity, known.record(identity))
        elif (kind, identity, "put") in self.store.recent:
            self._enter(kind, identity, "quarantine")

    def _turn_away(self, kind: str, name: str, reason: str) -> None:
        """Put a file into quarantine. It stays where it is until the change is durable: never in neither place."""
        self.unwanted[self.store.quarantine(kind, name, reason)] = ""

    def _entry(self, kind: str, identity: str) -> Entry | None:
        """Return what the record is now, after a look whether its file was changed by hand."""
        if (kind, identity) not in self.entries:
            name = name_of(check_id(identity))
            if self.store.differs(kind, name):
                by, self.by = self.by, BY_HAND
                self.adopt(kind, name, patient=False)  # the rule may write over it
                self.by = by
            self.entries.setdefault((kind, identity), self.store.entries[kind].get(identity))
        return self.entries[kind, identity]

    def _staged(self, kind: str, identity: str) -> Entry | None:
        if (kind, identity) in self.entries:
            return self.entries[kind, identity]
        return self.store.entries[kind].get(identity)

    def _enter(self, kind: str, identity: str, op: str, **told: Any) -> None:
        self.revision += 1
        self.lines.append(Line(self.revision, self.now, self.last_update, kind, identity, op, by=self.by, **told))


class File(NamedTuple):
    """A file to be: written ``aside``, then renamed to ``path``; what it ``replaces`` elsewhere goes first."""

    path: str
    aside: str
    replaces: str = ""


class Written(NamedTuple):
    """What became of a file that was written."""

    crc: int
    stamp: Stamp


def write_all(fd: int, text: bytes) -> None:
    while text:
        text = text[os.write(fd, text) :]


def write_pieces(fd: int, pieces: Iterable[bytes | Span]) -> int:
    """Write *pieces*, one behind the other, and return the CRC of all."""
    crc = 0
    for piece in pieces:
        for block in piece.blocks() if isinstance(piece, Span) else [piece]:
            write_all(fd, block)
            crc = zlib.crc32(block, crc)
    return crc


def sync_folder(path: str | Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)  # the name, not only the contents
    finally:
        os.close(fd)


def set_aside(files: dict[File, list[bytes | Span]]) -> dict[str, Written]:
    """Write and sync each of *files* beside its place; on failure leave nothing behind."""
    written: dict[str, Written] = {}
    waiting = [*files]
    try:
        while waiting:
            written |= write_and_sync({file: files[file] for file in waiting[:OPEN_FILES]})
            waiting = waiting[OPEN_FILES:]
    except BaseException:
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(file.aside)
        raise
    return written


def write_and_sync(files: dict[File, list[bytes | Span]]) -> dict[str, Written]:
    """Write and sync each of *files* aside, all at once; return what became of them by path."""
    fds: dict[str, int] = {}
    crcs: dict[str, int] = {}
    try:
        for file, pieces in files.items():
            fds[file.path] = open_aside(file)
            crcs[file.path] = write_pieces(fds[file.path], pieces)
        for fd in fds.values() if len(fds) > 1 else ():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)  # starts writing: the syncs then overlap
        for fd in fds.values():
            os.fsync(fd)  # contents before name
        return {path: Written(crcs[path], stamp_of(os.fstat(fd))) for path, fd in fds.items()}
    finally:
        for fd in fds.values():
            os.close(fd)


def open_aside(file: File) -> int:
    """Return what to write to for *file*; its folders are made if they are not there."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    try:
        return os.open(file.aside, flags, 0o600)
    except FileNotFoundError:
        make_folder(os.path.dirname(file.aside))
        return os.open(file.aside, flags, 0o600)


def make_folder(path: str) -> None:
    """Make the folder *path*, and those around it, for its owner alone: os.makedirs opens those around it to all."""
    if not os.path.isdir(path):
        make_folder(os.path.dirname(path))
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, mode=0o700)


def put_in_place(files: Iterable[File]) -> None:
    """Rename *files* and sync their folders. As long as one is aside, all of this can be done again."""
    files = list(files)
    clear_away({file.replaces: "" for file in files if file.replaces})
    sync_folders(file.replaces for file in files if file.replaces)
    for file in files:
        try:
            os.rename(file.aside, file.path)
        except FileNotFoundError:
            make_folder(os.path.dirname(file.path))
            os.rename(file.aside, file.path)
    sync_folders(file.path for file in files)


def sync_folders(paths: Iterable[str]) -> None:
    for folder in {os.path.dirname(path) for path in paths}:
        sync_folder(folder)


def clear_away(files: dict[str, str]) -> None:
    """Move each of *files* to its place, or remove it if that is ""; again, it does no harm."""
    for path, place in files.items():
        if place and os.path.exists(path):
            make_folder(os.path.dirname(place))
            shutil.move(path, place)  # which may be on another disk
        elif not place:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


@contextlib.contextmanager
def passed_over(what: str, *of: Any) -> Iterator[None]:
    """Go on where something odd (a folder of that name, say) cannot be cleared away: it keeps nobody from the rest."""
    try:
        yield
    except OSError as error:
        log.warning(f"{what} is left where it is: {error.strerror}", *of)


class Journal:
    """The file that numbers every change. To enter a line is the point of no return of a commit."""

    FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC

    def __init__(self, path: Path) -> None:
        self.path, self.aside = path, path.with_name(f".{path.name}.{os.getpid()}")
        self.name = os.fspath(path)  # a stat by Path takes twice as long, and this one is made all the time
        self.fd = os.open(path, self.FLAGS, 0o600)
        self.known = (0, 0)  # the inode, and the size up to which it has been read
        self.lines = 0  # up to there, beside those that were compacted

    def place(self) -> tuple[int, int]:
        """Return the inode and the size of the file that has the journal's name; zeros if there is none."""
        try:
            status = os.stat(self.name)
        except FileNotFoundError:
            return 0, 0
        return status.st_ino, status.st_size

    def moved(self) -> bool:
        """Return whether someone else has entered a line, or replaced the file; costs one stat."""
        return self.place() != self.known

    def grown(self) -> bool:
        """Return whether it is the file that was read before, with no less in it."""
        inode, size = self.place()
        return inode == self.known[0] and size >= self.known[1]

    def read(self) -> list[Line]:
        """Return the new lines. A torn last line was never acknowledged: it is cut off."""
        start, lines = self.known[1], []
        raw = os.pread(self.fd, os.fstat(self.fd).st_size - start, start)
        whole = raw.rfind(b"\n") + 1
        if whole < len(raw):
            os.ftruncate(self.fd, start + whole)
        for text in raw[:whole].splitlines():
            try:
                lines.append(line_of(text))
            except (ValueError, Malformed) as error:
                log.warning("a line of the journal cannot be read and is passed over: %s", error)
        self.lines += len(lines)
        self.mark()
        return lines

    def enter(self, lines: Sequence[Line]) -> None:
        """Append *lines* and sync; all of them, or none and OSError."""
        size = os.fstat(self.fd).st_size
        try:
            write_all(self.fd, b"".join(msgspec.json.encode(line) + b"\n" for line in lines))
            os.fdatasync(self.fd)
        except BaseException:
            os.ftruncate(self.fd, size)
            raise
        self.lines += len(lines)
        self.mark()

    def summarize(self, size: int) -> None:
        """Set aside what still matters of its first *size* bytes: the last line of each record and op, and starts."""
        last: dict[tuple[str, str, str], bytes] = {}  # in the order of revisions, as the journal is
        starts: list[bytes] = []
        with open(self.path, "rb") as file:
            while file.tell() < size and (text := file.readline()):
                with contextlib.suppress(ValueError):
                    line = msgspec.json.decode(text, type=Line)
                    if line.op == "open":
                        starts.append(text)
                        continue
                    for op in REPLACES.get(line.op, (line.op,)):
                        last.pop((line.kind, line.id, op), None)
                    last[line.kind, line.id, line.op] = text
        set_aside({File(self.name, str(self.aside)): [b"".join([*starts[-EPOCHS:], *last.values()])]})

    def replace(self, size: int) -> None:
        """Put what was set aside in the place of the first *size* bytes; what came since goes behind it."""
        fd = os.open(self.aside, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        try:
            write_all(fd, os.pread(self.fd, self.known[1] - size, size))
            os.fsync(fd)
            os.rename(self.aside, self.path)
        except BaseException:
            os.close(fd)
            raise
        os.close(self.fd)
        self.fd, self.lines = fd, 0
        self.mark()
        sync_folder(self.path.parent)

    def mark(self) -> None:
        status = os.fstat(self.fd)
        self.known = status.st_ino, status.st_size

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1


def read_journal(raw: bytes) -> tuple[list[Line], list[str]]:
    """Return the lines of a journal, and what is wrong with it."""
    lines: list[Line] = []
    flaws, head = [], 0
    for number, text in enumerate(raw.split(b"\n")[:-1], 1):
        try:
            line = line_of(text)
            flaw = flaw_of_line(line, head)
            flaws += [f"line {number} {flaw}"] if flaw else []
            head = max(head, 0 if line.op == "open" else line.revision)
            lines.append(line)
        except (ValueError, Malformed) as error:
            flaws.append(f"line {number} cannot be read: {error}")
    return lines, flaws if raw.endswith(b"\n") or not raw else [*flaws, "its last line is torn"]


def flaw_of_line(line: Line, head: int) -> str:
    """Return what is wrong with a *line* of the journal that comes after revision *head*; "" if nothing is."""
    if not 0 <= line.revision <= LAST_REVISION:
        return f"has the revision {line.revision}, which none can be"
    going = line.op == "open" or line.revision > head
    return "" if going else f"has the revision {line.revision}, after {head}"


def standing_of(lines: Iterable[Line]) -> dict[tuple[str, str, str], Line]:
    """Return the lines that still stand, by (kind, id, op); see REPLACES."""
    standing: dict[tuple[str, str, str], Line] = {}
    for line in lines:
        for op in REPLACES.get(line.op, (line.op,)):
            standing.pop((line.kind, line.id, op), None)
        standing[line.kind, line.id, line.op] = line
    return standing


def room_on(path: Path) -> tuple[float, float]:
    """Return how many bytes, and how many files, still fit on the disk of *path*; infinity where it has no limit."""
    disk = os.statvfs(path)
    return disk.f_bavail * disk.f_frsize, disk.f_favail if disk.f_files else math.inf


class Lock:
    """The lock that processes share. Threads take turns before they come here.

    Its file is never removed; where someone does, by hand, others lock the one that has come since, and so do we.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.fd = path, self._open(path)

    @staticmethod
    def _open(path: Path) -> int:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def is_current(self) -> bool:
        """Return whether what is held open is what the lock's name stands for."""
        try:
            return os.path.samestat(os.fstat(self.fd), os.stat(self.path))
        except FileNotFoundError:
            return False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold it; raise Busy if another process does for too long."""
        until = time.monotonic() + LOCK_S
        while not (filelock.lock_descriptor(self.fd, blocking=False) and self.is_current()):
            if not self.is_current():
                os.close(self.fd)
                self.fd = self._open(self.path)
            elif time.monotonic() > until:
                raise Busy(f"another process has held {self.path} for {LOCK_S:.0f} s; try again")
            else:
                time.sleep(LOCK_POLL_S)
        try:
            yield
        finally:
            filelock.unlock_descriptor(self.fd)

    def close(self) -> None:
        os.close(self.fd)
        self.fd = -1


def nothing(pen: Pen) -> None:
    """The rule that changes nothing; to run it is to take in what others did."""


def give_reason(place: Path, reason: str) -> None:
    """Say beside *place*, in quarantine, why what is there is."""
    fd = os.open(f"{place}.reason", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        write_all(fd, f"{reason}\n".encode(errors="replace"))
    finally:
        os.close(fd)


BY: contextvars.ContextVar[str] = contextvars.ContextVar("BY", default="")  # who wants what this thread changes
BY_HAND = "hand"


class Asked(NamedTuple):
    """A change that someone waits for until its ``bell`` is released: it is answered, or it is its turn to commit."""

    rule: Callable[[Pen], Any]
    answer: Future[Any]
    bell: threading.Lock
    by: str = ""


class Store:
    """The state directory. Opening it repairs what a crash left.

    Any number of threads and processes may have it open. ``kinds`` are those that this one reads.
    """

    def __init__(
        self,
        directory: Path,
        kinds: Iterable[str] = KINDS,
        clock: Callable[[], int] | None = None,
        by: str = "service",
    ) -> None:
        self.directory, self.kinds, self.by = Path(directory).absolute(), tuple(kinds), by
        self.clock = clock or (lambda: time.time_ns() // 1_000_000)
        self.entries: dict[str, dict[str, Entry]] = {kind: {} for kind in self.kinds}
        self.recent: dict[tuple[str, str, str], int] = {}  # (kind, id, op): revision, oldest first
        self.latest: dict[str, int] = {}  # the last revision of each kind
        self.head = Head("", 0)  # is replaced, so that to read it takes no lock
        self.epochs: list[tuple[str, int]] = []  # each start of a store, and the revision it began at
        self.revision, self.last_update = 0, 0.0
        self.shown = threading.RLock()  # guards what readers see
        self.waiting: dict[tuple[str, ...], set[threading.Event]] = {}  # (kind,) or (kind, id): who is to be told of it
        self.closing = threading.Event()
        self._queue: list[Asked] = []
        self._queued = threading.Condition()  # guards the queue; told when a commit has ended
        self._committing, self._together = False, 0
        self._next: Asked | None = None  # whose turn it is
        self._suspects: dict[tuple[str, str], int] = {}  # (kind, name): when to look at it again, in ms
        self._sound = False  # else the directory is to be read anew
        self.trouble = ""  # why the last write failed, until one succeeds
        self._make_folders()
        self._lock = Lock(self.directory / ".lock")
        self._journal = Journal(self.directory / "journal.jsonl")
        try:
            self.change(nothing)
        except Refusal as refusal:
            if not self._sound:
                raise
            log.warning("what was done by hand must wait: %s", refusal)

    def path(self, kind: str, identity: str) -> str:
        """Return the file of a record: the one gate through which ids become names."""
        return f"{self.directory}/{kind}/{name_of(check_id(identity))}.json"

    def grave(self, kind: str, identity: str, op: str = "delete") -> str:
        return self.path(f"{GRAVES[op]}/{kind}", identity)

    def history(self, kind: str, identity: str) -> str:
        """Return the folder of what a merge replaced of a record, which is there once something was."""
        return f"{self.directory}/history/{kind}/{name_of(check_id(identity))}"

    def stream(self, identity: str, stream: str) -> Path:
        """Return the file of what a command prints or reads, which is there once something was."""
        return self.directory / "output" / f"{name_of(check_id(identity))}.{STREAMS[stream]}"

    def file(self, kind: str, identity: str, op: str, revision: int) -> File:
        """Return the file that *op* writes: the record, or the tombstone in its place; or that of all tokens."""
        if kind == "tokens":
            return File(f"{self.directory}/tokens.json", f"{self.directory}/.tokens.json.{revision}")
        record = self.path(kind, identity)
        path = self.grave(kind, identity, op) if op in GRAVES else record
        folder, name = os.path.split(path)
        return File(path, f"{folder}/.{name}.{revision}", record if op in GRAVES else "")

    def leftovers(self, identity: str, op: str) -> dict[str, str]:
        """Return the files of what a command has printed and read, and where each goes with *op*; "" is nowhere."""
        files = [self.stream(identity, name) for name in STREAMS]
        return {str(file): f"{self.directory}/archive/output/{file.name}" if op == "archive" else "" for file in files}

    @property
    def closed(self) -> bool:
        return self.closing.is_set()

    # Reading

    @property
    def cursor(self) -> str:
        return self.head.cursor

    def delta(self, cursor: str | None) -> Delta:
        """Return what changed after *cursor*; everything, if it is None or not known here."""
        self.refresh()
        return self.known_after(cursor)

    def known_after(self, cursor: str | None, kinds: Iterable[str] = KINDS) -> Delta:
        """Return what is known to have changed after *cursor*, as of the last look, or at least what of *kinds* has."""
        changed: dict[str, dict[str, Entry]] = {kind: {} for kind in self.kinds}
        deleted: dict[str, list[str]] = {kind: [] for kind in self.kinds}
        head = self.head
        if cursor == head.cursor:
            return Delta(False, head.revision, cursor, changed, deleted, head.revision)
        with self.shown:
            since = self._since(cursor)
            if since is None:
                everything = {kind: dict(self.entries[kind]) for kind in self.kinds}
                return Delta(cursor is not None, self.revision, self.cursor, everything, deleted, 0)
            stirred = any(self.latest.get(kind, 0) > since for kind in kinds)
            for (kind, identity, op), revision in reversed(self.recent.items()) if stirred else ():
                if revision <= since:
                    break
                if op == "put" and kind in changed and (entry := self.entries[kind].get(identity)):
                    changed[kind][identity] = entry
                elif op not in ("put", "touch") and kind in deleted:
                    deleted[kind].append(identity)
            return Delta(False, self.revision, self.cursor, changed, deleted, since)

    def get(self, kind: str, identity: str) -> Entry | None:
        self.refresh()
        with self.shown:
            return self.entries[kind].get(identity)

    def all(self, kind: str) -> dict[str, Entry]:
        """Return the entries of *kind* by id."""
        self.refresh()
        with self.shown:
            return dict(self.entries[kind])

    def extent(self, identity: str, stream: str) -> int:
        """Return how many bytes there are of a stream of a command."""
        try:
            return os.stat(self.stream(identity, stream)).st_size
        except FileNotFoundError:
            return 0

    def read_stream(self, identity: str, stream: str, offset: int, limit: int) -> bytes:
        """Return up to *limit* bytes of a stream of a command, from *offset* on."""
        try:
            with open(self.stream(identity, stream), "rb", buffering=0) as file:
                return os.pread(file.fileno(), limit, offset)
        except FileNotFoundError:
            return b""

    def versions(self, identity: str) -> Iterator[tuple[str, Record]]:
        """Yield the versions of a document that a merge replaced, each with its name, the newest first."""
        try:
            names = sorted(os.listdir(self.history("documents", identity)), reverse=True)
        except FileNotFoundError:
            return
        for name in names:
            with contextlib.suppress(Malformed, NotFound):  # put there by hand, spoiled, or just outdated
                version = check_version(name.removesuffix(".json"), "")
                yield version, self.version(identity, version)

    def version(self, identity: str, name: str) -> Record:
        """Return the version *name* of a document that a merge replaced; raise NotFound."""
        path = f"{self.history('documents', identity)}/{check_version(name, 'version')}.json"
        try:
            return without(check(DOCUMENT, parse(read_file(path)[0]), ""), *OWN_FIELDS)
        except (FileNotFoundError, Unreadable, Malformed):
            raise NotFound("Version not found") from None

    def agents(self) -> dict[str, Agent]:
        """Return who has announced itself, by name."""
        known = {name: self.agent(name) for name in sorted(self.agents_seen())}
        return {name: agent for name, agent in known.items() if agent}

    def agent(self, name: str) -> Agent | None:
        """Return what an agent said of itself, None if it has not, or its file was spoiled by hand."""
        try:
            raw, stamp = read_file(self.path("agents", name))
            return Agent(check(AGENT, parse(raw), ""), stamp[1] / 1e6)
        except (FileNotFoundError, Unreadable, Malformed):
            return None

    def agents_seen(self) -> dict[str, float]:
        """Return when (ms) each who has announced itself was last seen."""
        folder = self.directory / "agents"
        there = os.listdir(folder) if folder.exists() else []
        files = (file.removesuffix(".json") for file in there if file.endswith(".json"))
        seen = {name: self.agent_seen(name) for name in map(urllib.parse.unquote, filter(is_name, files))}
        return {name: moment for name, moment in seen.items() if moment}

    def agent_seen(self, name: str) -> float:
        """Return when (ms) an agent was last seen, 0 if it has not announced itself."""
        try:
            return os.stat(self.path("agents", name)).st_mtime_ns / 1e6
        except (OSError, Malformed):
            return 0

    def saw(self, name: str) -> bool:
        """Note that the agent *name* is there; return whether it has announced itself."""
        moment = self.clock() * 1_000_000
        try:
            os.utime(self.path("agents", name), ns=(moment, moment))
        except (OSError, Malformed):  # it has not; or nothing can be written now
            return False
        return True

    def forget(self, name: str) -> bool:
        """Remove what the agent *name* said of itself; return whether there was anything."""
        try:
            os.unlink(self.path("agents", name))
        except OSError:  # a folder of that name, say
            return False
        return True

    def recall(self, name: str) -> bytes:
        """Return what was remembered by this *name*, or nothing."""
        try:
            return read_file(f"{self.directory}/{name}.json")[0]
        except (FileNotFoundError, Unreadable):
            return b""

    def remember(self, name: str, text: bytes) -> None:
        """Keep a *text* beside the records; it is no record, and to lose it must do no harm."""
        if self.recall(name) != text + b"\n":
            file = File(f"{self.directory}/{name}.json", f"{self.directory}/.{name}.json.{os.getpid()}")
            set_aside({file: [text, b"\n"]})
            put_in_place([file])

    def wait(self, revision: int, topics: Iterable[tuple[str, ...]], seconds: float) -> None:
        """Return when something above *revision* is about one of *topics*, the time is over, or the store is closed.

        A topic is (kind,) or (kind, id). It may return early, and wakes nobody whom a change does not concern.
        """
        bell, topics = threading.Event(), set(topics)
        with self.shown:
            if self.revision > revision or self.closed:
                return
            for topic in topics:
                self.waiting.setdefault(topic, set()).add(bell)
        bell.wait(seconds)
        with self.shown:
            for topic in topics:
                self.waiting[topic].discard(bell)
                if not self.waiting[topic]:
                    del self.waiting[topic]

    def refresh(self) -> None:
        """Take in what other processes have journaled. Costs one stat when there is nothing new."""
        if self._journal.moved():
            with contextlib.suppress(Refusal):  # a full disk or a lock that is held: then a reader sees what is known
                self.change(nothing)

    def _since(self, cursor: str | None) -> int | None:
        """Return the revision of a *cursor* that was given out on this directory's own past, else None."""
        epoch, _, number = (cursor or "").partition(".")
        if not re.fullmatch(r"[0-9]{1,15}", number):
            return None
        for (name, start), (_, stop) in itertools.pairwise([*self.epochs, ("", self.revision)]):
            if name == epoch and start <= int(number) <= stop:
                return int(number)
        return None

    # Writing

    def change(self, rule: Callable[[Pen], T]) -> T:
        """Run *rule* with a pen, under the lock, and return its answer when what it wrote is durable.

        Whoever comes while another commits is committed with the others that wait. Raises what the
        rule raises, Busy if another process holds the lock for too long, Full if the disk is.
        """
        asked = Asked(rule, Future(), threading.Lock(), BY.get() or self.by)
        asked.bell.acquire()
        with self._queued:
            self._queue.append(asked)
            first, self._committing = not self._committing, True
        try:
            if not first:
                asked.bell.acquire()
        except BaseException:  # a signal's handler may raise; then another is to commit
            self._withdraw(asked)
            raise
        if not asked.answer.done():
            self._commit_queue()
        return asked.answer.result()  # type: ignore[no-any-return]

    def append(self, identity: str, stream: str, offset: int, piece: bytes) -> int:
        """Put *piece* at *offset* of a stream of a command, as far as it fits, durably; return how much there is.

        The same once more changes nothing. Raises Conflict if something before *offset* is missing.
        """
        path = self.stream(identity, stream)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                size, free = os.fstat(fd).st_size, os.fstatvfs(fd)
                limit = OUTPUT_BYTES if free.f_bavail * free.f_frsize > RESERVE_BYTES else size
                if offset > size and size < limit:
                    missing = f"offset: there are {size} bytes of {stream}; what comes after is missing"
                    raise Conflict(missing, size=size)
                os.lseek(fd, offset, os.SEEK_SET)
                write_all(fd, piece[: max(0, limit - offset)])
                os.fdatasync(fd)
                if size == 0:
                    sync_folder(path.parent)
                return os.fstat(fd).st_size
            finally:
                os.close(fd)
        except OSError as error:
            raise self.refusal(error) from None

    def refusal(self, error: OSError) -> Refusal:
        """Return what to say of a write that failed, and remember it until one succeeds."""
        refusal = refusal_of(error)
        self.trouble = str(refusal)
        return refusal

    def probe(self) -> None:
        """Look whether what failed to be written could be by now."""
        file = File(f"{self.directory}/.probe", f"{self.directory}/.probe")
        with contextlib.suppress(OSError):
            set_aside({file: [bytes(BLOCK_BYTES)]})
            os.unlink(file.path)
            self.trouble = ""

    def room(self) -> tuple[float, float]:
        """Return how many bytes, and how many files, still fit on the disk."""
        return room_on(self.directory)

    def _commit_queue(self) -> None:
        """Commit whatever waits, as the one thread that does."""
        waiting: list[Asked] = []
        try:
            if self._together > 1:
                time.sleep(GATHER_S)  # those just served are about to ask again
            with self._lock.held():
                waiting = self._take_queue()
                self._commit(waiting)
        except BaseException as error:  # whatever it was, nobody is to be told that all is well
            waiting = waiting or self._take_queue()
            if not isinstance(error, Exception):
                error = Busy("what was being written was interrupted; try again")
            error = self.refusal(error) if isinstance(error, OSError) else error
            for asked in waiting:
                if not asked.answer.done():
                    asked.answer.set_exception(error)
        finally:
            with self._queued:
                self._together = len(waiting)
                self._hand_on()
            for asked in waiting:
                asked.bell.release()

    def _take_queue(self) -> list[Asked]:
        with self._queued:
            waiting, self._queue = self._queue, []
            return waiting

    def _withdraw(self, asked: Asked) -> None:
        """Take back what is waited for no more; if it was its turn to commit, it is the next one's."""
        with self._queued:
            waits = any(other is asked for other in self._queue)
            self._queue = [other for other in self._queue if other is not asked]
            if waits and self._next is asked:
                self._hand_on()

    def _hand_on(self) -> None:
        """Have the first who waits commit next."""
        self._committing = bool(self._queue)
        if self._queue:
            self._next = self._queue[0]
            self._next.bell.release()
        self._queued.notify_all()

    def _commit(self, waiting: list[Asked]) -> None:
        """Run each rule, make what they wrote durable together, and give the answers."""
        self._catch_up()
        pen, looked = self._adopt_suspects(Pen(self, self.clock()))
        answers = []
        for asked in waiting:
            trial = pen.fork()
            trial.by = asked.by
            try:
                answers.append((asked.answer, asked.rule(trial)))
                pen = trial
            except Exception as error:  # a rule is its caller's code: the error is raised there, the others go on
                asked.answer.set_exception(error)
                if not self._sound:
                    raise
        if pen.lines or pen.history or pen.unwanted:
            self._write(pen)
            self.trouble = ""
        for key, when in looked.items():
            if self._suspects.get(key) == when:
                del self._suspects[key]
        for answer, value in answers:
            answer.set_result(value)

    def _write(self, pen: Pen) -> None:
        """Make everything that *pen* holds durable, then visible."""
        set_aside(pen.history)
        put_in_place(pen.history)
        written = set_aside(dict(pen.files.values()))
        files = [file for file, _ in pen.files.values()]
        crcs = {
            entry.revision: written[entry.path].crc for entry in pen.entries.values() if entry and entry.path in written
        }
        try:
            self._journal.enter([msgspec.structs.replace(line, crc=crcs.get(line.revision, 0)) for line in pen.lines])
        except BaseException:
            for file in files:
                os.unlink(file.aside)
            raise
        self._sound = False  # should a rename fail: the journal has it, so whoever comes next completes it
        try:
            put_in_place(files)
            clear_away({path: place for path, place in pen.unwanted.items() if path not in pen.files})
        except OSError as error:
            raise Broken(f"{error.strerror}; the change will be completed later: look before you repeat it") from None
        self._sound = True
        self._show(pen, written)
        self._trim(pen.history)

    def _show(self, pen: Pen, written: dict[str, Written]) -> None:
        """Let readers see what *pen* wrote."""
        with self.shown:
            for (kind, identity), entry in pen.entries.items():
                if entry is None:
                    self.entries[kind].pop(identity, None)
                else:
                    crc, stamp = written.get(entry.path, (entry.crc, entry.stamp))
                    self.entries[kind][identity] = entry._replace(crc=crc, stamp=stamp)
            for line in pen.lines:
                self._note(line)
            self._mark_head()
            self._ring(pen.lines)

    def _mark_head(self) -> None:
        self.head = Head(f"{self.epochs[-1][0]}.{self.revision}", self.revision)

    def _ring(self, lines: Iterable[Line] | None) -> None:
        """Tell those who wait for what *lines* are about; everyone, if that is None."""
        topics = self.waiting.keys() if lines is None else {topic for line in lines for topic in line.topics()}
        for topic in topics & self.waiting.keys():
            for bell in self.waiting[topic]:
                bell.set()

    def _trim(self, history: Iterable[File]) -> None:
        """Keep the latest versions of each document that *history* was added to."""
        folders = {os.path.dirname(file.path) for file in history}
        for folder in {each for each in folders if each.startswith(f"{self.directory}/history/documents/")}:
            for name in sorted(os.listdir(folder))[:-HISTORY_FILES]:
                with contextlib.suppress(OSError):  # one too many does no harm
                    os.unlink(f"{folder}/{name}")

    def _note(self, line: Line) -> None:
        """Remember what a *line* of the journal says."""
        self.revision, self.last_update = max(self.revision, line.revision), max(self.last_update, line.lastUpdate)
        if line.op == "open":
            self.epochs = [*self.epochs, (line.id, line.revision)][-EPOCHS:]
            return
        for op in REPLACES.get(line.op, (line.op,)):
            self.recent.pop((line.kind, line.id, op), None)
        self.recent[line.kind, line.id, line.op] = self.latest[line.kind] = line.revision

    # Keeping it small

    def compact(self, audited: tuple[int, int] | None = None) -> bool:
        """Replace the journal, if it is long, by what still matters of it; return whether that was done.

        Others go on meanwhile: what is there is read without the lock, which is taken to add what came since. What has
        not been *audited* (the journal's inode, and how much of it has) stays as it is.
        """
        if self._journal.lines <= 2 * len(self.recent) + SLACK_LINES:
            return False
        inode, size = audited or self._journal.known
        if inode != self._journal.known[0]:
            return False
        self._journal.summarize(size)

        def replace(pen: Pen) -> bool:
            if self._journal.known[0] != inode or not self._journal.aside.exists():  # someone else has
                self._journal.aside.unlink(missing_ok=True)
                return False
            self._sound = False
            self._journal.replace(size)
            self._sound = True
            return True

        return self.change(replace)

    # Noticing

    def follow(self) -> None:
        """Take in what is done to the directory by others, as it happens, until the store is closed."""
        watch, in_vain = None, 0
        while not self.closed:
            try:
                if watch is None or watch.stale:
                    if watch:
                        watch.close()
                    self._make_folders()
                    watch = Watch(self.directory, self.kinds)
                    self.notice(None)
                seen = watch.wait(LOOK_S / 3)
                in_vain = 0 if self.notice(seen) or not seen else in_vain + 1
                time.sleep(min(in_vain * IN_VAIN_S, LONGEST_IN_VAIN_S))
            except (OSError, Refusal) as error:
                log.warning("what others did must wait: %s", error)
                time.sleep(SETTLE_S)

    def notice(self, names: set[tuple[str, str]] | None) -> bool:
        """Take in what was done to the files *names*, (kind, file name), or to any file if that is None.

        Return whether anything was, by others than this store.
        """
        if names is None:
            names = {(kind, file) for kind in self.kinds for file in self._all_files(kind)}
        now = self.clock()
        for kind, file in names:
            record = kind in self.kinds and file.endswith(".json") and not file.startswith(".")
            if record and self.differs(kind, file[:-5]):
                self._suspects[kind, file[:-5]] = now
        stirred = self._journal.moved() or any(when <= now for when in [*self._suspects.values()])
        if stirred:
            self.change(nothing)
        return stirred

    def differs(self, kind: str, name: str) -> bool:
        """Return whether the file *name* (without .json) is not the one that was last read or written."""
        identity = urllib.parse.unquote(name)
        entry = self.entries[kind].get(identity) if is_name(name) else None
        try:
            return (entry and entry.stamp) != stamp_of(os.stat(f"{self.directory}/{kind}/{name}.json"))
        except FileNotFoundError:
            return is_name(name) and (kind, identity, "put") in self.recent
        except OSError:  # a link to itself, say
            return True

    def _all_files(self, kind: str) -> set[str]:
        """Return the names of the files of *kind*: those that are there, and those that should be."""
        known = {f"{name_of(identity)}.json" for identity in [*self.entries[kind]]}
        folder = self.directory / kind
        return known | set(os.listdir(folder) if folder.exists() else ())

    def _adopt_suspects(self, pen: Pen) -> tuple[Pen, dict[tuple[str, str], int]]:
        """Return the pen after it took in the files that are due for a look, and which those are, and since when."""
        due = {key: when for key, when in [*self._suspects.items()] if when <= pen.now}
        for kind, name in due:
            trial = pen.fork()
            try:
                trial.by = BY_HAND
                if self.differs(kind, name):
                    trial.adopt(kind, name)
                pen = trial
            except (OSError, Refusal) as error:  # one odd file must not keep the others
                log.warning("%a is passed over for now: %a", f"{kind}/{name}.json", str(error))
                self._suspects[kind, name] = pen.now + round(SETTLE_S * 1000)
        return pen, due

    def postpone(self, kind: str, name: str, now: int) -> bool:
        """Return whether a file is so new that it may be half written, and then look at it again later."""
        young = now - os.lstat(self.directory / kind / f"{name}.json").st_mtime * 1000 < SETTLE_S * 1000
        if young:
            self._suspects[kind, name] = now + round(SETTLE_S * 1000)
        return young

    def quarantine(self, kind: str, name: str, reason: str) -> str:
        """Put a file that is no record into quarantine too, with the *reason* beside it; return where it was."""
        path = self.directory / kind / f"{name}.json"
        place = self.directory / "quarantine" / f"{kind}.{name[: NAME_BYTES // 2]}.{os.lstat(path).st_mtime_ns}"
        place.parent.mkdir(mode=0o700, exist_ok=True)
        give_reason(place, reason)
        if stat.S_ISREG(os.lstat(path).st_mode):
            with contextlib.suppress(FileExistsError):  # there already: what came of it was not made durable
                os.link(path, place)
        else:
            os.rename(path, place)
        log.warning("%a is not a record; it is now %a: %a", f"{kind}/{name}.json", f"quarantine/{place.name}", reason)
        return str(path)

    def _catch_up(self) -> None:
        """Take in what the journal has and this store has not, completing what a writer did not live to complete."""
        if self._sound and not self._journal.moved():
            return
        anew, self._sound = not (self._sound and self._journal.grown()), False
        if anew:
            complete_restores(self.directory)
            self._journal.close()
            self._journal = Journal(self._journal.path)
        with self.shown:
            known = self.entries
            if anew:
                self.recent, self.latest, self.epochs, self.revision, self.last_update = {}, {}, [], 0, 0.0
                self.entries = {kind: {} for kind in KINDS}
            lines = self._journal.read()
            for line in lines:
                self._note(line)
            last = {(line.kind, line.id, line.op): line for line in lines}
            standing = {key: line for key, line in last.items() if self.recent.get(key) == line.revision}
            waiting = {int(path.suffix[1:]) for path in self._aside()} if anew else None
            self._finish(line for line in standing.values() if waiting is None or line.revision in waiting)
            self._take_in(standing, known)
            if anew:
                self._begin(lines)
            self._mark_head()
            self._ring(None if anew else lines)
        self._sound = True

    def _finish(self, lines: Iterable[Line]) -> None:
        """Put in place what the writers of *lines* set aside and did not live to rename."""
        for line in sorted(lines, key=lambda line: line.revision):
            if (line.kind in self.kinds and line.op in ("put", *GRAVES)) or line.kind == "tokens":
                file = self.file(line.kind, line.id, line.op, line.revision)
                if os.path.exists(file.aside):
                    log.warning("completing %s: its writer was stopped", os.path.basename(file.path))
                    put_in_place([file])

    def _take_in(self, standing: dict[tuple[str, str, str], Line], known: dict[str, dict[str, Entry]]) -> None:
        """Bring the entries to what the lines *standing* in the journal say; suspect the files that differ.

        What was *known* before and is as a line says is not read again.
        """
        for kind, identity, op in standing:
            if kind in self.kinds and op != "put" and (kind, identity, "put") not in self.recent:
                self.entries[kind].pop(identity, None)
        for (kind, identity, op), line in standing.items():
            if kind in self.kinds and op == "put":
                entry = known[kind].get(identity)
                self.entries[kind].pop(identity, None)
                if not entry or (entry.revision, entry.crc) != (line.revision, line.crc):
                    entry = read_own(line, self.path(kind, identity))
                if entry:
                    self.entries[kind][identity] = entry
                else:
                    self._suspects[kind, name_of(identity)] = 0

    # Opening

    def _make_folders(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.chmod(self.directory, 0o700)
        for name in FOLDERS:
            (self.directory / name).mkdir(mode=0o700, exist_ok=True)

    def _begin(self, lines: list[Line]) -> None:
        """Settle what the journal does not say, and begin an epoch for cursors."""
        self._clear_aside()
        kinds = self.kinds if lines else KINDS  # only from all records can a journal be made again
        strangers = [*self._strangers(kinds), *([] if lines else self._graves())]
        numbered = {line.revision: line for line in reversed(strangers)}  # of two with one, not the grave
        strangers = sorted(numbered.values(), key=lambda line: line.revision)
        for line in strangers:
            self._note(line)
        self.entries = {kind: self.entries[kind] for kind in self.kinds}
        self._suspects = {key: when for key, when in self._suspects.items() if key[0] in self.kinds}
        if not self.kinds and self.epochs:  # it gives out no cursors
            return
        try:
            self._journal.enter([*strangers, self._epoch(secrets.token_hex(6), self.revision)])
            sync_folder(self.directory)
        except OSError as error:  # a full disk can still be read, and strangers are met again
            log.warning("the journal cannot be written: %s", error.strerror)

    def _epoch(self, name: str, revision: int) -> Line:
        """Return the line from which on cursors are of the epoch *name*, and numbers come after *revision*."""
        line = Line(revision, self.clock(), self.last_update, "journal", name, "open", by=self.by)
        self._note(line)
        return line

    def begin_epoch(self, name: str, revision: int) -> None:
        """Have cursors be of the epoch *name* from now on, and the next number come after *revision*."""
        self.change(lambda pen: self._journal.enter([self._epoch(name, revision)]))
        with self.shown:
            self._mark_head()

    def settle(self) -> None:
        """Take in all that was done by hand, also what is so new that it may be half done."""
        self.notice(None)
        if self._suspects:
            time.sleep(SETTLE_S * 1.1)
            self.notice(None)

    def _aside(self) -> list[Path]:
        """Return the files that were set aside and are neither renamed nor removed: a writer was stopped."""
        folders = (self.directory / part / kind for part in ("", *GRAVES.values()) for kind in self.kinds)
        paths = itertools.chain(
            self.directory.glob(".tokens.json.*"), *(folder.glob(".*.json.*") for folder in folders)
        )
        return [path for path in paths if path.suffix[1:].isdecimal()]

    def _clear_aside(self) -> None:
        """Remove what was set aside and never entered in the journal: it was not acknowledged."""
        history = (self.directory / "history").glob(".*.json") if self.kinds == KINDS else ()
        others = (path for path in self.directory.glob(".*.json*.*") if not os.path.exists(f"/proc/{path.suffix[1:]}"))
        agents = (self.directory / "agents").glob(".*.json")
        for path in itertools.chain(self._aside(), history, agents, others):
            with passed_over("%s", path):
                path.unlink(missing_ok=True)
        remove_deserted(self.directory.glob(f"{SNAPSHOT}*"))
        for file in os.listdir(self.directory / "output") if "commands" in self.kinds else ():
            identity = urllib.parse.unquote(file.rpartition(".")[0])  # its writer did not live to clear this away
            if ("commands", identity, "put") not in self.recent:
                for op in GRAVES:
                    if ("commands", identity, op) in self.recent:
                        with passed_over("output of %s", identity):
                            clear_away(self.leftovers(identity, op))

    def _strangers(self, kinds: Iterable[str]) -> Iterator[Line]:
        """Read the records of *kinds* that the journal does not know, and yield a line for those newer than it.

        For them the journal was lost, or its end was. The others were put there by hand.
        """
        head, seen = self.revision, set()
        for kind in kinds:
            for file in os.listdir(self.directory / kind):
                name, identity = file.removesuffix(".json"), urllib.parse.unquote(file.removesuffix(".json"))
                if file == name or file.startswith("."):
                    continue
                if (kind, identity, "put") in self.recent and name_of(identity) == name:
                    continue
                self._suspects[kind, name] = 0
                with contextlib.suppress(FileNotFoundError, Unreadable, Malformed):
                    entry, record = read_record(kind, name, f"{self.directory}/{kind}/{file}")
                    if entry.revision > head and entry.revision not in seen and from_hand(kind, record, 0, 0) == record:
                        seen.add(entry.revision)
                        moment = float(min(record.get("updatedAt") or record.get("timestamp") or 0, self.clock()))
                        self.entries[kind][identity] = entry
                        del self._suspects[kind, name]
                        yield Line(entry.revision, moment, moment, kind, identity, "put", entry.crc)

    def _graves(self) -> Iterator[Line]:
        """Yield a line for each tombstone; for a journal that was lost."""
        for (op, folder), kind in itertools.product(GRAVES.items(), KINDS):
            for file in (self.directory / folder / kind).glob("[!.]*.json"):
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    revision = msgspec.json.decode(file.read_bytes())["revision"]
                    if isinstance(revision, int) and 0 < revision <= LAST_REVISION:
                        yield Line(revision, 0, 0, kind, urllib.parse.unquote(file.stem), op)

    def release(self) -> None:
        """Let go of everyone who waits for a change."""
        with self.shown:
            self.closing.set()
            self._ring(None)

    def close(self) -> None:
        self.release()
        with self._queued:
            self._queued.wait_for(lambda: not self._committing)
            if self._lock.fd >= 0:
                self._journal.close()
                self._lock.close()


class AuditLine(msgspec.Struct, frozen=True, omit_defaults=True, rename={"place": "from"}):
    """A line of the audit log: who wanted what, from where; of a command what it is, and how it stands after it.

    ``previous`` is the sha256 of the line before, which so cannot be changed, or taken out, unnoticed.
    """

    seq: int
    previous: str
    at: float
    revision: int
    by: str
    place: str
    kind: str
    id: str
    op: str
    type: str = ""
    status: str = ""
    outcome: str = ""
    sha256: str = ""  # see hash_of; of what was pruned, that of its last line
    until: int = 0  # of what was pruned, its last seq


class Position(msgspec.Struct):
    """How far an audit log has come: its last line, by number and sha256, and the last revision that is in it."""

    seq: int = 0
    sha256: str = ""
    revision: int = 0


class Audit:
    """The log of every change, audit.jsonl in *folder*, in which each line vouches for the one before.

    It follows the journal, which has all that it says: what a crash kept from it is entered at the next start. How far
    it came is remembered in the state directory too, so that a log whose end was cut off is found out.
    """

    def __init__(self, store: Store, folder: Path) -> None:
        self.store, self.path = store, folder / "audit.jsonl"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.journal = open(store.directory / "journal.jsonl", "rb")  # noqa: SIM115  for as long as the service runs
        told = audited_in(store.directory)
        self.known = self.position(told)
        self.read_up_to = self.known.revision
        self.pending: list[Line] = []  # that have been read, and are to be entered
        self.place = (0, 0)  # the inode of the journal, and how much of it has been entered
        self.begins = not told  # then what it enters first is no news

    def position(self, told: Position | None) -> Position:
        """Return where to go on; a line that was not written to its end is taken out first.

        *told* is how far it had come, from the state directory.
        """
        with contextlib.suppress(FileNotFoundError), open(self.path, "r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
        paths, last = (*audit_files(self.path.parent)[-1:], self.path), Position()
        lines = ((raw, line) for path in paths for raw, line in lines_of_audit(path) if line)
        for raw, line in collections.deque(lines, 1):
            last = position_of(raw, line)  # only of the last: to hash all of them would take a second at each start
        if told and told.seq > last.seq:
            log.error("the audit log has lost the lines %d to %d", last.seq + 1, told.seq)
            return told
        return last if told else Position(last.seq, last.sha256)  # of another state: none of it is in this one's

    def look(self) -> list[Line]:
        """Return what is new in the journal; it is to be entered."""
        if len(self.pending) >= AUDIT_LINES:  # the log cannot be written: the journal keeps the rest
            return []
        self.pending += (new := [*self.read()])
        return new

    def follow(self) -> None:
        """Enter what is new, durably; raise OSError, and then it is for the next time."""
        self.look()
        while self.pending:
            some = self.pending[:AUDIT_LINES]
            self.enter(some)
            del self.pending[: len(some)]
        self.place = os.fstat(self.journal.fileno()).st_ino, self.journal.tell()

    def read(self) -> Iterator[Line]:
        """Yield the changes in the journal that have not been read; of the one before, if it was replaced, first."""
        while True:
            lines: list[Line] = []
            for raw in self.journal:
                if not raw.endswith(b"\n"):
                    self.journal.seek(-len(raw), os.SEEK_CUR)
                    break
                with contextlib.suppress(ValueError):
                    lines.append(msgspec.json.decode(raw, type=Line))
            restores = [place for place, line in enumerate(lines) if line.op == "restore"]
            for line in lines[restores[-1] if restores else 0 :]:  # what stands before came with the backup
                if line.op in AUDITED and line.revision > self.read_up_to:  # it may be in the next journal too
                    self.read_up_to = line.revision
                    yield line
            try:
                if os.path.samestat(os.fstat(self.journal.fileno()), os.stat(self.journal.name)):
                    return
            except FileNotFoundError:  # removed by hand: another comes
                return
            self.journal.close()
            self.journal = open(self.journal.name, "rb")  # noqa: SIM115

    def enter(self, lines: Sequence[Line]) -> None:
        self.rotate()
        known, text = self.known, b""
        for line in lines:
            raw = msgspec.json.encode(said := said_of(known, line))
            text += raw + b"\n"
            known = position_of(raw, said)
        self.append(text)
        self.known = known
        with contextlib.suppress(OSError):  # it is found again in the log itself
            self.store.remember("audit", msgspec.json.encode(known))

    def append(self, text: bytes) -> None:
        """Add *text* to the log: all of it, or none and OSError."""
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            size = os.fstat(fd).st_size
            try:
                write_all(fd, text)
                os.fdatasync(fd)
            except OSError:
                os.ftruncate(fd, size)
                raise
            if not size:
                sync_folder(self.path.parent)
        finally:
            os.close(fd)

    def rotate(self) -> None:
        """Begin another file if this one is large; the oldest of too many goes, and the log says so."""
        if not self.path.exists() or self.path.stat().st_size < AUDIT_BYTES:
            return
        os.rename(self.path, self.path.with_name(f"audit-{self.known.seq:015d}.jsonl"))
        for old in audit_files(self.path.parent)[:-AUDIT_FILES]:
            raw, last = [(b"", None), *collections.deque(lines_of_audit(old), 1)][-1]
            line = Line(self.known.revision, self.store.clock(), 0, "audit", old.name, "prune", by=self.store.by)
            pruned = msgspec.structs.replace(
                said_of(self.known, line), sha256=digest(raw), until=last.seq if last else 0
            )
            text = msgspec.json.encode(pruned)
            self.append(text + b"\n")
            self.known = position_of(text, pruned)
            old.unlink()

    def close(self) -> None:
        self.journal.close()


AUDITED = ("put", "delete", "archive", "quarantine", "add", "revoke", "restore")  # the ops that are changes to someone


def position_of(raw: bytes, line: AuditLine) -> Position:
    """Return how far the audit log has come with a *line*, of which *raw* are the bytes."""
    return Position(line.seq, digest(raw), line.revision)


def said_of(known: Position, line: Line) -> AuditLine:
    """Return what the audit log, which has come as far as *known*, says next, of a *line* of the journal."""
    by, _, place = line.by.partition("@")
    told = (line.kind, line.id, line.op, line.type, line.status, line.outcome, line.sha256)
    return AuditLine(known.seq + 1, known.sha256, line.at, line.revision, by, place, *told)


def audited_in(directory: Path) -> Position | None:
    """Return how far the audit log of a state *directory* had come, None if that is not known."""
    with contextlib.suppress(FileNotFoundError, Unreadable, ValueError):
        return msgspec.json.decode(read_file(f"{directory}/audit.json")[0], type=Position)
    return None


def audit_files(folder: Path) -> list[Path]:
    """Return the files of an audit log that are full, the oldest first."""
    return sorted(folder.glob("audit-*.jsonl"))


def lines_of_audit(path: Path) -> Iterator[tuple[bytes, AuditLine | None]]:
    """Yield each line of a file of an audit log, and what it says, None if that is no line."""
    try:
        with open(path, "rb") as file:
            for raw in file:
                line = None
                with contextlib.suppress(ValueError):
                    line = msgspec.json.decode(raw, type=AuditLine)
                yield raw.rstrip(b"\n"), line
    except FileNotFoundError:
        return


class Chain:
    """The lines of an audit log, one by one, each of which must vouch for the one before.

    *told* is how far the log had come, from the state directory: without it, one whose end was cut off looks whole.
    """

    def __init__(self, told: Position | None) -> None:
        self.told, self.known, self.before = told, Position(), ""
        self.count, self.start, self.pruned = 0, Position(), set[tuple[int, str]]()

    def add(self, here: str, raw: bytes, line: AuditLine | None) -> str:
        """Return what is wrong with a line, or with the one before it, "" if nothing is."""
        if line is None:
            return f"{here} was changed: it is no line of the log"
        if not self.count:
            self.start = self.known = Position(line.seq - 1, line.previous)
        if line.seq != self.known.seq + 1:
            return f"{here} is number {line.seq} where {self.known.seq + 1} should be: lines are missing"
        if line.previous != self.known.sha256:
            return f"{self.before} was changed: its sha256 is not the one that the line after it has"
        self.known, self.before, self.count = position_of(raw, line), here, self.count + 1
        self.pruned |= {(line.until, line.sha256)} if line.op == "prune" else set()
        if self.told and self.told.seq == line.seq and self.told.sha256 != self.known.sha256:
            return f"{here} was changed: its sha256 is not the one that the state directory has"
        return ""

    def end(self) -> str:
        """Return what is missing before the first line, or after the last."""
        if self.start.seq and (self.start.seq, self.start.sha256) not in self.pruned:
            return f"the lines 1 to {self.start.seq} are missing, and nothing says that they were pruned"
        if self.told and self.told.seq > self.known.seq:
            return f"the lines {self.known.seq + 1} to {self.told.seq} are missing at its end"
        return ""


def verify_audit(folder: Path, told: Position | None) -> tuple[int, str]:
    """Return how many lines of the audit log in *folder* are whole, and what is wrong with the next, "" if nothing."""
    chain = Chain(told)
    for path in (*audit_files(folder), folder / "audit.jsonl"):
        for number, (raw, line) in enumerate(lines_of_audit(path), 1):
            if problem := chain.add(f"{path.name} line {number}", raw, line):
                return chain.count, problem
    return chain.count, chain.end()


def tokens_said(directory: Path) -> Record:
    """Return what tokens.json says, whatever that is worth; raise Malformed."""
    try:
        return check(dict[str, Any], parse(read_file(f"{directory}/tokens.json")[0]), "")  # type: ignore[no-any-return]
    except FileNotFoundError:
        return {}
    except (Unreadable, Malformed) as problem:
        raise Malformed("tokens.json", str(problem)) from None


def tokens_in(directory: Path) -> dict[str, Record]:
    """Return the well-formed tokens of the file tokens.json by name; the others are in the log, and nobody's."""
    try:
        said = tokens_said(directory)
    except Malformed as problem:
        log.error("no token of a file counts: %s", problem)
        return {}
    tokens = {}
    for number, (name, token) in enumerate(said.items()):
        try:
            tokens[name] = check(TOKEN, token, "")
            if number >= TOKENS:
                raise Malformed("", f"there are {TOKENS} before it, which is as many as can be")
        except Malformed as problem:
            tokens.pop(name, None)
            log.error("tokens.json: the token %a does not count: %s", name, problem)
    return tokens


def used_in(directory: Path) -> Record:
    """Return when (ms), and from where, each token was last used, by name; a minute may be missing."""
    with contextlib.suppress(FileNotFoundError, Unreadable, Malformed):
        return check(dict[str, USED], parse(read_file(f"{directory}/used.json")[0]), "")  # type: ignore
    return {}


class Keyring:
    """Who may ask: the tokens as they are in the state directory at this moment, and the one *given* by the settings.

    Where none is given, the file token has it. What is changed there counts from the next request on.
    """

    def __init__(self, directory: Path, given: str = "") -> None:
        self.directory, self.given = directory, given
        self.paths = [f"{directory}/{name}" for name in ("tokens.json", "token")]
        self.stamps: list[Stamp] | None = None
        self.tokens: list[Token] = []
        self.used = dict[str, Record]()  # by name: when (ms) and from where it last came

    def find(self, secret: bytes) -> Token | None:
        """Return the token that *secret* is, expired or not; None if it is none."""
        return matching(self.known(), secret)

    def known(self) -> list[Token]:
        stamps = [*map(stamp_at, self.paths)]  # before they are read: what comes meanwhile is seen the next time
        if stamps != self.stamps:
            self.tokens, self.stamps = [*self.read()], stamps
        return self.tokens

    def read(self) -> Iterator[Token]:
        for name, said in tokens_in(self.directory).items():
            yield token_from(name, said)
        if master := self.given.encode() or self.master():
            yield Token(MASTER, "admin", digest(master))

    def master(self) -> bytes:
        """Return what the file token holds."""
        with contextlib.suppress(FileNotFoundError, Unreadable):
            return read_file(self.paths[1])[0].strip()
        return b""

    def make(self) -> None:
        """Make the file token if nobody could ask anything otherwise; raise OSError."""
        if not self.given and not os.path.exists(self.paths[1]) and not tokens_in(self.directory):
            file = File(self.paths[1], f"{self.directory}/.token")
            set_aside({file: [new_secret().encode() + b"\n"]})
            put_in_place([file])

    def saw(self, token: Token, sender: str, now: int) -> None:
        self.used[token.name] = {"at": now, "from": sender}


def new_secret() -> str:
    """Return a token: its first letters say whose it is to who finds one lying about."""
    return f"kirosync_{secrets.token_urlsafe(32)}"


def stamp_at(path: str) -> Stamp:
    try:
        return stamp_of(os.stat(path))
    except OSError:
        return 0, 0, 0


def hold_service(directory: Path, address: str) -> int | None:
    """Return a descriptor that keeps other services away from *directory* while it is open; None if there is one."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(directory / ".service", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not filelock.lock_descriptor(fd, blocking=False):
        os.close(fd)
        return None
    with contextlib.suppress(OSError):  # a full disk can still be read
        os.ftruncate(fd, 0)
        write_all(fd, f"{os.getpid()} {address}\n".encode())
    return fd


def who_serves(directory: Path) -> str:
    """Return what the service of *directory* said of itself: its process and its address."""
    with contextlib.suppress(FileNotFoundError, Unreadable):
        return read_file(f"{directory}/.service")[0].decode(errors="replace").strip()
    return ""


def refusal_of(error: OSError) -> Refusal:
    """Return what to say of a write that failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Full("the disk of the state directory is full: nothing was changed; make space and send it again")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Busy("too many files are open: nothing was changed; try again")
    return Broken(f"the state directory cannot be written ({error.strerror}): nothing was changed")


SNAPSHOT, RESTORE = ".snapshot.", ".restore."  # folders of work under way; who does it holds their lock
OUTSIDE = re.compile(r"\.lock|\.service|log|before-restore-.*|README\.md|lost\+found|\.(snapshot|restore)\..*")


def walk(directory: Path, folder: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Yield all that is in the state *directory* and belongs to the state, or might: its path there, and its entry."""
    try:
        entries = [*os.scandir(directory / folder)]
    except FileNotFoundError:  # it went while we came
        return
    for entry in entries:
        if folder or not OUTSIDE.fullmatch(entry.name):
            path = f"{folder}{entry.name}"
            yield path, entry
            if entry.is_dir(follow_symlinks=path in FOLDERS):  # a part may be on another disk
                yield from walk(directory, f"{path}/")


def occupy(folder: Path) -> int:
    """Make *folder*, and return what holds its lock for as long as its maker lives."""
    folder.mkdir(mode=0o700)
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    filelock.lock_descriptor(fd)
    return fd


def is_deserted(folder: Path) -> bool:
    """Return whether the maker of *folder* (see occupy) has gone without removing it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return filelock.lock_descriptor(fd, blocking=False)
    finally:
        os.close(fd)


def remove_deserted(folders: Iterable[Path]) -> None:
    for folder in folders:
        with passed_over("%s", folder):
            if is_deserted(folder):
                shutil.rmtree(folder)


@contextlib.contextmanager
def as_owner(directory: Path) -> Iterator[None]:
    """Be, if we are root, who owns *directory* for as long.

    Else a service would find files that it cannot read, and whoever owns the directory could have us follow a link to
    what is not theirs.
    """
    owner = os.stat(directory) if os.path.exists(directory) else None
    if os.geteuid() or not owner or not owner.st_uid:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(owner.st_gid)
    os.seteuid(owner.st_uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(os.getgid())
        os.setgroups(groups)


def settle(directory: Path) -> None:
    """Have a store take in what was done by hand, and complete what a writer did not live to."""
    with as_owner(directory), contextlib.closing(Store(directory)) as store:
        store.settle()


class Snapshot:
    """The state as it was at one moment, as a folder of links within the state directory, while others go on.

    Whoever changes a record renames another file into its place, so that a link stays what it was. What is appended to
    counts up to the size that it had at that moment. ``held`` is for how long (s) others had to wait.
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.held = Path(directory).absolute(), 0.0
        self.folder = self.directory / f"{SNAPSHOT}{secrets.token_hex(6)}"
        self.sizes: dict[str, int] = {}  # of the files, by their paths

    def __enter__(self) -> Snapshot:
        if not (self.directory / "journal.jsonl").exists():
            raise NotFound(f"there is no state in {self.directory}")
        self.lock, self.fd = Lock(self.directory / ".lock"), -1
        try:
            self._take()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self.fd >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self.fd)
        self.lock.close()

    def _take(self) -> None:
        """Link everything at a moment at which nothing is half done, and every record is as the journal says."""
        for _ in range(SNAPSHOTS):
            with self.lock.held():
                began = time.monotonic()
                at_rest = self._link()
                self.held = max(self.held, time.monotonic() - began)
            if at_rest and not flaws_in(self.folder, self.sizes, self.lines()):
                return
            settle(self.directory)
        raise Busy("files in the state directory are being edited by hand; try again")

    def _link(self) -> bool:
        """Link what there is; return whether no writer was stopped in the middle of a change."""
        if self.fd >= 0:
            shutil.rmtree(self.folder)
            os.close(self.fd)
        remove_deserted(self.directory.glob(f"{SNAPSHOT}*"))
        self.fd, self.sizes, at_rest = occupy(self.folder), {}, True
        for path, entry in walk(self.directory):
            if entry.is_dir():
                os.mkdir(f"{self.folder}/{path}", mode=0o700)
            elif (place := place_of(path)) and place.part != "audit":  # which is about logs that are not in a backup
                self.sizes[path] = link_or_copy(entry.path, f"{self.folder}/{path}")
            elif ASIDE.fullmatch(entry.name):
                at_rest = False
        return at_rest

    def lines(self) -> list[Line]:
        with open(self.folder / "journal.jsonl", "rb") as file:
            return read_journal(file.read(self.sizes["journal.jsonl"]))[0]

    def pack(self, target: IO[bytes]) -> None:
        """Write it to *target*, the journal last: what lacks it is not whole."""
        with (
            gzip.GzipFile(fileobj=target, mode="wb", compresslevel=GZIP_LEVEL) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            for path in sorted(self.sizes, key=lambda path: (path == "journal.jsonl", path)):
                with open(self.folder / path, "rb") as file:
                    member = tarfile.TarInfo(path)
                    member.size, member.mode = self.sizes[path], 0o600
                    member.mtime = int(os.fstat(file.fileno()).st_mtime)
                    tar.addfile(member, file)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Give what to write to; it is the file *path*, all of it, when that is done, or else nothing."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # contents before name
        os.rename(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.absolute().parent)


# What a writer did not live to rename: a record or a tombstone, and, by folder, what else is written aside.
ASIDE = re.compile(r"\..*\.json\.[0-9]+")
ASIDES = {folder: re.compile(r"\..*\.json") for folder in ("history", "agents")}
ASIDES[""] = re.compile(r"\..*\.jsonl?\.[0-9]+")


def link_or_copy(path: str, place: str) -> int:
    """Have the file *path* also at *place*, and return its size."""
    try:
        os.link(path, place)
    except OSError:  # it is on another disk, or another user's
        shutil.copyfile(path, place)
    return os.stat(place).st_size


def flaws_in(directory: Path, paths: Iterable[str], lines: Iterable[Line]) -> dict[str, str]:
    """Return what is wrong, by path, with the records among *paths*, and with those that *lines* tell of."""
    standing = {place[:2]: line for place, line in standing_of(lines).items() if place[2] == "put"}
    records = {place[1:]: path for path in paths if (place := place_of(path)) and place.part == "record"}
    records |= {key: f"{key[0]}/{name_of(key[1])}.json" for key in standing}
    flaws = {path: flaw_of(f"{directory}/{path}", standing.get(key)) for key, path in records.items()}
    return {path: flaw for path, flaw in flaws.items() if flaw}


def flaw_of(path: str, line: Line | None) -> str:
    """Return what is wrong with the file of a record that *line* of the journal is about; "" if nothing is."""
    if line and read_own(line, path):
        return ""
    kind, _, file = path.rpartition("/")
    try:
        read_record(os.path.basename(kind), file.removesuffix(".json"), path)
    except FileNotFoundError:
        return "is missing"
    except Unreadable as reason:
        return f"is no record: {reason}"
    return "is not as the journal says" if line else "is not in the journal"


class Packed(gzip.GzipFile):
    """A backup as it is read: up to so many bytes as are ``allowed``, for a header may claim to be of any size."""

    allowed = HEADER_BYTES

    def read(self, size: int | None = -1) -> bytes:
        block = super().read(size)
        self.allowed -= len(block)
        if self.allowed < 0:
            raise tarfile.ReadError("it has a file with a name longer than any of ours")
        return block


def unpack_backup(file: IO[bytes], folder: Path) -> list[str]:
    """Write what a backup holds into *folder* and return the paths; raise Malformed at what is none of ours."""
    paths: list[str] = []
    try:
        with Packed(fileobj=file) as packed, tarfile.open(fileobj=packed, mode="r|") as tar:
            while member := tar.next():
                check_member(member, folder)
                packed.allowed = member.size + 2 * HEADER_BYTES
                write_member(tar, member, folder)
                paths.append(member.name)
                tar.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them
                packed.allowed = HEADER_BYTES
            packed.allowed = HEADER_BYTES
            while packed.read(BLOCK_BYTES):  # behind it is the checksum of all
                pass
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise Malformed("", f"this is no backup, or not all of one: {error}") from None
    if paths[-1:] != ["journal.jsonl"]:
        raise Malformed("", "this is no backup of kirosync, or not all of one: it does not end with the journal")
    return paths


def check_member(member: tarfile.TarInfo, folder: Path) -> None:
    """Raise Malformed if a *member* of a backup is anything but a plain file at a place of ours that fits the disk."""
    where = repr(member.name[:ID_CHARACTERS])
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise Malformed(where, "is not a plain file; a backup has no others")
    if not place_of(member.name) or len(os.fsencode(member.name)) > HEADER_BYTES:
        raise Malformed(where, "is nothing that a backup holds")
    if hasattr(tarfile, "data_filter"):  # from 3.11.4 on
        tarfile.data_filter(member, str(folder))
    if member.size > room_on(folder)[0] - RESERVE_BYTES:
        raise Full(f"{where} has {member.size} bytes, for which there is no space: nothing was changed")


def write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path) -> None:
    path, source = f"{folder}/{member.name}", tar.extractfile(member)
    assert source
    make_folder(os.path.dirname(path))
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except (FileExistsError, NotADirectoryError):
        raise Malformed(repr(member.name), "is in it twice") from None
    with open(fd, "wb") as file:
        shutil.copyfileobj(source, file, BLOCK_BYTES)
    os.utime(path, (member.mtime, member.mtime))


def check_backup(folder: Path, paths: Iterable[str]) -> None:
    """Raise Malformed if what was unpacked into *folder* is not in itself right."""
    lines, flaws = read_journal((folder / "journal.jsonl").read_bytes())
    if flaws:
        raise Malformed("journal.jsonl", flaws[0])
    if any(line.revision > LAST_REVISION // 2 for line in lines):
        raise Malformed("journal.jsonl", f"has revisions above {LAST_REVISION // 2}, after which too few are left")
    for path, flaw in flaws_in(folder, paths, lines).items():
        raise Malformed(path, flaw)
    for path in paths:
        place = place_of(path)
        try:
            if place and place.part == "record":
                from_hand(place.kind, read_record(place.kind, name_of(place.identity), f"{folder}/{path}")[1], 0, 0)
            elif place and place.part in ("tombstone", "told", "used", "agent"):
                check(dict[str, Any], parse(read_file(f"{folder}/{path}")[0]), "")
        except (Unreadable, Malformed) as reason:
            raise Malformed(path, str(reason)) from None


# What a restore exchanges. All else is of this machine (who may come in, who is here) and stays where there is any.
EXCHANGED = (*KINDS, "deleted", "archive", "output", "history", "quarantine")
DOORS = ("token", "tokens.json")


class Restoration:
    """A backup on its way into the place of the state: unpacked beside it and checked, and then exchanged for it.

    The point of no return is where the journal is: one whose last epoch has the name of our folder takes its place.
    Before that nothing has happened, after it whoever takes the lock next goes on (see complete_restores). Others see
    that the journal is another, and read everything anew.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.epoch = store, secrets.token_hex(6)
        self.folder = store.directory / f"{RESTORE}{self.epoch}"
        self.new, self.before = self.folder / "new", self.folder / "before"
        self.ended: list[str] = []  # commands that were open in the backup, and are not any more
        self.let_in: list[str] = []  # tokens that were in the backup, where there were none
        self.kept = self.before  # where that is which was there before

    def take(self, file: IO[bytes]) -> None:
        """Restore what *file* holds; raise Malformed if that is no whole backup."""
        fd = self.store.change(lambda pen: occupy(self.folder))
        try:
            self.new.mkdir(mode=0o700)
            self.before.mkdir(mode=0o700)
            check_backup(self.new, unpack_backup(file, self.new))
            fresh = Store(self.new, clock=self.store.clock, by=self.store.by)
            os.sync()  # all at once: a call for each of thousands of files takes minutes
            try:
                while not self.store.change(partial(self._exchange, fresh=fresh)):
                    pass  # what was done by hand is taken in first
            finally:
                fresh.close()
        finally:
            if not is_begun(self.folder):
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(fd)

    def _exchange(self, pen: Pen, fresh: Store) -> bool:
        """Exchange the state, under the lock; return False if something is still to be written of the one before."""
        if pen.lines or pen.history or pen.unwanted:
            return False
        state = self.store.directory
        if mounted := [name for name in EXCHANGED if os.path.ismount(state / name)]:
            raise Conflict(f"{state / mounted[0]} is a disk of its own, and cannot be exchanged for another folder")
        fresh.begin_epoch(self.epoch, max(fresh.revision, self.store.revision))
        fresh.change(partial(self._end_open, now=pen))
        if any((state / name).exists() for name in DOORS):  # what was revoked since stays so
            for name in DOORS:
                (self.new / name).unlink(missing_ok=True)
        self.let_in = [*tokens_in(self.new), *([MASTER] if (self.new / "token").exists() else [])]
        os.link(state / "journal.jsonl", self.before / "journal.jsonl")
        sync_folders([f"{self.new}/output/", f"{self.new}/", f"{self.before}/", f"{self.folder}/", f"{state}/"])
        os.rename(self.new / "journal.jsonl", state / "journal.jsonl")
        sync_folder(state)
        self.kept = complete_restore(self.folder)
        return True

    def _end_open(self, pen: Pen, now: Pen) -> None:
        """End what was open in the backup; bury what is known *now* but not in it: no client is to bring it back."""
        pen.mark("state", self.epoch, "restore")
        known = pen.store.entries["commands"]
        for identity in [each for each, entry in known.items() if entry.content.status not in ENDED]:
            command, present = pen.get("commands", identity) or {}, now.get("commands", identity)
            settled = restored(command, present, pen.now)
            pen.put("commands", identity, settled)
            if settled is present:
                self._keep_output(identity)
            else:
                self.ended.append(identity)
        graves = [identity for kind, identity, op in now.store.recent if kind == "commands" and op in GRAVES]
        buried = {identity for kind, identity, op in pen.store.recent if op in GRAVES}
        for identity in sorted({*now.store.entries["commands"], *graves} - known.keys() - buried):
            pen.delete("commands", identity, max(pen.now, int(now.last_update)), whole=False)
        pen.touch(pen.now)

    def _keep_output(self, identity: str) -> None:
        """Have what a command prints, which goes on, be in the same files as before."""
        for stream in STREAMS:
            path = self.store.stream(identity, stream)
            (self.new / "output" / path.name).unlink(missing_ok=True)
            if path.exists():
                link_or_copy(str(path), f"{self.new}/output/{path.name}")


def is_begun(folder: Path) -> bool:
    """Return whether the restore that *folder* was made for has come to its point of no return."""
    journal = folder.parent / "journal.jsonl"
    named = journal.exists() and folder.name.removeprefix(RESTORE).encode() in journal.read_bytes()
    return named or any((folder / "before" / name).exists() for name in EXCHANGED)


def complete_restores(directory: Path) -> None:
    """Go on with a restore that was stopped on its way, or remove what it had prepared if it had not begun."""
    for folder in directory.glob(f"{RESTORE}*"):
        if is_begun(folder):
            log.warning("completing a restore: it was stopped")
            complete_restore(folder)
        else:
            remove_deserted([folder])


def complete_restore(folder: Path) -> Path:
    """Exchange what *folder* has for what is there, and return where that is kept; again, it goes on where it was."""
    state, new, before = folder.parent, folder / "new", folder / "before"
    for name in EXCHANGED:
        if (new / name).exists():
            if os.path.lexists(state / name):  # after a crash it may be one that an opening store has just made
                os.rename(state / name, free_name(before / name))
            os.rename(new / name, state / name)
    for path in [*new.glob("agents/[!.]*.json"), *(new / name for name in (*DOORS, "told.json", "used.json"))]:
        place = state / path.relative_to(new)
        if path.exists() and not place.exists():
            os.rename(path, place)
    sync_folders([f"{each}/" for each in (new, before, state / "agents", state) if each.exists()])
    kept = free_name(state / time.strftime("before-restore-%Y%m%dT%H%M%SZ", time.gmtime()))
    if before.exists():
        os.rename(before, kept)
        sync_folder(state)
    shutil.rmtree(folder)
    return kept


def free_name(path: Path) -> Path:
    """Return *path*, or if it is taken the first of *path*.1, *path*.2 ... that is not."""
    names = itertools.chain([path], (path.with_name(f"{path.name}.{number}") for number in itertools.count(1)))
    return next(name for name in names if not os.path.lexists(name))


REMEDIES = {  # what a repair does, in the order in which it does it
    "give": "give it to the owner of the state directory, which takes root",
    "rebuild": "move it to quarantine, and make it again from the records",
    "take in": "take in what it is now, as a change made by hand; if it is no record, move it to quarantine",
    "bury": "count it as deleted, for all clients; to have it back, first take it from a backup: tar xzf BACKUP PATH",
    "complete": "complete it, or remove it, as its writer would have",
    "set aside": "move it to quarantine",
    "close": "let nobody but its owner read it",
    "": "nothing: look at it, and move it back or remove it",
}


class Flaw(NamedTuple):
    """Something in the state directory that is not as it should be, and which of REMEDIES is for it."""

    path: str
    problem: str
    remedy: str


class Inspection:
    """What the journal says of the state directory, to hold against what is there. Nothing is changed by it.

    It takes no lock: what seems wrong may just be changing, and is to be looked at again under the lock (see inspect).
    """

    def __init__(self, directory: Path) -> None:
        self.directory, self.owner = directory, os.stat(directory).st_uid
        journal = directory / "journal.jsonl"
        lines, self.flaws = read_journal(read_file(str(journal))[0] if journal.exists() else b"")
        self.standing = standing_of(lines)
        self.known = {key[:2] for key in self.standing}

    def look(self) -> Iterator[Flaw]:
        """Yield what seems to be wrong anywhere; without a journal there is nothing to hold the rest against."""
        if not (self.directory / "journal.jsonl").exists():
            yield from self.judge("journal.jsonl")
            return
        seen = {"": None, "journal.jsonl": None} | {path: None for path, _ in walk(self.directory)}
        seen |= {f"{kind}/{name_of(identity)}.json": None for kind, identity, op in self.standing if op == "put"}
        work = itertools.chain(self.directory.glob(f"{SNAPSHOT}*"), self.directory.glob(f"{RESTORE}*"))
        seen |= {folder.name: None for folder in work}
        for path in seen:
            yield from self.judge(path)

    def judge(self, path: str) -> Iterator[Flaw]:
        """Yield what is wrong with the file or folder *path*."""
        place = place_of(path)
        try:
            status = os.lstat(self.directory / path)
        except FileNotFoundError:
            gone = place and place.part == "record" and (place.kind, place.identity, "put") in self.standing
            wanted = [("is missing", "bury")] if gone else []
            wanted += [("is missing", "rebuild")] if place and place.part == "journal" else []
        else:
            wanted = [*self.found(path, place, status)]
        yield from (Flaw(path, problem, remedy) for problem, remedy in wanted)

    def found(self, path: str, place: Place | None, status: os.stat_result) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with what is there, and which remedy is for it."""
        mode, folder = stat.S_IMODE(status.st_mode), stat.S_ISDIR(status.st_mode)
        if status.st_uid != self.owner:  # it may not even be possible to look into it
            yield "belongs to another user than the directory", "give"
            return
        look = self.folder(path) if folder else PARTS[place.part](self, path, place) if place else self.stray(path)
        yield from (wanted := [*look])
        secret = not stat.S_ISLNK(status.st_mode) and not path.endswith(".lock")  # a lock holds nothing
        if mode & 0o77 and secret and not any(remedy for _, remedy in wanted):
            yield f"can be used by others, with the mode {mode:04o}", "close"

    def folder(self, path: str) -> Iterator[tuple[str, str]]:
        named = re.fullmatch(rf"history/{KIND}(/{NAME})?", path)
        if path.startswith((SNAPSHOT, RESTORE)):
            if is_deserted(self.directory / path):
                yield "was left by one who was stopped", "complete"
        elif named and named["name"]:
            if (named["kind"], urllib.parse.unquote(named["name"])) not in self.known:
                yield "is the history of nothing", "set aside"
        elif not (named or path in ("", *FOLDERS) or path.startswith("quarantine/")):
            yield "is nothing that kirosync makes", "set aside"

    def stray(self, path: str) -> Iterator[tuple[str, str]]:
        folder, _, name = path.rpartition("/")
        number = name.rpartition(".")[2]
        if folder == "agents" and name.endswith(".lock") and is_name(name[:-5]):
            return
        if not folder and name.startswith(".") and (os.path.exists(f"/proc/{number}") or not number.isdecimal()):
            return  # it is being written, or another's own
        if folder in ("", *FOLDERS) and ASIDES.get(folder, ASIDE).fullmatch(name):
            yield "was set aside by a writer that was stopped", "complete"
        else:
            yield "is nothing that kirosync writes", "set aside"

    def record(self, path: str, place: Place) -> Iterator[tuple[str, str]]:
        flaw = flaw_of(f"{self.directory}/{path}", self.standing.get((place.kind, place.identity, "put")))
        yield from [(flaw, "take in")] if flaw else []

    def tombstone(self, path: str, place: Place) -> Iterator[tuple[str, str]]:
        op = next(op for op, folder in GRAVES.items() if path.startswith(f"{folder}/"))
        if (place.kind, place.identity, op) not in self.standing:
            yield "is a tombstone that is not in the journal", "set aside"
        yield from self.shaped(path, dict[str, Any])

    def output(self, path: str, place: Place) -> Iterator[tuple[str, str]]:
        ops = {op for op in REPLACES if ("commands", place.identity, op) in self.standing}
        if path.startswith("archive/"):
            if not os.path.exists(self.directory / f"archive/commands/{name_of(place.identity)}.json"):
                yield "is the output of no command in the archive", "set aside"
        elif "put" not in ops:
            yield "is the output of no command", "complete" if ops & GRAVES.keys() else "set aside"

    def agent(self, path: str, place: Place) -> Iterator[tuple[str, str]]:
        yield from self.shaped(path, AGENT)

    def told(self, path: str, place: Place) -> Iterator[tuple[str, str]]:
        yield from self.shaped(path, shape("Told", {"revision": Count, "commands": list[str]}, {}))

    def used(self, path: str, place: Place) -> Iterator[tuple[str, str]]:
        yield from self.shaped(path, dict[str, Any])

    def token(self, path: str, place: Place) -> Iterator[tuple[str, str]]:
        yield from self.shaped(path, dict[str, TOKEN]) if path.endswith(".json") else ()  # type: ignore[valid-type]

    def quarantined(self, path: str, place: Place) -> Iterator[tuple[str, str]]:
        with contextlib.suppress(OSError):
            if path.count("/") == 1 and not path.endswith(".reason"):
                yield f"lies here: {(self.directory / f'{path}.reason').read_text(errors='replace').strip()}", ""

    def journal(self, path: str, place: Place) -> Iterator[tuple[str, str]]:
        for flaw in self.flaws:
            yield flaw, "rebuild"

    def nothing(self, path: str, place: Place) -> Iterator[tuple[str, str]]:
        yield from ()

    def shaped(self, path: str, kind: Any) -> Iterator[tuple[str, str]]:
        try:
            check(kind, parse(read_file(f"{self.directory}/{path}")[0]), "")
        except (Unreadable, Malformed) as reason:
            yield f"is not as it should be: {reason}", "set aside"
        except FileNotFoundError:
            pass  # it has just gone


PARTS: dict[str, Callable[[Inspection, str, Place], Iterator[tuple[str, str]]]] = {
    "record": Inspection.record,
    "tombstone": Inspection.tombstone,
    "output": Inspection.output,
    "version": Inspection.nothing,
    "agent": Inspection.agent,
    "quarantined": Inspection.quarantined,
    "token": Inspection.token,
    "told": Inspection.told,
    "used": Inspection.used,
    "audit": Inspection.used,
    "journal": Inspection.journal,
}


def inspect_state(directory: Path) -> list[Flaw]:
    """Return what is wrong with the state in *directory*, as its owner sees it; see flaws_of."""
    with as_owner(directory):
        return flaws_of(directory)


def flaws_of(directory: Path) -> list[Flaw]:
    """Return what is wrong with the state in *directory*, sorted by remedy and path; NotFound if none is there.

    Only what seemed to be wrong is looked at under the lock, so that nobody is held up.
    """
    if not any((directory / name).exists() for name in ("journal.jsonl", *KINDS)):
        raise NotFound(f"there is no state in {directory}")
    flaws = [*Inspection(directory).look()]
    if suspects := dict.fromkeys(flaw.path for flaw in flaws if flaw.remedy):
        with contextlib.closing(Lock(directory / ".lock")) as lock, lock.held():
            inspection = Inspection(directory)
            again = [flaw for path in suspects for flaw in inspection.judge(path)]
        flaws = [*again, *(flaw for flaw in flaws if flaw.path not in suspects)]
    order = list(REMEDIES)
    return sorted(flaws, key=lambda flaw: (order.index(flaw.remedy), flaw))


def repair(directory: Path) -> list[Flaw]:
    """Do for the state in *directory* what REMEDIES say, by the store's own means; return what is left."""
    for flaw in inspect_state(directory):
        if flaw.remedy == "give":
            with passed_over("%s", flaw.path):
                give(directory, flaw.path)
    flaws = inspect_state(directory)
    set_flaws_aside(directory, [flaw for flaw in flaws if flaw.remedy == "rebuild"])
    if any(flaw.remedy in ("rebuild", "take in", "bury", "complete") for flaw in flaws):
        settle(directory)
    set_flaws_aside(directory, [flaw for flaw in inspect_state(directory) if flaw.remedy == "set aside"])
    for flaw in inspect_state(directory):
        path = directory / flaw.path
        if flaw.remedy == "close":
            with as_owner(directory), passed_over("%s", path):
                os.chmod(path, 0o700 if path.is_dir() else 0o600)
    return inspect_state(directory)


def give(directory: Path, path: str) -> None:
    """Give the file *path* to the owner of *directory*; on the way there no link is followed, and it is no other's."""
    *folders, name = path.split("/")
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        owner = os.fstat(fd)
        for folder in folders:
            inner = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=fd)
            os.close(fd)
            fd = inner
        status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
            raise OSError(errno.EMLINK, "it has another name elsewhere, whose owner may be right")
        os.chown(name, owner.st_uid, owner.st_gid, dir_fd=fd, follow_symlinks=False)
    finally:
        os.close(fd)


def set_flaws_aside(directory: Path, flaws: Iterable[Flaw]) -> None:
    """Move what is still as *flaws* say into quarantine, each with the reason."""
    with as_owner(directory), contextlib.closing(Lock(directory / ".lock")) as lock, lock.held():
        inspection = Inspection(directory)
        for flaw in flaws:
            if flaw in inspection.judge(flaw.path) and os.path.lexists(directory / flaw.path):
                put_aside(directory, flaw)


def put_aside(directory: Path, flaw: Flaw) -> None:
    """Move the file or folder of a *flaw* to quarantine; the reason is there first."""
    path, folder = directory / flaw.path, directory / "quarantine"
    name = os.fsdecode(os.fsencode(flaw.path.replace("/", "."))[: NAME_BYTES // 2])
    place = free_name(folder / f"{name}.{os.lstat(path).st_mtime_ns}")
    folder.mkdir(mode=0o700, exist_ok=True)
    give_reason(place, flaw.problem)
    os.rename(path, place)
    sync_folders([str(place), str(path)])


def last_moment(directory: Path) -> float:
    """Return when (ms) the last change was made, by the clock of who made it; 0 if there was none."""
    journal = directory / "journal.jsonl"
    lines, _ = read_journal(read_file(str(journal))[0] if journal.exists() else b"")
    return max((line.at for line in lines), default=0)


def mount_of(directory: Path, mounts: str) -> str:
    """Return the kind of the file system that *directory* is on, by the text of /proc/self/mountinfo."""
    best, kind = "", "of an unknown kind"
    for line in mounts.splitlines():
        about, _, more = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), about.split()[4])
        if directory.is_relative_to(point) and len(point) >= len(best):  # of two at one place the later is on top
            best, kind = point, more.split()[0]
    return kind


def excludes(directory: Path) -> bool:
    """Return whether two who lock *directory* exclude each other; nothing is written for it."""
    fds = [os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) for _ in range(2)]
    try:
        filelock.lock_descriptor(fds[0], blocking=False)
        return not filelock.lock_descriptor(fds[1], blocking=False)
    finally:
        for fd in fds:
            os.close(fd)


def sizes_of(directory: Path) -> dict[str, tuple[int, int]]:
    """Return for each folder in *directory*, and for the files there as ".", how many files and bytes it holds."""
    sizes: dict[str, tuple[int, int]] = {}
    for folder, _, files in os.walk(directory):
        inside = os.path.relpath(folder, directory).partition("/")[0]
        for file in files:
            with contextlib.suppress(FileNotFoundError):
                count, size = sizes.get(inside, (0, 0))
                sizes[inside] = count + 1, size + os.lstat(f"{folder}/{file}").st_size
    return sizes


# ---------------------------------------------------------------------------------------- Service
# The only code that knows HTTP.


PUBLIC: tuple[str, ...] = ()  # the scopes that a route may be asked with; where there are none, no token is wanted
LOOK = ("read", "client", "agent", "ide", "admin")
READ = ("read", "client", "ide", "admin")
WRITE = ("client", "ide", "admin")
SUBMIT = ("client", "agent", "ide", "admin")
EXECUTE_AS = ("agent", "ide", "admin")


class Parameter(NamedTuple):
    """What may stand in the query, or in a header: its type, and in *words* what it is; and what it is for.

    It is *otherwise* what it is where it is not said; with Required it must be.
    """

    name: str
    kind: Any
    words: str
    otherwise: Any = ""
    example: Any = None
    place: str = "query"
    most: float = math.inf

    @property
    def argument(self) -> str:
        """The name that it has for a handler."""
        name = self.name.lower().replace("-", "_")
        return f"{name}_" if keyword.iskeyword(name) else name

    def read(self, texts: Sequence[str]) -> Any:
        """Return what the *texts* say that were given, each byte a character; raise Malformed."""
        if not texts and self.otherwise is not Required:
            return self.otherwise
        try:
            (text,) = texts
            text = text.encode("latin-1").decode()
            parts = [*filter(None, text.split(","))] if get_origin(self.kind) is list else text
            value = msgspec.convert(parts, self.kind, strict=False)
            return value if self.most is math.inf else min(value, self.most)
        except (ValueError, UnicodeError):
            problem = f"must be {self.words.partition(';')[0]}" if len(texts) == 1 else "must be there, and once"
            raise Malformed(self.name, problem) from None


def listed(name: str, possible: Any, purpose: str) -> Parameter:
    """Return a parameter that lists some of what is *possible*, a Literal."""
    words = f"a list of {', '.join(get_args(possible))}, with commas between; {purpose}"
    return Parameter(name, list[possible], words, (), [get_args(possible)[0]])


class Body(NamedTuple):
    """What is sent: its shape, or shapes by type; by name, examples; the rule that it must keep, the fields that it may
    not have, since they are the service's own; and its media type."""

    shape: Any
    examples: Record
    rule: Callable[[Record], Record] | None = None
    own: Container[str] = ()
    media: str = "application/json"

    def checked(self, sent: Record) -> Record:
        """Return what was *sent*; raise Malformed if it is not so."""
        return refuse_own(self.own, self.rule(sent) if self.rule else check(self.shape, sent, ""))


class Answer(NamedTuple):
    """What a route answers: a body of this shape, if any, of this type, under this status, with these headers, and
    *at_times* with these."""

    shape: Any = None
    status: int = 200
    media: str = "application/json"
    headers: dict[str, Any] = {}
    at_times: dict[str, Any] = {}


class Route(NamedTuple):
    """A method and a path, the handler's name and the scopes that it takes; what it asks for and takes, what it says,
    and what it refuses beside what each does (see refusals).

    By this requests are read and checked, and the documentation is made. What more a scope decides, by the type of the
    command say, is in GRANTS.
    """

    method: str
    path: str
    handler: str
    scopes: tuple[str, ...]
    asks: tuple[Parameter, ...] = ()
    takes: Body | None = None
    says: tuple[Answer, ...] = ()
    refuses: tuple[type[Refusal], ...] = ()


def refuse_own(own: Container[str], record: Record, where: str = "") -> Record:
    """Return *record*; raise Malformed if it has a field that is the service's *own*."""
    if taken := [key for key in record if key in own]:
        raise Malformed(f"{where}{min(taken)}", "is set by the service; send it under another name")
    return record


def check_push(push: Record) -> Record:
    """Return *push* if every record in it is well formed; raise Malformed naming the record and the field."""
    check(PUSH, push, "")
    if (count := sum(len(push.get(kind, {})) for kind in KINDS)) > PUSHED:
        raise TooLarge(f"{count} records were sent, {PUSHED} are possible at once; send them in parts", limit=PUSHED)
    for kind in KINDS:
        for identity, record in push.get(kind, {}).items():
            where = f"{kind}.{identity[:ID_CHARACTERS]}"
            check_id(identity, where)
            check(PUSHABLE[kind], record, where)
            if kind == "documents":
                refuse_own(OWN_FIELDS, record, f"{where}.")
            if kind == "commands" and record["status"] == "pending":
                check_command(record, where)
            elif kind == "commands":
                check(FIELDS.get(record["type"], TYPED), record, where)
    return push


# What may be asked

SINCE = Parameter("since", str, "a cursor; one that is not known gives everything", None)
WAIT = Parameter(
    "wait", Seconds, f"a number of seconds, 0 to {WAIT_S}; the answer may be held so long", 0.0, 0, most=WAIT_S
)
ONLY = listed("only", Kind, "the kinds that are told; else all")
STATUSES = listed("status", Status, "the commands that are told; else all")
TYPES = listed("type", Literal[tuple(ORDERS)], "the commands that are told; else all")
LIMIT = Parameter("limit", Count, "a whole number; so many are told", 100, 20)
ASKING = Parameter("agent", Speaker, "the name of an agent; that which asks, and so is there")
STREAM = Parameter("stream", Stream, f"one of {', '.join(get_args(Stream))}; which", "stdout", "stdout")
PRINTED = STREAM._replace(kind=Printed, words=f"one of {', '.join(get_args(Printed))}; which")
OFFSET = Parameter("offset", Count, "a whole number; from which byte on", 0, 0)
PLACE = OFFSET._replace(words="a whole number; where the first byte belongs", otherwise=Required)
TAIL = Parameter("tail", Count, "a whole number; the last so many bytes, and no offset", None)
ATTEMPT = Parameter("attempt", Count, "a whole number; taken only from who has the command in this attempt", None)
HOLDER = Parameter("agent", Speaker, "the name of an agent; taken only if it has the command", None)
CLAIM = Parameter("claim", str, "a text; taken only from who claimed the command with it", None)
VERSION = Parameter(
    "version",
    Version,
    "the name of a version (GET /document/ID/versions lists them); which it is to be",
    CURRENT,
    CURRENT,
)
FROM = VERSION._replace(name="from", words=VERSION.words.replace("which it is to be", "else the last"), otherwise="")
TO = VERSION._replace(name="to")
KEY = Parameter(
    "Idempotency-Key",
    Key,
    f"up to {KEY_CHARACTERS} characters of ASCII; the same again is not done again",
    place="header",
)
PREFER = Parameter("Prefer", str, "a list; with respond-async the answer is 202 at once", place="header")
UNLESS = Parameter("If-None-Match", str, "an ETag; if nothing has changed since, the answer is 304", place="header")

# What is taken

BASH = {"type": "execute_bash", "command": "uname -a"}
EXAMPLES: dict[str, Record] = {
    **{"execute_bash": BASH, "read_file": {"path": "/etc/hostname"}},
    "write_file": {"path": "/tmp/hello.txt", "content": "hello\n"},
    **{"list_directory": {"path": "/tmp", "limit": 20}, "code_search": {"query": "def main", "path": "/srv"}},
    "aws_operation": {"service": "s3", "operation": "list-buckets", "parameters": {}},
    "kiro_command": {"command": "workbench.action.showCommands"},
    "user_input": {"prompt": "Shall it be deployed?", "inputType": "confirmation"},
}
CHAT = {"conversations": {"conv-1": [{"role": "user", "content": "hi", "timestamp": 1710338438173}]}}
PROGRAM = {"documents": {"doc-1": {"path": "/srv/app.js", "content": "const http", "timestamp": 1710338450000}}}
SENT = shape("Sent", {}, {**{kind: by_id(each, Id) for kind, each in PUSHABLE.items()}, "lastUpdate": Time})
ORDERED = Body(COMMANDS, {kind: {"type": kind, **said} for kind, said in EXAMPLES.items()}, check_command, SET_LATER)
PUSHED_STATE = Body(SENT, {"a message": CHAT, "a document": PROGRAM}, check_push)
REPORTED = Body(
    PATCH,
    {
        "a claim": {"status": "processing", "agent": "my-agent", "lease": 30, "claim": "0c5a7e1f"},
        "an end": {"status": "completed", "result": {"stdout": "hello\n", "stderr": "", "exitCode": 0}},
    },
)
TYPED_IN = Body(INPUT, {"a line": {"data": "yes\n"}, "the end": {"close": True}})
TO_RENDER = Body(
    RENDER,
    {
        "Markdown": {"texts": [{"text": "**bold**", "as": "markdown"}]},
        "code": {"texts": [{"text": "x = 1", "as": "code", "path": "x.py"}]},
    },
)
BYTES = Body(bytes, {"output": "hello\n"}, media="application/octet-stream")
ANNOUNCED = Body(AGENT, {"an agent": {"kind": "agent", "types": ["execute_bash"], "version": "1"}}, own=FOUND_OUT)
RENEWED = Body(AGENT_PATCH, {"it is there": {}, "it takes less": {"types": ["read_file"]}}, own=FOUND_OUT)
# What is sent to be executed is checked by execution_of, in words of its own.
EXECUTED = Body(EXECUTION, {"a command": {"command": "workbench.action.showCommands", "args": []}}, dict)
ANSWERED = Body(ANSWER, {"yes": {"value": "yes", "type": "confirmation", "executionId": "cmd-1710338480000-xyz789"}})

# What is answered

SERVER = shape("Server", {"running": bool, "port": Count, "host": str, "uptime": Seconds}, {})
QUEUE = shape("Queue", {"pending": Count, "processing": Count, "oldestPendingMs": Time | None}, {})
SEEN = shape("Seen", {"kind": AgentKind, "present": bool, "lastSeen": Iso}, {})
ASKER = shape("Asker", {"name": str, "scope": Scope}, {"expiresAt": Time})
WELL = shape(
    "Health",
    {"status": Literal["healthy", "unhealthy"], "ready": bool, "timestamp": Iso, "server": SERVER},
    {"problem": str, "queue": QUEUE, "agents": by_id(SEEN), "token": ASKER},
)
STATE = shape(
    "State",
    {"lastUpdate": Time, "cursor": str, "serverTime": Time},
    {
        **{kind: by_id(each) for kind, each in PUSHABLE.items()},
        "deleted": said(dict[str, list[str]], "ids by kind: take them out"),
        "full": said(bool, "that this is all there is, and no change of what you have"),
    },
)
TOLD = {"type": Name, **ORDER, **REPORT, **TIMES, **MARKS}
HERE = shape("PresentAgent", {"kind": AgentKind, "types": list[Name], "lastSeen": Time, "present": bool}, ABOUT)
QUESTION = shape(
    "Question",
    {"id": str, "prompt": str, "type": InputType, "createdAt": Iso, "expiresAt": Iso},
    {"executionId": str, "choices": list[str], "metadata": dict[str, Any]},
)
RUNNING = shape(
    "Execution",
    {"executionId": str, "status": Status, "agent": str | None, "createdAt": Iso},
    {"command": str, "args": list[str], "workspacePath": str},
)
EDITOR = shape(
    "Editor",
    {
        "status": Literal["ready", "busy", "unavailable"],
        "availableCommands": list[str],
        "timestamp": Iso,
        "pendingInputs": many(QUESTION),
        "executions": many(RUNNING),
    },
    {"currentCommand": str, "version": str, "reason": Literal["not_running", "not_responding"], "message": str},
)
PRINT = {"X-Output-Offset": Count, "X-Output-Next": Count, "X-Output-End": bool, "X-Output-Truncated": bool}
PRINT |= {"X-Command-Status": Status}
TAG = {"ETag": str}

HTML, TEXT = "text/html", "text/plain"
PAGE_OF_HTML = Answer(str, media=HTML, headers=TAG | {"Content-Security-Policy": str})
ABOUT_US = Answer(shape("About", dict.fromkeys(("service", "version", "docs", "health"), str), {}))
DOCUMENTED = Answer(dict[str, Any])
HEALTHY = Answer(WELL)
UNHEALTHY = Answer(WELL, 503)
FIGURES = Answer(str, media=TEXT)
ALL = Answer(STATE, headers=TAG)
UNCHANGED = Answer(status=304, headers=TAG)
MERGED = Answer(shape("Merged", {"status": Literal["updated", "current"], "data": STATE}, {}))
QUEUED = Answer(
    shape("Queued", {"commandId": str, "status": Status}, TOLD), at_times={"Idempotent-Replayed": Literal["true"]}
)
SOME = Answer(shape("Commands", {"commands": by_id(COMMAND)}, {}))
ONE = Answer(COMMAND)
OUTPUT = Answer(str, media=TEXT, headers=PRINT)
ADDED = Answer(shape("Added", {"size": Count}, {"truncated": bool}))
TAKEN = Answer(shape("Taken", {"size": Count, "closed": bool}, {}))
TALK = Answer(shape("Conversation", {"messages": MESSAGES}, {}))
TEXT_OF_IT = Answer(DOCUMENT)
REPLACED = shape("Version", {"version": str, "timestamp": Time, "size": said(Count, "bytes of its content")}, {})
VERSIONS = Answer(shape("Versions", {"versions": many(REPLACED)}, {}))
DIFF = Answer(shape("Diff", {"diff": str, "from": str, "to": str}, {"coarse": said(bool, "that it is in one piece")}))
SHOWN_HTML = Answer(shape("Html", {"html": list[str | None]}, {}))
DELETED = Answer(shape("Deleted", {"deleted": str}, {}))
AGENTS_HERE = Answer(shape("Agents", {"agents": by_id(HERE)}, {}))
NOTED = Answer(shape("Noted", {"agent": str}, {}))
DONE = {"success": Literal[True], "executionId": str}
SUCCESS = Answer(shape("Success", {**DONE, "output": str, "executionTimeMs": Count}, {}))
UNDERWAY = Answer(
    shape("Accepted", {"executionId": str, "status": Status}, {}), 202, at_times={"Preference-Applied": str}
)
IDE = Answer(EDITOR)
HEARD = Answer(shape("Heard", DONE, {}))

COMMAND_AT, DOCUMENT_AT, AGENT_AT = "/command/<identity:path>", "/document/<identity:path>", "/agents/<identity:path>"
CONTENTS = {
    "Service": (
        Route("GET", "/", "get_home", PUBLIC, (UNLESS,), None, (ABOUT_US, PAGE_OF_HTML, UNCHANGED)),
        Route("GET", "/docs", "get_docs", PUBLIC, (UNLESS,), None, (PAGE_OF_HTML, UNCHANGED)),
        Route("GET", "/openapi.json", "get_openapi", PUBLIC, says=(DOCUMENTED,)),
        Route("GET", "/health", "get_health", PUBLIC, says=(HEALTHY, UNHEALTHY)),
        Route("GET", "/metrics", "get_metrics", READ, says=(FIGURES,)),
    ),
    "Sync": (
        Route("GET", "/sync", "get_sync", LOOK, (SINCE, WAIT, ONLY, STATUSES, ASKING, UNLESS), None, (ALL, UNCHANGED)),
        Route("POST", "/sync", "post_sync", WRITE, (SINCE,), PUSHED_STATE, (MERGED,)),
    ),
    "Commands": (
        Route("POST", "/command", "post_command", SUBMIT, (WAIT, KEY), ORDERED, (QUEUED,), (Unprocessable,)),
        Route("GET", "/commands", "get_commands", LOOK, (STATUSES, TYPES, LIMIT), None, (SOME,)),
        Route("POST", f"{COMMAND_AT}/cancel", "post_cancel", SUBMIT, says=(ONE,), refuses=(NotFound, Conflict)),
        Route(
            *("GET", f"{COMMAND_AT}/output", "get_output", LOOK),
            *((STREAM, OFFSET, TAIL, WAIT), None, (OUTPUT,), (NotFound,)),
        ),
        Route(
            *("POST", f"{COMMAND_AT}/output", "post_output", EXECUTE_AS),
            *((PRINTED, PLACE, ATTEMPT, HOLDER, CLAIM), BYTES, (ADDED,), (NotFound, Conflict)),
        ),
        Route("POST", f"{COMMAND_AT}/input", "post_input", WRITE, (), TYPED_IN, (TAKEN,), (NotFound, Conflict)),
        Route("GET", COMMAND_AT, "get_command", LOOK, (WAIT,), None, (ONE,), (NotFound,)),
        Route("PATCH", COMMAND_AT, "patch_command", SUBMIT, (), REPORTED, (ONE,), (NotFound, Conflict)),
    ),
    "Records": (
        Route("GET", "/conversation/<identity:path>", "get_conversation", READ, says=(TALK,), refuses=(NotFound,)),
        Route("GET", f"{DOCUMENT_AT}/versions", "get_versions", READ, says=(VERSIONS,), refuses=(NotFound,)),
        Route("GET", f"{DOCUMENT_AT}/diff", "get_diff", READ, (FROM, TO), None, (DIFF,), (NotFound,)),
        Route("GET", DOCUMENT_AT, "get_document", READ, (VERSION,), None, (TEXT_OF_IT,), (NotFound,)),
        Route(
            *("DELETE", "/<kind:re:conversation|document|command>/<identity:path>", "delete", WRITE),
            *((), None, (DELETED,), (NotFound, Conflict)),
        ),
        Route("POST", "/render", "post_render", READ, (), TO_RENDER, (SHOWN_HTML,)),
    ),
    "Agents": (
        Route("GET", "/agents", "get_agents", LOOK, says=(AGENTS_HERE,)),
        Route("PUT", AGENT_AT, "put_agent", EXECUTE_AS, (), ANNOUNCED, (NOTED,)),
        Route("PATCH", AGENT_AT, "patch_agent", EXECUTE_AS, (), RENEWED, (NOTED,), (NotFound,)),
        Route("DELETE", AGENT_AT, "delete_agent", EXECUTE_AS, says=(DELETED,), refuses=(NotFound,)),
    ),
    "Editor": (
        Route(
            *("POST", "/api/kiro/execute", "post_execute", WRITE, (PREFER, KEY), EXECUTED, (SUCCESS, UNDERWAY)),
            (ValidationFailed, TimedOut, Unexecuted, Unprocessable, Unavailable),
        ),
        Route("GET", "/api/kiro/status", "get_kiro_status", READ, says=(IDE,)),
        Route(
            *("POST", "/api/kiro/input", "post_kiro_input", WRITE, (), ANSWERED, (HEARD,)),
            (ValidationFailed, Unfitting, NotFound, TimedOut, Conflict),
        ),
    ),
}
ROUTES = tuple(itertools.chain(*CONTENTS.values()))
ALWAYS: tuple[type[Refusal], ...] = (Malformed, TooSlow, HeadTooLarge, TooMany, Broken, Busy)  # may be refused to all


def refusals(route: Route) -> list[type[Refusal]]:
    """Return all that *route* may refuse."""
    unknown = (Unauthorized, Forbidden) if route.scopes else ()
    large = (TooLarge,) if route.takes else ()
    other = (NotJson,) if route.takes and route.takes.media == "application/json" else ()
    full = (Full,) if route.method != "GET" else ()
    return [*ALWAYS, *unknown, *large, *other, *full, *route.refuses]


def take_push(pen: Pen, push: Record, asker: Token) -> str:
    """Merge what *asker* sent into the state; return "updated" if its clock is ahead of ours, else "current"."""
    moment = push.get("lastUpdate", 0)
    updated = bool(moment > pen.last_update)
    if updated:
        pen.touch(moment if moment <= pen.now + AHEAD_MS else pen.now)
    take_it = partial(take_command, asker=asker)
    for kind, take in (("conversations", take_messages), ("documents", take_document), ("commands", take_it)):
        for identity, record in push.get(kind, {}).items():
            take(pen, identity, record)
    return "updated" if updated else "current"


def take_messages(pen: Pen, identity: str, messages: list[Record]) -> None:
    if grave := pen.grave("conversations", identity):
        messages, dead = risen(messages, grave)
        pen.keep("conversations", identity, [message for message in dead if message not in grave["messages"]])
        if not messages:
            return
    pen.merge(identity, messages)


def take_document(pen: Pen, identity: str, document: Record) -> None:
    known, grave = pen.get("documents", identity), pen.grave("documents", identity)
    document = trust_clock({"id": identity, **document}, known, pen.now)
    if grave and document["timestamp"] <= grave["deletedBefore"]:
        return pen.keep("documents", identity, [document] if document["timestamp"] != grave.get("timestamp") else [])
    merged, losers = join(known, document, document_rank) if known else (document, [])
    pen.keep("documents", identity, losers)
    pen.put("documents", identity, merged)


def take_command(pen: Pen, identity: str, command: Record, asker: Token) -> None:
    """Take in what *asker* pushed: of a command that is known, a report by who may take it; else it is queued."""
    known, grave = pen.get("commands", identity), pen.grave("commands", identity)
    if grave and not known and command.get("updatedAt", command.get("createdAt", 0)) <= grave["deletedBefore"]:
        return
    if known and not asker.can("takes", known["type"]):
        return
    merged = merge_command(known, {**command, "id": identity}, pen.now)
    put_command(pen, known, merged if known else {**merged, "queuedBy": asker.name})


def report(pen: Pen, identity: str, patch: Record) -> Record:
    """Return the command after an agent's *patch*; raise NotFound, Conflict or Malformed."""
    known = existing("commands", pen.get("commands", identity))
    if known["type"] == "user_input" and known["status"] == "pending" and patch.get("status") == "completed":
        known = advance(known, {"status": "processing"}, pen.now)  # a human answers at once
    return put_command(pen, known, advance(known, patch, pen.now))


def id_of_key(key: str) -> str:
    return f"cmd-{digest(key.encode())[:32]}"


def queue(pen: Pen, order: Record, key: str = "", **more: str) -> tuple[Record, bool]:
    """Return the command that *order* becomes, and whether it is one that was queued before with the same *key*.

    The id is made from the key, so that it is found, and remembered for as long as the command is.
    A new one says *more* (a target). Raises Unprocessable if the key was used for another order.
    """
    sha256 = digest(canonical(order))
    identity = id_of_key(key) if key else f"cmd-{pen.now}-{secrets.token_hex(5)}"
    known = pen.get("commands", identity) if key else None
    if known and known.get("orderSha256") != sha256:
        raise Unprocessable("Idempotency-Key: another command was queued with this key", commandId=identity)
    if known:
        return known, True
    marks = {"idempotencyKey": key, "orderSha256": sha256} if key else {}
    return put_command(pen, None, {"id": identity, **new_command(order, pen.now), **marks, **more}), False


def answer_question(pen: Pen, identity: str, said: Record) -> Record:
    """Return the question *identity* after a human *said* something; raise NotFound, TimedOut or Unfitting.

    The same answer again is no second one.
    """
    question = existing("commands", pen.get("commands", identity))
    value = fitting(question, said)
    if question["status"] not in ENDED:
        return report(pen, identity, {"status": "completed", "result": {"value": value}})
    if question.get("result") == {"value": value}:
        return question
    if question.get("outcome") == "expired":
        raise TimedOut(f"Operation 'user-input' timed out: {question.get('error')}", executionId=said["executionId"])
    raise nothing_waits(said["executionId"])


def nothing_waits(execution: str) -> NotFound:
    return NotFound("nothing is waiting for this answer", success=False, executionId=execution)


def cancel_command(pen: Pen, identity: str) -> Record:
    """Return the command after someone wanted it to end; raise NotFound or Conflict."""
    known = existing("commands", pen.get("commands", identity))
    return put_command(pen, known, cancel(known, pen.now))


def type_in(pen: Pen, identity: str, typed: bytes, offset: int | None, close: bool) -> Record:
    """Return the command after *typed* was added to its stdin; what it has already, by its *offset*, is left out."""
    known = existing("commands", pen.get("commands", identity))
    size, ended = known.get("inputSize", 0), known["status"] in ENDED
    if ended or not known.get("stdin"):
        why = f"has ended, as {known['status']}" if ended else 'reads nothing: it was queued without "stdin": true'
        raise Conflict(f"{identity} {why}", status=known["status"])
    offset = size if offset is None else offset
    if offset > size:
        raise Conflict(f"offset: {size} bytes were sent so far; what comes after is missing", size=size)
    known_part, typed = typed[: size - offset], typed[size - offset :]
    if known_part != pen.store.read_stream(identity, "stdin", offset, len(known_part)):
        raise Conflict(f"offset: other bytes than these were sent from {offset} on", size=size)
    if typed and known.get("inputClosed"):
        raise Conflict(f"the stdin of {identity} was closed", size=size)
    if size + len(typed) > INPUT_BYTES:
        raise TooLarge(f"a command reads up to {INPUT_BYTES} bytes; put more into a file", limit=INPUT_BYTES)
    if typed:
        pen.type_in(identity, size, typed)
    marks = {"inputSize": size + len(typed), "inputClosed": close or known.get("inputClosed", False)}
    return put_command(
        pen, known, {**known, **marks} if marks.items() <= known.items() else {**known, **marks, "updatedAt": pen.now}
    )


def put_command(pen: Pen, known: Record | None, command: Record) -> Record:
    """Write *command* if it is not as it was *known*, move lastUpdate to now, and return it."""
    if command != known:
        pen.put("commands", command["id"], command)
        pen.touch(pen.now)
    return command


def show(
    delta: Delta, last_update: float, now: int, kinds: Iterable[str], statuses: Container[str] = ()
) -> list[bytes]:
    """Return the sync document of *delta*, as pieces of which most are encoded already."""
    encode, before, pieces = msgspec.json.encode, b"{", []
    for kind in kinds:
        pieces.append(b'%s"%s":{' % (before, kind.encode()))
        comma, before = b"", b"},"
        for identity, entry in delta.shown(kind, statuses).items():
            pieces += (comma + encode(identity) + b":", *entry.content.newer(delta.since))
            comma = b","
    tail: Record = {"lastUpdate": last_update if last_update % 1 else int(last_update), "cursor": delta.cursor}
    tail |= {"serverTime": now} | ({"full": True} if delta.full else {})
    if delta.since:
        tail["deleted"] = {kind: delta.deleted[kind] for kind in kinds if delta.deleted[kind]}
    return [*pieces, before, encode(tail)[1:]]


def blocks(pieces: Sequence[bytes], ends: Sequence[int]) -> Iterator[bytes]:
    """Yield *pieces*, which end at *ends*, joined to blocks of about BLOCK_BYTES.

    >>> [*blocks([b"a", b"bc"], [1, 3])]
    [b'abc']
    """
    start = sent = 0
    while start < len(pieces):
        stop = bisect.bisect_left(ends, sent + BLOCK_BYTES, start) + 1
        block = b"".join(pieces[start:stop])
        yield block
        start, sent = stop, sent + len(block)


ACCEPTS_GZIP = re.compile(r"\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))")


def gzipped(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield *blocks* compressed, each as far as it goes."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)  # with the head and foot of gzip
    yield from filter(None, map(packer.compress, blocks))
    yield packer.flush()


class Told:
    """Which commands someone has seen ended, so far as it is known: those up to a revision, and some of the others."""

    def __init__(self, store: Store) -> None:
        self.store, self.revision, self.others = store, 0, set[str]()
        with contextlib.suppress(ValueError, TypeError, KeyError):  # spoiled by hand: then nobody was
            said = msgspec.json.decode(store.recall("told"))
            self.revision, self.others = min(int(said["revision"]), store.revision), set(said["commands"])

    def up_to(self, revision: int) -> None:
        self.revision = max(self.revision, revision)

    def of(self, identity: str, entry: Entry) -> None:
        if entry.content.status in ENDED and entry.revision > self.revision:
            self.others.add(identity)

    def __contains__(self, command: tuple[str, Entry]) -> bool:
        return command[1].revision <= self.revision or command[0] in self.others

    def save(self) -> None:
        """Remember it for the next start; if it cannot be, some commands are kept for longer."""
        known = self.store.entries["commands"]
        self.others = {i for i in self.others.copy() if (entry := known.get(i)) and entry.revision > self.revision}
        self.store.remember("told", msgspec.json.encode({"revision": self.revision, "commands": sorted(self.others)}))


def iso(moment: float) -> str:
    """Return a *moment* (ms) as /api/kiro and /health say it; one that no calendar has as the first, or last, that has.

    >>> iso(1737282600000), iso(-8e15)
    ('2025-01-19T10:30:00Z', '0001-01-01T00:00:00Z')
    """
    first, last = datetime.datetime.min, datetime.datetime.max
    epoch = datetime.datetime(1970, 1, 1)
    known = min(max(moment, (first - epoch) / MILLISECOND), (last - epoch) / MILLISECOND - 1000)
    return f"{(epoch + known * MILLISECOND).isoformat(timespec='seconds')}Z"


MILLISECOND = datetime.timedelta(milliseconds=1)


class Open:
    """The commands that have not ended, by id; kept in step with the store at the cost of what has changed.

    ``questions`` are the ids of all that were ever asked on behalf of something, by the id of that.
    """

    def __init__(self, store: Store) -> None:
        self.store, self.cursor, self.guard = store, "", threading.Lock()
        self.known: dict[str, Record] = {}
        self.questions: dict[str, set[str]] = {}

    def look(self) -> dict[str, Record]:
        """Return them as they stand; what has not changed is the same object as before."""
        with self.guard:
            delta = self.store.delta(self.cursor)
            known = (
                {} if delta.since == 0 else without(self.known, *delta.deleted["commands"], *delta.changed["commands"])
            )
            for identity, entry in delta.changed["commands"].items():
                if entry.content.status not in ENDED:
                    known[identity] = entry.record(identity)
                if b'"executionId"' in entry.newer():  # few have one: only those are looked into
                    asking = entry.record(identity).get("executionId")
                    self.questions.setdefault(str(asking), set()).add(identity)
            self.cursor, self.known = delta.cursor, known
            return known


class Room:
    """So many bytes, of which who needs some takes them, and gives them back."""

    def __init__(self, size: int) -> None:
        self.left, self.change = size, threading.Condition()

    def take(self, size: int, wait: float = 0) -> bool:
        """Return whether there were *size* bytes left, now or within *wait* (s), which then are the caller's."""
        with self.change:
            there = self.change.wait_for(lambda: self.left >= size, wait)
            self.left -= size if there else 0
            return there

    def give(self, size: int) -> None:
        with self.change:
            self.left += size
            self.change.notify_all()


class Answered(msgspec.Struct, rename={"identity": "requestId", "place": "from", "size": "bytes"}):
    """A request as a line of the access log has it."""

    at: float | str  # ms, and in the file as ISO 8601
    identity: str
    by: str
    place: str
    method: str
    path: str
    status: int
    size: int
    received: int
    ms: int

    def line(self) -> bytes:
        return msgspec.json.encode(msgspec.structs.replace(self, at=iso(float(self.at))))


class Caller(NamedTuple):
    """Who waits for an execution, by the name of the token, and for what order, by its sha256."""

    name: str
    sha256: str
    channel: Any

    def has_hung_up(self) -> bool:
        return bool(self.channel and self.channel.has_hung_up())


class Editors:
    """The windows of IDEs that take commands: what they execute, and whom that makes wait or answer."""

    def __init__(self, store: Store, commands: Open) -> None:
        self.store, self.open = store, commands
        self.starting, self.callers = threading.Lock(), dict[str, Caller]()

    def start(self, order: Record, key: str, caller: Caller, waits: bool) -> Record:
        """Return the command that *order* becomes, or is already; raise Unavailable or Unexecuted.

        One whose caller *waits* has a mark by which it is found by a caller who was cut off.
        """
        with self.starting:
            marks = {"queuedBy": caller.name} | ({"orderSha256": caller.sha256} if waits else {})
            command = self.started(order, key, caller) or self.queue(order, key, marks)
            self.callers[command["id"]] = caller
            return command

    def started(self, order: Record, key: str, caller: Caller) -> Record | None:
        """Return what *order* is already: the command of that *key*, or one whose caller hung up before its answer."""
        if key and self.store.get("commands", id_of_key(key)):
            return self.store.change(lambda pen: queue(pen, order, key))[0]
        before = self.store.clock() - REJOIN_S * 1000
        abandoned = {identity for identity, other in [*self.callers.items()] if other.has_hung_up()}
        for identity in abandoned:
            entry = self.store.get("commands", identity)
            if not entry or (entry.content.status in ENDED and entry.content.ended < before):
                self.callers.pop(identity, None)
            elif not key and self.callers[identity].sha256 == caller.sha256:
                return entry.record(identity)
        orphans = (each for identity, each in self.open.look().items() if identity not in self.callers)  # by a restart
        same = (each for each in orphans if each.get("orderSha256") == caller.sha256 and "idempotencyKey" not in each)
        return None if key else next(same, None)

    def leave(self, identity: str, caller: Caller) -> None:
        """Forget the *caller* of an execution, who has the answer; one who hung up may come again for it."""
        if self.callers.get(identity) is caller and not caller.has_hung_up():
            self.callers.pop(identity, None)

    def queue(self, order: Record, key: str, marks: dict[str, str]) -> Record:
        """Queue *order* for the window that is to execute it."""
        windows = self.windows()
        if not windows:
            raise self.unavailable()
        target = window_for(order.get("workspacePath"), windows)
        if len(self.running(windows)) >= EXECUTIONS:
            raise Unexecuted(f"Maximum concurrent commands limit reached ({EXECUTIONS})")
        return self.store.change(lambda pen: queue(pen, order, key, target=target, **marks))[0]

    def windows(self) -> dict[str, Record]:
        """Return what the windows that are there, and take commands, said of themselves, by name."""
        now = self.store.clock()
        here = ((name, agent.said) for name, agent in self.ides() if agent.present(now))
        return {name: said for name, said in here if "kiro_command" in said["types"]}

    def ides(self) -> list[tuple[str, Agent]]:
        return [(name, agent) for name, agent in self.store.agents().items() if agent.said["kind"] == "ide"]

    def unavailable(self, **details: Any) -> Unavailable:
        ides, now = self.ides(), self.store.clock()
        if not ides:
            return Unavailable("Kiro IDE is not running, or not connected", reason="not_running", **details)
        here = [agent.said for _, agent in ides if agent.present(now)]
        off = here and not any("kiro_command" in said["types"] for said in here)
        hint = ": remote control is switched off in it" if off else ""
        return Unavailable(f"Kiro IDE is not responding to commands{hint}", reason="not_responding", **details)

    def running(self, windows: Container[str]) -> list[Record]:
        """Return what one of *windows* executes, or is about to, the oldest first; less what it is to end."""
        commands = [command for command in self.open.look().values() if command["type"] == "kiro_command"]
        running = (each for each in commands if each.get("agent", each.get("target")) in windows)
        return sorted((each for each in running if "cancelRequested" not in each), key=lambda each: each["createdAt"])

    def is_deserted(self, command: Record, status: str) -> bool:
        """Return whether nobody is there any more to take *command*, which has this *status*."""
        target = command.get("target", "")
        return status == "pending" and not is_present(self.store.agent_seen(target), self.store.clock())

    def finish(self, identity: str) -> Record:
        """Return an execution that has ended; cancel one that has not, and raise why."""
        entry = self.store.get("commands", identity)
        if not entry:
            raise Unexecuted("it was removed from the queue before it ended", executionId=identity)
        if entry.content.status in ENDED:
            return entry.record(identity)
        if self.store.closed:
            raise Busy("the service is being stopped; the execution goes on", executionId=identity)
        deserted = self.is_deserted(entry.record(identity), entry.content.status)
        command = self.store.change(lambda pen: give_up_execution(pen, identity, deserted))
        if command["status"] in ENDED:
            return command
        raise execution_timed_out(command)

    def status(self) -> Record:
        """Return what GET /api/kiro/status says."""
        windows = self.windows()
        running = self.running(windows)
        said: Record = {"status": ("busy" if running else "ready") if windows else "unavailable"}
        if not windows:
            refusal = self.unavailable()
            said |= {"reason": refusal.details["reason"], "message": str(refusal)}
        if running:
            said["currentCommand"] = running[0].get("command", "")
        if windows and (version := windows[window_for(None, windows)].get("version")):
            said["version"] = version
        available = {command for window in windows.values() for command in window.get("availableCommands", [])}
        questions = [command for command in self.open.look().values() if command["type"] == "user_input"]
        return {
            **said,
            "availableCommands": sorted(available),
            "timestamp": iso(self.store.clock()),
            "pendingInputs": [shown_question(each) for each in sorted(questions, key=lambda each: each["createdAt"])],
            "executions": [shown_execution(command) for command in running],
        }

    def question(self, said: Record) -> str:
        """Return the id of the question that is meant by what a human *said*: named itself, or by what asked it.

        The latest of those that have ended, if none is open. Raises NotFound, or Conflict if it may be another's.
        """
        execution = said["executionId"]
        self.open.look()
        identities = self.open.questions.get(execution, set()) | {execution}
        entries = ((identity, self.store.get("commands", identity)) for identity in identities)
        asked = {identity: entry.record(identity) for identity, entry in entries if entry}
        asked = {identity: each for identity, each in asked.items() if each["type"] == "user_input"}
        if not asked:
            raise nothing_waits(execution)
        if execution in asked:
            return str(execution)
        waiting = [identity for identity, each in asked.items() if each["status"] not in ENDED]
        before = [each for each in asked.values() if each.get("result") == {"value": meant(each, said)}]
        if len(waiting) > 1 or (waiting and before):
            problem = "more than one question was asked on its behalf; answer this one by its own id"
            raise Conflict(problem, success=False, executionId=execution, questions=waiting)
        return waiting[0] if waiting else max(asked, key=lambda identity: asked[identity]["createdAt"])


class Meter:
    """What each has left of something that refills at a *rate* a second up to *burst*; a debt must be filled up first.

    Of METERED who asked last; for the others it is full.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst, self.guard = rate, burst, threading.Lock()
        self.levels: dict[str, tuple[float, float]] = {}  # and when it was so, s

    def level(self, who: str) -> float:
        level, then = self.levels.get(who, (self.burst, 0))
        return refilled(level, time.monotonic() - then, self.rate, self.burst)

    def pause(self, who: str) -> float:
        """Return in how many seconds there will be something left, 0 if there is."""
        level = self.level(who)
        return 0 if level >= 1 else (1 - level) / self.rate

    def take(self, who: str, amount: float) -> None:
        with self.guard:
            level = self.level(who) - amount
            self.levels.pop(who, None)
            self.levels[who] = level, time.monotonic()
            if len(self.levels) > METERED:
                del self.levels[next(iter(self.levels))]


class Gate:
    """Who comes in: whose token it is, and whether that token, or the address, has asked for too much.

    A token that nobody can guess is let in whatever its address has tried before. Of a shorter one an address that has
    tried too much must wait, unless it came with that very one before: so nobody finds it, and nobody locks it out.
    """

    def __init__(self, keyring: Keyring, places: int) -> None:
        self.keyring, self.places, self.guard = keyring, places, threading.Lock()
        self.tries, self.visits = Meter(TRIES_A_S, TRIES), Meter(VISITS_A_S, VISITS)
        self.requests = {scope: Meter(quota.requests, quota.requests * BURST_S) for scope, quota in QUOTAS.items()}
        self.bytes = {scope: Meter(quota.bytes, quota.bytes * BURST_BYTES_S) for scope, quota in QUOTAS.items()}
        self.came: dict[tuple[str, str], None] = {}  # the address and the sha256 of short tokens that were right
        self.held = collections.Counter[str]()  # requests, by the token's name
        self.refused = 0

    def admit(self, authorization: str, sender: str, scopes: Sequence[str], now: int) -> Token | None:
        """Return who asks for something that *scopes* may, None for what is public; raise why not."""
        secret, home = secret_in(authorization), household(sender)
        token = self.recognize(secret, home) if secret else None
        if token is None:
            self.turn_away(home, secret, scopes)
            return None
        if token.expires <= now:
            raise Unauthorized(f"the token {token.name!r} expired on {iso(token.expires)}")
        self.keyring.saw(token, sender, now)
        self.limit(self.requests[token.scope], token.name, f"the token {token.name!r} has sent too many requests")
        self.limit(self.bytes[token.scope], token.name, f"the token {token.name!r} has moved too many bytes", 0)
        if scopes and token.scope not in scopes:
            raise Forbidden(token.scope, "ask this", scopes)
        return token

    def check_sender(self, authorization: str, sender: str, now: int) -> None:
        """Raise why who asks may not send what is large; who may is let in later, when all of it is there."""
        secret, home = secret_in(authorization), household(sender)
        token = self.recognize(secret, home) if secret else None
        if token is None:
            self.turn_away(home, secret, get_args(Scope))
        elif token.expires <= now:
            raise Unauthorized

    def recognize(self, secret: bytes, home: str) -> Token | None:
        """Return the token that *secret* is, None if it is none, or may only be guessed."""
        short = len(secret) < UNGUESSABLE
        came = home, digest(secret)
        if short and came not in self.came and self.tries.pause(home):
            return None
        token = self.keyring.find(secret)
        if short and token and came not in self.came:
            with self.guard:
                self.came[came] = None
                if len(self.came) > METERED:
                    del self.came[next(iter(self.came))]
        return token

    def turn_away(self, home: str, secret: bytes, scopes: Sequence[str]) -> None:
        """Raise why who has no valid token does not come in; who wants what is public does."""
        if secret or scopes:
            self.refused += 1
            self.limit(self.tries, home, "too many requests without a valid token came from your address")
        if scopes:
            raise Unauthorized
        self.limit(self.visits, home, "too many requests came from your address")

    def limit(self, meter: Meter, who: str, sentence: str, amount: float = 1) -> None:
        """Take *amount* from what *who* has left; raise TooMany if that is nothing."""
        if pause := meter.pause(who):
            raise TooMany(f"{sentence}; try again in {max(1, math.ceil(pause))} s", pause)
        if amount:
            meter.take(who, amount)

    def charge(self, token: Token | None, size: int) -> None:
        """Count *size* bytes that went to or came from who has the *token*."""
        if token and size:
            self.bytes[token.scope].take(token.name, size)

    @contextlib.contextmanager
    def place(self, token: Token | None) -> Iterator[bool]:
        """Say whether there is a place for one more request to be held, for this *token*, and keep it meanwhile."""
        name, most = (token.name, QUOTAS[token.scope].held) if token else ("", 0)
        with self.guard:
            free = self.held.total() < self.places and self.held[name] < most
            self.held[name] += free
        try:
            yield free
        finally:
            with self.guard:
                self.held[name] -= free

    def still(self, token: Token | None, now: int) -> None:
        """Raise Unauthorized if *token*, which was let in, has meanwhile been revoked, or has expired."""
        if token and (token not in self.keyring.known() or token.expires <= now):
            raise Unauthorized


def secret_in(authorization: str) -> bytes:
    """Return the secret that an Authorization names, b"" if it names none."""
    scheme, _, text = authorization.partition(" ")
    return text.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""


def address_in(text: str) -> str:
    """Return the address that *text*, which a proxy may have been told by anyone, is; "unknown" if it is none.

    >>> address_in("192.0.2.1"), address_in("x@10.0.0.1")
    ('192.0.2.1', 'unknown')
    """
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text))
    return "unknown"


def household(sender: str) -> str:
    """Return what is counted as one address: of IPv6 the network, of which whoever has one address has all.

    >>> household("2001:db8::1"), household("192.0.2.1")
    ('2001:db8::/64', '192.0.2.1')
    """
    return str(ipaddress.ip_network(f"{sender}/64", strict=False)) if ":" in sender else sender


class Notifier:
    """Tells someone outside, by HTTP, what a human is to know of (see notice_of); a queue keeps what must wait.

    The address of ntfy, with ntfy+ before it, gets a title and a text; any other the notice as JSON.
    """

    def __init__(self, store: Store, url: str, wanted: Container[str], after_s: float, token: str = "") -> None:
        self.store, self.wanted, self.after_s = store, wanted, after_s
        self.topic = urllib.parse.urlsplit(url).path.strip("/") if url.startswith("ntfy+") else ""
        self.url = urllib.parse.urljoin(url.removeprefix("ntfy+"), "/") if self.topic else url
        self.headers = {"Content-Type": "application/json", "User-Agent": f"kirosync/{__version__}"}
        self.headers |= {"Authorization": f"Bearer {token.strip()}"} if token else {}
        self.waiting: queue_of.Queue[Record] = queue_of.Queue(NOTICES)
        self.counts = collections.Counter({"sent": 0, "failed": 0, "dropped": 0})
        self.opener = urllib.request.build_opener(NoRedirect)

    def consider(self, lines: Iterable[Line]) -> None:
        """Queue what of the changes *lines* a human is to know."""
        for line in lines:
            entry = self.store.get("commands", line.id) if line.kind == "commands" and line.op == "put" else None
            if entry and entry.content.status == line.status:
                event, notice = notice_of(entry.record(line.id), self.after_s)
                if event in self.wanted:
                    self.enqueue(notice)

    def enqueue(self, notice: Record) -> None:
        try:
            self.waiting.put_nowait(notice)
        except queue_of.Full:
            self.counts["dropped"] += 1
            log.warning("%d notifications wait already; that of %s is dropped", NOTICES, notice["commandId"])

    def work(self) -> None:
        """Send what is queued, one after the other, until the store is closed."""
        while not self.store.closed:
            with contextlib.suppress(queue_of.Empty):
                notice = self.waiting.get(timeout=SWEEP_S)
                self.counts["sent" if self.insist(notice) else "failed"] += 1

    def insist(self, notice: Record) -> bool:
        """Send *notice*, and again if that fails; return whether it arrived."""
        problem = ""
        for pause in NOTIFY_PAUSES_S:
            if self.store.closing.wait(pause):
                break
            try:
                self.send(notice)
                return True
            except urllib.error.HTTPError as answer:
                problem = f"it answers {answer.code}"
                if answer.code not in (408, 429) and answer.code < 500:  # the same again will not do better
                    break
            except OSError as error:
                problem = str(error)
            except (ValueError, http.client.HTTPException) as error:  # whose text may show what was sent
                problem = type(error).__name__
        host = urllib.parse.urlsplit(self.url).hostname  # no more of it: an address may be a secret
        log.warning("%s was not notified of %s: %s", host, notice["commandId"], problem)
        return False

    def send(self, notice: Record) -> None:
        body = msgspec.json.encode(as_ntfy(self.topic, notice) if self.topic else notice)
        request = urllib.request.Request(self.url, body, self.headers, method="POST")
        with self.opener.open(request, timeout=NOTIFY_S) as answer:
            answer.read(BLOCK_BYTES)


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows none: what is sent is for the address that was given, and for no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


# HTML and diffs are made in a process of their own, which is this program too: a regular expression keeps all threads
# of its process from running, for as long as a hostile text likes.


class Turn:
    """A lock that those who wait for it get in the order in which they came."""

    def __init__(self) -> None:
        self.queue, self.guard = collections.deque[threading.Event](), threading.Lock()

    def acquire(self, until: float) -> bool:
        """Return whether it was ours before the moment *until* (s, monotonic); at once if nobody has it."""
        mine = threading.Event()
        with self.guard:
            self.queue.append(mine)
            if self.queue[0] is mine:
                return True
        mine.wait(max(0, until - time.monotonic()))
        with self.guard:
            if not mine.is_set():
                self.queue.remove(mine)
            return mine.is_set()

    def release(self) -> None:
        with self.guard:
            self.queue.popleft()
            if self.queue:
                self.queue[0].set()


class Renderer:
    """A process that makes what is shown of a text: without secrets, with little memory and little time.

    It is started when there is something to do, replaced when that took too long, and ended when there was nothing for
    a while. It ends by itself when this process does.
    """

    command = (sys.executable, "-B", __file__, "render")
    environment = {"PATH": os.defpath, "LANG": "C.UTF-8"}

    def __init__(self) -> None:
        self.turn, self.used, self.told = Turn(), 0.0, ""
        self.turns = collections.defaultdict[str, Turn](Turn)  # of each who asks
        self.child: subprocess.Popen[bytes] | None = None
        self.complained = -math.inf  # when, s
        self.slow: dict[str, float] = {}  # the sha256 of what was too slow, and when that was, s

    def make_all(self, asker: str, orders: Sequence[Record | None], until: float) -> list[str | None]:
        """Return what becomes of each of *orders* before the moment *until* (s, monotonic); None where nothing does.

        Of one *asker* a list is made at a time, and between two of its texts others have theirs made.
        """
        if not self.turns[asker].acquire(until):
            return [None for _ in orders]
        made, left = list[str | None](), HTML_BYTES
        try:
            for order in orders:
                text = self.make(msgspec.json.encode(order) + b"\n", until) if order else None
                size = len((text or "").encode())
                made.append(text if size <= left else None)
                left -= min(size, left)
        finally:
            self.turns[asker].release()
        return made

    def make(self, order: bytes, until: float) -> str | None:
        """Return what becomes of one *order*, a line; None if that is nothing, or others keep it waiting too long."""
        name, now = digest(order), time.monotonic()
        known = now - self.slow.get(name, -math.inf) < RENDER_AGAIN_S
        if known or until <= now or not self.turn.acquire(until):
            return None
        try:
            if not self.child or self.child.poll() is not None:
                self.start()
            return self.asked(name, order)
        except (OSError, msgspec.DecodeError) as problem:
            self.complain(problem)
            self.end()
            return None
        finally:
            self.used = time.monotonic()
            self.turn.release()

    def asked(self, name: str, order: bytes) -> str | None:
        """Return what the process makes of *order*; what ends it, or is too slow, is remembered by its *name*."""
        try:
            made: str | None = self.ask(order, RENDER_S)
            return made
        except (OSError, msgspec.DecodeError):
            self.slow[name] = time.monotonic()
            for oldest in [*self.slow][:-RENDERED]:
                del self.slow[oldest]
            raise

    def complain(self, problem: Exception) -> None:
        """Say what went wrong, once a minute: who sends hostile texts is not to fill the log."""
        if time.monotonic() - self.complained > RENDER_IDLE_S:
            self.complained = time.monotonic()
            log.warning("a text is shown as it is: the process that renders it %s", problem)

    def start(self) -> None:
        """Start the process; say what it lacks, if it does, once."""
        self.end()
        self.line, theirs = socket.socketpair()
        with theirs:
            self.child = subprocess.Popen(
                self.command,
                stdin=theirs.fileno(),
                stdout=theirs.fileno(),
                stderr=subprocess.DEVNULL,
                env=self.environment,
                cwd="/",
                start_new_session=True,  # Ctrl-C is for us
            )
        self.heard = self.line.makefile("rb")
        if lacks := self.ask(b"", RENDER_START_S):
            if lacks != self.told:
                log.warning("what is written is shown as it is: %s; see requirements-page.txt", lacks)
            self.told = lacks

    def ask(self, order: bytes, seconds: float) -> Any:
        """Return what the process answers to *order*; raise OSError if it does not within *seconds*."""
        self.line.settimeout(seconds)
        try:
            self.line.sendall(order)
            answer = self.heard.readline(2 * HTML_BYTES)
        except TimeoutError:
            raise TimeoutError(f"took more than {seconds:.0f} s") from None
        if not answer.endswith(b"\n"):
            raise ConnectionError("has ended")
        return msgspec.json.decode(answer)

    def rest(self) -> None:
        """End the process if it has had nothing to do for a while."""
        if self.child and time.monotonic() - self.used > RENDER_IDLE_S and self.turn.acquire(0):
            try:
                self.end()
            finally:
                self.turn.release()

    def abandon(self) -> None:
        """End the process even if someone waits for it, who learns so."""
        if child := self.child:
            child.kill()

    def end(self) -> None:
        if self.child:
            self.child.kill()
            self.child.wait()
            self.heard.close()
            self.line.close()
            self.child = None


def answer_renderer(orders: IO[bytes], answers: IO[bytes]) -> None:
    """Answer each line of *orders* by one: what became of it, null if that is nothing. The first says what is lacking.

    Before it reads anything it gives up all but what that takes.
    """
    works: dict[str, Callable[[Record], str | None]] = {"diff": lambda order: fine_diff(*order["texts"])}
    try:
        painter, lacks = Painter(), ""
        works |= {"markdown": painter.markdown, "code": painter.code}
    except Exception as error:  # it is not there, or not whole, as a library may be
        lacks = str(error) or type(error).__name__
    confine()
    answers.write(msgspec.json.encode(lacks) + b"\n")
    answers.flush()
    for line in orders:
        signal.alarm(math.ceil(RENDER_S) + 1)  # which ends it, should there be nobody left to do so
        answers.write(msgspec.json.encode(outcome_of(works, msgspec.json.decode(line))) + b"\n")
        answers.flush()
        signal.alarm(0)


def outcome_of(works: dict[str, Callable[[Record], str | None]], order: Record) -> str | None:
    """Return what the work that *order* names makes of it; None if there is none, or that cannot be shown."""
    work = works.get(order["as"])
    try:
        made = work(order) if work else None
    except Exception:  # of a library, whatever it is: too deep, or too much memory
        return None
    return made if made is not None and len(made.encode()) <= HTML_BYTES else None


def confine() -> None:
    """Leave this process the memory and the rights that rendering takes."""
    for option, value in ((PR_SET_DUMPABLE, 0), (PR_SET_NO_NEW_PRIVS, 1)):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
    limits = {resource.RLIMIT_AS: RENDER_MEMORY, resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: 0}
    limits |= {resource.RLIMIT_NPROC: 0}  # which root does not heed
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 4, 38  # prctl(2)
LIBRARIES = ("markdown_it", "nh3", "pygments", "pygments.formatters", "pygments.lexers", "pygments.util")


class Painter:
    """Makes HTML, by libraries that are there only where requirements-page.txt was installed."""

    def __init__(self) -> None:
        markdown_it, nh3, self.pygments, *_ = map(importlib.import_module, LIBRARIES)
        self.format = self.pygments.formatters.HtmlFormatter(nowrap=True)
        self.parser = markdown_it.MarkdownIt("js-default", {"highlight": self.fenced})
        self.parser.add_render_rule("image", shown_image)
        self.parser.core.ruler.push("addresses", link_addresses)
        classes = {"span": {"class": {*filter(None, self.pygments.token.STANDARD_TYPES.values())}}}
        self.clean_code = partial(nh3.clean, tags={"span"}, attributes={}, tag_attribute_values=classes)
        self.clean = partial(
            nh3.clean,
            **{"tags": TAGS, "attributes": ATTRIBUTES, "attribute_filter": attribute, "url_schemes": SCHEMES},
            **{"tag_attribute_values": classes | {"th": ALIGN, "td": ALIGN}},
            **{"set_tag_attribute_values": {"a": {"target": "_blank"}}, "link_rel": "noopener noreferrer nofollow"},
        )

    def markdown(self, order: Record) -> str | None:
        """Return what "text" looks like; None if it is nested deeper than the parser goes: the rest would be hidden."""
        tokens = self.parser.parse(order["text"])
        if max((token.level for token in tokens), default=0) >= self.parser.options["maxNesting"] - 1:
            return None
        for token in tokens:
            if style := token.attrs.pop("style", ""):  # of a cell; no style is let through
                token.attrs["align"] = style.removeprefix("text-align:")
        return str(self.clean(self.parser.renderer.render(tokens, self.parser.options, {})))

    def code(self, order: Record) -> str:
        """Return what "text" looks like in its "language", or else by its "path"; a line for each of its lines."""
        text = order["text"].replace("\r\n", "\n").replace("\r", "\u240d")
        shown = self.coloured(text, order.get("language", ""), order.get("path", ""))
        made = self.clean_code(shown if shown is not None else html.escape(text))
        return made if made.count("\n") == text.count("\n") else html.escape(text)

    def fenced(self, text: str, language: str, _: str) -> str:
        return self.coloured(text, language) or ""

    def coloured(self, text: str, language: str, path: str = "") -> str | None:
        """Return *text* in spans, None if nobody knows its language."""
        find = self.pygments.lexers
        for known, name in ((find.get_lexer_by_name, language), (find.get_lexer_for_filename, path)):
            with contextlib.suppress(self.pygments.util.ClassNotFound):
                lexer = known(name, stripnl=False, ensurenl=False)
                made = str(self.pygments.highlight(text, lexer, self.format))
                return made if text.endswith("\n") else made.removesuffix("\n")
        return None


def link_addresses(state: Any) -> None:
    """Make the addresses in the text of Markdown links; its library wants another one for that."""
    for block in state.tokens:
        made, depth = list[Any](), 0
        for token in block.children or ():
            depth += token.nesting if token.type.startswith("link_") else 0
            made += linked(token) if token.type == "text" and not depth and "://" in token.content else [token]
        block.children = made if block.children else block.children


def linked(token: Any) -> Iterator[Any]:
    """Yield the tokens that a text *token* becomes."""
    for text, is_address in addresses_in(token.content):
        if is_address:
            yield type(token)("link_open", "a", 1, attrs={"href": text})
        yield type(token)("text", "", 0, content=text)
        if is_address:
            yield type(token)("link_close", "a", -1)


def shown_image(_: Any, tokens: Sequence[Any], place: int, *__: Any) -> str:
    """Return an image of Markdown as a link to it, or, within a link, its text: none is fetched unasked."""
    image = tokens[place]
    text = html.escape(image.content or "image")
    if sum(token.nesting for token in tokens[:place] if token.type.startswith("link_")):
        return text
    return f'<a href="{html.escape(str(image.attrs.get("src", "")))}">{text}</a>'


class Service:
    """The routes, and the one plugin through which every request passes: token, errors, request id."""

    name, api = "kirosync", 2  # as Bottle wants a plugin to be

    def __init__(
        self,
        store: Store | None,
        keyring: Keyring,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        threads: int = THREADS,
        execute_s: float = EXECUTE_S,
    ) -> None:
        self.keyring, self.host, self.port, self.execute_s = keyring, host, port, execute_s
        self.started, self.listening = time.monotonic(), 0
        self.opened: Store | None = None
        self.audit: Audit | None = None
        self.notifier: Notifier | None = None
        self.accounting = threading.Lock()
        if store:
            self.begin(store)
        self.name_of_run = secrets.token_hex(4)  # and a number make the id of a request: no system call for each
        self.requests = itertools.count(1)
        self.gate = Gate(keyring, places=max(0, threads - max(2, threads // 4)))
        self.counts = collections.Counter[tuple[str, str, int]]()  # of requests: method, path of the route, status
        self.counting = threading.Lock()
        self.answered, self.writing = collections.deque[Answered](), threading.Lock()  # for the access log
        self.door, self.last_left = threading.Lock(), 0.0
        self.spool, self.work = Room(SPOOL_BYTES), Room(WORK_BYTES)
        self.doors: list[Door] = []
        self.renderer = Renderer()
        self.app: Any = bottle.Bottle()
        self.app.config["json.enable"] = False  # JSON is made here
        self.app.config["catchall"] = False  # answer() catches; beyond it a failure is waitress's to report
        self.app.default_error_handler = self.unrouted
        self.app.install(self)
        for route in ROUTES:
            self.app.route(route.path, route.method, getattr(self, route.handler), declared=route)

    def begin(self, store: Store, audit: Audit | None = None, notifier: Notifier | None = None) -> None:
        """Answer from *store* from now on, enter its changes in *audit*, and tell them to *notifier*.

        Until then who asks is told to come again.
        """
        self.audit, self.notifier = audit, notifier
        self.told, self.open, self.listening = Told(store), Open(store), store.clock()
        self.editors = Editors(store, self.open)
        self.opened = store

    def close(self) -> None:
        """End what goes on beside the requests, and write down what still waits for that."""
        self.renderer.abandon()
        self.write_access()
        if self.opened:
            self.opened.close()
            self.account()
            with contextlib.suppress(OSError):  # the last minute of it may be missing
                self.save_use()

    @property
    def store(self) -> Store:
        if self.opened is None:
            raise Busy("the state directory is still being read; try again in a moment")
        return self.opened

    def apply(self, handler: Callable[..., Any], route: Any) -> Callable[..., Any]:
        declared: Route = route.config["declared"]
        path, asks = readable(declared.path), {each.argument: each for each in declared.asks}

        def ask(**places: str) -> Any:
            bottle.request.environ["kirosync.route"] = declared
            return self.answer(lambda: handler(**places, **arguments_of(asks)), declared.scopes, path)

        return ask

    def unrouted(self, error: Any) -> Any:
        """Answer what Bottle could not route: 404 and 405, for who has a token, or asks of what is public."""

        def refuse() -> None:
            method, path = bottle.request.method, bottle.request.path
            if error.status_code == 405:
                allowed = error.get_header("Allow", "")
                raise NotAllowed(f"{method} is not for {path}; possible: {allowed}", allowed=allowed.split(","))
            raise NotFound(f"there is no {path}; GET /docs lists what there is")

        public = any(route.path == bottle.request.path for route in ROUTES if not route.scopes)
        return self.answer(refuse, PUBLIC if public else LOOK)

    def answer(self, handler: Callable[[], Any], scopes: Sequence[str], path: str = "") -> Any:
        """Return the body, bytes or a file, of what *handler* answers or raises, and set the status and the headers.

        It is asked for by who has one of *scopes*; *path* is that of its route.
        """
        request, response, began = bottle.request, bottle.response, time.monotonic()
        identity = header("X-Request-Id")
        if not re.fullmatch(r"[\w.-]{1,64}", identity, re.ASCII):
            identity = f"{self.name_of_run}-{next(self.requests)}"
        response.set_header("X-Request-Id", identity)
        response.content_type = "application/json"
        try:
            self.let_in(scopes)
            check_path(request.environ.get("bottle.raw_path", ""))
            body = self.reserved(handler())
        except Refusal as refusal:
            response.status = refusal.status
            for name, value in refusal.headers.items():
                response.set_header(name, value)
            body = refusal.body() | ({"timestamp": iso(time.time() * 1000)} if isinstance(refusal, Coded) else {})
        except Exception:  # a defect of ours: the caller learns where to look, the log learns what
            log.exception("request %s: %s %s failed", identity, request.method, request.path)
            response.status = 500
            body = {"error": "Internal Server Error", "message": "see the log for this request", "requestId": identity}
        finally:
            self.put_away()
        if hasattr(body, "read"):  # a file: Bottle hands it on
            self.note(path, int(response.headers["Content-Length"]), began)
            return body
        pieces = pieces_of(body)
        ends = [*itertools.accumulate(map(len, pieces))] or [0]
        self.note(path, ends[-1], began)
        return self.send(pieces, ends)

    def reserved(self, body: Any) -> Any:
        """Return *body* with room for what is to be set aside of it until the client has read it.

        Raises Busy if there is none, but not once something may have been changed: that is to be told, and waited for.
        """
        channel = bottle.request.environ.get("kirosync.channel")
        if hasattr(body, "read") or not channel or bottle.request.method == "HEAD":
            return body
        pieces = pieces_of(body)
        if (size := sum(map(len, pieces))) > SMALL_BYTES:
            asks = bottle.request.method == "GET"
            if not channel.reserve(min(size, SPOOL_BYTES), 0 if asks else LOCK_S) and asks:
                raise Busy("too many large answers are being read at the same time; ask again")
        return pieces

    def let_in(self, scopes: Sequence[str]) -> None:
        """Note who asks; raise why they may not ask what *scopes* may."""
        environ, sender = bottle.request.environ, address_in(str(bottle.request.environ.get("REMOTE_ADDR", "")))
        token = self.gate.admit(header("Authorization"), sender, scopes, time.time_ns() // 1_000_000)
        environ["kirosync.token"] = token
        BY.set(f"{token.name}@{sender}" if token else f"nobody@{sender}")

    @property
    def asker(self) -> Token:
        """Who asks, for what is not public."""
        token: Token | None = bottle.request.environ["kirosync.token"]
        if token is None:
            raise Unauthorized
        return token

    def note(self, path: str, size: int, began: float) -> None:
        """Count an answer of *size* bytes to what was asked of the route *path*, and enter it in the access log."""
        request, status = bottle.request, bottle.response.status_code
        with self.counting:
            self.counts[request.method if path else "", path, status] += 1
        token, received = request.environ.get("kirosync.token"), max(0, request.content_length)
        self.gate.charge(token, size + received)
        if access.isEnabledFor(logging.INFO) and (token or status != 429):  # a flood is counted, not written down
            identity, name = bottle.response.get_header("X-Request-Id"), token.name if token else ""
            asked = request.environ.get("REMOTE_ADDR", ""), request.method, request.path[:PATH_CHARACTERS]
            took = round((time.monotonic() - began) * 1000)
            self.answered.append(Answered(time.time() * 1000, identity, name, *asked, status, size, received, took))
            if len(self.answered) >= ACCESS_LINES:
                self.write_access(wait=False)

    def write_access(self, wait: bool = True) -> None:
        """Enter in the access log what was answered since the last time; if others do, that is enough, or *wait*."""
        if self.writing.acquire(blocking=wait):
            try:
                if lines := [self.answered.popleft().line() for _ in range(len(self.answered))]:
                    access.info(b"\n".join(lines).decode())
            finally:
                self.writing.release()

    def send(self, pieces: list[bytes], ends: list[int]) -> bytes | Iterator[bytes]:
        """Return what is to be sent of a body in *pieces*: compressed if that is wanted; if it is long, in blocks."""
        response, size = bottle.response, ends[-1]
        response.add_header("Vary", "Accept-Encoding")
        wanted = size >= GZIP_BYTES and bottle.request.method != "HEAD"
        compress = wanted and ACCEPTS_GZIP.search(header("Accept-Encoding"))
        if compress:
            response.set_header("Content-Encoding", "gzip")
        if size <= BLOCK_BYTES:
            return b"".join(gzipped(pieces) if compress else pieces)
        if not compress:
            response.set_header("Content-Length", str(size))
        parts = blocks(pieces, ends)
        return gzipped(parts) if compress else parts

    def check_sender(self, authorization: str, sender: str) -> None:
        """Raise why who says so, each byte a character, may not send what is large; *sender* is an address."""
        self.gate.check_sender(authorization, sender, time.time_ns() // 1_000_000)

    # What a request says

    def body(self) -> Record:
        """Return the JSON object that was sent, which is what the route takes; raise NotJson, TooLarge or Malformed."""
        kind = header("Content-Type").partition(";")[0].strip().lower()
        if kind not in ("", "application/json") and not kind.endswith("+json"):
            raise NotJson(f"the body is {kind}; send JSON, with Content-Type: application/json")
        raw = self.raw()
        if not raw.strip():
            raise Malformed("", "the body is empty; a JSON object belongs there")
        gc.disable()  # it would look again and again at what is made: 8 s instead of one, in which nobody is answered
        try:
            sent = check(dict[str, Any], parse(raw), "")
        except Malformed as problem:
            raise Malformed("", f"the body is no JSON object: {problem}") from None
        finally:
            gc.enable()
        return bottle.request.environ["kirosync.route"].takes.checked(sent)  # type: ignore[no-any-return]

    def raw(self) -> bytes:
        """Return the bytes that were sent, with room to work on them until put_away(); raise TooLarge or Busy."""
        length, environ = max(0, bottle.request.content_length), bottle.request.environ
        if length > BODY_BYTES:
            raise TooLarge(f"the body has {length} bytes, {BODY_BYTES} are possible", limit=BODY_BYTES)
        if not self.work.take(length, LOCK_S):
            raise Busy("too many large bodies were sent at the same time; send it again")
        environ["kirosync.work"] = length
        return environ["wsgi.input"].read(length)  # type: ignore[no-any-return]

    def put_away(self) -> None:
        """Give back the room that the work on a body took."""
        if length := bottle.request.environ.pop("kirosync.work", 0):
            self.work.give(length)

    def hold(
        self,
        ready: Callable[[], Any],
        seconds: float,
        topics: Sequence[tuple[str, ...]],
        pause: float = GONE_S,
        in_turn: bool = False,
    ) -> bool:
        """Return when *ready* says so, or after *seconds*; at once, and False, if too many requests are held already.

        It is asked at every change of the *topics* (see Store.wait), and after every *pause* (s). Those held *in_turn*
        leave one after the other: many who wait for the same are not to crowd out who asks.
        """
        until = time.monotonic() + seconds
        if seconds <= 0:
            return True
        channel = bottle.request.environ.get("kirosync.channel")
        with self.gate.place(bottle.request.environ.get("kirosync.token")) as free:
            if not free:
                return False
            self.put_away()
            with channel.parked() if channel else contextlib.nullcontext():
                if self.wait_until(ready, until, topics, pause, channel) and in_turn:
                    with self.door:
                        time.sleep(max(0.0, self.last_left + PACE_S - time.monotonic()))
                        self.last_left = time.monotonic()
        return True

    def wait_until(
        self, ready: Callable[[], Any], until: float, topics: Sequence[tuple[str, ...]], pause: float, channel: Any
    ) -> bool:
        """Return whether *ready* came to say so, after a wait, before the moment *until* or the *channel* ended."""
        waited = False
        while not self.store.closed and (left := until - time.monotonic()) > 0:
            revision = self.store.revision
            self.gate.still(bottle.request.environ.get("kirosync.token"), time.time_ns() // 1_000_000)
            if ready():
                return waited
            if channel and channel.has_hung_up():
                return False
            self.store.wait(revision, topics, min(left, pause))
            waited = True
        return False

    # What is answered

    def get_home(self, if_none_match: str) -> Any:
        """The page, for a browser, if console.html is there beside kirosync.py; else what the service is, as JSON."""
        bottle.response.add_header("Vary", "Accept")
        if "text/html" in header("Accept"):
            with contextlib.suppress(OSError):  # it is not there, or not for us
                return self.page(console_page(stamp_at(CONSOLE)), if_none_match)
        return {"service": "kirosync", "version": __version__, "docs": "/docs", "health": "/health"}

    def page(self, page: Page, known: str) -> bytes:
        """Answer with *page*, or that it is as the browser knows it, by the *known* tag."""
        bottle.response.content_type = "text/html; charset=utf-8"
        for name, value in {**PAGE_HEADERS, "Content-Security-Policy": page.policy, "ETag": page.tag}.items():
            bottle.response.set_header(name, value)
        if page.tag in known:
            bottle.response.status = 304
            return b""
        return page.body

    def get_docs(self, if_none_match: str) -> bytes:
        """This documentation."""
        host = header("Host")  # which will be pasted into a shell
        shown = host if re.fullmatch(r"[\w.:\[\]-]{1,255}", host, re.ASCII) else "HOST"
        return self.page(page_of(docs_page().replace(HOST.encode(), shown.encode())), if_none_match)

    def get_openapi(self) -> bytes:
        """The routes, for programs: an OpenAPI 3.1 document."""
        return openapi()

    def get_health(self) -> Record:
        """Whether the service is well: {status, timestamp, server: {running, port, host, uptime in s}}.

        It is unhealthy, and the status code 503, while it reads its state directory, where that cannot be written or is
        nearly full, and when a command has waited for a minute that no agent is there to take: "problem" says which,
        and "ready" whether at least the service itself can work.
        Who brings a token learns more: queue: {pending, processing, oldestPendingMs}, agents: {name: {kind,
        present, lastSeen}}, and of the token its {name, scope, expiresAt?}.
        """
        now, hindrance = self.opened.clock() if self.opened else time.time() * 1000, self.hindrance()
        problem = hindrance or self.neglect()
        server = {"running": True, "port": self.port, "host": self.host, "uptime": self.uptime()}
        said: Record = {"status": "unhealthy", "problem": problem} if problem else {"status": "healthy"}
        said["ready"] = not hindrance
        bottle.response.status = 503 if problem else 200
        asker: Token | None = bottle.request.environ["kirosync.token"]
        more = {**self.overview(), "token": asker.shown()} if self.opened and asker else {}
        return {**said, "timestamp": iso(now), "server": server, **more}

    def uptime(self) -> float:
        return round(time.monotonic() - self.started, 3)

    def hindrance(self) -> str:
        """Return what keeps the service from its work, "" if nothing does."""
        if not self.opened:
            return "starting"
        if self.store.trouble:
            return self.store.trouble
        space = judge_space(*self.store.room())
        return f"the disk is nearly full: {space.sentence}" if space.level == "bad" else ""

    def neglect(self) -> str:
        """Return what the service has work for, and nobody there to do it, "" if there is somebody."""
        untaken = self.untaken()
        return f"nobody takes commands: {untaken} wait for agents that are not there" if untaken else ""

    def untaken(self) -> int:
        """Return how many commands have waited for UNTAKEN_S, while no agent is there to take them."""
        now = self.store.clock()
        waiting = [each for each in self.open.look().values() if each["status"] == "pending"]
        old = [each for each in waiting if each["createdAt"] < now - UNTAKEN_S * 1000 and each["type"] not in ASKED]
        here = {name: agent.said for name, agent in self.store.agents().items() if agent.present(now)} if old else {}
        return sum(not any(would_take(name, said, each) for name, said in here.items()) for each in old)

    def overview(self) -> Record:
        """Return what waits, what is being executed, and who was seen when."""
        now, agents = self.store.clock(), self.store.agents()
        commands = self.open.look().values()
        waiting = [command for command in commands if command["status"] == "pending"]
        oldest = max((now - command["createdAt"] for command in waiting), default=None)
        queue = {"pending": len(waiting), "processing": len(commands) - len(waiting), "oldestPendingMs": oldest}
        seen = {
            name: {"kind": agent.said["kind"], "present": agent.present(now), "lastSeen": iso(agent.seen)}
            for name, agent in agents.items()
        }
        return {"queue": queue, "agents": seen}

    def get_metrics(self) -> bytes:
        """What can be counted and measured, in the text format of Prometheus."""
        bottle.response.content_type = "text/plain; version=0.0.4; charset=utf-8"
        said = self.overview()
        queue, kinds = (
            said["queue"],
            collections.Counter((a["kind"], str(a["present"]).lower()) for a in said["agents"].values()),
        )
        free, files = self.store.room()
        entries = {kind: [*self.store.all(kind).values()] for kind in KINDS}
        figures: list[tuple[str, str, Iterable[tuple[Record, float]]]] = [
            ("info", "gauge", [({"version": __version__}, 1)]),
            ("healthy", "gauge", [({}, int(not (self.hindrance() or self.neglect())))]),
            ("uptime_seconds", "gauge", [({}, self.uptime())]),
            ("revision", "counter", [({}, self.store.revision)]),
            ("records", "gauge", [({"kind": kind}, len(known)) for kind, known in entries.items()]),
            ("bytes", "gauge", [({"kind": k}, sum(e.stamp[2] for e in known)) for k, known in entries.items()]),
            ("commands_open", "gauge", [({"status": each}, queue[each]) for each in ("pending", "processing")]),
            ("oldest_pending_seconds", "gauge", [({}, (queue["oldestPendingMs"] or 0) / 1000)]),
            ("agents", "gauge", [({"kind": k, "present": p}, count) for (k, p), count in sorted(kinds.items())]),
            ("disk_free_bytes", "gauge", [({}, free)]),
            ("disk_free_files", "gauge", [({}, files)]),
            ("requests_held", "gauge", [({}, self.gate.held.total())]),
            ("audit_lines_total", "counter", [({}, self.audit.known.seq if self.audit else 0)]),
            (
                *("notifications_total", "counter"),
                [({"result": each}, n) for each, n in (self.notifier.counts if self.notifier else {}).items()],
            ),
            ("requests_without_valid_token_total", "counter", [({}, self.gate.refused)]),
            (
                *("requests_total", "counter"),
                [({"method": m, "path": p, "status": s}, n) for (m, p, s), n in sorted(self.counts.copy().items())],
            ),
        ]
        return "".join(itertools.starmap(exposed, figures)).encode()

    def get_sync(
        self, *, since: str | None, wait: float, only: list[str], status: list[str], agent: str, if_none_match: str
    ) -> list[bytes]:
        """All conversations, documents and commands, with lastUpdate and a cursor.

        ?since=CURSOR gives what changed after it: of a conversation the new messages, and in "deleted"
        {kind: [ids]}. Take out what is deleted, merge the rest into your copy, and it is the server's
        state. A cursor that is not known here gives everything, and "full": true. &wait=SECONDS holds
        the answer until something changes. ?only=commands,documents and ?status=pending,processing
        filter. The ETag, sent back as If-None-Match, gives 304 when nothing has changed. &agent=NAME says who asks:
        an agent that is there for as long as it does.
        """
        agent = agent and check_id(agent, "agent")
        kinds = only or [kind for kind in KINDS if kind in GRANTS[self.asker.scope].reads]
        for kind in kinds:
            self.asker.may(f"read {kind}", "reads", kind)
        if agent:
            self.permit_agent(agent)
        if since and wait:

            def ready() -> bool:
                self.store.refresh()
                return self.saw(agent) and self.store.known_after(since, kinds).touches(kinds, status)

            self.hold(ready, wait, [(kind,) for kind in kinds], in_turn=not status)
        self.saw(agent)
        self.store.refresh()
        if (tag := f'W/"{self.store.cursor}"') in if_none_match:
            bottle.response.status = 304
            bottle.response.set_header("ETag", tag)
            return []
        delta = self.store.known_after(since, kinds)
        if "commands" in kinds and not status and bottle.request.method == "GET":
            self.told.up_to(delta.since or delta.revision)
        bottle.response.set_header("ETag", f'W/"{delta.cursor}"')
        return show(delta, self.store.last_update, self.store.clock(), kinds, status)

    def post_sync(self, since: str | None) -> list[bytes]:
        """Merge what is sent, the whole state or a part of it: {"status": "updated" | "current", "data": state}.

        "updated" if the lastUpdate sent is later than the server's, which then becomes the one sent. The
        records are merged in both cases: no message is dropped because of a clock. With ?since=CURSOR the
        data is what changed after it, and what became of that which was sent.
        """
        push, asker = self.body(), self.asker
        known = self.store.entries["commands"]
        new = [each for identity, each in push.get("commands", {}).items() if identity not in known]
        self.check_open(sum(each["status"] not in ENDED for each in new))
        status = self.store.change(lambda pen: take_push(pen, push, asker))
        delta = self.store.delta(since)
        self.told.up_to(delta.since or delta.revision)
        for kind in KINDS:
            for identity in push.get(kind, {}) if delta.since else ():
                if entry := self.store.get(kind, identity):
                    delta.changed[kind][identity] = entry
                elif identity not in delta.deleted[kind]:
                    delta.deleted[kind].append(identity)
        state = show(delta, self.store.last_update, self.store.clock(), KINDS)
        return [b'{"status":"%s","data":' % status.encode(), *state, b"}"]

    def saw(self, agent: str | None) -> bool:
        """Note that an *agent* is there, if one is named; return True."""
        if agent:
            self.store.saw(agent)
        return True

    def permit(self, what: str, right: str, identity: str) -> Record:
        """Return the command if who asks may do *what* (see GRANTS) with its type; raise Forbidden or NotFound."""
        command = existing("commands", self.store.get("commands", identity)).record(identity)
        self.asker.may(f"{what} {command['type']}", right, command["type"])
        return command

    def permit_agent(self, name: str, kind: str | None = None) -> None:
        """Raise Forbidden unless who asks may speak for the agent *name*, as what it is, and as that *kind*."""
        known = self.store.agent(name)
        kinds = {known.said["kind"] if known else None, kind} - {None}
        for each in kinds or GRANTS[self.asker.scope].announces[:1] or ("agent",):
            self.asker.may(f"speak for an agent of the kind {each}", "announces", str(each))

    def check_open(self, more: int) -> None:
        """Raise TooMany if who asks would have more commands open than they may, with *more*."""
        most, known = QUOTAS[self.asker.scope].open, self.open.look()
        if not more or len(known) + more <= most:
            return
        mine = sum(each.get("queuedBy") == self.asker.name for each in known.values())
        if mine + more > most:
            sentence = (
                f"the token {self.asker.name!r} has {mine} commands open; with {more} more it would be above {most}"
            )
            raise TooMany(sentence, OPEN_PAUSE_S)

    def key(self, idempotency_key: str) -> str:
        """Return the key under which a command is remembered, "" if there is none: each who asks has their own."""
        own = self.asker.name == MASTER or not idempotency_key
        return idempotency_key if own else f"{self.asker.name}:{idempotency_key}"

    def post_command(self, wait: float, idempotency_key: str) -> Any:
        """Queue a command: {"commandId", "status": "pending"}. ?wait=SECONDS answers when it has ended.

        With a header Idempotency-Key it can be sent again without harm: for as long as the command is kept, the
        same key with the same body answers as that command stands, and with another body 422.
        """
        order, key, asker = self.body(), self.key(idempotency_key), self.asker
        asker.may(f"queue {order['type']}", "queues", order["type"])
        self.check_open(0 if key and self.store.get("commands", id_of_key(key)) else 1)
        command, known = self.store.change(partial(queue, order=order, key=key, queuedBy=asker.name))
        if known:
            bottle.response.set_header("Idempotent-Replayed", "true")
        identity, status = command["id"], command["status"]
        del order, command  # which may be large, while it is waited for
        if wait:
            self.hold_until_ended(identity, wait)
        entry = self.store.get("commands", identity) if wait else None
        shown = self.tell(identity, entry).record(identity) if entry else {"status": status}
        return {"commandId": identity, **without(shown, "id")}

    def get_commands(self, status: list[str], type: list[str], limit: int) -> Record:
        """{"commands": {id: command}}, the latest first. ?status=, ?type= and ?limit= (100) choose."""
        entries = sorted(self.store.all("commands").items(), key=lambda item: -item[1].revision)
        wanted = ((identity, entry) for identity, entry in entries if not status or entry.content.status in status)
        records = ((identity, self.tell(identity, entry).content.record()) for identity, entry in wanted)
        chosen = ((identity, command) for identity, command in records if not type or command["type"] in type)
        return {"commands": dict(itertools.islice(chosen, limit))}

    def get_command(self, identity: str, wait: float) -> bytes:
        """The command as it stands. ?wait=SECONDS answers when it has ended, or with its state by then."""
        self.hold_until_ended(identity, wait)
        return self.tell(identity, existing("commands", self.store.get("commands", identity))).newer()

    def tell(self, identity: str, entry: Entry) -> Entry:
        """Return *entry*, which someone is about to read."""
        self.told.of(identity, entry)
        return entry

    def patch_command(self, identity: str) -> Record:
        """Report on a command; the answer is all of it.

        {"status": "processing"} claims it: one gets it, the others 409. With "agent" and "lease" (s) the
        claim is lost unless it is renewed in time. {"status": "completed" | "failed", "result", "error"}
        ends it. A command that has ended stays as it is: the same report again is 200, another 409.
        """
        patch = self.body()
        self.permit("take", "takes", identity)
        agent = str(patch.get("agent", "")) if GRANTS[self.asker.scope].announces else ""
        if agent:
            self.permit_agent(agent)
        changed = self.store.change(lambda pen: report(pen, identity, patch))
        self.saw(agent)
        return without(changed, "id")

    def post_cancel(self, identity: str) -> Record:
        """Cancel a command; the answer is all of it. One that is pending ends at once.

        For one that is being executed the answer has "cancelRequested": its agent ends all that it has started, by
        INT, after 2 s TERM, after 5 s more KILL, and reports the outcome: cancelled, or ok if it was done before.
        """
        self.permit("cancel", "queues", identity)
        return without(self.store.change(lambda pen: cancel_command(pen, identity)), "id")

    def get_output(self, identity: str, stream: str, offset: int, tail: int | None, wait: float) -> Any:
        """What a command has printed so far, as bytes: of ?stream=stdout, stderr, or stdin (what was sent to it).

        From ?offset=N on, or the last ?tail=N bytes. ?wait=SECONDS answers when there is any, or it has ended.
        The header X-Output-Next is the offset to go on at; with X-Output-End: true there will be no more. The first
        64 MiB are kept: X-Output-Truncated: true says that there was more, of which the result has the end.
        """

        def ready() -> bool:
            entry = self.store.get("commands", identity)
            return entry is None or entry.content.status in ENDED or self.store.extent(identity, stream) != offset

        self.hold(ready, wait, [("commands", identity)], OUTPUT_POLL_S)
        command = existing("commands", self.store.get("commands", identity)).record(identity)
        size = self.kept(command, stream)
        start = offset if tail is None else max(0, size - tail)
        if start > size:
            raise Malformed("offset", f"there are {size} bytes of {stream}")
        cut = size >= OUTPUT_BYTES or size < size_told_by(command, stream)
        headers = {
            "X-Output-Truncated": cut,
            "X-Output-Offset": start,
            "X-Output-Next": size,
            "X-Output-End": command["status"] in ENDED,
        }
        for name, value in {**headers, "X-Command-Status": command["status"]}.items():
            bottle.response.set_header(name, str(value).lower())
        bottle.response.set_header("X-Content-Type-Options", "nosniff")
        bottle.response.content_type = "text/plain; charset=utf-8"
        if stream == "stdin":  # in its file there may be more, which was not acknowledged
            return self.store.read_stream(identity, stream, start, size - start)
        if not self.store.extent(identity, stream):
            return told_by(command, stream)[start:]
        if start == size:
            return b""
        bottle.response.set_header("Content-Length", str(size - start))
        file = open(self.store.stream(identity, stream), "rb")  # noqa: SIM115  the server closes it
        file.seek(start)
        return file

    def kept(self, command: Record, stream: str) -> int:
        """Return how many bytes there are of a stream of *command*: in its file, or else in its result."""
        if stream == "stdin":
            return int(command.get("inputSize", 0))
        return self.store.extent(command["id"], stream) or len(told_by(command, stream))

    def post_output(
        self, identity: str, *, stream: str, offset: int, attempt: int | None, agent: str | None, claim: str | None
    ) -> Record:
        """Add to what a command that is being executed has printed; for agents. The body is bytes: {"size"}.

        ?stream= is stdout or stderr, ?offset= where the bytes belong: sent again they change nothing. With
        ?attempt=, ?agent= and ?claim= they are taken only from who holds the command. 64 MiB are kept.
        """
        command = self.permit("take", "takes", identity)
        if command["status"] != "processing":
            raise Conflict(f"{identity} is {command['status']}: it prints nothing", status=command["status"])
        held = {"agent": agent, "claim": claim, "attempt": attempt}
        check_holder(command, {name: said for name, said in held.items() if said is not None})
        piece = self.raw()
        size = self.store.append(identity, stream, offset, piece)
        return {"size": size, **({"truncated": True} if size < offset + len(piece) else {})}

    def post_input(self, identity: str) -> Record:
        """Send {"data"} to the stdin of a command that was queued with "stdin": true; "close": true ends it.

        The answer is how much was sent by now: {"size", "closed"}. With "offset", where the data belongs (bytes), it
        can be sent again without harm. "encoding": "base64" is for what is no text.
        """
        said = self.body()
        typed = decoded(said.get("data", ""), said.get("encoding", "utf-8"))
        offset, close = said.get("offset"), said.get("close", False)
        command = self.store.change(lambda pen: type_in(pen, identity, typed, offset, close))
        return {"size": command["inputSize"], "closed": command["inputClosed"]}

    def delete(self, kind: str, identity: str) -> Record:
        """Remove a conversation, a document, or a command that is not running.

        It does not come back from who still has a copy; what is newer than its removal does.
        """
        kind += "s"

        def remove(pen: Pen) -> None:
            if existing(kind, pen.get(kind, identity)).get("status") == "processing":
                raise Conflict(f"{identity} is being executed; it can be deleted when it has ended")
            pen.delete(kind, identity, pen.now)

        self.store.change(remove)
        return {"deleted": identity}

    # What a page shows

    def get_conversation(self, identity: str) -> list[bytes]:
        """A conversation: {"messages": [message]}, in the order of their timestamps."""
        entry = existing("conversations", self.store.get("conversations", identity))
        return [b'{"messages":', *entry.content.newer(0), b"}"]

    def get_document(self, identity: str, version: str) -> Any:
        """A document: {"content", "timestamp", ...}. ?version=NAME is one that a merge replaced (see its versions)."""
        entry = existing("documents", self.store.get("documents", identity))
        return entry.content.newer(0) if version == CURRENT else self.store.version(identity, version)

    def get_versions(self, identity: str) -> Any:
        """The versions of a document, the newest first: {"versions": [{"version", "timestamp", "size" in bytes}]}.

        "version" is a name for ?version= and for the diff. The first, "current", is what it is now; the others are what
        a merge replaced, of which the last 20 are kept.
        """
        if self.belongs_to_id("versions"):
            return self.get_document(f"{identity}/versions", VERSION.read(bottle.request.query.getall("version")))
        now = existing("documents", self.store.get("documents", identity)).content.record()
        known = itertools.chain([(CURRENT, now)], self.store.versions(identity))
        return {"versions": [shown_version(name, document) for name, document in known]}

    def get_diff(self, identity: str, from_: str, to: str) -> Any:
        """What changed from one version of a document to another, as a unified diff: {"diff", "from", "to"}.

        ?from=NAME and ?to=NAME are versions; else the newest that a merge replaced, and "current". With "coarse": true
        they differ too much to be compared in time: the diff is one piece, from the first difference to the last.
        """
        if self.belongs_to_id("diff"):
            return self.get_document(f"{identity}/diff", VERSION.read(bottle.request.query.getall("version")))
        now = existing("documents", self.store.get("documents", identity))
        newest = next((name for name, _ in self.store.versions(identity)), CURRENT)
        names = from_ or newest, to
        old, new = (
            str((now.content.record() if name == CURRENT else self.store.version(identity, name))["content"])
            for name in names
        )
        asked = {"as": "diff", "texts": [old, new, *names]}
        fits = len(old.encode()) + len(new.encode()) <= TEXTS_BYTES
        diff = self.rendered([asked if fits else None])[0]
        said = {"from": names[0], "to": names[1]}
        coarse = {"coarse": True} if diff is None else {}
        return {"diff": coarse_diff(old, new, *names) if coarse else diff, **said, **coarse}

    def belongs_to_id(self, word: str) -> bool:
        """Return whether the slash before *word*, the last of the path, was sent encoded, as one of an id is."""
        path = str(bottle.request.environ.get("REQUEST_URI", "")).partition("?")[0]
        before, last = ["/", *re.split("(/|%2f)", path, flags=re.IGNORECASE)][-2:]
        return before != "/" and urllib.parse.unquote(last) == word

    def post_render(self) -> Record:
        """Make HTML of {"texts": [{"text", "as": "markdown" | "code", "language"?, "path"?}]}: {"html": [text | null]}.

        It is safe to show: no script, no style, no image, and links only to http, https and mailto. Code has as many
        lines as the text, in spans of the classes of Pygments. null where none is made: requirements-page.txt is not
        installed, it takes too long, or it has more than 256 KiB, or 2 MiB with those before it. 100 texts at once.
        """
        return {"html": self.rendered(measured(self.body()["texts"]))}

    def rendered(self, orders: Sequence[Record | None]) -> list[str | None]:
        """Return what the renderer makes of each of *orders*, None where it makes nothing; see Renderer."""
        self.put_away()
        with self.gate.place(self.asker) as free:
            return self.renderer.make_all(self.asker.name, orders, time.monotonic() + RENDER_WAIT_S if free else 0)

    def get_agents(self) -> Record:
        """Who executes: {"agents": {name: {kind, types, ..., lastSeen, present}}}; unseen for 15 s one is absent.

        An agent is seen when it announces itself, claims, renews, reports, or asks GET /sync with agent=NAME.
        """
        now = self.store.clock()
        said = {
            name: {**a.said, "lastSeen": int(a.seen), "present": a.present(now)}
            for name, a in self.store.agents().items()
        }
        return {"agents": said}

    def put_agent(self, identity: str) -> Record:
        """Announce an agent, or again that it is there: {"kind": "agent" | "ide", "types": [those it executes]}.

        "version" and more as it likes; an IDE says its "availableCommands", "workspaceFolders" (paths) and, as
        "focusedAt" (ms), when its window was last in front. It replaces what was said before.
        """
        said = self.body()
        self.permit_agent(identity, said["kind"])
        self.store.change(lambda pen: pen.announce(identity, said))
        return {"agent": identity}

    def patch_agent(self, identity: str) -> Record:
        """Change some of what an agent said of itself; {} says that it is there. 404: it must announce itself anew."""
        patch = self.body()
        self.permit_agent(identity, patch.get("kind"))
        if patch:
            self.store.change(lambda pen: pen.announce(identity, {**existing("agents", pen.agent(identity)), **patch}))
        elif not self.store.saw(identity):
            raise NotFound("Agent not found")
        return {"agent": identity}

    def delete_agent(self, identity: str) -> Record:
        """Say that an agent has gone."""
        self.permit_agent(identity)
        if not self.store.change(lambda pen: pen.store.forget(identity)):
            raise NotFound("Agent not found")
        return {"deleted": identity}

    # What an editor executes, and a human answers

    def post_execute(self, prefer: str, idempotency_key: str) -> Record:
        """Have an IDE execute {command, args?: [text], workspacePath?}: {success, output, executionTimeMs}.

        422 if it failed, if 3 are being executed, or if no window has workspacePath open; 503 if no IDE takes commands;
        408 after 300 s, and it is cancelled. "executionId" is the id of the command (see /command/ID). With Prefer:
        respond-async the answer is 202 at once, as it is when too many requests wait. An Idempotency-Key is as for
        POST /command. Without one, the same asked again by who hung up before the answer is not executed again.
        """
        order, key = execution_of(self.kiro_body(), self.execute_s), self.key(idempotency_key)
        self.check_open(1)
        caller = Caller(self.asker.name, digest(canonical(order)), bottle.request.environ.get("kirosync.channel"))
        at_once = "respond-async" in {each.partition(";")[0].strip().lower() for each in prefer.split(",")}
        command = self.editors.start(order, key, caller, not at_once)
        try:
            if at_once or not self.hold_execution(command) or caller.has_hung_up():
                return self.accepted(command["id"], at_once)
            ended = self.editors.finish(command["id"])
            self.told.of(command["id"], existing("commands", self.store.get("commands", command["id"])))
            return execution_result(ended)
        finally:
            self.editors.leave(command["id"], caller)

    def hold_execution(self, command: Record) -> bool:
        """Return when it has ended, its time is over, or the IDE is gone that was to take it; see hold."""
        left = self.execute_s - (self.store.clock() - command["createdAt"]) / 1000

        def ready() -> bool:
            entry = self.store.get("commands", command["id"])
            return not entry or entry.content.status in ENDED or self.editors.is_deserted(command, entry.content.status)

        return self.hold(ready, min(left, self.execute_s), [("commands", command["id"])])

    def accepted(self, identity: str, asked_for: bool) -> Record:
        """Answer at once with the id of an execution that goes on."""
        bottle.response.status = 202
        if asked_for:
            bottle.response.set_header("Preference-Applied", "respond-async")
        entry = existing("commands", self.store.get("commands", identity))
        return {"executionId": identity, "status": entry.content.status}

    def get_kiro_status(self) -> Record:
        """{status: ready | busy | unavailable, currentCommand?, version?, availableCommands, timestamp} of the IDE.

        And "pendingInputs": what waits for a human; "executions": what is being executed: "busy" is while any is; three
        at once are possible. Where the IDE is unavailable, "reason" and "message" say why.
        """
        return self.editors.status()

    def post_kiro_input(self) -> Record:
        """Answer a question: {value, type: text | choice | file | confirmation, executionId}: {success, executionId}.

        The executionId is that of the question (a user_input), or of the execution that asks. 400 if the value does not
        fit; 404 if nothing is waiting; 408 if it has timed out; 409 if it might be the answer to another question of
        that execution. To refuse to answer, cancel the question.
        """
        said = self.kiro_body()
        question = self.editors.question(said)
        self.store.change(lambda pen: answer_question(pen, question, said))
        return {"success": True, "executionId": said["executionId"]}

    def kiro_body(self) -> Record:
        """Return the JSON object that was sent; see body. Raises ValidationFailed where that raises Malformed."""
        try:
            return self.body()
        except Malformed as problem:
            raise ValidationFailed(str(problem), **problem.details) from None

    def hold_until_ended(self, identity: str, seconds: float) -> None:
        """Return when the command has ended, or is not there; or after *seconds*."""

        def ended() -> bool:
            entry = self.store.get("commands", identity)
            return entry is None or entry.content.status in ENDED

        self.hold(ended, seconds, [("commands", identity)])

    def sweep(self) -> None:
        """End the commands that are overdue, as they become so, until the store is closed.

        What is left of a time is counted from when it was seen: a clock that jumps ends nothing.
        """
        due: dict[str, tuple[float, Record]] = {}  # when (s, monotonic), and the command as it was seen
        while not self.store.closed:
            waiting = self.open.look()
            due = {
                i: seen if (seen := due.get(i)) and seen[1] is each else self.due(each) for i, each in waiting.items()
            }
            late = [command for moment, command in due.values() if moment < time.monotonic()]
            idle = [each for each in waiting.values() if self.is_idle_question(each)]
            long = [each for each in waiting.values() if takes_too_long(each, self.store.clock())]
            work = ((late, partial(expire, listening=self.listening)), (idle, withdraw), (long, cancel_all))
            try:
                for commands, rule in work:
                    if commands:
                        self.store.change(partial(rule, commands=commands))
            except Refusal as refusal:
                log.warning("commands that are overdue must wait: %s", refusal)
                self.listening = self.store.clock()  # nor could an agent report
                due = {}
            if self.store.trouble:
                self.store.probe()
            self.store.closing.wait(SWEEP_S)

    def is_idle_question(self, command: Record) -> bool:
        """Return whether *command* asks a human on behalf of what has ended."""
        asking = command["type"] == "user_input" and self.store.entries["commands"].get(str(command.get("executionId")))
        return bool(asking and asking.content.status in ENDED)

    def tend(self) -> None:
        """Keep the journal short and the commands few, until the store is closed."""
        while not self.store.closed:
            for work in (self.compact, self.retire, self.told.save, self.save_use, self.forget_agents):
                try:
                    work()
                except (OSError, Refusal) as error:
                    log.warning("what is old must wait: %s", error)
            self.store.closing.wait(TEND_S)

    def compact(self) -> None:
        self.account()
        self.store.compact(self.audit.place if self.audit else None)

    def keep_account(self) -> None:
        """Account for what changes, as it does, until the store is closed."""
        while not self.store.closing.wait(AUDIT_S):
            self.write_access()
            self.account()
            self.renderer.rest()

    def account(self) -> None:
        """Tell what has changed to who is to be notified, and enter it in the audit log."""
        if not self.audit:
            return
        with self.accounting:
            news = self.audit.look()
            if self.notifier and not self.audit.begins:
                self.notifier.consider(news)
            self.audit.begins = False
            try:
                self.audit.follow()
            except OSError as error:
                log.warning("the audit log must wait: %s", error)

    def save_use(self) -> None:
        """Remember when each token was last used; of those that were revoked nothing."""
        used, known = (
            {**used_in(self.store.directory), **self.keyring.used},
            {each.name for each in self.keyring.known()},
        )
        self.keyring.used = {name: said for name, said in used.items() if name in known}
        self.store.remember("used", msgspec.json.encode(self.keyring.used))

    def forget_agents(self) -> None:
        """Forget the agents that have not been seen for long: a window that has crashed comes with another name."""
        before = self.store.clock() - FORGOTTEN_S * 1000
        for name, seen in self.store.agents_seen().items():
            if seen < before:
                self.store.change(lambda pen, name=name: pen.store.forget(name))  # type: ignore[misc]

    def retire(self) -> int:
        """Move to archive/ what ended long ago, and someone was told of; return how many commands that were."""
        before = self.store.clock() - KEPT_S * 1000
        known = self.store.all("commands").items()
        old = [
            identity
            for identity, entry in known
            if entry.content.status in ENDED and entry.content.ended < before and (identity, entry) in self.told
        ]
        for start in range(0, len(old), RETIRED):
            began = time.monotonic()
            self.store.change(lambda pen, some=old[start : start + RETIRED]: archive(pen, some, before))  # type: ignore
            if self.store.closing.wait(time.monotonic() - began):
                break
        return len(old)

    def due(self, command: Record) -> tuple[float, Record]:
        """Return when (s, monotonic) *command* will be overdue, infinity if never, and *command*."""
        moment = deadline(command, self.listening)
        if moment is None:
            return float("inf"), command
        left = min(moment - self.store.clock(), moment - command["updatedAt"])
        return time.monotonic() + left / 1000, command


def arguments_of(asks: dict[str, Parameter]) -> Record:
    """Return what a request says of what it may, in its query and its headers, by the handler's arguments."""
    query = bottle.request.query.dict if asks else {}
    return {
        name: asked.read(query.get(asked.name, ()) if asked.place == "query" else [*filter(None, [header(asked.name)])])
        for name, asked in asks.items()
    }


def header(name: str) -> str:
    """Return a header of the request, each byte a character: Bottle's own look-up fails where it is no UTF-8."""
    key = name.upper().replace("-", "_")
    return str(bottle.request.environ.get(key if key == "CONTENT_TYPE" else f"HTTP_{key}", ""))


def pieces_of(body: Any) -> list[bytes]:
    """Return a *body* in pieces, as which some come; others are bytes, or a record."""
    return body if isinstance(body, list) else [body if isinstance(body, bytes) else msgspec.json.encode(body)]


def would_take(name: str, said: Record, command: Record) -> bool:
    """Return whether the agent of that *name*, which *said* what it is, would take the *command*."""
    return command["type"] in said["types"] and command.get("target", name) == name


def exposed(name: str, kind: str, samples: Iterable[tuple[Record, float]]) -> str:
    """Return a figure as Prometheus reads it: https://prometheus.io/docs/instrumenting/exposition_formats/.

    >>> exposed("records", "gauge", [({"kind": "a"}, 2)])
    '# TYPE kirosync_records gauge\\nkirosync_records{kind="a"} 2\\n'
    """
    lines = [f"# TYPE kirosync_{name} {kind}"]
    for labels, value in samples:
        said = ",".join(f'{label}="{escaped(str(text))}"' for label, text in labels.items())
        lines.append(f"kirosync_{name}{f'{{{said}}}' if said else ''} {'+Inf' if value == math.inf else value}")
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


class Page(NamedTuple):
    """A page as it is sent, what it may do in a browser, and by what one knows that it has not changed."""

    body: bytes
    policy: str
    tag: str


CONSOLE = str(Path(__file__).absolute().with_name("console.html"))
INLINE = re.compile(rb"<!--.*?-->|<(script|style)\b[^>]*>(.*?)</\1\s*>", re.DOTALL | re.IGNORECASE)
POLICY = (  # nothing from elsewhere, nothing to elsewhere, and of scripts only those that belong to the page
    "default-src 'none'; script-src {script}; style-src {style}; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types rendered"
)
PAGE_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
PAGE_HEADERS |= {"Cross-Origin-Opener-Policy": "same-origin", "Cache-Control": "no-cache"}


def page_of(body: bytes) -> Page:
    """Return the page that *body* is; its policy lets run what is written in it, each by its hash, and nothing else.

    >>> page_of(b"<style>p{}</style>").policy[:47]
    "default-src 'none'; script-src 'none'; style-sr"
    """
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, text in INLINE.findall(body.replace(b"\r\n", b"\n")):  # as a browser reads it
        if kind:  # else it is a comment
            hashed = base64.b64encode(hashlib.sha256(text).digest()).decode()
            hashes[kind.decode().lower()].append(f"'sha256-{hashed}'")
    allowed = {kind: " ".join(each) or "'none'" for kind, each in hashes.items()}
    return Page(body, POLICY.format(**allowed), f'W/"{digest(body)[:32]}"')


@functools.lru_cache(maxsize=1)
def console_page(stamp: Stamp) -> Page:
    """Return the page that lies beside this file, which has that *stamp*; raise OSError."""
    return page_of(Path(CONSOLE).read_bytes())


def shown_version(name: str, document: Record) -> Record:
    return {"version": name, "timestamp": document["timestamp"], "size": len(document["content"].encode())}


def shown_question(question: Record) -> Record:
    """Return what waits for a human as /api/kiro/status lists it."""
    told: Record = {key: question[key] for key in ("executionId", "choices", "metadata") if key in question}
    when = {"createdAt": iso(question["createdAt"]), "expiresAt": iso(deadline(question) or 0)}
    said = {"prompt": question.get("prompt", ""), "type": question.get("inputType", "text")}
    return {"id": question["id"], **said, **told, **when}


def shown_execution(command: Record) -> Record:
    """Return what is being executed as /api/kiro/status lists it."""
    told: Record = {key: command[key] for key in ("command", "args", "workspacePath", "status") if key in command}
    by = {"agent": command.get("agent", command.get("target"))}
    return {"executionId": command["id"], **told, **by, "createdAt": iso(command["createdAt"])}


def size_told_by(command: Record, stream: str) -> int:
    """Return how much a stream of a command had in all, if its result says so."""
    result = command.get("result")
    sizes = result.get("size") if isinstance(result, dict) else None
    size = sizes.get(stream) if isinstance(sizes, dict) else None
    return size if isinstance(size, int) else 0


def told_by(command: Record, stream: str) -> bytes:
    """Return what the result of a command says of a stream that there is no file of."""
    result = command.get("result")
    return str(result.get(stream, "")).encode() if isinstance(result, dict) else b""


def decoded(text: str, encoding: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True) if encoding == "base64" else text.encode()
    except ValueError:
        raise Malformed("data", "is not base64") from None


def give_up_execution(pen: Pen, identity: str, deserted: bool) -> Record:
    """Return the command after its time is over, or if it is *deserted*, there is nobody to take it."""
    known = existing("commands", pen.get("commands", identity))
    if known["status"] in ENDED:
        return known
    if deserted and known["status"] == "pending":
        return put_command(pen, known, fail(known, "expired", "the IDE that was to take it is gone", pen.now))
    return put_command(pen, known, cancel(known, pen.now))


def cancel_all(pen: Pen, commands: Iterable[Record]) -> None:
    """Cancel those *commands* that are still as they were."""
    for command in commands:
        if pen.get("commands", command["id"]) == command:
            put_command(pen, command, cancel(command, pen.now))


def withdraw(pen: Pen, commands: Iterable[Record]) -> None:
    """End those questions among *commands* that are still open although what asked for them has ended."""
    for question in commands:
        asking = pen.get("commands", question["executionId"])
        if asking and asking["status"] in ENDED and pen.get("commands", question["id"]) == question:
            outcome = "cancelled" if asking.get("outcome") == "cancelled" else "expired"
            error = f"nobody answered before {question['executionId']}, which asked, ended"
            put_command(pen, question, fail(question, outcome, error, pen.now))


def expire(pen: Pen, commands: Iterable[Record], listening: float) -> None:
    """End those *commands* that are still as they were when they became overdue, whatever the clock says by now."""
    for command in commands:
        if pen.get("commands", command["id"]) == command:
            now = max(pen.now, round(deadline(command, listening) or 0) + 1)
            put_command(pen, command, overdue(command, now, listening))


def archive(pen: Pen, identities: Iterable[str], before: float) -> None:
    """Move those commands to archive/ that are still as they were: ended, and that *before* a moment (ms)."""
    for identity in identities:
        command = pen.get("commands", identity)
        if command and command["status"] in ENDED and command.get("endedAt", 0) < before:
            pen.delete("commands", identity, pen.now, op="archive")


def existing(kind: str, record: T | None) -> T:
    if record is None:
        raise NotFound(f"{kind[:-1].capitalize()} not found")
    return record


def check_path(path: str) -> None:
    try:
        path.encode("latin-1").decode()
    except UnicodeDecodeError:
        raise Malformed("path", "is not UTF-8") from None


def readable(path: str) -> str:
    """Return the path of a route as people write it.

    >>> readable("/<kind:re:a|b>/<identity:path>")
    '/KIND/ID'
    """
    return re.sub("<identity.*?>", "ID", re.sub("<kind.*?>", "KIND", path))


BASE64 = "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
SCHEMA, IDENTITY = "#/components/schemas/{name}", {"$ref": "#/components/parameters/id"}
REQUEST_ID = {"X-Request-Id": {"$ref": "#/components/headers/X-Request-Id"}}


def if_then(field: str, value: str, then: Record) -> Record:
    """Return what a schema says of an object in which *field* is *value*."""
    return {"if": {"properties": {field: {"const": value}}, "required": [field]}, "then": then}


# What is checked beside the shapes: of what waits, by check_command; of a question, by the same; of input, by decoded.
CONDITIONS = {
    "Command": if_then("status", "pending", {"$ref": SCHEMA.format(name="Order")}),
    "user_input": if_then("inputType", "choice", {"required": ["choices"], "properties": {"choices": {"minItems": 1}}}),
    "Input": if_then("encoding", "base64", {"properties": {"data": {"pattern": BASE64}}}),
}


def schema_of(kind: Any, known: Record) -> Record:
    """Return the schema of *kind*, bytes among them; those that it refers to become *known* by their names."""
    if kind is bytes:
        return {"type": "string", "format": "binary"}
    if isinstance(kind, dict):
        one_of = [schema_of(one, known) for one in kind.values()]
        mapping = {name: one["$ref"] for name, one in zip(kind, one_of, strict=True)}
        known["Order"] = {"oneOf": one_of, "discriminator": {"propertyName": "type", "mapping": mapping}}
        return {"$ref": SCHEMA.format(name="Order")}
    (schema,), more = msgspec.json.schema_components([kind], ref_template=SCHEMA)
    known |= {name: {**found, **CONDITIONS.get(name, {})} for name, found in more.items()}
    return schema


def paths_of(route: Route) -> dict[str, str]:
    """Return the paths of *route* as OpenAPI writes them, and the name of the operation: one for each of its kinds."""
    path = route.path.replace("<identity:path>", "{id}")
    if not (choice := re.search(r"<kind:re:(.*?)>", path)):
        return {path: route.handler}
    return {path.replace(choice[0], kind): f"{route.handler}_{kind}" for kind in choice[1].split("|")}


def parameter(asked: Parameter, known: Record) -> Record:
    """Return what OpenAPI says of a parameter."""
    schema = schema_of(asked.kind, known)
    must = asked.otherwise is Required
    default = {"default": asked.otherwise} if asked.otherwise and not must else {}
    plain = {"style": "form", "explode": False} if schema.get("type") == "array" else {}
    example = {} if asked.example is None else {"example": asked.example}
    about = {"name": asked.name, "in": asked.place, "required": must, "description": asked.words}
    return {**about, "schema": {**schema, **default}, **plain, **example}


def response(answers: Sequence[Answer], sentence: str, known: Record) -> Record:
    """Return what OpenAPI says of *answers* that have one status; *sentence* is what that means."""
    schemas: dict[str, list[Record]] = {}
    for answer in answers:
        if answer.shape:
            schemas.setdefault(answer.media, []).append(schema_of(answer.shape, known))
    content = {media: {"schema": found[0] if len(found) == 1 else {"anyOf": found}} for media, found in schemas.items()}
    headers = {
        name: {"required": all(name in answer.headers for answer in answers), "schema": schema_of(kind, known)}
        for answer in answers
        for name, kind in {**answer.headers, **answer.at_times}.items()
    }
    return {"description": sentence, "headers": REQUEST_ID | headers, **({"content": content} if content else {})}


def refusal_as_answer(kind: type[Refusal]) -> Answer:
    headers = dict.fromkeys(kind.headers or (("Retry-After",) if kind is TooMany else ()), str)
    return Answer(shape(kind.__name__, kind.fields, {}), kind.status, headers=headers)


def responses(route: Route, known: Record) -> Record:
    """Return what OpenAPI says of all that *route* answers, by status; a refusal that stands alone is in components."""
    refused = refusals(route)
    found = {}
    for status in sorted({*(answer.status for answer in route.says), *(kind.status for kind in refused)}):
        kinds = [kind for kind in refused if kind.status == status]
        answers = [answer for answer in route.says if answer.status == status]
        if len(kinds) == 1 and not answers:
            found[str(status)] = {"$ref": f"#/components/responses/{kinds[0].__name__}"}
            continue
        sentence = " ".join(inspect.getdoc(kind) or "" for kind in kinds) or http.HTTPStatus(status).phrase
        found[str(status)] = response([*answers, *map(refusal_as_answer, kinds)], sentence, known)
    return found


def operation(route: Route, name: str, tag: str, known: Record) -> Record:
    """Return what OpenAPI says of a route."""
    text = inspect.getdoc(getattr(Service, route.handler)) or ""
    about: Record = {"operationId": name, "tags": [tag], "summary": text.partition("\n")[0], "description": text}
    about["parameters"] = [IDENTITY] if "<identity" in route.path else []
    about["parameters"] += [parameter(asked, known) for asked in route.asks]
    if body := route.takes:
        examples = {name: {"value": value} for name, value in body.examples.items()}
        content = {"schema": schema_of(body.shape, known), "examples": examples}
        about["requestBody"] = {"required": True, "content": {body.media: content}}
    about["responses"] = responses(route, known)
    return {**about, "security": [{"token": [scope]} for scope in route.scopes]}


@functools.cache
def description() -> Record:
    """Return the routes as an OpenAPI document: https://spec.openapis.org/oas/v3.1.0.html."""
    schemas: Record = {}
    paths: dict[str, Record] = {}
    for tag, routes in CONTENTS.items():
        for route in routes:
            for path, name in paths_of(route).items():
                paths.setdefault(path, {})[route.method.lower()] = operation(route, name, tag, schemas)
    alone = {kind.__name__: kind for route in ROUTES for kind in refusals(route)}
    request_id = {"description": "that which was sent, or a new one", "required": True, "schema": {"type": "string"}}
    identity = Parameter("id", Id, "1 to 128 characters, none of them a control character", Required, "example", "path")
    components = {
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        "headers": {"X-Request-Id": request_id},
        "parameters": {"id": parameter(identity, schemas)},
        "responses": {
            name: response([refusal_as_answer(kind)], inspect.getdoc(kind) or "", schemas)
            for name, kind in alone.items()
        },
        "schemas": schemas,
    }
    about = {"title": "kirosync", "version": __version__, "description": ABOUT_API}
    tags = [{"name": tag} for tag in CONTENTS]
    return {"openapi": "3.1.0", "info": about, "tags": tags, "paths": paths, "components": components}


@functools.cache
def openapi() -> bytes:
    """Return description(), encoded once, since everyone may ask for it."""
    return msgspec.json.encode(description())


ABOUT_API = f"""One queue and one shared memory for an IDE, an agent and a human.

All that is not public wants the header Authorization: Bearer TOKEN; the token is in the state directory, in the file
token, or in KIROSYNC_TOKEN. Bodies are JSON, up to {BODY_BYTES >> 20} MiB. Timestamps are Unix milliseconds. Held
answers wait at most {WAIT_S} s. An id has 1 to {ID_CHARACTERS} characters, none of them a control character."""
# The page /docs is made from description(). Its script makes no HTML: what is answered is only ever text.

HOST = "\0"  # stands for the host in the page: it is that which was asked for
STYLE = """
:root { color-scheme: light dark; --faint: #59636e; --line: #d1d9e0; --back: #f6f8fa; --link: #0969da; --bad: #b35900 }
@media (prefers-color-scheme: dark) {
  :root { --faint: #9198a1; --line: #3d444d; --back: #151b23; --link: #4493f8; --bad: #f0883e } }
* { box-sizing: border-box }
body { max-width: 60em; margin: 0 auto; padding: 1em; font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: break-word }
h2 { margin: 2em 0 .5em; border-bottom: 1px solid var(--line) } h3, h4 { margin: 0; font-size: 1rem; font-weight: 600 }
summary h3 { display: inline } summary { padding: .4em 0; cursor: pointer } h4 { margin-top: 1em }
details { border-bottom: 1px solid var(--line) } details[open] { padding-bottom: 1em } p { margin: .5em 0 }
a { color: var(--link) } code, pre, textarea, input, select { font-family: ui-monospace, monospace; font-size: .875rem }
pre, form { background: var(--back); border: 1px solid var(--line); border-radius: 6px; padding: .75em; margin: .5em 0 }
pre { overflow: auto; max-height: 30em; white-space: pre-wrap; overflow-wrap: anywhere }
nav ul { columns: 18em }
label { display: inline-block; margin: .6em .5em .2em 0; font-weight: 600 } small { color: var(--faint) }
input, select, textarea { width: 100%; padding: .4em; border: 1px solid var(--faint); border-radius: 4px }
textarea { min-height: 8em; resize: vertical } button { margin-top: .75em; padding: .5em 1.5em; font: inherit }
@media (max-width: 40em) { table { min-width: 34em } }
.wide { overflow-x: auto } table { border-collapse: collapse; width: 100%; font-size: .875rem }
th, td { text-align: left; vertical-align: top; padding: .3em .8em .3em 0; border-top: 1px solid var(--line) }
.bad { color: var(--bad) }
#access { position: sticky; top: 0; z-index: 1; display: flex; gap: .5em; align-items: center; padding: .4em .75em }
section, details { scroll-margin-top: 4em }
#access label { margin: 0 } :focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
"""
SCRIPT = """
"use strict";
const KEPT = "kirosync.token", MOST = 200000;
const token = document.getElementById("token");
token.value = sessionStorage.getItem(KEPT) ?? "";
token.addEventListener("input", () => sessionStorage.setItem(KEPT, token.value.trim()));

const requestOf = (form) => {
  const headers = {}, query = new URLSearchParams();
  let path = form.dataset.path;
  for (const field of form.querySelectorAll("[data-in]")) {
    if (field.dataset.in === "path") path = path.replace(`{${field.name}}`, encodeURIComponent(field.value));
    else if (field.value && field.dataset.in === "query") query.set(field.name, field.value);
    else if (field.value) headers[field.name] = field.value;
  }
  if (token.value.trim()) headers.Authorization = `Bearer ${token.value.trim()}`;
  const body = form.querySelector("textarea");
  if (body) headers["Content-Type"] = body.dataset.media;
  return [path + (query.size ? `?${query}` : ""), { method: form.dataset.method, headers, body: body?.value }];
};

const legible = (text, type) => {
  const shown = type.startsWith("application/json") && text ? JSON.stringify(JSON.parse(text), null, 2) : text;
  return shown.length > MOST ? `${shown.slice(0, MOST)}\\n... and ${shown.length - MOST} characters more` : shown;
};

const noteworthy = (headers) =>
  [...headers].filter(([name]) => /^(x-|etag|retry-after|content-type|idempotent|preference|www-)/.test(name))
    .map(([name, value]) => `${name}: ${value}`).join("\\n");

const send = async (form) => {
  const status = form.querySelector("[role=status]"), [head, body] = form.querySelectorAll(".answer");
  const show = (sentence, bad, ...texts) => {
    status.textContent = sentence;
    status.classList.toggle("bad", bad);
    [head, body].forEach((element, place) => {
      element.textContent = texts[place] ?? "";
      element.hidden = !texts[place];
    });
  };
  show("Waiting for the answer ...", false);
  try {
    const [path, request] = requestOf(form), began = performance.now();
    const answer = await fetch(path, request), text = await answer.text();
    const took = Math.round(performance.now() - began), hint = answer.status === 401 ? ": is the token right?" : "";
    const shown = legible(text, answer.headers.get("Content-Type") ?? "");
    const ended = `${answer.status} ${answer.statusText}, after ${took} ms${hint}`;
    show(ended, !answer.ok, noteworthy(answer.headers), shown);
    const queued = form.dataset.path === "/command" && answer.ok && JSON.parse(text).commandId;
    if (queued) for (const field of document.querySelectorAll("#Commands [name=id]")) field.value = queued;
  } catch (error) {
    show(`There is no answer: ${error.message}`, true);
  }
};

document.addEventListener("submit", (event) => {
  event.preventDefault();
  if (event.target.dataset.secured && !token.value.trim()) return token.focus();
  if (event.target.dataset.method) send(event.target);
});
document.addEventListener("change", ({ target }) => {
  if (target.dataset.example !== undefined) target.form.querySelector("textarea").value = target.value;
});
const unfold = () => {
  const aim = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (aim?.tagName === "DETAILS") aim.open = true;
};
addEventListener("hashchange", unfold);
unfold();
"""
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>kirosync {version}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">
<style>{style}</style>
<header><h1>kirosync {version}</h1>{about}
<p>The same for programs: <a href="openapi.json">openapi.json</a>. From a terminal:</p>{curl}</header>
<form id="access"><label for="token">Token</label>
<input id="token" type="password" autocomplete="off" placeholder="kept for this browser session"></form>
<nav aria-label="Contents"><ul>{contents}</ul></nav>
<main>{operations}
<section><h2 id="Types">Types of commands</h2>{types}
<p>All may say: {order} (see <a href="#shape-execute_bash">execute_bash</a>). A command is pending, processing,
completed or failed; its outcome says how it ended: {outcomes}.</p></section>
<section><h2 id="Shapes">Records, and what else is sent and answered</h2>
<p>A * marks what must be there; other fields are kept as they are.</p>{shapes}</section>
<section><h2 id="Refusals">Refusals</h2>
<p>Whatever is asked, it may be answered {always}.</p>{refusals}</section></main>
<script>{script}</script></html>
"""


def shown_words(text: str) -> str:
    """Return *text* as HTML; what stands in double backticks as code.

    >>> shown_words("``a`` < b")
    '<code>a</code> &lt; b'
    """
    return re.sub("``(.*?)``", r"<code>\1</code>", html.escape(text, quote=False))


def shown_prose(text: str) -> str:
    return "".join(f"<p>{shown_words(part)}</p>" for part in text.split("\n\n") if part)


def shown_table(head: str, rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML; *head* names the columns."""
    titles = "".join(f'<th scope="col">{title}' for title in head.split(","))
    lines = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f'<div class="wide" tabindex="0" role="group" aria-label="{head}"><table><tr>{titles}{lines}</table></div>'


def shown_kind(schema: Record) -> str:
    """Return what a *schema* is, in few words, as HTML.

    >>> shown_kind({"type": "number", "minimum": 0, "maximum": 55}), shown_kind({"enum": ["a", "b"]})
    ('number, 0 to 55', 'a | b')
    """
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f'<a href="#shape-{name}">{name}</a>'
    if choices := schema.get("anyOf", schema.get("oneOf")):
        return " | ".join(map(shown_kind, choices))
    if "enum" in schema:
        return " | ".join(html.escape(str(value)) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"[{shown_kind(schema.get('items', {}))}]"
    if "additionalProperties" in schema:
        return f"{{id: {shown_kind(schema['additionalProperties'])}}}"
    least, most = (schema.get(f"{end}imum", schema.get(f"exclusive{end.title()}imum")) for end in ("min", "max"))
    bounds = "" if most in (None, INTEGER) else f", {least} to {most}"
    return f"{schema.get('type', 'anything')}{bounds}"


def shown_shape(name: str, schema: Record) -> str:
    """Return the fields of a component, which can be unfolded."""
    must, fields = schema.get("required", []), schema.get("properties", {})
    own = [field for field, kind in fields.items() if kind.get("readOnly")]
    rows = [
        (
            f"<code>{field}</code>{'*' if field in must else ''}",
            shown_kind(kind),
            shown_words(kind.get("description", "")),
        )
        for field, kind in sorted(fields.items(), key=lambda item: (item[0] not in must, item[0]))
        if field not in own
    ]
    inside = shown_table("field,is,and means", rows) if rows else f"<p>{shown_kind(schema)}</p>"
    kept = f"<p>Set by the service, and refused: {', '.join(own)}.</p>" if own else ""
    return f'<details id="shape-{name}"><summary><h3><code>{name}</code></h3></summary>{inside}{kept}</details>'


def shown_input(asked: Record, form: str) -> str:
    """Return the field of a *form* in which a parameter is filled in."""
    name, example = asked["name"], asked.get("example", "")
    value = html.escape(",".join(example) if isinstance(example, list) else str(example)) if asked["required"] else ""
    field, must = f"{form}-{name}", " required" if asked["required"] else ""
    about = f"{asked['in']}{',' if must else ''}{must}: {shown_words(asked['description'])}"
    return (
        f'<label for="{field}">{name}</label><small id="{field}-is">{about}</small><input id="{field}" name="{name}" '
        f'data-in="{asked["in"]}" value="{value}" aria-describedby="{field}-is" autocomplete="off"{must}>'
    )


def shown_body(body: Record, form: str) -> str:
    """Return the fields of a *form* in which a body is chosen and written."""
    ((media, content),) = body["content"].items()
    texts = {
        name: example["value"] if isinstance(example["value"], str) else json.dumps(example["value"], indent=2)
        for name, example in content["examples"].items()
    }
    options = "".join(f'<option value="{html.escape(text)}">{name}' for name, text in texts.items())
    return (
        f'<label for="{form}-example">Example</label><select id="{form}-example" data-example>{options}</select>'
        f'<label for="{form}-body">Body</label><small id="{form}-is">{media}, {shown_kind(content["schema"])}</small>'
        f'<textarea id="{form}-body" data-media="{media}" aria-describedby="{form}-is" spellcheck="false">'
        f"{html.escape(next(iter(texts.values())))}</textarea>"
    )


def shown_form(method: str, path: str, said: Record) -> str:
    """Return the form in which an operation can be tried."""
    components, name = description()["components"], said["operationId"]
    asked = [components["parameters"]["id"] if "$ref" in each else each for each in said["parameters"]]
    inputs = "".join(shown_input(each, name) for each in asked)
    body = shown_body(said["requestBody"], name) if "requestBody" in said else ""
    secured = ' data-secured="yes"' if said["security"] else ""
    return (
        f'<form aria-label="Try {method} {path}" data-method="{method}" data-path="{path}"{secured}>{inputs}{body}'
        '<button>Send</button><p role="status"></p>'
        '<pre class="answer" tabindex="0" role="region" aria-label="Headers" hidden></pre>'
        '<pre class="answer" tabindex="0" role="region" aria-label="Answer" hidden></pre></form>'
    )


def shown_responses(said: Record) -> str:
    """Return what an operation answers, by status; what all may is told elsewhere."""
    common = {str(kind.status) for kind in ALWAYS}
    rows = []
    for status, found in said["responses"].items():
        name = found.get("$ref", "").rpartition("/")[2]
        response = description()["components"]["responses"][name] if name else found
        kinds = [
            f"{shown_kind(content['schema'])}{'' if media == 'application/json' else f' <small>{media}</small>'}"
            for media, content in response.get("content", {}).items()
        ]
        headers = ", ".join(f"<code>{name}</code>" for name in response["headers"] if name not in REQUEST_ID)
        if status not in common or not name:
            rows.append((status, "<br>".join(kinds), headers, shown_words(response["description"])))
    return shown_table("status,body,headers,when", rows)


def shown_operation(method: str, path: str, said: Record) -> str:
    """Return all of an operation, which can be unfolded."""
    scopes = ", ".join(scope for need in said["security"] for scope in need["token"]) or "everyone, without a token"
    summary, _, more = said["description"].partition("\n\n")
    return (
        f'<details id="{said["operationId"]}">'
        f"<summary><h3><code>{method} {path}</code></h3> {shown_words(summary)}</summary>"
        f"{shown_prose(more)}<p><small>May be asked by: {scopes}</small></p>"
        f"{shown_form(method, path, said)}{shown_curl(method, path, said)}"
        f"<h4>Answers</h4>{shown_responses(said)}</details>"
    )


def shown_curl(method: str, path: str, said: Record) -> str:
    """Return the line that asks the same in a terminal."""
    implied = "POST" if "requestBody" in said else "GET"
    parts = ["curl", *([] if method == implied else [f"-X {method}"])]
    parts += ['-H "Authorization: Bearer $TOKEN"'] if said["security"] else []
    for media, content in said.get("requestBody", {}).get("content", {}).items():
        value = next(iter(content["examples"].values()))["value"]
        text = value if isinstance(value, str) else json.dumps(value)
        parts += [f"-H 'Content-Type: {media}'", f"--data-binary {shlex.quote(text)}"]
    query = "&".join(f"{each['name']}={each['example']}" for each in said["parameters"] if each.get("required"))
    url = f"http://{HOST}{path.replace('{id}', 'example')}{'?' if query else ''}{query}"
    return (
        f'<pre tabindex="0" role="region" aria-label="curl">{html.escape(" ".join([*parts, shlex.quote(url)]))}</pre>'
    )


def shown_type(kind: str) -> Sequence[str]:
    required, optional, result = ORDERS[kind]
    return f"<code>{kind}</code>", ", ".join(required), ", ".join(optional), html.escape(result)


def shown_refusal(kind: type[Refusal]) -> Sequence[str]:
    meaning = shown_words((inspect.getdoc(kind) or "").partition("\n")[0])
    return f"{kind.status} {kind.__name__}", meaning, f"{{{', '.join(kind.fields)}}}"


@functools.cache
def docs_page() -> bytes:
    """Return the documentation, made from the routes and the tables above; where HOST stands, the address belongs."""
    said = description()
    sections: dict[str, str] = dict.fromkeys(CONTENTS, "")
    for path, methods in said["paths"].items():
        for method, operation in methods.items():
            sections[operation["tags"][0]] += shown_operation(method.upper(), path, operation)
    schemas = said["components"]["schemas"]
    refused = {kind for route in ROUTES for kind in refusals(route)} | {NotAllowed}
    page = PAGE.format(
        **{"version": __version__, "about": shown_prose(ABOUT_API), "style": STYLE, "script": SCRIPT},
        curl=shown_curl("POST", "/command", said["paths"]["/command"]["post"]),
        contents="".join(f'<li><a href="#{name}">{name}</a>' for name in (*CONTENTS, "Types", "Shapes", "Refusals")),
        operations="".join(f'<section id="{tag}"><h2>{tag}</h2>{text}</section>' for tag, text in sections.items()),
        types=shown_table("type,required,optional,result", map(shown_type, ORDERS)),
        **{"order": ", ".join(ORDER), "outcomes": ", ".join(get_args(Outcome))},
        shapes="".join(shown_shape(name, schemas[name]) for name in sorted(schemas)),
        always=", ".join(f"{kind.status} {kind.__name__}" for kind in ALWAYS),
        refusals=shown_table(
            "status,it means,body", map(shown_refusal, sorted(refused, key=operator.attrgetter("status")))
        ),
    )
    return page.encode()


# The server is waitress, with bounds. In memory is of each connection what of its one request is not worked on yet, up
# to HEAD_BYTES, SMALL_BYTES of a body and a piece of 8 KiB, and what of an answer was not read yet, up to SMALL_BYTES:
# some 170 MiB if CONNECTIONS do their worst. More lies in files without a name beside the state, up to SPOOL_BYTES.


NO_REQUEST = "this is no request of HTTP/1.1"
CONTROLS = re.compile(rb"[^\t\r\n -~\x80-\xff]")
START = re.compile(rb"[^ \r\n]+ [^ \r\n]+(?: HTTP/[0-9]\.[0-9])?[ \t]*\r\n")


class Parser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]
    """Reads a request; refuses it as soon as it is known to be none that is taken: mostly before its body comes."""

    error: Any = None
    completed = expect_continue = False
    command = path = ""  # waitress's own parser lacks them where it could not read the head
    taken = 0  # of the room for all bodies

    def __init__(self, adjustments: Any, service: Service, sender: str) -> None:
        super().__init__(adjustments)
        self.service, self.sender = service, sender

    def received(self, piece: bytes) -> int:
        """Return how much of *piece* belongs to this request."""
        in_head, consumed = self.body_rcv is None, len(piece)
        try:
            consumed = super().received(piece)
            if self.body_rcv is not None and not self.error:
                self.admit(in_head)
        except Refusal as refusal:
            self.error = refusal
        except OSError as error:  # of the file in which a body is set aside
            self.error = refusal_of(error)
        self.completed = self.completed or bool(self.error)
        self.expect_continue = self.expect_continue and not self.completed
        return consumed

    def parse_header(self, head: bytes) -> None:
        """Read the *head* of a request; refuse first what waitress would take minutes for, or fail at."""
        if head.count(b"\r\n") > HEADERS:
            raise HeadTooLarge(f"the head of a request has up to {HEADERS} lines", limit=HEADERS)
        if CONTROLS.search(head) or not START.match(head):
            raise Malformed("", NO_REQUEST)
        try:
            super().parse_header(head)
        except ValueError:  # a length of a thousand digits, an address that is none
            raise Malformed("", NO_REQUEST) from None

    def admit(self, in_head: bool) -> None:
        """Raise Refusal if the body may not come, or not go on: from a stranger, without room, or cut to pieces."""
        if in_head and (self.chunked or self.content_length > SMALL_BYTES):
            self.service.check_sender(self.headers.get("AUTHORIZATION", ""), self.sender)
        wanted, body = max(self.content_length, self.body_bytes_received), self.body_rcv
        if wanted > max(self.taken, SMALL_BYTES):
            more = max(wanted - self.taken, BLOCK_BYTES if self.chunked else 0)
            if not self.service.spool.take(more):
                raise Busy("too many large bodies are being sent at the same time; send it again")
            self.taken += more
        if self.chunked and len(body.control_line) + len(body.trailer) > CHUNK_LINE_BYTES:
            raise Malformed("", f"what stands before or after a chunk has up to {CHUNK_LINE_BYTES} bytes")

    def close(self) -> None:
        super().close()
        taken, self.taken = self.taken, 0
        self.service.spool.give(taken)


class JsonErrorTask(waitress.task.ErrorTask):  # type: ignore[misc]
    """Says in JSON what is refused before there is a request that could be answered."""

    def execute(self) -> None:
        refusal = refusal_in(self.request.error)
        self.status = f"{refusal.status} {http.HTTPStatus(refusal.status).phrase}"
        body = b"" if self.request.command == "HEAD" else msgspec.json.encode(refusal.body())
        said = {"Content-Type": "application/json", "X-Request-Id": secrets.token_hex(8)}
        self.response_headers += [*said.items(), *refusal.headers.items()]
        self.set_close_on_finish()
        self.channel.is_refused = True
        self.content_length = len(body)
        self.write(body)


def refusal_in(error: Any) -> Refusal:
    """Return the refusal that an *error* of waitress's is, if it is none of ours."""
    if isinstance(error, Refusal):
        return error
    if error.code == 413:
        return TooLarge(f"the body is too large: {BODY_BYTES} bytes are possible", limit=BODY_BYTES)
    refusal = Refusal(f"{error.reason}: {error.body}")
    refusal.status = error.code
    return refusal


class Task(waitress.task.WSGITask):  # type: ignore[misc]
    """Sends the head of an answer and the first of its body in one piece, which takes one system call less.

    It leaves the connection open after an answer without a body, whose end nobody can mistake: a 304.
    """

    def get_environment(self) -> Record:
        environ: Record = super().get_environment()
        environ["kirosync.channel"] = self.channel
        return environ

    def build_response_header(self) -> bytes:
        self.channel.head = super().build_response_header()
        return b""

    def finish(self) -> None:
        super().finish()
        self.channel.finish()

    def set_close_on_finish(self) -> None:
        asked_for = self.version == "1.0" or self.request.headers.get("CONNECTION", "").lower() == "close"
        if self.has_body or asked_for:
            super().set_close_on_finish()


class Stage(NamedTuple):
    """What a client is waited for: how long (s), prolonged by 1/rate (s) with each byte; and what it is told."""

    seconds: float
    rate: float = math.inf  # bytes/s
    sentence: str = ""


RESTING = Stage(IDLE_S)  # for its next request
BEGINNING = Stage(HEAD_S, sentence=f"the head of a request must be there after {HEAD_S:.0f} s")
SENDING = Stage(STALL_S, RATE, f"a body must come with {RATE} bytes a second; it was {STALL_S:.0f} s behind")
READING = Stage(STALL_S, RATE)  # for reading it
PARTING = Stage(PARTING_S)  # for reading why it was refused


class Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    """A connection. Its next request is read when the answer to the one before has been sent.

    The server's loop looks each TICK_S whether clients keep their times. Who is being answered, or held, owes nothing.
    """

    task_class = Task
    error_task_class = JsonErrorTask
    request: Any = None  # that is being received
    will_close = close_when_flushed = False
    head = b""  # of an answer, still to be sent
    unread = b""  # what was received, and not looked at yet
    moved = 0  # bytes, since the last look
    reserved = 0  # of the room for all answers
    is_refused = False

    def __init__(self, server: Any, *connection: Any, **more: Any) -> None:
        self.asked = time.monotonic()  # when it last had a complete request
        self.enter(BEGINNING)
        super().__init__(server, *connection, **more)
        self.sendbuf_len: int = SENT_BYTES

    def parser_class(self, adjustments: Any) -> Parser:
        return Parser(adjustments, self.server.service, str(self.addr[0]))

    def enter(self, stage: Stage) -> None:
        self.stage, self.patience = stage, stage.seconds

    # What is received

    def readable(self) -> bool:  # as waitress's own, which would be asked a thousand times in each turn of the loop
        busy = self.unread or self.total_outbufs_len or len(self.requests) > 1
        return not (busy or self.will_close or self.close_when_flushed)

    def received(self, piece: bytes = b"") -> None:
        """Read requests from what was not looked at yet and *piece*, as far as they may be."""
        with self.requests_lock:
            if self.will_close or self.close_when_flushed or self.stage is PARTING:
                return
            self.unread, self.moved = self.unread + piece, self.moved + len(piece)
            if piece and self.stage is RESTING:
                self.enter(BEGINNING)
            while self.unread and not self.requests and not self.total_outbufs_len:
                self.read_on()

    def read_on(self) -> None:
        request = self.request = self.request or self.parser_class(self.adj)
        in_head = not request.headers_finished
        self.unread = self.unread[request.received(self.unread) :]
        if not self.connected:  # it was closed meanwhile, and nobody else gives back what the request has taken
            request.close()
        elif request.completed:
            self.request, self.unread = None, b"" if request.error else self.unread
            if not request.empty:
                self.hand_over(request)
        elif in_head and request.headers_finished:
            self.enter(SENDING)
            if request.expect_continue:
                self.send_continue()

    def hand_over(self, request: Parser) -> None:
        self.requests.append(request)
        self.server.add_task(self)

    def service(self) -> None:
        super().service()
        self.asked = time.monotonic()
        with self.requests_lock:
            if not self.requests and not self.request and self.stage is not PARTING:
                self.enter(RESTING)
        self.settle()
        if self.unread:
            self.received()

    # What the client owes

    def wait(self, passed: float) -> None:
        """Note that so many seconds have *passed*; lose patience with a client that has not done its part in time."""
        if self.total_outbufs_len and self.stage is not READING:
            self.enter(READING)
        moved, self.moved = self.moved, 0
        if self.will_close and self.total_outbufs_len:
            return self.handle_close()  # the loop would wait until the client takes something
        if self.will_close or (self.requests and not self.total_outbufs_len):
            return
        self.patience = min(self.stage.seconds, self.patience - passed + moved / self.stage.rate)
        if self.patience > 0:
            return
        if self.request and self.stage.sentence:
            return self.refuse(TooSlow(self.stage.sentence))
        if self.stage is READING:  # the client is to see that it was cut, and the kernel not to go on trying
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return self.handle_close()
        self.will_close = True

    def refuse(self, refusal: Refusal) -> None:
        """Answer, instead of the request that is being received, why it was not waited for."""
        with self.requests_lock:
            request, self.request, self.unread = self.request, None, b""
            request.error = refusal
            self.hand_over(request)

    # What is sent

    def reserve(self, size: int, wait: float) -> bool:
        """Take room for an answer until it has been sent; return whether there was any, now or within *wait* (s)."""
        there: bool = self.server.service.spool.take(size, wait)
        self.reserved += size if there else 0
        return there

    def settle(self, closed: bool = False) -> None:
        """Give back the room for answers if they have been sent, or the connection is *closed*."""
        with self.outbuf_lock:
            if closed or not (self.total_outbufs_len or self.requests):
                size, self.reserved = self.reserved, 0
                self.server.service.spool.give(size)

    def _flush_some(self, do_close: bool = True) -> bool:
        with self.outbuf_lock:  # waitress does without where nothing is answered; a "100 Continue" may be sent then
            return bool(super()._flush_some(do_close))

    def send(self, piece: bytes, do_close: bool = True) -> int:
        sent: int = super().send(piece, do_close)
        self.moved += sent
        return sent

    def handle_write(self) -> None:
        if self.is_refused and self.close_when_flushed and not self.will_close:
            self._flush_exception(self._flush_some)
            return None if self.total_outbufs_len or self.will_close or not self.connected else self.part()
        super().handle_write()
        if self.connected and not self.total_outbufs_len:
            self.settle()
            with self.requests_lock:
                if self.stage is READING and not self.requests:
                    self.enter(SENDING if self.request else RESTING)
            self.received()

    def part(self) -> None:
        """Close our end, and leave the other time to read why: closing all would take that from who still sends."""
        with self.requests_lock:
            self.close_when_flushed, self.unread = False, b""
            self.enter(PARTING)
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:  # it has gone
            self.will_close = True

    def handle_close(self) -> None:
        super().handle_close()
        request, self.request, self.unread = self.request, None, b""
        if request:
            request.close()
        self.settle(closed=True)

    # While a request is held

    @contextlib.contextmanager
    def parked(self) -> Iterator[None]:
        """Keep the connection out of the server's loop, which costs a look at each, while its request is held."""
        with self.outbuf_lock:  # under it the loop, which may be at this very connection, says that it closes it
            if self.connected:
                self._map.pop(self._fileno, None)
        try:
            yield
        finally:
            with self.outbuf_lock:
                if self.connected:
                    self._map[self._fileno] = self

    def has_hung_up(self) -> bool:
        with self.outbuf_lock:
            if not self.connected:
                return True
            poll = select.poll()
            poll.register(self.socket, select.POLLRDHUP)
            return bool(poll.poll(0))

    def write_soon(self, data: Any) -> int:
        if not data:
            return 0  # a head waits for what comes after it
        head, self.head = self.head, b""
        if isinstance(data, bytes):
            data = self.send_at_once(head + data)
        elif head:  # before a file
            super().write_soon(head)
        return super().write_soon(data)  # type: ignore[no-any-return]

    def finish(self) -> None:
        """Send a head after which nothing came."""
        head, self.head = self.head, b""
        self.write_soon(head)

    def send_at_once(self, data: bytes) -> bytes:
        """Return what is left of *data*: what a client takes at once need not be set aside for it."""
        with self.outbuf_lock:
            if self.total_outbufs_len or not self.connected:
                return data
            return data[self.send(data, do_close=False) :]


class Door(waitress.server.TcpWSGIServer):  # type: ignore[misc]
    """An address on which the service listens; the loop looks at each in turn, before the connections."""

    channel_class = Channel
    looked = opens_again = 0.0  # moments (s, monotonic)

    def __init__(self, service: Service, *arguments: Any, **more: Any) -> None:
        self.service = service
        service.doors.append(self)
        super().__init__(service.app, *arguments, **more)

    def readable(self) -> bool:
        now = time.monotonic()
        if (passed := now - self.looked) >= TICK_S:
            self.looked = now
            for channel in [*self.active_channels.values()]:
                channel.wait(min(passed, 2 * TICK_S))  # where the whole machine slept, no client did
        return now >= self.opens_again

    def accept(self) -> Any:
        try:
            return super().accept()
        except OSError as error:  # the descriptors are used up: the loop must not ask again at once, and again
            log.warning("no connection can be accepted: %s", error.strerror)
            self.opens_again = time.monotonic() + TICK_S
            return None

    def handle_accept(self) -> None:
        newcomers = []
        for connection, address in itertools.islice(iter(self.accept, None), ACCEPTED):
            with contextlib.suppress(OSError):  # it has gone again
                self.set_socket_options(connection)
                newcomers.append(self.channel_class(self, connection, address, self.adj, map=self._map))
        self.make_room(newcomers)

    def make_room(self, newcomers: list[Channel]) -> None:
        """Close what is open beyond the limit: what has been longest without a complete request, least an answer."""
        limit = self.adj.connection_limit
        if sum(len(door.active_channels) for door in self.service.doors) <= limit:
            return
        channels = {each for door in self.service.doors for each in [*door.active_channels.values()]}
        channels = {each for each in channels if not each.will_close}
        idle = [each for each in channels.difference(newcomers) if not each.requests]
        idle.sort(key=lambda each: (each.total_outbufs_len > 0, each.asked))
        for each in [*idle, *newcomers][: max(0, len(channels) - limit)]:
            each.will_close = True


# ---------------------------------------------------------------------------------------- Main
# The only code that knows argv and the environment.


M_ARENA_MAX = -8  # mallopt(3)
SWITCH_S = 0.0005  # a thread that computes makes way for one that answers; 0.005 is Python's own
TRUST = {"trusted_proxy_headers": {"x-forwarded-for"}, "clear_untrusted_proxy_headers": True}  # of a proxy of ours
NOT_OPENED = "kirosync: the state directory {} cannot be opened: {}"


class Server(waitress.server.MultiSocketServer):  # type: ignore[misc]
    """All doors, in one loop."""

    def close(self) -> None:
        self.task_dispatcher.shutdown()


def listen(service: Service, threads: int, proxy: str = "") -> Server:
    """Return the server, bound to all addresses of its host; end the program in one line if that cannot be."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    dispatcher, doors = waitress.task.ThreadedTaskDispatcher(), dict[int, Any]()
    try:
        adjustments = waitress.adjustments.Adjustments(
            host=service.host,
            port=service.port,
            connection_limit=max(1, min(CONNECTIONS, (files - OWN_FILES) // DESCRIPTORS)),
            inbuf_overflow=SMALL_BYTES,
            outbuf_overflow=SMALL_BYTES,
            outbuf_high_watermark=SPOOLED_BYTES,
            asyncore_use_poll=True,  # select fails where a descriptor is above 1023
            channel_request_lookahead=1,  # else it cannot tell that a client has hung up
            max_request_header_size=HEAD_BYTES,
            max_request_body_size=BODY_BYTES + 1,  # it refuses what is as large as this
            log_socket_errors=False,  # clients hang up as they like
            ident="kirosync",
            **(TRUST | {"trusted_proxy": proxy} if proxy else {}),
        )
        for *kind, (address, port, *rest) in adjustments.listen:
            where = (*kind, (address, port or service.port, *rest))  # a port that was found is that of all
            door = Door(service, doors, dispatcher=dispatcher, adj=adjustments, sockinfo=where)
            service.port = int(door.effective_port)
    except (OSError, ValueError) as error:
        sys.exit(
            f"kirosync: cannot listen on {service.host}:{service.port}: {getattr(error, 'strerror', error)}; "
            "choose another with --port or KIROSYNC_PORT"
        )
    dispatcher.set_thread_count(threads)
    return Server(doors, adjustments, None, dispatcher)


def settle_in() -> None:
    """Make this process what a service is to be: private, with enough descriptors, and fair to who answers."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_DUMPABLE, 0)  # commands of the same user are not to read our memory, and the token in it
    if hasattr(libc, "mallopt"):  # else threads have heaps of their own, and none uses what another gives back
        libc.mallopt(M_ARENA_MAX, 1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s [%(process)d] %(levelname)s %(message)s")
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # it warns of every request that waits a moment
    with contextlib.suppress(ValueError, OSError):  # a connection takes one, and many may be held
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    sys.setswitchinterval(SWITCH_S)
    os.umask(0o077)  # the logs are for their owner


def serve(arguments: argparse.Namespace) -> None:
    settle_in()
    service = service_of(arguments)
    server = listen(service, arguments.threads, arguments.trusted_proxy)
    try:
        held = hold_service(service.keyring.directory, f"http://{service.host}:{service.port}")
        keep_access_log(log_folder(arguments))
    except OSError as error:
        sys.exit(NOT_OPENED.format(arguments.state, error))
    if held is None:
        serving = who_serves(service.keyring.directory)
        sys.exit(f"kirosync: {arguments.state} is served already, by process {serving}; one service is all it can have")
    tempfile.tempdir = str(service.keyring.directory)  # for what is set aside: /tmp may be memory
    failed: list[Exception] = []

    def stop(*_: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)  # a second one must not end it half way
        if service.opened:
            service.opened.release()
        sys.exit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    with contextlib.suppress(SystemExit):
        threading.Thread(target=begin, args=(service, arguments, failed), daemon=True).start()
        server.run()
    service.close()
    if failed:
        sys.exit(NOT_OPENED.format(arguments.state, failed[0]))


def render(_: argparse.Namespace) -> None:
    """Be the process in which a service makes HTML; see Renderer."""
    answer_renderer(sys.stdin.buffer, sys.stdout.buffer)


def service_of(arguments: argparse.Namespace) -> Service:
    """Return the service, without its state, which is still to be read; end the program if nobody could ask it."""
    state = Path(arguments.state).absolute()
    keyring = Keyring(state, os.environ.get("KIROSYNC_TOKEN", ""))
    try:
        keyring.make()
    except OSError as error:
        sys.exit(NOT_OPENED.format(state, error))
    if not keyring.known():
        sys.exit(f"kirosync: {state / 'token'} is empty; remove it, and a new one is made")
    limits = {"threads": arguments.threads, "execute_s": arguments.execute_timeout}
    return Service(None, keyring, arguments.host, arguments.port, **limits)


def log_folder(arguments: argparse.Namespace) -> Path:
    return Path(arguments.log or f"{arguments.state}/log").absolute()


def keep_access_log(folder: Path) -> None:
    """Enter requests in the file access.log in *folder*, each as a line of JSON, once a second."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    files = logging.handlers.RotatingFileHandler(folder / "access.log", "a", ACCESS_BYTES, ACCESS_FILES, delay=True)
    files.setFormatter(logging.Formatter("%(message)s"))
    access.addHandler(files)
    access.setLevel(logging.INFO)
    access.propagate = False
    logging.raiseExceptions = False  # a log that cannot be written is no reason to tell each time


def begin(service: Service, arguments: argparse.Namespace, failed: list[Exception]) -> None:
    """Open the state directory for *service*, which listens already, and do what is done beside its requests."""
    gc.disable()
    state = Path(arguments.state).absolute()
    try:
        store = Store(state)
        audit = Audit(store, log_folder(arguments))
    except Exception as error:  # whatever it was: a service that never has its state is none
        failed.append(error)
        log.debug("%s cannot be opened", state, exc_info=True)
        os.kill(os.getpid(), signal.SIGTERM)
        return
    gc.freeze()  # what was read stays: to look at all of it again and again would hold up every request
    gc.enable()
    about = arguments.notify, arguments.notify_on, arguments.notify_after, os.environ.get("KIROSYNC_NOTIFY_TOKEN", "")
    notifier = Notifier(store, *about) if arguments.notify else None
    service.begin(store, audit, notifier)
    works = [store.follow, service.sweep, service.tend, service.keep_account, *([notifier.work] if notifier else [])]
    for work in works:
        threading.Thread(target=go_on, args=(work, store.closing), daemon=True).start()
    log.info("kirosync %s on http://%s:%s, state in %s", __version__, service.host, service.port, store.directory)


def go_on(work: Callable[[], None], closing: threading.Event) -> None:
    """Do *work* until the store is closed; a defect in it is logged, and must not end what commands rely on to end."""
    while not closing.is_set():
        try:
            work()
        except Exception:
            log.exception("a defect in %s; it goes on", work.__name__)
            closing.wait(SETTLE_S)


def backup(arguments: argparse.Namespace) -> int:
    state, kept = Path(arguments.state), arguments.file != "-"
    with whole_file(Path(arguments.file)) if kept else contextlib.nullcontext(sys.stdout.buffer) as target:
        with as_owner(state), Snapshot(state) as snapshot:
            snapshot.pack(target)
            revision = max(line.revision for line in snapshot.lines())
        target.flush()
    files, held = len(snapshot.sizes), snapshot.held * 1000
    tell(f"{files} files, up to revision {revision}; others had to wait for {held:.0f} ms")
    return 0


def restore(arguments: argparse.Namespace) -> int:
    with contextlib.ExitStack() as closing:
        file = sys.stdin.buffer if arguments.file == "-" else closing.enter_context(open(arguments.file, "rb"))
        closing.enter_context(as_owner(Path(arguments.state)))
        store = Store(Path(arguments.state), kinds=("commands",), by=console())
        closing.callback(store.close)
        restoration = Restoration(store)
        restoration.take(file)
        tell(f"restored; what was there before is in {restoration.kept}")
        if restoration.let_in:
            tell(
                f"there were no tokens here; these came with the backup, and are valid: {', '.join(restoration.let_in)}"
            )
        if restoration.ended:
            tell(f"ended {len(restoration.ended)} commands that were open: {', '.join(sorted(restoration.ended))}")
    return 0


def fsck(arguments: argparse.Namespace) -> int:
    state = Path(arguments.state).absolute()
    found = inspect_state(state)
    left = repair(state) if arguments.repair else found
    if arguments.json:
        said = {name: [shown_flaw(flaw) for flaw in flaws] for name, flaws in (("found", found), ("left", left))}
        print(msgspec.json.format(msgspec.json.encode(said), indent=2).decode())
    else:
        for flaw in found:
            print(f"{flaw.path or '.'}: {flaw.problem}\n    repair: {REMEDIES[flaw.remedy]}")
        for flaw in left if arguments.repair else ():
            print(f"left: {flaw.path or '.'}: {flaw.problem}")
        tell(f"{counted(found)} found" + (f", {counted(left)} left" if arguments.repair else ""))
    return int(any(flaw.remedy for flaw in left))


def shown_flaw(flaw: Flaw) -> Record:
    return {"path": flaw.path or ".", "problem": flaw.problem, "repair": REMEDIES[flaw.remedy]}


def counted(flaws: Iterable[Flaw]) -> str:
    """Return how many *flaws* there are; what lies in quarantine is none."""
    number = sum(bool(flaw.remedy) for flaw in flaws)
    return {0: "nothing", 1: "1 thing"}.get(number, f"{number} things")


class Case(NamedTuple):
    """What the doctor is asked about."""

    state: Path
    logs: Path
    host: str
    port: int
    proxy: str  # that is trusted, "" if none is

    def ask(self, path: str) -> Record:
        """Return what the service answers; raise OSError if none does."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        connection = http.client.HTTPConnection(host, self.port, timeout=ANSWER_S)
        try:
            connection.request("GET", path, headers={"Accept": "application/json"})
            return check(dict[str, Any], parse(connection.getresponse().read(BLOCK_BYTES)), "")  # type: ignore
        except http.client.HTTPException as error:
            raise OSError(f"no answer in HTTP: {error!r}") from None
        finally:
            connection.close()

    @property
    def disk(self) -> Path:
        """The state directory, or what is to hold it."""
        return next(path for path in (self.state, *self.state.parents) if path.is_dir())


def check_folder(case: Case) -> Iterator[Finding]:
    if not case.state.is_dir():
        yield Finding("warn", f"there is no directory {case.state}", "name it with --state, or start the service")
        return
    status = os.stat(case.state)
    if status.st_uid != os.geteuid():
        yield Finding("warn", f"{case.state} belongs to user {status.st_uid}", "run this, and all of us, as that user")
    if status.st_mode & 0o77:
        remedy = f"chmod 700 {case.state}"
        yield Finding("bad", f"{case.state} can be used by others, with the mode {status.st_mode & 0o777:04o}", remedy)
    if not os.access(case.state, os.R_OK | os.W_OK | os.X_OK) or os.statvfs(case.state).f_flag & os.ST_RDONLY:
        yield Finding("bad", f"{case.state} cannot be written", "mount its disk for writing, and give it to this user")
    else:
        yield Finding("ok", f"{case.state} can be read and written")


def check_disk(case: Case) -> Iterator[Finding]:
    yield judge_space(*room_on(case.disk))


def check_clock(case: Case) -> Iterator[Finding]:
    yield judge_clock(time.time() * 1000, last_moment(case.state), "the last change")


def check_lock(case: Case) -> Iterator[Finding]:
    yield judge_file_system(mount_of(case.disk.resolve(), Path("/proc/self/mountinfo").read_text()))
    if excludes(case.disk):
        yield Finding("ok", "its locks exclude each other")
    else:
        yield Finding("bad", "its locks do not exclude each other", "move the state to a local disk")


def check_service(case: Case) -> Iterator[Finding]:
    where = f"{case.host}:{case.port}"
    try:
        home, health = case.ask("/"), case.ask("/health")
    except OSError as error:
        yield Finding("warn", f"no service answers at {where}: {error}", "start it, or name it with --host and --port")
        return
    version, status = home.get("version"), health.get("status")
    if version == __version__:
        yield Finding("ok", f"the service at {where} is kirosync {version}, {status}")
    else:
        yield Finding("warn", f"the service at {where} is {version}, this file is {__version__}", "restart the service")
    moment = datetime.datetime.fromisoformat(str(health.get("timestamp"))).timestamp() * 1000
    yield judge_clock(time.time() * 1000, moment, "the service's")
    yield from judge_address(str(check(dict[str, Any], health.get("server"), "server").get("host")), case.proxy)


def judge_address(host: str, proxy: str) -> Iterator[Finding]:
    """Judge who reaches a service that listens on *host*, with a *proxy* that it trusts in front of it."""
    if proxy:
        yield Finding("ok", f"it trusts the proxy {proxy}")
    elif host not in ("localhost", "::1") and not host.startswith("127."):
        remedy = "listen on 127.0.0.1 behind a proxy with TLS, and name it in KIROSYNC_TRUSTED_PROXY"
        yield Finding("warn", f"it listens on {host}, in plain text, with no proxy in front of it", remedy)


def check_agents(case: Case) -> Iterator[Finding]:
    now = time.time() * 1000
    for path in sorted(case.state.glob("agents/[!.]*.json")):
        said, seen = check(AGENT, parse(path.read_bytes()), path.name), path.stat().st_mtime * 1000
        version, name = said.get("version", "unknown"), urllib.parse.unquote(path.stem)
        here = "is here" if is_present(seen, round(now)) else f"was last seen {iso(seen)}"
        if said["kind"] == "agent" and version != __version__:
            remedy = "put agent.py and kirosync.py of one version side by side, and restart it"
            yield Finding("warn", f"the agent {name} {here}; its version is {version}, not {__version__}", remedy)
        else:
            yield Finding("ok", f"{said['kind']} {name} {here}; its version is {version}")


def check_packages(case: Case) -> Iterator[Finding]:
    header = re.search(r"^# /// script\n((?:# .*\n)+?)# ///$", Path(__file__).read_text(), re.MULTILINE)
    asked = tomllib.loads(re.sub("^# ", "", header[1], flags=re.MULTILINE)) if header else {}
    yield judge_package(f"Python{asked.get('requires-python', '')}", sys.version.split()[0])
    for wanted in asked.get("dependencies", ()):
        try:
            found = importlib.metadata.version(wanted.partition(">=")[0])
        except importlib.metadata.PackageNotFoundError:
            found = None
        yield judge_package(wanted, found)


def check_sizes(case: Case) -> Iterator[Finding]:
    sizes = sizes_of(case.state)
    if not case.logs.is_relative_to(case.state) and case.logs.is_dir():
        sizes |= {str(case.logs): sizes_of(case.logs).get(".", (0, 0))}
    parts = (f"{name} {size / 2**20:.1f} MiB in {count}" for name, (count, size) in sorted(sizes.items()))
    yield Finding("ok", f"files: {', '.join(parts) or 'none'}")


def check_state(case: Case) -> Iterator[Finding]:
    flaws = inspect_state(case.state)
    lying = sum(not flaw.remedy for flaw in flaws)
    if lying:
        remedy = f"see why in {case.state}/quarantine/*.reason; move back what is mended, remove the rest"
        yield Finding("warn", f"{lying} files lie in quarantine", remedy)
    if len(flaws) > lying:
        yield Finding("bad", f"fsck finds {counted(flaws)}", f"kirosync.py fsck --repair --state {case.state}")
    elif not lying:
        yield Finding("ok", "fsck finds nothing")


# What the doctor looks at, and whether there is anything to see without a state directory.
CHECKS: dict[Callable[[Case], Iterator[Finding]], bool] = {
    check_folder: True,
    check_disk: True,
    check_lock: True,
    check_clock: False,
    check_service: True,
    check_agents: False,
    check_packages: True,
    check_sizes: False,
    check_state: False,
}


def examine(case: Case) -> Iterator[Finding]:
    """Yield what each of CHECKS finds; one that cannot look says so, and keeps no other from it."""
    for look, always in CHECKS.items():
        name = look.__name__.removeprefix("check_")
        try:
            if always or (case.state / "journal.jsonl").exists():
                yield from look(case)
        except (OSError, ValueError, Unreadable, Refusal) as error:
            yield Finding("bad", f"{name}: could not be looked at: {error}", "see to it that this user may")


def doctor(arguments: argparse.Namespace) -> int:
    state = Path(arguments.state).absolute()
    case = Case(state, Path(arguments.log or state / "log"), arguments.host, arguments.port, arguments.trusted_proxy)
    findings = [*examine(case)]
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode([each._asdict() for each in findings]), indent=2).decode())
    for level, sentence, remedy in () if arguments.json else findings:
        print(f"{level:4}  {sentence}" + (f"; {remedy}" if remedy else ""))
    return int(any(finding.level == "bad" for finding in findings))


def tell(sentence: str) -> None:
    """Say something about what was done; stdout is for what it yields."""
    print(f"kirosync: {sentence}", file=sys.stderr)


def care(work: Callable[[argparse.Namespace], int], failed: int = 1) -> Callable[[argparse.Namespace], None]:
    """Return *work* as a program: a refusal is one line, and the exit code *failed*."""

    def run(arguments: argparse.Namespace) -> None:
        logging.basicConfig(level=logging.WARNING, format="kirosync: %(message)s")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was begun is cleared away
        try:
            sys.exit(work(arguments))
        except (Refusal, Unreadable, OSError) as error:
            tell(f"{work.__name__.replace('_', ' ')}: {error}")
            sys.exit(failed)

    return run


def add_token(arguments: argparse.Namespace) -> int:
    """Make a token, and print it: this once, for only its sha256 is kept."""
    secret, now = new_secret(), time.time_ns() // 1_000_000
    token: Record = {"scope": arguments.scope, "sha256": digest(secret.encode()), "createdAt": now}
    token |= {"expiresAt": now + round(arguments.expires * 1000)} if arguments.expires else {}

    def add(pen: Pen) -> None:
        known = tokens_said(pen.store.directory)
        if arguments.name in known or arguments.name == MASTER:
            raise Conflict(f"there is a token {arguments.name!r} already; revoke it, or choose another name")
        if len(known) >= TOKENS:
            raise TooLarge(f"there are {TOKENS} tokens already, which is as many as can be")
        pen.entitle(arguments.name, token)

    with opened(arguments.state) as store:
        store.change(add)
    print(secret)
    tell(f"the token {arguments.name!r} has the scope {arguments.scope}; it is not shown again")
    return 0


def revoke_token(arguments: argparse.Namespace) -> int:
    def revoke(pen: Pen) -> None:
        known = tokens_said(pen.store.directory)
        if arguments.name == MASTER:
            raise NotFound(f"{MASTER!r} is the token of the settings: change KIROSYNC_TOKEN, or replace the file token")
        if arguments.name not in known:
            raise NotFound(f"there is no token {arguments.name!r}; those there are: {', '.join(known) or 'none'}")
        pen.entitle(arguments.name, None)

    with opened(arguments.state) as store:
        store.change(revoke)
    return 0


def list_tokens(arguments: argparse.Namespace) -> int:
    """Print the tokens: their names and scopes, and when they were made, expire, and were last used."""
    state = existing_folder(arguments.state)
    used, tokens = used_in(state), tokens_in(state)
    rows = {name: {**without(token, "sha256"), "lastUsed": used.get(name)} for name, token in tokens.items()}
    if MASTER in used or (state / "token").exists():
        rows[MASTER] = {"scope": "admin", "lastUsed": used.get(MASTER)}
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(rows), indent=2).decode())
    else:
        print(*itertools.starmap(told_of, rows.items()), sep="\n")
    return 0


def told_of(name: str, token: Record) -> str:
    """Return what `token list` says of a token."""
    ends, used = token.get("expiresAt", math.inf), token["lastUsed"]
    expires = (
        "does not expire" if ends == math.inf else f"expire{'d' if ends <= time.time() * 1000 else 's'} {iso(ends)}"
    )
    last = f"last used {iso(used['at'])} from {used['from']}" if used else "never used"
    return f"{name:20} {token['scope']:7} {expires}, {last}"


def existing_folder(state: str) -> Path:
    """Return the path of *state*; raise NotFound: a slip of the pen is not to make another state."""
    if not Path(state).is_dir():
        raise NotFound(f"there is no directory {state}; --state names the one of the service")
    return Path(state)


def check_audit(arguments: argparse.Namespace) -> int:
    """Say whether the audit log is whole, or which is the first line that is not as it was."""
    folder, told = log_folder(arguments), audited_in(Path(arguments.state))
    count, problem = verify_audit(folder, told)
    if problem:
        raise Malformed(str(folder), problem)
    if not (count or told):
        raise NotFound(f"there is no audit log in {folder}, and the state directory knows of none")
    print(f"{count} lines, each as it was written" + ("" if told else "; whether more were there is not known"))
    return 0


@contextlib.contextmanager
def opened(state: str) -> Iterator[Store]:
    """Give the store of *state*, for what is no record."""
    folder = existing_folder(state)
    with as_owner(folder), contextlib.closing(Store(folder, kinds=(), by=console())) as store:
        yield store


def console() -> str:
    """Return what the journal says of who sits at this machine."""
    with contextlib.suppress(KeyError):  # a user without a name, as in a container
        return f"{os.environ.get('SUDO_USER') or getpass.getuser()}@console"
    return f"{os.getuid()}@console"


def http_url(text: str) -> str:
    if text and not re.fullmatch(r"(ntfy\+)?https?://[^/\s]+(/\S*)?", text):
        raise argparse.ArgumentTypeError("it is neither http(s)://... nor ntfy+https://HOST/TOPIC")
    if text.startswith("ntfy+") and not urllib.parse.urlsplit(text).path.strip("/"):
        raise argparse.ArgumentTypeError("ntfy+https://HOST/TOPIC wants a topic")
    return text


def event_names(text: str) -> frozenset[str]:
    names = frozenset(filter(None, text.split(",")))
    if unknown := names - {"asked", "failed", "long"}:
        raise argparse.ArgumentTypeError(f"{min(unknown)!r} is not one of asked, failed, long")
    return names


def token_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not 1 to 64 of A-Z a-z 0-9 . _ -")
    return text


def duration(text: str) -> float:
    try:
        return seconds_in(text)
    except Malformed as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None


def port_number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,5}", text) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not one of 0 to 65535")
    return int(text)


def positive_seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text) or not 0 < float(text) <= LONGEST_RUN_S:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds, up to {LONGEST_RUN_S}")
    return float(text)


class Option(NamedTuple):
    """An argument of a command, as argparse takes it. A setting has a *default*, and an environment variable for it."""

    name: str
    help: str
    default: str | None = None
    more: Record = {}

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        variable = "KIROSYNC" + self.name[1:].replace("-", "_").upper()
        said = {"default": os.environ.get(variable, self.default), "help": f"{self.help} ({variable})"}
        parser.add_argument(self.name, **(said if self.default is not None else {"help": self.help}), **self.more)


class Subcommand(NamedTuple):
    """What kirosync.py can be told to do: the words, what is run, what that is, and what it takes beside --state."""

    words: str
    run: Callable[[argparse.Namespace], None]
    what: str
    options: tuple[Option, ...] = ()


STATE = Option("--state", "directory", str(Path(__file__).absolute().with_name("state")))
LOG = Option("--log", "directory of the logs; STATE/log", "")
JSON = Option("--json", "as JSON", more={"action": "store_true"})
PROXY = Option("--trusted-proxy", "address of the proxy before it, which tells who asks; none", "")
ADDRESS = (Option("--host", "address", "127.0.0.1"), Option("--port", "port", "3001", {"type": port_number}))
SUBCOMMANDS = (
    Subcommand(
        *("serve", serve, "run the service"),
        (
            *ADDRESS,
            Option("--execute-timeout", "for what an IDE executes", f"{EXECUTE_S:.0f}", {"type": positive_seconds}),
            LOG,
            PROXY,
            Option(
                "--notify",
                "URL to be told of what happens, or ntfy+URL of a topic; none%(default).0s",
                "",
                {"type": http_url},
            ),
            Option("--notify-on", "what it is told of", "asked,failed,long", {"type": event_names}),
            Option(
                "--notify-after", "s of running, which is long", f"{NOTIFY_AFTER_S:.0f}", {"type": positive_seconds}
            ),
            Option("--threads", "requests at once; a held one counts", f"{THREADS}", {"type": int}),
        ),
    ),
    Subcommand(
        *("token add", care(add_token), "make a token, and print it this once"),
        (
            Option("name", "whose it is", more={"type": token_name}),
            Option("--scope", "what it may", more={"choices": get_args(Scope), "required": True}),
            Option("--expires", "after which it is not valid: 90d, 12h", more={"type": duration, "metavar": "TIME"}),
        ),
    ),
    Subcommand("token list", care(list_tokens), "show the tokens, and when each was last used", (JSON,)),
    Subcommand("audit verify", care(check_audit), "look whether the audit log is as it was written", (LOG,)),
    Subcommand(
        "token revoke", care(revoke_token), "turn away who has a token, at once", (Option("name", "whose it was"),)
    ),
    Subcommand("render", render, ""),  # not for people
    Subcommand(
        *("backup", care(backup), "write all of the state, as it is at one moment, into FILE, while others go on"),
        (Option("file", "a .tar.gz; - is stdout", more={"metavar": "FILE"}),),
    ),
    Subcommand(
        *(
            "restore",
            care(restore),
            "put a backup in the place of the state, while others go on; what was there is kept",
        ),
        (Option("file", "what backup has written; - is stdin", more={"metavar": "FILE"}),),
    ),
    Subcommand(
        *("fsck", care(fsck, failed=2), "look for what is wrong in the state directory; the exit code is then 1"),
        (Option("--repair", "and set it right; nothing is deleted", more={"action": "store_true"}), JSON),
    ),
    Subcommand(
        *("doctor", care(doctor), "look for what is wrong around the state directory; the exit code is then 1"),
        (
            *ADDRESS,
            PROXY,
            LOG,
            JSON,
        ),
    ),
)


def parser_of(subcommands: Iterable[Subcommand]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kirosync.py", description="One queue and one shared memory.")
    groups = {"": parser.add_subparsers(required=True, metavar="COMMAND")}
    for subcommand in subcommands:
        group, _, word = subcommand.words.rpartition(" ")
        if group not in groups:
            within = groups[""].add_parser(group, help=f"{group} COMMAND; {group} --help lists them")
            groups[group] = within.add_subparsers(required=True, metavar="COMMAND")
        shown = argparse.ArgumentDefaultsHelpFormatter
        help: Record = {"help": subcommand.what} if subcommand.what else {}
        added = groups[group].add_parser(word, description=subcommand.what, formatter_class=shown, **help)
        for option in (STATE, *subcommand.options):
            option.add_to(added)
        added.set_defaults(run=subcommand.run)
    return parser


def main() -> None:
    arguments = parser_of(SUBCOMMANDS).parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
