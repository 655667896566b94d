//! Low-rank adapters (LoRA): `y = W x + scale * B A x`, on the base's weights as they are.
//!
//! An [`AdapterFile`] is read and checked; an [`Adapter`] is that file on the modules of one model; a
//! module that can carry its part [attaches](crate::KModule::attach) it. Which adapters apply is said
//! by each sequence of a batch and reaches the operators as [`RowAdapters`], so that one step may mix
//! sequences with different adapters. Nothing is merged: the base stays what its file holds.

mod active;
mod adapter;
mod embedding;
mod error;
mod file;
mod gguf;
mod low_rank;
mod peft;

pub use active::{ActiveAdapter, AdapterId, AdapterSpan, RowAdapters};
pub use adapter::{Adapter, Attachment, attach_all, detach};
pub use embedding::EmbeddingLora;
pub use error::AdapterError;
pub use file::AdapterFile;
pub use low_rank::{Attached, LowRank};
pub(crate) use low_rank::{add_to, product, product_of};
