// Markdown within a line: emphasis, code, links. The result is a list of nodes, which are no markup:
// { type: "text" | "code" | "break" | "em" | "strong" | "del" | "link", … }.

/** Longer paragraphs are shown as they are: no answer is written so, and work must stay bounded. */
const MAX_LENGTH = 50_000;
/** Brackets within brackets at most. */
const MAX_BRACKETS = 32;

const PUNCTUATION = /[!-/:-@[-`{-~\p{P}\p{S}]/u;
const SPACE = /\s/;

/** Nodes of a text. */
export function parseInline(text) {
  return text.length > MAX_LENGTH ? [plain(text)] : new Inline(text).parse();
}

const plain = (text) => ({ type: "text", text });

class Inline {
  constructor(text) {
    this.text = text;
    this.at = 0;
    this.nodes = [];
    /** Runs of `*`, `_` and `~` that may open or close emphasis. */
    this.runs = [];
    /** Open brackets: places in `nodes` and `runs`. */
    this.brackets = [];
    /** Lengths of backquote runs that are known to be closed nowhere. */
    this.unclosed = new Set();
  }

  parse() {
    while (this.at < this.text.length) this.step();
    this.pairRuns(0);
    return merged(this.nodes);
  }

  step() {
    const { text, at } = this;
    const character = text[at];
    const next = text[at + 1] ?? "";
    if (character === "\\" && next !== "" && (next === "\n" || /[!-/:-@[-`{-~]/.test(next))) {
      this.push(next === "\n" ? { type: "break" } : plain(next), 2);
    } else if (character === "\n") {
      this.push({ type: "break" }, 1);
    } else if (character === "`") {
      this.code();
    } else if (character === "*" || character === "_" || (character === "~" && next === "~")) {
      this.run(character);
    } else if (character === "!" && next === "[") {
      this.bracket(2);
    } else if (character === "[") {
      this.bracket(1);
    } else if (character === "]") {
      this.closeBracket();
    } else if (character === "<") {
      this.angle();
    } else if (character === "h" && this.isWordStart()) {
      this.bareLink();
    } else {
      this.plainRun();
    }
  }

  push(node, length) {
    this.nodes.push(node);
    this.at += length;
  }

  /** Text up to the next character that may mean something. */
  plainRun() {
    const special = /[\\\n`*_~![\]<h]/g;
    special.lastIndex = this.at + 1;
    const found = special.exec(this.text);
    const end = found ? found.index : this.text.length;
    this.push(plain(this.text.slice(this.at, end)), end - this.at);
  }

  isWordStart() {
    return this.at === 0 || !/[\p{L}\p{N}]/u.test(this.text[this.at - 1]);
  }

  code() {
    const length = /^`+/.exec(this.text.slice(this.at))[0].length;
    const end = this.unclosed.has(length) ? -1 : this.findBackquotes(length, this.at + length);
    if (end < 0) {
      this.unclosed.add(length);
      this.push(plain("`".repeat(length)), length);
      return;
    }
    let inner = this.text.slice(this.at + length, end).replace(/\n/g, " ");
    if (/^ .*[^ ].* $/.test(inner) || /^ [^ ] $/.test(inner)) inner = inner.slice(1, -1);
    this.push({ type: "code", text: inner }, end + length - this.at);
  }

  findBackquotes(length, from) {
    const runs = /`+/g;
    runs.lastIndex = from;
    for (let found = runs.exec(this.text); found; found = runs.exec(this.text)) {
      if (found[0].length === length) return found.index;
    }
    return -1;
  }

  /** Emphasis opens before and closes behind what is no space, and `_` not within words. */
  run(character) {
    const { text, at } = this;
    let end = at;
    while (text[end] === character) end += 1;
    const [before, after] = [text[at - 1] ?? " ", text[end] ?? " "];
    const left = !SPACE.test(after) && (!PUNCTUATION.test(after) || SPACE.test(before) || PUNCTUATION.test(before));
    const right = !SPACE.test(before) && (!PUNCTUATION.test(before) || SPACE.test(after) || PUNCTUATION.test(after));
    const inWord = character === "_" && left && right;
    this.runs.push({
      character,
      node: this.nodes.length,
      count: end - at,
      opens: left && (!inWord || PUNCTUATION.test(before)),
      closes: right && (!inWord || PUNCTUATION.test(after)),
    });
    this.push(plain(text.slice(at, end)), end - at);
  }

  /** Pairs runs from the inside to the outside, as CommonMark does. */
  pairRuns(bottom) {
    const { runs } = this;
    /** Below these places, no opener of a kind is left: the search stays short. */
    const floor = {};
    for (let closer = bottom; closer < runs.length; closer += 1) {
      const close = runs[closer];
      while (close.closes && close.count > 0) {
        const kind = close.character + (close.count % 3) + close.opens;
        const opener = this.findOpener(closer, Math.max(bottom, floor[kind] ?? bottom));
        if (opener < 0) {
          floor[kind] = closer;
          break;
        }
        this.wrap(opener, closer);
      }
    }
    runs.length = bottom;
  }

  findOpener(closer, bottom) {
    const close = this.runs[closer];
    for (let at = closer - 1; at >= bottom; at -= 1) {
      const open = this.runs[at];
      if (open.character !== close.character || !open.opens || open.count === 0) continue;
      if (close.character === "~") {
        if (open.count >= 2 && close.count >= 2) return at;
        continue;
      }
      const isOdd = (open.closes || close.opens) && (open.count + close.count) % 3 === 0 && (open.count % 3 !== 0 || close.count % 3 !== 0);
      if (!isOdd) return at;
    }
    return -1;
  }

  /** Puts what stands between two runs into a node of its own. */
  wrap(opener, closer) {
    const { runs, nodes } = this;
    const [open, close] = [runs[opener], runs[closer]];
    const isPair = open.count >= 2 && close.count >= 2;
    const length = isPair ? 2 : 1;
    const type = open.character === "~" ? "del" : isPair ? "strong" : "em";
    for (const run of [open, close]) {
      run.count -= length;
      nodes[run.node] = plain(run.character.repeat(run.count));
    }
    // Places stay as they are, so that runs further on keep theirs.
    const inner = nodes.slice(open.node + 1, close.node);
    nodes.fill(plain(""), open.node + 1, close.node);
    if (inner.length > 0) nodes[open.node + 1] = { type, children: merged(inner) };
    for (const run of runs.slice(opener + 1, closer)) run.count = 0;
  }

  bracket(length) {
    if (this.brackets.length >= MAX_BRACKETS) this.brackets.shift();
    this.brackets.push({ node: this.nodes.length, runs: this.runs.length, isImage: length === 2 });
    this.push(plain(this.text.slice(this.at, this.at + length)), length);
  }

  closeBracket() {
    const open = this.brackets.pop();
    const target = open && /^\]\(\s*(?:<([^<>\n]{0,2000})>|([^\s()<>]{0,2000}(?:\([^\s()<>]{0,2000}\)[^\s()<>]{0,2000}){0,8}))(?:\s+(?:"[^"]{0,500}"|'[^']{0,500}'))?\s*\)/.exec(this.text.slice(this.at, this.at + 8000));
    if (!target) {
      this.push(plain("]"), 1);
      return;
    }
    this.pairRuns(open.runs);
    const children = merged(this.nodes.splice(open.node).slice(1));
    // Nothing is loaded from elsewhere: of a picture, its text is shown as a link to it.
    this.push(link(target[1] ?? target[2] ?? "", children, open.isImage), target[0].length);
    // Links do not hold links.
    if (!open.isImage) this.brackets = this.brackets.filter((bracket) => bracket.isImage);
  }

  angle() {
    const found = /^<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/i.exec(this.text.slice(this.at, this.at + 2100));
    if (found) this.push(link(found[1], [plain(found[1])]), found[0].length);
    else this.push(plain("<"), 1);
  }

  bareLink() {
    const found = /^https?:\/\/[^\s<>`"]{1,2000}/.exec(this.text.slice(this.at, this.at + 2100));
    if (!found) {
      this.plainRun();
      return;
    }
    const address = withoutEnd(found[0]);
    this.push(link(address, [plain(address)]), address.length);
  }
}

/** Without the punctuation that belongs to the sentence around an address. */
function withoutEnd(address) {
  let end = address.replace(/[.,:;!?'*_~\]]+$/, "");
  while (end.endsWith(")") && count(end, ")") > count(end, "(")) end = end.slice(0, -1).replace(/[.,:;!?'*_~]+$/, "");
  return end;
}

const count = (text, character) => text.split(character).length - 1;

/** A link, if its address is one that a click may follow; or else only its text. */
function link(target, children, isImage = false) {
  const text = children.length > 0 ? children : [plain(isImage ? "picture" : target)];
  const address = safeAddress(target);
  return address ? { type: "link", address, children: text } : { type: "span", children: text };
}

/** The address, if it leads to the web or to a mailbox; scripts and data never. */
function safeAddress(target) {
  try {
    const url = new URL(target);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

/** Neighbouring texts as one. */
function merged(nodes) {
  const out = [];
  for (const node of nodes) {
    const last = out.at(-1);
    if (node.type === "text" && last?.type === "text") out[out.length - 1] = plain(last.text + node.text);
    else if (node.type !== "text" || node.text !== "") out.push(node);
  }
  return out;
}
