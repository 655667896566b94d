// One answer while it is made: the request, its pieces, and its counts.

import { streamChat } from "./api.js";
import { requestFields } from "./settings.js";
import { history } from "./store.js";

/** Milliseconds of tokens that a rate can be told of: what comes at once came through a buffer. */
const SHORTEST = 5;
/** Milliseconds in which a page is gone after it was told that it would be. */
const LEAVING = 3000;

/** An answer that comes into a node of a conversation. `onchange` is called after every piece. */
export class Answer {
  constructor(conversation, node, onchange) {
    this.conversation = conversation;
    this.node = node;
    this.onchange = onchange;
    this.controller = new AbortController();
    this.pieces = 0;
    this.begun = 0;
    this.first = null;
    this.last = null;
    this.usage = null;
    this.isLeft = false;
  }

  stop() {
    this.controller.abort();
  }

  /** The page is being left, unless the browser stays after all: then a broken connection is what it seems. */
  leave() {
    this.isLeft = true;
    setTimeout(() => { this.isLeft = false; }, LEAVING);
  }

  /** Runs to the end. Failures are kept in the node, where the page shows them. */
  async run(model) {
    const { conversation, node } = this;
    const parent = conversation.nodes[node.parent];
    const body = {
      ...requestFields(),
      model,
      messages: history(conversation, parent),
      stream: true,
      stream_options: { include_usage: true },
    };
    this.begun = performance.now();
    try {
      for await (const event of streamChat(body, this.controller.signal)) this.take(event);
      node.state = "done";
    } catch (error) {
      const isStopped = error.name === "AbortError" || (this.isLeft && !error.status);
      node.state = isStopped ? "stopped" : "failed";
      if (node.state === "failed") node.error = { message: error.message, advice: error.advice ?? "Try again.", status: error.status ?? 0 };
    }
    this.endThought();
    node.stats = this.counts();
  }

  take(event) {
    const { node } = this;
    if (event.usage) this.usage = event.usage;
    const choice = event.choices?.[0];
    if (!choice) return;
    const { content, reasoning_content: reasoning, tool_calls: calls } = choice.delta ?? {};
    if (content || reasoning) {
      this.last = performance.now();
      this.first ??= this.last;
      this.pieces += 1;
    }
    if (reasoning) node.reasoning = (node.reasoning ?? "") + reasoning;
    if (content) {
      this.endThought();
      node.content += content;
    }
    if (calls) node.content += `\n\n\`\`\`json\n${JSON.stringify(calls, null, 2)}\n\`\`\`\n`;
    if (choice.finish_reason) node.finish = choice.finish_reason;
    this.onchange();
  }

  endThought() {
    if (this.node.reasoning && !this.node.thoughtTime && this.first) this.node.thoughtTime = this.last - this.first;
  }

  /** Tokens and times so far. A piece is a token, until the server has counted. */
  counts() {
    const { first, last, usage } = this;
    const tokens = usage?.completion_tokens ?? this.pieces;
    return {
      tokens,
      firstTime: first && first - this.begun,
      rate: tokens > 1 && last - first > SHORTEST ? ((tokens - 1) * 1000) / (last - first) : null,
      promptTokens: usage?.prompt_tokens ?? null,
      cachedTokens: usage?.prompt_tokens_details?.cached_tokens ?? null,
    };
  }
}
