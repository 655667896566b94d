// Light colouring of code: comments, texts, numbers and words that many languages share.

const C_LIKE = "break case catch class const continue default do else enum export extends extern false finally fn for func function goto if impl implements import in instanceof interface let loop match mod module mut namespace new nil null operator package private protected pub public return self static struct super switch template this throw trait true try type typedef typename union unsafe use using var virtual void where while with yield async await as int long short char float double bool string byte unsigned signed auto final override abstract val fun when object usize isize u8 u16 u32 u64 i8 i16 i32 i64 f32 f64 str";
const PYTHON = "and as assert async await break class continue def del elif else except False finally for from global if import in is lambda None nonlocal not or pass raise return True try while with yield match case self";
const SHELL = "if then else elif fi for in do done while until case esac function return export local readonly set unset echo cd exit source alias sudo";
const SQL = "select from where and or not insert into values update set delete create table index view drop alter join left right inner outer on group by order having limit offset as distinct union all null is in like between case when then else end primary key references default";

const STRINGS = String.raw`"(?:[^"\\\n]|\\.)*"?|'(?:[^'\\\n]|\\.)*'?`;
const SLASHES = String.raw`\/\/[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`;
const HASH = String.raw`(?<![^\s;])#[^\n]*`;

const c = language(SLASHES, STRINGS + "|`(?:[^`\\\\]|\\\\.)*`?", C_LIKE);
const python = language(HASH, String.raw`"""[\s\S]*?(?:"""|$)|'''[\s\S]*?(?:'''|$)|` + STRINGS, PYTHON);
const shell = language(HASH, STRINGS, SHELL);
const config = language(HASH, STRINGS, "true false null yes no on off");
const sql = language(String.raw`--[^\n]*|\/\*[\s\S]*?(?:\*\/|$)`, STRINGS, `${SQL} ${SQL.toUpperCase()}`);
const markup = language(String.raw`<!--[\s\S]*?(?:-->|$)`, STRINGS, "");
const css = language(String.raw`\/\*[\s\S]*?(?:\*\/|$)`, STRINGS, "");

const LANGUAGES = {
  ...named(c, "c h cpp c++ cc cs csharp cuda cu go java javascript js jsx kotlin kt mjs objc php rs rust scala swift ts tsx typescript zig dart"),
  ...named(python, "py python python3 gd ruby rb r julia jl nim"),
  ...named(shell, "sh bash zsh shell console fish dockerfile makefile make powershell ps1"),
  ...named(config, "yaml yml toml ini conf json jsonc"),
  ...named(sql, "sql sqlite postgresql mysql"),
  ...named(markup, "html xml svg vue"),
  ...named(css, "css scss less"),
};

/** Longer code is not coloured. */
const MAX_LENGTH = 60_000;

function named(language, names) {
  return Object.fromEntries(names.split(" ").map((name) => [name, language]));
}

function language(comment, string, words) {
  const pattern = `(?<comment>${comment})|(?<string>${string})|(?<number>\\b(?:0[xXbBoO][\\da-fA-F_]+|\\d[\\d_]*(?:\\.\\d+)?(?:[eE][+-]?\\d+)?)\\b)|(?<word>[A-Za-z_]\\w*)`;
  return { pattern: new RegExp(pattern, "g"), words: new Set(words.split(" ")) };
}

/** Text nodes and coloured elements of code. */
export function highlight(text, name) {
  const found = Object.hasOwn(LANGUAGES, name) ? LANGUAGES[name] : null;
  if (!found || text.length > MAX_LENGTH) return [document.createTextNode(text)];
  const out = [];
  let end = 0;
  for (const match of text.matchAll(found.pattern)) {
    const kind = kindOf(match, found, text);
    if (!kind) continue;
    if (match.index > end) out.push(document.createTextNode(text.slice(end, match.index)));
    const element = document.createElement("span");
    element.className = `code-${kind}`;
    element.textContent = match[0];
    out.push(element);
    end = match.index + match[0].length;
  }
  out.push(document.createTextNode(text.slice(end)));
  return out;
}

function kindOf({ 0: token, index, groups }, { words }, text) {
  if (groups.word === undefined) return Object.keys(groups).find((kind) => groups[kind] !== undefined);
  if (words.has(token)) return "word";
  return text[index + token.length] === "(" ? "name" : null;
}
