// The keys, once: what each does, for the page to act on and for the help to list.
//
// They are single characters, so they are off while one types, and can be switched off altogether (in the menu), for
// people who speak to their computer or whose screen reader uses the same keys.

import { openDialog } from "./dialogs.js";
import { composes, h } from "./dom.js";

/** [group, [[keys, what, run(actions)]]]; the first key of each is the one that help and buttons name. */
const KEYS = [
  [
    "Ask",
    [
      [["1"], "the first follow-up", (to) => to.pick(0)],
      [["2"], "the second follow-up", (to) => to.pick(1)],
      [["3"], "the third follow-up", (to) => to.pick(2)],
      [["o"], "an own question", (to) => to.own()],
      [["e"], "this question in other words", (to) => to.editQuestion()],
      [["r"], "this question again", (to) => to.again()],
      [["Escape"], "stop the answer; leave a field", (to) => to.stop()],
      [["n"], "a new conversation", (to) => to.start()],
    ],
  ],
  [
    "Go",
    [
      [["k", "Shift+ArrowUp"], "to the question before (parent)", (to) => to.parent()],
      [["j", "Shift+ArrowDown"], "to the question after (child)", (to) => to.child()],
      [["h", "Shift+ArrowLeft"], "to the sibling before", (to) => to.sibling(-1)],
      [["l", "Shift+ArrowRight"], "to the sibling after", (to) => to.sibling(1)],
      [["m"], "to the map; there the arrow keys, Home and End go", (to) => to.map()],
      [["c"], "to the conversations", (to) => to.shelf()],
      [["/"], "search", (to) => to.search()],
    ],
  ],
  [
    "Change",
    [
      [["g"], "mark as good", (to) => to.mark("good")],
      [["b"], "mark as bad", (to) => to.mark("bad")],
      [["f"], "mark the path to here", (to) => to.favourite()],
      [["t"], "correct this answer", (to) => to.correct()],
      [["Delete"], "delete this question and what is below it", (to) => to.remove()],
      [["z", "Control+z", "Meta+z"], "undo", (to) => to.undo()],
      [["s"], "save as a training tree", (to) => to.saveTree()],
    ],
  ],
  ["Help", [[["?"], "this list", (to) => to.help()]]],
];

const BY_KEY = new Map(KEYS.flatMap(([, lines]) => lines.flatMap(([keys, , run]) => keys.map((key) => [key, run]))));
const GOES = /^[hjkl]$|Arrow/;
const NAMES = { ArrowUp: "↑", ArrowDown: "↓", ArrowLeft: "←", ArrowRight: "→", Escape: "Esc", Control: "Ctrl", Meta: "⌘" };

/** Listens to the keys of the page. `enabled()` says whether single characters act. */
export function listenToKeys(actions, enabled) {
  document.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || composes(event) || document.querySelector("dialog[open], [popover]:popover-open")) return;
    if (event.target.closest("input, form.correction")) return;
    const name = nameOf(event);
    const run = BY_KEY.get(name);
    if (!run || (!enabled() && name.length === 1)) return;
    event.preventDefault();
    if (!event.repeat || GOES.test(name)) run(actions); // a key that is held asks or deletes once
  });
}

/**
 * "a", "Shift+ArrowUp", "Control+z"; Shift is part of a character: "?". On a layout of other letters (Cyrillic, Greek,
 * Arabic) a key counts as the Latin letter at its place.
 */
function nameOf({ key: typed, code, ctrlKey, metaKey, altKey, shiftKey }) {
  const key = /^[^\x00-\x7f]$/u.test(typed) && /^Key[A-Z]$/.test(code) ? code.slice(3) : typed;
  const held = [ctrlKey && "Control", metaKey && "Meta", altKey && "Alt", shiftKey && key.length > 1 && "Shift"];
  return [...held.filter(Boolean), key.length === 1 && key !== "?" ? key.toLowerCase() : key].join("+");
}

const written = (key) => key.split("+").map((part) => h("kbd", {}, NAMES[part] ?? part));

export function openHelp(enabled) {
  const groups = KEYS.map(([group, lines]) =>
    h(
      "section",
      { class: "keys-of" },
      h("h3", {}, group),
      h("dl", { class: "keys" }, ...lines.flatMap(([keys, what]) => [h("dt", {}, ...written(keys[0]), keys[1] && " or ", keys[1] && h("span", {}, ...written(keys[1]))), h("dd", {}, what)])),
    ),
  );
  const off = h("p", {}, "Keys of one character are switched off. The menu (More) switches them on.");
  return openDialog({ title: "Keys", body: [...(enabled ? [] : [off]), ...groups] });
}
