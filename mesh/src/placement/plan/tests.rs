//! The properties of `../README.md`, by their letters.

use proptest::prelude::*;

use super::steps::{Step, next};
use super::*;
use proto::LayerId;

/// Bytes of every expert where all are of one size.
const SIZE: u64 = 10;

fn problem(nodes: usize, layers: u32, experts: u32, replicas: usize) -> Problem {
    let grid = ExpertGrid { layers: (0..layers).map(LayerId).collect(), experts };
    let cells = layers as usize * experts as usize;
    let node = Node { capacity: None, draining: false, owned: vec![false; cells] };
    Problem {
        grid,
        group: 4,
        replicas,
        bytes: vec![SIZE; cells],
        load: vec![0; cells],
        nodes: vec![node; nodes],
    }
}

/// The problem once its nodes own what was planned.
fn after(problem: &Problem, owned: &[Vec<bool>]) -> Problem {
    let mut next = problem.clone();
    for (node, owned) in next.nodes.iter_mut().zip(owned) {
        node.owned.clone_from(owned);
    }
    next
}

fn owners(owned: &[Vec<bool>], cell: usize) -> usize {
    owned.iter().filter(|node| node[cell]).count()
}

fn current(problem: &Problem) -> Vec<Vec<bool>> {
    problem.nodes.iter().map(|node| node.owned.clone()).collect()
}

fn bytes(problem: &Problem, owned: &[bool]) -> u64 {
    owned.iter().zip(&problem.bytes).filter(|(owned, _)| **owned).map(|(_, bytes)| bytes).sum()
}

/// Any state a mesh may be in; what nodes own now fits into them.
fn any_problem() -> impl Strategy<Value = Problem> {
    (1usize..6, 1u32..4, 1u32..20, 1usize..4, 1usize..6, any::<bool>()).prop_flat_map(
        |(nodes, layers, experts, replicas, group, scarce)| {
            let cells = layers as usize * experts as usize;
            let node = (
                proptest::collection::vec(proptest::bool::weighted(0.4), cells),
                proptest::bool::weighted(0.15),
                0..=cells as u64,
            );
            let loads = proptest::collection::vec(prop_oneof![Just(0u64), 0u64..5000], cells);
            (proptest::collection::vec(node, nodes), loads).prop_map(move |(nodes, load)| {
                let mut problem = problem(0, layers, experts, replicas);
                (problem.group, problem.load) = (group, load);
                problem.nodes = nodes
                    .into_iter()
                    .map(|(owned, draining, spare)| {
                        let held = owned.iter().filter(|owned| **owned).count() as u64;
                        let capacity = scarce.then_some((held + spare / 2) * SIZE);
                        Node { capacity, draining, owned }
                    })
                    .collect();
                problem
            })
        },
    )
}

fn any_aim() -> impl Strategy<Value = Aim> {
    prop_oneof![Just(Aim::Cover), Just(Aim::Balance)]
}

proptest! {
    #[test]
    fn a_b_c_d_h(problem in any_problem(), aim in any_aim()) {
        let planned = plan(&problem, aim);
        let want = problem.owners_wanted();
        for cell in 0..problem.cells() {
            let lacks = owners(&planned.owned, cell) < want.max(1);
            prop_assert_eq!(lacks, planned.short.contains(&cell), "A: cell {}", cell);
        }
        let unbounded = problem.nodes.iter().all(|node| node.capacity.is_none());
        prop_assert!(!unbounded || want == 0 || planned.short.is_empty(), "A");
        let most = (0..problem.cells()).map(|cell| owners(&planned.owned, cell)).max().unwrap();
        let least = (0..problem.cells()).map(|cell| owners(&planned.owned, cell)).min().unwrap();
        if least == 0 && most > 1 {
            // Nobody who has two owners could give one of them to one who has none.
            let orphan = (0..problem.cells()).find(|&c| owners(&planned.owned, c) == 0).unwrap();
            for (node, owned) in problem.nodes.iter().zip(&planned.owned) {
                let spare = |cell: usize| owned[cell] && owners(&planned.owned, cell) > 1;
                prop_assert!(
                    node.draining || !(0..problem.cells()).any(spare),
                    "A: cell {} has no owner", orphan
                );
            }
        }
        for (node, owned) in problem.nodes.iter().zip(&planned.owned) {
            prop_assert!(node.capacity.is_none_or(|most| bytes(&problem, owned) <= most), "B");
            prop_assert!(!node.draining || !owned.contains(&true), "C");
        }
        let again = plan(&after(&problem, &planned.owned), aim);
        prop_assert_eq!(&again.owned, &planned.owned, "D");
        prop_assert_eq!(plan(&problem, aim), planned, "H");
    }

    #[test]
    fn a_room_for_all_is_used(
        (nodes, experts, replicas) in (1usize..6, 1u32..16, 1usize..3),
        slots in proptest::collection::vec(0u64..40, 6),
        seed in proptest::collection::vec(any::<bool>(), 6 * 32),
    ) {
        let mut problem = problem(nodes, 2, experts, replicas);
        let cells = problem.cells();
        for (index, node) in problem.nodes.iter_mut().enumerate() {
            let mut room = slots[index];
            node.capacity = Some(room * SIZE);
            for cell in 0..cells {
                let owned = seed[index * 32 + cell] && room > 0;
                node.owned[cell] = owned;
                room -= u64::from(owned);
            }
        }
        let useful: u64 = slots[..nodes].iter().map(|&slots| slots.min(cells as u64)).sum();
        let need = (cells * problem.owners_wanted()) as u64;
        let planned = plan(&problem, Aim::Balance);
        prop_assert_eq!(planned.short.is_empty(), useful >= need, "{} of {}", useful, need);
    }

    #[test]
    fn e_only_what_a_lost_node_owned_gets_new_owners(
        nodes in 2usize..8, experts in 1u32..40, replicas in 1usize..4, lost in 0usize..8,
    ) {
        let start = problem(nodes, 2, experts, replicas);
        let before = after(&start, &plan(&start, Aim::Balance).owned);
        let mut left = before.clone();
        let gone = left.nodes.remove(lost % nodes);
        let planned = plan(&left, Aim::Cover);
        for (node, owned) in left.nodes.iter().zip(&planned.owned) {
            for ((after, before), lost) in owned.iter().zip(&node.owned).zip(&gone.owned) {
                prop_assert!(after == before || *lost);
                prop_assert!(*after || !*before);
            }
        }
        prop_assert!(planned.short.is_empty());
    }

    #[test]
    fn e_a_node_that_joins_gets_its_share_and_nothing_else_moves(
        nodes in 1usize..8, experts in 1u32..64, replicas in 1usize..4,
    ) {
        let start = problem(nodes, 2, experts, replicas);
        let mut joined = after(&start, &plan(&start, Aim::Balance).owned);
        joined.nodes.push(problem(1, 2, experts, 1).nodes.remove(0));
        let planned = plan(&joined, Aim::Balance);
        let new = planned.owned.len() - 1;
        for (node, owned) in joined.nodes.iter().zip(&planned.owned).take(new) {
            prop_assert!(owned.iter().zip(&node.owned).all(|(after, before)| *before || !*after));
        }
        let want = joined.owners_wanted();
        let share = (experts as usize * want).div_ceil(new + 1) + 1;
        for layer in 0..2 {
            let cells = layer * experts as usize..(layer + 1) * experts as usize;
            let moved = cells.filter(|&cell| planned.owned[new][cell]).count();
            prop_assert!(moved <= share, "{} moved, its share is {}", moved, share);
        }
    }

    #[test]
    fn f_nodes_differ_by_little(mut problem in any_problem()) {
        for node in &mut problem.nodes {
            node.capacity = None;
        }
        let planned = plan(&problem, Aim::Balance);
        let draft = Draft::new(&problem);
        for layer in 0..problem.grid.layers.len() {
            let weight = |&node: &usize| -> u64 {
                let cells = draft.cells_of(layer);
                cells.filter(|&cell| planned.owned[node][cell]).map(|c| draft.weight[c]).sum()
            };
            let heaviest = draft.cells_of(layer).map(|cell| draft.weight[cell]).max().unwrap();
            for from in &draft.eligible {
                for to in &draft.eligible {
                    let movable = draft
                        .cells_of(layer)
                        .filter(|&c| planned.owned[*from][c] && !planned.owned[*to][c]);
                    let Some(lightest) = movable.map(|cell| draft.weight[cell]).min() else {
                        continue;
                    };
                    let gap = weight(from).saturating_sub(weight(to));
                    prop_assert!(lightest <= heaviest);
                    prop_assert!(gap <= lightest + draft.tolerance(layer), "gap {}", gap);
                }
            }
        }
    }

    #[test]
    fn i_j_k(
        problem in any_problem(),
        aim in any_aim(),
        order in proptest::collection::vec(any::<u32>(), 64),
    ) {
        let wanted = plan(&problem, aim).owned;
        let covered = |problem: &Problem| -> Vec<usize> {
            let owned = current(problem);
            (0..problem.cells()).filter(|&cell| owners(&owned, cell) > 0).collect()
        };
        let mut now = problem.clone();
        let mut order = order.into_iter().cycle();
        let mut rounds = 0;
        loop {
            let step = next(&now, &wanted);
            if step.is_done() || step.is_stuck() {
                let unbounded = problem.nodes.iter().all(|node| node.capacity.is_none());
                let usable = problem.nodes.iter().any(|node| !node.draining);
                prop_assert!(step.is_done() || !unbounded || !usable, "K: {:?}", step);
                if step.is_done() {
                    prop_assert_eq!(current(&now), wanted, "K");
                }
                break;
            }
            // Any part of the step is carried out, in any order; at least one order of it.
            let Step { load, drop, .. } = step;
            let mut orders: Vec<_> = load
                .into_iter()
                .map(|at| (at, true))
                .chain(drop.into_iter().map(|at| (at, false)))
                .collect();
            orders.sort_by_cached_key(|_| order.next());
            let done = 1 + order.next().unwrap() as usize % orders.len();
            for ((node, cell), owned) in orders.into_iter().take(done) {
                let before = covered(&now);
                now.nodes[node].owned[cell] = owned;
                let lost = before.iter().find(|cell| !covered(&now).contains(cell));
                prop_assert_eq!(lost, None, "I");
                let node = &now.nodes[node];
                prop_assert!(node.capacity.is_none_or(|most| bytes(&now, &node.owned) <= most), "J");
            }
            rounds += 1;
            prop_assert!(rounds < 10_000, "K");
        }
    }

    #[test]
    fn every_expert_of_equal_shares_has_its_replicas(
        nodes in 1u16..20, replicas in 1u16..5, experts in 1u32..300,
    ) {
        let plans: Vec<_> = (0..nodes).map(|n| shard(n, nodes, replicas, experts)).collect();
        let want = usize::from(replicas.min(nodes));
        for expert in 0..experts {
            let owners = plans.iter().filter(|p| p.binary_search(&expert).is_ok()).count();
            prop_assert_eq!(owners, want);
        }
        let sizes: Vec<_> = plans.iter().map(Vec::len).collect();
        let spread = sizes.iter().max().unwrap() - sizes.iter().min().unwrap();
        prop_assert!(spread <= want);
    }
}

#[test]
fn g_groups_stay_together() {
    // 8 groups of 4 on 4 nodes, from nothing: two whole groups each.
    let start = problem(4, 2, 32, 1);
    let planned = plan(&start, Aim::Balance);
    let whole = |owned: &[bool]| owned.chunks(4).all(|group| group.iter().all(|o| *o == group[0]));
    assert!(planned.owned.iter().all(|owned| whole(owned)), "{planned:?}");
    // A node less: its groups go to neighbours as a whole where the shares allow it.
    let mut left = after(&start, &planned.owned);
    left.nodes.remove(1);
    let fragments = |owned: &[Vec<bool>]| -> usize {
        owned.iter().flat_map(|node| node.chunks(4)).filter(|group| group.contains(&true)).count()
    };
    let planned = plan(&left, Aim::Cover);
    // 2 layers of 8 groups; two nodes get 3 of 8 experts more, one 2: at most one group is cut in two.
    assert!(fragments(&planned.owned) <= 2 * 10, "{}", fragments(&planned.owned));
    // A node more: it takes whole groups, but for the last of each giver.
    let mut more = after(&left, &planned.owned);
    more.nodes.push(problem(1, 2, 32, 1).nodes.remove(0));
    let planned = plan(&more, Aim::Balance);
    assert!(fragments(&planned.owned) <= 2 * 12, "{}", fragments(&planned.owned));
}

#[test]
fn an_expert_that_works_more_gets_lighter_company() {
    let mut hot = problem(2, 1, 8, 1);
    hot.load = vec![700, 10, 10, 10, 10, 10, 10, 10];
    let planned = plan(&hot, Aim::Balance);
    let mine = planned.owned.iter().find(|owned| owned[0]).unwrap();
    assert!(mine.iter().filter(|owned| **owned).count() <= 2, "{planned:?}");
}

#[test]
fn the_last_node_cannot_be_emptied() {
    let mut last = problem(1, 1, 4, 1);
    last.nodes[0].owned = vec![true; 4];
    last.nodes[0].draining = true;
    let planned = plan(&last, Aim::Cover);
    assert_eq!(planned.short, [0, 1, 2, 3]);
    assert!(next(&last, &planned.owned).is_stuck());
}
