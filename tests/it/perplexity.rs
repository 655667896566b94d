//! Perplexity against llama.cpp's, by its protocol (`tests/fixtures/README.md`).

use ktx_core::Engine;
use ktx_core::kernels::linear::Precision;
use ktx_core::perplexity::{Chunks, perplexity, tokens_of};
use serde_json::Value;

use crate::run::{engine, json, pip, repository};

/// The run of a model in the fixture.
pub fn golden(model: &str) -> Value {
    let runs = json("tests/fixtures/perplexity.json");
    let all = runs["runs"].as_array().expect("a list");
    all.iter()
        .find(|run| run["model"] == model)
        .unwrap_or_else(|| panic!("no run of {model}"))
        .clone()
}

/// Checks that an engine's perplexity is within `tolerance`, relative, of the fixture's `mode`.
pub fn check(engine: &Engine, run: &Value, mode: &str, tolerance: f64) {
    let path = repository(&format!("tests/fixtures/{}", run["text"].as_str().unwrap()));
    let text = std::fs::read_to_string(path).unwrap();
    let context = run["context"].as_u64().unwrap() as usize;
    let tokens = tokens_of(engine, &text);
    let chunks = Chunks {
        length: context,
        limit: None,
    };
    let found = perplexity(engine, &tokens, chunks, &mut |_| ())
        .unwrap_or_else(|e| panic!("{e}"))
        .perplexity();
    let expected = run[mode]["ppl"].as_f64().unwrap();
    let difference = (found / expected - 1.0).abs();
    assert!(
        difference < tolerance,
        "{found} and {expected}: {difference:.2e}"
    );
}

#[test]
fn the_built_in_models_perplexity_equals_llama_cpps_with_f32_weights() {
    let run = golden("pip-17m.gguf");
    check(&engine(&pip(), Precision::F32), &run, "f32_weights", 1e-4);
}
