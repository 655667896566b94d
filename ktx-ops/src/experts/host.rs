//! All routed experts of a layer on the host, on the file's blocks in main memory.

use std::sync::Arc;

use ktx_kernels::device::{Device, DeviceKind};
use ktx_kernels::linear::WeightRows;
use ktx_kernels::moe::cuda::{GpuExperts, GpuRouting};
use ktx_kernels::moe::{self, ExpertBiases, ExpertStack, MoeWeights, Routing};
use ktx_kernels::workspace::{Act, Workspace};
use serde::{Deserialize, Serialize};

use super::adapted::{AdaptedExperts, HostWeights, Routed};
use super::hot::{HotLayer, PartHere};
use super::streamed::{StreamedExperts, streams_to};
use super::uses::ExpertUses;
use crate::build::{BuildArgs, OpError, Operator, Placement};
use crate::gpu::{OnGpus, gpus, refused};
use crate::kwargs::{KwargDoc, KwargSet};
use crate::linear::{Arithmetic, kernel_error};
use crate::lora::{AdapterId, Attachment};
use crate::module::{Capacity, Experts, Forward, Holding, KModule, Loader, Phase};
use crate::recording::HostTask;
use crate::register_operator;
use crate::registry::registry;
use crate::spec::{ExpertsSpec, Spec};
use crate::weights::{ExpertTensors, expert_biases, experts, floats};

/// Arguments of the host's experts operators.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default)]
struct HostKwargs {
    out_device: Option<String>,
    backend: Backend,
}

impl Default for HostKwargs {
    fn default() -> Self {
        Self {
            out_device: None,
            backend: Backend::Llamafile,
        }
    }
}

/// Kernels by the names that KTransformers gives them.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
enum Backend {
    /// The file's blocks as they are.
    #[serde(rename = "llamafile")]
    Llamafile,
    /// Tiles of bfloat16.
    #[serde(rename = "AMXBF16")]
    AmxBf16,
    /// Tiles of 8-bit integers, with weights quantised again.
    #[serde(rename = "AMXInt8")]
    AmxInt8,
}

impl KwargSet for HostKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "out_device",
            doc: "where the result lands before the block that asked takes it; if not set, where the experts are",
            ignored: None,
        },
        KwargDoc {
            name: "backend",
            doc: "kernels: llamafile, AMXBF16 or AMXInt8",
            ignored: Some(
                "the fastest kernels of this CPU are used, on the file's blocks as they are",
            ),
        },
    ];
}

/// Arguments of the experts operators that come from a GPU's world.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
struct DeviceKwargs {
    out_device: Option<String>,
}

impl KwargSet for DeviceKwargs {
    const DOCS: &'static [KwargDoc] = &[KwargDoc {
        name: "out_device",
        doc: "where the result lands before the block that asked takes it; if not set, where the experts are",
        ignored: None,
    }];
}

/// The routed experts of a layer: tokens grouped by expert, all in two parallel regions.
pub struct HostExperts {
    path: String,
    class: &'static str,
    placement: Placement,
    spec: ExpertsSpec,
    arithmetic: Arithmetic,
    out_device: Option<Device>,
    loaded: Option<Arc<Loaded>>,
    /// Choices in main memory; a GPU's stay there.
    uses: Arc<ExpertUses>,
    on_gpus: OnGpus<Arc<GpuExperts>>,
    /// For prompts, where those go to a GPU and the experts live in main memory.
    streamed: Option<StreamedExperts>,
    /// The most used ones, where the block is on a GPU and the experts live in main memory.
    hot: Option<HotLayer>,
    adapted: AdaptedExperts,
}

/// The experts' weights in main memory, and all that it takes to compute with them.
struct Loaded {
    path: String,
    spec: ExpertsSpec,
    arithmetic: Arithmetic,
    tensors: [ExpertTensors; 3],
    /// `[experts, out]` of gate, up and down.
    biases: Option<[Vec<f32>; 3]>,
    uses: Arc<ExpertUses>,
}

/// The experts of a recorded step.
struct ExpertsTask {
    experts: Arc<Loaded>,
    rows: Routed,
}

impl HostTask for ExpertsTask {
    fn run(&self, cx: &mut Forward<'_>) -> Result<(), OpError> {
        self.experts.run(cx, &self.rows, 0)
    }
}

impl HostExperts {
    const CPU: &'static str = "ktransformers.operators.experts.KExpertsCPU";
    const TORCH: &'static str = "ktransformers.operators.experts.KExpertsTorch";
    const MARLIN: &'static str = "ktransformers.operators.experts.KExpertsMarlin";

    fn build(
        args: &mut BuildArgs<'_>,
        class: &'static str,
        arithmetic: Arithmetic,
        out_device: Option<String>,
    ) -> Result<Operator, OpError> {
        let out_device = out_device
            .map(|name| name.parse())
            .transpose()
            .map_err(|e| args.error(format!("`out_device`: {e}")))?;
        let Spec::Experts(spec) = args.spec().clone() else {
            return Err(args.unfit("routed experts"));
        };
        let (path, placement) = (args.module.path.clone(), args.placement);
        let uses = Arc::new(ExpertUses::new(spec.num_experts));
        Ok(Operator::Experts(Box::new(Self {
            path,
            class,
            placement,
            spec,
            arithmetic,
            out_device,
            loaded: None,
            uses,
            on_gpus: OnGpus::default(),
            streamed: None,
            hot: None,
            adapted: AdaptedExperts::default(),
        })))
    }

    /// Whether an operator of this name computes on the file's blocks in main memory.
    pub(super) fn is_named(name: &str) -> bool {
        let classes = [Self::CPU, Self::TORCH, Self::MARLIN];
        registry()
            .get(name)
            .is_some_and(|entry| classes.contains(&entry.class))
    }

    /// Number of experts, values of a token, values between the projections.
    fn sizes(&self) -> [usize; 3] {
        let spec = &self.spec;
        [
            spec.num_experts,
            spec.hidden_size,
            spec.moe_intermediate_size,
        ]
    }

    /// All experts of these rows on the GPU that holds them and the rows.
    fn run_on_gpu(&self, cx: &mut Forward<'_>, rows: &Routed) -> Result<(), OpError> {
        let device = rows.x.device();
        if let Some(streamed) = &self.streamed {
            let floats =
                GpuExperts::scratch_floats_of(self.sizes(), rows.x.rows(), rows.ids.cols());
            let precision = self.arithmetic.precision(cx.precision);
            return streamed.submit(cx, &self.path, rows, precision, floats);
        }
        let experts = self.on_gpus.get(&self.path, device)?;
        let precision = self.arithmetic.precision(cx.precision);
        cx.scoped(|cx| {
            let floats = experts.scratch_floats(rows.x.rows(), rows.ids.cols());
            let scratch = cx.alloc(device, 1, floats)?;
            let [x, ids, weights, out, scratch] =
                [rows.x, rows.ids, rows.weights, rows.out, scratch]
                    .map(|act| cx.workspace.matrix(act));
            let routing = GpuRouting { ids, weights };
            experts
                .forward(x, routing, None, out, precision, scratch)
                .map_err(refused)
        })
    }

    /// The GPU of the block that asks, where the experts live in main memory.
    fn hot_device(&self) -> Option<Device> {
        let asks = self
            .out_device
            .filter(|device| device.kind() == DeviceKind::Cuda);
        asks.filter(|_| self.placement.generate.is_cpu())
    }

    /// Whether adapters of the rows adapt these experts.
    fn adapts(&self, cx: &Forward<'_>) -> bool {
        let spans = cx.adapters.spans();
        spans.iter().any(|s| self.adapted.any_of(&s.adapters))
    }

    fn loaded(&self) -> Result<&Arc<Loaded>, OpError> {
        self.loaded
            .as_ref()
            .ok_or_else(|| kernel_error(&self.path, "its weights are not loaded"))
    }

    /// Rows with adapters that adapt these experts apart from the others.
    fn run_adapted(&self, cx: &mut Forward<'_>, all: &Routed) -> Result<(), OpError> {
        cx.adapters.require_rows(&self.path, all.x.rows())?;
        let loaded = self.loaded()?;
        let adapters = std::mem::take(&mut cx.adapters);
        let engine = cx.precision;
        let mut done = 0;
        let spans = adapters.spans().iter();
        let mut spans = spans.filter(|s| self.adapted.any_of(&s.adapters));
        let result = spans.try_for_each(|span| {
            loaded.run(cx, &all.rows(done, span.first_row - done), 0)?;
            done = span.end();
            cx.precision = self.arithmetic.precision(engine);
            let rows = all.rows(span.first_row, span.rows);
            let ([ids], []) = cx.workspace.views([rows.ids], []);
            loaded.uses.count(bytemuck::cast_slice(ids));
            let weights = HostWeights {
                tensors: &loaded.tensors,
                biases: loaded.biases.as_ref(),
                activation: self.spec.activation,
            };
            let result = self
                .adapted
                .run(cx, &self.path, weights, &span.adapters, &rows);
            cx.precision = engine;
            result
        });
        cx.adapters = adapters;
        result?;
        loaded.run(cx, &all.rows(done, all.x.rows() - done), 0)
    }
}

impl Loaded {
    /// `[out, in]` of the three projections.
    fn shapes(&self) -> [(usize, usize); 3] {
        let (hidden, width) = (self.spec.hidden_size, self.spec.moe_intermediate_size);
        [(width, hidden), (width, hidden), (hidden, width)]
    }

    /// The experts from `first_expert` on of these rows at once, without adapters.
    fn run(&self, cx: &mut Forward<'_>, rows: &Routed, first_expert: usize) -> Result<(), OpError> {
        if rows.x.is_empty() {
            return Ok(());
        }
        let Routed {
            x,
            ids,
            weights,
            out,
        } = *rows;
        let precision = self.arithmetic.precision(cx.precision);
        self.with_weights(|all| {
            let top_k = ids.cols();
            let ([x, ids, weights], [out]) = cx.workspace.views([x, ids, weights], [out]);
            let routing = Routing {
                ids: bytemuck::cast_slice(ids),
                weights,
                top_k,
                first_expert,
            };
            match cx.phase {
                Phase::Prefill => self.uses.count(routing.ids),
                Phase::Generate => self.uses.count_generated(routing.ids),
            }
            moe::forward(cx.pool, all, x, routing, out, cx.moe, precision)
                .map_err(|e| kernel_error(&self.path, e))
        })
    }

    /// Calls `body` with the weights as the kernels take them.
    fn with_weights<T>(
        &self,
        body: impl FnOnce(&MoeWeights<'_>) -> Result<T, OpError>,
    ) -> Result<T, OpError> {
        let error = |e: &dyn std::fmt::Display| kernel_error(&self.path, e);
        let tensors = &self.tensors;
        let separate = separate_rows(tensors).map_err(|e| error(&e))?;
        let [gate, up, down] = std::array::from_fn(|i| {
            let (rows, cols) = self.shapes()[i];
            match &tensors[i] {
                ExpertTensors::Merged(t) => {
                    let shape = [self.spec.num_experts, rows, cols];
                    ExpertStack::stacked(t.ty(), shape, t.bytes()).map_err(|e| error(&e))
                }
                ExpertTensors::Separate(_) => {
                    ExpertStack::separate(&separate[i]).map_err(|e| error(&e))
                }
            }
        });
        let mut all = MoeWeights::new(gate?, up?, down?)
            .map_err(|e| error(&e))?
            .with_activation(self.spec.activation);
        if let Some([gate, up, down]) = &self.biases {
            let biases = ExpertBiases { gate, up, down };
            all = all.with_biases(biases).map_err(|e| error(&e))?;
        }
        body(&all)
    }
}

/// The matrices of projections that the file holds as one tensor for each expert; none of the others.
fn separate_rows<'a>(
    tensors: &'a [ExpertTensors; 3],
) -> Result<[Vec<WeightRows<'a>>; 3], ktx_kernels::linear::LinearError> {
    let mut all = [const { Vec::new() }; 3];
    for (list, tensors) in all.iter_mut().zip(tensors) {
        if let ExpertTensors::Separate(tensors) = tensors {
            *list = tensors
                .iter()
                .map(WeightRows::of)
                .collect::<Result<_, _>>()?;
        }
    }
    Ok(all)
}

impl KModule for HostExperts {
    fn path(&self) -> &str {
        &self.path
    }

    fn class_path(&self) -> &'static str {
        self.class
    }

    fn device(&self, phase: Phase) -> Device {
        self.placement.device(phase)
    }

    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        let mut tensors = experts(&self.path, &self.spec, loader.store())?;
        for projection in &mut tensors {
            loader.took(&projection.tensors())?;
            if self.placement.is_on_host() {
                projection.replace(|tensor| loader.in_main_memory(&self.path, tensor))?;
            }
        }
        let mut biases = None;
        if let Some([gate, up, down]) = expert_biases(&self.path, &self.spec, loader.store())? {
            loader.took(&[&gate, &up, &down])?;
            let values = |tensor| floats(&self.path, tensor);
            biases = Some([values(&gate)?, values(&up)?, values(&down)?]);
        }
        let loaded = Loaded {
            path: self.path.clone(),
            spec: self.spec.clone(),
            arithmetic: self.arithmetic,
            tensors,
            biases,
            uses: Arc::clone(&self.uses),
        };
        match streams_to(self.placement) {
            Some(device) => {
                let (path, spec) = (&self.path, &self.spec);
                self.streamed = loaded.with_weights(|all| {
                    StreamedExperts::load(path, device, spec, &loaded.tensors, all, loader)
                })?;
            }
            None => {
                self.on_gpus = OnGpus::load(&self.path, self.placement, |gpu| {
                    loader.experts_on(&self.path, gpu, || {
                        loaded.with_weights(|all| GpuExperts::upload(gpu, all).map_err(refused))
                    })
                })?;
            }
        }
        if let Some(device) = self.hot_device() {
            let (path, spec) = (&self.path, &self.spec);
            let biases = loaded.biases.clone();
            self.hot = loader.hot_on(path, device, spec, &loaded.tensors, biases, &self.uses)?;
        }
        self.loaded = Some(Arc::new(loaded));
        Ok(())
    }

    fn unload(&mut self) {
        self.loaded = None;
        self.hot = None;
        self.on_gpus = OnGpus::default();
        self.streamed = None;
    }

    fn holding(&self) -> Vec<Holding> {
        let biases = self.loaded.iter().filter_map(|l| l.biases.as_ref());
        let bytes = biases.flatten().map(|b| size_of_val(b.as_slice()) as u64);
        vec![Holding {
            device: self.placement.generate,
            bytes: bytes.sum(),
        }]
    }

    fn expert_uses(&self) -> Option<&Arc<ExpertUses>> {
        Some(&self.uses)
    }

    fn attach(&mut self, attachment: &mut Attachment<'_>) {
        self.adapted.attach(&self.path, &self.spec, attachment);
    }

    fn detach(&mut self, id: AdapterId) {
        self.adapted.detach(id);
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        let on_gpu = match gpus(self.placement).next() {
            Some(_) => {
                let floats =
                    GpuExperts::scratch_floats_of(self.sizes(), capacity.tokens, self.spec.top_k);
                Workspace::values_for(1, floats)
            }
            None => 0,
        };
        let on_host = match streams_to(self.placement) {
            Some(_) => {
                2 * Workspace::values_for(capacity.tokens, self.spec.hidden_size)
                    + 2 * Workspace::values_for(capacity.tokens, self.spec.top_k)
            }
            None => 0,
        };
        let hot = match self.hot_device() {
            Some(_) => HotLayer::scratch(capacity, &self.spec),
            None => 0,
        };
        self.adapted
            .scratch(&self.spec, capacity.tokens)
            .max(on_gpu)
            .max(hot)
            + on_host
    }
}

impl Experts for HostExperts {
    fn submit(
        &self,
        cx: &mut Forward<'_>,
        x: Act,
        ids: Act,
        weights: Act,
        out: Act,
    ) -> Result<(), OpError> {
        let rows = Routed {
            x,
            ids,
            weights,
            out,
        };
        if cx.gpu(x).is_some() {
            return self.run_on_gpu(cx, &rows);
        }
        if cx.is_recording() {
            let experts = Arc::clone(self.loaded()?);
            return cx.turn_of_host(Arc::new(ExpertsTask { experts, rows }));
        }
        match self.adapted.is_empty() || cx.adapters.is_empty() {
            true => self.loaded()?.run(cx, &rows, 0),
            false => self.run_adapted(cx, &rows),
        }
    }

    fn part_here(
        &self,
        cx: &mut Forward<'_>,
        ids: Act,
        weights: Act,
    ) -> Result<Option<PartHere>, OpError> {
        match &self.hot {
            Some(hot) if !self.adapts(cx) => hot.part(cx, ids, weights),
            _ => Ok(None),
        }
    }

    fn compute_here(
        &self,
        cx: &mut Forward<'_>,
        x: Act,
        part: PartHere,
        out: Act,
    ) -> Result<(), OpError> {
        let precision = self.arithmetic.precision(cx.precision);
        match &self.hot {
            Some(hot) => hot.compute(cx, x, part, out, precision),
            None => Ok(()),
        }
    }

    fn finish(&self, cx: &mut Forward<'_>, out: Act) -> Result<(), OpError> {
        let Some(streamed) = &self.streamed else {
            return Ok(());
        };
        match streamed.take_rest(cx, out)? {
            None => Ok(()),
            Some(rest) => {
                self.loaded()?.run(cx, &rest.rows, rest.first_expert)?;
                streamed.add(cx, rest.rows.out, out)
            }
        }
    }

    fn place(&self, cx: &Forward<'_>, rows: usize) -> Device {
        if streams_to(self.placement).is_none() {
            return self.device(cx.phase);
        }
        // Adapted experts are computed expert by expert, where they live.
        let streamed = self.streamed.as_ref().filter(|_| !self.adapts(cx));
        streamed
            .and_then(|streamed| streamed.takes(cx, rows))
            .unwrap_or(self.placement.generate)
    }

    fn out_device(&self, phase: Phase) -> Device {
        self.out_device.unwrap_or(self.device(phase))
    }
}

fn build_cpu(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let out_device = args.kwargs::<HostKwargs>()?.out_device;
    HostExperts::build(args, HostExperts::CPU, Arithmetic::AsEngine, out_device)
}

fn build_torch(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let out_device = args.kwargs::<DeviceKwargs>()?.out_device;
    HostExperts::build(args, HostExperts::TORCH, Arithmetic::F32, out_device)
}

fn build_marlin(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let out_device = args.kwargs::<DeviceKwargs>()?.out_device;
    HostExperts::build(args, HostExperts::MARLIN, Arithmetic::AsEngine, out_device)
}

register_operator! {
    class: HostExperts::CPU,
    aliases: ["KExpertsCPU", "ktx.experts.KExpertsCPU", "ktx.experts.KMoECpu", "KMoECpu"],
    role: Experts,
    summary: "routed experts in main memory on the file's blocks: grouped, fused, all threads",
    kwargs: HostKwargs,
    build: build_cpu,
}

register_operator! {
    class: HostExperts::TORCH,
    aliases: ["KExpertsTorch", "ktx.experts.KExpertsTorch"],
    role: Experts,
    summary: "routed experts with dequantised weights and f32 activations: exact, slower",
    kwargs: DeviceKwargs,
    build: build_torch,
}

register_operator! {
    class: HostExperts::MARLIN,
    aliases: ["KExpertsMarlin", "ktx.experts.KExpertsMarlin"],
    role: Experts,
    summary: "routed experts on the file's blocks, never requantised",
    kwargs: DeviceKwargs,
    build: build_marlin,
}
