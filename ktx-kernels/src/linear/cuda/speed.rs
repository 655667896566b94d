//! How fast products with many tokens are, for choices between devices.

use ktx_gguf::{GgmlType, random_blocks};

use super::GpuMatrix;
use crate::cuda::{CudaError, DeviceBuffer, DeviceMatrix, Event, Gpu};
use crate::linear::{Precision, WeightRows};

/// Rows, columns and tokens of the product.
const SIZE: usize = 2048;

/// Multiplications and additions a second of a product of Q4_K weights with many tokens, measured in some
/// milliseconds.
///
/// # Errors
/// What the driver reports; with little memory free, that.
pub fn measured_flops(gpu: &Gpu) -> Result<f64, CudaError> {
    const ROUNDS: usize = 5;
    let ty = GgmlType::Q4_K;
    let bytes = random_blocks(ty, SIZE * SIZE / ty.block_len(), 1);
    let rows =
        WeightRows::new(ty, SIZE, SIZE, &bytes).expect("the blocks are as many as the sizes say");
    let weights = GpuMatrix::upload(gpu, rows)?;
    let scratch_floats = GpuMatrix::scratch_floats(SIZE, SIZE);
    let [x, out] =
        [SIZE * SIZE; 2].map(|floats| DeviceBuffer::zeroed(gpu, floats * size_of::<f32>()));
    let (x_buffer, out_buffer) = (x?, out?);
    let scratch_buffer = DeviceBuffer::new(gpu, scratch_floats * size_of::<f32>())?;
    // SAFETY: the buffers have that many floats, and are dropped after the stream was waited for.
    let [x, out, scratch] = unsafe {
        [
            DeviceMatrix::new(x_buffer.address(), SIZE, SIZE),
            DeviceMatrix::new(out_buffer.address(), SIZE, SIZE),
            DeviceMatrix::new(scratch_buffer.address(), 1, scratch_floats),
        ]
    };
    let mut best = 0.0f64;
    for _ in 0..ROUNDS {
        let start = Event::record(gpu)?;
        weights.multiply(x, None, out, Precision::Int8, scratch)?;
        let seconds = f64::from(Event::record(gpu)?.milliseconds_since(&start)?) / 1e3;
        best = best.max(2.0 * (SIZE * SIZE * SIZE) as f64 / seconds);
    }
    Ok(best)
}
