"""Make vectors.json: what the rules of the service make of many records, for clients in any language to agree with.

python tests/vectors.py      writes it anew; a test says when that is due
"""

import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import client
import kirosync

FILE = Path(__file__).with_name("vectors.json")
# Content whose order and length differ between counting bytes, UTF-16 units and characters.
CONTENT = [
    "",
    "a",
    "ab",
    "abc",
    "b",
    "é",
    "\u0065\u0301",
    "\U0001f600",
    "\uffee",
    "\U0001f600\U0001f600",
    "\uffee\uffeea",
    "z" * 9,
]
TIME = [1, 2, 2.5, 3, 1710338438173]
EXTRA = [
    {},
    {},
    {"model": "x"},
    {"metadata": {"a": 1, "b": [1, {"c": None}]}},
    {"metadata": {"a": 2, "\uffee": "\U0001f600"}},
]
EXTRA += [{"metadata": {"a": True, "\U0001f600": "é"}}, {"model": {"z": 1, "a": '\n\u2028"\\'}}]


def message(chance):
    role, identity = chance.choice(["user", "assistant"]), chance.choice([{}, {}, {}, {"id": "m1"}, {"id": 7}])
    return {
        "role": role,
        "content": chance.choice(CONTENT),
        "timestamp": chance.choice(TIME),
        **identity,
        **chance.choice(EXTRA),
    }


def messages(chance):
    """Messages as the service would have them: merged among themselves."""
    return kirosync.merge_messages([], [message(chance) for _ in range(chance.randint(0, 6))])[0]


def document(chance):
    return {"content": chance.choice(CONTENT), "timestamp": chance.choice(TIME), **chance.choice(EXTRA)}


def state(chance):
    some = [identity for identity in ("p", "q", "r s") if chance.random() < 0.6]
    command = {"type": "execute_bash", "command": "true", "status": chance.choice(["pending", "completed"])}
    return {
        "conversations": {identity: messages(chance) for identity in some},
        "documents": {identity: document(chance) for identity in some},
        "commands": dict.fromkeys(some, command),
    }


def answer(chance):
    """What GET /sync may say of such a state."""
    said = {kind: records for kind, records in state(chance).items() if chance.random() < 0.8}
    deleted = {kind: [chance.choice(["p", "q", "r s"])] for kind in kirosync.KINDS if chance.random() < 0.3}
    return {**said, "cursor": "e.1", **chance.choice([{}, {"deleted": deleted}, {"deleted": deleted}, {"full": True}])}


def vectors():
    """Return [{"rule", "of": [arguments], "gives"}]."""
    chance, made = random.Random(4), []

    def add(rule, gives, *of):
        made.append(json.loads(json.dumps({"rule": rule, "of": of, "gives": gives})))

    for _ in range(120):
        mine, theirs = messages(chance), [message(chance) for _ in range(chance.randint(0, 6))]
        add("mergeMessages", kirosync.merge_messages(mine, theirs)[0], mine, theirs)
    for _ in range(30):
        mine, theirs = document(chance), document(chance)
        add("joinDocuments", kirosync.join(mine, theirs, kirosync.document_rank)[0], mine, theirs)
    for _ in range(30):
        known, said = state(chance), answer(chance)
        add("applied", client.applied(known, said), known, said)
        add("missing", client.missing(known, before := state(chance)), known, before)
    return made


def text():
    return "[\n" + ",\n".join(json.dumps(vector) for vector in vectors()) + "\n]\n"


if __name__ == "__main__":
    FILE.write_text(text())
