// The plan as a tree: modules below their parents, with the bytes of all that is below them.

/** A module and what is below it. `total` counts its own bytes and theirs. */
export function buildTree(modules) {
  const nodes = new Map();
  let root = null;
  for (const module of modules) {
    const parent = module.path === "" ? null : nodes.get(parentPath(module.path)) ?? root;
    const node = { ...module, parent, children: [], total: module.bytes, devices: new Map() };
    nodes.set(module.path, node);
    if (parent) parent.children.push(node);
    else root = node;
    for (let above = parent; above; above = above.parent) above.total += module.bytes;
    const device = deviceOf(module);
    for (let at = node; at && module.bytes > 0; at = at.parent) at.devices.set(device, (at.devices.get(device) ?? 0) + module.bytes);
  }
  return { root, nodes };
}

const parentPath = (path) => path.slice(0, Math.max(path.lastIndexOf("."), 0));

/** The device that generates, and the one that reads prompts if that is another. */
export function deviceOf({ device, prefill_device: prefill }) {
  if (!device) return "–";
  return prefill && prefill !== device ? `${device}, prompts ${prefill}` : device;
}

/** The device with most of a module's bytes. */
export function mainDevice(node) {
  const [first] = [...node.devices].sort((a, b) => b[1] - a[1]);
  return first?.[0] ?? deviceOf(node);
}

/** What is shown below a module: those with weights, and instead of mere lists what is in them. */
export function shownChildren(node) {
  return node.children.filter((child) => child.total > 0).flatMap((child) => (isList(child) ? shownChildren(child) : [child]));
}

const isList = (node) => node.bytes === 0 && node.children.length > 0 && ["Container", "Model"].includes(node.role);

/** What a module is called below its parent: `layer 3`, `self_attn`. */
export function label(node) {
  if (node.path === "") return "Model";
  const last = lastName(node.path);
  return /^\d+$/.test(last) && node.parent ? `${lastName(node.parent.path).replace(/s$/, "")} ${last}` : last;
}

/** The last part of a dotted path. */
export const lastName = (path) => path.slice(path.lastIndexOf(".") + 1);

/** The modules above one that are shown, from the whole model on. */
export function trail(node) {
  const above = [];
  for (let at = node; at; at = at.parent) {
    if (at === node || at.path === "" || !isList(at)) above.unshift(at);
  }
  return above;
}

/** A module and all below it. */
export function walk(node) {
  return [node, ...node.children.flatMap(walk)];
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** Bytes as people read them. */
export function bytes(count) {
  let unit = 0;
  let value = count;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(1)} ${UNITS[unit]}`;
}

/** A part of a whole in percent. */
export function percent(part, whole) {
  const value = whole > 0 ? (part * 100) / whole : 0;
  return `${value >= 10 || value === 0 ? value.toFixed(0) : value.toFixed(1)} %`;
}

/** Where a module's operator comes from. */
export function ruleText({ rule }, rules) {
  return rule ? `rule ${rule.index + 1}, line ${rule.line} of ${rules}` : "as the model defines it";
}
