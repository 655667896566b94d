//! `ktx serve`: the model for many users, behind OpenAI's and Ollama's APIs.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use ktx_core::memory::available_host_memory;
use ktx_core::placement::ByteSize;
use ktx_core::serving::{Batching, PrefixSharing, Scheduler, SchedulerSettings, SpillSettings};
use ktx_server::{ApiKeys, PlanView, Server, ServerSettings};

use crate::error::CliError;
use crate::model_args::{EngineArgs, ModelSource, RuleArgs, load};
use crate::notes;
use crate::sampling_args::{SamplingArgs, ThinkingArgs};
use crate::terminal::Show;
use crate::text_file::read_text;

/// The prefix cache takes one of so many parts of the memory that is free,
const FREE_MEMORY_PARTS: u64 = 8;
/// and so many bytes at most.
const MOST_PREFIX_RAM: u64 = 8 << 30;

/// Files that are open beside connections: the model's, the prefix cache's, the system's.
#[cfg(unix)]
const OTHER_FILES: usize = 128;

const EXAMPLE: &str = "\
Examples:
  ktx serve
  ktx serve --model model.gguf --rules my-rules.yaml --port 8000
  ktx serve --model model.gguf --host 0.0.0.0 --api-key-file keys.txt --parallel 16

The web page is at http://127.0.0.1:10002/, the API's description at /openapi.json. Ctrl-C and SIGTERM stop it:
running answers are finished first. Keys can be in the environment variable KTX_API_KEY as well.";

/// Serve a model to many users: a web page, and the APIs of OpenAI and Ollama
#[derive(Debug, Args)]
#[command(after_help = EXAMPLE)]
pub(crate) struct ServeArgs {
    #[command(flatten)]
    source: ModelSource,

    #[command(flatten)]
    rules: RuleArgs,

    #[command(flatten)]
    engine: EngineArgs,

    /// Device of modules that no rule matches [default: the best one that is there]
    #[arg(long, value_name = "DEVICE")]
    device: Option<String>,

    /// Address to listen on; 0.0.0.0 is all of the machine's
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1")]
    host: String,

    /// Port to listen on; 0 takes a free one
    #[arg(long, value_name = "N", default_value_t = 10002)]
    port: u16,

    /// Key that requests must show; may be given several times. Others can see it in the list of processes
    #[arg(long, alias = "api_key", value_name = "KEY")]
    api_key: Vec<String>,

    /// File with one key a line
    #[arg(long, value_name = "FILE")]
    api_key_file: Option<PathBuf>,

    /// What clients call the model [default: the file's name]
    #[arg(long, alias = "model_name", value_name = "NAME")]
    model_name: Option<String>,

    /// Requests that are worked on at once; more wait
    #[arg(long, aliases = ["max_batch_size", "max-batch-size"], value_name = "N", default_value_t = 32)]
    parallel: usize,

    /// Requests that wait at most; more are told to come back later
    #[arg(long, value_name = "N", default_value_t = 256)]
    queue: usize,

    /// Tokens that the cache of all requests holds together [default: four contexts]
    #[arg(long, alias = "cache_lens", value_name = "N")]
    cache_tokens: Option<usize>,

    /// Prompt tokens of a step while others generate, for each prompt that waits: fewer let them stutter less
    #[arg(long, value_name = "N", default_value_t = 128)]
    mixed_chunk: usize,

    /// Read every prompt as a whole, whatever the cache still has of earlier ones
    #[arg(long)]
    no_prefix_cache: bool,

    /// Main memory for prompts that the cache has no place for any more, as in 4GiB
    /// [default: an eighth of what is free, 8 GiB at most]
    #[arg(long, value_name = "SIZE", conflicts_with = "no_prefix_cache")]
    prefix_cache_ram: Option<ByteSize>,

    /// Directory that keeps such prompts beyond the end of the server; one for each model
    #[arg(long, value_name = "DIRECTORY", conflicts_with = "no_prefix_cache")]
    prefix_cache_dir: Option<PathBuf>,

    /// Bytes of its files at most
    #[arg(
        long,
        value_name = "SIZE",
        default_value = "16GiB",
        requires = "prefix_cache_dir"
    )]
    prefix_cache_disk: ByteSize,

    /// Let the last bits of a result depend on the other requests, which is faster with many of them
    #[arg(long)]
    fast_batching: bool,

    /// Bytes of a request at most, in MiB
    #[arg(long, value_name = "N", default_value_t = 8)]
    max_body: usize,

    /// Connections at once
    #[arg(long, value_name = "N", default_value_t = 16_384)]
    max_connections: usize,

    /// Seconds that an answer may take
    #[arg(long, value_name = "SECONDS", default_value_t = 3600)]
    timeout: u64,

    /// Seconds for running answers when the server is stopped
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    drain: u64,

    /// Web origin whose pages may use the server, as in https://example.org, or * for all; may be given several times
    #[arg(long, value_name = "ORIGIN")]
    cors_origin: Vec<String>,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    thinking: ThinkingArgs,
}

/// Runs the command.
pub(crate) fn run(args: &ServeArgs) -> Result<(), CliError> {
    let keys = args.keys()?;
    let mut builder = args.engine.apply(args.rules.apply(args.source.builder()?));
    builder = builder.sequences(args.parallel);
    if let Some(device) = &args.device {
        builder = builder.default_device(device);
    }
    if let Some(tokens) = args.cache_tokens {
        builder = builder.cache_tokens(tokens);
    }
    let planned = builder.plan()?;
    notes::about_model(&planned);
    notes::about_plan(&planned);
    let plan = PlanView::of(&planned)?;
    let engine = load(planned, Show::OnTerminal)?;
    let scheduler = Scheduler::start(engine, args.scheduler())?;
    let settings = args.server(keys);
    let (name, open) = (settings.model_name.clone(), settings.api_keys.is_empty());
    let server = Server::bind(
        &format!("{}:{}", bracketed(&args.host), args.port),
        scheduler,
        settings,
        plan,
    )?;
    let address = server.address();
    if open && !address.ip().is_loopback() {
        notes::warning(format_args!(
            "everybody who reaches {address} can use this server: it has no API key (--api-key-file)"
        ));
    }
    notes::note(format_args!("`{name}` is served at http://{address}"));
    Ok(server.run_until_interrupted()?)
}

/// Raises the limit of files that this process may have open as far as so many connections need and the system lets
/// it; as many connections as fit then. More wait until others are closed.
#[cfg(unix)]
fn openable(connections: usize) -> usize {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    let wanted = (connections + OTHER_FILES) as u64;
    if limit.current.is_none_or(|current| current >= wanted) {
        return connections;
    }
    let raised = limit.maximum.map_or(wanted, |most| most.min(wanted));
    let before = limit.current.replace(raised).unwrap_or(raised);
    let open = match setrlimit(Resource::Nofile, limit) {
        Ok(()) => raised,
        Err(_) => before,
    };
    (open as usize).saturating_sub(OTHER_FILES).max(1)
}

#[cfg(not(unix))]
fn openable(connections: usize) -> usize {
    connections
}

/// IPv6 addresses are written in brackets before a port.
fn bracketed(host: &str) -> String {
    match host.contains(':') && !host.starts_with('[') {
        true => format!("[{host}]"),
        false => host.to_owned(),
    }
}

impl ServeArgs {
    fn keys(&self) -> Result<ApiKeys, CliError> {
        let mut keys = self.api_key.clone();
        keys.extend(std::env::var("KTX_API_KEY"));
        if let Some(file) = &self.api_key_file {
            let text = read_text(file)?;
            let lines = text.lines().map(str::trim);
            let before = keys.len();
            keys.extend(lines.filter(|line| !line.is_empty()).map(str::to_owned));
            if keys.len() == before {
                return Err(CliError::Usage(format!(
                    "{} holds no key; write one a line",
                    file.display()
                )));
            }
        }
        Ok(ApiKeys::new(keys))
    }

    fn scheduler(&self) -> SchedulerSettings {
        SchedulerSettings {
            max_running: self.parallel,
            max_waiting: self.queue,
            mixed_rows: self.mixed_chunk,
            prefix_cache: match self.no_prefix_cache {
                true => PrefixSharing::Off,
                false => PrefixSharing::On,
            },
            spill: self.spill(),
            batching: match self.fast_batching {
                true => Batching::Fastest,
                false => Batching::Exact,
            },
        }
    }

    /// To be called once the model is loaded: it goes by the memory that is left.
    fn spill(&self) -> SpillSettings {
        let free = || available_host_memory().unwrap_or(0) / FREE_MEMORY_PARTS;
        SpillSettings {
            memory_bytes: match self.prefix_cache_ram {
                Some(size) => size.0,
                None => free().min(MOST_PREFIX_RAM),
            },
            directory: self.prefix_cache_dir.clone(),
            directory_bytes: self.prefix_cache_disk.0,
        }
    }

    fn server(&self, api_keys: ApiKeys) -> ServerSettings {
        ServerSettings {
            model_name: self
                .model_name
                .clone()
                .unwrap_or_else(|| self.source.short_name()),
            api_keys,
            defaults: self.sampling.options(&self.thinking),
            max_body_bytes: self.max_body << 20,
            max_connections: openable(self.max_connections),
            request_timeout: Duration::from_secs(self.timeout),
            drain_timeout: Duration::from_secs(self.drain),
            cors_origins: self.cors_origin.clone(),
            ..ServerSettings::default()
        }
    }
}
