#!/usr/bin/env python3
"""A crash drill: no command that was acknowledged is lost, none is executed twice, and every one ends.

    .venv/bin/python bench/drill.py [--rounds N] [--seed N]

While 8 clients queue commands that each append a line to a file, service and agents (one over the folder, one over
HTTP) are killed with SIGKILL, one of them a round, at a random moment, and started again. A client that got no answer
sends the same command with the same Idempotency-Key until it has one. In the end everything is up again, and each
command is held against the file: ``ok`` has one line, ``lost`` at most one, nothing else has any, and all have ended.
The last line is the figures; the exit code is 1 if any of them is wrong.
"""

import argparse
import collections
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOKEN = "drill"
CLIENTS = 8
PAUSES_S = (0.05, 0.6)  # between being up again, or only being started again, and the next kill
HASTE = 0.3  # of the kills do not wait for a service to be up
PATIENCE_S = 90  # without any more commands ending, once everything is up: two leases
WORK_S = 0.15  # between the commands of a client: more than the agents can do while they are killed would only pile up


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Program:
    """A program of ours that is killed and started again."""

    def __init__(self, log, *argv):
        self.argv, self.log = [sys.executable, *map(str, argv)], log
        self.start()

    def start(self):
        environment = {**os.environ, "KIROSYNC_TOKEN": TOKEN}
        with open(self.log, "ab") as said:
            self.popen = subprocess.Popen(self.argv, cwd=ROOT, env=environment, stdout=said, stderr=said)

    def end(self, number):
        self.popen.send_signal(number)
        self.popen.wait()


def ask(port, method, path, body=None, **headers):
    """Return status and JSON of an answer; raise OSError or HTTPException if there is none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=70)
    try:
        said = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json", **headers}
        connection.request(method, path, body and json.dumps(body), said)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())
    finally:
        connection.close()


def keep_asking(port, *arguments, **headers):
    """Ask until there is an answer that is one."""
    while True:
        try:
            status, said = ask(port, *arguments, **headers)
            if status == 200:
                return said
            assert status in (500, 503, 507), (status, said)
        except (OSError, http.client.HTTPException, ValueError):
            pass
        time.sleep(0.02)


class Client(threading.Thread):
    """Queues commands, one after the other, until told to stop; remembers those that were acknowledged."""

    def __init__(self, number, port, marks, stop):
        super().__init__(daemon=True)
        self.number, self.port, self.marks, self.stop = number, port, marks, stop
        self.acknowledged = {}

    def run(self):
        count = 0
        while not self.stop.is_set():
            mark = f"{self.number}-{count}"
            count += 1
            order = {"type": "execute_bash", "command": f"echo {mark} >> {self.marks}"}
            order["target"] = ("folder", "http")[count % 2]
            said = keep_asking(self.port, "POST", "/command", order, **{"Idempotency-Key": mark})
            self.acknowledged[mark] = said["commandId"]
            time.sleep(WORK_S)


def drill(folder, rounds, choice):
    port, log, state = free_port(), folder / "log", folder / "state"
    (folder / "token").write_text(TOKEN)
    programs = [Program(log, "kirosync.py", "serve", "--port", port, "--state", state)]
    keep_asking(port, "GET", "/sync")
    programs.append(Program(log, "agent.py", "--state", state, "--name", "folder"))
    link = ("--server", f"http://127.0.0.1:{port}", "--token-file", folder / "token")
    programs.append(Program(log, "agent.py", *link, "--name", "http"))
    stop = threading.Event()
    clients = [Client(number, port, folder / "marks", stop) for number in range(CLIENTS)]
    for client in clients:
        client.start()
    for number in range(rounds):
        time.sleep(choice.uniform(*PAUSES_S))
        victim = choice.choice(programs)
        victim.end(signal.SIGKILL)
        time.sleep(choice.choice((0, 0, 0.1)))
        victim.start()
        if choice.random() > HASTE:
            keep_asking(port, "GET", "/commands?limit=0")
        if number % 50 == 49:
            print(f"{number + 1} rounds, {sum(len(client.acknowledged) for client in clients)} commands", flush=True)
    stop.set()
    for client in clients:
        client.join(60)
    acknowledged = {mark: identity for client in clients for mark, identity in client.acknowledged.items()}
    commands = settle(port)
    for program in programs:
        program.end(signal.SIGTERM)
    return verdict(acknowledged, commands, collections.Counter((folder / "marks").read_text().split()))


def settle(port):
    """Return all commands, once they have ended or it is clear that they do not."""
    open_, until = -1, 0.0
    while True:
        commands = keep_asking(port, "GET", "/sync?only=commands")["commands"]
        before, open_ = open_, sum(each["status"] in ("pending", "processing") for each in commands.values())
        until = time.monotonic() + PATIENCE_S if open_ != before else until
        if not open_ or time.monotonic() > until:
            return commands
        time.sleep(0.5)


def verdict(acknowledged, commands, lines):
    outcomes = collections.Counter(command.get("outcome") for command in commands.values())
    of = {identity: mark for mark, identity in acknowledged.items()}
    wrong = {
        "acknowledged and missing": [identity for identity in of if identity not in commands],
        "unfinished": [identity for identity, each in commands.items() if each["status"] in ("pending", "processing")],
        "executed twice": [mark for mark, times in lines.items() if times > 1],
        "ok without a line": [i for i in of if commands.get(i, {}).get("outcome") == "ok" and lines[of[i]] != 1],
        "neither ok nor lost": [i for i, each in commands.items() if each.get("outcome") not in ("ok", "lost", None)],
    }
    for what, which in wrong.items():
        for each in which[:5]:
            print(f"{what}: {each} {commands.get(each)}")
    ran_and_lost = sum(1 for i, each in commands.items() if each.get("outcome") == "lost" and lines[of.get(i)] == 1)
    figures = {"acknowledged": len(acknowledged), **{what: len(which) for what, which in wrong.items()}, **outcomes}
    return any(wrong.values()), {**figures, "lost, but had run": ran_and_lost}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=1000, help="kills (1000)")
    parser.add_argument("--seed", type=int, default=None, help="of the random moments")
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        wrong, figures = drill(Path(folder), arguments.rounds, random.Random(arguments.seed))
        if wrong:
            print(Path(folder, "log").read_text()[-5000:])
    shown = ", ".join(f"{what} {number}" for what, number in figures.items())
    print(f"{arguments.rounds} rounds in {time.monotonic() - started:.0f} s: {shown}")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
