// The card of a token: how probable it was and what else the model considered. A click on another token branches there.

import { decoded, h, percent } from "./dom.js";
import { visible } from "./tokens.js";

const LEAVING = 250; // milliseconds in which the pointer may move from a token to its card

export class Lens {
  #timer = 0;
  #token = null; // the element whose card is shown

  /**
   * @param element the card.
   * @param branch is called with the view of an answer, the index of a token, and what is to be there instead.
   * @param looked is called with the view and the index of the token whose card is shown, or -1.
   */
  constructor(element, branch, looked) {
    Object.assign(this, { element, branch, looked });
    element.addEventListener("pointerenter", () => clearTimeout(this.#timer));
    element.addEventListener("pointerleave", () => this.#leave());
    element.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** Shows the cards of the tokens in the element of an answer. */
  watch(view, element) {
    const tokenOf = (event) => event.target.closest(".t");
    element.addEventListener("pointerover", (event) => {
      const token = tokenOf(event);
      if (token) this.show(view, token);
    });
    element.addEventListener("pointerout", (event) => tokenOf(event) && this.#leave());
    element.addEventListener("click", (event) => {
      const token = tokenOf(event);
      if (!token || event.target.closest("a")) return;
      this.show(view, token);
      if (event.detail === 0) this.#buttons()[0]?.focus(); // by the keyboard
    });
    element.addEventListener("focusin", (event) => tokenOf(event) && this.show(view, tokenOf(event)));
    element.addEventListener("keydown", (event) => {
      const token = tokenOf(event);
      if (token) this.#onTokenKey(event, token);
    });
  }

  get open() {
    return !this.element.hidden;
  }

  show(view, element) {
    clearTimeout(this.#timer);
    if (element === this.#token && this.open) return;
    const index = Number(element.dataset.index);
    this.#mark(element);
    this.element.replaceChildren(...this.#content(view, index));
    this.element.hidden = false;
    place(this.element, element.getClientRects()[0] ?? element.getBoundingClientRect());
    this.view = view;
    this.looked(view, index);
  }

  hide() {
    if (!this.open) return;
    if (this.element.contains(document.activeElement)) this.#token.focus();
    this.element.hidden = true;
    this.#mark(null);
    this.looked(this.view, -1);
  }

  #mark(element) {
    this.#token?.classList.remove("looked-at");
    element?.classList.add("looked-at");
    this.#token = element;
  }

  #leave() {
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => {
      if (!this.element.contains(document.activeElement) && this.#token !== document.activeElement) this.hide();
    }, LEAVING);
  }

  #buttons() {
    return [...this.element.querySelectorAll("button")];
  }

  #content(view, index) {
    const token = view.node.tokens[index];
    const others = token.best.filter((other) => other.id !== token.id);
    const all = [token, ...others].sort((a, b) => b.logprob - a.logprob);
    const rest = 1 - all.reduce((sum, one) => sum + Math.exp(one.logprob), 0);
    const rows = all.map((one) => {
      const p = Math.exp(one.logprob);
      const bar = h("span", { class: "bar" });
      bar.style.setProperty("--share", p);
      const text = view.facts.ends.has(one.id) ? "end of the answer" : visible(decoded(one));
      const parts = [h("code", {}, text), bar, h("span", {}, percent(p))];
      if (one === token) return h("div", { class: "choice chosen", "aria-current": "true" }, ...parts);
      const take = () => {
        this.hide();
        this.branch(view, index, one);
      };
      return h("button", { class: "choice", type: "button", onclick: take, title: "Go on from here instead" }, ...parts);
    });
    const remainder = [h("span", {}, "all others"), h("span"), h("span", {}, percent(rest))];
    if (rest > 1e-4) rows.push(h("div", { class: "choice note" }, ...remainder));
    return [...rows, h("p", { class: "note" }, "Choose one to go on from there")];
  }

  #onKey(event) {
    const buttons = this.#buttons();
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      event.preventDefault();
      buttons.at((buttons.indexOf(document.activeElement) + step + buttons.length) % buttons.length)?.focus();
    }
  }

  #onTokenKey(event, token) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const all = [...token.parentElement.querySelectorAll(".t")];
    const target = step ? all[all.indexOf(token) + step] : { Home: all[0], End: all.at(-1) }[event.key];
    if (target) {
      token.tabIndex = -1;
      target.tabIndex = 0;
      target.focus();
    } else if (["ArrowDown", "Enter", " "].includes(event.key)) this.#buttons()[0]?.focus();
    else return;
    event.preventDefault();
  }
}

/** Puts a card under a token, or above it if there is more room. */
function place(card, { left, top, bottom }) {
  const { offsetWidth: width, offsetHeight: height } = card;
  const below = bottom + 6 + height <= innerHeight || bottom < innerHeight - top;
  card.style.left = `${Math.max(8, Math.min(left - 12, innerWidth - width - 8))}px`;
  card.style.top = `${Math.max(8, below ? bottom + 6 : top - 6 - height)}px`;
}
