// The plan: which module is where, how large, by which rule, and which experts are hot.

import { getJson } from "./api.js";
import { announce, h, icon } from "./dom.js";
import { Experts } from "./experts.js";
import { PlanTable } from "./plan_table.js";
import { buildTree, bytes, deviceOf, label, lastName, mainDevice, percent, ruleText, shownChildren, trail } from "./plan_tree.js";
import { Treemap, describe } from "./treemap.js";

/** Colours of different things; more take turns. */
const TONES = 8;

/** What modules can be coloured by. */
const COLOURS = {
  device: ["Device", mainDevice],
  operator: ["Operator", (node) => lastName(node.operator ?? largest(node)?.operator ?? "–")],
  type: ["Tensor type", (node) => node.types[0] ?? largest(node)?.types[0] ?? "–"],
};

/** The part of a module that has the most bytes of its own. */
function largest(node) {
  let best = node;
  while (best.bytes === 0 && best.children.length > 0) best = best.children.reduce((a, b) => (b.total > a.total ? b : a));
  return best;
}

/** Loads the plan and shows it; asks for a key where the server wants one. */
export async function openPlan(view, askForKey) {
  view.replaceChildren(h("p", { class: "plan-loading", role: "status" }, "Loading the plan …"));
  try {
    return new PlanView(view, await getJson("api/ktx/plan"));
  } catch (error) {
    const again = async () => {
      if (error.status === 401 && !(await askForKey("Whoever runs the server has it."))) return;
      location.hash = "#chat";
      location.hash = "#plan";
    };
    view.replaceChildren(h("div", { class: "plan-section" }, h("h1", { id: "plan-title" }, "Plan"),
      h("div", { class: "problem", role: "alert" }, icon("warning"), h("div", {}, h("p", { class: "problem-title" }, error.message), h("p", {}, error.advice ?? ""),
        h("div", { class: "problem-actions" }, h("button", { type: "button", class: "button", onclick: again }, "Try again"))))));
    return null;
  }
}

class PlanView {
  constructor(view, plan) {
    this.plan = plan;
    const { root, nodes } = buildTree(plan.modules);
    Object.assign(this, { root, nodes });
    this.colour = "device";
    this.tones = new Map();
    this.experts = new Experts();
    this.treemap = new Treemap({
      paint: (element, node) => this.paint(element, node),
      describe: (node) => describe(node, root.total, mainDevice(node)),
      onopen: (node) => this.open(node),
      onshow: (node, path) => this.detail(node ?? nodes.get(path)),
      onback: () => this.back(),
    });
    this.table = new PlanTable({ rules: plan.rules, onopen: (node) => this.showIn("map", node) });
    this.trail = h("nav", { class: "trail", "aria-label": "Where you are in the model" });
    this.legend = h("ul", { class: "legend", "aria-label": "Colours" });
    this.details = h("div", { class: "details" });
    this.mapBody = h("div", { class: "map-body" }, this.treemap.element, this.details);
    this.table.element.hidden = true;
    view.replaceChildren(h("div", { class: "plan-scroller" }, h("div", { class: "plan-column" },
      h("header", { class: "plan-head" }, h("h1", { id: "plan-title" }, "Plan"), h("p", { class: "plan-summary" }, this.summary())),
      this.devices(),
      h("section", { class: "plan-section", "aria-labelledby": "modules-title" },
        h("div", { class: "plan-bar" }, h("h2", { id: "modules-title" }, "Modules"), this.choices()),
        this.trail, this.mapBody, this.table.element, this.legend),
      this.experts.element)));
    this.open(root, null, false);
  }

  setVisible(isVisible) {
    this.experts.setVisible(isVisible);
  }

  summary() {
    const { plan, root } = this;
    const modules = plan.modules.filter((module) => module.bytes > 0).length;
    return `${plan.model} (${plan.architecture}): ${bytes(root.total)} of weights in ${modules} modules, placed by ${plan.rules}; context ${plan.context.toLocaleString("en")}, ${plan.threads} threads`;
  }

  devices() {
    const cards = this.plan.devices.map((device) => this.device(device));
    return h("section", { class: "plan-section", "aria-labelledby": "devices-title" }, h("h2", { id: "devices-title" }, "Devices"), h("ul", { class: "devices" }, ...cards));
  }

  device({ name, weights, cache, scratch, process, available }) {
    const parts = [["weights", weights], ["cache", cache], ["activations", scratch], ["program", process]];
    const total = parts.reduce((sum, [, size]) => sum + size, 0);
    const whole = Math.max(available ?? total, total, 1);
    const bar = h("div", { class: "device-bar", "aria-hidden": "true" }, ...parts.map(([part, size]) => {
      const span = h("span", { class: `part-${part}`, title: `${part} ${bytes(size)}` });
      span.style.width = `${(size * 100) / whole}%`;
      return span;
    }));
    const of = available === null ? "" : ` of ${bytes(available)} that were free (${percent(total, available)})`;
    const card = h("li", { class: "device" }, h("h3", {}, h("span", { class: "swatch", "aria-hidden": "true" }), name), h("p", {}, h("strong", {}, bytes(total)), of), bar,
      h("ul", { class: "device-parts" }, ...parts.filter(([, size]) => size > 0).map(([part, size]) => h("li", {}, h("span", { class: `swatch part-${part}`, "aria-hidden": "true" }), `${part} ${bytes(size)}`))));
    this.setTone(card, this.tone(name));
    return card;
  }

  choices() {
    const radio = (group, value, text, checked, onchange) => h("label", {}, h("input", { type: "radio", name: group, value, checked, onchange, class: "visually-hidden" }), h("span", {}, text));
    const shows = h("div", { class: "switch", role: "radiogroup", "aria-label": "Shown as" },
      radio("plan-shown", "map", "Map", true, () => this.showIn("map", this.node)), radio("plan-shown", "table", "Table", false, () => this.showIn("table", this.node)));
    const colours = h("select", { id: "plan-colour", onchange: ({ target }) => this.setColour(target.value) }, ...Object.entries(COLOURS).map(([value, [name]]) => h("option", { value }, name)));
    this.colourChoice = h("span", { class: "colour-choice" }, h("label", { for: "plan-colour" }, "Colour"), colours);
    return h("div", { class: "plan-choices" }, this.colourChoice, shows);
  }

  showIn(what, node) {
    const isMap = what === "map";
    this.mapBody.hidden = !isMap;
    this.legend.hidden = !isMap;
    this.colourChoice.hidden = !isMap;
    this.table.element.hidden = isMap;
    document.querySelector(`input[name=plan-shown][value=${what}]`).checked = true;
    const open = isMap && shownChildren(node).length === 0 ? trail(node).at(-2) ?? this.root : node;
    this.open(open, node === open ? null : node, isMap && node !== this.node);
  }

  setColour(colour) {
    this.colour = colour;
    this.tones.clear();
    for (const { name } of colour === "device" ? this.plan.devices : []) this.tone(name);
    this.treemap.show(this.node, this.treemap.current);
    this.drawLegend();
  }

  /** Zooms to a module. */
  open(node, focused = null, withFocus = true) {
    this.node = node;
    this.drawTrail();
    if (this.table.element.hidden) {
      this.treemap.show(node, focused);
      if (withFocus) this.treemap.focus();
    } else {
      this.table.show(node);
    }
    this.drawLegend();
    this.detail(focused ?? node);
    if (withFocus) announce(`${label(node)}, ${shownChildren(node).length} parts`);
  }

  back() {
    const above = trail(this.node).at(-2);
    if (above) this.open(above, this.node);
  }

  drawTrail() {
    const all = trail(this.node);
    this.trail.replaceChildren(h("ol", {}, ...all.map((node, at) => h("li", {}, at < all.length - 1
      ? h("button", { type: "button", class: "link", onclick: () => this.open(node, all[at + 1]) }, label(node))
      : h("span", { "aria-current": "location" }, label(node))))));
  }

  /** What a module's place in the colours is called. */
  tone(name) {
    if (!this.tones.has(name)) this.tones.set(name, this.tones.size % TONES);
    return this.tones.get(name);
  }

  setTone(element, tone) {
    element.style.setProperty("--tone", `var(--tone-${tone})`);
  }

  paint(element, node) {
    this.setTone(element, this.tone(COLOURS[this.colour][1](node)));
    element.classList.toggle("mixed", this.colour === "device" && node.devices.size > 1);
  }

  drawLegend() {
    this.legend.replaceChildren(...[...this.tones].filter(([name]) => name !== "–").map(([name, tone]) => {
      const swatch = h("span", { class: "swatch", "aria-hidden": "true" });
      this.setTone(swatch, tone);
      return h("li", {}, swatch, name);
    }));
  }

  /** Everything that is known of a module. */
  detail(node) {
    if (!node) return;
    const { plan, root } = this;
    const devices = [...node.devices].sort((a, b) => b[1] - a[1]);
    const rows = [
      ["Bytes", node.total > 0 ? `${bytes(node.total)}, ${percent(node.total, root.total)} of the model` : "no weights"],
      ["Device", node.bytes > 0 || devices.length === 0 ? deviceOf(node) : devices.map(([device, size]) => (devices.length > 1 ? `${device} (${bytes(size)})` : device)).join(", ")],
      ["Operator", node.operator],
      ["Class", node.class],
      ["Role", node.role],
      ["Types", node.types.join(", ")],
      ["Placed by", ruleText(node, plan.rules)],
    ];
    this.details.replaceChildren(h("h3", {}, node.path || plan.model),
      h("dl", {}, ...rows.filter(([, value]) => value).flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, breakable(value))])));
  }
}

/** A class path may break behind its dots. */
function breakable(text) {
  return text.split(".").flatMap((part, at, all) => (at < all.length - 1 ? [`${part}.`, h("wbr")] : [part]));
}
