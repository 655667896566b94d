//! Reading header fields with every length checked against the bytes that are left.

use std::fmt;

use crate::limits;
use crate::value::id;
use crate::{Array, GgufError, Place, Value};

/// A position in a file's header.
pub(crate) struct Cursor<'a> {
    file: &'a str,
    bytes: &'a [u8],
    file_size: usize,
    pos: usize,
}

/// Fewest bytes that one element of an array of this type can take; `None` for an unknown type.
fn min_element_bytes(type_id: u32) -> Option<u64> {
    Some(match type_id {
        id::U8 | id::I8 | id::BOOL => 1,
        id::U16 | id::I16 => 2,
        id::U32 | id::I32 | id::F32 => 4,
        id::U64 | id::I64 | id::F64 => 8,
        id::STRING => 8,
        id::ARRAY => 4 + 8,
        _ => return None,
    })
}

impl<'a> Cursor<'a> {
    /// Starts at byte `pos` of `bytes`; the header may not reach beyond [`limits::HEADER_BYTES`].
    pub fn new(file: &'a str, bytes: &'a [u8], pos: usize) -> Self {
        let end = bytes.len().min(limits::HEADER_BYTES);
        Self {
            file,
            bytes: &bytes[..end],
            file_size: bytes.len(),
            pos: pos.min(end),
        }
    }

    /// Bytes from the start of the file.
    pub fn offset(&self) -> u64 {
        self.pos as u64
    }

    fn left(&self) -> u64 {
        (self.bytes.len() - self.pos) as u64
    }

    /// A field of this file, for errors.
    pub fn place(&self, field: impl fmt::Display, offset: u64) -> Place {
        Place {
            file: self.file.to_owned(),
            field: field.to_string(),
            offset,
        }
    }

    /// The error for `needed` bytes that are not left: in the file, or within the header's limit.
    fn too_short(&self, place: Place, needed: u64) -> GgufError {
        let end = self.offset().saturating_add(needed);
        if end > self.file_size as u64 {
            let left = (self.file_size - self.pos) as u64;
            return GgufError::Truncated {
                place,
                needed,
                left,
            };
        }
        let place = Place {
            field: format!("end of {}", place.field),
            ..place
        };
        GgufError::OverLimit {
            place,
            value: end,
            limit: limits::HEADER_BYTES as u64,
        }
    }

    /// The next `count` bytes.
    fn take(&mut self, count: u64, field: impl fmt::Display) -> Result<&'a [u8], GgufError> {
        if count > self.left() {
            return Err(self.too_short(self.place(field, self.offset()), count));
        }
        let start = self.pos;
        self.pos += count as usize;
        Ok(&self.bytes[start..self.pos])
    }

    fn array_of<const N: usize>(&mut self, field: impl fmt::Display) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        bytes.copy_from_slice(self.take(N as u64, field)?);
        Ok(bytes)
    }

    pub fn u32(&mut self, field: impl fmt::Display) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array_of(field)?))
    }

    pub fn u64(&mut self, field: impl fmt::Display) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array_of(field)?))
    }

    /// A count of things that take at least `min_bytes` each, no more than `limit` and than the file can hold.
    pub fn count(
        &mut self,
        field: impl fmt::Display,
        min_bytes: u64,
        limit: u64,
    ) -> Result<usize, GgufError> {
        let offset = self.offset();
        let count = self.u64(&field)?;
        self.check_count(count, field, offset, min_bytes, limit)
    }

    /// Checks a count that was read at `offset` against a limit and the bytes left.
    pub fn check_count(
        &self,
        count: u64,
        field: impl fmt::Display,
        offset: u64,
        min_bytes: u64,
        limit: u64,
    ) -> Result<usize, GgufError> {
        if count > limit {
            return Err(GgufError::OverLimit {
                place: self.place(field, offset),
                value: count,
                limit,
            });
        }
        let needed = count.saturating_mul(min_bytes);
        if needed > self.left() {
            let place = self.place(format_args!("{field} ({count} elements)"), offset);
            return Err(self.too_short(place, needed));
        }
        Ok(count as usize)
    }

    /// A string of at most `limit` bytes.
    pub fn string(&mut self, field: impl fmt::Display, limit: u64) -> Result<String, GgufError> {
        let offset = self.offset();
        let length = self.count(format_args!("{field} (length)"), 1, limit)?;
        let bytes = self.take(length as u64, &field)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(error) => Err(GgufError::InvalidValue {
                place: self.place(field, offset),
                found: format!("not valid UTF-8 after {} bytes", error.valid_up_to()),
                expected: "text in UTF-8".to_owned(),
            }),
        }
    }

    fn bool(&mut self, field: impl fmt::Display) -> Result<bool, GgufError> {
        let offset = self.offset();
        match self.array_of::<1>(&field)?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(GgufError::InvalidValue {
                place: self.place(field, offset),
                found: format!("a boolean of {other}"),
                expected: "0 or 1".to_owned(),
            }),
        }
    }

    fn unknown_type(&self, field: impl fmt::Display, offset: u64, found: u32) -> GgufError {
        GgufError::InvalidValue {
            place: self.place(format_args!("{field} (type)"), offset),
            found: format!("value type {found}"),
            expected: "a type from 0 (u8) to 12 (f64)".to_owned(),
        }
    }

    /// A metadata value with its type in front.
    pub fn value(&mut self, field: impl fmt::Display) -> Result<Value, GgufError> {
        let offset = self.offset();
        let type_id = self.u32(format_args!("{field} (type)"))?;
        Ok(match type_id {
            id::U8 => Value::U8(u8::from_le_bytes(self.array_of(field)?)),
            id::I8 => Value::I8(i8::from_le_bytes(self.array_of(field)?)),
            id::U16 => Value::U16(u16::from_le_bytes(self.array_of(field)?)),
            id::I16 => Value::I16(i16::from_le_bytes(self.array_of(field)?)),
            id::U32 => Value::U32(u32::from_le_bytes(self.array_of(field)?)),
            id::I32 => Value::I32(i32::from_le_bytes(self.array_of(field)?)),
            id::F32 => Value::F32(f32::from_le_bytes(self.array_of(field)?)),
            id::BOOL => Value::Bool(self.bool(field)?),
            id::STRING => Value::String(self.string(field, limits::STRING_BYTES)?),
            id::ARRAY => Value::Array(self.array(&field, 1)?),
            id::U64 => Value::U64(u64::from_le_bytes(self.array_of(field)?)),
            id::I64 => Value::I64(i64::from_le_bytes(self.array_of(field)?)),
            id::F64 => Value::F64(f64::from_le_bytes(self.array_of(field)?)),
            _ => return Err(self.unknown_type(field, offset, type_id)),
        })
    }

    /// An array: element type, count, elements. `depth` is 1 for an array that is not inside another.
    fn array(&mut self, field: &dyn fmt::Display, depth: u64) -> Result<Array, GgufError> {
        let offset = self.offset();
        if depth > limits::ARRAY_DEPTH {
            let place = self.place(format_args!("{field} (depth of nested arrays)"), offset);
            return Err(GgufError::OverLimit {
                place,
                value: depth,
                limit: limits::ARRAY_DEPTH,
            });
        }
        let type_id = self.u32(format_args!("{field} (element type)"))?;
        let Some(min_bytes) = min_element_bytes(type_id) else {
            return Err(self.unknown_type(field, offset, type_id));
        };
        let count = self.count(
            format_args!("{field} (count)"),
            min_bytes,
            limits::ARRAY_ELEMENTS,
        )?;
        Ok(match type_id {
            id::U8 => Array::U8(self.numbers(field, count, u8::from_le_bytes)?),
            id::I8 => Array::I8(self.numbers(field, count, i8::from_le_bytes)?),
            id::U16 => Array::U16(self.numbers(field, count, u16::from_le_bytes)?),
            id::I16 => Array::I16(self.numbers(field, count, i16::from_le_bytes)?),
            id::U32 => Array::U32(self.numbers(field, count, u32::from_le_bytes)?),
            id::I32 => Array::I32(self.numbers(field, count, i32::from_le_bytes)?),
            id::F32 => Array::F32(self.numbers(field, count, f32::from_le_bytes)?),
            id::BOOL => Array::Bool(
                (0..count)
                    .map(|index| self.bool(format_args!("{field}[{index}]")))
                    .collect::<Result<_, _>>()?,
            ),
            id::STRING => {
                let mut texts = Vec::with_capacity(count);
                for index in 0..count {
                    texts
                        .push(self.string(format_args!("{field}[{index}]"), limits::STRING_BYTES)?);
                }
                Array::String(texts)
            }
            id::ARRAY => {
                let mut arrays = Vec::with_capacity(count);
                for index in 0..count {
                    arrays.push(self.array(&format_args!("{field}[{index}]"), depth + 1)?);
                }
                Array::Array(arrays)
            }
            id::U64 => Array::U64(self.numbers(field, count, u64::from_le_bytes)?),
            id::I64 => Array::I64(self.numbers(field, count, i64::from_le_bytes)?),
            _ => Array::F64(self.numbers(field, count, f64::from_le_bytes)?),
        })
    }

    fn numbers<const N: usize, T>(
        &mut self,
        field: impl fmt::Display,
        count: usize,
        from_le_bytes: fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        let bytes = self.take((count as u64).saturating_mul(N as u64), field)?;
        let (elements, _) = bytes.as_chunks::<N>();
        Ok(elements
            .iter()
            .map(|&element| from_le_bytes(element))
            .collect())
    }
}
