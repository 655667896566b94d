//! The most used of the experts that live in main memory, in what a GPU has left: see [`ktx_kernels::moe::hot`].

use std::sync::{Arc, OnceLock};

use ktx_kernels::cuda::{CudaError, Gpu};
use ktx_kernels::device::{Device, DeviceKind};
use ktx_kernels::linear::Precision;
use ktx_kernels::moe::cuda::{GpuRouting, MAX_FEW_TOKENS};
use ktx_kernels::moe::hot::{HotCache, HotCacheBuilder, HotExperts};
use ktx_kernels::moe::stream::StreamedWeights;
use ktx_kernels::pool::ThreadPool;
use ktx_kernels::workspace::{Act, Workspace};

use super::uses::ExpertUses;
use crate::build::OpError;
use crate::gpu::refused;
use crate::module::{Capacity, Forward, Phase};
use crate::spec::ExpertsSpec;

/// A part of a call's choices that the device of the rows computes itself.
#[derive(Debug, Clone, Copy)]
pub struct PartHere {
    /// Slots `[rows, top_k]`, u32 in the bits.
    ids: Act,
    /// `[rows, top_k]`, 0 for choices that are computed elsewhere.
    weights: Act,
    /// The choices for the experts' own device, those that are computed here marked, `[rows, top_k]`.
    pub elsewhere: Act,
}

impl PartHere {
    /// Values that a block with a part on its own device takes.
    pub(crate) fn scratch(capacity: Capacity, hidden: usize, top_k: usize) -> usize {
        match capacity.hot_experts {
            true => {
                let rows = capacity.tokens.min(MAX_FEW_TOKENS);
                3 * Workspace::values_for(rows, top_k) + Workspace::values_for(rows, hidden)
            }
            false => 0,
        }
    }
}

type Places = Arc<OnceLock<Vec<Arc<HotExperts>>>>;

/// A layer's experts that a GPU holds.
pub(crate) struct HotLayer {
    device: Device,
    layer: usize,
    places: Places,
    sizes: [usize; 3],
}

impl HotLayer {
    /// Values that one call takes.
    pub(crate) fn scratch(capacity: Capacity, spec: &ExpertsSpec) -> usize {
        match capacity.hot_experts {
            true => {
                let tokens = capacity.tokens.min(MAX_FEW_TOKENS);
                let floats = HotExperts::scratch_floats_of(sizes(spec), tokens, spec.top_k);
                Workspace::values_for(1, floats)
            }
            false => 0,
        }
    }

    /// Parts the choices of a step that generates; none of rows on another device, or of a layer without slots.
    pub(crate) fn part(
        &self,
        cx: &mut Forward<'_>,
        ids: Act,
        weights: Act,
    ) -> Result<Option<PartHere>, OpError> {
        let few = cx.phase == Phase::Generate && ids.rows() <= MAX_FEW_TOKENS;
        let Some(hot) = self
            .experts()
            .filter(|_| few && ids.device() == self.device)
        else {
            return Ok(None);
        };
        let mut take = || cx.alloc(self.device, ids.rows(), ids.cols());
        let part = PartHere {
            ids: take()?,
            weights: take()?,
            elsewhere: take()?,
        };
        let matrix = |act| cx.workspace.matrix(act);
        let routing = GpuRouting {
            ids: matrix(ids),
            weights: matrix(weights),
        };
        hot.part(routing, part.routing(cx), matrix(part.elsewhere))
            .map_err(refused)?;
        Ok(Some(part))
    }

    /// Computes it: `x` to `out`, both `[rows, hidden]`.
    pub(crate) fn compute(
        &self,
        cx: &mut Forward<'_>,
        x: Act,
        part: PartHere,
        out: Act,
        precision: Precision,
    ) -> Result<(), OpError> {
        let Some(hot) = self.experts() else {
            return Ok(());
        };
        cx.scoped(|cx| {
            let floats = HotExperts::scratch_floats_of(self.sizes, x.rows(), part.ids.cols());
            let scratch = cx.alloc(self.device, 1, floats)?;
            let [x, out, scratch] = [x, out, scratch].map(|act| cx.workspace.matrix(act));
            hot.forward(x, part.routing(cx), out, precision, scratch)
                .map_err(refused)
        })
    }

    /// None before the cache is started, or if it has no room.
    fn experts(&self) -> Option<&HotExperts> {
        Some(self.places.get()?.get(self.layer)?)
    }
}

impl PartHere {
    fn routing(&self, cx: &Forward<'_>) -> GpuRouting {
        GpuRouting {
            ids: cx.workspace.matrix(self.ids),
            weights: cx.workspace.matrix(self.weights),
        }
    }
}

fn sizes(spec: &ExpertsSpec) -> [usize; 3] {
    [
        spec.num_experts,
        spec.hidden_size,
        spec.moe_intermediate_size,
    ]
}

/// The layers of one GPU's cache, as far as they are known.
pub(crate) struct OpenHot {
    gpu: Gpu,
    builder: HotCacheBuilder,
    uses: Vec<Arc<ExpertUses>>,
    places: Places,
}

impl OpenHot {
    pub(crate) fn new(gpu: &Gpu) -> Self {
        Self {
            gpu: gpu.clone(),
            builder: HotCacheBuilder::new(gpu),
            uses: Vec::new(),
            places: Arc::default(),
        }
    }

    pub(crate) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Adds a layer, whose choices `uses` counts.
    pub(crate) fn push(
        &mut self,
        spec: &ExpertsSpec,
        weights: StreamedWeights,
        biases: Option<[Vec<f32>; 3]>,
        uses: &Arc<ExpertUses>,
    ) -> HotLayer {
        self.uses.push(Arc::clone(uses));
        HotLayer {
            device: Device::new(DeviceKind::Cuda, self.gpu.index()),
            layer: self.builder.push(weights, biases, spec.activation),
            places: Arc::clone(&self.places),
            sizes: sizes(spec),
        }
    }

    /// Takes so many bytes of the GPU; none if they do not hold an expert of each layer.
    pub(crate) fn start(self, bytes: usize) -> Result<Option<HotSet>, CudaError> {
        let Some(cache) = self.builder.start(bytes)? else {
            return Ok(None);
        };
        let layers = (0..self.uses.len()).map(|layer| cache.layer(layer));
        // Each is started once.
        let _ = self.places.set(layers.collect());
        Ok(Some(HotSet {
            cache,
            uses: self.uses,
        }))
    }
}

/// The hot experts of one GPU, and what was counted of them.
pub struct HotSet {
    cache: HotCache,
    uses: Vec<Arc<ExpertUses>>,
}

/// How a cache of hot experts does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HotReport {
    /// Experts that it holds at most, of all layers.
    pub slots: usize,
    /// Experts of these layers.
    pub experts: usize,
    /// Choices of these experts by generated tokens so far.
    pub choices: u64,
    /// Those of them that found their expert in the cache.
    pub hits: u64,
    /// Experts that were uploaded.
    pub uploads: u64,
}

impl HotSet {
    /// Between two steps: lets experts that are used more take the place of others.
    ///
    /// # Errors
    /// What the GPU refuses.
    pub fn maintain(&mut self, pool: &ThreadPool) -> Result<(), OpError> {
        let uses = &self.uses;
        self.cache
            .maintain(pool, |layer| uses[layer].iter())
            .map_err(refused)
    }

    /// How it does.
    pub fn report(&self) -> HotReport {
        let mut report = HotReport {
            uploads: self.cache.swaps(),
            ..HotReport::default()
        };
        for (layer, uses) in self.uses.iter().enumerate() {
            report.slots += self.cache.layer(layer).slots();
            report.experts += uses.iter().count();
            report.choices += uses.generated();
            report.hits += uses.hits();
        }
        report
    }
}
