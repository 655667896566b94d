//! The reference dequantiser.

use crate::{GgmlType, GgufError};

pub fn dequantize_row(ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<(), GgufError> {
    let _ = (ty, bytes, out);
    Ok(())
}
