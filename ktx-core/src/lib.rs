//! Run language models that do not fit the GPU: YAML placement rules, engine, sessions, tokenizer, chat templates.
//!
//! A model's file is opened, its module tree planned by rules, the operators injected, and sessions
//! of the engine generate text:
//!
//! ```no_run
//! use ktx_core::{Engine, GenerateOptions};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = Engine::open("model.gguf")?;
//! let mut session = engine.session();
//! for piece in session.chat("What is the opposite of hot?", &GenerateOptions::default())? {
//!     print!("{}", piece?.text);
//! }
//! # Ok(())
//! # }
//! ```
//!
//! An operator of another crate registers itself with [`register_operator!`] and is named by rules
//! like those that come with the library; see [`ops`].

#![forbid(unsafe_code)]

pub mod chat;
pub mod engine;
pub mod error;
pub mod grammar;
pub mod inject;
pub mod memory;
pub mod model_files;
pub mod perplexity;
pub mod placement;
pub mod plan;
pub mod rules;
pub mod sampling;
pub mod serving;
pub mod session;
pub mod tokenizer;
pub mod weights;

/// Files: container, metadata, tensors.
pub use ktx_gguf as gguf;
/// Arithmetic: matrix products, attention, threads, devices.
pub use ktx_kernels as kernels;
/// Architectures.
pub use ktx_models as models;
/// Operators: traits, roles, registry.
pub use ktx_ops as ops;
pub use ktx_ops::experts::HotReport;
pub use ktx_ops::lora::AdapterId;
pub use ktx_ops::recording::StepTimes;
pub use ktx_ops::register_operator;

pub use chat::Message;
pub use engine::{
    AutoPlacement, DeviceMapping, Engine, EngineBuilder, HostWeights, HotMemory, LoadedAdapter,
    MemoryCheck, PlannedModel, Rules,
};
pub use error::EngineError;
pub use sampling::SamplingParams;
pub use session::{
    CancelHandle, FinishReason, GenerateOptions, Generation, Outputs, Piece, Session, Statistics,
    Thinking,
};
pub use tokenizer::{TokenId, Tokenizer};
