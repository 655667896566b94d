// Markdown, as models write it, into elements: first blocks, then (inline.js) what is in their lines.
// Text becomes elements by createElement and text nodes only. HTML in it stays text, and so do indented
// code blocks and underlined headings, which in answers are hardly ever meant.

import { h, copyButton } from "./dom.js";
import { highlight } from "./highlight.js";
import { parseInline } from "./inline.js";

/** Lists and quotes within each other at most; deeper ones are text. */
const MAX_DEPTH = 12;

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*?))?(?:[ \t]+#+)?[ \t]*$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?:( +)|$)/;
const DELIMITERS = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;

/** Blocks of a text. Each knows the text it was made of. */
function parseBlocks(text) {
  return new Blocks(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0).parse();
}

class Blocks {
  constructor(lines, depth) {
    this.lines = lines;
    this.depth = depth;
    this.at = 0;
  }

  get line() {
    return this.lines[this.at];
  }

  parse() {
    const blocks = [];
    while (this.at < this.lines.length) {
      if (this.line.trim() === "") {
        this.at += 1;
        continue;
      }
      const from = this.at;
      const block = this.block();
      block.source = this.lines.slice(from, this.at).join("\n");
      blocks.push(block);
    }
    return blocks;
  }

  block() {
    const { line } = this;
    if (FENCE.test(line)) return this.fence();
    const heading = HEADING.exec(line);
    if (heading) {
      this.at += 1;
      return { type: "heading", level: heading[1].length, text: heading[2] ?? "" };
    }
    if (RULE.test(line)) {
      this.at += 1;
      return { type: "rule" };
    }
    const canNest = this.depth < MAX_DEPTH;
    if (canNest && QUOTE.test(line)) return this.quote();
    if (canNest && ITEM.test(line)) return this.list();
    return this.isTable() ? this.table() : this.paragraph();
  }

  fence() {
    const [, indent, marks, info] = FENCE.exec(this.line);
    const end = new RegExp(`^ {0,3}\\${marks[0]}{${marks.length},}[ \\t]*$`);
    const inner = [];
    for (this.at += 1; this.at < this.lines.length && !end.test(this.line); this.at += 1) {
      inner.push(this.line.startsWith(indent) ? this.line.slice(indent.length) : this.line.trimStart());
    }
    this.at += 1;
    return { type: "code", language: info.trim().split(/\s+/)[0], text: inner.join("\n") };
  }

  /** Whether a line ends a paragraph before it. */
  interrupts(line) {
    const item = ITEM.exec(line);
    const isItem = item && item[3] && (!/\d/.test(item[2]) || /^1[.)]$/.test(item[2]));
    return line.trim() === "" || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || isItem;
  }

  quote() {
    const inner = [];
    for (; this.at < this.lines.length; this.at += 1) {
      if (QUOTE.test(this.line)) inner.push(this.line.replace(QUOTE, ""));
      else if (!this.interrupts(this.line)) inner.push(this.line);
      else break;
    }
    return { type: "quote", blocks: new Blocks(inner, this.depth + 1).parse() };
  }

  list() {
    const first = ITEM.exec(this.line);
    const mark = first[2].slice(-1);
    const list = { type: "list", ordered: /\d/.test(first[2]), start: parseInt(first[2], 10), items: [], isLoose: false };
    while (this.at < this.lines.length) {
      const found = ITEM.exec(this.line);
      if (!found || found[2].slice(-1) !== mark || RULE.test(this.line)) break;
      const { lines, endsBlank } = this.item(found);
      const task = /^\[([ xX])\] /.exec(lines[0]);
      if (task) lines[0] = lines[0].slice(4);
      const blocks = new Blocks(lines, this.depth + 1).parse();
      list.items.push({ blocks, task: task && task[1] !== " " ? "done" : task ? "open" : null });
      const hasNext = this.at < this.lines.length && ITEM.exec(this.line)?.[2].slice(-1) === mark;
      if ((endsBlank && hasNext) || lines.some((line, i) => line.trim() === "" && blocks.length > 1 && i < lines.length - 1)) list.isLoose = true;
    }
    return list;
  }

  /** The lines of an item, without its mark and indentation. */
  item(found) {
    const space = found[3]?.length ?? 1;
    const indent = found[1].length + found[2].length + (space > 4 ? 1 : space);
    const lines = [this.line.slice(indent)];
    let blank = 0;
    for (this.at += 1; this.at < this.lines.length; this.at += 1) {
      const { line } = this;
      const own = line.search(/\S/);
      if (own < 0) {
        blank += 1;
        lines.push("");
        continue;
      }
      const continues = own >= indent || (own >= 2 && own >= indent - 1 && ITEM.test(line.slice(own)));
      if (continues) lines.push(line.slice(Math.min(indent, own)));
      else if (blank === 0 && !this.interrupts(line) && !ITEM.test(line)) lines.push(line.trimStart());
      else break;
      blank = 0;
    }
    return { lines: lines.slice(0, lines.length - blank), endsBlank: blank > 0 };
  }

  isTable() {
    const next = this.lines[this.at + 1];
    return next !== undefined && next.includes("-") && DELIMITERS.test(next)
      && this.line.includes("|") && cells(this.line).length === cells(next).length;
  }

  table() {
    const head = cells(this.line);
    const align = cells(this.lines[this.at + 1]).map((cell) => {
      const [left, right] = [cell.startsWith(":"), cell.endsWith(":")];
      return left && right ? "center" : right ? "right" : null;
    });
    const rows = [];
    for (this.at += 2; this.at < this.lines.length && !this.interrupts(this.line); this.at += 1) {
      const row = cells(this.line);
      rows.push(head.map((_, i) => row[i] ?? ""));
    }
    return { type: "table", head, align, rows };
  }

  paragraph() {
    const inner = [this.line.trim()];
    for (this.at += 1; this.at < this.lines.length; this.at += 1) {
      if (this.interrupts(this.line) || this.isTable()) break;
      inner.push(this.line.trim());
    }
    return { type: "paragraph", text: inner.join("\n") };
  }
}

/** Cells of a table's line; a bar behind a backslash or within code is none between cells. */
function cells(line) {
  const row = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  const out = [""];
  let inCode = false;
  for (let at = 0; at < row.length; at += 1) {
    if (row[at] === "\\" && row[at + 1] === "|") {
      out[out.length - 1] += "|";
      at += 1;
      continue;
    }
    if (row[at] === "`") inCode = !inCode;
    if (row[at] === "|" && !inCode) out.push("");
    else out[out.length - 1] += row[at];
  }
  return out.map((cell) => cell.trim());
}

/** A block's element. */
function renderBlock(block) {
  switch (block.type) {
    case "heading":
      // The page has headings of its own: an answer's begin below them.
      return h(`h${Math.min(block.level + 2, 6)}`, { class: `heading-${block.level}` }, ...renderText(block.text));
    case "rule":
      return h("hr");
    case "quote":
      return h("blockquote", {}, ...block.blocks.map(renderBlock));
    case "list":
      return renderList(block);
    case "code":
      return renderCode(block);
    case "table":
      return renderTable(block);
    default:
      return h("p", {}, ...renderText(block.text));
  }
}

function renderList({ ordered, start, items, isLoose }) {
  const renderItem = ({ blocks, task }) => {
    const inner = blocks.flatMap((block) => (block.type === "paragraph" && !isLoose ? renderText(block.text) : [renderBlock(block)]));
    const box = task && h("input", { type: "checkbox", disabled: true, checked: task === "done", "aria-label": task === "done" ? "done" : "open" });
    return h("li", { class: task ? "task" : null }, box, ...inner);
  };
  return h(ordered ? "ol" : "ul", { start: ordered && start !== 1 ? start : null }, ...items.map(renderItem));
}

function renderCode({ language, text }) {
  const name = language || "text";
  const code = h("code", {}, ...highlight(text, language.toLowerCase()));
  const pre = h("pre", { tabindex: "0", role: "group", "aria-label": `Code, ${name}` }, code);
  return h("div", { class: "code-block" }, h("div", { class: "code-head" }, h("span", {}, name), copyButton("Copy the code", () => text)), pre);
}

function renderTable({ head, align, rows }) {
  const row = (tag) => (row) => h("tr", {}, ...row.map((cell, i) => h(tag, { scope: tag === "th" ? "col" : null, class: align[i] }, ...renderText(cell))));
  const table = h("table", {}, h("thead", {}, row("th")(head)), h("tbody", {}, ...rows.map(row("td"))));
  return h("div", { class: "table-block", tabindex: "0", role: "group", "aria-label": "Table" }, table);
}

const renderText = (text) => parseInline(text).map(renderNode);

function renderNode(node) {
  switch (node.type) {
    case "text":
      return document.createTextNode(node.text);
    case "break":
      return h("br");
    case "code":
      return h("code", {}, node.text);
    case "link":
      return h("a", { href: node.address, target: "_blank", rel: "noopener noreferrer nofollow", title: node.address }, ...node.children.map(renderNode));
    default:
      return h(node.type, {}, ...node.children.map(renderNode));
  }
}

/** An element with the blocks of a text that grows: those that stay as they were keep their elements. */
export class MarkdownView {
  constructor() {
    this.element = h("div", { class: "markdown" });
    this.shown = [];
  }

  /** Shows a text; gives the texts of blocks that are new and will not change any more. */
  update(text, isFinished) {
    const blocks = parseBlocks(text);
    let same = 0;
    while (same < blocks.length && same < this.shown.length && isSame(blocks[same], this.shown[same].block)) same += 1;
    for (const { element } of this.shown.splice(same)) element.remove();
    for (const block of blocks.slice(same)) {
      const element = renderBlock(block);
      this.element.append(element);
      this.shown.push({ block, element, isSaid: false });
    }
    const finished = isFinished ? this.shown : this.shown.slice(0, -1);
    const said = finished.filter((shown) => !shown.isSaid);
    for (const shown of said) shown.isSaid = true;
    return said.map((shown) => shown.element.textContent);
  }
}

const isSame = (a, b) => a.type === b.type && a.source === b.source;
