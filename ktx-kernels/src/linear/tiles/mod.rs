//! Products of many tokens on a matrix unit: AMX tiles of BF16.
//!
//! Blocks are expanded to BF16, [`GROUP_ROWS`] rows of [`STEP`] columns at a time, and multiplied with the tokens,
//! whose values are BF16 too, in tiles of 16 x 32 that sum in `f32`. Weights keep the file's order; the tokens are
//! packed once ([`TokenTiles`]). What rounding to BF16 costs is less than what 8-bit activations cost: a normalised
//! mean squared error of 7e-6 against 3e-5.
//!
//! Weights that are floats, and their activations, are split into two numbers of BF16, so that nothing that matters is
//! lost (`split`).
//!
//! Bound by: the tile unit, which takes 16 cycles for 16 x 16 x 32 multiply-adds and two tile loads beside them.
//! Expanding 32 rows by 256 columns takes as long as multiplying them with some 16 tokens, and is interleaved with
//! the multiplication of the rows before.

#[cfg(target_arch = "x86_64")]
pub(super) mod amx;
#[cfg(target_arch = "x86_64")]
mod split;

use std::cell::RefCell;

use ktx_gguf::GgmlType;

use super::WeightRows;
#[cfg(target_arch = "x86_64")]
use super::float;
use super::isa::STEP;
use crate::cpu::IsaLevel;
use crate::pool::ThreadPool;

/// Rows of weights, and tokens, of a tile of sums.
pub(crate) const TILE: usize = 16;
/// Columns of a tile of values.
pub(crate) const TILE_COLS: usize = 32;
/// Tiles of the columns that are multiplied at a time.
pub(crate) const CHUNK_TILES: usize = STEP / TILE_COLS;
/// Rows that are expanded at a time: two tiles, so that each tile of tokens is used twice.
pub(crate) const GROUP_ROWS: usize = 2 * TILE;
/// Tiles of columns that one task packs.
const TILES_PER_TASK: usize = 32;
/// Most rows of a job. The more, the less often the tokens come from the last-level cache: 512 tokens of 2,048
/// columns took 3.2 ms with 32 rows and 2.2 ms with 256.
pub(crate) const MAX_JOB_ROWS: usize = 256;
/// Most tokens of a job: with [`STEP`] columns of them and all sums, 768 KiB of a second-level cache.
pub(crate) const MAX_JOB_TOKENS: usize = 512;

/// Whether products at `level` have tiles.
pub(crate) fn has_tiles(level: IsaLevel) -> bool {
    level == IsaLevel::Amx
}

/// Rows of a job of a product with `rows` rows: many, and yet some jobs for each thread.
pub(crate) fn rows_per_job(rows: usize, threads: usize) -> usize {
    rows.div_ceil(threads * 4)
        .next_multiple_of(GROUP_ROWS)
        .min(MAX_JOB_ROWS)
}

/// 16 tokens by 32 columns: `[column / 2][token][column % 2]`, as BF16.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Tile(pub(crate) [u16; TILE * TILE_COLS]);

/// Sums of 16 rows by 16 tokens.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct SumTile(pub(crate) [f32; TILE * TILE]);

/// What of values becomes BF16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// The values, rounded.
    First,
    /// What rounding has lost of them.
    Rest,
}

/// Activations in tiles: for each [`STEP`] columns, for each group of 16 tokens, the tiles of these columns. So the
/// columns that are multiplied at a time lie together: with all columns of a group together, 512 tokens of 2,048
/// columns would share a sixteenth of the second-level cache's sets.
#[derive(Debug, Default)]
pub(crate) struct TokenTiles {
    tiles: Vec<[Tile; CHUNK_TILES]>,
    /// Groups of 16 tokens.
    groups: usize,
    /// Tiles of one group of tokens: columns / 32, rounded up.
    blocks: usize,
}

impl TokenTiles {
    /// Makes room for `groups` groups of 16 tokens of `cols` columns.
    pub(crate) fn resize(&mut self, groups: usize, cols: usize) {
        self.groups = groups;
        self.blocks = cols.div_ceil(TILE_COLS);
        let len = groups * cols.div_ceil(STEP);
        if self.tiles.len() < len {
            self.tiles
                .resize(len, [Tile([0; TILE * TILE_COLS]); CHUNK_TILES]);
        }
    }

    /// The value of a token in column `col`.
    pub(crate) fn value(&self, token: usize, col: usize) -> f32 {
        let tile = &self.chunk(col / STEP, token / TILE)[col % STEP / TILE_COLS];
        let index = col % TILE_COLS / 2 * GROUP_ROWS + token % TILE * 2 + col % 2;
        f32::from_bits(u32::from(tile.0[index]) << 16)
    }

    /// The tiles of [`STEP`] columns of a group.
    #[inline(always)]
    fn chunk(&self, chunk: usize, group: usize) -> &[Tile; CHUNK_TILES] {
        &self.tiles[chunk * self.groups + group]
    }

    /// Takes rows of `x` `[_, cols]`, for which there is room: group `group` has those that `tokens_of(group)` lists,
    /// up to 16. `part` says what of their values.
    ///
    /// # Safety
    /// The CPU has [`IsaLevel::Amx`].
    pub(crate) unsafe fn fill<'a>(
        &mut self,
        pool: &ThreadPool,
        x: &[f32],
        cols: usize,
        part: Part,
        tokens_of: impl Fn(usize) -> &'a [u32] + Sync,
    ) {
        let writer = self.writer();
        let runs = self.blocks.div_ceil(TILES_PER_TASK);
        pool.run(self.groups * runs, &|task| {
            let (group, run) = (task / runs, task % runs);
            let tokens = tokens_of(group);
            let mut rows: [&[f32]; TILE] = [&[]; TILE];
            for (row, token) in rows.iter_mut().zip(tokens) {
                *row = &x[*token as usize * cols..][..cols];
            }
            let first = run * TILES_PER_TASK;
            for block in first..writer.blocks.min(first + TILES_PER_TASK) {
                let (rows, col) = (&rows[..tokens.len()], block * TILE_COLS);
                // SAFETY: tasks have tiles of their own; the rest is the caller's promise.
                unsafe {
                    match part {
                        Part::First => writer.pack(group, block, rows, col),
                        Part::Rest => writer.pack_rests(group, block, rows, col),
                    }
                }
            }
        });
    }

    /// For tasks that write tiles in parallel.
    pub(crate) fn writer(&mut self) -> TileWriter {
        TileWriter {
            tiles: self.tiles.as_mut_ptr(),
            blocks: self.blocks,
            groups: self.groups,
        }
    }
}

/// Writes groups of a [`TokenTiles`] from several tasks at once.
#[derive(Clone, Copy)]
pub(crate) struct TileWriter {
    tiles: *mut [Tile; CHUNK_TILES],
    blocks: usize,
    groups: usize,
}

// SAFETY: the pointer is used by methods only whose callers keep to tiles of their own.
unsafe impl Send for TileWriter {}
// SAFETY: as above.
unsafe impl Sync for TileWriter {}

impl TileWriter {
    /// The tile of group `group` and column block `block`.
    ///
    /// # Safety
    /// The buffer is alive, and no other task uses this tile.
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "no tiles there")
    )]
    unsafe fn tile(&self, group: usize, block: usize) -> *mut Tile {
        assert!(
            group < self.groups && block < self.blocks,
            "a tile of the buffer"
        );
        let chunk = block / CHUNK_TILES * self.groups + group;
        // SAFETY: in range, as was asserted.
        unsafe {
            self.tiles
                .add(chunk)
                .cast::<Tile>()
                .add(block % CHUNK_TILES)
        }
    }

    /// Packs columns `col..col + 32` of up to 16 rows into column block `block` of group `group`, a token each; what
    /// is missing of tokens and columns becomes zero.
    ///
    /// # Safety
    /// The buffer is alive, no other task uses this tile, and the CPU has [`IsaLevel::Amx`].
    pub(crate) unsafe fn pack(&self, group: usize, block: usize, rows: &[&[f32]], col: usize) {
        debug_assert!(rows.len() <= TILE, "a tile has 16 tokens");
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the caller's promise.
        unsafe {
            amx::pack(rows, col, self.tile(group, block))
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (group, block, rows, col);
    }

    /// As [`Self::pack`], what of the values is lost there.
    ///
    /// # Safety
    /// As [`Self::pack`].
    unsafe fn pack_rests(&self, group: usize, block: usize, rows: &[&[f32]], col: usize) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the caller's promise.
        unsafe {
            split::pack_rests(rows, col, self.tile(group, block))
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (group, block, rows, col);
    }

    /// Packs values `[column][token]`, as sums lie, into column block `block` of group `group`.
    ///
    /// # Safety
    /// As [`Self::pack`].
    pub(crate) unsafe fn pack_sums(
        &self,
        group: usize,
        block: usize,
        values: &[f32; TILE * TILE_COLS],
    ) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: by the caller's promise.
        unsafe {
            amx::pack_sums(values, self.tile(group, block))
        };
        #[cfg(not(target_arch = "x86_64"))]
        let _ = (group, block, values);
    }
}

/// The tiles of columns of two groups of tokens, or of one.
type TilePair = (*const Tile, Option<*const Tile>);

/// Some rows of a matrix times some groups of tokens: what one task computes.
#[derive(Clone, Copy)]
pub(crate) struct TileJob<'a> {
    pub(crate) w: WeightRows<'a>,
    pub(crate) row: usize,
    /// At most [`MAX_JOB_ROWS`].
    pub(crate) rows: usize,
    pub(crate) x: &'a TokenTiles,
    /// What `x` has lost, for weights that are floats.
    pub(crate) x_rest: Option<&'a TokenTiles>,
    /// The first group of 16 tokens.
    pub(crate) group: usize,
    /// At most [`MAX_JOB_TOKENS`]; those after the last one, in its group, are computed and not read.
    pub(crate) tokens: usize,
}

impl<'a> TileJob<'a> {
    /// Groups of 16 tokens.
    pub(crate) fn token_tiles(&self) -> usize {
        self.tokens.div_ceil(TILE)
    }

    /// Two tiles of tokens of `x`, from the first column of chunk `chunk` on. The last pair may lack its second tile.
    #[inline(always)]
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "no tiles there")
    )]
    fn pair(&self, x: &TokenTiles, chunk: usize, pair: usize) -> TilePair {
        let tile = |tile| x.chunk(chunk, self.group + tile).as_ptr();
        let second = 2 * pair + 1;
        let second = (second < self.token_tiles()).then(|| tile(second));
        (tile(2 * pair), second)
    }

    /// Columns from `first` on, up to [`STEP`], of row `row` of the job, as blocks.
    #[inline(always)]
    #[cfg_attr(
        not(target_arch = "x86_64"),
        allow(dead_code, reason = "no tiles there")
    )]
    fn columns(&self, row: usize, first: usize) -> &'a [u8] {
        let ty = self.w.ty;
        let row_bytes = self.w.row_bytes();
        let bytes = &self.w.bytes[(self.row + row) * row_bytes..][..row_bytes];
        let start = first / ty.block_len() * ty.block_bytes();
        let len = STEP.min(self.w.cols - first) / ty.block_len() * ty.block_bytes();
        &bytes[start..start + len]
    }
}

/// [`GROUP_ROWS`] rows of [`STEP`] columns as BF16: for each 16 rows the tiles `[row][column]` of 32 columns.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(crate) struct Panel([[Tile; CHUNK_TILES]; 2]);

impl Panel {
    const ZERO: Self = Self([[Tile([0; TILE * TILE_COLS]); CHUNK_TILES]; 2]);
}

/// Working memory of one thread.
pub(crate) struct TileScratch {
    /// The rows that are being multiplied, and the next ones.
    panels: Box<[Panel; 2]>,
    /// Of two jobs, so that gate and up can be read together.
    sums: [Vec<SumTile>; 2],
}

/// The sums of a job.
#[derive(Clone, Copy)]
pub(crate) struct Sums<'a> {
    tiles: &'a [SumTile],
    /// Groups of 16 tokens.
    tokens: usize,
}

impl<'a> Sums<'a> {
    /// The sums `[row][token]` of the 16 rows number `rows` and the 16 tokens number `tokens`.
    #[inline(always)]
    pub(crate) fn tile(&self, rows: usize, tokens: usize) -> &'a [f32; TILE * TILE] {
        // As they are computed: four tiles of 32 rows by 32 tokens together.
        let quad = rows / 2 * self.tokens.div_ceil(2) + tokens / 2;
        &self.tiles[quad * 4 + rows % 2 * 2 + tokens % 2].0
    }
}

impl TileScratch {
    /// The sums of `job`, which was multiplied last as number `index`.
    pub(crate) fn sums(&self, index: usize, job: &TileJob<'_>) -> Sums<'_> {
        Sums {
            tiles: &self.sums[index],
            tokens: job.token_tiles(),
        }
    }
}

/// Calls `f` with this thread's scratch. Not to be nested.
pub(crate) fn with_tile_scratch<R>(f: impl FnOnce(&mut TileScratch) -> R) -> R {
    thread_local! {
        static SCRATCH: RefCell<TileScratch> = RefCell::new(TileScratch {
            panels: Box::new([Panel::ZERO; 2]),
            sums: [Vec::new(), Vec::new()],
        });
    }
    SCRATCH.with_borrow_mut(f)
}

/// Multiplies a job and leaves its sums in the scratch, as number 0 or 1.
///
/// # Safety
/// The CPU has [`IsaLevel::Amx`].
pub(crate) unsafe fn multiply(job: &TileJob<'_>, scratch: &mut TileScratch, index: usize) {
    assert!(
        job.rows <= MAX_JOB_ROWS && job.tokens <= MAX_JOB_TOKENS,
        "a job fits the scratch"
    );
    let quads = job.rows.div_ceil(GROUP_ROWS) * job.token_tiles().div_ceil(2);
    let sums = &mut scratch.sums[index];
    if sums.len() < quads * 4 {
        sums.resize(quads * 4, SumTile([0.0; TILE * TILE]));
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: by the caller's promise.
    unsafe {
        kernel(job.w.ty)(job, &mut scratch.panels, sums)
    };
}

/// Writes the sums of a job to `out[token * stride + row]`.
///
/// # Safety
/// `out` is valid for that, and the CPU has [`IsaLevel::Amx`].
pub(crate) unsafe fn store(job: &TileJob<'_>, sums: Sums<'_>, out: *mut f32, stride: usize) {
    #[cfg(target_arch = "x86_64")]
    for (rows, row) in (0..job.rows).step_by(TILE).enumerate() {
        for (tokens, token) in (0..job.tokens).step_by(TILE).enumerate() {
            // SAFETY: by the caller's promise, for a part of the job.
            unsafe {
                amx::store(
                    sums.tile(rows, tokens),
                    [TILE.min(job.rows - row), TILE.min(job.tokens - token)],
                    out.add(token * stride + row),
                    stride,
                )
            };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (job, sums, out, stride);
}

/// Adds, for each token of a tile of sums `[row][token]`, its weight times its sums, to `out` of the token: the first
/// `rows` of them. `bias` is added to the sums before. There are as many tokens as `out` and `weights` have.
///
/// # Safety
/// Each of `out` is valid for `rows` values, and the CPU has [`IsaLevel::Amx`].
pub(crate) unsafe fn add_weighted(
    sums: &[f32; TILE * TILE],
    rows: usize,
    bias: Option<&[f32]>,
    out: &[*mut f32],
    weights: &[f32],
) {
    let mut biases = [0.0; TILE];
    if let Some(bias) = bias {
        biases[..rows].copy_from_slice(&bias[..rows]);
    }
    #[cfg(target_arch = "x86_64")]
    // SAFETY: by the caller's promise.
    unsafe {
        amx::add_weighted(sums, rows, &biases, out, weights)
    };
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (sums, rows, biases, out, weights);
}

#[cfg(target_arch = "x86_64")]
type TileFn = unsafe fn(&TileJob<'_>, &mut [Panel; 2], &mut [SumTile]);

#[cfg(target_arch = "x86_64")]
macro_rules! define_kernel {
    ($($ty:ident)*) => {
        /// The function that multiplies weights of type `ty`.
        fn kernel(ty: GgmlType) -> TileFn {
            match ty {
                $(GgmlType::$ty => amx::multiply::<super::unpack::$ty>,)*
                GgmlType::F32 => split::multiply::<float::F32>,
                GgmlType::F16 => split::multiply::<float::F16>,
                GgmlType::BF16 => split::multiply::<float::Bf16>,
                GgmlType::F8_E4M3 => split::multiply::<float::Fp8>,
                GgmlType::I8 => split::multiply::<float::SignedBytes>,
                _ => split::multiply::<float::Dequantized>,
            }
        }
    };
}
#[cfg(target_arch = "x86_64")]
super::unpack::for_each_code_type!(define_kernel);
