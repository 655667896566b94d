//! Lines from a terminal, with editing and history, or from anything else as they are.

use std::io::{self, BufRead, IsTerminal, Read};
use std::path::PathBuf;

use rustyline::config::BellStyle;
use rustyline::error::ReadlineError;
use rustyline::history::FileHistory;
use rustyline::{Config, Editor};

use crate::error::CliError;

/// Bytes of the longest line that is taken from a file or pipe.
const MAX_LINE: u64 = 64 << 20;
/// Lines that the history keeps.
const HISTORY: usize = 1000;

/// What comes next from the input.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// A line, without its end.
    Text(String),
    /// Ctrl-C at the prompt.
    Interrupted,
    /// The end of the input.
    End,
}

/// Gives lines.
pub(crate) enum LineReader {
    /// From a person.
    Terminal(Box<Terminal>),
    /// From a file or a pipe, or from a test.
    Plain {
        /// Where from.
        input: Box<dyn BufRead>,
        /// Lines read so far.
        number: usize,
    },
}

/// A line editor and where its history is kept.
pub(crate) struct Terminal {
    editor: Editor<(), FileHistory>,
    history: Option<PathBuf>,
}

impl LineReader {
    /// Standard input.
    pub(crate) fn stdin() -> Result<Self, CliError> {
        if !io::stdin().is_terminal() {
            return Ok(Self::plain(io::stdin().lock()));
        }
        let history = history_file();
        let config = Config::builder()
            .bell_style(BellStyle::None)
            .max_history_size(HISTORY);
        let config = config.map_err(from_editor)?.build();
        let mut editor = Editor::with_config(config).map_err(from_editor)?;
        if let Some(file) = &history {
            // There is none at the first start.
            let _ = editor.load_history(file);
        }
        Ok(Self::Terminal(Box::new(Terminal { editor, history })))
    }

    /// Lines as they are.
    pub(crate) fn plain(input: impl BufRead + 'static) -> Self {
        Self::Plain {
            input: Box::new(input),
            number: 0,
        }
    }

    /// Whether a person types.
    pub(crate) fn is_terminal(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// The next line. `prompt` is shown on a terminal.
    pub(crate) fn line(&mut self, prompt: &str) -> Result<Line, CliError> {
        match self {
            Self::Terminal(terminal) => match terminal.editor.readline(prompt) {
                Ok(line) => {
                    terminal.remember(&line);
                    Ok(Line::Text(line))
                }
                Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(error) => Err(from_editor(error)),
            },
            Self::Plain { input, number } => {
                *number += 1;
                plain_line(input, *number)
            }
        }
    }
}

/// The next line of a file or pipe.
fn plain_line(input: &mut dyn BufRead, number: usize) -> Result<Line, CliError> {
    let place = || PathBuf::from(format!("line {number} of standard input"));
    let mut bytes = Vec::new();
    let read = input.take(MAX_LINE).read_until(b'\n', &mut bytes)?;
    if read == 0 {
        return Ok(Line::End);
    }
    if bytes.ends_with(b"\n") {
        bytes.pop();
        if bytes.ends_with(b"\r") {
            bytes.pop();
        }
    } else if read as u64 == MAX_LINE {
        return Err(io::Error::other(format!(
            "{} is longer than {MAX_LINE} bytes",
            place().display()
        ))
        .into());
    }
    match String::from_utf8(bytes) {
        Ok(line) => Ok(Line::Text(line)),
        Err(e) => Err(CliError::NotUtf8 {
            path: place(),
            offset: e.utf8_error().valid_up_to(),
        }),
    }
}

impl Terminal {
    /// Adds a line to the history, in its file too; where that cannot be, the chat goes on without.
    fn remember(&mut self, line: &str) {
        if !matches!(self.editor.add_history_entry(line), Ok(true)) {
            return;
        }
        let Some(file) = &self.history else { return };
        if self.editor.append_history(file).is_err() {
            self.history = None;
        }
    }
}

fn from_editor(error: ReadlineError) -> CliError {
    match error {
        ReadlineError::Io(error) => error.into(),
        error => io::Error::other(error.to_string()).into(),
    }
}

/// Where the history is kept: in the user's folder for the state of programs.
fn history_file() -> Option<PathBuf> {
    let directory = state_directory()?.join("ktx");
    std::fs::create_dir_all(&directory).ok()?;
    Some(directory.join("history"))
}

#[cfg(windows)]
fn state_directory() -> Option<PathBuf> {
    std::env::var_os("LOCALAPPDATA").map(PathBuf::from)
}

#[cfg(target_os = "macos")]
fn state_directory() -> Option<PathBuf> {
    Some(std::env::home_dir()?.join("Library/Application Support"))
}

/// As the XDG base directory specification says.
#[cfg(not(any(windows, target_os = "macos")))]
fn state_directory() -> Option<PathBuf> {
    let named = std::env::var_os("XDG_STATE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute());
    named.or_else(|| Some(std::env::home_dir()?.join(".local/state")))
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[test]
    fn plain_lines_lose_their_ends_and_keep_the_rest() {
        let mut reader = LineReader::plain(Cursor::new("  a \r\n\nlast"));
        for expected in ["  a ", "", "last"] {
            assert_eq!(reader.line("").unwrap(), Line::Text(expected.to_owned()));
        }
        assert_eq!(reader.line("").unwrap(), Line::End);
    }

    #[test]
    fn a_line_that_is_no_text_is_named() {
        let mut reader = LineReader::plain(Cursor::new(b"ok\nno \xff\n".to_vec()));
        reader.line("").unwrap();
        let error = reader.line("").unwrap_err().to_string();
        assert!(
            error.contains("line 2") && error.contains("byte 3"),
            "{error}"
        );
    }
}
