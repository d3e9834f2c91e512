"""/api/kiro and /agents, as an editor, a human and a caller of the seed's document meet them.

A scripted IDE over HTTP stands in for the editor here; ide/tests has a real one.
"""

import http.client
import json
import re
import shutil
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest
import requests
from conftest import TOKEN, Process, Server, until

import kirosync

SEED = Path(__file__).parent / "seed" / "execute.ts"
ISO = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
HEADERS = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
STREAM = {"command": "workbench.action.showCommands"}


class Ide:
    """A window of an editor, scripted: announces itself, claims what is for it, does what *script* says, reports."""

    def __init__(self, url, name="window", script=None, **said):
        self.url, self.name, self.script = url, name, script or {}
        self.said = {
            "kind": "ide",
            "types": ["kiro_command"],
            "version": "Code 1.99.0",
            "availableCommands": ["b", "a"],
        }
        self.said |= said
        self.executed, self.cancelled, self.gone = [], [], threading.Event()
        self.release = threading.Event()  # of what "slow" executes
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.headers.update(HEADERS)
        self.announce()
        self.thread = threading.Thread(target=self.work)
        self.thread.start()

    def ask(self, method, path, **more):
        return self.session.request(method, self.url + path, timeout=30, **more)

    def announce(self, **said):
        self.said |= said
        assert self.ask("PUT", f"/agents/{quote(self.name, safe='')}", json=self.said).status_code == 200

    def work(self):
        query, cursor = f"only=commands&status=pending,processing&agent={self.name}&wait=1", ""
        while not self.gone.is_set():
            asked = time.monotonic()
            said = self.ask("GET", f"/sync?{query}&since={cursor}").json()
            if not said["commands"] and time.monotonic() - asked < 0.5:
                time.sleep(0.05)  # too many wait, or it was about something else
            cursor = said["cursor"]
            for identity, command in said["commands"].items():
                if command["status"] == "pending" and command.get("target", self.name) == self.name:
                    self.begin(identity, command)
                elif command.get("cancelRequested"):
                    self.cancelled.append(identity)
                    self.report(identity, status="failed", outcome="cancelled", error="cancelled on request")

    def begin(self, identity, command):
        if command["type"] == "kiro_command":
            self.report(identity, status="processing", agent=self.name, lease=2)
            threading.Thread(target=self.execute, args=(identity, command)).start()

    def execute(self, identity, command):
        self.executed.append(command)
        if command["command"] == "slow":
            while not self.release.wait(0.5) and not self.gone.is_set() and identity not in self.cancelled:
                self.report(identity, status="processing", agent=self.name, lease=2)
        if not self.gone.is_set() and identity not in self.cancelled:
            self.report(identity, agent=self.name, **self.script.get(command["command"], ended("")))

    def report(self, identity, **patch):
        return requests.patch(f"{self.url}/command/{identity}", headers=HEADERS, json=patch, timeout=30)

    def die(self):
        """Stop, as a crash does: without a word."""
        self.gone.set()
        self.thread.join()
        self.session.close()


def ended(output):
    return {"status": "completed", "result": {"output": output}}


def failed(error, outcome="error"):
    return {"status": "failed", "outcome": outcome, "error": error}


SCRIPT = {
    "object": ended('{"answer":42}'),
    "value": {"status": "completed", "result": {"output": {"answer": 42}}},
    "throws": failed("it does not want to"),
    "unknown": failed("Command not found"),
    "timeout": failed("it took too long", "timeout"),
}


@pytest.fixture
def ide(server):
    ide = Ide(server.url, script=SCRIPT)
    yield ide
    ide.release.set()
    ide.die()


@pytest.fixture
def impatient(state, tmp_path, start):
    """A service that gives an execution a second and a half."""
    return start(Server, state, tmp_path / "log", "--execute-timeout", "1.5")


def execute(server, command, headers=None, **more):
    return server.ask("POST", "/api/kiro/execute", json={"command": command, **more}, headers=headers)


def in_background(act):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(act()))
    thread.start()

    def result():
        thread.join(60)
        return answers[0]

    return result


def status_of(server):
    return server.ask("GET", "/api/kiro/status").json()


def busy(server):
    return until(lambda: status_of(server) if status_of(server)["status"] == "busy" else None)


def ask_human(server, **more):
    answer = server.ask("POST", "/command", json={"type": "user_input", "prompt": "Well?", **more})
    assert answer.status_code == 200, answer.text
    return answer.json()["commandId"]


def answer(server, value, kind, identity):
    return server.ask("POST", "/api/kiro/input", json={"value": value, "type": kind, "executionId": identity})


def command(server, identity):
    return server.ask("GET", f"/command/{identity}").json()


# Executing


def test_success_is_the_seeds_body_and_the_id_of_the_command(server, ide):
    said = execute(server, "object", args=["file:///a b.txt", '{"x": 1}'])
    assert said.status_code == 200
    body = said.json()
    assert body.keys() == {"success", "output", "executionTimeMs", "executionId"}
    assert (body["success"], body["output"]) == (True, '{"answer":42}')
    assert isinstance(body["executionTimeMs"], int)
    kept = command(server, body["executionId"])
    assert (kept["type"], kept["args"], kept["target"]) == ("kiro_command", ["file:///a b.txt", '{"x": 1}'], "window")
    assert ide.executed[0]["args"] == ["file:///a b.txt", '{"x": 1}']


def test_output_is_always_a_text(server, ide):
    assert execute(server, "nothing").json()["output"] == ""
    assert execute(server, "value").json()["output"] == '{"answer":42}'


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("throws", "Command 'throws' failed: it does not want to"),
        ("unknown", "Command 'unknown' failed: Command not found"),
    ],
)
def test_a_command_that_fails_is_422_with_the_seeds_body(server, ide, name, error):
    said = execute(server, name)
    body = said.json()
    assert (said.status_code, said.reason) == (422, "Unprocessable Entity")
    assert body.keys() == {"success", "output", "error", "executionTimeMs", "executionId"}
    assert (body["success"], body["output"], body["error"]) == (False, "", error)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{}", "Command is required and must be a string"),
        (b'{"command": ""}', "Command is required and must be a string"),
        (b'{"command": 5}', "Command is required and must be a string"),
        (b'{"command": "c", "args": "x"}', "Args must be an array of strings"),
        (b'{"command": "c", "args": [1]}', "Args must be an array of strings"),
        (b'{"command": "c", "workspacePath": []}', "WorkspacePath must be a string, the path of a folder"),
        (b"[]", "the body is no JSON object: expected object, got array"),
        (b"{", "the body is no JSON object: not JSON: it ends too early"),
        (b"", "the body is empty; a JSON object belongs there"),
    ],
)
def test_a_malformed_request_is_400_in_the_seeds_words(server, body, message):
    said = server.ask("POST", "/api/kiro/execute", data=body, headers={"Content-Type": "application/json"})
    assert said.status_code == 400
    told = said.json()
    assert (told["code"], told["message"], told["recoverable"]) == ("VALIDATION_FAILED", message, False)
    assert re.fullmatch(ISO, told["timestamp"])


def test_without_an_ide_it_is_503_not_running_and_nothing_is_queued(server):
    said = execute(server, "object")
    body = said.json()
    assert said.status_code == 503
    assert body.keys() == {"code", "message", "recoverable", "timestamp", "reason"}
    assert (body["code"], body["message"]) == ("KIRO_UNAVAILABLE", "Kiro IDE is not running, or not connected")
    assert (body["recoverable"], body["reason"]) == (True, "not_running")
    assert server.ask("GET", "/commands").json() == {"commands": {}}


def test_after_a_clean_good_bye_it_is_not_running(server, ide):
    assert server.ask("DELETE", "/agents/window").json() == {"deleted": "window"}
    ide.die()
    assert execute(server, "object").json()["reason"] == "not_running"


def test_an_ide_whose_remote_control_is_off_is_said_to_be(server, ide):
    ide.announce(types=[])
    said = execute(server, "object")
    assert (said.status_code, said.json()["reason"]) == (503, "not_responding")
    assert said.json()["message"] == "Kiro IDE is not responding to commands: remote control is switched off in it"


def test_an_ide_that_died_a_moment_ago_is_503_not_responding_and_the_command_is_cancelled(server, ide, state):
    ide.die()
    began = time.monotonic()
    said = execute(server, "object")
    assert (said.status_code, said.json()["reason"]) == (503, "not_responding")
    assert time.monotonic() - began < 22  # 15 s after it was last seen
    identity = said.json()["executionId"]
    assert (command(server, identity)["status"], command(server, identity)["outcome"]) == ("failed", "expired")
    assert execute(server, "object").json()["message"] == "Kiro IDE is not responding to commands"
    assert len(server.ask("GET", "/commands").json()["commands"]) == 1  # nothing more was queued


def test_an_ide_that_dies_in_the_middle_is_422_and_the_command_ends(server, ide):
    result = in_background(lambda: execute(server, "slow"))
    until(lambda: status_of(server)["executions"] and ide.executed)
    ide.die()
    said = result()
    assert said.status_code == 422
    assert "stopped reporting; how it ended is unknown" in said.json()["error"]
    assert command(server, said.json()["executionId"])["outcome"] == "lost"


def test_a_fourth_at_once_is_422_and_is_not_queued(server, ide):
    results = [in_background(lambda n=n: execute(server, "slow", args=[str(n)])) for n in range(3)]
    until(lambda: len(status_of(server)["executions"]) == 3)
    said = execute(server, "object")
    assert said.status_code == 422
    error = "Maximum concurrent commands limit reached (3)"
    assert said.json() == {"success": False, "output": "", "error": error, "executionTimeMs": 0}
    assert len(server.ask("GET", "/commands").json()["commands"]) == 3
    ide.release.set()
    assert [result().status_code for result in results] == [200] * 3
    assert execute(server, "object").status_code == 200


def test_what_waits_for_an_ide_that_is_away_does_not_use_up_the_limit(server, ide):
    for _ in range(3):
        order = {"type": "kiro_command", "command": "object", "target": "another laptop"}
        server.ask("POST", "/command", json=order)
    assert execute(server, "object").status_code == 200


def test_racing_callers_are_never_more_than_three(server, ide):
    answers = []

    def call(number):
        body = {"command": "slow", "args": [str(number)]}
        answers.append(
            requests.post(f"{server.url}/api/kiro/execute", headers=HEADERS, json=body, timeout=60).status_code
        )

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    until(lambda: len(answers) == 5)
    ide.release.set()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] * 3 + [422] * 5
    assert len(ide.executed) == 3


def test_time_over_is_408_in_the_seeds_words_and_the_command_is_cancelled(impatient):
    ide = Ide(impatient.url)
    said = execute(impatient, "slow")
    body = said.json()
    assert said.status_code == 408
    assert body.keys() == {"code", "message", "recoverable", "timestamp", "timeoutMs", "executionId"}
    assert (body["code"], body["recoverable"]) == ("OPERATION_TIMEOUT", True)
    assert body["message"] == "Operation 'command-execution' timed out after 1500ms (limit: 1500ms)"
    until(lambda: body["executionId"] in ide.cancelled)
    assert until(lambda: command(impatient, body["executionId"]).get("outcome")) == "cancelled"
    ide.die()


def test_an_ide_that_gives_up_first_is_408_too(server, ide):
    assert execute(server, "timeout").json()["code"] == "OPERATION_TIMEOUT"


def test_the_limit_is_300000_ms_unless_the_settings_say_otherwise():
    assert kirosync.EXECUTE_S == 300
    said = kirosync.execution_timed_out({"id": "c", "timeout": kirosync.EXECUTE_S})
    assert str(said) == "Operation 'command-execution' timed out after 300000ms (limit: 300000ms)"


@pytest.mark.parametrize("limit", ["0", "-1", "soon", "1e3"])
def test_a_limit_that_is_none_is_refused_at_the_start(tmp_path, limit):
    log = tmp_path / "log"
    process = Process(
        "kirosync.py", "serve", "--state", tmp_path / "s", environment={"KIROSYNC_EXECUTE_TIMEOUT": limit}, log=log
    )
    assert process.popen.wait(20) == 2
    assert f"{limit} is not a number of seconds" in log.read_text()


def test_respond_async_answers_202_with_the_id_at_once(server, ide):
    said = execute(server, "slow", headers={"Prefer": "respond-async"})
    assert (said.status_code, said.headers["Preference-Applied"]) == (202, "respond-async")
    identity = said.json()["executionId"]
    ide.release.set()
    assert server.ask("GET", f"/command/{identity}?wait=20").json()["outcome"] == "ok"


def test_when_too_many_wait_the_newest_is_answered_at_once_and_goes_on(state, tmp_path, start):
    server = start(Server, state, tmp_path / "log", "--threads", "4")
    cursor = server.ask("GET", "/sync").json()["cursor"]
    held = [in_background(lambda: be_held(server, cursor)) for _ in range(2)]
    until(lambda: is_answered_at_once(server, cursor))
    ide = Ide(server.url)
    said = execute(server, "slow")
    assert (said.status_code, said.json().keys()) == (202, {"executionId", "status"})
    ide.release.set()
    until(lambda: command(server, said.json()["executionId"]).get("outcome") == "ok")
    server.ask("POST", "/sync", json={"documents": {"d": {"content": "", "timestamp": 1}}})
    assert [result().status_code for result in held] == [200, 200]
    ide.die()


def be_held(server, cursor):
    """Return the answer to a question that was really held, not answered at once."""
    began, answer = time.monotonic(), None
    while answer is None or (time.monotonic() - began < 0.6 and not answer.json()["documents"]):
        began = time.monotonic()
        answer = requests.get(f"{server.url}/sync?only=documents&wait=20&since={cursor}", headers=HEADERS, timeout=60)
    return answer


def is_answered_at_once(server, cursor):
    began = time.monotonic()
    server.ask("GET", f"/sync?only=documents&wait=0.3&since={cursor}")
    return time.monotonic() - began < 0.2


# The retried request


def hang_up(server, body, after):
    """Send an execution and hang up before its answer, as a client's time limit does."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
    connection.request("POST", "/api/kiro/execute", json.dumps(body), HEADERS)
    after()
    connection.close()


def test_the_same_again_by_who_hung_up_is_not_executed_again(server, ide):
    hang_up(server, {"command": "slow"}, lambda: busy(server))
    result = in_background(lambda: execute(server, "slow"))
    time.sleep(0.2)
    ide.release.set()
    assert result().status_code == 200
    assert len(ide.executed) == 1
    assert execute(server, "slow").status_code == 200  # that one was answered: this is another
    assert len(ide.executed) == 2


def test_how_it_ended_is_told_to_who_hung_up_and_comes_again(server, ide):
    hang_up(server, {"command": "slow"}, lambda: busy(server))
    ide.release.set()
    until(lambda: not status_of(server)["executions"])
    assert execute(server, "slow").json()["success"]
    assert len(ide.executed) == 1


def test_another_order_by_who_hung_up_is_another_execution(server, ide):
    hang_up(server, {"command": "slow"}, lambda: busy(server))
    assert execute(server, "object").json()["success"]
    until(lambda: len(ide.executed) == 2)


def test_the_same_by_two_who_both_wait_is_executed_twice(server, ide):
    results = [
        in_background(
            lambda: requests.post(
                f"{server.url}/api/kiro/execute", headers=HEADERS, json={"command": "slow"}, timeout=60
            )
        )
        for _ in range(2)
    ]
    until(lambda: len(status_of(server)["executions"]) == 2)
    ide.release.set()
    assert [result().status_code for result in results] == [200, 200]


def test_an_idempotency_key_makes_it_one_execution(server, ide):
    first, again = (execute(server, "object", headers={"Idempotency-Key": "k"}).json() for _ in range(2))
    assert first["executionId"] == again["executionId"]
    assert execute(server, "other", headers={"Idempotency-Key": "k"}).status_code == 422
    assert len(ide.executed) == 1


# Windows


@pytest.fixture
def windows(server):
    both = {
        name: Ide(server.url, name, workspaceFolders=[folder], focusedAt=focused)
        for name, folder, focused in (("one", "/srv/app", 1), ("two", "/srv/app/inner", 2))
    }
    yield both
    for ide in both.values():
        ide.die()


@pytest.mark.parametrize(
    ("path", "name"),
    [("/srv/app", "one"), ("/srv/app/src/x", "one"), ("/srv/app/inner/", "two"), (None, "two")],
)
def test_a_workspace_path_goes_to_the_window_that_has_it_open(server, windows, path, name):
    more = {"workspacePath": path} if path else {}
    identity = execute(server, "object", **more).json()["executionId"]
    assert command(server, identity)["agent"] == name


def test_without_a_path_it_goes_to_the_window_focused_last(server, windows):
    assert server.ask("PATCH", "/agents/one", json={"focusedAt": 3}).status_code == 200
    assert command(server, execute(server, "object").json()["executionId"])["agent"] == "one"


def test_a_path_that_no_window_has_open_fails_and_says_so(server, windows):
    said = execute(server, "object", workspacePath="/srv/apple")
    error = "No editor window has /srv/apple open; open are: /srv/app, /srv/app/inner"
    assert said.status_code == 422
    assert said.json() == {"success": False, "output": "", "error": error, "executionTimeMs": 0}


# Status


def test_status_is_unavailable_ready_and_busy(server):
    said = status_of(server)
    fields = {"status", "availableCommands", "timestamp", "pendingInputs", "executions"}
    assert said.keys() == fields | {"reason", "message"}
    assert (said["reason"], said["message"]) == ("not_running", "Kiro IDE is not running, or not connected")
    assert (said["status"], said["availableCommands"]) == ("unavailable", [])
    ide = Ide(server.url)
    said = status_of(server)
    assert (said["status"], said["version"], said["availableCommands"]) == ("ready", "Code 1.99.0", ["a", "b"])
    assert re.fullmatch(ISO, said["timestamp"])
    assert "currentCommand" not in said
    result = in_background(lambda: execute(server, "slow", args=["x"]))
    said = busy(server)
    assert said["currentCommand"] == "slow"
    assert said["executions"][0].items() >= {"command": "slow", "args": ["x"], "agent": "window"}.items()
    ide.release.set()
    assert result().json()["executionId"] == said["executions"][0]["executionId"]
    assert status_of(server)["status"] == "ready"
    ide.die()


def test_everything_of_kiro_wants_a_token(server):
    for method, path in (("POST", "execute"), ("GET", "status"), ("POST", "input")):
        said = requests.request(method, f"{server.url}/api/kiro/{path}", json={}, timeout=10)
        assert said.status_code == 401
        assert said.json() == {"error": "Unauthorized", "message": "Valid API key required"}


def test_health_tells_more_to_who_brings_a_token(server, ide):
    ask_human(server)
    public = requests.get(f"{server.url}/health", timeout=10).json()
    assert public.keys() == {"status", "ready", "timestamp", "server"}
    said = server.ask("GET", "/health").json()
    assert said["queue"].keys() == {"pending", "processing", "oldestPendingMs"}
    assert (said["queue"]["pending"], said["queue"]["processing"]) == (1, 0)
    assert said["agents"]["window"].items() >= {"kind": "ide", "present": True}.items()
    assert re.fullmatch(ISO, said["agents"]["window"]["lastSeen"])
    assert said["token"] == {"name": "master", "scope": "admin"}


# The human


@pytest.mark.parametrize(
    ("question", "value", "kind", "told"),
    [
        ({}, "so", "text", "so"),
        ({"inputType": "text"}, "", "text", ""),
        ({"inputType": "choice", "choices": ["red", "blue"]}, "blue", "choice", "blue"),
        ({"inputType": "file"}, "/etc/hosts", "file", "/etc/hosts"),
        ({"inputType": "confirmation"}, "Yes", "confirmation", "yes"),
        ({"inputType": "confirmation"}, False, "confirmation", "no"),
    ],
)
def test_each_kind_of_question_is_answered(server, question, value, kind, told):
    identity = ask_human(server, **question)
    shown = status_of(server)["pendingInputs"][0]
    assert (shown["id"], shown["prompt"], shown["type"]) == (identity, "Well?", kind)
    assert shown.get("choices") == question.get("choices")
    said = answer(server, value, kind, identity)
    assert (said.status_code, said.json()) == (200, {"success": True, "executionId": identity})
    kept = command(server, identity)
    assert (kept["status"], kept["outcome"], kept["result"]) == ("completed", "ok", {"value": told})
    assert status_of(server)["pendingInputs"] == []


@pytest.mark.parametrize(
    ("question", "value", "kind", "error"),
    [
        ({"inputType": "choice", "choices": ["red", "blue"]}, "green", "choice", "one of red, blue"),
        ({"inputType": "confirmation"}, "perhaps", "confirmation", "yes or no"),
        ({"inputType": "file"}, " ", "file", "the path of a file"),
        ({}, True, "text", "a text"),
        ({}, "yes", "confirmation", "a text"),
    ],
)
def test_a_value_that_does_not_fit_is_400_and_the_question_stays_open(server, question, value, kind, error):
    identity = ask_human(server, **question)
    said = answer(server, value, kind, identity)
    assert (said.status_code, said.json().keys()) == (400, {"success", "error", "executionId"})
    assert (said.json()["success"], said.json()["executionId"]) == (False, identity)
    assert error in said.json()["error"]
    assert command(server, identity)["status"] == "pending"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "value"),
        ({"value": "x"}, "type"),
        ({"value": "x", "type": "text"}, "executionId"),
        ({"value": 5, "type": "text", "executionId": "c"}, "value"),
        ({"value": "x", "type": "colour", "executionId": "c"}, "type"),
    ],
)
def test_a_malformed_answer_is_400_and_names_the_field(server, body, field):
    said = server.ask("POST", "/api/kiro/input", json=body)
    assert (said.status_code, said.json()["code"], said.json()["field"]) == (400, "VALIDATION_FAILED", field)


def test_a_choice_without_choices_is_no_question(server):
    said = server.ask("POST", "/command", json={"type": "user_input", "prompt": "?", "inputType": "choice"})
    assert (said.status_code, said.json()["field"]) == (400, "choices")


def test_where_nothing_waits_it_is_404(server, ide):
    assert answer(server, "x", "text", "nobody").status_code == 404
    identity = execute(server, "object").json()["executionId"]
    assert answer(server, "x", "text", identity).status_code == 404
    question = ask_human(server)
    assert server.ask("POST", f"/command/{question}/cancel").status_code == 200
    assert answer(server, "x", "text", question).status_code == 404


def test_the_same_answer_again_is_fine_and_another_is_not(server):
    identity = ask_human(server)
    assert [answer(server, "x", "text", identity).status_code for _ in range(2)] == [200, 200]
    assert answer(server, "y", "text", identity).status_code == 404
    assert command(server, identity)["result"] == {"value": "x"}


def test_who_answers_late_is_told_408_and_who_asked_expired(server):
    identity = ask_human(server, expiresIn=0.2)
    until(lambda: command(server, identity).get("outcome") == "expired")
    said = answer(server, "x", "text", identity)
    assert (said.status_code, said.json()["code"]) == (408, "OPERATION_TIMEOUT")
    assert said.json()["executionId"] == identity


def test_an_answer_finds_the_question_of_an_execution(server, ide):
    result = in_background(lambda: execute(server, "slow"))
    execution = busy(server)["executions"][0]["executionId"]
    question = ask_human(server, executionId=execution)
    assert status_of(server)["pendingInputs"][0]["executionId"] == execution
    assert answer(server, "so", "text", execution).json() == {"success": True, "executionId": execution}
    assert command(server, question)["result"] == {"value": "so"}
    assert answer(server, "so", "text", execution).status_code == 200  # sent again
    ide.release.set()
    result()


def test_when_what_asked_has_ended_the_question_ends_too(server, ide):
    result = in_background(lambda: execute(server, "slow"))
    execution = busy(server)["executions"][0]["executionId"]
    question = ask_human(server, executionId=execution)
    ide.release.set()
    result()
    until(lambda: command(server, question).get("outcome") == "expired")
    assert answer(server, "so", "text", execution).status_code == 408
    assert status_of(server)["pendingInputs"] == []


def test_an_answer_reaches_an_agent_that_waits(server):
    identity = ask_human(server, inputType="confirmation")
    result = in_background(lambda: server.ask("GET", f"/command/{identity}?wait=20").json())
    requests.post(
        f"{server.url}/api/kiro/input",
        headers=HEADERS,
        json={"value": "yes", "type": "confirmation", "executionId": identity},
        timeout=10,
    )
    assert result()["result"] == {"value": "yes"}


# Agents


def test_an_agent_is_listed_absent_after_15_s_and_gone_after_its_good_bye(client, clock):
    assert client.get("/agents").json == {"agents": {}}
    said = {"kind": "agent", "types": ["execute_bash"], "version": "1", "colour": "blue"}
    assert client.put_json("/agents/B%C3%BCro%201", said).json == {"agent": "Büro 1"}
    assert client.get("/agents").json["agents"] == {"Büro 1": {**said, "lastSeen": clock.now, "present": True}}
    clock.now += 15_000
    assert client.get("/agents").json["agents"]["Büro 1"]["present"] is False
    assert client.patch_json("/agents/B%C3%BCro%201", {}).json == {"agent": "Büro 1"}
    assert client.get("/agents").json["agents"]["Büro 1"] == {**said, "lastSeen": clock.now, "present": True}
    assert client.delete("/agents/B%C3%BCro%201").json == {"deleted": "Büro 1"}
    assert client.get("/agents").json == {"agents": {}}
    client.delete("/agents/B%C3%BCro%201", status=404)
    client.patch_json("/agents/B%C3%BCro%201", {}, status=404)


def test_an_agent_is_seen_when_it_claims_renews_and_asks(client, clock):
    def seen():
        return client.get("/agents").json["agents"]["a"]["lastSeen"] == clock.now

    client.put_json("/agents/a", {"kind": "agent", "types": []})
    identity = client.post_json("/command", {"type": "execute_bash", "command": "true"}).json["commandId"]
    for ask in (
        lambda: client.get("/sync?agent=a"),
        lambda: client.patch_json(f"/command/{identity}", {"status": "processing", "agent": "a", "lease": 5}),
        lambda: client.patch_json(f"/command/{identity}", {"status": "completed", "agent": "a"}),
    ):
        clock.now += 1000
        assert not seen()
        ask()
        assert seen()


def test_an_agent_is_seen_for_as_long_as_its_question_is_held(server):
    server.ask("PUT", "/agents/a", json={"kind": "agent", "types": []})
    cursor = server.ask("GET", "/sync").json()["cursor"]
    result = in_background(lambda: server.ask("GET", f"/sync?agent=a&wait=5&since={cursor}"))
    first = requests.get(f"{server.url}/agents", headers=HEADERS, timeout=10).json()["agents"]["a"]["lastSeen"]
    time.sleep(4.5)
    later = requests.get(f"{server.url}/agents", headers=HEADERS, timeout=10).json()["agents"]["a"]["lastSeen"]
    assert later - first >= 2000
    result()


def test_what_an_agent_says_is_a_file_that_can_be_read_and_its_time_is_when_it_was_seen(client, state, clock):
    client.put_json("/agents/a~b", {"kind": "ide", "types": ["kiro_command"], "workspaceFolders": ["/w"]})
    file = state / "agents" / "a%7Eb.json"
    assert json.loads(file.read_text())["workspaceFolders"] == ["/w"]
    assert file.read_text().endswith("}\n")
    assert file.stat().st_mtime_ns == clock.now * 1_000_000


def test_a_patch_changes_some_of_it_and_a_put_all(client):
    client.put_json("/agents/a", {"kind": "ide", "types": [], "version": "1"})
    client.patch_json("/agents/a", {"types": ["kiro_command"]})
    assert client.get("/agents").json["agents"]["a"]["version"] == "1"
    client.put_json("/agents/a", {"kind": "ide", "types": []})
    assert "version" not in client.get("/agents").json["agents"]["a"]


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"types": []}, "kind"),
        ({"kind": "human", "types": []}, "kind"),
        ({"kind": "ide"}, "types"),
        ({"kind": "ide", "types": [5]}, "types[0]"),
        ({"kind": "ide", "types": [], "lastSeen": 5}, "lastSeen"),
        ({"kind": "ide", "types": [], "focusedAt": "now"}, "focusedAt"),
    ],
)
def test_a_malformed_announcement_is_400(client, said, field):
    assert client.put_json("/agents/a", said, status=400).json["field"] == field
    assert client.get("/agents").json == {"agents": {}}


def test_announcements_are_bounded_in_size_and_number(client, clock, monkeypatch):
    monkeypatch.setattr(kirosync, "AGENTS", 2)
    client.put_json("/agents/a", {"kind": "agent", "types": [], "x": "y" * kirosync.ANNOUNCED_BYTES}, status=413)
    for name in ("a", "b", "a"):
        client.put_json(f"/agents/{name}", {"kind": "agent", "types": []})
    assert "as many as can be" in client.put_json("/agents/c", {"kind": "agent", "types": []}, status=503).json["error"]
    clock.now += 20_000
    client.patch_json("/agents/a", {})
    client.put_json("/agents/c", {"kind": "agent", "types": []})
    assert [*client.get("/agents").json["agents"]] == ["a", "c"]  # who was absent the longest has given way


def test_names_of_agents_do_not_leave_their_folder(client, state):
    client.put_json("/agents/..%2F..%2Fx", {"kind": "agent", "types": []})
    client.put_json("/agents/..", {"kind": "agent", "types": []}, status="*")
    assert not (state.parent / "x.json").exists()
    assert [path.parent.name for path in state.parent.rglob("*x.json")] == ["agents"]


def test_a_file_of_an_agent_that_was_spoiled_by_hand_is_passed_over(client, state):
    client.put_json("/agents/a", {"kind": "agent", "types": []})
    (state / "agents" / "b.json").write_text("{")
    (state / "agents" / "c.json").mkdir()
    assert [*client.get("/agents").json["agents"]] == ["a"]
    assert "agents" in client.get("/health").json


def test_a_real_agent_announces_itself_and_says_good_bye(server, state, tmp_path, start):
    (tmp_path / "token").write_text(TOKEN)
    links = {"by-folder": ["--state", state], "by-http": ["--server", server.url, "--token-file", tmp_path / "token"]}
    processes = [start(Process, "agent.py", *link, "--name", name) for name, link in links.items()]
    known = until(lambda: (said := server.ask("GET", "/agents").json()["agents"]).keys() == links.keys() and said)
    for agent in known.values():
        assert (agent["kind"], agent["present"]) == ("agent", True)
        assert "execute_bash" in agent["types"]
    for process in processes:
        assert process.end() == 0
    assert server.ask("GET", "/agents").json() == {"agents": {}}


# The seed


def node_with_types():
    """Return a Node that runs TypeScript, or None."""
    for node in (shutil.which("node"), Path(__file__).parents[1] / "ide" / ".host" / "bin" / "node"):
        said = (
            node
            and Path(node).exists()
            and subprocess.run([node, "-v"], capture_output=True, text=True, check=False).stdout
        )
        if said and tuple(map(int, said.strip("v\n").split("."))) >= (23, 6):
            return str(node)
    return None


@pytest.mark.skipif(not node_with_types(), reason="Node 23.6 or later runs TypeScript; ide/test installs one")
def test_the_seeds_class_works_as_it_is(server, ide, tmp_path):
    script = tmp_path / "run.ts"
    script.write_text(
        SEED.read_text()
        + """
const [url, token] = process.argv.slice(2);
const executor = new KiroCommandExecutor(url, token);
const said: unknown[] = [];
const attempt = async (act: () => Promise<unknown>) => said.push(await act().catch((error) => String(error)));
await attempt(() => executor.executeCommand({ command: 'object', args: ['file:///a.txt'] }));
await attempt(() => executor.executeWithRetry({ command: 'throws' }, 2, 10));
await attempt(() => executor.executeWithRetry({ command: '' }, 3, 10));
await attempt(() => executor.executeWithRetry({ command: 'slow', timeoutMs: 400 }, 3, 300));
console.log(JSON.stringify(said));
"""
    )
    threading.Timer(1.5, ide.release.set).start()
    argv = [node_with_types(), script, server.url, TOKEN]
    ran = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    success, throws, empty, slow = json.loads(ran.stdout)
    assert (success["success"], success["output"]) == (True, '{"answer":42}')
    assert throws == "Error: HTTP 422: Unprocessable Entity"
    assert empty == "Error: HTTP 400: Command is required and must be a string"
    assert slow["success"] is True
    assert [each["command"] for each in ide.executed].count("throws") == 2
    assert [each["command"] for each in ide.executed].count("slow") == 1


def test_patches_that_race_lose_nothing(server):
    server.ask("PUT", "/agents/a", json={"kind": "ide", "types": []})
    for turn in range(20):
        threads = [
            threading.Thread(
                target=requests.patch,
                args=(f"{server.url}/agents/a",),
                kwargs={"headers": HEADERS, "json": {field: turn}, "timeout": 20},
            )
            for field in ("x", "y")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        said = server.ask("GET", "/agents").json()["agents"]["a"]
        assert (said["x"], said["y"]) == (turn, turn)


def test_a_claim_by_a_name_that_no_file_can_have_is_a_claim_like_any_other(client):
    identity = client.post_json("/command", {"type": "execute_bash", "command": "true"}).json["commandId"]
    name = "語" * 100
    assert client.patch_json(f"/command/{identity}", {"status": "processing", "agent": name}).json["agent"] == name


def test_the_same_key_gets_the_same_answer_as_before(impatient):
    ide = Ide(impatient.url)
    answers = [execute(impatient, "slow", headers={"Idempotency-Key": "k"}) for _ in range(2)]
    until(lambda: ide.cancelled)
    until(lambda: not status_of(impatient)["executions"])
    answers.append(execute(impatient, "slow", headers={"Idempotency-Key": "k"}))
    assert [(each.status_code, each.json()["code"]) for each in answers] == [(408, "OPERATION_TIMEOUT")] * 3
    assert len(ide.executed) == 1
    ide.die()


def test_who_was_not_seen_for_a_day_is_forgotten(store, clock):
    service = kirosync.Service(store, kirosync.Keyring(store.directory, TOKEN))
    store.change(lambda pen: pen.announce("a", {"kind": "ide", "types": []}))
    clock.now += 23 * 3600_000
    service.forget_agents()
    assert [*store.agents()] == ["a"]
    clock.now += 2 * 3600_000
    service.forget_agents()
    assert store.agents() == {}


# What would spoil it


def test_what_is_taken_in_by_sync_is_as_well_formed_as_what_is_posted(server):
    for fields in ({"executionId": ["a"]}, {"prompt": 5}, {"choices": "x"}, {"timeout": "long"}):
        push = {"commands": {"bad": {"type": "user_input", "status": "processing", **fields}}}
        said = server.ask("POST", "/sync", json=push)
        assert (said.status_code, said.json()["field"]) == (400, f"commands.bad.{next(iter(fields))}")


def test_odd_commands_of_others_spoil_neither_the_status_nor_the_sweep(server):
    odd = {
        "q": {"type": "user_input", "status": "processing", "createdAt": -8e15},
        "c": {"type": "user_input", "status": "processing", "inputType": "choice", "prompt": "?"},
        "k": {"type": "kiro_command", "status": "processing", "agent": "nobody"},
        "e": {"type": "user_input", "status": "failed"},
    }
    assert server.ask("POST", "/sync", json={"commands": odd}).status_code == 200
    assert {each["id"] for each in status_of(server)["pendingInputs"]} == {"q", "c"}
    assert answer(server, "x", "choice", "c").status_code == 400
    assert answer(server, "x", "text", "e").status_code == 404
    assert server.ask("GET", "/sync?agent=%FF").status_code == 400
    identity = ask_human(server, expiresIn=0.1)
    until(lambda: command(server, identity).get("outcome") == "expired")


def test_a_folder_of_agents_that_was_removed_is_made_again(client, state):
    client.put_json("/agents/a", {"kind": "ide", "types": []})
    shutil.rmtree(state / "agents")
    assert client.get("/agents").json == {"agents": {}}
    assert client.get("/api/kiro/status").json["status"] == "unavailable"
    client.put_json("/agents/a", {"kind": "ide", "types": []})
    assert [*client.get("/agents").json["agents"]] == ["a"]


def test_the_time_is_over_even_if_nobody_waits(impatient):
    ide = Ide(impatient.url)
    said = [execute(impatient, "slow", args=[n], headers={"Prefer": "wait=5, Respond-Async"}) for n in "123"]
    assert [each.status_code for each in said] == [202] * 3
    assert execute(impatient, "other").status_code == 422
    until(lambda: len(ide.cancelled) == 3)
    assert execute(impatient, "other").status_code == 200
    ide.die()


def test_the_same_asked_for_at_once_twice_is_executed_twice(server, ide):
    for _ in range(2):
        assert execute(server, "slow", headers={"Prefer": "respond-async"}).status_code == 202
    until(lambda: len(ide.executed) == 2)


def test_a_defect_in_the_background_does_not_end_the_work():
    closing, turns = threading.Event(), []

    def work():
        turns.append(1)
        if len(turns) > 1:
            closing.set()
        raise KeyError("a defect")

    kirosync.go_on(work, closing)
    assert len(turns) == 2


def test_who_is_asked_not_to_respond_at_once_does_not(server, ide):
    assert execute(server, "object", headers={"Prefer": 'not-respond-async, x="respond-async"'}).status_code == 200


def test_an_execution_that_a_restart_cut_off_is_joined_not_repeated(state, tmp_path, start):
    server = start(Server, state, tmp_path / "log")
    port = urlsplit(server.url).port
    ide = Ide(server.url)
    result = in_background(lambda: execute(server, "slow"))
    until(lambda: ide.executed)
    ide.gone.set()  # it is deaf while the service is away, and goes on executing
    ide.thread.join()
    assert server.end() == 0
    assert result().status_code == 503
    again = start(Server, state, tmp_path / "log2", "--port", str(port))
    requests.put(f"{again.url}/agents/window", headers=HEADERS, json=ide.said, timeout=10)
    result = in_background(lambda: execute(again, "slow"))
    execution = busy(again)["executions"][0]["executionId"]
    assert len(again.ask("GET", "/commands").json()["commands"]) == 1
    ide.report(execution, agent="window", **ended("done"))
    assert result().json()["output"] == "done"


def test_a_removed_execution_is_said_to_be(server, ide):
    ide.gone.set()
    ide.thread.join()
    result = in_background(lambda: execute(server, "object"))
    execution = busy(server)["executions"][0]["executionId"]
    assert server.ask("DELETE", f"/command/{execution}").status_code == 200
    said = result()
    assert (said.status_code, said.json()["success"]) == (422, False)
    assert said.json()["error"] == "it was removed from the queue before it ended"


def test_an_answer_that_is_sent_again_does_not_answer_the_next_question(server, ide):
    result = in_background(lambda: execute(server, "slow"))
    execution = busy(server)["executions"][0]["executionId"]
    first = ask_human(server, executionId=execution, inputType="confirmation")
    assert answer(server, "yes", "confirmation", execution).status_code == 200
    second = ask_human(server, executionId=execution, inputType="confirmation")
    for again in ("yes", True):
        said = answer(server, again, "confirmation", execution)
        assert (said.status_code, said.json()["questions"]) == (409, [second])
    assert command(server, second)["status"] == "pending"
    assert answer(server, "yes", "confirmation", second).status_code == 200
    assert command(server, first)["result"] == {"value": "yes"}
    ide.release.set()
    result()
