//! Llama and what shares its architecture: SmolLM2, InternLM2.5 (converted), Mistral; with experts, Mixtral.

use ktx_kernels::gate::{GateConfig, Scoring, WeightScaling};
use ktx_kernels::rope::RopeLayout;
use ktx_ops::Module;
use ktx_ops::spec::{AttentionSpec, RopeSpec, Spec};

use crate::ModelError;
use crate::attention::Heads;
use crate::keys::Keys;
use crate::parts::{Experts, Skeleton, expert_count, linear, moe_spec, paired_linear, rope_config};

/// Sizes of one attention.
struct Config {
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: usize,
    rope: RopeSpec,
}

impl Config {
    fn read(keys: &Keys<'_>, hidden_size: usize) -> Result<Self, ModelError> {
        let Heads {
            count: heads,
            kv_count: kv_heads,
            dim: head_dim,
        } = Heads::read(keys, hidden_size)?;
        let dim = keys
            .size_if_any("rope.dimension_count")?
            .unwrap_or(head_dim);
        if dim > head_dim {
            return Err(keys.bad("rope.dimension_count", dim, "it is larger than a head"));
        }
        Ok(Self {
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            // The converter permutes q and k rows so that neighbours are rotated together.
            rope: RopeSpec {
                config: rope_config(keys, dim)?,
                layout: RopeLayout::Interleaved,
                max_positions: keys.size("context_length")?,
            },
        })
    }

    fn attention(&self, skeleton: &Skeleton<'_>, layer: &mut Module, class: &str) {
        let (hidden, head_dim) = (skeleton.hidden_size, self.head_dim);
        let (q, kv) = (
            self.num_attention_heads * head_dim,
            self.num_key_value_heads * head_dim,
        );
        let spec = AttentionSpec {
            hidden_size: hidden,
            num_attention_heads: self.num_attention_heads,
            num_key_value_heads: self.num_key_value_heads,
            head_dim,
            softmax_scale: (head_dim as f32).sqrt().recip(),
            head_norms: false,
            window: None,
            sinks: None,
        };
        let attention = layer.add("self_attn", &skeleton.class(class), Spec::Attention(spec));
        paired_linear(attention, "q_proj", hidden, q, self.num_attention_heads);
        paired_linear(attention, "k_proj", hidden, kv, self.num_key_value_heads);
        linear(attention, "v_proj", hidden, kv);
        linear(attention, "o_proj", q, hidden);
        attention.add(
            "rotary_emb",
            &skeleton.class("RotaryEmbedding"),
            Spec::Rope(self.rope.clone()),
        );
    }
}

/// The tree of a file of architecture `llama`: Mixtral's if it has experts, Llama's else.
pub(crate) fn tree(keys: &Keys<'_>) -> Result<Module, ModelError> {
    match keys.count("expert_count")? {
        0 => llama(keys),
        _ => mixtral(keys),
    }
}

fn llama(keys: &Keys<'_>) -> Result<Module, ModelError> {
    let skeleton = Skeleton::read(keys, "ktransformers.models.modeling_llama", "Llama")?;
    let config = Config::read(keys, skeleton.hidden_size)?;
    let intermediate_size = keys.size("feed_forward_length")?;
    skeleton.tree(
        keys,
        "mlp",
        |_, layer| {
            config.attention(&skeleton, layer, "Attention");
            skeleton.mlp(layer, "mlp", "MLP", intermediate_size);
            Ok(())
        },
        |model| {
            model.add(
                "rotary_emb",
                &skeleton.class("RotaryEmbedding"),
                Spec::Rope(config.rope.clone()),
            );
        },
    )
}

fn mixtral(keys: &Keys<'_>) -> Result<Module, ModelError> {
    let skeleton = Skeleton::read(keys, "ktransformers.models.modeling_mixtral", "Mixtral")?;
    let config = Config::read(keys, skeleton.hidden_size)?;
    let router = GateConfig {
        experts: expert_count(keys)?,
        top_k: keys.size("expert_used_count")?,
        scoring: Scoring::Softmax,
        groups: None,
        scaling: WeightScaling::Normalise,
    };
    router
        .check()
        .map_err(|e| keys.bad("expert_used_count", router.top_k, &e.to_string()))?;
    let moe_intermediate_size = keys.size("feed_forward_length")?;
    skeleton.tree(
        keys,
        "block_sparse_moe",
        |index, layer| {
            config.attention(&skeleton, layer, "FlashAttention2");
            let spec = Spec::Moe(moe_spec(skeleton.hidden_size, router));
            let block = layer.add("block_sparse_moe", &skeleton.class("SparseMoeBlock"), spec);
            linear(block, "gate", skeleton.hidden_size, router.experts);
            let experts = Experts {
                layer: index,
                num_experts: router.experts,
                top_k: router.top_k,
                moe_intermediate_size,
                class: "BlockSparseTop2MLP",
                projections: ["w1", "w3", "w2"],
                defined: ["w1", "w2", "w3"],
            };
            experts.add(&skeleton, block);
            Ok(())
        },
        |_| {},
    )
}
