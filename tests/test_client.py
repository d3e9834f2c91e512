"""The Python client: its rules by the vectors, and a copy in step with a real service, whatever befalls that."""

import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import threading

import pytest
from conftest import TOKEN, Server, until
from hypothesis import given
from test_rules import MESSAGES
from vectors import FILE, text

import agent
import client
import kirosync

RULES = {
    "mergeMessages": client.merge_messages,
    "joinDocuments": lambda mine, theirs: client.join(mine, theirs, client.document_rank),
    "applied": client.applied,
    "missing": client.missing,
}
ROOT = FILE.parent.parent
HI = {"role": "user", "content": "hi", "timestamp": 1}
YO = {"role": "assistant", "content": "yo", "timestamp": 2}


def document(content, timestamp=1):
    return {"content": content, "timestamp": timestamp}


def test_the_vectors_are_what_the_rules_say():
    assert FILE.read_text() == text(), "python tests/vectors.py makes them anew"


def test_every_vector_is_what_the_client_makes_of_it():
    for vector in json.loads(FILE.read_text()):
        gives = RULES[vector["rule"]](*vector["of"])
        assert json.dumps(gives, sort_keys=True) == json.dumps(vector["gives"], sort_keys=True), vector


@given(MESSAGES, MESSAGES)
def test_messages_are_merged_as_the_service_does(mine, theirs):
    mine = kirosync.merge_messages([], mine)[0]
    ours = client.merge_messages(mine, theirs)
    assert list(map(kirosync.canonical, ours)) == list(
        map(kirosync.canonical, kirosync.merge_messages(mine, theirs)[0])
    )


@given(MESSAGES, MESSAGES)
def test_what_is_missing_brings_back_what_was_lost(mine, theirs):
    here, there = ({"conversations": {"c": messages}, "documents": {}, "commands": {}} for messages in (mine, theirs))
    here, there = client.merge(client.EMPTY, here), client.merge(client.EMPTY, there)
    assert client.merge(there, client.missing(there, here)) == client.merge(there, here)


@pytest.fixture
def service(server):
    return client.Service(server.url, TOKEN)


@pytest.fixture
def follow():
    """Let copies follow in threads of their own; the value is a function that returns the queue of what one hears."""
    copies = []

    def follow(copy):
        heard = queue.SimpleQueue()
        thread = threading.Thread(target=copy.follow, args=(heard.put,), daemon=True)
        thread.start()
        copies.append((copy, thread))
        return heard

    yield follow
    for copy, _ in copies:
        copy.close()


def heard_of(heard, kind, identity):
    """Return the first change that is about a record."""
    while identity not in [*(change := heard.get(timeout=30)).changed.get(kind, []), *change.deleted.get(kind, [])]:
        pass
    return change


def test_what_one_writes_the_other_hears(service, follow):
    one, other = client.Copy(service), client.Copy(service)
    heard = follow(other)
    one.write({"conversations": {"c": [HI]}, "documents": {"d": document("x")}})
    heard_of(heard, "documents", "d")
    assert other.state["conversations"] == one.state["conversations"] == {"c": [HI]}
    one.write({"conversations": {"c": [YO]}})
    heard_of(heard, "conversations", "c")
    assert other.state == one.state
    service.request("DELETE", "/conversation/c")
    assert heard_of(heard, "conversations", "c").deleted["conversations"] == ["c"]
    assert other.state["conversations"] == {}
    one.sync()
    assert other.state == one.state


def test_a_copy_asks_only_for_what_is_new_also_after_a_restart_of_its_program(service, tmp_path, monkeypatch):
    copy = client.Copy(service, tmp_path / "copy.json")
    copy.write({"documents": {f"d{number}": document("x") for number in range(9)}})
    asked = []
    monkeypatch.setattr(
        service, "sync", lambda query, **wait: asked.append(query) or client.Service.sync(service, query)
    )
    again = client.Copy(service, tmp_path / "copy.json")
    assert again.state == copy.state
    assert not again.sync()
    assert asked == [{"since": copy.cursor}]
    assert (tmp_path / "copy.json").stat().st_mode & 0o777 == 0o600
    assert [file.name for file in tmp_path.glob("*copy*")] == ["copy.json"]


def restarted(server, state, tmp_path, start):
    """Start a service at the same address as *server*, which has ended."""
    return start(Server, state, tmp_path / "log", "--port", server.url.rpartition(":")[2])


def test_what_is_written_while_the_service_is_away_arrives(state, tmp_path, start, follow):
    server = start(Server, state, tmp_path / "log")
    service = client.Service(server.url, TOKEN)
    copy = client.Copy(service, tmp_path / "copy.json")
    copy.write({"documents": {"d": document("x")}})
    heard = follow(copy)
    heard_of(heard, "documents", "d")
    assert server.end() == 0
    copy.write({"documents": {"d": document("while away", 2)}})
    copy.write({"conversations": {"c": [HI]}})
    assert copy.state["documents"]["d"]["content"] == "while away"
    assert client.Copy(service, tmp_path / "copy.json").state == copy.state
    again = restarted(server, state, tmp_path, start)
    heard_of(heard, "conversations", "c")
    assert again.ask("GET", "/sync").json()["documents"] == {"d": document("while away", 2)}
    assert not copy.outbox


def test_what_a_restored_backup_has_lost_is_said_and_can_be_brought_back(state, tmp_path, start, follow):
    server = start(Server, state, tmp_path / "log")
    copy = client.Copy(client.Service(server.url, TOKEN))
    copy.write({"conversations": {"c": [HI]}})
    shutil.copytree(state, tmp_path / "backup")
    copy.write({"conversations": {"c": [YO]}, "documents": {"d": document("later")}})
    heard = follow(copy)
    heard_of(heard, "documents", "d")
    assert server.end() == 0
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "backup", state)
    again = restarted(server, state, tmp_path, start)
    while not (change := heard.get(timeout=30)).lost:
        pass
    assert change.lost == {"conversations": {"c": [YO]}, "documents": {"d": document("later")}}
    assert copy.state["conversations"] == {"c": [HI]}
    copy.write(change.lost)
    assert again.ask("GET", "/sync").json()["conversations"] == {"c": [HI, YO]}


def test_what_the_service_refuses_is_said_and_keeps_nothing_else_back(service, follow):
    copy = client.Copy(service)
    copy.write({"documents": {"d": document("x")}})
    before = copy.state
    with pytest.raises(client.Refused, match=r"documents\.e\.timestamp: must be a number") as refusal:
        copy.write({"documents": {"e": {"content": "x"}}})
    assert refusal.value.status == 400
    with pytest.raises(client.Refused, match=r"documents\.e\.path: expected str, got int") as refusal:
        copy.write({"documents": {"e": {**document("x"), "path": 1}}})
    assert refusal.value.status == 400
    assert (copy.state, copy.outbox) == (before, [])
    copy.outbox = [{"documents": {"e": {"content": "x", "timestamp": "now"}}}, {"documents": {"f": document("y")}}]
    change = copy.sync()
    assert [why for _, why in change.refused] == ["documents.e.timestamp: expected number, got str"]
    assert change.changed["documents"] == ["d", "f"]
    assert not copy.sync()
    assert copy.state["documents"].keys() == {"d", "f"}


def test_what_a_token_may_not_is_refused_and_keeps_nothing_else_back(server, state, tmp_path):
    command = [sys.executable, "kirosync.py", "token", "add", "reader", "--scope", "read", "--state", str(state)]
    token = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    copy = client.Copy(client.Service(server.url, token))
    with pytest.raises(client.Refused, match="a token of the scope read may not ask this; possible: client") as refusal:
        copy.write({"documents": {"d": document("x")}})
    assert (refusal.value.status, copy.outbox, copy.state["documents"]) == (403, [], {})
    assert not copy.sync()
    with pytest.raises(agent.Unreachable, match="may not"):  # which an agent tries again
        agent.HttpLink(server.url, token, tmp_path).report("c", {})


@pytest.mark.parametrize(
    "push",
    [
        {"documents": []},
        {"conversations": {"c": {}}},
        {"conversations": {"c": ["hi"]}},
        {"conversations": {"c": [{"role": "user", "timestamp": 1}]}},
        {"conversations": {"c": [{"role": "user", "content": "", "timestamp": True}]}},
        {"documents": {"d": None}},
    ],
)
def test_what_could_not_be_merged_never_enters_a_copy(tmp_path, push):
    away = client.Service("http://127.0.0.1:9", TOKEN)
    copy = client.Copy(away, tmp_path / "copy.json")
    with pytest.raises(client.Refused):
        copy.write(push)
    copy.write({"conversations": {"c": [HI]}})
    assert client.Copy(away, tmp_path / "copy.json").state["conversations"] == {"c": [HI]}


def test_a_token_that_no_header_can_carry_is_refused_without_being_shown():
    with pytest.raises(ValueError, match="the token has characters that no header can carry"):
        client.Service("http://127.0.0.1:9", "secret\nInjected: yes")


def test_no_service_can_have_its_client_wait_for_more_than_an_hour():
    with socket.create_server(("127.0.0.1", 0)) as there:

        def answer():
            with there.accept()[0] as asked:
                asked.recv(1 << 16)
                asked.sendall(b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nRetry-After: " + b"9" * 400 + b"\r\n\r\n")

        threading.Thread(target=answer).start()
        with pytest.raises(client.Unreachable, match="answered 503") as problem:
            client.Service(f"http://127.0.0.1:{there.getsockname()[1]}", TOKEN).sync({})
    assert problem.value.pause == 3600


def test_a_service_that_is_not_there_or_is_none_is_said_without_the_token(tmp_path, server):
    for url, token, why in (
        ("http://127.0.0.1:9", TOKEN, "refused"),
        (server.url, "another", "does not take the token"),
        (f"{server.url}/docs", TOKEN, "is no kirosync"),
    ):
        copy = client.Copy(client.Service(url, token))
        with pytest.raises(client.Unreachable, match=why) as problem:
            copy.sync()
        assert token not in str(problem.value) or token == "another"


def test_threads_that_write_and_follow_at_once_lose_nothing(service, follow):
    copy, other = client.Copy(service), client.Copy(service)
    follow(copy), follow(other)

    def write(writer):
        for number in range(20):
            copy.write(
                {"conversations": {"c": [{"role": "user", "content": f"{writer}.{number}", "timestamp": number}]}}
            )

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: len(other.state["conversations"].get("c", [])) == 80, 30)
    until(lambda: copy.state == other.state, 30)


@pytest.mark.skipif(not shutil.which("node"), reason="needs node")
def test_the_javascript_client_passes_its_own_tests():
    ran = subprocess.run(
        ["node", "--test", "tests/client.test.js"],
        cwd=FILE.parent.parent,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert "# fail 0" in ran.stdout
    assert "# pass 0" not in ran.stdout


def test_an_answer_older_than_a_write_is_not_taken(service, monkeypatch):
    copy = client.Copy(service)
    copy.write({"documents": {"d": document("x")}})
    ask = service.sync

    def write_meanwhile(query, push=None, wait=0):
        said = ask(query, push, wait)
        if push is None and copy.state["documents"]["d"]["content"] == "x":
            copy.write({"documents": {"d": document("y", 2), "e": document("z")}})
        return said

    monkeypatch.setattr(service, "sync", write_meanwhile)
    assert copy.sync().changed["documents"] == ["d", "e"]
    assert copy.sync().changed["documents"] == []
    assert copy.state["documents"] == {"d": document("y", 2), "e": document("z")}


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"cursor": "", "outbox": [], "base": {}}'])
def test_a_spoiled_file_is_named(service, tmp_path, text):
    (tmp_path / "copy.json").write_text(text)
    with pytest.raises(ValueError, match=r"copy\.json is no copy; remove it"):
        client.Copy(service, tmp_path / "copy.json")


NONSENSE = [
    {"cursor": 5},
    {"cursor": "a", "conversations": None},
    {"cursor": "a", "documents": []},
    {"cursor": "a", "serverTime": None},
    {"cursor": "a", "deleted": {"documents": None}},
    "cursor",
    None,
]


@pytest.mark.parametrize("said", NONSENSE)
def test_a_nonsense_answer_is_none_and_costs_no_write(service, monkeypatch, said):
    copy = client.Copy(service)
    monkeypatch.setattr(service, "ask", lambda method, *more, **held: {"data": said} if method == "POST" else said)
    copy.write({"conversations": {"c": [HI]}})
    with pytest.raises(client.Unreachable, match="is no kirosync"):
        copy.sync()
    assert copy.outbox == [{"conversations": {"c": [HI]}}]


def test_many_messages_of_one_moment_are_merged_in_no_time():
    messages = [{"role": "user", "content": f"{number:06}", "timestamp": 1} for number in range(20_000)]
    assert len(client.merge_messages(messages, messages)) == 20_000
