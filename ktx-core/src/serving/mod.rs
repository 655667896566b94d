//! One engine for many users: requests share steps, cache pages, and the prefixes of their prompts.
//!
//! A [`Scheduler`] runs on a thread of its own. Each of its turns is one forward call (two, where the
//! plan has other operators for prompts than for generation): one row for every stream that generates,
//! and parts of prompts in the rows that are left, the more the more prompts there are. So a long prompt
//! delays running streams by one chunk at most. What a request gets does not depend on what runs beside it ([`Batching::Exact`]): the same
//! seed gives the same tokens.
//!
//! ```no_run
//! use ktx_core::{Engine, serving::{Request, Scheduler, SchedulerSettings, stream}};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let engine = Engine::open("model.gguf")?;
//! let prompt = engine.tokenizer().encode("Once upon a time", &Default::default());
//! let scheduler = Scheduler::start(engine, SchedulerSettings::default())?;
//! let (sink, events) = stream();
//! scheduler.submit(Request::new(prompt), sink)?;
//! for event in events {
//!     println!("{event:?}");
//! }
//! # Ok(())
//! # }
//! ```

mod metrics;
mod pages;
mod prefix;
mod request;
mod sequence;
mod spill;
mod stops;
mod stream;
mod worker;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

pub use metrics::{Histogram, Metrics, MetricsSnapshot};
pub use request::{
    EndTokens, Event, Finished, Request, SubmitError, TokenConstraint, TokenEvent, TokenSink, Usage,
};
pub use spill::{SpillCounts, SpillSettings};
pub use stops::StopStrings;
pub use stream::{EventStream, StreamSink, stream};

use crate::engine::Engine;
use crate::error::EngineError;
use sequence::Sequence;
use worker::Worker;

/// Requests that generate or read their prompts at once, if not set.
const DEFAULT_RUNNING: usize = 32;
/// Requests that wait for their turn, if not set.
const DEFAULT_WAITING: usize = 256;
/// Rows of a step for each prompt beside running streams, if not set: a long prompt is read in smaller parts meanwhile.
const DEFAULT_MIXED_ROWS: usize = 128;

/// Limits of a scheduler.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerSettings {
    /// Requests that are worked on at once; more wait.
    pub max_running: usize,
    /// Requests that wait at most; more are refused.
    pub max_waiting: usize,
    /// Prompt tokens of a step while streams generate, for each prompt that is being read: a smaller number lets
    /// streams stutter less, and prompts take longer. A step never has more rows than the engine's chunk.
    pub mixed_rows: usize,
    /// Whether prompts begin with what the cache still has of earlier ones.
    pub prefix_cache: PrefixSharing,
    /// Where pages of prompts are kept for which the cache has no place.
    pub spill: SpillSettings,
    /// Whether results may depend on what else is in a step.
    pub batching: Batching,
}

/// Whether the last bits of a request's logits depend on the requests beside it. A changed bit can make
/// another token the best one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Batching {
    /// They do not: prompts and generated tokens are computed in calls of their own, each with products
    /// that add in one order whatever the number of rows, and only the pages of prompts are shared.
    #[default]
    Exact,
    /// They do: prompts and generated tokens share calls where the plan has the same operators for both,
    /// the products are those that are fastest for the number of rows, and answers are shared as well.
    Fastest,
}

/// Whether requests share the cache pages of common beginnings.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PrefixSharing {
    /// They do; pages stay until others need them.
    #[default]
    On,
    /// Every prompt is read as a whole.
    Off,
}

impl Default for SchedulerSettings {
    fn default() -> Self {
        Self {
            max_running: DEFAULT_RUNNING,
            max_waiting: DEFAULT_WAITING,
            mixed_rows: DEFAULT_MIXED_ROWS,
            prefix_cache: PrefixSharing::On,
            spill: SpillSettings::default(),
            batching: Batching::Exact,
        }
    }
}

/// Takes requests for an engine and works on many of them at once. Cheap to clone; the thread ends
/// when it is closed, or the last clone is gone, and all requests are answered.
#[derive(Clone)]
pub struct Scheduler {
    shared: Arc<Shared>,
}

struct Shared {
    engine: Engine,
    settings: SchedulerSettings,
    inbox: Mutex<Option<Sender<Sequence>>>,
    metrics: Arc<Metrics>,
    closed: AtomicBool,
    thread: thread::JoinHandle<()>,
}

impl Scheduler {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`EngineError::Setting`] if a limit is 0 or larger than a step, [`EngineError::Thread`] if the
    /// system refuses the thread, and what [`SpillSettings::directory`] is refused for.
    pub fn start(engine: Engine, settings: SchedulerSettings) -> Result<Self, EngineError> {
        let rows = engine
            .settings()
            .chunk_size
            .min(engine.settings().context)
            .max(1);
        check("max_running", settings.max_running, rows)?;
        let (sequences, layerwise) = {
            let inner = engine.inner();
            let runtime = inner.runtime()?;
            (runtime.most_sequences(), runtime.layerwise_above())
        };
        if sequences.is_some_and(|most| settings.max_running > most) {
            return Err(EngineError::Setting {
                name: "max_running",
                value: settings.max_running,
                range: "the engine's steps hold fewer sequences with a GPU: make it with more `sequences`",
            });
        }
        if let Some(threshold) = layerwise {
            tracing::warn!(
                "the rules read prompts of more than {threshold} tokens layer by layer, which would hold up all \
                 other requests: here such prompts are read in parts, with the operators that generate"
            );
        }
        check("mixed_rows", settings.mixed_rows, usize::MAX)?;
        let metrics = Arc::new(Metrics::default());
        let (sender, receiver) = mpsc::channel();
        let worker = Worker::new(
            engine.inner(),
            settings.clone(),
            receiver,
            Arc::clone(&metrics),
        )?;
        let thread = thread::Builder::new()
            .name("ktx-scheduler".to_owned())
            .spawn(move || worker.run())
            .map_err(EngineError::Thread)?;
        Ok(Self {
            shared: Arc::new(Shared {
                engine,
                settings,
                inbox: Mutex::new(Some(sender)),
                metrics,
                closed: AtomicBool::new(false),
                thread,
            }),
        })
    }

    /// The engine that it works with.
    pub fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    /// Its limits.
    pub fn settings(&self) -> &SchedulerSettings {
        &self.shared.settings
    }

    /// Puts a request into the queue; what comes of it goes to `sink`. The request is given up when
    /// the sink says that nobody listens any more.
    ///
    /// # Errors
    /// [`SubmitError`] if the queue is full, the request cannot be answered ever, or no more are taken.
    pub fn submit(
        &self,
        request: Request,
        sink: impl TokenSink + 'static,
    ) -> Result<(), SubmitError> {
        let shared = &self.shared;
        if !self.is_open() {
            return Err(SubmitError::Closed);
        }
        let batching = shared.settings.batching;
        let sequence = Sequence::new(request, Box::new(sink), &shared.engine, batching)?;
        if !shared.metrics.enqueue(shared.settings.max_waiting) {
            return Err(SubmitError::QueueFull {
                waiting: shared.settings.max_waiting,
            });
        }
        let inbox = shared.inbox.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = inbox.as_ref().is_some_and(|i| i.send(sequence).is_ok());
        if !sent {
            shared.metrics.dequeue();
            return Err(SubmitError::Closed);
        }
        Ok(())
    }

    /// Takes no more requests; those that are there are answered. Then what the prefix cache holds is
    /// written to its directory, if it has one, and the thread ends.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        let mut inbox = self
            .shared
            .inbox
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *inbox = None;
    }

    /// Whether requests are taken.
    pub fn is_open(&self) -> bool {
        !self.is_closed() && self.is_alive()
    }

    /// Whether [`close`](Self::close) was called.
    pub fn is_closed(&self) -> bool {
        self.shared.closed.load(Ordering::Acquire)
    }

    /// Whether its thread runs. It ends when the scheduler was closed and all is done, and early only if
    /// an operator panics.
    pub fn is_alive(&self) -> bool {
        !self.shared.thread.is_finished()
    }

    /// Whether nothing waits and nothing runs.
    pub fn is_idle(&self) -> bool {
        self.shared.metrics.is_idle()
    }

    /// What was counted so far.
    pub fn metrics(&self) -> MetricsSnapshot {
        self.shared.metrics.snapshot()
    }
}

fn check(name: &'static str, value: usize, limit: usize) -> Result<(), EngineError> {
    match value {
        0 => Err(EngineError::Setting {
            name,
            value,
            range: "it must be 1 or more",
        }),
        _ if value > limit => Err(EngineError::Setting {
            name,
            value,
            range: "a step holds no more rows than chunk_size and context",
        }),
        _ => Ok(()),
    }
}
