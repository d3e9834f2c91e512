"""Fixtures are nouns: an editor for all tests, a service and an agent for each that wants them."""

import contextlib
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from editor import SESSION, Editor, end_all, until
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import sync_playwright
from service import Agent, Service, give_token, ides

IDE = Path(__file__).parent.parent
HOST = IDE / ".host"
EXTENSION = IDE / "kirosync.vsix"
EDITOR, SCRATCH = pytest.StashKey(), pytest.StashKey()
CHROMIUM = [
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",  # nothing of it leaves this machine
]


def pytest_configure(config):
    config.stash[SCRATCH] = tempfile.mkdtemp(prefix="ide-")  # short, for the paths of sockets
    os.environ.update({SESSION: str(os.getpid()), "TMPDIR": config.stash[SCRATCH]})
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # whoever ends this, it cleans up as on Ctrl-C


def pytest_unconfigure(config):
    end_all(f"{SESSION}={os.getpid()}")
    shutil.rmtree(config.stash[SCRATCH], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Say of what failed how the windows look, and what the editor's server has said."""
    report = yield
    editor = item.config.stash.get(EDITOR, None)
    if report.failed and editor:
        report.sections.append(("windows", "\n".join(pictures(editor, item.name))))
        report.sections.append(("editor's server", editor.log()[-2000:] if editor.process else "has not started"))
    return report


def pictures(editor, name):
    for number, window in enumerate(editor.windows):
        try:
            yield str(window.screenshot(f"failed-{name}-{number}"))
        except PlaywrightError as error:
            yield f"window {number} shows nothing: {error}"


@pytest.fixture(scope="session")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=CHROMIUM)
        yield browser
        with contextlib.suppress(PlaywrightError):  # a Ctrl-C has ended it too
            browser.close()


@pytest.fixture(scope="session")
def editor(browser, tmp_path_factory, request):
    """The editor with the probe, and the packed extension if there is one; it starts with its first window."""
    editor = Editor(
        tmp_path_factory.mktemp("editor"), HOST / "code", HOST / "node/bin/node", browser, HOST / "screenshots"
    )
    editor.install(IDE / "tests/probe")
    if EXTENSION.exists():
        editor.install(EXTENSION)
    request.config.stash[EDITOR] = editor
    yield editor
    editor.stop()


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = Service(tmp_path_factory.mktemp("service") / "state")
    service.start()
    yield service
    service.stop()


@pytest.fixture(scope="module")
def agent(service):
    agent = Agent(service)
    agent.start()
    yield agent
    agent.stop()


@pytest.fixture(scope="module")
def window(editor, service, tmp_path_factory):
    """A window that was connected as a human does it: an address in the settings, a token by the palette."""
    folder = tmp_path_factory.mktemp("app")
    (folder / "a b.txt").write_text("alpha\n")
    editor.settings({"kirosync.url": service.url})
    window = editor.open(folder)
    window.sees("status", "Kirosync: no token")
    give_token(window, service.editors_token)
    until(lambda: ides(service), "the window did not announce itself")
    yield window
    window.close()
