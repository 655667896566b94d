//! The model that is embedded in the program, where the build found its file.

use ktx_core::gguf::Gguf;

use crate::error::CliError;

/// What messages and `ktx bench` call the built-in model.
pub(crate) const NAME: &str = "built-in model";

/// What clients of a server call it.
pub(crate) const SHORT_NAME: &str = "pip-17m";

/// What `ktx --version` prints: the version, and the notice that travels with the built-in model.
#[cfg(ktx_builtin_model)]
pub(crate) const LONG_VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    "\n\nThis program holds the model Pip 17M (Apache-2.0), which was trained on text made from WordNet 3.0:\n\n",
    include_str!("../models/LICENSE-WordNet.txt")
);

/// What `ktx --version` prints.
#[cfg(not(ktx_builtin_model))]
pub(crate) const LONG_VERSION: &str = env!("CARGO_PKG_VERSION");

/// Opens the built-in model: Pip 17M, a small mixture-of-experts model that answers short questions in English.
///
/// # Errors
/// [`CliError::NoBuiltinModel`] in a build without it.
pub fn builtin_model() -> Result<Gguf, CliError> {
    let bytes = bytes().ok_or(CliError::NoBuiltinModel)?;
    Gguf::from_static(bytes, NAME).map_err(|e| CliError::Engine(e.into()))
}

#[cfg(ktx_builtin_model)]
fn bytes() -> Option<&'static [u8]> {
    /// Tensors are read where they lie: they need the alignment that a mapped file has.
    #[repr(C, align(64))]
    struct Aligned<T: ?Sized>(T);

    static MODEL: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/models/pip-17m.gguf"
    )));
    Some(&MODEL.0)
}

#[cfg(not(ktx_builtin_model))]
fn bytes() -> Option<&'static [u8]> {
    None
}
