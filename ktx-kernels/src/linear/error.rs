use ktx_gguf::GgmlType;

/// Why a matrix product cannot be computed. All are errors of the caller's shapes; the arithmetic
/// itself cannot fail.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LinearError {
    /// The type cannot be multiplied (integer and double tensors hold no weights).
    #[error(
        "{ty} tensors cannot be multiplied; weights are F32, F16, BF16, a quantised type, or F8_E4M3 with \
         its scales"
    )]
    UnsupportedType {
        /// The tensor's type.
        ty: GgmlType,
    },
    /// A row is not a whole number of blocks.
    #[error("a row of {cols} columns is not a whole number of {ty} blocks of {block}")]
    PartialBlock {
        /// The tensor's type.
        ty: GgmlType,
        /// Columns of a row.
        cols: usize,
        /// Elements of a block.
        block: usize,
    },
    /// The bytes are not `rows` rows of `cols` columns.
    #[error("{rows} x {cols} weights of {ty} were given {actual} bytes, which is not their size")]
    WeightBytes {
        /// The tensor's type.
        ty: GgmlType,
        /// Rows expected.
        rows: usize,
        /// Columns expected.
        cols: usize,
        /// Bytes given.
        actual: usize,
    },
    /// The block scales are not those of the matrix.
    #[error("{rows} x {cols} weights were given the block scales of another matrix")]
    Scales {
        /// Rows of the matrix.
        rows: usize,
        /// Its columns.
        cols: usize,
    },
    /// The input has not `tokens` rows of `cols` values.
    #[error("{tokens} tokens of {cols} values were given a slice of {actual}")]
    InputLength {
        /// Tokens expected.
        tokens: usize,
        /// Values per token expected.
        cols: usize,
        /// Length given.
        actual: usize,
    },
    /// Weights and activations differ in columns.
    #[error("weights of {weight} columns cannot be multiplied with activations of {activations}")]
    Columns {
        /// Columns of the weights.
        weight: usize,
        /// Columns of the activations.
        activations: usize,
    },
    /// The output's stride is shorter than a row of results.
    #[error("an output stride of {stride} is shorter than the {rows} results of a token")]
    Stride {
        /// Results per token.
        rows: usize,
        /// Stride given.
        stride: usize,
    },
    /// The output is too short.
    #[error(
        "{tokens} tokens of {rows} results at a stride of {stride} do not fit an output of {actual}"
    )]
    OutputLength {
        /// Tokens multiplied.
        tokens: usize,
        /// Results per token.
        rows: usize,
        /// Distance between tokens.
        stride: usize,
        /// Length given.
        actual: usize,
    },
    /// Not one output per weight.
    #[error("{weights} weights were given {outputs} outputs; each needs one")]
    OutputCount {
        /// Number of weights.
        weights: usize,
        /// Number of outputs.
        outputs: usize,
    },
    /// The activations lack the form that the weight type is multiplied with.
    #[error("the activations were not prepared for {ty} weights; name the type in `prepare_for`")]
    NotPrepared {
        /// Type of the weights.
        ty: GgmlType,
    },
}
