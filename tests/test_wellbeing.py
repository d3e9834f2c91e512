"""What the service says of how it is, and whom it tells: health, metrics, notifications; one service for one state."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import webtest
from conftest import ROOT, TOKEN, Process, Server, until

import kirosync

BASH = {"type": "execute_bash", "command": "true"}
AGENT = {"kind": "agent", "types": ["execute_bash"]}


def health(client):
    answer = client.get("/health", expect_errors=True)
    assert (answer.status_int == 200) == (answer.json["status"] == "healthy")
    return answer.json.get("problem", "")


# Health


def test_nobody_takes_commands_when_one_has_waited_for_a_minute_and_no_agent_for_it_is_there(client, clock):
    assert health(client) == ""
    client.post_json("/command", {**BASH, "target": "builder"})
    clock.now += 61_000
    assert health(client) == "nobody takes commands: 1 wait for agents that are not there"
    assert client.get("/health", status=503).json["ready"] is True
    client.put_json("/agents/other", AGENT)
    client.put_json("/agents/builder", {"kind": "agent", "types": ["read_file"]})
    assert "nobody takes commands" in health(client)
    client.put_json("/agents/builder", AGENT)
    assert health(client) == ""
    clock.now += 16_000
    assert "nobody takes commands" in health(client)


def test_a_question_that_waits_for_a_human_is_no_illness(client, clock):
    client.post_json("/command", {"type": "user_input", "prompt": "?"})
    clock.now += 3_600_000
    assert health(client) == ""


def test_it_is_unhealthy_before_the_disk_is_full(client, monkeypatch):
    monkeypatch.setattr(kirosync, "LOW_BYTES", 1 << 60)
    assert health(client).startswith("the disk is nearly full: ")
    assert client.get("/health", status=503).json["ready"] is False
    monkeypatch.undo()
    assert health(client) == ""
    monkeypatch.setattr(kirosync, "LOW_FILES", 1 << 60)
    assert health(client).startswith("the disk is nearly full: ")


def test_it_is_unhealthy_while_the_state_cannot_be_written_and_notices_by_itself_when_it_can(store, monkeypatch):
    service = kirosync.Service(store, kirosync.Keyring(store.directory, TOKEN))
    client = webtest.TestApp(service.app)
    client.authorization = ("Bearer", TOKEN)
    write = kirosync.set_aside

    def broken(files):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(kirosync, "set_aside", broken)
    monkeypatch.setattr(kirosync, "SWEEP_S", 0.01)
    client.post_json("/command", BASH, status=500)
    sweeping = threading.Thread(target=service.sweep)
    sweeping.start()
    try:
        time.sleep(0.2)
        assert health(client) == "the state directory cannot be written (Input/output error): nothing was changed"
        monkeypatch.setattr(kirosync, "set_aside", write)
        until(lambda: health(client) == "")
    finally:
        store.release()
        sweeping.join()


# Metrics


def figures(text):
    return dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))


def test_metrics_are_what_prometheus_reads(client, clock):
    client.post_json("/command", BASH)
    client.put_json("/agents/a", AGENT)
    client.get("/nowhere", status=404)
    clock.now += 5000
    answer = client.get("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    found = figures(answer.text)
    assert found['kirosync_commands_open{status="pending"}'] == "1"
    assert found["kirosync_oldest_pending_seconds"] == "5.0"
    assert found['kirosync_agents{kind="agent",present="true"}'] == "1"
    assert found['kirosync_requests_total{method="POST",path="/command",status="200"}'] == "1"
    assert found['kirosync_requests_total{method="",path="",status="404"}'] == "1"
    assert found["kirosync_healthy"] == "1"
    assert int(found['kirosync_bytes{kind="commands"}']) > 100
    for line in answer.text.splitlines():
        assert line.startswith("# TYPE kirosync_") or float(line.rsplit(" ", 1)[1]) >= 0


# One service


def test_a_second_service_of_one_state_refuses_to_start_and_says_where_the_first_is(server, state, tmp_path, start):
    second = start(Process, "kirosync.py", "serve", "--port", "0", "--state", state, log=tmp_path / "second")
    assert second.popen.wait(20) == 1
    said = (tmp_path / "second").read_text().splitlines()[-1]
    assert f"is served already, by process {server.popen.pid} http://127.0.0.1:" in said
    assert server.ask("POST", "/command", json=BASH).status_code == 200


def test_after_a_crash_of_the_first_another_starts_at_once(state, tmp_path, start):
    first = start(Server, state, tmp_path / "log")
    identity = first.ask("POST", "/command", json=BASH).json()["commandId"]
    first.end(9)
    second = start(Server, state, tmp_path / "log2")
    assert second.ask("GET", f"/command/{identity}").json()["status"] == "pending"


# A disk that is full, while everything runs


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 MiB, which takes root to mount."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=100m", "none", path]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting takes root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_disk_that_fills_up_while_everything_runs_costs_nothing_acknowledged(small_disk, tmp_path, start):
    state = small_disk / "state"
    server = start(Server, state, tmp_path / "log")
    agent = start(Process, "agent.py", "--state", state, "--name", "a", log=tmp_path / "agent")
    until(lambda: "INFO agent" in (tmp_path / "agent").read_text())
    acknowledged, refused, stop = [], [], threading.Event()

    def write(worker):
        number = 0
        while not stop.is_set():
            name, number = f"{worker}-{number}", number + 1
            push = {"documents": {name: {"content": "x" * 1000, "timestamp": 1}}}
            answer = server.ask("POST", "/sync?since=", json=push)
            (acknowledged if answer.status_code == 200 else refused).append((name, answer.status_code))
            time.sleep(0.01)

    writers = [threading.Thread(target=write, args=(worker,)) for worker in range(4)]
    for writer in writers:
        writer.start()
    ran = [
        server.ask("POST", "/command", json={**BASH, "command": "sleep 1; yes | head -c 100000"}).json()["commandId"]
    ]
    until(lambda: len(acknowledged) > 20)
    free = os.statvfs(small_disk)
    with open(small_disk / "ballast", "wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, (free.f_bavail - 40) * free.f_frsize)
    until(lambda: len(refused) > 20, 30)
    assert {status for _, status in refused} == {507}
    sick = server.ask("GET", "/health")
    assert (sick.status_code, sick.json()["status"]) == (503, "unhealthy")
    assert "full" in sick.json()["problem"]
    assert server.ask("GET", "/sync").status_code == 200
    (small_disk / "ballast").unlink()
    until(lambda: server.ask("GET", "/health").json()["status"] == "healthy", 10)
    stop.set()
    for writer in writers:
        writer.join()
    documents = server.ask("GET", "/sync").json()["documents"]
    assert {name for name, _ in acknowledged} <= documents.keys()
    ran.append(server.run(**BASH)["commandId"])
    for identity in ran:
        assert server.ask("GET", f"/command/{identity}?wait=50").json()["status"] in ("completed", "failed")
    assert server.ask("GET", f"/command/{ran[1]}").json()["outcome"] == "ok"
    assert agent.end() == 0
    assert server.end() == 0
    verified = [sys.executable, "kirosync.py", "audit", "verify", "--state", state]
    assert subprocess.run(verified, cwd=ROOT, check=False).returncode == 0
    again = kirosync.Store(state)
    assert {name for name, _ in acknowledged} <= again.all("documents").keys()
    again.close()


# Notifications


class Receiver(http.server.BaseHTTPRequestHandler):
    def receive(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        server.got.append((self.path, dict(self.headers), body))
        status = server.answers.pop(0) if server.answers else 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"http://127.0.0.1:{server.server_port}/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_POST = receive

    def log_message(self, *_):
        pass


@pytest.fixture
def receiver():
    """A server that is told things: what it got, and with which status it answers next."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    server.got, server.answers, server.url = [], [], f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def service(receiver, state, tmp_path, start):
    """Start a service and an agent for it, which tell the receiver what the arguments say."""

    def service(*argv, path="/hook", scheme="", agent=True):
        environment = {"KIROSYNC_NOTIFY": f"{scheme}{receiver.url}{path}", "KIROSYNC_NOTIFY_TOKEN": "notify-token"}
        server = start(Server, state, tmp_path / "log", *argv, environment=environment)
        if agent:
            start(Process, "agent.py", "--state", state, "--name", "a", log=tmp_path / "agent")
        return server

    return service


def test_a_command_that_fails_is_told_and_one_that_does_not_is_not(service, receiver):
    server = service()
    assert server.run(**BASH)["outcome"] == "ok"
    failed = server.run(type="execute_bash", command="exit 3")
    [(path, headers, body)] = until(lambda: receiver.got)
    assert (path, headers["Authorization"]) == ("/hook", "Bearer notify-token")
    assert body["commandId"] == failed["commandId"]
    assert (body["event"], body["outcome"], body["error"]) == ("failed", "exit", "exit code 3")
    assert "command" not in body


def test_a_question_and_a_long_command_are_told(service, receiver):
    server = service("--notify-after", "0.2")
    asked = server.ask("POST", "/command", json={"type": "user_input", "prompt": "Red or blue?"}).json()["commandId"]
    long = server.run(type="execute_bash", command="sleep 0.5")["commandId"]
    cancelled = server.ask("POST", "/command", json={**BASH, "target": "nobody"}).json()["commandId"]
    server.ask("POST", f"/command/{cancelled}/cancel", json={})
    until(lambda: len(receiver.got) == 2)
    time.sleep(2.5)
    assert {(body["event"], body["commandId"]) for _, _, body in receiver.got} == {("asked", asked), ("long", long)}
    assert next(body for _, _, body in receiver.got if body["event"] == "asked")["prompt"] == "Red or blue?"


def test_of_what_a_policy_asks_neither_command_nor_environment_is_told(service, receiver, tmp_path, start, state):
    server = service(agent=False)
    (tmp_path / "policy.toml").write_text("[[ask]]\ncommand = 'rm '\nreason = 'it removes'\n")
    policy = ["--policy", tmp_path / "policy.toml"]
    start(Process, "agent.py", "--state", state, "--name", "a", *policy, log=tmp_path / "agent")
    order = {"type": "execute_bash", "command": "rm -f in-the-command", "env": {"X": "in-the-environment"}}
    server.ask("POST", "/command", json=order)
    [(_, _, body)] = until(lambda: receiver.got)
    assert body["prompt"] == "May a run this? It asks because: it removes"
    assert "in-the" not in json.dumps(body)


def test_ntfy_gets_a_title_and_a_text(service, receiver):
    server = service(path="/my-topic", scheme="ntfy+")
    server.ask("POST", "/command", json={"type": "user_input", "prompt": "Größe?"})
    [(path, _, body)] = until(lambda: receiver.got)
    assert path == "/"
    assert body == {"topic": "my-topic", "title": "kirosync asks", "message": "Größe?", "priority": 4}


def test_what_did_not_arrive_is_sent_again_and_what_was_refused_is_not(service, receiver):
    receiver.answers = [500, 429, 200, 404, 302]
    server = service()
    for number in range(3):
        server.run(type="execute_bash", command=f"exit {number + 1}")
    until(lambda: len(receiver.got) == 5, 30)
    time.sleep(1.5)
    errors = [body["error"] for _, _, body in receiver.got]
    assert errors == ["exit code 1"] * 3 + ["exit code 2", "exit code 3"]
    assert {path for path, _, _ in receiver.got} == {"/hook"}
    found = figures(server.ask("GET", "/metrics").text)
    assert found['kirosync_notifications_total{result="sent"}'] == "1"
    assert found['kirosync_notifications_total{result="failed"}'] == "2"
    assert "/hook" not in server.log.read_text()
    assert "127.0.0.1 was not notified of cmd-" in server.log.read_text()


def test_who_does_not_answer_keeps_nobody_waiting_and_only_so_much_is_kept(store, clock, receiver):
    notifier = kirosync.Notifier(store, receiver.url, {"failed"}, 60)
    failed = {"id": "c", **BASH, "status": "failed", "outcome": "exit", "createdAt": 1, "updatedAt": 1}
    store.change(lambda pen: pen.put("commands", "c", failed))
    line = kirosync.Line(1, 1, 1, "commands", "c", "put", status="failed")
    began = time.monotonic()
    notifier.consider([line] * (kirosync.NOTICES + 7))
    assert time.monotonic() - began < 1
    assert (notifier.waiting.qsize(), notifier.counts["dropped"]) == (kirosync.NOTICES, 7)


@pytest.fixture
def accounting(store, receiver):
    """Begin a service that accounts for what changes, and notifies."""
    audits = []

    def accounting():
        service = kirosync.Service(None, kirosync.Keyring(store.directory, TOKEN))
        audits.append(kirosync.Audit(store, store.directory / "log"))
        service.begin(store, audits[-1], kirosync.Notifier(store, receiver.url, {"failed"}, 60))
        return service

    yield accounting
    for audit in audits:
        audit.close()


def fail(store, name):
    failed = {"id": name, **BASH, "status": "failed", "outcome": "exit", "createdAt": 1, "updatedAt": 1}
    store.change(lambda pen: pen.put("commands", name, failed))


def test_what_failed_before_the_first_account_is_no_news_and_what_failed_while_nothing_ran_is(store, accounting):
    fail(store, "old")
    service = accounting()
    service.account()
    assert service.notifier.waiting.qsize() == 0
    fail(store, "meanwhile")
    service = accounting()
    service.account()
    assert service.notifier.waiting.get_nowait()["commandId"] == "meanwhile"


def test_a_human_is_notified_once_also_while_the_audit_log_cannot_be_written(store, accounting, monkeypatch):
    service = accounting()
    service.account()
    fail(store, "a")
    with monkeypatch.context() as full:
        full.setattr(service.audit, "append", lambda text: (_ for _ in ()).throw(OSError(28, "No space left")))
        service.account()
        service.account()
    service.account()
    assert service.notifier.waiting.qsize() == 1
    assert service.audit.known.seq == 1


@pytest.mark.parametrize("setting", [["--notify", "ftp://x"], ["--notify", "ntfy+https://x"], ["--notify-on", "all"]])
def test_a_setting_that_cannot_be_is_said(setting, state):
    argv = [sys.executable, "kirosync.py", "serve", "--state", state, *setting]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert f"argument {setting[0]}" in done.stderr


def test_a_notify_token_reaches_no_log(store, receiver, caplog, monkeypatch):
    monkeypatch.setattr(kirosync, "NOTIFY_PAUSES_S", (0.0,))
    notice = {"event": "failed", "commandId": "c", "type": "execute_bash"}
    assert kirosync.Notifier(store, receiver.url, {"failed"}, 60, "from-a-file\r\n").insist(notice)
    assert receiver.got[0][1]["Authorization"] == "Bearer from-a-file"
    assert not kirosync.Notifier(store, receiver.url, {"failed"}, 60, "in\rthe-middle").insist(notice)
    assert "the-middle" not in caplog.text
    assert "127.0.0.1 was not notified of c: ValueError" in caplog.text


def test_the_address_to_notify_is_not_shown_by_help():
    environment = {**os.environ, "KIROSYNC_NOTIFY": "https://hooks.example.org/secret-part"}
    argv = [sys.executable, "kirosync.py", "serve", "--help"]
    shown = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert "--notify " in shown
    assert "secret-part" not in shown
