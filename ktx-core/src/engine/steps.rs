//! Which steps are recorded: those that generate, once a step of the same shape has run.

use std::collections::HashMap;

use ktx_kernels::cuda::StepValues;
use ktx_kernels::device::{Device, DeviceKind};
use ktx_kernels::kv::SequenceKv;
use ktx_kernels::workspace::{Act, StepCapacity};
use ktx_ops::Batch;
use ktx_ops::recording::{Recording, StepTimes};

/// A recorded step with the place of its logits `[rows, vocab]` in main memory.
pub(super) struct RecordedStep {
    pub(super) recording: Recording,
    pub(super) logits: Act,
}

/// What is known of the steps with some number of rows.
enum Shape {
    /// One ran: all kernels are loaded.
    Ran,
    Recorded(Box<RecordedStep>),
    /// Something in it cannot be recorded.
    Refused,
}

/// What to do with a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StepPlan {
    /// Operator by operator.
    Eager,
    /// Record it, then run the recording.
    Record,
    /// Run what was recorded.
    Replay,
}

/// The steps of one runtime.
pub(super) struct Steps {
    pub(super) capacity: StepCapacity,
    number: u32,
    /// The GPUs that take part.
    gpus: Vec<Device>,
    /// By the number of rows.
    shapes: HashMap<usize, Shape>,
    /// Of all that was recorded and ran.
    pub(super) times: StepTimes,
}

impl Steps {
    /// Wider steps are not recorded: launching kernels is little beside computing them.
    const MOST_ROWS: usize = 16;

    pub(super) fn new(capacity: StepCapacity, devices: &[Device]) -> Self {
        let gpus = devices.iter().filter(|d| d.kind() == DeviceKind::Cuda);
        Self {
            capacity,
            number: 0,
            gpus: gpus.copied().collect(),
            shapes: HashMap::new(),
            times: StepTimes::default(),
        }
    }

    /// The next step's values.
    pub(super) fn next<'a>(
        &mut self,
        batch: &'a Batch,
        sequences: &'a [SequenceKv<'a>],
    ) -> StepValues<'a> {
        // Flags begin with 0: that is no step.
        self.number = self.number.wrapping_add(1).max(1);
        StepValues {
            number: self.number,
            ids: &batch.ids,
            positions: &batch.positions,
            sequences,
            outputs: &batch.outputs,
        }
    }

    /// The number of the last step.
    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Whether GPUs take part in steps.
    pub(super) fn use_gpus(&self) -> bool {
        !self.gpus.is_empty()
    }

    /// The GPUs that take part.
    pub(super) fn gpus(&self) -> &[Device] {
        &self.gpus
    }

    /// What to do with a step that generates.
    pub(super) fn plan(&mut self, batch: &Batch) -> StepPlan {
        if self.gpus.is_empty() {
            return StepPlan::Eager;
        }
        let rows = batch.rows();
        let one_each = |s: &ktx_ops::module::SequenceRows| s.tokens == 1 && s.adapters.is_empty();
        let is_plain = rows <= Self::MOST_ROWS
            && batch.sequences.iter().all(one_each)
            && batch.outputs.iter().copied().eq(0..rows);
        if !is_plain {
            return StepPlan::Eager;
        }
        match self.shapes.get(&rows) {
            None => {
                self.shapes.insert(rows, Shape::Ran);
                StepPlan::Eager
            }
            Some(Shape::Ran) => StepPlan::Record,
            Some(Shape::Recorded(_)) => StepPlan::Replay,
            Some(Shape::Refused) => StepPlan::Eager,
        }
    }

    /// Keeps a recording, or that there can be none.
    pub(super) fn keep(&mut self, rows: usize, step: Option<Box<RecordedStep>>) {
        let shape = step.map_or(Shape::Refused, Shape::Recorded);
        self.shapes.insert(rows, shape);
    }

    /// Takes a recording out; [`keep`](Self::keep) brings it back.
    pub(super) fn take(&mut self, rows: usize) -> Option<Box<RecordedStep>> {
        match self.shapes.remove(&rows)? {
            Shape::Recorded(step) => Some(step),
            other => {
                self.shapes.insert(rows, other);
                None
            }
        }
    }

    /// Forgets all recordings: what they work on is about to change.
    pub(super) fn forget(&mut self) {
        self.shapes.clear();
    }
}
