//! Rows by number; see `rows.cu`.

use ktx_gguf::GgmlType;

use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch};

const MODULE: &str = "rows/rows";
const THREADS: usize = 256;
/// Blocks of a copy at most; their threads walk further values.
const MOST_BLOCKS: usize = 4096;

/// Blocks of a row, so that one row alone still fills several multiprocessors.
fn per_row(rows: usize, width: usize) -> Launch {
    Launch::grid(
        [rows, width.div_ceil(THREADS).clamp(1, 32), 1],
        THREADS as u32,
    )
    .early()
}

/// `out[r] = x[index[r]]` for every row of `out`; `index` is the address of u32 on the GPU. An index beyond the end
/// gives a row of NaN.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the widths differ.
pub fn gather_rows(
    gpu: &Gpu,
    x: DeviceMatrix,
    index: u64,
    out: DeviceMatrix,
) -> Result<(), CudaError> {
    assert_eq!(x.cols(), out.cols(), "gather_rows: widths");
    if out.is_empty() {
        return Ok(());
    }
    let args = [
        x.arg(),
        Arg::Ptr(index),
        out.arg(),
        Arg::U32(x.rows() as u32),
        Arg::U32(x.cols() as u32),
    ];
    let launch = per_row(out.rows(), out.cols());
    // SAFETY: the kernel's arguments; it checks the indices.
    unsafe { gpu.launch(gpu.function(MODULE, "ktx_gather_rows")?, launch, &args) }
}

/// Columns of a matrix: `cols` of them from `first` on.
#[derive(Debug, Clone, Copy)]
pub struct Columns {
    /// The whole matrix.
    pub matrix: DeviceMatrix,
    /// First column.
    pub first: usize,
}

/// Copies `cols` columns of every row from one matrix to another with as many rows.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the rows differ in number or the columns leave a matrix.
pub fn copy_columns(gpu: &Gpu, from: Columns, to: Columns, cols: usize) -> Result<(), CudaError> {
    let rows = from.matrix.rows();
    assert_eq!(rows, to.matrix.rows(), "copy_columns: rows");
    for side in [from, to] {
        assert!(
            side.first + cols <= side.matrix.cols(),
            "copy_columns: columns"
        );
    }
    if rows * cols == 0 {
        return Ok(());
    }
    let start = |side: Columns| side.matrix.address() + (side.first * size_of::<f32>()) as u64;
    let args = [
        Arg::Ptr(start(from)),
        Arg::Ptr(start(to)),
        Arg::U32(rows as u32),
        Arg::U32(cols as u32),
        Arg::U32(from.matrix.cols() as u32),
        Arg::U32(to.matrix.cols() as u32),
    ];
    let launch = Launch::linear(
        (rows * cols).div_ceil(THREADS).min(MOST_BLOCKS),
        THREADS as u32,
    )
    .early();
    // SAFETY: the kernel's arguments; columns checked above.
    unsafe { gpu.launch(gpu.function(MODULE, "ktx_copy_columns")?, launch, &args) }
}

/// Whether [`EmbeddingTable`] can hold rows of this type.
pub fn embeds(ty: GgmlType) -> bool {
    use GgmlType as T;
    matches!(
        ty,
        T::F32
            | T::F16
            | T::BF16
            | T::Q4_0
            | T::Q4_1
            | T::Q5_0
            | T::Q5_1
            | T::Q8_0
            | T::Q2_K
            | T::Q3_K
            | T::Q4_K
            | T::Q5_K
            | T::Q6_K
            | T::IQ4_NL
            | T::IQ4_XS
            | T::MXFP4
    )
}

/// A table of rows in GGUF blocks, as the file has them.
#[derive(Debug)]
pub struct EmbeddingTable {
    blocks: DeviceBuffer,
    ty: GgmlType,
    rows: usize,
    width: usize,
}

impl EmbeddingTable {
    /// A copy of `rows` rows of `width` elements; `None` if the type is none of [`embeds`] or the bytes
    /// are not those of such a table.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    pub fn upload(
        gpu: &Gpu,
        ty: GgmlType,
        rows: usize,
        width: usize,
        bytes: &[u8],
    ) -> Result<Option<Self>, CudaError> {
        let expected = ty.row_bytes(width).and_then(|row| row.checked_mul(rows));
        if !embeds(ty) || expected != Some(bytes.len()) {
            return Ok(None);
        }
        Ok(Some(Self {
            blocks: DeviceBuffer::upload(gpu, bytes)?,
            ty,
            rows,
            width,
        }))
    }

    /// Bytes of GPU memory.
    pub fn bytes(&self) -> usize {
        self.blocks.bytes()
    }

    /// `out[r]` = row `ids[r]`, for every row of `out`; `ids` is the address of u32 on the GPU. An id beyond the end
    /// gives a row of NaN.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// If the widths differ.
    pub fn forward(&self, ids: u64, out: DeviceMatrix) -> Result<(), CudaError> {
        assert_eq!(out.cols(), self.width, "embedding: width");
        if out.is_empty() {
            return Ok(());
        }
        let gpu = self.blocks.gpu();
        let args = [
            Arg::Ptr(self.blocks.address()),
            Arg::Ptr(ids),
            out.arg(),
            Arg::I32(self.ty.id() as i32),
            Arg::U32(self.rows as u32),
            Arg::U32(self.width as u32),
            Arg::U32(self.ty.block_len() as u32),
            Arg::U32(self.ty.block_bytes() as u32),
        ];
        let launch = per_row(out.rows(), out.cols());
        // SAFETY: the kernel's arguments; it checks the ids.
        unsafe { gpu.launch(gpu.function(MODULE, "ktx_embed")?, launch, &args) }
    }
}
