// Markdown of a model, made safe: HTML in it is shown as text, pictures become links, and what is left goes through DOMPurify.
// A text that grows is rendered block by block, and blocks that have not changed keep their elements.

import { copyButton, h } from "./dom.js";
import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const escaped = (text) => text.replace(/[&<>"']/g, (letter) => `&#${letter.charCodeAt(0)};`);

const marked = new Marked({
  breaks: true,
  gfm: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

const ALLOWED = {
  ALLOWED_TAGS: [
    "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong",
    "table", "tbody", "td", "th", "thead", "tr", "ul",
  ],
  ALLOWED_ATTR: ["align", "class", "href", "start", "title"],
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName !== "A") return;
  element.setAttribute("target", "_blank");
  element.setAttribute("rel", "noopener noreferrer nofollow");
});

/** Shows a Markdown text in an element. */
export class Markdown {
  #sources = [];

  constructor(element) {
    this.element = element;
  }

  /** Shows `text`; with `afresh` all of it, because a later line may define a link of an earlier one. */
  show(text, afresh = false) {
    const blocks = marked.lexer(text).filter((block) => block.type !== "space");
    blocks.forEach((block, i) => {
      if (this.#sources[i] === block.raw && !afresh) return;
      const made = h("div", { class: "block" }, DOMPurify.sanitize(marked.parser([block]), ALLOWED));
      for (const code of made.querySelectorAll("pre > code")) frame(code);
      if (this.element.children[i]) this.element.children[i].replaceWith(made);
      else this.element.append(made);
    });
    while (this.element.children.length > blocks.length) this.element.lastChild.remove();
    this.#sources = blocks.map((block) => block.raw);
  }
}

/** Gives a block of code a line with its language and a button that copies it. */
function frame(code) {
  const language = /^language-([\w+#.-]{1,30})$/.exec(code.className)?.[1] ?? "";
  const copy = copyButton("Copy the code", () => code.textContent);
  code.parentElement.before(h("div", { class: "code-head" }, h("span", {}, language), copy));
}
