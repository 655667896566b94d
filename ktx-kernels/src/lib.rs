//! Arithmetic of ktx on plain slices: quantised matrix products, attention, normalisation, routing, and the thread pool they run on.
pub mod cpu;
pub mod pool;
