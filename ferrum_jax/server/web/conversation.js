// A conversation is a tree. Editing a message, asking again and going on from another token add a sibling, and nothing is lost:
// every node remembers which of its children is shown.

export class Conversation {
  root = { children: [], shown: 0 };

  /** A new node after `parent`, which is shown from now on. */
  add(parent, fields) {
    const node = { parent, children: [], shown: 0, ...fields };
    parent.shown = parent.children.push(node) - 1;
    return node;
  }

  /** The nodes that are shown, from the first to the last. */
  path() {
    const found = [];
    for (let node = this.root.children[this.root.shown]; node; node = node.children[node.shown]) found.push(node);
    return found;
  }

  get last() {
    return this.path().at(-1) ?? this.root;
  }
}

/** A message that a person has written. */
export const question = (content) => ({ role: "user", content });

/** The result of a tool call. */
export const result = (call, content) => ({ role: "tool", content, call });

/**
 * An answer. `tokens`: what the model has chosen, each {id, bytes, logprob, text, best}; `best` has the likeliest ones, as
 * {id, bytes, logprob}. `promptIds`: the tokens before it. `state`: "running", "done", "stopped" or "failed".
 */
export const answer = (tokens = []) => ({
  role: "assistant", content: "", reasoning: "", calls: [], tokens, promptIds: [], state: "running", reason: null, error: "",
  usage: null, timings: null,
});

/** The messages before a node, as the server takes them. */
export function messagesBefore(node, system) {
  const found = [];
  for (let at = node.parent; at?.role; at = at.parent) {
    const { role, content, call } = at;
    if (role === "user") found.unshift({ role, content });
    else if (role === "tool") found.unshift({ role, tool_call_id: call.id, name: call.name, content });
    else if (content || at.calls.length) found.unshift(written(at));
  }
  return system ? [{ role: "system", content: system }, ...found] : found;
}

function written(node) {
  const message = { role: "assistant", content: node.content };
  if (node.reasoning) message.reasoning_content = node.reasoning;
  if (node.calls.length) {
    message.tool_calls = node.calls.map(({ id, name, arguments: given }) => ({
      id, type: "function", function: { name, arguments: given },
    }));
  }
  return message;
}
