use std::cell::Cell;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::ThreadPool;

fn pool(threads: usize) -> ThreadPool {
    ThreadPool::new(NonZeroUsize::new(threads).unwrap())
}

#[test]
fn every_task_runs_exactly_once() {
    for threads in [1, 2, 3, 5] {
        let pool = pool(threads);
        assert_eq!(pool.threads(), threads);
        for tasks in [0, 1, 2, 3, 7, 64, 1000] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            pool.run(tasks, &|task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
            });
            assert!(
                counts
                    .iter()
                    .all(|count| count.load(Ordering::Relaxed) == 1)
            );
        }
    }
}

#[test]
fn a_task_taken_ahead_is_the_one_that_its_thread_runs_next() {
    thread_local! {
        static PROMISED: Cell<Option<usize>> = const { Cell::new(None) };
    }
    for threads in [1, 2, 4] {
        let pool = pool(threads);
        for tasks in [0, 1, 2, 5, 300] {
            let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
            let first = AtomicUsize::new(0);
            pool.run_ahead(tasks, &|task, next| {
                counts[task].fetch_add(1, Ordering::Relaxed);
                match PROMISED.replace(next) {
                    Some(promised) => assert_eq!(promised, task),
                    None => _ = first.fetch_add(1, Ordering::Relaxed),
                }
            });
            let once = |count: &AtomicUsize| count.load(Ordering::Relaxed) == 1;
            assert!(counts.iter().all(once));
            assert!(first.into_inner() <= threads);
        }
    }
}

#[test]
fn a_copy_is_whole_whatever_its_parts() {
    let from: Vec<u8> = (0..10_007).map(|n| (n % 251) as u8).collect();
    for part in [0, 1, 7, 64, 10_006, 10_007, 20_000] {
        let mut to = vec![0; from.len()];
        pool(3).copy(&from, &mut to, part);
        assert!(from == to);
    }
}

#[test]
fn many_short_regions_in_a_row_lose_no_task() {
    let pool = pool(3);
    let sum = AtomicUsize::new(0);
    for _ in 0..5_000 {
        pool.run(4, &|_| {
            sum.fetch_add(1, Ordering::Relaxed);
        });
    }
    assert_eq!(sum.into_inner(), 20_000);
}

#[test]
fn parked_workers_wake_up_for_a_region() {
    let pool = pool(3);
    for _ in 0..3 {
        std::thread::sleep(Duration::from_millis(30));
        let seen: Vec<AtomicBool> = (0..3).map(|_| AtomicBool::new(false)).collect();
        pool.run_with_worker(300, &|_, worker| {
            seen[worker].store(true, Ordering::Relaxed);
            std::thread::sleep(Duration::from_micros(200));
        });
        assert!(seen.iter().all(|worker| worker.load(Ordering::Relaxed)));
    }
}

#[test]
fn a_worker_number_is_never_used_twice_at_once() {
    let pool = pool(4);
    let busy: Vec<AtomicBool> = (0..4).map(|_| AtomicBool::new(false)).collect();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                for tasks in [1, 50] {
                    pool.run_with_worker(tasks, &|_, worker| {
                        assert!(!busy[worker].swap(true, Ordering::SeqCst));
                        std::hint::spin_loop();
                        busy[worker].store(false, Ordering::SeqCst);
                    });
                }
            });
        }
    });
}

#[test]
fn callers_from_several_threads_take_turns() {
    let pool = pool(2);
    let sum = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..200 {
                    pool.run(8, &|task| {
                        sum.fetch_add(task, Ordering::Relaxed);
                    });
                }
            });
        }
    });
    assert_eq!(sum.into_inner(), 4 * 200 * 28);
}

#[test]
fn a_region_inside_a_task_runs_inline() {
    let outer = pool(3);
    let other = pool(2);
    let sum = AtomicUsize::new(0);
    outer.run_with_worker(6, &|_, worker| {
        let thread = std::thread::current().id();
        outer.run_with_worker(5, &|_, inner| {
            assert_eq!(inner, worker);
            assert_eq!(std::thread::current().id(), thread);
            sum.fetch_add(1, Ordering::Relaxed);
        });
        other.run(5, &|_| {
            sum.fetch_add(1, Ordering::Relaxed);
        });
    });
    assert_eq!(sum.into_inner(), 60);
}

#[test]
fn a_panic_in_a_task_reaches_the_caller_and_leaves_the_pool_usable() {
    for threads in [1, 2, 4] {
        let pool = pool(threads);
        for bad in [0, 1, 37, 99] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(100, &|task| assert_ne!(task, bad, "task {bad}"));
            }));
            assert!(result.is_err());
            let sum = AtomicUsize::new(0);
            pool.run(10, &|task| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
            assert_eq!(sum.into_inner(), 45);
        }
    }
}
