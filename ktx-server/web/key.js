// Asking for the server's API key.

import { key } from "./api.js";
import { byId } from "./dom.js";

let asked = null;

/** Asks for a key; whether one was given. Who asks twice gets the answer to the same question. */
export function askForKey(problem) {
  asked ??= ask(problem).finally(() => { asked = null; });
  return asked;
}

function ask(problem) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  const remember = byId("key-remember");
  byId("key-problem").textContent = problem;
  input.value = "";
  // A key that is there may be taken away.
  input.required = !key.get();
  remember.checked = key.isKept();
  dialog.showModal();
  return new Promise((done) => {
    let given = false;
    const submit = (event) => {
      event.preventDefault();
      const value = input.value.trim();
      if (value) key.set(value, remember.checked);
      else key.forget();
      given = value !== "";
      dialog.close();
    };
    const cancel = () => dialog.close();
    byId("key-form").addEventListener("submit", submit);
    byId("key-cancel").addEventListener("click", cancel);
    dialog.addEventListener("close", () => {
      byId("key-form").removeEventListener("submit", submit);
      byId("key-cancel").removeEventListener("click", cancel);
      input.value = "";
      done(given);
    }, { once: true });
  });
}
