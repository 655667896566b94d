//! Groups of a pattern: captures, look-arounds, conditions, flags.

use super::{Group, Item, Outcome, Translator, Width};

impl Translator<'_> {
    /// `(?imsxau)` in front of the pattern, as often as it comes.
    pub(super) fn global_flags(&mut self) -> Outcome<()> {
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
                    return Err(
                        self.error(offset + i, "the flags `a` and `u` cannot be turned off")
                    );
                }
                'a' => self.flags.ascii = true,
                'u' => self.flags.ascii = false,
                'L' => return Err(self.error(offset + i, "the flag `L` is for patterns of bytes")),
                other => return Err(self.error(offset + i, &format!("there is no flag `{other}`"))),
            }
        }
        Ok(())
    }

    /// What follows `(`; none for a comment.
    pub(super) fn group(&mut self, start: usize) -> Outcome<Option<Item>> {
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
    pub(super) fn reference(&self, offset: usize, index: usize) -> Outcome<Item> {
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
}
