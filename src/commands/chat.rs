//! `ktx chat`: a conversation.

use std::path::PathBuf;

use clap::{ArgAction, Args, ValueEnum};

use crate::chat::{Chat, Input};
use crate::error::CliError;
use crate::interrupt::Interrupt;
use crate::model_args::{EngineArgs, ModelSource, RuleArgs, load};
use crate::notes;
use crate::sampling_args::{SamplingArgs, ThinkingArgs, boolean};
use crate::terminal::Show;
use crate::text_file::read_text;

const EXAMPLE: &str = "\
Input:
  a line                 is sent as it is
  \"\"\"                    begins an input of several lines, which ends with a line that ends with \"\"\"
  the path of a file     sends the file's text
  an empty line          sends the text of --prompt-file, or else asks for a quicksort in C++
  /help                  lists the commands: /clear, /lora, /stats, /quit
Ctrl-C stops an answer and keeps the chat; Ctrl-D leaves. Answers and statistics go to standard output,
all else to standard error. If standard input is no terminal, its lines are the conversation.

KTransformers' spellings work too: --gguf_path (a file, or a directory that holds one model),
--optimize_config_path, --cpu_infer, --max_new_tokens, --chunk_size, --chunk_prefill_size, --prompt_file,
--force_think, --device, --mode, --use_cuda_graph. --model_path is not needed, since a GGUF file holds tokenizer
and configuration: it is accepted and ignored.

Examples:
  ktx chat
  ktx chat --model model.gguf --rules my-rules.yaml --threads 8 --temperature 0.2
  ktx chat --model model.gguf --lora adapter.gguf:0.8 --lora peft-directory
  printf 'What is 7 + 5?\\nAnd what is the opposite of hot?\\n' | ktx chat";

/// Chat with a model, by default the built-in one
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct ChatArgs {
    #[command(flatten)]
    source: ModelSource,

    #[command(flatten)]
    rules: RuleArgs,

    /// Device of modules that no rule matches [default: the best one that is there]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,

    #[command(flatten)]
    engine: EngineArgs,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    thinking: ThinkingArgs,

    /// What the model is told before the conversation
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// File whose text is sent for an empty line
    #[arg(short = 'f', long, alias = "prompt_file", value_name = "FILE")]
    prompt_file: Option<PathBuf>,

    #[command(flatten)]
    ignored: IgnoredArgs,
}

/// Flags of KTransformers that mean nothing here.
#[derive(Debug, Args)]
struct IgnoredArgs {
    /// Directory or name of the original model
    #[arg(long, alias = "model_path", value_name = "PATH", hide = true)]
    model_path: Option<String>,

    /// How long contexts are handled
    #[arg(long, value_name = "MODE", hide = true)]
    mode: Option<Mode>,

    /// Whether steps are replayed as CUDA graphs
    #[arg(
        long, alias = "use_cuda_graph", value_name = "BOOL", hide = true, num_args = 0..=1,
        default_missing_value = "true", action = ArgAction::Set, value_parser = boolean
    )]
    use_cuda_graph: Option<bool>,

    /// Steps are not replayed as CUDA graphs
    #[arg(long, aliases = ["nouse_cuda_graph", "no-use-cuda-graph"], hide = true)]
    nouse_cuda_graph: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Mode {
    Normal,
    #[value(alias = "long-context")]
    #[value(name = "long_context")]
    LongContext,
}

impl IgnoredArgs {
    fn say(&self) {
        if let Some(path) = &self.model_path {
            notes::note(format_args!(
                "--model_path {path} is not needed and not read: tokenizer and configuration are in the GGUF file"
            ));
        }
        if self.mode == Some(Mode::LongContext) {
            notes::note(
                "--mode long_context: attention is computed in full here; --context sets its length",
            );
        }
        if self.use_cuda_graph == Some(false) {
            notes::note("--use_cuda_graph false has no effect: steps that can be recorded are");
        }
    }
}

/// Runs the command.
pub(crate) fn run(args: &ChatArgs) -> Result<(), CliError> {
    args.ignored.say();
    let default_prompt = args.prompt_file.as_deref().map(read_text).transpose()?;
    // In this order: the line editor takes the signal for itself when it is made, and misses it only while it reads.
    let mut input = Input::new(default_prompt)?;
    let interrupt = Interrupt::install()?;
    let mut builder = args.engine.apply(args.rules.apply(args.source.builder()?));
    if let Some(device) = &args.device {
        builder = builder.default_device(device);
    }
    let planned = builder.plan()?;
    notes::about_model(&planned);
    notes::about_plan(&planned);
    let engine = load(planned, Show::OnTerminal)?;
    let options = args.sampling.options(&args.thinking);
    let mut session = engine.session();
    if let Some(system) = &args.system {
        session.set_system(system);
    }
    Chat::new(engine, session, options, interrupt).run(&mut input)
}
