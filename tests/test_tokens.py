"""Who may ask what, and how much: tokens and their scopes, limits, and who has no token."""

import itertools
import json
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webtest
from conftest import ADMIN, ROOT, TOKEN, Process, Server, until

import kirosync

BASH = {"type": "execute_bash", "command": "true"}
ASK = {"type": "user_input", "prompt": "May I?", "inputType": "confirmation"}
REMOTE = {"type": "kiro_command", "command": "probe"}
STRONG = "s" * kirosync.UNGUESSABLE


def add(store, name, scope, secret=None, **more):
    """Make a token, as ``kirosync.py token add`` does; return its secret."""
    secret = secret or f"{scope}-".ljust(40, "x") + name
    token = {"scope": scope, "sha256": kirosync.digest(secret.encode()), "createdAt": 1, **more}
    store.change(lambda pen: pen.entitle(name, token))
    return secret


@pytest.fixture
def service(store):
    return kirosync.Service(store, kirosync.Keyring(store.directory, TOKEN))


@pytest.fixture
def ask(service, store):
    """Ask the service with a token of a scope: ask("read", "GET", "/sync"); a token of the same name is made once."""
    app, secrets = webtest.TestApp(service.app), {"admin": TOKEN}

    def ask(scope, method, path, body=None, **more):
        secrets[scope] = secrets.get(scope) or add(store, scope, scope)
        headers = {"Authorization": f"Bearer {secrets[scope]}", **more}
        raw = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        return app.request(path, method=method, body=raw, headers=headers, expect_errors=True)

    return ask


def tool(*argv, **more):
    """Run kirosync.py; the state that it is told of is there, as one of a service is."""
    [Path(value).mkdir(exist_ok=True) for option, value in itertools.pairwise(argv) if option == "--state"]
    argv = [sys.executable, "kirosync.py", *map(str, argv)]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, **more)


# Scopes

ID = "cmd-1"
CALLS = {  # of each route, a request that is well formed
    "GET /sync": ("/sync", None),
    "POST /sync": ("/sync", {"documents": {"d": {"content": "x", "timestamp": 1}}}),
    "POST /command": ("/command", BASH),
    "GET /commands": ("/commands", None),
    "POST /command/ID/cancel": (f"/command/{ID}/cancel", {}),
    "GET /command/ID/output": (f"/command/{ID}/output", None),
    "POST /command/ID/output": (f"/command/{ID}/output?offset=0", b"x"),
    "POST /command/ID/input": (f"/command/{ID}/input", {"data": "x"}),
    "GET /command/ID": (f"/command/{ID}", None),
    "PATCH /command/ID": (f"/command/{ID}", {"status": "processing", "agent": "a"}),
    "GET /conversation/ID": ("/conversation/none", None),
    "GET /document/ID": ("/document/none", None),
    "GET /document/ID/versions": ("/document/none/versions", None),
    "GET /document/ID/diff": ("/document/none/diff", None),
    "POST /render": ("/render", {"texts": []}),
    "DELETE /KIND/ID": ("/document/none", None),
    "GET /agents": ("/agents", None),
    "PUT /agents/ID": ("/agents/a", {"kind": "agent", "types": ["execute_bash"]}),
    "PATCH /agents/ID": ("/agents/a", {}),
    "DELETE /agents/ID": ("/agents/a", None),
    "POST /api/kiro/execute": ("/api/kiro/execute", {"command": "probe"}),
    "GET /api/kiro/status": ("/api/kiro/status", None),
    "POST /api/kiro/input": ("/api/kiro/input", {"value": "x", "type": "text", "executionId": "none"}),
    "GET /metrics": ("/metrics", None),
}
MAY = {  # what the promise is, written down apart from the tables of the service
    "read": {"GET /sync", "GET /commands", "GET /command/ID", "GET /command/ID/output", "GET /agents"}
    | {"GET /api/kiro/status", "GET /metrics", "GET /conversation/ID", "GET /document/ID", "GET /document/ID/versions"}
    | {"GET /document/ID/diff", "POST /render"},
    "agent": {"GET /sync", "GET /commands", "GET /command/ID", "GET /command/ID/output", "GET /agents"}
    | {"POST /command/ID/output", "PATCH /command/ID", "PUT /agents/ID", "PATCH /agents/ID", "DELETE /agents/ID"},
}
MAY["client"] = MAY["read"] | {"POST /sync", "POST /command", "POST /command/ID/cancel", "POST /command/ID/input"}
MAY["client"] |= {"DELETE /KIND/ID", "POST /api/kiro/execute", "POST /api/kiro/input"}
MAY["ide"] = MAY["client"] | {"PATCH /agents/ID", "DELETE /agents/ID"}  # of windows; there is none here
MAY["admin"] = set(CALLS)


def test_every_route_that_is_not_public_is_called_here():
    routes = {f"{route.method} {kirosync.readable(route.path)}" for route in kirosync.ROUTES if route.scopes}
    assert routes == set(CALLS)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("scope", MAY)
def test_a_token_opens_what_its_scope_is_for_and_nothing_else(ask, store, scope, call):
    command = {"id": ID, "type": "execute_bash", "command": "true", "status": "pending", "createdAt": 1, "updatedAt": 1}
    store.change(lambda pen: pen.put("commands", ID, command))
    path, body = CALLS[call]
    before = store.revision
    answer = ask(scope, call.partition(" ")[0], path, body)
    if call in MAY[scope]:
        assert answer.status_int not in (401, 403, 500), answer.text
    else:
        assert answer.status_int == 403, answer.text
        assert f"a token of the scope {scope} may not" in answer.json["error"]
        assert scope not in answer.json["scopes"]
        assert "insufficient_scope" in answer.headers["WWW-Authenticate"]
        assert store.revision == before + (scope != "admin")  # the token itself


def test_the_token_of_a_client_cannot_claim_neither_by_patch_nor_by_sync(ask):
    identity = ask("client", "POST", "/command", BASH).json["commandId"]
    claim = {"status": "processing", "agent": "a", "lease": 30}
    assert ask("client", "PATCH", f"/command/{identity}", claim).status_int == 403
    for status in ("processing", "completed", "failed"):
        command = {**BASH, "status": status, "result": {"stdout": "forged"}}
        ask("client", "POST", "/sync", {"commands": {identity: command}})
    assert ask("client", "GET", f"/command/{identity}").json["status"] == "pending"
    assert ask("agent", "PATCH", f"/command/{identity}", claim).status_int == 200


def test_the_token_of_an_agent_cannot_submit_but_it_can_ask_a_human(ask):
    for order in (BASH, REMOTE):
        answer = ask("agent", "POST", "/command", order)
        assert (answer.status_int, answer.json["scopes"]) == (403, ["client", "ide", "admin"])
    identity = ask("agent", "POST", "/command", ASK).json["commandId"]
    assert ask("agent", "POST", f"/command/{identity}/cancel", {}).json["outcome"] == "cancelled"


def test_the_token_of_an_agent_cannot_answer_its_own_question(ask):
    identity = ask("agent", "POST", "/command", ASK).json["commandId"]
    said = {"status": "completed", "result": {"value": "yes"}}
    assert ask("agent", "PATCH", f"/command/{identity}", said).status_int == 403
    said = {"value": "yes", "type": "confirmation", "executionId": identity}
    assert ask("agent", "POST", "/api/kiro/input", said).status_int == 403
    assert ask("client", "POST", "/api/kiro/input", said).status_int == 200


def test_the_token_of_an_agent_sees_no_conversation_and_no_document(ask):
    ask("client", "POST", "/sync", {"documents": {"d": {"content": "private", "timestamp": 1}}})
    seen = ask("agent", "GET", "/sync")
    assert "private" not in seen.text
    assert seen.json.keys() & set(kirosync.KINDS) == {"commands"}
    assert ask("agent", "GET", "/sync?only=documents").status_int == 403
    assert "private" in ask("read", "GET", "/sync?only=documents").text


def test_the_token_of_an_ide_executes_what_is_for_an_ide_and_nothing_else(ask):
    bash = ask("ide", "POST", "/command", BASH).json["commandId"]
    remote = ask("ide", "POST", "/command", REMOTE).json["commandId"]
    claim = {"status": "processing", "agent": "w", "lease": 30}
    assert ask("ide", "PATCH", f"/command/{bash}", claim).status_int == 403
    assert ask("agent", "PATCH", f"/command/{remote}", claim).status_int == 403
    assert ask("ide", "PATCH", f"/command/{remote}", claim).status_int == 200
    assert ask("agent", "POST", f"/command/{remote}/output?offset=0", b"forged").status_int == 403


def test_an_agent_announces_itself_as_what_its_token_is_for(ask):
    ide, agent = {"kind": "ide", "types": ["kiro_command"]}, {"kind": "agent", "types": ["execute_bash"]}
    assert ask("agent", "PUT", "/agents/x", ide).status_int == 403
    assert ask("ide", "PUT", "/agents/x", agent).status_int == 403
    assert ask("ide", "PUT", "/agents/x", ide).status_int == 200
    for method, body in (("PUT", agent), ("PATCH", {"types": []}), ("DELETE", None)):
        assert ask("agent", method, "/agents/x", body).status_int == 403
    assert ask("read", "GET", "/sync?agent=x").status_int == 403


# Tokens


def test_a_token_is_shown_once_and_kept_as_its_hash(state):
    made = tool("token", "add", "laptop", "--scope", "ide", "--expires", "90d", "--state", state)
    secret = made.stdout.strip()
    assert re.fullmatch(r"kirosync_[\w-]{43}", secret), made
    assert secret not in made.stderr
    assert (state / "tokens.json").stat().st_mode & 0o777 == 0o600
    for file in state.rglob("*"):
        assert file.is_dir() or secret not in file.read_text()
    kept = json.loads((state / "tokens.json").read_text())["laptop"]
    assert kept["sha256"] == kirosync.digest(secret.encode())
    assert kept["expiresAt"] - kept["createdAt"] == 90 * 86_400_000


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["add", "laptop", "--scope", "read"], "there is a token 'laptop' already"),
        (["add", "master", "--scope", "read"], "there is a token 'master' already"),
        (["add", "a/b", "--scope", "read"], "is not 1 to 64 of"),
        (["add", "x", "--scope", "root"], "invalid choice"),
        (["add", "x", "--scope", "read", "--expires", "soon"], "write 90d, 12h, 30m or 45s"),
        (["revoke", "phone"], "there is no token 'phone'; those there are: laptop"),
        (["revoke", "master"], "change KIROSYNC_TOKEN, or replace the file token"),
    ],
)
def test_what_cannot_be_is_said_in_words_and_changes_nothing(state, argv, said):
    tool("token", "add", "laptop", "--scope", "ide", "--state", state)
    before = (state / "tokens.json").read_text()
    done = tool("token", *argv, "--state", state)
    assert done.returncode != 0
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert (state / "tokens.json").read_text() == before


@pytest.mark.parametrize("what", [["add", "x", "--scope", "read"], ["revoke", "x"], ["list"]])
def test_a_state_that_is_not_there_is_not_made(tmp_path, what):
    argv = [sys.executable, "kirosync.py", "token", *what, "--state", tmp_path / "slip"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "there is no directory" in done.stderr
    assert not (tmp_path / "slip").exists()


def test_a_running_service_knows_of_a_new_token_and_of_a_revoked_one_at_once(server, state):
    secret = tool("token", "add", "phone", "--scope", "client", "--state", state).stdout.strip()
    server.session.headers["Authorization"] = f"Bearer {secret}"
    assert server.ask("GET", "/commands").status_code == 200
    assert tool("token", "revoke", "phone", "--state", state).returncode == 0
    answer = server.ask("GET", "/commands")
    assert (answer.status_code, answer.json()["error"]) == (401, "Unauthorized")


def test_who_waits_is_turned_away_when_the_token_is_revoked(server, state):
    secret = tool("token", "add", "phone", "--scope", "read", "--state", state).stdout.strip()
    waiting = {"Authorization": f"Bearer {secret}"}
    cursor = server.ask("GET", "/sync", headers=waiting).json()["cursor"]
    with ThreadPoolExecutor() as threads:
        held = threads.submit(server.ask, "GET", f"/sync?since={cursor}&wait=30&only=documents", headers=waiting)
        until(lambda: "requests_held 1" in server.ask("GET", "/metrics").text)
        tool("token", "revoke", "phone", "--state", state)
        answer = held.result(10)
    assert (answer.status_code, answer.json()["error"]) == (401, "Unauthorized")


def test_a_token_is_valid_up_to_its_end(ask, store, service):
    now = time.time_ns() // 1_000_000
    add(store, "read", "read", "r" * 40, expiresAt=now + 60_000)
    secret = {"Authorization": f"Bearer {'r' * 40}"}
    assert ask("admin", "GET", "/sync", **secret).status_int == 200
    store.change(lambda pen: pen.entitle("read", {**kirosync.tokens_in(store.directory)["read"], "expiresAt": now - 1}))
    answer = ask("admin", "GET", "/sync", **secret)
    assert answer.status_int == 401
    assert re.match(r"the token 'read' expired on \d{4}-", answer.json["message"])


def test_the_last_use_of_a_token_is_told(server, state):
    secret = tool("token", "add", "phone", "--scope", "read", "--state", state).stdout.strip()
    assert "never used" in tool("token", "list", "--state", state).stdout
    before = time.time() * 1000
    server.session.headers["Authorization"] = f"Bearer {secret}"
    assert server.ask("GET", "/commands").status_code == 200
    assert server.end() == 0
    listed = tool("token", "list", "--json", "--state", state).stdout
    assert json.loads(listed)["phone"]["lastUsed"]["from"] == "127.0.0.1"
    assert before - 1 <= json.loads(listed)["phone"]["lastUsed"]["at"] <= time.time() * 1000
    assert secret not in listed
    assert json.loads(listed)["phone"].keys() == {"scope", "createdAt", "lastUsed"}
    assert "last used 20" in tool("token", "list", "--state", state).stdout


def test_a_token_in_the_settings_is_one_of_an_admin(ask, store):
    assert kirosync.tokens_in(store.directory) == {}
    assert ask("admin", "POST", "/command", BASH).status_int == 200


@pytest.mark.parametrize("spoiled", ["", "[]", '{"a": 1}', '{"a": {"scope": "root", "sha256": "x", "createdAt": 1}}'])
def test_a_spoiled_file_of_tokens_lets_nobody_in_who_was_not_meant(ask, store, spoiled, caplog):
    assert ask("read", "GET", "/sync").status_int == 200
    (store.directory / "tokens.json").write_text(spoiled)
    assert ask("read", "GET", "/sync").status_int == 401
    assert ask("admin", "GET", "/sync").status_int == 200
    assert "tokens.json" in caplog.text


def test_one_spoiled_token_does_not_keep_the_others_out(ask, store):
    assert ask("read", "GET", "/sync").status_int == 200
    said = json.loads((store.directory / "tokens.json").read_text())
    (store.directory / "tokens.json").write_text(json.dumps({"bad": {"scope": "admin"}, **said}))
    assert ask("read", "GET", "/sync").status_int == 200


def test_a_file_of_tokens_that_cannot_be_read_is_not_written_over(state):
    tool("token", "add", "laptop", "--scope", "ide", "--state", state)
    spoiled = (state / "tokens.json").read_text().replace("}", "", 1)
    (state / "tokens.json").write_text(spoiled)
    for argv in (["add", "phone", "--scope", "read"], ["revoke", "laptop"]):
        refused = tool("token", *argv, "--state", state)
        assert refused.returncode == 1
        assert "Traceback" not in refused.stderr
    assert (state / "tokens.json").read_text() == spoiled


def test_a_spoiled_token_stays_in_the_file_when_another_is_made(state):
    tool("token", "add", "laptop", "--scope", "ide", "--state", state)
    said = json.loads((state / "tokens.json").read_text())
    (state / "tokens.json").write_text(json.dumps({**said, "typo": {**said["laptop"], "scope": "reed"}}))
    assert tool("token", "add", "phone", "--scope", "read", "--state", state).returncode == 0
    assert json.loads((state / "tokens.json").read_text()).keys() == {"laptop", "typo", "phone"}


def killed(files):
    if files:
        raise OSError(5, "killed")


def test_a_revocation_that_a_crash_interrupts_is_completed_by_who_comes_next(store, state, monkeypatch):
    secret = add(store, "phone", "client").encode()
    with monkeypatch.context() as crash:
        crash.setattr(kirosync, "put_in_place", killed)
        with pytest.raises(kirosync.Broken):
            store.change(lambda pen: pen.entitle("phone", None))
    keyring = kirosync.Keyring(state, TOKEN)
    assert keyring.find(secret)
    kirosync.Store(state, kinds=("commands",)).close()
    assert keyring.find(secret) is None
    assert not [*state.glob(".tokens*")]


def test_a_new_token_of_an_old_name_was_never_used(service, store):
    keyring = service.keyring
    keyring.saw(keyring.find(add(store, "phone", "read").encode()), "192.0.2.1", 5)
    service.begin(store)
    service.save_use()
    assert kirosync.used_in(store.directory)["phone"]["from"] == "192.0.2.1"
    store.change(lambda pen: pen.entitle("phone", None))
    service.save_use()
    assert kirosync.used_in(store.directory) == {}


def test_a_token_is_compared_with_all_whichever_it_is(monkeypatch):
    compared = []
    monkeypatch.setattr(kirosync.hmac, "compare_digest", lambda a, b: compared.append(a) or a == b)
    tokens = [kirosync.Token(name, "read", kirosync.digest(name.encode())) for name in "abc"]
    assert kirosync.matching(tokens, b"a").name == "a"
    assert kirosync.matching(tokens, b"x") is None
    assert len(compared) == 6


def test_where_there_are_tokens_none_is_made_besides(state, tmp_path, start):
    tool("token", "add", "laptop", "--scope", "ide", "--state", state)
    service = start(Process, "kirosync.py", "serve", "--port", "0", "--state", state, log=tmp_path / "log")
    until(lambda: " on http" in (tmp_path / "log").read_text(), 20)
    assert service.popen.poll() is None
    assert not (state / "token").exists()


# Who has no token


def knock(app, secret, sender="192.0.2.1", path="/commands"):
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    return app.get(path, headers=headers, extra_environ={"REMOTE_ADDR": sender}, expect_errors=True)


@pytest.fixture
def app(service):
    return webtest.TestApp(service.app)


def test_who_tries_tokens_is_slowed_and_others_are_not(app):
    answers = [knock(app, f"guess-{number}") for number in range(kirosync.TRIES + 1)]
    assert [answer.status_int for answer in answers] == [401] * kirosync.TRIES + [429]
    assert 1 <= int(answers[-1].headers["Retry-After"]) <= 6
    assert answers[-1].json["retryAfter"] == int(answers[-1].headers["Retry-After"])
    assert knock(app, "guess", "192.0.2.2").status_int == 401


def test_an_attacker_does_not_lock_out_the_rightful(app, store):
    strong = add(store, "phone", "client")
    assert knock(app, TOKEN).status_int == 200
    for number in range(3 * kirosync.TRIES):
        knock(app, f"guess-{number}")
    assert knock(app, strong).status_int == 200  # it cannot be guessed
    assert knock(app, TOKEN).status_int == 200  # it came from there before
    assert knock(app, TOKEN, "192.0.2.2").status_int == 200


def test_a_short_token_is_not_found_by_trying(app):
    for number in range(kirosync.TRIES):
        knock(app, f"guess-{number}")
    assert knock(app, TOKEN).status_int == 429
    answers = [knock(app, f"guess-{number}", path="/health") for number in range(3)]
    assert [answer.status_int for answer in answers] == [429] * 3  # nor where everyone may ask


def test_one_network_of_ipv6_is_one_address(app):
    for number in range(kirosync.TRIES):
        knock(app, "guess", f"2001:db8::{number:x}")
    assert knock(app, "guess", "2001:db8::ffff").status_int == 429
    assert knock(app, "guess", "2001:db8:0:1::1").status_int == 401


def test_what_is_public_has_its_limit_too(app):
    answers = {knock(app, "", path="/health").status_int for _ in range(kirosync.VISITS + 5)}
    assert answers == {200, 429}
    assert knock(app, TOKEN, path="/health").status_int == 200


def test_only_so_many_addresses_are_remembered(service):
    for number in range(kirosync.METERED + 50):
        service.gate.tries.take(f"a-{number}", 1)
        service.gate.recognize(TOKEN.encode(), f"a-{number}")
    assert len(service.gate.tries.levels) == kirosync.METERED
    assert len(service.gate.came) == kirosync.METERED


def test_the_address_is_the_one_that_a_trusted_proxy_tells(state, tmp_path, start):
    behind = start(Server, state, tmp_path / "log", "--trusted-proxy", "127.0.0.1")
    for _ in range(kirosync.TRIES + 1):
        last = behind.ask("GET", "/sync", headers={"Authorization": "Bearer x", "X-Forwarded-For": "203.0.113.9"})
    assert last.status_code == 429
    other = behind.ask("GET", "/sync", headers={"Authorization": "Bearer x", "X-Forwarded-For": "203.0.113.8"})
    assert other.status_code == 401


def test_who_is_no_trusted_proxy_cannot_give_itself_another_address(server):
    for number in range(kirosync.TRIES + 1):
        forged = {"Authorization": "Bearer x", "X-Forwarded-For": f"203.0.113.{number}"}
        last = server.ask("GET", "/sync", headers=forged)
    assert last.status_code == 429


# How much


def small(monkeypatch, **changed):
    quota = kirosync.QUOTAS["client"]._replace(**changed)
    monkeypatch.setitem(kirosync.QUOTAS, "client", quota)


def test_a_token_that_asks_too_much_must_wait_and_others_need_not(monkeypatch, store):
    small(monkeypatch, requests=1)
    app = webtest.TestApp(kirosync.Service(store, kirosync.Keyring(store.directory, TOKEN)).app)
    busy, other = add(store, "busy", "client"), add(store, "other", "client")
    answers = [knock(app, busy) for _ in range(kirosync.BURST_S + 1)]
    assert [answer.status_int for answer in answers] == [200] * kirosync.BURST_S + [429]
    assert answers[-1].json["error"].startswith("the token 'busy' has sent too many requests; try again in 1 s")
    assert knock(app, other).status_int == 200


def test_a_token_that_moves_too_many_bytes_must_wait(monkeypatch, store):
    small(monkeypatch, bytes=100)
    app = webtest.TestApp(kirosync.Service(store, kirosync.Keyring(store.directory, TOKEN)).app)
    secret = add(store, "busy", "client")
    large = {"documents": {"d": {"content": "x" * 9000, "timestamp": 1}}}
    headers = {"Authorization": f"Bearer {secret}"}
    assert app.post_json("/sync", large, headers=headers).status_int == 200
    answer = app.post_json("/sync", large, headers=headers, expect_errors=True)
    assert answer.status_int == 429
    assert int(answer.headers["Retry-After"]) > 60


def test_a_token_has_so_many_commands_open_and_no_more(monkeypatch, ask):
    small(monkeypatch, open=2)
    first = ask("client", "POST", "/command", BASH).json["commandId"]
    assert ask("client", "POST", "/command", BASH).status_int == 200
    answer = ask("client", "POST", "/command", BASH)
    assert answer.status_int == 429
    assert answer.json["error"] == "the token 'client' has 2 commands open; with 1 more it would be above 2"
    pushed = {"commands": {"new": {**BASH, "status": "pending"}}}
    assert ask("client", "POST", "/sync", pushed).status_int == 429
    assert ask("ide", "POST", "/command", BASH).status_int == 200
    ask("client", "POST", f"/command/{first}/cancel", {})
    assert ask("client", "POST", "/command", BASH).status_int == 200


def test_what_is_known_already_does_not_count_as_one_more(monkeypatch, ask):
    small(monkeypatch, open=1)
    pushed = {"commands": {"new": {**BASH, "status": "pending"}}}
    key = {"Idempotency-Key": "k"}
    assert ask("client", "POST", "/sync", pushed).status_int == 200
    assert ask("client", "POST", "/sync", pushed).status_int == 200
    ask("client", "POST", "/command/new/cancel", {})
    first = ask("client", "POST", "/command", BASH, **key)
    assert ask("client", "POST", "/command", BASH, **key).json == first.json


def test_a_token_has_so_many_requests_held_and_the_next_is_answered_at_once(monkeypatch, service, store):
    small(monkeypatch, held=2)
    mine, other = (kirosync.Token(name, "client") for name in ("mine", "other"))
    place = service.gate.place
    with place(mine) as one, place(mine) as two, place(mine) as three, place(other) as four, place(ADMIN) as five:
        assert (one, two, three, four, five) == (True, True, False, True, True)
    assert service.gate.held.total() == 0


def test_a_command_says_who_queued_it_whatever_is_sent(ask):
    identity = ask("client", "POST", "/command", BASH).json["commandId"]
    assert ask("read", "GET", f"/command/{identity}").json["queuedBy"] == "client"
    ask("ide", "POST", "/sync", {"commands": {"new": {**BASH, "status": "pending", "queuedBy": "client"}}})
    assert ask("read", "GET", "/command/new").json["queuedBy"] == "ide"


def test_a_push_has_so_many_records_and_no_more(ask, monkeypatch):
    monkeypatch.setattr(kirosync, "PUSHED", 2)
    documents = {f"d{number}": {"content": "x", "timestamp": 1} for number in range(3)}
    answer = ask("client", "POST", "/sync", {"documents": documents})
    assert answer.status_int == 413
    assert answer.json["error"] == "3 records were sent, 2 are possible at once; send them in parts"
    del documents["d0"]
    assert ask("client", "POST", "/sync", {"documents": documents}).status_int == 200


def test_each_token_has_idempotency_keys_of_its_own(ask):
    key = {"Idempotency-Key": "k"}
    mine = ask("client", "POST", "/command", BASH, **key).json["commandId"]
    theirs = ask("ide", "POST", "/command", BASH, **key).json["commandId"]
    assert mine != theirs
    assert ask("agent", "POST", "/command", ASK, **key).status_int == 200
    assert ask("client", "POST", "/command", BASH, **key).json["commandId"] == mine


def test_nobody_but_an_agent_makes_an_agent_be_seen(ask, clock):
    ask("ide", "PUT", "/agents/window", {"kind": "ide", "types": ["kiro_command"]})
    clock.now += 16_000
    for scope in ("client", "agent"):
        identity = ask("client", "POST", "/command", ASK if scope == "client" else BASH).json["commandId"]
        status = "completed" if scope == "client" else "processing"
        ask(scope, "PATCH", f"/command/{identity}", {"status": status, "agent": "window", "result": {"value": "yes"}})
        assert ask("read", "GET", "/agents").json["agents"]["window"]["present"] is False


def test_what_a_proxy_was_told_is_an_address_or_unknown(state, tmp_path, start):
    behind = start(Server, state, tmp_path / "log", "--trusted-proxy", "127.0.0.1")
    for told in ("x@10.0.0.1", "a b", "10.0.0.1"):
        behind.ask("POST", "/command", json=BASH, headers={"X-Forwarded-For": told})
    log = state / "log" / "audit.jsonl"
    lines = until(lambda: log.exists() and len(found := log.read_text().splitlines()) == 3 and found)
    said = [(line["by"], line["from"]) for line in map(json.loads, lines)]
    assert said == [("master", "unknown"), ("master", "unknown"), ("master", "10.0.0.1")]
