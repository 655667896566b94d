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
    assert!(
        said.contains("matches no module") || said.contains("matches nothing"),
        "{said}"
    );
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
