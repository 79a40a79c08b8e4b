//! What the controller decides, without IO: what nodes own and the time go in,
//! orders come out. It keeps no picture of its own of what nodes own: every order
//! is worked out from what they say they own, so a lost order or a restarted
//! controller needs no repair.

mod moves;
mod office;
mod sources;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh::placement::plan::steps::{self, Step};
use mesh::placement::plan::{Aim, Node, Plan, Problem, plan};
use proto::v1::{LayerExperts, Move, Order, Source};

use super::grid::Grid;

/// How long a mesh that starts may take until experts that nobody has brought
/// are loaded by those who are there.
const START: Duration = Duration::from_secs(10);
/// Quiet time after nodes came or went before experts are moved for balance.
const SETTLE: Duration = Duration::from_secs(2);
/// Between a new owner's appearance and the old one's drop: all routers know by then.
const PUBLISH: Duration = Duration::from_millis(200);
/// Before what could not be done is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How long a node that had no room, or failed, is taken to be full.
const SORE: Duration = Duration::from_secs(60);
/// Nodes of the past that are remembered.
const MOST_KNOWN: usize = 4096;
/// Experts that one order has a node load when nothing is missing, or that it has to fetch.
const CALM: usize = 32;

/// What the controller is told.
#[derive(Clone, Debug)]
pub struct Settings {
    pub grid: Grid,
    /// Owners that every expert should have.
    pub replicas: usize,
    /// How long an expert may have fewer before another node loads it.
    pub grace: Duration,
}

/// A live node as it describes itself.
#[derive(Clone, Debug)]
pub struct Seen {
    pub endpoint: String,
    pub id: String,
    pub incarnation: u64,
    pub capacity: Option<u64>,
    pub owned: Vec<bool>,
    /// Term of the newest order it obeyed.
    pub term: u64,
    /// It has not all weight files.
    pub partial: bool,
    /// It was told that it is to own nothing.
    pub drained: bool,
}

/// Orders to be given now, by endpoint. Either list is empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Orders {
    pub order: Order,
    pub load: Vec<(String, Vec<LayerExperts>)>,
    pub drop: Vec<(String, Vec<LayerExperts>)>,
    /// From whom nodes that have not all files fetch what they are to load.
    pub sources: BTreeMap<String, Vec<Source>>,
    /// Nodes that are to remember that they are drained, or no longer.
    pub drained: Vec<(String, bool)>,
}

/// How a node took an order that it did not carry out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// It obeys another controller.
    Deposed,
    /// It has no room, or cannot load what it should.
    Full,
    /// It did not answer, or is about to end.
    Other,
}

/// Why an operator's wish is not granted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no node is called `{node}`; connected are {known}")]
    Unknown { node: String, known: String },
    #[error("node {0} is the only one that is not drained: nobody could take its experts")]
    Last(String),
    #[error("experts are being moved: {0}")]
    Busy(String),
    #[error("{0}")]
    Deposed(String),
}

/// What is being done, for people.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Progress {
    pub order: Order,
    pub to_load: u32,
    pub to_drop: u32,
    pub detail: String,
}

/// What nodes are to own, by endpoint.
struct Goal {
    aim: Aim,
    wanted: BTreeMap<String, Vec<bool>>,
    /// When nothing was left to be loaded.
    loaded: Option<Instant>,
}

impl Goal {
    /// What each of `nodes` is to own.
    fn of(&self, nodes: &[Seen], cells: usize) -> Vec<Vec<bool>> {
        let wanted = |node: &Seen| self.wanted.get(&node.endpoint).cloned();
        nodes.iter().map(|node| wanted(node).unwrap_or_else(|| vec![false; cells])).collect()
    }
}

/// See the module's text.
pub struct Core {
    settings: Settings,
    order: Order,
    /// It takes its term itself, above all that nodes have obeyed.
    self_appointed: bool,
    started: Instant,
    /// Experts that have had a live owner.
    had: Vec<bool>,
    /// Every expert has had a live owner at the same time.
    was_whole: bool,
    /// Nodes that are live, by endpoint, in which incarnation.
    live: BTreeMap<String, u64>,
    /// The same of all that were ever seen.
    known: BTreeMap<String, u64>,
    /// When nodes last came or went.
    changed: Instant,
    /// A node has come since experts were last evened out.
    uneven: bool,
    /// Since when experts have fewer owners than they should.
    short: Option<Instant>,
    /// Nodes that are to own nothing, in which incarnation.
    draining: BTreeMap<String, u64>,
    sore: BTreeMap<String, Instant>,
    goal: Option<Goal>,
    not_before: Instant,
    deposed: Option<String>,
    progress: Progress,
}

impl Core {
    /// `term` is higher than that of any controller before it.
    pub fn new(settings: Settings, term: u64, now: Instant) -> Self {
        let had = vec![false; settings.grid.experts.cells()];
        Self {
            settings,
            order: Order { term, epoch: 0 },
            self_appointed: true,
            started: now,
            had,
            was_whole: false,
            live: BTreeMap::new(),
            known: BTreeMap::new(),
            changed: now,
            uneven: false,
            short: None,
            draining: BTreeMap::new(),
            sore: BTreeMap::new(),
            goal: None,
            not_before: now,
            deposed: None,
            progress: Progress::default(),
        }
    }

    pub fn progress(&self) -> Progress {
        let detail = self.deposed.clone().unwrap_or_else(|| self.progress.detail.clone());
        Progress { order: self.order, detail, ..self.progress }
    }

    /// The node is being emptied, or was.
    pub fn is_draining(&self, endpoint: &str) -> bool {
        self.draining.contains_key(endpoint)
    }

    /// Other nodes are live than at the last decision.
    pub fn is_outdated(&self, nodes: &[Seen]) -> bool {
        nodes.len() != self.live.len()
            || nodes.iter().any(|node| self.live.get(&node.endpoint) != Some(&node.incarnation))
    }

    /// What to order now, if anything. `load` is what each expert did lately.
    pub fn decide(&mut self, nodes: &[Seen], load: &[u64], now: Instant) -> Option<Orders> {
        self.look(nodes, now);
        if self.deposed.is_some() || now < self.not_before {
            return None;
        }
        let mut orders = self.place(nodes, load, now);
        let differs = |node: &&Seen| node.drained != self.is_draining(&node.endpoint);
        let marks: Vec<_> =
            nodes.iter().filter(differs).map(|n| (n.endpoint.clone(), !n.drained)).collect();
        if !marks.is_empty() {
            let bare = || Orders { order: self.order, ..Orders::default() };
            orders.get_or_insert_with(bare).drained = marks;
        }
        orders
    }

    fn place(&mut self, nodes: &[Seen], load: &[u64], now: Instant) -> Option<Orders> {
        if self.goal.is_none() {
            let aim = self.choose(nodes, now)?;
            self.aim_at(aim, nodes, load, now)?;
        }
        self.go_on(nodes, load, now)
    }

    /// Takes in who is there.
    fn look(&mut self, nodes: &[Seen], now: Instant) {
        if self.is_outdated(nodes) {
            let seen = nodes.iter().map(|node| (node.endpoint.clone(), node.incarnation));
            self.live = seen.collect();
            for Seen { endpoint, incarnation, drained, .. } in nodes {
                let before = self.known.insert(endpoint.clone(), *incarnation);
                let new = before != Some(*incarnation);
                self.uneven |= new && self.was_whole;
                if new && *drained {
                    // Whoever controlled before has drained it.
                    self.draining.insert(endpoint.clone(), *incarnation);
                }
            }
            if self.known.len() > MOST_KNOWN {
                self.known.clone_from(&self.live);
            }
            // A node that was started anew is at everybody's service.
            let known = &self.known;
            self.draining.retain(|endpoint, life| known.get(endpoint) == Some(life));
            (self.changed, self.not_before, self.goal) = (now, now, None);
        }
        self.sore.retain(|_, until| now < *until);
        if self.self_appointed && self.order.epoch == 0 {
            // Whoever controlled before had a clock that is ahead of ours.
            let newest = nodes.iter().map(|node| node.term + 1).max();
            self.order.term = self.order.term.max(newest.unwrap_or(0));
        }
        for node in nodes {
            self.had.iter_mut().zip(&node.owned).for_each(|(had, owned)| *had |= owned);
        }
    }

    /// Why something has to be done about who owns what, if it has.
    fn choose(&mut self, nodes: &[Seen], now: Instant) -> Option<Aim> {
        let problem = self.problem(nodes, &[]);
        let want = problem.owners_wanted();
        let (mut lost, mut absent, mut short, mut surplus) = (false, false, false, false);
        for cell in 0..problem.cells() {
            let owners = |draining: bool| {
                let of = problem.nodes.iter().filter(|node| node.draining == draining);
                of.filter(|node| node.owned[cell]).count()
            };
            let staying = owners(false);
            let missing = staying + owners(true) == 0;
            lost |= missing && (self.had[cell] || now - self.started >= START);
            absent |= missing;
            short |= staying < want;
            surplus |= staying > want;
        }
        if !absent && !self.was_whole {
            self.was_whole = true;
            self.uneven = problem.nodes.iter().any(|n| !n.draining && !n.owned.contains(&true));
        }
        let undrained =
            problem.nodes.iter().any(|node| node.draining && node.owned.contains(&true));
        if lost && want == 0 && !nodes.is_empty() {
            // Only nodes that are being emptied are left: they are needed after all.
            self.draining.clear();
            tracing::warn!("drains are given up, as no other node is left");
        }
        if lost || (undrained && want > 0) {
            return Some(Aim::Cover);
        }
        if absent {
            // They may be with nodes that are still starting.
            return None;
        }
        let since = short.then(|| *self.short.get_or_insert(now));
        self.short = since;
        if since.is_some_and(|since| now - since >= self.settings.grace) {
            return Some(Aim::Cover);
        }
        if !short {
            self.progress.detail.clear();
        }
        ((self.uneven || surplus) && now - self.changed >= SETTLE).then_some(Aim::Balance)
    }

    /// Makes a plan; `None` if there is nothing to do about it.
    fn aim_at(&mut self, aim: Aim, nodes: &[Seen], load: &[u64], now: Instant) -> Option<()> {
        let problem = self.problem(nodes, load);
        let Plan { owned, short } = plan(&problem, aim);
        self.uneven &= aim != Aim::Balance;
        self.progress.detail = match short.first() {
            None => String::new(),
            Some(&first) => {
                let (layer, expert) = self.settings.grid.experts.name(first);
                format!(
                    "{} experts have fewer owners than wanted for want of memory, \
                     first layer {layer} expert {expert}",
                    short.len()
                )
            }
        };
        if steps::next(&problem, &owned).is_done() {
            self.not_before = now + RETRY;
            return None;
        }
        self.order.epoch += 1;
        let endpoints = nodes.iter().map(|node| node.endpoint.clone());
        self.goal = Some(Goal { aim, wanted: endpoints.zip(owned).collect(), loaded: None });
        Some(())
    }

    /// The next orders on the way to the goal.
    fn go_on(&mut self, nodes: &[Seen], load: &[u64], now: Instant) -> Option<Orders> {
        let problem = self.problem(nodes, load);
        let goal = self.goal.as_mut()?;
        let wanted = goal.of(nodes, problem.cells());
        let (to_load, to_drop) = steps::left(&problem, &wanted);
        (self.progress.to_load, self.progress.to_drop) = (to_load as u32, to_drop as u32);
        let step = steps::next(&problem, &wanted);
        if step.is_done() || step.is_stuck() {
            if step.is_stuck() {
                self.progress.detail =
                    format!("{} moves wait for memory on the nodes they go to", step.waiting);
                self.not_before = now + RETRY;
            }
            self.goal = None;
            return None;
        }
        let Step { load, drop, .. } = step;
        let calm = goal.aim == Aim::Balance;
        let mut orders = Orders { order: self.order, ..Orders::default() };
        if load.is_empty() {
            if now - *goal.loaded.get_or_insert(now) < PUBLISH {
                return None;
            }
            orders.drop = self.by_node(nodes, &drop, |_| usize::MAX);
        } else {
            goal.loaded = None;
            let most = |node: &Seen| if calm || node.partial { CALM } else { usize::MAX };
            orders.load = self.by_node(nodes, &load, most);
            orders.sources = sources::of(&self.settings.grid, nodes, &orders);
        }
        Some(orders)
    }

    fn by_node(
        &self,
        nodes: &[Seen],
        cells: &[(usize, usize)],
        most: impl Fn(&Seen) -> usize,
    ) -> Vec<(String, Vec<LayerExperts>)> {
        let of = |at: usize| {
            let mine = cells.iter().filter(|(node, _)| *node == at).map(|(_, cell)| *cell);
            (nodes[at].endpoint.clone(), self.settings.grid.layers(mine.take(most(&nodes[at]))))
        };
        (0..nodes.len()).map(of).filter(|(_, layers)| !layers.is_empty()).collect()
    }

    /// A node did not carry out its order.
    pub fn failed(&mut self, endpoint: &str, failure: Failure, why: &str, now: Instant) {
        let balancing = self.goal.take().is_some_and(|goal| goal.aim == Aim::Balance);
        match failure {
            Failure::Deposed => {
                self.deposed = Some(format!("another controller is obeyed: {why}"));
            }
            Failure::Full => {
                self.sore.insert(endpoint.to_owned(), now + SORE);
            }
            Failure::Other => {
                self.not_before = now + RETRY / 2;
                self.uneven |= balancing;
            }
        }
        self.progress.detail = format!("node at {endpoint}: {why}");
    }

    /// Empties the node called `node`, by name or endpoint, or gives it experts
    /// again; returns its endpoint.
    ///
    /// # Errors
    /// It cannot be emptied.
    pub fn drain(
        &mut self,
        nodes: &[Seen],
        node: &str,
        cancel: bool,
        now: Instant,
    ) -> Result<String, Refusal> {
        self.look(nodes, now);
        self.in_office()?;
        let Some(found) = nodes.iter().find(|seen| seen.endpoint == node || seen.id == node) else {
            let known: Vec<&str> = nodes.iter().map(|seen| seen.id.as_str()).collect();
            return Err(Refusal::Unknown { node: node.to_owned(), known: known.join(", ") });
        };
        let endpoint = found.endpoint.clone();
        self.goal = None;
        self.not_before = now;
        if cancel {
            self.uneven |= self.draining.remove(&endpoint).is_some();
            return Ok(endpoint);
        }
        let stays = |seen: &Seen| seen.endpoint != endpoint && !self.is_draining(&seen.endpoint);
        if !nodes.iter().any(stays) {
            return Err(Refusal::Last(found.id.clone()));
        }
        self.draining.insert(endpoint.clone(), found.incarnation);
        Ok(endpoint)
    }

    /// Evens out what nodes own, or only says what that would move.
    ///
    /// # Errors
    /// Something else is under way.
    pub fn rebalance(
        &mut self,
        nodes: &[Seen],
        load: &[u64],
        dry_run: bool,
        now: Instant,
    ) -> Result<Vec<Move>, Refusal> {
        self.look(nodes, now);
        self.in_office()?;
        let problem = self.problem(nodes, load);
        if let Some(goal) = &self.goal {
            let (to_load, to_drop) = steps::left(&problem, &goal.of(nodes, problem.cells()));
            if to_load + to_drop > 0 {
                return Err(Refusal::Busy(format!("{to_load} to load, {to_drop} to drop")));
            }
            self.goal = None;
        }
        let planned = plan(&problem, Aim::Balance);
        let moves = self.moves(nodes, &problem, &planned);
        if !dry_run {
            self.not_before = now;
            self.aim_at(Aim::Balance, nodes, load, now);
        }
        Ok(moves)
    }

    fn in_office(&self) -> Result<(), Refusal> {
        self.deposed.clone().map_or(Ok(()), |why| Err(Refusal::Deposed(why)))
    }

    fn problem(&self, nodes: &[Seen], load: &[u64]) -> Problem {
        let grid = &self.settings.grid;
        let held = |seen: &Seen| -> u64 {
            let owned = seen.owned.iter().zip(&grid.bytes).filter(|(owned, _)| **owned);
            owned.map(|(_, bytes)| bytes).sum()
        };
        let sore = |seen: &Seen| self.sore.contains_key(&seen.endpoint);
        // What nobody owns nobody can be asked for: who has the files loads it, if there is one.
        let lost = |cell| !nodes.iter().any(|node| node.owned[cell]);
        let loads = |seen: &Seen| {
            let room = seen.capacity.is_none_or(|most| held(seen) < most);
            !seen.partial && room && !sore(seen) && !self.is_draining(&seen.endpoint)
        };
        let from_files = (0..grid.experts.cells()).any(lost) && nodes.iter().any(loads);
        let node = |seen: &Seen| {
            let full = sore(seen) || (seen.partial && from_files);
            let capacity = if full { Some(held(seen)) } else { seen.capacity };
            let draining = self.is_draining(&seen.endpoint);
            Node { capacity, draining, owned: seen.owned.clone() }
        };
        let mut load = load.to_vec();
        load.resize(grid.experts.cells(), 0);
        Problem {
            grid: grid.experts.clone(),
            group: grid.group,
            replicas: self.settings.replicas,
            bytes: grid.bytes.clone(),
            load,
            nodes: nodes.iter().map(node).collect(),
        }
    }
}
