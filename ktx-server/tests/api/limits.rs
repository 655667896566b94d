//! Keys, limits, and the end.

use std::io::{BufReader, Read, Write};
use std::time::{Duration, Instant};

use ktx_core::serving::SchedulerSettings;
use ktx_server::{ApiKeys, ServerSettings};
use serde_json::json;

use super::client::{read, request};
use super::{Running, question, settings, with};

#[test]
fn every_route_but_health_and_the_page_wants_a_key() {
    let settings = ServerSettings {
        api_keys: ApiKeys::new(["sk-right".to_owned()]),
        ..settings()
    };
    let server = Running::with(settings, SchedulerSettings::default(), 256);
    let with_right = |path: &str| {
        let header = "Authorization: Bearer sk-right";
        server.client.send("GET", path, &[header], b"")
    };
    let document = with_right("/openapi.json").ok();
    let paths = document["paths"].as_object().expect("paths");
    let mut routes = vec![
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
        ("PUT", "/v1/models"),
    ];
    for (path, methods) in paths.iter().filter(|(path, _)| *path != "/health") {
        for method in methods.as_object().expect("methods").keys() {
            routes.push((if method == "post" { "POST" } else { "GET" }, path));
        }
    }
    assert!(routes.len() > 12, "{routes:?}");
    for (method, path) in routes {
        let reply = server.client.send(method, path, &[], b"{}");
        reply.error(401);
        assert_eq!(reply.headers["www-authenticate"], "Bearer", "{path}");
    }
    assert_eq!(server.get("/health").ok()["status"], "ok");
    let with_key = |header: &str| {
        server
            .client
            .send("GET", "/v1/models", &[header], b"")
            .status
    };
    assert_eq!(with_key("Authorization: Bearer sk-right"), 200);
    assert_eq!(with_key("authorization: bearer sk-right"), 200);
    assert_eq!(with_key("Authorization: Bearer sk-wrong"), 401);
    assert_eq!(with_key("Authorization: Bearer sk-righ"), 401);
    assert_eq!(with_key("Authorization: Basic sk-right"), 401);
}

#[test]
fn other_pages_may_not_use_it_unless_they_are_named() {
    let origin = "Origin: https://example.org";
    let server = Running::new();
    let reply = server.client.send("GET", "/v1/models", &[origin], b"");
    assert!(!reply.headers.contains_key("access-control-allow-origin"));
    drop(server);
    let settings = ServerSettings {
        cors_origins: vec!["https://example.org".to_owned()],
        ..settings()
    };
    let server = Running::with(settings, SchedulerSettings::default(), 256);
    let reply = server.client.send("GET", "/v1/models", &[origin], b"");
    assert_eq!(
        reply.headers["access-control-allow-origin"],
        "https://example.org"
    );
}

#[test]
fn a_full_queue_is_told_with_a_time_to_come_back() {
    let scheduler = SchedulerSettings {
        max_running: 1,
        max_waiting: 1,
        ..SchedulerSettings::default()
    };
    let server = Running::with(settings(), scheduler, 512);
    let long = with(
        question("x"),
        json!({"ignore_eos": true, "max_tokens": 400}),
    );
    let replies: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| server.chat(long.clone())))
            .collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("it ends"))
            .collect()
    });
    let refused: Vec<_> = replies.iter().filter(|r| r.status == 429).collect();
    assert!(!refused.is_empty());
    assert!(replies.iter().any(|r| r.status == 200));
    for reply in refused {
        reply.error(429);
        let seconds: u64 = reply.headers["retry-after"].parse().expect("seconds");
        assert!((1..=60).contains(&seconds));
    }
}

#[test]
fn an_answer_that_takes_too_long_is_ended() {
    let settings = ServerSettings {
        request_timeout: Duration::from_millis(80),
        ..settings()
    };
    let server = Running::with(settings, SchedulerSettings::default(), 512);
    let long = with(
        question("x"),
        json!({"ignore_eos": true, "max_tokens": 450}),
    );
    assert!(server.chat(long.clone()).error(504).contains("max_tokens"));
    let reply = server.chat(with(long, json!({"stream": true})));
    assert!(reply.body.trim_end().ends_with('}'), "{}", reply.body);
    assert!(reply.body.contains("\"timeout\""));
    server.wait_until_idle();
}

#[test]
fn the_end_waits_for_running_answers_and_takes_no_new_ones() {
    let server = Running::new();
    let body = with(
        question("x"),
        json!({"ignore_eos": true, "max_tokens": 120, "stream": true}),
    );
    let mut stream = server.client.connect();
    let bytes = request(
        "POST",
        "/v1/chat/completions",
        &[],
        body.to_string().as_bytes(),
    );
    stream.write_all(&bytes).expect("it is sent");
    let mut reader = BufReader::new(stream);
    let mut first = [0; 20];
    reader.read_exact(&mut first).expect("it begins");
    server.stop.stop();
    let begin = Instant::now();
    while server.scheduler.is_open() && begin.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(!server.scheduler.is_open());
    let mut rest = Vec::new();
    reader.read_to_end(&mut rest).expect("it ends");
    assert!(String::from_utf8_lossy(&rest).contains("[DONE]"));
}

#[test]
fn a_connection_is_used_again() {
    let server = Running::new();
    let mut stream = server.client.connect();
    for _ in 0..3 {
        let bytes = b"GET /v1/models HTTP/1.1\r\nHost: test\r\n\r\n";
        stream.write_all(bytes).expect("it is sent");
        let mut reader = BufReader::new(&mut stream);
        assert_eq!(read(&mut reader).status, 200);
    }
}
