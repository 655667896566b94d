//! Products with 8-bit floats in blocks of 128 x 128, the weights of DeepSeek-V3's checkpoints.

use ktx_gguf::GgmlType;

use super::{Arithmetic, HostLinear};
use crate::build::{BuildArgs, OpError, Operator, WeightStore};
use crate::kwargs::{KwargDoc, KwargSet};
use crate::register_operator;
use crate::sizes::sizes_of;
use crate::tree::Module;

const CLASS: &str = "ktransformers.operators.linear.KLinearFP8";

/// Arguments of `KLinearFP8`.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
#[serde(default)]
struct Fp8Kwargs {
    block_size: usize,
}

impl Default for Fp8Kwargs {
    fn default() -> Self {
        Self {
            block_size: ktx_gguf::fp8::BLOCK,
        }
    }
}

impl KwargSet for Fp8Kwargs {
    const DOCS: &'static [KwargDoc] = &[KwargDoc {
        name: "block_size",
        doc: "rows and columns that share a scale",
        ignored: Some("the format's blocks are 128 x 128"),
    }];
}

/// The operator is named for its weights' format: other weights under its name are a mistake.
fn needs_fp8(module: &Module, store: &dyn WeightStore) -> Result<(), String> {
    // A weight that is missing or has another shape is reported where weights are counted.
    let tensors = sizes_of(module, false, store).unwrap_or_default();
    let Some(weight) = tensors.first() else {
        return Ok(());
    };
    match weight.ty {
        GgmlType::F8_E4M3 => Ok(()),
        other => Err(format!(
            "it needs an FP8 tensor (F8_E4M3 with block scales, from a safetensors file), and `{}` is {other}; \
             name those files with `--safetensors`, or use KLinearMarlin, which multiplies any type",
            weight.name
        )),
    }
}

fn build(args: &mut BuildArgs<'_>) -> Result<Operator, OpError> {
    HostLinear::build(args, CLASS, Arithmetic::AsEngine)
}

register_operator! {
    class: CLASS,
    aliases: ["KLinearFP8", "ktx.linear.KLinearFP8"],
    role: Linear,
    summary: "product with 8-bit floats and a scale for each block of 128 x 128, with f32 activations",
    kwargs: Fp8Kwargs,
    validate: needs_fp8,
    build: build,
}
