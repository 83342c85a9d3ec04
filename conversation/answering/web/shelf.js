// The shelf: all conversations, the one with the newest question first.

import { lastAsked } from "./library.js";
import { h, icon } from "./dom.js";

export class Shelf {
  #list = h("ul", { "aria-label": "All conversations" });
  #shown = "";

  constructor(panel, { open, start, close }) {
    this.open = open;
    this.new = h("button", { class: "outline", type: "button", "aria-keyshortcuts": "n", on: { click: start } }, icon("plus"), "New");
    panel.append(
      h(
        "div",
        { class: "panel-head" },
        h("h2", {}, "Conversations"),
        this.new,
        h("button", { class: "plain narrow-only", type: "button", "aria-label": "Close the conversations", on: { click: close } }, icon("close")),
      ),
      h("div", { class: "panel-body" }, this.#list),
    );
  }

  focus() {
    (this.#list.querySelector('[aria-current="true"]') ?? this.#list.querySelector("button") ?? this.new).focus();
  }

  /** `records` as the library lists them; `away`: the server has not what is unsent, and will not soon. */
  render(records, openId, away) {
    const lines = records.map(({ doc, unsent, base }) => ({ id: doc.id, title: doc.title, detail: detail(doc), state: unsent && away ? (base ? "changes kept here" : "kept here") : "" }));
    const shown = JSON.stringify([lines, openId]);
    if (shown === this.#shown) return;
    this.#shown = shown;
    const focused = this.#list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
    this.#list.replaceChildren(...lines.map((line) => this.#line(line, openId)));
    if (focused) this.#list.querySelector(`[data-id="${CSS.escape(focused)}"]`)?.focus();
  }

  #line({ id, title, detail: text, state }, openId) {
    const button = h(
      "button",
      { type: "button", "data-id": id, "aria-current": id === openId ? "true" : null, on: { click: () => this.open(id) } },
      h("span", { class: "name", dir: "auto" }, title),
      h("span", { class: "detail" }, text, state && h("span", { class: "unsent" }, `, ${state}`)),
    );
    return h("li", {}, button);
  }
}

function detail(doc) {
  const count = Object.keys(doc.nodes).length;
  return `${count} ${count === 1 ? "question" : "questions"}, ${day(lastAsked(doc))}`;
}

function day(iso) {
  const date = new Date(iso);
  const today = new Date();
  if (date.toDateString() === today.toDateString()) return date.toLocaleTimeString("en", { hour: "2-digit", minute: "2-digit", hour12: false });
  return date.toLocaleDateString("en", { day: "numeric", month: "short", year: date.getFullYear() === today.getFullYear() ? undefined : "numeric" });
}
