"""The programs of this repository, really running: the service, and an agent."""

import functools
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from editor import DIRECT, SLOW, free_port, until

ROOT = Path(__file__).parent.parent.parent


class Program:
    """A program of ours that is started and stopped, as often as one likes; what it says is in *log*."""

    def __init__(self, log, word, argv):
        self.log, self.word, self.argv, self.process = log, word, argv, None

    def start(self):
        clean = {key: value for key, value in os.environ.items() if not key.startswith("KIROSYNC_")}
        with self.log.open("ab") as said:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, self.argv)],
                cwd=ROOT,
                env={**clean, "AWS_EC2_METADATA_DISABLED": "true"},
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
        until(self.is_ready, lambda: f"{self.argv[0]} is not ready: {self.log.read_text()[-2000:]}")

    def is_ready(self):
        assert self.process.poll() is None, f"{self.argv[0]} ended: {self.log.read_text()[-2000:]}"
        return self.is_up()

    def is_up(self):
        """Tell whether it has said so: its first words."""
        return f"[{self.process.pid}] INFO {self.word}" in self.log.read_text()

    def stop(self):
        """End it kindly, and by force after 10 s."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process = None


class Service(Program):
    """kirosync.py serve on the state directory *state*, with the token that it makes itself."""

    def __init__(self, state):
        self.state, port = state, free_port()
        self.url = f"http://127.0.0.1:{port}"
        argv = ["kirosync.py", "serve", "--port", port, "--state", state]
        super().__init__(state.with_suffix(".log"), "kirosync", argv)

    @property
    def token(self):
        return (self.state / "token").read_text().strip()

    @functools.cached_property
    def editors_token(self):
        """A token of the scope ide, which is all that an editor needs."""
        argv = [sys.executable, ROOT / "kirosync.py", "token", "add", "editor", "--scope", "ide", "--state", self.state]
        return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()

    def ask(self, method, path, body=None, headers=None):
        """Return the status, and the answer: bytes if it is no JSON. A *body* of bytes is sent as it is; one of
        *headers* that is None is left out."""
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        named = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json", **(headers or {})}
        given = {name: value for name, value in named.items() if value is not None}
        try:
            answer = DIRECT.open(urllib.request.Request(self.url + path, sent, given, method=method), timeout=SLOW)
        except urllib.error.HTTPError as refusal:
            answer = refusal
        with answer:
            text = answer.read()
        return answer.status, json.loads(text) if "json" in answer.headers.get("Content-Type", "") else text


class Agent(Program):
    """agent.py on the state directory of *service*."""

    def __init__(self, service):
        argv = ["agent.py", "--state", service.state]
        super().__init__(service.state.with_suffix(".agent.log"), "agent", argv)


def ides(service):
    """Return what the windows that are there have said of themselves, by name."""
    agents = service.ask("GET", "/agents")[1]["agents"]
    return {name: said for name, said in agents.items() if said["kind"] == "ide" and said["present"]}


def give_token(window, token):
    """Give a window a token as a human does."""
    window.command("Kirosync: Set Token")
    window.sees("input", "The token of")
    window.type(token)
    window.press("Enter")
