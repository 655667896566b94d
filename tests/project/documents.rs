//! What the documents show exists and works: links, commands, rules.

use std::fs;
use std::path::{Path, PathBuf};

use ktx_core::{Engine, Rules};

use crate::metadata::root;

const DOCUMENTS: [&str; 12] = [
    "README.md",
    "docs/architecture.md",
    "docs/rules.md",
    "docs/lora.md",
    "docs/adding-an-operator.md",
    "docs/adding-a-model.md",
    "docs/models.md",
    "docs/gpus.md",
    "docs/performance.md",
    "docs/placement.md",
    "docs/api.md",
    "docs/deploy.md",
];

fn documents() -> impl Iterator<Item = (PathBuf, String)> {
    DOCUMENTS.iter().map(|name| {
        let path = root().join(name);
        let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        (path, text)
    })
}

/// The fenced blocks of a language, with the number of their first line.
fn blocks(text: &str, language: &str) -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut lines = text.lines().enumerate();
    while let Some((number, line)) = lines.next() {
        if let Some(name) = line.trim_start().strip_prefix("```") {
            let block: Vec<&str> = lines
                .by_ref()
                .map(|(_, line)| line)
                .take_while(|line| line.trim() != "```")
                .collect();
            if name == language {
                found.push((number + 2, block.join("\n")));
            }
        }
    }
    found
}

/// The text without fenced blocks and code in backquotes.
fn prose(text: &str) -> String {
    let outside: String = text.split("\n```").step_by(2).collect();
    outside.split('`').step_by(2).collect()
}

/// Targets of `[text](target)`.
fn links(prose: &str) -> impl Iterator<Item = &str> {
    prose
        .split("](")
        .skip(1)
        .filter_map(|rest| rest.split(')').next())
}

/// A heading as GitHub names it in links.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    kept.chars()
        .filter(|c| c.is_alphanumeric() || "-_ ".contains(*c))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

fn has_heading(path: &Path, wanted: &str) -> bool {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let headings = text.lines().filter_map(|line| line.strip_prefix('#'));
    headings
        .map(|heading| anchor(heading.trim_start_matches('#')))
        .any(|found| found == wanted)
}

#[test]
fn links_lead_to_files_and_headings_that_exist() {
    for (path, text) in documents() {
        for link in links(&prose(&text)).filter(|link| !link.starts_with("http")) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.with_file_name("").join(file),
            };
            assert!(target.exists(), "{}: nothing is at {link}", path.display());
            assert!(
                heading.is_empty() || has_heading(&target, heading),
                "{}: no heading {link}",
                path.display()
            );
        }
    }
}

/// Names in backquotes that are paths of this repository.
#[test]
fn files_that_are_named_exist() {
    let below = [
        "ktx-",
        "docs/",
        "tests/",
        "examples/",
        "models/",
        "scripts/",
        "src/",
    ];
    for (path, text) in documents() {
        let spans = text.split('`').skip(1).step_by(2);
        let files = spans.filter(|span| span.contains('/') && !span.contains([' ', '*', '\n']));
        for file in files.filter(|file| below.iter().any(|start| file.starts_with(start))) {
            let is_placeholder = file.contains("NAME");
            assert!(
                is_placeholder || root().join(file).exists(),
                "{}: there is no {file}",
                path.display()
            );
        }
    }
}

/// Words of a command line of the documents, without comment and redirection; quotes keep words together.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (None, '#' | '>' | '|') => break,
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            (None, ' ' | '\n') => words.push(String::new()),
            (_, c) => words.last_mut().expect("it begins with one").push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

#[test]
fn commands_that_are_shown_are_understood() {
    let mut checked = 0;
    for (path, text) in documents() {
        let shell = blocks(&text, "sh");
        let lines = shell
            .iter()
            .flat_map(|(_, block)| block.lines())
            .map(str::trim);
        let spans = text.split('`').skip(1).step_by(2);
        for line in lines.chain(spans) {
            let line = line.strip_prefix("target/release/").unwrap_or(line);
            let Some(rest) = line.strip_prefix("ktx ") else {
                continue;
            };
            let line = format!("ktx {}", rest.replace("SHELL", "bash"));
            let parsed = ktx_cli::command().try_get_matches_from(words(&line));
            assert!(
                parsed.is_ok(),
                "{}: `{line}`: {}",
                path.display(),
                parsed.unwrap_err()
            );
            checked += 1;
        }
    }
    assert!(checked > 10, "only {checked} commands were found");
}

#[test]
fn the_readme_lists_every_command() {
    let readme = fs::read_to_string(root().join("README.md")).expect("there is a README");
    for command in ktx_cli::command()
        .get_subcommands()
        .filter(|c| !c.is_hide_set())
    {
        let start = format!("`ktx {}", command.get_name());
        assert!(
            readme.contains(&start),
            "the README does not show `ktx {}`",
            command.get_name()
        );
    }
}

#[test]
fn rules_that_are_shown_can_be_carried_out_on_the_built_in_model() {
    let mut checked = 0;
    for (path, text) in documents() {
        for (line, rules) in blocks(&text, "yaml") {
            let name = format!("{}:{line}", path.display());
            let rules = Rules::Text {
                text: rules,
                name: name.clone(),
            };
            let model = root().join("models/pip-17m.gguf");
            let planned = Engine::builder()
                .model(model)
                .rules(rules)
                .plan()
                .unwrap_or_else(|e| panic!("{name}: {e}"));
            planned.require().unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(
                planned.plan().warnings.is_empty(),
                "{name}: {}",
                planned.plan().warnings[0]
            );
            checked += 1;
        }
    }
    assert!(checked >= 4, "only {checked} rule files were found");
}
