//! Model architectures of ktx: GGUF metadata to configuration to module tree, one file per family.
