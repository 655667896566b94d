//! Random blocks for tests and benchmarks.

use crate::GgmlType;

/// SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    /// Uniform in `low..high`.
    fn float(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * ((self.next() >> 40) as f32 / (1_u64 << 24) as f32)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let random = self.next().to_le_bytes();
            chunk.copy_from_slice(&random[..chunk.len()]);
        }
    }
}

/// `n_blocks` random blocks of a type, the same for the same seed: for tests and benchmarks.
///
/// All bits of the elements are random; scales and floats are finite and of the size that weights have, so that the
/// elements are around -1 to 1. The stored sums of Q8_1 and Q8_K are right.
pub fn random_blocks(ty: GgmlType, n_blocks: usize, seed: u64) -> Vec<u8> {
    let mut random = SplitMix(seed ^ u64::from(ty.id()).rotate_left(48));
    let mut bytes = vec![0; n_blocks * ty.block_bytes()];
    random.fill(&mut bytes);
    bytes
        .chunks_exact_mut(ty.block_bytes())
        .for_each(|block| set_scales(ty, block, &mut random));
    bytes
}

/// Replaces a block's scales by ordinary ones.
fn set_scales(ty: GgmlType, block: &mut [u8], random: &mut SplitMix) {
    let mut half_at = |at: usize, largest: f32| {
        let scale = half::f16::from_f32(random.float(largest / 4.0, largest));
        block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
        scale.to_f32()
    };
    match ty {
        GgmlType::F32 => block.copy_from_slice(&random.float(-1.0, 1.0).to_le_bytes()),
        GgmlType::F16 => {
            block.copy_from_slice(&half::f16::from_f32(random.float(-1.0, 1.0)).to_le_bytes())
        }
        GgmlType::BF16 => {
            block.copy_from_slice(&half::bf16::from_f32(random.float(-1.0, 1.0)).to_le_bytes())
        }
        GgmlType::F64 => block.copy_from_slice(&f64::from(random.float(-1.0, 1.0)).to_le_bytes()),
        GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64 | GgmlType::F8_E4M3 => {}
        GgmlType::Q4_0 => _ = half_at(0, 1.0 / 8.0),
        GgmlType::Q5_0 => _ = half_at(0, 1.0 / 16.0),
        GgmlType::Q4_1 | GgmlType::Q5_1 => {
            half_at(
                0,
                if ty == GgmlType::Q4_1 {
                    2.0 / 15.0
                } else {
                    2.0 / 31.0
                },
            );
            half_at(2, 1.0);
            // The minimum is negative.
            block[3] |= 0x80;
        }
        GgmlType::Q8_0 => _ = half_at(0, 1.0 / 128.0),
        GgmlType::Q8_1 => {
            let d = half_at(0, 1.0 / 128.0);
            let sum: i32 = block[4..].iter().map(|&q| i32::from(q as i8)).sum();
            block[2..4].copy_from_slice(&half::f16::from_f32(d * sum as f32).to_le_bytes());
        }
        GgmlType::Q2_K => {
            half_at(80, 2.0 / (3.0 * 15.0));
            half_at(82, 1.0 / 15.0);
        }
        GgmlType::Q3_K => _ = half_at(108, 1.0 / (4.0 * 32.0)),
        GgmlType::Q4_K | GgmlType::Q5_K => {
            half_at(
                0,
                if ty == GgmlType::Q4_K {
                    2.0 / (15.0 * 63.0)
                } else {
                    2.0 / (31.0 * 63.0)
                },
            );
            half_at(2, 1.0 / 63.0);
        }
        GgmlType::Q6_K => _ = half_at(208, 1.0 / (32.0 * 128.0)),
        GgmlType::Q8_K => {
            block[..4].copy_from_slice(&random.float(0.002, 1.0 / 128.0).to_le_bytes());
            for group in 0..16 {
                let sum: i16 = block[4 + 16 * group..][..16]
                    .iter()
                    .map(|&q| i16::from(q as i8))
                    .sum();
                block[260 + 2 * group..][..2].copy_from_slice(&sum.to_le_bytes());
            }
        }
        GgmlType::IQ2_XXS | GgmlType::IQ2_XS | GgmlType::IQ2_S => {
            _ = half_at(0, 1.0 / (4.0 * 43.0))
        }
        GgmlType::IQ3_XXS => _ = half_at(0, 1.0 / (8.0 * 62.0)),
        GgmlType::IQ3_S => _ = half_at(0, 1.0 / (31.0 * 15.0)),
        GgmlType::IQ1_S => _ = half_at(0, 1.0 / 15.0),
        GgmlType::IQ1_M => {
            let bits = half::f16::from_f32(random.float(1.0 / 60.0, 1.0 / 15.0)).to_bits();
            for word in 0..4 {
                let top = (bits >> (4 * word) & 15) as u8;
                let byte = &mut block[48 + 2 * word + 1];
                *byte = *byte & 15 | top << 4;
            }
        }
        GgmlType::IQ4_NL => _ = half_at(0, 1.0 / 127.0),
        GgmlType::IQ4_XS => _ = half_at(0, 1.0 / (32.0 * 127.0)),
        GgmlType::TQ1_0 => _ = half_at(52, 1.0),
        GgmlType::TQ2_0 => _ = half_at(64, 1.0),
        // Powers of two from 1/64 to 1/8 on doubled levels up to 12.
        GgmlType::MXFP4 => block[0] = 122 + (block[0] & 3),
    }
}
