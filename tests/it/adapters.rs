//! Adapters on tiny models against peft's fp32 logits (`tests/fixtures/README.md`).

use ktx_core::gguf::{GgmlType, Gguf, GgufWriter};
use ktx_core::kernels::linear::Precision;
use ktx_core::ops::lora::{Adapter, AdapterFile};
use ktx_core::{AdapterId, Engine, Rules, Session};

use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{forced_logits, json, last_logits, load, repository};

fn base(name: &str) -> Gguf {
    Gguf::open(repository(&format!("tests/fixtures/transformers/{name}"))).unwrap()
}

fn adapter(name: &str) -> std::path::PathBuf {
    repository(&format!("tests/fixtures/adapters/{name}"))
}

fn exact(name: &str, rules: Rules) -> Engine {
    load(
        Engine::builder()
            .gguf(base(name))
            .rules(rules)
            .precision(Precision::F32)
            .threads(2),
    )
}

fn text(rules: &str) -> Rules {
    Rules::Text {
        text: rules.to_owned(),
        name: "test".to_owned(),
    }
}

/// Logits of a prompt's last position: the prompt in one piece, and its last token in a step of its own.
fn both_phases(session: &mut Session, prompt: &[u32]) -> [Vec<f64>; 2] {
    session.clear();
    let whole = last_logits(session, prompt);
    session.clear();
    let (last, before) = prompt.split_last().unwrap();
    last_logits(session, before);
    [whole, forced_logits(session, *last)]
}

/// Checks all cases of a base with adapters whose files are called as `file` says.
fn check(wanted: &str, file: &dyn Fn(&str) -> String) {
    check_with(wanted, Rules::Preset, file);
}

fn check_with(wanted: &str, rules: Rules, file: &dyn Fn(&str) -> String) {
    let goldens = json("tests/fixtures/adapters/goldens.json");
    let prompts: Vec<Vec<u32>> = goldens["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .map(ids)
        .collect();
    let engine = exact(wanted, rules);
    let plain: Vec<_> = prompts
        .iter()
        .map(|p| both_phases(&mut engine.session(), p))
        .collect();
    let mut session = engine.session();
    let cases = goldens["cases"].as_array().unwrap().iter();
    for case in cases.filter(|c| c["base"] == wanted) {
        let mut chosen: Vec<(AdapterId, f32)> = Vec::new();
        for named in case["adapters"].as_array().unwrap() {
            let path = adapter(&file(named[0].as_str().unwrap()));
            let loaded = engine.load_adapter(path).unwrap_or_else(|e| panic!("{e}"));
            chosen.push((loaded.id(), named[1].as_f64().unwrap() as f32));
        }
        session.set_adapters(&chosen).unwrap();
        for (prompt, logits) in prompts.iter().zip(case["logits"].as_array().unwrap()) {
            for found in both_phases(&mut session, prompt) {
                let error = nmse(&found, &numbers(logits));
                assert!(error < 1e-9, "{}: NMSE {error:.2e}", case["adapters"]);
            }
        }
        session.set_adapters(&[]).unwrap();
        for (prompt, plain) in prompts.iter().zip(&plain) {
            assert_eq!(
                &both_phases(&mut session, prompt),
                plain,
                "switched off, the base is as it was"
            );
        }
    }
}

#[test]
fn peft_adapters_of_llama_give_the_logits_of_peft() {
    check("llama.gguf", &str::to_owned);
}

#[test]
fn gguf_adapters_of_llama_give_the_logits_of_peft() {
    check("llama.gguf", &|name| format!("{name}.gguf"));
}

#[test]
fn peft_adapters_reach_latent_attention_in_both_forms_and_the_experts() {
    check("deepseek_v3.gguf", &str::to_owned);
    check("deepseek_v3_joined.gguf", &str::to_owned);
}

#[test]
fn gguf_adapters_reach_latent_attention_in_both_forms_and_the_experts() {
    check("deepseek_v3.gguf", &|name| format!("{name}.gguf"));
    check("deepseek_v3_joined.gguf", &|name| format!("{name}.gguf"));
}

#[test]
fn peft_adapters_of_experts_give_the_logits_of_peft() {
    check("qwen3moe.gguf", &str::to_owned);
}

#[test]
fn gguf_adapters_of_experts_give_the_logits_of_peft() {
    check("qwen3moe.gguf", &|name| format!("{name}.gguf"));
}

#[test]
fn adapters_with_a_name_for_each_expert_give_the_logits_of_peft() {
    check("qwen3moe.gguf", &|name| match name {
        "qwen3moe_experts" => format!("{name}_separate"),
        other => other.to_owned(),
    });
}

#[test]
fn experts_that_are_operators_of_their_own_are_adapted_too() {
    check_with("qwen3moe.gguf", text("[]"), &|name| format!("{name}.gguf"));
}

#[test]
fn a_rule_can_place_an_adapter_that_always_applies() {
    let goldens = json("tests/fixtures/adapters/goldens.json");
    let path = adapter("llama_all");
    let rules = format!(
        "- match:\n    name: '_proj$'\n  replace:\n    class: KLinearLora\n    kwargs:\n      generate_device: cpu\n      prefill_device: cpu\n      op: KLinearTorch\n      path: {}\n",
        path.display()
    );
    let engine = exact("llama.gguf", text(&rules));
    let case = &goldens["cases"][0];
    assert_eq!(case["adapters"][0][0], "llama_all");
    for (prompt, logits) in goldens["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .zip(case["logits"].as_array().unwrap())
    {
        for found in both_phases(&mut engine.session(), &ids(prompt)) {
            let error = nmse(&found, &numbers(logits));
            assert!(error < 1e-9, "NMSE {error:.2e}");
        }
    }
    let report = engine.report();
    let q = report
        .modules
        .iter()
        .find(|m| m.path.ends_with("q_proj"))
        .unwrap();
    assert_eq!(q.class, "ktx.linear.KLinearLora");
}

#[test]
fn a_session_keeps_its_text_when_it_changes_its_adapters() {
    let engine = load(
        Engine::builder()
            .gguf(base("deepseek_v3.gguf"))
            .precision(Precision::F32)
            .threads(2)
            .lora(adapter("deepseek_v3_all"), 1.0),
    );
    let named = engine.adapters().unwrap();
    let id = named[0].id();
    assert_eq!(
        engine.session().adapters()[0].id,
        id,
        "it applies from the beginning"
    );
    let prompt = [0, 75, 104, 111, 111, 114];
    let mut session = engine.session();
    last_logits(&mut session, &prompt);
    session.set_adapters(&[]).unwrap();
    assert_eq!(session.tokens().len(), prompt.len());
    let switched = forced_logits(&mut session, 35);
    let mut plain = engine.session();
    plain.set_adapters(&[]).unwrap();
    last_logits(&mut plain, &prompt);
    let expected = forced_logits(&mut plain, 35);
    assert!(nmse(&switched, &expected) < 1e-12);

    let experts = engine
        .report()
        .modules
        .iter()
        .filter(|m| !m.adapters.is_empty());
    let adapted: Vec<&str> = experts.map(|m| m.path.as_str()).collect();
    assert!(
        adapted.contains(&"model.layers.1.mlp.experts"),
        "{adapted:?}"
    );
    assert!(
        adapted.contains(&"model.layers.0.self_attn.kv_b_proj"),
        "{adapted:?}"
    );
    engine.unload_adapter(id).unwrap();
    session.set_adapters(&[(id, 1.0)]).unwrap_err();
    assert!(
        forced_logits(&mut session, 35)
            .iter()
            .all(|v| v.is_finite())
    );
}

#[test]
fn a_session_whose_adapter_was_unloaded_says_so() {
    let engine = exact("llama.gguf", Rules::Preset);
    let id = engine
        .load_adapter(adapter("llama_ends.gguf"))
        .unwrap()
        .id();
    let mut session = engine.session();
    session.set_adapters(&[(id, f32::NAN)]).unwrap_err();
    session.set_adapters(&[(id, 1.0)]).unwrap();
    engine.unload_adapter(id).unwrap();
    let error = session
        .force(ktx_core::TokenId(1), &mut |_| {})
        .unwrap_err();
    assert!(error.to_string().contains("was unloaded"), "{error}");
    session.set_adapters(&[]).unwrap();
    forced_logits(&mut session, 1);
}

/// Name, shape, and what all values are.
type Filled<'a> = (&'a str, &'a [usize], f32);

/// What is said to an adapter of `llama.gguf` with these tensors.
fn refused(tensors: &[Filled<'_>]) -> String {
    let mut writer = GgufWriter::new();
    writer
        .kv("general.type", "adapter")
        .kv("general.architecture", "llama")
        .kv("adapter.type", "lora")
        .kv("adapter.lora.alpha", 8.0_f32);
    for (name, shape, value) in tensors {
        let count: usize = shape.iter().product();
        let bytes: Vec<u8> = (0..count).flat_map(|_| value.to_le_bytes()).collect();
        writer.tensor(name, GgmlType::F32, shape, bytes).unwrap();
    }
    let directory = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("adapters");
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("refused.gguf");
    writer.write(&path).unwrap();
    let tree = ktx_core::models::describe(&base("llama.gguf"))
        .unwrap()
        .tree;
    AdapterFile::open(&path)
        .and_then(|file| Adapter::on_tree(&file, &tree, "llama"))
        .unwrap_err()
        .to_string()
}

#[test]
fn adapters_that_do_not_fit_are_refused_with_tensor_and_module() {
    let (a, b) = ("blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b");
    let cases: [(&[Filled<'_>], &[&str]); 7] = [
        (&[], &["no low-rank matrices"]),
        (&[(a, &[64, 4], 0.1)], &[a, "has no", b, "incomplete"]),
        (
            &[(a, &[64, 4], 0.1), (b, &[4, 63], 0.1)],
            &[b, "model.layers.0.self_attn.q_proj", "[rank, 64]"],
        ),
        (
            &[(a, &[32, 4], 0.1), (b, &[4, 64], 0.1)],
            &[a, "model.layers.0.self_attn.q_proj", "[64, 4]"],
        ),
        (
            &[(a, &[64, 4], f32::NAN), (b, &[4, 64], 0.1)],
            &[a, "no numbers"],
        ),
        (
            &[
                ("blk.0.attn_qq.weight.lora_a", &[64, 4], 0.1),
                ("blk.0.attn_qq.weight.lora_b", &[4, 64], 0.1),
            ],
            &["no module", "blk.0.attn_qq", "`blk.0.attn_q.weight`"],
        ),
        (
            &[("blk.0.attn_norm.weight", &[64], 0.1)],
            &["attn_norm", "merged into the base"],
        ),
    ];
    for (tensors, parts) in cases {
        let said = refused(tensors);
        for part in parts {
            assert!(said.contains(part), "`{part}` is missing in: {said}");
        }
    }
}
