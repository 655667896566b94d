//! Ternary blocks of 256.

use super::exactly;
use super::k_quants::two_bits;
use crate::GgmlType;
use crate::blocks::{Block, BlockTQ1_0, BlockTQ2_0, QK_K};

/// Five base-3 digits in a byte, as a fraction of 256: multiplying by a power of three moves a digit to the
/// front, where `* 3 / 256` reads it.
fn digits(bytes: &[u8], d: f32, out: &mut [f32]) {
    const POWERS: [u8; 5] = [1, 3, 9, 27, 81];
    for (out, power) in out.chunks_exact_mut(bytes.len()).zip(POWERS) {
        for (out, &byte) in out.iter_mut().zip(bytes) {
            let digit = (u16::from(byte.wrapping_mul(power)) * 3) >> 8;
            *out = d * (f32::from(digit) - 1.0);
        }
    }
}

impl Block for BlockTQ1_0 {
    const TYPE: GgmlType = GgmlType::TQ1_0;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let out = exactly::<QK_K>(out);
        digits(&self.qs[..32], d, &mut out[..160]);
        digits(&self.qs[32..], d, &mut out[160..240]);
        digits(&self.qh, d, &mut out[240..]);
    }
}

impl Block for BlockTQ2_0 {
    const TYPE: GgmlType = GgmlType::TQ2_0;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        for (index, out) in exactly::<QK_K>(out).iter_mut().enumerate() {
            *out = d * (f32::from(two_bits(&self.qs, index)) - 1.0);
        }
    }
}
