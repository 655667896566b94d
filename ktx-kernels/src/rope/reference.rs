//! Frequencies and rotation in double precision.

use super::{RopeConfig, RopeHeads, RopeLayout, RopeScaling};

fn mscale(scale: f64, m: f64) -> f64 {
    if scale <= 1.0 {
        1.0
    } else {
        0.1 * m * scale.ln() + 1.0
    }
}

/// Inverse frequencies and the factor on cosine and sine.
pub(super) fn frequencies(config: &RopeConfig) -> (Vec<f64>, f64) {
    let (d, b) = (config.dim as f64, f64::from(config.base));
    let mut factor = 1.0;
    let frequencies = (0..config.dim / 2)
        .map(|i| {
            let extra = b.powf(-2.0 * i as f64 / d);
            let scaled = match config.scaling {
                RopeScaling::None => extra,
                RopeScaling::Linear { factor } => extra / f64::from(factor),
                RopeScaling::Yarn(y) => {
                    let s = f64::from(y.factor);
                    factor = mscale(s, y.mscale.into()) / mscale(s, y.mscale_all_dim.into());
                    let corr = |r: f32| {
                        let turns = f64::from(r) * std::f64::consts::TAU;
                        d * (y.original_context as f64 / turns).ln() / (2.0 * b.ln())
                    };
                    let (low, high) = (corr(y.beta_fast), corr(y.beta_slow));
                    let (low, high) = match y.truncate {
                        true => (low.floor(), high.ceil()),
                        false => (low, high),
                    };
                    let (low, mut high) = (low.max(0.0), high.min(d - 1.0));
                    if low == high {
                        high += 0.001;
                    }
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    extra / s * ramp + extra * (1.0 - ramp)
                }
            };
            let divisor = config.freq_divisors.get(i).map_or(1.0, |&x| x.into());
            scaled / divisor
        })
        .collect();
    (frequencies, factor)
}

/// The whole buffer after rotation by the given inverse frequencies.
pub(super) fn rope(
    inv_freq: &[f32],
    factor: f64,
    layout: RopeLayout,
    heads: &RopeHeads,
    positions: &[u32],
    x: &[f32],
) -> Vec<f64> {
    let mut y: Vec<f64> = x.iter().map(|&x| x.into()).collect();
    let half = inv_freq.len();
    for (t, &position) in positions.iter().enumerate() {
        for h in 0..heads.heads {
            let start = t * heads.token_stride + h * heads.head_stride + heads.offset;
            for (i, &f) in inv_freq.iter().enumerate() {
                let (sin, cos) = (f64::from(position) * f64::from(f)).sin_cos();
                let (a, b) = match layout {
                    RopeLayout::Interleaved => (start + 2 * i, start + 2 * i + 1),
                    RopeLayout::Half => (start + i, start + half + i),
                };
                (y[a], y[b]) = (
                    (y[a] * cos - y[b] * sin) * factor,
                    (y[a] * sin + y[b] * cos) * factor,
                );
            }
        }
    }
    y
}
