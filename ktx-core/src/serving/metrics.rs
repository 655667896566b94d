//! What a scheduler counts.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::spill::Tier;
use super::{SpillCounts, Usage};
use crate::session::FinishReason;

/// Upper bounds of the buckets of times, in seconds.
const TIMES: [f64; 20] = [
    0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0,
    20.0, 40.0, 80.0, 160.0,
];

/// A distribution: how many values are at most each bound.
#[derive(Debug, Clone, PartialEq)]
pub struct Histogram {
    counts: [u64; TIMES.len()],
    count: u64,
    sum: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: [0; TIMES.len()],
            count: 0,
            sum: 0.0,
        }
    }
}

impl Histogram {
    fn add(&mut self, time: Duration) {
        let seconds = time.as_secs_f64();
        if let Some(bucket) = TIMES.iter().position(|bound| seconds <= *bound) {
            self.counts[bucket] += 1;
        }
        self.count += 1;
        self.sum += seconds;
    }

    /// Upper bounds, and how many values are at most that large.
    pub fn buckets(&self) -> impl Iterator<Item = (f64, u64)> {
        let mut total = 0;
        TIMES.iter().zip(self.counts).map(move |(bound, count)| {
            total += count;
            (*bound, total)
        })
    }

    /// Number of values.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Their sum, in seconds.
    pub fn sum(&self) -> f64 {
        self.sum
    }
}

/// Counts and times since the start, and how many there are now.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MetricsSnapshot {
    /// Requests that wait.
    pub waiting: usize,
    /// Requests that are worked on.
    pub running: usize,
    /// Cache pages in all.
    pub pages: usize,
    /// Cache pages that requests use.
    pub used_pages: usize,
    /// Cache pages that nobody uses and that hold prefixes.
    pub cached_pages: usize,
    /// Steps.
    pub steps: u64,
    /// Prompt tokens of all requests that were begun.
    pub prompt_tokens: u64,
    /// Those of them that were there already, in the cache or where it spills.
    pub cached_tokens: u64,
    /// What the cache had no place for.
    pub spill: SpillCounts,
    /// Tokens that were generated.
    pub generated_tokens: u64,
    /// Requests that gave their pages up and were begun again.
    pub preemptions: u64,
    /// Requests that the model or a stop text ended.
    pub stopped: u64,
    /// Requests that reached their length or the context's.
    pub full_length: u64,
    /// Requests that were given up.
    pub cancelled: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Time in the queue.
    pub queue_time: Histogram,
    /// Time from the request to its first token.
    pub first_token_time: Histogram,
    /// Time from one token to the next.
    pub next_token_time: Histogram,
    /// Time from the request to its end.
    pub request_time: Histogram,
}

/// What a scheduler and its callers count together.
#[derive(Debug, Default)]
pub struct Metrics(Mutex<MetricsSnapshot>);

impl Metrics {
    fn lock(&self) -> MutexGuard<'_, MetricsSnapshot> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All of it.
    pub fn snapshot(&self) -> MetricsSnapshot {
        self.lock().clone()
    }

    /// Counts a request that waits from now on, unless too many do.
    pub(super) fn enqueue(&self, limit: usize) -> bool {
        let mut counts = self.lock();
        let fits = counts.waiting < limit;
        counts.waiting += usize::from(fits);
        fits
    }

    pub(super) fn dequeue(&self) {
        self.lock().waiting -= 1;
    }

    pub(super) fn is_idle(&self) -> bool {
        let counts = self.lock();
        counts.waiting + counts.running == 0
    }

    pub(super) fn with(&self, body: impl FnOnce(&mut MetricsSnapshot)) {
        body(&mut self.lock());
    }

    pub(super) fn first_token(&self, since_request: Duration) {
        let mut counts = self.lock();
        counts.first_token_time.add(since_request);
        counts.generated_tokens += 1;
    }

    pub(super) fn next_token(&self, since_last: Duration) {
        let mut counts = self.lock();
        counts.next_token_time.add(since_last);
        counts.generated_tokens += 1;
    }

    pub(super) fn begun(&self, usage: &Usage) {
        let mut counts = self.lock();
        counts.queue_time.add(usage.queue_time);
        counts.prompt_tokens += usage.prompt_tokens as u64;
        counts.cached_tokens += usage.cached_tokens as u64;
    }

    /// Counts tokens that were brought back from where the cache spills.
    pub(super) fn returned(&self, tier: Tier, tokens: usize) {
        let counts = &mut self.lock().spill;
        match tier {
            Tier::Memory => counts.memory_tokens += tokens as u64,
            Tier::Directory => counts.directory_tokens += tokens as u64,
        }
    }

    /// Counts the end of a request; none if it failed.
    pub(super) fn ended(&self, reason: Option<FinishReason>, time: Duration) {
        let mut counts = self.lock();
        counts.request_time.add(time);
        match reason {
            Some(FinishReason::Stop) => counts.stopped += 1,
            Some(FinishReason::Length | FinishReason::Context) => counts.full_length += 1,
            Some(FinishReason::Cancelled) => counts.cancelled += 1,
            None => counts.failed += 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_add_up() {
        let mut histogram = Histogram::default();
        for millis in [1, 30, 30, 500_000] {
            histogram.add(Duration::from_millis(millis));
        }
        let buckets: Vec<(f64, u64)> = histogram.buckets().collect();
        assert_eq!(buckets[0], (0.001, 1));
        assert_eq!(buckets[5], (0.04, 3));
        assert_eq!(buckets.last(), Some(&(160.0, 3)));
        assert_eq!(histogram.count(), 4);
        assert!((histogram.sum() - 500.061).abs() < 1e-9);
    }
}
