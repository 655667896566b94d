//! Bad input: one message that names what is wrong and what to do, and exit code 1.

use ktx_core::gguf::GgufWriter;
use ktx_core::memory::available_host_memory;

use super::{command, file, folder, ktx};

fn message(flags: &[&str]) -> String {
    ktx(&[&["run", "--prompt", "Hello."], flags].concat()).error()
}

/// The message for a rule file.
fn rule_message(name: &str, text: &str) -> String {
    message(&["--rules", &file(name, text)])
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is missing in: {message}");
    }
}

#[test]
fn a_missing_model_is_named() {
    assert_says(
        &message(&["--model", "/nowhere/none.gguf"]),
        &["/nowhere/none.gguf", "check the path"],
    );
}

#[test]
fn a_directory_without_a_model_is_refused() {
    for flag in ["--model", "--gguf_path"] {
        assert_says(&message(&[flag, "src"]), &["src: no GGUF file in it"]);
    }
}

#[test]
fn a_truncated_model_is_said_to_be_incomplete() {
    let whole = std::fs::read("models/pip-17m.gguf").unwrap();
    for (name, length) in [("header.gguf", 5_000), ("tensors.gguf", whole.len() - 1)] {
        let said = message(&["--model", &file(name, &whole[..length])]);
        assert_says(&said, &[name, "not downloaded completely"]);
    }
}

#[test]
fn texts_and_empty_files_are_no_models() {
    assert_says(
        &message(&["--model", "Cargo.toml"]),
        &["Cargo.toml is not a GGUF file"],
    );
    assert_says(
        &message(&["--model", &file("empty.gguf", "")]),
        &["empty.gguf is empty"],
    );
}

#[test]
fn an_architecture_that_is_not_supported_is_named_with_those_that_are() {
    let mut writer = GgufWriter::new();
    writer.kv("general.architecture", "rwkv7");
    let said = message(&["--model", &file("rwkv7.gguf", writer.to_bytes())]);
    assert_says(
        &said,
        &[
            "rwkv7.gguf",
            "`rwkv7` is not supported",
            "deepseek2, gpt-oss, llama",
        ],
    );
}

#[test]
fn an_unknown_class_is_named_with_the_nearest() {
    let said = rule_message(
        "class.yaml",
        "- match:\n    name: o_proj$\n  replace:\n    class: ktransformers.operators.linear.KTransformersLinaer\n",
    );
    assert_says(
        &said,
        &[
            "class.yaml:4:12",
            "KTransformersLinaer",
            "did you mean",
            "KTransformersLinear`",
        ],
    );
}

#[test]
fn an_operator_of_another_role_is_refused() {
    let said = rule_message(
        "role.yaml",
        "- match:\n    name: layers.0.self_attn.o_proj$\n  replace:\n    class: ktransformers.operators.gate.KMoEGate\n",
    );
    assert_says(
        &said,
        &[
            "role.yaml:4:12",
            "role Gate",
            "role Linear",
            "`model.layers.0.self_attn.o_proj`",
        ],
    );
}

#[test]
fn an_unknown_argument_is_named_with_the_nearest() {
    let said = rule_message(
        "kwarg.yaml",
        "- match:\n    name: o_proj$\n  replace:\n    class: KLinearMarlin\n    kwargs:\n      group_sise: 64\n",
    );
    assert_says(
        &said,
        &[
            "kwarg.yaml:6:",
            "`group_sise`",
            "did you mean `group_size`?",
        ],
    );
}

#[test]
fn a_wrong_regular_expression_is_shown_with_its_place() {
    let said = rule_message(
        "regex.yaml",
        "- match:\n    name: 'layers\\.(\\d+'\n  replace:\n    class: default\n",
    );
    assert_says(
        &said,
        &["regex.yaml:2:", "layers\\.(\\d+", "is wrong at character"],
    );
}

#[test]
fn rule_files_are_lists_with_something_in_them() {
    assert_says(
        &rule_message("map.yaml", "match: 3\n"),
        &["map.yaml:1:1", "a rule file is a list of rules"],
    );
    assert_says(
        &rule_message("empty.yaml", ""),
        &["empty.yaml` is empty", "- match:"],
    );
    assert_says(
        &rule_message("broken.yaml", "- match: {\n"),
        &["broken.yaml:", "no valid YAML"],
    );
}

#[test]
fn a_missing_rule_file_and_an_unknown_preset_are_named() {
    assert_says(
        &message(&["--rules", "none.yaml"]),
        &["none.yaml", "cannot read the rule file"],
    );
    assert_says(
        &message(&["--rules", "deepsek"]),
        &["no preset `deepsek`", "deepseek2, gpt-oss, llama"],
    );
}

#[test]
fn rules_for_a_gpu_are_refused_without_one_and_mapped_if_asked() {
    let rules = file(
        "gpu.yaml",
        "- match:\n    name: ''\n  replace:\n    class: default\n    kwargs:\n      generate_device: cuda\n      \
         prefill_device: cuda\n",
    );
    let said = message(&["--rules", &rules]);
    assert_says(&said, &["gpu.yaml:", "rule 1 (line 1)", "cuda:0", "--cpu"]);
    let call = ktx(&[
        "run",
        "--prompt",
        "What is 7 + 5?",
        "--temperature",
        "0",
        "--rules",
        &rules,
        "--cpu",
    ]);
    assert_says(&call.stderr, &["every device is mapped to the CPU"]);
    assert_eq!(call.ok(), "7 + 5 = 12.\n");
}

#[test]
fn a_prompt_longer_than_the_context_is_refused() {
    let said = ktx(&["run", "--prompt", &"word ".repeat(100), "--context", "64"]).error();
    assert_says(&said, &["the context holds 64", "--context"]);
}

#[test]
fn a_prompt_file_that_is_no_text_is_named() {
    let path = file("bad-prompt.txt", b"caf\xe9 au lait");
    let said = ktx(&["run", "--prompt-file", &path]).error();
    assert_says(&said, &["bad-prompt.txt is not UTF-8 text: byte 3"]);
    let said = ktx(&["run", "--prompt-file", "/nowhere/prompt.txt"]).error();
    assert_says(&said, &["cannot read /nowhere/prompt.txt"]);
    let said = ktx(&["run", "--prompt-file", "src"]).error();
    assert_says(&said, &["cannot read src", "directory"]);
}

#[test]
fn sampling_parameters_out_of_range_are_named() {
    assert_says(&message(&["--temperature=-1"]), &["temperature is -1"]);
    assert_says(&message(&["--top-p", "0"]), &["top_p is 0"]);
    assert_says(&message(&["--threads", "0"]), &["threads is 0"]);
}

#[test]
fn a_context_that_does_not_fit_is_refused_before_loading() {
    let needed = 16_777_216_u64 * 5 * 160 * 4;
    if available_host_memory().is_none_or(|available| available > needed) {
        eprintln!("skipped: this machine has room for a context of 16777216");
        return;
    }
    let said = message(&["--context", "16777216", "--kv-type", "f32"]);
    assert_says(
        &said,
        &["not enough memory", "are available", "a context of"],
    );
}

#[test]
fn calls_without_meaning_have_exit_code_2() {
    for arguments in [
        &["run"][..],
        &["run", "--prompt", "a", "--prompt-file", "b"],
        &["run", "--prompt", "a", "--seed", "x"],
        &["bench", "-p", "0", "-n", "0"],
        &["plan", "--tree", "tree.json"],
        &["plan", "--device", "gpu"],
        &["sing"],
    ] {
        let call = ktx(arguments);
        assert_eq!(call.code, Some(2), "{arguments:?}: {}", call.stderr);
        assert!(
            call.stdout.is_empty() && call.stderr.starts_with("error: "),
            "{arguments:?}: {}",
            call.stderr
        );
    }
}

#[test]
fn a_module_tree_that_is_none_is_refused() {
    let rules = file("tree-rules.yaml", "[]");
    let tree = file("tree.json", "{\"model\": \"A\"}");
    let said = ktx(&["plan", "--tree", &tree, "--rules", &rules]).error();
    assert_says(&said, &["tree.json", "starts with its root"]);
}

#[test]
fn a_reader_that_goes_away_is_no_error() {
    let mut child = command(&["inspect", "--json"]).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn a_program_without_a_place_for_its_history_chats_all_the_same() {
    let nowhere = folder().join("question.state");
    std::fs::write(&nowhere, "a file where a folder should be").unwrap();
    let mut child = command(&["chat"]);
    let output = child
        .env("XDG_STATE_HOME", &nowhere)
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0));
}
