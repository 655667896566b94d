//! Rule files that come with this crate, one for each family of models.

/// A rule file that is used where none is named.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preset {
    /// Its name: `deepseek2`.
    pub name: &'static str,
    /// The `general.architecture` values of the GGUF files that it is for.
    pub architectures: &'static [&'static str],
    /// The models that it is for, in words.
    pub description: &'static str,
    /// The rule file.
    pub text: &'static str,
}

const PRESETS: &[Preset] = &[
    Preset {
        name: "deepseek2",
        architectures: &["deepseek2"],
        description: "DeepSeek-V2, V2-Lite, V3, R1, and Moonlight: latent attention, mixture of experts",
        text: include_str!("../../rules/deepseek2.yaml"),
    },
    Preset {
        name: "gpt-oss",
        architectures: &["gpt-oss"],
        description: "gpt-oss (20b, 120b): sliding windows, attention sinks, mixture of experts",
        text: include_str!("../../rules/gpt-oss.yaml"),
    },
    Preset {
        name: "llama",
        architectures: &["llama"],
        description: "Llama 2 and 3, SmolLM2, InternLM2.5, and Mixtral",
        text: include_str!("../../rules/llama.yaml"),
    },
    Preset {
        name: "qwen2moe",
        architectures: &["qwen2moe"],
        description: "Qwen2-MoE (57B-A14B): mixture of experts with a gated shared expert",
        text: include_str!("../../rules/qwen2moe.yaml"),
    },
    Preset {
        name: "qwen3moe",
        architectures: &["qwen3moe"],
        description: "Qwen3-MoE (30B-A3B, 235B-A22B): mixture of experts",
        text: include_str!("../../rules/qwen3moe.yaml"),
    },
];

/// All presets, by name.
pub fn presets() -> &'static [Preset] {
    PRESETS
}

/// The preset for a GGUF file's `general.architecture`.
pub fn preset_for(architecture: &str) -> Option<&'static Preset> {
    PRESETS
        .iter()
        .find(|preset| preset.architectures.contains(&architecture))
}
