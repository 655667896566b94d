//! Super-blocks of 256 with scales of their own for every 16 or 32 elements.

use super::{exactly, nibbles};
use crate::GgmlType;
use crate::blocks::{
    Block, BlockIQ4XS, BlockQ2K, BlockQ3K, BlockQ4K, BlockQ5K, BlockQ6K, QK_K, unpack_scales_mins,
};
use crate::tables::IQ4NL_VALUES;

/// Element `index` of 256 two-bit numbers: four planes of 32 in every 32 bytes.
#[inline]
pub(super) fn two_bits(qs: &[u8; 64], index: usize) -> u8 {
    qs[index / 128 * 32 + index % 32] >> (index % 128 / 32 * 2) & 3
}

impl Block for BlockQ2K {
    const TYPE: GgmlType = GgmlType::Q2_K;

    fn dequantize(&self, out: &mut [f32]) {
        let (d, dmin) = (self.d.to_f32(), self.dmin.to_f32());
        let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<16>();
        for (group, out) in groups.iter_mut().enumerate() {
            let scale = d * f32::from(self.scales[group] & 15);
            let min = dmin * f32::from(self.scales[group] >> 4);
            for (index, out) in out.iter_mut().enumerate() {
                *out = scale * f32::from(two_bits(&self.qs, group * 16 + index)) - min;
            }
        }
    }
}

impl Block for BlockQ3K {
    const TYPE: GgmlType = GgmlType::Q3_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let scales = self.unpack_scales();
        let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<16>();
        for (group, out) in groups.iter_mut().enumerate() {
            let scale = d * f32::from(scales[group]);
            for (index, out) in out.iter_mut().enumerate() {
                let index = group * 16 + index;
                let high = self.hmask[index % 32] >> (index / 32) & 1;
                *out = scale * f32::from((two_bits(&self.qs, index) | high << 2) as i8 - 4);
            }
        }
    }
}

/// Q4_K, and Q5_K with its fifth bits from `high`: `(sub-block, index in it)` to 0 or 16.
fn scaled_nibbles(
    [d, dmin]: [f32; 2],
    scales: &[u8; 12],
    qs: &[u8; 128],
    out: &mut [f32],
    high: impl Fn(usize, usize) -> u8,
) {
    let (scales, mins) = unpack_scales_mins(scales);
    let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<32>();
    for (group, out) in groups.iter_mut().enumerate() {
        let scale = d * f32::from(scales[group]);
        let min = dmin * f32::from(mins[group]);
        let bytes = &qs[group / 2 * 32..][..32];
        for (index, (out, &byte)) in out.iter_mut().zip(bytes).enumerate() {
            let q = byte >> (group % 2 * 4) & 15 | high(group, index);
            *out = scale * f32::from(q) - min;
        }
    }
}

impl Block for BlockQ4K {
    const TYPE: GgmlType = GgmlType::Q4_K;

    fn dequantize(&self, out: &mut [f32]) {
        let scales = [self.d.to_f32(), self.dmin.to_f32()];
        scaled_nibbles(scales, &self.scales, &self.qs, out, |_, _| 0);
    }
}

impl Block for BlockQ5K {
    const TYPE: GgmlType = GgmlType::Q5_K;

    fn dequantize(&self, out: &mut [f32]) {
        let scales = [self.d.to_f32(), self.dmin.to_f32()];
        let high = |group: usize, index: usize| (self.qh[index] >> group & 1) << 4;
        scaled_nibbles(scales, &self.scales, &self.qs, out, high);
    }
}

impl Block for BlockQ6K {
    const TYPE: GgmlType = GgmlType::Q6_K;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<16>();
        for (group, out) in groups.iter_mut().enumerate() {
            let scale = d * f32::from(self.scales[group]);
            for (index, out) in out.iter_mut().enumerate() {
                let index = group * 16 + index;
                let low = self.ql[index / 128 * 64 + index % 64] >> (index % 128 / 64 * 4) & 15;
                let q = low | two_bits(&self.qh, index) << 4;
                *out = scale * (f32::from(q) - 32.0);
            }
        }
    }
}

impl Block for BlockIQ4XS {
    const TYPE: GgmlType = GgmlType::IQ4_XS;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        let (groups, _) = exactly::<QK_K>(out).as_chunks_mut::<32>();
        let (qs, _) = self.qs.as_chunks::<16>();
        for ((out, qs), scale) in groups.iter_mut().zip(qs).zip(self.unpack_scales()) {
            let scale = d * f32::from(scale);
            nibbles(qs, out, |_, q| {
                scale * f32::from(IQ4NL_VALUES[usize::from(q)])
            });
        }
    }
}
