use crate::linear::LinearError;

/// Why the experts of a layer cannot be computed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MoeError {
    /// A weight tensor is not what it should be.
    #[error("an expert's weights: {0}")]
    Weights(#[from] LinearError),
    /// The experts of one stack, or the three stacks, disagree in shape.
    #[error(
        "the experts' {stack} weights are {actual_experts} x [{actual_rows}, {actual_cols}], \
         but {experts} x [{rows}, {cols}] belong there"
    )]
    Shape {
        /// `gate`, `up` or `down`.
        stack: &'static str,
        /// Experts expected.
        experts: usize,
        /// Rows expected.
        rows: usize,
        /// Columns expected.
        cols: usize,
        /// Experts given.
        actual_experts: usize,
        /// Rows given.
        actual_rows: usize,
        /// Columns given.
        actual_cols: usize,
    },
    /// A bias is not one value per expert and row.
    #[error("the experts' {stack} bias has {actual} values, but {experts} x {rows} belong there")]
    BiasLength {
        /// `gate`, `up` or `down`.
        stack: &'static str,
        /// Number of experts.
        experts: usize,
        /// Rows of an expert.
        rows: usize,
        /// Values given.
        actual: usize,
    },
    /// The input is not whole tokens.
    #[error("an input of {actual} values is not whole tokens of {hidden}")]
    InputLength {
        /// Values per token.
        hidden: usize,
        /// Length given.
        actual: usize,
    },
    /// Ids or weights are not `top_k` per token.
    #[error("{tokens} tokens with {top_k} experts each were given {ids} ids and {weights} weights")]
    RoutingLength {
        /// Tokens of the input.
        tokens: usize,
        /// Experts per token.
        top_k: usize,
        /// Ids given.
        ids: usize,
        /// Weights given.
        weights: usize,
    },
    /// The output has another length than the input.
    #[error("the output has {actual} values, the input {expected}; they must be equal")]
    OutputLength {
        /// Length of the input.
        expected: usize,
        /// Length given.
        actual: usize,
    },
    /// A token was routed to an expert that does not exist.
    #[error("token {token} was routed to expert {id}, but there are only {experts}")]
    ExpertOutOfRange {
        /// The token.
        token: usize,
        /// The expert asked for.
        id: u32,
        /// Number of experts.
        experts: usize,
    },
}
