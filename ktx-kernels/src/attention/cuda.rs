//! Attention on a GPU over the paged cache: [`gqa`], [`mla`], and what writes to the cache.
//!
//! Kernels read lengths and pages from the step's memory; a launch depends on the sequences' numbers of
//! new tokens alone, so that a captured one stays valid while contexts grow. Four kernels share the work:
//! `generate.cu` for few queries, `prompt.cu` for many and `latent.cu` for latent attention, all on tensor
//! cores over F16 and Q8_0 caches, and `scalar.cu` for every other shape, cache and GPU. Positions are cut into parts
//! where there are too few tiles of queries to fill the GPU, which `join.cu` puts together.

mod inputs;

pub use inputs::{DeviceNorm, DeviceRotation, RotatedParts, gqa_inputs, mla_inputs};

use super::{AttentionShape, MlaShape};
use crate::cuda::{Arg, CudaError, DeviceBuffer, DeviceMatrix, Gpu, Launch, StepView};
use crate::kv::{KvType, LayerKv, SequenceKv};

/// Blocks that leave parts of a result, at most.
const MOST_PARTS: usize = 320;
/// Parts of one tile, at most; `join.cu` has room for as many factors.
const MOST_SPLITS: usize = 512;
/// Pages of a part, at least; the kernels' `LEAST_PAGES`.
const LEAST_PAGES: u32 = 2;
/// Queries of a KV head up to which the kernel for few queries is used.
const FEW_QUERIES: usize = 32;

/// Queries of a tile of `scalar.cu`.
const SCALAR_ENTRIES: usize = 8;
const SCALAR_THREADS: usize = 128;
/// Columns of values that `scalar.cu` has threads for.
const SCALAR_COLUMNS: usize = 512;
/// Queries of a tile of `generate.cu` and positions of a warp's step.
const GENERATE_ENTRIES: usize = 16;
const GENERATE_TOKENS: usize = 16;
/// Its shared memory that is not dynamic, at most.
const GENERATE_STATIC: usize = 2048;
/// Queries of a tile of `prompt.cu`, positions of a step, and threads.
const PROMPT_ENTRIES: usize = 64;
const PROMPT_TOKENS: usize = 64;
const PROMPT_THREADS: usize = 128;
/// Widths that `latent.cu` is made for: compressed, rotated.
const LATENT_DIMS: (usize, usize) = (512, 64);
/// Positions of its step.
const LATENT_TOKENS: usize = 32;
/// Threads of `join.cu`.
const JOIN_THREADS: u32 = 256;
/// Padding of a row of halves in shared memory.
const PADDING: usize = 8;

/// Key and value head sizes of the tensor-core kernels.
const TENSOR_CORE_DIMS: [(usize, usize); 6] = [
    (64, 64),
    (80, 80),
    (96, 96),
    (128, 128),
    (192, 128),
    (256, 256),
];
/// First compute capability with the instructions that these kernels use.
const TENSOR_CORE_COMPUTE: u32 = 80;

impl AttentionShape {
    /// Scratch that [`gqa`] needs for any batch, in floats.
    pub fn device_scratch_floats(&self) -> usize {
        scratch_floats(self.v_head_dim)
    }
}

impl MlaShape {
    /// Scratch that [`mla`] needs for any batch, in floats.
    pub fn device_scratch_floats(&self) -> usize {
        scratch_floats(self.kv_lora)
    }
}

/// The parts of the largest tiles, each with values and a maximum and sum for every query.
fn scratch_floats(v_dim: usize) -> usize {
    MOST_PARTS * PROMPT_ENTRIES * (v_dim + 2)
}

/// Queries of grouped attention on a GPU.
#[derive(Debug, Clone, Copy)]
pub struct DeviceGqaQuery<'a> {
    /// Query rows, `[tokens, heads * k_head_dim]`.
    pub rows: DeviceMatrix,
    /// As [`GqaQuery::sinks`](super::GqaQuery::sinks).
    pub sinks: Option<&'a DeviceBuffer>,
}

/// Queries of absorbed latent attention on a GPU.
#[derive(Debug, Clone, Copy)]
pub struct DeviceMlaQuery {
    /// Queries multiplied into the compressed space, `[tokens, heads * kv_lora]`.
    pub latent: DeviceMatrix,
    /// Buffer with the rotated parts.
    pub rope: DeviceMatrix,
    /// As [`MlaQuery::rope_stride`](super::MlaQuery::rope_stride).
    pub rope_stride: usize,
    /// As [`MlaQuery::rope_offset`](super::MlaQuery::rope_offset).
    pub rope_offset: usize,
}

/// One launch's shape: what all kernels take.
struct Job<'a> {
    gpu: &'a Gpu,
    step: StepView,
    sequences: &'a [SequenceKv<'a>],
    cache: &'a DeviceBuffer,
    kv_type: KvType,
    heads: usize,
    kv_heads: usize,
    k_dim: usize,
    v_dim: usize,
    scale: f32,
    window: u32,
    sinks: u64,
    q: DeviceMatrix,
    out: DeviceMatrix,
    scratch: DeviceMatrix,
}

/// Tiles and parts of a launch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cut {
    entries: usize,
    tiles: usize,
    splits: usize,
}

impl Job<'_> {
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// Tiles of `entries` queries, cut into parts until there are `blocks` for each multiprocessor.
    fn cut(&self, entries: usize, blocks: usize) -> Cut {
        let queries = self.sequences.iter().map(|s| s.tokens * self.group());
        let tiles = queries.map(|n| n.div_ceil(entries)).sum::<usize>();
        let parts = MOST_PARTS.min(blocks * self.gpu.info().multiprocessors);
        let splits = parts / (tiles * self.kv_heads).max(1);
        Cut {
            entries,
            tiles,
            splits: splits.clamp(1, MOST_SPLITS.min(self.step.max_pages()).max(1)),
        }
    }

    fn tokens(&self) -> usize {
        self.sequences.iter().map(|s| s.tokens).max().unwrap_or(0)
    }

    fn batch_args(&self) -> [Arg; 6] {
        let step = self.step;
        [
            Arg::Ptr(step.first_row()),
            Arg::Ptr(step.tokens()),
            Arg::Ptr(step.past()),
            Arg::Ptr(step.pages()),
            Arg::U32(self.sequences.len() as u32),
            Arg::U32(step.max_pages() as u32),
        ]
    }

    fn run(&self, latent: Option<&DeviceMlaQuery>) -> Result<(), CudaError> {
        if self.out.is_empty() {
            return Ok(());
        }
        let tensor_cores = self.kv_type != KvType::F32 && self.gpu.compute() >= TENSOR_CORE_COMPUTE;
        let dims = (self.k_dim, self.v_dim);
        let cut = match latent {
            Some(query)
                if tensor_cores && dims == (LATENT_DIMS.0 + LATENT_DIMS.1, LATENT_DIMS.0) =>
            {
                self.latent(query)?
            }
            None if tensor_cores && TENSOR_CORE_DIMS.contains(&dims) => {
                if self.tokens() * self.group() <= FEW_QUERIES {
                    return self.generate();
                }
                self.prompt()?
            }
            _ => self.scalar(latent)?,
        };
        match cut.splits {
            1 => Ok(()),
            _ => self.join(cut),
        }
    }

    /// Not for an early start: the waiting blocks of a large kernel take room from the one before it
    /// (latent attention and its join are a fifth slower with it on an H100).
    fn grid(&self, cut: Cut, threads: usize) -> Launch {
        Launch::grid([cut.tiles, self.kv_heads, cut.splits], threads as u32)
    }

    /// The arguments of the tensor-core kernels.
    fn tensor_core_args(&self, cut: Cut) -> Vec<Arg> {
        let mut args = vec![
            self.q.arg(),
            Arg::Ptr(self.sinks),
            Arg::Ptr(self.cache.address()),
            self.out.arg(),
            self.scratch.arg(),
        ];
        args.extend(self.batch_args());
        args.extend([
            Arg::U32(self.heads as u32),
            Arg::U32(self.kv_heads as u32),
            Arg::F32(self.scale),
            Arg::U32(self.window),
            Arg::U32(cut.splits as u32),
        ]);
        args
    }

    /// The kernel of a kind for the cache's type and the heads' widths.
    fn named(&self, kind: &str) -> String {
        let (cache, k_dim, v_dim) = (self.kv_type.name(), self.k_dim, self.v_dim);
        format!("ktx_{kind}_{cache}_{k_dim}_{v_dim}")
    }

    /// The kernel for few queries, which joins its parts itself.
    fn generate(&self) -> Result<(), CudaError> {
        let (warps, stages, bytes) =
            generate_memory(self.k_dim, self.v_dim, self.gpu.info().shared_per_block);
        let cut = self.cut(GENERATE_ENTRIES, 1);
        let mut args = self.tensor_core_args(cut);
        args.push(Arg::U32(stages as u32));
        let name = self.named("generate");
        let function = self.gpu.function("attention/generate", &name)?;
        let launch = self.grid(cut, 32 * warps).with_shared(bytes).early();
        // SAFETY: the kernel's arguments; the callers checked every matrix and the cache against the shape.
        unsafe { self.gpu.launch(function, launch, &args) }
    }

    fn latent(&self, query: &DeviceMlaQuery) -> Result<Cut, CudaError> {
        let shared = self.gpu.info().shared_per_block;
        let wide = self.tokens() * self.heads > 16 && latent_memory(64, 8) <= shared;
        let (entries, warps, blocks) = if wide { (64, 8, 1) } else { (16, 4, 2) };
        let cut = self.cut(entries, blocks);
        let mut args = vec![
            self.q.arg(),
            query.rope.arg(),
            Arg::Ptr(self.cache.address()),
            self.out.arg(),
            self.scratch.arg(),
        ];
        args.extend(self.batch_args());
        args.extend([
            Arg::U32(self.heads as u32),
            Arg::U32(query.rope_stride as u32),
            Arg::U32(query.rope_offset as u32),
            Arg::F32(self.scale),
            Arg::U32(cut.splits as u32),
        ]);
        let launch = self.grid(cut, 32 * warps);
        let launch = launch.with_shared(latent_memory(entries, warps));
        let name = format!("ktx_latent_{}_{entries}", self.kv_type.name());
        let function = self.gpu.function("attention/latent", &name)?;
        // SAFETY: as above.
        unsafe { self.gpu.launch(function, launch, &args) }?;
        Ok(cut)
    }

    fn prompt(&self) -> Result<Cut, CudaError> {
        let cut = self.cut(PROMPT_ENTRIES, 2);
        let bytes = prompt_memory(self.k_dim, self.v_dim);
        let args = self.tensor_core_args(cut);
        let name = self.named("prompt");
        let function = self.gpu.function("attention/prompt", &name)?;
        let launch = self.grid(cut, PROMPT_THREADS).with_shared(bytes);
        // SAFETY: as above.
        unsafe { self.gpu.launch(function, launch, &args) }?;
        Ok(cut)
    }

    fn scalar(&self, latent: Option<&DeviceMlaQuery>) -> Result<Cut, CudaError> {
        assert!(
            self.v_dim <= SCALAR_COLUMNS,
            "attention on a GPU: values of {} elements; {SCALAR_COLUMNS} at most",
            self.v_dim
        );
        let cut = self.cut(SCALAR_ENTRIES, 2);
        let tail = latent.map_or(0, |query| query.rope.address());
        let mut args = vec![
            self.q.arg(),
            Arg::Ptr(tail),
            Arg::Ptr(self.sinks),
            Arg::Ptr(self.cache.address()),
            self.out.arg(),
            self.scratch.arg(),
        ];
        args.extend(self.batch_args());
        args.extend([
            Arg::U32(self.heads as u32),
            Arg::U32(self.kv_heads as u32),
            Arg::U32(self.k_dim as u32),
            Arg::U32(self.v_dim as u32),
            Arg::U32(latent.map_or(self.k_dim, |_| self.v_dim) as u32),
            Arg::U32(latent.map_or(0, |query| query.rope_stride) as u32),
            Arg::U32(latent.map_or(0, |query| query.rope_offset) as u32),
            Arg::I32(i32::from(latent.is_some())),
            Arg::F32(self.scale),
            Arg::U32(self.window),
            Arg::U32(cut.splits as u32),
        ]);
        let name = format!("ktx_attend_scalar_{}", self.kv_type.name());
        let floats = (self.k_dim + SCALAR_THREADS) * SCALAR_ENTRIES;
        let launch = self.grid(cut, SCALAR_THREADS);
        let launch = launch.with_shared(floats * size_of::<f32>());
        let function = self.gpu.function("attention/scalar", &name)?;
        // SAFETY: as above.
        unsafe { self.gpu.launch(function, launch, &args) }?;
        Ok(cut)
    }

    fn join(&self, cut: Cut) -> Result<(), CudaError> {
        let mut args = vec![Arg::Ptr(self.sinks), self.out.arg(), self.scratch.arg()];
        args.extend(self.batch_args());
        args.extend([
            Arg::U32(self.heads as u32),
            Arg::U32(self.kv_heads as u32),
            Arg::U32(cut.entries as u32),
            Arg::U32(self.v_dim as u32),
            Arg::U32(self.window),
            Arg::U32(cut.splits as u32),
            Arg::U32(LEAST_PAGES),
        ]);
        let launch = Launch::grid([cut.entries, cut.tiles, self.kv_heads], JOIN_THREADS);
        let function = self.gpu.function("attention/join", "ktx_attend_join")?;
        // SAFETY: as above; the parts are those that the kernel before left.
        unsafe { self.gpu.launch(function, launch, &args) }
    }
}

/// Warps, buffers of each, and bytes of shared memory of `generate.cu`: as many warps, then as many buffers
/// as there is room for.
fn generate_memory(k_dim: usize, v_dim: usize, shared: usize) -> (usize, usize, usize) {
    let row = k_dim + PADDING;
    let bytes = |warps: usize, stages: usize| {
        let stage = GENERATE_TOKENS * (row + v_dim + PADDING);
        2 * (GENERATE_ENTRIES * row + warps * stages * stage)
    };
    let choices = [(8, 4), (8, 3), (8, 2), (4, 4), (4, 3), (4, 2), (2, 3)];
    let fitting = choices
        .into_iter()
        .find(|(w, s)| bytes(*w, *s) + GENERATE_STATIC <= shared);
    let (warps, stages) = fitting.unwrap_or((2, 2));
    (warps, stages, bytes(warps, stages))
}

/// The structure `Shared` of `latent.cu`.
fn latent_memory(entries: usize, warps: usize) -> usize {
    let row = LATENT_DIMS.0 + LATENT_DIMS.1 + PADDING;
    let halves = (entries + 2 * LATENT_TOKENS) * row + entries * (LATENT_TOKENS + PADDING);
    let across = warps / (entries / 16);
    2 * halves + size_of::<f32>() * entries * (2 * across + 1)
}

fn prompt_memory(k_dim: usize, v_dim: usize) -> usize {
    let queries = if k_dim <= 128 {
        0
    } else {
        PROMPT_ENTRIES * (k_dim + PADDING)
    };
    2 * (queries + PROMPT_TOKENS * (k_dim + v_dim + 2 * PADDING))
}

fn device_cache<'a>(kv: &'a LayerKv, gpu: &Gpu) -> &'a DeviceBuffer {
    let cache = kv
        .device()
        .expect("attention on a GPU: the cache is in main memory");
    assert_eq!(
        cache.gpu().index(),
        gpu.index(),
        "attention: the cache is on another GPU"
    );
    cache
}

fn check_scratch(scratch: DeviceMatrix, floats: usize) {
    assert!(
        scratch.len() >= floats,
        "attention: {} floats of scratch, {floats} needed",
        scratch.len()
    );
}

fn tokens_of(sequences: &[SequenceKv<'_>], step: StepView) -> usize {
    assert!(
        sequences.len() <= step.capacity().sequences,
        "attention: sequences of the step"
    );
    sequences.iter().map(|sequence| sequence.tokens).sum()
}

/// As [`gqa`](super::gqa) on a GPU, of the step that `step` views: `sequences` are its sequences, of which
/// only the numbers of new tokens are used. `scratch` holds [`AttentionShape::device_scratch_floats`].
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If a matrix or the cache does not fit the shape, or the cache is not on this GPU.
#[allow(clippy::too_many_arguments)]
pub fn gqa(
    gpu: &Gpu,
    shape: &AttentionShape,
    kv: &LayerKv,
    step: StepView,
    sequences: &[SequenceKv<'_>],
    query: &DeviceGqaQuery<'_>,
    out: DeviceMatrix,
    scratch: DeviceMatrix,
) -> Result<(), CudaError> {
    shape.check();
    assert_eq!(
        kv.k_width(),
        shape.kv_heads * shape.k_head_dim,
        "gqa: key row of the cache"
    );
    assert_eq!(
        kv.v_width(),
        shape.kv_heads * shape.v_head_dim,
        "gqa: value row of the cache"
    );
    let tokens = tokens_of(sequences, step);
    let (q, heads) = (query.rows, shape.heads);
    assert_eq!(
        q.len(),
        tokens * heads * shape.k_head_dim,
        "gqa: query rows"
    );
    assert_eq!(out.len(), tokens * heads * shape.v_head_dim, "gqa: out");
    if let Some(sinks) = query.sinks {
        assert_eq!(sinks.bytes(), heads * size_of::<f32>(), "gqa: sinks");
    }
    check_scratch(scratch, shape.device_scratch_floats());
    let job = Job {
        gpu,
        step,
        sequences,
        cache: device_cache(kv, gpu),
        kv_type: kv.kv_type(),
        heads,
        kv_heads: shape.kv_heads,
        k_dim: shape.k_head_dim,
        v_dim: shape.v_head_dim,
        scale: shape.scale,
        window: shape
            .window
            .map_or(u32::MAX, |w| u32::try_from(w.get()).unwrap_or(u32::MAX)),
        sinks: query.sinks.map_or(0, DeviceBuffer::address),
        q,
        out,
        scratch,
    };
    job.run(None)
}

/// As [`mla`](super::mla) on a GPU; see [`gqa`]. `out` is `[tokens, heads * kv_lora]` and `scratch` holds
/// [`MlaShape::device_scratch_floats`].
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If a matrix or the cache does not fit the shape, or the cache is not on this GPU.
#[allow(clippy::too_many_arguments)]
pub fn mla(
    gpu: &Gpu,
    shape: &MlaShape,
    kv: &LayerKv,
    step: StepView,
    sequences: &[SequenceKv<'_>],
    query: &DeviceMlaQuery,
    out: DeviceMatrix,
    scratch: DeviceMatrix,
) -> Result<(), CudaError> {
    let &MlaShape {
        heads,
        kv_lora,
        rope,
        scale,
    } = shape;
    assert!(
        heads > 0 && kv_lora > 0,
        "mla: neither heads nor kv_lora of {shape:?} may be 0"
    );
    assert_eq!(kv.k_width(), kv_lora + rope, "mla: key row of the cache");
    assert_eq!(kv.v_width(), 0, "mla: value row of the cache");
    let tokens = tokens_of(sequences, step);
    assert_eq!(query.latent.len(), tokens * heads * kv_lora, "mla: latent");
    assert_eq!(out.len(), tokens * heads * kv_lora, "mla: out");
    let rope_end = (tokens * heads).checked_sub(1).map_or(0, |last| {
        query.rope_offset + last * query.rope_stride + rope
    });
    assert!(query.rope.len() >= rope_end, "mla: rope");
    check_scratch(scratch, shape.device_scratch_floats());
    let job = Job {
        gpu,
        step,
        sequences,
        cache: device_cache(kv, gpu),
        kv_type: kv.kv_type(),
        heads,
        kv_heads: 1,
        k_dim: kv_lora + rope,
        v_dim: kv_lora,
        scale,
        window: u32::MAX,
        sinks: 0,
        q: query.latent,
        out,
        scratch,
    };
    job.run(Some(query))
}

/// Stores the step's new rows in the cache, rounded to its type: `k` `[rows, k_width]`, and `v`
/// `[rows, v_width]` where the cache has values.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the rows do not fit the cache or the step, or the cache is not on this GPU.
pub fn append(
    gpu: &Gpu,
    kv: &LayerKv,
    step: StepView,
    k: DeviceMatrix,
    v: Option<DeviceMatrix>,
) -> Result<(), CudaError> {
    let cache = device_cache(kv, gpu);
    let rows = k.rows();
    assert_eq!(k.cols(), kv.k_width(), "append: width of the key rows");
    assert_eq!(
        v.map_or(0, DeviceMatrix::cols),
        kv.v_width(),
        "append: width of the value rows"
    );
    assert!(v.is_none_or(|v| v.rows() == rows), "append: value rows");
    assert!(rows <= step.capacity().rows, "append: rows of the step");
    if rows == 0 {
        return Ok(());
    }
    let name = format!("ktx_append_{}", kv.kv_type().name());
    let args = [
        k.arg(),
        Arg::Ptr(v.map_or(0, DeviceMatrix::address)),
        Arg::Ptr(cache.address()),
        Arg::Ptr(step.positions()),
        Arg::Ptr(step.row_sequence()),
        Arg::Ptr(step.pages()),
        Arg::U32(step.max_pages() as u32),
        Arg::U32(kv.k_width() as u32),
        Arg::U32(kv.v_width() as u32),
    ];
    let threads = kv.k_width().next_multiple_of(32).min(512) as u32;
    let function = gpu.function("attention/append", &name)?;
    // SAFETY: the kernel's arguments; widths checked above, and the step's pages are the cache's.
    unsafe { gpu.launch(function, Launch::linear(rows, threads).early(), &args) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_fits_the_shared_memory_of_every_generation() {
        // 80 and 87; 86, 89 and 120; 90 and 100.
        for shared in [163 * 1024, 99 * 1024, 227 * 1024] {
            for (k, v) in TENSOR_CORE_DIMS {
                let (warps, stages, bytes) = generate_memory(k, v, shared);
                assert!(bytes + GENERATE_STATIC <= shared, "{k} {v}");
                assert!((2..=4).contains(&stages));
                let meeting = warps * GENERATE_ENTRIES * (v + 4) * size_of::<f32>();
                let factors = MOST_PARTS * GENERATE_ENTRIES * size_of::<f32>();
                assert!(meeting.max(factors) <= bytes, "{k} {v}");
                assert!(prompt_memory(k, v) <= shared, "{k} {v}");
            }
            assert!(latent_memory(16, 4) <= shared);
        }
        assert!(latent_memory(64, 8) <= 163 * 1024);
    }
}
