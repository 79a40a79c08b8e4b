//! The pool: every task once, panics to the caller, any number of threads.

use crate::Pool;
use parking_lot::Mutex;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

fn counts(tasks: usize) -> Vec<AtomicUsize> {
    (0..tasks).map(|_| AtomicUsize::new(0)).collect()
}

fn run_once(pool: &Pool, tasks: usize) {
    let counts = counts(tasks);
    pool.run(tasks, &|i| {
        counts[i].fetch_add(1, Ordering::Relaxed);
    });
    assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1), "{tasks} tasks");
}

#[test]
fn every_task_runs_once() {
    for threads in [0, 1, 2, 3, 16] {
        let pool = Pool::new(threads);
        assert_eq!(pool.threads(), threads.max(1));
        for tasks in (0..200).chain([5000]) {
            run_once(&pool, tasks);
        }
    }
}

#[test]
fn sleeping_helpers_wake() {
    let pool = Pool::with_awake(4, Duration::ZERO);
    for tasks in 0..300 {
        run_once(&pool, tasks % 17);
        if tasks % 50 == 0 {
            thread::sleep(Duration::from_millis(2));
        }
    }
}

#[test]
fn helpers_help() {
    // Two tasks that wait for each other need two threads.
    let pool = Pool::new(2);
    let met = AtomicUsize::new(0);
    pool.run(2, &|_| {
        met.fetch_add(1, Ordering::SeqCst);
        while met.load(Ordering::SeqCst) < 2 {
            thread::yield_now();
        }
    });
}

#[test]
fn bound_threads_are_on_their_cpus() {
    use rustix::thread::{CpuSet, sched_getaffinity};
    let usable = sched_getaffinity(None).unwrap();
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&cpu| usable.is_set(cpu)).collect();
    // A thread of its own, as its binding stays.
    let seen = thread::spawn(move || {
        let pool = Pool::bound(3, 1);
        pool.bind_caller();
        let seen = Mutex::new(Vec::new());
        // Three tasks that wait for each other, so that each is on another thread.
        let met = AtomicUsize::new(0);
        pool.run(3, &|_| {
            let mine = sched_getaffinity(None).unwrap();
            seen.lock().push((thread::current().name().map(str::to_owned), mine));
            met.fetch_add(1, Ordering::SeqCst);
            while met.load(Ordering::SeqCst) < 3 {
                thread::yield_now();
            }
        });
        seen.into_inner()
    });
    for (name, set) in seen.join().unwrap() {
        let thread = name.map_or(0, |name| name.strip_prefix("kernel-").unwrap().parse().unwrap());
        let mut expected = CpuSet::new();
        expected.set(cpus[(1 + thread) % cpus.len()]);
        assert_eq!(set, expected, "thread {thread}");
    }
}

#[test]
fn a_panic_reaches_the_caller() {
    let pool = Pool::new(4);
    for bad in [0, 7, 19] {
        let counts = counts(20);
        let run = || {
            pool.run(20, &|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
                assert!(i != bad, "task {i}");
            });
        };
        let panic = catch_unwind(AssertUnwindSafe(run)).unwrap_err();
        assert_eq!(panic.downcast_ref::<String>(), Some(&format!("task {bad}")));
        assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
        run_once(&pool, 50);
    }
}

#[test]
fn nested_and_rival_jobs_run_on_their_callers() {
    let pool = Pool::new(3);
    let total = AtomicUsize::new(0);
    thread::scope(|s| {
        for _ in 0..4 {
            s.spawn(|| {
                for _ in 0..50 {
                    pool.run(5, &|_| {
                        pool.run(3, &|_| {
                            total.fetch_add(1, Ordering::Relaxed);
                        });
                    });
                }
            });
        }
    });
    assert_eq!(total.into_inner(), 4 * 50 * 15);
}
