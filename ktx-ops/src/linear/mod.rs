//! Matrix products: on the file's blocks in main memory, on bytes made at load, and the switch between two phases.

mod fp8;
mod host;
mod lora;
mod q8;
mod router;
mod switch;

use ktx_gguf::GgmlType;
use ktx_kernels::cuda::DeviceBuffer;
use ktx_kernels::linear::cuda::{GpuMatrix, Product, multiply_many};
use ktx_kernels::linear::{Precision, WeightRows, matmul_many};
use ktx_kernels::workspace::{Act, Workspace};

pub use host::HostLinear;
pub use lora::KLinearLora;
pub use q8::KLinearQ8;
pub use switch::KTransformersLinear;

use crate::build::{OpError, Placement};
use crate::gpu::{gpus, refused};
use crate::module::{Capacity, DeviceWeights, Forward, HostMatrix, Linear};

/// How an operator's products take their activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arithmetic {
    /// As the engine was told: 8 bits, or f32 for debugging.
    AsEngine,
    /// Always f32, on dequantised weights.
    F32,
}

impl Arithmetic {
    /// The precision, where the engine's is `engine`.
    pub(crate) fn precision(self, engine: Precision) -> Precision {
        match self {
            Self::AsEngine => engine,
            Self::F32 => Precision::F32,
        }
    }
}

/// The error of a kernel that refused its arguments.
pub(crate) fn kernel_error(path: &str, error: impl std::fmt::Display) -> OpError {
    OpError::Kernel {
        path: path.to_owned(),
        message: error.to_string(),
    }
}

/// Products of one `x` with several matrices, in one parallel region where all are plain host
/// matrices, so that threads meet once and `x` is quantised once.
pub fn forward_joined<const N: usize>(
    cx: &mut Forward<'_>,
    ops: [&dyn Linear; N],
    x: Act,
    outs: [Act; N],
) -> Result<(), OpError> {
    if cx.gpu(x).is_some() {
        let matrices = ops.map(|op| op.gpu_matrix(x.device(), cx.phase));
        if matrices.iter().all(Option::is_some) {
            return multiply_joined_on_gpu(
                cx,
                matrices.map(|m| m.expect("all are there")),
                x,
                outs,
            );
        }
    }
    let matrices = ops.map(|op| op.host_matrix(cx.phase));
    if matrices.iter().any(Option::is_none) {
        return ops
            .into_iter()
            .zip(outs)
            .try_for_each(|(op, out)| op.forward(cx, x, out));
    }
    let matrices = matrices.map(|m| m.expect("all are there"));
    multiply(cx, ops[0].path(), &matrices, x, outs)?;
    ops.into_iter()
        .zip(outs)
        .try_for_each(|(op, out)| op.add_low_rank(cx, x, out))
}

/// `outs[i] = x W_i^T + b_i` in one parallel region.
pub(crate) fn multiply<const N: usize>(
    cx: &mut Forward<'_>,
    path: &str,
    matrices: &[HostMatrix<'_>; N],
    x: Act,
    outs: [Act; N],
) -> Result<(), OpError> {
    let weights: [WeightRows<'_>; N] = std::array::from_fn(|i| matrices[i].weights);
    let types: [GgmlType; N] = weights.map(|w| w.ty());
    let (activations, mut outs) = cx
        .workspace
        .prepare(cx.pool, x, cx.precision, &types, outs)
        .map_err(|e| kernel_error(path, e))?;
    matmul_many(cx.pool, &weights, activations, &mut outs).map_err(|e| kernel_error(path, e))?;
    for (matrix, out) in matrices.iter().zip(&mut outs) {
        let Some(bias) = matrix.bias else { continue };
        for row in out.chunks_exact_mut(bias.len()) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }
    Ok(())
}

/// Values of f32 that a product on a GPU takes of the workspace, where a placement names one.
pub(crate) fn gpu_scratch(placement: Placement, capacity: Capacity, in_features: usize) -> usize {
    match gpus(placement).next() {
        Some(_) => {
            let floats = GpuMatrix::scratch_floats(capacity.tokens, in_features);
            Workspace::values_for(1, floats)
        }
        None => 0,
    }
}

/// `outs[i] = x W_i^T + b_i` on the GPU that holds all of them, `x` quantised once.
fn multiply_joined_on_gpu<const N: usize>(
    cx: &mut Forward<'_>,
    matrices: [DeviceWeights<'_>; N],
    x: Act,
    outs: [Act; N],
) -> Result<(), OpError> {
    cx.scoped(|cx| {
        let floats = GpuMatrix::scratch_floats(x.rows(), x.cols());
        let scratch = cx.alloc(x.device(), 1, floats)?;
        let products: [Product<'_>; N] = std::array::from_fn(|i| Product {
            weights: matrices[i].weights,
            bias: matrices[i].bias,
            residual: None,
            out: cx.workspace.matrix(outs[i]),
        });
        let [x, scratch] = [x, scratch].map(|act| cx.workspace.matrix(act));
        multiply_many(&products, x, cx.precision, scratch).map_err(refused)
    })
}

/// `out = x W^T + b` on the GPU that holds all of them.
pub(crate) fn multiply_on_gpu(
    cx: &mut Forward<'_>,
    matrix: &GpuMatrix,
    bias: Option<&DeviceBuffer>,
    precision: Precision,
    x: Act,
    out: Act,
) -> Result<(), OpError> {
    cx.scoped(|cx| {
        let floats = GpuMatrix::scratch_floats(x.rows(), x.cols());
        let scratch = cx.alloc(x.device(), 1, floats)?;
        let [x, out, scratch] = [x, out, scratch].map(|act| cx.workspace.matrix(act));
        matrix
            .multiply(x, bias, out, precision, scratch)
            .map_err(refused)
    })
}
