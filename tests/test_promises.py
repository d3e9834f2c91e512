"""The promises of the design, each a test of the same name, kept with real threads, processes and kills."""

import json
import multiprocessing
import os
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import requests
from conftest import ADMIN, TOKEN, Process, Server, until

import kirosync

HERE = Path(__file__).parent


def put_document(store, identity, content="x", moment=1):
    store.change(lambda pen: pen.put("documents", identity, {"content": content, "timestamp": moment}))


def documents(store):
    return {identity: json.loads(entry.newer()) for identity, entry in store.delta(None).changed["documents"].items()}


# 1


def test_a_reader_never_sees_half_a_record(store, state):
    stopping, failures = threading.Event(), []
    put_document(store, "d", "0" * 50_000)

    def read():
        while not stopping.is_set():
            content = json.loads((state / "documents" / "d.json").read_text())["content"]
            if len(content) != 50_000 or len(set(content)) != 1:
                failures.append(content[:20])

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for number in range(100):
        put_document(store, "d", str(number % 10) * 50_000)
    stopping.set()
    for reader in readers:
        reader.join()
    assert not failures


# 2

TRACE = """
import os, sys, threading, kirosync
store = kirosync.Store(sys.argv[1])
def put(n): store.change(lambda pen: pen.put("documents", f"d{n}", {"content": "x", "timestamp": 1}))
os.write(2, b"START\\n")
if sys.argv[2] == "turn":
    for n in range(8): put(n)
else:
    with store._queued:
        store._committing = True      # someone is committing: the eight gather
    threads = [threading.Thread(target=put, args=(n,)) for n in range(8)]
    for thread in threads: thread.start()
    while len(store._queue) < 8: pass
    with store._queued:
        store._queue[0].bell.release()
    for thread in threads: thread.join()
os.write(2, b"END\\n")
"""


def calls_of(tmp_path, how):
    """Return the system calls that eight changes make, as (name, arguments), traced by the kernel."""
    trace = tmp_path / f"trace-{how}"
    names = "openat,write,fsync,fdatasync,rename,close"
    argv = ["strace", "-f", "-y", "-o", trace, "-e", f"trace={names}", sys.executable, "-c", TRACE, tmp_path / how, how]
    subprocess.run(argv, check=True, capture_output=True, cwd=HERE.parent)
    lines = [line.split(maxsplit=1)[1] for line in trace.read_text().splitlines()]
    marks = [number for number, line in enumerate(lines) if '"START' in line or '"END' in line]
    return lines[marks[0] : marks[1]]


def test_acknowledged_is_durable(tmp_path):
    """Before the answer: contents synced, then the journal, then the rename, then the folder."""
    calls = calls_of(tmp_path, "turn")
    first = [
        line for line in calls if "d0.json" in line or "journal.jsonl" in line or "fsync" in line or "rename" in line
    ]
    wanted = ["write(", "fsync(", "write(", "fdatasync(", "rename(", "fsync("]
    order = [line for line in first if line.split("(")[0] + "(" in wanted][: len(wanted)]
    assert [line.split("(")[0] + "(" for line in order] == wanted, order
    assert ".d0.json" in order[1]
    assert "journal.jsonl" in order[3]
    assert order[5].split("<")[1].split(">")[0].endswith("/documents")


def test_writers_that_wait_together_share_the_cost(tmp_path):
    """Eight in turn sync 24 times; eight at once 8 files, and the journal and the folder once."""
    syncs = {how: sum("sync(" in line for line in calls_of(tmp_path, how)) for how in ("turn", "once")}
    assert syncs == {"turn": 24, "once": 10}


# 3


def append(directory, writer, count):
    """Be a process whose two threads read, merge and write the same records as all the others."""
    store = kirosync.Store(directory)

    def work(thread):
        for number in range(count):
            message = {"role": "user", "content": f"{writer}-{thread}-{number}", "timestamp": number}
            push = {"conversations": {"c": [message]}}
            store.change(lambda pen, push=push: kirosync.take_push(pen, push, ADMIN))

            def increment(pen):
                known = pen.get("documents", "counter") or {"content": "0", "timestamp": 1}
                pen.put("documents", "counter", {**known, "content": str(int(known["content"]) + 1)})

            store.change(increment)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.close()


def test_two_writers_never_lose_a_change(state):
    count = 25
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=append, args=(state, writer, count)) for writer in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    store = kirosync.Store(state)
    messages = json.loads(store.entries["conversations"]["c"].newer())
    assert len({message["content"] for message in messages}) == len(messages) == 3 * 2 * count
    assert documents(store)["counter"]["content"] == str(3 * 2 * count)
    assert store.revision == 2 * 3 * 2 * count
    store.close()


# 4


def test_every_change_has_a_number(store, state, clock):
    seen = []
    other = kirosync.Store(state, clock=clock)
    for number in range(20):
        put_document((store, other)[number % 2], f"d{number % 7}", str(number))
        seen.append((store, other)[number % 2].revision)
    assert seen == list(range(1, 21))
    lines = [json.loads(line) for line in (state / "journal.jsonl").read_text().splitlines()]
    assert [line["revision"] for line in lines if line["op"] == "put"] == seen
    assert lines[-1].keys() >= {"revision", "at", "lastUpdate", "kind", "id", "op"}
    for line in lines:
        if line["op"] == "put":
            assert json.loads((state / "documents" / f"{line['id']}.json").read_text())["revision"] >= line["revision"]
    other.close()


@pytest.mark.parametrize("records", [10, 1000])
def test_asking_whether_there_is_anything_new_costs_one_stat(store, records):
    store.change(
        lambda pen: [pen.put("documents", f"d{n}", {"content": "", "timestamp": 1}) for n in range(records)] and None
    )
    calls = []
    sys.setprofile(lambda frame, event, function: event == "c_call" and calls.append(function))
    try:
        delta = store.delta(store.cursor)
    finally:
        sys.setprofile(None)
    assert not delta.touches(kirosync.KINDS)
    module = {getattr(call, "__module__", "") for call in calls}
    assert [call.__name__ for call in calls if getattr(call, "__module__", "") == "posix"] == ["stat"], module
    assert len(calls) < 300  # a look at every record would be more


@pytest.mark.parametrize("change", ["put", "batch", "delete", "archive", "delete and put", "open"])
def test_a_crash_at_any_system_call_is_noticed_and_repaired(tmp_path, change):
    argv = [sys.executable, HERE / "crash.py", tmp_path, change]
    ran = subprocess.run(
        argv, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(HERE.parent)}
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert int(ran.stdout) >= 10


# 5


def test_merging_twice_changes_nothing(store, clock):
    push = {
        "conversations": {"c": [{"role": "user", "content": "hi", "timestamp": 1}]},
        "documents": {"d": {"content": "x", "timestamp": 1}},
        "commands": {"k": {"type": "execute_bash", "command": "true", "status": "pending", "createdAt": clock.now}},
        "lastUpdate": 5,
    }
    store.change(lambda pen: kirosync.take_push(pen, push, ADMIN))
    cursor = store.cursor
    assert store.change(lambda pen: kirosync.take_push(pen, push, ADMIN)) == "current"
    assert store.cursor == cursor


def test_pushes_of_three_clients_give_the_same_state_in_every_order(tmp_path, clock):
    rng = random.Random(7)
    pushes = [
        {
            "conversations": {
                "c": [
                    {
                        "role": "user",
                        "content": rng.choice("ab") * rng.randint(1, 3),
                        "timestamp": rng.randint(1, 4) + hours,
                    }
                    for _ in range(6)
                ]
            },
            "documents": {"d": {"content": rng.choice("abc"), "timestamp": rng.randint(1, 2) + hours}},
        }
        for hours in (0, 7_200_000, -10_800_000)
    ]
    states = []
    for number, order in enumerate([(0, 1, 2), (2, 1, 0), (1, 0, 2), (0, 0, 2, 1, 2)]):
        store = kirosync.Store(tmp_path / str(number), clock=clock)
        for client in order:
            store.change(lambda pen, push=pushes[client]: kirosync.take_push(pen, push, ADMIN))
        messages = json.loads(store.entries["conversations"]["c"].newer())
        states.append((sorted(map(kirosync.canonical, messages)), documents(store)))
        store.close()
    assert all(state == states[0] for state in states)


# 6


def test_state_is_readable_and_editable_without_kirosync(server, state):
    """vim, rm and cp, on the files of a running service: noticed within 2 s, each with a revision."""
    for name in ("edited", "removed", "copied", "spoiled", "renamed"):
        server.ask("POST", "/sync", json={"documents": {name: {"content": "old", "timestamp": 1}}})
    cursor = server.ask("GET", "/sync").json()["cursor"]
    folder = state / "documents"
    text = (folder / "edited.json").read_text()
    assert text.endswith("}\n")
    assert '\n  "content": "old"' in text
    with (folder / "edited.json").open("w") as file:  # in place, as cp and nano do
        file.write(text.replace("old", "new"))
    (folder / "removed.json").unlink()
    (folder / "fresh.json").write_text('{"content": "by hand"}')
    (folder / "spoiled.json").write_text('{"content": ')
    (folder / "tmp").write_text(text.replace("old", "by rename"))
    os.rename(folder / "tmp", folder / "renamed.json")  # as vim and sed -i do
    started = time.monotonic()

    def noticed():
        delta = server.ask("GET", f"/sync?since={cursor}").json()
        return delta if {"edited", "fresh", "renamed", "spoiled"} <= delta["documents"].keys() else None

    delta = until(noticed, 3)
    assert time.monotonic() - started < 2
    contents = {name: document["content"] for name, document in delta["documents"].items()}
    assert contents == {"edited": "new", "fresh": "by hand", "renamed": "by rename", "spoiled": "old"}
    assert delta["deleted"]["documents"] == ["removed"]
    assert json.loads((folder / "edited.json").read_text())["revision"] > 5
    assert len(list((state / "quarantine").iterdir())) == 2


# 7: that commands end, and are executed once, has its tests in test_agent.py too


def test_no_command_is_executed_twice_and_every_command_ends(server, state, tmp_path, start):
    """Two agents on each link, 40 commands that each leave a line: 40 lines."""
    (tmp_path / "token").write_text(TOKEN)
    http = ("--server", server.url, "--token-file", tmp_path / "token")
    agents = [
        start(Process, "agent.py", *link, "--name", f"agent-{number}", log=tmp_path / "agents.log")
        for number, link in enumerate([("--state", state), ("--state", state), http, http])
    ]
    marks = tmp_path / "marks"
    orders = [
        server.ask("POST", "/command", json={"type": "execute_bash", "command": f"echo {n} >> {marks}"}).json()[
            "commandId"
        ]
        for n in range(40)
    ]
    ended = [server.ask("GET", f"/command/{identity}?wait=30").json() for identity in orders]
    assert {command["outcome"] for command in ended} == {"ok"}
    assert sorted(map(int, marks.read_text().split())) == list(range(40))
    assert all(agent.end() == 0 for agent in agents)


# 8


def limited(size):
    """Let this process write no file beyond *size*: a disk that is full in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FULL = """
import json, sys, kirosync, resource
store = kirosync.Store(sys.argv[1])
def put(n): store.change(lambda pen: pen.put("documents", f"d{n}", {"content": "x" * 100, "timestamp": 1}))
for n in range(5): put(n)
size = (store.directory / "journal.jsonl").stat().st_size
done = 5
for room in range(0, 300, 7):                    # the journal's line is cut off after every 7th byte
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + room, resource.RLIM_INFINITY))
    try:
        put(done)
        done += 1
        size = (store.directory / "journal.jsonl").stat().st_size
    except kirosync.Full as full:
        assert full.status == 507
    assert (store.directory / "journal.jsonl").stat().st_size == size
    assert len(store.entries["documents"]) == done
for size in (0, 100, 5000):                      # the record itself, cut off anywhere
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        store.change(lambda pen: pen.put("documents", "large", {"content": "x" * 9000, "timestamp": 1}))
        raise SystemExit("written beyond the limit")
    except kirosync.Full:
        assert not [path for path in store.directory.rglob(".*.json.*")]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert done > 5
put(done)
print(done + 1, [str(path) for path in store.directory.rglob(".*") if path.name != ".lock"])
"""


def test_a_journal_that_cannot_be_completed_is_put_back(state):
    ran = subprocess.run(
        [sys.executable, "-c", FULL, state], capture_output=True, text=True, check=False, cwd=HERE.parent
    )
    assert ran.returncode == 0, ran.stderr
    done, left = ran.stdout.split(maxsplit=1)
    assert left.strip() == "[]"
    store = kirosync.Store(state)
    assert len(documents(store)) == int(done) == store.revision
    store.close()


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("only root can mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_full_disk_loses_nothing_acknowledged(small_disk, tmp_path, start):
    server = start(Server, small_disk / "state", tmp_path / "log")
    acknowledged = []
    for number in range(200):
        push = {"documents": {f"d{number}": {"content": "x" * 9000, "timestamp": 1}}}
        answer = server.ask("POST", "/sync?since=x", json=push)
        if answer.status_code != 200:
            break
        acknowledged.append(f"d{number}")
    assert answer.status_code == 507
    assert "disk of the state directory is full" in answer.json()["error"]
    assert len(acknowledged) > 5
    assert server.ask("GET", "/sync").json()["documents"].keys() == set(acknowledged)
    assert server.ask("POST", "/sync", json=push).status_code == 507
    (small_disk / "state" / "documents" / f"{acknowledged.pop()}.json").unlink()
    (small_disk / "state" / "documents" / f"{acknowledged.pop()}.json").unlink()
    until(lambda: server.ask("POST", "/sync", json=push).status_code == 200, 5, pause=0.1)
    acknowledged += push["documents"]
    server.end(9)
    again = start(Server, small_disk / "state", tmp_path / "log")
    assert again.ask("GET", "/sync").json()["documents"].keys() == set(acknowledged)


def test_a_killed_service_loses_nothing_acknowledged(state, tmp_path, start):
    """SIGKILL at random while clients write; whatever had its 200 is there afterwards, and once."""
    rng, acknowledged = random.Random(3), set()
    server = None
    for life in range(4):
        server = start(Server, state, tmp_path / "log")
        stopping = threading.Event()

        def write(writer, server=server, life=life, stopping=stopping):
            for number in range(10_000):
                identity = f"{life}-{writer}-{number}"
                push = {"documents": {identity: {"content": identity, "timestamp": 1}}}
                try:
                    headers = dict(server.session.headers)
                    answer = requests.post(f"{server.url}/sync?since=x", json=push, headers=headers, timeout=5)
                except requests.RequestException:
                    return
                if answer.status_code == 200:
                    acknowledged.add(identity)
                if stopping.is_set():
                    return

        writers = [threading.Thread(target=write, args=(writer,)) for writer in range(4)]
        for writer in writers:
            writer.start()
        time.sleep(rng.uniform(0.2, 0.7))
        server.end(9)
        stopping.set()
        for writer in writers:
            writer.join()
    store = kirosync.Store(state)
    found = documents(store)
    assert len(acknowledged) > 20
    assert acknowledged <= found.keys()
    assert all(document["content"] == identity for identity, document in found.items())
    store.close()


def test_a_cut_connection_leaves_nothing_half_done(server):
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({"documents": {"d": {"content": "x" * 100_000, "timestamp": 1}}}).encode()
    head = f"POST /sync HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer test-token\r\nContent-Length: {len(body)}\r\n\r\n"
    for sent in (0, 10, len(body) // 2, len(body) - 1):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body[:sent])
    assert server.ask("GET", "/sync").json()["documents"] == {}
    assert server.ask("POST", "/sync", data=body).status_code == 200


def test_a_full_disk_can_still_be_read_and_its_agent_lives(small_disk, tmp_path, start):
    state = small_disk / "state"
    server = start(Server, state, tmp_path / "log")
    server.ask("POST", "/sync", json={"documents": {"d": {"content": "x", "timestamp": 1}}})
    agent = start(Process, "agent.py", "--state", state, log=tmp_path / "agent.log")
    until(lambda: "agent" in (tmp_path / "agent.log").read_text())
    server.end()
    filling = small_disk / "filling"
    with filling.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    (state / "commands" / "c.json").symlink_to(tmp_path / "order.json")
    (tmp_path / "order.json").write_text('{"type": "execute_bash", "command": "echo ran"}')
    for _ in range(40):  # each start would add a line to the journal
        store = kirosync.Store(state)
        store._journal.close()
    server = start(Server, state, tmp_path / "log")
    assert server.ask("GET", "/sync").json()["documents"].keys() == {"d"}
    assert server.ask("POST", "/command", json={"type": "execute_bash", "command": "true"}).status_code == 507
    filling.unlink()
    assert server.run(type="execute_bash", command="echo again")["result"]["stdout"] == "again\n"
    assert agent.popen.poll() is None
