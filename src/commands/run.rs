//! `ktx run`: one answer on standard output.

use std::io::{Write, stdout};
use std::path::PathBuf;

use clap::Args;
use ktx_core::{FinishReason, Generation};

use crate::chat::statistics;
use crate::error::CliError;
use crate::model_args::{EngineArgs, ModelSource, RuleArgs, plan_and_load};
use crate::notes;
use crate::sampling_args::{SamplingArgs, ThinkingArgs};
use crate::text_file::read_text;

const EXAMPLE: &str = "\
Examples:
  ktx run --prompt 'What is 7 + 5?' --temperature 0
  ktx run --model model.gguf --raw --prompt 'Once upon a time' -n 64
  git diff | ktx run --model model.gguf --system 'Summarise this change.' --prompt-file -";

/// Print one answer and nothing else
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    source: ModelSource,

    /// What the model is asked
    #[arg(
        short,
        long,
        value_name = "TEXT",
        required_unless_present = "prompt_file",
        conflicts_with = "prompt_file"
    )]
    prompt: Option<String>,

    /// File that holds the prompt; `-` is standard input
    #[arg(short = 'f', long, alias = "prompt_file", value_name = "FILE")]
    prompt_file: Option<PathBuf>,

    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT", conflicts_with = "raw")]
    system: Option<String>,

    /// Continue the text without the chat template
    #[arg(long)]
    raw: bool,

    /// Print the ids of the generated tokens instead of their text
    #[arg(long)]
    ids: bool,

    /// Print counts and times on standard error at the end
    #[arg(long)]
    stats: bool,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    thinking: ThinkingArgs,

    #[command(flatten)]
    rules: RuleArgs,

    #[command(flatten)]
    engine: EngineArgs,

    /// Device of modules that no rule matches [default: the best one that is there]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,
}

/// Runs the command.
pub(crate) fn run(args: &RunArgs) -> Result<(), CliError> {
    let prompt = match (&args.prompt, &args.prompt_file) {
        (Some(prompt), _) => prompt.clone(),
        (None, Some(file)) => read_text(file)?,
        (None, None) => {
            return Err(CliError::Usage(
                "name a prompt with --prompt or --prompt-file".to_owned(),
            ));
        }
    };
    let options = args.sampling.options(&args.thinking);
    let engine = plan_and_load(
        &args.source,
        &args.rules,
        &args.engine,
        args.device.as_deref(),
    )?;
    let mut session = engine.session();
    if let Some(system) = &args.system {
        session.set_system(system);
    }
    let mut answer = match args.raw {
        true => session.complete(&prompt, &options)?,
        false => session.chat(&prompt, &options)?,
    };
    print(&mut answer, args.ids)?;
    if answer.finish_reason() == Some(FinishReason::Context) {
        let context = engine.settings().context;
        notes::warning(format_args!(
            "the answer stops here: the context of {context} tokens is full (--context)"
        ));
    }
    if args.stats {
        notes::note(statistics::report(&answer.statistics()));
    }
    Ok(())
}

/// Prints an answer as it comes, and the end of its line.
fn print(answer: &mut Generation<'_>, ids: bool) -> Result<(), CliError> {
    let mut out = stdout().lock();
    let mut separator = "";
    for piece in answer {
        let piece = piece?;
        match (ids, piece.token) {
            (false, _) => write!(out, "{}", piece.text)?,
            (true, None) => {}
            (true, Some(token)) => {
                write!(out, "{separator}{token}")?;
                separator = " ";
            }
        }
        out.flush()?;
    }
    Ok(writeln!(out)?)
}
