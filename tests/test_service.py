"""The routes, asked in-process as a client would, and over a real socket where that matters."""

import http.client
import inspect
import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import filelock
import hypothesis.strategies as some
import openapi_spec_validator
import pytest
from conftest import TOKEN, App, Process, Server, until
from hypothesis import HealthCheck, given, settings

import kirosync

HI = {"role": "user", "content": "hi", "timestamp": 1710338438173}
DOCUMENT = {"path": "/home/user/project/server.js", "content": "const http", "timestamp": 1710338450000}
BASH = {"type": "execute_bash", "command": "df -h"}


def refused(answer, status):
    """Return the error of an answer that must be JSON, have a request id, and hide how it came about."""
    assert answer.status_int == status, answer.text
    assert answer.content_type == "application/json"
    assert answer.headers["X-Request-Id"]
    assert "Traceback" not in answer.text
    return answer.json


# The seed


def test_an_empty_service_shows_the_three_kinds(client, clock):
    state = client.get("/sync").json
    assert state.pop("cursor")
    assert state == {"conversations": {}, "documents": {}, "commands": {}, "lastUpdate": 0, "serverTime": clock.now}


def test_what_is_pushed_is_what_is_got_to_the_letter(client):
    push = {"conversations": {"conv-abc123": [HI]}, "documents": {"doc-xyz789": DOCUMENT}, "commands": {}}
    answer = client.post_json("/sync", {**push, "lastUpdate": 1710338461500}).json
    assert answer["status"] == "updated"
    state = client.get("/sync").json
    assert {key: state[key] for key in push} == {key: answer["data"][key] for key in push} == push
    assert state["lastUpdate"] == 1710338461500


def test_status_is_current_when_the_server_is_as_new(client):
    assert client.post_json("/sync", {"lastUpdate": 5}).json["status"] == "updated"
    assert client.post_json("/sync", {"lastUpdate": 5}).json["status"] == "current"
    assert client.post_json("/sync", {"conversations": {"c": [HI]}, "lastUpdate": 4}).json["status"] == "current"
    assert client.get("/sync").json["conversations"] == {"c": [HI]}


def test_a_command_goes_through_its_life(client, clock):
    identity = client.post_json("/command", {**BASH, "workingDir": "/tmp", "metadata": {"initiatedBy": "ide"}}).json[
        "commandId"
    ]
    assert re.fullmatch(r"cmd-\d{13}-\w+", identity)
    assert client.get("/sync").json["lastUpdate"] == clock.now
    clock.now += 1
    assert client.patch_json(f"/command/{identity}", {"status": "processing"}).json["status"] == "processing"
    client.patch_json(f"/command/{identity}", {"status": "processing"}, status=409)
    clock.now += 1
    done = client.patch_json(f"/command/{identity}", {"status": "completed", "result": {"stdout": "x"}}).json
    assert done == client.get(f"/command/{identity}").json
    assert (done["status"], done["result"], done["metadata"]) == ("completed", {"stdout": "x"}, {"initiatedBy": "ide"})
    assert (done["createdAt"], done["updatedAt"]) == (clock.now - 2, clock.now)


def test_the_answers_to_who_has_no_token_and_to_who_asks_for_nothing(client):
    assert refused(client.get("/command/cmd-nope", status=404), 404) == {"error": "Command not found"}
    client.authorization = None
    for header in ({}, {"Authorization": TOKEN}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer \xff"}):
        for path in ("/sync", "/command/x", "/nowhere"):
            place = {"REMOTE_ADDR": f"192.0.2.{len(header)}{len(path)}"}
            answer = client.get(path, headers=header, extra_environ=place, status=401)
            assert refused(answer, 401) == {"error": "Unauthorized", "message": "Valid API key required"}
    assert client.get("/sync", headers={"Authorization": f"bearer  {TOKEN}"}).status_int == 200


def test_home_docs_and_health_are_public(client):
    client.authorization = None
    assert client.get("/").json["service"] == "kirosync"
    assert "<h1>" in client.get("/docs", headers={"Accept": "text/html,*/*"}).text
    health = client.get("/health").json
    assert health["status"] == "healthy"
    assert health["server"].keys() == {"running", "port", "host", "uptime"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", health["timestamp"])


def test_docs_name_every_route_type_and_refusal(client):
    text = client.get("/docs").text
    for route in kirosync.ROUTES:
        assert all(f"<code>{route.method} {path}</code>" in text for path in kirosync.paths_of(route))
    for name in (*kirosync.COMMANDS, "409 Conflict", "507 Full", "Authorization: Bearer"):
        assert name in text
    assert all(getattr(kirosync.Service, route.handler).__doc__ for route in kirosync.ROUTES)


def test_the_openapi_document_is_one_and_names_every_route(client):
    client.authorization = None
    document = client.get("/openapi.json").json
    openapi_spec_validator.validate(document)
    described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert described == {(route.method, path) for route in kirosync.ROUTES for path in kirosync.paths_of(route)}
    assert {("PATCH", "/command/{id}"), ("DELETE", "/document/{id}")} <= described
    queries = [each["name"] for each in document["paths"]["/sync"]["get"]["parameters"]]
    assert queries == ["since", "wait", "only", "status", "agent", "If-None-Match"]


def test_a_command_without_a_status_is_refused_by_its_name(client):
    said = client.post_json("/sync", {"commands": {"c": {"type": "execute_bash"}}}, status=400).json
    assert (said["field"], said["error"]) == ("commands.c.status", "commands.c.status: is required")


def test_every_handler_takes_what_its_route_declares_and_nothing_else():
    for route in kirosync.ROUTES:
        arguments = [*inspect.signature(getattr(kirosync.Service, route.handler)).parameters][1:]
        places = re.findall(r"<(\w+)", route.path)
        assert sorted(arguments) == sorted([*places, *(asked.argument for asked in route.asks)]), route.handler


# Sync beyond the seed


def test_since_gives_what_changed_and_only_and_status_choose(client):
    cursor = client.get("/sync").json["cursor"]
    client.post_json("/sync", {"conversations": {"c": [HI]}, "documents": {"d": DOCUMENT}})
    identity = client.post_json("/command", BASH).json["commandId"]
    delta = client.get(f"/sync?since={cursor}").json
    assert (delta["conversations"], delta["documents"], [*delta["commands"]]) == (
        {"c": [HI]},
        {"d": DOCUMENT},
        [identity],
    )
    assert "full" not in delta
    assert "documents" not in client.get(f"/sync?since={cursor}&only=commands").json
    assert client.get("/sync?status=completed,failed").json["commands"] == {}
    assert [*client.get("/sync?status=pending").json["commands"]] == [identity]
    nothing = client.get(f"/sync?since={delta['cursor']}").json
    assert nothing["conversations"] == nothing["documents"] == nothing["commands"] == nothing["deleted"] == {}
    assert client.get("/sync?since=elsewhere.7").json["full"] is True
    for query in ("only=secrets", "status=done", "wait=-1", "wait=x", "wait=1&wait=2"):
        assert refused(client.get(f"/sync?since={cursor}&{query}", status=400), 400)["field"] == query.split("=")[0]


def test_deletions_are_in_the_delta(client):
    client.post_json("/sync", {"conversations": {"c": [HI]}, "documents": {"d": DOCUMENT}})
    cursor = client.get("/sync").json["cursor"]
    assert client.delete("/conversation/c").json == {"deleted": "c"}
    client.delete("/document/d")
    assert client.get(f"/sync?since={cursor}").json["deleted"] == {"conversations": ["c"], "documents": ["d"]}
    assert refused(client.delete("/document/d", status=404), 404) == {"error": "Document not found"}


def test_a_running_command_cannot_be_deleted(client):
    identity = client.post_json("/command", BASH).json["commandId"]
    client.patch_json(f"/command/{identity}", {"status": "processing"})
    refused(client.delete(f"/command/{identity}", status=409), 409)
    client.patch_json(f"/command/{identity}", {"status": "failed", "error": "no"})
    client.delete(f"/command/{identity}")
    client.get(f"/command/{identity}", status=404)


def test_post_with_since_answers_what_changed_and_what_became_of_what_was_sent(client):
    client.post_json("/sync", {"documents": {"d": {"content": "server", "timestamp": 9}, "other": DOCUMENT}})
    cursor = client.get("/sync").json["cursor"]
    sent = {"documents": {"d": {"content": "mine", "timestamp": 5}}, "conversations": {"c": [HI]}}
    state = client.post_json(f"/sync?since={cursor}", sent).json["data"]
    assert state["documents"] == {"d": {"content": "server", "timestamp": 9}}
    assert state["conversations"] == {"c": [HI]}
    client.delete("/document/other")
    cursor = client.get("/sync").json["cursor"]
    state = client.post_json(f"/sync?since={cursor}", {"documents": {"other": DOCUMENT}}).json["data"]
    assert (state["documents"], state["deleted"]) == ({}, {"documents": ["other"]})


def test_an_unchanged_state_is_304_and_a_large_one_gzip(server):
    tag = server.ask("GET", "/sync").headers["ETag"]
    unchanged = server.ask("GET", "/sync", headers={"If-None-Match": tag})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    server.ask("POST", "/sync", json={"documents": {"d": {"content": "x" * 9999, "timestamp": 1}}})
    packed = server.ask("GET", "/sync", headers={"If-None-Match": tag})
    assert packed.headers["Content-Encoding"] == "gzip"
    assert int(packed.headers["Content-Length"]) < 1000
    assert packed.json()["documents"]["d"]["content"] == "x" * 9999


def test_an_old_pending_command_pushed_by_a_stale_client_is_kept_as_expired(client, clock):
    old = {**BASH, "status": "pending", "createdAt": clock.now - 25 * 3_600_000, "updatedAt": 0}
    new = {**BASH, "status": "pending", "createdAt": clock.now}
    commands = client.post_json("/sync", {"commands": {"old": old, "new": new}}).json["data"]["commands"]
    assert (commands["old"]["status"], commands["old"]["outcome"]) == ("failed", "expired")
    assert commands["new"]["status"] == "pending"


def test_commands_can_be_listed(client, clock):
    orders = [BASH, {"type": "read_file", "path": "/x"}, BASH]
    ids = [client.post_json("/command", order).json["commandId"] for order in orders]
    assert [*client.get("/commands").json["commands"]] == ids[::-1]
    assert [*client.get("/commands?type=read_file&status=pending").json["commands"]] == [ids[1]]
    assert len(client.get("/commands?limit=2").json["commands"]) == 2


# Bad input: a clear error, nothing written, the service alive

BAD_BODIES = {
    "nothing": (b"", ""),
    "broken": (b'{"a": ', ""),
    "NaN": (b'{"lastUpdate": NaN}', ""),
    "Infinity": (b'{"lastUpdate": 1e999}', ""),
    "not an object": (b"[]", ""),
    "half a surrogate": (rb'{"documents": {"d": {"content": "\ud800", "timestamp": 1}}}', ""),
    "not UTF-8": (b'{"documents": {"\xff": 1}}', ""),
    "deep": (b'{"x": ' + b"[" * 100_000, ""),
    "deep and whole": (b'{"documents":{"d":{"content":"","timestamp":1,"x":' + b"[" * 150 + b"]" * 150 + b"}}}", "d"),
    "wrong kind": (b'{"documents": []}', "documents"),
    "wrong message": (b'{"conversations": {"c": {"role": "user"}}}', "conversations.c"),
    "no content": (b'{"conversations": {"c": [{"role": "user", "timestamp": 1}]}}', "conversations.c[0].content"),
    "text for a time": (b'{"documents": {"d": {"content": "", "timestamp": "1"}}}', "documents.d.timestamp"),
    "truth for a time": (b'{"lastUpdate": true}', "lastUpdate"),
    "huge time": (b'{"lastUpdate": 1e300}', "lastUpdate"),
    "number of 5000 digits": (b'{"documents": {"d": {"content": "", "timestamp": 1, "x": ' + b"9" * 5000 + b"}}}", ""),
    "metadata no object": (
        b'{"conversations": {"c": [{"role": "u", "content": "", "timestamp": 1, "metadata": 3}]}}',
        "conversations.c[0].metadata",
    ),
    "status": (b'{"commands": {"k": {"type": "execute_bash", "status": "done"}}}', "commands.k.status"),
    "type": (b'{"commands": {"k": {"type": "format_disk", "status": "pending"}}}', "commands.k.type"),
    "no command": (b'{"commands": {"k": {"type": "execute_bash", "status": "pending"}}}', "commands.k.command"),
    "NUL in an id": (b'{"documents": {"a\\u0000b": {"content": "", "timestamp": 1}}}', "documents.a\x00b"),
    "empty id": (b'{"documents": {"": {"content": "", "timestamp": 1}}}', "documents."),
    "own field": (b'{"documents": {"d": {"content": "", "timestamp": 1, "revision": 3}}}', "documents.d.revision"),
    "10,000 characters": (
        json.dumps({"documents": {"x" * 10_000: {"content": "", "timestamp": 1}}}).encode(),
        "documents." + "x" * 128,
    ),
    "name too long": (
        json.dumps({"documents": {"漢" * 100: {"content": "", "timestamp": 1}}}).encode(),
        "documents." + "漢" * 100,
    ),
    "one bad record among good ones": (
        json.dumps({"documents": {"good": DOCUMENT, "bad": {"content": 5, "timestamp": 1}}}).encode(),
        "documents.bad.content",
    ),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_push_is_400_names_the_field_and_changes_nothing(client, store, name):
    body, field = BAD_BODIES[name]
    answer = refused(client.post("/sync", body, content_type="application/json", status=400), 400)
    assert answer["field"] == field
    assert answer["error"].startswith(field)
    assert store.revision == 0
    assert client.get("/sync").json["documents"] == {}


BAD_ORDERS = {
    "type: is required": {},
    "type: 'format_disk' is not one of": {"type": "format_disk"},
    "type: expected str, got int": {"type": 3},
    "command: is required": {"type": "execute_bash"},
    "command: expected str of length >= 1": {"type": "execute_bash", "command": ""},
    "command: expected str, got array": {"type": "execute_bash", "command": ["ls"]},
    "path: is required": {"type": "read_file"},
    "path: expected str, got int": {"type": "list_directory", "path": 1},
    "content: is required": {"type": "write_file", "path": "/x"},
    "parameters: is required": {"type": "aws_operation", "service": "s3", "operation": "list-buckets"},
    "query: is required": {"type": "code_search"},
    "timeout: expected": {**BASH, "timeout": 0},
    "expiresIn: expected": {**BASH, "expiresIn": "1h"},
    "env": {**BASH, "env": {"A": 1}},
    "result: is set by the service": {**BASH, "result": 1},
}


@pytest.mark.parametrize("error", BAD_ORDERS)
def test_a_bad_order_is_400_and_says_what_would_be_right(client, store, error):
    answer = refused(client.post_json("/command", BAD_ORDERS[error], status=400), 400)
    assert answer["error"].startswith(error)
    assert answer["error"].startswith(answer["field"])
    assert store.revision == 0


def test_a_body_that_is_not_json_or_too_large_is_refused_before_it_is_read(client):
    answer = refused(
        client.post("/command", "type=x", content_type="application/x-www-form-urlencoded", status=415), 415
    )
    assert "Content-Type: application/json" in answer["error"]
    large = client.post(
        "/sync", b"x", content_type="application/json", headers={"Content-Length": str(2**31)}, status=413
    )
    assert refused(large, 413)["limit"] == kirosync.BODY_BYTES


def test_unknown_paths_methods_and_bytes_are_refused(client):
    assert "no /nowhere" in refused(client.get("/nowhere", status=404), 404)["error"]
    answer = client.put("/sync", status=405)
    assert sorted(refused(answer, 405)["allowed"]) == ["GET", "POST"]
    assert sorted(answer.headers["Allow"].split(",")) == ["GET", "POST"]
    assert refused(client.get("/command/a%FFb", status=400), 400)["field"] == "path"


@pytest.mark.parametrize("identity", ["../../etc/passwd", "/etc/passwd", "a/b", "..", "%00", "a" * 10_000, "Ä ?#&"])
def test_an_id_in_a_path_is_only_ever_an_id(client, store, identity):
    path = quote(identity, safe="")
    assert client.get(f"/command/{path}", status=404).json == {"error": "Command not found"}
    client.delete(f"/document/{path}", status="4*")
    if len(identity) <= 128 and "\0" not in identity:
        client.post_json("/sync", {"documents": {identity: DOCUMENT}})
        client.delete(f"/document/{path}")
    assert {path.name for path in store.directory.parent.iterdir()} <= {"state", "log"}


def test_a_defect_is_a_500_with_a_request_id_that_is_also_in_the_log(client, store, monkeypatch, caplog):
    monkeypatch.setattr(store, "known_after", lambda *_: 1 / 0)
    answer = refused(client.get("/sync", status=500), 500)
    assert "ZeroDivisionError" not in json.dumps(answer)
    assert answer["requestId"] in caplog.text
    assert "ZeroDivisionError" in caplog.text


JSON = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=8),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=8), inner, max_size=3),
    max_leaves=12,
)
WORDS = some.sampled_from(
    ["type", "status", "content", "timestamp", "role", "command", "path", "metadata", "id", "revision"]
)
RECORD = some.dictionaries(
    WORDS, some.sampled_from(["execute_bash", "pending", "completed", 1, 1.5, -1]) | JSON, max_size=5
)
PUSH = some.dictionaries(
    some.sampled_from(["conversations", "documents", "commands", "lastUpdate"]),
    JSON | some.dictionaries(some.text(max_size=140), RECORD | some.lists(RECORD, max_size=3), max_size=3),
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(body=PUSH | JSON, route=some.sampled_from([("POST", "/sync"), ("POST", "/command"), ("PATCH", "/command/k")]))
def test_no_json_whatever_makes_the_service_fail(client, store, body, route):
    before = store.revision
    answer = client.request(
        route[1], method=route[0], body=json.dumps(body).encode(), content_type="application/json", status="*"
    )
    assert answer.status_int in (200, 400, 404, 409), answer.text
    if answer.status_int != 200:
        assert store.revision == before
        assert answer.json["error"]
    assert client.get("/sync").status_int == 200


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=some.binary(max_size=200))
def test_no_bytes_whatever_make_the_service_fail(client, body):
    answer = client.post("/sync", body, content_type="application/json", status="*")
    assert answer.status_int in (200, 400)


# Over a real socket


def raw(server, request):
    """Send bytes and return the status and the body of what comes back."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(request)
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


AUTH = f"Authorization: Bearer {TOKEN}\r\nConnection: close\r\n".encode()


def test_chunked_bodies_are_read_and_counted(server):
    head = b"POST /sync HTTP/1.1\r\nHost: x\r\n" + AUTH + b"Transfer-Encoding: chunked\r\n\r\n"
    body = json.dumps({"documents": {"d": DOCUMENT}}).encode()
    status, answer = raw(server, head + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
    assert (status, answer["data"]["documents"]) == (200, {"d": DOCUMENT})

    def endless():
        for _ in range(40):
            yield b" " * (1 << 20)

    answer = server.ask("POST", "/sync", data=endless())
    assert answer.status_code == 413
    assert answer.json()["error"]


@pytest.mark.parametrize(
    "request_line",
    [b"NONSENSE\r\n\r\n", b"GET /sync HTTP/9.9\r\n\r\n", b"POST /sync HTTP/1.1\r\nContent-Length: x\r\n\r\n"],
)
def test_what_is_no_http_is_refused_in_json(server, request_line):
    try:
        status, answer = raw(server, request_line)
    except IndexError:  # waitress hangs up on a line that it cannot begin to read
        return
    assert status in (400, 401)
    assert answer["error"]


def test_a_header_too_large_is_refused_in_json(server):
    status, answer = raw(server, b"GET /sync HTTP/1.1\r\nX: " + b"x" * 262_200 + b"\r\n\r\n")
    assert status == 431
    assert answer["error"].startswith("Request Header Fields Too Large")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=PUSH | JSON)
def test_no_json_whatever_makes_the_real_service_fail(server, body):
    answer = server.ask("POST", "/sync", data=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400), answer.text


def test_an_answer_is_held_until_something_changes(server):
    cursor = server.ask("GET", "/sync").json()["cursor"]
    with ThreadPoolExecutor() as threads:
        held = threads.submit(server.ask, "GET", f"/sync?since={cursor}&wait=20")
        other = threads.submit(server.ask, "GET", f"/sync?since={cursor}&wait=0.3&only=commands")
        time.sleep(0.1)
        started = time.monotonic()
        server.ask("POST", "/sync", json={"documents": {"d": DOCUMENT}})
        assert held.result().json()["documents"] == {"d": DOCUMENT}
        assert time.monotonic() - started < 5
        assert other.result().json()["commands"] == {}


def test_a_command_can_be_waited_for(server):
    with ThreadPoolExecutor() as threads:
        held = threads.submit(server.ask, "POST", "/command?wait=20", json=BASH)
        identity = until(lambda: next(iter(server.ask("GET", "/sync").json()["commands"]), None))
        watched = threads.submit(server.ask, "GET", f"/command/{identity}?wait=20")
        server.ask("PATCH", f"/command/{identity}", json={"status": "processing"})
        server.ask("PATCH", f"/command/{identity}", json={"status": "completed", "result": 7})
        assert (held.result().json()["commandId"], held.result().json()["result"]) == (identity, 7)
        assert watched.result().json()["result"] == 7
    assert server.ask("POST", "/command?wait=0.1", json=BASH).json()["status"] == "pending"


def test_more_waiting_clients_than_threads_leave_the_service_free_and_its_log_readable(state, tmp_path, start):
    server = start(Server, state, tmp_path / "log", "--threads", "16")
    cursor = server.ask("GET", "/sync").json()["cursor"]
    with ThreadPoolExecutor(60) as threads:
        held = [threads.submit(server.ask, "GET", f"/sync?since={cursor}&wait=4") for _ in range(60)]
        until(lambda: sum(each.done() for each in held) >= 40, 4)
        started = time.monotonic()
        assert server.ask("GET", "/health").status_code == 200
        assert time.monotonic() - started < 2
        assert sum(each.done() for each in held) <= 60 - 16 // 2
        server.ask("POST", "/sync", json={"documents": {"d": DOCUMENT}})
        assert {each.result().status_code for each in held} == {200}
    assert "queue depth" not in (tmp_path / "log").read_text().lower()


def test_what_another_process_changes_wakes_who_waits(server, state):
    cursor = server.ask("GET", "/sync").json()["cursor"]
    store = kirosync.Store(state, kinds=("commands",))
    with ThreadPoolExecutor() as threads:
        held = threads.submit(server.ask, "GET", f"/sync?since={cursor}&wait=20")
        time.sleep(0.1)
        store.change(lambda pen: kirosync.put_command(pen, None, {"id": "k", **kirosync.new_command(BASH, pen.now)}))
        assert [*held.result().json()["commands"]] == ["k"]
    store.close()


def test_overdue_commands_end_by_themselves(server):
    identity = server.ask("POST", "/command", json={**BASH, "expiresIn": 0.1}).json()["commandId"]
    ended = server.ask("GET", f"/command/{identity}?wait=10").json()
    assert (ended["status"], ended["outcome"]) == ("failed", "expired")
    identity = server.ask("POST", "/command", json=BASH).json()["commandId"]
    server.ask("PATCH", f"/command/{identity}", json={"status": "processing", "agent": "a", "lease": 0.1})
    ended = server.ask("GET", f"/command/{identity}?wait=10").json()
    assert (ended["status"], ended["outcome"]) == ("failed", "lost")


def test_the_token_file_is_made_once_and_is_private(state, tmp_path, start):
    server = start(Process, "kirosync.py", "serve", "--port", "0", "--state", state, log=tmp_path / "log")
    until(lambda: (state / "token").exists() and "on http" in (tmp_path / "log").read_text(), 20)
    token = (state / "token").read_text()
    assert (state / "token").stat().st_mode & 0o777 == 0o600
    assert len(token) > 40
    assert server.end() == 0
    assert token.strip() not in (tmp_path / "log").read_text()
    assert kirosync.Keyring(state).find(token.strip().encode()).scope == "admin"


def test_a_port_that_is_taken_is_said_in_one_line(server, tmp_path, start):
    port = server.url.rsplit(":", 1)[1]
    second = start(Process, "kirosync.py", "serve", "--port", port, "--state", tmp_path / "other", log=tmp_path / "two")
    assert second.popen.wait(20) == 1
    assert (tmp_path / "two").read_text().splitlines()[-1].startswith(f"kirosync: cannot listen on 127.0.0.1:{port}")


def test_many_threads_in_process_share_one_store(client, store):
    app = client.app

    def push(number):
        own = App(app)
        own.authorization = ("Bearer", TOKEN)
        return own.post_json("/sync", {"conversations": {"c": [{**HI, "content": f"{number:02}"}]}}).status_int

    with ThreadPoolExecutor(8) as threads:
        assert set(threads.map(push, range(40))) == {200}
    assert len(client.get("/sync").json["conversations"]["c"]) == 40
    assert threading.active_count() < 50


def test_a_lock_held_by_another_process_delays_what_is_overdue_but_does_not_end_the_looking(state, tmp_path, start):
    """The lock is held for longer than anyone waits for it; what falls due meanwhile is ended afterwards."""
    server = start(Server, state, tmp_path / "log")
    identity = server.ask("POST", "/command", json={**BASH, "expiresIn": 1}).json()["commandId"]
    lock = filelock.FileLock(state / ".lock")
    with lock, (state / "journal.jsonl").open("ab") as journal:
        journal.write(b'{"revision":99,"at":0,"lastUpdate":0,"kind":"lastUpdate","id":"","op":"touch"}\n')
        journal.flush()
        assert server.ask("GET", "/health").status_code == 200
        time.sleep(kirosync.LOCK_S + 2)
    assert server.ask("GET", f"/command/{identity}?wait=20").json()["outcome"] == "expired"


def test_with_one_thread_nothing_is_held(state, tmp_path, start):
    server = start(Server, state, tmp_path / "log", "--threads", "1")
    cursor = server.ask("GET", "/sync").json()["cursor"]
    started = time.monotonic()
    server.ask("GET", f"/sync?since={cursor}&wait=20")
    assert time.monotonic() - started < 3


def test_who_hangs_up_frees_its_place(server):
    cursor = server.ask("GET", "/sync").json()["cursor"]
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(kirosync.THREADS):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"GET /sync?since={cursor}&wait=50 HTTP/1.1\r\nHost: x\r\n".encode() + AUTH + b"\r\n")
            time.sleep(0.02)
    time.sleep(kirosync.GONE_S + 0.5)
    started = time.monotonic()
    server.ask("GET", f"/sync?since={cursor}&wait=1.5")
    assert time.monotonic() - started > 1.4


# What is old


DAY = 24 * 3600 * 1000


def ended_command(client, **more):
    identity = client.post_json("/command", BASH | more).json["commandId"]
    client.patch_json(f"/command/{identity}", {"status": "processing"})
    client.patch_json(f"/command/{identity}", {"status": "completed", "result": {"stdout": "x"}})
    return identity


@pytest.fixture
def service(store):
    return kirosync.Service(store, kirosync.Keyring(store.directory, TOKEN))


@pytest.fixture
def app(service):
    app = App(service.app)
    app.authorization = ("Bearer", TOKEN)
    return app


def test_what_ended_long_ago_moves_to_the_archive_with_its_output(app, service, state, clock):
    identity = ended_command(app)
    (state / "output" / f"{identity}.out").write_text("x")
    cursor = app.get("/sync").json["cursor"]
    clock.now += 30 * DAY - 1
    assert service.retire() == 0
    clock.now += 2
    assert service.retire() == 1
    assert not list((state / "commands").iterdir()) + list((state / "output").iterdir())
    assert json.loads((state / "archive" / "commands" / f"{identity}.json").read_text())["result"] == {"stdout": "x"}
    assert (state / "archive" / "output" / f"{identity}.out").read_text() == "x"
    assert app.get(f"/sync?since={cursor}").json["deleted"] == {"commands": [identity]}
    assert app.get(f"/command/{identity}", status=404)


def test_what_is_in_the_archive_does_not_come_back_from_a_stale_client(app, service, state, clock):
    identity = ended_command(app)
    stale = app.get("/sync").json
    clock.now += 31 * DAY
    service.retire()
    assert app.post_json("/sync", stale).json["data"]["commands"] == {}
    (state / "journal.jsonl").unlink()
    again = kirosync.Store(state, clock=clock)
    assert again.change(lambda pen: pen.grave("commands", identity))["status"] == "completed"
    again.close()


def test_what_nobody_was_told_of_or_has_not_ended_stays(app, service, state, clock):
    unread, pending = ended_command(app), app.post_json("/command", BASH | {"expiresIn": 10**7}).json["commandId"]
    clock.now += 31 * DAY
    assert service.retire() == 0
    app.get(f"/command/{pending}")
    assert service.retire() == 0
    app.get("/sync?only=commands&status=pending")
    assert service.retire() == 0
    assert {file.stem for file in (state / "commands").iterdir()} == {unread, pending}
    app.get(f"/command/{unread}")
    assert service.retire() == 1


def test_what_is_no_longer_as_it_was_when_it_was_found_old_is_not_archived(app, store, clock):
    young, pending = ended_command(app), app.post_json("/command", BASH).json["commandId"]
    store.change(lambda pen: kirosync.archive(pen, [young, pending, "absent"], clock.now - 1))
    assert app.get("/sync").json["commands"].keys() == {young, pending}


def test_who_was_told_of_what_is_remembered_over_a_restart(app, service, store, state, clock):
    first = ended_command(app)
    cursor = app.get("/sync").json["cursor"]
    second, third = ended_command(app), ended_command(app)
    app.get("/commands?limit=1&status=completed")
    app.get(f"/sync?since={cursor}")
    service.told.save()
    clock.now += 31 * DAY
    assert kirosync.Service(store, kirosync.Keyring(store.directory, TOKEN)).retire() == 2
    assert [file.stem for file in (state / "commands").iterdir()] == [second], (first, third)


def test_it_says_so_while_it_is_still_reading_its_state(store):
    service = kirosync.Service(None, kirosync.Keyring(store.directory, TOKEN))
    client = App(service.app)
    client.authorization = ("Bearer", TOKEN)
    answer = client.get("/sync", status=503)
    assert answer.json["error"] == "the state directory is still being read; try again in a moment"
    assert answer.headers["Retry-After"] == "1"
    assert client.get("/health", status=503).json["problem"] == "starting"
    service.begin(store)
    assert client.get("/health").json["status"] == "healthy"
    assert client.get("/sync").json["commands"] == {}


def test_many_who_wait_for_the_same_are_told_one_after_the_other(server):
    cursor = server.ask("GET", "/sync").json()["cursor"]
    with ThreadPoolExecutor(40) as threads:
        held = [threads.submit(server.ask, "GET", f"/sync?since={cursor}&wait=20") for _ in range(40)]
        until(lambda: sum(map(is_waiting, held)) == 40)
        time.sleep(0.5)
        push = {"documents": {"d": {"content": "x", "timestamp": 1}}}
        server.ask("POST", "/sync", json=push)
        answers = [answer.result() for answer in held]
    assert all(answer.json()["documents"] == push["documents"] for answer in answers)
    told = sorted(answer.json()["serverTime"] for answer in answers)
    assert told[-1] - told[0] >= 39 * kirosync.PACE_S * 1000 - 5


def is_waiting(answer):
    return answer.running()


def test_a_whole_state_larger_than_a_block_is_sent_in_blocks_plain_and_compressed(server):
    text = "words and more words " * 20_000
    push = {"documents": {f"d{n}": {"content": f"{n}{text}", "timestamp": n} for n in range(8)}}
    server.ask("POST", "/sync", json=push)
    for encoding in ("gzip", "identity"):
        answer = server.ask("GET", "/sync", headers={"Accept-Encoding": encoding})
        assert answer.headers.get("Content-Encoding", "identity") == encoding
        assert answer.json()["documents"] == push["documents"]


def test_a_304_leaves_the_connection_open(server):
    tag = server.ask("GET", "/sync").headers["ETag"]
    address = server.url.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=10)
    headers = {"Authorization": f"Bearer {TOKEN}", "If-None-Match": tag}
    connection.request("GET", "/sync", headers=headers)
    connection.getresponse().read()
    first = connection.sock
    for asked, closes in (({}, False), ({"Connection": "close"}, True)):
        connection.request("GET", "/sync", headers=headers | asked)
        answer = connection.getresponse()
        assert (answer.status, answer.read(), answer.headers["ETag"]) == (304, b"", tag)
        assert (connection.sock is None) == closes
        assert closes or connection.sock is first


def test_a_backup_that_is_older_than_what_was_told_tells_of_its_own_commands(app, service, store, state, clock):
    store.remember("told", b'{"revision": 999999, "commands": []}')
    again = App((service := kirosync.Service(store, kirosync.Keyring(store.directory, TOKEN))).app)
    again.authorization = ("Bearer", TOKEN)
    ended_command(again)
    clock.now += 31 * DAY
    assert service.retire() == 0


def test_who_hangs_up_at_once_does_no_harm(server, tmp_path):
    cursor = server.ask("GET", "/sync").json()["cursor"]
    host, port = server.url.removeprefix("http://").split(":")
    request = f"GET /sync?since={cursor}&wait=50 HTTP/1.1\r\nHost: x\r\n".encode() + AUTH + b"\r\n"
    for _ in range(60):
        connections = [socket.create_connection((host, int(port))) for _ in range(20)]
        for number, connection in enumerate(connections):
            connection.sendall(request)
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # a reset
            connection.close()
    assert server.ask("GET", "/sync").status_code == 200
    assert "ERROR" not in (tmp_path / "log").read_text()
    assert "uncaptured" not in (tmp_path / "log").read_text()


def test_who_does_not_read_holds_no_thread(state, tmp_path, start):
    server = start(Server, state, tmp_path / "log", "--threads", "4")
    text = "x" * 3_000_000
    server.ask("POST", "/sync", json={"documents": {f"d{n}": {"content": text, "timestamp": n} for n in range(10)}})
    host, port = server.url.removeprefix("http://").split(":")
    stalled = [socket.create_connection((host, int(port))) for _ in range(6)]
    for connection in stalled:
        connection.sendall(b"GET /sync HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\n")
    for connection in stalled:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert server.ask("GET", "/health").status_code == 200
    for connection in stalled:
        connection.close()


def test_a_running_service_compacts_its_journal(state, tmp_path, start):
    store = kirosync.Store(state)
    store._journal.enter([kirosync.Line(n, 0, 0, "lastUpdate", "", "touch") for n in range(1, 3000)])
    store.close()
    start(Server, state, tmp_path / "log")
    until(lambda: len((state / "journal.jsonl").read_bytes().splitlines()) < 10)


def test_two_signals_at_once_end_the_service_once(state, tmp_path, start):
    for pause in (0, 0.001, 0.004, 0.01):
        server = start(Server, state, tmp_path / f"log{pause}")
        server.popen.send_signal(signal.SIGINT)
        time.sleep(pause)
        assert server.end() == 0, (tmp_path / f"log{pause}").read_text()
