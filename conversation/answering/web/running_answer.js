// One answer on its way from the server: what has arrived, and when.

import * as server from "./server.js";

const MOST_TRIES = 4;

/** `listener` is called after each change. `state` is "asking", "waiting" (for a busy server), "whole", "failed", "stopped". */
export class RunningAnswer {
  fragments = [];
  choices = [];
  state = "asking";
  error = null;
  asked = performance.now();
  took = null; // milliseconds until the answer was whole
  readOut = 0; // how many fragments were read out
  listener = () => {};
  #controller = new AbortController();

  /** `prompt` as server.answer takes it. */
  constructor(prompt) {
    this.prompt = prompt;
    this.finished = this.#run();
  }

  get over() {
    return ["whole", "failed", "stopped"].includes(this.state);
  }

  get arrived() {
    return this.fragments.length > 0;
  }

  /** Ends it; the server stops generating when its client leaves. What came stays. */
  stop() {
    if (this.over) return;
    this.#become("stopped");
    this.#controller.abort();
  }

  async #run() {
    try {
      await this.#receive();
    } catch (error) {
      if (this.state === "stopped") return;
      if (!(error instanceof server.ServerError)) console.error(error);
      this.error = error;
      this.#become("failed");
    }
  }

  async #receive() {
    for (let tries = 1; ; tries++) {
      try {
        for await (const { event, data } of server.answer(this.prompt, this.#controller.signal)) this.#take(event, data);
        return;
      } catch (error) {
        if (![429, 503].includes(error.status) || this.prompt.prefetch || tries === MOST_TRIES || this.over) throw error;
        this.#become("waiting");
        await pause(1000 * (error.retryAfter || tries), this.#controller.signal);
      }
    }
  }

  #take(event, data) {
    if (this.over) return;
    if (event === "fragment") this.fragments = [...this.fragments, String(data.text)];
    if (event === "choice") {
      const { text, confidence, target } = data;
      this.choices = [...this.choices, { text: String(text), confidence: Number(confidence), target: String(target) }];
    }
    if (event === "done") this.took = performance.now() - this.asked;
    this.#become(event === "done" ? "whole" : "asking");
  }

  #become(state) {
    this.state = state;
    this.listener(this);
  }
}

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()));
  });
}
