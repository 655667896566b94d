//! What the server and the libraries below it log, at the finest level: a program of its own, since it watches
//! the events of the whole process.

#[path = "../api/client.rs"]
#[allow(dead_code, reason = "the other tests need all of it")]
mod client;

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use client::Client;
use ktx_core::Engine;
use ktx_core::serving::{Scheduler, SchedulerSettings};
use ktx_server::{ApiKeys, PlanView, Server, ServerSettings};
use tracing_subscriber::filter::LevelFilter;

static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Log;

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
        log.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn neither_keys_nor_prompts_are_logged() {
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::TRACE)
        .with_writer(|| Log)
        .init();
    let planned = Engine::builder()
        .model(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../models/pip-17m.gguf"
        ))
        .threads(2)
        .context(256)
        .plan()
        .expect("the model is planned");
    let plan = PlanView::of(&planned).expect("its plan is shown");
    let engine = planned.load(&mut |_| true).expect("the model loads");
    let scheduler =
        Scheduler::start(engine, SchedulerSettings::default()).expect("the thread starts");
    let settings = ServerSettings {
        api_keys: ApiKeys::new(["sk-right-5fd1".to_owned()]),
        ..ServerSettings::default()
    };
    let log_settings = format!("{settings:?}");
    let server = Server::bind("127.0.0.1:0", scheduler, settings, plan).expect("a port is free");
    let (client, stop) = (Client::new(server.address()), server.stop_handle());
    let thread = std::thread::spawn(move || server.run());
    let chat = |key: &str, body: &str| {
        let header = format!("Authorization: Bearer {key}");
        let path = "/v1/chat/completions";
        client.send("POST", path, &[&header], body.as_bytes())
    };
    let question =
        r#"{"max_tokens": 5, "messages": [{"role": "user", "content": "my secret prompt-77"}]}"#;
    assert_eq!(chat("sk-right-5fd1", question).status, 200);
    let refused = chat("sk-wrong-90ab", question);
    assert_eq!(refused.status, 401);
    assert_eq!(
        chat("sk-right-5fd1", r#"{"messages": "prompt-77"}"#).status,
        400
    );
    let metrics = client.send(
        "GET",
        "/metrics",
        &["Authorization: Bearer sk-right-5fd1"],
        b"",
    );
    stop.stop();
    thread.join().expect("the server ends");
    let log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
    let log = String::from_utf8_lossy(&log);
    assert!(
        !log.is_empty(),
        "nothing was logged at all: the test sees nothing"
    );
    for text in [&*log, &log_settings, &refused.body, &metrics.body] {
        for secret in ["5fd1", "90ab", "prompt-77"] {
            assert!(!text.contains(secret), "`{secret}` is in: {text}");
        }
    }
}
