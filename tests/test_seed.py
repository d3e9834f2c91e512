"""The clients and the workflows of the Sync API's own document, with nothing changed but base URL and token."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TOKEN, Process

SEED = Path(__file__).parent / "seed"
BASE, PLACEHOLDER = "https://kiro.sovereignroute.com", "YOUR_TOKEN"


@pytest.fixture
def working(server, state, tmp_path, start):
    """A server with an agent."""
    start(Process, "agent.py", "--state", state, log=tmp_path / "agent.log")
    return server


def run(server, name, tmp_path, *argv, appended=""):
    text = (SEED / name).read_text()
    assert BASE in text
    assert PLACEHOLDER in text
    program = tmp_path / name
    program.write_text(text.replace(BASE, server.url).replace(PLACEHOLDER, TOKEN) + appended)
    environment = {**os.environ, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    ran = subprocess.run([*argv, program], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_the_python_client(working, tmp_path):
    assert run(working, "client.py", tmp_path, sys.executable).strip() == str(Path(__file__).parent.parent)


@pytest.mark.skipif(not shutil.which("node"), reason="the JavaScript client needs node")
def test_the_javascript_client(working, tmp_path):
    pushed = """
const pushed = await client.pushSync({conversations: {c: [{role: "user", content: "hi", timestamp: Date.now()}]},
                                      documents: {}, commands: {}, lastUpdate: Date.now() + 1000});
console.log(JSON.stringify(pushed.data.conversations.c.length), pushed.status);
const failing = await client.submitCommand({type: "read_file", path: "/no/such/file"});
console.log((await client.waitForCommand(failing.commandId)).error);
"""
    lines = run(working, "client.mjs", tmp_path, "node", appended=pushed).splitlines()
    assert "kirosync.py" in "\n".join(lines)
    assert lines[-2:] == ["1 updated", "/no/such/file: No such file or directory"]


@pytest.mark.skipif(not shutil.which("curl"), reason="the shell client needs curl")
def test_the_curl_lines(working, tmp_path):
    answers = run(working, "client.sh", tmp_path, "bash").replace("}{", "}\n{").splitlines()
    state, pushed, queued, unknown = map(json.loads, answers)
    assert state["conversations"] == {}
    assert (pushed["status"], pushed["data"]["lastUpdate"]) == ("updated", 1710338438173)
    assert queued["status"] == "pending"
    assert unknown == {"error": "Command not found"}


def test_workflow_1_an_ide_starts_and_restores_its_state(server):
    server.ask("POST", "/sync", json={"conversations": {"c": [{"role": "user", "content": "hi", "timestamp": 1}]}})
    state = server.ask("GET", "/sync").json()
    assert state.keys() >= {"conversations", "documents", "commands", "lastUpdate"}
    assert state["conversations"]["c"][0]["content"] == "hi"


def test_workflow_2_two_ides_write_the_same_conversation_and_neither_loses_a_message(server):
    """The seed's client sends its whole copy and takes the server's when that is newer."""
    clocks = {"laptop": 1_700_000_000_000, "desktop": 1_700_007_200_000}
    copies = {name: {"conversations": {"c": []}, "documents": {}, "commands": {}} for name in clocks}
    for turn in range(6):
        name = ("laptop", "desktop")[turn % 2]
        now = clocks[name] + turn * 1000
        copies[name]["conversations"]["c"].append({"role": "user", "content": f"{name} {turn}", "timestamp": now})
        answer = server.ask("POST", "/sync", json={**copies[name], "lastUpdate": now}).json()
        assert answer["status"] in ("updated", "current")
        copies[name] = answer["data"]
    said = {message["content"] for message in server.ask("GET", "/sync").json()["conversations"]["c"]}
    assert said == {f"{('laptop', 'desktop')[turn % 2]} {turn}" for turn in range(6)}


def test_workflow_3_an_ide_submits_polls_and_shows(working):
    identity = working.ask("POST", "/command", json={"type": "execute_bash", "command": "echo listed"}).json()[
        "commandId"
    ]
    for _ in range(30):
        command = working.ask("GET", f"/command/{identity}").json()
        if command["status"] in ("completed", "failed"):
            break
        time.sleep(0.1)
    assert command["result"]["stdout"] == "listed\n"
    message = {"role": "assistant", "content": command["result"]["stdout"], "timestamp": 1}
    answer = working.ask("POST", "/sync", json={"conversations": {"c": [message]}, "lastUpdate": 2}).json()
    assert answer["data"]["conversations"]["c"] == [message]


def test_workflow_4_a_plain_agent_polls_claims_executes_and_reports(server):
    submitted = [
        server.ask("POST", "/command", json={"type": "execute_bash", "command": "x"}).json()["commandId"]
        for _ in range(3)
    ]
    commands = server.ask("GET", "/sync").json()["commands"]
    pending = [identity for identity, command in commands.items() if command["status"] == "pending"]
    assert sorted(pending) == sorted(submitted)
    for identity in pending:
        assert server.ask("PATCH", f"/command/{identity}", json={"status": "processing"}).status_code == 200
        assert server.ask("PATCH", f"/command/{identity}", json={"status": "processing"}).status_code == 409
        report = {"status": "completed", "result": {"stdout": "done", "exitCode": 0}}
        assert server.ask("PATCH", f"/command/{identity}", json=report).json()["result"] == report["result"]
    now = server.ask("GET", "/sync").json()["serverTime"] + 1
    assert server.ask("POST", "/sync", json={"lastUpdate": now}).json()["status"] == "updated"
    assert server.ask("GET", "/sync").json()["lastUpdate"] == now
