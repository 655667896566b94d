//! The operators that KTransformers' rule files and its documentation name: all are registered, and those with
//! arithmetic of their own compute what is documented.

use std::collections::BTreeSet;

use ktx_core::gguf::Gguf;
use ktx_core::kernels::linear::Precision;
use ktx_core::ops::{Needs, Role, registry};
use ktx_core::rules::RuleSet;
use ktx_core::{Engine, EngineBuilder, Rules};

use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{Recorder, json, last_logits, load, repository, tokens};

/// Every operator class of KTransformers v0.3.2, below `ktransformers.operators.`, with its role here.
const CLASSES: &[(Role, &[&str])] = &[
    (
        Role::Linear,
        &[
            "linear.KTransformersLinear",
            "linear.KLinearMarlin",
            "linear.VLinearMarlin",
            "linear.KLinearTorch",
            "linear.KLinearCPUInfer",
            "linear.KLinearFP8",
            "linear.KLinearQ8",
            "linear.KLinearIPEXLLM",
            "gate.KMoEGateQwen2Moe",
        ],
    ),
    (
        Role::Experts,
        &[
            "experts.KTransformersExperts",
            "experts.KTransformersExpertsV2",
            "experts.KExpertsCPU",
            "experts.KExpertsTorch",
            "experts.KExpertsMarlin",
        ],
    ),
    (
        Role::Ffn,
        &[
            "experts.KDeepseekV2MoE",
            "experts.KDeepseekV3MoE",
            "experts.KDeepseekV3MoEV2",
            "experts.KQwen2MoeSparseMoeBlock",
            "experts.KQwen2MoeSparseMoeBlockV2",
            "experts.KQwen3MoeSparseMoeBlockV2",
            "experts.KMistralSparseMoEBlock",
            "mlp.kDeepseekV3MLP",
            "mlp.KQwen2MoeMLP",
        ],
    ),
    (Role::Gate, &["gate.KMoEGate", "gate.KMoEGateIPEXLLM"]),
    (
        Role::Attention,
        &[
            "attention.KDeepseekV2Attention",
            "attention.KLlamaAttention",
            "attention.KQwen3MoeAttentionIPEXLLM",
            "balance_serve_attention.flashinfer_attn",
            "balance_serve_attention.deepseek_torch_attn",
            "balance_serve_attention.KQwen2MoeAttention",
            "balance_serve_attention.KQwen3MoeAttention",
        ],
    ),
    (
        Role::Rope,
        &[
            "RoPE.RotaryEmbedding",
            "RoPE.RotaryEmbeddingV2",
            "RoPE.RotaryEmbeddingV3",
            "RoPE.RotaryEmbeddingV4",
            "RoPE.YarnRotaryEmbedding",
            "RoPE.YarnRotaryEmbeddingV3",
            "RoPE.DynamicNTKScalingRotaryEmbedding",
            "RoPE.KQwen3MoeRotaryEmbedding",
        ],
    ),
    (
        Role::Norm,
        &[
            "layernorm.RMSNorm",
            "layernorm.KQwen2MoeRMSNorm",
            "layernorm.KQwen3MoeRMSNorm",
            "layernorm.DeepseekV3RMSNormTorch",
            "layernorm.KDeepseekRMSNormIPEXLLM",
        ],
    ),
    (
        Role::Model,
        &[
            "models.KDeepseekV2Model",
            "models.KQwen2MoeModel",
            "models.KLlamaModel",
        ],
    ),
];

#[test]
fn every_operator_of_ktransformers_is_registered_by_path_and_by_name() {
    for (role, names) in CLASSES {
        for name in *names {
            let path = format!("ktransformers.operators.{name}");
            let entry = registry()
                .get(&path)
                .unwrap_or_else(|| panic!("`{path}` is not registered"));
            assert_eq!(entry.role, *role, "{path}");
            let leaf = name.rsplit('.').next().unwrap();
            let by_name = registry()
                .get(leaf)
                .unwrap_or_else(|| panic!("`{leaf}` is not registered"));
            assert_eq!(by_name.class, entry.class, "{leaf}");
            let runs = entry.needs == Needs::Host;
            assert_eq!(
                runs,
                !name.ends_with("IPEXLLM"),
                "{path}: needs {}",
                entry.needs
            );
        }
    }
}

#[test]
fn the_list_holds_every_class_that_rule_files_name() {
    let listed: BTreeSet<String> = CLASSES
        .iter()
        .flat_map(|(_, names)| *names)
        .map(|name| format!("ktransformers.operators.{name}"))
        .collect();
    let mut seen = 0;
    for file in std::fs::read_dir(repository("ktx-core/tests/plans/rules")).unwrap() {
        let path = file.unwrap().path();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(
            RuleSet::parse(&text, "r.yaml").is_ok(),
            "{}",
            path.display()
        );
        for word in text.split(|c: char| !(c.is_alphanumeric() || c == '.' || c == '_')) {
            if word.starts_with("ktransformers.operators.") {
                assert!(listed.contains(word), "{} names `{word}`", path.display());
                seen += 1;
            }
        }
    }
    assert!(seen > 100, "{seen} names");
}

fn model(name: &str) -> Gguf {
    Gguf::open(repository(&format!(
        "tests/fixtures/transformers/{name}.gguf"
    )))
    .unwrap()
}

fn with_rule(model: &Gguf, pattern: &str, class: &str, kwargs: &str) -> EngineBuilder {
    let text = format!(
        "- match: {{name: \"{pattern}\"}}\n  replace:\n    class: {class}\n    \
         kwargs: {{generate_device: cpu, prefill_device: cpu{kwargs}}}\n"
    );
    Engine::builder()
        .gguf(model.clone())
        .precision(Precision::F32)
        .rules(Rules::Text {
            text,
            name: "one rule".to_owned(),
        })
}

/// `y_r = sum_k q_rk s_k x_k`, `s_k = max_r |w_rk| / 127`, `q_rk = round(w_rk / s_k)`, in double precision but for
/// the quotient, whose rounding is defined in single precision.
fn by_column(weight: &[f32], x: &[f32]) -> Vec<f64> {
    let cols = x.len();
    let scale = |col: usize| {
        let most = weight
            .iter()
            .skip(col)
            .step_by(cols)
            .fold(0f32, |m, w| m.max(w.abs()));
        if most == 0.0 { 1.0 } else { most / 127.0 }
    };
    let scales: Vec<f32> = (0..cols).map(scale).collect();
    let product = |row: &[f32]| {
        let terms = row.iter().zip(&scales).zip(x);
        terms
            .map(|((w, s), x)| f64::from((w / s).round_ties_even()) * f64::from(*s) * f64::from(*x))
            .sum()
    };
    weight.chunks(cols).map(product).collect()
}

#[test]
fn q8_weights_have_a_scale_for_each_column() {
    let model = model("qwen2");
    for (class, kwargs) in [
        ("ktransformers.operators.linear.KLinearQ8", ""),
        (
            "ktransformers.operators.linear.KTransformersLinear",
            ", generate_op: KLinearQ8, prefill_op: KLinearQ8",
        ),
    ] {
        let planned = with_rule(&model, "^lm_head$", class, kwargs)
            .plan()
            .unwrap();
        let said = planned.report().to_string();
        assert!(
            said.contains("KLinearQ8` changes the weights' values: weights are rounded to 8 bits"),
            "{said}"
        );
        let engine = load(with_rule(&model, "^lm_head$", class, kwargs));
        let mut seen = Recorder::default();
        let mut logits = Vec::new();
        engine
            .session()
            .observe(&tokens(&[0, 75, 104, 111]), &mut seen, &mut |row| {
                logits = row.to_vec()
            })
            .unwrap();
        let weight = model.tensor("output.weight").unwrap().to_f32();
        let expected = by_column(&weight, seen.last("model", "final_norm"));
        let error = nmse(
            &logits.iter().copied().map(f64::from).collect::<Vec<_>>(),
            &expected,
        );
        assert!(error < 1e-11, "{class}: NMSE {error:.2e}");
    }
    let entry = registry().get("KLinearQ8").unwrap();
    assert!(entry.lossy.is_some_and(|how| how.contains("8 bits")));
}

#[test]
fn q8_layers_stay_close_to_the_exact_ones() {
    let goldens = json("tests/fixtures/transformers/goldens.json");
    let case = goldens["cases"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["model"] == "qwen2.gguf")
        .unwrap();
    let builder = with_rule(&model("qwen2"), "_proj$", "KLinearQ8", "");
    let engine = load(builder);
    let prompts = goldens["prompts"].as_array().unwrap();
    for (prompt, logits) in prompts.iter().zip(case["logits"].as_array().unwrap()) {
        let error = nmse(
            &last_logits(&mut engine.session(), &ids(prompt)),
            &numbers(logits),
        );
        assert!(error > 1e-9 && error < 1e-2, "NMSE {error:.2e}");
    }
}

#[test]
fn the_router_of_qwen2_can_be_an_operator() {
    let goldens = json("tests/fixtures/transformers/goldens.json");
    let case = goldens["cases"]
        .as_array()
        .unwrap()
        .iter()
        .find(|c| c["model"] == "qwen2moe.gguf")
        .unwrap();
    let class = "ktransformers.operators.gate.KMoEGateQwen2Moe";
    let engine = load(with_rule(
        &model("qwen2moe"),
        "mlp.gate$",
        class,
        ", use_quant: False",
    ));
    assert_eq!(
        engine
            .report()
            .modules
            .iter()
            .filter(|m| m.class == class)
            .count(),
        2
    );
    let prompts = goldens["prompts"].as_array().unwrap();
    for (prompt, logits) in prompts.iter().zip(case["logits"].as_array().unwrap()) {
        let error = nmse(
            &last_logits(&mut engine.session(), &ids(prompt)),
            &numbers(logits),
        );
        assert!(error < 1e-9, "NMSE {error:.2e}");
    }
}
