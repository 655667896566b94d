//! Names of weights: Hugging Face's dotted paths in GGUF's terms.

/// Replacements in order, made on the path with a dot behind it (KTransformers' table).
const TABLE: &[(&str, &str)] = &[
    ("lm_head.", "output."),
    ("model.embed_tokens.", "token_embd."),
    ("model.norm.", "output_norm."),
    ("model.layers.", "blk."),
    (".input_layernorm", ".attn_norm"),
    (".mlp.down_proj", ".ffn_down"),
    (".mlp.gate_proj", ".ffn_gate"),
    (".mlp.up_proj", ".ffn_up"),
    (".post_attention_layernorm", ".ffn_norm"),
    (".self_attn.q_proj", ".attn_q"),
    (".self_attn.k_proj", ".attn_k"),
    (".self_attn.v_proj", ".attn_v"),
    (".self_attn.o_proj", ".attn_output"),
    (".self_attn.qkv_proj", ".attn_qkv"),
    (".self_attn.kv_a_proj_with_mqa", ".attn_kv_a_mqa"),
    (".self_attn.kv_a_layernorm", ".attn_kv_a_norm"),
    (".self_attn.kv_b_proj", ".attn_kv_b"),
    (".self_attn.q_a_proj", ".attn_q_a"),
    (".self_attn.q_a_layernorm", ".attn_q_a_norm"),
    (".self_attn.q_b_proj", ".attn_q_b"),
    (".self_attn.q_norm", ".attn_q_norm"),
    (".self_attn.k_norm", ".attn_k_norm"),
    (".shared_expert.", ".shared_experts."),
    (".shared_expert_", ".shared_experts_"),
    (".gate_up_proj.", ".up_proj"),
    (".mlp.shared_experts.down_proj", ".ffn_down_shexp"),
    (".mlp.gate.e_score_correction_bias", ".exp_probs_b.bias"),
    (".mlp.gate", ".ffn_gate_inp"),
    (".mlp.router", ".ffn_gate_inp"),
    (".mlp.shared_experts.gate_proj", ".ffn_gate_shexp"),
    (".mlp.shared_experts.up_proj", ".ffn_up_shexp"),
    (".mlp.shared_experts_gate", ".ffn_gate_inp_shexp"),
    (".mlp.experts", ""),
    (".block_sparse_moe.gate.", ".ffn_gate_inp."),
    (".block_sparse_moe.experts", ""),
];

/// The GGUF name of a module's weights, without `.weight`: `model.layers.0.self_attn.q_proj` is
/// `blk.0.attn_q`. Parts that GGUF has no name for stay as they are.
pub fn gguf_key(path: &str) -> String {
    let mut key = format!("{path}.");
    for (from, to) in TABLE {
        if key.contains(from) {
            key = key.replace(from, to);
        }
    }
    key.pop();
    key
}

/// The GGUF name of a tensor: `model.layers.0.self_attn.q_proj.weight` is `blk.0.attn_q.weight`, and
/// that of an expert `model.layers.3.mlp.experts.5.up_proj.weight` is `blk.3.ffn_up.5.weight`. Names
/// that are GGUF's already stay.
pub fn gguf_tensor(name: &str) -> String {
    if let Some(expert) = expert_tensor(name) {
        return expert;
    }
    match name.rsplit_once('.') {
        None | Some((_, "e_score_correction_bias")) => gguf_key(name),
        Some((path, kind)) => format!("{}.{kind}", gguf_key(path)),
    }
}

/// The name of a tensor of one expert.
fn expert_tensor(name: &str) -> Option<String> {
    let parts: Vec<&str> = name.split('.').collect();
    let &[
        "model",
        "layers",
        layer,
        "mlp" | "block_sparse_moe",
        "experts",
        expert,
        projection,
        kind,
    ] = parts.as_slice()
    else {
        return None;
    };
    let projection = match projection {
        "gate_proj" | "w1" => "gate",
        "up_proj" | "w3" => "up",
        "down_proj" | "w2" => "down",
        _ => return None,
    };
    Some(format!("blk.{layer}.ffn_{projection}.{expert}.{kind}"))
}

#[cfg(test)]
mod tests {
    use super::{gguf_key, gguf_tensor};

    #[test]
    fn tensors_translate_with_what_they_are_of_their_module() {
        for (name, gguf) in [
            ("lm_head.weight", "output.weight"),
            (
                "model.layers.7.self_attn.q_a_proj.weight_scale_inv",
                "blk.7.attn_q_a.weight_scale_inv",
            ),
            ("model.layers.0.self_attn.q_proj.bias", "blk.0.attn_q.bias"),
            (
                "model.layers.3.mlp.gate.weight",
                "blk.3.ffn_gate_inp.weight",
            ),
            (
                "model.layers.3.mlp.gate.e_score_correction_bias",
                "blk.3.exp_probs_b.bias",
            ),
            (
                "model.layers.3.mlp.experts.12.up_proj.weight",
                "blk.3.ffn_up.12.weight",
            ),
            (
                "model.layers.3.block_sparse_moe.experts.1.w2.weight",
                "blk.3.ffn_down.1.weight",
            ),
            (
                "model.layers.3.mlp.shared_expert_gate.weight",
                "blk.3.ffn_gate_inp_shexp.weight",
            ),
            ("blk.3.ffn_gate_exps.weight", "blk.3.ffn_gate_exps.weight"),
            ("blk.3.exp_probs_b.bias", "blk.3.exp_probs_b.bias"),
            ("something", "something"),
        ] {
            assert_eq!(gguf_tensor(name), gguf, "{name}");
        }
    }

    #[test]
    fn paths_translate_as_the_format_names_them() {
        for (path, key) in [
            ("", ""),
            ("model", "model"),
            ("model.embed_tokens", "token_embd"),
            ("lm_head", "output"),
            ("model.norm", "output_norm"),
            (
                "model.layers.3.self_attn.kv_a_proj_with_mqa",
                "blk.3.attn_kv_a_mqa",
            ),
            ("model.layers.3.mlp.experts", "blk.3"),
            ("model.layers.3.mlp.gate", "blk.3.ffn_gate_inp"),
            ("model.layers.3.mlp.router", "blk.3.ffn_gate_inp"),
            ("model.layers.3.mlp.gate_proj", "blk.3.ffn_gate"),
            (
                "model.layers.3.mlp.shared_expert_gate",
                "blk.3.ffn_gate_inp_shexp",
            ),
            (
                "model.layers.3.mlp.shared_experts.down_proj",
                "blk.3.ffn_down_shexp",
            ),
            (
                "model.layers.3.mlp.experts.0.gate_proj",
                "blk.3.0.gate_proj",
            ),
            ("model.layers.0.block_sparse_moe.gate", "blk.0.ffn_gate_inp"),
            ("model.layers.0.block_sparse_moe.experts.0.w1", "blk.0.0.w1"),
        ] {
            assert_eq!(gguf_key(path), key, "{path}");
        }
    }
}
