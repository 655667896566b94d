//! Element-wise operations on a GPU; see `activation.cu`.

use super::GatedActivation;
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch};

const MODULE: &str = "activation/activation";
const THREADS: u32 = 256;
/// Blocks of an element-wise kernel at most; its threads walk further elements.
const MOST_BLOCKS: usize = 4096;

/// Whether a factor is used as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowScale {
    /// The factor itself.
    Plain,
    /// The sigmoid of the factor.
    Sigmoid,
}

fn elements(count: usize) -> Launch {
    Launch::linear(
        count.div_ceil(THREADS as usize).clamp(1, MOST_BLOCKS),
        THREADS,
    )
    .early()
}

fn same_shape(what: &str, a: DeviceMatrix, b: DeviceMatrix) {
    assert_eq!((a.rows(), a.cols()), (b.rows(), b.cols()), "{what}: shapes");
}

/// `out = activation(gate, up)`. `out` may be `gate`.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the shapes differ.
pub fn gated(
    gpu: &Gpu,
    activation: GatedActivation,
    gate: DeviceMatrix,
    up: DeviceMatrix,
    out: DeviceMatrix,
) -> Result<(), CudaError> {
    same_shape("gated: gate and out", gate, out);
    same_shape("gated: up and out", up, out);
    launch_gated(
        gpu,
        activation,
        [gate.address(), up.address()],
        out.cols(),
        out,
    )
}

/// `out = activation(gate, up)` of rows that hold both, `gate_up` `[rows, 2 * width]` = `[gate | up]`.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If `out` is not `[rows, width]`.
pub fn gated_joined(
    gpu: &Gpu,
    activation: GatedActivation,
    gate_up: DeviceMatrix,
    out: DeviceMatrix,
) -> Result<(), CudaError> {
    assert_eq!(gate_up.rows(), out.rows(), "gated_joined: rows");
    assert_eq!(gate_up.cols(), 2 * out.cols(), "gated_joined: columns");
    let up = gate_up.address() + (out.cols() * size_of::<f32>()) as u64;
    launch_gated(
        gpu,
        activation,
        [gate_up.address(), up],
        gate_up.cols(),
        out,
    )
}

fn launch_gated(
    gpu: &Gpu,
    activation: GatedActivation,
    [gate, up]: [u64; 2],
    stride: usize,
    out: DeviceMatrix,
) -> Result<(), CudaError> {
    if out.is_empty() {
        return Ok(());
    }
    let (kind, alpha, limit) = match activation {
        GatedActivation::SwiGlu => (0, 0.0, 0.0),
        GatedActivation::ClampedSwiGlu { alpha, limit } => (1, alpha, limit),
    };
    let args = [
        Arg::Ptr(gate),
        Arg::Ptr(up),
        out.arg(),
        Arg::U32(out.rows() as u32),
        Arg::U32(out.cols() as u32),
        Arg::U32(stride as u32),
        Arg::I32(kind),
        Arg::F32(alpha),
        Arg::F32(limit),
    ];
    // SAFETY: the kernel's arguments; the matrices hold the rows (checked by the callers).
    unsafe {
        gpu.launch(
            gpu.function(MODULE, "ktx_gated")?,
            elements(out.len() / 4),
            &args,
        )
    }
}

/// `x = sigmoid(x)`, in place.
///
/// # Errors
/// What the driver refuses.
pub fn sigmoid(gpu: &Gpu, x: DeviceMatrix) -> Result<(), CudaError> {
    if x.is_empty() {
        return Ok(());
    }
    let args = [x.arg(), Arg::U64(x.len() as u64)];
    // SAFETY: the kernel's arguments.
    unsafe {
        gpu.launch(
            gpu.function(MODULE, "ktx_sigmoid")?,
            elements(x.len()),
            &args,
        )
    }
}

/// `y += x`.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the shapes differ.
pub fn add(gpu: &Gpu, y: DeviceMatrix, x: DeviceMatrix) -> Result<(), CudaError> {
    same_shape("add: x and y", x, y);
    if y.is_empty() {
        return Ok(());
    }
    let args = [y.arg(), x.arg(), Arg::U64(y.len() as u64)];
    // SAFETY: the kernel's arguments; both hold that many values.
    unsafe {
        gpu.launch(
            gpu.function(MODULE, "ktx_add")?,
            elements(y.len() / 4),
            &args,
        )
    }
}

/// `y[t] += bias` for every row of `y`; `bias` holds as many floats as a row.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the bias has another length.
pub fn add_bias(gpu: &Gpu, y: DeviceMatrix, bias: &DeviceBuffer) -> Result<(), CudaError> {
    assert_eq!(
        bias.bytes(),
        y.cols() * size_of::<f32>(),
        "add_bias: bytes of the bias"
    );
    if y.is_empty() {
        return Ok(());
    }
    let args = [
        y.arg(),
        Arg::Ptr(bias.address()),
        Arg::U32(y.rows() as u32),
        Arg::U32(y.cols() as u32),
    ];
    // SAFETY: the kernel's arguments; shapes checked above.
    unsafe {
        gpu.launch(
            gpu.function(MODULE, "ktx_add_bias")?,
            elements(y.len()),
            &args,
        )
    }
}

/// `y[t] += scale[t] * x[t]`, or the sigmoid of `scale[t]` in its place; `scale` is `[rows, 1]`.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the shapes do not fit.
pub fn add_scaled_rows(
    gpu: &Gpu,
    y: DeviceMatrix,
    x: DeviceMatrix,
    scale: DeviceMatrix,
    how: RowScale,
) -> Result<(), CudaError> {
    same_shape("add_scaled_rows: x and y", x, y);
    assert_eq!(scale.len(), y.rows(), "add_scaled_rows: factors");
    if y.is_empty() {
        return Ok(());
    }
    let args = [
        y.arg(),
        x.arg(),
        scale.arg(),
        Arg::U32(y.rows() as u32),
        Arg::U32(y.cols() as u32),
        Arg::I32(i32::from(how == RowScale::Sigmoid)),
    ];
    // SAFETY: the kernel's arguments; shapes checked above.
    unsafe {
        gpu.launch(
            gpu.function(MODULE, "ktx_add_scaled_rows")?,
            elements(y.len()),
            &args,
        )
    }
}

/// Softmax of every row of `x`, in place.
///
/// # Errors
/// What the driver refuses.
pub fn softmax_rows(gpu: &Gpu, x: DeviceMatrix) -> Result<(), CudaError> {
    if x.is_empty() {
        return Ok(());
    }
    let args = [x.arg(), Arg::U32(x.cols() as u32)];
    let launch = Launch::linear(x.rows(), (x.cols().next_multiple_of(32)).min(1024) as u32).early();
    // SAFETY: the kernel's arguments; a block a row.
    unsafe { gpu.launch(gpu.function(MODULE, "ktx_softmax_rows")?, launch, &args) }
}
