/*
 * Remote control: takes the editor commands that are for this window, executes them, reports how they ended.
 */
"use strict";

const { AsyncLocalStorage } = require("node:async_hooks");
const crypto = require("node:crypto");
const { pause, Unreachable } = require("./link.js");
const { argument, textOf, allows, isFor, isOpen } = require("./rules.js");

const AT_ONCE = 3; // as many as the service lets one execute
const LEASE_S = 20; // an editor that is closed without a word is noticed after this
const RENEW_S = 6;
const RETRY_S = 0.5; // between tries to report
const LONGEST_S = 3600; // of a command that does not say how long it may take
const GONE = "the window of the editor was closed";

class Cancelled extends Error {}
class Late extends Error {}
const OUTCOMES = new Map([[Cancelled, "cancelled"], [Late, "timeout"]]);

/**
 * What is executed in this window for others.
 *
 * *editor* is {execute(command, args), parseUri(text), folders(), settings(): {on, allowed}}; *log* is told all that is
 * asked for, and how it ended.
 */
class Remote {
  #waiting = new Set(); // ids
  #running = new Map(); // by id: {command, held, stop}
  #context = new AsyncLocalStorage();

  constructor(link, editor, log, changed) {
    Object.assign(this, { link, editor, log, changed });
  }

  /** The commands that are being executed. */
  get running() {
    return [...this.#running.values()].map((run) => run.command);
  }

  /** The id of the command on whose behalf this is called, if that can be told. */
  get current() {
    const known = this.#context.getStore();
    return known ?? (this.#running.size === 1 ? [...this.#running.keys()][0] : undefined);
  }

  /** Take in which commands have changed. */
  heard(ids) {
    for (const id of ids) {
      const command = this.link.copy.state.commands[id];
      if (command?.status === "pending" && isFor(command, this.link.name, this.editor.folders())) this.#waiting.add(id);
      else this.#waiting.delete(id);
      const run = this.#running.get(id);
      if (run && (!command || command.status !== "processing")) run.stop(new Cancelled("it was taken from this window"));
      else if (command?.cancelRequested) run?.stop(new Cancelled(NOT_STOPPED));
    }
    this.look();
  }

  /** Begin what waits, as far as there is room. */
  look() {
    for (const id of this.#waiting) {
      const command = this.link.copy.state.commands[id];
      const refusal = this.#refusal(command);
      if (this.#running.has(id)) continue;
      if (refusal && command.target !== this.link.name) continue; // another window may take it
      if (this.#running.size >= AT_ONCE) return;
      this.#waiting.delete(id);
      this.#take({ ...command, id }, refusal);
    }
  }

  #refusal({ command, workspacePath }) {
    const { on, allowed } = this.editor.settings();
    if (!on) return "remote control is switched off in this editor; its user can switch it on";
    if (!allows(allowed, command)) return `this editor does not allow '${command}' (setting kirosync.allowedCommands)`;
    if (workspacePath && !isOpen(workspacePath, this.editor.folders())) return `${workspacePath} is not open here`;
    return "";
  }

  async #take(command, refusal) {
    const held = { agent: this.link.name, claim: crypto.randomUUID() };
    const run = { command, held, stop: () => {} };
    this.#running.set(command.id, run);
    try {
      const claimed = await this.link.report(command.id, { ...held, status: "processing", lease: LEASE_S });
      if (!claimed) return;
      run.held = { ...held, attempt: claimed.attempt };
      this.changed();
      const report = refusal ? { outcome: "refused", error: refusal } : await this.#perform(run);
      this.log(command, report);
      if (!this.link.copy.closed) await this.#insist(run, report);
    } catch (problem) {
      this.log(command, { outcome: "lost", error: problem.message });
    } finally {
      this.#running.delete(command.id);
      this.changed();
      this.look();
    }
  }

  /** Execute what was claimed, and return the report. */
  async #perform(run) {
    const { command, args = [], timeout = LONGEST_S } = run.command;
    const began = performance.now();
    this.log(run.command);
    const renewal = setInterval(() => this.#renew(run), RENEW_S * 1000);
    let limit;
    try {
      const stopped = new Promise((resolve, reject) => {
        run.stop = reject;
        limit = setTimeout(() => reject(new Late(`not done after ${timeout} s; ${NOT_STOPPED}`)), timeout * 1000);
      });
      const given = args.map((text) => argument(text, this.editor.parseUri));
      const value = await this.#context.run(run.command.id, () => Promise.race([this.editor.execute(command, given), stopped]));
      const durationMs = Math.round(performance.now() - began);
      return { status: "completed", result: { output: textOf(value), durationMs } };
    } catch (error) {
      return { outcome: OUTCOMES.get(error?.constructor) ?? "error", error: inWords(error, command) };
    } finally {
      clearInterval(renewal);
      clearTimeout(limit);
    }
  }

  async #renew(run) {
    const renewed = await this.link
      .report(run.command.id, { ...run.held, status: "processing", lease: LEASE_S })
      .catch(() => run.command); // it could not be asked: the lease outlasts that for a while
    if (!renewed) run.stop(new Cancelled("it was given up: this window was not heard of for too long"));
  }

  /** Send the *report* of a run until it is taken, or it is too late. */
  async #insist(run, report) {
    const patch = { status: "failed", ...report, ...run.held };
    for (;;) {
      try {
        return await this.link.report(run.command.id, patch);
      } catch (problem) {
        if (!(problem instanceof Unreachable) || this.link.copy.closed) throw problem;
        await pause(RETRY_S);
      }
    }
  }

  /** Report all that is being executed as lost, for the window is about to close. */
  async close() {
    const runs = [...this.#running.values()];
    const lost = { status: "failed", outcome: "lost", error: GONE };
    await Promise.all(runs.map((run) => this.link.report(run.command.id, { ...run.held, ...lost }).catch(() => {})));
  }
}

const NOT_STOPPED = "an editor's command cannot be stopped, and may still do what it was to do";

/** Return what to say of an *error* that executing *command* has thrown. */
const inWords = (error, command) => {
  const text = String(error?.message ?? error) || "it failed without a word";
  return text === `command '${command}' not found` ? "Command not found" : text;
};

module.exports = { Remote };
