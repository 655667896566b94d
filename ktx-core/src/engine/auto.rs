//! Rules from automatic placement, and what does not fit.

use std::num::NonZeroUsize;

use ktx_kernels::kv::KvType;
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
        let machine = self.machine.clone().unwrap_or_else(|| Machine {
            cpu: measure::cpu_speed(threads),
            gpu: GpuSpeed::TYPICAL,
        });
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
