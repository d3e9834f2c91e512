/*
 * Kirosync in an editor: this window is one of the hands of a service, and shows what it knows.
 *
 *     rules.js       what becomes what; no editor, no network, no clock
 *     http.js        fetch, by node's own http
 *     kirosync.js    the client of a service (clients/kirosync.js)
 *     link.js        the line to the service: a copy of its state, and what this window says of itself
 *     remote.js      executes the editor commands that others send, if the user of this editor lets it
 *     human.js       asks the human what waits for an answer
 *     documents.js   files of the workspace and documents of the service
 *     terminal.js    commands of the server
 *     views.js       trees and virtual documents
 *     extension.js   settings, the status bar, the commands of this editor; and all of it together
 */
"use strict";

const crypto = require("node:crypto");
const os = require("node:os");
const vscode = require("vscode");
const { Documents, idOf, SCHEME } = require("./documents.js");
const { Human } = require("./human.js");
const { Link, Refused } = require("./link.js");
const { Remote } = require("./remote.js");
const { line, cut, allows, endingOf, nameOfWindow, unlinked } = require("./rules.js");
const { runInTerminal } = require("./terminal.js");
const views = require("./views.js");

const SETTLE_MS = 200; // changes of files come in swarms
const LOOK_MS = 3000; // not every change of a file is told, and on some file systems none is
const SHOWN_MS = 150; // what is over sooner is not worth a change of the status bar
const FOCUS_MS = 1000; // who passes by a window has not chosen it
const LOGGED_CHARACTERS = 500; // of arguments, and of errors

const settings = () => vscode.workspace.getConfiguration("kirosync");

const folders = () => (vscode.workspace.workspaceFolders ?? []).map(({ uri }) => uri.fsPath);

/** Return the patterns of commands that may be executed; none, if somebody has made something else of the setting. */
const allowed = () => [settings().get("allowedCommands")].flat().filter((pattern) => typeof pattern === "string");

const ICONS = {
  online: "sync",
  connecting: "loading~spin",
  offline: "debug-disconnect",
  "no token": "key",
  "wrong token": "key",
};

/** The name of the secret: a token is for one service, and never goes to another. */
const secretOf = (url) => `token ${url}`;

/** What this window is connected to, and what follows from it. */
class Session {
  link = null;
  remote = null;
  human = new Human(this);
  documents = new Documents(this);
  records = new views.Records(this);
  trees = {
    questions: new views.List(() => views.questionItems(this.human.waiting)),
    conversations: new views.List(() => views.conversationItems(this.state.conversations)),
    documents: new views.List(async () => views.documentItems(await this.documents.list())),
  };
  bar = vscode.window.createStatusBarItem("kirosync", vscode.StatusBarAlignment.Left, 10);
  log = vscode.window.createOutputChannel("Kirosync", { log: true });
  #name = nameOfWindow(os.hostname(), vscode.workspace.name ?? "no folder", crypto.randomBytes(3).toString("hex"));
  #turn = Promise.resolve(); // connecting and disconnecting, one after the other
  #stirred;
  #soon;
  #focused;

  constructor(context) {
    this.context = context;
    this.memory = context.workspaceState;
    this.bar.name = "Kirosync";
    this.bar.command = "kirosync.menu";
    this.bar.show();
  }

  get state() {
    return this.link?.copy.state ?? { conversations: {}, documents: {}, commands: {} };
  }

  /** Connect to the service that the settings name, with the token that is kept for it. */
  connect() {
    this.#turn = this.#turn.then(() => this.#disconnect()).then(() => this.#connect());
    return this.#turn;
  }

  async #connect() {
    const url = settings().get("url"); // it may be another after a wait
    try {
      const token = await this.context.secrets.get(secretOf(url));
      if (token) this.#begin(new Link(url, token, this.#name, () => this.#about()));
    } catch (problem) {
      this.log.error(`${url}: ${problem.message}`);
    }
    this.show();
  }

  #begin(link) {
    this.link = link;
    this.remote = new Remote(link, this.#editor(), (...said) => this.#logged(...said), () => this.#showSoon());
    link.on("change", (change) => this.#heard(change));
    link.on("trouble", (problem) => this.log.warn(problem.message));
    link.on("state", () => {
      this.log.info(link.problem || `${link.state}: ${link.service.url}`);
      if (link.state === "online") this.#sendKept();
      if (link.state === "wrong token") this.#complain(link.problem);
      this.show();
    });
    link.run().catch((defect) => this.log.error(defect));
  }

  async #complain(problem) {
    if (await vscode.window.showErrorMessage(`Kirosync: ${unlinked(problem)}`, "Set Token")) await ACTIONS.setToken(this);
  }

  #editor() {
    return {
      execute: (command, given) => vscode.commands.executeCommand(command, ...given),
      parseUri: (text) => vscode.Uri.parse(text, true),
      folders,
      settings: () => ({ on: settings().get("remoteControl") === true, allowed: allowed() }),
    };
  }

  async #disconnect() {
    const { link, remote } = this;
    link?.removeAllListeners();
    this.link = this.remote = null;
    await remote?.close();
    await link?.close();
  }

  close() {
    this.#turn = this.#turn.then(() => this.#disconnect());
    return this.#turn;
  }

  /** What this window says of itself to the others. */
  async #about() {
    const patterns = allowed();
    const commands = await vscode.commands.getCommands(true);
    return {
      kind: "ide",
      types: settings().get("remoteControl") === true ? ["kiro_command"] : [],
      version: `${vscode.env.appName} ${vscode.version}`,
      availableCommands: commands.filter((command) => allows(patterns, command)).sort(),
      workspaceFolders: folders(),
      ...(this.#focused ? { focusedAt: this.#focused } : {}),
    };
  }

  /** Tell the others that this window is another than it was. */
  renewed() {
    this.link?.announce();
    this.remote?.heard(Object.keys(this.state.commands));
    this.show();
  }

  /** Tell the others which window is in front. */
  focused(there) {
    clearTimeout(this.#stirred);
    if (!there) return;
    this.#stirred = setTimeout(() => {
      this.#focused = Math.round(this.link?.copy.now() ?? Date.now());
      this.link?.announce({ focusedAt: this.#focused });
    }, FOCUS_MS);
    this.human.announce();
  }

  #heard(change) {
    const changed = (kind) => change.changed[kind].length + change.deleted[kind].length > 0;
    this.remote.heard([...change.changed.commands, ...change.deleted.commands]);
    if (this.human.hasChanged(change.changed.commands, change.deleted.commands)) this.#asked();
    if (changed("conversations")) this.trees.conversations.refresh();
    if (changed("documents")) this.trees.documents.refresh();
    this.records.refresh(new Set([...Object.values(change.changed), ...Object.values(change.deleted)].flat()));
    for (const [, why] of change.refused) vscode.window.showWarningMessage(`Kirosync: the service did not take it: ${unlinked(why)}`);
    if (Object.keys(change.lost).length) this.#offer(change.lost);
  }

  /** Show what waits for the human by now. */
  #asked() {
    this.trees.questions.refresh();
    this.human.announce();
    this.show();
  }

  /** Offer to bring back what the service had and has no longer, after a backup was restored. */
  async #offer(lost) {
    const count = Object.values(lost).flatMap(Object.keys).length;
    const sentence = `Kirosync: the service has lost ${count} records, or parts of them, that are known here.`;
    if (await vscode.window.showWarningMessage(sentence, "Bring Them Back")) await this.write(lost);
  }

  // What is written here is kept in a file until the service has it, also if the editor is closed before that.

  get #kept() {
    return vscode.Uri.joinPath(this.context.globalStorageUri, "unsent");
  }

  /** Write *push* to the service, now or when it is there; return whether it was not refused. */
  async write(push) {
    const { link } = this;
    const file = await this.#keep({ url: link.service.url, push });
    const taken = await this.#send(link, file, push);
    if (link.copy.outbox.length) vscode.window.setStatusBarMessage("Kirosync: kept; it is sent when the service is there", 5000);
    this.#heardOwn(push);
    return taken;
  }

  /** Keep *said* in a file, whole or not at all; return where. */
  async #keep(said) {
    const file = vscode.Uri.joinPath(this.#kept, `${crypto.randomUUID()}.json`);
    const aside = file.with({ path: `${file.path}.new` });
    await vscode.workspace.fs.createDirectory(this.#kept);
    await vscode.workspace.fs.writeFile(aside, new TextEncoder().encode(JSON.stringify(said)));
    await vscode.workspace.fs.rename(aside, file);
    return file;
  }

  async #send(link, file, push) {
    try {
      await link.copy.write(push);
      if (!link.copy.outbox.length) await this.#forget(file); // else it is not there yet
      return true;
    } catch (problem) {
      if (!(problem instanceof Refused)) throw problem;
      const place = vscode.Uri.joinPath(this.context.globalStorageUri, "refused", file.path.split("/").at(-1));
      await vscode.workspace.fs.rename(file, place, { overwrite: true });
      vscode.window.showErrorMessage(
        `Kirosync: the service did not take it: ${unlinked(problem.message)}. It is kept in ${place.fsPath}`,
      );
      return false;
    }
  }

  #forget(file) {
    return vscode.workspace.fs.delete(file).then(undefined, () => {}); // another window was faster
  }

  /** Send what a window could not: merging is idempotent, so it does no harm where it was sent after all. */
  async #sendKept() {
    const { link } = this;
    const files = await vscode.workspace.fs.readDirectory(this.#kept).then((found) => found, () => []);
    for (const [name] of files.filter(([name]) => name.endsWith(".json"))) {
      const file = vscode.Uri.joinPath(this.#kept, name);
      try {
        const { url, push } = JSON.parse(new TextDecoder().decode(await vscode.workspace.fs.readFile(file)));
        if (url === link.service.url) await this.#send(link, file, push);
      } catch (problem) {
        this.log.warn(`${file.fsPath} could not be sent: ${problem.message}`); // nor does it keep the others
      }
    }
  }

  #heardOwn(push) {
    for (const tree of Object.values(this.trees)) tree.refresh();
    this.records.refresh(new Set(Object.values(push).flatMap(Object.keys)));
  }

  // The log, and the status bar

  #logged({ id, command, args }, report) {
    const what = `${id} ${command} ${cut(JSON.stringify(args ?? []), LOGGED_CHARACTERS)}`;
    if (!report) this.log.info(`executing ${what}`);
    else if (report.status === "completed") this.log.info(`done in ${report.result.durationMs} ms: ${what}`);
    else this.log.warn(`failed (${report.outcome}): ${what}: ${cut(line(report.error), LOGGED_CHARACTERS)}`);
  }

  #showSoon() {
    clearTimeout(this.#soon);
    this.#soon = setTimeout(() => this.show(), SHOWN_MS);
  }

  show() {
    const [running] = this.remote?.running ?? [];
    const waiting = this.human.waiting.length;
    const on = settings().get("remoteControl");
    const state = this.link?.state ?? "no token";
    const parts = [
      `$(${ICONS[state]}) Kirosync${state === "online" ? "" : `: ${state}`}`,
      ...(on ? ["$(broadcast) remote control"] : []),
      ...(running ? [`$(loading~spin) ${running.command}`] : []),
      ...(waiting ? [`$(question) ${waiting}`] : []),
    ];
    this.bar.text = parts.join(" ");
    const control = on ? "Remote control is on: others may have this editor execute commands." : "Remote control is off.";
    this.bar.tooltip = [`${settings().get("url")}: ${this.link?.problem || state}`, control, `This window is ${this.#name}.`].join("\n");
    this.bar.backgroundColor = on
      ? new vscode.ThemeColor("statusBarItem.warningBackground")
      : ["offline", "wrong token"].includes(state)
        ? new vscode.ThemeColor("statusBarItem.errorBackground")
        : undefined;
    vscode.commands.executeCommand("setContext", "kirosync.state", state);
  }
}

// What the user can do. A function gets the session, and what was chosen in a view or the explorer.

const MENU = ["answer", "run", "append", "pushFile", "pushFolders", "showLog", "remoteControlOn", "remoteControlOff", "setToken"];

const ACTIONS = {
  async menu(session) {
    const { contributes } = session.context.extension.packageJSON;
    const on = settings().get("remoteControl");
    const hidden = on ? "remoteControlOn" : "remoteControlOff";
    const items = MENU.filter((name) => name !== hidden).map((name) => ({
      label: contributes.commands.find(({ command }) => command === `kirosync.${name}`).title,
      name,
    }));
    const title = `Kirosync: ${settings().get("url")}, ${session.link?.state ?? "no token"}`;
    const chosen = await vscode.window.showQuickPick(items, { title });
    if (chosen) await vscode.commands.executeCommand(`kirosync.${chosen.name}`);
  },

  async setToken(session) {
    const url = settings().get("url");
    const prompt = `The token of ${url}: on its machine in the file state/token, or in KIROSYNC_TOKEN. Empty forgets it.`;
    const token = await vscode.window.showInputBox({ title: "Kirosync", prompt, password: true, ignoreFocusOut: true });
    if (token === undefined) return;
    if (token.trim()) await session.context.secrets.store(secretOf(url), token.trim());
    else await session.context.secrets.delete(secretOf(url));
  },

  async remoteControlOn() {
    const detail =
      "Who has its token may then do with this editor what you can do, terminals included, so far as the setting " +
      `kirosync.allowedCommands lets them. Now it allows: ${allowed().join(", ")}`;
    const question = `Let others execute editor commands here, by ${settings().get("url")}?`;
    const chosen = await vscode.window.showWarningMessage(question, { modal: true, detail }, "Switch It On");
    if (chosen) await settings().update("remoteControl", true, vscode.ConfigurationTarget.Global);
  },

  remoteControlOff: () => settings().update("remoteControl", false, vscode.ConfigurationTarget.Global),

  showLog: (session) => session.log.show(),

  async run(session) {
    const command = await askCommand();
    if (command) runInTerminal(connected(session).link, command, { metadata: { initiatedBy: "ide" } });
  },

  async runFor(session, { id }) {
    const command = await askCommand();
    if (!command) return;
    const metadata = { initiatedBy: "ide", conversationId: id };
    const [ended, output] = await runInTerminal(connected(session).link, command, { metadata });
    const text = output.replace(/\x1b\[[0-9;?]*[A-Za-z]/g, "").replace(/\r/g, "");
    await append(session, id, "system", `\`\`\`\n$ ${command}\n${text}\n\`\`\`\n${endingOf(ended)}`, { commandId: ended.id });
  },

  answer: (session, chosen) => connected(session).human.answer(chosen?.id),
  refuse: (session, chosen) => connected(session).human.refuse(chosen?.id),
  askUser: (session, prompt, options) => connected(session).human.ask(prompt, options),

  openConversation(session, { id }) {
    const uri = views.conversationUri(session, id);
    const shown = vscode.commands.executeCommand("markdown.showPreview", uri);
    return shown.then(undefined, () => vscode.window.showTextDocument(uri)); // an editor may be without a preview
  },
  openConversationText: (session, { id }) => vscode.window.showTextDocument(views.conversationUri(session, id)),

  async append(session, chosen) {
    const id = await chooseConversation(connected(session), chosen);
    const content = id && (await vscode.window.showInputBox({ title: unlinked(id), prompt: "Your message", ignoreFocusOut: true }));
    if (content) await append(session, id, "user", content, { initiatedBy: "ide" });
  },

  async pushFile(session) {
    const uri = vscode.window.activeTextEditor?.document.uri;
    if (!uri) return void vscode.window.showInformationMessage("Kirosync: no file is open");
    await connected(session).documents.push([uri]);
  },

  push(session, chosen, all) {
    const several = Array.isArray(all) && all.length > 0 && all.every((each) => each instanceof vscode.Uri);
    return connected(session).documents.push(several ? all : [uriIn(chosen)]); // the explorer may say all that is selected
  },
  pushFolder: (session, uri) => connected(session).documents.pushFolder(uri),

  async pushFolders(session) {
    const entries = await connected(session).documents.list();
    const wanted = entries.filter(({ shared, state }) => shared && (state === "here" || state === "differs"));
    await session.documents.push(wanted.map(({ uri }) => uri));
  },

  async compare(session, chosen) {
    const uri = uriIn(chosen) ?? vscode.window.activeTextEditor?.document.uri;
    if (uri) await connected(session).documents.compare(uri);
  },

  async take(session, chosen) {
    const uri = uriIn(chosen) ?? vscode.window.activeTextEditor?.document.uri;
    const id = chosen?.id ?? (uri?.scheme === SCHEME ? idOf(uri) : uri && session.documents.entry(uri)?.id);
    if (id) await connected(session).documents.take(id);
  },
};

const uriIn = (chosen) => (chosen instanceof vscode.Uri ? chosen : chosen?.uri);

/** Return *session* if it has a service; else say what is missing. */
const connected = (session) => {
  if (session.link) return session;
  throw new Error("there is no service yet: set its address (kirosync.url) and its token (Kirosync: Set Token)");
};

const askCommand = () =>
  vscode.window.showInputBox({ title: "Kirosync", prompt: "A command for the server (bash)", ignoreFocusOut: true });

const chooseConversation = async (session, chosen) => {
  if (chosen?.id) return chosen.id;
  if (chosen instanceof vscode.Uri && chosen.scheme === SCHEME) return idOf(chosen);
  const known = views.conversationItems(session.state.conversations);
  const items = [...known.map(({ label, id }) => ({ label, id })), { label: "A new one", id: crypto.randomUUID() }];
  return (await vscode.window.showQuickPick(items, { title: "Write to which conversation?" }))?.id;
};

const append = (session, id, role, content, metadata) => {
  const message = { id: crypto.randomUUID(), role, content, timestamp: Math.round(session.link.copy.now()), metadata };
  return session.write({ conversations: { [id]: [message] } });
};

let session;

/** Begin, in a window that has just opened. */
exports.activate = async (context) => {
  session = new Session(context);
  const on = (...subscriptions) => context.subscriptions.push(...subscriptions);
  on(session.bar, session.log, vscode.workspace.registerTextDocumentContentProvider(SCHEME, session.records));
  for (const [name, tree] of Object.entries(session.trees)) {
    const view = vscode.window.createTreeView(`kirosync.${name}`, { treeDataProvider: tree });
    if (name === "documents") on(looking(view, tree));
    on(view);
  }
  for (const [name, act] of Object.entries(ACTIONS)) {
    on(vscode.commands.registerCommand(`kirosync.${name}`, (...given) => act(session, ...given)));
  }
  on(
    context.secrets.onDidChange(({ key }) => key === secretOf(settings().get("url")) && session.connect()),
    vscode.workspace.onDidChangeConfiguration((change) => {
      if (change.affectsConfiguration("kirosync.url")) session.connect();
      else if (change.affectsConfiguration("kirosync")) session.renewed();
    }),
    vscode.workspace.onDidChangeWorkspaceFolders(() => session.renewed()),
    vscode.extensions.onDidChange(() => session.renewed()),
    vscode.window.onDidChangeWindowState(({ focused }) => session.focused(focused)),
    ...watchers(),
  );
  await session.connect();
  session.focused(vscode.window.state.focused);
};

/** Look at what *tree* shows now and then, while it is seen. */
const looking = (view, tree) => {
  const look = () => tree.look().catch((problem) => session.log.warn(problem.message));
  const timer = setInterval(() => view.visible && vscode.window.state.focused && look(), LOOK_MS);
  return new vscode.Disposable(() => clearInterval(timer));
};

/** Look at the documents anew when files have changed. */
const watchers = () => {
  let timer;
  const stir = () => {
    clearTimeout(timer);
    timer = setTimeout(() => session.trees.documents.refresh(), SETTLE_MS);
  };
  const watcher = vscode.workspace.createFileSystemWatcher("**/*");
  const events = [watcher.onDidCreate(stir), watcher.onDidChange(stir), watcher.onDidDelete(stir)];
  return [watcher, ...events, vscode.workspace.onDidChangeTextDocument(({ document }) => document.uri.scheme === "file" && stir())];
};

/** End, while the window closes: what is executed here is lost, and the others are to know. */
exports.deactivate = () => session?.close();
