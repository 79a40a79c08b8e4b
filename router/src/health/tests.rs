//! The policy against scripted and random histories.

use proptest::prelude::*;

use super::*;

const A: NodeIndex = NodeIndex(0);
const B: NodeIndex = NodeIndex(1);
const MS: Duration = Duration::from_millis(1);

fn health(now: Instant) -> Health {
    Health::new(Policy::default(), 7, now)
}

fn none(_: NodeIndex) -> usize {
    0
}

/// Frames of 8 slots that each take `took`.
fn frames(health: &mut Health, node: NodeIndex, count: usize, took: Duration, now: Instant) {
    for _ in 0..count {
        health.sent(node, 8, true, now);
        health.answered(node, 8, took, now);
    }
}

#[test]
fn the_node_with_less_to_do_is_asked() {
    let now = Instant::now();
    let mut health = health(now);
    health.sent(A, 10, true, now);
    assert!((0..32).all(|_| health.choose(&[A, B], None, none, now) == Some(B)));
    let given = |node| if node == B { 20 } else { 0 };
    assert_eq!(health.choose(&[A, B], None, given, now), Some(A));
    assert_eq!(health.choose(&[A, B], Some(A), given, now), Some(B));
    assert_eq!(health.choose(&[A], Some(A), none, now), None);
}

/// How many of `slots` slots of a layer A is given, where B owns all of it too.
fn share_of_a(health: &mut Health, slots: usize, now: Instant) -> usize {
    let (mut a, mut b) = (0, 0);
    for _ in 0..slots {
        let given = |node| if node == B { b } else { a };
        match health.choose(&[A, B], None, given, now) {
            Some(A) => a += 1,
            _ => b += 1,
        }
    }
    a
}

#[test]
fn equals_share_and_a_slow_one_gets_less() {
    let now = Instant::now();
    let mut health = health(now);
    let asked = (0..1000).filter(|_| health.choose(&[A, B], None, none, now) == Some(A)).count();
    assert!((400..600).contains(&asked), "{asked}");
    assert_eq!(share_of_a(&mut health, 100, now), 50);
    for _ in 0..200 {
        frames(&mut health, A, 1, 10 * MS, now);
        frames(&mut health, B, 1, MS, now);
    }
    assert_eq!(share_of_a(&mut health, 100, now), 0, "B is done with all before A with one");
    let a = share_of_a(&mut health, 4000, now);
    assert!((200..500).contains(&a), "a tenth as fast, at most a tenth of much work: {a}");
}

#[test]
fn a_slow_node_is_asked_once_a_second_and_is_back_when_it_is_well() {
    let mut now = Instant::now();
    let mut health = health(now);
    for _ in 0..200 {
        frames(&mut health, A, 1, 30 * MS, now);
        frames(&mut health, B, 1, MS, now);
    }
    assert!(health.trouble(A, now).is_some_and(|text| text.contains("times as long")));
    health.sent(A, 1, true, now);
    assert_eq!(health.hedge_after(A, 1), None, "it was asked just now");
    health.answered(A, 1, 30 * MS, now);
    now += FORGOTTEN;
    health.sent(A, 1, true, now);
    let hedge = health.hedge_after(A, 1);
    assert!(hedge.is_some_and(|after| after < 3 * MS), "no step waits for it: {hedge:?}");
    assert_eq!(health.hedge_after(B, 1), None);
    health.answered(A, 1, 30 * MS, now);
    let mut layers = |health: &mut Health, took: Duration, seconds: u32| {
        let mut asked = 0;
        for _ in 0..seconds * 100 {
            now += 10 * MS;
            let a = share_of_a(health, 8, now);
            if a > 0 {
                asked += 1;
                health.sent(A, a, true, now);
                health.answered(A, a, took, now);
            }
            frames(health, B, 1, MS, now);
        }
        asked
    };
    let asked = layers(&mut health, 30 * MS, 20);
    assert!((18..=20).contains(&asked), "still slow: {asked}");
    layers(&mut health, MS, 8);
    let asked = layers(&mut health, MS, 1);
    assert!(asked > 90, "well again for seconds: {asked}");
    assert_eq!(health.trouble(A, now), None);
}

#[test]
fn deadlines_follow_what_was_measured_within_bounds() {
    let now = Instant::now();
    let mut health = health(now);
    assert_eq!(health.deadline(A, 8, 0), 2000 * MS, "nothing is known yet");
    frames(&mut health, A, 3000, MS, now);
    assert_eq!(health.deadline(A, 8, 0), 50 * MS, "never shorter");
    assert_eq!(health.deadline(A, 8, 2), 200 * MS, "a third attempt has more time");
    frames(&mut health, A, 3000, 30 * MS, now);
    let deadline = health.deadline(A, 8, 0);
    assert!((120 * MS..200 * MS).contains(&deadline), "four times the 99th: {deadline:?}");
    let large = health.deadline(A, 512, 0);
    assert!(large > 7000 * MS, "64 times the slots may take as many times as long: {large:?}");
    frames(&mut health, A, 3000, 200 * MS, now);
    let slow = health.deadline(A, 8, 0);
    assert!((780 * MS..820 * MS).contains(&slow), "slow is not late: {slow:?}");
}

#[test]
fn a_late_node_is_passed_over_until_it_answers() {
    let now = Instant::now();
    let mut health = health(now);
    health.sent(A, 1, true, now);
    health.overdue(A, now);
    health.leave(Ticket(5), A, 1, now);
    health.sent(B, 100, true, now);
    assert!((0..32).all(|_| health.choose(&[A, B], None, none, now) == Some(B)));
    assert!(!health.late_reply(B, Ticket(5), true, now), "another node's ticket");
    assert!(health.late_reply(A, Ticket(5), true, now));
    assert!(!health.late_reply(A, Ticket(5), true, now), "once");
    assert_eq!(health.choose(&[A, B], None, none, now), Some(A));
}

#[test]
fn an_ejected_node_returns_by_one_probe() {
    let now = Instant::now();
    let mut health = health(now);
    (0..3).for_each(|_| health.down(A, now));
    assert_eq!(health.counts.ejections, 1);
    let owners = [A, B];
    assert!((0..32).all(|_| health.choose(&owners, None, none, now) == Some(B)));
    assert_eq!(health.choose(&[A], None, none, now), Some(A), "the last owner is asked");
    let later = now + Duration::from_secs(1);
    health.sent(B, 50, true, later);
    assert_eq!(health.choose(&owners, None, none, later), Some(A), "the probe");
    health.sent(A, 1, true, later);
    assert!((0..32).all(|_| health.choose(&owners, None, none, later) == Some(B)));
    health.answered(A, 1, MS, later);
    assert_eq!(health.choose(&owners, None, none, later), Some(A));
}

#[test]
fn a_hung_node_is_asked_only_when_all_others_are_gone() {
    let now = Instant::now();
    let mut health = health(now);
    assert!(health.set_hung(A, true, now) && !health.set_hung(A, true, now));
    (0..3).for_each(|_| health.down(B, now));
    assert!((0..32).all(|_| health.choose(&[A, B], None, none, now) == Some(B)));
    assert_eq!(health.choose(&[A], None, none, now), Some(A));
    assert!(health.set_hung(A, false, now));
}

#[test]
fn without_the_policy_owners_take_turns() {
    let now = Instant::now();
    let policy = Policy { enabled: false, ..Policy::default() };
    let mut health = Health::new(policy, 7, now);
    (0..9).for_each(|_| health.down(A, now));
    assert_eq!(health.choose(&[A, B], None, none, now), Some(A));
    assert_eq!(health.choose(&[A, B], None, |n| usize::from(n == A), now), Some(B));
    assert_eq!(health.deadline(A, 1, 0), policy.attempt);
}

proptest! {
    /// Whatever happened, an expert that has an owner besides the avoided one is
    /// asked of it, and nobody unfit is asked while another is fit.
    #[test]
    fn the_last_owner_is_never_refused(
        events in prop::collection::vec((0u8..8, 0u16..4, 0u64..400), 0..200),
        owners in prop::collection::btree_set(0u16..4, 1..4),
        avoid in prop::option::of(0u16..4),
    ) {
        let mut now = Instant::now();
        let mut health = health(now);
        for (kind, node, ms) in events {
            now += Duration::from_millis(ms);
            let node = NodeIndex(node);
            match kind {
                0 | 1 => health.sent(node, 3, true, now),
                2 => health.answered(node, 3, Duration::from_millis(ms), now),
                3 => health.overdue(node, now),
                4 => health.down(node, now),
                5 => _ = health.set_hung(node, ms % 2 == 0, now),
                6 => health.refused(node, 3, Some(Failure::Soft), now),
                _ => health.leave(Ticket(ms), node, 3, now),
            }
            let all: Vec<NodeIndex> = owners.iter().map(|&n| NodeIndex(n)).collect();
            let avoid = avoid.map(NodeIndex);
            let others: Vec<_> = all.iter().copied().filter(|&n| Some(n) != avoid).collect();
            let chosen = health.choose(&all, avoid, none, now);
            prop_assert_eq!(chosen.is_some(), !others.is_empty());
            if let Some(chosen) = chosen {
                prop_assert!(others.contains(&chosen));
                let any_fit = others.iter().any(|&n| health.is_fit(n, now));
                prop_assert_eq!(health.is_fit(chosen, now), any_fit);
            }
        }
    }
}
