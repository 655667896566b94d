//! How operators come by their weights: what they share while they are loaded, and the walk over the tree.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, OnceLock};

use ktx_gguf::{HUGE_PAGE, HugePages, Tensor};
use ktx_kernels::cuda::{CudaError, Gpu};
use ktx_kernels::device::Device;
use ktx_kernels::kv::PAGE_TOKENS;
use ktx_kernels::linear::WeightRows;
use ktx_kernels::linear::cuda::GpuMatrix;
use ktx_kernels::moe::MoeWeights;
use ktx_kernels::moe::cuda::GpuExperts;
use ktx_kernels::moe::stream::{ExpertStream, ExpertStreamBuilder, StreamedWeights, Uploads};
use ktx_kernels::pool::ThreadPool;
use ktx_kernels::rope::cuda::DeviceRopeTable;
use ktx_kernels::rope::{RopeConfig, RopeError, RopeTable};

use crate::build::{OpError, WeightStore};
use crate::experts::{ExpertUses, HotLayer, HotSet, OpenHot, streamed_weights};
use crate::linear::kernel_error;
use crate::module::KModule;
use crate::spec::ExpertsSpec;
use crate::weights::ExpertTensors;

/// Gives operators their weights and tells how far it is.
pub struct Loader<'a> {
    store: &'a dyn WeightStore,
    progress: &'a mut dyn FnMut(LoadProgress) -> bool,
    loaded: u64,
    seen: HashSet<String>,
    ropes: Vec<(RopeConfig, Arc<RopeTable>)>,
    gpu_ropes: Vec<(u16, RopeConfig, Arc<DeviceRopeTable>)>,
    gpu_matrices: HashMap<(u16, String), Arc<GpuMatrix>>,
    gpu_experts: HashMap<(u16, String), Arc<GpuExperts>>,
    streams: Vec<OpenStream>,
    /// By GPU; none if no experts are cached.
    hot: Option<Vec<OpenHot>>,
    context: usize,
    copies: Option<Copies<'a>>,
}

/// Copies of weights in main memory.
struct Copies<'a> {
    pool: &'a ThreadPool,
    pages: HugePages,
    /// By the place of the original and its length.
    made: HashMap<(usize, usize), Tensor>,
}

/// Experts of layers that one GPU computes prompts with, as far as they are known.
struct OpenStream {
    gpu: u16,
    layers: ExpertStreamBuilder,
    stream: Arc<OnceLock<ExpertStream>>,
}

/// A layer's experts in main memory, as a GPU computes prompts with them.
pub(crate) struct StreamedLayer {
    stream: Arc<OnceLock<ExpertStream>>,
    layer: usize,
}

impl StreamedLayer {
    /// The stream and the layer's number in it; none before [`Loader::start_streams`].
    pub(crate) fn stream(&self) -> Option<(&ExpertStream, usize)> {
        self.stream.get().map(|stream| (stream, self.layer))
    }
}

/// How much is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Bytes of weights that operators have taken so far.
    pub loaded: u64,
}

impl<'a> Loader<'a> {
    /// A loader; `progress` is called after each tensor and stops the load by returning false.
    pub fn new(
        store: &'a dyn WeightStore,
        progress: &'a mut dyn FnMut(LoadProgress) -> bool,
    ) -> Self {
        Self {
            store,
            progress,
            loaded: 0,
            seen: HashSet::new(),
            ropes: Vec::new(),
            gpu_ropes: Vec::new(),
            gpu_matrices: HashMap::new(),
            gpu_experts: HashMap::new(),
            streams: Vec::new(),
            hot: None,
            context: Self::CONTEXT,
            copies: None,
        }
    }

    /// Positions that tables on a GPU cover where nobody says how many.
    const CONTEXT: usize = 1 << 15;

    /// The same for sequences of so many tokens at most.
    pub fn with_context(self, context: usize) -> Self {
        Self { context, ..self }
    }

    /// The same with weights in main memory as copies in huge pages, which the pool's threads make.
    pub fn with_huge_pages(self, pool: &'a ThreadPool) -> Self {
        let copies = Copies {
            pool,
            pages: HugePages::default(),
            made: HashMap::new(),
        };
        Self {
            copies: Some(copies),
            ..self
        }
    }

    /// The tensor as the host's products read it: as it is, or as a copy in huge pages, one for all operators that ask
    /// for the same.
    ///
    /// # Errors
    /// When there is no memory for a copy.
    pub fn in_main_memory(&mut self, path: &str, tensor: &Tensor) -> Result<Tensor, OpError> {
        let Some(copies) = &mut self.copies else {
            return Ok(tensor.clone());
        };
        let place = tensor.bytes().as_ptr_range();
        let key = (place.start.addr(), place.end.addr());
        if let Some(copy) = copies.made.get(&key) {
            return Ok(copy.clone());
        }
        let pool = copies.pool;
        let fill = |from: &[u8], to: &mut [u8]| pool.copy(from, to, HUGE_PAGE);
        let copy = copies.pages.copy(tensor, fill);
        let copy = copy.map_err(|e| kernel_error(path, format!("a copy in huge pages: {e}")))?;
        tensor.release();
        copies.made.insert(key, copy.clone());
        Ok(copy)
    }

    /// A rotation's table on a GPU, one for all operators that ask for the same.
    ///
    /// # Errors
    /// What the GPU refuses.
    pub fn rope_table_on(
        &mut self,
        gpu: &Gpu,
        config: &RopeConfig,
        table: &RopeTable,
    ) -> Result<Arc<DeviceRopeTable>, CudaError> {
        let index = gpu.index();
        let known = self
            .gpu_ropes
            .iter()
            .find(|(i, c, _)| *i == index && c == config);
        if let Some((_, _, table)) = known {
            return Ok(Arc::clone(table));
        }
        // A page beyond the end: prompts are cut to whole pages.
        let positions = (self.context + PAGE_TOKENS).min(table.positions());
        let table = Arc::new(DeviceRopeTable::upload(gpu, table, positions)?);
        self.gpu_ropes
            .push((index, config.clone(), Arc::clone(&table)));
        Ok(table)
    }

    /// A matrix on a GPU, one for all operators that ask for the same tensor.
    ///
    /// # Errors
    /// What the GPU refuses, or a type that no GPU multiplies.
    pub fn matrix_on(
        &mut self,
        path: &str,
        gpu: &Gpu,
        tensor: &Tensor,
    ) -> Result<Arc<GpuMatrix>, OpError> {
        let key = (gpu.index(), tensor.name().to_owned());
        if let Some(matrix) = self.gpu_matrices.get(&key) {
            return Ok(Arc::clone(matrix));
        }
        let rows = WeightRows::of(tensor).map_err(|e| kernel_error(path, e))?;
        let matrix = GpuMatrix::upload(gpu, rows).map_err(|e| kernel_error(path, e))?;
        let matrix = Arc::new(matrix);
        self.gpu_matrices.insert(key, Arc::clone(&matrix));
        Ok(matrix)
    }

    /// The routed experts of the module at `path` on a GPU, one copy for all operators that ask there.
    ///
    /// # Errors
    /// What the GPU refuses, or `weights` is refused.
    pub fn experts_on(
        &mut self,
        path: &str,
        gpu: &Gpu,
        weights: impl FnOnce() -> Result<GpuExperts, OpError>,
    ) -> Result<Arc<GpuExperts>, OpError> {
        let key = (gpu.index(), path.to_owned());
        if let Some(experts) = self.gpu_experts.get(&key) {
            return Ok(Arc::clone(experts));
        }
        let experts = Arc::new(weights()?);
        self.gpu_experts.insert(key, Arc::clone(&experts));
        Ok(experts)
    }

    /// Adds a layer's experts, which stay in main memory, to those that are streamed to a GPU.
    pub(crate) fn stream_on(
        &mut self,
        gpu: &Gpu,
        weights: StreamedWeights,
        experts: &MoeWeights<'_>,
    ) -> Result<StreamedLayer, CudaError> {
        let known = self.streams.iter().position(|s| s.gpu == gpu.index());
        let at = known.unwrap_or_else(|| {
            self.streams.push(OpenStream {
                gpu: gpu.index(),
                layers: ExpertStreamBuilder::new(gpu),
                stream: Arc::default(),
            });
            self.streams.len() - 1
        });
        let open = &mut self.streams[at];
        Ok(StreamedLayer {
            layer: open.layers.push(weights, experts)?,
            stream: Arc::clone(&open.stream),
        })
    }

    /// Makes what was loaded ready: experts that are streamed to GPUs can be, now that all layers are known.
    /// Whoever loads a model calls this at the end.
    ///
    /// # Errors
    /// What a GPU refuses.
    pub fn start_streams(&mut self, uploads: Uploads) -> Result<(), CudaError> {
        for open in self.streams.drain(..) {
            let stream = open.layers.start(uploads)?;
            if let Some(error) = stream.refusal() {
                tracing::warn!(
                    gpu = open.gpu,
                    %error,
                    "the GPU cannot read the model's pages: experts go through pinned memory, which is slower"
                );
            }
            // Each is started once.
            let _ = open.stream.set(stream);
        }
        Ok(())
    }

    /// The same with caches on GPUs of the most used experts that live in main memory.
    pub fn with_hot_experts(self) -> Self {
        Self {
            hot: Some(Vec::new()),
            ..self
        }
    }

    /// Adds a layer's experts, which stay in main memory, to those of which a GPU holds the most used; none if that
    /// is not asked for, or the GPU does not read their types.
    pub(crate) fn hot_on(
        &mut self,
        path: &str,
        device: Device,
        spec: &ExpertsSpec,
        tensors: &[ExpertTensors; 3],
        biases: Option<[Vec<f32>; 3]>,
        uses: &Arc<ExpertUses>,
    ) -> Result<Option<HotLayer>, OpError> {
        let Some(open) = &mut self.hot else {
            return Ok(None);
        };
        let Some(weights) = streamed_weights(spec, tensors) else {
            tracing::warn!(path, "experts of these types cannot be cached on a GPU");
            return Ok(None);
        };
        let known = open.iter().position(|o| o.gpu().index() == device.index());
        let at = match known {
            Some(at) => at,
            None => {
                let gpu = Gpu::open(device.index()).map_err(|e| kernel_error(path, e))?;
                open.push(OpenHot::new(&gpu));
                open.len() - 1
            }
        };
        Ok(Some(open[at].push(spec, weights, biases, uses)))
    }

    /// Starts the caches of the most used experts, when all else has its memory; `bytes` says how much each takes of
    /// its GPU.
    ///
    /// # Errors
    /// What a GPU refuses.
    pub fn start_hot_experts(
        &mut self,
        bytes: impl Fn(&Gpu) -> Result<usize, CudaError>,
    ) -> Result<Vec<HotSet>, CudaError> {
        let mut all = Vec::new();
        let open = self.hot.take();
        if open.as_ref().is_some_and(Vec::is_empty) {
            tracing::warn!(
                "no experts are cached on a GPU: no layer has its experts in main memory and the rest on a GPU"
            );
        }
        for open in open.unwrap_or_default() {
            let bytes = bytes(open.gpu())?;
            let gpu = open.gpu().index();
            match open.start(bytes)? {
                Some(set) => all.push(set),
                None => tracing::warn!(
                    gpu,
                    bytes,
                    "too little memory of the GPU is left to cache experts: all are computed on the CPU"
                ),
            }
        }
        Ok(all)
    }

    /// The weights.
    pub fn store(&self) -> &'a dyn WeightStore {
        self.store
    }

    /// The table of this rotation, one for all operators that ask for the same. It covers `positions`
    /// or more, and computes what is used when it is first needed.
    pub fn rope_table(
        &mut self,
        config: &RopeConfig,
        positions: usize,
    ) -> Result<Arc<RopeTable>, RopeError> {
        let fits =
            |(c, t): &&(RopeConfig, Arc<RopeTable>)| c == config && t.positions() >= positions;
        if let Some((_, table)) = self.ropes.iter().find(fits) {
            return Ok(Arc::clone(table));
        }
        let table = Arc::new(RopeTable::new(config, positions)?);
        self.ropes.push((config.clone(), Arc::clone(&table)));
        Ok(table)
    }

    /// Notes that an operator took these weights; those that two operators share count once.
    pub fn took(&mut self, tensors: &[&Tensor]) -> Result<(), OpError> {
        for tensor in tensors {
            if self.seen.insert(tensor.name().to_owned()) {
                self.loaded += tensor.size();
            }
        }
        if (self.progress)(LoadProgress {
            loaded: self.loaded,
        }) {
            Ok(())
        } else {
            Err(OpError::Cancelled)
        }
    }
}

/// What is loaded of a module that has operators for prompts alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LoadScope {
    /// All of it.
    All,
    /// What generation needs.
    Generation,
    /// The operators for prompts.
    Prompt,
}

/// Loads a module and all below it.
pub fn load_all(
    module: &mut dyn KModule,
    scope: LoadScope,
    loader: &mut Loader<'_>,
) -> Result<(), OpError> {
    if scope != LoadScope::Prompt {
        module.load(loader)?;
    }
    if scope != LoadScope::Generation {
        for operator in module.prompt_operators() {
            load_all(operator, LoadScope::All, loader)?;
        }
    }
    module
        .children_mut()
        .into_iter()
        .try_for_each(|child| load_all(child, scope, loader))
}

/// Gives back the weights of the operators for prompts in a module and all below it.
pub fn unload_prompt_operators(module: &mut dyn KModule) {
    module.prompt_operators().into_iter().for_each(unload_all);
    module
        .children_mut()
        .into_iter()
        .for_each(unload_prompt_operators);
}

fn unload_all(module: &mut dyn KModule) {
    module.unload();
    module.prompt_operators().into_iter().for_each(unload_all);
    module.children_mut().into_iter().for_each(unload_all);
}
