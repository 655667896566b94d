//! The module trees have the names and classes of the original's models, in its order: rules written
//! for them match here what they match there.

use ktx_core::gguf::Gguf;
use ktx_core::models::describe;

use crate::run::{json, repository};

/// Numbers in a path are places: `model.layers.3.mlp` is `model.layers.#.mlp`.
fn pattern(path: &str) -> String {
    let part = |p: &str| {
        if p.parse::<usize>().is_ok() {
            "#".to_owned()
        } else {
            p.to_owned()
        }
    };
    path.split('.').map(part).collect::<Vec<_>>().join(".")
}

/// Each pattern of path and class once, in order of the first. The root does not count: some golden
/// trees have the class of a server's root, and no rule replaces a root.
fn distinct<'a>(modules: impl Iterator<Item = (&'a str, &'a str)>) -> Vec<(String, String)> {
    let mut all = Vec::new();
    for (path, class) in modules.filter(|(path, _)| !path.is_empty()) {
        let entry = (pattern(path), class.to_owned());
        if !all.contains(&entry) {
            all.push(entry);
        }
    }
    all
}

fn check(model: &str, tree: &str) {
    let golden = json(&format!("ktx-core/tests/plans/trees/{tree}.json"));
    let expected = golden
        .as_object()
        .unwrap()
        .iter()
        .map(|(path, class)| (path.as_str(), class.as_str().unwrap()));
    let gguf = Gguf::open(repository(model)).unwrap();
    let description = describe(&gguf).unwrap();
    let found = description
        .tree
        .walk()
        .map(|m| (m.path.as_str(), m.class.as_str()));
    assert_eq!(distinct(found), distinct(expected), "{model} and {tree}");
}

#[test]
fn trees_have_the_names_and_classes_of_the_originals() {
    for (model, tree) in [
        ("llama", "InternLM2.5-7B-1M"),
        ("mixtral", "Mixtral-8x7B"),
        ("qwen2moe", "Qwen2-57B-A14B"),
        ("qwen3moe", "Qwen3-30B-A3B"),
        ("deepseek_v2", "DeepSeek-V2"),
        ("deepseek_v2_lite", "DeepSeek-V2-Lite"),
        ("deepseek_v3", "DeepSeek-V3"),
        ("moonlight", "Moonlight-16B-A3B"),
    ] {
        check(&format!("tests/fixtures/transformers/{model}.gguf"), tree);
    }
}

/// What `named_modules()` of transformers' GptOssForCausalLM gives, and the rotation that every attention has here.
#[test]
fn gpt_oss_has_the_names_and_classes_of_transformers() {
    let own = |class: &str| format!("transformers.models.gpt_oss.modeling_gpt_oss.GptOss{class}");
    let layer = "model.layers.#";
    let linear = |name: &str| {
        (
            format!("{layer}.self_attn.{name}"),
            "torch.nn.Linear".into(),
        )
    };
    let expected = vec![
        ("model".into(), own("Model")),
        ("model.embed_tokens".into(), "torch.nn.Embedding".into()),
        ("model.layers".into(), "torch.nn.ModuleList".into()),
        (layer.into(), own("DecoderLayer")),
        (format!("{layer}.self_attn"), own("Attention")),
        linear("q_proj"),
        linear("k_proj"),
        linear("v_proj"),
        linear("o_proj"),
        (
            format!("{layer}.self_attn.rotary_emb"),
            own("RotaryEmbedding"),
        ),
        (format!("{layer}.mlp"), own("MLP")),
        (format!("{layer}.mlp.router"), own("TopKRouter")),
        (format!("{layer}.mlp.experts"), own("Experts")),
        (format!("{layer}.input_layernorm"), own("RMSNorm")),
        (format!("{layer}.post_attention_layernorm"), own("RMSNorm")),
        ("model.norm".into(), own("RMSNorm")),
        ("model.rotary_emb".into(), own("RotaryEmbedding")),
        ("lm_head".into(), "torch.nn.Linear".into()),
    ];
    let gguf = Gguf::open(repository("tests/fixtures/transformers/gpt_oss.gguf")).unwrap();
    let tree = describe(&gguf).unwrap().tree;
    let found = tree.walk().map(|m| (m.path.as_str(), m.class.as_str()));
    assert_eq!(distinct(found), expected);
}
