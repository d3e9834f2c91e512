"""Remote control of a real editor, through the service, as the seed's document has it."""

import json
import threading
import time

import pytest
from editor import until
from service import give_token, ides


@pytest.fixture(autouse=True)
def remote_control(service, window):
    """Remote control is on, but where a test says otherwise."""
    switch(service, window, True)


def switch(service, window, on, allowed=("*",)):
    window.ask("probe.configure", {"kirosync.remoteControl": on, "kirosync.allowedCommands": [*allowed]})
    ready = "ready" if on else "unavailable"
    until(lambda: status(service)["status"] == ready, f"the status did not become {ready}")


def status(service):
    return service.ask("GET", "/api/kiro/status")[1]


def execute(service, command, *args, **more):
    return service.ask("POST", "/api/kiro/execute", {"command": command, "args": [*args], **more})


def output(service, command, *args, **more):
    code, said = execute(service, command, *args, **more)
    assert (code, said["success"]) == (200, True), said
    return said["output"]


def in_background(act):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(act()))
    thread.start()

    def result():
        thread.join(90)
        return answers[0]

    return result


# What it says of itself


def test_a_window_announces_its_version_its_folders_and_its_commands(service, window):
    said = status(service)
    assert said["version"].startswith("Code - OSS 1.") or "1." in said["version"]
    assert {"vscode.open", "workbench.action.files.newUntitledFile", "probe.noop"} <= {*said["availableCommands"]}
    assert [each["workspaceFolders"] for each in ides(service).values()] == [[str(window.folder)]]


def test_the_token_is_in_no_setting_and_no_file_of_the_editor(service, editor, window):
    token = service.editors_token.encode()
    files = [path for path in editor.folder.rglob("*") if path.is_file()]
    assert files
    assert [path for path in files if token in path.read_bytes()] == []


# Executing


def test_a_new_untitled_file_is_opened(service, window):
    before = json.loads(output(service, "probe.state"))["untitled"]
    code, said = execute(service, "workbench.action.files.newUntitledFile")
    assert (code, said["success"]) == (200, True)
    assert json.loads(output(service, "probe.state"))["untitled"] == before + 1


def test_the_uri_of_a_file_opens_it(service, window):
    output(service, "vscode.open", (window.folder / "a b.txt").as_uri())
    state = json.loads(output(service, "probe.state"))
    assert state["activeEditor"].endswith("a%20b.txt")
    assert state["text"] == "alpha\n"


def test_arguments_are_what_the_editor_wants_them_to_be(service, window):
    given = [
        "file:///x/y.txt",
        "vscode-remote://h/x",
        '{"x": [1]}',
        "42",
        "true",
        "plain",
        '"42"',
        "{",
        "https://a.b",
        "",
    ]
    told = json.loads(output(service, "probe.echo", *given))
    assert [each["type"] for each in told] == (
        ["Uri", "Uri", "object", "number", "boolean", "string", "string", "string", "string", "string"]
    )
    assert [each["value"] for each in told] == (
        ["file:///x/y.txt", "vscode-remote://h/x", {"x": [1]}, 42, True, "plain", "42", "{", "https://a.b", ""]
    )


@pytest.mark.parametrize(
    ("command", "text"),
    [
        ("probe.noop", ""),
        ("probe.object", '{"answer":42,"nested":{"list":[1,2]}}'),
        ("probe.cycle", '{"name":"round","self":"[circular]"}'),
    ],
)
def test_a_result_is_told_as_text(service, window, command, text):
    assert output(service, command) == text


@pytest.mark.parametrize(
    ("command", "error"),
    [
        ("probe.throws", "Command 'probe.throws' failed: probe was asked to throw"),
        ("invalid.command", "Command 'invalid.command' failed: Command not found"),
    ],
)
def test_what_fails_is_422_and_says_why(service, window, command, error):
    code, said = execute(service, command)
    assert (code, said["success"], said["error"], said["output"]) == (422, False, error, "")


def test_the_status_is_busy_while_a_command_runs_and_the_window_shows_it(service, window):
    result = in_background(lambda: execute(service, "probe.slow", "3000"))
    said = until(lambda: status(service) if status(service)["status"] == "busy" else None, "it was never busy")
    assert said["currentCommand"] == "probe.slow"
    window.sees("status", "probe.slow")
    window.screenshot("busy")
    code, said = result()
    assert (code, said["output"]) == (200, "")
    assert said["executionTimeMs"] >= 2900
    assert status(service)["status"] == "ready"


def test_a_long_one_does_not_hold_up_another_and_a_cancel_ends_it(service, window):
    result = in_background(lambda: execute(service, "probe.slow", "60000"))
    execution = until(lambda: status(service)["executions"], "it was never begun")[0]["executionId"]
    assert output(service, "probe.noop") == ""
    service.ask("POST", f"/command/{execution}/cancel")
    code, said = result()
    assert code == 422
    assert "cannot be stopped" in said["error"]
    assert service.ask("GET", f"/command/{execution}")[1]["outcome"] == "cancelled"


def test_one_that_asks_gets_the_humans_answer(service, window):
    result = in_background(lambda: execute(service, "probe.ask", "Which color?", '{"choices": ["red", "blue"]}'))
    waiting = until(lambda: status(service)["pendingInputs"], "nothing was asked")[0]
    running = status(service)["executions"][0]["executionId"]
    assert (waiting["prompt"], waiting["type"], waiting["executionId"]) == ("Which color?", "choice", running)
    answer = {"value": "blue", "type": "choice", "executionId": running}
    assert service.ask("POST", "/api/kiro/input", answer) == (200, {"success": True, "executionId": running})
    assert result()[1]["output"] == "blue"


def test_one_that_asks_and_is_refused_fails(service, window):
    result = in_background(lambda: execute(service, "kirosync.askUser", "Sure?", '{"inputType": "confirmation"}'))
    waiting = until(lambda: status(service)["pendingInputs"], "nothing was asked")[0]
    service.ask("POST", f"/command/{waiting['id']}/cancel")
    code, said = result()
    assert code == 422
    assert "nobody answered: cancelled" in said["error"]


# Whether it may


def test_nothing_is_executed_unless_remote_control_is_on(service, window):
    switch(service, window, False)
    code, said = execute(service, "probe.mark")
    assert (code, said["code"], said["reason"]) == (503, "KIRO_UNAVAILABLE", "not_responding")
    assert "remote control is switched off" in said["message"]
    (name,) = ides(service)
    order = {"type": "kiro_command", "command": "probe.mark", "target": name}
    said = service.ask("POST", "/command?wait=20", order)[1]
    assert (said["outcome"], said["status"]) == ("refused", "failed")
    assert "remote control is switched off in this editor" in said["error"]
    assert window.ask("probe.state")["marks"] == 0


def test_a_list_of_patterns_limits_what_is_executed(service, window):
    switch(service, window, True, allowed=["probe.*", "vscode.open"])
    assert output(service, "probe.noop") == ""
    code, said = execute(service, "workbench.action.files.newUntitledFile")
    assert (code, said["success"]) == (422, False)
    assert "this editor does not allow 'workbench.action.files.newUntitledFile'" in said["error"]
    offered = until(lambda: len(c := status(service)["availableCommands"]) < 50 and c, "it offers all")
    assert "workbench.action.files.newUntitledFile" not in offered


def test_the_window_shows_that_it_is_on_and_the_log_what_ran(service, window):
    window.sees("status", "remote control")
    output(service, "probe.echo", "noted-in-the-log")
    window.command("Kirosync: Show Log")
    window.page.locator(".panel .view-line", has_text="noted-in-the-log").first.wait_for()
    window.screenshot("log")


def test_a_human_switches_it_on_and_off_by_the_palette(service, window):
    switch(service, window, False)
    window.command("Kirosync: Switch Remote Control On")
    window.sees("dialog", "Let others execute editor commands here")
    window.screenshot("remote-control")
    window.page.get_by_role("button", name="Switch It On").click()
    until(lambda: status(service)["status"] == "ready", "it was not switched on")
    window.command("Kirosync: Switch Remote Control Off")
    until(lambda: status(service)["status"] == "unavailable", "it was not switched off")


# Connection


def test_a_service_that_was_away_is_found_again(service, window):
    service.stop()
    window.sees("status", "Kirosync: offline")
    window.screenshot("offline")
    service.start()
    until(lambda: status(service)["status"] == "ready", "it did not come back")
    assert output(service, "probe.noop") == ""


def test_an_agent_that_was_forgotten_announces_itself_anew(service, window):
    (name,) = ides(service)
    file = service.state / "agents" / f"{name.replace('/', '%2F').replace('#', '%23')}.json"
    file.unlink()
    service.stop()
    service.start()
    until(lambda: name in ides(service), "it did not announce itself again")


def test_a_token_that_is_wrong_is_said_to_be(service, window):
    give_token(window, "not the token")
    window.sees("status", "Kirosync: wrong token")
    window.sees("notification", "does not take the token")
    window.screenshot("wrong-token")
    give_token(window, service.editors_token)
    until(lambda: status(service)["status"] == "ready", "the right token was not taken")


# Windows


@pytest.fixture
def other(editor, service, window, tmp_path):
    """A second window, of the same user."""
    other = editor.open(tmp_path, beside=window)
    until(lambda: len(ides(service)) == 2, "the second window did not announce itself")
    yield other
    other.close()


def test_two_windows_are_two_agents_and_a_path_goes_to_the_one_that_has_it_open(service, window, other):
    for each in (window, other):
        state = json.loads(output(service, "probe.state", workspacePath=str(each.folder / "inside")))
        assert [uri.rpartition("/")[2] for uri in state["folders"]] == [each.folder.name]
    code, said = execute(service, "probe.state", workspacePath="/nowhere")
    assert (code, said["success"]) == (422, False)
    assert said["error"].startswith("No editor window has /nowhere open; open are: ")
    other.close()
    until(lambda: len(ides(service)) == 1, "the closed window is still there")


@pytest.mark.parametrize("how", ["closed", "killed"])
def test_an_editor_that_goes_in_the_middle_of_a_command_ends_it(service, other, how):
    began = time.monotonic()
    result = in_background(lambda: execute(service, "probe.slow", "120000", workspacePath=str(other.folder)))
    until(lambda: (e := status(service)["executions"]) and e[0]["status"] == "processing", "it was not begun")
    if how == "killed":
        other.kill_host()
    other.close()
    code, said = result()
    assert code in (422, 503), said
    assert time.monotonic() - began < 60
    until(lambda: len(ides(service)) == 1, "the window is still there")
    command = service.ask("GET", f"/command/{said['executionId']}")[1]
    assert (command["status"], command["outcome"]) == ("failed", "lost")
