//! From a specification to the bytes of a file.

use ktx_gguf::{GgmlType, GgufWriter};

use super::random::Random;
use super::spec::{
    Architecture, ExpertLayout, ExpertSpec, KvLayout, LatentSpec, RopeScaling, TinySpec,
};
use super::tokenizer;

/// Standard deviations, in units of one over the root of the row length (embedding: absolute).
mod gain {
    pub const EMBEDDING: f32 = 1.0;
    pub const HEAD: f32 = 3.0;
    pub const SIGMOID_ROUTER: f32 = 3.0;
    pub const SOFTMAX_ROUTER: f32 = 2.0;
    /// Keeps attention from being nearly uniform.
    pub const QUERY: f32 = 2.0;
    pub const OTHER: f32 = 1.0;
}

/// A complete GGUF file.
pub fn build(spec: &TinySpec) -> Vec<u8> {
    let mut builder = Builder {
        spec,
        file: GgufWriter::new(),
        random: Random::new(spec.seed),
    };
    builder.metadata();
    tokenizer::write(&mut builder.file, spec.architecture);
    builder.ends();
    for layer in 0..spec.layers {
        builder.layer(layer);
    }
    builder.file.to_bytes()
}

struct Builder<'a> {
    spec: &'a TinySpec,
    file: GgufWriter,
    random: Random,
}

impl Builder<'_> {
    fn count(&mut self, key: &str, value: usize) {
        let value = u32::try_from(value).expect("a small number");
        let key = format!("{}.{key}", self.spec.architecture.name());
        self.file.kv(&key, value);
    }

    fn number(&mut self, key: &str, value: f32) {
        let key = format!("{}.{key}", self.spec.architecture.name());
        self.file.kv(&key, value);
    }

    fn metadata(&mut self) {
        let spec = self.spec;
        self.file
            .kv("general.architecture", spec.architecture.name())
            .kv("general.name", "tiny random model")
            .kv("general.file_type", 0_u32);
        self.count("block_count", spec.layers);
        self.count("context_length", spec.context as usize);
        self.count("embedding_length", spec.hidden);
        self.count("feed_forward_length", spec.ffn);
        self.count("attention.head_count", spec.heads);
        self.number("attention.layer_norm_rms_epsilon", spec.epsilon);
        self.number("rope.freq_base", spec.rope_base);
        match &spec.latent {
            Some(latent) => self.latent_metadata(latent),
            None => {
                self.count("attention.head_count_kv", spec.kv_heads);
                self.count("attention.key_length", spec.head_dim);
                self.count("attention.value_length", spec.head_dim);
                self.count("rope.dimension_count", spec.head_dim);
            }
        }
        self.rope_metadata();
        if let Some(experts) = &spec.experts {
            self.expert_metadata(experts);
        }
    }

    fn latent_metadata(&mut self, latent: &LatentSpec) {
        self.count("rope.dimension_count", latent.rope);
        self.count("attention.kv_lora_rank", latent.kv_lora);
        if let Some(rank) = latent.q_lora {
            self.count("attention.q_lora_rank", rank);
        }
        match latent.layout {
            KvLayout::Joined => {
                self.count("attention.head_count_kv", self.spec.heads);
                self.count("attention.key_length", latent.nope + latent.rope);
                self.count("attention.value_length", latent.value);
            }
            KvLayout::Split => {
                self.count("attention.head_count_kv", 1);
                self.count("attention.key_length", latent.kv_lora + latent.rope);
                self.count("attention.value_length", latent.kv_lora);
                self.count("attention.key_length_mla", latent.nope + latent.rope);
                self.count("attention.value_length_mla", latent.value);
            }
        }
    }

    fn rope_metadata(&mut self) {
        let prefix = format!("{}.rope.scaling", self.spec.architecture.name());
        match self.spec.rope_scaling {
            RopeScaling::None | RopeScaling::Divisors => {}
            RopeScaling::Linear { factor } => {
                self.file.kv(&format!("{prefix}.type"), "linear");
                self.number("rope.scaling.factor", factor);
            }
            RopeScaling::Yarn {
                factor,
                original_context,
                log_multiplier,
            } => {
                self.file.kv(&format!("{prefix}.type"), "yarn");
                self.number("rope.scaling.factor", factor);
                let original = original_context as usize;
                self.count("rope.scaling.original_context_length", original);
                if let Some(multiplier) = log_multiplier {
                    self.number("rope.scaling.yarn_log_multiplier", multiplier);
                }
            }
        }
    }

    fn expert_metadata(&mut self, experts: &ExpertSpec) {
        self.count("expert_count", experts.count);
        self.count("expert_used_count", experts.top_k);
        match self.spec.architecture {
            // Mixtral's experts are as wide as feed_forward_length says.
            Architecture::Llama => assert_eq!(experts.ffn, self.spec.ffn),
            _ => self.count("expert_feed_forward_length", experts.ffn),
        }
        match self.spec.architecture {
            Architecture::DeepSeek2 => {
                self.count("leading_dense_block_count", experts.leading_dense);
                self.count("expert_shared_count", experts.shared_ffn / experts.ffn);
            }
            Architecture::Qwen2Moe => {
                self.count("expert_shared_feed_forward_length", experts.shared_ffn);
            }
            _ => {}
        }
        if let Some(gating) = experts.gating {
            self.count("expert_gating_func", gating as usize);
        }
        if let Some(norm) = experts.norm {
            let key = format!("{}.expert_weights_norm", self.spec.architecture.name());
            self.file.kv(&key, norm);
        }
        if let Some(scale) = experts.scale {
            self.number("expert_weights_scale", scale);
        }
        if let Some((groups, used)) = experts.groups {
            self.count("expert_group_count", groups);
            self.count("expert_group_used_count", used);
        }
    }

    /// A quantised tensor with root mean square `gain / sqrt(row length)`.
    fn tensor(&mut self, name: &str, ty: GgmlType, shape: &[usize], gain: f32) {
        let fits = |ty: &GgmlType| shape[0].is_multiple_of(ty.block_len());
        let candidates = [ty, GgmlType::Q8_0, GgmlType::F16];
        let ty = *candidates.iter().find(|ty| fits(ty)).expect("F16 fits");
        let deviation = gain / (shape[0] as f32).sqrt();
        let bytes = self.random.weights(ty, shape.iter().product(), deviation);
        let name = format!("{name}.weight");
        self.file
            .tensor(&name, ty, shape, bytes)
            .expect("a valid tensor");
    }

    fn vector(&mut self, name: &str, length: usize, mean: f32, deviation: f32) {
        let values = self.random.normals(length, mean, deviation);
        self.f32_tensor(name, &[length], &values);
    }

    fn f32_tensor(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let added = self.file.tensor(name, GgmlType::F32, shape, bytes);
        added.expect("a valid tensor");
    }

    fn norm(&mut self, name: &str, length: usize) {
        self.vector(&format!("{name}.weight"), length, 1.0, 0.2);
    }

    /// What is not in a layer.
    fn ends(&mut self) {
        let (spec, hidden) = (self.spec, self.spec.hidden);
        let shape = [hidden, tokenizer::VOCABULARY + spec.extra_vocabulary];
        let root = (hidden as f32).sqrt();
        let embedding = if spec.tied {
            gain::HEAD
        } else {
            gain::EMBEDDING * root
        };
        self.tensor("token_embd", spec.types.embedding, &shape, embedding);
        self.norm("output_norm", hidden);
        if !spec.tied {
            self.tensor("output", spec.types.output, &shape, gain::HEAD);
        }
        if spec.rope_scaling == RopeScaling::Divisors {
            let count = spec.head_dim / 2;
            let divisors: Vec<f32> = (0..count)
                .map(|i| 1.0 + 7.0 * i as f32 / count as f32)
                .collect();
            self.f32_tensor("rope_freqs.weight", &[count], &divisors);
        }
    }

    fn layer(&mut self, index: usize) {
        let block = format!("blk.{index}");
        let hidden = self.spec.hidden;
        self.norm(&format!("{block}.attn_norm"), hidden);
        match self.spec.latent {
            Some(latent) => self.latent_attention(&block, &latent),
            None => self.grouped_attention(&block),
        }
        self.norm(&format!("{block}.ffn_norm"), hidden);
        match self.spec.experts {
            Some(experts) if index >= experts.leading_dense => self.mixture(&block, &experts),
            _ => self.mlp(&block, "", self.spec.ffn),
        }
    }

    fn grouped_attention(&mut self, block: &str) {
        let spec = self.spec;
        let (queries, keys) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let parts = [
            ("q", queries, gain::QUERY),
            ("k", keys, gain::OTHER),
            ("v", keys, gain::OTHER),
        ];
        for (part, rows, gain) in parts {
            let name = format!("{block}.attn_{part}");
            self.tensor(&name, spec.types.attention, &[spec.hidden, rows], gain);
            if spec.attention_bias {
                self.vector(&format!("{name}.bias"), rows, 0.0, 0.3);
            }
        }
        if matches!(
            spec.architecture,
            Architecture::Qwen3 | Architecture::Qwen3Moe
        ) {
            self.norm(&format!("{block}.attn_q_norm"), spec.head_dim);
            self.norm(&format!("{block}.attn_k_norm"), spec.head_dim);
        }
        let name = format!("{block}.attn_output");
        self.tensor(
            &name,
            spec.types.attention,
            &[queries, spec.hidden],
            gain::OTHER,
        );
    }

    fn latent_attention(&mut self, block: &str, latent: &LatentSpec) {
        let (hidden, heads, ty) = (self.spec.hidden, self.spec.heads, self.spec.types.attention);
        let queries = heads * (latent.nope + latent.rope);
        let mut tensor = |name: &str, shape: &[usize], gain: f32| {
            self.tensor(&format!("{block}.{name}"), ty, shape, gain);
        };
        match latent.q_lora {
            None => tensor("attn_q", &[hidden, queries], gain::QUERY),
            Some(rank) => {
                tensor("attn_q_a", &[hidden, rank], gain::OTHER);
                tensor("attn_q_b", &[rank, queries], gain::QUERY);
            }
        }
        tensor(
            "attn_kv_a_mqa",
            &[hidden, latent.kv_lora + latent.rope],
            gain::OTHER,
        );
        match latent.layout {
            KvLayout::Joined => {
                let rows = heads * (latent.nope + latent.value);
                tensor("attn_kv_b", &[latent.kv_lora, rows], gain::OTHER);
            }
            KvLayout::Split => {
                // Transposed: what is summed over is the second dimension.
                let gain = (latent.nope as f32 / latent.kv_lora as f32).sqrt();
                tensor("attn_k_b", &[latent.nope, latent.kv_lora, heads], gain);
                let shape = [latent.kv_lora, latent.value, heads];
                tensor("attn_v_b", &shape, gain::OTHER);
            }
        }
        tensor("attn_output", &[heads * latent.value, hidden], gain::OTHER);
        if let Some(rank) = latent.q_lora {
            self.norm(&format!("{block}.attn_q_a_norm"), rank);
        }
        self.norm(&format!("{block}.attn_kv_a_norm"), latent.kv_lora);
    }

    /// A gated MLP; `suffix` tells dense layers, shared experts and experts with tensors of their own apart.
    fn mlp(&mut self, block: &str, suffix: &str, width: usize) {
        let (hidden, types) = (self.spec.hidden, self.spec.types);
        let name = |part: &str| format!("{block}.ffn_{part}{suffix}");
        self.tensor(&name("gate"), types.gate_up, &[hidden, width], gain::OTHER);
        self.tensor(&name("up"), types.gate_up, &[hidden, width], gain::OTHER);
        self.tensor(&name("down"), types.down, &[width, hidden], gain::OTHER);
    }

    fn mixture(&mut self, block: &str, experts: &ExpertSpec) {
        let (hidden, types, count) = (self.spec.hidden, self.spec.types, experts.count);
        let router = format!("{block}.ffn_gate_inp");
        let gain = match experts.gating {
            Some(2) => gain::SIGMOID_ROUTER,
            _ => gain::SOFTMAX_ROUTER,
        };
        self.tensor(&router, GgmlType::F32, &[hidden, count], gain);
        if experts.bias {
            self.vector(&format!("{block}.exp_probs_b.bias"), count, 0.0, 0.2);
        }
        match experts.layout {
            ExpertLayout::Merged => {
                let name = |part: &str| format!("{block}.ffn_{part}_exps");
                let wide = [hidden, experts.ffn, count];
                self.tensor(&name("gate"), types.gate_up, &wide, gain::OTHER);
                self.tensor(&name("up"), types.gate_up, &wide, gain::OTHER);
                let back = [experts.ffn, hidden, count];
                self.tensor(&name("down"), types.down, &back, gain::OTHER);
            }
            ExpertLayout::PerExpert => {
                for expert in 0..count {
                    self.mlp(block, &format!(".{expert}"), experts.ffn);
                }
            }
        }
        if experts.shared_ffn > 0 {
            self.mlp(block, "_shexp", experts.shared_ffn);
        }
        if self.spec.architecture == Architecture::Qwen2Moe {
            let deviation = 1.0 / (hidden as f32).sqrt();
            let name = format!("{block}.ffn_gate_inp_shexp.weight");
            self.vector(&name, hidden, 0.0, deviation);
        }
    }
}
