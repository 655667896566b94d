//! GPUs through the driver alone: probing, memory, kernels compiled ahead of time, graphs.
//!
//! The driver's library is loaded when it is first asked for; a machine without one is an error that
//! says so, never a panic. Kernels are the `.cu` files beside their siblings for the CPU, compiled for
//! each generation of GPUs by `cargo run -p xtask -- kernels`; the results are part of this crate, so
//! that neither building nor running needs CUDA's toolkit.
//!
//! One GPU has one stream for kernels: what is started on it runs in that order. Uploads can go beside it
//! ([`UploadStream`]). With several GPUs their streams wait for each other where values pass ([`Passage`]).

mod artifacts;
mod bandwidth;
mod chosen;
pub mod error;
mod gpu;
mod graph;
mod handover;
mod memory;
mod peer;
mod probe;
mod step;
mod upload;

pub use chosen::GPUS_VARIABLE;
pub use error::CudaError;
pub use gpu::{Arg, Function, Gpu, Launch, turn};
pub use graph::{Event, Graph};
pub use handover::{Handover, copy_by_kernel};
pub use memory::{DeviceBuffer, DeviceSlice, PinnedBuffer, copy_async};
pub use peer::Passage;
pub use probe::{Driver, GpuInfo, check_choice, device, driver};
pub use step::{StepInputs, StepValues, StepView};
pub use upload::{Moment, ReadableMemory, UploadStream};

/// A matrix of f32 on a GPU: an address and a shape. Whoever makes one answers for the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMatrix {
    address: u64,
    rows: usize,
    cols: usize,
}

impl DeviceMatrix {
    /// `rows` rows of `cols` values from `address` on.
    ///
    /// # Safety
    /// The memory must be a GPU's or pinned, hold that many values, and stay for as long as kernels use it.
    pub unsafe fn new(address: u64, rows: usize, cols: usize) -> Self {
        Self {
            address,
            rows,
            cols,
        }
    }

    /// Where it starts.
    pub fn address(self) -> u64 {
        self.address
    }

    /// As a kernel's argument.
    pub fn arg(self) -> Arg {
        Arg::Ptr(self.address)
    }

    /// Number of rows.
    pub fn rows(self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn cols(self) -> usize {
        self.cols
    }

    /// Number of values.
    pub fn len(self) -> usize {
        self.rows * self.cols
    }

    /// Whether it holds no value.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// The values `start .. start + count` of it, as one row.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn value_range(self, start: usize, count: usize) -> Self {
        assert!(start + count <= self.len(), "values of {self:?}");
        Self {
            address: self.address + (start * size_of::<f32>()) as u64,
            rows: 1,
            cols: count,
        }
    }

    /// The rows `start .. start + rows` of it.
    ///
    /// # Panics
    /// If there are fewer.
    pub fn row_range(self, start: usize, rows: usize) -> Self {
        assert!(
            start + rows <= self.rows,
            "rows {start}..{} of {}",
            start + rows,
            self.rows
        );
        Self {
            address: self.address + (start * self.cols * size_of::<f32>()) as u64,
            rows,
            ..self
        }
    }
}
