//! Attention with grouped keys and values that rotates halves of a head together, as several families have it.

use ktx_kernels::rope::RopeLayout;
use ktx_ops::Module;
use ktx_ops::spec::{AttentionSpec, RopeSpec, Spec};

use crate::ModelError;
use crate::keys::Keys;
use crate::parts::{Skeleton, linear, rope_config};

/// Sizes and classes of one attention.
#[derive(Clone)]
pub(crate) struct Attention {
    pub spec: AttentionSpec,
    pub rope: RopeSpec,
    class: &'static str,
    rope_class: &'static str,
}

impl Attention {
    pub(crate) fn read(
        keys: &Keys<'_>,
        hidden_size: usize,
        head_norms: HeadNorms,
        class: &'static str,
        rope_class: &'static str,
    ) -> Result<Self, ModelError> {
        let heads = keys.size("attention.head_count")?;
        let kv_heads = keys
            .size_if_any("attention.head_count_kv")?
            .unwrap_or(heads);
        if !heads.is_multiple_of(kv_heads) {
            return Err(keys.bad(
                "attention.head_count_kv",
                kv_heads,
                "it does not divide attention.head_count",
            ));
        }
        let head_dim = match keys.size_if_any("attention.key_length")? {
            Some(dim) => dim,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(keys.bad(
                    "attention.head_count",
                    heads,
                    "it does not divide embedding_length",
                ));
            }
        };
        let spec = AttentionSpec {
            hidden_size,
            num_attention_heads: heads,
            num_key_value_heads: kv_heads,
            head_dim,
            softmax_scale: (head_dim as f32).sqrt().recip(),
            head_norms: head_norms == HeadNorms::Yes,
            window: None,
            sinks: None,
        };
        let rope = RopeSpec {
            config: rope_config(keys, head_dim)?,
            layout: RopeLayout::Half,
            max_positions: keys.size("context_length")?,
        };
        Ok(Self {
            spec,
            rope,
            class,
            rope_class,
        })
    }

    /// Adds `self_attn` to a layer.
    pub(crate) fn add(&self, skeleton: &Skeleton<'_>, layer: &mut Module) {
        let spec = &self.spec;
        let (q, kv) = (
            spec.num_attention_heads * spec.head_dim,
            spec.num_key_value_heads * spec.head_dim,
        );
        let module = layer.add(
            "self_attn",
            &skeleton.class(self.class),
            Spec::Attention(spec.clone()),
        );
        linear(module, "q_proj", spec.hidden_size, q);
        linear(module, "k_proj", spec.hidden_size, kv);
        linear(module, "v_proj", spec.hidden_size, kv);
        linear(module, "o_proj", q, spec.hidden_size);
        if spec.head_norms {
            skeleton.norm(module, "q_norm", spec.head_dim, skeleton.eps);
            skeleton.norm(module, "k_norm", spec.head_dim, skeleton.eps);
        }
        module.add("rotary_emb", self.rope_class, Spec::Rope(self.rope.clone()));
    }
}

/// Whether each head of query and key is normalised before it is rotated.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum HeadNorms {
    Yes,
    No,
}
