//! Serve language models to many users at once: OpenAI's and Ollama's APIs on a ktx engine.
//!
//! ```no_run
//! use ktx_core::Engine;
//! use ktx_core::serving::{Scheduler, SchedulerSettings};
//! use ktx_server::{PlanView, Server, ServerSettings};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let planned = Engine::builder().model("model.gguf").plan()?;
//! let plan = PlanView::of(&planned)?;
//! let engine = planned.load(&mut |_| true)?;
//! let scheduler = Scheduler::start(engine, SchedulerSettings::default())?;
//! let server = Server::bind("127.0.0.1:10002", scheduler, ServerSettings::default(), plan)?;
//! println!("listening on {}", server.address());
//! server.run_until_interrupted()?;
//! # Ok(())
//! # }
//! ```

#![forbid(unsafe_code)]

mod app;
mod auth;
mod body;
mod constraint;
mod error;
mod generate;
mod health;
mod listen;
mod metrics;
mod ollama;
mod openai;
mod openapi;
mod output;
mod page;
mod patience;
mod plan;
mod routes;
mod server;
mod settings;
mod time;

pub use auth::ApiKeys;
pub use error::ServerError;
pub use plan::{DeviceView, ModuleView, PlanView, RuleView};
pub use server::{Server, StopHandle};
pub use settings::ServerSettings;

/// The description of the API, as `/openapi.json` gives it.
pub fn openapi() -> String {
    use utoipa::OpenApi;
    let document = openapi::Document::openapi();
    serde_json::to_string_pretty(&document).unwrap_or_default()
}
