"""Stop a process at every system call of a change, one after the other, and check what is found afterwards.

    python crash.py DIRECTORY NAME      NAME is one of CHANGES, or open, backup or restore; prints the number of
                                        places it was stopped at

A child is forked for each place. It counts the calls into C that the store makes, and kills itself with
SIGKILL before the Nth. Then the directory is opened anew, and once more taken over by a store that was
open all the time. Either all of the change is there or none of it, and the next change is as good as ever.
"""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import kirosync

ADMIN = kirosync.Token("admin", "admin")

HI = {"role": "user", "content": "hi", "timestamp": 1}
OLD = {"type": "execute_bash", "command": "true", "status": "failed", "createdAt": 1, "updatedAt": 1}
CHANGES = {
    "put": lambda pen: kirosync.take_push(
        pen, {"conversations": {"c": [{**HI, "content": "more", "timestamp": 2}]}}, ADMIN
    ),
    "batch": lambda pen: kirosync.take_push(
        pen,
        {
            "conversations": {"c": [{**HI, "content": "hi there"}], "new": [HI]},
            "documents": {"d": {"content": "newer", "timestamp": 5}, "e": {"content": "e", "timestamp": 5}},
            "lastUpdate": 9,
        },
        ADMIN,
    ),
    "delete": lambda pen: pen.delete("documents", "d", pen.now),
    "archive": lambda pen: pen.delete("commands", "old", pen.now, op="archive"),
    "delete and put": lambda pen: (
        pen.delete("conversations", "c", 0),
        pen.put("conversations", "c", {"messages": [HI | {"content": "reborn"}]}),
    ),
}
CALLS = {"open", "write", "fsync", "fdatasync", "rename", "unlink", "mkdir", "ftruncate", "close", "pread", "flock"}


LASTING = {"write", "fsync", "fdatasync", "rename", "unlink", "mkdir", "ftruncate", "link", "sync", "rmdir", "rmtree"}


def prepare(directory):
    store = kirosync.Store(directory, clock=lambda: 1000)
    store.change(
        lambda pen: kirosync.take_push(
            pen,
            {
                "conversations": {"c": [HI]},
                "documents": {"d": {"content": "old", "timestamp": 1}},
                "commands": {"old": OLD},
            },
            ADMIN,
        )
    )
    store.close()
    (directory / "output" / "old.out").write_text("printed")


def contents(directory):
    """Everything that a person or a client can see, less the numbers."""
    store = kirosync.Store(directory, clock=lambda: 1000)
    seen = {kind: {key: json.loads(e.newer()) for key, e in store.entries[kind].items()} for kind in kirosync.KINDS}
    seen["gone"] = sorted(key for key in store.recent if key[2] in kirosync.GRAVES)
    printed = [str(file.relative_to(directory)) for file in directory.rglob("old.out")]
    seen["printed"] = [path for path in printed if not path.startswith("before-restore-")]
    store.close()
    return seen


def stop_before(number, calls=CALLS):
    """Have this process killed before its call *number* into one of *calls*."""
    left = number

    def count(frame, event, function):
        nonlocal left
        if (
            event == "c_call"
            and function.__name__ in calls
            and "kirosync" in frame.f_code.co_filename + frame.f_back.f_code.co_filename
        ):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def run_and_stop(directory, change, number):
    """Return whether the change was acknowledged before the process came to call *number*."""
    child = os.fork()
    if child == 0:
        if change == "open":
            stop_before(number)
            kirosync.Store(directory, clock=lambda: 1000).compact()
            sys.setprofile(None)
            os._exit(0)
        store = kirosync.Store(directory, clock=lambda: 1000)
        stop_before(number)
        store.change(CHANGES[change])
        sys.setprofile(None)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def check_sound(directory, allowed):
    """Check a directory after a crash; return what is in it."""
    found = contents(directory)
    assert found in allowed, found
    left = [str(path) for path in directory.rglob(".*") if path.name != ".lock"]
    assert not left, left
    lines = [json.loads(line) for line in (directory / "journal.jsonl").read_text().splitlines()]
    numbers = [line["revision"] for line in lines if line["op"] != "open"]
    assert numbers == sorted(set(numbers)), numbers
    for path in [*directory.glob("[cd]o*/*.json")]:
        assert json.loads(path.read_text())["revision"] in numbers
    return found


def stop_while_opening(directory):
    """Stop a process that repairs and compacts, at every call, and check that the next one can."""
    template = directory / "template"
    prepare(template)
    journal = kirosync.Journal(template / "journal.jsonl")
    journal.read()
    journal.enter([kirosync.Line(n, 0, 0, "lastUpdate", "", "touch") for n in range(10, 1200)])
    journal.close()
    for number in range(1, 1000):  # a crash between the journal and the last rename
        shutil.copytree(template, directory / f"t{number}")
        assert not run_and_stop(directory / f"t{number}", "batch", number)
        torn = directory / f"t{number}"
        if b'"e"' in (torn / "journal.jsonl").read_bytes():
            break
    shutil.copytree(torn, directory / "after")
    after = contents(directory / "after")
    for number in range(1, 1000):
        state = directory / str(number)
        shutil.copytree(torn, state)
        done = run_and_stop(state, "open", number)
        assert check_sound(state, [after]) == after
        shutil.rmtree(state)
        if done:
            return number - 1
    raise AssertionError("opening does not end")


def work_and_stop(number, work):
    """Return whether a child came to the end of *work* before the call *number* at which it is stopped."""
    child = os.fork()
    if child == 0:
        stop_before(number, LASTING)
        work()
        sys.setprofile(None)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


def back_up(state, file):
    with kirosync.whole_file(file) as target, kirosync.Snapshot(state) as snapshot:
        snapshot.pack(target)


def restore(state, file):
    store = kirosync.Store(state, kinds=("commands",), clock=lambda: 1000)
    with file.open("rb") as packed:
        kirosync.Restoration(store).take(packed)
    store.close()


def stop_while_backing_up(directory):
    """Stop a backup at every call: the state is as it was, the file whole or not there; the next one clears up."""
    template = directory / "template"
    prepare(template)
    before = contents(template)
    for number in range(1, 1000):
        state, file = directory / f"s{number}", directory / f"{number}.tar.gz"
        shutil.copytree(template, state)
        done = work_and_stop(number, lambda state=state, file=file: back_up(state, file))
        if number % 2:
            back_up(state, directory / "next.tar.gz")
        assert check_sound(state, [before]) == before
        assert file.exists() or not done
        if file.exists():
            restore(directory / f"r{number}", file)
            assert contents(directory / f"r{number}")["documents"] == before["documents"]
        if done:
            return number - 1
    raise AssertionError("the backup does not end")


def stop_while_restoring(directory):
    """Stop a restore at every call: all of it is there or nothing, and what was there before is kept."""
    template = directory / "template"
    prepare(template)
    back_up(template, directory / "backup.tar.gz")
    store = kirosync.Store(template, clock=lambda: 1000)
    store.change(CHANGES["batch"])
    store.change(lambda pen: kirosync.queue(pen, {"type": "execute_bash", "command": "true"}, key="later"))
    store.close()
    before, seen = contents(template), []
    shutil.copytree(template, directory / "after")
    restore(directory / "after", directory / "backup.tar.gz")
    after = contents(directory / "after")
    assert after["documents"].keys() == {"d"}
    for number in range(1, 1000):
        state = directory / str(number)
        shutil.copytree(template, state)
        witness = kirosync.Store(state, clock=lambda: 1000)
        done = work_and_stop(number, lambda state=state: restore(state, directory / "backup.tar.gz"))
        witness.change(lambda pen: pen.put("commands", "next", {"type": "execute_bash", "status": "failed"}))
        witness.close()
        found = check_sound(state, [with_next(after)] if done else [with_next(before), with_next(after)])
        seen.append(found == with_next(after))
        check_kept(state, before, seen[-1])
        shutil.rmtree(state)
        if done:
            break
    assert done
    assert seen == sorted(seen), "from the point of no return on it is completed"
    assert not seen[0]
    return number - 1


def check_kept(state, before, restored):
    """Check that what was there *before* is kept if it is not there any more, and then once."""
    kept = [*state.glob("before-restore-*")]
    assert len(kept) == restored, kept
    for folder in kept:
        texts = [json.loads(path.read_text())["content"] for path in sorted(folder.glob("documents/*.json"))]
        assert texts == [before["documents"][name]["content"] for name in sorted(before["documents"])]


def with_next(found):
    return {**found, "commands": {**found["commands"], "next": {"type": "execute_bash", "status": "failed"}}}


def main(directory, change):
    template = directory / "template"
    prepare(template)
    before = contents(template)
    shutil.copytree(template, directory / "after")
    assert run_and_stop(directory / "after", change, 10**9)
    after = contents(directory / "after")
    assert before != after
    done, seen = False, set()
    for number in range(1, 1000):
        state = directory / str(number)
        shutil.copytree(template, state)
        witness = kirosync.Store(state, clock=lambda: 1000)
        done = run_and_stop(state, change, number)
        witness.change(lambda pen: pen.put("commands", "next", {"type": "execute_bash", "status": "failed"}))
        witness.close()
        late, early = with_next(after), with_next(before)
        found = check_sound(state, [late] if done else [early, late])
        seen.add(found == late)
        shutil.rmtree(state)
        if done:
            break
    assert done
    assert seen == {True, False}, "a crash early must undo, a crash late must complete"
    return number - 1


OTHERS = {"open": stop_while_opening, "backup": stop_while_backing_up, "restore": stop_while_restoring}

if __name__ == "__main__":
    print(OTHERS.get(sys.argv[2], lambda directory: main(directory, sys.argv[2]))(Path(sys.argv[1])))
