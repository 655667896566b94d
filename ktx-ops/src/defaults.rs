//! The operator that a module has when no rule names one.

use crate::spec::Spec;
use crate::tree::Module;

/// Class path of the default operator of a module; nothing for a container, which computes nothing.
pub fn default_class(module: &Module) -> Option<&'static str> {
    Some(match &module.spec {
        Spec::Container | Spec::Opaque => return None,
        Spec::Linear(_) => "torch.nn.Linear",
        Spec::Norm(_) => "ktransformers.operators.layernorm.RMSNorm",
        Spec::Rope(_) => "ktransformers.operators.RoPE.RotaryEmbedding",
        Spec::Embedding(_) => "torch.nn.Embedding",
        Spec::Attention(_) => "ktx.attention.GroupedQueryAttention",
        Spec::Mla(_) => "ktransformers.operators.attention.KDeepseekV2Attention",
        Spec::Gate(_) => "ktransformers.operators.gate.KMoEGate",
        Spec::Experts(_) if module.children.is_empty() => {
            "ktransformers.operators.experts.KExpertsCPU"
        }
        Spec::Experts(_) => "torch.nn.ModuleList",
        Spec::Mlp(_) => "ktx.ffn.Mlp",
        Spec::Moe(_) => "ktransformers.operators.experts.KDeepseekV3MoE",
        Spec::Layer(_) => "ktx.layer.DecoderLayer",
        Spec::Model(_) => "ktransformers.operators.models.KDeepseekV2Model",
    })
}
