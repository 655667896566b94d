//! Measuring the host's speed with this library's own kernels, once, and remembering it.
//!
//! A measurement takes less than a second. It is kept in the user's cache directory
//! (`$XDG_CACHE_HOME/ktx/speed.json`, else `~/.cache/ktx/speed.json`) under the CPU's model, the
//! instruction set and the number of threads. A cache that cannot be read or written is as good as
//! none, and nothing is said about it.

use std::collections::BTreeMap;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ktx_gguf::{GgmlType, random_blocks};
use ktx_kernels::cpu;
use ktx_kernels::linear::{Activations, Precision, WeightRows, matmul};
use ktx_kernels::moe::{self, ExpertStack, MoeScratch, MoeWeights, Routing};
use ktx_kernels::pool::ThreadPool;
use serde_json::{Map, Value, json};

use super::machine::{CpuSpeed, TypeRate};

/// Types that are measured: one for each family of kernels.
const TYPES: [GgmlType; 9] = [
    GgmlType::Q4_K,
    GgmlType::Q6_K,
    GgmlType::Q8_0,
    GgmlType::Q4_0,
    GgmlType::Q4_1,
    GgmlType::Q5_0,
    GgmlType::IQ4_XS,
    GgmlType::F16,
    GgmlType::F32,
];
/// Columns of the matrices.
const COLS: usize = 2048;
/// Bytes that are read in a pass: more than caches near the cores hold.
const STREAM_BYTES: usize = 48 << 20;
/// Rows for each thread of the products with many tokens: threads share panels of 32 rows, and with few of them a
/// part of the threads would have nothing to do.
const BATCH_THREAD_ROWS: usize = 256;
/// Tokens of these products: of a prompt's part that goes to one expert, and of all of it.
const BATCHES: [usize; 2] = [32, 128];
/// Passes of each measurement, of which the median counts, and how long they take together at least.
const PASSES: usize = 3;
const SHORTEST: Duration = Duration::from_millis(10);
/// How long all threads work before anything is measured: cores that were idle are slow at first.
const WARM_UP: Duration = Duration::from_millis(50);
/// A measurement that took longer than this is not made with more tokens: their time follows from it.
const LONG: f64 = 0.1;
/// Regions that do nothing, to find what one costs.
const REGIONS: u32 = 2000;
/// Format of the cache file; others are ignored.
const VERSION: u64 = 6;
/// Bytes of a cache file that anybody could have written.
const MAX_CACHE: u64 = 1 << 20;

/// The host's speed: remembered, or else measured and remembered.
pub fn cpu_speed(threads: NonZeroUsize) -> CpuSpeed {
    let cache = cache_file();
    let key = key(threads);
    if let Some(known) = cache.as_deref().and_then(|file| remembered(file, &key)) {
        return known;
    }
    let speed = measure_cpu(&ThreadPool::new(threads));
    if let Some(file) = cache {
        remember(&file, &key, &speed);
    }
    speed
}

/// Measures the host's speed anew and remembers it.
pub fn remeasured(threads: NonZeroUsize) -> CpuSpeed {
    let speed = measure_cpu(&ThreadPool::new(threads));
    if let Some(file) = cache_file() {
        remember(&file, &key(threads), &speed);
    }
    speed
}

/// Measures the host's speed with these threads.
pub fn measure_cpu(pool: &ThreadPool) -> CpuSpeed {
    let begin = Instant::now();
    let _awake = pool.stay_awake();
    while begin.elapsed() < WARM_UP {
        bandwidth(pool);
    }
    let rates: Vec<TypeRate> = TYPES.iter().map(|ty| rate(pool, *ty)).collect();
    let speed = CpuSpeed {
        bandwidth: bandwidth(pool),
        region: region(pool),
        experts: experts(pool),
        rates,
    };
    tracing::debug!(seconds = begin.elapsed().as_secs_f64(), ?speed, "measured");
    speed
}

/// The time that `run` takes, the median of some passes after one that warms up.
fn median(mut run: impl FnMut()) -> f64 {
    run();
    let mut times: Vec<Duration> = Vec::new();
    let begin = Instant::now();
    while times.len() < PASSES || begin.elapsed() < SHORTEST {
        let begin = Instant::now();
        run();
        times.push(begin.elapsed());
    }
    times.sort();
    times[times.len() / 2].as_secs_f64().max(1e-9)
}

/// Bytes a second that all threads read.
fn bandwidth(pool: &ThreadPool) -> f64 {
    const TASK: usize = 1 << 15;
    let words = vec![1_u64; 2 * STREAM_BYTES / size_of::<u64>()];
    let sum = AtomicU64::new(0);
    let time = median(|| {
        pool.run(words.len().div_ceil(TASK), &|task| {
            let part = &words[task * TASK..words.len().min((task + 1) * TASK)];
            let total = part.iter().fold(0_u64, |a, b| a.wrapping_add(*b));
            sum.fetch_add(total, Ordering::Relaxed);
        });
    });
    std::hint::black_box(sum.into_inner());
    (2 * STREAM_BYTES) as f64 / time
}

/// Seconds of a region that does nothing.
fn region(pool: &ThreadPool) -> f64 {
    let tasks = pool.threads();
    median(|| {
        for _ in 0..REGIONS {
            pool.run(tasks, &|_| {});
        }
    }) / f64::from(REGIONS)
}

/// How fast products with weights of one type are.
fn rate(pool: &ThreadPool, ty: GgmlType) -> TypeRate {
    let row_bytes = COLS / ty.block_len() * ty.block_bytes();
    let rows = STREAM_BYTES / row_bytes;
    // Rows repeat: what the bits are makes no difference to the time.
    let pattern = random_blocks(ty, 16 * COLS / ty.block_len(), 1);
    let bytes = pattern.repeat(rows.div_ceil(16));
    let product = |rows: usize, tokens: usize| {
        let weights = WeightRows::new(ty, rows, COLS, &bytes[..rows * row_bytes]).ok()?;
        let x = vec![0.5_f32; tokens * COLS];
        let mut activations = Activations::with_capacity(tokens, COLS);
        let types = [ty];
        activations
            .prepare_for(pool, &x, tokens, COLS, Precision::Int8, &types)
            .ok()?;
        let mut out = vec![0.0; tokens * rows];
        Some(median(|| {
            std::hint::black_box(matmul(pool, weights, &activations, &mut out, rows).is_ok());
        }))
    };
    let stream = product(rows, 1).unwrap_or(f64::INFINITY);
    let batch_rows = rows.min(BATCH_THREAD_ROWS * pool.threads());
    let [few, many] = BATCHES.map(|tokens| product(batch_rows, tokens).unwrap_or(f64::INFINITY));
    // What does not grow with the tokens is the unpacking. Noise must not make it nothing.
    let token =
        ((many - few) / (BATCHES[1] - BATCHES[0]) as f64).max(many / (2 * BATCHES[1]) as f64);
    let unpack = (few - BATCHES[0] as f64 * token).max(few / 64.0);
    TypeRate {
        ty,
        stream: (rows * row_bytes) as f64 / stream,
        unpack: (batch_rows * row_bytes) as f64 / unpack,
        flops: (2 * batch_rows * COLS) as f64 / token,
    }
}

/// Seconds of a layer of experts for each byte of its weights, with several numbers of tokens for each expert.
fn experts(pool: &ThreadPool) -> [f64; 4] {
    const EXPERTS: usize = 32;
    const TOP_K: usize = 2;
    const WIDTH: usize = 768;
    let ty = CpuSpeed::EXPERT_TYPE;
    let blocks = random_blocks(ty, EXPERTS * WIDTH * COLS / ty.block_len(), 1);
    let bytes = (3 * blocks.len()) as f64;
    let stack = |rows, cols| ExpertStack::stacked(ty, [EXPERTS, rows, cols], &blocks);
    let layer = || {
        MoeWeights::new(
            stack(WIDTH, COLS)?,
            stack(WIDTH, COLS)?,
            stack(COLS, WIDTH)?,
        )
    };
    let mut scratch = MoeScratch::default();
    let mut last: Option<(usize, f64)> = None;
    CpuSpeed::EXPERT_ROWS.map(|rows| {
        if let Some((fewer, time)) = last
            && time > LONG
        {
            return time * (rows / fewer) as f64 / bytes;
        }
        let tokens = rows * EXPERTS / TOP_K;
        let ids: Vec<u32> = (0..tokens * TOP_K)
            .map(|choice| (choice % EXPERTS) as u32)
            .collect();
        let weights = vec![0.5; ids.len()];
        let routing = Routing {
            ids: &ids,
            weights: &weights,
            top_k: TOP_K,
            first_expert: 0,
        };
        let x = vec![0.5; tokens * COLS];
        let mut out = vec![0.0; x.len()];
        let mut run = || {
            let int8 = Precision::Int8;
            moe::forward(pool, &layer()?, &x, routing, &mut out, &mut scratch, int8)
        };
        let time = median(|| {
            std::hint::black_box(run().is_ok());
        });
        last = Some((rows, time));
        time / bytes
    })
}

/// What a measurement depends on.
fn key(threads: NonZeroUsize) -> String {
    format!(
        "{}, {}, {threads} threads",
        cpu_model().unwrap_or_else(|| "unknown CPU".to_owned()),
        cpu::level()
    )
}

/// The CPU's model as the system calls it.
pub fn cpu_model() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|l| l.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Where measurements are kept; `None` where the user has no place for such files.
pub fn cache_file() -> Option<PathBuf> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let directory =
        absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(directory.join("ktx").join("speed.json"))
}

fn read_cache(file: &Path) -> Option<Map<String, Value>> {
    if std::fs::metadata(file).ok()?.len() > MAX_CACHE {
        return None;
    }
    let value: Value = serde_json::from_str(&std::fs::read_to_string(file).ok()?).ok()?;
    if value.get("version")?.as_u64()? != VERSION {
        return None;
    }
    Some(value.get("cpus")?.as_object()?.clone())
}

fn remembered(file: &Path, key: &str) -> Option<CpuSpeed> {
    CpuSpeed::from_json(read_cache(file)?.get(key)?)
}

/// Adds a measurement to the cache, if it can be written.
fn remember(file: &Path, key: &str, speed: &CpuSpeed) {
    let mut cpus: BTreeMap<String, Value> =
        read_cache(file).unwrap_or_default().into_iter().collect();
    cpus.insert(key.to_owned(), speed.to_json());
    let text = format!("{:#}\n", json!({"version": VERSION, "cpus": cpus}));
    let write = || {
        std::fs::create_dir_all(file.parent()?).ok()?;
        // Another process never reads half of it.
        let draft = file.with_extension(format!("{}.tmp", std::process::id()));
        std::fs::write(&draft, text).ok()?;
        std::fs::rename(&draft, file).ok()
    };
    if write().is_none() {
        tracing::debug!(file = %file.display(), "the measured speed cannot be kept");
    }
}

#[cfg(test)]
mod tests {
    use super::super::Machine;
    use super::*;

    fn directory(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("ktx-speed-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        path
    }

    #[test]
    fn what_was_measured_is_remembered_by_machine() {
        let file = directory("kept").join("ktx/speed.json");
        let speed = Machine::typical().cpu;
        assert_eq!(remembered(&file, "a"), None);
        remember(&file, "a", &speed);
        let faster = CpuSpeed {
            bandwidth: 2.0 * speed.bandwidth,
            ..speed.clone()
        };
        remember(&file, "b", &faster);
        assert_eq!(remembered(&file, "a"), Some(speed));
        assert_eq!(remembered(&file, "b"), Some(faster));
        assert_eq!(remembered(&file, "c"), None);
    }

    #[test]
    fn a_broken_cache_is_replaced() {
        let file = directory("broken").join("speed.json");
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        let speed = Machine::typical().cpu;
        for text in [
            "",
            "{",
            "[]",
            r#"{"version": 9}"#,
            r#"{"version":6,"cpus":{"a":{}}}"#,
            "\u{0}\u{1}",
        ] {
            std::fs::write(&file, text).unwrap();
            assert_eq!(remembered(&file, "a"), None, "{text:?}");
            remember(&file, "a", &speed);
            assert_eq!(remembered(&file, "a").as_ref(), Some(&speed), "{text:?}");
        }
    }

    #[test]
    fn a_place_that_cannot_be_written_is_no_error() {
        remember(
            Path::new("/proc/ktx/speed.json"),
            "a",
            &Machine::typical().cpu,
        );
    }
}
