//! Quantisation mixes: which type each tensor gets when llama.cpp's `llama-quantize` writes a file of
//! a given kind (without an importance matrix).

use std::fmt;
use std::str::FromStr;

use ktx_gguf::GgmlType;
use ktx_gguf::GgmlType::{BF16, F16, F32, IQ4_NL, IQ4_XS, MXFP4};
use ktx_gguf::GgmlType::{Q2_K, Q3_K, Q4_0, Q4_K, Q5_0, Q5_1, Q5_K, Q6_K, Q8_0};

macro_rules! mixes {
    ($($(#[$doc:meta])* $variant:ident = $name:literal, $base:ident;)*) => {
        /// A kind of GGUF file by the types of its tensors.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[allow(non_camel_case_types, reason = "the names of the format")]
        pub enum QuantMix {
            $($(#[$doc])* $variant,)*
        }

        impl QuantMix {
            /// Every mix, largest files first.
            pub const ALL: &[QuantMix] = &[$(QuantMix::$variant,)*];

            /// Its name as files are called: `Q4_K_M`.
            pub const fn name(self) -> &'static str {
                match self {
                    $(QuantMix::$variant => $name,)*
                }
            }

            /// The type of most tensors.
            pub const fn base(self) -> GgmlType {
                match self {
                    $(QuantMix::$variant => $base,)*
                }
            }
        }
    };
}

mixes! {
    /// Single precision.
    F32 = "F32", F32;
    /// Half precision.
    F16 = "F16", F16;
    /// The upper half of single precision.
    BF16 = "BF16", BF16;
    /// 8 bits.
    Q8_0 = "Q8_0", Q8_0;
    /// 4-bit floats for the routed experts, 8 bits for the rest: as gpt-oss was trained.
    MXFP4_MOE = "MXFP4_MOE", Q8_0;
    /// 6 bits.
    Q6_K = "Q6_K", Q6_K;
    /// 5 bits, with 6 for what suffers most.
    Q5_K_M = "Q5_K_M", Q5_K;
    /// 5 bits.
    Q5_K_S = "Q5_K_S", Q5_K;
    /// 4 bits, with 6 for what suffers most: what most people run.
    Q4_K_M = "Q4_K_M", Q4_K;
    /// 4 bits, with 5 for the first layers.
    Q4_K_S = "Q4_K_S", Q4_K;
    /// 4 bits, one scale for 32 elements.
    Q4_0 = "Q4_0", Q4_0;
    /// 4.25 bits, non-linear levels.
    IQ4_XS = "IQ4_XS", IQ4_XS;
    /// 3 bits, with 5 for what suffers most.
    Q3_K_L = "Q3_K_L", Q3_K;
    /// 3 bits, with 4 and 5 for what suffers most.
    Q3_K_M = "Q3_K_M", Q3_K;
    /// 3 bits.
    Q3_K_S = "Q3_K_S", Q3_K;
    /// 2 bits, with 3 and 4 for what suffers most.
    Q2_K = "Q2_K", Q2_K;
}

impl fmt::Display for QuantMix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A text that names no mix.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is no quantisation mix; there are: {}", names())]
pub struct ParseMixError {
    /// What was read.
    pub text: String,
}

fn names() -> String {
    let names: Vec<&str> = QuantMix::ALL.iter().map(|mix| mix.name()).collect();
    names.join(", ")
}

impl FromStr for QuantMix {
    type Err = ParseMixError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL
            .iter()
            .copied()
            .find(|mix| mix.name().eq_ignore_ascii_case(text))
            .ok_or_else(|| ParseMixError {
                text: text.to_owned(),
            })
    }
}

/// What the choice of a type depends on besides the tensor.
#[derive(Debug, Clone, Copy)]
pub(super) struct MixContext {
    pub mix: QuantMix,
    pub layers: usize,
    pub experts: usize,
    /// Query heads that share a key and value head.
    pub heads_per_kv: usize,
    /// Llama 2 and 3 of 70 billion parameters and what has their shape.
    pub is_70b: bool,
    /// Whether the embedding table is the head, too.
    pub tied: bool,
}

impl MixContext {
    /// The type of a tensor of this name and shape.
    pub(super) fn type_of(&self, name: &str, shape: &[usize]) -> GgmlType {
        let is_vector = shape.len() < 2 || shape[1..].iter().all(|n| *n == 1);
        if is_vector || name.contains("ffn_gate_inp.") || !name.ends_with(".weight") {
            return F32;
        }
        let base = self.mix.base();
        if !base.is_quantized() {
            return base;
        }
        fitting(self.wanted(name, shape[0]), shape[0])
    }

    fn wanted(&self, name: &str, row: usize) -> GgmlType {
        let base = self.mix.base();
        if self.mix == QuantMix::MXFP4_MOE && name.ends_with("_exps.weight") {
            return MXFP4;
        }
        if name == "output.weight" || self.tied && name == "token_embd.weight" {
            return match base {
                Q8_0 => Q8_0,
                _ if !row.is_multiple_of(base.block_len()) => Q8_0,
                _ => Q6_K,
            };
        }
        let Some((layer, part)) = layer_and_part(name) else {
            return base;
        };
        match part {
            "attn_v" | "attn_kv_b" => self.attn_v(layer),
            "attn_k" if self.experts == 8 => Q8_0,
            "attn_output" => self.attn_output(),
            part if part.starts_with("ffn_down") => self.ffn_down(layer),
            _ => base,
        }
    }

    /// The layers whose `attn_v` and `ffn_down` get more bits: the first and the last eighth, and every
    /// third one between.
    fn more_bits(&self, layer: usize) -> bool {
        let n = self.layers;
        layer < n / 8 || layer >= 7 * n / 8 || (layer - n / 8) % 3 == 2
    }

    fn attn_v(&self, layer: usize) -> GgmlType {
        if self.experts == 8 {
            return Q8_0;
        }
        let ty = match self.mix {
            QuantMix::Q2_K if self.heads_per_kv >= 4 => Q4_K,
            QuantMix::Q2_K => Q3_K,
            QuantMix::Q3_K_M if layer < 2 => Q5_K,
            QuantMix::Q3_K_M => Q4_K,
            QuantMix::Q3_K_L => Q5_K,
            QuantMix::IQ4_XS if self.heads_per_kv >= 4 => Q5_K,
            QuantMix::Q4_K_M | QuantMix::Q5_K_M if self.more_bits(layer) => Q6_K,
            QuantMix::Q4_K_S if layer < 4 => Q5_K,
            mix => mix.base(),
        };
        match ty {
            Q3_K | Q4_K if self.is_70b => Q5_K,
            ty => ty,
        }
    }

    fn attn_output(&self) -> GgmlType {
        match self.mix {
            QuantMix::Q2_K
            | QuantMix::Q3_K_S
            | QuantMix::Q3_K_M
            | QuantMix::Q4_K_S
            | QuantMix::Q4_K_M
            | QuantMix::IQ4_XS
                if self.experts == 8 =>
            {
                Q5_K
            }
            mix if self.experts == 8 => mix.base(),
            QuantMix::Q2_K => Q3_K,
            QuantMix::Q3_K_M => Q4_K,
            QuantMix::Q3_K_L => Q5_K,
            mix => mix.base(),
        }
    }

    fn ffn_down(&self, layer: usize) -> GgmlType {
        let n = self.layers;
        match self.mix {
            QuantMix::Q2_K => Q3_K,
            QuantMix::Q3_K_M if layer < n / 16 => Q5_K,
            QuantMix::Q3_K_M => Q4_K,
            QuantMix::Q3_K_L => Q5_K,
            QuantMix::Q4_K_M | QuantMix::Q5_K_M if self.more_bits(layer) => Q6_K,
            QuantMix::Q4_K_S | QuantMix::IQ4_XS if layer < n / 8 => Q5_K,
            mix => mix.base(),
        }
    }
}

/// `blk.3.attn_v.weight` is layer 3's `attn_v`.
fn layer_and_part(name: &str) -> Option<(usize, &str)> {
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    Some((layer.parse().ok()?, part.strip_suffix(".weight")?))
}

/// The type itself, or where rows are no whole number of its blocks the nearest one with smaller blocks.
fn fitting(ty: GgmlType, row: usize) -> GgmlType {
    if row.is_multiple_of(ty.block_len()) {
        return ty;
    }
    let smaller = match ty {
        IQ4_XS => IQ4_NL,
        Q2_K | Q3_K => Q4_0,
        Q4_K => Q5_0,
        Q5_K => Q5_1,
        Q6_K => Q8_0,
        other => other,
    };
    match row.is_multiple_of(smaller.block_len()) {
        true => smaller,
        false => F16,
    }
}
