//! GGUF files: container, metadata, memory map, block formats with their reference dequantiser.
