"""A real editor to test with: VS Code's own server, an extension host for each window, and Chromium to look at them.

An Editor is the server with its settings and extensions, and opens windows. A Window is a page in Chromium that shows
the workbench, and the extension host that serves it.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from pathlib import Path

from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import expect

SLOW = 30  # s in which everything happens, on the slowest machine in its noisiest hour
CALM = {
    "chat.disableAIFeatures": True,
    "extensions.autoCheckUpdates": False,
    "extensions.autoUpdate": "off",
    "extensions.ignoreRecommendations": True,
    "git.enabled": False,
    "remote.autoForwardPorts": False,
    "security.workspace.trust.enabled": False,
    "telemetry.telemetryLevel": "off",
    "terminal.integrated.gpuAcceleration": "off",  # else it paints what a test cannot read
    "update.mode": "none",
    "update.showReleaseNotes": False,
    "window.restoreWindows": "none",
    "workbench.enableExperiments": False,
    "workbench.secondarySideBar.defaultVisibility": "hidden",
    "workbench.startupEditor": "none",
    "workbench.tips.enabled": False,
    "workbench.welcomePage.walkthroughs.openOnInstall": False,
}
# A window's connection has a token, whose beginning the server logs with the pid of the extension host.
CONNECTION = re.compile(r"[?&]reconnectionToken=(\w{8})")
LAUNCHED = re.compile(r"\[(\w{8})\]\[ExtensionHostConnection\] <(\d+)> Launched Extension Host Process")
# A workbench keeps secrets if it is given half of the key to seal them with: what code-server's own entry answers.
MINT_KEY = """
    const ask = window.fetch;
    window.fetch = (what, ...how) =>
        what === "/mint-key" ? Promise.resolve(new Response(new Uint8Array(KEY))) : ask(what, ...how);
"""
# The same box is what an extension asks with.
PALETTE_HAS_GONE = """() => {
    const box = document.querySelector(".quick-input-widget input.input");
    return !box.checkVisibility() || !box.value.startsWith(">");
}"""
SESSION = "IDE_TEST_SESSION"  # in the environment of all that a run of pytest starts
PLACES = {
    "notification": ".notification-list-item",
    "dialog": ".monaco-dialog-box",
    "input": ".quick-input-widget",
    "choice": ".quick-input-list .monaco-list-row",
    "status": ".statusbar-item",
    "tab": ".tabs-container .tab",
}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def until(ready, what, seconds=SLOW, pause=0.02):
    """Return what *ready* returns as soon as it is true; fail after so many *seconds*, saying *what* was not so."""
    end = time.monotonic() + seconds
    while not (value := ready()):
        assert time.monotonic() < end, f"within {seconds} s: {what() if callable(what) else what}"
        time.sleep(pause)
    return value


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def opened(url, body=None):
    with DIRECT.open(urllib.request.Request(url, data=body), timeout=SLOW) as answer:
        return answer.read()


def is_open(url):
    with contextlib.suppress(OSError):
        opened(url)
        return True
    return False


# ---------------------------------------------------------------- Processes


def processes_with(mark):
    """Return the pids of all processes whose environment has *mark*, NAME=VALUE, but our own."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in entry.read_bytes().split(b"\0") and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
    return found


def children_of(pid):
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        return [int(child) for task in tasks for child in task.read_text().split()]
    return []


def is_extension_host(pid):
    with contextlib.suppress(OSError):
        return b"--type=extensionHost" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return False


def end_all(mark):
    """Kill every process that has *mark*, those too that a dying one has just started."""
    while pids := processes_with(mark):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


# ---------------------------------------------------------------- Editor


class Editor:
    """VS Code's server from *code*, run by *node*, which writes in *folder* only; *browser* shows its windows."""

    def __init__(self, folder, code, node, browser, screenshots):
        self.folder, self.code, self.node = folder, code, node
        self.browser, self.screenshots = browser, screenshots
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = os.urandom(32)
        self.process, self.windows = None, []
        for name in ("data/User", "extensions", "hosts", "home"):
            (folder / name).mkdir(parents=True)
        self.settings({})

    def settings(self, settings):
        """Make these the user's settings, beside the calm ones, for the windows that are opened from now on."""
        # one that is open does not look at the file again, as it would elsewhere than in a browser
        (self.folder / "data/User/settings.json").write_text(json.dumps({**CALM, **settings}, indent=2))

    def install(self, extension):
        """Install *extension*, a folder or a .vsix; before the start."""
        unpacked = self.folder / "unpacked/extension"
        if extension.is_dir():
            shutil.copytree(extension, unpacked)
        else:
            shutil.unpack_archive(extension, unpacked.parent, "zip")
        about = json.loads((unpacked / "package.json").read_text())
        unpacked.rename(self.folder / "extensions" / "{publisher}.{name}-{version}".format(**about).lower())
        shutil.rmtree(unpacked.parent)

    def start(self):
        with (self.folder / "server.log").open("ab") as log:
            # a session of its own: a Ctrl-C at the terminal is for pytest, which then ends this
            self.process = subprocess.Popen(
                self.argv(),
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        until(self.is_up, lambda: f"the editor's server did not start: {self.log()[-2000:]}")

    def argv(self):
        return [
            *(self.node, self.code / "out/server-main.js", "--host", "127.0.0.1", "--port", str(self.port)),
            *("--server-data-dir", self.folder / "server", "--user-data-dir", self.folder / "data"),
            *("--extensions-dir", self.folder / "extensions", "--without-connection-token"),
            *("--accept-server-license-terms", "--disable-workspace-trust", "--telemetry-level", "off"),
            *("--reconnection-grace-time", "3"),  # s; a page that is closed does not always say good-bye
        ]

    def environment(self):
        return {
            **{name: os.environ[name] for name in ("PATH", "LANG", "TZ", "TMPDIR", SESSION) if name in os.environ},
            "HOME": str(self.folder / "home"),
            "EXTENSIONS_GALLERY": '{"serviceUrl": ""}',  # else it looks for a marketplace
            "PROBE_HOSTS": str(self.folder / "hosts"),
            "IDE_TEST_EDITOR": str(self.port),
        }

    def log(self):
        return (self.folder / "server.log").read_text()

    def is_up(self):
        assert self.process.poll() is None, f"the editor's server ended: {self.log()[-2000:]}"
        return is_open(f"{self.url}/version")

    def hosts(self):
        """Return the pids of the extension hosts that run."""
        return [pid for pid in children_of(self.process.pid) if is_extension_host(pid)]

    def probe(self, host):
        """Return the URL at which the probe in this extension host can be asked, or None before it is active."""
        file = self.folder / f"hosts/{host}"
        return f"http://127.0.0.1:{file.read_text()}/" if file.exists() else None

    def profile(self):
        """Make a browser profile, which keeps what extensions store as secrets, sealed with a key of this editor."""
        context = self.browser.new_context(viewport={"width": 1200, "height": 800})
        context.add_init_script(MINT_KEY.replace("KEY", str(list(self.key))))
        return context

    def open(self, folder, beside=None):
        """Open a window on *folder*, in a browser profile of its own or in that of the window *beside*."""
        if not self.process:
            self.start()
        return Window(self, beside.context if beside else self.profile(), folder)

    def stop(self):
        """Close the windows, and kill the server with all that it has started."""
        for window in list(self.windows):
            window.close()
        if self.process:
            end_all(f"IDE_TEST_EDITOR={self.port}")
            self.process.wait()
            self.process = None


# ---------------------------------------------------------------- Window


class Window:
    """A page that shows *folder* in the workbench. *page* is playwright's, *context* the browser profile it is in."""

    def __init__(self, editor, context, folder):
        self.editor, self.context, self.folder = editor, context, Path(folder)
        self.page, self.console, self.connections = context.new_page(), [], set()
        editor.windows.append(self)
        self.page.set_default_timeout(SLOW * 1000)
        self.page.on("console", lambda message: self.console.append(message.text))
        self.page.on("websocket", lambda socket: self.connections.update(CONNECTION.findall(socket.url)))
        self.page.goto(f"{editor.url}/?{urllib.parse.urlencode({'folder': self.folder})}")
        self.wait()

    def wait(self):
        """Wait until the workbench is there and its extension host has started its extensions."""
        self.page.wait_for_selector(".monaco-workbench")
        until(self.host, lambda: f"no extension host for this window: {self.editor.log()[-2000:]}")

    def reload(self):
        """Load the page again, which ends the extension host and starts another."""
        self.connections.clear()
        self.page.reload()
        self.wait()

    def host(self):
        """Return the pid of the extension host that serves this window and has started its extensions, or None."""
        self.page.wait_for_timeout(20)  # playwright's events arrive only while one of its calls waits
        pids = [int(pid) for connection, pid in LAUNCHED.findall(self.editor.log()) if connection in self.connections]
        running = self.editor.hosts()
        return next((pid for pid in pids if pid in running and self.editor.probe(pid)), None)

    def kill_host(self):
        """End the extension host as a crash does; return its pid. The workbench starts another by itself."""
        pid = until(self.host, "the window has no extension host")
        os.kill(pid, signal.SIGKILL)
        until(lambda: pid not in self.editor.hosts(), f"the extension host {pid} did not end")
        return pid

    def ask(self, command, *args):
        """Execute *command* in the extension host, past the extension that is tested; return what it returns."""
        url = self.editor.probe(until(self.host, "the window has no extension host"))
        answer = json.loads(opened(url, json.dumps([command, *args]).encode()))
        assert "error" not in answer, answer["error"]
        return answer.get("value")

    def type(self, text):
        self.page.keyboard.type(text)

    def press(self, key):
        self.page.keyboard.press(key)

    def command(self, title):
        """Run a command by the palette, as a human does; return when the palette has gone."""
        self.press("F1")
        box = self.page.locator(".quick-input-widget:visible input.input").first
        expect(box).to_have_value(re.compile("^>"), timeout=SLOW * 1000)
        box.fill(f">{title}")
        offered = self.page.locator(f"{PLACES['choice']} .label-name", has_text=re.compile(f"^{re.escape(title)}$"))
        expect(offered, f"the palette does not offer {title!r}").to_be_visible(timeout=SLOW * 1000)
        offered.click()
        self.page.wait_for_function(PALETTE_HAS_GONE)

    def sees(self, place, text=""):
        """Wait until there is *text* in such a *place* (a name in PLACES); return its locator."""
        found = self.page.locator(PLACES[place], has_text=text).first
        expect(found, f"no {place} says {text!r}").to_be_visible(timeout=SLOW * 1000)
        return found

    def screenshot(self, name):
        """Save a picture of the window as NAME.png; return its path."""
        path = self.editor.screenshots / f"{re.sub('[^a-zA-Z0-9_.-]+', '-', name)}.png"
        self.page.screenshot(path=path)
        return path

    def close(self):
        """Close the page, and the browser profile if this was its last; its extension host ends within a second."""
        if self in self.editor.windows:
            self.editor.windows.remove(self)
        with contextlib.suppress(PlaywrightError):  # a browser that has ended has closed it
            self.page.close()
            if not self.context.pages:
                self.context.close()
