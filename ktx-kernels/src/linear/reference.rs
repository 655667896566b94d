//! The naive product in double precision that all kernels are tested against.

use super::WeightRows;

/// `x` `[tokens, cols]` times the dequantised weights, in `f64`, as `[tokens, rows]`.
pub fn matmul(w: WeightRows<'_>, x: &[f32]) -> Vec<f64> {
    product(&dequantize(w), w.cols(), x)
}

/// `x` `[tokens, cols]` times `weights` `[rows, cols]`, in `f64`, as `[tokens, rows]`.
pub fn product(weights: &[f32], cols: usize, x: &[f32]) -> Vec<f64> {
    let cols = cols.max(1);
    let dot = |x: &[f32], row: &[f32]| -> f64 {
        x.iter()
            .zip(row)
            .map(|(x, weight)| f64::from(*x) * f64::from(*weight))
            .sum()
    };
    x.chunks_exact(cols)
        .flat_map(|x| weights.chunks_exact(cols).map(move |row| dot(x, row)))
        .collect()
}

/// All weights `[rows, cols]` as `f32`.
pub fn dequantize(w: WeightRows<'_>) -> Vec<f32> {
    let mut weights = vec![0.0; w.rows() * w.cols()];
    for (row, out) in weights.chunks_exact_mut(w.cols().max(1)).enumerate() {
        let dequantized = w.dequantize(row, out);
        debug_assert!(
            dequantized.is_some(),
            "the matrix was checked when it was made"
        );
    }
    weights
}

/// Normalised mean squared error: the squared error over the squared length of `expected`.
pub fn nmse(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(
        actual.len(),
        expected.len(),
        "results and expectations pair up"
    );
    let error: f64 = actual
        .iter()
        .zip(expected)
        .map(|(a, e)| (f64::from(*a) - e).powi(2))
        .sum();
    let length: f64 = expected.iter().map(|e| e * e).sum();
    if error == 0.0 { 0.0 } else { error / length }
}
