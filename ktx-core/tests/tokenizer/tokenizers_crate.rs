//! Generated strings against Hugging Face's `tokenizers` crate with the same vocabulary.
//!
//! The pre-tokenizers are written here as the models' `tokenizer.json` files have them, look-ahead included.

use std::str::FromStr;

use ktx_core::tokenizer::{AddBos, EncodeOptions, ParseSpecial, Tokenizer};
use serde_json::{Map, Value, json};

use crate::strings::generated;
use crate::vocabularies::{ByteLevel, pip};

const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN35: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const DEEPSEEK_V3: &str = r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##;
const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

fn split(pattern: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false})
}

fn digits(individual: bool) -> Value {
    json!({"type": "Digits", "individual_digits": individual})
}

fn byte_level(splits: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": splits})
}

/// The pre-tokenizer of a `tokenizer.json`, by its name in GGUF files.
fn reference_pre_tokenizer(name: &str) -> Value {
    let steps = match name {
        "llama-bpe" | "glm4" | "chatglm-bpe" => vec![split(LLAMA3), byte_level(false)],
        "qwen2" => vec![split(QWEN2), byte_level(false)],
        "qwen35" => vec![split(QWEN35), byte_level(false)],
        "smollm" => vec![digits(true), byte_level(true)],
        "gpt-2" => vec![byte_level(true)],
        "gpt-4o" => vec![split(GPT_4O), byte_level(false)],
        "tekken" => vec![split(TEKKEN), byte_level(false)],
        "deepseek-v3" => vec![
            split(r"\p{N}{1,3}"),
            split("[一-龥\u{3040}-ゟ゠-ヿ]+"),
            split(DEEPSEEK_V3),
            byte_level(false),
        ],
        "deepseek-llm" => vec![
            split("[\r\n]"),
            split(include_str!("deepseek_letters.txt").trim_end()),
            split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
            split(r"\s+$"),
            split("[一-龥\u{800}-一가-\u{d7ff}]+"),
            digits(true),
            byte_level(false),
        ],
        "deepseek-coder" => vec![
            split("[\r\n]"),
            split(r"\s?\p{L}+"),
            split(r"\s?\p{P}+"),
            split("[一-龥\u{800}-一가-\u{d7ff}]+"),
            digits(true),
            byte_level(false),
        ],
        other => panic!("no reference for {other}"),
    };
    json!({"type": "Sequence", "pretokenizers": steps})
}

/// A tokenizer of the `tokenizers` crate; special tokens follow the others.
fn reference(
    tokens: &[String],
    merges: &[String],
    special: &[(u32, &str)],
    name: &str,
) -> tokenizers::Tokenizer {
    let vocab: Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, text)| (text.clone(), json!(id)))
        .collect();
    let added: Vec<Value> = special
        .iter()
        .map(|(id, text)| {
            json!({"id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": false,
                   "normalized": false, "special": true})
        })
        .collect();
    let whole_words = matches!(name, "llama-bpe" | "glm4" | "tekken");
    let file = json!({
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": reference_pre_tokenizer(name),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": whole_words,
                  "fuse_unk": false, "byte_fallback": false}
    });
    tokenizers::Tokenizer::from_str(&file.to_string()).expect("the reference is well formed")
}

fn assert_agreement(ours: &Tokenizer, theirs: &tokenizers::Tokenizer, name: &str) {
    let options = EncodeOptions {
        add_bos: AddBos::Never,
        parse_special: ParseSpecial::Yes,
    };
    for text in generated() {
        let expected = theirs
            .encode_fast(text.as_str(), false)
            .expect("the reference encodes");
        let ids: Vec<u32> = ours.encode(&text, &options).iter().map(|id| id.0).collect();
        assert_eq!(ids, expected.get_ids(), "{name}: {text:?}");
    }
}

#[test]
fn built_in_vocabulary_agrees_on_generated_strings() {
    let Some(metadata) = pip() else { return };
    let tokens = metadata.strings("tokenizer.ggml.tokens").unwrap().unwrap();
    let merges = metadata.strings("tokenizer.ggml.merges").unwrap().unwrap();
    let special: Vec<(u32, &str)> = (0..5)
        .map(|id| (id, tokens[id as usize].as_str()))
        .collect();
    let theirs = reference(tokens, merges, &special, "deepseek-v3");
    assert_agreement(
        &Tokenizer::from_metadata(&metadata).unwrap(),
        &theirs,
        "deepseek-v3",
    );
}

#[test]
fn every_referenced_pre_tokenizer_agrees_on_generated_strings() {
    let vocabulary = ByteLevel::smollm2();
    let first_special = vocabulary.tokens.len() as u32;
    let special: Vec<(u32, &str)> = (first_special..)
        .zip(vocabulary.special.iter().map(String::as_str))
        .collect();
    for name in [
        "llama-bpe",
        "glm4",
        "chatglm-bpe",
        "qwen2",
        "qwen35",
        "smollm",
        "gpt-2",
        "gpt-4o",
        "tekken",
        "deepseek-v3",
        "deepseek-llm",
        "deepseek-coder",
    ] {
        let theirs = reference(&vocabulary.tokens, &vocabulary.merges, &special, name);
        assert_agreement(&vocabulary.tokenizer(name), &theirs, name);
    }
}
