//! A request that waits or is worked on.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ktx_kernels::kv::{PAGE_TOKENS, PageId};
use ktx_ops::lora::ActiveAdapter;

use super::prefix::{Insertion, NodeId, PrefixCache};
use super::spill::{Fetched, PageKey, Spill};
use super::{
    Batching, EndTokens, Event, Finished, Metrics, Request, StopStrings, TokenConstraint,
    TokenEvent, TokenSink, Usage,
};
use crate::engine::{Engine, Runtime, pages_for};
use crate::error::EngineError;
use crate::sampling::{LogProbabilities, Sampler, TokenSet};
use crate::session::FinishReason;
use crate::tokenizer::{StreamDecoder, TokenId, Tokenizer};

/// A request with its tokens and its pages.
pub(super) struct Sequence {
    /// The prompt and what was generated; the last one is not in the cache yet.
    pub(super) tokens: Vec<TokenId>,
    /// How many tokens are in the cache.
    pub(super) computed: usize,
    /// Pages of the cache. The first ones, as many as `path` has nodes, belong to the prefix cache.
    pub(super) pages: Vec<PageId>,
    path: Vec<NodeId>,
    /// The pages that come next and are kept outside of the cache.
    returning: Returning,
    prompt_length: usize,
    batching: Batching,
    pub(super) adapters: Arc<[ActiveAdapter]>,
    sampler: Sampler,
    constraint: Option<Box<dyn TokenConstraint>>,
    allowed: Option<TokenSet>,
    log_probabilities: Option<usize>,
    decoder: StreamDecoder,
    stops: StopStrings,
    end_tokens: EndTokens,
    max_new_tokens: usize,
    sink: Box<dyn TokenSink>,
    wanted: bool,
    /// Why its answer ended, once it did.
    pub(super) ended: Option<FinishReason>,
    usage: Usage,
    arrived: Instant,
    started: Option<Instant>,
    told_start: bool,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

/// Pages that are brought back, in their order, and the ticket under which they are asked for.
#[derive(Default)]
pub(super) struct Returning {
    keys: VecDeque<PageKey>,
    ticket: u64,
}

/// What became of the next page that a sequence wants back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Returned {
    /// It is there.
    Page,
    /// It is being read.
    Waits,
    /// There is none: the rest is computed.
    Nothing,
}

/// A token that was chosen for a sequence.
pub(super) struct Chosen {
    token: Option<TokenId>,
    log_probabilities: Option<LogProbabilities>,
}

impl Sequence {
    /// Checks what was asked for.
    pub(super) fn new(
        request: Request,
        sink: Box<dyn TokenSink>,
        engine: &Engine,
        batching: Batching,
    ) -> Result<Self, EngineError> {
        let (context, vocabulary) = (engine.settings().context, engine.tokenizer().vocab_size());
        if request.prompt.is_empty() {
            return Err(EngineError::EmptyPrompt);
        }
        if request.prompt.len() > context {
            return Err(EngineError::ContextFull {
                prompt: request.prompt.len(),
                cached: 0,
                context,
            });
        }
        if let Some(unknown) = request.prompt.iter().find(|t| t.0 as usize >= vocabulary) {
            return Err(EngineError::Setting {
                name: "a token of the prompt",
                value: unknown.0 as usize,
                range: "the vocabulary has no such token",
            });
        }
        let adapters = match &request.adapters {
            Some(wanted) => engine.inner().adapters()?.chosen(wanted)?,
            None => Arc::clone(&engine.inner().default_adapters),
        };
        Ok(Self {
            prompt_length: request.prompt.len(),
            batching,
            usage: Usage {
                prompt_tokens: request.prompt.len(),
                ..Usage::default()
            },
            tokens: request.prompt,
            computed: 0,
            pages: Vec::new(),
            path: Vec::new(),
            returning: Returning::default(),
            adapters,
            sampler: Sampler::new(request.sampling)?,
            allowed: request
                .constraint
                .is_some()
                .then(|| TokenSet::new(vocabulary)),
            constraint: request.constraint,
            log_probabilities: request.log_probabilities,
            decoder: request.decoder,
            stops: StopStrings::new(request.stop),
            end_tokens: request.end_tokens,
            max_new_tokens: request.max_new_tokens,
            sink,
            wanted: true,
            ended: None,
            arrived: Instant::now(),
            started: None,
            told_start: false,
            first_token: None,
            last_token: None,
        })
    }

    /// Tokens that can be computed at once and in one way.
    pub(super) fn remaining(&self) -> usize {
        match self.batching {
            Batching::Exact if self.computed < self.prompt_length => {
                self.prompt_length - self.computed
            }
            _ => self.tokens.len() - self.computed,
        }
    }

    /// Whether a token can be chosen once this many more are computed.
    pub(super) fn is_complete_with(&self, tokens: usize) -> bool {
        self.computed + tokens == self.tokens.len()
    }

    /// Whether it generates. One that lost its pages computes what it generated again, in the way in
    /// which it was computed.
    pub(super) fn is_generating(&self) -> bool {
        match self.batching {
            Batching::Exact => self.computed >= self.prompt_length,
            Batching::Fastest => self.tokens.len() > self.prompt_length && self.remaining() == 1,
        }
    }

    /// Whether nobody wants its answer any more.
    pub(super) fn is_abandoned(&self) -> bool {
        !self.wanted || self.sink.is_closed()
    }

    /// Whether no token is wanted at all.
    pub(super) fn wants_nothing(&self) -> bool {
        self.max_new_tokens == 0
    }

    /// The tokens whose pages can be another's: what was generated is not the same as what is read.
    pub(super) fn shareable(&self) -> &[TokenId] {
        match self.batching {
            Batching::Exact => &self.tokens[..self.prompt_length],
            Batching::Fastest => &self.tokens,
        }
    }

    /// Full pages at its beginning that it has in common with another, as far as they could be shared.
    pub(super) fn common_pages(&self, other: &Self) -> usize {
        let longest = other.tokens.len().saturating_sub(1);
        let same = self.tokens.iter().zip(&other.tokens[..longest]);
        same.take_while(|(a, b)| a == b).count() / PAGE_TOKENS
    }

    /// Takes its turn: pages of the prefix cache, and those that the rest of its tokens needs.
    pub(super) fn begin(&mut self, shared: Vec<(NodeId, PageId)>, own: Vec<PageId>) {
        for (node, page) in shared {
            self.path.push(node);
            self.pages.push(page);
        }
        self.computed = self.path.len() * PAGE_TOKENS;
        self.pages.extend(own);
        if self.started.is_none() {
            self.started = Some(Instant::now());
            self.usage.queue_time = self.arrived.elapsed();
        }
    }

    /// Looks for the pages behind those of the prefix cache where that spills.
    pub(super) fn seek(&mut self, prefix: &PrefixCache, spill: &mut Spill) {
        let reusable = self
            .shareable()
            .split_last()
            .map_or(&[][..], |(_, rest)| rest);
        let reusable = reusable.get(self.computed..).unwrap_or_default();
        let mut key = prefix.key(&self.adapters, self.path.last().copied());
        let keys = reusable.chunks_exact(PAGE_TOKENS).map_while(|block| {
            key = key.next(block);
            spill.has(key).then_some(key)
        });
        self.returning.keys = keys.collect();
        if !self.returning.keys.is_empty() {
            self.returning.ticket = spill.new_ticket();
        }
    }

    /// Whether pages that it wants are still to come.
    pub(super) fn is_returning(&self) -> bool {
        !self.returning.keys.is_empty()
    }

    /// Brings the next page back, if it can be had now.
    pub(super) fn bring_back(
        &mut self,
        spill: &mut Spill,
        prefix: &mut PrefixCache,
        runtime: &mut Runtime,
        metrics: &Metrics,
    ) -> Returned {
        let Returning { keys, ticket } = &mut self.returning;
        spill.prefetch(*ticket, keys.iter());
        let Some(key) = keys.front() else {
            return Returned::Nothing;
        };
        let written = match spill.fetch(*ticket, *key) {
            Fetched::Later => return Returned::Waits,
            Fetched::Missing => None,
            Fetched::Page(bytes, tier) => {
                let page = self.pages[self.path.len()];
                let written = runtime.write_page(page, &bytes);
                written.inspect_err(note_unwritten).ok().map(|()| tier)
            }
        };
        let Some(tier) = written else {
            self.stop_returning(Some(spill));
            return Returned::Nothing;
        };
        keys.pop_front();
        metrics.returned(tier, PAGE_TOKENS);
        if !self.is_returning() {
            self.stop_returning(Some(spill));
        }
        self.advance(PAGE_TOKENS, Some(prefix), runtime);
        Returned::Page
    }

    fn stop_returning(&mut self, spill: Option<&mut Spill>) {
        let Returning { ticket, .. } = std::mem::take(&mut self.returning);
        if let Some(spill) = spill {
            spill.forget(ticket);
        }
    }

    /// Tells, once, that it has begun and how many of its tokens were there.
    pub(super) fn tell_start(&mut self, metrics: &Metrics) {
        if !std::mem::replace(&mut self.told_start, true) {
            let cached_tokens = self.computed;
            self.usage.cached_tokens = cached_tokens;
            metrics.begun(&self.usage);
            self.wanted = self.sink.send(Event::Started { cached_tokens });
        }
    }

    /// Pages that it lacks for its next `tokens` tokens.
    pub(super) fn missing_pages(&self, tokens: usize) -> usize {
        pages_for(self.computed + tokens).saturating_sub(self.pages.len())
    }

    /// Notes that its next `tokens` tokens are in the cache, and shares the pages that became full.
    pub(super) fn advance(
        &mut self,
        tokens: usize,
        prefix: Option<&mut PrefixCache>,
        runtime: &mut Runtime,
    ) {
        self.computed += tokens;
        let Some(prefix) = prefix else { return };
        let shareable = self.computed.min(self.shareable().len());
        while (self.path.len() + 1) * PAGE_TOKENS <= shareable {
            let at = self.path.len();
            let block = &self.tokens[at * PAGE_TOKENS..(at + 1) * PAGE_TOKENS];
            let parent = self.path.last().copied();
            match prefix.insert(&self.adapters, parent, block, self.pages[at]) {
                Insertion::New(node) => self.path.push(node),
                Insertion::Known(node, page) => {
                    self.path.push(node);
                    runtime.give_pages([std::mem::replace(&mut self.pages[at], page)]);
                }
            }
        }
    }

    /// Gives all pages back; what is in the cache is forgotten.
    pub(super) fn release(
        &mut self,
        prefix: &mut PrefixCache,
        spill: Option<&mut Spill>,
        runtime: &mut Runtime,
    ) {
        self.stop_returning(spill);
        let own = self.pages.split_off(self.path.len().min(self.pages.len()));
        runtime.give_pages(own);
        prefix.release(&self.path);
        self.path.clear();
        self.pages.clear();
        self.computed = 0;
    }

    /// Chooses the next token from the logits `[vocab]` behind the last one.
    pub(super) fn choose(&mut self, logits: &mut [f32]) -> Chosen {
        if let (Some(constraint), Some(allowed)) = (&mut self.constraint, &mut self.allowed) {
            allowed.clear();
            constraint.allow(allowed);
            if allowed.is_empty() {
                return Chosen {
                    token: None,
                    log_probabilities: None,
                };
            }
        }
        let raw = self.log_probabilities.map(|_| logits.to_vec());
        let token = self.sampler.choose(
            logits,
            &self.tokens,
            &self.tokens[self.prompt_length..],
            self.allowed.as_ref(),
        );
        if let Some(constraint) = &mut self.constraint {
            constraint.accept(token);
        }
        let top = self.log_probabilities.unwrap_or(0);
        Chosen {
            token: Some(token),
            log_probabilities: raw.map(|raw| LogProbabilities::of(&raw, token, top)),
        }
    }

    /// Adds a chosen token and gives it out; notes whether the answer ends with it.
    pub(super) fn push(
        &mut self,
        chosen: Chosen,
        tokenizer: &Tokenizer,
        context: usize,
        metrics: &Metrics,
    ) {
        let Some(token) = chosen.token else {
            return self.finish(FinishReason::Stop, None);
        };
        self.count(metrics);
        if self.end_tokens == EndTokens::Stop && tokenizer.is_end_of_generation(token) {
            return self.finish(FinishReason::Stop, None);
        }
        self.tokens.push(token);
        let text = self.decoder.push(tokenizer, token);
        let (text, stop) = self.stops.push(&text);
        self.wanted = self.sink.send(Event::Token(TokenEvent {
            token,
            text,
            log_probabilities: chosen.log_probabilities,
        }));
        let reason = if stop.is_some() {
            FinishReason::Stop
        } else if self.usage.generated_tokens >= self.max_new_tokens {
            FinishReason::Length
        } else if self.tokens.len() > context {
            FinishReason::Context
        } else {
            return;
        };
        self.finish(reason, stop);
    }

    fn count(&mut self, metrics: &Metrics) {
        let now = Instant::now();
        self.usage.generated_tokens += 1;
        match self.last_token.replace(now) {
            None => {
                self.first_token = Some(now);
                metrics.first_token(now - self.arrived);
                self.usage.prompt_time = now - self.started.unwrap_or(now);
            }
            Some(last) => {
                metrics.next_token(now - last);
                self.usage.generate_time = now - self.first_token.unwrap_or(now);
            }
        }
    }

    /// Tells the end.
    pub(super) fn finish(&mut self, reason: FinishReason, stop: Option<String>) {
        self.ended = Some(reason);
        let mut text = String::new();
        if stop.is_none() {
            let (rest, _) = self.stops.push(&self.decoder.finish());
            text = rest + &self.stops.finish();
        }
        self.sink.send(Event::Finished(Finished {
            reason,
            text,
            stop,
            usage: self.usage,
        }));
    }

    /// Tells that a step failed.
    pub(super) fn fail(&mut self, error: &Arc<EngineError>) {
        self.sink.send(Event::Failed(Arc::clone(error)));
    }

    /// Time since it was asked for.
    pub(super) fn age(&self) -> Duration {
        self.arrived.elapsed()
    }
}

fn note_unwritten(error: &EngineError) {
    tracing::warn!("a cache page was not brought back: {error}");
}
