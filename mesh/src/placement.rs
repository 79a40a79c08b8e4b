//! Which live node owns which expert. The table is an immutable snapshot: the
//! fleet publishes a new one, with a higher epoch, whenever ownership changes,
//! and the hot path reads whichever it was given.

pub mod plan;

use proto::{Epoch, ExpertId, LayerId};

/// Index of a node in the router's list of endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeIndex(pub u16);

/// The layers that have routed experts, and how many each has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpertGrid {
    pub layers: Vec<LayerId>,
    pub experts: u32,
}

impl ExpertGrid {
    /// How many experts there are, over all layers.
    pub fn cells(&self) -> usize {
        self.layers.len() * self.experts as usize
    }

    /// Where an expert stands in a list of all, by layer and index; `None` if the
    /// model does not have it.
    pub fn cell(&self, layer: LayerId, expert: ExpertId) -> Option<usize> {
        let row = self.layers.binary_search(&layer).ok()?;
        (expert.0 < self.experts).then(|| row * self.experts as usize + expert.0 as usize)
    }

    /// The expert that stands there.
    pub fn name(&self, cell: usize) -> (LayerId, ExpertId) {
        let experts = self.experts as usize;
        (self.layers[cell / experts], ExpertId((cell % experts) as u32))
    }
}

/// Owners of every expert under one epoch.
#[derive(Clone, Debug)]
pub struct Placement {
    epoch: Epoch,
    grid: ExpertGrid,
    /// layers × experts lists of live owners, in node order.
    owners: Vec<Vec<NodeIndex>>,
}

impl Placement {
    /// Nobody owns anything, at epoch 0.
    pub fn empty(grid: ExpertGrid) -> Self {
        let owners = vec![Vec::new(); grid.cells()];
        Self { epoch: Epoch(0), grid, owners }
    }

    /// The table that follows `self`: `owned` lists, per live node, what it owns.
    /// Experts outside the grid are ignored; they belong to no layer we route.
    pub fn next<'a>(
        &self,
        owned: impl IntoIterator<Item = (NodeIndex, LayerId, &'a [u32])>,
    ) -> Self {
        let mut next = Self::empty(self.grid.clone());
        next.epoch = Epoch(self.epoch.0 + 1);
        for (node, layer, experts) in owned {
            for &expert in experts {
                if let Some(cell) = next.grid.cell(layer, ExpertId(expert)) {
                    next.owners[cell].push(node);
                }
            }
        }
        for owners in &mut next.owners {
            owners.sort_unstable();
            owners.dedup();
        }
        next
    }

    pub fn epoch(&self) -> Epoch {
        self.epoch
    }

    /// Both tables name the same owners, under whatever epochs.
    pub fn same_owners(&self, other: &Self) -> bool {
        self.owners == other.owners
    }

    /// Live owners of an expert, in node order; empty when it has none.
    pub fn owners(&self, layer: LayerId, expert: ExpertId) -> &[NodeIndex] {
        self.grid.cell(layer, expert).map_or(&[], |cell| &self.owners[cell])
    }

    /// How many experts there are, over all layers.
    pub fn experts(&self) -> usize {
        self.owners.len()
    }

    /// How many experts have `node` as their only live owner.
    pub fn owned_only_by(&self, node: NodeIndex) -> usize {
        self.owners.iter().filter(|owners| owners.as_slice() == [node]).count()
    }

    /// Every expert with its live owners, by layer and index.
    pub fn cells(&self) -> impl Iterator<Item = (LayerId, ExpertId, &[NodeIndex])> {
        let named =
            self.owners.iter().enumerate().map(|(cell, owners)| (self.grid.name(cell), owners));
        named.map(|((layer, expert), owners)| (layer, expert, owners.as_slice()))
    }

    /// How many experts have no live owner, and the first of them.
    pub fn missing(&self) -> Option<(usize, LayerId, ExpertId)> {
        let missing = self.owners.iter().filter(|owners| owners.is_empty()).count();
        let first = self.owners.iter().position(Vec::is_empty)?;
        let (layer, expert) = self.grid.name(first);
        Some((missing, layer, expert))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_follows_what_live_nodes_own() {
        let grid = ExpertGrid { layers: vec![LayerId(1), LayerId(2)], experts: 3 };
        let empty = Placement::empty(grid);
        assert_eq!(empty.missing(), Some((6, LayerId(1), ExpertId(0))));

        let both = empty.next([
            (NodeIndex(1), LayerId(1), &[0, 1, 2][..]),
            (NodeIndex(0), LayerId(1), &[2, 9]),
            (NodeIndex(0), LayerId(2), &[0, 1, 2]),
            (NodeIndex(0), LayerId(7), &[0]),
        ]);
        assert_eq!(both.epoch(), Epoch(1));
        assert_eq!(both.missing(), None);
        assert_eq!(both.owners(LayerId(1), ExpertId(2)), [NodeIndex(0), NodeIndex(1)]);
        assert_eq!(both.owners(LayerId(7), ExpertId(0)), []);

        assert_eq!((both.experts(), both.owned_only_by(NodeIndex(0))), (6, 3));

        let one = both.next([(NodeIndex(1), LayerId(1), &[0, 1, 2][..])]);
        assert_eq!(one.missing(), Some((3, LayerId(2), ExpertId(0))));
    }
}
