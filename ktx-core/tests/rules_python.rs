//! Patterns and values as Python reads them (`rules_python.py` made the expectations) against ours.

use ktx_core::plan::{Plan, PlanError, plan, tree_from_json};
use ktx_core::rules::{RuleError, RuleSet};
use ktx_ops::{Module, Spec};
use serde_json::{Map, Value};

fn expectations() -> Value {
    serde_json::from_str(include_str!("rules_python.json")).expect("JSON")
}

/// A root with one child for each path; the paths need not be sound.
fn flat_tree(paths: &[&str]) -> Module {
    let mut root = Module::root("a.Root", Spec::Opaque);
    for path in paths {
        root.add(path, "a.Module", Spec::Opaque);
    }
    root
}

fn planned(tree: &Module, rules: &str) -> Result<Plan, RuleError> {
    let rules = RuleSet::parse(rules, "case.yaml")?;
    plan(tree, &rules, "cpu").map_err(|PlanError::Rule { source, .. }| *source)
}

#[test]
fn patterns_find_what_python_finds_and_fail_where_python_fails() {
    let expected = expectations();
    let subjects: Vec<&str> = expected["subjects"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s.as_str().unwrap())
        .collect();
    assert_eq!(subjects[0], "", "the root");
    let tree = flat_tree(&subjects[1..]);
    let mut wrong = Vec::new();
    for case in expected["patterns"].as_array().unwrap() {
        let pattern = case["pattern"].as_str().unwrap();
        let rules = serde_json::json!([{ "match": { "name": pattern }, "replace": { "class": "default" } }]);
        let ours = planned(&tree, &rules.to_string());
        let agrees = match (&ours, case["hits"].as_str()) {
            (Ok(plan), Some(hits)) => {
                let found: String = plan
                    .entries()
                    .iter()
                    .map(|e| if e.rule.is_some() { '1' } else { '0' })
                    .collect();
                found == hits
            }
            (Err(RuleError::BadPattern { .. }), None) => true,
            _ => false,
        };
        if !agrees {
            let found = ours.map(|p| {
                p.entries()
                    .iter()
                    .filter(|e| e.rule.is_some())
                    .map(|e| e.path.clone())
                    .collect::<Vec<_>>()
            });
            wrong.push(format!("{case}\n  ours: {found:?}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} patterns differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

/// Numbers by value: Python's 1.0 is not its 1, and neither is ours.
fn same(ours: &Value, python: &Value) -> bool {
    match (ours, python) {
        (Value::Number(a), Value::Number(b)) => {
            a.is_f64() == b.is_f64() && a.as_f64() == b.as_f64()
        }
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Object(a), Value::Object(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|((j, a), (k, b))| j == k && same(a, b))
        }
        _ => ours == python,
    }
}

#[test]
fn values_are_what_pyyaml_reads() {
    let tree = flat_tree(&[]);
    let mut wrong = Vec::new();
    for case in expectations()["values"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let rules =
            format!("- match: {{name: ''}}\n  replace:\n    kwargs:\n      value: {text}\n");
        let ours = planned(&tree, &rules)
            .map(|p| p.entries()[0].kwarg("value").cloned().unwrap_or_default());
        let agrees = match (&ours, case.get("value")) {
            (Ok(ours), Some(python)) => same(ours, python),
            (Err(RuleError::Syntax { .. }), None) => true,
            _ => false,
        };
        if !agrees {
            wrong.push(format!("{case}\n  ours: {ours:?}"));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} values differ:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
}

#[test]
fn a_tree_of_one_module_is_a_tree() {
    let tree = tree_from_json(
        &Value::Object(Map::from_iter([(String::new(), "a.B".into())])).to_string(),
        "t",
    )
    .unwrap();
    assert_eq!(tree.class, "a.B");
}
