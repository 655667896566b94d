//! The commands of `ktx` and their dispatch.

use std::process::ExitCode;

use clap::{ArgAction, CommandFactory, Parser, Subcommand};
use ktx_core::EngineError;

use crate::commands::{
    bench, chat, completions, devices, inspect, operators, perplexity, plan, rules, run, serve,
};
use crate::error::CliError;
use crate::{builtin, notes};

const EXAMPLE: &str = "\
Examples:
  ktx chat                                      chat with the built-in model
  ktx run --prompt 'What is 7 + 5?'             one answer
  ktx plan --model model.gguf --rules my.yaml   what the rules would do";

/// Run language models that do not fit the GPU, with operators placed by YAML rules.
#[derive(Debug, Parser)]
#[command(name = "ktx", version, long_version = builtin::LONG_VERSION, about, after_help = EXAMPLE, subcommand_required = true,
    arg_required_else_help = true)]
struct Cli {
    /// Say more on standard error; twice: everything, each injected operator included
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Chat(chat::ChatArgs),
    Run(run::RunArgs),
    Serve(serve::ServeArgs),
    Inspect(inspect::InspectArgs),
    Plan(plan::PlanArgs),
    Bench(bench::BenchArgs),
    Perplexity(perplexity::PerplexityArgs),
    Rules(rules::RulesArgs),
    Operators(operators::OperatorsArgs),
    Devices(devices::DevicesArgs),
    Completions(completions::CompletionsArgs),
}

/// The example `local_chat`: `ktx chat` as a program of its own.
#[derive(Debug, Parser)]
#[command(
    name = "local_chat",
    version,
    about = "Chat with a model, by default the built-in one"
)]
struct LocalChat {
    /// Say more on standard error; twice: everything, each injected operator included
    #[arg(short, long, action = ArgAction::Count)]
    verbose: u8,

    #[command(flatten)]
    chat: chat::ChatArgs,
}

/// All commands of `ktx` with their flags, for tools that write documentation or completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// The program `ktx`.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    notes::watch_libraries(cli.verbose);
    exit_code(match &cli.command {
        Command::Chat(args) => chat::run(args),
        Command::Run(args) => run::run(args),
        Command::Serve(args) => serve::run(args),
        Command::Inspect(args) => inspect::run(args),
        Command::Plan(args) => plan::run(args),
        Command::Bench(args) => bench::run(args),
        Command::Perplexity(args) => perplexity::run(args),
        Command::Rules(args) => rules::run(args),
        Command::Operators(args) => operators::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Completions(args) => completions::run(args),
    })
}

/// The program `local_chat`.
pub fn local_chat() -> ExitCode {
    let cli = LocalChat::parse();
    notes::watch_libraries(cli.verbose);
    exit_code(chat::run(&cli.chat))
}

/// 0, or 1 with one message on standard error; 2 for a call without meaning, as the flags' parser does.
fn exit_code(result: Result<(), CliError>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is_broken_pipe() => ExitCode::SUCCESS,
        Err(error) => {
            tell(&error);
            ExitCode::from(if matches!(error, CliError::Usage(_)) {
                2
            } else {
                1
            })
        }
    }
}

/// One line, or one for each problem of a plan: all are found at once.
fn tell(error: &CliError) {
    match error {
        CliError::Engine(EngineError::Check(report)) => {
            report.errors.iter().for_each(|e| eprintln!("error: {e}"))
        }
        error => eprintln!("error: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_do_not_contradict_each_other() {
        command().debug_assert();
        LocalChat::command().debug_assert();
    }
}
