// A whole conversation as Markdown that people read and that this page reads back.
//
//     # Title
//
//     ## 1 What's a mutex?
//
//     *first question, marked path*
//
//     - A lock that one thread holds at a time.
//
//     1. Example? (0.57, `mutex_example`)
//
// A node's number is its parent's with one more place. The line in italics says which follow-up a question is, and the
// marks of the answer.

import { childrenByParent, newConversation, newNode, rootOf, withNode } from "./conversation.js";
import { LIMITS } from "./rules.js";
import { ImportProblem } from "./tree_file.js";

const SPECIAL = /[\\`*_{}[\]<>()#+!|~&-]/g;
const escape = (text) => text.replace(SPECIAL, "\\$&").replace(/^(\d+)\./, "$1\\.");
const unescape = (text) => text.replace(/\\([^A-Za-z0-9\s])/g, "$1");

const MARKS = [
  ["draft", (node) => node.state === "draft", { state: "draft" }],
  ["good", (node) => node.mark === "good", { mark: "good" }],
  ["bad", (node) => node.mark === "bad", { mark: "bad" }],
  ["marked path", (node) => node.favourite, { favourite: true }],
  ["corrected", (node) => node.corrected, { corrected: true }],
];

export function toMarkdown(doc) {
  const children = childrenByParent(doc);
  const parts = [`# ${escape(doc.title)}`];
  const todo = [[rootOf(doc), "1"]];
  while (todo.length) {
    const [node, number] = todo.pop();
    const from = node.parent === null ? "first question" : node.from_choice === null ? "own question" : `follow-up ${node.from_choice + 1}`;
    const marks = MARKS.filter(([, has]) => has(node)).map(([word]) => word);
    parts.push(`## ${number} ${escape(node.question)}`, `*${[from, ...marks].join(", ")}*`);
    if (node.fragments.length) parts.push(node.fragments.map((text) => `- ${escape(text)}`).join("\n"));
    if (node.choices.length) parts.push(node.choices.map(choiceLine).join("\n"));
    todo.push(...(children.get(node.id) ?? []).map((child, i) => [child, `${number}.${i + 1}`]).reverse());
  }
  return parts.join("\n\n") + "\n";
}

const choiceLine = ({ text, confidence, target }, i) => `${i + 1}. ${escape(text)} (${confidence}, \`${target}\`)`;

/** A conversation from such Markdown. Raises ImportProblem with the line of what it cannot read. */
export function fromMarkdown(markdown) {
  let doc = null;
  let title = null;
  let node = null;
  const numbers = new Map();
  const wrong = (at, problem) => new ImportProblem([`line ${at + 1}: ${problem}`]);
  const keep = () => node && (doc = withNode(doc, node));

  markdown.split(/\r?\n/).forEach((line, at) => {
    let found;
    if (!line.trim()) return;
    if ((found = line.match(/^# (.+)$/))) title = unescape(found[1]);
    else if ((found = line.match(/^## (1(?:\.\d+)*) (.+)$/))) {
      keep();
      const [, number, question] = found;
      const parent = number.slice(0, number.lastIndexOf("."));
      if (numbers.has(number)) throw wrong(at, `the number ${number} is there already`);
      if (number === "1") doc = newConversation(unescape(question));
      else if (!numbers.has(parent)) throw wrong(at, `there is no question ${parent}`);
      node = number === "1" ? rootOf(doc) : newNode(numbers.get(parent), unescape(question));
      node = { ...node, state: "whole", created: new Date(Date.parse(doc.created) + numbers.size).toISOString() };
      numbers.set(number, node.id);
    } else if (!node) throw wrong(at, "there is no question above it");
    else if ((found = line.match(/^\*(.+)\*$/))) node = { ...node, ...marksOf(found[1]) };
    else if ((found = line.match(/^- (.+)$/))) node = { ...node, fragments: [...node.fragments, unescape(found[1])] };
    else if ((found = line.match(/^[1-3]\. (.+) \(([\d.e-]+), `([^`]*)`\)$/))) {
      const choice = { text: unescape(found[1]), confidence: Math.min(1, Number(found[2]) || 0), target: found[3] };
      node = { ...node, choices: [...node.choices, choice] };
    } else throw wrong(at, `cannot be read: ${line.slice(0, 60)}`);
    if (node && (node.fragments.length > LIMITS.fragments || node.choices.length > LIMITS.choices)) {
      throw wrong(at, `more than ${LIMITS.fragments} fragments or ${LIMITS.choices} follow-ups`);
    }
  });
  if (!doc) throw new ImportProblem(["there is no question in it; one looks like: ## 1 What's a mutex?"]);
  keep();
  const nodes = Object.values(doc.nodes).map((each) => (isWhole(each) ? each : { ...each, state: "draft" }));
  return { ...doc, title: title ?? doc.title, nodes: Object.fromEntries(nodes.map((each) => [each.id, each])) };
}

const isWhole = (node) => node.state === "whole" && node.fragments.length > 0 && node.choices.length === LIMITS.choices;

function marksOf(words) {
  const found = {};
  for (const word of words.split(", ")) {
    const follow = word.match(/^follow-up ([1-3])$/);
    if (follow) found.from_choice = Number(follow[1]) - 1;
    for (const [name, , change] of MARKS) if (word === name) Object.assign(found, change);
  }
  return found;
}
