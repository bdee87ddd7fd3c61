// Elements are built, never parsed: strings from the data become text nodes.

function make(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, String(value));
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

const SIGNS = new Map([["same", "="], ["changed", "~"], ["removed", "\u2212"], ["added", "+"]]);

const arrows = (text) => text.replaceAll(" -> ", " \u2192 ");

// A sign to see and a word to hear.
function sign(state) {
  return [
    make("span", { class: "sign", "aria-hidden": "true" }, SIGNS.get(state) || "?"),
    make("span", { class: "unseen" }, `${state}: `),
  ];
}
