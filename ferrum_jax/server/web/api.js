// What the page asks of the server. Addresses are relative, so the page also works where the application is mounted in another.

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** A response with a good status. Throws ServerError, or AbortError if `signal` was used. */
export async function ask(path, { body, key, signal } = {}) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  if (body) headers["content-type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.");
  }
  if (response.ok) return response;
  const found = await response.json().catch(() => null);
  throw new ServerError(found?.error?.message ?? `The server answered with status ${response.status}.`, response.status);
}

/** The JSON values of a stream of server-sent events, up to its end. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("The connection ended before the answer was complete.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (!line.startsWith("data: ")) continue;
      const found = JSON.parse(line.slice(6));
      if (found.error) throw new ServerError(found.error.message);
      yield found;
    }
  }
}
