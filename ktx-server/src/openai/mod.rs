//! OpenAI's API.

pub(crate) mod chat;
mod chat_answer;
pub(crate) mod completions;
mod events;
mod fields;
mod messages;
pub(crate) mod models;
mod response;
mod tools;

pub(crate) use fields::Common;
pub(crate) use messages::{MessageField, chat_messages};
pub(crate) use response::{ChatChunk, ChatCompletion, CompletionChunk, CompletionResponse};
