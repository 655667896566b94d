//! The cache of the most used experts in what a GPU has left.

use ktx_kernels::cuda::{CudaError, Gpu};
use ktx_kernels::pool::ThreadPool;
use ktx_ops::experts::{HotReport, HotSet};
use ktx_ops::{Loader, OpError};

use super::Settings;
use crate::placement::ByteSize;

/// How much of a GPU's memory the most used experts get that live in main memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HotMemory {
    /// So much.
    Bytes(ByteSize),
    /// What is left when all else has its memory.
    LeftOver,
}

impl HotMemory {
    /// Bytes that stay free of what is left, for what the driver takes later: recorded steps, kernels that are loaded
    /// when they are first used.
    const RESERVE: usize = 768 << 20;

    /// Bytes that are known before all else has its memory.
    pub(super) fn known(self) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes.0,
            Self::LeftOver => 0,
        }
    }

    fn on(self, gpu: &Gpu) -> Result<usize, CudaError> {
        Ok(match self {
            Self::Bytes(bytes) => usize::try_from(bytes.0).unwrap_or(usize::MAX),
            Self::LeftOver => gpu.memory()?.0.saturating_sub(Self::RESERVE),
        })
    }
}

/// The caches of all GPUs.
pub(super) struct HotSets(Vec<HotSet>);

impl HotSets {
    /// Takes the memory, when all else has its own.
    pub(super) fn start(loader: &mut Loader<'_>, settings: &Settings) -> Result<Self, OpError> {
        let Some(memory) = settings.hot_experts else {
            return Ok(Self(Vec::new()));
        };
        let sets = loader.start_hot_experts(|gpu| memory.on(gpu));
        Ok(Self(sets.map_err(|e| OpError::Workspace(e.into()))?))
    }

    /// Between two steps that generate: lets experts that are used more take the place of others. A cache that fails
    /// stays as it is.
    pub(super) fn maintain(&mut self, pool: &ThreadPool) -> Result<(), OpError> {
        let result = self.0.iter_mut().try_for_each(|set| set.maintain(pool));
        if result.is_err() {
            self.0.clear();
        }
        result
    }

    /// How they do; none where there are none.
    pub(super) fn report(&self) -> Option<HotReport> {
        let reports = self.0.iter().map(HotSet::report);
        reports.reduce(|a, b| HotReport {
            slots: a.slots + b.slots,
            experts: a.experts + b.experts,
            choices: a.choices + b.choices,
            hits: a.hits + b.hits,
            uploads: a.uploads + b.uploads,
        })
    }
}
