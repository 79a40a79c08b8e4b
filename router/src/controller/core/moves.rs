//! What a plan would move, for people.

use mesh::placement::plan::{Plan, Problem};
use proto::v1::Move;

use super::{Core, Seen};

impl Core {
    pub(super) fn moves(&self, nodes: &[Seen], problem: &Problem, planned: &Plan) -> Vec<Move> {
        let mut moves = Vec::new();
        for cell in 0..problem.cells() {
            let name = |node: usize| nodes[node].id.clone();
            let changed = |before: bool| {
                let of = move |&node: &usize| {
                    let (now, then) = (problem.nodes[node].owned[cell], planned.owned[node][cell]);
                    now == before && then != before
                };
                (0..nodes.len()).filter(of).map(name)
            };
            let (mut from, mut to) = (changed(true), changed(false));
            loop {
                let (from, to) = (from.next(), to.next());
                if from.is_none() && to.is_none() {
                    break;
                }
                let (layer, expert) = self.settings.grid.experts.name(cell);
                moves.push(Move {
                    layer: layer.0,
                    expert: expert.0,
                    from: from.unwrap_or_default(),
                    to: to.unwrap_or_default(),
                    bytes: problem.bytes[cell],
                });
            }
        }
        moves
    }
}
