//! SentencePiece BPE (`tokenizer.ggml.model` = `llama`): neighbours are merged by the score of what they make.

use std::cmp::Reverse;
use std::collections::HashMap;

use super::SPACE_MARK;
use super::byte_level::ByteTokens;
use super::merge::Merger;
use super::vocabulary::Vocabulary;

/// Words up to this length are looked up among those already encoded in the same text.
const CACHED_WORD_BYTES: usize = 64;

/// A symbol is the place of its text, so that characters outside the vocabulary can stand in the list too.
type Span = (usize, usize);

/// A SentencePiece vocabulary that merges by score.
pub(super) struct ScoredMerging {
    pieces: HashMap<Box<str>, Piece>,
    longest_piece: usize,
    /// Whether a piece holds a space mark after another character, so that words cannot be encoded one by one.
    spans_words: bool,
    fallback: Fallback,
    prefixes_space: bool,
}

#[derive(Clone, Copy)]
struct Piece {
    id: u32,
    priority: Priority,
}

/// A score, the highest first.
type Priority = Reverse<i32>;

impl ScoredMerging {
    pub(super) fn new(
        vocabulary: &Vocabulary,
        scores: &[f32],
        fallback: Fallback,
        prefixes_space: bool,
    ) -> Self {
        let mut pieces: HashMap<Box<str>, Piece> = HashMap::with_capacity(vocabulary.len());
        for (id, text) in vocabulary.mergeable() {
            let priority = Reverse(ordered(scores[id as usize]));
            pieces.entry(text.into()).or_insert(Piece { id, priority });
        }
        let longest_piece = pieces.keys().map(|text| text.len()).max().unwrap_or(0);
        let spans_words = pieces.keys().any(|text| end_of_word(text) < text.len());
        Self {
            pieces,
            longest_piece,
            spans_words,
            fallback,
            prefixes_space,
        }
    }

    /// Appends the tokens of text that holds no special token.
    pub(super) fn encode(&self, text: &str, ids: &mut Vec<u32>) {
        let text = mark_spaces(text, self.prefixes_space);
        let mut merger = Merger::new();
        let mut unknown = UnknownRun::default();
        let mut seen: HashMap<&str, (usize, usize)> = HashMap::new();
        for word in self.words(&text) {
            if let Some(&(start, end)) = seen.get(word) {
                unknown = UnknownRun::default();
                ids.extend_from_within(start..end);
                continue;
            }
            let start = ids.len();
            let is_covered = self.encode_word(word, &mut merger, &mut unknown, ids);
            if is_covered && word.len() <= CACHED_WORD_BYTES {
                seen.insert(word, (start, ids.len()));
            }
        }
    }

    /// Stretches that no piece reaches across; the whole text where pieces hold spaces in the middle.
    fn words<'t>(&self, text: &'t str) -> impl Iterator<Item = &'t str> {
        let mut rest = text;
        std::iter::from_fn(move || {
            let end = if self.spans_words {
                rest.len()
            } else {
                end_of_word(rest)
            };
            let (word, others) = rest.split_at(end);
            rest = others;
            (!word.is_empty()).then_some(word)
        })
    }

    /// Whether pieces cover the whole word.
    fn encode_word(
        &self,
        word: &str,
        merger: &mut Merger<Span, Priority>,
        unknown: &mut UnknownRun,
        ids: &mut Vec<u32>,
    ) -> bool {
        let characters = word
            .char_indices()
            .map(|(start, character)| (start, start + character.len_utf8()));
        let merged = merger.run(characters, |left: Span, right: Span| {
            let span = (left.0, right.1);
            Some((self.piece(&word[span.0..span.1])?.priority, span))
        });
        let mut is_covered = true;
        for (start, end) in merged {
            match self.piece(&word[start..end]) {
                Some(piece) => {
                    *unknown = UnknownRun::default();
                    ids.push(piece.id);
                }
                None => {
                    is_covered = false;
                    self.fallback
                        .encode(&word.as_bytes()[start..end], unknown, ids);
                }
            }
        }
        is_covered
    }

    fn piece(&self, text: &str) -> Option<Piece> {
        if text.len() > self.longest_piece {
            None
        } else {
            self.pieces.get(text).copied()
        }
    }
}

/// Where the first word ends: before the first space mark that follows another character.
fn end_of_word(text: &str) -> usize {
    let mut after_text = false;
    for (index, character) in text.char_indices() {
        let is_space = character == SPACE_MARK;
        if is_space && after_text {
            return index;
        }
        after_text = !is_space;
    }
    text.len()
}

/// A number that orders as the score does; scores that are not numbers come first or last, never panic.
fn ordered(score: f32) -> i32 {
    // Adding zero turns -0.0 into 0.0: the two are one score.
    let bits = (score + 0.0).to_bits().cast_signed();
    bits ^ (((bits >> 31).cast_unsigned()) >> 1).cast_signed()
}

/// The text with U+2581 for spaces, and one in front if the vocabulary asks for it.
pub(super) fn mark_spaces(text: &str, prefixes_space: bool) -> String {
    let mut marked = String::with_capacity(text.len() * 2);
    if prefixes_space {
        marked.push(SPACE_MARK);
    }
    marked.extend(text.chars().map(|character| {
        if character == ' ' {
            SPACE_MARK
        } else {
            character
        }
    }));
    marked
}

/// What becomes of text that no piece covers: its bytes, or the unknown token once for the whole run.
pub(super) struct Fallback {
    byte_tokens: ByteTokens,
    unknown: Option<u32>,
}

/// Whether the last token was the unknown one, which stands for everything unknown in a row.
#[derive(Default)]
pub(super) struct UnknownRun {
    open: bool,
}

impl Fallback {
    pub(super) fn new(vocabulary: &Vocabulary, unknown: Option<u32>) -> Self {
        Self {
            byte_tokens: vocabulary.byte_tokens(),
            unknown,
        }
    }

    pub(super) fn encode(&self, bytes: &[u8], run: &mut UnknownRun, ids: &mut Vec<u32>) {
        let tokens: Option<Vec<u32>> = bytes
            .iter()
            .map(|&byte| self.byte_tokens[usize::from(byte)])
            .collect();
        match (tokens, self.unknown) {
            (Some(tokens), _) => {
                run.open = false;
                ids.extend(tokens);
            }
            (None, Some(unknown)) if !run.open => {
                run.open = true;
                ids.push(unknown);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::ordered;

    #[test]
    fn scores_order_as_numbers() {
        let scores = [
            f32::NEG_INFINITY,
            -1e30,
            -2.5,
            -1.0,
            -1e-40,
            0.0,
            1e-40,
            1.0,
            3.5,
            f32::INFINITY,
        ];
        for pair in scores.windows(2) {
            assert!(ordered(pair[0]) < ordered(pair[1]), "{pair:?}");
        }
        assert_eq!(ordered(-0.0), ordered(0.0));
    }
}
