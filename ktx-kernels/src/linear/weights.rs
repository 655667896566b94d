use ktx_gguf::fp8::BlockScales;
use ktx_gguf::{GgmlType, Tensor, dequantize_row};

use super::LinearError;

/// A weight matrix `[rows, cols]` in GGUF blocks, row after row, as it lies in the file; or in 8-bit floats with
/// block scales, or in signed bytes.
#[derive(Debug, Clone, Copy)]
pub struct WeightRows<'a> {
    pub(crate) ty: GgmlType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bytes: &'a [u8],
    /// Those of 8-bit floats.
    pub(crate) scales: Option<BlockScales<'a>>,
}

impl<'a> WeightRows<'a> {
    /// A matrix of `rows` rows (outputs) of `cols` columns (inputs). `bytes` needs no alignment.
    ///
    /// # Errors
    /// [`LinearError`] when the type holds no weights, a row is not a whole number of blocks, or
    /// `bytes` has another size.
    pub fn new(
        ty: GgmlType,
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
    ) -> Result<Self, LinearError> {
        if !is_weight_type(ty) {
            return Err(LinearError::UnsupportedType { ty });
        }
        Self::sized(ty, rows, cols, bytes)
    }

    /// A matrix of 8-bit floats (E4M3), one byte each, times their blocks' scales. Products keep `f32` activations.
    ///
    /// # Errors
    /// [`LinearError`] when `bytes` has another size, or the scales are those of another matrix.
    pub fn fp8(
        rows: usize,
        cols: usize,
        bytes: &'a [u8],
        scales: BlockScales<'a>,
    ) -> Result<Self, LinearError> {
        let codes = Self::sized(GgmlType::F8_E4M3, rows, cols, bytes)?;
        if !scales.covers(rows, cols) {
            return Err(LinearError::Scales { rows, cols });
        }
        Ok(Self {
            scales: Some(scales),
            ..codes
        })
    }

    /// A matrix of signed bytes that stand for themselves: scales are the caller's. Products keep `f32` activations.
    ///
    /// # Errors
    /// [`LinearError::WeightBytes`] when `codes` has another size.
    pub fn signed_bytes(rows: usize, cols: usize, codes: &'a [i8]) -> Result<Self, LinearError> {
        Self::sized(GgmlType::I8, rows, cols, bytemuck::cast_slice(codes))
    }

    /// The matrix of a tensor that is one, or of all its rows together.
    ///
    /// # Errors
    /// As [`WeightRows::new`].
    pub fn of(tensor: &'a Tensor) -> Result<Self, LinearError> {
        let (rows, cols) = (tensor.rows(), tensor.row_len());
        match tensor.scales() {
            Some(scales) => Self::fp8(rows, cols, tensor.bytes(), scales),
            None => Self::new(tensor.ty(), rows, cols, tensor.bytes()),
        }
    }

    fn sized(ty: GgmlType, rows: usize, cols: usize, bytes: &'a [u8]) -> Result<Self, LinearError> {
        let row_bytes = ty.row_bytes(cols).ok_or(LinearError::PartialBlock {
            ty,
            cols,
            block: ty.block_len(),
        })?;
        if row_bytes.checked_mul(rows) != Some(bytes.len()) {
            return Err(LinearError::WeightBytes {
                ty,
                rows,
                cols,
                actual: bytes.len(),
            });
        }
        Ok(Self {
            ty,
            rows,
            cols,
            bytes,
            scales: None,
        })
    }

    /// Rows `start` to `start + count`; `None` when there are not so many.
    pub fn rows_range(&self, start: usize, count: usize) -> Option<Self> {
        let end = start.checked_add(count).filter(|end| *end <= self.rows)?;
        let row = self.row_bytes();
        Some(Self {
            rows: count,
            bytes: self.bytes.get(start * row..end * row)?,
            scales: self.scales.map(|scales| scales.from_row(start)),
            ..*self
        })
    }

    /// Row `row` in single precision; `None` when there is none, or `out` is not `cols` long.
    pub fn dequantize(&self, row: usize, out: &mut [f32]) -> Option<()> {
        let bytes = self.rows_range(row, 1)?.bytes;
        if out.len() != self.cols {
            return None;
        }
        match self.scales {
            Some(scales) => {
                scales.dequantize(row, 0, bytes, out);
                Some(())
            }
            None => dequantize_row(self.ty, bytes, out).ok(),
        }
    }

    /// The blocks' type.
    pub fn ty(&self) -> GgmlType {
        self.ty
    }

    /// Number of rows: results per token.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns: values per token.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The blocks.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The blocks from row `row` on.
    pub(crate) fn bytes_from(&self, row: usize) -> &'a [u8] {
        self.bytes.get(row * self.row_bytes()..).unwrap_or_default()
    }

    /// Bytes of one row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.bytes.len().checked_div(self.rows).unwrap_or(0)
    }
}

pub(crate) fn is_weight_type(ty: GgmlType) -> bool {
    use GgmlType::{BF16, F16, F32, Q8_1};
    matches!(ty, F32 | F16 | BF16) || (ty.is_quantized() && ty != Q8_1)
}
