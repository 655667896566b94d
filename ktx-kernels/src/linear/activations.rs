use ktx_gguf::GgmlType;

use super::tiles::{self, Part, TILE, TokenTiles};
use super::{LinearError, Operand, ProductOrder, dispatch};
use crate::cpu::{self, IsaLevel};
use crate::pool::ThreadPool;

/// Columns that share one scale of the quantised activations.
pub(crate) const SCALE_COLS: usize = 32;
/// Rows of activations are padded with zeros to a multiple of this.
pub(crate) const ROW_PAD: usize = 256;
/// Tokens that one task quantises.
const TOKENS_PER_TASK: usize = 8;

/// How the activations enter a product.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// Quantised to 8 bits with a scale per 32 values, for weights in quantised blocks. F32, F16
    /// and BF16 weights keep `f32` activations. Normalised mean squared error of a product with
    /// random normal input: about 3e-5. A CPU with AMX multiplies more than a few tokens in BF16 instead, with an
    /// error of 7e-6; of weights that are floats, it then keeps 16 bits, with an error of some 1e-11.
    #[default]
    Int8,
    /// Not quantised: weights are dequantised to `f32` on the way. Slower; for tests and debugging.
    F32,
}

impl Precision {
    fn operand(self, ty: GgmlType) -> Operand {
        match self {
            Self::Int8 if dispatch::has_codes(ty) => Operand::Codes,
            _ => Operand::Floats,
        }
    }
}

/// What an [`Activations`] buffer holds.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Forms {
    pub(crate) precision: Precision,
    pub(crate) codes: bool,
    pub(crate) floats: bool,
    /// In the place of codes, for many tokens on a CPU with tiles.
    pub(crate) tiles: bool,
    /// In the place of floats there: tiles, and tiles of what these have lost.
    pub(crate) rests: bool,
}

impl Forms {
    /// Everything that any weight needs at `precision`.
    pub(crate) fn of(precision: Precision) -> Self {
        Self {
            precision,
            codes: precision == Precision::Int8,
            floats: true,
            tiles: false,
            rests: false,
        }
    }

    /// What is in either.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            precision: self.precision,
            codes: self.codes || other.codes,
            floats: self.floats || other.floats,
            tiles: self.tiles || other.tiles,
            rests: self.rests || other.rests,
        }
    }

    /// What weights of these types need.
    pub(crate) fn for_types(precision: Precision, types: &[GgmlType]) -> Self {
        let needs = |operand| types.iter().any(|ty| precision.operand(*ty) == operand);
        Self {
            precision,
            codes: needs(Operand::Codes),
            floats: needs(Operand::Floats),
            tiles: false,
            rests: false,
        }
    }

    /// With tiles instead of codes and floats, if that is how so many tokens are multiplied at `level`. Products that
    /// are asked for in `f32` stay in it.
    fn tiled(self, level: IsaLevel, order: ProductOrder, tokens: usize) -> Self {
        let tiled = tiles::has_tiles(level) && !order.is_row_by_row(tokens);
        if !tiled || self.precision == Precision::F32 {
            return self;
        }
        Self {
            codes: false,
            floats: false,
            tiles: self.codes,
            rests: self.floats,
            ..self
        }
    }
}

/// A cache line, so that rows start at one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

// SAFETY: 64 bytes of which every pattern is valid.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; `repr(C, align(64))` of 64 bytes has no padding.
unsafe impl bytemuck::Pod for Line {}

/// Activations `[tokens, cols]` in the form that products read: a reusable buffer.
///
/// For [`Precision::Int8`] a row is `i8` codes, an `f32` scale per 32 of them, and per 16 and per
/// 32 codes the sum of what they stand for, which the weights' offsets are multiplied with.
#[derive(Debug, Default)]
pub struct Activations {
    tokens: usize,
    cols: usize,
    /// `cols` rounded up to [`ROW_PAD`].
    padded: usize,
    forms: Forms,
    order: ProductOrder,
    codes: Vec<Line>,
    /// Per token: `padded / 32` scales, `padded / 32` sums of 32, `padded / 16` sums of 16.
    scales: Vec<f32>,
    floats: Vec<Line>,
    tiles: TokenTiles,
    rests: TokenTiles,
    /// 0, 1, 2, …: the list of all tokens.
    identity: Vec<u32>,
}

impl std::fmt::Debug for Line {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl Activations {
    /// An empty buffer that holds up to `max_tokens` rows of up to `max_cols` columns, in either
    /// precision, without allocating again.
    pub fn with_capacity(max_tokens: usize, max_cols: usize) -> Self {
        let mut buffer = Self::default();
        let has_tiles = tiles::has_tiles(cpu::level());
        let forms = Forms {
            tiles: has_tiles,
            rests: has_tiles,
            ..Forms::of(Precision::Int8)
        };
        buffer.resize(max_tokens, max_cols, forms);
        buffer.tokens = 0;
        buffer
    }

    /// Takes the rows of `x` `[tokens, cols]` in the form that products of `precision` need,
    /// whatever the weights' type. Allocates only when the buffer has never been this large.
    ///
    /// # Errors
    /// [`LinearError::InputLength`] when `x` has another length.
    pub fn prepare(
        &mut self,
        pool: &ThreadPool,
        x: &[f32],
        tokens: usize,
        cols: usize,
        precision: Precision,
    ) -> Result<(), LinearError> {
        self.fill(cpu::level(), pool, x, [tokens, cols], Forms::of(precision))
    }

    /// As [`Self::prepare`], but only what weights of the types `types` need: no `f32` copy when
    /// all of them are multiplied with 8-bit activations, which saves memory and time in prefill.
    ///
    /// # Errors
    /// As [`Self::prepare`].
    pub fn prepare_for(
        &mut self,
        pool: &ThreadPool,
        x: &[f32],
        tokens: usize,
        cols: usize,
        precision: Precision,
        types: &[GgmlType],
    ) -> Result<(), LinearError> {
        let forms = Forms::for_types(precision, types);
        self.fill(cpu::level(), pool, x, [tokens, cols], forms)
    }

    /// Takes the rows in these forms; tiles take the place of codes where they are faster.
    pub(crate) fn fill(
        &mut self,
        level: IsaLevel,
        pool: &ThreadPool,
        x: &[f32],
        [tokens, cols]: [usize; 2],
        forms: Forms,
    ) -> Result<(), LinearError> {
        if tokens.checked_mul(cols) != Some(x.len()) {
            return Err(LinearError::InputLength {
                tokens,
                cols,
                actual: x.len(),
            });
        }
        let forms = forms.tiled(level, pool.product_order(), tokens);
        self.fill_rows(level, pool, x, [tokens, cols], forms);
        if forms.tiles || forms.rests {
            self.fill_tiles(pool, x);
        }
        Ok(())
    }

    /// Makes room for `x` `[tokens, cols]`, and takes its rows in those of these forms that are rows: not tiles.
    pub(crate) fn fill_rows(
        &mut self,
        level: IsaLevel,
        pool: &ThreadPool,
        x: &[f32],
        [tokens, cols]: [usize; 2],
        forms: Forms,
    ) {
        self.resize(tokens, cols, forms);
        self.order = pool.product_order();
        if !forms.codes && !forms.floats {
            return;
        }
        let writer = self.writer();
        pool.run(tokens.div_ceil(TOKENS_PER_TASK), &|task| {
            let first = task * TOKENS_PER_TASK;
            for token in first..tokens.min(first + TOKENS_PER_TASK) {
                let row = &x[token * cols..(token + 1) * cols];
                // SAFETY: tasks have tokens of their own, all below `tokens`.
                unsafe { writer.write(level, token, 0, row) };
            }
        });
    }

    fn fill_tiles(&mut self, pool: &ThreadPool, x: &[f32]) {
        let (tokens, cols) = (self.tokens, self.cols);
        let tokens_of = |group: usize| {
            let first = group * TILE;
            &self.identity[first..tokens.min(first + TILE)]
        };
        // SAFETY: `tiled` saw that the CPU has tiles.
        unsafe {
            self.tiles.fill(pool, x, cols, Part::First, tokens_of);
            if self.forms.rests {
                self.rests.fill(pool, x, cols, Part::Rest, tokens_of);
            }
        }
    }

    /// Makes room for `[tokens, cols]` and zeroes what no row will write: the padding.
    pub(crate) fn resize(&mut self, tokens: usize, cols: usize, forms: Forms) {
        let padded = cols.next_multiple_of(ROW_PAD);
        (self.tokens, self.cols, self.padded) = (tokens, cols, padded);
        self.forms = forms;
        if forms.codes {
            grow(&mut self.codes, tokens * padded / 64, Line([0; 64]));
            grow(&mut self.scales, tokens * padded / SCALE_COLS * 4, 0.0);
        }
        if forms.floats {
            grow(&mut self.floats, tokens * padded / 16, Line([0; 64]));
        }
        if forms.tiles || forms.rests {
            self.tiles.resize(tokens.div_ceil(TILE), cols);
        }
        if forms.rests {
            self.rests.resize(tokens.div_ceil(TILE), cols);
        }
        let known = self.identity.len();
        self.identity
            .extend((known..tokens).map(|token| token as u32));
        if cols < padded {
            self.clear_padding();
        }
    }

    fn clear_padding(&mut self) {
        let (tokens, cols, padded) = (self.tokens, self.cols, self.padded);
        let first = cols / SCALE_COLS * SCALE_COLS;
        for token in 0..tokens {
            let row = token * padded;
            if self.forms.codes {
                let codes: &mut [i8] = bytemuck::cast_slice_mut(&mut self.codes);
                codes[row + cols..row + padded].fill(0);
                let (scales, sums32, sums16) = scale_row(&mut self.scales, token, padded);
                scales[first / 32..].fill(0.0);
                sums32[first / 32..].fill(0.0);
                sums16[first / 16..].fill(0.0);
            }
            if self.forms.floats {
                let floats: &mut [f32] = bytemuck::cast_slice_mut(&mut self.floats);
                floats[row + cols..row + padded].fill(0.0);
            }
        }
    }

    /// Which way products with them take.
    pub(crate) fn order(&self) -> ProductOrder {
        self.order
    }

    /// As the activations that these were computed from.
    pub(crate) fn set_order(&mut self, order: ProductOrder) {
        self.order = order;
    }

    /// Number of tokens that were prepared.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Values per token.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The form in which weights of type `ty` read these activations.
    pub(crate) fn operand(&self, ty: GgmlType) -> Result<Operand, LinearError> {
        match self.forms.precision.operand(ty) {
            Operand::Codes if self.forms.tiles => Ok(Operand::Tiles),
            Operand::Codes if self.forms.codes => Ok(Operand::Codes),
            Operand::Floats if self.forms.rests => Ok(Operand::SplitTiles),
            Operand::Floats if self.forms.floats => Ok(Operand::Floats),
            _ => Err(LinearError::NotPrepared { ty }),
        }
    }

    /// The tokens in tiles, where [`Self::operand`] says so.
    pub(crate) fn tiles(&self) -> &TokenTiles {
        &self.tiles
    }

    /// What they have lost of the values, where that is kept.
    pub(crate) fn rests(&self) -> Option<&TokenTiles> {
        self.forms.rests.then_some(&self.rests)
    }

    pub(crate) fn all_tokens(&self) -> &[u32] {
        &self.identity[..self.tokens]
    }

    /// One token's codes, with zeros up to a multiple of 256, and what goes with them.
    #[inline(always)]
    pub(crate) fn codes(&self, token: usize) -> Codes<'_> {
        let row = token * self.padded;
        let codes: &[i8] = bytemuck::cast_slice(&self.codes);
        let blocks = self.padded / SCALE_COLS;
        let scales = &self.scales[token * blocks * 4..][..blocks * 4];
        let (scales, sums) = scales.split_at(blocks);
        let (sums32, sums16) = sums.split_at(blocks);
        Codes {
            codes: &codes[row..row + self.padded],
            scales,
            sums32,
            sums16,
        }
    }

    /// One token's values, with zeros up to a multiple of 256.
    #[inline(always)]
    pub(crate) fn floats(&self, token: usize) -> &[f32] {
        let floats: &[f32] = bytemuck::cast_slice(&self.floats);
        &floats[token * self.padded..(token + 1) * self.padded]
    }

    /// The values that a product sees for one token: what its 8-bit codes stand for, BF16 values, or the
    /// values themselves. `None` when the token was not prepared.
    pub fn values(&self, token: usize) -> Option<Vec<f32>> {
        if token >= self.tokens {
            return None;
        }
        if self.forms.tiles {
            let value = |col| self.tiles.value(token, col);
            return Some((0..self.cols).map(value).collect());
        }
        if self.forms.rests {
            let value = |col| self.tiles.value(token, col) + self.rests.value(token, col);
            return Some((0..self.cols).map(value).collect());
        }
        if !self.forms.codes {
            return Some(self.floats(token)[..self.cols].to_vec());
        }
        let row = self.codes(token);
        let value = |col: usize| row.scales[col / SCALE_COLS] * f32::from(row.codes[col]);
        Some((0..self.cols).map(value).collect())
    }

    /// For tasks that write rows in parallel.
    pub(crate) fn writer(&mut self) -> ActivationWriter {
        let codes: &mut [i8] = bytemuck::cast_slice_mut(&mut self.codes);
        let floats: &mut [f32] = bytemuck::cast_slice_mut(&mut self.floats);
        ActivationWriter {
            codes: self.forms.codes.then_some(codes.as_mut_ptr()),
            scales: self.scales.as_mut_ptr(),
            floats: self.forms.floats.then_some(floats.as_mut_ptr()),
            padded: self.padded,
        }
    }
}

fn grow<T: Clone>(buffer: &mut Vec<T>, len: usize, zero: T) {
    if buffer.len() < len {
        buffer.resize(len, zero);
    }
}

fn scale_row(
    scales: &mut [f32],
    token: usize,
    padded: usize,
) -> (&mut [f32], &mut [f32], &mut [f32]) {
    let blocks = padded / SCALE_COLS;
    let row = &mut scales[token * blocks * 4..][..blocks * 4];
    let (scales, sums) = row.split_at_mut(blocks);
    let (sums32, sums16) = sums.split_at_mut(blocks);
    (scales, sums32, sums16)
}

/// A token's quantised row.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a> {
    /// `padded` codes.
    pub(crate) codes: &'a [i8],
    /// A scale per 32 codes.
    pub(crate) scales: &'a [f32],
    /// Per 32 codes, their sum times the scale.
    pub(crate) sums32: &'a [f32],
    /// Per 16 codes, their sum times the scale.
    pub(crate) sums16: &'a [f32],
}

/// Writes rows of an [`Activations`] from several tasks at once.
#[derive(Clone, Copy)]
pub(crate) struct ActivationWriter {
    codes: Option<*mut i8>,
    scales: *mut f32,
    floats: Option<*mut f32>,
    padded: usize,
}

// SAFETY: the pointers are used by `write` only, whose callers keep to columns of their own.
unsafe impl Send for ActivationWriter {}
// SAFETY: as above.
unsafe impl Sync for ActivationWriter {}

impl ActivationWriter {
    /// Quantises `values` into columns `col..` of row `token`, and copies them where `f32` is
    /// asked for.
    ///
    /// # Safety
    /// The buffer is alive and has the row; `col` is a multiple of 32, `col + values.len()` at
    /// most the buffer's columns; no other task touches these columns' blocks of 32.
    pub(crate) unsafe fn write(&self, level: IsaLevel, token: usize, col: usize, values: &[f32]) {
        let blocks = self.padded / SCALE_COLS;
        let ends = values.len().div_ceil(SCALE_COLS);
        if let Some(codes) = self.codes {
            let first = col / SCALE_COLS;
            // SAFETY: `ends` blocks from `first` on lie in the row, by the caller's promise (the
            // row is padded to whole blocks), and belong to this task.
            let row = unsafe {
                let scales = self.scales.add(token * blocks * 4);
                QuantizedRow {
                    codes: std::slice::from_raw_parts_mut(
                        codes.add(token * self.padded + col),
                        ends * SCALE_COLS,
                    ),
                    scales: std::slice::from_raw_parts_mut(scales.add(first), ends),
                    sums32: std::slice::from_raw_parts_mut(scales.add(blocks + first), ends),
                    sums16: std::slice::from_raw_parts_mut(
                        scales.add(2 * blocks + 2 * first),
                        2 * ends,
                    ),
                }
            };
            dispatch::quantize(level, values, row);
        }
        if let Some(floats) = self.floats {
            // SAFETY: as above.
            let row = unsafe {
                std::slice::from_raw_parts_mut(floats.add(token * self.padded + col), values.len())
            };
            row.copy_from_slice(values);
        }
    }
}

/// Where quantised values go: whole blocks of 32.
pub(crate) struct QuantizedRow<'a> {
    codes: &'a mut [i8],
    scales: &'a mut [f32],
    sums32: &'a mut [f32],
    sums16: &'a mut [f32],
}

/// Adding this to a number of small magnitude rounds it to an integer, which is then found in the
/// low bits: 1.5 * 2^23.
const ROUND: f32 = 12_582_912.0;

/// Quantises `values`: per 32, scale = largest magnitude / 127, codes rounded to nearest, ties to
/// even. Written so that compilers turn it into vector code for any instruction set.
#[inline(always)]
pub(crate) fn quantize_row(values: &[f32], row: QuantizedRow<'_>) {
    let QuantizedRow {
        codes,
        scales,
        sums32,
        sums16,
    } = row;
    let (whole, rest) = values.as_chunks::<SCALE_COLS>();
    let (codes, _) = codes.as_chunks_mut::<SCALE_COLS>();
    let (sums16, _) = sums16.as_chunks_mut::<2>();
    for (index, block) in whole.iter().enumerate() {
        quantize_block(
            block,
            &mut codes[index],
            &mut scales[index],
            &mut sums32[index],
            &mut sums16[index],
        );
    }
    if !rest.is_empty() {
        let mut block = [0.0; SCALE_COLS];
        block[..rest.len()].copy_from_slice(rest);
        let index = whole.len();
        quantize_block(
            &block,
            &mut codes[index],
            &mut scales[index],
            &mut sums32[index],
            &mut sums16[index],
        );
    }
}

#[inline(always)]
fn quantize_block(
    block: &[f32; SCALE_COLS],
    codes: &mut [i8; SCALE_COLS],
    scale: &mut f32,
    sum32: &mut f32,
    sums16: &mut [f32; 2],
) {
    // The order of magnitudes is the order of their bits; a NaN is above all and stays one.
    let largest = block
        .iter()
        .fold(0, |max, value| max.max(value.to_bits() & 0x7fff_ffff));
    let largest = f32::from_bits(largest);
    *scale = largest / 127.0;
    let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
    let inverse = if inverse.is_finite() { inverse } else { 0.0 };
    let mut sums = [0i32; 2];
    for half in 0..2 {
        for index in half * 16..half * 16 + 16 {
            let rounded =
                (block[index] * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
            codes[index] = rounded as i8;
            sums[half] += i32::from(rounded as i8);
        }
        sums16[half] = *scale * sums[half] as f32;
    }
    *sum32 = *scale * (sums[0] + sums[1]) as f32;
}
