//! From what a request wants to what the scheduler gives.

use std::time::{Duration, Instant};

use ktx_core::chat::{Message, RenderOptions};
use ktx_core::serving::{EndTokens, Event, Finished, Request, TokenEvent, TokenSink, Usage};
use ktx_core::tokenizer::{
    AddBos, EncodeOptions, ParseSpecial, SpecialText, StreamDecoder, TokenId,
};
use ktx_core::{Engine, EngineError, FinishReason, SamplingParams, Thinking};
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};

use crate::app::App;
use crate::constraint::ConstraintSpec;
use crate::error::ApiError;

/// Answers that are wanted to one prompt.
pub(crate) struct Job {
    pub(crate) prompt: Vec<TokenId>,
    pub(crate) sampling: SamplingParams,
    pub(crate) max_new_tokens: usize,
    pub(crate) stop: Vec<String>,
    pub(crate) end_tokens: EndTokens,
    pub(crate) log_probabilities: Option<usize>,
    pub(crate) constraint: Option<ConstraintSpec>,
    pub(crate) special_text: SpecialText,
    pub(crate) continues_text: bool,
    pub(crate) choices: usize,
}

/// What comes of a job. Dropped, it gives the job up.
pub(crate) struct Answers {
    events: UnboundedReceiver<(usize, Event)>,
    deadline: Instant,
    limit: Duration,
    unfinished: usize,
}

/// What is new of one of the answers.
pub(crate) enum Update {
    /// A token of answer number `choice`.
    Token { choice: usize, token: TokenEvent },
    /// The end of answer number `choice`.
    Finished { choice: usize, end: Finished },
}

struct Sink {
    choice: usize,
    events: UnboundedSender<(usize, Event)>,
}

impl TokenSink for Sink {
    fn send(&mut self, event: Event) -> bool {
        self.events.send((self.choice, event)).is_ok()
    }

    fn is_closed(&self) -> bool {
        self.events.is_closed()
    }
}

/// Hands a job to the scheduler.
pub(crate) fn start(app: &App, job: Job) -> Result<Answers, ApiError> {
    let (sender, events) = mpsc::unbounded_channel();
    for choice in 0..job.choices {
        let decoder = match job.continues_text {
            true => StreamDecoder::continuing(),
            false => StreamDecoder::new(),
        };
        let constraint = match &job.constraint {
            Some(spec) => Some(spec.build(app.engine())?),
            None => None,
        };
        let request = Request {
            sampling: SamplingParams {
                seed: job.sampling.seed.wrapping_add(choice as u64),
                ..job.sampling.clone()
            },
            max_new_tokens: job.max_new_tokens,
            stop: job.stop.clone(),
            end_tokens: job.end_tokens,
            log_probabilities: job.log_probabilities,
            constraint,
            decoder: decoder.with_special(job.special_text),
            ..Request::new(job.prompt.clone())
        };
        let sink = Sink {
            choice,
            events: sender.clone(),
        };
        app.scheduler()
            .submit(request, sink)
            .map_err(|error| ApiError::submit(error, app.retry_after()))?;
    }
    let limit = app.settings().request_timeout;
    Ok(Answers {
        events,
        deadline: Instant::now() + limit,
        limit,
        unfinished: job.choices,
    })
}

impl Answers {
    /// What is new; none once all answers are there.
    pub(crate) async fn next(&mut self) -> Result<Option<Update>, ApiError> {
        while self.unfinished > 0 {
            let next = tokio::time::timeout_at(self.deadline.into(), self.events.recv());
            let (choice, event) = match next.await {
                Err(_) => return Err(ApiError::took_too_long(self.limit.as_secs())),
                Ok(None) => return Err(ApiError::internal("the scheduler stopped")),
                Ok(Some(event)) => event,
            };
            match event {
                Event::Started { .. } => {}
                Event::Token(token) => return Ok(Some(Update::Token { choice, token })),
                Event::Finished(end) => {
                    self.unfinished -= 1;
                    return Ok(Some(Update::Finished { choice, end }));
                }
                Event::Failed(error) => return Err(ApiError::engine(&error)),
            }
        }
        Ok(None)
    }
}

/// Counts of all answers to a prompt.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Totals {
    pub(crate) prompt_tokens: usize,
    pub(crate) cached_tokens: usize,
    pub(crate) generated_tokens: usize,
    pub(crate) queue_time: Duration,
    pub(crate) prompt_time: Duration,
    pub(crate) generate_time: Duration,
}

impl Totals {
    /// One answer more; the prompt counts once.
    pub(crate) fn add(&mut self, usage: &Usage) {
        self.cached_tokens = match self.prompt_tokens {
            0 => usage.cached_tokens,
            _ => self.cached_tokens.min(usage.cached_tokens),
        };
        self.prompt_tokens = usage.prompt_tokens;
        self.generated_tokens += usage.generated_tokens;
        self.queue_time = self.queue_time.max(usage.queue_time);
        self.prompt_time = self.prompt_time.max(usage.prompt_time);
        self.generate_time = self.generate_time.max(usage.generate_time);
    }

    /// Another prompt's counts.
    pub(crate) fn add_prompt(&mut self, other: &Self) {
        self.prompt_tokens += other.prompt_tokens;
        self.cached_tokens += other.cached_tokens;
        self.generated_tokens += other.generated_tokens;
        self.prompt_time = self.prompt_time.max(other.prompt_time);
        self.generate_time = self.generate_time.max(other.generate_time);
    }
}

/// Why an answer ended, in OpenAI's words.
pub(crate) fn finish_word(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop | FinishReason::Cancelled => "stop",
        FinishReason::Length | FinishReason::Context => "length",
    }
}

/// A conversation as the model reads it.
pub(crate) struct ChatPrompt {
    pub(crate) tokens: Vec<TokenId>,
    /// Whether the answer begins inside of a thought.
    pub(crate) opens_thought: bool,
}

/// Renders a conversation, away from the threads that serve connections.
pub(crate) async fn chat_prompt(
    app: &App,
    messages: Vec<Message>,
    mut options: RenderOptions,
) -> Result<ChatPrompt, ApiError> {
    let engine = app.engine().clone();
    let thinking = app.settings().defaults.thinking;
    if thinking == Thinking::Off {
        options.enable_thinking.get_or_insert(false);
    }
    away(move || {
        let template = engine.template().map_err(|e| EngineError::NoTemplate {
            reason: e.to_string(),
        })?;
        let mut text = template.render(&messages, &options)?;
        let is_forced = thinking == Thinking::Forced && options.enable_thinking != Some(false);
        if is_forced && !text.trim_end().ends_with("<think>") {
            text.push_str("<think>\n");
        }
        let opens_thought = text.trim_end().ends_with("<think>");
        Ok(ChatPrompt {
            tokens: encode_chat(&engine, &text),
            opens_thought,
        })
    })
    .await
}

/// Encodes a text, away from the threads that serve connections.
pub(crate) async fn text_prompt(app: &App, text: String) -> Result<Vec<TokenId>, ApiError> {
    let engine = app.engine().clone();
    away(move || {
        let options = EncodeOptions {
            add_bos: AddBos::FromModel,
            parse_special: ParseSpecial::Yes,
        };
        Ok(engine.tokenizer().encode(&text, &options))
    })
    .await
}

async fn away<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, ApiError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(|error| ApiError::engine(&error)),
        Err(error) => Err(ApiError::internal(error)),
    }
}

/// Templates write BOS themselves, or leave it to the tokenizer.
fn encode_chat(engine: &Engine, text: &str) -> Vec<TokenId> {
    let tokenizer = engine.tokenizer();
    let bos = tokenizer.bos().and_then(|id| tokenizer.token_text(id));
    let options = match bos.is_some_and(|bos| text.starts_with(bos)) {
        true => EncodeOptions::rendered_chat(),
        false => EncodeOptions {
            add_bos: AddBos::FromModel,
            parse_special: ParseSpecial::Yes,
        },
    };
    tokenizer.encode(text, &options)
}
