//! The most used of the experts that live in main memory in a GPU's cache, against the CPU. Without a GPU each test
//! says so and passes.

use ktx_core::gguf::Gguf;
use ktx_core::kernels::linear::Precision;
use ktx_core::placement::ByteSize;
use ktx_core::{Engine, HotMemory, HotReport, StepTimes};

use crate::gpu::turn;
use crate::gpu_streaming::streaming;
use crate::naive::measure::nmse;
use crate::run::{engine, forced_logits, last_logits, load, pip, repository};

fn caching(gguf: &Gguf, bytes: u64) -> Engine {
    let memory = HotMemory::Bytes(ByteSize(bytes));
    load(streaming(gguf, Precision::F32).hot_experts(memory))
}

/// The same tokens through both; how the cache did, and what was recorded.
fn compare(name: &str, gpu: &Engine, cpu: &Engine, tokens: u32) -> (HotReport, StepTimes) {
    let (mut found, mut wanted) = (gpu.session(), cpu.session());
    let prompt: Vec<u32> = (0..9).map(|i| 3 + i * 11).collect();
    last_logits(&mut found, &prompt);
    last_logits(&mut wanted, &prompt);
    for step in 0..tokens {
        // A few tokens for a while, then others: the experts that are chosen change.
        let id = (step % 5) * 7 + step / 40 * 50 + 2;
        let error = nmse(
            &forced_logits(&mut found, id),
            &forced_logits(&mut wanted, id),
        );
        assert!(error < 1e-6, "{name}, token {step}: NMSE {error:.2e}");
    }
    let report = gpu.hot_experts().unwrap();
    (report.expect("a cache"), gpu.step_times().unwrap())
}

/// Latent attention, experts with biases, shared experts: with room for all experts, and uploads between all steps.
#[test]
fn gpu_caches_experts_of_every_family() {
    let Some(_turn) = turn() else { return };
    for name in [
        "deepseek_v3.gguf",
        "qwen2moe.gguf",
        "qwen3moe.gguf",
        "mixtral.gguf",
        "gpt_oss.gguf",
        "gpt_oss_mxfp4.gguf",
    ] {
        let gguf = Gguf::open(repository(&format!("tests/fixtures/transformers/{name}"))).unwrap();
        let gpu = caching(&gguf, 64 << 20);
        let (report, times) = compare(name, &gpu, &engine(&gguf, Precision::F32), 60);
        assert_eq!(report.slots, report.experts, "{name}");
        assert!(report.hits > report.choices / 4, "{name}: {report:?}");
        assert!(report.uploads > 0 && times.steps > 40, "{name}: {times:?}");
    }
}

/// Room for a part of the experts, which take turns.
#[test]
fn gpu_cache_follows_the_choices_where_it_holds_a_part_of_the_experts() {
    let Some(_turn) = turn() else { return };
    let (gguf, cpu) = (pip(), engine(&pip(), Precision::F32));
    let mut partial = 0;
    for bytes in [1, 2, 3, 4, 6].map(|mib| mib << 20) {
        let gpu = caching(&gguf, bytes);
        let Some(before) = gpu.hot_experts().unwrap() else {
            continue;
        };
        assert_eq!((before.hits, before.uploads), (0, 0));
        let (report, _) = compare("built-in", &gpu, &cpu, 160);
        if report.slots < report.experts {
            partial += 1;
            assert!(report.hits > 0, "{report:?}");
            assert!(report.uploads > report.slots as u64, "{report:?}");
        }
    }
    assert!(partial > 0, "no cache held a part of the experts");
}
