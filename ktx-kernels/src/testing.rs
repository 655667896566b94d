//! What the kernels' tests share: random input, the error measure, pools of several sizes.

use std::num::NonZeroUsize;

use crate::cuda::{DeviceBuffer, DeviceMatrix, Gpu};
use crate::pool::ThreadPool;

/// A small generator (SplitMix64), the same on every platform.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `-range..range`.
    pub(crate) fn float(&mut self, range: f32) -> f32 {
        let unit = (self.bits() >> 40) as f32 / (1u64 << 24) as f32;
        (2.0 * unit - 1.0) * range
    }

    /// `len` values uniform in `-range..range`.
    pub(crate) fn floats(&mut self, len: usize, range: f32) -> Vec<f32> {
        (0..len).map(|_| self.float(range)).collect()
    }
}

/// Normalised mean square error of `actual` against `expected`.
pub(crate) fn nmse(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    let error: f64 = actual
        .iter()
        .zip(expected)
        .map(|(&a, &e)| (f64::from(a) - e).powi(2))
        .sum();
    let power: f64 = expected.iter().map(|e| e * e).sum();
    if error == 0.0 { 0.0 } else { error / power }
}

/// Fails unless the NMSE is at most `bound` (NaN fails).
pub(crate) fn assert_close(actual: &[f32], expected: &[f64], bound: f64, what: &str) {
    let error = nmse(actual, expected);
    assert!(error <= bound, "{what}: NMSE {error:e} above {bound:e}");
}

/// Pools of 1, 2, 3 and 5 threads.
pub(crate) fn pools() -> Vec<ThreadPool> {
    [1, 2, 3, 5]
        .map(|threads| ThreadPool::new(NonZeroUsize::new(threads).unwrap()))
        .into()
}

/// A matrix on a GPU and the memory that holds it.
pub(crate) struct GpuMatrix {
    pub(crate) buffer: DeviceBuffer,
    pub(crate) matrix: DeviceMatrix,
}

impl GpuMatrix {
    /// A copy of `values`, `[rows, values.len() / rows]`.
    pub(crate) fn of(gpu: &Gpu, rows: usize, values: &[f32]) -> Self {
        let cols = values.len().checked_div(rows).unwrap_or(0);
        let buffer = DeviceBuffer::upload(gpu, values).unwrap();
        // SAFETY: the buffer holds the values and lives as long as the matrix is used.
        let matrix = unsafe { DeviceMatrix::new(buffer.address(), rows, cols) };
        Self { buffer, matrix }
    }

    /// A result's place, full of NaN.
    pub(crate) fn poisoned(gpu: &Gpu, rows: usize, cols: usize) -> Self {
        Self::of(gpu, rows, &vec![f32::NAN; rows * cols])
    }

    pub(crate) fn values(&self) -> Vec<f32> {
        self.buffer.read(0, self.matrix.len()).unwrap()
    }

    /// The bits of the values.
    pub(crate) fn bits(&self) -> Vec<u32> {
        self.buffer.read(0, self.matrix.len()).unwrap()
    }
}
