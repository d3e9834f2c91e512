"""Who changed what: the audit log, which vouches for itself, and the access log beside it."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TOKEN, Process, until

import agent as program
import kirosync

BASH = {
    "type": "execute_bash",
    "command": "echo out-of-the-command; exit 3",
    "env": {"PLAIN": "value-of-the-environment"},
}
PUSH = {"documents": {"d": {"content": "content-of-the-document", "timestamp": 1}}}


def entered(folder):
    return [json.loads(line) for path in files(folder) for line in path.read_text().splitlines()]


def files(folder):
    return [*sorted(folder.glob("audit-*.jsonl")), *folder.glob("audit.jsonl")]


def verify(state, *argv):
    argv = [sys.executable, "kirosync.py", "audit", "verify", "--state", state, *argv]
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def begun():
    """Begin to audit a store, as a service does that starts; until the test ends."""
    audits = []

    def begun(store):
        audits.append(kirosync.Audit(store, store.directory / "log"))
        return audits[-1]

    yield begun
    for audit in audits:
        audit.close()


@pytest.fixture
def audit(store, begun):
    return begun(store)


def change(store, *names, by=""):
    for name in names:
        kirosync.BY.set(by)
        document = {"content": name, "timestamp": 1}
        store.change(lambda pen, name=name, document=document: pen.put("documents", name, document))
    kirosync.BY.set("")


def test_every_change_and_every_execution_is_a_line_that_says_who_from_where_and_how_it_ended(agent, state):
    ended = agent.run(**BASH)
    agent.ask("POST", "/sync", json=PUSH)
    agent.ask("DELETE", "/document/d")
    lines = until(lambda: (found := entered(state / "log"))[-1:] and found[-1]["op"] == "delete" and found)
    mine = [line for line in lines if line["id"] == ended["commandId"]]
    assert (mine[0]["kind"], mine[0]["status"]) == ("commands", "pending")
    assert (mine[-1]["status"], mine[-1]["outcome"], mine[-1]["type"]) == ("failed", "exit", "execute_bash")
    assert (mine[0]["by"], mine[0]["from"]) == ("master", "127.0.0.1")
    executing = (mine[-1]["by"], mine[-1]["from"])
    assert executing in (("master", "127.0.0.1"), ("agent", ""))  # over http, and beside the service
    changes = [(line["kind"], line["id"], line["op"]) for line in lines if line["kind"] == "documents"]
    assert changes == [("documents", "d", "put"), ("documents", "d", "delete")]


def test_the_hash_of_a_command_is_the_one_that_a_human_is_asked_about():
    command = {"id": "c", **BASH, "timeout": 5, "workingDir": "/", "status": "pending", "metadata": {"a": 1}}
    assert kirosync.hash_of(command) == program.sha256_of(command)
    assert kirosync.hash_of({**command, "command": "true"}) != kirosync.hash_of(command)
    for kind in ("read_file", "write_file", "list_directory", "aws_operation", "code_search"):
        required, optional, _ = kirosync.ORDERS[kind]
        full = {"id": "c", "type": kind, **dict.fromkeys((*required, *optional, "timeout", "workingDir"), 1)}
        assert kirosync.hash_of(full) == program.sha256_of(full)


def test_no_token_no_content_and_no_environment_is_in_either_log(agent, state):
    agent.ask("POST", "/sync", json=PUSH)
    agent.ask("GET", "/commands?token=in-the-query")
    agent.ask("GET", "/sync", headers={"Authorization": "Bearer some-other-token"})
    agent.run(**BASH)
    until(lambda: len(entered(state / "log")) >= 4)
    text = "".join(path.read_text() for path in (state / "log").iterdir())
    assert "/commands" in text
    secrets = (TOKEN, "some-other-token", "in-the-query", "content-of-the-document", "value-of-the-environment")
    for secret in (*secrets, "out-of-the-command"):
        assert secret not in text


def accessed(state):
    """The lines of the access log."""
    file = state / "log" / "access.log"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_the_access_log_is_written_when_there_is_enough_and_at_the_end(copied, state):
    server = copied(ACCESS_LINES=3, AUDIT_S=600)
    paths = [f"/command/{number}" for number in range(7)]
    for path in paths:
        server.ask("GET", path)
    until(lambda: len(accessed(state)) == 6)
    assert server.end() == 0
    assert [line["path"] for line in accessed(state)] == paths
    assert [line["at"] for line in accessed(state)] == sorted(line["at"] for line in accessed(state))


def test_the_access_log_has_a_line_for_each_request(server, state):
    answer = server.ask("GET", "/commands")
    server.ask("GET", "/nowhere")
    server.ask("POST", "/sync", headers={"Authorization": "Bearer x"}, data="12345")
    lines = until(lambda: len(found := accessed(state)) >= 3 and found, 5)
    said = [[line[key] for key in ("by", "from", "method", "path", "status", "received")] for line in lines]
    assert said == [
        ["master", "127.0.0.1", "GET", "/commands", 200, 0],
        ["master", "127.0.0.1", "GET", "/nowhere", 404, 0],
        ["", "127.0.0.1", "POST", "/sync", 401, 5],
    ]
    assert (lines[0]["requestId"], lines[0]["bytes"]) == (answer.headers["X-Request-Id"], len(answer.content))


def test_what_is_done_by_hand_is_said_to_be(store, state, audit):
    (state / "documents" / "h.json").write_text('{"content": "by hand"}\n')
    store.clock.now += 10_000_000_000
    store.notice(None)
    audit.follow()
    assert [(line["id"], line["by"]) for line in entered(state / "log")] == [("h", "hand")]


def test_each_line_has_the_hash_of_the_one_before(store, state, audit):
    change(store, "a", "b", "c", by="laptop@2001:db8::1")
    audit.follow()
    raw = (state / "log" / "audit.jsonl").read_bytes().splitlines()
    lines = [json.loads(line) for line in raw]
    assert [line["previous"] for line in lines] == ["", *(kirosync.digest(line) for line in raw[:-1])]
    assert [line["seq"] for line in lines] == [1, 2, 3]
    assert {(line["by"], line["from"]) for line in lines} == {("laptop", "2001:db8::1")}
    assert verify(state).stdout == "3 lines, each as it was written\n"


SPOILED = {
    "a line is changed": (
        lambda lines: [lines[0], lines[1].replace("documents", "Documents"), *lines[2:]],
        "line 2 was changed",
    ),
    "the last is changed": (lambda lines: [*lines[:-1], lines[-1].replace('"by"', '"By"')], "line 5 was changed"),
    "a line is removed": (lambda lines: [*lines[:2], *lines[3:]], "line 3 is number 4 where 3 should be"),
    "the first is removed": (lambda lines: lines[1:], "the lines 1 to 1 are missing"),
    "the last is removed": (lambda lines: lines[:-1], "the lines 5 to 5 are missing at its end"),
    "two change places": (
        lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
        "line 2 is number 3 where 2 should be",
    ),
    "one is written twice": (lambda lines: [*lines[:2], *lines[1:]], "line 3 is number 2 where 3 should be"),
    "one is no JSON": (lambda lines: [lines[0], "{", *lines[2:]], "line 2 was changed: it is no line of the log"),
    "all is removed": (lambda lines: [], "the lines 1 to 5 are missing at its end"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_verify_finds_the_first_line_that_was_changed_or_removed(store, state, audit, how):
    change(store, "a", "b", "c", "d", "e")
    audit.follow()
    path, (spoil, said) = state / "log" / "audit.jsonl", SPOILED[how]
    path.write_text("".join(f"{line}\n" for line in spoil(path.read_text().splitlines())))
    found = verify(state)
    assert found.returncode == 1
    assert said in found.stderr


def test_a_new_file_is_begun_and_the_oldest_goes_and_the_log_says_so(store, state, audit, begun, monkeypatch):
    monkeypatch.setattr(kirosync, "AUDIT_BYTES", 1000)
    monkeypatch.setattr(kirosync, "AUDIT_FILES", 2)
    for number in range(20):
        change(store, f"{number}")
        audit.follow()
    assert len(files(state / "log")) == 3
    lines = entered(state / "log")
    assert lines[0]["seq"] > 1
    assert [line["seq"] for line in lines] == [*range(lines[0]["seq"], lines[-1]["seq"] + 1)]
    assert [line["kind"] for line in lines if line["op"] == "prune"][-1:] == ["audit"]
    assert verify(state).returncode == 0, verify(state).stderr
    files(state / "log")[0].unlink()
    assert "are missing, and nothing says that they were pruned" in verify(state).stderr
    assert begun(store).known == audit.known


def test_what_a_crash_kept_from_the_log_is_entered_at_the_next_start(store, state, audit, begun):
    change(store, "a")
    audit.follow()
    change(store, "b", "c", by="phone@192.0.2.1")  # and the service is killed
    with open(state / "log" / "audit.jsonl", "a") as log:
        log.write('{"seq":2,"previous":"torn')
    begun(store).follow()
    assert [(line["id"], line["by"]) for line in entered(state / "log")] == [
        ("a", "service"),
        ("b", "phone"),
        ("c", "phone"),
    ]
    assert verify(state).returncode == 0


def test_a_last_line_that_lacks_but_its_end_is_written_anew(store, state, audit, begun):
    change(store, "a", "b")
    audit.follow()
    path = state / "log" / "audit.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    (state / "audit.json").unlink()
    kept = path.read_bytes().splitlines()[0]
    position = kirosync.Position(1, kirosync.digest(kept), json.loads(kept)["revision"])
    store.remember("audit", kirosync.msgspec.json.encode(position))
    begun(store).follow()
    assert [line["id"] for line in entered(state / "log")] == ["a", "b"]
    assert verify(state).returncode == 0, verify(state).stderr


def test_no_log_at_all_is_not_a_whole_one(tmp_path):
    found = verify(tmp_path / "nowhere")
    assert (found.returncode, "there is no audit log" in found.stderr) == (1, True)


def test_nothing_is_entered_twice_when_the_crash_came_before_the_position_was_kept(store, state, audit, begun):
    change(store, "a")
    audit.follow()
    position = (state / "audit.json").read_bytes()
    change(store, "b")
    audit.follow()
    (state / "audit.json").write_bytes(position)
    change(store, "c")
    begun(store).follow()
    assert [line["id"] for line in entered(state / "log")] == ["a", "b", "c"]
    assert verify(state).returncode == 0


def test_a_log_that_was_cut_while_nothing_ran_is_not_continued_as_if_whole(store, state, audit, begun, caplog):
    change(store, "a", "b", "c")
    audit.follow()
    path = state / "log" / "audit.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:1]))
    after = begun(store)
    change(store, "d")
    after.follow()
    assert "the audit log has lost the lines 2 to 3" in caplog.text
    assert [line["seq"] for line in entered(state / "log")] == [1, 4]
    assert "line 2 is number 4 where 2 should be" in verify(state).stderr


def test_a_journal_that_is_compacted_takes_nothing_from_the_log(store, state, audit, begun, monkeypatch):
    monkeypatch.setattr(kirosync, "SLACK_LINES", 0)
    for number in range(20):
        store.change(lambda pen, number=number: pen.put("documents", "d", {"content": str(number), "timestamp": 1}))
        if number == 5:
            audit.follow()
    assert store.compact(audit.place)
    assert store.compact(audit.place) is False  # it is another file, which has not been looked at
    change(store, "last")
    begun(store).follow()  # the service was killed before it had read the rest of the journal that was
    assert [line["id"] for line in entered(state / "log")] == ["d"] * 20 + ["last"]


def test_a_log_that_cannot_be_written_waits_and_then_has_it_all(store, state, audit, monkeypatch):
    change(store, "a")
    write = kirosync.os.fdatasync
    monkeypatch.setattr(kirosync.os, "fdatasync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        audit.follow()
    assert (state / "log" / "audit.jsonl").read_bytes() == b""
    monkeypatch.setattr(kirosync.os, "fdatasync", write)
    change(store, "b")
    audit.follow()
    assert [line["id"] for line in entered(state / "log")] == ["a", "b"]


def test_a_state_begun_anew_goes_on_in_the_log_of_the_one_before(store, state, audit, begun, tmp_path):
    change(store, "a", "b", "c")
    audit.follow()
    other = kirosync.Store(tmp_path / "other")
    shutil.copytree(state / "log", tmp_path / "other" / "log")
    change(other, "new")
    begun(other).follow()
    assert [line["id"] for line in entered(tmp_path / "other" / "log")] == ["a", "b", "c", "new"]
    assert verify(tmp_path / "other").returncode == 0
    other.close()


def test_a_change_of_the_tokens_is_in_the_log(server, state):
    argv = [sys.executable, "kirosync.py", "token"]
    subprocess.run([*argv, "add", "x", "--scope", "read", "--state", state], cwd=ROOT, check=True, capture_output=True)
    subprocess.run([*argv, "revoke", "x", "--state", state], cwd=ROOT, check=True, capture_output=True)
    lines = until(lambda: len(found := entered(state / "log")) == 2 and found)
    assert [(line["kind"], line["id"], line["op"], line["from"]) for line in lines] == [
        ("tokens", "x", "add", "console"),
        ("tokens", "x", "revoke", "console"),
    ]


def test_logs_may_be_elsewhere(state, tmp_path, start):
    command = ["kirosync.py", "serve", "--port", "0", "--state", state, "--log", tmp_path / "logs"]
    service = start(Process, *command, environment={"KIROSYNC_TOKEN": TOKEN}, log=tmp_path / "out")
    until(lambda: " on http" in (tmp_path / "out").read_text(), 20)
    made = [sys.executable, "kirosync.py", "token", "add", "x", "--scope", "read", "--state", state]
    subprocess.run(made, cwd=ROOT, check=True, capture_output=True)
    assert service.end() == 0
    assert not (state / "log").exists()
    assert (tmp_path / "logs").stat().st_mode & 0o777 == 0o700
    assert verify(state, "--log", tmp_path / "logs").returncode == 0


def test_a_stranger_cannot_fill_the_access_log(server, state):
    for number in range(30):
        server.ask("GET", "/" + "x" * 5000, headers={"Authorization": f"Bearer {number}"})
    assert server.end() == 0
    lines = accessed(state)
    assert len(lines) == kirosync.TRIES
    assert max(len(line["path"]) for line in lines) == kirosync.PATH_CHARACTERS
    assert (state / "log" / "access.log").stat().st_mode & 0o777 == 0o600
