//! llama.cpp's adapters: a GGUF file with `NAME.lora_a` and `NAME.lora_b` for tensors of the base.

use std::collections::BTreeMap;
use std::path::Path;

use ktx_gguf::{Gguf, Tensor};

use super::error::AdapterError;
use super::file::{AdapterFile, Entry, Naming};

const TYPE: &str = "general.type";
const KIND: &str = "adapter.type";
const ALPHA: &str = "adapter.lora.alpha";
const INVOCATION: &str = "adapter.alora.invocation_tokens";

/// Opens a GGUF adapter.
pub(super) fn open(path: &Path) -> Result<AdapterFile, AdapterError> {
    let gguf = Gguf::open(path)?;
    let file = gguf.name().to_owned();
    let setting = |key: &str, value: &str, reason: &str| AdapterError::Setting {
        file: file.clone(),
        key: key.to_owned(),
        value: value.to_owned(),
        reason: reason.to_owned(),
    };
    let metadata = gguf.metadata();
    match metadata.str(TYPE)? {
        Some("adapter") => {}
        found => {
            return Err(setting(
                TYPE,
                found.unwrap_or("missing"),
                "this is no adapter (they say `adapter`); is it a model?",
            ));
        }
    }
    match metadata.str(KIND)? {
        Some("lora") => {}
        found => {
            return Err(setting(
                KIND,
                found.unwrap_or("missing"),
                "only adapters of type `lora` are known",
            ));
        }
    }
    if metadata.get(INVOCATION).is_some() {
        return Err(setting(
            INVOCATION,
            "set",
            "adapters that switch themselves on in the middle of a text (aLoRA) are not supported",
        ));
    }
    let alpha = metadata.f32(ALPHA)?.unwrap_or(0.0);
    if !alpha.is_finite() {
        return Err(setting(ALPHA, &alpha.to_string(), "a number is expected"));
    }
    let architecture = metadata.required_str("general.architecture")?.to_owned();
    Ok(AdapterFile {
        architecture: Some(architecture),
        naming: Naming::Tensors,
        entries: entries(&gguf, &file, alpha)?,
        file,
    })
}

fn entries(gguf: &Gguf, file: &str, alpha: f32) -> Result<BTreeMap<String, Entry>, AdapterError> {
    let mut entries = BTreeMap::new();
    let half = |name: &str, found: &str| -> Result<Tensor, AdapterError> {
        gguf.tensor(name).ok_or_else(|| AdapterError::MissingHalf {
            file: file.to_owned(),
            tensor: found.to_owned(),
            missing: name.to_owned(),
        })
    };
    for info in gguf.tensors() {
        let tensor = info.name.as_str();
        let (a_name, b_name) = (
            tensor.strip_suffix(".lora_a"),
            tensor.strip_suffix(".lora_b"),
        );
        let Some(base) = a_name.or(b_name) else {
            return Err(AdapterError::Tensor {
                file: file.to_owned(),
                tensor: tensor.to_owned(),
                reason: "is no part of a low-rank update (`.lora_a`, `.lora_b`): adapters that replace whole \
                         weights have to be merged into the base"
                    .to_owned(),
            });
        };
        let a = half(&format!("{base}.lora_a"), tensor)?;
        let b = half(&format!("{base}.lora_b"), tensor)?;
        let rank = b.row_len();
        // Alpha 0 stands for none, as in llama.cpp.
        let scale = if alpha == 0.0 {
            1.0
        } else {
            alpha / rank.max(1) as f32
        };
        let entry = Entry {
            a,
            b,
            scale,
            fused: None,
        };
        entries.insert(base.to_owned(), entry);
    }
    Ok(entries)
}
