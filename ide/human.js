/*
 * The human: what waits for an answer is shown, and asked in a modal; what this editor asks for others is posted.
 */
"use strict";

const vscode = require("vscode");
const { isEnded } = require("./link.js");
const { line, cut, unlinked, questionOf } = require("./rules.js");

const SHOWN_CHARACTERS = 120; // of a question, in one line

/** Ask each kind of question; resolve to the value, or undefined if the human wants to think about it. */
const ASK = {
  confirmation: async (prompt) => {
    const [title, ...detail] = prompt.split("\n");
    const options = { modal: true, detail: detail.join("\n") };
    return (await vscode.window.showInformationMessage(title, options, "Yes", "No"))?.toLowerCase();
  },
  choice: (prompt, choices) => vscode.window.showQuickPick(choices, { title: prompt, ignoreFocusOut: true }),
  text: (prompt) => vscode.window.showInputBox({ title: "Kirosync", prompt, ignoreFocusOut: true }),
  file: async (prompt) => {
    const chosen = await vscode.window.showOpenDialog({ title: prompt, openLabel: "Answer" });
    return chosen?.[0].fsPath;
  },
};

/** What waits for a human, in the order in which it was asked. */
class Human {
  #told = new Set(); // ids of questions that were announced here

  constructor(session) {
    this.session = session;
  }

  get waiting() {
    const commands = Object.entries(this.session.link?.copy.state.commands ?? {});
    return commands
      .filter(([, command]) => command.type === "user_input" && !isEnded(command))
      .map(([id, command]) => ({ id, prompt: "", ...command }))
      .sort((one, other) => one.createdAt - other.createdAt);
  }

  /** Return whether what waits may be another by what has become of these commands. */
  hasChanged(changed, deleted) {
    const known = this.session.link.copy.state.commands;
    return deleted.length > 0 || changed.some((id) => known[id]?.type === "user_input");
  }

  /** Announce what has come to wait; only the window that the human looks at does. */
  announce() {
    if (!vscode.window.state.focused) return;
    for (const question of this.waiting) {
      if (this.#told.has(question.id)) continue;
      this.#told.add(question.id);
      this.#notify(question);
    }
  }

  async #notify(question) {
    const chosen = await vscode.window.showInformationMessage(
      `Kirosync asks: ${cut(unlinked(line(question.prompt)), SHOWN_CHARACTERS)}`,
      "Answer",
      "Refuse",
    );
    const act = { Answer: () => this.answer(question.id), Refuse: () => this.refuse(question.id) }[chosen];
    await act?.().catch((problem) => vscode.window.showErrorMessage(`Kirosync: ${unlinked(problem.message)}`));
  }

  /** Have the human answer the question *id*, or one of their choice. */
  async answer(id) {
    const question = await this.#choose(id);
    if (!question) return;
    const kind = question.inputType ?? "text";
    const value = await ASK[kind](unlinked(question.prompt), question.choices ?? []);
    if (value !== undefined) await this.#send(JSON.stringify({ value, type: kind, executionId: question.id }));
  }

  /** Send an answer, for as long as it takes, or the human wants. */
  async #send(answer) {
    const { link } = this.session;
    const warn = ({ message }) => vscode.window.setStatusBarMessage(`Kirosync: your answer waits: ${message}`, 2000);
    const said = await link.insist(() => link.service.request("POST", "/api/kiro/input", answer), warn);
    if (said.status === 200) return;
    const { message, error } = JSON.parse(said.text);
    vscode.window.showWarningMessage(`Kirosync: the answer was not taken: ${unlinked(message ?? error)}`);
  }

  async refuse(id) {
    const question = await this.#choose(id);
    if (!question) return;
    const report = { status: "failed", outcome: "refused", error: "the human refused to answer" };
    if (!(await this.session.link.report(question.id, report))) {
      vscode.window.showWarningMessage("Kirosync: this question is answered, or gone");
    }
  }

  async #choose(id) {
    const { waiting } = this;
    if (id) return waiting.find((question) => question.id === id) ?? void vscode.window.showInformationMessage(OVER);
    if (!waiting.length) return void vscode.window.showInformationMessage("Kirosync: nothing waits for you");
    if (waiting.length === 1) return waiting[0];
    const items = waiting.map((question) => ({ label: cut(line(question.prompt), SHOWN_CHARACTERS), question }));
    return (await vscode.window.showQuickPick(items, { title: "What waits for you" }))?.question;
  }

  /** Ask the human, whoever and wherever that is, and resolve to the answer; throw if there is none. */
  async ask(prompt, options) {
    const { link, remote } = this.session;
    const order = questionOf(prompt, options);
    const asking = order.executionId ?? remote.current;
    const id = await link.post({ ...order, ...(asking ? { executionId: asking } : {}) });
    const command = await link.ended(id);
    if (command.status === "completed") return command.result?.value;
    throw new Error(`nobody answered: ${command.error ?? command.outcome}`);
  }
}

const OVER = "Kirosync: this question does not wait any more";

module.exports = { Human };
