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

The sections, each of which uses only what stands above it, and the one rule of each:

    Errors    what may go wrong between here and a service
    Rules     how two versions become one, as the service does it; no network, no disk, no clock
    Service   requests and answers
    Copy      the state of a service, here
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast
from urllib.parse import urlencode

import urllib3

Record = dict[str, Any]


# ---------------------------------------------------------------------------------------- Errors
# What may go wrong between here and a service.


class Unreachable(Exception):
    """The service cannot be reached now, or not do what was asked; later it may. ``pause`` (s) is what it asks for."""

    def __init__(self, problem: str, pause: float = 0) -> None:
        super().__init__(problem)
        self.pause = pause


class Refused(Exception):
    """What was sent is not accepted as it is; the text says why, and ``status`` and ``body`` what was answered."""

    def __init__(self, status: int, body: Record) -> None:
        super().__init__(str(body.get("error")))
        self.status, self.body = status, body


# ---------------------------------------------------------------------------------------- Rules
# How two versions become one, as the service does it. tests/vectors.json says it by examples.

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


# ---------------------------------------------------------------------------------------- Service
# Requests and answers.

CONNECT_S = 10  # for an answer, beyond the time that the service may hold it
FINAL = (400, 413, 415, 422)  # what is refused so is refused for ever


class Service:
    """A service at *url*. Any number of threads may ask at once; each connection is kept for the next request."""

    def __init__(self, url: str, token: str) -> None:
        if not token.isprintable() or not token.isascii():
            raise ValueError("the token has characters that no header can carry")  # whoever sends it would show it
        self.url = url.rstrip("/")
        self.headers = {
            "Authorization": f"Bearer {token}",
            "Content-Type": "application/json",
            "Accept-Encoding": "gzip",
        }
        self.pool = urllib3.PoolManager(maxsize=16, retries=False)

    def request(self, method: str, path: str, body: bytes | None = None, held: float = 0, **headers: str) -> Any:
        """Return the answer, whatever its status, but for what may be otherwise later: then raise Unreachable.

        *held* is how long (s) the service may wait before it answers; a header's name has _ for -.
        """
        said = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        try:
            answer = self.pool.request(method, self.url + path, body=body, headers=said, timeout=held + CONNECT_S)
        except urllib3.exceptions.HTTPError as error:
            raise Unreachable(f"{self.url}: {error}") from None
        if answer.status == 401:
            raise Unreachable(f"{self.url} does not take the token; is it that service's?")
        if answer.status == 429 or answer.status >= 500:
            pause = answer.headers.get("Retry-After", "")
            problem = f"{self.url} answered {answer.status}: {told(answer.data).get('error')}"
            raise Unreachable(problem, float(pause) if pause.isdecimal() else 0)
        return answer

    def ask(self, method: str, path: str, body: Record | None = None, held: float = 0, **headers: str) -> Record | None:
        """Return the JSON that was answered, or None for a conflict or what is not there; raise Refused."""
        answer = self.request(method, path, None if body is None else json.dumps(body).encode(), held, **headers)
        if answer.status in (404, 409):
            return None
        if answer.status in FINAL:
            raise Refused(answer.status, told(answer.data))
        if answer.status != 200:
            raise Unreachable(f"{self.url} answered {answer.status}; is there something between us?")
        return told(answer.data)

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


def told(body: bytes) -> Record:
    """Return the JSON object in *body*, or what it says else as an error."""
    try:
        said = json.loads(body)
    except ValueError:
        said = None
    return said if isinstance(said, dict) else {"error": body[:200].decode("utf-8", "replace")}


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

        Raises Unreachable.
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
