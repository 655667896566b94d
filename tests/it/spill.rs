//! Prompts that the cache has no place for any more, in memory and in a directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use ktx_core::kernels::kv::KvType;
use ktx_core::kernels::linear::Precision;
use ktx_core::serving::{PrefixSharing, Scheduler, SchedulerSettings, SpillSettings};
use ktx_core::{Engine, TokenId};

use crate::serving::{PAGE, answer, ask, engine, engine_with, prompt, scheduler};

/// A folder of its own that is removed with its value.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("ktx-spill-{}-{name}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        Self(path)
    }

    fn pages(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(&self.0).into_iter().flatten();
        let paths = entries.map(|entry| entry.expect("an entry").path());
        paths
            .filter(|path| path.extension().is_some_and(|e| e == "page"))
            .collect()
    }

    fn bytes(&self) -> u64 {
        let size = |path: &PathBuf| fs::metadata(path).map_or(0, |m| m.len());
        self.pages().iter().map(size).sum()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn in_memory() -> SchedulerSettings {
    SchedulerSettings {
        spill: SpillSettings {
            memory_bytes: 64 << 20,
            ..SpillSettings::default()
        },
        ..SchedulerSettings::default()
    }
}

fn in_directory(folder: &Path, bytes: u64) -> SchedulerSettings {
    SchedulerSettings {
        spill: SpillSettings {
            memory_bytes: 0,
            directory: Some(folder.to_owned()),
            directory_bytes: bytes,
        },
        ..SchedulerSettings::default()
    }
}

/// Tokens of an answer, and how many of the prompt's were there.
fn get(scheduler: &Scheduler, prompt: &[TokenId]) -> (Vec<TokenId>, usize) {
    let (tokens, finished) = answer(ask(scheduler, prompt, 5, 12));
    (tokens, finished.usage.cached_tokens)
}

/// The answer without any cache. To be asked for before another scheduler takes the engine's pages.
fn computed(engine: &Engine, prompt: &[TokenId]) -> Vec<TokenId> {
    let settings = SchedulerSettings {
        prefix_cache: PrefixSharing::Off,
        ..SchedulerSettings::default()
    };
    get(&scheduler(engine, settings), prompt).0
}

/// Ends a scheduler as a server does.
fn end(scheduler: Scheduler) {
    scheduler.close();
    let begin = Instant::now();
    while scheduler.is_alive() {
        assert!(begin.elapsed() < Duration::from_secs(30), "it does not end");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_the_cache_has_no_place_for_comes_back_from_memory() {
    comes_back_from_memory(KvType::F16);
}

#[test]
fn an_eight_bit_cache_comes_back_from_memory() {
    comes_back_from_memory(KvType::Q8_0);
}

fn comes_back_from_memory(kv_type: KvType) {
    // Eight pages: one prompt of five and its answer.
    let engine = engine_with(512, 1, 128, kv_type);
    let prompts: Vec<_> = (0..3).map(|i| prompt(&engine, i, 4 * PAGE + 20)).collect();
    let wanted: Vec<_> = prompts.iter().map(|p| computed(&engine, p)).collect();
    let scheduler = scheduler(&engine, in_memory());
    let first: Vec<_> = prompts.iter().map(|p| get(&scheduler, p)).collect();
    let again: Vec<_> = prompts.iter().map(|p| get(&scheduler, p)).collect();
    for ((tokens, first), again) in wanted.into_iter().zip(first).zip(again) {
        assert_eq!(first, (tokens.clone(), 0));
        assert_eq!(again, (tokens, 4 * PAGE));
    }
    let spill = scheduler.metrics().spill;
    assert!(spill.memory_tokens >= 8 * PAGE as u64, "{spill:?}");
    assert!(spill.memory_bytes > 0);
    assert_eq!((spill.directory_tokens, spill.directory_bytes), (0, 0));
}

#[test]
fn the_next_process_has_the_prompts_of_the_one_before() {
    let folder = Folder::new("next");
    let settings = in_directory(&folder.0, 64 << 20);
    let first = engine(512, 1, 128);
    let prompt = prompt(&first, 1, 4 * PAGE + 20);
    let tokens = computed(&first, &prompt);
    let before = scheduler(&first, settings.clone());
    assert_eq!(get(&before, &prompt), (tokens.clone(), 0));
    end(before);
    assert_eq!(folder.pages().len(), 4);
    let after = scheduler(&engine(512, 1, 128), settings);
    assert_eq!(get(&after, &prompt), (tokens, 4 * PAGE));
    let spill = after.metrics().spill;
    assert_eq!(spill.directory_tokens, 4 * PAGE as u64);
    assert_eq!(spill.rejected_files, 0);
}

#[test]
fn damaged_pages_are_computed_again_and_removed() {
    let folder = Folder::new("damaged");
    let settings = in_directory(&folder.0, 64 << 20);
    let engine = engine(512, 1, 128);
    let prompt = prompt(&engine, 1, 4 * PAGE + 20);
    let before = scheduler(&engine, settings.clone());
    let (tokens, _) = get(&before, &prompt);
    end(before);
    for page in folder.pages() {
        let mut bytes = fs::read(&page).expect("it is read");
        let middle = bytes.len() / 2;
        bytes[middle] ^= 4;
        fs::write(&page, bytes).expect("it is written");
    }
    let after = scheduler(&engine, settings);
    assert_eq!(get(&after, &prompt), (tokens.clone(), 0));
    assert!(after.metrics().spill.rejected_files >= 1);
    assert_eq!(
        get(&after, &prompt),
        (tokens, 4 * PAGE),
        "they are whole again"
    );
}

#[test]
fn pages_of_another_precision_or_type_are_not_used() {
    let folder = Folder::new("other");
    let settings = in_directory(&folder.0, 64 << 20);
    let first = engine(512, 1, 128);
    let prompt = prompt(&first, 1, 4 * PAGE + 20);
    let before = scheduler(&first, settings.clone());
    get(&before, &prompt);
    end(before);
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/pip-17m.gguf");
    let others = [
        Engine::builder().precision(Precision::F32),
        Engine::builder().kv_type(KvType::Q8_0),
    ];
    for other in others {
        let builder = other.model(model).threads(2).context(512);
        let other = builder.load().expect("the model loads");
        let wanted = computed(&other, &prompt);
        let after = scheduler(&other, settings.clone());
        assert_eq!(get(&after, &prompt), (wanted, 0));
        assert_eq!(after.metrics().spill.rejected_files, 4);
        end(after);
    }
}

#[test]
fn the_directory_stays_within_its_size_and_keeps_what_was_used_last() {
    let folder = Folder::new("size");
    let engine = engine(512, 1, 128);
    let prompts: Vec<_> = (0..6).map(|i| prompt(&engine, i, 2 * PAGE + 9)).collect();
    let one = scheduler(&engine, in_directory(&folder.0, 64 << 20));
    get(&one, &prompts[0]);
    end(one);
    let limit = folder.bytes() / 2 * 5;
    let settings = in_directory(&folder.0, limit);
    let all = scheduler(&engine, settings.clone());
    for prompt in &prompts {
        get(&all, prompt);
    }
    end(all);
    assert!(folder.bytes() <= limit);
    assert_eq!(folder.pages().len(), 5);
    let after = scheduler(&engine, settings);
    let cached = |i: usize| get(&after, &prompts[i]).1;
    assert_eq!([cached(5), cached(4), cached(0)], [2 * PAGE, 2 * PAGE, 0]);
}

#[test]
fn a_directory_that_cannot_be_used_is_told() {
    let folder = Folder::new("refused");
    let engine = engine(512, 1, 128);
    let first = scheduler(&engine, in_directory(&folder.0, 64 << 20));
    let refused = |settings| Scheduler::start(engine.clone(), settings).err();
    let second = refused(in_directory(&folder.0, 64 << 20)).expect("it is in use");
    assert!(second.to_string().contains("another server"), "{second}");
    end(first);
    let file = folder.0.join("file");
    fs::write(&file, b"").expect("it is written");
    assert!(refused(in_directory(&file, 64 << 20)).is_some());
    assert!(refused(in_directory(&folder.0, 100)).is_some());
}

#[test]
fn many_requests_in_a_small_cache_get_what_each_gets_alone() {
    let folder = Folder::new("many");
    let engine = engine(512, 2, 128);
    let mut settings = in_directory(&folder.0, 64 << 20);
    // Some pages in memory, the others on disk.
    settings.spill.memory_bytes = 1 << 20;
    let beginnings: Vec<_> = (0..4).map(|i| prompt(&engine, 50 + i, 3 * PAGE)).collect();
    let prompts: Vec<Vec<TokenId>> = (0..16)
        .map(|i| {
            let own = prompt(&engine, i as u32, 10 + 13 * i);
            [beginnings[i % 4].clone(), own].concat()
        })
        .collect();
    let alone: Vec<_> = prompts.iter().map(|p| computed(&engine, p)).collect();
    let scheduler = scheduler(&engine, settings);
    for _ in 0..3 {
        let streams: Vec<_> = prompts.iter().map(|p| ask(&scheduler, p, 5, 12)).collect();
        // Others go away, some of them while their pages are read.
        let leave: Vec<_> = prompts.iter().map(|p| ask(&scheduler, p, 6, 12)).collect();
        drop(leave);
        for (stream, alone) in streams.into_iter().zip(&alone) {
            assert_eq!(answer(stream).0, *alone);
        }
    }
    let metrics = scheduler.metrics();
    let spill = metrics.spill;
    assert!(
        spill.memory_tokens > 0 && spill.directory_tokens > 0,
        "{spill:?}"
    );
    assert_eq!(spill.rejected_files, 0);
    assert!(spill.memory_bytes <= 1 << 20);
}
