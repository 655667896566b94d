//! Parsing and validating the header of one file: magic, version, metadata, tensor infos.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;

use crate::cursor::Cursor;
use crate::error::shown;
use crate::{GgmlType, GgufError, Metadata, Place, Value, limits};

/// The first four bytes of every GGUF file.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
/// Alignment of the tensor data where the metadata does not say otherwise.
pub(crate) const DEFAULT_ALIGNMENT: u64 = 32;
/// The metadata key that says otherwise.
pub(crate) const ALIGNMENT_KEY: &str = "general.alignment";

/// Fewest bytes of a metadata entry: key length, one byte of key, type, one byte of value.
const MIN_ENTRY_BYTES: u64 = 8 + 1 + 4 + 1;
/// Fewest bytes of a tensor info: name length, one byte of name, number of dimensions, one dimension, type, offset.
const MIN_TENSOR_INFO_BYTES: u64 = 8 + 1 + 4 + 8 + 4 + 8;

/// What the header says about a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The name, `blk.0.attn_q.weight` for example.
    pub name: String,
    /// The type of the elements.
    pub ty: GgmlType,
    /// The shape in GGUF's order: row length first. One to four dimensions, none of them zero.
    pub shape: Vec<usize>,
    /// Bytes from the start of the tensor's file to its data.
    pub offset: u64,
    /// Bytes of its data.
    pub bytes: u64,
    /// Index of the file that holds it: 0 unless the model is split.
    pub part: usize,
}

/// A validated header.
pub(crate) struct Header {
    pub version: u32,
    pub metadata: Metadata,
    pub tensors: Vec<TensorInfo>,
}

/// Reads the header of `bytes`, a whole file called `file`, which is part number `part` of its model.
pub(crate) fn parse(file: &str, bytes: &[u8], part: usize) -> Result<Header, GgufError> {
    check_magic(file, bytes)?;
    let mut cursor = Cursor::new(file, bytes, MAGIC.len());
    let version = cursor.u32("version")?;
    check_version(file, version)?;
    let tensor_count_offset = cursor.offset();
    let tensor_count = cursor.count("tensor_count", MIN_TENSOR_INFO_BYTES, limits::TENSORS)?;
    let entry_count = cursor.count(
        "metadata_kv_count",
        MIN_ENTRY_BYTES,
        limits::METADATA_ENTRIES,
    )?;

    let mut entries = Vec::with_capacity(entry_count);
    let mut alignment = DEFAULT_ALIGNMENT;
    let mut first_with_key = HashMap::with_capacity(entry_count);
    for index in 0..entry_count {
        let (key, value) = parse_entry(&mut cursor, index, &mut first_with_key, &mut alignment)?;
        entries.push((key, value));
    }
    // The metadata may have eaten the bytes that the tensors' count was checked against.
    let tensor_count = cursor.check_count(
        tensor_count as u64,
        "tensor_count",
        tensor_count_offset,
        MIN_TENSOR_INFO_BYTES,
        limits::TENSORS,
    )?;
    let tensors = parse_tensors(
        &mut cursor,
        tensor_count,
        alignment,
        bytes.len() as u64,
        part,
    )?;
    Ok(Header {
        version,
        metadata: Metadata::from_entries(file, entries)?,
        tensors,
    })
}

fn check_magic(file: &str, bytes: &[u8]) -> Result<(), GgufError> {
    if bytes.is_empty() {
        return Err(GgufError::Empty {
            file: file.to_owned(),
        });
    }
    if bytes.starts_with(MAGIC) {
        return Ok(());
    }
    let start = &bytes[..bytes.len().min(64)];
    let is_text = start
        .iter()
        .all(|&byte| byte >= b' ' || matches!(byte, b'\n' | b'\r' | b'\t' | 0x0c));
    let hint = if start.starts_with(b"version https://git-lfs") {
        "it is a Git LFS pointer; run `git lfs pull` to get the file itself".to_owned()
    } else if [b"lmgg", b"fmgg", b"tjgg"]
        .iter()
        .any(|magic| start.starts_with(*magic))
    {
        "it is in a GGML format from before GGUF; download a GGUF file of the model".to_owned()
    } else if start.starts_with(b"PK") {
        "it is a zip archive or PyTorch checkpoint; convert the model with llama.cpp's convert_hf_to_gguf.py".to_owned()
    } else if start.get(8) == Some(&b'{') {
        "it looks like a safetensors file; convert the model with llama.cpp's convert_hf_to_gguf.py"
            .to_owned()
    } else if start.first() == Some(&b'<') && is_text {
        "it is a web page, probably an error from a download; download the model again".to_owned()
    } else if is_text {
        "it is a text file; name the model's .gguf file".to_owned()
    } else {
        format!(
            "it starts with the bytes {:02x?}, not with `GGUF`; name the model's .gguf file",
            &start[..start.len().min(4)]
        )
    };
    Err(GgufError::NotGguf {
        file: file.to_owned(),
        hint,
    })
}

fn check_version(file: &str, version: u32) -> Result<(), GgufError> {
    let hint = match version {
        2 | 3 => return Ok(()),
        1 => {
            "convert the original model again with a current llama.cpp, or download a newer GGUF file of it"
        }
        _ if version & 0xffff == 0 && version != 0 => {
            return Err(GgufError::BigEndian {
                file: file.to_owned(),
            });
        }
        _ => "update this program, or check that the file is not damaged",
    };
    Err(GgufError::UnsupportedVersion {
        file: file.to_owned(),
        version,
        hint,
    })
}

/// One metadata entry; notes its key, and the alignment when it is the one that states it.
fn parse_entry(
    cursor: &mut Cursor<'_>,
    index: usize,
    first_with_key: &mut HashMap<String, usize>,
    alignment: &mut u64,
) -> Result<(String, Value), GgufError> {
    let offset = cursor.offset();
    let field = format_args!("metadata[{index}].key");
    let key = cursor.string(field, limits::KEY_BYTES)?;
    if key.is_empty() {
        return Err(GgufError::InvalidValue {
            place: cursor.place(field, offset),
            found: "empty".to_owned(),
            expected: "a key".to_owned(),
        });
    }
    match first_with_key.entry(key.clone()) {
        Entry::Occupied(first) => {
            return Err(GgufError::DuplicateKey {
                place: cursor.place(field, offset),
                key,
                first: *first.get(),
            });
        }
        Entry::Vacant(slot) => slot.insert(index),
    };
    let offset = cursor.offset();
    let field = format_args!("metadata[{index}] `{}`", shown(&key));
    let value = cursor.value(field)?;
    if key == ALIGNMENT_KEY {
        *alignment = check_alignment(&value, cursor.place(field, offset))?;
    }
    Ok((key, value))
}

fn check_alignment(value: &Value, place: Place) -> Result<u64, GgufError> {
    valid_alignment(value).ok_or_else(|| GgufError::InvalidValue {
        place,
        found: value.describe(),
        expected: format!("a power of two up to {}", limits::ALIGNMENT),
    })
}

/// The alignment that a value of [`ALIGNMENT_KEY`] states, if it can be one.
pub(crate) fn valid_alignment(value: &Value) -> Option<u64> {
    let alignment = u64::try_from(value.as_integer()?).ok()?;
    (alignment.is_power_of_two() && alignment <= limits::ALIGNMENT).then_some(alignment)
}

/// All tensor infos, with their offsets made absolute and checked against the file and each other.
fn parse_tensors(
    cursor: &mut Cursor<'_>,
    count: usize,
    alignment: u64,
    file_size: u64,
    part: usize,
) -> Result<Vec<TensorInfo>, GgufError> {
    let mut tensors = Vec::with_capacity(count);
    let mut offset_fields = Vec::with_capacity(count);
    let mut first_with_name = HashMap::with_capacity(count);
    for index in 0..count {
        let offset = cursor.offset();
        let (tensor, offset_field) = parse_tensor(cursor, index, alignment, part)?;
        match first_with_name.entry(tensor.name.clone()) {
            Entry::Occupied(first) => {
                let place = cursor.place(format_args!("tensor_infos[{index}].name"), offset);
                return Err(GgufError::DuplicateTensor {
                    place,
                    name: tensor.name,
                    first: *first.get(),
                });
            }
            Entry::Vacant(slot) => slot.insert(index),
        };
        tensors.push(tensor);
        offset_fields.push(offset_field);
    }
    let data_start = cursor.offset().next_multiple_of(alignment);
    let place = |index: usize| {
        cursor.place(
            format_args!("tensor_infos[{index}].offset"),
            offset_fields[index],
        )
    };
    for (index, tensor) in tensors.iter_mut().enumerate() {
        let start = data_start.checked_add(tensor.offset);
        let end = start.and_then(|start| start.checked_add(tensor.bytes));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_size => tensor.offset = start,
            _ => {
                return Err(GgufError::TensorOutOfRange {
                    place: place(index),
                    tensor: tensor.name.clone(),
                    end: end.unwrap_or(u64::MAX),
                    file_size,
                });
            }
        }
    }
    check_overlaps(&tensors, place)?;
    Ok(tensors)
}

fn check_overlaps(tensors: &[TensorInfo], place: impl Fn(usize) -> Place) -> Result<(), GgufError> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    order.sort_by_key(|&index| tensors[index].offset);
    for pair in order.windows(2) {
        let (first, second) = (&tensors[pair[0]], &tensors[pair[1]]);
        let end = first.offset + first.bytes;
        if second.offset < end {
            return Err(GgufError::OverlappingTensors {
                place: place(pair[1]),
                tensor: second.name.clone(),
                start: second.offset,
                other: first.name.clone(),
                end,
            });
        }
    }
    Ok(())
}

/// A field of a tensor info; put into words only when an error names it.
struct InfoField {
    index: usize,
    name: &'static str,
}

impl fmt::Display for InfoField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tensor_infos[{}].{}", self.index, self.name)
    }
}

/// One tensor info, its offset still relative to the data; also where the offset field stands in the file.
fn parse_tensor(
    cursor: &mut Cursor<'_>,
    index: usize,
    alignment: u64,
    part: usize,
) -> Result<(TensorInfo, u64), GgufError> {
    let start = cursor.offset();
    let field = |name| InfoField { index, name };
    let name = cursor.string(field("name"), limits::TENSOR_NAME_BYTES)?;
    if name.is_empty() {
        return Err(GgufError::InvalidValue {
            place: cursor.place(field("name"), start),
            found: "empty".to_owned(),
            expected: "a name".to_owned(),
        });
    }
    let shape_start = cursor.offset();
    let (shape, elements) = parse_shape(cursor, field)?;

    let offset = cursor.offset();
    let id = cursor.u32(field("type"))?;
    let Some(ty) = GgmlType::from_id(id) else {
        return Err(GgufError::UnsupportedType {
            place: cursor.place(field("type"), offset),
            tensor: name,
            id,
        });
    };
    if !shape[0].is_multiple_of(ty.block_len()) {
        return Err(GgufError::InvalidValue {
            place: cursor.place(field("dimensions[0]"), shape_start + 4),
            found: format!(
                "{} elements a row for tensor `{}` of type {ty}",
                shape[0],
                shown(&name)
            ),
            expected: format!("a multiple of {}", ty.block_len()),
        });
    }
    let Some(bytes) = ty.row_bytes(elements) else {
        return Err(product_overflow(
            cursor.place(field("dimensions"), shape_start),
            &shape,
        ));
    };

    let offset = cursor.offset();
    let data_offset = cursor.u64(field("offset"))?;
    if !data_offset.is_multiple_of(alignment) {
        return Err(GgufError::InvalidValue {
            place: cursor.place(field("offset"), offset),
            found: data_offset.to_string(),
            expected: format!("a multiple of the alignment, {alignment}"),
        });
    }
    Ok((
        TensorInfo {
            name,
            ty,
            shape,
            offset: data_offset,
            bytes: bytes as u64,
            part,
        },
        offset,
    ))
}

/// The dimensions and their product.
fn parse_shape(
    cursor: &mut Cursor<'_>,
    field: impl Fn(&'static str) -> InfoField,
) -> Result<(Vec<usize>, usize), GgufError> {
    let start = cursor.offset();
    let rank = cursor.u32(field("n_dimensions"))?;
    if rank == 0 || rank > limits::DIMENSIONS {
        return Err(GgufError::InvalidValue {
            place: cursor.place(field("n_dimensions"), start),
            found: rank.to_string(),
            expected: format!("1 to {}", limits::DIMENSIONS),
        });
    }
    let mut shape = Vec::with_capacity(rank as usize);
    for axis in 0..rank {
        let offset = cursor.offset();
        let axis_field = format_args!("{}[{axis}]", field("dimensions"));
        let length = cursor.u64(axis_field)?;
        match usize::try_from(length) {
            Ok(length) if length > 0 && isize::try_from(length).is_ok() => shape.push(length),
            _ => {
                return Err(GgufError::InvalidValue {
                    place: cursor.place(axis_field, offset),
                    found: length.to_string(),
                    expected: format!("1 to {}", isize::MAX),
                });
            }
        }
    }
    let elements = shape
        .iter()
        .try_fold(1_usize, |product, &length| product.checked_mul(length));
    match elements.filter(|&elements| isize::try_from(elements).is_ok()) {
        Some(elements) => Ok((shape, elements)),
        None => Err(product_overflow(
            cursor.place(field("dimensions"), start),
            &shape,
        )),
    }
}

fn product_overflow(place: Place, shape: &[usize]) -> GgufError {
    GgufError::InvalidValue {
        place,
        found: format!("{shape:?}, whose product overflows"),
        expected: format!("at most {} elements and bytes", isize::MAX),
    }
}
