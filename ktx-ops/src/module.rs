//! The traits of modules: what all have ([`KModule`]), and what each role computes.
//!
//! A forward call takes a [`Batch`] of sequences and works on handles into the [`Workspace`]; it
//! allocates nothing and reads everything that changes from step to step (ids, positions, page
//! tables, lengths) from the batch. Rows at module boundaries are f32.

use std::sync::Arc;

use ktx_kernels::attention::cuda::{DeviceNorm, DeviceRotation};
use ktx_kernels::cuda::DeviceBuffer;
use ktx_kernels::device::Device;
use ktx_kernels::kv::{LayerKv, PageId, SequenceKv};
use ktx_kernels::linear::cuda::GpuMatrix;
use ktx_kernels::linear::{Precision, WeightRows};
use ktx_kernels::moe::MoeScratch;
use ktx_kernels::pool::ThreadPool;
use ktx_kernels::workspace::{Act, Workspace};

use crate::build::OpError;
use crate::deferral::Deferral;
use crate::experts::{ExpertUses, PartHere};
pub use crate::loader::{LoadProgress, LoadScope, Loader, load_all, unload_prompt_operators};
use crate::lora::{ActiveAdapter, AdapterId, Attachment, RowAdapters};
use crate::recording::Recorder;

/// What a forward call does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Reads a prompt: many tokens of a sequence at once.
    Prefill,
    /// Generates: one token, or a few, of each sequence.
    Generate,
}

/// The rows of one sequence in a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceRows {
    /// First row in the batch.
    pub first_row: usize,
    /// Number of rows: the tokens that are new.
    pub tokens: usize,
    /// Number of tokens that are in the cache already.
    pub past: usize,
    /// The cache pages of the sequence; position `p` is in page `p / 64`, slot `p % 64`.
    pub pages: Vec<PageId>,
    /// The adapters that apply to all of it, its cached tokens included.
    pub adapters: Arc<[ActiveAdapter]>,
}

/// One step's input: the new tokens of some sequences.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Batch {
    /// Token ids `[rows]`.
    pub ids: Vec<u32>,
    /// Position of each row in its sequence `[rows]`.
    pub positions: Vec<u32>,
    /// Which rows belong to which sequence.
    pub sequences: Vec<SequenceRows>,
    /// Rows whose logits are wanted, ascending.
    pub outputs: Vec<usize>,
}

impl Batch {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.ids.len()
    }

    /// Removes all rows; keeps the memory.
    pub fn clear(&mut self) {
        self.ids.clear();
        self.positions.clear();
        self.sequences.clear();
        self.outputs.clear();
    }

    /// Adds the tokens of one sequence, which stand behind `past` cached ones.
    pub fn push(&mut self, ids: impl IntoIterator<Item = u32>, past: usize, pages: &[PageId]) {
        let first_row = self.rows();
        self.ids.extend(ids);
        let tokens = self.rows() - first_row;
        self.positions
            .extend((past..past + tokens).map(|p| p as u32));
        self.sequences.push(SequenceRows {
            first_row,
            tokens,
            past,
            pages: pages.to_vec(),
            adapters: Arc::default(),
        });
    }

    /// Says which adapters apply to the sequence that was pushed last.
    pub fn set_adapters(&mut self, adapters: &Arc<[ActiveAdapter]>) {
        if let Some(sequence) = self.sequences.last_mut() {
            sequence.adapters = Arc::clone(adapters);
        }
    }
}

/// Sees what modules compute, for tests and for debugging an operator.
pub trait Observer {
    /// `rows` of width `cols` left the module at `path`; `what` says which of its results this is.
    fn observe(&mut self, path: &str, what: &str, values: &[f32], cols: usize);
}

/// How prompts go through experts that live in main memory, where the rules have a GPU compute prompts.
///
/// A chunk's time is the longer of two: the GPU's experts come over the bus while the CPU computes the
/// rest. Seconds are those of all experts of one layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Streaming {
    /// Rows from which on a prompt's chunk has its experts streamed; with fewer the CPU is as fast.
    pub from: usize,
    /// Part of each layer's experts that the GPU takes; if not set, as much as makes both end together.
    pub share: Option<f64>,
    /// Seconds to upload them.
    pub upload: f64,
    /// Seconds on the CPU with one row, two, four and so on.
    pub cpu: [f64; 14],
    /// Seconds on the GPU for each row.
    pub gpu_row: f64,
    /// Seconds for each row to get to the CPU and back.
    pub handover_row: f64,
}

impl Streaming {
    /// Steps of the share: what differs from one measurement to the next is less.
    const STEPS: f64 = 32.0;

    /// Seconds before and after the CPU's part in which it waits: the attention of the layer, copies, starts of kernels.
    /// Measured on an H100 with 512 rows and PCIe 5, together with [`Self::handover_row`]: 1.6 ms.
    const HANDOVER: f64 = 1.2e-3;

    /// What experts take on the CPU beside uploads, over what they take alone. Measured on an H100's host: with 512
    /// rows the price alone says 0.7 as the best share, and 0.75 is.
    const BESIDE_UPLOADS: f64 = 1.3;

    /// Everything on the GPU.
    pub const WHOLE: Self = Self {
        from: 0,
        share: Some(1.0),
        upload: 0.0,
        cpu: [0.0; 14],
        gpu_row: 0.0,
        handover_row: 0.0,
    };

    /// Seconds on the CPU alone, with no uploads beside it.
    pub fn on_cpu(&self, rows: usize) -> f64 {
        let position = (rows.max(1) as f64).log2();
        let at = (position as usize).min(self.cpu.len() - 2);
        let [low, high] = [self.cpu[at], self.cpu[at + 1]];
        // Between two prices, and beyond the last, on a line.
        low + (high - low) * (rows as f64 / f64::from(1 << at) - 1.0)
    }

    /// Part of the experts that the GPU takes for so many rows.
    pub fn share(&self, rows: usize) -> f64 {
        if let Some(share) = self.share {
            return share.clamp(0.0, 1.0);
        }
        // Where the GPU's own work takes longer than the uploads, the CPU could not catch up.
        if rows as f64 * self.gpu_row >= self.upload {
            return 1.0;
        }
        // The CPU's part and what it waits for take as long as the GPU's uploads.
        let cpu = Self::BESIDE_UPLOADS * self.on_cpu(rows);
        let even = (cpu + self.handover(rows)) / (cpu + self.upload);
        ((even * Self::STEPS).round() / Self::STEPS).clamp(0.0, 1.0)
    }

    fn handover(&self, rows: usize) -> f64 {
        Self::HANDOVER + rows as f64 * self.handover_row
    }

    /// Seconds of a layer's experts for so many rows, with both devices.
    pub fn on_both(&self, rows: usize) -> f64 {
        let share = self.share(rows);
        let cpu = match share < 1.0 {
            true => (1.0 - share) * Self::BESIDE_UPLOADS * self.on_cpu(rows) + self.handover(rows),
            false => 0.0,
        };
        (share * self.upload).max(cpu)
    }

    /// How many of a layer's experts the GPU takes for so many rows: the first ones, one at least.
    pub fn experts(&self, rows: usize, experts: usize) -> usize {
        let share = self.share(rows) * experts as f64;
        (share.round() as usize).clamp(1, experts.max(1))
    }
}

/// All that a forward call works with.
pub struct Forward<'a> {
    /// Which operators run where a module has one for each phase, and on which of its devices.
    pub phase: Phase,
    /// Whether prompts are read. That is so in a prefill, and where a prompt is too short for a model
    /// that reads only long ones with the operators of that phase.
    pub prompt: bool,
    /// How matrix products take their activations.
    pub precision: Precision,
    /// The tokens.
    pub batch: &'a Batch,
    /// The cache pages and lengths of the batch's sequences, in their order.
    pub sequences: &'a [SequenceKv<'a>],
    /// Memory for activations.
    pub workspace: &'a mut Workspace,
    /// The cache, one entry for each attention, in order.
    pub kv: &'a mut [LayerKv],
    /// The host's threads.
    pub pool: &'a ThreadPool,
    /// Memory that the routed experts on the host work in.
    pub moe: &'a mut MoeScratch,
    /// When and how far experts that live in main memory are streamed to a GPU.
    pub streaming: Streaming,
    /// The adapters of the rows that the operator is given.
    pub adapters: RowAdapters,
    /// Number of the step, as GPUs know it.
    pub step: u32,
    /// Experts of each token that are added one layer later while tokens are generated.
    pub deferred_experts: usize,
    /// Set by the model while layers put experts off.
    pub deferral: Option<Deferral>,
    /// Set while a step is recorded, to be started again.
    pub recorder: Option<&'a mut Recorder>,
    /// Set while someone watches.
    pub observer: Option<&'a mut dyn Observer>,
}

impl Forward<'_> {
    /// Shows a result to the observer, if there is one.
    pub fn observe(&mut self, path: &str, what: &str, act: Act) {
        if let Some(observer) = &mut self.observer {
            match self.workspace.gpu(act.device()) {
                None => observer.observe(path, what, self.workspace.read(act), act.cols()),
                // What is refused here shows at the step's end.
                Some(_) => {
                    if let Ok(values) = self.workspace.download(act) {
                        observer.observe(path, what, &values, act.cols());
                    }
                }
            }
        }
    }

    /// The same values on another device: a copy in the workspace where it differs.
    pub fn moved(&mut self, x: Act, device: Device) -> Result<Act, OpError> {
        Ok(self.workspace.moved(x, device)?)
    }

    /// Takes `[rows, cols]` of the workspace.
    pub fn alloc(&mut self, device: Device, rows: usize, cols: usize) -> Result<Act, OpError> {
        Ok(self.workspace.alloc(device, rows, cols)?)
    }

    /// Runs `body` on rows that are not the caller's: `adapters` are those of the rows that it is
    /// given. For operators that gather rows before they call others.
    pub fn with_adapters<T>(
        &mut self,
        adapters: RowAdapters,
        body: impl FnOnce(&mut Self) -> Result<T, OpError>,
    ) -> Result<T, OpError> {
        let outer = std::mem::replace(&mut self.adapters, adapters);
        let result = body(self);
        self.adapters = outer;
        result
    }

    /// Runs `body` and gives back what it took of the workspace.
    pub fn scoped<T>(
        &mut self,
        body: impl FnOnce(&mut Self) -> Result<T, OpError>,
    ) -> Result<T, OpError> {
        let mark = self.workspace.mark();
        let result = body(self);
        self.workspace.release(&mark);
        result
    }
}

/// The largest step that the workspace is planned for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacity {
    /// Rows in one step.
    pub tokens: usize,
    /// Tokens of one sequence, cached and new.
    pub context: usize,
    /// The host's threads.
    pub threads: usize,
    /// Experts of each token that are added one layer later while tokens are generated.
    pub deferred_experts: usize,
    /// Whether a GPU holds the most used of the experts that live in main memory.
    pub hot_experts: bool,
}

/// Memory that a module holds beside the mapped file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holding {
    /// On which device.
    pub device: Device,
    /// How much.
    pub bytes: u64,
}

/// What every module has.
pub trait KModule: Send + Sync {
    /// Its dotted path.
    fn path(&self) -> &str;

    /// The class path of the operator that sits there.
    fn class_path(&self) -> &'static str;

    /// The device that holds its input and output in a phase.
    fn device(&self, phase: Phase) -> Device;

    /// Its parts.
    fn children(&self) -> Vec<&dyn KModule> {
        Vec::new()
    }

    /// Its parts, to load them.
    fn children_mut(&mut self) -> Vec<&mut dyn KModule> {
        Vec::new()
    }

    /// Operators in it that only prompts use, which are no children: they are loaded with it, or
    /// while a prompt is read layer by layer.
    fn prompt_operators(&mut self) -> Vec<&mut dyn KModule> {
        Vec::new()
    }

    /// Gives back its own weights and what it made of them; [`load`](Self::load) takes them again.
    fn unload(&mut self) {}

    /// Takes its own weights; its children are loaded by the caller.
    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        let _ = loader;
        Ok(())
    }

    /// Takes its own parts of an adapter; its children are asked by the caller. A part that no module
    /// takes makes the adapter unusable, so an operator that stands for a module with weights and
    /// ignores this is never computed without its adapter.
    fn attach(&mut self, attachment: &mut Attachment<'_>) {
        let _ = attachment;
    }

    /// Lets go of its own parts of an adapter.
    fn detach(&mut self, id: AdapterId) {
        let _ = id;
    }

    /// Memory that it holds itself beside the mapped file, once loaded; without its children.
    fn holding(&self) -> Vec<Holding> {
        Vec::new()
    }

    /// How often its experts were chosen, if it is experts that count; without its children.
    fn expert_uses(&self) -> Option<&Arc<ExpertUses>> {
        None
    }

    /// Whether a row's result is the same in both phases, its children's included: then prompts and
    /// generated tokens can share a call.
    fn same_in_both_phases(&self) -> bool {
        let children = self.children();
        self.device(Phase::Prefill) == self.device(Phase::Generate)
            && children.iter().all(|child| child.same_in_both_phases())
    }

    /// Values of f32 that one call takes of the workspace at most, its children's calls included.
    fn scratch(&self, capacity: Capacity) -> usize {
        let _ = capacity;
        0
    }
}

/// The largest scratch of some modules that run one after the other.
pub fn largest_scratch<'a>(
    modules: impl IntoIterator<Item = &'a dyn KModule>,
    capacity: Capacity,
) -> usize {
    modules
        .into_iter()
        .map(|m| m.scratch(capacity))
        .max()
        .unwrap_or(0)
}

/// A matrix of an operator in main memory, for callers that join several products in one parallel region.
pub struct HostMatrix<'a> {
    /// The file's blocks `[out, in]`.
    pub weights: WeightRows<'a>,
    /// Added to each row `[out]`.
    pub bias: Option<&'a [f32]>,
}

/// A matrix of an operator on a GPU.
#[derive(Clone, Copy)]
pub struct DeviceWeights<'a> {
    /// `[out, in]`.
    pub weights: &'a GpuMatrix,
    /// Added to each row `[out]`.
    pub bias: Option<&'a DeviceBuffer>,
}

/// `y = x W^T + b`.
pub trait Linear: KModule {
    /// Width of a row that comes in.
    fn in_features(&self) -> usize;

    /// Width of a row that goes out.
    fn out_features(&self) -> usize;

    /// `x` `[rows, in]` to `out` `[rows, out]`.
    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError>;

    /// The matrix, where this is a plain product on the file's blocks in main memory in that phase,
    /// but for what [`Self::add_low_rank`] adds.
    fn host_matrix(&self, phase: Phase) -> Option<HostMatrix<'_>> {
        let _ = phase;
        None
    }

    /// The matrix on a GPU, where this is a plain product there in that phase, for callers that join
    /// several products of the same activations.
    fn gpu_matrix(&self, device: Device, phase: Phase) -> Option<DeviceWeights<'_>> {
        let _ = (device, phase);
        None
    }

    /// Adds to `out` what adapters make of `x`. For callers that multiplied with
    /// [`Self::host_matrix`] themselves; [`Self::forward`] does it already.
    fn add_low_rank(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        let _ = (cx, x, out);
        Ok(())
    }
}

/// Normalises rows.
pub trait Norm: KModule {
    /// The weight on a GPU, for callers that normalise together with what comes next.
    fn gpu_weight(&self, device: Device) -> Option<DeviceNorm<'_>> {
        let _ = device;
        None
    }

    /// `x` `[rows, size]` to `out` of the same shape, which may be `x` itself.
    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError>;

    /// `hidden += y`, and the new `hidden` normalised to `out`; all of one shape.
    fn add_forward(
        &self,
        cx: &mut Forward<'_>,
        hidden: Act,
        y: Act,
        out: Act,
    ) -> Result<(), OpError> {
        cx.add(hidden, y)?;
        self.forward(cx, hidden, out)
    }
}

/// Which part of each row is rotated: `heads` spans of the rotary width, `stride` apart, from `offset`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeadSpan {
    /// Number of heads in a row.
    pub heads: usize,
    /// Values from one head to the next.
    pub stride: usize,
    /// Values before the rotated part of a head.
    pub offset: usize,
}

/// Rotates query and key rows by their positions.
pub trait Rope: KModule {
    /// The rotation on a GPU, for callers that rotate together with what comes next.
    fn gpu_rotation(&self, device: Device) -> Option<DeviceRotation<'_>> {
        let _ = device;
        None
    }

    /// Rotates `x` `[rows, ..]` in place; row `i` is at the batch's position `i`.
    fn forward(&self, cx: &mut Forward<'_>, x: Act, span: HeadSpan) -> Result<(), OpError>;
}

/// Rows of a table by token id.
pub trait Embedding: KModule {
    /// The batch's ids to `out` `[rows, hidden]`.
    fn forward(&self, cx: &mut Forward<'_>, out: Act) -> Result<(), OpError>;
}

/// Widths of one token's entry in the cache of one attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvLayout {
    /// Where the attention is that reads it.
    pub device: Device,
    /// Values of the key row.
    pub k_width: usize,
    /// Values of the value row; 0 where keys and values share one row.
    pub v_width: usize,
}

/// Which entry of [`Forward::kv`] an attention uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KvSlot(pub usize);

/// Attention over the batch's sequences.
pub trait Attention: KModule {
    /// What it caches of a token.
    fn kv_layout(&self) -> KvLayout;

    /// `x` `[rows, hidden]` to `out` of the same shape; writes the new tokens' keys and values to
    /// the cache first.
    fn forward(&self, cx: &mut Forward<'_>, slot: KvSlot, x: Act, out: Act) -> Result<(), OpError>;
}

/// Chooses experts for each row.
pub trait Gate: KModule {
    /// Experts chosen for a row.
    fn top_k(&self) -> usize;

    /// `x` `[rows, hidden]` to expert ids (u32 in the values' bits) and weights, both `[rows, top_k]`.
    fn forward(&self, cx: &mut Forward<'_>, x: Act, ids: Act, weights: Act) -> Result<(), OpError>;
}

/// The routed experts of a layer. A call is split in two so that experts on another device work
/// while the caller goes on: what is submitted is finished before the next submit.
pub trait Experts: KModule {
    /// Starts `out = sum_k weights[k] * expert[ids[k]](x)`; on one device it may do all the work.
    /// `x` and `out` are `[rows, hidden]`, `ids` and `weights` `[rows, top_k]`.
    fn submit(
        &self,
        cx: &mut Forward<'_>,
        x: Act,
        ids: Act,
        weights: Act,
        out: Act,
    ) -> Result<(), OpError>;

    /// Before a submit: the part of its choices that the device of the rows computes itself while the experts' own
    /// device computes the others. That device is given [`PartHere::elsewhere`] for `ids` then.
    fn part_here(
        &self,
        cx: &mut Forward<'_>,
        ids: Act,
        weights: Act,
    ) -> Result<Option<PartHere>, OpError> {
        let _ = (cx, ids, weights);
        Ok(None)
    }

    /// Computes such a part: `x` to `out`, both `[rows, hidden]`.
    fn compute_here(
        &self,
        cx: &mut Forward<'_>,
        x: Act,
        part: PartHere,
        out: Act,
    ) -> Result<(), OpError> {
        let _ = (cx, x, part, out);
        Ok(())
    }

    /// Where a call with so many rows takes its input and gives its result.
    fn place(&self, cx: &Forward<'_>, rows: usize) -> Device {
        let _ = rows;
        self.device(cx.phase)
    }

    /// Where the result lands before the block that asked for it takes it: `out` of a submit may
    /// be there or where the experts are.
    fn out_device(&self, phase: Phase) -> Device {
        self.device(phase)
    }

    /// Waits until `out` of the last submit is there.
    fn finish(&self, cx: &mut Forward<'_>, out: Act) -> Result<(), OpError>;
}

/// A feed-forward block.
pub trait Ffn: KModule {
    /// `x` `[rows, hidden]` to `out` of the same shape.
    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError>;
}

/// A decoder layer.
pub trait Layer: KModule {
    /// What its attention caches of a token.
    fn kv_layout(&self) -> KvLayout;

    /// Adds to the residual stream `hidden` `[rows, hidden]` in place.
    fn forward(&self, cx: &mut Forward<'_>, slot: KvSlot, hidden: Act) -> Result<(), OpError>;
}

/// A model that can read a long prompt layer by layer: all chunks of it pass through one layer before
/// the next one's operators for prompts are loaded.
pub trait Layerwise {
    /// Prompts of more tokens than this are read so, shorter ones with the operators of generation.
    fn threshold(&self) -> usize;

    /// Number of layers.
    fn layers(&self) -> usize;

    /// Loads what prompts need of a layer.
    fn enter(&mut self, layer: usize, loader: &mut Loader<'_>) -> Result<(), OpError>;

    /// Gives it back.
    fn leave(&mut self, layer: usize);

    /// The batch's embedded tokens to `hidden` `[rows, hidden]`.
    fn embed(&self, cx: &mut Forward<'_>, hidden: Act) -> Result<(), OpError>;

    /// One layer on `hidden` in place.
    fn layer(&self, cx: &mut Forward<'_>, layer: usize, hidden: Act) -> Result<(), OpError>;

    /// The normalised hidden states of the batch's output rows, `out` `[outputs, hidden]`.
    fn norm(&self, cx: &mut Forward<'_>, hidden: Act, out: Act) -> Result<(), OpError>;
}

/// Embedding, layers and final norm.
pub trait Model: KModule {
    /// What each layer's attention caches of a token, in order.
    fn kv_layouts(&self) -> Vec<KvLayout>;

    /// How long prompts are read layer by layer, if they are.
    fn layerwise(&self) -> Option<&dyn Layerwise> {
        None
    }

    /// The same, to load and to give back.
    fn layerwise_mut(&mut self) -> Option<&mut dyn Layerwise> {
        None
    }

    /// The batch to the normalised hidden states of its output rows, `out` `[outputs, hidden]`.
    fn forward(&self, cx: &mut Forward<'_>, out: Act) -> Result<(), OpError>;
}
