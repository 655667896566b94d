//! The built-in model's golden cases, which transformers made.

use ktx_core::chat::{ChatTemplate, Message, RenderOptions};
use ktx_core::tokenizer::{
    AddBos, EncodeOptions, ParseSpecial, SpecialText, StreamDecoder, TokenId, Tokenizer,
};
use serde::Deserialize;

use crate::vocabularies::{models, pip};

#[derive(Deserialize)]
struct Goldens {
    tokenizer: Vec<TokenizerCase>,
    chat: Vec<ChatCase>,
}

#[derive(Deserialize)]
struct TokenizerCase {
    text: String,
    add_bos: bool,
    parse_special: bool,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct ChatCase {
    messages: Vec<Message>,
    add_generation_prompt: bool,
    text: String,
    ids: Vec<u32>,
}

fn goldens() -> Option<Goldens> {
    let file = std::fs::read(models()?.join("pip-17m-goldens.json"))
        .expect("the goldens lie beside the model");
    Some(serde_json::from_slice(&file).expect("the goldens parse"))
}

fn numbers(ids: &[TokenId]) -> Vec<u32> {
    ids.iter().map(|id| id.0).collect()
}

#[test]
fn texts_of_the_built_in_model_encode_as_the_goldens_say() {
    let (Some(goldens), Some(metadata)) = (goldens(), pip()) else {
        return;
    };
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!(goldens.tokenizer.len(), 92);
    for case in goldens.tokenizer {
        let options = EncodeOptions {
            add_bos: if case.add_bos {
                AddBos::FromModel
            } else {
                AddBos::Never
            },
            parse_special: if case.parse_special {
                ParseSpecial::Yes
            } else {
                ParseSpecial::No
            },
        };
        let ids = tokenizer.encode(&case.text, &options);
        assert_eq!(numbers(&ids), case.ids, "{:?}", case.text);

        let text = if case.add_bos {
            "<｜begin▁of▁sentence｜>".to_owned() + &case.text
        } else {
            case.text
        };
        assert_eq!(tokenizer.decode(&ids, SpecialText::Keep), text);
    }
}

#[test]
fn chats_of_the_built_in_model_render_and_encode_as_the_goldens_say() {
    let (Some(goldens), Some(metadata)) = (goldens(), pip()) else {
        return;
    };
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    let template = ChatTemplate::from_metadata(&metadata).unwrap();
    assert_eq!(goldens.chat.len(), 4);
    for case in goldens.chat {
        let options = RenderOptions {
            add_generation_prompt: case.add_generation_prompt,
            ..RenderOptions::default()
        };
        let text = template.render(&case.messages, &options).unwrap();
        assert_eq!(text, case.text);
        assert_eq!(
            numbers(&tokenizer.encode(&text, &EncodeOptions::rendered_chat())),
            case.ids
        );
    }
}

#[test]
fn streamed_text_is_the_decoded_text_and_never_holds_half_a_character() {
    let Some(metadata) = pip() else { return };
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    let text = "naïve 你好 🚀 end";
    let ids = tokenizer.encode(text, &EncodeOptions::default());
    let mut decoder = StreamDecoder::new();
    let mut streamed = String::new();
    for &id in &ids {
        let part = decoder.push(&tokenizer, id);
        assert!(!part.contains(char::REPLACEMENT_CHARACTER), "{part:?}");
        streamed.push_str(&part);
    }
    assert_eq!(streamed, text);
    assert_eq!(decoder.finish(), "");

    let cut = ids.len()
        - tokenizer
            .encode(
                "🚀 end",
                &EncodeOptions {
                    add_bos: AddBos::Never,
                    ..Default::default()
                },
            )
            .len();
    let mut decoder = StreamDecoder::new();
    let mut streamed: String = ids[..cut + 1]
        .iter()
        .map(|&id| decoder.push(&tokenizer, id))
        .collect();
    streamed.push_str(&decoder.finish());
    assert!(
        text.starts_with(streamed.trim_end_matches(char::REPLACEMENT_CHARACTER)),
        "{streamed:?}"
    );
}

#[test]
fn special_tokens_of_the_built_in_model_are_known() {
    let Some(metadata) = pip() else { return };
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    assert_eq!(
        (tokenizer.bos(), tokenizer.eos(), tokenizer.pad()),
        (Some(TokenId(0)), Some(TokenId(1)), Some(TokenId(2)))
    );
    assert_eq!(
        tokenizer.end_of_generation().collect::<Vec<_>>(),
        [TokenId(1)]
    );
    assert!(tokenizer.adds_bos());
    assert_eq!(tokenizer.pre_tokenizer(), Some("deepseek-v3"));
    assert_eq!(tokenizer.vocab_size(), 4096);

    let outside = TokenId(4096);
    assert_eq!(tokenizer.token_bytes(outside), b"");
    assert_eq!(
        tokenizer.decode(
            &[TokenId(473), outside, TokenId(u32::MAX)],
            SpecialText::Keep
        ),
        "Hello"
    );
    assert!(!tokenizer.is_end_of_generation(outside));
}

#[test]
fn names_of_control_tokens_stay_text_unless_they_are_asked_for() {
    let Some(metadata) = pip() else { return };
    let tokenizer = Tokenizer::from_metadata(&metadata).unwrap();
    let plain = tokenizer.encode(
        "<｜User｜>",
        &EncodeOptions {
            add_bos: AddBos::Never,
            ..Default::default()
        },
    );
    assert!(plain.iter().all(|&id| !tokenizer.is_special(id)));
    assert_eq!(tokenizer.decode(&plain, SpecialText::Skip), "<｜User｜>");
    let parsed = tokenizer.encode("<｜User｜>", &EncodeOptions::rendered_chat());
    assert_eq!(numbers(&parsed), [3]);
    assert_eq!(tokenizer.decode(&parsed, SpecialText::Skip), "");
}
