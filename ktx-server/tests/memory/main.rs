//! What the server keeps: a program of its own, since it looks at the memory of the whole process.
#![cfg(target_os = "linux")]

#[path = "../api/client.rs"]
#[allow(dead_code, reason = "the other tests need all of it")]
mod client;

use std::sync::Mutex;

use client::Client;
use ktx_core::Engine;
use ktx_core::serving::{Scheduler, SchedulerSettings};
use ktx_server::{PlanView, Server, ServerSettings};
use serde_json::json;

/// One test at a time.
static TURN: Mutex<()> = Mutex::new(());

/// Runs `body` with a client of a running server.
fn with_server(body: impl FnOnce(Client)) {
    let planned = Engine::builder()
        .model(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../models/pip-17m.gguf"
        ))
        .threads(2)
        .context(512)
        .plan()
        .expect("the model is planned");
    let plan = PlanView::of(&planned).expect("its plan is shown");
    let engine = planned.load(&mut |_| true).expect("the model loads");
    let scheduler =
        Scheduler::start(engine, SchedulerSettings::default()).expect("the thread starts");
    let server = Server::bind("127.0.0.1:0", scheduler, ServerSettings::default(), plan)
        .expect("a port is free");
    let (client, stop) = (Client::new(server.address()), server.stop_handle());
    let thread = std::thread::spawn(move || server.run());
    body(client);
    stop.stop();
    thread.join().expect("the server ends");
}

/// Bytes of this process in memory.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("the system tells");
    let pages: u64 = text
        .split(' ')
        .nth(1)
        .and_then(|p| p.parse().ok())
        .expect("a number");
    pages * 4096
}

fn requests_leave_no_memory_behind(warm: usize, count: usize, allowed: u64) {
    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    with_server(|client| check(client, warm, count, allowed));
}

fn check(client: Client, warm: usize, count: usize, allowed: u64) {
    let ask = |count: usize| {
        std::thread::scope(|scope| {
            for worker in 0..4 {
                scope.spawn(move || {
                    for i in 0..count / 4 {
                        let text = format!("What is {} + {}?", worker, i % 50);
                        let body = json!({"messages": [{"role": "user", "content": text}],
                            "stream": i % 2 == 0, "max_tokens": 4});
                        let body = body.to_string();
                        let path = "/v1/chat/completions";
                        let reply = client.send("POST", path, &[], body.as_bytes());
                        assert_eq!(reply.status, 200, "{}", reply.body);
                    }
                });
            }
        });
    };
    ask(warm);
    let before = resident();
    ask(count);
    let after = resident();
    assert!(
        after < before + allowed,
        "{before} bytes before {count} requests, {after} behind them"
    );
}

#[test]
fn hundreds_of_requests_leave_no_memory_behind() {
    requests_leave_no_memory_behind(200, 400, 24 << 20);
}

#[test]
#[ignore = "takes minutes"]
fn ten_thousand_requests_leave_no_memory_behind() {
    requests_leave_no_memory_behind(1_000, 10_000, 24 << 20);
}
