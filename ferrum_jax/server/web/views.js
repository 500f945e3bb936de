// How the nodes of a conversation are shown. A view belongs to one node, and `update` brings it up to date.

import { copyButton, h, icon, iconButton } from "./dom.js";
import { Experts } from "./experts.js";
import { Markdown } from "./markdown.js";
import { Source, tokenElement } from "./tokens.js";

/** The arrows between the siblings of a node, or nothing if it has none. */
function branches(node, actions) {
  const { children } = node.parent;
  if (children.length < 2) return [];
  const at = children.indexOf(node);
  const step = (name, label, to) =>
    iconButton(name, label, () => actions.show(children[to]), { disabled: !children[to] });
  return [
    h("span", { class: "branches", role: "group", "aria-label": "Branches" },
      step("left", "Earlier branch", at - 1), h("span", {}, `${at + 1}/${children.length}`),
      step("right", "Later branch", at + 1)),
  ];
}

export class QuestionView {
  constructor(node, actions) {
    Object.assign(this, { node, actions, element: h("article", { class: "question", "aria-label": "You" }) });
  }

  update() {
    const { node, actions } = this;
    this.element.replaceChildren(
      h("div", { class: "bubble" }, node.content),
      h("div", { class: "actions" }, ...branches(node, actions), iconButton("edit", "Edit", () => this.#edit())),
    );
  }

  #edit() {
    const field = h("textarea", { "aria-label": "Your message", rows: 3 });
    field.value = this.node.content;
    const done = () => field.value.trim() && this.actions.edit(this.node, field.value);
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.update();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) done();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    this.element.replaceChildren(
      field,
      h("div", { class: "buttons" },
        h("button", { type: "button", onclick: () => this.update() }, "Cancel"),
        h("button", { type: "button", class: "primary", onclick: done }, "Send")),
    );
    field.focus();
  }
}

/** The result of a tool call. */
export class ResultView {
  constructor(node) {
    Object.assign(this, { node, element: h("article", { class: "result", "aria-label": `Result of ${node.call.name}` }) });
  }

  update() {
    const { call, content } = this.node;
    this.element.replaceChildren(h("span", { class: "label" }, `Result of ${call.name}`), h("pre", {}, content));
  }
}

export class AnswerView {
  /** `facts`: see app.js. */
  constructor(node, actions, lens, facts) {
    Object.assign(this, { node, actions, facts, raw: false, experts: null });
    this.thinking = new Markdown(h("div", { class: "markdown" }));
    this.thought = h("details", { class: "thinking", hidden: true }, h("summary", {}, "Thinking"), this.thinking.element);
    this.body = new Markdown(h("div", { class: "markdown" }));
    this.rendered = h("div", {}, this.thought, this.body.element);
    this.tokens = h("div", { class: "tokens", role: "group", "aria-label": "Tokens; arrow keys move", hidden: true });
    this.calls = h("div", { class: "calls" });
    this.footer = h("div", {});
    const parts = [this.rendered, this.tokens, this.calls, this.footer];
    this.element = h("article", { class: "answer", "aria-label": "Answer" }, ...parts);
    for (const element of [this.rendered, this.tokens]) lens.watch(this, element);
  }

  update() {
    const { node } = this;
    const running = node.state === "running";
    this.element.setAttribute("aria-busy", running);
    this.element.classList.toggle("waiting", running && !node.content && !node.reasoning && !node.calls.length);
    const drawn = [node.state, node.reasoning.length, node.content.length].join();
    if (drawn !== this.drawn) this.#draw(running);
    this.drawn = drawn;
    this.rendered.hidden = this.raw;
    this.tokens.hidden = !this.raw;
    if (this.raw) this.#showTokens();
    this.calls.replaceChildren(...node.calls.map((call) => this.#call(call)));
    this.footer.replaceChildren(...(running ? [] : this.#footer()));
    this.experts?.show(-1);
  }

  #draw(running) {
    const { reasoning, content, tokens } = this.node;
    this.thought.hidden = !reasoning;
    this.thought.firstChild.textContent = running && !content ? "Thinking …" : "Thoughts";
    this.thinking.show(reasoning, !running);
    this.body.show(content, !running);
    if (running) return;
    const source = new Source(tokens);
    source.mark(this.thinking.element);
    source.mark(this.body.element);
  }

  #showTokens() {
    const { tokens } = this.node;
    for (let i = this.tokens.childElementCount; i < tokens.length; i++) this.tokens.append(tokenElement(tokens[i], i));
  }

  #call(call) {
    let given = call.arguments;
    try {
      given = JSON.stringify(JSON.parse(given), null, 2);
    } catch {
      // not complete yet
    }
    const element = h("section", { class: "call", "aria-label": `Call of ${call.name}` },
      h("div", { class: "label" }, icon("tool"), call.name), h("pre", {}, given));
    if (this.node.state === "running" || this.node.children.length) return element;
    const field = h("textarea", { rows: 1, placeholder: "Result of the call", "aria-label": `Result of ${call.name}` });
    field.value = call.result ?? "";
    field.addEventListener("input", () => (call.result = field.value));
    element.append(field);
    if (call === this.node.calls.at(-1)) {
      const properties = { type: "button", class: "primary", onclick: () => this.actions.results(this.node) };
      element.append(h("div", { class: "buttons" }, h("button", properties, "Send results")));
    }
    return element;
  }

  #footer() {
    const { node, actions } = this;
    const found = [];
    if (node.error) found.push(h("p", { class: "error", role: "alert" }, node.error));
    const buttons = [...branches(node, actions), iconButton("again", "Answer again", () => actions.again(node))];
    const toggle = (name, label, on, click) => iconButton(name, label, click, { "aria-pressed": on ? "true" : "false" });
    if (node.content) buttons.push(copyButton("Copy the answer", () => node.content));
    if (node.tokens.length) {
      buttons.push(
        toggle("tokens", "Tokens", this.raw, () => this.#toggle("raw")),
        toggle("colors", "Color by probability", actions.colored(), actions.color),
      );
      if (this.facts.mixture) buttons.push(toggle("experts", "Experts", this.experts, () => this.#toggleExperts()));
      const cut = node.state === "stopped" || node.state === "failed" || node.reason === "length";
      if (cut) buttons.push(h("button", { type: "button", class: "small", onclick: () => actions.goOn(node) }, "Go on"));
    }
    found.push(h("div", { class: "actions" }, ...buttons, h("span", { class: "note" }, ...this.#facts())));
    if (this.experts) found.push(this.experts.element);
    return found;
  }

  #facts() {
    const { usage, timings, state, reason } = this.node;
    const found = [];
    if (usage) found.push(`${usage.completion_tokens} tokens`);
    if (timings?.predicted_per_second) found.push(`${timings.predicted_per_second.toFixed(1)} tokens/s`);
    if (usage?.prompt_tokens_details?.cached_tokens) {
      found.push(`${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} prompt tokens cached`);
    }
    if (state === "stopped") found.push("stopped");
    if (reason === "length") found.push("cut at the limit");
    return [found.join(" · ")];
  }

  #toggle(name) {
    this[name] = !this[name];
    this.update();
    this.footer.querySelector(`[aria-label=Tokens]`)?.focus();
  }

  #toggleExperts() {
    this.experts = this.experts ? null : new Experts(this.node, this.facts.context - 1);
    this.update();
    this.footer.querySelector(`[aria-label=Experts]`)?.focus();
    this.experts?.load();
  }
}
