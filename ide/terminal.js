/*
 * A command of the server in a terminal: what it prints as it prints it, what is typed goes to it, Ctrl-C cancels it.
 */
"use strict";

const vscode = require("vscode");
const { pause, at, UNHELD_S } = require("./link.js");
const { endingOf } = require("./rules.js");

const HELD_S = 20; // a question waits for more output
const SIZE = { columns: 80, rows: 24 }; // of a terminal that does not say
const CTRL_C = "\x03";
const KEPT_CHARACTERS = 64 << 10; // of the output, for the conversation

const dim = (text) => `\r\n\x1b[2m${text}\x1b[0m\r\n`;

/** What the editor shows as a terminal (vscode.Pseudoterminal); `ended` resolves to [command, output]. */
class ServerTerminal {
  #write = new vscode.EventEmitter();
  #close = new vscode.EventEmitter();
  #posted; // the id of the command, once it is queued
  #typing = Promise.resolve(); // what was typed is sent in its order
  #typed = 0; // bytes
  #decoder = new TextDecoder();
  #shown = "";
  #over = false;
  onDidWrite = this.#write.event;
  onDidClose = this.#close.event;

  constructor(link, command, more) {
    Object.assign(this, { link, command, more });
    this.ended = new Promise((resolve, reject) => Object.assign(this, { resolve, reject }));
    this.ended.catch(() => {}); // it is shown here; who else wants to know asks
  }

  async open(size) {
    try {
      const { columns, rows } = size ?? SIZE;
      const order = { type: "execute_bash", command: this.command, pty: true, stdin: true, columns, rows, ...this.more };
      this.#print(`\x1b[1m$ ${this.command.replace(/\n/g, "\r\n  ")}\x1b[0m\r\n`);
      this.#posted = this.link.post(order);
      this.#typing = this.#posted.catch(() => {});
      const id = await this.#posted;
      await this.#follow(id);
      const command = await this.link.ended(id);
      this.#print(dim(`${endingOf(command)}; any key closes this`));
      this.resolve([{ ...command, id }, this.#shown]);
    } catch (problem) {
      this.#print(dim(problem.message));
      this.reject(problem);
    }
    this.#over = true;
  }

  #print(text) {
    this.#write.fire(text);
  }

  /** Print what the command prints, until it has ended. */
  async #follow(id) {
    let [offset, warned] = [0, false];
    const ask = () => {
      const path = `${at(id)}/output?wait=${HELD_S}&offset=${offset}`;
      return this.link.service.request("GET", path, undefined, { held: HELD_S });
    };
    while (!this.#over) {
      const answer = await this.link.insist(ask, (problem) => this.#print(dim(`${problem.message}; trying again`)));
      if (answer.status !== 200) throw new Error(`the output cannot be read: ${answer.text}`);
      this.#show(this.#decoder.decode(answer.bytes, { stream: true })); // a character may come in two parts
      offset = Number(answer.headers.get("X-Output-Next"));
      if (answer.headers.get("X-Output-End") === "true") return;
      if (!answer.bytes.length) {
        if (answer.headers.get("X-Command-Status") === "pending" && !warned) this.#print(dim(WAITS));
        warned = true;
        await pause(UNHELD_S); // the service may have too many who wait, and not have held us
      }
    }
  }

  #show(text) {
    this.#shown = (this.#shown + text).slice(-KEPT_CHARACTERS);
    this.#print(text);
  }

  handleInput(text) {
    if (this.#over) this.#close.fire();
    else if (text.includes(CTRL_C)) this.#cancel();
    else this.#type(text);
  }

  async #cancel() {
    this.#print("^C");
    const cancel = async () => this.link.cancel(await this.#posted);
    const told = await this.link.insist(cancel).catch((problem) => this.#print(dim(problem.message)));
    if (told === null) this.#print(dim("it has ended already"));
  }

  #type(data) {
    const offset = this.#typed; // sent again it is not typed again
    this.#typed += Buffer.byteLength(data);
    const send = async () => this.link.service.ask("POST", `${at(await this.#posted)}/input`, { data, offset });
    this.#typing = this.#typing
      .then(() => this.link.insist(send))
      .then((said) => said ?? this.#print(dim("it does not read what you type any more")))
      .catch((problem) => this.#print(dim(`what you typed was not sent: ${problem.message}`)));
  }

  /** The terminal was closed: the command goes on, unless the human wants it to end. */
  async close() {
    if (this.#over) return;
    this.#over = true;
    const chosen = await vscode.window.showInformationMessage(`It goes on on the server: ${this.command}`, "Cancel It");
    if (chosen) await this.#cancel();
  }
}

const WAITS = "it waits for an agent to take it; Ctrl-C cancels it";

/** Run a *command* on the server in a terminal of its own; resolve to [command, output] when it has ended. */
const runInTerminal = (link, command, more) => {
  const pty = new ServerTerminal(link, command, more);
  vscode.window.createTerminal({ name: `server: ${command.split("\n")[0].slice(0, 30)}`, pty }).show();
  return pty.ended;
};

module.exports = { runInTerminal };
