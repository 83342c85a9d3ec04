// The line to type a question into, with how many characters fit, and what it is for: the first question, an own one,
// a follow-up that is edited before it is asked, a question that is asked in other words.

import { byId, composes, h, icon } from "./dom.js";
import { notify } from "./notices.js";
import { LIMITS, lengthOf, oneLine } from "./rules.js";

const LONGEST = 500; // characters of a question; a tree takes fewer

export class Composer {
  limits = LIMITS;
  #purpose = null; // {label, ask, root, at}: for the node `at` alone; null means an own question
  #label = h("label", { for: "own-question" });
  #counter = h("span", { class: "counter", id: "counter" });
  #input = h("input", { id: "own-question", type: "text", maxlength: LONGEST, enterkeyhint: "send", "aria-describedby": "counter", "aria-keyshortcuts": "o", dir: "auto" });
  #cancel = h("button", { class: "outline", type: "button", hidden: true }, "Cancel");
  #ask = h("button", { class: "solid", type: "submit" }, "Ask");
  #stop = h("button", { class: "outline", type: "button", hidden: true, "aria-keyshortcuts": "Escape" }, icon("stop"), "Stop");

  constructor(form, reader, status) {
    this.reader = reader;
    form.append(
      h("div", { class: "composer-top" }, this.#label, this.#counter),
      h("div", { class: "composer-row" }, this.#input, this.#cancel, this.#stop, this.#ask),
      status,
    );
    form.addEventListener("submit", (event) => (event.preventDefault(), this.#submit()));
    this.#input.addEventListener("input", () => this.#count());
    this.#input.addEventListener("paste", (event) => this.#paste(event));
    this.#input.addEventListener("keydown", (event) => event.key === "Escape" && !composes(event) && this.#escape(event));
    this.#cancel.addEventListener("click", () => (this.cancel(), this.focus()));
    this.#stop.addEventListener("click", () => reader.stop());
  }

  focus() {
    this.#input.focus();
  }

  /** Takes a text to edit; `ask` gets what becomes of it. */
  edit(label, text, ask, { root = false } = {}) {
    this.#purpose = { label, ask, root, at: this.#here };
    this.#input.value = text;
    this.render();
    this.#input.focus();
    this.#input.select();
  }

  cancel() {
    this.#purpose = null;
    this.#input.value = "";
    this.render();
  }

  /** The node that is read; a purpose is of no use at another one, as what it does depends on it. */
  get #here() {
    return this.reader.node?.id ?? null;
  }

  render() {
    const { doc, node } = this.reader;
    if (this.#purpose && this.#purpose.at !== this.#here) this.#purpose = null; // the text stays, as an own question
    const first = !doc;
    this.#label.textContent = this.#purpose?.label ?? (first ? "Your question" : "Or ask your own");
    this.#cancel.hidden = !this.#purpose;
    const running = Boolean(node && this.reader.running(node.id));
    if (!running && document.activeElement === this.#stop) this.#input.focus();
    this.#stop.hidden = !running;
    this.#count();
  }

  /** The longest question that a tree takes: a root's, or a follow-up's. */
  get #limit() {
    const root = !this.reader.doc || (this.#purpose?.root ?? false);
    return root ? this.limits.question_root : this.limits.question_follow_up;
  }

  #count() {
    const length = lengthOf(oneLine(this.#input.value));
    const over = length - this.#limit;
    this.#counter.classList.toggle("over", over > 0);
    this.#counter.textContent = over > 0 ? `${over} too many for a tree` : `${length} / ${this.#limit}`;
  }

  /** A line break in a pasted text becomes a space; a line to type into would drop it. */
  #paste(event) {
    const text = event.clipboardData?.getData("text") ?? "";
    if (!/[\r\n]/.test(text)) return;
    event.preventDefault();
    const { selectionStart: start, selectionEnd: end, value } = this.#input;
    const room = Math.max(0, LONGEST - (value.length - (end - start)));
    const fits = oneLine(text).slice(0, room).replace(/[\ud800-\udbff]$/, ""); // not half an emoji
    this.#input.setRangeText(fits, start, end, "end");
    this.#count();
  }

  #submit() {
    const question = oneLine(this.#input.value);
    if (!question) return this.focus();
    const { node } = this.reader;
    if (node && this.reader.running(node.id) && !node.choices.length) {
      return notify("The answer is still coming. Wait for it, or stop it.", { topic: "composer" });
    }
    const ask = this.#purpose?.ask ?? ((text) => this.reader.ask(text));
    ask(question);
    this.cancel(); // not before: the text stays if that fails
  }

  #escape(event) {
    event.stopPropagation();
    if (this.reader.stop()) return;
    if (this.#purpose) this.cancel();
    byId("question")?.focus();
  }
}
