//! Causal attention in double precision, one score at a time.

/// Attention of one query head: keys and values are the rows that it sees. A sink is a further
/// score, whose value is zero.
pub(super) fn attend(
    q: &[f64],
    k: &[Vec<f64>],
    v: &[Vec<f64>],
    scale: f32,
    sink: Option<f32>,
) -> Vec<f64> {
    let mut scores: Vec<f64> = k
        .iter()
        .map(|k| q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() * f64::from(scale))
        .collect();
    scores.extend(sink.map(f64::from));
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|s| (s - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    let mut out = vec![0.0; v[0].len()];
    for (weight, row) in weights.iter().zip(v) {
        for (o, v) in out.iter_mut().zip(row) {
            *o += weight / sum * v;
        }
    }
    out
}

pub(super) fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}
