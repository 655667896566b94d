//! The loops around the innermost ones, for 8-bit activations: the same for every instruction
//! set and block type, instantiated for each pair.

use super::dispatch::Span;
use super::isa::{Isa, MAX_TILE, MIN_SUB, STEP, Step, TokenCodes};
use super::scratch::Scratch;
use super::unpack::Unpack;
use super::{CHUNK_COLS, PANEL_ROWS};

/// Row by row: expand 256 columns, multiply them with each token, go on.
///
/// Bound by: memory, once expansion keeps up. Bytes moved: the span's blocks, once; everything
/// else stays in L1.
///
/// # Safety
/// As [`super::Kernels::multiply`].
#[inline(always)]
pub(crate) unsafe fn code_rows<K: Isa, U: Unpack>(span: &Span<'_>, out: *mut f32, stride: usize) {
    let mut token = 0;
    while token < span.tokens.len() {
        let out = out.wrapping_add(token * stride);
        // SAFETY: by the caller's promise; the number of tokens that are left picks the instance.
        token += unsafe {
            match span.tokens.len() - token {
                8.. => rows_of::<K, U, 8>(span, token, out, stride),
                6 => rows_of::<K, U, 6>(span, token, out, stride),
                4 | 7 => rows_of::<K, U, 4>(span, token, out, stride),
                3 | 5 => rows_of::<K, U, 3>(span, token, out, stride),
                2 => rows_of::<K, U, 2>(span, token, out, stride),
                _ => rows_of::<K, U, 1>(span, token, out, stride),
            }
        };
    }
}

/// Of `TOKENS` tokens from number `first` on. What a token gets does not depend on how many there are.
#[inline(always)]
unsafe fn rows_of<K: Isa, U: Unpack, const TOKENS: usize>(
    span: &Span<'_>,
    first: usize,
    out: *mut f32,
    stride: usize,
) -> usize {
    let mut tokens = [TokenCodes::NONE; TOKENS];
    for token in 0..TOKENS {
        tokens[token] = token_codes::<U>(span, span.tokens[first + token] as usize);
    }
    let mut parts = tokens;
    let mut step = Step::ZERO;
    let ahead = span.ahead();
    for row in 0..span.rows {
        let blocks = span.row_bytes(row);
        // SAFETY: `K` is supported, by the caller's promise. A step reads 256 columns of each
        // token, whose rows are padded to that.
        unsafe {
            let mut sums = [K::zero(); TOKENS];
            for (index, columns) in blocks.chunks(step_bytes::<U>()).enumerate() {
                ahead.prefetch(columns);
                // Not `map`: for more than two tokens it becomes a call, which takes longer than the product.
                for token in 0..TOKENS {
                    parts[token] = advance::<U>(tokens[token], index * STEP);
                }
                if U::dot_direct::<K, TOKENS>(columns, &parts, &mut sums) {
                    continue;
                }
                unpack_step::<K, U>(columns, &mut step);
                for token in 0..TOKENS {
                    sums[token] = dot::<K, U>(&step, parts[token], sums[token]);
                }
            }
            for token in 0..TOKENS {
                *out.add(token * stride + row) = K::total(sums[token]);
            }
        }
    }
    TOKENS
}

/// Panel by panel: expand [`PANEL_ROWS`] rows of [`CHUNK_COLS`] columns, stream all tokens over
/// them in tiles of [`MAX_TILE`].
///
/// Bound by: multiply-accumulates, from some 32 tokens on. Per tile and 32 columns, AVX-512 does
/// 64 `vpdpbusd` and 32 other vector operations. Bytes moved: the blocks once per panel; codes
/// of the panel (16 KiB) from L1 per tile; the tokens' codes from L2 once per panel and chunk.
///
/// # Safety
/// As [`super::Kernels::multiply`], with results for [`PANEL_ROWS`] rows whatever `span.rows`.
#[inline(always)]
pub(crate) unsafe fn code_panel<K: Isa, U: Unpack>(
    span: &Span<'_>,
    out: *mut f32,
    stride: usize,
    scratch: &mut Scratch,
) {
    for first in (0..span.w.cols).step_by(CHUNK_COLS) {
        let cols = CHUNK_COLS.min(span.w.cols - first);
        // SAFETY: by the caller's promise.
        unsafe {
            fill_panel::<K, U>(span, first, cols, scratch);
            let mut token = 0;
            while token < span.tokens.len() {
                let out = out.add(token * stride);
                token += match span.tokens.len() - token {
                    MAX_TILE.. => {
                        tile::<K, U, MAX_TILE>(span, token, first, cols, out, stride, scratch)
                    }
                    4.. => tile::<K, U, 4>(span, token, first, cols, out, stride, scratch),
                    2.. => tile::<K, U, 2>(span, token, first, cols, out, stride, scratch),
                    _ => tile::<K, U, 1>(span, token, first, cols, out, stride, scratch),
                };
            }
        }
    }
}

#[inline(always)]
#[allow(
    clippy::too_many_arguments,
    reason = "an inner loop of `code_panel`, split out for reading"
)]
unsafe fn tile<K: Isa, U: Unpack, const TOKENS: usize>(
    span: &Span<'_>,
    token: usize,
    first: usize,
    cols: usize,
    out: *mut f32,
    stride: usize,
    scratch: &Scratch,
) -> usize {
    let mut tokens = [TokenCodes::NONE; TOKENS];
    let mut outs = [out; TOKENS];
    for index in 0..TOKENS {
        let row = token_codes::<U>(span, span.tokens[token + index] as usize);
        tokens[index] = advance::<U>(row, first);
        outs[index] = out.wrapping_add(index * stride);
    }
    let panel = &scratch.panel;
    // SAFETY: by the promise of `code_panel`'s caller; `cols` columns from `first` on exist.
    unsafe {
        match (U::SUB, U::WIDE) {
            (16, false) => {
                K::tile_codes::<TOKENS, 16, false>(panel, cols, &tokens, &outs, first == 0)
            }
            (16, true) => {
                K::tile_codes::<TOKENS, 16, true>(panel, cols, &tokens, &outs, first == 0)
            }
            (_, false) => {
                K::tile_codes::<TOKENS, 32, false>(panel, cols, &tokens, &outs, first == 0)
            }
            (_, true) => K::tile_codes::<TOKENS, 32, true>(panel, cols, &tokens, &outs, first == 0),
        }
    }
    TOKENS
}

/// Expands `cols` columns from `first` on of the span's rows into the panel. Missing rows become
/// zeros.
#[inline(always)]
unsafe fn fill_panel<K: Isa, U: Unpack>(
    span: &Span<'_>,
    first: usize,
    cols: usize,
    scratch: &mut Scratch,
) {
    let Scratch { panel, steps, .. } = scratch;
    for col in (0..cols).step_by(STEP) {
        let width = STEP.min(cols - col);
        for (row, step) in steps.iter_mut().enumerate() {
            if row < span.rows {
                let bytes = span.row_bytes(row);
                let start = (first + col) / U::BLOCK * U::BYTES;
                let end = bytes.len().min(start + step_bytes::<U>());
                // SAFETY: `K` is supported, by the caller's promise.
                unsafe { unpack_step::<K, U>(&bytes[start..end], step) };
            } else {
                *step = Step::ZERO;
            }
        }
        let at = col / U::SUB * PANEL_ROWS;
        let scales = panel.scales[at..].as_mut_ptr();
        let offsets = panel.offsets[at..].as_mut_ptr();
        // SAFETY: `K` is supported. The panel has room for the codes of `CHUNK_COLS` columns, of
        // which these are some, and for 16 scales of each row from here on, whatever the size of
        // the sub-blocks: those that are too many are replaced by the next step.
        unsafe {
            K::interleave_scales(steps, scales, offsets);
            K::interleave(steps, col, width, panel.codes.as_mut_ptr());
        }
    }
}

#[inline(always)]
const fn step_bytes<U: Unpack>() -> usize {
    STEP / U::BLOCK * U::BYTES
}

/// Expands up to 256 columns; what is missing of them gets scales and offsets of zero.
#[inline(always)]
unsafe fn unpack_step<K: Isa, U: Unpack>(columns: &[u8], step: &mut Step) {
    // SAFETY: `K` is supported, by the caller's promise.
    unsafe { U::unpack_step::<K>(columns, step) };
    if columns.len() < step_bytes::<U>() {
        let filled = columns.len() / U::BYTES * (U::BLOCK / U::SUB);
        step.scales[filled..].fill(0.0);
        step.offsets[filled..].fill(0.0);
    }
    if U::WIDE && K::SIGNED_WIDE {
        for index in 0..STEP / MIN_SUB {
            step.offsets[index] += 128.0 * step.scales[index];
        }
    }
}

#[inline(always)]
unsafe fn dot<K: Isa, U: Unpack>(step: &Step, token: TokenCodes, sum: K::Sum) -> K::Sum {
    // SAFETY: `K` is supported and the token has 256 columns, by the caller's promise.
    unsafe {
        match (U::SUB, U::WIDE) {
            (16, false) => K::dot_codes::<16, false>(step, token, sum),
            (16, true) => K::dot_codes::<16, true>(step, token, sum),
            (_, false) => K::dot_codes::<32, false>(step, token, sum),
            (_, true) => K::dot_codes::<32, true>(step, token, sum),
        }
    }
}

#[inline(always)]
fn token_codes<U: Unpack>(span: &Span<'_>, token: usize) -> TokenCodes {
    let row = span.x.codes(token);
    let sums = if U::SUB == 16 { row.sums16 } else { row.sums32 };
    TokenCodes {
        codes: row.codes.as_ptr(),
        scales: row.scales.as_ptr(),
        sums: sums.as_ptr(),
    }
}

/// The token's columns from `col` on, a multiple of 32.
#[inline(always)]
fn advance<U: Unpack>(token: TokenCodes, col: usize) -> TokenCodes {
    TokenCodes {
        codes: token.codes.wrapping_add(col),
        scales: token.scales.wrapping_add(col / 32),
        sums: token.sums.wrapping_add(col / U::SUB),
    }
}
