// Elements from code. Text only ever becomes text nodes: no string is read as HTML anywhere on this page.

const SVG = "http://www.w3.org/2000/svg";

/** An element. `on` holds listeners, `style` custom properties, other attributes are set unless null, undefined or false. */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, { on = {}, style = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    element.setAttribute(name, value === true ? "" : value);
  }
  for (const [name, value] of Object.entries(style)) element.style.setProperty(name, value);
  for (const [name, listener] of Object.entries(on)) element.addEventListener(name, listener);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Whether a key belongs to an input method, which confirms or takes back what it composes by Enter and Escape. */
export const composes = (event) => event.isComposing || event.keyCode === 229;

export const byId = (id) => document.getElementById(id);

// Strokes on a grid of 16, drawn for this page.
const ICONS = {
  again: "M13 8a5 5 0 1 1-1.6-3.7M13 2v3h-3",
  edit: "M3 13l.7-2.9L10.8 3l2.2 2.2-7.1 7.1z",
  correct: "M2.5 4h11M2.5 8h5M2.5 12h4M9 11l2 2 3.5-4",
  good: "M3 8.5l3.2 3.2L13 4.8",
  bad: "M4 4l8 8M12 4l-8 8",
  star: "M8 2l1.8 3.8 4.2.5-3.1 2.9.8 4.1L8 11.3l-3.7 2 .8-4.1L2 6.3l4.2-.5z",
  remove: "M3 4.5h10M6.5 4V2.5h3V4M4.5 4.5l.6 9h5.8l.6-9M7 7v4M9 7v4",
  stop: "M4.5 4.5h7v7h-7z",
  menu: "M2.5 4h11M2.5 8h11M2.5 12h11",
  more: "M2.9 8a.4.4 0 1 0 .8 0 .4.4 0 0 0-.8 0zM7.6 8a.4.4 0 1 0 .8 0 .4.4 0 0 0-.8 0zM12.3 8a.4.4 0 1 0 .8 0 .4.4 0 0 0-.8 0z",
  map: "M4 4.8a1.6 1.6 0 1 0 0-3.2 1.6 1.6 0 0 0 0 3.2zm0 9.6a1.6 1.6 0 1 0 0-3.2 1.6 1.6 0 0 0 0 3.2zm8 0a1.6 1.6 0 1 0 0-3.2 1.6 1.6 0 0 0 0 3.2zM4 4.8v6.4M4 6c0 3.4 8 .6 8 5.2",
  search: "M7 12A5 5 0 1 0 7 2a5 5 0 0 0 0 10zM10.7 10.7L14 14",
  plus: "M8 3v10M3 8h10",
  close: "M4 4l8 8M12 4l-8 8",
  back: "M10 3L5 8l5 5",
  forward: "M6 3l5 5-5 5",
};

export function icon(name) {
  const drawing = svg("path", { d: ICONS[name] });
  return svg("svg", { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true", focusable: "false" }, drawing);
}
