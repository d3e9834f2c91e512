#!/usr/bin/env python3
"""Measure how long a command waits for its child, and its client for the news that the child has ended.

    .venv/bin/python bench/latency.py [--quick]

Starts a service and an agent of its own, over each link in turn, with 100 other clients that long-poll. Each
command tells the moment at which it ran. Beside every command the same child is run by ``subprocess.run``, in
turns and in the same run; what is above that is ours. What the parts of it cost without any child, three durable
changes and as many requests, is measured too. Then a crowd: 1,000 short commands with and without 32 long ones,
while GET /health is asked all the time.
"""

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from basics import ROOT, TOKEN, Running, ms

CHILD = "echo $EPOCHREALTIME"  # the moment (s) at which bash runs it
BASH = ["bash", "-c", CHILD]
GOAL_MS = {"folder": 15, "http": 10}


class Client:
    """One connection to the service, kept open."""

    def __init__(self, url):
        self.connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=90)

    def ask(self, method, path, body=None):
        headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
        self.connection.request(method, path, body and json.dumps(body), headers)
        answer = self.connection.getresponse()
        return json.loads(answer.read())


def poll(url, seconds, only="documents"):
    """Be a client that long-polls, and waits a little when the service did not hold it."""
    client, until = Client(url), time.monotonic() + seconds
    cursor = client.ask("GET", "/sync?only=commands")["cursor"]
    while time.monotonic() < until:
        asked = time.monotonic()
        said = client.ask("GET", f"/sync?since={cursor}&wait=20&only={only}")
        if said["cursor"] == cursor and time.monotonic() - asked < 0.5:
            time.sleep(0.5)
        cursor = said["cursor"]


def be_pollers(url, clients, seconds):
    threads = [threading.Thread(target=poll, args=(url, seconds), daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    time.sleep(seconds)


def moments(work):
    """Return (s from asking until the child ran, s from there until its end was known)."""
    asked = time.time()
    ran = float(work())
    return ran - asked, time.time() - ran


def bare():
    return subprocess.run(BASH, capture_output=True, check=True, text=True).stdout


def row(what, figures, references, goal=""):
    figure, reference = [statistics.median(values) * 1000 for values in (figures, references)]
    p99 = percentile(figures, 99) * 1000
    above = f"{figure - reference:+.1f} ms"
    print(f"{what:40} {figure:8.1f} ms {reference:12.1f} ms {above:>10} {p99:10.1f} ms  {goal}", flush=True)
    return figure - reference, p99


def measure(link, rounds, pollers, pause=0.02):
    with tempfile.TemporaryDirectory() as folder:
        running = Running(Path(folder) / "state", with_agent=False)
        (Path(folder) / "token").write_text(TOKEN)
        where = ["--state", Path(folder) / "state"] if link == "folder" else ["--server", running.url]
        where += ["--token-file", Path(folder) / "token"] if link == "http" else []
        argv = [sys.executable, ROOT / "agent.py", *where]
        running.processes.append(subprocess.Popen(argv, stderr=subprocess.DEVNULL))
        others = [sys.executable, __file__, "--poll", running.url, str(pollers)]
        others = subprocess.Popen(others, stderr=subprocess.DEVNULL) if pollers else None
        client = Client(running.url)
        order = {"type": "execute_bash", "command": CHILD}
        client.ask("POST", "/command?wait=20", order)
        time.sleep(2)
        ours, theirs = [], []
        for _ in range(rounds):
            theirs.append(moments(bare))
            ours.append(moments(lambda: client.ask("POST", "/command?wait=20", order)["result"]["stdout"]))
            time.sleep(pause)
        if others:
            others.kill()
            others.wait()
        running.end()
    names = f"{link}, {pollers} long-polling: " if pause < 1 else f"{link}, after {pause:.0f} s of rest: "
    row(f"{names}submit to started", *([pair[0] for pair in pairs] for pairs in (ours, theirs)))
    row(f"{names}ended to informed", *([pair[1] for pair in pairs] for pairs in (ours, theirs)))
    goal = f"{GOAL_MS[link]} ms above, p99 50 ms"
    return row(f"{names}both", *([sum(pair) for pair in pairs] for pairs in (ours, theirs)), goal)


def crowd(commands, long):
    """So many short commands in 4 slots, first alone, then while *long* others run; and how long GET /health took."""
    with tempfile.TemporaryDirectory() as folder:
        running = Running(Path(folder) / "state", with_agent=False)
        for name, jobs in (("few", 4), ("many", long)):
            argv = [sys.executable, ROOT / "agent.py", "--state", Path(folder) / "state", "--name", name]
            running.processes.append(subprocess.Popen([*argv, "--jobs", str(jobs)], stderr=subprocess.DEVNULL))
        spent = [rush(running.url, commands)]
        client = Client(running.url)
        order = {"type": "execute_bash", "command": "sleep 600", "target": "many"}
        identities = [client.ask("POST", "/command", order)["commandId"] for _ in range(long)]
        while any(client.ask("GET", f"/command/{identity}")["status"] == "pending" for identity in identities):
            time.sleep(0.1)
        health, stop = [], threading.Event()
        watcher = threading.Thread(target=watch, args=(running.url, health, stop))
        watcher.start()
        spent.append(rush(running.url, commands))
        stop.set()
        watcher.join()
        for identity in identities:
            client.ask("POST", f"/command/{identity}/cancel")
        outcomes = {client.ask("GET", f"/command/{identity}?wait=20")["outcome"] for identity in identities}
        running.end()
    assert outcomes == {"cancelled"}, outcomes
    alone, beside = spent
    print(f"{commands} short commands: {alone:.1f} s; beside {long} long ones: {beside:.1f} s ({beside / alone:.2f})")
    median, p99, longest = (ms(each) for each in (statistics.median(health), percentile(health, 99), max(health)))
    print(f"GET /health meanwhile, {len(health)} times: median {median}, p99 {p99}, longest {longest}; goal 50 ms")


def percentile(values, part):
    return sorted(values)[int(len(values) * part / 100)]


def rush(url, commands):
    """Return how long (s) it takes from queueing the first of so many short commands to the end of the last."""
    started = time.monotonic()

    def work(share):
        client = Client(url)
        order = {"type": "execute_bash", "command": "true", "target": "few"}
        mine = [client.ask("POST", "/command", order)["commandId"] for _ in range(share)]
        for identity in mine:
            assert client.ask("GET", f"/command/{identity}?wait=50")["outcome"] == "ok"

    threads = [threading.Thread(target=work, args=(commands // 8,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.monotonic() - started


def watch(url, spent, stop):
    client = Client(url)
    while not stop.is_set():
        asked = time.monotonic()
        client.ask("GET", "/health")
        spent.append(time.monotonic() - asked)
        time.sleep(0.01)


def parts(rounds):
    """What a command costs at least: to be queued, claimed and ended, with no agent and no child."""
    with tempfile.TemporaryDirectory() as folder:
        running = Running(Path(folder) / "state", with_agent=False)
        client, spent = Client(running.url), []
        for _ in range(rounds):
            started = time.monotonic()
            identity = client.ask("POST", "/command", {"type": "execute_bash", "command": CHILD})["commandId"]
            client.ask("PATCH", f"/command/{identity}", {"status": "processing", "agent": "x", "lease": 45})
            client.ask("PATCH", f"/command/{identity}", {"status": "completed", "agent": "x", "result": {}})
            spent.append(time.monotonic() - started)
            time.sleep(0.02)
        running.end()
    print(
        f"to queue, claim and end a command, three requests with three durable changes: {ms(statistics.median(spent))}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument("--poll", nargs=2, metavar=("URL", "CLIENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.poll:
        return be_pollers(arguments.poll[0], int(arguments.poll[1]), 600)
    print(f"{'what':40} {'median':>11} {'bare subprocess':>15} {'above':>10} {'p99':>13}  goal")
    rounds = 30 if arguments.quick else 300
    for pollers in (0, 100):
        for link in GOAL_MS:
            measure(link, rounds, pollers)
    for link in GOAL_MS:
        measure(link, max(5, rounds // 20), 0, pause=3)
    parts(rounds)
    crowd(200 if arguments.quick else 1000, 32)
    print(f"{rounds} rounds each, on {os.cpu_count()} cores, in turns with the bare subprocess")
    return None


if __name__ == "__main__":
    main()
