//! GGUF files: container, metadata, memory map, block formats with their reference dequantiser.

#[cfg(target_endian = "big")]
compile_error!(
    "GGUF data is little-endian and is used in place; big-endian targets are not supported"
);

pub mod blocks;
mod cursor;
mod dequantize;
mod error;
mod file;
mod header;
mod limits;
mod metadata;
mod quantize;
mod random;
mod split;
mod storage;
pub mod tables;
mod tensor;
mod types;
mod value;
mod writer;

pub use dequantize::dequantize_row;
pub use error::{GgufError, Place};
pub use file::Gguf;
pub use header::TensorInfo;
pub use metadata::Metadata;
pub use quantize::quantize_row;
pub use random::random_blocks;
pub use tensor::Tensor;
pub use types::GgmlType;
pub use value::{Array, Value};
pub use writer::GgufWriter;
