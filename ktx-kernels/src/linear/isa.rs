use super::unpack::HalfScaled;
use super::{CHUNK_COLS, PANEL_ROWS};

/// Columns that row kernels expand at a time: one K-quant block.
pub(crate) const STEP: usize = 256;
/// Smallest number of columns that share a scale.
pub(crate) const MIN_SUB: usize = 16;
/// Most tokens of a register tile.
pub(crate) const MAX_TILE: usize = 8;

/// Up to 256 columns of one row in the uniform form: `weight = scale * code + offset`, with one
/// scale and offset per sub-block of 16 or 32 columns (the block type says which).
#[repr(C, align(64))]
pub(crate) struct Step {
    pub(crate) codes: [u8; STEP],
    pub(crate) scales: [f32; STEP / MIN_SUB],
    pub(crate) offsets: [f32; STEP / MIN_SUB],
}

impl Step {
    pub(crate) const ZERO: Self = Self {
        codes: [0; STEP],
        scales: [0.0; STEP / MIN_SUB],
        offsets: [0.0; STEP / MIN_SUB],
    };
}

/// [`PANEL_ROWS`] rows of up to [`CHUNK_COLS`] columns in the uniform form, in an order that the
/// instruction set chooses ([`Isa::interleave`]). Scales and offsets are `[sub-block, row]`.
#[repr(C, align(64))]
pub(crate) struct CodePanel {
    pub(crate) codes: [u8; PANEL_ROWS * CHUNK_COLS],
    pub(crate) scales: [f32; PANEL_ROWS * CHUNK_COLS / MIN_SUB],
    pub(crate) offsets: [f32; PANEL_ROWS * CHUNK_COLS / MIN_SUB],
}

/// One token's part of a chunk, for 8-bit products.
#[derive(Clone, Copy)]
pub(crate) struct TokenCodes {
    pub(crate) codes: *const i8,
    /// A scale per 32 codes.
    pub(crate) scales: *const f32,
    /// The sums that offsets are multiplied with: per sub-block of the weights' type.
    pub(crate) sums: *const f32,
}

impl TokenCodes {
    /// To be replaced.
    pub(crate) const NONE: Self = Self {
        codes: std::ptr::null(),
        scales: std::ptr::null(),
        sums: std::ptr::null(),
    };
}

/// What one instruction set brings: the innermost loops of all products.
///
/// The methods are inlined into functions that enable the instruction set's features; that is
/// why they are `unsafe`: only such functions, reached through `dispatch` after the CPU was
/// asked, may call them. Pointers are valid for the lengths that each method states.
pub(crate) trait Isa {
    /// Partial sums of one output element.
    type Sum: Copy;

    /// Whether 8-bit products read codes of wide types (above 127) as signed, `code - 128`.
    const SIGNED_WIDE: bool;

    unsafe fn zero() -> Self::Sum;
    /// Adds up the partial sums.
    unsafe fn total(sum: Self::Sum) -> f32;

    /// Replaces each code, below 16, by its entry of `table`.
    unsafe fn look_up(table: &[u8; 16], codes: &mut [u8]);

    /// Converts eight half-precision numbers.
    unsafe fn widen_halves(halves: [u16; 8], out: &mut [f32; 8]);

    /// Adds `value` to the codes whose bits are set.
    unsafe fn add_where(bits: u32, value: u8, codes: &mut [u8; 32]);

    /// Gives magnitudes, bytes below 64, the signs in `bits` (set is negative), and adds 64.
    unsafe fn centre_signed(magnitudes: [u64; 4], bits: u32, codes: &mut [u8; 32]);

    /// Adds the product of [`STEP`] columns of a row and of a token to `sum`. `SUB` is the
    /// columns per scale, `WIDE` whether codes exceed 127.
    unsafe fn dot_codes<const SUB: usize, const WIDE: bool>(
        step: &Step,
        token: TokenCodes,
        sum: Self::Sum,
    ) -> Self::Sum;

    /// Adds the products of one Q4_K block with each token to `sums`, if there is a way that does not go through
    /// a [`Step`]; says whether there is.
    #[inline(always)]
    unsafe fn dot_q4_k<const TOKENS: usize>(
        _: &[u8; 144],
        _: &[TokenCodes; TOKENS],
        _: &mut [Self::Sum; TOKENS],
    ) -> bool {
        false
    }

    /// As [`Self::dot_q4_k`], of a Q6_K block.
    #[inline(always)]
    unsafe fn dot_q6_k<const TOKENS: usize>(
        _: &[u8; 210],
        _: &[TokenCodes; TOKENS],
        _: &mut [Self::Sum; TOKENS],
    ) -> bool {
        false
    }

    /// As [`Self::dot_q4_k`], of up to eight blocks of 32 with half-precision scales.
    #[inline(always)]
    unsafe fn dot_half_scaled<U: HalfScaled, const TOKENS: usize>(
        _: &[u8],
        _: &[TokenCodes; TOKENS],
        _: &mut [Self::Sum; TOKENS],
    ) -> bool {
        false
    }

    /// Puts `cols` (a multiple of 32) columns from `col` on of [`PANEL_ROWS`] rows, each
    /// [`STEP`] bytes apart in `rows`, into the panel's order.
    unsafe fn interleave(rows: &[Step; PANEL_ROWS], col: usize, cols: usize, codes: *mut u8);

    /// Transposes all 16 scales and offsets of [`PANEL_ROWS`] rows.
    unsafe fn interleave_scales(rows: &[Step; PANEL_ROWS], scales: *mut f32, offsets: *mut f32);

    /// Multiplies `cols` columns of the panel with `TOKENS` tokens and adds the products to
    /// `out[token][row]`, `PANEL_ROWS` each; replaces them when `first`.
    unsafe fn tile_codes<const TOKENS: usize, const SUB: usize, const WIDE: bool>(
        panel: &CodePanel,
        cols: usize,
        tokens: &[TokenCodes; TOKENS],
        out: &[*mut f32; TOKENS],
        first: bool,
    );

    /// Adds the product of `weights` and as many values from `x` on to `sum`.
    unsafe fn dot_floats(weights: &[f32; STEP], x: *const f32, sum: Self::Sum) -> Self::Sum;

    /// As [`Self::tile_codes`], for a panel of `f32`, `[column, row]`.
    unsafe fn tile_floats<const TOKENS: usize>(
        panel: *const f32,
        cols: usize,
        tokens: &[*const f32; TOKENS],
        out: &[*mut f32; TOKENS],
        first: bool,
    );

    /// Transposes `cols` columns (a multiple of 16) of [`PANEL_ROWS`] rows of `f32`.
    unsafe fn transpose(rows: &[[f32; STEP]; PANEL_ROWS], cols: usize, panel: *mut f32);
}
