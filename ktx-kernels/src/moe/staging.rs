//! Uploads of memory that a GPU cannot read: threads copy it into pinned buffers, which go on from there.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::stream::{SLOTS, Slot};
use crate::cuda::{CudaError, Gpu, Moment, PinnedBuffer, UploadStream};
use crate::disjoint::DisjointMut;
use crate::pool::ThreadPool;

/// Bytes of a pinned buffer, and how many there are. Measured with 8 threads on a machine that copies
/// 52 GB/s from pinned memory: four of 8 MiB 28 GB/s, four of 32 MiB 25 GB/s.
const BUFFER_BYTES: usize = 8 << 20;
const BUFFERS: usize = 4;
/// Threads that fill a buffer at most: on that machine 12 were no faster than 8.
const MOST_THREADS: usize = 8;
/// Bytes that a thread copies at a time.
const TASK_BYTES: usize = 512 << 10;

/// A thread that uploads one slot after the other.
pub(super) struct Stager {
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    progress: Arc<Progress>,
    /// The last upload of each slot.
    tickets: [AtomicU64; SLOTS],
}

/// Which uploads the GPU's stream has been told of, by slots; or what went wrong with the last.
struct Progress {
    started: Mutex<[Result<u64, CudaError>; SLOTS]>,
    changed: Condvar,
}

struct Job {
    slot: usize,
    ticket: u64,
    target: Arc<Slot>,
    copies: Vec<Transfer>,
}

struct Transfer {
    to: u64,
    from: *const [u8],
}

// SAFETY: the bytes are only read, and stay until the upload is done, as `Stager::start` was promised.
unsafe impl Send for Transfer {}

impl Stager {
    /// A thread for uploads in `stream`.
    ///
    /// # Errors
    /// [`CudaError::OutOfPinned`], or what the driver refuses.
    pub(super) fn new(gpu: &Gpu, stream: &Arc<UploadStream>) -> Result<Self, CudaError> {
        let buffers = (0..BUFFERS)
            .map(|_| Ok((PinnedBuffer::new(gpu, BUFFER_BYTES)?, Moment::new(gpu)?)))
            .collect::<Result<_, CudaError>>()?;
        let threads = (ThreadPool::default_threads().get() / 2).clamp(1, MOST_THREADS);
        let worker = Worker {
            stream: Arc::clone(stream),
            buffers,
            next: 0,
            pool: ThreadPool::new(NonZeroUsize::new(threads).unwrap_or(NonZeroUsize::MIN)),
        };
        let progress = Arc::new(Progress::default());
        let (jobs, receiver) = channel();
        let told = Arc::clone(&progress);
        let thread = std::thread::Builder::new()
            .name("ktx-upload".to_owned())
            .spawn(move || worker.work(&receiver, &told))
            .map_err(|_| CudaError::OutOfPinned {
                wanted: BUFFERS * BUFFER_BYTES,
            })?;
        Ok(Self {
            jobs: Some(jobs),
            thread: Some(thread),
            progress,
            tickets: Default::default(),
        })
    }

    /// Begins the upload of a slot once what it held has been read.
    ///
    /// # Safety
    /// The slot has room at every address for the bytes, and these stay until the upload is done.
    pub(super) unsafe fn start(&self, slot: usize, target: &Arc<Slot>, copies: &[(u64, &[u8])]) {
        let ticket = self.tickets[slot].fetch_add(1, Ordering::Relaxed) + 1;
        let job = Job {
            slot,
            ticket,
            target: Arc::clone(target),
            copies: copies
                .iter()
                .map(|(to, bytes)| Transfer {
                    to: *to,
                    from: std::ptr::from_ref::<[u8]>(bytes),
                })
                .collect(),
        };
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(job));
        assert!(
            matches!(sent, Some(Ok(()))),
            "the thread ends with the stager"
        );
    }

    /// Waits until the GPU's stream has been told of all of a slot's upload: then its moment is marked.
    pub(super) fn await_started(&self, slot: usize) -> Result<(), CudaError> {
        let ticket = self.tickets[slot].load(Ordering::Relaxed);
        let mut started = self
            .progress
            .started
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        loop {
            match &started[slot] {
                Ok(at) if *at >= ticket => return Ok(()),
                Ok(_) => {}
                Err(error) => return Err(error.clone()),
            }
            let waiting = self.progress.changed.wait(started);
            started = waiting.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Stager {
    fn drop(&mut self) {
        // The thread ends with its jobs.
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self {
            started: Mutex::new([const { Ok(0) }; SLOTS]),
            changed: Condvar::new(),
        }
    }
}

/// What the thread works with.
struct Worker {
    stream: Arc<UploadStream>,
    /// Pinned memory, and when the GPU has read it.
    buffers: Vec<(PinnedBuffer, Moment)>,
    next: usize,
    pool: ThreadPool,
}

impl Worker {
    fn work(mut self, jobs: &Receiver<Job>, progress: &Progress) {
        for job in jobs {
            let result = self.upload(&job);
            let mut started = progress
                .started
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            started[job.slot] = result.map(|()| job.ticket);
            progress.changed.notify_all();
        }
    }

    fn upload(&mut self, job: &Job) -> Result<(), CudaError> {
        self.stream.wait(&job.target.read)?;
        for copy in &job.copies {
            // SAFETY: the bytes are there until the upload is done, as `Stager::start` was promised.
            let bytes = unsafe { &*copy.from };
            for (index, piece) in bytes.chunks(BUFFER_BYTES).enumerate() {
                let (buffer, read) = &mut self.buffers[self.next];
                self.next = (self.next + 1) % BUFFERS;
                read.wait()?;
                let room = &mut buffer.as_mut_slice::<u8>()[..piece.len()];
                copy_by(&self.pool, piece, room);
                // SAFETY: the slot has room, as `Stager::start` was promised; the buffer is not written before
                // the moment below is past, nor dropped before the stream is.
                unsafe {
                    self.stream
                        .upload(copy.to + (index * BUFFER_BYTES) as u64, room)
                }?;
                self.stream.mark(read)?;
            }
        }
        self.stream.mark(&job.target.filled)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Uploads read the buffers.
        let _ = self.stream.synchronize();
    }
}

/// Copies with all threads of a pool.
fn copy_by(pool: &ThreadPool, from: &[u8], to: &mut [u8]) {
    let to = DisjointMut::new(to);
    pool.run(from.len().div_ceil(TASK_BYTES), &|task| {
        let start = task * TASK_BYTES;
        let part = &from[start..from.len().min(start + TASK_BYTES)];
        // SAFETY: tasks have parts of their own.
        unsafe { to.part(start, part.len()) }.copy_from_slice(part);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_bytes_are_copied_whatever_their_number() {
        let pool = ThreadPool::new(NonZeroUsize::new(3).unwrap());
        for length in [0, 1, TASK_BYTES, 3 * TASK_BYTES - 5] {
            let from: Vec<u8> = (0..length).map(|i| (i % 253) as u8).collect();
            let mut to = vec![255; length];
            copy_by(&pool, &from, &mut to);
            assert!(from == to, "{length} bytes");
        }
    }
}
