//! From what nodes own to what they should own, in steps: load, see that the
//! new owners are there, drop. A step is worked out from what is owned now, so
//! that it does not matter how the one before it went.

use super::Problem;

/// What can be done at once, as (node, cell). Loads and drops of a step do not
/// depend on each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Step {
    pub load: Vec<(usize, usize)>,
    pub drop: Vec<(usize, usize)>,
    /// Loads and drops that have to wait.
    pub waiting: usize,
}

impl Step {
    /// Nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.load.is_empty() && self.drop.is_empty() && self.waiting == 0
    }

    /// Something is left, but nothing of it can be done.
    pub fn is_stuck(&self) -> bool {
        self.load.is_empty() && self.drop.is_empty() && self.waiting > 0
    }
}

/// The next step from what the problem's nodes own to `wanted`, per node and cell.
///
/// A cell is dropped only where another node owns it that will go on owning it:
/// once all of its wanted owners have it, or earlier where the room is needed.
pub fn next(problem: &Problem, wanted: &[Vec<bool>]) -> Step {
    let mut step = Step::default();
    let mut needs_room = vec![false; wanted.len()];
    for (node, (about, wanted)) in problem.nodes.iter().zip(wanted).enumerate() {
        let bytes = |cell: usize| problem.bytes[cell];
        let owned = (0..problem.cells()).filter(|&cell| about.owned[cell]);
        let mut used: u64 = owned.map(bytes).sum();
        for cell in (0..problem.cells()).filter(|&cell| wanted[cell] && !about.owned[cell]) {
            if about.capacity.is_none_or(|capacity| used + bytes(cell) <= capacity) {
                used += bytes(cell);
                step.load.push((node, cell));
            } else {
                needs_room[node] = true;
                step.waiting += 1;
            }
        }
    }
    for cell in 0..problem.cells() {
        let owners = || problem.nodes.iter().zip(wanted).enumerate();
        let staying = owners().any(|(_, (node, wanted))| node.owned[cell] && wanted[cell]);
        let settled = owners().all(|(_, (node, wanted))| node.owned[cell] || !wanted[cell]);
        for (node, _) in owners().filter(|(_, (node, want))| node.owned[cell] && !want[cell]) {
            if staying && (settled || needs_room[node]) {
                step.drop.push((node, cell));
            } else {
                step.waiting += 1;
            }
        }
    }
    step
}

/// How many loads and drops there are from here to `wanted`, whether or not they
/// can be done at once.
pub fn left(problem: &Problem, wanted: &[Vec<bool>]) -> (usize, usize) {
    let cells =
        || problem.nodes.iter().zip(wanted).flat_map(|(n, wanted)| n.owned.iter().zip(wanted));
    let differ =
        |before: bool| cells().filter(|(now, then)| **now == before && now != then).count();
    (differ(false), differ(true))
}
