//! SentencePiece vocabularies against SentencePiece itself (`make_sentencepiece.py` made the fixture).

use ktx_core::tokenizer::{AddBos, EncodeOptions, SpecialText, StreamDecoder, TokenId, Tokenizer};
use ktx_gguf::{Array, Metadata, Value};
use serde::Deserialize;

use crate::vocabularies::{metadata, strings, text};

#[derive(Deserialize)]
struct Fixture {
    bpe: Vocabulary,
    unigram: Vocabulary,
}

#[derive(Deserialize)]
struct Vocabulary {
    tokens: Vec<String>,
    scores: Vec<f32>,
    types: Vec<i32>,
    /// Base64, with padding.
    #[serde(default)]
    charsmap: String,
    cases: Vec<(String, Vec<u32>)>,
}

impl Vocabulary {
    fn metadata(&self, model: &str, removes_extra_spaces: bool) -> Metadata {
        metadata(vec![
            ("tokenizer.ggml.model", text(model)),
            ("tokenizer.ggml.tokens", strings(self.tokens.clone())),
            (
                "tokenizer.ggml.scores",
                Value::Array(Array::F32(self.scores.clone())),
            ),
            (
                "tokenizer.ggml.token_type",
                Value::Array(Array::I32(self.types.clone())),
            ),
            ("tokenizer.ggml.unknown_token_id", Value::U32(0)),
            ("tokenizer.ggml.bos_token_id", Value::U32(1)),
            ("tokenizer.ggml.eos_token_id", Value::U32(2)),
            ("tokenizer.ggml.add_space_prefix", Value::Bool(true)),
            (
                "tokenizer.ggml.remove_extra_whitespaces",
                Value::Bool(removes_extra_spaces),
            ),
            (
                "tokenizer.ggml.precompiled_charsmap",
                Value::Array(Array::U8(base64(&self.charsmap))),
            ),
        ])
    }
}

fn fixture() -> Fixture {
    serde_json::from_str(include_str!("sentencepiece.json")).expect("the fixture parses")
}

fn base64(text: &str) -> Vec<u8> {
    const ALPHABET: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let digits: Vec<usize> = text
        .bytes()
        .filter_map(|byte| ALPHABET.iter().position(|&digit| digit == byte))
        .collect();
    let mut bytes = Vec::new();
    for group in digits.chunks(4) {
        let bits = group
            .iter()
            .enumerate()
            .fold(0, |bits, (place, digit)| bits | digit << (18 - 6 * place));
        bytes.extend_from_slice(&(bits as u32).to_be_bytes()[1..group.len()]);
    }
    bytes
}

fn assert_agreement(tokenizer: &Tokenizer, cases: &[(String, Vec<u32>)]) {
    assert!(cases.len() > 600);
    let options = EncodeOptions {
        add_bos: AddBos::Never,
        ..EncodeOptions::default()
    };
    for (text, expected) in cases {
        let ids: Vec<u32> = tokenizer
            .encode(text, &options)
            .iter()
            .map(|id| id.0)
            .collect();
        assert_eq!(&ids, expected, "{text:?}");
    }
}

#[test]
fn bpe_with_byte_fallback_agrees_with_sentencepiece() {
    let vocabulary = fixture().bpe;
    let tokenizer = Tokenizer::from_metadata(&vocabulary.metadata("llama", false)).unwrap();
    assert_agreement(&tokenizer, &vocabulary.cases);
}

#[test]
fn unigram_with_normalisation_rules_agrees_with_sentencepiece() {
    let vocabulary = fixture().unigram;
    let tokenizer = Tokenizer::from_metadata(&vocabulary.metadata("unigram", true)).unwrap();
    assert_agreement(&tokenizer, &vocabulary.cases);
}

#[test]
fn decoding_gives_the_text_back_with_byte_fallback() {
    let vocabulary = fixture().bpe;
    let tokenizer = Tokenizer::from_metadata(&vocabulary.metadata("llama", false)).unwrap();
    for (text, ids) in vocabulary
        .cases
        .iter()
        .filter(|(text, _)| !text.contains('▁'))
    {
        let ids: Vec<TokenId> = ids.iter().copied().map(TokenId).collect();
        assert_eq!(&tokenizer.decode(&ids, SpecialText::Skip), text);
    }
}

#[test]
fn space_before_the_first_word_is_kept_when_a_text_is_continued() {
    let vocabulary = fixture().bpe;
    let tokenizer = Tokenizer::from_metadata(&vocabulary.metadata("llama", false)).unwrap();
    let ids = tokenizer.encode("the model", &EncodeOptions::default());
    assert_eq!(ids[0], tokenizer.bos().unwrap());
    let decoded = |mut decoder: StreamDecoder| -> String {
        let text: String = ids.iter().map(|&id| decoder.push(&tokenizer, id)).collect();
        text + &decoder.finish()
    };
    assert_eq!(decoded(StreamDecoder::new()), "the model");
    assert_eq!(decoded(StreamDecoder::continuing()), " the model");
}
