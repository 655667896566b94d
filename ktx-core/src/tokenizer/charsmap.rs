//! SentencePiece's compiled normalisation rules (`tokenizer.ggml.precompiled_charsmap`).
//!
//! Format: a little-endian `u32` with the trie's size in bytes, the trie as a double array of `u32` units (Darts
//! clone), then replacement texts, each ended by a zero byte. A unit holds a label (bits 0-7, bit 31 set in values),
//! a flag that a value follows (bit 8) and an offset (bits 10-30, scaled by 256 if bit 9 is set). At every position
//! the longest prefix in the trie is replaced; a value is where its replacement starts.

use super::TokenizerError;

/// Replacements of character sequences, NFKC for example.
pub(super) struct Charsmap {
    units: Vec<u32>,
    replacements: Vec<u8>,
}

impl Charsmap {
    /// From the metadata's array of bytes, signed or not.
    pub(super) fn from_values(values: &[i32]) -> Result<Self, TokenizerError> {
        let bytes: Vec<u8> = values
            .iter()
            .map(|&value| {
                u8::try_from(value)
                    .ok()
                    .or_else(|| Some(i8::try_from(value).ok()?.cast_unsigned()))
            })
            .collect::<Option<_>>()
            .ok_or(TokenizerError::Charsmap("an entry is not a byte"))?;
        let (size, rest) = bytes
            .split_first_chunk()
            .ok_or(TokenizerError::Charsmap("it is shorter than its header"))?;
        let size = u32::from_le_bytes(*size) as usize;
        if !size.is_multiple_of(4) || size == 0 {
            return Err(TokenizerError::Charsmap(
                "its trie is not a number of 4-byte units",
            ));
        }
        let (trie, replacements) = rest.split_at_checked(size).ok_or(TokenizerError::Charsmap(
            "its trie is longer than the array",
        ))?;
        let units = trie
            .chunks_exact(4)
            .map(|unit| u32::from_le_bytes([unit[0], unit[1], unit[2], unit[3]]))
            .collect();
        Ok(Self {
            units,
            replacements: replacements.to_vec(),
        })
    }

    /// The text with every longest known sequence replaced.
    pub(super) fn apply(&self, text: &str) -> String {
        let mut normalized = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(character) = rest.chars().next() {
            let replaced = self
                .longest_prefix(rest.as_bytes())
                .filter(|&(length, _)| rest.is_char_boundary(length));
            match replaced {
                Some((length, value)) => {
                    normalized.push_str(&self.replacement(value));
                    rest = &rest[length..];
                }
                None => {
                    normalized.push(character);
                    rest = &rest[character.len_utf8()..];
                }
            }
        }
        normalized
    }

    /// Length and value of the longest sequence that `text` starts with.
    fn longest_prefix(&self, text: &[u8]) -> Option<(usize, u32)> {
        let mut found = None;
        let mut position = offset(*self.units.first()?);
        for (index, &byte) in text.iter().enumerate() {
            position ^= usize::from(byte);
            let Some(&unit) = self.units.get(position) else {
                break;
            };
            if byte == 0 || unit & (1 << 31 | 0xFF) != u32::from(byte) {
                break;
            }
            position ^= offset(unit);
            if unit & 1 << 8 != 0 {
                let Some(&value) = self.units.get(position) else {
                    break;
                };
                found = Some((index + 1, value & !(1 << 31)));
            }
        }
        found
    }

    fn replacement(&self, start: u32) -> std::borrow::Cow<'_, str> {
        let text = self.replacements.get(start as usize..).unwrap_or_default();
        let end = text
            .iter()
            .position(|&byte| byte == 0)
            .unwrap_or(text.len());
        String::from_utf8_lossy(&text[..end])
    }
}

fn offset(unit: u32) -> usize {
    ((unit >> 10) << ((unit & 1 << 9) >> 6)) as usize
}
