//! What the caller of a region and the workers share, and the protocol between them.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread::Thread;

/// Times that a waiting worker polls with a pause in between: some 20 to 50 µs, longer than the
/// serial code between two regions of a layer.
const SPINS: u32 = 400;
/// Times that it then offers its core to others before it parks.
const YIELDS: u32 = 64;
/// Times that a worker that is to stay awake polls before it offers its core to others: about a millisecond. Where
/// a sandbox stands before the kernel, an offer takes so long that the worker misses the next region's beginning.
const AWAKE_SPINS: u32 = 1 << 15;

/// Set in `gate` while workers may join; the bits below count those that have.
const OPEN: u32 = 1 << 31;

/// One value alone on its cache lines (two: the adjacent-line prefetcher pairs them).
#[repr(align(128))]
struct Alone<T>(T);

/// A parallel region: its tasks and how many there are.
pub(super) struct Region<'a> {
    pub(super) task: &'a (dyn Fn(Turn) + Sync),
    pub(super) tasks: usize,
    /// Whether a thread takes its next task before it runs the one that it has.
    pub(super) ahead: bool,
}

impl Region<'_> {
    /// Runs all tasks on the calling thread, as `worker`.
    pub(super) fn run_alone(&self, worker: usize) {
        for index in 0..self.tasks {
            (self.task)(Turn {
                index,
                worker,
                next: Some(index + 1).filter(|next| self.ahead && *next < self.tasks),
            });
        }
    }
}

/// One call of a region's task.
#[derive(Debug, Clone, Copy)]
pub(super) struct Turn {
    pub(super) index: usize,
    pub(super) worker: usize,
    /// The task that this thread runs next, where tasks are taken ahead.
    pub(super) next: Option<usize>,
}

type Payload = Box<dyn Any + Send>;

pub(super) struct Shared {
    /// Bumped once per region; workers wait for it to change.
    generation: Alone<AtomicU32>,
    /// `OPEN` and the number of joined workers.
    gate: Alone<AtomicU32>,
    /// The next task index.
    next: Alone<AtomicUsize>,
    /// The open region. Written while nobody is joined, read by joined workers only.
    region: UnsafeCell<Option<*const Region<'static>>>,
    /// Per worker: it is about to park and must be woken.
    parked: Box<[AtomicBool]>,
    /// Number of `parked` flags that are set, so that a caller need not look at all of them.
    sleepers: Alone<AtomicUsize>,
    /// While not 0, waiting workers do not park.
    awake: Alone<AtomicUsize>,
    stop: AtomicBool,
    panicked: AtomicBool,
    payload: Mutex<Option<Payload>>,
}

// SAFETY: `region` is the only field that is not `Sync`, and its pointee holds a `Sync` closure.
// It is written by `open` only, whose caller guarantees that no region is open; workers read it
// after joining (acquire on `gate`), which is possible only between `open` and `close`.
unsafe impl Sync for Shared {}
// SAFETY: as above; the pointer is dereferenced only while the region it points to is alive.
unsafe impl Send for Shared {}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("workers", &self.parked.len())
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(workers: usize) -> Self {
        Self {
            generation: Alone(AtomicU32::new(0)),
            gate: Alone(AtomicU32::new(0)),
            next: Alone(AtomicUsize::new(0)),
            region: UnsafeCell::new(None),
            parked: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            sleepers: Alone(AtomicUsize::new(0)),
            awake: Alone(AtomicUsize::new(0)),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
            payload: Mutex::new(None),
        }
    }

    /// Publishes `region` to the workers.
    ///
    /// # Safety
    /// No region is open, and the caller calls [`Self::close`] before `region` dies.
    pub(super) unsafe fn open(&self, region: &Region<'_>) {
        let region: *const Region<'_> = region;
        // SAFETY: nobody is joined (the previous region was closed), so nobody reads the cell.
        // The lifetime is erased; `close` is called before it ends.
        unsafe { *self.region.get() = Some(region.cast::<Region<'static>>()) };
        self.next.0.store(0, Ordering::Relaxed);
        self.gate.0.store(OPEN, Ordering::Release);
        // SeqCst, together with `wait`: either this caller sees the worker's `sleepers`, or the
        // worker sees this generation before it parks.
        self.generation.0.fetch_add(1, Ordering::SeqCst);
    }

    /// Wakes worker number `worker` (counted from 0) when it is parked.
    pub(super) fn wake(&self, worker: usize, thread: &Thread) {
        if self.sleepers.0.load(Ordering::SeqCst) != 0
            && self.parked[worker].swap(false, Ordering::SeqCst)
        {
            self.sleepers.0.fetch_sub(1, Ordering::SeqCst);
            thread.unpark();
        }
    }

    /// Runs tasks of `region` as `worker` until none are left.
    pub(super) fn take_tasks(&self, region: &Region<'_>, worker: usize) {
        let _inside = enter(self, worker);
        let take = || {
            let index = self.next.0.fetch_add(1, Ordering::Relaxed);
            (index < region.tasks).then_some(index)
        };
        let mut taken = take();
        while let Some(index) = taken {
            let next = if region.ahead { take() } else { None };
            (region.task)(Turn {
                index,
                worker,
                next,
            });
            taken = if region.ahead { next } else { take() };
        }
    }

    /// Makes the tasks that nobody has begun disappear, after a panic.
    pub(super) fn drop_remaining(&self, region: &Region<'_>) {
        self.next.0.store(region.tasks, Ordering::Relaxed);
    }

    /// Ends the region: nobody joins any more, and those who did have left. Returns the panic of
    /// a worker's task, if there was one.
    pub(super) fn close(&self) -> Option<Payload> {
        let mut joined = self.gate.0.fetch_and(!OPEN, Ordering::AcqRel) & !OPEN;
        let mut spins = 0;
        while joined != 0 {
            self.relax(&mut spins);
            joined = self.gate.0.load(Ordering::Acquire);
        }
        if !self.panicked.load(Ordering::Relaxed) {
            return None;
        }
        self.panicked.store(false, Ordering::Relaxed);
        self.payload
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.generation.0.fetch_add(1, Ordering::SeqCst);
    }

    /// What a worker thread does until the pool is dropped. `worker` counts from 1.
    pub(super) fn worker_loop(&self, worker: usize) {
        let mut seen = 0;
        loop {
            seen = self.wait(seen, worker - 1);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            if self.join() {
                self.work(worker);
                self.gate.0.fetch_sub(1, Ordering::Release);
            }
        }
    }

    fn join(&self) -> bool {
        let mut gate = self.gate.0.load(Ordering::Relaxed);
        while gate & OPEN != 0 {
            match self.gate.0.compare_exchange_weak(
                gate,
                gate + 1,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return true,
                Err(now) => gate = now,
            }
        }
        false
    }

    /// The part of a joined worker.
    fn work(&self, worker: usize) {
        // SAFETY: this worker has joined, so `open` has written the cell (acquire in `join`), and
        // `close` has not returned: the cell is not written and the region is alive.
        let region = unsafe { (*self.region.get()).map(|region| &*region) };
        let Some(region) = region else { return };
        let result = catch_unwind(AssertUnwindSafe(|| self.take_tasks(region, worker)));
        if let Err(payload) = result {
            self.drop_remaining(region);
            let mut first = self.payload.lock().unwrap_or_else(PoisonError::into_inner);
            first.get_or_insert(payload);
            // Published by the release in `worker_loop`.
            self.panicked.store(true, Ordering::Relaxed);
        }
    }

    /// Waits until the generation is not `seen` and returns it.
    fn wait(&self, seen: u32, worker: usize) -> u32 {
        let mut spins = 0;
        loop {
            let now = self.generation.0.load(Ordering::SeqCst);
            if now != seen {
                return now;
            }
            if !self.relax(&mut spins) {
                self.park(seen, worker);
            }
        }
    }

    /// From now on waiting workers do not park; as often as this is said, [`sleep`](Self::sleep) must be.
    pub(super) fn stay_awake(&self) {
        self.awake.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn sleep(&self) {
        self.awake.0.fetch_sub(1, Ordering::Relaxed);
    }

    /// One step of waiting: pauses first, then yields. False once both have been used up, which they never are
    /// while workers are to stay awake.
    fn relax(&self, steps: &mut u32) -> bool {
        *steps = steps.saturating_add(1);
        if self.awake.0.load(Ordering::Relaxed) != 0 {
            if steps.is_multiple_of(AWAKE_SPINS) {
                std::thread::yield_now();
                *steps = 0;
            }
            std::hint::spin_loop();
            return true;
        }
        if *steps <= SPINS {
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
        *steps < SPINS + YIELDS
    }

    fn park(&self, seen: u32, worker: usize) {
        // In this order, so that the count never falls short of the flags.
        self.sleepers.0.fetch_add(1, Ordering::SeqCst);
        self.parked[worker].store(true, Ordering::SeqCst);
        while self.generation.0.load(Ordering::SeqCst) == seen {
            std::thread::park();
        }
        // A caller that has already cleared the flag has also counted it down.
        if self.parked[worker].swap(false, Ordering::SeqCst) {
            self.sleepers.0.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

thread_local! {
    /// The pool (by address) and worker number whose task this thread is running.
    static INSIDE: Cell<Option<(usize, usize)>> = const { Cell::new(None) };
}

/// Marks this thread as running a task until it is dropped.
pub(super) struct Inside(Option<(usize, usize)>);

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(self.0);
    }
}

pub(super) fn enter(shared: &Shared, worker: usize) -> Inside {
    Inside(INSIDE.replace(Some((std::ptr::from_ref(shared).addr(), worker))))
}

/// The worker number for a region begun inside a task, or `None` outside of all tasks.
pub(super) fn nested_worker(shared: &Shared) -> Option<usize> {
    INSIDE.get().map(|(pool, worker)| {
        let same_pool = pool == std::ptr::from_ref(shared).addr();
        if same_pool { worker } else { 0 }
    })
}
