//! What operators share to run on a GPU: their weights on each of their GPUs, and the small operations
//! on activations wherever these are.

use ktx_kernels::activation;
use ktx_kernels::cuda::{CudaError, DeviceBuffer, Gpu};
use ktx_kernels::device::{Device, DeviceKind};
use ktx_kernels::rows;
use ktx_kernels::workspace::Act;

use crate::build::{OpError, Placement};
use crate::linear::kernel_error;
use crate::module::Forward;

/// What an operator holds on each of its GPUs.
pub(crate) struct OnGpus<T>(Vec<(Device, T)>);

impl<T> Default for OnGpus<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> OnGpus<T> {
    /// Makes it for every GPU that a placement names; nothing where it names none.
    pub(crate) fn load(
        path: &str,
        placement: Placement,
        mut make: impl FnMut(&Gpu) -> Result<T, OpError>,
    ) -> Result<Self, OpError> {
        let mut all = Vec::new();
        for device in gpus(placement) {
            let gpu = Gpu::open(device.index()).map_err(|e| kernel_error(path, e))?;
            all.push((device, make(&gpu)?));
        }
        Ok(Self(all))
    }

    /// What is on this device.
    pub(crate) fn get(&self, path: &str, device: Device) -> Result<&T, OpError> {
        let found = self.0.iter().find(|(d, _)| *d == device);
        found
            .map(|(_, value)| value)
            .ok_or_else(|| kernel_error(path, format_args!("its weights are not on {device}")))
    }
}

/// The GPUs of a placement, each once.
pub(crate) fn gpus(placement: Placement) -> impl Iterator<Item = Device> {
    let second = (placement.prefill != placement.generate).then_some(placement.prefill);
    let both = std::iter::once(placement.generate).chain(second);
    both.filter(|device| device.kind() == DeviceKind::Cuda)
}

/// A copy of small values on a GPU.
pub(crate) fn upload(path: &str, gpu: &Gpu, values: &[f32]) -> Result<DeviceBuffer, OpError> {
    DeviceBuffer::upload(gpu, values).map_err(|e| kernel_error(path, e))
}

impl Forward<'_> {
    /// The GPU that holds an activation; none if it is in main memory.
    pub fn gpu(&self, act: Act) -> Option<Gpu> {
        self.workspace.gpu(act.device()).cloned()
    }

    /// `y += x`.
    ///
    /// # Errors
    /// What a GPU refuses.
    pub fn add(&mut self, y: Act, x: Act) -> Result<(), OpError> {
        match self.gpu(y) {
            Some(gpu) => {
                let (x, y) = (self.workspace.matrix(x), self.workspace.matrix(y));
                activation::cuda::add(&gpu, y, x).map_err(refused)
            }
            None => {
                let ([x], [y]) = self.workspace.views([x], [y]);
                activation::add(self.pool, y, x);
                Ok(())
            }
        }
    }

    /// `gate = silu(gate) * up`.
    ///
    /// # Errors
    /// What a GPU refuses.
    pub fn silu_mul(&mut self, gate: Act, up: Act) -> Result<(), OpError> {
        match self.gpu(gate) {
            Some(gpu) => {
                let (g, u) = (self.workspace.matrix(gate), self.workspace.matrix(up));
                let silu = activation::GatedActivation::SwiGlu;
                activation::cuda::gated(&gpu, silu, g, u, g).map_err(refused)
            }
            None => {
                let ([u], [g]) = self.workspace.views([up], [gate]);
                activation::silu_mul_in_place(self.pool, g, u);
                Ok(())
            }
        }
    }

    /// `y[i] += sigmoid(scale[i]) * x[i]` for each row `i`; `scale` `[rows, 1]`.
    ///
    /// # Errors
    /// What a GPU refuses.
    pub fn add_gated_rows(&mut self, y: Act, x: Act, scale: Act) -> Result<(), OpError> {
        match self.gpu(y) {
            Some(gpu) => {
                let [y, x, scale] = [y, x, scale].map(|act| self.workspace.matrix(act));
                let how = activation::cuda::RowScale::Sigmoid;
                activation::cuda::add_scaled_rows(&gpu, y, x, scale, how).map_err(refused)
            }
            None => {
                activation::sigmoid(self.pool, self.workspace.write(scale));
                let ([x, scale], [y]) = self.workspace.views([x, scale], [y]);
                activation::add_scaled_rows(self.pool, y, x, scale);
                Ok(())
            }
        }
    }

    /// Copies `cols` columns of every row: from column `from.1` of one to column `to.1` of the other.
    ///
    /// # Errors
    /// What a GPU refuses.
    pub fn copy_columns(
        &mut self,
        from: (Act, usize),
        to: (Act, usize),
        cols: usize,
    ) -> Result<(), OpError> {
        match self.gpu(to.0) {
            Some(gpu) => {
                let [from, to] = [from, to].map(|(act, first)| rows::cuda::Columns {
                    matrix: self.workspace.matrix(act),
                    first,
                });
                rows::cuda::copy_columns(&gpu, from, to, cols).map_err(refused)
            }
            None => {
                let ([x], [y]) = self.workspace.views([from.0], [to.0]);
                let x = x.chunks_exact(from.0.cols());
                let y = y.chunks_exact_mut(to.0.cols());
                for (x, y) in x.zip(y) {
                    y[to.1..to.1 + cols].copy_from_slice(&x[from.1..from.1 + cols]);
                }
                Ok(())
            }
        }
    }
}

/// What a GPU said.
pub(crate) fn refused(error: CudaError) -> OpError {
    OpError::Workspace(error.into())
}
