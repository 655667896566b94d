//! `--lora` and `/lora`: adapters beside a model.

use super::{Call, file, folder, ktx, ktx_reading};

const MODEL: &str = "tests/fixtures/transformers/llama.gguf";
const ALL: &str = "tests/fixtures/adapters/llama_all.gguf";
const ENDS: &str = "tests/fixtures/adapters/llama_ends";

fn ids(adapters: &[&str]) -> String {
    let mut flags = vec![
        "run", "--model", MODEL, "--raw", "--prompt", "hello", "--ids", "-n", "12",
    ];
    flags.extend(["--temperature", "0"]);
    for adapter in adapters {
        flags.extend(["--lora", adapter]);
    }
    ktx(&flags).ok()
}

fn refused(model: &str, adapter: &str) -> String {
    ktx(&[
        "run", "--model", model, "--raw", "--prompt", "x", "--lora", adapter,
    ])
    .error()
}

#[track_caller]
fn assert_says(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "`{part}` is missing in: {message}");
    }
}

#[test]
fn adapters_change_the_answer_and_a_scale_of_nothing_does_not() {
    let plain = ids(&[]);
    let peft = ids(&["tests/fixtures/adapters/llama_all"]);
    assert_ne!(plain, peft);
    assert_eq!(peft, ids(&[ALL]), "both formats are one adapter");
    assert_eq!(plain, ids(&[&format!("{ALL}:0")]));
    assert_ne!(ids(&[ALL, &format!("{ENDS}:-1.5")]), peft);
}

#[test]
fn the_plan_shows_adapters_with_their_bytes() {
    let Call { stdout, stderr, .. } = ktx(&["plan", "--model", MODEL, "--cpu", "--lora", ALL]);
    assert_says(
        &stdout,
        &["KLinearLora(KTransformersLinear(KLinearCPUInfer))"],
    );
    let said = [
        "adapter llama_all: rank 3 to 7, 14 modules",
        "KiB",
        "scale 1",
    ];
    assert_says(&stderr, &said);
}

#[test]
fn bench_and_perplexity_take_adapters() {
    let bench = [
        "bench", "--model", MODEL, "-p", "8", "-n", "2", "--lora", ALL,
    ];
    ktx(&bench).ok();
    let text = file("lora.txt", "abcdefgh".repeat(40));
    let perplexity = |more: &[&str]| {
        let flags = ["perplexity", "--model", MODEL, "-f", &text, "-c", "64"];
        ktx(&[&flags, more].concat()).ok()
    };
    assert_ne!(perplexity(&[]), perplexity(&["--lora", ENDS]));
}

#[test]
fn a_chat_lists_and_switches_adapters() {
    let script = format!(
        "/lora\n/lora off\n/lora load {ENDS}:0.5\n/lora llama_all llama_ends:-2\n/lora\n/lora pirate\n"
    );
    let call = ktx_reading(&script, &["chat", "--model", MODEL, "--lora", ALL]);
    assert_eq!(call.code, Some(1), "{}", call.stderr);
    assert_says(
        &call.stderr,
        &[
            "x 1  llama_all: rank 3 to 7",
            "(no adapter applies)",
            "(adapters: llama_ends x 0.5)",
            "(adapters: llama_all x 1, llama_ends x -2)",
            "x -2  llama_ends: rank 6",
            "error: there is no adapter `pirate`; there are: llama_all, llama_ends",
        ],
    );
}

#[test]
fn an_adapter_of_another_model_is_refused() {
    let qwen = "tests/fixtures/transformers/qwen3.gguf";
    assert_says(
        &refused(qwen, ALL),
        &["llama_all.gguf", "architecture `llama`", "`qwen3`"],
    );
    assert_says(
        &refused("tests/fixtures/transformers/qwen3moe.gguf", ENDS),
        &[
            "q_proj.lora_B.weight",
            "model.layers.0.self_attn.q_proj",
            "[rank, 96]",
        ],
    );
    assert_says(
        &refused(MODEL, "tests/fixtures/adapters/deepseek_v3_kv"),
        &["no module", "kv_b_proj", "the nearest that it has is"],
    );
}

#[test]
fn what_is_no_adapter_is_refused() {
    assert_says(
        &refused(MODEL, "/nowhere/none.gguf"),
        &["/nowhere/none.gguf"],
    );
    assert_says(&refused(MODEL, MODEL), &["general.type", "is it a model?"]);
    assert_says(&refused(MODEL, "src"), &["src", "no adapter_config.json"]);
    let scale = ktx(&["run", "--prompt", "x", "--lora", "a.gguf:much"]);
    assert_says(&scale.stderr, &["--lora", "the scale `much` is no number"]);
}

#[test]
fn peft_settings_that_change_the_arithmetic_are_refused() {
    let directory = folder().join("peft");
    std::fs::create_dir_all(&directory).unwrap();
    let weights = format!("{ENDS}/adapter_model.safetensors");
    std::fs::copy(weights, directory.join("adapter_model.safetensors")).unwrap();
    let name = directory.display().to_string();
    for (setting, says) in [
        (r#""use_dora": true"#, "`use_dora` is true"),
        (r#""bias": "all""#, "`bias` is \"all\""),
        (r#""modules_to_save": ["lm_head"]"#, "`modules_to_save`"),
        (r#""peft_type": "IA3""#, "`peft_type`"),
        (r#""init_lora_weights": "pissa""#, "`init_lora_weights`"),
        (r#""r": 0"#, "`r` is 0"),
        (r#""r": 5"#, "has rank 6, and adapter_config.json says 5"),
        (r#""lora_alpha": "x""#, "adapter_config.json"),
    ] {
        let mut config: serde_json::Value =
            serde_json::from_str(r#"{"peft_type": "LORA", "r": 6, "lora_alpha": 5}"#).unwrap();
        let change: serde_json::Value = serde_json::from_str(&format!("{{{setting}}}")).unwrap();
        for (key, value) in change.as_object().unwrap() {
            config[key] = value.clone();
        }
        std::fs::write(directory.join("adapter_config.json"), config.to_string()).unwrap();
        assert_says(&refused(MODEL, &name), &[says, "peft"]);
    }
}
