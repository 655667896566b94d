//! The server from outside, over its socket.

mod client;
mod hostile;
mod limits;
mod load;
mod ollama;
mod openai;
mod page;
mod reference;
mod shapes;

use std::thread::JoinHandle;

use client::{Client, Reply};
use ktx_core::Engine;
use ktx_core::serving::{Scheduler, SchedulerSettings};
use ktx_server::{PlanView, Server, ServerSettings, StopHandle};
use serde_json::{Value, json};

/// A running server with the built-in model; it stops with its value.
struct Running {
    client: Client,
    scheduler: Scheduler,
    stop: StopHandle,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn with(settings: ServerSettings, scheduler: SchedulerSettings, context: usize) -> Self {
        let planned = Engine::builder()
            .model(concat!(
                env!("CARGO_MANIFEST_DIR"),
                "/../models/pip-17m.gguf"
            ))
            .threads(2)
            .context(context)
            .sessions(8)
            .plan()
            .expect("the model is planned");
        let plan = PlanView::of(&planned).expect("its plan is shown");
        let engine = planned.load(&mut |_| true).expect("the model loads");
        let scheduler = Scheduler::start(engine, scheduler).expect("the thread starts");
        let server =
            Server::bind("127.0.0.1:0", scheduler.clone(), settings, plan).expect("a port is free");
        let (client, stop) = (Client::new(server.address()), server.stop_handle());
        let thread = Some(std::thread::spawn(move || server.run()));
        Self {
            client,
            scheduler,
            stop,
            thread,
        }
    }

    fn new() -> Self {
        Self::with(settings(), SchedulerSettings::default(), 512)
    }

    fn get(&self, path: &str) -> Reply {
        self.client.send("GET", path, &[], b"")
    }

    fn post(&self, path: &str, body: &Value) -> Reply {
        self.client
            .send("POST", path, &[], body.to_string().as_bytes())
    }

    fn chat(&self, body: Value) -> Reply {
        self.post("/v1/chat/completions", &body)
    }

    /// Waits until no request is left.
    fn wait_until_idle(&self) {
        for _ in 0..2000 {
            if self.scheduler.is_idle() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("requests are left: {:?}", self.scheduler.metrics());
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn settings() -> ServerSettings {
    let mut settings = ServerSettings {
        model_name: "pip".to_owned(),
        ..ServerSettings::default()
    };
    settings.defaults.max_new_tokens = 64;
    settings
}

fn question(text: &str) -> Value {
    json!({"model": "pip", "temperature": 0, "messages": [{"role": "user", "content": text}]})
}

/// A request with more fields.
fn with(mut request: Value, fields: Value) -> Value {
    let more = fields.as_object().expect("fields");
    let request_fields = request.as_object_mut().expect("a request");
    request_fields.extend(more.clone());
    request
}
