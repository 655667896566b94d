//! Tiny random models, one per architecture feature, made by code: complete GGUF files with a tokenizer.
//!
//! The same seed gives the same bytes. Activations stay near unit size through all layers, logits are a few units
//! wide, and the seeds were chosen so that no router decision on [`PROMPT`] is close (see `checks.rs`).

mod build;
mod catalogue;
mod checks;
mod random;
pub mod spec;
mod tokenizer;

pub use build::build;
pub use catalogue::all;
pub use spec::TinySpec;

/// Token ids that every tiny model's vocabulary has, for comparisons.
pub const PROMPT: [u32; 12] = [0, 72, 104, 260, 37, 299, 15, 151, 88, 270, 3, 201];
