#!/usr/bin/env python3
"""Measure what redaction costs: how fast output goes through a Capture, with and without it.

    .venv/bin/python bench/redact.py [--quick]

64 MiB of each kind, in pieces as a pipe gives them and in small ones, into a file; the two in turns, in the same
run. The ratio is the median of the turns. The redactor knows 20 values of 40 bytes. Without a file is the bare rule.
Then commands as a worker of the agent executes them: one that prints as much, and one that prints nothing.
"""

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import agent

VALUES = [random.Random(number).randbytes(20).hex().encode() for number in range(20)]
LINE = b"2026-11-22 08:55:01 INFO build: compiling src/main.c, session 4711, no secrets here: [ok] 12.5 ms\n"
SIZES = {"as of a pipe": 1 << 16, "small": 1 << 12}


def kinds(size):
    """Return outputs of *size* bytes, by what they are."""
    secretive = LINE * 9 + b"token=" + VALUES[0] + b" Authorization: Bearer " + VALUES[1] + b"\n"
    return {
        "lines of a log": (LINE * (size // len(LINE) + 1))[:size],
        "one line": b"x" * size,
        "no text": os.urandom(size),
        "a secret in ten lines": (secretive * (size // len(secretive) + 1))[:size],
        "a private key without an end": (b"-----BEGIN PRIVATE KEY-----\n" + b"MIIEowIBAAKCAQEA\n" * (size // 17))[
            :size
        ],
    }


def seconds(output, size, path, redactor):
    """Return how long it takes to capture *output* in pieces of *size* bytes."""
    capture = agent.Capture(agent.STREAM_BYTES, path, redactor)
    begun = time.perf_counter()
    for at in range(0, len(output), size):
        capture.add(output[at : at + size])
    capture.close()
    took = time.perf_counter() - begun
    if path:
        path.unlink(missing_ok=True)
    return took


def measure(output, size, path, turns):
    pairs = [
        (seconds(output, size, path, None), seconds(output, size, path, agent.Redactor(VALUES))) for _ in range(turns)
    ]
    plain, redacted = [len(output) / statistics.median(times) / 1e6 for times in zip(*pairs, strict=True)]
    return plain, redacted, statistics.median(with_it / without for without, with_it in pairs)


def executed(forks, command, folder, secrets):
    """Return how long (s) it takes to execute a *command* line with these *secrets*."""
    order = {"id": "c", "type": "execute_bash", "command": command}
    run = agent.Run(agent.Policy().limited(order), forks, (), secrets)
    run.paths = {"stdout": Path(folder, "out")}
    begun = time.perf_counter()
    report = agent.execute(run)
    took = time.perf_counter() - begun
    assert report["status"] == "completed", report
    run.paths["stdout"].unlink(missing_ok=True)
    return took


def commands(forks, size, folder, turns):
    print("\n| command | without redaction | with 2 values | with 20 |\n|---|---|---|---|")
    known = [None, agent.Secrets(values=VALUES[:2]), agent.Secrets(values=VALUES)]
    for command, times in ((f"yes '{LINE.decode().strip()}' | head -c {size}", turns), ("true", 20 * turns)):
        rounds = [[executed(forks, command, folder, secrets) for secrets in known] for _ in range(times)]
        figures = " | ".join(f"{statistics.median(each) * 1000:.1f} ms" for each in zip(*rounds, strict=True))
        print(f"| `{command[:4].strip()}` | {figures} |")


def main():
    forks = agent.ForkServer()  # before anything makes us large
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8 MiB, and fewer turns")
    quick = parser.parse_args().quick
    print("| 64 MiB of | pieces | into a file | with redaction | times as long | the rule alone |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for what, output in kinds((8 if quick else 64) << 20).items():
            for pieces, size in SIZES.items():
                plain, redacted, ratio = measure(output, size, Path(folder, "out"), 3 if quick else 5)
                alone = measure(output, size, None, 1)[1]
                print(
                    f"| {what} | {pieces} | {plain:.0f} MB/s | {redacted:.0f} MB/s | {ratio:.1f} | {alone:.0f} MB/s |"
                )
        commands(forks, (8 if quick else 64) << 20, folder, 3 if quick else 5)
    forks.close()


if __name__ == "__main__":
    main()
