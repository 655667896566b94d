//! The reference itself, against transformers' output for the built-in model.

use std::fs;
use std::path::PathBuf;

use ktx_gguf::Gguf;
use serde_json::Value;

use super::measure::{ids, nmse, numbers};
use super::{Model, Trace};

/// Single precision against double; the goldens keep six digits of the hidden states.
const TOLERANCE: f64 = 1e-9;

fn models() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("models")
}

fn assert_close(what: &str, found: &[f64], expected: &Value) {
    let nmse = nmse(found, &numbers(expected));
    assert!(nmse <= TOLERANCE, "{what}: NMSE {nmse:e}");
}

fn check_hidden(model: &Model, goldens: &Value) {
    let trace = model.forward(&ids(&goldens["prompt_ids"]));
    let position = goldens["position"].as_u64().unwrap() as usize;
    for (layer, expected) in goldens["layers"].as_array().unwrap().iter().enumerate() {
        let found = &trace.hidden[layer][position];
        assert_close(
            &format!("hidden state after layer {layer}"),
            found,
            expected,
        );
    }
    assert_close(
        "final norm",
        &trace.final_norm[position],
        &goldens["final_norm"],
    );
    check_routers(&trace, position, &goldens["routers"]);
}

fn check_routers(trace: &Trace, position: usize, goldens: &Value) {
    for router in goldens.as_array().unwrap() {
        let layer = router["layer"].as_u64().unwrap() as usize;
        let found = &trace.routers[layer][position];
        let experts: Vec<u32> = found.experts.iter().map(|&e| e as u32).collect();
        assert_eq!(experts, ids(&router["experts"]), "experts of layer {layer}");
        let what = format!("router weights of layer {layer}");
        assert_close(&what, &found.weights, &router["weights"]);
    }
}

#[test]
fn reference_agrees_with_transformers_on_the_built_in_model() {
    let file = Gguf::open(models().join("pip-17m.gguf")).unwrap();
    let model = Model::load(&file);
    let goldens = fs::read_to_string(models().join("pip-17m-goldens.json")).unwrap();
    let goldens: Value = serde_json::from_str(&goldens).unwrap();
    for case in goldens["generate"].as_array().unwrap() {
        let trace = model.forward(&ids(&case["prompt_ids"]));
        let prompt = case["prompt"].as_str().unwrap();
        assert_close(prompt, trace.logits.last().unwrap(), &case["logits"]);
    }
    check_hidden(&model, &goldens["hidden"]);

    let opposite = &goldens["generate"][1];
    let mut sequence = ids(&opposite["prompt_ids"]);
    for expected in ids(&opposite["greedy_ids"]) {
        let next = model.forward(&sequence).greedy();
        assert_eq!(next, expected, "after {} tokens", sequence.len());
        sequence.push(next);
    }
}
