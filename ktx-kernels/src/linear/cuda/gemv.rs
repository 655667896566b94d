//! Products with few tokens; see `gemv.cu`.

use ktx_gguf::GgmlType;

use super::layout::{GROUP, is_float};
use super::upload::type_number;
use super::{Norm, Product};
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch};

const MODULE: &str = "linear/gemv";
/// Most warps of a block of `ktx_gemv`.
const MAX_WARPS: usize = 32;
/// Matrices that one launch multiplies.
pub(super) const MAX_TARGETS: usize = 4;
/// Warps per multiprocessor below which warps share a row.
const FEW_WARPS_PER_SM: usize = 8;
/// Most warps that share a row.
const MAX_SHARE: usize = 8;
/// Rows that a warp multiplies at once.
const ROWS_PER_WARP: usize = 2;
/// Columns up to which a block of one token takes at most half of an SM.
const SHORT_COLS: usize = 4096;
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

/// Which kernel.
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

    /// Warps of a block, at most.
    fn most_warps(self) -> usize {
        match self {
            Self::One => MAX_WARPS,
            Self::Four | Self::Eight => 8,
            Self::Exact => 4,
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
            Launch::grid(grid, QUANTIZE_THREADS as u32).early(),
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
    let shape = Shape::of(kernel, products, x.cols(), gpu.info().multiprocessors);
    let mut end_block = 0;
    for (index, (target, product)) in targets.of.iter_mut().zip(products).enumerate() {
        let rows = &product.weights.rows;
        end_block += shape.blocks[index];
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
            warps_per_row: shape.warps_per_row[index] as u32,
        };
    }
    let grid = [end_block, x.rows().div_ceil(kernel.tokens()), 1];
    let launch = Launch::grid(grid, 32 * shape.warps as u32)
        .with_shared(shared)
        .early();
    let args = [Arg::Struct(std::ptr::from_ref(&targets).cast())];
    // SAFETY: the kernel's argument; callers checked every shape against its matrix.
    unsafe { gpu.launch(gpu.function(MODULE, kernel.name())?, launch, &args) }
}

/// How a launch is cut.
struct Shape {
    /// Warps of a block.
    warps: usize,
    /// Blocks of each matrix.
    blocks: [usize; MAX_TARGETS],
    /// Warps that share a row of each matrix.
    warps_per_row: [usize; MAX_TARGETS],
}

impl Shape {
    /// One token: one block an SM with as many warps as there is work for, so that the activations are
    /// quantised once an SM. More tokens: as many small blocks as fit.
    fn of(kernel: Kernel, products: &[Product<'_>], cols: usize, multiprocessors: usize) -> Self {
        let mut shape = Self {
            warps: kernel.most_warps(),
            blocks: [0; MAX_TARGETS],
            warps_per_row: [1; MAX_TARGETS],
        };
        let mut wanted = [0; MAX_TARGETS];
        for (index, product) in products.iter().enumerate() {
            let share = warps_per_row(product, multiprocessors).min(kernel.most_warps());
            shape.warps_per_row[index] = share;
            wanted[index] = product.weights.rows().div_ceil(ROWS_PER_WARP) * share;
        }
        let all: usize = wanted.iter().sum();
        if kernel == Kernel::One {
            shape.warps = one_token_warps(cols, all.div_ceil(multiprocessors));
        }
        let most_blocks = match kernel {
            Kernel::One => multiprocessors * (MAX_WARPS / shape.warps),
            Kernel::Four | Kernel::Eight => 2 * multiprocessors,
            Kernel::Exact => 3 * multiprocessors,
        };
        let fits = all <= most_blocks * shape.warps;
        for (blocks, wanted) in shape.blocks.iter_mut().zip(wanted) {
            let all_of_it = wanted.div_ceil(shape.warps);
            *blocks = match fits {
                true => all_of_it,
                // Its part of the blocks that fit at once.
                false => (most_blocks * wanted / all).clamp(wanted.min(1), all_of_it),
            };
        }
        shape
    }
}

/// Warps of a block for one token: enough to quantise its `cols` values at once, up to half of an SM, so that the
/// next kernel's blocks can start beside them; all of an SM for long rows where `warps` of work an SM fill it.
fn one_token_warps(cols: usize, warps: usize) -> usize {
    if cols <= 1024 {
        8
    } else if cols <= SHORT_COLS || warps <= MAX_WARPS / 2 {
        MAX_WARPS / 2
    } else {
        MAX_WARPS
    }
}

/// How many warps share a pair of rows: as many as leave each lane two loads of either, which are under way
/// at once, or more where there are few rows, within the warps that the GPU holds.
fn warps_per_row(product: &Product<'_>, multiprocessors: usize) -> usize {
    let rows = &product.weights.rows;
    let (columns_per_load, most) = match rows.layout.ty {
        GgmlType::F32 => (4, MAX_SHARE),
        GgmlType::F16 | GgmlType::BF16 => (8, MAX_SHARE),
        _ => (GROUP, MAX_SHARE / 2),
    };
    let loads = rows.cols.div_ceil(columns_per_load);
    let pairs = rows.rows.div_ceil(ROWS_PER_WARP);
    let mut share = 1;
    loop {
        let more_than_a_round = loads > 64 * share;
        let few = loads > 16 * share && pairs * share < multiprocessors * FEW_WARPS_PER_SM;
        let fits = 2 * share <= most && 2 * pairs * share <= multiprocessors * MAX_WARPS;
        if !fits || !(more_than_a_round || few) {
            return share;
        }
        share *= 2;
    }
}
