//! Text from tokens as they come.

use super::{SpecialText, TokenId, Tokenizer};

/// Turns tokens into text one by one and never gives out half a character.
///
/// ```no_run
/// # use ktx_core::tokenizer::{StreamDecoder, TokenId, Tokenizer};
/// # fn show(tokenizer: &Tokenizer, ids: &[TokenId]) {
/// let mut decoder = StreamDecoder::new();
/// for &id in ids {
///     print!("{}", decoder.push(tokenizer, id));
/// }
/// println!("{}", decoder.finish());
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct StreamDecoder {
    /// Bytes of a character that is not complete.
    pending: Vec<u8>,
    at_start: bool,
    special: SpecialText,
}

impl Default for StreamDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl StreamDecoder {
    /// For tokens that begin a text, an answer for example; special tokens are left out.
    pub fn new() -> Self {
        Self {
            pending: Vec::new(),
            at_start: true,
            special: SpecialText::Skip,
        }
    }

    /// For tokens that continue a text: the space before the first word is kept.
    pub fn continuing() -> Self {
        Self {
            at_start: false,
            ..Self::new()
        }
    }

    /// Gives out the names of special tokens, or leaves them out.
    pub fn with_special(mut self, special: SpecialText) -> Self {
        self.special = special;
        self
    }

    /// The text that became complete with this token; it may be empty. An id outside the vocabulary adds nothing.
    pub fn push(&mut self, tokenizer: &Tokenizer, id: TokenId) -> String {
        if self.special == SpecialText::Skip && tokenizer.is_special(id) {
            return String::new();
        }
        let mut bytes = tokenizer.token_bytes(id);
        if self.at_start && !bytes.is_empty() {
            self.at_start = false;
            if tokenizer.prefixes_space() && !tokenizer.is_special(id) {
                bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
            }
        }
        self.pending.extend_from_slice(bytes);
        self.take_complete()
    }

    /// What is left at the end: the start of a character that never came is U+FFFD.
    pub fn finish(&mut self) -> String {
        let rest = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        rest
    }

    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut incomplete = 0;
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let is_last = chunks.peek().is_none();
            if is_last
                && std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none())
            {
                incomplete = invalid.len();
            } else if !invalid.is_empty() {
                text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..self.pending.len() - incomplete);
        text
    }
}
