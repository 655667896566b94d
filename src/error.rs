//! What the command line can fail with.

use std::io;
use std::path::PathBuf;

use ktx_core::EngineError;
use ktx_core::gguf::GgufError;
use ktx_core::perplexity::PerplexityError;
use ktx_core::plan::{PlanError, TreeError};
use ktx_core::rules::RuleError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CliError {
    /// The library.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The server.
    #[error(transparent)]
    Server(#[from] ktx_server::ServerError),
    /// A measurement of perplexity.
    #[error(transparent)]
    Perplexity(#[from] PerplexityError),
    /// A module tree.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A rule file has mistakes, which were printed.
    #[error("{} has {errors} errors", file.display())]
    RulesAreWrong {
        /// The rule file.
        file: PathBuf,
        /// How many.
        errors: usize,
    },
    /// The command was called in a way that has no meaning.
    #[error("{0}")]
    Usage(String),
    /// No model was named, and there is none in the program.
    #[error("this build has no built-in model; name one with `--model FILE.gguf`")]
    NoBuiltinModel,
    /// A text file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A text file is too large to be meant.
    #[error("{} is larger than {limit} bytes: too large for a text to read", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Bytes that are read at most.
        limit: u64,
    },
    /// A text file is no text.
    #[error("{} is not UTF-8 text: byte {offset} belongs to no character; convert it to UTF-8", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// The first byte that belongs to no character.
        offset: usize,
    },
    /// Standard output or input.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The handler of Ctrl-C.
    #[error("cannot watch for Ctrl-C: {0}")]
    Interrupt(#[from] ctrlc::Error),
    /// A conversation from a script went on to its end, and some of its turns failed.
    #[error("{failed} of the conversation's inputs could not be answered")]
    Turns {
        /// How many.
        failed: usize,
    },
}

impl CliError {
    /// Whether the reader of the output has gone: then there is nobody to tell.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Self::Io(e) if e.kind() == io::ErrorKind::BrokenPipe)
    }
}

macro_rules! through_engine {
    ($($error:ty),*) => {
        $(impl From<$error> for CliError {
            fn from(error: $error) -> Self {
                Self::Engine(error.into())
            }
        })*
    };
}

through_engine!(
    GgufError,
    RuleError,
    PlanError,
    ktx_core::ops::DuplicateOperator,
    ktx_core::ops::OpError
);
