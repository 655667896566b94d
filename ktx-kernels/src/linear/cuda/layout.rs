//! How rows of weights lie in a GPU's memory; see `blocks.cuh`.

use ktx_gguf::GgmlType;
use ktx_gguf::GgmlType::{
    BF16, F16, F32, IQ4_NL, IQ4_XS, MXFP4, Q2_K, Q3_K, Q4_0, Q4_1, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K,
    Q8_0,
};

/// Columns of a group.
pub(crate) const GROUP: usize = 32;

/// The planes of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowLayout {
    /// The type that the kernels read: the weights' own, or F16 for types that have no kernels.
    pub(crate) ty: GgmlType,
    /// Bytes of a row.
    pub(crate) bytes: usize,
    /// The byte where its power of two is.
    pub(crate) factor_at: usize,
    /// Bytes of a group in the first plane.
    pub(crate) code_bytes: usize,
}

impl RowLayout {
    /// For rows of `cols` columns of type `ty`.
    pub(crate) fn of(ty: GgmlType, cols: usize) -> Self {
        let ty = if is_native(ty) { ty } else { F16 };
        let groups = cols.div_ceil(GROUP);
        let planes = match ty {
            F32 => 128 * groups,
            F16 | BF16 => 64 * groups,
            _ => groups * GROUP / ty.block_len() * ty.block_bytes(),
        };
        let factor_at = planes.next_multiple_of(4);
        Self {
            ty,
            bytes: (factor_at + 4).next_multiple_of(16),
            factor_at,
            code_bytes: match ty {
                F32 => 128,
                F16 | BF16 => 64,
                Q8_0 => 32,
                Q2_K | Q3_K => 8,
                _ => 16,
            },
        }
    }
}

/// Whether kernels read the type's codes; others become F16 at upload.
pub(crate) fn is_native(ty: GgmlType) -> bool {
    matches!(
        ty,
        F32 | F16
            | BF16
            | Q4_0
            | Q4_1
            | Q5_0
            | Q5_1
            | Q8_0
            | Q2_K
            | Q3_K
            | Q4_K
            | Q5_K
            | Q6_K
            | IQ4_NL
            | IQ4_XS
            | MXFP4
    )
}

/// Whether weights are plain floats, whose activations are never quantised.
pub(crate) fn is_float(ty: GgmlType) -> bool {
    matches!(ty, F32 | F16 | BF16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_aligned_and_lose_less_than_32_bytes() {
        for ty in crate::linear::cases::types() {
            for blocks in [1, 2, 3, 7, 28] {
                let cols = blocks * ty.block_len().max(GROUP);
                let layout = RowLayout::of(ty, cols);
                let own = layout.ty.row_bytes(cols).unwrap();
                assert_eq!(layout.bytes % 16, 0);
                assert_eq!(layout.factor_at % 4, 0);
                assert!((own..own + 4).contains(&layout.factor_at), "{ty}");
                assert!((own + 4..own + 23).contains(&layout.bytes), "{ty}");
            }
        }
    }
}
