//! The operations in double precision, element by element.

pub(super) fn silu_mul(gate: &[f32], up: &[f32]) -> Vec<f64> {
    let silu = |x: f64| x / (1.0 + (-x).exp());
    gate.iter()
        .zip(up)
        .map(|(&g, &u)| silu(g.into()) * f64::from(u))
        .collect()
}

pub(crate) fn clamped_swiglu(gate: f64, up: f64, alpha: f64, limit: f64) -> f64 {
    let g = gate.min(limit);
    g / (1.0 + (-alpha * g).exp()) * (up.clamp(-limit, limit) + 1.0)
}

pub(super) fn sigmoid(x: &[f32]) -> Vec<f64> {
    x.iter()
        .map(|&x| 1.0 / (1.0 + (-f64::from(x)).exp()))
        .collect()
}

pub(super) fn softmax_rows(x: &[f32], width: usize) -> Vec<f64> {
    let mut out = Vec::new();
    for row in x.chunks(width) {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let e: Vec<f64> = row
            .iter()
            .map(|&x| (f64::from(x) - f64::from(max)).exp())
            .collect();
        let sum: f64 = e.iter().sum();
        out.extend(e.iter().map(|e| e / sum));
    }
    out
}
