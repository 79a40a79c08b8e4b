//! A fixed set of threads that share the tasks of one job at a time.
//!
//! Tasks are claimed by one compare-and-swap on a word that holds the job's number and the next task, so a
//! helper that wakes late can claim nothing of a job that is over. A panic in a task reaches whoever called
//! [`Pool::run`]; the pool stays usable. There is no queue: a second job at the same time runs on its caller alone.
//!
//! Who waits stays awake for a while, as the next job or the last task usually follows soon and waking a CPU that
//! has gone to rest takes as long as many a job. It does so by yielding: where processes share CPUs, a thread with
//! work has the CPU at once, and where they do not, a yield is a short system call.
//!
//! Threads may be bound to CPUs, one each. Where more threads than CPUs take turns at work, the system otherwise
//! wakes a helper on the CPU of the very thread that it is to help, and leaves it there while another CPU rests.

use parking_lot::{Condvar, Mutex};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::any::Any;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a helper stays awake after a job, and the caller for the last task: longer than a layer's trip to other
/// processes, which takes 6 ms where 16 rows read most of a layer's experts, and too short to matter to an idle
/// machine.
const AWAKE: Duration = Duration::from_millis(10);
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
    awake: Duration,
}

/// Threads that run the tasks of one job at a time, beside the caller.
pub struct Pool {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// Where the caller of [`Pool::run`] is to be, if the threads are bound.
    cpu: Option<CpuSet>,
}

impl Pool {
    /// A pool of `threads` threads, of which the caller of [`Pool::run`] is one. If the system gives fewer,
    /// [`Pool::threads`] says how many there are.
    pub fn new(threads: usize) -> Pool {
        Pool::build(threads, AWAKE, None)
    }

    /// [`Pool::new`], with threads that stay awake for `awake` where they wait.
    pub fn with_awake(threads: usize, awake: Duration) -> Pool {
        Pool::build(threads, awake, None)
    }

    /// [`Pool::new`], with helpers bound to one CPU each: of those that this process may use, to the ones that follow
    /// the `first`, which is the caller's (see [`Pool::bind_caller`]). After the last comes the first again.
    pub fn bound(threads: usize, first: usize) -> Pool {
        Pool::build(threads, AWAKE, Some(first))
    }

    fn build(threads: usize, awake: Duration, first: Option<usize>) -> Pool {
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
            awake,
        });
        let cpus = first.map(|first| (first, usable_cpus()));
        let cpu_of = |thread: usize| {
            let (first, cpus) = cpus.as_ref()?;
            let mut set = CpuSet::new();
            set.set(*cpus.get((first + thread) % cpus.len().max(1))?);
            Some(set)
        };
        let helpers = (1..threads)
            .map_while(|i| {
                let (shared, cpu) = (shared.clone(), cpu_of(i));
                let name = format!("kernel-{i}");
                let helper = move || {
                    bind(cpu.as_ref());
                    shared.help();
                };
                thread::Builder::new().name(name).spawn(helper).ok()
            })
            .collect();
        Pool { shared, helpers, cpu: cpu_of(0) }
    }

    /// Binds the calling thread, which is to call [`Pool::run`] from now on, to its CPU; nothing if the pool's threads
    /// are not bound. What threads it starts afterwards is bound like it.
    pub fn bind_caller(&self) {
        bind(self.cpu.as_ref());
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

/// CPUs that this process may use.
fn usable_cpus() -> Vec<usize> {
    let usable = sched_getaffinity(None).unwrap_or_default();
    (0..CpuSet::MAX_CPU).filter(|&cpu| usable.is_set(cpu)).collect()
}

/// Binds the calling thread. Where the system refuses it stays free, which is slower and no less right.
fn bind(cpu: Option<&CpuSet>) {
    if let Some(cpu) = cpu {
        let _ = sched_setaffinity(None, cpu);
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
            if start.elapsed() < self.awake {
                thread::yield_now();
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
            } else if idle.elapsed() < self.awake {
                thread::yield_now();
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
