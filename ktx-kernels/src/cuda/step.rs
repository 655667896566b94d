//! What changes from step to step, where a GPU's kernels read it.

use super::error::CudaError;
use super::gpu::Gpu;
use super::memory::{DeviceBuffer, PinnedBuffer, copy_async};
use crate::kv::SequenceKv;
use crate::workspace::StepCapacity;

/// One step's tokens.
#[derive(Debug, Clone, Copy)]
pub struct StepValues<'a> {
    /// Number of the step, never the same twice.
    pub number: u32,
    /// Token ids `[rows]`.
    pub ids: &'a [u32],
    /// Position of each row in its sequence `[rows]`.
    pub positions: &'a [u32],
    /// The sequences; their rows follow one another.
    pub sequences: &'a [SequenceKv<'a>],
    /// Rows whose logits are wanted.
    pub outputs: &'a [usize],
}

/// Addresses on a GPU of what changes from step to step: all `u32`, in fixed places.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepView {
    address: u64,
    capacity: StepCapacity,
}

impl StepView {
    const HEAD: usize = 4;

    fn at(self, values: usize) -> u64 {
        self.address + (values * size_of::<u32>()) as u64
    }

    fn rows(self) -> usize {
        self.capacity.rows.next_multiple_of(4)
    }

    fn sequence_values(self) -> usize {
        self.capacity.sequences.next_multiple_of(4)
    }

    /// `[step number, rows, sequences, outputs]`.
    pub fn head(self) -> u64 {
        self.address
    }

    /// Token ids `[rows]`.
    pub fn ids(self) -> u64 {
        self.at(Self::HEAD)
    }

    /// Position of each row in its sequence `[rows]`.
    pub fn positions(self) -> u64 {
        self.at(Self::HEAD + self.rows())
    }

    /// Sequence of each row `[rows]`.
    pub fn row_sequence(self) -> u64 {
        self.at(Self::HEAD + 2 * self.rows())
    }

    /// Rows whose logits are wanted `[outputs]`.
    pub fn outputs(self) -> u64 {
        self.at(Self::HEAD + 3 * self.rows())
    }

    /// First row of each sequence `[sequences]`.
    pub fn first_row(self) -> u64 {
        self.at(Self::HEAD + 4 * self.rows())
    }

    /// New tokens of each sequence `[sequences]`.
    pub fn tokens(self) -> u64 {
        self.at(Self::HEAD + 4 * self.rows() + self.sequence_values())
    }

    /// Cached tokens of each sequence, without the new ones `[sequences]`.
    pub fn past(self) -> u64 {
        self.at(Self::HEAD + 4 * self.rows() + 2 * self.sequence_values())
    }

    /// Page ids `[sequences, max_pages]`.
    pub fn pages(self) -> u64 {
        self.at(Self::HEAD + 4 * self.rows() + 3 * self.sequence_values())
    }

    /// Page ids from one sequence to the next.
    pub fn max_pages(self) -> usize {
        self.capacity.pages
    }

    /// What the step can hold.
    pub fn capacity(self) -> StepCapacity {
        self.capacity
    }

    fn values(self) -> usize {
        Self::HEAD
            + 4 * self.rows()
            + 3 * self.sequence_values()
            + self.capacity.sequences * self.capacity.pages
    }
}

/// The memory behind a [`StepView`], and the pinned memory that it is copied from.
pub struct StepInputs {
    device: DeviceBuffer,
    host: PinnedBuffer,
    capacity: StepCapacity,
}

impl StepInputs {
    /// For steps of this size at most.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn new(gpu: &Gpu, capacity: StepCapacity) -> Result<Self, CudaError> {
        let view = StepView {
            address: 0,
            capacity,
        };
        let bytes = view.values() * size_of::<u32>();
        Ok(Self {
            device: DeviceBuffer::zeroed(gpu, bytes)?,
            host: PinnedBuffer::new(gpu, bytes)?,
            capacity,
        })
    }

    /// Where kernels find the values.
    pub fn view(&self) -> StepView {
        StepView {
            address: self.device.address(),
            capacity: self.capacity,
        }
    }

    /// Copies a step's values, in the stream's order. The copy before must be done.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Panics
    /// If the step is larger than planned.
    pub fn upload(&mut self, step: &StepValues<'_>) -> Result<(), CudaError> {
        let capacity = self.capacity;
        assert!(
            step.ids.len() <= capacity.rows && step.sequences.len() <= capacity.sequences,
            "a step of {} rows and {} sequences where {capacity:?} were planned",
            step.ids.len(),
            step.sequences.len()
        );
        let view = StepView {
            address: 0,
            capacity,
        };
        let values: &mut [u32] = self.host.as_mut_slice();
        let place = |address: u64| address as usize / size_of::<u32>();
        let head = [step.ids.len(), step.sequences.len(), step.outputs.len()].map(|n| n as u32);
        values[0] = step.number;
        values[1..4].copy_from_slice(&head);
        values[place(view.ids())..][..step.ids.len()].copy_from_slice(step.ids);
        values[place(view.positions())..][..step.positions.len()].copy_from_slice(step.positions);
        for (i, row) in step.outputs.iter().enumerate() {
            values[place(view.outputs()) + i] = *row as u32;
        }
        let mut row = 0;
        let mut used = place(view.pages());
        for (i, sequence) in step.sequences.iter().enumerate() {
            values[place(view.row_sequence()) + row..][..sequence.tokens].fill(i as u32);
            values[place(view.first_row()) + i] = row as u32;
            values[place(view.tokens()) + i] = sequence.tokens as u32;
            values[place(view.past()) + i] = sequence.past as u32;
            row += sequence.tokens;
            let pages = place(view.pages()) + i * capacity.pages;
            assert!(
                sequence.pages.len() <= capacity.pages,
                "pages of a sequence"
            );
            for (value, page) in values[pages..].iter_mut().zip(sequence.pages) {
                *value = page.0;
            }
            used = pages + sequence.pages.len();
        }
        let bytes = used * size_of::<u32>();
        // SAFETY: both buffers hold that many bytes and live as long as `self`; the caller waits for the
        // step before it uploads the next.
        unsafe {
            copy_async(
                self.device.gpu(),
                self.device.address(),
                self.host.address(),
                bytes,
            )
        }
    }
}
