//! Uploads beside kernels: a second stream, events between the two, and main memory that a GPU reads directly.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys::{self, CUevent, CUstream};

use super::error::{CudaError, cu};
use super::gpu::Gpu;

/// Bytes of a copy. Longer ones go in pieces, so that small copies of other streams need not wait for all of it.
const PIECE_BYTES: usize = 16 << 20;
/// Registered ranges begin and end with a page.
const PAGE_BYTES: usize = 4096;

/// A stream of a GPU for copies to it, which go on while kernels of the GPU's own stream run.
pub struct UploadStream {
    gpu: Gpu,
    stream: CUstream,
}

// SAFETY: a handle of the driver, valid on any thread that makes the context current.
unsafe impl Send for UploadStream {}
// SAFETY: as above.
unsafe impl Sync for UploadStream {}

impl UploadStream {
    /// One more stream.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn new(gpu: &Gpu) -> Result<Self, CudaError> {
        gpu.bind()?;
        let mut stream = std::ptr::null_mut();
        // SAFETY: writes one handle; 1 is CU_STREAM_NON_BLOCKING.
        unsafe { cu!(cuStreamCreate(&mut stream, 1)) }?;
        Ok(Self {
            gpu: gpu.clone(),
            stream,
        })
    }

    /// Copies `bytes` to the address `to`, in the stream's order. The call returns at once where the bytes
    /// are pinned or registered.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Safety
    /// `to` must have room for them on this GPU, and both must stay until the stream has passed.
    pub unsafe fn upload(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError> {
        self.gpu.bind()?;
        for (index, piece) in bytes.chunks(PIECE_BYTES).enumerate() {
            let to = to + (index * PIECE_BYTES) as u64;
            // SAFETY: both ranges are valid for as long as the copy takes, by the caller's promise.
            unsafe {
                cu!(cuMemcpyHtoDAsync_v2(
                    to,
                    piece.as_ptr().cast(),
                    piece.len(),
                    self.stream
                ))
            }?;
        }
        Ok(())
    }

    /// What is started here from now on runs after `moment`.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn wait(&self, moment: &Moment) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: stream and event live through the call; the driver keeps what it needs of the event.
        unsafe { cu!(cuStreamWaitEvent(self.stream, moment.handle, 0)) }
    }

    /// Makes `moment` the one when everything started here so far is done.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn mark(&self, moment: &Moment) -> Result<(), CudaError> {
        moment.record(self.stream)
    }

    /// Waits until everything that was started here is done.
    ///
    /// # Errors
    /// What a copy did wrong.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { cu!(cuStreamSynchronize(self.stream)) }
    }
}

impl Drop for UploadStream {
    fn drop(&mut self) {
        // SAFETY: the handle is this stream's alone; copies that were started are waited for, since their
        // memory may go next. An error means that the context is gone.
        unsafe {
            let _ = self.synchronize();
            sys::cuStreamDestroy_v2(self.stream);
        }
    }
}

/// A moment that one stream marks and another waits for, again and again. One that was never marked is past.
pub struct Moment {
    gpu: Gpu,
    handle: CUevent,
}

// SAFETY: a handle of the driver, valid on any thread that makes the context current.
unsafe impl Send for Moment {}
// SAFETY: as above.
unsafe impl Sync for Moment {}

impl Moment {
    /// One that is past.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn new(gpu: &Gpu) -> Result<Self, CudaError> {
        gpu.bind()?;
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes one handle; 2 is CU_EVENT_DISABLE_TIMING.
        unsafe { cu!(cuEventCreate(&mut handle, 2)) }?;
        Ok(Self {
            gpu: gpu.clone(),
            handle,
        })
    }

    fn record(&self, stream: CUstream) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: event and stream are of the same context.
        unsafe { cu!(cuEventRecord(self.handle, stream)) }
    }

    /// Makes it the moment when all kernels started so far are done.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn mark_kernels(&self) -> Result<(), CudaError> {
        self.record(self.gpu.stream())
    }

    /// Kernels that are started from now on run after it.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn hold_kernels(&self) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: as in `UploadStream::wait`.
        unsafe { cu!(cuStreamWaitEvent(self.gpu.stream(), self.handle, 0)) }
    }

    /// Waits for it on this thread.
    ///
    /// # Errors
    /// What went wrong before it.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.gpu.bind()?;
        // SAFETY: the event lives as long as `self`.
        unsafe { cu!(cuEventSynchronize(self.handle)) }
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        // SAFETY: the handle is this moment's alone.
        unsafe {
            let _ = self.gpu.bind();
            sys::cuEventDestroy_v2(self.handle);
        }
    }
}

/// A range of main memory that all GPUs read directly, until it is dropped.
struct Registered {
    gpu: Gpu,
    range: Range<usize>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: registered by `register`, and once: the owner of the memory outlives the registration.
        unsafe {
            let _ = self.gpu.bind();
            sys::cuMemHostUnregister(self.range.start as *mut _);
        }
    }
}

/// Main memory that was there before and that GPUs read directly now: a mapped file's, say.
pub struct ReadableMemory(Vec<Arc<Registered>>);

impl ReadableMemory {
    /// Lets GPUs read these ranges; their pages stay in main memory for as long as this lives.
    ///
    /// # Errors
    /// What the driver refuses: memory that is mapped for reading alone on a system without support for
    /// it, or pages that may not be locked.
    ///
    /// # Safety
    /// The ranges must stay mapped until this is dropped.
    pub unsafe fn new(gpu: &Gpu, ranges: Vec<Range<usize>>) -> Result<Self, CudaError> {
        merged(ranges)
            .into_iter()
            .map(|range| register(gpu, range))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Whether a range lies in one piece of it: no copy may cross from one to another.
    pub fn contains(&self, bytes: &[u8]) -> bool {
        let range = address_range(bytes);
        self.0.iter().any(|r| covers(&r.range, &range))
    }
}

/// Where bytes are.
pub fn address_range(bytes: &[u8]) -> Range<usize> {
    let start = bytes.as_ptr().addr();
    start..start + bytes.len()
}

fn covers(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

/// The pages of some ranges, those that touch joined.
fn merged(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.retain(|r| !r.is_empty());
    ranges.sort_by_key(|r| r.start);
    let mut all: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        let pages = range.start / PAGE_BYTES * PAGE_BYTES..range.end.next_multiple_of(PAGE_BYTES);
        match all.last_mut() {
            Some(last) if pages.start <= last.end => last.end = last.end.max(pages.end),
            _ => all.push(pages),
        }
    }
    all
}

/// Registers whole pages, or finds them registered: models that are loaded twice share a map.
fn register(gpu: &Gpu, range: Range<usize>) -> Result<Arc<Registered>, CudaError> {
    static ALL: Mutex<Vec<Weak<Registered>>> = Mutex::new(Vec::new());
    let mut all = ALL.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|known| known.strong_count() > 0);
    let known = all.iter().filter_map(Weak::upgrade);
    if let Some(known) = known.into_iter().find(|r| covers(&r.range, &range)) {
        return Ok(known);
    }
    gpu.bind()?;
    // 9 is PORTABLE | READ_ONLY.
    // SAFETY: whole pages that are mapped, by the promise to `ReadableMemory::new`.
    unsafe { cu!(cuMemHostRegister_v2(range.start as *mut _, range.len(), 9)) }?;
    let registered = Arc::new(Registered {
        gpu: gpu.clone(),
        range,
    });
    all.push(Arc::downgrade(&registered));
    Ok(registered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::DeviceBuffer;

    #[test]
    fn ranges_that_share_a_page_are_registered_as_one() {
        let page = PAGE_BYTES;
        let ranges = vec![
            5 * page + 7..6 * page,
            10..20,
            page - 1..page + 1,
            3..3,
            2 * page..3 * page - 1,
        ];
        assert_eq!(merged(ranges), [0..3 * page, 5 * page..6 * page]);
    }

    #[test]
    fn gpu_uploads_from_registered_memory_beside_its_kernels() {
        let Some(gpu) = Gpu::for_tests() else { return };
        // A page more on either side, so that no other memory lies in a registered page.
        let memory: Vec<u8> = (0..(PIECE_BYTES + 12_345 + 2 * PAGE_BYTES))
            .map(|i| (i * 7 % 251) as u8)
            .collect();
        let bytes = &memory[PAGE_BYTES..memory.len() - PAGE_BYTES];
        // SAFETY: the registration is dropped before the bytes.
        let readable = unsafe { ReadableMemory::new(&gpu, vec![address_range(bytes)]) }.unwrap();
        assert!(readable.contains(&bytes[1..]));
        let stream = UploadStream::new(&gpu).unwrap();
        let done = Moment::new(&gpu).unwrap();
        let buffer = DeviceBuffer::zeroed(&gpu, bytes.len()).unwrap();
        done.mark_kernels().unwrap();
        stream.wait(&done).unwrap();
        // SAFETY: the buffer has room, and the stream is waited for below.
        unsafe { stream.upload(buffer.address() + 1, &bytes[1..]) }.unwrap();
        stream.mark(&done).unwrap();
        done.hold_kernels().unwrap();
        let found: Vec<u8> = buffer.read(0, bytes.len()).unwrap();
        assert!(found[0] == 0 && found[1..] == bytes[1..]);
    }
}
