//! Who should own what: pure functions from counts to ownership.
//!
//! Wanted of a plan: every expert has exactly `replicas` owners (all nodes when
//! there are fewer); nodes differ by at most one contiguous share; experts that
//! the gate picks together (a group is contiguous) sit on the same node.

/// What node `index` of `nodes` owns of a layer's `experts`, ascending.
///
/// The experts are cut into `nodes` contiguous shares; a node owns its own
/// share and those of the `replicas - 1` nodes before it, so that losing one
/// node leaves every expert with the others.
pub fn shard(index: u16, nodes: u16, replicas: u16, experts: u32) -> Vec<u32> {
    let nodes = u64::from(nodes.max(1));
    let replicas = u64::from(replicas).clamp(1, nodes);
    let mut owned = Vec::new();
    for back in 0..replicas {
        let share = (u64::from(index) + nodes - back) % nodes;
        let bound = |share: u64| (share * u64::from(experts) / nodes) as u32;
        owned.extend(bound(share)..bound(share + 1));
    }
    owned.sort_unstable();
    owned
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_expert_has_its_replicas_and_shares_are_even(
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
}
