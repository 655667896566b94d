//! Models that are described and not there: from hyper-parameters and a quantisation mix to the
//! names, types and shapes of all tensors, so that memory and placement can be planned before
//! anything is downloaded.

mod catalogue;
mod mix;

use ktx_gguf::{GgmlType, Gguf, Value};
use ktx_kernels::gate::Scoring;
use ktx_ops::Module;
use ktx_ops::spec::{ExpertsSpec, LinearSource, Spec};

pub use catalogue::{PublishedModel, published, published_model};
pub use mix::{ParseMixError, QuantMix};

use self::mix::MixContext;
use crate::{ModelError, describe};

/// Whether a model's output head is a matrix of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tying {
    /// It is.
    Separate,
    /// It is the embedding table.
    Tied,
}

/// Name and shape (row length first) of a tensor.
type Shape = (String, Vec<usize>);

/// A model from its metadata, with the tensors that a file of it would have in this mix; `name` stands
/// for the file in messages. [`describe`] reads it like any other; there are no weights.
///
/// ```
/// use ktx_models::{QuantMix, described, published_model};
///
/// let mixtral = published_model("mixtral-8x7b").expect("it is in the catalogue");
/// let model = described(mixtral.name, mixtral.metadata(), mixtral.tying, QuantMix::Q4_K_M)?;
/// assert_eq!(model.file_size() / 1_000_000_000, 28);
/// # Ok::<(), ktx_models::ModelError>(())
/// ```
///
/// # Errors
/// [`ModelError`] if the metadata describe no model that is supported.
pub fn described(
    name: &str,
    metadata: Vec<(String, Value)>,
    tying: Tying,
    mix: QuantMix,
) -> Result<Gguf, ModelError> {
    let bare = Gguf::described(name, metadata.clone(), [])?;
    let description = describe(&bare)?;
    let tree = &description.tree;
    let shapes = shapes(tree, &description.architecture, tying);
    let context = MixContext {
        mix,
        layers: description.num_layers,
        experts: largest(tree, |spec| match spec {
            Spec::Experts(experts) => experts.num_experts,
            _ => 0,
        }),
        heads_per_kv: largest(tree, |spec| match spec {
            Spec::Attention(a) => a.num_attention_heads / a.num_key_value_heads,
            _ => 0,
        }),
        is_70b: description.architecture == "llama" && description.num_layers == 80,
        tied: tying == Tying::Tied,
    };
    let tensors = shapes.into_iter().map(|(name, shape)| {
        let ty: GgmlType = context.type_of(&name, &shape);
        (name, ty, shape)
    });
    Ok(Gguf::described(name, metadata, tensors)?)
}

fn largest(tree: &Module, of: impl Fn(&Spec) -> usize) -> usize {
    tree.walk().map(|m| of(&m.spec)).max().unwrap_or(0)
}

/// The tensors of a tree, in its order. `tree` was made without knowing any.
fn shapes(tree: &Module, architecture: &str, tying: Tying) -> Vec<Shape> {
    let biased: &[&str] = match architecture {
        "qwen2" | "qwen2moe" => &["q_proj", "k_proj", "v_proj"],
        "gpt-oss" => &["q_proj", "k_proj", "v_proj", "o_proj"],
        _ => &[],
    };
    let mut shapes = Vec::new();
    let mut stack = vec![tree];
    while let Some(module) = stack.pop() {
        if let Spec::Experts(spec) = &module.spec {
            shapes.extend(expert_shapes(spec));
            continue;
        }
        shapes.extend(module_shapes(module, biased, tying));
        stack.extend(module.children.iter().rev());
    }
    shapes
}

fn module_shapes(module: &Module, biased: &[&str], tying: Tying) -> Vec<Shape> {
    let weight = format!("{}.weight", module.key);
    match &module.spec {
        Spec::Linear(spec) => {
            let shape = vec![spec.in_features, spec.out_features];
            match &spec.source {
                // Without tensors, the tree takes the embedding table for the head.
                LinearSource::Tensor(_) if tying == Tying::Tied => Vec::new(),
                LinearSource::Tensor(_) => vec![("output.weight".to_owned(), shape)],
                LinearSource::Key if biased.contains(&module.name.as_str()) => {
                    let bias = format!("{}.bias", module.key);
                    vec![(weight, shape), (bias, vec![spec.out_features])]
                }
                _ => vec![(weight, shape)],
            }
        }
        Spec::Norm(spec) => vec![(weight, vec![spec.size])],
        Spec::Embedding(spec) => vec![(weight, vec![spec.hidden_size, spec.vocab_size])],
        Spec::Gate(spec) => {
            let experts = spec.config.experts;
            let mut shapes = vec![(weight, vec![spec.hidden_size, experts])];
            if spec.config.scoring == Scoring::Sigmoid {
                let layer = module.key.trim_end_matches("ffn_gate_inp");
                shapes.push((format!("{layer}exp_probs_b.bias"), vec![experts]));
            }
            shapes.extend(spec.logit_bias.clone().map(|name| (name, vec![experts])));
            shapes
        }
        Spec::Attention(spec) => {
            let sinks = spec.sinks.clone();
            Vec::from_iter(sinks.map(|name| (name, vec![spec.num_attention_heads])))
        }
        _ => Vec::new(),
    }
}

fn expert_shapes(spec: &ExpertsSpec) -> Vec<Shape> {
    let (h, f, count) = (
        spec.hidden_size,
        spec.moe_intermediate_size,
        spec.num_experts,
    );
    let mut shapes = Vec::new();
    for (name, input, output) in [("gate", h, f), ("up", h, f), ("down", f, h)] {
        let tensor = format!("{}ffn_{name}_exps", spec.prefix);
        shapes.push((format!("{tensor}.weight"), vec![input, output, count]));
        if spec.biases {
            shapes.push((format!("{tensor}.bias"), vec![output, count]));
        }
    }
    shapes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gigabytes(name: &str, mix: QuantMix) -> f64 {
        let model = published_model(name).unwrap();
        let gguf = described(name, model.metadata(), model.tying, mix).unwrap();
        gguf.file_size() as f64 / 1e9
    }

    /// Sizes in GB that Hugging Face shows for files that llama.cpp's `llama-quantize` wrote.
    #[test]
    fn sizes_are_those_of_published_files() {
        use QuantMix as M;
        for (name, mix, published) in [
            ("deepseek-v3", M::Q8_0, 713.29),
            ("deepseek-v3", M::Q6_K, 550.80),
            ("deepseek-v3", M::Q5_K_M, 475.40),
            ("deepseek-v3", M::Q5_K_S, 461.81),
            ("deepseek-v3", M::Q4_K_M, 404.43),
            ("deepseek-v2-lite", M::Q4_K_M, 10.36),
            ("qwen2-57b", M::Q4_K_M, 34.9),
            ("qwen3-30b", M::Q4_K_M, 18.56),
            ("qwen3-30b", M::IQ4_XS, 16.6),
            ("mixtral-8x22b", M::Q5_K_M, 99.96),
            ("mixtral-8x22b", M::Q5_K_S, 96.97),
            ("mixtral-8x22b", M::Q4_K_M, 85.58),
            ("mixtral-8x22b", M::Q4_K_S, 80.47),
            ("mixtral-8x22b", M::IQ4_XS, 76.35),
            ("mixtral-8x22b", M::Q3_K_L, 72.57),
            ("mixtral-8x22b", M::Q3_K_M, 67.78),
            ("mixtral-8x22b", M::Q3_K_S, 61.49),
            ("mixtral-8x22b", M::Q2_K, 52.10),
            ("mixtral-8x7b", M::Q4_K_M, 28.45),
            ("llama-3.1-8b", M::Q4_K_M, 4.92),
            ("llama-3.1-70b", M::Q4_K_M, 42.52),
            ("qwen2.5-7b", M::Q4_K_M, 4.68),
            ("qwen3-8b", M::Q4_K_M, 5.03),
            ("gpt-oss-20b", M::MXFP4_MOE, 12.11),
            ("gpt-oss-120b", M::MXFP4_MOE, 63.39),
        ] {
            let ours = gigabytes(name, mix);
            let off = (ours / published - 1.0).abs();
            assert!(
                off < 0.01,
                "{name} {mix}: {ours:.2} GB, published {published} ({:.2} % off)",
                off * 100.0
            );
        }
    }

    #[test]
    fn every_published_model_is_described_and_one_in_every_mix() {
        let check = |model: &PublishedModel, mix| {
            let gguf = described(model.name, model.metadata(), model.tying, mix).unwrap();
            let description = describe(&gguf).unwrap();
            assert_eq!(description.architecture, model.architecture);
            assert!(gguf.tensors().len() > 100 && !gguf.has_data());
        };
        for model in published() {
            check(model, QuantMix::Q4_K_M);
        }
        for mix in QuantMix::ALL {
            check(published_model("mixtral").unwrap(), *mix);
        }
    }

    #[test]
    fn mixes_are_found_by_name_in_either_case() {
        assert_eq!("q4_k_m".parse(), Ok(QuantMix::Q4_K_M));
        assert!(
            "Q4_K_XXL"
                .parse::<QuantMix>()
                .unwrap_err()
                .to_string()
                .contains("Q4_K_M")
        );
    }
}
