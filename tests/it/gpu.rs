//! Whole models on a GPU, against transformers and against the CPU. Without a GPU each test says so and
//! passes; `cargo test --workspace -- gpu` runs these and the kernels' own.

use std::io::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ktx_core::gguf::Gguf;
use ktx_core::kernels::cuda::{DeviceBuffer, DeviceMatrix, Gpu, copy_by_kernel};
use ktx_core::kernels::linear::Precision;
use ktx_core::serving::{Event, Request, Scheduler, SchedulerSettings, SpillSettings, stream};
use ktx_core::{
    Engine, EngineBuilder, FinishReason, GenerateOptions, MemoryCheck, Rules, SamplingParams,
};

use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{engine, forced_logits, json, last_logits, load, pip, repository, tokens};

/// Everything but the embedding on the GPU; the routed experts on `experts`.
fn rules(experts: &str) -> Rules {
    let operator = match experts {
        "cpu" => "KExpertsCPU",
        _ => "KExpertsMarlin",
    };
    let text = format!(
        "- match: {{name: '\\.experts$'}}\n  replace:\n    class: KTransformersExperts\n    kwargs: \
         {{generate_op: {operator}, generate_device: '{experts}', prefill_op: {operator}, \
         prefill_device: '{experts}', out_device: '{experts}'}}\n  recursive: False\n\
         - match: {{name: '^model\\.embed_tokens$'}}\n  replace:\n    class: default\n    \
         kwargs: {{generate_device: cpu, prefill_device: cpu}}\n\
         - match: {{name: ''}}\n  replace:\n    class: default\n    \
         kwargs: {{generate_device: 'cuda:0', prefill_device: 'cuda:0'}}\n"
    );
    Rules::Text {
        name: "gpu.yaml".to_owned(),
        text,
    }
}

/// The GPU's turn, if there is one; one test at a time, since they share its memory.
pub(crate) fn turn() -> Option<MutexGuard<'static, ()>> {
    static TURN: Mutex<()> = Mutex::new(());
    match Gpu::open(0) {
        Ok(_) => Some(TURN.lock().unwrap_or_else(PoisonError::into_inner)),
        Err(error) => {
            skipped(&format!("no GPU: {error}"));
            None
        }
    }
}

/// Says that a test is skipped.
pub(crate) fn skipped(why: &str) {
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    // The raw handle, because the harness hides what a passing test prints.
    let line = format!("{test} ... skipped, {why}\n");
    std::io::stderr().write_all(line.as_bytes()).ok();
}

fn builder(gguf: &Gguf, precision: Precision, experts: &str) -> EngineBuilder {
    let builder = Engine::builder().gguf(gguf.clone()).precision(precision);
    builder.threads(2).rules(rules(experts))
}

fn on_gpu(gguf: &Gguf, precision: Precision, experts: &str) -> Engine {
    load(builder(gguf, precision, experts))
}

/// What the GPU computes of one model is as near to transformers as the CPU is; latent attention keeps
/// its heads' matrices in f16 there.
#[test]
fn gpu_gives_the_logits_of_transformers_for_every_family() {
    let Some(_turn) = turn() else { return };
    let goldens = json("tests/fixtures/transformers/goldens.json");
    let prompts: Vec<Vec<u32>> = goldens["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .map(ids)
        .collect();
    for case in goldens["cases"].as_array().unwrap() {
        let name = case["model"].as_str().unwrap();
        let gguf = Gguf::open(repository(&format!("tests/fixtures/transformers/{name}"))).unwrap();
        let is_latent = ["deepseek", "moonlight"]
            .iter()
            .any(|n| name.starts_with(n));
        let bound = if is_latent { 1e-6 } else { 1e-9 };
        for experts in ["cuda:0", "cpu"] {
            let engine = on_gpu(&gguf, Precision::F32, experts);
            for (prompt, logits) in prompts.iter().zip(case["logits"].as_array().unwrap()) {
                let error = nmse(
                    &last_logits(&mut engine.session(), prompt),
                    &numbers(logits),
                );
                assert!(
                    error < bound,
                    "{name}, experts on {experts}: NMSE {error:.2e}"
                );
            }
        }
    }
}

#[test]
fn gpu_and_hybrid_answer_the_golden_prompts_as_the_cpu_does() {
    let Some(_turn) = turn() else { return };
    let goldens = json("models/pip-17m-goldens.json");
    let options = GenerateOptions {
        sampling: SamplingParams::greedy(),
        max_new_tokens: 48,
        ..GenerateOptions::default()
    };
    for experts in ["cuda:0", "cpu"] {
        let engine = on_gpu(&pip(), Precision::F32, experts);
        for case in goldens["generate"].as_array().unwrap() {
            let mut session = engine.session();
            let prompt = tokens(&ids(&case["prompt_ids"]));
            let mut generation = session.generate(&prompt, &options).unwrap();
            generation.by_ref().for_each(|piece| drop(piece.unwrap()));
            let answer: Vec<u32> = generation.generated().iter().map(|t| t.0).collect();
            // The end token is in the golden and not in the text.
            let mut wanted = ids(&case["greedy_ids"]);
            wanted.retain(|id| *id != 1);
            assert_eq!(answer, wanted, "{}, experts on {experts}", case["prompt"]);
        }
    }
}

/// Experts that are put off arrive in recorded steps as they do on the CPU.
#[test]
fn gpu_adds_deferred_experts_as_the_cpu_does() {
    let Some(_turn) = turn() else { return };
    let cpu = load(
        Engine::builder()
            .gguf(pip())
            .precision(Precision::F32)
            .threads(2)
            .deferred_experts(1),
    );
    let gpu = load(builder(&pip(), Precision::F32, "cpu").deferred_experts(1));
    let (mut session, mut reference) = (gpu.session(), cpu.session());
    let prompt: Vec<u32> = (0..30).map(|i| 300 + 17 * i).collect();
    last_logits(&mut session, &prompt);
    last_logits(&mut reference, &prompt);
    for id in [5, 900, 33, 1200, 7, 64, 512, 2] {
        let (found, wanted) = (
            forced_logits(&mut session, id),
            forced_logits(&mut reference, id),
        );
        let error = nmse(&found, &wanted);
        assert!(error < 1e-6, "NMSE {error:.2e}");
    }
}

/// The first generated tokens run operator by operator, the next are recorded, the rest replay that:
/// all give what the CPU gives, also after another prompt has changed every buffer.
#[test]
fn gpu_steps_that_are_recorded_give_what_unrecorded_ones_give() {
    let Some(_turn) = turn() else { return };
    let cpu = engine(&pip(), Precision::F32);
    for experts in ["cuda:0", "cpu"] {
        let gpu = on_gpu(&pip(), Precision::F32, experts);
        for round in 0..2u32 {
            let (mut session, mut reference) = (gpu.session(), cpu.session());
            let prompt: Vec<u32> = (0..70).map(|i| 300 + (17 + round) * i).collect();
            last_logits(&mut session, &prompt);
            last_logits(&mut reference, &prompt);
            for id in [5, 900, 33, 1200, 7, 64, 512, 2] {
                let (found, wanted) = (
                    forced_logits(&mut session, id),
                    forced_logits(&mut reference, id),
                );
                let error = nmse(&found, &wanted);
                assert!(error < 1e-6, "experts on {experts}: NMSE {error:.2e}");
            }
        }
    }
}

/// All of a GPU's memory but this much, until it is dropped.
fn fill_but(gpu: &Gpu, left: usize) -> DeviceBuffer {
    let (free, _) = gpu.memory().unwrap();
    DeviceBuffer::new(gpu, free.saturating_sub(left)).unwrap()
}

/// The estimate refuses beforehand and names a context that fits; what the estimate is told to ignore the
/// driver refuses. Nothing is lost: engines that are there go on, and what was taken is given back.
#[test]
fn gpu_without_room_refuses_with_what_would_fit_and_nothing_is_lost() {
    let Some(_turn) = turn() else { return };
    const CONTEXT: usize = 2048;
    let gpu = Gpu::open(0).unwrap();
    let before = on_gpu(&pip(), Precision::F32, "cuda:0");
    let mut session = before.session();
    let prompt: Vec<u32> = (0..40).map(|i| 300 + 11 * i).collect();
    let wanted = last_logits(&mut session, &prompt);

    let small = || builder(&pip(), Precision::F32, "cuda:0").context(CONTEXT);
    let estimate = small().plan().unwrap().estimate().unwrap();
    let (_, needed) = estimate
        .devices
        .iter()
        .find(|(device, _)| !device.is_cpu())
        .expect("the GPU has a part");
    let (needed, cache) = (
        (needed.total() - needed.process) as usize,
        needed.kv as usize,
    );
    let ballast = fill_but(&gpu, needed - cache / 2);
    let (free, _) = gpu.memory().unwrap();
    let refused = small().load().err().expect("there is no room").to_string();
    assert!(
        refused.contains("cuda:0") && refused.contains("--context "),
        "{refused}"
    );
    let given_up = small().sessions(64).memory_check(MemoryCheck::Ignore);
    let refused = given_up.load().err().expect("there is no room").to_string();
    assert!(refused.contains("cuda:0 has no room for"), "{refused}");
    // What the driver keeps for itself is less than this.
    let slack = 4 << 20;
    let (after, _) = gpu.memory().unwrap();
    assert!(after + slack > free, "{free} bytes were free, then {after}");

    session.clear();
    assert_eq!(last_logits(&mut session, &prompt), wanted);
    drop(ballast);
    load(small());
}

/// An answer that is stopped while steps are replayed leaves a session that goes on where it was.
#[test]
fn gpu_sessions_go_on_after_an_answer_was_stopped() {
    let Some(_turn) = turn() else { return };
    let goldens = json("models/pip-17m-goldens.json");
    let cpu = engine(&pip(), Precision::F32);
    for experts in ["cuda:0", "cpu"] {
        let gpu = on_gpu(&pip(), Precision::F32, experts);
        let mut session = gpu.session();
        let cancel = session.cancel_handle();
        let options = GenerateOptions {
            sampling: SamplingParams::greedy(),
            ..GenerateOptions::default()
        };
        let prompt = tokens(&ids(&goldens["generate"][0]["prompt_ids"]));
        let mut generation = session.generate(&prompt, &options).unwrap();
        for (index, piece) in generation.by_ref().enumerate() {
            piece.unwrap();
            if index == 1 {
                cancel.cancel();
            }
        }
        assert_eq!(generation.finish_reason(), Some(FinishReason::Cancelled));
        drop(generation);

        let mut reference = cpu.session();
        let known: Vec<u32> = session.tokens().iter().map(|t| t.0).collect();
        last_logits(&mut reference, &known);
        for id in [5, 900, 33] {
            let (found, wanted) = (
                forced_logits(&mut session, id),
                forced_logits(&mut reference, id),
            );
            let error = nmse(&found, &wanted);
            assert!(error < 1e-6, "experts on {experts}: NMSE {error:.2e}");
        }
    }
}

const LOSES_ITS_GPU: &str = "gpu::process_that_loses_its_gpu";

/// A GPU that fails for good ends in errors that say so, not in a panic or a hang. In a process of its own,
/// since nothing on the GPU works there afterwards.
#[test]
fn gpu_that_is_lost_is_told_and_no_call_hangs() {
    let Some(_turn) = turn() else { return };
    let test = std::env::current_exe().unwrap();
    let output = std::process::Command::new(test)
        .args(["--exact", LOSES_ITS_GPU, "--ignored", "--nocapture"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && said.contains("1 passed"),
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
}

#[test]
#[ignore = "part of gpu_that_is_lost_is_told_and_no_call_hangs"]
fn process_that_loses_its_gpu() {
    let Some(_turn) = turn() else { return };
    let gpu = Gpu::open(0).unwrap();
    for experts in ["cuda:0", "cpu"] {
        let engine = on_gpu(&pip(), Precision::F32, experts);
        let mut session = engine.session();
        if experts == "cuda:0" {
            last_logits(&mut session, &[300, 301]);
            continue;
        }
        (0..4).for_each(|id| drop(forced_logits(&mut session, 300 + id)));
        let there = DeviceBuffer::new(&gpu, 64).unwrap();
        // SAFETY: none: nothing is at the first address, and that a GPU answers to it with a fault is what is tested.
        let (nowhere, there) = unsafe {
            (
                DeviceMatrix::new(16, 1, 16),
                DeviceMatrix::new(there.address(), 1, 16),
            )
        };
        copy_by_kernel(&gpu, nowhere, there).unwrap();
        for _ in 0..2 {
            let error = session
                .force(ktx_core::TokenId(5), &mut |_| {})
                .unwrap_err();
            assert!(
                error
                    .to_string()
                    .contains("the GPU is lost to this process"),
                "{error}"
            );
        }
        let error = builder(&pip(), Precision::F32, experts)
            .load()
            .err()
            .expect("the GPU is lost");
        assert!(error.to_string().contains("lost"), "{error}");
    }
}

/// More requests at once than there are sessions, each with its golden answer; and pages that left the GPU
/// come back as they were.
#[test]
fn gpu_answers_many_requests_at_once() {
    let Some(_turn) = turn() else { return };
    let goldens = json("models/pip-17m-goldens.json");
    let cases: Vec<(Vec<u32>, Vec<u32>)> = goldens["generate"]
        .as_array()
        .unwrap()
        .iter()
        .map(|case| (ids(&case["prompt_ids"]), ids(&case["greedy_ids"])))
        .collect();
    for experts in ["cuda:0", "cpu"] {
        let engine = on_gpu(&pip(), Precision::F32, experts);
        let settings = SchedulerSettings {
            max_running: 16,
            spill: SpillSettings {
                memory_bytes: 256 << 20,
                ..SpillSettings::default()
            },
            ..SchedulerSettings::default()
        };
        let scheduler = Scheduler::start(engine, settings).unwrap();
        let ask = |prompt: &[u32], max_new_tokens: usize| {
            let (sink, events) = stream();
            let request = Request {
                sampling: SamplingParams::greedy(),
                max_new_tokens,
                ..Request::new(tokens(prompt))
            };
            scheduler.submit(request, sink).unwrap();
            events
        };
        let mut cached = 0;
        let mut answer = |events| {
            let mut answer = Vec::new();
            for event in events {
                match event {
                    Event::Started { cached_tokens } => cached += cached_tokens,
                    Event::Token(token) => answer.push(token.token.0),
                    Event::Finished(_) => {}
                    Event::Failed(error) => panic!("{error}"),
                }
            }
            answer
        };
        let many = || cases.iter().cycle().take(16);
        let streams: Vec<_> = many().map(|(prompt, _)| ask(prompt, 48)).collect();
        for (events, (_, wanted)) in streams.into_iter().zip(many()) {
            let mut wanted = wanted.clone();
            // The end token is in the golden and not in the text.
            wanted.retain(|id| *id != 1);
            assert_eq!(answer(events), wanted, "experts on {experts}");
        }
        // One session's pages: these prompts push one another out.
        let long: Vec<Vec<u32>> = (0..4u32)
            .map(|seed| {
                (0..1000u32)
                    .map(|i| 300 + (i * 17 + seed * 41) % 1000)
                    .collect()
            })
            .collect();
        let rounds = [(); 2].map(|()| long.iter().map(|p| answer(ask(p, 8))).collect::<Vec<_>>());
        assert_eq!(rounds[0], rounds[1], "experts on {experts}");
        assert!(cached > 0 && scheduler.metrics().spill.memory_tokens > 0);
    }
}

#[test]
fn gpu_steps_hold_as_many_requests_as_the_engine_was_made_for() {
    let Some(_turn) = turn() else { return };
    let engine = on_gpu(&pip(), Precision::F32, "cuda:0");
    let settings = SchedulerSettings {
        max_running: 33,
        ..SchedulerSettings::default()
    };
    let error = Scheduler::start(engine, settings).err().unwrap();
    assert!(error.to_string().contains("sequences"), "{error}");
}
