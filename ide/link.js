/*
 * The line to the service: a copy of its state that stays in step, what this window says of itself, and how it is.
 */
"use strict";

const crypto = require("node:crypto");
const { EventEmitter } = require("node:events");
const kirosync = require("./kirosync.js");
const { fetch } = require("./http.js");

const STAY_S = 15; // between looks whether the service still knows us; it sees by itself that we wait for news

/**
 * A line to the service at *url*.
 *
 * Events: "change" (a Change of the copy), "state" (when `state`, one of connecting, online, offline and wrong token, has
 * become another; `problem` says why it is not online). *about* returns what this window says of itself to the others.
 */
class Link extends EventEmitter {
  #timer;
  #unsaid = false; // something of this window, that the service is to know
  #said = Promise.resolve(); // the last that was said of this window

  constructor(url, token, name, about) {
    super();
    this.name = name;
    this.about = about;
    this.state = "connecting";
    this.problem = "";
    this.service = new kirosync.Service(url, token, { fetch });
    this.copy = new kirosync.Copy(this.service, { query: { agent: name } });
  }

  /** Stay in step until `close` is called. */
  async run() {
    this.#timer = setInterval(() => this.#stay(), STAY_S * 1000);
    while (!this.copy.closed) {
      try {
        await this.copy.follow(
          (change) => this.#tell(change),
          (problem) => this.#feel(problem),
        );
      } catch (defect) {
        this.#feel(defect); // or what the service refuses to be asked
        await pause(TROUBLE_S);
      }
    }
  }

  #feel(problem) {
    const state = problem?.status === 401 ? "wrong token" : problem ? "offline" : "online";
    this.#become(state, problem?.message ?? "");
    if (!problem) this.announce();
  }

  /** Tell of a *change*: what goes wrong there must not keep us from the next. */
  #tell(change) {
    try {
      if (Object.keys(change.lost).length) this.announce(); // another state directory: it may not know us
      this.emit("change", change);
    } catch (defect) {
      this.emit("trouble", defect);
    }
  }

  /** Bring the copy in step now, if the service can be reached. */
  async refresh() {
    try {
      this.#tell(await this.copy.sync());
    } catch (problem) {
      if (!(problem instanceof kirosync.Unreachable)) throw problem;
    }
  }

  get here() {
    return `/agents/${encodeURIComponent(this.name)}`;
  }

  /** Say what this window is; or what of that has become otherwise. */
  announce(changes) {
    this.#said = this.#said.then(async () => {
      try {
        const known = changes && !this.#unsaid && (await this.service.ask("PATCH", this.here, changes));
        if (!known) await this.service.ask("PUT", this.here, await this.about());
        this.#unsaid = false;
      } catch (problem) {
        this.#unsaid = true;
        this.emit("trouble", problem);
      }
    });
    return this.#said;
  }

  #stay() {
    if (this.state === "online") this.announce({});
  }

  #become(state, problem) {
    if (this.state === state && this.problem === problem) return;
    this.state = state;
    this.problem = problem;
    this.emit("state");
  }

  /** Return the command as *patch* leaves it, or null if it is another's by now, or gone. */
  report(id, patch) {
    return this.service.ask("PATCH", at(id), patch);
  }

  /** Queue a command, once however often it has to be sent; return its id. */
  async post(order) {
    const headers = { "Idempotency-Key": crypto.randomUUID() };
    const said = await this.insist(() => this.service.ask("POST", "/command", order, { headers }));
    return said.commandId;
  }

  /** Return the command when it has ended. */
  async ended(id) {
    const ask = () => this.service.ask("GET", `${at(id)}?wait=${HELD_S}`, undefined, { held: HELD_S });
    for (;;) {
      const command = await this.insist(ask);
      if (!command) throw new Error("the command was removed from the queue");
      if (isEnded(command)) return command;
      await pause(UNHELD_S); // the service may have too many who wait, and not have held us
    }
  }

  /** Return what *ask* returns, once the service can be reached; *troubled* is told what stands in the way. */
  async insist(ask, troubled = () => {}) {
    for (;;) {
      try {
        return await ask();
      } catch (problem) {
        if (!(problem instanceof kirosync.Unreachable) || this.copy.closed) throw problem;
        troubled(problem);
        await pause(RETRY_S);
      }
    }
  }

  cancel(id) {
    return this.service.ask("POST", `${at(id)}/cancel`, {});
  }

  /** Say good-bye, and let go of the service. */
  async close() {
    clearInterval(this.#timer);
    this.copy.close();
    this.removeAllListeners();
    await this.#said;
    await this.service.ask("DELETE", this.here).catch(() => {});
  }
}

const HELD_S = 50; // a question waits for its answer
const UNHELD_S = 0.5; // between such questions
const RETRY_S = 1; // after the service could not be reached
const TROUBLE_S = 10; // after something that trying again does not mend by itself

const pause = (seconds) => new Promise((resolve) => setTimeout(resolve, seconds * 1000));

const isEnded = (command) => ["completed", "failed"].includes(command.status);

const at = (id) => `/command/${encodeURIComponent(id)}`;

module.exports = { Link, pause, at, isEnded, UNHELD_S, Refused: kirosync.Refused };
