//! Handing work over between a GPU and the CPU inside a captured graph, by flags in pinned memory.
//!
//! A kernel writes what the CPU needs and then a flag; a thread of the CPU spins on the flag, works, and
//! writes another flag, on which a kernel of one block spins. Flags hold the step's number, so nothing
//! is ever reset. The kernel waits for a bounded time: it gives up with a fault instead of hanging the GPU.

use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::time::{Duration, Instant};

use super::error::CudaError;
use super::gpu::{Arg, Gpu, Launch};
use super::memory::PinnedBuffer;
use super::{DeviceMatrix, StepView};

const MODULE: &str = "cuda/handover";

/// Seconds that a kernel waits for the CPU: less than the 2 s after which Windows resets a GPU.
const WAIT_SECONDS: u32 = 1;

/// Flags between GPUs and the CPU, a pair for each slot.
pub struct Handover {
    /// A cache line each: the fault, then `submitted` and `done` of every slot.
    flags: PinnedBuffer,
    slots: usize,
}

impl Handover {
    const LINE: usize = 64;

    /// Flags for so many slots in one step of these GPUs.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// If there is no GPU.
    pub fn new(gpus: &[Gpu], slots: usize) -> Result<Self, CudaError> {
        // Loaded now: nothing can be while kernels are recorded.
        for gpu in gpus {
            for kernel in ["ktx_submit", "ktx_wait", "ktx_copy"] {
                gpu.function(MODULE, kernel)?;
            }
        }
        Ok(Self {
            flags: PinnedBuffer::new(&gpus[0], Self::LINE * (1 + 2 * slots))?,
            slots,
        })
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.slots
    }

    fn offset(&self, line: usize) -> usize {
        assert!(line <= 2 * self.slots, "a slot that is not there");
        line * Self::LINE
    }

    fn arg(&self, line: usize) -> Arg {
        Arg::Ptr(self.flags.address() + self.offset(line) as u64)
    }

    fn flag(&self, line: usize) -> &AtomicU32 {
        let start = self.flags.address() as usize + self.offset(line);
        // SAFETY: inside the pinned buffer (`offset` checks), aligned to a cache line, lives as long as
        // `self`; the GPU writes it with single stores of 4 bytes.
        unsafe { &*(start as *const AtomicU32) }
    }

    /// Starts a kernel that copies up to three matrices to pinned memory and then raises the slot's flag;
    /// `step` is the GPU's.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// If there are more than three, or a pair differs in its number of values.
    pub fn submit(
        &self,
        gpu: &Gpu,
        slot: usize,
        copies: &[(DeviceMatrix, DeviceMatrix)],
        step: StepView,
    ) -> Result<(), CudaError> {
        assert!(copies.len() <= 3, "three copies at most");
        let mut args = Vec::with_capacity(11);
        for i in 0..3 {
            let (to, from, n) = copies.get(i).map_or((0, 0, 0), |(from, to)| {
                assert_eq!(from.len(), to.len(), "a copy keeps the size");
                (to.address(), from.address(), from.len())
            });
            args.extend([Arg::Ptr(to), Arg::Ptr(from), Arg::U32(n as u32)]);
        }
        args.extend([self.arg(1 + 2 * slot), Arg::Ptr(step.head())]);
        let function = gpu.function(MODULE, "ktx_submit")?;
        // SAFETY: the arguments are the kernel's; whoever made the matrices answers for their memory.
        unsafe { gpu.launch(function, Launch::linear(1, 1024), &args) }
    }

    /// Starts a kernel that waits for the slot's answer and copies it, if there is something to copy; `step` is
    /// the GPU's.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn wait(
        &self,
        gpu: &Gpu,
        slot: usize,
        copy: Option<(DeviceMatrix, DeviceMatrix)>,
        step: StepView,
    ) -> Result<(), CudaError> {
        let (to, from, n) = copy.map_or((0, 0, 0), |(from, to)| {
            assert_eq!(from.len(), to.len(), "a copy keeps the size");
            (to.address(), from.address(), from.len())
        });
        let args = [
            self.arg(2 + 2 * slot),
            Arg::Ptr(step.head()),
            self.arg(0),
            Arg::U64(u64::from(WAIT_SECONDS) * 1_000_000_000),
            Arg::Ptr(to),
            Arg::Ptr(from),
            Arg::U32(n as u32),
        ];
        let function = gpu.function(MODULE, "ktx_wait")?;
        let threads = if n == 0 { 32 } else { 1024 };
        // SAFETY: the arguments are the kernel's; whoever made the matrices answers for their memory.
        unsafe { gpu.launch(function, Launch::linear(1, threads), &args) }
    }

    /// Spins until the GPU has raised the slot's flag in this step.
    ///
    /// # Errors
    /// [`CudaError::HandoverTimeout`] if a kernel gave up or this takes too long, or what the GPU did wrong.
    pub fn await_submitted(&self, slot: usize, step: u32) -> Result<(), CudaError> {
        let flag = self.flag(1 + 2 * slot);
        let mut spins = 0u32;
        let mut since = None;
        while flag.load(Ordering::Acquire) != step {
            std::hint::spin_loop();
            spins = spins.wrapping_add(1);
            if spins.is_multiple_of(1 << 16) {
                self.fault()?;
                let since = *since.get_or_insert_with(Instant::now);
                if since.elapsed() > Duration::from_secs(10 * u64::from(WAIT_SECONDS)) {
                    return Err(CudaError::HandoverTimeout {
                        seconds: 10 * WAIT_SECONDS,
                    });
                }
            }
        }
        Ok(())
    }

    /// Tells the GPU that the CPU's part of the slot is done in this step.
    pub fn answer(&self, slot: usize, step: u32) {
        fence(Ordering::SeqCst);
        self.flag(2 + 2 * slot).store(step, Ordering::Release);
    }

    /// Whether a kernel gave up waiting.
    ///
    /// # Errors
    /// [`CudaError::HandoverTimeout`] if so.
    pub fn fault(&self) -> Result<(), CudaError> {
        match self.flag(0).load(Ordering::Acquire) {
            0 => Ok(()),
            _ => Err(CudaError::HandoverTimeout {
                seconds: WAIT_SECONDS,
            }),
        }
    }

    /// Tells kernels that wait that no answer will come.
    pub fn give_up(&self) {
        self.flag(0).store(1, Ordering::Release);
    }

    /// Forgets a fault, once the GPU is idle.
    pub fn clear_fault(&self) {
        self.flag(0).store(0, Ordering::Release);
    }
}

/// Starts a copy that can be recorded in a graph, within a GPU or between it and pinned memory.
///
/// # Errors
/// What the driver refuses.
///
/// # Panics
/// If the sizes differ.
pub fn copy_by_kernel(gpu: &Gpu, from: DeviceMatrix, to: DeviceMatrix) -> Result<(), CudaError> {
    assert_eq!(from.len(), to.len(), "a copy keeps the size");
    if from.is_empty() {
        return Ok(());
    }
    let function = gpu.function(MODULE, "ktx_copy")?;
    let blocks = from
        .len()
        .div_ceil(4 * 256)
        .min(4 * gpu.info().multiprocessors);
    let args = [to.arg(), from.arg(), Arg::U32(from.len() as u32)];
    // SAFETY: the arguments are the kernel's; whoever made the matrices answers for their memory.
    unsafe { gpu.launch(function, Launch::linear(blocks, 256), &args) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{DeviceBuffer, StepInputs, StepValues};
    use crate::workspace::StepCapacity;

    fn step(gpu: &Gpu) -> StepInputs {
        let capacity = StepCapacity {
            rows: 1,
            sequences: 1,
            pages: 1,
        };
        StepInputs::new(gpu, capacity).unwrap()
    }

    fn values(number: u32) -> StepValues<'static> {
        StepValues {
            number,
            ids: &[],
            positions: &[],
            sequences: &[],
            outputs: &[],
        }
    }

    #[test]
    fn gpu_and_cpu_take_turns_in_a_captured_graph() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let (n, slots) = (1003, 3);
        let handover = Handover::new(std::slice::from_ref(&gpu), slots).unwrap();
        let mut inputs = step(&gpu);
        let device = DeviceBuffer::upload(&gpu, &vec![1.0f32; n]).unwrap();
        let mut host = PinnedBuffer::new(&gpu, 4 * n).unwrap();
        // SAFETY: both buffers hold `n` values and outlive the graph.
        let (on_gpu, on_host) = unsafe {
            (
                DeviceMatrix::new(device.address(), 1, n),
                DeviceMatrix::new(host.address(), 1, n),
            )
        };
        gpu.begin_capture().unwrap();
        for slot in 0..slots {
            handover
                .submit(&gpu, slot, &[(on_gpu, on_host)], inputs.view())
                .unwrap();
            handover
                .wait(&gpu, slot, Some((on_host, on_gpu)), inputs.view())
                .unwrap();
        }
        let graph = gpu.end_capture().unwrap();
        for number in 1..20 {
            inputs.upload(&values(number)).unwrap();
            graph.launch().unwrap();
            for slot in 0..slots {
                handover.await_submitted(slot, number).unwrap();
                host.as_mut_slice::<f32>()
                    .iter_mut()
                    .for_each(|v| *v += 1.0);
                handover.answer(slot, number);
            }
            let expected = 1.0 + (slots as u32 * number) as f32;
            assert_eq!(device.read::<f32>(0, n).unwrap(), vec![expected; n]);
        }
        handover.fault().unwrap();
    }

    #[test]
    fn gpu_gives_up_when_the_cpu_never_answers() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let handover = Handover::new(std::slice::from_ref(&gpu), 1).unwrap();
        let mut inputs = step(&gpu);
        inputs.upload(&values(7)).unwrap();
        handover.wait(&gpu, 0, None, inputs.view()).unwrap();
        gpu.synchronize().unwrap();
        assert_eq!(
            handover.fault(),
            Err(CudaError::HandoverTimeout {
                seconds: WAIT_SECONDS
            })
        );
        handover.clear_fault();
        handover.answer(0, 7);
        handover.wait(&gpu, 0, None, inputs.view()).unwrap();
        gpu.synchronize().unwrap();
        handover.fault().unwrap();
    }

    #[test]
    fn gpu_copies_keep_every_value_at_any_alignment() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let values: Vec<f32> = (0..5000).map(|i| i as f32).collect();
        let from = DeviceBuffer::upload(&gpu, &values).unwrap();
        for (start, n) in [(0, 5000), (1, 4999), (4, 17), (3, 1), (8, 4000)] {
            let to = DeviceBuffer::zeroed(&gpu, 4 * 5000).unwrap();
            // SAFETY: the ranges are inside the two buffers.
            let (x, y) = unsafe {
                (
                    DeviceMatrix::new(from.address() + 4 * start as u64, 1, n),
                    DeviceMatrix::new(to.address(), 1, n),
                )
            };
            copy_by_kernel(&gpu, x, y).unwrap();
            let copied: Vec<f32> = to.read(0, 5000).unwrap();
            assert_eq!(copied[..n], values[start..start + n]);
            assert!(copied[n..].iter().all(|v| *v == 0.0));
        }
    }
}
