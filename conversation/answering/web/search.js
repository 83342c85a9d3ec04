// Search in the questions, answers and follow-ups of all conversations; a hit leads to its place in its tree.

import { isRoot } from "./conversation.js";
import { openDialog } from "./dialogs.js";
import { composes, h } from "./dom.js";

const MOST = 40;

/**
 * Nodes that hold every word of the query: [{doc, node, text}], hits in questions first, the open conversation first. A
 * conversation's title counts as a text of its first question.
 */
export function search(docs, query) {
  const words = wordsOf(query);
  if (!words.length) return [];
  const hits = [];
  docs.forEach((doc, order) => {
    for (const node of Object.values(doc.nodes)) {
      const title = isRoot(node) && doc.title !== node.question ? [doc.title] : [];
      const texts = [node.question, ...title, ...node.fragments, ...node.choices.map((choice) => choice.text)];
      const all = texts.join("\n").toLowerCase();
      if (!words.every((word) => all.includes(word))) continue;
      const text = texts.find((each) => words.some((word) => each.toLowerCase().includes(word)));
      hits.push({ doc, node, text, rank: (text === node.question ? 0 : 1000) + order });
    }
  });
  return hits.sort((a, b) => a.rank - b.rank).slice(0, MOST);
}

const wordsOf = (query) => query.toLowerCase().split(/\s+/).filter(Boolean);

/** Opens the search over a promise of documents; gives the hit that was picked, or null. */
export function openSearch(coming) {
  let docs = null; // until they have come
  let goes = false; // whether Enter was pressed before that
  let hits = [];
  let at = 0;
  const input = h("input", {
    type: "text", // Escape would clear a search field instead of closing the dialog
    enterkeyhint: "search",
    role: "combobox",
    "aria-label": "Search all conversations",
    "aria-controls": "hits",
    "aria-expanded": "false",
    "aria-autocomplete": "list",
    placeholder: "A word of a question or an answer",
    autocomplete: "off",
  });
  const list = h("div", { class: "hits", id: "hits", role: "listbox", "aria-label": "Hits" });
  const found = h("p", { class: "panel-note", role: "status" });

  return openDialog({
    title: "Search",
    className: "at-top",
    body: [input, list, found],
    start: (close) => {
      const select = (place) => {
        at = (place + hits.length) % Math.max(1, hits.length);
        [...list.children].forEach((option, i) => option.setAttribute("aria-selected", String(i === at)));
        list.children[at]?.scrollIntoView({ block: "nearest" });
        if (hits.length) input.setAttribute("aria-activedescendant", `hit-${at}`);
        else input.removeAttribute("aria-activedescendant");
      };
      const update = () => {
        hits = search(docs ?? [], input.value);
        const words = wordsOf(input.value);
        list.replaceChildren(...hits.map((hit, i) => option(hit, i, words, () => close(hit))));
        list.hidden = !hits.length;
        input.setAttribute("aria-expanded", String(hits.length > 0));
        found.textContent = !words.length || !docs ? "" : hits.length === MOST ? `The first ${MOST} hits` : hits.length ? `${hits.length} ${hits.length === 1 ? "hit" : "hits"}` : "Nothing found";
        select(0);
      };
      input.addEventListener("input", update);
      input.addEventListener("keydown", (event) => {
        if (composes(event)) return;
        if (event.key === "ArrowDown") select(at + 1);
        else if (event.key === "ArrowUp") select(at - 1);
        else if (event.key === "Enter" && hits[at]) close(hits[at]);
        else if (event.key === "Enter" && !docs) goes = true;
        else return;
        event.preventDefault();
      });
      list.hidden = true;
      input.focus();
      coming.then((all) => {
        docs = all;
        update();
        if (goes && hits.length) close(hits[0]);
      });
    },
  });
}

function option({ doc, node, text }, i, words, pick) {
  const where = text === node.question ? doc.title : `${node.question} — ${doc.title}`;
  return h(
    "div",
    { class: "hit", id: `hit-${i}`, role: "option", "aria-selected": "false", on: { click: pick } },
    h("span", { dir: "auto" }, ...marked(text, words)),
    h("span", { class: "where", dir: "auto" }, where),
  );
}

/** The text with the words that were looked for as <mark> elements. */
function marked(text, words) {
  const parts = [];
  const lower = text.toLowerCase();
  let from = 0;
  while (from < text.length) {
    const places = words.map((word) => [lower.indexOf(word, from), word.length]).filter(([place]) => place >= 0);
    if (!places.length || lower.length !== text.length) break;
    const [place, length] = places.reduce((first, each) => (each[0] < first[0] ? each : first));
    parts.push(text.slice(from, place), h("mark", {}, text.slice(place, place + length)));
    from = place + length;
  }
  return [...parts, text.slice(from)];
}
