"""Requests that mean harm, or nothing: mostly valid ones with a thing or two wrong. The same seed makes the same."""

import copy
import json
import random
import re
from urllib.parse import quote, quote_from_bytes

from conftest import TOKEN

import kirosync

STRANGE_IDS = [
    *("../../etc/passwd", "..", ".", "/etc/passwd", "a/../../b", ".lock", "journal.jsonl", "token", "tokens.json"),
    *(
        "a" * 128,
        "a" * 129,
        "a" * 5000,
        "漢" * 100,
        "\0",
        "a\nb",
        "%2e%2e%2f",
        "%",
        "-rf",
        "~",
        "$(id)",
        "con",
        "x.json",
    ),
    *(
        "\u202e",
        "é",
        "e\u0301",
        "\U0001f600",
        " ",
        "a b",
        "?",
        "#",
        "&",
        "\\",
        "..\\..",
        "a/cancel",
        "a/output",
        "a/versions",
        "a/diff",
        "/",
        "//",
    ),
]
IDS = [f"id-{number}" for number in range(40)]
WORTHLESS = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1.5,
        1e308,
        2**53,
        2**63,
        2**64,
        -(2**63),
        10**400,
        "",
        "x",
        "\0",
        "\ud800",
        "x" * 3000,
    ),
    *([], {}, [[]], {"": None}, [None] * 50, {"a": {"b": {"c": []}}}, "2026-11-22", "1", "true", "NaN", "../../x"),
]
WORDS = [
    "execute_bash",
    "pending",
    "processing",
    "completed",
    "failed",
    "stdout",
    "utf-8",
    "base64",
    "text",
    "agent",
    "ide",
]
TYPES = {
    "execute_bash": {"command": "true"},
    "read_file": {"path": "/x"},
    "write_file": {"path": "/x", "content": "x"},
    "list_directory": {"path": "/x"},
    "aws_operation": {"service": "s3", "operation": "list-buckets", "parameters": {}},
    "code_search": {"query": "x"},
    "kiro_command": {"command": "x"},
    "user_input": {"prompt": "x", "inputType": "choice", "choices": ["a"]},
}
VALUES = {  # of what may stand in a query
    "since": ["x", "x.1", "0", ".", "a8209eedc473.99999999999999999999"],
    "wait": ["0", "0.01", "0.02"],
    "only": ["commands", "documents", "conversations,commands"],
    "status": ["pending", "completed,failed"],
    "agent": ["a", "b", "id-1"],
    "type": ["execute_bash", "user_input,read_file"],
    "limit": ["0", "1", "20", "999999"],
    "stream": ["stdout", "stderr", "stdin"],
    "offset": ["0", "1", "999999999999999"],
    "tail": ["0", "1", "100"],
    "attempt": ["1", "2"],
    "claim": ["x"],
    **{name: ["current", "0000000000000007-0123456789ab"] for name in ("version", "from", "to")},
}
WRONG_TEXTS = [
    "",
    "-1",
    "1e9x",
    "٣",
    "\0",
    "%",
    "%%",
    "%ff",
    "a" * 2000,
    "'; drop",
    "null",
    "1,2",
    ",",
    "\u0660.\u0665",
    "+1",
    "0x1",
    "é",
]
NO_METHODS = ["TRACE", "CONNECT", "OPTIONS", "HEAD", "FOO", "M-SEARCH", "!", "A" * 300]
NO_HTTP = [
    b"\x16\x03\x01\x02\x00\x01\x00",
    b"GET\r\n\r\n",
    b"GET / HTTP/1.1 x\r\n\r\n",
    b"get / HTTP/1.1\r\n\r\n",
    b"GET http://[ HTTP/1.1\r\n\r\n",
    b"GET http://" + b"1" * 20_000 + b" x\r\n\r\n",
    b"GET / HTTP/1.1\r\nX:" + b" " * 30_000 + b"\0\r\n\r\n",
    b"GET / HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: a\rb\r\n\r\n",
    b"GET / HTTP/1.1\r\n : x\r\n\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 500 + b"\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"y" * 40_000 + b"\r\n\r\n",
    b"GET /" + b"y" * 40_000 + b" HTTP/1.1\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxy",
    b"POST / HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\nx",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"\r\n\r\n\r\n\0\r\n\r\n",
]
CHUNKED = b"POST /sync HTTP/1.1\r\nAuthorization: Bearer " + TOKEN.encode() + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
NO_CHUNKS = [
    b"-1\r\n",
    b"1\r\nxy\r\n",
    b"1;" + b"x" * 9000,
    b"0\r\n" + b"x" * 9000,
    b"fffffffffffffffff\r\nx",
    b"\0",
    b"1 \r\nx\r\n",
]


class Noise:
    """The requests of one connection."""

    def __init__(self, seed):
        self.random = random.Random(seed)

    def maybe(self, part):
        return self.random.random() < part

    def any(self, *things):
        return self.random.choice(things)

    def batch(self):
        """Return (method, request) of some requests that are well framed, and at times what is not, to come last."""
        requests = [self.request() for _ in range(self.random.randrange(1, 40))]
        return requests, self.unframed() if self.maybe(0.25) else b""

    def request(self):
        route = self.random.choice(kirosync.ROUTES)
        method = self.any(*NO_METHODS, "GET", "PUT", "PATCH", "DELETE") if self.maybe(0.04) else route.method
        path = self.any("/nowhere", "//sync", "/sync/", "/%ff", "*", "/a?b?c") if self.maybe(0.03) else self.path(route)
        body = self.body(route) if method in ("POST", "PUT", "PATCH") or self.maybe(0.03) else None
        headers = [*self.headers(), *([] if body is None else self.framing(body))]
        self.random.shuffle(headers)
        head = b"".join(name + b": " + value + b"\r\n" for name, value in headers)
        framed = b"" if body is None else self.framed(body, headers)
        return method, f"{method} {path} HTTP/1.1\r\n".encode("latin-1") + head + b"\r\n" + framed

    def identity(self):
        return self.any(*STRANGE_IDS) if self.maybe(0.25) else self.any(*IDS)

    def path(self, route):
        identity = quote(self.identity(), safe=self.any("", "/", "/:@"))
        path = re.sub("<identity.*?>", lambda _: identity, route.path)
        path = re.sub("<kind.*?>", lambda _: self.any("conversation", "document", "command"), path)
        query = [
            f"{asked.name}={self.value(asked.name)}"
            for asked in route.asks
            if asked.place == "query" and self.maybe(0.5)
        ]
        if route.path == "/sync" and route.method == "GET" and not query:
            query = ["only=documents"]  # all there is, again and again, would only take its time
        if self.maybe(0.03):
            query += [f"{self.any(*VALUES)}={quote(self.any(*WRONG_TEXTS))}"] * self.any(1, 2, 50)
        return path + (self.any("?", "?", "?&", "??") + self.any("&", "&", "&&", ";").join(query) if query else "")

    def value(self, name):
        wrong = self.maybe(0.15) and name != "wait"
        text = self.any(*WRONG_TEXTS) if wrong else self.any(*VALUES[name])
        return quote(text) if self.maybe(0.9) else quote_from_bytes(text.encode("utf-16"))

    def headers(self):
        if self.maybe(0.75):
            yield b"Authorization", self.any(b"Bearer ", b"bearer  ") + TOKEN.encode()
        elif self.maybe(0.5):
            yield (
                b"Authorization",
                self.any(b"", b"Bearer", b"Bearer \xff", b"Basic eDp5", b"Bearer " + b"x" * 9000, b"x"),
            )
        for name in (
            b"X-Request-Id",
            b"Idempotency-Key",
            b"If-None-Match",
            b"Prefer",
            b"Accept",
            b"Host",
            b"Cookie",
            b"Range",
        ):
            if self.maybe(0.06):
                yield (
                    name,
                    self.any(b"", b"x", b"\xff\xfe", b"\xc3\xa9", b'W/"x"', b"x" * 300, b",;=,", b"*/*", b"k1", b"k2"),
                )
        if self.maybe(0.2):
            yield b"Accept-Encoding", self.any(b"gzip", b"gzip;q=0", b"gzip;q=" + b"0" * 900, b"br, gzip")
        if self.maybe(0.7):
            kinds = (b"application/json",) * 12 + (
                b"text/plain",
                b"application/json; charset=x",
                b"a+json",
                b"\xff",
                b"",
            )
            yield b"Content-Type", self.any(*kinds)
        if self.maybe(0.5):
            yield b"Prefer", b"respond-async"

    def framing(self, body):
        if self.maybe(0.15):
            return [(b"Transfer-Encoding", self.any(b"chunked", b"Chunked"))]
        return [(b"Content-Length", b"%d" % len(body))] + ([(b"Expect", b"100-continue")] if self.maybe(0.02) else [])

    def framed(self, body, headers):
        """Return the *body* as its *headers* say it comes: whole, or in pieces."""
        if b"Transfer-Encoding" not in dict(headers):
            return body
        size = self.any(1, 7, 1000) if len(body) < 3000 else 5000
        pieces = [body[start : start + size] for start in range(0, len(body), size)]
        extension = self.any(b"", b"", b";a=b")
        return b"".join(b"%x%s\r\n%s\r\n" % (len(piece), extension, piece) for piece in pieces) + b"0\r\n\r\n"

    def unframed(self):
        """Return what breaks the rules of HTTP itself: no request, a length that lies, a request that is cut."""
        request = next(each for method, each in iter(self.request, None) if method != "HEAD")
        lies = request.replace(
            b"Content-Length: ", self.any(b"Content-Length: 1", b"Content-Length: +", b"Content_Length: ")
        )
        cut = request[: self.random.randrange(len(request))]
        return self.any(*NO_HTTP, CHUNKED + self.any(*NO_CHUNKS), lies, lies, cut, cut, cut, request * 3 + cut)

    # Bodies

    def body(self, route):
        if self.maybe(0.04):
            return self.any(
                b"", b"{", b"[]", b"null", b'"x"', b"\xff", b"{}" * 9, b"[" * 5000, b'{"a":' * 3000, b" " * 90_000
            )
        body = self.record(route.handler)
        for _ in range(self.any(0, 1, 1, 2)):
            self.spoil(body)
        text = json.dumps(body, ensure_ascii=self.maybe(0.7)).encode("utf-8", "surrogatepass")
        return text[: self.random.randrange(len(text))] if self.maybe(0.02) else text

    def spoil(self, record):
        """Make a thing in *record* wrong, at any depth."""
        while isinstance(record, dict) and record:
            key = self.any(*record)
            if not (isinstance(record[key], dict) and record[key] and self.maybe(0.7)):
                break
            record = record[key]
        if self.maybe(0.15):
            record[self.any("id", "revision", "x", "", "status", "type", "present", "result")] = copy.deepcopy(
                self.any(*WORTHLESS)
            )
        elif record:
            record[key] = copy.deepcopy(self.any(*WORTHLESS, *WORDS))
            if self.maybe(0.3):
                del record[key]

    def record(self, handler):
        return {
            "post_sync": self.push,
            "post_command": self.order,
            "patch_command": self.report,
            "post_input": lambda: {
                "data": "eA==",
                "encoding": self.any("utf-8", "base64"),
                "offset": 0,
                "close": False,
            },
            "post_render": lambda: {
                "texts": [{"text": self.any(*WORDS), "as": self.any("markdown", "code"), "language": self.any(*WORDS)}]
            },
            "put_agent": self.agent,
            "patch_agent": self.agent,
            "post_execute": lambda: {"command": "x", "args": ["1"], "workspacePath": "/x"},
            "post_kiro_input": lambda: {"value": "a", "type": "choice", "executionId": self.identity()},
        }.get(handler, lambda: {"x": 1})()

    def agent(self):
        return {"kind": self.any("agent", "ide"), "types": ["execute_bash"], "availableCommands": ["x"], "version": "1"}

    def order(self):
        kind = self.any(*TYPES)
        more = {
            "timeout": 1,
            "expiresIn": 5,
            "target": "a",
            "metadata": {"a": 1},
            "retryable": True,
            "stdin": True,
            "env": {},
        }
        return {
            "type": kind,
            **copy.deepcopy(TYPES[kind]),
            **{key: value for key, value in more.items() if self.maybe(0.2)},
        }

    def report(self):
        more = {
            "agent": "a",
            "lease": 5,
            "attempt": 1,
            "result": {"stdout": "x", "exitCode": 0},
            "error": "x",
            "outcome": "ok",
        }
        status = self.any("processing", "completed", "failed", "pending")
        return {"status": status, **{key: value for key, value in more.items() if self.maybe(0.2)}}

    def push(self):
        message = {"role": "user", "content": self.any(*WORDS), "timestamp": self.random.randrange(20)}
        document = {"path": "/x", "content": self.any(*WORDS), "timestamp": self.random.randrange(20)}
        status = self.any("pending", "processing", "completed", "failed")
        push = {
            "conversations": {self.identity(): [message, {**message, "id": self.any(1, "a")}]},
            "documents": {self.identity(): document},
            "commands": {self.identity(): {**self.order(), "status": status, "createdAt": 1}},
            "lastUpdate": self.any(0, 5, 10**13),
        }
        return {key: value for key, value in push.items() if self.maybe(0.6)}
