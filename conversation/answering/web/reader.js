// What a reader does: ask, pick, go, change. The page's views show `doc`; buttons, keys and the map call these methods.

import * as tree from "./conversation.js";
import { RunningAnswer } from "./running_answer.js";
import { sentences } from "./server.js";
import { undone } from "./undo.js";

const anySeed = () => Math.floor(Math.random() * 2 ** 31);

/** `say` has notify and announce; `changed({focus})` is called after every change, with whether to move the focus. */
export class Reader {
  doc = null;
  #running = new Map(); // node id -> RunningAnswer
  #visited = new Map(); // node id -> the child that was read last

  constructor({ library, prefetch, gains, undo, say, changed }) {
    Object.assign(this, { library, prefetch, gains, undo, say, changed });
  }

  get node() {
    return this.doc && tree.currentNode(this.doc);
  }

  running(id) {
    const running = this.#running.get(id);
    return running && !running.over ? running : null;
  }

  problemOf(id) {
    return this.#running.get(id)?.error ?? null;
  }

  // --- opening --------------------------------------------------------------------------------------------------------

  /** Shows a document, from the library or a new one; null shows the start. */
  open(doc, { focus = true } = {}) {
    this.prefetch.leave();
    this.doc = doc;
    this.#arrive({ focus });
  }

  /** Another tab or the server has another version of the open document. */
  replace(doc) {
    const before = this.doc;
    this.doc = doc;
    if (before?.id !== doc?.id) this.prefetch.leave();
    else if (doc && tree.reworded(before, doc)) this.prefetch.forget();
    this.changed({});
    this.prefetchHere();
  }

  // --- asking ---------------------------------------------------------------------------------------------------------

  /** Asks an own question below the current node, or begins a conversation. */
  ask(question) {
    if (!this.doc) return this.#begin(question);
    const place = tree.choiceWithText(this.node, question);
    if (place !== null) return this.pick(place);
    this.#send(tree.newNode(this.node.id, question));
  }

  #begin(question, seed = null) {
    this.prefetch.leave();
    this.doc = tree.newConversation(question);
    this.#receive(this.node, { seed });
  }

  /** Follows a choice of the current node: to the answer that is there, the one that was prefetched, or a new one. */
  pick(place) {
    const { node } = this;
    if (!node?.choices[place]) return;
    const asked = performance.now();
    const children = tree.childrenOf(this.doc, node.id).filter((child) => child.from_choice === place);
    this.doc = tree.counted(this.doc, node.id, place);
    if (children.length) return this.go(this.#lastVisited(children));
    const child = tree.newNode(node.id, node.choices[place].text, place);
    this.#send(child, { ahead: this.prefetch.take(node, place), asked });
  }

  /** Asks the current question again; the new answer stands beside the old one, or replaces a draft. */
  askAgain() {
    const { node } = this;
    if (!node || this.running(node.id)) return;
    if (node.state === "draft") {
      this.#receive(node, {});
    } else if (tree.isRoot(node)) {
      this.#begin(node.question, anySeed());
    } else {
      this.#send(tree.newNode(node.parent, node.question, node.from_choice), { seed: anySeed() });
    }
  }

  /** Asks the current question in other words: a sibling, or a new conversation where it was the first. */
  askInstead(question) {
    const { node } = this;
    if (tree.isRoot(node)) return this.#begin(question);
    const parent = tree.nodeOf(this.doc, node.parent);
    this.#send(tree.newNode(parent.id, question, tree.choiceWithText(parent, question)));
  }

  #send(node, how = {}) {
    if (!how.ahead) this.prefetch.leave();
    this.doc = tree.goTo(tree.withNode(this.doc, node), node.id);
    this.#receive(node, how);
  }

  /** Fills a node with an answer as it arrives. `ahead` is one that was prefetched, `asked` when the reader asked. */
  #receive(node, { ahead = null, seed = null, asked = performance.now() }) {
    const { id } = this.doc;
    const history = node.parent === null ? [] : tree.historyBelow(this.doc, node.parent);
    const running = ahead ?? new RunningAnswer({ question: node.question, history, prefetch: false, seed });
    this.#running.set(node.id, running);
    running.listener = () => this.#take(id, node.id, running, { asked, prefetched: Boolean(ahead) });
    this.#visited.set(node.parent, node.id);
    if (ahead) running.listener();
    else this.#keep({ focus: true, send: false });
  }

  #take(id, nodeId, running, { asked, prefetched }) {
    if (this.doc?.id !== id) return this.#takeElsewhere(id, nodeId, running);
    if (!tree.nodeOf(this.doc, nodeId)) return running.stop();
    const before = tree.nodeOf(this.doc, nodeId);
    this.doc = tree.received(this.doc, nodeId, running);
    if (nodeId === this.doc.current) this.#readOut(running);
    if (running.state === "whole") {
      this.gains.add({ took: running.took, waited: performance.now() - asked, prefetched });
      this.#running.delete(nodeId);
      this.#dropIfSame(nodeId);
    }
    this.#keep({ focus: prefetched && before.fragments.length === 0, send: running.over });
  }

  /** An answer of a conversation that is no longer open goes on arriving, into the browser's copy. */
  #takeElsewhere(id, nodeId, { fragments, choices, state }) {
    this.library.update(id, (doc) => (tree.nodeOf(doc, nodeId) ? tree.received(doc, nodeId, { fragments, choices, state }) : doc));
  }

  #readOut(running) {
    const { fragments, choices, state, error } = running;
    for (const text of fragments.slice(running.readOut)) this.say.announce(text);
    running.readOut = fragments.length;
    if (state === "whole") {
      const list = choices.map(({ text, confidence }, i) => `${i + 1}: ${text} ${Math.round(confidence * 100)} percent.`);
      this.say.announce(`Follow-ups. ${list.join(" ")}`);
    }
    if (error) this.say.announce(sentences(error));
  }

  /** A model without chance gives the same answer twice: then the older one is enough. */
  #dropIfSame(nodeId) {
    const node = tree.nodeOf(this.doc, nodeId);
    const twin = tree.siblingsOf(this.doc, node).find(
      (other) => other.id !== nodeId && other.question === node.question && tree.sameAnswer(other, node),
    );
    if (!twin || tree.childrenOf(this.doc, nodeId).length) return;
    const here = this.doc.current === nodeId; // else one has gone on, and stays there
    this.doc = tree.withoutBranch(this.doc, nodeId);
    if (here) this.doc = tree.goTo(this.doc, twin.id);
    this.say.notify("The model gave the same answer again. It is kept once.");
  }

  /** Ends the answer that is arriving: of the current node, else of another one of this conversation. What came stays as a draft. */
  stop() {
    const here = this.doc ? Object.keys(this.doc.nodes).map((id) => this.running(id)) : [];
    const running = this.running(this.doc?.current) ?? here.find(Boolean);
    if (!running) return false;
    running.stop();
    this.say.announce("Stopped.");
    return true;
  }

  // --- going ----------------------------------------------------------------------------------------------------------

  go(id, { focus = true } = {}) {
    if (!this.doc || !tree.nodeOf(this.doc, id)) return;
    this.doc = tree.goTo(this.doc, id);
    for (const node of tree.pathTo(this.doc, id)) this.#visited.set(node.parent, node.id);
    this.#arrive({ focus });
    this.library.save(this.doc);
  }

  goParent() {
    if (this.node?.parent) this.go(this.node.parent);
  }

  goChild() {
    const children = this.doc ? tree.childrenOf(this.doc, this.node.id) : [];
    if (children.length) this.go(this.#lastVisited(children));
  }

  /** To the next (1) or previous (-1) sibling; at the end it goes round. */
  goSibling(step) {
    if (!this.doc) return;
    const siblings = tree.siblingsOf(this.doc, this.node);
    const at = siblings.findIndex(({ id }) => id === this.node.id);
    if (siblings.length > 1) this.go(siblings[(at + step + siblings.length) % siblings.length].id);
  }

  #lastVisited(children) {
    const last = this.#visited.get(children[0].parent);
    return (children.find(({ id }) => id === last) ?? children.at(-1)).id;
  }

  // --- changing -------------------------------------------------------------------------------------------------------

  /** Puts `answer` in the place of the current one. `shown` is the node as it was read: what changed since stays, too. */
  correct(answer, shown) {
    this.prefetch.forget();
    const stale = !tree.sameAnswer(this.node, shown);
    const change = stale ? tree.withOtherWords : tree.corrected;
    this.#change(change(this.doc, this.node.id, answer), "the correction");
    const twice = "This answer was changed elsewhere meanwhile. Both stay: yours stands beside it.";
    this.say.notify(stale ? twice : "Corrected.", { action: this.#undoAction(), topic: "change" });
    this.#arrive({ focus: true });
  }

  mark(mark) {
    if (this.node) this.#change(tree.changeNode(this.doc, this.node.id, { mark: this.node.mark === mark ? null : mark }), "the mark");
  }

  favourite() {
    if (this.node) this.#change(tree.changeNode(this.doc, this.node.id, { favourite: !this.node.favourite }), "the marked path");
  }

  rename(title) {
    this.#change({ ...this.doc, title });
  }

  /** Deletes the current node and what is below it; a root takes the conversation with it. */
  remove() {
    const { node } = this;
    if (!node) return;
    if (tree.isRoot(node)) return this.removeConversation();
    const ids = tree.branchOf(this.doc, node.id);
    for (const id of ids) this.#running.get(id)?.stop();
    this.prefetch.leave();
    this.#change(tree.withoutBranch(this.doc, node.id), "the deletion");
    const what = ids.length === 1 ? "1 answer" : `${ids.length} answers`;
    this.say.notify(`Deleted ${what}.`, { action: this.#undoAction(), topic: "change" });
    this.#arrive({ focus: true });
  }

  async removeConversation() {
    const { doc } = this;
    if (!doc) return;
    for (const id of Object.keys(doc.nodes)) this.#running.get(id)?.stop();
    this.undo.recordDeleted(doc);
    this.open(null);
    await this.library.remove(doc.id);
    this.say.notify(`Deleted “${doc.title}”.`, { action: this.#undoAction(), topic: "change" });
  }

  undoLast() {
    const step = this.undo.take(this.doc);
    if (!step) return this.say.notify("There is nothing to undo.", { topic: "change" });
    this.prefetch.forget();
    this.doc = undone(this.doc, step);
    this.say.notify(`Undone: ${step.what}.`, { topic: "change" });
    this.#arrive({ focus: true });
    this.library.save(this.doc);
  }

  #undoAction() {
    return { label: "Undo", run: () => this.undoLast() };
  }

  #change(doc, what = null) {
    if (what) this.undo.record(this.doc, doc, what);
    this.doc = doc;
    this.#keep({});
  }

  #keep({ focus = false, send = true }) {
    this.changed({ focus });
    this.library.save(this.doc, { send });
    if (send) this.prefetchHere();
  }

  #arrive({ focus }) {
    this.changed({ focus });
    this.prefetchHere();
  }

  /** Fetches the follow-ups of the current node ahead, if nothing is in the way. */
  prefetchHere() {
    if (this.node?.state === "whole") this.prefetch.follow(this.doc, this.node);
  }
}
