//! A step that is recorded once and started again for every token: kernels in a graph, and between them
//! the CPU's tasks.
//!
//! While a step is recorded, operators on the GPU start their kernels as always, and the graph takes
//! them down. An operator on the CPU does not compute: it leaves a [`HostTask`], which runs each time
//! the graph does. Flags in pinned memory say whose turn it is ([`Handover`]).
//!
//! One graph takes down all GPUs of a step. Kernels of one wait for those of another where values pass between
//! them, in main memory too: the GPU whose turn it is to write there is behind all that used it before.

use std::ops::AddAssign;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ktx_kernels::cuda::{DeviceMatrix, Gpu, Graph, Handover, copy_by_kernel};
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

/// A copy to main memory.
struct Copy {
    gpu: Gpu,
    from: DeviceMatrix,
    to: DeviceMatrix,
}

/// Takes a step down.
pub struct Recorder {
    /// The GPUs that take part; the graph begins and ends on the first.
    gpus: Vec<Gpu>,
    handover: Handover,
    turns: Vec<Turn>,
    /// Copies to main memory that go with the next turn.
    copies: Vec<Copy>,
    /// The turn whose result no GPU has waited for, and the GPU that it was handed over by.
    unfinished: Option<(usize, Gpu)>,
    /// Tasks that become one turn.
    gathered: Option<Vec<Arc<dyn HostTask>>>,
}

impl Recorder {
    /// For a step of these GPUs with so many turns of the CPU at most. From now on nothing runs on them:
    /// [`finish`](Self::finish) must follow.
    ///
    /// # Errors
    /// What a GPU refuses.
    ///
    /// # Panics
    /// If there is no GPU.
    pub fn begin(gpus: Vec<Gpu>, turns: usize) -> Result<Self, OpError> {
        let handover = Handover::new(&gpus, turns).map_err(refused)?;
        gpus[0].begin_capture_with(&gpus[1..]).map_err(refused)?;
        Ok(Self {
            gpus,
            handover,
            turns: Vec::new(),
            copies: Vec::new(),
            unfinished: None,
            gathered: None,
        })
    }

    /// What was taken down.
    ///
    /// # Errors
    /// What the driver found wrong in it. The GPUs run again then, too.
    pub fn finish(self) -> Result<Recording, OpError> {
        let graph = self.gpus[0].end_capture_with(&self.gpus[1..]);
        Ok(Recording {
            graph: graph.map_err(refused)?,
            gpus: self.gpus,
            handover: self.handover,
            turns: self.turns,
        })
    }
}

/// A recorded step.
pub struct Recording {
    gpus: Vec<Gpu>,
    graph: Graph,
    handover: Handover,
    turns: Vec<Turn>,
}

impl Recording {
    /// Runs the step that the workspace was told of: the GPUs' part and the CPU's, to the end. Says where its time
    /// went.
    ///
    /// # Errors
    /// What a task or a GPU says; the GPUs are idle then, and the recording can be run again.
    pub fn run(&self, cx: &mut Forward<'_>) -> Result<StepTimes, OpError> {
        let number = cx.step;
        let begin = Instant::now();
        let mut times = StepTimes {
            steps: 1,
            ..StepTimes::default()
        };
        let (first, others) = (&self.gpus[0], &self.gpus[1..]);
        // They were told of the step in their own order.
        for other in others {
            first.wait_for(other).map_err(refused)?;
        }
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
        let idle = first.synchronize().map_err(refused);
        let faultless = self.handover.fault().map_err(refused);
        self.handover.clear_fault();
        // A GPU that failed is why the CPU waited in vain.
        idle.and(result).and(faultless)?;
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
                if let (Some(gpu), Some(recorder)) =
                    (self.workspace.gpu(from.device()), &mut self.recorder)
                {
                    recorder.copies.push(Copy {
                        gpu: gpu.clone(),
                        from: self.workspace.matrix(from),
                        to: self.workspace.matrix(to),
                    });
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
        let copies = match awaits_gpu {
            true => std::mem::take(&mut recorder.copies),
            false => Vec::new(),
        };
        let last = copies.last().map(|copy| &copy.gpu);
        let gpu = last.or(self.workspace.host_is_behind());
        let gpu = gpu.unwrap_or(&recorder.gpus[0]).clone();
        recorder.unfinished = Some((slot, gpu.clone()));
        if !awaits_gpu {
            return Ok(());
        }
        let (with_flag, alone): (Vec<Copy>, Vec<Copy>) = copies
            .into_iter()
            .partition(|copy| copy.gpu.index() == gpu.index());
        for copy in alone {
            self.workspace
                .order_host_behind(&copy.gpu)
                .and_then(|()| copy_by_kernel(&copy.gpu, copy.from, copy.to))
                .map_err(refused)?;
        }
        self.workspace.order_host_behind(&gpu).map_err(refused)?;
        let with_flag: Vec<_> = with_flag.iter().map(|copy| (copy.from, copy.to)).collect();
        let step = self.workspace.step(device_of(&gpu));
        recorder
            .handover
            .submit(&gpu, slot, &with_flag, step)
            .map_err(refused)
    }

    /// Copies the result of an operator that has finished to where it is wanted.
    ///
    /// # Errors
    /// What a GPU refuses.
    pub fn take_back(&mut self, from: Act, to: Act) -> Result<(), OpError> {
        let waits = self
            .recorder
            .as_ref()
            .is_some_and(|r| r.unfinished.is_some());
        let gpu = self.workspace.gpu(to.device()).cloned();
        match gpu.filter(|_| waits && from.device().is_cpu()) {
            Some(gpu) => {
                let copy = (self.workspace.matrix(from), self.workspace.matrix(to));
                self.await_host(Some((gpu, copy)))
            }
            None => {
                self.await_host(None)?;
                self.workspace.copy(from, to);
                Ok(())
            }
        }
    }

    /// A GPU waits for the turn that none has waited for, if there is one: the one that copies its result, else
    /// the one that handed it over.
    fn await_host(
        &mut self,
        copy: Option<(Gpu, (DeviceMatrix, DeviceMatrix))>,
    ) -> Result<(), OpError> {
        let Some(recorder) = &mut self.recorder else {
            return Ok(());
        };
        let Some((slot, submitter)) = recorder.unfinished.take() else {
            return Ok(());
        };
        let (gpu, copy) = match copy {
            Some((gpu, copy)) => (gpu, Some(copy)),
            None => (submitter.clone(), None),
        };
        // No kernel spins before the one that it waits for has been started.
        gpu.wait_for(&submitter)
            .and_then(|()| self.workspace.order_host_behind(&gpu))
            .map_err(refused)?;
        let step = self.workspace.step(device_of(&gpu));
        recorder
            .handover
            .wait(&gpu, slot, copy, step)
            .map_err(refused)
    }
}

fn device_of(gpu: &Gpu) -> Device {
    Device::new(DeviceKind::Cuda, gpu.index())
}
