//! Writing GGUF files, for tests and tools.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::header::{ALIGNMENT_KEY, DEFAULT_ALIGNMENT, MAGIC, valid_alignment};
use crate::split::part_name;
use crate::tensor::shape_bytes;
use crate::{Array, GgmlType, GgufError, Value, limits};

const VERSION: u32 = 3;

/// Collects metadata and tensors, and writes them as one GGUF file (version 3) or several.
///
/// ```
/// use ktx_gguf::{GgmlType, Gguf, GgufWriter};
///
/// let mut writer = GgufWriter::new();
/// writer.kv("general.architecture", "llama").kv("llama.block_count", 2_u32);
/// writer.tensor("output_norm.weight", GgmlType::F32, &[4], vec![0; 16])?;
/// let model = Gguf::from_vec(writer.to_bytes(), "tiny")?;
/// assert_eq!(model.metadata().required_u32("llama.block_count")?, 2);
/// # Ok::<(), ktx_gguf::GgufError>(())
/// ```
#[derive(Clone, Debug)]
pub struct GgufWriter {
    alignment: u64,
    entries: Vec<(String, Value)>,
    tensors: Vec<Entry>,
    names: HashSet<String>,
}

/// A tensor to write.
#[derive(Clone, Debug)]
struct Entry {
    name: String,
    ty: GgmlType,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Default for GgufWriter {
    fn default() -> Self {
        Self {
            alignment: DEFAULT_ALIGNMENT,
            entries: Vec::new(),
            tensors: Vec::new(),
            names: HashSet::new(),
        }
    }
}

impl GgufWriter {
    /// A writer with no metadata, no tensors and an alignment of 32 bytes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets the alignment of tensor data in bytes, and with it the key `general.alignment`.
    ///
    /// # Errors
    /// [`GgufError::InvalidWrite`] when it is not a power of two that readers accept.
    pub fn alignment(&mut self, bytes: u32) -> Result<&mut Self, GgufError> {
        if valid_alignment(&Value::U32(bytes)).is_none() {
            let reason = format!(
                "the alignment {bytes} is not a power of two up to {}",
                limits::ALIGNMENT
            );
            return Err(GgufError::InvalidWrite { reason });
        }
        Ok(self.kv(ALIGNMENT_KEY, bytes))
    }

    /// Sets a metadata value; a key that is there already gets the new value. The key `general.alignment` also sets
    /// the alignment, if it is one that [`Self::alignment`] accepts.
    pub fn kv(&mut self, key: &str, value: impl Into<Value>) -> &mut Self {
        let value = value.into();
        if key == ALIGNMENT_KEY
            && let Some(alignment) = valid_alignment(&value)
        {
            self.alignment = alignment;
        }
        match self
            .entries
            .iter_mut()
            .find(|(existing, _)| existing == key)
        {
            Some(entry) => entry.1 = value,
            None => self.entries.push((key.to_owned(), value)),
        }
        self
    }

    /// Adds a tensor. The shape has the row length first.
    ///
    /// # Errors
    /// [`GgufError::InvalidShape`] when rows are not whole blocks, a dimension is zero or there are more than four,
    /// [`GgufError::WrongByteCount`] when `bytes` is not as long as type and shape say,
    /// [`GgufError::InvalidWrite`] when the name is taken, empty or too long.
    pub fn tensor(
        &mut self,
        name: &str,
        ty: GgmlType,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> Result<&mut Self, GgufError> {
        let invalid = |reason: &str| GgufError::InvalidShape {
            name: name.to_owned(),
            ty,
            shape: shape.to_vec(),
            reason: reason.to_owned(),
        };
        let expected = shape_bytes(name, ty, shape)?;
        if GgmlType::from_id(ty.id()).is_none() {
            return Err(invalid("GGUF has no such type"));
        }
        if shape.contains(&0) {
            return Err(invalid("a dimension is zero"));
        }
        if shape.len() > limits::DIMENSIONS as usize {
            return Err(invalid("GGUF has at most four dimensions"));
        }
        if bytes.len() != expected {
            let (name, shape) = (name.to_owned(), shape.to_vec());
            return Err(GgufError::WrongByteCount {
                name,
                ty,
                shape,
                expected,
                found: bytes.len(),
            });
        }
        if name.is_empty() || name.len() as u64 > limits::TENSOR_NAME_BYTES {
            let reason = format!(
                "a tensor's name has {} bytes, not 1 to {}",
                name.len(),
                limits::TENSOR_NAME_BYTES
            );
            return Err(GgufError::InvalidWrite { reason });
        }
        if !self.names.insert(name.to_owned()) {
            return Err(GgufError::InvalidWrite {
                reason: format!("there are two tensors named `{name}`"),
            });
        }
        self.tensors.push(Entry {
            name: name.to_owned(),
            ty,
            shape: shape.to_vec(),
            bytes,
        });
        Ok(self)
    }

    /// The whole file in memory.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.write_part(&mut bytes, &self.entries, &self.tensors)
            .expect("writing to memory does not fail");
        bytes
    }

    /// Writes one file.
    ///
    /// # Errors
    /// [`GgufError::Write`] when the operating system refuses.
    pub fn write(&self, path: impl AsRef<Path>) -> Result<(), GgufError> {
        self.write_file(path.as_ref(), &self.entries, &self.tensors)
    }

    /// Writes the tensors in order to `parts` files of about equal size, named
    /// `<path_prefix>-00001-of-<parts>.gguf` and so on; returns their paths. The metadata goes to the first.
    ///
    /// # Errors
    /// [`GgufError::InvalidWrite`] when there are fewer tensors than parts, or no parts; [`GgufError::Write`] when
    /// the operating system refuses.
    pub fn write_split(
        &self,
        path_prefix: impl AsRef<Path>,
        parts: usize,
    ) -> Result<Vec<PathBuf>, GgufError> {
        let prefix = path_prefix.as_ref();
        let most = self.tensors.len().min(limits::SPLIT_PARTS as usize);
        if parts == 0 || parts > most {
            let reason = format!(
                "{} tensors go into 1 to {most} parts, not {parts}",
                self.tensors.len()
            );
            return Err(GgufError::InvalidWrite { reason });
        }
        let Some(name) = prefix.file_name().and_then(|name| name.to_str()) else {
            let reason = format!(
                "the prefix {} does not end in a name in UTF-8",
                prefix.display()
            );
            return Err(GgufError::InvalidWrite { reason });
        };
        let mut paths = Vec::with_capacity(parts);
        for (index, tensors) in self.distribute(parts).into_iter().enumerate() {
            let path = prefix.with_file_name(part_name(name, index + 1, parts));
            self.write_file(&path, &self.part_entries(index, parts), tensors)?;
            paths.push(path);
        }
        Ok(paths)
    }

    /// Cuts the tensors into runs of about equal bytes, none of them empty.
    fn distribute(&self, parts: usize) -> Vec<&[Entry]> {
        let mut rest = self.tensors.as_slice();
        let mut runs = Vec::with_capacity(parts);
        for left in (1..=parts).rev() {
            let total: usize = rest.iter().map(|tensor| tensor.bytes.len()).sum();
            let most = rest.len() - (left - 1);
            let (mut count, mut bytes) = (1, rest[0].bytes.len());
            while count < most && (left == 1 || bytes + rest[count].bytes.len() / 2 < total / left)
            {
                bytes += rest[count].bytes.len();
                count += 1;
            }
            let (run, others) = rest.split_at(count);
            runs.push(run);
            rest = others;
        }
        runs
    }

    /// Metadata of one part of a split model.
    fn part_entries(&self, index: usize, parts: usize) -> Vec<(String, Value)> {
        let mut entries: Vec<_> = self
            .entries
            .iter()
            .filter(|(key, _)| index == 0 || key == ALIGNMENT_KEY)
            .cloned()
            .collect();
        entries.push(("split.no".to_owned(), Value::U16(index as u16)));
        entries.push(("split.count".to_owned(), Value::U16(parts as u16)));
        entries.push((
            "split.tensors.count".to_owned(),
            Value::I32(self.tensors.len() as i32),
        ));
        entries
    }

    fn write_file(
        &self,
        path: &Path,
        entries: &[(String, Value)],
        tensors: &[Entry],
    ) -> Result<(), GgufError> {
        let write = || {
            let mut out = BufWriter::new(File::create(path)?);
            self.write_part(&mut out, entries, tensors)?;
            out.flush()
        };
        write().map_err(|source| GgufError::Write {
            path: path.to_owned(),
            source,
        })
    }

    fn write_part(
        &self,
        out: &mut impl Write,
        entries: &[(String, Value)],
        tensors: &[Entry],
    ) -> io::Result<()> {
        let mut header = MAGIC.to_vec();
        header.extend(VERSION.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((entries.len() as u64).to_le_bytes());
        for (key, value) in entries {
            put_string(&mut header, key);
            put_value(&mut header, value);
        }
        let mut offset = 0_u64;
        for tensor in tensors {
            put_string(&mut header, &tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            tensor
                .shape
                .iter()
                .for_each(|&length| header.extend((length as u64).to_le_bytes()));
            header.extend(tensor.ty.id().to_le_bytes());
            header.extend(offset.to_le_bytes());
            offset += (tensor.bytes.len() as u64).next_multiple_of(self.alignment);
        }
        self.pad(&mut header);
        out.write_all(&header)?;
        for tensor in tensors {
            out.write_all(&tensor.bytes)?;
            let padding =
                tensor.bytes.len().next_multiple_of(self.alignment as usize) - tensor.bytes.len();
            io::copy(&mut io::Read::take(io::repeat(0), padding as u64), out)?;
        }
        Ok(())
    }

    fn pad(&self, bytes: &mut Vec<u8>) {
        bytes.resize(bytes.len().next_multiple_of(self.alignment as usize), 0);
    }
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    out.extend(value.type_id().to_le_bytes());
    match value {
        Value::U8(value) => out.push(*value),
        Value::I8(value) => out.extend(value.to_le_bytes()),
        Value::U16(value) => out.extend(value.to_le_bytes()),
        Value::I16(value) => out.extend(value.to_le_bytes()),
        Value::U32(value) => out.extend(value.to_le_bytes()),
        Value::I32(value) => out.extend(value.to_le_bytes()),
        Value::F32(value) => out.extend(value.to_le_bytes()),
        Value::Bool(value) => out.push(u8::from(*value)),
        Value::String(text) => put_string(out, text),
        Value::Array(array) => put_array(out, array),
        Value::U64(value) => out.extend(value.to_le_bytes()),
        Value::I64(value) => out.extend(value.to_le_bytes()),
        Value::F64(value) => out.extend(value.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &Array) {
    out.extend(array.element_type_id().to_le_bytes());
    out.extend((array.len() as u64).to_le_bytes());
    match array {
        Array::U8(values) => out.extend(values),
        Array::I8(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U16(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I16(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::U32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F32(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::Bool(values) => out.extend(values.iter().map(|&value| u8::from(value))),
        Array::String(texts) => texts.iter().for_each(|text| put_string(out, text)),
        Array::Array(arrays) => arrays.iter().for_each(|array| put_array(out, array)),
        Array::U64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::I64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Array::F64(values) => out.extend(values.iter().flat_map(|value| value.to_le_bytes())),
    }
}
