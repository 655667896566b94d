//! Rotary position embedding.

use std::f64::consts::PI;

use super::weights::Weights;

/// Which two elements of a head form a pair.
#[derive(Clone, Copy, PartialEq)]
pub enum Pairs {
    /// 0 and 1, 2 and 3, and so on (llama's converter permutes rows for it; DeepSeek is trained with it).
    Adjacent,
    /// 0 and d/2, 1 and d/2 + 1, and so on (as in Hugging Face's code).
    Halves,
}

/// The rotation of one head's first `2 * frequencies.len()` elements.
pub struct Rope {
    pairs: Pairs,
    frequencies: Vec<f64>,
    /// Factor on sine and cosine.
    magnitude: f64,
    /// Factor on the softmax scale that comes with YaRN in DeepSeek's models.
    pub score_factor: f64,
}

impl Rope {
    /// `dimensions` of each head are rotated.
    pub fn load(weights: &Weights, dimensions: usize) -> Self {
        let base = weights.number("rope.freq_base").unwrap_or(10000.0);
        let mut rope = Self {
            pairs: match weights.architecture() {
                "llama" | "deepseek2" => Pairs::Adjacent,
                _ => Pairs::Halves,
            },
            frequencies: (0..dimensions / 2)
                .map(|i| base.powf(-2.0 * i as f64 / dimensions as f64))
                .collect(),
            magnitude: 1.0,
            score_factor: 1.0,
        };
        if let Some(divisors) = weights.optional_vector("rope_freqs.weight") {
            assert_eq!(divisors.len(), rope.frequencies.len());
            for (frequency, divisor) in rope.frequencies.iter_mut().zip(divisors) {
                *frequency /= divisor;
            }
        }
        let factor = weights.number("rope.scaling.factor").unwrap_or(1.0);
        match weights.text("rope.scaling.type").unwrap_or("none") {
            "none" => {}
            "linear" => rope.frequencies.iter_mut().for_each(|f| *f /= factor),
            "yarn" => rope.stretch(weights, base, factor),
            other => panic!("no reference for rope scaling {other}"),
        }
        rope
    }

    /// YaRN (arXiv 2309.00071, section 3.2): fast frequencies stay, slow ones are divided by `factor`, a ramp between.
    fn stretch(&mut self, weights: &Weights, base: f64, factor: f64) {
        let dimensions = 2 * self.frequencies.len();
        let context = weights.count("context_length");
        let original = weights.count_or("rope.scaling.original_context_length", context) as f64;
        let turns_at =
            |beta: f64| dimensions as f64 * (original / (beta * 2.0 * PI)).ln() / (2.0 * base.ln());
        let fast = weights
            .number("rope.scaling.yarn_beta_fast")
            .unwrap_or(32.0);
        let slow = weights.number("rope.scaling.yarn_beta_slow").unwrap_or(1.0);
        let (low, high) = match weights.architecture() {
            "gpt-oss" => (turns_at(fast), turns_at(slow)),
            _ => (turns_at(fast).floor(), turns_at(slow).ceil()),
        };
        let (low, high) = (low.max(0.0), high.min(dimensions as f64 - 1.0));
        for (i, frequency) in self.frequencies.iter_mut().enumerate() {
            let ramp = ((i as f64 - low) / (high - low).max(0.001)).clamp(0.0, 1.0);
            *frequency = *frequency / factor * ramp + *frequency * (1.0 - ramp);
        }
        // DeepSeek's files carry 0.1 * mscale_all_dim. With mscale = mscale_all_dim, as in all of its models, the
        // factors on sine and cosine cancel and the scores take the square instead.
        match weights.number("rope.scaling.yarn_log_multiplier") {
            Some(multiplier) if multiplier != 0.0 => {
                self.score_factor = (1.0 + multiplier * factor.ln()).powi(2);
            }
            _ => self.magnitude = 1.0 + 0.1 * factor.ln(),
        }
    }

    /// Rotates `x`, which stands at `position`. Elements beyond the rotated ones stay.
    pub fn rotate(&self, x: &mut [f64], position: usize) {
        let half = self.frequencies.len();
        for (i, frequency) in self.frequencies.iter().enumerate() {
            let (first, second) = match self.pairs {
                Pairs::Adjacent => (2 * i, 2 * i + 1),
                Pairs::Halves => (i, i + half),
            };
            let (sine, cosine) = (position as f64 * frequency).sin_cos();
            let (a, b) = (x[first], x[second]);
            x[first] = (a * cosine - b * sine) * self.magnitude;
            x[second] = (a * sine + b * cosine) * self.magnitude;
        }
    }
}
