//! FP8 weights in safetensors files beside a GGUF file: KTransformers' rule file for them against transformers' logits
//! (`scripts/fp8_goldens.py`), and what is said of files that do not fit.

use std::path::{Path, PathBuf};

use ktx_core::gguf::{Gguf, GgufWriter, Safetensors};
use ktx_core::kernels::linear::Precision;
use ktx_core::{DeviceMapping, Engine, EngineBuilder, Rules};

use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{json, last_logits, load, repository};

const RULES: &str = "ktx-core/tests/plans/rules/DeepSeek-V3-Chat-fp8-linear-ggml-experts.yaml";
const DIRECTORY: &str = "tests/fixtures/fp8";

fn with_rules(rules: Rules) -> EngineBuilder {
    Engine::builder()
        .rules(rules)
        .default_device("cuda:0")
        .precision(Precision::F32)
        .devices(DeviceMapping::AllOnCpu)
}

fn builder() -> EngineBuilder {
    with_rules(Rules::File(repository(RULES)))
}

fn gguf() -> PathBuf {
    repository(&format!("{DIRECTORY}/model.gguf"))
}

fn checkpoint() -> PathBuf {
    repository(&format!("{DIRECTORY}/model.safetensors"))
}

/// An error of a builder that cannot load.
fn error(builder: EngineBuilder) -> String {
    builder
        .load()
        .map(drop)
        .expect_err("it cannot be loaded")
        .to_string()
}

fn check(engine: &Engine, bound: f64) {
    let goldens = json(&format!("{DIRECTORY}/goldens.json"));
    let prompts = goldens["prompts"].as_array().unwrap();
    for (prompt, logits) in prompts.iter().zip(goldens["logits"].as_array().unwrap()) {
        let found = last_logits(&mut engine.session(), &ids(prompt));
        let error = nmse(&found, &numbers(logits));
        assert!(error < bound, "NMSE {error:.2e}");
    }
}

/// A safetensors file of these tensors: name, type, shape, bytes.
fn safetensors(path: &Path, tensors: &[(&str, &str, Vec<usize>, Vec<u8>)]) {
    let mut entries = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        let start = data.len();
        data.extend_from_slice(bytes);
        let offsets = [start, data.len()];
        let entry = serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        entries.insert((*name).to_owned(), entry);
    }
    let header = serde_json::Value::from(entries).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(&data);
    std::fs::write(path, file).unwrap();
}

fn scratch(name: &str) -> PathBuf {
    let path = std::env::temp_dir().join(format!("ktx-fp8-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

#[test]
fn the_fp8_rule_file_runs_and_gives_the_logits_of_transformers() {
    let engine = load(builder().model(repository(DIRECTORY)));
    let fp8 = "ktransformers.operators.linear.KTransformersLinear";
    let linears = engine
        .report()
        .modules
        .iter()
        .filter(|m| m.class == fp8 && m.by_rule);
    assert_eq!(linears.count(), 14);
    check(&engine, 1e-9);
    check(
        &load(builder().model(gguf()).safetensors(checkpoint())),
        1e-9,
    );
    check(
        &load(
            builder()
                .model(gguf())
                .safetensors(checkpoint())
                .precision(Precision::Int8),
        ),
        1e-2,
    );
}

#[test]
fn every_linear_operator_multiplies_fp8_weights() {
    for op in [
        "KLinearFP8",
        "KLinearTorch",
        "KLinearMarlin",
        "KLinearCPUInfer",
    ] {
        let text = format!(
            "- match: {{class: torch.nn.Linear, name: self_attn|shared_experts}}\n  replace:\n    \
             class: ktransformers.operators.linear.{op}\n    \
             kwargs: {{generate_device: cpu, prefill_device: cpu}}\n"
        );
        let rules = Rules::Text {
            name: op.to_owned(),
            text,
        };
        check(&load(with_rules(rules).model(repository(DIRECTORY))), 1e-9);
    }
    let absorbed = "- match: {name: \"self_attn$\"}\n  replace:\n    \
                    class: ktransformers.operators.attention.KDeepseekV2Attention\n    \
                    kwargs: {generate_device: cpu, prefill_device: cpu, absorb_for_prefill: True}\n";
    let rules = Rules::Text {
        name: "absorbed".to_owned(),
        text: absorbed.to_owned(),
    };
    check(&load(with_rules(rules).model(repository(DIRECTORY))), 1e-9);
}

#[test]
fn the_plan_counts_bytes_and_types_of_both_files() {
    let planned = builder().model(repository(DIRECTORY)).plan().unwrap();
    let weights = planned.module_weights().unwrap();
    let of = |path: &str| weights.iter().find(|w| w.path == path).unwrap();
    let q_a = of("model.layers.0.self_attn.q_a_proj");
    assert_eq!(
        (q_a.types.as_slice(), q_a.bytes),
        (&["F8_E4M3"][..], 136 * 160 + 4 * 4)
    );
    assert!(planned.weights().is_beside(&q_a.tensors[0].0));
    let experts = of("model.layers.1.mlp.experts");
    assert_eq!(experts.types, ["Q8_0"]);
    assert!(!planned.weights().is_beside(&experts.tensors[0].0));
    assert_eq!(of("model.embed_tokens").types, ["BF16"]);
    let all: u64 = weights.iter().map(|w| w.bytes).sum();
    let estimate = planned.estimate().unwrap();
    // Beside the files' bytes: the key part of both `kv_b_proj` turned around, in f32, and the norms.
    let turned = 2 * (4 * 16 * 64) * 4;
    let made = estimate.host().weights - all;
    assert!((turned..turned + 8192).contains(&made), "{made}");
    assert!(all < planned.weights().file_size());
}

/// As KTransformers' script merges the two: GGUF names, and experts as plain bytes with their type's number.
#[test]
fn experts_that_were_merged_into_safetensors_are_read_as_gguf_blocks() {
    let (model, set) = (
        Gguf::open(gguf()).unwrap(),
        Safetensors::open(checkpoint()).unwrap(),
    );
    let directory = scratch("merged");
    let mut tensors = Vec::new();
    for entry in set.tensors() {
        let name = ktx_core::ops::key::gguf_tensor(&entry.name);
        tensors.push((
            name,
            entry.dtype.name(),
            entry.shape.clone(),
            set.bytes(entry).to_vec(),
        ));
    }
    for info in model.tensors() {
        let bytes = model.tensor(&info.name).unwrap().bytes().to_vec();
        tensors.push((info.name.clone(), "U8", vec![bytes.len()], bytes));
        let number = u64::from(info.ty.id()).to_le_bytes().to_vec();
        tensors.push((
            info.name.replace(".weight", ".ggml_type"),
            "I64",
            vec![],
            number,
        ));
    }
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(n, t, s, b)| (n.as_str(), *t, s.clone(), b.clone()))
        .collect();
    safetensors(&directory.join("model.safetensors"), &tensors);
    let mut metadata = GgufWriter::new();
    for (key, value) in model.metadata().iter() {
        metadata.kv(key, value.clone());
    }
    std::fs::write(directory.join("model.gguf"), metadata.to_bytes()).unwrap();
    let planned = builder().model(&directory).plan().unwrap();
    assert!(planned.weights().is_beside("blk.1.ffn_gate_exps.weight"));
    check(&load(builder().model(&directory)), 1e-9);
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn a_model_without_fp8_weights_says_so_with_the_rules_line() {
    let model = repository("tests/fixtures/transformers/deepseek_v3.gguf");
    let planned = builder().model(&model).plan().unwrap();
    let text = planned.report().to_string();
    assert!(text.contains("fp8-linear-ggml-experts.yaml:16:"), "{text}");
    assert!(
        text.contains("KLinearFP8` cannot take the place of `model.layers.0.self_attn.q_a_proj`"),
        "{text}"
    );
    assert!(
        text.contains("needs an FP8 tensor") && text.contains("`blk.0.attn_q_a.weight` is F16"),
        "{text}"
    );
    assert_eq!(planned.report().errors.len(), 1, "{text}");
    assert!(error(builder().model(&model)).contains("needs an FP8 tensor"));
}

#[test]
fn a_yarn_operator_on_a_model_without_yarn_is_refused_at_plan_time() {
    let model = repository("tests/fixtures/transformers/moonlight.gguf");
    let rules = Rules::File(repository(
        "ktx-core/tests/plans/rules/DeepSeek-V3-Chat.yaml",
    ));
    let planned = with_rules(rules).model(&model).plan().unwrap();
    let text = planned.report().to_string();
    assert!(
        text.contains(
            "YarnRotaryEmbeddingV3` cannot take the place of `model.layers.0.self_attn.rotary_emb`"
        ),
        "{text}"
    );
    assert!(
        text.contains("DeepSeek-V3-Chat.yaml:") && text.contains("rope.scaling.type"),
        "{text}"
    );
}

#[test]
fn safetensors_that_do_not_fit_the_model_are_refused_by_name() {
    let directory = scratch("unfit");
    let file = directory.join("odd.safetensors");
    let beside = |model: &str| {
        let model = repository(&format!("tests/fixtures/transformers/{model}.gguf"));
        error(Engine::builder().model(model).safetensors(&file))
    };
    safetensors(&file, &[("something.weight", "F32", vec![1], vec![0; 4])]);
    let said = beside("llama");
    assert!(
        said.contains("odd.safetensors: none of its 1 tensors is one of this model's"),
        "{said}"
    );
    safetensors(
        &file,
        &[(
            "model.layers.0.self_attn.q_proj.weight",
            "F16",
            vec![64, 64],
            vec![0; 8192],
        )],
    );
    let said = beside("llama");
    assert!(
        said.contains(
            "`model.layers.0.self_attn.q_proj.weight`: GGUF files of the architecture llama"
        ),
        "{said}"
    );
    safetensors(
        &file,
        &[(
            "model.layers.0.self_attn.v_proj.weight",
            "F8_E4M3",
            vec![32, 64],
            vec![0; 2048],
        )],
    );
    let said = beside("qwen3");
    assert!(
        said.contains("v_proj.weight` is F8_E4M3 and has no block scales"),
        "{said}"
    );
    safetensors(
        &file,
        &[(
            "model.layers.0.self_attn.v_proj.weight",
            "BF16",
            vec![32, 32],
            vec![0; 2048],
        )],
    );
    let said = beside("qwen3");
    assert!(
        said.contains("`model.layers.0.self_attn.v_proj.weight` is [32, 32]"),
        "{said}"
    );
    let two = [
        ("model.norm.weight", "F32", vec![64], vec![0; 256]),
        ("output_norm.weight", "F32", vec![64], vec![0; 256]),
    ];
    safetensors(&file, &two);
    let said = beside("qwen3");
    assert!(said.contains("is the same as `"), "{said}");
    std::fs::remove_file(directory.join("odd.safetensors")).unwrap();
    let said = error(Engine::builder().model(&directory));
    assert!(said.contains("no GGUF file in it"), "{said}");
    std::fs::copy(checkpoint(), directory.join("model.safetensors")).unwrap();
    let said = error(Engine::builder().model(&directory));
    assert!(
        said.contains("put one of the same model beside them"),
        "{said}"
    );
    std::fs::remove_dir_all(directory).unwrap();
}
