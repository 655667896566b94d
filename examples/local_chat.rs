//! A chat with a model, by default the built-in one: `cargo run --release --example local_chat`.
//!
//! It is `ktx chat` as a program of its own, with KTransformers' flags beside our own; `--help` lists them. How
//! little of it is about the model is shown by the example `embed`.

use std::process::ExitCode;

fn main() -> ExitCode {
    ktx_cli::local_chat()
}
