//! Chat templates against Jinja2 (`make_chats.py` made the fixture), and templates made to harm.

use std::time::{Duration, Instant, UNIX_EPOCH};

use ktx_core::chat::{ChatError, ChatTemplate, Message, RenderOptions, TemplateOrigin};
use serde::Deserialize;
use serde_json::json;

use crate::vocabularies::{metadata, strings, text};

/// What `make_chats.py` rendered with Jinja2, set up as transformers does it.
#[derive(Deserialize)]
struct Group {
    template: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    messages: Vec<Message>,
    add_generation_prompt: bool,
    enable_thinking: Option<bool>,
    tools: Option<Vec<serde_json::Value>>,
    text: String,
}

fn render(source: &str, messages: &[Message]) -> Result<String, ChatError> {
    ChatTemplate::from_source(source)?.render(messages, &RenderOptions::for_answer())
}

#[test]
fn templates_render_as_jinja2_renders_them() {
    let groups: Vec<Group> =
        serde_json::from_str(include_str!("chats.json")).expect("the fixture parses");
    assert!(groups.iter().map(|group| group.cases.len()).sum::<usize>() > 40);
    for Group {
        template: source,
        cases,
    } in groups
    {
        let template = ChatTemplate::from_source(&source)
            .unwrap()
            .with_special_token("bos_token", "<s>")
            .with_special_token("eos_token", "</s>");
        for case in cases {
            let options = RenderOptions {
                add_generation_prompt: case.add_generation_prompt,
                enable_thinking: case.enable_thinking,
                tools: case.tools.unwrap_or_default(),
                now: Some(UNIX_EPOCH + Duration::from_secs(1_735_689_599)),
                ..RenderOptions::default()
            };
            assert_eq!(
                template.render(&case.messages, &options).unwrap(),
                case.text,
                "{source}"
            );
        }
    }
}

#[test]
fn template_of_a_file_knows_the_special_tokens_of_the_file() {
    let file = metadata(vec![
        (
            "tokenizer.ggml.tokens",
            strings(["<unk>", "<bos>", "<eos>"]),
        ),
        ("tokenizer.ggml.bos_token_id", ktx_gguf::Value::U32(1)),
        ("tokenizer.ggml.eos_token_id", ktx_gguf::Value::U32(9)),
        (
            "tokenizer.chat_template",
            text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}"),
        ),
        ("tokenizer.chat_template.tool_use", text("tools")),
    ]);
    let template = ChatTemplate::from_metadata(&file).unwrap();
    assert_eq!(
        template
            .render(&[Message::user("hi")], &RenderOptions::default())
            .unwrap(),
        "<bos>hi"
    );
    assert_eq!(template.origin(), &TemplateOrigin::File);
    assert_eq!(ChatTemplate::names(&file), ["tool_use"]);
    let named = ChatTemplate::named(&file, "tool_use").unwrap();
    assert_eq!(
        named.render(&[], &RenderOptions::default()).unwrap(),
        "tools"
    );
}

#[test]
fn file_without_a_template_says_so_and_chatml_is_the_callers_choice() {
    let error = ChatTemplate::from_metadata(&metadata(vec![])).unwrap_err();
    assert!(matches!(error, ChatError::NoTemplate { .. }));
    assert!(
        error.to_string().contains("no tokenizer.chat_template"),
        "{error}"
    );

    let template = ChatTemplate::chatml();
    assert!(template.origin().to_string().starts_with("ChatML"));
    let messages = [Message::system("Be brief."), Message::user("Hi")];
    assert_eq!(
        template
            .render(&messages, &RenderOptions::for_answer())
            .unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn errors_name_the_line_of_the_template() {
    let syntax = ChatTemplate::from_source("a\nb\n{% for %}")
        .unwrap_err()
        .to_string();
    assert!(syntax.contains("does not parse, line 3"), "{syntax}");
    let refused = render("\n{{ raise_exception('roles must alternate') }}", &[]).unwrap_err();
    assert!(
        matches!(&refused, ChatError::Refused { line: 2, message } if message == "roles must alternate")
    );
    let failed = render("\n\n{{ messages[0].missing.field }}", &[Message::user("x")])
        .unwrap_err()
        .to_string();
    assert!(failed.contains("failed at line 3"), "{failed}");
}

#[test]
fn further_fields_of_a_message_reach_the_template() {
    let message = Message::assistant("").with(
        "tool_calls",
        json!([{"function": {"name": "f", "arguments": {"b": 1, "a": [true, null]}}}]),
    );
    let text = render(
        "{{ messages[0].tool_calls[0].function.arguments | tojson }}",
        &[message],
    )
    .unwrap();
    assert_eq!(text, r#"{"b": 1, "a": [true, null]}"#);
}

#[test]
fn hostile_templates_are_stopped() {
    let nested = "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}";
    let templates = [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}".to_owned(),
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}".to_owned(),
        "{{ 'a' * 1000000000000 }}".to_owned(),
        "{{ 'aaaa'.replace('a', 'b' * 1000000).replace('b', 'c' * 1000000) }}".to_owned(),
        "{{ ','.join(['b' * 1000000] * 1000000) }}".to_owned(),
        "{{ '{:>1000000000}'.format('a') }}".to_owned(),
        format!("{nested}{{{{ ns.x }}}}"),
        format!("{nested}{{{{ ns.x | tojson }}}}"),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".to_owned(),
        format!("{{{{ {}1{} }}}}", "(".repeat(50_000), ")".repeat(50_000)),
        "{% if 1 %}".repeat(20_000),
        "x".repeat(1 << 20),
    ];
    for template in templates {
        let start = Instant::now();
        let outcome = render(&template, &[Message::user("x")]);
        assert!(outcome.is_err(), "{template:.80}");
        assert!(start.elapsed() < Duration::from_secs(20), "{template:.80}");
    }
}

#[test]
fn deep_expressions_and_values_do_not_overflow_the_stack() {
    let sum = format!("{{{{ 1{} }}}}", "+1".repeat(100_000));
    assert_eq!(render(&sum, &[]).unwrap(), "100001");
    let deep = "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}{% set ns.x = [ns.x] %}{% endfor %}";
    assert_eq!(render(deep, &[]).unwrap(), "");
    for printed in ["{{ ns.x }}", "{{ ns.x | tojson }}"] {
        let error = render(&(deep.to_owned() + printed), &[])
            .unwrap_err()
            .to_string();
        assert!(error.contains("nested too deeply"), "{error}");
    }
}

#[test]
fn a_long_conversation_stays_within_the_budget() {
    let messages: Vec<Message> = (0..2000)
        .map(|turn| {
            if turn % 2 == 0 {
                Message::user("word ".repeat(200))
            } else {
                Message::assistant("ok")
            }
        })
        .collect();
    let text = ChatTemplate::chatml()
        .render(&messages, &RenderOptions::for_answer())
        .unwrap();
    assert!(text.len() > 1_000_000);
}
