//! The experts in double precision, token by token.

use super::{MoeWeights, Routing};
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
        let gate = product(experts.gate.expert(expert).unwrap(), &x);
        let up = product(experts.up.expert(expert).unwrap(), &x);
        let h: Vec<f64> = gate
            .iter()
            .zip(&up)
            .map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up)
            .collect();
        let y = product(experts.down.expert(expert).unwrap(), &h);
        for (sum, y) in out[token * hidden..].iter_mut().zip(y) {
            *sum += f64::from(*weight) * y;
        }
    }
    out
}

fn product(w: WeightRows<'_>, x: &[f64]) -> Vec<f64> {
    let weights = reference::dequantize(w);
    let dot = |row: &[f32]| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum();
    weights.chunks_exact(w.cols()).map(dot).collect()
}
