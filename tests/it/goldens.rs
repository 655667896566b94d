//! The built-in model against transformers' fp32 output. The bounds are those that llama.cpp was
//! measured at (`models/README.md`): 1e-9 with f32 activations and cache, 1e-4 with an f16 cache,
//! 1e-2 for logits and 5e-3 for hidden states with 8-bit activations.

use ktx_core::kernels::kv::KvType;
use ktx_core::kernels::linear::Precision;
use ktx_core::{Engine, GenerateOptions, Rules, SamplingParams};
use serde_json::Value;

use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{
    Recorder, all_logits, engine, forced_logits, json, last_logits, load, pip, tokens,
};

const F32_CACHE: f64 = 1e-9;
const F16_CACHE: f64 = 1e-4;
/// Measured: 4e-5 to 2.6e-4.
const Q8_CACHE: f64 = 1e-3;
const INT8_LOGITS: f64 = 1e-2;
const INT8_HIDDEN: f64 = 5e-3;

fn goldens() -> Value {
    json("models/pip-17m-goldens.json")
}

fn cases(goldens: &Value) -> &Vec<Value> {
    goldens["generate"].as_array().expect("a list")
}

fn greedy() -> GenerateOptions {
    GenerateOptions {
        sampling: SamplingParams::greedy(),
        max_new_tokens: 48,
        ..GenerateOptions::default()
    }
}

fn check_prompts(engine: &Engine, bound: f64) {
    for case in cases(&goldens()) {
        let logits = last_logits(&mut engine.session(), &ids(&case["prompt_ids"]));
        let error = nmse(&logits, &numbers(&case["logits"]));
        assert!(error < bound, "{}: NMSE {error:.2e}", case["prompt"]);
    }
}

fn check_hidden(engine: &Engine, bound: f64) {
    let goldens = goldens();
    let hidden = &goldens["hidden"];
    let mut seen = Recorder::default();
    let prompt = tokens(&ids(&hidden["prompt_ids"]));
    engine
        .session()
        .observe(&prompt, &mut seen, &mut |_| ())
        .unwrap();
    for (i, layer) in hidden["layers"].as_array().unwrap().iter().enumerate() {
        let found: Vec<f64> = seen
            .last(&format!("model.layers.{i}"), "hidden")
            .iter()
            .map(|x| (*x).into())
            .collect();
        let error = nmse(&found, &numbers(layer));
        assert!(error < bound, "layer {i}: NMSE {error:.2e}");
    }
    let found: Vec<f64> = seen
        .last("model", "final_norm")
        .iter()
        .map(|x| (*x).into())
        .collect();
    let error = nmse(&found, &numbers(&hidden["final_norm"]));
    assert!(error < bound, "final norm: NMSE {error:.2e}");
    for router in hidden["routers"].as_array().unwrap() {
        let path = format!("model.layers.{}.mlp", router["layer"]);
        let mut found: Vec<u32> = seen
            .last(&path, "expert_ids")
            .iter()
            .map(|x| x.to_bits())
            .collect();
        found.sort_unstable();
        assert_eq!(found, ids(&router["experts"]), "{path}");
    }
}

#[test]
fn f32_activations_give_the_references_logits_and_hidden_states() {
    let engine = engine(&pip(), Precision::F32);
    check_prompts(&engine, F32_CACHE);
    check_hidden(&engine, F32_CACHE);
}

#[test]
fn an_f16_cache_costs_little() {
    let engine = load(
        Engine::builder()
            .gguf(pip())
            .precision(Precision::F32)
            .kv_type(KvType::F16),
    );
    check_prompts(&engine, F16_CACHE);
    check_hidden(&engine, F16_CACHE);
}

#[test]
fn an_eight_bit_cache_costs_less_than_eight_bit_activations() {
    let q8 = |precision| {
        let builder = Engine::builder().gguf(pip()).precision(precision);
        load(builder.kv_type(KvType::Q8_0))
    };
    check_prompts(&q8(Precision::F32), Q8_CACHE);
    let both = q8(Precision::Int8);
    check_prompts(&both, INT8_LOGITS);
    check_hidden(&both, INT8_HIDDEN);
}

#[test]
fn an_eight_bit_cache_is_estimated_at_half_of_an_f16_one() {
    let cache = |kv_type| {
        let builder = Engine::builder().gguf(pip()).kv_type(kv_type);
        let estimate = builder.plan().unwrap().estimate().unwrap();
        estimate.host().kv
    };
    assert_eq!(cache(KvType::Q8_0) * 32, cache(KvType::F16) * 17);
}

#[test]
fn eight_bit_activations_stay_within_what_llama_cpp_was_measured_at() {
    let engine = engine(&pip(), Precision::Int8);
    check_prompts(&engine, INT8_LOGITS);
    check_hidden(&engine, INT8_HIDDEN);
}

#[test]
fn f32_activations_give_the_references_greedy_tokens() {
    let engine = engine(&pip(), Precision::F32);
    for case in cases(&goldens()) {
        let mut session = engine.session();
        let mut generation = session
            .generate(&tokens(&ids(&case["prompt_ids"])), &greedy())
            .unwrap();
        generation.by_ref().for_each(|piece| drop(piece.unwrap()));
        // The end token is in the golden and not in the text.
        let expected: Vec<u32> = ids(&case["greedy_ids"])
            .into_iter()
            .filter(|id| *id != 1)
            .collect();
        let found: Vec<u32> = generation.generated().iter().map(|t| t.0).collect();
        assert_eq!(found, expected, "{}", case["prompt"]);
    }
}

#[test]
fn eight_bit_activations_give_the_references_greedy_tokens_up_to_a_near_tie() {
    let engine = engine(&pip(), Precision::Int8);
    for case in cases(&goldens()) {
        let gaps = numbers(&case["top2_gaps"]);
        let clear = gaps.iter().position(|gap| *gap < 1.0).unwrap_or(gaps.len());
        let expected = ids(&case["greedy_ids"]);
        let mut session = engine.session();
        let mut logits = last_logits(&mut session, &ids(&case["prompt_ids"]));
        for id in &expected[..clear] {
            let best = (0..logits.len())
                .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
                .unwrap();
            assert_eq!(best as u32, *id, "{}", case["prompt"]);
            logits = forced_logits(&mut session, *id);
        }
    }
}

#[test]
fn all_golden_questions_are_answered_to_the_letter() {
    let engine = engine(&pip(), Precision::Int8);
    let questions = json("models/pip-17m-qa.json");
    let items = questions["items"].as_array().unwrap();
    assert_eq!(items.len(), 80);
    for item in items {
        let mut session = engine.session();
        let answer = session
            .chat(item["question"].as_str().unwrap(), &greedy())
            .unwrap()
            .text()
            .unwrap();
        assert_eq!(
            answer,
            item["answer"].as_str().unwrap(),
            "{}",
            item["question"]
        );
    }
}

/// Rules that only say whether prompts are absorbed.
fn absorbing(absorb: &str) -> Rules {
    Rules::Text {
        name: format!("absorb {absorb}"),
        text: format!(
            "- match: {{class: ktransformers.models.modeling_deepseek_v3.DeepseekV3Attention}}\n  replace:\n    \
             class: ktransformers.operators.attention.KDeepseekV2Attention\n    \
             kwargs: {{generate_device: cpu, prefill_device: cpu, absorb_for_prefill: {absorb}, chunck_size: 3}}\n"
        ),
    }
}

#[test]
fn absorbed_and_unabsorbed_attention_agree() {
    let goldens = goldens();
    let prompt = ids(&cases(&goldens)[2]["prompt_ids"]);
    let story = ids(&cases(&goldens)[2]["greedy_ids"]);
    let text: Vec<u32> = prompt.into_iter().chain(story).collect();
    let logits = |absorb| {
        let builder = Engine::builder()
            .gguf(pip())
            .precision(Precision::F32)
            .rules(absorbing(absorb));
        all_logits(&mut load(builder).session(), &text).concat()
    };
    let error = nmse(&logits("True"), &logits("False"));
    assert!(error < 1e-10, "NMSE {error:.2e}");
}

#[test]
fn prompts_in_chunks_of_any_size_agree_with_one_chunk_and_with_single_tokens() {
    let goldens = goldens();
    let case = &cases(&goldens)[2];
    let text: Vec<u32> = ids(&case["prompt_ids"])
        .into_iter()
        .chain(ids(&case["greedy_ids"]))
        .collect();
    let text = text.repeat(2);
    for precision in [Precision::F32, Precision::Int8] {
        let chunked = |size: usize| {
            let builder = Engine::builder()
                .gguf(pip())
                .precision(precision)
                .chunk_size(size);
            last_logits(&mut load(builder).session(), &text)
        };
        let whole = chunked(512);
        // With 8 bits, chunks can differ in which kernels they take, and so in rounding.
        let bound = if precision == Precision::F32 {
            1e-9
        } else {
            INT8_LOGITS
        };
        for size in [1, 7, 64] {
            let error = nmse(&chunked(size), &whole);
            assert!(
                error < bound,
                "{precision:?}, chunks of {size}: NMSE {error:.2e}"
            );
        }
        let engine = engine(&pip(), precision);
        let mut session = engine.session();
        let stepped = text
            .iter()
            .map(|id| forced_logits(&mut session, *id))
            .last()
            .unwrap();
        let error = nmse(&stepped, &whole);
        assert!(
            error < bound,
            "{precision:?}, token by token: NMSE {error:.2e}"
        );
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    let goldens = goldens();
    let prompt = ids(&cases(&goldens)[2]["prompt_ids"]);
    for precision in [Precision::Int8, Precision::F32] {
        let with = |threads| {
            let engine = load(
                Engine::builder()
                    .gguf(pip())
                    .precision(precision)
                    .threads(threads),
            );
            let mut session = engine.session();
            let mut logits = all_logits(&mut session, &prompt);
            logits.push(forced_logits(&mut session, 100));
            logits
        };
        let one = with(1);
        for threads in [2, 3, 5] {
            assert!(with(threads) == one, "{threads} threads");
        }
    }
}
