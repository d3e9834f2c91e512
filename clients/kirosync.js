/*
 * The other end of kirosync, for the browser and Node 18 or later: ask a service, and keep a copy of its state in step.
 *
 *     as a script element with src="kirosync.js"           defines globalThis.kirosync
 *     const kirosync = require("./kirosync.js");           or: import kirosync from "./kirosync.js"
 *
 *     const service = new kirosync.Service("http://127.0.0.1:3001", token);
 *     const copy = new kirosync.Copy(service, { storage: localStorage, key: "copy" });
 *     await copy.write({ conversations: { c1: [{ role: "user", content: "hi", timestamp: 1710338438173 }] } });
 *     await copy.follow((change) => console.log(change.changed));
 *
 * A copy asks for what is new since its cursor and waits for it, so it costs what has changed. It takes up where it was
 * after the service was restarted, the connection was lost, or (if it has a storage) this page was. What is written to
 * it is kept until the service has acknowledged it. When the service no longer has what it had (a restored backup), the
 * change says what is missing there, and `write` brings that back.
 *
 * It does what client.py does. The sections, each of which uses only what stands above it, and the one rule of each:
 *
 *     Errors    what may go wrong between here and a service
 *     Rules     how two versions become one, as the service does it; no network, no storage, no clock
 *     Service   requests and answers
 *     Copy      the state of a service, here
 */
"use strict";

(() => {
  // -------------------------------------------------------------------------------------- Errors
  // What may go wrong between here and a service.

  /**
   * The service cannot be reached now, or not do what was asked; later it may. `pause` (s) is what it asks for, `status`
   * what it answered, if it did: 401 is for a token that it does not take.
   */
  class Unreachable extends Error {
    name = "Unreachable";

    constructor(problem, { pause = 0, status = 0 } = {}) {
      super(problem);
      this.pause = pause;
      this.status = status;
    }
  }

  /** What was sent is not accepted as it is; the text says why, and `status` and `body` what was answered. */
  class Refused extends Error {
    name = "Refused";

    constructor(status, body) {
      super(String(body.error));
      this.status = status;
      this.body = body;
    }
  }

  // -------------------------------------------------------------------------------------- Rules
  // How two versions become one, as the service does it. tests/vectors.json says it by examples.
  //
  // An id may be "__proto__" or "constructor", so what is kept by id has no prototype, and such a name is one like any
  // other. A record is a plain object; a field of such a name is safe there as long as it is defined, not assigned.

  const KINDS = ["conversations", "documents", "commands"];

  /** Return the records of all *sources* by id; where they share an id, the last source's. */
  const byId = (...sources) => Object.assign(Object.create(null), ...sources);

  /** Return {kind: what *make* makes of it}. */
  const each = (make) => Object.fromEntries(KINDS.map((kind) => [kind, make(kind)]));

  const EMPTY = each(() => byId());

  const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
  const isText = (value) => typeof value === "string";

  /** Return less than 0, 0 or more, by code points: `<` compares UTF-16 units, and has U+1F600 before U+FFEE. */
  const compare = (one, other) => {
    const points = other[Symbol.iterator]();
    for (const point of one) {
      const { value } = points.next();
      if (point !== value) return value === undefined ? 1 : point.codePointAt(0) - value.codePointAt(0);
    }
    return points.next().done ? 0 : -1;
  };

  /** Return how many code points a *text* has. */
  const length = (text) => text.length - (text.match(/[\ud800-\udbff][\udc00-\udfff]/g) ?? []).length;

  /** Return whether *whole* begins with *part*, and not in the midst of a code point. */
  const begins = (whole, part) =>
    whole.startsWith(part) && !/^[\ud800-\udbff][\udc00-\udfff]$/.test(whole.slice(part.length - 1, part.length + 1));

  /** Return *text* as JSON; JSON.stringify would also escape halves of surrogate pairs, and so move them. */
  const quoted = (text) => `"${text.replace(/["\\\u0000-\u001f]/g, (mark) => JSON.stringify(mark).slice(1, -1))}"`;

  /** Return a text that is equal for equal values, and whose order by code points is the same in every client. */
  const canonical = (value) => {
    if (typeof value === "string") return quoted(value);
    if (Array.isArray(value)) return `[${value.map(canonical)}]`;
    if (!isObject(value)) return JSON.stringify(value);
    return `{${Object.keys(value).sort(compare).map((key) => `${quoted(key)}:${canonical(value[key])}`)}}`;
  };

  const greater = (one, other) => (compare(canonical(one), canonical(other)) < 0 ? other : one);

  /** Return both records in one, key by key, metadata too; where they differ the greater value stays. */
  const unite = (mine, theirs) => {
    const united = (key) => {
      if (!Object.hasOwn(theirs, key)) return mine[key];
      if (!Object.hasOwn(mine, key)) return theirs[key];
      const nested = key === "metadata" && isObject(mine[key]) && isObject(theirs[key]);
      return (nested ? unite : greater)(mine[key], theirs[key]);
    };
    return Object.fromEntries(Object.keys({ ...mine, ...theirs }).map((key) => [key, united(key)]));
  };

  /** Return the one that ranks higher, whole; equals are united. */
  const join = (mine, theirs, rank) => {
    const order = rank(mine, theirs);
    if (order === 0) return unite(mine, theirs);
    return order > 0 ? mine : theirs;
  };

  const rankOfMessages = (one, other) =>
    one.timestamp - other.timestamp ||
    length(one.content) - length(other.content) ||
    compare(one.content, other.content);

  const rankOfDocuments = (one, other) => one.timestamp - other.timestamp || compare(one.content, other.content);

  const joinDocuments = (mine, theirs) => join(mine, theirs, rankOfDocuments);

  /** Return what a message shares with every other version of itself; as JSON, for 7 and "7" are two ids. */
  const identityOf = (message) =>
    JSON.stringify(Object.hasOwn(message, "id") ? ["id", message.id] : [message.timestamp, message.role]);

  /** Return whether both, of one id or of one moment and role, are versions of one message. */
  const isVersionOf = (message, known) =>
    Object.hasOwn(message, "id") ||
    begins(message.content, known.content) ||
    begins(known.content, message.content);

  /** Return the messages of both in one order: by timestamp, and then as they were first seen. */
  const mergeMessages = (mine, theirs) => {
    const merged = new Map(); // by the place at which it was first seen with its timestamp
    const groups = new Map(); // those places, by identity
    for (const [place, message] of [...mine, ...theirs].entries()) {
      const identity = identityOf(message);
      const group = groups.get(identity) ?? groups.set(identity, []).get(identity);
      const at = group.findIndex((first) => isVersionOf(message, merged.get(first)));
      if (at < 0) {
        group.push(place);
        merged.set(place, message);
        continue;
      }
      const known = merged.get(group[at]);
      const winner = join(known, message, rankOfMessages);
      if (winner.timestamp !== known.timestamp) {
        merged.delete(group[at]);
        group[at] = place;
      }
      merged.set(group[at], winner);
    }
    const order = ([one, mine], [other, theirs]) => mine.timestamp - theirs.timestamp || one - other;
    return [...merged].sort(order).map(([, message]) => message);
  };

  /** Return *state* with the records of *push*, by kind: messages and documents merged, commands as pushed. */
  const merge = (state, push) => {
    const conversations = byId(state.conversations);
    const documents = byId(state.documents);
    for (const [id, messages] of Object.entries(push.conversations ?? {})) {
      conversations[id] = mergeMessages(conversations[id] ?? [], messages);
    }
    for (const [id, document] of Object.entries(push.documents ?? {})) {
      documents[id] = documents[id] ? joinDocuments(documents[id], document) : document;
    }
    return { conversations, documents, commands: byId(state.commands, push.commands) };
  };

  /** Return *state* after an answer of GET /sync: what is deleted taken out, messages merged, the rest as there. */
  const applied = (state, said) => {
    const kept = each((kind) => byId(said.full ? {} : state[kind]));
    for (const kind of KINDS) for (const id of said.deleted?.[kind] ?? []) delete kept[kind][id];
    const fresh = (kind) => byId(kept[kind], said[kind]);
    return {
      ...merge(kept, { conversations: said.conversations }),
      documents: fresh("documents"),
      commands: fresh("commands"),
    };
  };

  /** Return what *before* has of conversations and documents and *state* has not: a push that brings it back. */
  const missing = (state, before) => {
    const united = merge(state, { conversations: before.conversations, documents: before.documents });
    const known = each((kind) => byId(state[kind]));
    const lost = { conversations: byId(), documents: byId() };
    for (const [id, messages] of Object.entries(united.conversations)) {
      const there = new Set((known.conversations[id] ?? []).map(canonical));
      const gone = messages.filter((message) => !there.has(canonical(message)));
      if (gone.length) lost.conversations[id] = gone;
    }
    for (const [id, document] of Object.entries(united.documents)) {
      const there = known.documents[id];
      if (!there || canonical(there) !== canonical(document)) lost.documents[id] = document;
    }
    return Object.fromEntries(Object.entries(lost).filter(([, records]) => Object.keys(records).length));
  };

  const DOCUMENT = { content: [isText, "text"], timestamp: [Number.isFinite, "a number"] };
  const MESSAGE = { role: [isText, "text"], ...DOCUMENT };

  /** Yield what keeps the rules from merging a *push*. All else about it is for the service to say. */
  const flaws = function* (push) {
    for (const kind of KINDS) {
      if (!isObject(push[kind] ?? {})) yield `${kind}: is no object`;
    }
    for (const [id, messages] of Object.entries(push.conversations ?? {})) {
      if (!Array.isArray(messages)) yield `conversations.${id}: is no array`;
      else for (const [at, message] of messages.entries()) yield* lacks(message, MESSAGE, `conversations.${id}[${at}]`);
    }
    for (const [id, document] of Object.entries(push.documents ?? {})) {
      yield* lacks(document, DOCUMENT, `documents.${id}`);
    }
  };

  const lacks = function* (record, shape, where) {
    for (const [field, [is, what]] of Object.entries(shape)) {
      if (!is(record?.[field])) yield `${where}.${field}: must be ${what}`;
    }
  };

  // -------------------------------------------------------------------------------------- Service
  // Requests and answers.

  const FINAL = [400, 413, 415, 422]; // what is refused so is refused for ever
  const CONNECT_S = 10; // for an answer, beyond the time that the service may hold it, and between parts of it
  const SLOWEST_UPLOAD = 16 * 1024; // bytes/s: fetch does not tell how far it is
  const LONGEST_PAUSE_S = 3600; // that a service may ask for; a timer of more than 24 days would not wait at all

  /** Return whether it is so for ever, or for this token; a 403 that names no scopes is of something between. */
  const isFinal = ({ status, text }) =>
    FINAL.includes(status) || (status === 403 && Array.isArray(told(text).scopes));

  /** A service at *url*. Any number of questions may be asked at once. */
  class Service {
    #headers;
    #fetch;

    constructor(url, token, { fetch = globalThis.fetch } = {}) {
      this.url = url.replace(/\/+$/, "");
      this.#headers = { Authorization: `Bearer ${token}`, "Content-Type": "application/json" };
      this.#fetch = (...request) => fetch(...request); // a browser's own wants to be called without a `this`
      // What fetch says of such a header has the token in it.
      if (/[^\t\x20-\x7e\x80-\xff]/.test(String(token).trim())) throw new TypeError("no header can carry this token");
    }

    /**
     * Return {status, headers, bytes, text}, whatever the status, but for what may be otherwise later: then throw Unreachable.
     *
     * *held* is how long (s) the service may wait before it answers.
     */
    async request(method, path, body, { held = 0, headers = {}, signal } = {}) {
      const patience = new Patience(held + CONNECT_S, signal);
      patience.heard((body?.length ?? 0) / SLOWEST_UPLOAD);
      let answer;
      try {
        const said = await this.#fetch(this.url + path, {
          method,
          body,
          headers: { ...this.#headers, ...headers },
          signal: patience.signal,
          cache: "no-store", // a copy knows better than the browser what it has
          redirect: "error", // a hotel's log-in page is no answer
        });
        answer = new Answer(said.status, said.headers, await whole(said, patience));
      } catch (error) {
        throw new Unreachable(`${this.url}: ${error.cause?.message || error.cause?.code || error.message}`);
      } finally {
        patience.end();
      }
      return this.#reached(answer);
    }

    /** Return *answer*, unless it may be another later: then throw Unreachable. */
    #reached(answer) {
      const { status } = answer;
      if (status === 401) throw new Unreachable(`${this.url} does not take the token; is it that service's?`, { status });
      if (answer.status === 429 || answer.status >= 500) {
        const pause = answer.headers.get("Retry-After") ?? "";
        const problem = `${this.url} answered ${answer.status}: ${told(answer.text).error}`;
        throw new Unreachable(problem, { status, pause: /^\d+$/.test(pause) ? Math.min(Number(pause), LONGEST_PAUSE_S) : 0 });
      }
      return answer;
    }

    /** Return the JSON that was answered, or null for a conflict or what is not there; throw Refused. */
    async ask(method, path, body, options) {
      const answer = await this.request(method, path, body === undefined ? undefined : JSON.stringify(body), options);
      if (answer.status === 404 || answer.status === 409) return null;
      if (isFinal(answer)) throw new Refused(answer.status, told(answer.text));
      if (answer.status !== 200) {
        throw new Unreachable(`${this.url} answered ${answer.status}; is there something between us?`);
      }
      return told(answer.text);
    }

    /**
     * Return what GET /sync says to a *query*, after up to *wait* (s), or POST /sync if there is a *push*.
     *
     * Throws Unreachable or Refused.
     */
    async sync(query, push, { wait = 0, signal } = {}) {
      const asked = Object.entries({ ...query, wait: wait ? wait.toFixed(3) : "" }).filter(([, value]) => value);
      const path = `/sync?${new URLSearchParams(asked)}`;
      const answer = await this.ask(push === undefined ? "GET" : "POST", path, push, { held: wait, signal });
      const said = push === undefined ? answer : answer?.data;
      if (!said?.cursor) throw new Unreachable(`${this.url} is no kirosync`);
      return said;
    }
  }

  /** A `signal` that is aborted after so many *seconds* in which nothing was heard, or when *outer* is. */
  class Patience {
    #control = new AbortController();
    #stop = () => this.#control.abort(new Error("the question was withdrawn"));
    #timer;

    constructor(seconds, outer) {
      this.seconds = seconds;
      this.outer = outer;
      this.signal = this.#control.signal;
      outer?.addEventListener("abort", this.#stop);
      if (outer?.aborted) this.#stop();
    }

    /** Begin to wait anew, and *more* (s) than usual. */
    heard(more = 0) {
      clearTimeout(this.#timer);
      const lost = () => this.#control.abort(new Error(`silent for ${this.seconds + more} s`));
      this.#timer = setTimeout(lost, (this.seconds + more) * 1000);
    }

    end() {
      clearTimeout(this.#timer);
      this.outer?.removeEventListener("abort", this.#stop);
    }
  }

  /** What was answered: `bytes`, and as `text`. */
  class Answer {
    constructor(status, headers, bytes) {
      Object.assign(this, { status, headers, bytes });
    }

    get text() {
      return new TextDecoder().decode(this.bytes);
    }
  }

  /** Return the bytes of *answer*, however long it takes, as long as it goes on. */
  const whole = async (answer, patience) => {
    if (!answer.body?.getReader) return new Uint8Array(await answer.arrayBuffer());
    const reader = answer.body.getReader();
    const parts = [];
    for (let part = await reader.read(); !part.done; part = await reader.read()) {
      patience.heard();
      parts.push(part.value);
    }
    const bytes = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
    parts.reduce((offset, part) => bytes.set(part, offset) ?? offset + part.length, 0);
    return bytes;
  };

  /** Return the JSON object in *text*, or what it says else as an error. */
  const told = (text) => {
    try {
      const said = JSON.parse(text);
      if (isObject(said)) return said;
    } catch {
      // A proxy answers in HTML.
    }
    return { error: text.slice(0, 200) };
  };

  // -------------------------------------------------------------------------------------- Copy
  // The state of a service, here.

  const HELD_S = 50; // a question waits for something new
  const UNHELD_S = 0.5; // an answer without news that comes sooner was not held: the service has too many who wait
  const BACK_OFF_S = [0.2, 15]; // between tries, doubled from the first up to the second

  /** What has become otherwise in a copy. */
  class Change {
    constructor(changed, deleted, lost, refused) {
      this.changed = changed; // ids by kind
      this.deleted = deleted;
      this.lost = lost; // what the service no longer has (see missing)
      this.refused = refused; // [[what was written here and is not accepted, why]]
    }

    /** Whether nothing has. */
    get empty() {
      const ids = [...Object.values(this.changed), ...Object.values(this.deleted)].flat();
      return !ids.length && !Object.keys(this.lost).length && !this.refused.length;
    }
  }

  /** Return several *changes*, oldest first, as one. */
  const together = (changes) => {
    const ids = (part) => each((kind) => [...new Set(changes.flatMap((change) => change[part][kind]))]);
    const lost = Object.entries(changes.map((change) => change.lost).reduce(merge, EMPTY));
    return new Change(
      ids("changed"),
      ids("deleted"),
      Object.fromEntries(lost.filter(([, records]) => Object.keys(records).length)),
      changes.flatMap((change) => change.refused),
    );
  };

  /** Resolve after so many *seconds*, or as soon as *signal*, if there is one, is aborted. */
  const rest = (seconds, signal) =>
    new Promise((resolve) => {
      const over = () => {
        clearTimeout(timer);
        signal?.removeEventListener("abort", over);
        resolve();
      };
      const timer = setTimeout(over, signal?.aborted ? 0 : seconds * 1000);
      signal?.addEventListener("abort", over);
    });

  /**
   * A copy of a service's state: `state` is {kind: {id: record}} as GET /sync shows it, and what was written here.
   *
   * It is kept in *storage*, if there is one, under *key*, and taken up from there. A storage has getItem and setItem,
   * like localStorage; where it is full, the copy goes on without, and `stored` is false until it fits again. A key is
   * for one copy: give each page that is open its own. With *only* "outbox" nothing is kept but what was written here and
   * is not acknowledged yet: the rest is asked for again. `state` is replaced, never changed, and has no prototypes.
   * What *query* says is asked along with every question: {agent: name} tells who asks.
   */
  class Copy {
    #unheard = [];
    #closed = false;
    #turn = Promise.resolve(); // the last of those that talk to the service one after the other
    #waits = new AbortController(); // of what `follow` waits for now; once closed, for nothing
    #refusals = new Map(); // why, by push, for the write that waits to be told

    constructor(service, { storage, key = "kirosync", only = "", query = {} } = {}) {
      this.service = service;
      this.query = query;
      this.storage = storage;
      this.key = key;
      this.only = only;
      this.cursor = "";
      this.base = EMPTY; // the state of the service, as of the cursor
      this.outbox = []; // what was written here and is not acknowledged yet, oldest first
      this.ahead = 0; // of the service's clock against ours, ms
      const known = JSON.parse(storage?.getItem(key) ?? "null");
      this.stored = known !== null;
      if (known) {
        this.cursor = known.cursor;
        this.base = each((kind) => byId(known.base[kind]));
        this.outbox = known.outbox;
      }
      this.state = this.outbox.reduce(merge, this.base);
    }

    /** Whether `close` was called. */
    get closed() {
      return this.#closed;
    }

    /**
     * Merge *push*, {kind: {id: record}}, into the copy, at once, and send it: now, or as soon as the service is there.
     *
     * Throws Refused if the service does not accept it; then it is as if it had not been written.
     */
    async write(push) {
      const mine = JSON.parse(JSON.stringify(push)); // as it will be sent, whatever becomes of the caller's
      for (const flaw of flaws(mine)) throw new Refused(400, { error: flaw }); // or each later merge would fail by it
      this.state = merge(this.state, mine);
      this.outbox = [...this.outbox, mine];
      this.#refusals.set(mine, null);
      this.#save();
      try {
        await this.#inTurn(() => this.#send());
      } catch (problem) {
        if (!(problem instanceof Unreachable)) throw problem;
      }
      const why = this.#refusals.get(mine);
      this.#refusals.delete(mine);
      if (why !== null) throw this.#said(mine, why);
    }

    /**
     * Bring the copy in step, waiting up to *wait* (s) for news; return what has changed since the last call.
     *
     * Throws Unreachable.
     */
    async sync(wait = 0) {
      const cursor = await this.#inTurn(async () => {
        await this.#send();
        return this.cursor;
      });
      const held = cursor && !this.#unheard.length ? wait : 0;
      const signal = held ? this.#waits.signal : undefined;
      const said = await this.service.sync({ ...this.query, since: cursor }, undefined, { wait: held, signal });
      return this.#inTurn(() => {
        // Else a write has been answered meanwhile, with more.
        if (cursor === this.cursor && this.#take(said)) this.#save();
        return together(this.#unheard.splice(0));
      });
    }

    /**
     * Stay in step, and call *heard* with each change, and wait for it, until `close` is called.
     *
     * *felt* is called with what stands in the way, an Unreachable, at each try, and with null once it is overcome.
     */
    async follow(heard, felt = () => {}) {
      let pause = BACK_OFF_S[0];
      let reached = false;
      while (!this.closed) {
        const asked = performance.now();
        const waits = this.#waits.signal;
        const held = reached ? HELD_S : 0; // who has just come wants to know at once whether it is there
        let change;
        try {
          change = await this.sync(held);
          pause = BACK_OFF_S[0];
          if (!reached) felt(null);
          reached = true;
        } catch (problem) {
          if (!(problem instanceof Unreachable)) throw problem;
          const withdrawn = held && waits.aborted; // by who wants to know anew, which is nothing that stands in the way
          reached = false;
          if (!withdrawn && !this.closed) felt(problem);
          await rest(Math.max(problem.pause, pause * (0.5 + Math.random() / 2)), waits);
          pause = waits.aborted ? BACK_OFF_S[0] : Math.min(2 * pause, BACK_OFF_S[1]);
          continue;
        }
        if (!change.empty) await heard(change);
        else if (held && performance.now() - asked < UNHELD_S * 1000) await rest(UNHELD_S, waits);
      }
    }

    /** Return the moment (ms) by the clock of the service, for timestamps. */
    now() {
      return Date.now() + this.ahead;
    }

    /**
     * Have `follow` ask at once, in place of what it waits for: an answer, or the end of a pause.
     *
     * For who has reason to think that the connection has come, or gone: it may take a minute until that is felt.
     */
    tryNow() {
      this.#waits.abort();
      if (!this.closed) this.#waits = new AbortController();
    }

    /** End `follow`, and the question that it has asked, at once. */
    close() {
      this.#closed = true;
      this.#waits.abort();
    }

    /** Return what *act* returns, once all are through that came before. */
    #inTurn(act) {
      const turn = this.#turn.then(act);
      this.#turn = turn.catch(() => {}); // said to who asked for it, not to the next
      return turn;
    }

    /** Send what was written here. */
    async #send() {
      while (this.outbox.length) {
        const push = this.outbox[0];
        let said;
        let refused = [];
        try {
          said = await this.service.sync({ since: this.cursor }, push);
        } catch (refusal) {
          if (!(refusal instanceof Refused)) throw refusal;
          said = { cursor: this.cursor };
          refused = [[push, refusal.message]];
          if (this.#refusals.has(push)) this.#refusals.set(push, refusal);
        }
        this.outbox = this.outbox.slice(1);
        this.#take(said, refused);
        this.#save();
      }
    }

    /** Return the *refusal* of a *push* for its writer, who need not hear of it a second time. */
    #said(push, refusal) {
      this.#unheard = this.#unheard.filter((change) => change.refused[0]?.[0] !== push);
      return refusal;
    }

    /** Take in what the service *said*, and what it *refused*; return whether anything has changed by that. */
    #take(said, refused = []) {
      const [before, known] = [this.state, this.cursor];
      this.base = applied(this.base, said);
      this.cursor = said.cursor;
      this.state = this.outbox.reduce(merge, this.base);
      if (said.serverTime !== undefined) this.ahead = said.serverTime - Date.now();
      const changed = each((kind) => Object.keys(said[kind] ?? {}));
      const gone = each((kind) => Object.keys(before[kind]).filter((id) => !(id in this.state[kind])));
      const change = new Change(changed, gone, known && said.full ? missing(this.state, before) : {}, refused);
      if (!change.empty) this.#unheard.push(change);
      return !change.empty;
    }

    #save() {
      if (!this.storage) return;
      try {
        const { cursor, base, outbox } = this.only ? { cursor: "", base: EMPTY, outbox: this.outbox } : this;
        this.storage.setItem(this.key, JSON.stringify({ cursor, base, outbox }));
        this.stored = true;
      } catch {
        this.stored = false; // it is full; what it has is older, and whole
      }
    }
  }

  const rules = { canonical, mergeMessages, joinDocuments, merge, applied, missing };
  const kirosync = { Unreachable, Refused, ...rules, Service, Copy, rest, isText, isObject };
  if (typeof module === "object" && module.exports) module.exports = kirosync;
  else globalThis.kirosync = kirosync;
})();
