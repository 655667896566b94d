//! Arithmetic of ktx on plain slices: quantised matrix products, attention, normalisation, routing, and the thread pool they run on.
pub mod activation;
pub mod attention;
pub mod cpu;
mod disjoint;
pub mod device;
pub mod gate;
pub mod heads;
pub mod kv;
mod lanes;
pub mod linear;
pub mod moe;
pub mod norm;
pub mod pool;
pub mod rope;
pub mod workspace;
#[cfg(test)]
mod testing;
