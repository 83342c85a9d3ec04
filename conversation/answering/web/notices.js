// What the page says: notices that one can see and act on, and a live region that screen readers read out.

import { byId, h, icon } from "./dom.js";

const MOST = 3; // at once; what stays until it is closed is not counted out
const STAYS = 9000; // milliseconds; not while the pointer or the focus is on it

/** Read out by screen readers, not shown. */
export function announce(text) {
  const live = byId("live");
  live.append(h("p", {}, text));
  while (live.childElementCount > 12) live.firstElementChild.remove();
}

/**
 * Shows a sentence; `action` is {label, run}; the same `topic` replaces an earlier notice; what `stays` is there until
 * it is closed, as an error is. */
export function notify(text, { action = null, kind = "info", topic = null, stays = kind === "error" } = {}) {
  const region = byId("notices");
  if (topic) dismiss(topic);
  const close = () => {
    clearTimeout(timer);
    const focused = notice.contains(document.activeElement);
    notice.remove();
    if (focused) byId("question")?.focus({ preventScroll: true });
  };
  const act = () => {
    close();
    action.run();
  };
  const notice = h(
    "div",
    { class: `notice ${kind}`, "data-topic": topic, "data-stays": stays },
    h("p", {}, text),
    action && h("button", { type: "button", on: { click: act } }, action.label),
    h("button", { class: "close", type: "button", "aria-label": "Close this notice", on: { click: close } }, icon("close")),
  );
  let timer;
  const start = () => {
    clearTimeout(timer);
    if (!stays) timer = setTimeout(close, STAYS);
  };
  for (const event of ["mouseenter", "focusin"]) notice.addEventListener(event, () => clearTimeout(timer));
  for (const event of ["mouseleave", "focusout"]) notice.addEventListener(event, start);
  region.append(notice);
  const passing = region.querySelectorAll(".notice:not([data-stays])");
  for (const each of [...passing].slice(0, Math.max(0, region.childElementCount - MOST))) if (each !== notice) each.remove();
  start();
  announce(text);
  return close;
}

export function dismiss(topic) {
  for (const each of [...byId("notices").children]) if (each.dataset.topic === topic) each.remove();
}
