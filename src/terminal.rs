//! What a terminal is shown and a pipe is not: colours, and lines that are drawn over.

use std::ffi::OsStr;
use std::io::{IsTerminal, Write, stderr, stdout};

/// How a text stands out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Paint {
    Plain,
    Bold,
    Faint,
    Green,
    Yellow,
    Blue,
    Magenta,
    Cyan,
}

impl Paint {
    /// The parameter of the terminal's command "select graphic rendition".
    fn code(self) -> Option<u8> {
        match self {
            Self::Plain => None,
            Self::Bold => Some(1),
            Self::Faint => Some(2),
            Self::Green => Some(32),
            Self::Yellow => Some(33),
            Self::Blue => Some(34),
            Self::Magenta => Some(35),
            Self::Cyan => Some(36),
        }
    }
}

/// Whether texts are coloured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Style {
    Plain,
    Coloured,
}

impl Style {
    /// That of standard output.
    pub(crate) fn of_stdout() -> Self {
        Self::of(stdout().is_terminal())
    }

    /// That of standard error.
    pub(crate) fn of_stderr() -> Self {
        Self::of(stderr().is_terminal())
    }

    fn of(is_terminal: bool) -> Self {
        let variable = |name| std::env::var_os(name);
        Self::decide(
            is_terminal,
            variable("NO_COLOR").as_deref(),
            variable("TERM").as_deref(),
        )
    }

    /// Colours are for terminals that have them, and for people who did not ask for none
    /// (<https://no-color.org>).
    fn decide(is_terminal: bool, no_color: Option<&OsStr>, term: Option<&OsStr>) -> Self {
        let refused = no_color.is_some_and(|value| !value.is_empty());
        match is_terminal && !refused && term != Some(OsStr::new("dumb")) {
            true => Self::Coloured,
            false => Self::Plain,
        }
    }

    /// The text with the commands that paint it.
    pub(crate) fn paint(self, paint: Paint, text: &str) -> String {
        match (self, paint.code()) {
            (Self::Coloured, Some(code)) => format!("\x1b[{code}m{text}\x1b[0m"),
            _ => text.to_owned(),
        }
    }
}

/// Whether long work may say how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Show {
    /// On standard error, if that is a terminal that takes colours ([`Style::of_stderr`]).
    OnTerminal,
    /// Not at all: the result is for a program.
    Never,
}

impl Show {
    /// That of a command that was called with `--json` or without.
    pub(crate) fn unless(json: bool) -> Self {
        match json {
            true => Self::Never,
            false => Self::OnTerminal,
        }
    }
}

/// A line on standard error that is drawn over, and wiped at the end.
pub(crate) struct StatusLine {
    is_shown: bool,
    is_drawn: bool,
}

impl StatusLine {
    pub(crate) fn new(show: Show) -> Self {
        // Who asks for no colours has a program that reads along, or wants no terminal's commands: a line that
        // is drawn over needs them too.
        Self {
            is_shown: show == Show::OnTerminal && Style::of_stderr() == Style::Coloured,
            is_drawn: false,
        }
    }

    /// Whether drawing it does anything.
    pub(crate) fn is_shown(&self) -> bool {
        self.is_shown
    }

    /// Puts a text in the place of the last one.
    pub(crate) fn draw(&mut self, text: &str) {
        if self.is_shown {
            // Nothing is lost if a drawing is.
            let _ = write!(stderr(), "\r{text}\x1b[K");
            self.is_drawn = true;
        }
    }
}

impl Drop for StatusLine {
    fn drop(&mut self) {
        if self.is_drawn {
            let _ = write!(stderr(), "\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_alone_and_for_those_who_want_them() {
        let decide = |is_terminal, no_color: Option<&str>, term: Option<&str>| {
            Style::decide(is_terminal, no_color.map(OsStr::new), term.map(OsStr::new))
        };
        assert_eq!(decide(true, None, Some("xterm")), Style::Coloured);
        assert_eq!(decide(true, Some(""), None), Style::Coloured);
        assert_eq!(decide(true, Some("1"), Some("xterm")), Style::Plain);
        assert_eq!(decide(true, None, Some("dumb")), Style::Plain);
        assert_eq!(decide(false, None, Some("xterm")), Style::Plain);
    }

    #[test]
    fn plain_texts_have_no_commands() {
        assert_eq!(Style::Plain.paint(Paint::Bold, "x"), "x");
        assert_eq!(Style::Coloured.paint(Paint::Plain, "x"), "x");
        assert_eq!(Style::Coloured.paint(Paint::Cyan, "x"), "\x1b[36mx\x1b[0m");
    }
}
