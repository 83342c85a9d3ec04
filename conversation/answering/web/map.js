// The map: the whole tree as rows with lanes and lines between them, operated as a tree (ARIA) by click and by keys.

import { nodeOf, pathTo } from "./conversation.js";
import { h, icon, svg } from "./dom.js";
import { lanes } from "./lanes.js";

// Sixteenths of a rem, as in parts.css: the drawing grows with the size of type.
const ROW = 32;
const LANE = 16.8;
const LEFT = 12.8;

export class ConversationMap {
  #body = h("div", { class: "panel-body" });
  #marked = h("div", { class: "marked-paths", hidden: true });
  #items = new Map();
  #focusHere = false;

  /** `go(id, {focus})` moves the reader. */
  constructor(panel, { go, close }) {
    this.go = go;
    const head = h(
      "div",
      { class: "panel-head" },
      h("h2", {}, "Map"),
      h("button", { class: "plain narrow-only", type: "button", "aria-label": "Close the map", on: { click: close } }, icon("close")),
    );
    panel.append(head, this.#body, this.#marked);
  }

  render(doc) {
    this.#focusHere = this.#body.contains(document.activeElement);
    if (!doc) {
      this.#body.replaceChildren(h("p", { class: "panel-note" }, "The questions you ask grow into a tree here."));
      this.#marked.hidden = true;
      return;
    }
    const rows = lanes(doc);
    const path = new Set(pathTo(doc, doc.current).map(({ id }) => id));
    const starred = new Set(rows.filter(({ node }) => node.favourite).flatMap(({ node }) => pathTo(doc, node.id).map(({ id }) => id)));
    const items = rows.map((row) => this.#item(row, doc, path));
    this.#items = new Map(rows.map(({ node }, i) => [node.id, items[i]]));
    const map = h("div", { role: "tree", "aria-label": "Questions of this conversation" }, ...items);
    const scrolled = this.#body.scrollTop;
    this.#body.replaceChildren(h("div", { class: "map" }, lines(rows, path, starred), map));
    this.#body.scrollTop = scrolled;
    this.#items.get(doc.current)?.scrollIntoView({ block: "nearest" });
    if (this.#focusHere) this.focus(doc.current);
    this.#renderMarked(rows, doc);
  }

  focus(id) {
    this.#items.get(id)?.focus();
  }

  #item({ node, lane, level, position, siblings }, doc, path) {
    const current = node.id === doc.current;
    const state = [node.state === "draft" && "unfinished", node.mark && `marked ${node.mark}`, node.favourite && "path marked"];
    return h(
      "div",
      {
        class: ["map-node", path.has(node.id) && "on-path", node.state].filter(Boolean).join(" "),
        role: "treeitem",
        tabindex: current ? "0" : "-1",
        title: node.question,
        "aria-level": level,
        "aria-posinset": position,
        "aria-setsize": siblings,
        "aria-selected": String(current),
        "aria-label": [node.question, ...state.filter(Boolean)].join(", "),
        style: { "--lane": lane },
        on: {
          click: () => this.go(node.id, { focus: true }),
          keydown: (event) => this.#key(event, node, doc),
        },
      },
      h("span", { class: "text", dir: "auto" }, node.question),
      h(
        "span",
        { class: "marks" },
        node.mark && h("span", { class: node.mark }, icon(node.mark)),
        node.favourite && h("span", { class: "star" }, icon("star")),
      ),
    );
  }

  /** Keys of a tree: up and down by rows, left to the parent, right to the first child, Home, End, Enter to read. */
  #key(event, node, doc) {
    if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    const order = [...this.#items.keys()];
    const at = order.indexOf(node.id);
    const child = order.find((id) => nodeOf(doc, id).parent === node.id);
    const target = {
      ArrowUp: order[at - 1],
      ArrowDown: order[at + 1],
      ArrowLeft: node.parent,
      ArrowRight: child,
      Home: order[0],
      End: order.at(-1),
    }[event.key];
    if (event.key === "Enter" || event.key === " ") this.go(node.id, { focus: true });
    else if (target) this.go(target, { focus: false });
    else if (!event.key.startsWith("Arrow")) return;
    event.preventDefault();
    event.stopPropagation();
  }

  #renderMarked(rows, doc) {
    const ends = rows.filter(({ node }) => node.favourite);
    this.#marked.hidden = ends.length === 0;
    this.#marked.replaceChildren(
      h("h3", {}, "Marked paths"),
      ...ends.map(({ node, level }) =>
        h(
          "button",
          { type: "button", "aria-current": node.id === doc.current ? "true" : null, on: { click: () => this.go(node.id, { focus: true }) } },
          icon("star"),
          `${node.question} (${level} ${level === 1 ? "question" : "questions"})`,
        ),
      ),
    );
  }
}

/** A line from each node to its parent: straight down a lane, or a curve into the next one. */
function lines(rows, path, starred) {
  const x = (lane) => LEFT + lane * LANE;
  const y = (row) => ROW * (row + 0.5);
  const below = rows.filter(({ parentRow }) => parentRow !== null);
  const paint = ({ node }) => (path.has(node.id) ? 2 : starred.has(node.id) ? 1 : 0);
  const drawn = below.toSorted((a, b) => paint(a) - paint(b)).map((place) => {
    const parent = rows[place.parentRow];
    const [x1, y1, x2, y2] = [x(parent.lane), y(parent.row), x(place.lane), y(place.row)];
    const bend = `C${x1} ${y2 - 4} ${x1 + 4} ${y2} ${x2} ${y2}`;
    const d = x1 === x2 ? `M${x1} ${y1}V${y2}` : `M${x1} ${y1}V${y2 - ROW * 0.55}${bend}`;
    return svg("path", { d, class: ["", "marked", "path"][paint(place)] || null });
  });
  const size = { width: "1rem", height: `${(ROW * rows.length) / 16}rem` };
  return svg("svg", { class: "lines", "aria-hidden": "true", viewBox: `0 0 16 ${ROW * rows.length}`, style: size }, ...drawn);
}
