//! How fast a GPU's memory is, and the bus to it.

use super::error::CudaError;
use super::gpu::Gpu;
use super::graph::Event;
use super::memory::{DeviceBuffer, PinnedBuffer, copy_async};

impl Gpu {
    /// Bytes a second that its memory reads and writes, measured by copies within it.
    ///
    /// # Errors
    /// What the driver reports; with little memory free, that.
    pub fn measured_bandwidth(&self) -> Result<f64, CudaError> {
        const ROUNDS: usize = 5;
        let (free, _) = self.memory()?;
        let bytes = (256 << 20).min(free / 8);
        let from = DeviceBuffer::zeroed(self, bytes)?;
        let to = DeviceBuffer::zeroed(self, bytes)?;
        let mut best = 0.0f64;
        for _ in 0..ROUNDS {
            let start = Event::record(self)?;
            // SAFETY: both buffers hold that many bytes and are dropped after the stream was waited for.
            unsafe { copy_async(self, to.address(), from.address(), bytes) }?;
            let end = Event::record(self)?;
            let seconds = f64::from(end.milliseconds_since(&start)?) / 1e3;
            best = best.max(2.0 * bytes as f64 / seconds);
        }
        Ok(best)
    }

    /// Bytes a second that it reads of pinned main memory.
    ///
    /// # Errors
    /// As [`measured_bandwidth`](Self::measured_bandwidth), and if the system refuses pinned memory.
    pub fn measured_uploads(&self) -> Result<f64, CudaError> {
        const ROUNDS: usize = 4;
        const BYTES: usize = 32 << 20;
        let from = PinnedBuffer::new(self, BYTES)?;
        let to = DeviceBuffer::new(self, BYTES)?;
        let mut best = 0.0f64;
        for _ in 0..ROUNDS {
            let start = Event::record(self)?;
            // SAFETY: as above.
            unsafe { copy_async(self, to.address(), from.address(), BYTES) }?;
            let seconds = f64::from(Event::record(self)?.milliseconds_since(&start)?) / 1e3;
            best = best.max(BYTES as f64 / seconds);
        }
        Ok(best)
    }
}
