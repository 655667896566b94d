//! Answers of a given form, calls of functions, and what the API says of itself.

use ktx_core::serving::SchedulerSettings;
use serde_json::{Value, json};

use super::{Running, question, settings, with};

fn content(answer: &Value) -> Value {
    let text = answer["choices"][0]["message"]["content"].as_str();
    serde_json::from_str(text.expect("a text")).expect("the text is JSON")
}

#[test]
fn answers_meet_their_schemas() {
    let server = Running::new();
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 18, "maximum": 99},
            "kind": {"enum": ["cat", "dog"]},
            "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2},
        },
        "required": ["name", "age", "kind", "tags"],
        "additionalProperties": false,
    });
    for seed in 0..4 {
        let format = json!({"type": "json_schema", "json_schema": {"name": "person", "strict": true, "schema": person}});
        let fields =
            json!({"temperature": 1.2, "seed": seed, "max_tokens": 200, "response_format": format});
        let answer = server.chat(with(question("Who?"), fields)).ok();
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        let value = content(&answer);
        assert!((18..=99).contains(&value["age"].as_i64().expect("a number")));
        assert!(value["kind"] == "cat" || value["kind"] == "dog");
        assert_eq!(value["tags"].as_array().map(Vec::len), Some(2));
        assert!(value["name"].as_str().expect("a text").chars().count() <= 12);
    }
    let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "a"}}});
    let refused = server.chat(with(question("Who?"), json!({"response_format": format})));
    assert!(refused.error(400).contains("pattern"));
    let format = json!({"response_format": {"type": "xml"}});
    server.chat(with(question("Who?"), format)).error(400);
}

#[test]
fn json_objects_begin_as_objects() {
    let server = Running::new();
    let fields = json!({"response_format": {"type": "json_object"}, "max_tokens": 20});
    let answer = server.chat(with(question("Who?"), fields)).ok();
    let text = answer["choices"][0]["message"]["content"].as_str();
    assert!(text.expect("a text").starts_with('{'));
}

#[test]
fn functions_that_must_be_called_are() {
    let server = Running::new();
    let tool = |name: &str| {
        json!({"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Ulm", "Rome"]}}, "required": ["city"]}}})
    };
    let tools = json!([tool("weather"), tool("time")]);
    let named =
        json!({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "time"}}});
    let answer = server.chat(with(question("When?"), named.clone())).ok();
    let message = &answer["choices"][0]["message"];
    let call = &message["tool_calls"][0];
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    assert_eq!(call["function"]["name"], "time");
    let arguments = call["function"]["arguments"].as_str().expect("a text");
    let arguments: Value = serde_json::from_str(arguments).expect("it is JSON");
    assert!(["Ulm", "Rome"].contains(&arguments["city"].as_str().expect("a text")));
    let events = server
        .chat(with(
            with(question("When?"), named),
            json!({"stream": true}),
        ))
        .events();
    let calls: Vec<&Value> = events
        .iter()
        .filter_map(|event| event["choices"][0]["delta"].get("tool_calls"))
        .collect();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0][0]["index"], 0);
    assert_eq!(calls[0][0]["function"]["name"], "time");
    let required = json!({"tools": tools, "tool_choice": "required"});
    let answer = server.chat(with(question("When?"), required)).ok();
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    // The answer goes back into the conversation.
    let mut turns = question("When?");
    let message = answer["choices"][0]["message"].clone();
    let id = message["tool_calls"][0]["id"].clone();
    let messages = turns["messages"].as_array_mut().expect("messages");
    messages.push(message);
    messages.push(json!({"role": "tool", "tool_call_id": id, "content": "12:00"}));
    server.chat(with(turns, json!({"tools": tools}))).ok();
    for wrong in [
        json!({"tool_choice": "required"}),
        json!({"tools": tools, "tool_choice": "never"}),
        json!({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "x"}}}),
        json!({"tools": [{"type": "retrieval"}]}),
        json!({"tools": [{"type": "function", "function": {}}]}),
    ] {
        server.chat(with(question("When?"), wrong)).error(400);
    }
    let none = json!({"tools": tools, "tool_choice": "none"});
    let answer = server
        .chat(with(question("What is the opposite of hot?"), none))
        .ok();
    assert_eq!(
        answer["choices"][0]["message"]["content"],
        "The opposite of hot is cold."
    );
}

#[test]
fn a_forced_thought_is_no_content() {
    let mut settings = settings();
    settings.defaults.thinking = ktx_core::Thinking::Forced;
    let server = Running::with(settings, SchedulerSettings::default(), 512);
    let answer = server
        .chat(with(question("Why?"), json!({"max_tokens": 8})))
        .ok();
    let message = &answer["choices"][0]["message"];
    assert!(
        !message["reasoning_content"]
            .as_str()
            .expect("a text")
            .is_empty()
    );
    assert_eq!(message["content"], "");
}

#[test]
fn the_api_describes_itself_and_the_plan_names_every_module() {
    let server = Running::new();
    let document = server.get("/openapi.json").ok();
    for path in [
        "/v1/chat/completions",
        "/v1/completions",
        "/api/chat",
        "/metrics",
        "/health",
    ] {
        assert!(document["paths"].get(path).is_some(), "{path}");
    }
    let plan = server.get("/api/ktx/plan").ok();
    let modules = plan["modules"].as_array().expect("modules");
    let experts = modules
        .iter()
        .find(|m| m["path"] == "model.layers.1.mlp.experts")
        .expect("the model has experts");
    assert!(experts["bytes"].as_u64().expect("a size") > 0);
    assert_eq!(experts["device"], "cpu");
    assert!(experts["rule"]["line"].as_u64().expect("a line") > 0);
    let metrics = server.get("/metrics").body;
    for name in [
        "vllm:num_requests_running",
        "vllm:time_to_first_token_seconds_bucket",
    ] {
        assert!(metrics.contains(name), "{name}");
    }
}
