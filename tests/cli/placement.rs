//! Placement without rules: `--gpu-memory`, `--ram`, `--emit-rules`, and models that are not there.

use super::{command, file, finished, folder, ktx};

/// A plan of DeepSeek-V2-Lite, which nobody has to download.
fn lite(flags: &[&str]) -> super::Call {
    ktx(&[&["plan", "--arch", "deepseek-v2-lite"], flags].concat())
}

#[test]
fn a_model_that_is_not_there_has_sizes() {
    let call = lite(&["--rules", "deepseek2"]);
    let table = call.ok();
    let row = |module: &str| {
        table
            .lines()
            .find(|line| line.starts_with(&format!("{module} ")))
            .unwrap_or_else(|| panic!("no {module}: {table}"))
            .to_owned()
    };
    assert!(row("model.embed_tokens").contains("112.5 MiB"));
    assert!(row("model.layers.5.mlp.experts").contains("KTransformersExperts"));
}

#[test]
fn hyper_parameters_may_come_from_a_file() {
    let config = file(
        "arch.json",
        r#"{"general.architecture": "llama", "llama.block_count": 2, "llama.embedding_length": 256,
            "llama.feed_forward_length": 512, "llama.attention.head_count": 4, "llama.context_length": 1024,
            "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.vocab_size": 1000}"#,
    );
    let table = ktx(&["plan", "--arch", &config, "--quant", "q8_0"]).ok();
    assert!(
        table.contains("lm_head") && table.contains("265.6 KiB"),
        "{table}"
    );
    let broken = file("broken-arch.json", "[1]");
    let call = ktx(&["plan", "--arch", &broken]);
    assert_eq!(call.code, Some(2));
    assert!(
        call.stderr.contains("a JSON object of GGUF metadata"),
        "{}",
        call.stderr
    );
}

#[test]
fn a_placement_says_what_is_where_and_how_fast() {
    let call = lite(&["--gpu-memory", "3GiB", "--ram", "13GiB"]);
    for words in [
        "cuda:0: ",
        "cpu: ",
        "routed experts: ",
        "predicted: ",
        "why: ",
        "this machine cannot carry out the plan",
    ] {
        assert!(call.stderr.contains(words), "{words}: {}", call.stderr);
    }
    let table = call.ok();
    let attention = table
        .lines()
        .find(|l| l.starts_with("model.layers.3.self_attn "))
        .unwrap();
    assert!(attention.contains("cuda:0"), "{attention}");
}

#[test]
fn emitted_rules_make_the_same_plan() {
    let rules = folder().join("emitted.yaml");
    let rules = rules.to_str().unwrap();
    let budget = ["--gpu-memory", "4GiB,3GiB", "--ram", "16GiB"];
    // From how many tokens on prompts are streamed is measured, which differs from one time to the next.
    let for_programs = [
        "--stream-from",
        "64",
        "--stream-share",
        "0.75",
        "--format",
        "json",
    ];
    // Other tests measure this machine's speed at the same time: this one keeps to what it has measured once.
    let cache = folder().join("cache-of-emitted-rules");
    let lite = |flags: &[&str]| {
        let mut call = command(&[&["plan", "--arch", "deepseek-v2-lite"], flags].concat());
        call.env("XDG_CACHE_HOME", &cache);
        finished(call, "")
    };
    lite(&budget).ok();
    let placed = lite(&[&budget[..], &for_programs, &["--emit-rules", rules]].concat()).ok();
    let loaded = lite(&[&["--rules", rules], &for_programs[..]].concat()).ok();
    assert_eq!(placed, loaded);
    let printed = lite(&[&budget[..], &["--emit-rules", "-"]].concat()).ok();
    let written = std::fs::read_to_string(rules).unwrap();
    // Comments hold predictions, which follow what is measured anew where nothing can be cached.
    let without_comments = |text: &str| -> Vec<String> {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(str::to_owned).collect()
    };
    assert!(written.contains("# predicted: "), "{written}");
    assert_eq!(without_comments(&printed), without_comments(&written));
    let checked = ktx(&["rules", "check", rules]).ok();
    assert!(!checked.contains("error"), "{checked}");
}

#[test]
fn amounts_that_mean_nothing_have_exit_code_2() {
    for amount in [
        "0",
        "0GiB",
        "-1GiB",
        "14 potatoes",
        "",
        "1e99",
        "GiB",
        "4GiB,,2GiB",
    ] {
        for flag in ["--gpu-memory", "--ram"] {
            let call = ktx(&["plan", &format!("{flag}={amount}")]);
            assert_eq!(call.code, Some(2), "{flag} {amount}: {}", call.stderr);
            assert!(call.stdout.is_empty() && !call.stderr.contains("panicked"));
        }
    }
    for flags in [
        &["--gpu-memory", "4GiB", "--rules", "deepseek2"][..],
        &["--quant", "Q4_K_M"],
        &["--arch", "no-such-model"],
        &["--arch", "mixtral-8x7b", "--quant", "Q9_X"],
        &["--arch", "mixtral-8x7b", "--model", "x.gguf"],
    ] {
        let call = ktx(&[&["plan"], flags].concat());
        assert_eq!(call.code, Some(2), "{flags:?}: {}", call.stderr);
    }
}

#[test]
fn units_are_binary_or_decimal() {
    let memory = |amount: &str| {
        let call = lite(&["--ram", amount]);
        let line = call.stderr.lines().find(|l| l.starts_with("cpu: "));
        line.unwrap_or_else(|| panic!("{}", call.stderr)).to_owned()
    };
    assert!(memory("16GiB").contains(" of 16.0 GiB"));
    assert!(memory("16000mb").contains(" of 14.9 GiB"));
}

#[test]
fn too_little_memory_is_refused_with_what_would_do() {
    let said = lite(&["--ram", "2GiB"]).error();
    assert!(
        said.contains("does not fit") && said.contains("--ram "),
        "{said}"
    );
    let said = lite(&["--gpu-memory", "64MiB", "--ram", "16GiB"]).error();
    assert!(said.contains("cuda:0 has 64.0 MiB"), "{said}");
    let said = ktx(&["run", "--prompt", "a", "--ram", "1MiB"]).error();
    assert!(said.contains("does not fit"), "{said}");
}

#[test]
fn the_built_in_model_runs_in_a_budget_and_names_a_missing_gpu() {
    let answer = ktx(&[
        "run",
        "--prompt",
        "What is 7 + 5?",
        "--ram",
        "1GiB",
        "-n",
        "4",
    ]);
    assert!(!answer.ok().is_empty());
    let said = ktx(&[
        "run",
        "--prompt",
        "a",
        "--gpu-memory",
        "2GiB",
        "--ram",
        "4GiB",
    ]);
    // A model this small may be fastest without the GPU; if it is not, the GPU is asked for.
    assert!(
        said.code == Some(0) || said.stderr.contains("no such device"),
        "{}",
        said.stderr
    );
}
