//! From logits to a token: penalties, temperature, truncation, and a draw that a seed decides.

use std::collections::BTreeMap;

use crate::tokenizer::TokenId;

/// How the next token is chosen. Steps are applied in the order of the fields.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// Logits of tokens among the last [`Self::repeat_last_n`] are divided (if positive) or
    /// multiplied (if negative) by this; 1 switches it off.
    pub repeat_penalty: f32,
    /// How many of the last tokens count for the penalty.
    pub repeat_last_n: usize,
    /// Taken from a token's logit for each time that it was generated already; 0 switches it off.
    pub frequency_penalty: f32,
    /// Taken from the logits of tokens that were generated already; 0 switches it off.
    pub presence_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: Vec<(TokenId, f32)>,
    /// Divides the logits; 0 takes the best token always.
    pub temperature: f32,
    /// Only this many of the best tokens stay; 0 switches it off.
    pub top_k: usize,
    /// Only the best tokens whose probabilities reach this sum stay; 1 switches it off.
    pub top_p: f32,
    /// Only tokens of at least this fraction of the best one's probability stay; 0 switches it off.
    pub min_p: f32,
    /// The same seed gives the same tokens.
    pub seed: u64,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            repeat_penalty: 1.0,
            repeat_last_n: 64,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            temperature: 0.6,
            top_k: 0,
            top_p: 0.95,
            min_p: 0.0,
            seed: 0,
        }
    }
}

/// A parameter that is out of its range.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{name} is {value}; {range}")]
pub struct SamplingError {
    /// The parameter.
    pub name: &'static str,
    /// Its value.
    pub value: f32,
    /// The range that is allowed.
    pub range: &'static str,
}

impl SamplingParams {
    /// The best token always.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks the ranges.
    pub fn check(&self) -> Result<(), SamplingError> {
        let check = |name, value: f32, fits: bool, range| {
            if fits && value.is_finite() {
                Ok(())
            } else {
                Err(SamplingError { name, value, range })
            }
        };
        check(
            "temperature",
            self.temperature,
            self.temperature >= 0.0,
            "it must be 0 or more",
        )?;
        check(
            "top_p",
            self.top_p,
            self.top_p > 0.0 && self.top_p <= 1.0,
            "it must be above 0 and at most 1",
        )?;
        check(
            "min_p",
            self.min_p,
            (0.0..=1.0).contains(&self.min_p),
            "it must be from 0 to 1",
        )?;
        check(
            "repeat_penalty",
            self.repeat_penalty,
            self.repeat_penalty > 0.0,
            "it must be above 0",
        )?;
        for (name, value) in [
            ("frequency_penalty", self.frequency_penalty),
            ("presence_penalty", self.presence_penalty),
        ] {
            check(name, value, true, "it must be a number")?;
        }
        let mut biases = self.logit_bias.iter();
        biases.try_for_each(|(_, bias)| check("logit_bias", *bias, true, "it must be a number"))
    }
}

/// Chooses tokens for one generation.
#[derive(Debug, Clone)]
pub struct Sampler {
    params: SamplingParams,
    random: SplitMix64,
    candidates: Vec<Candidate>,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    /// Not normalised.
    probability: f64,
}

impl Sampler {
    /// A sampler.
    ///
    /// # Errors
    /// If a parameter is out of its range.
    pub fn new(params: SamplingParams) -> Result<Self, SamplingError> {
        params.check()?;
        Ok(Self {
            random: SplitMix64(params.seed),
            params,
            candidates: Vec::new(),
        })
    }

    /// The next token, from its logits `[vocab]` and the tokens before it. Ties go to the lower id.
    pub fn sample(&mut self, logits: &mut [f32], history: &[TokenId]) -> TokenId {
        self.choose(logits, history, &[], None)
    }

    /// As [`sample`](Self::sample), where `generated` tokens are penalised and only those of `allowed`
    /// can be chosen.
    pub fn choose(
        &mut self,
        logits: &mut [f32],
        history: &[TokenId],
        generated: &[TokenId],
        allowed: Option<&TokenSet>,
    ) -> TokenId {
        self.penalise(logits, history);
        self.shift(logits, generated);
        if let Some(allowed) = allowed {
            allowed.restrict(logits);
        }
        if self.params.temperature == 0.0 {
            return TokenId(argmax(logits) as u32);
        }
        self.collect(logits);
        self.truncate();
        self.draw()
    }

    fn penalise(&self, logits: &mut [f32], history: &[TokenId]) {
        let penalty = self.params.repeat_penalty;
        if penalty == 1.0 {
            return;
        }
        let mut seen: Vec<u32> = history
            .iter()
            .rev()
            .take(self.params.repeat_last_n)
            .map(|t| t.0)
            .collect();
        seen.sort_unstable();
        seen.dedup();
        for id in seen {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = if *logit > 0.0 {
                    *logit / penalty
                } else {
                    *logit * penalty
                };
            }
        }
    }

    /// Penalties that are subtracted, and biases.
    fn shift(&self, logits: &mut [f32], generated: &[TokenId]) {
        let (frequency, presence) = (self.params.frequency_penalty, self.params.presence_penalty);
        if frequency != 0.0 || presence != 0.0 {
            let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
            for token in generated {
                *counts.entry(token.0).or_default() += 1;
            }
            for (id, count) in counts {
                if let Some(logit) = logits.get_mut(id as usize) {
                    *logit -= frequency * count as f32 + presence;
                }
            }
        }
        for (id, bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(id.0 as usize) {
                *logit += bias;
            }
        }
    }

    /// All tokens that can be drawn, best first.
    fn collect(&mut self, logits: &[f32]) {
        let best = logits[argmax(logits)];
        let temperature = f64::from(self.params.temperature);
        self.candidates.clear();
        self.candidates.extend(
            logits
                .iter()
                .enumerate()
                .filter(|(_, l)| l.is_finite())
                .map(|(id, &logit)| {
                    let probability = ((f64::from(logit) - f64::from(best)) / temperature).exp();
                    Candidate {
                        id: id as u32,
                        logit,
                        probability,
                    }
                }),
        );
        // What is far below anything that a draw could reach need not be sorted.
        self.candidates.retain(|c| c.probability > 1e-12);
        let order =
            |a: &Candidate, b: &Candidate| b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id));
        let k = self.params.top_k;
        if k > 0 && k < self.candidates.len() {
            self.candidates.select_nth_unstable_by(k, order);
            self.candidates.truncate(k);
        }
        self.candidates.sort_unstable_by(order);
    }

    fn truncate(&mut self) {
        let total: f64 = self.candidates.iter().map(|c| c.probability).sum();
        if self.params.top_p < 1.0 {
            let wanted = f64::from(self.params.top_p) * total;
            let mut sum = 0.0;
            let reached = self.candidates.iter().position(|c| {
                sum += c.probability;
                sum >= wanted
            });
            self.candidates
                .truncate(reached.map_or(self.candidates.len(), |i| i + 1));
        }
        let least = f64::from(self.params.min_p);
        if let Some(best) = self.candidates.first().map(|c| c.probability) {
            self.candidates.retain(|c| c.probability >= least * best);
        }
    }

    fn draw(&mut self) -> TokenId {
        let total: f64 = self.candidates.iter().map(|c| c.probability).sum();
        let mut left = self.random.unit() * total;
        for candidate in &self.candidates {
            left -= candidate.probability;
            if left < 0.0 {
                return TokenId(candidate.id);
            }
        }
        TokenId(self.candidates.last().map_or(0, |c| c.id))
    }
}

/// A set of tokens, one bit for each of the vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSet {
    words: Vec<u64>,
}

impl TokenSet {
    /// The empty set of a vocabulary.
    pub fn new(vocab_size: usize) -> Self {
        Self {
            words: vec![0; vocab_size.div_ceil(64)],
        }
    }

    /// Removes all.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds a token; one outside of the vocabulary is left out.
    pub fn insert(&mut self, token: TokenId) {
        if let Some(word) = self.words.get_mut(token.0 as usize / 64) {
            *word |= 1 << (token.0 % 64);
        }
    }

    /// Whether a token is in it.
    pub fn contains(&self, token: TokenId) -> bool {
        let word = self.words.get(token.0 as usize / 64);
        word.is_some_and(|word| word >> (token.0 % 64) & 1 == 1)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.words.iter().map(|w| w.count_ones() as usize).sum()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Makes all other tokens impossible.
    fn restrict(&self, logits: &mut [f32]) {
        for (i, chunk) in logits.chunks_mut(64).enumerate() {
            let word = self.words.get(i).copied().unwrap_or(0);
            for (bit, logit) in chunk.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// The natural logarithms of some tokens' probabilities.
#[derive(Debug, Clone, PartialEq)]
pub struct LogProbabilities {
    /// That of the token that was chosen.
    pub chosen: f32,
    /// The likeliest tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

impl LogProbabilities {
    /// Of a chosen token and the `top` likeliest ones, from logits `[vocab]` as the model gives them.
    pub fn of(logits: &[f32], chosen: TokenId, top: usize) -> Self {
        let best = logits.get(argmax(logits)).copied().unwrap_or(0.0);
        let sum: f64 = logits
            .iter()
            .filter(|l| l.is_finite())
            .map(|l| f64::from(l - best).exp())
            .sum();
        let normaliser = f64::from(best) + sum.ln();
        let of = |logit: f32| (f64::from(logit) - normaliser) as f32;
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let order = |a: &u32, b: &u32| {
            let logit = |id: u32| match logits[id as usize] {
                nan if nan.is_nan() => f32::NEG_INFINITY,
                logit => logit,
            };
            logit(*b).total_cmp(&logit(*a)).then(a.cmp(b))
        };
        if top > 0 && top < ids.len() {
            ids.select_nth_unstable_by(top - 1, order);
        }
        ids.truncate(top);
        ids.sort_unstable_by(order);
        Self {
            chosen: logits.get(chosen.0 as usize).map_or(f32::MIN, |l| of(*l)),
            top: ids
                .into_iter()
                .map(|id| (TokenId(id), of(logits[id as usize])))
                .collect(),
        }
    }
}

/// Index of the largest value; the first of equal ones. NaN is smaller than everything.
pub fn argmax(values: &[f32]) -> usize {
    let mut best = 0;
    for (i, value) in values.iter().enumerate() {
        if *value > values[best] || values[best].is_nan() && !value.is_nan() {
            best = i;
        }
    }
    best
}

/// SplitMix64 (Steele, Lea and Flood 2014): what a seed gives must never change.
#[derive(Debug, Clone)]
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in [0, 1).
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draws(params: SamplingParams, logits: &[f32], n: usize) -> Vec<u32> {
        let mut sampler = Sampler::new(params).unwrap();
        (0..n)
            .map(|_| sampler.sample(&mut logits.to_vec(), &[]).0)
            .collect()
    }

    #[test]
    fn splitmix_gives_the_published_sequence() {
        // First values for seed 1234567, as the reference implementation in C prints them.
        let mut random = SplitMix64(1234567);
        let values: Vec<u64> = (0..3).map(|_| random.next()).collect();
        assert_eq!(
            values,
            [
                6457827717110365317,
                3203168211198807973,
                9817491932198370423
            ]
        );
    }

    #[test]
    fn temperature_zero_takes_the_best_and_the_lower_id_of_equal_ones() {
        assert_eq!(draws(SamplingParams::greedy(), &[1.0, 3.0, 3.0], 2), [1, 1]);
    }

    #[test]
    fn frequencies_follow_the_softmax_at_the_temperature() {
        let params = SamplingParams {
            temperature: 2.0,
            top_p: 1.0,
            seed: 7,
            ..SamplingParams::default()
        };
        let logits = [2.0, 0.0, -2.0];
        let counts = draws(params, &logits, 20_000)
            .iter()
            .fold([0.0; 3], |mut c, id| {
                c[*id as usize] += 1.0 / 20_000.0;
                c
            });
        let weights = logits.map(|l: f32| f64::from(l / 2.0).exp());
        let total: f64 = weights.iter().sum();
        for (count, weight) in counts.iter().zip(weights) {
            assert!((count - weight / total).abs() < 0.015, "{counts:?}");
        }
    }

    #[test]
    fn truncations_keep_only_what_they_promise() {
        let logits = [0.0, 1.0, 2.0, 3.0];
        let base = SamplingParams {
            temperature: 1.0,
            top_p: 1.0,
            seed: 1,
            ..SamplingParams::default()
        };
        let distinct = |params: SamplingParams| {
            let mut ids = draws(params, &logits, 2_000);
            ids.sort_unstable();
            ids.dedup();
            ids
        };
        assert_eq!(distinct(base.clone()), [0, 1, 2, 3]);
        assert_eq!(
            distinct(SamplingParams {
                top_k: 2,
                ..base.clone()
            }),
            [2, 3]
        );
        // Probabilities 0.032, 0.087, 0.237, 0.644.
        assert_eq!(
            distinct(SamplingParams {
                top_p: 0.7,
                ..base.clone()
            }),
            [2, 3]
        );
        assert_eq!(distinct(SamplingParams { min_p: 0.3, ..base }), [2, 3]);
    }

    #[test]
    fn repeated_tokens_are_penalised_whatever_their_sign() {
        let params = SamplingParams {
            repeat_penalty: 2.0,
            ..SamplingParams::greedy()
        };
        let mut sampler = Sampler::new(params).unwrap();
        let mut logits = vec![4.0, 3.0, -1.0];
        assert_eq!(sampler.sample(&mut logits, &[TokenId(0), TokenId(2)]).0, 1);
        assert_eq!(logits, [2.0, 3.0, -2.0]);
    }

    #[test]
    fn values_that_are_no_numbers_do_not_panic() {
        let params = SamplingParams {
            temperature: 1.0,
            ..SamplingParams::default()
        };
        assert_eq!(
            draws(params.clone(), &[f32::NAN, 1.0, f32::NEG_INFINITY], 1),
            [1]
        );
        draws(params, &[f32::NAN, f32::NAN], 1);
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        for (params, name) in [
            (
                SamplingParams {
                    temperature: -1.0,
                    ..SamplingParams::default()
                },
                "temperature",
            ),
            (
                SamplingParams {
                    top_p: 0.0,
                    ..SamplingParams::default()
                },
                "top_p",
            ),
            (
                SamplingParams {
                    min_p: f32::NAN,
                    ..SamplingParams::default()
                },
                "min_p",
            ),
        ] {
            assert_eq!(Sampler::new(params).unwrap_err().name, name);
        }
    }
}
