//! The router of families whose router is a plain matrix, as an operator of its own.

use super::{Arithmetic, HostLinear};
use crate::build::{BuildArgs, OpError, Operator};
use crate::kwargs::{KwargDoc, KwargSet};
use crate::register_operator;

const CLASS: &str = "ktransformers.operators.gate.KMoEGateQwen2Moe";

/// Arguments of `KMoEGateQwen2Moe`: the router is small, and its products are always exact.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
#[serde(default)]
struct RouterKwargs {
    generate_op: Option<String>,
    prefill_op: Option<String>,
    use_quant: bool,
}

impl Default for RouterKwargs {
    fn default() -> Self {
        let op = || Some("KLinearMarlin".to_owned());
        Self {
            generate_op: op(),
            prefill_op: op(),
            use_quant: false,
        }
    }
}

const EXACT: Option<&str> = Some("the router's products are always exact");

impl KwargSet for RouterKwargs {
    const DOCS: &'static [KwargDoc] = &[
        KwargDoc {
            name: "generate_op",
            doc: "linear operator of the generate phase",
            ignored: EXACT,
        },
        KwargDoc {
            name: "prefill_op",
            doc: "linear operator of the prefill phase",
            ignored: EXACT,
        },
        KwargDoc {
            name: "use_quant",
            doc: "whether the router is quantised",
            ignored: EXACT,
        },
    ];
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    HostLinear::build(args, CLASS, Arithmetic::F32)
}

register_operator! {
    class: CLASS,
    aliases: ["KMoEGateQwen2Moe", "ktx.gate.KMoEGateQwen2Moe"],
    role: Linear,
    summary: "logits of a router that is a plain matrix, with f32 activations; its block chooses",
    kwargs: RouterKwargs,
    build: build,
}
