//! KTransformers' own rule files, unchanged, on tiny models of their families: every device mapped to
//! the CPU, the logits are still those of transformers.

use ktx_core::engine::available_devices;
use ktx_core::gguf::Gguf;
use ktx_core::kernels::linear::Precision;
use ktx_core::{DeviceMapping, Engine, EngineBuilder, Rules};

use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{json, last_logits, load, repository};

fn builder(rules: &str, model: &str) -> EngineBuilder {
    let gguf = Gguf::open(repository(&format!(
        "tests/fixtures/transformers/{model}.gguf"
    )))
    .unwrap();
    Engine::builder()
        .gguf(gguf)
        .rules(Rules::File(repository(&format!(
            "ktx-core/tests/plans/rules/{rules}.yaml"
        ))))
        .default_device("cuda:0")
        .precision(Precision::F32)
        .devices(DeviceMapping::AllOnCpu)
}

#[test]
fn rule_files_of_ktransformers_run_unchanged_and_keep_the_logits() {
    let goldens = json("tests/fixtures/transformers/goldens.json");
    let prompts: Vec<Vec<u32>> = goldens["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .map(ids)
        .collect();
    for (rules, model) in [
        ("DeepSeek-V2-Chat", "deepseek_v2"),
        ("DeepSeek-V2-Chat-multi-gpu", "deepseek_v2"),
        ("DeepSeek-V2-Lite-Chat", "deepseek_v2_lite"),
        ("DeepSeek-V3-Chat", "deepseek_v3"),
        ("DeepSeek-V3-Chat-amx", "deepseek_v3"),
        ("DeepSeek-V3-Chat-multi-gpu-4", "deepseek_v3"),
        ("DeepSeek-V3-Chat-multi-gpu-marlin", "deepseek_v3"),
        ("DeepSeek-V3-Chat-serve", "deepseek_v3"),
        ("Internlm2_5-7b-Chat-1m", "llama"),
        ("Mixtral", "mixtral"),
        ("Qwen2-57B-A14B-Instruct", "qwen2moe"),
        ("Qwen2-57B-A14B-Instruct-multi-gpu", "qwen2moe"),
        ("Qwen2-serve", "qwen2moe"),
        ("Qwen3Moe-serve", "qwen3moe"),
    ] {
        let engine = load(builder(rules, model));
        assert!(
            engine.report().modules.iter().any(|m| m.by_rule),
            "{rules}: no rule took effect"
        );
        let cases = goldens["cases"].as_array().unwrap();
        let case = cases
            .iter()
            .find(|c| c["model"] == format!("{model}.gguf"))
            .unwrap();
        for (prompt, logits) in prompts.iter().zip(case["logits"].as_array().unwrap()) {
            let error = nmse(
                &last_logits(&mut engine.session(), prompt),
                &numbers(logits),
            );
            assert!(error < 1e-9, "{rules} on {model}: NMSE {error:.2e}");
        }
    }
}

#[test]
fn a_gpu_rule_file_is_refused_without_the_mapping_and_names_the_way_out() {
    if available_devices().len() > 1 {
        // With a GPU the file is carried out.
        return;
    }
    let planned = builder("DeepSeek-V3-Chat", "deepseek_v3").devices(DeviceMapping::AsPlanned);
    let error = planned
        .load()
        .map(drop)
        .expect_err("there is no GPU operator")
        .to_string();
    assert!(
        error.contains("rule 1") && error.contains("--cpu"),
        "{error}"
    );
}

#[test]
fn rule_files_that_need_what_is_not_there_say_what_it_is() {
    for (rules, missing) in [
        ("DeepSeek-V3-Chat-fp8-linear-ggml-experts", "FP8"),
        ("xpu-DeepSeek-V3-Chat", "Intel GPU"),
    ] {
        let error = builder(rules, "deepseek_v3")
            .load()
            .map(drop)
            .expect_err("it cannot run")
            .to_string();
        assert!(
            error.contains("needs") && error.contains(missing),
            "{rules}: {error}"
        );
    }
}
