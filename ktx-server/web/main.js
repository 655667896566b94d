// The page's beginning: its views, colours, and what the server says of itself.

import { getJson } from "./api.js";
import { Chat } from "./chat.js";
import { announce, byId, drawIcons, icon } from "./dom.js";
import { askForKey } from "./key.js";
import { setUpSettings } from "./settings.js";
import { Sidebar } from "./sidebar.js";

/** The colours, in the order of the button. */
const THEMES = [
  { name: null, icon: "auto", label: "Colours as the system has them" },
  { name: "light", icon: "sun", label: "Light colours" },
  { name: "dark", icon: "moon", label: "Dark colours" },
];

function setUpTheme() {
  const button = byId("theme-toggle");
  const root = document.documentElement;
  let at = Math.max(THEMES.findIndex(({ name }) => name === (root.dataset.theme ?? null)), 0);
  const draw = () => {
    button.replaceChildren(icon(THEMES[at].icon));
    button.setAttribute("aria-label", `${THEMES[at].label}; change`);
    button.title = THEMES[at].label;
  };
  button.addEventListener("click", () => {
    at = (at + 1) % THEMES.length;
    const { name, label } = THEMES[at];
    if (name) root.dataset.theme = name;
    else delete root.dataset.theme;
    try {
      if (name) localStorage.setItem("ktx.theme", name);
      else localStorage.removeItem("ktx.theme");
    } catch {
      // The colours hold for this visit.
    }
    draw();
    announce(label);
  });
  draw();
}

/** What the server says of its model; asks for a key until it says it. */
async function meetServer(chat) {
  try {
    const { data } = await getJson("v1/models");
    const [model] = data;
    byId("model-name").textContent = model.id;
    document.title = `${model.id} · ktx`;
    chat.setModel(model.id);
    chat.notice(null);
  } catch (error) {
    const given = error.status === 401 && (await askForKey("Whoever runs the server has it."));
    if (given) await meetServer(chat);
    else chat.notice(`${error.message} ${error.advice ?? ""}`);
  }
}

/** Shows the view that the address names. The plan is loaded when it is first looked at. */
function setUpViews() {
  let plan = null;
  const show = async () => {
    const isPlan = location.hash.startsWith("#plan");
    byId("chat-view").hidden = isPlan;
    byId("plan-view").hidden = !isPlan;
    document.body.classList.toggle("shows-plan", isPlan);
    for (const [id, isCurrent] of [["nav-chat", !isPlan], ["nav-plan", isPlan]]) {
      if (isCurrent) byId(id).setAttribute("aria-current", "page");
      else byId(id).removeAttribute("aria-current");
    }
    if (isPlan) plan ??= (await import("./plan.js")).openPlan(byId("plan-view"), askForKey);
    (await plan)?.setVisible(isPlan);
  };
  window.addEventListener("hashchange", show);
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();
    (location.hash.startsWith("#plan") ? byId("main") : byId("prompt")).focus();
  });
  return show();
}

drawIcons();
setUpTheme();
const sidebar = new Sidebar();
const chat = new Chat({ onlist: () => sidebar.draw(), askForKey });
sidebar.chat = chat;
sidebar.draw();
setUpSettings(chat, askForKey);
setUpViews();
meetServer(chat);
