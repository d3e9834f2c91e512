"""The page in a real browser, on a laptop and on a phone, as someone would use it: by what they see and can reach."""

import contextlib
import datetime as dt
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest
from conftest import ON_A_PHONE, ONCE, TOKEN, Server, until
from playwright.sync_api import expect

ROOT = Path(__file__).parent.parent
SCRIPT = re.compile("<script>\n(.*?)</script>", re.DOTALL)
HI = {"role": "user", "content": "hi there", "timestamp": 1710338438173}


def test_the_page_has_the_client_letter_for_letter():
    client = (ROOT / "clients" / "kirosync.js").read_text()
    assert SCRIPT.findall((ROOT / "console.html").read_text())[0] == client, (
        "copy clients/kirosync.js into its first script"
    )


def test_a_conversation_that_is_synced_appears_by_itself(page, server):
    expect(page.get_by_role("status")).to_have_text("in step")
    server.ask("POST", "/sync", json={"conversations": {"c1": [HI]}})
    page.get_by_role("link", name="hi there").click()
    expect(page.get_by_role("log")).to_contain_text("hi there")
    answer = {"role": "assistant", "content": "hello", "timestamp": HI["timestamp"] + 1}
    server.ask("POST", "/sync", json={"conversations": {"c1": [answer]}})
    expect(page.get_by_role("log")).to_contain_text("hello")


def test_a_message_that_is_written_here_reaches_the_service(page, server):
    server.ask("POST", "/sync", json={"conversations": {"c1": [HI]}})
    page.get_by_role("link", name="hi there").click()
    page.get_by_role("textbox", name="Message").fill("from the phone")
    page.get_by_role("textbox", name="Message").press("Control+Enter")
    expect(page.get_by_role("log")).to_contain_text("from the phone")

    def kept():
        record = json.loads((server_state(server) / "conversations" / "c1.json").read_text())
        return [message["content"] for message in record["messages"]]

    until(lambda: kept() == ["hi there", "from the phone"])


def server_state(server):
    return Path(server.argv[server.argv.index("--state") + 1])


NOW = 1_795_000_000_000


def said(number, content=None, role="user", **more):
    """Return the message of a *number*, which is also its minute."""
    content = f"message {number}" if content is None else content
    return {"role": role, "content": content, "timestamp": NOW + 60_000 * number, **more}


def push(server, **records):
    answer = server.ask("POST", "/sync", json=records)
    assert answer.status_code == 200, answer.text


def show(page, kind, identity=None):
    page.evaluate("hash => location.hash = hash", f"#/{kind}" + (f"/{quote(identity, safe='')}" if identity else ""))


def again(server, state, tmp_path, start, *, keep=True):
    """Start a service where *server*, which has ended, was."""
    return start(Server, state, tmp_path / "log", "--port", server.url.rpartition(":")[2])


def rest(page, seconds=0.3):
    page.wait_for_timeout(seconds * 1000)


def distance_to_end(page):
    return page.locator("#record").evaluate("(node) => node.scrollHeight - node.scrollTop - node.clientHeight")


def settle(page, ready, seconds=10):
    """Wait until *ready* is true of the page; meanwhile it goes on."""
    for _ in range(int(seconds / 0.05)):
        if ready():
            return
        rest(page, 0.05)
    raise AssertionError(f"not so within {seconds} s")


def place_of(page, text):
    return page.get_by_text(text, exact=True).bounding_box()["y"]


def scroll(page, pixels):
    """Scroll as a human does, over the record."""
    box = page.locator("#record").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 100)
    page.mouse.wheel(0, pixels)


# Conversations

MARKED = "# Heading\n\nSome **bold** words.\n\n```python\nprint(1)\n\n\tprint('<b>')\n```\n\n- one\n- two\n"


def test_a_long_transcript_opens_at_its_end_and_stays_there_while_it_grows(page, server):
    messages = [said(number, f"message {number}\n\n{MARKED * (number % 4)}") for number in range(300)]
    push(server, conversations={"long": messages})
    page.get_by_role("link", name="message 0").click()
    settle(page, lambda: distance_to_end(page) < 2)
    rest(page, 0.6)  # rendered messages are of another size
    assert distance_to_end(page) < 2
    for number in range(300, 304):
        push(server, conversations={"long": [said(number, f"late {number}\n\n{MARKED}")]})
        expect(page.get_by_text(f"late {number}", exact=True)).to_be_visible()
        settle(page, lambda: distance_to_end(page) < 2)


RENDERED = """[...document.querySelectorAll(".message:has(.plain)")]
  .every((node) => Math.abs(node.getBoundingClientRect().top) > 1300)"""  # all that is near, and what is beside it


def test_who_reads_above_is_not_moved(page, server):
    push(server, conversations={"long": [said(number, f"message {number}\n\n{MARKED}") for number in range(60)]})
    page.get_by_role("link", name="message 0").click()
    settle(page, lambda: distance_to_end(page) < 2)
    page.evaluate("() => { globalThis.top_of = (node) => node.getBoundingClientRect().top; }")
    scroll(page, -2500)
    settle(page, lambda: distance_to_end(page) > 500)
    rest(page, 0.6)
    settle(page, lambda: page.evaluate(RENDERED))
    page.evaluate("globalThis.place = [...document.querySelectorAll('.message')].find((each) => top_of(each) > 150)")
    before = page.evaluate("top_of(place)")
    for number in range(60, 63):
        push(server, conversations={"long": [said(number, f"late {number}\n\n{MARKED}")]})
    expect(page.get_by_text("63 messages").first).to_be_attached()
    rest(page, 0.5)
    assert page.evaluate("top_of(place)") == pytest.approx(before, abs=2)


def test_earlier_messages_come_without_a_jump_and_only_so_many_are_shown(page, server):
    push(server, conversations={"long": [said(number) for number in range(10_000)]})
    page.get_by_role("link", name="message 0").click()
    expect(page.get_by_role("log")).to_contain_text("message 9999")
    settle(page, lambda: distance_to_end(page) < 2)
    assert page.locator(".message").count() == 300
    page.evaluate("document.getElementById('record').scrollTop = 0")
    expect(page.get_by_text("message 9700", exact=True)).to_be_in_viewport()
    rest(page)
    before = place_of(page, "message 9700")
    page.get_by_role("button", name="Show earlier ones (9700)").click()
    assert page.locator(".message").count() == 600
    rest(page)
    assert abs(place_of(page, "message 9700") - before) < 2
    expect(page.get_by_role("button", name="Show earlier ones (9400)")).to_be_attached()
    nodes = page.evaluate("document.getElementsByTagName('*').length")
    assert nodes < 600 * 15


@ONCE
def test_a_message_that_grows_keeps_its_place_and_its_beginning(page, server):
    growing = "First paragraph.\n\nSecond"
    push(server, conversations={"c": [said(0), said(1, growing, "assistant")]})
    page.get_by_role("link", name="message 0").click()
    first = page.get_by_role("log").get_by_text("First paragraph.", exact=True)
    expect(first).to_be_visible()
    settle(page, lambda: first.evaluate("node => node.tagName") == "P")
    first.evaluate("node => { node.mark = true; node.closest('article').mark = true; }")
    page.evaluate(
        """globalThis.flickers = 0;
           new MutationObserver(() => { flickers += document.querySelectorAll("article:last-child .plain").length; })
             .observe(document.querySelector("[role=log]"), { subtree: true, childList: true, attributes: true })"""
    )
    for number in range(12):
        growing += f" word{number} **bold{number}**"
        push(server, conversations={"c": [said(1, growing, "assistant")]})
    expect(page.get_by_role("log").get_by_text("bold11", exact=True)).to_be_visible()
    assert page.get_by_role("article").count() == 2
    assert first.evaluate("node => node.mark && node.closest('article').mark")
    assert page.evaluate("flickers") == 0


@ONCE
def test_code_is_copied_as_it_was_written(page, server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    push(server, conversations={"c": [said(0, MARKED, "assistant")]})
    page.get_by_role("link", name="Heading").click()
    page.get_by_role("button", name="Copy the code").click()
    expect(page.get_by_role("button", name="Copied the code")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "print(1)\n\n\tprint('<b>')"
    page.get_by_role("button", name="Copy the message").click()
    expect(page.get_by_role("button", name="Copied the message")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == MARKED


@ONCE
def test_what_tools_were_told_and_said_is_folded(page, server):
    call = {"name": "readFile", "arguments": {"path": "secret-path"}}
    push(
        server,
        conversations={
            "c": [said(0), said(1, "I look", "assistant", tool_calls=[call]), said(2, "top\nbottom line", "tool")]
        },
    )
    page.get_by_role("link", name="message 0").click()
    log = page.get_by_role("log")
    expect(log.get_by_text("calls readFile")).to_be_visible()
    expect(log.get_by_text("secret-path")).not_to_be_visible()
    log.get_by_text("calls readFile").click()
    expect(log.get_by_text("secret-path")).to_be_visible()
    log.get_by_text("tool: top").click()
    expect(log.get_by_text("bottom line")).to_be_visible()
    push(server, conversations={"c": [said(2, "top\nbottom line, and more", "tool")]})
    expect(log.get_by_text("bottom line, and more")).to_be_visible()  # it stays open while it grows


@ONCE
def test_days_are_said_and_a_search_finds_by_content(page, server):
    day = 86_400_000
    push(
        server,
        conversations={"c": [said(0), {**said(1, "needle in it"), "timestamp": NOW + day}], "d": [said(0, "another")]},
    )
    page.get_by_role("searchbox", name="Search conversations").fill("NEEDLE it")
    expect(page.get_by_role("link", name="another")).to_have_count(0)
    page.get_by_role("link", name="message 0").click()
    days = [dt.datetime.fromtimestamp((NOW + each) / 1000).strftime("%A, %-d %B %Y") for each in (0, day)]
    expect(page.get_by_role("log").get_by_role("heading", level=3)).to_have_text(
        [re.compile(text.replace(", ", ",? ")) for text in days]
    )
    show(page, "conversations")
    page.get_by_role("searchbox").fill("nowhere")
    expect(page.get_by_text("Nothing says that.")).to_be_visible()


@ONCE
def test_what_is_deleted_on_the_service_is_said(page, server):
    push(server, conversations={"c": [said(0)]}, documents={"d": {"content": "x", "timestamp": NOW}})
    page.get_by_role("link", name="message 0").click()
    expect(page.get_by_role("article")).to_have_count(1)
    assert server.ask("DELETE", "/conversation/c").status_code == 200
    expect(page.get_by_text("It was deleted.")).to_be_visible()
    expect(page.get_by_role("article")).to_have_count(0)
    show(page, "documents", "d")
    expect(page.get_by_text("1 byte, 1 line")).to_be_visible()
    assert server.ask("DELETE", "/document/d").status_code == 200
    expect(page.get_by_text("It was deleted.")).to_be_visible()


@ONCE
def test_a_new_conversation_begins_with_its_first_message(page, server):
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_text("The first message begins it.")).to_be_visible()
    page.get_by_role("textbox", name="Message").fill("how it begins")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("log")).to_contain_text("how it begins")
    expect(page.get_by_role("heading", name="how it begins")).to_be_visible()
    settle(page, lambda: server.ask("GET", "/sync").json()["conversations"])
    (identity, messages), *_ = server.ask("GET", "/sync").json()["conversations"].items()
    assert identity.startswith("conv-")
    assert [message["content"] for message in messages] == ["how it begins"]


def test_a_message_written_while_the_service_is_down_is_sent_when_it_is_back(page, server, state, tmp_path, start):
    push(server, conversations={"c": [said(0)]})
    page.get_by_role("link", name="message 0").click()
    expect(page.get_by_role("article")).to_have_count(1)
    assert server.end() == 0
    expect(page.get_by_role("status").first).to_have_text("offline")
    page.get_by_role("textbox", name="Message").fill("written while away")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_text("not sent yet").filter(visible=True)).to_be_visible()
    warnings = []
    page.on("dialog", lambda dialog: (warnings.append(dialog.type), dialog.accept()))
    page.route(
        "**/", lambda route: route.fulfill(body=(ROOT / "console.html").read_text(), content_type="text/html"), times=1
    )
    page.reload()  # the service is away, so a file in its place
    assert warnings == ["beforeunload"]
    expect(page.get_by_role("log")).to_contain_text("written while away")
    expect(page.get_by_text("not sent yet").filter(visible=True)).to_be_visible()
    expect(page.get_by_role("alert").first).to_contain_text("1 message will be sent then")
    back = again(server, state, tmp_path, start)
    page.evaluate("dispatchEvent(new Event('online'))")
    expect(page.get_by_text("not sent yet").filter(visible=True)).to_have_count(0)
    expect(page.get_by_role("log")).to_contain_text("message 0")
    kept = back.ask("GET", "/sync").json()["conversations"]["c"]
    assert [message["content"] for message in kept] == ["message 0", "written while away"]
    page.reload()
    assert warnings == ["beforeunload"], "nothing is unsent now"


# Link


def test_offline_is_said_and_over_as_soon_as_the_browser_says_so(page, server):
    status = page.get_by_role("status").first
    expect(status).to_have_text("in step")
    page.context.set_offline(True)
    expect(status).to_have_text("offline", timeout=3000)
    rest(page, 5)  # by now it rests for seconds between two tries
    push(server, conversations={"c": [said(0, "missed meanwhile")]})
    page.context.set_offline(False)
    expect(page.get_by_role("link", name="missed meanwhile")).to_be_visible(timeout=1500)
    expect(status).to_have_text("in step")
    expect(page.get_by_text("Offline, and trying again")).not_to_be_visible()


@ONCE
def test_what_a_restored_backup_lacks_is_said_and_brought_back(page, server, state, tmp_path, start):
    push(server, conversations={"c": [said(0)]})
    expect(page.get_by_role("link", name="message 0")).to_be_visible()
    shutil.copytree(state, tmp_path / "backup")
    push(server, conversations={"c": [said(1)]}, documents={"d": {"content": "later", "timestamp": NOW}})
    page.get_by_role("link", name="2 messages").click()
    assert server.end() == 0
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "backup", state)
    back = again(server, state, tmp_path, start)
    page.evaluate("dispatchEvent(new Event('online'))")
    notices = page.get_by_role("region", name="Notices")
    expect(notices).to_contain_text("The service no longer has 1 message and 1 document")
    expect(page.get_by_role("article").filter(has_text="message 1")).to_have_count(0)
    notices.get_by_role("button", name="Bring them back").click()
    expect(page.get_by_role("log")).to_contain_text("message 1")
    expect(notices).not_to_be_visible()
    settle(page, lambda: "d" in back.ask("GET", "/sync").json()["documents"])
    assert back.ask("GET", "/sync").json()["conversations"]["c"] == [said(0), said(1)]


@ONCE
def test_what_the_service_refuses_later_is_said_and_can_be_read(page, server):
    expect(page.get_by_role("status").first).to_have_text("in step")
    refused = {"documents": {"d": {"content": "my precious text", "timestamp": NOW, "id": "mine"}}}
    kept = json.dumps(
        {"cursor": "", "base": {"conversations": {}, "documents": {}, "commands": {}}, "outbox": [refused]}
    )
    page.on("dialog", lambda dialog: dialog.accept())
    page.evaluate("kept => sessionStorage.setItem('kirosync.unsent', kept)", kept)
    page.reload()
    notices = page.get_by_role("region", name="Notices")
    expect(notices).to_contain_text("The service did not accept 1 document: documents.d.id: is set by the service")
    notices.get_by_text("What was written").click()
    expect(notices.get_by_text("my precious text")).to_be_visible()
    notices.get_by_role("button", name="Dismiss").click()
    expect(notices).not_to_be_visible()


def token(state, name, scope):
    argv = [sys.executable, ROOT / "kirosync.py", "token", "add", name, "--scope", scope, "--state", state]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def enter(page, secret):
    page.get_by_role("textbox", name="Token").fill(secret)
    page.get_by_role("button", name="Look").click()


@ONCE
def test_a_token_that_is_revoked_is_asked_for_again(page, server, state):
    page.get_by_role("button", name="Forget the token").click()
    enter(page, token(state, "phone", "client"))
    push(server, conversations={"c": [said(0)]})
    expect(page.get_by_role("link", name="message 0")).to_be_visible()
    argv = [sys.executable, ROOT / "kirosync.py", "token", "revoke", "phone", "--state", state]
    subprocess.run(argv, check=True, capture_output=True)
    expect(page.get_by_role("dialog")).to_contain_text("The service does not take this token.")
    expect(page.get_by_text("message 0")).to_have_count(0)
    for _ in range(3):
        page.keyboard.press("Escape")
        rest(page, 0.1)
    expect(page.get_by_role("dialog")).to_contain_text("The service does not take this token.")
    enter(page, TOKEN)
    expect(page.get_by_role("link", name="message 0")).to_be_visible()


@ONCE
def test_who_forgets_the_token_leaves_nothing_but_what_is_to_be_sent(page, server):
    drafts = {"kirosync.order": "{}", "kirosync.keys": "[]", "kirosync.draft c": '"secret"', "kirosync.unsent": "null"}
    page.evaluate("drafts => Object.assign(sessionStorage, drafts)", drafts)
    page.get_by_role("button", name="Forget the token").click()
    assert page.evaluate("Object.keys(sessionStorage)") == ["kirosync.unsent"]
    page.evaluate("sessionStorage.setItem('kirosync.token', '\u20ac')")  # as the page of the documentation may
    page.reload()
    expect(page.get_by_role("dialog").get_by_role("alert")).to_have_text("no header can carry this token")
    enter(page, TOKEN)
    expect(page.get_by_role("status").first).to_have_text("in step")


@ONCE
def test_a_token_that_may_only_read_is_told_so(page, server, state):
    push(server, conversations={"c": [said(0)]})
    page.get_by_role("button", name="Forget the token").click()
    enter(page, token(state, "reader", "read"))
    page.get_by_role("link", name="message 0").click()
    expect(
        page.get_by_text("With this token nothing can be written: a token of the scope read may not")
    ).to_be_visible()
    expect(page.get_by_role("textbox", name="Message")).to_be_disabled()
    expect(page.get_by_role("button", name="Send")).to_be_disabled()
    expect(page.get_by_role("status").first).to_have_text("in step")


@ONCE
def test_a_token_of_an_agent_is_told_that_it_cannot_look(page, server, state):
    push(server, conversations={"c": [said(0)]}, documents={"d": {"content": "x", "timestamp": NOW}})
    page.get_by_role("button", name="Forget the token").click()
    enter(page, token(state, "box", "agent"))
    for kind in ("conversations", "documents"):
        show(page, kind)
        expect(
            page.get_by_text(f"With this token no {kind} can be looked at: a token of the scope agent")
        ).to_be_visible()


# Documents


def document(content, at=0, **more):
    return {"content": content, "timestamp": NOW + at, **more}


def test_documents_are_listed_found_and_shown_with_numbers_and_colours(page, server):
    source = "def f():\n    return '<b>'\n\n# end\n"
    push(
        server,
        documents={"a": document(source, path="src/f.py", language="python"), "b": document("hay", path="hay.txt")},
    )
    show(page, "documents")
    page.get_by_role("searchbox", name="Search documents").fill("return")
    expect(page.get_by_role("link", name="hay.txt")).to_have_count(0)
    page.get_by_role("link", name="src/f.py").click()
    code = page.get_by_role("group", name="Content").locator("code")
    expect(code).to_have_text(source)
    expect(code.locator(".k").first).to_have_text("def")
    gutter = page.locator(".gutter")
    assert gutter.text_content().split("\n") == ["1", "2", "3", "4"]
    assert gutter.get_attribute("aria-hidden") == "true"
    assert gutter.evaluate("node => getComputedStyle(node).userSelect") == "none"
    assert gutter.bounding_box()["height"] == code.locator("xpath=..").bounding_box()["height"]
    show(page, "documents")
    page.get_by_role("searchbox").fill("hay.t")
    expect(page.get_by_role("link", name="hay.txt")).to_be_visible()


@ONCE
def test_a_document_is_copied_and_saved_as_it_is(page, server):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    content = "a\tb\r\n<c> \u00e9\u202e\n"
    push(server, documents={"d": document(content, path="../../etc/na\u202eme.txt")})
    show(page, "documents", "d")
    expect(page.get_by_text("characters that are not seen, or turn the direction of text: U+202E")).to_be_visible()
    page.get_by_role("button", name="Copy the document").click()
    expect(page.get_by_role("button", name="Copied the document")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == content
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    assert download.value.suggested_filename == "na_me.txt"
    assert download.value.path().read_bytes().decode() == content


def test_a_document_in_markdown_is_rendered_and_its_source_one_tap_away(page, server):
    push(server, documents={"README.md": document(MARKED)})
    show(page, "documents", "README.md")
    record = page.get_by_role("region", name="README.md")
    expect(record.get_by_role("heading", name="Heading")).to_be_visible()
    page.get_by_role("button", name="Source").click()
    expect(page.get_by_role("group", name="Content").locator("code")).to_have_text(MARKED)
    expect(record.get_by_role("heading", name="Heading")).not_to_be_visible()
    expect(page.get_by_role("button", name="Source")).to_have_attribute("aria-pressed", "true")


def test_a_document_is_live_and_its_versions_and_what_changed_are_shown(page, server):
    first, second, third = (f"one\n{word}\nthree\n" for word in ("alpha", "beta", "gamma"))
    push(server, documents={"d": document(first, path="d.txt")})
    compared = []
    page.on("request", lambda request: compared.append(request.url) if "/diff?" in request.url else None)
    show(page, "documents", "d")
    code = page.get_by_role("group", name="Content").locator("code")
    expect(code).to_have_text(first)
    page.get_by_role("button", name="Changes").click()
    expect(page.get_by_text("There is no other version")).to_be_visible()
    page.get_by_role("button", name="Source").click()
    push(server, documents={"d": document(second, 1000, path="d.txt")})
    expect(page.get_by_role("combobox", name="Version")).to_be_visible()
    assert not compared, "nobody has asked what has changed"
    page.get_by_role("button", name="Changes").click()
    changes = page.get_by_role("group", name="Changes")
    expect(changes.get_by_role("deletion")).to_have_text("-alpha")
    expect(changes.get_by_role("insertion")).to_have_text("+beta")
    push(server, documents={"d": document(third, 2000, path="d.txt")})
    expect(changes.get_by_role("insertion")).to_have_text("+gamma")
    expect(changes.get_by_role("deletion")).to_have_text("-beta")
    expect(page.get_by_text("1 line added, 1 removed.")).to_be_visible()
    page.get_by_role("combobox", name="From").select_option(index=2)
    expect(changes.get_by_role("deletion")).to_have_text("-alpha")
    page.get_by_role("combobox", name="To").select_option(index=2)
    expect(page.get_by_text("They do not differ.")).to_be_visible()
    page.get_by_role("button", name="Source").click()
    expect(code).to_have_text(third)
    page.get_by_role("combobox", name="Version").select_option(index=1)
    expect(code).to_have_text(second)


@ONCE
def test_a_document_of_thirty_thousand_lines_is_shown_whole_with_few_nodes(page, server):
    lines = [f"line {number} of many, as long as lines are" for number in range(1, 30_001)]
    push(server, documents={"big": document("\n".join(lines))})
    show(page, "documents", "big")
    expect(page.get_by_text("30000 lines")).to_be_visible()
    assert page.evaluate("document.getElementsByTagName('*').length") < 300
    numbered = page.get_by_role("group", name="Content")
    numbered.evaluate("node => node.scrollTop = node.scrollHeight")
    numbers, code = (numbered.locator("pre").nth(each).bounding_box() for each in (0, 1))
    assert (numbers["y"], numbers["height"]) == (code["y"], code["height"])
    assert numbered.locator("code").text_content() == "\n".join(lines)


# What others wrote

ATTACKS = [
    "<script>run()</script>",
    "<img src=x onerror=run()>",
    "<svg onload=run()><animate onbegin=run()>",
    "<base href=http://evil.invalid/>",
    "<meta http-equiv=refresh content='0;url=http://evil.invalid/'>",
    "<style>@import 'http://evil.invalid/'; * { display: none !important }</style>",
    "<iframe srcdoc='<script>parent.run()</script>'></iframe>",
    "<form action=http://evil.invalid/><button>x</button></form>",
    "<a href=javascript:run()>x</a> [link](javascript:run()) [data](data:text/html,<script>run()</script>)",
    "![pixel](http://evil.invalid/pixel.png) <http://evil.invalid/auto>",
    '```html" onmouseover=run()\n</code></pre><img src=x onerror=run()>\n```',
    "\u202e\u2066\u200b\u200d\ufeff right to left",
    "{{constructor.constructor('run()')()}} ${run()} </script><script>run()</script>",
    "__proto__",
]
DEEP = [">" * 500 + " deep", "*" * 2000, "[" * 2000, "- " * 300 + "x", "`" * 999, "x" * 1_000_000]


def hostile(number, text):
    """Return records in which everything that can be chosen is *text*."""
    message = said(number, text, role=text[:60], id=text[:100], tool_calls=[{"name": text, "arguments": text}])
    name = text.replace("\n", " ")[:30]
    return {
        "conversations": {f"{number} {name}": [message, said(number + 1, text, "tool")]},
        "documents": {f"{number} {name}": document(text, path=text, language=text[:60])},
    }


def watched(page):
    """Return what the page asks of others, and the dialogs that it opens; what runs says so there."""
    seen = []
    page.expose_function("run", lambda: seen.append("something ran"))
    page.on(
        "request",
        lambda request: (
            seen.append(request.url)
            if "127.0.0.1" not in request.url and not request.url.startswith(("data:", "blob:"))
            else None
        ),
    )
    page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
    return seen


@ON_A_PHONE  # where there is the least room
def test_nothing_that_others_wrote_runs_and_the_page_stays_usable(page, server):
    seen = watched(page)
    for number, text in enumerate([*ATTACKS, *DEEP]):
        push(server, **hostile(number * 2, text))
    push(server, conversations={"__proto__": [said(99, "of proto")], "constructor": [said(98, "of constructor")]})
    for kind in ("conversations", "documents"):
        show(page, kind)
        count = len(ATTACKS + DEEP) + (2 if kind == "conversations" else 0)
        expect(page.locator("#list li")).to_have_count(count)
        for address in page.locator("#list li a").evaluate_all(
            "links => links.map((link) => link.getAttribute('href'))"
        ):
            page.evaluate("hash => location.hash = hash", address)
            expect(page.get_by_role("heading", level=2).last).to_be_focused()
            rest(page, 0.1)
            for summary in page.locator("#record summary").all():
                summary.click()
            for name in ("Rendered", "Source", "Changes") if kind == "documents" else ():
                for button in page.get_by_role("button", name=name, exact=True).all():
                    button.click()
    rest(page)
    assert page.evaluate("({}).polluted") is None
    assert not page.locator("#record :is(script, img, iframe, style, base, meta, form:not(#write))").count()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    show(page, "conversations", "__proto__")
    page.get_by_role("textbox", name="Message").fill("still here")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_role("log")).to_contain_text("still here")
    assert seen == []


@ONCE
def test_links_lead_only_where_links_may_and_tell_nobody_whence(page, server):
    push(server, conversations={"c": [said(0, "\n\n".join(ATTACKS)), said(1, "[good](https://example.invalid/)")]})
    show(page, "conversations", "c")
    good = page.get_by_role("link", name="good")
    expect(good).to_have_attribute("rel", re.compile("noopener.*noreferrer"))
    links = page.locator("#record a:not(.back)").evaluate_all("links => links.map((link) => link.protocol)")
    assert set(links) <= {"http:", "https:", "mailto:"}


def test_what_would_slip_through_the_sanitizer_is_stopped_by_the_policy(browser, server):
    with contextlib.closing(browser.new_context()) as context:
        page = context.new_page()
        page.goto(server.url)
        enter(page, TOKEN)
        push(server, conversations={"c": [said(0)]})
        seen = watched(page)
        blocked = []
        page.on("requestfailed", lambda request: blocked.append(request.failure))
        texts = re.compile(r"/render$")
        page.route(texts, lambda route: route.fulfill(json={"html": [SLIP] * 20}))
        page.get_by_role("link", name="message 0").click()
        expect(page.locator(".prose svg")).to_be_attached()  # it came in
        page.evaluate(ATTEMPTS)
        settle(page, lambda: page.evaluate("tried") == 6)
        rest(page)
        assert page.evaluate("stopped") == {
            "script": True,
            "handler": True,
            "markup": True,
            "eval": True,
            "fetch": True,
        }
        assert page.evaluate("({baseURI}) => baseURI", page.evaluate_handle("document")).startswith(server.url)
        assert set(seen) <= {"http://evil.invalid/"}
        assert set(blocked) == {"csp"}, "it never left the browser"


SLIP = """<img src=http://evil.invalid/ onerror=run()><script>run()</script><svg onload=run()></svg>
<style>* { color: red }</style><base href=http://evil.invalid/><a href=javascript:run()>slipped</a>"""
ATTEMPTS = """() => {
  const stopped = globalThis.stopped = {};
  globalThis.tried = 0;
  const attempt = (name, act) => setTimeout(async () => { // later, for what a test evaluates may do more
    await Promise.resolve().then(act).catch(() => { stopped[name] = true; });
    globalThis.tried += 1;
  });
  attempt("script", () => {
    const script = document.createElement("script");
    script.textContent = "run()";
    document.body.append(script);
  });
  attempt("handler", () => { document.querySelector("h1").setAttribute("onclick", "run()"); });
  attempt("markup", () => { document.body.insertAdjacentHTML("beforeend", "<img src=x onerror=run()>"); });
  attempt("eval", () => (0, eval)("run()"));
  attempt("fetch", () => fetch("http://evil.invalid/"));
  attempt("link", () => [...document.links].find((link) => link.textContent === "slipped").click());
}"""


# Keyboard, screen reader, colours


def test_everything_is_reached_by_keyboard_and_a_record_begins_at_its_heading(page, server):
    push(server, conversations={"c": [said(0)], "d": [said(1, "another")]})
    expect(page.get_by_role("link", name="another")).to_be_visible()
    page.locator("body").press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("message 0")
    expect(page.get_by_role("link", name="another")).to_have_count(0)
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="New conversation")).to_be_focused()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="message 0")).to_be_focused()
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="message 0")).to_be_focused()
    for reached in (
        page.get_by_role("button", name="Copy the message"),
        page.get_by_role("textbox", name="Message"),
        page.get_by_role("button", name="Send"),
    ):
        settle(
            page,
            lambda reached=reached: (
                page.keyboard.press("Tab") or reached.evaluate("node => node === document.activeElement")
            ),
            1,
        )
    page.get_by_role("heading", name="message 0").focus()
    page.keyboard.press("Escape")
    expect(page.get_by_role("link", name="message 0")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="message 0")).to_be_focused()
    page.go_back()
    expect(page.get_by_role("link", name="message 0")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="message 0")).to_be_focused()
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()


@ONCE
def test_the_skip_link_leads_to_what_is_shown_and_not_away(page, server):
    push(server, conversations={"c": [said(0)]})
    page.get_by_role("link", name="message 0").click()
    address = page.evaluate("location.hash")
    page.get_by_role("link", name="Skip to the content").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="message 0")).to_be_focused()
    assert page.evaluate("location.hash") == address


def test_a_screen_reader_finds_landmarks_headings_and_names(page, server):
    push(server, conversations={"c": [said(0)]}, documents={"d": document("x\n", path="d.txt")})
    page.get_by_role("link", name="message 0").click()
    expect(page.get_by_role("article")).to_have_count(1)
    expect(page.locator("body")).to_match_aria_snapshot("""
      - banner:
        - heading "kirosync" [level=1]
        - navigation "What there is":
          - link "Conversations"
          - link "Documents"
        - status: in step
        - button "Forget the token"
      - main:
        - region "message 0":
          - heading "message 0" [level=2]
          - log "Transcript":
            - heading [level=3]
            - article:
              - button "Copy the message"
          - textbox "Message"
          - button "Send"
    """)
    show(page, "documents", "d")
    expect(page.get_by_role("main")).to_match_aria_snapshot("""
      - main:
        - region "d.txt":
          - heading "d.txt" [level=2]
          - group "How to show it":
            - button "Source" [pressed]
            - button "Changes"
          - button "Copy the document"
          - button "Save"
          - group "Content":
            - code: x
    """)
    nameless = """[...document.querySelectorAll("button, a, input, textarea, select")]
      .filter((node) => node.checkVisibility() && !node.textContent.trim() && !node.ariaLabel && !node.labels?.length)
      .map((node) => node.outerHTML)"""
    assert page.evaluate(nameless) == []


def test_what_is_tapped_is_large_enough_for_a_finger(page, server):
    push(server, conversations={"c": [said(0, MARKED)]}, documents={"d.md": document(MARKED)})
    small = """[...document.querySelectorAll("button, input, textarea, select, summary, li > a, nav a")]
      .filter((node) => node.checkVisibility() && node.getBoundingClientRect().height < 40)
      .map((node) => node.textContent || node.ariaLabel)"""
    for kind, identity in (("conversations", None), ("conversations", "c"), ("documents", "d.md")):
        show(page, kind, identity)
        rest(page)
        if page.viewport_size["width"] < 800:
            assert page.evaluate(small) == []
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def luminance(colour):
    colour = colour if len(colour) == 6 else "".join(2 * digit for digit in colour)
    parts = [int(colour[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


SYNTAX = "quiet magenta green cyan blue yellow red"
PAIRS = {  # what is written on each ground
    "ground": "text quiet accent good bad wait",
    "raised": f"text quiet accent {SYNTAX}",
    "mark": "text quiet",
    "added": "text",
    "removed": "text",
    "accent": "on-accent",
}


@pytest.mark.parametrize("scheme", [0, 1])
def test_what_is_written_stands_out_from_its_ground(scheme):
    roots = re.findall(r":root \{(.*?)\}", (ROOT / "console.html").read_text(), re.DOTALL)
    colours = {name: luminance(value) for name, value in re.findall(r"--([\w-]+): #(\w+);", roots[scheme])}
    for ground, texts in PAIRS.items():
        for text in texts.split():
            dark, light = sorted([colours[ground], colours[text]])
            assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {ground}"
