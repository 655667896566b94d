//! Ollama's API: one JSON object a line.

mod answer;
pub(crate) mod chat;
pub(crate) mod generate;
pub(crate) mod models;
mod options;
