//! The reference dequantiser: bit for bit what the Python package `gguf` computes, in the same order of
//! operations.

mod code_book;
mod k_quants;
mod legacy;
mod ternary;

use crate::blocks::{self, Block};
use crate::{GgmlType, GgufError};

/// Converts elements of type `ty` to single precision: `bytes` holds the blocks of `out.len()` elements.
///
/// This is the reference that kernels are tested against. Block types come out bit for bit as from the Python
/// package `gguf`; integers and doubles are rounded to the nearest single-precision number.
///
/// # Errors
/// [`GgufError::InvalidShape`] when `out` is not a whole number of blocks, [`GgufError::WrongByteCount`] when
/// `bytes` does not have the length that goes with it.
pub fn dequantize_row(ty: GgmlType, bytes: &[u8], out: &mut [f32]) -> Result<(), GgufError> {
    let expected = crate::tensor::shape_bytes("row to dequantise", ty, &[out.len()])?;
    if bytes.len() != expected {
        return Err(GgufError::WrongByteCount {
            name: "row to dequantise".to_owned(),
            ty,
            shape: vec![out.len()],
            expected,
            found: bytes.len(),
        });
    }
    match ty {
        GgmlType::F32 => numbers(bytes, out, f32::from_le_bytes),
        GgmlType::F16 => numbers(bytes, out, |element| {
            half::f16::from_le_bytes(element).to_f32()
        }),
        GgmlType::BF16 => numbers(bytes, out, |[low, high]| {
            f32::from_le_bytes([0, 0, low, high])
        }),
        GgmlType::F64 => numbers(bytes, out, |element| f64::from_le_bytes(element) as f32),
        GgmlType::I8 => numbers(bytes, out, |element| f32::from(i8::from_le_bytes(element))),
        GgmlType::I16 => numbers(bytes, out, |element| f32::from(i16::from_le_bytes(element))),
        GgmlType::I32 => numbers(bytes, out, |element| i32::from_le_bytes(element) as f32),
        GgmlType::I64 => numbers(bytes, out, |element| i64::from_le_bytes(element) as f32),
        GgmlType::Q4_0 => row::<blocks::BlockQ4_0>(bytes, out),
        GgmlType::Q4_1 => row::<blocks::BlockQ4_1>(bytes, out),
        GgmlType::Q5_0 => row::<blocks::BlockQ5_0>(bytes, out),
        GgmlType::Q5_1 => row::<blocks::BlockQ5_1>(bytes, out),
        GgmlType::Q8_0 => row::<blocks::BlockQ8_0>(bytes, out),
        GgmlType::Q8_1 => row::<blocks::BlockQ8_1>(bytes, out),
        GgmlType::Q2_K => row::<blocks::BlockQ2K>(bytes, out),
        GgmlType::Q3_K => row::<blocks::BlockQ3K>(bytes, out),
        GgmlType::Q4_K => row::<blocks::BlockQ4K>(bytes, out),
        GgmlType::Q5_K => row::<blocks::BlockQ5K>(bytes, out),
        GgmlType::Q6_K => row::<blocks::BlockQ6K>(bytes, out),
        GgmlType::Q8_K => row::<blocks::BlockQ8K>(bytes, out),
        GgmlType::IQ2_XXS => row::<blocks::BlockIQ2XXS>(bytes, out),
        GgmlType::IQ2_XS => row::<blocks::BlockIQ2XS>(bytes, out),
        GgmlType::IQ2_S => row::<blocks::BlockIQ2S>(bytes, out),
        GgmlType::IQ3_XXS => row::<blocks::BlockIQ3XXS>(bytes, out),
        GgmlType::IQ3_S => row::<blocks::BlockIQ3S>(bytes, out),
        GgmlType::IQ1_S => row::<blocks::BlockIQ1S>(bytes, out),
        GgmlType::IQ1_M => row::<blocks::BlockIQ1M>(bytes, out),
        GgmlType::IQ4_NL => row::<blocks::BlockIQ4NL>(bytes, out),
        GgmlType::IQ4_XS => row::<blocks::BlockIQ4XS>(bytes, out),
        GgmlType::TQ1_0 => row::<blocks::BlockTQ1_0>(bytes, out),
        GgmlType::TQ2_0 => row::<blocks::BlockTQ2_0>(bytes, out),
        GgmlType::MXFP4 => row::<blocks::BlockMXFP4>(bytes, out),
        GgmlType::F8_E4M3 => {
            return Err(GgufError::InvalidShape {
                name: "row to dequantise".to_owned(),
                ty,
                shape: vec![out.len()],
                reason: "its scales are apart from its elements; use the tensor's `to_f32`"
                    .to_owned(),
            });
        }
    }
    Ok(())
}

fn row<B: Block>(bytes: &[u8], out: &mut [f32]) {
    let blocks = bytemuck::cast_slice::<u8, B>(bytes);
    for (block, out) in blocks.iter().zip(out.chunks_exact_mut(B::TYPE.block_len())) {
        block.dequantize(out);
    }
}

fn numbers<const N: usize>(bytes: &[u8], out: &mut [f32], convert: impl Fn([u8; N]) -> f32) {
    for (&element, out) in bytes.as_chunks::<N>().0.iter().zip(out) {
        *out = convert(element);
    }
}

/// The block's elements as an array, so that loops over them need no bounds checks.
fn exactly<const N: usize>(out: &mut [f32]) -> &mut [f32; N] {
    out.try_into().expect("the output is one block long")
}

/// Writes `value(i, q)` for every element `i`, where the 4-bit numbers `q` are packed as in the types with
/// 32 elements: the low halves of 16 bytes, then the high halves.
fn nibbles(qs: &[u8; 16], out: &mut [f32; 32], value: impl Fn(usize, u8) -> f32) {
    for (index, &byte) in qs.iter().enumerate() {
        out[index] = value(index, byte & 15);
        out[index + 16] = value(index + 16, byte >> 4);
    }
}
