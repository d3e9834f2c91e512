"""What is secret in the output of a command is not shown: in pieces or whole, live, in the result, over each link."""

import os
import re
from pathlib import Path

import hypothesis.strategies as some
import pytest
from conftest import TOKEN, Process, until
from hypothesis import given

import agent as program

SECRET = "correct-horse-battery"
VALUES = [b"abcdef", b"cdefgh", b"abcdefghij", b"aaaaaa", b"PRIVATE KEY", b"AKIAAAAAA:zzzz"]
KEY_ID, AWS_KEY = b"AKIAIOSFODNN7EXAMPLE", b"wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY"
OURS = b"kirosync_" + b"aZ09_-" * 7 + b"x"
BODY = b"MIIEowIBAAKCAQEA\n" * 5
PEM = b"-----BEGIN RSA PRIVATE KEY-----\n" + BODY + b"-----END RSA PRIVATE KEY-----\n"
LOOKS = {  # what is printed: what is shown
    b"id " + KEY_ID + b".": b"id AKIA[redacted].",
    b"id ASIA" + KEY_ID[4:]: b"id ASIA[redacted]",
    b"AWS_SECRET_ACCESS_KEY=" + AWS_KEY + b"\n": b"AWS_SECRET_ACCESS_KEY=[redacted]\n",
    b'"SecretAccessKey": "' + AWS_KEY + b'",': b'"SecretAccessKey": "[redacted]",',
    b"AWS Secret Access Key [None]: " + AWS_KEY: b"AWS Secret Access Key [None]: [redacted]",
    b"AWS Secret Access Key [****************AKIA]: " + AWS_KEY: (
        b"AWS Secret Access Key [****************AKIA]: [redacted]"
    ),
    b'\x1b[34m"SecretAccessKey"\x1b[0m: \x1b[32m"' + AWS_KEY: b'\x1b[34m"SecretAccessKey"\x1b[0m: \x1b[32m"[redacted]',
    b"aws_session_token = " + AWS_KEY * 9 + b"==\n": b"aws_session_token = [redacted]\n",
    b"> Authorization: Bearer abc.def-0123456789~+/==\r\n": b"> Authorization: Bearer [redacted]\r\n",
    b"authorization: bearer  " + b"j" * 5000 + b" end": b"authorization: bearer  [redacted] end",
    b"token " + OURS + b"\n": b"token kirosync_[redacted]\n",
    b"key:\n" + PEM + b"done": b"key:\n-----BEGIN RSA PRIVATE KEY-----[redacted]\ndone",
    PEM.replace(b"\n", b"\\n") + b'"}': b'-----BEGIN RSA PRIVATE KEY-----[redacted]\\n"}',
    PEM.replace(b"RSA ", b"").replace(b"\n", b"\r\n"): b"-----BEGIN PRIVATE KEY-----[redacted]\r\n",
    b"-----BEGIN AKIA PRIVATE KEY-----\n" + BODY: b"-----BEGIN AKIA PRIVATE KEY-----[redacted]",  # one sign in another
    b"-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: 1 (x)\n\n"
    + BODY: b"-----BEGIN PGP PRIVATE KEY BLOCK-----[redacted]",
}
INNOCENT = [
    b"a bearer token is sent, bearer authentication",
    b"Bearer short",
    b"AKIA and ASIA, AKIAIOSFODNN7EXAMPL, kirosync_token, kirosync.py",
    b"session_token\x1b[0m" + b"x" * 38 + b"_",  # two bytes short, unless those of a color count
    b"secret_access_key: the name of it, and no value; session token",
    b"-----BEGIN PUBLIC KEY-----\nMIIE\n-----END PUBLIC KEY-----",
    b"\xff\xfe\x00 no text \x80" * 50,
    b"",
]


def redacted(text, *cuts, values=()):
    """What is shown of *text* when it comes in pieces, cut at these places."""
    redactor = program.Redactor(values)
    ends = [*sorted(cuts), len(text)]
    shown = [redactor.feed(text[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return b"".join([*shown, redactor.feed(b"", last=True)])


# The rule


@pytest.mark.parametrize(("text", "shown"), LOOKS.items(), ids=range(len(LOOKS)))
def test_what_looks_like_a_secret_is_redacted_and_what_it_is_stays(text, shown):
    assert redacted(text) == shown


@pytest.mark.parametrize("text", INNOCENT, ids=range(len(INNOCENT)))
def test_what_does_not_look_like_a_secret_stays_as_it_is(text):
    assert redacted(text, values=VALUES) == text


@pytest.mark.parametrize("text", [*LOOKS, *INNOCENT, b"so abcdefghij, cdefghijk aaaaaaa PRIVATE KEY"], ids=repr)
def test_a_secret_cut_at_any_place_is_redacted_as_if_it_were_not(text):
    text = text[:600]
    whole = redacted(text, values=VALUES)
    for cut in range(len(text) + 1):
        assert redacted(text, cut, values=VALUES) == whole
    assert redacted(text, *range(len(text)), values=VALUES) == whole


PARTS = [
    *(b"AKIA", b"A" * 8, b"B2" * 8, b"secret access key", b" [None]: ", b"SecretAccessKey", b'": "', b"\x1b[0m"),
    *(b"w/+=" * 10, b"Bearer ", b"tok._~" * 3, b"kirosync_", b"x" * 43, b"-----BEGIN ", b"PRIVATE KEY", b"-----"),
    *(
        b"\n",
        b"MIIE\n",
        b"-----END ",
        b"abc",
        b"def",
        b"ghij",
        b"zzzz",
        b":",
        b"\xff\x00",
        b"session_token",
        b"m" * 3000,
    ),
]


@given(some.lists(some.sampled_from(PARTS) | some.binary(max_size=3), max_size=14).map(b"".join), some.data())
def test_however_output_is_cut_the_same_is_shown_and_no_value(text, more):
    cuts = more.draw(some.lists(some.integers(0, len(text)), max_size=9))
    shown = redacted(text, *cuts, values=VALUES)
    assert shown == redacted(text, values=VALUES)
    assert not [value for value in VALUES if value in shown.replace(program.REDACTED, b"\0")]


def test_values_that_overlap_or_touch_are_one():
    text = b"1 abcdefgh 2 abcdefabcdef 3 abcdefghij 4 abcdefghijabcdef."
    assert redacted(text, values=VALUES) == b"1 [redacted] 2 [redacted] 3 [redacted] 4 [redacted]."
    assert redacted(b"Bearer id:" + b"s" * 20, values=[b"id:ssssssss"]) == b"Bearer [redacted]ssssssssssss"
    assert redacted(b"Bearer abcdefghijklmnopq:rest", values=[b"nopq:rest"]) == b"Bearer [redacted]"


def test_a_value_of_many_lines_is_redacted_line_by_line_as_a_terminal_prints_it():
    value = b"first line\nsecond line\n-\n"
    assert redacted(value.replace(b"\n", b"\r\n"), values=[value]) == b"[redacted]\r\n[redacted]\r\n-\r\n"


def test_a_long_value_is_redacted_whole_and_no_more_than_a_part_is_held_back():
    value = bytes(range(33, 127)) * 20
    assert redacted(b"<" + value + b">", 500, 501, values=[value]) == b"<[redacted]>"
    redactor = program.Redactor([value])
    redactor.feed(value[:-1])
    assert len(redactor.text) - redactor.shown < program.PART_BYTES


def test_short_values_are_not_redacted():
    assert redacted(b"true story, secret", values=[b"true", b"", b"secret"]) == b"true story, [redacted]"


def test_a_private_key_without_an_end_goes_on_for_as_long_as_it_may_be_one():
    begin = b"-----BEGIN PRIVATE KEY-----"
    assert redacted(begin + BODY * 1000, 9999) == begin + b"[redacted]"
    with_an_end = begin + BODY * 1000 + b"-----END PRIVATE KEY----- ok"
    assert redacted(with_an_end, 9999) == begin + b"[redacted]-----END PRIVATE KEY----- ok"
    prose = b"# this is no key; " * 1000
    shown = redacted(begin + prose, 9999)
    assert shown.startswith(begin + b"[redacted]")
    assert 0 < len(begin + prose) - len(shown) - program.KEY_BYTES < 50


@pytest.mark.parametrize("unit", [b"x", b"\xff\0", b"A", b"MII=\n"])
@pytest.mark.parametrize("begin", [b"", b"-----BEGIN PRIVATE KEY-----", b"Bearer "])
def test_what_is_kept_stays_small_whatever_is_printed(unit, begin):
    redactor = program.Redactor([*VALUES, b"v" * 10_000])
    redactor.feed(begin)
    piece = unit * (program.PIPE_BYTES // len(unit))
    for _ in range(256):  # 64 MiB
        redactor.feed(piece)
        assert len(redactor.text) < 2 * program.SIGN_BYTES
        assert not redactor.spans


def test_what_hardly_begins_a_secret_is_shown_when_nothing_comes_and_the_rest_of_it_is_not():
    redactor = program.Redactor([b"hunter22"])
    assert (redactor.feed(b"> h"), redactor.doubt, redactor.relent(), redactor.doubt) == (b"> ", 1, b"h", 0)
    assert (redactor.feed(b"unter22!"), redactor.doubt) == (b"[redacted]!", 0)


def test_what_is_half_a_secret_is_held_back_until_the_end():
    redactor = program.Redactor([b"hunter22"])
    for character in (b"h", b"u", b"n"):
        assert redactor.feed(character) + redactor.relent() == character
    assert redactor.feed(b"t") + redactor.relent() == redactor.feed(b"er2") + redactor.relent() == b""
    assert redactor.feed(b"", last=True) == b"ter2"


def test_what_goes_on_of_a_secret_is_not_shown_when_nothing_comes():
    redactor = program.Redactor([b"abcdef"])
    redactor.feed(b"Bearer " + b"x" * 20)
    assert redactor.feed(b"ab") + redactor.relent() == b""
    assert redactor.feed(b"!") == b"!"


# Which values are secret


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *((name, True) for name in ("PGPASSWORD", "DB_PASSWORD", "GH_TOKEN", "AWS_SECRET_ACCESS_KEY", "api_secret")),
        *((name, False) for name in ("PATH", "SSH_AUTH_SOCK", "DB_PASSWORD_FILE", "AWS_ACCESS_KEY_ID", "TOKENIZER")),
    ],
)
def test_values_are_secret_by_the_names_of_their_variables(name, secret):
    assert bool(program.USUAL.of({name: SECRET}).values) is secret


def test_a_value_that_is_no_utf8_is_redacted():
    value = os.fsdecode(b"gr\xfc\xdfe-geheim")
    assert redacted(b": gr\xfc\xdfe-geheim", values=program.USUAL.of({"X_TOKEN": value}).values) == b": [redacted]"


def test_a_policy_names_variables_and_values_and_switches_redaction_off(tmp_path, monkeypatch):
    monkeypatch.setenv("DATABASE_URL", "postgres://ada:lovelace@db")
    monkeypatch.setenv("OTHER_TOKEN", SECRET)
    path = tmp_path / "policy.toml"
    (tmp_path / "secrets").write_bytes(b"open sesame\n\n  \xff\xfe\xfd\xfc\xfb\xfa\r\n")
    path.write_text(f'secret_names = ["DATABASE_*"]\nsecret_file = "{tmp_path}/secrets"\n')
    assert program.read_policy(path).secrets.values == [
        *(b"open sesame", b"\xff\xfe\xfd\xfc\xfb\xfa", b"postgres://ada:lovelace@db")
    ]
    path.write_text("redact = false")
    assert program.read_policy(path).secrets is None


def test_the_secrets_of_the_readme_are_those_of_the_agent(tmp_path):
    section = (Path(program.__file__).parent / "README.md").read_text().partition("## Secrets")[2].partition("\n## ")[0]
    named = section.partition("by its name: ")[2].partition(", in any case")[0]
    assert set(re.findall("`(.*?)`", named)) == {*program.SECRET_NAMES}
    (tmp_path / "secrets").write_text(SECRET)
    example = re.sub("^    ", "", section.partition("In the policy:\n\n")[2].partition("\n\n")[0], flags=re.MULTILINE)
    (tmp_path / "policy.toml").write_text(example.replace("~/secrets", f"{tmp_path}/secrets"))
    secrets = program.read_policy(tmp_path / "policy.toml").secrets
    assert secrets.values[0] == SECRET.encode()
    assert secrets.names.match("DATABASE_URL")


BAD = {
    "redact = 1": "line 1: redact must be true or false",
    "secret_names = []": "line 1: secret_names must be a list of names",
    'secret_file = "/no/such/file"': "line 1: secret_file: /no/such/file: No such file or directory",
    '\nsecret_file = "FILE"': "line 2: secret_file: its line 2 has less than 6 bytes",
}


@pytest.mark.parametrize(("text", "said"), BAD.items(), ids=range(len(BAD)))
def test_a_policy_that_is_not_understood_says_why_and_shows_no_secret(text, said, tmp_path):
    (tmp_path / "secrets").write_text("long enough\nshort\n")
    (tmp_path / "policy.toml").write_text(text.replace("FILE", f"{tmp_path}/secrets"))
    with pytest.raises(program.BadPolicy) as problem:
        program.read_policy(tmp_path / "policy.toml")
    assert said in str(problem.value)
    assert not [secret for secret in ("short", "long enough") if secret in str(problem.value)]


# Really running, over both links

AGENT_ENVIRONMENT = {"DEPLOY_PASSWORD": SECRET, "TINY_TOKEN": "tiny"}


def begin(agent, command, **more):
    return agent.ask("POST", "/command", json={"type": "execute_bash", "command": command, **more}).json()["commandId"]


def printed(agent, identity, stream="stdout"):
    return agent.ask("GET", f"/command/{identity}/output?stream={stream}").content


@pytest.mark.parametrize("pty", [False, True])
def test_secrets_are_shown_nowhere(agent, state, tmp_path, pty):
    command = "echo out $DEPLOY_PASSWORD $TINY_TOKEN; echo err $MY_API_KEY >&2; printf -- '" + PEM.decode() + "'"
    done = agent.run(type="execute_bash", command=command, env={"MY_API_KEY": "0123456789"}, pty=pty)
    out, err = done["result"]["stdout"].replace("\r", ""), done["result"]["stderr"]
    shown = ["out [redacted] tiny\n", "err [redacted]\n", "-----BEGIN RSA PRIVATE KEY-----[redacted]\n"]
    assert (out, err) == (("".join(shown), "") if pty else (shown[0] + shown[2], shown[1]))
    whole = b"".join(printed(agent, done["commandId"], stream).replace(b"\r", b"") for stream in ("stdout", "stderr"))
    assert sorted(whole.decode().splitlines()) == sorted("".join(shown).splitlines())
    kept = [path for path in [*state.rglob("*"), *tmp_path.glob("*.log")] if path.is_file()]
    assert not [path for path in kept if SECRET.encode() in path.read_bytes()]


def test_a_secret_that_is_printed_in_pieces_is_redacted_and_all_else_is_live(agent):
    halves = "sleep 0.3; printf correct-horse; sleep 0.4; printf -- '-battery'; printf 'Password: c'; read -r line"
    identity = begin(agent, f"printf 'go '; {halves}; echo ' end'", stdin=True)
    until(lambda: printed(agent, identity) == b"go ")
    until(lambda: printed(agent, identity) == b"go [redacted]Password: c")
    agent.ask("POST", f"/command/{identity}/input", json={"data": "x\n", "close": True})
    done = agent.ask("GET", f"/command/{identity}?wait=20").json()
    assert done["result"]["stdout"] == "go [redacted]Password: c end\n"


@pytest.mark.parametrize("prompt", ["Continue? [y/n] ", "Password for corr"])
def test_a_prompt_is_shown_within_some_tenths_of_a_second(agent, prompt):
    identity = begin(agent, f"printf '{prompt[:-1]}'; sleep 0.5; printf '%s' '{prompt[-1]}'; read -r line", stdin=True)
    shown = prompt if prompt.endswith(" ") else prompt[:-1]
    until(lambda: printed(agent, identity).decode() == shown, 5)
    agent.ask("POST", f"/command/{identity}/input", json={"close": True})
    assert agent.ask("GET", f"/command/{identity}?wait=20").json()["result"]["stdout"] == prompt


def test_sizes_and_offsets_are_those_of_what_is_shown(agent):
    count = 40_000
    done = agent.run(type="execute_bash", command=f"yes $DEPLOY_PASSWORD | head -n {count}")
    line = b"[redacted]\n"
    result = done["result"]
    assert (result["truncated"], result["size"]) == (True, {"stdout": count * len(line), "stderr": 0})
    half = program.STREAM_BYTES // 2
    whole = line * count
    left_out = len(whole) - 2 * half
    assert result["stdout"].encode() == whole[:half] + b"\n[... %d bytes left out ...]\n" % left_out + whole[-half:]
    assert printed(agent, done["commandId"]) == whole[: len(printed(agent, done["commandId"]))]
    tail = agent.ask("GET", f"/command/{done['commandId']}/output?tail=11")
    assert (tail.content, tail.headers["X-Output-Next"]) == (line, str(len(whole)))


def test_errors_are_redacted_and_files_are_not(agent, tmp_path):
    failed = agent.run(type="execute_bash", command="true", workingDir=f"/none/{SECRET}")
    assert failed["error"] == "workingDir: no /none/[redacted]"
    (tmp_path / "file").write_text(f"password={SECRET}\n")
    read = agent.run(type="read_file", path=str(tmp_path / "file"))["result"]
    assert (read["content"], read["size"]) == (f"password={SECRET}\n", 10 + len(SECRET))
    found = agent.run(type="code_search", query="password", path=str(tmp_path / "file"))["result"]
    assert found["matches"][0]["text"] == f"password={SECRET}"


def test_redaction_can_be_switched_off(server, state, tmp_path, start):
    (tmp_path / "policy.toml").write_text("redact = false\n")
    argv = ["agent.py", "--state", state, "--name", "open", "--policy", tmp_path / "policy.toml"]
    start(Process, *argv, environment=AGENT_ENVIRONMENT, log=tmp_path / "agent.log")
    done = server.run(type="execute_bash", command="echo $DEPLOY_PASSWORD", target="open")
    assert done["result"]["stdout"] == f"{SECRET}\n"
    assert "secrets in what commands print are not redacted" in (tmp_path / "agent.log").read_text()


def test_the_token_of_the_service_is_redacted(server, state, tmp_path, start):
    argv = ["agent.py", "--server", server.url, "--name", "far"]
    start(Process, *argv, environment={"KIROSYNC_TOKEN": TOKEN}, log=tmp_path / "agent.log")
    done = server.run(type="execute_bash", command=f"echo {TOKEN}")
    assert done["result"]["stdout"] == "[redacted]\n"
