//! Feed-forward blocks: the dense one and the mixture of experts.

mod mlp;
mod moe;

pub use mlp::Mlp;
pub use moe::MoeBlock;
