//! Qwen2, Qwen2-MoE, Qwen3 and Qwen3-MoE: grouped keys and values, halves rotated together.

use ktx_kernels::gate::{GateConfig, NormTopkProb, Scoring, WeightScaling};
use ktx_ops::Module;
use ktx_ops::spec::{MoeSpec, Spec};

use crate::ModelError;
use crate::attention::{Attention, HeadNorms};
use crate::keys::Keys;
use crate::parts::{Experts, PROJECTIONS, Skeleton, expert_count, linear, moe_spec};

/// Qwen2.
pub(crate) fn qwen2(keys: &Keys<'_>) -> Result<Module, ModelError> {
    let skeleton = Skeleton::read(keys, "transformers.models.qwen2.modeling_qwen2", "Qwen2")?;
    let rope_class = "transformers.models.qwen2.modeling_qwen2.Qwen2RotaryEmbedding";
    dense(keys, &skeleton, HeadNorms::No, rope_class)
}

/// Qwen3.
pub(crate) fn qwen3(keys: &Keys<'_>) -> Result<Module, ModelError> {
    let skeleton = Skeleton::read(keys, "transformers.models.qwen3.modeling_qwen3", "Qwen3")?;
    let rope_class = "transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding";
    dense(keys, &skeleton, HeadNorms::Yes, rope_class)
}

fn dense(
    keys: &Keys<'_>,
    skeleton: &Skeleton<'_>,
    norms: HeadNorms,
    rope_class: &'static str,
) -> Result<Module, ModelError> {
    let attention = Attention::read(keys, skeleton.hidden_size, norms, "Attention", rope_class)?;
    let intermediate_size = keys.size("feed_forward_length")?;
    skeleton.tree(
        keys,
        "mlp",
        |_, layer| {
            attention.add(skeleton, layer);
            skeleton.mlp(layer, "mlp", "MLP", intermediate_size);
            Ok(())
        },
        |model| {
            model.add("rotary_emb", rope_class, Spec::Rope(attention.rope.clone()));
        },
    )
}

const QWEN2_ROPE: &str = "ktransformers.models.modeling_qwen2_moe.Qwen2MoeRotaryEmbedding";

/// Qwen2-MoE: biases on q, k and v, a shared expert behind its own sigmoid, weights as the softmax has them.
pub(crate) fn qwen2moe(keys: &Keys<'_>) -> Result<Module, ModelError> {
    let skeleton = Skeleton::read(keys, "ktransformers.models.modeling_qwen2_moe", "Qwen2Moe")?;
    let attention = Attention::read(
        keys,
        skeleton.hidden_size,
        HeadNorms::No,
        "FlashAttention2",
        QWEN2_ROPE,
    )?;
    let router = router(keys, NormTopkProb::No)?;
    let shared_size = match keys.size_if_any("expert_shared_feed_forward_length")? {
        Some(size) => size,
        None => keys.size("feed_forward_length")?,
    };
    moe(
        keys,
        &skeleton,
        &attention,
        router,
        Some(shared_size),
        |_| {},
    )
}

/// Qwen3-MoE: head norms, no shared expert, weights that sum to 1.
pub(crate) fn qwen3moe(keys: &Keys<'_>) -> Result<Module, ModelError> {
    let skeleton = Skeleton::read(keys, "ktransformers.models.modeling_qwen3_moe", "Qwen3Moe")?;
    let attention = Attention::read(
        keys,
        skeleton.hidden_size,
        HeadNorms::Yes,
        "Attention",
        QWEN2_ROPE,
    )?;
    let router = router(keys, NormTopkProb::Yes)?;
    moe(keys, &skeleton, &attention, router, None, |model| {
        model.add(
            "rotary_emb",
            &skeleton.class("RotaryEmbedding"),
            Spec::Rope(attention.rope.clone()),
        );
    })
}

/// `norm` holds where the file has no `expert_weights_norm`, as old files do not.
fn router(keys: &Keys<'_>, norm: NormTopkProb) -> Result<GateConfig, ModelError> {
    let top_k = keys.size("expert_used_count")?;
    let norm = match keys.flag("expert_weights_norm")? {
        Some(true) => NormTopkProb::Yes,
        Some(false) => NormTopkProb::No,
        None => norm,
    };
    let config = GateConfig {
        experts: expert_count(keys)?,
        top_k,
        scoring: Scoring::Softmax,
        groups: None,
        scaling: match norm {
            NormTopkProb::Yes => WeightScaling::Normalise,
            NormTopkProb::No => WeightScaling::Scale(1.0),
        },
    };
    config
        .check()
        .map_err(|e| keys.bad("expert_used_count", top_k, &e.to_string()))?;
    Ok(config)
}

fn moe(
    keys: &Keys<'_>,
    skeleton: &Skeleton<'_>,
    attention: &Attention,
    router: GateConfig,
    shared_size: Option<usize>,
    model_parts: impl FnOnce(&mut Module),
) -> Result<Module, ModelError> {
    let moe_intermediate_size = keys.size("expert_feed_forward_length")?;
    let spec = MoeSpec {
        shared: shared_size.map(|_| "shared_expert"),
        shared_gate: shared_size.map(|_| "shared_expert_gate"),
        ..moe_spec(skeleton.hidden_size, router)
    };
    skeleton.tree(
        keys,
        "mlp",
        |index, layer| {
            attention.add(skeleton, layer);
            let block = layer.add(
                "mlp",
                &skeleton.class("SparseMoeBlock"),
                Spec::Moe(spec.clone()),
            );
            linear(block, "gate", skeleton.hidden_size, router.experts);
            let experts = Experts {
                layer: index,
                num_experts: router.experts,
                top_k: router.top_k,
                moe_intermediate_size,
                class: "MLP",
                projections: PROJECTIONS,
                defined: PROJECTIONS,
            };
            experts.add(skeleton, block);
            if let Some(width) = shared_size {
                skeleton.mlp(block, "shared_expert", "MLP", width);
                linear(block, "shared_expert_gate", skeleton.hidden_size, 1);
            }
            Ok(())
        },
        model_parts,
    )
}
