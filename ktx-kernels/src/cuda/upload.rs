//! Uploads beside kernels: a second stream, events between the two, and main memory that a GPU reads directly.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::sys::{self, CUevent, CUstream};

use super::error::{CudaError, cu};
use super::gpu::Gpu;
use super::memory::PinnedBuffer;

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
        self.hold(&self.gpu)
    }

    /// Kernels that are started on this GPU from now on run after it.
    pub(super) fn hold(&self, gpu: &Gpu) -> Result<(), CudaError> {
        gpu.bind()?;
        // SAFETY: as in `UploadStream::wait`.
        unsafe { cu!(cuStreamWaitEvent(gpu.stream(), self.handle, 0)) }
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

/// Pages of main memory that all GPUs read directly, until it is dropped.
struct Registered {
    gpu: Gpu,
    pages: Range<usize>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: registered by `register`, and once: the owner of the memory outlives the registration.
        unsafe {
            let _ = self.gpu.bind();
            sys::cuMemHostUnregister(self.pages.start as *mut _);
        }
    }
}

/// A range of [`ReadableMemory`].
struct Piece {
    range: Range<usize>,
    /// The pages that belong to it alone; empty in a short one.
    pages: Range<usize>,
    /// Where the copies of what lies before and behind these pages begin.
    edges: usize,
}

/// Main memory that was there before and that GPUs read directly now: a mapped file's, say.
///
/// Only pages that lie wholly within it are the driver's: others may hold memory of other owners, which
/// could no longer be copied from and to. What is left at both ends is read from a pinned copy.
pub struct ReadableMemory {
    pieces: Vec<Piece>,
    edges: PinnedBuffer,
    _registered: Vec<Arc<Registered>>,
}

impl ReadableMemory {
    /// Lets GPUs read these ranges; their pages stay in main memory for as long as this lives.
    ///
    /// # Errors
    /// What the driver refuses: memory that is mapped for reading alone on a system without support for
    /// it, or pages that may not be locked.
    ///
    /// # Safety
    /// The ranges must stay mapped, and their bytes the same, until this is dropped.
    pub unsafe fn new(gpu: &Gpu, ranges: Vec<Range<usize>>) -> Result<Self, CudaError> {
        let mut registered = Vec::new();
        let mut pieces = Vec::new();
        let mut edges = Vec::new();
        for range in merged(ranges) {
            let pages = whole_pages(&range);
            if !pages.is_empty() {
                registered.push(register(gpu, pages.clone())?);
            }
            let at = edges.len();
            for edge in [range.start..pages.start, pages.end..range.end] {
                // SAFETY: a part of one of the ranges, which are mapped by the caller's promise.
                edges.extend(unsafe {
                    std::slice::from_raw_parts(edge.start as *const u8, edge.len())
                });
            }
            pieces.push(Piece {
                range,
                pages,
                edges: at,
            });
        }
        let mut pinned = PinnedBuffer::new(gpu, edges.len())?;
        pinned.as_mut_slice::<u8>()[..edges.len()].copy_from_slice(&edges);
        Ok(Self {
            pieces,
            edges: pinned,
            _registered: registered,
        })
    }

    /// Copies bytes of it to the address `to`, in the order of `stream`. The call returns at once.
    ///
    /// # Errors
    /// What the driver refuses.
    ///
    /// # Safety
    /// `to` must have room for them on the stream's GPU, and it and this must stay until the stream has passed.
    ///
    /// # Panics
    /// If they are not within one of the ranges.
    pub unsafe fn upload(
        &self,
        stream: &UploadStream,
        to: u64,
        bytes: &[u8],
    ) -> Result<(), CudaError> {
        let wanted = address_range(bytes);
        let piece = self.pieces.iter().find(|p| covers(&p.range, &wanted));
        let piece = piece.expect("bytes of a range that GPUs were given to read");
        let (range, pages) = (&piece.range, &piece.pages);
        let edges = &self.edges.as_slice::<u8>()[piece.edges..];
        let behind = &edges[pages.start - range.start..];
        let sources = [
            (range.start..pages.start, Some(edges)),
            (pages.clone(), None),
            (pages.end..range.end, Some(behind)),
        ];
        for (source, copy) in sources {
            let part = wanted.start.max(source.start)..wanted.end.min(source.end);
            if part.is_empty() {
                continue;
            }
            let at = part.start - wanted.start;
            let from = match copy {
                Some(copy) => &copy[part.start - source.start..][..part.len()],
                None => &bytes[at..at + part.len()],
            };
            // SAFETY: a part of what the caller vouches for.
            unsafe { stream.upload(to + at as u64, from) }?;
        }
        Ok(())
    }
}

/// Where bytes are.
fn address_range(bytes: &[u8]) -> Range<usize> {
    let start = bytes.as_ptr().addr();
    start..start + bytes.len()
}

fn covers(outer: &Range<usize>, inner: &Range<usize>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}

/// Ranges in their order, those that touch joined.
fn merged(mut ranges: Vec<Range<usize>>) -> Vec<Range<usize>> {
    ranges.retain(|r| !r.is_empty());
    ranges.sort_by_key(|r| r.start);
    let mut all: Vec<Range<usize>> = Vec::new();
    for range in ranges {
        match all.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => all.push(range),
        }
    }
    all
}

/// The pages that lie wholly within a range; without any, an empty range at its end.
fn whole_pages(range: &Range<usize>) -> Range<usize> {
    let start = range.start.next_multiple_of(PAGE_BYTES);
    let end = range.end / PAGE_BYTES * PAGE_BYTES;
    match start < end {
        true => start..end,
        false => range.end..range.end,
    }
}

/// What is registered, in all of the process.
static REGISTERED: Mutex<Vec<Weak<Registered>>> = Mutex::new(Vec::new());

/// Registers whole pages, or finds them registered: models that are loaded twice share a map.
fn register(gpu: &Gpu, pages: Range<usize>) -> Result<Arc<Registered>, CudaError> {
    let mut all = REGISTERED.lock().unwrap_or_else(PoisonError::into_inner);
    all.retain(|known| known.strong_count() > 0);
    let known = all.iter().filter_map(Weak::upgrade);
    if let Some(known) = known.into_iter().find(|r| covers(&r.pages, &pages)) {
        return Ok(known);
    }
    gpu.bind()?;
    // 9 is PORTABLE | READ_ONLY.
    // SAFETY: whole pages that are mapped, by the promise to `ReadableMemory::new`.
    unsafe { cu!(cuMemHostRegister_v2(pages.start as *mut _, pages.len(), 9)) }?;
    let registered = Arc::new(Registered {
        gpu: gpu.clone(),
        pages,
    });
    all.push(Arc::downgrade(&registered));
    Ok(registered)
}

/// Cuts a range where some pages begin or end.
fn cut(range: &Range<usize>, pages: &[Range<usize>]) -> Vec<Range<usize>> {
    let ends = pages.iter().flat_map(|p| [p.start, p.end]);
    let mut points = vec![range.start, range.end];
    points.extend(ends.filter(|point| range.contains(point)));
    points.sort_unstable();
    points.dedup();
    points.windows(2).map(|ends| ends[0]..ends[1]).collect()
}

/// Any main memory in pieces that one copy can read: no copy may begin in registered pages and end elsewhere.
pub(super) fn copyable(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    let all: Vec<Range<usize>> = REGISTERED
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .iter()
        .filter_map(|known| Some(known.upgrade()?.pages.clone()))
        .collect();
    let range = address_range(bytes);
    let pieces = cut(&range, &all).into_iter();
    pieces.map(move |piece| &bytes[piece.start - range.start..piece.end - range.start])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::DeviceBuffer;

    const PAGE: usize = PAGE_BYTES;

    #[test]
    fn ranges_that_touch_are_one_and_keep_to_their_own_pages() {
        let ranges = vec![
            5 * PAGE + 7..8 * PAGE,
            10..20,
            3..3,
            PAGE..2 * PAGE + 5,
            20..PAGE,
            11 * PAGE - 9..12 * PAGE + 9,
            30 * PAGE..32 * PAGE,
        ];
        let merged = merged(ranges);
        let wanted = [
            10..2 * PAGE + 5,
            5 * PAGE + 7..8 * PAGE,
            11 * PAGE - 9..12 * PAGE + 9,
            30 * PAGE..32 * PAGE,
        ];
        assert_eq!(merged, wanted);
        let pages: Vec<_> = merged.iter().map(whole_pages).collect();
        let wanted = [
            PAGE..2 * PAGE,
            6 * PAGE..8 * PAGE,
            11 * PAGE..12 * PAGE,
            30 * PAGE..32 * PAGE,
        ];
        assert_eq!(pages, wanted);
        assert_eq!(whole_pages(&(5..2 * PAGE - 1)), 2 * PAGE - 1..2 * PAGE - 1);
    }

    #[test]
    fn copies_are_cut_where_registered_pages_begin_and_end() {
        let pages = [10..20, 20..30, 50..60];
        let pieces = |range| cut(&range, &pages);
        assert_eq!(pieces(5..55), [5..10, 10..20, 20..30, 30..50, 50..55]);
        for whole in [20..30, 12..13, 60..70] {
            assert_eq!(pieces(whole.clone()), std::slice::from_ref(&whole));
        }
        assert!(pieces(7..7).is_empty());
    }

    /// The memory that is registered begins and ends within pages of the rest, which is copied from and to
    /// meanwhile.
    #[test]
    fn gpu_uploads_from_registered_memory_beside_its_kernels() {
        let Some(gpu) = Gpu::for_tests() else { return };
        let mut memory: Vec<u8> = (0..(PIECE_BYTES + 12_345))
            .map(|i| (i * 7 % 251) as u8)
            .collect();
        let all = DeviceBuffer::upload(&gpu, &memory).unwrap();
        let (before, rest) = memory.split_at_mut(777);
        let (bytes, behind) = rest.split_at_mut(PIECE_BYTES + 11_000);
        let (bytes, expected) = (&*bytes, bytes.to_vec());
        // SAFETY: the registration is dropped before the bytes.
        let readable = unsafe { ReadableMemory::new(&gpu, vec![address_range(bytes)]) }.unwrap();
        let stream = UploadStream::new(&gpu).unwrap();
        let done = Moment::new(&gpu).unwrap();
        for part in [
            1..bytes.len(),
            0..100,
            9_000..9_001,
            bytes.len() - 3..bytes.len(),
        ] {
            let part = &bytes[part];
            let buffer = DeviceBuffer::zeroed(&gpu, part.len() + 1).unwrap();
            done.mark_kernels().unwrap();
            stream.wait(&done).unwrap();
            // SAFETY: the buffer has room, and the stream is waited for below.
            unsafe { readable.upload(&stream, buffer.address() + 1, part) }.unwrap();
            stream.mark(&done).unwrap();
            done.hold_kernels().unwrap();
            let found: Vec<u8> = buffer.read(0, part.len() + 1).unwrap();
            assert!(found[0] == 0 && found[1..] == *part);
        }
        for neighbour in [before, behind] {
            let there = DeviceBuffer::upload(&gpu, neighbour).unwrap();
            let values = neighbour.to_vec();
            neighbour.fill(0);
            there.read_into(0, neighbour).unwrap();
            assert!(neighbour == values);
        }
        let again = DeviceBuffer::upload(&gpu, bytes).unwrap();
        assert!(again.read::<u8>(0, bytes.len()).unwrap() == expected);
        let whole = DeviceBuffer::upload(&gpu, &memory).unwrap();
        drop(readable);
        let bytes = memory.len();
        assert!(whole.read::<u8>(0, bytes).unwrap() == all.read::<u8>(0, bytes).unwrap());
    }
}
