//! The model's experts as the planner sees them: cells, in place of layers and
//! indices as they go over the wire.

use mesh::placement::ExpertGrid;
use proto::v1::LayerExperts;
use proto::{ExpertId, LayerId};

/// What of the model matters for placing it.
#[derive(Clone, Debug)]
pub struct Grid {
    pub experts: ExpertGrid,
    /// Experts that the gate chooses together, neighbours.
    pub group: usize,
    /// Bytes of each cell.
    pub bytes: Vec<u64>,
}

impl Grid {
    /// Which cells a node owns; what the model does not have is left out.
    pub fn owned(&self, layers: &[LayerExperts]) -> Vec<bool> {
        let mut owned = vec![false; self.experts.cells()];
        for LayerExperts { layer, experts } in layers {
            for cell in
                experts.iter().filter_map(|&e| self.experts.cell(LayerId(*layer), ExpertId(e)))
            {
                owned[cell] = true;
            }
        }
        owned
    }

    /// `cells` as they go over the wire.
    pub fn layers(&self, cells: impl IntoIterator<Item = usize>) -> Vec<LayerExperts> {
        let mut layers: Vec<LayerExperts> = Vec::new();
        for cell in cells {
            let (LayerId(layer), ExpertId(expert)) = self.experts.name(cell);
            match layers.iter_mut().find(|known| known.layer == layer) {
                Some(known) => known.experts.push(expert),
                None => layers.push(LayerExperts { layer, experts: vec![expert] }),
            }
        }
        layers
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Layers 1.., whose experts have 10 bytes each, in groups of 2.
    pub fn grid(layers: u32, experts: u32) -> Grid {
        let grid = ExpertGrid { layers: (1..=layers).map(LayerId).collect(), experts };
        Grid { experts: grid, group: 2, bytes: vec![10; (layers * experts) as usize] }
    }

    #[test]
    fn cells_go_over_the_wire_and_back() {
        let grid = grid(2, 3);
        let cell = |layer, expert| grid.experts.cell(LayerId(layer), ExpertId(expert));
        assert_eq!((cell(2, 1), cell(2, 3), cell(9, 0)), (Some(4), None, None));
        let layers = grid.layers([0, 2, 4]);
        assert_eq!(
            layers,
            [
                LayerExperts { layer: 1, experts: vec![0, 2] },
                LayerExperts { layer: 2, experts: vec![1] }
            ]
        );
        assert_eq!(grid.owned(&layers), [true, false, true, false, true, false]);
    }
}
