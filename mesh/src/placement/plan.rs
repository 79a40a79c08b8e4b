//! Who should own what: pure functions from what is to what should be. What is
//! wanted of a plan stands in `README.md` beside this file, with the tests that
//! hold it. Rooms: `draft` keeps the books, `cover` finds owners, `even` balances,
//! [`steps`] goes from one ownership to another without losing an owner.

mod cover;
mod draft;
mod even;
pub mod steps;
#[cfg(test)]
mod tests;

use crate::placement::ExpertGrid;
use draft::Draft;

/// What is to be placed, and on what. A cell is an expert of a layer:
/// row of the layer in the grid × experts + expert.
#[derive(Clone, Debug)]
pub struct Problem {
    pub grid: ExpertGrid,
    /// Experts that the gate chooses together: this many neighbours.
    pub group: usize,
    /// Owners wanted of every expert.
    pub replicas: usize,
    /// Bytes of each cell.
    pub bytes: Vec<u64>,
    /// Rows that each cell computed lately; all 0 where nothing is known.
    pub load: Vec<u64>,
    /// In an order that is the same for the same nodes, by their names.
    pub nodes: Vec<Node>,
}

/// One live node.
#[derive(Clone, Debug)]
pub struct Node {
    /// Bytes that it may hold; `None` is no bound.
    pub capacity: Option<u64>,
    /// It is to own nothing in the end.
    pub draining: bool,
    /// Per cell, whether it owns it now.
    pub owned: Vec<bool>,
}

/// How much is to be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Aim {
    /// Owners for what lacks them; nothing else moves.
    Cover,
    /// Surplus owners given up, and nodes evened out, too.
    Balance,
}

/// What should be owned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Per node of the problem and cell.
    pub owned: Vec<Vec<bool>>,
    /// Cells with fewer owners than wanted, because no node has room.
    pub short: Vec<usize>,
}

/// Ownership that has what is wanted of it, from the one there is.
pub fn plan(problem: &Problem, aim: Aim) -> Plan {
    let mut draft = Draft::new(problem);
    if aim == Aim::Balance {
        draft.trim();
    }
    draft.cover();
    // Evening out may make room for what had none, which may have to be evened out.
    while aim == Aim::Balance && draft.even_out() && draft.cover() {}
    Plan { short: draft.short(), owned: draft.into_owned() }
}

impl Problem {
    /// How many cells there are.
    pub fn cells(&self) -> usize {
        self.grid.cells()
    }

    /// Owners that each expert can have: what is wanted, or all nodes.
    pub fn owners_wanted(&self) -> usize {
        self.replicas.max(1).min(self.nodes.iter().filter(|node| !node.draining).count())
    }
}

/// What node `index` of `nodes` owns of a layer's `experts`, ascending; with no
/// nodes to share with, nothing.
///
/// The experts are cut into `nodes` contiguous shares; a node owns its own
/// share and those of the `replicas - 1` nodes before it, so that losing one
/// node leaves every expert with the others.
pub fn shard(index: u16, nodes: u16, replicas: u16, experts: u32) -> Vec<u32> {
    if nodes == 0 {
        return Vec::new();
    }
    let nodes = u64::from(nodes);
    let replicas = u64::from(replicas).clamp(1, nodes);
    let mut owned = Vec::new();
    for back in 0..replicas {
        let share = (u64::from(index) + nodes - back) % nodes;
        let bound = |share: u64| (share * u64::from(experts) / nodes) as u32;
        owned.extend(bound(share)..bound(share + 1));
    }
    owned.sort_unstable();
    owned
}
