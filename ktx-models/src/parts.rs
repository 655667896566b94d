//! Parts that several families share: feed-forward blocks, experts, norms, rotation.

use ktx_kernels::activation::GatedActivation;
use ktx_kernels::gate::GateConfig;
use ktx_kernels::rope::{RopeConfig, RopeScaling, Yarn};
use ktx_ops::Module;
use ktx_ops::spec::{
    EmbeddingSpec, ExpertsSpec, LayerSpec, LinearSource, LinearSpec, MlpSpec, ModelSpec, MoeSpec,
    NormSpec, RowOrder, Spec,
};

use crate::ModelError;
use crate::keys::Keys;

/// Class of linear modules.
pub(crate) const LINEAR: &str = "torch.nn.Linear";
/// Class of lists of modules.
pub(crate) const LIST: &str = "torch.nn.ModuleList";
const EMBEDDING: &str = "torch.nn.Embedding";
const SILU: &str = "torch.nn.SiLU";

/// More layers or experts than this make no model.
const MAX_COUNT: usize = 4096;
/// More experts in all layers together make no model.
const MAX_EXPERTS: usize = 1 << 17;

/// Names of the projections in most families: gate, up, down.
pub(crate) const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// Sizes that all families have, and the classes of their skeleton.
pub(crate) struct Skeleton<'a> {
    /// Module that holds the family's classes: `ktransformers.models.modeling_llama`.
    pub classes: &'a str,
    /// What the family's classes begin with: `Llama`.
    pub family: &'a str,
    pub num_layers: usize,
    pub hidden_size: usize,
    pub vocab_size: usize,
    pub eps: f32,
    /// What a file calls the weights of a layer's second norm: `ffn_norm`.
    pub second_norm: &'static str,
}

impl<'a> Skeleton<'a> {
    pub(crate) fn read(
        keys: &Keys<'_>,
        classes: &'a str,
        family: &'a str,
    ) -> Result<Self, ModelError> {
        let blocks = bounded(keys, "block_count")?;
        // Layers that predict further tokens stand behind the others and are not part of the model.
        let predictors = keys.count("nextn_predict_layers")?;
        let num_layers = blocks
            .checked_sub(predictors)
            .filter(|n| *n > 0)
            .ok_or_else(|| {
                keys.bad(
                    "nextn_predict_layers",
                    predictors,
                    "fewer layers than block_count are expected",
                )
            })?;
        Ok(Self {
            classes,
            family,
            num_layers,
            hidden_size: keys.size("embedding_length")?,
            vocab_size: keys.vocab_size()?,
            eps: keys.float("attention.layer_norm_rms_epsilon")?,
            second_norm: "ffn_norm",
        })
    }

    /// Class path of one of the family's classes: `Attention` is `…modeling_llama.LlamaAttention`.
    pub(crate) fn class(&self, name: &str) -> String {
        format!("{}.{}{name}", self.classes, self.family)
    }

    /// Root, embedding, layers made by `layer`, final norm, then `model_parts`, and the head.
    pub(crate) fn tree(
        &self,
        keys: &Keys<'_>,
        ffn: &'static str,
        mut layer: impl FnMut(usize, &mut Module) -> Result<(), ModelError>,
        model_parts: impl FnOnce(&mut Module),
    ) -> Result<Module, ModelError> {
        let mut root = Module::root(&self.class("ForCausalLM"), Spec::Container);
        let (hidden_size, vocab_size) = (self.hidden_size, self.vocab_size);
        let spec = ModelSpec {
            hidden_size,
            num_layers: self.num_layers,
            vocab_size,
        };
        let model = root.add("model", &self.class("Model"), Spec::Model(spec));
        model.add(
            "embed_tokens",
            EMBEDDING,
            Spec::Embedding(EmbeddingSpec {
                vocab_size,
                hidden_size,
            }),
        );
        let layers = model.add("layers", LIST, Spec::Container);
        for i in 0..self.num_layers {
            let spec = Spec::Layer(LayerSpec { hidden_size, ffn });
            let module = layers.add(&i.to_string(), &self.class("DecoderLayer"), spec);
            layer(i, module)?;
            self.norm(module, "input_layernorm", hidden_size, self.eps);
            let second = self.norm(module, "post_attention_layernorm", hidden_size, self.eps);
            second.key = format!("blk.{i}.{}", self.second_norm);
        }
        self.norm(model, "norm", hidden_size, self.eps);
        model_parts(model);
        let source = match keys.tensor("output.weight") {
            Some(_) => LinearSource::Key,
            None => LinearSource::Tensor("token_embd.weight".to_owned()),
        };
        linear_from(&mut root, "lm_head", hidden_size, vocab_size, source);
        Ok(root)
    }

    /// Adds a norm of the family's class.
    pub(crate) fn norm<'m>(
        &self,
        parent: &'m mut Module,
        name: &str,
        size: usize,
        eps: f32,
    ) -> &'m mut Module {
        let spec = Spec::Norm(NormSpec { size, eps });
        parent.add(name, &self.class("RMSNorm"), spec)
    }

    /// Adds a dense feed-forward block of the class `class`.
    pub(crate) fn mlp(
        &self,
        parent: &mut Module,
        name: &str,
        class: &str,
        intermediate_size: usize,
    ) {
        let hidden_size = self.hidden_size;
        let spec = MlpSpec {
            hidden_size,
            intermediate_size,
            projections: PROJECTIONS,
        };
        let module = parent.add(name, &self.class(class), Spec::Mlp(spec));
        linear(module, "gate_proj", hidden_size, intermediate_size);
        linear(module, "up_proj", hidden_size, intermediate_size);
        linear(module, "down_proj", intermediate_size, hidden_size);
        module.add("act_fn", SILU, Spec::Container);
    }
}

/// A count of layers or experts.
pub(crate) fn bounded(keys: &Keys<'_>, name: &str) -> Result<usize, ModelError> {
    let value = keys.size(name)?;
    if value > MAX_COUNT {
        return Err(keys.bad(name, value, "at most 4096 are expected"));
    }
    Ok(value)
}

/// Adds a linear module whose weights are under its key.
pub(crate) fn linear(parent: &mut Module, name: &str, in_features: usize, out_features: usize) {
    linear_from(parent, name, in_features, out_features, LinearSource::Key);
}

/// Adds a linear module whose rows the converter put into pairs that are rotated together.
pub(crate) fn paired_linear(
    parent: &mut Module,
    name: &str,
    in_features: usize,
    out_features: usize,
    heads: usize,
) {
    let spec = LinearSpec {
        in_features,
        out_features,
        source: LinearSource::Key,
        order: RowOrder::RotatedPairs { heads },
    };
    parent.add(name, LINEAR, Spec::Linear(spec));
}

/// Adds a linear module with weights from somewhere else.
pub(crate) fn linear_from(
    parent: &mut Module,
    name: &str,
    in_features: usize,
    out_features: usize,
    source: LinearSource,
) {
    parent.add(
        name,
        LINEAR,
        Spec::Linear(LinearSpec {
            in_features,
            out_features,
            source,
            order: RowOrder::Original,
        }),
    );
}

/// The number of experts of a layer. The tree holds all experts of all layers, so their number is
/// bounded before it is made.
pub(crate) fn expert_count(keys: &Keys<'_>) -> Result<usize, ModelError> {
    let experts = bounded(keys, "expert_count")?;
    if experts * bounded(keys, "block_count")? > MAX_EXPERTS {
        return Err(keys.bad(
            "expert_count",
            experts,
            "all layers together may have 131072 experts",
        ));
    }
    Ok(experts)
}

/// The routed experts of one layer.
pub(crate) struct Experts<'a> {
    pub layer: usize,
    pub num_experts: usize,
    pub top_k: usize,
    pub moe_intermediate_size: usize,
    /// Class of one expert, without the family's name.
    pub class: &'a str,
    /// Names of gate, up and down, and the order in which the class defines them.
    pub projections: [&'static str; 3],
    pub defined: [&'static str; 3],
}

impl Experts<'_> {
    /// Adds `experts` to the block: the list, and in it every expert with its projections.
    pub(crate) fn add(&self, skeleton: &Skeleton<'_>, block: &mut Module) {
        let (hidden, width) = (skeleton.hidden_size, self.moe_intermediate_size);
        let spec = ExpertsSpec {
            hidden_size: hidden,
            moe_intermediate_size: width,
            num_experts: self.num_experts,
            top_k: self.top_k,
            prefix: format!("blk.{}.", self.layer),
            projections: self.projections,
            biases: false,
            activation: GatedActivation::SwiGlu,
        };
        let list = block.add("experts", LIST, Spec::Experts(spec));
        let [gate, up, down] = self.projections;
        for index in 0..self.num_experts {
            let spec = MlpSpec {
                hidden_size: hidden,
                intermediate_size: width,
                projections: self.projections,
            };
            let expert = list.add(
                &index.to_string(),
                &skeleton.class(self.class),
                Spec::Mlp(spec),
            );
            for name in self.defined {
                let (tensor, input, output) = match name {
                    n if n == gate => ("gate", hidden, width),
                    n if n == up => ("up", hidden, width),
                    n if n == down => ("down", width, hidden),
                    other => unreachable!("{other} is one of the projections"),
                };
                let source = LinearSource::Expert {
                    merged: format!("blk.{}.ffn_{tensor}_exps", self.layer),
                    separate: format!("blk.{}.ffn_{tensor}", self.layer),
                    index,
                };
                linear_from(expert, name, input, output, source);
            }
            expert.add("act_fn", SILU, Spec::Container);
        }
    }
}

/// A mixture-of-experts block whose router is a plain matrix, chosen from by the block.
pub(crate) fn moe_spec(hidden_size: usize, config: GateConfig) -> MoeSpec {
    MoeSpec {
        hidden_size,
        top_k: config.top_k,
        gate: "gate",
        router: Some(config),
        shared: None,
        shared_gate: None,
    }
}

/// The rotation that the metadata describe, of `dim` values of a head.
pub(crate) fn rope_config(keys: &Keys<'_>, dim: usize) -> Result<RopeConfig, ModelError> {
    let base = keys.float_if_any("rope.freq_base")?.unwrap_or(10000.0);
    let freq_divisors = keys.values("rope_freqs.weight").unwrap_or_default();
    let config = RopeConfig {
        dim,
        base,
        scaling: rope_scaling(keys)?,
        freq_divisors,
    };
    config
        .inv_freq()
        .map_err(|e| keys.bad("rope.dimension_count", dim, &e.to_string()))?;
    Ok(config)
}

fn rope_scaling(keys: &Keys<'_>) -> Result<RopeScaling, ModelError> {
    let old_linear = keys.float_if_any("rope.scale_linear")?;
    let factor = keys
        .float_if_any("rope.scaling.factor")?
        .or(old_linear)
        .unwrap_or(1.0);
    let kind = match keys.text("rope.scaling.type")? {
        None if old_linear.is_some() => "linear",
        None => "none",
        Some(kind) => kind,
    };
    match kind {
        "none" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor }),
        "yarn" => {
            let mut yarn = Yarn::new(factor);
            if let Some(original) = keys.size_if_any("rope.scaling.original_context_length")? {
                yarn.original_context = original;
            }
            if let Some(beta) = keys.float_if_any("rope.scaling.yarn_beta_fast")? {
                yarn.beta_fast = beta;
            }
            if let Some(beta) = keys.float_if_any("rope.scaling.yarn_beta_slow")? {
                yarn.beta_slow = beta;
            }
            // The file has 0.1 * mscale_all_dim; models with it have mscale the same, so that cosine
            // and sine are not scaled and the softmax is.
            if let Some(multiplier) = keys.float_if_any("rope.scaling.yarn_log_multiplier")? {
                (yarn.mscale, yarn.mscale_all_dim) = (10.0 * multiplier, 10.0 * multiplier);
            }
            Ok(RopeScaling::Yarn(yarn))
        }
        other => Err(keys.bad(
            "rope.scaling.type",
            other,
            "none, linear or yarn are supported",
        )),
    }
}
