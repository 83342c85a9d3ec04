// Conversations kept in the browser, in IndexedDB, so that a reload or a dead server loses nothing.
//
// A record is {id, doc, base, unsent, deleted, writes}: the newest document, the document that the server last had
// (null: none), whether the server lacks something, whether it was deleted here, and how often it was written.

const NAME = "conversations";

const done = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });

/**
 * Opens the store. `kept` is false where the browser allows no storage: then it lives as long as the page. `lost(error)`
 * is called when the browser takes no more, as of a full disk: the page goes on with what it has in memory.
 */
export async function openBrowserStore(lost) {
  return new LastingStore(await openStore(), lost);
}

async function openStore() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(NAME, { keyPath: "id" });
    const database = await done(request);
    database.onversionchange = () => database.close();
    return new BrowserStore(database);
  } catch {
    return new MemoryStore();
  }
}

/** A store that goes on when the one of the browser fails: closed, it is opened again; full, memory takes its place. */
class LastingStore {
  #store;
  #replacing = null;
  #reopened = false;

  constructor(store, lost) {
    this.#store = store;
    this.lost = lost;
  }

  get kept() {
    return this.#store.kept;
  }

  get(id) {
    return this.#try((store) => store.get(id));
  }

  all() {
    return this.#try((store) => store.all());
  }

  /** Replaces a record by what `change` makes of it (undefined: removes it), with no other tab in between. */
  change(id, change) {
    return this.#try((store) => store.change(id, change));
  }

  async #try(work) {
    const store = this.#store;
    try {
      return await work(store);
    } catch (error) {
      if (!store.kept || !(error instanceof DOMException)) throw error; // no fault of the storage
      if (store === this.#store) await (this.#replacing ??= this.#replace(store, error));
      return this.#try(work);
    }
  }

  async #replace(store, error) {
    const records = await store.all().catch(() => null);
    if (!records && !this.#reopened) {
      this.#reopened = true;
      this.#store = await openStore();
    } else this.#store = new MemoryStore(records ?? []);
    this.#replacing = null;
    if (!this.kept) this.lost(error);
  }
}

class BrowserStore {
  kept = true;
  #database;

  constructor(database) {
    this.#database = database;
  }

  #records(mode) {
    return this.#database.transaction(NAME, mode).objectStore(NAME);
  }

  async get(id) {
    return done(this.#records("readonly").get(id));
  }

  async all() {
    return done(this.#records("readonly").getAll());
  }

  change(id, change) {
    return new Promise((resolve, reject) => {
      const transaction = this.#database.transaction(NAME, "readwrite");
      const records = transaction.objectStore(NAME);
      let record;
      records.get(id).onsuccess = (event) => {
        try {
          record = changed(event.target.result, change);
          if (record) records.put(record);
          else records.delete(id);
        } catch (error) {
          reject(error);
          transaction.abort();
        }
      };
      transaction.oncomplete = () => resolve(record);
      transaction.onabort = () => reject(transaction.error);
    });
  }
}

class MemoryStore {
  kept = false;
  #records;

  constructor(records = []) {
    this.#records = new Map(records.map((record) => [record.id, record]));
  }

  async get(id) {
    return this.#records.get(id);
  }

  async all() {
    return [...this.#records.values()];
  }

  async change(id, change) {
    const record = changed(this.#records.get(id), change);
    if (record) this.#records.set(id, record);
    else this.#records.delete(id);
    return record;
  }
}

function changed(record, change) {
  const next = change(record);
  return next && next !== record ? { ...next, writes: (record?.writes ?? 0) + 1 } : next;
}
