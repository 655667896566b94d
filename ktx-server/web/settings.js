// How answers are made: sampling, thoughts, the system prompt, and the key's state.

import { key } from "./api.js";
import { byId, h } from "./dom.js";
import { keep, load } from "./store.js";

const NAME = "ktx.settings";
const DEFAULT_SYSTEM = "ktx.system";

/** Numbers of a request: name, what it is called, range and step. */
const NUMBERS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, hint: "0: always the likeliest" },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01, hint: "likeliest tokens up to this sum" },
  { name: "top_k", label: "Top k", min: 0, max: 100000, step: 1, hint: "0: all tokens" },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01, hint: "part of the likeliest" },
  { name: "repetition_penalty", label: "Repetition penalty", min: 0.05, max: 10, step: 0.05, hint: "1: none" },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1, hint: "0: none" },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1, hint: "0: none" },
  { name: "max_tokens", label: "Tokens at most", min: 1, max: 10000000, step: 1, hint: "of an answer" },
  { name: "seed", label: "Seed", min: 0, max: 2 ** 53 - 1, step: 1, hint: "same seed, same answer" },
];

const THINKING = [
  ["default", "As the model does"],
  ["on", "Think first"],
  ["off", "Answer at once"],
];

let settings = load(NAME, {});

/** The fields of a request that the settings decide. */
export function requestFields() {
  const fields = {};
  for (const { name, min, max } of NUMBERS) {
    const value = settings[name];
    if (typeof value === "number" && value >= min && value <= max) fields[name] = value;
  }
  if (settings.thinking === "on" || settings.thinking === "off") {
    fields.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  }
  return fields;
}

/** The system prompt that new conversations begin with: the last one that was written. */
export const defaultSystem = () => String(load(DEFAULT_SYSTEM, ""));

/** The settings' dialog. `chat` has the conversation, `askForKey` asks for another key. */
export function setUpSettings(chat, askForKey) {
  const dialog = byId("settings");
  byId("sampling").replaceChildren(...NUMBERS.map(numberField));
  byId("thinking").replaceChildren(...THINKING.map(thinkingChoice));
  byId("open-settings").addEventListener("click", () => {
    show(chat);
    dialog.showModal();
  });
  byId("system").addEventListener("input", ({ target }) => {
    chat.setSystem(target.value);
    keep(DEFAULT_SYSTEM, target.value);
  });
  byId("reset-settings").addEventListener("click", () => {
    settings = {};
    keep(NAME, settings);
    chat.setSystem("");
    keep(DEFAULT_SYSTEM, "");
    show(chat);
  });
  byId("change-key").addEventListener("click", async () => {
    await askForKey("Enter another key, or leave it empty to forget the present one.");
    showKey();
  });
}

function show(chat) {
  byId("system").value = chat.conversation.system;
  for (const { name } of NUMBERS) byId(`setting-${name}`).value = settings[name] ?? "";
  byId(`thinking-${settings.thinking ?? "default"}`).checked = true;
  showKey();
}

function showKey() {
  const where = key.isKept() ? "It is remembered in this browser." : "It is forgotten when this tab is closed.";
  byId("key-state").textContent = key.get() ? `A key is set. ${where}` : "No key is set.";
}

function change(name, value) {
  if (value === null) delete settings[name];
  else settings[name] = value;
  keep(NAME, settings);
}

function numberField({ name, label, min, max, step, hint }) {
  const id = `setting-${name}`;
  const input = h("input", {
    type: "number", id, name, min, max, step: step < 1 ? "any" : step, placeholder: "server's", "aria-describedby": `${id}-hint`,
    oninput: ({ target }) => {
      if (target.validity.valid) change(name, target.value === "" ? null : target.valueAsNumber);
    },
  });
  return h("div", { class: "field" }, h("label", { for: id }, label), input, h("small", { id: `${id}-hint`, class: "hint" }, hint));
}

function thinkingChoice([value, label]) {
  const onchange = () => change("thinking", value === "default" ? null : value);
  return h("label", { class: "check" }, h("input", { type: "radio", name: "thinking", id: `thinking-${value}`, value, onchange }), h("span", {}, label));
}
