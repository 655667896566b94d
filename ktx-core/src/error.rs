//! Everything that can go wrong between a file and a token.

use std::path::PathBuf;

use ktx_gguf::GgufError;
use ktx_kernels::kv::KvError;
use ktx_models::ModelError;
use ktx_ops::lora::AdapterError;
use ktx_ops::{DuplicateOperator, OpError};

use crate::chat::ChatError;
use crate::memory::Bytes;
use crate::plan::{CheckReport, DeviceError, PlanError};
use crate::rules::RuleError;
use crate::sampling::SamplingError;
use crate::tokenizer::TokenizerError;

/// Why an engine could not be made, or a call could not be carried out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The model's file.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A directory that does not hold one model.
    #[error("{}: {reason}", path.display())]
    ModelDirectory {
        /// The directory.
        path: PathBuf,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// Safetensors files that cannot be used beside this model.
    #[error("{file}: {reason}")]
    Beside {
        /// The file or directory.
        file: String,
        /// What is wrong, and what to do.
        reason: String,
    },
    /// The model's architecture or metadata.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The rule file.
    #[error(transparent)]
    Rule(#[from] RuleError),
    /// The rules on this model's tree.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// A device that is not there, or is none.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Operators that do not fit.
    #[error("the plan cannot be carried out:\n{0}")]
    Check(CheckReport),
    /// There is no preset of this name.
    #[error(
        "there is no preset `{name}`; there are: {known}. A file is named with a path, such as ./{name}.yaml"
    )]
    Preset {
        /// The name.
        name: String,
        /// All presets.
        known: String,
    },
    /// A module.
    #[error(transparent)]
    Module(#[from] OpError),
    /// Two operators of one name are linked into this program.
    #[error(transparent)]
    Registry(#[from] DuplicateOperator),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The chat template.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The model cannot chat.
    #[error("{reason}; continue plain text instead (`ktx run --raw`)")]
    NoTemplate {
        /// Why there is no template.
        reason: String,
    },
    /// The sampling parameters.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The cache of keys and values.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// `KTX_CPU` asks for what this CPU does not have.
    #[error(transparent)]
    Cpu(#[from] ktx_kernels::cpu::CpuError),
    /// `KTX_GPUS` asks for what is not there.
    #[error(transparent)]
    Gpus(ktx_kernels::cuda::CudaError),
    /// The model does not fit.
    #[error(
        "not enough memory{place}: the plan needs {needed} ({weights} of weights, {kv} of cache for a context of {context}, \
         {scratch} of activations and program) and {available} are available: it needs {missing} more; {advice}"
    )]
    NotEnoughMemory {
        /// Where, behind a space; nothing for main memory.
        place: String,
        /// All of it.
        needed: Bytes,
        /// Weights.
        weights: Bytes,
        /// Keys and values.
        kv: Bytes,
        /// Activations, and the program itself.
        scratch: Bytes,
        /// What there is.
        available: Bytes,
        /// What it needs more.
        missing: Bytes,
        /// Tokens of context.
        context: usize,
        /// What would fit.
        advice: String,
    },
    /// No placement fits.
    #[error(transparent)]
    Placement(#[from] crate::placement::PlacementError),
    /// The prompt and what stands before it are longer than the context.
    #[error(
        "the prompt has {prompt} tokens and {cached} are in the conversation already, and the context holds {context}; \
         shorten it, start a new conversation, or raise the context (--context)"
    )]
    ContextFull {
        /// New tokens.
        prompt: usize,
        /// Tokens before them.
        cached: usize,
        /// What fits.
        context: usize,
    },
    /// All cache pages are taken by other sessions.
    #[error(
        "the cache is full: other sessions hold its pages; close one, or make the engine with more `sessions`"
    )]
    CacheFull,
    /// The prompt has no tokens.
    #[error("the prompt is empty: there is nothing to continue")]
    EmptyPrompt,
    /// A setting is out of its range.
    #[error("{name} is {value}; {range}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        value: usize,
        /// What is allowed.
        range: &'static str,
    },
    /// A type of the cache whose blocks do not divide an attention's heads.
    #[error(
        "a KV cache of type {kv_type} stores {block} values together, and {path} has heads of {width}; use f16 for this model"
    )]
    KvBlocks {
        /// The type.
        kv_type: &'static str,
        /// Path of the attention.
        path: String,
        /// Values of a head, or of a part of the compressed row.
        width: usize,
        /// Values of a block.
        block: usize,
    },
    /// An adapter that cannot be read, or is not for this model.
    #[error(transparent)]
    Adapter(#[from] Box<AdapterError>),
    /// The engine holds no such adapter.
    #[error("there is no adapter `{name}`; {known}")]
    NoAdapter {
        /// What was asked for.
        name: String,
        /// All adapters, in words.
        known: String,
    },
    /// An adapter's factor is no number.
    #[error(
        "the scale of adapter `{name}` is {scale}; a number is expected, 1 is as it was trained"
    )]
    AdapterScale {
        /// The adapter.
        name: String,
        /// Its factor.
        scale: f32,
    },
    /// A session has chosen an adapter that was unloaded since.
    #[error(
        "adapter number {id} was unloaded, and this session has it chosen; choose others (Session::set_adapters)"
    )]
    AdapterGone {
        /// Its number.
        id: u32,
    },
    /// The directory of the prefix cache.
    #[error("the prefix cache's directory {} cannot be used: {reason}", directory.display())]
    PrefixCache {
        /// The directory.
        directory: PathBuf,
        /// Why.
        reason: String,
    },
    /// The system refused a thread.
    #[error("no thread could be started: {0}")]
    Thread(std::io::Error),
    /// A file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// An earlier call panicked, and the engine's state is not known to be whole.
    #[error("the engine stopped working in an earlier call; make a new one")]
    Poisoned,
}

impl From<AdapterError> for EngineError {
    fn from(error: AdapterError) -> Self {
        Box::new(error).into()
    }
}
