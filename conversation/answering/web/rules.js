// What the text format allows in a question and in an answer; the same rules as in data/conversation_tree.schema.json.

export const LIMITS = { question_root: 60, question_follow_up: 40, fragment: 80, fragments: 4, choices: 3, name: 60 };

const NAME = /^[a-z0-9]+(?:_[a-z0-9]+)*$/;
const LINE_BREAK = /[\n-\r\u0085\u2028\u2029]/;
const CONTROL_CHARACTER = /[\u0000-\u001f\u007f-\u009f]/;
const CONTROL_TOKEN = new RegExp(
  "<(?:start_of_turn|end_of_turn|(?:start|end)_function_(?:declaration|call|response)|escape|bos|eos|pad|unk|mask)>",
);

/** A text on one line: white space runs become one space. */
export const oneLine = (text) => text.replace(/[\s\u0000-\u001f\u007f-\u009f]+/g, " ").trim();

/** Characters as Python counts them: an emoji is one. */
export const lengthOf = (text) => [...text].length;

export const isName = (name) => typeof name === "string" && NAME.test(name) && name.length <= LIMITS.name;

/** Why a text cannot stand in a tree, as the end of a sentence about it; null if it can. */
export function textProblem(text, limit) {
  if (typeof text !== "string" || !text.trim()) return "is empty";
  if (lengthOf(text) > limit) return `has ${lengthOf(text)} characters, ${limit} fit`;
  if (LINE_BREAK.test(text)) return "is more than one line";
  if (CONTROL_CHARACTER.test(text)) return "holds a character that cannot be seen";
  if (text !== text.trim()) return "begins or ends with a space";
  const token = text.match(CONTROL_TOKEN);
  return token ? `holds the control token ${token[0]}` : null;
}

function confidenceProblem(confidence) {
  if (typeof confidence !== "number" || !Number.isFinite(confidence)) return "is not a number";
  return confidence >= 0 && confidence <= 1 ? null : "is not between 0 and 1";
}

/** Everything that keeps an answer from being whole: [{place, problem}], places as in the form: "fragments 0". */
export function answerProblems({ fragments, choices }) {
  const found = [];
  const check = (place, problem) => problem && found.push({ place, problem });
  if (!fragments.length) check("fragments 0", "is missing");
  if (fragments.length > LIMITS.fragments) check(`fragments ${LIMITS.fragments}`, "is one too many");
  fragments.forEach((text, i) => check(`fragments ${i}`, textProblem(text, LIMITS.fragment)));
  if (choices.length !== LIMITS.choices) check("choices 0", `is one of ${choices.length}, there must be ${LIMITS.choices}`);
  choices.forEach(({ text, confidence, target }, i) => {
    check(`text ${i}`, textProblem(text, LIMITS.question_follow_up));
    check(`confidence ${i}`, confidenceProblem(confidence));
    check(`target ${i}`, isName(target) ? null : "is not lower case words joined by _");
  });
  const texts = choices.map((choice) => choice.text.toLowerCase());
  texts.forEach((text, i) => check(`text ${i}`, text && texts.indexOf(text) < i ? "is there already" : null));
  return found;
}
