/*
 * Documents: the files of a workspace that are shared, how they stand against the server's, and both ways between.
 */
"use strict";

const crypto = require("node:crypto");
const nodePath = require("node:path");
const vscode = require("vscode");
const { documentId, standing, isContested } = require("./rules.js");

const FILE_BYTES = 4 << 20; // larger ones are no documents
const FILES = 2000; // of a folder
const SCHEME = "kirosync";

const digest = (text) => crypto.createHash("sha256").update(text).digest("hex");

/** Return the address in the editor of a record; the name at its end is for its tab, and for its language. */
const uriOf = (kind, id, name) =>
  vscode.Uri.from({ scheme: SCHEME, path: `/${kind}/${encodeURIComponent(id)}/${name.replaceAll("/", "_")}` });

const idOf = (uri) => decodeURIComponent(uri.path.split("/")[2]);

/** Return the text in the file at *uri*, also what is not saved yet; undefined if there is none, or it is no text. */
const textAt = async (uri) => {
  const open = vscode.workspace.textDocuments.find((document) => String(document.uri) === String(uri));
  if (open) return open.getText();
  try {
    if ((await vscode.workspace.fs.stat(uri)).size > FILE_BYTES) return undefined;
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(await vscode.workspace.fs.readFile(uri));
  } catch {
    return undefined;
  }
};

class Documents {
  constructor(session) {
    this.session = session;
  }

  get there() {
    return this.session.link?.copy.state.documents ?? {};
  }

  /** Return what is shared as a document of the file at *uri*: {id, uri, path}, or undefined outside of the workspace. */
  entry(uri) {
    const folder = vscode.workspace.getWorkspaceFolder(uri);
    if (!folder) return undefined;
    const path = nodePath.posix.relative(folder.uri.path, uri.path);
    return { id: documentId(folder.name, path, digest), uri, path: `${folder.name}/${path}` };
  }

  /** Return all that is shared here, or could be: {id, path, uri?, state}, by path. */
  async list() {
    const entries = new Map();
    for (const folder of vscode.workspace.workspaceFolders ?? []) {
      const shared = vscode.workspace.getConfiguration("kirosync", folder.uri).get("folders");
      for (const uri of (await Promise.all(shared.map((path) => filesIn(vscode.Uri.joinPath(folder.uri, path))))).flat()) {
        const entry = this.entry(uri);
        entries.set(entry.id, entry);
      }
    }
    for (const [id, document] of Object.entries(this.there)) {
      if (!entries.has(id)) entries.set(id, { id, path: document.path ?? id, uri: this.#place(document.path ?? id) });
    }
    const listed = await Promise.all([...entries.values()].map((entry) => this.#stand(entry)));
    return listed.filter(({ state }) => state).sort((one, other) => (one.path < other.path ? -1 : 1));
  }

  async #stand(entry) {
    const [here, there] = [entry.uri && (await textAt(entry.uri)), this.there[entry.id]?.content];
    return { ...entry, state: here === undefined && there === undefined ? "" : standing(here, there) };
  }

  /** Return where the document at *path* ("folder/path") is, or would be, in this workspace; undefined if nowhere. */
  #place(path) {
    const folder = vscode.workspace.workspaceFolders?.find(({ name }) => path.startsWith(`${name}/`));
    const inside = folder && path.slice(folder.name.length + 1);
    if (!inside || inside.split(/[/\\]/).some((part) => part === ".." || part === "")) return undefined;
    return vscode.Uri.joinPath(folder.uri, inside);
  }

  /** Push the files at *uris*, after a question where that would replace what somebody else wrote. */
  async push(uris) {
    const found = await Promise.all(uris.map(async (uri) => ({ ...this.entry(uri), content: await textAt(uri) })));
    const texts = found.filter((file) => file.id && file.content !== undefined);
    const contested = texts.filter(({ id, content }) =>
      isContested(content, this.there[id]?.content, this.session.memory.get(`step:${id}`), digest),
    );
    const wanted = contested.length ? await this.#settle(texts, contested) : texts;
    if (!wanted?.length) return tell(texts.length, found.length);
    await this.session.write({ documents: Object.fromEntries(wanted.map((file) => [file.id, this.#record(file)])) });
    for (const { id, content } of wanted) this.#inStep(id, content);
    tell(wanted.length, found.length);
  }

  #record({ id, uri, path, content }) {
    const open = vscode.workspace.textDocuments.find((document) => String(document.uri) === String(uri));
    const language = open ? { language: open.languageId } : {};
    return { ...this.there[id], path, content, ...language, timestamp: this.session.link.copy.now() };
  }

  async #settle(texts, contested) {
    const names = contested.map(({ path }) => path).join("\n");
    const others = texts.length > contested.length ? ["Push the Others"] : [];
    const chosen = await vscode.window.showWarningMessage(
      "Somebody else has changed this on the server since it was in step here.",
      { modal: true, detail: `${names}\n\nWhat is replaced stays in the history of the server.` },
      "Compare",
      "Replace",
      ...others,
    );
    if (chosen === "Compare") await this.compare(contested[0].uri);
    if (chosen === "Replace") return texts;
    return chosen === "Push the Others" ? texts.filter((file) => !contested.includes(file)) : undefined;
  }

  #inStep(id, content) {
    return this.session.memory.update(`step:${id}`, digest(content));
  }

  /** Show the server's version of the file at *uri* beside it; return its id, undefined if there is none. */
  async compare(uri) {
    const { id, path } = this.entry(uri) ?? {};
    if (!this.there[id]) return void vscode.window.showInformationMessage("Kirosync: this file is not on the server");
    const name = path.split("/").at(-1);
    await vscode.commands.executeCommand("vscode.diff", uri, uriOf("documents", id, name), `${name}: here ↔ server`);
    return id;
  }

  /** Show how the server's version of the document *id* differs, and put it in the place of what is here if that is wanted. */
  async take(id) {
    const document = this.there[id];
    const uri = document && this.#place(document.path ?? id);
    if (!uri) return void vscode.window.showInformationMessage("Kirosync: no folder of this window holds this document");
    const here = await textAt(uri);
    if (here === document.content) return void vscode.window.showInformationMessage("Kirosync: it is the same here");
    if (here === undefined) await vscode.window.showTextDocument(uriOf("documents", id, uri.path.split("/").at(-1)));
    else await this.compare(uri);
    const sentence = here === undefined ? `Make ${document.path} as the server has it?` : `Replace ${document.path} by the server's version?`;
    if ((await vscode.window.showInformationMessage(sentence, "Take It")) !== "Take It") return;
    await this.#replace(uri, this.there[id].content); // what is shown by now
    await this.#inStep(id, this.there[id].content);
  }

  async #replace(uri, content) {
    const edit = new vscode.WorkspaceEdit();
    edit.createFile(uri, { ignoreIfExists: true });
    await vscode.workspace.applyEdit(edit);
    const document = await vscode.workspace.openTextDocument(uri);
    const whole = new vscode.Range(0, 0, document.lineCount, 0);
    const change = new vscode.WorkspaceEdit();
    change.replace(uri, document.validateRange(whole), content); // can be undone
    await vscode.workspace.applyEdit(change);
    await document.save();
  }
}

const filesIn = (folder) => vscode.workspace.findFiles(new vscode.RelativePattern(folder, "**"), undefined, FILES);

const tell = (pushed, asked) => {
  const left = asked > pushed ? `; ${asked - pushed} stayed (no text, too large, outside of the workspace, or not wanted)` : "";
  vscode.window.setStatusBarMessage(`Kirosync: ${pushed} pushed${left}`, 5000);
};

module.exports = { Documents, filesIn, uriOf, idOf, SCHEME };
