//! What a user reads when a rule file, a tree or a plan is wrong.

use std::fs;

use ktx_core::plan::{PlanWarning, plan, tree_from_json};
use ktx_core::rules::{RuleError, RuleSet, preset_for, presets};
use ktx_ops::Module;
use proptest::prelude::*;

fn tiny() -> Module {
    let text = include_str!("plans/trees/tiny.json");
    tree_from_json(text, "tiny.json").unwrap()
}

/// The message for a rule file that cannot be applied to the small tree.
fn message(rules: &str) -> String {
    match RuleSet::parse(rules, "r.yaml") {
        Err(error) => error.to_string(),
        Ok(rules) => plan(&tiny(), &rules, "cpu")
            .expect_err("a wrong rule")
            .to_string(),
    }
}

fn warnings(rules: &str) -> Vec<String> {
    let rules = RuleSet::parse(rules, "r.yaml").unwrap();
    plan(&tiny(), &rules, "cpu")
        .unwrap()
        .warnings
        .iter()
        .map(PlanWarning::to_string)
        .collect()
}

#[test]
fn a_bad_pattern_is_shown_with_its_column() {
    let plain = message("- match:\n    name: ^model\\.(unclosed\n  replace: {}\n");
    assert!(
        plain.starts_with(
            "r.yaml:2:19: the regular expression `^model\\.(unclosed` is wrong at character 9"
        ),
        "{plain}"
    );
    let double = message("- match:\n    name: \"^model\\\\.(unclosed\"\n  replace: {}\n");
    assert!(double.starts_with("r.yaml:2:21: "), "{double}");
    let single = message("- match: {name: '''[z-a]'}\n  replace: {}\n");
    assert!(single.starts_with("r.yaml:1:21: "), "{single}");
    let block = message("- match:\n    name: |-\n      a(\n  replace: {}\n");
    assert!(
        block.starts_with("r.yaml:2:11: ") || block.starts_with("r.yaml:3:"),
        "{block}"
    );
}

#[test]
fn a_pattern_that_would_never_end_is_an_error() {
    let tree = tree_from_json(
        &format!(r#"{{"":"a.B","{}":"a.B"}}"#, "a".repeat(60)),
        "t.json",
    )
    .unwrap();
    let rules = RuleSet::parse(r"- match: {name: '^((a|aa)+)(?!a|$)'}", "r.yaml").unwrap();
    let text = plan(&tree, &rules, "cpu")
        .map(|_| String::new())
        .unwrap_or_else(|e| e.to_string());
    assert!(
        text.starts_with("r.yaml:1:17: ") && text.contains("takes too long"),
        "{text}"
    );
    let large = message(r"- match: {name: '((\w{900}){900}){900}'}");
    assert!(
        large.starts_with("r.yaml:1:18: ") && large.contains("too large"),
        "{large}"
    );
}

#[test]
fn an_unknown_class_is_shown_with_the_nearest_one() {
    let name = message("- match:\n    class: torch.nn.Linaer\n  replace: {}\n");
    assert_eq!(
        name,
        "r.yaml:2:12: the module `torch.nn` has no class `Linaer` (did you mean `torch.nn.Linear`?)"
    );
    let module = message("- match: {class: ktransformers.modeling_deepseek_v3.MoEGate}\n");
    assert!(
        module.contains(
            "there is no module `ktransformers.modeling_deepseek_v3` with a class `MoEGate`"
        ),
        "{module}"
    );
    assert!(
        module.contains("modeling_deepseek_v3.MoEGate`?"),
        "{module}"
    );
    let bare = message("- match: {class: Linear}\n");
    assert!(
        bare.contains("`Linear` is no class path") && bare.contains("`torch.nn.Linear`"),
        "{bare}"
    );
}

#[test]
fn a_file_that_is_no_list_of_rules_is_refused() {
    assert_eq!(
        message("match: {name: a}"),
        "r.yaml:1:1: a rule file is a list of rules, each starting with `- match:`, and this is a mapping"
    );
    assert_eq!(
        message(""),
        "`r.yaml` is empty: a rule file is a list of rules, `- match: ...`; `[]` is the list of none"
    );
    assert!(message("- match: {name: [}").starts_with("r.yaml:1:17: this is no valid YAML: "));
    assert!(message("- a: *b").starts_with("r.yaml:1:6: this is no valid YAML: "));
    assert!(message("- a\n---\n- b").contains("second document"));
    assert!(message("- replace: {}").starts_with("r.yaml:1:3: this rule has no `match`"));
    assert!(
        message("- match: {name: 5}").starts_with(
            "r.yaml:1:17: `name` must be a regular expression in quotes, not a number"
        )
    );
    assert!(message("- match: {name: model}").contains("this rule matches and has no `replace`"));
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let error = |name: &str| RuleSet::from_path(at(name)).unwrap_err();
    assert!(matches!(
        error("missing.yaml"),
        RuleError::Unreadable { .. }
    ));
    assert!(error("missing.yaml").to_string().contains("missing.yaml"));
    assert!(matches!(error(""), RuleError::Directory { .. }));
    fs::write(at("latin1.yaml"), b"- match: {name: caf\xe9}\n").unwrap();
    assert!(
        error("latin1.yaml")
            .to_string()
            .contains("not UTF-8 text: byte 19"),
        "{}",
        error("latin1.yaml")
    );
    fs::write(at("large.yaml"), vec![b'#'; 2 << 20]).unwrap();
    assert!(matches!(error("large.yaml"), RuleError::TooLarge { .. }));
}

#[test]
fn hostile_yaml_is_refused_in_no_time() {
    let mut bomb = String::from("- &a0 [x, x, x, x, x, x, x, x, x, x]\n");
    for i in 1..30 {
        bomb += &format!(
            "- &a{i} [{}]\n",
            vec![format!("*a{}", i - 1); 10].join(", ")
        );
    }
    assert!(
        message(&bomb).contains("aliases written out"),
        "{}",
        message(&bomb)
    );
    let deep = "[".repeat(100_000);
    assert!(
        message(&deep).contains("this is no valid YAML"),
        "{}",
        message(&deep)
    );
    assert!(message(&format!("{}{}", "[".repeat(100), "]".repeat(100))).contains("nested deeper"));
    let chain: String = (1..200)
        .map(|i| format!("- &a{i} [*a{}]\n", i - 1))
        .collect();
    assert!(message(&format!("- &a0 [x]\n{chain}")).contains("nested deeper"));
    assert!(message("- &a [*a]").contains("inside of what it names"));
    let keys: String = (0..3000).map(|i| format!("k{i}: 1, ")).collect();
    let merges = vec!["*m"; 3000].join(", ");
    assert!(message(&format!("- &m {{{keys}}}\n- <<: [{merges}]\n")).contains("has more than"));
    assert!(
        message(&format!("- match: {{name: '{}'}}", "(".repeat(15_000))).contains("nested deeper")
    );
}

#[test]
fn rules_without_effect_are_named_with_what_stands_in_their_way() {
    assert_eq!(
        warnings("- match: {name: nothing}\n  replace: {}"),
        ["r.yaml:1:3: rule 1 matches no module: its name is found in no module's path"]
    );
    assert_eq!(
        warnings("- match: {class: ktransformers.models.modeling_deepseek.MoEGate}\n  replace: {}"),
        [
            "r.yaml:1:3: rule 1 matches no module: no module of this model is a `ktransformers.models.modeling_deepseek.MoEGate`"
        ]
    );
    assert_eq!(
        warnings("- match: {class: torch.nn.Linear, name: '^model\\.layers\\.0$'}\n  replace: {}"),
        [
            "r.yaml:1:3: rule 1 matches no module: its name is found in 1 path, and none of these modules is a \
             `torch.nn.Linear` (`model.layers.0` is a `ktransformers.models.modeling_deepseek_v3.DeepseekV3DecoderLayer`)"
        ]
    );
    assert_eq!(
        warnings(
            "- match: {name: model}\n  replace: {}\n- match: {name: '^model\\.norm$'}\n  replace: {}"
        ),
        [
            "r.yaml:3:3: rule 2 has no effect: the one module it matches is already taken by rule 1 (line 1)"
        ]
    );
    assert_eq!(
        warnings(
            "- match: {name: 'experts$'}\n  replace: {}\n  recursive: no\n- match: {name: 'experts\\.0\\.'}\n  replace: {}"
        ),
        [
            "r.yaml:4:3: rule 2 has no effect: all 8 modules it matches lie below a module that rule 1 (line 1) \
             took with `recursive: False`"
        ]
    );
}

#[test]
fn keys_without_effect_are_named() {
    assert_eq!(
        warnings(
            "- match: {name: '', nmae: x}\n  replace: {device: cpu, kwarg: {}}\n  recursve: False\n  recursive: 'False'\n"
        ),
        [
            "r.yaml:3:3: `recursve` means nothing in a rule and is ignored (did you mean `recursive`?)",
            "r.yaml:1:21: `nmae` means nothing in `match` and is ignored (did you mean `name`?)",
            "r.yaml:2:13: `device` in `replace` is ignored: write `generate_device` and `prefill_device` in `kwargs`",
            "r.yaml:2:26: `kwarg` means nothing in `replace` and is ignored (did you mean `kwargs`?)",
            "r.yaml:4:14: `recursive: 'False'` is a text, and that counts as true; write False without quotes to stop here",
        ]
    );
}

#[test]
fn a_layer_torn_between_devices_is_named() {
    let rules = RuleSet::parse(
        "- match: {class: torch.nn.Linear}\n  replace: {kwargs: {generate_device: 'cuda:1'}}",
        "r.yaml",
    );
    let plan = plan(&tiny(), &rules.unwrap(), "cuda:0").unwrap();
    let holes: Vec<String> = plan.warnings.iter().map(ToString::to_string).collect();
    assert!(
        holes[0].starts_with("model.layers.0: no rule matches "),
        "{holes:?}"
    );
    assert!(
        holes[0].ends_with("they go to cuda:0, its other modules to cuda:1"),
        "{holes:?}"
    );
}

#[test]
fn a_bad_tree_is_refused() {
    for (text, wanted) in [
        ("[]", "no module tree"),
        ("{\"\": 5}", "no module tree"),
        ("{\"\": \"a.B\"} x", "no module tree"),
        ("nonsense", "no module tree"),
        ("{}", "holds no module"),
        ("{\"a\": \"a.B\"}", "starts with the module `a`"),
        (
            "{\"\": \"a.B\", \"a.b\": \"a.B\"}",
            "module `a.b` comes without its parent `a`",
        ),
        (
            "{\"\": \"a.B\", \"a\": \"a.B\", \"a\": \"a.B\"}",
            "module `a` is there twice",
        ),
        (
            "{\"\": \"a.B\", \"\": \"a.B\"}",
            "the root comes first, and once",
        ),
        (
            "{\"\": \"a.B\", \"a..b\": \"a.B\"}",
            "a name between two dots is missing",
        ),
        ("{\"\": \"a.B\", \"a\\n\": \"a.B\"}", "control character"),
    ] {
        let error = tree_from_json(text, "t.json").expect_err(text).to_string();
        assert!(
            error.contains(wanted) && error.contains("t.json"),
            "{text}: {error}"
        );
    }
}

#[test]
fn presets_are_rule_files_without_a_note() {
    assert!(
        preset_for("deepseek2").is_some()
            && preset_for("llama").is_some()
            && preset_for("bert").is_none()
    );
    for preset in presets() {
        let rules = RuleSet::from_preset(preset).unwrap_or_else(|e| panic!("{}: {e}", preset.name));
        assert!(rules.rules().len() > 2, "{}", preset.name);
        for rule in rules.rules() {
            assert!(
                rule.matches.is_ok() && rule.replace.is_ok() && rule.notes.is_empty(),
                "{}: {rule:?}",
                preset.name
            );
        }
    }
}

proptest! {
    #[test]
    fn any_text_is_rules_or_an_error(text in "[-a-z:{}\\[\\]&*<'\"|>!#%, \n0-9.]{0,80}") {
        if let Ok(rules) = RuleSet::parse(&text, "r.yaml") {
            let _ = plan(&tiny(), &rules, "cpu");
        }
    }

    #[test]
    fn any_pattern_is_one_or_an_error(pattern in "[a-c.()\\[\\]?*+{}|^$\\\\0-9<=!:PZbdwx-]{0,30}") {
        let rules = serde_json::json!([{ "match": { "name": pattern }, "replace": {} }]).to_string();
        let rules = RuleSet::parse(&rules, "r.yaml").unwrap();
        let _ = plan(&tiny(), &rules, "cpu").map(|p| p.warnings.iter().map(ToString::to_string).collect::<Vec<_>>());
    }

    #[test]
    fn any_text_is_a_tree_or_an_error(text in "\\PC{0,60}") {
        let _ = tree_from_json(&text, "t.json");
    }
}
