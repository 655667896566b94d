//! The tile loops, in assembly: Rust has no stable intrinsics for AMX. Registers: `tmm0` to `tmm3` are the sums of
//! 32 rows by 32 tokens, `tmm4` and `tmm5` the rows, `tmm6` and `tmm7` the tokens.

use std::arch::asm;
use std::arch::x86_64::*;

use super::super::avx512::{Avx512, transpose_16x16};
use super::super::isa::{STEP, Step};
use super::super::unpack::{Unpack, six_bits};
use super::{CHUNK_TILES, GROUP_ROWS, Panel, SumTile, TILE, TILE_COLS, Tile, TileJob, TilePair};

/// Bytes from one row of a tile to the next.
const TILE_STRIDE: usize = 64;

/// In the order by chunks, how many rows ahead the first columns are asked for. Without, a job of Q8_0 that comes from
/// memory took half as long again.
const PREFETCH_ROWS: usize = 64;
/// In the order by rows, how many chunks ahead a row's columns are asked for.
const PREFETCH_CHUNKS: usize = 4;
/// Bytes of a job's tokens up to which the order is by rows: half of a second-level cache of 2 MiB.
const MAX_TOKEN_BYTES: usize = 1 << 20;

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// All eight tiles with 16 rows of 64 bytes.
static CONFIG: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Tiles configured for this thread, until dropped: while tiles hold something, the operating system saves 8 KiB at
/// each switch of threads, and the core does not rest as deeply.
pub(crate) struct Configured;

impl Configured {
    /// # Safety
    /// The CPU has AMX and the process its permission, and no other value is in use in this thread.
    pub(crate) unsafe fn new() -> Self {
        // SAFETY: the CPU has AMX and the process its permission, by the caller's promise.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &CONFIG, options(nostack, readonly, preserves_flags))
        };
        Self
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: as in `new`, without which there is no value.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Multiplies a job. While a unit, [`GROUP_ROWS`] rows by [`STEP`] columns, is multiplied with pairs of token tiles, the
/// next one is expanded, row by row between the tile operations.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512bf16,avx2,fma,f16c")]
pub(super) unsafe fn multiply<U: Unpack>(
    job: &TileJob<'_>,
    panels: &mut [Panel; 2],
    sums: &mut [SumTile],
) {
    let order = Order::of(job);
    let pairs = job.token_tiles().div_ceil(2);
    let units = order.chunks * order.groups;
    let mut step = Step::ZERO;
    // SAFETY: the CPU has AMX, by the caller's promise.
    let _configured = unsafe { Configured::new() };
    // SAFETY: as above.
    unsafe { order.prefetch_first(job) };
    let [mut current, mut next] = panels.each_mut();
    for row in 0..GROUP_ROWS {
        let first = order.unit(0);
        // SAFETY: the features are enabled here.
        unsafe { expand_row::<U>(job, order, first, row, &mut step, current) };
    }
    for index in 0..units {
        let unit = order.unit(index);
        let following = (index + 1 < units).then(|| order.unit(index + 1));
        let blocks = unit.blocks(job);
        let mut pace = Pace::new(pairs * blocks);
        // One pair's sums stay in the tiles from a row's first column to its last.
        let keep = order.by_rows && pairs == 1;
        let (load, store) = match keep {
            true => (unit.chunk == 0, unit.chunk + 1 == order.chunks),
            false => (true, true),
        };
        for pair in 0..pairs {
            let sums = sums[(unit.group * pairs + pair) * 4..].as_mut_ptr();
            let tokens = unit.tokens(job, pair);
            // SAFETY: as above; four tiles of sums are there, and `blocks` tiles of each operand.
            unsafe {
                if load {
                    load_sums(sums, unit.chunk == 0);
                }
                for block in 0..blocks {
                    match tokens {
                        (first, Some(second)) => multiply_block(current, block, [first, second]),
                        (first, None) => multiply_half_block(current, block, first),
                    }
                    let Some(following) = following else { continue };
                    for row in pace.rows() {
                        expand_row::<U>(job, order, following, row, &mut step, next);
                    }
                }
                if store {
                    store_sums(sums);
                }
            }
        }
        std::mem::swap(&mut current, &mut next);
    }
}

/// In which order a job's units are multiplied.
#[derive(Clone, Copy)]
struct Order {
    /// Groups of [`GROUP_ROWS`] rows.
    groups: usize,
    /// Chunks of [`STEP`] columns.
    chunks: usize,
    /// All columns of a group of rows before the next group, where the tokens stay in the second-level cache: weights
    /// are read one after the other in each row, and a group's sums stay near. Else all groups of a chunk first, so
    /// that the tokens are read once.
    by_rows: bool,
}

impl Order {
    fn of(job: &TileJob<'_>) -> Self {
        let token_bytes = job.token_tiles() * job.x.blocks * size_of::<Tile>();
        Self {
            groups: job.rows.div_ceil(GROUP_ROWS),
            chunks: job.w.cols.div_ceil(STEP),
            by_rows: token_bytes <= MAX_TOKEN_BYTES,
        }
    }

    #[inline(always)]
    fn unit(self, index: usize) -> Unit {
        let (outer, inner) = match self.by_rows {
            true => (index / self.chunks, index % self.chunks),
            false => (index / self.groups, index % self.groups),
        };
        match self.by_rows {
            true => Unit {
                group: outer,
                chunk: inner,
            },
            false => Unit {
                group: inner,
                chunk: outer,
            },
        }
    }

    /// Asks for the weights that are expanded first.
    #[inline(always)]
    unsafe fn prefetch_first(self, job: &TileJob<'_>) {
        let (rows, chunks) = match self.by_rows {
            true => (GROUP_ROWS, PREFETCH_CHUNKS.min(self.chunks)),
            false => (PREFETCH_ROWS, 1),
        };
        for row in 0..rows {
            for chunk in 0..chunks {
                // SAFETY: by the caller's promise.
                unsafe { prefetch(job, row, chunk) };
            }
        }
    }

    /// Asks for what is read some time after columns of a row.
    #[inline(always)]
    unsafe fn prefetch_after(self, job: &TileJob<'_>, row: usize, chunk: usize) {
        // SAFETY: by the caller's promise.
        unsafe {
            if !self.by_rows {
                prefetch(job, row, chunk + 1);
                if chunk == 0 {
                    prefetch(job, row + PREFETCH_ROWS, 0);
                }
                return;
            }
            let ahead = chunk + PREFETCH_CHUNKS;
            match ahead < self.chunks {
                true => prefetch(job, row, ahead),
                false => prefetch(job, row + GROUP_ROWS, ahead - self.chunks),
            }
        }
    }
}

/// Spreads the rows of a group evenly over the steps of the group before.
struct Pace {
    steps: usize,
    /// What is due, in parts of a row: one step brings [`GROUP_ROWS`] parts, `steps` of them make a row.
    due: usize,
    row: usize,
}

impl Pace {
    #[inline(always)]
    fn new(steps: usize) -> Self {
        Self {
            steps,
            due: 0,
            row: 0,
        }
    }

    /// The rows to be expanded after one more step.
    #[inline(always)]
    fn rows(&mut self) -> std::ops::Range<usize> {
        self.due += GROUP_ROWS;
        let first = self.row;
        while self.due >= self.steps {
            self.due -= self.steps;
            self.row += 1;
        }
        first..self.row
    }
}

/// What is expanded at a time.
#[derive(Clone, Copy)]
struct Unit {
    /// Number of [`STEP`] columns.
    chunk: usize,
    /// Number of [`GROUP_ROWS`] rows.
    group: usize,
}

impl Unit {
    /// Tiles of columns.
    #[inline(always)]
    fn blocks(self, job: &TileJob<'_>) -> usize {
        (job.x.blocks - self.chunk * CHUNK_TILES).min(CHUNK_TILES)
    }

    /// The tokens of a pair of tiles, from the unit's first column on. The last pair may lack its second tile.
    #[inline(always)]
    fn tokens(self, job: &TileJob<'_>, pair: usize) -> TilePair {
        job.pair(job.x, self.chunk, pair)
    }
}

/// Expands row `row` of a unit into a panel. Rows beyond the job's keep what they have: their sums are not read.
#[inline(always)]
unsafe fn expand_row<U: Unpack>(
    job: &TileJob<'_>,
    order: Order,
    unit: Unit,
    row: usize,
    step: &mut Step,
    panel: &mut Panel,
) {
    let job_row = unit.group * GROUP_ROWS + row;
    if job_row >= job.rows {
        return;
    }
    let columns = job.columns(job_row, unit.chunk * STEP);
    let tiles = TileRow::new(panel, row);
    // SAFETY: the caller has enabled the features.
    unsafe {
        order.prefetch_after(job, job_row, unit.chunk);
        U::expand(columns, step, tiles);
    }
}

/// One row of the tiles of [`STEP`] columns.
pub(crate) struct TileRow<'a> {
    tiles: &'a mut [Tile; CHUNK_TILES],
    row: usize,
}

impl<'a> TileRow<'a> {
    /// Row `row` of a panel.
    #[inline(always)]
    pub(super) fn new(panel: &'a mut Panel, row: usize) -> Self {
        Self {
            tiles: &mut panel.0[row / TILE],
            row: row % TILE,
        }
    }

    /// Sets the row's 32 values in tile `block`.
    #[inline(always)]
    pub(super) unsafe fn set(&mut self, block: usize, values: __m512i) {
        let row = &mut self.tiles[block].0[self.row * TILE_COLS..][..TILE_COLS];
        // SAFETY: the caller has enabled AVX-512 F; a row of a tile is a register, and aligned as one.
        unsafe { _mm512_store_si512(row.as_mut_ptr().cast(), values) };
    }
}

/// Expands any type, through its codes.
#[inline(always)]
pub(crate) unsafe fn expand_codes<U: Unpack>(
    columns: &[u8],
    step: &mut Step,
    mut row: TileRow<'_>,
) {
    // SAFETY: the caller has enabled the features.
    unsafe {
        U::unpack_step::<Avx512>(columns, step);
        for block in 0..columns.len() / U::BYTES * U::BLOCK / TILE_COLS {
            row.set(block, to_bf16::<U>(step, block));
        }
    }
}

/// Expands Q4_K: a table of the 32 weights that two sub-blocks may have, in which 64 codes are looked up.
#[inline(always)]
pub(crate) unsafe fn expand_q4_k(columns: &[u8], mut row: TileRow<'_>) {
    let Some((block, _)) = columns.split_first_chunk::<144>() else {
        unreachable!("the caller cuts whole blocks")
    };
    let Some((head, _)) = block.split_first_chunk() else {
        unreachable!("a block has a head")
    };
    // SAFETY: the caller has enabled the features; loads are of the block's 128 bytes of codes.
    unsafe {
        let [scales, minimums] = six_bits(head);
        let bytes = _mm_set_epi64x(minimums.cast_signed(), scales.cast_signed());
        let halves = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
        let halves = _mm512_cvtph_ps(_mm256_set1_epi32(halves.cast_signed()));
        // Eight times `d`, then eight times `-dmin`.
        let factors = _mm512_permutexvar_ps(
            _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0),
            halves,
        );
        let factors = _mm512_mask_sub_ps(factors, 0xff00, _mm512_setzero_ps(), factors);
        let bytes = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes));
        let mut parts = [0.0f32; 16];
        _mm512_storeu_ps(parts.as_mut_ptr(), _mm512_mul_ps(bytes, factors));
        // Left to itself, the compiler keeps them in registers and shuffles each to all lanes, which takes longer
        // than to load it to all lanes.
        let parts = std::hint::black_box(&parts);
        let weights = |sub: usize| {
            _mm512_fmadd_ps(
                _mm512_set1_ps(parts[sub]),
                iota(),
                _mm512_set1_ps(parts[8 + sub]),
            )
        };
        let second = _mm512_set1_epi16(16);
        for pair in 0..4 {
            let codes = _mm256_loadu_si256(block.as_ptr().add(16 + pair * 32).cast());
            let codes = _mm512_cvtepu8_epi16(codes);
            let table = pack_pair(weights(2 * pair), weights(2 * pair + 1));
            let low = _mm512_and_si512(codes, _mm512_set1_epi16(15));
            let high = _mm512_or_si512(_mm512_srli_epi16::<4>(codes), second);
            row.set(2 * pair, _mm512_permutexvar_epi16(low, table));
            row.set(2 * pair + 1, _mm512_permutexvar_epi16(high, table));
        }
    }
}

/// Expands Q8_0.
#[inline(always)]
pub(crate) unsafe fn expand_q8_0(columns: &[u8], mut row: TileRow<'_>) {
    for (index, block) in columns.as_chunks::<34>().0.iter().enumerate() {
        // SAFETY: the caller has enabled the features; loads are of the block's 32 codes.
        unsafe {
            let d = i16::from_le_bytes([block[0], block[1]]);
            let d = _mm512_cvtph_ps(_mm256_set1_epi16(d));
            let weights = |at: usize| {
                let codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(block.as_ptr().add(at).cast()));
                _mm512_mul_ps(_mm512_cvtepi32_ps(codes), d)
            };
            row.set(index, pack_pair(weights(2), weights(18)));
        }
    }
}

/// 32 numbers as BF16.
#[inline(always)]
pub(super) unsafe fn pack_pair(low: __m512, high: __m512) -> __m512i {
    // SAFETY: the caller has enabled AVX-512 BF16; both types are 512 bits.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Asks for some columns of a row, if there are such.
#[inline(always)]
pub(super) unsafe fn prefetch(job: &TileJob<'_>, row: usize, chunk: usize) {
    if row >= job.rows || chunk * STEP >= job.w.cols {
        return;
    }
    let columns = job.columns(row, chunk * STEP);
    for line in (0..columns.len()).step_by(64) {
        // SAFETY: a prefetch does not access memory.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(columns.as_ptr().wrapping_add(line).cast()) };
    }
}

/// 0 to 15.
#[inline(always)]
unsafe fn iota() -> __m512 {
    // SAFETY: a register operation of AVX-512 F, which the caller has enabled.
    unsafe {
        _mm512_setr_ps(
            0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
        )
    }
}

/// The 32 weights of block `block` of a step, rounded to BF16. Where there are few codes, the weights of all of
/// them are computed, and looked up.
#[inline(always)]
unsafe fn to_bf16<U: Unpack>(step: &Step, block: usize) -> __m512i {
    // SAFETY: the caller has enabled the features; a step has eight blocks.
    unsafe {
        let codes = _mm256_load_si256(step.codes.as_ptr().add(block * TILE_COLS).cast());
        let splat = |index: usize| {
            (
                _mm512_set1_ps(step.scales[index]),
                _mm512_set1_ps(step.offsets[index]),
            )
        };
        let (first, second) = match U::SUB {
            16 => (splat(2 * block), splat(2 * block + 1)),
            _ => (splat(block), splat(block)),
        };
        let weights = |codes, (scale, offset)| _mm512_fmadd_ps(codes, scale, offset);
        if U::CODES <= 16 && U::SUB == 16 {
            let table = pack_pair(weights(iota(), first), weights(iota(), second));
            let second_half = _mm512_set_epi64(
                SECOND_TABLE,
                SECOND_TABLE,
                SECOND_TABLE,
                SECOND_TABLE,
                0,
                0,
                0,
                0,
            );
            let codes = _mm512_or_si512(_mm512_cvtepu8_epi16(codes), second_half);
            _mm512_permutexvar_epi16(codes, table)
        } else if U::CODES <= 16 {
            let table: __m256i = std::mem::transmute(_mm512_cvtneps_pbh(weights(iota(), first)));
            let table = _mm512_castsi256_si512(table);
            _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table)
        } else if U::CODES <= 32 && U::SUB == 32 {
            let more = _mm512_add_ps(iota(), _mm512_set1_ps(16.0));
            let table = pack_pair(weights(iota(), first), weights(more, first));
            _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(codes), table)
        } else {
            let low = _mm512_cvtepu8_epi32(_mm256_castsi256_si128(codes));
            let high = _mm512_cvtepu8_epi32(_mm256_extracti128_si256::<1>(codes));
            pack_pair(
                weights(_mm512_cvtepi32_ps(low), first),
                weights(_mm512_cvtepi32_ps(high), second),
            )
        }
    }
}

/// Four indices into the second half of a table of 32.
const SECOND_TABLE: i64 = 0x0010_0010_0010_0010;

#[inline(always)]
pub(super) unsafe fn load_sums(sums: *const SumTile, first: bool) {
    // SAFETY: four tiles of sums are valid and the tiles are configured, by the caller's promise.
    unsafe {
        if first {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, nomem, preserves_flags),
            );
        } else {
            asm!(
                "tileloadd tmm0, [{sums} + {stride}]",
                "tileloadd tmm1, [{sums} + {stride} + 1024]",
                "tileloadd tmm2, [{sums} + {stride} + 2048]",
                "tileloadd tmm3, [{sums} + {stride} + 3072]",
                sums = in(reg) sums,
                stride = in(reg) TILE_STRIDE,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, readonly, preserves_flags),
            );
        }
    }
}

#[inline(always)]
pub(super) unsafe fn store_sums(sums: *mut SumTile) {
    // SAFETY: four tiles of sums are valid and the tiles are configured, by the caller's promise.
    unsafe {
        asm!(
            "tilestored [{sums} + {stride}], tmm0",
            "tilestored [{sums} + {stride} + 1024], tmm1",
            "tilestored [{sums} + {stride} + 2048], tmm2",
            "tilestored [{sums} + {stride} + 3072], tmm3",
            sums = in(reg) sums,
            stride = in(reg) TILE_STRIDE,
            options(nostack, preserves_flags),
        );
    }
}

/// Adds the products of 32 rows and 32 tokens over 32 columns to the sums in `tmm0` to `tmm3`.
#[inline(always)]
pub(super) unsafe fn multiply_block(panel: &Panel, block: usize, tokens: [*const Tile; 2]) {
    let [upper, lower] = &panel.0;
    // SAFETY: the tiles are valid and configured, by the caller's promise. No other code uses the registers between
    // this and the next of these blocks.
    unsafe {
        asm!(
            "tileloadd tmm4, [{upper} + {stride}]",
            "tileloadd tmm6, [{first} + {stride}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{second} + {stride}]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{lower} + {stride}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            upper = in(reg) &upper[block],
            lower = in(reg) &lower[block],
            first = in(reg) tokens[0].add(block),
            second = in(reg) tokens[1].add(block),
            stride = in(reg) TILE_STRIDE,
            options(nostack, readonly, preserves_flags),
        );
    }
}

/// As [`multiply_block`], of 16 tokens: the sums in `tmm0` and `tmm2`.
#[inline(always)]
pub(super) unsafe fn multiply_half_block(panel: &Panel, block: usize, tokens: *const Tile) {
    let [upper, lower] = &panel.0;
    // SAFETY: as there.
    unsafe {
        asm!(
            "tileloadd tmm4, [{upper} + {stride}]",
            "tileloadd tmm6, [{tokens} + {stride}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm5, [{lower} + {stride}]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            upper = in(reg) &upper[block],
            lower = in(reg) &lower[block],
            tokens = in(reg) tokens.add(block),
            stride = in(reg) TILE_STRIDE,
            options(nostack, readonly, preserves_flags),
        );
    }
}

/// Packs columns `col..col + 32` of up to 16 rows of values into a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn pack(rows: &[&[f32]], col: usize, tile: *mut Tile) {
    let mut pairs = [_mm512_setzero_si512(); TILE];
    for (values, row) in pairs.iter_mut().zip(rows) {
        let columns = &row[col.min(row.len())..];
        let len = columns.len().min(TILE_COLS);
        let mask = ((1u64 << len) - 1) as u32;
        // SAFETY: the features are enabled here, and the masks select columns that the row has.
        *values = unsafe {
            let low = _mm512_maskz_loadu_ps(mask as u16, columns.as_ptr());
            let high =
                _mm512_maskz_loadu_ps((mask >> 16) as u16, columns.as_ptr().wrapping_add(16));
            pack_pair(low, high)
        };
    }
    // SAFETY: as above; a tile is 16 registers.
    unsafe {
        transpose_16x16(&mut pairs);
        for index in 0..TILE {
            _mm512_store_si512(tile.cast::<__m512i>().add(index), pairs[index]);
        }
    }
}

/// Packs 32 columns of 16 tokens, `[column][token]`, into a tile.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
pub(super) unsafe fn pack_sums(values: &[f32; TILE * TILE_COLS], tile: *mut Tile) {
    /// From the tokens of one column and then those of the next, to pairs.
    const PAIRS: [u16; 32] = {
        let mut lanes = [0; 32];
        let mut lane = 0;
        while lane < 32 {
            lanes[lane] = (lane / 2 + lane % 2 * 16) as u16;
            lane += 1;
        }
        lanes
    };
    // SAFETY: the features are enabled here; a tile is 16 registers.
    unsafe {
        let lanes = _mm512_loadu_si512(PAIRS.as_ptr().cast());
        for (pair, columns) in values.chunks_exact(2 * TILE).enumerate() {
            let first = _mm512_loadu_ps(columns.as_ptr());
            let second = _mm512_loadu_ps(columns[TILE..].as_ptr());
            let pairs = _mm512_permutexvar_epi16(lanes, pack_pair(first, second));
            _mm512_store_si512(tile.cast::<__m512i>().add(pair), pairs);
        }
    }
}

/// See [`super::add_weighted`].
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn add_weighted(
    sums: &[f32; TILE * TILE],
    rows: usize,
    bias: &[f32; TILE],
    out: &[*mut f32],
    weights: &[f32],
) {
    // SAFETY: the features are enabled here; the mask selects rows that `out` has, by the caller's promise.
    unsafe {
        let columns = transposed(sums);
        let mask = ((1u32 << rows) - 1) as u16;
        let bias = _mm512_loadu_ps(bias.as_ptr());
        for token in 0..out.len().min(weights.len()).min(TILE) {
            let (out, weight) = (out[token], _mm512_set1_ps(weights[token]));
            let value = _mm512_add_ps(_mm512_castsi512_ps(columns[token]), bias);
            let sum = _mm512_maskz_loadu_ps(mask, out);
            _mm512_mask_storeu_ps(out, mask, _mm512_fmadd_ps(weight, value, sum));
        }
    }
}

/// The rows' sums of each token.
#[inline(always)]
unsafe fn transposed(sums: &[f32; TILE * TILE]) -> [__m512i; TILE] {
    // SAFETY: the caller has enabled AVX-512 F; 16 rows of 16 sums are loaded.
    unsafe {
        let mut columns = [_mm512_setzero_si512(); TILE];
        for (index, column) in columns.iter_mut().enumerate() {
            *column = _mm512_loadu_si512(sums[index * TILE..].as_ptr().cast());
        }
        transpose_16x16(&mut columns);
        columns
    }
}

/// Writes the first `rows` by `tokens` sums of a tile to `out[token * stride + row]`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
pub(super) unsafe fn store(
    sums: &[f32; TILE * TILE],
    [rows, tokens]: [usize; 2],
    out: *mut f32,
    stride: usize,
) {
    // SAFETY: the features are enabled here; the mask selects rows that `out` has, by the caller's promise.
    unsafe {
        let columns = transposed(sums);
        let mask = ((1u32 << rows) - 1) as u16;
        for token in 0..tokens.min(TILE) {
            let column = _mm512_castsi512_ps(columns[token]);
            _mm512_mask_storeu_ps(out.add(token * stride), mask, column);
        }
    }
}
