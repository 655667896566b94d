//! One file for each command.

pub(crate) mod bench;
pub(crate) mod chat;
pub(crate) mod completions;
mod device_cuda;
pub(crate) mod devices;
pub(crate) mod inspect;
pub(crate) mod operators;
pub(crate) mod perplexity;
pub(crate) mod plan;
mod plan_diff;
mod plan_source;
pub(crate) mod rules;
pub(crate) mod rules_check;
pub(crate) mod run;
pub(crate) mod serve;
