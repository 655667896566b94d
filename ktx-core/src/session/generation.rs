//! A generation: reads the prompt in chunks, then gives one token at a time.

use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use ktx_ops::Phase;

use super::{GenerateOptions, Outputs, Session};
use crate::chat::Message;
use crate::error::EngineError;
use crate::sampling::Sampler;
use crate::tokenizer::{StreamDecoder, TokenId};

/// One token as it comes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The token; none for the text that is left over at the end, or that the answer was begun with.
    pub token: Option<TokenId>,
    /// The text that it completes: never half a character, so it may be empty.
    pub text: String,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// The model ended its answer.
    Stop,
    /// As many tokens as were asked for.
    Length,
    /// The context is full.
    Context,
    /// It was stopped from outside.
    Cancelled,
}

/// Counts and times of a generation.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Statistics {
    /// Tokens of the prompt that were read.
    pub prompt_tokens: usize,
    /// Tokens that were in the cache already.
    pub cached_tokens: usize,
    /// Time until the first token was chosen.
    pub prompt_time: Duration,
    /// Tokens that were generated, the first included.
    pub generated_tokens: usize,
    /// Time of the generated tokens, the first not included.
    pub generate_time: Duration,
}

impl Statistics {
    /// Prompt tokens a second.
    pub fn prompt_rate(&self) -> f64 {
        rate(self.prompt_tokens, self.prompt_time)
    }

    /// Generated tokens a second, the first not included.
    pub fn generate_rate(&self) -> f64 {
        rate(self.generated_tokens.saturating_sub(1), self.generate_time)
    }
}

fn rate(tokens: usize, time: Duration) -> f64 {
    if time.is_zero() {
        0.0
    } else {
        tokens as f64 / time.as_secs_f64()
    }
}

/// An iterator over the tokens of an answer. The prompt is read at the first call of `next`.
///
/// Dropped in the middle, it leaves the session as if the answer had ended there.
pub struct Generation<'s> {
    session: &'s mut Session,
    prompt: Vec<TokenId>,
    sampler: Sampler,
    decoder: StreamDecoder,
    /// Text that an answer was begun with, until it is given out.
    opening: String,
    /// What is sampled next comes from these.
    logits: Vec<f32>,
    /// The token that is chosen and not read yet.
    pending: Option<TokenId>,
    generated: Vec<TokenId>,
    answer: Option<String>,
    max_new_tokens: usize,
    finished: Option<FinishReason>,
    flushed: bool,
    statistics: Statistics,
}

impl<'s> Generation<'s> {
    /// `opening` is set in chats: the text that the answer begins with.
    pub(super) fn new(
        session: &'s mut Session,
        prompt: Vec<TokenId>,
        options: &GenerateOptions,
        opening: Option<String>,
    ) -> Result<Self, EngineError> {
        session.cancel.reset();
        let statistics = Statistics {
            prompt_tokens: prompt.len(),
            cached_tokens: session.tokens.len(),
            ..Statistics::default()
        };
        Ok(Self {
            sampler: Sampler::new(options.sampling.clone())?,
            session,
            prompt,
            decoder: StreamDecoder::new(),
            logits: Vec::new(),
            pending: None,
            generated: Vec::new(),
            answer: opening.as_ref().map(|_| String::new()),
            opening: opening.unwrap_or_default(),
            max_new_tokens: options.max_new_tokens,
            finished: None,
            flushed: false,
            statistics,
        })
    }

    /// Why it ended; none while it goes on.
    pub fn finish_reason(&self) -> Option<FinishReason> {
        self.finished
    }

    /// Counts and times so far.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }

    /// The tokens that were generated so far, without one that ended the answer.
    pub fn generated(&self) -> &[TokenId] {
        &self.generated
    }

    /// The whole rest as one text.
    ///
    /// # Errors
    /// The first error of a step.
    pub fn text(mut self) -> Result<String, EngineError> {
        self.by_ref().map(|piece| piece.map(|p| p.text)).collect()
    }

    /// Reads the prompt, chunk by chunk; stops between two chunks if it is cancelled.
    fn prefill(&mut self) -> Result<ControlFlow<()>, EngineError> {
        let begin = Instant::now();
        let prompt = std::mem::take(&mut self.prompt);
        let cancel = self.session.cancel.clone();
        let logits = &mut self.logits;
        let whole = self.session.prefill(
            &prompt,
            Outputs::Last,
            &|| cancel.is_cancelled(),
            &mut |row| copy(logits, row),
        )?;
        if !whole {
            self.finish(FinishReason::Cancelled);
            return Ok(ControlFlow::Break(()));
        }
        self.statistics.prompt_time = begin.elapsed();
        Ok(ControlFlow::Continue(()))
    }

    /// Reads the token that was chosen last.
    fn decode(&mut self, token: TokenId) -> Result<(), EngineError> {
        let logits = &mut self.logits;
        self.session
            .step(&[token], Phase::Generate, 0..1, None, &mut |row| {
                copy(logits, row)
            })
    }

    fn advance(&mut self) -> Result<ControlFlow<(), Piece>, EngineError> {
        let begin = Instant::now();
        if !self.prompt.is_empty() {
            if self.max_new_tokens == 0 {
                self.finish(FinishReason::Length);
                return Ok(ControlFlow::Break(()));
            }
            if self.prefill()?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        } else if let Some(token) = self.pending.take() {
            if let Some(reason) = self.limit() {
                self.pending = Some(token);
                self.finish(reason);
                return Ok(ControlFlow::Break(()));
            }
            self.decode(token)?;
        }
        let mut logits = std::mem::take(&mut self.logits);
        let token = self
            .sampler
            .choose(&mut logits, &self.session.tokens, &self.generated, None);
        self.logits = logits;
        self.statistics.generated_tokens += 1;
        match self.statistics.generated_tokens {
            1 => self.statistics.prompt_time = begin.elapsed(),
            _ => self.statistics.generate_time += begin.elapsed(),
        }
        if self.session.engine.tokenizer.is_end_of_generation(token) {
            self.finish(FinishReason::Stop);
            return Ok(ControlFlow::Break(()));
        }
        self.pending = Some(token);
        self.generated.push(token);
        let text = self.decoder.push(&self.session.engine.tokenizer, token);
        Ok(ControlFlow::Continue(Piece {
            token: Some(token),
            text,
        }))
    }

    /// What forbids to read one more token.
    fn limit(&self) -> Option<FinishReason> {
        if self.session.cancel.is_cancelled() {
            Some(FinishReason::Cancelled)
        } else if self.statistics.generated_tokens >= self.max_new_tokens {
            Some(FinishReason::Length)
        } else if self.session.tokens.len() >= self.session.engine.settings.context {
            Some(FinishReason::Context)
        } else {
            None
        }
    }

    fn finish(&mut self, reason: FinishReason) {
        self.finished = Some(reason);
    }

    /// What is left at the end: an unfinished character, and the conversation's record.
    fn flush(&mut self) -> Option<Piece> {
        self.flushed = true;
        let text = self.decoder.finish();
        self.record(&text);
        self.close();
        (!text.is_empty()).then_some(Piece { token: None, text })
    }

    fn record(&mut self, text: &str) {
        if let Some(answer) = &mut self.answer {
            answer.push_str(text);
        }
    }

    /// Puts the answer into the conversation, and notes the text that the cache now stands for.
    fn close(&mut self) {
        let Some(answer) = self.answer.take() else {
            return;
        };
        self.session.messages.push(Message::assistant(answer));
        // The last token, if the answer did not end itself, was given out and is not in the cache.
        let read = match self.pending {
            Some(_) => &self.generated[..self.generated.len() - 1],
            None => &self.generated[..],
        };
        if self.pending.is_some() || self.prompt_is_unread() {
            self.session.text.clear();
        } else {
            let spelled = self.session.spelled(read);
            self.session.text.push_str(&spelled);
        }
    }

    fn prompt_is_unread(&self) -> bool {
        self.statistics.generated_tokens == 0
    }
}

fn copy(logits: &mut Vec<f32>, row: &[f32]) {
    logits.clear();
    logits.extend_from_slice(row);
}

impl Iterator for Generation<'_> {
    type Item = Result<Piece, EngineError>;

    fn next(&mut self) -> Option<Self::Item> {
        if !self.opening.is_empty() {
            let text = std::mem::take(&mut self.opening);
            self.record(&text);
            return Some(Ok(Piece { token: None, text }));
        }
        if self.flushed {
            return None;
        }
        if self.finished.is_some() {
            return self.flush().map(Ok);
        }
        match self.advance() {
            Ok(ControlFlow::Continue(piece)) => {
                self.record(&piece.text);
                Some(Ok(piece))
            }
            Ok(ControlFlow::Break(())) => self.flush().map(Ok),
            Err(error) => {
                self.finish(FinishReason::Cancelled);
                Some(Err(error))
            }
        }
    }
}

impl Drop for Generation<'_> {
    fn drop(&mut self) {
        if !self.flushed {
            self.flush();
        }
    }
}
