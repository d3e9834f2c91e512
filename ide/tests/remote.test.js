// Remote control at a line that does what a test wants it to; the real editor and the real service are in test_remote.py.
"use strict";

const assert = require("node:assert");
const test = require("node:test");
const { Remote } = require("../remote.js");

/** Return {remote, said, ran, commands, switches}: a window whose reports *answer* answers. */
const window = (answer = () => ({ attempt: 1 })) => {
  const [said, ran, commands, switches] = [[], [], {}, { on: true, allowed: ["*"] }];
  const link = {
    name: "w",
    copy: { closed: false, state: { commands } },
    report: async (id, patch) => said.push(patch.outcome ?? patch.status) && answer(patch, said, switches),
    insist: (ask) => ask(),
  };
  const execute = async (command) => ran.push(command);
  const editor = { execute, parseUri: String, folders: () => [], settings: () => switches };
  return { remote: new Remote(link, editor, () => {}, () => {}), link, said, ran, commands, switches };
};

const order = (more) => ({ type: "kiro_command", status: "pending", command: "x", ...more });
const settled = () => new Promise((resolve) => setTimeout(resolve, 20));

test("what is claimed is executed once, and reported", async () => {
  const once = (patch, said) => (said.indexOf("completed") < 0 || patch.result ? { attempt: 1 } : null);
  const { remote, said, ran, commands } = window(once);
  commands.c = order();
  remote.heard(["c"]);
  remote.heard(["c"]); // the copy is as it was before the claim: it asks again, and is told no
  await settled();
  assert.deepStrictEqual([said, ran], [["processing", "completed", "processing"], ["x"]]);
});

test("what another has claimed is not executed", async () => {
  const { remote, said, ran, commands } = window(() => null);
  commands.c = order();
  remote.heard(["c"]);
  await settled();
  assert.deepStrictEqual([said, ran], [["processing"], []]);
});

test("what was switched off while a claim was under way is not executed", async () => {
  const { remote, said, ran, commands } = window((patch, said, switches) => {
    switches.on = false;
    return { attempt: 1 };
  });
  commands.c = order();
  remote.heard(["c"]);
  await settled();
  assert.deepStrictEqual([said, ran], [["processing", "refused"], []]);
});

test("with remote control off only what is for this window alone is refused, all else is left to others", async () => {
  const { remote, said, ran, commands, switches } = window();
  switches.on = false;
  Object.assign(commands, { c: order(), d: order({ target: "w" }), e: order({ target: "other" }) });
  remote.heard(["c", "d", "e"]);
  await settled();
  assert.deepStrictEqual([said, ran], [["processing", "refused"], []]);
});

test("a window that has closed claims nothing more", async () => {
  const { remote, link, said, commands } = window();
  commands.c = order();
  link.copy.closed = true;
  remote.heard(["c"]);
  await settled();
  assert.deepStrictEqual(said, []);
});

test("a command that is gone from the copy holds up no other", async () => {
  const { remote, ran, commands } = window();
  Object.assign(commands, { a: order({ command: "a" }), b: order({ command: "b" }), c: order(), d: order({ command: "d" }) });
  remote.heard(["a", "b", "c", "d"]); // three at once
  delete commands.d;
  commands.e = order({ command: "e" });
  remote.heard(["e"]);
  await settled();
  assert.deepStrictEqual(ran, ["a", "b", "x", "e"]);
});
