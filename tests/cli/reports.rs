//! `ktx inspect`, `bench`, `perplexity`, `operators`, `rules` and `devices`.

use serde_json::Value;

use super::{command, file, finished, ktx};

fn json(arguments: &[&str]) -> Value {
    let stdout = ktx(arguments).ok();
    serde_json::from_str(&stdout).unwrap_or_else(|e| panic!("{e}: {stdout}"))
}

#[test]
fn inspect_shows_metadata_tensors_and_sizes() {
    for arguments in [&["inspect"][..], &["inspect", "models/pip-17m.gguf"]] {
        let text = ktx(arguments).ok();
        assert!(
            text.contains("general.architecture (string) = deepseek2"),
            "{text}"
        );
        assert!(
            text.contains("tokenizer.ggml.tokens (array of string) = [")
                && text.contains("(4096 elements)")
        );
        let row = text
            .lines()
            .find(|line| line.contains("blk.1.ffn_gate_exps.weight"))
            .unwrap();
        assert!(
            row.contains("Q4_K") && row.contains("256 x 256 x 16"),
            "{row}"
        );
        assert!(
            text.lines()
                .any(|line| line.starts_with("  Q6_K") && line.contains("6225920")),
            "{text}"
        );
    }
}

#[test]
fn inspect_shows_safetensors_alone_and_beside_a_gguf_file() {
    let file = "tests/fixtures/fp8/model.safetensors";
    let text = ktx(&["inspect", file]).ok();
    let row = text
        .lines()
        .find(|line| line.contains("layers.0.self_attn.q_a_proj.weight "))
        .unwrap();
    assert!(
        row.contains("F8_E4M3") && row.contains("136 x 160"),
        "{row}"
    );
    assert!(
        text.contains("format = pt") && !text.contains("GGUF"),
        "{text}"
    );
    let text = ktx(&["inspect", "tests/fixtures/fp8"]).ok();
    assert!(
        text.contains("GGUF version 3") && text.contains("F8_E4M3"),
        "{text}"
    );
    let both = json(&["inspect", "--json", "tests/fixtures/fp8"]);
    let alone = json(&["inspect", "--json", file]);
    assert_eq!(both["safetensors"]["tensors"], alone["tensors"]);
    assert!(alone["types"]["F8_E4M3"]["bytes"].as_u64().unwrap() > 100_000);
    assert_eq!(both["tensors"].as_array().unwrap().len(), 3);
    let said = ktx(&["inspect", "tests/fixtures"]).error();
    assert!(said.contains("no GGUF file in it"), "{said}");
}

#[test]
fn inspect_gives_all_as_json() {
    let model = json(&["inspect", "--json"]);
    assert_eq!(model["metadata"]["deepseek2.block_count"], 5);
    assert_eq!(
        model["metadata"]["tokenizer.ggml.tokens"]
            .as_array()
            .unwrap()
            .len(),
        4096
    );
    let bytes: u64 = model["tensors"]
        .as_array()
        .unwrap()
        .iter()
        .map(|t| t["bytes"].as_u64().unwrap())
        .sum();
    let types: u64 = model["types"]
        .as_object()
        .unwrap()
        .values()
        .map(|t| t["bytes"].as_u64().unwrap())
        .sum();
    assert_eq!(bytes, types);
}

#[test]
fn bench_prints_one_line_of_json() {
    for arguments in [
        &[
            "bench", "-p", "16", "-n", "4", "-t", "1", "-r", "2", "--json",
        ][..],
        &[
            "bench",
            "--model",
            "models/pip-17m.gguf",
            "--threads",
            "1",
            "--prompt",
            "16",
            "--gen",
            "4",
            "-r",
            "1",
            "--json",
        ],
    ] {
        let stdout = ktx(arguments).ok();
        assert_eq!(stdout.lines().count(), 1, "{stdout}");
        let line: Value = serde_json::from_str(&stdout).unwrap();
        assert!(
            line["prompt_tps"].as_f64().unwrap() > 0.0
                && line["generate_tps"].as_f64().unwrap() > 0.0,
            "{line}"
        );
        assert_eq!(line["threads"], 1);
        assert!(line["model"].is_string());
    }
    let line = json(&["bench", "-p", "0", "-n", "2", "-r", "1", "--json"]);
    assert!(
        line.get("prompt_tps").is_none() && line["generate_tps"].is_number(),
        "{line}"
    );
}

#[test]
fn bench_prints_a_table_too() {
    let text = ktx(&["bench", "-p", "8", "-n", "2", "-r", "1"]).ok();
    assert!(
        text.contains("prompt ") && text.contains("generate "),
        "{text}"
    );
}

/// llama.cpp measured the same model, its weights dequantised, on the same text. The text is none of the model's, which
/// makes the figure large and sensitive to every rounding.
#[test]
fn perplexity_is_that_of_llama_cpp() {
    let golden = std::fs::read_to_string("tests/fixtures/perplexity.json").unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let mut runs = golden["runs"].as_array().unwrap().iter();
    let run = runs.find(|run| run["model"] == "pip-17m.gguf").unwrap();
    let text = format!("tests/fixtures/{}", run["text"].as_str().unwrap());
    let flags = ["--context", "512", "--precision", "f32", "--json"];
    let ours = json(&[&["perplexity", "--file", &text], &flags[..]].concat());
    let theirs = &run["f32_weights"];
    assert_eq!(ours["chunks"], theirs["chunks"]);
    for (ours, theirs) in [("perplexity", "ppl"), ("standard_error", "standard_error")]
        .map(|(a, b)| (ours[a].as_f64().unwrap(), theirs[b].as_f64().unwrap()))
    {
        assert!((ours / theirs - 1.0).abs() < 1e-4, "{ours} and {theirs}");
    }
}

#[test]
fn perplexity_needs_two_chunks() {
    let text = file("short.txt", "too short");
    let said = ktx(&["perplexity", "--file", &text]).error();
    assert!(said.contains("1024 are needed"), "{said}");
    let said = ktx(&["perplexity", "--file", &text, "--context", "2"]).error();
    assert!(said.contains("predict nothing"), "{said}");
}

#[test]
fn operators_are_listed_with_names_arguments_and_needs() {
    let text = ktx(&["operators", "KLinearMarlin"]).ok();
    for part in [
        "ktransformers.operators.linear.KLinearMarlin",
        "role     Linear",
        "ktx.linear.KLinearMarlin",
        "group_size = 64",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    let list = json(&["operators", "--json"]);
    let list = list.as_array().unwrap();
    let classes: Vec<&str> = list.iter().map(|o| o["class"].as_str().unwrap()).collect();
    assert!(
        classes.is_sorted()
            && classes.contains(&"ktransformers.operators.experts.KTransformersExperts")
    );
    for operator in list {
        assert!(
            operator["role"].is_string() && operator["summary"].is_string(),
            "{operator}"
        );
        for kwarg in operator["kwargs"].as_array().unwrap() {
            assert!(!kwarg["doc"].as_str().unwrap().is_empty(), "{operator}");
        }
    }
    assert_eq!(ktx(&["operators", "KNothing"]).code, Some(2));
}

#[test]
fn presets_are_listed_and_shown() {
    let text = ktx(&["rules"]).ok();
    assert!(
        text.contains("deepseek2") && text.contains("qwen3moe"),
        "{text}"
    );
    let shown = ktx(&["rules", "show", "deepseek2"]).ok();
    let path = file("shown.yaml", &shown);
    let answer = ktx(&[
        "run",
        "--temperature",
        "0",
        "--prompt",
        "What is 7 + 5?",
        "--rules",
        &path,
    ])
    .ok();
    assert_eq!(answer, "7 + 5 = 12.\n");
    let said = ktx(&["rules", "show", "nothing"]).error();
    assert!(said.contains("no preset `nothing`"), "{said}");
}

#[test]
fn devices_are_listed() {
    let text = ktx(&["devices"]).ok();
    assert!(
        text.starts_with("cpu ") && text.contains("portable") && text.contains("cuda"),
        "{text}"
    );
    let devices = json(&["devices", "--json"]);
    assert!(
        devices["cpu"]["threads"].as_u64().unwrap() > 0
            && devices["cuda"].as_array().unwrap().is_empty()
    );
    let speed = |v: &Value| v["cpu"]["speed"]["bandwidth"].as_f64().unwrap();
    assert!(speed(&devices) > 1e8, "{devices}");
    // Measured once: the second call knows what the first one found.
    assert_eq!(speed(&devices), speed(&json(&["devices", "--json"])));
}

/// What is no list of numbers is an error on any machine, also for a command that would do without a GPU.
#[test]
fn a_choice_of_gpus_that_is_no_list_is_refused() {
    for arguments in [&["devices"][..], &["plan", "--cpu"]] {
        let mut call = command(arguments);
        call.env("KTX_GPUS", "cuda:0");
        let said = finished(call, "").error();
        assert!(said.contains("KTX_GPUS=cuda:0 is no list"), "{said}");
    }
}
