// A conversation as a tree file (data/conversation_tree.schema.json), and a tree file as a conversation.
//
// A tree has one answer to a question, exactly three follow-ups a node, and no orphans. So an own question takes the
// place of the least likely follow-up that nobody followed; of several answers to one question one marked good, else on
// a marked path, else corrected, else the newest stands; drafts and what was marked bad stay out.

import { childrenByParent, newConversation, newNode, rootOf, withNode } from "./conversation.js";
import { LIMITS, answerProblems, isName, textProblem } from "./rules.js";

// --- to a file ------------------------------------------------------------------------------------------------------

/**
 * Gives {name, tree, problems, crowded, left}: the root's name, the file's content, what the reader would refuse
 * (sentences), nodes with more followed questions than places [{node, questions: [{question, ids}]}], with the ids of
 * all answers to each, and how many answers stay out.
 * `leaveOut` holds ids of nodes that the user does not want in it.
 */
export function toTree(doc, leaveOut = new Set()) {
  const children = childrenByParent(doc);
  const problems = [];
  const crowded = [];
  const used = new Set();
  const root = rootOf(doc);
  const kept = (node) => node.state === "whole" && node.mark !== "bad" && !leaveOut.has(node.id);
  if (!kept(root)) problems.push(`The first answer is ${root.mark === "bad" ? "marked bad" : "not whole"}: a tree begins with it.`);
  report(problems, "The first question", textProblem(root.question, LIMITS.question_root));

  const name = uniqueName(nameFrom(root.question), "", used);
  const tree = { question: root.question, root: name, nodes: {} };
  let count = 0;

  function add(node, nodeName) {
    count += 1;
    const places = takePlaces(node, (children.get(node.id) ?? []).filter(kept));
    if (places.length > LIMITS.choices) crowded.push({ node, questions: places.map(({ child, ids }) => ({ question: child.question, ids })) });
    const choices = node.choices.map((choice) => ({ ...choice, confidence: Math.round(choice.confidence * 100) / 100 }));
    const own = new Map(); // the form's name of a choice -> the reader's question that takes its place
    for (const { child, place } of places) {
      if (place === null) continue;
      if (choices[place].text !== child.question) own.set(`text ${place}`, `your question “${child.question}”`);
      choices[place].text = child.question;
    }
    for (const { place, problem } of answerProblems({ fragments: node.fragments, choices })) {
      report(problems, `“${node.question}”, ${own.get(place) ?? place}`, problem);
    }
    for (const choice of choices) choice.target = uniqueName(choice.target, nodeName, used);
    tree.nodes[nodeName] = { texts: node.fragments, choices: choices.map(({ text, confidence, target }) => ({ text, confidence, target })) };
    for (const { child, place } of places) if (place !== null) add(child, choices[place].target);
  }
  if (kept(root)) add(root, name);
  return { name, tree, problems, crowded, left: Object.keys(doc.nodes).length - count };
}

/** Which child follows which choice: [{child, ids, place}], the best of the answers `ids`; place null where all three are taken. */
function takePlaces(node, children) {
  const groups = new Map();
  for (const child of children) {
    const key = child.from_choice === null ? `own ${child.question.trim().toLowerCase()}` : String(child.from_choice);
    const { child: best, ids } = groups.get(key) ?? { child, ids: [] };
    groups.set(key, { child: worth(best) > worth(child) ? best : child, ids: [...ids, child.id] }); // worth the same: the later one
  }
  const followed = [...groups.values()].filter(({ child }) => child.from_choice !== null);
  const own = [...groups.values()].filter(({ child }) => child.from_choice === null);
  const free = node.choices.map((_, i) => i).filter((i) => !followed.some(({ child }) => child.from_choice === i));
  free.sort((a, b) => node.choices[a].confidence - node.choices[b].confidence || b - a);
  return [
    ...followed.map((group) => ({ ...group, place: group.child.from_choice })),
    ...own.map((group, i) => ({ ...group, place: free[i] ?? null })),
  ];
}

/** As the server judges (conversation/data/own_trees.py). */
const worth = (node) => 4 * (node.mark === "good") + 2 * node.favourite + node.corrected;

function report(problems, subject, problem) {
  if (problem) problems.push(`${subject} ${problem}.`);
}

const QUESTION_WORDS = new Set("a an the is are was do does did what whats how why when where who which can i of to in explain".split(" "));

/** A name for the root from its question: "What's a mutex?" becomes mutex. */
function nameFrom(question) {
  const words = question.toLowerCase().normalize("NFKD").replace(/['’\u0300-\u036f]/g, "").match(/[a-z0-9]+/g) ?? [];
  const telling = words.filter((word) => !QUESTION_WORDS.has(word));
  const name = (telling.length ? telling : words).slice(0, 4).join("_").slice(0, 40);
  return name.replace(/_+$/, "") || "conversation";
}

/** A name that no other node has: the given one, else with the parent's before it, else with a number. */
function uniqueName(wanted, parent, used) {
  const base = isName(wanted) ? wanted : nameFrom(String(wanted));
  const shorten = (name, length) => name.slice(0, length).replace(/_+$/, "");
  let name = base;
  if (used.has(name) && parent) name = shorten(`${parent}_${base}`, LIMITS.name);
  for (let i = 2; used.has(name); i++) name = `${shorten(base, LIMITS.name - 4)}_${i}`;
  used.add(name);
  return name;
}

// --- from a file ----------------------------------------------------------------------------------------------------

/** A conversation from the value of a tree file. Raises ImportProblem. `notes` says what a conversation has no room for. */
export function fromTree(value) {
  const problems = treeProblems(value);
  if (problems.length) throw new ImportProblem(problems);
  const names = new Map(Object.entries(value.nodes));
  const seen = new Set();
  let doc = newConversation(value.question);
  const todo = [[value.root, rootOf(doc)]];
  let step = 0;
  while (todo.length) {
    const [name, node] = todo.shift();
    if (seen.has(name)) throw new ImportProblem([`${name}: two choices lead to it`]);
    seen.add(name);
    const { texts, choices } = names.get(name);
    const copied = choices.map(({ text, confidence, target }) => ({ text, confidence, target }));
    doc = withNode(doc, { ...node, fragments: [...texts], choices: copied, state: "whole", created: later(doc.created, step++) });
    choices.forEach(({ text, target }, i) => {
      if (names.has(target)) todo.push([target, newNode(node.id, text, i)]);
    });
  }
  const lost = names.size - seen.size;
  if (lost) throw new ImportProblem([`${lost} nodes that no choice leads to`]);
  const wordings = (value.also_asked?.length ?? 0) + [...names.values()].reduce((sum, node) => sum + (node.other_texts?.length ?? 0), 0);
  return { doc, notes: wordings ? [`${wordings} other wordings have no place here and were left out.`] : [] };
}

export class ImportProblem extends Error {
  constructor(problems) {
    super(problems.slice(0, 5).join("; ") + (problems.length > 5 ? `; and ${problems.length - 5} more` : ""));
    this.problems = problems;
  }
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** Ages in the order of the file. */
const later = (iso, milliseconds) => new Date(Date.parse(iso) + milliseconds).toISOString();

function treeProblems(value) {
  if (!isObject(value) || !isObject(value.nodes)) return ["the file is no conversation tree: it has no nodes"];
  const problems = [];
  report(problems, "question", textProblem(value.question, LIMITS.question_root));
  if (!isName(value.root) || !Object.hasOwn(value.nodes, value.root)) problems.push(`root: there is no node ${value.root}`);
  for (const [name, node] of Object.entries(value.nodes)) {
    if (!isName(name)) problems.push(`${name}: no name of lower case words joined by _`);
    const { texts, choices } = isObject(node) ? node : {};
    if (!Array.isArray(texts) || !Array.isArray(choices) || !choices.every(isChoice)) problems.push(`${name}: has no texts or no choices`);
    else for (const { place, problem } of answerProblems({ fragments: texts, choices })) problems.push(`${name}, ${place}: ${problem}`);
  }
  return problems;
}

const isChoice = (value) => isObject(value) && typeof value.text === "string";
