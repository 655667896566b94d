//! Kernels in plain Rust, for every target. Loops are written over fixed-size arrays so that the
//! compiler turns them into the target's baseline vector code. Panels keep the order of the file:
//! a row's columns one after the other.

use super::dispatch::Span;
use super::float::{Widen, half_to_f32};
use super::isa::{CodePanel, Isa, MIN_SUB, STEP, Step, TokenCodes};
use super::scratch::Scratch;
use super::unpack::Unpack;
use super::{CHUNK_COLS, PANEL_ROWS, float_kernels, int8_kernels};

const LANES: usize = 16;

/// No instruction beyond the target's baseline.
pub(crate) struct Portable;

pub(crate) unsafe fn code_rows<U: Unpack>(span: &Span<'_>, out: *mut f32, stride: usize) {
    // SAFETY: by the caller's promise.
    unsafe { int8_kernels::code_rows::<Portable, U>(span, out, stride) }
}

pub(crate) unsafe fn code_panel<U: Unpack>(
    span: &Span<'_>,
    out: *mut f32,
    stride: usize,
    scratch: &mut Scratch,
) {
    // SAFETY: by the caller's promise.
    unsafe { int8_kernels::code_panel::<Portable, U>(span, out, stride, scratch) }
}

pub(crate) unsafe fn float_rows<W: Widen>(span: &Span<'_>, out: *mut f32, stride: usize) {
    // SAFETY: by the caller's promise.
    unsafe { float_kernels::float_rows::<Portable, W>(span, out, stride) }
}

pub(crate) unsafe fn float_panel<W: Widen>(
    span: &Span<'_>,
    out: *mut f32,
    stride: usize,
    scratch: &mut Scratch,
) {
    // SAFETY: by the caller's promise.
    unsafe { float_kernels::float_panel::<Portable, W>(span, out, stride, scratch) }
}

/// Integer product of a sub-block.
#[inline(always)]
unsafe fn dot_sub<const SUB: usize>(codes: *const u8, x: *const i8) -> i32 {
    // SAFETY: the caller gives `SUB` elements of each.
    let (codes, x) = unsafe { (&*codes.cast::<[u8; SUB]>(), &*x.cast::<[i8; SUB]>()) };
    let mut sum = 0;
    for index in 0..SUB {
        sum += i32::from(i16::from(codes[index])) * i32::from(i16::from(x[index]));
    }
    sum
}

impl Isa for Portable {
    type Sum = [f32; LANES];

    const SIGNED_WIDE: bool = false;

    #[inline(always)]
    unsafe fn zero() -> [f32; LANES] {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn total(mut sum: [f32; LANES]) -> f32 {
        let mut width = LANES / 2;
        while width > 0 {
            for lane in 0..width {
                sum[lane] += sum[lane + width];
            }
            width /= 2;
        }
        sum[0]
    }

    #[inline(always)]
    unsafe fn look_up(table: &[u8; 16], codes: &mut [u8]) {
        for code in codes {
            *code = table[usize::from(*code & 15)];
        }
    }

    #[inline(always)]
    unsafe fn widen_halves(halves: [u16; 8], out: &mut [f32; 8]) {
        for index in 0..8 {
            out[index] = half_to_f32(halves[index]);
        }
    }

    #[inline(always)]
    unsafe fn add_where(bits: u32, value: u8, codes: &mut [u8; 32]) {
        for (byte, bits) in bits.to_le_bytes().into_iter().enumerate() {
            for bit in 0..8 {
                codes[byte * 8 + bit] += value * ((bits >> bit) & 1);
            }
        }
    }

    #[inline(always)]
    unsafe fn centre_signed(magnitudes: [u64; 4], bits: u32, codes: &mut [u8; 32]) {
        const ONES: u64 = 0x0101_0101_0101_0101;
        let (groups, _) = codes.as_chunks_mut::<8>();
        for (group, bits) in bits.to_le_bytes().into_iter().enumerate() {
            // All eight bytes at once: a mask of all ones where the sign is set, then 64 + m or
            // 64 + m - 2 m; no byte overflows.
            let one_bit_each = (u64::from(bits) * ONES) & 0x8040_2010_0804_0201;
            let mask = (((one_bit_each + 0x7f * ONES) >> 7) & ONES) * 255;
            let magnitude = magnitudes[group];
            let signed = 64 * ONES + magnitude - ((magnitude << 1) & mask);
            groups[group] = signed.to_le_bytes();
        }
    }

    #[inline(always)]
    unsafe fn dot_codes<const SUB: usize, const WIDE: bool>(
        step: &Step,
        token: TokenCodes,
        mut sum: [f32; LANES],
    ) -> [f32; LANES] {
        for index in 0..STEP / SUB {
            let col = index * SUB;
            // SAFETY: the token has 256 columns, by the caller's promise.
            unsafe {
                let dot = dot_sub::<SUB>(step.codes[col..].as_ptr(), token.codes.add(col));
                let scale = step.scales[index] * *token.scales.add(col / 32);
                sum[index] += scale * dot as f32 + step.offsets[index] * *token.sums.add(index);
            }
        }
        sum
    }

    #[inline(always)]
    unsafe fn interleave(rows: &[Step; PANEL_ROWS], col: usize, cols: usize, codes: *mut u8) {
        for (row, step) in rows.iter().enumerate() {
            // SAFETY: the panel holds `CHUNK_COLS` columns of each row, of which these are some.
            unsafe {
                let to = codes.add(row * CHUNK_COLS + col);
                to.copy_from_nonoverlapping(step.codes.as_ptr(), cols);
            }
        }
    }

    #[inline(always)]
    unsafe fn interleave_scales(rows: &[Step; PANEL_ROWS], scales: *mut f32, offsets: *mut f32) {
        for (row, step) in rows.iter().enumerate() {
            for index in 0..STEP / MIN_SUB {
                // SAFETY: the caller has room for 16 scales and offsets of each row.
                unsafe {
                    *scales.add(index * PANEL_ROWS + row) = step.scales[index];
                    *offsets.add(index * PANEL_ROWS + row) = step.offsets[index];
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn tile_codes<const TOKENS: usize, const SUB: usize, const WIDE: bool>(
        panel: &CodePanel,
        cols: usize,
        tokens: &[TokenCodes; TOKENS],
        out: &[*mut f32; TOKENS],
        first: bool,
    ) {
        for (token, &out) in tokens.iter().zip(out) {
            // SAFETY: `cols` columns are in the panel and in the token, by the caller's promise,
            // and `out` holds a result per row.
            unsafe {
                let out = &mut *out.cast::<[f32; PANEL_ROWS]>();
                let mut sums = if first { [0.0; PANEL_ROWS] } else { *out };
                for index in 0..cols / SUB {
                    let (col, at) = (index * SUB, index * PANEL_ROWS);
                    let x = token.codes.add(col);
                    let mut dots = [0; PANEL_ROWS];
                    for row in 0..PANEL_ROWS {
                        dots[row] =
                            dot_sub::<SUB>(panel.codes.as_ptr().add(row * CHUNK_COLS + col), x);
                    }
                    let (x_scale, x_sum) = (*token.scales.add(col / 32), *token.sums.add(index));
                    for row in 0..PANEL_ROWS {
                        let scale = panel.scales[at + row] * x_scale;
                        sums[row] += scale * dots[row] as f32 + panel.offsets[at + row] * x_sum;
                    }
                }
                *out = sums;
            }
        }
    }

    #[inline(always)]
    unsafe fn dot_floats(
        weights: &[f32; STEP],
        x: *const f32,
        mut sum: [f32; LANES],
    ) -> [f32; LANES] {
        // SAFETY: the token has 256 columns, by the caller's promise.
        let x = unsafe { &*x.cast::<[f32; STEP]>() };
        for col in (0..STEP).step_by(LANES) {
            for lane in 0..LANES {
                sum[lane] += weights[col + lane] * x[col + lane];
            }
        }
        sum
    }

    #[inline(always)]
    unsafe fn tile_floats<const TOKENS: usize>(
        panel: *const f32,
        cols: usize,
        tokens: &[*const f32; TOKENS],
        out: &[*mut f32; TOKENS],
        first: bool,
    ) {
        for (token, out) in tokens.iter().zip(out) {
            let mut sums = [0.0; PANEL_ROWS];
            // SAFETY: `cols` columns are in the panel and in the token, by the caller's promise,
            // and `out` holds a result per row.
            unsafe {
                for col in 0..cols {
                    let x = *token.add(col);
                    let weights = &*panel.add(col * PANEL_ROWS).cast::<[f32; PANEL_ROWS]>();
                    for row in 0..PANEL_ROWS {
                        sums[row] += weights[row] * x;
                    }
                }
                for (row, sum) in sums.into_iter().enumerate() {
                    *out.add(row) = if first { sum } else { *out.add(row) + sum };
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn transpose(rows: &[[f32; STEP]; PANEL_ROWS], cols: usize, panel: *mut f32) {
        for col in 0..cols {
            for (row, values) in rows.iter().enumerate() {
                // SAFETY: the panel has room for `cols` columns, by the caller's promise.
                unsafe { *panel.add(col * PANEL_ROWS + row) = values[col] };
            }
        }
    }
}
