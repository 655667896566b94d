//! Perplexity: how well a model predicts a text, by the protocol of llama.cpp's `llama-perplexity`.
//!
//! The text's tokens are cut into chunks; what is left over at the end is not used. In each chunk, whose
//! first token gives way to BOS if the model's file asks for BOS, the tokens behind the middle are predicted
//! from all that stand before them. The perplexity is the exponential of the mean negative logarithm
//! of the probabilities that the model gave them.

use crate::engine::Engine;
use crate::error::EngineError;
use crate::session::Outputs;
use crate::tokenizer::{AddBos, EncodeOptions, ParseSpecial, TokenId};

/// Fewest tokens of a chunk: one is predicted.
const MIN_LENGTH: usize = 4;

/// Why there is no perplexity.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PerplexityError {
    /// The text is too short.
    #[error(
        "the text has {tokens} tokens, and {needed} are needed for chunks of {length}; \
         take a longer text or shorter chunks (--context)"
    )]
    TooShort {
        /// Its tokens.
        tokens: usize,
        /// Tokens that are needed.
        needed: usize,
        /// Tokens of a chunk.
        length: usize,
    },
    /// Chunks are too short.
    #[error(
        "chunks of {length} tokens predict nothing; they need {MIN_LENGTH} at least (--context)"
    )]
    ChunkTooShort {
        /// Tokens of a chunk.
        length: usize,
    },
    /// A step of the engine.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// How a text is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunks {
    /// Tokens of a chunk: the context of the measurement.
    pub length: usize,
    /// Chunks to measure at most; all if none.
    pub limit: Option<usize>,
}

/// What was measured.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// Chunks that were measured.
    pub chunks: usize,
    /// Tokens that were predicted.
    pub scored: usize,
    /// Sum of the negative logarithms of their probabilities, in nats.
    pub nll: f64,
    /// Sum of the squares of the same.
    pub nll_squared: f64,
}

impl Perplexity {
    /// The perplexity; NaN if nothing was predicted.
    pub fn perplexity(&self) -> f64 {
        (self.nll / self.scored as f64).exp()
    }

    /// Standard error of the perplexity, from the spread of the tokens' logarithms; none if there is no spread.
    pub fn standard_error(&self) -> Option<f64> {
        let count = self.scored as f64;
        let mean = self.nll / count;
        let variance = self.nll_squared / count - mean * mean;
        (variance > 0.0 && self.scored > 1)
            .then(|| (variance / (count - 1.0)).sqrt() * self.perplexity())
    }

    /// Counts the prediction of `token` from logits `[vocab]`.
    fn score(&mut self, logits: &[f32], token: TokenId) {
        let nll = negative_log_probability(logits, token);
        self.scored += 1;
        self.nll += nll;
        self.nll_squared += nll * nll;
    }
}

/// The tokens of a text as it is measured: like llama.cpp, without the line end at its very end, with BOS
/// if the model's file asks for it, and with names of control tokens as plain text.
pub fn tokens_of(engine: &Engine, text: &str) -> Vec<TokenId> {
    let options = EncodeOptions {
        add_bos: AddBos::FromModel,
        parse_special: ParseSpecial::No,
    };
    engine
        .tokenizer()
        .encode(text.strip_suffix('\n').unwrap_or(text), &options)
}

/// Measures how well an engine's model predicts tokens. `on_chunk` is called after each chunk with what is
/// measured so far.
///
/// # Errors
/// [`PerplexityError`] if the tokens do not fill two chunks, or a chunk does not fit into the engine's context.
pub fn perplexity(
    engine: &Engine,
    tokens: &[TokenId],
    chunks: Chunks,
    on_chunk: &mut dyn FnMut(&Perplexity),
) -> Result<Perplexity, PerplexityError> {
    let length = chunks.length;
    if length < MIN_LENGTH {
        return Err(PerplexityError::ChunkTooShort { length });
    }
    let needed = length.saturating_mul(2);
    if tokens.len() < needed {
        return Err(PerplexityError::TooShort {
            tokens: tokens.len(),
            needed,
            length,
        });
    }
    let bos = engine
        .tokenizer()
        .bos()
        .filter(|_| engine.tokenizer().adds_bos());
    let mut session = engine.session();
    let mut result = Perplexity::default();
    for chunk in tokens
        .chunks_exact(length)
        .take(chunks.limit.unwrap_or(usize::MAX))
    {
        let mut input = chunk.to_vec();
        input[0] = bos.unwrap_or(input[0]);
        let first = length / 2;
        // The last token predicts nothing that is known.
        let mut wanted = chunk[first + 1..].iter();
        session.clear();
        let mut score = |logits: &mut [f32]| {
            if let Some(token) = wanted.next() {
                result.score(logits, *token);
            }
        };
        match engine.settings().deferred_experts {
            0 => session.read(&input, Outputs::From(first), &mut score)?,
            // Experts are put off where tokens are generated: one at a time.
            _ => {
                session.read(&input[..=first], Outputs::Last, &mut score)?;
                for token in &input[first + 1..] {
                    session.force(*token, &mut score)?;
                }
            }
        }
        result.chunks += 1;
        on_chunk(&result);
    }
    Ok(result)
}

/// `-ln softmax(logits)[token]`; infinite for a token that has no logit.
fn negative_log_probability(logits: &[f32], token: TokenId) -> f64 {
    let Some(logit) = logits.get(token.0 as usize) else {
        return f64::INFINITY;
    };
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|l| (f64::from(*l) - largest).exp()).sum();
    sum.ln() - (f64::from(*logit) - largest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_those_of_the_softmax() {
        let logits = [1.0, 2.0, 3.0];
        let total: f64 = logits.iter().map(|l: &f32| f64::from(*l).exp()).sum();
        for (i, logit) in logits.iter().enumerate() {
            let expected = -(f64::from(*logit).exp() / total).ln();
            assert!(
                (negative_log_probability(&logits, TokenId(i as u32)) - expected).abs() < 1e-12
            );
        }
        assert_eq!(negative_log_probability(&logits, TokenId(3)), f64::INFINITY);
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let nll = negative_log_probability(&[1e30, 0.0], TokenId(0));
        assert_eq!(nll, 0.0);
    }

    #[test]
    fn even_odds_give_the_number_of_choices_without_an_error() {
        let mut result = Perplexity::default();
        for _ in 0..10 {
            result.score(&[0.5; 8], TokenId(3));
        }
        assert!((result.perplexity() - 8.0).abs() < 1e-9);
        // All logarithms are equal: what is left of the variance is rounding.
        assert!(result.standard_error().is_none_or(|e| e < 1e-6));
    }

    #[test]
    fn the_standard_error_follows_from_the_spread() {
        let (a, b) = (1.0_f64, 3.0_f64);
        let result = Perplexity {
            chunks: 1,
            scored: 2,
            nll: a + b,
            nll_squared: a * a + b * b,
        };
        // Variance 1 around the mean of 2, over one degree of freedom.
        assert!((result.standard_error().unwrap() - 2.0_f64.exp()).abs() < 1e-12);
    }
}
