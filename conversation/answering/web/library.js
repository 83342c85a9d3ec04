// All conversations: kept in the browser at once, sent to the server when it is there, shared with other tabs.
//
// A tab works on its own copy of a document. What it last read or wrote in the browser is the base for merging with
// other tabs; what the server last had is the base for merging with the server, where another browser may have saved.

import { merge } from "./merge.js";
import * as server from "./server.js";

const SEND_AFTER = 500; // milliseconds without a change
const SEND_AGAIN = 15_000;
const LEFT = "conversation.left "; // in local storage: what was not written yet when the page was left

export class Library {
  #store;
  #page;
  #seen = new Map(); // id -> the record that this tab last read or wrote
  #queue = Promise.resolve();
  #timer = null;
  #channel = openChannel();
  #writing = new Map(); // id -> the document that is being written

  /**
   * `page` is told what happens: `mine(id)` gives this tab's document, `changed(id, doc)` that it became another one
   * elsewhere (null: deleted), `met({copies, both})` that two versions were merged, `sent(error)` that everything is on
   * the server or why it is not, `listed()` that the list of conversations is another one.
   */
  constructor(store, page) {
    this.#store = store;
    this.#page = page;
    this.#channel.addEventListener("message", ({ data }) => this.#readAgain(data));
    addEventListener("pagehide", () => this.#leave());
  }

  /** The records of all conversations that are not deleted, the one with the newest question first. */
  async list() {
    const records = (await this.#store.all()).filter((record) => !record.deleted);
    const age = new Map(records.map(({ id, doc }) => [id, lastAsked(doc)]));
    return records.sort((a, b) => (age.get(a.id) < age.get(b.id) ? 1 : -1));
  }

  /** The document, which this tab works on from now on; null if it is not here. */
  open(id) {
    return this.#inTurn(async () => {
      const record = await this.#store.get(id);
      if (!record || record.deleted) return null;
      this.#seen.set(id, record);
      return record.doc;
    });
  }

  /** Keeps this tab's document in the browser, merged with what another tab wrote; later it is sent. */
  save(doc, { send = true } = {}) {
    this.#writing.set(doc.id, doc);
    return this.#inTurn(async () => {
      const ours = this.#page.mine(doc.id) ?? doc;
      const seen = this.#seen.get(doc.id);
      let met = null;
      const record = await this.#store.change(doc.id, (stored) => {
        met = stored && !stored.deleted && stored.writes !== seen?.writes ? merge(seen?.doc ?? null, ours, stored.doc) : null;
        return { base: null, ...stored, id: doc.id, doc: met?.doc ?? ours, unsent: true, deleted: false };
      });
      this.#seen.set(doc.id, record);
      if (this.#writing.get(doc.id) === doc) this.#writing.delete(doc.id);
      this.#channel.postMessage(doc.id);
      if (met) this.#adopt(record.doc, ours);
      if (met?.copies.length) this.#page.met(met);
      if (send) this.sendSoon();
      this.#page.listed();
    });
  }

  /** Changes a document as it is kept, whether this tab has it open or not. */
  update(id, change) {
    return this.#inTurn(async () => {
      const record = await this.#store.change(id, (stored) => {
        const doc = stored && !stored.deleted ? change(stored.doc) : stored?.doc;
        return doc === stored?.doc ? stored : { ...stored, doc, unsent: true };
      });
      if (!record || record.deleted) return;
      this.#channel.postMessage(id);
      this.#takeIn(record);
      this.sendSoon();
      this.#page.listed();
    });
  }

  /** A page that is left, or loaded again, has no time for the database: what is being written is put aside. */
  #leave() {
    for (const [id, doc] of this.#writing) {
      try {
        localStorage.setItem(LEFT + id, JSON.stringify({ doc, base: this.#seen.get(id)?.doc ?? null }));
      } catch {
        // no storage, or it is full
      }
    }
  }

  /** Takes in what a page left; to be called before a conversation is opened. */
  async recover() {
    for (const key of Object.keys(localStorage).filter((each) => each.startsWith(LEFT))) {
      try {
        const left = localStorage.getItem(key);
        if (!left) continue; // another tab was faster
        const { doc, base } = JSON.parse(left);
        await this.#store.change(doc.id, (stored) => {
          if (stored?.deleted) return stored;
          return { base: null, deleted: false, ...stored, id: doc.id, doc: stored ? merge(base, doc, stored.doc).doc : doc, unsent: true };
        });
        if (this.#store.kept) localStorage.removeItem(key);
      } catch (error) {
        console.error(error); // one that cannot be taken in must not stop the page
      }
    }
  }

  /** Deletes a conversation here, and on the server when it is there. `save` brings it back. */
  remove(id) {
    return this.#inTurn(async () => {
      await this.#store.change(id, (record) => record && { ...record, deleted: true, unsent: true });
      this.#seen.delete(id);
      this.#channel.postMessage(id);
      this.sendSoon();
      this.#page.listed();
    });
  }

  sendSoon(delay = SEND_AFTER) {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.send(), delay);
  }

  /** Sends what the server lacks, one conversation after the other. What fails stays unsent. */
  async send() {
    clearTimeout(this.#timer);
    let failure = null;
    for (const { id } of (await this.#store.all()).filter((record) => record.unsent)) {
      try {
        await this.sendOne(id);
      } catch (error) {
        if (!(error instanceof server.ServerError)) throw error;
        failure = error;
        if (error.status === 0) break;
      }
    }
    if (failure && (failure.status === 0 || failure.status >= 429)) this.sendSoon(SEND_AGAIN);
    this.#page.sent(failure);
    this.#page.listed();
  }

  /** Reads what the server has and this browser lacks, or has in an older version. */
  async fetch() {
    const here = new Map((await this.#store.all()).map((record) => [record.id, record]));
    for (const { id, revision } of (await server.listConversations()) ?? []) {
      const record = here.get(id);
      if (record && (record.deleted || record.base?.revision === revision)) continue;
      await this.fetchOne(id).catch(unlessAway); // one that was deleted meanwhile, or is broken, is passed over
    }
    this.#page.listed();
  }

  /** Reads what the server has of one conversation. Raises ServerError. */
  async fetchOne(id) {
    const theirs = await server.getConversation(id);
    if (theirs) await this.#inTurn(() => this.#receive(id, theirs));
  }

  /** Sends one conversation, if the server lacks anything of it. Raises ServerError. */
  sendOne(id) {
    return oneTabAtATime(id, () => this.#sendOne(id));
  }

  async #sendOne(id) {
    const record = await this.#store.get(id);
    if (!record?.unsent) return;
    if (record.deleted) {
      await server.deleteConversation(id).catch(unlessMissing); // it may have it without a base: its answer was lost
      await this.#inTurn(() => this.#store.change(id, (now) => (now?.deleted ? undefined : now)));
      return;
    }
    try {
      const answer = await server.putConversation({ ...record.doc, revision: record.base?.revision ?? 0 });
      await this.#inTurn(() => this.#confirm(id, record, { ...record.doc, revision: answer.revision }));
    } catch (error) {
      if (error.status !== 409) throw error;
      await this.fetchOne(id);
      await this.#sendOne(id);
    }
  }

  /** The server has `base`, which was `sent`; what was written since remains to be sent. */
  async #confirm(id, sent, base) {
    const record = await this.#store.change(
      id,
      (now) => now && { ...now, base, unsent: now.deleted || now.writes !== sent.writes },
    );
    if (record && this.#seen.get(id)?.writes === record.writes - 1) this.#seen.set(id, record);
  }

  /**
   * The server has another document than we thought: ours becomes both. One of an older revision than it had, from a
   * copy of its folder, says nothing of what was deleted: everything that either side has stays, and is sent.
   */
  async #receive(id, theirs) {
    let met = null;
    const record = await this.#store.change(id, (now) => {
      met = null;
      if (!now) return { id, doc: theirs, base: theirs, unsent: false, deleted: false };
      if (now.deleted) return now;
      const older = theirs.revision < (now.base?.revision ?? 0);
      const unsent = now.unsent || older;
      if (now.base?.revision !== theirs.revision) met = { ...merge(older ? null : now.base, now.doc, theirs), unsent };
      return { ...now, doc: met?.doc ?? now.doc, base: theirs, unsent };
    });
    if (!met) return;
    this.#channel.postMessage(id);
    const open = this.#takeIn(record);
    if (met.unsent) this.sendSoon();
    if (open && met.unsent && met.both) this.#page.met(met);
  }

  /** Another tab wrote or deleted this conversation. */
  #readAgain(id) {
    this.#page.listed();
    return this.#inTurn(async () => {
      const seen = this.#seen.get(id);
      const record = seen && (await this.#store.get(id));
      if (!seen || record?.writes === seen.writes) return;
      if (!record || record.deleted) {
        this.#seen.delete(id);
        this.#page.changed(id, null);
      } else {
        this.#takeIn(record);
      }
    });
  }

  /** What is kept became another document than this tab last saw: the tab's own takes it in. False: it never saw it. */
  #takeIn(record) {
    const seen = this.#seen.get(record.id);
    if (!seen) return false;
    this.#seen.set(record.id, record);
    this.#adopt(record.doc, seen.doc);
    return true;
  }

  /** Makes `doc` this tab's document, together with what this tab changed since `base`. */
  #adopt(doc, base) {
    const mine = this.#page.mine(doc.id);
    if (mine) this.#page.changed(doc.id, merge(base, mine, doc).doc);
  }

  /** One write after the other. */
  #inTurn(work) {
    const result = this.#queue.then(work);
    this.#queue = result.catch(() => {});
    return result;
  }
}

export const lastAsked = (doc) => Object.values(doc.nodes).reduce((last, { created }) => (created > last ? created : last), "");

function unlessAway(error) {
  if (!(error instanceof server.ServerError) || [0, 401].includes(error.status)) throw error;
}

function unlessMissing(error) {
  if (error.status !== 404) throw error;
}

/** Without locks, as on plain HTTP from another machine, or where cookies are refused, tabs send side by side. */
async function oneTabAtATime(id, work) {
  let began = false;
  try {
    return await navigator.locks.request(`send ${id}`, () => ((began = true), work()));
  } catch (error) {
    if (began) throw error;
    return work();
  }
}

/** Tells the other tabs; where cookies are refused a browser may have none of it. */
function openChannel() {
  try {
    return new BroadcastChannel("conversations");
  } catch {
    return { addEventListener() {}, postMessage() {} };
  }
}
