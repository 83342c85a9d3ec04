// Undo of what the reader changed: of a branch that was deleted, of a correction, of a mark.

import { nodeOf } from "./conversation.js";

const MOST = 50;

export class Undo {
  #steps = [];

  /** Remembers what a change did to a document's nodes. `what` completes "Undone: ". */
  record(before, after, what) {
    const ids = new Set([...Object.keys(before.nodes), ...Object.keys(after.nodes)]);
    const nodes = [...ids].filter((id) => before.nodes[id] !== after.nodes[id]).map((id) => [id, before.nodes[id]]);
    this.#push({ id: before.id, what, nodes, current: before.current });
  }

  /** Remembers a whole conversation that was deleted. */
  recordDeleted(doc) {
    this.#push({ id: doc.id, what: "the conversation was deleted", whole: doc });
  }

  /** The newest step of this conversation, or of a deleted one; it is taken off. */
  take(doc) {
    const at = this.#steps.findLastIndex((step) => step.whole || step.id === doc?.id);
    return at < 0 ? null : this.#steps.splice(at, 1)[0];
  }

  #push(step) {
    this.#steps = [...this.#steps.slice(1 - MOST), step];
  }
}

/** The document as it was before a step, with everything that came since. */
export function undone(doc, step) {
  if (step.whole) return step.whole;
  const nodes = { ...doc.nodes };
  for (const [id, before] of step.nodes) {
    if (before) nodes[id] = before;
  }
  const back = { ...doc, nodes };
  return { ...back, current: nodeOf(back, step.current) ? step.current : doc.current };
}
