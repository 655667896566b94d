//! What can go wrong with a chat template.

use thiserror::Error;

/// Why a chat could not be rendered.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ChatError {
    /// The file carries no template of that name.
    #[error(
        "the model's file has no {key}; choose a template yourself (ChatML is the most common), or continue plain \
         text without one"
    )]
    NoTemplate {
        /// The metadata key.
        key: String,
    },
    /// The metadata value is not a string.
    #[error("the chat template cannot be read: {0}")]
    Metadata(#[from] ktx_gguf::GgufError),
    /// The template is longer than any real one.
    #[error("the chat template is {length} bytes long; the limit is {limit}")]
    TooLong {
        /// Its length in bytes.
        length: usize,
        /// The most that is accepted.
        limit: usize,
    },
    /// The template is not well-formed Jinja.
    #[error("the chat template does not parse, line {line}: {message}")]
    Syntax {
        /// Line of the template, from 1.
        line: usize,
        /// What the parser met.
        message: String,
    },
    /// The template refused the messages with `raise_exception`.
    #[error("the chat template refuses these messages (line {line}): {message}")]
    Refused {
        /// Line of the template, from 1.
        line: usize,
        /// The template's own words.
        message: String,
    },
    /// The template ran longer, or made more data, than rendering a chat can need.
    #[error(
        "the chat template was stopped at line {line}: it does more work than rendering these messages can need"
    )]
    OutOfFuel {
        /// Line of the template, from 1.
        line: usize,
    },
    /// No thread could be started for the rendering.
    #[error(
        "no thread for rendering the chat template: {0}; free memory or raise the limit of threads"
    )]
    Thread(std::io::Error),
    /// The template engine has a fault that this template brings out.
    #[error("the template engine failed on this chat template; choose another template")]
    Panicked,
    /// Rendering failed.
    #[error("the chat template failed at line {line}: {message}")]
    Render {
        /// Line of the template, from 1.
        line: usize,
        /// What went wrong.
        message: String,
    },
}

/// The error that `raise_exception` throws through the template engine.
#[derive(Debug, Error)]
#[error("{0}")]
pub(super) struct Raised(pub(super) String);

impl ChatError {
    /// From an error of the engine, while parsing or rendering.
    pub(super) fn from_engine(error: &minijinja::Error) -> Self {
        let line = error.line().unwrap_or(1);
        let message = error
            .detail()
            .map_or_else(|| error.kind().to_string(), str::to_owned);
        if let Some(raised) = raised(error) {
            return Self::Refused {
                line,
                message: raised,
            };
        }
        match error.kind() {
            minijinja::ErrorKind::SyntaxError => Self::Syntax { line, message },
            minijinja::ErrorKind::OutOfFuel => Self::OutOfFuel { line },
            _ => Self::Render { line, message },
        }
    }
}

fn raised(error: &minijinja::Error) -> Option<String> {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return Some(message.clone());
        }
        source = cause.source();
    }
    None
}
