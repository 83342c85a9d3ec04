// A conversation becomes training data: what does not fit into a tree is asked or said first.

import { openDialog } from "./dialogs.js";
import { h } from "./dom.js";
import { LIMITS } from "./rules.js";
import { toTree } from "./tree_file.js";

/**
 * The tree of a conversation, after the reader decided what stays out where more than three questions follow one
 * answer; null if they gave up or it cannot become one (which a dialog then says).
 */
export async function treeFor(doc) {
  const leaveOut = new Set();
  for (;;) {
    const made = toTree(doc, leaveOut);
    if (made.problems.length) {
      await sayProblems("This cannot be a tree yet", made.problems);
      return null;
    }
    if (!made.crowded.length) return { ...made, leaveOut: [...leaveOut] };
    const out = await askWhichStayOut(made.crowded[0]);
    if (!out) return null;
    for (const id of out) leaveOut.add(id);
  }
}

/** A tree has room for three follow-ups: which of the questions asked stay in it? Gives the ids of all answers to the others. */
async function askWhichStayOut({ node, questions }) {
  const boxes = questions.map((_, i) => h("input", { type: "checkbox", id: `stay-${i}`, checked: i < LIMITS.choices }));
  const count = h("p", { role: "status" });
  const update = () => {
    const chosen = boxes.filter((box) => box.checked).length;
    count.textContent = `${chosen} of ${LIMITS.choices} places taken.`;
    for (const box of boxes) box.disabled = chosen >= LIMITS.choices && !box.checked;
  };
  for (const box of boxes) box.addEventListener("change", update);
  update();
  return openDialog({
    title: "Which questions stay in the tree?",
    body: [
      h("p", {}, `An answer in a tree has three follow-ups. After “${node.question}” you asked ${questions.length}. The others stay in your conversation.`),
      ...questions.map(({ question }, i) => h("label", { class: "pick" }, boxes[i], h("span", { dir: "auto" }, question))),
      count,
    ],
    buttons: [
      { label: "Cancel", value: null },
      { label: "Go on", solid: true, value: () => questions.filter((_, i) => !boxes[i].checked).flatMap(({ ids }) => ids) },
    ],
  });
}

export function sayProblems(title, problems, hint = "Correct the answers (key t), ask the questions in other words (key e), or mark what is to stay out as bad (key b).") {
  return openDialog({
    title,
    body: [h("ul", { class: "problems" }, ...problems.map((each) => h("li", {}, each))), h("p", {}, hint)],
    buttons: [{ label: "Close", solid: true, value: null }],
  });
}
