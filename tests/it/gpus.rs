//! Whole models on two GPUs. A machine with one makes two of it (`KTX_GPUS`), each with a stream and memory of its
//! own. That is decided once for a process, so the tests run in processes of their own, started by the first one here.
//! Without a GPU it says so and passes.

use std::sync::MutexGuard;

use ktx_core::engine::available_devices;
use ktx_core::gguf::Gguf;
use ktx_core::kernels::cuda::{DeviceBuffer, GPUS_VARIABLE, Gpu, driver};
use ktx_core::kernels::device::Device;
use ktx_core::kernels::linear::Precision;
use ktx_core::placement::Machine;
use ktx_core::{AutoPlacement, Engine, EngineBuilder, GenerateOptions, Rules, SamplingParams};

use crate::gpu::{skipped, turn};
use crate::naive::measure::{ids, nmse, numbers};
use crate::run::{engine, forced_logits, json, last_logits, load, pip, repository, tokens};

/// All tests below, with two GPUs made of one and, where there are two, with both.
#[test]
fn gpu_models_on_two_gpus_are_as_on_the_cpu() {
    let Some(_turn) = turn() else { return };
    let [first, last] = {
        let found = &driver().unwrap().devices;
        [&found[0], &found[found.len() - 1]].map(|gpu| gpu.ordinal)
    };
    let mut choices = vec![[first, first], [first, last]];
    choices.dedup();
    for [first, second] in choices {
        let choice = format!("{first},{second}");
        let output = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["gpus::two_", "--ignored", "--nocapture", "--test-threads=1"])
            .env(GPUS_VARIABLE, &choice)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        let ran = said.contains("test result: ok") && !said.contains(" 0 passed");
        assert!(
            output.status.success() && ran && !errors.contains("skipped"),
            "{GPUS_VARIABLE}={choice}\n{said}{errors}"
        );
    }
}

/// The GPUs' turn, if there are two.
fn two_gpus() -> Option<MutexGuard<'static, ()>> {
    let turn = turn()?;
    let second: Device = "cuda:1".parse().unwrap();
    if !available_devices().contains(&second) {
        skipped("there is no second GPU");
        return None;
    }
    Some(turn)
}

/// The layers before `border` on `cuda:0`, the others and the head on `cuda:1`, the routed experts on `experts` or
/// beside their layer's attention. With a map the moves of the hidden state are named.
fn split(border: usize, with_map: bool, experts: Option<&str>) -> Rules {
    let before: Vec<String> = (0..border).map(|layer| layer.to_string()).collect();
    let mut text = String::new();
    let mut rule = |name: &str, class: &str, kwargs: String, is_deep: bool| {
        text += &format!(
            "- match: {{name: '{name}'}}\n  replace: {{class: {class}, kwargs: {{{kwargs}}}}}\n  recursive: {}\n",
            if is_deep { "True" } else { "False" }
        );
    };
    let both = |device: &str| format!("generate_device: '{device}', prefill_device: '{device}'");
    let first = format!(r"^model\.layers\.({})\.", before.join("|"));
    for (layers, device) in [(first.as_str(), "cuda:0"), (r"\.", "cuda:1")] {
        let there = experts.unwrap_or(device);
        let operator = match there {
            "cpu" => "KExpertsCPU",
            _ => "KExpertsMarlin",
        };
        let kwargs = format!(
            "{}, generate_op: {operator}, prefill_op: {operator}, out_device: '{device}'",
            both(there)
        );
        let name = format!(r"{layers}mlp\.experts$");
        rule(&name, "KTransformersExperts", kwargs, false);
    }
    rule(r"^model\.embed_tokens$", "default", both("cpu"), true);
    if with_map {
        let map = format!("transfer_map: {{{border}: 'cuda:1'}}");
        rule("^model$", "KDeepseekV2Model", map, true);
    }
    rule(&first, "default", both("cuda:0"), true);
    rule("", "default", both("cuda:1"), true);
    Rules::Text {
        name: "two.yaml".to_owned(),
        text,
    }
}

fn builder(gguf: &Gguf, rules: Rules) -> EngineBuilder {
    let builder = Engine::builder().gguf(gguf.clone());
    builder.precision(Precision::F32).threads(2).rules(rules)
}

fn greedy(engine: &Engine, prompt: &[u32]) -> Vec<u32> {
    let options = GenerateOptions {
        sampling: SamplingParams::greedy(),
        max_new_tokens: 48,
        ..GenerateOptions::default()
    };
    let mut session = engine.session();
    let prompt = tokens(prompt);
    let mut generation = session.generate(&prompt, &options).unwrap();
    generation.by_ref().for_each(|piece| drop(piece.unwrap()));
    generation.generated().iter().map(|t| t.0).collect()
}

/// The golden answers of the built-in model, and its logits.
fn answers_as_the_cpu(what: &str, engine: &Engine) {
    let goldens = json("models/pip-17m-goldens.json");
    for case in goldens["generate"].as_array().unwrap() {
        // The end token is in the golden and not in the text.
        let mut wanted = ids(&case["greedy_ids"]);
        wanted.retain(|id| *id != 1);
        let answer = greedy(engine, &ids(&case["prompt_ids"]));
        assert_eq!(answer, wanted, "{what}: {}", case["prompt"]);
    }
    steps_are_as(what, engine, &on_cpu(&pip()), 300, LATENT);
}

/// The heads of latent attention are multiplied in f16 on a GPU.
const LATENT: f64 = 1e-6;

fn on_cpu(gguf: &Gguf) -> Engine {
    engine(gguf, Precision::F32)
}

/// The logits of a reference, for ids from some one on: whether steps run operator by operator, as the first, or as a
/// graph of both GPUs, as all behind the second.
fn steps_are_as(what: &str, found: &Engine, reference: &Engine, first: u32, bound: f64) {
    for round in 0..2u32 {
        let (mut session, mut wanted) = (found.session(), reference.session());
        let prompt: Vec<u32> = (0..70)
            .map(|i| first + (i * (17 + round) + 3) % 240)
            .collect();
        let error = nmse(
            &last_logits(&mut session, &prompt),
            &last_logits(&mut wanted, &prompt),
        );
        assert!(error < bound, "{what}, prompt: NMSE {error:.2e}");
        let mut copied = Vec::new();
        for id in [5, 90, 33, 120, 7, 64, 212, 2] {
            let error = nmse(
                &forced_logits(&mut session, first + id),
                &forced_logits(&mut wanted, first + id),
            );
            assert!(error < bound, "{what}, behind {id}: NMSE {error:.2e}");
            copied.push(found.transfers().unwrap());
        }
        // A graph's copies are counted when it is recorded.
        assert!(
            copied[3..].iter().all(|c| *c == copied[2]),
            "{what}: steps are not recorded"
        );
        let between = copied[0]
            .keys()
            .any(|(from, to)| !from.is_cpu() && !to.is_cpu() && from != to);
        assert!(between, "{what}: nothing went from one GPU to the other");
    }
}

#[test]
#[ignore = "part of gpu_models_on_two_gpus_are_as_on_the_cpu"]
fn two_gpus_share_the_layers_of_the_built_in_model() {
    let Some(_turn) = two_gpus() else { return };
    for experts in [None, Some("cpu"), Some("cuda:0")] {
        // With no layer before the border all are on the second GPU.
        let one = load(builder(&pip(), split(0, false, experts.or(Some("cuda:1")))));
        for with_map in [false, true] {
            let what = format!("experts on {experts:?}, map: {with_map}");
            let two = load(builder(&pip(), split(2, with_map, experts)));
            steps_are_as(&what, &two, &one, 0, 1e-9);
            answers_as_the_cpu(&what, &two);
        }
    }
    let deferring = |builder: EngineBuilder| load(builder.deferred_experts(1));
    let found = deferring(builder(&pip(), split(3, false, Some("cpu"))));
    let cpu = deferring(
        Engine::builder()
            .gguf(pip())
            .precision(Precision::F32)
            .threads(2),
    );
    let prompt: Vec<u32> = (0..30).map(|i| 300 + 17 * i).collect();
    assert_eq!(greedy(&found, &prompt), greedy(&cpu, &prompt));
}

/// Grouped-query attention, with routed experts and without, against transformers too.
#[test]
#[ignore = "part of gpu_models_on_two_gpus_are_as_on_the_cpu"]
fn two_gpus_share_the_layers_of_other_families() {
    let Some(_turn) = two_gpus() else { return };
    let goldens = json("tests/fixtures/transformers/goldens.json");
    let prompts: Vec<Vec<u32>> = goldens["prompts"]
        .as_array()
        .unwrap()
        .iter()
        .map(ids)
        .collect();
    for name in ["qwen3moe", "llama", "qwen2moe"] {
        let path = format!("tests/fixtures/transformers/{name}.gguf");
        let gguf = Gguf::open(repository(&path)).unwrap();
        let cases = goldens["cases"].as_array().unwrap();
        let case = cases
            .iter()
            .find(|c| c["model"] == format!("{name}.gguf"))
            .unwrap();
        for experts in [None, Some("cpu")] {
            for with_map in [false, true] {
                let what = format!("{name}, experts on {experts:?}, map: {with_map}");
                let engine = load(builder(&gguf, split(1, with_map, experts)));
                for (prompt, logits) in prompts.iter().zip(case["logits"].as_array().unwrap()) {
                    let found = last_logits(&mut engine.session(), prompt);
                    let error = nmse(&found, &numbers(logits));
                    assert!(error < 1e-9, "{what}: NMSE {error:.2e}");
                }
                steps_are_as(&what, &engine, &on_cpu(&gguf), 0, 1e-9);
            }
        }
    }
}

/// KTransformers' rules for DeepSeek-V3 on two GPUs: as they are, where the norm alone is on the second one; and with
/// the border, which stands before layer 30, moved to layer 2, so that small models have layers on both.
#[test]
#[ignore = "part of gpu_models_on_two_gpus_are_as_on_the_cpu"]
fn two_gpus_carry_out_the_rules_of_ktransformers() {
    let Some(_turn) = two_gpus() else { return };
    let path = repository("ktx-core/tests/plans/rules/DeepSeek-V3-Chat-multi-gpu-marlin.yaml");
    let text = std::fs::read_to_string(path).unwrap();
    let mut moved = text.clone();
    for (before, after) in [
        ("(0|[1-9]|[12][0-9])", "([01])"),
        ("([3456][0-9])", "([2-9])"),
        ("(0|[1-4])", "(1)"),
        ("([3][0])", "(2)"),
        ("30: \"cuda:1\"", "2: \"cuda:1\""),
    ] {
        assert!(moved.contains(before), "{before}");
        moved = moved.replace(before, after);
    }
    let with = |gguf: &Gguf, text: &str| {
        let rules = Rules::Text {
            name: "multi-gpu.yaml".to_owned(),
            text: text.to_owned(),
        };
        load(builder(gguf, rules).default_device("cuda:0"))
    };
    let tiny = Gguf::open(repository("tests/fixtures/transformers/deepseek_v3.gguf")).unwrap();
    for (what, text) in [("as they are", &text), ("moved", &moved)] {
        steps_are_as(what, &with(&tiny, text), &on_cpu(&tiny), 0, LATENT);
    }
    // The built-in model stretches no rotations.
    let plain = |text: &str| text.replace("YarnRotaryEmbeddingV3", "RotaryEmbeddingV3");
    answers_as_the_cpu("as they are", &with(&pip(), &plain(&text)));
    answers_as_the_cpu("moved", &with(&pip(), &plain(&moved)));
}

/// What does not fit into one GPU's memory is shared with the second.
#[test]
#[ignore = "part of gpu_models_on_two_gpus_are_as_on_the_cpu"]
fn two_gpus_are_both_used_where_one_is_too_small() {
    let Some(_turn) = two_gpus() else { return };
    let with = |gpu_memory: Vec<u64>| {
        let auto = AutoPlacement {
            gpu_memory,
            machine: Some(Machine::typical()),
            ..AutoPlacement::default()
        };
        builder(&pip(), Rules::Auto(auto))
    };
    let cuda = |index: u16| -> Device { format!("cuda:{index}").parse().unwrap() };
    let used = |gpu_memory: Vec<u64>| {
        let estimate = with(gpu_memory).plan().unwrap().estimate().unwrap();
        [0, 1].map(|gpu| estimate.device(cuda(gpu)))
    };
    let [all, none] = used(vec![4 << 30; 2]);
    assert!(all.weights > 0 && none.weights == 0, "one is enough");
    let enough = all.total() - all.process + Machine::typical().gpu.reserved;
    let small = (0..12).map(|mib| enough - (mib << 20)).find(|memory| {
        let [first, second] = used(vec![*memory; 2]);
        first.weights > 0 && second.weights > 0
    });
    let engine = load(with(vec![small.expect("two are enough"); 2]));
    answers_as_the_cpu("automatic placement", &engine);
}

/// A GPU that is made of another's half has half of its memory, and no more.
#[test]
#[ignore = "part of gpu_models_on_two_gpus_are_as_on_the_cpu"]
fn two_gpus_of_one_have_half_of_its_memory_each() {
    let Some(_turn) = two_gpus() else { return };
    let gpus = [0, 1].map(|index| Gpu::open(index).unwrap());
    if gpus[0].ordinal() != gpus[1].ordinal() {
        return;
    }
    let [(_, total), (free, _)] = gpus.each_ref().map(|gpu| gpu.memory().unwrap());
    let taken = DeviceBuffer::new(&gpus[1], free - (1 << 20)).unwrap();
    let (left, _) = gpus[1].memory().unwrap();
    assert!(left <= 1 << 20, "{left} bytes");
    let refused = DeviceBuffer::new(&gpus[1], 2 << 20)
        .unwrap_err()
        .to_string();
    assert!(refused.contains("cuda:1 has no room for"), "{refused}");
    assert!(gpus[0].memory().unwrap().1 == total);
    drop(taken);
    assert_eq!(gpus[1].memory().unwrap().0, free);
}
