// The JavaScript client: its rules by the vectors, and copies in step with a real service, whatever befalls that.
//
//     PYTHON=.venv/bin/python node --test tests/client.test.js
"use strict";

const assert = require("node:assert/strict");
const { spawn, spawnSync } = require("node:child_process");
const { EventEmitter, on, once } = require("node:events");
const fs = require("node:fs");
const http = require("node:http");
const os = require("node:os");
const path = require("node:path");
const readline = require("node:readline");
const nodeTest = require("node:test");
const { inspect } = require("node:util");

const kirosync = require("../clients/kirosync.js");

const ROOT = path.dirname(__dirname);
const TOKEN = "test-token";
const HI = { role: "user", content: "hi", timestamp: 1 };
const YO = { role: "assistant", content: "yo", timestamp: 2 };

const test = (name, act) => nodeTest(name, { timeout: 20_000 }, act);
const document = (content, timestamp = 1) => ({ content, timestamp });
const plain = (value) => JSON.parse(JSON.stringify(value)); // records by id have no prototype

// ---------------------------------------------------------------------------------------- Fixtures

const endings = new WeakMap();

/** Do *act* when the test ends, the last first; by itself node begins with the first. */
function atEnd(t, act) {
  if (!endings.has(t)) {
    endings.set(t, []);
    t.after(async () => {
      for (const end of endings.get(t).reverse()) await end();
    });
  }
  endings.get(t).push(act);
}

function folder(t) {
  const made = fs.mkdtempSync(path.join(os.tmpdir(), "kirosync-"));
  atEnd(t, () => fs.rmSync(made, { recursive: true, force: true }));
  return made;
}

/** Start the service over *state*; return its {url, port, end}. */
async function start(t, state, port = 0) {
  const clean = Object.entries(process.env).filter(([name]) => !name.startsWith("KIROSYNC_"));
  const argv = ["kirosync.py", "serve", "--port", String(port), "--state", state];
  const child = spawn(process.env.PYTHON ?? "python3", argv, {
    cwd: ROOT,
    env: { ...Object.fromEntries(clean), KIROSYNC_TOKEN: TOKEN },
    stdio: ["ignore", "ignore", "pipe"],
  });
  const ended = once(child, "exit");
  const end = async () => {
    child.kill("SIGTERM");
    return (await ended)[0];
  };
  atEnd(t, end);
  const url = await address(child.stderr);
  return { url, port: new URL(url).port, end };
}

/** Return the address that a service says it listens at, and go on reading: a full pipe would stop it. */
function address(stderr) {
  return new Promise((resolve, reject) => {
    const said = [];
    const lines = readline.createInterface(stderr);
    lines.on("line", (line) => {
      said.push(line);
      const at = / on (http:\/\/[^\s,]+)/.exec(line);
      if (at) resolve(at[1]);
    });
    lines.on("close", () => reject(new Error(`no service: ${said.join("\n")}`)));
  });
}

/** Return a service whose every request is told to *asked* as "METHOD path". */
function watched(url, asked) {
  const fetched = (at, options) => {
    asked.emit("request", `${options.method} ${at.slice(url.length)}`);
    return fetch(at, options);
  };
  return new kirosync.Service(url, TOKEN, { fetch: fetched });
}

/** Let *copy* follow until the test ends; return what it hears, as an iterator. */
function follow(t, copy) {
  const told = new EventEmitter();
  const heard = on(told, "change");
  const following = copy.follow((change) => told.emit("change", change));
  atEnd(t, () => {
    copy.close();
    return following;
  });
  return heard;
}

/** Return the first change that fits. */
async function heardOf(heard, fits) {
  for (;;) {
    const [change] = (await heard.next()).value;
    if (fits(change)) return change;
  }
}

const about = (kind, id) => (change) => [...change.changed[kind], ...change.deleted[kind]].includes(id);

/** A storage with room for so many characters. */
class Storage {
  constructor(room = Infinity) {
    this.room = room;
    this.items = new Map();
  }

  getItem(key) {
    return this.items.get(key) ?? null;
  }

  setItem(key, text) {
    if (text.length > this.room) throw new Error("QuotaExceededError");
    this.items.set(key, text);
  }
}

/** Start a server that is none of ours and answers with *act*; return its url. */
async function stranger(t, act) {
  const server = http.createServer(act).listen(0, "127.0.0.1");
  atEnd(t, () => {
    server.closeAllConnections();
    return new Promise((resolve) => server.close(resolve));
  });
  await once(server, "listening");
  return `http://127.0.0.1:${server.address().port}`;
}

// ---------------------------------------------------------------------------------------- Rules

test("every vector is what the client makes of it, and nothing that it is given changes", () => {
  const vectors = JSON.parse(fs.readFileSync(path.join(__dirname, "vectors.json"), "utf8"));
  assert.ok(vectors.length > 100);
  for (const { rule, of, gives } of vectors) {
    const before = JSON.stringify(of);
    assert.deepEqual(plain(kirosync[rule](...of)), gives, before);
    assert.equal(JSON.stringify(of), before);
  }
});

test("content is compared and measured by code points", () => {
  const [face, high] = ["\u{1f600}", "\uffee"];
  assert.deepEqual(kirosync.joinDocuments(document(face), document(high)), document(face));
  const [one, two] = [face, `${high}${high}`].map((content) => ({ ...HI, id: 1, content }));
  assert.deepEqual(kirosync.mergeMessages([one], [two]), [two], "one character is less than two");
  assert.equal(kirosync.mergeMessages([{ ...HI, content: "\ud83d" }], [{ ...HI, content: face }]).length, 2);
  const value = { [face]: 1, [high]: [null, true, '\n"é\u2028'], a: {} };
  assert.equal(kirosync.canonical(value), `{"a":{},"${high}":[null,true,"\\n\\"é\u2028"],"${face}":1}`);
  assert.equal(kirosync.canonical("\ud83d"), '"\ud83d"');
});

test("an id of another type is another id", () => {
  const messages = [7, "7", 7].map((id) => ({ ...HI, id }));
  assert.deepEqual(kirosync.mergeMessages([], messages).map((message) => message.id), [7, "7"]);
});

test("an id or a field may have the name of something that every object has", () => {
  const empty = { conversations: {}, documents: {}, commands: {} };
  for (const name of ["__proto__", "constructor", "toString"]) {
    const named = (record) => Object.fromEntries([[name, record]]); // JSON.parse makes the same of it
    const documents = named({ timestamp: 1, content: "x", ...named(1) });
    const some = { conversations: named([HI]), documents, commands: named({}) };
    const state = kirosync.merge(empty, some);
    assert.equal(JSON.stringify(kirosync.merge(state, some)), JSON.stringify(some));
    assert.equal(state.documents[name].content, "x");
    assert.equal(JSON.stringify(kirosync.missing(empty, state).documents), JSON.stringify(some.documents));
    assert.deepEqual(kirosync.missing(state, state), {});
    const left = kirosync.applied(state, { deleted: { conversations: [name], documents: [name], commands: [name] } });
    assert.deepEqual(plain(left), empty);
  }
  assert.equal({}.content, undefined);
});

// ---------------------------------------------------------------------------------------- Service

test("what a server answers is what is thrown, and the token is in none of it", async (t) => {
  const answers = {
    "/401": [401, { error: "Unauthorized" }],
    "/403": [403, "<h1>no</h1>"],
    "/403/scope": [403, { error: "may not", scopes: ["client"] }],
    "/422": [422, { error: "not so" }],
    "/429": [429, { error: "slowly" }, { "Retry-After": "7" }],
    "/503": [503, { error: "busy" }, { "Retry-After": "soon" }],
    "/302": [302, "", { Location: "/200" }],
    "/404": [404, {}],
    "/409": [409, {}],
    "/200": [200, { cursor: 1 }],
  };
  const url = await stranger(t, (request, response) => {
    if (!answers[request.url]) return request.socket.destroy();
    const [status, body, headers] = answers[request.url];
    response.writeHead(status, headers).end(typeof body === "string" ? body : JSON.stringify(body));
  });
  const service = new kirosync.Service(`${url}/`, TOKEN);
  const said = (at) =>
    service.ask("GET", at).catch((problem) => {
      assert.ok(!inspect(problem, { depth: 9 }).includes(TOKEN));
      return `${problem} ${problem.pause ?? problem.status}`;
    });
  assert.equal(await said("/401"), `Unreachable: ${url} does not take the token; is it that service's? 0`);
  assert.equal(await said("/403"), `Unreachable: ${url} answered 403; is there something between us? 0`);
  assert.equal(await said("/403/scope"), "Refused: may not 403");
  assert.equal(await said("/422"), "Refused: not so 422");
  assert.equal(await said("/429"), `Unreachable: ${url} answered 429: slowly 7`);
  assert.equal(await said("/503"), `Unreachable: ${url} answered 503: busy 0`);
  assert.match(await said("/302"), /^Unreachable: .* 0$/);
  assert.equal(await said("/404"), null);
  assert.equal(await said("/409"), null);
  assert.deepEqual(await said("/200"), { cursor: 1 });
  assert.match(await said("/gone"), /^Unreachable: .* 0$/);
  await assert.rejects(service.sync({}), kirosync.Unreachable);
  await assert.rejects(new kirosync.Service(`${url}/404?`, TOKEN).sync({}), kirosync.Unreachable);
});

test("a token that no header can carry is not said", () => {
  for (const token of ["secret\nsecret", "secret\u2026"]) {
    const make = () => new kirosync.Service("http://127.0.0.1:9", token);
    assert.throws(make, (problem) => problem instanceof TypeError && !problem.stack.includes("secret"));
  }
  const service = new kirosync.Service("http://127.0.0.1:9", "secret\n");
  assert.ok(!inspect(service, { depth: 9, showHidden: true }).includes("secret"));
});

test("a service that is not there is unreachable, and what is written to it is kept", async () => {
  const storage = new Storage();
  const service = new kirosync.Service("http://127.0.0.1:9", TOKEN);
  const copy = new kirosync.Copy(service, { storage });
  await assert.rejects(copy.sync(), kirosync.Unreachable);
  await copy.write({ documents: { d: document("x") } });
  assert.deepEqual(plain(copy.state.documents), { d: document("x") });
  assert.deepEqual(new kirosync.Copy(service, { storage }).state, copy.state);
});

// ---------------------------------------------------------------------------------------- Copy

test("what one writes the other hears, also that it is gone", async (t) => {
  const { url } = await start(t, folder(t));
  const service = new kirosync.Service(url, TOKEN);
  const [one, other] = [new kirosync.Copy(service), new kirosync.Copy(service)];
  const [heard, alsoHeard] = [follow(t, other), follow(t, one)];
  await one.write({ conversations: { c: [HI] }, documents: { d: document("x") } });
  await heardOf(heard, about("documents", "d"));
  const before = other.state;
  assert.deepEqual(plain(before), { conversations: { c: [HI] }, documents: { d: document("x") }, commands: {} });
  await other.write({ conversations: { c: [YO] } });
  await heardOf(alsoHeard, () => one.state.conversations.c.length === 2);
  assert.deepEqual(one.state, other.state);
  assert.deepEqual(plain(before.conversations), { c: [HI] }, "a state is replaced, not changed");
  await service.request("DELETE", "/conversation/c");
  const change = await heardOf(heard, (change) => change.deleted.conversations.includes("c"));
  assert.deepEqual(change.deleted, { conversations: ["c"], documents: [], commands: [] });
  await heardOf(alsoHeard, (change) => change.deleted.conversations.includes("c"));
  assert.deepEqual(plain(other.state), { conversations: {}, documents: { d: document("x") }, commands: {} });
  assert.deepEqual(one.state, other.state);
});

test("an id that every object has goes to the service and back", async (t) => {
  const { url } = await start(t, folder(t));
  const service = new kirosync.Service(url, TOKEN);
  const storage = new Storage();
  const copy = new kirosync.Copy(service, { storage });
  const heard = follow(t, copy);
  const other = new kirosync.Copy(service);
  for (const name of ["__proto__", "constructor"]) {
    await other.write({ conversations: { [name]: [HI] }, documents: { [name]: document(name) } });
    await heardOf(heard, about("documents", name));
    assert.equal(copy.state.documents[name].content, name);
  }
  assert.deepEqual(new kirosync.Copy(service, { storage }).state, copy.state);
  await service.request("DELETE", "/document/__proto__");
  await heardOf(heard, about("documents", "__proto__"));
  assert.deepEqual(Object.keys(copy.state.documents), ["constructor"]);
  assert.deepEqual(Object.keys(copy.state.conversations).sort(), ["__proto__", "constructor"]);
});

test("what is written while the service is away arrives", async (t) => {
  const state = folder(t);
  const server = await start(t, state);
  const storage = new Storage();
  const service = new kirosync.Service(server.url, TOKEN);
  const copy = new kirosync.Copy(service, { storage });
  const heard = follow(t, copy);
  await copy.write({ documents: { d: document("x") } });
  await heardOf(heard, about("documents", "d"));
  assert.equal(await server.end(), 0);
  await copy.write({ documents: { d: document("while away", 2) } });
  await copy.write({ conversations: { c: [HI] } });
  assert.equal(copy.state.documents.d.content, "while away");
  assert.equal(copy.outbox.length, 2);
  assert.deepEqual(new kirosync.Copy(service, { storage }).state, copy.state);
  await start(t, state, server.port);
  await heardOf(heard, about("conversations", "c"));
  const said = await service.sync({});
  assert.deepEqual(said.documents, { d: document("while away", 2) });
  assert.deepEqual(said.conversations, { c: [HI] });
  assert.deepEqual(copy.outbox, []);
});

test("what a restored backup has lost is said and can be brought back", async (t) => {
  const [state, backup] = [folder(t), folder(t)];
  const server = await start(t, state);
  const service = new kirosync.Service(server.url, TOKEN);
  const copy = new kirosync.Copy(service);
  await copy.write({ conversations: { c: [HI] } });
  fs.cpSync(state, backup, { recursive: true });
  await copy.write({ conversations: { c: [YO] }, documents: { d: document("later") } });
  const heard = follow(t, copy);
  await heardOf(heard, about("documents", "d"));
  assert.equal(await server.end(), 0);
  fs.rmSync(state, { recursive: true });
  fs.cpSync(backup, state, { recursive: true });
  await start(t, state, server.port);
  const { lost } = await heardOf(heard, (change) => Object.keys(change.lost).length);
  assert.deepEqual(plain(lost), { conversations: { c: [YO] }, documents: { d: document("later") } });
  assert.deepEqual(plain(copy.state.conversations), { c: [HI] });
  await copy.write(lost);
  const said = await service.sync({});
  assert.deepEqual([said.conversations, said.documents], [{ c: [HI, YO] }, { d: document("later") }]);
});

test("what is refused is said to who wrote it, and keeps nothing else back", async (t) => {
  const { url } = await start(t, folder(t));
  const service = new kirosync.Service(url, TOKEN);
  const copy = new kirosync.Copy(service);
  await copy.write({ documents: { d: document("x") } });
  const before = copy.state;
  const bad = { documents: { e: { ...document("x"), id: "mine" } } };
  const writes = [bad, { documents: { f: document("y") } }].map((push) => copy.write(push));
  await assert.rejects(writes[0], (problem) => {
    assert.ok(problem instanceof kirosync.Refused);
    assert.match(problem.message, /^documents\.e\.id: is set by the service/);
    return problem.status === 400;
  });
  await writes[1];
  assert.deepEqual(Object.keys(copy.state.documents), ["d", "f"]);
  assert.deepEqual(Object.keys(before.documents), ["d"]);
  assert.deepEqual((await copy.sync()).refused, [], "it was said already");
  const flawed = [
    { documents: { e: { content: "x" } } },
    { conversations: { c: [{ role: "user" }] } },
    { commands: [] },
  ];
  for (const push of flawed) {
    const known = copy.state;
    await assert.rejects(copy.write(push), kirosync.Refused);
    assert.equal(copy.state, known);
    assert.deepEqual(copy.outbox, []);
  }
});

test("what was written while away and is refused is said by a change", async (t) => {
  const state = folder(t);
  const server = await start(t, state);
  const copy = new kirosync.Copy(new kirosync.Service(server.url, TOKEN));
  await server.end();
  await copy.write({ documents: { e: { ...document("x"), id: "mine" } } });
  await copy.write({ documents: { f: document("y") } });
  await start(t, state, server.port);
  const change = await copy.sync();
  assert.match(change.refused[0][1], /^documents\.e\.id: is set by the service/);
  assert.deepEqual(change.deleted.documents, ["e"]);
  assert.deepEqual(plain(copy.state.documents), { f: document("y") });
});

test("a copy takes up where its storage was, and asks only for what is new", async (t) => {
  const { url } = await start(t, folder(t));
  const storage = new Storage();
  const asked = new EventEmitter();
  const requests = [];
  asked.on("request", (request) => requests.push(request));
  const copy = new kirosync.Copy(watched(url, asked), { storage, key: "k" });
  await copy.write({ documents: { a: document("x"), b: document("y") } });
  await copy.sync();
  requests.length = 0;
  const again = new kirosync.Copy(watched(url, asked), { storage, key: "k" });
  assert.ok(again.stored);
  assert.deepEqual(again.state, copy.state);
  assert.ok((await again.sync()).empty);
  assert.deepEqual(requests, [`GET /sync?${new URLSearchParams({ since: copy.cursor })}`]);
});

test("a storage that is full keeps what it has, and the copy goes on", async (t) => {
  const { url } = await start(t, folder(t));
  const service = new kirosync.Service(url, TOKEN);
  const storage = new Storage();
  const copy = new kirosync.Copy(service, { storage });
  await copy.write({ documents: { a: document("x") } });
  const state = plain(copy.state);
  storage.room = 500;
  await copy.write({ documents: { b: document("y".repeat(1000)) } });
  assert.ok(!copy.stored);
  assert.deepEqual(Object.keys(copy.state.documents), ["a", "b"]);
  const again = new kirosync.Copy(service, { storage });
  assert.deepEqual(plain(again.state), state);
  storage.room = Infinity;
  await again.sync();
  assert.deepEqual(again.state, copy.state);
  assert.ok(again.stored);
});

test("close ends the question that is held, at once", async (t) => {
  const { url } = await start(t, folder(t));
  const asked = new EventEmitter();
  const copy = new kirosync.Copy(watched(url, asked));
  await copy.write({ documents: { d: document("x") } });
  const held = new Promise((resolve) => asked.on("request", (request) => /wait=50\.000/.test(request) && resolve()));
  const following = copy.follow(() => {});
  await held;
  const began = performance.now();
  copy.close();
  await following;
  assert.ok(performance.now() - began < 1000);
  await copy.write({ documents: { d: document("after", 2) } });
  assert.deepEqual(copy.outbox, []);
});

test("close ends the pause between two tries, too", async (t) => {
  const copy = new kirosync.Copy(await busy(t));
  const following = copy.follow(() => {});
  await once(copy.service, "asked");
  await new Promise(setImmediate); // now it rests
  copy.close();
  await following;
});

/** Return a service that asks for an hour's pause, and emits "asked". */
async function busy(t) {
  const url = await stranger(t, (_, response) => response.writeHead(503, { "Retry-After": "3600" }).end("{}"));
  const service = Object.assign(new EventEmitter(), { real: new kirosync.Service(url, TOKEN) });
  service.sync = async (...question) => {
    try {
      return await service.real.sync(...question);
    } finally {
      service.emit("asked");
    }
  };
  return service;
}

test("tryNow ends the pause between two tries, and follow goes on", async (t) => {
  const copy = new kirosync.Copy(await busy(t));
  const following = copy.follow(() => {});
  for (let tries = 0; tries < 3; tries += 1) {
    await once(copy.service, "asked");
    await new Promise(setImmediate); // now it rests for an hour
    copy.tryNow();
  }
  await once(copy.service, "asked");
  copy.close();
  await following;
});

test("tryNow asks anew where an answer is waited for, and says no problem where there is none", async (t) => {
  const { url } = await start(t, folder(t));
  const asked = new EventEmitter();
  const requests = on(asked, "request");
  const next = async () => (await requests.next()).value[0];
  const copy = new kirosync.Copy(watched(url, asked));
  const felt = [];
  const following = copy.follow(() => {}, (problem) => felt.push(problem));
  while (!/wait=50/.test(await next()));
  copy.tryNow();
  assert.doesNotMatch(await next(), /wait=/, "who asks anew wants to know at once");
  assert.match(await next(), /wait=50/);
  assert.deepEqual(felt, [null, null]);
  copy.close();
  copy.tryNow();
  await following;
  assert.ok(copy.closed);
});

test("what a token may not is refused, and keeps nothing else back", async (t) => {
  const state = folder(t);
  const { url } = await start(t, state);
  const copy = new kirosync.Copy(new kirosync.Service(url, added(state, "reader", "read")));
  await assert.rejects(copy.write({ documents: { d: document("x") } }), (problem) => {
    assert.match(problem.message, /a token of the scope read may not ask this; possible: client/);
    return problem instanceof kirosync.Refused && problem.status === 403;
  });
  assert.deepEqual([copy.outbox, plain(copy.state.documents)], [[], {}]);
  assert.ok((await copy.sync()).empty);
});

/** Return a new token for *state*. */
function added(state, name, scope) {
  const argv = ["kirosync.py", "token", "add", name, "--scope", scope, "--state", state];
  return spawnSync(process.env.PYTHON ?? "python3", argv, { cwd: ROOT, encoding: "utf8" }).stdout.trim();
}

test("many writes at once go one after the other, and none is lost", async (t) => {
  const { url } = await start(t, folder(t));
  let posting = 0;
  const fetched = async (at, options) => {
    if (options.method !== "POST") return fetch(at, options);
    assert.equal((posting += 1), 1, "two writes at once");
    try {
      return await fetch(at, options);
    } finally {
      posting -= 1;
    }
  };
  const copy = new kirosync.Copy(new kirosync.Service(url, TOKEN, { fetch: fetched }));
  const other = new kirosync.Copy(new kirosync.Service(url, TOKEN));
  follow(t, copy);
  follow(t, other);
  const message = (number) => ({ role: "user", content: `no. ${number}.`, timestamp: number });
  const numbers = Array.from({ length: 40 }, (_, number) => number);
  const write = (number) => (number % 2 ? copy : other).write({ conversations: { c: [message(number)] } });
  await Promise.all(numbers.map(write));
  await other.sync();
  await copy.sync();
  assert.deepEqual(plain(other.state.conversations), { c: numbers.map(message) });
  assert.deepEqual(copy.state, other.state);
});

const skip = Number(process.versions.node.split(".")[0]) < 20 && "the mock timers of Node 18 are others";
test("a long answer may take its time, and one that stops is given up", { skip }, async (t) => {
  t.mock.timers.enable({ apis: ["setTimeout"] });
  const parts = new EventEmitter();
  const url = await stranger(t, (_, response) => {
    response.writeHead(200).write('{"cursor":');
    parts.on("part", (part) => response.write(part));
    parts.on("end", () => response.end("1}"));
  });
  const read = new EventEmitter();
  const fetched = async (at, options) => {
    const said = await fetch(at, options);
    const reader = said.body.getReader();
    const noted = async () => {
      setImmediate(() => read.emit("read"));
      return reader.read();
    };
    return { status: said.status, headers: said.headers, body: { getReader: () => ({ read: noted }) } };
  };
  const service = new kirosync.Service(url, TOKEN, { fetch: fetched });
  const answer = service.ask("GET", "/");
  await once(read, "read");
  for (const part of [" ", "  ", "   "]) {
    await once(read, "read");
    t.mock.timers.tick(9000);
    parts.emit("part", part);
  }
  await once(read, "read");
  parts.emit("end");
  assert.deepEqual(await answer, { cursor: 1 });
  const stopped = service.ask("GET", "/");
  await once(read, "read");
  await once(read, "read");
  t.mock.timers.tick(10_001);
  await assert.rejects(stopped, /Unreachable: .*: silent for 10 s/);
});
