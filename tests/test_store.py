"""The state directory, seen from both sides: through the store, and by hand."""

import json
import os
import random
import resource
import shutil
import subprocess
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from conftest import ADMIN, until

import kirosync

HI = {"role": "user", "content": "hi", "timestamp": 1}
YO = {"role": "assistant", "content": "yo", "timestamp": 2}


def put(store, kind, identity, **record):
    store.change(lambda pen: pen.put(kind, identity, {"id": identity, **record}))


def push(store, **records):
    return store.change(lambda pen: kirosync.take_push(pen, records, ADMIN))


def shown(store, cursor=None, kind="conversations"):
    delta = store.delta(cursor)
    return {identity: json.loads(entry.newer(delta.since)) for identity, entry in delta.changed[kind].items()}


def apply(copy, store, cursor):
    """Do with a delta what a client does: take out what is deleted, merge the rest."""
    delta = store.delta(cursor)
    for identity in delta.deleted["conversations"]:
        copy.pop(identity, None)
    for identity, messages in shown(store, cursor).items():
        copy[identity], _ = kirosync.merge_messages(copy.get(identity, []), messages)
    return copy


def test_a_record_is_a_readable_file(store, state):
    put(store, "documents", "Straße/1", content="ä\n", timestamp=1)
    text = (state / "documents" / "Stra%C3%9Fe%2F1.json").read_text()
    assert text == ('{\n  "id": "Straße/1",\n  "revision": 1,\n  "content": "ä\\n",\n  "timestamp": 1\n}\n')


def test_only_the_owner_can_read_the_state(store, state):
    put(store, "documents", "d", content="", timestamp=1)
    assert state.stat().st_mode & 0o777 == 0o700
    for file in (state / "documents" / "d.json", state / "journal.jsonl", state / ".lock"):
        assert file.stat().st_mode & 0o777 == 0o600


def test_ids_that_differ_only_in_case_or_dots_are_different_records(store):
    names = ["a", "A", "..", "../a", "/etc/passwd", ".", "a.json", "%41", "a b", "é", "é"]
    for number, name in enumerate(names):
        put(store, "documents", name, content=str(number), timestamp=1)
    again = kirosync.Store(store.directory, clock=store.clock)
    assert {key: value["content"] for key, value in shown(again, kind="documents").items()} == {
        name: str(number) for number, name in enumerate(names)
    }
    again.close()


def test_a_delta_carries_only_the_new_messages(store):
    push(store, conversations={"c": [HI]})
    cursor = store.cursor
    push(store, conversations={"c": [YO], "other": [HI]})
    assert shown(store, cursor) == {"c": [YO], "other": [HI]}
    assert shown(store, store.cursor) == {}


def test_a_delta_carries_only_the_new_messages_after_a_restart_too(store):
    push(store, conversations={"c": [HI]})
    cursor = store.cursor
    push(store, conversations={"c": [YO]})
    again = kirosync.Store(store.directory, clock=store.clock)
    assert shown(again, cursor) == {"c": [YO]}
    again.close()


def test_a_deleted_record_leaves_a_tombstone_and_stale_copies_do_not_bring_it_back(store, clock, state):
    late = {**HI, "timestamp": clock.now + 10_000}
    push(store, conversations={"c": [HI, late]}, documents={"d": {"content": "x", "timestamp": clock.now}})
    cursor = store.cursor
    for kind, identity in (("conversations", "c"), ("documents", "d")):
        store.change(lambda pen, kind=kind, identity=identity: pen.delete(kind, identity, pen.now))
    assert store.delta(cursor).deleted == {"conversations": ["c"], "documents": ["d"], "commands": []}
    assert json.loads((state / "deleted" / "conversations" / "c.json").read_text())["messages"] == [HI, late]
    push(store, conversations={"c": [HI, late]}, documents={"d": {"content": "x", "timestamp": clock.now}})
    assert shown(store) == shown(store, kind="documents") == {}


def test_content_newer_than_a_tombstone_comes_back_without_what_was_deleted(store, clock):
    push(store, conversations={"c": [HI]}, documents={"d": {"content": "x", "timestamp": 1}})
    store.change(lambda pen: pen.delete("conversations", "c", pen.now))
    store.change(lambda pen: pen.delete("documents", "d", pen.now))
    new = {**HI, "content": "back", "timestamp": clock.now + 1}
    push(store, conversations={"c": [HI, new]}, documents={"d": {"content": "y", "timestamp": clock.now + 1}})
    assert shown(store) == {"c": [new]}
    assert shown(store, kind="documents") == {"d": {"content": "y", "timestamp": clock.now + 1}}


def test_a_delta_across_a_deletion_and_a_return_gives_the_servers_state(store, clock):
    push(store, conversations={"c": [HI]})
    copy, cursor = apply({}, store, None), store.cursor
    store.change(lambda pen: pen.delete("conversations", "c", pen.now))
    push(store, conversations={"c": [{**YO, "timestamp": clock.now + 1}]})
    assert apply(copy, store, cursor) == shown(store)


def test_a_message_that_a_tombstone_refuses_goes_to_history(store, state):
    push(store, conversations={"c": [HI]})
    store.change(lambda pen: pen.delete("conversations", "c", pen.now))
    push(store, conversations={"c": [HI, YO]})
    kept = [json.loads(file.read_text()) for file in (state / "history/conversations/c").iterdir()]
    assert kept == [YO]


def test_superseded_documents_go_to_history_once_and_the_last_20_stay(store, state):
    for moment in (*range(1, 25), 2, 3, 3):
        push(store, documents={"d": {"content": f"v{moment}", "timestamp": moment}})
    kept = sorted(json.loads(file.read_text())["timestamp"] for file in (state / "history/documents/d").iterdir())
    assert kept == list(range(4, 24))
    assert shown(store, kind="documents")["d"]["content"] == "v24"


def test_a_document_that_differs_in_nothing_but_its_timestamp_is_no_change(store):
    push(store, documents={"d": {"content": "x", "timestamp": 1}})
    cursor = store.cursor
    push(store, documents={"d": {"content": "x", "timestamp": 2}})
    assert store.cursor == cursor


def test_a_document_from_the_future_is_of_now_and_can_be_superseded(store, clock):
    push(store, documents={"d": {"content": "x", "timestamp": clock.now + 3_600_000}})
    assert shown(store, kind="documents")["d"]["timestamp"] == clock.now
    clock.now += 1
    push(store, documents={"d": {"content": "y", "timestamp": clock.now}})
    assert shown(store, kind="documents")["d"]["content"] == "y"


def test_last_update_never_runs_ahead_or_back(store, clock):
    assert push(store, lastUpdate=clock.now + 10**9) == "updated"
    assert store.last_update == clock.now
    assert push(store, lastUpdate=clock.now) == "current"
    assert push(store, lastUpdate=clock.now + 1) == "updated"
    assert store.last_update == clock.now + 1


@pytest.mark.parametrize(
    "cursor", ["", "x", "nobody.5", "999999999999999999999.1", "{epoch}.999", "{epoch}.-1", "{epoch}.²"]
)
def test_a_cursor_that_is_not_known_gives_everything_and_says_so(store, cursor):
    push(store, conversations={"c": [HI]})
    delta = store.delta(cursor.format(epoch=store.epochs[-1][0]))
    assert delta.full
    assert delta.changed["conversations"].keys() == {"c"}


def test_a_cursor_from_before_a_restored_backup_is_recognised(store, state, tmp_path, clock):
    push(store, conversations={"c": [HI]})
    subprocess.run(["cp", "-r", state, tmp_path / "backup"], check=True)
    push(store, conversations={"c": [YO]})
    lost = store.cursor
    backup = kirosync.Store(tmp_path / "backup", clock=clock)
    push(backup, conversations={"d": [HI]})
    assert backup.revision >= int(lost.split(".")[1])
    assert backup.delta(lost).full
    assert shown(backup) == {"c": [HI], "d": [HI]}
    backup.close()


def test_restoring_a_backup_with_cp_is_no_change_of_its_records(store, tmp_path, clock):
    push(store, documents={"d": {"content": "x", "timestamp": 1}})
    cursor = store.cursor
    subprocess.run(["cp", "-r", store.directory, tmp_path / "backup"], check=True)
    backup = kirosync.Store(tmp_path / "backup", clock=clock)
    assert not backup.delta(cursor).touches(kirosync.KINDS)
    backup.close()


def test_the_journal_is_compacted_and_known_cursors_stay_known(store, clock):
    push(store, conversations={"old": [HI]})
    cursor = store.cursor
    lines = [kirosync.Line(n, 0, 0, "lastUpdate", "", "touch") for n in range(2, 3000)]
    store._journal.enter(lines)
    again = kirosync.Store(store.directory, clock=clock)
    assert again.compact()
    assert not again.compact()
    assert len((store.directory / "journal.jsonl").read_bytes().splitlines()) < 10
    assert not again.delta(cursor).touches(kirosync.KINDS)
    assert again.revision == 2999
    push(again, conversations={"new": [HI]})
    assert shown(store, cursor) == {"new": [HI]}
    again.close()


def test_the_journal_can_be_rebuilt_from_the_records_alone(store, state, clock):
    push(store, conversations={"c": [HI], "gone": [HI]}, documents={"d": {"content": "x", "timestamp": 7}})
    store.change(lambda pen: pen.delete("conversations", "gone", pen.now))
    before, revision = shown(store), store.revision
    store.close()
    (state / "journal.jsonl").unlink()
    again = kirosync.Store(state, kinds=("commands",), clock=clock)
    again.close()
    again = kirosync.Store(state, clock=clock)
    assert (shown(again), again.revision) == (before, revision)
    assert again.last_update == 7
    push(again, conversations={"gone": [HI]})
    assert shown(again) == before
    again.close()
    store._journal = kirosync.Journal(state / "journal.jsonl")


def test_a_journal_removed_while_running_is_made_again(store, state):
    push(store, conversations={"c": [HI]})
    (state / "journal.jsonl").unlink()
    push(store, conversations={"d": [HI]})
    assert shown(store) == {"c": [HI], "d": [HI]}
    assert store.revision == 2


def test_a_damaged_line_of_the_journal_is_passed_over(store, state, clock):
    push(store, conversations={"c": [HI]})
    with (state / "journal.jsonl").open("ab") as file:
        file.write(
            b'{"revision": "x"}\n\xff\n{"revision":9,"at":0,"lastUpdate":0,"kind":"commands","id":"","op":"put"}\n'
        )
    push(store, conversations={"c": [YO]})
    assert shown(store) == {"c": [HI, YO]}


# By hand


def test_a_document_edited_by_hand_wins_and_the_old_version_is_kept(store, state):
    push(store, documents={"d": {"content": "x", "timestamp": 1}})
    cursor = store.cursor
    file = state / "documents" / "d.json"
    file.write_text(file.read_text().replace('"x"', '"by hand"'))
    store.notice({("documents", "d.json")})
    document = shown(store, cursor, "documents")["d"]
    assert document["content"] == "by hand"
    push(store, documents={"d": {"content": "x", "timestamp": 1}})
    assert shown(store, kind="documents")["d"] == document
    assert len(list((state / "history/documents/d").iterdir())) == 1


def test_an_edit_that_nobody_noticed_yet_is_not_overwritten(store, state):
    push(store, conversations={"c": [HI]})
    file = state / "conversations" / "c.json"
    file.write_text(file.read_text().replace('"hi"', '"corrected"'))
    push(store, conversations={"c": [YO]})
    assert [message["content"] for message in shown(store)["c"]] == ["corrected", "yo"]


def test_a_message_taken_out_by_hand_stays_out_everywhere(store, state):
    push(store, conversations={"c": [HI, YO]})
    copy, cursor = apply({}, store, None), store.cursor
    file = state / "conversations" / "c.json"
    file.write_text(json.dumps({"messages": [YO]}))
    store.notice(None)
    assert apply(copy, store, cursor) == {"c": [YO]}
    push(store, conversations={"c": [HI, YO]})
    assert shown(store) == {"c": [YO]}
    early = {**HI, "content": "from a slow clock"}
    push(store, conversations={"c": [early]})
    assert shown(store) == {"c": [early, YO]}


def test_files_put_in_and_removed_by_hand_are_records_made_and_deleted(store, state):
    push(store, documents={"old": {"content": "x", "timestamp": 1}})
    cursor = store.cursor
    (state / "documents" / "old.json").unlink()
    (state / "commands" / "mine.json").write_text('{"type": "execute_bash", "command": "true"}')
    store.notice(None)
    assert store.delta(cursor).deleted["documents"] == ["old"]
    command = shown(store, cursor, "commands")["mine"]
    assert (command["status"], command["createdAt"]) == ("pending", store.clock.now)


def test_what_was_done_by_hand_while_nothing_ran_is_noticed_on_opening(store, state, clock):
    push(store, documents={"a": {"content": "x", "timestamp": 1}, "b": {"content": "x", "timestamp": 1}})
    cursor = store.cursor
    store.close()
    (state / "documents" / "a.json").write_text('{"content": "edited"}')
    (state / "documents" / "b.json").unlink()
    (state / "documents" / "c.json").write_text('{"content": "new"}')
    again = kirosync.Store(state, clock=clock)
    assert {key: value["content"] for key, value in shown(again, cursor, "documents").items()} == {
        "a": "edited",
        "c": "new",
    }
    assert again.delta(cursor).deleted["documents"] == ["b"]
    again.close()
    store._journal = kirosync.Journal(state / "journal.jsonl")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"content": ', "it ends too early"),
        ('{"content": 5}', "content: expected str, got int"),
        ("[]", "expected object, got array"),
        ('{"content": "\\ud800"}', ""),
        ("[" * 100_000, "nested more than 100 deep"),
        ('{"content": "", "x": ' + "[" * 150 + "]" * 150 + "}", "nested more than 100 deep"),
    ],
)
def test_a_file_that_is_no_record_goes_to_quarantine_and_what_was_known_stays(store, state, text, reason, clock):
    push(store, documents={"d": {"content": "x", "timestamp": 1}, "other": {"content": "y", "timestamp": 1}})
    file = state / "documents" / "d.json"
    file.write_text(text)
    os.utime(file, (clock.now / 1000 - 5,) * 2)
    store.notice({("documents", "d.json")})
    assert {key: value["content"] for key, value in shown(store, kind="documents").items()} == {"d": "x", "other": "y"}
    moved, why = sorted((state / "quarantine").iterdir())
    assert moved.read_text() == text
    assert reason in why.read_text()
    assert json.loads(file.read_text())["content"] == "x"


def test_a_file_in_quarantine_is_not_taken_for_a_deletion(store, state, clock):
    push(store, documents={"d": {"content": "x", "timestamp": 1}})
    cursor = store.cursor
    store.close()
    file = state / "documents" / "d.json"
    file.write_text("{")
    os.utime(file, (1, 1))
    for _ in range(2):
        again = kirosync.Store(state, clock=clock)
        assert again.delta(cursor).deleted["documents"] == ["d"]
        assert not (state / "deleted" / "documents" / "d.json").exists()
        again.close()
    again = kirosync.Store(state, clock=clock)
    push(again, documents={"d": {"content": "x", "timestamp": 1}})
    assert shown(again, kind="documents").keys() == {"d"}
    again.close()
    store._journal = kirosync.Journal(state / "journal.jsonl")


def test_a_file_that_is_still_being_written_is_waited_for(store, state, clock):
    file = state / "documents" / "d.json"
    file.write_text('{"content": ')
    os.utime(file, (clock.now / 1000,) * 2)
    store.notice({("documents", "d.json")})
    assert file.exists()
    file.write_text('{"content": "whole"}')
    clock.now += 1500
    store.notice(set())
    assert shown(store, kind="documents")["d"]["content"] == "whole"


def test_a_misnamed_file_a_directory_and_a_pipe_do_no_harm(store, state, clock):
    (state / "documents" / "a b.json").write_text('{"content": "x"}')
    (state / "documents" / "folder.json").mkdir()
    os.mkfifo(state / "documents" / "pipe.json")
    for name in ("a b", "folder", "pipe"):
        os.utime(state / "documents" / f"{name}.json", (1, 1))
    store.notice(None)
    assert shown(store, kind="documents") == {}
    reasons = " ".join(file.read_text() for file in (state / "quarantine").glob("*.reason"))
    assert "name of this file" in reasons
    assert "is not a plain file" in reasons
    assert reasons.count("is not a plain file") == 2


def test_other_files_are_left_alone(store, state):
    for name in ("notes.txt", ".d.json.swp", "d.json~", "4913"):
        (state / "documents" / name).write_text("mine")
    store.notice(None)
    again = kirosync.Store(state, clock=store.clock)
    assert len(list((state / "documents").iterdir())) == 4
    again.close()


def test_unknown_fields_of_a_conversation_file_are_kept(store, state):
    (state / "conversations" / "c.json").write_text(json.dumps({"title": "mine", "messages": [HI]}))
    store.notice(None)
    push(store, conversations={"c": [YO]})
    assert json.loads((state / "conversations" / "c.json").read_text())["title"] == "mine"


def test_what_was_deleted_through_the_service_can_be_moved_back(store, state, clock):
    push(store, conversations={"c": [HI]}, documents={"d": {"content": "x", "timestamp": 1}})
    for kind, identity in (("conversations", "c"), ("documents", "d")):
        store.change(lambda pen, kind=kind, identity=identity: pen.delete(kind, identity, pen.now))
        (state / "deleted" / kind / f"{identity}.json").rename(state / kind / f"{identity}.json")
    store.notice(None)
    assert shown(store) == {"c": [HI]}
    document = shown(store, kind="documents")["d"]
    assert document.keys() == {"content", "timestamp"}
    push(store, conversations={"c": [HI, YO]})
    assert shown(store) == {"c": [HI, YO]}


def test_removing_a_file_by_hand_makes_room(store, state):
    push(store, documents={"d": {"content": "x" * 9999, "path": "p", "timestamp": 1}})
    (state / "documents" / "d.json").unlink()
    store.notice(None)
    assert (state / "deleted" / "documents" / "d.json").stat().st_size < 300
    push(store, documents={"d": {"content": "x" * 9999, "path": "p", "timestamp": 1}})
    assert shown(store, kind="documents") == {}
    assert not (state / "history" / "documents").exists()


def test_a_misnamed_file_that_comes_and_goes_leaves_its_namesake_alone(store, state):
    push(store, documents={"a b": {"content": "x", "timestamp": 1}})
    stray = state / "documents" / "a b.json"
    for change in (lambda: stray.write_text("{}"), lambda: stray.unlink(missing_ok=True)):
        change()
        store.notice({("documents", "a b.json")})
        assert shown(store, kind="documents").keys() == {"a b"}
    assert (state / "documents" / "a%20b.json").exists()


def test_odd_files_do_not_keep_the_others_nor_what_is_asked_meanwhile(store, state, clock, caplog):
    folder = state / "documents"
    (folder / "a\n2026 INFO forged.json").write_text("{}")
    (folder / os.fsdecode(b"\xff.json")).write_text("{}")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / ("x" * 248 + ".json")).write_text("{}")
    (folder / "deep.json").write_text('{"content": "", "x": ' + "[" * 150 + "]" * 150 + "}")
    (folder / "good.json").write_text('{"content": "good"}')
    for file in folder.iterdir():
        os.utime(file, (1, 1), follow_symlinks=False)
    push(store, documents={"pushed": {"content": "x", "timestamp": 1}})
    store.notice(None)
    assert shown(store, kind="documents").keys() == {"good", "pushed"}
    again = kirosync.Store(state, clock=clock)
    assert shown(again, kind="documents").keys() == {"good", "pushed"}
    again.close()
    assert caplog.text.isascii()
    assert not [line for line in caplog.text.splitlines() if line.startswith("2026 INFO forged")]


def test_a_refused_rule_does_not_lose_a_record_whose_file_is_broken(store, state):
    push(store, documents={"d": {"content": "x", "timestamp": 1}})
    (state / "documents" / "d.json").write_text("{broken")
    os.utime(state / "documents" / "d.json", (1, 1))

    def refuse(pen):
        pen.get("documents", "d")
        raise kirosync.Conflict("no")

    with pytest.raises(kirosync.Conflict):
        store.change(refuse)
    store.notice(None)
    assert shown(store, kind="documents")["d"]["content"] == "x"
    assert (state / "documents" / "d.json").read_text().startswith("{\n")


def test_a_push_over_a_half_written_edit_keeps_the_edit_in_quarantine(store, state, clock):
    push(store, documents={"d": {"content": "x", "timestamp": 1}})
    (state / "documents" / "d.json").write_text('{"content": "half')
    os.utime(state / "documents" / "d.json", (clock.now / 1000,) * 2)
    push(store, documents={"d": {"content": "y", "timestamp": 2}})
    assert shown(store, kind="documents")["d"]["content"] == "y"
    assert [file.read_text() for file in (state / "quarantine").glob("*[0-9]")] == ['{"content": "half']


def test_no_one_is_told_that_all_is_well_when_a_commit_fails_unforeseen(store, monkeypatch):
    monkeypatch.setattr(store._journal, "enter", lambda lines: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        put(store, "documents", "d", content="x", timestamp=1)
    monkeypatch.undo()
    put(store, "documents", "d", content="x", timestamp=1)
    assert shown(store, kind="documents").keys() == {"d"}


def test_a_rename_that_fails_after_the_journal_is_completed_by_the_next_change(store, state, monkeypatch):
    real, failures = kirosync.put_in_place, iter([False, True])

    def fail(files):
        if next(failures, False):
            raise OSError(5, "Input/output error")
        real(files)

    monkeypatch.setattr(kirosync, "put_in_place", fail)
    with pytest.raises(kirosync.Broken, match="will be completed later"):
        put(store, "documents", "d", content="x", timestamp=1)
    put(store, "documents", "e", content="x", timestamp=1)
    assert shown(store, kind="documents").keys() == {"d", "e"}
    assert store.revision == 2


def test_lines_of_a_dead_writer_are_completed_in_their_order(store, state, clock):
    """put, delete, put of one record, the last two entered by a writer that was stopped before its renames."""
    put(store, "conversations", "c", messages=[HI])
    pen = kirosync.Pen(store, clock.now)
    pen.delete("conversations", "c", 0)
    pen.put("conversations", "c", {"messages": [YO]})
    kirosync.set_aside(dict(pen.files.values()))
    journal = kirosync.Journal(state / "journal.jsonl")
    journal.enter(pen.lines)
    journal.close()
    for opened in (store, kirosync.Store(state, clock=clock)):
        assert shown(opened) == {"c": [YO]}
    opened.close()


def test_a_store_of_some_kinds_makes_a_lost_journal_again_from_all(store, state, clock):
    push(store, documents={"d": {"content": "x", "timestamp": 1}, "keep": {"content": "x", "timestamp": 5}})
    store.change(lambda pen: pen.delete("documents", "d", pen.now))
    agent = kirosync.Store(state, kinds=("commands",), clock=clock)
    (state / "journal.jsonl").unlink()
    agent.change(lambda pen: pen.put("commands", "k", {"type": "execute_bash", "status": "failed"}))
    agent.close()
    push(store, documents={"d": {"content": "x", "timestamp": 1}})
    assert shown(store, kind="documents") == {"keep": {"content": "x", "timestamp": 5}}


def test_a_hand_made_revision_is_no_revision(store, state, clock):
    store.close()
    for number, name in ((10**15, "large"), (-1, "negative"), ("x", "text"), (1000, "later")):
        order = {"type": "execute_bash", "command": "true", "revision": number}
        (state / "commands" / f"{name}.json").write_text(json.dumps(order))
    again = kirosync.Store(state, clock=clock)
    commands = shown(again, kind="commands")
    assert commands.keys() == {"large", "negative", "text", "later"}
    assert {command["status"] for command in commands.values()} == {"pending"}
    assert again.revision == 4
    again.close()
    store._journal = kirosync.Journal(state / "journal.jsonl")


def test_a_conversation_edited_by_hand_is_shown_merged(store, state):
    late = {**HI, "timestamp": 9}
    (state / "conversations" / "c.json").write_text(json.dumps({"messages": [late, HI, HI, YO]}))
    store.notice(None)
    assert shown(store) == {"c": [HI, YO, late]}


def test_a_hard_link_a_removed_folder_and_files_within_it_are_noticed(server, state):
    server.ask("POST", "/sync", json={"documents": {"d": {"content": "x", "timestamp": 1}}})
    os.link(state / "documents" / "d.json", state / "documents" / "e.json")
    until(lambda: server.ask("GET", "/sync").json()["documents"].keys() == {"d", "e"}, 3)
    shutil.rmtree(state / "documents")
    until(lambda: server.ask("GET", "/sync").json()["documents"] == {}, 3)
    until((state / "documents").exists, 3)
    time.sleep(0.1)
    (state / "documents" / "again.json").write_text('{"content": "x"}')
    until(lambda: server.ask("GET", "/sync").json()["documents"].keys() == {"again"}, 3)


def test_what_hand_written_revisions_say_is_read_in_no_time():
    assert kirosync.unpack("1" * 40 + ",") == []
    assert kirosync.unpack("1*2 3") == [1, 1, 3]


def test_two_conversations_may_lose_the_same_message_at_once(store, state):
    old, new = ({"id": "m", **HI, "content": text, "timestamp": n} for text, n in (("one", 1), ("other", 2)))
    push(store, conversations={"a": [old], "b": [old]})
    push(store, conversations={"a": [new], "b": [new]})
    assert len(list((state / "history").rglob("*.json"))) == 2


def test_a_documents_own_field_called_revisions_is_kept(store):
    document = {"content": "x", "timestamp": 1, "revisions": [1]}
    push(store, documents={"d": document})
    assert shown(store, kind="documents") == {"d": document}


def test_a_store_that_is_behind_does_not_take_its_old_copy_for_what_was_edited(store, state, clock):
    """Another store wrote and someone edited that by hand, before this one looked."""
    third = {"role": "user", "content": "third", "timestamp": 3}
    push(store, conversations={"c": [HI]}, documents={"d": {"content": "1", "timestamp": 1}})
    behind = kirosync.Store(state, clock=clock)
    push(store, conversations={"c": [YO]}, documents={"d": {"content": "2", "timestamp": 2}})
    copy, cursor = apply({}, store, None), store.cursor
    (state / "conversations" / "c.json").write_text(json.dumps({"messages": [HI]}))
    (state / "documents" / "d.json").write_text("{spoiled")
    os.utime(state / "documents" / "d.json", (1, 1))
    push(behind, conversations={"c": [third]})
    assert apply(copy, store, cursor) == shown(store) == shown(behind) == {"c": [HI, third]}
    assert shown(store, kind="documents") == shown(behind, kind="documents") == {}
    assert store.delta(cursor).deleted["documents"] == ["d"]
    behind.close()


def test_a_push_of_more_records_than_a_process_may_open_files(store):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (400, limits[1]))
    try:
        push(store, documents={f"d{n}": {"content": "x", "timestamp": 1} for n in range(900)})
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(shown(store, kind="documents")) == 900


def test_a_reader_never_sees_a_store_that_is_being_read_anew(store, state):
    push(store, documents={f"d{n}": {"content": "x", "timestamp": 1} for n in range(300)})
    stopping, missed = threading.Event(), []

    def read():
        while not stopping.is_set():
            missed.extend([1] if store.get("documents", "d7") is None else [])

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(10):
        os.replace(shutil.copy(state / "journal.jsonl", state / "copy"), state / "journal.jsonl")
        store.refresh()
    stopping.set()
    reader.join()
    assert not missed


def test_a_journal_made_again_gives_no_number_twice(store, state, clock):
    push(store, documents={"q": {"content": "x", "timestamp": 1}})
    store.close()
    shutil.copy(state / "documents" / "q.json", state / "documents" / "r.json")
    (state / "journal.jsonl").unlink()
    again = kirosync.Store(state, clock=clock)
    assert shown(again, kind="documents").keys() == {"q", "r"}
    lines = [json.loads(line) for line in (state / "journal.jsonl").read_text().splitlines()]
    assert sorted(line["revision"] for line in lines if line["op"] == "put") == [1, 2]
    again.close()
    store._journal = kirosync.Journal(state / "journal.jsonl")


def test_a_folder_replaced_by_another_is_noticed_and_no_descriptor_is_lost(server, state):
    server.ask("POST", "/sync", json={"documents": {"d": {"content": "x", "timestamp": 1}}})
    descriptors = Path(f"/proc/{server.popen.pid}/fd")
    before = len(list(descriptors.iterdir()))
    for number in range(3):
        (state / "documents").rename(state / f"old{number}")
        shutil.copytree(state / f"old{number}", state / "documents")
        time.sleep(0.3)
        (state / "documents" / f"e{number}.json").write_text('{"content": "x"}')
        until(lambda number=number: f"e{number}" in server.ask("GET", "/sync").json()["documents"], 3)
    assert "d" in server.ask("GET", "/sync").json()["documents"]
    assert len(list(descriptors.iterdir())) <= before + 2


def test_a_half_written_file_of_which_nothing_is_known_is_not_written_over(store, state, clock):
    """Another store wrote it, someone is editing it, and this store is asked to write it too."""
    push(store, conversations={"c": [HI]})
    behind = kirosync.Store(state, clock=clock)
    push(store, conversations={"c": [YO]})
    copy, cursor = apply({}, store, None), store.cursor
    (state / "conversations" / "c.json").write_text('{"messages": [')
    os.utime(state / "conversations" / "c.json", (clock.now / 1000,) * 2)
    push(behind, conversations={"c": [{**HI, "timestamp": 9}]})
    assert [file.read_text() for file in (state / "quarantine").glob("*[0-9]")] == ['{"messages": [']
    assert apply(copy, behind, cursor) == shown(behind)
    behind.close()


def test_who_waits_is_told_of_what_it_waits_for_and_of_nothing_else(store):
    told = []

    def wait(topics):
        store.wait(store.revision, topics, 20)
        told.append(topics)

    waiting = [("documents",)], [("commands", "c"), ("commands", "c")], [("conversations",)]
    threads = [threading.Thread(target=wait, args=(topics,)) for topics in waiting]
    for thread in threads:
        thread.start()
    until(lambda: len(store.waiting) == 3)
    started = time.monotonic()
    push(store, documents={"d": {"content": "x", "timestamp": 7}})
    threads[0].join()
    assert told == [[("documents",)]]
    store.release()
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 5
    assert not store.waiting


def test_a_directory_that_was_put_in_the_place_of_another_has_one_lock(state, clock):
    """As a restore does it: whoever still has the old directory open locks the new one from then on."""
    first = kirosync.Store(state, clock=clock)
    push(first, documents={"d": {"content": "x", "timestamp": 7}})
    os.rename(state, state.with_name("old"))
    shutil.copytree(state.with_name("old"), state)
    second = kirosync.Store(state, clock=clock)

    def write(store, number):
        for count in range(30):
            push(store, documents={f"{number}-{count}": {"content": "x", "timestamp": 7}})

    threads = [threading.Thread(target=write, args=(store, store is first)) for store in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([*(state / "documents").glob("*.json")]) == 61
    first.close()
    second.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_file_made_of_parts_of_the_one_before_is_as_if_laid_out_whole(store, state, monkeypatch, seed):
    monkeypatch.setattr(kirosync, "COPIED_BYTES", 1)
    spans, chance = [], random.Random(seed)
    blocks = kirosync.Span.blocks
    monkeypatch.setattr(kirosync.Span, "blocks", lambda span: spans.append(span) or blocks(span))
    for step in range(150):
        moment = chance.choice([step, chance.randint(0, 40)])
        extra = chance.choice([{}, {"id": chance.randint(0, 5)}, {"metadata": {"a": [[{}], {"b": "\n    {"}]}}])
        messages = [
            {"role": "user", "content": chance.choice(["a", "ab", "ä,\n    {"]), "timestamp": moment, **extra}
            for _ in range(chance.randint(1, 3))
        ]
        pushes = [messages[:1], messages[1:]] if chance.random() < 0.3 else [messages]
        together(store, [lambda pen, part=part: pen.merge("c", part) for part in pushes])
        entry = store.entries["conversations"]["c"]
        raw = (state / "conversations" / "c.json").read_bytes()
        assert raw == b"".join(entry.content.file("c", entry.revision))
    assert len(spans) > 150
    again = kirosync.Store(state, clock=store.clock)
    assert again.entries["conversations"]["c"] == entry
    again.close()


def together(store, rules):
    """Commit *rules* in one commit."""
    waiting = [kirosync.Asked(rule, Future(), threading.Lock()) for rule in rules]
    with store._lock.held():
        store._commit(waiting)
    return [asked.answer.result() for asked in waiting]


def test_a_file_that_is_changed_by_hand_while_it_is_copied_costs_a_try_and_nothing_else(store, state, monkeypatch):
    monkeypatch.setattr(kirosync, "COPIED_BYTES", 1)
    push(store, conversations={"c": [HI]})
    file, hold = state / "conversations" / "c.json", kirosync.Pen.merge

    def edit_then_merge(pen, identity, messages):
        hold(pen, identity, messages)
        file.write_text(file.read_text().replace("hi", "HI BY HAND"))
        monkeypatch.setattr(kirosync.Pen, "merge", hold)

    monkeypatch.setattr(kirosync.Pen, "merge", edit_then_merge)
    with pytest.raises(kirosync.Busy, match=r"c\.json is being changed by hand; try again"):
        push(store, conversations={"c": [YO]})
    assert not list((state / "conversations").glob(".*"))
    push(store, conversations={"c": [YO]})
    assert [message["content"] for message in shown(store)["c"]] == ["HI BY HAND", "yo"]


# The journal, compacted beside writers


def lengthen(store):
    lines = [kirosync.Line(store.revision + n, 0, 0, "lastUpdate", "", "touch") for n in range(1, 2000)]
    with store._lock.held():
        store._journal.enter(lines)
        store._journal.known = (0, 0)
    store.refresh()


def reopened(store):
    again = kirosync.Store(store.directory, clock=store.clock)
    again.close()
    return shown(again, kind="documents"), set(again.recent)


def test_what_is_written_while_the_journal_is_compacted_stays_in_it(store, monkeypatch):
    push(store, documents={"old": {"content": "x", "timestamp": 1}, "gone": {"content": "x", "timestamp": 1}})
    lengthen(store)
    cursor, summarize = store.cursor, kirosync.Journal.summarize

    def write_meanwhile(journal, size):
        summarize(journal, size)
        push(store, documents={"new": {"content": "y", "timestamp": 1}})
        store.change(lambda pen: pen.delete("documents", "gone", pen.now))

    monkeypatch.setattr(kirosync.Journal, "summarize", write_meanwhile)
    assert store.compact()
    lines = [json.loads(line) for line in (store.directory / "journal.jsonl").read_text().splitlines()]
    assert {("old", "put"), ("new", "put"), ("gone", "delete")} <= {(line["id"], line["op"]) for line in lines}
    documents, standing = reopened(store)
    assert documents.keys() == {"old", "new"}
    assert ("documents", "gone", "delete") in standing
    assert store.delta(cursor).deleted["documents"] == ["gone"]


def test_two_that_compact_at_once_do_it_once(store, state, monkeypatch):
    push(store, documents={"d": {"content": "x", "timestamp": 1}})
    lengthen(store)
    other, summarize = kirosync.Store(state, clock=store.clock), kirosync.Journal.summarize

    def let_the_other_go_first(journal, size):
        summarize(journal, size)
        monkeypatch.setattr(kirosync.Journal, "summarize", summarize)
        journal.aside.rename(state / "mine")  # processes have each a file of their own
        assert other.compact()
        (state / "mine").rename(journal.aside)
        push(other, documents={"new": {"content": "y", "timestamp": 1}})

    monkeypatch.setattr(kirosync.Journal, "summarize", let_the_other_go_first)
    assert not store.compact()
    other.close()
    assert reopened(store)[0].keys() == {"d", "new"}
    assert not list(state.glob(".journal*"))


def test_a_compaction_that_fails_half_way_acknowledges_nothing_and_loses_nothing(store, state, monkeypatch):
    push(store, documents={"d": {"content": "x", "timestamp": 1}})
    lengthen(store)
    sync_folder = kirosync.sync_folder

    def fail(path):
        monkeypatch.setattr(kirosync, "sync_folder", sync_folder)
        raise OSError(5, "Input/output error")

    store._journal.summarize(store._journal.known[1])
    size = store._journal.known[1]

    def replace(pen):
        store._sound = False
        monkeypatch.setattr(kirosync, "sync_folder", fail)
        store._journal.replace(size)

    waiting = [kirosync.Asked(rule, Future(), threading.Lock()) for rule in (replace, lambda pen: pen.touch(9))]
    with store._lock.held(), pytest.raises(OSError, match="Input/output error"):
        store._commit(waiting)
    assert not waiting[1].answer.done()
    push(store, documents={"after": {"content": "y", "timestamp": 1}})
    assert reopened(store)[0].keys() == {"d", "after"}


class Impatient:
    """A lock whose second taker is interrupted as soon as it has it."""

    def __init__(self, lock):
        self.lock, self.taken = lock, 0

    def acquire(self):
        self.lock.acquire()
        self.taken += 1
        if self.taken == 2:
            raise KeyboardInterrupt

    def __getattr__(self, name):
        return getattr(self.lock, name)


def test_who_waits_no_longer_does_not_keep_the_others_waiting(store, monkeypatch):
    entered, free, interrupted = threading.Event(), threading.Event(), threading.Event()

    def be_interrupted():
        with pytest.raises(KeyboardInterrupt):
            store.change(lambda pen: pen.touch(5))
        interrupted.set()

    first = threading.Thread(daemon=True, target=store.change, args=(lambda pen: (entered.set(), free.wait(20)),))
    second = threading.Thread(daemon=True, target=be_interrupted)
    third = threading.Thread(daemon=True, target=push, args=(store,), kwargs={"lastUpdate": 7})
    first.start()
    assert entered.wait(20)
    asked = kirosync.Asked
    monkeypatch.setattr(kirosync, "Asked", lambda rule, answer, bell, by: asked(rule, answer, Impatient(bell), by))
    second.start()
    until(lambda: len(store._queue) == 1)
    monkeypatch.setattr(kirosync, "Asked", asked)
    third.start()
    until(lambda: len(store._queue) == 2)
    free.set()
    for thread in (first, second, third):
        thread.join(20)
    assert interrupted.is_set()
    assert not any(thread.is_alive() for thread in (first, second, third))
    assert store.last_update == 7


def test_a_file_changed_while_nobody_was_there_is_taken_as_changed_by_hand(store, state, clock):
    push(store, documents={"d": {"content": "x", "timestamp": 1}}, conversations={"c": [HI]})
    cursor = store.cursor
    store.close()
    for file, old, new in (("documents/d.json", '"x"', '"y"'), ("conversations/c.json", '"hi"', '"ho"')):
        (state / file).write_text((state / file).read_text().replace(old, new))
    again = kirosync.Store(state, clock=clock)
    again.notice(None)
    assert shown(again, cursor, kind="documents")["d"]["content"] == "y"
    assert shown(again, cursor)["c"] == [HI | {"content": "ho"}]
    again.close()


def test_of_two_tombstones_the_later_counts(store, clock):
    command = {"type": "execute_bash", "command": "true", "status": "failed"}
    for op, moment in (("delete", 1000), ("archive", 8000)):
        store.change(
            lambda pen, op=op, moment=moment: (
                pen.put("commands", "k", command),
                pen.delete("commands", "k", moment, op=op),
            )
        )
    assert store.change(lambda pen: pen.grave("commands", "k"))["deletedBefore"] == 8000


def test_an_archive_on_another_disk_takes_what_was_printed(store, state, clock):
    shutil.rmtree(state / "archive")
    with tempfile.TemporaryDirectory(dir="/dev/shm") as elsewhere:
        (state / "archive").symlink_to(elsewhere)
        put(store, "commands", "k", type="execute_bash", status="failed")
        (state / "output" / "k.out").write_text("printed")
        store.change(lambda pen: pen.delete("commands", "k", pen.now, op="archive"))
        assert (state / "archive" / "output" / "k.out").read_text() == "printed"
        assert (state / "archive" / "commands" / "k.json").exists()


def test_folders_where_files_are_set_aside_keep_nobody_from_opening(store, state, clock):
    for name in (".journal.jsonl.99999999", "commands/.x.json.5", "history/.x.json"):
        (state / name).mkdir()
    store.close()
    kirosync.Store(state, clock=clock).close()


def test_true_that_becomes_1_by_hand_is_a_change_for_everyone(store, state):
    push(store, conversations={"c": [HI | {"done": True}]})
    cursor = store.cursor
    copy = {"c": [HI | {"done": True}]}
    file = state / "conversations" / "c.json"
    file.write_text(file.read_text().replace("true", "1"))
    store.notice(None)
    assert json.dumps(apply(copy, store, cursor)) == json.dumps(shown(store))


def test_a_message_that_moves_to_another_moment_comes_last_there_for_everyone(store):
    push(store, conversations={"c": [HI | {"timestamp": 5}]})
    copy, cursor = {"c": [HI | {"timestamp": 5}]}, store.cursor
    push(store, conversations={"c": [YO | {"id": "y", "timestamp": 1}]})
    push(store, conversations={"c": [YO | {"id": "y", "timestamp": 5}]})
    assert shown(store)["c"] == [HI | {"timestamp": 5}, YO | {"id": "y", "timestamp": 5}]
    assert apply(copy, store, cursor) == shown(store)
