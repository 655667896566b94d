//! The regular expression of a rule's `match.name`.

use fancy_regex::{CompileError, Error, Regex, RegexBuilder};
use ktx_ops::Location;

use super::dialect::translate;
use super::error::RuleError;

/// Steps back that a search may take: some milliseconds.
const BACKTRACK_LIMIT: usize = 100_000;
/// Bytes that a compiled pattern may take.
const SIZE_LIMIT: usize = 1 << 20;
/// Instructions that a compiled pattern may have.
const PROGRAM_LIMIT: usize = 100_000;
/// Characters that a pattern may have.
const LENGTH_LIMIT: usize = 20_000;

/// A regular expression of Python's dialect, searched for in module paths.
#[derive(Debug, Clone)]
pub struct NamePattern {
    text: String,
    location: Location,
    regex: Regex,
}

/// Why a pattern is none: the character, from 0, and what is wrong there.
pub(crate) struct BadPattern {
    pub character: usize,
    pub reason: String,
}

impl NamePattern {
    pub(crate) fn new(text: &str, location: Location) -> Result<Self, BadPattern> {
        if text.len() > LENGTH_LIMIT {
            return Err(BadPattern {
                character: 0,
                reason: format!("it is longer than {LENGTH_LIMIT} bytes"),
            });
        }
        let translated = translate(text).map_err(|e| BadPattern {
            character: e.offset,
            reason: e.reason,
        })?;
        let regex = RegexBuilder::new(&translated)
            .backtrack_limit(BACKTRACK_LIMIT)
            .delegate_size_limit(SIZE_LIMIT)
            .max_prog_size(PROGRAM_LIMIT)
            .build()
            .map_err(|e| BadPattern {
                character: 0,
                reason: refusal(&e),
            })?;
        Ok(Self {
            text: text.to_owned(),
            location,
            regex,
        })
    }

    /// The pattern as written.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Where it is written.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// Whether the pattern is found anywhere in a module's path.
    ///
    /// # Errors
    /// If the search takes too long.
    pub fn is_in(&self, path: &str) -> Result<bool, RuleError> {
        self.regex.is_match(path).map_err(|error: Error| {
            tracing::debug!(%error, pattern = %self.text, path, "search gave up");
            RuleError::SlowPattern {
                location: self.location.clone(),
                pattern: self.text.clone(),
                path: path.to_owned(),
            }
        })
    }
}

/// Why a pattern that Python would take is refused.
fn refusal(error: &Error) -> String {
    let too_large = match error {
        Error::CompileError(error) => match &**error {
            CompileError::InnerError(error) => error.size_limit().is_some(),
            CompileError::PatternTooComplex => true,
            _ => false,
        },
        _ => false,
    };
    if too_large {
        "it is too large with its repetitions written out".to_owned()
    } else {
        format!("it cannot be used here: {error}")
    }
}
