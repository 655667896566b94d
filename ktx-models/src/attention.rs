//! Attention with grouped keys and values that rotates halves of a head together, as several families have it.

use ktx_kernels::rope::RopeLayout;
use ktx_ops::Module;
use ktx_ops::spec::{AttentionSpec, RopeSpec, Spec};

use crate::ModelError;
use crate::keys::Keys;
use crate::parts::{Skeleton, linear, rope_config};

/// Numbers of heads, and their width.
pub(crate) struct Heads {
    pub count: usize,
    pub kv_count: usize,
    pub dim: usize,
}

impl Heads {
    pub(crate) fn read(keys: &Keys<'_>, hidden_size: usize) -> Result<Self, ModelError> {
        let count = keys.size("attention.head_count")?;
        let kv_count = keys
            .size_if_any("attention.head_count_kv")?
            .unwrap_or(count);
        if !count.is_multiple_of(kv_count) {
            return Err(keys.bad(
                "attention.head_count_kv",
                kv_count,
                "it does not divide attention.head_count",
            ));
        }
        let dim = match keys.size_if_any("attention.key_length")? {
            Some(dim) => dim,
            None if hidden_size.is_multiple_of(count) => hidden_size / count,
            None => {
                return Err(keys.bad(
                    "attention.head_count",
                    count,
                    "it does not divide embedding_length",
                ));
            }
        };
        Ok(Self {
            count,
            kv_count,
            dim,
        })
    }
}

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
        let Heads {
            count: heads,
            kv_count: kv_heads,
            dim: head_dim,
        } = Heads::read(keys, hidden_size)?;
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
