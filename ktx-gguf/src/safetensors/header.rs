//! The header of one file: parsed strictly, then checked against the file's size.

use std::collections::{BTreeMap, HashSet};
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, Visitor};

use super::{Dtype, TensorEntry};
use crate::{GgufError, error::shown, limits};

const METADATA: &str = "__metadata__";
/// Bytes of the header's length.
const PREFIX: usize = 8;

pub(super) struct Header {
    pub metadata: BTreeMap<String, String>,
    /// In the order of their bytes.
    pub tensors: Vec<TensorEntry>,
}

/// The JSON object as it is written.
struct Written {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Described)>,
}

#[derive(serde::Deserialize)]
struct Described {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Written {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Written;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Written, A::Error> {
                let mut written = Written {
                    metadata: BTreeMap::new(),
                    tensors: Vec::new(),
                };
                let mut names = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if !names.insert(name.clone()) {
                        return Err(A::Error::custom(format!("`{name}` is there twice")));
                    }
                    match name.as_str() {
                        METADATA => written.metadata = map.next_value()?,
                        _ => written.tensors.push((name, map.next_value()?)),
                    }
                }
                Ok(written)
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// Reads and checks the header of `bytes`, a whole file.
pub(super) fn parse(file: &str, bytes: &[u8], part: usize) -> Result<Header, GgufError> {
    let text = text(file, bytes)?;
    let written: Written = serde_json::from_str(text).map_err(|error| {
        let reason = format!("its header does not parse ({})", shown(&error.to_string()));
        not_safetensors(file, reason)
    })?;
    let start = (PREFIX + text.len()) as u64;
    let data = bytes.len() as u64 - start;
    if written.tensors.len() as u64 > limits::TENSORS {
        let reason = format!(
            "it has {} tensors, and {} are allowed",
            written.tensors.len(),
            limits::TENSORS
        );
        return Err(not_safetensors(file, reason));
    }
    let mut tensors = Vec::with_capacity(written.tensors.len());
    for (name, described) in written.tensors {
        tensors.push(entry(file, name, &described, start, data, part)?);
    }
    tensors.sort_by_key(|tensor| (tensor.offset, tensor.bytes));
    no_holes(file, &tensors, start, data)?;
    Ok(Header {
        metadata: written.metadata,
        tensors,
    })
}

fn not_safetensors(file: &str, reason: String) -> GgufError {
    GgufError::NotSafetensors {
        file: file.to_owned(),
        reason,
        hint: "check that the file was downloaded completely",
    }
}

/// The header's JSON text, inside the file and not too long.
fn text<'a>(file: &str, bytes: &'a [u8]) -> Result<&'a str, GgufError> {
    let Some((length, rest)) = bytes.split_first_chunk::<PREFIX>() else {
        return Err(not_safetensors(
            file,
            format!("it has only {} bytes", bytes.len()),
        ));
    };
    let length = u64::from_le_bytes(*length);
    if bytes.starts_with(b"GGUF") {
        return Err(GgufError::NotSafetensors {
            file: file.to_owned(),
            reason: "it is a GGUF file".to_owned(),
            hint: "name it as the model",
        });
    }
    if length > limits::SAFETENSORS_HEADER_BYTES {
        let reason = format!(
            "its header would have {length} bytes, and {} are allowed",
            limits::SAFETENSORS_HEADER_BYTES
        );
        return Err(not_safetensors(file, reason));
    }
    let Some(header) = rest.get(..length as usize) else {
        let reason = format!(
            "its header would have {length} bytes, and {} are left",
            rest.len()
        );
        return Err(not_safetensors(file, reason));
    };
    if header.first() != Some(&b'{') {
        return Err(not_safetensors(
            file,
            "its header does not begin with `{`".to_owned(),
        ));
    }
    std::str::from_utf8(header).map_err(|error| {
        let reason = format!(
            "its header is not valid UTF-8 after {} bytes",
            error.valid_up_to()
        );
        not_safetensors(file, reason)
    })
}

/// One tensor; `start` is where the data begin in the file, `data` how many bytes they are.
fn entry(
    file: &str,
    name: String,
    described: &Described,
    start: u64,
    data: u64,
    part: usize,
) -> Result<TensorEntry, GgufError> {
    let wrong = |reason: String| damaged(file, &name, reason);
    let Some(&dtype) = Dtype::ALL.iter().find(|ty| ty.name() == described.dtype) else {
        let known: Vec<&str> = Dtype::ALL.iter().map(|ty| ty.name()).collect();
        return Err(GgufError::SafetensorsTensor {
            file: file.to_owned(),
            reason: format!(
                "has elements of type `{}`; known are {}",
                shown(&described.dtype),
                known.join(", ")
            ),
            tensor: name,
            hint: "convert it to one of these",
        });
    };
    if described.shape.len() > limits::SAFETENSORS_DIMENSIONS {
        let (found, most) = (described.shape.len(), limits::SAFETENSORS_DIMENSIONS);
        return Err(wrong(format!(
            "has {found} dimensions, and {most} are allowed"
        )));
    }
    let too_large = || {
        wrong(format!(
            "of shape {:?} has more bytes than there are",
            described.shape
        ))
    };
    // Empty dimensions count as one first: the others must not overflow either.
    let all = described
        .shape
        .iter()
        .try_fold(dtype.bytes() as u64, |bytes, &length| {
            bytes.checked_mul(length.max(1))
        })
        .filter(|&bytes| isize::try_from(bytes).is_ok())
        .ok_or_else(too_large)?;
    let bytes = if described.shape.contains(&0) { 0 } else { all };
    let [from, to] = described.data_offsets;
    if from > to || to > data {
        return Err(wrong(format!("is at bytes {from} to {to} of {data}")));
    }
    if to - from != bytes {
        return Err(wrong(format!(
            "is {dtype} of shape {:?}, which is {bytes} bytes, and has {}",
            described.shape,
            to - from
        )));
    }
    let shape = described
        .shape
        .iter()
        .map(|&length| length as usize)
        .collect();
    Ok(TensorEntry {
        name,
        dtype,
        shape,
        offset: start + from,
        bytes,
        part,
    })
}

fn damaged(file: &str, tensor: &str, reason: String) -> GgufError {
    GgufError::SafetensorsTensor {
        file: file.to_owned(),
        tensor: tensor.to_owned(),
        reason,
        hint: "the file is damaged or hostile; download it again",
    }
}

/// Tensors, in the order of their bytes, lie one behind the other and fill the file.
fn no_holes(file: &str, tensors: &[TensorEntry], start: u64, data: u64) -> Result<(), GgufError> {
    let mut end = start;
    for tensor in tensors {
        if tensor.offset != end {
            let what = if tensor.offset < end {
                "overlaps the one before it"
            } else {
                "leaves a hole before it"
            };
            let reason = format!(
                "{what}: it begins at byte {} and not at {}",
                tensor.offset - start,
                end - start
            );
            return Err(damaged(file, &tensor.name, reason));
        }
        end += tensor.bytes;
    }
    if end - start != data {
        let reason = format!("its tensors end at byte {} of {data}", end - start);
        return Err(not_safetensors(file, reason));
    }
    Ok(())
}
