#!/usr/bin/env python3
"""Measure what the README says, each figure beside its reference from the same run.

    .venv/bin/python bench/basics.py [--quick]

Starts a service and a folder agent of its own on a free port and a fresh state directory. A ratio is a
figure over its reference; the two are taken in turns, and medians are compared, because machines are noisy.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from load import ROOT, TOKEN, kirosync, ms, seconds


def row(what, figure, reference, ratio, goal):
    print(f"{what:46} {figure:>14} {reference:>38} {ratio:>6} {goal:>10}", flush=True)


class Running:
    """A service and an agent on a state directory."""

    def __init__(self, state, with_agent=True):
        self.log = tempfile.NamedTemporaryFile("r", suffix=".log")  # noqa: SIM115
        environment = {**os.environ, "KIROSYNC_TOKEN": TOKEN}
        argv = [sys.executable, ROOT / "kirosync.py", "serve", "--port", "0", "--state", state]
        started = time.perf_counter()
        self.processes = [subprocess.Popen(argv, env=environment, stderr=open(self.log.name, "w"))]  # noqa: SIM115
        while " on http://" not in Path(self.log.name).read_text():
            time.sleep(0.002)
        self.started = time.perf_counter() - started
        self.url = Path(self.log.name).read_text().split(" on ")[1].split(",")[0]
        if with_agent:
            agent = [sys.executable, ROOT / "agent.py", "--state", state]
            self.processes.append(subprocess.Popen(agent, stderr=subprocess.DEVNULL))

    def end(self):
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()

    def curl(self, path, body=None):
        argv = ["curl", "-s", "-H", f"Authorization: Bearer {TOKEN}", "-H", "Content-Type: application/json"]
        argv += ["-d", json.dumps(body)] if body else []
        return json.loads(subprocess.run([*argv, self.url + path], capture_output=True, check=True).stdout)


def start_up(folder, records):
    """Starting with so many records, beside starting with none and reading those files once."""
    state = folder / f"start-{records}"
    store = kirosync.Store(state)
    for start in range(0, records, 1000):
        store.change(
            lambda pen, start=start: [
                pen.put("documents", f"d{n}", {"content": "x" * 1000, "timestamp": n})
                for n in range(start, min(records, start + 1000))
            ]
        )
    store.close()
    loads, reads, services = [], [], []
    for _ in range(3):
        services.append(Running(state, with_agent=False))
        services[-1].end()
        reads.append(seconds(lambda: [path.read_bytes() for path in (state / "documents").iterdir()]))
        loads.append(seconds(lambda: kirosync.Store(state).close()))
    load, read = statistics.median(loads), statistics.median(reads)
    row(f"open a store of {records} records", ms(load), f"read those files once {ms(read)}", f"{load / read:.1f}", "3")
    whole = statistics.median(service.started for service in services)
    row(f"start the service with {records} records", ms(whole), "", "", "2000 ms")


def command_latency(running, times):
    """A command posted with curl until it has ended, beside curl alone and the child alone."""
    order = {"type": "execute_bash", "command": "true"}
    ended, curls, children = [], [], []
    for _ in range(times):
        time.sleep(0.05)
        ended.append(seconds(lambda: running.curl("/command?wait=20", order)))
        curls.append(seconds(lambda: running.curl("/health")))
        children.append(seconds(lambda: subprocess.run(["bash", "-c", "true"], check=True)))
    got, bare = statistics.median(ended), statistics.median(curls) + statistics.median(children)
    row(
        f"curl POST `true` until ended, {times} times",
        ms(got),
        f"curl + bash alone {ms(bare)}",
        f"{got / bare:.1f}",
        "50 ms",
    )


def durable_writes(folder, each):
    """Eight writers at once beside eight in turn."""
    store = kirosync.Store(folder / "writes")

    def write(writer):
        for number in range(each):
            document = {"content": "x" * 900, "timestamp": number}
            identity = f"{writer}-{number}"
            store.change(lambda pen, identity=identity, document=document: pen.put("documents", identity, document))

    in_turn, at_once = [], []
    for lap in range(5):
        in_turn.append(seconds(lambda lap=lap: [write(f"t{lap}{n}") for n in range(8)]))
        threads = [threading.Thread(target=write, args=(f"o{lap}{n}",)) for n in range(8)]
        at_once.append(seconds(lambda threads=threads: [t.start() for t in threads] + [t.join() for t in threads]))
    turn, once = statistics.median(in_turn) / (8 * each), statistics.median(at_once) / (8 * each)
    row(
        "a durable change, eight writers at once",
        ms(once),
        f"eight in turn {ms(turn)}",
        f"{once / turn:.2f}",
        "1/several",
    )
    store.close()


def idle(running, span):
    """CPU and memory of service and agent when nothing happens, as a part of one CPU."""
    time.sleep(1)
    before = sum(map(cpu, running.processes))
    time.sleep(span)
    used = (sum(map(cpu, running.processes)) - before) / span
    memory = sum(resident(process.pid) for process in running.processes) / 1e6
    row(f"service and agent, idle for {span} s", f"{used:.2%} CPU", "", "", "1 %")
    row("service and agent, idle, resident", f"{memory:.0f} MB", "", "", "90 MB")


def cpu(process):
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid):
    """Memory (bytes) of a process and its children; what they share with others counts in parts, if we may know."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        own = int(text.partition("\nPss:")[2].split()[0]) * 1024
    except PermissionError:
        own = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(map(resident, children))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: seconds, and rougher figures")
    quick = parser.parse_args().quick
    row("what", "figure", "reference", "ratio", "goal")
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        start_up(folder, 1000 if quick else 10_000)
        durable_writes(folder, 5 if quick else 50)
        running = Running(folder / "running")
        with contextlib.ExitStack() as stack:
            stack.callback(running.end)
            urllib.request.urlopen(running.url + "/health").close()
            command_latency(running, 10 if quick else 50)
            idle(running, 3 if quick else 20)


if __name__ == "__main__":
    main()
