/*
 * What is seen: conversations, documents and what waits for the human, as trees; records as virtual documents, live.
 */
"use strict";

const vscode = require("vscode");
const { SCHEME, uriOf, idOf } = require("./documents.js");
const { cut, line, titleOf, markdownOf } = require("./rules.js");

const LABEL_CHARACTERS = 80;
const TAB_CHARACTERS = 30;
const STATES = {
  same: ["check", "as on the server"],
  differs: ["diff", "differs from the server"],
  here: ["arrow-up", "not on the server"],
  there: ["cloud-download", "only on the server"],
};
const KINDS = { confirmation: "question", choice: "list-selection", text: "comment", file: "file" };

const when = (timestamp) => new Date(timestamp).toLocaleString();

/** A tree of one level: *list* returns its items, now or later. */
class List {
  #changed = new vscode.EventEmitter();
  #shown = "";
  onDidChangeTreeData = this.#changed.event;

  constructor(list) {
    this.list = list;
  }

  async getChildren(parent) {
    if (parent) return [];
    const items = await this.list();
    this.#shown = JSON.stringify(items);
    return items;
  }

  /** Show it anew if it is not as it is shown; for what nobody tells. */
  async look() {
    if (JSON.stringify(await this.list()) !== this.#shown) this.refresh();
  }

  getTreeItem(item) {
    return item;
  }

  refresh() {
    this.#changed.fire();
  }
}

const item = (label, icon, more) =>
  Object.assign(new vscode.TreeItem(label), {
    iconPath: new vscode.ThemeIcon(icon),
    accessibilityInformation: { label: `${label} ${more.description ?? ""}` }, // else its tooltip is read out
    ...more,
  });

/** Return the conversations, the one last written to first. */
const conversationItems = (conversations) => {
  const last = (messages) => messages.at(-1)?.timestamp ?? 0;
  const sorted = Object.entries(conversations).sort(([, one], [, other]) => last(other) - last(one));
  return sorted.map(([id, messages]) =>
    item(titleOf(id, messages), "comment-discussion", {
      id,
      description: `${messages.length} · ${when(last(messages))}`,
      tooltip: id,
      contextValue: "conversation",
      command: { command: "kirosync.openConversation", title: "Open", arguments: [{ id }] },
    }),
  );
};

const questionItems = (waiting) =>
  waiting.map((question) =>
    item(cut(line(question.prompt), LABEL_CHARACTERS), KINDS[question.inputType ?? "text"] ?? "question", {
      id: question.id,
      tooltip: question.prompt,
      contextValue: "question",
      command: { command: "kirosync.answer", title: "Answer", arguments: [{ id: question.id }] },
    }),
  );

const documentItems = (entries) =>
  entries.map(({ id, path, uri, state }) => {
    const name = path.split("/").at(-1);
    const [icon, words] = STATES[state];
    const [command, ...given] = {
      same: ["vscode.open", uri],
      differs: ["kirosync.compare", { uri }],
      here: ["vscode.open", uri],
      there: ["vscode.open", uriOf("documents", id, name)],
    }[state];
    return item(name, icon, {
      ...{ id, uri, description: `${words} · ${path.slice(0, -name.length - 1)}`, tooltip: `${path}: ${words}` },
      contextValue: state === "there" && !uri ? "elsewhere" : state,
      command: { command, title: words, arguments: given },
    });
  });

/** The records of the service as documents that nobody edits here: conversations as Markdown. */
class Records {
  #changed = new vscode.EventEmitter();
  onDidChange = this.#changed.event;

  constructor(session) {
    this.session = session;
  }

  provideTextDocumentContent(uri) {
    const [, kind] = uri.path.split("/");
    const state = this.session.link?.copy.state;
    const id = idOf(uri);
    const record = state?.[kind]?.[id];
    if (!record) return `The service has no such ${kind.slice(0, -1)}: ${id}\n`;
    return kind === "conversations" ? markdownOf(id, record, when) : record.content;
  }

  /** Show anew what is open, of the records *ids*. */
  refresh(ids) {
    for (const { uri } of vscode.workspace.textDocuments) {
      if (uri.scheme === SCHEME && ids.has(idOf(uri))) this.#changed.fire(uri);
    }
  }
}

/** Return where a conversation is read; what it is called is the name of its tab. */
const conversationUri = (session, id) => {
  const title = titleOf(id, session.state.conversations[id] ?? []);
  return uriOf("conversations", id, `${cut(title.replace(/[^\p{L}\p{N} _-]/gu, ""), TAB_CHARACTERS)}.md`);
};

module.exports = { List, Records, conversationItems, questionItems, documentItems, conversationUri };
