//! Random work on a residency whose memory is modelled: what a slot really holds is what loads put there.

use proptest::prelude::*;

use super::*;

/// What is in the slots, as loads have left it.
struct World {
    residency: Residency,
    device: Vec<Option<Key>>,
    host: Vec<Option<Key>>,
    /// Slots that someone computes with.
    used: Vec<(Key, u32)>,
    loading: Vec<Load>,
}

impl World {
    fn new(device: usize, host: usize) -> World {
        World {
            residency: Residency::new(device, host),
            device: vec![None; device],
            host: vec![None; host],
            used: Vec::new(),
            loading: Vec::new(),
        }
    }

    fn begin(&mut self) -> bool {
        let Some(load) = self.residency.next_load() else { return false };
        let host = &mut self.host[load.host as usize];
        assert!(load.fill || *host == Some(load.key), "a copy that is said to be there is there");
        let busy = self.loading.iter().any(|other| {
            (other.host == load.host && (load.fill || other.fill)) || other.key == load.key
        });
        assert!(!busy, "no slot is loaded twice at once");
        if load.fill {
            *host = None;
        }
        if let Some(slot) = load.device {
            let using = self.used.iter().any(|(_, used)| *used == slot);
            let filling = self.loading.iter().any(|other| other.device == Some(slot));
            assert!(!using && !filling, "a slot in use keeps its expert");
            self.device[slot as usize] = None;
        }
        self.loading.push(load);
        true
    }

    fn end(&mut self, at: usize, succeeds: bool) {
        if self.loading.is_empty() {
            return;
        }
        let load = self.loading.remove(at % self.loading.len());
        if !succeeds {
            return self.residency.failed(load);
        }
        self.host[load.host as usize] = Some(load.key);
        if let Some(slot) = load.device {
            self.device[slot as usize] = Some(load.key);
        }
        self.residency.done(load);
    }

    fn acquire(&mut self, key: Key) -> bool {
        let Some(slot) = self.residency.acquire(key) else { return false };
        assert_eq!(self.device[slot as usize], Some(key), "an acquired slot holds its expert");
        self.used.push((key, slot));
        true
    }

    fn release(&mut self, at: usize, rows: usize) {
        if !self.used.is_empty() {
            let (key, _) = self.used.remove(at % self.used.len());
            self.residency.release(key, rows);
        }
    }
}

#[derive(Clone, Debug)]
enum Act {
    Acquire(Key),
    Release(usize, usize),
    Offer(Key),
    Forget(Key),
    Begin,
    End(usize, bool),
    GiveUp,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0u64..12).prop_map(Act::Acquire),
        3 => (0usize..9, 0usize..100).prop_map(|(at, rows)| Act::Release(at, rows)),
        2 => (0u64..12).prop_map(Act::Offer),
        1 => (0u64..12).prop_map(Act::Forget),
        4 => Just(Act::Begin),
        4 => (0usize..9, prop::bool::weighted(0.8)).prop_map(|(at, well)| Act::End(at, well)),
        1 => Just(Act::GiveUp),
    ]
}

proptest! {
    #[test]
    fn slots_hold_what_they_are_said_to(
        device in 1usize..6,
        host in 1usize..4,
        acts in prop::collection::vec(act(), 0..300),
    ) {
        let mut world = World::new(device, host);
        for act in acts {
            match act {
                Act::Acquire(key) => { world.acquire(key); }
                Act::Release(at, rows) => world.release(at, rows),
                Act::Offer(key) => world.residency.offer(key),
                Act::Forget(key) => world.residency.forget(key),
                Act::Begin => { world.begin(); }
                Act::End(at, well) => world.end(at, well),
                Act::GiveUp => world.residency.give_up(),
            }
            let tiers = world.residency.tiers();
            prop_assert!(tiers.device <= device && tiers.host <= host);
        }
    }

    /// A batch that needs more experts than there are slots gets them all, in turns, whatever was loaded before.
    #[test]
    fn a_batch_gets_all_its_experts(
        device in 1usize..6,
        host in 1usize..4,
        before in prop::collection::vec(act(), 0..60),
        batch in prop::collection::hash_set(0u64..40, 1..30),
    ) {
        let mut world = World::new(device, host);
        for act in before {
            match act {
                Act::Acquire(key) => { world.acquire(key); }
                Act::Release(at, rows) => world.release(at, rows),
                Act::Offer(key) => world.residency.offer(key),
                Act::Begin => { world.begin(); }
                Act::End(at, well) => world.end(at, well),
                Act::Forget(_) | Act::GiveUp => {}
            }
        }
        while !world.used.is_empty() {
            world.release(0, 1);
        }
        world.residency.give_up();
        let mut todo: Vec<Key> = batch.into_iter().collect();
        let mut turns = 0;
        while !todo.is_empty() {
            turns += 1;
            prop_assert!(turns < 1000, "{} experts never came", todo.len());
            todo.retain(|key| !world.acquire(*key));
            while !world.used.is_empty() {
                world.release(0, 3);
            }
            world.begin();
            world.end(0, true);
        }
    }
}

/// Everything that is wanted is loaded.
fn settle(world: &mut World) {
    while world.begin() {
        world.end(0, true);
    }
}

#[test]
fn the_least_loaded_expert_gives_way() {
    let mut world = World::new(2, 1);
    for (key, rows) in [(1, 50), (2, 5)] {
        assert!(!world.acquire(key));
        settle(&mut world);
        assert!(world.acquire(key));
        world.release(0, rows);
    }
    assert!(!world.acquire(3));
    settle(&mut world);
    assert!(world.acquire(3) && world.acquire(1));
    assert!(!world.acquire(2), "the least loaded one has gone");
}

#[test]
fn offers_take_free_places_only_and_fill_the_host_after_the_device() {
    let mut world = World::new(2, 3);
    (0..6).for_each(|key| world.residency.offer(key));
    settle(&mut world);
    let tiers = world.residency.tiers();
    assert_eq!(tiers, Tiers { device: 2, host: 1, disk: 3 });
    assert!(world.acquire(0) && world.acquire(1));
    (0..6).for_each(|key| world.residency.offer(key));
    settle(&mut world);
    assert_eq!(world.residency.tiers(), tiers);
}

#[test]
fn a_failed_load_leaves_its_places_free() {
    let mut world = World::new(1, 1);
    assert!(!world.acquire(7));
    assert!(world.begin());
    world.end(0, false);
    assert_eq!(world.residency.tiers(), Tiers { device: 0, host: 0, disk: 1 });
    assert!(!world.acquire(8));
    settle(&mut world);
    assert!(world.acquire(8));
}
