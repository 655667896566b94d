//! The thread pool that the layers of a token run on.
//!
//! A token passes hundreds of parallel regions of some 10 to 100 µs each, so a fork and join must
//! cost about a microsecond: workers spin briefly for the next region, then yield, then park, so
//! that an idle pool costs no CPU. A region hands out task indices through one atomic counter;
//! the caller takes part. There is no lock and no allocation between the regions of one caller
//! other than an uncontended mutex that keeps regions of different callers apart.
//!
//! How a region runs (all state is in `Shared`):
//! 1. the caller writes the job, sets `OPEN` in `gate`, bumps `generation`, wakes parked workers;
//! 2. a worker that sees the new generation *joins* by incrementing `gate` while `OPEN` is set,
//!    takes tasks until the counter runs out, then leaves by decrementing it;
//! 3. the caller takes tasks too; when none are left it clears `OPEN`, so that nobody joins any
//!    more, and waits for the workers that joined. A worker that the operating system did not
//!    schedule in time has not joined and delays nobody.
//!
//! The job lives on the caller's stack. Only joined workers read it, and the caller returns only
//! when nobody is joined: that is the whole safety argument.

mod shared;
#[cfg(test)]
mod tests;

use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use crate::disjoint::DisjointMut;
use crate::linear::ProductOrder;

use shared::{Region, Shared, Turn};

/// A fixed set of threads that share the tasks of one parallel region at a time.
///
/// Thread count never changes results: a task index is the only thing that a task may depend on
/// (besides scratch that belongs to its worker).
///
/// ```
/// use std::num::NonZeroUsize;
/// use std::sync::atomic::{AtomicUsize, Ordering};
/// use ktx_kernels::pool::ThreadPool;
///
/// let pool = ThreadPool::new(NonZeroUsize::new(2).unwrap());
/// let sum = AtomicUsize::new(0);
/// pool.run(100, &|task| {
///     sum.fetch_add(task, Ordering::Relaxed);
/// });
/// assert_eq!(sum.into_inner(), 4950);
/// ```
#[derive(Debug)]
pub struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held for the length of a region: callers take turns.
    turn: Mutex<()>,
    order: AtomicU8,
}

impl ThreadPool {
    /// A pool of `threads` threads in all: the caller of a region and `threads - 1` workers.
    ///
    /// Fewer workers are started when the operating system refuses more; [`Self::threads`] says
    /// how many there are.
    pub fn new(threads: NonZeroUsize) -> Self {
        let shared = Arc::new(Shared::new(threads.get() - 1));
        let workers = (1..threads.get())
            .map_while(|worker| {
                let shared = Arc::clone(&shared);
                std::thread::Builder::new()
                    .name(format!("ktx-{worker}"))
                    .spawn(move || shared.worker_loop(worker))
                    .ok()
            })
            .collect();
        Self {
            shared,
            workers,
            turn: Mutex::new(()),
            order: AtomicU8::new(ProductOrder::ByTokens as u8),
        }
    }

    /// Which way matrix products on these threads take from now on.
    pub fn set_product_order(&self, order: ProductOrder) {
        self.order.store(order as u8, Ordering::Relaxed);
    }

    /// Which way matrix products on these threads take.
    pub fn product_order(&self) -> ProductOrder {
        let order = self.order.load(Ordering::Relaxed);
        let mut all = [ProductOrder::Rows, ProductOrder::Panels].into_iter();
        all.find(|o| *o as u8 == order).unwrap_or_default()
    }

    /// The number of threads that this process may use: its CPU affinity and cgroup quota, not
    /// the machine's size.
    pub fn default_threads() -> NonZeroUsize {
        std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN)
    }

    /// Workers wait without parking until what this returns is dropped: where regions follow one another
    /// at intervals in which a GPU works, waking workers for each would take as long as their work.
    pub fn stay_awake(&self) -> Awake<'_> {
        self.shared.stay_awake();
        Awake(&self.shared)
    }

    /// Number of threads that work on a region, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(index)` once for every index below `tasks`, on all threads, and returns when
    /// all calls have returned. Indices are handed out in ascending order.
    ///
    /// Called from inside a task, of this pool or of another, it runs all tasks on the calling
    /// thread. Calls from several threads take turns.
    ///
    /// # Panics
    /// When a task panics: the tasks that run finish, those not yet begun are dropped, and the
    /// first panic continues in the caller. The pool stays usable.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.run_with_worker(tasks, &|index, _| task(index));
    }

    /// As [`Self::run`], with the number of the worker (below [`Self::threads`]) as second
    /// argument. No two tasks run at the same time with the same worker number of one pool,
    /// except a nested region's, which run under the number of the task that began them.
    ///
    /// # Panics
    /// As [`Self::run`].
    pub fn run_with_worker(&self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        self.run_region(&Region {
            task: &|turn: Turn| task(turn.index, turn.worker),
            tasks,
            ahead: false,
        });
    }

    /// As [`Self::run`], for tasks that are bound by reading memory: the second argument is the task that
    /// this thread runs next, whose first bytes can be asked for while this one ends.
    ///
    /// # Panics
    /// As [`Self::run`].
    pub fn run_ahead(&self, tasks: usize, task: &(dyn Fn(usize, Option<usize>) + Sync)) {
        self.run_region(&Region {
            task: &|turn: Turn| task(turn.index, turn.next),
            tasks,
            ahead: true,
        });
    }

    /// Copies `from` to `to`, which is as long, on all threads: `part` bytes in a task, at least one.
    ///
    /// # Panics
    /// When the lengths differ.
    pub fn copy(&self, from: &[u8], to: &mut [u8], part: usize) {
        assert_eq!(from.len(), to.len(), "a copy is as long as what is copied");
        let part = part.max(1);
        let to = DisjointMut::new(to);
        self.run(from.len().div_ceil(part), &|task| {
            let first = task * part;
            let from = &from[first..from.len().min(first + part)];
            // SAFETY: tasks have parts of their own, and the slice is not kept.
            unsafe { to.part(first, from.len()) }.copy_from_slice(from);
        });
    }

    fn run_region(&self, region: &Region<'_>) {
        if region.tasks == 0 {
            return;
        }
        if let Some(worker) = shared::nested_worker(&self.shared) {
            return region.run_alone(worker);
        }
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if region.tasks == 1 || self.workers.is_empty() {
            let _inside = shared::enter(&self.shared, 0);
            return region.run_alone(0);
        }
        self.run_shared(region);
    }

    fn run_shared(&self, region: &Region<'_>) {
        // SAFETY: `turn` is held, so no other region is open; `close` is called below on every
        // path before `region` goes out of scope, as the task's panics are caught.
        unsafe { self.shared.open(region) };
        for (worker, handle) in self.workers.iter().enumerate() {
            self.shared.wake(worker, handle.thread());
        }
        let own = catch_unwind(AssertUnwindSafe(|| self.shared.take_tasks(region, 0)));
        if own.is_err() {
            self.shared.drop_remaining(region);
        }
        let theirs = self.shared.close();
        if let Err(payload) = own {
            resume_unwind(payload);
        }
        if let Some(payload) = theirs {
            resume_unwind(payload);
        }
    }
}

/// While it lives, a pool's workers do not park; see [`ThreadPool::stay_awake`].
#[derive(Debug)]
pub struct Awake<'a>(&'a Shared);

impl Drop for Awake<'_> {
    fn drop(&mut self) {
        self.0.sleep();
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop();
        for handle in self.workers.drain(..) {
            handle.thread().unpark();
            // A worker catches the panics of its tasks, so there is no error to pass on.
            let _ = handle.join();
        }
    }
}
