// Elements are made here, and nowhere out of text: what a model writes can never become markup.

const SVG = "http://www.w3.org/2000/svg";

/** Paths on a field of 24 by 24, drawn with the text's colour. */
const ICONS = {
  menu: ["M4 7h16M4 12h16M4 17h16"],
  plus: ["M12 5v14M5 12h14"],
  close: ["M6 6l12 12M18 6L6 18"],
  send: ["M12 19V6M6 11.5L12 5.5l6 6"],
  stop: ["M7.5 7.5h9v9h-9z"],
  down: ["M12 5v13M6 12.5l6 6 6-6"],
  copy: ["M9 9h10v11H9z", "M15 9V4H5v11h4"],
  check: ["M5 12.5l4.5 4.5L19 7.5"],
  edit: ["M4 20l1-4L16 5l3 3L8 19z"],
  retry: ["M19 8a8 8 0 1 0 1 5", "M20 3v5h-5"],
  trash: ["M5 7h14M10 7V4h4v3M7 7l1 13h8l1-13"],
  left: ["M14.5 6l-6 6 6 6"],
  right: ["M9.5 6l6 6-6 6"],
  sun: ["M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8z", "M12 2v3M12 19v3M2 12h3M19 12h3M5 5l2 2M17 17l2 2M5 19l2-2M17 7l2-2"],
  moon: ["M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z"],
  auto: ["M12 3a9 9 0 1 0 0 18 9 9 0 0 0 0-18z", "M12 3v18M12 8h6.5M12 12h9M12 16h7"],
  settings: ["M4 7h9M17 7h3M4 17h3M11 17h9", "M15 4.8v4.4M9 14.8v4.4"],
  logo: ["M4 4h8v16H4zM15 4h5v6h-5zM15 13h5v7h-5z"],
  warning: ["M12 4l9 16H3z", "M12 10v4.5M12 17v.5"],
};

/**
 * An element. `attributes`: text is set as an attribute, true as an empty one, a function of the name
 * `on…` as a listener; nothing where the value is false, null or undefined.
 */
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  set(element, attributes);
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** An element of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS(SVG, tag);
  set(element, attributes);
  element.append(...children);
  return element;
}

function set(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
}

/** A small drawing that says nothing by itself: what it stands for is in its button's label. */
export function icon(name) {
  const paths = ICONS[name].map((d) => svg("path", { d }));
  return svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true", focusable: "false" }, ...paths);
}

/** A button with a drawing. */
export function iconButton(name, label, onclick, attributes = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...attributes }, icon(name));
}

export const byId = (id) => document.getElementById(id);

/** Draws the icons of elements that are in the page from the beginning. */
export function drawIcons() {
  for (const element of document.querySelectorAll("[data-icon]")) {
    element.prepend(icon(element.dataset.icon));
  }
}

/** Says something to those who cannot see it. */
export function announce(text) {
  const region = byId("announcer");
  region.append(h("p", {}, text));
  while (region.childElementCount > 3) region.firstElementChild.remove();
}

/** Copies a text; whether that was possible. */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

/** Browsers give the clipboard only to pages from this machine or over TLS; a selection is always possible. */
function copyBySelection(text) {
  const area = h("textarea", { class: "visually-hidden", "aria-hidden": "true" });
  area.value = text;
  const parent = document.querySelector("dialog[open]") ?? document.body;
  const focused = document.activeElement;
  parent.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  focused?.focus?.();
  return copied;
}

/** A button that copies and says so. */
export function copyButton(label, text) {
  const button = iconButton("copy", label, async () => {
    const copied = await copyText(text());
    const said = copied ? "Copied" : "The browser does not allow copying";
    announce(said);
    button.replaceChildren(icon(copied ? "check" : "warning"));
    button.title = said;
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.title = label;
    }, 1500);
  });
  return button;
}

/** Asks before something is lost. */
export function confirm(title, text, yes) {
  const dialog = byId("confirm");
  byId("confirm-title").textContent = title;
  byId("confirm-text").textContent = text;
  byId("confirm-yes").textContent = yes;
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener("close", () => done(dialog.returnValue === "yes"), { once: true });
  });
}

/** Gives the user a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = h("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
