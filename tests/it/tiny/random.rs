//! Deterministic random weights in every tensor type.

use std::f32::consts::TAU;

use ktx_gguf::{GgmlType, dequantize_row, quantize_row, random_blocks};

/// A generator of normally distributed numbers (SplitMix64, Box-Muller).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Uniform in 0 (exclusive) to 1.
    fn uniform(&mut self) -> f32 {
        ((self.next() >> 40) + 1) as f32 / (1_u32 << 24) as f32
    }

    /// `count` numbers around `mean`.
    pub fn normals(&mut self, count: usize, mean: f32, deviation: f32) -> Vec<f32> {
        let mut one = || {
            let radius = (-2.0 * self.uniform().ln()).sqrt();
            mean + deviation * radius * (TAU * self.uniform()).cos()
        };
        (0..count).map(|_| one()).collect()
    }

    /// `count` elements of type `ty` with root mean square `deviation`: quantised normals where there is a
    /// quantiser, else random blocks whose scales are adapted.
    pub fn weights(&mut self, ty: GgmlType, count: usize, deviation: f32) -> Vec<u8> {
        if let Ok(bytes) = quantize_row(ty, &self.normals(count, 0.0, deviation)) {
            return bytes;
        }
        let mut bytes = random_blocks(ty, count / ty.block_len(), self.next());
        if ty == GgmlType::TQ2_0 {
            bytes
                .chunks_exact_mut(ty.block_bytes())
                .for_each(make_ternary);
        }
        let mut values = vec![0.0; count];
        dequantize_row(ty, &bytes, &mut values).expect("whole blocks");
        let mean_square = values.iter().map(|v| v * v).sum::<f32>() / count as f32;
        let factor = deviation / mean_square.sqrt();
        for block in bytes.chunks_exact_mut(ty.block_bytes()) {
            scale_block(ty, block, factor);
        }
        bytes
    }
}

/// Turns the levels 3 of a TQ2_0 block, which no file holds, into 1, so that its elements have mean 0.
fn make_ternary(block: &mut [u8]) {
    for byte in &mut block[..64] {
        let threes = *byte & (*byte >> 1) & 0x55;
        *byte &= !(threes << 1);
    }
}

/// Multiplies a block's elements by `factor` (MXFP4: by the nearest power of two).
fn scale_block(ty: GgmlType, block: &mut [u8], factor: f32) {
    let halves: &[usize] = match ty {
        GgmlType::MXFP4 => {
            let exponent = f32::from(block[0]) + factor.log2().round();
            block[0] = exponent as u8;
            return;
        }
        GgmlType::Q5_1 | GgmlType::Q5_K => &[0, 2],
        GgmlType::Q2_K => &[80, 82],
        GgmlType::Q3_K => &[108],
        GgmlType::TQ1_0 => &[52],
        GgmlType::TQ2_0 => &[64],
        GgmlType::IQ1_M => panic!("IQ1_M keeps its scale in pieces"),
        _ => &[0],
    };
    for &at in halves {
        let half = &mut block[at..at + 2];
        let mut scale = [0.0];
        dequantize_row(GgmlType::F16, half, &mut scale).expect("one element");
        let scaled = quantize_row(GgmlType::F16, &[scale[0] * factor]).expect("one element");
        half.copy_from_slice(&scaled);
    }
}
