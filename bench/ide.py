#!/usr/bin/env python3
"""Measure what it takes to have a real editor execute a command, above the same call inside the editor.

    ide/test help                                              (ide/test installs the editor, once)
    ide/.host/venv/bin/python bench/ide.py [--quick]

A service, an editor with the packed extension and the probe of ide/tests, and one client on a kept connection. In
turns: `probe.noop`, which does nothing, by executeCommand within the extension host, and by POST /api/kiro/execute.
"""

import argparse
import http.client
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

IDE = Path(__file__).parent.parent / "ide"
sys.path.insert(0, str(IDE / "tests"))
from conftest import CHROMIUM, EXTENSION, HOST  # noqa: E402
from editor import SESSION, Editor, end_all, until  # noqa: E402
from playwright.sync_api import sync_playwright  # noqa: E402
from service import Service, give_token, ides  # noqa: E402

COMMAND = "probe.noop"
GOAL_MS = 40
TURN = 20  # executions before the other's turn


def connected(editor, service, folder):
    """Return a window that takes commands."""
    editor.settings({"kirosync.url": service.url, "kirosync.remoteControl": True})
    window = editor.open(folder)
    window.sees("status", "Kirosync: no token")
    give_token(window, service.token)
    until(lambda: [said for said in ides(service).values() if said["types"]], "the window takes no commands")
    return window


def execute(connection, token):
    """Return how long (ms) an execution takes to be answered."""
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    began = time.perf_counter()
    connection.request("POST", "/api/kiro/execute", json.dumps({"command": COMMAND}), headers)
    answer = json.loads(connection.getresponse().read())
    if not answer.get("success"):
        sys.exit(f"bench: {answer}")
    return (time.perf_counter() - began) * 1000


def measure(window, service, turns):
    """Return the medians (ms) of each turn inside the editor, and all times (ms) through the service."""
    connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=60)
    execute(connection, service.token)
    inside, through = [], []
    for _ in range(turns):
        inside.append(window.ask("probe.median", COMMAND, TURN))
        through += [execute(connection, service.token) for _ in range(TURN)]
    return inside, through


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="5 turns instead of 20")
    turns = 5 if parser.parse_args().quick else 20
    os.environ[SESSION] = str(os.getpid())
    folder = Path(tempfile.mkdtemp(prefix="bench-ide-"))
    service = Service(folder / "state")
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
            editor = Editor(folder / "editor", HOST / "code", HOST / "node/bin/node", browser, HOST / "screenshots")
            for extension in (IDE / "tests/probe", EXTENSION):
                editor.install(extension)
            service.start()
            (folder / "workspace").mkdir()
            inside, through = measure(connected(editor, service, folder / "workspace"), service, turns)
            editor.stop()
            browser.close()
    finally:
        service.stop()
        end_all(f"{SESSION}={os.getpid()}")
        shutil.rmtree(folder, ignore_errors=True)
    within, above = statistics.median(inside), statistics.median(through) - statistics.median(inside)
    tenth = statistics.quantiles(through, n=10)[-1]
    print(f"{COMMAND} by executeCommand in the editor: {within:.2f} ms, median of {turns} turns of {TURN}")
    print(f"{COMMAND} by POST /api/kiro/execute: {statistics.median(through):.1f} ms, 90 % within {tenth:.1f} ms")
    reached = "reached" if above <= GOAL_MS else "NOT reached"
    print(f"above the call in the editor: {above:.1f} ms (goal: at most {GOAL_MS} ms, {reached})")


if __name__ == "__main__":
    main()
