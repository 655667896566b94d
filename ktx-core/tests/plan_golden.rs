//! Plans of KTransformers' own planner (`plans/`, see its README) against ours.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use ktx_core::plan::{KeyStyle, Plan, PlanError, plan, tree_from_json};
use ktx_core::rules::{RuleError, RuleSet};
use ktx_ops::Module;
use serde_json::Value;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plans")
}

/// The text of a file, or of the same file with `.gz` behind its name.
fn text(path: &Path) -> String {
    if let Ok(text) = fs::read_to_string(path) {
        return text;
    }
    let packed = fs::File::open(format!("{}.gz", path.display())).expect("a golden file");
    let mut text = String::new();
    flate2::read::GzDecoder::new(packed)
        .read_to_string(&mut text)
        .expect("gzip text");
    text
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&text(path)).expect("golden JSON")
}

fn tree(name: &str) -> Module {
    let file = format!("{name}.json");
    tree_from_json(&text(&folder().join("trees").join(&file)), &file).expect("a golden tree")
}

fn of<'v>(case: &'v Value, key: &str) -> &'v str {
    case[key]
        .as_str()
        .unwrap_or_else(|| panic!("`{key}` in {case}"))
}

/// Compares by path, so that a difference is short.
fn assert_equal(name: &str, ours: &Plan, golden: &Value) {
    let ours = ours.to_json(KeyStyle::Hf);
    let (ours, golden) = (ours.as_object().unwrap(), golden.as_object().unwrap());
    for (path, wanted) in golden {
        assert_eq!(ours.get(path), Some(wanted), "{name}: `{path}`");
    }
    assert_eq!(ours.len(), golden.len(), "{name}: entries");
}

#[test]
fn shipped_rule_files_give_the_plans_of_the_original() {
    let mut compared = 0;
    for file in fs::read_dir(folder().join("expected")).unwrap() {
        let name = file.unwrap().file_name().into_string().unwrap();
        let name = name.trim_end_matches(".gz");
        let golden = json(&folder().join("expected").join(name));
        let tree = tree(of(&golden, "tree"));
        let (rule_file, _) = name.split_once('@').expect("RULE@TREE.json");
        let rules =
            RuleSet::from_path(folder().join("rules").join(format!("{rule_file}.yaml"))).unwrap();
        let ours = plan(&tree, &rules, of(&golden, "default_device"))
            .unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_equal(name, &ours, &golden["plan"]);
        compared += 1;
    }
    assert_eq!(compared, 18);
}

#[test]
fn entries_come_in_the_order_of_the_tree() {
    let tree = tree("tiny");
    let ours = plan(&tree, &RuleSet::parse("[]", "none.yaml").unwrap(), "cuda:0").unwrap();
    let json = ours.to_json(KeyStyle::Hf);
    let walked: Vec<&str> = tree.walk().map(|m| m.path.as_str()).collect();
    assert_eq!(
        json.as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect::<Vec<_>>(),
        walked
    );
}

/// The type of exception that Python raises for what is wrong here.
fn python_type(error: &RuleError) -> &'static str {
    match error {
        RuleError::WrongType { .. } | RuleError::NotAList { .. } | RuleError::Empty { .. } => {
            "TypeError"
        }
        RuleError::NoMatch { .. } => "KeyError",
        RuleError::NoCriterion { .. } | RuleError::NoReplace { .. } => "Exception",
        RuleError::ClassWithoutModule { .. } => "ValueError",
        RuleError::UnknownModule { .. } => "ModuleNotFoundError",
        RuleError::UnknownClass { .. } => "AttributeError",
        RuleError::BadPattern { .. } => "error",
        other => panic!("no exception of the planner: {other}"),
    }
}

fn outcome(tree: &Module, rules: &str, device: &str) -> Result<Plan, RuleError> {
    let rules = RuleSet::parse(rules, "case.yaml")?;
    plan(tree, &rules, device).map_err(|PlanError::Rule { source, .. }| *source)
}

#[test]
fn edge_cases_give_the_plan_or_the_error_of_the_original() {
    let cases = json(&folder().join("edge_cases.json"));
    for case in cases.as_array().unwrap() {
        let name = of(case, "name");
        let ours = outcome(
            &tree(of(case, "tree")),
            of(case, "rules"),
            of(case, "default_device"),
        );
        match (ours, case.get("error")) {
            (Ok(ours), None) => assert_equal(name, &ours, &case["plan"]),
            (Err(ours), Some(error)) => {
                assert_eq!(python_type(&ours), of(error, "type"), "{name}: {ours}")
            }
            (Ok(_), Some(error)) => panic!("{name}: planned, and the original says {error}"),
            (Err(ours), None) => panic!("{name}: {ours}"),
        }
    }
}

#[test]
fn rules_that_the_original_refuses_are_refused() {
    let tree = tree("tiny");
    for (rules, wanted) in [
        ("", "TypeError"),
        ("~", "TypeError"),
        ("# only a comment\n", "TypeError"),
        ("match: {name: a}", "TypeError"),
        ("- 5", "TypeError"),
        ("- match: {name: 5}\n  replace: {}", "TypeError"),
        ("- match: {name: ['a']}\n  replace: {}", "TypeError"),
        (
            "- match: {class: torch.nn.Linear, name: 5}\n  replace: {}",
            "TypeError",
        ),
        ("- match: {name: ''}\n  replace: 5", "TypeError"),
        ("- match: {name: ''}\n  replace: a class", "TypeError"),
        ("- match: {class: Linear}\n  replace: {}", "ValueError"),
        ("- match: {class: ''}\n  replace: {}", "ValueError"),
        (
            "- match: {class: nosuch.Foo}\n  replace: {}",
            "ModuleNotFoundError",
        ),
        (
            "- match: {class: torch.nn.nosuch.Foo, name: ^nothing$}\n  replace: {}",
            "ModuleNotFoundError",
        ),
        (
            "- match: {class: torch.Foo}\n  replace: {}",
            "AttributeError",
        ),
        ("- match: {other: 1}\n  replace: {}", "Exception"),
        ("- match: {name: 'a++++'}\n  replace: {}", "error"),
    ] {
        let error = outcome(&tree, rules, "cuda:0").expect_err(rules);
        assert_eq!(python_type(&error), wanted, "{rules}: {error}");
    }
}

#[test]
fn a_rule_that_no_module_reaches_may_be_wrong() {
    let tree = tree("tiny");
    for wrong in [
        "replace: {}",
        "match: {class: nosuch.Foo}",
        "match: {name: '('}",
        "match:",
        "match: {name: 5}",
    ] {
        let rules = format!("- match: {{name: ''}}\n  replace: {{class: default}}\n- {wrong}");
        let ours = outcome(&tree, &rules, "cuda:0").unwrap_or_else(|e| panic!("{wrong}: {e}"));
        assert!(
            ours.warnings
                .iter()
                .any(|w| w.to_string().contains("rule 2")),
            "{wrong}: {:?}",
            ours.warnings
        );
    }
    // A class that matches nothing shields a name that is no pattern.
    let shielded = "- match: {class: ktransformers.models.modeling_deepseek.MoEGate, name: '('}\n  replace: {}";
    outcome(&tree, shielded, "cuda:0").unwrap();
}

/// `model.layers.3.mlp.experts.0.w1` -> `model.layers.{l}.mlp.experts.{e}.w1`
fn pattern_of(path: &str) -> String {
    let mut out: Vec<String> = Vec::new();
    let mut numbers = 0;
    for part in path.split('.') {
        let is_number = !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let slot = if numbers == 0 { "{l}" } else { "{e}" };
        out.push(if is_number {
            slot.to_owned()
        } else {
            part.to_owned()
        });
        numbers += usize::from(is_number);
    }
    out.join(".")
}

#[test]
fn gguf_keys_are_those_of_the_versions_that_wrote_them() {
    // Names that only later versions map.
    let newer = |path: &str| path.ends_with(".q_norm") || path.ends_with(".k_norm");
    let golden: BTreeMap<String, BTreeMap<String, String>> =
        serde_json::from_value(json(&folder().join("trees/GGUF_KEYS.json"))).unwrap();
    let none = RuleSet::parse("[]", "none.yaml").unwrap();
    for (name, keys) in golden {
        let ours = plan(&tree(&name), &none, "cuda:0")
            .unwrap()
            .to_json(KeyStyle::Gguf);
        for (path, entry) in ours.as_object().unwrap() {
            let pattern = pattern_of(path);
            let wanted = keys
                .get(&pattern)
                .unwrap_or_else(|| panic!("{name}: `{pattern}`"));
            if !newer(path) {
                assert_eq!(&pattern_of(of(entry, "key")), wanted, "{name}: `{path}`");
            }
        }
    }
}

/// The warnings of a shipped rule file on a tree.
fn warnings(rule_file: &str, tree_name: &str) -> Vec<String> {
    let rules =
        RuleSet::from_path(folder().join("rules").join(format!("{rule_file}.yaml"))).unwrap();
    let ours = plan(&tree(tree_name), &rules, "cuda:0").unwrap();
    let name = format!("{}/", folder().join("rules").display());
    ours.warnings
        .iter()
        .map(|w| w.to_string().replace(&name, ""))
        .collect()
}

#[test]
fn rules_of_shipped_files_that_do_nothing_are_found_and_no_others() {
    let dead = [
        (
            "Qwen2-57B-A14B-Instruct-multi-gpu",
            "Qwen2-57B-A14B",
            vec!["rule 2 matches no module", "rule 6 matches no module"],
        ),
        (
            "Qwen3Moe-serve",
            "Qwen3-30B-A3B",
            vec!["rule 10 has no effect: all 192 modules it matches lie below"],
        ),
        ("DeepSeek-V3-Chat-multi-gpu-4", "DeepSeek-V3", vec![]),
        ("DeepSeek-V2-Chat-multi-gpu", "DeepSeek-V2", vec![]),
        ("Mixtral", "Mixtral-8x7B", vec![]),
    ];
    for (rules, tree, wanted) in dead {
        let found = warnings(rules, tree);
        assert_eq!(found.len(), wanted.len(), "{rules}: {found:?}");
        assert!(
            found.iter().zip(&wanted).all(|(f, w)| f.contains(w)),
            "{rules}: {found:?}"
        );
    }
}
