//! Vectors of `f32` lanes, one type per instruction set, for kernels written once.
//!
//! A kernel is a generic `#[inline(always)]` function over [`Lanes`]; [`lanes_entry!`] makes its
//! entry, which enters the widest instance that the given [`IsaLevel`] allows through a function
//! compiled with that level's target features. The methods are `unsafe` because they may only
//! run below such an entry.
//!
//! [`IsaLevel`]: crate::cpu::IsaLevel

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::f16;

use crate::kv::Q8_BLOCK;

/// One vector of `f32` lanes.
///
/// # Safety
/// Every method requires that the CPU has the implementing instruction set. Methods that take a
/// pointer require that all the elements they name are readable (or writable for stores); no
/// alignment is needed.
pub(crate) trait Lanes: Copy {
    /// Lanes in a vector.
    const COUNT: usize;

    /// All lanes `x`.
    unsafe fn splat(x: f32) -> Self;
    /// `COUNT` elements.
    unsafe fn load(p: *const f32) -> Self;
    /// `COUNT` half-precision elements, widened.
    unsafe fn load_f16(p: *const f16) -> Self;
    /// `COUNT` signed bytes.
    unsafe fn load_i8(p: *const i8) -> Self;
    /// All lanes the half-precision element, widened.
    unsafe fn splat_f16(p: *const f16) -> Self;
    /// Writes `COUNT` elements.
    unsafe fn store(self, p: *mut f32);
    /// `self * b + c`, fused where the instruction set does it.
    unsafe fn mul_add(self, b: Self, c: Self) -> Self;
    /// Lane-wise sum.
    unsafe fn add(self, b: Self) -> Self;
    /// Lane-wise difference.
    unsafe fn sub(self, b: Self) -> Self;
    /// Lane-wise product.
    unsafe fn mul(self, b: Self) -> Self;
    /// Lane-wise quotient.
    unsafe fn div(self, b: Self) -> Self;
    /// Lane-wise maximum; where a lane of either is NaN, that lane of `b`.
    unsafe fn max(self, b: Self) -> Self;
    /// Lane-wise minimum; where a lane of either is NaN, that lane of `b`.
    unsafe fn min(self, b: Self) -> Self;
    /// Rounds to the nearest integer.
    unsafe fn round(self) -> Self;
    /// `self * 2^n` for integral `n` in -160..=160, with gradual underflow.
    unsafe fn scale_exponent(self, n: Self) -> Self;
    /// Sum of the lanes, in an order fixed per instruction set.
    unsafe fn sum(self) -> f32;
    /// Largest of the lanes, none of which is NaN.
    unsafe fn max_lane(self) -> f32;
    /// Sums of four vectors; each equals what [`Lanes::sum`] gives.
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        // SAFETY: the caller has the instruction set.
        unsafe { [v[0].sum(), v[1].sum(), v[2].sum(), v[3].sum()] }
    }

    /// The first `n < COUNT` elements, zeros after them.
    #[inline(always)]
    unsafe fn load_partial(p: *const f32, n: usize) -> Self {
        let mut buffer = [0.0f32; MAX_LANES];
        // SAFETY: `n` elements are readable and fit the buffer, which holds `COUNT` or more.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n);
            Self::load(buffer.as_ptr())
        }
    }

    /// The first `n < COUNT` half-precision elements, zeros after them.
    #[inline(always)]
    unsafe fn load_f16_partial(p: *const f16, n: usize) -> Self {
        let mut buffer = [f16::ZERO; MAX_LANES];
        // SAFETY: `n` elements are readable and fit the buffer, which holds `COUNT` or more.
        unsafe {
            std::ptr::copy_nonoverlapping(p, buffer.as_mut_ptr(), n);
            Self::load_f16(buffer.as_ptr())
        }
    }

    /// Writes the first `n < COUNT` lanes.
    #[inline(always)]
    unsafe fn store_partial(self, p: *mut f32, n: usize) {
        let mut buffer = [0.0f32; MAX_LANES];
        // SAFETY: the buffer holds `COUNT` or more, and `n` elements are writable.
        unsafe {
            self.store(buffer.as_mut_ptr());
            std::ptr::copy_nonoverlapping(buffer.as_ptr(), p, n);
        }
    }
}

/// The largest [`Lanes::COUNT`].
pub(crate) const MAX_LANES: usize = 16;

/// Eight lanes in plain Rust; the compiler maps them to the target's baseline vectors.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 8]);

impl Portable {
    #[inline(always)]
    fn zip(self, b: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = self.0;
        for (x, y) in out.iter_mut().zip(b.0) {
            *x = f(*x, y);
        }
        Portable(out)
    }
}

/// 2^n for integral `n` in -126..=127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// A half-precision number without branches, so that the compiler vectorises it: the exponent is
/// rebased by a multiplication, which handles subnormals, or set for infinities and NaN.
#[inline(always)]
fn widen_f16(x: f16) -> f32 {
    const REBASE: f32 = f32::from_bits((127 + 112) << 23);
    const INFINITY: u32 = 0x7c00 << 13;
    let bits = u32::from(x.to_bits());
    let magnitude = (bits & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * REBASE).to_bits();
    let special = magnitude | f32::INFINITY.to_bits();
    let widened = if magnitude >= INFINITY {
        special
    } else {
        finite
    };
    f32::from_bits(widened | (bits & 0x8000) << 16)
}

impl Lanes for Portable {
    const COUNT: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Portable([x; 8])
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: the caller gives 8 readable elements.
        Portable(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: the caller gives 8 readable elements.
        let halves = unsafe { p.cast::<[f16; 8]>().read_unaligned() };
        Portable(halves.map(widen_f16))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: the caller gives 8 readable elements.
        Portable(unsafe { p.cast::<[i8; 8]>().read_unaligned() }.map(f32::from))
    }
    #[inline(always)]
    unsafe fn splat_f16(p: *const f16) -> Self {
        // SAFETY: the caller gives a readable element.
        Portable([widen_f16(unsafe { p.read_unaligned() }); 8])
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: the caller gives 8 writable elements.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        self.zip(b, |x, y| x * y).zip(c, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        self.zip(b, |x, y| x + y)
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        self.zip(b, |x, y| x - y)
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        self.zip(b, |x, y| x * y)
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        self.zip(b, |x, y| x / y)
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        self.zip(b, |x, y| if x > y { x } else { y })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        self.zip(b, |x, y| if x < y { x } else { y })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        // Adding and subtracting 1.5 * 2^23 leaves the nearest integer of a small number.
        const MAGIC: f32 = 12_582_912.0;
        Portable(self.0.map(|x| (x + MAGIC) - MAGIC))
    }
    #[inline(always)]
    unsafe fn scale_exponent(self, n: Self) -> Self {
        self.zip(n, |x, n| {
            let n = n as i32;
            let half = n >> 1;
            x * power_of_two(half) * power_of_two(n - half)
        })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let [a, b, c, d, e, f, g, h] = self.0;
        ((a + e) + (c + g)) + ((b + f) + (d + h))
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

/// Eight lanes of AVX2 with FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256);

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    /// The sums of four vectors in the four lanes.
    #[inline(always)]
    unsafe fn sums(v: [__m256; 4]) -> __m128 {
        // SAFETY: the caller has AVX2.
        unsafe {
            let ab = _mm256_hadd_ps(v[0], v[1]);
            let cd = _mm256_hadd_ps(v[2], v[3]);
            let abcd = _mm256_hadd_ps(ab, cd);
            _mm_add_ps(
                _mm256_castps256_ps128(abcd),
                _mm256_extractf128_ps::<1>(abcd),
            )
        }
    }
}

// SAFETY of the intrinsics in this block: the trait's methods run only where AVX2, FMA and F16C
// are present, and pointers name 8 accessible elements; loads and stores are the unaligned ones.
#[cfg(target_arch = "x86_64")]
impl Lanes for Avx2 {
    const COUNT: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_cvtph_ps(_mm_loadu_si128(p.cast())) })
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn splat_f16(p: *const f16) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_cvtph_ps(_mm_set1_epi16(p.cast::<i16>().read_unaligned())) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see the block.
        unsafe { _mm256_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_div_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_min_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: see the block.
        Avx2(unsafe { _mm256_round_ps::<NEAREST>(self.0) })
    }
    #[inline(always)]
    unsafe fn scale_exponent(self, n: Self) -> Self {
        // SAFETY: see the block.
        unsafe {
            let n = _mm256_cvtps_epi32(n.0);
            let half = _mm256_srai_epi32::<1>(n);
            let rest = _mm256_sub_epi32(n, half);
            let bias = _mm256_set1_epi32(127);
            let a = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
            let b = _mm256_slli_epi32::<23>(_mm256_add_epi32(rest, bias));
            let scaled = _mm256_mul_ps(self.0, _mm256_castsi256_ps(a));
            Avx2(_mm256_mul_ps(scaled, _mm256_castsi256_ps(b)))
        }
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see the block.
        unsafe { _mm_cvtss_f32(Avx2::sums([self.0; 4])) }
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        // SAFETY: see the block.
        unsafe {
            let high = _mm256_extractf128_ps::<1>(self.0);
            let four = _mm_max_ps(_mm256_castps256_ps128(self.0), high);
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: see the block; `out` holds four elements.
        unsafe {
            _mm_storeu_ps(
                out.as_mut_ptr(),
                Avx2::sums([v[0].0, v[1].0, v[2].0, v[3].0]),
            );
        }
        out
    }
}

/// Sixteen lanes of AVX-512 F.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

#[cfg(target_arch = "x86_64")]
impl Avx512 {
    /// The upper half added to the lower.
    #[inline(always)]
    unsafe fn fold(self) -> __m256 {
        // SAFETY: the caller has AVX-512 F and DQ.
        unsafe {
            _mm256_add_ps(
                _mm512_castps512_ps256(self.0),
                _mm512_extractf32x8_ps::<1>(self.0),
            )
        }
    }

    #[inline(always)]
    fn mask(n: usize) -> u16 {
        (1u16 << n) - 1
    }
}

// SAFETY of the intrinsics in this block: the trait's methods run only where AVX-512 F, BW, VL and
// DQ are present, and pointers name 16 accessible elements, or those that the mask selects.
#[cfg(target_arch = "x86_64")]
impl Lanes for Avx512 {
    const COUNT: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_loadu_ps(p) })
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const f16) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) })
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast()))) })
    }
    #[inline(always)]
    unsafe fn splat_f16(p: *const f16) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_set1_epi16(p.cast::<i16>().read_unaligned())) })
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32) {
        // SAFETY: see the block.
        unsafe { _mm512_storeu_ps(p, self.0) }
    }
    #[inline(always)]
    unsafe fn mul_add(self, b: Self, c: Self) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_fmadd_ps(self.0, b.0, c.0) })
    }
    #[inline(always)]
    unsafe fn add(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_add_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn sub(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_sub_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn mul(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_mul_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn div(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_div_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn max(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_max_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn min(self, b: Self) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_min_ps(self.0, b.0) })
    }
    #[inline(always)]
    unsafe fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_roundscale_ps::<NEAREST>(self.0) })
    }
    #[inline(always)]
    unsafe fn scale_exponent(self, n: Self) -> Self {
        // SAFETY: see the block.
        Avx512(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }
    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        // SAFETY: see the block.
        unsafe { _mm_cvtss_f32(Avx2::sums([self.fold(); 4])) }
    }
    #[inline(always)]
    unsafe fn max_lane(self) -> f32 {
        // SAFETY: see the block.
        unsafe { _mm512_reduce_max_ps(self.0) }
    }
    #[inline(always)]
    unsafe fn sum4(v: [Self; 4]) -> [f32; 4] {
        let mut out = [0.0; 4];
        // SAFETY: see the block; `out` holds four elements.
        unsafe {
            let folded = [v[0].fold(), v[1].fold(), v[2].fold(), v[3].fold()];
            _mm_storeu_ps(out.as_mut_ptr(), Avx2::sums(folded));
        }
        out
    }
    #[inline(always)]
    unsafe fn load_partial(p: *const f32, n: usize) -> Self {
        // SAFETY: see the block; the mask selects the `n` readable elements.
        Avx512(unsafe { _mm512_maskz_loadu_ps(Self::mask(n), p) })
    }
    #[inline(always)]
    unsafe fn load_f16_partial(p: *const f16, n: usize) -> Self {
        // SAFETY: see the block; the mask selects the `n` readable elements.
        Avx512(unsafe { _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(Self::mask(n), p.cast())) })
    }
    #[inline(always)]
    unsafe fn store_partial(self, p: *mut f32, n: usize) {
        // SAFETY: see the block; the mask selects the `n` writable elements.
        unsafe { _mm512_mask_storeu_ps(p, Self::mask(n), self.0) }
    }
}

/// Elements in memory that kernels read as `f32` lanes, by a pointer to the first of them.
///
/// # Safety
/// Every method requires that the elements it names are readable and that the CPU has the instruction set of
/// `L`.
pub(crate) trait Stored: Copy {
    /// The elements from number `n` on, with which a block begins where the type has blocks.
    unsafe fn skip(self, n: usize) -> Self;
    /// `L::COUNT` elements from number `at` on, a multiple of it.
    unsafe fn load<L: Lanes>(self, at: usize) -> L;
    /// `n < L::COUNT` elements from number `at` on, a multiple of `L::COUNT`, zeros after them.
    unsafe fn load_partial<L: Lanes>(self, at: usize, n: usize) -> L;
}

impl Stored for *const f32 {
    #[inline(always)]
    unsafe fn skip(self, n: usize) -> Self {
        // SAFETY: as the caller's.
        unsafe { self.add(n) }
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(self, at: usize) -> L {
        // SAFETY: as the caller's.
        unsafe { L::load(self.add(at)) }
    }
    #[inline(always)]
    unsafe fn load_partial<L: Lanes>(self, at: usize, n: usize) -> L {
        // SAFETY: as the caller's.
        unsafe { L::load_partial(self.add(at), n) }
    }
}

impl Stored for *const f16 {
    #[inline(always)]
    unsafe fn skip(self, n: usize) -> Self {
        // SAFETY: as the caller's.
        unsafe { self.add(n) }
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(self, at: usize) -> L {
        // SAFETY: as the caller's.
        unsafe { L::load_f16(self.add(at)) }
    }
    #[inline(always)]
    unsafe fn load_partial<L: Lanes>(self, at: usize, n: usize) -> L {
        // SAFETY: as the caller's.
        unsafe { L::load_f16_partial(self.add(at), n) }
    }
}

/// Signed bytes, and a scale for each [`Q8_BLOCK`] of them: whole blocks, so that no vector holds a part.
#[derive(Clone, Copy)]
pub(crate) struct ScaledBytes {
    pub(crate) quants: *const i8,
    pub(crate) scales: *const f16,
}

impl Stored for ScaledBytes {
    #[inline(always)]
    unsafe fn skip(self, n: usize) -> Self {
        debug_assert!(n.is_multiple_of(Q8_BLOCK));
        // SAFETY: as the caller's.
        unsafe {
            ScaledBytes {
                quants: self.quants.add(n),
                scales: self.scales.add(n / Q8_BLOCK),
            }
        }
    }
    #[inline(always)]
    unsafe fn load<L: Lanes>(self, at: usize) -> L {
        // SAFETY: as the caller's; vectors are no longer than blocks and begin at multiples of their length.
        unsafe { L::load_i8(self.quants.add(at)).mul(L::splat_f16(self.scales.add(at / Q8_BLOCK))) }
    }
    #[inline(always)]
    unsafe fn load_partial<L: Lanes>(self, at: usize, n: usize) -> L {
        let mut buffer = [0i8; MAX_LANES];
        // SAFETY: as the caller's; the buffer holds `COUNT` or more.
        unsafe {
            std::ptr::copy_nonoverlapping(self.quants.add(at), buffer.as_mut_ptr(), n);
            L::load_i8(buffer.as_ptr()).mul(L::splat_f16(self.scales.add(at / Q8_BLOCK)))
        }
    }
}

/// Makes `fn name(level, args)`, which runs `generic::<L>(args)` with the lanes of `level`.
///
/// `generic` must be an `unsafe #[inline(always)]` function whose only safety requirement,
/// besides what the entry's own `unsafe` states, is the instruction set of `L`.
macro_rules! lanes_entry {
    ($(#[$meta:meta])* unsafe fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $generic:ident $(::<$elem:ident>)?) => {
        $(#[$meta])*
        #[inline]
        unsafe fn $name $(<$elem: $crate::lanes::Stored>)? (
            level: $crate::cpu::IsaLevel, $($arg: $ty),*
        ) $(-> $ret)? {
            debug_assert!(level.is_supported(), "the CPU lacks {level}");
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn avx2 $(<$elem: $crate::lanes::Stored>)? ($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: the features are enabled here; the rest is the caller's.
                    unsafe { $generic::<$crate::lanes::Avx2 $(, $elem)?>($($arg),*) }
                }
                #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq")]
                unsafe fn avx512 $(<$elem: $crate::lanes::Stored>)? ($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: the features are enabled here; the rest is the caller's.
                    unsafe { $generic::<$crate::lanes::Avx512 $(, $elem)?>($($arg),*) }
                }
                match level {
                    // SAFETY: the caller's level is one that this CPU supports.
                    $crate::cpu::IsaLevel::Avx2 => return unsafe { avx2 $(::<$elem>)? ($($arg),*) },
                    // SAFETY: the caller's level is one that this CPU supports; AMX comes with AVX-512.
                    $crate::cpu::IsaLevel::Avx512 | $crate::cpu::IsaLevel::Amx => return unsafe { avx512 $(::<$elem>)? ($($arg),*) },
                    $crate::cpu::IsaLevel::Portable => {}
                }
            }
            // SAFETY: portable lanes need no feature; the rest is the caller's.
            unsafe { $generic::<$crate::lanes::Portable $(, $elem)?>($($arg),*) }
        }
    };
}
pub(crate) use lanes_entry;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portable_widening_of_every_half_is_exact() {
        for bits in 0..=u16::MAX {
            let x = f16::from_bits(bits);
            let (actual, expected) = (widen_f16(x), x.to_f32());
            let same = actual.to_bits() == expected.to_bits();
            assert!(
                same || (actual.is_nan() && expected.is_nan()),
                "{bits:#06x}"
            );
        }
    }
}
