//! From whom nodes that have not all weight files fetch what they are to load.

use std::collections::BTreeMap;

use proto::v1::{LayerExperts, Source};

use super::{Orders, Seen};
use crate::controller::grid::Grid;

/// For each such node the owners of what `orders` has it load. Owners take turns, by expert and from
/// plan to plan, so that one that fails is not asked for ever.
pub fn of(grid: &Grid, nodes: &[Seen], orders: &Orders) -> BTreeMap<String, Vec<Source>> {
    let partial = |name: &str| nodes.iter().any(|node| node.endpoint == name && node.partial);
    let sources = |layers: &[LayerExperts]| {
        let mut from = vec![Vec::new(); nodes.len()];
        for (cell, _) in grid.owned(layers).into_iter().enumerate().filter(|(_, wanted)| *wanted) {
            let owners: Vec<usize> = (0..nodes.len()).filter(|&at| nodes[at].owned[cell]).collect();
            if !owners.is_empty() {
                let turn = (cell as u64).wrapping_add(orders.order.epoch) % owners.len() as u64;
                from[owners[turn as usize]].push(cell);
            }
        }
        let source = |(node, cells): (&Seen, Vec<usize>)| Source {
            endpoint: node.endpoint.clone(),
            node_id: node.id.clone(),
            experts: grid.layers(cells),
        };
        nodes.iter().zip(from).filter(|(_, cells)| !cells.is_empty()).map(source).collect()
    };
    let told = orders.load.iter().filter(|(name, _)| partial(name));
    told.map(|(name, layers)| (name.clone(), sources(layers))).collect()
}
