// The reading column: the turns from the root to the current node, the last one with its follow-ups and actions.

import * as tree from "./conversation.js";
import { correctionForm } from "./correction.js";
import { byId, h, icon } from "./dom.js";
import { sentences } from "./server.js";

const STARTERS = ["What's a deadlock?", "Load balancer?", "Explain closures.", "What's a hash function?", "What's agnosticism?"]; // the demo learns them

export class Reading {
  #column = h("div", { class: "column" });
  #shown = ""; // the current node's id and how many fragments it had, so that only new ones move
  #fragments = 0;
  #follows = true; // whether what arrives is scrolled to: not for who scrolled away from it
  #forms = new Map(); // node id -> the form in which it is being corrected, with what was typed, also while one is elsewhere

  /** `actions` are the reader's and the page's. */
  constructor(place, reader, actions) {
    Object.assign(this, { place, reader, actions });
    place.append(this.#column);
    const scrolls = (event) => {
      if (event.type === "keydown" && !["PageUp", "ArrowUp", "Home"].includes(event.key)) return;
      if (event.type === "pointerdown" && event.target !== place) return; // the scroll bar's is the place itself
      this.#follows = false;
    };
    for (const type of ["wheel", "touchmove", "pointerdown", "keydown"]) place.addEventListener(type, scrolls, { passive: true });
    place.addEventListener("scrollend", () => (this.#follows ||= this.#showsEnd()));
  }

  render({ focus = false } = {}) {
    const { doc, node } = this.reader;
    const had = this.#column.contains(document.activeElement) ? document.activeElement.dataset.key : null;
    if (!focus && this.#column.contains(this.#formOf(node))) return; // a form that is being filled in stays as it is
    const turns = doc ? tree.pathTo(doc, doc.current).map((each) => (each === node ? this.#turn(each) : this.#pastTurn(each))) : [this.#start()];
    this.#column.replaceChildren(...turns);
    if (focus) this.#focusQuestion();
    else if (had) (this.#column.querySelector(`[data-key="${had}"]`) ?? byId("question"))?.focus({ preventScroll: true });
    this.#follow(node);
  }

  /** Shows which follow-ups are fetched ahead. Nothing is replaced: a button may just be held down. */
  renderStates() {
    const states = this.#column.querySelectorAll(".turn.now .choice .state");
    states.forEach((each, place) => (each.textContent = this.#stateOf(this.reader.node, place)));
  }

  /** Opens the form in which the current answer is corrected. */
  correct() {
    const { node } = this.reader;
    if (!node || this.reader.running(node.id)) return;
    const close = () => {
      this.#forms.delete(node.id);
      this.render({ focus: true });
    };
    const save = (answer) => {
      this.#forms.delete(node.id);
      this.reader.correct(answer, node);
    };
    if (!this.#forms.has(node.id)) {
      this.#forms.set(node.id, correctionForm(node, { save, close }));
      this.render();
    }
    this.#formOf(node).querySelector("input").focus();
  }

  /** The form in which a node is being corrected; null if none is open, or its answer arrives anew. */
  #formOf(node) {
    return (node && !this.reader.running(node.id) ? this.#forms.get(node.id) : null) ?? null;
  }

  #focusQuestion() {
    byId("question")?.focus({ preventScroll: true });
  }

  #showsEnd() {
    const end = this.#column.lastElementChild?.lastElementChild;
    return Boolean(end) && end.getBoundingClientRect().top < this.place.getBoundingClientRect().bottom;
  }

  /** Keeps what is new in view: the question when one goes there, the end while an answer grows. */
  #follow(node) {
    const shown = node?.id ?? "";
    const grew = shown === this.#shown && node && node.fragments.length + node.choices.length > this.#fragments;
    if (shown !== this.#shown) this.#follows = true;
    if (shown !== this.#shown) this.#column.lastElementChild?.scrollIntoView({ block: node?.parent ? "start" : "nearest" });
    else if (grew && this.#follows) this.#column.lastElementChild.lastElementChild.scrollIntoView({ block: "nearest" });
    this.#shown = shown;
    this.#fragments = node ? node.fragments.length + node.choices.length : 0;
  }

  // --- the start ------------------------------------------------------------------------------------------------------

  #start() {
    const pill = (question) => h("li", {}, h("button", { class: "pill", type: "button", on: { click: () => this.reader.ask(question) } }, question));
    return h(
      "section",
      { class: "start" },
      h("h2", { id: "question", tabindex: "-1" }, "Ask something short"),
      h(
        "p",
        {},
        "The model answers in a few short fragments and offers the three questions you may ask next. Every question becomes a place in a tree that you can come back to.",
      ),
      h("ul", { "aria-label": "Questions to begin with" }, ...STARTERS.map(pill)),
    );
  }

  // --- turns ----------------------------------------------------------------------------------------------------------

  #pastTurn(node) {
    const question = h(
      "button",
      { type: "button", "data-key": `go ${node.id}`, dir: "auto", on: { click: () => this.reader.go(node.id) } },
      node.question,
    );
    return h(
      "article",
      { class: "turn past" },
      h("div", { class: "turn-head" }, h("h2", {}, question), badges(node)),
      h("div", { class: "answer" }, ...node.fragments.map((text) => h("p", { class: "fragment", dir: "auto" }, text))),
    );
  }

  #turn(node) {
    const running = this.reader.running(node.id);
    const known = node.id === this.#shown ? this.#fragments : node.fragments.length;
    const fragments = node.fragments.map((text, i) => h("p", { class: `fragment${i >= known ? " fresh" : ""}`, dir: "auto" }, text));
    const heading = h("h2", { id: "question", tabindex: "-1", "data-key": "question", dir: "auto" }, node.question);
    const head = h("div", { class: "turn-head" }, heading, badges(node), this.#siblings(node));
    const form = this.#formOf(node);
    if (form) return h("article", { class: "turn now", "aria-labelledby": "question" }, head, form);
    return h(
      "article",
      { class: "turn now", "aria-labelledby": "question" },
      head,
      h("div", { class: "answer", "aria-busy": String(Boolean(running)) }, ...fragments),
      running && coming(node, running),
      !running && node.state === "draft" && this.#unfinished(node),
      node.choices.length > 0 && h("h3", {}, "Ask next"),
      node.choices.length > 0 && h("ol", { class: "choices" }, ...node.choices.map((choice, i) => this.#choice(node, choice, i))),
      ...this.#ownQuestions(node),
      !running && this.#actions(node),
    );
  }

  #siblings(node) {
    const siblings = tree.siblingsOf(this.reader.doc, node);
    if (siblings.length < 2) return null;
    const at = siblings.findIndex(({ id }) => id === node.id);
    const step = (by, label, name) =>
      h("button", { type: "button", "aria-label": label, "data-key": label, on: { click: () => this.reader.goSibling(by) } }, icon(name));
    return h(
      "div",
      { class: "siblings", role: "group", "aria-label": "Questions beside this one" },
      step(-1, "Previous sibling", "back"),
      h("span", {}, `${at + 1} of ${siblings.length}`),
      step(1, "Next sibling", "forward"),
    );
  }

  #choice(node, { text, confidence }, place) {
    const percent = Math.round(confidence * 100);
    const button = h(
      "button",
      {
        class: "choice",
        type: "button",
        "data-key": `choice ${place}`,
        "aria-keyshortcuts": String(place + 1),
        on: { click: () => this.reader.pick(place) },
      },
      h("kbd", { "aria-hidden": "true" }, String(place + 1)),
      h("span", { class: "text", dir: "auto" }, text),
      h("span", { class: "state" }, this.#stateOf(node, place)),
      h("span", { class: "meter", "aria-hidden": "true", style: { "--share": confidence } }),
      h("span", { class: "number" }, `${percent} %`),
    );
    const edit = h(
      "button",
      { class: "choice-edit", type: "button", "data-key": `edit ${place}`, title: "Edit before asking", "aria-label": `Edit “${text}” before asking`, on: { click: () => this.actions.editChoice(place) } },
      icon("edit"),
    );
    return h("li", {}, button, edit);
  }

  #stateOf(node, place) {
    const answered = tree.childrenOf(this.reader.doc, node.id).some((child) => child.from_choice === place);
    return answered ? "answered" : { ready: "ready", running: "fetching" }[this.reader.prefetch.stateOf(node, place)] ?? "";
  }

  /** The questions that were asked here beside the follow-ups. */
  #ownQuestions(node) {
    const own = tree.childrenOf(this.reader.doc, node.id).filter((child) => child.from_choice === null);
    if (!own.length) return [];
    const link = (child) => h("button", { type: "button", "data-key": `go ${child.id}`, dir: "auto", on: { click: () => this.reader.go(child.id) } }, child.question);
    return [h("h3", {}, "Also asked here"), h("ul", { class: "own" }, ...own.map((child) => h("li", {}, link(child))))];
  }

  #unfinished(node) {
    const error = this.reader.problemOf(node.id);
    const text = error ? sentences(error) : "This answer is not whole. It is kept as a draft.";
    const again = h("button", { class: "outline", type: "button", "data-key": "again", on: { click: () => this.reader.askAgain() } }, icon("again"), "Ask again");
    return h("div", { class: "unfinished" }, h("p", {}, text), again);
  }

  #actions(node) {
    const action = (name, label, key, run, attributes = {}) =>
      h(
        "button",
        { type: "button", title: `${label} (${key})`, "aria-keyshortcuts": key, "data-key": `action ${name}`, class: name, ...attributes, on: { click: run } },
        icon(name),
        h("span", { class: "label" }, label),
      );
    const pressed = (is) => ({ "aria-pressed": String(is) });
    return h(
      "div",
      { class: "actions", role: "group", "aria-label": "This answer" },
      action("good", "Good", "g", () => this.reader.mark("good"), pressed(node.mark === "good")),
      action("bad", "Bad", "b", () => this.reader.mark("bad"), pressed(node.mark === "bad")),
      action("star", "Mark path", "f", () => this.reader.favourite(), pressed(node.favourite)),
      action("correct", "Correct", "t", () => this.correct()),
      action("edit", "Reword", "e", () => this.actions.editQuestion()),
      action("again", "Again", "r", () => this.reader.askAgain()),
      action("remove", "Delete", "Delete", () => this.reader.remove()),
    );
  }
}

function badges(node) {
  const badge = (has, name, label) => has && h("span", { class: name }, icon(name), h("span", { class: "unseen" }, label));
  const found = [badge(node.mark === "good", "good", "marked good"), badge(node.mark === "bad", "bad", "marked bad"), badge(node.favourite, "star", "path marked")];
  if (node.corrected) found.push(h("span", {}, "corrected"));
  return found.some(Boolean) ? h("span", { class: "badges" }, ...found) : null;
}

function coming(node, running) {
  const words = running.state === "waiting" ? "The server is busy. Trying again." : node.fragments.length ? "More is coming" : "Thinking";
  return h("p", { class: "coming" }, h("span", { class: "dots", "aria-hidden": "true" }, h("i"), h("i"), h("i")), words);
}
