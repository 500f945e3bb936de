// One answer as it arrives: the stream of /v1/chat/completions becomes the fields of a node.

import { ask, events } from "./api.js";
import { messagesBefore } from "./conversation.js";
import { bodyOf, settings } from "./settings.js";

const NAMED = "token_id:"; // how the server writes a token's id where OpenAI has its text

/**
 * Fills `node` until the answer has ended, calling `changed` after each piece. If it has tokens already, the answer begins with
 * them: the server gets their ids, not their text, so what comes after them is what the model would have written there.
 */
export async function generate(node, signal, changed) {
  const begun = node.tokens.map((token) => token.id);
  Object.assign(node, { state: "running", reason: null, error: "", usage: null, timings: null });
  const body = {
    ...bodyOf(settings), messages: messagesBefore(node, settings.system), stream: true,
    stream_options: { include_usage: true }, return_token_ids: true, return_tokens_as_token_ids: true,
  };
  if (begun.length) body.answer_token_ids = begun;
  const reader = new TokenReader(node.tokens);
  try {
    const response = await ask("v1/chat/completions", { body, key: settings.key, signal });
    Object.assign(node, { content: "", reasoning: "", calls: [] });
    for await (const chunk of events(response)) {
      if (chunk.prompt_token_ids) node.promptIds = chunk.prompt_token_ids.slice(0, -begun.length || undefined);
      if (chunk.usage) Object.assign(node, { usage: chunk.usage, timings: chunk.timings });
      if (chunk.choices[0]) take(node, chunk.choices[0], reader);
      changed();
    }
    node.state = "done";
  } catch (error) {
    node.state = error.name === "AbortError" ? "stopped" : "failed";
    if (node.state === "failed") Object.assign(node, { error: error.message, status: error.status });
  }
}

function take(node, choice, reader) {
  const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta;
  node.content += content ?? "";
  node.reasoning += reasoning ?? "";
  for (const part of calls ?? []) {
    const call = (node.calls[part.index] ??= { id: "", name: "", arguments: "" });
    call.id ||= part.id ?? "";
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  for (const entry of choice.logprobs?.content ?? []) node.tokens.push(reader.read(entry));
  node.reason = choice.finish_reason ?? node.reason;
}

/** Turns log-probabilities into tokens. A character that several tokens make together is the text of its last one. */
class TokenReader {
  #decoder = new TextDecoder();

  constructor(before) {
    for (const token of before) this.#decode(token.bytes);
  }

  read(entry) {
    return { ...known(entry), text: this.#decode(entry.bytes), best: entry.top_logprobs.map(known) };
  }

  #decode(bytes) {
    return this.#decoder.decode(Uint8Array.from(bytes), { stream: true });
  }
}

const known = ({ token, bytes, logprob }) => ({ id: Number(token.slice(NAMED.length)), bytes, logprob });
