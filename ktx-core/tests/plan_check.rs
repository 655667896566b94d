//! Plans against operators and devices: wrong classes, roles and arguments, missing devices.

use std::collections::BTreeMap;

use ktx_core::plan::{CheckMode, CheckReport, Plan, check, plan, require_devices};
use ktx_core::rules::RuleSet;
use ktx_kernels::device::Device;
use ktx_ops::spec::{LinearSource, LinearSpec, MlpSpec, NormSpec, RowOrder};
use ktx_ops::{
    BuildArgs, KwargDoc, KwargSet, Module, NoKwargs, OpError, Operator, Spec, register_operator,
    registry,
};
use serde::{Deserialize, Serialize};

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    Err(args.error("builds nothing"))
}

#[derive(Serialize, Deserialize, Default)]
#[serde(default)]
struct WrapperKwargs {
    generate_op: Option<String>,
    prefill_op: Option<String>,
}

impl KwargSet for WrapperKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "generate_op",
            doc: "inner operator",
            ignored: None,
        },
        KwargDoc {
            name: "prefill_op",
            doc: "inner operator",
            ignored: None,
        },
    ];
}

#[derive(Serialize, Deserialize)]
#[serde(default)]
struct InnerKwargs {
    bits: u32,
    stride: u32,
    out_device: String,
}

impl Default for InnerKwargs {
    fn default() -> Self {
        Self {
            bits: 4,
            stride: 16,
            out_device: "cuda".to_owned(),
        }
    }
}

impl KwargSet for InnerKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "bits",
            doc: "width of a weight",
            ignored: None,
        },
        KwargDoc {
            name: "stride",
            doc: "rows of a task",
            ignored: Some("tasks are sized at run time"),
        },
        KwargDoc {
            name: "out_device",
            doc: "where the result lands",
            ignored: None,
        },
    ];
}

register_operator! {
    class: "check.test.Wrapper",
    aliases: [],
    role: Linear,
    summary: "a wrapper",
    kwargs: open WrapperKwargs,
    build: build,
}
register_operator! {
    class: "check.test.InnerOne",
    aliases: ["CheckInnerOne"],
    role: Linear,
    summary: "an inner operator",
    kwargs: InnerKwargs,
    build: build,
}
register_operator! {
    class: "check.test.Fp8",
    aliases: ["CheckFp8"],
    role: Linear,
    summary: "an operator that this build lacks something for",
    needs: "an FP8 tensor core",
    kwargs: NoKwargs,
    build: build,
}
register_operator! {
    class: "check.test.Norm",
    aliases: [],
    role: Norm,
    summary: "a norm",
    kwargs: NoKwargs,
    build: build,
}

register_operator! {
    class: "check.test.Narrow",
    aliases: ["CheckNarrow"],
    role: Linear,
    summary: "an operator that takes few modules",
    kwargs: NoKwargs,
    validate: |module, store| match store.tensor("wide") {
        None if module.name != "up_proj" => Err("it needs a tensor `wide`; give it one".to_owned()),
        _ => Ok(()),
    },
    build: build,
}

fn linear() -> Spec {
    Spec::Linear(LinearSpec {
        in_features: 8,
        out_features: 8,
        source: LinearSource::Key,
        order: RowOrder::Original,
    })
}

fn tree() -> Module {
    let mut root = Module::root("check.Model", Spec::Container);
    let mlp_spec = MlpSpec {
        hidden_size: 8,
        intermediate_size: 8,
        projections: ["gate_proj", "up_proj", "down_proj"],
    };
    let mlp = root.add("mlp", "check.Mlp", Spec::Mlp(mlp_spec));
    for name in ["gate_proj", "up_proj", "down_proj"] {
        mlp.add(name, "torch.nn.Linear", linear());
    }
    root.add(
        "norm",
        "check.RMSNorm",
        Spec::Norm(NormSpec { size: 8, eps: 1e-6 }),
    );
    root
}

fn planned(rules: &str) -> Plan {
    plan(&tree(), &RuleSet::parse(rules, "r.yaml").unwrap(), "cuda:0").unwrap()
}

fn checked(rules: &str) -> CheckReport {
    check(
        &planned(rules),
        &tree(),
        registry(),
        CheckMode::Model(&BTreeMap::new()),
    )
}

fn lines(rules: &str) -> Vec<String> {
    checked(rules)
        .to_string()
        .lines()
        .map(str::to_owned)
        .collect()
}

#[test]
fn an_unknown_operator_is_named_with_its_place_and_the_nearest_one() {
    assert_eq!(
        lines("- match: {class: torch.nn.Linear}\n  replace:\n    class: check.test.Wraper\n"),
        [
            "error: r.yaml:3:12: no operator is registered as `check.test.Wraper` (did you mean `check.test.Wrapper`?); \
          `ktx operators` lists all"
        ]
    );
    assert!(
        lines("- match: {name: mlp}\n  replace: {class: Default}")[0]
            .contains("did you mean `default`?")
    );
    let report = check(
        &planned("- match: {name: mlp}\n  replace: {class: X.Y}"),
        &tree(),
        registry(),
        CheckMode::Tree,
    );
    assert!(report.is_ok() && report.warnings.len() == 1);
}

#[test]
fn an_operator_of_another_role_is_named_with_both_roles() {
    assert_eq!(
        lines("- match: {class: torch.nn.Linear}\n  replace: {class: check.test.Norm}"),
        [
            "error: r.yaml:2:20: rule 1 (line 1) puts `check.test.Norm`, of role Norm, in the place of `mlp.gate_proj`, \
          of role Linear (and 2 more modules); change the class, or narrow the rule's `match`"
        ]
    );
}

#[test]
fn every_argument_that_does_not_fit_is_named() {
    let found = lines(
        "- match: {class: torch.nn.Linear}\n  replace:\n    class: check.test.InnerOne\n    kwargs:\n      \
         bitz: 4\n      bits: many\n      stride: 8\n      generate_device: gpu\n",
    );
    assert_eq!(found.len(), 4, "{found:#?}");
    assert!(
        found[0].starts_with(
            "error: r.yaml:8:7: `generate_device` of module `mlp.gate_proj` is \"gpu\""
        ),
        "{found:#?}"
    );
    assert!(
        found[1].starts_with("error: r.yaml:5:7: `check.test.InnerOne` has no argument `bitz`"),
        "{found:#?}"
    );
    assert!(found[1].contains("did you mean `bits`?"), "{found:#?}");
    assert!(
        found[2].starts_with(
            "error: r.yaml:6:7: argument `bits` of `check.test.InnerOne` cannot be \"many\""
        ),
        "{found:#?}"
    );
    assert!(
        found[3].starts_with(
            "warning: r.yaml:7:7: `stride` of `check.test.InnerOne` has no effect: tasks are"
        ),
        "{found:#?}"
    );
}

#[test]
fn arguments_of_inner_operators_are_checked_with_them() {
    let rule = |kwargs: &str| {
        lines(&format!(
            "- match: {{class: torch.nn.Linear}}\n  replace: {{class: check.test.Wrapper, kwargs: {{{kwargs}}}}}"
        ))
    };
    assert!(rule("generate_op: CheckInnerOne, bits: 8").is_empty());
    assert!(rule("prefill_op: null, generate_op: CheckInnerOne").is_empty());
    assert!(
        rule("generate_op: CheckInnerOne, bitz: 8")[0]
            .contains("has no argument `bitz` (did you mean `bits`?)")
    );
    assert!(rule("generate_op: CheckInnerOne, bits: x")[0].contains("cannot be \"x\""));
    let unknown = rule("generate_op: CheckInerOne, bits: 8");
    assert_eq!(unknown.len(), 1, "{unknown:?}");
    assert!(unknown[0].contains(
        "names `CheckInerOne`, which is no Linear operator (did you mean `CheckInnerOne`?)"
    ));
    assert!(rule("generate_op: check.test.Norm")[0].contains("which is no Linear operator"));
    assert!(rule("generate_op: CheckFp8")[0].ends_with("`CheckFp8` needs an FP8 tensor core"));
}

#[test]
fn a_module_with_weights_needs_a_place() {
    let found =
        lines("- match: {name: '^(mlp|norm)'}\n  replace: {class: default, kwargs: {speed: 1}}");
    assert!(found[0].starts_with(
        "error: r.yaml:1:3: rule 1 (line 1) keeps `mlp.gate_proj` as it is and gives no `generate_device`"
    ));
    assert!(found[0].contains("(and 3 more modules)"), "{found:?}");
    assert!(
        found[1].starts_with("warning: r.yaml:2:38: `speed` of `default` has no effect"),
        "{found:?}"
    );
    assert_eq!(
        lines("- match: {name: mlp}\n  replace: {class: , kwargs: }").len(),
        2
    );
}

#[test]
fn a_device_that_is_not_there_is_refused_with_the_first_rule_that_names_it() {
    let rules = "- match: {name: norm}\n  replace: {kwargs: {generate_device: cpu, prefill_device: cpu}}\n\
                 - match: {class: torch.nn.Linear}\n  replace:\n    class: check.test.Wrapper\n    kwargs:\n      \
                 generate_device: 'cuda:1'\n";
    let mut planned = planned(rules);
    let refused = require_devices(&planned, &[Device::CPU], registry())
        .unwrap_err()
        .to_string();
    assert_eq!(
        refused,
        "r.yaml:7:7: rule 2 (line 3) puts `mlp.gate_proj` on cuda:1, and this machine has no such device (there is: cpu); \
         `--cpu` puts every module on the CPU"
    );
    planned.map_devices_to_cpu(registry());
    require_devices(&planned, &[], registry()).unwrap();
    assert!(
        planned.notes[0].starts_with("every device is mapped to the CPU"),
        "{:?}",
        planned.notes
    );
    let kwargs = planned
        .entry("mlp.up_proj")
        .unwrap()
        .kwargs
        .as_ref()
        .unwrap()
        .to_json();
    assert_eq!(
        serde_json::json!(kwargs),
        serde_json::json!({ "generate_device": "cpu", "prefill_device": "cpu" })
    );
    assert_eq!(
        planned
            .placement_at("mlp.below.a.cut", registry())
            .unwrap()
            .generate,
        Device::CPU
    );
}

#[test]
fn mapping_to_the_cpu_covers_what_operators_default_to() {
    let mut planned = planned(
        "- match: {class: torch.nn.Linear}\n  replace: {class: check.test.Wrapper, kwargs: {generate_op: CheckInnerOne}}\n\
         - match: {name: '^mlp$'}\n  replace: {kwargs: {transfer_map: {1: 'cuda:1', 2: 'cpu:1'}, generate_device: 'cpu:1'}}\n",
    );
    planned.map_devices_to_cpu(registry());
    let kwargs = |path: &str| {
        serde_json::json!(
            planned
                .entry(path)
                .unwrap()
                .kwargs
                .as_ref()
                .unwrap()
                .to_json()
        )
    };
    assert_eq!(kwargs("mlp.up_proj")["out_device"], "cpu");
    assert_eq!(
        kwargs("mlp"),
        serde_json::json!({ "transfer_map": { "1": "cpu", "2": "cpu:1" }, "generate_device": "cpu:1" })
    );
}

#[test]
fn the_default_device_is_refused_where_no_rule_says_better() {
    let refused = require_devices(&planned("[]"), &[], registry())
        .unwrap_err()
        .to_string();
    assert!(
        refused.starts_with("no rule matches `mlp`, so it goes to the default device cuda:0"),
        "{refused}"
    );
    require_devices(&planned("[]"), &["cuda:0".parse().unwrap()], registry()).unwrap();
}

#[test]
fn presets_name_operators_that_are_registered() {
    for preset in ktx_core::rules::presets() {
        for rule in RuleSet::from_preset(preset).unwrap().rules() {
            let replace = rule.replace.as_ref().unwrap();
            let class = replace.class.as_deref().unwrap();
            assert!(
                class == "default" || registry().get(class).is_some(),
                "{}: {class}",
                preset.name
            );
            for argument in ["generate_op", "prefill_op"] {
                let inner = replace
                    .kwargs
                    .as_ref()
                    .and_then(|k| k.get(argument))
                    .and_then(|v| v.as_str());
                assert!(
                    inner.is_none_or(|name| registry().get(name).is_some()),
                    "{}: {inner:?}",
                    preset.name
                );
            }
        }
    }
}

#[test]
fn operators_are_asked_whether_they_take_a_module_and_answer_with_the_rules_line() {
    let direct = "- match: {class: torch.nn.Linear}\n  replace:\n    class: check.test.Narrow\n";
    let inner = "- match: {class: torch.nn.Linear}\n  replace:\n    class: check.test.Wrapper\n    kwargs:\n      \
                 generate_op: CheckNarrow\n      prefill_op: CheckNarrow\n";
    for (rules, place) in [(direct, "r.yaml:3:"), (inner, "r.yaml:5:")] {
        let report = checked(rules);
        let [error] = report.errors.as_slice() else {
            panic!("{report}");
        };
        let text = error.to_string();
        assert!(text.starts_with(place), "{text}");
        assert!(
            text.contains("`check.test.Narrow` cannot take the place of `mlp.gate_proj` (and one more module): it needs a tensor `wide`"),
            "{text}"
        );
        let wide = ktx_core::gguf::Tensor::from_f32("wide", &[1], vec![0.0]);
        let store = BTreeMap::from([("wide".to_owned(), wide)]);
        let report = check(
            &planned(rules),
            &tree(),
            registry(),
            CheckMode::Model(&store),
        );
        assert!(report.is_ok(), "{report}");
        assert!(check(&planned(rules), &tree(), registry(), CheckMode::Tree).is_ok());
    }
}
