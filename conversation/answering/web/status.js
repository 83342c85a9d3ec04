// The line below the question: the model, whether the server is there, what prefetching gained.

import { h } from "./dom.js";
import { seconds } from "./prefetch.js";

export class Status {
  element = h("div", { class: "status" });
  #light = h("span", { class: "light loading" });
  #kept = h("span", {});
  #gain = h("span", { class: "gain" });
  failed = false; // whether something is not on the server

  constructor() {
    this.element.append(this.#light, this.#kept, this.#gain);
  }

  setConnection(state, model) {
    this.#light.className = `light ${{ ok: "", away: "away", failed: "away" }[state] ?? "loading"}`;
    this.#light.textContent = {
      ok: model || "Ready",
      loading: `Loading ${model || "the model"}`,
      away: "No server. Everything is kept in this browser.",
      failed: "The model could not be loaded. The server's console says why.",
      unknown: "Connecting",
    }[state];
  }

  /** `error` says why something is not on the server; null: everything is. */
  setKept(error) {
    this.failed = Boolean(error);
    this.#kept.textContent = error && error.status !== 0 ? `Not saved on the server: ${error.message}` : "";
  }

  /** What `Gains.summary` gives. */
  setGain(summary) {
    if (!summary?.prefetched) return;
    const { prefetched, wait, saved } = summary;
    const other = wait.asked === null ? "" : ` instead of ${seconds(wait.asked)}`;
    this.#gain.replaceChildren(
      `Fetched ahead: ${prefetched}, there after ${seconds(wait.prefetched)}${other}`,
      h("span", { class: "more" }, ` (median); ${seconds(saved)} not waited`),
    );
  }
}
