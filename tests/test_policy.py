"""What an agent refuses, and what it asks a human for. A policy that is not understood stops it."""

import json
import os
import threading
import time
from pathlib import Path

import pytest
from conftest import TOKEN, Process, until

import agent as program
import kirosync


@pytest.fixture
def policy(tmp_path):
    """Write a policy; the value is how."""

    def write(text):
        path = tmp_path / "policy.toml"
        path.write_text(text)
        return path

    return write


BAD = {
    'types = ["execute_bash"\n': "Unclosed array (at line 2",
    '\ncolour = "red"\n': "line 2: colour is not one of types, roots, timeout, longest, answer, refuse, ask",
    'types = "execute_bash"': "line 1: types must be a list of some of execute_bash, read_file",
    'types = ["execute_bash", "fly"]': "line 1: types must be a list of some of",
    "types = []": "line 1: types must be a list",
    "timeout = 5\nlongest = true": "line 2: longest must be a number of seconds",
    "timeout = 0": "line 1: timeout must be a number of seconds",
    'roots = ["/no/such/place"]': "line 1: roots: /no/such/place is not a folder",
    "refuse = 5": "line 1: refuse must be tables: [[refuse]]",
    '[refuse]\ncommand = "x"': "line 1: refuse must be tables: [[refuse]]",
    '[[ask]]\ncommand = "x"\n\n[[refuse]]\ntype = "x"\n[[refuse]]\n\ncommand = "("': "line 8: command is not a regular",
    '[[ask]]\nservce = "x"': "line 2: servce is no field of a command",
    "[[ask]]\ntype = 5": "line 2: type must be a string",
    'timeout = 5\n\n[[ask]]\nreason = "x"': "line 3: the rule names no field",
}


@pytest.mark.parametrize(("text", "said"), BAD.items(), ids=range(len(BAD)))
def test_a_policy_that_is_not_understood_stops_the_agent_with_line_and_reason(policy, text, said, tmp_path, start):
    with pytest.raises(program.BadPolicy) as problem:
        program.read_policy(policy(text))
    assert said in str(problem.value)
    if text in [*BAD][:2]:
        argv = ("agent.py", "--state", tmp_path / "state", "--policy", tmp_path / "policy.toml")
        assert start(Process, *argv, log=tmp_path / "log").popen.wait(20) == 1
        assert (tmp_path / "log").read_text().startswith("agent: the policy cannot be followed: ")
        assert said in (tmp_path / "log").read_text()


def test_a_policy_that_cannot_be_read_stops_the_agent(tmp_path):
    with pytest.raises(program.BadPolicy, match=r"none\.toml: No such file"):
        program.read_policy(tmp_path / "none.toml")


def test_the_policy_of_the_readme_is_one(policy, tmp_path):
    readme = (Path(program.__file__).parent / "README.md").read_text()
    text = readme.partition("    types = ")[2].partition("\n\nA command that")[0]
    text = "types = " + text.replace("\n    ", "\n").replace('"/srv/app", "~/work"', f'"{tmp_path}"')
    understood = program.read_policy(policy(text))
    assert understood.judge({"type": "execute_bash", "command": "sudo shutdown"}) == ("refuse", "not on this machine")
    assert understood.judge({"type": "aws_operation", "operation": "DeleteBucket"})[0] == "ask"
    assert understood.judge({"type": "aws_operation", "operation": "ListBuckets"}) == ("run", "")
    assert understood.limited({"type": "execute_bash", "timeout": 1e6})["timeout"] == 3600
    assert understood.limited({"type": "execute_bash"})["timeout"] == 600


def test_a_rule_holds_of_values_that_are_no_text_and_of_none():
    understood = program.Policy(refuse=[program.Rule({"env": program.re.compile("LD_PRELOAD")}, "no")])
    assert understood.judge({"env": {"LD_PRELOAD": "x"}})[0] == "refuse"
    assert understood.judge({"command": "LD_PRELOAD"})[0] == "run"


# Really running


@pytest.fixture(params=["folder", "http"])
def agent_with(request, server, state, tmp_path, start, policy):  # noqa: PLR0917  fixtures
    """Start an agent with a policy, over each of its links; the value is how."""

    def run(text, name="a", **environment):
        link = ["--state", state]
        if request.param == "http":
            (tmp_path / "token").write_text(TOKEN)
            link = ["--server", server.url, "--token-file", tmp_path / "token"]
        argv = ["agent.py", *link, "--name", name, "--policy", policy(text), "--jobs", "1"]
        process = start(Process, *argv, log=tmp_path / "agent.log", environment=environment)
        until(lambda: f"[{process.popen.pid}] INFO agent" in (tmp_path / "agent.log").read_text())
        return process

    return run


def test_what_is_refused_ends_at_once_and_says_why(server, agent_with):
    agent_with('[[refuse]]\ncommand = "rm -rf"\nreason = "too dangerous"')
    done = server.run(type="execute_bash", command="rm -rf /nothing")
    assert (done["status"], done["outcome"]) == ("failed", "refused")
    assert done["error"] == "the agent a refuses it: too dangerous"
    assert server.run(type="execute_bash", command="true")["outcome"] == "ok"


def test_other_types_are_left_to_other_agents(server, agent_with):
    agent_with('types = ["read_file"]')
    order = {"type": "execute_bash", "command": "true"}
    identity = server.ask("POST", "/command", json=order).json()["commandId"]
    assert server.run(type="read_file", path="/etc/hostname")["outcome"] == "ok"
    assert server.ask("GET", f"/command/{identity}").json()["status"] == "pending"
    done = server.run(**order, target="a")
    assert (done["outcome"], done["error"]) == ("refused", "the agent a refuses it: it does not do execute_bash")


def test_no_command_runs_longer_than_the_policy_allows(server, agent_with):
    agent_with("longest = 1")
    done = server.run(type="execute_bash", command="sleep 30", timeout=20)
    assert (done["outcome"], done["error"]) == ("timeout", "timed out after 1 s and was ended")


def question_of(server, identity):
    """The open question about a command, as soon as there is one."""

    def look():
        commands = server.ask("GET", "/commands?type=user_input&status=pending").json()["commands"]
        return next(((key, each) for key, each in commands.items() if each["executionId"] == identity), None)

    return until(look)


def answer(server, question, value):
    patch = {"status": "completed", "result": {"value": value}}
    assert server.ask("PATCH", f"/command/{question}", json=patch).status_code == 200


def asked(server, tmp_path, **more):
    order = {"type": "execute_bash", "command": f"echo ran >> {tmp_path}/ran; echo careful", **more}
    return server.ask("POST", "/command", json=order).json()["commandId"]


ASK = '[[ask]]\ncommand = "careful"\nreason = "it says careful"'


def test_what_must_be_asked_for_runs_on_a_yes_and_takes_no_slot_meanwhile(server, agent_with, tmp_path):
    agent_with(ASK)
    identity = asked(server, tmp_path)
    question, said = question_of(server, identity)
    assert said["inputType"] == "confirmation"
    assert "it says careful" in said["prompt"]
    assert "echo ran >>" in said["prompt"]
    assert server.run(type="execute_bash", command="true")["outcome"] == "ok"  # its only slot is free
    assert server.ask("GET", f"/command/{identity}").json()["status"] == "pending"
    answer(server, question, "yes")
    done = server.ask("GET", f"/command/{identity}?wait=10").json()
    assert (done["outcome"], done["result"]["stdout"]) == ("ok", "careful\n")
    assert (tmp_path / "ran").read_text() == "ran\n"


@pytest.mark.parametrize("value", ["no", False, None, "yess", 1, ["yes"], {"value": "yes"}])
def test_anything_but_a_yes_is_a_no(value):
    question = program.Question({"id": "c", "type": "execute_bash"}, "why", 60)
    posted = {"status": "completed", "createdAt": time.time() * 1000, "result": {"value": value}}
    assert question.answer(posted)[0] is None


def test_a_no_a_cancel_and_silence_refuse(server, agent_with, tmp_path):
    agent_with(f"answer = 4\n{ASK}")
    no, cancelled, silent = (asked(server, tmp_path) for _ in range(3))
    answer(server, question_of(server, no)[0], "no")
    server.ask("POST", f"/command/{question_of(server, cancelled)[0]}/cancel")
    for identity, why in ((no, "a human said no"), (cancelled, "cancelled"), (silent, "nobody answered in")):
        done = server.ask("GET", f"/command/{identity}?wait=20").json()
        assert done["outcome"] == "refused"
        assert why in done["error"]
    assert not (tmp_path / "ran").exists()


def test_a_question_ends_with_the_command_it_is_about(server, agent_with, tmp_path):
    agent_with(ASK)
    identity = asked(server, tmp_path)
    question, _ = question_of(server, identity)
    server.ask("POST", f"/command/{identity}/cancel")
    assert server.ask("GET", f"/command/{question}?wait=10").json()["outcome"] == "cancelled"


def test_a_restarted_agent_asks_no_second_time_and_heeds_the_answer(server, agent_with, tmp_path):
    first = agent_with(ASK)
    identity = asked(server, tmp_path)
    question, _ = question_of(server, identity)
    first.end(9)
    answer(server, question, True)
    agent_with(ASK)
    assert server.ask("GET", f"/command/{identity}?wait=10").json()["outcome"] == "ok"
    assert len(server.ask("GET", "/commands?type=user_input").json()["commands"]) == 1


def test_a_yes_is_for_exactly_the_command_that_was_shown(server, agent_with, tmp_path, state):
    agent_with(ASK)
    identity = asked(server, tmp_path)
    question, _ = question_of(server, identity)
    path = state / "commands" / f"{identity}.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "command": f"echo evil >> {tmp_path}/ran; echo careful"}))
    until(lambda: json.loads(path.read_text())["revision"] > record["revision"])
    patch = {"status": "completed", "result": {"value": "yes"}}
    server.ask("PATCH", f"/command/{question}", json=patch)  # 409 if the agent was quicker to withdraw it
    second, said = until(lambda: (found := question_of(server, identity))[0] != question and found)
    assert "echo evil" in said["prompt"]
    assert not (tmp_path / "ran").exists()
    answer(server, second, "no")
    assert server.ask("GET", f"/command/{identity}?wait=10").json()["outcome"] == "refused"


def test_a_question_that_someone_else_has_put_is_not_believed(server, agent_with, tmp_path):
    identity = asked(server, tmp_path)
    command = server.ask("GET", f"/command/{identity}").json()
    _, key = program.Question({"id": identity, **command}, "x", 600).order("a")
    forged = {"type": "user_input", "prompt": "Do you like cake?"}
    forged = server.ask("POST", "/command", json=forged, headers={"Idempotency-Key": key}).json()["commandId"]
    answer(server, forged, "yes")
    agent_with(ASK)
    done = server.ask("GET", f"/command/{identity}?wait=10").json()
    assert done["outcome"] == "refused"
    assert not (tmp_path / "ran").exists()


def test_a_yes_that_has_expired_is_none():
    question = program.Question({"id": "c", "type": "execute_bash"}, "why", 60)
    yes, _ = question.answer({"status": "completed", "createdAt": 5_000, "result": {"value": "yes"}})
    assert yes.until == 65


def test_two_agents_ask_each_for_itself_and_one_yes_is_enough(server, agent_with, tmp_path):
    agent_with(ASK, name="a")
    agent_with(ASK, name="b")
    identity = asked(server, tmp_path)
    questions = until(
        lambda: (
            (found := server.ask("GET", "/commands?type=user_input").json()["commands"]) and len(found) == 2 and found
        )
    )
    answer(server, min(questions), "yes")
    assert server.ask("GET", f"/command/{identity}?wait=10").json()["outcome"] == "ok"
    assert (tmp_path / "ran").read_text() == "ran\n"
    other = server.ask("GET", f"/command/{max(questions)}?wait=10").json()
    assert other["outcome"] == "cancelled"


def test_a_human_is_shown_all_of_what_would_run_and_nothing_that_misleads():
    hidden = {"id": "c", "type": "execute_bash", "zzz": "x" * 99_999, "command": "echo \u202egnp\x9b; größe\n"}
    order, _ = program.Question(hidden, "why", 60).order("a")
    assert "echo \\u202egnp\\x9b; größe" in order["prompt"]
    assert "zzz" not in order["prompt"]
    with pytest.raises(program.Refused, match="cannot be shown to a human"):
        program.Question({**hidden, "command": "x" * 64_000}, "why", 60).order("a")


@pytest.mark.parametrize("operation", ["delete-bucket", "delete_bucket", "DeleteBucket"])
@pytest.mark.parametrize("pattern", ["^delete-", "delete_bucket", "^DELETEBucket$"])
def test_a_rule_about_an_operation_holds_in_every_spelling(operation, pattern, policy):
    understood = program.read_policy(policy(f'[[ask]]\noperation = "{pattern}"'))
    assert understood.judge({"type": "aws_operation", "operation": operation})[0] == "ask"


def test_a_rule_holds_for_names_with_acronyms_in_them(policy):
    understood = program.read_policy(policy('[[ask]]\nservice = "^iam$"\noperation = "DeleteDBInstance"'))
    for operation in ("DeleteDBInstance", "delete-db-instance", "delete_db_instance"):
        assert understood.judge({"type": "aws_operation", "service": "IAM", "operation": operation})[0] == "ask"


def test_whatever_can_be_ordered_is_bound_to_a_yes_and_can_be_ruled_about():
    for kind in program.EXECUTORS:
        required, optional, _ = kirosync.ORDERS[kind]
        assert {*required, *optional} <= set(program.FIELDS)


def test_a_yes_to_another_command_is_none():
    """The loop on a link that hands out a command other than the one that was asked about."""
    said = []

    class Changing:
        remote = False

        def now(self):
            return 0.0

        def report(self, identity, patch):
            said.append(patch)
            return {"id": "c", "type": "execute_bash", "command": "evil", "attempt": 1, **patch}

    agent = program.Agent(Changing(), "a", None, policy=program.Policy())
    yes = program.Yes(program.sha256_of({"id": "c", "type": "execute_bash", "command": "good"}), 60)
    agent.perform(program.Run({"id": "c"}, None), yes)
    assert [patch["status"] for patch in said] == ["processing", "pending"]
    agent.pool.shutdown()
    agent.clerk.shutdown()


def test_a_refusal_ends_no_command_that_another_executes(server, agent_with, tmp_path, start, state):
    agent_with('[[refuse]]\ncommand = "contested"')
    refused = server.run(type="execute_bash", command="echo contested")
    assert refused["outcome"] == "refused"
    order = {"type": "execute_bash", "command": "echo contested"}
    identity = server.ask("POST", "/command", json=order).json()["commandId"]
    claim = server.ask("PATCH", f"/command/{identity}", json={"status": "processing", "agent": "other", "lease": 45})
    time.sleep(1)
    now = server.ask("GET", f"/command/{identity}").json()
    assert now["status"] == "processing" if claim.status_code == 200 else now["outcome"] == "refused"


def test_other_spellings_than_those_three_are_none():
    for spelling in ("De-lete-Bucket", "deletebucket", "DELETE-BUCKET"):
        with pytest.raises(program.Failed, match="perhaps"):
            program.spelled("operation", spelling, program.every_spelling(["delete_bucket", "list_buckets"]))


def test_the_environment_of_a_command_is_not_for_work_with_files_or_aws(server, agent_with, tmp_path):
    (tmp_path / "rg").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "rg").chmod(0o755)
    agent_with('types = ["code_search"]')
    done = server.run(type="code_search", query="touch", path=str(tmp_path), env={"PATH": str(tmp_path)})
    assert done["result"]["matches"]
    assert not (tmp_path / "ran").exists()


def test_a_claimed_command_that_is_no_longer_what_was_judged_goes_back(server, agent_with, tmp_path):
    agent_with('types = ["code_search", "read_file"]')
    (tmp_path / "slow.txt").write_text("a" * 40 + "b\na\n")
    slow = {"type": "code_search", "query": "(a+)+$", "regex": True, "path": str(tmp_path), "timeout": 3}
    server.ask("POST", "/command", json=slow)
    order = {"type": "read_file", "path": "/etc/hostname"}
    identity = server.ask("POST", "/command", json=order).json()["commandId"]
    time.sleep(0.5)
    server.ask("DELETE", f"/command/{identity}")
    now = round(time.time() * 1000) + 1000
    evil = {"type": "execute_bash", "command": f"touch {tmp_path}/ran", "status": "pending"}
    push = {"commands": {identity: {**evil, "createdAt": now, "updatedAt": now}}}
    assert server.ask("POST", "/sync", json=push).status_code == 200
    time.sleep(5)
    assert server.ask("GET", f"/command/{identity}").json()["status"] == "pending"
    assert not (tmp_path / "ran").exists()


def test_an_empty_name_is_no_policy(tmp_path, start):
    argv = ("agent.py", "--state", tmp_path / "state", "--policy", "")
    assert start(Process, *argv, log=tmp_path / "log").popen.wait(20) == 1
    assert "the policy cannot be followed" in (tmp_path / "log").read_text()


def test_a_policys_timeout_holds_for_work_with_files_too():
    assert program.Policy(timeout=3).limited({"type": "code_search"})["timeout"] == 3
    assert program.Policy().limited({"type": "code_search"})["timeout"] == program.FILES_S


def test_a_reason_is_no_regular_expression(policy):
    understood = program.read_policy(policy('[[refuse]]\ncommand = "x"\nreason = "see the wiki :("'))
    assert understood.judge({"type": "execute_bash", "command": "x"}) == ("refuse", "see the wiki :(")


# Roots


@pytest.fixture
def rooted(tmp_path):
    """A folder that is allowed, beside one that is not, and links from the one into the other."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    (outside / "secret").write_text("secret needle")
    (inside / "own").write_text("own needle")
    (inside / "to-secret").symlink_to(outside / "secret")
    (inside / "to-outside").symlink_to(outside)
    (inside / "to-own").symlink_to(inside / "own")
    program.ROOTS[:] = [str(inside)]
    yield inside
    program.ROOTS[:] = []


def execute(**command):
    return program.IN_CHILD[command["type"]](command)


@pytest.mark.parametrize("path", ["../outside/secret", "to-secret", "to-outside/secret", "/etc/passwd", "/", ".."])
@pytest.mark.parametrize("kind", ["read_file", "write_file", "list_directory", "code_search"])
def test_nothing_outside_of_the_roots_is_touched(rooted, kind, path):
    with pytest.raises((program.Failed, OSError)) as failure:
        execute(type=kind, workingDir=str(rooted), path=path, content="x", query="needle")
    assert "secret" not in Path(rooted / "own").read_text()
    assert (rooted.parent / "outside" / "secret").read_text() == "secret needle"
    if isinstance(failure.value, program.Failed) and "directory" not in str(failure.value):
        assert failure.value.outcome == "refused"
        assert "outside of what this agent's policy allows" in str(failure.value)


@pytest.mark.parametrize("kind", ["read_file", "write_file", "list_directory", "code_search"])
def test_whether_anything_is_there_outside_of_the_roots_is_not_told(rooted, kind):
    said = set()
    for path in ("/etc", "/etc/passwd", "/etc/no/such/file", "/proc/self/fd/1"):
        with pytest.raises(program.Failed) as failure:
            execute(type=kind, path=path, content="x", query="x", workingDir="/no/such/place")
        assert failure.value.outcome == "refused"
        said.add(str(failure.value).partition(" is outside")[2])
    assert len(said) == 1


def test_inside_of_the_roots_all_is_as_ever(rooted):
    where = {"workingDir": str(rooted)}
    assert execute(type="read_file", path="to-own", **where)["content"] == "own needle"
    assert execute(type="write_file", path="to-own", content="new needle", **where)["created"] is False
    assert (rooted / "to-own").is_symlink()
    names = [entry["name"] for entry in execute(type="list_directory", path=".", recursive=True, **where)["entries"]]
    assert names == ["own", "to-outside", "to-own", "to-secret"]
    found = execute(type="code_search", query="needle", **where)["matches"]
    assert [match["path"] for match in found] == ["own"]


def test_a_folder_that_is_swapped_for_a_link_meanwhile_leads_nowhere_else(rooted):
    real, link, stop = rooted / "real", rooted / "swap", threading.Event()
    real.mkdir()
    (real / "secret").write_text("harmless")

    def swap():
        number = 0
        while not stop.is_set():
            number += 1
            for target in (rooted.parent / "outside", real):
                temporary = rooted / f".swap{number}"
                temporary.symlink_to(target)
                os.replace(temporary, link)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        seen = set()
        for _ in range(1500):
            for order in ({"type": "read_file"}, {"type": "write_file", "content": "harmless"}):
                try:
                    seen.add(execute(**order, path=str(link / "secret")).get("content"))
                except (program.Failed, OSError):
                    seen.add("refused")
    finally:
        stop.set()
        thread.join()
    assert seen == {"harmless", None, "refused"}
    assert (rooted.parent / "outside" / "secret").read_text() == "secret needle"


def test_roots_hold_in_a_running_agent(server, agent_with, tmp_path):
    (tmp_path / "inside").mkdir()
    agent_with(f'roots = ["{tmp_path}/inside"]\ntypes = ["read_file", "write_file"]')
    assert server.run(type="write_file", path=f"{tmp_path}/inside/f", content="x")["outcome"] == "ok"
    done = server.run(type="read_file", path="/etc/hostname")
    assert (done["status"], done["outcome"]) == ("failed", "refused")
