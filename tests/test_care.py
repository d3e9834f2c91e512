"""Care: backup, restore, fsck and doctor, beside a service and agents that go on, and with none."""

import contextlib
import gzip
import hashlib
import io
import json
import os
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from pathlib import Path

import pytest
from conftest import ADMIN, ROOT, Clock, Process, Server, until

import kirosync

HERE = Path(__file__).parent
HI = {"role": "user", "content": "hi", "timestamp": 1}
RUN = {"type": "execute_bash", "command": "true"}


def care(*argv, **more):
    """Run one of the commands; return what became of it."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("KIROSYNC_")}
    argv = [sys.executable, ROOT / "kirosync.py", *map(str, argv)]
    return subprocess.run(argv, capture_output=True, env=clean, check=False, **more)


def backed_up(state, name="backup.tar.gz"):
    file = state.parent / name
    ran = care("backup", "--state", state, file)
    assert ran.returncode == 0, ran.stderr
    return file


def restored(state, file):
    ran = care("restore", "--state", state, file)
    assert ran.returncode == 0, ran.stderr
    return ran.stderr.decode()


def fsck(state, *options):
    """Return the exit code, and what was found."""
    ran = care("fsck", "--json", "--state", state, *options)
    assert ran.returncode in (0, 1), ran.stderr
    return ran.returncode, json.loads(ran.stdout)


def push(store, **records):
    return store.change(lambda pen: kirosync.take_push(pen, records, ADMIN))


def document(content, timestamp=1):
    return {"content": content, "timestamp": timestamp}


def queue(store, key, **order):
    return store.change(lambda pen: kirosync.queue(pen, {**RUN, **order}, key))[0]["id"]


def report(store, identity, **patch):
    return store.change(lambda pen: kirosync.report(pen, identity, patch))


def contents(state):
    """Return the bytes of every file, by path, less what is of the moment."""
    files = (path for path in state.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(state)): path.read_bytes() for path in files}


def names_in(file):
    with tarfile.open(file) as tar:
        return tar.getnames()


def command(state, identity):
    return json.loads((state / "commands" / f"{identity}.json").read_text())


# Backup


def test_a_backup_holds_all_of_the_state_and_nothing_of_the_moment(store, state):
    push(store, conversations={"c": [HI]}, documents={"a b": document("x"), "gone": document("y")})
    push(store, documents={"a b": document("newer", 2)})
    store.change(lambda pen: pen.delete("documents", "gone", 9))
    identity = queue(store, "k")
    store.append(identity, "stdout", 0, b"printed")
    store.change(lambda pen: pen.announce("me", {"kind": "agent", "types": []}))
    (state / "token").write_text("secret")
    (state / "log").mkdir()
    for other in ("agents/me.lock", "log/audit.jsonl", ".told.json.99999999", "notes.txt", "documents/d.json~"):
        (state / other).write_text("x")
    names = names_in(backed_up(state))
    held = set(contents(state)) - {"agents/me.lock", "log/audit.jsonl", ".told.json.99999999", "notes.txt"}
    assert set(names) == held - {"documents/d.json~"}
    assert names[-1] == "journal.jsonl"
    assert not [path for path in state.iterdir() if path.name.startswith(".snapshot")]


def test_a_backup_is_for_its_owner_alone_in_a_file_or_on_stdout(store, state):
    push(store, documents={"d": document("x")})
    file = backed_up(state)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    with tarfile.open(file) as tar:
        assert {member.mode for member in tar} == {0o600}
    ran = care("backup", "--state", state, "-")
    with tarfile.open(fileobj=io.BytesIO(ran.stdout)) as tar:
        assert tar.getnames() == names_in(file)
    assert [path.name for path in state.parent.iterdir()] == ["state", "backup.tar.gz"] or len(names_in(file)) == 2


def test_nobody_waits_while_a_backup_is_packed_and_it_stays_what_it_was(store, state):
    push(store, documents={"d": document("before")})
    identity = queue(store, "k")
    store.append(identity, "stdout", 0, b"one")
    with kirosync.Snapshot(state) as snapshot:
        push(store, documents={"d": document("after", 2)})
        store.append(identity, "stdout", 3, b"two")
        store.change(lambda pen: pen.delete("commands", identity, 9))
        packed = io.BytesIO()
        snapshot.pack(packed)
        assert snapshot.held < 1
    packed.seek(0)
    with tarfile.open(fileobj=packed) as tar:
        assert json.load(tar.extractfile("documents/d.json"))["content"] == "before"
        assert tar.extractfile(f"output/{identity}.out").read() == b"one"
        assert b'"delete"' not in tar.extractfile("journal.jsonl").read()


def test_a_backup_under_load_is_of_one_moment(server, state, tmp_path):
    """Two documents always change together: they are alike in every backup, and every backup can be restored."""
    stopping, written = threading.Event(), []

    def load():
        while not stopping.is_set():
            number = str(len(written))
            pair = {name: document(number * 500, len(written)) for name in ("one", "two")}
            assert server.ask("POST", "/sync?since=x", json={"documents": pair}).ok
            written.append(number)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        until(lambda: len(written) > 5)
        files = [backed_up(state, f"{number}.tar.gz") for number in range(4)]
    finally:
        stopping.set()
        thread.join()
    for number, file in enumerate(files):
        restored(tmp_path / f"again{number}", file)
        pair = [json.loads(path.read_text())["content"] for path in (tmp_path / f"again{number}/documents").iterdir()]
        assert len(pair) == 2
        assert pair[0] == pair[1]


def test_what_was_just_done_by_hand_is_in_the_backup_as_what_it_became(store, state):
    push(store, documents={"d": document("x"), "e": document("y")})
    (state / "documents" / "d.json").write_text('{"content": "by hand"}')
    (state / "documents" / "new.json").write_text('{"content": "new"}')
    (state / "documents" / "e.json").write_text('{"half')
    file = backed_up(state)
    restored(state.parent / "other", file)
    found = {
        path.stem: json.loads(path.read_text())["content"] for path in (state.parent / "other/documents").iterdir()
    }
    assert found == {"d": "by hand", "new": "new"}
    assert [name for name in names_in(file) if name.startswith("quarantine/documents.e.")]


def test_a_store_that_is_opened_beside_a_backup_leaves_it_alone_and_removes_one_that_was_left(store, state, clock):
    push(store, documents={"d": document("x")})
    (state / ".snapshot.left").mkdir()
    (state / ".restore.left").mkdir()
    with kirosync.Snapshot(state) as snapshot:
        kirosync.Store(state, clock=clock).close()
        assert (snapshot.folder / "documents" / "d.json").exists()
    assert not [*state.glob(".snapshot*"), *state.glob(".restore*")]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another")
def test_what_root_does_to_the_state_of_another_user_can_be_read_by_that_user():
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        state = Path(folder, "state")
        store = kirosync.Store(state)
        push(store, documents={"d": document("x"), "e": document("y")})
        queue(store, "k")
        store.close()
        for path in [state, *state.rglob("*")]:
            os.chown(path, 12345, 12345)
        (state / "documents" / "d.json").write_text('{"content": "by hand"}')
        kirosync.settle(state)
        assert {path.stat().st_uid for path in [state, *state.rglob("*")]} == {12345}
        file = backed_up(state)
        (state / "notes.txt").write_text("mine")
        os.chown(state / "notes.txt", 12345, 12345)
        os.chown(state / "documents" / "e.json", 0, 0)
        (state / "documents" / "d.json").unlink()
        assert fsck(state, "--repair")[0] == 0
        restored(state, file)
        assert fsck(state)[0] == 0
        assert {path.stat().st_uid for path in [state, *state.rglob("*")]} == {12345}


def test_a_backup_waits_for_who_is_changing_something(store, state, monkeypatch):
    monkeypatch.setattr(kirosync, "LOCK_S", 0.05)
    with store._lock.held(), pytest.raises(kirosync.Busy, match="has held"), kirosync.Snapshot(state):
        pass


def test_a_backup_of_nothing_is_refused(tmp_path):
    ran = care("backup", "--state", tmp_path / "nowhere", tmp_path / "file")
    assert ran.returncode == 1
    assert b"there is no state in" in ran.stderr
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("work", ["backup", "restore"])
def test_stopped_at_any_system_call_it_is_done_or_not_begun(tmp_path, work):
    ran = subprocess.run(
        [sys.executable, HERE / "crash.py", tmp_path, work],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) > 20


# Restore


def test_a_restore_brings_back_the_backup_and_keeps_what_was_there(store, state):
    push(store, conversations={"c": [HI]}, documents={"d": document("x")})
    file, before = backed_up(state), contents(state)
    push(store, documents={"d": document("spoiled", 2), "more": document("m")})
    store.change(lambda pen: pen.delete("conversations", "c", 9))
    spoiled = contents(state)
    said = restored(state, file)
    assert {path: text for path, text in contents(state).items() if path in before} == {
        **before,
        "journal.jsonl": (state / "journal.jsonl").read_bytes(),
    }
    kept = next(state.glob("before-restore-*"))
    assert str(kept) in said
    assert contents(kept).items() >= {p: t for p, t in spoiled.items() if p.startswith(("doc", "con", "del"))}.items()
    assert not (state / "documents" / "more.json").exists()
    assert fsck(state)[0] == 0


def test_cursors_from_before_the_backup_stay_and_those_from_after_it_are_unknown(store, state):
    push(store, documents={"a": document("x")})
    early = store.cursor
    push(store, documents={"b": document("x")})
    at = store.cursor
    file = backed_up(state)
    later = [(push(store, documents={"a": document("y", number + 5)}), store.cursor)[1] for number in range(5)]
    restored(state, file)
    assert store.delta(early).full is False
    assert set(store.delta(early).changed["documents"]) == {"b"}
    assert (store.delta(at).full, store.delta(at).changed["documents"]) == (False, {})
    assert all(store.delta(cursor).full for cursor in later)
    assert json.loads(store.delta(later[0]).changed["documents"]["a"].newer())["content"] == "x"


def test_numbers_are_never_used_twice(store, state):
    push(store, documents={"a": document("x")})
    file = backed_up(state)
    for number in range(10):
        push(store, documents={"a": document("y", number + 5)})
    highest = store.revision
    queue(store, "k")
    restored(state, file)
    push(store, documents={"a": document("z", 50)})
    lines = [json.loads(line) for line in (state / "journal.jsonl").read_text().splitlines()]
    opened = [(line["revision"], line["id"]) for line in lines if line["op"] == "open"]
    assert json.loads((state / "documents" / "a.json").read_text())["revision"] > highest
    assert [revision for revision, _ in opened[-3:]] >= [1, highest]
    second = kirosync.Store(state, clock=store.clock)
    assert second.revision == store.revision
    second.close()


def test_a_restore_onto_a_longer_past_and_onto_a_shorter_one_both_go_forwards(store, state, clock):
    for number in range(20):
        push(store, documents={"a": document("y", number + 5)})
    file, ended = backed_up(state), store.revision
    other = kirosync.Store(state.parent / "other", clock=clock)
    push(other, documents={"z": document("x")})
    known = other.cursor
    restored(other.directory, file)
    assert other.delta(known).full
    push(other, documents={"z": document("x")})
    assert other.revision > ended
    other.close()


def test_open_commands_of_a_backup_end_unless_they_are_still_as_they_were(store, state):
    names = ("pending", "untouched", "claimed since", "running", "ended since", "claimed anew", "over", "removed")
    ids = {name: queue(store, name, retryable=name == "claimed anew") for name in names}
    hold = {"status": "processing", "agent": "me", "claim": "x", "lease": 60}
    for name in ("running", "ended since", "claimed anew"):
        report(store, ids[name], **hold)
    report(store, ids["over"], status="processing")
    report(store, ids["over"], status="completed", result=1)
    store.append(ids["running"], "stdout", 0, b"one")
    file = backed_up(state)
    store.append(ids["running"], "stdout", 3, b"two")
    store.clock.now += 5000
    report(store, ids["running"], **hold)
    report(store, ids["claimed since"], **hold)
    report(store, ids["pending"], status="failed", error="x", outcome="error")
    report(store, ids["ended since"], status="completed", agent="me", claim="x")
    report(store, ids["claimed anew"], status="pending", agent="me", claim="x")
    report(store, ids["claimed anew"], **{**hold, "claim": "y"})
    store.change(lambda pen: pen.delete("commands", ids["removed"], pen.now))
    lease = command(state, ids["running"])["leaseUntil"]
    restored(state, file)
    found = {name: command(state, identity) for name, identity in ids.items()}
    assert {name: (each["status"], each.get("outcome")) for name, each in found.items()} == {
        "pending": ("failed", "expired"),
        "untouched": ("pending", None),
        "claimed since": ("failed", "expired"),
        "running": ("processing", None),
        "ended since": ("failed", "lost"),
        "claimed anew": ("failed", "lost"),
        "over": ("completed", "ok"),
        "removed": ("failed", "expired"),
    }
    assert all(each["error"].startswith("restored from a backup") for each in found.values() if "error" in each)
    assert found["running"]["leaseUntil"] == lease
    assert store.read_stream(ids["running"], "stdout", 0, 9) == b"onetwo"


def test_what_was_queued_since_does_not_come_back_from_a_stale_client(store, state):
    push(store, documents={"d": document("x")})
    file = backed_up(state)
    identity = queue(store, "since")
    stale = {"commands": {identity: {key: v for key, v in command(state, identity).items() if key != "revision"}}}
    report(store, identity, status="processing")
    report(store, identity, status="completed")
    restored(state, file)
    push(store, **stale)
    assert identity not in store.all("commands")


def test_on_a_fresh_machine_every_open_command_ends_and_the_tokens_come_along(store, state, tmp_path):
    identity = queue(store, "k")
    (state / "token").write_text("secret\n")
    said = restored(tmp_path / "fresh", backed_up(state))
    assert command(tmp_path / "fresh", identity)["outcome"] == "expired"
    assert identity in said
    assert (tmp_path / "fresh" / "token").read_text() == "secret\n"
    assert fsck(tmp_path / "fresh")[0] == 0


def test_a_token_that_was_revoked_since_stays_so(store, state):
    push(store, documents={"d": document("x")})
    for name, text in (("token", "old"), ("tokens.json", '{"old": 1}')):
        (state / name).write_text(text)
    file = backed_up(state)
    (state / "token").write_text("new")
    (state / "tokens.json").unlink()
    restored(state, file)
    assert (state / "token").read_text() == "new"
    assert not (state / "tokens.json").exists()


def test_a_running_service_and_agent_go_on_with_what_was_restored_and_run_nothing_twice(agent, state, tmp_path, start):
    """One command runs through it all, one waits for an agent that comes after the backup, one is queued since."""
    server, traces = agent, tmp_path / "traces"

    def post(line, **more):
        order = {"type": "execute_bash", "command": f"echo {line} >> {traces}", **more}
        return server.ask("POST", "/command", json=order).json()["commandId"]

    def state_of(identity):
        return server.ask("GET", f"/command/{identity}").json()

    through = f"echo begun >> {traces}; echo one; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; echo two"
    running = server.ask("POST", "/command", json={"type": "execute_bash", "command": through}).json()["commandId"]
    late = post("late", target="late")
    until(lambda: traces.exists() and state_of(running)["status"] == "processing")
    until(lambda: server.ask("GET", f"/command/{running}/output").text == "one\n")
    file, cursor = backed_up(state), server.ask("GET", "/sync").json()["cursor"]
    start(Process, "agent.py", "--state", state, "--name", "late", log=tmp_path / "late.log")
    until(lambda: state_of(late)["status"] == "completed")
    since = post("since")
    until(lambda: state_of(since)["status"] == "completed")
    cursor = server.ask("GET", "/sync").json()["cursor"]
    answers = []
    waiter = threading.Thread(target=lambda: answers.append(server.ask("GET", f"/sync?since={cursor}&wait=30").json()))
    waiter.start()
    restored(state, file)
    waiter.join(10)
    assert answers, "who waits is woken"
    assert answers[0]["full"]
    assert set(answers[0]["commands"]) == {running, late}
    assert state_of(late)["outcome"] == "expired"
    (tmp_path / "go").touch()
    until(lambda: state_of(running)["status"] == "completed")
    assert state_of(running)["result"]["stdout"] == "one\ntwo\n"
    assert server.ask("GET", f"/command/{running}/output").text == "one\ntwo\n"
    after = server.ask("POST", "/command?wait=20", json={"type": "execute_bash", "command": f"echo after >> {traces}"})
    assert after.json()["status"] == "completed"
    assert sorted(traces.read_text().split()) == ["after", "begun", "late", "since"]
    assert fsck(state)[0] == 0
    identity, log = after.json()["commandId"], state / "log" / "audit.jsonl"
    until(lambda: f'"id":"{identity}","op":"put","type":"execute_bash","status":"completed"' in log.read_text())
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["from"] for line in lines if line["op"] == "restore"] == ["console"]
    assert [line["status"] for line in lines if line["id"] == late] == ["pending", "processing", "completed", "failed"]
    assert care("audit", "verify", "--state", state).returncode == 0


def member(name, text=b"{}", **more):
    made = tarfile.TarInfo(name)
    made.size = len(text)
    vars_of = {"mode": 0o600, **more}
    for key, value in vars_of.items():
        setattr(made, key, value)
    return made, text


def altered(file, change):
    """Return a backup made of the members of *file*, [(member, bytes)], after a *change*."""
    with tarfile.open(file) as tar:
        members = [(each, tar.extractfile(each).read()) for each in tar]
    hostile = file.with_name("hostile.tar.gz")
    with tarfile.open(hostile, "w:gz", format=tarfile.PAX_FORMAT) as tar:
        for each, text in change(members):
            tar.addfile(each, io.BytesIO(text))
    return hostile


def replaced(members, name, old, new):
    texts = [(each, text.replace(old, new) if each.name == name else text) for each, text in members]
    for each, text in texts:
        each.size = len(text)
    return texts


LINK = {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd", "size": 0}
HARD = {"type": tarfile.LNKTYPE, "linkname": "documents/d.json", "size": 0}
HOSTILE = {
    "outside": (lambda m: [member("../outside"), *m], "is nothing that a backup holds"),
    "absolute": (lambda m: [member("/tmp/outside"), *m], "is nothing that a backup holds"),
    "deeper outside": (lambda m: [member("quarantine/../../outside"), *m], "is nothing that a backup holds"),
    "a link": (lambda m: [member("documents/l.json", **LINK), *m], "is not a plain file"),
    "a hard link": (lambda m: [*m[:-1], member("documents/l.json", **HARD), m[-1]], "is not a plain file"),
    "a device": (lambda m: [member("documents/l.json", type=tarfile.CHRTYPE, size=0), *m], "is not a plain file"),
    "a pipe": (lambda m: [member("documents/l.json", type=tarfile.FIFOTYPE, size=0), *m], "is not a plain file"),
    "a folder": (lambda m: [member("documents/l.json", type=tarfile.DIRTYPE, size=0), *m], "is not a plain file"),
    "twice": (lambda m: [m[0], *m], "is in it twice"),
    "a strange name": (lambda m: [member("documents/a b.json"), *m], "is nothing that a backup holds"),
    "a lock": (lambda m: [member(".lock"), *m], "is nothing that a backup holds"),
    "a long name": (lambda m: [member("quarantine/" + "x" * (2 << 20)), *m], "name longer than any of ours"),
    "a program": (lambda m: [member("kirosync.py"), *m], "is nothing that a backup holds"),
    "no journal": (lambda m: m[:-1], "does not end with the journal"),
    "more behind": (lambda m: [*m, member("documents/z.json")], "does not end with the journal"),
    "other bytes": (lambda m: replaced(m, "documents/d.json", b"x", b"y"), "is not as the journal says"),
    "no record": (lambda m: replaced(m, "documents/d.json", b"content", b"CONTENT"), "is no record"),
    "one missing": (lambda m: [each for each in m if each[0].name != "documents/d.json"], "is missing"),
    "one too many": (lambda m: [member("documents/z.json", b'{"content": ""}'), *m], "is not in the journal"),
    "a broken line": (lambda m: replaced(m, "journal.jsonl", b'{"rev', b'{"vER'), "cannot be read"),
    "going backwards": (lambda m: replaced(m, "journal.jsonl", b'"revision":2', b'"revision":1'), "after"),
    "no number": (lambda m: replaced(m, "journal.jsonl", b'"revision":2', b'"revision":2000000000000'), "none can be"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_backup_that_is_not_right_is_refused_and_nothing_is_changed(store, state, what):
    push(store, documents={"d": document("x"), "e": document("z")})
    change, reason = HOSTILE[what]
    hostile = altered(backed_up(state), change)
    push(store, documents={"d": document("now", 7)})
    before = contents(state)
    ran = care("restore", "--state", state, hostile)
    assert ran.returncode == 1
    assert reason in ran.stderr.decode()
    after = contents(state)
    assert {**after, "journal.jsonl": b""} == {**before, "journal.jsonl": b""}
    assert after["journal.jsonl"].startswith(before["journal.jsonl"])
    assert not [*state.glob(".restore*"), *state.glob("before*"), *state.parent.glob("outside")]


def test_half_a_backup_and_one_with_a_flipped_bit_are_refused(store, state):
    push(store, documents={str(number): document(os.urandom(300).hex()) for number in range(30)})
    packed = backed_up(state).read_bytes()
    cut = state.parent / "cut"
    spoiled = bytearray(packed)
    spoiled[len(packed) // 2] ^= 16
    for text in (
        packed[: len(packed) // 2],
        packed[:-4],
        bytes(spoiled),
        b"",
        b"plain",
        gzip.compress(b"no tar" * 999),
    ):
        cut.write_bytes(text)
        ran = care("restore", "--state", state, cut)
        assert ran.returncode == 1, text[:9]
        assert b"no backup" in ran.stderr


def test_a_file_that_claims_more_than_the_disk_has_is_refused(store, state):
    push(store, documents={"d": document("x")})
    huge, text = member("quarantine/huge")
    huge.size = 1 << 50
    file = state.parent / "huge"
    file.write_bytes(gzip.compress(huge.tobuf(tarfile.PAX_FORMAT) + text))
    ran = care("restore", "--state", state, file)
    assert ran.returncode == 1
    assert b"for which there is no space" in ran.stderr


# fsck


def spoil(path, text):
    def act(state):
        (state / path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        (state / path).touch(mode=0o600)
        (state / path).write_text(text)
        os.utime(state / path, (1, 1))

    return act


def with_journal(change):
    def act(state):
        journal = state / "journal.jsonl"
        journal.write_bytes(change(journal.read_bytes()))

    return act


DAMAGE = {
    "a record is missing": ("documents/d.json", "is missing", lambda state: (state / "documents/d.json").unlink()),
    "a record is new": ("documents/n.json", "is not in the journal", spoil("documents/n.json", '{"content": ""}')),
    "a record was changed": ("documents/d.json", "not as the journal", spoil("documents/d.json", '{"content": "2"}')),
    "a record is no JSON": ("documents/d.json", "is no record: not JSON", spoil("documents/d.json", "{")),
    "a record has no shape": ("commands/k.json", "is no record: status", spoil("commands/k.json", '{"status": "x"}')),
    "a strange name": ("documents/a b.json", "nothing that kirosync writes", spoil("documents/a b.json", "{}")),
    "a file of someone's": ("notes.txt", "nothing that kirosync writes", spoil("notes.txt", "x")),
    "a folder of someone's": ("mine", "nothing that kirosync makes", lambda state: (state / "mine").mkdir(mode=0o700)),
    "a tombstone of nothing": (
        "deleted/documents/x.json",
        "not in the journal",
        spoil("deleted/documents/x.json", "{}"),
    ),
    "a tombstone beside its record": (
        "deleted/documents/d.json",
        "not in the journal",
        lambda state: (state / "deleted/documents/d.json").write_bytes((state / "documents/d.json").read_bytes()),
    ),
    "a broken tombstone": ("deleted/documents/gone.json", "as it should be", spoil("deleted/documents/gone.json", "[")),
    "output of nothing": ("output/x.out", "the output of no command", spoil("output/x.out", "x")),
    "input of nothing": ("output/x.in", "the output of no command", spoil("output/x.in", "x")),
    "output of what was removed": ("output/removed.out", "output of no command", spoil("output/removed.out", "x")),
    "archived output of nothing": ("archive/output/x.err", "in the archive", spoil("archive/output/x.err", "x")),
    "history of nothing": (
        "history/documents/x",
        "the history of nothing",
        spoil("history/documents/x/0000000000000001-aaaaaaaaaaaa.json", "{}"),
    ),
    "a version with a strange name": ("history/documents/d/x", "kirosync writes", spoil("history/documents/d/x", "{}")),
    "a record set aside": ("documents/.d.json.77", "was set aside", spoil("documents/.d.json.77", "{}")),
    "a tombstone set aside": ("deleted/commands/.d.json.77", "set aside", spoil("deleted/commands/.d.json.77", "{}")),
    "a version set aside": ("history/.aa.json", "was set aside", spoil("history/.aa.json", "{}")),
    "an agent set aside": ("agents/.a.json", "was set aside", spoil("agents/.a.json", "{}")),
    "a journal set aside": (".journal.jsonl.99999999", "was set aside", spoil(".journal.jsonl.99999999", "")),
    "a snapshot left": (".snapshot.ab", "was left by", lambda state: (state / ".snapshot.ab").mkdir(mode=0o700)),
    "a restore left": (".restore.ab", "was left by", lambda state: (state / ".restore.ab").mkdir(mode=0o700)),
    "an open file": ("documents/d.json", "the mode 0644", lambda state: (state / "documents/d.json").chmod(0o644)),
    "an open folder": ("output", "with the mode 0755", lambda state: (state / "output").chmod(0o755)),
    "an open directory": (".", "with the mode 0755", lambda state: state.chmod(0o755)),
    "another owner": ("documents/d.json", "another user", lambda state: os.chown(state / "documents/d.json", 12345, 1)),
    "a broken told.json": ("told.json", "is not as it should be", spoil("told.json", '{"revision": "x"}')),
    "a broken agent": ("agents/a.json", "is not as it should be", spoil("agents/a.json", '{"kind": "spy"}')),
    "a broken line": ("journal.jsonl", "line 1 cannot be read", with_journal(lambda raw: b"x" + raw)),
    "a torn line": ("journal.jsonl", "its last line is torn", with_journal(lambda raw: raw[:-5])),
    "a line twice": (
        "journal.jsonl",
        "has the revision",
        with_journal(lambda raw: raw + raw.splitlines(keepends=True)[1]),
    ),
    "no journal, and a tombstone beside its record": (
        "journal.jsonl",
        "is missing",
        lambda state: (
            (state / "deleted/documents/d.json").write_bytes((state / "documents/d.json").read_bytes()),
            (state / "journal.jsonl").unlink(),
        ),
    ),
    "no journal": ("journal.jsonl", "is missing", lambda state: (state / "journal.jsonl").unlink()),
}


@pytest.fixture
def lived(state):
    """A state in which everything is that is usual."""
    store = kirosync.Store(state, clock=Clock(1_700_000_000_000))
    push(store, conversations={"c": [HI]}, documents={"d": document("1"), "gone": document("1")})
    push(store, documents={"d": document("2", 2)}, conversations={"c": [{**HI, "timestamp": 3}]})
    for identity in ("k", "old", "removed"):
        done = {**RUN, "status": "failed", "createdAt": 1, "updatedAt": 1}
        push(store, commands={identity: done})
        store.append(identity, "stdout", 0, b"printed")
    store.change(lambda pen: pen.delete("documents", "gone", pen.now))
    store.change(lambda pen: pen.delete("commands", "removed", pen.now))
    store.change(lambda pen: pen.delete("commands", "old", pen.now, op="archive"))
    store.change(lambda pen: pen.delete("conversations", "c", 1))
    push(store, conversations={"c": [{**HI, "content": "reborn", "timestamp": 9}]})
    store.change(lambda pen: pen.announce("me", {"kind": "agent", "types": []}))
    store.remember("told", b'{"revision": 1, "commands": []}')
    (state / "agents" / "me.lock").touch()
    (state / "README.md").write_text("what lies where")
    store.close()
    return state


def digests(state):
    return {hashlib.sha256(text).hexdigest() for text in contents(state).values()}


def test_where_all_is_well_nothing_is_found_and_nothing_is_touched(lived):
    before = contents(lived)
    assert fsck(lived) == (0, {"found": [], "left": []})
    assert fsck(lived, "--repair") == (0, {"found": [], "left": []})
    assert contents(lived) == before


@pytest.mark.parametrize("what", DAMAGE)
def test_each_damage_is_found_named_and_repaired(lived, what):
    where, problem, spoil_it = DAMAGE[what]
    if what == "another owner" and os.geteuid():
        pytest.skip("only root gives files away")
    spoil_it(lived)
    before = contents(lived)
    code, said = fsck(lived)
    assert code == 1
    assert [problem in flaw["problem"] for flaw in said["found"] if flaw["path"] == where] == [True], said
    assert all(flaw["repair"] for flaw in said["found"])
    assert contents(lived) == before, "to look changes nothing"
    code, said = fsck(lived, "--repair")
    assert code == 0, said
    assert fsck(lived)[0] == 0


@pytest.mark.parametrize("what", [name for name in DAMAGE if "aside" not in name and "left" not in name])
def test_a_repair_deletes_nothing(lived, what):
    DAMAGE[what][2](lived)
    before = {text for path, text in contents(lived).items() if path != "journal.jsonl" and "removed" not in path}
    fsck(lived, "--repair")
    after = contents(lived)
    mine = {text for text in before if text not in after.values()}
    taken_in = {"a record is new", "a record was changed", "no journal"}
    assert not mine or what in taken_in, mine
    if quarantined := [path for path in after if path.startswith("quarantine/") and not path.endswith(".reason")]:
        assert all(f"{path}.reason" in after or path.count("/") > 1 for path in quarantined)


def test_what_lies_in_quarantine_is_told_with_the_reason_and_is_no_fault(lived):
    spoil("documents/a b.json", "{}")(lived)
    fsck(lived, "--repair")
    code, said = fsck(lived)
    assert code == 0, said
    assert [flaw["problem"] for flaw in said["found"]] == ["lies here: is nothing that kirosync writes"]


def test_it_says_in_plain_words_what_it_found_and_what_it_would_do(lived):
    spoil("output/x.out", "x")(lived)
    ran = care("fsck", "--state", lived, text=True)
    assert ran.stdout == "output/x.out: is the output of no command\n    repair: move it to quarantine\n"
    assert ran.stderr == "kirosync: 1 thing found\n"
    ran = care("fsck", "--state", lived, "--repair", text=True)
    assert ran.stderr == "kirosync: 1 thing found, nothing left\n"


def test_where_it_cannot_look_the_code_is_2(tmp_path, lived):
    (tmp_path / "file").write_text("")
    for nothing in ("nowhere", "file"):
        ran = care("fsck", "--state", tmp_path / nothing)
        assert (ran.returncode, ran.stdout) == (2, b"")
        assert ran.stderr
    spoil("notes.txt", "x")(lived)
    lock = kirosync.Lock(lived / ".lock")
    with contextlib.closing(lock), lock.held():
        assert care("fsck", "--state", lived).returncode == 2


def test_beside_a_service_and_an_agent_under_load_nothing_is_found_and_nothing_lost(agent, state):
    server, stopping, documents, commands = agent, threading.Event(), [], []

    def load():
        while not stopping.is_set():
            name = f"d{len(commands)}"
            push = {"documents": {name: document("x" * 2000)}, "conversations": {"c": [{**HI, "content": name}]}}
            assert server.ask("POST", "/sync?since=x", json=push).ok
            documents.append(name)
            order = {"type": "execute_bash", "command": "echo x", "metadata": {"n": len(commands)}}
            commands.append(server.ask("POST", "/command", json=order).json()["commandId"])
            if len(commands) % 5 == 0:
                server.ask("DELETE", f"/document/{documents.pop(0)}")

    thread = threading.Thread(target=load)
    thread.start()
    try:
        until(lambda: len(commands) > 20)
        for round_ in range(6):
            code, said = fsck(state, *(["--repair"] if round_ % 2 else []))
            assert (code, said["found"]) == (0, []), said
    finally:
        stopping.set()
        thread.join()
    until(lambda: all(server.ask("GET", f"/command/{each}").json()["status"] == "completed" for each in commands[-9:]))
    held = server.ask("GET", "/sync").json()
    assert held["documents"].keys() >= set(documents)
    assert held["commands"].keys() == set(commands)
    assert {each["status"] for each in held["commands"].values()} == {"completed"}


def test_a_repair_of_the_journal_beside_a_running_service_loses_nothing(server, state):
    for number in range(20):
        server.ask("POST", "/sync?since=x", json={"documents": {f"d{number}": document("x")}})
    cursor = server.ask("GET", "/sync").json()["cursor"]
    with (state / "journal.jsonl").open("r+b") as journal:
        journal.write(b"spoiled")
    assert fsck(state)[0] == 1
    assert fsck(state, "--repair")[0] == 0
    answer = server.ask("GET", f"/sync?since={cursor}").json()
    assert answer["full"]
    assert len(answer["documents"]) == 20
    assert server.ask("POST", "/sync?since=x", json={"documents": {"more": document("x")}}).ok
    assert fsck(state)[0] == 0


# doctor


def examined(*options):
    """Return the exit code, and the sentences by their level."""
    ran = care("doctor", "--json", *options)
    findings = json.loads(ran.stdout)
    assert all(finding["remedy"] for finding in findings if finding["level"] != "ok"), findings
    by_level = {level: [f["sentence"] for f in findings if f["level"] == level] for level in ("ok", "warn", "bad")}
    return ran.returncode, by_level


def port_of(server):
    return server.url.rpartition(":")[2]


def test_where_all_is_well_the_doctor_finds_nothing_bad(agent, state):
    code, said = examined("--state", state, "--port", port_of(agent))
    assert (code, said["warn"], said["bad"]) == (0, [], [])
    text = " ".join(said["ok"])
    for part in (
        f"is kirosync {kirosync.__version__}, healthy",
        "locks exclude each other",
        "is here",
        "fsck finds nothing",
    ):
        assert part in text
    plain = care("doctor", "--state", state, "--port", port_of(agent), text=True)
    assert len(plain.stdout.splitlines()) == len(said["ok"])
    assert {line[:6] for line in plain.stdout.splitlines()} == {"ok    "}


def test_the_doctor_works_where_there_is_no_state(tmp_path):
    code, said = examined("--state", tmp_path / "no" / "where", "--port", "1")
    assert code == 0, said
    assert f"there is no directory {tmp_path}/no/where" in said["warn"]
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").write_text("")
    assert examined("--state", tmp_path / "file", "--port", "1")[0] == 0


def test_each_check_that_cannot_look_says_so_and_keeps_no_other_from_it(lived, tmp_path):
    (lived / "journal.jsonl").unlink()
    (lived / "journal.jsonl").mkdir()
    (lived / "agents" / "x.json").write_text("?")
    code, said = examined("--state", lived, "--port", "1")
    assert code == 1
    assert [sentence.split(":")[0] for sentence in said["bad"]] == ["clock", "agents", "state"]
    assert any(sentence.startswith("files: ") for sentence in said["ok"])


@pytest.fixture
def own_disk(tmp_path, lived):
    """A disk of 1 MiB that holds a state, and a function that mounts it again with other options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True, check=False)

    if mount("size=2m").returncode:
        pytest.skip("only root can mount a small disk")
    subprocess.run(["cp", "-a", lived, disk / "state"], check=True)
    yield disk, mount
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_the_doctor_works_on_a_disk_that_is_full_or_cannot_be_written(own_disk):
    disk, mount = own_disk
    with contextlib.suppress(OSError), (disk / "filler").open("wb") as filler:
        while True:
            filler.write(b"x" * 4096)
            filler.flush()
    code, said = examined("--state", disk / "state", "--port", "1")
    assert code == 1
    assert [sentence for sentence in said["bad"] if sentence.startswith("0 MiB are free")]
    assert "fsck finds nothing" in said["ok"]
    assert mount("remount,ro").returncode == 0
    code, said = examined("--state", disk / "state", "--port", "1")
    assert f"{disk}/state cannot be written" in said["bad"]
    assert "fsck finds nothing" in said["ok"]


def test_a_clock_that_is_behind_is_noticed(lived):
    ahead = kirosync.Store(lived, clock=lambda: round(time.time() * 1000) + 3_600_000)
    push(ahead, documents={"d": document("x", 77)})
    ahead.close()
    code, said = examined("--state", lived, "--port", "1")
    assert code == 1
    assert any("s behind the last change" in sentence for sentence in said["bad"])


def test_open_doors_other_versions_and_open_findings_are_noticed(lived, tmp_path, start):
    server = start(Server, lived, tmp_path / "log", "--host", "0.0.0.0")
    spoil("output/x.out", "x")(lived)
    spoil("documents/bad.json", "{")(lived)
    (lived / "agents" / "elder.json").write_text('{"kind": "agent", "types": [], "version": "0.0.1"}')
    until(lambda: [*(lived / "quarantine").iterdir()])
    code, said = examined("--state", lived, "--port", port_of(server))
    assert code == 1
    warned, bad = " ".join(said["warn"]), " ".join(said["bad"])
    assert "it listens on 0.0.0.0, in plain text" in warned
    assert "its version is 0.0.1" in warned
    assert "1 files lie in quarantine" in warned
    assert "fsck finds" in bad
    lived.chmod(0o755)
    assert "can be used by others, with the mode 0755" in " ".join(examined("--state", lived, "--port", "1")[1]["bad"])


def test_something_else_that_answers_there_is_no_service_of_ours(lived):
    listener = socket.create_server(("127.0.0.1", 0))

    def answer():
        connection, _ = listener.accept()
        connection.recv(9999)
        connection.sendall(b"220 mail.example ESMTP\r\n")
        connection.close()

    thread = threading.Thread(target=answer)
    thread.start()
    code, said = examined("--state", lived, "--port", str(listener.getsockname()[1]))
    thread.join()
    listener.close()
    assert code == 0, said
    assert any("no service answers" in sentence for sentence in said["warn"])


@pytest.mark.parametrize("kind", ["ext4", "nfs4", "9p", "fuse.sshfs"])
def test_the_file_system_is_that_of_the_innermost_mount(kind):
    mounts = (
        "21 1 8:1 / / rw - ext4 /dev/root rw\n"
        "22 21 0:5 / /srv rw - tmpfs tmpfs rw\n"
        f"23 22 0:6 / /srv/my\\040state rw shared:1 - {kind} host:/x rw\n"
    )
    assert kirosync.mount_of(Path("/srv/my state/deep"), mounts) == kind
    assert kirosync.mount_of(Path("/srv/my"), mounts) == "tmpfs"
    assert kirosync.mount_of(Path("/home"), mounts) == "ext4"


# What root does for the owner of a state, who may be hostile

NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do what others cannot")


@pytest.fixture
def theirs():
    """A state that belongs to another user, in a folder that all can reach."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        os.chmod(folder, 0o755)
        state = Path(folder) / "state"
        store = kirosync.Store(state)
        push(store, documents={"d": document("x")})
        store.close()
        for path in (state, *state.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        yield state


@pytest.fixture
def secret(theirs):
    """A file that only root can read, in a folder of root's."""
    file = theirs.parent / "roots" / "secret"
    file.parent.mkdir(mode=0o700)
    file.write_text("only-root-knows")
    file.chmod(0o600)
    return file


@as_root
def test_a_repair_by_root_gives_nothing_away_that_a_link_points_to(theirs, secret):
    (theirs / "quarantine" / "a").symlink_to(secret.parent)
    (theirs / "quarantine" / "b").symlink_to(secret)
    (theirs / "documents" / "link.json").symlink_to(secret)
    os.link(secret, theirs / "quarantine" / "hard")
    fsck(theirs, "--repair")
    assert [os.stat(path).st_uid for path in (secret, secret.parent)] == [0, 0]
    assert secret.stat().st_mode & 0o777 == 0o600


@as_root
def test_a_backup_by_root_holds_nothing_that_its_owner_cannot_read(theirs, secret):
    (theirs / "quarantine" / "a").symlink_to(secret)
    (theirs / "quarantine" / "b").symlink_to(secret.parent)
    ran = care("backup", "--state", theirs, secret.parent / "backup.tar.gz")
    assert b"only-root-knows" not in gzip.decompress(
        care("backup", "--state", theirs, "-").stdout or gzip.compress(b"")
    )
    assert ran.returncode == 1 or b"only-root-knows" not in gzip.decompress(
        (secret.parent / "backup.tar.gz").read_bytes()
    )
    assert b"Traceback" not in ran.stderr


@as_root
def test_root_writes_a_backup_where_only_root_can(theirs, secret):
    ran = care("backup", "--state", theirs, secret.parent / "backup.tar.gz")
    assert ran.returncode == 0, ran.stderr
    assert (secret.parent / "backup.tar.gz").stat().st_uid == 0
    assert "documents/d.json" in names_in(secret.parent / "backup.tar.gz")


@as_root
def test_what_root_has_left_in_a_state_is_given_to_its_owner(theirs):
    for name, mode in (("readable", 0o644), ("closed", 0o600)):
        path = theirs / "documents" / f"{name}.json"
        path.write_text('{"content": "by root"}')
        path.chmod(mode)
    assert {flaw["problem"] for flaw in fsck(theirs)[1]["found"]} == {"belongs to another user than the directory"}
    assert fsck(theirs, "--repair")[1]["left"] == []
    assert {path.stat().st_uid for path in (theirs / "documents").iterdir()} == {NOBODY}


@as_root
def test_no_lock_of_roots_is_left_in_a_state_of_others(theirs):
    (theirs / ".lock").unlink()
    (theirs / "documents" / "d.json").chmod(0o644)
    fsck(theirs)
    assert (theirs / ".lock").stat().st_uid == NOBODY


def test_what_a_backup_says_of_the_past_is_not_entered_in_the_audit_log(store, state):
    push(store, documents={"d": document("x")})
    audit = kirosync.Audit(store, state / "log")
    audit.follow()

    def forged(members):
        line = '{"revision":900,"at":1,"lastUpdate":1,"kind":"tokens","id":"x","op":"add","by":"alice@192.0.2.6"}\n'
        return [(name, text + line.encode() if name == "journal.jsonl" else text) for name, text in members]

    file = backed_up(state)
    with tarfile.open(file) as tar:
        members = forged([(each.name, tar.extractfile(each).read()) for each in tar.getmembers()])
    with tarfile.open(file, "w:gz") as tar:
        for name, text in members:
            tar.addfile(member(name, text)[0], io.BytesIO(text))
    restored(state, file)
    audit.follow()
    audit.close()
    lines = [json.loads(line) for line in (state / "log" / "audit.jsonl").read_text().splitlines()]
    assert [line["op"] for line in lines if line["kind"] in ("tokens", "state")] == ["restore"]
    assert "alice" not in (state / "log" / "audit.jsonl").read_text()
