//! From lines to what they ask for: a prompt of one line or several, a file's text, a command.

use std::path::Path;

use super::line_reader::{Line, LineReader};
use crate::error::CliError;
use crate::notes;
use crate::text_file::read_text;

/// What an empty line asks, unless there is a prompt file.
const DEFAULT_PROMPT: &str = "Please write a piece of quicksort code in C++.";
const PROMPT: &str = "Chat: ";
/// In front of further lines of one input.
const FURTHER: &str = "  ... ";
/// Begins and ends an input of several lines.
const QUOTES: &str = "\"\"\"";

/// What comes next in the conversation.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Entry {
    /// Something to answer.
    Prompt(String),
    /// Nothing: an input that was given up.
    Nothing,
    /// `/help`
    Help,
    /// `/clear`
    Clear,
    /// `/stats`
    Stats,
    /// `/lora`, with what stands behind it.
    Lora(String),
    /// One word that looks like a path or a command, and is neither.
    Unknown(String),
    /// The end.
    End,
}

/// Gives entries.
pub(crate) struct Input {
    reader: LineReader,
    default_prompt: String,
    interrupted: bool,
}

impl Input {
    /// Standard input. `default_prompt` is what an empty line asks.
    pub(crate) fn new(default_prompt: Option<String>) -> Result<Self, CliError> {
        Ok(Self::from_reader(LineReader::stdin()?, default_prompt))
    }

    fn from_reader(reader: LineReader, default_prompt: Option<String>) -> Self {
        Self {
            reader,
            default_prompt: default_prompt.unwrap_or_else(|| DEFAULT_PROMPT.to_owned()),
            interrupted: false,
        }
    }

    /// Whether a person types.
    pub(crate) fn is_terminal(&self) -> bool {
        self.reader.is_terminal()
    }

    /// The next entry.
    ///
    /// # Errors
    /// If the input cannot be read, or names a file that is no text.
    pub(crate) fn next(&mut self) -> Result<Entry, CliError> {
        let line = match self.reader.line(PROMPT)? {
            Line::End => return Ok(Entry::End),
            Line::Interrupted if self.interrupted => return Ok(Entry::End),
            Line::Interrupted => {
                self.interrupted = true;
                notes::note("(Ctrl-C again or Ctrl-D leaves)");
                return Ok(Entry::Nothing);
            }
            Line::Text(line) => line,
        };
        self.interrupted = false;
        match line.strip_prefix(QUOTES) {
            Some(first) => self.several_lines(first),
            None => self.one_line(line),
        }
    }

    fn one_line(&self, line: String) -> Result<Entry, CliError> {
        let word = line.trim();
        if let Some(arguments) = after_lora(word) {
            return Ok(Entry::Lora(arguments.to_owned()));
        }
        Ok(match word {
            "" => Entry::Prompt(self.default_prompt.clone()),
            "/help" => Entry::Help,
            "/clear" => Entry::Clear,
            "/stats" => Entry::Stats,
            "/quit" | "/exit" => Entry::End,
            _ if Path::new(word).is_file() => Entry::Prompt(read_text(Path::new(word))?),
            _ if word.starts_with('/') && !word.contains(char::is_whitespace) => {
                Entry::Unknown(word.to_owned())
            }
            _ => Entry::Prompt(line),
        })
    }

    /// Reads up to a line that ends with three quotes, or to the end of the input. Lines that hold
    /// nothing but the quotes add no line.
    fn several_lines(&mut self, first: &str) -> Result<Entry, CliError> {
        if let Some(text) = pasted(first) {
            return Ok(self.prompt_of(text));
        }
        let mut lines = Vec::new();
        let first = first.strip_prefix('\n').unwrap_or(first);
        lines.extend((!first.is_empty()).then(|| first.to_owned()));
        loop {
            match self.reader.line(FURTHER)? {
                Line::Interrupted => return Ok(Entry::Nothing),
                Line::End if lines.is_empty() => return Ok(Entry::End),
                Line::End => break,
                Line::Text(line) => match line.strip_suffix(QUOTES) {
                    None => lines.push(line),
                    Some(last) => {
                        lines.extend((!last.is_empty()).then(|| last.to_owned()));
                        break;
                    }
                },
            }
        }
        Ok(self.prompt_of(lines.join("\n")))
    }

    fn prompt_of(&self, text: String) -> Entry {
        match text {
            text if text.trim().is_empty() => Entry::Prompt(self.default_prompt.clone()),
            text => Entry::Prompt(text),
        }
    }
}

/// What stands behind `/lora`, if that is the first word.
fn after_lora(line: &str) -> Option<&str> {
    let rest = line.strip_prefix("/lora")?;
    (rest.is_empty() || rest.starts_with(char::is_whitespace)).then(|| rest.trim())
}

/// The whole text, if what stands behind the opening quotes ends with quotes on a later line: a paste
/// into a terminal brings several lines at once.
fn pasted(behind: &str) -> Option<String> {
    let text = behind
        .contains('\n')
        .then(|| behind.strip_suffix(QUOTES))??;
    let text = text.strip_prefix('\n').unwrap_or(text);
    Some(text.strip_suffix('\n').unwrap_or(text).to_owned())
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    fn entries(text: &str) -> Vec<Entry> {
        let reader = LineReader::plain(Cursor::new(text.to_owned()));
        let mut input = Input::from_reader(reader, None);
        let mut entries = Vec::new();
        loop {
            match input.next().unwrap() {
                Entry::End => return entries,
                entry => entries.push(entry),
            }
        }
    }

    fn prompt(text: &str) -> Entry {
        Entry::Prompt(text.to_owned())
    }

    #[test]
    fn a_paste_of_several_lines_ends_with_its_quotes() {
        let q = QUOTES;
        assert_eq!(
            pasted(&format!("\nCount to\n10.{q}")).as_deref(),
            Some("Count to\n10.")
        );
        assert_eq!(pasted(&format!("a\nb\n{q}")).as_deref(), Some("a\nb"));
        assert_eq!(pasted(&format!("hi{q}")), None);
        assert_eq!(pasted("\nCount to"), None);
    }

    #[test]
    fn a_line_is_a_prompt_and_an_empty_one_asks_the_default() {
        assert_eq!(
            entries("hello there\n\n"),
            [prompt("hello there"), prompt(DEFAULT_PROMPT)]
        );
    }

    #[test]
    fn three_quotes_begin_and_end_several_lines() {
        assert_eq!(
            entries("\"\"\"a\nb\"\"\"\nc\n"),
            [prompt("a\nb"), prompt("c")]
        );
        assert_eq!(entries("\"\"\"\na\n\nb\n\"\"\"\n"), [prompt("a\n\nb")]);
    }

    #[test]
    fn quotes_that_end_the_first_line_do_not_end_the_input() {
        assert_eq!(
            entries("\"\"\"hi\"\"\"\nyou\"\"\"\n"),
            [prompt("hi\"\"\"\nyou")]
        );
    }

    #[test]
    fn an_input_that_is_cut_off_is_sent_as_it_is() {
        assert_eq!(entries("\"\"\"a\nb\n"), [prompt("a\nb")]);
    }

    #[test]
    fn commands_are_known_and_other_words_with_a_slash_are_not_sent() {
        let found = entries(
            "/help\n/clear\n/stats\n/lora\n/lora a:2  b\n/clera\n/no_think hello\n/quit\nnever read\n",
        );
        let unknown = Entry::Unknown("/clera".to_owned());
        assert_eq!(
            found,
            [
                Entry::Help,
                Entry::Clear,
                Entry::Stats,
                Entry::Lora(String::new()),
                Entry::Lora("a:2  b".to_owned()),
                unknown,
                prompt("/no_think hello")
            ]
        );
    }

    #[test]
    fn the_path_of_a_file_stands_for_its_text() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/main.rs");
        let text = std::fs::read_to_string(path).unwrap();
        assert_eq!(entries(&format!("{path}\n")), [prompt(&text)]);
    }
}
