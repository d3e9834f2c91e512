"""Fixtures are nouns: a clock that stands still, a store, a client in-process, a server and an agent for real."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import requests
import webtest
from described import hold
from playwright.sync_api import sync_playwright

import kirosync

collect_ignore = ["seed"]  # clients to be run, not modules to be imported

ROOT = Path(__file__).parent.parent
TOKEN = "test-token"
ADMIN = kirosync.Token("admin", "admin")  # who may do everything


VARIED = {"agent", "agent_with", "page", "ending"}  # an agent over each link, the page at each size, each signal
LONGEST = ("test_terminal.py", "test_deploy.py")  # files, which are not to be the last that are begun
HALVED = ("test_terminal.py", "test_care.py", "test_console.py", "test_console_commands.py")  # whose tests are long


def pytest_collection_modifyitems(items):
    """With KIROSYNC_TEST_PART, a number, keep a part: of a test's variants one, and of long tests each second."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if not (part := os.environ.get("KIROSYNC_TEST_PART")):
        return
    variants = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        others = tuple(sorted((name, repr(value)) for name, value in params.items() if name not in VARIED))
        variants.setdefault((item.path, getattr(item, "originalname", item.name), others), []).append(item)
    chosen = [(turn, each[(turn // 2 + int(part)) % len(each)]) for turn, each in enumerate(variants.values())]
    items[:] = [item for turn, item in chosen if not is_long(item) or (turn + int(part)) % 2]


def is_long(item):
    return item.path.name in HALVED or item.get_closest_marker("alone")


class Clock:
    """A moment (ms) that passes only when told to."""

    def __init__(self, now=1_800_000_000_000):
        self.now = now

    def __call__(self):
        return self.now


class Process:
    """A program of ours, really running, started as the README says for one that is to stay."""

    def __init__(self, *argv, environment=None, log=None):
        self.argv, self.log = argv, log
        clean = {key: value for key, value in os.environ.items() if not key.startswith("KIROSYNC_")}
        with open(log or os.devnull, "ab") as said:
            self.popen = subprocess.Popen(
                ["nohup", sys.executable, *map(str, argv)],
                cwd=ROOT,
                env={**clean, **(environment or {})},
                stdout=said,
                stderr=said,
            )

    def end(self, number=15):
        if self.popen.poll() is None:
            self.popen.send_signal(number)
        return self.popen.wait(30)


class Server(Process):
    """The service on a port of its own."""

    def __init__(self, state, log, *arguments, environment=None, program="kirosync.py"):
        super().__init__(
            program,
            "serve",
            "--port",
            "0",
            "--state",
            state,
            *arguments,
            environment={"KIROSYNC_TOKEN": TOKEN, **(environment or {})},
            log=log,
        )
        self.session = requests.Session()
        self.session.trust_env = False
        self.session.headers["Authorization"] = f"Bearer {TOKEN}"
        self.session.hooks["response"].append(hold_answer)
        self.url = until(lambda: address_in(log, self.popen), 20)

    def ask(self, method, path, **more):
        return self.session.request(method, self.url + path, timeout=70, **more)

    def run(self, **order):
        answer = self.ask("POST", "/command?wait=50", json=order)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def end(self, number=15):
        self.session.close()
        return super().end(number)


def hold_answer(answer, stream=False, **_):
    """Hold what a real service answered against its description."""
    if not stream and answer.request.method != "HEAD":
        hold(answer.request.method, urlsplit(answer.url).path, answer.status_code, answer.headers, answer.content)


class App(webtest.TestApp):
    """The service in this process, each answer of which is held against its description."""

    def do_request(self, req, status=None, expect_errors=None):
        answer = super().do_request(req, status, expect_errors)
        hold(req.method, req.environ["PATH_INFO"], answer.status_int, answer.headers, answer.body)
        return answer


def address_in(log, popen):
    assert popen.poll() is None, log.read_text()
    found = [line for line in log.read_text().splitlines() if f"[{popen.pid}]" in line and " on http://" in line]
    return found[-1].split(" on ")[1].split(",")[0] if found else None


def until(ready, seconds=10, pause=0.005):
    """Return what *ready* returns as soon as it is true; fail after *seconds*."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := ready():
            return value
        time.sleep(pause)
    raise AssertionError(f"not so within {seconds} s")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def state(tmp_path):
    return tmp_path / "state"


@pytest.fixture
def store(state, clock):
    store = kirosync.Store(state, clock=clock)
    yield store
    store.close()


@pytest.fixture
def client(store):
    """The service in this process, asked as the rightful user."""
    app = App(kirosync.Service(store, kirosync.Keyring(store.directory, TOKEN)).app)
    app.authorization = ("Bearer", TOKEN)
    return app


@pytest.fixture
def server(state, tmp_path):
    server = Server(state, tmp_path / "log")
    yield server
    assert server.end() == 0


@pytest.fixture
def start():
    """Start programs that end with the test."""
    started = []

    def start(kind, *arguments, **more):
        started.append(kind(*arguments, **more))
        return started[-1]

    yield start
    for process in started:
        process.end(9)


@pytest.fixture
def copied(tmp_path, start):
    """Start a service from a folder where there is nothing else but *files*; *limits* are numbers it is to have."""

    def copied(files=(), **limits):
        folder = tmp_path / "code"
        folder.mkdir()
        text = (ROOT / "kirosync.py").read_text()
        for name, value in limits.items():
            text, count = re.subn(rf"^{name} = \S+", f"{name} = {value}", text, flags=re.MULTILINE)
            assert count == 1
        for name, content in {"kirosync.py": text, **dict(files)}.items():
            (folder / name).write_bytes(content.encode())
        return start(Server, tmp_path / "state", tmp_path / "log", program=folder / "kirosync.py")

    return copied


@pytest.fixture(params=["folder", "http"])
def agent(request, server, state, tmp_path):
    """A real agent over each of its links; the value is the server it works for."""
    link = ["--state", state]
    if request.param == "http":
        (tmp_path / "token").write_text(TOKEN)
        link = ["--server", server.url, "--token-file", tmp_path / "token"]
    environment = {"AWS_EC2_METADATA_DISABLED": "true", **getattr(request.module, "AGENT_ENVIRONMENT", {})}
    process = Process(
        "agent.py", *link, "--name", f"agent-{request.param}", environment=environment, log=tmp_path / "agent.log"
    )
    until(lambda: process.popen.poll() is not None or "INFO agent" in (tmp_path / "agent.log").read_text())
    assert process.popen.poll() is None, (tmp_path / "agent.log").read_text()
    yield server
    assert process.end() == 0, (tmp_path / "agent.log").read_text()


SIZES = {"desktop": (1280, 800, "light"), "phone": (360, 740, "dark")}  # width and height in px, and the scheme

ONCE = pytest.mark.parametrize("page", ["desktop"], indirect=True)  # for what is the same at every size
ON_A_PHONE = pytest.mark.parametrize("page", ["phone"], indirect=True)


@pytest.fixture(scope="session")
def browser():
    """A real Chromium, as the distribution packages it; the one without windows opens a page in a third of the time."""
    names = ("chromium-headless-shell", "chromium")
    path = next(filter(None, map(shutil.which, names)), None) or pytest.skip(
        "there is no chromium: apt install chromium"
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield browser
        browser.close()


@pytest.fixture(params=SIZES)
def page(request, browser, server):
    """The page of a running service, looked at on a laptop and on a phone, which has said no error."""
    width, height, scheme = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page = context.new_page()
    page.set_default_timeout(10_000)
    said = []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.goto(server.url)
    page.get_by_role("textbox", name="Token").fill(TOKEN)
    page.get_by_role("button", name="Look").click()
    yield page
    context.close()
    assert not [text for text in said if "Failed to load resource" not in text]  # a service that is down is no error


@pytest.fixture
def without_ripgrep(tmp_path, monkeypatch):
    """A PATH on which there is everything but rg."""
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).glob("*") if Path(folder).is_dir() else ():
            link = tmp_path / "bin" / program.name
            link.parent.mkdir(exist_ok=True)
            if program.name != "rg" and not link.exists():
                link.symlink_to(program)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert shutil.which("rg") is None
