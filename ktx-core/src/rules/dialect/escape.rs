//! Escapes and sets of a pattern.

use super::{Item, Outcome, Translator, Width, push_literal};

impl Translator<'_> {
    /// What follows a backslash outside of a set.
    pub(super) fn escape(&mut self, start: usize) -> Outcome<Item> {
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
                None => self
                    .character_escape(start)
                    .map(|c| Item::literal(c, self.flags)),
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
                Some(c) => Ok(Item::literal(c, self.flags)),
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
    pub(super) fn set(&mut self, start: usize) -> Outcome<Item> {
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
