//! A captured sequence of kernels, and times on the GPU's own clock.

use cudarc::driver::sys::{
    self, CUevent, CUgraph, CUgraphExec, CUstreamCaptureMode_enum as CaptureMode,
};

use super::error::{CudaError, cu};
use super::gpu::Gpu;

/// What was started on a GPU's stream between [`Gpu::begin_capture`] and [`Gpu::end_capture`], to start
/// again as a whole; on other GPUs' streams too, after [`Gpu::begin_capture_with`].
pub struct Graph {
    gpu: Gpu,
    exec: CUgraphExec,
}

// SAFETY: a handle of the driver, used by one thread at a time through `&self` launches that the driver orders.
unsafe impl Send for Graph {}

impl Gpu {
    /// From now on kernels are recorded and not run.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn begin_capture(&self) -> Result<(), CudaError> {
        self.bind()?;
        let mode = CaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `self`.
        unsafe { cu!(cuStreamBeginCapture_v2(self.stream(), mode)) }
    }

    /// Ends the recording. Must follow [`begin_capture`](Self::begin_capture), after a failure too.
    ///
    /// # Errors
    /// What the driver found wrong in the recording.
    pub fn end_capture(&self) -> Result<Graph, CudaError> {
        self.bind()?;
        let mut graph: CUgraph = std::ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { cu!(cuStreamEndCapture(self.stream(), &mut graph)) }?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph was just recorded; it is no longer needed once there is an executable one.
        let made = unsafe { cu!(cuGraphInstantiateWithFlags(&mut exec, graph, 0)) };
        // SAFETY: as above.
        unsafe { cu!(cuGraphDestroy(graph)) }?;
        made?;
        Ok(Graph {
            gpu: self.clone(),
            exec,
        })
    }
}

impl Gpu {
    /// From now on kernels are recorded, here and on these GPUs, in one graph. These must not be this one.
    ///
    /// # Errors
    /// What the driver refuses; nothing is recorded then.
    pub fn begin_capture_with(&self, others: &[Gpu]) -> Result<(), CudaError> {
        self.begin_capture()?;
        let joined = others.iter().try_for_each(|other| other.wait_for(self));
        if joined.is_err() {
            let _ = self.end_capture();
        }
        joined
    }

    /// Ends the recording that [`begin_capture_with`](Self::begin_capture_with) began, with the same GPUs. Must
    /// follow, after a failure too.
    ///
    /// # Errors
    /// As [`end_capture`](Self::end_capture).
    pub fn end_capture_with(&self, others: &[Gpu]) -> Result<Graph, CudaError> {
        let joined = others.iter().try_for_each(|other| self.wait_for(other));
        let graph = self.end_capture();
        joined.and(graph)
    }
}

impl Graph {
    /// Starts all of it on the stream. Whoever made the [`DeviceMatrix`](super::DeviceMatrix)es that
    /// its kernels were given answers for their memory still.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn launch(&self) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: the kernels' arguments were checked when they were recorded, and the memory stays for
        // as long as kernels may use it: that is what making a `DeviceMatrix` promises.
        unsafe { cu!(cuGraphLaunch(self.exec, self.gpu.stream())) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: the handle is this graph's alone.
        unsafe {
            let _ = self.gpu.bind();
            sys::cuGraphExecDestroy(self.exec);
        }
    }
}

impl std::fmt::Debug for Graph {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Graph({:?})", self.gpu)
    }
}

impl Gpu {
    /// What is started here from now on runs after all that was started on `other` before; nothing changes if
    /// that is this GPU. Recorded, where kernels are.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn wait_for(&self, other: &Gpu) -> Result<(), CudaError> {
        if self.index() == other.index() {
            return Ok(());
        }
        let passed = Event::record(other)?;
        self.waits();
        self.bind()?;
        // SAFETY: stream and event live through the call; the driver keeps what it needs of the event.
        unsafe { cu!(cuStreamWaitEvent(self.stream(), passed.handle, 0)) }
    }
}

/// A moment in a GPU's stream.
pub struct Event {
    gpu: Gpu,
    handle: CUevent,
}

impl Event {
    /// The moment when everything started so far is done.
    ///
    /// # Errors
    /// What the driver reports.
    pub fn record(gpu: &Gpu) -> Result<Self, CudaError> {
        gpu.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle.
        unsafe { cu!(cuEventCreate(&mut handle, 0)) }?;
        let event = Self {
            gpu: gpu.clone(),
            handle,
        };
        // SAFETY: event and stream are of the same context.
        unsafe { cu!(cuEventRecord(handle, gpu.stream())) }?;
        Ok(event)
    }

    /// Milliseconds from an earlier moment to this one; waits for this one.
    ///
    /// # Errors
    /// What the driver reports, and what a kernel before it did wrong.
    pub fn milliseconds_since(&self, earlier: &Event) -> Result<f32, CudaError> {
        self.gpu.bind()?;
        let mut ms = 0.0;
        // SAFETY: both events were recorded.
        unsafe {
            cu!(cuEventSynchronize(self.handle))?;
            cu!(cuEventElapsedTime(&mut ms, earlier.handle, self.handle))?;
        }
        Ok(ms)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: the handle is this event's alone.
        unsafe {
            let _ = self.gpu.bind();
            sys::cuEventDestroy_v2(self.handle);
        }
    }
}
