//! Ollama's API.

use serde_json::{Value, json};

use super::Running;

fn lines(body: &str) -> Vec<Value> {
    let json = |line: &str| serde_json::from_str(line).expect("a line is JSON");
    body.lines().map(json).collect()
}

#[test]
fn chats_and_prompts_are_answered_line_by_line_and_whole() {
    let server = Running::new();
    let chat = json!({"model": "pip:latest", "options": {"temperature": 0, "num_ctx": 4096},
        "messages": [{"role": "user", "content": "What is the opposite of hot?"}]});
    let reply = server.post("/api/chat", &chat);
    assert_eq!(reply.headers["content-type"], "application/x-ndjson");
    let all = lines(&reply.body);
    let text: String = all
        .iter()
        .filter_map(|l| l["message"]["content"].as_str())
        .collect();
    assert_eq!(text, "The opposite of hot is cold.");
    let last = all.last().expect("there are lines");
    assert_eq!(
        (&last["done"], &last["done_reason"]),
        (&json!(true), &json!("stop"))
    );
    assert!(last["eval_count"].as_u64() > Some(3));
    assert!(all[..all.len() - 1].iter().all(|l| l["done"] == false));
    let generate = json!({"model": "pip", "prompt": "What is the opposite of hot?", "stream": false,
        "options": {"temperature": 0, "stop": [" is"]}});
    let whole = server.post("/api/generate", &generate).ok();
    assert_eq!(whole["response"], "The opposite of hot");
    let raw = json!({"model": "pip", "prompt": "The opposite", "raw": true, "stream": false,
        "options": {"num_predict": 3}});
    assert_eq!(server.post("/api/generate", &raw).ok()["eval_count"], 3);
    let form = json!({"model": "pip", "prompt": "Who?", "stream": false,
        "format": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}});
    let answer = server.post("/api/generate", &form).ok();
    let value: Value =
        serde_json::from_str(answer["response"].as_str().expect("a text")).expect("JSON");
    assert!(value["a"].is_boolean());
    let load = server.post("/api/generate", &json!({"model": "pip"})).ok();
    assert_eq!(load["done_reason"], "load");
}

#[test]
fn models_are_listed_and_shown() {
    let server = Running::new();
    let tags = server.get("/api/tags").ok();
    assert_eq!(tags["models"][0]["name"], "pip");
    assert!(tags["models"][0]["size"].as_u64() > Some(1_000_000));
    let show = server.post("/api/show", &json!({"model": "pip"})).ok();
    assert_eq!(show["model_info"]["general.architecture"], "deepseek2");
    assert!(server.get("/api/version").ok()["version"].is_string());
    let reply = server.post("/api/show", &json!({"model": "other"}));
    assert_eq!(reply.status, 404);
    assert!(
        reply.json()["error"]
            .as_str()
            .expect("a text")
            .contains("other")
    );
    let reply = server.post("/api/chat", &json!({"model": "pip", "messages": 3}));
    assert_eq!(reply.status, 400);
    let reply = server.post(
        "/api/generate",
        &json!({"model": "pip", "prompt": "x", "options": {"mirostat": 2}}),
    );
    assert_eq!(reply.status, 400);
}
