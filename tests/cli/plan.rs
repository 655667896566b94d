//! `ktx plan`.

use serde_json::{Value, json};

use super::{file, ktx};

const PLANS: &str = "ktx-core/tests/plans";

fn golden(name: &str) -> Value {
    let text = std::fs::read_to_string(format!("{PLANS}/expected/{name}.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn plans_of_trees_are_those_of_the_original() {
    for name in [
        "DeepSeek-V2-Lite-Chat@DeepSeek-V2-Lite",
        "Mixtral@Mixtral-8x7B",
        "Qwen2-57B-A14B-Instruct-multi-gpu@Qwen2-57B-A14B",
    ] {
        let golden = golden(name);
        let rules = format!("{PLANS}/rules/{}.yaml", name.split_once('@').unwrap().0);
        let tree = format!("{PLANS}/trees/{}.json", golden["tree"].as_str().unwrap());
        let device = golden["default_device"].as_str().unwrap();
        let flags = ["--format", "json", "--keys", "hf", "--device", device];
        let stdout =
            ktx(&[&["plan", "--tree", &tree, "--rules", &rules][..], &flags].concat()).ok();
        let ours: Value = serde_json::from_str(&stdout).unwrap();
        assert_eq!(ours, golden["plan"], "{name}");
    }
}

#[test]
fn classes_that_are_not_registered_are_warnings_with_a_tree_and_errors_with_a_model() {
    let rules = file(
        "made-up.yaml",
        "- match:\n    name: o_proj$\n  replace:\n    class: made.up.Class\n",
    );
    let tree = file(
        "small-tree.json",
        r#"{"": "A", "model": "B", "model.o_proj": "torch.nn.modules.linear.Linear"}"#,
    );
    let call = ktx(&[
        "plan", "--tree", &tree, "--rules", &rules, "--format", "json",
    ]);
    assert!(
        call.stderr.contains("warning: ") && call.stderr.contains("made.up.Class"),
        "{}",
        call.stderr
    );
    let plan: Value = serde_json::from_str(&call.ok()).unwrap();
    assert_eq!(plan["model.o_proj"]["class"], "made.up.Class");
    let said = ktx(&["plan", "--rules", &rules, "--format", "json"]).error();
    assert!(said.contains("made.up.Class"), "{said}");
}

#[test]
fn the_table_shows_class_device_size_and_the_rules_line() {
    let call = ktx(&["plan"]);
    assert!(
        call.stderr.contains("rules: preset deepseek2"),
        "{}",
        call.stderr
    );
    assert!(
        call.stderr.contains("cpu: ") && call.stderr.contains("of memory"),
        "{}",
        call.stderr
    );
    let table = call.ok();
    let row = table
        .lines()
        .find(|line| line.starts_with("model.layers.0.self_attn.o_proj "))
        .unwrap();
    let cells: Vec<&str> = row
        .split("  ")
        .map(str::trim)
        .filter(|cell| !cell.is_empty())
        .collect();
    assert_eq!(
        &cells[1..5],
        [
            "KTransformersLinear(KLinearCPUInfer)",
            "cpu",
            "Q8_0",
            "68.0 KiB"
        ],
        "{row}"
    );
    assert!(cells[5].starts_with("line "), "{row}");
}

#[test]
fn keys_are_those_of_gguf_files_or_paths() {
    let key = |style: &[&str]| {
        let stdout = ktx(&[&["plan", "--format", "json"], style].concat()).ok();
        let plan: Value = serde_json::from_str(&stdout).unwrap();
        plan["model.layers.0.self_attn.q_a_proj"]["key"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(key(&[]), "blk.0.attn_q_a");
    assert_eq!(key(&["--keys", "hf"]), "model.layers.0.self_attn.q_a_proj");
}

#[test]
fn modules_that_no_rule_matches_go_to_the_default_device() {
    let rules = file("none.yaml", "[]");
    let device = |flags: &[&str]| {
        let call = ktx(&[&["plan", "--format", "json", "--rules", &rules], flags].concat());
        let stderr = call.stderr.clone();
        let plan: Value = serde_json::from_str(&call.ok()).unwrap();
        (
            plan["lm_head"]["kwargs"]["generate_device"]
                .as_str()
                .unwrap()
                .to_owned(),
            stderr,
        )
    };
    let (planned, said) = device(&[]);
    assert_eq!(planned, "cuda:0");
    assert!(
        said.contains("cannot carry out the plan") && said.contains("--cpu"),
        "{said}"
    );
    assert_eq!(device(&["--device", "cpu"]).0, "cpu");
    let (planned, said) = device(&["--cpu"]);
    assert_eq!(planned, "cpu");
    assert!(said.contains("every device is mapped to the CPU"), "{said}");
}

#[test]
fn operators_of_both_phases_are_shown() {
    let rules = file(
        "phases.yaml",
        "- match:\n    name: o_proj$\n  replace:\n    class: ktransformers.operators.linear.KTransformersLinear\n    \
         kwargs:\n      generate_device: cpu\n      generate_op: KLinearMarlin\n      prefill_device: cuda:1\n      \
         prefill_op: KLinearTorch\n",
    );
    let table = ktx(&["plan", "--rules", &rules]).ok();
    let row = table
        .lines()
        .find(|line| line.starts_with("model.layers.0.self_attn.o_proj "))
        .unwrap();
    assert!(
        row.contains("KTransformersLinear(prefill KLinearTorch, generate KLinearMarlin)"),
        "{row}"
    );
    assert!(row.contains("prefill cuda:1, generate cpu"), "{row}");
}

/// What the line for people says is there for programs too, at the experts that it is about and nowhere else.
#[test]
fn from_where_on_prompts_are_streamed_is_in_the_plan() {
    let rules = file(
        "streamed.yaml",
        "- match:\n    name: 'layers\\.[12]\\.mlp\\.experts$'\n  replace:\n    \
         class: ktransformers.operators.experts.KTransformersExperts\n    kwargs:\n      generate_device: cpu\n      \
         prefill_device: cuda:0\n",
    );
    let planned = |flags: &[&str]| {
        let call = ktx(&[&["plan", "--format", "json", "--rules", &rules], flags].concat());
        let said = call.stderr.clone();
        let plan: Value = serde_json::from_str(&call.ok()).unwrap();
        (plan, said)
    };
    let (plan, said) = planned(&["--stream-from", "37", "--stream-share", "0.75"]);
    assert!(said.contains("chunks of 37 tokens and more"), "{said}");
    let streamed = plan.as_object().unwrap().iter();
    let streamed: Vec<(&str, &Value)> = streamed
        .filter_map(|(path, entry)| Some((path.as_str(), entry.get("streaming")?)))
        .collect();
    let expected = json!({
        "from_tokens": 37,
        "gpu_share": { "64": 0.75, "512": 0.75, "2048": 0.75 },
    });
    assert_eq!(
        streamed,
        [
            ("model.layers.1.mlp.experts", &expected),
            ("model.layers.2.mlp.experts", &expected)
        ]
    );
    // What was measured decides where nobody does.
    let (plan, said) = planned(&[]);
    let from = &plan["model.layers.1.mlp.experts"]["streaming"]["from_tokens"];
    assert!(from.as_u64().unwrap() > 0, "{plan:#}");
    assert!(
        said.contains(&format!("chunks of {from} tokens and more")),
        "{said}"
    );
    let (plan, _) = planned(&["--cpu"]);
    assert!(!plan.to_string().contains("streaming"));
}

#[test]
fn rules_without_effect_are_warnings_with_their_line() {
    let rules = file(
        "unused.yaml",
        "- match:\n    name: ''\n  replace:\n    class: default\n    kwargs:\n      generate_device: cpu\n      \
         prefill_device: cpu\n- match:\n    name: o_proj$\n  replace:\n    class: KLinearTorch\n- match:\n    \
         name: nowhere\n  replace:\n    class: KLinearTorch\n",
    );
    let said = ktx(&["plan", "--rules", &rules]).stderr;
    assert!(said.contains("unused.yaml:8:"), "{said}");
    assert!(
        said.contains("unused.yaml:12:") && said.contains("matches no module"),
        "{said}"
    );
}

#[test]
fn two_rule_files_are_compared_module_by_module_and_by_bytes() {
    let head = |device: &str| {
        format!(
            "- match: {{name: '^lm_head$'}}\n  replace: {{class: default, kwargs: {{generate_device: {device}, prefill_device: cpu}}}}\n"
        )
    };
    let (a, b) = (
        file("head-on-cpu.yaml", head("cpu")),
        file("head-on-cuda.yaml", head("cuda:1")),
    );
    let said = ktx(&["plan", "--device", "cpu", "--diff", &a, &b]).ok();
    let change = said
        .lines()
        .find(|l| l.starts_with("lm_head"))
        .expect("the head moves");
    assert!(
        change.contains("generate_device: cpu") && change.contains("generate_device: cuda:1"),
        "{said}"
    );
    assert!(
        said.contains("1 of ") && said.contains("cuda:1: 0 B of weights before"),
        "{said}"
    );
    let same = ktx(&["plan", "--device", "cpu", "--diff", &a, &a]).ok();
    assert!(same.starts_with("0 of "), "{same}");
}

#[test]
fn a_plan_shows_the_types_and_files_of_weights_beside_a_gguf_file() {
    let rules = format!("{PLANS}/rules/DeepSeek-V3-Chat-fp8-linear-ggml-experts.yaml");
    let directory = "tests/fixtures/fp8";
    let (model, beside) = (
        format!("{directory}/model.gguf"),
        format!("{directory}/model.safetensors"),
    );
    for source in [
        &["--model", directory][..],
        &["--model", &model, "--safetensors", &beside],
    ] {
        let call = ktx(&[&["plan", "--rules", &rules, "--cpu"][..], source].concat());
        let said = call.stderr.clone();
        assert!(
            said.contains(&format!("from {model}")) && said.contains("tensors, "),
            "{said}"
        );
        let table = call.ok();
        let row = |path: &str| table.lines().find(|line| line.starts_with(path)).unwrap();
        assert!(
            row("model.layers.0.self_attn.q_a_proj ").contains("F8_E4M3"),
            "{table}"
        );
        assert!(
            row("model.layers.1.mlp.experts ").contains("Q8_0"),
            "{table}"
        );
    }
    let said = ktx(&[
        "plan",
        "--rules",
        &rules,
        "--cpu",
        "--model",
        "tests/fixtures/transformers/deepseek_v3.gguf",
    ])
    .error();
    assert!(
        said.contains("needs an FP8 tensor") && said.contains(".yaml:16:"),
        "{said}"
    );
}
