//! The experts in double precision, token by token.

use super::{MoeWeights, Routing};
use crate::activation::GatedActivation;
use crate::activation::reference::clamped_swiglu;
use crate::linear::{WeightRows, reference};

pub(super) fn forward(experts: &MoeWeights<'_>, x: &[f32], routing: &Routing<'_>) -> Vec<f64> {
    let hidden = experts.hidden_size();
    let mut out = vec![0.0; x.len()];
    for (index, (id, weight)) in routing.ids.iter().zip(routing.weights).enumerate() {
        let token = index / routing.top_k;
        let x: Vec<f64> = x[token * hidden..][..hidden]
            .iter()
            .copied()
            .map(f64::from)
            .collect();
        let expert = *id as usize;
        let [gate_bias, up_bias, down_bias] = biases(experts, expert);
        let gate = product(experts.gate.expert(expert).unwrap(), &x, gate_bias);
        let up = product(experts.up.expert(expert).unwrap(), &x, up_bias);
        let h: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(&gate, &up)| match experts.activation {
                GatedActivation::SwiGlu => gate / (1.0 + (-gate).exp()) * up,
                GatedActivation::ClampedSwiGlu { alpha, limit } => {
                    clamped_swiglu(gate, up, alpha.into(), limit.into())
                }
            })
            .collect();
        let y = product(experts.down.expert(expert).unwrap(), &h, down_bias);
        for (sum, y) in out[token * hidden..].iter_mut().zip(y) {
            *sum += f64::from(*weight) * y;
        }
    }
    out
}

/// The biases of one expert's gate, up and down; empty without any.
fn biases<'a>(experts: &MoeWeights<'a>, expert: usize) -> [&'a [f32]; 3] {
    let Some(biases) = experts.biases else {
        return [&[]; 3];
    };
    let part = |all: &'a [f32]| {
        let rows = all.len() / experts.experts();
        &all[expert * rows..][..rows]
    };
    [part(biases.gate), part(biases.up), part(biases.down)]
}

fn product(w: WeightRows<'_>, x: &[f64], bias: &[f32]) -> Vec<f64> {
    let weights = reference::dequantize(w);
    let rows = weights.chunks_exact(w.cols()).enumerate();
    rows.map(|(index, row)| {
        let dot: f64 = row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
        dot + bias.get(index).map_or(0.0, |b| f64::from(*b))
    })
    .collect()
}
