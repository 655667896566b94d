//! Safetensors files: the format of checkpoints on Hugging Face, mapped and validated like GGUF files.
//!
//! A file is the length of a JSON header in eight bytes, the header, and the tensors' bytes without holes. A
//! checkpoint of many files has an index, `model.safetensors.index.json`, that names each tensor's file.
//! [`Safetensors::open`] takes a file, an index, or a directory.

mod header;
mod set;

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use crate::storage::Storage;
use crate::{GgmlType, GgufError, Tensor};

macro_rules! dtypes {
    ($($(#[$doc:meta])* $name:ident = $text:literal, $bytes:literal, $ggml:expr;)*) => {
        /// Type of a tensor's elements in a safetensors file.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, reason = "the names of the format")]
        pub enum Dtype {
            $($(#[$doc])* $name,)*
        }

        impl Dtype {
            /// Every type that is known.
            pub const ALL: &[Dtype] = &[$(Dtype::$name,)*];

            /// The name as the format spells it.
            pub const fn name(self) -> &'static str {
                match self { $(Dtype::$name => $text,)* }
            }

            /// Bytes of an element.
            pub const fn bytes(self) -> usize {
                match self { $(Dtype::$name => $bytes,)* }
            }

            /// The type that elements have as a [`Tensor`]; `None` for those that no operator reads.
            pub const fn ggml_type(self) -> Option<GgmlType> {
                match self { $(Dtype::$name => $ggml,)* }
            }
        }
    };
}

dtypes! {
    /// Double precision.
    F64 = "F64", 8, Some(GgmlType::F64);
    /// Single precision.
    F32 = "F32", 4, Some(GgmlType::F32);
    /// Half precision.
    F16 = "F16", 2, Some(GgmlType::F16);
    /// The upper half of a single-precision number.
    BF16 = "BF16", 2, Some(GgmlType::BF16);
    /// 8-bit float with four bits of exponent, no infinities.
    F8_E4M3 = "F8_E4M3", 1, Some(GgmlType::F8_E4M3);
    /// 8-bit float with five bits of exponent.
    F8_E5M2 = "F8_E5M2", 1, None;
    /// Signed, 64 bits.
    I64 = "I64", 8, Some(GgmlType::I64);
    /// Signed, 32 bits.
    I32 = "I32", 4, Some(GgmlType::I32);
    /// Signed, 16 bits.
    I16 = "I16", 2, Some(GgmlType::I16);
    /// Signed, 8 bits.
    I8 = "I8", 1, Some(GgmlType::I8);
    /// Unsigned, 64 bits.
    U64 = "U64", 8, None;
    /// Unsigned, 32 bits.
    U32 = "U32", 4, None;
    /// Unsigned, 16 bits.
    U16 = "U16", 2, None;
    /// Unsigned, 8 bits.
    U8 = "U8", 1, None;
    /// A byte of 0 or 1.
    BOOL = "BOOL", 1, None;
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a header says of a tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Its shape as the file has it: row length last.
    pub shape: Vec<usize>,
    /// Where its bytes begin in the file.
    pub offset: u64,
    /// How many they are.
    pub bytes: u64,
    /// Which file it is in, from 0.
    pub part: usize,
}

/// One safetensors file, or all of a checkpoint. Cheap to clone.
///
/// Everything in the headers was checked when it was opened; every tensor's bytes lie inside its file.
#[derive(Clone)]
pub struct Safetensors {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    files: Vec<Part>,
    tensors: Vec<TensorEntry>,
    by_name: HashMap<String, usize>,
}

/// One file.
struct Part {
    name: String,
    storage: Arc<Storage>,
    metadata: BTreeMap<String, String>,
}

impl Safetensors {
    /// Maps a file, all files that an index (`….safetensors.index.json`) names, or all of a directory (by its index,
    /// if it has one), and validates their headers.
    ///
    /// The files must not be changed or truncated while they are in use.
    ///
    /// # Errors
    /// When a file cannot be opened, is no safetensors file, or anything in its header does not hold; when an index
    /// names a file or tensor that is not there, or two files hold a tensor of one name.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, GgufError> {
        let path = path.as_ref();
        if path.is_dir() {
            return set::directory(path);
        }
        if path
            .extension()
            .is_some_and(|extension| extension == "json")
        {
            return set::index(path);
        }
        Self::assemble(
            path.display().to_string(),
            vec![(path.display().to_string(), Storage::map(path)?)],
        )
    }

    /// A file in memory; `name` stands for the path in error texts.
    ///
    /// # Errors
    /// As [`Safetensors::open`].
    pub fn from_vec(bytes: Vec<u8>, name: &str) -> Result<Self, GgufError> {
        Self::assemble(
            name.to_owned(),
            vec![(name.to_owned(), Storage::Bytes(bytes))],
        )
    }

    /// Puts files together, each with its name.
    fn assemble(name: String, files: Vec<(String, Storage)>) -> Result<Self, GgufError> {
        let mut inner = Inner {
            name,
            files: Vec::with_capacity(files.len()),
            tensors: Vec::new(),
            by_name: HashMap::new(),
        };
        for (part, (name, storage)) in files.into_iter().enumerate() {
            let header = header::parse(&name, storage.bytes(), part)?;
            for tensor in header.tensors {
                if let Some(first) = inner
                    .by_name
                    .insert(tensor.name.clone(), inner.tensors.len())
                {
                    let first = inner.tensors[first].part;
                    let other = inner.files.get(first).map_or(&name, |file| &file.name);
                    return Err(GgufError::SafetensorsTensor {
                        reason: format!("is in {other} too"),
                        file: name,
                        tensor: tensor.name,
                        hint: "keep one of the two, or name the index of the files that belong together",
                    });
                }
                inner.tensors.push(tensor);
            }
            inner.files.push(Part {
                name,
                storage: Arc::new(storage),
                metadata: header.metadata,
            });
        }
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// The path that was opened, or the name given to bytes in memory.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The paths of all files.
    pub fn files(&self) -> impl ExactSizeIterator<Item = &str> {
        self.inner.files.iter().map(|file| file.name.as_str())
    }

    /// Bytes of all files together.
    pub fn file_size(&self) -> u64 {
        let sizes = self
            .inner
            .files
            .iter()
            .map(|file| file.storage.bytes().len());
        sizes.map(|bytes| bytes as u64).sum()
    }

    /// The free texts (`__metadata__`) of a file.
    pub fn metadata(&self, part: usize) -> impl Iterator<Item = (&str, &str)> {
        let part = self.inner.files.get(part);
        part.into_iter()
            .flat_map(|file| &file.metadata)
            .map(|(key, text)| (key.as_str(), text.as_str()))
    }

    /// What the headers say of each tensor, file by file, in the order of their bytes.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorEntry> {
        self.inner.tensors.iter()
    }

    /// What the header says of a tensor.
    pub fn entry(&self, name: &str) -> Option<&TensorEntry> {
        let index = self.inner.by_name.get(name)?;
        self.inner.tensors.get(*index)
    }

    /// A tensor's bytes.
    pub fn bytes(&self, entry: &TensorEntry) -> &[u8] {
        let (storage, range) = self.place(entry);
        &storage.bytes()[range]
    }

    fn place(&self, entry: &TensorEntry) -> (&Arc<Storage>, std::ops::Range<usize>) {
        let start = entry.offset as usize;
        let storage = &self.inner.files[entry.part].storage;
        (storage, start..start + entry.bytes as usize)
    }

    /// An error about a tensor, with its file's name.
    pub fn error(&self, entry: &TensorEntry, reason: String, hint: &'static str) -> GgufError {
        GgufError::SafetensorsTensor {
            file: self.inner.files[entry.part].name.clone(),
            tensor: entry.name.clone(),
            reason,
            hint,
        }
    }

    /// A tensor for operators, its shape turned to GGUF's order. 8-bit floats `X` come with the scales of their
    /// blocks of 128 x 128, the tensor `X_scale_inv`. `None` if there is no tensor of this name.
    ///
    /// # Errors
    /// [`GgufError::SafetensorsTensor`] for element types that no operator reads, and for 8-bit floats without scales
    /// that fit.
    pub fn tensor(&self, name: &str) -> Result<Option<Tensor>, GgufError> {
        let Some(entry) = self.entry(name) else {
            return Ok(None);
        };
        let Some(ty) = entry.dtype.ggml_type() else {
            return Err(self.error(
                entry,
                format!(
                    "has elements of type {}, which no operator reads",
                    entry.dtype
                ),
                "convert it to F32, F16, BF16, or F8_E4M3 with block scales",
            ));
        };
        let mut shape: Vec<usize> = entry.shape.iter().rev().copied().collect();
        if shape.is_empty() {
            shape.push(1);
        }
        let (storage, range) = self.place(entry);
        let tensor = Tensor::in_storage(&entry.name, ty, &shape, Arc::clone(storage), range);
        match ty {
            GgmlType::F8_E4M3 => self.scaled(entry, tensor).map(Some),
            _ => Ok(Some(tensor)),
        }
    }

    fn scaled(&self, entry: &TensorEntry, tensor: Tensor) -> Result<Tensor, GgufError> {
        let hint = "only DeepSeek-V3's format is read: F32 scales of 128 x 128 blocks in `…weight_scale_inv`";
        let name = format!("{}_scale_inv", entry.name);
        let Some(scales) = self.entry(&name) else {
            return Err(self.error(entry, "is F8_E4M3 and has no block scales".to_owned(), hint));
        };
        if scales.dtype != Dtype::F32 {
            let reason = format!("is {} and holds scales", scales.dtype);
            return Err(self.error(scales, reason, hint));
        }
        let blocks = entry.shape.iter().map(|n| n.div_ceil(crate::fp8::BLOCK));
        if entry.shape.len() == 2 && !blocks.eq(scales.shape.iter().copied()) {
            let reason = format!(
                "has the shape {:?}, and the weights {:?}",
                scales.shape, entry.shape
            );
            return Err(self.error(scales, reason, hint));
        }
        let (storage, range) = self.place(scales);
        tensor
            .with_scales(Arc::clone(storage), range)
            .map_err(|reason| self.error(entry, reason, hint))
    }

    /// A tensor in a GGUF type that was stored as plain bytes (`U8`), with its type's number in the scalar beside it
    /// that has `.ggml_type` for `.weight`; `shape` is what the bytes should be, row length first. `None` if there is
    /// no tensor of this name, or it has no such scalar.
    ///
    /// # Errors
    /// [`GgufError::SafetensorsTensor`] if the number is none of a known type, or the bytes are not of that shape.
    pub fn ggml_tensor(&self, name: &str, shape: &[usize]) -> Result<Option<Tensor>, GgufError> {
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let number = self.entry(&format!("{stem}.ggml_type"));
        let (Some(entry), Some(number)) = (self.entry(name), number) else {
            return Ok(None);
        };
        let hint = "merge the files again";
        let bytes = self.bytes(number);
        let id = match number.dtype {
            Dtype::I64 | Dtype::U64 => bytes.try_into().ok().map(u64::from_le_bytes),
            Dtype::I32 | Dtype::U32 => bytes
                .try_into()
                .ok()
                .map(|b| u64::from(u32::from_le_bytes(b))),
            _ => None,
        };
        let ty = id
            .and_then(|id| u32::try_from(id).ok())
            .and_then(GgmlType::from_id)
            .ok_or_else(|| {
                self.error(number, "is not the number of a GGUF type".to_owned(), hint)
            })?;
        let expected = crate::tensor::shape_bytes(name, ty, shape)?;
        if expected as u64 != entry.bytes {
            let reason = format!(
                "has {} bytes, and {ty} of shape {shape:?} takes {expected}",
                entry.bytes
            );
            return Err(self.error(entry, reason, hint));
        }
        let (storage, range) = self.place(entry);
        Ok(Some(Tensor::in_storage(
            name,
            ty,
            shape,
            Arc::clone(storage),
            range,
        )))
    }
}

impl fmt::Debug for Safetensors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Safetensors({}, {} tensors)",
            self.name(),
            self.inner.tensors.len()
        )
    }
}
