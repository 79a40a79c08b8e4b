//! The actor that turns what links report into the placement that the engine
//! reads. It is the only writer of placements in this process; every change of
//! ownership is a new table with a higher epoch.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, AsyncContext as _, Context, Handler};
use arc_swap::ArcSwap;
use mesh::failpoint;
use mesh::lifecycle::Readiness;
use mesh::link::{FleetAddress, LinksChanged};
use mesh::membership::Links;
use mesh::placement::Placement;
use mesh::supervise::Pulse;
use proto::LayerId;

use crate::history::History;

/// What the fleet reads and publishes; cloned by its factory.
#[derive(Clone)]
pub struct FleetParts {
    pub links: Links,
    pub placement: Arc<ArcSwap<Placement>>,
    pub readiness: Readiness,
    /// How long requests are taken after an expert has lost its last owner; they
    /// wait for it to be had elsewhere.
    pub loss_grace: Duration,
    /// Who hears of changes after the fleet, if anybody.
    pub controller: FleetAddress,
    pub history: History,
}

/// See the module's text.
pub struct Fleet {
    parts: FleetParts,
    /// When the table ceased to be whole.
    lost: Option<Instant>,
    _pulse: Pulse,
}

impl Fleet {
    pub fn new(parts: FleetParts, pulse: Pulse) -> Self {
        Self { parts, lost: None, _pulse: pulse }
    }

    fn refresh(&mut self, ctx: &mut Context<Self>) {
        let FleetParts { links, placement, controller, history, .. } = &self.parts;
        // A node that is draining refuses frames.
        let live: Vec<_> = links
            .members()
            .iter()
            .filter_map(|link| link.description().map(|about| (link.node, about)))
            .filter(|(_, about)| !about.draining)
            .collect();
        let owned = live.iter().flat_map(|(node, about)| {
            about.owned.iter().map(|owned| (*node, LayerId(owned.layer), owned.experts.as_slice()))
        });
        let current = placement.load();
        let next = current.next(owned);
        let state = match next.missing() {
            None => Ok(()),
            Some(_) if live.is_empty() => {
                let known = links.members().len();
                Err(format!("waiting for nodes that own experts; {known} known, none connected"))
            }
            Some((count, layer, expert)) => Err(format!(
                "{count} experts have no live owner, first layer {layer} expert {expert}"
            )),
        };
        if !next.same_owners(&current) {
            let (epoch, nodes) = (next.epoch(), live.len());
            let was_whole = current.missing().is_none();
            match &state {
                Ok(()) => tracing::info!(%epoch, nodes, "placement is whole"),
                Err(missing) if was_whole => {
                    tracing::warn!(%epoch, nodes, missing, "experts were lost")
                }
                Err(missing) => tracing::info!(%epoch, nodes, missing, "waiting for experts"),
            }
            // Before it is published: a frame never goes out under an epoch not yet recorded.
            history.placement(&next, &live);
            placement.store(Arc::new(next));
        }
        if let Some(controller) = controller.load().as_ref() {
            // It looks around by itself, too.
            let _ = controller.try_send(LinksChanged);
        }
        self.tell(state, ctx);
    }

    /// Says whether requests are taken. Those that come shortly after a loss are.
    fn tell(&mut self, state: Result<(), String>, ctx: &mut Context<Self>) {
        let FleetParts { readiness, loss_grace, .. } = &self.parts;
        if state.is_ok() {
            self.lost = None;
        } else if readiness.get().is_ok() {
            let since = self.lost.get_or_insert_with(Instant::now).elapsed();
            if let Some(left) = loss_grace.checked_sub(since).filter(|left| !left.is_zero()) {
                ctx.run_later(left, Self::refresh);
                return;
            }
        }
        readiness.set(state);
    }
}

impl Actor for Fleet {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        // A rebuilt fleet may have missed a change.
        self.refresh(ctx);
    }
}

impl Handler<LinksChanged> for Fleet {
    type Result = ();

    fn handle(&mut self, _: LinksChanged, ctx: &mut Self::Context) {
        failpoint::pass("fleet");
        self.refresh(ctx);
    }
}
