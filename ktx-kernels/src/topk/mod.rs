//! The largest elements of rows on a GPU, for samplers: argmax, and the k best in order.

pub mod cuda;
#[cfg(test)]
mod tests;
