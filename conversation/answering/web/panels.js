// The shelf and the map on narrow screens: panels that a button opens over the page, and Escape closes.

import { byId } from "./dom.js";

/** `open()` and `close()` for a panel with its button; on wide screens it is always there and both do little. */
export function panel(panelId, buttonId) {
  const [place, button] = [byId(panelId), byId(buttonId)];
  const isOpen = () => place.hasAttribute("data-open");
  const covers = () => getComputedStyle(place).position === "fixed";
  const open = () => {
    place.toggleAttribute("data-open", true);
    button.setAttribute("aria-expanded", "true");
    if (covers()) place.querySelector("button, [tabindex='0']")?.focus();
  };
  const close = () => {
    if (!isOpen()) return;
    const inside = place.contains(document.activeElement);
    place.toggleAttribute("data-open", false);
    button.setAttribute("aria-expanded", "false");
    if (inside && covers()) button.focus();
  };
  button.addEventListener("click", () => (isOpen() ? close() : open()));
  place.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !isOpen() || !covers()) return;
    event.preventDefault();
    close();
  });
  return { open, close };
}
