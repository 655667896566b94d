//! Why an adapter cannot be used.

use std::path::PathBuf;

use ktx_gguf::GgufError;

/// Why an adapter cannot be read, or not with this model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterError {
    /// A GGUF or safetensors file that is none.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A file that cannot be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A path that leads to no adapter.
    #[error(
        "{}: {reason}; name a GGUF adapter, or the directory of a PEFT adapter (adapter_config.json and \
         adapter_model.safetensors)", path.display()
    )]
    NotAnAdapter {
        /// The path.
        path: PathBuf,
        /// What is there instead.
        reason: String,
    },
    /// The adapter was made for another architecture.
    #[error(
        "{file}: this adapter is for a model of architecture `{found}`, and the base is `{expected}`"
    )]
    Architecture {
        /// The adapter.
        file: String,
        /// The adapter's architecture.
        found: String,
        /// The base's.
        expected: String,
    },
    /// A setting that is wrong, or changes the arithmetic in a way that is not implemented.
    #[error("{file}: `{key}` is {value}: {reason}")]
    Setting {
        /// The file.
        file: String,
        /// The setting.
        key: String,
        /// Its value.
        value: String,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// A tensor that is no part of a low-rank update.
    #[error("{file}: tensor `{tensor}` {reason}")]
    Tensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A without B, or B without A.
    #[error("{file}: tensor `{tensor}` has no `{missing}` beside it; the adapter is incomplete")]
    MissingHalf {
        /// The file.
        file: String,
        /// The one that is there.
        tensor: String,
        /// The other one.
        missing: String,
    },
    /// A matrix that does not fit its module.
    #[error(
        "{file}: tensor `{tensor}` is {found:?} and module `{module}` needs {expected} (row length first); the \
         adapter was made for another base"
    )]
    Shape {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// The module.
        module: String,
        /// The tensor's shape.
        found: Vec<usize>,
        /// What the module needs.
        expected: String,
    },
    /// The model has no such module.
    #[error(
        "{file}: the model has no module for tensor `{tensor}`{near}; was the adapter made for another base?"
    )]
    UnknownModule {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// Names that are near.
        near: String,
    },
    /// The operator in the module's place adds nothing to its products.
    #[error(
        "{file}: it adapts module `{module}`, and the operator in charge of it, `{class}`, does not take adapters \
         (none does on a GPU); name another operator, or another device, in the rules"
    )]
    NotServed {
        /// The file.
        file: String,
        /// The module.
        module: String,
        /// The operator.
        class: String,
    },
    /// The file holds no update at all.
    #[error("{file}: the adapter holds no low-rank matrices")]
    Empty {
        /// The file.
        file: String,
    },
}
