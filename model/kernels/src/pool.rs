//! A fixed set of threads that share the tasks of one job at a time.
//!
//! Tasks are claimed by one compare-and-swap on a word that holds the job's number and the next task, so a
//! helper that wakes late can claim nothing of a job that is over. Helpers spin for a short while after a job, since the next
//! one usually follows within microseconds, and then sleep. A panic in a task reaches whoever called
//! [`Pool::run`]; the pool stays usable. There is no queue: a second job at the same time runs on its caller alone.

use parking_lot::{Condvar, Mutex};
use std::any::Any;
use std::fmt;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a helper waits awake for the next job.
const SPIN: Duration = Duration::from_micros(20);
/// Tasks a job can have: what the ticket has bits for.
const MAX_TASKS: usize = CLOSED as usize - 1;
/// As the next task of a ticket: nothing to claim.
const CLOSED: u64 = u32::MAX as u64;

/// A job, on the stack of the thread that runs it, which leaves only when all tasks are done.
struct Job<'a> {
    f: &'a (dyn Fn(usize) + Sync),
    /// The first panic of a task.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

struct Shared {
    /// The job's number in the high half, the next task to claim in the low half.
    ticket: AtomicU64,
    /// Tasks of the job.
    tasks: AtomicUsize,
    /// The job; valid for whoever holds a claimed task that is not counted in `done`.
    job: AtomicPtr<Job<'static>>,
    /// Tasks finished.
    done: AtomicUsize,
    /// Whether a job is running.
    busy: AtomicBool,
    stop: AtomicBool,
    /// Helpers asleep, or about to be.
    asleep: AtomicUsize,
    /// The caller, asleep or about to be.
    waiting: AtomicBool,
    lock: Mutex<()>,
    /// Wakes helpers.
    work: Condvar,
    /// Wakes the caller.
    finished: Condvar,
    spin: Duration,
}

/// Threads that run the tasks of one job at a time, beside the caller.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads, of which the caller of [`Pool::run`] is one. If the system gives fewer,
    /// [`Pool::threads`] says how many there are.
    pub fn new(threads: usize) -> Pool {
        Pool::with_spin(threads, SPIN)
    }

    /// [`Pool::new`], with helpers that stay awake for `spin` after a job.
    pub fn with_spin(threads: usize, spin: Duration) -> Pool {
        let shared = Arc::new(Shared {
            ticket: AtomicU64::new(0),
            tasks: AtomicUsize::new(0),
            job: AtomicPtr::new(ptr::null_mut()),
            done: AtomicUsize::new(0),
            busy: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            asleep: AtomicUsize::new(0),
            waiting: AtomicBool::new(false),
            lock: Mutex::new(()),
            work: Condvar::new(),
            finished: Condvar::new(),
            spin,
        });
        let helpers = (1..threads)
            .map_while(|i| {
                let shared = shared.clone();
                let name = format!("kernel-{i}");
                thread::Builder::new().name(name).spawn(move || shared.help()).ok()
            })
            .collect();
        Pool { shared, helpers }
    }

    /// Threads that work on a job, the caller among them.
    pub fn threads(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Runs `f(i)` once for each `i` in `0..tasks` and returns when all have finished. If any panicked, the first panic
    /// goes on in the caller, after the rest have run. Called from inside a task, or while another thread runs a
    /// job, it runs the tasks on the calling thread, one after another.
    pub fn run(&self, tasks: usize, f: &(dyn Fn(usize) + Sync)) {
        let shared = &*self.shared;
        if !(2..=MAX_TASKS).contains(&tasks)
            || self.helpers.is_empty()
            || shared.busy.swap(true, Ordering::Acquire)
        {
            return (0..tasks).for_each(f);
        }
        let job = Job { f, panic: Mutex::new(None) };
        shared.publish(&job, tasks);
        shared.work();
        shared.wait(tasks);
        shared.busy.store(false, Ordering::Release);
        if let Some(panic) = job.panic.into_inner() {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        drop(self.shared.lock.lock());
        self.shared.work.notify_all();
        for helper in self.helpers.drain(..) {
            // A helper catches the panics of its tasks, so there is nothing to hear of here.
            let _ = helper.join();
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("threads", &self.threads()).finish()
    }
}

impl Shared {
    /// Opens a job for claims. The ticket is closed first: a helper that still holds the last job's exhausted one must
    /// not claim from it by the new number of tasks. Whoever sees the new `tasks` or `job` sees that the ticket moved.
    fn publish(&self, job: &Job<'_>, tasks: usize) {
        let ticket = self.ticket.load(Ordering::Relaxed);
        let number = (ticket >> 32).wrapping_add(1);
        self.ticket.store(number << 32 | CLOSED, Ordering::SeqCst);
        self.done.store(0, Ordering::Relaxed);
        self.tasks.store(tasks, Ordering::Release);
        self.job.store(ptr::from_ref(job).cast_mut().cast(), Ordering::Release);
        // Sequentially consistent with `sleep`: either the helper sees this job or we see the helper asleep.
        self.ticket.store(number << 32, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) > 0 {
            drop(self.lock.lock());
            self.work.notify_all();
        }
    }

    /// Claims and runs tasks until there are none. Says whether there was any.
    fn work(&self) -> bool {
        let mut any = false;
        let mut ticket = self.ticket.load(Ordering::Acquire);
        loop {
            let tasks = self.tasks.load(Ordering::Acquire);
            let next = ticket as u32 as usize;
            if next >= tasks {
                return any;
            }
            // A successful claim means that the ticket has not moved, so `tasks` and `job` were its own.
            let job = self.job.load(Ordering::Acquire);
            match self.ticket.compare_exchange_weak(
                ticket,
                ticket + 1,
                Ordering::AcqRel,
                Ordering::Acquire,
            ) {
                Ok(_) => ticket += 1,
                Err(seen) => {
                    ticket = seen;
                    continue;
                }
            }
            any = true;
            // SAFETY: the claimed task is not done, so `run` has not returned and its job lives.
            let job = unsafe { &*job };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.f)(next))) {
                job.panic.lock().get_or_insert(panic);
            }
            // The last touch: after it the job may be gone.
            if self.done.fetch_add(1, Ordering::SeqCst) + 1 == tasks
                && self.waiting.load(Ordering::SeqCst)
            {
                drop(self.lock.lock());
                self.finished.notify_all();
            }
        }
    }

    /// Returns when `tasks` tasks are done.
    fn wait(&self, tasks: usize) {
        let start = Instant::now();
        while self.done.load(Ordering::Acquire) < tasks {
            if start.elapsed() < self.spin {
                spin_loop();
                continue;
            }
            let mut guard = self.lock.lock();
            self.waiting.store(true, Ordering::SeqCst);
            while self.done.load(Ordering::SeqCst) < tasks {
                self.finished.wait(&mut guard);
            }
            self.waiting.store(false, Ordering::SeqCst);
        }
    }

    /// A helper's life.
    fn help(&self) {
        let mut idle = Instant::now();
        while !self.stop.load(Ordering::Relaxed) {
            if self.work() {
                idle = Instant::now();
            } else if idle.elapsed() < self.spin {
                spin_loop();
            } else {
                self.sleep();
                idle = Instant::now();
            }
        }
    }

    /// Sleeps until there is a job or the pool stops.
    fn sleep(&self) {
        let mut guard = self.lock.lock();
        self.asleep.fetch_add(1, Ordering::SeqCst);
        let idle = || {
            let next = self.ticket.load(Ordering::SeqCst) as u32 as usize;
            next >= self.tasks.load(Ordering::SeqCst)
        };
        while idle() && !self.stop.load(Ordering::SeqCst) {
            self.work.wait(&mut guard);
        }
        self.asleep.fetch_sub(1, Ordering::SeqCst);
    }
}
