//! The reference dequantiser and the quantisers against the Python package `gguf`.

use ktx_gguf::{GgmlType, GgufError, blocks, dequantize_row, quantize_row, random_blocks, tables};

const BLOCKS: &[u8] = include_bytes!("../fixtures/blocks.bin");
const BLOCKS_INDEX: &str = include_str!("../fixtures/blocks.txt");
const GRIDS: &[u8] = include_bytes!("../fixtures/grids.bin");
const QUANTIZED: &[u8] = include_bytes!("../fixtures/quantized.bin");
const QUANTIZED_INDEX: &str = include_str!("../fixtures/quantized.txt");

fn type_named(name: &str) -> GgmlType {
    *GgmlType::ALL.iter().find(|ty| ty.name() == name).unwrap()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|&bytes| f32::from_le_bytes(bytes))
        .collect()
}

/// The lines of an index: a type and the numbers after it.
fn entries(index: &'static str) -> impl Iterator<Item = (GgmlType, Vec<usize>)> {
    index.lines().map(|line| {
        let (name, numbers) = line.split_once(' ').unwrap();
        (
            type_named(name),
            numbers
                .split(' ')
                .map(|number| number.parse().unwrap())
                .collect(),
        )
    })
}

#[test]
fn every_block_type_dequantizes_bit_for_bit_as_in_python() {
    let mut types = 0;
    for (ty, numbers) in entries(BLOCKS_INDEX) {
        let [count, blocks_at, values_at] = numbers[..] else {
            panic!("{ty}: {numbers:?}")
        };
        let elements = count * ty.block_len();
        let expected = floats(&BLOCKS[values_at..][..elements * 4]);
        let mut values = vec![f32::NAN; elements];
        dequantize_row(ty, &BLOCKS[blocks_at..values_at], &mut values).unwrap();
        for (index, (value, expected)) in values.iter().zip(&expected).enumerate() {
            // Which bits a NaN carries is the machine's choice.
            let same = value.to_bits() == expected.to_bits() || value.is_nan() && expected.is_nan();
            assert!(
                same,
                "{ty} element {index}: {value:e}, Python has {expected:e}"
            );
        }
        types += 1;
    }
    // All but the integers, F64, and ggml's activation types Q8_1 and Q8_K, which Python does not dequantise.
    assert_eq!(types, GgmlType::ALL.len() - 7);
}

#[test]
fn every_entry_of_the_code_books_is_as_in_python() {
    let eight = |grid: &[u64]| {
        grid.iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let four = |grid: &[u32]| {
        grid.iter()
            .flat_map(|entry| entry.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let grids = [
        eight(&tables::IQ2XXS_GRID),
        eight(&tables::IQ2XS_GRID),
        eight(&tables::IQ2S_GRID),
        eight(&tables::IQ1S_GRID),
        four(&tables::IQ3XXS_GRID),
        four(&tables::IQ3S_GRID),
    ]
    .concat();
    assert!(grids == GRIDS);
}

#[test]
fn quantizers_agree_with_python() {
    for (ty, numbers) in entries(QUANTIZED_INDEX) {
        let [_, values_at, blocks_at, bytes] = numbers[..] else {
            panic!("{ty}: {numbers:?}")
        };
        let quantized = quantize_row(ty, &floats(&QUANTIZED[values_at..blocks_at])).unwrap();
        assert!(quantized == QUANTIZED[blocks_at..][..bytes], "{ty}");
    }
}

#[test]
fn k_quantizers_stay_near_the_values() {
    let mut values = vec![0.0; 1024];
    dequantize_row(
        GgmlType::F32,
        &random_blocks(GgmlType::F32, 1024, 1),
        &mut values,
    )
    .unwrap();
    for (ty, tolerance) in [(GgmlType::Q4_K, 0.09), (GgmlType::Q6_K, 0.04)] {
        let mut back = vec![0.0; 1024];
        dequantize_row(ty, &quantize_row(ty, &values).unwrap(), &mut back).unwrap();
        let worst = values
            .iter()
            .zip(&back)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst < tolerance, "{ty}: {worst}");
    }
}

#[test]
fn quantizers_keep_zeros() {
    for ty in [
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q8_0,
        GgmlType::Q4_K,
        GgmlType::Q6_K,
    ] {
        let mut back = vec![1.0; 256];
        dequantize_row(ty, &quantize_row(ty, &[0.0; 256]).unwrap(), &mut back).unwrap();
        assert!(back.iter().all(|&value| value == 0.0), "{ty}");
    }
}

#[test]
fn types_without_quantizer_are_refused_by_name() {
    let error = quantize_row(GgmlType::IQ2_XXS, &[0.0; 256]).unwrap_err();
    assert!(matches!(
        error,
        GgufError::NoQuantizer {
            ty: GgmlType::IQ2_XXS
        }
    ));
    assert!(
        error.to_string().contains("cannot quantise to IQ2_XXS"),
        "{error}"
    );
}

#[test]
fn integers_doubles_and_activation_types_dequantize() {
    let mut two = [0.0; 2];
    dequantize_row(GgmlType::I8, &[0xff, 7], &mut two).unwrap();
    assert_eq!(two, [-1.0, 7.0]);
    dequantize_row(GgmlType::I16, &[0, 0x80, 1, 0], &mut two).unwrap();
    assert_eq!(two, [-32768.0, 1.0]);
    dequantize_row(GgmlType::I32, bytemuck::cast_slice(&[-5_i32, 9]), &mut two).unwrap();
    assert_eq!(two, [-5.0, 9.0]);
    dequantize_row(
        GgmlType::I64,
        bytemuck::cast_slice(&[-6_i64, 1 << 40]),
        &mut two,
    )
    .unwrap();
    assert_eq!(two, [-6.0, (1_i64 << 40) as f32]);
    dequantize_row(
        GgmlType::F64,
        bytemuck::cast_slice(&[0.1_f64, -1e300]),
        &mut two,
    )
    .unwrap();
    assert_eq!(two, [0.1, f32::NEG_INFINITY]);

    let mut block = vec![0; 36];
    block[..2].copy_from_slice(&half::f16::from_f32(0.5).to_le_bytes());
    block[4..].copy_from_slice(&std::array::from_fn::<u8, 32, _>(|index| {
        (index as u8).wrapping_sub(16)
    }));
    let mut out = [0.0; 32];
    dequantize_row(GgmlType::Q8_1, &block, &mut out).unwrap();
    assert_eq!(
        out,
        std::array::from_fn(|index| 0.5 * (index as f32 - 16.0))
    );

    let mut block = vec![0; 292];
    block[..4].copy_from_slice(&0.25_f32.to_le_bytes());
    block[4..260].copy_from_slice(&std::array::from_fn::<u8, 256, _>(|index| index as u8));
    let mut out = [0.0; 256];
    dequantize_row(GgmlType::Q8_K, &block, &mut out).unwrap();
    assert_eq!(
        out,
        std::array::from_fn(|index| 0.25 * f32::from(index as u8 as i8))
    );
}

#[test]
fn random_blocks_are_finite_of_ordinary_size_and_reproducible() {
    for &ty in GgmlType::ALL {
        let bytes = random_blocks(ty, 20, 7);
        assert_eq!(bytes, random_blocks(ty, 20, 7), "{ty}");
        assert_ne!(bytes, random_blocks(ty, 20, 8), "{ty}");
        let mut values = vec![0.0; 20 * ty.block_len()];
        dequantize_row(ty, &bytes, &mut values).unwrap();
        assert!(values.iter().all(|value| value.is_finite()), "{ty}");
        let largest = values
            .iter()
            .fold(0.0_f32, |largest, value| largest.max(value.abs()));
        let is_integer = matches!(
            ty,
            GgmlType::I8 | GgmlType::I16 | GgmlType::I32 | GgmlType::I64
        );
        assert!(
            is_integer || (0.2..=2.6).contains(&largest),
            "{ty}: {largest}"
        );
    }
}

#[test]
fn random_activation_blocks_have_right_sums() {
    let bytes = random_blocks(GgmlType::Q8_K, 3, 1);
    for block in blocks::cast::<blocks::BlockQ8K>(&bytes).unwrap() {
        for (group, sum) in block.bsums.iter().enumerate() {
            let expected: i16 = block.qs[16 * group..][..16]
                .iter()
                .map(|&q| i16::from(q))
                .sum();
            assert_eq!(sum.get(), expected);
        }
    }
    let bytes = random_blocks(GgmlType::Q8_1, 3, 1);
    for block in blocks::cast::<blocks::BlockQ8_1>(&bytes).unwrap() {
        let sum: i32 = block.qs.iter().map(|&q| i32::from(q)).sum();
        assert_eq!(
            block.s,
            blocks::F16::from_f32(block.d.to_f32() * sum as f32)
        );
    }
}

#[test]
fn rows_of_the_wrong_length_are_refused() {
    let error = dequantize_row(GgmlType::Q4_K, &[0; 144], &mut [0.0; 255]).unwrap_err();
    assert!(matches!(error, GgufError::InvalidShape { .. }), "{error}");
    let error = dequantize_row(GgmlType::Q4_K, &[0; 143], &mut [0.0; 256]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "row to dequantise: Q4_K of shape [256] takes 144 bytes, not 143"
    );
}

#[test]
fn block_views_need_no_alignment() {
    let mut bytes = vec![0];
    bytes.extend(random_blocks(GgmlType::Q4_K, 2, 3));
    let blocks = blocks::cast::<blocks::BlockQ4K>(&bytes[1..]).unwrap();
    assert_eq!(blocks::as_bytes(blocks), &bytes[1..]);
    assert!(blocks::cast::<blocks::BlockQ4K>(&bytes).is_none());
}

#[test]
fn packed_scales_come_back() {
    let scales = [0, 1, 15, 16, 31, 32, 62, 63];
    let mins = [63, 5, 17, 48, 40, 21, 9, 0];
    assert_eq!(
        blocks::unpack_scales_mins(&blocks::pack_scales_mins(&scales, &mins)),
        (scales, mins)
    );
}

#[test]
fn type_ids_and_sizes_are_consistent() {
    for &ty in GgmlType::ALL {
        assert_eq!(GgmlType::from_id(ty.id()), Some(ty));
        assert_eq!(ty.row_bytes(3 * ty.block_len()), Some(3 * ty.block_bytes()));
        assert_eq!(ty.is_quantized(), ty.block_len() > 1);
    }
    // Numbers of types that were removed from the format.
    for id in [4, 5, 31, 32, 33, 36, 37, 38, 1000] {
        assert_eq!(GgmlType::from_id(id), None);
    }
    assert_eq!(GgmlType::Q4_K.row_bytes(257), None);
    assert_eq!(GgmlType::F64.row_bytes(usize::MAX), None);
}
