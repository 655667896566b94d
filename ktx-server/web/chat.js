// The chat: the open conversation on the page, and the answers that are made.

import { Answer } from "./answer.js";
import { announce, byId, h, icon } from "./dom.js";
import { MessageView, counts, growing } from "./message.js";
import { defaultSystem } from "./settings.js";
import * as store from "./store.js";

const CURRENT = "ktx.current";
/** Time between two savings of an answer that grows. */
const SAVE_INTERVAL = 1500;
/** Time between two drawings of the counts: digits that change faster cannot be read. */
const COUNT_INTERVAL = 250;
/** Pixels from the end up to which the page follows the answer. */
const NEAR_END = 60;

const SUGGESTIONS = ["What is 7 + 5?", "What is the opposite of hot?", "Tell me a long story.", "Explain what a mixture of experts is, with a table."];

/** The chat. `onlist` is called when the list of conversations changes; `askForKey` asks for a key. */
export class Chat {
  constructor({ onlist, askForKey }) {
    this.onlist = onlist;
    this.askForKey = askForKey;
    this.model = "";
    this.views = new Map();
    /** Answers that are made, by conversation. */
    this.running = new Map();
    this.scroller = byId("scroller");
    this.isFollowing = true;
    this.actions = {
      edit: (node, text) => this.edit(node, text),
      retry: (node) => this.retry(node),
      choose: (node, at, action) => this.choose(node, at, action),
      enterKey: async (node) => (await askForKey("Whoever runs the server has it.")) && this.retry(node),
    };
    this.setUp();
    this.open(store.load(CURRENT, ""));
  }

  setUp() {
    const form = byId("composer");
    const prompt = byId("prompt");
    this.grow = growing(prompt, form);
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const text = prompt.value.trim();
      if (!text || this.isRunning) return;
      prompt.value = "";
      this.grow();
      this.ask(text);
    });
    byId("stop").addEventListener("click", () => this.stop());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && this.isRunning && !document.querySelector("dialog[open]") && !byId("chat-view").hidden) this.stop();
    });
    this.scroller.addEventListener("scroll", () => this.scrolled(), { passive: true });
    // A page that is left breaks its connections itself: nothing failed.
    window.addEventListener("beforeunload", () => this.running.forEach((answer) => answer.leave()));
    window.addEventListener("pagehide", () => this.running.forEach(({ conversation }) => this.keep(conversation)));
    byId("to-end").addEventListener("click", () => {
      this.isFollowing = true;
      this.follow();
      prompt.focus();
    });
    byId("suggestions").replaceChildren(...SUGGESTIONS.map((text) => h("li", {}, h("button", { type: "button", class: "suggestion", onclick: () => this.ask(text) }, text))));
  }

  get isRunning() {
    return this.running.has(this.conversation.id);
  }

  setModel(name) {
    this.model = name;
    byId("welcome-model").textContent = name;
    this.draw();
  }

  /** Opens a conversation; a new one if it is gone. */
  open(id) {
    this.conversation = this.running.get(id)?.conversation ?? store.open(id) ?? store.newConversation(defaultSystem());
    store.keep(CURRENT, this.conversation.id);
    this.isFollowing = true;
    this.draw();
    this.onlist();
  }

  startNew() {
    this.open("");
    byId("prompt").focus();
  }

  setSystem(text) {
    this.conversation.system = text;
    if (this.conversation.title) this.save();
  }

  /** Takes conversations off the page that were deleted. */
  forget(ids) {
    for (const id of ids) this.running.get(id)?.stop();
    if (ids.includes(this.conversation.id)) this.open("");
  }

  /** Saves a conversation whose answer goes on, unless it was deleted meanwhile. */
  keep(conversation) {
    if (store.open(conversation.id)) store.save(conversation);
  }

  save() {
    if (store.save(this.conversation)) this.notice(null);
    else this.notice("The browser has no room for this conversation: it will be lost with this page. Export it, or delete older ones.");
    this.onlist();
  }

  notice(text) {
    byId("notice").replaceChildren(...(text ? [h("div", { class: "problem" }, icon("warning"), h("p", {}, text))] : []));
  }

  /** Draws the whole conversation. */
  draw() {
    const { conversation } = this;
    const answer = this.running.get(conversation.id);
    this.views.clear();
    for (const node of store.path(conversation)) {
      const siblings = conversation.nodes[node.parent].children;
      const isRunning = answer?.node === node;
      this.views.set(node.id, new MessageView(node, { name: this.model || "Model", siblings, isRunning, actions: this.actions }));
    }
    byId("messages").replaceChildren(...[...this.views.values()].map((view) => view.element));
    const isEmpty = this.views.size === 0;
    byId("welcome").hidden = !isEmpty;
    byId("messages").hidden = isEmpty;
    byId("chat-title").textContent = conversation.title || "New conversation";
    this.drawComposer();
    this.follow();
  }

  drawComposer() {
    const answer = this.running.get(this.conversation.id);
    byId("send").hidden = Boolean(answer);
    byId("stop").hidden = !answer;
    byId("statistics").textContent = answer ? live(answer) : "";
  }

  ask(text) {
    const parent = store.path(this.conversation).at(-1) ?? this.conversation.nodes.root;
    const question = store.add(this.conversation, parent, { role: "user", content: text });
    byId("prompt").focus();
    this.answer(question);
  }

  edit(node, text) {
    this.running.get(this.conversation.id)?.stop();
    const parent = this.conversation.nodes[node.parent];
    const question = store.add(this.conversation, parent, { role: "user", content: text });
    byId("prompt").focus();
    this.answer(question);
  }

  retry(node) {
    if (this.isRunning) return;
    byId("prompt").focus();
    this.answer(this.conversation.nodes[node.parent]);
  }

  /** Shows another version of a message. */
  choose(node, at, action) {
    if (this.isRunning) return;
    const parent = this.conversation.nodes[node.parent];
    parent.chosen = at;
    this.save();
    const { scrollTop } = this.scroller;
    this.isFollowing = false;
    this.draw();
    this.scroller.scrollTop = scrollTop;
    const { element } = this.views.get(parent.children[at]);
    const buttons = [action, "left", "right"].map((name) => element.querySelector(`[data-action=${name}]`));
    buttons.find((button) => button && !button.disabled)?.focus();
    announce(`Version ${at + 1} of ${parent.children.length}`);
  }

  stop() {
    this.running.get(this.conversation.id)?.stop();
    byId("prompt").focus();
  }

  /** Makes an answer to a message. */
  async answer(question) {
    const { conversation } = this;
    const node = store.add(conversation, question, { role: "assistant", state: "running" });
    const answer = new Answer(conversation, node, () => this.changed(answer));
    this.running.set(conversation.id, answer);
    this.isFollowing = true;
    this.save();
    this.draw();
    announce("The model answers.");
    await answer.run(this.model || undefined);
    // An edited message begins another answer before this one has ended.
    if (this.running.get(conversation.id) === answer) this.running.delete(conversation.id);
    this.finished(answer);
    if (node.error?.status === 401) {
      const given = await this.askForKey("The server did not take the key that it was shown, or was shown none.");
      if (given && this.conversation === conversation) this.retry(node);
    }
  }

  /** Plans a drawing: pieces may come faster than the screen is drawn. */
  changed(answer) {
    answer.frame ??= requestAnimationFrame(() => {
      answer.frame = null;
      this.drawAnswer(answer);
    });
    const now = performance.now();
    if (now - (answer.saved ?? answer.begun) > SAVE_INTERVAL) {
      answer.saved = now;
      this.keep(answer.conversation);
    }
  }

  drawAnswer(answer) {
    const view = this.views.get(answer.node.id);
    if (!view || answer.node.state !== "running") return;
    view.update().forEach(announce);
    this.follow();
    const now = performance.now();
    if (now - (answer.counted ?? 0) < COUNT_INTERVAL) return;
    answer.counted = now;
    byId("statistics").textContent = live(answer);
  }

  finished(answer) {
    const { conversation, node } = answer;
    this.keep(conversation);
    this.onlist();
    const view = this.views.get(node.id);
    if (!view) return;
    view.finish().forEach(announce);
    announce({ done: "The answer is complete.", stopped: "Stopped.", failed: "" }[node.state]);
    this.drawComposer();
    this.follow();
  }

  scrolled() {
    const { scrollTop, scrollHeight, clientHeight } = this.scroller;
    this.isFollowing = scrollHeight - clientHeight - scrollTop < NEAR_END;
    byId("to-end").hidden = this.isFollowing;
  }

  follow() {
    if (this.isFollowing) this.scroller.scrollTop = this.scroller.scrollHeight;
  }
}

function live(answer) {
  return answer.first ? counts(answer.counts()) : "Waiting for the first token …";
}
