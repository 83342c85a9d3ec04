// Whether the server is there: asked at once, then now and then, more often while it is away.

import { health } from "./server.js";

const WHILE_AWAY = [1000, 2000, 4000, 8000];
const WHILE_THERE = 30_000;

/** `state` is "loading" (the model), "ok", "failed" (to load it) or "away". `changed(state, before)` is called when it becomes another one. */
export class Connection {
  state = "unknown";
  model = "";
  #timer = null;
  #away = 0;

  constructor(changed) {
    this.changed = changed;
    addEventListener("online", () => this.check());
    document.addEventListener("visibilitychange", () => document.hidden || this.check());
  }

  /** Asks now, and plans the next time. */
  async check() {
    clearTimeout(this.#timer);
    try {
      const { status, model } = await health(AbortSignal.timeout(5000));
      this.model = model ?? this.model;
      this.#become(status === "ok" ? "ok" : "loading");
      this.#away = 0;
    } catch (error) {
      this.#become(error.body?.status === "failed" ? "failed" : "away");
    }
    const wait = this.state === "ok" ? WHILE_THERE : WHILE_AWAY[Math.min(this.#away++, WHILE_AWAY.length - 1)];
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.check(), wait);
  }

  #become(state) {
    const before = this.state;
    this.state = state;
    if (state !== before) this.changed(state, before);
  }
}
