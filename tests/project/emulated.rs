//! The program runs on CPUs that lack what this one may have.

use std::io::Write;
use std::process::Command;

use crate::metadata::root;

const QEMU: &str = "qemu-x86_64";

/// Answers one question of the built-in model on an emulated CPU.
fn answers_on(cpu: &str) {
    if Command::new(QEMU).arg("--version").output().is_err() {
        // Past the test harness, which would keep the line to itself.
        let skipped = format!(
            "skipped: {QEMU} is missing (Debian: apt-get install qemu-user), {cpu} not tested"
        );
        writeln!(std::io::stderr(), "{skipped}").expect("standard error is open");
        return;
    }
    let output = Command::new(QEMU)
        .args(["-cpu", cpu, env!("CARGO_BIN_EXE_ktx"), "run", "--model"])
        .arg(root().join("models/pip-17m.gguf"))
        .args([
            "--prompt",
            "What is 7 + 5?",
            "--temperature",
            "0",
            "--max-new-tokens",
            "16",
        ])
        .args(["--threads", "2"])
        .env_remove("KTX_CPU")
        .output()
        .expect("the emulator starts");
    let (answer, errors) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success(),
        "{cpu}: {}: {errors}",
        output.status
    );
    assert_eq!(answer.trim(), "7 + 5 = 12.", "{cpu}: {errors}");
}

/// SSE4.2, no AVX.
#[test]
fn a_cpu_without_avx_answers() {
    answers_on("Nehalem");
}

/// AVX2, no AVX-512.
#[test]
fn a_cpu_without_avx512_answers() {
    answers_on("Haswell");
}
