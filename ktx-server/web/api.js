// The server: requests with the key, streams, and errors with what to do about them.

const KEY = "ktx.key";

/** An answer that is none. `advice` says what the user can do. */
class ServerError extends Error {
  constructor(message, advice, { status = 0, retryAfter = null } = {}) {
    super(message);
    this.advice = advice;
    this.status = status;
    this.retryAfter = retryAfter;
  }
}

/** The key: for this tab, or kept in the browser. */
export const key = {
  get: () => read(sessionStorage) ?? read(localStorage),
  isKept: () => read(localStorage) !== null,
  set(value, keep) {
    key.forget();
    try {
      (keep ? localStorage : sessionStorage).setItem(KEY, value);
    } catch {
      // A browser that keeps nothing asks again at the next visit.
      key.unkept = value;
    }
  },
  forget() {
    key.unkept = null;
    for (const storage of [sessionStorage, localStorage]) {
      try {
        storage.removeItem(KEY);
      } catch {
        // As above.
      }
    }
  },
  unkept: null,
};

function read(storage) {
  try {
    return storage.getItem(KEY);
  } catch {
    return key.unkept;
  }
}

/** Sends a request to a path relative to the page, so that a proxy may put a prefix before it. */
async function send(path, { body, signal } = {}) {
  const headers = {};
  const shown = key.get();
  if (shown) headers.Authorization = `Bearer ${shown}`;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers,
      body: body && JSON.stringify(body),
      signal,
      cache: "no-store",
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer.", "Check that `ktx serve` still runs and that you reach it, then try again.");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** What the server said instead of an answer. */
async function refusal(response) {
  let said = "";
  try {
    const body = await response.json();
    said = body.error?.message ?? body.error ?? "";
  } catch {
    // A proxy answers with pages of its own.
  }
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  return refused(response.status, said, retryAfter);
}

function refused(status, said, retryAfter) {
  const [message, advice] = {
    400: ["The server refused the request.", "Change what it names in the settings or in the message; a conversation that grew too long has to begin anew."],
    401: ["The server wants an API key.", "Enter the key in the settings."],
    404: ["The server does not know this address.", "Another program may listen there, or a proxy leaves this path out."],
    408: ["The request took too long.", "Try again."],
    413: ["The conversation is too large for the server.", "Begin a new one, or raise --max-body."],
    429: ["Too many requests wait.", retryAfter ? `Try again in ${retryAfter} s.` : "Try again in a moment."],
    500: ["The engine failed.", "The server's log says why."],
    503: ["The server shuts down.", "Try again when it is back."],
    504: ["The answer took too long.", "Ask for a shorter one, or raise --timeout."],
  }[status] ?? [`The server answered ${status}.`, "Try again; the server's log may say more."];
  return new ServerError(said ? `${message} ${capital(said)}` : message, advice, { status, retryAfter });
}

function capital(text) {
  const sentence = text.charAt(0).toUpperCase() + text.slice(1);
  return /[.!?]$/.test(sentence) ? sentence : `${sentence}.`;
}

/** A JSON document of the server. */
export async function getJson(path, signal) {
  return (await send(path, { signal })).json();
}

/** The pieces of an answer, as they come. */
export async function* streamChat(body, signal) {
  const response = await send("v1/chat/completions", { body, signal });
  const pieces = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let isFinished = false;
  try {
    for (;;) {
      const { done, value } = await pieces.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") {
          isFinished = true;
          continue;
        }
        const event = JSON.parse(data);
        if (event.error) throw refused(Number(event.error.code) || 500, event.error.message ?? "", null);
        yield event;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof ServerError) throw error;
    throw new ServerError("The connection broke.", "What came until then is kept; try again.");
  }
  if (!isFinished) throw new ServerError("The server ended the answer too early.", "What came until then is kept; try again.");
}
