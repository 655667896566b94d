//! A tensor's bytes with their type and shape.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::storage::Storage;
use crate::{GgmlType, GgufError, dequantize_row};

/// A tensor: name, type, shape and bytes.
///
/// Cheap to clone; it keeps the mapped file (or the memory) that it points into alive, so operators can hold it
/// for as long as they like. The bytes are not aligned to the element type.
#[derive(Clone)]
pub struct Tensor {
    name: Arc<str>,
    ty: GgmlType,
    shape: Arc<[usize]>,
    storage: Arc<Storage>,
    range: Range<usize>,
}

impl Tensor {
    /// `range` has to lie in `storage` and to be as long as `ty` and `shape` say.
    pub(crate) fn in_storage(
        name: &str,
        ty: GgmlType,
        shape: &[usize],
        storage: Arc<Storage>,
        range: Range<usize>,
    ) -> Self {
        Self {
            name: name.into(),
            ty,
            shape: shape.into(),
            storage,
            range,
        }
    }

    /// A tensor in memory of its own, type F32. The shape has the row length first.
    ///
    /// # Panics
    /// When the shape's product is not the number of values.
    pub fn from_f32(name: &str, shape: &[usize], values: Vec<f32>) -> Self {
        let elements = shape
            .iter()
            .try_fold(1_usize, |product, &length| product.checked_mul(length));
        let count = values.len();
        assert!(
            elements == Some(count),
            "{name}: shape {shape:?} does not hold {count} values"
        );
        let range = 0..size_of_val(values.as_slice());
        Self::in_storage(
            name,
            GgmlType::F32,
            shape,
            Arc::new(Storage::F32(values)),
            range,
        )
    }

    /// A tensor in memory of its own. The shape has the row length first.
    ///
    /// # Errors
    /// [`GgufError::InvalidShape`] when rows are not whole blocks or the size overflows,
    /// [`GgufError::WrongByteCount`] when `bytes` is not as long as type and shape say.
    pub fn from_bytes(
        name: &str,
        ty: GgmlType,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> Result<Self, GgufError> {
        let expected = shape_bytes(name, ty, shape)?;
        if bytes.len() != expected {
            return Err(GgufError::WrongByteCount {
                name: name.to_owned(),
                ty,
                shape: shape.to_vec(),
                expected,
                found: bytes.len(),
            });
        }
        let range = 0..bytes.len();
        Ok(Self::in_storage(
            name,
            ty,
            shape,
            Arc::new(Storage::Bytes(bytes)),
            range,
        ))
    }

    /// The name in the file.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The type of the elements.
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// The shape in GGUF's order: row length first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Elements of a row: the first dimension.
    pub fn row_len(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Number of rows: the product of all dimensions but the first.
    pub fn rows(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// The bytes, row after row, little-endian.
    pub fn bytes(&self) -> &[u8] {
        &self.storage.bytes()[self.range.clone()]
    }

    fn row_bytes(&self) -> usize {
        self.row_len() / self.ty.block_len() * self.ty.block_bytes()
    }

    fn view(&self, shape: &[usize], range: Range<usize>) -> Self {
        Self {
            name: Arc::clone(&self.name),
            ty: self.ty,
            shape: shape.into(),
            storage: Arc::clone(&self.storage),
            range: self.range.start + range.start..self.range.start + range.end,
        }
    }

    /// Entry `index` of the last (outermost) dimension, one expert for example; it keeps the name and loses the
    /// dimension. `None` when there is no such entry, or only one dimension.
    pub fn slice(&self, index: usize) -> Option<Self> {
        let (&count, inner) = self.shape.split_last()?;
        if index >= count || inner.is_empty() {
            return None;
        }
        let bytes = self.range.len() / count;
        Some(self.view(inner, index * bytes..(index + 1) * bytes))
    }

    /// Rows `start..end` of all rows, as a tensor of shape `[row_len, end - start]`. `None` when there are no such
    /// rows.
    pub fn rows_range(&self, start: usize, end: usize) -> Option<Self> {
        if start > end || end > self.rows() {
            return None;
        }
        let row = self.row_bytes();
        Some(self.view(&[self.row_len(), end - start], start * row..end * row))
    }

    /// The same bytes under another shape with as many elements. `None` when the number differs or a row of the
    /// new shape is not a whole number of blocks.
    pub fn reshape(&self, shape: &[usize]) -> Option<Self> {
        let elements = shape
            .iter()
            .try_fold(1_usize, |product, &length| product.checked_mul(length))?;
        let row = shape.first().copied()?;
        if elements != self.elements() || !row.is_multiple_of(self.ty.block_len()) {
            return None;
        }
        Some(self.view(shape, 0..self.range.len()))
    }

    /// All elements in single precision, row after row, by the reference dequantiser.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.elements()];
        dequantize_row(self.ty, self.bytes(), &mut values)
            .expect("a tensor's bytes fit its type and shape");
        values
    }
}

/// Bytes of a tensor; an error when no tensor of this type can have this shape.
pub(crate) fn shape_bytes(name: &str, ty: GgmlType, shape: &[usize]) -> Result<usize, GgufError> {
    let invalid = |reason: String| GgufError::InvalidShape {
        name: name.to_owned(),
        ty,
        shape: shape.to_vec(),
        reason,
    };
    let Some(&row) = shape.first() else {
        return Err(invalid("it has no dimensions".to_owned()));
    };
    if !row.is_multiple_of(ty.block_len()) {
        return Err(invalid(format!(
            "a row has to be a multiple of {} elements",
            ty.block_len()
        )));
    }
    shape
        .iter()
        .try_fold(1_usize, |product, &length| product.checked_mul(length))
        .and_then(|elements| ty.row_bytes(elements))
        .filter(|&bytes| isize::try_from(bytes).is_ok())
        .ok_or_else(|| invalid("its size overflows".to_owned()))
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {} {:?})", self.name, self.ty, self.shape)
    }
}
