//! The engine behind Dynamo's trait: start, generate, cancellation, cleanup.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use dynamo_backend_common::{
    BackendError, CompletionUsage, DynamoError, EngineConfig, ErrorType, GenerateContext,
    LLMEngine, LLMEngineOutput, LLMEngineOutputExt, LlmRegistration, PreprocessedRequest,
    PromptTokensDetails, TopLogprob, chunk, usage,
};
use futures::stream::BoxStream;
use ktx_core::kernels::kv::PAGE_TOKENS;
use ktx_core::serving::{Event, Scheduler, SchedulerSettings, SubmitError, TokenEvent, TokenSink};
use ktx_core::{Engine, EngineBuilder, EngineError, FinishReason, TokenId};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use crate::request::{Translated, translate};

/// How often it is looked whether the scheduler has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What a worker is made with.
pub struct WorkerSettings {
    /// The model and how it is run.
    pub engine: EngineBuilder,
    /// What Dynamo calls the model.
    pub model_name: String,
    /// Limits of the scheduler.
    pub scheduler: SchedulerSettings,
}

enum State {
    New(Box<WorkerSettings>),
    Running(Scheduler),
    /// Ended, or never started.
    Over,
}

/// A worker.
pub struct KtxBackend(Mutex<State>);

impl KtxBackend {
    /// A worker that loads its model when it is started.
    pub fn new(settings: WorkerSettings) -> Self {
        Self(Mutex::new(State::New(Box::new(settings))))
    }

    /// The scheduler, while it runs.
    pub fn scheduler(&self) -> Option<Scheduler> {
        match &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            State::Running(scheduler) => Some(scheduler.clone()),
            State::New(_) | State::Over => None,
        }
    }

    fn replace(&self, state: State) -> State {
        let mut place = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut place, state)
    }
}

pub(crate) fn error(kind: BackendError, message: impl ToString) -> DynamoError {
    DynamoError::builder()
        .error_type(ErrorType::Backend(kind))
        .message(message.to_string())
        .build()
}

fn of_engine(e: &EngineError) -> DynamoError {
    let kind = match e {
        EngineError::ContextFull { .. }
        | EngineError::EmptyPrompt
        | EngineError::Setting { .. }
        | EngineError::Sampling(_)
        | EngineError::NoAdapter { .. } => BackendError::InvalidArgument,
        _ => BackendError::Unknown,
    };
    error(kind, e)
}

fn of_submit(e: &SubmitError) -> DynamoError {
    match e {
        SubmitError::Closed => error(BackendError::EngineShutdown, e),
        SubmitError::Request(e) => of_engine(e),
        SubmitError::QueueFull { .. } => error(BackendError::Unknown, e),
    }
}

/// What Dynamo's router and planner are told.
fn registration(engine: &Engine, settings: &SchedulerSettings) -> LlmRegistration {
    let engine = engine.settings();
    let blocks = engine.context.div_ceil(PAGE_TOKENS) * engine.sessions;
    LlmRegistration {
        context_length: u32::try_from(engine.context).ok(),
        kv_cache_block_size: u32::try_from(PAGE_TOKENS).ok(),
        total_kv_blocks: u64::try_from(blocks).ok(),
        max_num_seqs: u64::try_from(settings.max_running).ok(),
        max_num_batched_tokens: u64::try_from(engine.chunk_size).ok(),
        ..LlmRegistration::default()
    }
}

#[async_trait]
impl LLMEngine for KtxBackend {
    async fn start(&self, _worker_id: u64) -> Result<EngineConfig, DynamoError> {
        let State::New(settings) = self.replace(State::Over) else {
            return Err(error(
                BackendError::Unknown,
                "the worker was started before",
            ));
        };
        let WorkerSettings {
            engine,
            model_name,
            scheduler: limits,
        } = *settings;
        let load = move || {
            let engine = engine.sequences(limits.max_running).load()?;
            let llm = registration(&engine, &limits);
            Ok((Scheduler::start(engine, limits)?, llm))
        };
        let loaded = tokio::task::spawn_blocking(load).await;
        let (scheduler, llm) = loaded
            .map_err(|e| error(BackendError::Unknown, e))?
            .map_err(|e: EngineError| of_engine(&e))?;
        self.replace(State::Running(scheduler));
        Ok(EngineConfig {
            model: model_name,
            llm: Some(llm),
            ..EngineConfig::default()
        })
    }

    async fn generate(
        &self,
        request: PreprocessedRequest,
        ctx: GenerateContext,
    ) -> Result<BoxStream<'static, Result<LLMEngineOutput, DynamoError>>, DynamoError> {
        let Some(scheduler) = self.scheduler() else {
            return Err(error(
                BackendError::EngineShutdown,
                "the worker does not run",
            ));
        };
        let Translated { request, ends } = translate(&request, scheduler.engine(), ctx.id())?;
        let prompt_tokens = request.prompt.len();
        let (sender, events) = unbounded_channel();
        scheduler
            .submit(request, Sink(sender))
            .map_err(|e| of_submit(&e))?;
        let answer = Answer {
            events,
            engine: scheduler.engine().clone(),
            ctx,
            ends,
            prompt_tokens,
            cached_tokens: 0,
            generated: 0,
            is_over: false,
        };
        Ok(Box::pin(futures::stream::unfold(answer, Answer::next)))
    }

    async fn cleanup(&self) -> Result<(), DynamoError> {
        if let State::Running(scheduler) = self.replace(State::Over) {
            scheduler.close();
            while scheduler.is_alive() {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        }
        Ok(())
    }
}

/// Where the scheduler puts events. It gives a request up whose stream was dropped.
struct Sink(UnboundedSender<Event>);

impl TokenSink for Sink {
    fn send(&mut self, event: Event) -> bool {
        self.0.send(event).is_ok()
    }

    fn is_closed(&self) -> bool {
        self.0.is_closed()
    }
}

/// Tokens that end an answer besides the model's own.
#[derive(Debug, Default)]
pub(crate) struct Ends {
    /// Those that the client sees.
    pub(crate) visible: HashSet<u32>,
    pub(crate) hidden: HashSet<u32>,
}

/// An answer on its way.
struct Answer {
    events: UnboundedReceiver<Event>,
    engine: Engine,
    ctx: GenerateContext,
    ends: Ends,
    prompt_tokens: usize,
    cached_tokens: usize,
    generated: usize,
    is_over: bool,
}

type Item = Result<LLMEngineOutput, DynamoError>;

impl Answer {
    /// The next piece; none behind the last one.
    async fn next(mut self) -> Option<(Item, Self)> {
        while !self.is_over {
            // Cancellation first: it ends the answer even if tokens are there.
            let event = tokio::select! {
                biased;
                () = self.ctx.stopped() => None,
                () = self.ctx.killed() => None,
                event = self.events.recv() => Some(event),
            };
            let item = match event {
                None => self.end(LLMEngineOutput::cancelled()),
                Some(None) => {
                    self.is_over = true;
                    Err(error(BackendError::EngineShutdown, "the scheduler stopped"))
                }
                Some(Some(Event::Started { cached_tokens })) => {
                    self.cached_tokens = cached_tokens;
                    continue;
                }
                Some(Some(Event::Token(token))) => self.token(token),
                Some(Some(Event::Finished(end))) => self.end(match end.reason {
                    FinishReason::Stop => LLMEngineOutput::stop(),
                    FinishReason::Length | FinishReason::Context => LLMEngineOutput::length(),
                    FinishReason::Cancelled => LLMEngineOutput::cancelled(),
                }),
                Some(Some(Event::Failed(e))) => {
                    self.is_over = true;
                    Err(of_engine(&e))
                }
            };
            return Some((item, self));
        }
        None
    }

    fn token(&mut self, event: TokenEvent) -> Item {
        let id = event.token.0;
        if self.ends.hidden.contains(&id) {
            return self.end(LLMEngineOutput::stop());
        }
        self.generated += 1;
        let mut output = match self.ends.visible.contains(&id) {
            true => self.end(LLMEngineOutput::stop().with_tokens(vec![id]))?,
            false => chunk::token(id),
        };
        if let Some(of) = event.log_probabilities {
            output.log_probs = Some(vec![f64::from(of.chosen)]);
            let top = of.top.iter().zip(1..);
            let top = top.map(|((token, value), rank)| self.top(*token, *value, rank));
            output.top_logprobs = Some(vec![top.collect()]);
        }
        Ok(output)
    }

    fn top(&self, token: TokenId, logprob: f32, rank: u32) -> TopLogprob {
        let bytes = self.engine.tokenizer().token_bytes(token).to_vec();
        TopLogprob {
            rank,
            token_id: token.0,
            token: Some(String::from_utf8_lossy(&bytes).into_owned()),
            logprob: f64::from(logprob),
            bytes: Some(bytes),
        }
    }

    /// The last piece, with the counts. What the scheduler still works on is given up.
    fn end(&mut self, output: LLMEngineOutput) -> Item {
        self.is_over = true;
        self.events.close();
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let usage = CompletionUsage {
            prompt_tokens_details: Some(PromptTokensDetails {
                cached_tokens: Some(count(self.cached_tokens)),
                ..PromptTokensDetails::default()
            }),
            ..usage(count(self.prompt_tokens), count(self.generated))
        };
        Ok(output.with_usage(usage))
    }
}
