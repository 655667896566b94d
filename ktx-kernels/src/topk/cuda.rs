//! Argmax and the k best; see `topk.cu`.

use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch};

const MODULE: &str = "topk/topk";
/// Elements that a block sorts.
const TILE: usize = 2048;
/// Largest `k` of [`TopK`].
pub const MOST: usize = TILE / 2;
const THREADS: u32 = 256;
/// Blocks that share a row of logits.
const PARTS: usize = 64;

/// Argmax of up to so many rows.
#[derive(Debug)]
pub struct Argmax {
    keys: DeviceBuffer,
}

impl Argmax {
    /// Scratch for `rows` rows.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    pub fn new(gpu: &Gpu, rows: usize) -> Result<Self, CudaError> {
        let keys = DeviceBuffer::new(gpu, rows * PARTS * size_of::<u64>())?;
        Ok(Self { keys })
    }

    /// The column of the largest element of each row of `x`, the first of equal ones; NaN is smaller
    /// than everything. The results are u32 from the address `ids` on.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// If there are more rows than there is scratch for, or rows without elements.
    pub fn forward(&self, x: DeviceMatrix, ids: u64) -> Result<(), CudaError> {
        let rows = x.rows();
        assert!(
            rows * PARTS * size_of::<u64>() <= self.keys.bytes(),
            "argmax: {rows} rows"
        );
        if rows == 0 {
            return Ok(());
        }
        assert!(x.cols() > 0, "argmax: rows without elements");
        let gpu = self.keys.gpu();
        let keys = Arg::Ptr(self.keys.address());
        let args = [x.arg(), Arg::U32(x.cols() as u32), keys];
        let launch = Launch::grid([PARTS, rows, 1], THREADS).early();
        // SAFETY: the kernel's arguments; the scratch holds PARTS keys a row (checked).
        unsafe { gpu.launch(gpu.function(MODULE, "ktx_argmax_parts")?, launch, &args) }?;
        let args = [keys, Arg::U32(PARTS as u32), Arg::Ptr(ids)];
        // SAFETY: as above; a warp a row.
        unsafe {
            gpu.launch(
                gpu.function(MODULE, "ktx_argmax_join")?,
                Launch::linear(rows, 32).early(),
                &args,
            )
        }
    }
}

/// The `k` largest elements of up to so many rows.
#[derive(Debug)]
pub struct TopK {
    keys: [DeviceBuffer; 2],
    rows: usize,
    width: usize,
    k: usize,
}

impl TopK {
    /// Scratch for `rows` rows of `width` elements.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    ///
    /// # Panics
    /// If `k` is not from 1 to [`MOST`] and at most `width`.
    pub fn new(gpu: &Gpu, rows: usize, width: usize, k: usize) -> Result<Self, CudaError> {
        assert!((1..=MOST.min(width)).contains(&k), "top-k: {k} of {width}");
        let keys = |count: usize| DeviceBuffer::new(gpu, rows * count * size_of::<u64>());
        let first = width.div_ceil(TILE) * k;
        Ok(Self {
            keys: [keys(first)?, keys(first.div_ceil(TILE) * k)?],
            rows,
            width,
            k,
        })
    }

    /// Columns (u32) and values (f32) of the `k` largest elements of each row, `[rows, k]`, descending,
    /// the lower column first among equals, from the addresses `ids` and `values` on.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// If `x` has another width or more rows than there is scratch for.
    pub fn forward(&self, x: DeviceMatrix, ids: u64, values: u64) -> Result<(), CudaError> {
        let (rows, k) = (x.rows(), self.k);
        assert_eq!(x.cols(), self.width, "top-k: width");
        assert!(rows <= self.rows, "top-k: {rows} rows");
        if rows == 0 {
            return Ok(());
        }
        let gpu = self.keys[0].gpu();
        let round = |name, from: Arg, count: usize, to: usize| {
            let tiles = count.div_ceil(TILE);
            let to = Arg::Ptr(self.keys[to].address());
            let args = [from, Arg::U32(count as u32), Arg::U32(k as u32), to];
            let launch = Launch::grid([tiles, rows, 1], MOST as u32).early();
            // SAFETY: the kernel's arguments; both buffers hold k keys for each tile of each row.
            unsafe { gpu.launch(gpu.function(MODULE, name)?, launch, &args) }?;
            Ok(tiles * k)
        };
        let mut count = round("ktx_topk_values", x.arg(), self.width, 0)?;
        let mut at = 0;
        while count > k {
            let from = Arg::Ptr(self.keys[at].address());
            count = round("ktx_topk_keys", from, count, 1 - at)?;
            at = 1 - at;
        }
        let args = [
            Arg::Ptr(self.keys[at].address()),
            Arg::U32((rows * k) as u32),
            Arg::Ptr(ids),
            Arg::Ptr(values),
        ];
        let launch = Launch::linear((rows * k).div_ceil(THREADS as usize), THREADS).early();
        // SAFETY: the kernel's arguments; the results hold rows * k elements (checked).
        unsafe { gpu.launch(gpu.function(MODULE, "ktx_topk_write")?, launch, &args) }
    }
}
