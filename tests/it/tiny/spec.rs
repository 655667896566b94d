//! What a tiny model is made of.

use ktx_gguf::GgmlType;

/// The architecture that the file names.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Architecture {
    Llama,
    DeepSeek2,
    Qwen2,
    Qwen2Moe,
    Qwen3,
    Qwen3Moe,
}

impl Architecture {
    pub fn name(self) -> &'static str {
        match self {
            Architecture::Llama => "llama",
            Architecture::DeepSeek2 => "deepseek2",
            Architecture::Qwen2 => "qwen2",
            Architecture::Qwen2Moe => "qwen2moe",
            Architecture::Qwen3 => "qwen3",
            Architecture::Qwen3Moe => "qwen3moe",
        }
    }
}

/// A model's switches and sizes.
#[derive(Clone, Debug)]
pub struct TinySpec {
    pub architecture: Architecture,
    pub seed: u64,
    pub layers: usize,
    pub hidden: usize,
    pub heads: usize,
    /// Without effect with `latent`.
    pub kv_heads: usize,
    /// Without effect with `latent`.
    pub head_dim: usize,
    /// Width of dense layers.
    pub ffn: usize,
    pub epsilon: f32,
    pub context: u32,
    pub rope_base: f32,
    pub rope_scaling: RopeScaling,
    /// The head is the embedding.
    pub tied: bool,
    /// Biases on q, k and v.
    pub attention_bias: bool,
    /// Rows of embedding and head beyond the tokenizer's vocabulary.
    pub extra_vocabulary: usize,
    pub latent: Option<LatentSpec>,
    pub experts: Option<ExpertSpec>,
    pub types: Types,
}

/// How positions are stretched.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum RopeScaling {
    None,
    Linear {
        factor: f32,
    },
    /// `rope_freqs.weight`, as Llama 3 files have it.
    Divisors,
    Yarn {
        factor: f32,
        original_context: u32,
        /// 0.1 * mscale_all_dim; DeepSeek's files have it, Qwen's do not.
        log_multiplier: Option<f32>,
    },
}

/// Multi-head latent attention.
#[derive(Clone, Copy, Debug)]
pub struct LatentSpec {
    pub q_lora: Option<usize>,
    pub kv_lora: usize,
    pub nope: usize,
    pub rope: usize,
    pub value: usize,
    pub layout: KvLayout,
}

/// The tensors that hold the way from the latent vector to keys and values.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum KvLayout {
    /// `attn_kv_b` (old files).
    Joined,
    /// `attn_k_b`, transposed, and `attn_v_b`.
    Split,
}

/// A mixture of experts. Options that are `None` are not written to the file.
#[derive(Clone, Copy, Debug)]
pub struct ExpertSpec {
    pub count: usize,
    pub top_k: usize,
    pub ffn: usize,
    pub layout: ExpertLayout,
    /// Width of the shared expert (for DeepSeek a multiple of `ffn`); 0 without one.
    pub shared_ffn: usize,
    pub leading_dense: usize,
    /// `expert_gating_func`: 1 softmax, 2 sigmoid.
    pub gating: Option<u32>,
    pub norm: Option<bool>,
    pub scale: Option<f32>,
    /// Number of groups, and how many are used.
    pub groups: Option<(usize, usize)>,
    /// `exp_probs_b`.
    pub bias: bool,
}

/// One tensor for all experts of a layer, or (old Mixtral files) one for each.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ExpertLayout {
    Merged,
    PerExpert,
}

/// Tensor types by part of the model. Where a row is not a whole number of blocks, Q8_0 is taken instead, or F16.
/// Norms, biases and routers are F32.
#[derive(Clone, Copy, Debug)]
pub struct Types {
    pub embedding: GgmlType,
    pub attention: GgmlType,
    pub gate_up: GgmlType,
    pub down: GgmlType,
    pub output: GgmlType,
}

impl Types {
    pub const fn all(ty: GgmlType) -> Self {
        Self {
            embedding: ty,
            attention: ty,
            gate_up: ty,
            down: ty,
            output: ty,
        }
    }
}
