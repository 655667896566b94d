//! The command line of ktx, as a library: the binary `ktx` and the example `local_chat` share it.
//!
//! Applications use [`ktx_core`] instead.

#![forbid(unsafe_code)]

mod adapter_args;
mod builtin;
mod chat;
mod cli;
mod commands;
mod error;
mod host;
mod interrupt;
mod model_args;
mod notes;
mod progress;

mod sampling_args;
mod table;
mod terminal;
mod text_file;

pub use builtin::builtin_model;
pub use cli::{command, local_chat, run};
pub use error::CliError;
