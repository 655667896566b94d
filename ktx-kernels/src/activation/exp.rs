//! The exponential of a vector of lanes.

use crate::lanes::Lanes;

/// Below this the result is 0, above [`HIGHEST`] infinite; both are left to the exponent's
/// arithmetic.
const LOWEST: f32 = -104.0;
const HIGHEST: f32 = 89.0;

/// ln 2 in two parts; the first has 9 significant bits, so that its product with an exponent is
/// exact without a fused multiply-add.
const LN_2_HIGH: f32 = 0.693_359_4;
const LN_2_LOW: f32 = -2.121_944_4e-4;

/// Coefficients of `exp(r) = 1 + r + r^2 (c0 + c1 r + ...)`: the Taylor series, whose next term is
/// below 1e-8 on |r| <= ln 2 / 2.
const SERIES: [f32; 6] = [
    1.0 / 2.0,
    1.0 / 6.0,
    1.0 / 24.0,
    1.0 / 120.0,
    1.0 / 720.0,
    1.0 / 5040.0,
];

/// `exp(x)` lane by lane: relative error below 2e-7, subnormals gradual, 0 below -104, infinity
/// above 89, NaN for NaN.
///
/// `x = n ln 2 + r` with integral `n`; then `exp(x) = 2^n exp(r)`.
///
/// # Safety
/// The CPU has the instruction set of `L`.
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L) -> L {
    // SAFETY: as the caller's.
    unsafe {
        let x = L::splat(HIGHEST).min(L::splat(LOWEST).max(x));
        let n = x.mul(L::splat(std::f32::consts::LOG2_E)).round();
        let r = n.mul_add(L::splat(-LN_2_HIGH), x);
        let r = n.mul_add(L::splat(-LN_2_LOW), r);
        let mut p = L::splat(SERIES[SERIES.len() - 1]);
        for &c in SERIES[..SERIES.len() - 1].iter().rev() {
            p = p.mul_add(r, L::splat(c));
        }
        let p = p.mul_add(r.mul(r), r).add(L::splat(1.0));
        p.scale_exponent(n)
    }
}
