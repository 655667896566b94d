//! DeepSeek-V2, V2-Lite, V3 and R1, and Moonlight: latent attention and a mixture of experts.
//!
//! V2's tree and V3's differ in class names and in the router: softmax and greedy choice, maybe
//! limited to groups, in V2; sigmoid with a correction bias in V3.

use ktx_kernels::gate::{
    ExpertGroups, GateConfig, GroupScore, NormTopkProb, Scoring, WeightScaling,
};
use ktx_kernels::rope::{RopeLayout, RopeScaling, yarn_mscale};
use ktx_ops::Module;
use ktx_ops::spec::{GateSpec, LinearSource, MlaSpec, MoeSpec, RopeSpec, Spec};

use crate::ModelError;
use crate::keys::Keys;
use crate::parts::{
    Experts, PROJECTIONS, Skeleton, expert_count, linear, linear_from, rope_config,
};

/// Epsilon of the norms of the compressed query and key, whatever the model's is.
const LORA_NORM_EPS: f32 = 1e-6;

/// Which of the two routers a file was made for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Generation {
    V2,
    V3,
}

/// Sizes of the mixture of experts.
struct Moe {
    first_k_dense_replace: usize,
    router: GateConfig,
    moe_intermediate_size: usize,
    n_shared_experts: usize,
}

/// The tree of a file of architecture `deepseek2`.
pub(crate) fn tree(keys: &Keys<'_>) -> Result<Module, ModelError> {
    let generation = generation(keys)?;
    let (classes, family) = match generation {
        Generation::V2 => ("ktransformers.models.modeling_deepseek", "DeepseekV2"),
        Generation::V3 => ("ktransformers.models.modeling_deepseek_v3", "DeepseekV3"),
    };
    let skeleton = Skeleton::read(keys, classes, family)?;
    let (mla, rope) = attention_sizes(keys, skeleton.hidden_size)?;
    let moe = match keys.count("expert_count")? {
        0 => None,
        _ => Some(moe_sizes(keys, generation, skeleton.num_layers)?),
    };
    let dense_layers = moe
        .as_ref()
        .map_or(skeleton.num_layers, |moe| moe.first_k_dense_replace);
    let intermediate_size = match dense_layers {
        0 => 0,
        _ => keys.size("feed_forward_length")?,
    };
    skeleton.tree(
        keys,
        "mlp",
        |index, layer| {
            attention(&skeleton, &mla, &rope, index, layer);
            match moe.as_ref().filter(|_| index >= dense_layers) {
                Some(moe) => block(keys, &skeleton, moe, index, layer),
                None => skeleton.mlp(layer, "mlp", "MLP", intermediate_size),
            }
            Ok(())
        },
        |_| {},
    )
}

/// V3 scores with a sigmoid, and has a bias for selection.
fn generation(keys: &Keys<'_>) -> Result<Generation, ModelError> {
    let first_moe = keys.count("leading_dense_block_count")?;
    let bias = keys
        .tensor(&format!("blk.{first_moe}.exp_probs_b.bias"))
        .is_some();
    match keys.count("expert_gating_func")? {
        0 if bias => Ok(Generation::V3),
        0 | 1 => Ok(Generation::V2),
        2 => Ok(Generation::V3),
        other => Err(keys.bad(
            "expert_gating_func",
            other,
            "1 (softmax) or 2 (sigmoid) are supported",
        )),
    }
}

fn attention_sizes(keys: &Keys<'_>, hidden_size: usize) -> Result<(MlaSpec, RopeSpec), ModelError> {
    let heads = keys.size("attention.head_count")?;
    let rope_dim = keys.size("rope.dimension_count")?;
    // In the newer layout key_length and value_length are those of the compressed cache.
    let head_dim = match keys.size_if_any("attention.key_length_mla")? {
        Some(dim) => dim,
        None => keys.size("attention.key_length")?,
    };
    let v_head_dim = match keys.size_if_any("attention.value_length_mla")? {
        Some(dim) => dim,
        None => keys.size("attention.value_length")?,
    };
    let qk_nope_head_dim = head_dim
        .checked_sub(rope_dim)
        .filter(|n| *n > 0)
        .ok_or_else(|| {
            keys.bad(
                "rope.dimension_count",
                rope_dim,
                "it is not smaller than a head's key",
            )
        })?;
    let config = rope_config(keys, rope_dim)?;
    let m = match config.scaling {
        RopeScaling::Yarn(yarn) => yarn_mscale(yarn.factor, yarn.mscale_all_dim),
        _ => 1.0,
    };
    let mla = MlaSpec {
        hidden_size,
        num_attention_heads: heads,
        q_lora_rank: keys.size_if_any("attention.q_lora_rank")?,
        kv_lora_rank: keys.size("attention.kv_lora_rank")?,
        qk_nope_head_dim,
        qk_rope_head_dim: rope_dim,
        v_head_dim,
        softmax_scale: m * m / (head_dim as f32).sqrt(),
    };
    // Pairs of neighbours in the file: the converter permutes nothing here.
    let max_positions = keys.size("context_length")?;
    Ok((
        mla,
        RopeSpec {
            config,
            layout: RopeLayout::Interleaved,
            max_positions,
        },
    ))
}

fn attention(
    skeleton: &Skeleton<'_>,
    mla: &MlaSpec,
    rope: &RopeSpec,
    index: usize,
    layer: &mut Module,
) {
    let hidden = skeleton.hidden_size;
    let (heads, lora) = (mla.num_attention_heads, mla.kv_lora_rank);
    let queries = heads * mla.q_head_dim();
    let module = layer.add(
        "self_attn",
        &skeleton.class("Attention"),
        Spec::Mla(mla.clone()),
    );
    match mla.q_lora_rank {
        None => linear(module, "q_proj", hidden, queries),
        Some(rank) => {
            linear(module, "q_a_proj", hidden, rank);
            skeleton.norm(module, "q_a_layernorm", rank, LORA_NORM_EPS);
            linear(module, "q_b_proj", rank, queries);
        }
    }
    linear(module, "kv_a_proj_with_mqa", hidden, mla.cache_width());
    skeleton.norm(module, "kv_a_layernorm", lora, LORA_NORM_EPS);
    let keys_and_values = heads * (mla.qk_nope_head_dim + mla.v_head_dim);
    let source = LinearSource::KvB {
        prefix: format!("blk.{index}."),
    };
    linear_from(module, "kv_b_proj", lora, keys_and_values, source);
    linear(module, "o_proj", heads * mla.v_head_dim, hidden);
    let class = match rope.config.scaling {
        RopeScaling::Yarn(_) => "YarnRotaryEmbedding",
        RopeScaling::Linear { .. } => "LinearScalingRotaryEmbedding",
        RopeScaling::None => "RotaryEmbedding",
    };
    module.add(
        "rotary_emb",
        &skeleton.class(class),
        Spec::Rope(rope.clone()),
    );
}

fn moe_sizes(
    keys: &Keys<'_>,
    generation: Generation,
    num_layers: usize,
) -> Result<Moe, ModelError> {
    let first = keys.count("leading_dense_block_count")?;
    if first > num_layers {
        return Err(keys.bad(
            "leading_dense_block_count",
            first,
            "it is larger than block_count",
        ));
    }
    let experts = expert_count(keys)?;
    let top_k = keys.size("expert_used_count")?;
    let norm = match keys.flag("expert_weights_norm")? {
        Some(true) => NormTopkProb::Yes,
        _ => NormTopkProb::No,
    };
    let scale = keys.float_if_any("expert_weights_scale")?.unwrap_or(1.0);
    let router = GateConfig {
        experts,
        top_k,
        scoring: if generation == Generation::V3 {
            Scoring::Sigmoid
        } else {
            Scoring::Softmax
        },
        groups: groups(keys, generation, experts)?,
        scaling: match generation {
            Generation::V2 => WeightScaling::either(norm, top_k, scale),
            Generation::V3 => WeightScaling::both(norm, top_k, scale),
        },
    };
    router
        .check()
        .map_err(|e| keys.bad("expert_used_count", top_k, &e.to_string()))?;
    Ok(Moe {
        first_k_dense_replace: first,
        router,
        moe_intermediate_size: keys.size("expert_feed_forward_length")?,
        n_shared_experts: keys.count("expert_shared_count")?,
    })
}

/// Groups that the choice is limited to. Files of before 2025-04 do not have these keys: then the
/// published configurations of V2 (160 experts) and V3 (256 experts) hold.
fn groups(
    keys: &Keys<'_>,
    generation: Generation,
    experts: usize,
) -> Result<Option<ExpertGroups>, ModelError> {
    let published = match (generation, experts) {
        (Generation::V2, 160) => (8, 3),
        (Generation::V3, 256) => (8, 4),
        _ => (1, 1),
    };
    let n_group = keys
        .size_if_any("expert_group_count")?
        .unwrap_or(published.0);
    let topk_group = keys
        .size_if_any("expert_group_used_count")?
        .unwrap_or(published.1);
    if n_group == 1 {
        return Ok(None);
    }
    let (score, masked_value) = match generation {
        Generation::V2 => (GroupScore::Max, 0.0),
        Generation::V3 => (GroupScore::SumOfTop2, f32::NEG_INFINITY),
    };
    Ok(Some(ExpertGroups {
        n_group,
        topk_group,
        score,
        masked_value,
    }))
}

fn block(keys: &Keys<'_>, skeleton: &Skeleton<'_>, moe: &Moe, index: usize, layer: &mut Module) {
    let shared = (moe.n_shared_experts > 0).then_some("shared_experts");
    let spec = MoeSpec {
        hidden_size: skeleton.hidden_size,
        top_k: moe.router.top_k,
        gate: "gate",
        router: None,
        shared,
        shared_gate: None,
    };
    let block = layer.add("mlp", &skeleton.class("MoE"), Spec::Moe(spec));
    let experts = Experts {
        layer: index,
        num_experts: moe.router.experts,
        top_k: moe.router.top_k,
        moe_intermediate_size: moe.moe_intermediate_size,
        class: "MLP",
        projections: PROJECTIONS,
        defined: PROJECTIONS,
    };
    experts.add(skeleton, block);
    let bias = format!("blk.{index}.exp_probs_b.bias");
    let gate = GateSpec {
        hidden_size: skeleton.hidden_size,
        config: moe.router,
        logit_bias: None,
        bias: keys.tensor(&bias).map(|_| bias.clone()),
    };
    block.add(
        "gate",
        &format!("{}.MoEGate", skeleton.classes),
        Spec::Gate(gate),
    );
    if let Some(name) = shared {
        // All shared experts are one block of their joint width.
        skeleton.mlp(
            block,
            name,
            "MLP",
            moe.moe_intermediate_size * moe.n_shared_experts,
        );
    }
}
