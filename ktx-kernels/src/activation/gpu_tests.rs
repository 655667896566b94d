use super::cuda::{self, RowScale};
use super::{GatedActivation, cases, reference};
use crate::cuda::{DeviceBuffer, Gpu};
use crate::testing::{GpuMatrix, Random, assert_close};

/// As on the host; the device's exponential is good to an ulp or two.
const BOUND: f64 = 1e-13;
const CLAMPED: GatedActivation = GatedActivation::ClampedSwiGlu {
    alpha: 1.702,
    limit: 7.0,
};

fn expected(activation: GatedActivation, gate: &[f32], up: &[f32]) -> Vec<f64> {
    match activation {
        GatedActivation::SwiGlu => reference::silu_mul(gate, up),
        GatedActivation::ClampedSwiGlu { alpha, limit } => gate
            .iter()
            .zip(up)
            .map(|(&g, &u)| {
                reference::clamped_swiglu(g.into(), u.into(), alpha.into(), limit.into())
            })
            .collect(),
    }
}

#[test]
fn gpu_gated_activations_agree_with_f64_at_every_length() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for &len in cases::LENGTHS {
        let mut random = Random::new(len as u64);
        let (gate, up) = (random.floats(len, 20.0), random.floats(len, 9.0));
        let [g, u] = [&gate, &up].map(|x| GpuMatrix::of(&gpu, 1, x));
        for activation in [GatedActivation::SwiGlu, CLAMPED] {
            let out = GpuMatrix::poisoned(&gpu, 1, len);
            cuda::gated(&gpu, activation, g.matrix, u.matrix, out.matrix).unwrap();
            let what = format!("{activation:?} of {len}");
            assert_close(
                &out.values(),
                &expected(activation, &gate, &up),
                BOUND,
                &what,
            );
        }
    }
}

#[test]
fn gpu_gated_activations_take_joined_rows_and_work_in_place() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for &(rows, width) in cases::ROWS {
        let joined = Random::new(width as u64).floats(rows * 2 * width, 9.0);
        let half = |first: usize| -> Vec<f32> {
            let rows = joined.chunks(2 * width);
            rows.flat_map(|row| row[first..][..width].to_vec())
                .collect()
        };
        let (gate, up) = (half(0), half(width));
        let want = expected(CLAMPED, &gate, &up);
        let (both, out) = (
            GpuMatrix::of(&gpu, rows, &joined),
            GpuMatrix::poisoned(&gpu, rows, width),
        );
        cuda::gated_joined(&gpu, CLAMPED, both.matrix, out.matrix).unwrap();
        assert_close(&out.values(), &want, BOUND, "joined");
        let [g, u] = [&gate, &up].map(|x| GpuMatrix::of(&gpu, rows, x));
        cuda::gated(&gpu, CLAMPED, g.matrix, u.matrix, g.matrix).unwrap();
        assert_close(&g.values(), &want, BOUND, "in place");
    }
}

#[test]
fn gpu_gated_activations_pass_nan_and_infinity() {
    let Some(gpu) = Gpu::for_tests() else { return };
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let gate = GpuMatrix::of(&gpu, 1, &[nan, 1.0, inf, -inf, -200.0]);
    let up = GpuMatrix::of(&gpu, 1, &[1.0, nan, 1.0, 1.0, 1.0]);
    for activation in [GatedActivation::SwiGlu, CLAMPED] {
        let out = GpuMatrix::poisoned(&gpu, 1, 5);
        cuda::gated(&gpu, activation, gate.matrix, up.matrix, out.matrix).unwrap();
        let out = out.values();
        assert!(
            out[0].is_nan() && out[1].is_nan(),
            "{activation:?}: {out:?}"
        );
        assert!(out[2] > 6.9 && out[4] == 0.0, "{activation:?}: {out:?}");
    }
}

#[test]
fn gpu_sigmoid_and_sums_agree_with_f64_at_every_length() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for &len in cases::LENGTHS {
        let mut random = Random::new(len as u64);
        let (x, y) = (random.floats(len, 20.0), random.floats(len, 9.0));
        let [a, b] = [&x, &y].map(|x| GpuMatrix::of(&gpu, 1, x));
        cuda::add(&gpu, b.matrix, a.matrix).unwrap();
        let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| y + x).collect();
        assert_eq!(b.values(), sum);
        cuda::sigmoid(&gpu, a.matrix).unwrap();
        assert_close(&a.values(), &reference::sigmoid(&x), BOUND, "sigmoid");
    }
}

#[test]
fn gpu_row_operations_agree_with_f64_at_every_shape() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for &(rows, width) in cases::ROWS {
        let mut random = Random::new((rows * width) as u64);
        let (x, y) = (
            random.floats(rows * width, 3.0),
            random.floats(rows * width, 3.0),
        );
        let (scale, bias) = (random.floats(rows, 2.0), random.floats(width, 2.0));
        for how in [RowScale::Plain, RowScale::Sigmoid] {
            let [a, b] = [&x, &y].map(|x| GpuMatrix::of(&gpu, rows, x));
            let s = GpuMatrix::of(&gpu, rows, &scale);
            cuda::add_scaled_rows(&gpu, b.matrix, a.matrix, s.matrix, how).unwrap();
            let factors = match how {
                RowScale::Plain => scale.iter().map(|&s| s.into()).collect(),
                RowScale::Sigmoid => reference::sigmoid(&scale),
            };
            let want: Vec<f64> = (0..x.len())
                .map(|i| f64::from(y[i]) + factors[i / width] * f64::from(x[i]))
                .collect();
            assert_close(&b.values(), &want, BOUND, "scaled rows");
        }
        let b = GpuMatrix::of(&gpu, rows, &y);
        cuda::add_bias(&gpu, b.matrix, &DeviceBuffer::upload(&gpu, &bias).unwrap()).unwrap();
        let want: Vec<f32> = y
            .iter()
            .enumerate()
            .map(|(i, y)| y + bias[i % width])
            .collect();
        assert_eq!(b.values(), want);
        let a = GpuMatrix::of(&gpu, rows, &x);
        cuda::softmax_rows(&gpu, a.matrix).unwrap();
        assert_close(
            &a.values(),
            &reference::softmax_rows(&x, width),
            1e-12,
            "softmax",
        );
    }
}

#[test]
fn gpu_kernels_that_start_early_see_what_those_before_them_wrote() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for len in [100, 300_000] {
        let [a, b] = [1.0, 0.0].map(|x| GpuMatrix::of(&gpu, 1, &vec![x; len]));
        gpu.begin_capture().unwrap();
        // Fibonacci numbers, as long as they are exact.
        for _ in 0..16 {
            cuda::add(&gpu, b.matrix, a.matrix).unwrap();
            cuda::add(&gpu, a.matrix, b.matrix).unwrap();
        }
        let graph = gpu.end_capture().unwrap();
        graph.launch().unwrap();
        gpu.synchronize().unwrap();
        assert!(a.values().iter().all(|x| *x == 3_524_578.0));
        assert!(b.values().iter().all(|x| *x == 2_178_309.0));
    }
}
