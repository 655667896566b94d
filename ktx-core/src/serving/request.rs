//! What is asked for, and what comes back.

use std::sync::Arc;
use std::time::Duration;

use ktx_ops::lora::AdapterId;

use crate::error::EngineError;
use crate::sampling::{LogProbabilities, SamplingParams, TokenSet};
use crate::session::FinishReason;
use crate::tokenizer::{StreamDecoder, TokenId};

/// Tokens of an answer at most, if not set.
const DEFAULT_NEW_TOKENS: usize = 1000;

/// A prompt and how it is continued.
pub struct Request {
    /// The prompt.
    pub prompt: Vec<TokenId>,
    /// How tokens are chosen.
    pub sampling: SamplingParams,
    /// Tokens to generate at most.
    pub max_new_tokens: usize,
    /// Texts that end the answer; they are not part of it.
    pub stop: Vec<String>,
    /// What the model's own end of an answer means.
    pub end_tokens: EndTokens,
    /// Set if probabilities are wanted: of the chosen token, and of this many of the likeliest ones.
    pub log_probabilities: Option<usize>,
    /// What the answer may be.
    pub constraint: Option<Box<dyn TokenConstraint>>,
    /// Adapters that apply, with their factors; if not set, those of the engine.
    pub adapters: Option<Vec<(AdapterId, f32)>>,
    /// How tokens become text.
    pub decoder: StreamDecoder,
}

impl Request {
    /// A prompt with default settings.
    pub fn new(prompt: Vec<TokenId>) -> Self {
        Self {
            prompt,
            sampling: SamplingParams::default(),
            max_new_tokens: DEFAULT_NEW_TOKENS,
            stop: Vec::new(),
            end_tokens: EndTokens::Stop,
            log_probabilities: None,
            constraint: None,
            adapters: None,
            decoder: StreamDecoder::new(),
        }
    }
}

/// What tokens that end an answer do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EndTokens {
    /// They end it.
    #[default]
    Stop,
    /// They are tokens as all others, for measurements.
    Ignore,
}

/// Says which tokens can come next, for answers of a given form.
pub trait TokenConstraint: Send {
    /// Puts the tokens that can come next into `allowed`, which is empty. If it stays empty, the
    /// answer ends.
    fn allow(&mut self, allowed: &mut TokenSet);

    /// Notes the token that was chosen.
    fn accept(&mut self, token: TokenId);
}

/// Takes what comes of a request.
pub trait TokenSink: Send {
    /// Takes an event, at once. Says whether more are wanted; if not, the request is given up.
    fn send(&mut self, event: Event) -> bool;

    /// Whether nobody listens any more. It is asked before every step.
    fn is_closed(&self) -> bool;
}

/// What comes of a request, in this order: the start, tokens, and one end.
#[derive(Debug, Clone)]
pub enum Event {
    /// Its turn has come.
    Started {
        /// Tokens of the prompt that the cache had already.
        cached_tokens: usize,
    },
    /// A token.
    Token(TokenEvent),
    /// The end.
    Finished(Finished),
    /// The end, because a step failed.
    Failed(Arc<EngineError>),
}

/// A token of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenEvent {
    /// Its number.
    pub token: TokenId,
    /// The text that it completes; empty inside of a character, and while the text may turn out to be
    /// a stop text.
    pub text: String,
    /// Its probabilities, if they were asked for.
    pub log_probabilities: Option<LogProbabilities>,
}

/// How an answer ended.
#[derive(Debug, Clone, PartialEq)]
pub struct Finished {
    /// Why.
    pub reason: FinishReason,
    /// The text that is given out at the end.
    pub text: String,
    /// The stop text that ended it.
    pub stop: Option<String>,
    /// What it took.
    pub usage: Usage,
}

/// Counts and times of a request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// How many of them the cache had already.
    pub cached_tokens: usize,
    /// Tokens that were generated, one that ended the answer included.
    pub generated_tokens: usize,
    /// Time until its turn came.
    pub queue_time: Duration,
    /// Time from then to the first token.
    pub prompt_time: Duration,
    /// Time from the first token to the last.
    pub generate_time: Duration,
}

/// Why a request was not taken.
#[derive(Debug, thiserror::Error)]
pub enum SubmitError {
    /// Too many wait already.
    #[error("{waiting} requests wait already; try again later")]
    QueueFull {
        /// How many wait.
        waiting: usize,
    },
    /// No more are taken.
    #[error("the server is shutting down and takes no more requests")]
    Closed,
    /// It can never be answered.
    #[error(transparent)]
    Request(#[from] EngineError),
}
