//! Memory for activations: planned once, handed out like a stack, addressed by handles.
//!
//! A forward call takes its activations from here and gives them back in reverse order, so a token
//! allocates nothing. A handle ([`Act`]) is a place and a shape, not a borrow; the slices behind a
//! few of them are borrowed together through [`Workspace::views`], which checks that nothing that is
//! written overlaps anything else. A place is the same on every call with the same number of tokens.

mod act;
mod copies;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::cuda::{
    CudaError, DeviceBuffer, DeviceMatrix, Gpu, Passage, PinnedBuffer, StepInputs, StepValues,
    StepView,
};
use crate::device::{Device, DeviceKind};
use ktx_gguf::GgmlType;

pub use act::Act;

use crate::linear::{Activations, LinearError, Precision};
use crate::pool::ThreadPool;
use crate::zeroed::zeroed;

/// Why there is no memory for activations.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WorkspaceError {
    /// More was asked for than the operators stated before the run.
    #[error(
        "the workspace on {device} holds {capacity} values and {wanted} more were asked for with {used} in use; \
         an operator states too little scratch"
    )]
    Exhausted {
        /// The device whose memory ran out.
        device: Device,
        /// Values that fit.
        capacity: usize,
        /// Values in use.
        used: usize,
        /// Values asked for.
        wanted: usize,
    },
    /// A GPU refused it.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The system refused it.
    #[error("no memory for {values} activations on {device}; use a smaller context or chunk size")]
    OutOfMemory {
        /// The device.
        device: Device,
        /// Values asked for.
        values: usize,
    },
}

/// Where the values of a device lie.
enum Memory {
    /// Main memory.
    Host(Vec<f32>),
    /// Main memory that GPUs read and write too.
    Pinned(PinnedBuffer),
    /// A GPU's memory, and what changes there from step to step.
    Gpu(DeviceBuffer, Box<StepInputs>),
}

impl Memory {
    fn values(&self) -> usize {
        match self {
            Memory::Host(values) => values.len(),
            Memory::Pinned(buffer) => buffer.bytes() / size_of::<f32>(),
            Memory::Gpu(buffer, _) => buffer.bytes() / size_of::<f32>(),
        }
    }

    /// The address of the first value, for a GPU; none where no GPU reaches it.
    fn address(&self) -> Option<u64> {
        match self {
            Memory::Host(_) => None,
            Memory::Pinned(buffer) => Some(buffer.address()),
            Memory::Gpu(buffer, _) => Some(buffer.address()),
        }
    }
}

struct Stack {
    device: Device,
    memory: Memory,
    used: usize,
}

/// The largest step, as far as GPUs must know it beforehand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepCapacity {
    /// Rows in one step.
    pub rows: usize,
    /// Sequences in one step.
    pub sequences: usize,
    /// Pages of one sequence.
    pub pages: usize,
}

/// How much of a workspace was in use at some moment; see [`Workspace::mark`].
#[derive(Debug, Clone)]
pub struct Mark([usize; Workspace::MAX_DEVICES]);

/// What the quantised activations were made of.
#[derive(Clone, Copy)]
struct Prepared {
    act: Act,
    precision: Precision,
    types: TypeSet,
}

/// Some weight types, as bits by their ids.
#[derive(Clone, Copy, PartialEq, Eq)]
struct TypeSet(u64);

impl TypeSet {
    fn of(types: &[GgmlType]) -> Self {
        Self(types.iter().fold(0, |bits, ty| bits | 1 << (ty.id() % 64)))
    }

    fn covers(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What was copied from one device to another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Transfers {
    /// Number of copies.
    pub count: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// The activations' memory of one engine, one stack per device.
pub struct Workspace {
    stacks: Vec<Stack>,
    transfers: BTreeMap<(Device, Device), Transfers>,
    prepared: Option<Prepared>,
    activations: Activations,
    /// GPUs that may still read main memory; in a recorded step also those that write there.
    reading: Vec<Gpu>,
    /// In a recorded step: the GPU behind whose kernels values in main memory are there.
    host_is_behind: Option<Gpu>,
    /// The ways from one GPU to another that were used, by their numbers.
    passages: BTreeMap<(u16, u16), Passage>,
    /// What went wrong on a GPU since it was last asked for.
    fault: Option<CudaError>,
    /// Whether what is started on a GPU is recorded, to be started again later.
    is_recording: bool,
    /// Whether main memory was used while recording.
    host_used: AtomicBool,
}

impl Workspace {
    /// Devices that one workspace serves at most.
    pub const MAX_DEVICES: usize = 16;
    const ALIGN: usize = 16;
    /// Beyond any memory, and far from overflowing.
    const MAX_VALUES: usize = 1 << 48;

    /// A workspace of `values` f32 on each of these devices, all in main memory; the system commits what
    /// is used.
    ///
    /// # Errors
    /// [`WorkspaceError::OutOfMemory`] if the system refuses it.
    ///
    /// # Panics
    /// If more than [`Self::MAX_DEVICES`] devices are named, or one that is not the host's memory.
    pub fn new(devices: &[Device], values: usize) -> Result<Self, WorkspaceError> {
        assert!(
            devices.iter().all(|d| d.is_cpu()),
            "a host workspace serves host devices"
        );
        let none = StepCapacity {
            rows: 0,
            sequences: 0,
            pages: 0,
        };
        Self::with_gpus(devices, values, none)
    }

    /// A workspace of `values` f32 on each of these devices, GPUs among them. With a GPU, main memory is
    /// pinned, so that copies go at full speed.
    ///
    /// # Errors
    /// [`WorkspaceError::OutOfMemory`] if the system refuses it, [`WorkspaceError::Cuda`] if a GPU does.
    ///
    /// # Panics
    /// If more than [`Self::MAX_DEVICES`] devices are named.
    pub fn with_gpus(
        devices: &[Device],
        values: usize,
        steps: StepCapacity,
    ) -> Result<Self, WorkspaceError> {
        assert!(
            devices.len() <= Self::MAX_DEVICES,
            "at most {} devices",
            Self::MAX_DEVICES
        );
        let first_gpu = devices.iter().find(|d| d.kind() == DeviceKind::Cuda);
        let pinning = first_gpu.map(|d| Gpu::open(d.index())).transpose()?;
        let stack = |&device: &Device| {
            let refused = |_| WorkspaceError::OutOfMemory { device, values };
            let bytes = values.checked_mul(size_of::<f32>());
            let bytes = bytes.ok_or(WorkspaceError::OutOfMemory { device, values });
            let memory = match (device.kind(), &pinning) {
                (DeviceKind::Cuda, _) => {
                    let gpu = Gpu::open(device.index())?;
                    let memory = DeviceBuffer::zeroed(&gpu, bytes?)?;
                    Memory::Gpu(memory, Box::new(StepInputs::new(&gpu, steps)?))
                }
                (_, Some(gpu)) => Memory::Pinned(PinnedBuffer::new(gpu, bytes?)?),
                (_, None) => Memory::Host(zeroed(values).map_err(refused)?),
            };
            Ok(Stack {
                device,
                memory,
                used: 0,
            })
        };
        Ok(Self {
            stacks: devices
                .iter()
                .map(stack)
                .collect::<Result<_, WorkspaceError>>()?,
            transfers: BTreeMap::new(),
            prepared: None,
            activations: Activations::default(),
            reading: Vec::new(),
            host_is_behind: None,
            passages: BTreeMap::new(),
            fault: None,
            is_recording: false,
            host_used: AtomicBool::new(false),
        })
    }

    /// Values of f32 to plan for `[rows, cols]`, alignment included. What no memory could hold is
    /// cut to a size that sums of it do not overflow.
    pub fn values_for(rows: usize, cols: usize) -> usize {
        rows.saturating_mul(cols)
            .min(Self::MAX_VALUES)
            .next_multiple_of(Self::ALIGN)
    }

    /// Takes `[rows, cols]` on a device; the values are whatever was there.
    pub fn alloc(
        &mut self,
        device: Device,
        rows: usize,
        cols: usize,
    ) -> Result<Act, WorkspaceError> {
        let wanted = Self::values_for(rows, cols);
        let Some(stack) = self.stacks.iter_mut().find(|s| s.device == device) else {
            return Err(WorkspaceError::Exhausted {
                device,
                capacity: 0,
                used: 0,
                wanted,
            });
        };
        if wanted > stack.memory.values() - stack.used {
            return Err(WorkspaceError::Exhausted {
                device,
                capacity: stack.memory.values(),
                used: stack.used,
                wanted,
            });
        }
        let act = Act {
            device,
            offset: stack.used,
            rows,
            cols,
        };
        stack.used += wanted;
        Ok(act)
    }

    /// Remembers how much is in use.
    pub fn mark(&self) -> Mark {
        let mut used = [0; Self::MAX_DEVICES];
        for (u, s) in used.iter_mut().zip(&self.stacks) {
            *u = s.used;
        }
        Mark(used)
    }

    /// Gives back all that was taken since the mark.
    pub fn release(&mut self, mark: &Mark) {
        for (u, s) in mark.0.iter().zip(&mut self.stacks) {
            s.used = *u;
        }
    }

    /// Gives back everything.
    pub fn reset(&mut self) {
        self.stacks.iter_mut().for_each(|s| s.used = 0);
        self.prepared = None;
    }

    /// The values behind a handle into main memory.
    ///
    /// # Panics
    /// If it is a GPU's; [`moved`](Self::moved) brings it here.
    pub fn read(&self, act: Act) -> &[f32] {
        self.uses_host();
        let values: &[f32] = match &self.stack(act.device).memory {
            Memory::Host(values) => values,
            Memory::Pinned(buffer) => buffer.as_slice(),
            Memory::Gpu(..) => panic!("values on {} were to be read on the host", act.device),
        };
        &values[act.offset..act.end()]
    }

    fn stack(&self, device: Device) -> &Stack {
        self.stacks
            .iter()
            .find(|s| s.device == device)
            .expect("a handle comes from this workspace")
    }

    /// The GPU that a device of this workspace is; none if it is the host.
    pub fn gpu(&self, device: Device) -> Option<&Gpu> {
        match &self.stack(device).memory {
            Memory::Gpu(buffer, _) => Some(buffer.gpu()),
            _ => None,
        }
    }

    /// The values behind a handle, wherever they are.
    ///
    /// # Errors
    /// What a GPU reports.
    pub fn download(&self, act: Act) -> Result<Vec<f32>, WorkspaceError> {
        match &self.stack(act.device).memory {
            Memory::Gpu(buffer, _) => Ok(buffer.read(act.offset * size_of::<f32>(), act.len())?),
            _ => Ok(self.read(act).to_vec()),
        }
    }

    /// A GPU's handle as its kernels take it.
    ///
    /// # Panics
    /// If no GPU reaches it: it is main memory of a workspace without GPUs.
    pub fn matrix(&self, act: Act) -> DeviceMatrix {
        let memory = &self.stack(act.device).memory;
        let start = memory
            .address()
            .expect("a GPU's kernel takes what a GPU reaches");
        assert!(
            act.end() <= memory.values(),
            "a handle comes from this workspace"
        );
        let address = start + (act.offset * size_of::<f32>()) as u64;
        // SAFETY: the range lies inside the stack's memory (checked above), which lives as long as the
        // workspace; kernels that use it run before the workspace is dropped, which waits for them.
        unsafe { DeviceMatrix::new(address, act.rows, act.cols) }
    }

    /// What changes from step to step, on a GPU.
    ///
    /// # Panics
    /// If the device is no GPU of this workspace.
    pub fn step(&self, device: Device) -> StepView {
        match &self.stack(device).memory {
            Memory::Gpu(_, inputs) => inputs.view(),
            _ => panic!("{device} is no GPU"),
        }
    }

    /// Tells the GPUs what this step's tokens are. All that the step before started must be done.
    ///
    /// # Errors
    /// What a GPU refuses.
    pub fn begin_step(&mut self, values: &StepValues<'_>) -> Result<(), WorkspaceError> {
        for stack in &mut self.stacks {
            if let Memory::Gpu(_, inputs) = &mut stack.memory {
                inputs.upload(values)?;
            }
        }
        Ok(())
    }

    /// Waits for all GPUs.
    ///
    /// # Errors
    /// What went wrong on one since this was last asked.
    pub fn synchronize(&mut self) -> Result<(), WorkspaceError> {
        self.reading.clear();
        for stack in &self.stacks {
            if let Memory::Gpu(buffer, _) = &stack.memory {
                buffer.gpu().synchronize()?;
            }
        }
        match self.fault.take() {
            Some(fault) => Err(fault.into()),
            None => Ok(()),
        }
    }

    /// From now on copies between main memory and a GPU are kernels, which can be recorded; nothing is
    /// waited for. Says whether values in main memory were looked at while that was so: what looks
    /// at them cannot be recorded.
    pub fn set_recording(&mut self, is_recording: bool) -> bool {
        self.is_recording = is_recording;
        self.reading.clear();
        self.host_is_behind = None;
        self.host_used.swap(false, Ordering::Relaxed)
    }

    /// Values in main memory are looked at.
    fn uses_host(&self) {
        if self.is_recording {
            self.host_used.store(true, Ordering::Relaxed);
        }
    }

    /// Whether copies are recorded.
    pub fn is_recording(&self) -> bool {
        self.is_recording
    }

    /// Copies values of a GPU to main memory, in its stream's order, and waits for nothing: whoever looks at
    /// them waits for the GPU first.
    ///
    /// # Errors
    /// What the GPU refuses.
    ///
    /// # Panics
    /// If the shapes differ, or `from` is no GPU's.
    pub fn fetch(&mut self, from: Act, to: Act) -> Result<(), WorkspaceError> {
        assert_eq!(
            (from.rows, from.cols),
            (to.rows, to.cols),
            "a copy keeps the shape"
        );
        let gpu = self.gpu(from.device).expect("a GPU's values").clone();
        let (x, y) = (self.matrix(from), self.matrix(to));
        let bytes = from.len() * size_of::<f32>();
        // SAFETY: both ranges are this workspace's memory (`matrix` checks), which lives on.
        Ok(unsafe { crate::cuda::copy_async(&gpu, y.address(), x.address(), bytes) }?)
    }

    /// A GPU was given kernels that read main memory.
    pub fn is_read_by(&mut self, gpu: &Gpu) {
        if !self.reading.iter().any(|g| g.index() == gpu.index()) {
            self.reading.push(gpu.clone());
        }
    }

    /// A GPU was waited for: it has read what it was given to read.
    pub fn was_read_by(&mut self, gpu: &Gpu) {
        self.reading.retain(|g| g.index() != gpu.index());
    }

    /// Main memory is about to be written: GPUs that still read it are waited for.
    fn before_host_write(&mut self) {
        if self.is_recording {
            return;
        }
        for gpu in self.reading.drain(..) {
            if let Err(fault) = gpu.synchronize() {
                self.fault.get_or_insert(fault);
            }
        }
    }

    /// The values behind a handle, to write.
    pub fn write(&mut self, act: Act) -> &mut [f32] {
        let ([], [out]) = self.views([], [act]);
        out
    }

    /// The values behind some handles at once: the first read, the second written.
    ///
    /// # Panics
    /// If a written one overlaps another, or a handle is not of this workspace.
    pub fn views<const N: usize, const M: usize>(
        &mut self,
        inputs: [Act; N],
        outputs: [Act; M],
    ) -> ([&[f32]; N], [&mut [f32]; M]) {
        for (i, out) in outputs.iter().enumerate() {
            assert!(
                !inputs.iter().any(|x| x.overlaps(*out)),
                "an output overlaps an input: {out:?} of {inputs:?}"
            );
            assert!(
                !outputs[..i].iter().any(|x| x.overlaps(*out)),
                "two outputs overlap: {outputs:?}"
            );
            if self.prepared.is_some_and(|p| p.act.overlaps(*out)) {
                self.prepared = None;
            }
        }
        self.uses_host();
        if M > 0 {
            self.before_host_write();
        }
        slices(&mut self.stacks, inputs, outputs)
    }

    /// Copies values from one handle to another, between devices too.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn copy(&mut self, from: Act, to: Act) {
        assert_eq!(
            (from.rows, from.cols),
            (to.rows, to.cols),
            "a copy keeps the shape"
        );
        if from == to {
            return;
        }
        if self.gpu(from.device).is_some() || self.gpu(to.device).is_some() {
            if self.gpu(to.device).is_none() {
                self.before_host_write();
                self.prepared = self.prepared.filter(|p| !p.act.overlaps(to));
            }
            if let Err(fault) = self.copy_by_gpu(from, to) {
                self.fault.get_or_insert(fault);
            }
        } else {
            let ([x], [y]) = self.views([from], [to]);
            y.copy_from_slice(x);
        }
        if from.device != to.device {
            let moved = self.transfers.entry((from.device, to.device)).or_default();
            moved.count += 1;
            moved.bytes += (from.len() * size_of::<f32>()) as u64;
        }
    }

    /// The same values on another device: a copy where it differs, the handle itself where not.
    ///
    /// # Errors
    /// [`WorkspaceError::Exhausted`] if there is no room for the copy.
    pub fn moved(&mut self, x: Act, device: Device) -> Result<Act, WorkspaceError> {
        if x.device == device {
            return Ok(x);
        }
        let there = self.alloc(device, x.rows, x.cols)?;
        self.copy(x, there);
        Ok(there)
    }

    /// What was copied between devices so far, by where from and where to.
    pub fn transfers(&self) -> &BTreeMap<(Device, Device), Transfers> {
        &self.transfers
    }

    /// The activations of `x` as products with weights of these types take them, quantised once
    /// however many operators ask: the result is kept until something writes over `x`. The outputs
    /// come along, since they are borrowed from the same memory.
    ///
    /// # Errors
    /// What [`Activations::prepare_for`] refuses.
    ///
    /// # Panics
    /// If outputs overlap each other.
    pub fn prepare<const M: usize>(
        &mut self,
        pool: &ThreadPool,
        x: Act,
        precision: Precision,
        types: &[GgmlType],
        outputs: [Act; M],
    ) -> Result<(&Activations, [&mut [f32]; M]), LinearError> {
        self.uses_host();
        let wanted = TypeSet::of(types);
        let fits = |p: &Prepared| p.act == x && p.precision == precision && p.types.covers(wanted);
        if !self.prepared.as_ref().is_some_and(fits) {
            let ([values], []) = slices(&mut self.stacks, [x], []);
            self.activations
                .prepare_for(pool, values, x.rows, x.cols, precision, types)?;
            self.prepared = Some(Prepared {
                act: x,
                precision,
                types: wanted,
            });
        }
        for (i, out) in outputs.iter().enumerate() {
            assert!(
                !outputs[..i].iter().any(|o| o.overlaps(*out)),
                "two outputs overlap: {outputs:?}"
            );
            if x.overlaps(*out) {
                self.prepared = None;
            }
        }
        self.before_host_write();
        let ([], outs) = slices(&mut self.stacks, [], outputs);
        Ok((&self.activations, outs))
    }
}

impl Drop for Workspace {
    /// Kernels may still use the memory.
    fn drop(&mut self) {
        let _ = self.synchronize();
    }
}

/// The slices behind handles whose written ranges were checked to overlap nothing.
fn slices<const N: usize, const M: usize>(
    stacks: &mut [Stack],
    inputs: [Act; N],
    outputs: [Act; M],
) -> ([&[f32]; N], [&mut [f32]; M]) {
    let mut base = |act: Act| {
        let stack = stacks
            .iter_mut()
            .find(|s| s.device == act.device)
            .expect("a handle comes from this workspace");
        assert!(
            act.end() <= stack.memory.values(),
            "a handle comes from this workspace"
        );
        let start = match &mut stack.memory {
            Memory::Host(values) => values.as_mut_ptr(),
            Memory::Pinned(buffer) => buffer.as_mut_slice().as_mut_ptr(),
            Memory::Gpu(..) => panic!("values on {} were to be used on the host", act.device),
        };
        start.wrapping_add(act.offset)
    };
    // SAFETY: each range lies inside its stack's memory (asserted in `base`), which `stacks` borrows
    // mutably for as long as the slices live; the callers checked that no written range overlaps another.
    unsafe {
        (
            inputs.map(|act| std::slice::from_raw_parts(base(act).cast_const(), act.len())),
            outputs.map(|act| std::slice::from_raw_parts_mut(base(act), act.len())),
        )
    }
}

#[cfg(test)]
mod tests;
