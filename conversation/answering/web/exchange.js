// Conversations leave the page as files and come back: a tree file, Markdown, or a complete copy.

import { fromDocument, isDocument, toDocumentFile } from "./document_file.js";
import { h } from "./dom.js";
import { fromMarkdown, toMarkdown } from "./markdown.js";
import { ImportProblem, fromTree } from "./tree_file.js";

const LARGEST = 8_000_000; // bytes

export const saveMarkdown = (doc) => download(`${fileName(doc)}.md`, toMarkdown(doc), "text/markdown");
export const saveCopy = (doc) => download(`${fileName(doc)}.conversation.json`, toDocumentFile(doc), "application/json");
export const saveTree = ({ name, tree }) => download(`${name}.json`, JSON.stringify(tree, null, 2) + "\n", "application/json");

const fileName = (doc) => doc.title.toLowerCase().replace(/[^a-z0-9]+/g, "_").replace(/^_+|_+$/g, "").slice(0, 40) || "conversation";

function download(name, text, type) {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Lets the reader choose files. Gives [{file, doc, notes} or {file, problem}], empty if none were chosen. */
export function chooseFiles() {
  return new Promise((resolve) => {
    const input = h("input", { type: "file", multiple: true, accept: ".json,.md,application/json,text/markdown" });
    input.addEventListener("change", async () => resolve(await Promise.all([...input.files].map(readFile))));
    input.addEventListener("cancel", () => resolve([]));
    input.click();
  });
}

export async function readFile(file) {
  try {
    if (file.size > LARGEST) throw new ImportProblem([`the file has more than ${LARGEST / 1e6} MB`]);
    return { file: file.name, notes: [], ...readText(await file.text()) };
  } catch (error) {
    if (!(error instanceof ImportProblem)) console.error(error);
    return { file: file.name, problem: error instanceof ImportProblem ? error.message : "it cannot be read" };
  }
}

/** {doc, notes} from the text of a file of any of the three kinds. Raises ImportProblem. */
export function readText(text) {
  if (!/^\s*[[{]/.test(text)) return { doc: fromMarkdown(text) };
  let value;
  try {
    value = JSON.parse(text);
  } catch (error) {
    throw new ImportProblem([`it is no JSON (${error.message})`]);
  }
  return isDocument(value) ? { doc: fromDocument(value) } : fromTree(value);
}
