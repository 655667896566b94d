//! RMSNorm on a GPU; see `norm.cu`.

use super::NormRows;
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch};

const MODULE: &str = "norm/norm";
/// Rows up to this width take a warp; wider ones a block.
const WARP_WIDTH: usize = 512;
/// Warps of a block that normalises heads.
const HEAD_WARPS: u32 = 8;

fn block_per_row(rows: usize, width: usize) -> Launch {
    Launch::linear(
        rows,
        width.div_ceil(4).next_multiple_of(32).min(1024) as u32,
    )
    .early()
}

fn check_weight(weight: &DeviceBuffer, width: usize) {
    assert_eq!(
        weight.bytes(),
        width * size_of::<f32>(),
        "rms_norm: bytes of the weight"
    );
}

/// Normalises the rows of `x` into `out`, which may be `x`; `weight` holds a row of floats.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the shapes differ.
pub fn rms_norm(
    gpu: &Gpu,
    x: DeviceMatrix,
    weight: &DeviceBuffer,
    eps: f32,
    out: DeviceMatrix,
) -> Result<(), CudaError> {
    assert_eq!(
        (x.rows(), x.cols()),
        (out.rows(), out.cols()),
        "rms_norm: x and out"
    );
    check_weight(weight, x.cols());
    if x.is_empty() {
        return Ok(());
    }
    if x == out && x.cols() <= WARP_WIDTH {
        let rows = NormRows::contiguous(x.rows(), x.cols());
        return rms_norm_in_place(gpu, x, &rows, weight, eps);
    }
    let args = [
        x.arg(),
        Arg::Ptr(weight.address()),
        out.arg(),
        Arg::U32(x.cols() as u32),
        Arg::F32(eps),
    ];
    let function = gpu.function(MODULE, "ktx_rms_norm")?;
    // SAFETY: the kernel's arguments; a block a row, all of the width of the weight.
    unsafe { gpu.launch(function, block_per_row(x.rows(), x.cols()), &args) }
}

/// `hidden += y`, then `out = norm(hidden)`, in one pass.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the shapes differ.
pub fn add_rms_norm(
    gpu: &Gpu,
    hidden: DeviceMatrix,
    y: DeviceMatrix,
    weight: &DeviceBuffer,
    eps: f32,
    out: DeviceMatrix,
) -> Result<(), CudaError> {
    let shape = (hidden.rows(), hidden.cols());
    assert_eq!((y.rows(), y.cols()), shape, "add_rms_norm: y and hidden");
    assert_eq!(
        (out.rows(), out.cols()),
        shape,
        "add_rms_norm: out and hidden"
    );
    check_weight(weight, hidden.cols());
    if hidden.is_empty() {
        return Ok(());
    }
    let args = [
        hidden.arg(),
        y.arg(),
        Arg::Ptr(weight.address()),
        out.arg(),
        Arg::U32(hidden.cols() as u32),
        Arg::F32(eps),
    ];
    let function = gpu.function(MODULE, "ktx_add_rms_norm")?;
    // SAFETY: the kernel's arguments; a block a row, all of the width of the weight.
    unsafe { gpu.launch(function, block_per_row(hidden.rows(), hidden.cols()), &args) }
}

/// Normalises rows of the weight's width in place, wherever `rows` says they lie in `x`.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the rows overlap or leave `x`.
pub fn rms_norm_in_place(
    gpu: &Gpu,
    x: DeviceMatrix,
    rows: &NormRows,
    weight: &DeviceBuffer,
    eps: f32,
) -> Result<(), CudaError> {
    let width = weight.bytes() / size_of::<f32>();
    rows.check(width, x.len());
    let count = rows.tokens * rows.rows;
    if width == 0 || count == 0 {
        return Ok(());
    }
    let args = [
        x.arg(),
        Arg::Ptr(weight.address()),
        Arg::U32(width as u32),
        Arg::F32(eps),
        Arg::U32(rows.tokens as u32),
        Arg::U32(rows.rows as u32),
        Arg::U32(rows.token_stride as u32),
        Arg::U32(rows.row_stride as u32),
        Arg::U32(rows.offset as u32),
    ];
    let launch = Launch::linear(count.div_ceil(HEAD_WARPS as usize), 32 * HEAD_WARPS).early();
    let function = gpu.function(MODULE, "ktx_rms_norm_heads")?;
    // SAFETY: the kernel's arguments; the rows lie in `x` and do not overlap (checked).
    unsafe { gpu.launch(function, launch, &args) }
}
