//! What decides in a mesh, together and in virtual time: controller and planner, placement, exchange
//! and health, over nodes and a network that a seed plays. Links clog one after the other and are
//! freed in another order, nodes are killed and come back, controllers are replaced; mail takes its
//! time and none is lost but with its connection. While that goes on, no result is ever wrong and no
//! order takes an expert's last owner; when it is over, all is well again within five seconds.
//!
//! `MOEMESH_SIM_SEEDS=N` plays more seeds, `MOEMESH_SIM_SEED=S` the one that failed.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use mesh::placement::plan::shard;
use mesh::placement::{ExpertGrid, NodeIndex, Placement};
use proto::v1::{
    DispatchError, DispatchFrame, DispatchReply, Dtype, ErrorCode, LayerExperts, Order,
};
use proto::wire::{self, Messages};
use proto::{ExpertId, LayerId};

use crate::controller::core::{Core, Failure, Orders, Seen, Settings};
use crate::controller::grid::Grid;
use crate::exchange::{Combine, Exchange, Outgoing, Patience, Shape, Wire};
use crate::health::{Policy, SharedHealth};

const LAYER: LayerId = LayerId(1);
const EXPERTS: u32 = 8;
const NODES: usize = 5;
const REPLICAS: usize = 2;
const ROWS: usize = 3;
const STEP: Duration = Duration::from_millis(4);
const TICK: Duration = Duration::from_millis(100);
/// Silence after which a node hangs, and after which it is disconnected.
const HUNG: Duration = Duration::from_millis(200);
const CUT: Duration = Duration::from_secs(5);
/// From the end of all faults to a mesh that is well.
const CONVERGED: Duration = Duration::from_secs(5);

/// SplitMix64.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % end
    }

    fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(1000 * from + self.below(1000 * (to - from)))
    }

    fn shuffled(&mut self, end: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..end).collect();
        (1..end).rev().for_each(|at| all.swap(at, self.below(at as u64 + 1) as usize));
        all
    }
}

#[derive(Clone)]
enum Letter {
    Frame(DispatchFrame),
    Reply(DispatchReply),
    /// Under which controller it was given, to load or to drop.
    Told {
        by: u64,
        order: Order,
        experts: Vec<u32>,
        load: bool,
    },
    /// Loading takes its time.
    Loaded {
        by: u64,
        experts: Vec<u32>,
    },
    Done {
        by: u64,
        failure: Option<Failure>,
    },
    Owns(BTreeSet<u32>, u64),
}

/// A letter to or from a node in one of its lives.
struct Mail {
    due: Instant,
    node: usize,
    life: u64,
    letter: Letter,
}

#[derive(Default)]
struct Node {
    alive: bool,
    life: u64,
    owned: BTreeSet<u32>,
    obeyed: Order,
    /// Nothing comes or goes, since then.
    clogged: Option<Instant>,
}

/// What the router knows of a node that it is connected to.
struct View {
    life: u64,
    owned: BTreeSet<u32>,
    term: u64,
    hung: bool,
}

struct World {
    dice: Dice,
    now: Instant,
    nodes: Vec<Node>,
    views: BTreeMap<usize, View>,
    mail: Vec<Mail>,
    core: Core,
    /// The controller's own number, and the orders that it waits for.
    by: u64,
    waits: usize,
    next_tick: Instant,
    placement: Placement,
    exchange: Exchange,
    health: SharedHealth,
    experts: Vec<u32>,
    killed: Instant,
    /// Layers that ended, and those with every result.
    layers: usize,
    whole: usize,
    orders: usize,
}

fn grid() -> Grid {
    let experts = ExpertGrid { layers: vec![LAYER], experts: EXPERTS };
    Grid { experts, group: 2, bytes: vec![10; EXPERTS as usize] }
}

fn core(term: u64, now: Instant) -> Core {
    let settings = Settings { grid: grid(), replicas: REPLICAS, grace: Duration::from_secs(3) };
    Core::new(settings, term, now)
}

fn row(row: usize) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&(100.0 * row as f32).to_le_bytes());
    bytes
}

/// The only right answer: a row's value plus its expert.
fn answer(frame: &DispatchFrame) -> DispatchReply {
    let mut experts = frame.experts.iter();
    let mut rows = Vec::new();
    for (row, &count) in frame.rows.chunks(8).zip(&frame.slot_counts) {
        let value = f32::from_le_bytes([row[0], row[1], row[2], row[3]]);
        for &expert in experts.by_ref().take(count as usize) {
            rows.extend((value + expert as f32).to_le_bytes());
            rows.extend([0; 4]);
        }
    }
    let (ticket, attempt, dtype) = (frame.ticket, frame.attempt, Dtype::F32 as i32);
    DispatchReply { ticket, attempt, dtype, hidden: 2, rows: rows.into(), ..Default::default() }
}

impl World {
    fn new(seed: u64) -> Self {
        let (now, mut dice) = (Instant::now(), Dice(seed));
        let shape = Shape {
            hidden: 2,
            dtype: Dtype::F32,
            top_k: 2,
            wire: Wire::Exact,
            combine: Combine::Router,
        };
        let patience =
            Patience { expert_wait: Duration::from_secs(10), busy: Duration::from_millis(5) };
        let policy = Policy { hedge: dice.below(2) == 0, ..Policy::default() };
        let health = SharedHealth::new(policy, seed, now);
        let mut world = Self {
            dice,
            now,
            nodes: (0..NODES).map(|_| Node::default()).collect(),
            views: BTreeMap::new(),
            mail: Vec::new(),
            core: core(1, now),
            by: 1,
            waits: 0,
            next_tick: now,
            placement: Placement::empty(grid().experts),
            exchange: Exchange::new(shape, patience, health.clone(), now, 0),
            health,
            experts: Vec::new(),
            killed: now,
            layers: 0,
            whole: 0,
            orders: 0,
        };
        (0..NODES).for_each(|node| world.start(node));
        world.begin();
        world
    }

    fn post(&mut self, node: usize, letter: Letter, delay: Duration) {
        // Within a connection letters keep their order; across connections they need not.
        let life = self.nodes[node].life;
        let after = self.mail.iter().filter(|mail| mail.node == node).map(|mail| mail.due).max();
        let due = match letter {
            Letter::Loaded { .. } => self.now + delay,
            _ => (self.now + delay).max(after.unwrap_or(self.now)),
        };
        self.mail.push(Mail { due, node, life, letter });
    }

    fn start(&mut self, at: usize) {
        let share = shard(at as u16, NODES as u16, REPLICAS as u16, EXPERTS);
        let node = &mut self.nodes[at];
        node.life += 1;
        (node.alive, node.owned) = (true, share.into_iter().collect());
        (node.obeyed, node.clogged) = (Order::default(), None);
        self.describe(at, 20, 300);
    }

    fn describe(&mut self, at: usize, from: u64, to: u64) {
        let delay = self.dice.ms(from, to);
        let letter = Letter::Owns(self.nodes[at].owned.clone(), self.nodes[at].obeyed.term);
        self.post(at, letter, delay);
    }

    fn kill(&mut self, at: usize) {
        (self.nodes[at].alive, self.killed) = (false, self.now);
        self.nodes[at].life += 1;
        self.mail.retain(|mail| mail.node != at);
        self.disconnect(at);
    }

    fn disconnect(&mut self, at: usize) {
        if self.views.remove(&at).is_some() {
            let index = NodeIndex(at as u16);
            self.health.lock().set_hung(index, false, self.now);
            self.exchange.on_down(index, &self.placement, self.now);
            self.health.lock().down(index, self.now);
            self.publish();
        }
    }

    fn publish(&mut self) {
        let owned: Vec<(usize, Vec<u32>)> = self
            .views
            .iter()
            .map(|(at, view)| (*at, view.owned.iter().copied().collect()))
            .collect();
        let owned =
            owned.iter().map(|(at, owned)| (NodeIndex(*at as u16), LAYER, owned.as_slice()));
        let next = self.placement.next(owned);
        if !next.same_owners(&self.placement) {
            self.placement = next;
            self.exchange.on_placement(&self.placement, self.now);
        }
    }

    fn begin(&mut self) {
        let pair = |dice: &mut Dice| {
            let first = dice.below(u64::from(EXPERTS)) as u32;
            let other = (first + 1 + dice.below(u64::from(EXPERTS) - 1) as u32) % EXPERTS;
            [first.min(other), first.max(other)]
        };
        self.experts = (0..ROWS).flat_map(|_| pair(&mut self.dice)).collect();
        self.exchange.begin(LAYER, &self.experts, String::new(), &self.placement, self.now);
    }

    /// Every result is its own; what has none is a gap.
    fn end(&mut self) {
        let gaps: BTreeSet<u32> = self.exchange.gaps().iter().map(|gap| gap.slot).collect();
        for (slot, &expert) in self.experts.iter().enumerate() {
            let want = 100.0 * (slot / 2) as f32 + expert as f32;
            let want = if gaps.contains(&(slot as u32)) { 0.0 } else { want };
            let got = f32::from_le_bytes(self.exchange.row(slot)[..4].try_into().unwrap());
            assert_eq!(got, want, "slot {slot}");
        }
        self.layers += 1;
        self.whole += usize::from(gaps.is_empty());
    }

    fn step(&mut self) {
        self.now += STEP;
        let (now, nodes) = (self.now, &self.nodes);
        let (mut due, later): (Vec<Mail>, Vec<Mail>) = std::mem::take(&mut self.mail)
            .into_iter()
            .partition(|mail| mail.due <= now && nodes[mail.node].clogged.is_none());
        self.mail = later;
        due.sort_by_key(|mail| mail.due);
        for Mail { node, life, letter, .. } in due {
            if self.nodes[node].life == life {
                self.deliver(node, letter);
            }
        }
        self.look();
        if self.now >= self.next_tick {
            self.next_tick += TICK;
            self.control();
        }
        self.exchange.on_time(&self.placement, self.now);
        self.send();
        if self.exchange.is_done() {
            self.end();
            self.begin();
            self.send();
        }
    }

    fn send(&mut self) {
        while let Some(Outgoing { node, ticket }) = self.exchange.outbox.pop() {
            let rows: Vec<u8> = (0..ROWS).flat_map(row).collect();
            let mut wire = BytesMut::new();
            self.exchange.encode(ticket, &rows, &[], &mut wire);
            if wire.is_empty() {
                continue;
            }
            let mut messages = Messages::new(1 << 20);
            messages.push(wire.freeze());
            let mut frame = DispatchFrame::default();
            wire::read(messages.take().unwrap().unwrap(), &mut frame).unwrap();
            let at = usize::from(node.0);
            if self.views.contains_key(&at) {
                let delay = self.dice.ms(0, 3);
                self.post(at, Letter::Frame(frame), delay);
            } else {
                self.exchange.on_unsent(ticket, &self.placement, self.now);
            }
        }
    }

    fn deliver(&mut self, at: usize, letter: Letter) {
        let index = NodeIndex(at as u16);
        match letter {
            Letter::Frame(frame) => {
                let reply = match frame.experts.iter().all(|e| self.nodes[at].owned.contains(e)) {
                    true => answer(&frame),
                    false => {
                        let code = ErrorCode::NotResident as i32;
                        let error = Some(DispatchError { code, message: "not here".into() });
                        let (ticket, rows) = (frame.ticket, Bytes::new());
                        DispatchReply { ticket, error, rows, ..Default::default() }
                    }
                };
                let delay = self.dice.ms(0, 4);
                self.post(at, Letter::Reply(reply), delay);
            }
            Letter::Reply(reply) => {
                self.exchange.on_reply(index, reply, &self.placement, self.now);
            }
            Letter::Told { by, order, experts, load } => {
                let node = &mut self.nodes[at];
                if (order.term, order.epoch) < (node.obeyed.term, node.obeyed.epoch) {
                    let failure = Some(Failure::Deposed);
                    return self.post(at, Letter::Done { by, failure }, STEP);
                }
                node.obeyed = order;
                if load {
                    let delay = self.dice.ms(10, 150);
                    return self.post(at, Letter::Loaded { by, experts }, delay);
                }
                experts.iter().for_each(|expert| _ = node.owned.remove(expert));
                for expert in experts {
                    let owners = self.nodes.iter().filter(|n| n.alive && n.owned.contains(&expert));
                    // Who was killed while the order was under way is nobody's fault.
                    let excused = self.now - self.killed < Duration::from_secs(6);
                    assert!(owners.count() > 0 || excused, "expert {expert} lost its last owner");
                }
                self.describe(at, 0, 5);
                self.post(at, Letter::Done { by, failure: None }, STEP);
            }
            Letter::Loaded { by, experts } => {
                self.nodes[at].owned.extend(experts);
                self.describe(at, 0, 5);
                self.post(at, Letter::Done { by, failure: None }, STEP);
            }
            Letter::Done { by, failure } => {
                if by == self.by {
                    self.waits = self.waits.saturating_sub(1);
                    if let Some(failure) = failure {
                        self.core.failed(&name(at), failure, "as played", self.now);
                    }
                }
            }
            Letter::Owns(owned, term) => {
                let life = self.nodes[at].life;
                self.views.insert(at, View { life, owned, term, hung: false });
                self.publish();
            }
        }
    }

    /// Notices who hangs, who goes on, and who is to be disconnected.
    fn look(&mut self) {
        for at in 0..NODES {
            let silent = self.nodes[at].clogged.map(|since| self.now - since);
            let hangs = silent.is_some_and(|silent| silent >= HUNG);
            let Some(view) = self.views.get_mut(&at) else { continue };
            let index = NodeIndex(at as u16);
            if std::mem::replace(&mut view.hung, hangs) != hangs {
                self.health.lock().set_hung(index, hangs, self.now);
                if hangs {
                    self.exchange.on_hung(index, &self.placement, self.now);
                }
            }
            if silent.is_some_and(|silent| silent >= CUT) {
                // What was on the connection is gone with it.
                self.mail.retain(|mail| mail.node != at);
                self.disconnect(at);
            }
        }
    }

    fn control(&mut self) {
        let seen: Vec<Seen> = self.views.iter().map(|(at, view)| seen(*at, view)).collect();
        if self.waits > 0 && !self.core.is_outdated(&seen) {
            return;
        }
        self.waits = 0;
        self.by += 1;
        let Some(Orders { order, load, drop, .. }) = self.core.decide(&seen, &[], self.now) else {
            return;
        };
        for (named, load) in [(load, true), (drop, false)] {
            for (endpoint, layers) in named {
                let Some(at) = (0..NODES).find(|at| name(*at) == endpoint) else { continue };
                let experts = layers.into_iter().flat_map(|LayerExperts { experts, .. }| experts);
                let (by, experts) = (self.by, experts.collect());
                self.waits += 1;
                self.orders += 1;
                let delay = self.dice.ms(0, 5);
                self.post(at, Letter::Told { by, order, experts, load }, delay);
            }
        }
    }

    /// Another controller takes over.
    fn replace(&mut self) {
        let term = self.views.values().map(|view| view.term).max().unwrap_or(0);
        self.core = core(term + 1 + self.dice.below(3), self.now);
        (self.by, self.waits) = (self.by + 1, 0);
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.step();
        }
    }

    fn free(&mut self, at: usize) {
        if self.nodes[at].clogged.take().is_some() && !self.views.contains_key(&at) {
            self.describe(at, 20, 300);
        }
    }

    fn harm(&mut self) {
        for at in self.dice.shuffled(NODES).into_iter().take(1 + self.dice.below(4) as usize) {
            if self.nodes[at].alive {
                self.nodes[at].clogged.get_or_insert(self.now);
            }
            let pause = self.dice.ms(50, 900);
            self.pass(pause);
            match self.dice.below(6) {
                0 => self.replace(),
                1 | 2 => {
                    let victim = self.dice.below(NODES as u64) as usize;
                    if self.nodes[victim].alive {
                        self.nodes[victim].clogged = None;
                        self.kill(victim);
                    } else {
                        self.start(victim);
                    }
                }
                _ => {}
            }
        }
        for at in self.dice.shuffled(NODES) {
            let pause = self.dice.ms(20, 600);
            self.pass(pause);
            self.free(at);
        }
    }

    fn heal(&mut self) {
        for at in 0..NODES {
            self.free(at);
            if !self.nodes[at].alive {
                self.start(at);
            }
        }
    }

    /// All are connected, every expert has an owner, and layers end with every result.
    fn is_well(&mut self) -> bool {
        let (layers, whole) = (self.layers, self.whole);
        self.pass(Duration::from_millis(100));
        let owned = self.views.len() == NODES && self.placement.missing().is_none();
        owned && self.layers > layers && self.layers - layers == self.whole - whole
    }
}

fn name(at: usize) -> String {
    format!("node-{at}")
}

fn seen(at: usize, view: &View) -> Seen {
    let cells = (0..EXPERTS).map(|expert| grid().experts.cell(LAYER, ExpertId(expert)));
    let mut owned = vec![false; EXPERTS as usize];
    for (expert, cell) in (0..).zip(cells) {
        owned[cell.unwrap()] = view.owned.contains(&expert);
    }
    Seen {
        endpoint: name(at),
        id: name(at),
        incarnation: view.life,
        capacity: None,
        owned,
        term: view.term,
        partial: false,
        drained: false,
    }
}

/// Plays one seed; how long it took to be well again, and how many layers there were.
fn play(seed: u64) -> (Duration, usize) {
    let mut world = World::new(seed);
    world.pass(Duration::from_secs(1));
    assert!(world.is_well(), "before anything happened");
    for _ in 0..3 {
        world.harm();
    }
    world.heal();
    let healed = world.now;
    while !world.is_well() {
        assert!(world.now - healed < CONVERGED, "not well: {} layers", world.layers);
    }
    let took = world.now - healed;
    // Then things come to rest, with as many owners as there should be.
    world.pass(Duration::from_secs(15));
    let orders = world.orders;
    world.pass(Duration::from_secs(2));
    assert_eq!(world.orders, orders, "it never comes to rest");
    for expert in 0..EXPERTS {
        let owners = world.placement.owners(LAYER, ExpertId(expert)).len();
        assert_eq!(owners, REPLICAS, "owners of expert {expert}");
    }
    (took, world.layers)
}

#[test]
fn whatever_clogs_and_dies_no_result_is_wrong_and_all_is_well_in_the_end() {
    let given = |name| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seeds = match given("MOEMESH_SIM_SEED") {
        Some(seed) => seed..seed + 1,
        None => {
            0..given("MOEMESH_SIM_SEEDS").unwrap_or(if cfg!(debug_assertions) { 60 } else { 500 })
        }
    };
    let (mut slowest, mut layers) = (Duration::ZERO, 0);
    let count = seeds.end - seeds.start;
    for seed in seeds {
        let played = std::panic::catch_unwind(|| play(seed));
        let (took, ended) = played.unwrap_or_else(|_| panic!("MOEMESH_SIM_SEED={seed} fails"));
        (slowest, layers) = (slowest.max(took), layers + ended);
    }
    println!("{count} seeds, {layers} layers, well again within {slowest:?}");
}
