//! The routed experts on a GPU; see `moe.cu`.
//!
//! Up to [`MAX_FEW_TOKENS`] tokens, and always with [`Precision::F32`], every token's experts are multiplied
//! on their own; more tokens are grouped by expert on the device, and groups are multiplied by the tensor
//! cores with halves, as `linear::cuda` describes. Which expert a token goes to is read on the device: a
//! captured launch serves every step.

use super::{ExpertStack, MoeWeights};
use crate::activation::GatedActivation;
use crate::activation::cuda::gated;
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, DeviceSlice, Gpu, Launch};
use crate::linear::Precision;
use crate::linear::cuda::gemm::{Halves, LARGE_TILE_TOKENS, SMALL_TILE_TOKENS, TileProduct};
use crate::linear::cuda::gemv::quantized_bytes;
use crate::linear::cuda::layout::RowLayout;
use crate::linear::cuda::upload::{DeviceRows, type_number};

const MODULE: &str = "moe/moe";
/// Tokens up to which each token's experts are multiplied on their own.
/// Measured on an H100 with 128 experts of [2048, 768], 8 chosen: 64 tokens 408 us, grouped 583 us.
pub const MAX_FEW_TOKENS: usize = 64;
/// Tokens that go through at a time, which bounds the scratch.
const CHUNK_TOKENS: usize = 2048;
/// Tokens of an expert from which on the larger tile is used.
const MANY_TOKENS: usize = 96;
/// Warps of a block of `ktx_moe_gate_up`.
const GATE_UP_WARPS: usize = 16;

/// The routed experts of one layer in a GPU's memory.
#[derive(Debug)]
pub struct GpuExperts {
    gate: DeviceRows,
    up: DeviceRows,
    down: DeviceRows,
    /// Of gate, up and down.
    biases: Option<[DeviceSlice; 3]>,
    activation: GatedActivation,
    /// The number of the first expert that is here, and how many there are. Choices of others add nothing.
    first: usize,
    experts: usize,
    /// Experts of the layer, those that are elsewhere too.
    layer_experts: usize,
}

/// Which experts work on which tokens.
#[derive(Debug, Clone, Copy)]
pub struct GpuRouting {
    /// Expert numbers, u32 in the bits of the floats, `[tokens, top_k]`.
    pub ids: DeviceMatrix,
    /// Their weights, `[tokens, top_k]`.
    pub weights: DeviceMatrix,
}

/// `Stack` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct Stack {
    rows: u64,
    bias: u64,
    ty: u32,
    row_count: u32,
    row_bytes: u32,
}

/// `Experts` of the source.
#[derive(Clone, Copy)]
#[repr(C)]
struct Call {
    gate: Stack,
    up: Stack,
    down: Stack,
    x: u64,
    ids: u64,
    weights: u64,
    residual: u64,
    h: u64,
    out: u64,
    alpha: f32,
    limit: f32,
    activation: u32,
    top_k: u32,
    first: u32,
    experts: u32,
}

/// Where the intermediate results of a chunk lie, in floats from the start of the scratch.
struct Places {
    x: usize,
    h: usize,
    h_halves: usize,
    y: usize,
    starts: usize,
    order: usize,
    positions: usize,
    tiles: usize,
    end: usize,
}

/// One chunk of tokens.
#[derive(Clone, Copy)]
struct Chunk {
    x: DeviceMatrix,
    routing: GpuRouting,
    residual: Option<DeviceMatrix>,
    out: DeviceMatrix,
    /// How many of the experts take part.
    experts: usize,
}

impl Chunk {
    fn slots(&self) -> usize {
        self.routing.ids.len()
    }
}

/// Tiles of `tile_tokens` that `slots` choices of `experts` experts can fill at most.
fn max_tiles(experts: usize, slots: usize, tile_tokens: usize) -> usize {
    slots / tile_tokens + experts.min(slots)
}

impl GpuExperts {
    /// Copies the experts to the GPU; complete when the call returns.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    pub fn upload(gpu: &Gpu, experts: &MoeWeights<'_>) -> Result<Self, CudaError> {
        Ok(Self {
            gate: upload_stack(gpu, &experts.gate)?,
            up: upload_stack(gpu, &experts.up)?,
            down: upload_stack(gpu, &experts.down)?,
            biases: upload_biases(gpu, experts)?,
            activation: experts.activation,
            first: 0,
            experts: experts.experts(),
            layer_experts: experts.experts(),
        })
    }

    /// Experts `first` and up of a layer, as many as there are rows for in gate, up and down; `biases` are
    /// those of all experts of the layer.
    ///
    /// # Panics
    /// If the shapes do not fit each other.
    pub(super) fn some(
        [gate, up, down]: [DeviceRows; 3],
        biases: Option<[DeviceSlice; 3]>,
        activation: GatedActivation,
        first: usize,
        layer_experts: usize,
    ) -> Self {
        let (hidden, intermediate) = (gate.cols, down.cols);
        let experts = gate.rows / intermediate;
        assert_eq!((up.rows, up.cols), (gate.rows, hidden), "experts: up");
        assert_eq!(down.rows, experts * hidden, "experts: down");
        let biases = biases.map(|[gate, up, down]| {
            let float = size_of::<f32>();
            [
                gate.starting_at(first * intermediate * float),
                up.starting_at(first * intermediate * float),
                down.starting_at(first * hidden * float),
            ]
        });
        Self {
            gate,
            up,
            down,
            biases,
            activation,
            first,
            experts,
            layer_experts,
        }
    }

    /// The rows of gate, up and down.
    pub(super) fn rows(&self) -> [&DeviceRows; 3] {
        [&self.gate, &self.up, &self.down]
    }

    /// The biases of gate, up and down, where there are any.
    pub(super) fn biases(&self) -> Option<&[DeviceSlice; 3]> {
        self.biases.as_ref()
    }

    /// Bytes that they take.
    pub fn bytes(&self) -> usize {
        let rows = [&self.gate, &self.up, &self.down].map(|rows| rows.buffer.bytes());
        let biases = self.biases.iter().flatten().map(DeviceSlice::bytes);
        rows.into_iter().chain(biases).sum()
    }

    /// Number of experts.
    pub fn experts(&self) -> usize {
        self.experts
    }

    /// Values of a token, in and out.
    pub fn hidden_size(&self) -> usize {
        self.gate.cols
    }

    /// Values between the projections.
    pub fn intermediate_size(&self) -> usize {
        self.down.cols
    }

    /// Floats of scratch for up to `tokens` tokens with `top_k` experts each.
    pub fn scratch_floats(&self, tokens: usize, top_k: usize) -> usize {
        Self::scratch_floats_of(self.sizes(), tokens, top_k)
    }

    /// The same for experts that are not made yet: `[experts, hidden, intermediate]`.
    pub fn scratch_floats_of(sizes: [usize; 3], tokens: usize, top_k: usize) -> usize {
        Self::places_of(sizes, tokens.min(CHUNK_TOKENS), top_k).end
    }

    fn sizes(&self) -> [usize; 3] {
        [self.experts, self.hidden_size(), self.intermediate_size()]
    }

    /// The weighted sum of the chosen experts' results for `x` `[tokens, hidden]`, plus `residual`, to `out`
    /// `[tokens, hidden]`. `residual` may be `out`; `out` must not be `x` with more than one chunk of tokens.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Panics
    /// If a shape does not fit, or `scratch` has less than [`Self::scratch_floats`].
    pub fn forward(
        &self,
        x: DeviceMatrix,
        routing: GpuRouting,
        residual: Option<DeviceMatrix>,
        out: DeviceMatrix,
        precision: Precision,
        scratch: DeviceMatrix,
    ) -> Result<(), CudaError> {
        self.forward_some(self.experts, x, routing, residual, out, precision, scratch)
    }

    /// The same with the first `experts` experts of those that are here alone.
    #[allow(
        clippy::too_many_arguments,
        reason = "`forward` and how many experts take part"
    )]
    pub(super) fn forward_some(
        &self,
        experts: usize,
        x: DeviceMatrix,
        routing: GpuRouting,
        residual: Option<DeviceMatrix>,
        out: DeviceMatrix,
        precision: Precision,
        scratch: DeviceMatrix,
    ) -> Result<(), CudaError> {
        self.check(x, &routing, residual, out);
        assert!(experts <= self.experts, "experts that are not here");
        let top_k = routing.ids.cols();
        assert!(
            scratch.len() >= self.scratch_floats(x.rows(), top_k),
            "experts: scratch"
        );
        if top_k == 0 {
            // Nothing was chosen: a sum of nothing is no case of any router.
            return Ok(());
        }
        let is_whole = experts == self.layer_experts;
        for first in (0..x.rows()).step_by(CHUNK_TOKENS) {
            let count = CHUNK_TOKENS.min(x.rows() - first);
            let part = |m: DeviceMatrix| m.row_range(first, count);
            let chunk = Chunk {
                x: part(x),
                routing: GpuRouting {
                    ids: part(routing.ids),
                    weights: part(routing.weights),
                },
                residual: residual.map(part),
                out: part(out),
                experts,
            };
            match precision {
                Precision::F32 => self.each_token(chunk, scratch, true)?,
                Precision::Int8
                    if count <= MAX_FEW_TOKENS && is_whole && self.fits_shared(top_k) =>
                {
                    self.each_token(chunk, scratch, false)?;
                }
                Precision::Int8 => self.grouped(chunk, scratch)?,
            }
        }
        Ok(())
    }

    fn check(
        &self,
        x: DeviceMatrix,
        routing: &GpuRouting,
        residual: Option<DeviceMatrix>,
        out: DeviceMatrix,
    ) {
        let (tokens, hidden) = (x.rows(), self.hidden_size());
        for matrix in [Some(x), Some(out), residual].into_iter().flatten() {
            assert_eq!(
                (matrix.rows(), matrix.cols()),
                (tokens, hidden),
                "experts: tokens"
            );
        }
        let ids = routing.ids;
        assert_eq!(ids.rows(), tokens, "experts: ids");
        assert_eq!(
            (ids.rows(), ids.cols()),
            (routing.weights.rows(), routing.weights.cols()),
            "experts: weights"
        );
    }

    fn gpu(&self) -> &Gpu {
        self.gate.buffer.gpu()
    }

    /// Whether a block has the shared memory for the quantised rows of one token.
    fn fits_shared(&self, top_k: usize) -> bool {
        let most = self.gpu().info().shared_per_block;
        quantized_bytes(self.hidden_size()) <= most
            && top_k * quantized_bytes(self.intermediate_size()) <= most
    }

    fn places(&self, tokens: usize, top_k: usize) -> Places {
        Self::places_of(self.sizes(), tokens, top_k)
    }

    fn places_of(sizes: [usize; 3], tokens: usize, top_k: usize) -> Places {
        let [experts, hidden, intermediate] = sizes;
        let slots = tokens * top_k;
        let mut end = 0;
        let mut place = |floats: usize| {
            let at = end;
            end += floats.next_multiple_of(64);
            at
        };
        Places {
            h: place(slots * intermediate),
            x: place(Halves::floats(tokens, hidden)),
            h_halves: place(Halves::floats(slots, intermediate)),
            // Holds up's results where gate's are of another type.
            y: place(slots * hidden.max(intermediate)),
            starts: place(experts + 1),
            order: place(slots),
            positions: place(slots),
            tiles: place(4 * max_tiles(experts, slots, SMALL_TILE_TOKENS)),
            end,
        }
    }

    fn stack(&self, rows: &DeviceRows, index: usize) -> Stack {
        Stack {
            rows: rows.buffer.address(),
            bias: self.biases.as_ref().map_or(0, |b| b[index].address()),
            ty: type_number(rows.layout.ty),
            row_count: (rows.rows / self.experts) as u32,
            row_bytes: rows.layout.bytes as u32,
        }
    }

    /// The kernels' number of the activation, with its alpha and limit.
    fn activation(&self) -> (u32, f32, f32) {
        match self.activation {
            GatedActivation::SwiGlu => (1, 0.0, 0.0),
            GatedActivation::ClampedSwiGlu { alpha, limit } => (2, alpha, limit),
        }
    }

    /// Every token's experts on their own.
    fn each_token(
        &self,
        chunk: Chunk,
        scratch: DeviceMatrix,
        exact: bool,
    ) -> Result<(), CudaError> {
        let gpu = self.gpu();
        let multiprocessors = gpu.info().multiprocessors;
        let (tokens, slots, top_k) = (chunk.x.rows(), chunk.slots(), chunk.routing.ids.cols());
        let (hidden, intermediate) = (self.hidden_size(), self.intermediate_size());
        let (activation, alpha, limit) = self.activation();
        let call = Call {
            gate: self.stack(&self.gate, 0),
            up: self.stack(&self.up, 1),
            down: self.stack(&self.down, 2),
            x: chunk.x.address(),
            ids: chunk.routing.ids.address(),
            weights: chunk.routing.weights.address(),
            residual: chunk.residual.map_or(0, DeviceMatrix::address),
            h: scratch.address(),
            out: chunk.out.address(),
            alpha,
            limit,
            activation,
            top_k: top_k as u32,
            first: self.first as u32,
            experts: chunk.experts as u32,
        };
        let start = |name: &str, grid: [usize; 2], warps: usize, shared: usize, columns: usize| {
            let launch = Launch::grid([grid[0], grid[1], 1], 32 * warps as u32);
            let args = [
                Arg::Struct(std::ptr::from_ref(&call).cast()),
                Arg::U32(columns as u32),
            ];
            // SAFETY: the kernel's arguments; `check` proved the shapes.
            unsafe {
                gpu.launch(
                    gpu.function(MODULE, name)?,
                    launch.with_shared(shared),
                    &args,
                )
            }
        };
        if exact {
            let blocks = |rows: usize| rows.div_ceil(8).min(multiprocessors);
            let grid = [blocks(intermediate), slots];
            start("ktx_moe_gate_up_f32", grid, 8, 0, hidden)?;
            let grid = [blocks(hidden), tokens];
            return start("ktx_moe_down_f32", grid, 8, 0, intermediate);
        }
        // Two blocks an SM over all choices, and one for the rows of all tokens' outputs.
        let most = intermediate.div_ceil(GATE_UP_WARPS).max(1);
        let blocks = (2 * multiprocessors).div_ceil(slots).clamp(1, most);
        start(
            "ktx_moe_gate_up",
            [blocks, slots],
            GATE_UP_WARPS,
            quantized_bytes(hidden),
            hidden,
        )?;
        let warps = (hidden * tokens).div_ceil(multiprocessors);
        let warps = warps.next_power_of_two().clamp(8, 32);
        let blocks = hidden
            .div_ceil(warps)
            .min(multiprocessors.div_ceil(tokens).max(1) * (32 / warps));
        let shared = top_k * quantized_bytes(intermediate);
        start(
            "ktx_moe_down",
            [blocks, tokens],
            warps,
            shared,
            intermediate,
        )
    }

    /// Tokens grouped by expert.
    fn grouped(&self, chunk: Chunk, scratch: DeviceMatrix) -> Result<(), CudaError> {
        let gpu = self.gpu();
        let (slots, top_k) = (chunk.slots(), chunk.routing.ids.cols());
        let places = self.places(chunk.x.rows(), top_k);
        let at = |floats: usize| scratch.address() + (floats * size_of::<f32>()) as u64;
        let tile_tokens = match slots / self.layer_experts.max(1) >= MANY_TOKENS {
            true => LARGE_TILE_TOKENS,
            false => SMALL_TILE_TOKENS,
        };
        let tiles = max_tiles(chunk.experts, slots, tile_tokens);
        self.sort(&chunk, &places, at(0), tile_tokens, tiles)?;

        let x = Halves::convert(gpu, chunk.x, at(places.x))?;
        let tile_product = |rows: &DeviceRows, index: usize, x: Halves, out: usize| TileProduct {
            bias: self.biases.as_ref().map_or(0, |b| b[index].address()),
            tiles: at(places.tiles),
            ..TileProduct::of(rows, rows.rows / self.experts, x, at(out))
        };
        let gate = TileProduct {
            order: at(places.order),
            ..tile_product(&self.gate, 0, x, places.h)
        };
        let (activation, alpha, limit) = self.activation();
        // SAFETY: the intermediate results lie in the scratch, whose size was checked, at places of their own.
        let h = unsafe { DeviceMatrix::new(at(places.h), slots, self.intermediate_size()) };
        if self.gate.layout == self.up.layout {
            let both = TileProduct {
                up_rows: self.up.buffer.address(),
                up_bias: self.biases.as_ref().map_or(0, |b| b[1].address()),
                activation,
                alpha,
                limit,
                ..gate
            };
            // SAFETY: `check` proved the shapes; the rest lies in the scratch.
            unsafe { both.launch(gpu, tile_tokens, tiles, 1) }?;
        } else {
            let up = TileProduct {
                order: at(places.order),
                ..tile_product(&self.up, 1, x, places.y)
            };
            // SAFETY: as above.
            unsafe {
                gate.launch(gpu, tile_tokens, tiles, 1)?;
                up.launch(gpu, tile_tokens, tiles, 1)?;
            }
            // SAFETY: as for `h`.
            let up = unsafe { DeviceMatrix::new(at(places.y), slots, self.intermediate_size()) };
            gated(gpu, self.activation, h, up, h)?;
        }
        let h = Halves::convert(gpu, h, at(places.h_halves))?;
        // SAFETY: as above.
        unsafe { tile_product(&self.down, 2, h, places.y).launch(gpu, tile_tokens, tiles, 1) }?;
        self.combine(&chunk, at(places.y), at(places.positions))
    }

    /// Groups the chunk's choices by expert and cuts the groups into tiles.
    fn sort(
        &self,
        chunk: &Chunk,
        places: &Places,
        scratch: u64,
        tile_tokens: usize,
        tiles: usize,
    ) -> Result<(), CudaError> {
        let gpu = self.gpu();
        let at = |floats: usize| Arg::Ptr(scratch + (floats * size_of::<f32>()) as u64);
        let args = [
            at(places.starts),
            at(places.order),
            at(places.positions),
            chunk.routing.ids.arg(),
            Arg::U32(chunk.slots() as u32),
            Arg::U32(chunk.routing.ids.cols() as u32),
            Arg::U32(self.first as u32),
        ];
        let launch = Launch::linear(chunk.experts, 256);
        // SAFETY: the kernel's arguments; the places have room for the chunk's choices.
        unsafe { gpu.launch(gpu.function(MODULE, "ktx_moe_sort")?, launch, &args) }?;
        let args = [
            at(places.tiles),
            at(places.starts),
            Arg::U32(chunk.experts as u32),
            Arg::U32(tile_tokens as u32),
            Arg::U32(tiles as u32),
        ];
        // SAFETY: as above; there is room for the most tiles that there can be.
        unsafe {
            gpu.launch(
                gpu.function(MODULE, "ktx_moe_tiles")?,
                Launch::linear(1, 1024),
                &args,
            )
        }
    }

    /// Adds up what the experts gave for each token.
    fn combine(&self, chunk: &Chunk, y: u64, positions: u64) -> Result<(), CudaError> {
        let gpu = self.gpu();
        let hidden = self.hidden_size();
        let args = [
            chunk.out.arg(),
            Arg::Ptr(y),
            chunk.routing.weights.arg(),
            chunk.routing.ids.arg(),
            Arg::Ptr(positions),
            Arg::Ptr(chunk.residual.map_or(0, DeviceMatrix::address)),
            Arg::U32(hidden as u32),
            Arg::U32(chunk.routing.ids.cols() as u32),
            Arg::U32(self.first as u32),
            Arg::U32(chunk.experts as u32),
        ];
        let launch = Launch::grid([hidden.div_ceil(1024), chunk.x.rows(), 1], 256);
        // SAFETY: the kernel's arguments; `check` proved the shapes, and the scratch holds the rest.
        unsafe { gpu.launch(gpu.function(MODULE, "ktx_moe_combine")?, launch, &args) }
    }
}

/// The biases of gate, up and down, where there are any.
pub(super) fn upload_biases(
    gpu: &Gpu,
    experts: &MoeWeights<'_>,
) -> Result<Option<[DeviceSlice; 3]>, CudaError> {
    let Some(b) = &experts.biases else {
        return Ok(None);
    };
    let copy = |values: &[f32]| DeviceBuffer::upload(gpu, values).map(DeviceSlice::from);
    Ok(Some([copy(b.gate)?, copy(b.up)?, copy(b.down)?]))
}

/// One projection of all experts. A tensor per expert becomes F16 where their types differ.
fn upload_stack(gpu: &Gpu, stack: &ExpertStack<'_>) -> Result<DeviceRows, CudaError> {
    if let Some(rows) = stack.all_rows() {
        return DeviceRows::upload(gpu, rows);
    }
    let experts: Vec<_> = (0..stack.experts())
        .filter_map(|i| stack.expert(i))
        .collect();
    let first = experts.first().map_or(ktx_gguf::GgmlType::F16, |w| w.ty());
    let ty = match experts.iter().all(|w| w.ty() == first) {
        true => RowLayout::of(first, stack.cols()).ty,
        false => ktx_gguf::GgmlType::F16,
    };
    let rows = DeviceRows::new(gpu, ty, stack.experts() * stack.rows(), stack.cols())?;
    for (index, weights) in experts.into_iter().enumerate() {
        rows.fill(index * stack.rows(), weights)?;
    }
    Ok(rows)
}
