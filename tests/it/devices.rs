//! One model on several host devices: what moves between them, and prompts that are read layer by layer.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

use ktx_core::gguf::Gguf;
use ktx_core::kernels::device::Device;
use ktx_core::kernels::workspace::{Act, Transfers};
use ktx_core::ops::module::Holding;
use ktx_core::ops::{
    BuildArgs, Capacity, Forward, KModule, Linear, Loader, NoKwargs, OpError, Operator, Phase,
    registry,
};
use ktx_core::serving::{Scheduler, SchedulerSettings};
use ktx_core::{Engine, EngineBuilder, FinishReason, Rules, TokenId, register_operator};

use crate::naive::measure::nmse;
use crate::run::{all_logits, forced_logits, last_logits, load, pip, repository};
use crate::serving::{answer, ask};

const HIDDEN: u64 = 256;
const TOP_K: u64 = 4;
const PROMPT: [u32; 40] = {
    let mut ids = [0; 40];
    let mut i = 0;
    while i < 40 {
        ids[i] = 300 + 17 * i as u32;
        i += 1;
    }
    ids
};

fn ruled(text: &str) -> EngineBuilder {
    Engine::builder()
        .gguf(pip())
        .threads(2)
        .chunk_size(16)
        .rules(Rules::Text {
            name: "test.yaml".to_owned(),
            text: text.to_owned(),
        })
}

fn device(name: &str) -> Device {
    name.parse().unwrap()
}

fn moved(engine: &Engine, from: &str, to: &str) -> Transfers {
    let all = engine.transfers().unwrap();
    all.get(&(device(from), device(to)))
        .copied()
        .unwrap_or_default()
}

/// Values of f32 in a number of copies.
fn copies(count: u64, values: u64) -> Transfers {
    Transfers {
        count,
        bytes: 4 * values,
    }
}

/// Layers from the third on are on `cpu:1`, and the rules name the device before it as `map` says.
fn two_devices(map: &str) -> String {
    format!(
        "- match: {{name: '^model\\.layers\\.[2-4]'}}\n  replace:\n    class: default\n    \
         kwargs: {{generate_device: 'cpu:1', prefill_device: 'cpu:1'}}\n\
         - match: {{name: '^model$'}}\n  replace:\n    class: KDeepseekV2Model\n    \
         kwargs: {{transfer_map: {map}}}\n"
    )
}

#[test]
fn a_transfer_map_moves_the_hidden_state_once_each_way_and_changes_no_logit() {
    let engine = load(ruled(&two_devices("{2: 'cpu:1'}")));
    let plain = load(ruled("[]"));
    let (mut session, mut reference) = (engine.session(), plain.session());
    assert_eq!(
        all_logits(&mut session, &PROMPT),
        all_logits(&mut reference, &PROMPT)
    );
    // Chunks of 16, 16 and 8 tokens, to the third layer and back for the norm.
    let prompt = copies(3, 40 * HIDDEN);
    assert_eq!(moved(&engine, "cpu", "cpu:1"), prompt);
    assert_eq!(moved(&engine, "cpu:1", "cpu"), prompt);
    assert_eq!(
        forced_logits(&mut session, 5),
        forced_logits(&mut reference, 5)
    );
    assert_eq!(
        moved(&engine, "cpu", "cpu:1"),
        copies(4, 41 * HIDDEN),
        "a generated token moves once"
    );
    assert!(plain.transfers().unwrap().is_empty());
}

#[test]
fn the_hidden_state_follows_the_map_even_where_the_layers_need_no_move() {
    let engine = load(ruled(&two_devices("{1: 'cpu:2', 2: 'cpu:1'}")));
    let plain = load(ruled("[]"));
    assert_eq!(
        last_logits(&mut engine.session(), &PROMPT[..8]),
        last_logits(&mut plain.session(), &PROMPT[..8])
    );
    // To cpu:2 and back, since layer 1 is on cpu; then to cpu:1 and back.
    for (from, to) in [("cpu", "cpu:2"), ("cpu:2", "cpu"), ("cpu", "cpu:1")] {
        assert_eq!(
            moved(&engine, from, to),
            copies(1, 8 * HIDDEN),
            "{from} to {to}"
        );
    }
}

#[test]
fn experts_on_another_device_get_their_rows_and_choices_and_land_where_they_are_told() {
    let rules = |out: &str| {
        format!(
            "- match: {{name: '^model\\.layers\\.1\\.mlp\\.experts$'}}\n  replace:\n    \
             class: KTransformersExperts\n    kwargs: {{generate_op: KExpertsCPU, prefill_op: KExpertsCPU, \
             generate_device: 'cpu:1', prefill_device: 'cpu:1'{out}}}\n"
        )
    };
    let plain = load(ruled("[]"));
    let expected = last_logits(&mut plain.session(), &PROMPT[..8]);
    for (out, steps) in [
        ("", vec![("cpu:1", "cpu")]),
        (", out_device: 'cpu'", vec![("cpu:1", "cpu")]),
        (
            ", out_device: 'cpu:2'",
            vec![("cpu:1", "cpu:2"), ("cpu:2", "cpu")],
        ),
    ] {
        let engine = load(ruled(&rules(out)));
        assert_eq!(
            last_logits(&mut engine.session(), &PROMPT[..8]),
            expected,
            "{out}"
        );
        // Rows, ids and weights go; the sum comes back.
        assert_eq!(
            moved(&engine, "cpu", "cpu:1"),
            copies(3, 8 * (HIDDEN + 2 * TOP_K)),
            "{out}"
        );
        for (from, to) in steps {
            assert_eq!(moved(&engine, from, to), copies(1, 8 * HIDDEN), "{out}");
        }
    }
}

#[test]
fn an_out_device_or_a_transfer_map_that_names_no_device_is_refused() {
    for (rules, wanted) in [
        (two_devices("{2: 'gpu'}"), "transfer_map"),
        (
            "- match: {name: '^model\\.layers\\.1\\.mlp\\.experts$'}\n  replace:\n    \
             class: KTransformersExperts\n    kwargs: {out_device: 'gpu', generate_device: cpu, \
             prefill_device: cpu}\n"
                .to_owned(),
            "out_device",
        ),
    ] {
        let error = ruled(&rules).load().map(drop).unwrap_err().to_string();
        assert!(error.contains(wanted) && error.contains("gpu"), "{error}");
    }
}

/// A product that keeps account of which of its kind are loaded.
struct Counted(Box<dyn Linear>);

#[derive(Default)]
struct Account {
    loaded: BTreeSet<String>,
    /// Layers of which something was loaded at one time, at most.
    most_layers: usize,
    loads: usize,
    products: usize,
}

static ACCOUNT: Mutex<Account> = Mutex::new(Account {
    loaded: BTreeSet::new(),
    most_layers: 0,
    loads: 0,
    products: 0,
});
/// Tests that read the account run one after the other.
static TURN: Mutex<()> = Mutex::new(());

fn layer_of(path: &str) -> String {
    path.split('.').take(3).collect::<Vec<_>>().join(".")
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    let inner = registry().get("KLinearMarlin").expect("it is built in");
    match (inner.build)(args)? {
        Operator::Linear(inner) => Ok(Operator::Linear(Box::new(Counted(inner)))),
        _ => Err(args.unfit("a linear module")),
    }
}

register_operator! {
    class: "test.Counted",
    aliases: [],
    role: Linear,
    summary: "product that keeps account of what is loaded",
    kwargs: NoKwargs,
    build: build,
}

impl KModule for Counted {
    fn path(&self) -> &str {
        self.0.path()
    }

    fn class_path(&self) -> &'static str {
        "test.Counted"
    }

    fn device(&self, phase: Phase) -> Device {
        self.0.device(phase)
    }

    fn load(&mut self, loader: &mut Loader<'_>) -> Result<(), OpError> {
        let mut account = account();
        account.loads += 1;
        assert!(
            account.loaded.insert(self.path().to_owned()),
            "{} is loaded twice",
            self.path()
        );
        let layers: BTreeSet<String> = account.loaded.iter().map(|path| layer_of(path)).collect();
        account.most_layers = account.most_layers.max(layers.len());
        self.0.load(loader)
    }

    fn unload(&mut self) {
        assert!(account().loaded.remove(self.path()));
        self.0.unload();
    }

    fn holding(&self) -> Vec<Holding> {
        self.0.holding()
    }

    fn scratch(&self, capacity: Capacity) -> usize {
        self.0.scratch(capacity)
    }
}

impl Linear for Counted {
    fn in_features(&self) -> usize {
        self.0.in_features()
    }

    fn out_features(&self) -> usize {
        self.0.out_features()
    }

    fn forward(&self, cx: &mut Forward<'_>, x: Act, out: Act) -> Result<(), OpError> {
        account().products += 1;
        self.0.forward(cx, x, out)
    }
}

fn layerwise(gguf: Gguf, threshold: &str) -> EngineBuilder {
    ruled(&format!(
        "- match: {{name: '^model\\.layers\\.\\d+\\.(self_attn\\.o_proj|mlp\\.(shared_experts?\\.)?down_proj)$'}}\n  replace:\n    \
         class: KTransformersLinear\n    kwargs: {{generate_op: KLinearMarlin, prefill_op: test.Counted, \
         generate_device: cpu, prefill_device: 'cpu:1'}}\n\
         - match: {{name: '^model$'}}\n  replace:\n    class: KDeepseekV2Model\n    \
         kwargs: {{per_layer_prefill_intput_threshold: {threshold}}}\n"
    ))
    .gguf(gguf)
}

fn account() -> MutexGuard<'static, Account> {
    ACCOUNT.lock().unwrap_or_else(PoisonError::into_inner)
}

fn fresh_account() {
    *account() = Account::default();
}

/// Others would wait for a whole prompt: a scheduler reads it in parts, with the operators that generate.
#[test]
fn a_scheduler_reads_long_prompts_without_loading_layers() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    fresh_account();
    let prompt: Vec<TokenId> = (0..100).map(|i| TokenId(300 + 7 * i)).collect();
    let settings = SchedulerSettings {
        max_running: 4,
        ..SchedulerSettings::default()
    };
    let answers = [load(layerwise(pip(), "20")), load(ruled("[]"))].map(|engine| {
        let scheduler = Scheduler::start(engine, settings.clone()).expect("it starts");
        answer(ask(&scheduler, &prompt, 3, 16)).0
    });
    assert_eq!(answers[0], answers[1]);
    assert_eq!(account().loads, 0);
}

#[test]
fn long_prompts_are_read_with_the_weights_of_one_layer_at_a_time() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    fresh_account();
    let plain = load(ruled("[]"));
    let engine = load(layerwise(pip(), "20"));
    let (mut session, mut reference) = (engine.session(), plain.session());
    assert_eq!(
        all_logits(&mut session, &PROMPT[..20]),
        all_logits(&mut reference, &PROMPT[..20])
    );
    assert_eq!(account().loads, 0, "20 tokens are not more than 20");
    // The prompt goes on behind what is cached.
    assert_eq!(
        all_logits(&mut session, &PROMPT),
        all_logits(&mut reference, &PROMPT)
    );
    {
        let account = account();
        assert_eq!(account.most_layers, 1);
        assert!(account.loaded.is_empty(), "all is given back");
        // Two products in a layer with one dense or shared block, for each of the prompt's three chunks.
        assert_eq!((account.loads, account.products), (2 * 5, 3 * 2 * 5));
    }
    assert_eq!(
        forced_logits(&mut session, 7),
        forced_logits(&mut reference, 7)
    );
}

#[test]
fn models_of_other_families_are_read_layer_by_layer_too() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    for family in ["deepseek_v2", "qwen2moe", "llama"] {
        fresh_account();
        let path = format!("tests/fixtures/transformers/{family}.gguf");
        let gguf = Gguf::open(repository(&path)).unwrap();
        let ids: Vec<u32> = (0..24).collect();
        let engine = load(layerwise(gguf.clone(), "16"));
        let plain = load(Engine::builder().gguf(gguf).threads(2).chunk_size(16));
        // Weights that are floats are multiplied in `f32` inside one operator and in tiles by another where there are
        // tiles.
        let read = |engine: &Engine| all_logits(&mut engine.session(), &ids).concat();
        let error = nmse(&read(&engine), &read(&plain));
        assert!(error < 1e-9, "{family}: {error:e}");
        assert!(account().products > 0, "{family}");
    }
}

#[test]
fn without_a_threshold_the_operators_for_prompts_stay_loaded() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    fresh_account();
    let engine = load(layerwise(pip(), "0"));
    let loads = account().loads;
    assert!(loads > 5);
    last_logits(&mut engine.session(), &PROMPT[..4]);
    let account = account();
    assert_eq!((account.loads, account.products), (loads, loads));
}

#[test]
fn a_prompt_read_layer_by_layer_can_be_stopped_and_read_again() {
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    fresh_account();
    let engine = load(layerwise(pip(), "4"));
    let mut session = engine.session();
    let cancel = session.cancel_handle();
    let mut generation = session
        .generate(&crate::run::tokens(&PROMPT), &crate::generation::greedy(3))
        .unwrap();
    cancel.cancel();
    assert!(generation.all(|piece| piece.unwrap().token.is_none()));
    assert_eq!(generation.finish_reason(), Some(FinishReason::Cancelled));
    drop(generation);
    assert!(session.tokens().is_empty());
    assert!(account().loaded.is_empty());
    let again = last_logits(&mut session, &PROMPT);
    let plain = load(ruled("[]"));
    assert_eq!(again, last_logits(&mut plain.session(), &PROMPT));
}
