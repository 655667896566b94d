//! From the blocks of a file to the uniform form `weight = scale * code + offset`: one unpacker
//! per block type, written once and compiled for every instruction set.
//!
//! Codes are unsigned bytes. A sub-block of [`Unpack::SUB`] columns shares one scale and offset.
//! Values that the format stores with a sign are shifted by a constant, which the offset undoes:
//! `weight = scale * (code - zero_point)`, so `offset = -zero_point * scale`.

mod code_book;
mod k_quants;
mod legacy;

pub(crate) use code_book::{IQ1_M, IQ1_S, IQ2_S, IQ2_XS, IQ2_XXS, IQ3_S, IQ3_XXS, IQ4_XS};
#[cfg(target_arch = "x86_64")]
pub(crate) use k_quants::six_bits;
pub(crate) use k_quants::{Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, Q8_K};
pub(crate) use legacy::{
    HalfScaled, IQ4_NL, Levels, MXFP4, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, TQ1_0, TQ2_0,
};

use super::isa::{Isa, Step, TokenCodes};
#[cfg(target_arch = "x86_64")]
use super::tiles::amx::{self, TileRow};

/// The unpacker of one block type.
pub(crate) trait Unpack {
    /// Elements of a block: 32 or 256.
    const BLOCK: usize;
    /// Bytes of a block.
    const BYTES: usize;
    /// Columns that share a scale: 16 or 32.
    const SUB: usize;
    /// Whether codes above 127 occur.
    const WIDE: bool = false;
    /// More than the greatest code.
    const CODES: usize = 256;

    /// Expands one block into `BLOCK` codes and `BLOCK / SUB` scales and offsets.
    ///
    /// # Safety
    /// The CPU supports `K`.
    unsafe fn unpack<K: Isa>(
        block: &[u8],
        codes: &mut [u8],
        scales: &mut [f32],
        offsets: &mut [f32],
    );

    /// Expands the blocks of up to 256 columns.
    ///
    /// # Safety
    /// The CPU supports `K`.
    #[inline(always)]
    unsafe fn unpack_step<K: Isa>(columns: &[u8], step: &mut Step)
    where
        Self: Sized,
    {
        // SAFETY: by the caller's promise.
        unsafe { unpack_blocks::<K, Self>(columns, step) }
    }

    /// Adds the products of up to 256 columns with each token to `sums`, if `K` has a way that does not expand
    /// them into a [`Step`]; says whether it has.
    ///
    /// # Safety
    /// The CPU supports `K`, and tokens have 256 columns.
    #[inline(always)]
    unsafe fn dot_direct<K: Isa, const TOKENS: usize>(
        _: &[u8],
        _: &[TokenCodes; TOKENS],
        _: &mut [K::Sum; TOKENS],
    ) -> bool {
        false
    }

    /// Expands the blocks of up to 256 columns to BF16, as one row of tiles.
    ///
    /// # Safety
    /// The CPU has AMX; the caller has enabled what comes with it.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn expand(columns: &[u8], step: &mut Step, row: TileRow<'_>)
    where
        Self: Sized,
    {
        // SAFETY: by the caller's promise.
        unsafe { amx::expand_codes::<Self>(columns, step, row) }
    }
}

/// Expands block by block.
#[inline(always)]
unsafe fn unpack_blocks<K: Isa, U: Unpack>(columns: &[u8], step: &mut Step) {
    let subs = U::BLOCK / U::SUB;
    for (index, block) in columns.chunks_exact(U::BYTES).enumerate() {
        let codes = &mut step.codes[index * U::BLOCK..][..U::BLOCK];
        let scales = &mut step.scales[index * subs..][..subs];
        let offsets = &mut step.offsets[index * subs..][..subs];
        // SAFETY: by the caller's promise.
        unsafe { U::unpack::<K>(block, codes, scales, offsets) };
    }
}

/// Calls a macro with the names of all types that have an unpacker.
macro_rules! for_each_code_type {
    ($macro:ident) => {
        $macro! {
            Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 MXFP4 TQ1_0 TQ2_0
            Q2_K Q3_K Q4_K Q5_K Q6_K Q8_K
            IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS
        }
    };
}
pub(crate) use for_each_code_type;

/// Bytes `at..at + N` of a block.
#[inline(always)]
fn bytes<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    let Some((bytes, _)) = block[at..].split_first_chunk() else {
        unreachable!("the caller cuts whole blocks")
    };
    bytes
}

/// Elements `at..at + N`, to be written. Arrays of known length let the compiler see that no index
/// is out of bounds, and turn loops over them into vector code.
#[inline(always)]
fn part_mut<T, const N: usize>(all: &mut [T], at: usize) -> &mut [T; N] {
    let Some((part, _)) = all[at..].split_first_chunk_mut() else {
        unreachable!("the caller has room for a block")
    };
    part
}

#[inline(always)]
fn u16_at(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(*bytes(block, at))
}

#[inline(always)]
fn u32_at(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(*bytes(block, at))
}

/// The half-precision number at `at`.
#[inline(always)]
fn half_at(block: &[u8], at: usize) -> f32 {
    super::float::half_to_f32(u16_at(block, at))
}
