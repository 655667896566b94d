//! Frequencies, and cosines and sines per position.
//!
//! The inverse frequencies are single precision, as Hugging Face stores them. The angle
//! `position * inverse frequency` is taken in double precision and so are its cosine and sine,
//! before they are rounded: at position 100,000 the reference's single-precision product is off
//! by up to 0.004 rad, ours is not.
//!
//! Rows are computed in blocks of [`BLOCK`] positions when a position of the block is first
//! asked for, and kept; a table can be shared by all layers and threads.

use std::f64::consts::PI;
use std::sync::OnceLock;

/// Positions computed together.
const BLOCK: usize = 256;

/// What determines the rotation angles.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Rotated dimensions of a head, even (`rope.dimension_count`).
    pub dim: usize,
    /// Base of the frequencies (`rope.freq_base`, `rope_theta`).
    pub base: f32,
    /// How the frequencies are changed for longer contexts.
    pub scaling: RopeScaling,
    /// Divisors of the frequencies, `[dim / 2]` (`rope_freqs.weight`: Llama 3); empty for none.
    pub freq_divisors: Vec<f32>,
}

/// Change of the frequencies for contexts longer than the model was first trained on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Unchanged. Dynamic NTK is this too: upstream never grows its base.
    None,
    /// All frequencies divided by the factor.
    Linear {
        /// The context's growth.
        factor: f32,
    },
    /// YaRN: low frequencies interpolated, high ones kept, a ramp between.
    Yarn(Yarn),
}

/// Parameters of YaRN ("YaRN: Efficient Context Window Extension of Large Language Models",
/// sections 3.2 and 3.4, in DeepSeek's form).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Yarn {
    /// The context's growth.
    pub factor: f32,
    /// Context before the growth (`original_max_position_embeddings`).
    pub original_context: usize,
    /// Rotations within the original context above which a frequency is kept.
    pub beta_fast: f32,
    /// Rotations below which it is interpolated.
    pub beta_slow: f32,
    /// Numerator of the factor on cosine and sine, see [`yarn_mscale`].
    pub mscale: f32,
    /// Denominator of that factor.
    pub mscale_all_dim: f32,
    /// Whether the ramp begins and ends at whole dimensions: rounded down and up.
    pub truncate: bool,
}

impl Yarn {
    /// YaRN by `factor` with the defaults of everything else: original context 4096, beta 32 and
    /// 1, mscale 1, mscale_all_dim 0, whole dimensions.
    pub fn new(factor: f32) -> Self {
        Yarn {
            factor,
            original_context: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: 1.0,
            mscale_all_dim: 0.0,
            truncate: true,
        }
    }

    /// The factor on cosine and sine.
    pub fn attention_factor(&self) -> f32 {
        yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
    }

    /// Dimension whose frequency makes `rotations` rotations in the original context.
    fn correction_dim(&self, rotations: f32, dim: usize, base: f32) -> f64 {
        let wavelengths = self.original_context as f64 / (f64::from(rotations) * 2.0 * PI);
        dim as f64 * wavelengths.ln() / (2.0 * f64::from(base).ln())
    }

    /// Share of interpolation in frequency `i`, for every `i < dim / 2`.
    fn ramp(&self, dim: usize, base: f32) -> impl Fn(usize) -> f32 + use<> {
        let mut low = self.correction_dim(self.beta_fast, dim, base);
        let mut high = self.correction_dim(self.beta_slow, dim, base);
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let low = low.max(0.0) as f32;
        let mut high = high.min(dim as f64 - 1.0) as f32;
        if low == high {
            high += 0.001;
        }
        move |i| ((i as f32 - low) / (high - low)).clamp(0.0, 1.0)
    }
}

/// YaRN's magnitude correction: `0.1 m ln(scale) + 1`, or 1 for `scale <= 1`.
///
/// DeepSeek's softmax scale takes `yarn_mscale(factor, mscale_all_dim)` squared besides the
/// factor that the table applies to cosine and sine.
pub fn yarn_mscale(scale: f32, m: f32) -> f32 {
    if scale <= 1.0 {
        return 1.0;
    }
    (0.1 * f64::from(m) * f64::from(scale).ln() + 1.0) as f32
}

/// Why a table could not be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RopeError {
    /// The dimension is 0 or odd.
    #[error("rope dimension {dim} is not a positive even number (rope.dimension_count)")]
    Dimension {
        /// The dimension given.
        dim: usize,
    },
    /// A number that must be positive and finite is not.
    #[error("rope {name} is {value}; it must be positive and finite")]
    NotPositive {
        /// What the number is.
        name: &'static str,
        /// Its value.
        value: f32,
    },
    /// The divisors are not one per frequency.
    #[error("rope_freqs has {actual} divisors for {expected} frequencies")]
    Divisors {
        /// Divisors given.
        actual: usize,
        /// Frequencies there are.
        expected: usize,
    },
}

impl RopeConfig {
    /// Plain rotation of `dim` dimensions.
    pub fn plain(dim: usize, base: f32) -> Self {
        RopeConfig {
            dim,
            base,
            scaling: RopeScaling::None,
            freq_divisors: Vec::new(),
        }
    }

    /// The inverse frequencies `[dim / 2]`: `base^(-2i / dim)`, scaled as configured.
    ///
    /// # Errors
    /// [`RopeError`] for numbers that define no frequency.
    pub fn inv_freq(&self) -> Result<Vec<f32>, RopeError> {
        self.check()?;
        let ramp = match &self.scaling {
            RopeScaling::Yarn(yarn) => Some((yarn.factor, yarn.ramp(self.dim, self.base))),
            _ => None,
        };
        let frequency = |i: usize| {
            // The exponent is rounded to single precision, as a float tensor holds it.
            let exponent = (2 * i) as f32 / self.dim as f32;
            let power = f64::from(self.base).powf(exponent.into()) as f32;
            let extra = 1.0 / power;
            let scaled = match (&self.scaling, &ramp) {
                (RopeScaling::Linear { factor }, _) => extra / factor,
                (RopeScaling::Yarn(_), Some((factor, ramp))) => {
                    let inter = 1.0 / (factor * power);
                    inter * ramp(i) + extra * (1.0 - ramp(i))
                }
                _ => extra,
            };
            scaled / self.freq_divisors.get(i).copied().unwrap_or(1.0)
        };
        Ok((0..self.dim / 2).map(frequency).collect())
    }

    /// The factor on cosine and sine.
    pub fn attention_factor(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn(yarn) => yarn.attention_factor(),
            _ => 1.0,
        }
    }

    fn check(&self) -> Result<(), RopeError> {
        if self.dim == 0 || !self.dim.is_multiple_of(2) {
            return Err(RopeError::Dimension { dim: self.dim });
        }
        positive("base", self.base)?;
        match self.scaling {
            RopeScaling::None => {}
            RopeScaling::Linear { factor } => positive("scaling factor", factor)?,
            RopeScaling::Yarn(yarn) => {
                positive("scaling factor", yarn.factor)?;
                positive("beta_fast", yarn.beta_fast)?;
                positive("beta_slow", yarn.beta_slow)?;
                positive("original context", yarn.original_context as f32)?;
            }
        }
        let (actual, expected) = (self.freq_divisors.len(), self.dim / 2);
        if actual != 0 && actual != expected {
            return Err(RopeError::Divisors { actual, expected });
        }
        self.freq_divisors
            .iter()
            .try_for_each(|&d| positive("frequency divisor", d))
    }
}

fn positive(name: &'static str, value: f32) -> Result<(), RopeError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(RopeError::NotPositive { name, value })
}

/// Cosines and sines of all positions of a context, computed when first needed.
#[derive(Debug)]
pub struct RopeTable {
    inv_freq: Vec<f32>,
    factor: f32,
    positions: usize,
    /// Per block of positions, `[BLOCK, dim]` with rows `[cos | sin]`.
    blocks: Box<[OnceLock<Box<[f32]>>]>,
}

impl RopeTable {
    /// A table for positions `0..positions`.
    ///
    /// # Errors
    /// As [`RopeConfig::inv_freq`].
    pub fn new(config: &RopeConfig, positions: usize) -> Result<Self, RopeError> {
        Ok(RopeTable {
            inv_freq: config.inv_freq()?,
            factor: config.attention_factor(),
            positions,
            blocks: (0..positions.div_ceil(BLOCK))
                .map(|_| OnceLock::new())
                .collect(),
        })
    }

    /// Rotated dimensions of a head.
    pub fn dim(&self) -> usize {
        2 * self.inv_freq.len()
    }

    /// Positions that the table covers.
    pub fn positions(&self) -> usize {
        self.positions
    }

    /// The inverse frequencies `[dim / 2]`.
    pub fn inv_freq(&self) -> &[f32] {
        &self.inv_freq
    }

    /// The factor that cosines and sines carry.
    pub fn attention_factor(&self) -> f32 {
        self.factor
    }

    /// Computes the rows below `positions` now, so that no later call allocates.
    pub fn prepare(&self, positions: usize) {
        for block in 0..positions.min(self.positions).div_ceil(BLOCK) {
            self.block(block);
        }
    }

    /// Cosines, then sines, of a position: `[cos dim/2 | sin dim/2]`.
    ///
    /// # Panics
    /// If the position is not below [`RopeTable::positions`].
    pub fn row(&self, position: usize) -> &[f32] {
        assert!(
            position < self.positions,
            "position {position} of a rope table for {}",
            self.positions
        );
        &self.block(position / BLOCK)[position % BLOCK * self.dim()..][..self.dim()]
    }

    fn block(&self, block: usize) -> &[f32] {
        self.blocks[block].get_or_init(|| {
            let half = self.inv_freq.len();
            let mut rows = vec![0.0; BLOCK * self.dim()];
            for (i, row) in rows.chunks_exact_mut(self.dim()).enumerate() {
                let position = (block * BLOCK + i) as f64;
                let (cos, sin) = row.split_at_mut(half);
                for ((c, s), &f) in cos.iter_mut().zip(sin).zip(&self.inv_freq) {
                    let (sin, cos) = (position * f64::from(f)).sin_cos();
                    *c = (cos * f64::from(self.factor)) as f32;
                    *s = (sin * f64::from(self.factor)) as f32;
                }
            }
            rows.into_boxed_slice()
        })
    }
}
