//! SentencePiece unigram (`tokenizer.ggml.model` = `t5` or `unigram`): the most probable split of the whole text.
//!
//! Viterbi over the positions between characters (Kudo, "Subword Regularization", 2018, section 3.2): the best path
//! to a position is the best path to an earlier one plus the log probability of the piece between.

use std::collections::HashMap;

use ktx_gguf::Metadata;

use super::charsmap::Charsmap;
use super::spm::{Fallback, UnknownRun, mark_spaces};
use super::vocabulary::{TokenType, Vocabulary};
use super::{SPACE_MARK, TokenizerError};

/// How much less probable than the rarest piece a character without a piece is (SentencePiece's `kUnkPenalty`).
const UNKNOWN_PENALTY: f64 = 10.0;

/// A unigram vocabulary with its normaliser.
pub(super) struct Unigram {
    trie: Trie,
    scores: Vec<f64>,
    unknown_score: f64,
    fallback: Fallback,
    normalizer: Normalizer,
}

struct Normalizer {
    charsmap: Option<Charsmap>,
    prefixes_space: bool,
    removes_extra_spaces: bool,
}

/// The best path to a position: its score, where its last piece starts, and that piece.
#[derive(Clone, Copy)]
struct Step {
    score: f64,
    start: usize,
    piece: Option<u32>,
}

impl Unigram {
    pub(super) fn from_metadata(
        metadata: &Metadata,
        vocabulary: &Vocabulary,
        scores: &[f32],
        fallback: Fallback,
        prefixes_space: bool,
    ) -> Result<Self, TokenizerError> {
        let charsmap = match metadata.i32s("tokenizer.ggml.precompiled_charsmap")? {
            Some(values) if !values.is_empty() => Some(Charsmap::from_values(&values)?),
            _ => None,
        };
        let removes_extra_spaces = metadata
            .bool("tokenizer.ggml.remove_extra_whitespaces")?
            .unwrap_or(false);
        let mut trie = Trie::default();
        let mut lowest = 0.0_f64;
        for (id, text) in vocabulary.mergeable() {
            trie.insert(text.as_bytes(), id);
            lowest = lowest.min(f64::from(scores[id as usize]));
        }
        let score = |(id, _, kind)| match kind {
            TokenType::UserDefined => 0.0,
            _ => f64::from(scores[id as usize]),
        };
        Ok(Self {
            trie,
            scores: vocabulary.iter().map(score).collect(),
            unknown_score: lowest - UNKNOWN_PENALTY,
            fallback,
            normalizer: Normalizer {
                charsmap,
                prefixes_space,
                removes_extra_spaces,
            },
        })
    }

    /// Appends the tokens of text that holds no special token.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let text = self.normalizer.normalize(text);
        let mut unknown = UnknownRun::default();
        for (piece, start, end) in self.best_path(&text) {
            match piece {
                Some(id) => {
                    unknown = UnknownRun::default();
                    ids.push(id);
                }
                None => self
                    .fallback
                    .encode(&text.as_bytes()[start..end], &mut unknown, ids),
            }
        }
    }

    /// Pieces with the range of text that each covers.
    fn best_path(&self, text: &str) -> Vec<(Option<u32>, usize, usize)> {
        let mut steps: Vec<Option<Step>> = vec![None; text.len() + 1];
        steps[0] = Some(Step {
            score: 0.0,
            start: 0,
            piece: None,
        });
        for (start, character) in text.char_indices() {
            let Some(before) = steps[start] else { continue };
            let character_end = start + character.len_utf8();
            let mut covers_character = false;
            for (length, id) in self.trie.prefixes(&text.as_bytes()[start..]) {
                covers_character |= start + length == character_end;
                let score = before.score + self.scores[id as usize];
                improve(
                    &mut steps[start + length],
                    Step {
                        score,
                        start,
                        piece: Some(id),
                    },
                );
            }
            if !covers_character {
                let score = before.score + self.unknown_score;
                improve(
                    &mut steps[character_end],
                    Step {
                        score,
                        start,
                        piece: None,
                    },
                );
            }
        }
        let mut path = Vec::new();
        let mut end = text.len();
        while let (true, Some(step)) = (end > 0, steps[end]) {
            path.push((step.piece, step.start, end));
            end = step.start;
        }
        path.reverse();
        path
    }
}

fn improve(best: &mut Option<Step>, challenger: Step) {
    if best.is_none_or(|champion| challenger.score > champion.score) {
        *best = Some(challenger);
    }
}

impl Normalizer {
    fn normalize(&self, text: &str) -> String {
        let mapped = match &self.charsmap {
            Some(charsmap) => charsmap.apply(text),
            None => text.to_owned(),
        };
        if !self.removes_extra_spaces {
            return mark_spaces(&mapped, self.prefixes_space);
        }
        let words: Vec<&str> = mapped.split(' ').filter(|word| !word.is_empty()).collect();
        if words.is_empty() {
            return String::new();
        }
        let mut marked = mark_spaces(&words.join(" "), self.prefixes_space);
        // SentencePiece removes trailing spaces after marking them, so marks of the text itself go too.
        marked.truncate(marked.trim_end_matches(SPACE_MARK).len());
        marked
    }
}

/// Pieces by their bytes.
#[derive(Default)]
struct Trie {
    children: HashMap<(u32, u8), u32>,
    /// The piece that ends at a node, by node; node 0 is the root.
    pieces: Vec<Option<u32>>,
}

impl Trie {
    fn insert(&mut self, text: &[u8], id: u32) {
        if self.pieces.is_empty() {
            self.pieces.push(None);
        }
        let mut node = 0;
        for &byte in text {
            let next = self.pieces.len() as u32;
            node = *self.children.entry((node, byte)).or_insert(next);
            if node == next {
                self.pieces.push(None);
            }
        }
        self.pieces[node as usize].get_or_insert(id);
    }

    /// The pieces that `text` starts with, and their lengths, the shortest first.
    fn prefixes(&self, text: &[u8]) -> impl Iterator<Item = (usize, u32)> {
        let mut node = 0;
        text.iter()
            .map_while(move |&byte| {
                node = *self.children.get(&(node, byte))?;
                Some(self.pieces[node as usize])
            })
            .enumerate()
            .filter_map(|(index, piece)| Some((index + 1, piece?)))
    }
}
