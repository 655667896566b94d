//! Speed of the matrix products: `cargo bench -p ktx-kernels --bench linear [-- TYPE… moe]`.
//!
//! Per type: generation (1 token) in GB/s of weights and as a share of the measured read
//! bandwidth, the same from cache (what the arithmetic alone would allow), and prefill (512 tokens)
//! in GFLOP/s and as a share of the measured peak: of 8-bit multiply-adds, or of BF16 ones in AMX tiles. `KTX_CPU` forces an
//! instruction set, `KTX_THREADS` the number of threads, `KTX_TOKENS` the tokens of a prefill.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ktx_gguf::{GgmlType, random_blocks};
use ktx_kernels::cpu;
use ktx_kernels::linear::cases::{self, Case};
use ktx_kernels::linear::{Activations, Precision, WeightRows, matmul};
use ktx_kernels::moe::{self, ExpertStack, MoeScratch, MoeWeights, Routing};
use ktx_kernels::pool::ThreadPool;

/// Generation reads this much in all, so that no cache holds it.
const GENERATION_BYTES: usize = 768 << 20;
/// Time spent on each figure.
const PATIENCE: Duration = Duration::from_millis(400);

fn main() {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|arg| !arg.starts_with('-'))
        .collect();
    let threads = std::env::var("KTX_THREADS")
        .ok()
        .and_then(|value| value.parse().ok());
    let tokens = std::env::var("KTX_TOKENS")
        .ok()
        .and_then(|value| value.parse().ok())
        .unwrap_or(512);
    let pool = ThreadPool::new(threads.unwrap_or_else(ThreadPool::default_threads));
    let level = match cpu::requested() {
        Ok(level) => level,
        Err(error) => {
            eprintln!("{error}");
            std::process::exit(2);
        }
    };
    let bandwidth = read_bandwidth(&pool);
    let peak = multiply_add_peak(&pool);
    println!(
        "{} threads, {level}: reads {bandwidth:.1} GB/s, peak {peak:.0} GFLOP/s",
        pool.threads()
    );
    println!(
        "{:8} {:>21} {:>16} {:>18}",
        "type", "1 token", "from cache", "prefill"
    );
    for (one, many) in cases::speed(2048, 1)
        .into_iter()
        .zip(cases::speed(2048, tokens))
    {
        if !wanted.is_empty() && !wanted.iter().any(|name| name == one.ty.name()) {
            continue;
        }
        let generation = generation_rate(&pool, one);
        let cached = cached_rate(&pool, one);
        let prefill = prefill_rate(&pool, many);
        println!(
            "{:8} {generation:9.1} GB/s {:4.0} % {cached:10.1} GB/s {prefill:12.0} GFLOP/s {:4.0} %",
            one.ty.name(),
            100.0 * generation / bandwidth,
            100.0 * prefill / peak,
        );
    }
    if wanted.is_empty() || wanted.iter().any(|name| name == "moe") {
        moe_layer(&pool, 1);
        moe_layer(&pool, tokens);
    }
}

/// One Mixture-of-Experts layer in the shape of DeepSeek-V2-Lite.
fn moe_layer(pool: &ThreadPool, tokens: usize) {
    const EXPERTS: usize = 64;
    const HIDDEN: usize = 2048;
    const INTERMEDIATE: usize = 1408;
    const TOP_K: usize = 6;
    let blocks = |ty: GgmlType, seed| {
        random_blocks(ty, EXPERTS * HIDDEN * INTERMEDIATE / ty.block_len(), seed)
    };
    let stack =
        |ty, rows, cols, bytes| ExpertStack::stacked(ty, [EXPERTS, rows, cols], bytes).unwrap();
    let bytes = [
        blocks(GgmlType::Q4_K, 1),
        blocks(GgmlType::Q4_K, 2),
        blocks(GgmlType::Q8_0, 3),
    ];
    let experts = MoeWeights::new(
        stack(GgmlType::Q4_K, INTERMEDIATE, HIDDEN, &bytes[0]),
        stack(GgmlType::Q4_K, INTERMEDIATE, HIDDEN, &bytes[1]),
        stack(GgmlType::Q8_0, HIDDEN, INTERMEDIATE, &bytes[2]),
    )
    .unwrap();
    let x: Vec<f32> = (0..tokens * HIDDEN)
        .map(|at| (at as f32 * 0.7).sin())
        .collect();
    let mut out = vec![0.0; x.len()];
    let weights = vec![1.0 / TOP_K as f32; tokens * TOP_K];
    let mut scratch = MoeScratch::new(tokens, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K);
    let mut step = 0;
    let seconds = fastest(|| {
        // Other experts in each step, so that one token finds none of them in a cache.
        step += 1;
        let pick = |slot: usize| ((slot * 11 + step * TOP_K) % EXPERTS) as u32;
        let ids: Vec<u32> = (0..tokens * TOP_K).map(pick).collect();
        let routing = Routing {
            ids: &ids,
            weights: &weights,
            top_k: TOP_K,
            first_expert: 0,
        };
        let precision = Precision::Int8;
        moe::forward(
            pool,
            &experts,
            &x,
            routing,
            &mut out,
            &mut scratch,
            precision,
        )
        .unwrap();
    });
    let chosen = TOP_K * bytes.iter().map(Vec::len).sum::<usize>() / EXPERTS;
    let operations = 2 * 3 * tokens * TOP_K * HIDDEN * INTERMEDIATE;
    println!(
        "experts of one layer (64, top 6), {tokens:3} tokens: {:8.3} ms, {:6.1} GFLOP/s, \
         {:5.1} GB/s of a token's weights",
        seconds * 1e3,
        operations as f64 / seconds / 1e9,
        chosen as f64 / seconds / 1e9,
    );
}

/// Calls `work` until the time is up; seconds of the fastest call.
fn fastest(mut work: impl FnMut()) -> f64 {
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while begin.elapsed() < PATIENCE {
        let start = Instant::now();
        work();
        best = best.min(start.elapsed().as_secs_f64());
    }
    best
}

/// Calls `work` with the parts of a buffer that no cache holds, around and around; GB/s of the
/// call at the 90th percentile, which other processes have not disturbed.
fn stream_rate(bytes: &[u8], part: usize, mut work: impl FnMut(&[u8])) -> f64 {
    let begin = Instant::now();
    let mut seconds = Vec::new();
    for part in bytes.chunks_exact(part).cycle() {
        let start = Instant::now();
        work(part);
        seconds.push(start.elapsed().as_secs_f64());
        if begin.elapsed() > PATIENCE {
            break;
        }
    }
    seconds.sort_by(f64::total_cmp);
    part as f64 / seconds[seconds.len() / 10] / 1e9
}

fn generation_rate(pool: &ThreadPool, case: Case) -> f64 {
    let matrix_bytes = case.ty.row_bytes(case.cols).unwrap() * case.rows;
    let one = random_blocks(case.ty, case.rows * case.cols / case.ty.block_len(), 1);
    let bytes = one.repeat(GENERATION_BYTES / matrix_bytes);
    let x = activations(pool, case);
    let mut out = vec![0.0; case.rows];
    stream_rate(&bytes, matrix_bytes, |matrix| {
        let w = WeightRows::new(case.ty, case.rows, case.cols, matrix).unwrap();
        matmul(pool, w, &x, &mut out, case.rows).unwrap();
    })
}

/// As [`generation_rate`], with weights that stay in the cores' caches: what the arithmetic alone
/// would allow.
fn cached_rate(pool: &ThreadPool, case: Case) -> f64 {
    let case = Case {
        rows: 128 * pool.threads(),
        ..case
    };
    let bytes = random_blocks(case.ty, case.rows * case.cols / case.ty.block_len(), 1);
    let w = WeightRows::new(case.ty, case.rows, case.cols, &bytes).unwrap();
    let x = activations(pool, case);
    let mut out = vec![0.0; case.rows];
    let seconds = fastest(|| matmul(pool, w, &x, &mut out, case.rows).unwrap());
    bytes.len() as f64 / seconds / 1e9
}

fn prefill_rate(pool: &ThreadPool, case: Case) -> f64 {
    let bytes = random_blocks(case.ty, case.rows * case.cols / case.ty.block_len(), 1);
    let w = WeightRows::new(case.ty, case.rows, case.cols, &bytes).unwrap();
    let x = activations(pool, case);
    let mut out = vec![0.0; case.tokens * case.rows];
    let seconds = fastest(|| matmul(pool, w, &x, &mut out, case.rows).unwrap());
    2.0 * (case.rows * case.cols * case.tokens) as f64 / seconds / 1e9
}

fn activations(pool: &ThreadPool, case: Case) -> Activations {
    let x: Vec<f32> = (0..case.tokens * case.cols)
        .map(|at| (at as f32 * 0.7).sin())
        .collect();
    let mut activations = Activations::default();
    activations
        .prepare(pool, &x, case.tokens, case.cols, Precision::Int8)
        .unwrap();
    activations
}

/// Reads a large buffer with all threads, in GB/s.
fn read_bandwidth(pool: &ThreadPool) -> f64 {
    const PART: usize = 4 << 20;
    const TASK: usize = 64 << 10;
    let buffer = vec![1u8; GENERATION_BYTES];
    let sum = AtomicU64::new(0);
    let rate = stream_rate(&buffer, PART, |part| {
        pool.run(PART / TASK, &|task| {
            let (words, _) = part[task * TASK..(task + 1) * TASK].as_chunks::<8>();
            // Xor has no order, so the compiler reads with vectors of any width.
            let read = words
                .iter()
                .fold(0, |all, word| all ^ u64::from_le_bytes(*word));
            sum.fetch_add(read, Ordering::Relaxed);
        });
    });
    std::hint::black_box(sum.into_inner());
    rate
}

/// The most multiply-adds of the kind that prefill uses that the cores do, without loads, counted as two operations each.
fn multiply_add_peak(pool: &ThreadPool) -> f64 {
    const ROUNDS: usize = 20_000;
    let seconds = fastest(|| {
        pool.run(pool.threads(), &|_| {
            std::hint::black_box(multiply_add_rounds(ROUNDS));
        });
    });
    let (operations, _) = multiply_add_rounds(0);
    (operations * ROUNDS * pool.threads()) as f64 / seconds / 1e9
}

/// Runs rounds of independent multiply-adds; returns the operations of a round, and a value that
/// depends on all of them.
fn multiply_add_rounds(rounds: usize) -> (usize, i32) {
    #[cfg(target_arch = "x86_64")]
    match cpu::level() {
        // SAFETY: the level is one that this CPU supports.
        cpu::IsaLevel::Amx => return unsafe { x86::amx(rounds) },
        // SAFETY: as above.
        cpu::IsaLevel::Avx512 => return unsafe { x86::vnni(rounds) },
        // SAFETY: as above.
        cpu::IsaLevel::Avx2 => return unsafe { x86::avx2(rounds) },
        cpu::IsaLevel::Portable => {}
    }
    let mut sums = [0i32; 64];
    for round in 0..rounds {
        let value = std::hint::black_box(round as i16);
        for sum in &mut sums {
            *sum += i32::from(value) * i32::from(value);
        }
    }
    (2 * sums.len(), sums.iter().fold(0, |all, sum| all ^ sum))
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;

    const CHAINS: usize = 16;

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub fn vnni(rounds: usize) -> (usize, i32) {
        let factor = std::hint::black_box(_mm512_set1_epi8(3));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, factor, factor);
            }
        }
        let all = sums
            .into_iter()
            .fold(_mm512_setzero_si512(), |a, b| _mm512_xor_si512(a, b));
        (CHAINS * 128, _mm512_reduce_or_epi32(all))
    }

    /// Products of 16 x 32 by 32 x 16 BF16 numbers.
    ///
    /// # Safety
    /// The CPU has AMX and the process may use it.
    pub unsafe fn amx(rounds: usize) -> (usize, i32) {
        // Palette 1; four tiles of 16 rows of 64 bytes.
        let mut config = [0u8; 64];
        config[0] = 1;
        for tile in 0..4 {
            config[16 + 2 * tile] = 64;
            config[48 + tile] = 16;
        }
        // SAFETY: by the caller's promise.
        unsafe {
            asm!("ldtilecfg [{}]", "tilezero tmm2", "tilezero tmm3", in(reg) config.as_ptr(), options(nostack));
            for _ in 0..rounds {
                asm!(
                    "tdpbf16ps tmm0, tmm2, tmm3",
                    "tdpbf16ps tmm1, tmm2, tmm3",
                    options(nostack, nomem)
                );
            }
            asm!("tilerelease", options(nostack, nomem));
        }
        (2 * 2 * 16 * 16 * 32, 0)
    }

    #[target_feature(enable = "avx2")]
    pub fn avx2(rounds: usize) -> (usize, i32) {
        let (ones, factor) = (_mm256_set1_epi16(1), _mm256_set1_epi8(3));
        let mut sums = [_mm256_setzero_si256(); 8];
        for _ in 0..rounds {
            for sum in &mut sums {
                // As assembly, because the compiler would multiply constants once for all.
                // SAFETY: register operations of AVX2, which is enabled.
                unsafe {
                    asm!(
                        "vpmaddubsw {pairs}, {factor}, {factor}",
                        "vpmaddwd {pairs}, {pairs}, {ones}",
                        "vpaddd {sum}, {sum}, {pairs}",
                        pairs = out(ymm_reg) _,
                        factor = in(ymm_reg) factor,
                        ones = in(ymm_reg) ones,
                        sum = inout(ymm_reg) *sum,
                        options(nomem, nostack),
                    );
                }
            }
        }
        let all = sums
            .into_iter()
            .fold(_mm256_setzero_si256(), |a, b| _mm256_xor_si256(a, b));
        (8 * 64, _mm256_extract_epi32::<0>(all))
    }
}
