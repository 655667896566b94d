//! Simple quantisers, for tests and tools that make small models.

use crate::blocks::{self, BlockQ4_0, BlockQ4_1, BlockQ4K, BlockQ6K, BlockQ8_0, F16, QK_K};
use crate::{GgmlType, GgufError};

/// Converts single-precision values to type `ty`.
///
/// F16, BF16, Q8_0, Q4_0 and Q4_1 come out as from the Python package `gguf`; Q4_K and Q6_K choose their scales from
/// each sub-block's range, without the search for better ones that llama.cpp does.
///
/// # Errors
/// [`GgufError::NoQuantizer`] for the other types, [`GgufError::InvalidShape`] when `values` is not a whole number
/// of blocks.
pub fn quantize_row(ty: GgmlType, values: &[f32]) -> Result<Vec<u8>, GgufError> {
    crate::tensor::shape_bytes("row to quantise", ty, &[values.len()])?;
    Ok(match ty {
        GgmlType::F32 => values
            .iter()
            .flat_map(|value| value.to_le_bytes())
            .collect(),
        GgmlType::F16 => values
            .iter()
            .flat_map(|&value| F16::from_f32(value).0)
            .collect(),
        GgmlType::BF16 => values
            .iter()
            .flat_map(|&value| half::bf16::from_f32(value).to_le_bytes())
            .collect(),
        GgmlType::Q4_0 => each_block(values, q4_0),
        GgmlType::Q4_1 => each_block(values, q4_1),
        GgmlType::Q8_0 => each_block(values, q8_0),
        GgmlType::Q4_K => each_block(values, q4_k),
        GgmlType::Q6_K => each_block(values, q6_k),
        _ => return Err(GgufError::NoQuantizer { ty }),
    })
}

fn each_block<const N: usize, B: blocks::Block>(
    values: &[f32],
    quantize: fn(&[f32; N]) -> B,
) -> Vec<u8> {
    let blocks: Vec<B> = values.as_chunks::<N>().0.iter().map(quantize).collect();
    blocks::as_bytes(&blocks).to_vec()
}

/// `1 / scale`, and 0 for a block of zeros.
fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The value of largest magnitude, with its sign.
fn extreme(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |extreme: f32, &value| {
        if value.abs() > extreme.abs() {
            value
        } else {
            extreme
        }
    })
}

fn range(values: &[f32]) -> (f32, f32) {
    values
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &value| {
            (min.min(value), max.max(value))
        })
}

fn pack_nibbles<const N: usize>(q: [u8; N], out: &mut [u8]) {
    let (low, high) = q.split_at(N / 2);
    for ((out, low), high) in out.iter_mut().zip(low).zip(high) {
        *out = low | high << 4;
    }
}

fn q4_0(values: &[f32; 32]) -> BlockQ4_0 {
    let d = extreme(values) / -8.0;
    let id = inverse(d);
    let mut block = BlockQ4_0 {
        d: F16::from_f32(d),
        qs: [0; 16],
    };
    pack_nibbles(
        values.map(|value| ((value * id + 8.5) as u8).min(15)),
        &mut block.qs,
    );
    block
}

fn q4_1(values: &[f32; 32]) -> BlockQ4_1 {
    let (min, max) = range(values);
    let d = (max - min) / 15.0;
    let id = inverse(d);
    let mut block = BlockQ4_1 {
        d: F16::from_f32(d),
        m: F16::from_f32(min),
        qs: [0; 16],
    };
    pack_nibbles(
        values.map(|value| (((value - min) * id + 0.5) as u8).min(15)),
        &mut block.qs,
    );
    block
}

fn q8_0(values: &[f32; 32]) -> BlockQ8_0 {
    let d = extreme(values).abs() / 127.0;
    let id = inverse(d);
    BlockQ8_0 {
        d: F16::from_f32(d),
        qs: values.map(|value| (value * id).round() as i8),
    }
}

fn q4_k(values: &[f32; QK_K]) -> BlockQ4K {
    let (groups, _) = values.as_chunks::<32>();
    let (mut ranges, mut depths) = ([0.0_f32; 8], [0.0_f32; 8]);
    for (index, group) in groups.iter().enumerate() {
        let (min, max) = range(group);
        // The format subtracts a minimum that is not negative: the range always includes zero.
        depths[index] = -min.min(0.0);
        ranges[index] = (max.max(0.0) + depths[index]) / 15.0;
    }
    let d = F16::from_f32(range(&ranges).1 / 63.0);
    let dmin = F16::from_f32(range(&depths).1 / 63.0);
    let (id, idmin) = (inverse(d.to_f32()), inverse(dmin.to_f32()));
    let scales = ranges.map(|range| ((range * id).round() as u8).min(63));
    let mins = depths.map(|depth| ((depth * idmin).round() as u8).min(63));
    let mut block = BlockQ4K {
        d,
        dmin,
        scales: blocks::pack_scales_mins(&scales, &mins),
        qs: [0; 128],
    };
    let quantize = |value: f32, group: usize| {
        let scale = d.to_f32() * f32::from(scales[group]);
        let min = dmin.to_f32() * f32::from(mins[group]);
        (((value + min) * inverse(scale)).round() as u8).min(15)
    };
    for (pair, (values, out)) in values
        .as_chunks::<64>()
        .0
        .iter()
        .zip(block.qs.chunks_exact_mut(32))
        .enumerate()
    {
        let q: [u8; 64] =
            std::array::from_fn(|index| quantize(values[index], 2 * pair + index / 32));
        pack_nibbles(q, out);
    }
    block
}

fn q6_k(values: &[f32; QK_K]) -> BlockQ6K {
    let (groups, _) = values.as_chunks::<16>();
    let scales: [f32; 16] = std::array::from_fn(|group| extreme(&groups[group]) / -32.0);
    let d = F16::from_f32(extreme(&scales) / -128.0);
    let id = inverse(d.to_f32());
    let mut block = BlockQ6K {
        ql: [0; 128],
        qh: [0; 64],
        scales: scales.map(|scale| (scale * id).round() as i8),
        d,
    };
    for (index, &value) in values.iter().enumerate() {
        let scale = d.to_f32() * f32::from(block.scales[index / 16]);
        let q = ((value * inverse(scale)).round().clamp(-32.0, 31.0) + 32.0) as u8;
        block.ql[index / 128 * 64 + index % 64] |= (q & 15) << (index % 128 / 64 * 4);
        block.qh[index / 128 * 32 + index % 32] |= (q >> 4) << (index % 128 / 32 * 2);
    }
    block
}
