//! gpt-oss: attention with sinks, every other layer over a sliding window; experts with biases.

use std::num::NonZeroUsize;

use ktx_kernels::activation::GatedActivation;
use ktx_kernels::gate::{GateConfig, Scoring, WeightScaling};
use ktx_kernels::rope::RopeScaling;
use ktx_ops::Module;
use ktx_ops::spec::{ExpertsSpec, GateSpec, MoeSpec, Spec};

use crate::ModelError;
use crate::attention::{Attention, HeadNorms};
use crate::keys::Keys;
use crate::parts::{PROJECTIONS, Skeleton, expert_count};

const CLASSES: &str = "transformers.models.gpt_oss.modeling_gpt_oss";
const ROPE: &str = "transformers.models.gpt_oss.modeling_gpt_oss.GptOssRotaryEmbedding";

/// `swiglu_alpha` and `swiglu_limit`, which files do not have.
const ACTIVATION: GatedActivation = GatedActivation::ClampedSwiGlu {
    alpha: 1.702,
    limit: 7.0,
};

/// The tree of a file of architecture `gpt-oss`.
pub(crate) fn tree(keys: &Keys<'_>) -> Result<Module, ModelError> {
    let skeleton = Skeleton {
        second_norm: "post_attention_norm",
        ..Skeleton::read(keys, CLASSES, "GptOss")?
    };
    let hidden_size = skeleton.hidden_size;
    let mut attention = Attention::read(keys, hidden_size, HeadNorms::No, "Attention", ROPE)?;
    if let RopeScaling::Yarn(yarn) = &mut attention.rope.config.scaling {
        // `truncate` of the published configurations, which files do not have.
        yarn.truncate = false;
    }
    let windows = Windows::read(keys)?;
    let moe = Moe::read(keys, hidden_size)?;
    skeleton.tree(
        keys,
        "mlp",
        |index, layer| {
            let mut attention = attention.clone();
            attention.spec.window = windows.of_layer(index);
            attention.spec.sinks = Some(format!("blk.{index}.attn_sinks.weight"));
            attention.add(&skeleton, layer);
            moe.add(&skeleton, index, layer);
            Ok(())
        },
        |model| {
            model.add("rotary_emb", ROPE, Spec::Rope(attention.rope.clone()));
        },
    )
}

/// Which layers see how much.
struct Windows {
    window: Option<NonZeroUsize>,
    /// The last of so many layers sees everything.
    pattern: usize,
}

impl Windows {
    fn read(keys: &Keys<'_>) -> Result<Self, ModelError> {
        Ok(Self {
            window: NonZeroUsize::new(keys.size("attention.sliding_window")?),
            pattern: keys
                .size_if_any("attention.sliding_window_pattern")?
                .unwrap_or(2),
        })
    }

    fn of_layer(&self, index: usize) -> Option<NonZeroUsize> {
        let slides = index % self.pattern + 1 < self.pattern;
        self.window.filter(|_| slides)
    }
}

/// Router and experts of a layer.
struct Moe {
    hidden_size: usize,
    intermediate_size: usize,
    router: GateConfig,
}

impl Moe {
    fn read(keys: &Keys<'_>, hidden_size: usize) -> Result<Self, ModelError> {
        let router = GateConfig {
            experts: expert_count(keys)?,
            top_k: keys.size("expert_used_count")?,
            // The softmax of the chosen logits alone.
            scoring: Scoring::Softmax,
            groups: None,
            scaling: WeightScaling::Normalise,
        };
        router
            .check()
            .map_err(|e| keys.bad("expert_used_count", router.top_k, &e.to_string()))?;
        Ok(Self {
            hidden_size,
            intermediate_size: keys.size("expert_feed_forward_length")?,
            router,
        })
    }

    fn add(&self, skeleton: &Skeleton<'_>, index: usize, layer: &mut Module) {
        let (hidden_size, top_k) = (self.hidden_size, self.router.top_k);
        let spec = MoeSpec {
            hidden_size,
            top_k,
            gate: "router",
            router: None,
            shared: None,
            shared_gate: None,
        };
        let block = layer.add("mlp", &skeleton.class("MLP"), Spec::Moe(spec));
        let router = GateSpec {
            hidden_size,
            config: self.router,
            logit_bias: Some(format!("blk.{index}.ffn_gate_inp.bias")),
            bias: None,
        };
        block.add("router", &skeleton.class("TopKRouter"), Spec::Gate(router));
        let experts = ExpertsSpec {
            hidden_size,
            moe_intermediate_size: self.intermediate_size,
            num_experts: self.router.experts,
            top_k,
            prefix: format!("blk.{index}."),
            projections: PROJECTIONS,
            biases: true,
            activation: ACTIVATION,
        };
        block.add(
            "experts",
            &skeleton.class("Experts"),
            Spec::Experts(experts),
        );
    }
}
