// Making elements.

/** An element. Properties that begin with "on" are listeners, others attributes; null and false leave them out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false && value !== undefined) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A picture of index.html. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

/** A button with a picture; `label` is its name and its tooltip. */
export function iconButton(name, label, onclick, properties = {}) {
  return h("button", { type: "button", class: "quiet", "aria-label": label, title: label, onclick, ...properties }, icon(name));
}

/** A button that copies a text, or nothing where the browser does not let a page do that. */
export function copyButton(label, text) {
  if (!navigator.clipboard) return null;
  const button = iconButton("copy", label, async () => {
    await navigator.clipboard.writeText(text());
    button.replaceChildren(icon("check"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

/** The text of a token alone. */
export const decoded = (token) => new TextDecoder().decode(Uint8Array.from(token.bytes));

/** A probability in words. */
export function percent(p) {
  if (p < 1e-4) return "< 0.01 %";
  return `${p < 0.0995 ? (100 * p).toPrecision(2) : (100 * p).toFixed(1)} %`;
}
