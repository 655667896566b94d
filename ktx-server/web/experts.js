// Which experts are hot: a map of layers and experts that follows the counts of the server.

import { getJson } from "./api.js";
import { h } from "./dom.js";
import { percent } from "./plan_tree.js";

/** Milliseconds between two questions. */
const INTERVAL = 1000;
/** How much of the map an interval with choices renews. */
const RENEWED = 0.4;
/** Pixels of a cell. */
const CELL = { least: 3, most: 22 };
/** Experts chosen so many times as often as the average have the full colour. */
const FULL = 4;

/** The map. It asks while it is visible. */
export class Experts {
  constructor() {
    this.layers = [];
    this.mode = "now";
    this.cursor = null;
    this.canvas = h("canvas", {
      class: "experts-map", tabindex: "0", role: "img", "aria-describedby": "experts-said",
      onpointermove: (event) => this.pointed(event), onpointerleave: () => this.point(null), onkeydown: (event) => this.pressed(event),
    });
    this.said = h("p", { id: "experts-said", class: "experts-said", "aria-live": "polite" });
    this.state = h("p", { class: "hint" });
    this.table = h("tbody");
    const choice = (mode, text) => h("label", { class: "check" }, h("input", { type: "radio", name: "experts-mode", value: mode, checked: mode === this.mode, onchange: () => this.setMode(mode) }), h("span", {}, text));
    this.body = h("div", {},
      h("div", { class: "experts-bar" },
        h("div", { class: "choices", role: "radiogroup", "aria-label": "Which choices" }, choice("now", "Lately"), choice("all", "Since the start")),
        h("div", { class: "experts-legend", "aria-hidden": "true" }, "never", h("span", { class: "experts-scale" }), `${FULL} times the average`)),
      h("div", { class: "experts-scroll" }, this.canvas),
      this.said,
      h("details", { class: "experts-table" }, h("summary", {}, "The same as a table"),
        h("div", { class: "table-block", tabindex: "0", role: "group", "aria-label": "Hot experts" },
          h("table", {}, h("caption", { class: "visually-hidden" }, "The most chosen experts of each layer"),
            h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "Layer"), h("th", { scope: "col" }, "Experts"), h("th", { scope: "col" }, "Choices"), h("th", { scope: "col" }, "Most chosen"))), this.table))));
    this.element = h("section", { class: "plan-section experts", "aria-labelledby": "experts-title" }, h("h2", { id: "experts-title" }, "Hot experts"), this.state, this.body);
    this.body.hidden = true;
    this.state.textContent = "Asking the server …";
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    new ResizeObserver(() => this.draw()).observe(this.element);
    new MutationObserver(() => this.draw()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    document.addEventListener("visibilitychange", () => this.schedule());
  }

  setVisible(isVisible) {
    this.isVisible = isVisible;
    this.schedule();
  }

  schedule() {
    clearTimeout(this.timer);
    if (this.isVisible && !document.hidden) this.ask();
  }

  async ask() {
    try {
      this.take((await getJson("api/ktx/experts")).layers);
    } catch (error) {
      this.state.textContent = `${error.message} ${error.advice ?? ""}`;
    }
    clearTimeout(this.timer);
    if (this.isVisible && !document.hidden) this.timer = setTimeout(() => this.ask(), INTERVAL);
  }

  take(layers) {
    this.body.hidden = layers.length === 0;
    if (layers.length === 0) {
      this.state.textContent = "This model has no routed experts that are counted.";
      return;
    }
    let isBusy = false;
    this.layers = layers.map(({ path, counts }, at) => {
      const before = this.layers[at]?.counts ?? counts;
      const fresh = counts.map((count, i) => count - (before[i] ?? 0));
      const sum = fresh.reduce((a, b) => a + b, 0);
      isBusy ||= sum > 0;
      const old = this.layers[at]?.lately ?? counts.map(() => 0);
      const lately = sum > 0 ? old.map((value, i) => value * (1 - RENEWED) + (fresh[i] / sum) * RENEWED) : old;
      return { path, counts, lately, name: path.match(/\d+/)?.[0] ?? path };
    });
    const wasUsed = this.layers.some(({ counts }) => counts.some((count) => count > 0));
    this.state.textContent = isBusy
      ? "The model generates; the map follows."
      : wasUsed ? "Nothing is generated now. The map follows when an answer is made, here in the chat or elsewhere." : "No expert on the CPU was chosen yet: ask the model something. What runs on a GPU is not counted.";
    this.draw();
    this.drawTable();
  }

  setMode(mode) {
    this.mode = mode;
    this.draw();
    this.drawTable();
  }

  /** Parts of a layer's choices, by expert. */
  parts({ counts, lately }) {
    const values = this.mode === "now" ? lately : counts;
    const sum = values.reduce((a, b) => a + b, 0);
    return values.map((value) => (sum > 0 ? value / sum : 0));
  }

  draw() {
    if (this.layers.length === 0 || !this.isVisible) return;
    const columns = Math.max(...this.layers.map(({ counts }) => counts.length));
    const rows = this.layers.length;
    const margin = 34;
    const room = this.element.clientWidth - margin;
    const size = Math.max(CELL.least, Math.min(CELL.most, Math.floor(room / columns)));
    const height = Math.max(size, rows > 40 ? 8 : 12);
    const ratio = window.devicePixelRatio || 1;
    const { canvas } = this;
    const [width, tall] = [columns * size + margin, rows * height + 18];
    canvas.width = width * ratio;
    canvas.height = tall * ratio;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${tall}px`;
    canvas.setAttribute("aria-label", `Map of ${rows} layers with up to ${columns} experts. Arrow keys move from expert to expert.`);
    this.geometry = { margin, size, height };
    const cx = canvas.getContext("2d");
    cx.scale(ratio, ratio);
    const style = getComputedStyle(canvas);
    const [cold, hot] = ["--heat-cold", "--heat-hot"].map((name) => style.getPropertyValue(name));
    cx.font = `${style.fontSize} ${style.fontFamily}`;
    cx.fillStyle = style.color;
    cx.textBaseline = "middle";
    const every = Math.max(1, Math.ceil(14 / height));
    cx.textAlign = "right";
    this.layers.forEach(({ name }, row) => row % every === 0 && cx.fillText(name, margin - 8, row * height + height / 2));
    cx.textAlign = "left";
    const step = 2 ** Math.ceil(Math.log2(Math.max(1, 34 / size)));
    for (let at = 0; at < columns; at += step) cx.fillText(String(at), margin + at * size, rows * height + 10);
    const gap = size > 6 ? 1 : 0;
    this.layers.forEach((layer, row) => {
      this.parts(layer).forEach((part, at) => {
        const heat = Math.min((part * layer.counts.length) / FULL, 1);
        cx.fillStyle = cold;
        cx.globalAlpha = 1;
        cx.fillRect(margin + at * size, row * height, size - gap, height - 1);
        cx.fillStyle = hot;
        cx.globalAlpha = heat;
        cx.fillRect(margin + at * size, row * height, size - gap, height - 1);
      });
    });
    cx.globalAlpha = 1;
    if (this.cursor) {
      cx.strokeStyle = getComputedStyle(this.element).color;
      cx.lineWidth = 2;
      cx.strokeRect(margin + this.cursor.expert * size, this.cursor.row * height, size - gap, height - 1);
    }
    this.say();
  }

  pointed(event) {
    const { margin, size, height } = this.geometry;
    const expert = Math.floor((event.offsetX - margin) / size);
    const row = Math.floor(event.offsetY / height);
    this.point(this.layers[row]?.counts[expert] === undefined ? null : { row, expert });
  }

  pressed(event) {
    const [rows, experts] = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key] ?? [];
    if (rows === undefined || this.layers.length === 0) return;
    event.preventDefault();
    const from = this.cursor ?? { row: 0, expert: 0 };
    const row = Math.min(Math.max(from.row + rows, 0), this.layers.length - 1);
    const expert = Math.min(Math.max(from.expert + experts, 0), this.layers[row].counts.length - 1);
    this.point({ row, expert });
  }

  point(cursor) {
    this.cursor = cursor;
    this.draw();
  }

  say() {
    const layer = this.cursor && this.layers[this.cursor.row];
    const text = layer
      ? `Layer ${layer.name}, expert ${this.cursor.expert}: ${percent(this.parts(layer)[this.cursor.expert], 1)} of the choices; ${layer.counts[this.cursor.expert]} since the start`
      : "A row is a layer, a column an expert.";
    if (this.said.textContent !== text) this.said.textContent = text;
  }

  drawTable() {
    this.table.replaceChildren(...this.layers.map((layer) => {
      const parts = this.parts(layer).map((part, expert) => ({ part, expert })).filter(({ part }) => part > 0);
      const most = parts.sort((a, b) => b.part - a.part).slice(0, 4).map(({ part, expert }) => `${expert} (${percent(part, 1)})`);
      const sum = layer.counts.reduce((a, b) => a + b, 0);
      return h("tr", {}, h("th", { scope: "row", title: layer.path }, layer.name), h("td", { class: "right" }, layer.counts.length), h("td", { class: "right" }, sum), h("td", {}, most.join(", ") || "–"));
    }));
  }
}
