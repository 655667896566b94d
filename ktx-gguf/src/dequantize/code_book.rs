//! The IQ types: groups of four or eight elements are entries of a code book, with signs or an offset.

use super::exactly;
use crate::GgmlType;
use crate::blocks::{
    Block, BlockIQ1M, BlockIQ1S, BlockIQ2S, BlockIQ2XS, BlockIQ2XXS, BlockIQ3S, BlockIQ3XXS, QK_K,
};
use crate::tables::{
    EVEN_SIGNS, IQ1_DELTA, IQ1S_GRID, IQ2S_GRID, IQ2XS_GRID, IQ2XXS_GRID, IQ3S_GRID, IQ3XXS_GRID,
};

/// An entry of unsigned levels, negative where the bit in `signs` is set.
fn signed<const N: usize>(out: &mut [f32], scale: f32, entry: [u8; N], signs: u8) {
    for (index, (out, level)) in exactly::<N>(out).iter_mut().zip(entry).enumerate() {
        let sign = if signs >> index & 1 == 0 { 1.0 } else { -1.0 };
        *out = scale * f32::from(level) * sign;
    }
}

/// An entry of -1, 0, 1, moved by `delta`.
fn shifted(out: &mut [f32; 8], scale: f32, entry: u64, delta: f32) {
    for (out, level) in out.iter_mut().zip(entry.to_le_bytes()) {
        *out = scale * (f32::from(level as i8) + delta);
    }
}

/// Four bits: half `index % 2` of byte `index / 2`.
fn nibble(bytes: &[u8], index: usize) -> u8 {
    bytes[index / 2] >> (index % 2 * 4) & 15
}

impl Block for BlockIQ2XXS {
    const TYPE: GgmlType = GgmlType::IQ2_XXS;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<32>();
        for (out, [indices, signs_scale]) in groups.iter_mut().zip(self.qs) {
            let signs_scale = signs_scale.get();
            let scale = d * (0.5 + (signs_scale >> 28) as f32) * 0.25;
            for (k, (out, index)) in out
                .as_chunks_mut::<8>()
                .0
                .iter_mut()
                .zip(indices.0)
                .enumerate()
            {
                let signs = EVEN_SIGNS[(signs_scale >> (7 * k) & 127) as usize];
                signed(
                    out,
                    scale,
                    IQ2XXS_GRID[usize::from(index)].to_le_bytes(),
                    signs,
                );
            }
        }
    }
}

impl Block for BlockIQ2XS {
    const TYPE: GgmlType = GgmlType::IQ2_XS;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<8>();
        for (k, (out, q)) in groups.iter_mut().zip(self.qs).enumerate() {
            let scale = d * (0.5 + f32::from(nibble(&self.scales, k / 2))) * 0.25;
            let entry = IQ2XS_GRID[usize::from(q.get() & 511)];
            signed(
                out,
                scale,
                entry.to_le_bytes(),
                EVEN_SIGNS[usize::from(q.get() >> 9)],
            );
        }
    }
}

impl Block for BlockIQ2S {
    const TYPE: GgmlType = GgmlType::IQ2_S;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<8>();
        for (k, out) in groups.iter_mut().enumerate() {
            let scale = d * (0.5 + f32::from(nibble(&self.scales, k / 2))) * 0.25;
            let high = usize::from(self.qh[k / 4] >> (k % 4 * 2) & 3);
            let entry = IQ2S_GRID[usize::from(self.qs[k]) | high << 8];
            signed(out, scale, entry.to_le_bytes(), self.signs[k]);
        }
    }
}

impl Block for BlockIQ3XXS {
    const TYPE: GgmlType = GgmlType::IQ3_XXS;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<4>();
        for (k, (out, index)) in groups.iter_mut().zip(self.qs).enumerate() {
            let signs_scale = self.signs_scales[k / 8].get();
            let scale = d * (0.5 + (signs_scale >> 28) as f32) * 0.5;
            let signs = EVEN_SIGNS[(signs_scale >> (k % 8 / 2 * 7) & 127) as usize];
            signed(
                out,
                scale,
                IQ3XXS_GRID[usize::from(index)].to_le_bytes(),
                signs >> (k % 2 * 4),
            );
        }
    }
}

impl Block for BlockIQ3S {
    const TYPE: GgmlType = GgmlType::IQ3_S;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<4>();
        for (k, (out, low)) in groups.iter_mut().zip(self.qs).enumerate() {
            let scale = d * f32::from(1 + 2 * nibble(&self.scales, k / 8));
            let high = usize::from(self.qh[k / 8] >> (k % 8) & 1);
            let entry = IQ3S_GRID[usize::from(low) | high << 8];
            signed(
                out,
                scale,
                entry.to_le_bytes(),
                self.signs[k / 2] >> (k % 2 * 4),
            );
        }
    }
}

impl Block for BlockIQ1S {
    const TYPE: GgmlType = GgmlType::IQ1_S;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<8>();
        for (k, (out, low)) in groups.iter_mut().zip(self.qs).enumerate() {
            let qh = self.qh[k / 4].get();
            let scale = d * f32::from(2 * (qh >> 12 & 7) + 1);
            let delta = if qh & 0x8000 == 0 {
                IQ1_DELTA
            } else {
                -IQ1_DELTA
            };
            let high = usize::from(qh >> (k % 4 * 3) & 7);
            shifted(out, scale, IQ1S_GRID[usize::from(low) | high << 8], delta);
        }
    }
}

impl Block for BlockIQ1M {
    const TYPE: GgmlType = GgmlType::IQ1_M;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.scale();
        let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<8>();
        for (k, (out, low)) in groups.iter_mut().zip(self.qs).enumerate() {
            let scale = d * f32::from(2 * (self.scales[k / 8].get() >> (k % 8 / 2 * 3) & 7) + 1);
            let high = nibble(&self.qh, k);
            let delta = if high & 8 == 0 { IQ1_DELTA } else { -IQ1_DELTA };
            shifted(
                out,
                scale,
                IQ1S_GRID[usize::from(low) | usize::from(high & 7) << 8],
                delta,
            );
        }
    }
}
