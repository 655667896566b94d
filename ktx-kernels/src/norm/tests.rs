use super::*;
use crate::testing::{Random, assert_close, pools};

#[test]
fn rows_agree_with_f64_at_every_shape() {
    let pool = &pools()[1];
    for level in IsaLevel::supported() {
        for &(rows, width) in cases::CASES {
            let mut random = Random::new((rows * width) as u64);
            let x = random.floats(rows * width, 3.0);
            let weight = random.floats(width, 1.5);
            let expected = reference::rms_norm(&x, &weight, 1e-6);
            let mut out = vec![f32::NAN; x.len()];
            rms_norm_at(level, pool, &x, &weight, 1e-6, &mut out);
            assert_close(&out, &expected, 1e-14, "rms_norm");
            let mut y = x.clone();
            let all = NormRows::contiguous(rows, width);
            rms_norm_in_place_at(level, pool, &mut y, &all, &weight, 1e-6);
            assert_eq!(y, out, "{level}: in place, {rows} rows of {width}");
        }
    }
}

#[test]
fn eps_decides_rows_of_zeros_and_tiny_values() {
    let pool = &pools()[0];
    let mut out = [f32::NAN; 6];
    let x = [0.0, 0.0, 0.0, 1e-4, -1e-4, 1e-4];
    rms_norm(pool, &x, &[1.0; 3], 1e-5, &mut out);
    assert_eq!(out[..3], [0.0; 3]);
    assert_close(&out, &reference::rms_norm(&x, &[1.0; 3], 1e-5), 1e-14, "");
}

#[test]
fn strided_heads_are_normalised_and_the_rest_is_left() {
    let pool = &pools()[2];
    let rows = NormRows {
        tokens: 5,
        token_stride: 60,
        rows: 3,
        row_stride: 18,
        offset: 4,
    };
    let x = Random::new(3).floats(300, 2.0);
    let weight = Random::new(4).floats(16, 2.0);
    let mut y = x.clone();
    rms_norm_in_place(pool, &mut y, &rows, &weight, 1e-6);
    let mut expected: Vec<f64> = x.iter().map(|&x| x.into()).collect();
    for t in 0..5 {
        for r in 0..3 {
            let start = 4 + t * 60 + r * 18;
            let row = reference::rms_norm(&x[start..start + 16], &weight, 1e-6);
            expected[start..start + 16].copy_from_slice(&row);
        }
    }
    assert_close(&y, &expected, 1e-14, "strided rows");
    assert_eq!(y[..4], x[..4]);
    assert_eq!(y[20..22], x[20..22]);
    assert_eq!(y[56..64], x[56..64]);
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let x = Random::new(1).floats(70 * 1000, 2.0);
    let weight = Random::new(2).floats(1000, 2.0);
    let run = |pool: &ThreadPool| {
        let mut out = vec![0.0; x.len()];
        rms_norm(pool, &x, &weight, 1e-6, &mut out);
        out
    };
    let expected = run(&pools()[0]);
    for pool in pools() {
        assert_eq!(run(&pool), expected);
    }
}

#[test]
#[should_panic(expected = "overlap")]
fn overlapping_rows_are_refused() {
    let rows = NormRows {
        tokens: 1,
        token_stride: 16,
        rows: 2,
        row_stride: 4,
        offset: 0,
    };
    rms_norm_in_place(&pools()[0], &mut [1.0; 16], &rows, &[1.0; 8], 1e-6);
}

#[test]
#[should_panic(expected = "leave a buffer")]
fn rows_beyond_the_buffer_are_refused() {
    let rows = NormRows::heads(2, 2, 8);
    rms_norm_in_place(&pools()[0], &mut [1.0; 31], &rows, &[1.0; 8], 1e-6);
}
