//! What all handlers share.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use ktx_core::Engine;
use ktx_core::serving::Scheduler;

use crate::error::ApiError;
use crate::output::OutputFormat;
use crate::plan::PlanView;
use crate::settings::ServerSettings;

/// The state of a server; cheap to clone.
#[derive(Clone)]
pub(crate) struct App(Arc<Inner>);

struct Inner {
    scheduler: Scheduler,
    settings: ServerSettings,
    plan: PlanView,
    format: OutputFormat,
    created: u64,
    ids: RandomState,
    next_id: AtomicU64,
}

impl App {
    pub(crate) fn new(scheduler: Scheduler, settings: ServerSettings, plan: PlanView) -> Self {
        let format = OutputFormat::of(scheduler.engine());
        Self(Arc::new(Inner {
            scheduler,
            settings,
            plan,
            format,
            created: now(),
            ids: RandomState::new(),
            next_id: AtomicU64::new(0),
        }))
    }

    pub(crate) fn scheduler(&self) -> &Scheduler {
        &self.0.scheduler
    }

    pub(crate) fn engine(&self) -> &Engine {
        self.0.scheduler.engine()
    }

    pub(crate) fn settings(&self) -> &ServerSettings {
        &self.0.settings
    }

    pub(crate) fn plan(&self) -> &PlanView {
        &self.0.plan
    }

    /// How the model writes thoughts and calls of functions.
    pub(crate) fn format(&self) -> &OutputFormat {
        &self.0.format
    }

    /// When the server was started, in seconds since 1970.
    pub(crate) fn created(&self) -> u64 {
        self.0.created
    }

    /// A name that no other answer has.
    pub(crate) fn new_id(&self, prefix: &str) -> String {
        let mut hasher = self.0.ids.build_hasher();
        hasher.write_u64(self.0.next_id.fetch_add(1, Ordering::Relaxed));
        format!("{prefix}{:016x}", hasher.finish())
    }

    /// A seed that nobody chose.
    pub(crate) fn new_seed(&self) -> u64 {
        let mut hasher = self.0.ids.build_hasher();
        hasher.write_u8(1);
        hasher.write_u64(self.0.next_id.fetch_add(1, Ordering::Relaxed));
        hasher.finish()
    }

    /// Refuses the name of another model. Adapters are asked for as `MODEL:ADAPTER`.
    pub(crate) fn check_model(&self, wanted: &str) -> Result<(), ApiError> {
        let name = &self.settings().model_name;
        let plain = wanted.strip_suffix(":latest").unwrap_or(wanted);
        match plain == name || wanted == name {
            true => Ok(()),
            false => Err(ApiError::no_model(wanted, name)),
        }
    }

    /// Seconds after which a full queue is worth another try: what its requests take on average.
    pub(crate) fn retry_after(&self) -> u64 {
        let metrics = self.scheduler().metrics();
        let times = &metrics.request_time;
        let mean = times.sum() / times.count().max(1) as f64;
        let rounds = metrics.waiting as f64 / self.scheduler().settings().max_running as f64;
        (mean * rounds).ceil().clamp(1.0, 60.0) as u64
    }
}

/// Seconds since 1970.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |time| time.as_secs())
}
