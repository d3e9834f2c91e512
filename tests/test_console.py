"""The page in a real browser, on a laptop and on a phone, as someone would use it: by what they see and can reach."""

import json
import re
from pathlib import Path

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
    kept = json.loads((server_state(server) / "conversations" / "c1.json").read_text())
    assert [message["content"] for message in kept["messages"]] == ["hi there", "from the phone"]


def server_state(server):
    return Path(server.argv[server.argv.index("--state") + 1])
