//! The operators that a runtime is made of, and how much memory they work in.

use std::collections::{BTreeMap, BTreeSet};

use ktx_kernels::device::Device;
use ktx_kernels::kv::PAGE_TOKENS;
use ktx_kernels::workspace::Workspace;
use ktx_ops::lora::{Adapter, AdapterId, attach_all, detach};
use ktx_ops::module::KvLayout;
use ktx_ops::{Capacity, Children, KModule, Linear, Model, OpError, Operator};

use super::{Settings, available_devices};
use crate::error::EngineError;
use crate::inject::InjectReport;

/// Rows whose logits are computed at once: the vocabulary is wide.
pub(super) const LOGIT_ROWS: usize = 16;

/// A model's operators, without weights, and the sizes of what they work in.
pub(crate) struct Parts {
    pub(super) model: Box<dyn Model>,
    pub(super) head: Box<dyn Linear>,
    pub(super) layouts: Vec<KvLayout>,
    pub(super) devices: Vec<Device>,
    pub(super) capacity: Capacity,
    pub(super) adapters: Vec<AdapterId>,
}

impl Parts {
    pub(crate) fn new(
        mut children: Children,
        report: &InjectReport,
        named: BTreeSet<Device>,
        settings: &Settings,
    ) -> Result<Self, EngineError> {
        let missing = |child: &str, role| OpError::Child {
            path: String::new(),
            child: child.to_owned(),
            role,
        };
        let devices = devices(report, named);
        if devices.len() > Workspace::MAX_DEVICES {
            let range = "rules may name 16 devices at most";
            return Err(EngineError::Setting {
                name: "the number of devices",
                value: devices.len(),
                range,
            });
        }
        let Some(Operator::Model(model)) = children.take("model") else {
            return Err(missing("model", ktx_ops::Role::Model).into());
        };
        let Some(Operator::Linear(head)) = children.take("lm_head") else {
            return Err(missing("lm_head", ktx_ops::Role::Linear).into());
        };
        let capacity = Capacity {
            tokens: settings.chunk_size.min(settings.context),
            context: settings.context,
            threads: settings.threads,
            deferred_experts: settings.deferred_experts,
            hot_experts: settings.hot_experts.is_some(),
        };
        Ok(Self {
            layouts: model.kv_layouts(),
            devices,
            model,
            head,
            capacity,
            adapters: Vec::new(),
        })
    }

    /// Gives an adapter's parts to the operators.
    pub(crate) fn attach(&mut self, id: AdapterId, adapter: &Adapter) -> Result<(), EngineError> {
        let (model, head): (&mut dyn KModule, &mut dyn KModule) =
            (self.model.as_mut(), self.head.as_mut());
        attach_all(&mut [model, head], id, adapter)?;
        self.adapters.push(id);
        Ok(())
    }

    pub(super) fn detach(&mut self, id: AdapterId) {
        detach(self.model.as_mut(), id);
        detach(self.head.as_mut(), id);
        self.adapters.retain(|i| *i != id);
    }

    /// Values of f32 that a step takes of the workspace at most.
    pub(super) fn workspace_values(&self) -> usize {
        let (model, head, capacity) = (&self.model, &self.head, self.capacity);
        let values = Workspace::values_for;
        // The others are the hidden state of a prompt that is read layer by layer, twice if on a GPU.
        let states = 1 + 2 * usize::from(model.layerwise().is_some());
        states * values(capacity.tokens, head.in_features())
            + 2 * values(LOGIT_ROWS, head.out_features())
            + model.scratch(capacity).max(head.scratch(capacity))
    }

    /// Bytes of the cache on each device: of one session in main memory, where pages are taken as they
    /// are used; of all on a GPU, where they are taken at once.
    pub(crate) fn kv_bytes(&self, settings: &Settings) -> BTreeMap<Device, u64> {
        let tokens = (pages_for(settings.context) * PAGE_TOKENS) as u64;
        let mut all = BTreeMap::new();
        for layout in &self.layouts {
            let sessions = match layout.device.is_cpu() {
                true => 1,
                false => settings.sessions as u64,
            };
            let row = settings.kv_type.bytes(layout.k_width + layout.v_width) as u64;
            let bytes = row.saturating_mul(tokens).saturating_mul(sessions);
            let sum: &mut u64 = all.entry(layout.device).or_default();
            *sum = sum.saturating_add(bytes);
        }
        all
    }

    /// Bytes of the workspace on each of its devices.
    pub(crate) fn scratch_bytes(&self) -> impl Iterator<Item = (Device, u64)> {
        let bytes = (self.workspace_values() as u64).saturating_mul(size_of::<f32>() as u64);
        self.devices.iter().map(move |device| (*device, bytes))
    }
}

/// All devices that a module runs on, in either phase, or that rules name besides; the host's is one
/// of them always.
fn devices(report: &InjectReport, named: BTreeSet<Device>) -> Vec<Device> {
    let available = available_devices();
    let placed = report
        .modules
        .iter()
        .flat_map(|m| [m.placement.prefill, m.placement.generate]);
    // Required devices are there; what is left names the place of a container, which holds nothing.
    let all: BTreeSet<Device> = placed
        .chain(named)
        .chain([Device::CPU])
        .filter(|device| device.is_cpu() || available.contains(device))
        .collect();
    all.into_iter().collect()
}

/// Pages that this many tokens take.
pub(crate) fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}
