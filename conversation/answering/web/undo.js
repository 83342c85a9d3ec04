// Undo of what the reader changed: of a branch that was deleted, of a correction, of a mark.

import { childrenOf, goTo, isRoot, nodeOf, pathTo } from "./conversation.js";

const MOST = 50;

export class Undo {
  #steps = [];

  /** Remembers what a change did to a document's nodes. `what` completes "Undone: ". */
  record(before, after, what) {
    const ids = new Set([...Object.keys(before.nodes), ...Object.keys(after.nodes)]);
    const nodes = [...ids].filter((id) => before.nodes[id] !== after.nodes[id]).map((id) => [before.nodes[id], after.nodes[id]]);
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

/**
 * The document without what a step changed, and with everything that came since: of a node only the fields go back that
 * the step changed. What was deleted comes back, unless its parents are gone; what was added goes, unless more was asked
 * below it.
 */
export function undone(doc, step) {
  if (step.whole) return step.whole;
  const back = { ...doc, nodes: { ...doc.nodes } };
  for (const [before, after] of step.nodes) {
    const now = nodeOf(back, (before ?? after).id);
    if (!before) {
      if (now && !isRoot(now) && !childrenOf(back, now.id).length) delete back.nodes[now.id];
    } else if (now && after) back.nodes[before.id] = { ...now, ...former(before, after) };
    else if (!now && !after) back.nodes[before.id] = before;
  }
  for (const [before] of step.nodes) {
    if (before && nodeOf(back, before.id) && pathTo(back, before.id)[0].parent !== null) delete back.nodes[before.id];
  }
  return firstThatIsThere(back, [step.current, doc.current, doc.nodes[doc.current]?.parent]);
}

/** The fields that a step changed, as they were before it. */
const former = (before, after) => Object.fromEntries(Object.keys(after).filter((field) => before[field] !== after[field]).map((field) => [field, before[field]]));

const firstThatIsThere = (doc, ids) => goTo(doc, ids.find((id) => nodeOf(doc, id)) ?? doc.current);
