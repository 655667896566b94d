//! Tiny models of every family against transformers' fp32 logits (`tests/fixtures/README.md`).

use ktx_core::gguf::Gguf;
use ktx_core::kernels::linear::Precision;
use ktx_core::{DeviceMapping, Engine, EngineBuilder, Rules};
use serde_json::Value;

use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{engine, json, last_logits, load, repository};

const GOLDENS: &str = "tests/fixtures/transformers/goldens.json";

fn open(case: &Value) -> Gguf {
    let name = case["model"].as_str().unwrap();
    Gguf::open(repository(&format!("tests/fixtures/transformers/{name}"))).unwrap()
}

#[test]
fn every_family_gives_the_logits_of_transformers() {
    let goldens = json(GOLDENS);
    let prompts: Vec<Vec<u32>> = goldens["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .map(ids)
        .collect();
    for case in goldens["cases"].as_array().unwrap() {
        let engine = engine(&open(case), Precision::F32);
        for (prompt, logits) in prompts.iter().zip(case["logits"].as_array().unwrap()) {
            let error = nmse(
                &last_logits(&mut engine.session(), prompt),
                &numbers(logits),
            );
            assert!(error < 1e-9, "{}: NMSE {error:.2e}", case["model"]);
        }
    }
}

/// A prompt longer than the windows and than a page of the cache, read in one piece and in many.
#[test]
fn sliding_windows_give_the_logits_of_transformers_however_a_prompt_is_cut() {
    let goldens = json(GOLDENS);
    let prompt = ids(&goldens["long_prompt"]);
    let mut windowed = 0;
    for case in goldens["cases"].as_array().unwrap() {
        let Some(logits) = case.get("long_logits") else {
            continue;
        };
        windowed += 1;
        let engine = engine(&open(case), Precision::F32);
        for chunk in [1, 7, prompt.len()] {
            let mut session = engine.session();
            let mut last = Vec::new();
            for part in prompt.chunks(chunk) {
                last = last_logits(&mut session, part);
            }
            let error = nmse(&last, &numbers(logits));
            assert!(
                error < 1e-9,
                "{}, chunks of {chunk}: NMSE {error:.2e}",
                case["model"]
            );
        }
    }
    assert_eq!(windowed, 2);
}

/// An engine of the tiny gpt-oss with one rule: `class` for the experts.
fn with_experts(class: &str) -> EngineBuilder {
    let gguf = Gguf::open(repository("tests/fixtures/transformers/gpt_oss_mxfp4.gguf"));
    let text = format!(
        "- match:\n    name: '\\.experts$'\n  replace:\n    class: {class}\n  recursive: False\n"
    );
    let name = "test".to_owned();
    Engine::builder()
        .gguf(gguf.unwrap())
        .rules(Rules::Text { text, name })
        .devices(DeviceMapping::AllOnCpu)
        .precision(Precision::F32)
}

#[test]
fn experts_in_one_module_run_as_one_operator_or_are_refused() {
    let goldens = json(GOLDENS);
    let cases = goldens["cases"].as_array().unwrap();
    let case = cases.iter().find(|c| c["model"] == "gpt_oss_mxfp4.gguf");
    let expected = numbers(&case.unwrap()["logits"][0]);
    let prompt = ids(&goldens["prompts"][0]);
    for class in ["default", "KExpertsCPU", "KExpertsTorch"] {
        let engine = load(with_experts(class));
        let error = nmse(&last_logits(&mut engine.session(), &prompt), &expected);
        assert!(error < 1e-9, "{class}: NMSE {error:.2e}");
    }
    let refused = with_experts("ktx.experts.ExpertList").load().map(drop);
    let message = refused.expect_err("there is no list").to_string();
    assert!(message.contains("use KExpertsCPU"), "{message}");
}
