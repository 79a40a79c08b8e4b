//! Nodes, a network and a router without threads or sockets: letters that take their time, and what
//! each side does with them.

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

pub const LAYER: LayerId = LayerId(1);
pub const EXPERTS: u32 = 8;
pub const NODES: usize = 5;
pub const REPLICAS: usize = 2;
const ROWS: usize = 3;
const STEP: Duration = Duration::from_millis(4);
const TICK: Duration = Duration::from_millis(100);
/// Silence after which a node hangs, and after which it is disconnected.
const HUNG: Duration = Duration::from_millis(200);
const CUT: Duration = Duration::from_secs(5);

/// SplitMix64.
pub struct Dice(u64);

impl Dice {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % end
    }

    pub fn ms(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_micros(1000 * from + self.below(1000 * (to - from)))
    }

    pub fn shuffled(&mut self, end: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..end).collect();
        (1..end).rev().for_each(|at| all.swap(at, self.below(at as u64 + 1) as usize));
        all
    }
}

#[derive(Clone)]
pub enum Letter {
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
pub struct Mail {
    due: Instant,
    node: usize,
    life: u64,
    letter: Letter,
}

#[derive(Default)]
pub struct Node {
    pub alive: bool,
    life: u64,
    owned: BTreeSet<u32>,
    obeyed: Order,
    /// Nothing comes or goes, since then.
    pub clogged: Option<Instant>,
}

/// What the router knows of a node that it is connected to.
pub struct View {
    life: u64,
    owned: BTreeSet<u32>,
    pub term: u64,
    hung: bool,
}

pub struct World {
    pub dice: Dice,
    pub now: Instant,
    pub nodes: Vec<Node>,
    pub views: BTreeMap<usize, View>,
    mail: Vec<Mail>,
    pub core: Core,
    /// The controller's own number, and the orders that it waits for.
    pub by: u64,
    pub waits: usize,
    next_tick: Instant,
    pub placement: Placement,
    exchange: Exchange,
    health: SharedHealth,
    experts: Vec<u32>,
    killed: Instant,
    /// Layers that ended, and those with every result.
    pub layers: usize,
    pub whole: usize,
    pub orders: usize,
}

fn grid() -> Grid {
    let experts = ExpertGrid { layers: vec![LAYER], experts: EXPERTS };
    Grid { experts, group: 2, bytes: vec![10; EXPERTS as usize] }
}

pub fn core(term: u64, now: Instant) -> Core {
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
    pub fn new(seed: u64) -> Self {
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

    pub fn start(&mut self, at: usize) {
        let share = shard(at as u16, NODES as u16, REPLICAS as u16, EXPERTS);
        let node = &mut self.nodes[at];
        node.life += 1;
        (node.alive, node.owned) = (true, share.into_iter().collect());
        (node.obeyed, node.clogged) = (Order::default(), None);
        self.describe(at, 20, 300);
    }

    pub fn describe(&mut self, at: usize, from: u64, to: u64) {
        let delay = self.dice.ms(from, to);
        let letter = Letter::Owns(self.nodes[at].owned.clone(), self.nodes[at].obeyed.term);
        self.post(at, letter, delay);
    }

    pub fn kill(&mut self, at: usize) {
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

    pub fn step(&mut self) {
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
            if self.exchange.encode(ticket, &rows, &[], None, &mut wire).is_none() {
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
