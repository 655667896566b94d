//! Placement without rules: which parts of a model go to which device, for the memory that there is.
//!
//! [`place`] cuts the model's tree into stages ([`units`]), prices every part of every stage on the
//! host and on a GPU ([`Machine`] says how fast each is), and searches for the assignment that takes the
//! least time for a [`Workload`] and fits into every device's memory. The result is a [`Placement`]: it
//! says what it chose and why, predicts the speed, and writes itself as a rule file
//! ([`Placement::rules`]), which is how it is carried out: the plan is made from those rules, as from
//! rules of a user's own.
//!
//! With several GPUs each has a range of the layers: the residual stream passes every GPU once.
//!
//! ```
//! use ktx_core::models::{QuantMix, describe, described, published_model};
//! use ktx_core::placement::{Budget, Machine, Request, place};
//!
//! let model = published_model("deepseek-v2-lite").expect("it is in the catalogue");
//! let gguf = described(model.name, model.metadata(), model.tying, QuantMix::Q4_K_M)?;
//! let description = describe(&gguf)?;
//! let budget = Budget { gpus: vec![3 << 30], ram: 13 << 30 };
//! let placement = place(&description, &gguf, &Request::new(budget, Machine::typical()))?;
//! assert!(placement.prediction.generate > 10.0);
//! assert!(placement.rules(&description)?.contains("cuda:0"));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod cost;
mod emit;
mod fit;
mod machine;
pub mod measure;
mod pattern;
mod report;
mod size;
mod solve;
mod streaming;
pub mod units;

use std::collections::BTreeMap;

use ktx_kernels::device::{Device, DeviceKind};
use ktx_kernels::kv::KvType;
use ktx_models::ModelDescription;
use ktx_ops::{OpError, WeightStore};

pub use cost::{Seconds, Workload};
pub use machine::{CpuSpeed, GpuSpeed, Machine, TypeRate};
pub use size::{ByteSize, ParseSizeError};
pub(crate) use streaming::streaming;

use crate::memory::{Bytes, DeviceMemory, PROCESS_BYTES};
use cost::Conditions;
use solve::{Choice, Goal, Limits, Spot, solve};
use units::Stages;

/// Tokens of a page of the cache.
const PAGE: usize = ktx_kernels::kv::PAGE_TOKENS;
/// Rows whose logits are computed at once.
const LOGIT_ROWS: u64 = 16;

/// Memory that may be used, in bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Budget {
    /// Of each GPU, from `cuda:0` on.
    pub gpus: Vec<u64>,
    /// Of main memory.
    pub ram: u64,
}

/// What a placement is wanted for.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Memory.
    pub budget: Budget,
    /// Tokens of the cache.
    pub context: usize,
    /// Prompt tokens of one call.
    pub chunk_size: usize,
    /// How cached values are stored.
    pub kv_type: KvType,
    /// Bytes of activations on a GPU, where they are known; else they are estimated.
    pub gpu_workspace: Option<u64>,
    /// Bytes of each GPU through which prompts stream the experts that main memory holds; none if the CPU
    /// computes them.
    pub streams: Option<u64>,
    /// What the machine will be asked for.
    pub workload: Workload,
    /// How fast the machine is.
    pub machine: Machine,
}

impl Request {
    /// A request with a context of 8192, chunks of 512 tokens and a cache in F16.
    pub fn new(budget: Budget, machine: Machine) -> Self {
        Self {
            budget,
            context: 8192,
            chunk_size: 512,
            kv_type: KvType::F16,
            gpu_workspace: None,
            streams: None,
            workload: Workload::default(),
            machine,
        }
    }
}

/// Why there is no placement.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// The model's tree or tensors.
    #[error(transparent)]
    Module(#[from] OpError),
    /// It does not fit.
    #[error(
        "the model does not fit: with {gpus} and all that fits there, main memory has to hold {needed} for a context of \
         {context}, and {ram} may be used; {advice}"
    )]
    DoesNotFit {
        /// The GPUs, in words.
        gpus: String,
        /// Least main memory.
        needed: Bytes,
        /// Main memory that may be used.
        ram: Bytes,
        /// Tokens of context.
        context: usize,
        /// What would fit.
        advice: String,
    },
    /// A GPU is too small for the driver alone.
    #[error(
        "{device} has {budget}, and the driver, kernels and activations take {reserved} of it: give it more \
         (--gpu-memory), a smaller --chunk-size, or leave it out"
    )]
    GpuTooSmall {
        /// The GPU.
        device: Device,
        /// What it has.
        budget: Bytes,
        /// What is gone before the first weight.
        reserved: Bytes,
    },
    /// The rules of the placement.
    #[error(transparent)]
    Rule(#[from] crate::rules::RuleError),
    /// The plan of the preset that the rules are made of.
    #[error(transparent)]
    Plan(#[from] crate::plan::PlanError),
}

/// Where the parts of one stage are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacedStage {
    /// Path of the stage's module: `model.layers.3`.
    pub path: String,
    /// Attention with its cache, norms and router; of embedding and head, all.
    pub home: Device,
    /// What every token passes besides, if there is such a part, and the paths of its modules.
    pub ffn: Option<(Device, Vec<String>)>,
    /// Routed experts, if there are any, and the path of their module.
    pub experts: Option<(Device, String)>,
}

/// Tokens a second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Prediction {
    /// Of a prompt.
    pub prefill: f64,
    /// Of an answer.
    pub generate: f64,
}

/// Which parts of a model go where.
#[derive(Debug, Clone, PartialEq)]
pub struct Placement {
    /// Embedding, layers, head.
    pub stages: Vec<PlacedStage>,
    /// Memory by device.
    pub memory: BTreeMap<Device, DeviceMemory>,
    /// Speed of this placement.
    pub prediction: Prediction,
    /// Speed with everything on the host.
    pub host_only: Prediction,
    /// What it was made for.
    pub request: Request,
}

/// Chooses devices for all parts of a model.
///
/// # Errors
/// [`PlacementError`] if the model does not fit, with the nearest settings that do.
pub fn place(
    description: &ModelDescription,
    store: &dyn WeightStore,
    request: &Request,
) -> Result<Placement, PlacementError> {
    let stages = Stages::of(&description.tree, store)?;
    let chain = conditions(request).chain(&stages);
    let limits = limits(&stages, request)?;
    let choices =
        solve(&chain, &limits, Goal::Time).ok_or_else(|| fit::does_not_fit(&stages, request))?;
    let host = Choice {
        home: None,
        ffn: None,
        experts: None,
    };
    let on_host = vec![host; choices.len()];
    let predict = |choices: &[Choice]| {
        let time = solve::time_of(&chain, choices);
        let chunk = request.chunk_size.min(request.workload.prompt).max(1);
        Prediction {
            prefill: chunk as f64 / time.prefill,
            generate: 1.0 / time.generate,
        }
    };
    let mut placement = Placement {
        memory: memory(&stages, &choices, request),
        prediction: predict(&choices),
        host_only: predict(&on_host),
        stages: stages
            .all
            .iter()
            .zip(&choices)
            .map(|(stage, choice)| PlacedStage {
                path: stage.path.clone(),
                home: device(choice.home),
                ffn: stage
                    .ffn
                    .as_ref()
                    .map(|(_, paths)| (device(choice.ffn), paths.clone())),
                experts: stage
                    .experts
                    .as_ref()
                    .map(|(_, path)| (device(choice.experts), path.clone())),
            })
            .collect(),
        request: request.clone(),
    };
    if request.streams.is_some() {
        placement.predict_streams(description, store)?;
    }
    Ok(placement)
}

fn device(spot: Spot) -> Device {
    match spot {
        None => Device::CPU,
        Some(gpu) => Device::new(DeviceKind::Cuda, gpu as u16),
    }
}

fn conditions(request: &Request) -> Conditions<'_> {
    Conditions {
        machine: &request.machine,
        workload: request.workload,
        cache_tokens: request.context.next_multiple_of(PAGE) as u64,
        kv_type: request.kv_type,
        chunk: request.chunk_size.min(request.context),
    }
}

/// Bytes of activations on a device that computes anything: the residual stream and its norms, the
/// widest part, and the logits.
fn scratch(stages: &Stages, request: &Request) -> u64 {
    let tokens = request.chunk_size.min(request.context) as u64;
    4 * (tokens * (4 * stages.hidden_size + stages.widest()) + LOGIT_ROWS * stages.vocab_size)
}

fn gpu_scratch(stages: &Stages, request: &Request) -> u64 {
    request.gpu_workspace.unwrap_or(scratch(stages, request))
}

/// What each device has left for weights and cache.
fn limits(stages: &Stages, request: &Request) -> Result<Limits, PlacementError> {
    let streams = request.streams.unwrap_or(0);
    let reserved = request.machine.gpu.reserved + gpu_scratch(stages, request) + streams;
    let gpu = |(index, budget): (usize, &u64)| {
        budget
            .checked_sub(reserved)
            .ok_or(PlacementError::GpuTooSmall {
                device: device(Some(index)),
                budget: Bytes(*budget),
                reserved: Bytes(reserved),
            })
    };
    Ok(Limits {
        gpus: request
            .budget
            .gpus
            .iter()
            .enumerate()
            .map(gpu)
            .collect::<Result<_, _>>()?,
        ram: (request.budget.ram).saturating_sub(scratch(stages, request) + PROCESS_BYTES),
    })
}

fn memory(
    stages: &Stages,
    choices: &[Choice],
    request: &Request,
) -> BTreeMap<Device, DeviceMemory> {
    let conditions = conditions(request);
    let mut all: BTreeMap<Device, DeviceMemory> = BTreeMap::new();
    all.entry(Device::CPU).or_default();
    for (stage, choice) in stages.all.iter().zip(choices) {
        let mut add = |part: &units::Part, spot| {
            let memory = all.entry(device(spot)).or_default();
            memory.weights += part.bytes();
            memory.kv += conditions.cache_bytes(part) * conditions.cache_tokens;
        };
        add(&stage.home, choice.home);
        if let Some((part, _)) = &stage.ffn {
            add(part, choice.ffn);
        }
        if let Some((part, _)) = &stage.experts {
            add(part, choice.experts);
        }
    }
    for (device, memory) in &mut all {
        match device.is_cpu() {
            true => {
                memory.scratch = scratch(stages, request);
                // A head on a GPU is a copy; on the host it is the embedding.
                if choices.last().is_some_and(|c| c.home.is_none()) {
                    memory.weights -= stages.tied_bytes;
                }
                memory.process = PROCESS_BYTES;
            }
            false => {
                memory.scratch = gpu_scratch(stages, request) + request.streams.unwrap_or(0);
                memory.process = request.machine.gpu.reserved;
            }
        }
    }
    all
}

impl Placement {
    /// Bytes of activations on a GPU, the same on each; none without GPUs.
    pub(crate) fn gpu_scratch(&self) -> Option<u64> {
        let mut gpus = self.memory.iter().filter(|(device, _)| !device.is_cpu());
        let streams = self.request.streams.unwrap_or(0);
        gpus.next().map(|(_, memory)| memory.scratch - streams)
    }

    /// Seconds of the workload that it was made for.
    pub fn seconds(&self) -> f64 {
        let Workload { prompt, generate } = self.request.workload;
        prompt as f64 / self.prediction.prefill + generate as f64 / self.prediction.generate
    }

    /// Bytes of the largest layer of experts that main memory holds while its attention is on a GPU: what
    /// prompts can stream there. None if there is no such layer.
    ///
    /// # Errors
    /// [`OpError`] if a tensor is missing or has another shape than the metadata say.
    pub(crate) fn most_to_stream(
        &self,
        description: &ModelDescription,
        store: &dyn WeightStore,
    ) -> Result<Option<u64>, OpError> {
        let stages = Stages::of(&description.tree, store)?;
        let streamed = stages.all.iter().filter_map(|s| s.experts.as_ref());
        let streamed = streamed.filter(|(_, path)| self.can_stream(path));
        Ok(streamed.map(|(part, _)| part.bytes()).max())
    }

    /// Whether the experts at a path are in main memory, and the attention before them is on a GPU.
    fn can_stream(&self, path: &str) -> bool {
        self.stages.iter().any(|stage| {
            let own = stage.experts.as_ref();
            own.is_some_and(|(device, own)| own == path && device.is_cpu()) && !stage.home.is_cpu()
        })
    }

    /// Takes what streams save of a prompt into the prediction.
    fn predict_streams(
        &mut self,
        description: &ModelDescription,
        store: &dyn WeightStore,
    ) -> Result<(), OpError> {
        let machine = &self.request.machine;
        let priced = streaming(&description.tree, store, machine, |path| {
            self.can_stream(path)
        })?;
        let Some(priced) = priced else { return Ok(()) };
        let request = &self.request;
        let rows = request.chunk_size.min(request.workload.prompt).max(1);
        let experts = self.stages.iter().filter_map(|s| s.experts.as_ref());
        let layers = experts.filter(|(_, path)| self.can_stream(path)).count();
        if rows < priced.from {
            return Ok(());
        }
        let saved = (priced.on_cpu(rows) - priced.on_both(rows)).max(0.0);
        let seconds = rows as f64 / self.prediction.prefill - layers as f64 * saved;
        // Attention and what else the GPU computes take at least as long as its rows of experts.
        let least = (layers * rows) as f64 * priced.gpu_row;
        self.prediction.prefill = rows as f64 / seconds.max(least);
        Ok(())
    }

    /// Where the module at a path runs.
    pub fn device_of(&self, path: &str) -> Device {
        let within = |outer: &str| {
            path.strip_prefix(outer)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        for stage in &self.stages {
            if !within(&stage.path) {
                continue;
            }
            if let Some((device, outer)) = &stage.experts
                && within(outer)
            {
                return *device;
            }
            return match &stage.ffn {
                Some((device, outers)) if outers.iter().any(|outer| within(outer)) => *device,
                _ => stage.home,
            };
        }
        match path {
            // The final norm works where the head does.
            "model.norm" => self.stages.last().map_or(Device::CPU, |s| s.home),
            "model" => self.first_layer(),
            _ => Device::CPU,
        }
    }

    /// Where the first layer's attention is.
    fn first_layer(&self) -> Device {
        self.stages.get(1).map_or(Device::CPU, |s| s.home)
    }

    /// Whether everything is on the host.
    pub fn is_host_only(&self) -> bool {
        self.memory.keys().all(|device| device.is_cpu())
    }
}
