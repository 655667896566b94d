// A treemap: areas are bytes. Rectangles are as square as they can be (Bruls, Huizing, van Wijk: Squarified
// Treemaps, 2000).

import { h } from "./dom.js";
import { bytes, label, percent, shownChildren } from "./plan_tree.js";

/** Pixels: the name above what is in a module, the space around it, and below what nothing is drawn. */
const HEAD = 20;
const GAP = 2;
const SMALLEST = 3;
/** Pixels that a name needs. */
const NAME_WIDTH = 34;
const NAME_HEIGHT = 16;
/** Levels that are drawn at once. */
const LEVELS = 3;

/** Rectangles for items with a `size`, in their order from the largest on: [{ item, x, y, width, height }]. */
function squarify(items, { x, y, width, height }) {
  const sorted = items.filter((item) => item.size > 0).sort((a, b) => b.size - a.size);
  const total = sorted.reduce((sum, item) => sum + item.size, 0);
  if (total === 0 || width <= 0 || height <= 0) return [];
  const scale = (width * height) / total;
  const out = [];
  let free = { x, y, width, height };
  for (let at = 0; at < sorted.length;) {
    const side = Math.min(free.width, free.height);
    const row = [];
    let sum = 0;
    while (at < sorted.length) {
      const area = sorted[at].size * scale;
      if (row.length > 0 && worst(row, sum + area, side, area) > worst(row, sum, side)) break;
      row.push({ item: sorted[at], area });
      sum += area;
      at += 1;
    }
    free = place(row, sum, free, out);
  }
  return out;
}

/** The worst ratio of sides in a row, with one more area in it. */
function worst(row, sum, side, more = null) {
  const areas = row.map(({ area }) => area);
  if (more !== null) areas.push(more);
  const [largest, smallest] = [Math.max(...areas), Math.min(...areas)];
  return Math.max((side * side * largest) / (sum * sum), (sum * sum) / (side * side * smallest));
}

/** Puts a row along the shorter side; what is left. */
function place(row, sum, free, out) {
  const isWide = free.width >= free.height;
  const thick = sum / (isWide ? free.height : free.width);
  let along = isWide ? free.y : free.x;
  for (const { item, area } of row) {
    const length = area / thick;
    out.push(isWide ? { item, x: free.x, y: along, width: thick, height: length } : { item, x: along, y: free.y, width: length, height: thick });
    along += length;
  }
  return isWide
    ? { x: free.x + thick, y: free.y, width: free.width - thick, height: free.height }
    : { x: free.x, y: free.y + thick, width: free.width, height: free.height - thick };
}

/**
 * The treemap of a module. `paint` colours an element for a module, `onopen` zooms into one, `onshow` shows
 * a module's details, `onback` zooms out.
 */
export class Treemap {
  constructor({ paint, describe, onopen, onshow, onback }) {
    Object.assign(this, { paint, describe, onopen, onshow, onback });
    // What is seen is drawn below the buttons, which are for the hand, the keyboard and screen readers.
    this.drawing = h("div", { class: "treemap-drawing", "aria-hidden": "true" });
    this.element = h("div", { class: "treemap", role: "group", onkeydown: (event) => this.pressed(event), onpointermove: (event) => this.pointed(event) });
    this.cells = [];
    this.current = null;
    new ResizeObserver(() => this.node && this.draw()).observe(this.element);
  }

  /** Shows what is below a module; `focused` is the part that the keyboard is on. */
  show(node, focused = null) {
    this.node = node;
    this.current = focused;
    this.element.setAttribute("aria-label", `${label(node)} by bytes. Arrow keys move, Enter opens, Backspace goes back.`);
    this.draw();
  }

  draw() {
    const { clientWidth: width, clientHeight: height } = this.element;
    const hadFocus = this.element.contains(document.activeElement);
    const parts = shownChildren(this.node);
    const items = (parts.length > 0 ? parts : [this.node]).map((node) => ({ node, size: node.total }));
    const boxes = squarify(items, { x: 0, y: 0, width, height });
    this.drawing.replaceChildren(...boxes.map((box) => this.drawn(box, 1)));
    this.cells = boxes.map((box) => ({ ...box, node: box.item.node, element: this.button(box) }));
    this.element.replaceChildren(this.drawing, ...this.cells.map(({ element }) => element));
    const current = this.cells.find(({ node }) => node === this.current) ?? this.cells[0];
    if (current) this.move(current, hadFocus);
  }

  button({ item: { node }, ...box }) {
    const opens = shownChildren(node).length > 0 && node !== this.node;
    const button = h("button", {
      type: "button", class: "cell-button", tabindex: "-1",
      "aria-label": `${this.describe(node)}${opens ? ", opens" : ""}`,
      onclick: () => (opens ? this.onopen(node) : this.onshow(node)),
      onfocus: () => {
        this.setCurrent(node);
        this.onshow(node);
      },
    });
    put(button, box);
    return button;
  }

  /** A part with its name and, where there is room, what is in it. */
  drawn({ item: { node }, ...box }, level) {
    const { width, height } = box;
    const element = h("div", { class: "cell", "data-path": node.path });
    put(element, box);
    this.paint(element, node);
    const parts = shownChildren(node);
    const hasRoom = width > NAME_WIDTH && height > NAME_HEIGHT;
    if (hasRoom) {
      const size = width > 3 * NAME_WIDTH ? h("span", { class: "cell-size" }, bytes(node.total)) : null;
      element.append(h("span", { class: "cell-name" }, h("span", {}, label(node)), size));
    }
    if (level >= LEVELS || node === this.node) return element;
    const head = hasRoom ? HEAD : GAP;
    const inner = { x: GAP, y: head, width: width - 2 * GAP, height: height - head - GAP };
    const boxes = squarify(parts.map((part) => ({ node: part, size: part.total })), inner);
    element.append(...boxes.filter((part) => part.width >= SMALLEST && part.height >= SMALLEST).map((part) => this.drawn(part, level + 1)));
    return element;
  }

  /** Shows the smallest part below the pointer. */
  pointed(event) {
    if (event.pointerType === "touch") return;
    const below = document.elementsFromPoint(event.clientX, event.clientY);
    const path = below.find((element) => element.dataset?.path !== undefined)?.dataset.path;
    if (path === undefined || path === this.pointedPath) return;
    this.pointedPath = path;
    this.onshow(null, path);
  }

  setCurrent(node) {
    this.current = node;
    for (const cell of this.cells) cell.element.tabIndex = cell.node === node ? 0 : -1;
  }

  move(cell, withFocus = true) {
    this.setCurrent(cell.node);
    if (withFocus) cell.element.focus();
  }

  focus() {
    this.cells.find(({ node }) => node === this.current)?.element.focus();
  }

  pressed(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const from = this.cells.find(({ node }) => node === this.current);
    const to = {
      ArrowLeft: () => nearest(this.cells, from, -1, 0),
      ArrowRight: () => nearest(this.cells, from, 1, 0),
      ArrowUp: () => nearest(this.cells, from, 0, -1),
      ArrowDown: () => nearest(this.cells, from, 0, 1),
      Home: () => this.cells[0],
      End: () => this.cells.at(-1),
    }[event.key];
    if (to) {
      event.preventDefault();
      this.move(to() ?? from);
    } else if (event.key === "Backspace" || event.key === "Escape") {
      event.preventDefault();
      this.onback();
    }
  }
}

/** Puts an element at its place, with a hair of space to its neighbours. */
function put(element, { x, y, width, height }) {
  const { style } = element;
  style.left = `${x}px`;
  style.top = `${y}px`;
  style.width = `${Math.max(width - 1, 1)}px`;
  style.height = `${Math.max(height - 1, 1)}px`;
}

/** The cell next to another in a direction: the closest whose middle lies there, straight ones first. */
function nearest(cells, from, dx, dy) {
  const middle = ({ x, y, width, height }) => [x + width / 2, y + height / 2];
  const [fx, fy] = middle(from);
  let best = null;
  let least = Infinity;
  for (const cell of cells) {
    const [cx, cy] = middle(cell);
    const ahead = (cx - fx) * dx + (cy - fy) * dy;
    if (ahead < 1) continue;
    const aside = Math.abs((cx - fx) * dy) + Math.abs((cy - fy) * dx);
    const distance = ahead + 2 * aside;
    if (distance < least) [best, least] = [cell, distance];
  }
  return best;
}

/** One line on a module. */
export function describe(node, whole, device) {
  return `${label(node)}, ${bytes(node.total)}, ${percent(node.total, whole)} of the model, ${device}`;
}
