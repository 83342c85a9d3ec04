// What the reader set: theme, prefetching, keys of one character. Kept in the browser, under names of this program's own,
// as another one may have been served from this address.

const PREFIX = "conversation.";

const read = (name, fallback) => {
  try {
    return localStorage.getItem(PREFIX + name) ?? fallback;
  } catch {
    return fallback;
  }
};

const write = (name, value) => {
  try {
    localStorage.setItem(PREFIX + name, value);
  } catch {
    // no storage: the setting lasts as long as the page
  }
};

export const settings = {
  theme: read("theme", "system"),
  prefetch: read("prefetch", "on") === "on",
  keys: read("keys", "on") === "on",

  setTheme(theme) {
    this.theme = theme;
    write("theme", theme);
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
  },

  setPrefetch(on) {
    this.prefetch = on;
    write("prefetch", on ? "on" : "off");
  },

  setKeys(on) {
    this.keys = on;
    write("keys", on ? "on" : "off");
  },
};
