//! Weights from main memory to a GPU's.

use ktx_gguf::GgmlType;

use super::layout::{RowLayout, is_native};
use crate::cuda::{Arg, CudaError, DeviceBuffer, Gpu, Launch};
use crate::linear::WeightRows;

const MODULE: &str = "linear/repack";
/// Rows of a block of the kernels, a warp each.
const ROWS_PER_BLOCK: usize = 4;
/// Bytes that are copied at a time.
const STAGING_BYTES: usize = 64 << 20;

/// Rows of weights in a GPU's memory.
#[derive(Debug)]
pub(crate) struct DeviceRows {
    pub(crate) buffer: DeviceBuffer,
    pub(crate) layout: RowLayout,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl DeviceRows {
    /// Copies `weights` and regroups them; complete when the call returns.
    pub(crate) fn upload(gpu: &Gpu, weights: WeightRows<'_>) -> Result<Self, CudaError> {
        let (rows, cols) = (weights.rows(), weights.cols());
        let layout = RowLayout::of(weights.ty(), cols);
        let device = Self {
            buffer: DeviceBuffer::new(gpu, rows * layout.bytes)?,
            layout,
            rows,
            cols,
        };
        let source_row_bytes = match is_native(weights.ty()) {
            true => weights.row_bytes(),
            false => cols * size_of::<half::f16>(),
        };
        if rows * source_row_bytes == 0 {
            return Ok(device);
        }
        let at_a_time = (STAGING_BYTES / source_row_bytes).clamp(1, rows);
        let mut staging = DeviceBuffer::new(gpu, at_a_time * source_row_bytes)?;
        let mut converted = Vec::new();
        for first in (0..rows).step_by(at_a_time) {
            let count = at_a_time.min(rows - first);
            let part = weights
                .rows_range(first, count)
                .expect("the range is within the rows");
            if is_native(weights.ty()) {
                staging.write(0, part.bytes())?;
            } else {
                to_halves(part, &mut converted);
                staging.write(0, &converted)?;
            }
            device.repack(staging.address(), source_row_bytes, first, count)?;
        }
        gpu.synchronize()?;
        Ok(device)
    }

    /// Regroups `count` rows that lie in GGUF blocks at `source` into rows `first` and up.
    fn repack(
        &self,
        source: u64,
        source_row_bytes: usize,
        first: usize,
        count: usize,
    ) -> Result<(), CudaError> {
        let gpu = self.buffer.gpu();
        let to = Arg::Ptr(self.buffer.address() + (first * self.layout.bytes) as u64);
        let ty = Arg::U32(type_number(self.layout.ty));
        let [rows, cols, row_bytes, source_row_bytes] =
            [count, self.cols, self.layout.bytes, source_row_bytes].map(|n| Arg::U32(n as u32));
        let launch = Launch::linear(count.div_ceil(ROWS_PER_BLOCK), 32 * ROWS_PER_BLOCK as u32);
        let args = [
            to,
            Arg::Ptr(source),
            ty,
            rows,
            cols,
            row_bytes,
            source_row_bytes,
        ];
        // SAFETY: the kernel's arguments; the buffer has the rows (callers pass ranges within them), and the
        // source holds `count` rows.
        unsafe { gpu.launch(gpu.function(MODULE, "ktx_repack")?, launch, &args) }?;
        let args = [to, ty, rows, cols, row_bytes];
        // SAFETY: as above.
        unsafe { gpu.launch(gpu.function(MODULE, "ktx_row_factors")?, launch, &args) }
    }
}

/// The number that the kernels know a type by.
pub(crate) fn type_number(ty: GgmlType) -> u32 {
    ty.id()
}

/// Rows of a type without kernels, in half precision.
fn to_halves(rows: WeightRows<'_>, out: &mut Vec<u16>) {
    let mut values = vec![0.0; rows.cols()];
    out.clear();
    for row in 0..rows.rows() {
        let known = rows.dequantize(row, &mut values);
        debug_assert!(known.is_some(), "the row exists");
        out.extend(values.iter().map(|v| half::f16::from_f32(*v).to_bits()));
    }
}
