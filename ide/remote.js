/*
 * Remote control: takes the editor commands that are for this window, executes them, reports how they ended.
 */
"use strict";

const { AsyncLocalStorage } = require("node:async_hooks");
const crypto = require("node:crypto");
const { isEnded } = require("./link.js");
const { argument, textOf, wellFormed, allows, isFor, isOpen } = require("./rules.js");

const AT_ONCE = 3; // as many as the service lets one execute
const LEASE_S = 20; // an editor that is closed without a word is noticed after this
const RENEW_S = 6;
const LONGEST_S = 3600; // of a command that does not say how long it may take
const GONE = "the window of the editor was closed";

class Cancelled extends Error {
  name = "Cancelled";
}

class Late extends Error {
  name = "Late";
}

const OUTCOMES = new Map([[Cancelled, "cancelled"], [Late, "timeout"]]);

/** A command while it is ours: who we are to the service, and how it can be ended before its end. */
class Run {
  constructor(command, agent) {
    this.command = command;
    this.held = { agent, claim: crypto.randomUUID() };
    this.stopped = new Promise((resolve, reject) => (this.stop = reject));
    this.stopped.catch(() => {}); // it may be stopped where nobody waits for it any more
  }

  /** Take in how the service has it, which may be as it was before our claim. */
  see(command) {
    const attempt = this.held.attempt ?? Infinity;
    if (!command || isEnded(command) || command.attempt > attempt) this.stop(new Cancelled("it was taken from this window"));
    else if (command.cancelRequested) this.stop(new Cancelled(NOT_STOPPED));
  }
}

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

  /** The id of the command on whose behalf this is called, as far as that can be told. */
  get current() {
    return this.#context.getStore();
  }

  /** Take in which commands have changed. */
  heard(ids) {
    for (const id of ids) {
      const command = this.link.copy.state.commands[id];
      if (command?.status === "pending" && isFor(command, this.link.name, this.editor.folders())) this.#waiting.add(id);
      else this.#waiting.delete(id);
      this.#running.get(id)?.see(command);
    }
    this.look();
  }

  /** Begin what waits, as far as there is room. */
  look() {
    for (const id of this.link.copy.closed ? [] : this.#waiting) {
      const command = this.link.copy.state.commands[id];
      if (this.#running.has(id)) continue;
      if (command?.status !== "pending") {
        this.#waiting.delete(id);
        continue;
      }
      if (this.#refusal(command) && command.target !== this.link.name) continue; // another window may take it
      if (this.#running.size >= AT_ONCE) return;
      this.#waiting.delete(id);
      this.#take({ ...command, id });
    }
  }

  #refusal({ command, workspacePath }) {
    const { on, allowed } = this.editor.settings();
    if (!on) return "remote control is switched off in this editor; its user can switch it on";
    if (!allows(allowed, command)) return `this editor does not allow '${command}' (setting kirosync.allowedCommands)`;
    if (workspacePath && !isOpen(workspacePath, this.editor.folders())) return `${workspacePath} is not open here`;
    return "";
  }

  async #take(command) {
    const run = new Run(command, this.link.name);
    this.#running.set(command.id, run);
    try {
      if (!(await this.#claim(run)) || this.link.copy.closed) return;
      this.changed();
      const refusal = this.#refusal(command); // as it is now: the claim may have taken its time
      const report = refusal ? { outcome: "refused", error: refusal } : await this.#perform(run);
      this.log(command, report);
      const patch = { status: "failed", ...report, ...run.held };
      await this.link.insist(() => this.link.report(command.id, patch));
    } catch (problem) {
      this.log(command, { outcome: "lost", error: problem.message });
    } finally {
      this.#running.delete(command.id);
      this.changed();
      this.look();
    }
  }

  /** Claim a run, or renew the claim; return null if it is not ours. */
  async #claim(run) {
    const patch = { ...run.held, status: "processing", lease: LEASE_S };
    const claimed = await this.link.insist(() => this.link.report(run.command.id, patch));
    if (claimed) run.held.attempt = claimed.attempt;
    return claimed;
  }

  /** Execute what was claimed, and return the report. */
  async #perform(run) {
    const { command, args = [], timeout = LONGEST_S } = run.command;
    const began = performance.now();
    this.log(run.command);
    const renewal = setInterval(() => this.#renew(run), RENEW_S * 1000);
    const late = () => run.stop(new Late(`not done after ${timeout} s; ${NOT_STOPPED}`));
    const limit = setTimeout(late, timeout * 1000);
    try {
      const given = args.map((text) => argument(text, this.editor.parseUri));
      const executed = this.#context.run(run.command.id, () => this.editor.execute(command, given));
      const value = await Promise.race([executed, run.stopped]);
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
    const renewed = await this.#claim(run).catch(() => run.command); // the window is about to close
    if (!renewed) run.stop(new Cancelled("it was given up: this window was not heard of for too long"));
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
  return text === `command '${command}' not found` ? "Command not found" : wellFormed(text);
};

module.exports = { Remote };
