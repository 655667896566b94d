//! Products with few tokens; see `gemv.cu`.

use super::layout::{GROUP, is_float};
use super::upload::type_number;
use super::{Norm, Product};
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch};

const MODULE: &str = "linear/gemv";
/// Most warps of a block of `ktx_gemv`.
const MAX_WARPS: usize = 32;
/// Matrices that one launch multiplies.
pub(super) const MAX_TARGETS: usize = 4;
/// Blocks of a matrix per multiprocessor of the kernels for several tokens, at most.
const BLOCKS_PER_SM: usize = 4;
/// Warps per multiprocessor below which warps share a row.
const FEW_WARPS_PER_SM: usize = 4;
/// Dynamic shared memory that every GPU gives a block.
const SHARED_BYTES: usize = 44 << 10;
/// Threads of a block that quantises, four values each.
const QUANTIZE_THREADS: usize = 256;

/// Bytes of a token's quantised activations.
pub(crate) fn quantized_bytes(cols: usize) -> usize {
    48 * cols.div_ceil(GROUP)
}

/// `Target` of the source.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Target {
    rows: u64,
    bias: u64,
    residual: u64,
    out: u64,
    ty: u32,
    row_count: u32,
    row_bytes: u32,
    out_stride: u32,
    end_block: u32,
    warps_per_row: u32,
}

/// `Targets` of the source.
#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Targets {
    of: [Target; MAX_TARGETS],
    x: u64,
    quantized: u64,
    norm: u64,
    norm_epsilon: f32,
    columns: u32,
    tokens: u32,
    count: u32,
}

/// Which kernel, with its rows of weights per warp and its tokens per block.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kernel {
    One,
    Four,
    Eight,
    Exact,
}

impl Kernel {
    fn name(self) -> &'static str {
        match self {
            Self::One => "ktx_gemv",
            Self::Four => "ktx_gemv_4",
            Self::Eight => "ktx_gemv_8",
            Self::Exact => "ktx_gemv_f32",
        }
    }

    fn rows_per_warp(self) -> usize {
        if self == Self::Exact { 1 } else { 2 }
    }

    /// Warps of a block for matrices that would fill `warps` warps of each multiprocessor. One token: as many
    /// as there is work for, so that an SM quantises the activations once.
    fn warps(self, warps: usize) -> usize {
        match self {
            Self::One => warps.next_power_of_two().clamp(4, MAX_WARPS),
            Self::Four => 8,
            Self::Eight | Self::Exact => 4,
        }
    }

    fn tokens(self) -> usize {
        match self {
            Self::One => 1,
            Self::Four | Self::Exact => 4,
            Self::Eight => 8,
        }
    }
}

/// Shared memory that one token's activations take in `ktx_gemv`.
fn shared_bytes(products: &[Product<'_>], cols: usize, norm: bool) -> usize {
    let floats = products.iter().any(|p| is_float(p.weights.rows.layout.ty));
    let staged = if floats && norm {
        cols.next_multiple_of(GROUP) * size_of::<f32>()
    } else {
        0
    };
    quantized_bytes(cols).max(staged)
}

/// Whether `ktx_gemv` has the shared memory for one token.
pub(super) fn fits_one(products: &[Product<'_>], cols: usize, norm: bool) -> bool {
    shared_bytes(products, cols, norm) <= SHARED_BYTES
}

/// Products of one token, normalised first if asked to.
pub(super) fn one(
    gpu: &Gpu,
    products: &[Product<'_>],
    x: DeviceMatrix,
    norm: Option<Norm<'_>>,
) -> Result<(), CudaError> {
    let shared = shared_bytes(products, x.cols(), norm.is_some());
    launch(gpu, Kernel::One, products, x, 0, norm, shared)
}

/// Products of few tokens: quantised to `scratch` first, where codes are among the weights.
pub(super) fn few(
    gpu: &Gpu,
    products: &[Product<'_>],
    x: DeviceMatrix,
    scratch: DeviceMatrix,
) -> Result<(), CudaError> {
    if products.iter().any(|p| !is_float(p.weights.rows.layout.ty)) {
        quantize(gpu, x, scratch)?;
    }
    let kernel = if x.rows() <= 4 {
        Kernel::Four
    } else {
        Kernel::Eight
    };
    launch(gpu, kernel, products, x, scratch.address(), None, 0)
}

/// Products of any number of tokens with every weight made a float.
pub(super) fn exact(gpu: &Gpu, products: &[Product<'_>], x: DeviceMatrix) -> Result<(), CudaError> {
    launch(gpu, Kernel::Exact, products, x, 0, None, 0)
}

/// Tokens that scratch for `few` has room for: whole blocks read it.
pub(super) fn padded_tokens(tokens: usize) -> usize {
    tokens.next_multiple_of(8)
}

fn quantize(gpu: &Gpu, x: DeviceMatrix, to: DeviceMatrix) -> Result<(), CudaError> {
    let groups = x.cols().div_ceil(GROUP);
    let grid = [groups.div_ceil(QUANTIZE_THREADS / 8), x.rows(), 1];
    let args = [to.arg(), x.arg(), Arg::U32(x.cols() as u32)];
    // SAFETY: the kernel's arguments; callers checked that `to` has room for the tokens.
    unsafe {
        gpu.launch(
            gpu.function(MODULE, "ktx_quantize")?,
            Launch::grid(grid, QUANTIZE_THREADS as u32),
            &args,
        )
    }
}

fn launch(
    gpu: &Gpu,
    kernel: Kernel,
    products: &[Product<'_>],
    x: DeviceMatrix,
    quantized: u64,
    norm: Option<Norm<'_>>,
    shared: usize,
) -> Result<(), CudaError> {
    let mut targets = Targets {
        x: x.address(),
        quantized,
        norm: norm.map_or(0, |n| n.weights.address()),
        norm_epsilon: norm.map_or(0.0, |n| n.epsilon),
        columns: x.cols() as u32,
        tokens: x.rows() as u32,
        count: products.len() as u32,
        ..Targets::default()
    };
    let multiprocessors = gpu.info().multiprocessors;
    let row_warps = |product: &Product<'_>| product.weights.rows().div_ceil(kernel.rows_per_warp());
    let all_warps: usize = products.iter().map(row_warps).sum();
    let share = warps_per_row(all_warps, multiprocessors);
    let warps = kernel.warps((all_warps * share).div_ceil(multiprocessors));
    let most_blocks = match kernel {
        Kernel::One => multiprocessors * MAX_WARPS / warps,
        _ => multiprocessors * BLOCKS_PER_SM,
    };
    let mut end_block = 0;
    for (target, product) in targets.of.iter_mut().zip(products) {
        let rows = &product.weights.rows;
        let blocks = (row_warps(product) * share).div_ceil(warps);
        end_block += blocks.min(most_blocks);
        *target = Target {
            rows: rows.buffer.address(),
            bias: product.bias.map_or(0, DeviceBuffer::address),
            residual: product.residual.map_or(0, DeviceMatrix::address),
            out: product.out.address(),
            ty: type_number(rows.layout.ty),
            row_count: rows.rows as u32,
            row_bytes: rows.layout.bytes as u32,
            out_stride: rows.rows as u32,
            end_block: end_block as u32,
            warps_per_row: share as u32,
        };
    }
    let grid = [end_block, x.rows().div_ceil(kernel.tokens()), 1];
    let launch = Launch::grid(grid, 32 * warps as u32).with_shared(shared);
    let args = [Arg::Struct(std::ptr::from_ref(&targets).cast())];
    // SAFETY: the kernel's argument; callers checked every shape against its matrix.
    unsafe { gpu.launch(gpu.function(MODULE, kernel.name())?, launch, &args) }
}

/// Most warps that share a row: those of the smallest block.
const MAX_SHARE: usize = 4;

/// How many warps share a row, so that there are enough to fill the GPU.
fn warps_per_row(warps: usize, multiprocessors: usize) -> usize {
    let mut share = 1;
    while share < MAX_SHARE && warps * share < multiprocessors * FEW_WARPS_PER_SM {
        share *= 2;
    }
    share
}
