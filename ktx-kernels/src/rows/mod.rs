//! Rows by number on a GPU: gathering, copying columns, and token embedding from GGUF blocks.
//!
//! On the host the same is a loop over slices, and [`WeightRows::dequantize`](crate::linear::WeightRows).

pub mod cuda;
#[cfg(test)]
mod tests;
