//! Products with many tokens; see `gemm.cu`.

use super::Product;
use super::upload::{DeviceRows, type_number};
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch};

const MODULE: &str = "linear/gemm";
/// Rows of weights of a block.
const TILE_ROWS: usize = 128;
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
            columns: weights.cols as u32,
            x_stride: x.stride as u32,
            out_stride: row_count as u32,
            tokens: x.rows as u32,
            ..Self::default()
        }
    }

    /// Starts the kernel for tiles of `tile_tokens` tokens, `columns` of them.
    ///
    /// # Safety
    /// Every address must be valid for the shapes.
    pub(crate) unsafe fn launch(
        &self,
        gpu: &Gpu,
        tile_tokens: usize,
        columns: usize,
    ) -> Result<(), CudaError> {
        let name = if tile_tokens == 128 {
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
            Launch::grid([columns, row_tiles, 1], 2 * tile_tokens as u32).with_shared(shared);
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
    for product in products {
        let tile_tokens = tile_tokens(gpu, x.rows(), product.weights.rows());
        let columns = x.rows().div_ceil(tile_tokens);
        let tiles = TileProduct {
            bias: product.bias.map_or(0, DeviceBuffer::address),
            residual: product.residual.map_or(0, DeviceMatrix::address),
            ..TileProduct::of(
                &product.weights.rows,
                product.weights.rows(),
                halves,
                product.out.address(),
            )
        };
        // SAFETY: callers checked every shape against its matrix; the halves are in the scratch.
        unsafe { tiles.launch(gpu, tile_tokens, columns) }?;
    }
    Ok(())
}

/// The larger tile where it still gives every multiprocessor work.
fn tile_tokens(gpu: &Gpu, tokens: usize, rows: usize) -> usize {
    let tiles = tokens.div_ceil(128) * rows.div_ceil(TILE_ROWS);
    if tiles >= 2 * gpu.info().multiprocessors {
        128
    } else {
        64
    }
}
