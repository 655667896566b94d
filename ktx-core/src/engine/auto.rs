//! Rules from automatic placement, and what does not fit.

use std::num::NonZeroUsize;

use ktx_kernels::cuda;
use ktx_kernels::cuda::Gpu;
use ktx_kernels::kv::KvType;
use ktx_kernels::linear::cuda::measured_flops;
use ktx_models::ModelDescription;
use ktx_ops::WeightStore;

use super::{MemoryCheck, Settings};
use crate::error::EngineError;
use crate::memory::available_host_memory;
use crate::placement::{Budget, GpuSpeed, Machine, Placement, Request, Workload, measure, place};

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
    /// What this machine has: the free memory of its first GPU. None without a GPU.
    pub fn on_this_machine() -> Option<Self> {
        let gpu = Gpu::open(0).ok()?;
        let (free, _) = gpu.memory().ok()?;
        Some(Self {
            gpu_memory: vec![free as u64],
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
        let request = Request {
            budget: Budget {
                gpus: self.gpu_memory.clone(),
                ram,
            },
            context: settings.context,
            chunk_size: settings.chunk_size,
            kv_element: match settings.kv_type {
                KvType::F32 => 4,
                _ => 2,
            },
            workload: self.workload,
            machine,
        };
        Ok(place(description, store, &request)?)
    }
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
