// The server's own API. Every failure is a ServerError with a sentence for the reader.

/** `status` is the HTTP status, 0 when no server answered; `retryAfter` are seconds. */
export class ServerError extends Error {
  constructor(message, { hint = "", status = 0, retryAfter = 0, body = null } = {}) {
    super(message);
    Object.assign(this, { hint, status, retryAfter, body });
  }
}

/** What went wrong and what to do, as sentences. */
export const sentences = ({ message, hint }) => [message, hint].filter(Boolean).map(sentence).join(" ");

function sentence(text) {
  const line = text.trim();
  return line[0].toUpperCase() + line.slice(1) + (/[.!?]$/.test(line) ? "" : ".");
}

const LONGEST_WAIT = 60_000; // milliseconds; not for an answer of the model
const noAnswer = () => new ServerError("The server does not answer.", { hint: "What you do is kept in this browser." });

async function request(method, path, { body, signal } = {}) {
  const headers = body === undefined ? {} : { "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw noAnswer();
  }
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  throw new ServerError(answer?.error?.message ?? `The server refused this (status ${response.status}).`, {
    hint: answer?.error?.hint,
    status: response.status,
    retryAfter: Number(response.headers.get("Retry-After")) || 0,
    body: answer,
  });
}

async function json(method, path, options) {
  const response = await request(method, path, { signal: AbortSignal.timeout(LONGEST_WAIT), ...options });
  if (response.status === 204) return null;
  try {
    return await response.json();
  } catch {
    throw noAnswer(); // it broke off, or took too long
  }
}

const conversation = (id) => `api/conversations/${encodeURIComponent(id)}`;

export const health = (signal) => json("GET", "health", { signal });
export const model = () => json("GET", "api/model");
export const listConversations = () => json("GET", "api/conversations");
export const getConversation = (id) => json("GET", conversation(id));
export const putConversation = (doc) => json("PUT", conversation(doc.id), { body: doc });
export const deleteConversation = (id) => json("DELETE", conversation(id));
export const saveTrainingTree = (id, leaveOut) =>
  json("POST", `${conversation(id)}/training_tree`, { body: { leave_out: leaveOut } });

/**
 * Asks the model; `prompt` is {question, history, prefetch, seed}, with a seed for an answer that is to differ. Yields {event: "fragment" | "choice" | "done", data} as each arrives, ends after "done".
 * Raises ServerError, also when the answer breaks off, and AbortError when `signal` was given up.
 */
export async function* answer(prompt, signal) {
  const response = await request("POST", "api/answer", { body: prompt, signal });
  for await (const { event, data } of events(response.body)) {
    if (event === "error") throw new ServerError(data.error?.message ?? "The answer failed.", { hint: data.error?.hint, status: 500 });
    yield { event, data };
    if (event === "done") return;
  }
  throw new ServerError("The answer broke off.", { hint: "What had come is kept." });
}

/** Server-sent events with JSON data, from the body of a response. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (rest + value).replaceAll("\r\n", "\n").split("\n\n");
      rest = blocks.pop();
      yield* blocks.map(parseEvent).filter(Boolean);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The answer broke off.", { hint: "What had come is kept." });
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parseEvent(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    const [, field, value] = line.match(/^(\w+): ?(.*)$/) ?? [];
    if (field === "event") event = value;
    if (field === "data") data.push(value);
  }
  if (!data.length) return null; // a comment that keeps the connection open
  try {
    return { event, data: JSON.parse(data.join("\n")) };
  } catch {
    throw new ServerError("The server sent something that is no answer.", { status: 502 });
  }
}
