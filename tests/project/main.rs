//! What must hold of the project as a whole: its layers, its packages, its sources, a crate that
//! depends on it, and CPUs without the newest instructions.

mod documents;
mod downstream;
mod emulated;
mod layering;
mod metadata;
mod packages;
mod sources;
