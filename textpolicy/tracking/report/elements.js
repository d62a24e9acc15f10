"use strict";

/** Returns an HTML element with attributes and children. A string child becomes a text node. */
function element(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** Returns an SVG element with attributes and children. */
function drawing(name, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const byId = (id) => document.getElementById(id);

/** Returns text as nodes, in which control and format characters are written as escapes. */
function visible(text) {
  const parts = text.split(/([^\P{C}\n\t])/gu);
  return parts.map((part, at) => (at % 2 ? element("span", { class: "code" }, escaped(part)) : part));
}

function escaped(character) {
  const code = character.codePointAt(0).toString(16);
  if (code.length <= 2) return "\\x" + code.padStart(2, "0");
  return code.length <= 4 ? "\\u" + code.padStart(4, "0") : "\\u{" + code + "}";
}

/** Returns a number with four significant digits. */
function short(number) {
  // JSON holds NaN and infinity as text.
  const value = Number(number);
  if (!Number.isFinite(value)) return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return (+value.toPrecision(3)).toExponential();
  return String(+value.toPrecision(size >= 1000 ? Math.ceil(Math.log10(size)) : 4));
}
