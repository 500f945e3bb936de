// What the reader has chosen, kept in the browser. Names are those of the fields in the dialog of index.html.

const KEPT = "ferrum_jax";
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];
const DEFAULTS = {
  model: "", temperature: "", top_p: "", top_k: "", max_tokens: "", seed: "", system: "", tools: "", key: "", thinking: true,
  probabilities: true, colors: false, theme: "",
};

export const settings = { ...DEFAULTS, ...kept() };

function kept() {
  try {
    const found = JSON.parse(localStorage.getItem(KEPT)) ?? {};
    return Object.fromEntries(Object.entries(found).filter(([name, value]) => typeof value === typeof DEFAULTS[name]));
  } catch {
    return {}; // no storage, or not ours
  }
}

export function keep() {
  try {
    localStorage.setItem(KEPT, JSON.stringify(settings));
  } catch {
    // a private window without storage: the settings hold until it is closed
  }
}

/** The fields of a request that the settings decide. Throws SyntaxError for tools that are not JSON. */
export function bodyOf(chosen) {
  const body = {};
  if (chosen.model) body.model = chosen.model;
  for (const name of NUMBERS) if (chosen[name] !== "") body[name] = Number(chosen[name]);
  if (chosen.tools.trim()) body.tools = JSON.parse(chosen.tools);
  if (chosen.probabilities) Object.assign(body, { logprobs: true, top_logprobs: 8 });
  if (!chosen.thinking) body.chat_template_kwargs = { enable_thinking: false };
  return body;
}

/**
 * Connects the fields of the dialog with the settings.
 * @param changed is called after each change.
 */
export function connect(form, changed) {
  for (const field of form.elements) {
    if (!(field.name in settings)) continue;
    const property = field.type === "checkbox" ? "checked" : "value";
    field[property] = settings[field.name];
    field.addEventListener(field.type === "password" ? "change" : "input", () => {
      field.setCustomValidity(field.name === "tools" ? wrong(field.value) : "");
      if (!field.reportValidity()) return;
      settings[field.name] = field[property];
      keep();
      changed(field.name);
    });
  }
}

function wrong(tools) {
  if (!tools.trim()) return "";
  try {
    return Array.isArray(JSON.parse(tools)) ? "" : "A list of tools, as OpenAI's API takes them";
  } catch (error) {
    return error.message;
  }
}
