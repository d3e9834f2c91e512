"""The command line: a real service, a real agent, real processes, terminals and shells."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import TOKEN, Process, Server, until
from test_agent import free_port
from test_install import at_terminal, environment, heard

import client
import kirosync

ROOT = Path(__file__).parent.parent
PROGRAM = [sys.executable, str(ROOT / "client.py")]
PASSWD = "/etc/passwd"


STARTED = []


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


class Shell:
    """Where somebody types: with settings for a service, and homes of its own."""

    def __init__(self, url, home, **more):
        self.home = home
        home.mkdir(exist_ok=True)
        said = {"KIROSYNC_URL": url, "KIROSYNC_TOKEN": TOKEN, "XDG_STATE_HOME": f"{home}/state", "HOME": str(home)}
        self.settings = {**said, "XDG_CONFIG_HOME": f"{home}/config", **more}
        self.env = environment(**self.settings)

    def __call__(self, *words, stdin="", cwd=None, timeout=60, **more):
        raw = stdin if isinstance(stdin, bytes) else stdin.encode()
        ran = subprocess.run(
            [*PROGRAM, *map(str, words)],
            input=raw or None,
            stdin=None if raw else subprocess.DEVNULL,
            capture_output=True,
            cwd=cwd,
            env={**self.env, **more},
            timeout=timeout,
            check=False,
        )
        ran.text, ran.said = ran.stdout.decode("utf-8", "replace"), ran.stderr.decode()
        return ran

    def start(self, *words, **more):
        """Start it in a process group of its own, as a shell does."""
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL, **more}
        command = ["env", "--default-signal=INT", *PROGRAM, *map(str, words)]
        STARTED.append(subprocess.Popen(command, env=self.env, start_new_session=True, **streams))
        return STARTED[-1]

    def lines(self, *words, **more):
        return [json.loads(line) for line in self("--json", *words, **more).text.splitlines()]


@pytest.fixture
def shell(server, tmp_path):
    return Shell(server.url, tmp_path / "home")


@pytest.fixture
def agent(server, state, tmp_path, start):
    """An agent, at the folder of the server, which is the value."""
    log = tmp_path / "agent.log"
    start(Process, "agent.py", "--state", state, "--name", "box", log=log)
    until(lambda: log.exists() and "INFO agent" in log.read_text())
    return server


def queued(shell, **command):
    """Return the id of the one command in the queue, as soon as it is so."""
    wanted = command or {"status": "processing"}
    found = until(lambda: [each for each in shell.lines("ls") if wanted.items() <= each.items()], 20, 0.1)
    return found[0]["id"]


# run


def test_run_is_as_if_it_ran_here(agent, shell):
    ran = shell("run", "--", r"printf 'a\xffb\n'; echo wrong >&2; exit 3")
    assert (ran.returncode, ran.stdout, ran.said) == (3, b"a\xffb\n", "wrong\n")


def test_several_words_are_the_arguments_of_a_program_as_they_are(agent, shell, tmp_path):
    ran = shell("run", "--dir", tmp_path, "--env", "X=a b", "--", "bash", "-c", 'echo "$0|$X|$PWD"', "it's $HOME")
    assert ran.text == f"it's $HOME|a b|{tmp_path}\n"


def test_what_is_printed_is_there_when_it_is_printed(agent, shell):
    running = shell.start("run", "--", "echo one; sleep 20; echo two")
    began = time.monotonic()
    assert running.stdout.readline() == b"one\n"
    assert time.monotonic() - began < 10
    os.killpg(running.pid, signal.SIGINT)
    assert running.wait(15) == 130
    running.communicate()


def test_ten_megabytes_are_piped_through(agent, shell):
    piped = os.urandom(10_000_000)
    ran = shell("run", "--", "sha256sum", stdin=piped)
    assert ran.text.split()[0] == hashlib.sha256(piped).hexdigest()
    assert shell("run", "--", "cat", stdin=piped[:1_000_000]).stdout == piped[:1_000_000]


def test_more_than_a_command_can_be_told_is_refused_before_anything_runs(agent, shell, tmp_path):
    (tmp_path / "large").write_bytes(bytes(client.INPUT_BYTES + 1))
    with open(tmp_path / "large", "rb") as large:
        running = shell.start("run", "--", "cat", stdin=large)
    said = running.communicate(timeout=30)[1].decode()
    assert running.returncode == 2
    assert str(client.INPUT_BYTES) in said
    assert shell.lines("ls") == []


def test_stdin_is_left_to_others_where_that_is_wanted(agent, shell):
    ran = subprocess.run(
        ["bash", "-c", 'while read -r line; do "$@" -- echo "$line" </dev/stdin; done', "-", *PROGRAM, "run", "-n"],
        input=b"a\nb\n",
        env=shell.env,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert ran.stdout == b"a\nb\n"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--timeout", "0.5", "--", "sleep 9"], 124, "timeout: timed out after 0.5 s"),
        (["--", "kill -9 $$"], 137, "ended by signal 9 (exit code 137)"),
        (["--dir", "/nowhere", "--", "true"], 1, "error: workingDir: no /nowhere"),
        (["--expires", "1", "--target", "nobody", "--", "true"], 75, "expired: the agent nobody did not take it"),
        (["--env", "X", "--", "true"], 2, "X is not NAME=VALUE"),
        ([], 2, "run what?"),
    ],
)
def test_how_it_ended_is_the_exit_code_and_a_sentence(agent, shell, words, code, said):
    ran = shell("run", *words)
    assert ran.returncode == code
    assert said in ran.said
    assert ran.text == ""


def test_what_the_policy_of_the_agent_refuses_is_not_permitted(server, state, shell, start, tmp_path):
    (tmp_path / "policy").write_text("[[refuse]]\ncommand = 'mkfs'\nreason = 'not here'\n")
    start(Process, "agent.py", "--state", state, "--policy", tmp_path / "policy")
    ran = shell("run", "--", "mkfs")
    assert (ran.returncode, ran.text) == (77, "")
    assert "refused: " in ran.said
    assert "not here" in ran.said


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_ctrl_c_cancels_and_waits_for_the_end(agent, shell, number, code, tmp_path):
    running = shell.start("run", "--", f"trap 'echo ended; touch {tmp_path}/trapped; exit 5' INT; echo on; sleep 60")
    assert running.stdout.readline() == b"on\n"
    os.killpg(running.pid, number)
    out, said = running.communicate(timeout=20)
    assert running.returncode == code
    assert (tmp_path / "trapped").exists()
    assert out == b"ended\n"
    assert b"cancelled" in said
    assert [each["outcome"] for each in shell.lines("ls")] == ["cancelled"]


def test_ctrl_c_twice_leaves_and_says_where_it_goes_on(agent, shell, state):
    running = shell.start("run", "--", "trap '' INT TERM; echo on; sleep 4; echo off")
    assert running.stdout.readline() == b"on\n"
    os.killpg(running.pid, signal.SIGINT)
    assert b"once more" in running.stderr.readline()
    os.killpg(running.pid, signal.SIGINT)
    said = running.communicate(timeout=2)[1].decode()
    assert running.returncode == 130
    identity = re.search(r"client.py wait (\S+)", said)[1]
    assert shell("wait", identity).returncode in (0, 130)


def test_what_nobody_reads_any_more_is_ended(agent, shell):
    line = f'{" ".join(PROGRAM)} run -- yes </dev/null | head -2; echo "${{PIPESTATUS[0]}}"'
    ran = subprocess.run(["bash", "-c", line], env=shell.env, capture_output=True, timeout=60, check=False)
    assert ran.stdout == b"y\ny\n141\n"
    assert [each["outcome"] for each in shell.lines("ls")] == ["cancelled"]


def test_a_run_survives_that_the_service_is_killed_in_between(state, tmp_path, start):
    port = free_port()
    first = start(Server, state, tmp_path / "log", "--port", port)
    start(Process, "agent.py", "--state", state, "--name", "box")
    shell = Shell(first.url, tmp_path / "home")
    running = shell.start("run", "--", "for i in {1..30}; do echo $i; echo e$i >&2; sleep 0.1; done; exit 4")
    assert running.stdout.readline() == b"1\n"
    first.end(9)
    while b"trying again" not in (line := running.stderr.readline()):
        assert re.fullmatch(rb"e\d+\n", line)
    start(Server, state, tmp_path / "log2", "--port", port)
    out, said = running.communicate(timeout=60)
    assert out.decode().split() == [str(number) for number in range(2, 31)]
    assert [line for line in said.decode().split() if re.fullmatch(r"e\d+", line)][-1] == "e30"
    assert "connected again" in said.decode()
    assert running.returncode == 4


class Cutting:
    """Stands before a service, and hangs up in the place of the first answer to POST /command."""

    def __init__(self, url):
        self.there, self.cuts = ("127.0.0.1", int(url.rsplit(":", 1)[1])), 0
        self.door = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.door.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self):
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.carry, args=(self.door.accept()[0],), daemon=True).start()

    def carry(self, caller):
        with contextlib.suppress(OSError), caller, socket.create_connection(self.there) as there:
            asked = []
            threading.Thread(target=self.pass_on, args=(caller, there, asked), daemon=True).start()
            while answer := there.recv(1 << 20):
                if asked[-1] and not self.cuts:
                    self.cuts += 1
                    return
                caller.sendall(answer)

    @staticmethod
    def pass_on(caller, there, asked):
        with contextlib.suppress(OSError):
            while piece := caller.recv(1 << 20):
                asked.append(piece.startswith(b"POST /command ") or (b"HTTP/1.1" not in piece and asked[-1:] == [True]))
                there.sendall(piece)


def test_a_command_whose_answer_was_lost_is_not_run_twice(agent, tmp_path):
    between = Cutting(agent.url)
    shell = Shell(between.url, tmp_path / "home")
    ran = shell("run", "--", f"echo ran >> {tmp_path}/runs; echo done")
    between.door.close()
    assert (ran.returncode, ran.text, between.cuts) == (0, "done\n", 1)
    assert (tmp_path / "runs").read_text() == "ran\n"


def test_a_command_that_prints_without_a_break_does_not_use_up_what_the_token_may_ask(agent, shell, state):
    command = "for i in {1..400}; do echo $i; echo $i >&2; sleep 0.01; done"
    ran = shell("run", "--", command, KIROSYNC_TOKEN=token_of(state, "client"))
    numbers = [str(number) for number in range(1, 401)]
    assert (ran.returncode, ran.text.split(), ran.said.split()) == (0, numbers, numbers)
    asked = [json.loads(line) for line in (state / "log/access.log").read_text().splitlines()]
    assert len([each for each in asked if each["by"] == "client"]) < 100


def test_what_was_not_kept_is_said(agent, shell):
    ran = shell("run", "--", "head -c 67200000 /dev/zero", timeout=120)
    assert ran.returncode == 0
    assert len(ran.stdout) == 64 << 20
    assert "more was printed than is kept" in ran.said


def test_json_tells_what_is_printed_and_then_the_command(agent, shell):
    *pieces, command = shell.lines("run", "--", r"echo eins; printf '\xff' >&2")
    assert {"stream": "stdout", "data": "eins\n"} in pieces
    assert {"stream": "stderr", "data": "/w==", "encoding": "base64"} in pieces
    assert (command["outcome"], command["result"]["exitCode"]) == ("ok", 0)


def test_at_a_terminal_what_is_typed_is_passed_on_and_waiting_is_said(server, shell, state, start):
    process, terminal = at_terminal([*PROGRAM, "run", "--", "read -r x; echo got $x"], shell.home, **shell.settings)
    said = bytearray()
    until(lambda: "waiting for an agent that does execute_bash; none is there" in heard(terminal, said))
    start(Process, "agent.py", "--state", state)
    os.write(terminal, b"it\n")
    until(lambda: "got it\r\n" in heard(terminal, said), 20)
    assert process.wait(10) == 0
    os.close(terminal)


def test_with_t_it_has_a_terminal_of_its_own_and_this_one_is_as_before(agent, shell):
    command = "stty -a | head -1; read -r -n 1 key; echo \"key $key\"; trap 'echo int' INT; sleep 9; sleep 9"
    process, terminal = at_terminal([*PROGRAM, "run", "-t", "--", command], shell.home, **shell.settings)
    said = bytearray()
    until(lambda: "columns" in heard(terminal, said), 20)
    os.write(terminal, b"k")  # no Enter
    until(lambda: "key k" in heard(terminal, said))
    os.write(terminal, b"\x03")  # goes to the command
    until(lambda: "int\r\n" in heard(terminal, said))
    os.write(terminal, client.LEAVE)
    assert process.wait(15) == 130
    assert subprocess.run(["stty", "-a"], stdin=terminal, capture_output=True, text=True, check=True).stdout.count(
        " icanon"
    )
    os.close(terminal)


# submit, wait, logs, cancel, ls, cat


def test_submit_prints_an_id_and_wait_what_it_gave(agent, shell, tmp_path):
    (tmp_path / "text").write_bytes(b"a\nb")
    identity = shell("submit", "read_file", f"path={tmp_path}/text", "limit:=3").text.strip()
    ran = shell("wait", identity)
    assert (ran.returncode, ran.stdout) == (0, b"a\nb")
    identity = shell("submit", "write_file", f"path={tmp_path}/copy", f"content=@{tmp_path}/text").text.strip()
    assert shell.lines("wait", identity)[0]["result"]["created"] is True
    assert (tmp_path / "copy").read_bytes() == b"a\nb"
    order = json.dumps({"type": "execute_bash", "command": "echo out; echo err >&2; exit 7"})
    for ran in (shell("submit", "--json", order), shell("submit", "-", "--json", stdin=order)):
        ran = shell("wait", json.loads(ran.text)["commandId"])  # noqa: PLW2901
        assert (ran.returncode, ran.text, ran.said) == (7, "out\n", "err\n")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["execute_bash", "command"], 2, "command: not a field; write field=text, field:=JSON or field=@FILE"),
        (["read_file", "limit:=x"], 2, "limit:= wants JSON"),
        (["dance"], 1, "'dance' is not one of"),
        (["execute_bash", "command=@/nowhere"], 1, "/nowhere"),
        (["{}"], 1, "type"),
    ],
)
def test_an_order_that_is_none_is_refused_with_what_would_be_right(shell, words, code, said):
    ran = shell("submit", *words)
    assert (ran.returncode, ran.text) == (code, "")
    assert said in ran.said


def test_logs_and_cancel(agent, shell):
    identity = shell("submit", "execute_bash", "command=echo out; echo err >&2; sleep 60").text.strip()
    until(lambda: shell("logs", identity).text == "out\n", 20, 0.1)
    assert shell("logs", identity).said == "err\n"
    assert shell("logs", "--stderr", identity).text == "err\n"
    following = shell.start("logs", "-f", identity)
    assert following.stdout.readline() == b"out\n"
    assert shell("cancel", identity).returncode == 0
    assert following.wait(20) == 0
    following.communicate()
    assert shell("wait", identity).returncode == 130
    ran = shell("cancel", "nothing")
    assert (ran.returncode, ran.said) == (1, "client.py: Command not found\n")


def test_ctrl_c_leaves_what_one_only_looks_at_alone(agent, shell):
    identity = shell("submit", "execute_bash", "command=echo on; sleep 3").text.strip()
    following = shell.start("logs", "-f", identity)
    assert following.stdout.readline() == b"on\n"
    os.killpg(following.pid, signal.SIGINT)
    assert following.wait(5) == 130
    following.communicate()
    assert shell("wait", identity).returncode == 0


def test_what_one_only_looks_at_goes_on_when_nobody_reads_it_any_more(agent, shell):
    identity = shell("submit", "execute_bash", "command=for i in $(seq 30); do echo $i; sleep 0.1; done").text.strip()
    looks = [
        f'{" ".join(PROGRAM)} {verb} {identity} | head -1; echo "${{PIPESTATUS[0]}}"' for verb in ("wait", "logs -f")
    ]
    started = [subprocess.Popen(["bash", "-c", line], env=shell.env, stdout=subprocess.PIPE) for line in looks]
    assert [process.communicate(timeout=60)[0] for process in started] == [b"1\n141\n"] * 2
    assert shell("wait", identity).returncode == 0


def test_ls_lists_what_there_is(agent, shell):
    shell("run", "--", "true")
    shell("run", "--", "false")
    shell("chat", "talk", "--say", "hi")
    agent.ask("POST", "/sync", json={"documents": {"d.md": {"content": "é", "timestamp": 1, "language": "markdown"}}})
    assert re.search(r"^cmd-\w+  ok  \d+s  execute_bash  true$", shell("ls", "--status", "completed").text, re.M)
    assert len(shell.lines("ls", "commands", "--limit", "1")) == 1
    assert shell.lines("ls", "--type", "read_file") == []
    assert re.match(r"d.md  2  \d+d  markdown\n$", shell("ls", "documents").text)
    assert re.match(r"talk  1  \ds  user: hi\n$", shell("ls", "conversations").text)
    assert re.match(r"box  agent  here  \S+  execute_bash, ", shell("ls", "agents").text)


def test_cat_prints_a_document_exactly_and_its_versions(server, shell):
    for moment, content in ((1, "old"), (2, "new\r\n\x1b[2J")):
        server.ask("POST", "/sync", json={"documents": {"a/b c": {"content": content, "timestamp": moment}}})
    assert shell("cat", "a/b c").stdout == b"new\r\n\x1b[2J"
    now, before = shell.lines("cat", "--versions", "a/b c")
    assert now["version"] == "current"
    assert shell("cat", "a/b c", "--version", before["version"]).text == "old"
    assert shell("cat", "nothing").returncode == 1


# A human, and conversations


def test_ask_prints_what_a_human_answers_elsewhere(shell):
    asking = shell.start("ask", "Which?", "--choices", "red, blue")
    identity = queued(shell, type="user_input")
    assert shell("answer").text == f"{identity}  Which? (red, blue)\n"
    ran = shell("answer", identity, "green")
    assert ran.returncode == 1
    assert "one of red, blue" in ran.said
    assert shell("answer", identity, "blue").returncode == 0
    assert asking.communicate(timeout=10)[0] == b"blue\n"
    assert asking.returncode == 0


@pytest.mark.parametrize(("said", "code"), [("yes", 0), ("n", 1)])
def test_ask_to_confirm_is_an_exit_code(shell, said, code):
    asking = shell.start("ask", "Push to main?", "--confirm")
    identity = queued(shell, type="user_input")
    ran = shell("answer", identity)  # Ctrl-D
    assert (ran.returncode, ran.said) == (2, "Push to main? (yes, no) client.py: nothing was answered\n")
    ran = shell("answer", identity, stdin=f"{said}\n")  # asked for at the terminal
    assert ran.said == "Push to main? (yes, no) "
    asking.communicate(timeout=10)
    assert asking.returncode == code


def test_a_question_ends_by_itself_or_is_withdrawn(shell):
    ran = shell("ask", "Anybody?", "--timeout", "1")
    assert (ran.returncode, ran.text) == (124, "")
    assert "nobody answered" in ran.said
    asking = shell.start("ask", "Anybody?")
    queued(shell, type="user_input", status="pending")
    os.killpg(asking.pid, signal.SIGINT)
    asking.communicate(timeout=10)
    assert asking.returncode == 130
    assert shell("answer").text == ""


def test_chat_reads_appends_and_follows_what_grows(server, shell):
    assert shell("chat", "talk").returncode == 1
    shell("chat", "talk", "--say", "first")
    following = shell.start("chat", "-f", "talk")
    assert following.stdout.readline().startswith(b"user  20")
    assert following.stdout.readline() == b"first\n"
    shell("chat", "talk", "-", "--role", "assistant", stdin="from a pipe\n")
    assert [following.stdout.readline() for _ in range(3)][2] == b"from a pipe\n"
    part = {"role": "assistant", "timestamp": 4e12}
    for content in ("Hel", "Hello"):
        server.ask("POST", "/sync", json={"conversations": {"talk": [{**part, "content": content}]}})
        time.sleep(0.5)
    assert [following.stdout.readline() for _ in range(4)][2:] == [b"Hel\n", b"lo\n"]
    os.killpg(following.pid, signal.SIGINT)
    following.communicate(timeout=10)
    assert following.returncode == 130
    assert [each["content"] for each in shell.lines("chat", "talk")] == ["first", "from a pipe", "Hello"]


EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\r"


def test_what_others_wrote_steers_no_terminal(agent, shell):
    message = {"role": EVIL, "content": f"a{EVIL}\nb", "timestamp": 1}
    document = {"content": "x", "timestamp": 1, "language": EVIL}
    agent.ask("POST", "/sync", json={"conversations": {"talk": [message]}, "documents": {"d\u202e": document}})
    agent.ask("POST", "/command", json={"type": "execute_bash", "command": f"true {EVIL}"})
    agent.ask("POST", "/command", json={"type": "user_input", "prompt": EVIL, "inputType": "choice", "choices": [EVIL]})
    agent.ask("PUT", "/agents/name\u202e", json={"kind": "agent", "types": [EVIL], "version": EVIL})
    agent.ask("POST", "/command", json={"type": "execute_bash", "command": "true", "target": f"x{EVIL}"})
    for words in (["ls"], ["ls", "documents"], ["ls", "conversations"], ["ls", "agents"], ["status"], ["answer"]):
        for more in ([], ["--json"]):
            assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shell(*words, *more).text), words
    (shell.home / "evil").write_bytes(text := b"\xff" + f"{EVIL}\nb\n".encode())
    read = shell("submit", "read_file", f"path={shell.home}/evil").text.strip()
    assert shell("wait", read).stdout == text
    for words in (["chat", "talk"], ["wait", read], ["ask", "?"]):
        process, terminal = at_terminal([*PROGRAM, "--quiet", *words], shell.home, NO_COLOR="1", **shell.settings)
        if words == ["ask", "?"]:
            answer = {"value": f"{EVIL}\nb", "type": "text", "executionId": queued(shell, prompt="?")}
            agent.ask("POST", "/api/kiro/input", json=answer)
        said = bytearray()
        until(lambda: process.poll() is not None and "b\r\n" in heard(terminal, said))  # noqa: B023
        os.close(terminal)
        assert not re.search(r"[\x00-\x09\x0b\x0c\x0e-\x1f\x7f-\x9f\u202e]", said.decode()), words
        assert r"\x1b[2J" in said.decode(), words


def test_colours_are_for_terminals_whose_user_wants_them(agent, shell):
    shell("run", "--", "false")
    for more, colored in (({}, True), ({"NO_COLOR": "1"}, False)):
        process, terminal = at_terminal([*PROGRAM, "ls"], shell.home, TERM="xterm", **more, **shell.settings)
        said = bytearray()
        until(
            lambda process=process, terminal=terminal, said=said: process.poll() is not None and heard(terminal, said)
        )
        os.close(terminal)
        assert ("\x1b[31mexit\x1b[0m" in said.decode()) == colored
    assert "\x1b" not in shell("ls").text


# sync


class Side:
    """A folder that is brought in step by somebody with a memory of their own."""

    def __init__(self, server, path, **more):
        self.path, self.shell = path, Shell(server.url, path.with_name(f"{path.name}-home"), **more)
        path.mkdir()

    def sync(self, *words, code=0):
        ran = self.shell("sync", *(words or ["."]), cwd=self.path)
        assert ran.returncode == code, ran.said
        return ran

    def write(self, path, text, moment=None):
        (self.path / path).parent.mkdir(parents=True, exist_ok=True)
        (self.path / path).write_text(text)
        if moment is not None:
            os.utime(self.path / path, (moment, moment))

    def read(self, path="*"):
        return {
            str(file.relative_to(self.path)): file.read_bytes().decode()
            for file in self.path.rglob(path)
            if file.is_file()
        }


@pytest.fixture
def here(server, tmp_path):
    return Side(server, tmp_path / "here")


@pytest.fixture
def there(server, tmp_path):
    return Side(server, tmp_path / "there")


def test_two_folders_come_into_step(server, here, there):
    here.write("a.md", "eins\n", moment=1_700_000_000)
    here.write("sub/b.py", "x = 1\r\n")
    assert here.sync().stdout.decode().split() == ["pushed", "a.md", "pushed", "sub/b.py"]
    document = server.ask("GET", "/document/a.md").json()
    assert document.items() >= {"path": "a.md", "content": "eins\n", "language": "markdown"}.items()
    assert document["timestamp"] == 1_700_000_000_000
    assert here.sync().stdout == b""
    there.sync()
    assert there.read() == {"a.md": "eins\n", "sub/b.py": "x = 1\r\n"}
    assert (there.path / "a.md").stat().st_mtime == 1_700_000_000
    (there.path / "a.md").chmod(0o750)
    here.write("a.md", "zwei\n", moment=1_600_000_000)  # an older time is no older change
    here.sync()
    there.sync()
    assert there.read("a.md") == {"a.md": "zwei\n"}
    assert (there.path / "a.md").stat().st_mode & 0o777 == 0o750


def test_what_both_have_changed_is_lost_on_neither_side(server, here, there):
    here.write("a.md", "common")
    here.sync()
    there.sync()
    here.write("a.md", "here")
    there.write("a.md", "there", moment=1_600_000_000)
    here.sync("--push", "a.md")
    ran = there.sync(code=1)
    assert "a.md was changed on both sides" in ran.stderr.decode()
    kept = there.read("a.md.conflict-*")
    assert [*kept.values()] == ["there"]
    assert there.read("a.md") == {"a.md": server.ask("GET", "/document/a.md").json()["content"]}
    there.sync()  # and that was it; what was kept is no document
    assert [*server.ask("GET", "/sync?only=documents").json()["documents"]] == ["a.md"]


def test_the_later_one_of_this_side_wins_and_the_other_is_a_version(server, here, there):
    here.write("a.md", "common", moment=1_600_000_000)
    here.sync()
    there.sync()
    there.write("a.md", "there", moment=1_700_000_000)
    there.sync()
    here.write("a.md", "here")
    ran = here.sync(code=1)
    assert "yours is later" in ran.stderr.decode()
    versions = server.ask("GET", "/document/a.md/versions").json()["versions"]
    contents = [server.ask("GET", f"/document/a.md?version={each['version']}").json()["content"] for each in versions]
    assert contents[:2] == ["here", "there"]


def test_push_and_pull_go_one_way(server, here, there):
    here.write("a.md", "a")
    assert here.sync("--pull", ".").stdout == b""
    here.sync("--push", ".")
    there.write("b.md", "b")
    there.sync("--push", ".")
    assert there.read() == {"b.md": "b"}
    here.sync("--push", ".")
    assert here.read() == {"a.md": "a"}
    here.sync("--pull", ".")
    assert here.read() == {"a.md": "a", "b.md": "b"}
    assert here.sync("--pull", "--push", ".", code=2).stderr


def test_what_is_removed_stays_there_unless_that_is_wanted(server, here, there):
    for name in ("a.md", "b.md", "c.md"):
        here.write(name, name)
    here.sync()
    there.sync()
    (here.path / "a.md").unlink()
    assert here.sync().stdout == b""
    assert server.ask("GET", "/document/a.md").status_code == 200
    here.sync("--delete", ".")
    assert server.ask("GET", "/document/a.md").status_code == 404
    there.write("b.md", "changed")
    there.sync("--delete", ".")
    assert there.read() == {"b.md": "changed", "c.md": "c.md"}
    (here.path / "b.md").unlink()  # which has changed there meanwhile
    here.sync("--delete", ".")
    assert here.read() == {"b.md": "changed", "c.md": "c.md"}
    ran = here.sync("--delete", "gone", code=2)
    assert "is not there" in ran.stderr.decode()


def test_a_restored_service_is_no_reason_to_remove_files(server, here):
    here.write("a.md", "a")
    here.sync()
    server.ask("DELETE", "/document/a.md")
    memory = next((here.shell.home / "state/kirosync").glob("sync-*.json"))
    memory.write_text(json.dumps({**json.loads(memory.read_text()), "cursor": "from before"}))
    here.sync("--delete", ".")
    assert here.read() == {"a.md": "a"}


def test_what_others_did_with_a_document_this_moment_is_left_as_it_is(server, here):
    here.write("a.md", "a")
    here.write("b.md", "b")
    here.sync()
    server.ask("DELETE", "/document/a.md")
    server.ask("POST", "/sync", json={"documents": {"b.md": {"content": "changed", "timestamp": 4e12}}})
    memory = next((here.shell.home / "state/kirosync").glob("sync-*.json"))
    cursor = server.ask("GET", "/sync?only=documents").json()["cursor"]  # as if that had been asked for before
    memory.write_text(json.dumps({**json.loads(memory.read_text()), "cursor": cursor}))
    here.write("a.md", "changed")
    (here.path / "b.md").unlink()
    here.write("c.md", "c")
    said = here.sync("--delete", ".", code=1).stderr.decode().splitlines()
    gone, changed = "left: a.md: Document not found", "left: b.md: was changed in the service just now"
    assert sorted(said) == [f"client.py: {gone}", f"client.py: {changed}"]
    assert server.ask("GET", "/sync?only=documents").json()["documents"].keys() == {"b.md", "c.md"}


def test_a_file_that_changes_while_it_is_taken_in_stays_as_it_is(tmp_path):
    folder = client.Folder(tmp_path)
    (tmp_path / "a.md").write_text("looked at")
    known = folder.read("a.md")[1]
    (tmp_path / "a.md").write_text("written since")
    for act in (lambda: folder.write("a.md", b"theirs", 1, known), lambda: folder.remove("a.md", known)):
        with pytest.raises(ValueError, match="was changed just now"):
            act()
    with pytest.raises(ValueError, match="was changed just now"):
        folder.write("a.md", b"theirs", 1, None)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.md", "written since")]
    os.close(folder.fd)


def test_a_folder_that_goes_while_it_is_looked_at_is_gone_and_one_that_is_shut_is_not(tmp_path, monkeypatch):
    folder, scandir = client.Folder(tmp_path), os.scandir
    (tmp_path / "a").mkdir()
    (tmp_path / "b.md").write_text("b")

    def late(top):
        if top == tmp_path / "a":
            top.rmdir()
        return scandir(top)

    def shut(top):
        raise PermissionError(top)

    monkeypatch.setattr(os, "scandir", late)
    assert [path for path, _ in folder.find("")] == ["b.md"]
    monkeypatch.setattr(os, "scandir", shut)
    with pytest.raises(PermissionError):
        next(folder.find(""))
    os.close(folder.fd)


def test_other_fields_of_a_document_are_kept(server, here):
    document = {"content": "x", "timestamp": 1, "metadata": {"by": "ide"}, "language": "mine"}
    server.ask("POST", "/sync", json={"documents": {"a.md": document}})
    here.sync()
    here.write("a.md", "y")
    here.sync()
    known = server.ask("GET", "/document/a.md").json()
    assert known.items() >= {"content": "y", "metadata": {"by": "ide"}, "language": "mine"}.items()


HOSTILE = ["../out", "/abs", "a/../../out", "a//b", "./x", "..", "link/out", "sub/link/out", "file", "a\u202eb", "x/"]
HOSTILE += ["-rf", "a/--checkpoint-action=x"]
HIDDEN = [".bashrc", ".git/config", "a/.ssh/authorized_keys", ".GIT/config", "node_modules/x.js"]


def test_no_document_leaves_the_folder_or_comes_where_it_is_not_looked_for(server, here, tmp_path):
    (tmp_path / "outside").mkdir()
    (here.path / "sub").mkdir()
    (here.path / "link").symlink_to(tmp_path / "outside")
    (here.path / "sub/link").symlink_to("../../outside")
    (here.path / "file").symlink_to(tmp_path / "outside/file")
    (tmp_path / "outside/file").write_text("mine")
    paths = {f"{'0' * 40}-x": {"path": "../out"}, "named": {"path": "../out"}}
    documents = {each: {"content": "evil", "timestamp": 1} for each in [*HOSTILE, *HIDDEN, "good"]}
    documents |= {each: {"content": "evil", "timestamp": 1, **more} for each, more in paths.items()}
    pushed = server.ask("POST", "/sync", json={"documents": documents})
    assert pushed.status_code == 200, pushed.text
    before = {
        path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_relative_to(tmp_path / "outside")
    }
    (here.path / "mine").mkdir()
    assert here.shell("sync", "mine", cwd=here.path).said == ""  # nothing of what is elsewhere
    ran = here.shell("sync", ".", cwd=here.path)
    assert {path: path.lstat().st_mtime_ns for path in before} == before
    assert [*(tmp_path / "outside").iterdir()] == [tmp_path / "outside/file"]
    assert (tmp_path / "outside/file").read_text() == "mine"
    assert not (tmp_path / "out").exists()
    assert not Path("/abs").exists()
    files = {
        str(path.relative_to(here.path)) for path in here.path.rglob("*") if path.is_file() and not path.is_symlink()
    }
    assert files == {"good", "named", f"{'0' * 40}-x"}
    assert all(f"left: {client.plain(each)}: " in ran.said or repr(each) in ran.said for each in HOSTILE), ran.said
    assert server.ask("GET", "/sync?only=documents").json()["documents"].keys() == documents.keys()


def test_what_is_no_text_or_too_large_or_hidden_is_left(server, here):
    here.write("good.md", "good")
    here.write(".env", "SECRET=1")
    here.write(".git/config", "x")
    here.write(".kiro/specs/a.md", "spec")
    (here.path / "picture.png").write_bytes(b"\x89PNG\xff")
    (here.path / "large.txt").write_bytes(b"x" * (client.FILE_BYTES + 1))
    (here.path / "passwd").symlink_to(PASSWD)
    os.mkfifo(here.path / "pipe")
    ran = here.sync()
    assert ran.stdout.split() == [b"pushed", b"good.md"]
    for name, why in {"picture.png": "is no text", "large.txt": "up to", "passwd": "link", "pipe": "no file"}.items():
        assert re.search(rf"left: {name}: .*{why}", ran.stderr.decode())
    assert here.sync(".kiro").stdout.split() == [b"pushed", b".kiro/specs/a.md"]
    assert here.sync("..", code=2).stderr


def test_a_prefix_and_long_names_are_as_the_editor_has_them(server, here, there):
    long = "/".join(["ordner"] * 30) + "/ä.md"
    here.write(long, "long")
    here.write("a.md", "a")
    here.sync("--prefix", "app/", ".")
    documents = server.ask("GET", "/sync?only=documents").json()["documents"]
    assert {each["path"] for each in documents.values()} == {f"app/{long}", "app/a.md"}
    assert all(len(identity) <= client.ID_CHARACTERS for identity in documents)
    there.sync("--prefix", "app/", ".")
    assert there.read() == {long: "long", "a.md": "a"}


def test_what_one_refuses_keeps_no_other_from_being_sent(server, here):
    for number in range(9):
        here.write(f"{number}.md", "x")
    here.write("5.md", "\u0000" * 10)
    with contextlib.suppress(OSError):
        here.write("b\u0085d.md", "x")
    ran = here.shell("sync", ".", cwd=here.path)
    assert ran.text.count("pushed") >= 9
    assert "left: b" in ran.said


def test_watch_keeps_both_in_step(server, here, there):
    watching = [side.shell.start("sync", ".", "--watch", cwd=side.path) for side in (here, there)]
    try:
        here.write("a.md", "one")
        until(lambda: there.read() == {"a.md": "one"}, 20, 0.1)
        there.write("a.md", "one and two")
        until(lambda: here.read() == {"a.md": "one and two"}, 20, 0.1)
        server.ask("POST", "/sync", json={"documents": {"b.md": {"content": "b", "timestamp": 1}}})
        until(lambda: here.read() == there.read() == {"a.md": "one and two", "b.md": "b"}, 20, 0.1)
        ran = here.shell("sync", ".", cwd=here.path)
        assert (ran.returncode, "another process" in ran.said) == (1, True)
    finally:
        for process in watching:
            os.killpg(process.pid, signal.SIGINT)
    for process in watching:
        process.communicate(timeout=10)
        assert process.returncode == 130


# Settings


def test_the_settings_are_a_file_for_oneself_alone(server, shell):
    bare = {key: value for key, value in shell.env.items() if not key.startswith("KIROSYNC_")}
    shell.env = bare
    path = shell.home / "config/kirosync/config.toml"
    path.parent.mkdir(parents=True)
    path.write_text(f'url = "{server.url}"\ntoken = "{TOKEN}"\n')
    path.chmod(0o644)
    ran = shell("ls")
    assert (ran.returncode, TOKEN in ran.said) == (2, False)
    assert f"chmod 600 {path}" in ran.said
    path.chmod(0o600)
    assert shell("ls").returncode == 0
    ran = shell("ls", "--url", "http://127.0.0.1:1")  # whose token it is not
    assert (ran.returncode, "no token for http://127.0.0.1:1" in ran.said) == (2, True)
    path.write_text(f'token = "{TOKEN}"\n')  # without a url it is for the usual one
    ran = shell("ls", KIROSYNC_URL=server.url)
    assert (ran.returncode, f"is for {client.DEFAULT_URL} alone" in ran.said) == (2, True)
    (path.parent / "mine").write_text(f"{TOKEN}\n")
    path.write_text(f'url = "{server.url}/"\ntoken-file = "mine"\n')
    for mode, code in ((0o644, 2), (0o640, 0), (0o600, 0)):
        (path.parent / "mine").chmod(mode)
        for ran in (shell("ls"), shell("--token-file", path.parent / "mine", "ls", "--url", server.url)):
            assert (ran.returncode, f"chmod 600 {path.parent}/mine" in ran.said) == (code, code == 2), ran.said
    assert shell("--token-file", "/dev/stdin", "ls", stdin=TOKEN).returncode == 0
    for text, said in (("colour = 1", "possible are url, token, token-file"), ("url = x", "line 1")):
        path.write_text(text)
        ran = shell("ls")
        assert (ran.returncode, said in ran.said) == (2, True), ran.said


def test_after_install_sh_run_nothing_needs_to_be_set(shell, tmp_path):
    (tmp_path / "copied/state").mkdir(parents=True)
    shutil.copy(ROOT / "client.py", tmp_path / "copied")
    (tmp_path / "copied/state/token").write_text("secret-of-state\n")
    (tmp_path / "copied/state/token").chmod(0o600)
    bare = {key: value for key, value in shell.env.items() if not key.startswith("KIROSYNC_")}
    for more, found in (([], True), (["--url", "http://127.0.0.1:1"], False)):
        command = [sys.executable, str(tmp_path / "copied/client.py"), "doctor", *more]
        ran = subprocess.run(command, env=bare, capture_output=True, text=True, check=False)
        assert (f"that of {tmp_path}/copied/state/token" in ran.stdout) == found
        assert "secret-of-state" not in ran.stdout + ran.stderr


@pytest.mark.parametrize("token", ["not-the-one", "with\nnewline", "ümlaut"])
def test_a_token_that_is_none_is_said_so_and_never_shown(shell, token):
    for words in (["ls"], ["run", "--", "true"], ["doctor"]):
        ran = shell(*words, KIROSYNC_TOKEN=token)
        assert ran.returncode == (1 if words == ["doctor"] else 77 if token == "not-the-one" else 2)
        assert token.split("\n")[0] not in ran.text + ran.said
        assert "Traceback" not in ran.said


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://nowhere.invalid", "https://127.0.0.1:1"])
def test_who_cannot_be_reached_is_said_at_once(shell, url):
    for words in (["ls"], ["run", "--", "true"], ["ask", "?"], ["status"], ["chat", "-f", "c"]):
        ran = shell("--url", url, *words, timeout=20)
        assert (ran.returncode, ran.text) == (69, "")
        assert ran.said.startswith(f"client.py: {url}: ")
        assert len(ran.said.splitlines()) == 1
    assert shell("ls", "--url", "ftp://x").returncode == 2


class Other(http.server.BaseHTTPRequestHandler):
    """A service that is no kirosync: whatever it is asked, it answers what its server was given."""

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        status, said = self.server.answer
        body = said.replace("TOKEN", self.headers["Authorization"]).encode()
        self.send_response(status)
        self.send_header("Location", "/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


@pytest.fixture
def other(shell):
    """Where somebody types, and the server that they take for a kirosync; its answer is to be set."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    shell.env["KIROSYNC_URL"] = f"http://127.0.0.1:{server.server_port}"
    yield shell, server
    server.shutdown()
    server.server_close()


ODD = [
    *(["submit", "read_file", "path=x"], ["ls"], ["ls", "documents"], ["cat", "x"], ["chat", "x"], ["status"]),
    *(["answer"], ["wait", "x"], ["cancel", "x"], ["ask", "?"], ["run", "--", "true"]),
]


@pytest.mark.parametrize("words", ODD, ids=" ".join)
def test_what_answers_and_is_no_kirosync_is_said_so(other, words):
    shell, server = other
    shapes = ("[]", '{"commands": 5, "documents": {"a": 1}, "commandId": 1, "messages": [1]}')
    for server.answer in ((200, each) for each in shapes):
        ran = shell(*words)
        assert (ran.returncode, ran.text) == (1, ""), ran.said
        assert ran.said == f"client.py: {shell.env['KIROSYNC_URL']} is no kirosync, or another version of it\n"
    assert "Traceback" in shell(*words, KIROSYNC_DEBUG="1").said


def test_what_stands_between_is_said(other):
    shell, server = other
    server.answer = 200, json.dumps({"commandId": EVIL})
    assert shell("submit", "read_file", "path=x").text == f"{client.plain(EVIL)}\n"
    server.answer = 302, ""
    ran = shell("ls")
    assert (ran.returncode, "answered 302; is there something between us?" in ran.said) == (69, True)


@pytest.mark.parametrize(("status", "code"), [(400, 1), (403, 77), (404, 1), (418, 1)])
def test_an_error_that_echoes_the_request_does_not_show_the_token(other, status, code):
    shell, server = other
    for said in ('{"error": "I got TOKEN"}', "I got TOKEN", f"{'x' * 180}TOKEN"):
        server.answer = status, said
        for words in (["ls"], ["logs", "x"], ["chat", "x", "--say", "y"], ["doctor"]):
            ran = shell(*words)
            assert ran.returncode == (1 if words == ["doctor"] else code), ran.said
            assert TOKEN[:6] not in ran.text + ran.said
            assert "Bearer ***" in ran.text + ran.said


def token_of(state, scope):
    command = [sys.executable, "kirosync.py", "token", "add", scope, "--scope", scope, "--state", str(state)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def test_a_scope_that_is_not_enough_is_said(server, shell, state):
    for scope in ("read", "agent"):
        token = token_of(state, scope)
        for words in (["run", "--", "true"], ["chat", "c", "--say", "x"]):
            ran = shell(*words, KIROSYNC_TOKEN=token)
            assert (ran.returncode, f"scope {scope} may not" in ran.said) == (77, True)


def test_doctor_says_what_is_wrong_and_what_to_do(agent, shell, state):
    ran = shell("doctor")
    assert ran.returncode == 0
    assert [line.split()[0] for line in ran.text.splitlines()] == ["ok"] * 7
    assert "the token 'master' is good, of the scope admin" in ran.text
    assert "there to execute commands: box (agent)" in ran.text
    findings = shell.lines("doctor", KIROSYNC_TOKEN=token_of(state, "read"))
    assert [each["level"] for each in findings].count("warn") == 1
    for words, more, said in (
        (["--url", "http://127.0.0.1:1"], {}, "Connection refused; start it"),
        (["--url", "http://nowhere.invalid"], {}, "is the name right"),
        ([], {"KIROSYNC_TOKEN": "none"}, "the token is not accepted; is it that service's?"),
        ([], {"KIROSYNC_TOKEN": ""}, "no token for"),
    ):
        ran = shell("doctor", *words, **more)
        assert (ran.returncode, said in ran.text) == (1, True), ran.text


def test_status_tells_what_waits(agent, shell):
    agent.ask("POST", "/command", json={"type": "user_input", "prompt": "Really?", "inputType": "confirmation"})
    ran = shell("status")
    assert ran.returncode == 0
    assert re.search(r"^agent +box \(agent\) is here$", ran.text, re.MULTILINE)
    assert re.search(r"^queue +1 wait, 0 are being executed$", ran.text, re.MULTILINE)
    assert re.search(r"^asked +cmd-\S+ Really\? \(yes, no\)$", ran.text, re.MULTILINE)
    assert shell.lines("status")[0]["pendingInputs"][0]["prompt"] == "Really?"
    agent.ask("POST", "/command", json={"type": "user_input", "prompt": "Who?\ncmd-1-a  Me?", "inputType": "text"})
    listed = shell("answer").text.splitlines()
    assert [line.startswith("cmd-") for line in listed] == [True, True, False]
    assert listed[2] == "    cmd-1-a  Me?"


# Shells


@pytest.mark.parametrize("name", ["bash", "zsh"])
def test_a_real_shell_completes_verbs_options_and_ids_and_runs_none(agent, shell, name, tmp_path):
    if not shutil.which(name):
        pytest.skip(f"there is no {name}")
    identity = shell("submit", "execute_bash", "command=sleep 60").text.strip()
    ids = ("my notes.md", "$(touch pwned)", "`touch pwned`;touch pwned")
    for number, each in enumerate(ids):
        agent.ask("POST", "/sync", json={"documents": {each: {"content": f"content {number}\n", "timestamp": 1}}})
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/client.py").write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
    (tmp_path / "bin/client.py").chmod(0o755)
    plain = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PS1": "> ", "TERM": "dumb", "HISTFILE": ""}
    started = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}[name]
    process, terminal = at_terminal(started, shell.home, **shell.settings, **plain)
    said = bytearray()

    def types(text, expected):
        before = len(said)
        os.write(terminal, text.encode())
        until(lambda: expected in re.sub(r"\x1b\[[?\d;]*\w|\r|\x08", "", heard(terminal, said)[before:]), 20)

    try:
        begin = {"bash": "bind 'set bell-style none'", "zsh": "autoload -U compinit && compinit -D -u"}[name]
        types(f"{begin} && . <(client.py completion {name}) && echo rea''dy\n", "ready")
        types("client.py stat\t", "client.py status")
        os.write(terminal, b"\x15")
        types("client.py ls --li\t", "--limit")
        os.write(terminal, b"\x15")
        types("client.py cancel cmd\t", identity)
        os.write(terminal, b"\x15")
        for number, begun in enumerate(("my", "\\$", "\\`")):
            types(f"client.py cat {begun}\t\n", f"content {number}")
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(terminal)
    assert not (shell.home / "pwned").exists()


def test_completion_knows_the_service_that_is_named_on_the_line(server, shell):
    documents = {each: {"content": "", "timestamp": 1} for each in ("a:b", "--token-file=x")}
    server.ask("POST", "/sync", json={"documents": documents})
    line = f"client.py --url {server.url} cat a:"
    ran = shell("completion", "bash", "--", line, ":", KIROSYNC_URL="http://127.0.0.1:1")
    assert ran.text == "b\n"
    words = shell("completion", "zsh", "--", "client.py", "--url", server.url, "cat", "").text.splitlines()
    assert words == ["a:b"]
    assert shell("completion", "bash", "--", "client.py cat ", "", KIROSYNC_URL="http://127.0.0.1:1").text == ""


# What is said of it


def test_help_and_the_readme_say_every_verb_and_every_exit_code(shell):
    said, readme = shell("--help").text, (ROOT / "README.md").read_text()
    for code in client.EXIT:
        assert re.search(rf"^ +{code}  ", said, re.MULTILINE)
        assert re.search(rf"^\| {code} \|", readme, re.MULTILINE)
    listed = re.findall(r"^\| `(\w+)[^|]*` \|", readme.partition("## From a terminal")[2].partition("\n## ")[0], re.M)
    assert listed == [verb.word for verb in client.VERBS]
    assert {*client.OUTCOMES, "exit"} == {*kirosync.POSSIBLE["outcome"]}
    assert (*kirosync.ORDERS,) == client.TYPES


def test_it_runs_as_a_program_and_as_a_library_without_the_terminal(tmp_path):
    assert os.access(ROOT / "client.py", os.X_OK)
    shutil.copy(ROOT / "client.py", tmp_path)
    code = "import sys, client; client.Copy(client.Service('http://x', 't')); print('termios' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_without_its_package_it_runs_by_the_venv_beside_it_or_says_what_is_missing(tmp_path):
    shutil.copy(ROOT / "client.py", tmp_path)
    bare = [sys.executable, "-S", str(tmp_path / "client.py"), "status", "--quiet"]  # -S: there are no packages
    ran = subprocess.run(bare, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr.startswith("client.py: urllib3 is missing: ")) == (1, True)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    ran = subprocess.run(bare, capture_output=True, text=True, check=True)
    assert ran.stdout == f"{tmp_path}/client.py status --quiet\n"


def test_many_files_are_counted_on_a_terminal(server, here):
    for number in range(client.PUSH_FILES + 1):
        here.write(f"{number}.md", "x")
    process, terminal = at_terminal([*PROGRAM, "sync", "."], here.path, **here.shell.settings)
    said = bytearray()
    until(lambda: process.poll() is not None and heard(terminal, said) is not None, 60)
    assert f"pushed {client.PUSH_FILES} of {client.PUSH_FILES + 1} files" in heard(terminal, said)
    assert f"{client.PUSH_FILES + 1} pushed" in said.decode()
    os.close(terminal)


def test_the_hook_of_the_readme_asks_before_it_lets_through(shell, tmp_path):
    section = (ROOT / "README.md").read_text().partition("**A hook asks the phone**")[2]
    lines = [line.removeprefix("    ") for line in re.search(r"(?:^    .*\n)+", section, re.MULTILINE)[0].splitlines()]
    (tmp_path / "client.py").write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
    (tmp_path / "client.py").chmod(0o755)
    env = {**shell.env, "PATH": f"{tmp_path}:{os.environ['PATH']}", "GIT_CONFIG_NOSYSTEM": "1"}

    def git(*words):
        return subprocess.Popen(["git", *words], cwd=shell.home, env=env, stderr=subprocess.DEVNULL)

    for words in (
        ["init", "-q", "-b", "main"],
        ["init", "-q", "--bare", tmp_path / "remote"],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "-q", "--allow-empty", "-m", "the subject"],
    ):
        assert git(*words).wait(20) == 0
    hook = shell.home / ".git/hooks/pre-push"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("\n".join([*lines, ""]))
    hook.chmod(0o755)
    for said, code in (("no", 1), ("yes", 0)):
        pushing = git("push", "-q", tmp_path / "remote", "main")
        identity = queued(shell, type="user_input", status="pending")
        assert shell("answer").text == f"{identity}  Push to main: the subject? (yes, no)\n"
        shell("answer", identity, said)
        assert (pushing.wait(20) != 0) == code
