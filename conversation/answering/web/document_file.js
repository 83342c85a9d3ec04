// A complete copy of a conversation: the page's own document, with drafts, marks and second answers.

import { VERSION, newId } from "./conversation.js";
import { ImportProblem } from "./tree_file.js";
import { LIMITS, oneLine } from "./rules.js";

const MOST_NODES = 5000;
const LONGEST = 4000; // characters, as the server takes them

export const toDocumentFile = (doc) => JSON.stringify(doc) + "\n";

export const isDocument = (value) => value?.version === VERSION && typeof value.nodes === "object";

/** A new conversation from a copy, with ids of its own, so that it stands beside the one it was copied from. */
export function fromDocument(value) {
  const nodes = Object.values(value.nodes ?? {});
  if (nodes.length > MOST_NODES) throw new ImportProblem([`${nodes.length} nodes, ${MOST_NODES} fit`]);
  const ids = new Map(nodes.map((node) => [node?.id, newId()]));
  const made = nodes.map((node) => cleanNode(node, ids));
  const roots = made.filter((node) => node.parent === null);
  if (roots.length !== 1) throw new ImportProblem([`${roots.length} first questions, there must be one`]);
  const byId = Object.fromEntries(made.map((node) => [node.id, node]));
  for (const node of made) {
    let steps = 0;
    for (let at = node; at.parent !== null; at = byId[at.parent]) {
      if (++steps > made.length) throw new ImportProblem([`“${node.question}” is part of a circle`]);
    }
  }
  return {
    version: VERSION,
    id: newId(),
    title: text(value.title, "the title"),
    created: date(value.created),
    revision: 0,
    current: ids.get(value.current) ?? roots[0].id,
    nodes: byId,
  };
}

function cleanNode(node, ids) {
  const list = (values, most, what) => {
    if (!Array.isArray(values) || values.length > most) throw new ImportProblem([`a node has no list of at most ${most} ${what}`]);
    return values;
  };
  if (typeof node !== "object" || node === null) throw new ImportProblem(["a node is no object"]);
  if (node.parent !== null && !ids.has(node.parent)) throw new ImportProblem([`“${node.question}” has no parent`]);
  const choices = list(node.choices, LIMITS.choices, "choices").map((choice) => ({
    text: text(choice?.text, "a choice"),
    confidence: Number.isFinite(choice?.confidence) ? Math.min(1, Math.max(0, choice.confidence)) : 0,
    target: text(choice?.target, "a target"),
  }));
  return {
    id: ids.get(node.id),
    parent: node.parent === null ? null : ids.get(node.parent),
    question: text(node.question, "a question"),
    fragments: list(node.fragments, LIMITS.fragments, "fragments").map((each) => text(each, "a fragment")),
    choices,
    from_choice: [0, 1, 2].includes(node.from_choice) ? node.from_choice : null,
    state: node.state === "whole" && choices.length === LIMITS.choices && node.fragments.length ? "whole" : "draft",
    mark: ["good", "bad"].includes(node.mark) ? node.mark : null,
    favourite: node.favourite === true,
    corrected: node.corrected === true,
    picked: [0, 1, 2].map((i) => (Number.isInteger(node.picked?.[i]) && node.picked[i] > 0 ? node.picked[i] : 0)),
    created: date(node.created),
  };
}

function text(value, what) {
  if (typeof value !== "string" || !oneLine(value) || value.length > LONGEST) throw new ImportProblem([`${what} is no text`]);
  return oneLine(value);
}

const date = (value) => new Date(Number.isNaN(Date.parse(value)) ? Date.now() : Date.parse(value)).toISOString();
