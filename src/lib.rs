//! The command line `ktx`.
