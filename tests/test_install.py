"""install.sh and the README, as a newcomer meets them: in a copy of the checkout, at a terminal."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import until
from test_agent import free_port

import kirosync

ROOT = Path(__file__).parent.parent


@pytest.fixture
def checkout(tmp_path):
    """A copy of what is tracked, with a .venv that has everything already."""
    copy = tmp_path / "kirosync"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in names.stdout.split():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").mkdir()
    for part in Path(sys.prefix).iterdir():
        if not part.name.startswith(".has-"):
            (copy / ".venv" / part.name).symlink_to(part)
    names = ("requirements-dev.txt", "requirements-page.txt", "requirements.txt")
    for name in names:
        stamp = "".join((copy / each).read_text() for each in names)
        (copy / ".venv" / f".has-{name}").write_text(stamp)
    return copy


def environment(**more):
    clean = {key: value for key, value in os.environ.items() if not key.startswith("KIROSYNC_")}
    return {**clean, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **more}


def at_terminal(command, folder, **more):
    """Run *command* at a terminal of its own, where Ctrl-C is a key; return the process, and the terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["env", "--default-signal=INT", *command],  # who runs the tests in the background has it ignored
        cwd=folder,
        env=environment(**more),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    return process, ours


def heard(terminal, said):
    """Return what *terminal* has said so far."""
    os.set_blocking(terminal, False)
    with contextlib.suppress(BlockingIOError, OSError):
        said.extend(os.read(terminal, 65536))
    return said.decode()


def alive(folder):
    """Return the processes that run something out of *folder*."""
    return [pid.name for pid in Path("/proc").iterdir() if pid.name.isdigit() and str(folder) in cmdline(pid)]


def cmdline(pid):
    try:
        return (pid / "cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


@pytest.mark.parametrize("token", ["", "my-token"])
def test_run_prints_a_line_that_works_and_ctrl_c_ends_everything(checkout, token):
    more = {"KIROSYNC_PORT": str(free_port())} | ({"KIROSYNC_TOKEN": token} if token else {})
    process, terminal = at_terminal(["./install.sh", "run"], checkout, **more)
    said = bytearray()
    try:
        line = until(lambda: re.search(r"^try +(curl .*)\r$", heard(terminal, said), re.MULTILINE), 30)[1]
        ran = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment(**more), check=True)
        assert json.loads(ran.stdout)["result"]["stdout"].startswith("Linux")
        os.write(terminal, b"\x03")  # Ctrl-C
        assert process.wait(15) == 0, heard(terminal, said)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        os.close(terminal)
    assert "Traceback" not in said.decode()
    assert not token or token not in said.decode()
    until(lambda: not alive(checkout), 5)


def test_run_goes_on_without_what_pip_cannot_get_and_says_so_once(checkout):
    with (checkout / "requirements-page.txt").open("a") as listed:
        listed.write("no-such-package-of-kirosync\n")
    stamp = "".join(path.read_text() for path in sorted(checkout.glob("requirements*.txt")))
    (checkout / ".venv" / ".has-requirements.txt").write_text(stamp)
    more, said = {"KIROSYNC_PORT": str(free_port()), "PIP_NO_INDEX": "1"}, [bytearray(), bytearray()]
    for each in said:
        process, terminal = at_terminal(["./install.sh", "run"], checkout, **more)
        try:
            until(lambda each=each, terminal=terminal: "Ctrl-C ends" in heard(terminal, each), 60)
        finally:
            process.send_signal(signal.SIGTERM)
            assert process.wait(15) == 0
            os.close(terminal)
    first, second = (each.decode() for each in said)
    assert re.search(
        r"pip could not install requirements-page.txt; .*to have it tried again; text is shown as it is", first
    )
    assert "requirements-page.txt" not in second
    until(lambda: not alive(checkout), 15)


@pytest.mark.parametrize("ends", [signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
def test_run_leaves_nothing_behind_however_it_ends(checkout, ends):
    process, terminal = at_terminal(["./install.sh", "run"], checkout, KIROSYNC_PORT=str(free_port()))
    said = bytearray()
    try:
        until(lambda: "Ctrl-C ends" in heard(terminal, said), 30)
        running = [pid for pid in alive(checkout) if "python" in cmdline(Path("/proc", pid))]
        assert len(running) >= 2
        assert not [pid for pid in running if os.getsid(int(pid)) == process.pid]  # Ctrl-C does not reach them
    finally:
        process.send_signal(ends)
        code = process.wait(15)
        os.close(terminal)
    assert code == (-signal.SIGKILL if ends == signal.SIGKILL else 0)
    until(lambda: not alive(checkout), 15)


def test_run_says_in_one_line_that_the_port_is_taken(checkout, server):
    port = server.url.rsplit(":", 1)[1]
    ran = subprocess.run(
        ["./install.sh", "run"],
        cwd=checkout,
        env=environment(KIROSYNC_PORT=port),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "cannot listen on 127.0.0.1" in ran.stderr
    assert "Traceback" not in ran.stderr
    until(lambda: not alive(checkout), 5)


def test_a_missing_venv_is_said_in_one_line_with_the_package(checkout, tmp_path):
    shutil.rmtree(checkout / ".venv")
    fake = tmp_path / "python-without-venv"
    fake.write_text(f'#!/bin/sh\ncase "$*" in *ensurepip*) exit 1;; esac\nexec {sys.executable} "$@"\n')
    fake.chmod(0o755)
    ran = subprocess.run(
        ["./install.sh", "run"],
        cwd=checkout,
        env=environment(PYTHON=str(fake)),
        capture_output=True,
        text=True,
        check=False,
    )
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert (ran.returncode, ran.stderr) == (1, f"install.sh: venv is missing: apt install python{version}-venv\n")


def test_an_old_python_is_refused_in_one_line(checkout, tmp_path):
    shutil.rmtree(checkout / ".venv")
    ran = subprocess.run(
        ["./install.sh", "test"],
        cwd=checkout,
        env=environment(PYTHON="false"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert ran.stderr.startswith("install.sh: Python 3.11 or later is needed")


def test_help_and_nonsense(checkout):
    shown = subprocess.run(["./install.sh", "help"], cwd=checkout, capture_output=True, text=True, check=True).stdout
    assert "./install.sh run" in shown
    assert "KIROSYNC_STATE" in shown
    ran = subprocess.run(["./install.sh", "dance"], cwd=checkout, capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "there is no 'dance'" in ran.stderr


# The README


def transcript():
    """The blocks of the README that begin with a prompt, as [(command, [lines it prints])]."""
    parts = []
    for block in re.findall(r"(?:^    .*\n)+", (ROOT / "README.md").read_text(), re.MULTILINE):
        if not block.startswith("    $ "):
            continue
        for line in block.splitlines():
            text = line.removeprefix("    ")
            if text.startswith("$ "):
                parts.append((text[2:], []))
            else:
                parts[-1][1].append(text)
    return parts


def plain(text, folder):
    """Take out of a text what differs from run to run: folder, ids, revisions."""
    text = re.sub(r"cmd-\d+-[0-9a-f]+", "cmd-ID", text.replace(str(folder), "."))
    text = re.sub(r"wait for \d+ ms", "wait for N ms", text)
    text = re.sub(r"kirosync_[\w-]{43}", "kirosync_SECRET", text)
    return re.sub(r'("revisions?": )"?\d+"?', r"\1N", text)


@pytest.mark.skipif(not (shutil.which("jq") and shutil.which("curl")), reason="the transcript uses jq and curl")
def test_the_transcript_of_the_readme_is_true(checkout):
    (first, printed), *rest = transcript()
    assert first == "./install.sh run"
    assert len(rest) >= 5
    port = str(free_port())
    process, terminal = at_terminal(["./install.sh", "run"], checkout, KIROSYNC_PORT=port)
    said = bytearray()
    try:
        until(lambda: "Ctrl-C ends" in heard(terminal, said), 30)
        lines = plain(said.decode().replace("\r", "").replace(port, "3001"), checkout).splitlines()
        assert [line for line in lines if line in printed] == printed
        config = checkout.parent / "config" / "kirosync" / "config.toml"  # for the port, which is another one here
        config.parent.mkdir(parents=True)
        config.touch(0o600)
        config.write_text(f'url = "http://127.0.0.1:{port}"\ntoken-file = "{checkout}/state/token"\n')
        homes = {"XDG_CONFIG_HOME": str(config.parent.parent), "XDG_STATE_HOME": str(checkout.parent / "remembered")}
        defined, identity = "", ""
        for command, expected in rest:
            runs = re.sub(r"cmd-\d+-[0-9a-f]+", identity, command).replace("3001", port)
            runs += '; printf %s "$ID"' if command.startswith("ID=") else ""
            ran = subprocess.run(
                ["bash", "-c", f"{defined}\n{runs}"],
                cwd=checkout,
                capture_output=True,
                text=True,
                env=environment(**homes),
                check=True,
            )
            defined += f"{command}\n" if "() {" in command else ""
            if name := re.match(r"(\w+)=", command):
                defined += f"{name[1]}={ran.stdout}\n"
                continue
            identity = (re.findall(r'"commandId":"(.*?)"', ran.stdout) or [identity])[0]
            assert plain(ran.stdout, checkout).splitlines() == [plain(line, checkout) for line in expected], command
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(15)
        os.close(terminal)


def test_the_readme_lists_every_route_and_every_type():
    text = (ROOT / "README.md").read_text()
    listed = re.findall(r"^\| `((?:GET|POST|PUT|PATCH|DELETE) \S+)`", text, re.MULTILINE)
    assert listed == [f"{route.method} {kirosync.readable(route.path)}" for route in kirosync.ROUTES]
    for kind, (required, optional, _) in kirosync.ORDERS.items():
        row = re.search(rf"^\| `{kind}` \| (.*?) \| (.*) \|$", text, re.MULTILINE)
        assert re.findall(r"`(\w+)`", row[1]) == list(required)
        described = set(re.findall(r"`(\w+)`", row[2]))
        assert set(optional) - {"encoding", "mode", "append"} <= described
    for name in kirosync.ORDER:
        assert f"`{name}`" in text


def test_the_limits_in_the_readme_are_those_of_the_code():
    text = (ROOT / "README.md").read_text()
    assert f"s of running, {kirosync.RUN_S}" in text
    assert f"the last {kirosync.HISTORY_FILES} versions" in (ROOT / "state" / "README.md").read_text()
