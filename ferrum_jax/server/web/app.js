// The page: puts the views of a conversation on the screen and does what the reader asks.

import { ask } from "./api.js";
import { Conversation, answer, question, result } from "./conversation.js";
import { decoded, h } from "./dom.js";
import { generate } from "./generate.js";
import { Lens } from "./lens.js";
import { connect, keep, settings } from "./settings.js";
import { AnswerView, QuestionView, ResultView } from "./views.js";

const find = (id) => document.getElementById(id);
const [log, form, input, send, dialog, theme] = ["log", "composer", "input", "send", "settings", "theme"].map(find);

let conversation = new Conversation();
const views = new WeakMap(); // by node
let running = null; // {node, abort} of the answer that is being made
// Of the server: the ids of tokens that end an answer, whether the model has experts, and how long a text can be.
const facts = { ends: new Set(), mixture: false, context: Infinity };

const lens = new Lens(find("lens"), branch, (view, index) => view.experts?.show(index));

// What the reader asks

const actions = {
  again: (node) => begin(() => node.parent),
  color() {
    settings.colors = !settings.colors;
    keep();
    show();
  },
  colored: () => settings.colors,
  edit: (node, content) => begin(() => conversation.add(node.parent, question(content))),
  goOn(node) {
    viewOf(node).experts = null;
    start(node);
  },
  results: (node) =>
    begin(() => node.calls.reduce((last, call) => conversation.add(last, result(call, call.result ?? "")), node)),
  show(node) {
    if (running) return;
    node.parent.shown = node.parent.children.indexOf(node);
    show();
  },
};

/** A new answer after the node that `parent` finds or makes, unless one is being made. */
function begin(parent) {
  if (!running) start(conversation.add(parent(), answer()));
}

/** A sibling of an answer that has another token at `index`, and goes on from there. */
function branch({ node }, index, token) {
  if (running) return;
  const kept = node.tokens.slice(0, index);
  if (facts.ends.has(token.id)) return endAt(node, kept);
  const old = node.tokens[index];
  const best = [old, ...old.best.filter((other) => other.id !== old.id)];
  start(conversation.add(node.parent, answer([...kept, { ...token, text: decoded(token), best }])));
}

/** A sibling of an answer that ends after the tokens that are kept. */
function endAt(node, kept) {
  const cut = node.tokens.slice(kept.length).filter((token) => !facts.ends.has(token.id));
  const content = node.content.slice(0, -cut.reduce((length, token) => length + token.text.length, 0) || undefined);
  const { reasoning, promptIds } = node;
  conversation.add(node.parent, { ...answer(kept), state: "done", content, reasoning, promptIds });
  show();
}

async function start(node) {
  if (running) return;
  const abort = new AbortController();
  running = { node, abort };
  show();
  scrollTo(0, document.documentElement.scrollHeight);
  let planned = 0;
  const draw = () => {
    planned = 0;
    keepingTheEnd(() => viewOf(node).update());
  };
  await generate(node, abort.signal, () => (planned ||= requestAnimationFrame(draw)));
  cancelAnimationFrame(planned);
  running = null;
  keepingTheEnd(show);
  if (node.status === 401) openSettings("key");
}

// What is shown

function viewOf(node) {
  if (!views.has(node)) {
    const view =
      node.role === "user" ? new QuestionView(node, actions)
      : node.role === "tool" ? new ResultView(node)
      : new AnswerView(node, actions, lens, facts);
    views.set(node, view);
  }
  return views.get(node);
}

function show() {
  lens.hide();
  const path = conversation.path();
  for (const node of path) viewOf(node).update();
  log.replaceChildren(...path.map((node) => viewOf(node).element));
  log.classList.toggle("colored", settings.colors);
  document.body.classList.toggle("empty", !path.length);
  document.body.classList.toggle("running", running !== null);
  send.setAttribute("aria-label", running ? "Stop" : "Send");
  send.title = running ? "Stop (Esc)" : "Send (Enter)";
  fit();
}

/** Does `work` and scrolls to the end if the reader was there. */
function keepingTheEnd(work) {
  const page = document.documentElement;
  const atEnd = page.scrollHeight - innerHeight - scrollY < 80;
  work();
  if (atEnd) scrollTo(0, page.scrollHeight);
}

/** The field for a message is as high as its text. */
function fit() {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight}px`;
  send.disabled = !running && !input.value.trim();
}

// Events

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) return running.abort.abort();
  const content = input.value.trim();
  if (!content) return;
  input.value = "";
  begin(() => conversation.add(conversation.last, question(content)));
});

input.addEventListener("input", fit);
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) form.requestSubmit();
});

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || dialog.open) return;
  if (lens.open) lens.hide();
  else running?.abort.abort();
});
addEventListener("scroll", () => lens.hide(), { passive: true });
addEventListener("pointerdown", (event) => event.target.closest(".t, #lens") || lens.hide());

find("new").addEventListener("click", () => {
  running?.abort.abort();
  conversation = new Conversation();
  show();
  input.focus();
});

find("open-settings").addEventListener("click", () => openSettings());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());

function openSettings(field) {
  if (!dialog.open) dialog.showModal();
  if (field) dialog.querySelector(`[name=${field}]`).focus();
}

const THEMES = { "": "as the system", light: "light", dark: "dark" };

theme.addEventListener("click", () => {
  const names = Object.keys(THEMES);
  settings.theme = names[(names.indexOf(settings.theme) + 1) % names.length];
  keep();
  paint();
  show();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);

function paint() {
  document.documentElement.dataset.theme = settings.theme;
  theme.title = `Colors: ${THEMES[settings.theme] ?? THEMES[""]}`;
  theme.setAttribute("aria-label", theme.title);
}

// The server

async function learn() {
  try {
    const json = async (path) => (await ask(path, { key: settings.key })).json();
    const [props, models] = await Promise.all(["props", "v1/models"].map(json));
    Object.assign(facts, { ends: new Set(props.end_token_ids), mixture: props.num_experts > 0, context: props.n_ctx });
    find("thinking").hidden = !props.chat_template?.includes("enable_thinking");
    const names = models.data.map((model) => model.id);
    const select = dialog.querySelector("[name=model]");
    select.replaceChildren(...names.map((name) => h("option", {}, name)));
    if (!names.includes(settings.model)) settings.model = names[0];
    select.value = settings.model;
    find("model").textContent = settings.model;
    document.title = settings.model;
  } catch (error) {
    find("model").textContent = error.message;
    if (error.status === 401) openSettings("key");
  }
}

connect(dialog.querySelector("form"), (name) => {
  if (name === "key") learn();
  if (name === "model") find("model").textContent = settings.model;
});
paint();
show();
learn();
