//! What an engine is made with.

use ktx_kernels::kv::KvType;
use ktx_kernels::linear::Precision;
use ktx_kernels::moe::stream::Uploads;
use ktx_ops::Streaming;
use ktx_ops::spec::Spec;
use ktx_ops::tree::Module;

use super::hot::HotMemory;
use crate::error::EngineError;

/// What happens if a model does not fit into memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum MemoryCheck {
    /// It is refused before anything is loaded.
    #[default]
    Refuse,
    /// It is loaded; the system pages weights in and out as it can.
    Ignore,
}

/// Where weights lie that the CPU multiplies with.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HostWeights {
    /// In the mapped file: nothing is copied, and processes share them.
    #[default]
    Mapped,
    /// In copies of the process's own, in huge pages where the system has them: loading takes longer, products read
    /// somewhat faster.
    HugePages,
}

/// What an engine is made with, defaults filled in.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Threads of the host.
    pub threads: usize,
    /// Tokens that one session holds at most.
    pub context: usize,
    /// Prompt tokens of one forward call.
    pub chunk_size: usize,
    /// Sessions whose full context fits at once.
    pub sessions: usize,
    /// Sequences of one forward call at most, where a GPU takes part.
    pub sequences: usize,
    /// How products take their activations.
    pub precision: Precision,
    /// How keys and values are stored.
    pub kv_type: KvType,
    /// Experts of each token that are added one layer later while tokens are generated.
    pub deferred_experts: usize,
    /// Memory of each GPU for the most used of the experts that live in main memory.
    pub hot_experts: Option<HotMemory>,
    /// Where weights lie that the CPU multiplies with.
    pub host_weights: HostWeights,
    /// When and how far a prompt's experts are streamed to a GPU; none where the plan puts no experts in main
    /// memory and their prompts on a GPU.
    pub streaming: Option<Streaming>,
    /// How streamed experts come out of main memory.
    pub uploads: Uploads,
}

/// A setting from 1 to what any model could use.
pub(super) fn positive(name: &'static str, value: usize) -> Result<usize, EngineError> {
    match value {
        1..=16_777_216 => Ok(value),
        _ => Err(EngineError::Setting {
            name,
            value,
            range: "1 to 16777216 are allowed",
        }),
    }
}

/// A number of experts that every layer with experts can put off.
pub(super) fn deferrable(experts: usize, tree: &Module) -> Result<usize, EngineError> {
    fn fewest(module: &Module) -> Option<usize> {
        let own = match &module.spec {
            Spec::Moe(spec) => Some(spec.top_k),
            _ => None,
        };
        let below = module.children.iter().filter_map(fewest);
        own.into_iter().chain(below).min()
    }
    match (experts, fewest(tree)) {
        (0, _) => Ok(0),
        (_, Some(top_k)) if experts < top_k => Ok(experts),
        _ => Err(EngineError::Setting {
            name: "deferred_experts",
            value: experts,
            range: "fewer than each token has in a layer are allowed, and none in a model without routed experts",
        }),
    }
}

/// A type of the cache in which every head of a model is whole blocks.
pub(super) fn cacheable(kv_type: KvType, tree: &Module) -> Result<KvType, EngineError> {
    let parts = match &tree.spec {
        Spec::Attention(spec) => [spec.head_dim, 0],
        Spec::Mla(spec) => [spec.kv_lora_rank, spec.qk_rope_head_dim],
        _ => [0, 0],
    };
    let block = kv_type.block();
    if let Some(width) = parts.into_iter().find(|width| !width.is_multiple_of(block)) {
        return Err(EngineError::KvBlocks {
            kv_type: kv_type.name(),
            path: tree.path.clone(),
            width,
            block,
        });
    }
    tree.children.iter().try_fold(kv_type, cacheable)
}
