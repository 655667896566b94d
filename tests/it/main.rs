//! The engine on real and on tiny models, against references that share no code with it.

mod adapters;
mod deferral;
mod devices;
mod fp8;
mod generation;
mod goldens;
mod gpu;
mod gpu_hot;
mod gpu_streaming;
mod gpus;
mod huge_pages;
#[cfg(target_os = "linux")]
mod memory;
mod naive;
mod named_operators;
mod perplexity;
mod placement;
mod rule_files;
mod run;
mod serving;
mod smollm2;
mod spill;
mod synthetic;
mod tiny;
mod tiny_models;
mod transformers;
mod trees;
