/*
 * A command of the server in a terminal: what it prints as it prints it, what is typed goes to it, Ctrl-C cancels it.
 */
"use strict";

const vscode = require("vscode");
const { pause, at, Unreachable } = require("./link.js");
const { endingOf } = require("./rules.js");

const HELD_S = 20; // a question waits for more output
const RETRY_S = 2; // after the service could not be reached
const SIZE = { columns: 80, rows: 24 }; // of a terminal that does not say
const CTRL_C = "\x03";
const KEPT_CHARACTERS = 64 << 10; // of the output, for the conversation

const dim = (text) => `\r\n\x1b[2m${text}\x1b[0m\r\n`;

/** What the editor shows as a terminal (vscode.Pseudoterminal); `ended` resolves to [command, output]. */
class ServerTerminal {
  #write = new vscode.EventEmitter();
  #close = new vscode.EventEmitter();
  #typing = Promise.resolve(); // what was typed is sent in its order
  #typed = 0; // bytes
  #decoder = new TextDecoder();
  #shown = "";
  #id;
  #over = false;
  onDidWrite = this.#write.event;
  onDidClose = this.#close.event;

  constructor(link, command, more) {
    Object.assign(this, { link, command, more });
    this.ended = new Promise((resolve) => (this.tell = resolve));
  }

  async open(size) {
    try {
      const { columns, rows } = size ?? SIZE;
      const order = { type: "execute_bash", command: this.command, pty: true, stdin: true, columns, rows, ...this.more };
      this.#print(`\x1b[1m$ ${this.command.replace(/\n/g, "\r\n  ")}\x1b[0m\r\n`);
      this.#id = await this.link.post(order);
      await this.#follow();
      const command = await this.link.ended(this.#id);
      this.#print(dim(endingOf(command)));
      this.tell([command, this.#shown]);
    } catch (problem) {
      this.#print(dim(problem.message));
    }
    this.#over = true;
  }

  #print(text) {
    this.#write.fire(text);
  }

  /** Print what the command prints, until it has ended. */
  async #follow() {
    let [offset, ended, warned] = [0, false, false];
    while (!ended && !this.#over) {
      try {
        const path = `${at(this.#id)}/output?wait=${HELD_S}&offset=${offset}`;
        const answer = await this.link.service.request("GET", path, undefined, { held: HELD_S });
        if (answer.status !== 200) throw new Error(`the output cannot be read: ${answer.text}`);
        const text = this.#decoder.decode(answer.bytes, { stream: true }); // a character may come in two parts
        this.#shown = (this.#shown + text).slice(-KEPT_CHARACTERS);
        this.#print(text);
        offset = Number(answer.headers.get("X-Output-Next"));
        ended = answer.headers.get("X-Output-End") === "true";
        if (answer.headers.get("X-Command-Status") === "pending" && !warned) {
          this.#print(dim("it waits for an agent to take it; Ctrl-C cancels it"));
          warned = true;
        }
      } catch (problem) {
        if (!(problem instanceof Unreachable) || this.link.copy.closed) throw problem;
        this.#print(dim(`${problem.message}; trying again`));
        await pause(RETRY_S);
      }
    }
  }

  handleInput(text) {
    if (this.#over) this.#close.fire();
    else if (text.includes(CTRL_C)) this.#cancel();
    else if (this.#id) this.#type(text);
  }

  async #cancel() {
    if (!this.#id) return;
    this.#print("^C");
    const told = await this.link.cancel(this.#id).catch((problem) => this.#print(dim(problem.message)));
    if (told === null) this.#print(dim("it has ended already"));
  }

  #type(text) {
    const offset = this.#typed;
    this.#typed += Buffer.byteLength(text);
    this.#typing = this.#typing
      .then(() => this.link.service.ask("POST", `${at(this.#id)}/input`, { data: text, offset }))
      .catch((problem) => this.#print(dim(`what you typed was not sent: ${problem.message}`)));
  }

  /** The terminal was closed: the command goes on, unless the human wants it to end. */
  async close() {
    if (this.#over) return;
    this.#over = true;
    const chosen = await vscode.window.showInformationMessage(`It goes on on the server: ${this.command}`, "Cancel It");
    if (chosen) await this.link.cancel(this.#id);
  }
}

/** Run a *command* on the server in a terminal of its own; resolve to [command, output] when it has ended. */
const runInTerminal = (link, command, more) => {
  const pty = new ServerTerminal(link, command, more);
  vscode.window.createTerminal({ name: `server: ${command.split("\n")[0].slice(0, 30)}`, pty }).show();
  return pty.ended;
};

module.exports = { runInTerminal };
