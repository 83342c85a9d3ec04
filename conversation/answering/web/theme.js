// Sets the chosen theme before anything is drawn. A plain script: a module would run too late, and the page would flash.

try {
  const theme = localStorage.getItem("conversation.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // no storage: the system's theme
}
