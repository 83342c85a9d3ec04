// The menu behind "More": export, import, the conversation as a whole, settings.

import { h } from "./dom.js";
import { settings } from "./settings.js";

export function fillMenu(menu, actions) {
  const item = (label, run, note = null) =>
    h("button", { type: "button", on: { click: () => (menu.hidePopover(), run()) } }, label, note && h("small", {}, note));
  const whole = [
    item("Save as training tree", actions.saveTree, "on the server, for --training_data"),
    item("Export as tree file", actions.exportTree, "the project's format, one answer a question"),
    item("Export as Markdown", actions.exportMarkdown, "everything, to read; can be imported"),
    item("Export a complete copy", actions.exportCopy, "everything, with drafts and marks"),
  ];
  const about = [item("Rename the conversation", actions.rename), item("Delete the conversation", actions.removeConversation)];
  const check = (label, on, change) =>
    h("label", {}, h("input", { type: "checkbox", checked: on, on: { change: (event) => change(event.target.checked) } }), label);
  const theme = (value, label) =>
    h("label", {}, h("input", { type: "radio", name: "theme", value, checked: settings.theme === value, on: { change: () => settings.setTheme(value) } }), label);
  menu.replaceChildren(
    h("h2", {}, "This conversation"),
    ...whole,
    ...about,
    h("hr"),
    item("Import…", actions.importFiles, "a tree, Markdown or a copy"),
    item("Undo", actions.undo),
    item("Keys…", actions.help),
    h("hr"),
    check("Fetch follow-ups ahead", settings.prefetch, actions.setPrefetch),
    check("Keys of one character", settings.keys, (on) => settings.setKeys(on)),
    h("h2", { id: "theme-label" }, "Colours"),
    h("fieldset", { "aria-labelledby": "theme-label" }, theme("system", "System"), theme("light", "Light"), theme("dark", "Dark")),
  );
  return { setOpen: (open) => [...whole, ...about].forEach((button) => (button.disabled = !open)) };
}
