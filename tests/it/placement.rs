//! Placement of published models: budgets that the original states suffice, and the rules that come
//! out put every module where the placement says.

use ktx_core::gguf::Gguf;
use ktx_core::kernels::device::Device;
use ktx_core::models::{ModelDescription, QuantMix, describe, described, published_model};
use ktx_core::ops::registry;
use ktx_core::placement::{Budget, Machine, Placement, PlacementError, Request, place};
use ktx_core::plan::{CheckMode, check, plan};
use ktx_core::rules::RuleSet;

const GIB: f64 = (1_u64 << 30) as f64;

fn gib(size: f64) -> u64 {
    (size * GIB) as u64
}

fn model(name: &str) -> (Gguf, ModelDescription) {
    let model = published_model(name).unwrap();
    let gguf = described(model.name, model.metadata(), model.tying, QuantMix::Q4_K_M).unwrap();
    let description = describe(&gguf).unwrap();
    (gguf, description)
}

fn request(gpus: &[f64], ram: f64) -> Request {
    let budget = Budget {
        gpus: gpus.iter().copied().map(gib).collect(),
        ram: gib(ram),
    };
    Request::new(budget, Machine::typical())
}

fn placed(name: &str, gpus: &[f64], ram: f64) -> (ModelDescription, Placement) {
    let (gguf, description) = model(name);
    let placement = place(&description, &gguf, &request(gpus, ram)).unwrap();
    (description, placement)
}

/// The plan of the emitted rules has every module on the placement's device, without a warning.
fn check_rules(description: &ModelDescription, placement: &Placement) {
    let text = placement.rules(description).unwrap();
    let rules = RuleSet::parse(&text, "emitted").unwrap();
    let plan = plan(&description.tree, &rules, "cpu").unwrap();
    assert!(plan.warnings.is_empty(), "{:?}\n{text}", plan.warnings);
    let report = check(
        &plan,
        &description.tree,
        registry(),
        CheckMode::Model(&std::collections::BTreeMap::new()),
    );
    assert!(report.is_ok(), "{:?}\n{text}", report.errors);
    for entry in plan.entries() {
        if entry.path.is_empty() {
            continue;
        }
        let there = plan.placement(entry, registry()).unwrap();
        let wanted = placement.device_of(&entry.path);
        assert_eq!(there.generate, wanted, "{}\n{text}", entry.path);
        let mut reads = wanted;
        if entry.path.ends_with(".experts") {
            let home = placement.device_of(entry.path.rsplit_once('.').unwrap().0);
            let out = entry.kwarg("out_device").and_then(|v| v.as_str());
            assert_eq!(out, Some(home.to_string().as_str()), "{}", entry.path);
            if placement.request.streams.is_some() && wanted.is_cpu() {
                reads = home;
            }
        }
        assert_eq!(there.prefill, reads, "{}\n{text}", entry.path);
    }
}

fn check_memory(placement: &Placement) {
    for (device, memory) in &placement.memory {
        let budget = match device.is_cpu() {
            true => placement.request.budget.ram,
            false => placement.request.budget.gpus[usize::from(device.index())],
        };
        assert!(memory.total() <= budget, "{device}: {memory:?} in {budget}");
    }
}

#[test]
fn budgets_that_the_original_states_suffice() {
    for (name, gpu, ram) in [
        ("deepseek-v3-671b", 14.0, 382.0),
        ("deepseek-v2-236b", 11.0, 136.0),
        ("qwen2-57b-a14b", 8.0, 34.0),
        ("mixtral-8x7b", 1.6, 51.0),
        ("deepseek-v2-lite", 3.0, 13.0),
    ] {
        let (description, placement) = placed(name, &[gpu], ram);
        println!("{name}\n{placement}");
        check_memory(&placement);
        check_rules(&description, &placement);
        assert!(
            placement.prediction.generate > 1.05 * placement.host_only.generate,
            "{name}: {:?}, on the host alone {:?}",
            placement.prediction,
            placement.host_only
        );
    }
}

#[test]
fn attention_of_deepseek_v3_goes_to_the_gpu_and_its_experts_to_main_memory() {
    let (_, placement) = placed("deepseek-v3-671b", &[14.0], 382.0);
    let gpu: Device = "cuda:0".parse().unwrap();
    let layers = &placement.stages[1..62];
    assert!(layers.iter().all(|l| l.home == gpu));
    assert!(
        layers
            .iter()
            .all(|l| l.ffn.as_ref().is_some_and(|(d, _)| *d == gpu))
    );
    let on_gpu =
        |l: &&ktx_core::placement::PlacedStage| l.experts.as_ref().is_some_and(|(d, _)| *d == gpu);
    assert_eq!(layers.iter().filter(on_gpu).count(), 0);
    assert_eq!(
        placement.stages[0].home,
        Device::CPU,
        "the table is read by rows"
    );
}

#[test]
fn rules_load_back_to_the_same_plan() {
    for (name, gpus, ram) in [
        ("qwen3-30b-a3b", &[10.0][..], 64.0),
        ("qwen3-30b-a3b", &[6.0, 9.0], 64.0),
        ("qwen3-30b-a3b", &[24.0], 64.0),
        ("mixtral-8x7b", &[12.0, 4.0, 8.0], 64.0),
        ("moonlight-16b-a3b", &[0.6], 64.0),
        ("deepseek-v2-lite", &[5.0, 4.0], 64.0),
        ("llama-3.1-8b", &[3.0], 64.0),
        ("qwen2.5-7b", &[2.0, 2.0], 64.0),
        ("qwen3-8b", &[], 64.0),
        ("qwen2-57b-a14b", &[16.0, 16.0], 64.0),
    ] {
        let (description, placement) = placed(name, gpus, ram);
        println!("{name} {gpus:?}\n{placement}");
        check_memory(&placement);
        check_rules(&description, &placement);
    }
}

#[test]
fn streams_take_memory_and_save_time_of_long_prompts() {
    let (gguf, description) = model("qwen3-30b-a3b");
    let mut request = request(&[8.0], 64.0);
    request.chunk_size = 2048;
    request.workload.prompt = 2048;
    let without = place(&description, &gguf, &request).unwrap();
    let bytes = gib(1.5);
    request.streams = Some(bytes);
    let with = place(&description, &gguf, &request).unwrap();
    println!("{with}");
    check_memory(&with);
    check_rules(&description, &with);
    let gpu: Device = "cuda:0".parse().unwrap();
    let scratch = |placement: &Placement| placement.memory[&gpu].scratch;
    assert_eq!(scratch(&with), scratch(&without) + bytes);
    assert!(with.prediction.prefill > 2.0 * without.prediction.prefill);
    assert!(with.prediction.generate <= without.prediction.generate);
    assert!(with.seconds() < without.seconds());

    // A bus this slow is no help.
    request.machine.gpu.link = 1e8;
    let slow = place(&description, &gguf, &request).unwrap();
    assert!(slow.prediction.prefill < 1.1 * without.prediction.prefill);
}

#[test]
fn layers_of_a_gpu_are_a_range() {
    let (_, placement) = placed("mixtral-8x7b", &[12.0, 12.0], 64.0);
    let mut last = 0;
    for stage in &placement.stages {
        for device in [Some(stage.home), stage.experts.as_ref().map(|(d, _)| *d)] {
            let Some(device) = device.filter(|d| !d.is_cpu()) else {
                continue;
            };
            assert!(device.index() >= last, "{placement}");
            last = device.index();
        }
    }
    assert_eq!(last, 1);
}

#[test]
fn more_memory_is_never_slower() {
    let seconds = |gpu: f64| {
        let (_, placement) = placed("qwen3-30b-a3b", &[gpu], 64.0);
        let work = placement.request.workload;
        work.prompt as f64 / placement.prediction.prefill
            + work.generate as f64 / placement.prediction.generate
    };
    let times: Vec<f64> = [1.0, 2.0, 4.0, 8.0, 16.0, 24.0].map(seconds).to_vec();
    assert!(times.is_sorted_by(|a, b| *b <= *a * 1.000_001), "{times:?}");
}

#[test]
fn what_does_not_fit_is_refused_with_what_does() {
    let (gguf, description) = model("deepseek-v2-lite");
    let refusal = |request: &Request| place(&description, &gguf, request).unwrap_err().to_string();
    let said = refusal(&request(&[], 8.0));
    assert!(
        said.contains("it fits with --ram ") && said.contains("smaller quantisation"),
        "{said}"
    );
    assert!(
        !said.contains("--context"),
        "no context is small enough: {said}"
    );

    let mut long = request(&[], 11.0);
    long.context = 160_000;
    let said = refusal(&long);
    let number = |after: &str| -> u64 {
        let rest = said.split_once(after).unwrap().1;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap()
    };
    // What is recommended fits, and not much more does.
    let (context, ram) = (number("--context "), number("--ram "));
    let fits = |context: u64, ram: u64| {
        let mut request = request(&[], 0.0);
        request.context = context as usize;
        request.budget.ram = ram;
        place(&description, &gguf, &request).is_ok()
    };
    assert!(
        fits(context, gib(11.0)) && !fits(context + 64, gib(11.0)),
        "{said}"
    );
    assert!(
        fits(160_000, ram << 20) && !fits(160_000, (ram - 1) << 20),
        "{said}"
    );

    let error = place(&description, &gguf, &request(&[0.1], 64.0)).unwrap_err();
    assert!(
        matches!(error, PlacementError::GpuTooSmall { .. }),
        "{error}"
    );
}

#[test]
fn tight_main_memory_moves_experts_to_the_gpu() {
    let (gguf, description) = model("deepseek-v2-lite");
    let placed = |ram| {
        let mut request = request(&[6.0], ram);
        // Whose memory is slower than the host's: nothing goes there that need not.
        request.machine.gpu.bandwidth = 0.2 * request.machine.cpu.bandwidth;
        request.machine.gpu.flops = 1e10;
        place(&description, &gguf, &request).unwrap()
    };
    let (loose, tight) = (placed(64.0), placed(5.6));
    let on_host = |placement: &Placement| placement.memory[&Device::CPU].total();
    assert!(on_host(&loose) > gib(8.0), "{loose}");
    assert!(on_host(&tight) <= gib(5.6), "{tight}");
    check_rules(&description, &tight);
}
