//! Prompts through experts that live in main memory, computed on a GPU, against transformers and the CPU.
//! Without a GPU each test says so and passes.

use ktx_core::gguf::Gguf;
use ktx_core::kernels::linear::Precision;
use ktx_core::kernels::moe::stream::Uploads;
use ktx_core::{Engine, EngineBuilder, GenerateOptions, Rules, SamplingParams};

use crate::gpu::turn;
use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{engine, forced_logits, json, last_logits, load, pip, repository, tokens};

/// As rule files have it: experts generate on the CPU, and prompts go to the GPU.
const RULES: &str = "\
- match: {name: '\\.experts$'}
  replace:
    class: ktransformers.operators.experts.KTransformersExperts
    kwargs:
      prefill_device: 'cuda:0'
      prefill_op: KExpertsTorch
      generate_device: cpu
      generate_op: KExpertsCPU
      out_device: 'cuda:0'
  recursive: False
- match: {name: '^model\\.embed_tokens$'}
  replace: {class: default, kwargs: {generate_device: cpu, prefill_device: cpu}}
- match: {name: ''}
  replace: {class: default, kwargs: {generate_device: 'cuda:0', prefill_device: 'cuda:0'}}
";

pub(crate) fn streaming(gguf: &Gguf, precision: Precision) -> EngineBuilder {
    let rules = Rules::Text {
        name: "streaming.yaml".to_owned(),
        text: RULES.to_owned(),
    };
    let builder = Engine::builder().gguf(gguf.clone()).precision(precision);
    builder.threads(2).rules(rules).stream_from(1)
}

/// Every family, with uploads of both kinds, whole prompts and chunks that end anywhere.
#[test]
fn gpu_streams_experts_to_the_logits_of_transformers() {
    let Some(_turn) = turn() else { return };
    let goldens = json("tests/fixtures/transformers/goldens.json");
    let all = goldens["prompts"].as_array().unwrap().iter();
    let prompts: Vec<Vec<u32>> = all.map(ids).collect();
    for case in goldens["cases"].as_array().unwrap() {
        let name = case["model"].as_str().unwrap();
        let gguf = Gguf::open(repository(&format!("tests/fixtures/transformers/{name}"))).unwrap();
        if !gguf.tensors().any(|t| t.name.contains("_exps")) {
            continue;
        }
        let is_latent = ["deepseek", "moonlight"]
            .iter()
            .any(|n| name.starts_with(n));
        let bound = if is_latent { 1e-6 } else { 1e-9 };
        for (uploads, chunk) in [
            (Uploads::Best, 512),
            (Uploads::Best, 3),
            (Uploads::Staged, 5),
        ] {
            let builder = streaming(&gguf, Precision::F32).uploads(uploads);
            let engine = load(builder.chunk_size(chunk));
            for (prompt, logits) in prompts.iter().zip(case["logits"].as_array().unwrap()) {
                let found = last_logits(&mut engine.session(), prompt);
                let error = nmse(&found, &numbers(logits));
                assert!(
                    error < bound,
                    "{name}, {uploads:?}, chunks of {chunk}: NMSE {error:.2e}"
                );
            }
        }
    }
}

/// Two conversations whose chunks alternate, each followed by tokens of the CPU's experts in recorded steps.
#[test]
fn gpu_sessions_take_turns_in_streaming_and_generate_behind_it() {
    let Some(_turn) = turn() else { return };
    let gguf = Gguf::open(repository("tests/fixtures/transformers/qwen3moe.gguf")).unwrap();
    let gpu = load(streaming(&gguf, Precision::F32).chunk_size(16).sessions(2));
    let cpu = engine(&gguf, Precision::F32);
    let prompt = |seed: u32, length: u32| -> Vec<u32> {
        (0..length)
            .map(|i| (i * i * 7 + seed * (i + 3)) % 250)
            .collect()
    };
    let mut pairs = [0, 1].map(|_| (gpu.session(), cpu.session()));
    for round in 0..3 {
        for (index, (found, wanted)) in pairs.iter_mut().enumerate() {
            let part = prompt(round * 2 + index as u32, 21 + round);
            let error = nmse(&last_logits(found, &part), &last_logits(wanted, &part));
            assert!(
                error < 1e-9,
                "round {round}, session {index}: NMSE {error:.2e}"
            );
            for id in [5, 90, 33, 120] {
                let error = nmse(&forced_logits(found, id), &forced_logits(wanted, id));
                assert!(error < 1e-9, "round {round}, behind {id}: NMSE {error:.2e}");
            }
        }
    }
}

/// A prompt of more chunks than one is read from its beginning again after it was stopped in the middle.
#[test]
fn gpu_streaming_goes_on_after_a_prompt_was_stopped() {
    let Some(_turn) = turn() else { return };
    let gguf = Gguf::open(repository("tests/fixtures/transformers/qwen3moe.gguf")).unwrap();
    let gpu = load(streaming(&gguf, Precision::F32).chunk_size(16));
    let cpu = engine(&gguf, Precision::F32);
    let prompt: Vec<u32> = (0..100).map(|i| i * 11 % 250).collect();
    let options = GenerateOptions {
        sampling: SamplingParams::greedy(),
        max_new_tokens: 4,
        ..GenerateOptions::default()
    };
    let mut session = gpu.session();
    {
        let handle = session.cancel_handle();
        let ids = tokens(&prompt);
        let mut generation = session.generate(&ids, &options).unwrap();
        handle.cancel();
        generation.by_ref().for_each(|piece| drop(piece.unwrap()));
        assert_eq!(
            generation.generated().len(),
            0,
            "nothing was read to its end"
        );
    }
    session.clear();
    let error = nmse(
        &last_logits(&mut session, &prompt),
        &last_logits(&mut cpu.session(), &prompt),
    );
    assert!(error < 1e-9, "NMSE {error:.2e}");
}

/// Short chunks stay where the experts are; longer ones stream: both give what the CPU gives.
#[test]
fn gpu_streams_from_the_set_number_of_tokens_on() {
    let Some(_turn) = turn() else { return };
    let cpu = engine(&pip(), Precision::F32);
    for from in [1, 20, 1000] {
        let gpu = load(streaming(&pip(), Precision::F32).stream_from(from));
        for length in [5, 20, 70] {
            let prompt: Vec<u32> = (0..length).map(|i| 300 + 17 * i).collect();
            let error = nmse(
                &last_logits(&mut gpu.session(), &prompt),
                &last_logits(&mut cpu.session(), &prompt),
            );
            // The heads of latent attention are multiplied in f16 on a GPU.
            assert!(
                error < 1e-6,
                "{length} tokens, from {from}: NMSE {error:.2e}"
            );
        }
    }
}
