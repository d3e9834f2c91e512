#!/usr/bin/env python3
# /// script
# requires-python = ">=3.11"
# dependencies = ["urllib3>=2"]
# ///
"""The other end of kirosync: ask a service, and keep a copy of its state in step.

    service = client.Service("http://127.0.0.1:3001", token)
    copy = client.Copy(service, "copy.json")
    copy.write({"conversations": {"c1": [{"role": "user", "content": "hi", "timestamp": 1710338438173}]}})
    copy.follow(lambda change: print(change.changed))

A copy asks for what is new since its cursor and waits for it, so the service and the network are asked for what has
changed; here it is merged with all that there is, and written to the file whole. It takes up where it was
after the service was restarted, the connection was lost, or (if it has a file) this program was. What is written to it
is kept until the service has acknowledged it. When the service no longer has what it had (a restored backup), the
change says what is missing there, and ``write`` brings that back.

It is a program, too, for a human at a terminal and for scripts:

    client.py run -- make test      runs it where the agent is, as if it ran here
    client.py --help                lists the rest, and the exit codes

The sections, each of which uses only what stands above it, and the one rule of each:

    Errors    what may go wrong between here and a service
    Rules     what becomes of two versions, and how things are told; no network, no disk, no clock
    Service   requests and answers
    Copy      the state of a service, here
    Terminal  what is said to who sits there, and what they can ask for; with the files of a folder
    Main      argv, the environment, settings, signals
"""

from __future__ import annotations

import argparse
import base64
import bisect
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import os
import queue
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import stat
import sys
import threading
import time
import tomllib
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast
from urllib.parse import quote, urlencode

try:
    import urllib3
except ModuleNotFoundError:
    own = Path(__file__).resolve().parent / ".venv"  # of ./install.sh run
    if __name__ != "__main__":
        raise
    if Path(sys.prefix) == own or not (own / "bin/python").exists():
        sys.exit("client.py: urllib3 is missing: pip install urllib3, or start it by: uv run client.py")
    os.execv(own / "bin/python", [str(own / "bin/python"), *sys.argv])

Record = dict[str, Any]
T = TypeVar("T")


# ---------------------------------------------------------------------------------------- Errors
# What may go wrong between here and a service.


class Unreachable(Exception):
    """The service cannot be reached now, or not do what was asked; later it may. ``pause`` (s) is what it asks for."""

    def __init__(self, problem: str, pause: float = 0, body: Record | None = None) -> None:
        super().__init__(problem)
        self.pause, self.body = pause, body or {}


class Unconnected(Unreachable):
    """Nobody answers at that address; nothing was sent."""


class Unwelcome(Unreachable):
    """The service does not take the token, or not for this."""


class Refused(Exception):
    """What was sent is not accepted as it is; the text says why, and ``status`` and ``body`` what was answered."""

    def __init__(self, status: int, body: Record) -> None:
        super().__init__(str(body.get("error")))
        self.status, self.body = status, body


class Misused(Exception):
    """What was typed, or stands in the settings, cannot be followed; the text says why."""


# ---------------------------------------------------------------------------------------- Rules
# How two versions become one, as the service does it (tests/vectors.json says it by examples), and how things are told.

KINDS = ("conversations", "documents", "commands")
EMPTY: Record = {kind: {} for kind in KINDS}


def canonical(value: Any) -> bytes:
    """Return bytes that are equal for equal values, and whose order is the same in every client."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


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


def join(mine: Record, theirs: Record, rank: Callable[[Record], Any]) -> Record:
    """Return the one that ranks higher, whole; equals are united."""
    if rank(mine) == rank(theirs):
        return unite(mine, theirs)
    return max(mine, theirs, key=rank)


def message_rank(message: Record) -> tuple[Any, ...]:
    return message["timestamp"], len(message["content"]), message["content"]


def document_rank(document: Record) -> tuple[Any, ...]:
    return document["timestamp"], document["content"]


def version_of(message: Record, group: list[tuple[str, int]]) -> int | None:
    """Return where in a sorted *group* of (content, place), of one id or one moment and role, a version of it is.

    Without an id no content in a group begins another, so the one that begins with this, or that this begins with, is
    next to where it belongs.
    """
    if "id" in message:
        return 0 if group else None
    at = bisect.bisect_left(group, (message["content"],))
    if at < len(group) and group[at][0].startswith(message["content"]):
        return at
    return at - 1 if at and message["content"].startswith(group[at - 1][0]) else None


def merge_messages(mine: Iterable[Record], theirs: Iterable[Record]) -> list[Record]:
    """Return the messages of both in one order: by timestamp, and then as they were first seen with it.

    >>> part, whole = ({"role": "a", "content": text, "timestamp": 1} for text in ("Hel", "Hello"))
    >>> merge_messages([part], [whole]) == merge_messages([whole], [part]) == [whole]
    True
    """
    merged: dict[int, Record] = {}
    groups: dict[Any, list[tuple[str, int]]] = {}
    for place, message in enumerate([*mine, *theirs]):
        key = ("id", message["id"]) if "id" in message else (message["timestamp"], message["role"])
        group = groups.setdefault(key, [])
        at = version_of(message, group)
        if at is None:
            bisect.insort(group, (message["content"], place))
            merged[place] = message
        else:
            known = merged.pop(first := group[at][1])
            winner = join(known, message, message_rank)
            there = first if winner["timestamp"] == known["timestamp"] else place
            group[at], merged[there] = (winner["content"], there), winner
    return [merged[place] for place in sorted(merged, key=lambda place: (merged[place]["timestamp"], place))]


def merge(state: Record, push: Record) -> Record:
    """Return *state* with the records of *push*, by kind: messages and documents merged, commands as pushed."""
    conversations, documents = dict(state["conversations"]), dict(state["documents"])
    for identity, messages in push.get("conversations", {}).items():
        conversations[identity] = merge_messages(conversations.get(identity, []), messages)
    for identity, document in push.get("documents", {}).items():
        known = documents.get(identity)
        documents[identity] = join(known, document, document_rank) if known else document
    commands = {**state["commands"], **push.get("commands", {})}
    return {"conversations": conversations, "documents": documents, "commands": commands}


def applied(state: Record, said: Record) -> Record:
    """Return *state* after an answer of GET /sync: what is deleted taken out, messages merged, the rest as it is there.

    >>> old = {"conversations": {}, "documents": {"a": 1, "b": 2}, "commands": {}}
    >>> applied(old, {"documents": {"a": 3}, "deleted": {"documents": ["b"]}})["documents"]
    {'a': 3}
    """
    gone = said.get("deleted", {})
    kept: Record = {
        kind: {}
        if said.get("full")
        else {key: state[kind][key] for key in state[kind] if key not in gone.get(kind, ())}
        for kind in KINDS
    }
    fresh = {kind: {**kept[kind], **said.get(kind, {})} for kind in ("documents", "commands")}
    return {**merge(kept, {"conversations": said.get("conversations", {})}), **fresh}


Types = tuple[type, ...]
TEXT: Types = (str,)
NUMBER: Types = (int, float)
MESSAGE = {"role": TEXT, "content": TEXT, "timestamp": NUMBER}
DOCUMENT = {"content": TEXT, "timestamp": NUMBER}


def flaws(push: Record) -> Iterator[str]:
    """Yield what of *push* the rules could not merge.

    >>> [*flaws({"documents": {"d": {"content": "x"}}})]
    ['documents.d.timestamp: must be a number']
    """
    talks, documents, commands = (push.get(kind, {}) for kind in KINDS)
    if not all(isinstance(records, dict) for records in (talks, documents, commands)):
        yield "a push is {kind: {id: record}}"
        return
    for identity, messages in talks.items():
        if not isinstance(messages, list):
            yield f"conversations.{identity}: must be a list of messages"
            continue
        for place, message in enumerate(messages):
            yield from lacks(message, MESSAGE, f"conversations.{identity}[{place}]")
    for identity, document in documents.items():
        yield from lacks(document, DOCUMENT, f"documents.{identity}")


def lacks(record: Any, shape: dict[str, Types], where: str) -> Iterator[str]:
    for field, kinds in shape.items():
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, kinds) or isinstance(value, bool):
            yield f"{where}.{field}: must be a {'text' if kinds is TEXT else 'number'}"


def missing(state: Record, before: Record) -> Record:
    """Return what *before* has of conversations and documents and *state* has not: a push that brings it back."""
    united = merge(state, {kind: before[kind] for kind in ("conversations", "documents")})
    talks = {}
    for identity, messages in united["conversations"].items():
        known = {canonical(message) for message in state["conversations"].get(identity, [])}
        talks[identity] = [message for message in messages if canonical(message) not in known]
    there = {identity: canonical(document) for identity, document in state["documents"].items()}
    documents = {key: value for key, value in united["documents"].items() if there.get(key) != canonical(value)}
    lost = {"conversations": {key: value for key, value in talks.items() if value}, "documents": documents}
    return {kind: records for kind, records in lost.items() if records}


# How a command ended, as an exit code: of one that ran its own. EXIT says the rest of them, by their meaning.
EXIT = {
    0: "done; and of run and wait: the command's own exit code, 128 + n if signal n killed it",
    1: "refused or failed; of ask --confirm: no; of doctor: something is bad; of sync: something is left",
    2: "not what can be typed here, or the settings are wrong",
    69: "the service cannot be reached",
    70: "it was started, and how it ended is unknown (lost)",
    75: "nobody took it in time (expired)",
    77: "the token is not accepted, or may not do this; or the agent's policy refused it",
    124: "it took too long (timeout); of ask: nobody answered",
    130: "cancelled",
    141: "whoever read what is printed went away",
}
OUTCOMES = {"ok": 0, "error": 1, "lost": 70, "expired": 75, "refused": 77, "timeout": 124, "cancelled": 130}
ENDED = ("completed", "failed")


def exit_code(command: Record) -> int:
    """Return the exit code that says how *command* ended.

    >>> exit_code({"outcome": "exit", "result": {"exitCode": 3}}), exit_code({"outcome": "timeout"})
    (3, 124)
    >>> exit_code({"type": "user_input", "outcome": "expired"})
    124
    """
    outcome, result = command.get("outcome"), command.get("result")
    if outcome == "exit" and isinstance(result, dict) and isinstance(code := result.get("exitCode"), int):
        return code & 255 or 1
    if outcome == "expired" and command.get("type") == "user_input":
        return 124
    return OUTCOMES.get(str(outcome), 1)


def farewell(command: Record) -> str:
    """Return what is to be said of how *command* ended, "" if its exit code says it all.

    >>> farewell({"outcome": "exit", "result": {"exitCode": 137}})
    'ended by signal 9 (exit code 137)'
    >>> farewell({"outcome": "timeout", "error": "timed out after 3 s and was ended"})
    'timeout: timed out after 3 s and was ended'
    """
    outcome = command.get("outcome")
    if outcome in ("ok", "exit"):
        code = exit_code(command)
        return f"ended by signal {code - 128} (exit code {code})" if 128 < code < 128 + 65 else ""
    return f"{outcome}: {command.get('error', 'it is not said why')}"


def result_text(command: Record) -> bytes:
    """Return what a *command* that has ended gave, for who asked: the text that is its point, or all of it as JSON.

    >>> result_text({"type": "user_input", "result": {"value": "blue"}})
    b'blue\\n'
    """
    result, point = command.get("result"), POINT.get(str(command.get("type")))
    if not isinstance(result, dict) or not isinstance(text := result.get(point), str):
        return b"" if result is None else f"{as_json(result)}\n".encode()
    if point == "content":
        return base64.b64decode(text) if result.get("encoding") == "base64" else text.encode("utf-8", "replace")
    return f"{text}\n".encode("utf-8", "replace") if text and not text.endswith("\n") else text.encode()


POINT = {"user_input": "value", "kiro_command": "output", "read_file": "content"}  # of a result


def command_line(words: Sequence[str]) -> str:
    """Return the line for a shell that *words* are: one is a line as it stands, several are a program's arguments.

    >>> command_line(["ls | wc"]), command_line(["ls", "my files"])
    ('ls | wc', "ls 'my files'")
    """
    return words[0] if len(words) == 1 else shlex.join(words)


def order_of(words: Sequence[str], read: Callable[[str], str]) -> Record:
    """Return the order that *words* say: a type, and field=text, field:=JSON or field=@FILE, which is *read*.

    >>> order_of(["read_file", "path=/etc/hosts", "limit:=100"], str)
    {'type': 'read_file', 'path': '/etc/hosts', 'limit': 100}
    """
    order: Record = {"type": words[0]}
    for word in words[1:]:
        found = re.match(r"([^=:@]+)(:?=)(@?)(.*)", word, re.DOTALL)
        if not found:
            raise Misused(f"{word}: not a field; write field=text, field:=JSON or field=@FILE")
        field, sign, at, text = found.groups()
        text = read(text) if at and sign == "=" else at + text
        try:
            order[field] = json.loads(text) if sign == ":=" else text
        except ValueError as problem:
            raise Misused(f"{field}:= wants JSON: {problem}") from None
    return order


VISIBLE = "\u00a0\u200d"  # neither moves a cursor nor reorders a line: a space, and what joins emoji


def plain(text: str, keep: str = "") -> str:
    """Return *text*, which somebody else wrote, with all that could steer a terminal made visible, but for *keep*.

    >>> plain("a\\x1b[2Jb\\u202e")
    'a\\\\x1b[2Jb\\\\u202e'
    """
    return "".join(
        each if each.isprintable() or each in keep or each in VISIBLE else each.encode("unicode_escape").decode()
        for each in text
    )


def as_json(value: Any) -> str:
    """Return *value* as JSON in one line, which shows what it says and steers no terminal.

    >>> as_json({"a": "ü\\x9b"})
    '{"a": "ü\\\\u009b"}'
    """
    text = json.dumps(value, ensure_ascii=False)
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def cells(text: str) -> int:
    """Return how many places *text* takes in a line of a terminal."""
    return sum(
        0 if unicodedata.combining(each) else 2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in text
    )


def table(rows: Sequence[Sequence[str]], width: int = 0) -> list[str]:
    """Return *rows* as lines whose columns stand below each other; with a *width* the last one is cut to fit.

    >>> table([["a", "one"], ["bcd", "two three"]], width=13)
    ['a    one', 'bcd  two thr…']
    """
    made = [[plain(" ".join(text.split())) for text in row] for row in rows]
    widths = [max(map(cells, column)) for column in zip(*(row[:-1] for row in made), strict=True)]
    lines = []
    for row in made:
        start = "".join(text + " " * (wide - cells(text) + 2) for text, wide in zip(row[:-1], widths, strict=True))
        lines.append(start + (cut(row[-1], max(8, width - cells(start))) if width else row[-1]))
    return [line.rstrip() for line in lines]


def cut(text: str, width: int) -> str:
    """Return as much of *text* as takes *width* places, its end marked where something was left out.

    >>> cut("abcdef", 4), cut("abcd", 4)
    ('abc…', 'abcd')
    """
    if cells(text) <= width:
        return text
    while cells(text) > width - 1:
        text = text[:-1]
    return text + "…"


def ago(milliseconds: Any) -> str:
    """Return how long ago, or how long, that is, roughly.

    >>> ago(90_000), ago(3 * 86_400_000), ago(None)
    ('1m', '3d', '-')
    """
    if not isinstance(milliseconds, (int, float)):
        return "-"
    seconds = max(0, milliseconds) / 1000
    size, unit = next(((size, unit) for size, unit in SPANS if seconds >= size), (1, "s"))
    return f"{seconds / size:.0f}{unit}" if size == 1 else f"{seconds // size:.0f}{unit}"


SPANS = ((86400, "d"), (3600, "h"), (60, "m"))


def takers(command: Record, agents: Record) -> str:
    """Return whom a pending *command* waits for, as a sentence says it; *agents* is what GET /agents lists.

    >>> takers({"type": "execute_bash"}, {})
    'for an agent that does execute_bash; none is there'
    """
    able = {
        name: agent
        for name, agent in agents.items()
        if command.get("type") in agent.get("types", []) and command.get("target", name) == name
    }
    here = sorted(plain(name) for name, agent in able.items() if agent.get("present"))
    if here:
        return f"for {', '.join(here)}, which is busy, or asks a human first"
    who = f"the agent {plain(str(command['target']))}" if "target" in command else "an agent"
    return f"for {who} that does {command.get('type')}; none is there"


def command_row(identity: str, command: Record, now: float) -> list[str]:
    """Return the row of a *command* in a list: its id, how it stands, age, type, and what it is about."""
    stands = command.get("outcome") if command.get("status") in ENDED else command.get("status")
    about = next((str(command[field]) for field in ABOUT if command.get(field)), "")
    about = f"{about} {command.get('operation', '')}" if "operation" in command else about
    return [identity, str(stands), ago(now - command.get("createdAt", now)), str(command.get("type")), about]


ABOUT = ("command", "path", "query", "prompt", "service")


def document_row(identity: str, document: Record, now: float) -> list[str]:
    size = len(document.get("content", "").encode("utf-8", "replace"))
    return [identity, str(size), ago(now - document.get("timestamp", now)), str(document.get("language", ""))]


def conversation_row(identity: str, messages: list[Record], now: float) -> list[str]:
    last = messages[-1] if messages else {}
    said = f"{last.get('role', '')}: {last.get('content', '')[:400]}" if last else ""
    return [identity, str(len(messages)), ago(now - last.get("timestamp", now)), said]


def continued(last: Record | None, message: Record) -> str | None:
    """Return how a *message* goes on of which the *last* one that was printed is the beginning; None if it is another.

    >>> hel, hello = ({"role": "a", "content": text, "timestamp": 1} for text in ("Hel", "Hello"))
    >>> continued(hel, hello), continued(hello, hel), continued(None, hel)
    ('lo', None, None)
    """
    if last is None or last.get("id") != message.get("id"):
        return None
    same = "id" in message or (last["timestamp"], last["role"]) == (message["timestamp"], message["role"])
    grows = same and message["content"].startswith(last["content"])
    return message["content"].removeprefix(last["content"]) if grows else None


def question_of(said: Record) -> str:
    """Return what is asked of a human, with what can be answered; *said* is one of GET /api/kiro/status.

    >>> question_of({"prompt": "Which?", "type": "choice", "choices": ["a", "b"]})
    'Which? (a, b)'
    """
    possible = {"choice": ", ".join(map(str, said.get("choices", []))), "confirmation": "yes, no"}
    kind = str(said.get("type"))
    wanted = possible.get(kind, "" if kind == "text" else kind)
    return plain(str(said.get("prompt", "")), keep="\n") + (f" ({plain(wanted)})" if wanted else "")


def words_before(line: str) -> tuple[list[str], str]:
    """Return the words of a *line* for a shell that is being typed, and the one that is not ended.

    >>> words_before("client.py cat 'my fi"), words_before("client.py ")
    ((['client.py', 'cat'], 'my fi'), (['client.py'], ''))
    """
    for closing in ("", "'", '"'):
        with contextlib.suppress(ValueError):
            words = shlex.split(line + closing)
            ended = not closing and re.search(r"(?<!\\)\s$", line)
            return (words, "") if ended or not words else (words[:-1], words[-1])
    return [], ""


def inserted(word: str, begun: str, piece: str) -> str:
    r"""Return what bash is to put in the place of the *piece* that it knows of the *begun* word, so that it is *word*.

    It breaks words at : and =, and runs what it is told: so what somebody else wrote is quoted.

    >>> inserted("a b;c", "a", "a"), inserted("http://x", "http:", ":"), inserted("http://x", "http:/", "/")
    ('a\\ b\\;c', '//x', '//x')
    """
    piece = "" if piece in (":", "=") else piece
    rest = word[len(begun) - len(piece) :] if begun.endswith(piece) else word
    return re.sub(r"([^\w./@%+,:=-])", r"\\\1", rest)


TYPES = (
    *("execute_bash", "read_file", "write_file", "list_directory"),
    *("aws_operation", "code_search", "kiro_command", "user_input"),
)


class Finding(NamedTuple):
    """What the doctor has to say: ``level`` is ok, warn or bad; what to do about it, if it is not ok."""

    level: str
    sentence: str
    remedy: str = ""


SKEW_MS = 2000  # that clocks differ by without harm
AHEAD_MS = 5 * 60_000  # the service takes a document that is later than this as of now


def judge_clock(now: float, there: float, took: float) -> Finding:
    """Judge our clock, which says *now* (ms), by that of the service, asked *took* (ms) before.

    >>> judge_clock(60_000, 0, 10).sentence
    'the clock here is 60 s ahead of that of the service'
    """
    ahead = now - took / 2 - there
    if abs(ahead) <= SKEW_MS + took / 2:
        return Finding("ok", "the clocks agree")
    which = "ahead of" if ahead > 0 else "behind"
    level = "bad" if abs(ahead) > AHEAD_MS else "warn"
    said = f"the clock here is {abs(ahead) / 1000:.0f} s {which} that of the service"
    return Finding(level, said, "set the one that is wrong: timedatectl set-ntp true")


LOOPBACK = re.compile(r"http://(localhost|127\.[0-9.]+|\[::1\])([:/]|$)")


def judge_url(url: str) -> Finding:
    """Judge who can read what is sent to *url*.

    >>> judge_url("http://192.0.2.1:3001").level, judge_url("http://127.0.0.1:3001").level
    ('bad', 'ok')
    """
    if url.startswith("https:"):
        return Finding("ok", "what is sent is encrypted, and the certificate is good")
    if LOOPBACK.match(url):
        return Finding("ok", "it is this machine, so that nothing has to be encrypted")
    remedy = "put TLS in front of it (./install.sh install --domain NAME), and use https://"
    return Finding("bad", "the token and all else cross the network in plain text", remedy)


def judge_token(token: Any, now: float) -> Finding:
    """Judge what GET /health says of who asks, at *now* (ms).

    >>> judge_token({"name": "phone", "scope": "client"}, 0).sentence
    "the token 'phone' is good, of the scope client"
    """
    if not isinstance(token, dict):
        return Finding("bad", "the token is not accepted", "is it that service's? kirosync.py token add makes another")
    said = f"the token {plain(str(token.get('name')))!r} is good, of the scope {plain(str(token.get('scope')))}"
    if "expiresAt" in token:
        said += f", for {ago(token['expiresAt'] - now)} more"
    if token.get("scope") in ("read", "agent"):
        return Finding("warn", said, "to run commands, and to answer, one of the scope client is needed")
    return Finding("ok", said)


def judge_agents(agents: Record) -> Finding:
    """Judge who is there to execute commands; *agents* is what GET /health lists.

    >>> judge_agents({"box": {"kind": "agent", "present": True}}).sentence
    'there to execute commands: box (agent)'
    """
    here = [f"{plain(name)} ({plain(str(agent['kind']))})" for name, agent in agents.items() if agent["present"]]
    if any(agent["present"] and agent["kind"] == "agent" for agent in agents.values()):
        return Finding("ok", f"there to execute commands: {', '.join(here)}")
    known = f"; {', '.join(map(plain, agents))} was there before" if agents else ""
    remedy = "start one: agent.py --server URL --token-file FILE, or ./install.sh run"
    return Finding("warn", f"no agent is there, so commands wait{known}", remedy)


class Side(NamedTuple):
    """A document as it is on one side: what identifies its content, and when (ms) it was changed."""

    sha256: str
    timestamp: float


def due(base: str | None, here: Side | None, there: Side | None) -> str:
    """Return what brings a document in step that both had with the content *base* (a sha256), if they ever had.

    "outdo" and "yield" are to push and to pull where both have changed: the later one wins, as it does in the service.

    >>> due("old", Side("new", 5), Side("old", 1)), due("old", Side("new", 5), Side("other", 9))
    ('push', 'yield')
    >>> due(None, None, Side("x", 1)), due("old", None, Side("x", 1)), due("old", None, Side("old", 1))
    ('pull', 'pull', 'remove there')
    >>> due("old", Side("old", 1), None), due(None, Side("old", 1), None), due("old", Side("x", 1), Side("x", 2))
    ('remove here', 'push', 'same')
    """
    if here and there and here.sha256 == there.sha256:
        return "same"
    if here and there:
        contest = "outdo" if here.timestamp > there.timestamp else "yield"
        return "pull" if here.sha256 == base else "push" if there.sha256 == base else contest
    if here:
        return "remove here" if here.sha256 == base else "push"
    if there:
        return "remove there" if there.sha256 == base else "pull"
    return "forget"


PUSHES, PULLS = ("push", "outdo", "remove there"), ("pull", "yield", "remove here")
KEPT_OUT = {".git", ".hg", ".svn", ".bzr", "cvs", "node_modules", "__pycache__"}  # what programs keep there is theirs
CONFLICT = re.compile(r"\.conflict-\d{8}-\d{6}")  # after the name of a file that gave way


def covered(path: str, roots: Iterable[str]) -> bool:
    """Return whether *path* is one of *roots*, or inside one and not hidden in it; "" is everything.

    >>> covered("a/b", ["a"]), covered("a/.b/c", ["a"]), covered("a/.b/c", ["a/.b"]), covered("ab", ["a"])
    (True, False, True, False)
    >>> covered("a/.git/config", ["a/.git"]), covered("a.conflict-20260101-000000", [""])
    (False, False)
    >>> covered("a/.\u017fvn/config", ["a/.\u017fvn"])  # which some file systems take for .svn
    False
    """
    parts = path.split("/")
    if CONFLICT.search(parts[-1]) or any(part.casefold() in KEPT_OUT for part in parts):
        return False
    for root in roots:
        outer = root.split("/") if root else []
        if parts[: len(outer)] == outer and not any(map(is_hidden, parts[len(outer) :])):
            return True
    return False


def is_hidden(part: str) -> bool:
    """Return whether *part* of a path is hidden; where it leads out of a folder it is not, but wrong."""
    return part.startswith(".") and part not in (".", "..")


def check_place(path: str) -> str:
    """Return *path* if it leads to a place below the folder that it starts from, by its letters; raise ValueError.

    >>> check_place("a/b.md")
    'a/b.md'
    >>> check_place("a/../../b")
    Traceback (most recent call last):
        ...
    ValueError: 'a/../../b' leads out of the folder
    >>> check_place("a/-rf")
    Traceback (most recent call last):
        ...
    ValueError: 'a/-rf' would be read as an option by whoever is given its name
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"{path!r} leads out of the folder" if path else "it has no name")
    if not path.isprintable() or (os.sep != "/" and re.search(r'[\\:*?"<>|]', path)):
        raise ValueError(f"{path!r} cannot be the name of a file")
    if any(part.startswith("-") for part in parts):
        raise ValueError(f"{path!r} would be read as an option by whoever is given its name")
    return path


ID_CHARACTERS, NAME_BYTES = 128, 220  # of an id; of it, percent-encoded


def document_id(path: str) -> str:
    """Return the id of the document at *path*: that itself, if it can be one; as the editor's extension does it.

    >>> document_id("src/a.py"), len(document_id("x" * 300))
    ('src/a.py', 61)
    """
    if len(path) <= ID_CHARACTERS and len(quote(path, safe="!'()*")) <= NAME_BYTES:
        return path
    end = re.sub(r"[^A-Za-z0-9._-]", "_", path[-20:])
    return f"{sha256_of(path.encode())[:40]}-{end}"


def path_of(identity: str, document: Record) -> str:
    """Return the path of a document: its id, or the path that it says of itself, if its id comes from that."""
    path = document.get("path")
    return path if isinstance(path, str) and document_id(path) == identity else identity


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


LANGUAGES = {  # as editors call them, by the ends of names
    **{"c": "c h", "cpp": "cpp hpp cc cxx", "csharp": "cs", "css": "css", "go": "go", "html": "html htm"},
    **{"java": "java", "javascript": "js mjs cjs", "json": "json", "kotlin": "kt", "lua": "lua", "markdown": "md"},
    **{"perl": "pl pm", "php": "php", "plaintext": "txt", "python": "py pyi", "ruby": "rb", "rust": "rs"},
    **{"shellscript": "sh bash", "sql": "sql", "swift": "swift", "toml": "toml", "typescript": "ts mts cts"},
    **{"typescriptreact": "tsx", "javascriptreact": "jsx", "xml": "xml", "yaml": "yaml yml", "ini": "ini cfg"},
}


def language_of(path: str) -> Record:
    """Return what a document says of its language, by the end of its *path*.

    >>> language_of("a/b.py"), language_of("README")
    ({'language': 'python'}, {})
    """
    end = path.rpartition(".")[2].lower()
    return next(({"language": name} for name, ends in LANGUAGES.items() if end in ends.split()), {})


def agent_row(name: str, agent: Record, now: float) -> list[str]:
    here = "here" if agent.get("present") else f"seen {ago(now - agent.get('lastSeen', now))} ago"
    return [name, str(agent.get("kind")), here, str(agent.get("version", "")), ", ".join(agent.get("types", []))]


# ---------------------------------------------------------------------------------------- Service
# Requests and answers.

CONNECT_S = 10  # for an answer, beyond the time that the service may hold it
FINAL = (400, 413, 415, 422)  # what is refused so is refused for ever
LONGEST_PAUSE_S = 3600.0  # that a service may ask for
UNCONNECTED = (
    urllib3.exceptions.NewConnectionError,
    urllib3.exceptions.ConnectTimeoutError,
    urllib3.exceptions.SSLError,
)


class Service:
    """A service at *url*. Any number of threads may ask at once; each connection is kept for the next request."""

    def __init__(self, url: str, token: str) -> None:
        if not token.isprintable() or not token.isascii():
            raise ValueError("the token has characters that no header can carry")  # whoever sends it would show it
        self.url, self.token = url.rstrip("/"), token
        self.headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/json",
            "Accept-Encoding": "gzip",
        }
        self.pool = urllib3.PoolManager(maxsize=16, retries=False)
        self.patience: float = CONNECT_S
        self.answered = False  # by anybody, yet

    def request(self, method: str, path: str, body: bytes | None = None, held: float = 0, **headers: str) -> Any:
        """Return the answer, whatever its status, but for what may be otherwise later: then raise Unreachable.

        *held* is how long (s) the service may wait before it answers; a header's name has _ for -.
        """
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.send(method, path, body, held, headers=named)

    def send(
        self, method: str, path: str, body: bytes | None, held: float, *, headers: dict[str, str], read: bool = True
    ) -> Any:
        """Return the answer, as request does; its body is still to be read, unless that is to be *read* here."""
        wanted: Any = {"headers": {**self.headers, **headers}, "timeout": held + self.patience, "preload_content": read}
        with self.reached():
            answer: Any = self.pool.request(method, self.url + path, body=body, **wanted)
            self.answered = True
            said = self.why(answer) if answer.status in (401, 429) or answer.status >= 500 else {}
        if answer.status == 401:
            ended = f": {why}" if "expired" in (why := str(said.get("message"))) else "; is it that service's?"
            raise Unwelcome(f"{self.url} does not take the token{ended}")
        if answer.status == 429 or answer.status >= 500:
            pause = answer.headers.get("Retry-After", "")
            problem = f"{self.url} answered {answer.status}: {said.get('error')}"
            raise Unreachable(problem, min(float(pause), LONGEST_PAUSE_S) if pause.isdecimal() else 0, said)
        return answer

    @contextlib.contextmanager
    def reached(self) -> Iterator[None]:
        """Say in our words why the service cannot be reached."""
        try:
            yield
        except UNCONNECTED as error:
            raise Unconnected(f"{self.url}: {reason_of(error)}") from None
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(f"{self.url}: {reason_of(error)}") from None

    def ask(self, method: str, path: str, body: Record | None = None, held: float = 0, **headers: str) -> Record | None:
        """Return the JSON that was answered, or None for a conflict or what is not there.

        Raises Refused, also for what this token may not.
        """
        answer = self.request(method, path, None if body is None else json.dumps(body).encode(), held, **headers)
        if answer.status in (404, 409):
            return None
        if is_final(answer):
            raise Refused(answer.status, self.why(answer))
        self.check_permitted(answer)
        if answer.status != 200:
            raise self.astray(answer)
        return told(answer.data)

    def call(self, method: str, path: str, body: Record | None = None, held: float = 0, **headers: str) -> Record:
        """Return the JSON that was answered; raise Refused for whatever was not done, or is not there."""
        answer = self.request(method, path, None if body is None else json.dumps(body).encode(), held, **headers)
        self.check_done(answer)
        return told(answer.data)

    def check_done(self, answer: Any) -> None:
        self.check_permitted(answer)
        if 300 <= answer.status < 400:
            raise self.astray(answer)
        if not 200 <= answer.status < 300:
            raise Refused(answer.status, self.why(answer))

    def why(self, answer: Any) -> Record:
        """Return what is said of what was not done, without our token, which an echo of the request would show."""
        return told(answer.data, self.token)

    def astray(self, answer: Any) -> Unreachable:
        return Unreachable(f"{self.url} answered {answer.status}; is there something between us?")

    def check_permitted(self, answer: Any) -> None:
        if answer.status == 403:
            raise Unwelcome(f"{self.url}: {self.why(answer).get('error')}")

    def sync(self, query: dict[str, str], push: Record | None = None, wait: float = 0) -> Record:
        """Return what GET /sync says to a *query*, after up to *wait* (s), or POST /sync if there is a *push*.

        Raises Unreachable or Refused.
        """
        given = {name: value for name, value in query.items() if value} | ({"wait": f"{wait:.3f}"} if wait else {})
        said = self.ask("GET" if push is None else "POST", f"/sync?{urlencode(given)}", push, held=wait)
        said = said.get("data") if said and push is not None else said
        if not is_answer(said):
            raise Unreachable(f"{self.url} is no kirosync")
        return cast(Record, said)


def is_final(answer: Any) -> bool:
    """Return whether it is so for ever, or for this token; a 403 that names no scopes is of something between."""
    return answer.status in FINAL or (answer.status == 403 and isinstance(told(answer.data).get("scopes"), list))


def reason_of(error: Exception) -> str:
    """Return why a connection failed, in the words of the system if it has any."""
    causes = (error.__cause__, *error.args)
    return next((each.strerror for each in causes if isinstance(each, OSError) and each.strerror), str(error))


def is_answer(said: Any) -> bool:
    """Return whether *said* is what GET /sync may say."""
    if not isinstance(said, dict) or not isinstance(said.get("cursor"), str):
        return False
    parts = [*(said.get(kind, {}) for kind in KINDS), gone := said.get("deleted", {})]
    numbers = isinstance(said.get("serverTime", 0), (int, float))
    return (
        numbers
        and all(isinstance(part, dict) for part in parts)
        and all(isinstance(ids, list) for ids in gone.values())
    )


def told(body: bytes, secret: str = "") -> Record:
    """Return the JSON object in *body*, or what it says else as an error; with *** for a *secret*.

    >>> told(b'{"error": ["I got abc"]}', "abc"), told(b"<p>" + 199 * b"x" + b"abc", "abc")["error"][-2:]
    ({'error': ['I got ***']}, 'xx')
    """
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        return {"error": veiled(body.decode("utf-8", "replace"), secret)[:200]}
    return cast(Record, veiled(said, secret)) if secret else said


def veiled(said: Any, secret: str) -> Any:
    """Return what was *said* with *** for a *secret*, wherever it stands in it."""
    if isinstance(said, str) and secret:
        return said.replace(secret, "***")
    if isinstance(said, dict):
        return {veiled(key, secret): veiled(value, secret) for key, value in said.items()}
    return [veiled(each, secret) for each in said] if isinstance(said, list) else said


# ---------------------------------------------------------------------------------------- Copy
# The state of a service, here.

HELD_S = 50  # a question waits for something new
UNHELD_S = 0.5  # an answer without news that comes sooner was not held: the service has too many who wait
BACK_OFF_S = (0.2, 15.0)  # between tries, doubled from the first up to the second


class Change(NamedTuple):
    """What has become otherwise in a copy."""

    changed: dict[str, list[str]]  # ids by kind
    deleted: dict[str, list[str]]
    lost: Record  # what the service no longer has (see missing)
    refused: list[tuple[Record, str]]  # what was written here and is not accepted, and why

    def __bool__(self) -> bool:
        return any([*self.changed.values(), *self.deleted.values(), self.lost, self.refused])


def together(changes: list[Change]) -> Change:
    """Return several changes, oldest first, as one."""

    def ids(parts: list[dict[str, list[str]]]) -> dict[str, list[str]]:
        return {kind: [*dict.fromkeys(key for part in parts for key in part[kind])] for kind in KINDS}

    lost = functools.reduce(merge, [change.lost for change in changes], EMPTY)
    refused = [each for change in changes for each in change.refused]
    changed, deleted = ids([change.changed for change in changes]), ids([change.deleted for change in changes])
    return Change(changed, deleted, {kind: lost[kind] for kind in KINDS if lost[kind]}, refused)


class Copy:
    """A copy of a service's state: ``state`` is {kind: {id: record}} as GET /sync shows it, and what was written here.

    It is kept in the file *path*, if there is one, and taken up from there. ``state`` is replaced, never changed: who
    reads it needs no lock.
    """

    def __init__(self, service: Service, path: str | Path | None = None) -> None:
        self.service, self.path = service, Path(path) if path else None
        self.cursor, self.base = "", EMPTY  # the state of the service, as of the cursor
        self.outbox: list[Record] = []  # what was written here and is not acknowledged yet, oldest first
        self.ahead = 0.0  # of the service's clock against ours, s
        self.closed = threading.Event()
        self._lock = threading.RLock()  # guards all of this
        self._unheard: list[Change] = []
        if self.path and self.path.exists():
            try:
                known = json.loads(self.path.read_bytes())
                self.cursor, self.outbox = known["cursor"], known["outbox"]
                self.base = {kind: known["base"][kind] for kind in KINDS}
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{self.path} is no copy; remove it, and everything is asked for anew") from None
        self.state = functools.reduce(merge, self.outbox, self.base)

    def write(self, push: Record) -> None:
        """Merge *push*, {kind: {id: record}}, into the copy, and send it: now, or as soon as the service is there.

        Raises Refused if the service does not accept it; then it is as if it had not been written.
        """
        push = json.loads(json.dumps(push))  # what is done with it afterwards is not what was written
        for flaw in flaws(push):
            raise Refused(400, {"error": flaw})
        with self._lock:
            self.outbox.append(push)
            self.state = merge(self.state, push)
            self._save()
            with contextlib.suppress(Unreachable):
                refused = self._send()
                if refused and refused[-1][0] is push:
                    self._unheard.pop()  # it is said here
                    raise refused[-1][1]

    def sync(self, wait: float = 0) -> Change:
        """Bring the copy in step, waiting up to *wait* (s) for news; return what has changed since the last call.

        Raises Unreachable, or Refused if the token may not read it.
        """
        with self._lock:
            self._send()
            cursor = self.cursor
            wait = wait if cursor and not self._unheard else 0
        said = self.service.sync({"since": cursor}, wait=wait)
        with self._lock:
            if cursor == self.cursor and self._take(said):  # else a write has been answered meanwhile, with more
                self._save()
            unheard, self._unheard = self._unheard, []
            return together(unheard)

    def follow(self, heard: Callable[[Change], Any]) -> None:
        """Stay in step, and call *heard* with each change, until ``close`` is called."""
        pause = BACK_OFF_S[0]
        while not self.closed.is_set():
            asked = time.monotonic()
            try:
                change = self.sync(HELD_S)
                pause = BACK_OFF_S[0]
            except Unreachable as problem:
                self.closed.wait(max(problem.pause, pause * random.uniform(0.5, 1)))
                pause = min(2 * pause, BACK_OFF_S[1])
                continue
            if change:
                heard(change)
            elif time.monotonic() - asked < UNHELD_S:
                self.closed.wait(UNHELD_S)

    def now(self) -> float:
        """Return the moment (s) by the clock of the service, for timestamps."""
        return time.time() + self.ahead

    def close(self) -> None:
        """End ``follow``, once the question that it has asked is answered."""
        self.closed.set()

    def _send(self) -> list[tuple[Record, Refused]]:
        """Send what was written here, and return what of it was refused."""
        refusals = []
        while self.outbox:
            push, refused = self.outbox[0], []
            try:
                said = self.service.sync({"since": self.cursor}, push)
            except Refused as refusal:
                refused = [(push, refusal)]
                said = {"cursor": self.cursor}
            self._take(said, refused)
            self._save()
            refusals += refused
        return refusals

    def _take(self, said: Record, refused: Sequence[tuple[Record, Refused]] | None = None) -> bool:
        """Take in what the service *said* (of the first in the outbox, if there is a list of what is *refused*).

        Return whether there was anything new in it.
        """
        before, known = self.state, bool(self.cursor)
        base = applied(self.base, said)
        self.outbox = self.outbox if refused is None else self.outbox[1:]
        self.base, self.cursor, self.state = base, said["cursor"], functools.reduce(merge, self.outbox, base)
        if "serverTime" in said:
            self.ahead = said["serverTime"] / 1000 - time.time()
        changed = {kind: [*said.get(kind, {})] for kind in KINDS}
        gone = {kind: [key for key in before[kind] if key not in self.state[kind]] for kind in KINDS}
        lost = missing(self.state, before) if known and said.get("full") else {}
        change = Change(changed, gone, lost, [(push, str(refusal)) for push, refusal in refused or ()])
        self._unheard += [change] if change else []
        return bool(change)

    def _save(self) -> None:
        if self.path:
            aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            with open(aside, "w", opener=private) as file, contextlib.ExitStack() as undo:
                undo.callback(aside.unlink)
                json.dump({"cursor": self.cursor, "base": self.base, "outbox": self.outbox}, file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(aside, self.path)
                undo.pop_all()


def private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


# ---------------------------------------------------------------------------------------- Terminal
# What is said to who sits there, and what they can ask for.

FIRST_S = 30.0  # a service that was not reached yet is asked for so long
SOON_S = 2.0  # a command that nobody has taken by then is worth a word
PIECE_BYTES = 1 << 20  # of stdin, sent at once
INPUT_BYTES = 16 << 20  # the service takes so much of it
LEAVE = b"\x1d"  # Ctrl-], which ends the hold of a terminal as Ctrl-C does otherwise
PACE_S = (0.01, 0.2)  # between two looks at what is being printed, the more the longer that goes on without a break
TYPED_S = 0.03  # between two pieces of what is typed: a token may ask some fifty times a second
STREAMS = {"stdout": 1, "stderr": 2}
COLORS = {"ok": "32", "completed": "32", "here": "32", "pending": "33", "processing": "36", "warn": "33", "bad": "31"}
COLORS |= dict.fromkeys(("failed", "error", "exit", "timeout", "lost", "expired", "refused", "cancelled"), "31")


class Screen:
    """Where things are said: results on stdout, what is to be said of them on stderr."""

    def __init__(self, json: bool = False, quiet: bool = False) -> None:
        self.json, self.quiet = json, quiet
        self.locks = {1: threading.Lock(), 2: threading.Lock()}  # who reads one of them slowly holds up no other
        self.hinted = False
        self.raw = False  # a terminal on which the end of a line only moves down

    def give(self, value: Any, text: str = "") -> None:
        """Print *text*, or the *value* as JSON if that is wanted."""
        self.write(1, f"{as_json(value) if self.json else text}\n".encode("utf-8", "replace"))

    def tell(self, sentence: str) -> None:
        if not self.quiet:
            end = "\r\n" if self.raw else "\n"
            self.write(2, f"{self.clear()}{PROGRAM}: {plain(sentence)}{end}".encode("utf-8", "replace"))

    def hint(self, sentence: str) -> None:
        """Say what is of use to who looks on, and soon is of none: on a terminal, in a line that is written over."""
        if not self.quiet and os.isatty(2):
            line = cut(plain(sentence), self.width() - 1)
            self.write(2, f"{self.clear()}{line}".encode("utf-8", "replace"))
            self.hinted = bool(sentence)

    def clear(self) -> str:
        was, self.hinted = self.hinted, False
        return "\r\x1b[K" if was else ""

    def width(self) -> int:
        return shutil.get_terminal_size().columns

    def rows(self, rows: Sequence[Sequence[str]]) -> None:
        """Print a table; on a terminal in colours, and no wider than that."""
        wide = self.width() if os.isatty(1) else 0
        for line, row in zip(table(rows, wide), rows, strict=True):
            for word in row[1:3]:
                if word in COLORS and colored(1):
                    line = line.replace(f" {word} ", f" {painted(word, COLORS[word])} ", 1)  # noqa: PLW2901
            self.write(1, f"{line}\n".encode("utf-8", "replace"))

    def write(self, fd: int, text: bytes) -> None:
        with self.locks[fd]:
            write_all(fd, text)


def harmless(text: str) -> str:
    """Return *text*, which somebody else wrote, for stdout: as it is, but so that it steers no terminal."""
    return plain(text, keep="\n\t") if os.isatty(1) else text


def colored(fd: int) -> bool:
    return os.isatty(fd) and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def painted(text: str, color: str) -> str:
    return f"\x1b[{color}m{text}\x1b[0m"


def write_all(fd: int, text: bytes) -> None:
    while text:
        try:
            text = text[os.write(fd, text) :]
        except BlockingIOError:  # a terminal that somebody else has set so
            select.select([], [fd], [], 1)


class Line:
    """A service that is asked until it answers, however often it is restarted, or the connection is lost, meanwhile."""

    def __init__(self, service: Service, screen: Screen) -> None:
        self.service, self.screen = service, screen
        self.reached = self.lost = False

    def insist(self, ask: Callable[[], T]) -> T:
        """Return what *ask* does. Raises Unreachable where nobody was reached yet, Refused and Unwelcome at once."""
        pause, began = BACK_OFF_S[0], time.monotonic()
        for tries in itertools.count():
            try:
                answer = ask()
                break
            except Unwelcome:
                raise
            except Refused as refusal:
                if refusal.status == 403:
                    raise Unwelcome(f"{self.service.url}: {refusal}") from None
                raise
            except Unreachable as problem:
                patience = 0 if isinstance(problem, Unconnected) and not tries else FIRST_S
                if not self.reached and time.monotonic() - began >= patience:
                    raise
                self.mourn(problem)
                time.sleep(max(problem.pause, pause * random.uniform(0.5, 1)))
                pause = min(2 * pause, BACK_OFF_S[1])
        if self.lost:
            self.screen.tell("connected again")
        self.reached, self.lost = True, False
        return answer

    def mourn(self, problem: Unreachable) -> None:
        if not self.lost:
            self.lost = True
            self.screen.tell(f"{problem}; trying again")

    def call(self, method: str, path: str, body: Record | None = None, held: float = 0, **headers: str) -> Record:
        """Return the JSON that was answered, in the end."""
        return self.insist(lambda: self.service.call(method, path, body, held, **headers))


def at(kind: str, identity: str, more: str = "") -> str:
    return f"/{kind}/{quote(identity, safe='')}{more}"


class Printed(NamedTuple):
    """How far a stream of a command was printed."""

    offset: int
    ended: bool
    truncated: bool


class Session:
    """A command, from here: what it prints, what is typed to it, and how it is cancelled, until it has ended.

    Threads ask the service; what they and signals have to say is heard in one place.
    """

    def __init__(self, line: Line, identity: str = "") -> None:
        self.line, self.screen, self.identity = line, line.screen, identity
        self.heard: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self.sinks: dict[str, int] = {}  # the streams to be printed, each with its descriptor
        self.typed = -1  # the descriptor of what is to be typed
        self.printing: set[str] = set()
        self.ended: Record | None = None
        self.cancels, self.wishes = True, 0  # whether Ctrl-C does, and how often that was heard
        self.gone = False  # who reads what is printed

    def attend(self) -> Record:
        """Return the command, once it has ended and all is printed."""
        with self.signals():
            if self.identity:
                self.begin(self.identity)
            while self.ended is None or self.printing:
                event, value = self.heard.get()
                REACTIONS[event](self, value)
        self.screen.hint("")
        return self.ended

    def queue(self, order: Record) -> None:
        """Queue it; sent again when the answer is lost, it is still one."""
        key = secrets.token_hex(16)
        path = "/command"
        self.apart("queued", lambda: self.line.call("POST", path, order, Idempotency_Key=key)["commandId"])

    def begin(self, identity: str) -> None:
        """Follow the command, which is in the queue."""
        self.identity, self.printing = identity, {*self.sinks}
        self.apart("ended", self.watch)
        for stream in self.sinks:
            self.apart("printed", functools.partial(self.follow, stream))
        if self.typed >= 0:
            self.apart("typed", self.type_in)
        if self.wishes:
            self.cancel()

    def apart(self, event: str, work: Callable[[], Any]) -> None:
        """Have *work* done by a thread, and hear of the *event* with what it returns, or of why it failed."""

        def run() -> None:
            try:
                self.heard.put((event, work()))
            except BrokenPipeError:
                self.heard.put(("unread", None))
            except Exception as problem:
                self.heard.put(("failed", problem))

        threading.Thread(target=run, daemon=True).start()

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """Hear of Ctrl-C and SIGTERM."""
        before = {
            number: signal.signal(number, lambda number, _: self.heard.put(("signal", number)))
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, old in before.items():
                signal.signal(number, old)

    # What the threads do

    def watch(self) -> Record:
        """Return the command when it has ended; say so if nobody takes it."""
        wait, silent = SOON_S, True
        while True:
            path = at("command", self.identity, f"?wait={wait:g}")
            asked = time.monotonic()
            command = self.line.insist(lambda path=path, wait=wait: self.line.service.call("GET", path, held=wait))  # type: ignore[misc]
            if command["status"] in ENDED:
                return {"id": self.identity, **command}
            if silent and command["status"] == "pending" and os.isatty(2):
                self.screen.hint(
                    f"waiting {self.whom(command)}; Ctrl-C {'cancels it' if self.cancels else 'leaves it alone'}"
                )
            elif command["status"] == "processing":
                self.screen.hint("")
                wait = HELD_S
            silent = False
            time.sleep(UNHELD_S if time.monotonic() - asked < UNHELD_S else 0)

    def whom(self, command: Record) -> str:
        if command.get("type") == "user_input":
            return "for a human's answer"
        return takers(command, self.line.call("GET", "/agents").get("agents", {}))

    def follow(self, stream: str) -> str:
        """Print a *stream* until its end; return its name."""
        printed, pause = Printed(0, False, False), 0.0
        while not printed.ended:
            asked, before = time.monotonic(), printed.offset
            printed = self.print_more(stream, printed.offset, HELD_S)
            held = time.monotonic() - asked
            pause = PACE_S[0] if held > PACE_S[1] else min(2 * pause + PACE_S[0], PACE_S[1])
            unheld = printed.offset == before and held < UNHELD_S
            time.sleep(0 if printed.ended else UNHELD_S if unheld else pause)
        if printed.truncated:
            self.screen.tell(f"{stream}: more was printed than is kept; what is missing here is in the result, or lost")
        return stream

    def print_more(self, stream: str, offset: int, wait: float) -> Printed:
        """Print what there is of a *stream* from *offset* on, after up to *wait* (s); return how far that is."""
        done = offset  # also where the connection is lost in the middle of an answer

        def ask() -> Printed:
            nonlocal done
            path = at("command", self.identity, f"/output?stream={stream}&offset={done}&wait={wait:g}")
            answer = self.line.service.send("GET", path, None, wait, headers={}, read=False)
            self.line.service.check_done(answer)
            with self.line.service.reached():
                for piece in answer.stream(1 << 16):
                    self.show(stream, piece)
                    done += len(piece)
            marks = (answer.headers.get(name) == "true" for name in ("X-Output-End", "X-Output-Truncated"))
            return Printed(done, *marks)

        return self.line.insist(ask)

    def show(self, stream: str, piece: bytes) -> None:
        if self.screen.json:
            self.screen.give({"stream": stream, **encoded(piece)})
        else:
            self.screen.hint("")
            self.screen.write(self.sinks[stream], piece)

    def type_in(self) -> None:
        """Send what is typed, until its end, or until the command reads no more."""
        sent, path = 0, at("command", self.identity, "/input")
        try:
            for piece in pieces_typed(self.typed):
                if self.screen.raw and LEAVE in piece:
                    self.heard.put(("signal", signal.SIGINT))
                data = base64.b64encode(piece).decode()
                self.line.call("POST", path, {"data": data, "encoding": "base64", "offset": sent})
                sent += len(piece)
                time.sleep(TYPED_S)
            self.line.call("POST", path, {"offset": sent, "close": True})
        except Refused as refusal:
            if refusal.status not in (404, 409):  # it has ended
                raise

    # What is done about what is heard

    def wish(self, number: int) -> None:
        """Cancel it; leave it alone the second time, or where it is not ours."""
        self.wishes += 1
        if self.wishes > 1 or not self.cancels:
            named = f"{self.identity} goes on without us: {PROGRAM} wait {self.identity}"
            self.screen.tell(named if self.identity else "it may have been queued")
            raise Left(128 + number)
        self.screen.tell(f"cancelling {self.identity or 'it'}; once more leaves it alone")
        if self.identity:
            self.cancel()

    def cancel(self) -> None:
        def ask() -> None:
            with contextlib.suppress(Refused):  # it has ended
                self.line.call("POST", at("command", self.identity, "/cancel"))

        self.apart("cancelled", ask)

    def end_unread(self, _: Any) -> None:
        """Cancel what nobody reads any more; leave it alone where it is not ours."""
        if not self.cancels:
            raise Left(141)
        self.gone, self.printing = True, set()
        self.cancel()

    def fail(self, problem: Exception) -> None:
        if self.identity and self.cancels and not isinstance(problem, Unwelcome):
            with contextlib.suppress(Unreachable, Refused):
                self.line.service.call("POST", at("command", self.identity, "/cancel"))
        raise problem

    def end(self, command: Record) -> None:
        self.ended = command


class Left(Exception):
    """A human does not wait any longer; the exit code is given."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


REACTIONS: dict[str, Callable[[Session, Any], Any]] = {
    "queued": Session.begin,
    "printed": lambda session, stream: session.printing.discard(stream),
    "ended": Session.end,
    "signal": Session.wish,
    "unread": Session.end_unread,
    "failed": Session.fail,
    "typed": lambda session, _: None,
    "cancelled": lambda session, _: None,
}


def encoded(piece: bytes) -> Record:
    """Return bytes as JSON can tell them."""
    try:
        return {"data": piece.decode()}
    except UnicodeDecodeError:
        return {"data": base64.b64encode(piece).decode(), "encoding": "base64"}


def pieces_typed(fd: int) -> Iterator[bytes]:
    """Yield what comes from a descriptor, as it comes."""
    while piece := read_typed(fd):
        while len(piece) < PIECE_BYTES and select.select([fd], [], [], 0)[0]:
            if not (more := read_typed(fd)):
                yield piece
                return
            piece += more
        yield piece


def read_typed(fd: int) -> bytes:
    while os.isatty(fd) and not is_in_front(fd):  # who reads from the background is stopped
        time.sleep(0.2)
    return os.read(fd, PIECE_BYTES)


def is_in_front(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:  # a terminal that is not ours to control
        return True


def has_input(fd: int) -> bool:
    """Return whether something may be typed: there is a terminal, a pipe or a file, and not the null device."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return os.isatty(fd) or not stat.S_ISCHR(mode)


def check_input(fd: int) -> None:
    status = os.fstat(fd)
    left = status.st_size - os.lseek(fd, 0, os.SEEK_CUR) if stat.S_ISREG(status.st_mode) else 0
    if left > INPUT_BYTES:
        raise Misused(f"stdin has {left} bytes, {INPUT_BYTES} can be typed to a command; write them to a file there")


@contextlib.contextmanager
def raw_terminal(screen: Screen) -> Iterator[None]:
    """Have each key go to the command, as it is, if stdin is a terminal."""
    if not os.isatty(0):
        yield
        return
    import termios  # noqa: PLC0415  Windows has neither
    import tty  # noqa: PLC0415

    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        screen.raw = True
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)
        screen.raw = False


# What can be asked for


class Desk(NamedTuple):
    """What a verb works with."""

    line: Line
    screen: Screen
    said: argparse.Namespace

    def get(self, path: str, held: float = 0) -> Record:
        return self.line.call("GET", path, held=held)


def run(desk: Desk) -> int:
    said, words = desk.said, [*desk.said.words]
    words = words[1:] if words[:1] == ["--"] else words
    if not words:
        raise Misused("run what? Write: run -- COMMAND")
    order: Record = {"type": "execute_bash", "command": command_line(words), **settled(said)}
    session = Session(desk.line)
    session.sinks = {"stdout": 1} if said.tty else STREAMS
    if not said.no_stdin and has_input(0):
        check_input(0)
        order["stdin"], session.typed = True, 0
    with raw_terminal(desk.screen) if said.tty else contextlib.nullcontext():
        if said.tty:
            size = shutil.get_terminal_size()
            order |= {"pty": True, "columns": size.columns, "rows": size.lines}
        session.queue(order)
        command = session.attend()
    return bid_farewell(desk.screen, command, 141 if session.gone else None)


def settled(said: argparse.Namespace) -> Record:
    """Return what an order says beside its type and what that needs."""
    named = {"timeout": said.timeout, "workingDir": said.dir, "target": said.target, "expiresIn": said.expires}
    env = dict(pair.partition("=")[::2] for pair in said.env or ())
    return {key: value for key, value in {**named, "env": env}.items() if value}


def bid_farewell(screen: Screen, command: Record, code: int | None = None) -> int:
    if screen.json:
        screen.give(command)
    if (sentence := farewell(command)) and code is None:
        screen.tell(sentence)
    return exit_code(command) if code is None else code


def submit(desk: Desk) -> int:
    words = desk.said.words
    if words[0] == "-" or words[0].lstrip().startswith("{"):
        order = told(sys.stdin.buffer.read() if words[0] == "-" else words[0].encode())
    else:
        order = order_of(words, lambda path: Path(path).read_text())
    answer = desk.line.call("POST", "/command", order, Idempotency_Key=secrets.token_hex(16))
    desk.screen.give(answer, plain(answer["commandId"]))
    return 0


def wait(desk: Desk) -> int:
    session, command = Session(desk.line, desk.said.id), desk.get(at("command", desk.said.id))
    session.cancels = False
    session.sinks = STREAMS if command["type"] == "execute_bash" and not desk.screen.json else {}
    command = session.attend()
    if not session.sinks and not desk.screen.json:
        text = result_text(command).decode("utf-8", "surrogateescape")
        desk.screen.write(1, harmless(text).encode("utf-8", "surrogateescape"))
    return bid_farewell(desk.screen, command)


def logs(desk: Desk) -> int:
    session, said = Session(desk.line, desk.said.id), desk.said
    session.cancels, session.sinks = False, {"stderr": 1} if said.stderr else STREAMS
    desk.get(at("command", said.id))
    if said.follow:
        session.attend()
        return 0
    for stream in session.sinks:
        session.print_more(stream, 0, 0)
    return 0


def cancel(desk: Desk) -> int:
    command = desk.line.call("POST", at("command", desk.said.id, "/cancel"))
    ended = command["status"] in ENDED
    desk.screen.give({"id": desk.said.id, **command}, "cancelled" if ended else "being ended; wait tells how it did")
    return 0


def ls(desk: Desk) -> int:
    kind, screen = desk.said.kind, desk.screen
    records, now = LISTED[kind](desk), time.time() * 1000
    if screen.json:
        for identity, record in records.items():
            screen.give({"id": identity, **(record if isinstance(record, dict) else {"messages": record})})
        return 0
    rows = [ROWS[kind](identity, record, now) for identity, record in records.items()]
    if rows:
        screen.rows([HEADS[kind], *rows] if os.isatty(1) else rows)
    return 0


def list_commands(desk: Desk) -> Record:
    said = desk.said
    query = {"status": said.status, "type": said.type, "limit": said.limit or 20}
    return dict(desk.get(f"/commands?{urlencode({key: value for key, value in query.items() if value})}")["commands"])


def list_records(desk: Desk) -> Record:
    """Return the conversations, or the documents, that were changed last, the latest first."""
    records = desk.get(f"/sync?only={desk.said.kind}")[desk.said.kind]
    latest = sorted(records.items(), key=lambda item: moment_of(item[1]), reverse=True)
    return dict(latest[: int(desk.said.limit or len(latest))])


def moment_of(record: Any) -> float:
    last = record[-1:] if isinstance(record, list) else [record]
    return float(last[0].get("timestamp", 0)) if last else 0


LISTED: dict[str, Callable[[Desk], Record]] = {
    "commands": list_commands,
    "documents": list_records,
    "conversations": list_records,
    "agents": lambda desk: dict(desk.get("/agents")["agents"]),
}
ROWS: dict[str, Callable[[str, Any, float], list[str]]] = {
    "commands": command_row,
    "documents": document_row,
    "conversations": conversation_row,
    "agents": agent_row,
}
HEADS = {
    "commands": ["ID", "STANDS", "AGE", "TYPE", "WHAT"],
    "documents": ["ID", "BYTES", "AGE", "LANGUAGE"],
    "conversations": ["ID", "MESSAGES", "AGE", "LAST"],
    "agents": ["NAME", "KIND", "SEEN", "VERSION", "TYPES"],
}


def cat(desk: Desk) -> int:
    if desk.said.versions:
        versions = desk.get(at("document", desk.said.id, "/versions"))["versions"]
        for each in versions if desk.screen.json else ():
            desk.screen.give(each)
        rows = [[str(each["version"]), str(each["size"]), moment(each["timestamp"])] for each in versions]
        desk.screen.rows([] if desk.screen.json else rows)
        return 0
    document = document_at(desk, desk.said.id, desk.said.version)
    if desk.screen.json:
        desk.screen.give({"id": desk.said.id, **document})
    else:
        desk.screen.write(1, document["content"].encode("utf-8", "surrogatepass"))
    return 0


def document_at(desk: Desk, identity: str, version: str | None = None) -> Record:
    """Return a document, or a *version* of it; raise Refused if there is none."""
    return desk.get(at("document", identity, f"?version={quote(version, safe='')}" if version else ""))


# The files of a folder, as documents

FILE_BYTES = 4 << 20  # larger ones are no documents; the editor's extension says so too
PUSH_BYTES, PUSH_FILES = 4 << 20, 200  # sent at once
ROUNDS = 4  # in which what both sides do meanwhile is followed
SETTLED_S = 0.3  # a file that was written this moment may be half done
LOOK_S = 1.0  # between looks at the files

GONE = (FileNotFoundError, NotADirectoryError)  # what is there no more, since this moment even

Stamp = tuple[int, int, int]  # when a file was changed (ns), its size and its inode


def stamp_of(status: os.stat_result) -> Stamp:
    return status.st_mtime_ns, status.st_size, status.st_ino


def is_fresh(stamp: Stamp) -> bool:
    """Return whether a file was written this moment, and so may be half done."""
    return 0 <= time.time() - stamp[0] / 1e9 < SETTLED_S


class Folder:
    """The files below a folder, each reached by its path, and never through a link."""

    def __init__(self, root: Path) -> None:
        self.root, self.fd = root, os.open(root, os.O_RDONLY | os.O_DIRECTORY)

    @contextlib.contextmanager
    def around(self, path: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """Open the folder that *path* is in, and return its descriptor, and the name in it; raise OSError.

        Each part is opened for itself, within the one before, so that none can be a link that leads elsewhere.
        """
        *parts, name = check_place(path).split("/")
        with contextlib.ExitStack() as opened:
            fd = self.fd
            for part in parts:
                if make:
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(part, dir_fd=fd)
                fd = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                opened.callback(os.close, fd)
            yield fd, name

    def stamp(self, fd: int, name: str) -> Stamp | None:
        """Return the stamp of a file, None if there is none; raise ValueError for what is no file."""
        try:
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            return None
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("there is something here that is no file")
        return stamp_of(status)

    def read(self, path: str) -> tuple[bytes, Stamp]:
        """Return what a file says, and its stamp; raise OSError, or ValueError if it is no text, or too large."""
        with self.around(path) as (fd, name):
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
            with open(file, "rb") as opened:
                status = os.fstat(file)
                if not stat.S_ISREG(status.st_mode):
                    raise ValueError("is no file")
                if status.st_size > FILE_BYTES:
                    raise ValueError(f"has {status.st_size} bytes, a document up to {FILE_BYTES}")
                content = opened.read(FILE_BYTES + 1)
        try:
            content.decode()
        except UnicodeDecodeError:
            raise ValueError("is no text in UTF-8") from None
        return content, stamp_of(status)

    def write(self, path: str, content: bytes, timestamp: float, known: Stamp | None, keep: str = "") -> Stamp:
        """Put *content* in the place of a file, at once and whole, if that is as it is *known*; return the new stamp.

        What was there is kept under the name *keep*, if one is given. Raises OSError, or ValueError if it has changed.
        """
        with self.around(path, make=True) as (fd, name), contextlib.ExitStack() as undo:
            aside = f".{secrets.token_hex(8)}.kirosync"
            file = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666, dir_fd=fd)
            undo.callback(os.unlink, aside, dir_fd=fd)
            with open(file, "wb") as opened:
                if known:
                    os.fchmod(file, stat.S_IMODE(os.stat(name, dir_fd=fd, follow_symlinks=False).st_mode))
                opened.write(content)
                opened.flush()
                with contextlib.suppress(OverflowError, ValueError):  # a moment that no file can have
                    os.utime(file, ns=(time.time_ns(), round(timestamp * 1_000_000)))
                os.fsync(file)
                stamp = stamp_of(os.fstat(file))
            if self.stamp(fd, name) != known:
                raise ValueError("was changed just now")
            if keep:
                os.link(name, keep, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
            os.replace(aside, name, src_dir_fd=fd, dst_dir_fd=fd)
            undo.pop_all()
        return stamp

    def remove(self, path: str, known: Stamp) -> None:
        with self.around(path) as (fd, name):
            if self.stamp(fd, name) != known:
                raise ValueError("was changed just now")
            os.unlink(name, dir_fd=fd)

    def find(self, root: str) -> Iterator[tuple[str, Stamp | None]]:
        """Yield the path and the stamp of each file in *root*, which may be one; None for what is no file."""
        top = self.root / root
        if top.is_symlink() or not top.is_dir():
            with contextlib.suppress(*GONE):
                said = top.lstat()
                yield root, stamp_of(said) if stat.S_ISREG(said.st_mode) else None
            return
        entries: list[os.DirEntry[str]] = []
        with contextlib.suppress(*GONE):  # what must not be read is not gone: that is raised
            entries = sorted(os.scandir(top), key=lambda entry: entry.name)
        for entry in entries:
            path = f"{root}/{entry.name}" if root else entry.name
            if entry.name.startswith(".") or not covered(path, [path]):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from self.find(path)
            else:
                with contextlib.suppress(FileNotFoundError):
                    regular = entry.is_file(follow_symlinks=False)
                    yield path, stamp_of(entry.stat(follow_symlinks=False)) if regular else None


class Memory:
    """What a folder and a service had in common when they were last in step: a small file."""

    def __init__(self, url: str, folder: Path, prefix: str) -> None:
        place = sha256_of(canonical([url, str(folder), prefix]))[:32]
        home = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "kirosync"
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path, self.said = home / f"sync-{place}.json", {"url": url, "folder": str(folder), "prefix": prefix}
        self.held = open(self.path.with_suffix(".lock"), "a", opener=private)  # noqa: SIM115  held to the end
        self.hold()
        self.cursor = ""
        self.base: dict[str, str] = {}  # the sha256 of each document that was in step
        self.there: dict[str, tuple[str, float, str]] = {}  # of each of the service: sha256, timestamp, path
        self.seen: dict[str, tuple[Stamp, str]] = {}  # of each file: its stamp, and the sha256 that it had
        with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):  # else all is compared anew
            known = json.loads(self.path.read_bytes())
            self.base = {str(key): str(value) for key, value in known["base"].items()}
            self.seen = {path: (cast(Stamp, tuple(stamp)), str(sha)) for path, (stamp, sha) in known["seen"].items()}
            there = {key: (str(sha), float(at), str(path)) for key, (sha, at, path) in known["there"].items()}
            self.there, self.cursor = there, str(known["cursor"])

    def hold(self) -> None:
        """Keep others from bringing the same folder in step at the same time."""
        import fcntl  # noqa: PLC0415  Windows has none

        try:
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError("this folder is being brought in step by another process") from None

    def save(self) -> None:
        known = {"cursor": self.cursor, "base": self.base, "there": self.there, "seen": self.seen}
        aside = self.path.with_suffix(".new")
        with open(aside, "w", opener=private) as file:
            json.dump({**self.said, **known}, file)
        os.replace(aside, self.path)


class Step(NamedTuple):
    """A document that is to be brought in step: what is to be done, its path here, and how it is on both sides."""

    act: str
    identity: str
    path: str
    here: Side | None
    there: Side | None


class Sync:
    """A folder and the documents of a service, on their way into step."""

    def __init__(self, desk: Desk, folder: Path, roots: list[str]) -> None:
        said = desk.said
        self.desk, self.line, self.screen = desk, desk.line, desk.screen
        self.folder, self.roots, self.prefix = Folder(folder), roots, said.prefix
        self.memory = Memory(self.line.service.url, folder, said.prefix)
        self.fresh: dict[str, Record] = {}  # documents whose content is at hand
        self.left: set[str] = set()  # paths that are left as they are, for now
        self.said: dict[str, str] = {}  # why, of each
        self.counts: dict[str, int] = {}
        self.failed = self.watching = False
        allowed = (PUSHES if not said.pull else ()) + (PULLS if not said.push else ())
        self.allowed = {act for act in allowed if said.delete or not act.startswith("remove")} | {"same", "forget"}

    # What there is

    def take(self, said: Record, asked: bool = True) -> None:
        """Take in what the service says of its documents; when it was *asked* for what is new, up to its cursor."""
        there, known = self.memory.there, bool(self.memory.cursor)
        if said.get("full"):
            if known:  # a restored backup: what it lacks was not deleted
                lost = there.keys() - said.get("documents", {}).keys()
                self.memory.base = {key: sha for key, sha in self.memory.base.items() if key not in lost}
            there.clear()
        for identity in said.get("deleted", {}).get("documents", []):
            there.pop(identity, None)
            self.fresh.pop(identity, None)
        for identity, document in said.get("documents", {}).items():
            content = document["content"].encode("utf-8", "surrogatepass")
            there[identity] = (sha256_of(content), document["timestamp"], path_of(identity, document))
            self.fresh[identity] = document
        self.memory.cursor = said["cursor"] if asked else self.memory.cursor

    def ask(self, wait: float = 0) -> Record:
        """Return what the service says of what is new, after up to *wait* (s)."""
        query = {"only": "documents", "since": self.memory.cursor}
        return self.line.insist(lambda: self.line.service.sync(query, wait=wait if query["since"] else 0))

    def look(self) -> dict[str, Side]:
        """Return the files that there are here, by their paths."""
        found, seen = dict[str, Side](), self.memory.seen
        for path, stamp in (each for root in self.roots for each in self.folder.find(root)):
            with self.leaving(path, wrong=False), contextlib.suppress(FileNotFoundError):
                found[path] = self.side_of(path, stamp)
        for path in seen.keys() - found.keys():
            del seen[path]
        return found

    def side_of(self, path: str, stamp: Stamp | None) -> Side:
        """Return what a file is; raise OSError, or ValueError if it can be no document, or is being written."""
        if stamp is None:
            raise ValueError("is no file, or a link")
        seen = self.memory.seen.get(check_place(path), (None, ""))
        if seen[0] != stamp:
            if self.watching and is_fresh(stamp):
                raise ValueError("")
            content, stamp = self.folder.read(path)
            seen = self.memory.seen[path] = stamp, sha256_of(content)
        return Side(seen[1], stamp[0] // 1_000_000)

    @contextlib.contextmanager
    def leaving(self, path: str, wrong: bool = True) -> Iterator[None]:
        """Leave *path* as it is if something goes wrong with it."""
        try:
            yield
        except (OSError, ValueError, Refused) as problem:
            self.leave(path, getattr(problem, "strerror", None) or str(problem), wrong)

    def leave(self, path: str, why: str, wrong: bool = True) -> None:
        """Leave *path* as it is, for now, and say so once."""
        self.left.add(path)
        self.failed = self.failed or wrong
        if why and self.said.get(path) != why:
            self.said[path] = why
            self.screen.tell(f"left: {path}: {why}")

    def steps(self) -> list[Step]:
        """Return what is to be done."""
        files, there = self.look(), dict[str, tuple[str, Side]]()
        for identity, (sha, timestamp, path) in self.memory.there.items():
            if path.startswith(self.prefix) and covered(place := path.removeprefix(self.prefix), self.roots):
                with self.leaving(path, wrong=False):
                    there[check_place(place)] = identity, Side(sha, timestamp)
        known = {identity.removeprefix(self.prefix) for identity in self.memory.base if self.is_path(identity)}
        wanted = sorted({each for each in {*files, *there, *known} if covered(each, self.roots)} - self.left)
        sides = ((path, *there.get(path, (document_id(self.prefix + path), None))) for path in wanted)
        return [
            Step(due(self.memory.base.get(identity), files.get(path), side), identity, path, files.get(path), side)
            for path, identity, side in sides
        ]

    def is_path(self, identity: str) -> bool:
        """Return whether an id is that of a path of ours, itself."""
        return identity.startswith(self.prefix) and not re.match(r"[0-9a-f]{40}-", identity)

    # What is done

    def settle(self) -> None:
        """Bring both sides in step."""
        self.left.clear()
        for _ in range(ROUNDS):
            todo = [step for step in self.steps() if step.act in self.allowed]
            pushed = [step for step in todo if step.act in ("push", "outdo")]
            others = [step for step in todo if step not in pushed]
            for step in others:
                with self.leaving(step.path):
                    ACTS[step.act](self, step)
            self.push(pushed)
            self.fresh.clear()
            self.memory.save()
            if not pushed and all(step.act == "same" for step in others):
                break
        self.screen.hint("")

    def same(self, step: Step) -> None:
        if step.here:
            self.memory.base[step.identity] = step.here.sha256

    def forget(self, step: Step) -> None:
        self.memory.base.pop(step.identity, None)

    def pull(self, step: Step) -> None:
        """Write what the service has; what has changed here, too, is kept beside it."""
        document = self.fresh.get(step.identity) or document_at(self.desk, step.identity)
        content, (known, _) = document["content"].encode(), self.memory.seen.get(step.path, (None, ""))
        if len(content) > FILE_BYTES:
            raise ValueError(f"has {len(content)} bytes in the service, a file here up to {FILE_BYTES}")
        keep = ""
        if step.act == "yield" and step.here:
            changed = time.strftime("%Y%m%d-%H%M%S", time.localtime(step.here.timestamp / 1000))
            keep = f"{step.path.rpartition('/')[2]}.conflict-{changed}"
        stamp = self.folder.write(step.path, content, document["timestamp"], known, keep)
        sha = sha256_of(content)
        self.memory.seen[step.path], self.memory.base[step.identity] = (stamp, sha), sha
        if keep:
            self.failed = True
            self.screen.tell(f"{step.path} was changed on both sides; that of the service is later, yours is in {keep}")
        self.say("pulled", step)

    def remove_here(self, step: Step) -> None:
        self.folder.remove(step.path, self.memory.seen[step.path][0])
        self.memory.base.pop(step.identity, None)
        self.say("removed here", step)

    def remove_there(self, step: Step) -> None:
        """Delete the document, unless somebody has changed it since we were told of it."""
        with contextlib.suppress(Refused):  # it is not there any more
            content = document_at(self.desk, step.identity)["content"].encode("utf-8", "surrogatepass")
            if sha256_of(content) != self.memory.base[step.identity]:
                raise ValueError("was changed in the service just now")
            self.line.call("DELETE", at("document", step.identity))
        self.memory.there.pop(step.identity, None)
        self.memory.base.pop(step.identity, None)
        self.say("removed there", step)

    def push(self, steps: list[Step]) -> None:
        """Send files to the service, some at a time."""
        batch, size = dict[Step, Record](), 0
        for place, step in enumerate(steps):
            with self.leaving(step.path):
                content, _ = self.folder.read(step.path)
                batch[step], size = self.document(step, content), size + len(content)
            if size >= PUSH_BYTES or len(batch) >= PUSH_FILES or place == len(steps) - 1:
                self.send(batch)
                batch, size = {}, 0
                if len(steps) > PUSH_FILES:
                    self.screen.hint(f"pushed {place + 1} of {len(steps)} files")

    def document(self, step: Step, content: bytes) -> Record:
        """Return the document that a file is: later than what it takes the place of, of which it keeps all else."""
        path, known, moment = self.prefix + step.path, dict[str, Any](), step.here.timestamp if step.here else 0
        if step.there:
            known = self.fresh.get(step.identity) or document_at(self.desk, step.identity)
            moment = max(moment, step.there.timestamp + 1)
        kept = {key: value for key, value in known.items() if key not in ("id", "revision", "revisions")}
        return {**language_of(path), **kept, "path": path, "content": content.decode(), "timestamp": moment}

    def send(self, batch: dict[Step, Record]) -> None:
        """Push documents; of a batch that is refused only what is to blame for that is left."""
        if not batch:
            return
        push = {"documents": {step.identity: document for step, document in batch.items()}}
        try:
            said = self.line.insist(lambda: self.line.service.sync({"since": self.memory.cursor}, push))
        except Refused as refusal:
            if len(batch) == 1:
                self.leave(next(iter(batch)).path, str(refusal))
            else:
                half = len(batch) // 2
                for some in ([*batch.items()][:half], [*batch.items()][half:]):
                    self.send(dict(some))
            return
        self.take(said, asked=False)
        for step, document in batch.items():
            self.acknowledge(step, sha256_of(document["content"].encode()))
        self.memory.save()

    def acknowledge(self, step: Step, sha: str) -> None:
        """Note what became of a file that was pushed."""
        there = self.memory.there.get(step.identity)
        if there is None:
            self.leave(step.path, "was removed from the service after it was changed here", wrong=False)
        elif there[0] == sha:
            self.memory.base[step.identity] = sha
            self.say("pushed", step)
            if step.act == "outdo":
                self.failed = True
                self.screen.tell(
                    f"{step.path} was changed on both sides; yours is later, the other one is a version of it"
                )

    def say(self, what: str, step: Step) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1
        if self.screen.json or not self.screen.quiet:
            self.screen.give({"did": what, "id": step.identity, "path": step.path}, f"{what:13}  {plain(step.path)}")

    # From now on

    def watch(self) -> None:
        """Stay in step until the program is ended."""
        heard: queue.SimpleQueue[Record | Exception] = queue.SimpleQueue()
        ready = threading.Semaphore()  # what was heard is taken in before more is asked for
        threading.Thread(target=self.listen, args=(heard, ready), daemon=True).start()
        before, missed, self.watching = dict[str, Stamp | None](), set[str](), True
        while True:
            said = None
            with contextlib.suppress(queue.Empty):
                said = heard.get(timeout=LOOK_S)
            if isinstance(said, Exception):
                raise said
            if said:
                self.take(said)
                ready.release()
            now = {path: stamp for root in self.roots for path, stamp in self.folder.find(root)}
            now = {path: stamp for path, stamp in now.items() if not (stamp and is_fresh(stamp))}
            gone = before.keys() - now.keys()  # an editor that saves may have moved it away for a moment
            if (said and (said.get("documents") or said.get("deleted"))) or (now != before and gone <= missed):
                self.settle()
                before = now
            missed = gone

    def listen(self, heard: queue.SimpleQueue[Record | Exception], ready: threading.Semaphore) -> None:
        while True:
            ready.acquire()
            asked = time.monotonic()
            try:
                said = self.ask(HELD_S)
            except (Unreachable, Refused) as problem:
                return heard.put(problem)
            heard.put(said)
            time.sleep(UNHELD_S if time.monotonic() - asked < UNHELD_S and not said.get("documents") else 0)


ACTS: dict[str, Callable[[Sync, Step], None]] = {
    "same": Sync.same,
    "forget": Sync.forget,
    "pull": Sync.pull,
    "yield": Sync.pull,
    "remove here": Sync.remove_here,
    "remove there": Sync.remove_there,
}


def sync(desk: Desk) -> int:
    """Bring the files of a folder, and the documents of the service, in step."""
    folder, said = Path.cwd(), desk.said
    if said.push and said.pull:
        raise Misused("--push and --pull: both is what is done without them")
    roots = [root_of(folder, path, said.delete) for path in said.paths]
    work = Sync(desk, folder, roots)
    work.take(work.ask())
    work.settle()
    if said.watch:
        desk.screen.tell(f"watching {', '.join(said.paths)}; Ctrl-C ends it")
        work.watch()
    told = ", ".join(f"{count} {what}" for what, count in work.counts.items())
    desk.screen.hint("")
    if os.isatty(2):
        desk.screen.tell(told or "in step")
    return int(work.failed)


def root_of(folder: Path, path: str, delete: bool) -> str:
    """Return *path* as it is from the *folder*; raise Misused if it is not in it."""
    relative = os.path.relpath(os.path.normpath(folder / path), folder)
    if relative.split(os.sep)[0] == "..":
        raise Misused(f"{path} is not in {folder}; go to a folder that it is in")
    if delete and not os.path.lexists(folder / path):
        raise Misused(f"{path} is not there; with --delete that would remove all of it from the service")
    return "" if relative == "." else relative.replace(os.sep, "/")


def chat(desk: Desk) -> int:
    """Print a conversation, and what is said in it; or say something."""
    said, talk = desk.said, Talk(desk)
    if said.say is not None or said.words == "-":
        content = sys.stdin.buffer.read().decode() if said.say is None else said.say
        talk.say(content.rstrip("\n") if said.say is None else content, said.role)
        if not said.follow:
            return 0
    cursor = desk.get(NEWEST)["cursor"]  # before what it is to be followed from
    talk.tell(talk.messages())
    while said.follow:
        cursor = talk.follow(cursor)
    return 0


NEWEST = "/sync?only=commands&status=pending"  # the least that one can ask for to learn the cursor, and the time


class Talk:
    """A conversation, at this terminal."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.line, self.identity = desk, desk.line, desk.said.id
        self.known: list[Record] = []
        self.last: Record | None = None  # that was printed

    def messages(self) -> list[Record]:
        """Return what there is, by now."""
        return list(self.desk.get(at("conversation", self.identity))["messages"])

    def follow(self, cursor: str) -> str:
        """Print what is new after *cursor*, as soon as it is there; return the cursor after that."""
        query, asked = {"only": "conversations", "since": cursor}, time.monotonic()
        said = self.line.insist(lambda: self.line.service.sync(query, wait=HELD_S))
        if self.identity in said["conversations"]:
            self.tell(said["conversations"][self.identity])
        elif time.monotonic() - asked < UNHELD_S:
            time.sleep(UNHELD_S)
        return str(said["cursor"])

    def tell(self, messages: list[Record]) -> None:
        """Print those of *messages* that are not known yet; of one that has grown the rest."""
        known = {canonical(message) for message in self.known}
        for message in (each for each in messages if canonical(each) not in known):
            if self.desk.screen.json:
                self.desk.screen.give(message)
            else:
                self.desk.screen.write(1, self.text_of(message).encode("utf-8", "replace"))
            self.last = message
        self.known = merge_messages(self.known, messages)

    def text_of(self, message: Record) -> str:
        rest = continued(self.last, message)
        content = message["content"] if rest is None else rest
        shown = harmless(content)
        if rest is not None:
            return f"{shown}\n" if shown else ""
        head = f"{plain(str(message['role']))}  {moment(message['timestamp'])}"
        between = "\n" if self.last else ""
        return f"{between}{painted(head, '1') if colored(1) else head}\n{shown}\n"

    def say(self, content: str, role: str) -> None:
        """Add a message, as of now by the clock of the service; sent again it is still one."""
        there = self.desk.get(NEWEST)
        message = {"id": f"msg-{secrets.token_hex(8)}", "role": role, "content": content}
        message["timestamp"] = there["serverTime"]
        push = {"conversations": {self.identity: [message]}}
        self.line.insist(lambda: self.line.service.sync({"since": there["cursor"]}, push))
        if self.desk.screen.json:
            self.desk.screen.give(message)


def moment(milliseconds: float) -> str:
    with contextlib.suppress(ValueError, OverflowError, OSError):  # somebody else's clock
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(milliseconds / 1000))
    return "-"


def ask(desk: Desk) -> int:
    said = desk.said
    kinds = {"choice": said.choices, "confirmation": said.confirm, "file": said.file}
    kind = next((kind for kind, wanted in kinds.items() if wanted), "text")
    order = {"type": "user_input", "prompt": said.question, "inputType": kind}
    more = {"choices": said.choices, "expiresIn": said.timeout, "executionId": said.execution}
    session = Session(desk.line)
    session.queue(order | {key: value for key, value in more.items() if value})
    command = session.attend()
    if command["outcome"] != "ok":
        return bid_farewell(desk.screen, command)
    desk.screen.give(command, harmless(str(command["result"]["value"])))
    return int(kind == "confirmation" and command["result"]["value"] != "yes")


def answer(desk: Desk) -> int:
    """List what waits for a human, or answer one of it."""
    said, screen = desk.said, desk.screen
    waiting = {each["id"]: each for each in desk.get("/api/kiro/status")["pendingInputs"]}
    if not said.id:
        for identity, question in waiting.items():
            asked = f"{plain(identity)}  {question_of(question)}"
            screen.give(question, asked.replace("\n", "\n    "))  # or a prompt could look like one more question
        return 0
    question = waiting.get(said.id, {"type": "text"})
    value = said.value
    if value is None and said.id in waiting:
        screen.write(2, f"{question_of(question)} ".encode("utf-8", "replace"))
        if not (line := sys.stdin.readline()):  # Ctrl-D is not the empty answer, which Enter is
            raise Misused("nothing was answered")
        value = line.rstrip("\n")
    order = {"value": value or "", "type": question["type"], "executionId": said.id}
    screen.give(desk.line.call("POST", "/api/kiro/input", order), "answered")
    return 0


def status(desk: Desk) -> int:
    """Tell how the service is, what waits, and who is there."""
    health, screen = health_of(desk.line.service), desk.screen
    asked = desk.get("/api/kiro/status")["pendingInputs"] if "queue" in health else []
    if screen.json:
        screen.give({**health, "pendingInputs": asked})
        return int(health["status"] != "healthy")
    well = f"{health['status']}{': ' * ('problem' in health)}{health.get('problem', '')}"
    rows = [["service", f"{desk.line.service.url} {well}, up {ago(health['server']['uptime'] * 1000)}"]]
    queue = health.get("queue", {})
    rows += [["queue", f"{queue['pending']} wait, {queue['processing']} are being executed"]] if queue else []
    for name, agent in health.get("agents", {}).items():
        seen = "is here" if agent["present"] else f"was last seen {agent['lastSeen']}"
        rows.append(["agent", f"{name} ({agent['kind']}) {seen}"])
    rows += [["asked", f"{each['id']}  {question_of(each)}"] for each in asked]
    screen.rows(rows)
    return int(health["status"] != "healthy")


def health_of(service: Service) -> Record:
    """Return what GET /health says, also of a service that is not well."""
    try:
        return service.call("GET", "/health")
    except Unreachable as problem:
        if "server" not in problem.body:
            raise
        return problem.body


class Patient(NamedTuple):
    """What the doctor looks at: where the service is, or why that is not known."""

    service: Service | None
    source: str  # of the token
    problem: str


def check_settings(patient: Patient) -> Iterator[Finding]:
    if patient.service is None:
        yield Finding("bad", patient.problem, f"{PROGRAM} --help says what there is to set")
    else:
        yield Finding("ok", f"the service is {patient.service.url}, the token is that of {patient.source}")


def check_service(patient: Patient) -> Iterator[Finding]:
    if not patient.service:
        return
    service, before = patient.service, time.time() * 1000
    home = service.call("GET", "/", Accept="application/json")
    if home.get("service") != "kirosync":
        yield Finding("bad", f"what answers at {service.url} is no kirosync", "name another with --url")
        return
    yield judge_url(service.url)
    asked = time.time() * 1000
    health = health_of(service)
    now = time.time() * 1000
    well = health["status"] == "healthy"
    said = f"kirosync {plain(str(home.get('version')))} is {plain(str(health.get('problem', 'healthy')))}"
    yield Finding("ok" if well else "bad", said, "" if well else "see its log, and kirosync.py doctor there")
    yield judge_clock(now, datetime.datetime.fromisoformat(health["timestamp"]).timestamp() * 1000, now - asked)
    yield judge_token(health.get("token"), now)
    if "agents" in health:
        yield judge_agents(health["agents"])
    yield Finding("ok", f"an answer takes {asked - before:.0f} ms, with a new connection, and {now - asked:.0f} ms")


REMEDIES = (  # what to do, by what is said of a service that is not reached
    ("refused", "start it (./install.sh run), or name it with --url"),
    ("certificate", "does its name stand in the URL? Is the clock right? Caddy gets it a certificate"),
    ("SSL", "is that the port where TLS is spoken? Try the other of http:// and https://"),
    ("resolution|not known", "is the name right, and is there a network?"),
    (
        "timed out|No route|unreachable",
        "is there a network, no firewall in between, and TLS there if the URL says https?",
    ),
    ("", "is that the URL of a kirosync?"),
)


ODD = (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)  # what reading another shape raises


def stranger(service: Service) -> str:
    return f"{service.url} is no kirosync, or another version of it"


def doctor(desk: Desk) -> int:
    """Look at what stands between here and the service, and say what to do about it."""
    findings = []
    for check in (check_settings, check_service):
        try:
            findings += [*check(desk.said.patient)]
        except (Unreachable, Refused, ValueError) as problem:
            remedy = next(remedy for sign, remedy in REMEDIES if re.search(sign, str(problem)))
            findings.append(Finding("bad", f"it cannot be asked: {problem}", remedy))
        except ODD:
            findings.append(Finding("bad", stranger(desk.said.patient.service), "name another with --url"))
    for finding in findings:
        level = f"{finding.level:4}"
        shown = painted(level, COLORS[finding.level]) if colored(1) else level
        more = f"; {finding.remedy}" if finding.remedy else ""
        desk.screen.give(finding._asdict(), f"{shown}  {plain(finding.sentence)}{more}")
    return int(any(finding.level == "bad" for finding in findings))


# What can be typed next

OPEN = "/commands?status=pending,processing"
OFFERED: dict[str, Callable[[Desk], Iterable[str]]] = {  # for the arguments of a verb
    "submit": lambda desk: TYPES,
    "ls": lambda desk: LISTED,
    "wait": lambda desk: desk.get(OPEN)["commands"],
    "cancel": lambda desk: desk.get(OPEN)["commands"],
    "logs": lambda desk: desk.get("/commands?type=execute_bash")["commands"],
    "answer": lambda desk: desk.get(f"{OPEN}&type=user_input")["commands"],
    "cat": lambda desk: desk.get("/sync?only=documents")["documents"],
    "chat": lambda desk: desk.get("/sync?only=conversations")["conversations"],
    "completion": lambda desk: SHELLS,
}
VALUES: dict[str, Callable[[Desk], Iterable[str]]] = {  # of an option
    "--type": lambda desk: TYPES,
    "--status": lambda desk: ("pending", "processing", "completed", "failed"),
    "--target": lambda desk: desk.get("/agents")["agents"],
    "--execution": lambda desk: desk.get(OPEN)["commands"],
}
SHELLS: dict[str, str] = {
    "bash": """\
_kirosync() {
  local each
  COMPREPLY=()
  while IFS= read -r each; do
    COMPREPLY+=("$each")
  done < <(PROGRAM completion bash -- "${COMP_LINE:0:COMP_POINT}" "${COMP_WORDS[COMP_CWORD]}" 2>/dev/null)
}
complete -o default -F _kirosync NAMES""",
    "zsh": """\
_kirosync() {
  local -a found
  found=(${(f)"$(PROGRAM completion zsh -- "${(@Q)words[1,CURRENT]}" 2>/dev/null)"})
  if (( $#found )); then compadd -a found; else _files; fi
}
compdef _kirosync NAMES""",
}


def completion(desk: Desk) -> int:
    """Print what a shell is to be told, or what it asks: the words that may come next."""
    shell, words = desk.said.shell, desk.said.words
    if not words:
        program = shlex.join([sys.executable, str(Path(__file__).resolve())])
        names = " ".join(sorted({"client.py", "kirosync", shlex.quote(PROGRAM)}))
        desk.screen.write(1, f"{SHELLS[shell].replace('PROGRAM', program).replace('NAMES', names)}\n".encode())
        return 0
    before, begun = words_before(words[0]) if shell == "bash" else (words[:-1], words[-1])
    piece = words[-1]
    if shell == "bash" and piece[:1] in ("'", '"'):  # what is quoted in which way is bash's to know
        return 0
    for word in sorted(desk.said.next_words(before[1:], begun)):
        if word.startswith(begun) and word.isprintable():
            text = inserted(word, begun, piece) if shell == "bash" else word
            desk.screen.write(1, f"{text}\n".encode("utf-8", "replace"))
    return 0


# ---------------------------------------------------------------------------------------- Main
# argv, the environment, settings, signals.

DEFAULT_URL = "http://127.0.0.1:3001"
PROGRAM = Path(sys.argv[0]).name or "client.py"
SETTINGS = ("url", "token", "token-file")


class Settings(NamedTuple):
    """Where the service is, the token for it, and where that was found."""

    url: str
    token: str
    source: str


def settings_of(said: argparse.Namespace) -> Settings:
    """Return what argv says, or the environment, or the file of settings; raise Misused."""
    known = settings_in(path := config_folder() / "config.toml")
    home = (known.get("url") or DEFAULT_URL).rstrip("/")  # nobody else gets the token that stands there
    url = (said.url or os.environ.get("KIROSYNC_URL") or home).rstrip("/")
    if not re.fullmatch(r"https?://[^/\s@]+(/\S*)?", url):
        raise Misused(f"{plain(url)}: not the URL of a service; write http://HOST:PORT or https://HOST")
    if said.token_file:
        return Settings(url, token_in(Path(said.token_file)), said.token_file)
    if token := os.environ.get("KIROSYNC_TOKEN"):
        return Settings(url, token, "KIROSYNC_TOKEN")
    kept = "token" in known or "token-file" in known
    if kept and url == home:
        token = known.get("token") or token_in(path.parent / Path(known["token-file"]).expanduser())
        return Settings(url, token, str(path))
    beside = Path(__file__).resolve().with_name("state") / "token"
    if url == DEFAULT_URL and os.access(beside, os.R_OK):
        return Settings(url, token_in(beside), str(beside))
    ways = f"set KIROSYNC_TOKEN, give --token-file FILE, or write url, and token or token-file, into {path}"
    raise Misused(f"no token for {url}: {ways}{f'; what stands there is for {plain(home)} alone' if kept else ''}")


def config_folder() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "kirosync"


def token_in(path: Path) -> str:
    """Return the token in a file, or what is piped there; raise Misused if everybody can use it, or there is none."""
    try:
        with path.open() as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode):
                check_private(path, status.st_mode, 0o007)  # a group may share one, as that of an installed agent
            return file.read().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise Misused(f"the token in {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def check_private(path: Path, mode: int, others: int) -> None:
    """Raise Misused if a file of that *mode* can be used by those *others*."""
    if os.name == "posix" and mode & others:
        raise Misused(f"{path} is for you alone, and others can use it (mode {mode & 0o777:04o}): chmod 600 {path}")


def settings_in(path: Path) -> dict[str, str]:
    """Return the settings in a file, none if there is none; raise Misused if others can read it, or it is wrong."""
    try:
        with path.open("rb") as file:
            check_private(path, os.fstat(file.fileno()).st_mode, 0o077)
            known = tomllib.load(file)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Misused(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    for key, value in known.items():
        if key not in SETTINGS or not isinstance(value, str):
            raise Misused(f"{path}: {plain(key)}: possible are {', '.join(SETTINGS)}, each a text")
    return known


def seconds(text: str) -> float:
    if not re.fullmatch(r"[0-9]{1,8}(\.[0-9]{1,3})?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return float(text)


def choices(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def assignment(text: str) -> str:
    if not re.match(r"[^=\0]+=", text):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=VALUE")
    return text


class Argument(NamedTuple):
    """What argparse is told of an argument."""

    names: tuple[str, ...]
    what: str
    more: Record = {}


class Verb(NamedTuple):
    """What can be asked for: the word, what does it, what that is, and what it takes."""

    word: str
    act: Callable[[Desk], int]
    what: str
    arguments: tuple[Argument, ...] = ()


def option(names: str, what: str, **more: Any) -> Argument:
    return Argument(tuple(names.split()), what, more)


def flag(names: str, what: str, **more: Any) -> Argument:
    return option(names, what, action="store_true", **more)


ID = option("id", "of the command", metavar="ID")
COMMON = (
    option("--url", f"of the service (KIROSYNC_URL; {DEFAULT_URL})"),
    option("--token-file", "holds the token (else KIROSYNC_TOKEN does)", metavar="FILE"),
    flag("--json", "as JSON: one object, or one a line"),
    flag("--quiet", "say on stderr only what failed"),
)
VERBS = (
    Verb(
        *("run", run, "run a command where the agent is, as if it ran here"),
        (
            option("--timeout", "s of running", type=seconds, metavar="S"),
            option("--expires", "s of waiting for an agent", type=seconds, metavar="S"),
            option("--dir", "where it runs", metavar="DIR"),
            option("--env", "for it; may be repeated", type=assignment, action="append", metavar="NAME=VALUE"),
            option("--target", "the agent that is to run it", metavar="AGENT"),
            flag("-t --tty", "on a terminal of its own; Ctrl-] does what Ctrl-C does otherwise"),
            flag("-n --no-stdin", "it reads nothing of what is typed here, or piped"),
            option("words", "one word is a line for the shell", nargs=argparse.REMAINDER, metavar="-- COMMAND"),
        ),
    ),
    Verb(
        *("submit", submit, "queue a command of any type, and print its id"),
        (option("words", "TYPE field=text field:=JSON field=@FILE ...; or a JSON object; or - for stdin", nargs="+"),),
    ),
    Verb("wait", wait, "wait for a command, print what it gave, and exit as run does", (ID,)),
    Verb(
        *("logs", logs, "print what a command has printed so far"),
        (flag("-f --follow", "and what it prints, until it ends"), flag("--stderr", "its stderr alone"), ID),
    ),
    Verb("cancel", cancel, "end a command", (ID,)),
    Verb(
        *("ls", ls, "list what there is, the latest first"),
        (
            option("kind", "commands, if nothing is said", nargs="?", default="commands", choices=tuple(LISTED)),
            option("--status", "of commands: pending, processing, completed, failed", metavar="STATUS"),
            option("--type", "of commands", metavar="TYPE"),
            option("--limit", "how many", type=int, metavar="N"),
        ),
    ),
    Verb(
        *("cat", cat, "print a document, exactly"),
        (
            option("id", "of the document", metavar="ID"),
            option("--version", "one that was replaced", metavar="NAME"),
            flag("--versions", "list them, the latest first"),
        ),
    ),
    Verb(
        *("sync", sync, "bring files and the documents of the service in step"),
        (
            option("paths", "folders or files, in the folder where this is run", nargs="+", metavar="PATH"),
            option("--prefix", "before the path of a file in the id of its document", default="", metavar="TEXT"),
            flag("--push", "only send what has changed here"),
            flag("--pull", "only take what has changed there"),
            flag("--delete", "what was removed on one side is removed on the other"),
            flag("--watch", "and stay in step, until Ctrl-C"),
        ),
    ),
    Verb(
        *("chat", chat, "print a conversation, or say something in it"),
        (
            flag("-f --follow", "and print what is said, until Ctrl-C"),
            option("--say", "a message, to be added", metavar="TEXT"),
            option("--role", "of who says it (user)", default="user"),
            option("id", "of the conversation", metavar="ID"),
            option("words", "the message is read from stdin", nargs="?", choices=("-",), metavar="-"),
        ),
    ),
    Verb(
        *("ask", ask, "ask a human, wait for the answer and print it"),
        (
            option("question", "what is shown to them"),
            option("--choices", "one of these is to be chosen", type=choices, metavar="A,B"),
            flag("--confirm", "yes (exit code 0) or no (1)"),
            flag("--file", "the path of a file"),
            option("--timeout", "s of waiting; then the exit code is 124", type=seconds, metavar="S"),
            option("--execution", "the command on whose behalf it is asked", metavar="ID"),
        ),
    ),
    Verb(
        *("answer", answer, "list what waits for a human, or answer it"),
        (option("id", "of the question", nargs="?", metavar="ID"), option("value", "the answer", nargs="?")),
    ),
    Verb("status", status, "tell how the service is, what waits, and who is there"),
    Verb(
        *("completion", completion, "print what makes a shell complete this: source <(client.py completion bash)"),
        (
            option("shell", "bash or zsh", choices=tuple(SHELLS)),
            option("words", argparse.SUPPRESS, nargs="*"),
        ),
    ),
    Verb("doctor", doctor, "look for what is wrong between here and the service; the exit code is then 1"),
)


def parser_of(verbs: Iterable[Verb]) -> argparse.ArgumentParser:
    codes = "\n".join(f"  {code:4}  {meaning}" for code, meaning in EXIT.items())
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Ask a kirosync from a terminal, or a script.",
        epilog=f"exit codes:\n{codes}",
        formatter_class=raw,
    )
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for names, what, more in COMMON:
        parser.add_argument(*names, help=what, **more)
        shared.add_argument(*names, help=what, **more | {"default": argparse.SUPPRESS})
    within = parser.add_subparsers(required=True, metavar="VERB")
    for verb in verbs:
        added = within.add_parser(verb.word, help=verb.what, description=f"{verb.what}.", parents=[shared])
        for names, what, more in verb.arguments:
            added.add_argument(*names, help=what, **more)
        added.set_defaults(verb=verb)
    return parser


def ended_by(problem: Exception) -> int:
    """Return the exit code of what cannot be gone on with."""
    kinds = ((Misused, 2), (Unwelcome, 77), (Unreachable, 69), (Exception, 1))
    return next(code for kind, code in kinds if isinstance(problem, kind))


ASKED_S = 1.5  # who presses TAB waits no longer


def next_words(before: list[str], begun: str) -> Iterable[str]:
    """Return the words that may follow those *before*, the last of which has *begun*."""
    verbs = {verb.word: verb for verb in VERBS}
    at_verb = next((place for place, word in enumerate(before) if word in verbs and not is_value(before, place)), None)
    common = [name for argument in COMMON for name in argument.names]
    if at_verb is None:
        return common if begun.startswith("-") else verbs
    verb = verbs[before[at_verb]]
    if verb.word == "run" and any(not word.startswith("-") for word in before[at_verb + 1 :]):
        return ()
    if begun.startswith("-"):
        return [*common, *(name for each in verb.arguments for name in each.names if name.startswith("-"))]
    last = before[-1]
    offered = VALUES.get(last) if is_value([*before, begun], len(before)) else OFFERED.get(verb.word)
    said = argparse.Namespace(url=value_of(before, "--url"), token_file=value_of(before, "--token-file"))
    service = patient_of(said).service
    if not offered or not service:
        return ()
    service.patience = ASKED_S
    words = offered(Desk(Line(service, Screen(quiet=True)), Screen(quiet=True), said))
    return [word for word in words if not word.startswith("-")]  # an id that would be read as an option


def is_value(words: list[str], place: int) -> bool:
    """Return whether the word at a *place* is the value of the option before it."""
    arguments = [*COMMON, *(each for verb in VERBS for each in verb.arguments)]
    named = {name for each in arguments if each.more.get("action") != "store_true" for name in each.names}
    return place > 0 and words[place - 1] in named and words[place - 1].startswith("-")


def value_of(words: list[str], name: str) -> str | None:
    """Return the value of an option among *words*."""
    pairs = [word.split("=", 1) for word in words if "=" in word] + [[*pair] for pair in itertools.pairwise(words)]
    return next((value for key, value in pairs if key == name), None)


def patient_of(said: argparse.Namespace) -> Patient:
    try:
        url, token, source = settings_of(said)
        return Patient(Service(url, token), source, "")
    except (Misused, ValueError) as problem:
        return Patient(None, "", str(problem))


def perform(said: argparse.Namespace) -> int:
    screen = Screen(said.json, said.quiet)
    try:
        said.patient, said.next_words = patient_of(said), next_words
        if not said.patient.service and said.verb.act not in (doctor, completion):
            raise Misused(said.patient.problem)
        return said.verb.act(Desk(Line(said.patient.service, screen), screen, said))  # type: ignore[no-any-return]
    except Left as left:
        return left.code
    except BrokenPipeError:
        return 141
    except (Misused, Unreachable, Refused, OSError, ValueError) as problem:
        screen.quiet = False
        screen.tell(str(problem))
        return ended_by(problem)
    except ODD as problem:
        if not (said.patient.service and said.patient.service.answered) or os.environ.get("KIROSYNC_DEBUG"):
            raise  # it is a defect here, or may be one
        screen.tell(stranger(said.patient.service))
        return ended_by(problem)


def main() -> None:
    said = parser_of(VERBS).parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        code = perform(said)
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
