//! Dispatch and gather without an engine: links, placement and exchange as a
//! router has them, driven by whoever wants to know what they cost.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use mesh::lifecycle::Readiness;
use mesh::link::{FleetAddress, Identity};
use mesh::membership::Links;
use mesh::metrics::Metrics;
use mesh::near::Shortcut;
use mesh::placement::{ExpertGrid, Placement};
use mesh::pump::Pump;
use mesh::transport::Endpoint;
use model::{Routed, Share};
use proto::wire::Leaving;
use proto::{Epoch, LayerId};
use tokio::sync::mpsc;
use tracing::Span;

use crate::actors::{self, Actors, Cast};
use crate::exchange::{Exchange, Lack, Patience, Shape};
use crate::experts::remote::{Looking, Remote};
use crate::experts::spin::Spin;
use crate::fleet::FleetParts;
use crate::health::{Counts, Policy, SharedHealth};
use crate::history::History;
use crate::metrics::RouterMetrics;

const PATIENCE: Duration = Duration::from_secs(10);

/// The nodes to talk to and the model they serve one layer of.
pub struct Config {
    pub nodes: Vec<Endpoint>,
    pub identity: Identity,
    pub shape: Shape,
    pub layer: LayerId,
    pub experts: u32,
    /// Whether rows stand in memory that is shared with nodes of this host.
    pub shared_rows: Shortcut,
}

/// Links to nodes that are all up.
pub struct Dispatcher {
    remote: Remote,
    layer: LayerId,
    actors: Option<Actors>,
}

impl Dispatcher {
    /// Connects on the thread that will use it.
    ///
    /// # Errors
    /// What is missing when patience ran out.
    pub fn connect(config: Config) -> Result<Self, String> {
        let Config { nodes, identity, shape, layer, experts, shared_rows } = config;
        let links = Links::new(nodes);
        let grid = ExpertGrid { layers: vec![layer], experts };
        let placement = Arc::new(ArcSwap::from_pointee(Placement::empty(grid)));
        let readiness = Readiness::starting("no node has answered yet");
        let (link_events, events) = mpsc::channel(4096);
        let pump = Pump::new().map_err(|error| error.to_string())?;
        let actors = actors::start(Cast {
            fleet: Some(FleetParts {
                links: links.clone(),
                placement: placement.clone(),
                readiness: readiness.clone(),
                history: History::default(),
                loss_grace: Duration::ZERO,
                controller: FleetAddress::default(),
            }),
            intake: None,
            controller: None,
            identity,
            link_events,
            pump: pump.handle(),
            tls: None,
            shared_rows,
        })
        .map_err(|error| error.to_string())?;
        let patience = Patience { expert_wait: PATIENCE, busy: Duration::from_millis(5) };
        let now = Instant::now();
        let health = SharedHealth::new(Policy::default(), 1, now);
        let remote = Remote {
            lanes: std::array::from_fn(|lane| {
                (Exchange::new(shape, patience, health.clone(), now, lane), now)
            }),
            links,
            events,
            looking: Looking::new(now),
            pump: pump.clone(),
            coded: Default::default(),
            wire: Leaving::default(),
            placement,
            metrics: Metrics::default().register(RouterMetrics::new),
            epoch: Epoch(0),
            spin: Spin::default(),
            health,
            any_hung: false,
            counted: Counts::default(),
            history: History::default(),
        };
        while let Err(missing) = readiness.get() {
            if now.elapsed() > PATIENCE {
                actors.stop();
                return Err(missing);
            }
            pump.run_for(Duration::from_millis(1), std::future::pending::<()>());
        }
        Ok(Self { remote, layer, actors: Some(actors) })
    }

    /// One layer's rows to their experts and back, as an engine does it.
    ///
    /// # Errors
    /// The first result that could not be had.
    pub fn round_trip(&mut self, routed: &Routed<'_>) -> Result<(), Lack> {
        self.remote.send(0, self.layer, routed, &Span::none());
        self.remote.wait(0, routed);
        match self.remote.lanes[0].0.gaps().first() {
            Some(gap) => Err(Lack::clone(&gap.lack)),
            None => Ok(()),
        }
    }

    /// Which way goes to each node.
    pub fn ways(&self) -> Vec<String> {
        self.remote.links.members().iter().map(|link| link.detail()).collect()
    }

    /// What a slot brings to its row's sum.
    pub fn share(&self, slot: usize) -> Share<'_> {
        self.remote.share(0, slot)
    }

    /// The result of a slot.
    pub fn row(&self, slot: usize) -> &[u8] {
        self.remote.row(0, slot)
    }
}

impl Drop for Dispatcher {
    fn drop(&mut self) {
        if let Some(actors) = self.actors.take() {
            actors.stop();
        }
    }
}
