//! The one writer of who owns what: an actor on one router of the mesh, which
//! watches what nodes own and orders them to load and drop experts. Other routers
//! follow what nodes say; where routers stand for election, the actors of those
//! not in office only watch. Rooms:
//!
//! - [`core`]: what is to be ordered (sans-IO)
//! - [`term`]: whether this router may order anything now
//! - [`grid`], [`tally`]: experts and their load as the planner sees them
//! - [`orders`]: orders given to nodes over gRPC

pub mod core;
pub mod grid;
pub mod orders;
pub mod tally;
mod term;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use actix::{
    Actor, ActorFutureExt as _, Addr, AsyncContext as _, Context, Handler, Message, SpawnHandle,
    WrapFuture as _,
};
use arc_swap::{ArcSwap, ArcSwapOption};
use mesh::link::LinksChanged;
use mesh::membership::Links;
use mesh::registry::office::Office;
use mesh::supervise::Pulse;
use mesh::tls::Tls;
use proto::v1::Move;

use self::core::{Core, Orders, Progress, Refusal, Seen, Settings};
use self::orders::{Channels, Outcome, Target, Told};
use self::tally::{Counted, Tally};
use self::term::Elected;
use crate::history::History;

/// How often the controller looks around without being told to.
const TICK: Duration = Duration::from_millis(100);
/// How often nodes are asked how much their experts work.
const MEASURE: Duration = Duration::from_secs(5);

/// What the service and the actor share.
pub struct Door {
    pub address: ArcSwapOption<Addr<Controller>>,
    pub report: ArcSwap<Report>,
    pub replicas: usize,
    /// What it is elected to; `None` where the configuration names one controller.
    pub office: Option<Office>,
}

impl Door {
    pub fn new(replicas: usize, office: Option<Office>) -> Arc<Self> {
        let (address, report) = (ArcSwapOption::empty(), ArcSwap::default());
        Arc::new(Self { address, report, replicas, office })
    }

    /// Whether this router may order anything now.
    ///
    /// # Errors
    /// Why not.
    pub fn in_office(&self) -> Result<(), String> {
        self.office.as_ref().map_or(Ok(()), |office| office.term(Instant::now()).map(drop))
    }

    /// What the controller said last, if it is in office and was when it said so.
    pub fn account(&self) -> Option<Arc<Report>> {
        let report = self.report.load_full();
        let of_now =
            |office: &Office| office.term(Instant::now()) == Ok(report.progress.order.term);
        self.office.as_ref().is_none_or(of_now).then_some(report)
    }
}

/// What the controller last said of itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Report {
    pub progress: Progress,
    /// Endpoints of nodes that are being emptied, or were.
    pub draining: Vec<String>,
}

/// Everything a controller needs; cloned by its factory for each rebuild.
#[derive(Clone)]
pub struct ControllerParts {
    pub settings: Settings,
    pub links: Links,
    pub tls: Option<Tls>,
    pub door: Arc<Door>,
    pub history: History,
}

/// An operator's wish: empty this node, or no longer. Returns its endpoint.
#[derive(Message)]
#[rtype(result = "Result<String, Refusal>")]
pub struct DrainNode {
    pub node: String,
    pub cancel: bool,
}

/// An operator's wish: even out what nodes own.
#[derive(Message)]
#[rtype(result = "Result<Vec<Move>, Refusal>")]
pub struct Rebalance {
    pub dry_run: bool,
}

/// See the module's text.
pub struct Controller {
    parts: ControllerParts,
    core: Core,
    tally: Tally,
    channels: Channels,
    /// The orders that are being carried out.
    busy: Option<SpawnHandle>,
    measuring: bool,
    /// What it does in its term, if it is elected.
    elected: Option<Elected>,
    _pulse: Pulse,
}

impl Controller {
    pub fn new(parts: ControllerParts, pulse: Pulse) -> Self {
        let (settings, now) = (parts.settings.clone(), Instant::now());
        let elected = parts.door.office.clone().map(|office| Elected::new(office, now));
        let core = match &elected {
            Some(_) => Core::standby(settings, now),
            None => Core::new(settings, own_term(), now),
        };
        let (tally, channels) = (Tally::default(), Channels::default());
        Self { parts, core, tally, channels, busy: None, measuring: false, elected, _pulse: pulse }
    }

    /// The live nodes that take orders, by name.
    fn seen(&self) -> Vec<Seen> {
        let grid = &self.parts.settings.grid;
        let mut seen: Vec<Seen> = self
            .parts
            .links
            .members()
            .iter()
            .filter_map(|link| Some((link.endpoint.to_string(), link.description()?)))
            .filter(|(_, about)| !about.draining)
            .map(|(endpoint, about)| Seen {
                endpoint,
                id: about.node_id.clone(),
                incarnation: about.incarnation,
                capacity: (about.capacity_bytes > 0).then_some(about.capacity_bytes),
                owned: grid.owned(&about.owned),
                term: about.obeyed.unwrap_or_default().term,
                partial: about.partial,
                drained: about.drained,
            })
            .collect();
        seen.sort_by(|a, b| (&a.id, &a.endpoint).cmp(&(&b.id, &b.endpoint)));
        // One process under two addresses owns its experts once.
        seen.dedup_by(|b, a| (&a.id, a.incarnation) == (&b.id, b.incarnation));
        seen
    }

    fn wake(&mut self, ctx: &mut Context<Self>) {
        let seen = self.seen();
        if self.may_order(&seen, ctx).is_err() {
            return;
        }
        if let Some(running) = self.busy {
            if !self.core.is_outdated(&seen) {
                return;
            }
            // Who is gone is not waited for; what others were told they do, and
            // telling them again does no harm.
            ctx.cancel_future(running);
            self.busy = None;
        }
        let load = self.tally.rows(&self.parts.settings.grid);
        let orders = self.core.decide(&seen, &load, Instant::now());
        self.report(&seen);
        let Some(orders) = orders else { return };
        let targets = self.targets(orders);
        let giving = orders::give(targets, self.parts.history.clone());
        let carried_out = giving.into_actor(self).map(|outcomes, controller, _| {
            controller.busy = None;
            controller.take(outcomes);
        });
        self.busy = Some(ctx.spawn(carried_out));
    }

    fn targets(&mut self, orders: Orders) -> Vec<Target<Told>> {
        orders::targets(orders, |endpoint| self.channel(endpoint))
    }

    fn channel(&mut self, endpoint: &str) -> Option<tonic::transport::Channel> {
        let members = self.parts.links.members();
        let link = members.iter().find(|link| link.endpoint.to_string() == endpoint)?;
        let id = link.description()?.node_id.clone();
        self.channels.get(&link.endpoint, &id, self.parts.tls.as_ref())
    }

    fn take(&mut self, outcomes: Vec<Outcome>) {
        for Outcome { endpoint, failure } in outcomes {
            if let Some((failure, why)) = failure {
                tracing::warn!(node = endpoint, why, "an order was not carried out");
                self.core.failed(&endpoint, failure, &why, Instant::now());
            }
        }
    }

    fn report(&self, seen: &[Seen]) {
        let draining = seen.iter().filter(|node| self.core.is_draining(&node.endpoint));
        let draining = draining.map(|node| node.endpoint.clone()).collect();
        let report = Report { progress: self.core.progress(), draining };
        if **self.parts.door.report.load() != report {
            let Progress { order, to_load, to_drop, detail } = &report.progress;
            tracing::info!(
                term = order.term,
                epoch = order.epoch,
                to_load,
                to_drop,
                detail,
                "placing"
            );
            self.parts.door.report.store(Arc::new(report));
        }
    }

    fn measure(&mut self, ctx: &mut Context<Self>) {
        if self.parts.door.in_office().is_err() || std::mem::replace(&mut self.measuring, true) {
            return;
        }
        let nodes: Vec<Target<u64>> = self
            .seen()
            .into_iter()
            .filter_map(|seen| {
                let channel = self.channel(&seen.endpoint)?;
                Some(Target { endpoint: seen.endpoint, channel, what: seen.incarnation })
            })
            .collect();
        let measured = orders::measure(nodes).into_actor(self);
        ctx.spawn(measured.map(|counted: Vec<Counted>, controller, _| {
            controller.measuring = false;
            controller.tally.take(counted, &controller.parts.settings.grid);
        }));
    }
}

/// Terms rise from life to life of a controller; nodes that obeyed a higher one
/// raise it further.
fn own_term() -> u64 {
    let term = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    term.map_or(1, |since| since.as_millis() as u64)
}

impl Actor for Controller {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        ctx.run_interval(TICK, |controller, ctx| controller.wake(ctx));
        ctx.run_interval(MEASURE, |controller, ctx| controller.measure(ctx));
        self.measure(ctx);
    }
}

impl Handler<LinksChanged> for Controller {
    type Result = ();

    fn handle(&mut self, _: LinksChanged, ctx: &mut Self::Context) {
        self.wake(ctx);
    }
}

impl Handler<DrainNode> for Controller {
    type Result = Result<String, Refusal>;

    fn handle(&mut self, wish: DrainNode, ctx: &mut Self::Context) -> Self::Result {
        let seen = self.seen();
        self.may_order(&seen, ctx)?;
        let drained = self.core.drain(&seen, &wish.node, wish.cancel, Instant::now())?;
        tracing::info!(node = drained, cancel = wish.cancel, "told to drain");
        self.wake(ctx);
        Ok(drained)
    }
}

impl Handler<Rebalance> for Controller {
    type Result = Result<Vec<Move>, Refusal>;

    fn handle(&mut self, wish: Rebalance, ctx: &mut Self::Context) -> Self::Result {
        let (seen, load) = (self.seen(), self.tally.rows(&self.parts.settings.grid));
        self.may_order(&seen, ctx)?;
        let moves = self.core.rebalance(&seen, &load, wish.dry_run, Instant::now())?;
        self.wake(ctx);
        Ok(moves)
    }
}
