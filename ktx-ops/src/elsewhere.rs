//! Operators that rule files name and that need what this build does not have: they are known, so
//! that a plan can say what is missing instead of taking the name for a slip.

use crate::build::{BuildArgs, OpError, Operator};
use crate::kwargs::{KwargDoc, KwargSet};
use crate::register_operator;

/// Arguments of operators that cannot be built: accepted as they are written in other engines' files.
#[derive(Debug, Clone, Default, serde::Serialize, serde::Deserialize)]
#[serde(default)]
struct ElsewhereKwargs {
    chunck_size: Option<usize>,
    precision: Option<String>,
    device: Option<String>,
}

const NOT_BUILT: Option<&str> = Some("the operator cannot be built here");

impl KwargSet for ElsewhereKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "chunck_size",
            doc: "query rows of a pass",
            ignored: NOT_BUILT,
        },
        KwargDoc {
            name: "precision",
            doc: "format of the weights",
            ignored: NOT_BUILT,
        },
        KwargDoc {
            name: "device",
            doc: "device of the operator",
            ignored: NOT_BUILT,
        },
    ];
}

const XPU: &str = "an Intel GPU, for which there are no operators; `--cpu` does not replace it: \
                   name the operator without IPEXLLM";

fn refuse(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    Err(args.error("this operator cannot be built here"))
}

register_operator! {
    class: "ktransformers.operators.linear.KLinearIPEXLLM",
    aliases: ["KLinearIPEXLLM"],
    role: Linear,
    summary: "product on an Intel GPU",
    needs: XPU,
    kwargs: ElsewhereKwargs,
    build: refuse,
}

register_operator! {
    class: "ktransformers.operators.gate.KMoEGateIPEXLLM",
    aliases: ["KMoEGateIPEXLLM"],
    role: Gate,
    summary: "router on an Intel GPU",
    needs: XPU,
    kwargs: ElsewhereKwargs,
    build: refuse,
}

register_operator! {
    class: "ktransformers.operators.attention.KQwen3MoeAttentionIPEXLLM",
    aliases: ["KQwen3MoeAttentionIPEXLLM"],
    role: Attention,
    summary: "attention on an Intel GPU",
    needs: XPU,
    kwargs: ElsewhereKwargs,
    build: refuse,
}

register_operator! {
    class: "ktransformers.operators.layernorm.KDeepseekRMSNormIPEXLLM",
    aliases: ["KDeepseekRMSNormIPEXLLM"],
    role: Norm,
    summary: "root mean square normalisation on an Intel GPU",
    needs: XPU,
    kwargs: ElsewhereKwargs,
    build: refuse,
}
