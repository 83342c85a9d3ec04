// The conversation document: one tree of questions and answers. Documents and nodes are values: a change makes a new
// one, so that whoever holds an old one (undo, merge, a view) can compare by identity.

export const VERSION = 1;

/** A random id; crypto.randomUUID is missing where a page is served over plain HTTP from another machine. */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return hex.replace(/^(.{8})(.{4})(.{4})(.{4})(.{12})$/, "$1-$2-$3-$4-$5");
}

const now = () => new Date().toISOString();

export function newNode(parent, question, fromChoice = null) {
  return {
    id: newId(),
    parent,
    question,
    fragments: [],
    choices: [],
    from_choice: fromChoice,
    state: "draft",
    mark: null,
    favourite: false,
    corrected: false,
    picked: [0, 0, 0],
    created: now(),
  };
}

export function newConversation(question) {
  const root = newNode(null, question);
  return {
    version: VERSION,
    id: newId(),
    title: question,
    created: root.created,
    revision: 0,
    current: root.id,
    nodes: { [root.id]: root },
  };
}

// --- reading --------------------------------------------------------------------------------------------------------

export const nodeOf = (doc, id) => (Object.hasOwn(doc.nodes, id) ? doc.nodes[id] : undefined);
export const currentNode = (doc) => nodeOf(doc, doc.current);
export const rootOf = (doc) => Object.values(doc.nodes).find((node) => node.parent === null);
export const isRoot = (node) => node.parent === null;

const byAge = (a, b) => (a.created < b.created ? -1 : a.created > b.created ? 1 : a.id < b.id ? -1 : 1);

/** The children of every node that has some, the oldest first: a Map from the parent's id to nodes. */
export function childrenByParent(doc) {
  const children = new Map();
  for (const node of Object.values(doc.nodes).sort(byAge)) {
    if (children.has(node.parent)) children.get(node.parent).push(node);
    else children.set(node.parent, [node]);
  }
  return children;
}

export const childrenOf = (doc, id) => childrenByParent(doc).get(id) ?? [];
export const siblingsOf = (doc, node) => (isRoot(node) ? [node] : childrenOf(doc, node.parent));

/** The nodes from the root to this one, both included. */
export function pathTo(doc, id) {
  const path = [];
  for (let node = nodeOf(doc, id); node; node = nodeOf(doc, node.parent)) path.unshift(node);
  return path;
}

/** The ids of a node and of everything below it. */
export function branchOf(doc, id) {
  const children = childrenByParent(doc);
  const ids = [id];
  for (const each of ids) ids.push(...(children.get(each) ?? []).map((child) => child.id));
  return ids;
}

/** The conversation before a question that is asked below `parent`, as the API takes it. */
export function historyBelow(doc, parent) {
  return pathTo(doc, parent).flatMap(({ question, fragments }) => [
    { speaker: "User", text: question },
    ...fragments.map((text) => ({ speaker: "AI", text })),
  ]);
}

/** The choice of this node that has this text, by its place; null if none has. */
export function choiceWithText(node, text) {
  const same = (other) => other.trim().toLowerCase() === text.trim().toLowerCase();
  const place = node ? node.choices.findIndex((choice) => same(choice.text)) : -1;
  return place < 0 ? null : place;
}

/** The likeliest choice first: the places 0 to 2, sorted. */
export const byConfidence = (choices) =>
  choices.map((_, i) => i).sort((a, b) => choices[b].confidence - choices[a].confidence || a - b);

export const sameAnswer = (a, b) =>
  JSON.stringify([a.fragments, a.choices]) === JSON.stringify([b.fragments, b.choices]);

// --- changing -------------------------------------------------------------------------------------------------------

export const goTo = (doc, id) => (nodeOf(doc, id) && id !== doc.current ? { ...doc, current: id } : doc);

export const withNode = (doc, node) => ({ ...doc, nodes: { ...doc.nodes, [node.id]: node } });

export const changeNode = (doc, id, change) => (nodeOf(doc, id) ? withNode(doc, { ...nodeOf(doc, id), ...change }) : doc);

const parts = ({ fragments, choices }) => fragments.length + choices.length;

/** With what has arrived of an answer. A draft that is asked again keeps what it had until as much has come. */
export function received(doc, id, { fragments, choices, state }) {
  if (state === "whole") return changeNode(doc, id, { fragments, choices, state });
  return parts({ fragments, choices }) < parts(nodeOf(doc, id)) ? doc : changeNode(doc, id, { fragments, choices, state: "draft" });
}

/** With one more pick of a node's choice. */
export function counted(doc, id, place) {
  const picked = (nodeOf(doc, id).picked ?? [0, 0, 0]).map((count, i) => count + (i === place));
  return changeNode(doc, id, { picked });
}

/** Without a node and what is below it. The parent becomes current if the current node goes. */
export function withoutBranch(doc, id) {
  const gone = new Set(branchOf(doc, id));
  const { parent } = nodeOf(doc, id);
  const nodes = Object.fromEntries(Object.entries(doc.nodes).filter(([each]) => !gone.has(each)));
  return { ...doc, nodes, current: gone.has(doc.current) ? parent : doc.current };
}

/** Whether an answer that was whole has other words in the newer document: what was asked below it no longer fits. */
export const reworded = (before, after) =>
  Object.values(before.nodes).some((node) => {
    const now = node.state === "whole" && nodeOf(after, node.id);
    return now && JSON.stringify([now.question, now.fragments]) !== JSON.stringify([node.question, node.fragments]);
  });

/** With an answer in other words beside a node's own: a sibling, or, for a root, which has none, a child of it. */
export function withOtherWords(doc, id, { fragments, choices }) {
  const node = nodeOf(doc, id);
  const beside = isRoot(node) ? newNode(id, node.question) : newNode(node.parent, node.question, node.from_choice);
  return goTo(withNode(doc, { ...beside, fragments, choices, state: "whole", corrected: true }), beside.id);
}

/** A corrected answer. Questions that were asked by a choice whose text changes, change with it. */
export function corrected(doc, id, { fragments, choices }) {
  const node = nodeOf(doc, id);
  let next = changeNode(doc, id, { fragments, choices, corrected: true, state: "whole" });
  for (const child of childrenOf(doc, id)) {
    const before = node.choices[child.from_choice]?.text;
    const after = choices[child.from_choice]?.text;
    if (before !== undefined && after !== before) next = changeNode(next, child.id, { question: after });
  }
  return next;
}
