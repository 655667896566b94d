//! Speed of one layer of experts: `cargo bench -p ktx-kernels --bench experts [-- SHAPE…]`.
//!
//! Per shape and number of tokens: milliseconds (the median, and the call at the tenth percentile), GFLOP/s, and GB/s of the weights of
//! the chosen experts, also as a share of what the same threads read from the same memory without computing. Calls take other
//! experts in turn, so that no cache holds them.
//!
//! `KTX_TOKENS=1,4,16,64,512` chooses numbers of tokens, `KTX_THREADS` the threads, `KTX_CPU` the instruction set,
//! `KTX_PAUSE=60` microseconds between calls, as where a GPU computes between two layers, and
//! `KTX_MEMORY` where the weights lie: in `small` pages (of 4 KiB), in `huge` ones (2 MiB), or in a file of this
//! path, which is written and mapped.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ktx_gguf::{GgmlType, random_blocks};
use ktx_kernels::linear::Precision;
use ktx_kernels::moe::{self, ExpertStack, MoeScratch, MoeWeights, Routing};
use ktx_kernels::pool::ThreadPool;
use memmap2::{Mmap, MmapMut};

/// Time spent on each figure.
const PATIENCE: Duration = Duration::from_millis(700);

/// A layer of experts. Two have more experts than the model, because caches are larger than a layer.
struct Shape {
    name: &'static str,
    hidden: usize,
    intermediate: usize,
    experts: usize,
    top_k: usize,
    /// Of gate and up, and of down.
    types: [GgmlType; 2],
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "deepseek-v3",
        hidden: 7168,
        intermediate: 2048,
        experts: 64,
        top_k: 8,
        types: [GgmlType::Q4_K, GgmlType::Q4_K],
    },
    Shape {
        name: "qwen3-30b",
        hidden: 2048,
        intermediate: 768,
        experts: 512,
        top_k: 8,
        types: [GgmlType::Q4_K, GgmlType::Q6_K],
    },
    Shape {
        name: "deepseek-v2-lite",
        hidden: 2048,
        intermediate: 1408,
        experts: 256,
        top_k: 6,
        types: [GgmlType::Q4_K, GgmlType::Q8_0],
    },
];

fn main() {
    let args = std::env::args().skip(1);
    let wanted: Vec<String> = args.filter(|arg| !arg.starts_with('-')).collect();
    let setting = |name: &str, default: &str| std::env::var(name).unwrap_or(default.to_owned());
    let threads = setting("KTX_THREADS", "").parse::<NonZeroUsize>();
    let pool = ThreadPool::new(threads.unwrap_or(ThreadPool::default_threads()));
    let tokens = setting("KTX_TOKENS", "1,4,16,64,512");
    let memory = setting("KTX_MEMORY", "small");
    let pause = Duration::from_micros(setting("KTX_PAUSE", "").parse().unwrap_or(0));
    let _awake = (!pause.is_zero()).then(|| pool.stay_awake());
    for shape in &SHAPES {
        if !wanted.is_empty() && !wanted.iter().any(|name| name == shape.name) {
            continue;
        }
        let weights = shape.weights(&memory);
        let bandwidth = read_bandwidth(&pool, &weights);
        println!(
            "{}, memory {memory}, {} threads: reads {bandwidth:.1} GB/s",
            shape.name,
            pool.threads()
        );
        for tokens in tokens.split(',').filter_map(|n| n.parse().ok()) {
            layer(&pool, shape, &weights, tokens, bandwidth, pause);
        }
    }
}

impl Shape {
    /// Bytes of gate, of up and of down.
    fn bytes(&self) -> [usize; 3] {
        let elements = self.experts * self.hidden * self.intermediate;
        let of = |ty: GgmlType| elements / ty.block_len() * ty.block_bytes();
        let [gate_up, down] = self.types.map(of);
        [gate_up, gate_up, down]
    }

    fn weights(&self, memory: &str) -> Mmap {
        let mut map = match memory {
            "small" | "huge" => MmapMut::map_anon(self.bytes().iter().sum()).unwrap(),
            path => file_map(path, self.bytes().iter().sum()),
        };
        #[cfg(target_os = "linux")]
        match memory {
            "small" => map.advise(memmap2::Advice::NoHugePage).unwrap(),
            "huge" => map.advise(memmap2::Advice::HugePage).unwrap(),
            _ => {}
        }
        let mut rest = &mut map[..];
        let types = [self.types[0], self.types[0], self.types[1]];
        for (len, ty) in self.bytes().into_iter().zip(types) {
            let some = random_blocks(ty, 4096, 7);
            let (part, others) = rest.split_at_mut(len);
            for part in part.chunks_mut(some.len()) {
                part.copy_from_slice(&some[..part.len()]);
            }
            rest = others;
        }
        map.make_read_only().unwrap()
    }
}

fn file_map(path: &str, len: usize) -> MmapMut {
    let mut options = std::fs::File::options();
    let options = options.read(true).write(true).create(true).truncate(true);
    let file = options.open(path).unwrap();
    file.set_len(len as u64).unwrap();
    // SAFETY: nobody else writes the file.
    unsafe { MmapMut::map_mut(&file) }.unwrap()
}

fn layer(
    pool: &ThreadPool,
    shape: &Shape,
    bytes: &[u8],
    tokens: usize,
    bandwidth: f64,
    pause: Duration,
) {
    let Shape {
        hidden,
        intermediate,
        experts,
        top_k,
        types: [gate_up, down],
        ..
    } = *shape;
    let [len, ..] = shape.bytes();
    let stack =
        |ty, rows, cols, bytes| ExpertStack::stacked(ty, [experts, rows, cols], bytes).unwrap();
    let weights = MoeWeights::new(
        stack(gate_up, intermediate, hidden, &bytes[..len]),
        stack(gate_up, intermediate, hidden, &bytes[len..2 * len]),
        stack(down, hidden, intermediate, &bytes[2 * len..]),
    )
    .unwrap();
    let x = (0..tokens * hidden).map(|at| (at as f32 * 0.7).sin());
    let x: Vec<f32> = x.collect();
    let mut out = vec![0.0; x.len()];
    let route = vec![1.0 / top_k as f32; tokens * top_k];
    let mut scratch = MoeScratch::new(tokens, hidden, intermediate, experts, top_k);
    let mut choice = Choice::new(experts);
    let (mut seconds, mut used) = (Vec::new(), 0);
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE || seconds.len() < 5 {
        let ids = choice.next(tokens, top_k);
        used += distinct(&ids);
        let routing = Routing {
            ids: &ids,
            weights: &route,
            top_k,
            first_expert: 0,
        };
        let idle = Instant::now();
        while idle.elapsed() < pause {
            std::hint::spin_loop();
        }
        let start = Instant::now();
        moe::forward(
            pool,
            &weights,
            &x,
            routing,
            &mut out,
            &mut scratch,
            Precision::Int8,
        )
        .unwrap();
        seconds.push(start.elapsed().as_secs_f64());
    }
    let read = used as f64 / seconds.len() as f64 * bytes.len() as f64 / experts as f64;
    seconds.sort_by(f64::total_cmp);
    let (median, fast) = (seconds[seconds.len() / 2], seconds[seconds.len() / 10]);
    let operations = 6 * tokens * top_k * hidden * intermediate;
    println!(
        "{tokens:6} tokens {:9.3} ms (10 %: {:.3}) {:6.0} GFLOP/s {:6.1} GB/s {:3.0} %",
        median * 1e3,
        fast * 1e3,
        operations as f64 / median / 1e9,
        read / median / 1e9,
        100.0 * read / median / 1e9 / bandwidth
    );
}

/// Which experts tokens take: all in turn, in a random order.
struct Choice {
    order: Vec<u32>,
    at: usize,
    seed: u64,
}

impl Choice {
    fn new(experts: usize) -> Self {
        Self {
            order: (0..experts as u32).collect(),
            at: experts,
            seed: 1,
        }
    }

    fn next(&mut self, tokens: usize, top_k: usize) -> Vec<u32> {
        let mut ids = Vec::with_capacity(tokens * top_k);
        for _ in 0..tokens {
            if self.at + top_k > self.order.len() {
                self.shuffle();
            }
            ids.extend(&self.order[self.at..self.at + top_k]);
            self.at += top_k;
            if tokens > 1 {
                self.shuffle();
            }
        }
        ids
    }

    fn shuffle(&mut self) {
        for index in (1..self.order.len()).rev() {
            self.seed = self.seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            let other = (self.seed >> 33) as usize % (index + 1);
            self.order.swap(index, other);
        }
        self.at = 0;
    }
}

fn distinct(ids: &[u32]) -> usize {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ids.len()
}

/// Reads the weights with all threads, in GB/s.
fn read_bandwidth(pool: &ThreadPool, bytes: &[u8]) -> f64 {
    const PART: usize = 64 << 20;
    const TASK: usize = 256 << 10;
    let sum = AtomicU64::new(0);
    let mut seconds = Vec::new();
    let begin = Instant::now();
    for part in bytes.chunks_exact(PART).cycle() {
        let start = Instant::now();
        pool.run(PART / TASK, &|task| {
            let (words, _) = part[task * TASK..(task + 1) * TASK].as_chunks::<8>();
            // Xor has no order, so the compiler reads with vectors of any width.
            let read = words
                .iter()
                .fold(0, |all, word| all ^ u64::from_le_bytes(*word));
            sum.fetch_add(read, Ordering::Relaxed);
        });
        seconds.push(start.elapsed().as_secs_f64());
        if begin.elapsed() > PATIENCE {
            break;
        }
    }
    std::hint::black_box(sum.into_inner());
    seconds.sort_by(f64::total_cmp);
    PART as f64 / seconds[seconds.len() / 2] / 1e9
}
