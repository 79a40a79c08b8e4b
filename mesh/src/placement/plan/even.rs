//! Evening out, layer by layer, as a step waits for every layer's slowest node:
//! one expert at a time goes from a node with more to do to one with less, as
//! long as that makes their difference smaller by more than the tolerance.

use super::draft::Draft;

/// Moves that make things better by less than this part of the best are as good.
const GRADES: u128 = 8;

impl Draft<'_> {
    /// True if it moved anything.
    pub fn even_out(&mut self) -> bool {
        // A move in one layer may make room for one in another.
        let moved = self.even_out_once();
        while moved && self.even_out_once() {}
        moved
    }

    fn even_out_once(&mut self) -> bool {
        let mut moved = false;
        for layer in 0..self.problem.grid.layers.len() {
            // Every move lowers the sum of the squared weights, so this ends.
            while let Some((from, to, cell)) = self.best_move(layer) {
                self.take(from, cell);
                self.give(to, cell);
                moved = true;
            }
        }
        moved
    }

    /// A move from the heaviest node that can give to the lightest that can take.
    fn best_move(&self, layer: usize) -> Option<(usize, usize, usize)> {
        let mut nodes = self.eligible.clone();
        nodes.sort_by_key(|&node| (self.weight_of(node, layer), node));
        for &from in nodes.iter().rev() {
            for &to in &nodes {
                let (heavy, light) = (self.weight_of(from, layer), self.weight_of(to, layer));
                let Some(gap) = heavy.checked_sub(light + self.tolerance(layer)) else { break };
                if let Some(cell) = self.best_cell(layer, from, to, gap) {
                    return Some((from, to, cell));
                }
            }
        }
        None
    }

    /// The expert whose move evens the two out best; among those about as good
    /// the one with most of its group there and least of it here.
    fn best_cell(&self, layer: usize, from: usize, to: usize, gap: u64) -> Option<usize> {
        let movable = self.cells_of(layer).filter(|&cell| {
            let light_enough = self.weight[cell] < gap;
            light_enough && self.owns(from, cell) && !self.owns(to, cell) && self.fits(to, cell)
        });
        movable.min_by_key(|&cell| {
            let weight = u128::from(self.weight[cell]);
            let gap = u128::from(gap);
            // At most 1, where the weight is half the gap.
            let gain = 4 * weight * (gap - weight) * GRADES / (gap * gap);
            let together = i64::from(self.mates(to, cell)) - i64::from(self.mates(from, cell));
            (std::cmp::Reverse(gain), -together, cell)
        })
    }
}
