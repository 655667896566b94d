//! The scheduler's thread: who has a turn, what a step computes, who gives pages up.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ktx_kernels::linear::ProductOrder;
use ktx_ops::{Batch, Phase};

use super::prefix::PrefixCache;
use super::sequence::{Chosen, Returned, Sequence};
use super::spill::Spill;
use super::{Batching, Metrics, PrefixSharing, SchedulerSettings, pages};
use crate::engine::{Inner, Runtime};
use crate::error::EngineError;
use crate::session::FinishReason;

/// How long requests that wait for pages of sessions wait before they look again.
const LOOK_AGAIN: Duration = Duration::from_millis(5);
/// Pages that are brought back into the cache in a turn at most, so that running streams do not wait.
const PAGES_BACK: usize = 8;

pub(super) struct Worker {
    engine: Arc<Inner>,
    settings: SchedulerSettings,
    inbox: Receiver<Sequence>,
    metrics: Arc<Metrics>,
    waiting: VecDeque<Sequence>,
    /// In the order in which their turns came.
    running: Vec<Sequence>,
    prefix: PrefixCache,
    spill: Option<Spill>,
    /// Whether prompts and generated tokens share a call.
    shared_steps: bool,
    /// Rows of a step at most.
    rows: usize,
    batch: Batch,
    /// Logits of a step's outputs; kept for their memory.
    logits: Vec<Vec<f32>>,
}

/// Some tokens of a running sequence that a step computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Part {
    index: usize,
    tokens: usize,
}

/// What a turn computes.
#[derive(Debug, Default)]
struct Turn {
    generate: Vec<Part>,
    prefill: Vec<Part>,
}

impl Turn {
    fn is_empty(&self) -> bool {
        self.generate.is_empty() && self.prefill.is_empty()
    }
}

impl Worker {
    pub(super) fn new(
        engine: Arc<Inner>,
        settings: SchedulerSettings,
        inbox: Receiver<Sequence>,
        metrics: Arc<Metrics>,
    ) -> Result<Self, EngineError> {
        let runtime = engine.runtime()?;
        let shared_steps = settings.batching == Batching::Fastest && runtime.phases_are_one();
        metrics.with(|m| m.pages = runtime.pages());
        drop(runtime);
        let spill = match settings.prefix_cache {
            PrefixSharing::On => Spill::open(&settings.spill, &engine, settings.batching)?,
            PrefixSharing::Off => None,
        };
        Ok(Self {
            spill,
            rows: engine.settings.chunk_size.min(engine.settings.context),
            engine,
            settings,
            inbox,
            metrics,
            waiting: VecDeque::new(),
            running: Vec::new(),
            prefix: PrefixCache::default(),
            shared_steps,
            batch: Batch::default(),
            logits: Vec::new(),
        })
    }

    /// Works until nobody can ask for anything any more.
    pub(super) fn run(mut self) {
        while self.receive() {
            let engine = Arc::clone(&self.engine);
            match engine.runtime() {
                Ok(mut runtime) => self.turn(&mut runtime),
                Err(error) => return self.fail_all(error),
            }
        }
        self.save();
    }

    /// Keeps what the cache holds for the next process.
    fn save(&mut self) {
        let Some(mut spill) = self.spill.take_if(|spill| spill.is_lasting()) else {
            return;
        };
        if let Ok(mut runtime) = self.engine.runtime() {
            while let Some(page) = pages::evict(&mut runtime, &mut self.prefix, Some(&mut spill)) {
                runtime.give_pages([page]);
            }
        }
        spill.save();
    }

    /// Takes new requests; waits for one if there is nothing to do. Says whether to go on.
    fn receive(&mut self) -> bool {
        if self.running.is_empty() {
            let first = match self.waiting.is_empty() {
                true => self.inbox.recv().ok(),
                false => match self.inbox.recv_timeout(LOOK_AGAIN) {
                    Ok(request) => Some(request),
                    Err(RecvTimeoutError::Timeout) => return true,
                    Err(RecvTimeoutError::Disconnected) => {
                        std::thread::sleep(LOOK_AGAIN);
                        return true;
                    }
                },
            };
            let Some(first) = first else { return false };
            self.waiting.push_back(first);
        }
        loop {
            match self.inbox.try_recv() {
                Ok(request) => self.waiting.push_back(request),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return true,
            }
        }
    }

    fn turn(&mut self, runtime: &mut Runtime) {
        self.forget_abandoned(runtime);
        self.admit(runtime);
        let brought_back = self.bring_back(runtime);
        let turn = self.compose(runtime);
        self.note_state(runtime);
        if turn.is_empty() {
            if brought_back == 0 {
                self.wait_for_pages();
            }
            return;
        }
        match self.shared_steps {
            true => {
                let phase = match turn.prefill.is_empty() {
                    true => Phase::Generate,
                    false => Phase::Prefill,
                };
                self.step(runtime, phase, [turn.generate, turn.prefill].concat());
            }
            false => {
                self.step(runtime, Phase::Generate, turn.generate);
                self.step(runtime, Phase::Prefill, turn.prefill);
            }
        }
        self.remove_ended(runtime);
        self.note_state(runtime);
    }

    /// Gives up requests that nobody waits for.
    fn forget_abandoned(&mut self, runtime: &mut Runtime) {
        let metrics = &self.metrics;
        self.waiting.retain(|sequence| {
            let abandoned = sequence.is_abandoned();
            if abandoned {
                metrics.dequeue();
                metrics.ended(Some(FinishReason::Cancelled), sequence.age());
            }
            !abandoned
        });
        let (prefix, spill) = (&mut self.prefix, &mut self.spill);
        self.running.retain_mut(|sequence| {
            let abandoned = sequence.is_abandoned();
            if abandoned {
                sequence.release(prefix, spill.as_mut(), runtime);
                metrics.ended(Some(FinishReason::Cancelled), sequence.age());
            }
            !abandoned
        });
    }

    /// Gives turns to waiting requests, the oldest first, as long as there are pages for their prompts
    /// and one more for each that runs. A request whose beginning another one is just reading waits
    /// for it.
    fn admit(&mut self, runtime: &mut Runtime) {
        let mut next = 0;
        while next < self.waiting.len() && self.running.len() < self.settings.max_running {
            let sequence = &mut self.waiting[next];
            if sequence.wants_nothing() {
                sequence.finish(FinishReason::Length, None);
                self.metrics.dequeue();
                self.metrics
                    .ended(Some(FinishReason::Length), sequence.age());
                self.waiting.remove(next);
                continue;
            }
            if self.shares_with_a_reader(next) {
                next += 1;
                continue;
            }
            let sequence = &self.waiting[next];
            let shared = match self.settings.prefix_cache {
                PrefixSharing::On => self
                    .prefix
                    .acquire(&sequence.adapters, sequence.shareable()),
                PrefixSharing::Off => Vec::new(),
            };
            let missing = sequence.missing_pages(sequence.tokens.len()) - shared.len();
            let spare = self.running.len();
            let fits = pages::available(runtime, &self.prefix) >= missing + spare;
            let spill = self.spill.as_mut();
            let own = fits.then(|| pages::take(runtime, &mut self.prefix, spill, missing));
            let Some(own) = own.flatten() else {
                let path: Vec<_> = shared.into_iter().map(|(node, _)| node).collect();
                self.prefix.release(&path);
                return;
            };
            let Some(mut sequence) = self.waiting.remove(next) else {
                return;
            };
            self.metrics.with(|m| {
                m.waiting -= 1;
                m.running += 1;
            });
            sequence.begin(shared, own);
            if let Some(spill) = &mut self.spill {
                sequence.seek(&self.prefix, spill);
            }
            if !sequence.is_returning() {
                sequence.tell_start(&self.metrics);
            }
            self.running.push(sequence);
        }
    }

    /// Brings pages back into the cache that running requests begin with, the oldest request's first.
    /// Says how many.
    fn bring_back(&mut self, runtime: &mut Runtime) -> usize {
        let Some(spill) = &mut self.spill else {
            return 0;
        };
        spill.collect();
        let mut left = PAGES_BACK;
        for sequence in self.running.iter_mut().filter(|s| s.is_returning()) {
            let mut returned = Returned::Page;
            while left > 0 && returned == Returned::Page && sequence.is_returning() {
                returned = sequence.bring_back(spill, &mut self.prefix, runtime, &self.metrics);
                left -= usize::from(returned == Returned::Page);
            }
            if !sequence.is_returning() {
                sequence.tell_start(&self.metrics);
            }
        }
        self.metrics.with(|m| spill.count(&mut m.spill));
        PAGES_BACK - left
    }

    /// Nothing can be computed: those that run wait for pages.
    fn wait_for_pages(&mut self) {
        if let Some(spill) = self.spill.as_mut().filter(|_| !self.running.is_empty()) {
            spill.wait(LOOK_AGAIN);
        }
    }

    /// Whether a running request reads more of this waiting one's beginning than the cache has.
    fn shares_with_a_reader(&self, waiting: usize) -> bool {
        if self.settings.prefix_cache == PrefixSharing::Off {
            return false;
        }
        let wanted = &self.waiting[waiting];
        let mut readers = self
            .running
            .iter()
            .filter(|s| !s.is_generating() && s.adapters == wanted.adapters)
            .peekable();
        if readers.peek().is_none() {
            return false;
        }
        let matched = self.prefix.matched(&wanted.adapters, wanted.shareable());
        readers.any(|reader| reader.common_pages(wanted) > matched)
    }

    /// One row for every stream that generates, and parts of prompts in the rows that are left.
    fn compose(&mut self, runtime: &mut Runtime) -> Turn {
        let mut turn = Turn::default();
        let mut index = 0;
        while index < self.running.len() {
            if self.running[index].is_generating() && self.reserve(runtime, index) {
                turn.generate.push(Part { index, tokens: 1 });
            }
            index += 1;
        }
        // Those that gave their pages up stood at the end.
        turn.generate.retain(|part| part.index < self.running.len());
        let reading: Vec<(usize, usize)> = self
            .running
            .iter()
            .enumerate()
            .filter(|(_, s)| !s.is_generating() && !s.is_returning())
            .map(|(index, s)| (index, s.remaining()))
            .collect();
        let streams = turn.generate.len();
        let mut budget = budget(self.rows, self.settings.mixed_rows, streams, reading.len());
        // Those that lost their pages have more to compute than their last token.
        for part in &mut turn.generate {
            let more = (self.running[part.index].remaining() - 1).min(budget);
            part.tokens += more;
            budget -= more;
        }
        turn.prefill = shares(&reading, budget);
        turn
    }

    /// Sees that a stream has a page for its next token. If there is none, the youngest gives its own
    /// up and begins again later. Says whether this one still runs.
    fn reserve(&mut self, runtime: &mut Runtime, index: usize) -> bool {
        loop {
            let missing = self.running[index].missing_pages(1);
            let spill = self.spill.as_mut();
            if let Some(pages) = pages::take(runtime, &mut self.prefix, spill, missing) {
                self.running[index].pages.extend(pages);
                return true;
            }
            let Some(mut youngest) = self.running.pop() else {
                return false;
            };
            youngest.release(&mut self.prefix, self.spill.as_mut(), runtime);
            self.waiting.push_front(youngest);
            self.metrics.with(|m| {
                m.preemptions += 1;
                m.waiting += 1;
            });
            if index >= self.running.len() {
                return false;
            }
        }
    }

    /// One forward call, and the tokens that come of it.
    fn step(&mut self, runtime: &mut Runtime, phase: Phase, parts: Vec<Part>) {
        if parts.is_empty() {
            return;
        }
        self.batch.clear();
        let mut choosing = Vec::new();
        for part in &parts {
            let sequence = &self.running[part.index];
            let new = &sequence.tokens[sequence.computed..][..part.tokens];
            let ids = new.iter().map(|t| t.0);
            self.batch.push(ids, sequence.computed, &sequence.pages);
            self.batch.set_adapters(&sequence.adapters);
            if sequence.is_complete_with(part.tokens) {
                self.batch.outputs.push(self.batch.rows() - 1);
                choosing.push(part.index);
            }
        }
        self.logits
            .resize_with(self.logits.len().max(choosing.len()), Vec::new);
        let mut rows = self.logits.iter_mut();
        runtime
            .pool()
            .set_product_order(order(self.settings.batching, phase));
        let result = runtime.step(&self.batch, phase, None, &mut |row| {
            if let Some(logits) = rows.next() {
                logits.clear();
                logits.extend_from_slice(row);
            }
        });
        runtime.pool().set_product_order(ProductOrder::ByTokens);
        if let Err(error) = result {
            return self.fail(runtime, &parts, error);
        }
        self.metrics.with(|m| m.steps += 1);
        for part in &parts {
            let prefix = match self.settings.prefix_cache {
                PrefixSharing::On => Some(&mut self.prefix),
                PrefixSharing::Off => None,
            };
            self.running[part.index].advance(part.tokens, prefix, runtime);
        }
        self.choose(runtime, &choosing);
    }

    /// Chooses tokens for these sequences, on all threads, and gives them out in order.
    fn choose(&mut self, runtime: &Runtime, indices: &[usize]) {
        let chosen: Vec<Mutex<Option<Chosen>>> = indices.iter().map(|_| Mutex::new(None)).collect();
        {
            let mut places: Vec<Option<&mut Sequence>> =
                self.running.iter_mut().map(Some).collect();
            let work: Vec<Mutex<(&mut Sequence, &mut Vec<f32>)>> = indices
                .iter()
                .zip(&mut self.logits)
                .filter_map(|(index, logits)| Some(Mutex::new((places[*index].take()?, logits))))
                .collect();
            runtime.pool().run(work.len(), &|i| {
                let mut pair = work[i].lock().unwrap_or_else(PoisonError::into_inner);
                let (sequence, logits) = &mut *pair;
                let choice = sequence.choose(logits);
                *chosen[i].lock().unwrap_or_else(PoisonError::into_inner) = Some(choice);
            });
        }
        let context = self.engine.settings.context;
        for (index, choice) in indices.iter().zip(chosen) {
            let choice = choice.into_inner().unwrap_or_else(PoisonError::into_inner);
            let Some(choice) = choice else { continue };
            let sequence = &mut self.running[*index];
            sequence.push(choice, &self.engine.tokenizer, context, &self.metrics);
        }
    }

    /// Takes the sequences whose answers ended off the list.
    fn remove_ended(&mut self, runtime: &mut Runtime) {
        let (prefix, spill, metrics) = (&mut self.prefix, &mut self.spill, &self.metrics);
        self.running.retain_mut(|sequence| match sequence.ended {
            None => true,
            Some(reason) => {
                sequence.release(prefix, spill.as_mut(), runtime);
                metrics.ended(Some(reason), sequence.age());
                false
            }
        });
    }

    /// A step failed: the sequences that caused it end, or all of the step's if no cause is known.
    fn fail(&mut self, runtime: &mut Runtime, parts: &[Part], error: EngineError) {
        let gone = match error {
            EngineError::AdapterGone { id } => Some(id),
            _ => None,
        };
        let error = Arc::new(error);
        let mut index = 0;
        let (prefix, spill, metrics) = (&mut self.prefix, &mut self.spill, &self.metrics);
        self.running.retain_mut(|sequence| {
            let in_step = parts.iter().any(|part| part.index == index);
            index += 1;
            let is_cause = gone.is_none_or(|id| sequence.adapters.iter().any(|a| a.id.0 == id));
            if !in_step || !is_cause {
                return true;
            }
            sequence.fail(&error);
            sequence.release(prefix, spill.as_mut(), runtime);
            metrics.ended(None, sequence.age());
            false
        });
    }

    /// The engine works no more.
    fn fail_all(&mut self, error: EngineError) {
        let error = Arc::new(error);
        for sequence in self.running.iter_mut().chain(&mut self.waiting) {
            sequence.fail(&error);
        }
        self.metrics.with(|m| {
            m.failed += (self.running.len() + self.waiting.len()) as u64;
            (m.running, m.waiting) = (0, 0);
        });
    }

    fn note_state(&self, runtime: &Runtime) {
        let (free, unused) = (runtime.free_pages(), self.prefix.unused());
        self.metrics.with(|m| {
            m.running = self.running.len();
            m.pages = runtime.pages();
            m.cached_pages = unused;
            m.used_pages = m.pages.saturating_sub(free + unused);
        });
    }
}

/// The way in which products are taken so that a row's result does not depend on the others.
fn order(batching: Batching, phase: Phase) -> ProductOrder {
    match (batching, phase) {
        (Batching::Fastest, _) => ProductOrder::ByTokens,
        (Batching::Exact, Phase::Generate) => ProductOrder::Rows,
        (Batching::Exact, Phase::Prefill) => ProductOrder::Panels,
    }
}

/// Rows of a step for prompts: all that are left if no stream waits for the step's end, otherwise `mixed_rows` for each
/// prompt that is read. Many who wait for their first token count more than few who wait for their next.
fn budget(rows: usize, mixed_rows: usize, streams: usize, prompts: usize) -> usize {
    let left = rows - streams;
    match streams {
        0 => left,
        _ => left.min(mixed_rows.saturating_mul(prompts.max(1))),
    }
}

/// Divides a step's rows among prompts: half of them to the oldest, so that it is never left behind, the
/// rest to those that are nearest to their end, so that a short prompt does not wait for a long one.
fn shares(reading: &[(usize, usize)], budget: usize) -> Vec<Part> {
    let mut left = budget;
    let mut taken: Vec<Part> = reading
        .iter()
        .map(|(index, _)| Part {
            index: *index,
            tokens: 0,
        })
        .collect();
    if let (Some(first), Some((_, remaining))) = (taken.first_mut(), reading.first()) {
        first.tokens = (*remaining).min(budget.div_ceil(2));
        left -= first.tokens;
    }
    let mut order: Vec<usize> = (0..reading.len()).collect();
    order.sort_by_key(|i| reading[*i].1 - taken[*i].tokens);
    for i in order {
        let more = (reading[i].1 - taken[i].tokens).min(left);
        taken[i].tokens += more;
        left -= more;
    }
    taken.retain(|part| part.tokens > 0);
    taken
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(reading: &[usize], budget: usize) -> Vec<(usize, usize)> {
        let reading: Vec<(usize, usize)> = reading.iter().copied().enumerate().collect();
        shares(&reading, budget)
            .iter()
            .map(|p| (p.index, p.tokens))
            .collect()
    }

    #[test]
    fn one_prompt_beside_streams_gets_few_rows_and_many_prompts_get_more() {
        assert_eq!(budget(512, 128, 0, 1), 512);
        assert_eq!(budget(512, 128, 5, 1), 128);
        assert_eq!(budget(512, 128, 5, 3), 384);
        assert_eq!(budget(512, 128, 5, 30), 507);
        assert_eq!(budget(512, usize::MAX, 512, 0), 0);
    }

    #[test]
    fn one_prompt_gets_all_rows() {
        assert_eq!(tokens(&[1000], 100), [(0, 100)]);
        assert_eq!(tokens(&[10], 100), [(0, 10)]);
        assert_eq!(tokens(&[], 100), []);
    }

    #[test]
    fn a_short_prompt_passes_a_long_one_that_still_moves() {
        assert_eq!(tokens(&[1000, 30], 100), [(0, 70), (1, 30)]);
        assert_eq!(tokens(&[1000, 80, 900], 100), [(0, 50), (1, 50)]);
    }

    #[test]
    fn equal_prompts_are_read_in_their_order() {
        assert_eq!(tokens(&[40, 40, 40, 40], 100), [(0, 40), (1, 40), (2, 20)]);
    }
}
