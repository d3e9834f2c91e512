"""What a page shows: records by their ids, versions and what changed between them, and text as HTML that is safe."""

import base64
import hashlib
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote, urlsplit

import bs4
import hypothesis.strategies as some
import pytest
import webtest
from conftest import TOKEN, Server, until
from hypothesis import given

import kirosync

HI = {"role": "user", "content": "hi", "timestamp": 1710338438173}
SLOW = {"text": "(" * 60_000, "as": "code", "language": "basemake"}  # Pygments takes a quarter of an hour for it
BOLD = {"text": "**b**", "as": "markdown"}
SHOWN = "<p><strong>b</strong></p>\n"


@pytest.fixture
def service(store):
    service = kirosync.Service(store, kirosync.Keyring(store.directory, TOKEN))
    yield service
    service.renderer.end()


@pytest.fixture
def client(service):
    app = webtest.TestApp(service.app)
    app.authorization = ("Bearer", TOKEN)
    return app


@pytest.fixture
def render(client):
    """What POST /render makes of texts."""
    return lambda *texts: client.post_json("/render", {"texts": texts}).json["html"]


def children(pid):
    """The processes that *pid* has started and that have not ended."""
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = each.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(each.parent.name))
    return found


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# Records


def put(client, identity, *contents):
    for moment, content in enumerate(contents, 1):
        document = {"content": content, "timestamp": moment * 1000, "path": "/a.py"}
        client.post_json("/sync", {"documents": {identity: document}})


def test_a_conversation_and_a_document_are_read_by_their_ids(client):
    document = {"content": "x", "timestamp": 5, "path": "/a.py"}
    client.post_json("/sync", {"conversations": {"a/b c": [HI]}, "documents": {"src/ü.py": document}})
    assert client.get(f"/conversation/{quote('a/b c', safe='')}").json == {"messages": [HI]}
    assert client.get(f"/document/{quote('src/ü.py', safe='')}").json == document
    assert client.get("/conversation/none", status=404).json == {"error": "Conversation not found"}
    for path in ("/document/none", "/document/none/versions", "/document/none/diff", "/document/none?version=current"):
        assert client.get(path, status=404).json == {"error": "Document not found"}


def test_the_versions_of_a_document_are_listed_newest_first_and_each_can_be_read(client):
    put(client, "d", "one", "zwölf", "three")
    listed = client.get("/document/d/versions").json["versions"]
    assert [(each["timestamp"], each["size"]) for each in listed] == [(3000, 5), (2000, 6), (1000, 3)]
    assert listed[0]["version"] == "current"
    for each, content in zip(listed, ("three", "zwölf", "one"), strict=True):
        document = client.get(f"/document/d?version={each['version']}").json
        assert document == {"content": content, "timestamp": each["timestamp"], "path": "/a.py"}
    client.delete("/document/d")
    client.get("/document/d/versions", status=404)


def test_a_version_has_a_name_of_the_list_and_no_other_file_is_read(client, store):
    put(client, "d", "one", "two")
    put(client, "other", "three", "four")
    theirs = client.get("/document/other/versions").json["versions"][1]["version"]
    folder = store.directory / "history" / "documents" / "d"
    (folder / "secret.json").write_text('{"content": "secret", "timestamp": 1}')
    (folder / "0000000000000009-0123456789ab.json").write_text("spoiled")
    (folder / "0000000000000008-0123456789ab.json").symlink_to("/dev/zero")
    hostile = ("../other/" + theirs, "../../../tokens", "secret", "", ".", "current/../secret", "current\n", "\0")
    for name in (*hostile, "\u0660" * 16 + "-0123456789ab", "0000000000000007-0123456789AB", "x" * 10_000):
        for path in (f"/document/d?version={quote(name)}", f"/document/d/diff?from={quote(name)}"):
            said = client.get(path, status=400).json
            assert said["field"] in ("version", "from")
            assert "GET /document/ID/versions lists them" in said["error"]
    for name in (theirs, *(f"000000000000000{n}-0123456789ab" for n in (7, 8, 9))):
        assert client.get(f"/document/d?version={name}", status=404).json == {"error": "Version not found"}
        assert client.get(f"/document/d/diff?to={name}", status=404).json == {"error": "Version not found"}
    assert len(client.get("/document/d/versions").json["versions"]) == 2


def test_an_id_that_ends_as_a_route_does_is_still_an_id(server):
    documents = {"a": {"content": "a", "timestamp": 1}}
    documents |= {f"a/{word}": {"content": word, "timestamp": 1} for word in ("versions", "diff")}
    server.ask("POST", "/sync", json={"documents": documents})
    for word in ("versions", "diff"):
        assert server.ask("GET", f"/document/a%2F{word}?x=1").json()["content"] == word
        assert word in server.ask("GET", f"/document/a/{word}").json()
        assert word in server.ask("GET", f"/document/a%2f{word}/{word}").json()
        assert server.ask("GET", f"/document/a%2F%{ord(word[0]):x}{word[1:]}").json()["content"] == word


# The page

SCRIPT = 'let a = "<style>no</style>"; // ü\n'
PAGE = f"""<!doctype html><html lang=en><!-- <script>no</script> --><title>t</title>\r
<STYLE media=all>p {{ color: red }}\r
</STYLE><p onclick="x()">hi</p><script type=module>{SCRIPT}</script><script>1</script>"""
BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8", "Authorization": ""}


def sources(answer, name):
    """What a directive of the policy of *answer* allows."""
    policy = dict(each.split(" ", 1) for each in answer.headers["Content-Security-Policy"].split("; "))
    return policy[name].split()


def hashed(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_the_page_may_run_what_is_written_in_it_and_nothing_else(copied, tmp_path):
    server = copied({"console.html": PAGE})
    answer = server.ask("GET", "/", headers=BROWSER)
    assert answer.content == (tmp_path / "code" / "console.html").read_bytes()
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert sources(answer, "script-src") == [hashed(SCRIPT), hashed("1")]
    assert sources(answer, "style-src") == [hashed("p { color: red }\n")]
    rest = answer.headers["Content-Security-Policy"].split("; ")
    assert [each for each in rest if not each.startswith(("script-src", "style-src"))] == [
        *("default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"),
        *("frame-ancestors 'none'", "require-trusted-types-for 'script'", "trusted-types rendered"),
    ]
    for each in (answer, server.ask("GET", "/docs", headers=BROWSER)):
        said = each.headers
        assert (said["X-Content-Type-Options"], said["Referrer-Policy"]) == ("nosniff", "no-referrer")
        assert (said["Cross-Origin-Opener-Policy"], said["Cache-Control"]) == ("same-origin", "no-cache")
        assert sources(each, "default-src") == ["'none'"]
        again = server.ask("GET", urlsplit(each.url).path, headers={**BROWSER, "If-None-Match": said["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
    styles = re.findall("<style>(.*?)</style>", server.ask("GET", "/docs").text, re.DOTALL)
    assert sources(each, "style-src") == [*map(hashed, styles)]


def test_who_asks_for_no_page_or_where_there_is_none_gets_json(copied, tmp_path):
    server = copied({"console.html": PAGE})
    for accept in ("*/*", "application/json", ""):
        answer = server.ask("GET", "/", headers={"Accept": accept})
        assert answer.json()["service"] == "kirosync"
        assert "Accept" in re.split(", *", answer.headers["Vary"])
        assert "Content-Security-Policy" not in answer.headers
    console = tmp_path / "code" / "console.html"
    console.unlink()
    assert server.ask("GET", "/", headers=BROWSER).json()["service"] == "kirosync"
    console.write_text("<script>2</script>")
    answer = server.ask("GET", "/", headers=BROWSER)
    assert (answer.text, sources(answer, "script-src")) == ("<script>2</script>", [hashed("2")])
    console.write_text("<script>three</script>")
    answer = server.ask("GET", "/", headers=BROWSER)
    assert (answer.text, sources(answer, "script-src")) == ("<script>three</script>", [hashed("three")])
    assert (sources(answer, "style-src"), server.ask("GET", "/", headers=BROWSER).text) == (["'none'"], answer.text)


# What changed


def applied(diff, old):
    """Return the text that a unified diff makes of *old*."""
    lines, made, at = kirosync.lines_of(old), [], 0
    for hunk in re.split(r"^@@ ", diff, flags=re.MULTILINE)[1:]:
        head, _, body = hunk.partition("\n")
        start, count = re.match(r"-(\d+)(?:,(\d+))?", head).groups(default="1")
        start = int(start) - (count != "0")
        made += lines[at:start]
        for line in re.findall(r"[-+ ].*\n(?:\\.*\n)?", body):
            assert line[0] == "+" or lines[start] == line[1:]
            start += line[0] != "+"
            made += [line[1:]] if line[0] != "-" else []
        at = start
    return "".join(made + lines[at:]).replace("\n\\ No newline at end of file\n", "")


text = some.lists(some.sampled_from("abc"), max_size=12).map("\n".join)


@given(text, text)
def test_a_diff_applied_to_the_one_is_the_other_whichever_way_it_was_made(old, new):
    for make in (kirosync.fine_diff, kirosync.coarse_diff):
        diff = make(old, new, "1", "2")
        assert applied(diff, old) == new
        assert bool(diff) == (old != new)


def test_a_diff_says_what_changed_since_the_version_before_or_between_any_two(client):
    put(client, "d", "a\nb\nc\n", "a\nB\nc\n", "a\nB\nc")
    names = [each["version"] for each in client.get("/document/d/versions").json["versions"]]
    latest = f"--- {names[1]}\n+++ current\n@@ -1,3 +1,3 @@\n a\n B\n-c\n+c\n\\ No newline at end of file\n"
    assert client.get("/document/d/diff").json == {"diff": latest, "from": names[1], "to": "current"}
    said = client.get(f"/document/d/diff?from={names[2]}&to={names[1]}").json["diff"]
    assert said == f"--- {names[2]}\n+++ {names[1]}\n@@ -1,3 +1,3 @@\n a\n-b\n+B\n c\n"
    assert client.get("/document/d/diff?from=current").json["diff"] == ""
    put(client, "new", "x")
    assert client.get("/document/new/diff").json == {"diff": "", "from": "current", "to": "current"}


def test_what_differs_too_much_to_be_compared_in_time_is_shown_in_one_piece(client, service):
    dice = random.Random(7)  # each line is just not so frequent that difflib would pass over it
    old, new = ("0\n" + "".join(f"{dice.randrange(150)}\n" for _ in range(150_000)) for _ in range(2))
    put(client, "slow", old, new)
    put(client, "large", "a\n" + "x" * kirosync.TEXTS_BYTES, "a\ny")
    for identity in ("slow", "large"):
        said = client.get(f"/document/{identity}/diff").json
        assert said["coarse"] is True
        assert said["diff"].count("\n@@ -") == 1
    assert applied(client.get("/document/slow/diff").json["diff"], old) == new


# Text


def test_markdown_becomes_html_and_code_in_it_is_coloured(render):
    text = "# H\n\n|a|b|\n|-|-:|\n|1|~~2~~|\n\n```python\nx = 1\n```\n\n```nonsense\n<x>\n```\n\n3. c\n"
    made = render({"text": text, "as": "markdown"})[0]
    assert made == (
        "<h1>H</h1>\n<table>\n<thead>\n<tr>\n<th>a</th>\n"
        '<th align="right">b</th>\n</tr>\n</thead>\n<tbody>\n<tr>\n<td>1</td>\n<td align="right"><s>2</s></td>\n</tr>\n'
        '</tbody>\n</table>\n<pre><code class="language-python"><span class="n">x</span> <span class="o">=</span> '
        '<span class="mi">1</span>\n</code></pre>\n<pre><code class="language-nonsense">&lt;x&gt;\n</code></pre>\n'
        '<ol start="3">\n<li>c</li>\n</ol>\n'
    )


def test_a_link_goes_to_the_web_or_to_a_mailbox_and_an_image_is_a_link(render):
    link = 'target="_blank" rel="noopener noreferrer nofollow"'
    made = render(*({"text": each, "as": "markdown"} for each in (
        "[a](https://x.example/?a=1&b=2) <mailto:a@x.example>",
        "![cat](http://x.example/c.png) ![](http://x.example/d.png)",
        "[![badge](https://x.example/b.svg) now](https://y.example)",
        "![no](/etc/passwd) [rel](/docs) [two](//x.example)",
    )))  # fmt: skip
    assert made[0] == (
        f'<p><a href="https://x.example/?a=1&amp;b=2" {link}>a</a> '
        f'<a href="mailto:a@x.example" {link}>mailto:a@x.example</a></p>\n'
    )
    assert made[1] == (
        f'<p><a href="http://x.example/c.png" {link}>cat</a> <a href="http://x.example/d.png" {link}>image</a></p>\n'
    )
    assert made[2] == f'<p><a href="https://y.example" {link}>badge now</a></p>\n'
    assert "href" not in made[3]
    text = "see https://x.example/a_b_c?d=1&e=2, [not https://y.example](https://z.example) or `https://code`; ftp://x"
    shown = render({"text": text, "as": "markdown"})[0]
    assert f'see <a href="https://x.example/a_b_c?d=1&amp;e=2" {link}>https://x.example/a_b_c?d=1&amp;e=2</a>,' in shown
    assert re.findall('href="(.*?)"', shown)[1:] == ["https://z.example"]


HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(1)><svg onload=alert(1)><iframe src=javascript:alert(1)>",
    "[x](javascript:alert(1)) [x](JaVaScRiPt&#58;alert(1)) [x](\x01javascript:alert(1)) <javascript:alert(1)>",
    "[x](data:text/html;base64,PHNjcmlwdD4=) [x](vbscript:x) [x](file:///etc/passwd) [x](blob:x) ![x](javascript:1)",
    '[x](https://a.example "\\" onmouseover=alert(1) x=\\"") ![\\" onerror=alert(1)](https://a.example/"onload="x)',
    "[x](https://a.example/'><script>alert(1)</script>)",
    '``` "onclick=alert(1) class="x\nx\n```\n\n```"><script>alert(1)</script>\nx\n```\n\n~~~language-x button\nx\n~~~',
    "```html\n<script>alert(1)</script><p onclick=x>\n```\n\n```js\n'</code></pre><script>alert(1)</script>'\n```",
    "| a |\n|:-:|\n| <b style=x> |\n\n<style>*{display:none}</style>\n\n<a id=x name=y href=https://a.example>z</a>",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#x3c;script&#x3e; \\<script\\> <!-- --><![CDATA[<script>]]><?x?>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=alert(1)&gt;'>",
    'https://a.example/"onmouseover="alert(1) https://a.example/<script>alert(1)</script> http://javascript:alert(1)',
    "[a]: javascript:alert(1)\n[b]: <data:text/html,x> 'x'\n\n[a] [b] [x][a]\n\nx[^1]\n\n[^1]: y",
    "\0\ufffe\u2028\u202e\x1b[31m<script\0>alert(1)</script\0>",
]
LEFT = {"a": {"href", "title", "target", "rel"}, "ol": {"start"}, "code": {"class"}, "span": {"class"}}
LEFT |= {"th": {"align"}, "td": {"align"}}


@pytest.mark.parametrize("manner", [{"as": "markdown"}, {"as": "code", "language": "html"}, {"as": "code"}])
@pytest.mark.parametrize("hostile", HOSTILE)
def test_nothing_that_is_written_becomes_more_than_text_links_and_colours(render, hostile, manner):
    made = render({"text": hostile, **manner}, {"text": f"> - {hostile}", **manner})
    for each in made:
        for tag in bs4.BeautifulSoup(each, "html.parser").find_all(True):
            assert tag.name in kirosync.TAGS
            assert set(tag.attrs) <= LEFT.get(tag.name, set()), tag
            assert urlsplit(tag.get("href", "https://x")).scheme in ("http", "https", "mailto")
            assert all(re.fullmatch(r"[a-z]\w{0,2}|language-[\w+#.-]+", name) for name in tag.get("class", ())), tag
        assert not re.search(r"<(?!/?(?:" + "|".join(kirosync.TAGS) + r")\b)", each)


def test_code_has_a_line_for_each_of_its_lines_and_each_closes_what_it_opens(render):
    texts = ["", "\n", "\n\n", "a", "a\n", " a\n\n", "'''x\n\ny'''\n", "a\r\nb\rc\n", "x\x0cy\x85z\u2028", "\ufeffa\n"]
    languages = ({"language": "python"}, {"path": "/src/main.py"}, {"language": "none", "path": "x.none"}, {})
    for known in languages:
        made = render(*({"text": each, "as": "code", **known} for each in texts))
        for text, shown in zip(texts, made, strict=True):
            assert shown.count("\n") == text.count("\n")
            for line in shown.split("\n"):
                assert line.count("<span") == line.count("</span>")
                assert not re.sub(r'<span class="\w+">|</span>', "", line).count("<")
    assert render({"text": "'''x\ny'''", "as": "code", "language": "none", "path": "a/B.py"})[0] in (
        '<span class="sd">&#39;&#39;&#39;x</span>\n<span class="sd">y&#39;&#39;&#39;</span>',
        "<span class=\"sd\">'''x</span>\n<span class=\"sd\">y'''</span>",
    )
    assert render({"text": "<&", "as": "code"}) == ["&lt;&amp;"]


def test_what_is_nested_ten_thousand_deep_or_one_endless_line_is_shown_or_left_as_it_is(render):
    hostile = [">" * 10_000 + "x", "- " * 10_000, "*" * 20_000, "![" * 9_000, "[" * 9_000 + "](" * 9_000]
    hostile += ["x" * kirosync.TEXT_BYTES, "a|" * 9_000 + "\n" + "-|" * 9_000 + "\n" + "x\n" * 99, "<" * 99_000]
    for each in (">" * 101 + "hidden", "- " * 60 + "hidden", ">" * 30 + "hidden"):
        assert "hidden" in (render({"text": each, "as": "markdown"})[0] or "hidden")
    for each in hostile:
        made = render({"text": each, "as": "markdown"})
        assert made[0] is None or made[0].startswith("<")
        assert len(made[0] or "") < kirosync.HTML_BYTES
    assert render(BOLD) == [SHOWN]


def test_a_text_that_is_too_slow_is_left_as_it_is_and_keeps_nobody_waiting(start, state, tmp_path):
    server = start(Server, state, tmp_path / "log")
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(server.ask, "POST", "/render", json={"texts": [SLOW, BOLD, SLOW]})
        until(lambda: children(server.popen.pid))
        answered = 0
        while not slow.done():
            assert server.ask("GET", "/sync").ok
            answered += 1
        assert slow.result().json() == {"html": [None, SHOWN, None]}
    assert answered > 20  # one that had to wait for it would have been the last
    process = children(server.popen.pid)
    assert server.ask("POST", "/render", json={"texts": [SLOW]}).json() == {"html": [None]}
    assert children(server.popen.pid) == process  # it is known, and was not tried again


def test_what_is_too_long_or_too_many_is_left_as_it_is(client, render):
    half = {"text": "x" * (kirosync.TEXT_BYTES // 2 + 1), "as": "code"}
    assert [bool(each) for each in render(*[half] * 16, BOLD)] == [True] * 15 + [False, True]
    long = {"text": "ü" * (kirosync.TEXT_BYTES // 2 + 1), "as": "markdown"}
    assert render(long, BOLD, long) == [None, SHOWN, None]
    assert render(*[BOLD] * kirosync.TEXTS) == [SHOWN] * kirosync.TEXTS
    said = client.post_json("/render", {"texts": [BOLD] * (kirosync.TEXTS + 1)}, status=400).json
    assert said["field"] == "texts"
    assert "length <= 100" in said["error"]
    said = client.post_json("/render", {"texts": [{"text": "x", "as": "html"}]}, status=400).json
    assert (said["field"], said["error"].endswith("possible are markdown, code")) == ("texts[0].as", True)


def test_the_process_that_renders_is_replaced_when_it_was_killed(render, service):
    assert render(BOLD) == [SHOWN]
    first = service.renderer.child
    first.kill()
    first.wait()
    assert render(BOLD) == [SHOWN]
    assert service.renderer.child.pid != first.pid
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(render, SLOW, BOLD)
        until(lambda: service.renderer.turn.queue)
        time.sleep(0.3)
        service.renderer.child.kill()
        assert slow.result() == [None, SHOWN]


def test_it_has_no_secret_and_no_more_than_it_needs(render, service, monkeypatch):
    monkeypatch.setenv("KIROSYNC_TOKEN", "secret")
    assert render(BOLD) == [SHOWN]
    pid = service.renderer.child.pid
    limits = Path(f"/proc/{pid}/limits").read_text()
    for name, value in (("address space", kirosync.RENDER_MEMORY), ("core file size", 0), ("file size", 0)):
        assert re.search(rf"^Max {name} +{value} +{value} ", limits, re.MULTILINE)
    if os.getuid() == 0:  # others cannot look into it
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert {each.partition(b"=")[0] for each in environment if each} <= {b"PATH", b"LANG"}


def test_it_is_ended_when_there_is_nothing_to_do_and_is_back_when_there_is(copied):
    server = copied(RENDER_IDLE_S=0.5)
    assert server.ask("POST", "/render", json={"texts": [BOLD]}).json() == {"html": [SHOWN]}
    until(lambda: not children(server.popen.pid), 20)
    assert server.ask("POST", "/render", json={"texts": [BOLD]}).json() == {"html": [SHOWN]}


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_when_the_service_does_however_that_ends(start, state, tmp_path, number, busy):
    server = start(Server, state, tmp_path / "log")
    server.ask("POST", "/render", json={"texts": [BOLD]})
    (pid,) = children(server.popen.pid)
    with ThreadPoolExecutor() as pool:
        if busy:
            used = time_used(pid)
            slow = pool.submit(server.ask, "POST", "/render", json={"texts": [SLOW]})
            until(lambda: time_used(pid) > used + 0.2)
        server.end(number)
        until(lambda: not is_running(pid), 20)
        if busy:
            slow.exception()


def time_used(pid):
    """The seconds of CPU that a process has had."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / 100


def test_many_who_ask_at_once_are_answered_soon_if_only_with_nothing(render, service, monkeypatch):
    assert render(BOLD) == [SHOWN]
    monkeypatch.setattr(kirosync, "RENDER_WAIT_S", 0.2)
    assert service.renderer.turn.acquire(0)
    with ThreadPoolExecutor(16) as pool:
        assert [*pool.map(lambda _: render(BOLD, BOLD), range(16))] == [[None, None]] * 16
    service.renderer.turn.release()
    monkeypatch.undo()
    assert render(BOLD) == [SHOWN]


def test_who_sends_what_is_slow_again_and_again_keeps_others_waiting_for_one_of_them(service):
    renderer, order = service.renderer, [BOLD]
    hostile = [{**SLOW, "text": "(" * (60_000 + n)} for n in range(12)]
    until_ = time.monotonic() + kirosync.RENDER_WAIT_S
    with ThreadPoolExecutor() as pool:
        for n in range(4):
            pool.submit(renderer.make_all, "hostile", hostile[n::4], until_)
        until(lambda: renderer.child and renderer.turn.queue)
        assert pool.submit(renderer.make_all, "other", order, until_).result() == [SHOWN]
        assert len(renderer.slow) <= 1  # and not those of four lists
        renderer.abandon()


def test_who_waits_for_a_turn_gets_it_in_the_order_of_coming_or_not_at_all():
    turn, order = kirosync.Turn(), []

    def take(name, seconds):
        if turn.acquire(time.monotonic() + seconds):
            order.append(name)
            turn.release()

    assert turn.acquire(0)
    with ThreadPoolExecutor() as pool:
        for place, (name, seconds) in enumerate([("a", 30), ("b", 0.01), ("c", 30)], 2):
            pool.submit(take, name, seconds)
            until(lambda place=place, name=name: len(turn.queue) >= place or name == "b")
        until(lambda: len(turn.queue) == 3)
        turn.release()
    assert order == ["a", "c"]
    assert not turn.queue


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("nh3", "raise ImportError('nh3 is not there')", "nh3 is not there"),
        ("markdown_it", "raise ImportError", "ImportError"),
        ("pygments", "half of a libr", "invalid syntax"),
    ],
)
def test_without_the_libraries_all_else_goes_on_and_it_is_said_once(copied, tmp_path, name, text, said):
    server = copied({f"{name}.py": text})
    for _ in range(3):
        assert server.ask("POST", "/render", json={"texts": [BOLD, SLOW]}).json() == {"html": [None, None]}
    assert (tmp_path / "log").read_text().count("see requirements-page.txt") == 1
    assert said in (tmp_path / "log").read_text()
    for moment, content in enumerate(("a\n", "b\n")):
        document = {"content": content, "timestamp": moment}
        server.ask("POST", "/sync", json={"documents": {"d": document}})
    assert server.ask("GET", "/document/d/diff").json()["diff"].endswith("\n-a\n+b\n")
