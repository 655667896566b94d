//! The largest values that the reader accepts. Files in the wild stay far below; the limits bound the time and
//! the memory that a hostile file can cost.

/// Bytes from the start of a file to the end of its tensor infos. The largest headers known (vocabularies of
/// 260,000 tokens with merges) take about 20 MB.
pub(crate) const HEADER_BYTES: usize = 128 << 20;

/// Metadata entries of one file.
pub(crate) const METADATA_ENTRIES: u64 = 1 << 16;

/// Tensors of one file. DeepSeek-V3 with every expert on its own has about 46,000.
pub(crate) const TENSORS: u64 = 1 << 20;

/// Bytes of a metadata key; the format's own limit.
pub(crate) const KEY_BYTES: u64 = (1 << 16) - 1;

/// Bytes of a tensor's name. The format says 64, some converters write longer ones.
pub(crate) const TENSOR_NAME_BYTES: u64 = 1024;

/// Bytes of a metadata string. The longest known are whole `tokenizer.json` files, of about 20 MB.
pub(crate) const STRING_BYTES: u64 = 64 << 20;

/// Elements of a metadata array. Vocabularies have up to about 260,000.
pub(crate) const ARRAY_ELEMENTS: u64 = 1 << 24;

/// Depth of nested metadata arrays; an array of numbers has depth 1.
pub(crate) const ARRAY_DEPTH: u64 = 4;

/// Dimensions of a tensor.
pub(crate) const DIMENSIONS: u32 = 4;

/// Alignment of tensor data, in bytes.
pub(crate) const ALIGNMENT: u64 = 1 << 20;

/// Bytes of a safetensors header; the format's own limit.
pub(crate) const SAFETENSORS_HEADER_BYTES: u64 = 100_000_000;

/// Dimensions of a tensor in a safetensors file, which sets no limit itself.
pub(crate) const SAFETENSORS_DIMENSIONS: usize = 8;

/// Bytes of an index of safetensors files. DeepSeek-V3's takes 9 MB.
pub(crate) const SAFETENSORS_INDEX_BYTES: u64 = 128 << 20;

/// Safetensors files of one model.
pub(crate) const SAFETENSORS_FILES: usize = 4096;

/// Parts of a split model; the naming scheme has five digits.
pub(crate) const SPLIT_PARTS: u64 = 65_535;
