/*
 * What becomes what: arguments, results, names, texts. No editor, no network, no clock.
 */
"use strict";

const OUTPUT_CHARACTERS = 4 << 20; // of a result: the service takes 32 MB a request
const ID_CHARACTERS = 128; // of the id of a record
const NAME_BYTES = 220; // of an id, percent-encoded
const TITLE_CHARACTERS = 60;

/**
 * Return the argument of an editor command that a *text* stands for.
 *
 * The URI of a file becomes what *parseUri* makes of it, JSON the value that it says; all else stays a text. So a text
 * that looks like one of those is sent as JSON: "\"42\"".
 */
const argument = (text, parseUri) => {
  if (/^(file|vscode-remote):\/\//.test(text)) return parseUri(text);
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
};

/** Return the text that the *value* of a command is told as: "" for nothing, JSON for what is no text. */
const textOf = (value) => {
  const text = typeof value === "string" ? value : JSON.stringify(value ?? undefined, withoutCycles()) ?? "";
  const cut = text.length <= OUTPUT_CHARACTERS ? "" : `\n[cut: ${text.length} characters]`;
  return wellFormed(text.slice(0, OUTPUT_CHARACTERS)) + cut;
};

/** Return *text* with halves of surrogate pairs replaced, which no request can carry. */
const wellFormed = (text) => text.replace(/\p{Surrogate}/gu, "\ufffd");

/**
 * Return *text* as it can be shown where the editor makes links of `[label](command:...)`, which act when clicked on.
 *
 * Whoever can write to the service writes such texts: a link would be their hand in this editor.
 */
const unlinked = (text) => withoutCommands(String(text).replace(/\](?=[[(])/g, "]\u200b"));

/** Return what JSON.stringify is to ask about each value: what holds itself is told once. */
const withoutCycles = () => {
  const around = [];
  return function (key, value) {
    if (typeof value === "bigint") return String(value);
    if (typeof value !== "object" || value === null) return value;
    while (around.length && around.at(-1) !== this) around.pop();
    if (around.includes(value)) return "[circular]";
    around.push(value);
    return value;
  };
};

/** Return whether one of *patterns*, in which `*` stands for any part, is the id of a *command*. */
const allows = (patterns, command) => patterns.some((pattern) => matches(pattern.split("*"), command));

/** Return whether *text* begins with the first of *parts*, ends with the last, and has the others between, in order. */
const matches = ([first, ...others], text) => {
  if (!others.length) return text === first;
  const last = others.pop();
  if (!text.startsWith(first)) return false;
  let at = first.length;
  for (const part of others) {
    const found = text.indexOf(part, at);
    if (found < 0) return false;
    at = found + part.length;
  }
  return text.length - last.length >= at && text.endsWith(last);
};

/** Return whether the *path* is the *folder* or in it, by their names, on whatever system they are. */
const contains = (folder, path) => {
  const names = (text) => text.split(/[/\\]/).filter(Boolean);
  let [outer, inner] = [names(folder), names(path)];
  if (outer[0]?.endsWith(":")) [outer, inner] = [outer, inner].map((parts) => parts.map((part) => part.toLowerCase()));
  return outer.every((part, at) => part === inner[at]);
};

/** Return whether a *command* is for the window *name* that has *folders* open. */
const isFor = (command, name, folders) =>
  command.type === "kiro_command" &&
  (command.target ?? name) === name &&
  (command.target === name || !command.workspacePath || isOpen(command.workspacePath, folders));

const isOpen = (path, folders) => folders.some((folder) => contains(folder, path));

/** Return the id under which the file at *path* of the folder *root* is shared: the same on every machine. */
const documentId = (root, path, digest) => {
  const id = `${root}/${path}`;
  if (id.length <= ID_CHARACTERS && Buffer.byteLength(encodeURIComponent(id)) <= NAME_BYTES) return id;
  const end = [...id].slice(-20).join("").replace(/[^A-Za-z0-9._-]/g, "_");
  return `${digest(id).slice(0, 40)}-${end}`;
};

/** Return the name of a window: *host* and *folder*, and a *mark* that no other window has. */
const nameOfWindow = (host, folder, mark) => {
  const told = [...`${host}/${folder}`.replace(/[\u0000-\u001f\u007f-\u009f]/g, "")];
  while (Buffer.byteLength(encodeURIComponent(told.join(""))) > NAME_BYTES / 2) told.pop();
  return `${told.join("")}#${mark}`;
};

/** Return how a file stands, whose content *here* and *there* is given, undefined where there is none. */
const standing = (here, there) => {
  if (here === undefined) return "there";
  if (there === undefined) return "here";
  return here === there ? "same" : "differs";
};

/** Return whether to push may replace what someone else wrote: *there* is neither *here*, nor what was in step last. */
const isContested = (here, there, inStep, digest) =>
  there !== undefined && there !== here && digest(there) !== inStep;

const line = (text) => text.replace(/\s+/g, " ").trim();

const cut = (text, length) => ([...text].length > length ? `${[...text].slice(0, length - 1).join("")}…` : text);

/** Return what a conversation is called: what its first message says, or its *id*. */
const titleOf = (id, messages) => {
  const said = messages.find((message) => message.role === "user" && line(message.content)) ?? messages[0];
  return cut(line(said?.content ?? "").replace(/^#+ |\*+|`/g, ""), TITLE_CHARACTERS) || id;
};

/** Return *text* with the code block closed that it leaves open, as one that is still being written does. */
const closed = (text) => {
  let open = "";
  for (const row of text.split("\n")) {
    const [, fence, more] = row.match(/^ {0,3}(`{3,}|~{3,})(.*)$/) ?? [];
    if (!fence) continue;
    if (!open) open = fence;
    else if (fence[0] === open[0] && fence.length >= open.length && !more.trim()) open = "";
  }
  return open ? `${text}\n${open}` : text;
};

/** Return *text* without the scheme by which a link executes a command of the editor. */
const withoutCommands = (text) => text.replace(/\bcommand(?=:)/gi, "$&\u200b");

/** Return the *messages* of a conversation as Markdown. *when* makes a text of a timestamp (ms). */
const markdownOf = (id, messages, when) => {
  const parts = messages.map(
    ({ role, timestamp, content }) => `#### ${role} · ${when(timestamp)}\n\n${closed(content)}\n`,
  );
  return withoutCommands(`\`${id.replaceAll("`", "'")}\`\n\n${parts.join("\n---\n\n")}`);
};

/** Return how a *command* of the server ended, in words. */
const endingOf = (command) => {
  const exit = command.result?.exitCode;
  const took = command.result?.durationMs ?? (command.endedAt ?? 0) - (command.startedAt ?? command.endedAt ?? 0);
  const how = command.outcome === "ok" || command.outcome === "exit" ? `exit code ${exit ?? 0}` : command.outcome;
  const why = ["ok", "exit"].includes(command.outcome) || !command.error ? "" : `: ${command.error}`;
  const where = command.agent ? `, on ${command.agent}` : "";
  return `${how}${why}, after ${(took / 1000).toFixed(1)} s${where}`;
};

/** Return the question that the arguments of `kirosync.askUser` stand for. */
const questionOf = (prompt, options) => {
  if (typeof prompt !== "string" || !prompt.trim()) throw new TypeError("kirosync.askUser wants the question as a text");
  const { choices, inputType = choices ? "choice" : "text", expiresIn, executionId } = options ?? {};
  const given = { inputType, choices, expiresIn, executionId };
  const said = Object.fromEntries(Object.entries(given).filter(([, value]) => value !== undefined));
  return { type: "user_input", prompt, ...said };
};

module.exports = {
  ...{ argument, textOf, wellFormed, unlinked, allows, contains, isFor, isOpen, documentId, nameOfWindow, standing, isContested, line, cut, titleOf },
  ...{ closed, markdownOf, endingOf, questionOf },
};
