"""A command's life: cancelled, printed, typed to, sent twice; in-process, then with real agents on both links."""

import base64
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from conftest import TOKEN, Process, Server, until

import agent as program
import kirosync

BASH = {"type": "execute_bash", "command": "true"}


def queued(client, **order):
    return client.post_json("/command", {**BASH, **order}).json["commandId"]


def claimed(client, identity, **more):
    return client.patch_json(f"/command/{identity}", {"status": "processing", **more}).json


# Cancel


def test_a_pending_command_is_cancelled_at_once_and_again_without_harm(client):
    identity = queued(client)
    ended = client.post(f"/command/{identity}/cancel").json
    assert (ended["status"], ended["outcome"]) == ("failed", "cancelled")
    assert client.post(f"/command/{identity}/cancel").json == ended
    client.patch_json(f"/command/{identity}", {"status": "processing"}, status=409)


def test_a_running_command_carries_the_wish_until_its_agent_confirms(client):
    identity = queued(client)
    claimed(client, identity, agent="a", lease=45)
    asked = client.post(f"/command/{identity}/cancel").json
    assert (asked["status"], asked["cancelRequested"]) == ("processing", True)
    assert client.post(f"/command/{identity}/cancel").json == asked
    patch = {"status": "failed", "outcome": "cancelled", "agent": "a", "result": {"stdout": "so far"}}
    ended = client.patch_json(f"/command/{identity}", patch).json
    assert (ended["outcome"], ended["result"]) == ("cancelled", {"stdout": "so far"})
    assert client.post(f"/command/{identity}/cancel").json == ended


def test_what_ended_otherwise_or_is_not_there_cannot_be_cancelled(client):
    identity = queued(client)
    claimed(client, identity)
    client.patch_json(f"/command/{identity}", {"status": "completed"})
    assert "too late" in client.post(f"/command/{identity}/cancel", status=409).json["error"]
    client.post("/command/none/cancel", status=404)


def test_a_cancelled_command_does_not_go_back_to_the_queue(client, store, clock):
    handed, lost = queued(client, retryable=True), queued(client, retryable=True)
    for identity in (handed, lost):
        claimed(client, identity, agent="a", lease=45)
        client.post(f"/command/{identity}/cancel")
    ended = client.patch_json(f"/command/{handed}", {"status": "pending", "agent": "a"}).json
    assert (ended["status"], ended["outcome"]) == ("failed", "cancelled")
    clock.now += 46_000
    store.change(lambda pen: kirosync.expire(pen, [pen.get("commands", lost)], 0))
    assert client.get(f"/command/{lost}").json["outcome"] == "lost"


@pytest.mark.parametrize("mark", kirosync.MARKS)
def test_the_marks_of_the_service_cannot_be_set_by_others(client, mark):
    value = {"cancelRequested": True, "inputSize": 5, "inputClosed": True}.get(mark, "x")
    assert mark in client.post_json("/command", {**BASH, mark: value}, status=400).json["error"]
    identity = queued(client)
    assert claimed(client, identity, **{mark: value}).get(mark) != value
    client.post_json("/sync", {"commands": {"new": {**BASH, "status": "pending", mark: value}}})
    assert client.get("/command/new").json.get(mark) != value


# Idempotency-Key


def test_a_command_sent_twice_with_one_key_is_one_command(client, store):
    first = client.post_json("/command", BASH, headers={"Idempotency-Key": "k"})
    assert "Idempotent-Replayed" not in first.headers
    again = client.post_json("/command", BASH, headers={"Idempotency-Key": "k"})
    assert (again.json, again.headers["Idempotent-Replayed"]) == (first.json, "true")
    claimed(client, first.json["commandId"], metadata={"more": 1})
    client.patch_json(f"/command/{first.json['commandId']}", {"status": "completed", "result": 1})
    later = client.post_json("/command?wait=1", BASH, headers={"Idempotency-Key": "k"}).json
    assert (later["commandId"], later["status"], later["result"]) == (first.json["commandId"], "completed", 1)
    assert client.post_json("/command", BASH, headers={"Idempotency-Key": "l"}).json != first.json
    assert len(store.entries["commands"]) == 2


def test_one_key_with_another_body_is_refused_and_queues_nothing(client, store):
    identity = client.post_json("/command", BASH, headers={"Idempotency-Key": "k"}).json["commandId"]
    other = {**BASH, "command": "false"}
    refused = client.post_json("/command", other, headers={"Idempotency-Key": "k"}, status=422).json
    assert refused["commandId"] == identity
    assert len(store.entries["commands"]) == 1


def test_a_key_is_remembered_by_whoever_opens_the_directory_next(client, store, state, clock):
    identity = client.post_json("/command", BASH, headers={"Idempotency-Key": "k"}).json["commandId"]
    second = kirosync.Store(state, clock=clock)
    assert second.change(lambda pen: kirosync.queue(pen, dict(BASH), "k"))[0]["id"] == identity
    second.close()


@pytest.mark.parametrize("key", ["x" * 256, "tab\there", "grün"])
def test_a_key_that_is_none_is_refused(client, store, key):
    client.post_json("/command", BASH, headers={"Idempotency-Key": key}, status=400)
    assert not store.entries["commands"]


# Output, as agents elsewhere send it


def output(client, identity, **query):
    return client.get(f"/command/{identity}/output", query)


def append(client, identity, offset, body, status=200, **query):
    query = "".join(f"&{name}={value}" for name, value in query.items())
    path = f"/command/{identity}/output?stream=stdout&offset={offset}{query}"
    return client.post(path, body, content_type="application/octet-stream", status=status).json


@pytest.fixture
def running(client):
    """A command that is being executed in its second attempt."""
    identity = queued(client, stdin=True)
    claimed(client, identity, agent="a", claim="c")
    client.patch_json(f"/command/{identity}", {"status": "pending", "agent": "a", "claim": "c"})
    claimed(client, identity, agent="a", claim="d")
    return identity


def test_output_is_appended_once_however_often_it_is_sent(client, running):
    assert append(client, running, 0, b"one ") == {"size": 4}
    assert append(client, running, 0, b"one ") == {"size": 4}
    assert append(client, running, 2, b"e two\xff") == {"size": 8}
    assert append(client, running, 9, b"!", status=409)["size"] == 8
    got = output(client, running)
    assert (got.body, got.headers["X-Output-Next"], got.headers["X-Output-End"]) == (b"one two\xff", "8", "false")
    assert output(client, running, stream="stderr").body == b""


def test_output_is_read_from_an_offset_or_from_the_end(client, running):
    append(client, running, 0, b"0123456789")
    got = output(client, running, offset=7)
    assert (got.body, got.headers["X-Output-Offset"], got.headers["X-Output-Next"]) == (b"789", "7", "10")
    assert output(client, running, tail=2).body == b"89"
    assert output(client, running, tail=99).body == b"0123456789"
    assert output(client, running, tail=0).headers["X-Output-Next"] == "10"
    assert output(client, running, offset=10).body == b""
    assert "there are 10 bytes" in client.get(f"/command/{running}/output?offset=11", status=400).json["error"]
    client.get(f"/command/{running}/output?stream=other", status=400)
    client.get(f"/command/{running}/output?offset=-1", status=400)
    client.get("/command/none/output", status=404)


def test_output_of_an_earlier_attempt_or_another_agent_or_after_the_end_is_refused(client, running, store):
    for held in ({"attempt": 1}, {"agent": "b"}, {"claim": "c"}):
        append(client, running, 0, b"late", status=409, **held)
    append(client, running, 0, b"mine", attempt=2, agent="a", claim="d")
    client.patch_json(f"/command/{running}", {"status": "completed", "agent": "a", "claim": "d"})
    append(client, running, 4, b"late", status=409, attempt=2)
    got = output(client, running)
    assert (got.body, got.headers["X-Output-End"], got.headers["X-Command-Status"]) == (b"mine", "true", "completed")


def test_output_is_kept_up_to_its_limit_and_says_so(client, running, monkeypatch):
    monkeypatch.setattr(kirosync, "OUTPUT_BYTES", 10)
    assert append(client, running, 0, b"12345678") == {"size": 8}
    assert append(client, running, 8, b"90abc") == {"size": 10, "truncated": True}
    assert append(client, running, 13, b"more") == {"size": 10, "truncated": True}
    assert output(client, running).body == b"1234567890"


def test_of_a_command_without_an_output_file_the_result_is_read(client):
    identity = queued(client)
    claimed(client, identity)
    client.patch_json(f"/command/{identity}", {"status": "completed", "result": {"stdout": "größe", "exitCode": 0}})
    got = output(client, identity, offset=2)
    assert (got.body, got.headers["X-Output-End"]) == ("größe".encode()[2:], "true")


@pytest.mark.parametrize("how", ["delete", "rm"])
def test_the_output_of_a_removed_command_is_removed(client, store, state, running, how):
    append(client, running, 0, b"x")
    client.post_json(f"/command/{running}/input", {"data": "y"})
    assert len([*(state / "output").iterdir()]) == 2
    client.patch_json(f"/command/{running}", {"status": "completed", "agent": "a", "claim": "d"})
    if how == "delete":
        client.delete(f"/command/{running}")
    else:
        (state / "commands" / f"{running}.json").unlink()
        store.notice(None)
    assert not [*(state / "output").iterdir()]


# Input


def test_input_is_added_once_however_often_it_is_sent_and_closed(client, running, state):
    send = f"/command/{running}/input"
    assert client.post_json(send, {"data": "eins "}).json == {"size": 5, "closed": False}
    assert client.post_json(send, {"data": "zwei", "offset": 5}).json == {"size": 9, "closed": False}
    assert client.post_json(send, {"data": "zwei", "offset": 5}).json == {"size": 9, "closed": False}
    client.post_json(send, {"data": "!", "offset": 11}, status=409)
    assert "other bytes" in client.post_json(send, {"data": "drei", "offset": 5}, status=409).json["error"]
    raw = base64.b64encode(b"\xff").decode()
    assert client.post_json(send, {"data": raw, "encoding": "base64", "close": True}).json == {
        "size": 10,
        "closed": True,
    }
    assert client.post_json(send, {"close": True}).json == {"size": 10, "closed": True}
    assert "was closed" in client.post_json(send, {"data": "more"}, status=409).json["error"]
    assert client.post_json(send, {"data": raw, "encoding": "base64", "offset": 9}).json["size"] == 10
    assert output(client, running, stream="stdin").body == b"eins zwei\xff"


def test_input_is_refused_to_who_reads_none(client, running):
    identity = queued(client)
    assert '"stdin": true' in client.post_json(f"/command/{identity}/input", {"data": "x"}, status=409).json["error"]
    client.post_json("/command/none/input", {"data": "x"}, status=404)
    client.post_json(f"/command/{running}/input", {"data": "?", "encoding": "base64"}, status=400)
    client.post_json(f"/command/{running}/input", {"data": 5}, status=400)
    client.patch_json(f"/command/{running}", {"status": "completed", "agent": "a", "claim": "d"})
    assert "has ended" in client.post_json(f"/command/{running}/input", {"data": "x"}, status=409).json["error"]


def test_input_that_was_not_acknowledged_does_not_count(client, running, store, state, monkeypatch):
    client.post_json(f"/command/{running}/input", {"data": "one "})

    def full(self, lines):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kirosync.Journal, "enter", full)
    client.post_json(f"/command/{running}/input", {"data": "lost and long"}, status=507)
    monkeypatch.undo()
    assert client.post_json(f"/command/{running}/input", {"data": "two"}).json["size"] == 7
    assert output(client, running, stream="stdin").body == b"one two"


def test_a_command_reads_no_more_than_its_limit(client, running, monkeypatch):
    monkeypatch.setattr(kirosync, "INPUT_BYTES", 4)
    client.post_json(f"/command/{running}/input", {"data": "12345"}, status=413)
    client.post_json(f"/command/{running}/input", {"data": "1234"})


def test_a_question_is_answered_by_one_patch(client):
    identity = client.post_json("/command", {"type": "user_input", "prompt": "well?"}).json["commandId"]
    ended = client.patch_json(f"/command/{identity}", {"status": "completed", "result": {"value": "yes"}}).json
    assert (ended["status"], ended["outcome"], ended["result"]) == ("completed", "ok", {"value": "yes"})


# Really running, over both links


def start_command(agent, command, **more):
    order = {"type": "execute_bash", "command": command, **more}
    return agent.ask("POST", "/command", json=order).json()["commandId"]


def printed(agent, identity, offset=0, stream="stdout", wait=20):
    """The output from *offset* on, as soon as there is some."""
    return agent.ask("GET", f"/command/{identity}/output?stream={stream}&offset={offset}&wait={wait}")


def ended(agent, identity, wait=40):
    return agent.ask("GET", f"/command/{identity}?wait={wait}").json()


def alive(mark):
    """The processes that have *mark* in their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "cmdline").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


FAMILY = """
sleep {mark}1 &
setsid sleep {mark}2 &
(env -i setsid sh -c 'sleep {mark}3 & exit' &)
(setsid nohup bash -c 'sleep {mark}4; true' >/dev/null 2>&1 </dev/null &)
echo ready; sleep {mark}5; echo not reached
"""


def test_a_cancelled_command_is_gone_with_all_that_it_started(agent):
    mark = f"77{os.getpid()}"
    identity = start_command(agent, FAMILY.format(mark=mark))
    assert printed(agent, identity).content == b"ready\n"
    until(lambda: len(alive(f"sleep\0{mark}")) == 5)
    asked = time.monotonic()
    agent.ask("POST", f"/command/{identity}/cancel")
    done = ended(agent, identity)
    assert time.monotonic() - asked < 1.5
    assert not alive(mark)
    assert (done["status"], done["outcome"], done["error"]) == ("failed", "cancelled", "cancelled on request")
    assert (done["result"]["stdout"], done["result"]["exitCode"]) == ("ready\n", 130)


DEAF = """trap '' INT TERM
setsid bash -c "trap '' INT TERM HUP; echo deaf >&2; while :; do sleep 0.{mark}; done" &
echo me too; while :; do sleep 0.{mark}; done"""


def test_who_ignores_the_gentle_signals_is_killed_within_the_grace(agent):
    mark = f"2{os.getpid()}"
    identity = start_command(agent, DEAF.format(mark=mark), timeout=1)
    done = ended(agent, identity)
    assert (done["outcome"], done["error"]) == ("timeout", "timed out after 1 s and was ended")
    assert (done["result"]["stdout"], done["result"]["stderr"]) == ("me too\n", "deaf\n")
    assert 7_900 < done["result"]["durationMs"] < 12_000
    assert not alive(mark)


def test_a_command_that_ends_in_its_own_way_when_told_to_keeps_its_last_words(agent):
    identity = start_command(agent, "trap 'echo bye; exit 7' INT; echo ready; while :; do sleep 0.05; done")
    printed(agent, identity)
    agent.ask("POST", f"/command/{identity}/cancel")
    done = ended(agent, identity)
    assert (done["outcome"], done["result"]["stdout"], done["result"]["exitCode"]) == ("cancelled", "ready\nbye\n", 7)


def test_a_search_can_be_cancelled_too(agent, tmp_path):
    (tmp_path / "f.txt").write_text("a" * 40 + "b\na\n")
    order = {"type": "code_search", "query": "(a+)+$", "regex": True, "path": str(tmp_path)}
    identity = agent.ask("POST", "/command", json=order).json()["commandId"]
    until(lambda: agent.ask("GET", f"/command/{identity}").json()["status"] == "processing")
    time.sleep(0.3)
    agent.ask("POST", f"/command/{identity}/cancel")
    assert ended(agent, identity)["outcome"] == "cancelled"


def test_output_is_there_while_the_command_runs_and_each_stream_apart(agent):
    identity = start_command(agent, "printf 'a\\377'; sleep 0.6; printf b >&2; sleep 0.6; printf c; sleep 0.5")
    first = printed(agent, identity)
    assert (first.content, first.headers["X-Output-Next"]) == (b"a\xff", "2")
    assert first.headers["X-Output-End"] == "false"
    assert printed(agent, identity, stream="stderr").content == b"b"
    second = printed(agent, identity, offset=2)
    assert (second.content, second.headers["X-Output-End"]) == (b"c", "false")
    last = printed(agent, identity, offset=3)
    assert (last.content, last.headers["X-Output-End"]) == (b"", "true")


def test_output_reaches_who_waits_soon_after_it_was_written(agent):
    identity = start_command(agent, "for i in 1 2 3 4 5; do sleep 0.4; echo $EPOCHREALTIME; done")
    offset, delays = 0, []
    while (got := printed(agent, identity, offset)).headers["X-Output-End"] != "true" or got.content:
        delays += [time.time() - float(line) for line in got.content.split()]
        offset = int(got.headers["X-Output-Next"])
    assert len(delays) == 5
    assert sorted(delays)[2] < 0.3


def test_the_output_file_can_be_followed(agent, state):
    identity = start_command(agent, "echo one; sleep 1; echo two; sleep 1")
    path = state / "output" / f"{identity}.out"
    until(lambda: path.exists() and path.read_bytes() == b"one\n")
    until(lambda: path.read_bytes() == b"one\ntwo\n")
    assert ended(agent, identity)["result"]["stdout"] == "one\ntwo\n"


def test_a_command_that_prints_a_gigabyte_fills_nothing(agent, state):
    identity = start_command(agent, "head -c 1000000000 /dev/zero; echo end")
    done = ended(agent, identity, 55)
    assert done["result"]["size"] == {"stdout": 1_000_000_004, "stderr": 0}
    assert done["result"]["truncated"]
    assert done["result"]["stdout"].endswith("\0end\n")
    assert (state / "output" / f"{identity}.out").stat().st_size == kirosync.OUTPUT_BYTES
    tail = agent.ask("GET", f"/command/{identity}/output?tail=10")
    assert (tail.content, tail.headers["X-Output-Next"]) == (bytes(10), str(kirosync.OUTPUT_BYTES))
    assert (tail.headers["X-Output-Truncated"], tail.headers["X-Output-End"]) == ("true", "true")
    whole = agent.ask("GET", f"/command/{identity}/output")
    assert len(whole.content) == kirosync.OUTPUT_BYTES


def test_a_command_reads_what_is_sent_until_it_is_closed(agent):
    identity = start_command(agent, "while read -r line; do echo got $line; done; echo end", stdin=True)
    for word in ("eins", "zwei"):
        agent.ask("POST", f"/command/{identity}/input", json={"data": f"{word}\n"})
    until(lambda: printed(agent, identity).content == b"got eins\ngot zwei\n")
    agent.ask("POST", f"/command/{identity}/input", json={"data": "drei\n", "close": True})
    assert ended(agent, identity)["result"]["stdout"] == "got eins\ngot zwei\ngot drei\nend\n"


def test_input_larger_than_a_pipe_arrives_whole(agent):
    identity = start_command(agent, "sleep 0.5; sha256sum", stdin=True)
    text = "0123456789abcdef" * 200_000
    for part in (text[:1_600_000], text[1_600_000:]):
        agent.ask("POST", f"/command/{identity}/input", json={"data": part})
    agent.ask("POST", f"/command/{identity}/input", json={"close": True})
    assert ended(agent, identity)["result"]["stdout"].split()[0] == hashlib.sha256(text.encode()).hexdigest()


def test_input_that_nobody_reads_holds_nothing(agent):
    identity = start_command(agent, "exec 0<&-; sleep 1; echo done", stdin=True)
    agent.ask("POST", f"/command/{identity}/input", json={"data": "x" * 500_000, "close": True})
    assert ended(agent, identity)["result"]["stdout"] == "done\n"


def test_a_command_gets_a_terminal_if_it_wants_one(agent):
    command = (
        "test -t 0 && test -t 1 && test -t 2 && echo all; stty size; stty -echo; read -r line; echo hello $line; cat"
    )
    identity = start_command(agent, command, pty=True, stdin=True, columns=101, rows=7)
    until(lambda: b"7 101" in printed(agent, identity).content)
    agent.ask("POST", f"/command/{identity}/input", json={"data": "you\nmore", "close": True})
    done = ended(agent, identity)
    assert done["result"]["stdout"].replace("\r", "") == "all\n7 101\nhello you\nmore"
    assert done["result"]["stderr"] == ""
    without = ended(agent, start_command(agent, "test -t 1 && echo out; cat", pty=True))
    assert without["result"]["stdout"] == "out\r\n"


def test_a_terminals_interrupt_is_heard(agent):
    identity = start_command(agent, "echo ready; sleep 60", pty=True, stdin=True)
    printed(agent, identity)
    agent.ask("POST", f"/command/{identity}/input", json={"data": "\x03"})
    assert ended(agent, identity)["result"]["exitCode"] == 130


def test_signals_and_descriptors_of_the_agent_are_not_its_childrens(agent):
    command = "ls -l /proc/self/fd | wc -l; trap -p; kill -INT $$; echo not reached"
    done = ended(agent, start_command(agent, command))
    assert (done["result"]["stdout"], done["result"]["exitCode"]) == ("5\n", 130)  # a heading, 0, 1, 2 and ls's own


# Agents and services that die


def processing(server, identity):
    return server.ask("GET", f"/command/{identity}").json()["status"] == "processing"


def test_nothing_of_a_command_outlives_its_killed_agent(server, state, tmp_path, start):
    agent = start(Process, "agent.py", "--state", state, "--name", "a", log=tmp_path / "agent.log")
    mark = f"88{os.getpid()}"
    identity = start_command(server, FAMILY.format(mark=mark))
    printed(server, identity)
    until(lambda: alive(mark))
    agent.end(9)
    until(lambda: not alive(mark), 2)
    start(Process, "agent.py", "--state", state, "--name", "a", log=tmp_path / "agent.log")
    done = ended(server, identity)
    assert done["outcome"] == "lost"
    assert printed(server, identity).content == b"ready\n"


def test_the_second_attempt_adds_to_what_the_first_has_printed(server, state, tmp_path, start):
    (tmp_path / "token").write_text(TOKEN)
    for name, link in (
        ("near", ("--state", state)),
        ("far", ("--server", server.url, "--token-file", tmp_path / "token")),
    ):
        argv = ("agent.py", *link, "--name", name)
        agent = start(Process, *argv, log=tmp_path / "agent.log")
        command = f"test -e {tmp_path}/{name} || {{ touch {tmp_path}/{name}; echo first; sleep 60; }}; echo second"
        identity = start_command(server, command, retryable=True, target=name)
        assert printed(server, identity).content == b"first\n"
        agent.end(9)
        agent = start(Process, *argv, log=tmp_path / "agent.log")
        done = ended(server, identity)
        assert (done["outcome"], done["attempt"], done["result"]["stdout"]) == ("ok", 2, "second\n")
        assert printed(server, identity).content == b"first\nsecond\n"
        agent.end()


def test_output_over_http_outlives_the_service(state, tmp_path, start):
    server = start(Server, state, tmp_path / "log")
    (tmp_path / "token").write_text(TOKEN)
    link = ("--server", server.url, "--token-file", tmp_path / "token")
    start(Process, "agent.py", *link, "--name", "far", log=tmp_path / "agent.log")
    identity = start_command(server, "for i in $(seq 60); do echo line $i; sleep 0.05; done")
    read = printed(server, identity).content
    server.end(9)
    time.sleep(1)
    second = start(Server, state, tmp_path / "log", "--port", server.url.rsplit(":", 1)[1])
    while (got := printed(second, identity, len(read))).headers["X-Output-End"] != "true" or got.content:
        read += got.content
    assert read.decode() == "".join(f"line {number}\n" for number in range(1, 61))
    assert ended(second, identity)["outcome"] == "ok"


def test_an_agent_whose_fork_server_was_killed_stops(server, state, tmp_path, start):
    agent = start(Process, "agent.py", "--state", state, "--name", "a", log=tmp_path / "agent.log")
    until(lambda: "agent a at" in (tmp_path / "agent.log").read_text())
    children = Path(f"/proc/{agent.popen.pid}/task/{agent.popen.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    time.sleep(0.2)
    subprocess.run(["pkill", "-9", "-P", children[0]], check=False)
    for _ in range(2):  # one supervisor was ready
        done = ended(server, start_command(server, "true"), 5)
    assert "fork server is gone" in done.get("error", "")
    assert agent.popen.wait(10) == 1
    assert (tmp_path / "agent.log").read_text().endswith("agent: stopped: its fork server is gone\n")


def test_supervisors_do_not_outlive_a_stopped_agent(state, tmp_path, start):
    agent = start(Process, "agent.py", "--state", state, "--name", "leaver", log=tmp_path / "agent.log")
    until(lambda: "agent leaver at" in (tmp_path / "agent.log").read_text())
    assert len(alive("leaver")) >= 3
    assert agent.end() == 0
    until(lambda: not alive("leaver"), 3)


def test_a_thousand_short_commands_are_not_held_up_by_long_ones(server, state, tmp_path, start):
    start(Process, "agent.py", "--state", state, "--jobs", "10", log=tmp_path / "agent.log")
    long = [start_command(server, "sleep 300") for _ in range(6)]
    until(lambda: all(processing(server, identity) for identity in long))
    short = [start_command(server, f"echo {number}") for number in range(100)]
    for number, identity in enumerate(short):
        assert ended(server, identity)["result"]["stdout"] == f"{number}\n"
    for identity in long:
        server.ask("POST", f"/command/{identity}/cancel")
    assert {ended(server, identity)["outcome"] for identity in long} == {"cancelled"}


def test_a_cancel_that_meets_the_end_leaves_no_doubt_how_it_ended(agent):
    outcomes = set()

    def race(number):
        for round_ in range(25):
            identity = start_command(agent, "sleep 0.05")
            time.sleep(0.03 + (number + round_) % 5 / 100)
            agent.ask("POST", f"/command/{identity}/cancel")
            outcomes.add(ended(agent, identity)["outcome"])

    threads = [threading.Thread(target=race, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes <= {"ok", "cancelled"}


def test_a_command_that_kills_its_supervisor_is_lost_and_leaves_nothing(agent, tmp_path):
    mark = f"99{os.getpid()}"
    done = ended(agent, start_command(agent, f"setsid sleep {mark}1 & kill -9 $PPID; sleep {mark}2"))
    assert (done["status"], done["outcome"]) == ("failed", "lost")
    assert not alive(mark)
    once = f"test -e {tmp_path}/once || {{ touch {tmp_path}/once; kill -9 $PPID; sleep 9; }}; echo again"
    done = ended(agent, start_command(agent, once, retryable=True))
    assert (done["outcome"], done["attempt"], done["result"]["stdout"]) == ("ok", 2, "again\n")


def test_a_command_that_stops_its_supervisor_still_ends(agent):
    mark = f"66{os.getpid()}"
    done = ended(agent, start_command(agent, f"kill -STOP $PPID; sleep {mark}", timeout=1))
    assert (done["outcome"], done["result"]["exitCode"]) == ("timeout", 130)
    stopped = "kill -STOP $(ps -o ppid= -p $PPID); true"
    assert ended(agent, start_command(agent, stopped))["outcome"] == "ok"
    outcomes = {ended(agent, start_command(agent, "true", timeout=1))["outcome"] for _ in range(3)}
    assert outcomes <= {"ok", "timeout"}
    assert not alive(mark)


def test_a_command_that_cannot_be_started_leaves_no_descriptor_open(server, state, tmp_path, start):
    agent = start(Process, "agent.py", "--state", state, "--name", "a", log=tmp_path / "agent.log")
    opened = Path(f"/proc/{agent.popen.pid}/fd")
    counts = []
    for pty in (False, True):
        for _ in range(6):
            done = ended(server, start_command(server, "true;" + "#" * 140_000, stdin=True, pty=pty))
            assert (done["outcome"], done["error"].partition(" (")[0]) == (
                "error",
                "command and env are too long to be passed on",
            )
            counts.append(len([*opened.iterdir()]))
    assert counts[-1] <= counts[3]


def test_an_agent_over_http_leaves_no_file_behind(server, tmp_path, start):
    (tmp_path / "token").write_text(TOKEN)
    argv = ("agent.py", "--server", server.url + "/", "--token-file", tmp_path / "token", "--name", "tidy")
    environment = {"TMPDIR": str(tmp_path)}
    agent = start(Process, *argv, log=tmp_path / "agent.log", environment=environment)
    ended(server, start_command(server, "head -c 3000000 /dev/zero"))
    spool = next(tmp_path.glob("kirosync-*/*/tidy.output"))
    assert not [*spool.iterdir()]
    identity = start_command(server, "echo x; sleep 60")
    printed(server, identity)
    agent.end(9)
    assert [*spool.iterdir()]
    argv = ("agent.py", "--server", server.url, *argv[3:])  # without the slash: the same service
    start(Process, *argv, log=tmp_path / "agent.log", environment=environment)
    assert ended(server, identity)["outcome"] == "lost"
    assert not [*spool.iterdir()]
    twin = start(Process, *argv, log=tmp_path / "twin.log", environment=environment)
    assert twin.popen.wait(20) == 1


# Time and space


@pytest.fixture
def sweeping(store):
    """A service whose sweep is running."""
    service = kirosync.Service(store, kirosync.Keyring(store.directory, TOKEN))
    thread = threading.Thread(target=service.sweep)
    thread.start()
    yield service
    store.release()
    thread.join()


def test_a_clock_that_jumps_ends_no_lease(client, store, clock, sweeping):
    identity = queued(client)
    claimed(client, identity, agent="a", lease=45)
    time.sleep(kirosync.SWEEP_S * 1.5)
    clock.now += 3_600_000
    client.post_json("/sync", {"documents": {"d": {"content": "x", "timestamp": 1}}})
    time.sleep(kirosync.SWEEP_S * 1.5)
    assert client.get(f"/command/{identity}").json["status"] == "processing"


def test_a_disk_that_was_full_gives_agents_the_time_to_report(client, store, clock, sweeping, monkeypatch):
    identity = queued(client)
    claimed(client, identity, agent="a", lease=1)

    def full(self, lines):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kirosync.Journal, "enter", full)
    clock.now += 5000
    time.sleep(kirosync.SWEEP_S * 2.5)
    monkeypatch.undo()
    time.sleep(kirosync.SWEEP_S * 1.5)
    assert client.get(f"/command/{identity}").json["status"] == "processing"
    done = client.patch_json(f"/command/{identity}", {"status": "completed", "agent": "a"}).json
    assert done["outcome"] == "ok"


def test_output_leaves_room_on_the_disk_for_how_commands_end(client, running, monkeypatch, state):
    monkeypatch.setattr(kirosync, "RESERVE_BYTES", 1 << 60)
    assert append(client, running, 0, b"12345") == {"size": 0, "truncated": True}
    client.patch_json(f"/command/{running}", {"status": "completed", "agent": "a", "claim": "d"})


@pytest.mark.parametrize("field", ["pty", "rows", "stdin", "limit", "append", "path"])
def test_what_was_ordered_cannot_be_changed_by_a_report(client, field):
    identity = queued(client)
    assert field in client.patch_json(f"/command/{identity}", {field: 1}, status=409).json["error"]


def test_a_file_put_there_by_hand_that_no_agent_could_execute_is_set_aside(server, state, tmp_path, start):
    start(Process, "agent.py", "--state", state, "--name", "a", log=tmp_path / "agent.log")
    odd = {"type": "execute_bash", "command": 5, "status": "pending"}
    (state / "commands" / "odd.json").write_text(json.dumps(odd))
    until(lambda: [*(state / "quarantine").glob("commands.odd.*.reason")])
    assert server.run(type="execute_bash", command="true")["outcome"] == "ok"


def test_output_is_kept_no_further_when_the_disk_is_nearly_full(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "RESERVE_BYTES", 1 << 60)
    capture = program.Capture(100, tmp_path / "out")
    capture.add(b"12345")
    capture.close()
    assert (capture.text(), (tmp_path / "out").read_bytes()) == ("12345", b"")


def test_a_pending_command_is_cancelled_by_hand_too(client, store, state):
    identity = queued(client)
    path = state / "commands" / f"{identity}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cancelRequested": True}))
    store.notice(None)
    assert client.get(f"/command/{identity}").json["outcome"] == "cancelled"


def test_an_agent_takes_no_order_that_was_given_up_before_it_was_started(tmp_path):
    """As it is when no process could be forked for a while: the order waits, and its run is ended meanwhile."""
    forks = program.ForkServer()
    children = f"/proc/{forks.pid}/task/{forks.pid}/children"
    until(lambda: Path(children).read_text())
    waiting = [forks.pid, *map(int, Path(children).read_text().split())]
    program.signal_all(waiting, signal.SIGSTOP)
    nothing = os.open(os.devnull, os.O_RDWR)
    order = {"argv": ["/bin/touch", str(tmp_path / "ran")], "cwd": "/", "env": {}}
    line = forks.start(order, [nothing] * 3)
    line.send(b"end")
    program.signal_all(waiting, signal.SIGCONT)
    assert json.loads(program.hear(line)) == program.UNSTARTED
    assert not (tmp_path / "ran").exists()
    os.close(nothing)
    line.close()
    forks.close()
