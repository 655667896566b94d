//! The reference against transformers on tiny random models of every family.

use std::fs;
use std::path::PathBuf;

use ktx_gguf::Gguf;
use serde_json::Value;

use super::Model;
use super::measure::{ids, nmse, numbers};

/// Single precision against double; measured: at most 2e-12.
const TOLERANCE: f64 = 1e-10;

#[test]
fn reference_agrees_with_transformers_on_every_family() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/transformers");
    let goldens = fs::read_to_string(folder.join("goldens.json")).unwrap();
    let goldens: Value = serde_json::from_str(&goldens).unwrap();
    let prompts = goldens["prompts"].as_array().unwrap();
    for case in goldens["cases"].as_array().unwrap() {
        let name = case["model"].as_str().unwrap();
        let model = Model::load(&Gguf::open(folder.join(name)).unwrap());
        for (prompt, expected) in prompts.iter().zip(case["logits"].as_array().unwrap()) {
            let trace = model.forward(&ids(prompt));
            let nmse = nmse(trace.logits.last().unwrap(), &numbers(expected));
            assert!(nmse <= TOLERANCE, "{name}: NMSE {nmse:e}");
        }
        if let Some(expected) = case.get("long_logits") {
            let trace = model.forward(&ids(&goldens["long_prompt"]));
            let nmse = nmse(trace.logits.last().unwrap(), &numbers(expected));
            assert!(nmse <= TOLERANCE, "{name}, long prompt: NMSE {nmse:e}");
        }
    }
}
