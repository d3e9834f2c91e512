// The rules of the extension, without an editor.
"use strict";

const assert = require("node:assert");
const test = require("node:test");
const rules = require("../rules.js");

const uri = (text) => ({ uri: text });

test("an argument is what the editor wants it to be", () => {
  const given = ["file:///a b", "vscode-remote://h/x", '{"x":[1]}', "42", "null", '"42"', "plain", "{", "", "https://a.b"];
  const wanted = [uri("file:///a b"), uri("vscode-remote://h/x"), { x: [1] }, 42, null, "42", "plain", "{", "", "https://a.b"];
  assert.deepStrictEqual(given.map((text) => rules.argument(text, uri)), wanted);
});

test("a result is told as text, whatever it is", () => {
  const shared = { a: 1 };
  const cycle = { name: "round", list: [shared, shared] };
  cycle.self = cycle;
  for (const [value, text] of [
    [undefined, ""],
    [null, ""],
    ["text", "text"],
    [{ a: [1n] }, '{"a":["1"]}'],
    [() => 1, ""],
    [cycle, '{"name":"round","list":[{"a":1},{"a":1}],"self":"[circular]"}'],
    ["half \ud800 of a pair", "half \ufffd of a pair"],
  ]) assert.strictEqual(rules.textOf(value), text);
  const long = rules.textOf("😀".repeat(3 << 20));
  assert.match(long, /\[cut: 6291456 characters\]$/);
  assert.strictEqual(rules.wellFormed(long), long);
});

test("patterns allow what they cover, and take no longer for odd ones", () => {
  const covers = (pattern, command) => rules.allows([pattern], command);
  assert.ok(covers("*", "a.b") && covers("a.*", "a.b") && covers("*.b", "a.b") && covers("a*c*e", "abcde") && covers("a.b", "a.b"));
  assert.ok(!covers("a.*", "b.a.b") && !covers("a", "ab") && !covers("a*a", "a") && !covers("a.b", "axb") && !covers("", "a"));
  assert.ok(!rules.allows([], "a"));
  const began = performance.now();
  assert.ok(!covers("*.files.*.new*File", ".files.".repeat(20000)));
  assert.ok(performance.now() - began < 1000);
});

test("a command is for the window that it names, or that has its folder open", () => {
  const is = (more, folders = ["/w/app"]) => rules.isFor({ type: "kiro_command", ...more }, "me", folders);
  assert.ok(is({}) && is({ target: "me" }) && is({ workspacePath: "/w/app/src" }) && is({ target: "me", workspacePath: "/x" }));
  assert.ok(!is({ target: "other" }) && !is({ workspacePath: "/w/apple" }) && !is({ type: "execute_bash" }));
  assert.ok(rules.contains("C:\\x", "c:/X/y") && !rules.contains("/x", "/"));
});

test("what a service says is shown without links that act", () => {
  const text = "[Answer](command:a?[1]) [x][y] Command:b";
  assert.doesNotMatch(rules.unlinked(text), /\](\(|\[)|command:/i);
  assert.strictEqual(rules.unlinked(text).replaceAll("\u200b", ""), text);
  const shown = rules.markdownOf("c", [{ role: "user", content: "[x](command:a)", timestamp: 1 }], String);
  assert.doesNotMatch(shown, /command:/);
});

test("a code block that is still being written ends with its message", () => {
  const messages = ["```js\nlet a", "~~~\nb\n~~~", "````\n```\nc"].map((content) => ({ role: "assistant", content, timestamp: 1 }));
  const shown = rules.markdownOf("c", messages, String);
  assert.match(shown, /let a\n```\n\n---\n/);
  assert.match(shown, /~~~\nb\n~~~\n\n---\n/);
  assert.match(shown, /```\nc\n````\n$/);
});

test("ids and names are such as the service takes", () => {
  const digest = (text) => `${text.length}`.padStart(64, "0");
  assert.strictEqual(rules.documentId("app", ".kiro/specs/a.md", digest), "app/.kiro/specs/a.md");
  for (const path of ["x".repeat(200), "語".repeat(60)]) {
    const id = rules.documentId("app", path, digest);
    assert.ok(id.length <= 128 && Buffer.byteLength(encodeURIComponent(id)) <= 220);
  }
  const name = rules.nameOfWindow("host\n", "語".repeat(60), "abc123");
  assert.match(name, /^host\/語+#abc123$/);
  assert.ok(Buffer.byteLength(encodeURIComponent(name)) <= 220);
});

test("a push is contested if somebody else has written since it was in step", () => {
  const digest = (text) => `#${text}`;
  assert.ok(rules.isContested("mine", "theirs", "#before", digest) && rules.isContested("mine", "theirs", undefined, digest));
  assert.ok(!rules.isContested("mine", "theirs", "#theirs", digest) && !rules.isContested("same", "same", undefined, digest));
  assert.ok(!rules.isContested("mine", undefined, undefined, digest));
});

test("a question is what the arguments of askUser say", () => {
  assert.deepStrictEqual(rules.questionOf("?", null), { type: "user_input", prompt: "?", inputType: "text" });
  assert.deepStrictEqual(rules.questionOf("?", { choices: ["a"] }), {
    ...{ type: "user_input", prompt: "?", inputType: "choice", choices: ["a"] },
  });
  assert.throws(() => rules.questionOf(5), /wants the question as a text/);
});

test("how a command ended is said in words", () => {
  assert.strictEqual(rules.endingOf({ outcome: "exit", result: { exitCode: 3, durationMs: 2000 } }), "exit code 3, after 2.0 s");
  assert.strictEqual(rules.endingOf({ outcome: "lost", error: "gone", startedAt: 1, endedAt: 501 }), "lost: gone, after 0.5 s");
});
