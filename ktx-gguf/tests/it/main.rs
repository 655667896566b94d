//! Tests over the public API.

mod allocation;
mod attacks;
mod blocks;
mod metadata;
mod open;
mod properties;
mod raw;
mod safetensors;
mod safetensors_attacks;
mod split;
mod tensor;
