//! Tiny models of every family against transformers' fp32 logits (`tests/fixtures/README.md`).

use ktx_core::gguf::Gguf;
use ktx_core::kernels::linear::Precision;

use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{engine, json, last_logits, repository};

#[test]
fn every_family_gives_the_logits_of_transformers() {
    let goldens = json("tests/fixtures/transformers/goldens.json");
    let prompts: Vec<Vec<u32>> = goldens["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .map(ids)
        .collect();
    for case in goldens["cases"].as_array().unwrap() {
        let name = case["model"].as_str().unwrap();
        let gguf = Gguf::open(repository(&format!("tests/fixtures/transformers/{name}"))).unwrap();
        let engine = engine(&gguf, Precision::F32);
        for (prompt, logits) in prompts.iter().zip(case["logits"].as_array().unwrap()) {
            let error = nmse(
                &last_logits(&mut engine.session(), prompt),
                &numbers(logits),
            );
            assert!(error < 1e-9, "{name}: NMSE {error:.2e}");
        }
    }
}
