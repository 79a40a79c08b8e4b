//! An ownership in the making, with what has to be known of it at every move:
//! owners per cell, bytes and weight per node, and who has whose neighbours.

use super::Problem;

/// The weight of an expert that works as much as the mean of its layer.
const MEAN: u64 = 1024;
/// What an expert weighs that does not work at all: it takes memory, and load changes.
const IDLE: u64 = 256;
/// Nodes may differ by this part of a node's fair share before anything moves.
const TOLERANCE: u64 = 16;

pub(super) struct Draft<'a> {
    pub problem: &'a Problem,
    /// Owners that every cell should have.
    pub want: usize,
    /// Nodes that may own something.
    pub eligible: Vec<usize>,
    /// Per cell, its weight.
    pub weight: Vec<u64>,
    owned: Vec<Vec<bool>>,
    /// Per cell.
    owners: Vec<usize>,
    /// How many cells have so many owners.
    with_owners: Vec<usize>,
    /// Per node: bytes of what it owns in the draft.
    kept: Vec<u64>,
    /// Per node: bytes of what it owns now or in the draft.
    union: Vec<u64>,
    /// Per node and layer.
    weights: Vec<Vec<u64>>,
    /// Per node, layer and group: experts of it.
    mates: Vec<Vec<u32>>,
    groups: usize,
}

impl<'a> Draft<'a> {
    /// What there is, less what draining nodes own.
    pub fn new(problem: &'a Problem) -> Self {
        let (layers, experts) = (problem.grid.layers.len(), problem.grid.experts as usize);
        let (cells, nodes) = (problem.cells(), problem.nodes.len());
        let groups = experts.div_ceil(problem.group.max(1));
        let bytes = |owned: &[bool]| -> u64 {
            owned.iter().zip(&problem.bytes).map(|(&owned, bytes)| u64::from(owned) * bytes).sum()
        };
        let mut draft = Self {
            problem,
            want: problem.owners_wanted(),
            eligible: (0..nodes).filter(|&node| !problem.nodes[node].draining).collect(),
            weight: problem.load.chunks(experts.max(1)).flat_map(weights).collect(),
            owned: vec![vec![false; cells]; nodes],
            owners: vec![0; cells],
            with_owners: std::iter::once(cells).chain(vec![0; nodes]).collect(),
            kept: vec![0; nodes],
            union: problem.nodes.iter().map(|node| bytes(&node.owned)).collect(),
            weights: vec![vec![0; layers]; nodes],
            mates: vec![vec![0; layers * groups]; nodes],
            groups,
        };
        for node in draft.eligible.clone() {
            for cell in (0..cells).filter(|&cell| problem.nodes[node].owned[cell]) {
                draft.give(node, cell);
            }
        }
        draft
    }

    pub fn into_owned(self) -> Vec<Vec<bool>> {
        self.owned
    }

    pub fn owns(&self, node: usize, cell: usize) -> bool {
        self.owned[node][cell]
    }

    pub fn owners(&self, cell: usize) -> usize {
        self.owners[cell]
    }

    pub fn layer(&self, cell: usize) -> usize {
        cell / self.problem.grid.experts as usize
    }

    /// Cells of a layer.
    pub fn cells_of(&self, layer: usize) -> std::ops::Range<usize> {
        let experts = self.problem.grid.experts as usize;
        layer * experts..(layer + 1) * experts
    }

    /// What the node's experts of that layer weigh.
    pub fn weight_of(&self, node: usize, layer: usize) -> u64 {
        self.weights[node][layer]
    }

    /// How many experts of the cell's group the node owns, the cell's own included.
    pub fn mates(&self, node: usize, cell: usize) -> u32 {
        self.mates[node][self.group(cell)]
    }

    fn group(&self, cell: usize) -> usize {
        let expert = cell % self.problem.grid.experts as usize;
        self.layer(cell) * self.groups + expert / self.problem.group.max(1)
    }

    pub fn give(&mut self, node: usize, cell: usize) {
        let (layer, group, bytes) = (self.layer(cell), self.group(cell), self.problem.bytes[cell]);
        self.owned[node][cell] = true;
        self.count(cell, self.owners[cell] + 1);
        self.kept[node] += bytes;
        self.weights[node][layer] += self.weight[cell];
        self.mates[node][group] += 1;
        if !self.problem.nodes[node].owned[cell] {
            self.union[node] += bytes;
        }
    }

    pub fn take(&mut self, node: usize, cell: usize) {
        let (layer, group, bytes) = (self.layer(cell), self.group(cell), self.problem.bytes[cell]);
        self.owned[node][cell] = false;
        self.count(cell, self.owners[cell] - 1);
        self.kept[node] -= bytes;
        self.weights[node][layer] -= self.weight[cell];
        self.mates[node][group] -= 1;
        if !self.problem.nodes[node].owned[cell] {
            self.union[node] -= bytes;
        }
    }

    fn count(&mut self, cell: usize, owners: usize) {
        self.with_owners[self.owners[cell]] -= 1;
        self.with_owners[owners] += 1;
        self.owners[cell] = owners;
    }

    /// Some cell has at least so many owners.
    pub fn any_with(&self, owners: usize) -> bool {
        self.with_owners.iter().skip(owners).any(|&cells| cells > 0)
    }

    /// The node has room for the cell once it has given up what it no longer owns.
    pub fn fits(&self, node: usize, cell: usize) -> bool {
        within(self.problem, node, self.kept[node] + self.problem.bytes[cell])
    }

    /// The node has room for the cell beside all that it owns now.
    pub fn fits_now(&self, node: usize, cell: usize) -> bool {
        // What it owns already takes no further room.
        let more = match self.problem.nodes[node].owned[cell] {
            true => 0,
            false => self.problem.bytes[cell],
        };
        within(self.problem, node, self.union[node] + more)
    }

    /// The node would have room for `cell` without `instead`.
    pub fn fits_instead(&self, node: usize, cell: usize, instead: usize) -> bool {
        let bytes = &self.problem.bytes;
        within(self.problem, node, self.kept[node] - bytes[instead] + bytes[cell])
    }

    /// What a node's experts of a layer weigh when all nodes have the same.
    pub fn fair(&self, layer: usize) -> u64 {
        let all: u64 = self.weight[self.cells_of(layer)].iter().sum();
        (all * self.want as u64).div_ceil(self.eligible.len().max(1) as u64)
    }

    pub fn tolerance(&self, layer: usize) -> u64 {
        self.fair(layer) / TOLERANCE
    }
}

fn within(problem: &Problem, node: usize, bytes: u64) -> bool {
    problem.nodes[node].capacity.is_none_or(|capacity| bytes <= capacity)
}

/// Weights of one layer's experts, from the rows that they computed.
fn weights(load: &[u64]) -> Vec<u64> {
    let sum: u128 = load.iter().map(|&rows| u128::from(rows)).sum();
    if sum == 0 {
        return vec![MEAN; load.len()];
    }
    let weight = |&rows: &u64| {
        let part = u128::from(MEAN - IDLE) * u128::from(rows) * load.len() as u128 / sum;
        // At most the layer's experts times the mean.
        IDLE + part as u64
    };
    load.iter().map(weight).collect()
}
