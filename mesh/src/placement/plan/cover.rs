//! Owners for every expert: the first owner of all before the second of any,
//! where there is room, near the experts of the same group.

use std::cmp::Reverse;

use super::draft::Draft;

impl Draft<'_> {
    /// Gives up owners beyond those wanted: those of the nodes with most to do.
    pub fn trim(&mut self) {
        for cell in 0..self.problem.cells() {
            let layer = self.layer(cell);
            while self.owners(cell) > self.want {
                let owners = self.eligible.iter().copied().filter(|&node| self.owns(node, cell));
                let key = |&node: &usize| {
                    (self.weight_of(node, layer), Reverse(self.mates(node, cell)), node)
                };
                let Some(node) = owners.max_by_key(key) else { break };
                self.take(node, cell);
            }
        }
    }

    /// Finds owners where some are lacking; true if it found any.
    pub fn cover(&mut self) -> bool {
        // A later owner may take room that lets an earlier one be evicted for.
        // Each time there are more owners, or they are spread more evenly.
        let found = self.cover_once();
        while found && self.cover_once() {}
        found
    }

    fn cover_once(&mut self) -> bool {
        let mut found = false;
        for owners in 1..=self.want {
            for cell in 0..self.problem.cells() {
                while self.owners(cell) < owners && self.add_owner(cell) {
                    found = true;
                }
            }
        }
        found
    }

    /// The cells that lack owners.
    pub fn short(&self) -> Vec<usize> {
        let want = self.want.max(1);
        (0..self.problem.cells()).filter(|&cell| self.owners(cell) < want).collect()
    }

    /// One more owner for the cell; false if there is no room for it anywhere.
    fn add_owner(&mut self, cell: usize) -> bool {
        let found = self
            .choose(cell, |draft, node| draft.fits_now(node, cell))
            .or_else(|| self.choose(cell, |draft, node| draft.fits(node, cell)));
        match found {
            Some(node) => {
                self.give(node, cell);
                true
            }
            None => self.shift_for(cell) || self.evict_for(cell),
        }
    }

    /// Of the nodes that may own the cell, one that has its neighbours and less
    /// than its fair share; or else the one that has least to do.
    fn choose(&self, cell: usize, has_room: impl Fn(&Self, usize) -> bool) -> Option<usize> {
        let layer = self.layer(cell);
        let most = self.fair(layer) + self.tolerance(layer);
        let candidates =
            self.eligible.iter().copied().filter(|&n| !self.owns(n, cell) && has_room(self, n));
        candidates.min_by_key(|&node| {
            let weight = self.weight_of(node, layer);
            let mates = match weight + self.weight[cell] <= most {
                true => Some(self.mates(node, cell)),
                false => None,
            };
            (Reverse(mates), weight, node)
        })
    }

    /// Makes room on a full node by moving one of its experts to a node that has
    /// room, but owns the cell already.
    fn shift_for(&mut self, cell: usize) -> bool {
        let roomy: Vec<usize> =
            self.eligible.iter().copied().filter(|&node| self.fits(node, cell)).collect();
        for &full in self.eligible.iter().filter(|&&node| !self.owns(node, cell)) {
            for &roomy in &roomy {
                let moves = |&other: &usize| {
                    self.owns(full, other)
                        && !self.owns(roomy, other)
                        && self.fits(roomy, other)
                        && self.fits_instead(full, cell, other)
                };
                if let Some(other) = (0..self.problem.cells()).find(moves) {
                    self.take(full, other);
                    self.give(roomy, other);
                    self.give(full, cell);
                    return true;
                }
            }
        }
        false
    }

    /// Gives up an owner of an expert that has at least two more than this one.
    fn evict_for(&mut self, cell: usize) -> bool {
        let owners = self.owners(cell);
        if !self.any_with(owners + 2) {
            return false;
        }
        for &node in self.eligible.iter().filter(|&&node| !self.owns(node, cell)) {
            let spare = |&other: &usize| {
                self.owns(node, other)
                    && self.owners(other) >= owners + 2
                    && self.fits_instead(node, cell, other)
            };
            if let Some(other) = (0..self.problem.cells()).find(spare) {
                self.take(node, other);
                self.give(node, cell);
                return true;
            }
        }
        false
    }
}
