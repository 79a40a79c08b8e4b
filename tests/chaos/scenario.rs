//! What a scenario is: a mesh, a load, faults and when they happen, and what
//! must hold of the run. `run` carries it out.

use std::time::Duration;

use crate::support::faultproxy::{Direction, Faults, Once};
use crate::support::netns::Harm;
use crate::support::sandbox::Plan;

/// See the module's text.
pub struct Scenario {
    /// The row of docs/reliability.md.
    pub id: &'static str,
    pub title: &'static str,
    pub mesh: Plan,
    pub load: Load,
    pub faults: Faulting,
    pub checks: Vec<Check>,
}

/// Clients, each with one stream at a time.
#[derive(Clone, Copy)]
pub struct Load {
    pub streams: usize,
    /// Tokens of a stream.
    pub tokens: usize,
    pub time: Duration,
}

/// Faults one after the other; each is healed before the next.
pub struct Faulting {
    pub when: When,
    pub what: Vec<Fault>,
}

pub enum When {
    /// So often, the kinds in turn.
    Every(Duration),
    /// When the first client's stream has had so many events, one fault each.
    Event(Vec<usize>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Node,
    Router,
    Gateway,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// By the run's seed.
    Random,
    /// The router that runs the most sequences.
    Busiest,
    /// One after the other.
    Next,
}

#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// `kill -9`, and a new process after `down`.
    Kill { role: Role, which: Which, down: Duration },
    /// SIGSTOP, and SIGCONT after `hold`.
    Stop { role: Role, which: Which, hold: Duration },
    /// SIGTERM, which must drain and end with 0, and a new process.
    Restart { role: Role, which: Which },
    /// What the proxy before a node does for `hold`.
    Network { faults: Faults, hold: Duration },
    /// What the network between the router and one node, or all, does for `hold`.
    Wire { harm: Harm, all: bool, hold: Duration },
    /// As `Network`, before several nodes: clogged one by one, freed in another order.
    Swizzle { hold: Duration },
    /// The connection to a node is reset, or a bit flipped, so many bytes on.
    Harm { direction: Direction, after: u64, what: Once },
    /// etcd answers nobody for `hold`; or it is gone meanwhile, and comes back with its keys.
    Etcd { gone: bool, hold: Duration },
    /// Every process gets a new certificate, and uses it.
    Rotate,
    /// A node gets only so many percent of a CPU for `hold`.
    Slow { percent: u32, hold: Duration },
}

#[derive(Clone, Copy, Debug)]
pub enum Check {
    /// No stream is cut or refused.
    NoneFailed,
    /// Every stream said what the undisturbed one said.
    Identical,
    /// At least so many requests were answered.
    Answered(usize),
    /// At least one frame was sent again.
    Retried,
    /// At least one stream went on, on another router.
    Resumed,
    /// At least so many streams to nodes were ended by a wrong checksum.
    Noticed(usize),
    /// Frames sent, to those that had to be.
    Amplification(f64),
    /// The longest time between two events of a stream.
    Gap(Duration),
    /// From a fault to a mesh that is whole again.
    Recovery(Duration),
    /// The routers' event logs hold what `history` demands.
    History,
}

/// Checks of times: only by hand, on a quiet machine.
pub fn bars(checks: impl IntoIterator<Item = Check>) -> Vec<Check> {
    checks.into_iter().filter(|_| is_long()).collect()
}

/// `short` in continuous integration. By hand, `MOEMESH_CHAOS_LONG=1` takes
/// `long` seconds, and `MOEMESH_CHAOS_SECONDS` any other number.
pub fn seconds(short: u64, long: u64) -> Duration {
    let given = std::env::var("MOEMESH_CHAOS_SECONDS").ok().and_then(|text| text.parse().ok());
    Duration::from_secs(given.unwrap_or(if is_long() { long } else { short }))
}

/// `short` or, by hand, `long` of something.
pub fn count(short: usize, long: usize) -> usize {
    if is_long() { long } else { short }
}

pub fn is_long() -> bool {
    let set = |name| std::env::var(name).is_ok_and(|value| !value.is_empty() && value != "0");
    set("MOEMESH_CHAOS_LONG") || set("MOEMESH_CHAOS_SECONDS")
}

/// Says so where a scenario is left out of the short form.
pub fn skipped(id: &str) -> bool {
    if !is_long() {
        println!("{id} skipped: MOEMESH_CHAOS_LONG=1 runs it");
    }
    !is_long()
}

/// The run's seed: `MOEMESH_CHAOS_SEED`, or one that is printed with the run.
pub fn seed() -> u64 {
    let given = std::env::var("MOEMESH_CHAOS_SEED").ok().and_then(|text| text.parse().ok());
    given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        u64::from(now.unwrap().subsec_nanos())
    })
}
