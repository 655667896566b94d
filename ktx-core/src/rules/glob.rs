//! Globs on module paths: `model.layers.{3..9}.mlp.experts`.

use fancy_regex::{Regex, RegexBuilder};
use ktx_ops::Location;

use super::error::RuleError;

/// Characters that a glob may have.
const LENGTH_LIMIT: usize = 2_000;
/// Numbers that a range may stand for.
const RANGE_LIMIT: u32 = 4_096;
/// Bytes that a compiled glob may take.
const SIZE_LIMIT: usize = 1 << 22;
/// Alternatives may not nest deeper.
const MAX_DEPTH: usize = 8;

/// A glob on a whole module path, its components separated by dots.
///
/// `*` stands for any characters within a component, `?` for one, `**` as a component for any number of
/// components, `{a,b}` for one of several, `{3..9}` for one of these numbers, `[0-9]` and `[!0-9]` for one
/// character. A glob never matches the root, whose path is empty.
#[derive(Debug, Clone)]
pub struct Glob {
    text: String,
    location: Location,
    regex: Regex,
}

/// Why a glob is none: the character, from 0, and what is wrong there.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BadGlob {
    pub character: usize,
    pub reason: String,
}

impl BadGlob {
    fn new(character: usize, reason: impl Into<String>) -> Self {
        Self {
            character,
            reason: reason.into(),
        }
    }
}

impl Glob {
    pub(crate) fn new(text: &str, location: Location) -> Result<Self, BadGlob> {
        if text.len() > LENGTH_LIMIT {
            return Err(BadGlob::new(
                0,
                format!("it is longer than {LENGTH_LIMIT} bytes"),
            ));
        }
        let translated = Translator::new(text).translate()?;
        let regex = RegexBuilder::new(&translated)
            .delegate_size_limit(SIZE_LIMIT)
            .build()
            .map_err(|_| BadGlob::new(0, "it is too large with its alternatives written out"))?;
        Ok(Self {
            text: text.to_owned(),
            location,
            regex,
        })
    }

    /// The glob as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Where it is written.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Whether the glob matches the whole path of a module.
    ///
    /// # Errors
    /// If the search takes too long.
    pub fn matches(&self, path: &str) -> Result<bool, RuleError> {
        if path.is_empty() {
            return Ok(false);
        }
        self.regex
            .is_match(path)
            .map_err(|_| RuleError::SlowPattern {
                location: self.location.clone(),
                pattern: self.text.clone(),
                path: path.to_owned(),
            })
    }
}

/// Writes a glob as a regular expression that needs no backtracking.
struct Translator {
    chars: Vec<char>,
    at: usize,
    depth: usize,
    out: String,
}

impl Translator {
    fn new(text: &str) -> Self {
        Self {
            chars: text.chars().collect(),
            at: 0,
            depth: 0,
            out: String::new(),
        }
    }

    fn translate(mut self) -> Result<String, BadGlob> {
        if self.chars.is_empty() {
            return Err(BadGlob::new(0, "it is empty; `**` matches every module"));
        }
        self.out.push_str(r"\A(?:");
        while self.at < self.chars.len() {
            self.one()?;
        }
        self.out.push_str(r")\z");
        Ok(self.out)
    }

    fn peek(&self, ahead: usize) -> Option<char> {
        self.chars.get(self.at + ahead).copied()
    }

    fn one(&mut self) -> Result<(), BadGlob> {
        let start = self.at;
        let Some(c) = self.peek(0) else {
            return Ok(());
        };
        match c {
            '*' if self.peek(1) == Some('*') => self.components(),
            '*' => {
                self.at += 1;
                // A component is never empty.
                let alone = self.is_edge(start.checked_sub(1)) && self.is_edge(Some(self.at));
                self.out.push_str(if alone { "[^.]+" } else { "[^.]*" });
                Ok(())
            }
            '?' => {
                self.at += 1;
                self.out.push_str("[^.]");
                Ok(())
            }
            '[' => self.set(),
            '{' => self.alternatives(),
            ']' | '}' => Err(BadGlob::new(start, format!("`{c}` closes nothing"))),
            '\\' | '^' | '$' | '(' | ')' | '|' | '+' => Err(BadGlob::new(
                start,
                format!("`{c}` means nothing in a glob; a regular expression belongs into `name`"),
            )),
            c => {
                self.at += 1;
                self.literal(c);
                Ok(())
            }
        }
    }

    fn literal(&mut self, c: char) {
        if !c.is_ascii_alphanumeric() && c != '_' && c.is_ascii() {
            self.out.push('\\');
        }
        self.out.push(c);
    }

    /// Whether a component begins or ends at this index: a dot or an end of the glob is there.
    fn is_edge(&self, index: Option<usize>) -> bool {
        index
            .and_then(|i| self.chars.get(i))
            .is_none_or(|c| *c == '.')
    }

    /// `**`, which is a component of its own.
    fn components(&mut self) -> Result<(), BadGlob> {
        let start = self.at;
        self.at += 2;
        if self.depth > 0 || !self.is_edge(start.checked_sub(1)) || !self.is_edge(Some(self.at)) {
            return Err(BadGlob::new(
                start,
                "`**` stands for whole components: write it between dots, as in `model.**.experts`",
            ));
        }
        if self.at < self.chars.len() {
            // With its dot, any number of components, none included.
            self.at += 1;
            self.out.push_str(r"(?:[^.]+\.)*");
        } else {
            self.out.push_str(r"[^.]+(?:\.[^.]+)*");
        }
        Ok(())
    }

    /// `[0-9a]`, `[!0-9]`
    fn set(&mut self) -> Result<(), BadGlob> {
        let start = self.at;
        self.at += 1;
        let negated = self.peek(0) == Some('!');
        self.at += usize::from(negated);
        self.out.push_str(if negated { r"[^\." } else { "[" });
        let mut members = 0;
        loop {
            let Some(c) = self.peek(0) else {
                return Err(BadGlob::new(start, "this bracket is never closed"));
            };
            self.at += 1;
            match c {
                ']' if members > 0 => break,
                c if c.is_alphanumeric() || c == '_' => {
                    self.out.push(c);
                    let end = self.peek(1).filter(|e| e.is_alphanumeric());
                    if let (Some('-'), Some(end)) = (self.peek(0), end) {
                        if end < c {
                            return Err(BadGlob::new(self.at - 1, "this range runs backwards"));
                        }
                        self.out.push('-');
                        self.out.push(end);
                        self.at += 2;
                    }
                }
                c => {
                    return Err(BadGlob::new(
                        self.at - 1,
                        format!("brackets hold letters, digits and `_`, not `{c}`"),
                    ));
                }
            }
            members += 1;
        }
        self.out.push(']');
        Ok(())
    }

    /// `{a,b}` or `{3..9}`
    fn alternatives(&mut self) -> Result<(), BadGlob> {
        let start = self.at;
        self.at += 1;
        if self.depth >= MAX_DEPTH {
            return Err(BadGlob::new(
                start,
                format!("braces are nested deeper than {MAX_DEPTH}"),
            ));
        }
        if let Some(range) = self.range(start)? {
            self.out.push_str(&range);
            return Ok(());
        }
        self.depth += 1;
        self.out.push_str("(?:");
        loop {
            match self.peek(0) {
                None => return Err(BadGlob::new(start, "this brace is never closed")),
                Some('}') => break,
                Some(',') => {
                    self.at += 1;
                    self.out.push('|');
                }
                Some(_) => self.one()?,
            }
        }
        self.at += 1;
        self.depth -= 1;
        self.out.push(')');
        Ok(())
    }

    /// The numbers of `3..9}`, as alternatives; none if this is no range.
    fn range(&mut self, start: usize) -> Result<Option<String>, BadGlob> {
        let inner: String = self.chars[self.at..]
            .iter()
            .take_while(|c| !matches!(c, '{' | ',' | '}'))
            .collect();
        let Some((low, high)) = inner.split_once("..") else {
            return Ok(None);
        };
        let number = |text: &str| {
            let plain =
                text.bytes().all(|b| b.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
            text.parse::<u32>().ok().filter(|_| plain)
        };
        let (Some(low), Some(high)) = (number(low), number(high)) else {
            return Err(BadGlob::new(
                start,
                format!("`{{{inner}}}` is no range of numbers such as `{{3..9}}`"),
            ));
        };
        if high < low || high - low >= RANGE_LIMIT {
            return Err(BadGlob::new(
                start,
                format!("a range runs upwards and holds at most {RANGE_LIMIT} numbers"),
            ));
        }
        self.at += inner.chars().count();
        if self.peek(0) != Some('}') {
            return Err(BadGlob::new(
                start,
                "a range stands alone in its braces, which are closed: `{1,{3..9}}`",
            ));
        }
        self.at += 1;
        let numbers: Vec<String> = (low..=high).map(|n| n.to_string()).collect();
        Ok(Some(format!("(?:{})", numbers.join("|"))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn glob(text: &str) -> Result<Glob, BadGlob> {
        let location = Location {
            file: "r.yaml".into(),
            line: 1,
            column: 1,
        };
        Glob::new(text, location)
    }

    #[test]
    fn a_glob_matches_whole_paths_component_by_component() {
        let path = "model.layers.12.mlp.experts";
        for (text, wanted) in [
            ("model.layers.*.mlp.experts", true),
            ("model.layers.12.mlp.experts", true),
            ("layers.*.mlp.experts", false),
            ("model.layers.*.mlp", false),
            ("model.layers.*", false),
            ("model.layers.**", true),
            ("**.experts", true),
            ("**.mlp.**", true),
            ("model.**.layers.**.experts", true),
            ("model.layers.12.mlp.experts.**", false),
            ("**", true),
            ("*", false),
            ("model.layers.1*.mlp.exp*", true),
            ("model.layers.1?.mlp.experts", true),
            ("model.layers.?.mlp.experts", false),
            ("model.layers.{3..9}.mlp.experts", false),
            ("model.layers.{3..12}.mlp.experts", true),
            ("model.layers.{1,12,3}.{mlp,moe}.experts", true),
            ("model.layers.{1{0..5},7}.mlp.experts", true),
            ("model.layers.1[0-2].mlp.experts", true),
            ("model.layers.1[!0-2].mlp.experts", false),
            ("model?layers.12.mlp.experts", false),
        ] {
            assert_eq!(glob(text).unwrap().matches(path).unwrap(), wanted, "{text}");
        }
    }

    #[test]
    fn the_root_is_matched_by_no_glob() {
        for text in ["**", "*", "{a,}"] {
            assert!(!glob(text).unwrap().matches("").unwrap(), "{text}");
        }
    }

    #[test]
    fn what_is_no_glob_is_refused_where_it_goes_wrong() {
        for (text, character) in [
            ("", 0),
            (r"^model\.layers", 0),
            ("model.**x", 6),
            ("model.{a,**}", 9),
            ("model.{a,b", 6),
            ("model.{9..3}", 6),
            ("model.{03..5}", 6),
            ("model.{0..99999}", 6),
            ("model.{1..3,7}", 6),
            ("model.{1..3", 6),
            ("model.[a", 6),
            ("model.[z-a]", 7),
            ("model.a]", 7),
            ("a.b}", 3),
            ("model.(a|b)", 6),
        ] {
            assert_eq!(glob(text).unwrap_err().character, character, "{text}");
        }
    }
}
