//! Extensions of the rule format: what they do, and that files without the switch mean what they meant.

use std::fs;
use std::path::{Path, PathBuf};

use ktx_core::gguf::Gguf;
use ktx_core::plan::{KeyStyle, Plan, PlanError, plan, plan_model, tree_from_json};
use ktx_core::rules::{RuleSet, RuleVariables, lint, lint_plan};
use ktx_models::describe;
use ktx_ops::Module;
use proptest::prelude::*;
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plans")
}

fn tree(name: &str) -> Module {
    let file = format!("{name}.json");
    let text = fs::read_to_string(folder().join("trees").join(&file)).expect("a tree");
    tree_from_json(&text, &file).expect("a tree")
}

fn planned(tree: &Module, rules: &str) -> Plan {
    let rules = RuleSet::parse(rules, "r.yaml").unwrap_or_else(|e| panic!("{e}"));
    plan(tree, &rules, "cuda:0").unwrap_or_else(|e| panic!("{e}"))
}

/// What is wrong with rules, on a tree if not before.
fn refused(tree: &Module, rules: &str) -> String {
    match RuleSet::parse(rules, "r.yaml") {
        Err(error) => error.to_string(),
        Ok(rules) => match plan(tree, &rules, "cuda:0") {
            Err(PlanError::Rule { source, .. }) => source.to_string(),
            Ok(_) => panic!("it is planned"),
        },
    }
}

/// Paths of the modules that a rule took.
fn taken(plan: &Plan) -> Vec<&str> {
    let by_rule = plan.entries().iter().filter(|e| e.rule.is_some());
    by_rule.map(|e| e.path.as_str()).collect()
}

const REPLACE: &str =
    "  replace: {class: default, kwargs: {generate_device: cpu, prefill_device: cpu}}\n";

fn extended(matches: &str) -> String {
    format!("- ktx: 1\n- match: {{{matches}}}\n{REPLACE}")
}

#[test]
fn a_glob_takes_whole_paths() {
    let tree = tree("Qwen2-57B-A14B");
    let plan = planned(&tree, &extended("glob: 'model.layers.{3..4}.mlp.experts'"));
    assert_eq!(
        taken(&plan),
        ["model.layers.3.mlp.experts", "model.layers.4.mlp.experts"]
    );
    assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
}

#[test]
fn layers_take_the_layer_and_all_below_it_and_narrow_other_conditions() {
    let tree = tree("Qwen2-57B-A14B");
    let whole = planned(&tree, &extended("layers: 2"));
    assert!(taken(&whole).contains(&"model.layers.2"));
    assert!(
        taken(&whole)
            .iter()
            .all(|p| p.starts_with("model.layers.2"))
    );
    let both = planned(
        &tree,
        &extended("layers: '0-1,27-', name: 'input_layernorm$'"),
    );
    let layers: Vec<&str> = taken(&both)
        .iter()
        .filter_map(|p| p.split('.').nth(2))
        .collect();
    assert_eq!(layers, ["0", "1", "27"]);
}

#[test]
fn types_are_those_of_the_tensors_of_a_model() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/pip-17m.gguf");
    let gguf = Gguf::open(model).unwrap();
    let description = describe(&gguf).unwrap();
    for (tensor, path) in [
        (
            "blk.0.attn_output.weight",
            "model.layers.0.self_attn.o_proj",
        ),
        ("token_embd.weight", "model.embed_tokens"),
        (
            "blk.1.ffn_norm.weight",
            "model.layers.1.post_attention_layernorm",
        ),
    ] {
        let ty = gguf.tensor(tensor).unwrap().ty().name();
        let rules = RuleSet::parse(&extended(&format!("type: {}", ty.to_lowercase())), "r.yaml");
        let plan = plan_model(&description.tree, &rules.unwrap(), "cpu", &gguf).unwrap();
        assert!(taken(&plan).contains(&path), "{ty}: {:?}", taken(&plan));
        assert!(!taken(&plan).contains(&"model.layers.0.self_attn"));
    }
    let other = RuleSet::parse(&extended("type: [IQ1_S, TQ2_0]"), "r.yaml").unwrap();
    let plan = plan_model(&description.tree, &other, "cpu", &gguf).unwrap();
    assert_eq!(taken(&plan), [""; 0]);
    let warning = plan.warnings[0].to_string();
    assert!(
        warning.contains("no module has weights of its types"),
        "{warning}"
    );
}

#[test]
fn a_bare_tree_cannot_tell_types() {
    let said = refused(&tree("tiny"), &extended("type: Q4_K"));
    assert!(
        said.starts_with("r.yaml:2:17") && said.contains("only names and classes"),
        "{said}"
    );
}

#[test]
fn variables_have_defaults_and_are_set_from_outside() {
    let text = "- ktx: 1\n  variables: {gpu: cuda:0, idle: 1}\n- match: {name: '^lm_head$'}\n  \
                replace: {class: default, kwargs: {generate_device: '${gpu}', transfer_map: {30: '${gpu}'}}}\n";
    let tree = tree("tiny");
    let device = |variables: &RuleVariables| {
        let rules = RuleSet::parse_with(text, "r.yaml", variables).unwrap();
        let plan = plan(&tree, &rules, "cpu").unwrap();
        let entry = plan.entry("lm_head").unwrap();
        assert_eq!(
            entry.kwarg("transfer_map").unwrap()["30"],
            *entry.kwarg("generate_device").unwrap()
        );
        entry.kwarg("generate_device").cloned()
    };
    let mut variables = RuleVariables::default();
    assert_eq!(device(&variables), Some("cuda:0".into()));
    variables.set("gpu", "cuda:3");
    assert_eq!(device(&variables), Some("cuda:3".into()));
    let advice: Vec<String> = lint(&RuleSet::parse(text, "r.yaml").unwrap())
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(advice.len(), 1, "{advice:?}");
    assert!(
        advice[0].contains("`idle` is used by no rule"),
        "{advice:?}"
    );
    variables.set("gpus", "2");
    let error = RuleSet::parse_with(text, "r.yaml", &variables)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no variable `gpus` (did you mean `gpu`?)"),
        "{error}"
    );
    let plain = RuleSet::parse_with("[]", "plain.yaml", &variables)
        .unwrap_err()
        .to_string();
    assert!(
        plain.contains("`plain.yaml` declares no variable"),
        "{plain}"
    );
}

/// Files in a directory of their own.
fn files(files: &[(&str, &str)]) -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    for (name, text) in files {
        let path = directory.path().join(name);
        fs::create_dir_all(path.parent().expect("it has one")).expect("a directory");
        fs::write(path, text).expect("a file");
    }
    directory
}

/// The text without the directory's name.
fn without(directory: &tempfile::TempDir, text: impl ToString) -> String {
    text.to_string()
        .replace(&format!("{}/", directory.path().display()), "")
}

#[test]
fn included_rules_stand_in_their_place_and_keep_their_lines() {
    let directory = files(&[
        (
            "my.yaml",
            "- ktx: 1\n  variables: {gpu: cuda:7}\n- match: {glob: lm_head}\n  replace: {kwargs: {generate_device: cpu}}\n\
                     - include: sub/base.yaml\n- include: plain.yaml\n",
        ),
        (
            "sub/base.yaml",
            "- ktx: 1\n  variables: {gpu: cuda:1}\n- include: ../deeper.yaml\n\
                           - match: {name: '^lm_head'}\n  replace: {kwargs: {generate_device: '${gpu}'}}\n",
        ),
        (
            "deeper.yaml",
            "- ktx: 1\n- match: {name: '^model$'}\n  replace: {kwargs: {generate_device: '${gpu}'}}\n",
        ),
        (
            "plain.yaml",
            "- match: {name: norm, layers: 3}\n  replace: {kwargs: {generate_device: '${gpu}'}}\n",
        ),
    ]);
    let rules = RuleSet::from_path(directory.path().join("my.yaml")).unwrap();
    let places: Vec<String> = rules
        .rules()
        .iter()
        .map(|r| without(&directory, &r.reference.location))
        .collect();
    assert_eq!(
        places,
        [
            "my.yaml:3:3",
            "sub/../deeper.yaml:2:3",
            "sub/base.yaml:4:3",
            "plain.yaml:1:3"
        ]
    );
    let plan = plan(&tree("tiny"), &rules, "cpu").unwrap();
    let device = |path: &str| {
        plan.entry(path)
            .unwrap()
            .kwarg("generate_device")
            .unwrap()
            .clone()
    };
    assert_eq!(
        (device("lm_head"), device("model")),
        ("cpu".into(), "cuda:7".into())
    );
    assert_eq!(
        device("model.norm"),
        "${gpu}",
        "a file without the switch has no variables"
    );
    let warnings: Vec<String> = plan
        .warnings
        .iter()
        .map(|w| without(&directory, w))
        .collect();
    let shadowed = "sub/base.yaml:4:3: rule 1 has no effect: the one module it matches is already taken by rule 1 (line 3)";
    assert!(
        warnings.iter().any(|w| w.starts_with(shadowed)),
        "{warnings:?}"
    );
    assert!(
        warnings
            .iter()
            .any(|w| w.starts_with("plain.yaml:1:23: `layers` is ignored")),
        "{warnings:?}"
    );
    assert!(lint(&rules).is_empty(), "{:?}", lint(&rules));
}

#[test]
fn a_preset_is_included_by_its_name_and_its_idle_rules_are_no_news() {
    let text = "- ktx: 1\n- match: {name: '^lm_head$'}\n  replace: {class: KLinearTorch, kwargs: {generate_device: cpu}}\n\
                - include: preset:deepseek2\n";
    let rules = RuleSet::parse(text, "r.yaml").unwrap();
    assert!(rules.rules().len() > 3);
    let plan = plan(&tree("DeepSeek-V2-Lite"), &rules, "cpu").unwrap();
    assert!(plan.warnings.is_empty(), "{:?}", plan.warnings);
    let by = |path: &str| plan.entry(path).unwrap().rule.as_ref().unwrap().to_string();
    assert_eq!(by("lm_head"), "rule 1 (line 2)");
    assert!(by("model.layers.1.mlp.experts").ends_with(" of preset deepseek2)"));
}

#[test]
fn what_is_wrong_with_an_included_file_is_told_with_the_way_there() {
    let directory = files(&[
        ("cycle.yaml", "- ktx: 1\n- include: other.yaml\n"),
        ("other.yaml", "- ktx: 1\n- include: ./cycle.yaml\n"),
        ("missing.yaml", "- ktx: 1\n- include: none.yaml\n"),
        ("deep.yaml", "- ktx: 1\n- include: broken.yaml\n"),
        ("broken.yaml", "- ktx: 1\n- include: syntax.yaml\n"),
        ("syntax.yaml", "- match: {name: 'a}\n"),
        ("text.yaml", "- ktx: 1\n- include: list.yaml\n"),
        ("list.yaml", "rules: []\n"),
        ("folder.yaml", "- ktx: 1\n- include: .\n"),
    ]);
    let error = |name: &str| {
        without(
            &directory,
            RuleSet::from_path(directory.path().join(name)).unwrap_err(),
        )
    };
    let cycle = error("cycle.yaml");
    assert!(
        cycle.contains("other.yaml:2:12: `./cycle.yaml` is included inside of itself"),
        "{cycle}"
    );
    assert!(cycle.ends_with("(included at cycle.yaml:2:12)"), "{cycle}");
    let missing = error("missing.yaml");
    assert!(
        missing.starts_with("missing.yaml:2:12: cannot read `none.yaml`"),
        "{missing}"
    );
    let deep = error("deep.yaml");
    assert!(deep.starts_with("syntax.yaml:1:"), "{deep}");
    assert!(
        deep.ends_with("(included at broken.yaml:2:12, from deep.yaml:2:12)"),
        "{deep}"
    );
    assert!(error("text.yaml").ends_with("(included at text.yaml:2:12)"));
    assert!(error("folder.yaml").contains("is a directory"));
}

#[test]
fn includes_end_whatever_the_files_say() {
    let mut chain: Vec<(String, String)> = (0..40)
        .map(|i| {
            (
                format!("{i}.yaml"),
                format!("- ktx: 1\n- include: {}.yaml\n", i + 1),
            )
        })
        .collect();
    // Each of these doubles what it includes.
    chain.extend((0..14).map(|i| {
        let next = format!("- include: wide{}.yaml\n", i + 1);
        (format!("wide{i}.yaml"), format!("- ktx: 1\n{next}{next}"))
    }));
    chain.push(("wide14.yaml".to_owned(), "[]".to_owned()));
    let borrowed: Vec<(&str, &str)> = chain
        .iter()
        .map(|(n, t)| (n.as_str(), t.as_str()))
        .collect();
    let directory = files(&borrowed);
    for name in ["0.yaml", "wide0.yaml"] {
        let error = RuleSet::from_path(directory.path().join(name))
            .unwrap_err()
            .to_string();
        assert!(error.contains("nested deeper than"), "{error}");
    }
}

#[test]
fn slips_in_extended_files_are_told_with_their_place() {
    let tree = tree("tiny");
    for (rules, place, wanted) in [
        (
            extended("layer: 3"),
            "r.yaml:2:11",
            "did you mean `layers`?",
        ),
        (
            extended("glob: 'a.{b'"),
            "r.yaml:2:20",
            "this brace is never closed",
        ),
        (extended("layers: 9-3"), "r.yaml:2:19", "runs backwards"),
        (
            extended("layers: 010"),
            "r.yaml:2:19",
            "`010` is no layer number",
        ),
        (extended("layers: 1:30"), "r.yaml:2:19", "no layer number"),
        (
            extended("layers: []"),
            "r.yaml:2:19",
            "must be layer numbers",
        ),
        (extended("type: Q4K"), "r.yaml:2:17", "did you mean `Q4_K`?"),
        (extended(""), "r.yaml:2:10", "`match` needs"),
        ("- ktx: 2".to_owned(), "r.yaml:1:8", "knows 1"),
        (
            "- ktx: 1\n  vars: {}".to_owned(),
            "r.yaml:2:3",
            "it takes: ktx, variables",
        ),
        (
            "- ktx: 1\n  variables: {'1a': x}".to_owned(),
            "r.yaml:2:15",
            "cannot name a variable",
        ),
        (
            "- ktx: 1\n  variables: {a: []}".to_owned(),
            "r.yaml:2:18",
            "must be a mapping",
        ),
        (
            "- ktx: 1\n- include: preset:none".to_owned(),
            "r.yaml:2:12",
            "there are deepseek2",
        ),
        (
            "- ktx: 1\n- include: 5".to_owned(),
            "r.yaml:2:12",
            "must be a file's name",
        ),
        (
            "- ktx: 1\n- include: a\n  other: b".to_owned(),
            "r.yaml:3:3",
            "means nothing",
        ),
        (
            "- ktx: 1\n- match: {name: ''}\n  replace: {kwargs: {generate_device: '${gpu}'}}"
                .to_owned(),
            "r.yaml:3:39",
            "no variable `gpu` is declared",
        ),
        (
            "- ktx: 1\n- match: {name: ''}\n  replace: {kwargs: {a: ['${gpu']}}".to_owned(),
            "r.yaml:3:26",
            "never closed",
        ),
        // Without the switch, the message names it.
        (
            "- match: {layers: 3}".to_owned(),
            "r.yaml:1:10",
            "`- ktx: 1`",
        ),
        ("- include: a.yaml".to_owned(), "r.yaml:1:3", "`- ktx: 1`"),
        (
            "- match: {name: ^$}\n  replace: {}\n- ktx: 1".to_owned(),
            "r.yaml:3:3",
            "first item",
        ),
    ] {
        let said = refused(&tree, &rules);
        assert!(
            said.starts_with(place) && said.contains(wanted),
            "{rules}\n{said}"
        );
    }
}

#[test]
fn conditions_that_meet_nothing_are_told_one_by_one() {
    let tree = tree("Qwen2-57B-A14B");
    for (matches, wanted) in [
        ("glob: 'model.layer.*'", "its glob fits no module's path"),
        (
            "layers: 28-30",
            "the model has the layers 0 to 27, and none of its own",
        ),
        (
            "layers: 3, name: lm_head",
            "by themselves: `name` 1, `layers`",
        ),
        (
            "class: torch.nn.Linear, glob: 'model.layers.*'",
            "by themselves: `class`",
        ),
    ] {
        let plan = planned(&tree, &extended(matches));
        let said = plan.warnings[0].to_string();
        assert!(said.contains(wanted), "{matches}: {said}");
    }
    let rules = RuleSet::parse(&extended("layers: '3,20-40'"), "r.yaml").unwrap();
    let plan = plan(&tree, &rules, "cpu").unwrap();
    let advice: Vec<String> = lint_plan(&rules, &plan)
        .iter()
        .map(ToString::to_string)
        .collect();
    assert!(
        advice
            .iter()
            .any(|a| a.contains("20-40") && a.contains("0 to 27")),
        "{advice:?}"
    );
}

/// The switch in front changes nothing of what a file means that uses no extension.
#[test]
fn all_edge_cases_that_the_original_plans_mean_the_same_behind_the_switch() {
    let text = fs::read_to_string(folder().join("edge_cases.json")).unwrap();
    let cases: Vec<Value> = serde_json::from_str(&text).unwrap();
    let mut compared = 0;
    for case in cases.iter().filter(|c| c.get("error").is_none()) {
        let (name, rules) = (&case["name"], case["rules"].as_str().unwrap());
        // In front of a list in block style only; `match` takes no unknown key behind the switch.
        if !rules.starts_with("- ") {
            continue;
        }
        let tree = tree(case["tree"].as_str().unwrap());
        let plain = planned(&tree, rules).to_json(KeyStyle::Hf);
        assert_eq!(
            planned(&tree, &format!("- ktx: 1\n{rules}")).to_json(KeyStyle::Hf),
            plain,
            "{name}"
        );
        compared += 1;
    }
    assert!(compared > 15, "{compared}");
}

fn scalar() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "'${gpu}'",
        "'$${x}'",
        "3",
        "0-9",
        "Q4_K",
        "'**'",
        "lm_head",
        "null",
        "[1, a]",
        "'model.*'",
        "preset:llama",
    ])
}

fn key() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "glob",
        "layers",
        "type",
        "variables",
        "include",
        "ktx",
        "weights",
        "other",
    ])
}

proptest! {
    /// A file that the original accepts: each item has `match` with a name, whatever other keys stand around.
    /// Its plan is that of the same file without those keys.
    #[test]
    fn keys_and_texts_of_the_extensions_mean_nothing_in_files_of_the_original(
        items in prop::collection::vec(
            (key(), scalar(), key(), scalar(), key(), scalar(), prop::sample::select(vec!["norm", "mlp", "^lm_head$", "^model$"])),
            1..4,
        )
    ) {
        let (mut full, mut bare) = (String::new(), String::new());
        for (k1, v1, k2, v2, k3, v3, name) in items {
            let kwargs = format!("kwargs: {{{k3}: {v3}, generate_device: {v2}}}");
            full.push_str(&format!(
                "- {k1}: {v1}\n  match: {{{k2}: {v2}, name: '{name}'}}\n  replace: {{{k3}: {v3}, class: a.B, {kwargs}}}\n"
            ));
            bare.push_str(&format!("- match: {{name: '{name}'}}\n  replace: {{class: a.B, {kwargs}}}\n"));
        }
        let tree = tree("tiny");
        prop_assert_eq!(planned(&tree, &full).to_json(KeyStyle::Hf), planned(&tree, &bare).to_json(KeyStyle::Hf));
    }

    /// Whatever a list starts with: it is extended exactly if the original would refuse it.
    #[test]
    fn the_switch_is_what_the_original_refuses(first in key(), value in scalar(), with_match in any::<bool>()) {
        let matches = if with_match { "  match: {name: nothing}\n" } else { "" };
        let text = format!("- {first}: {value}\n{matches}- match: {{name: '^lm_head$', layers: 3}}\n  replace: {{class: a.B}}\n");
        let tree = tree("tiny");
        let outcome = RuleSet::parse(&text, "r.yaml").ok().and_then(|rules| plan(&tree, &rules, "cuda:0").ok());
        match outcome {
            // Planned as the original does: `layers` is ignored.
            Some(plan) => prop_assert!(with_match && plan.entry("lm_head").unwrap().rule.is_some()),
            None => prop_assert!(!with_match),
        }
    }

    /// No text of an extension makes the reader fail otherwise than with a message.
    #[test]
    fn any_text_in_an_extension_is_read_or_refused(text in "[-a-z0-9.*?{}\\[\\]!,$:~ ]{0,24}") {
        let quoted = text.replace('\'', "''");
        for matches in [format!("glob: '{quoted}'"), format!("layers: '{quoted}'"), format!("type: '{quoted}'")] {
            let _ = RuleSet::parse(&extended(&matches), "r.yaml").map(|rules| plan(&tree("tiny"), &rules, "cpu"));
        }
        let kwargs = format!("- ktx: 1\n- match: {{name: a}}\n  replace: {{kwargs: {{a: '{quoted}'}}}}\n- include: 'preset:{quoted}'\n");
        let _ = RuleSet::parse(&kwargs, "r.yaml");
    }
}
