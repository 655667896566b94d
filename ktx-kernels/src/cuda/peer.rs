//! Values on their way from one GPU to another.

use cudarc::driver::sys::{self, CUresult};

use super::DeviceMatrix;
use super::error::{CudaError, cu};
use super::gpu::Gpu;
use super::handover::copy_by_kernel;
use super::memory::{PinnedBuffer, copy_async};
use super::upload::Moment;

/// Bytes of pinned memory between two GPUs that cannot reach each other.
const STAGING_BYTES: usize = 8 << 20;
/// Parts of it, which are written and read in turns.
const PARTS: usize = 2;

/// The way from one GPU to another. Streams wait for each other on it, the host for neither.
pub struct Passage {
    source: Gpu,
    target: Gpu,
    staging: Option<Staging>,
}

/// Pinned memory that the source writes and the target reads.
struct Staging {
    buffer: PinnedBuffer,
    /// When the target has read each part.
    read: [Moment; PARTS],
}

impl Passage {
    /// The best way: directly where both are one, or where the target reaches the source's memory; else through
    /// main memory.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn new(source: &Gpu, target: &Gpu) -> Result<Self, CudaError> {
        if source.ordinal() == target.ordinal() || reaches(target, source)? {
            return Ok(Self {
                source: source.clone(),
                target: target.clone(),
                staging: None,
            });
        }
        Self::through_main_memory(source, target)
    }

    fn through_main_memory(source: &Gpu, target: &Gpu) -> Result<Self, CudaError> {
        Ok(Self {
            source: source.clone(),
            target: target.clone(),
            staging: Some(Staging {
                buffer: PinnedBuffer::new(target, STAGING_BYTES)?,
                read: [Moment::new(target)?, Moment::new(target)?],
            }),
        })
    }

    /// Whether values go there without a stay in main memory.
    pub fn is_direct(&self) -> bool {
        self.staging.is_none()
    }

    /// Copies a matrix, after all that was started on the source before; what is started there from now on may
    /// write over it. While steps are recorded, copies are kernels.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// If the sizes differ.
    pub fn copy(
        &self,
        from: DeviceMatrix,
        to: DeviceMatrix,
        is_recording: bool,
    ) -> Result<(), CudaError> {
        assert_eq!(from.len(), to.len(), "a copy keeps the size");
        let Some(staging) = &self.staging else {
            self.target.wait_for(&self.source)?;
            match is_recording {
                true => copy_by_kernel(&self.target, from, to)?,
                false => self.copy_directly(from, to)?,
            }
            return self.source.wait_for(&self.target);
        };
        let part_values = STAGING_BYTES / PARTS / size_of::<f32>();
        for (index, start) in (0..from.len()).step_by(part_values).enumerate() {
            let part = index % PARTS;
            let values = part_values.min(from.len() - start);
            let between = staging.buffer.address() + (part * STAGING_BYTES / PARTS) as u64;
            // SAFETY: a part of the pinned buffer, which whoever drops it waits for.
            let between = unsafe { DeviceMatrix::new(between, 1, values) };
            if index >= PARTS {
                staging.read[part].hold(&self.source)?;
            }
            start_copy(
                &self.source,
                from.value_range(start, values),
                between,
                is_recording,
            )?;
            self.target.wait_for(&self.source)?;
            start_copy(
                &self.target,
                between,
                to.value_range(start, values),
                is_recording,
            )?;
            staging.read[part].mark_kernels()?;
        }
        self.source.wait_for(&self.target)
    }

    fn copy_directly(&self, from: DeviceMatrix, to: DeviceMatrix) -> Result<(), CudaError> {
        let (source, target) = (&self.source, &self.target);
        if source.ordinal() == target.ordinal() {
            return start_copy(target, from, to, false);
        }
        target.bind()?;
        let bytes = from.len() * size_of::<f32>();
        // SAFETY: whoever made the matrices answers for their memory; contexts and stream live through the call.
        unsafe {
            cu!(cuMemcpyPeerAsync(
                to.address(),
                target.context(),
                from.address(),
                source.context(),
                bytes,
                target.stream(),
            ))
        }
    }
}

/// Starts a copy on a GPU's stream.
fn start_copy(
    gpu: &Gpu,
    from: DeviceMatrix,
    to: DeviceMatrix,
    is_recording: bool,
) -> Result<(), CudaError> {
    if is_recording {
        return copy_by_kernel(gpu, from, to);
    }
    let bytes = from.len() * size_of::<f32>();
    // SAFETY: whoever made the matrices answers for their memory.
    unsafe { copy_async(gpu, to.address(), from.address(), bytes) }
}

/// Whether kernels of a GPU can read another's memory; from now on they can, if so.
fn reaches(gpu: &Gpu, other: &Gpu) -> Result<bool, CudaError> {
    let mut can = 0;
    // SAFETY: writes one integer.
    unsafe {
        cu!(cuDeviceCanAccessPeer(
            &mut can,
            gpu.device(),
            other.device()
        ))
    }?;
    if can == 0 {
        return Ok(false);
    }
    gpu.bind()?;
    // SAFETY: both contexts are retained by their GPUs. A refusal leaves the way through main memory.
    let result = unsafe { sys::cuCtxEnablePeerAccess(other.context(), 0) };
    Ok(matches!(
        result,
        CUresult::CUDA_SUCCESS | CUresult::CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED
    ))
}

impl std::fmt::Debug for Passage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let way = match self.is_direct() {
            true => "directly",
            false => "through main memory",
        };
        write!(
            f,
            "Passage(cuda:{} to cuda:{}, {way})",
            self.source.index(),
            self.target.index()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::DeviceBuffer;

    /// More than the staging holds, so that its parts are used again.
    const VALUES: usize = 3 * STAGING_BYTES / 4 + 1001;

    fn matrix(buffer: &DeviceBuffer) -> DeviceMatrix {
        // SAFETY: the tests keep the buffers until all is done.
        unsafe { DeviceMatrix::new(buffer.address(), 1, buffer.bytes() / 4) }
    }

    fn passages(a: &Gpu, b: &Gpu) -> Vec<[Passage; 2]> {
        vec![
            [Passage::new(a, b).unwrap(), Passage::new(b, a).unwrap()],
            [
                Passage::through_main_memory(a, b).unwrap(),
                Passage::through_main_memory(b, a).unwrap(),
            ],
        ]
    }

    /// There and back, the second GPU's kernels behind the first's each time.
    #[test]
    fn gpu_values_go_to_another_gpu_and_back_in_order() {
        let Some(a) = Gpu::for_tests() else { return };
        let b = Gpu::second_for_tests();
        let values: Vec<f32> = (0..VALUES).map(|i| (i % 8191) as f32).collect();
        for [there, back] in passages(&a, &b) {
            let on_a = DeviceBuffer::upload(&a, &values).unwrap();
            let on_b = DeviceBuffer::zeroed(&b, 4 * VALUES).unwrap();
            for _ in 0..5 {
                there.copy(matrix(&on_a), matrix(&on_b), false).unwrap();
                // Nobody may see these.
                on_a.fill(0xff).unwrap();
                back.copy(matrix(&on_b), matrix(&on_a), false).unwrap();
                on_b.fill(0xff).unwrap();
            }
            assert!(on_a.read::<f32>(0, VALUES).unwrap() == values, "{there:?}");
        }
    }

    /// A graph of kernels on both, started several times.
    #[test]
    fn gpu_graphs_of_two_gpus_run_in_order() {
        let Some(a) = Gpu::for_tests() else { return };
        let b = Gpu::second_for_tests();
        let n = 50_001;
        for [there, back] in passages(&a, &b) {
            let [x, sum] = [1.0f32, 0.0].map(|v| DeviceBuffer::upload(&a, &vec![v; n]).unwrap());
            let [y, one] = [0.0f32, 1.0].map(|v| DeviceBuffer::upload(&b, &vec![v; n]).unwrap());
            let add = crate::activation::cuda::add;
            let record = || {
                for _ in 0..3 {
                    there.copy(matrix(&x), matrix(&y), true)?;
                    add(&b, matrix(&y), matrix(&one))?;
                    add(&a, matrix(&sum), matrix(&x))?;
                    back.copy(matrix(&y), matrix(&x), true)?;
                }
                Ok::<(), CudaError>(())
            };
            // Once without a recording: what it needs is loaded then.
            record().unwrap();
            [&a, &b].iter().for_each(|gpu| gpu.synchronize().unwrap());
            a.begin_capture_with(std::slice::from_ref(&b)).unwrap();
            record().unwrap();
            let graph = a.end_capture_with(std::slice::from_ref(&b)).unwrap();
            (0..4).for_each(|_| graph.launch().unwrap());
            // x goes up by one each time, and the sum has seen all before.
            assert_eq!(x.read::<f32>(0, n).unwrap(), vec![16.0; n], "{there:?}");
            let seen = (1..=15).sum::<u32>() as f32;
            assert_eq!(sum.read::<f32>(0, n).unwrap(), vec![seen; n], "{there:?}");
        }
    }
}
