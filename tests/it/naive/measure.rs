//! Reading golden numbers, and the distance to them.

use serde_json::Value;

pub fn numbers(value: &Value) -> Vec<f64> {
    let array = value.as_array().expect("an array");
    array
        .iter()
        .map(|x| x.as_f64().expect("a number"))
        .collect()
}

pub fn ids(value: &Value) -> Vec<u32> {
    numbers(value).into_iter().map(|id| id as u32).collect()
}

/// Mean square of the difference over mean square of the expectation.
pub fn nmse(found: &[f64], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(f, e)| f - e);
    let error: f64 = differences.map(|d| d * d).sum();
    error / expected.iter().map(|e| e * e).sum::<f64>()
}
