//! Products of 8-bit weights: E4M3 with block scales, and plain signed bytes.

use std::num::NonZeroUsize;

use ktx_gguf::fp8::BlockScales;
use ktx_gguf::{GgmlType, Tensor};

use super::activations::Forms;
use super::tests::normal;
use super::tiles::has_tiles;
use super::{Activations, LinearError, Precision, WeightRows, cases, matmul_at, reference};
use crate::cpu::IsaLevel;
use crate::pool::ThreadPool;

/// Codes of all values but those that are no numbers.
fn codes(count: usize, seed: u64) -> Vec<u8> {
    let random = ktx_gguf::random_blocks(GgmlType::I8, count, seed);
    let number = |code: u8| if code & 0x7f == 0x7f { code ^ 1 } else { code };
    random.into_iter().map(number).collect()
}

fn scales(rows: usize, cols: usize) -> Vec<f32> {
    let count = rows.div_ceil(128) * cols.div_ceil(128);
    (0..count).map(|n| 0.25 + n as f32 * 0.37).collect()
}

fn matrix(rows: usize, cols: usize) -> Tensor {
    let codes = codes(rows * cols, rows as u64);
    Tensor::from_fp8("w", &[cols, rows], codes, scales(rows, cols)).unwrap()
}

/// The product in double precision, straight from the format's definition.
fn expected(codes: &[u8], rows: usize, cols: usize, x: &[f32]) -> Vec<f64> {
    let scales = scales(rows, cols);
    let weight = |row: usize, col: usize| {
        let code = codes[row * cols + col];
        let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7) / 8.0);
        let magnitude = match exponent {
            0 => mantissa * 2f64.powi(-6),
            _ => (1.0 + mantissa) * 2f64.powi(exponent - 7),
        };
        let scale = scales[row / 128 * cols.div_ceil(128) + col / 128];
        f64::from(scale)
            * if code >> 7 == 1 {
                -magnitude
            } else {
                magnitude
            }
    };
    let mut out = Vec::new();
    for x in x.chunks(cols) {
        for row in 0..rows {
            out.push(
                (0..cols)
                    .map(|col| f64::from(x[col]) * weight(row, col))
                    .sum(),
            );
        }
    }
    out
}

fn product(
    level: IsaLevel,
    precision: Precision,
    w: WeightRows<'_>,
    x: &[f32],
    tokens: usize,
) -> Vec<f32> {
    let pool = ThreadPool::new(NonZeroUsize::new(2).unwrap());
    let mut activations = Activations::default();
    let shape = [tokens, w.cols()];
    activations
        .fill(
            level,
            &pool,
            x,
            shape,
            Forms::for_types(precision, &[w.ty()]),
        )
        .unwrap();
    let mut out = vec![f32::NAN; tokens * w.rows()];
    matmul_at(level, &pool, w, &activations, &mut out, w.rows()).unwrap();
    out
}

/// Tiles keep 16 bits of each number.
fn bound(level: IsaLevel, precision: Precision) -> f64 {
    match has_tiles(level) && precision == Precision::Int8 {
        true => 1e-10,
        false => 1e-11,
    }
}

#[test]
fn products_with_block_scaled_weights_are_exact_at_all_tails() {
    for [rows, cols, tokens] in cases::block_scaled() {
        let tensor = matrix(rows, cols);
        let w = WeightRows::of(&tensor).unwrap();
        let x = normal(tokens * cols, 3);
        let expected = expected(tensor.bytes(), rows, cols, &x);
        for level in IsaLevel::supported() {
            for precision in [Precision::F32, Precision::Int8] {
                let nmse = reference::nmse(&product(level, precision, w, &x, tokens), &expected);
                assert!(
                    nmse <= bound(level, precision),
                    "{rows} x {cols}, {tokens} tokens, {level}: {nmse:e}"
                );
            }
        }
    }
}

#[test]
fn some_rows_of_a_matrix_keep_their_scales() {
    let (rows, cols) = (300, 140);
    let tensor = matrix(rows, cols);
    let w = WeightRows::of(&tensor).unwrap();
    let x = normal(6 * cols, 4);
    let expected = expected(tensor.bytes(), rows, cols, &x);
    for (start, count) in [(0, 300), (100, 60), (127, 2), (256, 44), (299, 1)] {
        let part = w.rows_range(start, count).unwrap();
        let wanted: Vec<f64> = expected
            .chunks(rows)
            .flat_map(|row| row[start..start + count].to_vec())
            .collect();
        for level in IsaLevel::supported() {
            let nmse = reference::nmse(&product(level, Precision::F32, part, &x, 6), &wanted);
            assert!(nmse <= 1e-11, "rows {start}, {count}, {level}: {nmse:e}");
        }
        let mut row = vec![0.0; cols];
        part.dequantize(0, &mut row).unwrap();
        assert_eq!(row, tensor.to_f32()[start * cols..][..cols]);
    }
    assert!(w.rows_range(299, 2).is_none() && w.rows_range(usize::MAX, 2).is_none());
    assert!(
        w.dequantize(300, &mut [0.0; 140]).is_none() && w.dequantize(0, &mut [0.0; 3]).is_none()
    );
}

#[test]
fn codes_and_scales_that_are_no_numbers_stay_visible() {
    let x = normal(200, 5);
    for bad in [0x7f, 0xff] {
        let mut codes = codes(3 * 200, 1);
        codes[200 + 150] = bad;
        let tensor = Tensor::from_fp8("w", &[200, 3], codes, scales(3, 200)).unwrap();
        for level in IsaLevel::supported() {
            let out = product(
                level,
                Precision::F32,
                WeightRows::of(&tensor).unwrap(),
                &x,
                1,
            );
            let finite: Vec<bool> = out.iter().map(|y| y.is_finite()).collect();
            assert_eq!(finite, [true, false, true], "{bad:#x} {level}");
        }
    }
    let tensor = Tensor::from_fp8("w", &[200, 1], codes(200, 1), vec![1.0, f32::INFINITY]).unwrap();
    for level in IsaLevel::supported() {
        let out = product(
            level,
            Precision::F32,
            WeightRows::of(&tensor).unwrap(),
            &x,
            1,
        );
        assert!(!out[0].is_finite(), "{level}");
    }
}

#[test]
fn products_with_signed_bytes_are_exact() {
    for [rows, cols, tokens] in cases::block_scaled().into_iter().step_by(3) {
        let bytes = ktx_gguf::random_blocks(GgmlType::I8, rows * cols, 6);
        let codes: Vec<i8> = bytes.iter().map(|byte| byte.cast_signed()).collect();
        let w = WeightRows::signed_bytes(rows, cols, &codes).unwrap();
        let x = normal(tokens * cols, 7);
        let expected = reference::matmul(w, &x);
        let first: f64 = codes
            .iter()
            .zip(&x[..cols])
            .map(|(q, x)| f64::from(*q) * f64::from(*x))
            .sum();
        assert!((first - expected[0]).abs() <= 1e-9 * expected[0].abs().max(1.0));
        for level in IsaLevel::supported() {
            let nmse = reference::nmse(&product(level, Precision::Int8, w, &x, tokens), &expected);
            assert!(
                nmse <= bound(level, Precision::Int8),
                "{rows} x {cols}, {tokens} tokens, {level}: {nmse:e}"
            );
        }
    }
}

#[test]
fn weights_without_their_scales_are_errors() {
    let none = WeightRows::new(GgmlType::F8_E4M3, 2, 2, &[0; 4]);
    assert!(matches!(none, Err(LinearError::UnsupportedType { .. })));
    let bytes: Vec<u8> = scales(128, 128)
        .iter()
        .flat_map(|s| s.to_le_bytes())
        .collect();
    let one = BlockScales::new(128, 128, &bytes).unwrap();
    assert!(WeightRows::fp8(128, 128, &[0; 128 * 128], one).is_ok());
    let other = WeightRows::fp8(1, 129, &[0; 129], one);
    assert!(matches!(other, Err(LinearError::Scales { .. })));
    let other = WeightRows::fp8(129, 1, &[0; 129], one);
    assert!(matches!(other, Err(LinearError::Scales { .. })));
    let short = WeightRows::fp8(2, 2, &[0; 3], one);
    assert!(matches!(short, Err(LinearError::WeightBytes { .. })));
    assert!(WeightRows::signed_bytes(2, 2, &[0; 3]).is_err());
}
