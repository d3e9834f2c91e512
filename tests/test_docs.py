"""/docs in a real browser: each operation can be tried in place, and nothing that is answered can do anything."""

import re

import pytest
from conftest import SIZES, TOKEN
from playwright.sync_api import expect

import kirosync

HOSTILE = "</pre><script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"


@pytest.fixture(params=SIZES)
def docs(request, browser, server):
    """The documentation of a running service, on a laptop and on a phone; the browser had nothing to complain of."""
    width, height, scheme = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    page, said = context.new_page(), []
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.goto(f"{server.url}/docs")
    yield page
    context.close()
    assert not [text for text in said if "Failed to load resource" not in text]


def opened(docs, name):
    """The operation of that name, unfolded."""
    docs.locator(f"#{name} > summary").click()
    return docs.locator(f"#{name}")


def test_a_command_is_queued_and_looked_at_with_a_token_that_is_typed_once(docs, server):
    docs.get_by_label("Token", exact=True).fill(TOKEN)
    queue = opened(docs, "post_command")
    queue.get_by_label("Example", exact=True).select_option("read_file")
    assert '"path": "/etc/hostname"' in queue.get_by_label("Body", exact=True).input_value()
    queue.get_by_role("button", name="Send").click()
    expect(queue.get_by_role("status")).to_contain_text("200 OK")
    expect(queue.get_by_label("Headers", exact=True)).to_contain_text("x-request-id")
    ((identity, command),) = server.ask("GET", "/commands").json()["commands"].items()
    assert command["path"] == "/etc/hostname"
    expect(queue.get_by_label("Answer", exact=True)).to_contain_text(identity)
    docs.reload()
    assert docs.evaluate("sessionStorage.getItem('kirosync.token')") == TOKEN
    look = opened(docs, "get_command")
    look.get_by_label("id", exact=True).fill(identity)
    look.get_by_label("id", exact=True).press("Enter")
    expect(look.get_by_label("Answer", exact=True)).to_contain_text("/etc/hostname")


def test_what_is_refused_and_what_is_not_there_is_shown(docs):
    look = opened(docs, "get_command")
    look.get_by_role("button", name="Send").click()
    expect(docs.get_by_label("Token", exact=True)).to_be_focused()
    docs.get_by_label("Token", exact=True).fill("wrong")
    look.get_by_role("button", name="Send").click()
    expect(look.get_by_role("status")).to_contain_text("401")
    expect(look.get_by_label("Answer", exact=True)).to_contain_text("Valid API key required")
    docs.get_by_label("Token", exact=True).fill(TOKEN)
    look.get_by_label("wait", exact=True).fill("-1")
    look.get_by_role("button", name="Send").click()
    expect(look.get_by_label("Answer", exact=True)).to_contain_text("must be a number of seconds, 0 to 55")
    sync = opened(docs, "get_sync")
    sync.get_by_role("button", name="Send").click()
    expect(sync.get_by_label("Headers", exact=True)).to_contain_text("etag")
    docs.route("**/sync", lambda route: route.abort())
    sync.get_by_role("button", name="Send").click()
    expect(sync.get_by_role("status")).to_contain_text("There is no answer")


def test_nothing_that_is_answered_is_ever_run(docs, server):
    documents = {HOSTILE: {"content": HOSTILE, "timestamp": 1}}
    server.ask("POST", "/sync", json={"documents": documents})
    docs.get_by_label("Token", exact=True).fill(TOKEN)
    sync = opened(docs, "get_sync")
    sync.get_by_role("button", name="Send").click()
    expect(sync.get_by_label("Answer", exact=True)).to_contain_text("onerror")
    assert docs.title() == f"kirosync {kirosync.__version__}"
    assert docs.locator("main img").count() == docs.locator("main script").count() == 0


def test_it_fits_its_window_and_every_field_has_a_name(docs):
    docs.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    assert docs.evaluate("document.documentElement.scrollWidth <= innerWidth")
    named = "[...document.querySelectorAll('input, select, textarea')].every((each) => each.labels.length === 1)"
    assert docs.evaluate(named)
    links = "[...document.querySelectorAll('a[href^=\"#\"]')].map((each) => each.hash.slice(1))"
    assert docs.evaluate(f"{links}.filter((name) => !document.getElementById(name))") == []
    ids = docs.evaluate("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))


def test_it_can_be_used_without_a_mouse(docs):
    docs.get_by_label("Token", exact=True).fill(TOKEN)
    docs.locator("#get_agents > summary").focus()
    docs.keyboard.press("Enter")
    docs.keyboard.press("Tab")
    expect(docs.locator("#get_agents").get_by_role("button", name="Send")).to_be_focused()
    docs.keyboard.press("Enter")
    expect(docs.locator("#get_agents").get_by_label("Answer", exact=True)).to_contain_text('"agents"')


def test_the_page_has_nothing_that_its_policy_would_forbid_and_no_host_can_change_that(client):
    plain = client.get("/docs", headers={"Host": "example.org:3001"}).text
    assert "'http://example.org:3001/command'" in plain.replace("&#x27;", "'")
    hostile = client.get("/docs", headers={"Host": "a'; touch x; '<script>"}).text
    assert "touch x" not in hostile
    for text in (plain, hostile):
        assert len(re.findall("<script", text)) == len(re.findall("<style", text)) == 1
        assert kirosync.SCRIPT in text
        assert not re.search(r"<[^>]* (on\w+|style)=", text.replace(kirosync.SCRIPT, ""))
    assert not re.search(r"innerHTML|outerHTML|document\.write|insertAdjacent|eval\(|Function\(", kirosync.SCRIPT)
