//! What the modules of a tree compute, with their sizes: all that an operator needs to know to take
//! a module's place, before it reads a weight.

use std::num::NonZeroUsize;

use ktx_kernels::activation::GatedActivation;
use ktx_kernels::gate::GateConfig;
use ktx_kernels::rope::{RopeConfig, RopeLayout};

use crate::tree::Role;

/// What a module computes.
#[derive(Debug, Clone)]
pub enum Spec {
    /// Computes nothing of its own.
    Container,
    /// Known by name and class only: a tree that was read from a file of names.
    Opaque,
    /// A matrix product.
    Linear(LinearSpec),
    /// Root mean square normalisation.
    Norm(NormSpec),
    /// Rotary position embedding.
    Rope(RopeSpec),
    /// Token embedding.
    Embedding(EmbeddingSpec),
    /// Multi-head attention with grouped keys and values.
    Attention(AttentionSpec),
    /// Multi-head latent attention.
    Mla(MlaSpec),
    /// Router of a mixture of experts.
    Gate(GateSpec),
    /// The routed experts of a layer.
    Experts(ExpertsSpec),
    /// Gated feed-forward block: `down(silu(gate(x)) * up(x))`.
    Mlp(MlpSpec),
    /// Mixture-of-experts block: router, routed experts, and maybe shared experts.
    Moe(MoeSpec),
    /// Attention and feed-forward with their norms and residuals.
    Layer(LayerSpec),
    /// Embedding, layers, final norm.
    Model(ModelSpec),
}

impl Spec {
    /// The role of a module with this spec.
    pub fn role(&self) -> Role {
        match self {
            Self::Container | Self::Opaque => Role::Container,
            Self::Linear(_) => Role::Linear,
            Self::Norm(_) => Role::Norm,
            Self::Rope(_) => Role::Rope,
            Self::Embedding(_) => Role::Embedding,
            Self::Attention(_) | Self::Mla(_) => Role::Attention,
            Self::Gate(_) => Role::Gate,
            Self::Experts(_) => Role::Experts,
            Self::Mlp(_) | Self::Moe(_) => Role::Ffn,
            Self::Layer(_) => Role::Layer,
            Self::Model(_) => Role::Model,
        }
    }
}

/// `[tokens, in_features] -> [tokens, out_features]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// Width of a row that comes in.
    pub in_features: usize,
    /// Width of a row that goes out.
    pub out_features: usize,
    /// Where the weights are.
    pub source: LinearSource,
    /// Order of the file's rows.
    pub order: RowOrder,
}

/// Order of a matrix's rows in the file, compared with Hugging Face's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum RowOrder {
    /// The same.
    #[default]
    Original,
    /// In each of `heads` heads, the two rows that are rotated together are neighbours; in the
    /// original they are half a head apart.
    RotatedPairs {
        /// Number of heads.
        heads: usize,
    },
}

/// Where a matrix's weights are in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinearSource {
    /// The tensor `KEY.weight`, and `KEY.bias` if the file has it.
    Key,
    /// Another tensor, named in full (a tied output head).
    Tensor(String),
    /// Expert `index` of the merged tensor `TENSOR.weight` `[experts, out, in]`, or else of the
    /// separate tensors `BASE.INDEX.weight`.
    Expert {
        /// Name of the merged tensor without `.weight`: `blk.3.ffn_gate_exps`.
        merged: String,
        /// Name of the separate tensors without index and `.weight`: `blk.3.ffn_gate`.
        separate: String,
        /// Which expert.
        index: usize,
    },
    /// `kv_b_proj` of latent attention: `KEY.weight`, or put together from the split
    /// `attn_k_b` `[heads, kv_lora_rank, nope]` and `attn_v_b` `[heads, v, kv_lora_rank]`.
    KvB {
        /// Prefix of the split tensors: `blk.3.`.
        prefix: String,
    },
}

/// `x / sqrt(mean(x^2) + eps) * weight` over the last `size` values.
#[derive(Debug, Clone, PartialEq)]
pub struct NormSpec {
    /// Width of what is normalised.
    pub size: usize,
    /// Added to the mean square.
    pub eps: f32,
}

/// Rotary position embedding of one attention.
#[derive(Debug, Clone)]
pub struct RopeSpec {
    /// Frequencies and scaling.
    pub config: RopeConfig,
    /// Which values are rotated together.
    pub layout: RopeLayout,
    /// Longest context the model states.
    pub max_positions: usize,
}

/// A table `[vocab, hidden]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmbeddingSpec {
    /// Number of rows.
    pub vocab_size: usize,
    /// Width of a row.
    pub hidden_size: usize,
}

/// Attention with `num_key_value_heads` keys and values shared by groups of query heads.
#[derive(Debug, Clone, PartialEq)]
pub struct AttentionSpec {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Factor on the scores before softmax.
    pub softmax_scale: f32,
    /// Whether `q_norm` and `k_norm` normalise each head before the rotation.
    pub head_norms: bool,
    /// Latest positions that a query sees, its own included; nothing for all.
    pub window: Option<NonZeroUsize>,
    /// Name of the tensor with a logit for each head that takes part in the softmax and has no
    /// value, if there is one.
    pub sinks: Option<String>,
}

/// Multi-head latent attention (DeepSeek-V2, section 2.1).
#[derive(Debug, Clone, PartialEq)]
pub struct MlaSpec {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Heads.
    pub num_attention_heads: usize,
    /// Width of the compressed query, if queries are compressed.
    pub q_lora_rank: Option<usize>,
    /// Width of the compressed key and value.
    pub kv_lora_rank: usize,
    /// Width of a head's part that is not rotated.
    pub qk_nope_head_dim: usize,
    /// Width of a head's part that is rotated.
    pub qk_rope_head_dim: usize,
    /// Width of a head's value.
    pub v_head_dim: usize,
    /// Factor on the scores before softmax, YaRN's correction included.
    pub softmax_scale: f32,
}

impl MlaSpec {
    /// Width of one head's query: both parts.
    pub fn q_head_dim(&self) -> usize {
        self.qk_nope_head_dim + self.qk_rope_head_dim
    }

    /// Width of one token's row in the cache: compressed part, then rotated key.
    pub fn cache_width(&self) -> usize {
        self.kv_lora_rank + self.qk_rope_head_dim
    }
}

/// Router: scores of all experts, choice of `top_k`.
#[derive(Debug, Clone)]
pub struct GateSpec {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Scoring, selection and normalisation; how many experts there are.
    pub config: GateConfig,
    /// Name of the tensor that is added to the logits, if there is one.
    pub logit_bias: Option<String>,
    /// Name of the tensor that is added to the scores for selection only, if there is one.
    pub bias: Option<String>,
}

/// The routed experts of one layer: a list of feed-forward blocks, or without children one module
/// that holds the weights of all.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsSpec {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of one expert.
    pub moe_intermediate_size: usize,
    /// Number of experts.
    pub num_experts: usize,
    /// Experts that one token uses.
    pub top_k: usize,
    /// Prefix of the weights: `blk.3.` for `blk.3.ffn_gate_exps.weight`.
    pub prefix: String,
    /// Names of one expert's three projections: gate, up, down.
    pub projections: [&'static str; 3],
    /// Whether all three have biases: `blk.3.ffn_gate_exps.bias` and so on.
    pub biases: bool,
    /// What joins gate and up.
    pub activation: GatedActivation,
}

/// Sizes of a gated feed-forward block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MlpSpec {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between the projections.
    pub intermediate_size: usize,
    /// Names of the three projections: gate, up, down.
    pub projections: [&'static str; 3],
}

/// Sizes and parts of a mixture-of-experts block.
#[derive(Debug, Clone)]
pub struct MoeSpec {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Experts that one token uses.
    pub top_k: usize,
    /// The child that is the router.
    pub gate: &'static str,
    /// How to choose from the router's logits, where that child is a plain matrix `[experts, hidden]`.
    pub router: Option<GateConfig>,
    /// The child that holds the shared experts, if there is one.
    pub shared: Option<&'static str>,
    /// The child whose sigmoid scales the shared experts, if there is one.
    pub shared_gate: Option<&'static str>,
}

/// A decoder layer: `x += attention(norm(x)); x += ffn(norm(x))`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSpec {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// The child that is the feed-forward block.
    pub ffn: &'static str,
}

/// The stack of layers between embedding and final norm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelSpec {
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of layers.
    pub num_layers: usize,
    /// Number of token ids.
    pub vocab_size: usize,
}
