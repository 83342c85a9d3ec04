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

/** Opens the store. `kept` is false where the browser allows no storage: then it lives as long as the page. */
export async function openBrowserStore() {
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

class BrowserStore {
  kept = true;
  #database;

  constructor(database) {
    this.#database = database;
  }

  #records(mode) {
    return this.#database.transaction(NAME, mode).objectStore(NAME);
  }

  get(id) {
    return done(this.#records("readonly").get(id));
  }

  all() {
    return done(this.#records("readonly").getAll());
  }

  /** Replaces a record by what `change` makes of it (undefined: removes it), with no other tab in between. */
  change(id, change) {
    return new Promise((resolve, reject) => {
      const transaction = this.#database.transaction(NAME, "readwrite");
      const records = transaction.objectStore(NAME);
      let record;
      records.get(id).onsuccess = (event) => {
        record = changed(event.target.result, change);
        if (record) records.put(record);
        else records.delete(id);
      };
      transaction.oncomplete = () => resolve(record);
      transaction.onerror = transaction.onabort = () => reject(transaction.error);
    });
  }
}

class MemoryStore {
  kept = false;
  #records = new Map();

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
