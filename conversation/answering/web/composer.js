// The line to type a question into, with how many characters fit, and what it is for: the first question, an own one,
// a follow-up that is edited before it is asked, a question that is asked in other words.

import { byId, h, icon } from "./dom.js";
import { notify } from "./notices.js";
import { LIMITS, lengthOf, oneLine } from "./rules.js";

export class Composer {
  limits = LIMITS;
  #purpose = null; // {label, ask}: null means an own question
  #label = h("label", { for: "own-question" });
  #counter = h("span", { class: "counter", id: "counter" });
  #input = h("input", { id: "own-question", type: "text", maxlength: "500", enterkeyhint: "send", "aria-describedby": "counter", "aria-keyshortcuts": "o", dir: "auto" });
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
    this.#input.addEventListener("keydown", (event) => event.key === "Escape" && this.#escape(event));
    this.#cancel.addEventListener("click", () => this.cancel());
    this.#stop.addEventListener("click", () => reader.stop());
  }

  focus() {
    this.#input.focus();
  }

  /** Takes a text to edit; `ask` gets what becomes of it. */
  edit(label, text, ask, { root = false } = {}) {
    this.#purpose = { label, ask, root };
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

  render() {
    const { doc, node } = this.reader;
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
    const { selectionStart: start, selectionEnd: end } = this.#input;
    this.#input.setRangeText(oneLine(text), start, end, "end");
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
    this.cancel();
    ask(question);
  }

  #escape(event) {
    event.stopPropagation();
    if (this.reader.stop()) return;
    if (this.#purpose) this.cancel();
    byId("question")?.focus();
  }
}
