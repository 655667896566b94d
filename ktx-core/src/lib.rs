//! Run language models that do not fit the GPU: YAML placement rules, engine, sessions, tokenizer, chat templates.

pub mod chat;
pub mod plan;
pub mod rules;
pub mod tokenizer;
