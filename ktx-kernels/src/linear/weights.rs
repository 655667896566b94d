use ktx_gguf::GgmlType;

use super::LinearError;

/// A weight matrix `[rows, cols]` in GGUF blocks, row after row, as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct WeightRows<'a> {
    pub(crate) ty: GgmlType,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) bytes: &'a [u8],
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
        })
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

    /// Bytes of one row.
    pub(crate) fn row_bytes(&self) -> usize {
        self.bytes.len().checked_div(self.rows).unwrap_or(0)
    }
}

pub(crate) fn is_weight_type(ty: GgmlType) -> bool {
    use GgmlType::{BF16, F16, F32, Q8_1};
    matches!(ty, F32 | F16 | BF16) || (ty.is_quantized() && ty != Q8_1)
}
