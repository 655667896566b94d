//! Models of about a billion parameters in the shapes of DeepSeek-V2-Lite, DeepSeek-V3, Qwen2-MoE, Qwen3-MoE and
//! Llama 3, with random weights, against llama.cpp. They are not part of the repository: these tests are ignored
//! unless asked for, and read the models from the folder that `KTX_MODELS` names.
//!
//! `python3 scripts/synthetic_model.py NAME FOLDER/NAME.gguf` writes one (it needs numpy) for each of `dslite-1b`,
//! `dsv3-1b`, `qwen2-1b`, `qwen3-1b` and `llama-1b`; then
//! `KTX_MODELS=FOLDER cargo test --release --test it -- --ignored synthetic`.

use std::path::Path;

use ktx_core::Engine;
use ktx_core::gguf::Gguf;
use ktx_core::kernels::linear::Precision;
use serde_json::Value;

use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{engine, forced_logits, json, last_logits};

/// Two tokens whose logits are nearer than this may change places.
const TIE: f64 = 0.01;

fn cases() -> Vec<Value> {
    let goldens = json("tests/fixtures/synthetic.json");
    goldens["cases"].as_array().unwrap().clone()
}

fn open(case: &Value, precision: Precision) -> Engine {
    let folder = std::env::var("KTX_MODELS").expect("KTX_MODELS names the folder with the models");
    let path = Path::new(&folder).join(case["model"].as_str().unwrap());
    engine(
        &Gguf::open(path).unwrap_or_else(|e| panic!("{e}")),
        precision,
    )
}

/// The logits that the goldens hold: every `stride`th.
fn sample(case: &Value, logits: &[f64]) -> Vec<f64> {
    let stride = case["stride"].as_u64().unwrap() as usize;
    logits.iter().copied().step_by(stride).collect()
}

fn best(logits: &[f64]) -> u32 {
    let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    best.unwrap() as u32
}

#[test]
#[ignore = "needs synthetic models in the folder KTX_MODELS"]
fn synthetic_models_give_llama_cpps_logits_and_greedy_tokens_in_f32() {
    for case in cases() {
        let name = &case["model"];
        let engine = open(&case, Precision::F32);
        let mut session = engine.session();
        let mut logits = last_logits(&mut session, &ids(&case["prompt_ids"]));
        let error = nmse(&sample(&case, &logits), &numbers(&case["logits"]));
        println!("{name}: NMSE {error:.2e} of the logits behind the prompt");
        assert!(error < 1e-9, "{name}: NMSE {error:.2e}");
        let (greedy, gaps) = (ids(&case["greedy_ids"]), numbers(&case["top2_gaps"]));
        assert!(greedy.len() >= 32, "{name}");
        for (i, (id, gap)) in greedy.iter().zip(gaps).enumerate() {
            assert!(best(&logits) == *id || gap < TIE, "{name}, token {i}");
            logits = forced_logits(&mut session, *id);
        }
    }
}

#[test]
#[ignore = "needs synthetic models in the folder KTX_MODELS"]
fn synthetic_models_with_8_bit_activations_are_as_near_as_llama_cpp_is() {
    for case in cases() {
        let name = &case["model"];
        let engine = open(&case, Precision::Int8);
        let logits = last_logits(&mut engine.session(), &ids(&case["prompt_ids"]));
        let error = nmse(&sample(&case, &logits), &numbers(&case["logits"]));
        let theirs = case["llama_cpp_8_bit_nmse"].as_f64().unwrap();
        println!("{name}: NMSE {error:.2e} with 8-bit activations, llama.cpp {theirs:.2e}");
        assert!(
            error < 2.0 * theirs,
            "{name}: {error:.2e}, not {theirs:.2e}"
        );
    }
}
