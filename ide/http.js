/*
 * fetch by node's own http, so far as kirosync.js uses it: the oldest editors have no fetch, and all of them route these
 * requests as their proxy settings say.
 */
"use strict";

const http = require("node:http");
const https = require("node:https");
const zlib = require("node:zlib");

const AGENTS = { "http:": new http.Agent({ keepAlive: true }), "https:": new https.Agent({ keepAlive: true }) };
const MODULES = { "http:": http, "https:": https };

/** Resolve to {status, headers, body, text} of an answer; a redirection is one like any other. */
const fetch = (url, { method, body, headers, signal }, again = true) =>
  new Promise((resolve, reject) => {
    const { protocol } = new URL(url);
    if (!MODULES[protocol]) throw new TypeError(`${url} is no http address`);
    const asked = MODULES[protocol].request(
      url,
      { method, signal, agent: AGENTS[protocol], headers: { ...headers, "Accept-Encoding": "gzip" } },
      (answer) => resolve(answerOf(answer)),
    );
    asked.on("error", (error) => {
      // The service has closed a connection that was kept: all that is asked here can be asked twice.
      if (again && asked.reusedSocket && error.code === "ECONNRESET") {
        resolve(fetch(url, { method, body, headers, signal }, false));
      } else reject(error);
    });
    asked.end(body);
  });

const answerOf = (answer) => {
  const zipped = answer.headers["content-encoding"] === "gzip";
  const stream = zipped ? answer.pipe(zlib.createGunzip()) : answer;
  if (zipped) answer.on("error", (error) => stream.destroy(error));
  const parts = stream[Symbol.asyncIterator]();
  return {
    status: answer.statusCode,
    headers: { get: (name) => answer.headers[name.toLowerCase()] ?? null },
    body: { getReader: () => ({ read: () => parts.next() }) },
  };
};

module.exports = { fetch };
