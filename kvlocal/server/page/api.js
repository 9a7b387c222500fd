// The server's paths, with the key that it asks for.

import { stored } from "./dom.js";

/** What the server refused, in its own words; status 0 if it cannot be reached. */
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Asks for a key, by whatever means; set by the page. It gets whether the last one was wrong, and resolves when there is another. */
let askForKey = async () => {};
let asking = null;

export function onKeyWanted(ask) {
  askForKey = ask;
}

async function call(path, options = {}) {
  for (;;) {
    const key = stored.get("kvlocal-key");
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    let response;
    try {
      response = await fetch(path, { ...options, headers });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server cannot be reached: is it still running?");
    }
    if (response.status === 401) {
      // several calls may find that out at once, and one may have the new key before another comes back
      if (key === stored.get("kvlocal-key")) {
        asking ??= askForKey(Boolean(key)).then((given) => stored.set("kvlocal-key", given)).finally(() => (asking = null));
        await asking;
      }
      continue;
    }
    if (!response.ok) throw new ApiError(response.status, await said(response));
    return response;
  }
}

async function said(response) {
  try {
    const { message } = (await response.json()).error;
    return `${message[0].toUpperCase()}${message.slice(1)}.`;
  } catch {
    return `The server answered with the status ${response.status}.`;
  }
}

const json = async (path, options) => (await call(path, options)).json();
const of = (id) => `conversations/${encodeURIComponent(id)}`;

export const props = () => json("props");
export const conversations = async () => (await json("conversations")).data;
export const messages = async (id) => (await json(of(id))).messages;
export const cacheMap = (id) => json(`${of(id)}/map`);
export const stop = (id) => json(`${of(id)}/stop`, { method: "POST" });
export const remove = (id) => json(of(id), { method: "DELETE" });

/** The chunks of an answer as they come. */
export async function* answer(body, signal) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
  let ended = false;
  for await (const data of events(response.body)) {
    if (data === "[DONE]") {
      ended = true;
      break;
    }
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(500, `${chunk.error.message[0].toUpperCase()}${chunk.error.message.slice(1)}.`);
    yield chunk;
  }
  if (!ended) throw new ApiError(0, "The answer broke off: the connection to the server ended.");
}

/** The data of server-sent events, each of which is one line here; lines that begin with a colon are pings. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trimStart();
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The answer broke off: the connection to the server ended.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
