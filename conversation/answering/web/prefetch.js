// Answers to the follow-ups of the node that is being read, asked for before they are picked: the likeliest first, one
// at a time, given up when the reader goes elsewhere. And what that gained: the measured time that nobody waited.

import { byConfidence, childrenOf, historyBelow } from "./conversation.js";
import { RunningAnswer } from "./running_answer.js";

const MOST_KEPT = 60;

export class Prefetch {
  enabled = true;
  #answers = new Map(); // "node id/text of the choice" -> RunningAnswer
  #round = 0;

  /** `changed(nodeId)` is called when one begins or is there. */
  constructor(changed) {
    this.changed = changed;
  }

  /** Prefetches for a node; what runs for another one is given up. */
  async follow(doc, node) {
    const round = ++this.#round;
    this.#giveUp((key) => !key.startsWith(`${node.id}/`));
    if (!this.enabled || document.hidden || navigator.connection?.saveData) return;
    for (const place of byConfidence(node.choices)) {
      const answered = childrenOf(doc, node.id).some((child) => child.from_choice === place);
      const key = keyOf(node, place);
      if (answered || this.#answers.get(key)?.state === "whole") continue;
      const question = node.choices[place].text;
      const running = this.#answers.get(key) ?? new RunningAnswer({ question, history: historyBelow(doc, node.id), prefetch: true });
      this.#answers.set(key, running);
      this.changed(node.id);
      await running.finished;
      if (running.state !== "whole" && this.#answers.get(key) === running) this.#answers.delete(key); // not a later one's
      this.changed(node.id);
      if (round !== this.#round || running.state === "failed") return;
    }
    this.#forgetOld();
  }

  /** Gives up what runs; what is whole is kept. */
  leave() {
    this.#round++;
    this.#giveUp(() => true);
  }

  /** Hands over the answer to a choice if it is there or has begun to arrive; another one that runs is given up. */
  take(node, place) {
    const key = keyOf(node, place);
    const running = this.#answers.get(key);
    this.#round++;
    this.#giveUp((other) => other !== key || !running.arrived);
    this.#answers.delete(key);
    return running?.arrived && running.state !== "stopped" ? running : null;
  }

  /** "ready", "running" or null. */
  stateOf(node, place) {
    const running = this.#answers.get(keyOf(node, place));
    return !running ? null : running.state === "whole" ? "ready" : "running";
  }

  /** After a change of words above them, what was prefetched no longer fits. */
  forget() {
    this.leave();
    this.#answers.clear();
  }

  #giveUp(which) {
    for (const [key, running] of this.#answers) {
      if (running.over || !which(key)) continue;
      running.stop();
      this.#answers.delete(key);
    }
  }

  #forgetOld() {
    for (const key of [...this.#answers.keys()].slice(0, -MOST_KEPT)) this.#answers.delete(key);
  }
}

const keyOf = (node, place) => `${node.id}/${node.choices[place]?.text}`;

/** Times of this session, in milliseconds: how long each answer took, and how long its reader waited for it. */
export class Gains {
  #answers = [];

  add({ took, waited, prefetched }) {
    this.#answers.push({ took, waited, prefetched });
  }

  /** {prefetched: how many, wait: {prefetched, asked}, medians, saved: a sum}, or null before the first answer. */
  summary() {
    const ahead = this.#answers.filter((each) => each.prefetched);
    const plain = this.#answers.filter((each) => !each.prefetched);
    if (!this.#answers.length) return null;
    return {
      prefetched: ahead.length,
      wait: { prefetched: median(ahead.map((each) => each.waited)), asked: median(plain.map((each) => each.waited)) },
      saved: ahead.reduce((sum, { took, waited }) => sum + Math.max(0, took - waited), 0),
    };
  }
}

function median(numbers) {
  if (!numbers.length) return null;
  const sorted = [...numbers].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

export function seconds(milliseconds) {
  return milliseconds < 950 ? `${Math.max(1, Math.round(milliseconds))} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}
