use super::{NormRows, cases, cuda, reference};
use crate::cuda::{DeviceBuffer, Gpu};
use crate::testing::{GpuMatrix, Random, assert_close};

const BOUND: f64 = 1e-13;

#[test]
fn gpu_rms_norm_agrees_with_f64_at_every_width() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for &(rows, width) in cases::CASES {
        let mut random = Random::new((rows * 10_000 + width) as u64);
        let (x, y) = (
            random.floats(rows * width, 3.0),
            random.floats(rows * width, 2.0),
        );
        let weight = random.floats(width, 2.0);
        let w = DeviceBuffer::upload(&gpu, &weight).unwrap();
        let want = reference::rms_norm(&x, &weight, 1e-5);
        let (a, out) = (
            GpuMatrix::of(&gpu, rows, &x),
            GpuMatrix::poisoned(&gpu, rows, width),
        );
        cuda::rms_norm(&gpu, a.matrix, &w, 1e-5, out.matrix).unwrap();
        assert_close(&out.values(), &want, BOUND, "out of place");

        let out = GpuMatrix::poisoned(&gpu, rows, width);
        let b = GpuMatrix::of(&gpu, rows, &y);
        cuda::add_rms_norm(&gpu, b.matrix, a.matrix, &w, 1e-5, out.matrix).unwrap();
        let sum: Vec<f32> = x.iter().zip(&y).map(|(x, y)| y + x).collect();
        assert_eq!(b.values(), sum);
        let want_sum = reference::rms_norm(&sum, &weight, 1e-5);
        assert_close(&out.values(), &want_sum, BOUND, "after a sum");

        cuda::rms_norm(&gpu, a.matrix, &w, 1e-5, a.matrix).unwrap();
        assert_close(&a.values(), &want, BOUND, "in place");
    }
}

#[test]
fn gpu_rms_norm_of_strided_rows_leaves_the_rest() {
    let Some(gpu) = Gpu::for_tests() else { return };
    for (width, gap) in [(64, 0), (128, 64), (33, 7), (256, 4), (576, 12)] {
        let rows = NormRows {
            tokens: 5,
            token_stride: 3 * (width + gap) + 9,
            rows: 3,
            row_stride: width + gap,
            offset: 4,
        };
        let mut random = Random::new(width as u64);
        let x = random.floats(5 * rows.token_stride + 4, 2.0);
        let weight = random.floats(width, 2.0);
        let mut want: Vec<f64> = x.iter().map(|&x| x.into()).collect();
        for row in 0..15 {
            let start = rows.start(row);
            let normed = reference::rms_norm(&x[start..][..width], &weight, 1e-6);
            want[start..][..width].copy_from_slice(&normed);
        }
        let a = GpuMatrix::of(&gpu, 1, &x);
        let w = DeviceBuffer::upload(&gpu, &weight).unwrap();
        cuda::rms_norm_in_place(&gpu, a.matrix, &rows, &w, 1e-6).unwrap();
        assert_close(&a.values(), &want, BOUND, "strided");
    }
}
