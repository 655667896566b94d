//! Qwen2, Qwen2-MoE, Qwen3 and Qwen3-MoE: grouped keys and values, halves rotated together.

use ktx_kernels::gate::{GateConfig, NormTopkProb, Scoring, WeightScaling};
use ktx_kernels::rope::RopeLayout;
use ktx_ops::Module;
use ktx_ops::spec::{AttentionSpec, MoeSpec, RopeSpec, Spec};

use crate::ModelError;
use crate::keys::Keys;
use crate::parts::{Experts, PROJECTIONS, Skeleton, expert_count, linear, moe_spec, rope_config};

/// Sizes and classes of one attention.
struct Attention {
    spec: AttentionSpec,
    rope: RopeSpec,
    class: &'static str,
    rope_class: &'static str,
}

impl Attention {
    fn read(
        keys: &Keys<'_>,
        hidden_size: usize,
        head_norms: HeadNorms,
        class: &'static str,
        rope_class: &'static str,
    ) -> Result<Self, ModelError> {
        let heads = keys.size("attention.head_count")?;
        let kv_heads = keys
            .size_if_any("attention.head_count_kv")?
            .unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(keys.bad(
                "attention.head_count_kv",
                kv_heads,
                "it does not divide attention.head_count",
            ));
        }
        let head_dim = match keys.size_if_any("attention.key_length")? {
            Some(dim) => dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(keys.bad(
                    "attention.head_count",
                    heads,
                    "it does not divide embedding_length",
                ));
            }
        };
        let spec = AttentionSpec {
            hidden_size,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            softmax_scale: (head_dim as f32).sqrt().recip(),
            head_norms: head_norms == HeadNorms::Yes,
        };
        let rope = RopeSpec {
            config: rope_config(keys, head_dim)?,
            layout: RopeLayout::Half,
            max_positions: keys.size("context_length")?,
        };
        Ok(Self {
            spec,
            rope,
            class,
            rope_class,
        })
    }

    fn add(&self, skeleton: &Skeleton<'_>, layer: &mut Module) {
        let spec = &self.spec;
        let (q, kv) = (
            spec.num_attention_heads * spec.head_dim,
            spec.num_key_value_heads * spec.head_dim,
        );
        let module = layer.add(
            "self_attn",
            &skeleton.class(self.class),
            Spec::Attention(spec.clone()),
        );
        linear(module, "q_proj", spec.hidden_size, q);
        linear(module, "k_proj", spec.hidden_size, kv);
        linear(module, "v_proj", spec.hidden_size, kv);
        linear(module, "o_proj", q, spec.hidden_size);
        if spec.head_norms {
            skeleton.norm(module, "q_norm", spec.head_dim, skeleton.eps);
            skeleton.norm(module, "k_norm", spec.head_dim, skeleton.eps);
        }
        module.add("rotary_emb", self.rope_class, Spec::Rope(self.rope.clone()));
    }
}

/// Whether each head of query and key is normalised before it is rotated.
#[derive(Clone, Copy, PartialEq, Eq)]
enum HeadNorms {
    Yes,
    No,
}

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
