//! Many clients at once. Ten thousand connections need a process of their own: `tests/cli/serve.rs`.

use std::net::TcpStream;

use serde_json::json;

use super::{Running, question, with};

#[test]
fn hundreds_of_idle_connections_do_not_hold_others_up() {
    let server = Running::new();
    let idle: Vec<TcpStream> = (0..300).map(|_| server.client.connect()).collect();
    let answer = server.chat(question("What is 7 + 5?")).ok();
    assert_eq!(answer["choices"][0]["message"]["content"], "7 + 5 = 12.");
    drop(idle);
}

#[test]
fn answers_are_the_same_alone_and_under_load() {
    let server = Running::new();
    let ask = |i: usize| {
        let fields = json!({"temperature": 1.0, "seed": i, "max_tokens": 30});
        let reply = server.chat(with(question(&format!("What is {i} + 3?")), fields));
        reply.ok()["choices"][0]["message"]["content"].clone()
    };
    let together: Vec<_> = std::thread::scope(|scope| {
        let ask = &ask;
        let threads: Vec<_> = (0..12).map(|i| scope.spawn(move || ask(i))).collect();
        threads
            .into_iter()
            .map(|t| t.join().expect("it ends"))
            .collect()
    });
    for (i, answer) in together.into_iter().enumerate() {
        assert_eq!(answer, ask(i), "request {i}");
    }
}
