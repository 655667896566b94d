//! A step that is recorded once and started again for every token: kernels in a graph, and between them
//! the CPU's tasks.
//!
//! While a step is recorded, operators on the GPU start their kernels as always, and the graph takes
//! them down. An operator on the CPU does not compute: it leaves a [`HostTask`], which runs each time
//! the graph does. Flags in pinned memory say whose turn it is ([`Handover`]).

use std::ops::AddAssign;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ktx_kernels::cuda::{DeviceMatrix, Gpu, Graph, Handover};
use ktx_kernels::device::{Device, DeviceKind};
use ktx_kernels::workspace::Act;

use crate::build::OpError;
use crate::gpu::refused;
use crate::module::Forward;

/// A part of a recorded step that the CPU computes.
pub trait HostTask: Send + Sync {
    /// Computes it, on activations in main memory.
    ///
    /// # Errors
    /// What the kernel says.
    fn run(&self, cx: &mut Forward<'_>) -> Result<(), OpError>;
}

/// Where the time of recorded steps went, as the thread that drives the GPU sees it. What is left of `total` is
/// the end of a step: the GPU's work behind the last turn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepTimes {
    /// Steps that ran.
    pub steps: u64,
    /// Turns of the CPU in them.
    pub turns: u64,
    /// From the start of the steps to their end.
    pub total: Duration,
    /// The CPU waited for the GPU.
    pub awaited: Duration,
    /// The CPU computed, and the GPU waited for it or did work of its own.
    pub computed: Duration,
}

impl AddAssign for StepTimes {
    fn add_assign(&mut self, other: Self) {
        self.steps += other.steps;
        self.turns += other.turns;
        self.total += other.total;
        self.awaited += other.awaited;
        self.computed += other.computed;
    }
}

struct Turn {
    tasks: Vec<Arc<dyn HostTask>>,
    /// What the GPU does not wait for in this turn.
    later: Vec<Arc<dyn HostTask>>,
    /// Whether it needs what the GPU computed before.
    awaits_gpu: bool,
}

/// Takes a step down.
pub struct Recorder {
    gpu: Gpu,
    device: Device,
    handover: Handover,
    turns: Vec<Turn>,
    /// Copies to main memory that go with the next turn.
    copies: Vec<(DeviceMatrix, DeviceMatrix)>,
    /// The turn whose result the GPU has not waited for.
    unfinished: Option<usize>,
    /// Tasks that become one turn.
    gathered: Option<Vec<Arc<dyn HostTask>>>,
}

impl Recorder {
    /// For a step with so many turns of the CPU at most.
    ///
    /// # Errors
    /// What the GPU refuses.
    pub fn new(gpu: &Gpu, turns: usize) -> Result<Self, OpError> {
        Ok(Self {
            gpu: gpu.clone(),
            device: Device::new(DeviceKind::Cuda, gpu.index()),
            handover: Handover::new(gpu, turns).map_err(refused)?,
            turns: Vec::new(),
            copies: Vec::new(),
            unfinished: None,
            gathered: None,
        })
    }

    /// What was taken down, with the graph of its kernels.
    pub fn finish(self, graph: Graph) -> Recording {
        Recording {
            gpu: self.gpu,
            graph,
            handover: self.handover,
            turns: self.turns,
        }
    }
}

/// A recorded step.
pub struct Recording {
    gpu: Gpu,
    graph: Graph,
    handover: Handover,
    turns: Vec<Turn>,
}

impl Recording {
    /// Runs the step that the workspace was told of: the GPU's part and the CPU's, to the end. Says where its time
    /// went.
    ///
    /// # Errors
    /// What a task or the GPU says; the GPU is idle then, and the recording can be run again.
    pub fn run(&self, cx: &mut Forward<'_>) -> Result<StepTimes, OpError> {
        let number = cx.step;
        let begin = Instant::now();
        let mut times = StepTimes {
            steps: 1,
            ..StepTimes::default()
        };
        self.graph.launch().map_err(refused)?;
        let turns = self.turns.iter().enumerate();
        let result = turns.into_iter().try_for_each(|(slot, turn)| {
            let idle = Instant::now();
            if turn.awaits_gpu {
                self.handover
                    .await_submitted(slot, number)
                    .map_err(refused)?;
            }
            let busy = Instant::now();
            turn.tasks.iter().try_for_each(|task| task.run(cx))?;
            self.handover.answer(slot, number);
            turn.later.iter().try_for_each(|task| task.run(cx))?;
            times.turns += 1;
            times.awaited += busy - idle;
            times.computed += busy.elapsed();
            Ok(())
        });
        if result.is_err() {
            self.handover.give_up();
        }
        let idle = self.gpu.synchronize().map_err(refused);
        let faultless = self.handover.fault().map_err(refused);
        self.handover.clear_fault();
        result.and(idle).and(faultless)?;
        times.total = begin.elapsed();
        Ok(times)
    }
}

impl Forward<'_> {
    /// Whether this step is being recorded.
    pub fn is_recording(&self) -> bool {
        self.recorder.is_some()
    }

    /// Brings activations to the device of an operator that is about to be told of them. In a recorded
    /// step those for the CPU go with [`turn_of_host`](Self::turn_of_host), in one kernel.
    ///
    /// # Errors
    /// If the workspace has no room.
    pub fn hand_over<const N: usize>(
        &mut self,
        acts: [Act; N],
        device: Device,
    ) -> Result<[Act; N], OpError> {
        let mut there = acts;
        for act in &mut there {
            let from = *act;
            if from.device() == device {
                continue;
            }
            if self.recorder.is_some() && device.is_cpu() {
                let to = self.alloc(device, from.rows(), from.cols())?;
                let copy = (self.workspace.matrix(from), self.workspace.matrix(to));
                if let Some(recorder) = &mut self.recorder {
                    recorder.copies.push(copy);
                }
                *act = to;
            } else {
                *act = self.moved(from, device)?;
            }
        }
        Ok(there)
    }

    /// In a recorded step: here the CPU does `task`, after the GPU's work so far.
    ///
    /// # Errors
    /// What the GPU refuses.
    pub fn turn_of_host(&mut self, task: Arc<dyn HostTask>) -> Result<(), OpError> {
        if let Some(Recorder {
            gathered: Some(tasks),
            ..
        }) = self.recorder.as_deref_mut()
        {
            tasks.push(task);
            return Ok(());
        }
        self.turn(vec![task], Vec::new(), true)
    }

    /// Runs `now`, then `later`. In a recorded step the tasks that they leave for the CPU become one turn, and
    /// the GPU goes on when those of `now` are done; it waits for the others with its next turn.
    ///
    /// # Errors
    /// What they say, and what the GPU refuses.
    pub(crate) fn turn_in_two(
        &mut self,
        now: impl FnOnce(&mut Self) -> Result<(), OpError>,
        later: impl FnOnce(&mut Self) -> Result<(), OpError>,
    ) -> Result<(), OpError> {
        if !self.is_recording() {
            now(self)?;
            return later(self);
        }
        let now = self.gather(now)?;
        let later = self.gather(later)?;
        self.turn(now, later, true)
    }

    /// The tasks that `body` leaves for the CPU.
    fn gather(
        &mut self,
        body: impl FnOnce(&mut Self) -> Result<(), OpError>,
    ) -> Result<Vec<Arc<dyn HostTask>>, OpError> {
        if let Some(recorder) = &mut self.recorder {
            recorder.gathered = Some(Vec::new());
        }
        let result = body(self);
        let tasks = self.recorder.as_mut().and_then(|r| r.gathered.take());
        result.map(|()| tasks.unwrap_or_default())
    }

    /// In a recorded step: here the GPU needs what `task` computes, which needs nothing of the GPU.
    ///
    /// # Errors
    /// What the GPU refuses.
    pub fn host_first(&mut self, task: Arc<dyn HostTask>) -> Result<(), OpError> {
        self.turn(vec![task], Vec::new(), false)?;
        self.await_host(None)
    }

    fn turn(
        &mut self,
        tasks: Vec<Arc<dyn HostTask>>,
        later: Vec<Arc<dyn HostTask>>,
        awaits_gpu: bool,
    ) -> Result<(), OpError> {
        self.await_host(None)?;
        let Some(recorder) = &mut self.recorder else {
            return Ok(());
        };
        let slot = recorder.turns.len();
        if slot == recorder.handover.slots() {
            return Err(OpError::Kernel {
                path: String::new(),
                message: format!("a recorded step has {slot} turns of the CPU at most"),
            });
        }
        recorder.turns.push(Turn {
            tasks,
            later,
            awaits_gpu,
        });
        recorder.unfinished = Some(slot);
        if awaits_gpu {
            let step = self.workspace.step(recorder.device);
            let copies = std::mem::take(&mut recorder.copies);
            recorder
                .handover
                .submit(slot, &copies, step)
                .map_err(refused)?;
        }
        Ok(())
    }

    /// Copies the result of an operator that has finished to where it is wanted.
    ///
    /// # Errors
    /// What the GPU refuses.
    pub fn take_back(&mut self, from: Act, to: Act) -> Result<(), OpError> {
        let waits = self
            .recorder
            .as_ref()
            .is_some_and(|r| r.unfinished.is_some());
        if waits && from.device().is_cpu() && !to.device().is_cpu() {
            let copy = (self.workspace.matrix(from), self.workspace.matrix(to));
            return self.await_host(Some(copy));
        }
        self.await_host(None)?;
        self.workspace.copy(from, to);
        Ok(())
    }

    /// The GPU waits for the turn that it has not waited for, if there is one.
    fn await_host(&mut self, copy: Option<(DeviceMatrix, DeviceMatrix)>) -> Result<(), OpError> {
        let Some(recorder) = &mut self.recorder else {
            return Ok(());
        };
        let Some(slot) = recorder.unfinished.take() else {
            return Ok(());
        };
        let step = self.workspace.step(recorder.device);
        recorder.handover.wait(slot, copy, step).map_err(refused)
    }
}
