// The form in which an answer is corrected in place: fragments, follow-ups, their confidences and targets.

import { composes, h, icon } from "./dom.js";
import { LIMITS, answerProblems, oneLine } from "./rules.js";

/** A form for a node's answer. `save` gets {fragments, choices}, checked; `close` is called when nothing is to change. */
export function correctionForm(node, { save, close }) {
  const fragments = [...node.fragments, ...(node.fragments.length ? [] : [""])];
  const choices = Array.from({ length: LIMITS.choices }, (_, i) => node.choices[i] ?? { text: "", confidence: [0.5, 0.3, 0.1][i], target: "" });

  const field = (place, label, value, problem, attributes = {}) =>
    h("input", { type: "text", name: place, value, "aria-label": label, autocomplete: "off", dir: "auto", "aria-describedby": problem, ...attributes });
  const problemLine = (id) => h("p", { class: "problem", id, hidden: true });

  const texts = h("div", {});
  const add = h("button", { class: "plain", type: "button", on: { click: () => addFragment("", true) } }, icon("plus"), "Add a fragment");

  function addFragment(value, focus = false) {
    const input = field("", "", value, "", { maxlength: LIMITS.fragment });
    const remove = h("button", { class: "plain", type: "button", on: { click: () => removeFragment(row) } }, icon("remove"));
    const row = h("div", { class: "row" }, input, remove, problemLine(""));
    texts.append(row);
    number();
    if (focus) input.focus();
  }

  function removeFragment(row) {
    const next = row.nextElementSibling ?? row.previousElementSibling;
    row.remove();
    number();
    next.querySelector("input").focus();
  }

  /** Names the fragments by their place, after one came or went. */
  function number() {
    [...texts.children].forEach((row, i) => {
      const [input, remove, problem] = row.children;
      input.name = `fragments ${i}`;
      problem.id = `problem-fragment-${i}`;
      input.setAttribute("aria-describedby", problem.id);
      input.setAttribute("aria-label", `Fragment ${i + 1}`);
      remove.setAttribute("aria-label", `Remove fragment ${i + 1}`);
      remove.disabled = texts.childElementCount === 1;
    });
    add.hidden = texts.childElementCount >= LIMITS.fragments;
  }

  const choiceRow = ({ text, confidence, target }, i) => {
    const problem = `problem-choice-${i}`;
    return h(
      "div",
      { class: "row choice-row" },
      field(`text ${i}`, `Follow-up ${i + 1}`, text, problem, { maxlength: LIMITS.question_follow_up }),
      field(`confidence ${i}`, `Confidence ${i + 1}`, String(confidence), problem, { inputmode: "decimal" }),
      h("div", { class: "target-cell" }, field(`target ${i}`, `Target ${i + 1}`, target, problem, { class: "target", maxlength: LIMITS.name, spellcheck: "false" })),
      problemLine(problem),
    );
  };

  function read() {
    const value = (name) => oneLine(form.elements.namedItem(name).value);
    return {
      fragments: [...texts.querySelectorAll("input")].map((input) => oneLine(input.value)),
      choices: choices.map((_, i) => ({ text: value(`text ${i}`), confidence: parseNumber(value(`confidence ${i}`)), target: value(`target ${i}`) })),
    };
  }

  function submit(event) {
    event?.preventDefault();
    const answer = read();
    const problems = answerProblems(answer);
    show(form, problems);
    if (!problems.length) save(answer);
  }

  const form = h(
    "form",
    {
      class: "correction",
      novalidate: true,
      on: {
        submit,
        keydown: (event) => {
          if (composes(event)) return;
          if (event.key === "Escape") close();
          else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) submit(event);
          else return;
          event.stopPropagation();
        },
      },
    },
    h("fieldset", {}, h("legend", {}, "Answer, the most telling first"), texts, add),
    h(
      "fieldset",
      {},
      h("legend", {}, "Follow-ups, the likeliest first"),
      h("div", { class: "heads", "aria-hidden": "true" }, h("span", {}, "Question"), h("span", {}, "Confidence"), h("span", {}, "Target")),
      ...choices.map(choiceRow),
    ),
    h(
      "div",
      { class: "foot" },
      h("button", { class: "solid", type: "submit" }, "Save"),
      h("button", { class: "outline", type: "button", on: { click: close } }, "Cancel"),
    ),
  );
  fragments.forEach((text) => addFragment(text));
  return form;
}

/** A number as people write it: 0.5, ",5" or 50 %. */
function parseNumber(text) {
  const percent = text.match(/^([\d.,]+) ?%$/);
  const number = Number((percent?.[1] ?? text).replace(",", ".") || NaN);
  return Math.round((percent ? number / 100 : number) * 100) / 100;
}

/** Shows each problem under its row and goes to the first. */
function show(form, problems) {
  for (const row of form.querySelectorAll(".row")) row.querySelector(".problem").replaceChildren();
  for (const input of form.querySelectorAll("input")) input.removeAttribute("aria-invalid");
  for (const { place, problem } of problems) {
    const input = form.elements.namedItem(place) ?? form.querySelector("input");
    input.setAttribute("aria-invalid", "true");
    const line = input.closest(".row").querySelector(".problem");
    line.hidden = false;
    line.append(h("span", {}, `${input.getAttribute("aria-label")} ${problem}. `));
  }
  for (const line of form.querySelectorAll(".problem")) line.hidden = !line.childElementCount;
  const first = form.querySelector("[aria-invalid]");
  first?.focus();
  first?.closest(".row").scrollIntoView({ block: "nearest" });
}
