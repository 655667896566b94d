//! `ktx completions`: what a shell needs to complete commands and flags.

use std::io::{Write, stdout};

use clap::Args;
use clap_complete::{Shell, generate};

use crate::cli::command;
use crate::error::CliError;

const EXAMPLE: &str = "\
Examples:
  ktx completions bash > ~/.local/share/bash-completion/completions/ktx
  ktx completions zsh > ~/.zfunc/_ktx
  ktx completions fish > ~/.config/fish/completions/ktx.fish";

/// Print the completions of a shell
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct CompletionsArgs {
    /// The shell
    shell: Shell,
}

/// Runs the command.
pub(crate) fn run(args: &CompletionsArgs) -> Result<(), CliError> {
    let mut script = Vec::new();
    generate(args.shell, &mut command(), "ktx", &mut script);
    Ok(stdout().lock().write_all(&script)?)
}
