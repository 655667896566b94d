//! A second implementation of every architecture, for tests: plain loops in double precision over dequantised
//! weights, the whole sequence at once, no cache. It shares no code with the engine but the GGUF reader.
//!
//! It is written to be checked by reading, not to be fast. `pip.rs` and `transformers.rs` prove it
//! against transformers' output.

mod attention;
mod ffn;
mod matrix;
pub mod measure;
mod pip;
mod rope;
mod transformers;
mod weights;

use attention::{GroupedAttention, LatentAttention};
use ffn::{Ffn, Routing};
use ktx_gguf::Gguf;
use matrix::{Matrix, Norm, add};
use weights::Weights;

/// A whole model in double precision.
pub struct Model {
    embedding: Matrix,
    layers: Vec<Layer>,
    final_norm: Norm,
    head: Option<Matrix>,
}

/// Which experts are added later: this many of each token, those with the smallest weights, from position
/// `from` on.
#[derive(Clone, Copy, Default)]
pub struct Deferral {
    pub experts: usize,
    pub from: usize,
}

struct Layer {
    attention_norm: Norm,
    attention: Attention,
    ffn_norm: Norm,
    ffn: Ffn,
}

enum Attention {
    Grouped(GroupedAttention),
    Latent(LatentAttention),
}

/// Everything that a forward pass computed.
pub struct Trace {
    /// `[position][vocabulary]`.
    pub logits: Vec<Vec<f64>>,
    /// The residual stream after each layer, `[layer][position][hidden]`.
    pub hidden: Vec<Vec<Vec<f64>>>,
    /// `[layer][position]`; a layer without a router has an empty list.
    pub routers: Vec<Vec<Routing>>,
    /// The residual stream after the final norm, `[position][hidden]`.
    pub final_norm: Vec<Vec<f64>>,
}

impl Trace {
    /// The token with the largest logit at the last position; the lowest id of several.
    pub fn greedy(&self) -> u32 {
        let logits = self.logits.last().expect("at least one position");
        let mut best = 0;
        for (id, &logit) in logits.iter().enumerate() {
            if logit > logits[best] {
                best = id;
            }
        }
        best as u32
    }

    /// How far the closest router decision of the whole pass was from going the other way.
    pub fn smallest_margin(&self) -> f64 {
        let routings = self.routers.iter().flatten();
        routings.map(|r| r.margin).fold(f64::INFINITY, f64::min)
    }
}

impl Model {
    /// Reads all weights of `file`. Panics when a tensor or key is missing.
    pub fn load(file: &Gguf) -> Self {
        let weights = Weights::new(file);
        let layers = weights.count("block_count") - weights.count_or("nextn_predict_layers", 0);
        Self {
            embedding: weights.matrix("token_embd.weight"),
            layers: (0..layers).map(|i| Layer::load(&weights, i)).collect(),
            final_norm: weights.norm("output_norm.weight"),
            head: weights
                .has("output.weight")
                .then(|| weights.matrix("output.weight")),
        }
    }

    /// Runs the tokens `ids` at positions 0, 1, 2 and so on.
    pub fn forward(&self, ids: &[u32]) -> Trace {
        self.forward_deferring(ids, Deferral::default())
    }

    /// The same, but a part of the experts of some positions is added one mixture later, and behind the last
    /// layer what is left.
    pub fn forward_deferring(&self, ids: &[u32], deferral: Deferral) -> Trace {
        let mut pending: Vec<Option<Vec<f64>>> = vec![None; ids.len()];
        let mut stream: Vec<Vec<f64>> = ids
            .iter()
            .map(|&id| self.embedding.row(id as usize).to_vec())
            .collect();
        let mut hidden = Vec::new();
        let mut routers = Vec::new();
        for layer in &self.layers {
            routers.push(layer.forward(&mut stream, &mut pending, deferral));
            hidden.push(stream.clone());
        }
        for (x, pending) in stream.iter_mut().zip(pending) {
            pending.iter().for_each(|later| add(x, later));
        }
        let final_norm: Vec<Vec<f64>> = stream.iter().map(|x| self.final_norm.of(x)).collect();
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        Trace {
            logits: final_norm.iter().map(|x| head.times(x)).collect(),
            hidden,
            routers,
            final_norm,
        }
    }
}

impl Layer {
    fn load(weights: &Weights, index: usize) -> Self {
        let block = format!("blk.{index}");
        Self {
            attention_norm: weights.norm(&format!("{block}.attn_norm.weight")),
            attention: match weights.architecture() {
                "deepseek2" => Attention::Latent(LatentAttention::load(weights, &block)),
                "gpt-oss" | "llama" | "qwen2" | "qwen2moe" | "qwen3" | "qwen3moe" => {
                    Attention::Grouped(GroupedAttention::load(weights, &block))
                }
                other => panic!("no reference for architecture {other}"),
            },
            ffn_norm: weights.norm(&match weights.architecture() {
                "gpt-oss" => format!("{block}.post_attention_norm.weight"),
                _ => format!("{block}.ffn_norm.weight"),
            }),
            ffn: Ffn::load(weights, &block),
        }
    }

    /// Adds attention and feed-forward to the residual stream; the routers' choices by position.
    fn forward(
        &self,
        stream: &mut [Vec<f64>],
        pending: &mut [Option<Vec<f64>>],
        deferral: Deferral,
    ) -> Vec<Routing> {
        let normed: Vec<Vec<f64>> = stream.iter().map(|x| self.attention_norm.of(x)).collect();
        let attended = match &self.attention {
            Attention::Grouped(attention) => attention.forward(&normed),
            Attention::Latent(attention) => attention.forward(&normed),
        };
        let mut routings = Vec::new();
        for (position, (x, attended)) in stream.iter_mut().zip(attended).enumerate() {
            add(x, &attended);
            let put_off = match position < deferral.from {
                true => 0,
                false => deferral.experts,
            };
            let (y, later, routing) = self.ffn.forward(&self.ffn_norm.of(x), put_off);
            add(x, &y);
            if let Some(later) = later {
                let before = pending[position].replace(later);
                before.iter().for_each(|before| add(x, before));
            }
            routings.extend(routing);
        }
        routings
    }
}
