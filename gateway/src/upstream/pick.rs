//! Which router gets a sequence: the one that rendezvous hashing of the prompt's
//! beginning prefers, so that its prefix cache helps, unless it is clearly
//! busier than the least busy one. Pure; the same on every gateway.

/// Ids of the prompt that make its key.
const PREFIX_IDS: usize = 64;
/// How much busier than the least busy router the preferred one may be.
const SLACK: u64 = 4;

/// A ready router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidate {
    pub id: u64,
    /// Sequences it runs or queues.
    pub load: u64,
    /// Its queue takes no more.
    pub full: bool,
}

/// The candidate to use; full ones only when all are.
pub fn pick(key: u64, candidates: &[Candidate]) -> Option<usize> {
    let open = candidates.iter().any(|candidate| !candidate.full);
    let usable = || candidates.iter().enumerate().filter(move |(_, c)| !(open && c.full));
    let least = usable().map(|(_, c)| c.load).min()?;
    // A quarter more work than the least is no reason to lose a cache.
    let most = least.saturating_add(SLACK.max(least / 4));
    usable().filter(|(_, c)| c.load <= most).max_by_key(|(_, c)| mix(key ^ c.id)).map(|(at, _)| at)
}

/// Key of a prompt: its first ids, hashed.
pub fn prefix_key(tokens: &[u32]) -> u64 {
    hash(tokens.iter().take(PREFIX_IDS).flat_map(|id| id.to_le_bytes()))
}

/// FNV-1a, 64 bits: stable across processes, which `Hash` does not promise.
pub fn hash(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// SplitMix64's finaliser, so that near keys rank routers independently.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn idle(names: &[&str]) -> Vec<Candidate> {
        names
            .iter()
            .map(|name| Candidate { id: hash(name.bytes()), load: 0, full: false })
            .collect()
    }

    #[test]
    fn prompts_spread_and_stay() {
        let routers = idle(&["a:1", "b:1", "c:1"]);
        let mut counts = [0; 3];
        for prompt in 0..3000u32 {
            let key = prefix_key(&[prompt, 7]);
            let chosen = pick(key, &routers).unwrap();
            counts[chosen] += 1;
            // Losing another router does not move this prompt.
            let mut fewer = routers.clone();
            let lost = (chosen + 1) % 3;
            fewer.remove(lost);
            assert_eq!(fewer[pick(key, &fewer).unwrap()], routers[chosen]);
        }
        assert!(counts.iter().all(|&n| n > 800), "{counts:?}");
    }

    #[test]
    fn only_the_beginning_of_a_prompt_counts() {
        let long: Vec<u32> = (0..100).collect();
        assert_eq!(prefix_key(&long), prefix_key(&long[..PREFIX_IDS]));
        assert_ne!(prefix_key(&long), prefix_key(&long[1..]));
    }

    #[test]
    fn nobody_is_picked_from_nobody() {
        assert_eq!(pick(1, &[]), None);
    }

    proptest! {
        #[test]
        fn a_busy_or_full_router_is_passed_over(
            key: u64,
            loads in prop::collection::vec((0u64..100, any::<bool>()), 1..6),
        ) {
            let candidates: Vec<Candidate> = loads
                .iter()
                .zip(1u64..)
                .map(|(&(load, full), id)| Candidate { id, load, full })
                .collect();
            let chosen = candidates[pick(key, &candidates).unwrap()];
            let open = candidates.iter().any(|c| !c.full);
            prop_assert!(!(open && chosen.full));
            let least = candidates.iter().filter(|c| !(open && c.full)).map(|c| c.load).min();
            let least = least.unwrap();
            prop_assert!(chosen.load <= least + SLACK.max(least / 4));
        }
    }
}
