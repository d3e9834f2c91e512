"""A client that applies deltas has what the server has, whatever is done to the server, by anyone."""

import json
import random
import shutil

import pytest
from conftest import ADMIN

import kirosync

IDS = ["p", "q", "r s"]


class Client:
    """A copy that is kept in step as design section 4 says: take out what is deleted, merge the rest."""

    def __init__(self):
        self.cursor, self.state = None, {kind: {} for kind in kirosync.KINDS}

    def sync(self, store):
        delta = store.delta(self.cursor)
        said = json.loads(b"".join(kirosync.show(delta, store.last_update, 0, kirosync.KINDS)))
        self.cursor = said["cursor"]
        if said.get("full"):
            self.state = {kind: {} for kind in kirosync.KINDS}
        for kind in kirosync.KINDS:
            for identity in said.get("deleted", {}).get(kind, []):
                self.state[kind].pop(identity, None)
        for identity, messages in said["conversations"].items():
            mine = self.state["conversations"].get(identity, [])
            self.state["conversations"][identity] = kirosync.merge_messages(mine, messages)[0]
        self.state["documents"] |= said["documents"]
        self.state["commands"] |= said["commands"]


def as_sets(state):
    """A state without the order of messages of equal timestamp, which a delta cannot tell."""
    talks = {key: sorted(map(kirosync.canonical, messages)) for key, messages in state["conversations"].items()}
    return {**state, "conversations": talks}


class World:
    """Two stores on one directory, clients of both, and a hand that edits the files."""

    def __init__(self, directory, seed):
        self.random, self.directory, self.now = random.Random(seed), directory, 1_800_000_000_000
        self.stores = [self.opened(), self.opened()]
        self.clients = [Client() for _ in range(4)]

    def opened(self):
        return kirosync.Store(self.directory, clock=lambda: self.now)

    def messages(self):
        return [
            {
                "role": self.random.choice("ua"),
                "content": self.random.choice(["", "a", "ab", "abc", "b"]),
                "timestamp": self.random.choice([1, 2, 2.5, self.now, self.now + 10**9]),
                **self.random.choice([{}, {}, {"id": "m"}, {"metadata": {"x": self.random.randint(0, 2)}}]),
            }
            for _ in range(self.random.randint(0, 3))
        ]

    def push(self, store):
        identity, content = self.random.choice(IDS), self.random.choice("abc")
        document = {"content": content, "timestamp": self.random.choice([1, 2, self.now, self.now + 10**9])}
        push = {"conversations": {identity: self.messages()}, "documents": {self.random.choice(IDS): document}}
        store.change(lambda pen: kirosync.take_push(pen, push, ADMIN))

    def delete(self, store):
        kind, identity = self.random.choice(kirosync.KINDS[:2]), self.random.choice(IDS)
        store.change(lambda pen: pen.get(kind, identity) and pen.delete(kind, identity, pen.now))

    def edit(self, store):
        kind, name = self.random.choice(kirosync.KINDS[:2]), kirosync.name_of(self.random.choice(IDS))
        file, grave = self.directory / kind / f"{name}.json", self.directory / "deleted" / kind / f"{name}.json"
        whole = {"messages": self.messages()} if kind == "conversations" else {"content": self.random.choice("abc")}
        how = self.random.randrange(5)
        if how == 0:
            file.unlink(missing_ok=True)
        elif how == 1 and grave.exists():
            grave.rename(file)
        elif how == 2 and file.exists():
            shutil.copy(file, file.with_name(f"{kirosync.name_of(self.random.choice(IDS))}.new"))
        else:
            file.write_text(json.dumps(whole) if how != 3 else "{spoiled")
        if self.random.random() < 0.6:
            self.now += 5000
            store.notice(None)

    def reopen(self, store):
        store.close()
        self.stores[self.stores.index(store)] = self.opened()

    def step(self):
        act = self.random.choices([self.push, self.delete, self.edit, self.reopen], [8, 2, 4, 1])[0]
        act(self.random.choice(self.stores))
        self.now += self.random.choice([0, 1, 2000])
        self.random.choice(self.clients).sync(self.random.choice(self.stores))


@pytest.mark.parametrize("seed", range(6))
def test_whoever_follows_by_deltas_has_what_the_server_has(tmp_path, seed):
    world = World(tmp_path / "state", seed)
    for step in range(400):
        world.step()
        if step % 20 == 0:
            world.now += 10**6
            for store in world.stores:
                store.notice(None)
            truth = Client()
            truth.sync(world.stores[0])
            for number, client in enumerate(world.clients):
                client.sync(world.stores[number % 2])
                assert as_sets(client.state) == as_sets(truth.state), f"seed {seed}, step {step}"
            assert not list((tmp_path / "state").glob("*/.*"))
    lines = [json.loads(line) for line in (tmp_path / "state" / "journal.jsonl").read_text().splitlines()]
    numbers = [line["revision"] for line in lines if line["op"] != "open"]
    assert numbers == sorted(set(numbers))
    for store in world.stores:
        store.close()
