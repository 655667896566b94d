//! The list of tiny models: one per feature, and one per tensor type.

use ktx_gguf::GgmlType;

use super::spec::{
    Architecture, ExpertLayout, ExpertSpec, KvLayout, LatentSpec, RopeScaling, TinySpec, Types,
};

/// Types whose rows are multiples of 32 or less; models of hidden size 96.
const NARROW_TYPES: [(&str, GgmlType); 10] = [
    ("llama_f32", GgmlType::F32),
    ("llama_f16", GgmlType::F16),
    ("llama_bf16", GgmlType::BF16),
    ("llama_q8_0", GgmlType::Q8_0),
    ("llama_q4_0", GgmlType::Q4_0),
    ("llama_q4_1", GgmlType::Q4_1),
    ("llama_q5_0", GgmlType::Q5_0),
    ("llama_q5_1", GgmlType::Q5_1),
    ("llama_iq4_nl", GgmlType::IQ4_NL),
    ("llama_mxfp4", GgmlType::MXFP4),
];

/// Types whose rows are multiples of 256; models of hidden size 256.
const WIDE_TYPES: [(&str, GgmlType); 14] = [
    ("llama_q2_k", GgmlType::Q2_K),
    ("llama_q3_k", GgmlType::Q3_K),
    ("llama_q4_k", GgmlType::Q4_K),
    ("llama_q5_k", GgmlType::Q5_K),
    ("llama_q6_k", GgmlType::Q6_K),
    ("llama_iq4_xs", GgmlType::IQ4_XS),
    ("llama_iq3_s", GgmlType::IQ3_S),
    ("llama_iq3_xxs", GgmlType::IQ3_XXS),
    ("llama_iq2_s", GgmlType::IQ2_S),
    ("llama_iq2_xs", GgmlType::IQ2_XS),
    ("llama_iq2_xxs", GgmlType::IQ2_XXS),
    ("llama_iq1_s", GgmlType::IQ1_S),
    ("llama_tq1_0", GgmlType::TQ1_0),
    ("llama_tq2_0", GgmlType::TQ2_0),
];

/// Seeds of the models with routers, found by trying: no decision on the prompt is close.
const SEEDS: [(&str, u64); 29] = [
    ("mixtral_merged", 51),
    ("mixtral_per_expert", 135),
    ("mixtral_mixed_k", 57),
    ("deepseek_v3_split", 3),
    ("deepseek_v3_joined", 1),
    ("deepseek_v3_no_q_lora", 9),
    ("deepseek_v3_no_yarn", 9),
    ("deepseek_v3_unequal_heads", 4),
    ("deepseek_v3_unequal_heads_joined", 8),
    ("deepseek_v3_q8_0", 3),
    ("deepseek_v3_mixed_k", 3),
    ("moonlight", 2),
    ("deepseek_v2", 5),
    ("deepseek_v2_lite", 15),
    ("deepseek_gate_softmax_normalised", 32),
    ("deepseek_gate_sigmoid_scaled_only", 3),
    ("deepseek_gate_no_bias", 34),
    ("deepseek_gate_no_groups", 15),
    ("deepseek_gate_groups_of_three", 10),
    ("deepseek_five_experts", 2),
    ("deepseek_per_expert_tensors", 2),
    ("deepseek_two_dense_layers", 11),
    ("deepseek_no_dense_layer", 26),
    ("deepseek_no_shared_expert", 2),
    ("qwen2moe", 115),
    ("qwen2moe_mixed_k", 24),
    ("qwen3moe", 108),
    ("qwen3moe_yarn", 133),
    ("qwen3moe_mixed_k", 81),
];

/// Every tiny model, by name.
pub fn all() -> Vec<(&'static str, TinySpec)> {
    let mut models = Vec::new();
    for (name, ty) in NARROW_TYPES {
        models.push((
            name,
            TinySpec {
                types: Types::all(ty),
                ..llama()
            },
        ));
    }
    for (name, ty) in WIDE_TYPES {
        models.push((
            name,
            TinySpec {
                types: Types::all(ty),
                ..wide(llama())
            },
        ));
    }
    models.extend(llama_models());
    models.extend(mixtral_models());
    models.extend(deepseek_models());
    models.extend(deepseek_gate_models());
    models.extend(qwen_models());
    for (name, spec) in &mut models {
        if let Some((_, seed)) = SEEDS.iter().find(|(seeded, _)| seeded == name) {
            spec.seed = *seed;
        }
    }
    models
}

/// Hidden size 96, six heads on two.
fn llama() -> TinySpec {
    TinySpec {
        architecture: Architecture::Llama,
        seed: 1,
        layers: 2,
        hidden: 96,
        heads: 6,
        kv_heads: 2,
        head_dim: 16,
        ffn: 352,
        epsilon: 1e-5,
        context: 512,
        rope_base: 10000.0,
        rope_scaling: RopeScaling::None,
        tied: false,
        attention_bias: false,
        extra_vocabulary: 0,
        latent: None,
        experts: None,
        types: Types::all(GgmlType::F32),
    }
}

/// The same model with rows of 256 and 512 elements, for K-quants.
fn wide(spec: TinySpec) -> TinySpec {
    TinySpec {
        hidden: 256,
        heads: 8,
        head_dim: 32,
        ffn: 512,
        ..spec
    }
}

/// Types as in a Q4_K_M file.
const MIXED: Types = Types {
    embedding: GgmlType::Q4_K,
    attention: GgmlType::Q4_K,
    gate_up: GgmlType::Q4_K,
    down: GgmlType::Q6_K,
    output: GgmlType::Q6_K,
};

fn llama_models() -> Vec<(&'static str, TinySpec)> {
    let one_head_per_head = TinySpec {
        heads: 3,
        kv_heads: 3,
        head_dim: 32,
        ..llama()
    };
    let heads_of_80 = TinySpec {
        hidden: 160,
        heads: 3,
        kv_heads: 1,
        head_dim: 80,
        types: Types::all(GgmlType::Q8_0),
        ..llama()
    };
    let divisors = TinySpec {
        rope_scaling: RopeScaling::Divisors,
        rope_base: 500_000.0,
        ..llama()
    };
    let linear = RopeScaling::Linear { factor: 4.0 };
    vec![
        (
            "llama_mixed_k",
            TinySpec {
                types: MIXED,
                ..wide(llama())
            },
        ),
        ("llama_no_grouping", one_head_per_head),
        ("llama_heads_of_80", heads_of_80),
        (
            "llama_tied",
            TinySpec {
                tied: true,
                ..llama()
            },
        ),
        ("llama_rope_divisors", divisors),
        (
            "llama_rope_linear",
            TinySpec {
                rope_scaling: linear,
                ..llama()
            },
        ),
        (
            "llama_attention_bias",
            TinySpec {
                attention_bias: true,
                ..llama()
            },
        ),
        (
            "llama_extra_vocabulary",
            TinySpec {
                extra_vocabulary: 4,
                ..llama()
            },
        ),
    ]
}

/// Five experts of which two are used, nothing but their number in the file.
fn experts() -> ExpertSpec {
    ExpertSpec {
        count: 5,
        top_k: 2,
        ffn: 352,
        layout: ExpertLayout::Merged,
        shared_ffn: 0,
        leading_dense: 0,
        gating: None,
        norm: None,
        scale: None,
        groups: None,
        bias: false,
    }
}

fn mixtral_models() -> Vec<(&'static str, TinySpec)> {
    let merged = TinySpec {
        experts: Some(experts()),
        types: Types::all(GgmlType::Q8_0),
        ..llama()
    };
    let per_expert = ExpertSpec {
        layout: ExpertLayout::PerExpert,
        top_k: 3,
        ..experts()
    };
    let per_expert = TinySpec {
        experts: Some(per_expert),
        types: Types::all(GgmlType::Q4_0),
        ..llama()
    };
    let mixed = ExpertSpec {
        ffn: 512,
        ..experts()
    };
    let mixed = TinySpec {
        experts: Some(mixed),
        types: MIXED,
        ..wide(llama())
    };
    vec![
        ("mixtral_merged", merged),
        ("mixtral_per_expert", per_expert),
        ("mixtral_mixed_k", mixed),
    ]
}

/// As DeepSeek-V3 has it, in small: one dense layer, sigmoid with bias and groups, YaRN.
fn deepseek() -> TinySpec {
    let latent = LatentSpec {
        q_lora: Some(64),
        kv_lora: 96,
        nope: 32,
        rope: 16,
        value: 32,
        layout: KvLayout::Split,
    };
    let experts = ExpertSpec {
        count: 8,
        top_k: 3,
        ffn: 64,
        shared_ffn: 64,
        leading_dense: 1,
        gating: Some(2),
        norm: Some(true),
        scale: Some(2.5),
        groups: Some((4, 2)),
        bias: true,
        ..self::experts()
    };
    TinySpec {
        architecture: Architecture::DeepSeek2,
        layers: 3,
        hidden: 128,
        heads: 3,
        epsilon: 1e-6,
        rope_scaling: yarn(0.1),
        latent: Some(latent),
        experts: Some(experts),
        ..llama()
    }
}

fn yarn(log_multiplier: f32) -> RopeScaling {
    RopeScaling::Yarn {
        factor: 40.0,
        original_context: 64,
        log_multiplier: Some(log_multiplier),
    }
}

/// `deepseek()` with other attention.
fn with_latent(change: impl FnOnce(&mut LatentSpec)) -> TinySpec {
    let mut spec = deepseek();
    change(spec.latent.as_mut().expect("DeepSeek's attention"));
    spec
}

/// `deepseek()` with other experts.
fn with_experts(change: impl FnOnce(&mut ExpertSpec)) -> TinySpec {
    let mut spec = deepseek();
    change(spec.experts.as_mut().expect("DeepSeek's experts"));
    spec
}

fn deepseek_models() -> Vec<(&'static str, TinySpec)> {
    let no_q_lora = with_latent(|latent| latent.q_lora = None);
    let unequal = with_latent(|latent| {
        (latent.nope, latent.rope, latent.value) = (48, 8, 24);
    });
    let unequal_joined = with_latent(|latent| {
        (latent.nope, latent.rope, latent.value) = (24, 16, 40);
        latent.layout = KvLayout::Joined;
    });
    let mut wide = with_latent(|latent| (latent.q_lora, latent.kv_lora) = (Some(256), 256));
    wide.hidden = 256;
    wide.ffn = 512;
    wide.types = MIXED;
    let experts = wide.experts.as_mut().expect("DeepSeek's experts");
    (experts.ffn, experts.shared_ffn) = (256, 512);
    let joined = with_latent(|latent| latent.layout = KvLayout::Joined);
    let no_scaling = RopeScaling::None;
    vec![
        ("deepseek_v3_split", deepseek()),
        ("deepseek_v3_joined", joined),
        ("deepseek_v3_no_q_lora", no_q_lora.clone()),
        (
            "deepseek_v3_no_yarn",
            TinySpec {
                rope_scaling: no_scaling,
                ..deepseek()
            },
        ),
        ("deepseek_v3_unequal_heads", unequal),
        ("deepseek_v3_unequal_heads_joined", unequal_joined),
        (
            "deepseek_v3_q8_0",
            TinySpec {
                types: Types::all(GgmlType::Q8_0),
                ..deepseek()
            },
        ),
        ("deepseek_v3_mixed_k", wide),
        ("moonlight", moonlight()),
        ("deepseek_v2", deepseek_v2()),
        ("deepseek_v2_lite", deepseek_v2_lite()),
    ]
}

fn moonlight() -> TinySpec {
    let mut spec = with_latent(|latent| latent.q_lora = None);
    let experts = spec.experts.as_mut().expect("DeepSeek's experts");
    experts.groups = Some((1, 1));
    experts.scale = Some(2.446);
    experts.shared_ffn = 128;
    TinySpec {
        epsilon: 1e-5,
        rope_base: 50000.0,
        rope_scaling: RopeScaling::None,
        ..spec
    }
}

fn deepseek_v2() -> TinySpec {
    let mut spec = with_latent(|latent| latent.layout = KvLayout::Joined);
    let experts = spec.experts.as_mut().expect("DeepSeek's experts");
    (experts.gating, experts.bias) = (None, false);
    (experts.norm, experts.scale) = (Some(false), Some(4.0));
    experts.top_k = 2;
    experts.shared_ffn = 128;
    TinySpec {
        rope_scaling: yarn(0.0707),
        ..spec
    }
}

fn deepseek_v2_lite() -> TinySpec {
    let mut spec = with_latent(|latent| {
        latent.layout = KvLayout::Joined;
        latent.q_lora = None;
    });
    spec.experts = Some(ExpertSpec {
        top_k: 3,
        ffn: 352,
        shared_ffn: 704,
        leading_dense: 1,
        gating: Some(1),
        norm: Some(false),
        scale: Some(1.0),
        ..experts()
    });
    TinySpec {
        rope_scaling: yarn(0.0707),
        ..spec
    }
}

fn deepseek_gate_models() -> Vec<(&'static str, TinySpec)> {
    vec![
        (
            "deepseek_gate_softmax_normalised",
            with_experts(|experts| {
                (experts.gating, experts.bias) = (Some(1), false);
                experts.scale = Some(1.0);
            }),
        ),
        (
            "deepseek_gate_sigmoid_scaled_only",
            with_experts(|experts| experts.norm = Some(false)),
        ),
        (
            "deepseek_gate_no_bias",
            with_experts(|experts| experts.bias = false),
        ),
        (
            "deepseek_gate_no_groups",
            with_experts(|experts| experts.groups = None),
        ),
        (
            "deepseek_gate_groups_of_three",
            with_experts(|experts| {
                (experts.count, experts.groups) = (9, Some((3, 2)));
            }),
        ),
        (
            "deepseek_five_experts",
            with_experts(|experts| {
                (experts.count, experts.groups) = (5, None);
            }),
        ),
        (
            "deepseek_per_expert_tensors",
            with_experts(|experts| {
                experts.layout = ExpertLayout::PerExpert;
            }),
        ),
        (
            "deepseek_two_dense_layers",
            with_experts(|experts| experts.leading_dense = 2),
        ),
        (
            "deepseek_no_dense_layer",
            with_experts(|experts| experts.leading_dense = 0),
        ),
        (
            "deepseek_no_shared_expert",
            with_experts(|experts| experts.shared_ffn = 0),
        ),
        (
            "deepseek_all_dense",
            TinySpec {
                experts: None,
                ..deepseek()
            },
        ),
    ]
}

fn qwen(architecture: Architecture) -> TinySpec {
    TinySpec {
        architecture,
        epsilon: 1e-6,
        rope_base: 1_000_000.0,
        ..llama()
    }
}

fn qwen_models() -> Vec<(&'static str, TinySpec)> {
    let qwen2 = TinySpec {
        attention_bias: true,
        ..qwen(Architecture::Qwen2)
    };
    // Heads times head size is not the hidden size.
    let qwen3 = TinySpec {
        head_dim: 32,
        ..qwen(Architecture::Qwen3)
    };
    let shared = ExpertSpec {
        top_k: 3,
        ffn: 64,
        shared_ffn: 160,
        ..experts()
    };
    let qwen2_moe = TinySpec {
        attention_bias: true,
        experts: Some(shared),
        ..qwen(Architecture::Qwen2Moe)
    };
    let routed = ExpertSpec {
        top_k: 3,
        ffn: 64,
        count: 7,
        ..experts()
    };
    let qwen3_moe = TinySpec {
        head_dim: 32,
        experts: Some(routed),
        ..qwen(Architecture::Qwen3Moe)
    };
    let yarn = RopeScaling::Yarn {
        factor: 4.0,
        original_context: 64,
        log_multiplier: None,
    };
    let wide_experts = ExpertSpec { ffn: 256, ..routed };
    let wide_shared = ExpertSpec {
        ffn: 256,
        shared_ffn: 512,
        ..shared
    };
    vec![
        ("qwen2", qwen2.clone()),
        (
            "qwen2_tied_q8_0",
            TinySpec {
                tied: true,
                types: Types::all(GgmlType::Q8_0),
                ..qwen2
            },
        ),
        ("qwen2moe", qwen2_moe.clone()),
        (
            "qwen2moe_mixed_k",
            TinySpec {
                experts: Some(wide_shared),
                types: MIXED,
                ..wide(qwen2_moe)
            },
        ),
        ("qwen3", qwen3.clone()),
        (
            "qwen3_yarn",
            TinySpec {
                rope_scaling: yarn,
                ..qwen3
            },
        ),
        ("qwen3moe", qwen3_moe.clone()),
        (
            "qwen3moe_yarn",
            TinySpec {
                rope_scaling: yarn,
                ..qwen3_moe.clone()
            },
        ),
        (
            "qwen3moe_mixed_k",
            TinySpec {
                experts: Some(wide_experts),
                types: MIXED,
                ..wide(qwen3_moe)
            },
        ),
    ]
}
