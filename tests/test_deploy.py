"""install.sh on a server: into a folder that stands for one, and on a machine of its own, with users and processes."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import Server, until

ROOT = Path(__file__).parent.parent
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def copy_of_checkout(folder):
    """Copy what install.sh installs into *folder*, and return that."""
    for name in subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py", "*.sh", "*.html", "*.txt", "README.md", "deploy"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split():
        if name.startswith("deploy/") or "/" not in name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def changed(checkout, name="agent.py", line="# changed"):
    """Have a program of *checkout* begin with *line*, so that it is another release."""
    path = checkout / name
    first = "from __future__ import annotations\n"
    path.write_text(path.read_text().replace(first, f"{first}{line}\n", 1))
    return checkout


class Folder:
    """A checkout, and a folder that stands for a server."""

    def __init__(self, checkout, root, venv=""):
        self.checkout, self.root, self.venv = checkout, root, venv

    def call(self, *arguments, answer="", **more):
        clean = {key: value for key, value in os.environ.items() if not key.startswith("KIROSYNC_")}
        return subprocess.run(
            ["./install.sh", *arguments],
            cwd=self.checkout,
            env={**clean, "DESTDIR": str(self.root), "VENV": str(self.venv), **more},
            input=answer,
            capture_output=True,
            text=True,
            check=False,
        )

    def does(self, *arguments, **more):
        ran = self.call(*arguments, **more)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def refuses(self, *arguments, **more):
        ran = self.call(*arguments, **more)
        assert ran.returncode == 1, ran.stdout + ran.stderr
        assert "Traceback" not in ran.stderr or "this release" in ran.stderr
        return ran.stderr

    def text(self, path):
        return (self.root / path).read_text()

    def release(self):
        return (self.root / "opt/kirosync/current").readlink().name

    def tree(self):
        """All there is but venvs: by path its mode, its time and what it says."""
        return {
            str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
            for path in self.root.rglob("*")
            if ".venv" not in path.parts
        }


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """A server's folder with one release, made as on a server, by pip; the value is the folder and what was said."""
    folder = tmp_path_factory.mktemp("built")
    folder.chmod(0o755)
    fresh = Folder(copy_of_checkout(folder / "checkout"), folder / "root")
    fresh.said = fresh.does("install")
    return fresh


@pytest.fixture
def empty(built, tmp_path):
    """A server's folder where nothing is yet; the venv of a release is copied, which is faster."""
    venv = built.root / "opt/kirosync/current/.venv"
    return Folder(copy_of_checkout(tmp_path / "checkout"), tmp_path / "root", venv)


@pytest.fixture
def installed(built, empty):
    """A server's folder with one release, not shared with other tests."""
    shutil.copytree(built.root, empty.root, symlinks=True, ignore=shutil.ignore_patterns(".venv"))
    venv = "opt/kirosync/releases/1/.venv"
    shutil.copytree(built.root / venv, empty.root / venv, symlinks=True, copy_function=os.link)
    return empty


# Into a folder


def test_a_release_is_made_by_pip_with_modes_that_keep_secrets(built):
    python = built.root / "opt/kirosync/current/.venv/bin/python"
    assert (
        subprocess.run(
            [python, "-c", "import bottle, waitress, boto3, markdown_it, nh3, pygments"], check=False
        ).returncode
        == 0
    )
    modes = {
        "etc/kirosync/agent.token": 0o400,
        "etc/kirosync/kirosync.env": 0o640,
        "etc/kirosync/agent.env": 0o640,
        "etc/kirosync/install.conf": 0o644,
        "var/lib/kirosync": 0o700,
        "var/lib/kirosync-agent": 0o700,
        "var/log/kiro-sync": 0o750,
        "opt/kirosync": 0o755,
        "opt/kirosync/releases/1/kirosync.py": 0o644,
    }
    assert {path: (built.root / path).stat().st_mode & 0o777 for path in modes} == modes
    assert not [path for path in built.root.rglob("*") if "@" in path.name or path.suffix == ".new"]
    assert "@" not in re.sub(r"@[a-z]", "", built.text("etc/systemd/system/kirosync.service"))


def test_the_admin_token_is_shown_once_and_kept_nowhere(built):
    (token,) = re.findall(r"^kirosync_\S+$", built.said, re.MULTILINE)
    known = json.loads(built.text("var/lib/kirosync/tokens.json"))
    assert {name: said["scope"] for name, said in known.items()} == {"agent": "agent", "admin": "admin"}
    kept = [path for path in built.root.rglob("*") if ".venv" not in path.parts and path.is_file()]
    assert not [path for path in kept if token in path.read_text(errors="replace")]
    assert "kirosync_" not in built.does("install")


def test_to_install_again_changes_nothing(installed):
    before = installed.tree()
    assert installed.does("install") == "  nothing: all is as it should be\n"
    assert installed.does("upgrade") == "  nothing: all is as it should be\n"
    assert installed.tree() == before


def test_a_dry_run_says_all_that_is_done_and_touches_nothing(empty):
    planned = empty.does("install", "--domain", "kirosync.example", "--dry-run").splitlines()
    assert planned.pop() == "This was a dry run: nothing of it was done."
    assert not empty.root.exists()
    done = empty.does("install", "--domain", "kirosync.example").splitlines()
    expected = [line for line in done if line.startswith("  ") and "setpriv" not in line]
    assert [line for line in expected if "KIROSYNC_TRUSTED_PROXY" not in line] == planned
    for command in (["uninstall"], ["uninstall", "--purge"], ["install", "--agent", "none", "--domain", ""]):
        before = empty.tree()
        assert "  remove " in empty.does(*command, "--dry-run")
        assert empty.tree() == before


def test_an_upgrade_keeps_state_and_settings_and_a_rollback_goes_back(installed):
    (installed.root / "var/lib/kirosync/documents/a.json").write_text('{"content": "kept", "timestamp": 1}')
    settings = installed.root / "etc/kirosync/kirosync.env"
    settings.write_text(settings.read_text().replace("3001", "4001") + "KIROSYNC_EXECUTE_TIMEOUT=60\n")
    kept = (settings.read_text(), installed.text("etc/kirosync/agent.token"))
    changed(installed.checkout)
    assert "switch to release 2" in installed.does("upgrade")
    assert installed.release() == "2"
    assert "# changed" in installed.text("opt/kirosync/current/agent.py")
    assert (settings.read_text(), installed.text("etc/kirosync/agent.token")) == kept
    assert json.loads(installed.text("var/lib/kirosync/documents/a.json"))["content"] == "kept"
    assert "--server http://127.0.0.1:4001 " in installed.text("etc/systemd/system/kirosync-agent.service")
    installed.does("rollback")
    assert installed.release() == "1"
    assert "# changed" not in installed.text("opt/kirosync/current/agent.py")
    assert "there is no release before 1" in installed.refuses("rollback")


def test_admin_has_the_settings_of_the_service_and_none_of_the_caller(installed):
    with (installed.root / "etc/kirosync/kirosync.env").open("a") as settings:
        settings.write('KIROSYNC_TRUSTED_PROXY=one or  two\nKIROSYNC_NOTIFY_ON="asked,long"\n')
        settings.write("KIROSYNC_PORT=4001\n#KIROSYNC_HOST=commented")
    said = installed.does("admin", "serve", "--help", COLUMNS="500", KIROSYNC_THREADS="77", KIROSYNC_PORT="5001")
    shown = re.findall(r"\(default: (.*?)\)", " ".join(said.split()))
    assert {"4001", "one or two", "asked,long", "127.0.0.1"} < set(shown)
    assert {f"{installed.root}/var/lib/kirosync", f"{installed.root}/var/log/kiro-sync"} < set(shown)
    assert not {"77", "5001"} & set(shown)
    assert "admin backup - >" in installed.does("help")


def test_the_last_three_releases_are_kept(installed):
    for number in (2, 3, 4):
        changed(installed.checkout, line=f"# {number}")
        installed.does("upgrade")
    assert sorted(path.name for path in (installed.root / "opt/kirosync/releases").iterdir()) == ["2", "3", "4"]
    assert installed.release() == "4"


@pytest.mark.parametrize("program", ["kirosync.py", "agent.py"])
def test_a_release_that_does_not_work_changes_nothing(installed, program):
    before = installed.tree()
    changed(installed.checkout, program, "raise SystemExit('a defect of this release')")
    said = installed.refuses("upgrade")
    assert "a defect of this release" in said
    assert "release 2 does not work here, see above; release 1 goes on" in said
    after = installed.tree()
    releases = str(installed.root / "opt/kirosync/releases")  # its time has changed
    assert {**after, releases: before[releases]} == before


def test_a_venv_that_broke_with_the_system_is_made_anew(installed):
    (installed.root / "opt/kirosync/current/.venv/bin/python").unlink()
    assert "switch to release 2" in installed.does("install")


def test_uninstall_keeps_settings_state_and_logs_unless_it_is_to_purge(installed):
    token = installed.text("etc/kirosync/agent.token")
    said = installed.does("uninstall")
    assert "Kept: " in said
    left = {str(path.relative_to(installed.root)) for path in installed.root.rglob("*") if path.is_file()}
    assert "etc/kirosync/kirosync.env" in left
    assert "var/lib/kirosync/tokens.json" in left
    assert not [path for path in left if path.startswith(("opt/", "etc/systemd", "etc/caddy"))]
    assert not list((installed.root / "etc/systemd").rglob("kirosync*"))
    installed.does("install")
    assert installed.text("etc/kirosync/agent.token") == token
    assert "--purge wants the answer purge, or --yes" in installed.refuses("uninstall", "--purge")
    assert (installed.root / "opt/kirosync/current").exists()
    installed.does("uninstall", "--purge", "--yes")
    assert not [path for path in installed.root.rglob("*") if path.is_file()]
    assert "not installed" in installed.refuses("uninstall")
    assert "not installed" in installed.refuses("status")


def test_status_says_what_is_installed(installed, tmp_path):
    (installed.root / "srv/app").mkdir(parents=True)
    installed.does("install", "--agent-writes", "/srv/app", "--domain", "kirosync.example")
    said = installed.does("status")
    assert "release   1, of 1" in said
    assert "https://kirosync.example" in said
    assert "confined, as kirosync-agent, may write below /var/lib/kirosync-agent /srv/app" in said


def test_what_the_agent_may_is_asked_at_a_terminal_and_kept(empty):
    ours, theirs = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("KIROSYNC_")}
    process = subprocess.Popen(
        ["./install.sh", "install"],
        cwd=empty.checkout,
        env={**clean, "DESTDIR": str(empty.root), "VENV": str(empty.venv)},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    said = b""
    while b"Which? [confined]" not in said:
        said += os.read(ours, 4096)
    os.write(ours, b"user\n")
    with contextlib.suppress(OSError):  # EIO: it has ended
        while more := os.read(ours, 4096):
            said += more
    os.close(ours)
    assert process.wait(20) == 0, said.decode()
    assert "agent=user\n" in empty.text("etc/kirosync/install.conf")
    drop_in = empty.root / "etc/systemd/system/kirosync-agent.service.d/confined.conf"
    assert not drop_in.exists()
    assert empty.does("install") == "  nothing: all is as it should be\n"
    empty.does("install", "--agent", "confined")
    assert "ProtectSystem=strict" in drop_in.read_text()
    empty.does("install", "--agent", "none")
    assert not list((empty.root / "etc/systemd/system").rglob("*agent*.*e"))


def test_a_caddyfile_that_is_there_is_kept_and_gets_one_line(installed):
    caddyfile = installed.root / "etc/caddy/Caddyfile"
    caddyfile.parent.mkdir(parents=True)
    caddyfile.write_text("example.org {\n\trespond hi\n}")
    said = installed.does("install", "--domain", "kirosync.example")
    assert "add 'import kirosync.caddy' at the end of" in said
    assert caddyfile.read_text() == "example.org {\n\trespond hi\n}\nimport kirosync.caddy\n"
    assert "kirosync.example {" in installed.text("etc/caddy/kirosync.caddy")
    assert "KIROSYNC_TRUSTED_PROXY=127.0.0.1" in installed.text("etc/kirosync/kirosync.env")
    assert "nothing: all" in installed.does("install")
    installed.does("install", "--domain", "")
    assert caddyfile.read_text() == "example.org {\n\trespond hi\n}\n"
    assert not (installed.root / "etc/caddy/kirosync.caddy").exists()


@pytest.mark.skipif(not shutil.which("caddy"), reason="wants caddy")
def test_a_caddyfile_that_would_no_longer_be_valid_stays_as_it_was(installed):
    caddyfile = installed.root / "etc/caddy/Caddyfile"
    caddyfile.parent.mkdir(parents=True)
    caddyfile.write_text("kirosync.example {\n\trespond hi\n}\n")
    assert "it is as it was" in installed.refuses("install", "--domain", "kirosync.example")
    assert caddyfile.read_text() == "kirosync.example {\n\trespond hi\n}\n"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--agent", "root"], "--agent cannot be 'root'"),
        (["--agent-user", "kirosync"], "could read every token"),
        (["--agent-user", "root"], "root cannot be confined"),
        (["--agent-writes", "/home/someone"], "there is no such folder"),
        (["--agent-writes", "srv"], "--agent-writes cannot be 'srv'"),
        (["--domain", "a b"], "--domain cannot be 'a b'"),
        (["--domain", "x{"], "--domain cannot be"),
        (["--port", "70000x"], "--port cannot be"),
        (["--port"], "--port wants a value"),
        (["--dance"], "there is no option '--dance'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_done(empty, arguments, reason):
    assert reason in empty.refuses("install", *arguments)
    assert not empty.root.exists()


def test_a_confined_agent_cannot_be_given_a_home_folder(installed):
    (installed.root / "home/someone").mkdir(parents=True)
    before = installed.tree()
    assert "sees no home folders" in installed.refuses("install", "--agent-writes", "/home/someone")
    assert installed.tree() == before


# The units


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="wants systemd-analyze")
@pytest.mark.parametrize(
    ("agent", "unit", "low", "high"),
    [
        ("confined", "kirosync", 0, 3),
        ("confined", "kirosync-agent", 0, 3),
        ("user", "kirosync-agent", 9, 10),
    ],
)
def test_the_units_leave_open_only_what_was_chosen(installed, agent, unit, low, high):
    installed.does("install", "--agent", agent)
    said = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", f"--root={installed.root}", f"{unit}.service"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout
    exposure = float(re.search(r"exposure level for \S+ ([\d.]+)", said)[1])
    print(f"{unit}, agent {agent}: {exposure}")
    assert low <= exposure < high


def allowed(filters):
    """Return the names of system calls that lines like those of SystemCallFilter= allow."""
    names = set()
    for line in filters:
        for group in line.lstrip("~").split():
            names = names - calls_in(group) if line.startswith("~") else names | calls_in(group)
    return names


def calls_in(group):
    said = subprocess.run(
        ["systemd-analyze", "syscall-filter", group], capture_output=True, text=True, check=True
    ).stdout
    words = [line.strip() for line in said.splitlines() if line.startswith("    ") and not line.strip().startswith("#")]
    return set().union(*(calls_in(word) if word.startswith("@") else {word} for word in words))


@pytest.mark.skipif(not (shutil.which("systemd-analyze") and shutil.which("strace")), reason="wants both")
def test_the_service_makes_no_system_call_that_its_unit_forbids(tmp_path, state, start):
    server = start(Server, state, tmp_path / "log")
    tracing = ["strace", "-f", "-qq", "-o", tmp_path / "trace", "-p", str(server.popen.pid)]
    tracer = subprocess.Popen(tracing, stderr=subprocess.DEVNULL)
    until(lambda: (tmp_path / "trace").exists() and (tmp_path / "trace").stat().st_size)
    server.ask("POST", "/sync", json={"documents": {"a": {"content": "x", "timestamp": 1}}})
    server.ask("POST", "/command", json={"type": "execute_bash", "command": "true"})
    assert server.ask("GET", "/sync?wait=1").status_code == 200
    shown = server.ask("POST", "/render", json={"texts": [{"text": "```python\nx = 1\n```", "as": "markdown"}]})
    assert '<span class="n">x</span>' in shown.json()["html"][0]
    assert server.end() == 0
    tracer.wait(10)
    made = set(re.findall(r"^\d+ +(\w+)\(", (tmp_path / "trace").read_text(), re.MULTILINE))
    filters = re.findall(r"^SystemCallFilter=(.*)$", (ROOT / "deploy/kirosync.service").read_text(), re.MULTILINE)
    assert {"openat", "fsync", "rename"} & made
    assert made - allowed(filters) == set()


# On a machine


class Machine:
    """This machine once more, under an overlay in memory: with users, processes and a network of its own."""

    def __init__(self, folder):
        self.folder = folder
        here = ROOT / "tests" / "machine"
        spaces = ["--mount", "--pid", "--fork", "--net", "--ipc", "--uts", "--kill-child"]
        self.popen = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *spaces, here / "boot", folder, here],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = self.popen.stdout.readline()
        if said != "ready\n":
            self.popen.wait(10)
            pytest.skip(f"no machine can be made here: {said.strip()}")
        children = Path(f"/proc/{self.popen.pid}/task/{self.popen.pid}/children").read_text()
        self.enter = [
            "nsenter",
            "--target",
            children.split()[0],
            "--all",
            "--root",
            "--wd",
            "env",
            "-i",
            f"PATH={PATH}",
        ]

    def call(self, script, *arguments):
        return subprocess.run(
            [*self.enter, "bash", "-c", script, "-", *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )

    def does(self, script, *arguments):
        ran = self.call(script, *arguments)
        assert ran.returncode == 0, ran.stdout + ran.stderr
        return ran.stdout

    def end(self):
        self.popen.kill()
        self.popen.wait(10)
        self.popen.stdout.close()


@pytest.fixture(scope="module")
def machine(built, tmp_path_factory):
    """A machine on which install.sh has installed, with the checkout in /root/checkout and the token in /root/token."""
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("wants root, to make a machine")
    machine = Machine(tmp_path_factory.mktemp("machine"))
    try:
        machine.does(
            'cp -r "$1" /root/checkout; cp -a "$2" /root/venv',
            built.checkout,
            built.root / "opt/kirosync/current/.venv",
        )
        machine.does("mkdir -p /srv/app /etc/caddy && cat >/etc/caddy/Caddyfile <<'END'\n" + CADDYFILE + "END")
        machine.said = machine.does(f"{INSTALL} install --agent confined --agent-writes /srv/app --domain localhost")
        machine.does('grep -x "kirosync_.*" >/root/token <<<"$1"', machine.said)
        yield machine
    finally:
        machine.end()


INSTALL = "cd /root/checkout && VENV=/root/venv ./install.sh"
CADDYFILE = """{
	admin off
	skip_install_trust
	auto_https disable_redirects
	default_bind 127.0.0.1
}
"""
ASK = """ask() { curl -sS --max-time 70 --cacert /var/lib/caddy/.local/share/caddy/pki/authorities/local/root.crt \\
    -H "Authorization: Bearer $(cat /root/token)" -H "Content-Type: application/json" "$@"; }
"""
HERE, OUTSIDE = "http://127.0.0.1:3001", "https://localhost"


def run_on(machine, command):
    order = json.dumps({"type": "execute_bash", "command": command})
    return json.loads(machine.does(f"{ASK} ask -d \"$1\" '{HERE}/command?wait=30'", order))["result"]["stdout"]


def test_systemd_has_nothing_to_say_about_the_units(machine):
    for unit in ("kirosync", "kirosync-agent"):
        ran = machine.call(f"/usr/bin/systemd-analyze verify /etc/systemd/system/{unit}.service 2>&1")
        assert (ran.returncode, ran.stdout) == (0, "")


def test_service_and_agent_run_as_users_that_cannot_read_each_other(machine):
    assert "service   healthy" in machine.does(f"{INSTALL} status")
    assert run_on(machine, "id -un; pwd; echo $HOME").split() == ["kirosync-agent", *["/var/lib/kirosync-agent"] * 2]
    for path in ("/var/lib/kirosync/tokens.json", "/etc/kirosync/kirosync.env", "/var/log/kiro-sync"):
        assert run_on(machine, f"ls {path} >/dev/null 2>&1 && cat {path} 2>&1 || echo no").strip().endswith("no")
    owners = machine.does(
        "stat -c '%U:%G %a' /var/lib/kirosync /etc/kirosync/agent.token /opt/kirosync/current/kirosync.py"
    )
    assert owners.splitlines() == ["kirosync:kirosync 700", "kirosync-agent:kirosync-agent 400", "root:root 644"]


def says_health(code, **said):
    """A program that answers /health on the port of the service, in its place."""
    body = json.dumps(said)
    return f"""import http.server
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response({code})
        self.end_headers()
        self.wfile.write({body!r}.encode())
http.server.HTTPServer(("127.0.0.1", 3001), Health).serve_forever()"""


UNTAKEN = {"status": "unhealthy", "problem": "nobody takes commands"}


@pytest.mark.parametrize(
    ("health", "code", "shown"),
    [
        (says_health(503, **UNTAKEN, ready=True), 0, "ready, but nobody takes commands"),
        (says_health(503, status="unhealthy", problem="starting", ready=False), 1, "not healthy: starting"),
        (says_health(503, status="unhealthy", problem="starting"), 1, "not healthy: starting"),
        (says_health(200, status="healthy"), 0, "healthy"),
        (says_health(500), 1, "not healthy"),
    ],
)
def test_what_no_release_can_help_does_not_count_against_one(machine, health, code, shown):
    ran = machine.call(
        f"""systemctl stop kirosync; /usr/bin/python3 -c "$1" 2>/dev/null & other=$!
        for _ in {{1..100}}; do curl -s -o /dev/null {HERE}/health && break; sleep 0.1; done
        {INSTALL} status; code=$?; kill $other; wait $other; systemctl restart kirosync; exit $code""",
        health,
    )
    assert f"service   {shown}, http://127.0.0.1:3001" in ran.stdout
    assert ran.returncode == code
    until(lambda: machine.call(f"{INSTALL} status").returncode == 0, 15, 0.2)


def test_to_install_again_on_a_machine_restarts_nothing(machine):
    pids = machine.does("cat /run/units/*.pid")
    assert machine.does(f"{INSTALL} install") == "  nothing: all is as it should be\n"
    assert machine.does("cat /run/units/*.pid") == pids


def test_a_folder_is_filled_without_root(machine):
    machine.does("mkdir /tmp/mine && cp -r /root/checkout /root/venv /tmp/mine && chown -R nobody: /tmp/mine")
    nobody = "setpriv --reuid=nobody --regid=nogroup --clear-groups env HOME=/nonexistent VENV=/tmp/mine/venv"
    fill = f"cd / && {nobody} DESTDIR=/tmp/mine/root /tmp/mine/checkout/install.sh"
    assert "switch to release 1" in machine.does(f"{fill} install")
    assert "nothing: all" in machine.does(f"{fill} install")
    machine.does(f"{fill} uninstall --purge --yes")
    said = machine.call(f"cd / && {nobody} /tmp/mine/checkout/install.sh install").stderr
    assert said == "install.sh: this wants root: sudo ./install.sh install\n"


def test_an_agent_that_does_not_start_is_said(machine):
    machine.does("cd /etc/kirosync && echo nonsense >policy.toml && echo KIROSYNC_POLICY=$PWD/policy.toml >>agent.env")
    ran = machine.call(f"{INSTALL} install")
    assert ran.returncode == 1
    assert "the policy cannot be followed" in ran.stderr
    assert ran.stderr.endswith("the service or the agent is not healthy; what they said is above\n")
    machine.does("rm /etc/kirosync/policy.toml; sed -i /POLICY/d /etc/kirosync/agent.env")
    machine.does(f"{INSTALL} install")


def test_tokens_are_made_on_the_installed_state(machine):
    token = machine.does(f"{INSTALL} admin token add phone --scope client").strip()
    asked = f"curl -s -o /dev/null -w %{{http_code}} -H 'Authorization: Bearer {token}' {HERE}/sync"
    assert machine.does(asked) == "200"
    machine.does(f"{INSTALL} admin token revoke phone")
    assert machine.does(asked) == "401"


def test_a_backup_comes_through_a_pipe(machine):
    machine.does(f"{INSTALL} admin backup - >/root/backup.tar.gz && tar -tzf /root/backup.tar.gz >/dev/null")


def test_a_changed_setting_restarts_what_it_is_for(machine):
    pids = machine.does("cat /run/units/*.pid")
    machine.does("echo KIROSYNC_EXECUTE_TIMEOUT=60 >>/etc/kirosync/kirosync.env")
    assert "start kirosync\n" in machine.does(f"{INSTALL} install")
    assert machine.does("cat /run/units/*.pid") != pids


def test_an_upgrade_restarts_and_keeps_the_state(machine):
    machine.does(f'{ASK} ask -d "$1" {HERE}/sync', '{"documents": {"kept": {"content": "x", "timestamp": 1}}}')
    hostile = "mkdir -p victim && install -d -o kirosync /var/backups/kirosync && cd /var/backups/kirosync"
    machine.does(
        f"cd /root && {hostile} && for n in 1 2 3 4; do mkdir -p $'x\\n/root/victim\\nz'/before-release-$n; done"
    )
    said = machine.does(f"sed -i '$a # changed' /root/checkout/agent.py && {INSTALL} upgrade")
    assert "switch to release 2" in said
    assert "start kirosync-agent" in said
    assert "before-release-2.tar.gz" in machine.does("ls /var/backups/kirosync")
    assert machine.does("stat -c %U:%a /var/backups/kirosync /var/backups/kirosync/*.tar.gz") == "root:700\nroot:600\n"
    machine.does("ls -d /root/victim")
    assert run_on(machine, "echo works") == "works\n"
    assert '"kept"' in machine.does(f"{ASK} ask {HERE}/sync")


def test_a_release_that_fails_only_in_its_place_is_rolled_back(machine):
    before = machine.does("readlink /opt/kirosync/current; cat /etc/systemd/system/kirosync*.service /etc/kirosync/*")
    machine.does(
        "cp -r /root/checkout /root/broken && cd /root/broken && sed -i 's/^Description=/&broken /' deploy/*.service"
    )
    defect = (
        'if "/lib/" in __import__("os").environ.get("KIROSYNC_STATE", ""): raise SystemExit("cannot read this state")'
    )
    machine.does('sed -i "/^from __future__/a $1" /root/broken/kirosync.py', defect)
    ran = machine.call("cd /root/broken && VENV=/root/venv ./install.sh upgrade")
    assert ran.returncode == 1
    assert "cannot read this state" in ran.stderr
    assert re.search(r"release 3 was not taken, see above; release 2 runs again", ran.stderr)
    assert before == machine.does(
        "readlink /opt/kirosync/current; cat /etc/systemd/system/kirosync*.service /etc/kirosync/*"
    )
    assert not machine.call("ls /opt/kirosync/releases/3").stdout
    assert run_on(machine, "echo works") == "works\n"
    assert '"kept"' in machine.does(f"{ASK} ask {HERE}/sync")


@pytest.mark.parametrize("ending", ["HUP", "INT", "PIPE", "TERM"])
def test_an_upgrade_that_is_ended_before_it_proved_healthy_goes_back(machine, ending):
    before = machine.does("readlink /opt/kirosync/current; cat /etc/systemd/system/kirosync*.service /etc/kirosync/*")
    machine.does("rm -rf /root/mute && cp -r /root/checkout /root/mute")
    defect = 'if "/lib/" in __import__("os").environ.get("KIROSYNC_STATE", ""): __import__("time").sleep(3600)'
    machine.does('sed -i "/^from __future__/a $1" /root/mute/kirosync.py', defect)
    upgrade = (
        "import signal, os; signal.signal(signal.SIGINT, signal.SIG_DFL); signal.signal(signal.SIGPIPE, signal.SIG_DFL)"
    )
    upgrade += "; os.execv('./install.sh', ['install.sh', 'upgrade'])"  # where & of bash has it ignore INT
    ran = machine.call(
        f"""cd /root/mute; VENV=/root/venv /usr/bin/python3 -c "$1" & upgrade=$!
        for _ in {{1..500}}; do [ "$(readlink /opt/kirosync/current)" != "$2" ] && break; sleep 0.1; done
        sleep 1; kill -{ending} $upgrade; wait $upgrade""",
        upgrade,
        before.split()[0],
    )
    assert ran.returncode == 1, ran.stdout + ran.stderr
    said = re.search(r"this was ended before release (\d+) proved healthy: back to release (\d+)", ran.stdout)
    assert said, ran.stdout + ran.stderr
    assert before == machine.does(
        "readlink /opt/kirosync/current; cat /etc/systemd/system/kirosync*.service /etc/kirosync/*"
    )
    assert said[1] not in machine.does("ls /opt/kirosync/releases").split()
    assert f"release {said[2]} runs again" in ran.stderr
    assert run_on(machine, "echo works") == "works\n"


def test_a_rollback_runs_the_release_before(machine):
    machine.does(f"{INSTALL} rollback")
    assert "release   1, of 1 2" in machine.does(f"{INSTALL} status")
    assert run_on(machine, "echo works") == "works\n"


def test_an_agent_that_may_what_its_user_may_is_a_user_of_the_machine(machine):
    machine.does("useradd --create-home --shell /bin/bash someone")
    machine.does(f"{INSTALL} install --agent user --agent-user someone")
    assert run_on(machine, "id -un; pwd").split() == ["someone", "/home/someone"]
    assert "may do what someone may" in machine.does(f"{INSTALL} status")
    machine.does(f"{INSTALL} install --agent confined --agent-user kirosync-agent")
    assert run_on(machine, "id -un; pwd").split() == ["kirosync-agent", "/var/lib/kirosync-agent"]


def test_the_lines_for_other_supervisors_run_service_and_agent(machine):
    machine.does("systemctl stop kirosync-agent && systemctl stop kirosync && rmdir /run/systemd/system")
    said = machine.does(f"sed -i '$a # without systemd' /root/checkout/agent.py && {INSTALL} upgrade")
    lines = re.findall(r"^  (setpriv .*)$", said, re.MULTILINE)
    readme = (ROOT / "README.md").read_text()
    assert len(lines) == 2
    assert all(f"    {line}\n" in readme for line in lines)
    for line in lines:
        machine.does('setsid bash -c "exec $1" >>/run/other.log 2>&1 &', line)
        until(lambda: machine.call(f"{ASK} ask {HERE}/health").returncode == 0, 15, 0.2)
    assert run_on(machine, "id -un") == "kirosync-agent\n"
    machine.does("pkill -TERM -u kirosync-agent; pkill -TERM -u kirosync; mkdir /run/systemd/system")
    until(lambda: not machine.call("pgrep -u kirosync,kirosync-agent").stdout.strip(), 15, 0.2)
    machine.does(f"{INSTALL} install && {INSTALL} status")


@pytest.mark.skipif(not shutil.which("caddy"), reason="wants caddy")
def test_a_long_poll_through_caddy_answers_when_something_changes(machine):
    until(lambda: machine.call(f"{ASK} ask {OUTSIDE}/health").returncode == 0, 15, 0.2)
    cursor = json.loads(machine.does(f"{ASK} ask '{OUTSIDE}/sync?only=documents'"))["cursor"]
    poll = f"ask -w '\\n%{{time_total}}' '{OUTSIDE}/sync?only=documents&wait=50&since={cursor}'"
    waiting = subprocess.Popen([*machine.enter, "bash", "-c", ASK + poll], stdout=subprocess.PIPE, text=True)
    time.sleep(31)  # what a proxy with a limit of 30 s would have cut
    assert waiting.poll() is None
    order = '{"documents": {"news": {"content": "x", "timestamp": 2}}}'
    answer = machine.does(f'{ASK} ask --interface 127.0.0.2 -d "$1" {OUTSIDE}/sync', order)
    assert json.loads(answer)["data"]["documents"]["news"]
    answer, took = waiting.communicate(timeout=5)[0].rsplit("\n", 1)
    assert "news" in json.loads(answer)["documents"]
    assert 30 < float(took) < 34
    print(f"a long poll through Caddy was held for {took} s")
    until(lambda: "127.0.0.2" in machine.does("cat /var/log/kiro-sync/access.log"))  # who asked Caddy


def test_uninstall_on_a_machine_ends_what_runs_and_purge_takes_the_users(machine):
    machine.does(f"{INSTALL} uninstall")
    assert not machine.call("pgrep -u kirosync,kirosync-agent").stdout
    assert machine.does("cat /etc/caddy/Caddyfile") == CADDYFILE
    assert machine.does("ls /var/lib/kirosync/tokens.json /etc/kirosync/agent.token; id -un kirosync")
    machine.does(f"{INSTALL} install && {INSTALL} status")
    assert "kept" in machine.does(f"{ASK} ask {HERE}/sync")
    machine.does(f"{INSTALL} uninstall --purge --yes")
    said = machine.does(f"{INSTALL} install --agent none")
    token = re.search(r"^The service is at http://127.0.0.1:3001\.\n.*once:\n(kirosync_\S+)$", said, re.MULTILINE)[1]
    assert (
        machine.does(f"curl -s -o /dev/null -w %{{http_code}} -H 'Authorization: Bearer {token}' {HERE}/sync") == "200"
    )
    assert machine.call("ls /var/lib/kirosync/token").returncode != 0
    assert "kirosync_" not in machine.does(f"{INSTALL} install")
    machine.does(f"{INSTALL} uninstall --purge --yes")
    assert machine.does("find /etc /opt /srv /var -iname '*kiro*sync*'") == ""
    assert machine.call("getent passwd kirosync kirosync-agent").stdout == ""
