//! Text to tokens and back, with the vocabulary in the model's file.
//!
//! A GGUF file carries its tokenizer in its metadata. [`Tokenizer::from_metadata`] builds it; three kinds exist:
//! byte-level BPE (`gpt2`), SentencePiece BPE (`llama`) and SentencePiece unigram (`t5`). Encoding first finds the
//! special tokens in the text, then gives each stretch between them to the vocabulary's algorithm. It takes any text
//! and cannot fail.

mod bpe;
mod byte_level;
mod charsmap;
mod error;
mod merge;
mod pre_tokenizer;
mod special;
mod spm;
mod stream;
mod unigram;
mod vocabulary;

use std::fmt;

use ktx_gguf::Metadata;

pub use error::TokenizerError;
pub use stream::StreamDecoder;
pub use vocabulary::TokenType;

use bpe::BytePairEncoding;
use pre_tokenizer::PreTokenizer;
use special::{Fragment, SpecialTokens};
use spm::{Fallback, ScoredMerging};
use unigram::Unigram;
use vocabulary::{Spelling, Vocabulary};

/// What SentencePiece writes for a space.
const SPACE_MARK: char = '\u{2581}';

/// The number of a token in the vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TokenId(pub u32);

impl fmt::Display for TokenId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

impl From<u32> for TokenId {
    fn from(id: u32) -> Self {
        Self(id)
    }
}

/// Whether a text is begun with the BOS token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AddBos {
    /// As the model's file says.
    #[default]
    FromModel,
    /// If the vocabulary has one.
    Always,
    /// Never: the text holds it already, or continues another.
    Never,
}

/// Whether the names of control tokens in a text (`<|im_end|>`) become these tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ParseSpecial {
    /// They do: for text that a chat template has rendered.
    Yes,
    /// They stay plain text: for text from outside. User-defined tokens are found nevertheless.
    #[default]
    No,
}

/// What happens to special tokens in decoding.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpecialText {
    /// Their names are part of the text.
    Keep,
    /// They are left out.
    #[default]
    Skip,
}

/// How a text is encoded; the default is plain text at the beginning of a context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Whether BOS goes in front.
    pub add_bos: AddBos,
    /// Whether names of control tokens are these tokens.
    pub parse_special: ParseSpecial,
}

impl EncodeOptions {
    /// For a chat that a template has rendered: the template wrote BOS, and special tokens are meant.
    pub fn rendered_chat() -> Self {
        Self {
            add_bos: AddBos::Never,
            parse_special: ParseSpecial::Yes,
        }
    }
}

enum Algorithm {
    Bpe(BytePairEncoding),
    ScoredMerging(ScoredMerging),
    Unigram(Unigram),
}

/// A model's tokenizer. It is immutable and can be shared between threads.
pub struct Tokenizer {
    vocabulary: Vocabulary,
    algorithm: Algorithm,
    special: SpecialTokens,
    model: String,
    pre_tokenizer: Option<String>,
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    unknown: Option<u32>,
    ends: Vec<u32>,
    adds_bos: bool,
    prefixes_space: bool,
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct("Tokenizer")
            .field("model", &self.model)
            .field("pre_tokenizer", &self.pre_tokenizer)
            .field("vocab_size", &self.vocab_size())
            .finish_non_exhaustive()
    }
}

/// The keys of the special tokens, and the ids that SentencePiece gives them when the file is silent.
struct SpecialIds {
    bos: Option<u32>,
    eos: Option<u32>,
    pad: Option<u32>,
    unknown: Option<u32>,
}

impl SpecialIds {
    fn from_metadata(
        metadata: &Metadata,
        vocabulary: &Vocabulary,
        model: &str,
    ) -> Result<Self, TokenizerError> {
        let id = |key| special::token_id(metadata, vocabulary, key);
        let or_default = |found: Option<u32>, default: u32| {
            found.or_else(|| {
                (model == "llama" && (default as usize) < vocabulary.len()).then_some(default)
            })
        };
        Ok(Self {
            unknown: or_default(id("tokenizer.ggml.unknown_token_id")?, 0),
            bos: or_default(id("tokenizer.ggml.bos_token_id")?, 1),
            eos: or_default(id("tokenizer.ggml.eos_token_id")?, 2),
            pad: id("tokenizer.ggml.padding_token_id")?,
        })
    }
}

impl Tokenizer {
    /// The tokenizer that a model's metadata describes.
    ///
    /// # Errors
    /// A [`TokenizerError`] that names the key: a kind of tokenizer or a pre-tokenizer that is not supported, arrays
    /// that are missing or of different lengths, malformed merges, special tokens outside the vocabulary.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, TokenizerError> {
        let model = metadata
            .str("tokenizer.ggml.model")?
            .ok_or(TokenizerError::MissingKey {
                key: "tokenizer.ggml.model",
            })?
            .to_owned();
        let spelling = match model.as_str() {
            "gpt2" => Spelling::ByteLevel,
            "llama" | "t5" | "unigram" => Spelling::SentencePiece,
            _ => return Err(TokenizerError::UnsupportedModel { model }),
        };
        let mut vocabulary = Vocabulary::from_metadata(metadata, spelling)?;
        let ids = SpecialIds::from_metadata(metadata, &vocabulary, &model)?;
        let mut ends = special::end_of_generation(metadata, &mut vocabulary)?;
        if let Some(eos) = ids.eos
            && let Err(position) = ends.binary_search(&eos)
        {
            ends.insert(position, eos);
        }
        let prefixes_space = spelling == Spelling::SentencePiece
            && metadata
                .bool("tokenizer.ggml.add_space_prefix")?
                .unwrap_or(true);
        let pre_tokenizer = (model == "gpt2")
            .then(|| pre_tokenizer_name(metadata))
            .transpose()?;
        let algorithm = match (&pre_tokenizer, model.as_str()) {
            (Some(name), _) => {
                let splitter = PreTokenizer::named(name).ok_or_else(|| {
                    TokenizerError::UnsupportedPreTokenizer { name: name.clone() }
                })?;
                Algorithm::Bpe(BytePairEncoding::from_metadata(
                    metadata,
                    &vocabulary,
                    splitter,
                )?)
            }
            (None, model) => {
                sentence_piece(metadata, &vocabulary, model, ids.unknown, prefixes_space)?
            }
        };
        Ok(Self {
            special: SpecialTokens::new(&vocabulary)?,
            adds_bos: adds_bos(metadata, &algorithm, ids.bos)?,
            bos: ids.bos,
            eos: ids.eos,
            pad: ids.pad,
            unknown: ids.unknown,
            vocabulary,
            algorithm,
            model,
            pre_tokenizer,
            ends,
            prefixes_space,
        })
    }

    /// The tokens of a text. Every text can be encoded.
    pub fn encode(&self, text: &str, options: &EncodeOptions) -> Vec<TokenId> {
        let mut ids = Vec::with_capacity(text.len() / 3 + 2);
        let wants_bos = match options.add_bos {
            AddBos::FromModel => self.adds_bos,
            AddBos::Always => true,
            AddBos::Never => false,
        };
        ids.extend(self.bos.filter(|_| wants_bos));
        for fragment in self.special.split(text, options.parse_special) {
            match (fragment, &self.algorithm) {
                (Fragment::Token(id), _) => ids.push(id),
                (Fragment::Text(text), Algorithm::Bpe(bpe)) => bpe.encode(text, &mut ids),
                (Fragment::Text(text), Algorithm::ScoredMerging(merging)) => {
                    merging.encode(text, &mut ids)
                }
                (Fragment::Text(text), Algorithm::Unigram(unigram)) => {
                    unigram.encode(text, &mut ids)
                }
            }
        }
        ids.into_iter().map(TokenId).collect()
    }

    /// The text of tokens. Bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing.
    pub fn decode(&self, ids: &[TokenId], special: SpecialText) -> String {
        let mut decoder = StreamDecoder::new().with_special(special);
        let mut text: String = ids.iter().map(|&id| decoder.push(self, id)).collect();
        text.push_str(&decoder.finish());
        text
    }

    /// Number of tokens. The model's embedding may have more rows; such ids decode to nothing.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary.len()
    }

    /// The bytes that a token stands for; for a special token, its name. Empty for ids outside the vocabulary.
    pub fn token_bytes(&self, id: TokenId) -> &[u8] {
        self.vocabulary.bytes(id.0)
    }

    /// A token as the vocabulary writes it (`Ġthe`, `▁the`, `<|im_end|>`).
    pub fn token_text(&self, id: TokenId) -> Option<&str> {
        self.vocabulary.text(id.0)
    }

    /// The kind of a token.
    pub fn token_type(&self, id: TokenId) -> Option<TokenType> {
        self.vocabulary.kind(id.0)
    }

    /// The token that the vocabulary writes so. It searches the whole vocabulary.
    pub fn token_named(&self, text: &str) -> Option<TokenId> {
        self.vocabulary
            .iter()
            .find(|&(_, token, _)| token == text)
            .map(|(id, ..)| TokenId(id))
    }

    /// Whether a token is not text: a control token or the unknown one.
    pub fn is_special(&self, id: TokenId) -> bool {
        matches!(
            self.token_type(id),
            Some(TokenType::Control | TokenType::Unknown)
        )
    }

    /// Whether a generation is over after this token: the end of the text, of the turn or of a message.
    pub fn is_end_of_generation(&self, id: TokenId) -> bool {
        self.ends.binary_search(&id.0).is_ok()
    }

    /// The tokens after which a generation is over, in ascending order.
    pub fn end_of_generation(&self) -> impl Iterator<Item = TokenId> {
        self.ends.iter().copied().map(TokenId)
    }

    /// Begin of text.
    pub fn bos(&self) -> Option<TokenId> {
        self.bos.map(TokenId)
    }

    /// End of text.
    pub fn eos(&self) -> Option<TokenId> {
        self.eos.map(TokenId)
    }

    /// Padding.
    pub fn pad(&self) -> Option<TokenId> {
        self.pad.map(TokenId)
    }

    /// The token for text that no other covers.
    pub fn unknown(&self) -> Option<TokenId> {
        self.unknown.map(TokenId)
    }

    /// Whether the file asks for BOS in front of every text.
    pub fn adds_bos(&self) -> bool {
        self.adds_bos
    }

    /// The kind of tokenizer, as in `tokenizer.ggml.model`.
    pub fn model(&self) -> &str {
        &self.model
    }

    /// The pre-tokenizer of a byte-level BPE, as in `tokenizer.ggml.pre`.
    pub fn pre_tokenizer(&self) -> Option<&str> {
        self.pre_tokenizer.as_deref()
    }

    /// Whether a text gets a space in front before it is encoded, which decoding takes away again.
    pub(crate) fn prefixes_space(&self) -> bool {
        self.prefixes_space
    }
}

fn pre_tokenizer_name(metadata: &Metadata) -> Result<String, TokenizerError> {
    Ok(match metadata.str("tokenizer.ggml.pre")? {
        Some(name) => name.to_owned(),
        None => {
            tracing::warn!(
                "tokenizer.ggml.pre is missing: words are split by the pre-tokenizer 'default', which may not be \
                 the model's; convert the model again to be sure"
            );
            "default".to_owned()
        }
    })
}

fn sentence_piece(
    metadata: &Metadata,
    vocabulary: &Vocabulary,
    model: &str,
    unknown: Option<u32>,
    prefixes_space: bool,
) -> Result<Algorithm, TokenizerError> {
    const KEY: &str = "tokenizer.ggml.scores";
    let scores = vocabulary::per_token(metadata.f32s(KEY)?, KEY, vocabulary.len())?
        .ok_or(TokenizerError::MissingKey { key: KEY })?;
    let fallback = Fallback::new(vocabulary, unknown);
    Ok(match model {
        "llama" => Algorithm::ScoredMerging(ScoredMerging::new(
            vocabulary,
            &scores,
            fallback,
            prefixes_space,
        )),
        _ => Algorithm::Unigram(Unigram::from_metadata(
            metadata,
            vocabulary,
            &scores,
            fallback,
            prefixes_space,
        )?),
    })
}

/// Whether the model wants BOS: what the file says, else what this kind of tokenizer does.
fn adds_bos(
    metadata: &Metadata,
    algorithm: &Algorithm,
    bos: Option<u32>,
) -> Result<bool, TokenizerError> {
    match metadata.bool("tokenizer.ggml.add_bos_token")? {
        Some(true) if bos.is_none() => Err(TokenizerError::MissingBos),
        Some(stated) => Ok(stated),
        None => {
            let by_default = match algorithm {
                Algorithm::Bpe(bpe) => bpe.adds_bos(),
                Algorithm::ScoredMerging(_) => true,
                Algorithm::Unigram(_) => false,
            };
            Ok(by_default && bos.is_some())
        }
    }
}
