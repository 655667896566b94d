//! `ktx-dynamo`: registers a model with Dynamo and answers its requests.

use std::path::PathBuf;
use std::sync::Arc;

use clap::Parser;
use dynamo_backend_common::{CommonArgs, WorkerConfig, run};
use ktx_core::serving::SchedulerSettings;
use ktx_core::{Engine, Rules};
use ktx_dynamo::{KtxBackend, WorkerSettings};

/// Run a GGUF model as a worker of NVIDIA Dynamo
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// GGUF file of the model, of a split one any part
    #[arg(long, value_name = "PATH")]
    model: PathBuf,

    /// Hugging Face name or directory of the same model, from which Dynamo takes tokenizer and chat template
    #[arg(long, value_name = "NAME|DIRECTORY")]
    tokenizer: String,

    /// What clients call the model [default: the tokenizer's name]
    #[arg(long, value_name = "NAME")]
    served_model_name: Option<String>,

    /// Rule file; without it, the preset of the architecture
    #[arg(long, value_name = "FILE")]
    rules: Option<PathBuf>,

    /// Tokens that a conversation holds at most
    #[arg(long, value_name = "N")]
    context: Option<usize>,

    /// Tokens that the cache of all requests holds together
    #[arg(long, value_name = "N")]
    cache_tokens: Option<usize>,

    /// Requests that are worked on at once
    #[arg(long, value_name = "N", default_value_t = 32)]
    parallel: usize,

    /// Threads of the CPU
    #[arg(long, value_name = "N")]
    threads: Option<usize>,

    #[command(flatten)]
    common: CommonArgs,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let mut engine = Engine::builder().model(&args.model);
    if let Some(rules) = args.rules {
        engine = engine.rules(Rules::File(rules));
    }
    if let Some(context) = args.context {
        engine = engine.context(context);
    }
    if let Some(tokens) = args.cache_tokens {
        engine = engine.cache_tokens(tokens);
    }
    if let Some(threads) = args.threads {
        engine = engine.threads(threads);
    }
    let backend = KtxBackend::new(WorkerSettings {
        engine,
        model_name: args.tokenizer.clone(),
        scheduler: SchedulerSettings {
            max_running: args.parallel,
            ..SchedulerSettings::default()
        },
    });
    let common = args.common;
    let config = WorkerConfig {
        namespace: common.namespace,
        component: common.component,
        endpoint: common.endpoint,
        model_name: args.tokenizer,
        served_model_name: args.served_model_name,
        endpoint_types: common.endpoint_types,
        custom_jinja_template: common.custom_jinja_template,
        tool_call_parser: common.dyn_tool_call_parser,
        reasoning_parser: common.dyn_reasoning_parser,
        exclude_tools_when_tool_choice_none: common.exclude_tools_when_tool_choice_none,
        disaggregation_mode: common.disaggregation_mode,
        runtime: common.runtime,
        ..WorkerConfig::default()
    };
    run(Arc::new(backend), config)
}
