// Dialogs that end in an answer: openDialog gives a promise of it, null when the reader closes the dialog.

import { byId, composes, h, icon } from "./dom.js";

/**
 * `body` are elements; `buttons` are {label, value, solid}: `value` may be a function, called when it is pressed.
 * `start(close)` is called when it is open; closing gives the focus back to where it was.
 */
export function openDialog({ title, body, buttons = [], className = "", start = () => {} }) {
  const before = document.activeElement;
  const fillsIn = body.some((element) => element.matches("input") || element.querySelector("input")); // else it is to scroll
  return new Promise((resolve) => {
    const close = (value = null) => {
      if (!dialog.open) return;
      dialog.close();
      dialog.remove();
      (before?.isConnected ? before : byId("question"))?.focus({ preventScroll: true });
      resolve(value);
    };
    const press = (value) => close(typeof value === "function" ? value() : value);
    const foot = buttons.map(({ label, value, solid }) =>
      h("button", { type: solid ? "submit" : "button", class: solid ? "solid" : "outline", on: { click: (event) => (event.preventDefault(), press(value)) } }, label),
    );
    const dialog = h(
      "dialog",
      { "aria-labelledby": "dialog-title", class: className },
      h(
        "div",
        { class: "dialog-head" },
        h("h2", { id: "dialog-title" }, title),
        h("button", { type: "button", class: "plain", "aria-label": "Close", on: { click: () => close() } }, icon("close")),
      ),
      h("div", { class: "dialog-body", tabindex: fillsIn ? "-1" : "0", role: "group", "aria-labelledby": "dialog-title" }, ...body),
      foot.length > 0 && h("div", { class: "dialog-foot" }, ...foot),
    );
    const solid = buttons.find((button) => button.solid);
    dialog.addEventListener("cancel", (event) => (event.preventDefault(), close()));
    let pressed = null; // where the pointer went down: who selects a text may let go outside
    dialog.addEventListener("pointerdown", (event) => (pressed = event.target));
    dialog.addEventListener("click", (event) => event.target === dialog && pressed === dialog && close());
    dialog.addEventListener("keydown", (event) => {
      if (composes(event) || event.key !== "Enter" || event.target.localName !== "input" || !solid) return;
      event.preventDefault();
      press(solid.value);
    });
    document.body.append(dialog);
    dialog.showModal();
    dialog.querySelector(fillsIn ? "input" : ".dialog-body").focus();
    start(close);
  });
}

/** A line of text from the reader; null if none was given. */
export async function askForText({ title, label, value = "" }) {
  const input = h("input", { type: "text", id: "dialog-text", value, maxlength: "200", dir: "auto" });
  const answer = await openDialog({
    title,
    body: [h("p", {}, h("label", { for: "dialog-text" }, label)), input],
    buttons: [{ label: "Cancel", value: null }, { label: "Save", solid: true, value: () => input.value.trim() }],
    start: () => {
      input.focus();
      input.select();
    },
  });
  return answer || null;
}
