"""What /openapi.json says is so: the service is asked all that it allows, and much that it does not."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TOKEN, Server
from described import hold

import kirosync

HERE = Path(__file__).parent
SCHEMATHESIS = Path(sys.executable).with_name("schemathesis")
SECONDS = int(os.environ.get("KIROSYNC_TEST_SCHEMA_S", "30"))  # of asking
SEED = os.environ.get("KIROSYNC_TEST_SEED", "1")
SAID = {"X-Request-Id": "x", "Content-Type": "application/json"}
PRINTED = dict.fromkeys(kirosync.PRINT, "0")
STATE = b'{"conversations": {}, "documents": {}, "commands": {}, "lastUpdate": 0, "cursor": "a", "serverTime": 0}'
HI = {"role": "user", "content": "hi", "timestamp": 1}
WAITS = {"status": "pending", "createdAt": 10**13}
KNOWN = {  # with what is in schemathesis.toml
    "conversations": {"conv-1": [HI]},
    "documents": {"doc-1": {"content": "new", "timestamp": 2}},
    "commands": {
        "cmd-1": {**WAITS, "type": "execute_bash", "command": "cat", "stdin": True},
        "ask-1": {**WAITS, "type": "user_input", "prompt": "What?"},
    },
}


def ask_by_schema(server, folder, *options):
    """Ask *server* what its description allows, and what not; return what was found, in words."""
    paths = os.pathsep.join(map(str, (HERE, HERE.parent)))
    asked = ("--max-time", str(SECONDS), "--seed", SEED, "--no-color", *options)
    ran = subprocess.run(
        [SCHEMATHESIS, "--config-file", HERE / "schemathesis.toml", "run", f"{server.url}/openapi.json", *asked],
        cwd=folder,
        env={**os.environ, "KIROSYNC_TOKEN": TOKEN, "SCHEMATHESIS_HOOKS": "manners", "PYTHONPATH": paths},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS + 120,
        check=False,
    )
    return ran.returncode, ran.stdout


def test_schemathesis_finds_no_deviation(state, tmp_path, start):
    """No agent is there: what is queued is not to be done."""
    server = start(Server, state, tmp_path / "log", "--trusted-proxy", "127.0.0.1", "--execute-timeout", "1")
    answer = server.ask("POST", "/sync", json=KNOWN)
    assert answer.status_code == 200, answer.text
    assert server.ask("PATCH", "/command/cmd-1", json={"status": "processing"}).status_code == 200
    returned, said = ask_by_schema(server, tmp_path)
    print(said[said.find("= SUMMARY =") :])
    assert returned == 0, said[:20_000]
    assert int(re.search(r"(\d+) generated", said)[1]) > 300, said
    assert "ERROR" not in (tmp_path / "log").read_text()
    assert server.ask("GET", "/health").json()["ready"]
    assert server.end() == 0


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (("GET", "/sync", 200, SAID | {"ETag": "x"}, b"{}"), "is a required property"),
        (("GET", "/sync", 200, SAID, STATE), "ETag"),
        (("GET", "/sync", 418, SAID, b"{}"), "418 is not described"),
        (("GET", "/sync", 304, SAID | {"ETag": "x"}, b"{}"), "no body"),
        (("GET", "/command/a/output", 200, SAID | PRINTED, b"{}"), "application/json is not described"),
        (("GET", "/command/a/b", 404, SAID, b'{"message": "no"}'), "error"),
    ],
)
def test_an_answer_that_deviates_is_noticed(answer, problem):
    with pytest.raises(AssertionError, match=problem):
        hold(*answer)


def test_all_that_a_client_may_send_is_an_example_that_is_taken(client):
    """The examples are what /docs offers to try."""
    for route in kirosync.ROUTES:
        if route.takes and route.handler in ("post_sync", "post_command", "put_agent"):
            path = kirosync.readable(route.path).replace("ID", "example")
            for example in route.takes.examples.values():
                assert client.request(path, method=route.method, body=json.dumps(example).encode()).status_int == 200
    assert not [route for route in kirosync.ROUTES if route.method in ("PUT", "PATCH") and not route.takes]


def test_every_route_declares_what_it_answers_and_refuses():
    for route in kirosync.ROUTES:
        assert any(answer.status == 200 for answer in route.says), route.handler
        assert bool(route.takes) == ("self.body()" in source(route) or "self.raw()" in source(route)), route.handler
        assert ("<" in route.path and route.method != "PUT") <= (kirosync.NotFound in route.refuses), route.handler


def source(route):
    return inspect.getsource(getattr(kirosync.Service, route.handler)).replace("kiro_body", "body")
