//! What can be wrong with a GGUF file, or with a request to one.

use std::fmt;
use std::io;
use std::path::PathBuf;

use crate::GgmlType;

/// A header field: which file, which field, and where it starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The file's path, or the name given to bytes in memory.
    pub file: String,
    /// The field, `tensor_infos[3].name` for example.
    pub field: String,
    /// Bytes from the start of the file to the field.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} at byte {}", self.file, self.field, self.offset)
    }
}

/// A name from a file as error texts show it: shortened, and with control characters escaped, because a hostile
/// file's names may be long and may hold commands for the terminal.
pub(crate) fn shown(name: &str) -> String {
    const MOST: usize = 80;
    let mut text: String = name
        .chars()
        .take(MOST)
        .flat_map(char::escape_debug)
        .collect();
    if name.chars().nth(MOST).is_some() {
        text.push('…');
    }
    text
}

/// Every error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The operating system refused to open or map the file.
    #[error("cannot open {}: {source}; check the path and its permissions", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// The path is a directory.
    #[error("{} is a directory; {hint}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What to name instead.
        hint: String,
    },
    /// The path is a device, a pipe or a socket, which cannot be mapped.
    #[error("{} is not a regular file and cannot be mapped; copy it to a file first", path.display())]
    NotAFile {
        /// The path.
        path: PathBuf,
    },
    /// The file holds no bytes.
    #[error("{file} is empty; download or convert the model again")]
    Empty {
        /// The file.
        file: String,
    },
    /// The file does not start with the four letters `GGUF`.
    #[error("{file} is not a GGUF file: {hint}")]
    NotGguf {
        /// The file.
        file: String,
        /// What it looks like, and what to do.
        hint: String,
    },
    /// The file was written for big-endian machines.
    #[error(
        "{file}: big-endian GGUF is not supported; convert it with `gguf_convert_endian.py {file} little` \
         of llama.cpp's gguf-py"
    )]
    BigEndian {
        /// The file.
        file: String,
    },
    /// A version of the container that this crate does not read.
    #[error("{file}: GGUF version {version} is not supported (2 and 3 are); {hint}")]
    UnsupportedVersion {
        /// The file.
        file: String,
        /// The version that the file states.
        version: u32,
        /// What to do.
        hint: &'static str,
    },
    /// The file ends before the field does.
    #[error(
        "{place} needs {needed} bytes, but only {left} are left; the file is damaged or not downloaded completely"
    )]
    Truncated {
        /// The field.
        place: Place,
        /// Bytes that the field needs (at least).
        needed: u64,
        /// Bytes that are left in the file.
        left: u64,
    },
    /// A count, length or size is above what this crate accepts.
    #[error("{place} is {value}, above the limit of {limit}; the file is damaged or hostile")]
    OverLimit {
        /// The field.
        place: Place,
        /// What the file states.
        value: u64,
        /// The largest value accepted.
        limit: u64,
    },
    /// A field's value makes no sense.
    #[error("{place} is {found}; expected {expected}")]
    InvalidValue {
        /// The field.
        place: Place,
        /// What the file states.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// Two metadata entries have the same key.
    #[error("{place}: the key `{}` is already used by entry {first}", shown(key))]
    DuplicateKey {
        /// The second entry's key.
        place: Place,
        /// The key.
        key: String,
        /// Index of the first entry with it.
        first: usize,
    },
    /// Two tensors have the same name.
    #[error(
        "{place}: the tensor name `{}` is already used by tensor {first}",
        shown(name)
    )]
    DuplicateTensor {
        /// The second tensor's name.
        place: Place,
        /// The name.
        name: String,
        /// Index of the first tensor with it.
        first: usize,
    },
    /// A tensor has a type that this crate does not know.
    #[error(
        "{place}: tensor `{}` has type {id}, which is not supported; supported are {}",
        shown(tensor),
        GgmlType::supported_names()
    )]
    UnsupportedType {
        /// The type field.
        place: Place,
        /// The tensor.
        tensor: String,
        /// The type's number in the file.
        id: u32,
    },
    /// A tensor's data ends after the end of the file.
    #[error(
        "{place}: tensor `{}` ends at byte {end}, but the file ends at byte {file_size}; the file is damaged \
         or not downloaded completely",
        shown(tensor)
    )]
    TensorOutOfRange {
        /// The tensor's offset field.
        place: Place,
        /// The tensor.
        tensor: String,
        /// Where its data would end.
        end: u64,
        /// The file's size.
        file_size: u64,
    },
    /// Two tensors share bytes.
    #[error(
        "{place}: tensor `{}` starts at byte {start}, inside tensor `{}`, which ends at byte {end}",
        shown(tensor),
        shown(other)
    )]
    OverlappingTensors {
        /// The offset field of the tensor that starts later.
        place: Place,
        /// The tensor that starts later.
        tensor: String,
        /// Where it starts.
        start: u64,
        /// The tensor that starts earlier.
        other: String,
        /// Where the earlier one ends.
        end: u64,
    },
    /// A part of a split model is not there.
    #[error("{} is missing (part {number} of {count}); put all parts into one directory", path.display())]
    MissingPart {
        /// The part that was looked for.
        path: PathBuf,
        /// Its number, from 1.
        number: usize,
        /// How many parts there are.
        count: usize,
    },
    /// The parts of a split model do not belong together.
    #[error(
        "{file}: `{key}` is {found}; expected {expected}; the parts of this model do not belong together"
    )]
    SplitMismatch {
        /// The part.
        file: String,
        /// The metadata key that disagrees.
        key: &'static str,
        /// What the part states.
        found: String,
        /// What the name and the other parts ask for.
        expected: String,
    },
    /// A split model's file does not follow the naming scheme, so its other parts cannot be found.
    #[error(
        "{file} is part of a model split into {count} files, but its name does not end in \
         `-00001-of-{count:05}.gguf` or the like; {hint}"
    )]
    SplitName {
        /// The file.
        file: String,
        /// How many parts its metadata states.
        count: usize,
        /// What to do.
        hint: &'static str,
    },
    /// The file does not hold a safetensors header.
    #[error("{file} is not a safetensors file: {reason}; {hint}")]
    NotSafetensors {
        /// The file.
        file: String,
        /// What is wrong.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// What a safetensors header says of a tensor does not hold, or the tensor cannot be used as it is asked for.
    #[error("{file}: tensor `{}` {reason}; {hint}", shown(tensor))]
    SafetensorsTensor {
        /// The file.
        file: String,
        /// The tensor.
        tensor: String,
        /// What is wrong.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// Several safetensors files do not make one set of tensors.
    #[error("{file}: {reason}; {hint}")]
    SafetensorsSet {
        /// The index or the directory.
        file: String,
        /// What is wrong.
        reason: String,
        /// What to do.
        hint: &'static str,
    },
    /// A metadata key that the caller needs is not there.
    #[error("{file}: the metadata key `{key}` is missing")]
    MissingKey {
        /// The file.
        file: String,
        /// The key.
        key: String,
    },
    /// A metadata value has another type than the caller needs.
    #[error("{file}: the metadata key `{key}` is {found}; expected {expected}")]
    WrongType {
        /// The file.
        file: String,
        /// The key.
        key: String,
        /// The value's type, and the value where that helps.
        found: String,
        /// What the caller asked for.
        expected: &'static str,
    },
    /// Bytes given for a tensor or row do not fit its type and shape.
    #[error("{name}: {ty} of shape {shape:?} takes {expected} bytes, not {found}")]
    WrongByteCount {
        /// The tensor, or what was asked for.
        name: String,
        /// The type.
        ty: GgmlType,
        /// The shape, row length first.
        shape: Vec<usize>,
        /// Bytes that this shape takes.
        expected: usize,
        /// Bytes given.
        found: usize,
    },
    /// A shape that no tensor of this type can have.
    #[error("{name}: shape {shape:?} is not possible for {ty}: {reason}")]
    InvalidShape {
        /// The tensor, or what was asked for.
        name: String,
        /// The type.
        ty: GgmlType,
        /// The shape, row length first.
        shape: Vec<usize>,
        /// Why not.
        reason: String,
    },
    /// There is no quantiser for this type here.
    #[error(
        "cannot quantise to {ty}; this crate quantises to F32, F16, BF16, Q4_0, Q4_1, Q8_0, Q4_K and Q6_K"
    )]
    NoQuantizer {
        /// The type.
        ty: GgmlType,
    },
    /// A setting of the writer that would make a file that no reader accepts.
    #[error("cannot write this GGUF file: {reason}")]
    InvalidWrite {
        /// What is wrong.
        reason: String,
    },
    /// The operating system refused to write the file.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
}
