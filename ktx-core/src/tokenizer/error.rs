//! What can be wrong with a file's tokenizer.

use thiserror::Error;

use super::pre_tokenizer;

/// Why a tokenizer could not be built from a file's metadata.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// A key that every tokenizer needs is absent.
    #[error(
        "{key} is missing: the file carries no tokenizer, or an incomplete one; \
         convert the model again with its tokenizer files beside it"
    )]
    MissingKey {
        /// The metadata key.
        key: &'static str,
    },
    /// A metadata value has another type than the key calls for.
    #[error("the tokenizer's metadata cannot be read: {0}")]
    Metadata(#[from] ktx_gguf::GgufError),
    /// `tokenizer.ggml.model` names a kind of tokenizer that is not built in.
    #[error(
        "tokenizer.ggml.model is '{model}', which is not supported; supported: gpt2 (byte-level BPE), \
         llama (SentencePiece BPE), t5 and unigram (SentencePiece unigram)"
    )]
    UnsupportedModel {
        /// The value of the key.
        model: String,
    },
    /// `tokenizer.ggml.pre` names a pre-tokenizer that is not built in.
    #[error(
        "tokenizer.ggml.pre is '{name}', a pre-tokenizer that is not supported, and another one would split \
         words wrongly; supported: {}",
        pre_tokenizer::supported().join(", ")
    )]
    UnsupportedPreTokenizer {
        /// The value of the key.
        name: String,
    },
    /// An array does not have one entry per token.
    #[error(
        "{key} has {found} entries for {tokens} tokens; the file is damaged or was edited: fetch it again"
    )]
    LengthMismatch {
        /// The metadata key.
        key: &'static str,
        /// Entries in the array.
        found: usize,
        /// Entries of `tokenizer.ggml.tokens`.
        tokens: usize,
    },
    /// The vocabulary has no token, or more than ids can count.
    #[error("tokenizer.ggml.tokens has {found} entries; 1 to {limit} are possible")]
    VocabularySize {
        /// Entries in the array.
        found: usize,
        /// The most that is possible.
        limit: usize,
    },
    /// A token is longer than any real one, which would make encoding slow.
    #[error("tokenizer.ggml.tokens[{id}] is {length} bytes long; the limit is {limit}")]
    TokenTooLong {
        /// The token.
        id: usize,
        /// Its length in bytes.
        length: usize,
        /// The most that is accepted.
        limit: usize,
    },
    /// A merge is not two parts with a space between.
    #[error(
        "tokenizer.ggml.merges[{index}] is {text:?}; expected two token texts with one space between"
    )]
    MalformedMerge {
        /// Position in the array.
        index: usize,
        /// Its text, shortened.
        text: String,
    },
    /// A special token's id is not in the vocabulary.
    #[error(
        "{key} is {id}, but the vocabulary has {tokens} tokens; correct the key in the file's metadata"
    )]
    TokenOutOfRange {
        /// The metadata key.
        key: &'static str,
        /// The id.
        id: u32,
        /// Tokens in the vocabulary.
        tokens: usize,
    },
    /// The file asks for a BOS token and does not say which one it is.
    #[error(
        "tokenizer.ggml.add_bos_token is true, but tokenizer.ggml.bos_token_id is missing; \
         correct one of them in the file's metadata"
    )]
    MissingBos,
    /// The special tokens could not be made into a matcher.
    #[error("the special tokens are too many or too long to search for: {0}")]
    SpecialTokens(String),
    /// `tokenizer.ggml.precompiled_charsmap` is not a well-formed map.
    #[error("tokenizer.ggml.precompiled_charsmap is damaged: {0}; fetch the file again")]
    Charsmap(&'static str),
}
