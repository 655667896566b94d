//! Rules from automatic placement, and what does not fit.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;

use ktx_kernels::cuda;
use ktx_kernels::cuda::Gpu;
use ktx_kernels::device::Device;
use ktx_kernels::linear::cuda::measured_flops;
use ktx_kernels::moe::stream;
use ktx_models::ModelDescription;
use ktx_ops::WeightStore;

use super::parts::Parts;
use super::{HotMemory, MemoryCheck, Settings, available_devices};
use crate::error::EngineError;
use crate::inject::inject;
use crate::memory::available_host_memory;
use crate::placement::{Budget, GpuSpeed, Machine, Placement, Request, Workload, measure, place};
use crate::plan::plan_model;
use crate::rules::RuleSet;

/// What automatic placement may use.
#[derive(Debug, Clone, Default)]
pub struct AutoPlacement {
    /// Bytes of each GPU, from `cuda:0` on; with none, everything is on the CPU.
    pub gpu_memory: Vec<u64>,
    /// Bytes of main memory; if not set, what is available.
    pub ram: Option<u64>,
    /// What the machine will be asked for.
    pub workload: Workload,
    /// How fast the machine is; if not set, the CPU is measured once and a GPU is a typical one.
    pub machine: Option<Machine>,
}

impl AutoPlacement {
    /// What this machine has: the free memory of its GPUs, none of one that cannot be used. None without a GPU.
    pub fn on_this_machine() -> Option<Self> {
        let found = &cuda::driver().ok()?.devices;
        let free = |info: &cuda::GpuInfo| {
            let free = Gpu::open(info.index).and_then(|gpu| gpu.memory());
            free.map_or(0, |(free, _)| free as u64)
        };
        let gpu_memory: Vec<u64> = found.iter().map(free).collect();
        gpu_memory.iter().any(|free| *free > 0).then(|| Self {
            gpu_memory,
            ..Self::default()
        })
    }

    /// The placement of a model.
    pub(super) fn place(
        &self,
        store: &dyn WeightStore,
        description: &ModelDescription,
        settings: &Settings,
        check: MemoryCheck,
    ) -> Result<Placement, EngineError> {
        let ram = match (self.ram, check) {
            (Some(ram), _) => ram,
            (None, MemoryCheck::Ignore) => u64::MAX,
            (None, MemoryCheck::Refuse) => available_host_memory().unwrap_or(u64::MAX),
        };
        let threads = NonZeroUsize::new(settings.threads).unwrap_or(NonZeroUsize::MIN);
        let machine = self.machine.clone().unwrap_or_else(|| machine(threads));
        let mut request = Request {
            budget: Budget {
                gpus: self.for_modules(settings),
                ram,
            },
            context: settings.context,
            chunk_size: settings.chunk_size,
            kv_type: settings.kv_type,
            gpu_workspace: None,
            streams: None,
            workload: self.workload,
            machine,
        };
        let placed = fitted(&request, store, description, settings)?;
        let Some(layer) = placed.most_to_stream(description, store)? else {
            return Ok(placed);
        };
        request.streams = Some(stream::memory_for(self.largest_gpu(), layer));
        match fitted(&request, store, description, settings) {
            Ok(streamed) if streamed.seconds() < placed.seconds() => Ok(streamed),
            // What streams take of a GPU can be worth more there, or be more than it has.
            _ => Ok(placed),
        }
    }

    /// Bytes of each GPU but for those that hot experts get.
    fn for_modules(&self, settings: &Settings) -> Vec<u64> {
        let hot = settings.hot_experts.map_or(0, HotMemory::known);
        let gpus = self.gpu_memory.iter();
        gpus.map(|bytes| bytes.saturating_sub(hot)).collect()
    }

    /// Memory of the largest GPU, all of it where it is of this machine: slots are no larger on any other.
    fn largest_gpu(&self) -> u64 {
        let gpus = self.gpu_memory.iter().enumerate();
        let memory = gpus.map(|(index, budget)| {
            cuda::device(index as u16).map_or(*budget, |gpu| gpu.memory as u64)
        });
        memory.max().unwrap_or(0)
    }

    /// The rules of a placement.
    pub(super) fn rules(
        placed: &Placement,
        description: &ModelDescription,
    ) -> Result<RuleSet, EngineError> {
        Ok(RuleSet::parse(&placed.rules(description)?, Self::NAME)?)
    }

    /// What messages call the rules.
    pub(super) const NAME: &str = "automatic placement";
}

/// How often a model is placed at most to learn what its activations take.
const PLACEMENTS: usize = 3;

/// The placement with room for what its operators work in.
fn fitted(
    request: &Request,
    store: &dyn WeightStore,
    description: &ModelDescription,
    settings: &Settings,
) -> Result<Placement, EngineError> {
    let mut request = request.clone();
    // What activations take of a GPU follows from its operators, and these from what they take.
    for _ in 0..PLACEMENTS {
        let placed = place(description, store, &request)?;
        let needed = gpu_workspace(&placed, store, description, settings)?;
        if needed <= placed.gpu_scratch() {
            return Ok(placed);
        }
        request.gpu_workspace = needed;
    }
    Ok(place(description, store, &request)?)
}

/// Bytes that the operators of a placement work in on each GPU; none if it uses no GPU of this machine.
fn gpu_workspace(
    placed: &Placement,
    store: &dyn WeightStore,
    description: &ModelDescription,
    settings: &Settings,
) -> Result<Option<u64>, EngineError> {
    let available = available_devices();
    let mut gpus = placed.memory.keys().filter(|device| !device.is_cpu());
    if !gpus.all(|gpu| available.contains(gpu)) {
        return Ok(None);
    }
    let rules = AutoPlacement::rules(placed, description)?;
    let tree = &description.tree;
    let plan = plan_model(tree, &rules, &Device::CPU.to_string(), store)?;
    let (children, report) = inject(tree, &plan, store)?;
    let parts = Parts::new(children, &report, BTreeSet::new(), settings)?;
    let on_gpus = parts.scratch_bytes().filter(|(device, _)| !device.is_cpu());
    Ok(on_gpus.map(|(_, bytes)| bytes).max())
}

/// This machine's speed.
pub(super) fn machine(threads: NonZeroUsize) -> Machine {
    Machine {
        cpu: measure::cpu_speed(threads),
        gpu: gpu_speed(),
    }
}

/// Rounded so that what is chosen does not change from one start to the next.
fn two_digits(rate: f64) -> f64 {
    let unit = 10f64.powf(rate.log10().floor() - 1.0);
    (rate / unit).round() * unit
}

/// The first GPU's speed, from what the driver says of its memory and from what some products and uploads
/// take; without one, a typical one's.
fn gpu_speed() -> GpuSpeed {
    /// Part of the nominal bandwidth that kernels reach.
    const REACHED: f64 = 0.8;
    let typical = GpuSpeed::TYPICAL;
    let Ok(gpu) = Gpu::open(0) else {
        return typical;
    };
    let _turn = cuda::turn();
    GpuSpeed {
        bandwidth: match gpu.info().nominal_bandwidth {
            0 => typical.bandwidth,
            nominal => nominal as f64 * REACHED,
        },
        flops: measured_flops(&gpu).map_or(typical.flops, two_digits),
        link: gpu.measured_uploads().map_or(typical.link, two_digits),
        ..typical
    }
}
