//! GGUF files: container, metadata, memory map, block formats with their reference dequantiser.
//!
//! [`Gguf::open`] maps a model (all parts of a split one) and validates its whole header; [`Gguf::metadata`] and
//! [`Gguf::tensor`] then hand out what is there. [`blocks`] has the layouts of the quantised blocks, [`tables`] the
//! constants that go with them, and [`dequantize_row`] is the reference that faster kernels are tested against.
//! [`GgufWriter`], [`quantize_row`] and [`random_blocks`] make models for tests and tools.
//!
//! [`safetensors`] reads the other format that weights come in, and [`fp8`] has its 8-bit floats.
//!
//! Shapes are in GGUF's order, row length first.
//!
//! ```
//! use ktx_gguf::{GgmlType, Gguf, GgufWriter, quantize_row};
//!
//! let mut writer = GgufWriter::new();
//! writer.kv("general.architecture", "llama");
//! writer.tensor("w", GgmlType::Q8_0, &[32, 2], quantize_row(GgmlType::Q8_0, &[0.5; 64])?)?;
//!
//! let model = Gguf::from_vec(writer.to_bytes(), "tiny.gguf")?;
//! assert_eq!(model.metadata().required_str("general.architecture")?, "llama");
//! let tensor = model.tensor("w").expect("it was written");
//! assert_eq!((tensor.ty(), tensor.shape(), tensor.rows()), (GgmlType::Q8_0, &[32, 2][..], 2));
//! assert!(tensor.to_f32().iter().all(|value| (value - 0.5).abs() < 1e-3));
//! # Ok::<(), ktx_gguf::GgufError>(())
//! ```

#[cfg(target_endian = "big")]
compile_error!(
    "GGUF data is little-endian and is used in place; big-endian targets are not supported"
);

pub mod blocks;
mod cursor;
mod dequantize;
mod error;
mod file;
pub mod fp8;
mod header;
mod limits;
mod metadata;
mod quantize;
mod random;
mod resident;
pub mod safetensors;
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
pub use resident::{HUGE_PAGE, HugePages};
pub use safetensors::Safetensors;
pub use tensor::Tensor;
pub use types::GgmlType;
pub use value::{Array, Value};
pub use writer::GgufWriter;

/// Compiles the README's example.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
