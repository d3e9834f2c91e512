"""The agent, really running, over each of its links; and its executors on real files and programs."""

import atexit
import base64
import contextlib
import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import TOKEN, Process, Server, until

import agent as program

FORKS = program.ForkServer()
atexit.register(FORKS.close)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


MOTO_PORT = free_port()
AGENT_ENVIRONMENT = {
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{MOTO_PORT}",
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "eu-central-1",
    "KIROSYNC_SECRET": "not for children",
    "ORDINARY": "for children",
}


def execute(**command):
    """Work with files here, as the child of an executor would; return the result, or raise Failed."""
    return program.IN_CHILD[command["type"]](command)


def report_of(**command):
    """Return the report of a command that was executed as a worker of the agent would."""
    return program.execute(program.Run(program.Policy().limited({"id": "c", **command}), FORKS))


# execute_bash, over both links


def test_a_command_runs_and_its_end_is_known(agent):
    done = agent.run(type="execute_bash", command="echo out; echo err >&2")
    assert (done["status"], done["outcome"]) == ("completed", "ok")
    assert done["result"].pop("durationMs") >= 0
    assert done["result"] == {"stdout": "out\n", "stderr": "err\n", "exitCode": 0}


def test_a_command_that_exits_with_another_code_is_failed_and_keeps_its_result(agent):
    done = agent.run(type="execute_bash", command="echo partly; exit 3")
    assert (done["status"], done["outcome"], done["error"]) == ("failed", "exit", "exit code 3")
    assert (done["result"]["stdout"], done["result"]["exitCode"]) == ("partly\n", 3)


def test_working_directory_and_environment_are_as_ordered_and_secrets_stay_out(agent, tmp_path):
    done = agent.run(type="execute_bash", command="pwd; env | sort", workingDir=str(tmp_path), env={"GREETING": "grüß"})
    lines = done["result"]["stdout"].splitlines()
    assert lines[0] == str(tmp_path)
    assert {"GREETING=grüß", "ORDINARY=for children"} <= set(lines)
    named = {line.partition("=")[0] for line in lines if line.startswith("KIROSYNC")}
    assert named == {program.MARK}
    assert not any(TOKEN in line for line in lines)
    done = agent.run(type="execute_bash", command="pwd", workingDir="/no/such/place")
    assert (done["status"], done["error"]) == ("failed", "workingDir: no /no/such/place")


def test_several_commands_run_at_once_and_a_slow_one_delays_none(agent):
    slow = agent.ask("POST", "/command", json={"type": "execute_bash", "command": "sleep 30", "timeout": 4}).json()
    started = time.monotonic()
    for _ in range(5):
        agent.run(type="execute_bash", command="true")
    assert time.monotonic() - started < 3
    ended = agent.ask("GET", f"/command/{slow['commandId']}?wait=20").json()
    assert (ended["status"], ended["outcome"]) == ("failed", "timeout")
    assert ended["error"] == "timed out after 4 s and was ended"


def test_a_command_that_prints_without_end_keeps_head_and_tail(agent):
    done = agent.run(type="execute_bash", command="echo first; yes | head -c 50000000; echo last")
    text = done["result"]["stdout"]
    assert text.startswith("first\ny\n")
    assert text.endswith("y\nlast\n")
    assert len(text) < program.STREAM_BYTES + 100
    assert done["result"]["truncated"] is True
    assert done["result"]["size"] == {"stdout": 50_000_011, "stderr": 0}
    assert f"[... {50_000_011 - program.STREAM_BYTES} bytes left out ...]" in text


def test_a_child_left_behind_does_not_hold_its_command(agent):
    started = time.monotonic()
    done = agent.run(type="execute_bash", command="sleep 5 & echo started")
    assert done["result"]["stdout"] == "started\n"
    assert time.monotonic() - started < 3


def test_stdin_is_closed_and_output_that_is_no_text_survives_as_replaced(agent):
    done = agent.run(type="execute_bash", command=r"cat; printf 'a\xffb'")
    assert done["result"]["stdout"] == "a�b"


def test_files_go_back_and_forth(agent, tmp_path):
    path, raw = str(tmp_path / "file.bin"), bytes(range(256)) * 100
    sha = hashlib.sha256(raw).hexdigest()
    done = agent.run(type="write_file", path=path, content=base64.b64encode(raw).decode(), encoding="base64")
    assert done["result"] == {"bytesWritten": 25_600, "created": True, "sha256": sha}
    done = agent.run(type="read_file", path=path)["result"]
    assert base64.b64decode(done["content"]) == raw
    assert (done["encoding"], done["size"], done["sha256"]) == ("base64", 25_600, sha)
    listed = agent.run(type="list_directory", path=str(tmp_path), glob="*.bin")["result"]
    assert [entry["name"] for entry in listed["entries"]] == ["file.bin"]
    missing = agent.run(type="read_file", path=f"{path}.not")
    assert (missing["status"], missing["error"]) == ("failed", f"{path}.not: No such file or directory")


def test_code_is_found(agent, tmp_path):
    (tmp_path / "a.py").write_text("one\n  needle here\n")
    done = agent.run(type="code_search", query="needle", path=str(tmp_path), glob="*.py")
    match = {"path": "a.py", "line": 2, "column": 3, "text": "  needle here"}
    assert done["result"] == {"matches": [match], "truncated": False}


@pytest.fixture(scope="module")
def moto():
    """A real HTTP server that answers as AWS does."""
    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(MOTO_PORT)]
    server = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield until(lambda: answers(MOTO_PORT), 60, pause=0.1)
    server.terminate()
    server.wait()


def answers(port):
    with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/moto-api/", timeout=5) as page:
        return page.status == 200
    return False


def aws(agent, service, operation, parameters=None, **more):
    order = {"type": "aws_operation", "service": service, "operation": operation, "parameters": parameters or {}}
    return agent.run(**order, **more)


def test_aws_operations_in_every_spelling(agent, moto):
    bucket = f"bucket-{time.time_ns()}"
    where = {"LocationConstraint": "eu-central-1"}
    assert aws(agent, "s3", "create-bucket", {"bucket": bucket, "CreateBucketConfiguration": where})["outcome"] == "ok"
    aws(agent, "s3", "PutObject", {"Bucket": bucket, "Key": "k", "Body": "content"})
    got = aws(agent, "s3", "get_object", {"Bucket": bucket, "Key": "k"})["result"]
    assert got["Body"] == "content"
    assert got["LastModified"].startswith("20")
    pages = aws(agent, "s3", "list-objects-v2", {"Bucket": bucket}, paginate=True, region="eu-central-1")["result"]
    assert [each["Key"] for each in pages["Contents"]] == ["k"]


def test_aws_refusals_are_told_in_the_models_words(agent, moto):
    gone = aws(agent, "iam", "get-user", {"UserName": "nobody"})
    assert (gone["status"], gone["result"]["code"]) == ("failed", "NoSuchEntity")
    assert gone["error"].startswith("NoSuchEntity: The user with name nobody cannot be found")
    assert gone["result"]["requestId"]
    assert "Missing required parameter" in aws(agent, "s3", "get-object", {"Bucket": "b"})["error"]
    assert "perhaps list_buckets" in aws(agent, "s3", "list-bucket")["error"]
    assert "no 's33' here" in aws(agent, "s33", "list-buckets")["error"]
    assert "no 'Bukkit'" in aws(agent, "s3", "get-object", {"Bukkit": "b"})["error"]


# Agents that stop


def test_a_restarted_agent_reports_at_once_what_it_had_been_running_as_lost(server, state, tmp_path, start):
    agent = start(Process, "agent.py", "--state", state, "--name", "a", log=tmp_path / "agent.log")
    identity = server.ask("POST", "/command", json={"type": "execute_bash", "command": "sleep 40"}).json()["commandId"]
    until(lambda: server.ask("GET", f"/command/{identity}").json()["status"] == "processing")
    agent.end(9)
    start(Process, "agent.py", "--state", state, "--name", "a", log=tmp_path / "agent.log")
    ended = server.ask("GET", f"/command/{identity}?wait=10").json()
    assert (ended["status"], ended["outcome"]) == ("failed", "lost")
    assert "was restarted while it ran" in ended["error"]


def test_a_stopped_agent_lets_short_commands_finish_and_ends_long_ones(server, state, tmp_path, start):
    agent = start(Process, "agent.py", "--state", state, log=tmp_path / "agent.log")
    orders = [{"type": "execute_bash", "command": command} for command in ("sleep 1; echo done", "sleep 60")]
    short, long = (server.ask("POST", "/command", json=order).json()["commandId"] for order in orders)
    for identity in (short, long):
        until(lambda identity=identity: server.ask("GET", f"/command/{identity}").json()["status"] == "processing")
    assert agent.end() == 0
    assert server.ask("GET", f"/command/{short}").json()["result"]["stdout"] == "done\n"
    ended = server.ask("GET", f"/command/{long}").json()
    assert (ended["outcome"], ended["error"]) == ("cancelled", "the agent was stopped")


def test_two_agents_of_one_name_do_not_run_on_one_machine(server, state, tmp_path, start):
    start(Process, "agent.py", "--state", state, "--name", "twin", log=tmp_path / "one")
    until(lambda: "agent twin at" in (tmp_path / "one").read_text())
    second = start(Process, "agent.py", "--state", state, "--name", "twin", log=tmp_path / "two")
    assert second.popen.wait(20) == 1
    assert "another agent named 'twin' runs here" in (tmp_path / "two").read_text()


def test_the_folder_agent_works_while_the_service_is_down(state, tmp_path, start):
    start(Process, "agent.py", "--state", state, log=tmp_path / "agent.log")
    until(lambda: (state / "commands").exists() and "agent" in (tmp_path / "agent.log").read_text())
    (state / "commands" / "mine.json").write_text('{"type": "execute_bash", "command": "echo by hand"}')
    done = until(lambda: json.loads((state / "commands" / "mine.json").read_text()).get("result"), 5)
    assert done["stdout"] == "by hand\n"


def test_an_http_agent_outlives_the_service(state, tmp_path, start):
    server = start(Server, state, tmp_path / "log")
    port = server.url.rsplit(":", 1)[1]
    (tmp_path / "token").write_text(TOKEN)
    link = ("--server", server.url, "--token-file", tmp_path / "token")
    start(Process, "agent.py", *link, "--name", "far", log=tmp_path / "agent.log")
    order = {"type": "execute_bash", "command": "sleep 1.5; echo done"}
    identity = server.ask("POST", "/command", json=order).json()["commandId"]
    until(lambda: server.ask("GET", f"/command/{identity}").json()["status"] == "processing")
    server.end(9)
    time.sleep(2)
    second = start(Server, state, tmp_path / "log", "--port", port)
    assert second.ask("GET", f"/command/{identity}?wait=40").json()["result"]["stdout"] == "done\n"
    assert second.run(type="execute_bash", command="echo again")["result"]["stdout"] == "again\n"


def test_the_agents_log_holds_no_token(agent, tmp_path):
    agent.run(type="execute_bash", command="true")
    assert TOKEN not in (tmp_path / "agent.log").read_text() + (tmp_path / "log").read_text()


# The executors, here


def test_reading_a_part_of_a_file(tmp_path):
    path = tmp_path / "f"
    path.write_text("0123456789")
    read = {"type": "read_file", "path": str(path)}
    assert execute(**read, offset=3, limit=4)["content"] == "3456"
    assert execute(**read, tail=3)["content"] == "789"
    assert execute(**read, tail=99)["content"] == "0123456789"
    assert execute(**read, offset=50)["content"] == ""
    assert execute(**read, limit=0)["content"] == ""


def test_reading_more_than_a_result_holds_says_so(tmp_path):
    path = tmp_path / "large"
    path.write_text("x" * (program.READ_BYTES + 5))
    result = execute(type="read_file", path=str(path))
    assert (len(result["content"]), result["size"], result["truncated"]) == (
        program.READ_BYTES,
        program.READ_BYTES + 5,
        True,
    )


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "/tmp", "PIPE"])
def test_what_is_no_file_is_not_read(tmp_path, path):
    os.mkfifo(tmp_path / "PIPE")
    with pytest.raises(program.Failed, match=r"is (a directory|not a plain file)"):
        execute(type="read_file", path=path if path != "PIPE" else str(tmp_path / "PIPE"))


def test_a_written_file_keeps_mode_and_owner_or_takes_the_one_ordered(tmp_path):
    path = tmp_path / "script"
    write = {"type": "write_file", "path": str(path), "content": "x"}
    execute(**write)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~program.UMASK
    path.chmod(0o751)
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    execute(**write)
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o751
    assert os.geteuid() != 0 or (status.st_uid, status.st_gid) == (12, 34)
    execute(**write, mode="0640")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(program.Failed, match="is not octal"):
        execute(**write, mode="rwx")
    assert [each.name for each in tmp_path.iterdir()] == ["script"]


def test_appending_replaces_the_file_as_a_whole(tmp_path):
    path = tmp_path / "log"
    for _ in range(2):
        result = execute(type="write_file", path=str(path), content="ab", append=True)
    assert path.read_text() == "abab"
    assert (result["bytesWritten"], result["created"]) == (2, False)


def test_a_file_that_is_not_what_was_expected_is_not_written(tmp_path):
    path = tmp_path / "f"
    write = {"type": "write_file", "path": str(path), "content": "new"}
    execute(**write, expectedSha256=None)
    was = hashlib.sha256(b"new").hexdigest()
    with pytest.raises(program.Failed, match=f"its sha256 is {was}") as failure:
        execute(**write, expectedSha256="0" * 64)
    assert failure.value.result == {"sha256": was}
    with pytest.raises(program.Failed):
        execute(**write, expectedSha256=None)
    execute(**{**write, "content": "newer"}, expectedSha256=was.upper())
    with pytest.raises(program.Failed, match="there is no such file"):
        execute(type="write_file", path=str(tmp_path / "other"), content="", expectedSha256=was)
    assert path.read_text() == "newer"


def test_a_write_through_a_link_changes_what_it_points_to(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to("target")
    execute(type="write_file", path=str(tmp_path / "link"), content="new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"


def test_writing_into_a_missing_folder_or_with_bad_base64_fails_and_says_why(tmp_path):
    with pytest.raises(program.Failed, match="does not exist; make it first"):
        execute(type="write_file", path=str(tmp_path / "no" / "f"), content="")
    with pytest.raises(program.Failed, match="is not base64"):
        execute(type="write_file", path=str(tmp_path / "f"), content="?", encoding="base64")


def test_listing_a_directory(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.txt").write_text("123")
    (tmp_path / "link").symlink_to("sub")
    (tmp_path / "top.txt").write_text("12345")
    (tmp_path / os.fsdecode(b"\xff.txt")).write_text("")
    listing = {"type": "list_directory", "path": str(tmp_path)}
    entries = {entry["name"]: entry for entry in execute(**listing)["entries"]}
    assert {name: entry["type"] for name, entry in entries.items()} == {
        "sub": "directory", "link": "symlink", "top.txt": "file", r"\xff.txt": "file",
    }  # fmt: skip
    assert entries["top.txt"]["size"] == 5
    assert abs(entries["top.txt"]["modified"] / 1000 - time.time()) < 60
    names = [entry["name"] for entry in execute(**listing, recursive=True, glob="*.txt")["entries"]]
    assert names == [r"\xff.txt", "sub/deep.txt", "top.txt"]
    short = execute(**listing, limit=2)
    assert (len(short["entries"]), short["truncated"]) == (2, True)
    with pytest.raises(FileNotFoundError):
        execute(type="list_directory", path=str(tmp_path / "no"), recursive=True)


SEARCHES = [
    {"query": "needle"},
    {"query": "NEEDLE", "ignoreCase": True},
    {"query": "n[e]+dle", "regex": True},
    {"query": r"^\s*needle\b", "regex": True},
    {"query": "needle", "glob": "*.py"},
    {"query": "needle", "context": 1},
    {"query": "nothing of the kind"},
    {"query": "a.b(c)*[d"},
    {"query": "-e"},
    {"query": "größe"},
    {"query": r"(?<=x)needle", "regex": True},
    {"query": "needle", "limit": 2},
]


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name, text in {
        "a.py": "x\nneedle needle\ny",
        "b.txt": "  needle\r\nNeedle\n",
        "sub/c.py": "xneedle\na.b(c)*[d and -e\n",
        "sub/größe.md": "die größe: needle",
        ".hidden/d.py": "needle",
        ".gitignore": "b.txt",
        ".git/config": "needle",
        "node_modules/x.js": "needle",
        "latin1.txt": "",
        "binary": "needle\0",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "latin1.txt").write_bytes(b"gr\xf6\xdfe needle")
    (root / "link.py").symlink_to("a.py")
    return root


@pytest.mark.parametrize("search", SEARCHES, ids=lambda search: search["query"])
def test_a_search_answers_the_same_with_and_without_ripgrep(tree, search, request):
    with_ripgrep = program.code_search({"type": "code_search", "path": str(tree), **search})
    request.getfixturevalue("without_ripgrep")
    assert program.code_search({"type": "code_search", "path": str(tree), **search}) == with_ripgrep
    assert bool(with_ripgrep["matches"]) == (search["query"] != "nothing of the kind")
    assert with_ripgrep["truncated"] == ("limit" in search)


def test_a_search_shows_lines_columns_and_context(tree):
    found = program.code_search({"query": "needle", "path": str(tree), "glob": "a.py", "context": 1})["matches"]
    expected = {"path": "a.py", "line": 2, "column": 1, "text": "needle needle", "before": ["x"], "after": ["y"]}
    assert found == [expected]
    found = program.code_search({"query": "needle", "path": str(tree)})["matches"]
    paths = {".hidden/d.py", "a.py", "b.txt", "latin1.txt", "sub/c.py", "sub/größe.md"}
    assert {match["path"] for match in found} == paths


def test_a_search_that_cannot_be_says_why(tmp_path):
    assert "No such file" in report_of(type="code_search", query="x", path="/no")["error"]
    with pytest.raises(program.Failed, match="is not a regular expression"):
        program.code_search({"query": "(", "regex": True, "path": str(tmp_path)})


def test_a_search_that_takes_for_ever_is_ended(tmp_path):
    (tmp_path / "f.txt").write_text("a" * 40 + "b\na\n")
    report = report_of(type="code_search", query="(a+)+$", regex=True, path=str(tmp_path), timeout=1)
    assert (report["outcome"], report["status"]) == ("timeout", "failed")


def test_a_turn_of_the_loop_claims_once_and_reports_until_it_is_taken():
    """The loop on a link that fails twice: what ended is reported all the same, and executed once."""

    class Shaky:
        remote, stays = False, 60

        def stay(self, name, said, anew):
            raise program.Unreachable("nor can it be said who is here")

        def __init__(self):
            self.said, self.failures = [], iter(range(2))

        def changes(self, seconds):
            return {"c": {"id": "c", "type": "execute_bash", "command": "echo hi", "status": "pending"}}

        def report(self, identity, patch):
            if patch["status"] == "completed" and next(self.failures, None) is not None:
                raise program.Unreachable("the service restarts")
            self.said.append(patch)
            return {"id": "c", "type": "execute_bash", "command": "echo hi", "attempt": 1, **patch}

        def output(self, identity):
            return {}

    link = Shaky()
    agent = program.Agent(link, "a", FORKS, jobs=1, clock=lambda: 0.0)
    agent.turn(0)
    until(lambda: len(link.said) == 2)
    assert [patch["status"] for patch in link.said] == ["processing", "completed"]
    assert link.said[1]["result"]["stdout"] == "hi\n"
    agent.pool.shutdown()


def test_claims_are_renewed_while_they_run_and_one_that_was_given_up_is_ended():
    now, said = [0.0], []

    class Quiet:
        stays = 60

        def stay(self, name, said, anew):
            pass

        def changes(self, seconds):
            return {}

        def report(self, identity, patch):
            said.append(patch)
            return None if len(said) > 1 else patch

    agent = program.Agent(Quiet(), "a", FORKS, clock=lambda: now[0])
    run = agent.taken["c"] = program.Run({"id": "c"}, FORKS)
    run.held = {"agent": "a", "claim": "x", "attempt": 2}
    agent.turn(0)
    assert said == []
    for turn in (1, 2):
        now[0] = turn * program.LEASE_S / 3
        agent.turn(0)
        assert said[-1] == {"status": "processing", "lease": program.LEASE_S, **run.held}
        assert run.why == ("given up" if turn == 2 else "")
    agent.pool.shutdown()


def test_a_report_that_is_refused_ends_the_command_with_the_reason(tmp_path):
    link = program.FolderLink(tmp_path / "state")
    rules = link.rules
    link.store.change(
        lambda pen: rules.put_command(
            pen, None, {"id": "c", **rules.new_command({"type": "execute_bash", "command": "x"}, pen.now)}
        )
    )
    agent = program.Agent(link, "a", FORKS)
    deep = []
    for _ in range(300):
        deep = [deep]
    program.EXECUTORS["execute_bash"], real = lambda run: deep, program.EXECUTORS["execute_bash"]
    try:
        agent.turn(0)
        until(lambda: link.store.get("commands", "c").content.status == "failed")
        ended = link.store.get("commands", "c").record("c")
    finally:
        program.EXECUTORS["execute_bash"] = real
    assert (ended["status"], ended["outcome"]) == ("failed", "error")
    assert "report was refused" in ended["error"]
    agent.pool.shutdown()
    link.store.close()


def test_a_command_that_is_seen_pending_many_times_runs_once(server, state, tmp_path, start):
    """Whatever is said of it while it waits: each run leaves a mark."""
    start(Process, "agent.py", "--state", state, "--jobs", "8", log=tmp_path / "agent.log")
    marks, identities = tmp_path / "marks", []
    for number in range(60):
        order = {"type": "execute_bash", "command": f"echo {number} >> {marks}; sleep 0.02"}
        identities.append(server.ask("POST", "/command", json=order).json()["commandId"])
        for _ in range(3):
            server.ask("PATCH", f"/command/{identities[-1]}", json={"metadata": {"n": number}})
    for identity in identities:
        server.ask("GET", f"/command/{identity}?wait=20")
    assert sorted(map(int, marks.read_text().split())) == list(range(60))


def test_a_retryable_command_whose_agent_died_is_run_again(server, state, tmp_path, start):
    agent = start(Process, "agent.py", "--state", state, "--name", "a", log=tmp_path / "agent.log")
    order = {"type": "execute_bash", "command": f"echo x >> {tmp_path}/tries; sleep 1", "retryable": True}
    identity = server.ask("POST", "/command", json=order).json()["commandId"]
    until((tmp_path / "tries").exists)
    agent.end(9)
    start(Process, "agent.py", "--state", state, "--name", "a", log=tmp_path / "agent.log")
    ended = server.ask("GET", f"/command/{identity}?wait=20").json()
    assert (ended["outcome"], ended["attempt"]) == ("ok", 2)
    assert (tmp_path / "tries").read_text() == "x\nx\n"


def test_two_signals_at_once_end_the_agent(state, tmp_path, start):
    for _ in range(12):
        log = tmp_path / "agent.log"
        agent = start(Process, "agent.py", "--state", state, log=log)
        until(lambda agent=agent, log=log: f"[{agent.popen.pid}] INFO agent" in log.read_text())
        agent.popen.send_signal(signal.SIGINT)
        agent.popen.send_signal(signal.SIGTERM)
        assert agent.popen.wait(10) == 0


def test_an_agent_that_cannot_start_says_why_in_one_line(state, tmp_path, start):
    (tmp_path / "alone").mkdir()
    shutil.copy(program.__file__, tmp_path / "alone" / "agent.py")
    for name, argv, said in (
        ("a", ["agent.py", "--server", "127.0.0.1:1"], "agent: --server wants a URL, such as http://127.0.0.1:1"),
        ("b", ["agent.py", "--server", "http://127.0.0.1:1"], "agent: --server wants a token"),
        ("c", ["agent.py", "--server", "http://x", "--token-file", "/no"], "agent: /no: No such file or directory"),
        ("d", [tmp_path / "alone" / "agent.py", "--state", state], "agent: kirosync is missing"),
    ):
        assert start(Process, *argv, log=tmp_path / name).popen.wait(20) == 1
        assert (tmp_path / name).read_text().startswith(said)
        assert len((tmp_path / name).read_text().splitlines()) == 1


def cmdline_of(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def test_writers_that_expect_the_same_file_do_not_both_win(tmp_path):
    path, wins = tmp_path / "f", []
    write = {"type": "write_file", "path": str(path), "expectedSha256": None}

    def race(number):
        script = (
            f"import agent, json; run = agent.Run({ {'id': 'c', 'timeout': 9, **write, 'content': str(number)}!r},"
            "agent.ForkServer()); print(json.dumps(agent.execute(run)))"
        )
        ran = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=os.getcwd()
        )
        wins.append(json.loads(ran.stdout)["status"])

    threads = [threading.Thread(target=race, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(wins) == ["completed"] + ["failed"] * 5


def test_a_relative_working_directory_counts_once(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f.py").write_text("needle")
    monkeypatch.chdir(tmp_path)
    found = execute(type="code_search", query="needle", workingDir="sub")
    assert [match["path"] for match in found["matches"]] == ["f.py"]


def test_a_written_file_keeps_even_the_mode_that_a_new_owner_would_lose(tmp_path):
    path = tmp_path / "tool"
    path.write_text("old")
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    path.chmod(0o4755)
    execute(type="write_file", path=str(path), content="new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o4755


def test_a_large_file_is_replaced_without_reading_it(tmp_path):
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(50 << 30)
    started = time.monotonic()
    assert execute(type="write_file", path=str(path), content="small")["created"] is False
    assert time.monotonic() - started < 5
    assert path.read_text() == "small"


def test_a_killed_writer_leaves_nothing_behind(tmp_path):
    order = {"id": "c", "type": "write_file", "path": str(tmp_path / "f"), "content": "x" * 20_000_000, "timeout": 60}
    run = program.Run(order, FORKS)
    thread = threading.Thread(target=program.execute, args=(run,))
    thread.start()
    for _ in range(40):
        time.sleep(0.005)
        if run.line:
            run.line.shutdown(socket.SHUT_RDWR)  # as if the agent had been killed
            break
    thread.join()
    until(lambda: {path.name for path in tmp_path.iterdir()} <= {"f"}, 3)


def test_a_file_whose_size_is_not_known_is_read_to_its_end():
    result = execute(type="read_file", path="/proc/cpuinfo")
    assert "processor" in result["content"]
    assert result["size"] == len(result["content"].encode())
    assert "truncated" not in result


def test_the_pages_of_a_large_directory_hold_every_entry_once(tmp_path):
    names = {f"file {number}" for number in range(3000)} | {r"a\xff", "ü"}
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / os.fsdecode(b"a\xff")).touch()
    seen, after = [], {}
    while True:
        page = execute(type="list_directory", path=str(tmp_path), limit=700, **after)
        seen += [entry["name"] for entry in page["entries"]]
        if not page["truncated"]:
            break
        after = {"after": page["next"]}
    assert len(seen) == len(set(seen)) == len(names) + 1
    assert seen == sorted(seen)


def test_a_directory_of_a_hundred_thousand_entries_is_listed_in_bounded_pages(tmp_path):
    for number in range(100_000):
        os.close(os.open(tmp_path / f"{number:06}", os.O_CREAT))
    page = execute(type="list_directory", path=str(tmp_path), limit=10**6)
    assert (len(page["entries"]), page["truncated"], page["next"]) == (program.ENTRIES, True, "009999")
    last = execute(type="list_directory", path=str(tmp_path), after="099989")
    assert (len(last["entries"]), last["truncated"]) == (10, False)


def test_a_token_that_is_none_is_not_shown(tmp_path, start):
    (tmp_path / "token").write_text("SECRET\nMORE\n")
    argv = ("agent.py", "--server", "http://127.0.0.1:1", "--token-file", tmp_path / "token")
    assert start(Process, *argv, log=tmp_path / "log").popen.wait(20) == 1
    assert "SECRET" not in (tmp_path / "log").read_text()


def test_binary_goes_to_aws_and_back(agent, moto):
    table = f"table-{time.time_ns()}"
    key = {"AttributeName": "k", "AttributeType": "S"}
    schema = [{"AttributeName": "k", "KeyType": "HASH"}]
    made = {"TableName": table, "AttributeDefinitions": [key], "KeySchema": schema, "BillingMode": "PAY_PER_REQUEST"}
    assert aws(agent, "dynamodb", "create-table", made)["outcome"] == "ok"
    raw = {"content": base64.b64encode(b"\xff\x00").decode(), "encoding": "base64"}
    item = {"k": {"S": "one"}, "b": {"B": raw}}
    assert aws(agent, "dynamodb", "PutItem", {"TableName": table, "Item": item})["outcome"] == "ok"
    got = aws(agent, "dynamodb", "get_item", {"TableName": table, "Key": {"k": {"S": "one"}}})["result"]
    assert got["Item"]["b"]["B"] == raw


def test_pages_of_aws_are_gathered_up_to_a_limit(agent, moto):
    for number in range(5):
        aws(agent, "sqs", "create-queue", {"QueueName": f"q{time.time_ns()}-{number}"})
    found = aws(agent, "sqs", "list-queues", paginate=True, limit=3)["result"]
    assert len(found["QueueUrls"]) == 3
