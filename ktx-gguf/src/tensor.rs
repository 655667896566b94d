//! A tensor's bytes with their type and shape.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use crate::fp8::{self, BlockScales};
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
    scales: Option<Scales>,
}

/// Scales of 8-bit floats, as [`BlockScales`] has them.
#[derive(Clone)]
struct Scales {
    storage: Arc<Storage>,
    range: Range<usize>,
    /// Shape of the whole matrix: columns, rows.
    shape: [usize; 2],
    /// The row of the whole matrix that is the tensor's first.
    first_row: usize,
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
            scales: None,
        }
    }

    /// This tensor, of type F8_E4M3, with the scales in `range` of `storage`; an error text when the tensor is no
    /// matrix or the scales are not as many as it takes.
    pub(crate) fn with_scales(
        mut self,
        storage: Arc<Storage>,
        range: Range<usize>,
    ) -> Result<Self, String> {
        let &[cols, rows] = &*self.shape else {
            return Err(format!(
                "has {} dimensions and block scales",
                self.shape.len()
            ));
        };
        if BlockScales::new(rows, cols, &storage.bytes()[range.clone()]).is_none() {
            return Err(format!(
                "of {rows} rows and {cols} columns takes scales for {} x {} blocks of 128 x 128",
                rows.div_ceil(fp8::BLOCK),
                cols.div_ceil(fp8::BLOCK)
            ));
        }
        self.scales = Some(Scales {
            storage,
            range,
            shape: [cols, rows],
            first_row: 0,
        });
        Ok(self)
    }

    /// A matrix of 8-bit floats (E4M3) in memory of its own, with a scale for each block of 128 x 128; the shape is
    /// `[cols, rows]`.
    ///
    /// # Errors
    /// [`GgufError::WrongByteCount`] when there are not as many codes as the shape says,
    /// [`GgufError::InvalidShape`] when it is no matrix or has another number of blocks than there are scales.
    pub fn from_fp8(
        name: &str,
        shape: &[usize],
        codes: Vec<u8>,
        scales: Vec<f32>,
    ) -> Result<Self, GgufError> {
        let range = 0..size_of_val(scales.as_slice());
        Self::owned(name, GgmlType::F8_E4M3, shape, codes)?
            .with_scales(Arc::new(Storage::F32(scales)), range)
            .map_err(|reason| GgufError::InvalidShape {
                name: name.to_owned(),
                ty: GgmlType::F8_E4M3,
                shape: shape.to_vec(),
                reason,
            })
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
    /// [`GgufError::InvalidShape`] when rows are not whole blocks, the size overflows or the type has scales apart,
    /// [`GgufError::WrongByteCount`] when `bytes` is not as long as type and shape say.
    pub fn from_bytes(
        name: &str,
        ty: GgmlType,
        shape: &[usize],
        bytes: Vec<u8>,
    ) -> Result<Self, GgufError> {
        if ty == GgmlType::F8_E4M3 {
            return Err(GgufError::InvalidShape {
                name: name.to_owned(),
                ty,
                shape: shape.to_vec(),
                reason: "its scales are missing; use `from_fp8`".to_owned(),
            });
        }
        Self::owned(name, ty, shape, bytes)
    }

    fn owned(name: &str, ty: GgmlType, shape: &[usize], bytes: Vec<u8>) -> Result<Self, GgufError> {
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

    /// The scales of 8-bit floats; `None` for all other types.
    pub fn scales(&self) -> Option<BlockScales<'_>> {
        let scales = self.scales.as_ref()?;
        let [cols, rows] = scales.shape;
        let bytes = &scales.storage.bytes()[scales.range.clone()];
        Some(BlockScales::new(rows, cols, bytes)?.from_row(scales.first_row))
    }

    /// Bytes that the tensor takes in its file, scales included.
    pub fn size(&self) -> u64 {
        let scales = self.scales.as_ref().map_or(0, |scales| scales.range.len());
        (self.range.len() + scales) as u64
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
            scales: self.scales.clone(),
        }
    }

    /// As [`Self::view`], where the view begins with row `row`.
    fn view_from_row(&self, row: usize, shape: &[usize], range: Range<usize>) -> Self {
        let mut view = self.view(shape, range);
        if let Some(scales) = &mut view.scales {
            scales.first_row += row;
        }
        view
    }

    /// Entry `index` of the last (outermost) dimension, one expert for example; it keeps the name and loses the
    /// dimension. `None` when there is no such entry, or only one dimension.
    pub fn slice(&self, index: usize) -> Option<Self> {
        let (&count, inner) = self.shape.split_last()?;
        if index >= count || inner.is_empty() {
            return None;
        }
        let (bytes, rows) = (self.range.len() / count, self.rows() / count);
        Some(self.view_from_row(index * rows, inner, index * bytes..(index + 1) * bytes))
    }

    /// Rows `start..end` of all rows, as a tensor of shape `[row_len, end - start]`. `None` when there are no such
    /// rows.
    pub fn rows_range(&self, start: usize, end: usize) -> Option<Self> {
        if start > end || end > self.rows() {
            return None;
        }
        let row = self.row_bytes();
        Some(self.view_from_row(
            start,
            &[self.row_len(), end - start],
            start * row..end * row,
        ))
    }

    /// The same bytes under another shape with as many elements. `None` when the number differs or a row of the
    /// new shape is not a whole number of blocks; nor for 8-bit floats, whose blocks have two dimensions.
    pub fn reshape(&self, shape: &[usize]) -> Option<Self> {
        let elements = shape
            .iter()
            .try_fold(1_usize, |product, &length| product.checked_mul(length))?;
        let row = shape.first().copied()?;
        let fits = self.scales.is_none() || shape == self.shape();
        if elements != self.elements() || !fits || !row.is_multiple_of(self.ty.block_len()) {
            return None;
        }
        Some(self.view(shape, 0..self.range.len()))
    }

    /// The same tensor with its bytes at another place, which has exactly these.
    pub(crate) fn moved_to(&self, storage: Arc<Storage>) -> Self {
        Self {
            range: 0..self.range.len(),
            storage,
            ..self.clone()
        }
    }

    /// Tells the system that this process needs the tensor's part of a mapped file no longer in memory, for example
    /// after a copy was made ([`crate::HugePages`]). Reading it stays possible, and reads the file again.
    pub fn release(&self) {
        self.storage.release(self.range.clone());
    }

    /// All elements in single precision, row after row, by the reference dequantiser.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.elements()];
        if let Some(scales) = self.scales() {
            let cols = self.row_len().max(1);
            let rows = self.bytes().chunks(cols).zip(values.chunks_mut(cols));
            for (row, (codes, out)) in rows.enumerate() {
                scales.dequantize(row, 0, codes, out);
            }
            return values;
        }
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
