// One message on the page: its text, thoughts, counts, and what can be done with it.

import { copyButton, h, icon, iconButton } from "./dom.js";
import { MarkdownView } from "./markdown.js";

/** Why an answer ended where it did, if that deserves a word. */
const ENDINGS = {
  length: "The answer reached its length.",
  content_filter: "The answer was filtered.",
  tool_calls: "The model called a function.",
};

/** A message. `actions` are the chat's: edit, retry, choose, resend. */
export class MessageView {
  constructor(node, { name, siblings, isRunning, actions }) {
    this.node = node;
    this.actions = actions;
    this.isRunning = isRunning;
    this.body = h("div", { class: "message-body" });
    this.footer = h("div", { class: "message-footer" });
    const title = h("h2", { class: "message-name" }, node.role === "user" ? "You" : name);
    this.element = h("li", { class: `message ${node.role}`, "data-id": node.id }, title, this.body, this.footer);
    this.siblings = siblings;
    if (node.role === "user") this.body.append(h("div", { class: "message-text" }, node.content));
    else this.setUpAnswer();
    this.drawFooter();
  }

  setUpAnswer() {
    this.markdown = new MarkdownView();
    this.thought = h("div", { class: "thought-text" });
    this.thoughtTitle = h("span");
    this.thoughts = h("details", { class: "thoughts", hidden: true }, h("summary", {}, icon("right"), this.thoughtTitle), this.thought);
    this.after = h("div", { class: "message-after" });
    this.body.append(this.thoughts, this.markdown.element, this.after);
    this.update();
  }

  /** Draws what came since; gives the texts of finished blocks. */
  update() {
    const { node } = this;
    const isFinished = node.state !== "running";
    if (node.reasoning) {
      this.thoughts.hidden = false;
      const isThinking = !isFinished && !node.content;
      this.thoughtTitle.textContent = isThinking ? "Thinking …" : node.thoughtTime ? `Thought for ${seconds(node.thoughtTime)}` : "Thoughts";
      if (this.thought.textContent !== node.reasoning) this.thought.textContent = node.reasoning;
    }
    this.element.classList.toggle("running", !isFinished);
    this.element.setAttribute("aria-busy", String(!isFinished));
    return this.markdown.update(node.content, isFinished);
  }

  /** Draws the end of an answer. */
  finish() {
    this.isRunning = false;
    const said = this.update();
    this.drawFooter();
    return said;
  }

  drawFooter() {
    const { node } = this;
    if (node.role === "assistant") this.after.replaceChildren(...this.endings());
    const hasButtons = node.role === "user" || !this.isRunning;
    this.footer.replaceChildren(...(hasButtons ? [this.buttons()] : []), ...(node.stats && !this.isRunning ? [h("span", { class: "counts" }, counts(node.stats))] : []));
  }

  buttons() {
    const { node, actions, siblings } = this;
    const buttons = h("div", { class: "message-actions" });
    if (siblings.length > 1) buttons.append(...this.versions());
    if (node.content) buttons.append(copyButton("Copy the message", () => node.content));
    if (node.role === "user") buttons.append(iconButton("edit", "Edit the message", () => this.edit(), { "data-action": "edit" }));
    else buttons.append(iconButton("retry", "Answer again", () => actions.retry(node), { "data-action": "retry" }));
    return buttons;
  }

  versions() {
    const { node, actions, siblings } = this;
    const at = siblings.indexOf(node.id);
    const button = (name, label, to) => iconButton(name, label, () => actions.choose(node, to, name), { disabled: to < 0 || to >= siblings.length, "data-action": name });
    return [
      button("left", "Earlier version", at - 1),
      h("span", { class: "version" }, h("span", { class: "visually-hidden" }, "Version "), `${at + 1} / ${siblings.length}`),
      button("right", "Later version", at + 1),
    ];
  }

  endings() {
    const { node, actions } = this;
    const out = [];
    if (node.state === "stopped") out.push(h("p", { class: "ending" }, "Stopped."));
    if (node.state === "done" && ENDINGS[node.finish]) out.push(h("p", { class: "ending" }, ENDINGS[node.finish]));
    if (node.state === "failed") {
      out.push(h("div", { class: "problem", role: "alert" },
        icon("warning"),
        h("div", {}, h("p", { class: "problem-title" }, node.error?.message ?? "It failed."), h("p", {}, node.error?.advice ?? ""),
          h("div", { class: "problem-actions" },
            h("button", { type: "button", class: "button", onclick: () => actions.retry(node), "data-action": "again" }, "Try again"),
            node.error?.status === 401 && h("button", { type: "button", class: "button", onclick: () => actions.enterKey(node) }, "Enter the key"))),
      ));
    }
    return out;
  }

  /** Puts the message into a field; sending it makes another version. */
  edit() {
    const { node, actions } = this;
    const area = h("textarea", { "aria-label": "Edited message", rows: "1" });
    area.value = node.content;
    const back = () => {
      form.replaceWith(...shown);
      this.footer.hidden = false;
      this.footer.querySelector("[data-action=edit]").focus();
    };
    const form = h("form", {
      class: "edit",
      onsubmit: (event) => {
        event.preventDefault();
        if (area.value.trim()) actions.edit(node, area.value.trim());
      },
      onkeydown: (event) => {
        if (event.key === "Escape") {
          event.stopPropagation();
          back();
        }
      },
    }, area, h("div", { class: "edit-actions" }, h("button", { type: "button", class: "button", onclick: back }, "Cancel"), h("button", { type: "submit", class: "button primary" }, "Send")));
    const shown = [...this.body.childNodes];
    this.body.replaceChildren(form);
    this.footer.hidden = true;
    growing(area, form);
    area.focus();
  }
}

/** A field that is as high as its text, and that Enter sends. */
export function growing(area, form) {
  const grow = () => {
    area.style.height = "auto";
    area.style.height = `${area.scrollHeight + area.offsetHeight - area.clientHeight}px`;
  };
  area.addEventListener("input", grow);
  area.addEventListener("keydown", (event) => {
    // Enter within an input method chooses a word; on a touch screen it begins a line.
    const sends = event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches;
    if (!sends && !(event.key === "Enter" && (event.ctrlKey || event.metaKey))) return;
    event.preventDefault();
    form.requestSubmit();
  });
  grow();
  return grow;
}

const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(milliseconds < 10_000 ? 2 : 0)} s`;

/** Counts in words: tokens, time to the first, and speed. */
export function counts({ tokens, firstTime, rate, promptTokens, cachedTokens }) {
  const parts = [];
  if (promptTokens) parts.push(`${promptTokens} prompt tokens${cachedTokens ? ` (${cachedTokens} cached)` : ""}`);
  if (firstTime) parts.push(`first after ${seconds(firstTime)}`);
  if (tokens) parts.push(`${tokens} tokens`);
  if (rate) parts.push(`${rate.toFixed(1)} tokens/s`);
  return parts.join(" · ");
}
