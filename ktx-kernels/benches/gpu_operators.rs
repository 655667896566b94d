//! Speed of attention and the small operators on a GPU: `cargo bench -p ktx-kernels --bench gpu_operators`, with
//! `-- attention` of attention alone.
//!
//! Every figure is one operator of one layer, from a captured graph that goes through as many layers'
//! caches as no second-level cache holds, as the steps of a model do. Bandwidth and arithmetic are those
//! that the operator needs at least: the cache read once, and only scores that are seen.

use ktx_gguf::GgmlType;
use ktx_kernels::activation::{self, GatedActivation};
use ktx_kernels::attention::cuda::{
    self as attention, DeviceGqaQuery, DeviceMlaQuery, DeviceNorm, DeviceRotation,
};
use ktx_kernels::attention::{AttentionShape, MlaShape};
use ktx_kernels::cuda::{
    CudaError, DeviceBuffer, DeviceMatrix, Event, Gpu, StepInputs, StepValues,
};
use ktx_kernels::gate::{self, GateConfig, Scoring, WeightScaling};
use ktx_kernels::heads::HeadRows;
use ktx_kernels::heads::cuda::DeviceHeads;
use ktx_kernels::kv::{KvType, LayerKv, PAGE_TOKENS, PageId, SequenceKv};
use ktx_kernels::linear::cuda::GpuMatrix;
use ktx_kernels::linear::{Precision, WeightRows};
use ktx_kernels::rope::cuda::DeviceRopeTable;
use ktx_kernels::rope::{self, RopeConfig, RopeHeads, RopeLayout, RopeTable};
use ktx_kernels::topk::cuda::Argmax;
use ktx_kernels::workspace::StepCapacity;
use ktx_kernels::{norm, rows};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Caches gone through in a graph hold at least this much together.
const BEYOND_CACHES: usize = 300 << 20;
/// Graph launches of a figure; the median counts.
const REPEATS: usize = 7;

fn main() -> Result<()> {
    let gpu = match Gpu::open(0) {
        Ok(gpu) => gpu,
        Err(error) => {
            println!("no GPU: {error}");
            return Ok(());
        }
    };
    println!("{}", gpu.info().name);
    if std::env::args().any(|arg| arg == "attention") {
        return attention_of_models(&gpu);
    }
    small(&gpu)?;
    for (rows, cols) in [
        (2048, 2048),
        (4096, 2048),
        (2048, 8192),
        (8192, 8192),
        (151_936, 2048),
    ] {
        for tokens in [1, 4, 8] {
            product(&gpu, rows, cols, tokens)?;
        }
    }
    attention_of_models(&gpu)?;
    for (out, inner, stride) in [(512, 128, 192), (128, 512, 512)] {
        for tokens in [1, 2, 4, 8, 16, 64, 512] {
            heads(&gpu, out, inner, stride, tokens)?;
        }
    }
    Ok(())
}

fn attention_of_models(gpu: &Gpu) -> Result<()> {
    for kv_type in [KvType::F16, KvType::Q8_0] {
        attention_over(gpu, kv_type)?;
    }
    Ok(())
}

/// Attention in the shapes of models over caches of a type.
fn attention_over(gpu: &Gpu, kv_type: KvType) -> Result<()> {
    println!(
        "{:34} {:>10} {:>10} {:>10}",
        format!("attention, {} cache", kv_type.name()),
        "us",
        "GB/s",
        "TFLOP/s"
    );
    for (heads, kv_heads, dim) in [(32, 4, 128), (32, 8, 64), (64, 8, 128), (32, 32, 128)] {
        for (sequences, context) in [(1, 128), (1, 1024), (1, 4096), (1, 32768), (16, 4096)] {
            gqa(
                gpu,
                kv_type,
                (heads, kv_heads, dim),
                sequences,
                context - 1,
                1,
            )?;
        }
        for (past, tokens) in [(0, 64), (0, 512), (0, 2048), (6144, 2048), (4096, 16)] {
            gqa(gpu, kv_type, (heads, kv_heads, dim), 1, past, tokens)?;
        }
    }
    gqa(gpu, kv_type, (16, 8, 256), 1, 4095, 1)?;
    gqa(gpu, kv_type, (16, 8, 256), 1, 0, 2048)?;
    for heads in [16, 128] {
        for (sequences, past, tokens) in [
            (1, 127, 1),
            (1, 4095, 1),
            (1, 32767, 1),
            (16, 4095, 1),
            (1, 0, 64),
            (1, 0, 512),
            (1, 0, 2048),
        ] {
            mla(gpu, kv_type, heads, sequences, past, tokens)?;
        }
    }
    Ok(())
}

/// A matrix and its memory, with values that do not matter but are finite.
struct Rows {
    _memory: DeviceBuffer,
    matrix: DeviceMatrix,
}

impl Rows {
    fn new(gpu: &Gpu, rows: usize, cols: usize) -> Result<Self> {
        let values: Vec<f32> = (0..rows * cols)
            .map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0)
            .collect();
        let memory = DeviceBuffer::upload(gpu, &values)?;
        // SAFETY: the memory holds the values and lives as long as the matrix.
        let matrix = unsafe { DeviceMatrix::new(memory.address(), rows, cols) };
        Ok(Self {
            _memory: memory,
            matrix,
        })
    }
}

/// Microseconds of one of `count` calls in a captured graph.
fn time(
    gpu: &Gpu,
    count: usize,
    call: impl Fn(usize) -> std::result::Result<(), CudaError>,
) -> Result<f64> {
    call(0)?;
    gpu.synchronize()?;
    gpu.begin_capture()?;
    for i in 0..count {
        call(i)?;
    }
    let graph = gpu.end_capture()?;
    let mut times = Vec::new();
    for _ in 0..REPEATS {
        let start = Event::record(gpu)?;
        graph.launch()?;
        times.push(Event::record(gpu)?.milliseconds_since(&start)?);
    }
    times.sort_by(f32::total_cmp);
    Ok(f64::from(times[REPEATS / 2]) * 1000.0 / count as f64)
}

fn report(what: &str, us: f64, bytes: f64, flops: f64) {
    println!(
        "{what:34} {us:10.2} {:10.0} {:10.1}",
        bytes / us / 1e3,
        flops / us / 1e6
    );
}

/// `count` sequences of one length and the step that computes their latest tokens.
fn step(
    gpu: &Gpu,
    count: usize,
    past: usize,
    tokens: usize,
) -> Result<(StepInputs, Vec<Vec<PageId>>)> {
    let each = (past + tokens).div_ceil(PAGE_TOKENS);
    let pages: Vec<Vec<PageId>> = (0..count)
        .map(|s| {
            (0..each)
                .map(|p| PageId((s * each + (p * 7919) % each) as u32))
                .collect()
        })
        .collect();
    let capacity = StepCapacity {
        rows: count * tokens,
        sequences: count,
        pages: each,
    };
    let mut inputs = StepInputs::new(gpu, capacity)?;
    let sequences = sequences(&pages, past, tokens);
    let positions: Vec<u32> = (0..count * tokens)
        .map(|r| (past + r % tokens) as u32)
        .collect();
    inputs.upload(&StepValues {
        number: 1,
        ids: &positions,
        positions: &positions,
        sequences: &sequences,
        outputs: &[],
    })?;
    gpu.synchronize()?;
    Ok((inputs, pages))
}

fn sequences(pages: &[Vec<PageId>], past: usize, tokens: usize) -> Vec<SequenceKv<'_>> {
    pages
        .iter()
        .map(|pages| SequenceKv {
            pages,
            past,
            tokens,
        })
        .collect()
}

fn caches(
    gpu: &Gpu,
    kv_type: KvType,
    widths: (usize, usize),
    pages: usize,
) -> Result<Vec<LayerKv>> {
    let bytes = kv_type.bytes((widths.0 + widths.1) * PAGE_TOKENS * pages);
    (0..BEYOND_CACHES.div_ceil(bytes).min(64))
        .map(|_| Ok(LayerKv::on_gpu(gpu, kv_type, widths.0, widths.1, pages)?))
        .collect()
}

/// Scores that are seen.
fn seen(count: usize, past: usize, tokens: usize) -> f64 {
    count as f64 * (tokens as f64 * past as f64 + tokens as f64 * (tokens + 1) as f64 / 2.0)
}

fn gqa(
    gpu: &Gpu,
    kv_type: KvType,
    (heads, kv_heads, dim): (usize, usize, usize),
    count: usize,
    past: usize,
    tokens: usize,
) -> Result<()> {
    let shape = AttentionShape {
        heads,
        kv_heads,
        k_head_dim: dim,
        v_head_dim: dim,
        scale: (dim as f32).powf(-0.5),
        window: None,
    };
    let (inputs, pages) = step(gpu, count, past, tokens)?;
    let sequences = sequences(&pages, past, tokens);
    let width = kv_heads * dim;
    let caches = caches(gpu, kv_type, (width, width), pages.len() * pages[0].len())?;
    let q = Rows::new(gpu, count * tokens, heads * dim)?;
    let out = Rows::new(gpu, count * tokens, heads * dim)?;
    let scratch = Rows::new(gpu, 1, shape.device_scratch_floats())?;
    let query = DeviceGqaQuery {
        rows: q.matrix,
        sinks: None,
    };
    let us = time(gpu, caches.len(), |i| {
        attention::gqa(
            gpu,
            &shape,
            &caches[i],
            inputs.view(),
            &sequences,
            &query,
            out.matrix,
            scratch.matrix,
        )
    })?;
    let bytes = kv_type.bytes(count * (past + tokens) * 2 * width) as f64;
    let what = format!("{heads}/{kv_heads}x{dim} {count} x ({past} + {tokens})");
    report(
        &what,
        us,
        bytes,
        4.0 * seen(count, past, tokens) * (heads * dim) as f64,
    );
    Ok(())
}

fn mla(
    gpu: &Gpu,
    kv_type: KvType,
    heads: usize,
    count: usize,
    past: usize,
    tokens: usize,
) -> Result<()> {
    let shape = MlaShape {
        heads,
        kv_lora: 512,
        rope: 64,
        scale: 0.07,
    };
    let (inputs, pages) = step(gpu, count, past, tokens)?;
    let sequences = sequences(&pages, past, tokens);
    let caches = caches(gpu, kv_type, (576, 0), pages.len() * pages[0].len())?;
    let latent = Rows::new(gpu, count * tokens, heads * 512)?;
    let rope = Rows::new(gpu, count * tokens, heads * 192)?;
    let out = Rows::new(gpu, count * tokens, heads * 512)?;
    let scratch = Rows::new(gpu, 1, shape.device_scratch_floats())?;
    let query = DeviceMlaQuery {
        latent: latent.matrix,
        rope: rope.matrix,
        rope_stride: 192,
        rope_offset: 128,
    };
    let layers = if tokens > 1 { 4 } else { caches.len() };
    let us = time(gpu, layers.min(caches.len()), |i| {
        attention::mla(
            gpu,
            &shape,
            &caches[i],
            inputs.view(),
            &sequences,
            &query,
            out.matrix,
            scratch.matrix,
        )
    })?;
    let bytes = kv_type.bytes(count * (past + tokens) * 576) as f64;
    let what = format!("MLA {heads} {count} x ({past} + {tokens})");
    report(
        &what,
        us,
        bytes,
        2.0 * seen(count, past, tokens) * (heads * (576 + 512)) as f64,
    );
    Ok(())
}

fn heads(gpu: &Gpu, out: usize, inner: usize, stride: usize, tokens: usize) -> Result<()> {
    let values = vec![0.01; 128 * out * inner];
    let layers: Vec<DeviceHeads> = (0..12)
        .map(|_| Ok(DeviceHeads::upload(gpu, 128, out, inner, &values)?))
        .collect::<Result<_>>()?;
    let x = Rows::new(gpu, tokens, 128 * stride)?;
    let y = Rows::new(gpu, tokens, 128 * out)?;
    let rows = HeadRows {
        width: 128 * stride,
        stride,
        offset: 0,
    };
    let us = time(gpu, layers.len(), |i| {
        layers[i].multiply(x.matrix, rows, y.matrix)
    })?;
    let what = format!("128 heads [{out}, {inner}] x {tokens}");
    report(
        &what,
        us,
        layers[0].bytes() as f64,
        2.0 * (128 * out * inner * tokens) as f64,
    );
    Ok(())
}

/// A matrix of Q4_K times a few tokens, bound by reading the matrix.
fn product(gpu: &Gpu, rows: usize, cols: usize, tokens: usize) -> Result<()> {
    let blocks = vec![0; GgmlType::Q4_K.row_bytes(cols).unwrap_or(0) * rows];
    let weights = WeightRows::new(GgmlType::Q4_K, rows, cols, &blocks)?;
    let matrices: Vec<GpuMatrix> = (0..(BEYOND_CACHES / blocks.len()).clamp(2, 200))
        .map(|_| GpuMatrix::upload(gpu, weights))
        .collect::<std::result::Result<_, _>>()?;
    let (x, y) = (Rows::new(gpu, tokens, cols)?, Rows::new(gpu, tokens, rows)?);
    let scratch = Rows::new(gpu, 1, GpuMatrix::scratch_floats(tokens, cols))?;
    let us = time(gpu, matrices.len(), |i| {
        matrices[i].multiply(x.matrix, None, y.matrix, Precision::Int8, scratch.matrix)
    })?;
    report(
        &format!("Q4_K [{rows}, {cols}] x {tokens}"),
        us,
        blocks.len() as f64,
        2.0 * (rows * cols * tokens) as f64,
    );
    Ok(())
}

/// Operators of one token, and of 2,048, bound by latency and by memory.
fn small(gpu: &Gpu) -> Result<()> {
    println!(
        "{:34} {:>10} {:>10}",
        "small operators, tokens", "us", "GB/s"
    );
    for tokens in [1, 2048] {
        let hidden = Rows::new(gpu, tokens, 2048)?;
        let y = Rows::new(gpu, tokens, 2048)?;
        let out = Rows::new(gpu, tokens, 2048)?;
        let weight = DeviceBuffer::upload(gpu, &[1.0f32; 2048])?;
        let head_weight = DeviceBuffer::upload(gpu, &[1.0f32; 128])?;
        let line = |what: &str, us: f64, floats: usize| {
            let what = format!("{what} {tokens}");
            println!(
                "{what:34} {us:10.2} {:10.0}",
                (4 * tokens * floats) as f64 / us / 1e3
            );
        };
        let us = time(gpu, 40, |_| {
            norm::cuda::rms_norm(gpu, hidden.matrix, &weight, 1e-6, out.matrix)
        })?;
        line("rms_norm 2048", us, 2 * 2048);
        let us = time(gpu, 40, |_| {
            norm::cuda::add_rms_norm(gpu, hidden.matrix, y.matrix, &weight, 1e-6, out.matrix)
        })?;
        line("add_rms_norm 2048", us, 4 * 2048);
        let us = time(gpu, 40, |_| {
            activation::cuda::add(gpu, hidden.matrix, y.matrix)
        })?;
        line("add 2048", us, 3 * 2048);
        let heads = Rows::new(gpu, tokens * 32, 128)?;
        let us = time(gpu, 40, |_| {
            norm::cuda::rms_norm(gpu, heads.matrix, &head_weight, 1e-6, heads.matrix)
        })?;
        line("rms_norm 32 heads x 128", us, 2 * 4096);
        let table = RopeTable::new(&RopeConfig::plain(128, 1e6), 4096)?;
        let table = DeviceRopeTable::upload(gpu, &table, 4096)?;
        let positions = DeviceBuffer::upload(gpu, &vec![77u32; tokens])?;
        let q = Rows::new(gpu, tokens, 4096)?;
        let span = RopeHeads::contiguous(32, 128, 0);
        let us = time(gpu, 40, |_| {
            rope::cuda::rope(
                gpu,
                &table,
                RopeLayout::Half,
                &span,
                positions.address(),
                q.matrix,
            )
        })?;
        line("rope 32 heads x 128", us, 2 * 4096);
        let gate_up = Rows::new(gpu, tokens, 2 * 6144)?;
        let gated = Rows::new(gpu, tokens, 6144)?;
        let us = time(gpu, 40, |_| {
            activation::cuda::gated_joined(
                gpu,
                GatedActivation::SwiGlu,
                gate_up.matrix,
                gated.matrix,
            )
        })?;
        line("silu * up 6144", us, 3 * 6144);
        let logits = Rows::new(gpu, tokens, 128)?;
        let (ids, weights) = (Rows::new(gpu, tokens, 8)?, Rows::new(gpu, tokens, 8)?);
        let config = GateConfig {
            experts: 128,
            top_k: 8,
            scoring: Scoring::Softmax,
            groups: None,
            scaling: WeightScaling::Normalise,
        };
        let us = time(gpu, 40, |_| {
            gate::cuda::route(
                gpu,
                &config,
                logits.matrix,
                None,
                ids.matrix,
                weights.matrix,
            )
        })?;
        line("route 8 of 128", us, 128 + 16);
        let us = time(gpu, 40, |_| {
            rows::cuda::gather_rows(gpu, hidden.matrix, positions.address(), out.matrix)
        })?;
        line("gather 2048", us, 2 * 2048);
        let (inputs, pages) = step(gpu, 1, 0, tokens)?;
        let kv = LayerKv::on_gpu(gpu, KvType::F16, 512, 512, pages[0].len())?;
        let (k, v) = (Rows::new(gpu, tokens, 512)?, Rows::new(gpu, tokens, 512)?);
        let us = time(gpu, 40, |_| {
            attention::append(gpu, &kv, inputs.view(), k.matrix, Some(v.matrix))
        })?;
        line("append 512 + 512", us, 1536);
        let shape = AttentionShape {
            heads: 32,
            kv_heads: 4,
            k_head_dim: 128,
            v_head_dim: 128,
            scale: 0.09,
            window: None,
        };
        let norm = DeviceNorm {
            weight: &head_weight,
            eps: 1e-6,
        };
        let rotation = DeviceRotation {
            table: &table,
            layout: RopeLayout::Half,
        };
        let projections = [q.matrix, k.matrix, v.matrix];
        let us = time(gpu, 40, |_| {
            let step = inputs.view();
            attention::gqa_inputs(
                gpu,
                &shape,
                &kv,
                step,
                projections,
                Some([norm; 2]),
                rotation,
            )
        })?;
        line("norms, rope, append at once", us, 2 * 4096 + 1536);
    }
    let logits = Rows::new(gpu, 1, 151_936)?;
    let argmax = Argmax::new(gpu, 1)?;
    let id = DeviceBuffer::upload(gpu, &[0u32])?;
    let us = time(gpu, 40, |_| argmax.forward(logits.matrix, id.address()))?;
    println!(
        "{:34} {us:10.2} {:10.0}",
        "argmax 151936",
        4.0 * 151_936.0 / us / 1e3
    );
    Ok(())
}
