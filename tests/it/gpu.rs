//! Whole models on a GPU, against transformers and against the CPU. Without a GPU each test says so and
//! passes; `cargo test --workspace -- gpu` runs these and the kernels' own.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ktx_core::gguf::Gguf;
use ktx_core::kernels::cuda::Gpu;
use ktx_core::kernels::linear::Precision;
use ktx_core::{Engine, GenerateOptions, Rules, SamplingParams};

use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{engine, forced_logits, json, last_logits, load, pip, repository, tokens};

/// Everything but the embedding on the GPU; the routed experts on `experts`.
fn rules(experts: &str) -> Rules {
    let operator = match experts {
        "cpu" => "KExpertsCPU",
        _ => "KExpertsMarlin",
    };
    let text = format!(
        "- match: {{name: '\\.experts$'}}\n  replace:\n    class: KTransformersExperts\n    kwargs: \
         {{generate_op: {operator}, generate_device: '{experts}', prefill_op: {operator}, \
         prefill_device: '{experts}', out_device: '{experts}'}}\n  recursive: False\n\
         - match: {{name: '^model\\.embed_tokens$'}}\n  replace:\n    class: default\n    \
         kwargs: {{generate_device: cpu, prefill_device: cpu}}\n\
         - match: {{name: ''}}\n  replace:\n    class: default\n    \
         kwargs: {{generate_device: 'cuda:0', prefill_device: 'cuda:0'}}\n"
    );
    Rules::Text {
        name: "gpu.yaml".to_owned(),
        text,
    }
}

/// The GPU's turn, if there is one; one test at a time, since they share its memory.
fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    match Gpu::open(0) {
        Ok(_) => Some(TURN.lock().unwrap_or_else(PoisonError::into_inner)),
        Err(error) => {
            let test = std::thread::current().name().unwrap_or("test").to_owned();
            // The raw handle, because the harness hides what a passing test prints.
            let line = format!("{test} ... skipped, no GPU: {error}\n");
            std::io::stderr().write_all(line.as_bytes()).ok();
            None
        }
    }
}

fn on_gpu(gguf: &Gguf, precision: Precision, experts: &str) -> Engine {
    let builder = Engine::builder().gguf(gguf.clone()).precision(precision);
    load(builder.threads(2).rules(rules(experts)))
}

/// What the GPU computes of one model is as near to transformers as the CPU is; latent attention keeps
/// its heads' matrices in f16 there.
#[test]
fn gpu_gives_the_logits_of_transformers_for_every_family() {
    let Some(_turn) = turn() else { return };
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
        let is_latent = ["deepseek", "moonlight"]
            .iter()
            .any(|n| name.starts_with(n));
        let bound = if is_latent { 1e-6 } else { 1e-9 };
        for experts in ["cuda:0", "cpu"] {
            let engine = on_gpu(&gguf, Precision::F32, experts);
            for (prompt, logits) in prompts.iter().zip(case["logits"].as_array().unwrap()) {
                let error = nmse(
                    &last_logits(&mut engine.session(), prompt),
                    &numbers(logits),
                );
                assert!(
                    error < bound,
                    "{name}, experts on {experts}: NMSE {error:.2e}"
                );
            }
        }
    }
}

#[test]
fn gpu_and_hybrid_answer_the_golden_prompts_as_the_cpu_does() {
    let Some(_turn) = turn() else { return };
    let goldens = json("models/pip-17m-goldens.json");
    let options = GenerateOptions {
        sampling: SamplingParams::greedy(),
        max_new_tokens: 48,
        ..GenerateOptions::default()
    };
    for experts in ["cuda:0", "cpu"] {
        let engine = on_gpu(&pip(), Precision::F32, experts);
        for case in goldens["generate"].as_array().unwrap() {
            let mut session = engine.session();
            let prompt = tokens(&ids(&case["prompt_ids"]));
            let mut generation = session.generate(&prompt, &options).unwrap();
            generation.by_ref().for_each(|piece| drop(piece.unwrap()));
            let answer: Vec<u32> = generation.generated().iter().map(|t| t.0).collect();
            // The end token is in the golden and not in the text.
            let mut wanted = ids(&case["greedy_ids"]);
            wanted.retain(|id| *id != 1);
            assert_eq!(answer, wanted, "{}, experts on {experts}", case["prompt"]);
        }
    }
}

/// The first generated tokens run operator by operator, the next are recorded, the rest replay that:
/// all give what the CPU gives, also after another prompt has changed every buffer.
#[test]
fn gpu_steps_that_are_recorded_give_what_unrecorded_ones_give() {
    let Some(_turn) = turn() else { return };
    let cpu = engine(&pip(), Precision::F32);
    for experts in ["cuda:0", "cpu"] {
        let gpu = on_gpu(&pip(), Precision::F32, experts);
        for round in 0..2u32 {
            let (mut session, mut reference) = (gpu.session(), cpu.session());
            let prompt: Vec<u32> = (0..70).map(|i| 300 + (17 + round) * i).collect();
            last_logits(&mut session, &prompt);
            last_logits(&mut reference, &prompt);
            for id in [5, 900, 33, 1200, 7, 64, 512, 2] {
                let (found, wanted) = (
                    forced_logits(&mut session, id),
                    forced_logits(&mut reference, id),
                );
                let error = nmse(&found, &wanted);
                assert!(error < 1e-6, "experts on {experts}: NMSE {error:.2e}");
            }
        }
    }
}
