//! Arithmetic of ktx on plain slices and on GPUs: quantised matrix products, attention, normalisation, routing, and the thread pool they run on.
pub mod activation;
pub mod attention;
pub mod cpu;
pub mod cuda;
pub mod device;
mod disjoint;
pub mod gate;
pub mod heads;
pub mod kv;
mod lanes;
pub mod linear;
pub mod moe;
pub mod norm;
pub mod pool;
pub mod rope;
pub mod rows;
#[cfg(test)]
mod testing;
pub mod topk;
pub mod workspace;
mod zeroed;
