//! Blocks of 32 with one scale, the 4-bit floats, and ggml's 8-bit types.

use super::{exactly, nibbles};
use crate::GgmlType;
use crate::blocks::{
    Block, BlockIQ4NL, BlockMXFP4, BlockQ4_0, BlockQ4_1, BlockQ5_0, BlockQ5_1, BlockQ8_0,
    BlockQ8_1, BlockQ8K,
};
use crate::tables::{IQ4NL_VALUES, MXFP4_VALUES};

impl Block for BlockQ4_0 {
    const TYPE: GgmlType = GgmlType::Q4_0;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        nibbles(&self.qs, exactly(out), |_, q| d * (f32::from(q) - 8.0));
    }
}

impl Block for BlockQ4_1 {
    const TYPE: GgmlType = GgmlType::Q4_1;

    fn dequantize(&self, out: &mut [f32]) {
        let (d, m) = (self.d.to_f32(), self.m.to_f32());
        nibbles(&self.qs, exactly(out), |_, q| d * f32::from(q) + m);
    }
}

impl Block for BlockQ5_0 {
    const TYPE: GgmlType = GgmlType::Q5_0;

    fn dequantize(&self, out: &mut [f32]) {
        let (d, qh) = (self.d.to_f32(), self.qh.get());
        nibbles(&self.qs, exactly(out), |index, q| {
            let high = (qh >> index & 1) as u8;
            d * (f32::from(q | high << 4) - 16.0)
        });
    }
}

impl Block for BlockQ5_1 {
    const TYPE: GgmlType = GgmlType::Q5_1;

    fn dequantize(&self, out: &mut [f32]) {
        let (d, m, qh) = (self.d.to_f32(), self.m.to_f32(), self.qh.get());
        nibbles(&self.qs, exactly(out), |index, q| {
            let high = (qh >> index & 1) as u8;
            d * f32::from(q | high << 4) + m
        });
    }
}

fn bytes<const N: usize>(d: f32, qs: &[i8; N], out: &mut [f32]) {
    for (out, &q) in exactly::<N>(out).iter_mut().zip(qs) {
        *out = f32::from(q) * d;
    }
}

impl Block for BlockQ8_0 {
    const TYPE: GgmlType = GgmlType::Q8_0;

    fn dequantize(&self, out: &mut [f32]) {
        bytes(self.d.to_f32(), &self.qs, out);
    }
}

impl Block for BlockQ8_1 {
    const TYPE: GgmlType = GgmlType::Q8_1;

    fn dequantize(&self, out: &mut [f32]) {
        bytes(self.d.to_f32(), &self.qs, out);
    }
}

impl Block for BlockQ8K {
    const TYPE: GgmlType = GgmlType::Q8_K;

    fn dequantize(&self, out: &mut [f32]) {
        bytes(self.d.get(), &self.qs, out);
    }
}

impl Block for BlockIQ4NL {
    const TYPE: GgmlType = GgmlType::IQ4_NL;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.d.to_f32();
        nibbles(&self.qs, exactly(out), |_, q| {
            d * f32::from(IQ4NL_VALUES[usize::from(q)])
        });
    }
}

impl Block for BlockMXFP4 {
    const TYPE: GgmlType = GgmlType::MXFP4;

    fn dequantize(&self, out: &mut [f32]) {
        let d = self.scale();
        nibbles(&self.qs, exactly(out), |_, q| {
            d * f32::from(MXFP4_VALUES[usize::from(q)])
        });
    }
}
