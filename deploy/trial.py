"""Try the release in the folder given, on a state of its own: its service and its agent are to do one command."""

import contextlib
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

SECONDS = 30  # for all of it, on a slow machine
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def main(release: Path, folder: Path) -> None:
    end, log = time.monotonic() + SECONDS, folder / "log"
    (folder / "token").write_text(token := secrets.token_urlsafe())
    service = [release / "kirosync.py", "serve", "--port", "0", "--state", folder / "state"]
    with running(service, log, token) as serves:
        url = ""
        while not (url and ask(url, "/health", token).get("status") == "healthy"):
            found = re.search(r" on (http://\S+?:\d+),", log.read_text())
            url = found[1] if found else ""
            go_on(serves() and time.monotonic() < end, log)
        agent = [release / "agent.py", "--server", url, "--token-file", folder / "token", "--name", "trial"]
        with running(agent, log, token) as works:
            asked = ask(url, "/command", token, {"type": "execute_bash", "command": "true"})
            while ask(url, f"/command/{asked.get('commandId')}", token).get("status") != "completed":
                go_on(works() and time.monotonic() < end, log)


@contextlib.contextmanager
def running(program: list[object], log: Path, token: str) -> Iterator[Callable[[], bool]]:
    """Run *program* meanwhile, and give what tells whether it still does."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("KIROSYNC_")}
    own = {"KIROSYNC_TOKEN": token, "KIROSYNC_LOG": str(log.parent), "TMPDIR": str(log.parent)}
    with (
        log.open("ab") as said,
        subprocess.Popen(
            [sys.executable, *map(str, program)], env=inherited | own, cwd=log.parent, stdout=said, stderr=said
        ) as process,
    ):
        try:
            yield lambda: process.poll() is None
        finally:
            process.terminate()


def go_on(well: bool, log: Path) -> None:
    """Wait a moment; end the program with what was logged last if all is not *well*."""
    if not well:
        sys.exit("\n".join(log.read_text(errors="replace").splitlines()[-15:]))
    time.sleep(0.05)


def ask(url: str, path: str, token: str, body: object = None) -> dict[str, object]:
    """Return what the service says, {} if it does not answer."""
    content = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    with contextlib.suppress(OSError, ValueError):
        return json.load(DIRECT.open(urllib.request.Request(url + path, content, headers), timeout=5))  # type: ignore[no-any-return]
    return {}


with tempfile.TemporaryDirectory(prefix="kirosync-trial-") as scratch:
    main(Path(sys.argv[1]).absolute(), Path(scratch))
