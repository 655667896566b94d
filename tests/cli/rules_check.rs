//! `ktx rules check`.

use std::path::Path;

use super::{file, ktx};

fn rules(name: &str) -> String {
    path(&format!("ktx-core/tests/plans/rules/{name}.yaml"))
}

fn tree(name: &str) -> String {
    path(&format!("ktx-core/tests/plans/trees/{name}.json"))
}

fn path(name: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(name)
        .display()
        .to_string()
}

#[test]
fn rules_of_the_originals_that_match_nothing_are_found() {
    let said = ktx(&[
        "rules",
        "check",
        &rules("Qwen2-57B-A14B-Instruct-multi-gpu"),
        "--tree",
        &tree("Qwen2-57B-A14B"),
    ])
    .ok();
    let dead: Vec<&str> = said
        .lines()
        .filter(|line| line.contains("matches no module"))
        .collect();
    assert_eq!(dead.len(), 2, "{said}");
    for (line, rule) in dead.iter().zip(["rule 2", "rule 6"]) {
        assert!(line.contains(rule), "{line}");
        assert!(
            line.contains("; write `'^model\\.layers\\.") && line.contains("which matches"),
            "{line}"
        );
    }
    assert!(said.lines().last().unwrap().ends_with("warnings"), "{said}");
}

#[test]
fn an_unescaped_dot_is_shown_with_what_to_write() {
    let said = ktx(&["rules", "check", &rules("DeepSeek-V3-Chat")]).ok();
    assert!(said.contains(r"write '^model\.embed_tokens'"), "{said}");
}

#[test]
fn a_file_with_mistakes_is_an_error_and_all_of_them_are_printed() {
    let text = "- match: {name: '(a'}\n  replace: {class: default}\n- match: {}\n  replace: {class: default}\n";
    let call = ktx(&["rules", "check", &file("two-mistakes.yaml", text)]);
    assert_eq!(call.code, Some(1), "{}", call.stdout);
    assert_eq!(
        call.stdout
            .lines()
            .filter(|l| l.starts_with("error: "))
            .count(),
        2,
        "{}",
        call.stdout
    );
    assert!(call.stderr.contains("2 errors"), "{}", call.stderr);
}

#[test]
fn on_a_model_operators_are_checked_too() {
    let text = "- match: {name: '^lm_head$'}\n  replace: {class: ktx.linear.KLinarMarlin}\n";
    let rules = file("slip.yaml", text);
    let call = ktx(&[
        "rules",
        "check",
        &rules,
        "--model",
        &path("models/pip-17m.gguf"),
    ]);
    assert_eq!(call.code, Some(1), "{}", call.stdout);
    assert!(call.stdout.contains("KLinearMarlin"), "{}", call.stdout);
}

#[test]
fn shadowed_rules_several_roles_and_missing_devices_are_found_with_what_to_do() {
    let text = "- match: {name: '^model\\.'}\n  replace: {class: KLinearTorch, kwargs: {generate_device: 'cuda:3'}}\n\
                - match: {name: '^model\\.norm$'}\n  replace: {class: default}\n";
    let rules = file("shadowed.yaml", text);
    let said = ktx(&["rules", "check", &rules, "--tree", &tree("tiny")]).stdout;
    assert!(
        said.contains("rule 2 has no effect") && said.contains("; put it before rule 1 (line 1)"),
        "{said}"
    );
    assert!(
        said.contains("no device cuda:3, which 1 rule names") && said.contains("--cpu"),
        "{said}"
    );
    let on_model = ktx(&[
        "rules",
        "check",
        &rules,
        "--model",
        &path("models/pip-17m.gguf"),
    ])
    .stdout;
    assert!(on_model.contains("roles: "), "{on_model}");
}

#[test]
fn a_text_that_is_no_device_is_an_error_without_a_model_too() {
    let text = "- match: {name: norm}\n  replace: {kwargs: {generate_device: 'gpu:1', prefill_device: cpu}}\n";
    let call = ktx(&["rules", "check", &file("gpu.yaml", text)]);
    assert_eq!(call.code, Some(1), "{}", call.stdout);
    assert!(
        call.stdout
            .contains("\"gpu:1\" is no device; write `cuda:1`"),
        "{}",
        call.stdout
    );
}

/// A rule file with every extension, and what it includes.
fn extended() -> String {
    file(
        "base.yaml",
        "- match: {name: '^lm_head$'}\n  replace: {class: KLinearTorch, kwargs: {generate_device: cpu, prefill_device: cpu}}\n",
    );
    file(
        "extended.yaml",
        "- ktx: 1\n  variables: {gpu: cpu}\n- match: {glob: 'model.layers.*.mlp.experts', layers: '1-'}\n  replace:\n    \
         class: KExpertsCPU\n    kwargs: {generate_device: '${gpu}', prefill_device: '${gpu}'}\n  recursive: False\n\
         - match: {class: torch.nn.Linear, type: [Q4_0, Q4_K, Q5_K, Q6_K, Q8_0]}\n  replace:\n    class: KLinearTorch\n    \
         kwargs: {generate_device: '${gpu}', prefill_device: '${gpu}'}\n- include: base.yaml\n",
    )
}

#[test]
fn extensions_work_in_plan_and_diff_and_variables_are_set_from_the_command_line() {
    let rules = extended();
    let table = ktx(&["plan", "--rules", &rules, "--device", "cpu"]).ok();
    let row = |table: &str, module: &str| {
        let start = format!("{module} ");
        let found = table.lines().find(|line| line.starts_with(&start));
        found.unwrap_or_else(|| panic!("{table}")).to_owned()
    };
    let experts = row(&table, "model.layers.1.mlp.experts");
    assert!(
        experts.contains("KExpertsCPU") && experts.ends_with("line 3"),
        "{experts}"
    );
    let set = ktx(&[
        "plan",
        "--rules",
        &rules,
        "--device",
        "cpu",
        "--set",
        "gpu=cuda:1",
    ])
    .ok();
    assert!(
        row(&set, "model.layers.1.mlp.experts").contains("cuda:1"),
        "{set}"
    );
    let diff = ktx(&["plan", "--diff", &rules, &rules, "--device", "cpu"]).ok();
    assert!(diff.starts_with("0 of "), "{diff}");
    let unknown = ktx(&["plan", "--rules", &rules, "--set", "gqu=cuda:1"]);
    assert!(
        unknown.stderr.contains("did you mean `gpu`?"),
        "{}",
        unknown.stderr
    );
    let tree = ktx(&["plan", "--rules", &rules, "--tree", &tree("tiny")]);
    assert!(
        tree.stderr.contains("extended.yaml:8:") && tree.stderr.contains("name the model's file"),
        "{}",
        tree.stderr
    );
}
