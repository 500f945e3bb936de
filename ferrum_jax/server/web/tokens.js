// Which token a piece of shown text comes from.
//
// In the view of tokens every token is an element. Rendered Markdown has lost the marks of the source, so its words are looked
// up in the source one after the other; a word that is not found there (such as an entity) stays without a token.

import { h, percent } from "./dom.js";

const FAR = 4000; // letters of source that may lie between two words that are shown

/** The sources of the tokens of an answer, one after the other. */
export class Source {
  constructor(tokens) {
    this.text = "";
    this.ends = tokens.map((token) => (this.text += token.text).length);
    this.tokens = tokens;
    this.at = 0; // where the words that were not looked up begin
  }

  /** The index of the token that has the letter at `offset`. */
  tokenAt(offset) {
    let low = 0;
    let high = this.ends.length - 1;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.ends[middle] > offset) high = middle;
      else low = middle + 1;
    }
    return low;
  }

  /** Wraps the words in an element, in their order, in elements with the index of their token. */
  mark(element) {
    const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
    const nodes = [];
    while (walker.nextNode()) nodes.push(walker.currentNode);
    for (const node of nodes) {
      if (/^\s*\n\s*$/.test(node.data) || node.parentElement.closest(".code-head")) continue; // between elements, or ours
      const pieces = [...node.data.matchAll(/\s+|\S+/g)].flatMap(([word]) => this.#find(word));
      node.replaceWith(...joined(pieces).map((piece) => this.#element(piece)));
    }
  }

  #find(word) {
    if (!word.trim()) return [{ text: word, index: /\s/.test(this.text[this.at] ?? "") ? this.tokenAt(this.at) : null }];
    let at = this.text.indexOf(word, this.at);
    const inWord = (i) => i > this.at && /\w\w/.test(this.text.slice(i - 1, i + 1));
    while (at >= 0 && inWord(at)) at = this.text.indexOf(word, at + 1);
    if (at < 0 || at > this.at + FAR) return [{ text: word, index: null }];
    this.at = at + word.length;
    const pieces = [];
    for (let i = 0; i < word.length; ) {
      const index = this.tokenAt(at + i);
      const end = Math.min(word.length, this.ends[index] - at);
      pieces.push({ text: word.slice(i, end), index });
      i = end;
    }
    return pieces;
  }

  #element({ text, index }) {
    if (index === null) return document.createTextNode(text);
    const element = h("span", { class: "t", "data-index": index }, text);
    tint(element, this.tokens[index]);
    return element;
  }
}

/** Neighbors of the same token as one piece. */
function joined(pieces) {
  const found = [];
  for (const piece of pieces) {
    if (found.length && found.at(-1).index === piece.index) found.at(-1).text += piece.text;
    else found.push({ ...piece });
  }
  return found;
}

/** The element of a token in the view of tokens. Arrow keys reach it. */
export function tokenElement(token, index) {
  const p = percent(Math.exp(token.logprob));
  const label = `${visible(token.text)}, ${p}`;
  const element = h("span", { class: "t", "data-index": index, role: "button", tabindex: index ? -1 : 0, "aria-label": label });
  if (/^\n+$/.test(token.text)) element.append(h("i", {}, "↵".repeat(token.text.length)), token.text);
  else element.append(token.text || h("i", {}, "·"));
  tint(element, token);
  return element;
}

/** How little a token was expected, from 0 to 1, for its color: 1 is a probability below one in a thousand. */
function tint(element, token) {
  element.style.setProperty("--surprise", Math.min(1, -token.logprob / Math.log(1000)).toFixed(3));
}

/** A token's text with signs for what cannot be seen. */
export function visible(text) {
  return text.replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "·";
}
