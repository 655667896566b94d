//! Model architectures of ktx: GGUF metadata to configuration to module tree, one file per family.
//!
//! [`describe`] reads a file's metadata and gives the tree of modules with their sizes, by the names
//! that Hugging Face's implementation of the family uses. No weight is read, and nothing is placed.

#![forbid(unsafe_code)]

mod attention;
mod deepseek2;
mod described;
mod gpt_oss;
mod keys;
mod llama;
mod parts;
mod qwen;

use ktx_gguf::{Gguf, GgufError};
use ktx_ops::Module;

pub use described::{
    ParseMixError, PublishedModel, QuantMix, Tying, described, published, published_model,
};

/// What a file describes.
#[derive(Debug, Clone)]
pub struct ModelDescription {
    /// `general.architecture`: `deepseek2`.
    pub architecture: String,
    /// `general.name`, if the file has one.
    pub name: Option<String>,
    /// The module tree, with sizes and without weights.
    pub tree: Module,
    /// Number of layers.
    pub num_layers: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of rows of the embedding table.
    pub vocab_size: usize,
    /// Longest context the model states.
    pub context_length: usize,
}

/// Why a file describes no model that can be run.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// The metadata are not as the format says.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// No family of this name is known.
    #[error(
        "{file}: architecture `{architecture}` is not supported; supported are: {}",
        supported().collect::<Vec<_>>().join(", ")
    )]
    Architecture {
        /// The file.
        file: String,
        /// `general.architecture`.
        architecture: String,
    },
    /// A key is missing.
    #[error(
        "{file}: the metadata have no `{key}`, which a model of architecture `{architecture}` needs"
    )]
    MissingKey {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// `general.architecture`.
        architecture: String,
    },
    /// A key's value makes no sense.
    #[error("{file}: `{key}` is {value}: {reason}")]
    BadValue {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// Its value.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// One architecture: its name in GGUF files, and how its tree is made.
struct Architecture {
    name: &'static str,
    describe: fn(&keys::Keys<'_>) -> Result<Module, ModelError>,
}

/// All architectures. A new family is a file and a line here.
const ARCHITECTURES: &[Architecture] = &[
    Architecture {
        name: "deepseek2",
        describe: deepseek2::tree,
    },
    Architecture {
        name: "gpt-oss",
        describe: gpt_oss::tree,
    },
    Architecture {
        name: "llama",
        describe: llama::tree,
    },
    Architecture {
        name: "qwen2",
        describe: qwen::qwen2,
    },
    Architecture {
        name: "qwen2moe",
        describe: qwen::qwen2moe,
    },
    Architecture {
        name: "qwen3",
        describe: qwen::qwen3,
    },
    Architecture {
        name: "qwen3moe",
        describe: qwen::qwen3moe,
    },
];

/// The names of all architectures, as `general.architecture` has them.
pub fn supported() -> impl Iterator<Item = &'static str> {
    ARCHITECTURES.iter().map(|a| a.name)
}

/// Reads a file's metadata and gives the tree of its model.
///
/// # Errors
/// [`ModelError`] if the architecture is unknown, or a key is missing or makes no sense.
pub fn describe(gguf: &Gguf) -> Result<ModelDescription, ModelError> {
    describe_with(gguf, &|name| {
        gguf.tensor_info(name).map(|tensor| tensor.shape.clone())
    })
}

/// As [`describe`], where tensors can be in other files too: `shape_of` gives the shape of a tensor,
/// row length first, by its GGUF name.
///
/// # Errors
/// As [`describe`].
pub fn describe_with(
    gguf: &Gguf,
    shape_of: &dyn Fn(&str) -> Option<Vec<usize>>,
) -> Result<ModelDescription, ModelError> {
    let file = gguf.name().to_owned();
    let metadata = gguf.metadata();
    let name = metadata
        .str("general.architecture")?
        .ok_or_else(|| ModelError::MissingKey {
            file: file.clone(),
            key: "general.architecture".to_owned(),
            architecture: "any".to_owned(),
        })?;
    let architecture = ARCHITECTURES
        .iter()
        .find(|a| a.name == name)
        .ok_or_else(|| ModelError::Architecture {
            file,
            architecture: name.to_owned(),
        })?;
    let keys = keys::Keys::new(gguf, shape_of, name);
    Ok(ModelDescription {
        architecture: name.to_owned(),
        name: metadata.str("general.name")?.map(str::to_owned),
        tree: (architecture.describe)(&keys)?,
        num_layers: keys.size("block_count")?,
        hidden_size: keys.size("embedding_length")?,
        vocab_size: keys.vocab_size()?,
        context_length: keys.size("context_length")?,
    })
}
