//! A ktx engine as a worker of NVIDIA Dynamo: Dynamo's front end tokenises, routes and detokenises; this
//! answers tokens with tokens, many requests at once.

mod backend;
mod request;

pub use backend::{KtxBackend, WorkerSettings};
