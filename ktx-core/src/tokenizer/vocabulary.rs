//! The tokens of a vocabulary: texts, kinds and the bytes that each stands for.

use ktx_gguf::Metadata;

use super::TokenizerError;
use super::byte_level::{self, ByteTokens};

/// The most tokens that a vocabulary may have: ids are signed 32-bit numbers in other programs.
const MAX_TOKENS: usize = i32::MAX as usize;
/// Longer than any token of a published vocabulary (the longest are runs of some hundred spaces).
const MAX_TOKEN_BYTES: usize = 16 * 1024;

/// The kind of a token, from `tokenizer.ggml.token_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TokenType {
    /// A piece of text.
    Normal,
    /// Stands for text that no token covers.
    Unknown,
    /// Steers the model and is not text: begin and end of a text, of a turn.
    Control,
    /// Added by the model's makers: always one token when its text occurs.
    UserDefined,
    /// A place kept free.
    Unused,
    /// One byte, written `<0x0A>`.
    Byte,
    /// Not stated in the file.
    Undefined,
}

impl TokenType {
    fn from_number(number: i32) -> Self {
        match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            5 => Self::Unused,
            6 => Self::Byte,
            _ => Self::Undefined,
        }
    }
}

/// How a vocabulary writes text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Spelling {
    /// Every byte is a printable character (GPT-2's table).
    ByteLevel,
    /// UTF-8, spaces as U+2581.
    SentencePiece,
}

/// All tokens, by id.
pub(super) struct Vocabulary {
    texts: Vec<Box<str>>,
    types: Vec<TokenType>,
    bytes: Vec<u8>,
    /// Where each token's bytes end in `bytes`.
    ends: Vec<usize>,
}

impl Vocabulary {
    pub(super) fn from_metadata(
        metadata: &Metadata,
        spelling: Spelling,
    ) -> Result<Self, TokenizerError> {
        let tokens =
            metadata
                .strings("tokenizer.ggml.tokens")?
                .ok_or(TokenizerError::MissingKey {
                    key: "tokenizer.ggml.tokens",
                })?;
        if tokens.is_empty() || tokens.len() > MAX_TOKENS {
            return Err(TokenizerError::VocabularySize {
                found: tokens.len(),
                limit: MAX_TOKENS,
            });
        }
        if let Some((id, token)) = tokens
            .iter()
            .enumerate()
            .find(|(_, token)| token.len() > MAX_TOKEN_BYTES)
        {
            return Err(TokenizerError::TokenTooLong {
                id,
                length: token.len(),
                limit: MAX_TOKEN_BYTES,
            });
        }
        let types = per_token(
            metadata.i32s("tokenizer.ggml.token_type")?,
            "tokenizer.ggml.token_type",
            tokens.len(),
        )?;
        let types = match types {
            Some(numbers) => numbers.into_iter().map(TokenType::from_number).collect(),
            None => vec![TokenType::Normal; tokens.len()],
        };
        let mut vocabulary = Self {
            texts: tokens.iter().map(|token| token.as_str().into()).collect(),
            types,
            bytes: Vec::new(),
            ends: Vec::with_capacity(tokens.len()),
        };
        vocabulary.spell_out(spelling);
        Ok(vocabulary)
    }

    fn spell_out(&mut self, spelling: Spelling) {
        for (text, &kind) in self.texts.iter().zip(&self.types) {
            match kind {
                TokenType::Control | TokenType::Unknown | TokenType::UserDefined => {
                    self.bytes.extend_from_slice(text.as_bytes());
                }
                TokenType::Byte => match byte_of(text) {
                    Some(byte) => self.bytes.push(byte),
                    None => self.bytes.extend_from_slice(text.as_bytes()),
                },
                TokenType::Normal | TokenType::Unused | TokenType::Undefined => match spelling {
                    Spelling::ByteLevel => byte_level::decode_into(text, &mut self.bytes),
                    Spelling::SentencePiece => {
                        self.bytes
                            .extend_from_slice(text.replace(super::SPACE_MARK, " ").as_bytes());
                    }
                },
            }
            self.ends.push(self.bytes.len());
        }
    }

    pub(super) fn len(&self) -> usize {
        self.texts.len()
    }

    pub(super) fn text(&self, id: u32) -> Option<&str> {
        self.texts.get(id as usize).map(AsRef::as_ref)
    }

    pub(super) fn kind(&self, id: u32) -> Option<TokenType> {
        self.types.get(id as usize).copied()
    }

    pub(super) fn set_kind(&mut self, id: u32, kind: TokenType) {
        if let Some(slot) = self.types.get_mut(id as usize) {
            *slot = kind;
        }
    }

    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let index = id as usize;
        let Some(&end) = self.ends.get(index) else {
            return &[];
        };
        let start = if index == 0 { 0 } else { self.ends[index - 1] };
        &self.bytes[start..end]
    }

    /// Ids, texts and kinds of all tokens.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &str, TokenType)> {
        self.texts
            .iter()
            .zip(&self.types)
            .enumerate()
            .map(|(id, (text, &kind))| (id as u32, text.as_ref(), kind))
    }

    /// Tokens that text may become without being asked for by name: neither control, unknown nor byte tokens.
    pub(super) fn mergeable(&self) -> impl Iterator<Item = (u32, &str)> {
        self.iter().filter_map(|(id, text, kind)| {
            let is_text = !matches!(
                kind,
                TokenType::Control | TokenType::Unknown | TokenType::Byte
            );
            (is_text && !text.is_empty()).then_some((id, text))
        })
    }

    /// The tokens `<0x00>` to `<0xFF>`.
    pub(super) fn byte_tokens(&self) -> ByteTokens {
        let mut tokens = [None; 256];
        for (id, text, kind) in self.iter() {
            if let (TokenType::Byte, Some(byte)) = (kind, byte_of(text)) {
                tokens[usize::from(byte)].get_or_insert(id);
            }
        }
        tokens
    }
}

/// An array with one entry per token, if it is there.
pub(super) fn per_token<T>(
    values: Option<Vec<T>>,
    key: &'static str,
    tokens: usize,
) -> Result<Option<Vec<T>>, TokenizerError> {
    match values {
        Some(values) if values.len() != tokens => Err(TokenizerError::LengthMismatch {
            key,
            found: values.len(),
            tokens,
        }),
        values => Ok(values),
    }
}

/// The byte of a token `<0x0A>`.
fn byte_of(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hexadecimal = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hexadecimal
        .then(|| u8::from_str_radix(digits, 16).ok())
        .flatten()
}
