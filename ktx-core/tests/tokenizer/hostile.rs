//! Metadata and texts that are damaged or made to harm: an error that names the key, or a result, never a panic.

use ktx_core::tokenizer::{
    AddBos, EncodeOptions, ParseSpecial, SpecialText, StreamDecoder, TokenId, Tokenizer,
    TokenizerError,
};
use ktx_gguf::{Array, Metadata, Value};
use proptest::prelude::*;

use crate::vocabularies::{ByteLevel, metadata, strings, text};

/// A small byte-level vocabulary, with some entries replaced.
fn changed(changes: Vec<(&str, Value)>) -> Metadata {
    let vocabulary = ByteLevel::smollm2();
    let mut entries: Vec<(String, Value)> = vocabulary
        .metadata("smollm")
        .iter()
        .map(|(key, value)| (key.to_owned(), value.clone()))
        .collect();
    for (key, value) in changes {
        entries.retain(|(present, _)| present != key);
        entries.push((key.to_owned(), value));
    }
    Metadata::from_entries("test.gguf", entries).unwrap()
}

fn message(metadata: &Metadata) -> String {
    Tokenizer::from_metadata(metadata)
        .expect_err("the metadata is damaged")
        .to_string()
}

#[test]
fn unknown_pre_tokenizer_is_named_with_the_supported_ones() {
    let message = message(&changed(vec![("tokenizer.ggml.pre", text("made-up"))]));
    assert!(
        message.contains("tokenizer.ggml.pre is 'made-up'"),
        "{message}"
    );
    assert!(
        message.contains("deepseek-v3, default, exaone"),
        "{message}"
    );
}

#[test]
fn unknown_kind_of_tokenizer_is_named_with_the_supported_ones() {
    let message = message(&changed(vec![("tokenizer.ggml.model", text("bert"))]));
    assert!(
        message.contains("'bert'") && message.contains("gpt2 (byte-level BPE)"),
        "{message}"
    );
}

#[test]
fn damaged_metadata_is_an_error_that_names_the_key() {
    let cases = [
        (
            "tokenizer.ggml.tokens",
            strings(Vec::<String>::new()),
            "tokenizer.ggml.tokens has 0 entries",
        ),
        (
            "tokenizer.ggml.tokens",
            Value::U32(7),
            "tokenizer.ggml.tokens",
        ),
        (
            "tokenizer.ggml.token_type",
            Value::Array(Array::I32(vec![1, 2])),
            "tokenizer.ggml.token_type has 2 entries",
        ),
        (
            "tokenizer.ggml.merges",
            strings(["a b", "ab"]),
            "tokenizer.ggml.merges[1] is \"ab\"",
        ),
        (
            "tokenizer.ggml.merges",
            strings([" b"]),
            "tokenizer.ggml.merges[0]",
        ),
        (
            "tokenizer.ggml.merges",
            strings(["a b c"]),
            "tokenizer.ggml.merges[0]",
        ),
        (
            "tokenizer.ggml.eos_token_id",
            Value::U32(99_999),
            "tokenizer.ggml.eos_token_id is 99999",
        ),
        (
            "tokenizer.ggml.add_bos_token",
            Value::Bool(true),
            "tokenizer.ggml.bos_token_id is missing",
        ),
    ];
    for (key, value, expected) in cases {
        let message = message(&changed(vec![(key, value)]));
        assert!(message.contains(expected), "{message}");
    }
    let nothing = metadata(vec![]);
    assert!(matches!(
        Tokenizer::from_metadata(&nothing),
        Err(TokenizerError::MissingKey {
            key: "tokenizer.ggml.model"
        })
    ));
}

#[test]
fn scores_of_another_length_and_overlong_tokens_are_refused() {
    let sentence_piece = |tokens: Vec<String>, scores: Vec<f32>| {
        metadata(vec![
            ("tokenizer.ggml.model", text("llama")),
            ("tokenizer.ggml.tokens", strings(tokens)),
            ("tokenizer.ggml.scores", Value::Array(Array::F32(scores))),
        ])
    };
    let short = message(&sentence_piece(vec!["a".into(), "b".into()], vec![0.0]));
    assert!(
        short.contains("tokenizer.ggml.scores has 1 entries for 2 tokens"),
        "{short}"
    );
    let long = message(&sentence_piece(vec!["a".repeat(1 << 20)], vec![0.0]));
    assert!(
        long.contains("tokenizer.ggml.tokens[0] is 1048576 bytes long"),
        "{long}"
    );
}

#[test]
fn vocabularies_without_bytes_or_numbers_still_encode_every_text() {
    let odd = metadata(vec![
        ("tokenizer.ggml.model", text("llama")),
        (
            "tokenizer.ggml.tokens",
            strings(["<unk>", "a", "ab", "a", "", "<0xZZ>", "▁b"]),
        ),
        (
            "tokenizer.ggml.scores",
            Value::Array(Array::F32(vec![
                f32::NAN,
                f32::INFINITY,
                f32::NAN,
                -0.0,
                f32::NEG_INFINITY,
                1.0,
                f32::NAN,
            ])),
        ),
        (
            "tokenizer.ggml.token_type",
            Value::Array(Array::I32(vec![2, 1, 1, 4, 3, 6, -77])),
        ),
    ]);
    for model in ["llama", "unigram"] {
        let mut entries: Vec<_> = odd
            .iter()
            .map(|(key, value)| (key.to_owned(), value.clone()))
            .collect();
        entries[0].1 = text(model);
        let odd = Metadata::from_entries("test.gguf", entries).unwrap();
        let tokenizer = Tokenizer::from_metadata(&odd).unwrap();
        for text in ["", "abab ba", "\u{10ffff} 你 b", "<unk><0xZZ>"] {
            let ids = tokenizer.encode(text, &EncodeOptions::rendered_chat());
            assert!(
                ids.iter()
                    .all(|id| (id.0 as usize) < tokenizer.vocab_size())
            );
            tokenizer.decode(&ids, SpecialText::Keep);
        }
    }
}

#[test]
fn damaged_normalisation_maps_are_refused_or_harmless() {
    let with_map = |map: Vec<u8>| {
        metadata(vec![
            ("tokenizer.ggml.model", text("unigram")),
            ("tokenizer.ggml.tokens", strings(["<unk>", "a", "▁"])),
            (
                "tokenizer.ggml.scores",
                Value::Array(Array::F32(vec![0.0, -1.0, -2.0])),
            ),
            (
                "tokenizer.ggml.precompiled_charsmap",
                Value::Array(Array::U8(map)),
            ),
        ])
    };
    for map in [
        vec![1, 2],
        vec![255, 255, 255, 255, 0],
        vec![3, 0, 0, 0, 1, 2, 3],
        vec![0, 0, 0, 0],
    ] {
        let message = message(&with_map(map));
        assert!(
            message.contains("tokenizer.ggml.precompiled_charsmap is damaged"),
            "{message}"
        );
    }
    for seed in 0..200_u32 {
        let noise = (0..64_u32)
            .map(|index| (index.wrapping_mul(seed).wrapping_mul(2_654_435_761) >> 13) as u8);
        let map: Vec<u8> = [32_u8, 0, 0, 0].into_iter().chain(noise).collect();
        let tokenizer = Tokenizer::from_metadata(&with_map(map)).unwrap();
        tokenizer.encode("a b\u{0}\u{ff} \u{10ffff}aaa", &EncodeOptions::default());
    }
}

#[test]
fn a_word_of_a_million_letters_and_a_million_spaces_encode_in_time() {
    let vocabulary = ByteLevel::smollm2();
    let (letters, spaces) = ("abcdefghij".repeat(100_000), " ".repeat(1_000_000));
    for name in ["smollm", "deepseek-v3", "gpt-4o"] {
        let tokenizer = vocabulary.tokenizer(name);
        for text in [&letters, &spaces] {
            let start = std::time::Instant::now();
            let ids = tokenizer.encode(text, &EncodeOptions::default());
            assert!(start.elapsed().as_secs() < 30, "{name}");
            assert_eq!(&tokenizer.decode(&ids, SpecialText::Keep), text, "{name}");
        }
    }
}

#[test]
fn invalid_bytes_from_tokens_become_replacement_characters_and_nothing_is_lost() {
    let tokenizer = ByteLevel::smollm2().tokenizer("smollm");
    let byte = |byte: u8| {
        TokenId(
            (0..256)
                .find(|&id| tokenizer.token_bytes(TokenId(id)) == [byte])
                .unwrap(),
        )
    };
    let ids = [0xF0, 0x9F, b'a', 0xE4, 0xBD, 0xA0, 0xFF, 0xE4].map(byte);
    let mut decoder = StreamDecoder::new();
    let parts: Vec<String> = ids.iter().map(|&id| decoder.push(&tokenizer, id)).collect();
    assert_eq!(parts, ["", "", "\u{fffd}a", "", "", "你", "\u{fffd}", ""]);
    assert_eq!(decoder.finish(), "\u{fffd}");
    assert_eq!(
        tokenizer.decode(&ids, SpecialText::Keep),
        "\u{fffd}a你\u{fffd}\u{fffd}"
    );
}

#[test]
fn end_tokens_are_known_by_key_and_by_text_but_not_when_merging_makes_them() {
    let mut vocabulary = ByteLevel::smollm2();
    vocabulary
        .merges
        .extend(["< /".to_owned(), "s >".to_owned(), "</ s>".to_owned()]);
    vocabulary
        .tokens
        .extend(["</", "s>", "</s>"].map(str::to_owned));
    let tokenizer = vocabulary.tokenizer("smollm");
    let ends: Vec<_> = tokenizer
        .end_of_generation()
        .filter_map(|id| tokenizer.token_text(id))
        .collect();
    assert_eq!(ends, ["<|endoftext|>", "<|im_end|>"]);
    assert_eq!(
        tokenizer
            .token_named("</s>")
            .map(|id| tokenizer.is_special(id)),
        Some(false)
    );
}

proptest! {
    #[test]
    fn byte_level_text_comes_back_from_its_tokens(text in any::<String>()) {
        let tokenizer = byte_level();
        let options = EncodeOptions { add_bos: AddBos::Never, parse_special: ParseSpecial::No };
        let ids = tokenizer.encode(&text, &options);
        prop_assert_eq!(&tokenizer.decode(&ids, SpecialText::Keep), &text);

        let mut decoder = StreamDecoder::new();
        let mut streamed: String = ids.iter().map(|&id| decoder.push(tokenizer, id)).collect();
        streamed.push_str(&decoder.finish());
        prop_assert_eq!(streamed, text);
    }

    #[test]
    fn any_ids_decode_and_stream_to_the_same_text(ids in prop::collection::vec(0_u32..13_000, 0..40)) {
        let tokenizer = byte_level();
        let ids: Vec<TokenId> = ids.into_iter().map(TokenId).collect();
        let bytes: Vec<u8> = ids.iter().flat_map(|&id| tokenizer.token_bytes(id)).copied().collect();
        prop_assert_eq!(tokenizer.decode(&ids, SpecialText::Keep), String::from_utf8_lossy(&bytes));
    }
}

fn byte_level() -> &'static Tokenizer {
    static TOKENIZER: std::sync::OnceLock<Tokenizer> = std::sync::OnceLock::new();
    TOKENIZER.get_or_init(|| ByteLevel::smollm2().tokenizer("deepseek-v3"))
}
