//! Arithmetic of ktx on plain slices: quantised matrix products, attention, normalisation, routing, and the thread pool they run on.
pub mod activation;
pub mod cpu;
mod disjoint;
pub mod gate;
pub mod kv;
mod lanes;
pub mod linear;
pub mod norm;
pub mod pool;
pub mod rope;
#[cfg(test)]
mod testing;
