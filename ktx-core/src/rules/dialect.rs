//! Translation of Python's regular expressions (`re`) into those of `fancy-regex`.
//!
//! Rule files are written for Python. Most of the two dialects is the same; this reads a pattern by
//! Python's grammar, says what Python would refuse and where, and writes every part in a form that
//! means the same in the other dialect. Subjects are module paths, which hold no line break, so `$`
//! and `\Z` are both the end, and `re.MULTILINE` and `re.DOTALL` change nothing.

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

    fn literal(c: char) -> Self {
        let mut text = String::new();
        push_literal(&mut text, c);
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

    /// `(?imsxau)` in front of the pattern, as often as it comes.
    fn global_flags(&mut self) -> Outcome<()> {
        loop {
            let start = self.at;
            if !self.take_all("(?") {
                return Ok(());
            }
            let letters = self.flag_letters();
            if letters.is_empty() || !self.take(')') {
                self.at = start;
                return Ok(());
            }
            self.set_flags(start + 2, &letters, true)?;
        }
    }

    fn flag_letters(&mut self) -> String {
        let mut letters = String::new();
        while let Some(c) = self.peek().filter(char::is_ascii_alphabetic) {
            letters.push(c);
            self.at += 1;
        }
        letters
    }

    fn set_flags(&mut self, offset: usize, letters: &str, on: bool) -> Outcome<()> {
        for (i, letter) in letters.chars().enumerate() {
            match letter {
                'i' => self.flags.ignore_case = on,
                'x' => self.flags.verbose = on,
                'm' | 's' => {}
                'a' | 'u' if !on => {
                    return Err(self.error(offset + i, "the flags `a` and `u` cannot be turned off"));
                }
                'a' => self.flags.ascii = true,
                'u' => self.flags.ascii = false,
                'L' => return Err(self.error(offset + i, "the flag `L` is for patterns of bytes")),
                other => return Err(self.error(offset + i, &format!("there is no flag `{other}`"))),
            }
        }
        Ok(())
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
                    None => Item::literal(c),
                },
                other => Item::literal(other),
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
        let width = item.width.times(
            min,
            max.unwrap_or(if item.width.max == 0 { 0 } else { u32::MAX }),
        );
        Ok(Item {
            text,
            width,
            kind: Kind::Repeated,
        })
    }

    /// What follows `(`; none for a comment.
    fn group(&mut self, start: usize) -> Outcome<Option<Item>> {
        if !self.take('?') {
            return self.capture(start, None).map(Some);
        }
        let Some(c) = self.peek() else {
            return Err(self.error(self.at, "the pattern ends inside `(?`"));
        };
        self.at += 1;
        match c {
            ':' => self.bracketed(start, "(?:").map(Some),
            '>' => self.bracketed(start, "(?>").map(Some),
            '=' => self.look_ahead(start, "(?=").map(Some),
            '!' => self.look_ahead(start, "(?!").map(Some),
            '<' => self.look_behind(start).map(Some),
            'P' => self.named(start).map(Some),
            '(' => self.conditional(start).map(Some),
            '#' => self.comment(start),
            c if c == '-' || c.is_ascii_alphabetic() => {
                self.at -= 1;
                self.scoped_flags(start).map(Some)
            }
            other => Err(self.error(
                start + 1,
                &format!("`(?{other}` is no group that Python knows"),
            )),
        }
    }

    fn close(&mut self, start: usize) -> Outcome<()> {
        if self.take(')') {
            Ok(())
        } else {
            Err(self.error(start, "this parenthesis is never closed"))
        }
    }

    /// The inside of a group, in which flags may change, and its end.
    fn inside(&mut self, start: usize) -> Outcome<(String, Width)> {
        let flags = self.flags;
        let inner = self.alternation()?;
        self.flags = flags;
        self.close(start)?;
        Ok(inner)
    }

    fn bracketed(&mut self, start: usize, open: &str) -> Outcome<Item> {
        let (inner, width) = self.inside(start)?;
        Ok(Item::atom(format!("{open}{inner})"), width))
    }

    fn look_ahead(&mut self, start: usize, open: &str) -> Outcome<Item> {
        let (inner, _) = self.inside(start)?;
        Ok(Item::atom(format!("{open}{inner})"), Width::ZERO))
    }

    fn look_behind(&mut self, start: usize) -> Outcome<Item> {
        let open = match self.peek() {
            Some('=') => "(?<=",
            Some('!') => "(?<!",
            _ => {
                return Err(self.error(
                    start + 1,
                    "`(?<` starts a look-behind, `(?<=` or `(?<!`; a named group is `(?P<name>`",
                ));
            }
        };
        self.at += 1;
        let (inner, width) = self.inside(start)?;
        if width.min != width.max {
            return Err(self.error(
                start,
                "a look-behind must match a fixed number of characters",
            ));
        }
        Ok(Item::atom(format!("{open}{inner})"), Width::ZERO))
    }

    fn capture(&mut self, start: usize, name: Option<String>) -> Outcome<Item> {
        let index = self.groups.len();
        self.groups.push(Group { name, width: None });
        let (inner, width) = self.inside(start)?;
        self.groups[index].width = Some(width);
        Ok(Item::atom(format!("({inner})"), width))
    }

    fn named(&mut self, start: usize) -> Outcome<Item> {
        if self.take('<') {
            let at = self.at;
            let name = self.name('>')?;
            if self.groups.iter().any(|g| g.name.as_deref() == Some(&name)) {
                return Err(self.error(at, &format!("a second group is named `{name}`")));
            }
            return self.capture(start, Some(name));
        }
        if self.take('=') {
            let at = self.at;
            let name = self.name(')')?;
            let index = self.group_named(at, &name)?;
            return self.reference(at, index);
        }
        Err(self.error(start + 1, "after `(?P` comes `<name>` or `=name`"))
    }

    fn name(&mut self, end: char) -> Outcome<String> {
        let start = self.at;
        while self.peek().is_some_and(|c| c != end) {
            self.at += 1;
        }
        let name: String = self.chars[start..self.at].iter().collect();
        if !self.take(end) {
            return Err(self.error(start, &format!("a group's name ends with `{end}`")));
        }
        let mut letters = name.chars();
        let first = letters
            .next()
            .is_some_and(|c| c == '_' || c.is_alphabetic());
        if !first || !letters.all(|c| c == '_' || c.is_alphanumeric()) {
            return Err(self.error(start, &format!("`{name}` cannot name a group")));
        }
        Ok(name)
    }

    fn group_named(&self, offset: usize, name: &str) -> Outcome<usize> {
        match self
            .groups
            .iter()
            .position(|g| g.name.as_deref() == Some(name))
        {
            Some(index) => Ok(index + 1),
            None => Err(self.error(offset, &format!("no group is named `{name}`"))),
        }
    }

    /// The text that group `index`, counted from 1, matched before.
    fn reference(&self, offset: usize, index: usize) -> Outcome<Item> {
        match self.groups.get(index.wrapping_sub(1)) {
            None => Err(self.error(offset, &format!("there is no group {index}"))),
            Some(Group { width: None, .. }) => {
                Err(self.error(offset, &format!("group {index} is still open here")))
            }
            Some(Group {
                width: Some(width), ..
            }) => Ok(Item::atom(format!(r"(?:\{index})"), *width)),
        }
    }

    /// `(?(1)yes|no)`
    fn conditional(&mut self, start: usize) -> Outcome<Item> {
        let at = self.at;
        let digits = self.number();
        let group = if !digits.is_empty() && self.take(')') {
            digits
                .parse::<usize>()
                .ok()
                .filter(|&n| n > 0)
                .ok_or_else(|| self.error(at, "there is no such group"))?
        } else {
            self.at = at;
            let name = self.name(')')?;
            self.group_named(at, &name)?
        };
        self.conditions.push((at, group));
        let flags = self.flags;
        let (yes, yes_width) = self.sequence()?;
        let (no, no_width) = if self.take('|') {
            self.sequence()?
        } else {
            (String::new(), Width::ZERO)
        };
        self.flags = flags;
        if self.peek() == Some('|') {
            return Err(self.error(self.at, "a condition has two branches, not more"));
        }
        self.close(start)?;
        Ok(Item::atom(
            format!("(?({group})(?:{yes})|(?:{no}))"),
            yes_width.or(no_width),
        ))
    }

    fn comment(&mut self, start: usize) -> Outcome<Option<Item>> {
        while self.peek().is_some_and(|c| c != ')') {
            self.at += 1;
        }
        self.close(start).map(|()| None)
    }

    /// `(?i-x:…)`
    fn scoped_flags(&mut self, start: usize) -> Outcome<Item> {
        let outer = self.flags;
        let at = self.at;
        let on = self.flag_letters();
        if self.peek() == Some(')') {
            return Err(self.error(start, "flags for the whole pattern belong at its start"));
        }
        self.set_flags(at, &on, true)?;
        if self.take('-') {
            let at = self.at;
            let off = self.flag_letters();
            if off.is_empty() {
                return Err(self.error(at, "after `-` comes a flag"));
            }
            self.set_flags(at, &off, false)?;
        }
        if !self.take(':') {
            return Err(self.error(self.at, "after a group's flags comes `:`"));
        }
        let open = if self.flags.ignore_case {
            "(?i:"
        } else {
            "(?-i:"
        };
        let item = self.bracketed(start, open);
        self.flags = outer;
        item
    }

    /// What follows a backslash outside of a set.
    fn escape(&mut self, start: usize) -> Outcome<Item> {
        let Some(c) = self.peek() else {
            return Err(self.error(start, "a backslash at the end"));
        };
        match c {
            'A' => Ok(self.place(r"\A")),
            'Z' => Ok(self.place(r"\z")),
            'b' => Ok(self.boundary(true)),
            'B' => Ok(self.boundary(false)),
            '1'..='9' => self.reference_or_octal(start),
            _ => match self.class_escape(c) {
                Some(class) => Ok(Item::atom(format!("[{class}]"), Width::ONE)),
                None => self.character_escape(start).map(Item::literal),
            },
        }
    }

    fn place(&mut self, text: &str) -> Item {
        self.at += 1;
        Item::place(text)
    }

    /// `\b` and `\B`. Python's `\B` does not match the empty text.
    fn boundary(&mut self, inside: bool) -> Item {
        self.place(match (inside, self.flags.ascii) {
            (true, false) => r"\b",
            (false, false) => r"(?:(?!\A\z)\B)",
            (true, true) => "(?:(?<=[0-9A-Za-z_])(?![0-9A-Za-z_])|(?<![0-9A-Za-z_])(?=[0-9A-Za-z_]))",
            (false, true) => {
                r"(?:(?!\A\z)(?:(?<=[0-9A-Za-z_])(?=[0-9A-Za-z_])|(?<![0-9A-Za-z_])(?![0-9A-Za-z_])))"
            }
        })
    }

    /// `\1`, `\12`, or three octal digits.
    fn reference_or_octal(&mut self, start: usize) -> Outcome<Item> {
        let digit = |t: &Self, i: usize| t.chars.get(t.at + i).and_then(|c| c.to_digit(10));
        let (first, second, third) = (digit(self, 0), digit(self, 1), digit(self, 2));
        if let (Some(a @ 0..=7), Some(b @ 0..=7), Some(c @ 0..=7)) = (first, second, third) {
            self.at += 3;
            let code = a * 64 + b * 8 + c;
            return match char::from_u32(code).filter(|_| code <= 0o377) {
                Some(c) => Ok(Item::literal(c)),
                None => Err(self.error(start, "an octal escape above 377")),
            };
        }
        let digits: Vec<u32> = [first, second].into_iter().map_while(|d| d).collect();
        self.at += digits.len();
        let index = digits.iter().fold(0, |n, d| n * 10 + *d as usize);
        self.reference(start, index)
    }

    /// The inside of a set for `\d`, `\w`, `\s` and their opposites; takes the letter.
    fn class_escape(&mut self, c: char) -> Option<&'static str> {
        let class = match (c, self.flags.ascii) {
            ('d', false) => r"\d",
            ('D', false) => r"\D",
            ('w', false) => r"\w",
            ('W', false) => r"\W",
            ('s', false) => r"\s\x1c-\x1f",
            ('S', false) => r"[^\s\x1c-\x1f]",
            ('d', true) => "0-9",
            ('D', true) => "[^0-9]",
            ('w', true) => "0-9A-Za-z_",
            ('W', true) => "[^0-9A-Za-z_]",
            ('s', true) => r"\t-\r\x20",
            ('S', true) => r"[^\t-\r\x20]",
            _ => return None,
        };
        self.at += 1;
        Some(class)
    }

    /// One character behind a backslash, in or outside of a set.
    fn character_escape(&mut self, start: usize) -> Outcome<char> {
        let Some(c) = self.peek() else {
            return Err(self.error(start, "a backslash at the end"));
        };
        self.at += 1;
        Ok(match c {
            'a' => '\u{7}',
            'f' => '\u{c}',
            'n' => '\n',
            'r' => '\r',
            't' => '\t',
            'v' => '\u{b}',
            'x' => self.hexadecimal(start, 2)?,
            'u' => self.hexadecimal(start, 4)?,
            'U' => self.hexadecimal(start, 8)?,
            'N' => {
                return Err(self.error(
                    start,
                    r"characters by name, `\N{…}`, cannot be used here; write the character",
                ));
            }
            '0'..='7' => {
                self.at -= 1;
                self.octal(start)?
            }
            c if c.is_ascii_alphanumeric() => {
                return Err(self.error(start, &format!(r"`\{c}` is no escape that Python knows")));
            }
            other => other,
        })
    }

    fn hexadecimal(&mut self, start: usize, digits: usize) -> Outcome<char> {
        let mut code = 0u32;
        for _ in 0..digits {
            let Some(digit) = self.peek().and_then(|c| c.to_digit(16)) else {
                return Err(self.error(
                    start,
                    &format!("this escape takes {digits} hexadecimal digits"),
                ));
            };
            code = code.wrapping_mul(16).wrapping_add(digit);
            self.at += 1;
        }
        char::from_u32(code).ok_or_else(|| self.error(start, "there is no such character"))
    }

    fn octal(&mut self, start: usize) -> Outcome<char> {
        let mut code = 0u32;
        for _ in 0..3 {
            let Some(digit) = self.peek().and_then(|c| c.to_digit(8)) else {
                break;
            };
            code = code * 8 + digit;
            self.at += 1;
        }
        char::from_u32(code)
            .filter(|_| code <= 0o377)
            .ok_or_else(|| self.error(start, "an octal escape above 377"))
    }

    /// `[…]`
    fn set(&mut self, start: usize) -> Outcome<Item> {
        let mut text = String::from(if self.take('^') { "[^" } else { "[" });
        let first = self.at;
        loop {
            let at = self.at;
            let Some(c) = self.peek() else {
                return Err(self.error(start, "this set is never closed"));
            };
            if c == ']' && at > first {
                self.at += 1;
                text.push(']');
                return Ok(Item::atom(text, Width::ONE));
            }
            let low = self.set_member()?;
            let ranged =
                self.peek() == Some('-') && self.chars.get(self.at + 1).is_some_and(|&c| c != ']');
            if !ranged {
                low.push_to(&mut text);
                continue;
            }
            self.at += 1;
            match (low, self.set_member()?) {
                (Member::One(low), Member::One(high)) if low <= high => {
                    push_literal(&mut text, low);
                    text.push('-');
                    push_literal(&mut text, high);
                }
                _ => {
                    return Err(
                        self.error(at, "this range of characters runs backwards or has no end")
                    );
                }
            }
        }
    }

    fn set_member(&mut self) -> Outcome<Member> {
        let start = self.at;
        let Some(c) = self.peek() else {
            return Err(self.error(start, "this set is never closed"));
        };
        self.at += 1;
        if c != '\\' {
            return Ok(Member::One(c));
        }
        let Some(escaped) = self.peek() else {
            return Err(self.error(start, "a backslash at the end"));
        };
        if escaped == 'b' {
            self.at += 1;
            return Ok(Member::One('\u{8}'));
        }
        match self.class_escape(escaped) {
            Some(class) => Ok(Member::Class(class)),
            None => self.character_escape(start).map(Member::One),
        }
    }
}

enum Member {
    One(char),
    Class(&'static str),
}

impl Member {
    fn push_to(&self, text: &mut String) {
        match self {
            Self::One(c) => push_literal(text, *c),
            Self::Class(class) => text.push_str(class),
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
