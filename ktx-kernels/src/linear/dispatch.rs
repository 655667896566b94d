//! From (instruction set, block type, form of the activations) to the functions that multiply.

use std::cell::Cell;

use ktx_gguf::GgmlType;

use super::activations::{self, Activations, QuantizedRow};
use super::float::{Bf16, Dequantized, F16, F32, Fp8, SignedBytes};
use super::scratch::Scratch;
use super::unpack::for_each_code_type;
use super::{PANEL_ROWS, TAIL_TOKENS, WeightRows, with_scratch};
use crate::cpu::IsaLevel;

/// The form of the activations that a product reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operand {
    /// 8-bit codes.
    Codes,
    /// BF16 in tiles, for types that have codes.
    Tiles,
    /// `f32` values.
    Floats,
    /// `f32` values as two numbers of BF16, in tiles.
    SplitTiles,
}

/// Rows of one matrix times tokens of one buffer: what one task computes.
#[derive(Clone, Copy)]
pub(crate) struct Span<'a> {
    pub(crate) w: WeightRows<'a>,
    pub(crate) row: usize,
    pub(crate) rows: usize,
    pub(crate) x: &'a Activations,
    pub(crate) tokens: &'a [u32],
    /// What this thread reads next; empty when that is not known.
    pub(crate) next: &'a [u8],
}

impl<'a> Span<'a> {
    /// The blocks of the span's row number `row`.
    #[inline(always)]
    pub(crate) fn row_bytes(&self, row: usize) -> &'a [u8] {
        let row_bytes = self.w.row_bytes();
        &self.w.bytes[(self.row + row) * row_bytes..][..row_bytes]
    }

    fn first_address(&self) -> usize {
        self.w.bytes_from(self.row).as_ptr().addr()
    }

    /// Asks for the first weights of the span, all at once: what nobody asked for when it was not known yet which
    /// span this thread takes.
    fn prefetch(&self) {
        let wanted = PREFETCH.min(self.rows * self.w.row_bytes());
        for line in self.w.bytes_from(self.row)[..wanted].chunks(64) {
            prefetch(line.as_ptr());
        }
    }

    /// Where row by row products ask for weights.
    #[inline(always)]
    pub(crate) fn ahead(&self) -> Ahead {
        let row_bytes = self.w.row_bytes();
        let blocks = &self.w.bytes[self.row * row_bytes..(self.row + self.rows) * row_bytes];
        let end = blocks.as_ptr_range().end.addr();
        let next = match self.next {
            [] => end,
            next => next.as_ptr().addr(),
        };
        Ahead {
            end,
            jump: next.wrapping_sub(end),
        }
    }
}

/// How far ahead of the arithmetic weights are asked for. The hardware does the same within a page of 4 KiB, but begins
/// anew at each. Experts of one token, 15 threads, GB/s: without 57, 2 KiB 75, 4 KiB 82, 8 KiB 67.
const PREFETCH: usize = 4096;

thread_local! {
    /// Where this thread has asked for the first weights of its next span.
    static ASKED: Cell<usize> = const { Cell::new(0) };
}

/// Where weights are asked for ahead of the arithmetic: [`PREFETCH`] bytes ahead in the span, and at its end in what
/// this thread reads next, so that no span begins by waiting.
#[derive(Clone, Copy)]
pub(crate) struct Ahead {
    /// The address behind the span.
    end: usize,
    /// From there to what is read next.
    jump: usize,
}

impl Ahead {
    /// Asks for as much as `columns`, which are being multiplied.
    #[inline(always)]
    pub(crate) fn prefetch(self, columns: &[u8]) {
        for line in (0..columns.len()).step_by(64) {
            let address = columns.as_ptr().wrapping_add(PREFETCH + line);
            let jump = if address.addr() < self.end {
                0
            } else {
                self.jump
            };
            prefetch(address.wrapping_add(jump));
        }
    }
}

/// Asks for the cache line at an address, which need not be valid, into the second-level cache: the first has too few
/// places for lines that are under way.
#[inline(always)]
fn prefetch(address: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 CPU has SSE, and a prefetch does not access memory.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Writes `[token, row]` results at a stride.
type RowsFn = unsafe fn(&Span<'_>, *mut f32, usize);
type PanelFn = unsafe fn(&Span<'_>, *mut f32, usize, &mut Scratch);

/// The functions for one block type on one instruction set.
#[derive(Clone, Copy)]
pub(crate) struct Kernels {
    /// Row by row.
    rows: RowsFn,
    /// Up to [`PANEL_ROWS`] rows; always writes [`PANEL_ROWS`] results per token.
    panel: PanelFn,
}

impl Kernels {
    /// Multiplies the span; the product of the `t`th of its tokens and its `r`th row goes to
    /// `out[t * stride + r]`.
    ///
    /// # Safety
    /// `out` is valid for that, and this CPU supports the level that the kernels were made for.
    pub(crate) unsafe fn multiply(&self, span: &Span<'_>, out: *mut f32, stride: usize) {
        if span.x.order().is_row_by_row(span.tokens.len()) {
            if ASKED.replace(span.next.as_ptr().addr()) != span.first_address() {
                span.prefetch();
            }
            // SAFETY: by the caller's promise.
            return unsafe { (self.rows)(span, out, stride) };
        }
        for row in (0..span.rows).step_by(PANEL_ROWS) {
            let rows = PANEL_ROWS.min(span.rows - row);
            let panel = Span {
                row: span.row + row,
                rows,
                ..*span
            };
            // SAFETY: by the caller's promise, for a part of the span.
            unsafe { self.multiply_panel(&panel, out.add(row), stride) };
        }
    }

    unsafe fn multiply_panel(&self, span: &Span<'_>, out: *mut f32, stride: usize) {
        with_scratch(|scratch| {
            if span.rows == PANEL_ROWS {
                // SAFETY: by the caller's promise; the panel is complete.
                return unsafe { (self.panel)(span, out, stride, scratch) };
            }
            let tail: *mut f32 = scratch.tail.as_mut_ptr();
            for (group, tokens) in span.tokens.chunks(TAIL_TOKENS).enumerate() {
                let part = Span { tokens, ..*span };
                // SAFETY: the tail holds `PANEL_ROWS` results of each token, and the kernels do
                // not use it. Results go where the caller promised.
                unsafe {
                    (self.panel)(&part, tail, PANEL_ROWS, scratch);
                    for token in 0..tokens.len() {
                        let to = out.add((group * TAIL_TOKENS + token) * stride);
                        to.copy_from_nonoverlapping(tail.add(token * PANEL_ROWS), span.rows);
                    }
                }
            }
        });
    }
}

macro_rules! define_has_codes {
    ($($ty:ident)*) => {
        /// Whether weights of this type are multiplied with 8-bit activations.
        pub(crate) fn has_codes(ty: GgmlType) -> bool {
            matches!(ty, $(GgmlType::$ty)|*)
        }
    };
}
for_each_code_type!(define_has_codes);

/// The kernels for weights of type `ty` at `level`, which this CPU must support.
pub(crate) fn kernels(level: IsaLevel, ty: GgmlType, operand: Operand) -> Kernels {
    match level {
        IsaLevel::Portable => portable_kernels(ty, operand),
        #[cfg(target_arch = "x86_64")]
        IsaLevel::Avx2 => avx2_kernels(ty, operand),
        #[cfg(target_arch = "x86_64")]
        IsaLevel::Avx512 | IsaLevel::Amx => avx512_kernels(ty, operand),
        #[cfg(not(target_arch = "x86_64"))]
        _ => portable_kernels(ty, operand),
    }
}

macro_rules! define_kernels {
    ($d:tt $name:ident, $isa:ident) => {
        fn $name(ty: GgmlType, operand: Operand) -> Kernels {
            use super::$isa::{code_panel, code_rows, float_panel, float_rows};
            macro_rules! codes {
                        ($d($d ty:ident)*) => {
                            match (operand, ty) {
                                $d((Operand::Codes, GgmlType::$d ty) => Kernels {
                                    rows: code_rows::<super::unpack::$d ty>,
                                    panel: code_panel::<super::unpack::$d ty>,
                                },)*
                                (_, GgmlType::F32) => floats!(F32),
                                (_, GgmlType::F16) => floats!(F16),
                                (_, GgmlType::BF16) => floats!(Bf16),
                                (_, GgmlType::F8_E4M3) => floats!(Fp8),
                                (_, GgmlType::I8) => floats!(SignedBytes),
                                _ => floats!(Dequantized),
                            }
                        };
                    }
            macro_rules! floats {
                        ($d ty:ident) => {
                            Kernels { rows: float_rows::<$d ty>, panel: float_panel::<$d ty> }
                        };
                    }
            for_each_code_type!(codes)
        }
    };
}
define_kernels!($ portable_kernels, portable);
#[cfg(target_arch = "x86_64")]
define_kernels!($ avx2_kernels, avx2);
#[cfg(target_arch = "x86_64")]
define_kernels!($ avx512_kernels, avx512);

/// Quantises one row of activations at `level`, which this CPU must support.
pub(crate) fn quantize(level: IsaLevel, values: &[f32], row: QuantizedRow<'_>) {
    match level {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the level is one that this CPU supports.
        IsaLevel::Avx2 => unsafe { super::avx2::quantize(values, row) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        IsaLevel::Avx512 | IsaLevel::Amx => unsafe { super::avx512::quantize(values, row) },
        _ => activations::quantize_row(values, row),
    }
}
