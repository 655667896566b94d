//! Weights from main memory to a GPU's.

use ktx_gguf::GgmlType;

use super::layout::RowLayout;
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceSlice, Gpu, Launch};
use crate::linear::WeightRows;

const MODULE: &str = "linear/repack";
/// Rows of a block of the kernels, a warp each.
const ROWS_PER_BLOCK: usize = 4;
/// Bytes that are copied at a time.
const STAGING_BYTES: usize = 64 << 20;

/// Rows of weights in a GPU's memory.
#[derive(Debug)]
pub(crate) struct DeviceRows {
    pub(crate) buffer: DeviceSlice,
    pub(crate) layout: RowLayout,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
}

impl DeviceRows {
    /// Room for `rows` rows of `cols` columns of type `ty`.
    pub(crate) fn new(
        gpu: &Gpu,
        ty: GgmlType,
        rows: usize,
        cols: usize,
    ) -> Result<Self, CudaError> {
        let bytes = rows * RowLayout::of(ty, cols).bytes;
        let buffer = DeviceBuffer::new(gpu, bytes)?;
        Ok(Self::within(buffer.into(), ty, rows, cols))
    }

    /// The same in memory that is there, which may be larger.
    ///
    /// # Panics
    /// If it is too small.
    pub(crate) fn within(buffer: DeviceSlice, ty: GgmlType, rows: usize, cols: usize) -> Self {
        let layout = RowLayout::of(ty, cols);
        assert!(
            rows * layout.bytes <= buffer.bytes(),
            "rows beyond their memory"
        );
        Self {
            buffer,
            layout,
            rows,
            cols,
        }
    }

    /// Copies `weights` and regroups them; complete when the call returns.
    pub(crate) fn upload(gpu: &Gpu, weights: WeightRows<'_>) -> Result<Self, CudaError> {
        let rows = Self::new(gpu, weights.ty(), weights.rows(), weights.cols())?;
        rows.fill(0, weights)?;
        Ok(rows)
    }

    /// Copies `weights` to the rows from `first` on; complete when the call returns. Weights of another type
    /// than the rows' become F16, which the rows' must then be.
    ///
    /// # Panics
    /// If they do not fit.
    pub(crate) fn fill(&self, first: usize, weights: WeightRows<'_>) -> Result<(), CudaError> {
        let as_they_are = weights.ty() == self.layout.ty && weights.scales.is_none();
        assert!(
            first + weights.rows() <= self.rows
                && weights.cols() == self.cols
                && (as_they_are || self.layout.ty == GgmlType::F16),
            "weights that do not fit the rows"
        );
        let source_row_bytes = match as_they_are {
            true => weights.row_bytes(),
            false => self.cols * size_of::<half::f16>(),
        };
        if weights.rows() * source_row_bytes == 0 {
            return Ok(());
        }
        let gpu = self.buffer.gpu();
        let at_a_time = (STAGING_BYTES / source_row_bytes).clamp(1, weights.rows());
        let mut staging = DeviceBuffer::new(gpu, at_a_time * source_row_bytes)?;
        let mut converted = Vec::new();
        for start in (0..weights.rows()).step_by(at_a_time) {
            let count = at_a_time.min(weights.rows() - start);
            let part = weights
                .rows_range(start, count)
                .expect("the range is within the rows");
            if as_they_are {
                staging.write(0, part.bytes())?;
            } else {
                to_halves(part, &mut converted);
                staging.write(0, &converted)?;
            }
            self.repack(staging.address(), source_row_bytes, first + start, count)?;
        }
        gpu.synchronize()
    }

    /// Regroups `count` rows that lie in GGUF blocks at `source` into rows `first` and up.
    pub(crate) fn repack(
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
