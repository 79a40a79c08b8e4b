//! How much each expert works, from the counters that nodes keep. A counter
//! begins anew with its node and with its expert's arrival there, so only what
//! it grew by is added up; what is older counts less.

use std::collections::HashMap;

use proto::v1::ExpertLoad;
use proto::{ExpertId, LayerId};

use super::grid::Grid;

/// Of what was known before, this much is kept whenever something new is learned.
const KEEP: (u64, u64) = (7, 8);

#[derive(Default)]
pub struct Tally {
    rows: Vec<u64>,
    /// By node's endpoint: its incarnation, and its counters when last looked at.
    last: HashMap<String, (u64, Vec<u64>)>,
}

/// What one node counted.
pub struct Counted {
    pub endpoint: String,
    pub incarnation: u64,
    pub loads: Vec<ExpertLoad>,
}

impl Tally {
    /// Rows of every cell lately.
    pub fn rows(&self, grid: &Grid) -> Vec<u64> {
        let mut rows = self.rows.clone();
        rows.resize(grid.experts.cells(), 0);
        rows
    }

    /// Takes what all nodes counted until now.
    pub fn take(&mut self, counted: Vec<Counted>, grid: &Grid) {
        let mut grown = vec![0; grid.experts.cells()];
        let mut last = HashMap::new();
        for Counted { endpoint, incarnation, loads } in counted {
            let mut now = vec![0; grid.experts.cells()];
            for ExpertLoad { layer, expert, rows } in loads {
                if let Some(cell) = grid.experts.cell(LayerId(layer), ExpertId(expert)) {
                    now[cell] = rows;
                }
            }
            // At first sight of a node, what it counted before is not lately.
            if let Some((life, before)) = self.last.get(&endpoint)
                && *life == incarnation
            {
                for ((grown, now), before) in grown.iter_mut().zip(&now).zip(before) {
                    *grown += now.checked_sub(*before).unwrap_or(*now);
                }
            }
            last.insert(endpoint, (incarnation, now));
        }
        self.last = last;
        self.rows.resize(grid.experts.cells(), 0);
        // While nothing works, what is known stays as it is.
        if grown.iter().any(|&rows| rows > 0) {
            for (rows, grown) in self.rows.iter_mut().zip(grown) {
                *rows = *rows * KEEP.0 / KEEP.1 + grown;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::grid::tests::grid;

    fn counted(incarnation: u64, rows: &[u64]) -> Vec<Counted> {
        let load =
            |(expert, &rows): (usize, &u64)| ExpertLoad { layer: 1, expert: expert as u32, rows };
        let loads = rows.iter().enumerate().map(load).collect();
        vec![Counted { endpoint: "a".to_owned(), incarnation, loads }]
    }

    #[test]
    fn only_growth_counts_and_the_past_fades() {
        let grid = grid(1, 2);
        let mut tally = Tally::default();
        tally.take(counted(1, &[1000, 5]), &grid);
        assert_eq!(tally.rows(&grid), [0, 0], "what was before is not lately");
        tally.take(counted(1, &[1080, 5]), &grid);
        assert_eq!(tally.rows(&grid), [80, 0]);
        tally.take(counted(1, &[1080, 13]), &grid);
        assert_eq!(tally.rows(&grid), [70, 8]);
        tally.take(counted(1, &[1080, 13]), &grid);
        assert_eq!(tally.rows(&grid), [70, 8], "idle");
        tally.take(counted(2, &[7, 7]), &grid);
        tally.take(counted(2, &[7, 3]), &grid);
        assert_eq!(tally.rows(&grid), [61, 10], "dropped and loaded again meanwhile");
    }
}
