//! `ktx perplexity`: how well a model predicts a text.

use std::io::{Write, stdout};
use std::path::PathBuf;

use clap::Args;
use ktx_core::perplexity::{Chunks, perplexity, tokens_of};
use serde_json::json;

use crate::error::CliError;
use crate::model_args::{EngineArgs, ModelSource, RuleArgs, load};
use crate::notes;
use crate::terminal::Show;
use crate::text_file::read_text;

const EXAMPLE: &str = "\
The text is cut into chunks of --context tokens (512 if not given); in each, the second half is predicted from what
stands before. This is the protocol of llama.cpp's llama-perplexity, so that the figures compare.

Examples:
  ktx perplexity --model model.gguf --file wiki.test.raw --context 512
  ktx perplexity --model model.gguf --file wiki.test.raw --chunks 32 --json";

/// Context if none is named, as in llama.cpp.
const DEFAULT_CONTEXT: usize = 512;

/// Measure how well a model predicts a text
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct PerplexityArgs {
    #[command(flatten)]
    source: ModelSource,

    /// Text file
    #[arg(short, long, value_name = "TEXT")]
    file: PathBuf,

    /// Chunks to measure at most [default: all]
    #[arg(long, value_name = "N")]
    chunks: Option<usize>,

    /// Print one line of JSON
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    rules: RuleArgs,

    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the command.
pub(crate) fn run(args: &PerplexityArgs) -> Result<(), CliError> {
    let text = read_text(&args.file)?;
    let mut settings = args.engine.clone();
    let context = *settings.context.get_or_insert(DEFAULT_CONTEXT);
    let planned = settings
        .apply(args.rules.apply(args.source.builder()?))
        .plan()?;
    notes::about_plan(&planned);
    let engine = load(planned, Show::unless(args.json))?;
    let tokens = tokens_of(&engine, &text);
    let chunks = Chunks {
        length: context,
        limit: args.chunks,
    };
    let result = perplexity(&engine, &tokens, chunks, &mut |so_far| {
        notes::note(format_args!(
            "chunk {}: {:.4} so far",
            so_far.chunks,
            so_far.perplexity()
        ));
    })?;
    let (value, error) = (result.perplexity(), result.standard_error());
    let mut out = stdout().lock();
    if args.json {
        let line = json!({
            "model": args.source.name(),
            "perplexity": value,
            "standard_error": error,
            "context": context,
            "chunks": result.chunks,
            "scored_tokens": result.scored,
        });
        writeln!(out, "{line}")?;
    } else {
        let error = error.map(|e| format!(" +/- {e:.5}")).unwrap_or_default();
        writeln!(
            out,
            "perplexity: {value:.4}{error} ({} chunks of {context} tokens)",
            result.chunks
        )?;
    }
    Ok(())
}
