//! The command line `ktx`.

fn main() {}
