//! What runs where, for the page's plan view.

use axum::Json;
use axum::extract::State;
use ktx_core::kernels::cuda::Gpu;
use ktx_core::kernels::device::Device;
use ktx_core::memory::{DeviceMemory, available_host_memory};
use ktx_core::{Engine, PlannedModel};
use serde::Serialize;
use utoipa::ToSchema;

use crate::app::App;

/// A model's modules with their operators, devices, sizes and rules. Made in two steps: sizes are
/// known before a model is loaded, operators after.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub struct PlanView {
    /// What the model is called.
    model: String,
    /// `general.architecture` of its file.
    architecture: String,
    /// Where the rules came from.
    rules: String,
    /// Tokens that a conversation holds.
    context: usize,
    /// Threads of the host.
    threads: usize,
    /// What the model takes of each device.
    devices: Vec<DeviceView>,
    /// All modules, parents before their children.
    modules: Vec<ModuleView>,
}

/// A device, with what the model takes of it in bytes.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct DeviceView {
    /// Its name in rules.
    name: String,
    /// Weights, each counted once, and what operators make of them.
    weights: u64,
    /// Cache of keys and values.
    cache: u64,
    /// Activations.
    scratch: u64,
    /// The program, or a GPU's driver and kernels.
    process: u64,
    /// Bytes that were free before the model was loaded, where the system tells.
    available: Option<u64>,
}

/// A module.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ModuleView {
    /// Its dotted path; empty for the root.
    path: String,
    /// Its class in the model.
    class: String,
    /// What it is to its parent.
    role: String,
    /// The operator in its place.
    operator: Option<String>,
    /// The device that reads prompts.
    prefill_device: Option<String>,
    /// The device that generates.
    device: Option<String>,
    /// Bytes of its own weights, without its children's.
    bytes: u64,
    /// Types of its weights.
    types: Vec<String>,
    /// The rule that placed it; none if it stays as the model defines it.
    rule: Option<RuleView>,
}

/// A rule.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct RuleView {
    /// Its place in the file, from 0.
    index: usize,
    /// Its line in the file, from 1.
    line: usize,
}

impl PlanView {
    /// What is known of a model before it is loaded.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape than the metadata say, or the plan cannot be carried out.
    pub fn of(planned: &PlannedModel) -> Result<Self, ktx_core::EngineError> {
        let weights = planned.module_weights()?;
        let module = |module: &ktx_core::ops::Module| {
            let entry = planned.plan().entry(&module.path);
            let own = weights.iter().find(|w| w.path == module.path);
            ModuleView {
                path: module.path.clone(),
                class: module.class.clone(),
                role: module.role().to_string(),
                operator: None,
                prefill_device: None,
                device: None,
                bytes: own.map_or(0, |w| w.bytes),
                types: own.map_or_else(Vec::new, |w| {
                    w.types.iter().map(|t| (*t).to_owned()).collect()
                }),
                rule: entry.and_then(|e| e.rule.as_ref()).map(|rule| RuleView {
                    index: rule.index,
                    line: rule.location.line,
                }),
            }
        };
        let estimate = planned.estimate()?;
        let devices = estimate.devices.iter();
        let modules = planned.description().tree.walk().map(module).collect();
        Ok(Self {
            rules: planned.rules_name().to_owned(),
            devices: devices
                .map(|(d, memory)| DeviceView::of(*d, memory))
                .collect(),
            modules,
            ..Self::default()
        })
    }

    /// Bytes of all weights.
    pub(crate) fn bytes(&self) -> u64 {
        self.modules.iter().map(|m| m.bytes).sum()
    }

    /// Adds what is known of the loaded model.
    pub(crate) fn with_engine(mut self, engine: &Engine, name: &str) -> Self {
        self.model = name.to_owned();
        self.architecture = engine.description().architecture.clone();
        self.context = engine.settings().context;
        self.threads = engine.settings().threads;
        for module in &mut self.modules {
            let injected = engine.report().modules.iter();
            if let Some(found) = injected.into_iter().find(|m| m.path == module.path) {
                module.operator = Some(found.class.to_owned());
                module.prefill_device = Some(found.placement.prefill.to_string());
                module.device = Some(found.placement.generate.to_string());
            }
        }
        self
    }
}

impl DeviceView {
    fn of(device: Device, memory: &DeviceMemory) -> Self {
        let available = match device.is_cpu() {
            true => available_host_memory(),
            false => {
                let free = Gpu::open(device.index()).and_then(|gpu| gpu.memory());
                free.ok().map(|(free, _)| free as u64)
            }
        };
        Self {
            name: device.to_string(),
            weights: memory.weights,
            cache: memory.kv,
            scratch: memory.scratch,
            process: memory.process,
            available,
        }
    }
}

/// How often each routed expert was chosen.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ExpertsView {
    /// By layer, from the first to the last.
    layers: Vec<LayerExperts>,
}

/// The routed experts of a layer.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct LayerExperts {
    /// The experts' path.
    path: String,
    /// Choices of each expert since the model was loaded, prompts included; those on a GPU do not count.
    counts: Vec<u64>,
}

/// How often each routed expert was chosen since the model was loaded.
#[utoipa::path(get, path = "/api/ktx/experts", tag = "ktx", responses((status = 200, body = ExpertsView)))]
pub(crate) async fn experts(State(app): State<App>) -> Json<ExpertsView> {
    let layers = app.engine().expert_uses().into_iter();
    let layers = layers.map(|(path, counts)| LayerExperts {
        path: path.to_owned(),
        counts,
    });
    Json(ExpertsView {
        layers: layers.collect(),
    })
}

/// The model's modules: path, class, operator, devices, bytes, and the rule that placed each.
#[utoipa::path(get, path = "/api/ktx/plan", tag = "ktx", responses((status = 200, body = PlanView)))]
pub(crate) async fn plan(State(app): State<App>) -> Json<PlanView> {
    Json(app.plan().clone())
}
