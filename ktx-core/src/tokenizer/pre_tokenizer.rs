//! Splitting text into words before byte-level BPE, as `tokenizer.ggml.pre` names it.
//!
//! A pre-tokenizer is a sequence of patterns; each splits every piece of the one before into its matches and what
//! lies between them. The patterns are those of the models' `tokenizer.json` files (`Split` with behaviour
//! `Isolated`, `Digits` and `ByteLevel`), so they are part of the format.
//!
//! Nearly all of them end in `\s+(?!\S)|\s+`: a run of white space leaves its last character to the word that
//! follows. The look-ahead is the only part that is not regular. It is taken out of the pattern and applied to the
//! match, so that matching takes linear time on every text and cannot fail.

use std::ops::Range;

use regex::Regex;

const LOOK_AHEAD: &str = r"|\s+(?!\S)|\s+";

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const QWEN2: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const QWEN35: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}",
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const SEED_CODER: &str = concat!(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const BAILING: &str = concat!(
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
);
const DEEPSEEK_V3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const GPT_4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
const KIMI_K2: &str = concat!(
    r"\p{Han}+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
);
/// The cased letters that DeepSeek's first tokenizers list one by one.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[",
    r"A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}",
    r"\u{295}-\u{2AF}\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\u{38C}",
    r"\u{38E}-\u{3A1}\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}-\u{10C5}",
    r"\u{13A0}-\u{13F5}\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}",
    r"\u{1D6B}-\u{1D77}\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\u{1F45}",
    r"\u{1F48}-\u{1F4D}\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}",
    r"\u{1FB6}-\u{1FBC}\u{1FBE}\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}",
    r"\u{1FE0}-\u{1FEC}\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}",
    r"\u{2119}-\u{211D}\u{2124}\u{2126}\u{2128}\u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}",
    r"\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}\u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}",
    r"\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}\u{A680}-\u{A69B}\u{A722}-\u{A76F}",
    r"\u{A771}-\u{A787}\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}",
    r"\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\u{10400}-\u{1044F}\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}",
    r"\u{10C80}-\u{10CB2}\u{10CC0}-\u{10CF2}\u{118A0}-\u{118DF}\u{1E900}-\u{1E943}",
    r"]+",
);
/// Chinese ideographs, kana and Hangul among others, as the same tokenizers write them.
const CJK: &str = r"[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+";

const KANA_AND_HAN: &str = r"[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+";
const DEEPSEEK_PUNCTUATION: &str =
    r"\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+";

/// The names of one pre-tokenizer, its patterns, and what else its models have in common.
struct Entry {
    names: &'static [&'static str],
    patterns: &'static [&'static str],
    whole_words: bool,
    adds_bos: bool,
}

const fn entry(names: &'static [&'static str], patterns: &'static [&'static str]) -> Entry {
    Entry {
        names,
        patterns,
        whole_words: false,
        adds_bos: false,
    }
}

impl Entry {
    const fn with_whole_words(self) -> Self {
        Self {
            whole_words: true,
            ..self
        }
    }

    const fn with_bos(self) -> Self {
        Self {
            adds_bos: true,
            ..self
        }
    }
}

const ENTRIES: &[Entry] = &[
    entry(
        &[
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        &[LLAMA3],
    )
    .with_whole_words()
    .with_bos(),
    entry(&["dbrx", "smaug-bpe"], &[LLAMA3]),
    entry(&["chatglm-bpe"], &[LLAMA3]),
    entry(&["glm4", "glm5"], &[LLAMA3]).with_whole_words(),
    entry(
        &[
            "smollm",
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        &[r"\p{N}", GPT2],
    ),
    entry(
        &[
            "gpt-2",
            "phi-2",
            "mpt",
            "olmo",
            "jais",
            "gigachat",
            "mellum",
            "modern-bert",
            "exaone4",
            "trillion",
        ],
        &[GPT2],
    ),
    entry(
        &[
            "qwen2",
            "deepseek-r1-qwen",
            "stablelm2",
            "megrez",
            "hunyuan",
            "solar-open",
            "grok-2",
            "kormo",
        ],
        &[QWEN2],
    ),
    entry(&["qwen35"], &[QWEN35]),
    entry(&["seed-coder"], &[SEED_CODER]),
    entry(&["bailingmoe", "bailingmoe2", "llada-moe"], &[BAILING]),
    entry(
        &["deepseek-llm"],
        &[
            "[\r\n]",
            DEEPSEEK_LETTERS,
            DEEPSEEK_PUNCTUATION,
            r"\s+$",
            CJK,
            r"\p{N}",
        ],
    ),
    entry(
        &["deepseek-coder"],
        &["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}"],
    ),
    entry(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &[r"\p{N}{1,3}", KANA_AND_HAN, DEEPSEEK_V3],
    ),
    entry(&["gpt-4o", "llama4", "kanana2", "minimax-m2"], &[GPT_4O]),
    entry(&["tekken"], &[TEKKEN]).with_whole_words().with_bos(),
    entry(&["kimi-k2"], &[KIMI_K2]),
    entry(
        &["falcon"],
        &[r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"],
    ),
    entry(
        &["default"],
        &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    ),
];

/// The names of all pre-tokenizers, sorted.
pub(super) fn supported() -> Vec<&'static str> {
    let mut names: Vec<_> = ENTRIES
        .iter()
        .flat_map(|entry| entry.names)
        .copied()
        .collect();
    names.sort_unstable();
    names
}

/// What a match of nothing but white space, followed by a word, becomes.
#[derive(Clone, Copy, PartialEq)]
enum WhiteSpace {
    /// It stays as it is.
    Whole,
    /// Its last character is left to the word.
    LeavesLast,
    /// The same, unless it ends in a line break: then `\s*[\r\n]+` has matched, not `\s+`.
    LeavesLastUnlessLineBreak,
}

/// One pattern of a pre-tokenizer.
struct Stage {
    pattern: Regex,
    white_space: WhiteSpace,
}

/// Splits text into the words within which tokens are merged.
pub(super) struct PreTokenizer {
    stages: Vec<Stage>,
    /// Whether a word that is a token as a whole is taken as that token, without merging.
    pub(super) whole_words: bool,
    /// Whether its models begin a text with BOS when their file does not say.
    pub(super) adds_bos: bool,
}

impl PreTokenizer {
    /// The pre-tokenizer of that name, if it is known.
    pub(super) fn named(name: &str) -> Option<Self> {
        let entry = ENTRIES.iter().find(|entry| entry.names.contains(&name))?;
        let stages = entry
            .patterns
            .iter()
            .map(|pattern| Stage::new(pattern))
            .collect();
        Some(Self {
            stages,
            whole_words: entry.whole_words,
            adds_bos: entry.adds_bos,
        })
    }

    /// The words of `text`, in order; together they are the text.
    pub(super) fn split<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut pieces = vec![text];
        for stage in &self.stages {
            let mut finer = Vec::with_capacity(pieces.len() * 2);
            for piece in pieces {
                stage.split(piece, &mut finer);
            }
            pieces = finer;
        }
        pieces
    }
}

impl Stage {
    fn new(pattern: &str) -> Self {
        let (regular, white_space) = match pattern.strip_suffix(LOOK_AHEAD) {
            None => (pattern.to_owned(), WhiteSpace::Whole),
            Some(rest) if rest.contains(r"|\s*[\r\n]") => (
                format!(r"{rest}|\s+"),
                WhiteSpace::LeavesLastUnlessLineBreak,
            ),
            Some(rest) => (format!(r"{rest}|\s+"), WhiteSpace::LeavesLast),
        };
        let pattern = Regex::new(&regular).expect("a test builds every pre-tokenizer of the table");
        Self {
            pattern,
            white_space,
        }
    }

    fn split<'t>(&self, text: &'t str, pieces: &mut Vec<&'t str>) {
        let mut start = 0;
        while let Some(found) = self.pattern.find_at(text, start) {
            let found = self.shortened(text, found.range());
            if found.start > start {
                pieces.push(&text[start..found.start]);
            }
            pieces.push(&text[found.clone()]);
            start = found.end;
        }
        if start < text.len() {
            pieces.push(&text[start..]);
        }
    }

    /// Applies `\s+(?!\S)`: white space before a word ends one character earlier, unless it is one character.
    fn shortened(&self, text: &str, found: Range<usize>) -> Range<usize> {
        if self.white_space == WhiteSpace::Whole || found.end == text.len() {
            return found;
        }
        let mut characters = text[found.clone()].char_indices();
        let Some((last, character)) = characters.next_back() else {
            return found;
        };
        let stays = matches!(character, '\r' | '\n')
            && self.white_space == WhiteSpace::LeavesLastUnlessLineBreak;
        let is_white_space =
            character.is_whitespace() && characters.all(|(_, character)| character.is_whitespace());
        if last == 0 || stays || !is_white_space {
            found
        } else {
            found.start..found.start + last
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pre_tokenizer_of_the_table_builds_and_loses_no_text() {
        let text = "It's  100,000 \u{4f60}\u{597d}\t\r\n  x \u{0}\u{10ffff} end  ";
        for name in supported() {
            let words = PreTokenizer::named(name)
                .expect("a name of the table")
                .split(text);
            assert_eq!(words.concat(), text, "{name}");
            assert!(words.iter().all(|word| !word.is_empty()), "{name}");
        }
    }

    #[test]
    fn white_space_leaves_its_last_character_to_the_word_after_it() {
        let gpt2 = PreTokenizer::named("gpt-2").unwrap();
        assert_eq!(gpt2.split("a   b"), ["a", "  ", " b"]);
        assert_eq!(gpt2.split("a\n\nb  "), ["a", "\n", "\n", "b", "  "]);
        let llama = PreTokenizer::named("llama-bpe").unwrap();
        assert_eq!(llama.split("a \n\n b  "), ["a", " \n\n", " b", "  "]);
        assert_eq!(llama.split("1234567 I'M"), ["123", "456", "7", " I", "'M"]);
    }
}
