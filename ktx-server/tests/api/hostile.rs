//! Requests that mean harm, or look as if.

use std::io::{BufReader, Read, Write};
use std::time::{Duration, Instant};

use ktx_core::serving::SchedulerSettings;
use ktx_server::ServerSettings;
use serde_json::{Value, json};

use super::client::{read, request};
use super::{Running, question, settings, with};

const CHAT: &str = "/v1/chat/completions";

fn send(server: &Running, body: &[u8]) -> super::Reply {
    server.client.send("POST", CHAT, &[], body)
}

/// The server still answers.
fn lives(server: &Running) {
    let answer = server.chat(question("What is 7 + 5?")).ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "7 + 5 = 12.");
}

#[test]
fn bodies_that_are_no_json_are_refused() {
    let server = Running::new();
    let deep = [b"{\"messages\":".as_slice(), &b"[".repeat(100_000)].concat();
    let bodies: [&[u8]; 10] = [
        b"",
        b"{",
        b"null",
        b"[]",
        b"\"x\"",
        b"{\"messages\": [{\"role\": \"user\", \"content\": \"\xff\xfe\"}]}",
        b"{\"messages\": [{\"role\": \"user\", \"content\": \"\\ud800\"}]}",
        b"{\"messages\": []} {}",
        b"{\"messages\": [], \"messages\": []}",
        &deep,
    ];
    for body in bodies {
        send(&server, body).error(400);
    }
    for path in ["/v1/completions", "/api/chat", "/api/generate", "/api/show"] {
        for body in bodies {
            assert_eq!(
                server.client.send("POST", path, &[], body).status,
                400,
                "{path}"
            );
        }
    }
    lives(&server);
}

#[test]
fn numbers_out_of_all_bounds_are_refused_or_harmless() {
    let server = Running::new();
    for fields in [
        r#""temperature": 1e999"#,
        r#""n": 4294967296"#,
        r#""n": -1"#,
        r#""max_tokens": 1e30"#,
        r#""seed": 99999999999999999999"#,
        r#""logit_bias": {"-1": 1}"#,
    ] {
        let body =
            format!("{{\"messages\": [{{\"role\": \"user\", \"content\": \"x\"}}], {fields}}}");
        send(&server, body.as_bytes()).error(400);
    }
    let large = json!({"max_tokens": u64::MAX, "seed": i64::MIN, "top_k": i64::MAX});
    server.chat(with(question("What is 7 + 5?"), large)).ok();
    lives(&server);
}

#[test]
fn bodies_that_are_too_large_are_not_read() {
    let settings = ServerSettings {
        max_body_bytes: 1 << 20,
        ..settings()
    };
    let server = Running::with(settings, SchedulerSettings::default(), 256);
    let mut stream = server.client.connect();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("it is sent");
    assert_eq!(read(&mut BufReader::new(stream)).status, 413);
    // Without a length it is cut off on the way.
    let mut stream = server.client.connect();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
    stream.write_all(head.as_bytes()).expect("it is sent");
    let mut chunk = b"10000\r\n".to_vec();
    chunk.extend([b' '; 0x10000]);
    chunk.extend(b"\r\n");
    let sent = (0..64)
        .take_while(|_| stream.write_all(&chunk).is_ok())
        .count();
    let mut reply = Vec::new();
    let _ = stream.read_to_end(&mut reply);
    let text = String::from_utf8_lossy(&reply);
    assert!(
        sent < 64 || text.starts_with("HTTP/1.1 413"),
        "{sent} {text}"
    );
    server.get("/health").ok();
}

#[test]
fn headers_that_are_too_large_or_wrong_are_refused() {
    let server = Running::new();
    for bytes in [
        format!(
            "GET / HTTP/1.1\r\nHost: x\r\nA: {}\r\n\r\n",
            "a".repeat(200_000)
        )
        .into_bytes(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
        b"GET / HTTP/9.9\r\n\r\n".to_vec(),
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n".to_vec(),
    ] {
        let mut stream = server.client.connect();
        let _ = stream.write_all(&bytes);
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply);
        let text = String::from_utf8_lossy(&reply);
        assert!(text.is_empty() || text.starts_with("HTTP/1.1 4"), "{text}");
    }
    for path in [
        "/../../etc/passwd",
        "/v1/models/..%2f..%2fetc%2fpasswd",
        "/%00",
        "/v1/models/%ff",
    ] {
        let reply = server.get(path);
        assert!((400..500).contains(&reply.status), "{path}: {}", reply.body);
    }
    lives(&server);
}

#[test]
fn slow_clients_are_cut_off() {
    let settings = ServerSettings {
        header_timeout: Duration::from_millis(200),
        body_timeout: Duration::from_millis(200),
        ..settings()
    };
    let server = Running::with(settings, SchedulerSettings::default(), 256);
    let begin = Instant::now();
    let mut header = server.client.connect();
    header
        .write_all(b"GET / HTTP/1.1\r\nHost: x\r\nA: ")
        .expect("it is sent");
    let mut body = server.client.connect();
    let head = format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{");
    body.write_all(head.as_bytes()).expect("it is sent");
    let mut idle = server.client.connect();
    for stream in [&mut header, &mut idle] {
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply);
    }
    assert_eq!(read(&mut BufReader::new(body)).status, 408);
    assert!(begin.elapsed() < Duration::from_secs(10));
    lives(&server);
}

/// Slow-loris: a byte now and then keeps no connection open.
#[test]
fn clients_that_send_byte_by_byte_are_cut_off() {
    let settings = ServerSettings {
        header_timeout: Duration::from_millis(300),
        body_timeout: Duration::from_millis(300),
        ..settings()
    };
    let server = Running::with(settings, SchedulerSettings::default(), 256);
    let begin = Instant::now();
    let whole = format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n");
    let header = (server.client.connect(), String::new());
    let body = (server.client.connect(), whole);
    std::thread::scope(|scope| {
        for (mut stream, first) in [header, body] {
            scope.spawn(move || {
                stream.write_all(first.as_bytes()).expect("it is sent");
                let mut bytes = b"GET / HTTP/1.1\r\nA: "
                    .iter()
                    .chain(std::iter::repeat(&b' '));
                let mut send = || stream.write_all(&[*bytes.next().expect("a byte")]);
                while send().is_ok() {
                    assert!(
                        begin.elapsed() < Duration::from_secs(20),
                        "it is still open"
                    );
                    std::thread::sleep(Duration::from_millis(10));
                }
            });
        }
        scope.spawn(|| lives(&server));
    });
}

#[test]
fn a_client_that_takes_nothing_is_cut_off() {
    let settings = ServerSettings {
        write_timeout: Duration::from_millis(300),
        ..settings()
    };
    let server = Running::with(settings, SchedulerSettings::default(), 512);
    // More answers than socket buffers hold, none of which is read.
    let mut stream = server.client.connect();
    let one = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n";
    stream
        .set_write_timeout(Some(Duration::from_millis(300)))
        .expect("a limit is set");
    let begin = Instant::now();
    let mut closed = false;
    while !closed && begin.elapsed() < Duration::from_secs(20) {
        closed = stream
            .write_all(&one.repeat(100))
            .is_err_and(|e| e.kind() != std::io::ErrorKind::WouldBlock);
    }
    assert!(closed, "the connection is still open");
    lives(&server);
}

#[test]
fn schemas_that_mean_harm_are_refused_or_bounded() {
    let server = Running::new();
    let ask = |schema: Value| {
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        let fields = json!({"response_format": format, "max_tokens": 4});
        server.chat(with(question("x"), fields))
    };
    let mut deep = json!({"type": "null"});
    for _ in 0..60 {
        deep = json!({"anyOf": [deep, {"type": "array", "items": {"type": "null"}}]});
    }
    let wide: Vec<Value> = (0..2000)
        .map(|i| json!({"const": format!("{i}")}))
        .collect();
    let doubled = json!({"$ref": "#/$defs/a0", "$defs": (0..30).map(|i| {
        let next = json!({"$ref": format!("#/$defs/a{}", i + 1)});
        (format!("a{i}"), json!({"anyOf": [next.clone(), next]}))
    }).chain([("a30".to_owned(), json!({"type": "null"}))]).collect::<serde_json::Map<_, _>>()});
    let begin = Instant::now();
    for schema in [
        deep,
        json!({ "anyOf": wide }),
        doubled,
        json!({"type": "string", "minLength": 10_000, "maxLength": 10_000}),
        json!({"type": "array", "minItems": 10_000, "items": {"type": "array", "minItems": 10_000}}),
        json!({"type": "array", "items": {"$ref": "#"}}),
    ] {
        let reply = ask(schema);
        assert!(matches!(reply.status, 200 | 400), "{}", reply.body);
    }
    ask(json!({"type": "string", "minLength": 1e300})).error(400);
    ask(json!({"$ref": "#"})).error(400);
    assert!(
        begin.elapsed() < Duration::from_secs(60),
        "{:?}",
        begin.elapsed()
    );
    lives(&server);
}

#[test]
fn schemas_that_are_nested_deeply_are_refused() {
    let server = Running::new();
    for (open, close) in [
        (r#"{"items":"#, "}"),
        (r#"{"anyOf":["#, "]}"),
        (r#"{"not":"#, "}"),
    ] {
        for depth in [127, 1000, 100_000] {
            let schema = format!("{}{{}}{}", open.repeat(depth), close.repeat(depth));
            let format = format!(
                r#"{{"type":"json_schema","json_schema":{{"name":"x","schema":{schema}}}}}"#
            );
            let body = format!(
                r#"{{"messages":[{{"role":"user","content":"x"}}],"response_format":{format}}}"#
            );
            send(&server, body.as_bytes()).error(400);
            let tool = format!(r#"{{"model":"pip","messages":[],"format":{schema}}}"#);
            let reply = server
                .client
                .send("POST", "/api/chat", &[], tool.as_bytes());
            assert_eq!(reply.status, 400, "{}", reply.body);
        }
    }
    lives(&server);
}

/// Names that are paths are names; what stands in messages is text. That the server's own code has no way
/// to a file, `the_server_opens_no_files` sees.
#[test]
fn paths_in_requests_are_names_and_texts() {
    let server = Running::new();
    let secret = std::env::temp_dir().join(format!("ktx-secret-{}", std::process::id()));
    std::fs::write(&secret, "the secret of the file").expect("it is written");
    let path = secret.display().to_string();
    for name in [
        path.as_str(),
        "../models/pip-17m.gguf",
        "file:///etc/passwd",
        "pip:../x",
    ] {
        let fields = json!({"model": name});
        server.chat(with(question("x"), fields.clone())).error(404);
        assert_eq!(server.post("/api/show", &fields).status, 404, "{name}");
    }
    for fields in [
        json!({"chat_template": path}),
        json!({"chat_template_kwargs": {"template": path, "file": path}}),
        json!({"tools": [{"type": "function", "function": {"name": path}}]}),
        json!({"messages": [{"role": "user", "content": [{"type": "image_url",
            "image_url": {"url": format!("file://{path}")}}]}]}),
        json!({"messages": [{"role": "user", "content": path}]}),
        json!({"messages": [{"role": "user", "content": format!("{{% include '{path}' %}}")}]}),
        json!({"response_format": {"type": "json_schema", "json_schema": {"name": "x",
            "schema": {"$ref": format!("file://{path}")}}}}),
    ] {
        let reply = server.chat(with(question("x"), with(fields, json!({"max_tokens": 30}))));
        assert!(!reply.body.contains("the secret"), "{}", reply.body);
    }
    std::fs::remove_file(secret).expect("it is removed");
    lives(&server);
}

#[test]
fn templates_cannot_be_told_what_the_server_decides() {
    let server = Running::new();
    let fields = json!({"chat_template_kwargs": {"messages": [], "bos_token": "x", "loop": 1, "enable_thinking": "x"}});
    let request = with(question("What is 7 + 5?"), fields);
    let answer = server.chat(request).ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "7 + 5 = 12.");
}

/// Clients leave while others are answered, which see nothing of it.
#[test]
fn streams_that_are_cancelled_under_load_change_no_other_answer() {
    let server = Running::new();
    let ask = |i: usize| {
        let fields = json!({"temperature": 1.0, "seed": i, "max_tokens": 40});
        let reply = server.chat(with(question(&format!("What is {i} + 3?")), fields));
        reply.ok()["choices"][0]["message"]["content"].clone()
    };
    let alone: Vec<_> = (0..6).map(ask).collect();
    let leave = |i: usize| {
        let text = format!("What is {i} + 3?");
        let fields = json!({"ignore_eos": true, "max_tokens": 450, "stream": i.is_multiple_of(2)});
        let body = with(question(&text), fields).to_string();
        let mut connection = server.client.connect();
        let bytes = request("POST", CHAT, &[], body.as_bytes());
        connection.write_all(&bytes).expect("it is sent");
        std::thread::sleep(Duration::from_millis(i as u64 * 7 % 40));
    };
    std::thread::scope(|scope| {
        let (leave, ask) = (&leave, &ask);
        for first in 0..3 {
            scope.spawn(move || (0..15).for_each(|i| leave(first + i)));
        }
        let stays: Vec<_> = (0..6)
            .map(|i| scope.spawn(move || [ask(i), ask(i)]))
            .collect();
        for (stay, alone) in stays.into_iter().zip(&alone) {
            assert_eq!(
                stay.join().expect("it ends"),
                [alone.clone(), alone.clone()]
            );
        }
    });
    server.wait_until_idle();
    let metrics = server.scheduler.metrics();
    assert!(metrics.cancelled > 0, "{metrics:?}");
    assert_eq!(metrics.used_pages, 0);
}

#[test]
fn clients_that_go_away_free_what_they_used() {
    let server = Running::new();
    for (i, stream) in [true, false].iter().cycle().take(20).enumerate() {
        let body = with(
            question("x"),
            json!({"ignore_eos": true, "max_tokens": 450, "stream": stream}),
        );
        let mut connection = server.client.connect();
        let bytes = request("POST", CHAT, &[], body.to_string().as_bytes());
        connection.write_all(&bytes).expect("it is sent");
        if i % 3 == 0 {
            std::thread::sleep(Duration::from_millis(30));
        }
    }
    server.wait_until_idle();
    assert_eq!(server.scheduler.metrics().used_pages, 0);
    assert!(server.scheduler.metrics().generated_tokens < 20 * 450);
    lives(&server);
}
