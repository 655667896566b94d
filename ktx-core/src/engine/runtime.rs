//! What runs: the model's operators, the memory they work in, and one step of the loop.

use std::collections::BTreeMap;
use std::sync::Arc;

use ktx_kernels::cuda::{self, CudaError, Gpu};
use ktx_kernels::device::{Device, DeviceKind};
use ktx_kernels::kv::{KvError, KvType, LayerKv, PageId, SequenceKv};
use ktx_kernels::linear::Precision;
use ktx_kernels::moe::MoeScratch;
use ktx_kernels::pool::ThreadPool;
use ktx_kernels::workspace::{Act, StepCapacity, Transfers, Workspace, WorkspaceError};
use ktx_ops::experts::{ExpertUses, HotReport};
use ktx_ops::lora::{Adapter, AdapterId, RowAdapters};
use ktx_ops::module::KvLayout;
use ktx_ops::recording::{Recorder, StepTimes};
use ktx_ops::{
    Batch, Forward, KModule, Layerwise, Linear, LoadProgress, LoadScope, Loader, Model, Observer,
    OpError, Phase, Streaming, load_all,
};

use super::hot::HotSets;
use super::parts::{LOGIT_ROWS, Parts, pages_for};
use super::steps::{RecordedStep, StepPlan, Steps};
use super::{HostWeights, Settings};
use crate::error::EngineError;
use crate::weights::Weights;

/// A loaded model with its memory; one step at a time.
pub(crate) struct Runtime {
    parts: Parts,
    precision: Precision,
    streaming: Streaming,
    workspace: Workspace,
    kv: Vec<LayerKv>,
    free_pages: Vec<PageId>,
    moe: MoeScratch,
    pool: ThreadPool,
    store: Arc<Weights>,
    steps: Steps,
    hot: HotSets,
}

impl Runtime {
    pub(crate) fn load(
        mut parts: Parts,
        settings: &Settings,
        pool: ThreadPool,
        store: Arc<Weights>,
        progress: &mut dyn FnMut(LoadProgress) -> bool,
    ) -> Result<Self, EngineError> {
        let on_gpus = parts.devices.iter().any(|d| !d.is_cpu());
        let _turn = on_gpus.then(cuda::turn);
        let mut loader = Loader::new(store.as_ref(), progress).with_context(settings.context);
        if settings.host_weights == HostWeights::HugePages {
            loader = loader.with_huge_pages(&pool);
        }
        if settings.hot_experts.is_some() {
            loader = loader.with_hot_experts();
        }
        let scope = match parts.model.layerwise() {
            Some(_) => LoadScope::Generation,
            None => LoadScope::All,
        };
        let (model, head): (&mut dyn KModule, &mut dyn KModule) =
            (parts.model.as_mut(), parts.head.as_mut());
        load_all(model, scope, &mut loader)?;
        // The head is no layer of a prompt that is read layer by layer: it stays.
        load_all(head, LoadScope::All, &mut loader)?;
        loader
            .start_streams(settings.uploads)
            .map_err(|e| OpError::Workspace(e.into()))?;
        let pages = pages_for(settings.context) * settings.sessions;
        let kv = parts
            .layouts
            .iter()
            .map(|layout| cache(layout, settings.kv_type, pages))
            .collect::<Result<_, KvError>>()?;
        let steps = StepCapacity {
            rows: parts.capacity.tokens,
            sequences: settings.sequences.min(parts.capacity.tokens),
            pages: pages_for(settings.context),
        };
        let workspace = Workspace::with_gpus(&parts.devices, parts.workspace_values(), steps)
            .map_err(OpError::from)?;
        let hot = HotSets::start(&mut loader, settings)?;
        Ok(Self {
            precision: settings.precision,
            streaming: settings.streaming.unwrap_or(Streaming::WHOLE),
            workspace,
            hot,
            steps: Steps::new(steps, &parts.devices),
            kv,
            free_pages: (0..pages as u32).rev().map(PageId).collect(),
            moe: MoeScratch::default(),
            pool,
            store,
            parts,
        })
    }

    /// Gives an adapter's parts to the operators, and plans the workspace again: its ranks may be
    /// larger than all before.
    pub(crate) fn attach(&mut self, id: AdapterId, adapter: &Adapter) -> Result<(), EngineError> {
        self.parts.attach(id, adapter)?;
        let values = self.parts.workspace_values();
        self.steps.forget();
        match Workspace::with_gpus(&self.parts.devices, values, self.steps.capacity) {
            Ok(workspace) => {
                self.workspace = workspace;
                Ok(())
            }
            Err(error) => {
                self.parts.detach(id);
                Err(OpError::from(error).into())
            }
        }
    }

    /// Takes an adapter's parts from the operators.
    pub(crate) fn detach(&mut self, id: AdapterId) {
        self.parts.detach(id);
    }

    /// The first adapter of a batch that is not attached.
    fn detached(&self, batch: &Batch) -> Option<AdapterId> {
        let chosen = batch.sequences.iter().flat_map(|s| s.adapters.iter());
        chosen
            .map(|a| a.id)
            .find(|id| !self.parts.adapters.contains(id))
    }

    /// Takes a page of the cache.
    pub(crate) fn take_page(&mut self) -> Option<PageId> {
        self.free_pages.pop()
    }

    /// Gives pages back.
    pub(crate) fn give_pages(&mut self, pages: impl IntoIterator<Item = PageId>) {
        self.free_pages.extend(pages);
    }

    /// Pages that nobody holds.
    pub(crate) fn free_pages(&self) -> usize {
        self.free_pages.len()
    }

    /// Pages in all.
    pub(crate) fn pages(&self) -> usize {
        self.kv.first().map_or(0, LayerKv::pages)
    }

    /// Bytes of a page in all layers together.
    pub(crate) fn page_bytes(&self) -> usize {
        self.kv.iter().map(LayerKv::page_bytes).sum()
    }

    /// A copy of what a page holds, layer after layer.
    pub(crate) fn read_page(&mut self, page: PageId) -> Result<Vec<u8>, EngineError> {
        let _turn = self.steps.use_gpus().then(cuda::turn);
        let mut bytes = vec![0; self.page_bytes()];
        let mut rest = bytes.as_mut_slice();
        for layer in &self.kv {
            let (own, others) = rest.split_at_mut(layer.page_bytes());
            layer.read_page(page, own)?;
            rest = others;
        }
        Ok(bytes)
    }

    /// Gives a page the contents that [`read_page`](Self::read_page) copied.
    pub(crate) fn write_page(&mut self, page: PageId, bytes: &[u8]) -> Result<(), EngineError> {
        let _turn = self.steps.use_gpus().then(cuda::turn);
        let mut rest = bytes;
        for layer in &mut self.kv {
            let (own, others) = rest.split_at(layer.page_bytes());
            layer.write_page(page, own)?;
            rest = others;
        }
        Ok(())
    }

    /// Sequences of one step at most, if there is a limit.
    pub(crate) fn most_sequences(&self) -> Option<usize> {
        let on_gpu = self.steps.use_gpus();
        on_gpu.then_some(self.steps.capacity.sequences)
    }

    /// The GPUs that take part.
    pub(crate) fn gpus(&self) -> impl Iterator<Item = Device> {
        self.parts.devices.iter().copied().filter(|d| !d.is_cpu())
    }

    /// The weights' files.
    pub(crate) fn weights(&self) -> &Weights {
        &self.store
    }

    /// The host's threads.
    pub(crate) fn pool(&self) -> &ThreadPool {
        &self.pool
    }

    /// Whether prompts and generated tokens can share a step: each row's result is then the same.
    pub(crate) fn phases_are_one(&self) -> bool {
        let (model, head) = (&self.parts.model, &self.parts.head);
        model.same_in_both_phases() && head.same_in_both_phases()
    }

    /// Prompts of more tokens than this are read layer by layer.
    pub(crate) fn layerwise_above(&self) -> Option<usize> {
        self.parts.model.layerwise().map(Layerwise::threshold)
    }

    /// What was copied between devices so far.
    pub(crate) fn transfers(&self) -> BTreeMap<(Device, Device), Transfers> {
        self.workspace.transfers().clone()
    }

    /// Where the time of recorded steps went so far.
    pub(crate) fn step_times(&self) -> StepTimes {
        self.steps.times
    }

    /// How the cache of the most used experts does.
    pub(crate) fn hot_report(&self) -> Option<HotReport> {
        self.hot.report()
    }

    /// The counters of routed experts, by path; an operator for each phase has its own.
    pub(crate) fn expert_uses(&self) -> Vec<(String, Arc<ExpertUses>)> {
        let mut found = Vec::new();
        let mut left: Vec<&dyn KModule> = vec![self.parts.model.as_ref()];
        while let Some(module) = left.pop() {
            let uses = module.expert_uses();
            found.extend(uses.map(|uses| (module.path().to_owned(), Arc::clone(uses))));
            left.extend(module.children().into_iter().rev());
        }
        found
    }

    /// One forward call: writes the batch's tokens to the cache and hands the logits `[vocab]` of
    /// each of its output rows to `on_logits`, in order.
    pub(crate) fn step(
        &mut self,
        batch: &Batch,
        phase: Phase,
        observer: Option<&mut dyn Observer>,
        on_logits: &mut dyn FnMut(&mut [f32]),
    ) -> Result<(), EngineError> {
        let _turn = self.steps.use_gpus().then(cuda::turn);
        // A model that reads long prompts layer by layer reads short ones as it generates.
        let operators = match self.parts.model.layerwise() {
            Some(_) => Phase::Generate,
            None => phase,
        };
        let prompt = phase == Phase::Prefill;
        if !prompt {
            self.hot.maintain(&self.pool)?;
        }
        if !prompt && observer.is_none() {
            let mut plan = self.steps.plan(batch);
            if plan == StepPlan::Record {
                let recorded = self.record(batch, operators)?;
                plan = recorded
                    .as_ref()
                    .map_or(StepPlan::Eager, |_| StepPlan::Replay);
                self.steps.keep(batch.rows(), recorded);
            }
            if plan == StepPlan::Replay {
                return self.replay(batch, operators, on_logits);
            }
        }
        self.with(
            batch,
            operators,
            prompt,
            observer,
            None,
            |cx, model, head| {
                let hidden = cx.alloc(
                    head.device(operators),
                    batch.outputs.len(),
                    head.in_features(),
                )?;
                model.forward(cx, hidden)?;
                logits(cx, head, hidden, on_logits)
            },
        )
    }

    /// Takes down a step of this shape; none if something in it cannot be.
    fn record(
        &mut self,
        batch: &Batch,
        phase: Phase,
    ) -> Result<Option<Box<RecordedStep>>, EngineError> {
        // A turn for each layer, one before them and one behind them.
        let turns = self.parts.layouts.len() + 2;
        let gpus = self.steps.gpus().iter();
        let gpus: Result<_, CudaError> = gpus.map(|gpu| Gpu::open(gpu.index())).collect();
        let gpus = gpus.map_err(|e| OpError::Workspace(e.into()))?;
        self.workspace.synchronize().map_err(OpError::from)?;
        let mut recorder = Recorder::begin(gpus, turns)?;
        self.workspace.set_recording(true);
        let mut place = None;
        let result = self.with(
            batch,
            phase,
            false,
            None,
            Some(&mut recorder),
            |cx, model, head| {
                let rows = batch.outputs.len();
                let hidden = cx.alloc(head.device(phase), rows, head.in_features())?;
                model.forward(cx, hidden)?;
                let logits = cx.alloc(hidden.device(), rows, head.out_features())?;
                head.forward(cx, hidden, logits)?;
                place = Some(cx.moved(logits, Device::CPU)?);
                Ok(())
            },
        );
        let used_host = self.workspace.set_recording(false);
        let recording = recorder.finish();
        match (result, recording, place) {
            (Ok(()), Ok(recording), Some(logits)) if !used_host => {
                Ok(Some(Box::new(RecordedStep { recording, logits })))
            }
            (result, recording, _) => {
                let why = result.err().map(|e| e.to_string());
                let why = why.or(recording.err().map(|e| e.to_string()));
                let why = why.unwrap_or_else(|| "an operator on the CPU takes part".to_owned());
                tracing::debug!(rows = batch.rows(), why, "a step is not recorded");
                Ok(None)
            }
        }
    }

    /// Runs a step that was recorded.
    fn replay(
        &mut self,
        batch: &Batch,
        phase: Phase,
        on_logits: &mut dyn FnMut(&mut [f32]),
    ) -> Result<(), EngineError> {
        let rows = batch.rows();
        let Some(step) = self.steps.take(rows) else {
            return Ok(());
        };
        let mut times = StepTimes::default();
        let result = self.with(batch, phase, false, None, None, |cx, _, _| {
            times = step.recording.run(cx)?;
            let vocab = step.logits.cols();
            let logits = cx.workspace.write(step.logits);
            logits.chunks_exact_mut(vocab).for_each(&mut *on_logits);
            Ok(())
        });
        self.steps.keep(rows, Some(step));
        self.steps.times += times;
        result
    }

    /// Reads the chunks of one long prompt, in their order, layer by layer: each layer's operators for
    /// prompts are loaded while all chunks pass through it. Hands out logits as [`step`](Self::step)
    /// does. Says whether it went to the end: `cancelled` is asked between two chunks.
    pub(crate) fn read_layerwise(
        &mut self,
        chunks: &[Batch],
        cancelled: &dyn Fn() -> bool,
        on_logits: &mut dyn FnMut(&mut [f32]),
    ) -> Result<bool, EngineError> {
        let _turn = self.steps.use_gpus().then(cuda::turn);
        let layers = self.parts.model.layerwise().map_or(0, Layerwise::layers);
        let width = self.parts.head.in_features();
        let mut states = Vec::new();
        for chunk in chunks {
            let values = chunk.rows() * width;
            let mut state = Vec::new();
            state.try_reserve_exact(values).map_err(|_| {
                OpError::Workspace(WorkspaceError::OutOfMemory {
                    device: Device::CPU,
                    values,
                })
            })?;
            state.resize(values, 0.0);
            self.on_chunk(chunk, &mut state, |cx, model, _, hidden| {
                Ok(model.embed(cx, hidden)?)
            })?;
            states.push(state);
        }
        for layer in 0..layers {
            if cancelled() {
                return Ok(false);
            }
            self.enter(layer)?;
            let passed = self.pass(layer, chunks, &mut states, cancelled);
            if let Some(model) = self.parts.model.layerwise_mut() {
                model.leave(layer);
            }
            if !passed? {
                return Ok(false);
            }
        }
        for (chunk, state) in chunks.iter().zip(&mut states) {
            if chunk.outputs.is_empty() {
                continue;
            }
            self.on_chunk(chunk, state, |cx, model, head, hidden| {
                let outputs = chunk.outputs.len();
                let out = cx.alloc(head.device(Phase::Prefill), outputs, width)?;
                model.norm(cx, hidden, out)?;
                logits(cx, head, out, on_logits)
            })?;
        }
        Ok(true)
    }

    fn enter(&mut self, layer: usize) -> Result<(), EngineError> {
        let mut progress = |_| true;
        let mut loader = Loader::new(self.store.as_ref(), &mut progress);
        match self.parts.model.layerwise_mut() {
            Some(model) => Ok(model.enter(layer, &mut loader)?),
            None => Ok(()),
        }
    }

    /// All chunks through one layer.
    fn pass(
        &mut self,
        layer: usize,
        chunks: &[Batch],
        states: &mut [Vec<f32>],
        cancelled: &dyn Fn() -> bool,
    ) -> Result<bool, EngineError> {
        for (chunk, state) in chunks.iter().zip(states) {
            if cancelled() {
                return Ok(false);
            }
            self.on_chunk(chunk, state, |cx, model, _, hidden| {
                Ok(model.layer(cx, layer, hidden)?)
            })?;
        }
        Ok(true)
    }

    /// Runs `body` on a chunk's hidden state, which is kept outside of the workspace.
    fn on_chunk(
        &mut self,
        chunk: &Batch,
        state: &mut [f32],
        body: impl FnOnce(&mut Forward<'_>, &dyn Layerwise, &dyn Linear, Act) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        self.with(
            chunk,
            Phase::Prefill,
            true,
            None,
            None,
            |cx, model, head| {
                let Some(model) = model.layerwise() else {
                    return Ok(());
                };
                let device = head.device(Phase::Prefill);
                let hidden = cx.alloc(device, chunk.rows(), head.in_features())?;
                let host = cx.alloc(Device::CPU, chunk.rows(), head.in_features())?;
                cx.workspace.write(host).copy_from_slice(state);
                cx.workspace.copy(host, hidden);
                body(cx, model, head, hidden)?;
                cx.workspace.copy(hidden, host);
                state.copy_from_slice(cx.workspace.read(host));
                Ok(())
            },
        )
    }

    /// Runs `body` with an empty workspace on a batch.
    fn with(
        &mut self,
        batch: &Batch,
        phase: Phase,
        prompt: bool,
        observer: Option<&mut dyn Observer>,
        recorder: Option<&mut Recorder>,
        body: impl FnOnce(&mut Forward<'_>, &dyn Model, &dyn Linear) -> Result<(), EngineError>,
    ) -> Result<(), EngineError> {
        if let Some(id) = self.detached(batch) {
            return Err(EngineError::AdapterGone { id: id.0 });
        }
        let sequences: Vec<SequenceKv<'_>> = batch
            .sequences
            .iter()
            .map(|s| SequenceKv {
                pages: &s.pages,
                past: s.past,
                tokens: s.tokens,
            })
            .collect();
        self.workspace.reset();
        // A step that is recorded does not run: there is nothing to tell.
        if recorder.is_none() {
            self.workspace
                .begin_step(&self.steps.next(batch, &sequences))
                .map_err(OpError::from)?;
        }
        let is_recorded = recorder.is_some();
        let _awake = self.steps.use_gpus().then(|| self.pool.stay_awake());
        let mut cx = Forward {
            phase,
            prompt,
            precision: self.precision,
            batch,
            sequences: &sequences,
            workspace: &mut self.workspace,
            kv: &mut self.kv,
            pool: &self.pool,
            moe: &mut self.moe,
            adapters: RowAdapters::of_batch(batch),
            streaming: self.streaming,
            step: self.steps.number(),
            deferred_experts: self.parts.capacity.deferred_experts,
            deferral: None,
            recorder,
            // Matched, not moved, so that the trait object's lifetime can shrink.
            observer: match observer {
                Some(observer) => Some(observer),
                None => None,
            },
        };
        let result = body(&mut cx, self.parts.model.as_ref(), self.parts.head.as_ref());
        // A GPU's fault is why what follows it failed.
        if !is_recorded {
            self.workspace.synchronize().map_err(OpError::from)?;
        }
        result
    }
}

/// The cache of one attention, where that is.
fn cache(layout: &KvLayout, kv_type: KvType, pages: usize) -> Result<LayerKv, KvError> {
    match layout.device.kind() {
        DeviceKind::Cuda => {
            let gpu = Gpu::open(layout.device.index())?;
            LayerKv::on_gpu(&gpu, kv_type, layout.k_width, layout.v_width, pages)
        }
        _ => LayerKv::new(kv_type, layout.k_width, layout.v_width, pages),
    }
}

/// The head's logits of normalised hidden states `[outputs, hidden]`, a few rows at a time.
fn logits(
    cx: &mut Forward<'_>,
    head: &dyn Linear,
    hidden: Act,
    on_logits: &mut dyn FnMut(&mut [f32]),
) -> Result<(), EngineError> {
    let vocab = head.out_features();
    for first in (0..hidden.rows()).step_by(LOGIT_ROWS) {
        let rows = LOGIT_ROWS.min(hidden.rows() - first);
        let mark = cx.workspace.mark();
        let logits = cx.alloc(hidden.device(), rows, vocab)?;
        let wanted = cx.batch.outputs[first..first + rows].iter().copied();
        let adapters = cx.adapters.gathered(wanted);
        let part = hidden.row_range(first, rows);
        cx.with_adapters(adapters, |cx| head.forward(cx, part, logits))?;
        let logits = cx.moved(logits, Device::CPU)?;
        cx.workspace
            .write(logits)
            .chunks_exact_mut(vocab)
            .for_each(&mut *on_logits);
        cx.workspace.release(&mark);
    }
    Ok(())
}
