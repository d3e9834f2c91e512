"use strict";

// Commands for the tests to execute, by whatever way is tested; and this host's own ear, for asking it past that way.

const fs = require("fs");
const http = require("http");
const path = require("path");
const vscode = require("vscode");

// ---------------------------------------------------------------- Commands

let marks = 0;

function described(value) {
  if (value instanceof vscode.Uri) return { type: "Uri", value: value.toString() };
  return { type: typeof value, value };
}

function cycle() {
  const round = { name: "round" };
  round.self = round;
  return round;
}

function slow(ms) {
  return new Promise((resolve) => setTimeout(resolve, ms));
}

/** What a human sees of this window, and the text that a test could not see. */
function state() {
  const active = vscode.window.activeTextEditor;
  return {
    activeEditor: active ? active.document.uri.toString() : null,
    text: active ? active.document.getText() : null,
    language: active ? active.document.languageId : null,
    visibleEditors: vscode.window.visibleTextEditors.map((editor) => editor.document.uri.toString()),
    untitled: vscode.workspace.textDocuments.filter((document) => document.isUntitled).length,
    tabs: vscode.window.tabGroups.all.flatMap((group) => group.tabs.map((tab) => tab.label)),
    folders: (vscode.workspace.workspaceFolders || []).map((folder) => folder.uri.toString()),
    marks,
  };
}

/** Execute a command so often, one after the other; return the median in ms. */
async function median(command, count, ...args) {
  const spent = [];
  for (let round = 0; round < count; round++) {
    const started = performance.now();
    await vscode.commands.executeCommand(command, ...args);
    spent.push(performance.now() - started);
  }
  return spent.sort((a, b) => a - b)[Math.floor(count / 2)];
}

async function read(uri) {
  return (await vscode.workspace.openTextDocument(vscode.Uri.parse(uri))).getText();
}

/** Show the file at a path. */
async function show(path) {
  await vscode.window.showTextDocument(vscode.Uri.file(path), { preview: false });
}

/** Make these the user's settings, as the editor's own page of settings does. */
async function configure(settings) {
  for (const [name, value] of Object.entries(settings)) {
    await vscode.workspace.getConfiguration().update(name, value, vscode.ConfigurationTarget.Global);
  }
}

const COMMANDS = {
  "probe.noop": () => {},
  "probe.mark": () => { marks++; },
  "probe.echo": (...args) => args.map(described),
  "probe.object": () => ({ answer: 42, nested: { list: [1, 2] } }),
  "probe.throws": () => { throw new Error("probe was asked to throw"); },
  "probe.cycle": cycle,
  "probe.slow": slow,
  "probe.state": state,
  "probe.median": median,
  "probe.read": read,
  "probe.show": show,
  "probe.configure": configure,
  "probe.ask": (...args) => vscode.commands.executeCommand("kirosync.askUser", ...args),
};

// ---------------------------------------------------------------- Ear

async function answer(body) {
  try {
    const [command, ...args] = JSON.parse(body);
    return JSON.stringify({ value: await vscode.commands.executeCommand(command, ...args) });
  } catch (error) {
    return JSON.stringify({ error: String(error && error.message || error) });
  }
}

async function hear(request, response) {
  const chunks = [];
  for await (const chunk of request) chunks.push(chunk);
  response.end(await answer(Buffer.concat(chunks).toString()));
}

/** Say in the folder PROBE_HOSTS, in a file named like this process, at which port it can be asked. */
function announce(port) {
  const file = path.join(process.env.PROBE_HOSTS, String(process.pid));
  fs.writeFileSync(`${file}.new`, String(port));
  fs.renameSync(`${file}.new`, file);  // so nobody reads half of it
}

exports.activate = (context) => {
  for (const [name, run] of Object.entries(COMMANDS)) {
    context.subscriptions.push(vscode.commands.registerCommand(name, run));
  }
  const ear = http.createServer(hear).listen(0, "127.0.0.1", () => announce(ear.address().port));
  context.subscriptions.push({ dispose: () => ear.close() });
};
