//! Which CPUs the two processes of a measurement are on. Left to the system they
//! are on one now and on two then, which is a factor of ten for small messages.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// See the module's text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cores {
    /// One each, as where a node has CPUs of its own: whoever sleeps has to be woken.
    Apart,
    /// The same one for both: nothing runs beside the other, no CPU has to be woken.
    Together,
    /// As the system likes.
    Any,
}

impl Cores {
    /// The placements that this process's CPUs allow.
    pub fn all() -> anyhow::Result<Vec<Self>> {
        Ok(match allowed()?.len() {
            1 => vec![Self::Together],
            _ => vec![Self::Apart, Self::Together],
        })
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Apart => "two",
            Self::Together => "one",
            Self::Any => "any",
        }
    }

    /// Puts the calling thread where it measures.
    pub fn take_ours(self) -> anyhow::Result<()> {
        let first = |cpus: &[usize]| cpus.first().copied();
        self.take(first)
    }

    /// Puts the calling thread where the other process is to start.
    pub fn take_theirs(self) -> anyhow::Result<()> {
        self.take(|cpus| if self == Self::Apart { cpus.last() } else { cpus.first() }.copied())
    }

    fn take(self, pick: impl Fn(&[usize]) -> Option<usize>) -> anyhow::Result<()> {
        if self != Self::Any
            && let Some(cpu) = pick(&allowed()?)
        {
            let mut set = CpuSet::new();
            set.set(cpu);
            sched_setaffinity(None, &set)?;
        }
        Ok(())
    }
}

/// The CPUs of this process's first thread, which is never moved here.
fn allowed() -> anyhow::Result<Vec<usize>> {
    let set = sched_getaffinity(Some(rustix::process::getpid()))?;
    Ok((0..CpuSet::MAX_CPU).filter(|&cpu| set.is_set(cpu)).collect())
}
