//! Rules that every source file of the libraries keeps.

use std::fs;
use std::path::{Path, PathBuf};

use crate::metadata::root;

const LIBRARIES: [&str; 6] = [
    "ktx-gguf",
    "ktx-kernels",
    "ktx-ops",
    "ktx-models",
    "ktx-core",
    "ktx-server",
];

/// All files below a directory with one of these extensions.
fn files(directory: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in
            fs::read_dir(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()))
        {
            let path = entry.expect("the directory can be read").path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if path.is_dir() {
                if !name.starts_with("target") && name != ".git" {
                    pending.push(path);
                }
            } else if path
                .extension()
                .is_some_and(|e| extensions.iter().any(|wanted| e == *wanted))
            {
                found.push(path);
            }
        }
    }
    found
}

/// Lines of code of a library, without comments and without its unit tests.
fn code_lines(library: &str) -> Vec<(PathBuf, usize, String)> {
    let sources = files(&root().join(library).join("src"), &["rs"]);
    assert!(!sources.is_empty(), "{library} has no sources");
    let is_test = |path: &Path| path.file_stem().is_some_and(|stem| stem == "tests");
    let mut lines = Vec::new();
    for path in sources.into_iter().filter(|path| !is_test(path)) {
        let text = fs::read_to_string(&path).expect("a source is UTF-8");
        let code = text
            .lines()
            .take_while(|line| line.trim() != "#[cfg(test)]");
        for (number, line) in code
            .enumerate()
            .filter(|(_, line)| !line.trim_start().starts_with("//"))
        {
            lines.push((path.clone(), number + 1, line.to_owned()));
        }
    }
    lines
}

fn assert_absent(library: &str, words: &[&str], why: &str) {
    for (path, number, line) in code_lines(library) {
        for word in words {
            assert!(
                !line.contains(word),
                "{}:{number}: {why}: {}",
                path.display(),
                line.trim()
            );
        }
    }
}

#[test]
fn libraries_do_not_print() {
    for library in LIBRARIES {
        let printing = ["println!", "print!(", "dbg!", "io::stdout", "io::stderr"];
        assert_absent(library, &printing, "only front ends print; use `tracing`");
    }
}

#[test]
fn libraries_above_the_kernels_forbid_unsafe_code() {
    for library in ["ktx-ops", "ktx-models", "ktx-core", "ktx-server"] {
        let text = fs::read_to_string(root().join(library).join("src/lib.rs")).expect("it has one");
        assert!(
            text.contains("#![forbid(unsafe_code)]"),
            "{library} allows unsafe code"
        );
    }
}

#[test]
fn models_name_no_device_and_no_instruction_set() {
    let words = ["Device", "cuda", "avx", "amx", "target_feature"];
    assert_absent(
        "ktx-models",
        &words,
        "architectures are the same everywhere",
    );
}

/// Kernels are chosen when the program runs, so that one binary runs on every CPU.
#[test]
fn nothing_is_built_for_one_cpu() {
    let mut settings = files(root(), &["toml", "sh", "yml", "yaml"]);
    settings.push(root().join(".ci/run"));
    for path in settings {
        let text = fs::read_to_string(&path).expect("a text");
        assert!(
            !text.contains("target-cpu"),
            "{} sets a target CPU",
            path.display()
        );
    }
}

/// No path of a request reaches the file system: the server's code has no way to it, and no call that takes a path.
#[test]
fn the_server_opens_no_files() {
    let ways = [
        "fs::",
        "File::",
        "PathBuf",
        "path::",
        "ServeDir",
        "load_adapter",
    ];
    for (path, number, line) in code_lines("ktx-server") {
        let found = ways.iter().find(|way| line.contains(*way));
        assert_eq!(found, None, "{}:{number}: {line}", path.display());
    }
}
