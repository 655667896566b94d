//! The model that `ktx plan` looks at: a file, or one that is only described.

use std::path::{Path, PathBuf};

use clap::Args;
use ktx_core::gguf::{Gguf, Value};
use ktx_core::models::{QuantMix, Tying, described, published, published_model};
use ktx_core::{Engine, EngineBuilder};

use crate::error::CliError;
use crate::model_args::ModelSource;
use crate::text_file::read_text;

/// A model that need not be there.
#[derive(Debug, Clone, Args)]
pub(crate) struct ArchArgs {
    /// A model that is not there: the name of a published one, or a JSON file of GGUF metadata
    #[arg(long, value_name = "NAME|FILE", conflicts_with_all = ["model", "gguf_path", "safetensors"])]
    pub(crate) arch: Option<PathBuf>,

    /// Quantisation of the model that --arch names
    #[arg(long, value_name = "MIX", default_value = "Q4_K_M", requires = "arch")]
    quant: QuantMix,
}

impl ArchArgs {
    /// Settings of an engine for the model that is named, or else for that of `source`.
    pub(crate) fn builder(&self, source: &ModelSource) -> Result<EngineBuilder, CliError> {
        match self.gguf()? {
            Some(gguf) => Ok(Engine::builder().gguf(gguf)),
            None => source.builder(),
        }
    }

    /// The model that is named, without weights.
    pub(crate) fn gguf(&self) -> Result<Option<Gguf>, CliError> {
        let Some(arch) = &self.arch else {
            return Ok(None);
        };
        let name = arch.display().to_string();
        let (metadata, tying) = match published_model(&name) {
            Some(model) => (model.metadata(), model.tying),
            None if arch.exists() => read_metadata(arch)?,
            None => {
                let names: Vec<&str> = published().iter().map(|m| m.name).collect();
                return Err(CliError::Usage(format!(
                    "`{name}` is neither a file nor a published model; known are: {}",
                    names.join(", ")
                )));
            }
        };
        let name = format!("{name} {}", self.quant);
        described(&name, metadata, tying, self.quant)
            .map(Some)
            .map_err(|e| CliError::Engine(e.into()))
    }
}

/// A JSON object of metadata keys and numbers, texts or truth values; `tie_word_embeddings`, which is
/// no key of GGUF files, says that there is no output matrix.
fn read_metadata(path: &Path) -> Result<(Vec<(String, Value)>, Tying), CliError> {
    let wrong = |reason: String| {
        CliError::Usage(format!(
            "{}: {reason}; a JSON object of GGUF metadata is expected, such as {{\"general.architecture\": \"llama\", \
             \"llama.block_count\": 32, ...}}",
            path.display()
        ))
    };
    let json: serde_json::Map<String, serde_json::Value> =
        serde_json::from_str(&read_text(path)?).map_err(|e| wrong(e.to_string()))?;
    let mut tying = Tying::Separate;
    let mut metadata = Vec::new();
    for (key, value) in json {
        if key == "tie_word_embeddings" {
            if value.as_bool() == Some(true) {
                tying = Tying::Tied;
            }
            continue;
        }
        metadata.push((
            key.clone(),
            scalar(&value).ok_or_else(|| {
                wrong(format!(
                    "`{key}` is neither a number nor a text nor true or false"
                ))
            })?,
        ));
    }
    Ok((metadata, tying))
}

fn scalar(value: &serde_json::Value) -> Option<Value> {
    use serde_json::Value as Json;
    Some(match value {
        Json::Bool(flag) => (*flag).into(),
        Json::String(text) => text.as_str().into(),
        Json::Number(number) => match number.as_u64() {
            Some(integer) => integer.into(),
            None => number.as_f64()?.into(),
        },
        _ => return None,
    })
}
