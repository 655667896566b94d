//! Byte-level BPE (`tokenizer.ggml.model` = `gpt2`).

use std::collections::HashMap;

use ktx_gguf::Metadata;

use super::TokenizerError;
use super::byte_level::{self, ByteTokens};
use super::merge::Merger;
use super::pre_tokenizer::PreTokenizer;
use super::vocabulary::Vocabulary;

/// Words up to this length are looked up among those already encoded in the same text.
const CACHED_WORD_BYTES: usize = 64;

/// The merge of a pair: its place in the list, and the token it makes.
#[derive(Clone, Copy)]
struct Merge {
    rank: u32,
    merged: u32,
}

/// A byte-level BPE vocabulary with its merges.
pub(super) struct BytePairEncoding {
    pre_tokenizer: PreTokenizer,
    merges: HashMap<(u32, u32), Merge>,
    byte_tokens: ByteTokens,
    /// Whole words by their bytes, for pre-tokenizers that take them without merging.
    words: HashMap<Box<[u8]>, u32>,
}

impl BytePairEncoding {
    pub(super) fn from_metadata(
        metadata: &Metadata,
        vocabulary: &Vocabulary,
        pre_tokenizer: PreTokenizer,
    ) -> Result<Self, TokenizerError> {
        let merges =
            metadata
                .strings("tokenizer.ggml.merges")?
                .ok_or(TokenizerError::MissingKey {
                    key: "tokenizer.ggml.merges",
                })?;
        let mut ids = HashMap::with_capacity(vocabulary.len());
        for (id, text) in vocabulary.mergeable() {
            ids.entry(text).or_insert(id);
        }
        let byte_tokens = std::array::from_fn(|byte| {
            ids.get(&*byte_level::character_of(byte as u8).to_string())
                .copied()
        });
        let mut words = HashMap::new();
        if pre_tokenizer.whole_words {
            words.extend(ids.values().map(|&id| (vocabulary.bytes(id).into(), id)));
        }
        Ok(Self {
            merges: ranked_merges(merges, &ids)?,
            pre_tokenizer,
            byte_tokens,
            words,
        })
    }

    /// Whether models of this kind begin a text with BOS when their file does not say.
    pub(super) fn adds_bos(&self) -> bool {
        self.pre_tokenizer.adds_bos
    }

    /// Appends the tokens of text that holds no special token.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let mut merger = Merger::new();
        let mut seen: HashMap<&str, (usize, usize)> = HashMap::new();
        for word in self.pre_tokenizer.split(text) {
            if let Some(&(start, end)) = seen.get(word) {
                ids.extend_from_within(start..end);
                continue;
            }
            let start = ids.len();
            self.encode_word(word, &mut merger, ids);
            if word.len() <= CACHED_WORD_BYTES {
                seen.insert(word, (start, ids.len()));
            }
        }
    }

    fn encode_word(&self, word: &str, merger: &mut Merger<u32, u32>, ids: &mut Vec<u32>) {
        if let Some(&id) = self.words.get(word.as_bytes()) {
            ids.push(id);
            return;
        }
        // A byte without a token disappears, as in Hugging Face's BPE without an unknown token.
        let bytes = word
            .bytes()
            .filter_map(|byte| self.byte_tokens[usize::from(byte)]);
        let merged = merger.run(bytes, |left, right| {
            self.merges
                .get(&(left, right))
                .map(|merge| (merge.rank, merge.merged))
        });
        ids.extend(merged);
    }
}

/// The merges by the ids of their parts. One whose parts or result are not in the vocabulary can never apply.
fn ranked_merges(
    merges: &[String],
    ids: &HashMap<&str, u32>,
) -> Result<HashMap<(u32, u32), Merge>, TokenizerError> {
    let mut ranked = HashMap::with_capacity(merges.len());
    let mut unusable = 0_usize;
    for (index, text) in merges.iter().enumerate() {
        let (left, right) = text
            .split_once(' ')
            .filter(|(left, right)| !left.is_empty() && !right.is_empty() && !right.contains(' '))
            .ok_or_else(|| TokenizerError::MalformedMerge {
                index,
                text: text.chars().take(40).collect(),
            })?;
        let joined = [left, right].concat();
        match (
            ids.get(left),
            ids.get(right),
            ids.get(joined.as_str()),
            u32::try_from(index),
        ) {
            (Some(&left), Some(&right), Some(&merged), Ok(rank)) => {
                ranked
                    .entry((left, right))
                    .or_insert(Merge { rank, merged });
            }
            _ => unusable += 1,
        }
    }
    if unusable > 0 {
        tracing::warn!(
            unusable,
            merges = merges.len(),
            "merges of tokens that the vocabulary does not hold"
        );
    }
    Ok(ranked)
}
