//! Tokens that are found in text by their whole name, and tokens that end a generation.

use aho_corasick::{AhoCorasick, MatchKind};
use ktx_gguf::Metadata;

use super::vocabulary::{TokenType, Vocabulary};
use super::{ParseSpecial, TokenizerError};

/// A stretch of text, or a special token that stood between.
pub(super) enum Fragment<'t> {
    Text(&'t str),
    Token(u32),
}

/// Finds special tokens in text: leftmost first, of several at one place the longest.
pub(super) struct SpecialTokens {
    user_defined: Matcher,
    all: Matcher,
}

#[derive(Default)]
struct Matcher {
    automaton: Option<AhoCorasick>,
    ids: Vec<u32>,
}

impl SpecialTokens {
    pub(super) fn new(vocabulary: &Vocabulary) -> Result<Self, TokenizerError> {
        let matcher = |wanted: &dyn Fn(TokenType) -> bool| {
            Matcher::new(
                vocabulary
                    .iter()
                    .filter(|&(_, text, kind)| !text.is_empty() && wanted(kind)),
            )
        };
        Ok(Self {
            user_defined: matcher(&|kind| kind == TokenType::UserDefined)?,
            all: matcher(&|kind| {
                matches!(
                    kind,
                    TokenType::UserDefined | TokenType::Control | TokenType::Unknown
                )
            })?,
        })
    }

    pub(super) fn split<'t>(&self, text: &'t str, parse: ParseSpecial) -> Vec<Fragment<'t>> {
        let matcher = match parse {
            ParseSpecial::Yes => &self.all,
            ParseSpecial::No => &self.user_defined,
        };
        matcher.split(text)
    }
}

impl Matcher {
    fn new<'v>(
        tokens: impl Iterator<Item = (u32, &'v str, TokenType)>,
    ) -> Result<Self, TokenizerError> {
        let (ids, texts): (Vec<u32>, Vec<&str>) = tokens.map(|(id, text, _)| (id, text)).unzip();
        if ids.is_empty() {
            return Ok(Self::default());
        }
        let automaton = AhoCorasick::builder()
            .match_kind(MatchKind::LeftmostLongest)
            .build(texts)
            .map_err(|error| TokenizerError::SpecialTokens(error.to_string()))?;
        Ok(Self {
            automaton: Some(automaton),
            ids,
        })
    }

    fn split<'t>(&self, text: &'t str) -> Vec<Fragment<'t>> {
        let mut fragments = Vec::new();
        let mut start = 0;
        for found in self
            .automaton
            .iter()
            .flat_map(|automaton| automaton.find_iter(text))
        {
            if found.start() > start {
                fragments.push(Fragment::Text(&text[start..found.start()]));
            }
            fragments.push(Fragment::Token(self.ids[found.pattern().as_usize()]));
            start = found.end();
        }
        if start < text.len() {
            fragments.push(Fragment::Text(&text[start..]));
        }
        fragments
    }
}

/// Texts of tokens that end a turn or a text in published models, whatever their file says of them.
const END_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
];

/// Tokens of fill-in-the-middle and repository formats: a model that writes one has left the answer.
const END_OF_FILE_TEXTS: &[&str] = &[
    "<|fim_pad|>",
    "<fim-pad>",
    "<fim_pad>",
    "<|fim_repo|>",
    "<|repo_name|>",
    "<fim-repo>",
    "<reponame>",
    "<|file_sep|>",
];

const END_KEYS: &[&str] = &[
    "tokenizer.ggml.eos_token_id",
    "tokenizer.ggml.eot_token_id",
    "tokenizer.ggml.eom_token_id",
    "tokenizer.ggml.fim_pad_token_id",
    "tokenizer.ggml.fim_rep_token_id",
    "tokenizer.ggml.fim_sep_token_id",
];

/// The id that a key names, checked against the vocabulary. Some writers use all ones for "none".
pub(super) fn token_id(
    metadata: &Metadata,
    vocabulary: &Vocabulary,
    key: &'static str,
) -> Result<Option<u32>, TokenizerError> {
    match metadata.i64(key)? {
        None | Some(-1) | Some(0xFFFF_FFFF) => Ok(None),
        Some(id) => match u32::try_from(id) {
            Ok(id) if (id as usize) < vocabulary.len() => Ok(Some(id)),
            _ => Err(TokenizerError::TokenOutOfRange {
                key,
                id: id as u32,
                tokens: vocabulary.len(),
            }),
        },
    }
}

/// The tokens after which a generation is over, sorted: those that the file names, and those known by their text.
///
/// Tokens known by their text are made control tokens, because some files state them as plain text. A token that
/// merging makes out of text is left alone: Qwen's `</s>` is a piece of HTML.
pub(super) fn end_of_generation(
    metadata: &Metadata,
    vocabulary: &mut Vocabulary,
) -> Result<Vec<u32>, TokenizerError> {
    let mut ends = Vec::new();
    for key in END_KEYS {
        ends.extend(token_id(metadata, vocabulary, key)?);
    }
    let with_text = |texts: &[&str]| -> Vec<u32> {
        vocabulary
            .iter()
            .filter(|(_, text, _)| texts.contains(text))
            .map(|(id, ..)| id)
            .collect()
    };
    let mut by_text = with_text(END_TEXTS);
    by_text.retain(|&id| {
        vocabulary.kind(id) != Some(TokenType::Normal)
            || !is_made_by_merging(metadata, vocabulary, id)
    });
    ends.extend(with_text(END_OF_FILE_TEXTS));
    ends.extend(&by_text);

    let holds = |text: &str| ends.iter().any(|&id| vocabulary.text(id) == Some(text));
    // Where a model ends its turns with other tokens, these two are parts of an answer.
    let end_of_message_only =
        (holds("<|return|>") && holds("<|call|>")) || (holds("<|flush|>") && holds("<|calls|>"));
    let plain_text_only = holds("<|tool_response>") || holds("<|plamo:eos|>");
    let mut kinds = Vec::new();
    ends.retain(|&id| {
        let (keep, kind) = match vocabulary.text(id) {
            Some("<|end|>") if end_of_message_only => (false, TokenType::UserDefined),
            Some("</s>") if plain_text_only => (false, TokenType::Normal),
            _ => (true, TokenType::Control),
        };
        if !keep || by_text.contains(&id) {
            kinds.push((id, kind));
        }
        keep
    });
    for (id, kind) in kinds {
        vocabulary.set_kind(id, kind);
    }
    ends.sort_unstable();
    ends.dedup();
    Ok(ends)
}

fn is_made_by_merging(metadata: &Metadata, vocabulary: &Vocabulary, id: u32) -> bool {
    let merges = metadata
        .strings("tokenizer.ggml.merges")
        .ok()
        .flatten()
        .unwrap_or_default();
    let Some(text) = vocabulary.text(id) else {
        return false;
    };
    merges
        .iter()
        .filter(|merge| merge.len() == text.len() + 1)
        .any(|merge| merge.replacen(' ', "", 1) == text)
}
