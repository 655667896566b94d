//! OpenAI's API.

use serde_json::{Value, json};

use super::{Running, question, with};

const HOT: &str = "What is the opposite of hot?";
const COLD: &str = "The opposite of hot is cold.";

fn text(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"]
        .as_str()
        .expect("there is a text")
}

/// The text of a stream's choice, its reason to end, and the number of its pieces.
fn joined(events: &[Value], choice: u64) -> (String, String) {
    let (mut text, mut reason) = (String::new(), String::new());
    for event in events {
        for one in event["choices"].as_array().expect("choices") {
            if one["index"] != choice {
                continue;
            }
            text += one["delta"]["content"].as_str().unwrap_or_default();
            text += one["text"].as_str().unwrap_or_default();
            if let Some(word) = one["finish_reason"].as_str() {
                assert_eq!(reason, "", "it ends once");
                reason = word.to_owned();
            }
        }
    }
    (text, reason)
}

#[test]
fn a_question_is_answered_whole_and_in_pieces() {
    let server = Running::new();
    let answer = server.chat(question(HOT)).ok();
    assert_eq!(text(&answer), COLD);
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["choices"][0]["finish_reason"], "stop");
    let usage = &answer["usage"];
    let sum = usage["prompt_tokens"].as_u64().expect("a count")
        + usage["completion_tokens"].as_u64().expect("a count");
    assert_eq!(usage["total_tokens"], sum);
    let options = json!({"stream": true, "stream_options": {"include_usage": true}});
    let events = server.chat(with(question(HOT), options)).events();
    assert_eq!(joined(&events, 0), (COLD.to_owned(), "stop".to_owned()));
    assert_eq!(events[0]["choices"][0]["delta"]["role"], "assistant");
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    let last = events.last().expect("there are events");
    assert_eq!(last["choices"], json!([]));
    assert_eq!(
        last["usage"]["completion_tokens"],
        usage["completion_tokens"]
    );
    let without = server
        .chat(with(question(HOT), json!({"stream": true})))
        .events();
    assert!(without.iter().all(|event| event.get("usage").is_none()));
}

#[test]
fn messages_can_be_parts_and_turns() {
    let server = Running::new();
    let parts = json!({"messages": [
        {"role": "developer", "content": "Answer."},
        {"role": "user", "content": [{"type": "text", "text": "What is the opposite"}, {"type": "text", "text": " of hot?"}]},
        {"role": "assistant", "content": COLD},
        {"role": "user", "content": "What is 7 + 5?"},
    ], "temperature": 0});
    assert!(!text(&server.chat(parts).ok()).is_empty());
    let image = json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]});
    assert!(server.chat(image).error(400).contains("image_url"));
    for (messages, word) in [
        (json!([]), "empty"),
        (json!([{"role": "wizard", "content": "x"}]), "wizard"),
        (json!([{"role": "user"}]), "no content"),
    ] {
        let message = server.chat(json!({ "messages": messages })).error(400);
        assert!(message.contains(word), "{message}");
    }
}

#[test]
fn stop_texts_lengths_and_seeds_are_kept() {
    let server = Running::new();
    let stopped = server
        .chat(with(question(HOT), json!({"stop": [" is", "x"]})))
        .ok();
    assert_eq!(text(&stopped), "The opposite of hot");
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    let short = server
        .chat(with(question(HOT), json!({"max_completion_tokens": 2})))
        .ok();
    assert_eq!(text(&short), "The opposite");
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    let none = server
        .chat(with(question(HOT), json!({"max_tokens": 0})))
        .ok();
    assert_eq!(
        (text(&none), none["usage"]["completion_tokens"].as_u64()),
        ("", Some(0))
    );
    let random = json!({"temperature": 2, "top_p": 1, "seed": 5, "n": 3, "max_tokens": 12});
    let texts = || -> Vec<String> {
        let answer = server
            .chat(with(question("lamp of river seven"), random.clone()))
            .ok();
        let choices = answer["choices"].as_array().expect("choices").clone();
        let text = |c: &Value| c["message"]["content"].as_str().expect("a text").to_owned();
        choices.iter().map(text).collect()
    };
    let first = texts();
    assert_eq!(first, texts());
    assert_eq!(first.len(), 3);
    assert_ne!(first[0], first[1], "each choice has a seed of its own");
    let streamed = server
        .chat(with(
            with(question("lamp of river seven"), random),
            json!({"stream": true}),
        ))
        .events();
    for (i, text) in first.iter().enumerate() {
        assert_eq!(&joined(&streamed, i as u64).0, text);
    }
}

#[test]
fn biases_and_probabilities_reach_the_choice_of_tokens() {
    let server = Running::new();
    let fields = json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 1});
    let answer = server.chat(with(question(HOT), fields)).ok();
    let first = &answer["choices"][0]["logprobs"]["content"][0];
    assert_eq!(first["token"], "The");
    assert_eq!(first["top_logprobs"][0]["token"], "The");
    assert_eq!(first["bytes"], json!([84, 104, 101]));
    assert!(first["logprob"].as_f64().expect("a number") <= 0.0);
    assert_eq!(first["top_logprobs"].as_array().map(Vec::len), Some(2));
    let completion = json!({"prompt": "The", "logprobs": 1, "max_tokens": 1, "temperature": 0});
    let completion = server.post("/v1/completions", &completion).ok();
    let token = completion["choices"][0]["logprobs"]["tokens"][0].clone();
    assert_eq!(completion["choices"][0]["text"], token);
    // The token that greedy choice takes is forbidden: another comes.
    let id =
        json!({"prompt": "The", "max_tokens": 1, "temperature": 0, "logit_bias": {"300": 100}});
    let biased = server.post("/v1/completions", &id).ok();
    assert_ne!(biased["choices"][0]["text"], token);
}

#[test]
fn texts_and_tokens_are_continued() {
    let server = Running::new();
    let ask = |fields: Value| {
        let request = with(json!({"temperature": 0, "max_tokens": 5}), fields);
        server.post("/v1/completions", &request)
    };
    let one = ask(json!({"prompt": "What is"})).ok();
    let continued = one["choices"][0]["text"]
        .as_str()
        .expect("a text")
        .to_owned();
    let echoed = ask(json!({"prompt": "What is", "echo": true})).ok();
    assert_eq!(echoed["choices"][0]["text"], format!("What is{continued}"));
    let two = ask(json!({"prompt": ["What is", "The"], "n": 2})).ok();
    assert_eq!(two["choices"].as_array().map(Vec::len), Some(4));
    assert_eq!(two["choices"][1]["text"], continued);
    assert_eq!(two["choices"][3]["index"], 3);
    let streamed = ask(json!({"prompt": ["What is", "The"], "n": 2, "stream": true})).events();
    assert_eq!(joined(&streamed, 1).0, continued);
    assert_eq!(
        ask(json!({"prompt": [300, 301]})).ok()["usage"]["prompt_tokens"],
        2
    );
    assert!(
        ask(json!({"prompt": [4_000_000]}))
            .error(400)
            .contains("4000000")
    );
    ask(json!({"prompt": []})).error(400);
    ask(json!({"prompt": "x", "suffix": "y"})).error(400);
    ask(json!({"prompt": "x", "best_of": 3})).error(400);
}

#[test]
fn a_repeated_beginning_is_counted_as_cached() {
    let server = Running::new();
    let long = "the quick brown fox jumps over the lazy dog ".repeat(12);
    let ask = || {
        server
            .chat(with(question(&long), json!({"max_tokens": 2})))
            .ok()
    };
    let cached = |answer: Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].clone();
    assert_eq!(cached(ask()), 0);
    assert!(cached(ask()).as_u64().expect("a count") >= 64);
}

#[test]
fn fields_that_would_change_the_answer_are_refused_and_harmless_ones_ignored() {
    let server = Running::new();
    let harmless = json!({"user": "me", "metadata": {"a": "b"}, "store": false, "service_tier": "auto",
        "parallel_tool_calls": true, "seed": null, "tools": null, "modalities": ["text"]});
    assert_eq!(text(&server.chat(with(question(HOT), harmless)).ok()), COLD);
    for (fields, param) in [
        (json!({"temperature": 3}), "temperature"),
        (json!({"temperature": "warm"}), "temperature"),
        (json!({"top_p": 0}), "top_p"),
        (json!({"n": 0}), "n"),
        (json!({"n": 1000}), "n"),
        (json!({"presence_penalty": -2.5}), "presence_penalty"),
        (json!({"logit_bias": {"x": 1}}), "logit_bias"),
        (json!({"logit_bias": {"5": 1000}}), "logit_bias"),
        (json!({"top_logprobs": 3}), "top_logprobs"),
        (
            json!({"logprobs": true, "top_logprobs": 30}),
            "top_logprobs",
        ),
        (json!({"stream_options": {}}), "stream_options"),
        (json!({"stop": vec!["x"; 99]}), "stop"),
        (json!({"functions": []}), "functions"),
        (json!({"audio": {"voice": "x"}}), "audio"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"no_such_field": 1}), "no_such_field"),
        (json!({"max_tokens": -1}), "max_tokens"),
    ] {
        let reply = server.chat(with(question(HOT), fields));
        reply.error(400);
        assert_eq!(reply.json()["error"]["param"], param, "{}", reply.body);
    }
    let other = server.chat(with(question(HOT), json!({"model": "gpt-4"})));
    assert!(other.error(404).contains("pip"));
    let long = server.chat(question(&"word ".repeat(2000)));
    assert!(long.error(400).contains("context"));
    assert_eq!(long.json()["error"]["code"], "context_length_exceeded");
}

#[test]
fn models_and_what_is_not_there() {
    let server = Running::new();
    let list = server.get("/v1/models").ok();
    assert_eq!(list["data"][0]["id"], "pip");
    assert_eq!(server.get("/v1/models/pip").ok()["id"], "pip");
    server.get("/v1/models/other").error(404);
    let embeddings = json!({"input": "x", "model": "pip"});
    server.post("/v1/embeddings", &embeddings).error(501);
    server.get("/v1/nothing").error(404);
    server.get("/v1/chat/completions").error(405);
    let page = server.get("/");
    assert!(page.headers["content-type"].starts_with("text/html"));
    assert!(page.headers.contains_key("content-security-policy"));
}
