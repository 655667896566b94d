//! Rotary position embedding on a GPU; see `rope.cu`.

use super::{RopeHeads, RopeLayout, RopeTable};
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch};

const MODULE: &str = "rope/rope";
const THREADS: usize = 128;
/// Blocks at most; their threads walk further pairs.
const MOST_BLOCKS: usize = 8192;

/// Rows of a [`RopeTable`] on a GPU, `[positions, dim]`.
#[derive(Debug)]
pub struct DeviceRopeTable {
    rows: DeviceBuffer,
    dim: usize,
    positions: usize,
}

impl DeviceRopeTable {
    /// The first `positions` rows of `table`, or all if it has fewer.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    pub fn upload(gpu: &Gpu, table: &RopeTable, positions: usize) -> Result<Self, CudaError> {
        let positions = positions.min(table.positions());
        let rows: Vec<f32> = (0..positions)
            .flat_map(|p| table.row(p).iter().copied())
            .collect();
        Ok(Self {
            rows: DeviceBuffer::upload(gpu, &rows)?,
            dim: table.dim(),
            positions,
        })
    }

    /// Rotated dimensions of a head.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Positions that it covers. A kernel reads the last row for positions beyond.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// Where the rows are.
    pub fn address(&self) -> u64 {
        self.rows.address()
    }

    /// Bytes of GPU memory.
    pub fn bytes(&self) -> usize {
        self.rows.bytes()
    }
}

pub(crate) fn layout_number(layout: RopeLayout) -> i32 {
    match layout {
        RopeLayout::Interleaved => 0,
        RopeLayout::Half => 1,
    }
}

/// Rotates the heads of every row of `x` `[tokens, token_stride]`; row `t` is at position `t` of `positions`,
/// the address of u32 on the GPU.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the heads overlap or leave `x`, or the table is empty.
pub fn rope(
    gpu: &Gpu,
    table: &DeviceRopeTable,
    layout: RopeLayout,
    heads: &RopeHeads,
    positions: u64,
    x: DeviceMatrix,
) -> Result<(), CudaError> {
    let tokens = x.rows();
    heads.check(table.dim, tokens, x.len());
    if tokens == 0 || heads.heads == 0 {
        return Ok(());
    }
    assert!(table.positions > 0, "rope: the table is empty");
    let args = [
        x.arg(),
        Arg::Ptr(table.address()),
        Arg::Ptr(positions),
        Arg::U32(tokens as u32),
        Arg::U32(heads.heads as u32),
        Arg::U32(heads.head_stride as u32),
        Arg::U32(heads.token_stride as u32),
        Arg::U32(heads.offset as u32),
        Arg::U32(table.dim as u32),
        Arg::I32(layout_number(layout)),
        Arg::U32(table.positions as u32),
    ];
    let pairs = tokens * heads.heads * table.dim / 2;
    let launch = Launch::linear(pairs.div_ceil(THREADS).min(MOST_BLOCKS), THREADS as u32).early();
    // SAFETY: the kernel's arguments; the heads lie in `x` and do not overlap (checked).
    unsafe { gpu.launch(gpu.function(MODULE, "ktx_rope")?, launch, &args) }
}
