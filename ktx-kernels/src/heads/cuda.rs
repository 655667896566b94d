//! Matrix products of attention heads on a GPU; see `heads.cu`.

use half::f16;
use half::slice::HalfFloatSliceExt;

use super::HeadRows;
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch};

const MODULE: &str = "heads/heads";
const THREADS: usize = 128;
/// Halves of a load of 16 bytes.
const CHUNK: usize = 8;
/// Tokens that share what the kernel for few tokens reads.
const FEW: usize = 4;
/// Rows of a matrix that a lane works on at once.
const ROWS: usize = 8;
/// Tokens from which tensor cores are used: for 2 to 4 on an H100 in half the time of the other kernel.
const MANY: usize = 2;
/// Tokens, rows and columns of a step of the tensor-core kernel.
const TILE: usize = 64;
/// First compute capability with its instructions.
const TENSOR_CORE_COMPUTE: u32 = 80;

/// A matrix `[out, inner]` for each head, in F16 on a GPU.
#[derive(Debug)]
pub struct DeviceHeads {
    /// `[heads, out, padded]`, zeros behind `inner`.
    weights: DeviceBuffer,
    heads: usize,
    out: usize,
    inner: usize,
    padded: usize,
}

impl DeviceHeads {
    /// The matrices in `values` `[heads, out, inner]`, rounded to F16.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    ///
    /// # Panics
    /// If there are other than `heads * out * inner` values, or none.
    pub fn upload(
        gpu: &Gpu,
        heads: usize,
        out: usize,
        inner: usize,
        values: &[f32],
    ) -> Result<Self, CudaError> {
        assert!(heads > 0 && out > 0 && inner > 0, "heads: no matrices");
        assert_eq!(values.len(), heads * out * inner, "heads: values");
        let padded = inner.next_multiple_of(CHUNK);
        let mut halves = vec![f16::ZERO; heads * out * padded];
        for (halves, values) in halves
            .chunks_exact_mut(padded)
            .zip(values.chunks_exact(inner))
        {
            halves[..inner].convert_from_f32_slice(values);
        }
        Ok(Self {
            weights: DeviceBuffer::upload(gpu, &halves)?,
            heads,
            out,
            inner,
            padded,
        })
    }

    /// Bytes of GPU memory.
    pub fn bytes(&self) -> usize {
        self.weights.bytes()
    }

    /// For each head `h` and token `t`: `out[t, h] = W_h x[t, h]`, where row `t` of `x` holds the heads as
    /// `x_rows` says and `out` is `[tokens, heads * out]`.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// If a matrix does not fit the shapes.
    pub fn multiply(
        &self,
        x: DeviceMatrix,
        x_rows: HeadRows,
        out: DeviceMatrix,
    ) -> Result<(), CudaError> {
        let (heads, rows, inner, tokens) = (self.heads, self.out, self.inner, x.rows());
        assert_eq!(x.cols(), x_rows.width, "heads: x");
        assert_eq!(out.len(), tokens * heads * rows, "heads: out");
        assert!(
            x_rows.start(0, heads - 1) + inner <= x_rows.width,
            "heads: {heads} heads of {inner} values leave {x_rows:?}"
        );
        if tokens == 0 {
            return Ok(());
        }
        let gpu = self.weights.gpu();
        let mut args = vec![
            Arg::Ptr(self.weights.address()),
            x.arg(),
            out.arg(),
            Arg::U32(tokens as u32),
            Arg::U32(heads as u32),
            Arg::U32(rows as u32),
            Arg::U32(self.padded as u32),
            Arg::U32(x_rows.width as u32),
            Arg::U32(x_rows.stride as u32),
            Arg::U32(x_rows.offset as u32),
        ];
        let (name, launch) = if tokens >= MANY && self.fits_tensor_cores(gpu, x_rows) {
            let blocks = [rows.div_ceil(TILE), tokens.div_ceil(TILE), heads];
            ("ktx_heads_many", Launch::grid(blocks, THREADS as u32))
        } else {
            let lanes = (self.padded / CHUNK).next_power_of_two().clamp(8, 32);
            args.extend([Arg::U32(inner as u32), Arg::U32(lanes as u32)]);
            let (few, name) = match tokens {
                1 => (1, "ktx_heads_few_1"),
                _ => (FEW, "ktx_heads_few_4"),
            };
            let per_block = THREADS / lanes * ROWS;
            let blocks = [rows.div_ceil(per_block), heads, tokens.div_ceil(few)];
            let launch = Launch::grid(blocks, THREADS as u32).early();
            (
                name,
                launch.with_shared(few * self.padded * size_of::<f32>()),
            )
        };
        // SAFETY: the kernel's arguments; shapes checked above.
        unsafe { gpu.launch(gpu.function(MODULE, name)?, launch, &args) }
    }

    /// Whether `heads_many` takes the shape: whole steps, and loads of four floats.
    fn fits_tensor_cores(&self, gpu: &Gpu, x_rows: HeadRows) -> bool {
        let starts = [x_rows.width, x_rows.stride, x_rows.offset];
        gpu.compute() >= TENSOR_CORE_COMPUTE
            && self.inner.is_multiple_of(TILE)
            && self.out.is_multiple_of(2)
            && starts.iter().all(|n| n.is_multiple_of(4))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{GpuMatrix, Random, assert_close};

    fn check(
        gpu: &Gpu,
        (heads, rows, cols): (usize, usize, usize),
        x_rows: HeadRows,
        tokens: usize,
    ) {
        let mut random = Random::new(tokens as u64);
        let weights = random.floats(heads * rows * cols, 1.0);
        let device = DeviceHeads::upload(gpu, heads, rows, cols, &weights).unwrap();
        let x = random.floats(tokens * x_rows.width, 1.0);
        let mut expected = vec![0.0; tokens * heads * rows];
        for (at, expected) in expected.iter_mut().enumerate() {
            let (t, h, r) = (at / rows / heads, at / rows % heads, at % rows);
            let x = &x[x_rows.start(t, h)..][..cols];
            let w = &weights[(h * rows + r) * cols..][..cols];
            let terms = w.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
            *expected = terms.sum();
        }
        let (a, out) = (
            GpuMatrix::of(gpu, tokens, &x),
            GpuMatrix::poisoned(gpu, tokens, heads * rows),
        );
        device.multiply(a.matrix, x_rows, out.matrix).unwrap();
        let what = format!("{rows} {cols} {x_rows:?} {tokens}");
        assert_close(&out.values(), &expected, 4e-7, &what);
    }

    #[test]
    fn gpu_heads_are_multiplied_with_their_own_matrices() {
        let Some(gpu) = Gpu::for_tests() else { return };
        for tokens in [1, 3, 4, 5, 11, 12, 64, 70, 130] {
            let inside = |heads: usize, stride: usize, offset: usize| HeadRows {
                width: heads * stride + offset,
                stride,
                offset,
            };
            check(&gpu, (16, 512, 128), inside(16, 192, 0), tokens);
            check(&gpu, (16, 128, 512), HeadRows::packed(16, 512), tokens);
            check(&gpu, (3, 40, 33), inside(3, 50, 4), tokens);
            check(&gpu, (5, 72, 64), inside(5, 68, 8), tokens);
        }
    }
}
