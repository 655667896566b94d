//! A crate outside of the workspace that depends on `ktx-core` and nothing else.

use std::fs;
use std::path::PathBuf;
use std::process::Output;

use crate::metadata::{cargo, root};

const SOURCE: &str = include_str!("downstream/main.rs");

/// A directory that goes away with its value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("ktx-downstream-{}", std::process::id()));
        fs::create_dir_all(path.join("src")).expect("the temporary directory can be written");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What comes from the registry is optimised as in the workspace, so that it is built once; our crates
/// are built anew, and as fast as that goes.
fn manifest() -> String {
    let core = root().join("ktx-core");
    let mut text = format!(
        "[workspace]\n\
         [package]\nname = \"downstream\"\nversion = \"0.1.0\"\nedition = \"2024\"\n\
         [dependencies]\nktx-core = {{ path = {core:?} }}\n\
         [profile.dev]\nopt-level = 0\ndebug = 1\n\
         [profile.dev.package.\"*\"]\nopt-level = 2\n"
    );
    for (name, level) in [
        ("ktx-gguf", 0),
        ("ktx-kernels", 1),
        ("ktx-ops", 0),
        ("ktx-models", 0),
        ("ktx-core", 0),
    ] {
        text += &format!("[profile.dev.package.{name}]\nopt-level = {level}\ndebug = 0\n");
    }
    text
}

/// Builds the crate with the workspace's versions and runs it on the built-in model.
fn run() -> Output {
    let scratch = Scratch::new();
    fs::write(scratch.0.join("Cargo.toml"), manifest()).expect("the manifest is written");
    fs::write(scratch.0.join("src/main.rs"), SOURCE).expect("the source is written");
    fs::copy(root().join("Cargo.lock"), scratch.0.join("Cargo.lock"))
        .expect("the lock file is copied");
    // CARGO_TARGET_TMPDIR is `tmp` in the directory that the workspace is built in.
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("..");
    cargo()
        .args(["run", "--offline", "--quiet", "--"])
        .arg(root().join("models/pip-17m.gguf"))
        .env("CARGO_TARGET_DIR", target)
        .current_dir(&scratch.0)
        .output()
        .expect("cargo runs")
}

#[test]
fn a_downstream_crate_sees_all_operators_registers_its_own_and_generates_text() {
    let output = run();
    let (text, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success(),
        "{}\n{text}\n{errors}",
        output.status
    );
    let operators: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("operator "))
        .collect();
    let here: Vec<&str> = ktx_core::ops::registry()
        .entries()
        .map(|e| e.class)
        .collect();
    for class in &here {
        assert!(
            operators.contains(class),
            "{class} is not registered downstream: {operators:?}"
        );
    }
    assert!(operators.contains(&"downstream.PlainNorm"), "{operators:?}");
    assert!(here.len() + 1 == operators.len(), "{operators:?}");
    assert!(text.contains("answer 7 + 5 = 12.\n"), "{text}");
    let calls = text
        .lines()
        .find_map(|line| line.strip_prefix("calls "))
        .expect("they are counted");
    assert!(
        calls.parse::<usize>().expect("a number") > 0,
        "its operator did not run"
    );
}
