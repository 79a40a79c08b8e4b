//! An engine that is measured: how it is asked, and its processes, which are
//! stopped while the other one is measured.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::bench::load::{Length, Shape, Target};
use crate::bench::procs::Process;

/// Requests before a sample: what slept wakes, and links that timed out come back.
const WARM: Shape = Shape { prompt: Length::exactly(16), answer: Length::exactly(8) };
const TRIES: usize = 20;
const PAUSE: Duration = Duration::from_millis(250);

/// An engine and its processes.
#[derive(Debug)]
pub struct Engine {
    pub name: String,
    pub target: Arc<Target>,
    pub processes: Vec<Process>,
}

impl Engine {
    pub fn new(name: &str, target: Target, processes: Vec<Process>) -> Self {
        Self { name: name.to_owned(), target: Arc::new(target), processes }
    }

    /// Stops its processes where they are.
    pub fn pause(&self) {
        self.send(Signal::STOP);
    }

    /// Lets them go on, and waits until an answer comes.
    pub async fn resume(&self) -> anyhow::Result<()> {
        self.send(Signal::CONT);
        let mut tries = 0;
        loop {
            // Number 0 is the same each time: a prefix that a cache may keep.
            match self.target.ask(0, WARM).await {
                Ok(_) => return Ok(()),
                Err(error) if tries == TRIES => return Err(error).context("it does not answer"),
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
            tries += 1;
        }
    }

    fn send(&self, signal: Signal) {
        for process in &self.processes {
            if let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) {
                // Fails only when it is gone, which the next request notices.
                let _ = kill_process(pid, signal);
            }
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // What is stopped cannot end.
        self.send(Signal::CONT);
    }
}

/// Binds every thread of this process to `cpus`, and with them the processes that
/// they start.
pub fn pin(cpus: &[usize]) -> anyhow::Result<()> {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        anyhow::ensure!(cpu < CpuSet::MAX_CPU, "no CPU has the number {cpu}");
        set.set(cpu);
    }
    for entry in std::fs::read_dir("/proc/self/task")?.flatten() {
        let thread = entry.file_name().to_str().and_then(|name| name.parse().ok());
        sched_setaffinity(thread.and_then(Pid::from_raw), &set)?;
    }
    Ok(())
}
