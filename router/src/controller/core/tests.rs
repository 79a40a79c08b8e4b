//! The controller's decisions over simulated nodes and time: what is ordered is
//! carried out, in part, late or not at all, while nodes come and go.

mod partial;

use proptest::prelude::*;

use super::*;
use crate::controller::grid::tests::grid;

/// Nodes that own what they were ordered to, and the clock.
struct World {
    core: Core,
    nodes: Vec<Seen>,
    now: Instant,
    /// Orders that went through.
    orders: usize,
    starts: u64,
}

impl World {
    fn new(layers: u32, experts: u32, replicas: usize) -> Self {
        let settings =
            Settings { grid: grid(layers, experts), replicas, grace: Duration::from_secs(5) };
        let now = Instant::now();
        Self { core: Core::new(settings, 7, now), nodes: Vec::new(), now, orders: 0, starts: 0 }
    }

    fn grid(&self) -> Grid {
        self.core.settings.grid.clone()
    }

    /// A node comes with its share.
    fn start(&mut self, name: &str, index: usize, count: usize) {
        let cells = self.grid().experts.cells();
        let experts = self.grid().experts.experts as usize;
        let mine = |cell: usize| count > 0 && cell % experts * count / experts == index;
        self.stop(name);
        self.starts += 1;
        self.nodes.push(Seen {
            endpoint: name.to_owned(),
            id: format!("node-{name}"),
            incarnation: self.starts,
            capacity: None,
            owned: (0..cells).map(mine).collect(),
            term: 0,
            partial: false,
            drained: false,
        });
        self.nodes.sort_by(|a, b| a.endpoint.cmp(&b.endpoint));
    }

    fn stop(&mut self, name: &str) {
        self.nodes.retain(|node| node.endpoint != name);
    }

    fn node(&mut self, name: &str) -> &mut Seen {
        self.nodes.iter_mut().find(|node| node.endpoint == name).unwrap()
    }

    fn owners(&self, cell: usize) -> usize {
        self.nodes.iter().filter(|node| node.owned[cell]).count()
    }

    fn whole(&self) -> bool {
        (0..self.grid().experts.cells()).all(|cell| self.owners(cell) > 0)
    }

    fn counts(&self) -> Vec<usize> {
        self.nodes.iter().map(|node| node.owned.iter().filter(|owned| **owned).count()).collect()
    }

    fn decide(&mut self) -> Option<Orders> {
        self.core.decide(&self.nodes, &[], self.now)
    }

    /// Nodes do what they are told; no drop may cost an expert its last owner.
    fn obey(&mut self, orders: Orders) {
        let grid = self.grid();
        for (named, owned) in [(orders.load, true), (orders.drop, false)] {
            for (endpoint, layers) in named {
                for (cell, _) in grid.owned(&layers).iter().enumerate().filter(|(_, on)| **on) {
                    self.node(&endpoint).owned[cell] = owned;
                    assert!(owned || self.owners(cell) > 0, "cell {cell} lost its last owner");
                }
            }
        }
        for (endpoint, drained) in orders.drained {
            self.node(&endpoint).drained = drained;
        }
        self.orders += 1;
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            if let Some(orders) = self.decide() {
                self.obey(orders);
            }
            self.now += Duration::from_millis(50);
        }
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn a_mesh_that_starts_with_its_shares_is_left_alone() {
    let mut world = World::new(2, 16, 1);
    for index in 0..3 {
        world.start(["a", "b", "c"][index], index, 3);
        world.pass(2 * SECOND);
    }
    world.pass(60 * SECOND);
    assert_eq!(world.orders, 0, "{:?}", world.counts());
}

#[test]
fn experts_that_nobody_brings_are_loaded_in_the_end() {
    let mut world = World::new(1, 8, 1);
    world.start("a", 0, 2);
    world.pass(START - SECOND);
    assert!(!world.whole());
    world.pass(2 * SECOND);
    assert!(world.whole());
}

#[test]
fn a_lost_share_is_loaded_at_once_and_given_back_calmly() {
    let mut world = World::new(2, 12, 1);
    for index in 0..3 {
        world.start(["a", "b", "c"][index], index, 3);
    }
    world.pass(10 * SECOND);
    world.stop("b");
    let orders = world.decide().expect("at once");
    assert!(orders.drop.is_empty() && orders.order.epoch == 1 && orders.order.term == 7);
    world.obey(orders);
    assert!(world.whole());
    assert_eq!(world.counts(), [12, 12]);

    world.pass(5 * SECOND);
    world.start("b", 1, 3);
    let before = world.orders;
    world.pass(SETTLE - SECOND);
    assert_eq!(world.orders, before, "not before things have settled");
    world.pass(5 * SECOND);
    assert!(world.whole());
    assert_eq!(world.counts(), [8, 8, 8]);
}

#[test]
fn a_lost_replica_is_replaced_after_the_grace() {
    let mut world = World::new(1, 8, 2);
    for (index, name) in ["a", "b", "c"].into_iter().enumerate() {
        world.start(name, index, 3);
    }
    world.pass(60 * SECOND);
    assert!((0..8).all(|cell| world.owners(cell) == 2), "{:?}", world.counts());
    world.stop("a");
    let before = world.orders;
    world.pass(4 * SECOND);
    assert_eq!(world.orders, before, "it may come back");
    world.pass(3 * SECOND);
    assert_eq!(world.counts(), [8, 8]);
}

#[test]
fn a_node_that_joins_gets_its_share() {
    let mut world = World::new(1, 64, 1);
    world.start("a", 0, 1);
    world.pass(5 * SECOND);
    world.start("b", 0, 0);
    world.pass(10 * SECOND);
    assert!(world.counts().iter().all(|count| (31..=33).contains(count)), "{:?}", world.counts());
}

#[test]
fn a_drained_node_is_emptied_and_stays_empty_until_it_starts_anew() {
    let mut world = World::new(2, 8, 1);
    world.start("a", 0, 2);
    world.start("b", 1, 2);
    world.pass(5 * SECOND);
    let (nodes, now) = (world.nodes.clone(), world.now);
    let unknown = world.core.drain(&nodes, "z", false, now).unwrap_err();
    assert_eq!(unknown.to_string(), "no node is called `z`; connected are node-a, node-b");
    assert_eq!(world.core.drain(&nodes, "node-a", false, now).unwrap(), "a");
    let last = world.core.drain(&nodes, "b", false, now).unwrap_err();
    assert!(matches!(last, Refusal::Last(_)), "{last}");
    world.pass(5 * SECOND);
    assert_eq!(world.counts(), [0, 16]);
    world.pass(60 * SECOND);
    assert_eq!(world.counts(), [0, 16]);

    world.stop("a");
    world.pass(SECOND);
    world.start("a", 0, 2);
    world.pass(10 * SECOND);
    assert_eq!(world.counts(), [8, 8]);

    let (nodes, now) = (world.nodes.clone(), world.now);
    world.core.drain(&nodes, "b", false, now).unwrap();
    world.pass(5 * SECOND);
    assert_eq!(world.counts(), [16, 0]);
    let (nodes, now) = (world.nodes.clone(), world.now);
    world.core.drain(&nodes, "b", true, now).unwrap();
    world.pass(5 * SECOND);
    assert_eq!(world.counts(), [8, 8]);
}

#[test]
fn a_dry_run_moves_nothing() {
    let mut world = World::new(1, 8, 1);
    world.start("a", 0, 1);
    world.start("b", 0, 0);
    world.core.was_whole = true;
    let (nodes, now) = (world.nodes.clone(), world.now);
    let moves = world.core.rebalance(&nodes, &[], true, now).unwrap();
    assert_eq!(moves.len(), 4);
    assert!(moves.iter().all(|one| one.from == "node-a" && one.to == "node-b"));
    assert!(world.core.goal.is_none());
    assert_eq!(world.core.rebalance(&nodes, &[], false, now).unwrap(), moves);
    let busy = world.core.rebalance(&nodes, &[], true, now).unwrap_err();
    assert!(matches!(busy, Refusal::Busy(_)), "{busy}");
    world.pass(SECOND);
    assert_eq!(world.counts(), [4, 4]);
}

#[test]
fn who_is_deposed_orders_nothing_more() {
    let mut world = World::new(1, 8, 1);
    world.start("a", 0, 2);
    world.start("b", 1, 2);
    world.pass(5 * SECOND);
    world.stop("b");
    assert!(world.decide().is_some());
    world.core.failed("a", Failure::Deposed, "term 9", world.now);
    world.pass(60 * SECOND);
    assert!(!world.whole());
    assert!(world.core.progress().detail.contains("term 9"));
}

#[test]
fn a_term_is_above_what_nodes_have_obeyed() {
    let mut world = World::new(1, 8, 1);
    world.start("a", 0, 2);
    world.start("b", 1, 2);
    world.node("a").term = 900;
    world.pass(5 * SECOND);
    world.stop("b");
    assert_eq!(world.decide().unwrap().order, Order { term: 901, epoch: 1 });
}

#[test]
fn who_is_elected_has_seen_what_was_there_and_heals_at_once() {
    let mut world = World::new(1, 8, 1);
    world.core = Core::standby(world.core.settings.clone(), world.now);
    for (index, name) in ["a", "b", "c"].into_iter().enumerate() {
        world.start(name, index, 3);
    }
    // Whoever was in office before had this term obeyed; it is not outbid here.
    world.node("a").term = 41;
    let (nodes, now) = (world.nodes.clone(), world.now);
    world.core.watch(&nodes, now);
    world.stop("b");
    let (nodes, now) = (world.nodes.clone(), world.now);
    world.core.watch(&nodes, now);
    world.core.take_office(9, &nodes, now);
    let orders = world.decide().expect("at once");
    assert_eq!(orders.order, Order { term: 9, epoch: 1 });
    world.obey(orders);
    assert!(world.whole());
}

#[test]
fn who_is_elected_finds_what_was_drained() {
    let mut world = World::new(1, 8, 1);
    for (index, name) in ["a", "b", "c"].into_iter().enumerate() {
        world.start(name, index, 3);
    }
    let mut standby = Core::standby(world.core.settings.clone(), world.now);
    standby.watch(&world.nodes, world.now);
    world.pass(5 * SECOND);
    // One is drained before its eyes, another while it does not see it.
    world.core.drain(&world.nodes, "a", false, world.now).unwrap();
    world.pass(5 * SECOND);
    let hidden: Vec<Seen> = world.nodes.iter().filter(|n| n.endpoint != "b").cloned().collect();
    standby.watch(&hidden, world.now);
    world.core.drain(&world.nodes, "b", false, world.now).unwrap();
    world.pass(5 * SECOND);
    standby.take_office(8, &hidden, world.now);
    world.core = standby;
    world.pass(20 * SECOND);
    assert_eq!(world.counts(), [0, 0, 8]);
    assert!(world.node("a").drained && world.node("b").drained && !world.node("c").drained);
}

#[test]
fn a_node_without_room_is_passed_over() {
    let mut world = World::new(1, 9, 1);
    for (index, name) in ["a", "b", "c"].into_iter().enumerate() {
        world.start(name, index, 3);
    }
    world.pass(5 * SECOND);
    world.stop("c");
    let orders = world.decide().unwrap();
    assert_eq!(orders.load.len(), 2);
    world.core.failed("a", Failure::Full, "memory", world.now);
    let orders = world.decide().unwrap();
    assert_eq!(orders.load.len(), 1);
    assert_eq!(orders.load[0].0, "b");
    world.obey(orders);
    assert!(world.whole());
}

#[derive(Clone, Debug)]
enum Event {
    Start(usize),
    Stop(usize),
    Drain(usize),
    Rebalance,
    /// Orders are carried out in part: nodes beyond this many do not hear them.
    Heard(usize),
    Fail(usize),
    Pass(u64),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        (0usize..5).prop_map(Event::Start),
        (0usize..5).prop_map(Event::Stop),
        (0usize..5).prop_map(Event::Drain),
        Just(Event::Rebalance),
        (0usize..3).prop_map(Event::Heard),
        (0usize..5).prop_map(Event::Fail),
        (1u64..4000).prop_map(Event::Pass),
    ]
}

proptest! {
    /// Whatever happens, no drop costs an expert its last owner, and once nodes
    /// stay and answer, every expert has its owners again and nothing moves.
    #[test]
    fn it_ends_well(events in proptest::collection::vec(event(), 1..60), replicas in 1usize..3) {
        let names = ["a", "b", "c", "d", "e"];
        let mut world = World::new(2, 10, replicas);
        for event in events {
            let (nodes, now) = (world.nodes.clone(), world.now);
            match event {
                Event::Start(at) => world.start(names[at], at, 5),
                Event::Stop(at) => world.stop(names[at]),
                Event::Drain(at) => _ = world.core.drain(&nodes, names[at], false, now),
                Event::Rebalance => _ = world.core.rebalance(&nodes, &[], false, now),
                Event::Fail(at) => world.core.failed(names[at], Failure::Other, "late", now),
                Event::Pass(ms) => world.pass(Duration::from_millis(ms)),
                Event::Heard(most) => {
                    if let Some(mut orders) = world.decide() {
                        orders.load.truncate(most);
                        orders.drop.truncate(most);
                        world.obey(orders);
                    }
                }
            }
        }
        if world.nodes.is_empty() {
            world.start("a", 0, 5);
        }
        world.pass(120 * SECOND);
        let drained = |seen: &&Seen| world.core.is_draining(&seen.endpoint);
        let staying = world.nodes.iter().filter(|node| !drained(node)).count();
        for cell in 0..20 {
            prop_assert!(world.owners(cell) > 0, "cell {}", cell);
            prop_assert!(world.owners(cell) >= replicas.min(staying), "cell {}", cell);
        }
        for node in world.nodes.iter().filter(drained) {
            prop_assert!(staying == 0 || !node.owned.contains(&true), "{} is not empty", node.id);
        }
        let before = world.orders;
        world.pass(60 * SECOND);
        prop_assert_eq!(world.orders, before);
    }
}

#[test]
fn a_drain_outlives_its_controller_until_it_is_cancelled_or_the_node_starts_anew() {
    let mut world = World::new(1, 12, 1);
    for (name, index) in [("a", 0), ("b", 1), ("c", 2)] {
        world.start(name, index, 3);
    }
    world.pass(3 * SECOND);
    world.core.drain(&world.nodes, "b", false, world.now).unwrap();
    world.pass(3 * SECOND);
    assert!(world.node("b").drained && world.counts()[1] == 0, "{:?}", world.counts());

    let replaced = |world: &World| Core::new(world.core.settings.clone(), 99, world.now);
    for _ in 0..2 {
        world.core = replaced(&world);
        world.pass(20 * SECOND);
        assert_eq!((world.node("b").drained, world.counts()[1]), (true, 0));
    }
    world.core.drain(&world.nodes, "b", true, world.now).unwrap();
    world.pass(5 * SECOND);
    assert!(!world.node("b").drained && world.counts()[1] > 0, "{:?}", world.counts());
    world.core = replaced(&world);
    world.pass(5 * SECOND);
    assert!(world.counts()[1] > 0, "{:?}", world.counts());

    world.core.drain(&world.nodes, "b", false, world.now).unwrap();
    world.pass(5 * SECOND);
    assert_eq!(world.counts()[1], 0);
    world.start("b", 1, 3);
    world.pass(5 * SECOND);
    assert!(!world.node("b").drained && world.counts()[1] > 0, "{:?}", world.counts());
}
