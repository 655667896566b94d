//! `ktx rules`: the rule files that come with the program.

use std::io::{Write, stdout};

use clap::{Args, Subcommand};
use ktx_core::EngineError;
use ktx_core::rules::{Preset, presets};

use super::rules_check::CheckArgs;
use crate::error::CliError;
use crate::table::{Align, Table};

const EXAMPLE: &str = "\
Examples:
  ktx rules
  ktx rules show deepseek2 > my-rules.yaml
  ktx rules check my-rules.yaml --model model.gguf
  ktx run --rules deepseek2 --prompt 'What is 7 + 5?'";

/// List the presets: rule files that are used where none is named; check a rule file
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct RulesArgs {
    #[command(subcommand)]
    command: Option<RulesCommand>,
}

#[derive(Debug, Subcommand)]
enum RulesCommand {
    /// Print a preset, for example to change it
    #[command(after_help = "Example:\n  ktx rules show deepseek2 > my-rules.yaml")]
    Show {
        /// Its name
        name: String,
    },
    /// Look for mistakes in a rule file
    Check(CheckArgs),
}

/// Runs the command.
pub(crate) fn run(args: &RulesArgs) -> Result<(), CliError> {
    let mut out = stdout().lock();
    match &args.command {
        None => {}
        Some(RulesCommand::Show { name }) => {
            write!(out, "{}", preset(name)?.text)?;
            return Ok(());
        }
        Some(RulesCommand::Check(args)) => return super::rules_check::run(args, &mut out),
    }
    let mut table = Table::new([
        ("preset", Align::Left),
        ("architectures", Align::Left),
        ("models", Align::Left),
    ]);
    for preset in presets() {
        table.push([
            preset.name.to_owned(),
            preset.architectures.join(", "),
            preset.description.to_owned(),
        ]);
    }
    Ok(table.write(&mut out)?)
}

/// The preset of this name.
pub(crate) fn preset(name: &str) -> Result<&'static Preset, CliError> {
    presets()
        .iter()
        .find(|preset| preset.name == name)
        .ok_or_else(|| {
            let known = presets()
                .iter()
                .map(|preset| preset.name)
                .collect::<Vec<_>>()
                .join(", ");
            EngineError::Preset {
                name: name.to_owned(),
                known,
            }
            .into()
        })
}
