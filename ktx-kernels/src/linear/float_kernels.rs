//! The loops around the innermost ones, for `f32` activations.

use super::dispatch::Span;
use super::float::{Columns, Widen};
use super::isa::{Isa, MAX_TILE, STEP};
use super::scratch::{FLOAT_CHUNK_COLS, Scratch};

/// Row by row: widen 256 columns, multiply them with each token, go on.
///
/// Bound by: memory. Bytes moved: the span's weights, once.
///
/// # Safety
/// As [`super::Kernels::multiply`].
#[inline(always)]
pub(crate) unsafe fn float_rows<K: Isa, W: Widen>(span: &Span<'_>, out: *mut f32, stride: usize) {
    let mut token = 0;
    while token < span.tokens.len() {
        let out = out.wrapping_add(token * stride);
        // SAFETY: by the caller's promise; the number of tokens that are left picks the instance.
        token += unsafe {
            match span.tokens.len() - token {
                4.. => rows_of::<K, W, 4>(span, token, out, stride),
                3 => rows_of::<K, W, 3>(span, token, out, stride),
                2 => rows_of::<K, W, 2>(span, token, out, stride),
                _ => rows_of::<K, W, 1>(span, token, out, stride),
            }
        };
    }
}

/// Of `TOKENS` tokens from number `first` on. What a token gets does not depend on how many there are.
#[inline(always)]
unsafe fn rows_of<K: Isa, W: Widen, const TOKENS: usize>(
    span: &Span<'_>,
    first: usize,
    out: *mut f32,
    stride: usize,
) -> usize {
    let mut tokens = [std::ptr::null(); TOKENS];
    for token in 0..TOKENS {
        tokens[token] = span.x.floats(span.tokens[first + token] as usize).as_ptr();
    }
    let mut step = [0.0; STEP];
    let ahead = span.ahead();
    for row in 0..span.rows {
        // SAFETY: `K` is supported, by the caller's promise. A step reads 256 columns of each
        // token, whose rows are padded to that.
        unsafe {
            let mut sums = [K::zero(); TOKENS];
            for (index, columns) in span.row_bytes(row).chunks(step_bytes(span)).enumerate() {
                ahead.prefetch(columns);
                widen_step::<W>(span, row, index * STEP, columns, &mut step);
                for token in 0..TOKENS {
                    let x = tokens[token].wrapping_add(index * STEP);
                    sums[token] = K::dot_floats(&step, x, sums[token]);
                }
            }
            for token in 0..TOKENS {
                *out.add(token * stride + row) = K::total(sums[token]);
            }
        }
    }
    TOKENS
}

/// Panel by panel: widen [`PANEL_ROWS`](super::PANEL_ROWS) rows of 256 columns, stream all tokens over them.
///
/// Bound by: multiply-adds. The sums of each 256 columns are added up by themselves before they
/// are added to the result, which keeps rounding errors small in long rows.
///
/// # Safety
/// As [`super::Kernels::multiply`], with results for [`PANEL_ROWS`](super::PANEL_ROWS) rows whatever `span.rows`.
#[inline(always)]
pub(crate) unsafe fn float_panel<K: Isa, W: Widen>(
    span: &Span<'_>,
    out: *mut f32,
    stride: usize,
    scratch: &mut Scratch,
) {
    for first in (0..span.w.cols).step_by(FLOAT_CHUNK_COLS) {
        let cols = FLOAT_CHUNK_COLS.min(span.w.cols - first);
        // SAFETY: by the caller's promise.
        unsafe {
            fill_panel::<K, W>(span, first, cols, scratch);
            let mut token = 0;
            while token < span.tokens.len() {
                let out = out.add(token * stride);
                token += match span.tokens.len() - token {
                    MAX_TILE.. => {
                        tile::<K, MAX_TILE>(span, token, first, cols, out, stride, scratch)
                    }
                    4.. => tile::<K, 4>(span, token, first, cols, out, stride, scratch),
                    2.. => tile::<K, 2>(span, token, first, cols, out, stride, scratch),
                    _ => tile::<K, 1>(span, token, first, cols, out, stride, scratch),
                };
            }
        }
    }
}

#[inline(always)]
unsafe fn tile<K: Isa, const TOKENS: usize>(
    span: &Span<'_>,
    token: usize,
    first: usize,
    cols: usize,
    out: *mut f32,
    stride: usize,
    scratch: &Scratch,
) -> usize {
    let mut tokens = [std::ptr::null(); TOKENS];
    let mut outs = [out; TOKENS];
    for index in 0..TOKENS {
        let row = span.x.floats(span.tokens[token + index] as usize);
        tokens[index] = row[first..].as_ptr();
        outs[index] = out.wrapping_add(index * stride);
    }
    // SAFETY: by the promise of `float_panel`'s caller; `cols` columns from `first` on exist.
    unsafe {
        let panel = scratch.float_panel.as_ptr();
        K::tile_floats::<TOKENS>(panel, cols, &tokens, &outs, first == 0);
    }
    TOKENS
}

#[inline(always)]
unsafe fn fill_panel<K: Isa, W: Widen>(
    span: &Span<'_>,
    first: usize,
    cols: usize,
    scratch: &mut Scratch,
) {
    for (row, step) in scratch.float_rows.iter_mut().enumerate() {
        if row < span.rows {
            let bytes = span.row_bytes(row);
            let start = first / STEP * step_bytes(span);
            let end = bytes.len().min(start + step_bytes(span));
            widen_step::<W>(span, row, first, &bytes[start..end], step);
        } else {
            step.fill(0.0);
        }
    }
    let panel = scratch.float_panel.as_mut_ptr();
    // SAFETY: the panel has room for `FLOAT_CHUNK_COLS` columns; `K` is supported.
    unsafe { K::transpose(&scratch.float_rows, cols.next_multiple_of(16), panel) };
}

/// Widens up to 256 columns of a row of the span; what is missing of them becomes zero.
#[inline(always)]
fn widen_step<W: Widen>(
    span: &Span<'_>,
    row: usize,
    first: usize,
    bytes: &[u8],
    step: &mut [f32; STEP],
) {
    let columns = Columns {
        w: &span.w,
        row: span.row + row,
        first,
        bytes,
    };
    W::widen(&columns, step);
    if bytes.len() < step_bytes(span) {
        let ty = span.w.ty;
        step[bytes.len() / ty.block_bytes() * ty.block_len()..].fill(0.0);
    }
}

#[inline(always)]
fn step_bytes(span: &Span<'_>) -> usize {
    STEP / span.w.ty.block_len() * span.w.ty.block_bytes()
}
