//! The actor that turns what links report into the placement that the engine
//! reads. It is the only writer of placements in this process; every change of
//! ownership is a new table with a higher epoch.

use std::sync::Arc;

use actix::{Actor, Context, Handler};
use arc_swap::ArcSwap;
use mesh::failpoint;
use mesh::lifecycle::Readiness;
use mesh::link::{LinkHandle, LinksChanged};
use mesh::placement::Placement;
use mesh::supervise::Pulse;
use proto::LayerId;

use crate::history::History;

/// What the fleet reads and publishes; cloned by its factory.
#[derive(Clone)]
pub struct FleetParts {
    pub links: Arc<[Arc<LinkHandle>]>,
    pub placement: Arc<ArcSwap<Placement>>,
    pub readiness: Readiness,
    pub history: History,
}

/// See the module's text.
pub struct Fleet {
    parts: FleetParts,
    _pulse: Pulse,
}

impl Fleet {
    pub fn new(parts: FleetParts, pulse: Pulse) -> Self {
        Self { parts, _pulse: pulse }
    }

    fn refresh(&self) {
        let FleetParts { links, placement, readiness, history } = &self.parts;
        let live: Vec<_> = links
            .iter()
            .filter_map(|link| link.description().map(|about| (link.node, about)))
            .collect();
        let owned = live.iter().flat_map(|(node, about)| {
            about.owned.iter().map(|owned| (*node, LayerId(owned.layer), owned.experts.as_slice()))
        });
        let current = placement.load();
        let next = current.next(owned);
        let state = match next.missing() {
            None => Ok(()),
            Some((count, layer, expert)) => Err(format!(
                "{count} experts have no live owner, first layer {layer} expert {expert}"
            )),
        };
        readiness.set(state.clone());
        if next.same_owners(&current) {
            return;
        }
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
}

impl Actor for Fleet {
    type Context = Context<Self>;

    fn started(&mut self, _: &mut Self::Context) {
        // A rebuilt fleet may have missed a change.
        self.refresh();
    }
}

impl Handler<LinksChanged> for Fleet {
    type Result = ();

    fn handle(&mut self, _: LinksChanged, _: &mut Self::Context) {
        failpoint::pass("fleet");
        self.refresh();
    }
}
