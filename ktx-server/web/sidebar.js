// The list of conversations beside the chat.

import { announce, byId, confirm, download, h, iconButton } from "./dom.js";
import * as store from "./store.js";

const NAME = "ktx.sidebar";
const narrow = matchMedia("(max-width: 55rem)");

/** The list. `chat` is set when both are there. */
export class Sidebar {
  constructor() {
    this.chat = null;
    this.isOpen = !narrow.matches && store.load(NAME, true) !== false;
    byId("sidebar-toggle").addEventListener("click", () => this.toggle(!this.isOpen));
    byId("scrim").addEventListener("click", () => this.toggle(false));
    narrow.addEventListener("change", () => this.toggle(!narrow.matches));
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.isOpen || !narrow.matches || document.querySelector("dialog[open]")) return;
      this.toggle(false);
      byId("sidebar-toggle").focus();
    });
    // Another tab changed something.
    window.addEventListener("storage", () => this.draw());
    this.setUpActions();
    this.show();
  }

  setUpActions() {
    byId("new-conversation").addEventListener("click", () => this.leaveTo(() => this.chat.startNew()));
    byId("export-all").addEventListener("click", () => download("ktx-conversations.json", store.exportAll()));
    byId("delete-all").addEventListener("click", async () => {
      const ids = store.list().map((entry) => entry.id);
      if (ids.length === 0 || !(await confirm("Delete all conversations?", `${ids.length} will be gone from this browser. They are nowhere else.`, "Delete all"))) return;
      store.removeAll();
      this.chat.forget(ids);
      this.draw();
    });
    const file = byId("import-file");
    byId("import").addEventListener("click", () => file.click());
    file.addEventListener("change", async () => {
      try {
        const count = store.importAll(await file.files[0].text());
        announce(`${count} conversations were imported.`);
      } catch (error) {
        this.chat.notice(`The file was not imported: ${error.message}.`);
      }
      file.value = "";
      this.draw();
    });
  }

  toggle(isOpen) {
    this.isOpen = isOpen;
    if (!narrow.matches) store.keep(NAME, isOpen);
    this.show();
    if (isOpen && narrow.matches) byId("new-conversation").focus();
  }

  show() {
    const sidebar = byId("sidebar");
    sidebar.classList.toggle("open", this.isOpen);
    sidebar.inert = !this.isOpen;
    byId("scrim").hidden = !this.isOpen || !narrow.matches;
    byId("main").inert = this.isOpen && narrow.matches;
    byId("sidebar-toggle").setAttribute("aria-expanded", String(this.isOpen));
  }

  /** Goes to a conversation: on a small screen the list makes place for it. */
  leaveTo(go) {
    location.hash = "#chat";
    if (narrow.matches) this.toggle(false);
    go();
  }

  draw() {
    const entries = store.list();
    byId("no-conversations").hidden = entries.length > 0;
    for (const id of ["export-all", "delete-all"]) byId(id).disabled = entries.length === 0;
    const focused = document.activeElement?.closest?.("[data-conversation]")?.dataset.conversation;
    byId("conversations").replaceChildren(...entries.map((entry) => this.entry(entry)));
    if (focused) byId("conversations").querySelector(`[data-conversation="${focused}"] button`)?.focus();
  }

  entry({ id, title }) {
    const isCurrent = this.chat?.conversation?.id === id;
    const name = title || "Conversation";
    return h("li", { class: isCurrent ? "current" : null, "data-conversation": id },
      h("button", {
        type: "button", class: "conversation", "aria-current": isCurrent ? "true" : null, title: name,
        onclick: () => this.leaveTo(() => {
          this.chat.open(id);
          byId("prompt").focus();
        }),
      }, name),
      iconButton("down", `Export “${name}”`, () => {
        const conversation = store.open(id);
        if (conversation) download("ktx-conversation.json", store.exportOne(conversation));
      }),
      iconButton("trash", `Delete “${name}”`, () => this.delete(id, name)),
    );
  }

  async delete(id, name) {
    if (!(await confirm("Delete this conversation?", `“${name}” will be gone from this browser. It is nowhere else.`, "Delete"))) return;
    store.remove(id);
    this.chat.forget([id]);
    this.draw();
    byId("new-conversation").focus();
  }
}
