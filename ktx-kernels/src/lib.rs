//! Arithmetic of ktx on plain slices: quantised matrix products, attention, normalisation, routing, and the thread pool they run on.
pub mod cpu;
pub mod pool;
pub mod activation;
pub mod gate;
pub mod kv;
pub mod norm;
pub mod rope;
mod disjoint;
mod lanes;
#[cfg(test)]
mod testing;
