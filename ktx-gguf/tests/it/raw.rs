//! GGUF files put together field by field, valid or not.

use ktx_gguf::{Gguf, GgufError};

/// Numbers of the value types in a file.
pub const U32: u32 = 4;
pub const STRING: u32 = 8;
pub const ARRAY: u32 = 9;

/// A file in the making. Counts are stated, not counted, so that they can lie.
pub struct Raw(pub Vec<u8>);

impl Raw {
    /// A header of version 3.
    pub fn new(tensors: u64, entries: u64) -> Self {
        Self::version(3, tensors, entries)
    }

    /// A header of any version.
    pub fn version(version: u32, tensors: u64, entries: u64) -> Self {
        Self(b"GGUF".to_vec())
            .u32(version)
            .u64(tensors)
            .u64(entries)
    }

    pub fn u32(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn u64(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    pub fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub fn string(self, text: &str) -> Self {
        self.u64(text.len() as u64).bytes(text.as_bytes())
    }

    /// A metadata entry up to its value.
    pub fn key(self, key: &str, value_type: u32) -> Self {
        self.string(key).u32(value_type)
    }

    /// A tensor info.
    pub fn tensor(self, name: &str, shape: &[u64], ty: u32, offset: u64) -> Self {
        let raw = self.string(name).u32(shape.len() as u32);
        shape
            .iter()
            .fold(raw, |raw, &length| raw.u64(length))
            .u32(ty)
            .u64(offset)
    }

    /// Pads the header to the alignment and adds bytes of data.
    pub fn data(mut self, alignment: usize, bytes: usize) -> Self {
        let header = self.0.len().next_multiple_of(alignment);
        self.0.resize(header + bytes, 0);
        self
    }

    pub fn open(self) -> Result<Gguf, GgufError> {
        Gguf::from_vec(self.0, "raw.gguf")
    }

    /// The text of the error that opening gives.
    pub fn error(self) -> String {
        self.open()
            .expect_err("the file must be refused")
            .to_string()
    }
}
