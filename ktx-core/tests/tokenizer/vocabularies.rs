//! Vocabularies for the tests: the built-in model's, and metadata made in memory.

use std::path::PathBuf;

use ktx_core::tokenizer::Tokenizer;
use ktx_gguf::{Array, Gguf, Metadata, Value};

/// The built-in model's file and goldens, which lie beside the crate in the repository but not in its package.
pub fn models() -> Option<PathBuf> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../models");
    if folder.join("pip-17m.gguf").is_file() {
        return Some(folder);
    }
    eprintln!(
        "skipped: {} is not here (the crate's package does not carry it)",
        folder.join("pip-17m.gguf").display()
    );
    None
}

/// The built-in model's metadata.
pub fn pip() -> Option<Metadata> {
    let file = Gguf::open(models()?.join("pip-17m.gguf")).expect("the built-in model opens");
    Some(file.metadata().clone())
}

/// Metadata with these entries.
pub fn metadata(entries: Vec<(&str, Value)>) -> Metadata {
    let entries = entries
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    Metadata::from_entries("test.gguf", entries).expect("no key is there twice")
}

pub fn strings(texts: impl IntoIterator<Item = impl Into<String>>) -> Value {
    Value::Array(Array::String(texts.into_iter().map(Into::into).collect()))
}

pub fn text(text: &str) -> Value {
    Value::String(text.to_owned())
}

/// A byte-level vocabulary: the 256 bytes, what the merges make, then special tokens.
pub struct ByteLevel {
    pub tokens: Vec<String>,
    pub merges: Vec<String>,
    pub special: Vec<String>,
}

impl ByteLevel {
    /// The first merges of SmolLM2's vocabulary (`smollm2_merges.txt`).
    pub fn smollm2() -> Self {
        let merges: Vec<String> = include_str!("smollm2_merges.txt")
            .lines()
            .filter(|line| !line.is_empty())
            .map(str::to_owned)
            .collect();
        let mut tokens: Vec<String> = byte_characters().map(String::from).collect();
        tokens.extend(merges.iter().map(|merge| merge.replacen(' ', "", 1)));
        let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
            .map(str::to_owned)
            .to_vec();
        Self {
            tokens,
            merges,
            special,
        }
    }

    pub fn metadata(&self, pre_tokenizer: &str) -> Metadata {
        let all = self.tokens.iter().chain(&self.special).cloned();
        let kinds = self
            .tokens
            .iter()
            .map(|_| 1)
            .chain(self.special.iter().map(|_| 3))
            .collect();
        metadata(vec![
            ("tokenizer.ggml.model", text("gpt2")),
            ("tokenizer.ggml.pre", text(pre_tokenizer)),
            ("tokenizer.ggml.tokens", strings(all)),
            ("tokenizer.ggml.token_type", Value::Array(Array::I32(kinds))),
            ("tokenizer.ggml.merges", strings(self.merges.clone())),
        ])
    }

    pub fn tokenizer(&self, pre_tokenizer: &str) -> Tokenizer {
        Tokenizer::from_metadata(&self.metadata(pre_tokenizer))
            .expect("the vocabulary is well formed")
    }
}

/// The characters of the 256 bytes in GPT-2's order: the printable ones, then the others from U+0100 on.
fn byte_characters() -> impl Iterator<Item = char> {
    let printable = ('!'..='~').chain('¡'..='¬').chain('®'..='ÿ');
    printable.chain((0x100..0x144).filter_map(char::from_u32))
}
