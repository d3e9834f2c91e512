/*
 * Documents: the files of a workspace that are shared, how they stand against the server's, and both ways between.
 */
"use strict";

const crypto = require("node:crypto");
const nodePath = require("node:path");
const vscode = require("vscode");
const { documentId, standing, isContested, unlinked } = require("./rules.js");

const FILE_BYTES = 4 << 20; // larger ones are no documents
const FILES = 2000; // of a folder
const LISTED = 20; // of the files that are about to be pushed
const PUSH_CHARACTERS = 4 << 20; // in a request, of which the service takes 32 MB
const LEFT_OUT = "{**/node_modules/**,**/.git/**,**/.venv/**}"; // made by programs
const SCHEME = "kirosync";

const digest = (text) => crypto.createHash("sha256").update(text).digest("hex");

/** Return the address in the editor of a record; the name at its end is for its tab, and for its language. */
const uriOf = (kind, id, name) =>
  vscode.Uri.from({ scheme: SCHEME, path: `/${kind}/${encodeURIComponent(id)}/${name.replaceAll("/", "_")}` });

const idOf = (uri) => decodeURIComponent(uri.path.split("/")[2]);

/** Return the document that the editor has of the file at *uri*, if it has one. */
const openAt = (uri) => vscode.workspace.textDocuments.find((document) => String(document.uri) === String(uri));

/** Return the text in the file at *uri*, also what is not saved yet; undefined if there is none, or it is no text. */
const textAt = async (uri) => {
  const open = openAt(uri);
  if (open?.isDirty) return open.getText(); // else the file is at least as new
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

  /** Return the files of the folders that the settings share: {id, uri, path, shared}. */
  async #shared() {
    const folders = (vscode.workspace.workspaceFolders ?? []).flatMap(({ uri }) =>
      vscode.workspace.getConfiguration("kirosync", uri).get("folders").map((path) => vscode.Uri.joinPath(uri, path)),
    );
    const entries = (await Promise.all(folders.map(filesIn))).flat().map((uri) => this.entry(uri));
    return entries.filter(Boolean).map((entry) => ({ ...entry, shared: true })); // none is where a setting leads outside
  }

  /** Return all that is shared here, or could be: {id, path, uri?, shared?, state}, by path. */
  async list() {
    const entries = new Map((await this.#shared()).map((entry) => [entry.id, entry]));
    for (const [id, document] of Object.entries(this.there)) {
      const path = document.path ?? id;
      if (!entries.has(id)) entries.set(id, { id, path, uri: this.#place(path) });
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
    await this.session.link.refresh(); // what was written a moment ago is to be known
    const found = await Promise.all(uris.map(async (uri) => ({ ...this.entry(uri), content: await textAt(uri) })));
    const texts = found.filter((file) => file.id && file.content !== undefined);
    const contested = texts.filter(({ id, content }) =>
      isContested(content, this.there[id]?.content, this.session.memory.get(`step:${id}`), digest),
    );
    const wanted = contested.length ? await this.#settle(texts, contested) : texts;
    let pushed = 0;
    for (const some of batches(wanted)) {
      const documents = Object.fromEntries(some.map((file) => [file.id, this.#record(file)]));
      if (!(await this.session.write({ documents }))) break;
      for (const { id, content } of some) this.#inStep(id, content);
      pushed += some.length;
    }
    tell(pushed, found.length);
  }

  /** Push all files of the *folder*, once the human has seen how many, and which. */
  async pushFolder(folder) {
    const uris = await filesIn(folder);
    const names = uris.slice(0, LISTED).map((uri) => vscode.workspace.asRelativePath(uri));
    const more = uris.length > LISTED ? [`and ${uris.length - LISTED} more`] : [];
    const cut = uris.length === FILES ? [`These are the first ${FILES}; there are others.`] : [];
    const options = { modal: true, detail: [...names, ...more, ...cut].join("\n") };
    const question = `Push ${uris.length} files of ${vscode.workspace.asRelativePath(folder)}?`;
    if (await vscode.window.showInformationMessage(question, options, "Push")) await this.push(uris);
  }

  #record({ id, uri, path, content }) {
    const open = openAt(uri);
    const language = open ? { language: open.languageId } : {};
    const there = this.there[id];
    const timestamp = Math.max(Math.round(this.session.link.copy.now()), (there?.timestamp ?? 0) + 1); // the later wins
    return { ...there, path, content, ...language, timestamp };
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
    return chosen === "Push the Others" ? texts.filter((file) => !contested.includes(file)) : [];
  }

  #inStep(id, content) {
    return this.session.memory.update(`step:${id}`, digest(content));
  }

  /** Show the server's version of the file at *uri* beside it. */
  async compare(uri) {
    const { id, path } = this.entry(uri) ?? {};
    if (!this.there[id]) return void vscode.window.showInformationMessage("Kirosync: this file is not on the server");
    const name = path.split("/").at(-1);
    await vscode.commands.executeCommand("vscode.diff", uri, uriOf("documents", id, name), `${name}: here ↔ server`);
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
    const path = unlinked(vscode.workspace.asRelativePath(uri));
    const sentence = here === undefined ? `Make ${path} as the server has it?` : `Replace ${path} by the server's version?`;
    if ((await vscode.window.showInformationMessage(sentence, "Take It")) !== "Take It") return;
    const shown = this.there[id]; // by now
    if (!shown) return void vscode.window.showInformationMessage("Kirosync: the server has it no longer");
    await this.#inStep(id, await replace(uri, shown.content));
  }
}

/** Put *content* into the file at *uri*, so that it can be undone; return what it is by then. */
const replace = async (uri, content) => {
  const made = new vscode.WorkspaceEdit();
  made.createFile(uri, { ignoreIfExists: true });
  await vscode.workspace.applyEdit(made);
  const document = await vscode.workspace.openTextDocument(uri);
  const change = new vscode.WorkspaceEdit();
  const lines = content.includes("\r\n") ? vscode.EndOfLine.CRLF : vscode.EndOfLine.LF;
  const whole = document.validateRange(new vscode.Range(0, 0, document.lineCount, 0));
  change.set(uri, [vscode.TextEdit.setEndOfLine(lines), vscode.TextEdit.replace(whole, content)]);
  const done = (await vscode.workspace.applyEdit(change)) && (await document.save());
  if (!done) throw new Error(`${vscode.workspace.asRelativePath(uri)} could not be written`);
  return document.getText();
};

const filesIn = (folder) => vscode.workspace.findFiles(new vscode.RelativePattern(folder, "**"), LEFT_OUT, FILES);

/** Yield *files* in parts that fit into a request. */
const batches = function* (files) {
  let [some, size] = [[], 0];
  for (const file of files) {
    if (some.length && size + file.content.length > PUSH_CHARACTERS) {
      yield some;
      [some, size] = [[], 0];
    }
    some.push(file);
    size += file.content.length;
  }
  if (some.length) yield some;
};

const tell = (pushed, asked) => {
  const left = asked > pushed ? `; ${asked - pushed} stayed (no text, too large, outside of the workspace, or not wanted)` : "";
  vscode.window.setStatusBarMessage(`Kirosync: ${pushed} pushed${left}`, 5000);
};

module.exports = { Documents, uriOf, idOf, SCHEME };
