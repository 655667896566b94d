//! Products with many tokens; see `gemm.cu`.

use super::Product;
use super::upload::{DeviceRows, type_number};
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch};

const MODULE: &str = "linear/gemm";
/// Rows of weights of a block.
const TILE_ROWS: usize = 128;
/// Tokens of a block of either kernel.
pub(crate) const SMALL_TILE_TOKENS: usize = 64;
pub(crate) const LARGE_TILE_TOKENS: usize = 128;
/// Blocks of the smaller tile that an SM holds.
const BLOCKS_PER_SM: usize = 3;
/// Tiles whose parts of sums fit the scratch: three for each of an H100's multiprocessors.
const MAX_TILES: usize = 400;
/// Steps of K that a part has at least.
const MIN_STEPS: usize = 4;
/// Columns of a step; rows of activations are padded to a multiple.
const STEP: usize = 64;

/// `Product` of the source.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct TileProduct {
    pub(crate) rows: u64,
    pub(crate) up_rows: u64,
    pub(crate) bias: u64,
    pub(crate) up_bias: u64,
    pub(crate) residual: u64,
    pub(crate) out: u64,
    pub(crate) x: u64,
    pub(crate) x_factors: u64,
    pub(crate) order: u64,
    pub(crate) tiles: u64,
    pub(crate) alpha: f32,
    pub(crate) limit: f32,
    pub(crate) activation: u32,
    pub(crate) ty: u32,
    pub(crate) row_count: u32,
    pub(crate) row_bytes: u32,
    pub(crate) factor_at: u32,
    pub(crate) code_bytes: u32,
    pub(crate) columns: u32,
    pub(crate) x_stride: u32,
    pub(crate) out_stride: u32,
    pub(crate) tokens: u32,
}

/// Activations as halves, and the factor of each row.
#[derive(Clone, Copy)]
pub(crate) struct Halves {
    address: u64,
    rows: usize,
    stride: usize,
}

impl Halves {
    /// Values in a row, padded.
    fn stride(cols: usize) -> usize {
        cols.next_multiple_of(STEP)
    }

    /// Floats that hold `rows` rows.
    pub(crate) fn floats(rows: usize, cols: usize) -> usize {
        rows * Self::stride(cols) / 2 + rows
    }

    /// Converts `x` into the memory at `address`, which has room for [`Self::floats`].
    pub(crate) fn convert(gpu: &Gpu, x: DeviceMatrix, address: u64) -> Result<Self, CudaError> {
        let halves = Self {
            address,
            rows: x.rows(),
            stride: Self::stride(x.cols()),
        };
        let args = [
            Arg::Ptr(address),
            Arg::Ptr(halves.factors()),
            x.arg(),
            Arg::U32(x.cols() as u32),
            Arg::U32(halves.stride as u32),
        ];
        // SAFETY: the kernel's arguments; the memory has room by the caller's promise.
        unsafe {
            gpu.launch(
                gpu.function(MODULE, "ktx_halves")?,
                Launch::linear(x.rows(), 256),
                &args,
            )
        }?;
        Ok(halves)
    }

    fn factors(self) -> u64 {
        self.address + (self.rows * self.stride * 2) as u64
    }
}

impl TileProduct {
    /// `weights`, of which each expert has `row_count` rows, times `x`, to `out` `[tokens, row_count]`.
    pub(crate) fn of(weights: &DeviceRows, row_count: usize, x: Halves, out: u64) -> Self {
        Self {
            rows: weights.buffer.address(),
            out,
            x: x.address,
            x_factors: x.factors(),
            ty: type_number(weights.layout.ty),
            row_count: row_count as u32,
            row_bytes: weights.layout.bytes as u32,
            factor_at: weights.layout.factor_at as u32,
            code_bytes: weights.layout.code_bytes as u32,
            columns: weights.cols as u32,
            x_stride: x.stride as u32,
            out_stride: row_count as u32,
            tokens: x.rows as u32,
            ..Self::default()
        }
    }

    /// Starts the kernel for tiles of `tile_tokens` tokens, `columns` of them, and `parts` of K.
    ///
    /// # Safety
    /// Every address must be valid for the shapes.
    pub(crate) unsafe fn launch(
        &self,
        gpu: &Gpu,
        tile_tokens: usize,
        columns: usize,
        parts: usize,
    ) -> Result<(), CudaError> {
        let name = if tile_tokens == LARGE_TILE_TOKENS {
            "ktx_gemm_128"
        } else {
            "ktx_gemm_64"
        };
        let rows_per_tile = if self.up_rows == 0 {
            TILE_ROWS
        } else {
            TILE_ROWS / 2
        };
        let row_tiles = (self.row_count as usize).div_ceil(rows_per_tile);
        let shared = 2 * (TILE_ROWS + tile_tokens) * STEP * 2;
        let launch =
            Launch::grid([columns, row_tiles, parts], 2 * tile_tokens as u32).with_shared(shared);
        let args = [Arg::Struct(std::ptr::from_ref(self).cast())];
        // SAFETY: the kernel's argument; addresses by the caller's promise.
        unsafe { gpu.launch(gpu.function(MODULE, name)?, launch, &args) }
    }
}

/// Products of many tokens, converted to halves in `scratch` once.
pub(super) fn many(
    gpu: &Gpu,
    products: &[Product<'_>],
    x: DeviceMatrix,
    scratch: DeviceMatrix,
) -> Result<(), CudaError> {
    let halves = Halves::convert(gpu, x, scratch.address())?;
    let sums = scratch.address() + (parts_at(x.rows(), x.cols()) * size_of::<f32>()) as u64;
    for product in products {
        let cut = Cut::of(gpu, x, product.weights.rows());
        let whole = TileProduct {
            bias: product.bias.map_or(0, DeviceBuffer::address),
            residual: product.residual.map_or(0, DeviceMatrix::address),
            ..TileProduct::of(
                &product.weights.rows,
                product.weights.rows(),
                halves,
                product.out.address(),
            )
        };
        if cut.parts == 1 {
            // SAFETY: callers checked every shape against its matrix; the halves are in the scratch.
            unsafe { whole.launch(gpu, cut.tile_tokens, cut.columns, 1) }?;
            continue;
        }
        let part = TileProduct {
            bias: 0,
            residual: 0,
            out: sums,
            ..whole
        };
        // SAFETY: as above; the scratch has room for `MAX_TILES` tiles.
        unsafe { part.launch(gpu, cut.tile_tokens, cut.columns, cut.parts) }?;
        add_parts(gpu, product, sums, cut.parts)?;
    }
    Ok(())
}

/// Where the parts of sums lie in the scratch, in floats: behind the halves.
fn parts_at(tokens: usize, cols: usize) -> usize {
    Halves::floats(tokens, cols).next_multiple_of(64)
}

/// Floats of scratch for `tokens` tokens.
pub(super) fn scratch_floats(tokens: usize, cols: usize) -> usize {
    parts_at(tokens, cols) + MAX_TILES * TILE_ROWS * SMALL_TILE_TOKENS
}

fn add_parts(gpu: &Gpu, product: &Product<'_>, sums: u64, parts: usize) -> Result<(), CudaError> {
    let count = product.out.len();
    let args = [
        product.out.arg(),
        Arg::Ptr(sums),
        Arg::Ptr(product.bias.map_or(0, DeviceBuffer::address)),
        Arg::Ptr(product.residual.map_or(0, DeviceMatrix::address)),
        Arg::U32(parts as u32),
        Arg::U32(product.out.cols() as u32),
        Arg::U32(count as u32),
    ];
    let launch = Launch::linear(count.div_ceil(256).min(2048), 256);
    // SAFETY: the kernel's arguments; the parts were written by the launch before.
    unsafe { gpu.launch(gpu.function(MODULE, "ktx_gemm_sum")?, launch, &args) }
}

/// How a product is cut into tiles.
struct Cut {
    tile_tokens: usize,
    /// Tiles of tokens.
    columns: usize,
    /// Parts of K.
    parts: usize,
}

impl Cut {
    /// The larger tile where it still gives every multiprocessor work; the smaller otherwise, with K in parts
    /// where even those are too few.
    fn of(gpu: &Gpu, x: DeviceMatrix, rows: usize) -> Self {
        let multiprocessors = gpu.info().multiprocessors;
        let (tokens, row_tiles) = (x.rows(), rows.div_ceil(TILE_ROWS));
        if tokens.div_ceil(LARGE_TILE_TOKENS) * row_tiles >= 2 * multiprocessors {
            return Self {
                tile_tokens: LARGE_TILE_TOKENS,
                columns: tokens.div_ceil(LARGE_TILE_TOKENS),
                parts: 1,
            };
        }
        let columns = tokens.div_ceil(SMALL_TILE_TOKENS);
        let tiles = (columns * row_tiles).max(1);
        let most = (BLOCKS_PER_SM * multiprocessors).min(MAX_TILES) / tiles;
        let steps = x.cols().div_ceil(STEP);
        Self {
            tile_tokens: SMALL_TILE_TOKENS,
            columns,
            parts: most.min(steps / MIN_STEPS).max(1),
        }
    }
}
