//! Nodes without weight files: what they are given, and from whom they have it.

use std::collections::BTreeSet;

use super::*;

/// Every source of `orders`: who fetches what from whom.
fn fetches(world: &World, orders: &Orders) -> Vec<(String, String, usize)> {
    let grid = world.grid();
    let cells = |layers: &[LayerExperts]| {
        let owned = grid.owned(layers).into_iter().enumerate();
        owned.filter(|(_, on)| *on).map(|(cell, _)| cell).collect::<Vec<_>>()
    };
    let of = |(to, sources): (&String, &Vec<Source>)| {
        let each = |from: &Source| {
            let cells = cells(&from.experts);
            cells
                .into_iter()
                .map(|cell| (to.clone(), from.endpoint.clone(), cell))
                .collect::<Vec<_>>()
        };
        sources.iter().flat_map(each).collect::<Vec<_>>()
    };
    orders.sources.iter().flat_map(of).collect()
}

#[test]
fn a_node_without_files_is_told_owners_and_others_when_those_fail() {
    let mut world = World::new(2, 64, 2);
    for (name, index) in [("a", 0), ("b", 0)] {
        world.start(name, index, 1);
    }
    world.pass(3 * SECOND);
    world.start("c", 0, 0);
    world.node("c").partial = true;
    let mut asked = BTreeSet::new();
    let (mut small, mut failed) = (true, 0);
    for _ in 0..400 {
        if let Some(orders) = world.decide() {
            let fetched = fetches(&world, &orders);
            for (to, from, cell) in &fetched {
                assert_eq!(to, "c");
                assert!(world.node(from).owned[*cell], "{from} does not own {cell}");
            }
            let told: usize = orders
                .load
                .iter()
                .filter(|(to, _)| to == "c")
                .map(|(_, layers)| world.grid().owned(layers).iter().filter(|on| **on).count())
                .sum();
            assert_eq!(fetched.len(), told, "each expert has one source");
            small &= told <= CALM;
            if told > 0 && failed < 2 {
                // Whoever was asked fails; in the end the other one is.
                failed += 1;
                asked.extend(fetched.into_iter().map(|(_, from, cell)| (cell, from)));
                world.core.failed("c", Failure::Other, "its source has ended", world.now);
            } else {
                world.obey(orders);
            }
        }
        world.now += Duration::from_millis(50);
    }
    let mut cells = asked.iter().map(|(cell, _)| asked.iter().filter(|(c, _)| c == cell).count());
    assert!(failed == 2 && cells.any(|owners| owners == 2), "{asked:?}");
    assert!(small && world.counts()[2] > 0, "{:?}", world.counts());
}

#[test]
fn what_nobody_owns_is_loaded_from_files_and_a_node_without_gets_its_share_afterwards() {
    let mut world = World::new(2, 64, 1);
    for (name, index) in [("a", 0), ("b", 1)] {
        world.start(name, index, 2);
    }
    world.pass(3 * SECOND);
    world.start("c", 0, 0);
    world.node("c").partial = true;
    world.stop("a");
    while !world.whole() {
        if let Some(orders) = world.decide() {
            assert!(orders.load.iter().all(|(to, _)| to == "b"), "{:?}", orders.load);
            world.obey(orders);
        }
        world.now += Duration::from_millis(50);
    }
    world.pass(10 * SECOND);
    let counts = world.counts();
    assert!(counts[1] > 0 && counts[0].abs_diff(counts[1]) <= 4, "{counts:?}");
    // Where nobody has all files, whoever is there tries.
    world.node("b").partial = true;
    world.stop("c");
    assert!(world.decide().is_some_and(|orders| !orders.load.is_empty()));
}
