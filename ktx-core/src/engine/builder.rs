//! From settings to a plan, and from a plan to a loaded engine.

use std::collections::HashSet;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use ktx_gguf::Gguf;
use ktx_kernels::cpu;
use ktx_kernels::cuda::{self, Gpu};
use ktx_kernels::device::{Device, DeviceKind};
use ktx_kernels::kv::{KvType, PAGE_TOKENS};
use ktx_kernels::linear::Precision;
use ktx_kernels::moe::stream::Uploads;
use ktx_kernels::pool::ThreadPool;
use ktx_models::{ModelDescription, describe_with};
use ktx_ops::{LoadProgress, Role, Streaming, try_registry};
use serde_json::{Map, Value, json};

use super::auto::machine;
use super::inputs::{Rules, Source, open, read_rules};
use super::parts::Parts;
use super::settings::{HostWeights, MemoryCheck, Settings, cacheable, deferrable, positive};
use super::{AdapterSet, AutoPlacement, Engine, HotMemory, Inner, LoadedAdapter, Runtime};
use crate::chat::ChatTemplate;
use crate::error::EngineError;
use crate::inject::{InjectReport, inject};
use crate::memory::{
    Bytes, DeviceMemory, MemoryEstimate, ModuleWeights, available_host_memory, module_weights,
    working,
};
use crate::placement::{Placement, streaming};
use crate::plan::{
    CheckMode, CheckReport, KeyStyle, Plan, check, named_devices, plan_model, require_devices,
};
use crate::rules::RuleVariables;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

/// Context of an engine whose settings name none: longer ones are asked for.
const DEFAULT_CONTEXT: usize = 8192;
/// Tokens of chunks whose shares of streamed experts a plan shows.
const STREAMED_TOKENS: [usize; 3] = [64, 512, 2048];
/// Prompt tokens of one forward call, if not set.
const DEFAULT_CHUNK: usize = 512;
/// Sessions whose full context fits at once, if not set.
const DEFAULT_SESSIONS: usize = 4;
/// Sequences of one step with a GPU, if not set.
const DEFAULT_SEQUENCES: usize = 32;
/// [`DEFAULT_SESSIONS`] with a GPU, whose memory is taken at once.
const GPU_SESSIONS: usize = 1;
/// Prompt tokens of one step with a GPU, which is fast with many.
const GPU_CHUNK: usize = 2048;

/// Whether the plan's devices are used as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DeviceMapping {
    /// As the rules say.
    #[default]
    AsPlanned,
    /// Every device is the CPU.
    AllOnCpu,
}

/// Settings of a new engine; see [`Engine::builder`].
#[derive(Default)]
pub struct EngineBuilder {
    source: Option<Source>,
    safetensors: Vec<PathBuf>,
    rules: Rules,
    variables: RuleVariables,
    mapping: DeviceMapping,
    default_device: Option<String>,
    threads: Option<usize>,
    context: Option<usize>,
    chunk_size: Option<usize>,
    sessions: Option<usize>,
    cache_tokens: Option<usize>,
    sequences: Option<usize>,
    precision: Precision,
    kv_type: Option<KvType>,
    deferred_experts: usize,
    hot_experts: Option<HotMemory>,
    host_weights: HostWeights,
    stream_from: Option<usize>,
    stream_share: Option<f64>,
    uploads: Uploads,
    memory: MemoryCheck,
    adapters: Vec<(PathBuf, f32)>,
}

impl EngineBuilder {
    /// The model's GGUF file, of a split one any part; or a directory that holds one such model, and maybe
    /// safetensors files, which then go before it as those of [`EngineBuilder::safetensors`] do.
    pub fn model(mut self, path: impl AsRef<Path>) -> Self {
        self.source = Some(Source::File(path.as_ref().to_owned()));
        self
    }

    /// A model that is opened already.
    pub fn gguf(mut self, gguf: Gguf) -> Self {
        self.source = Some(Source::Opened(gguf));
        self
    }

    /// Safetensors files of the same model (a file, an index, or a directory): a weight that they have is read from
    /// them and not from the GGUF file. May be called several times.
    pub fn safetensors(mut self, path: impl AsRef<Path>) -> Self {
        self.safetensors.push(path.as_ref().to_owned());
        self
    }

    /// Where the rules come from.
    pub fn rules(mut self, rules: Rules) -> Self {
        self.rules = rules;
        self
    }

    /// Gives a variable of the rule file a value, which comes before the file's own: `gpu`, `cuda:1`.
    pub fn rule_variable(mut self, name: &str, value: &str) -> Self {
        self.variables.set(name, value);
        self
    }

    /// Whether the plan's devices are used as they are.
    pub fn devices(mut self, mapping: DeviceMapping) -> Self {
        self.mapping = mapping;
        self
    }

    /// The device of modules that no rule matches; if not set, the best one that is there.
    pub fn default_device(mut self, device: &str) -> Self {
        self.default_device = Some(device.to_owned());
        self
    }

    /// Threads of the host, from 1; if not set, as many as this process may use, and one fewer where a GPU
    /// takes part, which one thread drives.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Tokens that one session holds at most; if not set, the model's context up to 8192.
    pub fn context(mut self, tokens: usize) -> Self {
        self.context = Some(tokens);
        self
    }

    /// Prompt tokens of one forward call; if not set, 512, and 2048 where a GPU takes part.
    pub fn chunk_size(mut self, tokens: usize) -> Self {
        self.chunk_size = Some(tokens);
        self
    }

    /// Sessions whose full context fits at once; if not set, 4, and 1 where a GPU takes part. Main memory
    /// is taken as it is used, a GPU's at once.
    pub fn sessions(mut self, sessions: usize) -> Self {
        self.sessions = Some(sessions);
        self
    }

    /// Tokens that the cache of all sessions and requests holds together, one context at least; if not set,
    /// that of [`EngineBuilder::sessions`].
    pub fn cache_tokens(mut self, tokens: usize) -> Self {
        self.cache_tokens = Some(tokens);
        self
    }

    /// Sequences that a [`Scheduler`](crate::serving::Scheduler) works on at once with a GPU, which keeps room
    /// for their page tables; if not set, 32.
    pub fn sequences(mut self, sequences: usize) -> Self {
        self.sequences = Some(sequences);
        self
    }

    /// How products take their activations; [`Precision::F32`] is for debugging an operator.
    pub fn precision(mut self, precision: Precision) -> Self {
        self.precision = precision;
        self
    }

    /// How keys and values are stored; if not set, F16, and F32 with [`Precision::F32`]. [`KvType::Q8_0`] takes
    /// half of F16's memory, rounds keys and values to 8 bits, and needs heads of a multiple of 32 values.
    pub fn kv_type(mut self, kv_type: KvType) -> Self {
        self.kv_type = Some(kv_type);
        self
    }

    /// Experts of each token, those with the smallest weights, that are added one layer later while tokens are
    /// generated: the CPU computes them while the GPU goes on. Answers change a little; if not set, none.
    pub fn deferred_experts(mut self, experts: usize) -> Self {
        self.deferred_experts = experts;
        self
    }

    /// Memory of each GPU for the most used of the experts that live in main memory, where their block is on a GPU:
    /// those are computed there while tokens are generated, the others on the CPU at the same time. Which they
    /// are follows what was chosen of late, so results depend on it in their last digits. If not set, none.
    pub fn hot_experts(mut self, memory: HotMemory) -> Self {
        self.hot_experts = Some(memory);
        self
    }

    /// Where weights lie that the CPU multiplies with; if not set, in the mapped file.
    pub fn host_weights(mut self, place: HostWeights) -> Self {
        self.host_weights = place;
        self
    }

    /// Rows from which on a prompt's chunk has its experts streamed to a GPU, where the plan puts prompts
    /// there and the experts in main memory; if not set, as the machine's speed makes it worth.
    pub fn stream_from(mut self, rows: usize) -> Self {
        self.stream_from = Some(rows);
        self
    }

    /// Part of each layer's experts that the GPU takes of a streamed chunk, 0 to 1, while the CPU computes
    /// the rest; if not set, as the machine's speed makes both end together.
    pub fn stream_share(mut self, share: f64) -> Self {
        self.stream_share = Some(share);
        self
    }

    /// How streamed experts come out of main memory.
    pub fn uploads(mut self, uploads: Uploads) -> Self {
        self.uploads = uploads;
        self
    }

    /// What happens if the model does not fit.
    pub fn memory_check(mut self, check: MemoryCheck) -> Self {
        self.memory = check;
        self
    }

    /// An adapter beside the base, with a factor on its own scale (1 is as it was trained): a GGUF file,
    /// or the directory of a PEFT adapter. May be called several times; all of them apply to every new
    /// session until it chooses others.
    pub fn lora(mut self, path: impl AsRef<Path>, scale: f32) -> Self {
        self.adapters.push((path.as_ref().to_owned(), scale));
        self
    }

    /// Opens the file, applies the rules, and checks the result; reads no weight.
    ///
    /// # Errors
    /// [`EngineError`] if the file is not supported or the rules cannot be applied to it.
    pub fn plan(self) -> Result<PlannedModel, EngineError> {
        let registry = try_registry()?;
        cpu::requested()?;
        cuda::check_choice().map_err(EngineError::Gpus)?;
        let mut weights = open(self.source, &self.safetensors)?;
        let description = describe_with(weights.gguf(), &|name| weights.shape(name))?;
        weights.take(&description.tree, &description.architecture)?;
        let context = positive(
            "context",
            self.context
                .unwrap_or(description.context_length.min(DEFAULT_CONTEXT)),
        )?;
        let sessions = match self.cache_tokens {
            Some(tokens) => Some(positive("cache_tokens", tokens)?.div_ceil(context)),
            None => self.sessions,
        };
        let mut settings = Settings {
            threads: positive(
                "threads",
                self.threads.unwrap_or(ThreadPool::default_threads().get()),
            )?,
            context,
            chunk_size: positive("chunk_size", self.chunk_size.unwrap_or(DEFAULT_CHUNK))?,
            sessions: positive("sessions", sessions.unwrap_or(DEFAULT_SESSIONS))?,
            sequences: positive("sequences", self.sequences.unwrap_or(DEFAULT_SEQUENCES))?,
            precision: self.precision,
            kv_type: match (self.kv_type, self.precision) {
                (Some(kv_type), _) => cacheable(kv_type, &description.tree)?,
                (None, Precision::F32) => KvType::F32,
                (None, _) => KvType::F16,
            },
            deferred_experts: deferrable(self.deferred_experts, &description.tree)?,
            hot_experts: self.hot_experts,
            host_weights: self.host_weights,
            streaming: None,
            uploads: self.uploads,
        };
        // What nobody set is set for a GPU.
        let (threads, chunk_size) = (self.threads, self.chunk_size);
        let host_threads = settings.threads;
        let for_gpus = |settings: &mut Settings| {
            settings.threads = threads.unwrap_or((host_threads - 1).max(1));
            settings.sessions = sessions.unwrap_or(GPU_SESSIONS);
            settings.chunk_size = chunk_size.unwrap_or(GPU_CHUNK);
        };
        let mut placement = None;
        let (rules, rules_name) = match &self.rules {
            Rules::Auto(auto) => {
                if !auto.gpu_memory.is_empty() {
                    for_gpus(&mut settings);
                }
                let placed = auto.place(&weights, &description, &settings, self.memory)?;
                let rules = AutoPlacement::rules(&placed, &description)?;
                placement = Some(placed);
                (rules, AutoPlacement::NAME.to_owned())
            }
            rules => read_rules(rules, &self.variables, &description.architecture)?,
        };
        let default_device = match self.default_device {
            // Every module has a rule; this is for the root, which computes nothing.
            Some(device) if placement.is_none() => device,
            _ => Device::CPU.to_string(),
        };
        let mut plan = plan_model(&description.tree, &rules, &default_device, &weights)?;
        if self.mapping == DeviceMapping::AllOnCpu {
            plan.map_devices_to_cpu(registry);
        }
        let named = named_devices(&plan, registry)?;
        if named.iter().any(|device| device.kind() == DeviceKind::Cuda) {
            for_gpus(&mut settings);
        }
        let streamed = streamed_modules(&plan, registry)?;
        if !streamed.is_empty() {
            let threads = NonZeroUsize::new(settings.threads).unwrap_or(NonZeroUsize::MIN);
            let machine = match &placement {
                Some(placement) => placement.request.machine.clone(),
                None => machine(threads),
            };
            let priced = streaming(&description.tree, &weights, &machine, |path| {
                streamed.contains(path)
            })?;
            settings.streaming = priced.map(|priced| Streaming {
                from: self.stream_from.unwrap_or(priced.from),
                share: self.stream_share,
                ..priced
            });
        }
        let report = check(
            &plan,
            &description.tree,
            registry,
            CheckMode::Model(&weights),
        );
        let mut adapters = AdapterSet::default();
        for (path, scale) in &self.adapters {
            adapters.read(path, *scale, &description)?;
        }
        Ok(PlannedModel {
            adapters,
            weights,
            description,
            rules_name,
            plan,
            report,
            settings,
            memory: self.memory,
            placement,
            streamed,
        })
    }

    /// Plans and loads.
    ///
    /// # Errors
    /// [`EngineError`] if the model cannot be opened, planned, or loaded.
    pub fn load(self) -> Result<Engine, EngineError> {
        self.plan()?.load(&mut |_| true)
    }
}

/// Routed experts that live in main memory while a GPU computes prompts with them.
fn streamed_modules(
    plan: &Plan,
    registry: &ktx_ops::Registry,
) -> Result<HashSet<String>, EngineError> {
    let mut all = HashSet::new();
    for entry in plan.entries().iter().filter(|e| e.role == Role::Experts) {
        let placement = plan.placement(entry, registry)?;
        if placement.generate.is_cpu() && placement.prefill.kind() == DeviceKind::Cuda {
            all.insert(entry.path.clone());
        }
    }
    Ok(all)
}

/// The devices that modules can be put on.
pub fn available_devices() -> Vec<Device> {
    let gpus = cuda::driver().map_or(&[][..], |driver| &driver.devices);
    let usable = gpus.iter().filter(|gpu| cuda::device(gpu.index).is_ok());
    let gpus = usable.map(|gpu| Device::new(DeviceKind::Cuda, gpu.index));
    std::iter::once(Device::CPU).chain(gpus).collect()
}

/// A model with its plan, before anything is loaded.
pub struct PlannedModel {
    weights: Weights,
    description: ModelDescription,
    rules_name: String,
    plan: Plan,
    report: CheckReport,
    settings: Settings,
    memory: MemoryCheck,
    placement: Option<Placement>,
    adapters: AdapterSet,
    /// Paths of experts that are streamed to a GPU.
    streamed: HashSet<String>,
}

impl PlannedModel {
    /// The placement that the rules came from, with [`Rules::Auto`].
    pub fn placement(&self) -> Option<&Placement> {
        self.placement.as_ref()
    }

    /// What the file describes.
    pub fn description(&self) -> &ModelDescription {
        &self.description
    }

    /// The GGUF file.
    pub fn gguf(&self) -> &Gguf {
        self.weights.gguf()
    }

    /// The weights of all files.
    pub fn weights(&self) -> &Weights {
        &self.weights
    }

    /// Where the rules came from, in words.
    pub fn rules_name(&self) -> &str {
        &self.rules_name
    }

    /// Which operator goes where, and why.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The plan for programs, as [`Plan::to_json`] has it. Experts that are streamed to a GPU have one field more:
    /// `streaming`, with `from_tokens`, the tokens of a prompt's chunk from which on that is faster than the
    /// CPU, and `gpu_share`, the part of the experts that the GPU takes for numbers of tokens.
    pub fn to_json(&self, keys: KeyStyle) -> Value {
        let mut plan = self.plan.to_json(keys);
        let Some(streaming) = &self.settings.streaming else {
            return plan;
        };
        let shares = STREAMED_TOKENS
            .iter()
            .map(|&tokens| (tokens.to_string(), streaming.share(tokens).into()));
        let shares: Map<String, Value> = shares.collect();
        let streaming = json!({ "from_tokens": streaming.from, "gpu_share": shares });
        for path in &self.streamed {
            plan[path]["streaming"] = streaming.clone();
        }
        plan
    }

    /// What the operators say to the plan.
    pub fn report(&self) -> &CheckReport {
        &self.report
    }

    /// The settings, defaults filled in.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The adapters, in the order in which they were named.
    pub fn adapters(&self) -> &[LoadedAdapter] {
        self.adapters.all()
    }

    /// Refuses a plan with errors, or with devices that are not there.
    ///
    /// # Errors
    /// [`EngineError::Check`] or [`EngineError::Device`].
    pub fn require(&self) -> Result<(), EngineError> {
        if !self.report.is_ok() {
            return Err(EngineError::Check(self.report.clone()));
        }
        Ok(require_devices(
            &self.plan,
            &available_devices(),
            try_registry()?,
        )?)
    }

    /// The weights of every module that has some.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape than the metadata say.
    pub fn module_weights(&self) -> Result<Vec<ModuleWeights>, EngineError> {
        Ok(module_weights(
            &self.description.tree,
            &self.plan,
            &self.weights,
        )?)
    }

    /// The memory that loading it takes, with the cache of one session.
    ///
    /// # Errors
    /// If the plan cannot be carried out.
    pub fn estimate(&self) -> Result<MemoryEstimate, EngineError> {
        let (runtime, _) = self.inject()?;
        self.estimate_of(&runtime)
    }

    fn inject(&self) -> Result<(Parts, InjectReport), EngineError> {
        self.require()?;
        // Sizes are trusted only after all tensors were seen to have them.
        self.module_weights()?;
        let (children, mut report) = inject(&self.description.tree, &self.plan, &self.weights)?;
        let named = named_devices(&self.plan, try_registry()?)?;
        let mut parts = Parts::new(children, &report, named, &self.settings)?;
        for loaded in self.adapters.all() {
            parts.attach(loaded.id(), loaded.adapter())?;
            report.note_adapter(loaded.name(), loaded.adapter());
        }
        Ok((parts, report))
    }

    fn estimate_of(&self, parts: &Parts) -> Result<MemoryEstimate, EngineError> {
        let mut estimate = MemoryEstimate::default();
        let mut seen = HashSet::new();
        for module in self.module_weights()? {
            let device = estimate.devices.entry(module.device).or_default();
            for (tensor, bytes) in module.tensors {
                if seen.insert((module.device, tensor)) {
                    device.weights += bytes;
                }
            }
        }
        for (device, bytes) in working::made(&self.description.tree, &self.plan, &self.weights)? {
            estimate.devices.entry(device).or_default().weights += bytes;
        }
        for (device, bytes) in working::streams(&self.description.tree, &self.plan, &self.weights)?
        {
            estimate.devices.entry(device).or_default().scratch += bytes;
        }
        let host = estimate.devices.entry(Device::CPU).or_default();
        let adapters = self.adapters.all().iter();
        host.weights += adapters.map(|a| a.adapter().bytes()).sum::<u64>();
        host.scratch += working::products(&self.description, &self.weights, &self.settings)?;
        host.process += working::process(&self.description, self.weights.gguf());
        for (device, bytes) in parts.kv_bytes(&self.settings) {
            estimate.devices.entry(device).or_default().kv += bytes;
        }
        for (device, bytes) in parts.scratch_bytes() {
            let memory = estimate.devices.entry(device).or_default();
            memory.scratch += bytes;
            if !device.is_cpu() {
                memory.scratch += self.settings.hot_experts.map_or(0, HotMemory::known);
                memory.process += GPU_PROCESS_BYTES;
            }
        }
        Ok(estimate)
    }

    /// Loads the weights. `progress` is called after each tensor and stops the load by returning false.
    ///
    /// # Errors
    /// [`EngineError`] if the plan has errors, a tensor is missing, or memory does not suffice.
    pub fn load(
        self,
        progress: &mut dyn FnMut(LoadProgress) -> bool,
    ) -> Result<Engine, EngineError> {
        let (parts, report) = self.inject()?;
        if self.memory == MemoryCheck::Refuse {
            self.require_memory(&self.estimate_of(&parts)?)?;
        }
        let tokenizer = Tokenizer::from_metadata(self.gguf().metadata())?;
        let template = ChatTemplate::from_metadata(self.gguf().metadata());
        let threads = NonZeroUsize::new(self.settings.threads).unwrap_or(NonZeroUsize::MIN);
        let runtime = Runtime::load(
            parts,
            &self.settings,
            ThreadPool::new(threads),
            Arc::new(self.weights),
            progress,
        )?;
        Ok(Engine {
            inner: Arc::new(Inner {
                expert_uses: runtime.expert_uses(),
                description: self.description,
                plan: self.plan,
                report,
                tokenizer,
                template,
                settings: self.settings,
                runtime: Mutex::new(runtime),
                default_adapters: self.adapters.active(),
                adapters: Mutex::new(self.adapters),
                trie: std::sync::OnceLock::new(),
            }),
        })
    }

    fn require_memory(&self, estimate: &MemoryEstimate) -> Result<(), EngineError> {
        let budget = self.placement.as_ref().map(|p| p.request.budget.ram);
        let available = match (available_host_memory(), budget) {
            (Some(system), Some(budget)) => system.min(budget),
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => return Ok(()),
        };
        for (device, memory) in &estimate.devices {
            if device.kind() == DeviceKind::Cuda {
                require_gpu_memory(*device, memory, self.settings.context)?;
            }
        }
        let host = estimate.host();
        match host.total().checked_sub(available) {
            None | Some(0) => Ok(()),
            Some(missing) => Err(not_enough(
                "",
                &host,
                available,
                missing,
                self.settings.context,
                "take a smaller quantisation of the model, or load it all the same and let the system page \
                 (--ignore-memory)",
            )),
        }
    }
}

/// What a process takes of a GPU's memory before it has a model: the driver's context and kernels.
const GPU_PROCESS_BYTES: u64 = 600 << 20;

fn require_gpu_memory(
    device: Device,
    memory: &DeviceMemory,
    context: usize,
) -> Result<(), EngineError> {
    let gpu = Gpu::open(device.index()).map_err(|e| ktx_ops::OpError::Workspace(e.into()))?;
    let (free, _) = gpu
        .memory()
        .map_err(|e| ktx_ops::OpError::Workspace(e.into()))?;
    // The process is on the GPU already.
    let memory = DeviceMemory {
        process: 0,
        ..*memory
    };
    match memory.total().checked_sub(free as u64) {
        None | Some(0) => Ok(()),
        Some(missing) => Err(not_enough(
            &format!(" on {device}"),
            &memory,
            free as u64,
            missing,
            context,
            "move modules to the CPU (--gpu-memory places them), or take a smaller quantisation of the model",
        )),
    }
}

/// The error of a model that does not fit, with the nearest settings that do.
fn not_enough(
    place: &str,
    host: &DeviceMemory,
    available: u64,
    missing: u64,
    context: usize,
    otherwise: &str,
) -> EngineError {
    // Activations that grow with the context are left as they are: what is recommended fits.
    let fixed = host.total() - host.kv;
    let per_token = host.kv / context as u64;
    let fitting = available
        .checked_sub(fixed)
        .and_then(|left| left.checked_div(per_token))
        .filter(|tokens| *tokens >= PAGE_TOKENS as u64);
    let advice = match fitting {
        Some(tokens) => {
            let tokens = tokens / PAGE_TOKENS as u64 * PAGE_TOKENS as u64;
            format!("it fits with --context {tokens}")
        }
        None => otherwise.to_owned(),
    };
    EngineError::NotEnoughMemory {
        place: place.to_owned(),
        needed: Bytes(host.total()),
        weights: Bytes(host.weights),
        kv: Bytes(host.kv),
        scratch: Bytes(host.scratch + host.process),
        available: Bytes(available),
        missing: Bytes(missing),
        context,
        advice,
    }
}
