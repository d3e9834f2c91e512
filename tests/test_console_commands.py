"""The page where commands are run: the queue, what they print, what waits for a human, who is there; in a browser."""

import itertools
import json
import re
import time
from pathlib import Path

import pytest
from conftest import ON_A_PHONE, ONCE, Process, until
from playwright.sync_api import expect

import kirosync

expect.set_options(timeout=15_000)  # ms; a machine may do much else
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script> \u202egnp.exe"


@pytest.fixture
def worker(server, state, tmp_path, start):
    """A real agent; the value starts more of them, by name and with a policy."""

    def begin(name="box", policy=""):
        (tmp_path / f"{name}.toml").write_text(policy)
        argv = ["agent.py", "--state", state, "--name", name, "--policy", tmp_path / f"{name}.toml"]
        process = start(Process, *argv, log=tmp_path / f"{name}.log")
        until(lambda: "INFO agent" in (tmp_path / f"{name}.log").read_text(), 20)
        return process

    begin()
    return begin


def order(server, **said):
    answer = server.ask("POST", "/command", json={"type": "execute_bash", **said})
    assert answer.status_code == 200, answer.text
    return answer.json()["commandId"]


def look(page, kind, identity=None):
    """Go to a view, as by its link, or to one record of it; return what is shown of that."""
    page.evaluate("hash => (location.hash = hash)", f"#/{kind}" + (f"/{identity}" if identity else ""))
    return page.locator("#record")


def known(server, identity):
    return server.ask("GET", f"/command/{identity}").json()


def has_ended(server, identity):
    return until(lambda: (record := known(server, identity))["status"] in ("completed", "failed") and record, 20)


def printed(page, name="stdout"):
    return page.get_by_role("log", name=name)


def bash(server, page, command, **more):
    """Run a command, look at it, and return the element that shows what it prints."""
    look(page, "commands", order(server, command=command, **more))
    return printed(page)


# The queue


def test_the_queue_is_shown_as_it_changes_what_runs_first(page, server, worker):
    page.get_by_role("link", name="Commands", exact=True).click()
    expect(page.get_by_text("No command was queued yet.")).to_be_visible()
    running = order(server, command="sleep 60 # runs")
    expect(page.get_by_role("link", name="sleep 60 # runs running execute_bash, box")).to_be_visible()
    order(server, command="true # well")
    order(server, command="exit 3 # badly")
    rows = page.get_by_role("region", name="Commands").get_by_role("listitem")
    expect(rows).to_contain_text(
        ["sleep 60 # runs", "exit 3 # badlyexit 3 execute_bash", "true # welldone execute_bash"]
    )
    server.ask("POST", f"/command/{running}/cancel")
    expect(rows).to_contain_text(["exit 3 # badly", "true # well", "sleep 60 # runscancelled"])


@ONCE
def test_commands_are_filtered_by_status_type_outcome_and_words(page, server, worker):
    for each in ({"command": "true # one"}, {"command": "exit 3 # two"}, {"type": "read_file", "path": "/etc/three"}):
        has_ended(server, order(server, **each))
    look(page, "commands")
    rows = page.get_by_role("region", name="Commands").get_by_role("listitem")
    for field, value, shown in [
        ("status", "failed", ["read /etc/three", "exit 3 # two"]),
        ("outcome", "exit", ["exit 3 # two"]),
        ("type", "read_file", ["read /etc/three"]),
    ]:
        page.get_by_label(f"Filter by {field}").select_option(value)
        expect(rows).to_have_count(len(shown))
        expect(rows).to_contain_text(shown)
        page.get_by_label(f"Filter by {field}").select_option("")
    page.get_by_label("Search commands").fill("TWO exit")
    expect(rows).to_contain_text(["exit 3 # two"])
    expect(rows).to_have_count(1)
    page.get_by_label("Filter by outcome").select_option("lost")
    expect(page.get_by_text("Nothing says that.")).to_be_visible()


@ONCE
def test_a_row_that_changes_keeps_the_focus(page, server, worker):
    look(page, "commands")
    identity = order(server, command="sleep 60")
    page.get_by_role("link", name="sleep 60 running").focus()
    server.ask("POST", f"/command/{identity}/cancel")
    expect(page.get_by_role("link", name="sleep 60 cancelled")).to_be_focused()


# How it ended


ENDS = {
    "exit": ({"command": "sleep 1; exit 3"}, "ended with exit code 3 after 1"),
    "ok": ({"command": "true"}, "ended well after"),
    "timeout": ({"command": "sleep 60", "timeout": 0.3}, "took longer than it may, and was ended after"),
    "error": ({"command": "true", "workingDir": "/no/such"}, "failed after"),
    "refused": (
        {"command": "mkfs", "target": "strict"},
        "refused by the agent's policy: the agent strict refuses it: never here",
    ),
    "expired": ({"command": "true", "target": "nobody", "expiresIn": 0.5}, "nobody took it within 500 ms"),
}


@ONCE
def test_how_it_ended_is_said_in_words(page, server, worker):
    worker("strict", '[[refuse]]\ncommand = "mkfs"\nreason = "never here"\n')
    for outcome, (said, words) in ENDS.items():
        identity = order(server, **said)
        record = look(page, "commands", identity)
        expect(record).to_contain_text(words, timeout=20_000)
        assert known(server, identity)["outcome"] == outcome
    identity = order(server, command="true", target="silent")
    server.ask("PATCH", f"/command/{identity}", json={"status": "processing", "agent": "silent", "lease": 0.5})
    record = look(page, "commands", identity)
    expect(record).to_contain_text("its agent fell silent: whether it was done is unknown", timeout=20_000)
    expect(record).to_contain_text("silent stopped reporting")


@ONCE
def test_what_was_ordered_is_shown_but_no_value_of_the_environment(page, server, worker):
    said = {"command": "echo 1\necho 2", "workingDir": "/tmp", "env": {"KEY": "sesame"}, "timeout": 90}
    record = look(page, "commands", order(server, **said))
    expect(record.get_by_label("What it is about")).to_have_text("echo 1\necho 2")
    for words in ("/tmp", "KEY", "1 min 30 s to run"):
        expect(record.get_by_role("definition").filter(has_text=words)).to_be_visible()
    record.get_by_text("All that is known of it").click()
    expect(record).to_contain_text('"workingDir": "/tmp"')
    expect(record).not_to_contain_text("sesame")


@ONCE
def test_it_is_said_where_no_agent_is_there_that_takes_it(page, server, worker):
    record = look(page, "commands", order(server, command="true", target="laptop"))
    expect(record).to_contain_text("waits for the agent laptop")
    expect(record).to_contain_text("No agent is there that takes it.")
    worker("laptop")
    expect(record).to_contain_text("ended well")
    expect(record.get_by_text("No agent is there that takes it.")).to_be_hidden()


# What it prints


def test_output_streams_as_it_is_printed_stderr_apart(page, server, worker, tmp_path):
    gate = tmp_path / "gate"
    shown = bash(server, page, f"echo one; echo oops >&2; while [ ! -e {gate} ]; do sleep 0.05; done; echo two")
    expect(shown).to_have_text("one\n")
    expect(printed(page, "stderr")).to_have_text("oops\n")
    expect(page.get_by_role("heading", name="stderr")).to_be_visible()
    expect(page.locator("#record")).to_contain_text("box is running it")
    gate.touch()
    expect(shown).to_have_text("one\ntwo\n")
    expect(page.locator("#record")).to_contain_text("ended well")


@ONCE
def test_no_question_for_output_is_left_when_the_record_is(page, server, worker):
    asked = []
    page.on("request", lambda request: "/output?" in request.url and asked.append(request.url))
    shown = bash(server, page, "echo one; sleep 60")
    expect(shown).to_have_text("one\n")
    with page.expect_event("requestfailed", lambda request: "/output?" in request.url):
        look(page, "commands")
    before = len(asked)
    time.sleep(1)
    assert len(asked) == before


@ONCE
def test_colours_are_shown_and_no_escape_is(page, server, worker):
    link = r"\e]8;;http://evil\e\\link\e]8;;\e\\ \e]0;title\a\e[?25l\eP1;2q#sixel\e\\\e(B\e[5;5H."
    shown = bash(server, page, rf"printf '\e[31mred\e[0m \e[1;32mboth\e[m \e[3;4mline\e[23;24mplain {link}\n'")
    expect(shown).to_have_text("red both lineplain link .\n")
    style = "(node, name) => getComputedStyle(node)[name]"
    red, both, line = (shown.get_by_text(text, exact=True) for text in ("red", "both", "line"))
    assert red.evaluate(style, "color") != shown.evaluate(style, "color")
    assert both.evaluate(style, "fontWeight") == "700"
    assert "underline" in line.evaluate(style, "textDecoration")
    assert line.evaluate(style, "fontStyle") == "italic"


@ONCE
def test_progress_that_overwrites_itself_looks_right(page, server, worker):
    bar = r"for n in 1 2 3; do printf '\r[%s] %d%%' $n ${n}0; sleep 0.1; done; echo"
    erase = r"printf 'a long line\r\e[Kshort\nabc\b\bX\n12345\e[3D\e[K\nabc\e[1GX\e[2Cd\n\e[31mone\rtwo\e[0m\n'"
    shown = bash(server, page, f"{bar}; {erase}")
    expect(shown).to_have_text("[3] 30%\nshort\naXc\n12\nXbcd\ntwo\n")


@ONCE
def test_what_is_cut_anywhere_between_two_pieces_is_put_together(page, server, worker):
    pieces = [r"\xe2", r"\x82\xac ", r"\x1b", r"[", r"31", r"mred\x1b]0;ti", r"tle\x1b", r"\\ end\n"]
    shown = bash(server, page, "; sleep 0.3; ".join(f"printf '{piece}'" for piece in pieces))
    expect(shown).to_have_text("€ red end\n", timeout=15_000)
    expect(shown.get_by_text("red end", exact=True)).to_have_class("ink1")


@ONCE
def test_an_escape_without_an_end_hides_nothing_that_comes_later(page, server, worker):
    shown = bash(server, page, r"printf '\e]0;never ended\nnext\n\e[999999999C|\n\e[38;5;999;48;2;1mx\e[38m\e[0my\n'")
    expect(shown).to_contain_text("next\n")
    expect(shown).to_contain_text("xy\n")
    assert len(shown.text_content()) < 10_000


READABLE = """
pre => {
  const rgb = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const bright = colour => {
    const linear = part => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = colour.slice(0, 3).map(part => linear(part / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = node => {
    const own = rgb(getComputedStyle(node).backgroundColor);
    return own.length === 3 || own[3] > 0 ? own : ground(node.parentElement);
  };
  return [...pre.querySelectorAll("span")].map(span => {
    const [low, high] = [bright(rgb(getComputedStyle(span).color)), bright(ground(span))].sort((a, b) => a - b);
    return [span.textContent, (high + 0.05) / (low + 0.05)];
  });
}
"""


@ONCE
def test_each_colour_can_be_read_in_both_schemes(page, server, worker):
    inks = r"for i in $(seq 0 255); do printf '\e[38;5;%dmi%d\e[0m \e[48;5;%dmp%d\e[0m ' $i $i $i $i; done"
    pairs = r"for i in $(seq 0 7); do printf '\e[3%d;4%dmx\e[0m \e[9%d;44my\e[0m \e[7;3%dmz\e[0m ' $i $i $i $i; done"
    true = r"printf '\e[38;2;255;250;200mt1\e[0m \e[38:2::10:10:60mt2\e[0m \e[7minverse\e[0m'"
    shown = bash(server, page, f"{inks}; {pairs}; {true}")
    expect(shown).to_contain_text("inverse")
    contrasts = shown.evaluate(READABLE)
    assert len(contrasts) > 512
    assert not [each for each in contrasts if each[1] < 4.45]  # rounded to whole parts of 255


@ONCE
def test_hostile_output_is_text(page, server, worker):
    shown = bash(server, page, f"printf '%s\\n' {json.dumps(HOSTILE, ensure_ascii=False)}", metadata={"x": HOSTILE})
    expect(shown).to_have_text("<img src=x onerror=alert(1)><script>alert(2)</script> \u27e8U+202E\u27e9gnp.exe\n")
    assert page.locator("#record :is(img, script)").count() == 0


@ONCE
def test_of_a_long_output_the_end_is_shown_and_all_can_be_saved(page, server, worker, tmp_path):
    shown = bash(server, page, "seq 200000")
    expect(shown).to_contain_text("200000\n", timeout=20_000)
    assert shown.text_content().startswith("195001\n")
    stdout = page.get_by_role("region", name="Printed to stdout")
    expect(stdout.get_by_text("Only the end is shown: the last 512 KiB, or 5000 lines.")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save all").click()
    assert Path(download.value.path()).read_text() == "".join(f"{n}\n" for n in range(1, 200_001))


def told(server, **result):
    """Bring in a command that has ended elsewhere, with this result."""
    now = int(time.time() * 1000)
    command = {"type": "execute_bash", "command": "true", "createdAt": now, "updatedAt": now, "endedAt": now}
    command |= {"status": "completed", "outcome": "ok", "result": result}
    answer = server.ask("POST", "/sync", json={"commands": {"told": command}})
    assert answer.status_code == 200, answer.text
    return "told"


@ONCE
def test_of_more_than_is_kept_it_is_said_and_the_end_is_shown(page, server):
    record = look(page, "commands", told(server, stdout="first\n...\nlast\n", size={"stdout": 70 << 20}))
    stdout = page.get_by_role("region", name="Printed to stdout")
    expect(stdout.get_by_text("It printed more than is kept")).to_be_visible()
    record.get_by_text("More was printed to stdout than is kept: its end").click()
    expect(record.get_by_role("group", name="The end of stdout")).to_have_text("first\n...\nlast\n")


@ONCE
def test_output_that_is_refused_is_said_and_not_asked_for_again(page, server):
    asked = []
    page.route("**/output?*", lambda route: (asked.append(route), route.fulfill(status=403, body="<p>no</p>")))
    look(page, "commands", told(server, stdout="x"))
    said = page.get_by_role("alert").filter(has_text="No more of it can be shown")
    expect(said).to_have_count(2)
    page.wait_for_timeout(500)
    assert len(asked) == 2


@ONCE
def test_a_line_without_end_is_shown_in_its_latest_part(page, server, worker):
    shown = bash(server, page, "head -c 700000 /dev/zero | tr '\\0' x; echo; echo after")
    expect(shown).to_contain_text("after\n", timeout=20_000)
    text = shown.text_content()
    assert 400_000 < len(text) <= 512 * 1024 + 16
    assert set(text) == set("xafter\n")


@ONCE
def test_the_end_is_followed_unless_someone_has_scrolled_up(page, server, worker, tmp_path):
    gate = tmp_path / "gate"
    shown = bash(server, page, f"seq 500; while [ ! -e {gate} ]; do sleep 0.05; done; seq 501 900; sleep 60")
    at_end = "node => node.scrollHeight - node.scrollTop - node.clientHeight < 5"
    expect(shown).to_contain_text("\n500\n")
    assert shown.evaluate(at_end)
    shown.evaluate("node => (node.scrollTop = 0)")
    gate.touch()
    expect(shown).to_contain_text("\n900\n")
    assert shown.evaluate("node => node.scrollTop") == 0


# Results of other types


def test_results_are_shown_as_what_they_are(page, server, worker, tmp_path):
    (tmp_path / "work").mkdir()
    file = tmp_path / "work" / "a<b>.py"
    written = order(server, type="write_file", path=str(file), content="x = 1\nneedle = 2\n")
    expect(look(page, "commands", written)).to_contain_text("17 bytes, a new file")
    record = look(page, "commands", order(server, type="list_directory", path=str(file.parent)))
    expect(record.get_by_role("row", name="a<b>.py file 17")).to_be_visible()
    expect(record.get_by_role("columnheader", name="modified")).to_be_visible()
    record = look(page, "commands", order(server, type="code_search", query="needle", path=str(file.parent)))
    expect(record.get_by_role("listitem").filter(has_text="a<b>.py:2")).to_contain_text("needle = 2")
    file.write_text("x = 1\nneedle = 2 # \u202e\n")
    record = look(page, "commands", order(server, type="read_file", path=str(file)))
    expect(record.get_by_role("group", name="Content").locator(".c1")).to_have_text("# \u27e8U+202E\u27e9")
    expect(record.get_by_role("group", name="Content")).to_contain_text("x = 1\nneedle = 2")
    binary = order(server, type="execute_bash", command=f"printf '\\xff\\x00' > '{file}.bin'")
    has_ended(server, binary)
    record = look(page, "commands", order(server, type="read_file", path=f"{file}.bin"))
    with page.expect_download() as download:
        record.get_by_role("button", name="Save it").click()
    assert Path(download.value.path()).read_bytes() == b"\xff\x00"


@ONCE
def test_a_result_of_an_unknown_shape_is_shown_as_json(page, server):
    for kind, result in itertools.product(
        ("list_directory", "code_search", "kiro_command"), ({"entries": 5, "matches": {}}, [1], "text")
    ):
        said = {"path": "/", "query": "x", "command": "y"}
        identity = order(server, type=kind, **{key: said[key] for key in kirosync.ORDERS[kind][0]})
        server.ask("PATCH", f"/command/{identity}", json={"status": "processing"})
        server.ask("PATCH", f"/command/{identity}", json={"status": "completed", "result": result})
        expect(look(page, "commands", identity).get_by_role("heading", name="Result")).to_be_visible()


# What can be done about one


@ONCE
def test_a_command_is_cancelled_and_says_how_it_is_being_ended(page, server, worker):
    record = look(page, "commands", order(server, command="trap '' INT; echo up; while :; do sleep 0.1; done"))
    expect(printed(page)).to_have_text("up\n")
    record.get_by_role("button", name="Cancel").click()
    expect(record).to_contain_text("ending it: INT, TERM, KILL follow each other")
    expect(record.get_by_role("button", name="Cancel")).to_be_hidden()
    expect(record).to_contain_text("cancelled after", timeout=20_000)


@ONCE
def test_a_command_is_run_again_as_it_was_ordered(page, server, worker):
    first = order(server, command="echo $GREETING", env={"GREETING": "hi"}, metadata={"why": "test"}, extra="kept")
    has_ended(server, first)
    record = look(page, "commands", first)
    record.get_by_role("button", name="Run again").click()
    page.wait_for_url(lambda url: "/commands/" in url and first not in url)
    expect(printed(page)).to_have_text("hi\n")
    second = known(server, page.url.split("/commands/")[1])
    kept = ("type", "command", "env", "metadata", "extra")
    assert {key: second[key] for key in kept} == {key: known(server, first)[key] for key in kept}


@ONCE
def test_a_command_is_deleted_after_a_question(page, server, worker):
    identity = order(server, command="echo gone")
    has_ended(server, identity)
    record = look(page, "commands", identity)
    record.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Leave it").click()
    assert known(server, identity)["status"] == "completed"
    record.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete it").click()
    expect(page.get_by_text("No command was queued yet.")).to_be_visible()
    assert server.ask("GET", f"/command/{identity}").status_code == 404


@ONCE
def test_a_running_command_reads_what_is_sent_to_it(page, server, worker):
    record = look(page, "commands", order(server, command="cat; echo over", stdin=True))
    field = record.get_by_role("textbox", name="Input")
    for text in ("hällo", "again"):
        field.fill(text)
        record.get_by_role("button", name="Send").click()
        expect(printed(page)).to_contain_text(f"{text}\n")
        expect(field).to_have_value("")
    expect(record).to_contain_text("13 bytes sent")
    record.get_by_role("button", name="End of input").click()
    expect(printed(page)).to_have_text("hällo\nagain\nover\n")
    expect(field).to_be_hidden()


@ONCE
def test_input_that_did_not_arrive_stays_and_is_not_sent_twice(page, server, worker):
    record = look(page, "commands", order(server, command="cat", stdin=True))
    record.get_by_role("textbox", name="Input").fill("once")
    page.route("**/input", lambda route: (route.fetch(), route.abort()), times=1)  # it arrives, and the answer does not
    record.get_by_role("button", name="Send").click()
    expect(record.get_by_role("alert").filter(has_text="the service cannot be reached")).to_be_visible()
    expect(record.get_by_role("textbox", name="Input")).to_have_value("once")
    expect(printed(page)).to_have_text("once\n")
    record.get_by_role("button", name="Send").click()
    expect(record.get_by_role("textbox", name="Input")).to_have_value("")
    assert server.ask("GET", f"/command/{page.url.split('/commands/')[1]}/output?stream=stdin").text == "once\n"


@ONCE
def test_a_terminal_can_be_interrupted(page, server, worker):
    record = look(page, "commands", order(server, command="read -r line", stdin=True, pty=True))
    record.get_by_role("button", name="Ctrl+C").click()
    expect(record).to_contain_text("ended with exit code 130")


# A new one


def field(page, name):
    return page.get_by_label(re.compile(rf"^{name}\b"))


def test_a_command_is_ordered_by_its_fields(page, server, worker, tmp_path):
    look(page, "commands")
    page.get_by_role("link", name="New command").click()
    expect(field(page, "workingDir")).to_be_hidden()
    page.get_by_role("textbox", name="command").fill("pwd; read -r x; echo $A")
    page.get_by_text("More", exact=True).click()
    field(page, "workingDir").fill(str(tmp_path))
    field(page, "timeout").fill("12.5")
    field(page, "stdin").check()
    expect(page.locator("datalist#offer-agents option[value=box]")).to_have_count(1)
    field(page, "target").fill("box")
    field(page, "env").fill('{"A": "b"')
    page.get_by_role("button", name="Run it").click()
    expect(page.get_by_role("alert").filter(has_text="env is no JSON")).to_be_visible()
    expect(field(page, "env")).to_be_focused()
    field(page, "env").fill('{"A": "b"}')
    page.get_by_role("button", name="Run it").click()
    expect(printed(page)).to_have_text(f"{tmp_path}\n")
    record = known(server, page.url.split("/commands/")[1])
    said = {
        "command": "pwd; read -r x; echo $A",
        "workingDir": str(tmp_path),
        "timeout": 12.5,
        "stdin": True,
        "env": {"A": "b"},
    }
    assert {key: record[key] for key in said} == said
    assert "pty" not in record


@ONCE
def test_all_types_are_offered_with_what_they_require(page, server):
    look(page, "commands", "new")
    for kind, (required, _, _) in kirosync.ORDERS.items():
        page.get_by_role("combobox", name=re.compile("^type")).select_option(kind)
        for name in required:
            expect(field(page, name)).to_be_visible()
            expect(field(page, name)).to_have_attribute("required", "")
    page.get_by_role("textbox", name="prompt").fill("Which?")
    field(page, "inputType").select_option("choice")
    field(page, "choices").fill("red\nblue")
    page.get_by_role("button", name="Run it").click()
    page.get_by_role("button", name="blue").click()
    expect(page.locator("#record")).to_contain_text("answered after")


@ONCE
def test_an_editors_commands_are_offered(page, server):
    about = {"kind": "ide", "types": ["kiro_command"], "availableCommands": ["workbench.action.files.save"]}
    server.ask("PUT", "/agents/studio", json=about)
    look(page, "commands", "new")
    page.get_by_role("combobox", name=re.compile("^type")).select_option("kiro_command")
    expect(page.locator("datalist#offer-commands option[value='workbench.action.files.save']")).to_have_count(1)
    assert page.get_by_label("command", exact=True).get_attribute("list") == "offer-commands"


@ONCE
def test_a_tap_that_is_repeated_since_no_answer_came_runs_once_and_nothing_typed_is_lost(page, server):
    look(page, "commands", "new")
    page.get_by_role("textbox", name="command").fill("echo once")
    page.route(
        "**/command", lambda route: (route.fetch(), route.abort()), times=1
    )  # it arrives, and the answer does not
    page.get_by_role("button", name="Run it").click()
    expect(page.get_by_role("alert").filter(has_text="the service cannot be reached")).to_be_visible()
    expect(page.get_by_role("textbox", name="command")).to_have_value("echo once")
    page.reload()
    expect(page.get_by_role("textbox", name="command")).to_have_value("echo once")
    page.route("**/command", lambda route: (route.fetch(), route.abort()), times=1)
    page.get_by_role("button", name="Run it").click()
    expect(page.get_by_role("alert").filter(has_text="the service cannot be reached")).to_be_visible()
    page.get_by_role("button", name="Run it").click()
    expect(page.get_by_role("heading", name="echo once")).to_be_visible()
    assert len(server.ask("GET", "/commands").json()["commands"]) == 1


@ONCE
def test_what_the_service_refuses_is_said_at_the_field(page, server):
    look(page, "commands", "new")
    page.get_by_role("combobox", name=re.compile("^type")).select_option("user_input")
    page.get_by_role("textbox", name="prompt").fill("Which?")
    field(page, "inputType").select_option("choice")
    page.get_by_role("button", name="Run it").click()
    expect(page.get_by_role("alert").filter(has_text="Not done: choices: is required")).to_be_visible()
    expect(field(page, "choices")).to_be_focused()
    expect(field(page, "choices")).to_have_attribute("aria-invalid", "true")


@ONCE
def test_what_a_token_may_not_is_said(page, server, worker, state):
    identity = order(server, command="echo hi")
    has_ended(server, identity)
    made = Process("kirosync.py", "token", "add", "watch", "--scope", "read", "--state", state, log=state / "made")
    assert made.end(0) == 0
    page.get_by_role("button", name="Forget the token").click()
    page.get_by_role("textbox", name="Token").fill((state / "made").read_text().split("\n")[0])
    page.get_by_role("button", name="Look").click()
    record = look(page, "commands", identity)
    record.get_by_role("button", name="Run again").click()
    expect(record.get_by_role("alert").filter(has_text="Not done: ")).to_contain_text("scope")


# What waits for a human


def waiting(page):
    return page.get_by_role("region", name="Waiting for you")


def ask(server, prompt, kind="text", **more):
    return order(server, type="user_input", prompt=prompt, inputType=kind, **more)


ANSWERS = {
    "confirmation": ({}, lambda asked: asked.get_by_role("button", name="No", exact=True).click(), "no"),
    "choice": ({"choices": ["red", "blue"]}, lambda asked: asked.get_by_role("button", name="blue").click(), "blue"),
    "text": (
        {},
        lambda asked: (
            asked.get_by_role("textbox", name="Answer").fill("so it is"),
            asked.get_by_role("button", name="Answer", exact=True).click(),
        ),
        "so it is",
    ),
    "file": (
        {},
        lambda asked: (
            asked.get_by_role("textbox", name="Path of a file").fill("/etc/hosts"),
            asked.get_by_role("button", name="Answer", exact=True).click(),
        ),
        "/etc/hosts",
    ),
}


def test_each_kind_of_question_is_answered_where_it_is_asked(page, server):
    for kind, (more, answer, value) in ANSWERS.items():
        identity = ask(server, f"Is it {kind}?", kind, **more)
        asked = page.get_by_role("article", name=f"Question: Is it {kind}?")
        expect(page).to_have_title(re.compile(r"^\(1\) "))
        answer(asked)
        assert has_ended(server, identity)["result"] == {"value": value}
        expect(waiting(page)).to_be_hidden()
    expect(page).to_have_title("kirosync")


@ON_A_PHONE
def test_a_question_is_announced_and_shown_in_each_view(page, server):
    ask(server, "Deploy?", "confirmation")
    expect(page.locator("[aria-live]").filter(has_text="A question waits for you: Deploy?")).to_have_count(1)
    for kind in ("conversations", "commands", "agents"):
        look(page, kind)
        expect(waiting(page).get_by_role("button", name="Yes")).to_be_in_viewport()


@ON_A_PHONE
def test_a_question_can_be_left_unanswered(page, server):
    identity = ask(server, "Deploy?", "confirmation")
    waiting(page).get_by_role("button", name="Refuse to answer").click()
    expect(waiting(page)).to_be_hidden()
    assert known(server, identity)["outcome"] == "cancelled"


@ON_A_PHONE
def test_a_question_that_is_answered_elsewhere_vanishes_and_what_was_typed_elsewhere_stays(page, server):
    first, second = ask(server, "First?"), ask(server, "Second?")
    typed = page.get_by_role("article", name="Question: Second?").get_by_role("textbox", name="Answer")
    typed.fill("half of an ans")
    server.ask("POST", "/api/kiro/input", json={"value": "x", "type": "text", "executionId": first})
    expect(page.get_by_role("article", name="Question: First?")).to_have_count(0)
    expect(typed).to_have_value("half of an ans")
    expect(typed).to_be_focused()
    assert known(server, second)["status"] == "pending"


@ON_A_PHONE
def test_an_answer_that_comes_too_late_is_told_so(page, server):
    identity = ask(server, "Deploy?", "confirmation")
    yes = waiting(page).get_by_role("button", name="Yes")
    expect(yes).to_be_visible()

    def answered_first(route):
        server.ask("POST", "/api/kiro/input", json={"value": "no", "type": "confirmation", "executionId": identity})
        route.continue_()

    page.route("**/api/kiro/input", answered_first, times=1)
    time.sleep(0.6)
    yes.click()
    expect(waiting(page)).to_contain_text("it was answered elsewhere, or is no longer asked")
    assert known(server, identity)["result"] == {"value": "no"}


@ON_A_PHONE
def test_an_answer_that_cannot_be_sent_is_said_and_not_lost(page, server):
    ask(server, "Why?")
    asked = waiting(page)
    asked.get_by_role("textbox", name="Answer").fill("because")
    page.route("**/api/kiro/input", lambda route: route.abort(), times=1)
    time.sleep(0.6)
    asked.get_by_role("button", name="Answer", exact=True).click()
    expect(asked.get_by_role("alert").filter(has_text="the service cannot be reached")).to_be_visible()
    expect(asked.get_by_role("textbox", name="Answer")).to_have_value("because")
    asked.get_by_role("button", name="Answer", exact=True).click()
    expect(waiting(page)).to_be_hidden()


TAP_SOON = """([x, y]) => new MutationObserver((_, observer) => {
  if (document.querySelectorAll("#questions article").length > 1) return;
  observer.disconnect();
  setTimeout(() => {
    const hit = document.elementFromPoint(x, y);
    document.body.dataset.tapped = hit.textContent;
    hit.dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true, detail: 1 }));
  }, 250);
}).observe(document.getElementById("questions"), { childList: true, subtree: true })"""


def test_a_tap_does_not_hit_what_has_just_moved_in_under_it(page, server):
    first, second = ask(server, "First?", "confirmation"), ask(server, "Second?", "confirmation")
    yes = page.get_by_role("article", name="Question: First?").get_by_role("button", name="Yes")
    expect(page.get_by_role("article", name="Question: Second?")).to_be_visible()
    place = yes.bounding_box()
    time.sleep(0.6)
    page.evaluate(TAP_SOON, [place["x"] + 5, place["y"] + 5])
    page.mouse.click(place["x"] + 5, place["y"] + 5)
    expect(page.locator("body[data-tapped=Yes]")).to_have_count(1)  # where the second one's is now
    time.sleep(0.6)
    assert known(server, first)["result"] == {"value": "yes"}
    assert known(server, second)["status"] == "pending"
    page.mouse.click(place["x"] + 5, place["y"] + 5)
    assert has_ended(server, second)["result"] == {"value": "yes"}


@ON_A_PHONE
def test_questions_fold_into_a_line_and_new_ones_come_below(page, server):
    for n in range(6):
        ask(server, f"Question {n}?", "confirmation")
    articles = waiting(page).get_by_role("article")
    expect(articles).to_contain_text([f"Question {n}?" for n in range(6)])
    height = page.viewport_size["height"]
    assert waiting(page).bounding_box()["height"] <= height * 0.61
    waiting(page).get_by_text("6 questions wait for you").click()
    expect(articles).to_have_count(0)  # that can be seen
    assert waiting(page).bounding_box()["height"] < 60
    ask(server, "One more?")
    expect(waiting(page).get_by_text("7 questions wait for you")).to_be_visible()


@ON_A_PHONE
def test_a_hostile_question_is_text_and_hides_nothing(page, server):
    ask(server, f"{HOSTILE}\n\x1b[8mhidden", "choice", choices=[HOSTILE, "\u202eon"])
    expect(waiting(page).locator("pre")).to_have_text(
        "<img src=x onerror=alert(1)><script>alert(2)</script> \u27e8U+202E\u27e9gnp.exe\n\u27e8U+001B\u27e9[8mhidden"
    )
    expect(waiting(page).get_by_role("button", name="\u27e8U+202E\u27e9on")).to_be_visible()
    assert page.locator("#questions :is(img, script)").count() == 0


@ON_A_PHONE
def test_exactly_what_will_run_is_shown_before_a_yes(page, server, worker):
    worker("careful", '[[ask]]\ncommand = "deploy"\nreason = "it deploys"\n')
    identity = order(server, command="echo deploy\necho done # \u202e", target="careful")
    asked = waiting(page).get_by_role("article")
    expect(asked).to_contain_text("May careful run this? It asks because: it deploys")
    expect(asked).to_contain_text('"command": "echo deploy\\necho done # \\u202e"')
    question = next(each for each in server.ask("GET", "/api/kiro/status").json()["pendingInputs"])
    expect(asked).to_contain_text(question["metadata"]["sha256"])
    expect(asked.get_by_text("Asked by the agent careful")).to_be_visible()
    asked.get_by_role("link", name="echo deploy").click()
    asked.get_by_role("button", name="Yes").click()
    expect(printed(page)).to_have_text("deploy\ndone\n")
    assert page.url.endswith(identity)


# Who is there


def test_agents_and_editors_are_shown_with_what_they_can_do(page, server, worker):
    commands = [f"workbench.action.{n}" for n in range(400)]
    about = {"kind": "ide", "types": ["kiro_command"], "version": "1.2.3", "availableCommands": commands}
    server.ask("PUT", f"/agents/{HOSTILE.replace('/', '%2F')[:60]}", json={"kind": "agent", "types": [HOSTILE]})
    server.ask(
        "PUT", "/agents/studio", json={**about, "workspaceFolders": ["/home/me/app"], "focusedAt": 1_795_350_899_773}
    )
    page.get_by_role("link", name="Agents").click()
    expect(page.get_by_role("link", name="box here agent")).to_be_visible()
    page.get_by_role("link", name="studio here editor").click()
    record = page.locator("#record")
    for words in ("1.2.3", "kiro_command", "/home/me/app"):
        expect(record).to_contain_text(words)
    record.get_by_text("What it can do (400)").click()
    record.get_by_label("Search in What it can do").fill("action.399")
    expect(record.get_by_role("listitem").filter(has_text="workbench")).to_have_text(["workbench.action.399"])
    assert page.locator("main :is(img, script)").count() == 0


@ONCE
def test_who_has_gone_was_last_seen_some_time_ago_and_what_waits_for_it_is_said(page, server, worker):
    box = worker("laptop")
    look(page, "agents", "laptop")
    record = page.locator("#record")
    expect(record).to_contain_text("execute_bash")
    box.end(9)
    identity = order(server, command="echo later", target="laptop")
    expect(record).to_contain_text("not here last seen", timeout=25_000)
    expect(record.get_by_role("link", name="echo later")).to_be_visible()
    look(page, "agents")
    said = page.get_by_role("region", name="The service")
    expect(said).to_contain_text("1 command waits, and no agent is there that takes it: echo later")
    said.get_by_role("link", name="echo later").click()
    assert page.url.endswith(identity)


@ONCE
def test_the_state_of_the_service_is_told_while_someone_looks(page, server, state):
    asked = []
    page.on("request", lambda request: request.url.endswith("/health") and asked.append(request.url))
    order(server, command="true")
    look(page, "agents")
    said = page.get_by_role("region", name="The service")
    expect(said).to_contain_text(f"healthy kirosync {kirosync.__version__}, up for")
    expect(said).to_contain_text("1 waiting, 0 running, the oldest has waited for")
    until(lambda: page.wait_for_timeout(100) or len(asked) > 1, 10)
    look(page, "commands")
    page.wait_for_timeout(5500)
    before = len(asked)
    page.wait_for_timeout(6000)
    assert len(asked) == before


@ONCE
def test_a_service_that_is_not_well_says_why(page, server, state):
    old = int(time.time() * 1000) - 120_000
    command = {"type": "execute_bash", "command": "true", "status": "pending", "createdAt": old, "updatedAt": old}
    server.ask("POST", "/sync", json={"commands": {"c1": command}})
    assert server.ask("GET", "/health").status_code == 503
    page.route("**/health", lambda route: route.fulfill(status=429, json={"error": "too many"}), times=1)
    look(page, "agents")
    said = page.get_by_role("region", name="The service")
    expect(said).to_contain_text("GET /health was answered with 429: too many")
    expect(said).to_contain_text("unhealthy nobody takes commands: 1 wait for agents that are not there")


# On the phone


def test_nothing_is_wider_than_the_screen(page, server, worker):
    long = "x" * 3000
    ids = [order(server, command=f"echo {long}; echo {long} >&2; exit 1", workingDir=f"/{long}"[:200])]
    ids.append(order(server, type="list_directory", path="/etc"))
    ids.append(order(server, type="code_search", query="root", path="/etc/passwd"))
    for identity in ids:
        has_ended(server, identity)
    ask(server, long, "choice", choices=[long[:500], "b"])
    for kind, identity in [
        ("commands", None),
        *(("commands", each) for each in ids),
        ("commands", "new"),
        ("agents", "box"),
    ]:
        look(page, kind, identity)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
        for name in ("list", "record", "questions"):
            overflow = page.evaluate(
                "id => (node => node.scrollWidth - node.clientWidth)(document.getElementById(id))", name
            )
            assert overflow <= 0, (name, identity)
