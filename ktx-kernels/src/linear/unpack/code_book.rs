//! Types whose quants are indices: into 16 levels (IQ4), or into a code book of whole groups of
//! four or eight values with signs stored apart (IQ2, IQ3) or built in (IQ1).

use ktx_gguf::tables::{
    EVEN_SIGNS, IQ1S_GRID, IQ2S_GRID, IQ2XS_GRID, IQ2XXS_GRID, IQ3S_GRID, IQ3XXS_GRID, IQ4NL_VALUES,
};

use super::super::isa::Isa;
use super::legacy::{nibbles, symmetric};
use super::{Unpack, bytes, half_at, part_mut, u16_at, u32_at};

/// The levels of IQ4, shifted by 128.
pub(super) static IQ4_LEVELS: [u8; 16] = {
    let mut levels = [0; 16];
    let mut index = 0;
    while index < 16 {
        levels[index] = IQ4NL_VALUES[index] as u8 ^ 0x80;
        index += 1;
    }
    levels
};

macro_rules! code_book_type {
    ($(#[$doc:meta])* $name:ident, bytes $len:literal, sub $sub:literal,
     codes $count:literal, |$isa:ident, $block:ident, $codes:ident, $scales:ident, $offsets:ident| $body:block) => {
        $(#[$doc])*
        #[allow(non_camel_case_types, reason = "the names of the format")]
        pub(crate) struct $name;

        impl Unpack for $name {
            const BLOCK: usize = 256;
            const BYTES: usize = $len;
            const SUB: usize = $sub;
            const CODES: usize = $count;
            const WIDE: bool = $count > 128;

            #[inline(always)]
            unsafe fn unpack<$isa: Isa>(
                $block: &[u8],
                $codes: &mut [u8],
                $scales: &mut [f32],
                $offsets: &mut [f32],
            ) $body
        }
    };
}

code_book_type!(
    /// `d * scale * level`, scales of 6 bits.
    IQ4_XS, bytes 136, sub 32, codes 256, |K, block, codes, scales, offsets| {
        let d = half_at(block, 0);
        let (high, low) = (u16_at(block, 2), u32_at(block, 4));
        for index in 0..8 {
            let codes = part_mut::<_, 32>(codes, index * 32);
            nibbles(bytes(block, 8 + index * 16), codes);
            let scale = (low >> (4 * index)) & 15 | ((u32::from(high) >> (2 * index)) & 3) << 4;
            (scales[index], offsets[index]) = symmetric(d * (scale as f32 - 32.0), 128.0);
        }
        // SAFETY: the CPU supports `K`, by the caller's promise.
        unsafe { K::look_up(&IQ4_LEVELS, &mut codes[..256]) };
    }
);

code_book_type!(
    /// Groups of eight; signs and scale of 32 in the upper half of eight bytes.
    IQ2_XXS, bytes 66, sub 32, codes 128, |K, block, codes, scales, offsets| {
        let d = half_at(block, 0);
        for index in 0..8 {
            let entries = bytes::<4>(block, 2 + index * 8);
            let rest = u32_at(block, 6 + index * 8);
            let mut values = [0; 4];
            for group in 0..4 {
                values[group] = IQ2XXS_GRID[usize::from(entries[group])];
            }
            // SAFETY: the CPU supports `K`, by the caller's promise.
            unsafe { K::centre_signed(values, even_signs(rest), part_mut(codes, index * 32)) };
            let scale = d * (0.5 + (rest >> 28) as f32) * 0.25;
            (scales[index], offsets[index]) = symmetric(scale, 64.0);
        }
    }
);

code_book_type!(
    /// Groups of eight; nine bits of index and seven of signs.
    IQ2_XS, bytes 74, sub 16, codes 128, |K, block, codes, scales, offsets| {
        for index in 0..8 {
            let (mut values, mut signs) = ([0; 4], [0; 4]);
            for group in 0..4 {
                let packed = u16_at(block, 2 + index * 8 + group * 2);
                signs[group] = EVEN_SIGNS[usize::from(packed >> 9)];
                values[group] = IQ2XS_GRID[usize::from(packed & 511)];
            }
            let (signs, codes) = (u32::from_le_bytes(signs), part_mut(codes, index * 32));
            // SAFETY: the CPU supports `K`, by the caller's promise.
            unsafe { K::centre_signed(values, signs, codes) };
        }
        quarter_scales(half_at(block, 0), bytes(block, 66), scales, offsets);
    }
);

code_book_type!(
    /// Groups of eight; ten bits of index, signs in bytes of their own.
    IQ2_S, bytes 82, sub 16, codes 128, |K, block, codes, scales, offsets| {
        for index in 0..8 {
            let mut values = [0; 4];
            let entries = bytes::<4>(block, 2 + index * 4);
            let high = usize::from(block[66 + index]);
            for group in 0..4 {
                let entry = usize::from(entries[group]) | (high >> (2 * group) & 3) << 8;
                values[group] = IQ2S_GRID[entry];
            }
            let (signs, codes) = (u32_at(block, 34 + index * 4), part_mut(codes, index * 32));
            // SAFETY: the CPU supports `K`, by the caller's promise.
            unsafe { K::centre_signed(values, signs, codes) };
        }
        quarter_scales(half_at(block, 0), bytes(block, 74), scales, offsets);
    }
);

/// Scales of IQ2_XS and IQ2_S: `d * (scale + 1/2) / 4`, four bits for 16 elements.
#[inline(always)]
fn quarter_scales(d: f32, packed: &[u8; 8], scales: &mut [f32], offsets: &mut [f32]) {
    for index in 0..16 {
        let scale = packed[index / 2] >> (4 * (index % 2)) & 15;
        (scales[index], offsets[index]) = symmetric(d * (0.5 + f32::from(scale)) * 0.25, 64.0);
    }
}

code_book_type!(
    /// Pairs of groups of four; signs and scale of 32 in four bytes after all indices.
    IQ3_XXS, bytes 98, sub 32, codes 128, |K, block, codes, scales, offsets| {
        let d = half_at(block, 0);
        for index in 0..8 {
            let entries = bytes::<8>(block, 2 + index * 8);
            let rest = u32_at(block, 66 + index * 4);
            let mut values = [0; 4];
            for group in 0..8 {
                let value = u64::from(IQ3XXS_GRID[usize::from(entries[group])]);
                values[group / 2] |= value << (32 * (group % 2));
            }
            // SAFETY: the CPU supports `K`, by the caller's promise.
            unsafe { K::centre_signed(values, even_signs(rest), part_mut(codes, index * 32)) };
            let scale = d * (0.5 + (rest >> 28) as f32) * 0.5;
            (scales[index], offsets[index]) = symmetric(scale, 64.0);
        }
    }
);

code_book_type!(
    /// Pairs of groups of four; nine bits of index, signs in bytes of their own.
    IQ3_S, bytes 110, sub 32, codes 128, |K, block, codes, scales, offsets| {
        let d = half_at(block, 0);
        for index in 0..8 {
            let entries = bytes::<8>(block, 2 + index * 8);
            let high = usize::from(block[66 + index]);
            let mut values = [0; 4];
            for group in 0..8 {
                let entry = usize::from(entries[group]) | (high >> group & 1) << 8;
                values[group / 2] |= u64::from(IQ3S_GRID[entry]) << (32 * (group % 2));
            }
            let (signs, codes) = (u32_at(block, 74 + index * 4), part_mut(codes, index * 32));
            // SAFETY: the CPU supports `K`, by the caller's promise.
            unsafe { K::centre_signed(values, signs, codes) };
            let scale = block[106 + index / 2] >> (4 * (index % 2)) & 15;
            (scales[index], offsets[index]) = symmetric(d * (1.0 + 2.0 * f32::from(scale)), 64.0);
        }
    }
);

code_book_type!(
    /// Ternary groups of eight; `d * scale * (q ± 1/8)`, one sign of the eighth for 32 elements.
    IQ1_S, bytes 50, sub 32, codes 16, |K, block, codes, scales, offsets| {
        let d = half_at(block, 0);
        for index in 0..8 {
            let high = u16_at(block, 34 + index * 2);
            for group in 0..4 {
                let low = u16::from(block[2 + index * 4 + group]);
                let entry = low | (high >> (3 * group) & 7) << 8;
                let codes = part_mut(codes, index * 32 + group * 8);
                *codes = ternary_group(entry).to_le_bytes();
            }
            let delta = if high & 0x8000 == 0 { 0.125 } else { -0.125 };
            scales[index] = d * (2.0 * f32::from(high >> 12 & 7) + 1.0);
            offsets[index] = scales[index] * (delta - 1.0);
        }
    }
);

code_book_type!(
    /// As IQ1_S, with a sign of the eighth per group. Codes are `8 q ± 1`, shifted by 9.
    IQ1_M, bytes 56, sub 16, codes 32, |K, block, codes, scales, offsets| {
        let words: [u16; 4] = std::array::from_fn(|index| u16_at(block, 48 + index * 2));
        let d = words[0] >> 12 | words[1] >> 8 & 0xf0 | words[2] >> 4 & 0xf00 | words[3] & 0xf000;
        let d = super::super::float::half_to_f32(d);
        for group in 0..32 {
            let high = u16::from(block[32 + group / 2] >> (4 * (group % 2)) & 15);
            let entry = u16::from(block[group]) | (high & 7) << 8;
            let delta = if high & 8 == 0 { 0x0202_0202_0202_0202 } else { 0 };
            let codes = part_mut(codes, group * 8);
            *codes = (ternary_group(entry) * 8 + delta).to_le_bytes();
        }
        for index in 0..16 {
            let scale = words[index / 4] >> (3 * (index % 4)) & 7;
            let scale = d * (2.0 * f32::from(scale) + 1.0) * 0.125;
            (scales[index], offsets[index]) = symmetric(scale, 9.0);
        }
    }
);

/// Eight ternary values, shifted to 0, 1, 2.
#[inline(always)]
fn ternary_group(entry: u16) -> u64 {
    const ONES: u64 = 0x0101_0101_0101_0101;
    ((IQ1S_GRID[usize::from(entry & 2047)] & (3 * ONES)) + ONES) & (3 * ONES)
}

/// The 32 sign bits that four times seven bits stand for.
#[inline(always)]
fn even_signs(packed: u32) -> u32 {
    let mut signs = [0; 4];
    for group in 0..4 {
        signs[group] = EVEN_SIGNS[(packed >> (7 * group)) as usize & 127];
    }
    u32::from_le_bytes(signs)
}
