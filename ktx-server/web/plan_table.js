// The plan as a table: the same facts as in the treemap, for reading and searching.

import { h } from "./dom.js";
import { bytes, deviceOf, lastName, ruleText, walk } from "./plan_tree.js";

const COLUMNS = [
  ["Module", (node) => node.path],
  ["Operator", (node) => node.operator ?? ""],
  ["Device", deviceOf],
  ["Types", (node) => node.types.join(" ")],
  ["Bytes", (node) => node.total],
  ["Rule", (node) => node.rule?.line ?? 0],
];

/** A table of the modules below one. */
export class PlanTable {
  constructor({ rules, onopen }) {
    this.rules = rules;
    this.onopen = onopen;
    this.sort = { column: null, isDown: false };
    this.filter = h("input", { type: "search", id: "plan-filter", placeholder: "experts, cuda:0, Q4_K …", autocomplete: "off", oninput: () => this.draw() });
    this.count = h("p", { class: "hint", role: "status" });
    this.heads = COLUMNS.map(([name], at) => h("th", { scope: "col" }, h("button", { type: "button", onclick: () => this.sortBy(at) }, name)));
    this.body = h("tbody");
    this.caption = h("caption", { class: "visually-hidden" });
    this.element = h("div", { class: "plan-table" },
      h("div", { class: "plan-filter" }, h("label", { for: "plan-filter" }, "Find"), this.filter, this.count),
      h("div", { class: "table-block", tabindex: "0", role: "group", "aria-label": "Modules" },
        h("table", {}, this.caption, h("thead", {}, h("tr", {}, ...this.heads)), this.body)));
  }

  show(node) {
    // What an operator holds as a whole has parts in the model that are nowhere.
    this.nodes = walk(node).filter((one) => one.total > 0 || one.operator);
    this.caption.textContent = `Modules of ${node.path || "the model"}, with operators, devices, bytes and rules`;
    this.draw();
  }

  sortBy(column) {
    const isSame = this.sort.column === column;
    this.sort = { column, isDown: isSame ? !this.sort.isDown : typeof COLUMNS[column][1](this.nodes[0]) === "number" };
    this.draw();
  }

  draw() {
    const { column, isDown } = this.sort;
    this.heads.forEach((head, at) => {
      if (at === column) head.setAttribute("aria-sort", isDown ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
    const words = this.filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    const shown = this.nodes.filter((node) => {
      const text = COLUMNS.map(([, value]) => value(node)).join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    });
    if (column !== null) {
      const [, value] = COLUMNS[column];
      const order = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true }));
      shown.sort((a, b) => order(value(a), value(b)) * (isDown ? -1 : 1));
    }
    this.count.textContent = `${shown.length} of ${this.nodes.length} modules`;
    this.body.replaceChildren(...shown.map((node) => this.row(node)));
  }

  row(node) {
    const path = h("button", { type: "button", class: "link", onclick: () => this.onopen(node) }, node.path || "(root)");
    return h("tr", {},
      h("th", { scope: "row" }, path),
      h("td", { title: node.operator ?? node.class }, lastName(node.operator ?? node.class)),
      h("td", {}, deviceOf(node)),
      h("td", {}, node.types.join(", ")),
      h("td", { class: "right" }, node.total > 0 ? bytes(node.total) : "–"),
      h("td", { title: ruleText(node, this.rules) }, node.rule ? `line ${node.rule.line}` : "–"));
  }
}
