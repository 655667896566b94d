//! Flags that say which model is used, where its modules go, and with how much of the machine.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use ktx_core::kernels::kv::KvType;
use ktx_core::kernels::linear::Precision;
use ktx_core::placement::{ByteSize, ParseSizeError};
use ktx_core::rules::RuleVariables;
use ktx_core::{
    AutoPlacement, DeviceMapping, Engine, EngineBuilder, HostWeights, HotMemory, MemoryCheck,
    PlannedModel, Rules,
};

use crate::adapter_args::AdapterArgs;
use crate::builtin::builtin_model;
use crate::error::CliError;
use crate::notes;
use crate::progress::Progress;
use crate::terminal::Show;

/// Which model.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct ModelSource {
    /// GGUF file of the model, of a split one any part, or a directory that holds one and maybe safetensors files;
    /// without it, the built-in model
    #[arg(short, long, value_name = "PATH")]
    pub(crate) model: Option<PathBuf>,

    /// As --model
    #[arg(
        long,
        alias = "gguf_path",
        value_name = "PATH",
        hide = true,
        conflicts_with = "model"
    )]
    gguf_path: Option<PathBuf>,

    /// Safetensors files of the same model (file, index or directory): weights that they have go before the GGUF's;
    /// may be given several times
    #[arg(long, value_name = "PATH")]
    safetensors: Vec<PathBuf>,
}

/// Which rules, and what becomes of the devices that they name.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct RuleArgs {
    /// Rule file, or the name of a preset (`ktx rules`); without it, the preset of the architecture
    #[arg(long, aliases = ["optimize_config_path", "optimize-config-path"], value_name = "FILE|PRESET")]
    pub(crate) rules: Option<PathBuf>,

    /// Give a variable of the rule file a value, as in --set gpu=cuda:1; may be given several times
    #[arg(long = "set", value_name = "NAME=VALUE", value_parser = assignment)]
    pub(crate) set: Vec<Assignment>,

    /// Put every module on the CPU, whatever the rules say
    #[arg(long)]
    pub(crate) cpu: bool,

    /// Place modules without rules into this much memory of a GPU; once for each GPU, or with commas
    #[arg(
        long,
        value_name = "SIZE",
        value_delimiter = ',',
        conflicts_with = "rules"
    )]
    pub(crate) gpu_memory: Vec<ByteSize>,

    /// Place modules without rules, into this much main memory [default: what is available]
    #[arg(long, value_name = "SIZE", conflicts_with = "rules")]
    pub(crate) ram: Option<ByteSize>,
}

/// An amount of a GPU's memory, or what is left of it.
fn hot_memory(text: &str) -> Result<HotMemory, ParseSizeError> {
    match text {
        "auto" => Ok(HotMemory::LeftOver),
        size => size.parse().map(HotMemory::Bytes),
    }
}

/// A variable of a rule file and its value.
#[derive(Debug, Clone)]
pub(crate) struct Assignment {
    name: String,
    value: String,
}

/// `gpu=cuda:1`
pub(crate) fn assignment(text: &str) -> Result<Assignment, String> {
    match text.split_once('=') {
        Some((name, value)) if !name.trim().is_empty() => Ok(Assignment {
            name: name.trim().to_owned(),
            value: value.trim().to_owned(),
        }),
        _ => Err("write a variable and its value, as in `gpu=cuda:1`".to_owned()),
    }
}

/// The values of variables.
pub(crate) fn variables(set: &[Assignment]) -> RuleVariables {
    let mut variables = RuleVariables::default();
    for assignment in set {
        variables.set(&assignment.name, &assignment.value);
    }
    variables
}

/// How much of the machine is used, and for what.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct EngineArgs {
    /// Threads of the CPU [default: as many as this process may use]
    #[arg(short, long, aliases = ["cpu_infer", "cpu-infer"], value_name = "N")]
    pub(crate) threads: Option<usize>,

    /// Tokens that a conversation holds at most [default: the model's, up to 8192]
    #[arg(short, long, value_name = "N")]
    pub(crate) context: Option<usize>,

    /// Prompt tokens of one forward call [default: 512]
    #[arg(long, aliases = ["chunk_size", "chunk_prefill_size", "chunk-prefill-size"], value_name = "N")]
    pub(crate) chunk_size: Option<usize>,

    /// Tokens from which on a prompt's chunk has experts that live in main memory streamed to the GPU, where the plan
    /// puts prompts there [default: as the machine's speed makes it worth]
    #[arg(long, value_name = "N")]
    pub(crate) stream_from: Option<usize>,

    /// Part of each layer's experts that the GPU takes of such a chunk, 0 to 1; the CPU computes the others at the same
    /// time [default: as the machine's speed makes both end together]
    #[arg(long, value_name = "PART")]
    pub(crate) stream_share: Option<f64>,

    /// Element type of the cache of keys and values [default: f16; f32 with --precision f32]
    #[arg(long, value_name = "TYPE")]
    pub(crate) kv_type: Option<KvTypeArg>,

    /// How matrix products take their activations; f32 is exact and slow, for debugging an operator
    #[arg(long, value_name = "TYPE", default_value = "int8")]
    pub(crate) precision: PrecisionArg,

    /// Experts of each token that are added one layer later while tokens are generated, so that the CPU
    /// computes them while a GPU goes on; answers change a little
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) deferred_experts: usize,

    /// GPU memory for the most used of the experts that live in main memory: SIZE, or `auto` for what is left of each
    /// GPU; answers change a little
    #[arg(long, value_name = "SIZE", value_parser = hot_memory)]
    pub(crate) hot_experts: Option<HotMemory>,

    #[command(flatten)]
    pub(crate) adapters: AdapterArgs,

    /// Copy the weights that the CPU multiplies with into huge pages, which are read somewhat faster; loading takes longer
    #[arg(long)]
    pub(crate) huge_pages: bool,

    /// Load the model even if it does not fit into memory, and let the system page
    #[arg(long)]
    pub(crate) ignore_memory: bool,
}

/// Element types of the cache.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum KvTypeArg {
    F16,
    F32,
    /// Blocks of 32 bytes with a scale: half of F16's memory
    #[value(name = "q8_0")]
    Q8,
}

/// How products take their activations.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub(crate) enum PrecisionArg {
    #[default]
    Int8,
    F32,
}

impl ModelSource {
    /// What messages call the model.
    pub(crate) fn name(&self) -> String {
        match self.model.as_ref().or(self.gguf_path.as_ref()) {
            Some(path) => path.display().to_string(),
            None => crate::builtin::NAME.to_owned(),
        }
    }

    /// What clients of a server call the model: its file's name without the extension.
    pub(crate) fn short_name(&self) -> String {
        let path = self.model.as_ref().or(self.gguf_path.as_ref());
        let name = path.and_then(|path| path.file_stem());
        name.map_or_else(
            || crate::builtin::SHORT_NAME.to_owned(),
            |name| name.to_string_lossy().into_owned(),
        )
    }

    /// Settings of an engine for this model.
    pub(crate) fn builder(&self) -> Result<EngineBuilder, CliError> {
        let builder = match self.model.as_ref().or(self.gguf_path.as_ref()) {
            Some(path) => Engine::builder().model(path),
            None => Engine::builder().gguf(builtin_model()?),
        };
        Ok(self
            .safetensors
            .iter()
            .fold(builder, EngineBuilder::safetensors))
    }
}

impl RuleArgs {
    /// A name that is no file is that of a preset; a path is always a file.
    pub(crate) fn rules(&self) -> Rules {
        match &self.rules {
            None if self.is_automatic() => Rules::Auto(self.automatic()),
            // A GPU is used if there is one, for what pays most there.
            None if !self.cpu => match AutoPlacement::on_this_machine() {
                Some(auto) => Rules::Auto(auto),
                None => Rules::Preset,
            },
            None => Rules::Preset,
            Some(path) if is_preset_name(path) => Rules::Named(path.display().to_string()),
            Some(path) => Rules::File(path.clone()),
        }
    }

    /// Whether memory was named to place modules into.
    fn is_automatic(&self) -> bool {
        !self.gpu_memory.is_empty() || self.ram.is_some()
    }

    /// What automatic placement may use.
    pub(crate) fn automatic(&self) -> AutoPlacement {
        AutoPlacement {
            gpu_memory: self.gpu_memory.iter().map(|size| size.0).collect(),
            ram: self.ram.map(|size| size.0),
            ..AutoPlacement::default()
        }
    }

    fn mapping(&self) -> DeviceMapping {
        match self.cpu {
            true => DeviceMapping::AllOnCpu,
            false => DeviceMapping::AsPlanned,
        }
    }

    /// Puts these settings into those of an engine.
    pub(crate) fn apply(&self, builder: EngineBuilder) -> EngineBuilder {
        let builder = builder.rules(self.rules()).devices(self.mapping());
        set_variables(builder, &self.set)
    }
}

/// Puts the values of variables into an engine's settings.
pub(crate) fn set_variables(builder: EngineBuilder, set: &[Assignment]) -> EngineBuilder {
    set.iter().fold(builder, |builder, assignment| {
        builder.rule_variable(&assignment.name, &assignment.value)
    })
}

fn is_preset_name(path: &Path) -> bool {
    path.components().count() == 1 && path.extension().is_none() && !path.exists()
}

impl EngineArgs {
    /// Puts these settings into those of an engine.
    pub(crate) fn apply(&self, builder: EngineBuilder) -> EngineBuilder {
        let mut builder = self.adapters.apply(builder);
        if let Some(threads) = self.threads {
            builder = builder.threads(threads);
        }
        if let Some(context) = self.context {
            builder = builder.context(context);
        }
        if let Some(tokens) = self.chunk_size {
            builder = builder.chunk_size(tokens);
        }
        if let Some(tokens) = self.stream_from {
            builder = builder.stream_from(tokens);
        }
        if let Some(share) = self.stream_share {
            builder = builder.stream_share(share);
        }
        if let Some(memory) = self.hot_experts {
            builder = builder.hot_experts(memory);
        }
        if let Some(kv_type) = self.kv_type {
            builder = builder.kv_type(match kv_type {
                KvTypeArg::F16 => KvType::F16,
                KvTypeArg::F32 => KvType::F32,
                KvTypeArg::Q8 => KvType::Q8_0,
            });
        }
        builder
            .precision(match self.precision {
                PrecisionArg::Int8 => Precision::Int8,
                PrecisionArg::F32 => Precision::F32,
            })
            .deferred_experts(self.deferred_experts)
            .host_weights(match self.huge_pages {
                true => HostWeights::HugePages,
                false => HostWeights::Mapped,
            })
            .memory_check(match self.ignore_memory {
                true => MemoryCheck::Ignore,
                false => MemoryCheck::Refuse,
            })
    }
}

/// Loads a planned model, with its progress on a terminal.
pub(crate) fn load(planned: PlannedModel, show: Show) -> Result<Engine, CliError> {
    planned.require()?;
    // Modules that share a tensor load it once.
    let weights: u64 = planned.module_weights()?.iter().map(|w| w.bytes).sum();
    let total = weights.min(planned.weights().file_size());
    let mut progress = Progress::new("loading", total, show);
    Ok(planned.load(&mut |at| {
        progress.at(at.loaded);
        true
    })?)
}

/// Plans a model and loads it; says on standard error what the plan says.
pub(crate) fn plan_and_load(
    source: &ModelSource,
    rules: &RuleArgs,
    engine: &EngineArgs,
    device: Option<&str>,
) -> Result<Engine, CliError> {
    let mut builder = engine.apply(rules.apply(source.builder()?));
    if let Some(device) = device {
        builder = builder.default_device(device);
    }
    let planned = builder.plan()?;
    notes::about_plan(&planned);
    load(planned, Show::OnTerminal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_word_is_a_preset_and_a_path_is_a_file() {
        for (name, preset) in [
            ("llama", true),
            ("./llama", false),
            ("llama.yaml", false),
            ("a/llama", false),
        ] {
            assert_eq!(is_preset_name(Path::new(name)), preset, "{name}");
        }
    }
}
