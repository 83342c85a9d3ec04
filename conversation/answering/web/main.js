// The page, put together: the reader in the middle, the views around it, the library and the server behind it.

import { openBrowserStore } from "./browser_store.js";
import { Composer } from "./composer.js";
import { Connection } from "./connection.js";
import { nodeOf, rootOf } from "./conversation.js";
import { askForText } from "./dialogs.js";
import { byId, icon } from "./dom.js";
import { chooseFiles, readFile, saveCopy, saveMarkdown, saveTree } from "./exchange.js";
import { listenToKeys, openHelp } from "./keys.js";
import { Library } from "./library.js";
import { ConversationMap } from "./map.js";
import { fillMenu } from "./menu.js";
import { announce, dismiss, notify } from "./notices.js";
import { panel } from "./panels.js";
import { Gains, Prefetch } from "./prefetch.js";
import { Reader } from "./reader.js";
import { Reading } from "./reading.js";
import { openSearch } from "./search.js";
import * as server from "./server.js";
import { settings } from "./settings.js";
import { Shelf } from "./shelf.js";
import { Status } from "./status.js";
import { sayProblems, treeFor } from "./training.js";
import { Undo } from "./undo.js";

// --- the library and the reader ---------------------------------------------------------------------------------------

const store = await openBrowserStore(() =>
  notify("This browser keeps nothing any more: its storage is full or was closed. What the server does not get is lost when you leave.", { kind: "error", topic: "kept" }),
);
const library = new Library(store, {
  mine: (id) => (reader.doc?.id === id ? reader.doc : null),
  changed(id, doc) {
    if (reader.doc?.id !== id) return;
    reader.replace(doc);
    if (!doc) notify("This conversation was deleted in another tab.");
  },
  met({ copies }) {
    const twice = copies.length === 1 ? "One answer was changed in both places: it stands twice, side by side." : `${copies.length} answers were changed in both places: they stand twice, side by side.`;
    notify(`This conversation was changed elsewhere, too. Both changes are kept. ${copies.length ? twice : ""}`.trim(), { topic: "met" });
  },
  sent: (error) => {
    status.setKept(error);
    if (error?.status === 0) connection.check();
  },
  listed: () => renderShelf(),
});

const gains = new Gains();
const prefetch = new Prefetch((id) => reader.doc?.current === id && reading.renderStates());
prefetch.enabled = settings.prefetch;
const undo = new Undo();

const reader = new Reader({
  library,
  prefetch,
  gains,
  undo,
  say: { announce, notify },
  changed: (how) => render(how),
});

const REMARKS = 3; // more are not read in a notice

const firstRemarks = (remarks) =>
  remarks.length > REMARKS + 1 ? [...remarks.slice(0, REMARKS), `And ${remarks.length - REMARKS} more remarks.`] : remarks;

// --- the views ----------------------------------------------------------------------------------------------------------

const shelfPanel = panel("shelf", "open-shelf");
const mapPanel = panel("map-panel", "open-map");

const actions = {
  pick: (place) => reader.pick(place),
  own: () => composer.focus(),
  again: () => reader.askAgain(),
  stop: () => reader.stop(),
  parent: () => reader.goParent(),
  child: () => reader.goChild(),
  sibling: (step) => reader.goSibling(step),
  mark: (mark) => reader.mark(mark),
  favourite: () => reader.favourite(),
  correct: () => reading.correct(),
  remove: () => reader.remove(),
  removeConversation: () => reader.removeConversation(),
  undo: () => reader.undoLast(),
  help: () => openHelp(settings.keys),

  start() {
    shelfPanel.close();
    if (reader.doc) history.pushState(null, "", location.href);
    reader.open(null);
    composer.cancel();
    composer.focus();
  },

  map() {
    mapPanel.open();
    if (reader.doc) map.focus(reader.doc.current);
  },

  shelf() {
    shelfPanel.open();
    shelf.focus();
  },

  editQuestion() {
    const { node } = reader;
    if (!node) return;
    const root = node.parent === null;
    composer.edit(root ? "In other words, as a new conversation" : "In other words, beside this question", node.question, (text) => reader.askInstead(text), { root });
  },

  editChoice(place) {
    composer.edit("This follow-up in your words", reader.node.choices[place].text, (text) => reader.ask(text));
  },

  async search() {
    const isOpen = ({ id }) => Number(id === reader.doc?.id);
    const docs = library.list().then((records) => records.map(({ doc }) => doc).sort((a, b) => isOpen(b) - isOpen(a)));
    const hit = await openSearch(docs);
    if (!hit) return;
    if (hit.doc.id !== reader.doc?.id) await openConversation(hit.doc.id, hit.node.id);
    else reader.go(hit.node.id);
  },

  async rename() {
    const title = reader.doc && (await askForText({ title: "Rename the conversation", label: "Title", value: reader.doc.title }));
    if (title) reader.rename(title);
  },

  async saveTree() {
    const { doc } = reader; // the reader may go on to another one meanwhile
    const made = doc && (await treeFor(doc));
    if (!made) return;
    await library.save(doc);
    try {
      await library.sendOne(doc.id);
      const { path, warnings } = await server.saveTrainingTree(doc.id, made.leaveOut);
      notify([`Saved as ${path}.`, ...firstRemarks(warnings ?? [])].join(" "), { topic: "saved", stays: true });
    } catch (error) {
      const { problems } = error.body?.error ?? {};
      if (problems) sayProblems(server.sentences({ message: error.message }), problems, server.sentences({ hint: error.hint }));
      else notify(server.sentences(error), { kind: "error" });
    }
  },

  async exportTree() {
    const made = reader.doc && (await treeFor(reader.doc));
    if (!made) return;
    saveTree(made);
    if (made.left) notify(`${made.left} ${made.left === 1 ? "answer stays" : "answers stay"} out of the tree: drafts, second answers, what is marked bad.`);
  },

  exportMarkdown: () => saveMarkdown(reader.doc),
  exportCopy: () => saveCopy(reader.doc),
  importFiles: async () => importAll(await chooseFiles()),

  setPrefetch(on) {
    settings.setPrefetch(on);
    prefetch.enabled = on;
    if (!on) prefetch.leave();
    else if (reader.node) prefetch.follow(reader.doc, reader.node);
    reading.render();
  },
};

const status = new Status();
const reading = new Reading(byId("reading"), reader, actions);
const composer = new Composer(byId("composer"), reader, status.element);
const map = new ConversationMap(byId("map-panel"), {
  go: (id, how) => {
    if (how.focus) mapPanel.close();
    reader.go(id, how);
  },
  close: mapPanel.close,
});
const shelf = new Shelf(byId("shelf"), { open: (id) => openConversation(id), start: actions.start, close: shelfPanel.close });
const menu = fillMenu(byId("menu"), actions);
for (const [id, name] of [["open-shelf", "menu"], ["open-search", "search"], ["open-map", "map"], ["open-menu", "more"]]) byId(id).prepend(icon(name));
byId("open-search").addEventListener("click", actions.search);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // as an address it would be another conversation's
  byId("question")?.focus();
});
document.addEventListener("visibilitychange", () => document.hidden || reader.prefetchHere());
listenToKeys(actions, () => settings.keys);

function render({ focus = false } = {}) {
  const { doc } = reader;
  reading.render({ focus });
  map.render(doc);
  composer.render();
  menu.setOpen(Boolean(doc));
  status.setGain(gains.summary());
  byId("title").textContent = doc?.title ?? "New conversation";
  document.title = doc ? `${doc.title} – Conversation` : "Conversation";
  const address = doc ? `#${doc.id}/${doc.current}` : "";
  if (address === location.hash || (!doc && wanted)) return;
  const [before] = addressed();
  if (doc && before && before !== doc.id) history.pushState(null, "", address); // the way back leads to the one before
  else history.replaceState(null, "", address || location.pathname + location.search);
}

async function renderShelf() {
  shelf.render(await library.list(), reader.doc?.id, connection.state === "away" || status.failed);
}

// --- opening and importing ----------------------------------------------------------------------------------------------

async function openConversation(id, nodeId = null, { focus = true } = {}) {
  const doc = await library.open(id);
  if (!doc) return false;
  reader.open(nodeId && nodeOf(doc, nodeId) ? { ...doc, current: nodeId } : repaired(doc), { focus });
  shelfPanel.close();
  renderShelf();
  return true;
}

const repaired = (doc) => (nodeOf(doc, doc.current) ? doc : { ...doc, current: rootOf(doc).id });

/** [conversation, node] of the address; empty if it names none. */
const addressed = () => (/^#[0-9a-f-]{36}(\/|$)/.test(location.hash) ? location.hash.slice(1).split("/") : []);

let wanted = null; // an address that this browser does not know yet

addEventListener("popstate", async () => {
  const [id, node] = addressed();
  if (!id && location.hash) return; // a place on the page
  if (!id || !(await openConversation(id, node))) reader.open(null);
});

/** Opens what the address of the page asked for, which only the server may have. */
async function openWanted() {
  const [id, node] = wanted;
  try {
    await library.fetchOne(id);
  } catch (error) {
    if (error.status !== 404) throw error;
    notify("There is no conversation of this address, neither in this browser nor on the server.");
  }
  wanted = null;
  if (reader.doc || !(await openConversation(id, node, { focus: false }))) render();
}

async function importAll(results) {
  for (const { file, doc, notes, problem } of results) {
    if (problem) notify(`${file} was not imported: ${problem}.`, { kind: "error" });
    else {
      await library.save(doc);
      await openConversation(doc.id);
      notify([`Imported ${file}.`, ...notes].join(" "));
    }
  }
}

const bringsFiles = (event) => event.dataTransfer.types.includes("Files"); // a text may be dragged into a field
document.addEventListener("dragover", (event) => bringsFiles(event) && event.preventDefault());
document.addEventListener("drop", async (event) => {
  if (!bringsFiles(event)) return;
  event.preventDefault();
  importAll(await Promise.all([...event.dataTransfer.files].map(readFile)));
});

// --- the server -----------------------------------------------------------------------------------------------------------

const connection = new Connection(async (state, before) => {
  status.setConnection(state, connection.model);
  renderShelf();
  if (state === "away" && before === "ok") notify("The server does not answer. Everything you do is kept in this browser.", { topic: "server" });
  if (state !== "ok") return;
  dismiss("server");
  if (before === "away") notify("The server is back.", { topic: "server" });
  try {
    const { name, limits } = (await server.model()) ?? {};
    connection.model = name ?? connection.model;
    status.setConnection(state, connection.model);
    composer.limits = { ...composer.limits, ...limits };
    composer.render();
    if (wanted) await openWanted();
    await library.fetch();
  } catch (error) {
    if (!(error instanceof server.ServerError)) throw error;
    if (error.status === 401) notify("The server's key is another one now.", { kind: "error", topic: "key", action: { label: "Log in", run: () => location.reload() } });
  }
  await library.send();
});

// --- begin --------------------------------------------------------------------------------------------------------------

status.setConnection("unknown", "");
if (store.kept) await library.recover();
const [id, node] = addressed();
if (!id || !(await openConversation(id, node, { focus: false }))) {
  if (id) wanted = [id, node];
  render();
  if (matchMedia("(hover: hover)").matches) composer.focus(); // on a touch screen that would open the keyboard
}
renderShelf();
await connection.check();
if (!store.kept) notify("This browser keeps nothing for this page: what the server does not get is lost when you leave.", { kind: "error" });
