// Conversations, kept in this browser.
//
// A conversation is a tree: an edited message or another answer is a sibling of the first, so that
// nothing is lost. `chosen` of a node is the child that is shown.

const INDEX = "ktx.conversations";
const ONE = "ktx.conversation.";
const FORMAT = "ktx-conversations-1";
const TITLE_LENGTH = 60;

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(9)), (byte) => byte.toString(36).padStart(2, "0")).join("");

/** What is in the storage; nothing if that cannot be read. */
export function load(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

/** Keeps a value; whether there was room. */
export function keep(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** A new conversation; it is kept with its first message. */
export function newConversation(system = "") {
  const root = { id: "root", role: "root", parent: null, children: [], chosen: 0 };
  return { id: newId(), title: "", system, created: Date.now(), updated: Date.now(), nodes: { root } };
}

/** Titles of all conversations, the newest first. */
export function list() {
  return load(INDEX, []).filter((entry) => isConversationId(entry?.id)).sort((a, b) => b.updated - a.updated);
}

const isConversationId = (id) => typeof id === "string" && /^[a-z0-9]{1,40}$/.test(id);

/** A conversation, unless it is gone. */
export const open = (id) => checked(load(ONE + id, null));

/** Keeps a conversation; whether there was room. */
export function save(conversation) {
  conversation.updated = Date.now();
  const entries = list().filter((entry) => entry.id !== conversation.id);
  entries.push({ id: conversation.id, title: conversation.title, updated: conversation.updated });
  return keep(ONE + conversation.id, conversation) && keep(INDEX, entries);
}

export function remove(id) {
  localStorage.removeItem(ONE + id);
  keep(INDEX, list().filter((entry) => entry.id !== id));
}

export function removeAll() {
  for (const { id } of list()) localStorage.removeItem(ONE + id);
  localStorage.removeItem(INDEX);
}

/** All conversations in one text, for a file. */
export function exportAll() {
  const conversations = list().map((entry) => open(entry.id)).filter(Boolean);
  return JSON.stringify({ format: FORMAT, conversations }, null, 1);
}

export const exportOne = (conversation) => JSON.stringify({ format: FORMAT, conversations: [conversation] }, null, 1);

/** Takes conversations from a file; how many there were. Those that are here already stay as they are. */
export function importAll(text) {
  const file = JSON.parse(text);
  if (file?.format !== FORMAT || !Array.isArray(file.conversations)) throw new Error("this is no file of conversations");
  const taken = file.conversations.map(checked).filter((conversation) => conversation && !open(conversation.id));
  for (const conversation of taken) {
    if (!save(conversation)) throw new Error("the browser has no room for them");
  }
  return taken.length;
}

/** A conversation whose parts are what they should be; files and storages are not to be trusted. */
function checked(conversation) {
  const { id, nodes } = conversation ?? {};
  if (!isConversationId(id) || nodes?.root?.role !== "root") return null;
  for (const [name, node] of Object.entries(nodes)) {
    const isWhole = node?.id === name && Array.isArray(node.children) && node.children.every((child) => nodes[child]?.parent === name);
    const isText = name === "root" || (typeof node.content === "string" && ["user", "assistant"].includes(node.role));
    if (!isWhole || !isText) return null;
    node.chosen = Number.isInteger(node.chosen) ? Math.min(Math.max(node.chosen, 0), Math.max(node.children.length - 1, 0)) : 0;
    // A page that was closed in the middle of an answer could not say so.
    if (node.state === "running") node.state = "stopped";
  }
  conversation.title = String(conversation.title ?? "");
  conversation.system = String(conversation.system ?? "");
  return conversation;
}

/** Adds a message below another and shows it. */
export function add(conversation, parent, fields) {
  const node = { id: newId(), parent: parent.id, children: [], chosen: 0, content: "", ...fields };
  conversation.nodes[node.id] = node;
  parent.children.push(node.id);
  parent.chosen = parent.children.length - 1;
  if (!conversation.title && node.role === "user") conversation.title = titleOf(node.content);
  return node;
}

function titleOf(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH).trimEnd()}…` : line;
}

/** The messages that are shown, in order. */
export function path(conversation) {
  const shown = [];
  for (let node = conversation.nodes.root; node.children.length > 0;) {
    node = conversation.nodes[node.children[node.chosen]];
    shown.push(node);
  }
  return shown;
}

/** What is sent for an answer below a node: that node and all above it. */
export function history(conversation, node) {
  const messages = [];
  for (let at = node; at.id !== "root"; at = conversation.nodes[at.parent]) {
    if (at.content) messages.unshift({ role: at.role, content: at.content });
  }
  if (conversation.system.trim()) messages.unshift({ role: "system", content: conversation.system });
  return messages;
}
