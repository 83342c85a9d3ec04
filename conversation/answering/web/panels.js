// The shelf and the map on narrow screens: panels that a button opens over the page, one at a time. Escape closes them,
// and so does a focus that goes on to what lies behind.

import { byId } from "./dom.js";

const open = new Set(); // the panels that are open

/** `open()` and `close()` for a panel with its button; where it covers nothing it is always there, and both do nothing. */
export function panel(panelId, buttonId) {
  const [place, button] = [byId(panelId), byId(buttonId)];
  const covers = () => getComputedStyle(place).position === "fixed";
  const show = (is) => {
    place.toggleAttribute("data-open", is);
    button.setAttribute("aria-expanded", String(is));
  };
  const self = {
    open() {
      for (const other of open) if (other !== self) other.close();
      if (!covers()) return;
      open.add(self);
      show(true);
      place.querySelector("button, [tabindex='0']")?.focus();
    },
    close() {
      if (!open.delete(self)) return;
      const inside = place.contains(document.activeElement);
      show(false);
      if (inside && covers()) button.focus();
    },
    covers: () => open.has(self) && covers(),
  };
  byId("main").addEventListener("focusin", () => covers() && self.close());
  button.addEventListener("click", () => (open.has(self) ? self.close() : self.open()));
  return self;
}

document.addEventListener(
  "keydown",
  (event) => {
    const top = [...open].find((each) => each.covers());
    if (event.key !== "Escape" || !top || document.querySelector("dialog[open], :popover-open")) return;
    event.preventDefault();
    event.stopPropagation();
    top.close();
  },
  { capture: true },
);
