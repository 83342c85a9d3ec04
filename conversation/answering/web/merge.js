// Two tabs, or a tab and the server, changed one conversation: a three-way merge, node by node.
//
// A node that one side added stays. A node that one side deleted goes, unless the other side changed it or added below
// it. Where both sides changed the words of one answer, theirs stays and ours stands beside it as a sibling.

import { nodeOf, newId } from "./conversation.js";

const same = (a, b) => a === b || JSON.stringify(a) === JSON.stringify(b);
const WORDS = ["question", "fragments", "choices", "state"];
const words = (node) => WORDS.map((field) => node[field]);

/**
 * `base` is the last document that both sides knew (null: none), `ours` and `theirs` what became of it.
 * Gives {doc, copies, both}: the merged document, at the place where ours stands; the ids of our versions of nodes that
 * are kept twice; whether both sides changed nodes at all.
 */
export function merge(base, ours, theirs) {
  const nodes = {};
  const copies = [];
  for (const id of new Set([...Object.keys(theirs.nodes), ...Object.keys(ours.nodes)])) {
    const [before, our, their] = [base && nodeOf(base, id), nodeOf(ours, id), nodeOf(theirs, id)];
    if (our && their) {
      nodes[id] = mergeNodes(before, our, their);
      if (bothChangedWords(before, our, their)) copies.push(our);
    } else if (!before || !same(before, our ?? their)) {
      nodes[id] = our ?? their;
    }
  }
  keepParents(nodes, ours, theirs);
  const copied = copies.filter(({ id }) => Object.hasOwn(nodes, id)).map((node) => placeCopy(nodes, node));
  const pick = (field) => (base && same(ours[field], base[field]) ? theirs[field] : ours[field]);
  const doc = { ...theirs, title: pick("title"), nodes, current: firstThatExists(nodes, ours, theirs) };
  return { doc, copies: copied, both: !(base && (same(base.nodes, ours.nodes) || same(base.nodes, theirs.nodes))) };
}

function bothChangedWords(before, our, their) {
  const [a, b] = [words(our), words(their)];
  if (same(a, b) || startsLike(our, their) || startsLike(their, our)) return false;
  return !before || !(same(words(before), a) || same(words(before), b));
}

/** Whether `part` is a draft of `whole`: the same answer, of which less had arrived. */
const startsLike = (part, whole) =>
  part.state === "draft" &&
  part.question === whole.question &&
  part.fragments.every((text, i) => text === whole.fragments[i]) &&
  part.choices.every((choice, i) => same(choice, whole.choices[i]));

const NO_PICKS = [0, 0, 0];

function mergeNodes(before, our, their) {
  const merged = { ...their };
  for (const field of Object.keys(our)) {
    if (field === "picked") merged.picked = NO_PICKS.map((_, i) => sum(before?.picked?.[i], our.picked?.[i] ?? 0, their.picked?.[i] ?? 0));
    else if (!WORDS.includes(field) && !(before && same(our[field], before[field]))) merged[field] = our[field];
  }
  const oursOnly = before ? same(words(before), words(their)) : false;
  if (oursOnly || startsLike(their, our)) for (const field of WORDS) merged[field] = our[field];
  return merged;
}

/**
 * What both counted: picks since `before` come together; without it, the greater count holds both. Equal counts are the
 * same picks: the server had them, and its answer was lost.
 */
const sum = (before, our, their) => (before === undefined || our === their ? Math.max(our, their) : our + their - before);

/** A node that stays keeps its parents, also those that the other side deleted. */
function keepParents(nodes, ours, theirs) {
  for (const node of Object.values(nodes)) {
    for (let id = node.parent; id !== null && !Object.hasOwn(nodes, id); id = nodes[id].parent) {
      const parent = nodeOf(ours, id) ?? nodeOf(theirs, id);
      if (!parent) break; // neither side has it
      nodes[id] = parent;
    }
  }
  dropOrphans(nodes);
}

/** A node whose parents are nowhere, as an older version of this page left them, has no place in the tree. */
function dropOrphans(nodes) {
  const isOrphan = ({ parent }) => parent !== null && !Object.hasOwn(nodes, parent);
  for (let orphan; (orphan = Object.values(nodes).find(isOrphan)); ) delete nodes[orphan.id];
}

/** Our words of a node that has theirs: a sibling, or, for a root, which has none, a child of it. */
function placeCopy(nodes, node) {
  const copy = { ...node, id: newId(), parent: node.parent ?? node.id, from_choice: node.parent ? node.from_choice : null };
  nodes[copy.id] = copy;
  return copy.id;
}

function firstThatExists(nodes, ours, theirs) {
  for (let id = ours.current; id !== null && id !== undefined; id = nodeOf(ours, id)?.parent) {
    if (Object.hasOwn(nodes, id)) return id;
  }
  return Object.hasOwn(nodes, theirs.current) ? theirs.current : Object.values(nodes).find((node) => !node.parent).id;
}
