use std::num::NonZeroUsize;

use super::*;
use crate::lanes::lanes_entry;
use crate::testing::{Random, assert_close, pools};

lanes_entry! {
    /// # Safety
    /// The level is supported.
    unsafe fn exp_slice(x: &mut [f32]) = exp_slice_lanes
}

#[inline(always)]
unsafe fn exp_slice_lanes<L: Lanes>(x: &mut [f32]) {
    for chunk in x.chunks_mut(L::COUNT) {
        // SAFETY: the chunk has `COUNT` elements or fewer, all accessible.
        unsafe {
            if chunk.len() == L::COUNT {
                exp(L::load(chunk.as_ptr())).store(chunk.as_mut_ptr());
            } else {
                let e = exp(L::load_partial(chunk.as_ptr(), chunk.len()));
                e.store_partial(chunk.as_mut_ptr(), chunk.len());
            }
        }
    }
}

fn exp_of(level: IsaLevel, x: &[f32]) -> Vec<f32> {
    let mut y = x.to_vec();
    // SAFETY: callers pass supported levels.
    unsafe { exp_slice(level, &mut y) };
    y
}

#[test]
fn exp_is_within_2e_7_of_f64_over_the_normal_range() {
    let x: Vec<f32> = (0..2_000_003)
        .map(|i| -87.3 + i as f32 * (176.0 / 2_000_003.0))
        .collect();
    for level in IsaLevel::supported() {
        let mut worst = 0.0f64;
        for (x, y) in x.iter().zip(exp_of(level, &x)) {
            let exact = f64::from(*x).exp();
            worst = worst.max(((f64::from(y) - exact) / exact).abs());
        }
        assert!(worst <= 2e-7, "{level}: {worst:e}");
    }
}

#[test]
fn exp_handles_the_ends_of_the_range() {
    let x = [
        f32::NEG_INFINITY,
        -1e30,
        -104.5,
        -100.0,
        -0.0,
        0.0,
        89.0,
        1e30,
        f32::INFINITY,
        f32::NAN,
    ];
    for level in IsaLevel::supported() {
        let y = exp_of(level, &x);
        assert_eq!(y[..3], [0.0; 3], "{level}");
        assert!(
            (y[3] - (-100.0f64).exp() as f32).abs() <= 1.5e-45,
            "{level}"
        );
        assert_eq!(y[4..6], [1.0; 2], "{level}");
        assert_eq!(y[6..9], [f32::INFINITY; 3], "{level}");
        assert!(y[9].is_nan(), "{level}");
    }
}

#[test]
fn silu_mul_and_sigmoid_agree_with_f64_at_every_length() {
    let pool = ThreadPool::new(NonZeroUsize::new(3).unwrap());
    for level in IsaLevel::supported() {
        for &len in cases::LENGTHS {
            let mut random = Random::new(len as u64 + 1);
            let gate = random.floats(len, 6.0);
            let up = random.floats(len, 2.0);
            let mut out = vec![f32::NAN; len];
            silu_mul_at(level, &pool, &gate, &up, &mut out);
            assert_close(&out, &reference::silu_mul(&gate, &up), 1e-13, "silu_mul");
            let mut x = gate.clone();
            sigmoid_at(level, &pool, &mut x);
            assert_close(&x, &reference::sigmoid(&gate), 1e-13, "sigmoid");
        }
    }
}

#[test]
fn silu_of_extremes_is_finite_or_what_ieee_says() {
    let pool = ThreadPool::new(NonZeroUsize::MIN);
    let gate = [-1e30, -200.0, 0.0, 200.0, f32::INFINITY, f32::NAN];
    let mut out = [1.0; 6];
    silu_mul(&pool, &gate, &[1.0; 6], &mut out);
    assert_eq!(out[..5], [0.0, 0.0, 0.0, 200.0, f32::INFINITY]);
    assert!(out[5].is_nan());
}

const CLAMPED: GatedActivation = GatedActivation::ClampedSwiGlu {
    alpha: 1.702,
    limit: 7.0,
};

#[test]
fn clamped_swiglu_agrees_with_f64_at_every_length() {
    let pool = ThreadPool::new(NonZeroUsize::new(3).unwrap());
    for level in IsaLevel::supported() {
        for &len in cases::LENGTHS {
            let mut random = Random::new(len as u64 + 2);
            let (gate, up) = (random.floats(len, 12.0), random.floats(len, 12.0));
            let mut out = vec![f32::NAN; len];
            gated_at(level, &pool, CLAMPED, &gate, &up, &mut out);
            let pairs = gate.iter().zip(&up);
            let expected: Vec<f64> = pairs
                .map(|(&g, &u)| {
                    reference::clamped_swiglu(g.into(), u.into(), f64::from(1.702f32), 7.0)
                })
                .collect();
            assert_close(&out, &expected, 1e-13, "clamped SwiGLU");
        }
    }
}

#[test]
fn clamped_swiglu_bounds_what_is_infinite_and_passes_nan_on() {
    let pool = ThreadPool::new(NonZeroUsize::MIN);
    let (inf, nan) = (f32::INFINITY, f32::NAN);
    let mut out = [1.0; 6];
    let (gate, up) = (
        [inf, inf, -inf, 0.0, nan, 1.0],
        [inf, -inf, inf, inf, 1.0, nan],
    );
    gated(&pool, CLAMPED, &gate, &up, &mut out);
    assert!((out[0] - 56.0).abs() < 1e-3 && (out[1] + 42.0).abs() < 1e-3);
    assert_eq!(out[3], 0.0);
    assert!(out[4].is_nan() && out[5].is_nan());
}

#[test]
fn in_place_silu_mul_equals_the_other() {
    let pool = ThreadPool::new(NonZeroUsize::new(2).unwrap());
    let mut random = Random::new(5);
    let (mut gate, up) = (random.floats(20_001, 3.0), random.floats(20_001, 3.0));
    let mut out = vec![0.0; gate.len()];
    silu_mul(&pool, &gate, &up, &mut out);
    silu_mul_in_place(&pool, &mut gate, &up);
    assert_eq!(gate, out);
}

#[test]
fn softmax_agrees_with_f64_and_sums_to_one() {
    let pool = ThreadPool::new(NonZeroUsize::new(2).unwrap());
    for level in IsaLevel::supported() {
        for &(rows, width) in cases::ROWS {
            let x = Random::new((rows * width) as u64).floats(rows * width, 20.0);
            let mut y = x.clone();
            softmax_rows_at(level, &pool, &mut y, width);
            assert_close(&y, &reference::softmax_rows(&x, width), 1e-12, "softmax");
        }
    }
}

#[test]
fn sums_add_rows_with_their_factors() {
    let pool = ThreadPool::new(NonZeroUsize::new(2).unwrap());
    let mut y = vec![1.0, 2.0, 3.0, 4.0];
    add(&pool, &mut y, &[10.0, 20.0, 30.0, 40.0]);
    assert_eq!(y, [11.0, 22.0, 33.0, 44.0]);
    add_scaled_rows(&pool, &mut y, &[1.0, 1.0, 2.0, 2.0], &[0.5, -1.0]);
    assert_eq!(y, [11.5, 22.5, 31.0, 42.0]);
}

#[test]
fn results_do_not_depend_on_the_thread_count() {
    let gate = Random::new(9).floats(70_001, 5.0);
    let run = |pool: &ThreadPool| {
        let mut y = gate.clone();
        silu_mul_in_place(pool, &mut y, &gate);
        sigmoid(pool, &mut y);
        softmax_rows(pool, &mut y[..70_000], 100);
        y
    };
    let expected = run(&pools()[0]);
    for pool in pools() {
        assert_eq!(run(&pool), expected, "{} threads", pool.threads());
    }
}
