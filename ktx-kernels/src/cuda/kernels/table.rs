// Written by `cargo run -p xtask -- kernels`.

static COMPILED: &[Compiled] = &[];

#[cfg(test)]
static SOURCES: &[(&str, u64)] = &[];
