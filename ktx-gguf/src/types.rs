//! The tensor element types of GGUF files: ids, names and block sizes.

use std::fmt;

macro_rules! ggml_types {
    ($($(#[$doc:meta])* $variant:ident = $id:literal, $len:literal, $bytes:literal;)*) => {
        /// Type of a tensor's elements, as numbered in GGUF files, and one that only safetensors files hold.
        ///
        /// Elements are stored in blocks: [`GgmlType::block_len`] consecutive elements of a row take
        /// [`GgmlType::block_bytes`] bytes. Plain numbers are blocks of one element.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
        #[allow(non_camel_case_types, reason = "the names of the format")]
        pub enum GgmlType {
            $($(#[$doc])* $variant,)*
            /// 8-bit floats (E4M3) with a scale for each block of 128 x 128, which is apart from the elements
            /// ([`Tensor::scales`](crate::Tensor::scales)). From safetensors files: GGUF has no number for it.
            F8_E4M3,
        }

        impl GgmlType {
            /// Every type that GGUF files hold, in the order of their ids.
            pub const ALL: &[GgmlType] = &[$(GgmlType::$variant,)*];

            /// The type with this number in a GGUF file; `None` when it is not supported.
            pub fn from_id(id: u32) -> Option<Self> {
                match id {
                    $($id => Some(GgmlType::$variant),)*
                    _ => None,
                }
            }

            /// The type's number in a GGUF file; `u32::MAX`, which is none, for one that GGUF does not have.
            pub const fn id(self) -> u32 {
                match self {
                    $(GgmlType::$variant => $id,)*
                    GgmlType::F8_E4M3 => u32::MAX,
                }
            }

            /// The type's name as the format spells it, `Q4_K` for example.
            pub const fn name(self) -> &'static str {
                match self {
                    $(GgmlType::$variant => stringify!($variant),)*
                    GgmlType::F8_E4M3 => "F8_E4M3",
                }
            }

            /// Number of elements in one block.
            pub const fn block_len(self) -> usize {
                match self {
                    $(GgmlType::$variant => $len,)*
                    GgmlType::F8_E4M3 => 1,
                }
            }

            /// Number of bytes of one block.
            pub const fn block_bytes(self) -> usize {
                match self {
                    $(GgmlType::$variant => $bytes,)*
                    GgmlType::F8_E4M3 => 1,
                }
            }
        }
    };
}

ggml_types! {
    /// IEEE 754 single precision.
    F32 = 0, 1, 4;
    /// IEEE 754 half precision.
    F16 = 1, 1, 2;
    /// 4 bits, one scale for 32 elements.
    Q4_0 = 2, 32, 18;
    /// 4 bits, scale and minimum for 32 elements.
    Q4_1 = 3, 32, 20;
    /// 5 bits, one scale for 32 elements.
    Q5_0 = 6, 32, 22;
    /// 5 bits, scale and minimum for 32 elements.
    Q5_1 = 7, 32, 24;
    /// 8 bits, one scale for 32 elements.
    Q8_0 = 8, 32, 34;
    /// 8 bits, scale and scaled sum for 32 elements; ggml's type for activations, two half-precision
    /// numbers in front (the 40 bytes in some tables are from a layout that ggml gave up).
    Q8_1 = 9, 32, 36;
    /// 2 bits, 16 sub-blocks of 16 with 4-bit scales and minimums.
    Q2_K = 10, 256, 84;
    /// 3 bits, 16 sub-blocks of 16 with 6-bit scales.
    Q3_K = 11, 256, 110;
    /// 4 bits, 8 sub-blocks of 32 with 6-bit scales and minimums.
    Q4_K = 12, 256, 144;
    /// 5 bits, 8 sub-blocks of 32 with 6-bit scales and minimums.
    Q5_K = 13, 256, 176;
    /// 6 bits, 16 sub-blocks of 16 with 8-bit scales.
    Q6_K = 14, 256, 210;
    /// 8 bits, one single-precision scale for 256 elements and sums of 16; ggml's type for activations.
    Q8_K = 15, 256, 292;
    /// 2.06 bits, code book of 256 entries.
    IQ2_XXS = 16, 256, 66;
    /// 2.31 bits, code book of 512 entries.
    IQ2_XS = 17, 256, 74;
    /// 3.06 bits, code book of 256 entries.
    IQ3_XXS = 18, 256, 98;
    /// 1.56 bits, code book of 2,048 entries.
    IQ1_S = 19, 256, 50;
    /// 4 bits, non-linear levels, one scale for 32 elements.
    IQ4_NL = 20, 32, 18;
    /// 3.44 bits, code book of 512 entries.
    IQ3_S = 21, 256, 110;
    /// 2.56 bits, code book of 1,024 entries.
    IQ2_S = 22, 256, 82;
    /// 4.25 bits, non-linear levels, 8 sub-blocks of 32 with 6-bit scales.
    IQ4_XS = 23, 256, 136;
    /// Signed 8-bit integer.
    I8 = 24, 1, 1;
    /// Signed 16-bit integer.
    I16 = 25, 1, 2;
    /// Signed 32-bit integer.
    I32 = 26, 1, 4;
    /// Signed 64-bit integer.
    I64 = 27, 1, 8;
    /// IEEE 754 double precision.
    F64 = 28, 1, 8;
    /// 1.75 bits, code book of 2,048 entries.
    IQ1_M = 29, 256, 56;
    /// The upper half of a single-precision number.
    BF16 = 30, 1, 2;
    /// Ternary, 1.69 bits: five elements in a byte.
    TQ1_0 = 34, 256, 54;
    /// Ternary, 2.06 bits: four elements in a byte.
    TQ2_0 = 35, 256, 66;
    /// 4-bit floats (E2M1) with a shared power-of-two scale for 32 elements (OCP microscaling).
    MXFP4 = 39, 32, 17;
}

impl GgmlType {
    /// Bytes of a row of `elements` elements; `None` when that is not a whole number of blocks or does not
    /// fit an address.
    pub const fn row_bytes(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.block_len()) {
            return None;
        }
        (elements / self.block_len()).checked_mul(self.block_bytes())
    }

    /// Whether elements share scales in blocks (everything but plain floats and integers).
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }

    /// The names of all supported types, separated by commas, for error texts.
    pub(crate) fn supported_names() -> String {
        let names: Vec<&str> = Self::ALL.iter().map(|ty| ty.name()).collect();
        names.join(", ")
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
