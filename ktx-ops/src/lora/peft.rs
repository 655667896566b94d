//! PEFT's adapters: a directory with `adapter_config.json` and `adapter_model.safetensors`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use fancy_regex::Regex;
use ktx_gguf::safetensors::Safetensors;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::error::AdapterError;
use super::file::{AdapterFile, Entry, Fused, Naming};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts in front of the paths of the model's modules.
const PREFIX: &str = "base_model.model.";

/// What scales the matrices. PEFT's other settings matter for training only, or are refused.
#[derive(Debug, Deserialize)]
struct Config {
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    rank_pattern: Option<Map<String, Value>>,
    #[serde(default)]
    alpha_pattern: Option<Map<String, Value>>,
}

/// Settings that change the arithmetic or the base, why they are refused, and what they may be.
const REFUSED: &[(&str, &str, &[&str])] = &[
    (
        "use_dora",
        "DoRA scales whole columns of the base; merge the adapter into the base (PEFT: merge_and_unload)",
        &["false"],
    ),
    (
        "bias",
        "trained biases of the base are not read; merge the adapter into the base",
        &["\"none\""],
    ),
    (
        "lora_bias",
        "biases of B are not read; merge the adapter into the base",
        &["false"],
    ),
    (
        "modules_to_save",
        "whole modules in an adapter are not read; merge the adapter into the base",
        &["[]"],
    ),
    (
        "trainable_token_indices",
        "trained rows of the embedding are not read; merge the adapter into the base",
        &["[]", "{}"],
    ),
    (
        "layer_replication",
        "layers that are repeated are not supported",
        &["[]"],
    ),
    (
        "alora_invocation_tokens",
        "adapters that switch themselves on in the middle of a text (aLoRA) are not supported",
        &["[]"],
    ),
    (
        "use_qalora",
        "QALoRA pools the input of A, which is not implemented",
        &["false"],
    ),
    (
        "use_bdlora",
        "block-diagonal matrices are not implemented",
        &["false"],
    ),
    (
        "fan_in_fan_out",
        "transposed weights are those of models that are not supported",
        &["false"],
    ),
    (
        "arrow_config",
        "routing between adapters is not implemented",
        &[],
    ),
    (
        "ensure_weight_tying",
        "adapters shared by embedding and head are not supported",
        &["false"],
    ),
    (
        "kasa_config",
        "KaSA changes the base, and is not implemented",
        &[],
    ),
    ("velora_config", "VeLoRA is not implemented", &[]),
    ("monteclora_config", "MonteCLoRA is not implemented", &[]),
    (
        "init_lora_weights",
        "this initialisation changes the base's weights; save the adapter with PEFT's path_initial_model_for_weight_conversion",
        &["true", "false", "\"gaussian\"", "\"eva\"", "\"orthogonal\""],
    ),
];

/// Opens a PEFT adapter: its directory, or one of its two files.
pub(super) fn open(path: &Path) -> Result<AdapterFile, AdapterError> {
    let directory = match path.is_dir() {
        true => path.to_owned(),
        false => path.parent().map(Path::to_owned).unwrap_or_default(),
    };
    let missing = |reason: &str| AdapterError::NotAnAdapter {
        path: path.to_owned(),
        reason: reason.to_owned(),
    };
    if !path.exists() {
        return Err(missing("there is no such file or directory"));
    }
    let config_path = directory.join(CONFIG);
    if !config_path.is_file() {
        return Err(missing("there is no adapter_config.json"));
    }
    let weights = match path.is_file() && path.extension().is_some_and(|e| e != "json") {
        true => path.to_owned(),
        false => directory.join(WEIGHTS),
    };
    if !weights.is_file() {
        return Err(missing(
            match directory.join("adapter_model.bin").is_file() {
                true => {
                    "its weights are in adapter_model.bin, which may run code when it is read; save them with PEFT's \
                     safe_serialization"
                }
                false => "there is no adapter_model.safetensors",
            },
        ));
    }
    let config = read_config(&config_path)?;
    let tensors = Safetensors::open(&weights)?;
    let file = tensors.name().to_owned();
    Ok(AdapterFile {
        architecture: None,
        naming: Naming::Paths,
        entries: entries(&tensors, &file, &config, &config_path)?,
        file,
    })
}

fn read_config(path: &PathBuf) -> Result<Config, AdapterError> {
    let text = std::fs::read_to_string(path).map_err(|source| AdapterError::Io {
        path: path.clone(),
        source,
    })?;
    let setting = |key: &str, value: &str, reason: &str| AdapterError::Setting {
        file: path.display().to_string(),
        key: key.to_owned(),
        value: value.to_owned(),
        reason: reason.to_owned(),
    };
    let whole =
        |e: serde_json::Error| setting("adapter_config.json", "not as expected", &e.to_string());
    let json: Map<String, Value> = serde_json::from_str(&text).map_err(whole)?;
    match json.get("peft_type") {
        Some(Value::String(kind)) if kind == "LORA" => {}
        found => {
            let found = found.map_or_else(|| "missing".to_owned(), Value::to_string);
            return Err(setting(
                "peft_type",
                &found,
                "only adapters of type LORA are known",
            ));
        }
    }
    for (key, reason, allowed) in REFUSED {
        let value = json
            .get(*key)
            .filter(|v| !v.is_null())
            .map(Value::to_string);
        if let Some(value) = value
            && !allowed.contains(&value.as_str())
        {
            return Err(setting(key, &value, reason));
        }
    }
    let config: Config = serde_json::from_value(Value::Object(json)).map_err(whole)?;
    if config.r == 0 {
        return Err(setting("r", "0", "a rank from 1 is expected"));
    }
    Ok(config)
}

impl Config {
    /// Rank and alpha over rank (or over its square root) of the module at a path, as PEFT chooses them.
    fn of(&self, path: &str, file: &Path) -> Result<(usize, f32), AdapterError> {
        let bad = |key: &str, value: String, reason: &str| AdapterError::Setting {
            file: file.display().to_string(),
            key: key.to_owned(),
            value,
            reason: reason.to_owned(),
        };
        let pattern = |key: &str, patterns: &Option<Map<String, Value>>| {
            for (text, value) in patterns.iter().flatten() {
                let whole = Regex::new(&format!(r"^(?:.*\.)?(?:{text})$"))
                    .map_err(|e| bad(key, text.clone(), &e.to_string()))?;
                let found = whole
                    .is_match(path)
                    .map_err(|e| bad(key, text.clone(), &e.to_string()))?;
                if found {
                    let number = value.as_f64().filter(|v| v.is_finite());
                    return number
                        .map(Some)
                        .ok_or_else(|| bad(key, value.to_string(), "a number is expected"));
                }
            }
            Ok(None)
        };
        let rank = match pattern("rank_pattern", &self.rank_pattern)? {
            None => self.r,
            Some(rank) if rank >= 1.0 && rank.fract() == 0.0 => rank as usize,
            Some(rank) => {
                return Err(bad(
                    "rank_pattern",
                    rank.to_string(),
                    "a rank from 1 is expected",
                ));
            }
        };
        let alpha = pattern("alpha_pattern", &self.alpha_pattern)?.unwrap_or(self.lora_alpha);
        let over = match self.use_rslora {
            true => (rank as f64).sqrt(),
            false => rank as f64,
        };
        Ok((rank, (alpha / over) as f32))
    }
}

impl Config {
    /// Ranks and factors of the two parameters of fused experts.
    fn of_experts(&self, path: &str, file: &Path) -> Result<Fused, AdapterError> {
        let experts = path.trim_end_matches(".base_layer");
        Ok(Fused {
            gate_up: self.of(&format!("{experts}.gate_up_proj"), file)?,
            down: self.of(&format!("{experts}.down_proj"), file)?,
        })
    }
}

/// Which of a pair a tensor is, and the path of its module.
fn half(name: &str) -> Option<(&str, [String; 2])> {
    for (a, b) in [
        (".lora_A.weight", ".lora_B.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
        (".lora_embedding_A", ".lora_embedding_B"),
        (".lora_embedding_A.default", ".lora_embedding_B.default"),
    ] {
        if let Some(path) = name.strip_suffix(a).or_else(|| name.strip_suffix(b)) {
            return Some((path, [format!("{path}{a}"), format!("{path}{b}")]));
        }
    }
    None
}

fn entries(
    tensors: &Safetensors,
    file: &str,
    config: &Config,
    config_path: &Path,
) -> Result<BTreeMap<String, Entry>, AdapterError> {
    let mut entries = BTreeMap::new();
    for entry in tensors.tensors() {
        let name = entry.name.as_str();
        let Some((full, [a_name, b_name])) = half(name) else {
            // PEFT saves a copy of an embedding that it adapts.
            if name.ends_with(".base_layer.weight") {
                continue;
            }
            return Err(AdapterError::Tensor {
                file: file.to_owned(),
                tensor: name.to_owned(),
                reason: "is no part of a low-rank update (`lora_A`, `lora_B`): adapters that replace whole weights have \
                         to be merged into the base"
                    .to_owned(),
            });
        };
        let matrix = |wanted: &str| -> Result<ktx_gguf::Tensor, AdapterError> {
            tensors
                .tensor(wanted)?
                .ok_or_else(|| AdapterError::MissingHalf {
                    file: file.to_owned(),
                    tensor: name.to_owned(),
                    missing: wanted.to_owned(),
                })
        };
        let (mut a, b) = (matrix(&a_name)?, matrix(&b_name)?);
        let path = full.strip_prefix(PREFIX).unwrap_or(full);
        let (rank, scale) = config.of(path, config_path)?;
        if a_name.contains("lora_embedding") {
            a = turned(&a);
        }
        let fused = match is_fused(path) {
            true => Some(config.of_experts(path, config_path)?),
            false => None,
        };
        let found = b.row_len();
        if fused.is_none() && found != rank {
            return Err(AdapterError::Tensor {
                file: file.to_owned(),
                tensor: b.name().to_owned(),
                reason: format!("has rank {found}, and adapter_config.json says {rank}"),
            });
        }
        let entry = Entry { a, b, scale, fused };
        entries.insert(path.to_owned(), entry);
    }
    Ok(entries)
}

/// Whether a path is that of experts whose projections are two parameters of all experts.
fn is_fused(path: &str) -> bool {
    path.trim_end_matches(".base_layer").ends_with(".experts")
}

/// `[rank, vocab]` as rows by token id.
fn turned(a: &ktx_gguf::Tensor) -> ktx_gguf::Tensor {
    let (values, vocab, rank) = (a.to_f32(), a.row_len(), a.rows());
    let rows = (0..vocab).flat_map(|id| (0..rank).map(move |r| r * vocab + id));
    ktx_gguf::Tensor::from_f32(a.name(), &[rank, vocab], rows.map(|i| values[i]).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(text: &str) -> Config {
        serde_json::from_str(text).unwrap()
    }

    #[test]
    fn patterns_match_the_end_of_a_path_and_the_first_that_does_counts() {
        let config = config(
            r#"{"r": 8, "lora_alpha": 16, "rank_pattern": {"q_proj": 4, "layers.1.self_attn.q_proj": 2},
                "alpha_pattern": {"layers\\.1\\..*": 2}}"#,
        );
        let of = |path: &str| config.of(path, Path::new("x")).unwrap();
        assert_eq!(of("model.layers.0.self_attn.q_proj"), (4, 4.0));
        assert_eq!(of("model.layers.1.self_attn.q_proj"), (4, 0.5));
        assert_eq!(of("model.layers.0.self_attn.xq_proj"), (8, 2.0));
    }

    #[test]
    fn rank_stabilised_adapters_divide_by_the_root() {
        let config =
            config(r#"{"r": 16, "lora_alpha": 8, "use_rslora": true, "rank_pattern": null}"#);
        assert_eq!(config.of("x", Path::new("x")).unwrap(), (16, 2.0));
    }
}
