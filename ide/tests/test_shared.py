"""The shared memory seen and changed in a real editor: conversations, documents, commands of the server, questions."""

import json
import re
import time

import pytest
from editor import until
from playwright.sync_api import expect

NOW = 1_750_000_000_000
PATIENT = {"timeout": 15_000}


@pytest.fixture(scope="module", autouse=True)
def tree(window):
    """The view of the extension is open."""
    show_tree(window)


def show_tree(window):
    window.ask("workbench.view.extension.kirosync")
    window.page.locator(".pane-header", has_text="Conversations").first.wait_for()


def row(window, text):
    """Return the row of a tree that shows *text*, once it does."""
    found = window.page.locator(".pane-body .monaco-list-row", has_text=text).first
    expect(found, f"no view shows {text!r}").to_be_visible(**PATIENT)
    return found


def act(window, text, action):
    """Click the *action* that the row of *text* offers."""
    found = row(window, text)
    found.hover()
    found.get_by_role("button", name=action).first.click()


def say(service, conversation, *contents, at=NOW, role="user"):
    messages = [{"role": role, "content": text, "timestamp": at + number} for number, text in enumerate(contents)]
    assert service.ask("POST", "/sync", {"conversations": {conversation: messages}})[0] == 200


def messages(service, conversation):
    return [each["content"] for each in service.ask("GET", "/sync")[1]["conversations"].get(conversation, [])]


def documents(service):
    return service.ask("GET", "/sync")[1]["documents"]


def put_document(service, identity, content, **more):
    document = {"content": content, "timestamp": int(time.time() * 1000), **more}
    assert service.ask("POST", "/sync", {"documents": {identity: document}})[0] == 200


def write(window, prompt, text):
    window.sees("input", prompt)
    window.type(text)
    window.press("Enter")


def text_of(window):
    return window.ask("probe.state")["text"]


def close_editors(window):
    window.command("View: Close All Editors")
    until(lambda: not window.ask("probe.state")["tabs"], "the editors stay open")


# Conversations


def test_conversations_are_listed_read_as_markdown_and_live(service, window):
    say(service, "c1", "How do I make a **sync API**?", "```python\nprint('unfinished')")
    row(window, "How do I make a sync API?").click()
    preview = window.page.frame_locator("iframe.webview").frame_locator("iframe")
    expect(preview.locator("strong", has_text="sync API").first).to_be_visible(**PATIENT)
    say(service, "c1", "and now *live*", at=NOW + 10, role="assistant")
    expect(preview.locator("em", has_text="live")).to_be_visible(**PATIENT)
    expect(preview.locator("h4").last).to_contain_text("assistant")
    window.screenshot("conversation")
    close_editors(window)


def test_a_conversation_can_be_read_as_text_and_what_is_deleted_is_gone(service, window):
    say(service, "c2", "to be deleted")
    row(window, "to be deleted")
    window.ask("kirosync.openConversationText", {"id": "c2"})
    until(lambda: "to be deleted" in (text_of(window) or ""), "the text is not shown")
    assert service.ask("DELETE", "/conversation/c2")[0] == 200
    until(lambda: "no such conversation" in text_of(window), "it is still shown")
    expect(window.page.locator(".monaco-list-row", has_text="to be deleted")).to_have_count(0, **PATIENT)
    close_editors(window)


def test_a_message_is_written_into_a_conversation(service, window):
    say(service, "c3", "a question")
    act(window, "a question", "Write a Message")
    write(window, "Your message", "an answer from the editor")
    until(lambda: messages(service, "c3") == ["a question", "an answer from the editor"] or
          "an answer from the editor" in messages(service, "c3"), "it did not arrive")  # fmt: skip


def test_what_is_written_while_the_service_is_away_arrives_even_if_the_window_is_closed(editor, service, window):
    say(service, "c4", "before it went")
    row(window, "before it went")
    service.stop()
    window.sees("status", "Kirosync: offline")
    try:
        act(window, "before it went", "Write a Message")
        write(window, "Your message", "written while it was away")
        until(lambda: [*editor.folder.rglob("unsent/*.json")], "it was not kept")
        window.reload()
    finally:
        service.start()
    until(lambda: "written while it was away" in messages(service, "c4"), "it was lost")
    until(lambda: not [*editor.folder.rglob("unsent/*.json")], "it is still kept")
    show_tree(window)


# Documents


@pytest.fixture(scope="module")
def specs(window):
    folder = window.folder / ".kiro" / "specs"
    folder.mkdir(parents=True)
    (folder / "one.md").write_text("# One\n")
    (folder / "two.md").write_text("# Two\n")
    (folder / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    return folder


def id_of(window, name):
    return f"{window.folder.name}/.kiro/specs/{name}"


def test_a_folder_is_pushed_as_documents_and_what_differs_is_shown(service, window, specs):
    row(window, "one.md")
    window.command("Kirosync: Push the Shared Folders")
    known = until(lambda: (d := documents(service)).keys() >= {id_of(window, "one.md"), id_of(window, "two.md")} and d,
                  "they were not pushed")  # fmt: skip
    assert known[id_of(window, "one.md")]["content"] == "# One\n"
    assert known[id_of(window, "one.md")]["path"] == id_of(window, "one.md")
    assert id_of(window, "image.png") not in known
    expect(row(window, "one.md")).to_contain_text("as on the server", **PATIENT)
    (specs / "one.md").write_text("# One, changed here\n")
    expect(row(window, "one.md")).to_contain_text("differs from the server", **PATIENT)


def test_the_active_file_is_pushed(service, window, specs):
    row(window, "one.md")
    window.ask("probe.show", str(specs / "one.md"))
    until(lambda: (text_of(window) or "").startswith("# One, changed"), "the file is not open")
    window.command("Kirosync: Push the Active File")
    until(
        lambda: documents(service)[id_of(window, "one.md")]["content"] == "# One, changed here\n", "it was not pushed"
    )
    assert documents(service)[id_of(window, "one.md")]["language"] == "markdown"
    close_editors(window)


def test_the_servers_version_is_taken_after_a_look_at_the_difference(service, window, specs):
    put_document(service, id_of(window, "two.md"), "# Two, by another hand\nmore\n", path=id_of(window, "two.md"))
    expect(row(window, "two.md")).to_contain_text("differs from the server", **PATIENT)
    act(window, "two.md", "Take the Server's Version")
    window.page.locator(".monaco-diff-editor").first.wait_for()
    window.sees("notification", "Replace")
    window.screenshot("difference")
    assert (specs / "two.md").read_text() == "# Two\n"
    window.page.get_by_role("button", name="Take It").click()
    until(lambda: (specs / "two.md").read_text() == "# Two, by another hand\nmore\n", "it was not taken")
    expect(row(window, "two.md")).to_contain_text("as on the server", **PATIENT)
    close_editors(window)


def test_a_document_that_is_not_here_can_be_taken(service, window, specs):
    put_document(service, id_of(window, "new/three.md"), "# Three\n", path=id_of(window, "new/three.md"))
    act(window, "three.md", "Take the Server's Version")
    window.sees("notification", "as the server has it?")
    window.page.get_by_role("button", name="Take It").click()
    until(
        lambda: (specs / "new/three.md").exists() and (specs / "new/three.md").read_text() == "# Three\n", "not taken"
    )
    close_editors(window)


def test_a_push_that_would_replace_what_another_wrote_asks_first(service, window, specs):
    (specs / "one.md").write_text("# One, changed again\n")
    expect(row(window, "one.md")).to_contain_text("differs from the server", **PATIENT)
    put_document(service, id_of(window, "one.md"), "# One, by another hand\n", path=id_of(window, "one.md"))
    act(window, "one.md", "Push")
    window.sees("dialog", "Somebody else has changed this")
    window.screenshot("contested")
    window.press("Escape")
    assert documents(service)[id_of(window, "one.md")]["content"] == "# One, by another hand\n"
    act(window, "one.md", "Push")
    window.sees("dialog", "Somebody else has changed this")
    window.page.get_by_role("button", name="Replace").click()
    until(
        lambda: documents(service)[id_of(window, "one.md")]["content"] == "# One, changed again\n", "it was not pushed"
    )


def test_a_path_that_leads_out_of_the_workspace_is_not_taken(service, window):
    put_document(service, "evil", "x", path=f"{window.folder.name}/../../evil.txt")
    expect(row(window, "evil.txt")).to_contain_text("only on the server", **PATIENT)
    window.ask("kirosync.take", {"id": "evil"})
    window.sees("notification", "no folder of this window holds this document")
    assert not (window.folder.parent.parent / "evil.txt").exists()


# Commands of the server


def terminal(window):
    """Return what the terminal in front shows, as a human can copy it."""
    return window.page.locator(".terminal-wrapper.active .xterm-rows").first.inner_text().replace("\xa0", " ")


def run(window, command):
    window.command("Kirosync: Run a Command on the Server")
    write(window, "A command for the server", command)


def test_a_command_of_the_server_streams_its_output_and_says_how_it_ended(service, agent, window):
    run(window, "printf 'one\\n'; sleep 2; printf '\\033[32mtwo\\033[0m\\n'; exit 3")
    until(
        lambda: "one" in terminal(window).split("\n")[-4:] or "\none" in terminal(window), "the first line did not come"
    )
    assert "exit code 3" not in terminal(window)
    until(lambda: "exit code 3, after 2." in terminal(window), "its end did not come")
    window.screenshot("terminal")
    command = next(iter(service.ask("GET", "/commands")[1]["commands"].values()))
    assert (command["outcome"], command["metadata"]) == ("exit", {"initiatedBy": "ide"})


def test_what_is_typed_goes_to_the_command_and_ctrl_c_cancels_it(service, agent, window):
    run(window, 'read -r name; echo "hello $name"; sleep 600')
    until(lambda: "read -r name" in terminal(window), "it was not begun")
    window.page.locator(".terminal-wrapper.active .xterm-helper-textarea").first.focus()
    window.type("world")
    window.press("Enter")
    until(lambda: "hello world" in terminal(window), "the command did not read it")
    window.press("Control+C")
    until(lambda: "cancelled" in terminal(window), "it was not cancelled")
    command = next(iter(service.ask("GET", "/commands")[1]["commands"].values()))
    assert command["outcome"] == "cancelled"


def test_a_command_run_for_a_conversation_is_told_there(service, agent, window):
    say(service, "c5", "what is there?")
    act(window, "what is there?", "Run a Command on the Server for This")
    write(window, "A command for the server", "echo found it")
    until(lambda: len(messages(service, "c5")) == 2, "it was not told")
    told = next(text for text in messages(service, "c5") if text != "what is there?")
    assert re.match(r"```\n\$ echo found it\nfound it\n+```\nexit code 0, after", told)


# What waits for the human


def ask(service, **question):
    return service.ask("POST", "/command", {"type": "user_input", **question})[1]["commandId"]


def result(service, identity):
    return service.ask("GET", f"/command/{identity}?wait=20")[1].get("result")


def test_what_waits_is_announced_and_answered_in_a_modal(service, window):
    identity = ask(service, prompt='May vm run this?\n{"command": "rm -r build"}', inputType="confirmation")
    row(window, "May vm run this?")
    window.sees("status", "Kirosync")
    row(window, "May vm run this?").click()
    dialog = window.sees("dialog", "May vm run this?")
    assert '{"command": "rm -r build"}' in dialog.inner_text()
    window.screenshot("confirmation")
    window.page.locator(".monaco-dialog-box").get_by_role("button", name="Yes").click()
    assert result(service, identity) == {"value": "yes"}
    expect(window.page.locator(".monaco-list-row", has_text="May vm run this?")).to_have_count(0, **PATIENT)


def test_a_choice_and_a_text_are_answered(service, window):
    few = ask(service, prompt="Which color?", inputType="choice", choices=["red", "blue"])
    row(window, "Which color?").click()
    window.sees("choice", "blue").click()
    assert result(service, few) == {"value": "blue"}
    many = ask(service, prompt="Which number?", inputType="choice", choices=[*"123456"])
    row(window, "Which number?").click()
    window.sees("choice", "4").click()
    assert result(service, many) == {"value": "4"}
    text = ask(service, prompt="What name?")
    row(window, "What name?").click()
    write(window, "What name?", "kirosync")
    assert result(service, text) == {"value": "kirosync"}


def test_a_question_can_be_refused_and_a_late_answer_is_said_to_be(service, window):
    identity = ask(service, prompt="Shall I?", inputType="confirmation")
    act(window, "Shall I?", "Refuse to Answer")
    command = service.ask("GET", f"/command/{identity}?wait=20")[1]
    assert (command["outcome"], command["error"]) == ("refused", "the human refused to answer")
    late = ask(service, prompt="Too late?", inputType="confirmation", expiresIn=4)
    row(window, "Too late?").click()
    window.sees("dialog", "Too late?")
    until(lambda: service.ask("GET", f"/command/{late}")[1].get("outcome") == "expired", "it did not expire")
    window.page.locator(".monaco-dialog-box").get_by_role("button", name="Yes").click()
    window.sees("notification", "the answer was not taken")


# What others write must not act here


LINK = "[the log](command:workbench.action.files.newUntitledFile)"


def test_a_link_in_a_question_is_no_link(service, window):
    identity = ask(service, prompt=f"It failed, see {LINK}. Go on?")
    found = window.sees("notification", "It failed, see [the")
    assert found.locator("a", has_text="the log").count() == 0
    row(window, "It failed, see").click()
    asked = window.sees("input", "It failed, see")
    assert asked.locator("a", has_text="the log").count() == 0
    window.press("Escape")
    service.ask("POST", f"/command/{identity}/cancel")


def test_a_link_in_a_conversation_executes_nothing(service, window):
    say(service, "c6", f"read {LINK} and [another](comm&#97;nd:workbench.action.files.newUntitledFile)")
    for link in ("the log", "another"):
        row(window, "read [the log]").click()
        preview = window.page.frame_locator("iframe.webview").frame_locator("iframe")
        preview.locator("a", has_text=link).click()
        window.page.wait_for_timeout(500)  # nothing is to happen, which nobody tells
        assert window.ask("probe.state")["untitled"] == 0
        close_editors(window)


def test_a_document_of_others_makes_nothing_be_pushed_that_is_not_shared(service, window):
    (window.folder / ".env").write_text("SECRET=hunter2\n")
    put_document(service, "planted", "x", path=f"{window.folder.name}/.env")
    expect(row(window, ".env")).to_contain_text("differs from the server", **PATIENT)
    (window.folder / ".kiro/specs/four.md").write_text("# Four\n")
    row(window, "four.md")
    window.command("Kirosync: Push the Shared Folders")
    until(lambda: id_of(window, "four.md") in documents(service), "nothing was pushed")
    assert "hunter2" not in json.dumps(documents(service))
