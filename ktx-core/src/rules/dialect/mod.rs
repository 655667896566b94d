//! Translation of Python's regular expressions (`re`) into those of `fancy-regex`.
//!
//! Rule files are written for Python. Most of the two dialects is the same; this reads a pattern by
//! Python's grammar, says what Python would refuse and where, and writes every part in a form that
//! means the same in the other dialect. Subjects are module paths, which hold no line break, so `$`
//! and `\Z` are both the end, and `re.MULTILINE` and `re.DOTALL` change nothing.

mod escape;
mod group;

/// Why a pattern is none, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DialectError {
    /// Index of the character in the pattern, from 0.
    pub offset: usize,
    /// What is wrong there.
    pub reason: String,
}

type Outcome<T> = Result<T, DialectError>;

/// Groups may not nest deeper.
const MAX_DEPTH: usize = 100;
/// More repetitions than this cannot be asked for.
const MAX_REPEAT: u32 = 100_000;

/// Writes a Python pattern for `fancy-regex`.
pub(crate) fn translate(pattern: &str) -> Outcome<String> {
    let chars: Vec<char> = pattern.chars().collect();
    let mut translator = Translator {
        chars: &chars,
        at: 0,
        depth: 0,
        flags: Flags::default(),
        groups: Vec::new(),
        conditions: Vec::new(),
    };
    translator.global_flags()?;
    let case = translator.flags.ignore_case;
    let (body, _) = translator.alternation()?;
    if translator.at < chars.len() {
        return Err(translator.error(translator.at, "unbalanced parenthesis"));
    }
    for &(offset, group) in &translator.conditions {
        if group > translator.groups.len() {
            return Err(translator.error(offset, &format!("there is no group {group}")));
        }
    }
    Ok(if case { format!("(?i:{body})") } else { body })
}

#[derive(Debug, Clone, Copy, Default)]
struct Flags {
    ignore_case: bool,
    ascii: bool,
    verbose: bool,
}

/// Least and greatest number of characters that a part matches.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Width {
    min: u32,
    max: u32,
}

impl Width {
    const ZERO: Self = Self { min: 0, max: 0 };
    const ONE: Self = Self { min: 1, max: 1 };

    fn then(self, next: Self) -> Self {
        Self {
            min: self.min.saturating_add(next.min),
            max: self.max.saturating_add(next.max),
        }
    }

    fn or(self, other: Self) -> Self {
        Self {
            min: self.min.min(other.min),
            max: self.max.max(other.max),
        }
    }

    fn times(self, min: u32, max: u32) -> Self {
        Self {
            min: self.min.saturating_mul(min),
            max: self.max.saturating_mul(max),
        }
    }
}

struct Group {
    name: Option<String>,
    /// Known once the group is closed.
    width: Option<Width>,
}

#[derive(PartialEq)]
enum Kind {
    Atom,
    /// A place between characters: nothing to repeat.
    Place,
    Repeated,
}

struct Item {
    text: String,
    width: Width,
    kind: Kind,
}

impl Item {
    fn atom(text: impl Into<String>, width: Width) -> Self {
        Self {
            text: text.into(),
            width,
            kind: Kind::Atom,
        }
    }

    fn place(text: impl Into<String>) -> Self {
        Self {
            text: text.into(),
            width: Width::ZERO,
            kind: Kind::Place,
        }
    }

    fn literal(c: char, flags: Flags) -> Self {
        let mut text = String::new();
        push_literal(&mut text, c);
        if flags.ascii && flags.ignore_case {
            let other = if c.is_ascii_lowercase() {
                c.to_ascii_uppercase()
            } else {
                c.to_ascii_lowercase()
            };
            if other != c {
                push_literal(&mut text, other);
                text = format!("[{text}]");
            }
            text = format!("(?-i:{text})");
        }
        Self::atom(text, Width::ONE)
    }
}

struct Translator<'a> {
    chars: &'a [char],
    at: usize,
    depth: usize,
    flags: Flags,
    groups: Vec<Group>,
    /// Groups that conditions asked for: they may be opened later.
    conditions: Vec<(usize, usize)>,
}

impl Translator<'_> {
    fn error(&self, offset: usize, reason: &str) -> DialectError {
        DialectError {
            offset: offset.min(self.chars.len()),
            reason: reason.to_owned(),
        }
    }

    fn peek(&self) -> Option<char> {
        self.chars.get(self.at).copied()
    }

    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found);
        found
    }

    fn take_all(&mut self, wanted: &str) -> bool {
        let found = wanted
            .chars()
            .enumerate()
            .all(|(i, c)| self.chars.get(self.at + i) == Some(&c));
        self.at += if found { wanted.chars().count() } else { 0 };
        found
    }

    /// Branches between `|`, up to `)` or the end.
    fn alternation(&mut self) -> Outcome<(String, Width)> {
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            return Err(self.error(
                self.at,
                &format!("groups are nested deeper than {MAX_DEPTH}"),
            ));
        }
        let (mut text, mut width) = self.sequence()?;
        while self.take('|') {
            let (branch, branch_width) = self.sequence()?;
            text.push('|');
            text.push_str(&branch);
            width = width.or(branch_width);
        }
        self.depth -= 1;
        Ok((text, width))
    }

    fn sequence(&mut self) -> Outcome<(String, Width)> {
        let mut items: Vec<Item> = Vec::new();
        while let Some(c) = self.peek().filter(|c| !matches!(c, '|' | ')')) {
            let start = self.at;
            if self.flags.verbose && self.skip_verbose(c) {
                continue;
            }
            self.at += 1;
            let item = match c {
                '.' => Item::atom(".", Width::ONE),
                '^' => Item::place(r"\A"),
                '$' => Item::place(r"\z"),
                '\\' => self.escape(start)?,
                '[' => self.set(start)?,
                '(' => match self.group(start)? {
                    Some(item) => item,
                    None => continue,
                },
                '*' | '+' | '?' | '{' => match self.repetition(c)? {
                    Some((min, max)) => {
                        let repeated = self.repeated(start, items.pop(), min, max)?;
                        items.push(repeated);
                        continue;
                    }
                    None => Item::literal(c, self.flags),
                },
                other => Item::literal(other, self.flags),
            };
            items.push(item);
        }
        let width = items.iter().fold(Width::ZERO, |w, item| w.then(item.width));
        Ok((items.into_iter().map(|item| item.text).collect(), width))
    }

    /// White space and comments of a pattern under the flag `x`.
    fn skip_verbose(&mut self, c: char) -> bool {
        if c == '#' {
            while self.peek().is_some_and(|c| c != '\n') {
                self.at += 1;
            }
            return true;
        }
        let space = matches!(c, ' ' | '\t' | '\n' | '\r' | '\u{b}' | '\u{c}');
        self.at += usize::from(space);
        space
    }

    /// The bounds after a repetition sign; none if `{` is an ordinary character here.
    fn repetition(&mut self, sign: char) -> Outcome<Option<(u32, Option<u32>)>> {
        match sign {
            '*' => return Ok(Some((0, None))),
            '+' => return Ok(Some((1, None))),
            '?' => return Ok(Some((0, Some(1)))),
            _ => {}
        }
        let start = self.at;
        if self.peek() == Some('}') {
            return Ok(None);
        }
        let low = self.number();
        let high = if self.take(',') {
            self.number()
        } else {
            low.clone()
        };
        if !self.take('}') {
            self.at = start;
            return Ok(None);
        }
        let bound = |digits: &str| match digits.parse::<u32>() {
            Ok(n) if n <= MAX_REPEAT => Ok(n),
            _ => Err(self.error(start, &format!("more than {MAX_REPEAT} repetitions"))),
        };
        let min = if low.is_empty() { 0 } else { bound(&low)? };
        let max = if high.is_empty() {
            None
        } else {
            Some(bound(&high)?)
        };
        if max.is_some_and(|max| max < min) {
            return Err(self.error(
                start,
                "the least number of repetitions is greater than the greatest",
            ));
        }
        Ok(Some((min, max)))
    }

    fn number(&mut self) -> String {
        let mut digits = String::new();
        while let Some(c) = self.peek().filter(char::is_ascii_digit) {
            digits.push(c);
            self.at += 1;
        }
        digits
    }

    fn repeated(
        &mut self,
        start: usize,
        item: Option<Item>,
        min: u32,
        max: Option<u32>,
    ) -> Outcome<Item> {
        let Some(item) = item.filter(|item| item.kind != Kind::Place) else {
            return Err(self.error(start, "nothing to repeat"));
        };
        if item.kind == Kind::Repeated {
            return Err(self.error(start, "a repetition of a repetition"));
        }
        if item.width.max == 0 {
            return Ok(self.repeated_nothing(item, min, max));
        }
        let sign = match (min, max) {
            (0, None) => "*".to_owned(),
            (1, None) => "+".to_owned(),
            (0, Some(1)) => "?".to_owned(),
            (min, None) => format!("{{{min},}}"),
            (min, Some(max)) => format!("{{{min},{max}}}"),
        };
        let inner = item.text;
        let text = if self.take('?') {
            format!("(?:{inner}){sign}?")
        } else if self.take('+') {
            format!("(?>(?:{inner}){sign})")
        } else {
            format!("(?:{inner}){sign}")
        };
        let width = item.width.times(min, max.unwrap_or(u32::MAX));
        Ok(Item {
            text,
            width,
            kind: Kind::Repeated,
        })
    }

    /// A repetition of what takes no characters: once is as good as often. The other dialect has none.
    fn repeated_nothing(&mut self, item: Item, min: u32, max: Option<u32>) -> Item {
        let lazy = self.take('?');
        let possessive = !lazy && self.take('+');
        let inner = item.text;
        let text = match (min, lazy) {
            _ if max == Some(0) => "(?:)".to_owned(),
            (0, true) => format!("(?:|{inner})"),
            (0, false) if possessive => format!("(?>{inner}|)"),
            (0, false) => format!("(?:{inner}|)"),
            _ => format!("(?:{inner})"),
        };
        Item {
            text,
            width: Width::ZERO,
            kind: Kind::Repeated,
        }
    }
}
/// A character that stands for itself, in and outside of sets.
fn push_literal(text: &mut String, c: char) {
    if c.is_ascii_alphanumeric()
        || matches!(
            c,
            '_' | '/' | '"' | '\'' | ',' | ':' | ';' | '=' | '@' | '%' | '`' | '!'
        )
    {
        text.push(c);
    } else if c.is_ascii() {
        text.push_str(&format!(r"\x{:02x}", c as u32));
    } else {
        text.push(c);
    }
}
