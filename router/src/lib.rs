//! The router: drives sequences through the trunk and sends each token's rows
//! to the nodes that own its experts. Rooms, in the order a request meets them:
//!
//! - [`service`]: gRPC in, checked; events out
//! - [`intake`]: the engine's actor: admission
//! - [`scheduler`]: who computes what in the next step (pure)
//! - [`engine`]: the loop over steps and layers, on its own thread
//! - [`experts`]: the seam to the experts, local or remote
//! - [`exchange`]: one layer's dispatch, retry and gather (sans-IO)
//! - [`health`]: whom to ask, how long to wait, whom to leave alone (sans-IO)
//! - [`history`]: an event log, for checking a run afterwards
//! - [`fleet`]: the actor that publishes placements
//! - [`controller`]: on one router of the mesh, the actor that decides them
//! - [`operations`]: gRPC for operators, and for nodes that join
//! - `registered`: what a router does where etcd keeps the members
//! - `choice`: which of two ways is measured to be faster here
//! - [`measure`]: dispatch and gather without an engine, to be timed

#![forbid(unsafe_code)]

mod actors;
mod choice;
pub mod controller;
pub mod engine;
pub mod exchange;
pub mod experts;
pub mod fleet;
pub mod health;
pub mod history;
pub mod intake;
mod loaded;
pub mod measure;
pub mod metrics;
pub mod operations;
mod registered;
pub mod scheduler;
pub mod service;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use kernels::Isa;
use mesh::admin;
use mesh::lifecycle::{Readiness, Shutdown};
use mesh::link::{FleetAddress, Identity};
use mesh::membership::Links;
use mesh::metrics::Metrics;
use mesh::near::Shortcut;
use mesh::placement::{ExpertGrid, Placement};
use mesh::pump::Pump;
use mesh::registry::office::Office;
use mesh::registry::{Etcd, Member};
use mesh::tls::{self, TlsError};
use mesh::transport::{self, Endpoint, TransportError};
use model::gpu::GpuStartError;
use model::sample::Scratch;
use model::{Checkpoint, Device, ExpertDevice, GpuError, KvError, LoadError, Numerics, mesh_class};
use proto::v1::Dtype;
use proto::v1::inference_server::InferenceServer;
use proto::v1::operations_server::OperationsServer;
use proto::wire::Leaving;
use proto::{Epoch, LayerId, MAX_MESSAGE_BYTES};
use tokio::sync::{mpsc, watch};
use tonic::service::Routes;

use crate::controller::grid::Grid;
use crate::controller::{ControllerParts, Door};
pub use crate::engine::Splitting;
use crate::engine::{Engine, Gauges};
pub use crate::exchange::{Combine, Wire};
use crate::exchange::{Exchange, Patience, Shape};
use crate::experts::Experts;
use crate::experts::local::Local;
use crate::experts::remote::{Looking, Remote};
use crate::experts::spin::Spin;
pub use crate::health::Policy;
use crate::health::{Counts, SharedHealth};
use crate::history::History;
use crate::loaded::Loaded;
use crate::metrics::RouterMetrics;
use crate::operations::OperationsService;
use crate::scheduler::{Limits, Scheduler};
use crate::service::{Facts, Service, View};

/// Pause before a frame is offered again to a node that was busy.
const BUSY_PAUSE: Duration = Duration::from_millis(5);
/// Replies and link notices that may wait for the engine.
const LINK_EVENTS: usize = 4096;

/// What a router is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The router's name in the mesh.
    pub id: String,
    pub listen: Endpoint,
    /// Where `/metrics`, `/healthz` and `/readyz` are served, if anywhere.
    pub admin: Option<Endpoint>,
    /// This router's certificate and whom it trusts; `None` is plain text.
    pub tls: Option<tls::Files>,
    pub model_dir: PathBuf,
    pub numerics: Numerics,
    /// The expert nodes; empty keeps the experts inside the router, unless etcd knows more.
    pub nodes: Vec<Endpoint>,
    /// Where the members of the mesh are kept, if not only in configurations.
    pub etcd: Option<Etcd>,
    /// Where gateways that learn of it reach it, if not at `listen`.
    pub advertise: Option<Endpoint>,
    pub threads: usize,
    /// Position of the CPU that the first of them is bound to; `None` leaves them free.
    pub first_cpu: Option<usize>,
    /// `None` takes the best the CPU has.
    pub isa: Option<Isa>,
    /// What computes the trunk.
    pub device: Device,
    /// What the nodes compute experts on.
    pub expert_device: ExpertDevice,
    /// Tokens the KV cache holds, over all sequences.
    pub kv_tokens: usize,
    pub page_tokens: usize,
    /// Tokens computed in one step.
    pub step_tokens: usize,
    /// Tokens of one prompt computed in one step.
    pub prefill_chunk: usize,
    /// Time between two tokens of a stream that prompts may not push beyond;
    /// `None` shares a step's time fairly among sequences.
    pub tpot_target: Option<Duration>,
    /// Whether steps run as two micro-batches.
    pub micro_batches: Splitting,
    /// How rows travel to expert nodes and back.
    pub wire: Wire,
    /// Who sums a token's results.
    pub combine: Combine,
    /// Whether large frames' rows stand in memory that is shared with nodes of this host.
    pub shared_rows: Shortcut,
    pub max_running: usize,
    pub max_waiting: usize,
    /// This router decides which node owns which expert: one router of a mesh does. With
    /// etcd it stands for election.
    pub controller: bool,
    /// Owners that the controller gives every expert.
    pub replicas: usize,
    /// How long an expert may have fewer before another node loads it.
    pub replica_grace: Duration,
    /// How long requests are taken after an expert has lost its last owner.
    pub loss_grace: Duration,
    /// How long a step waits for an expert without a live owner.
    pub expert_wait: Duration,
    /// Whom to ask and when to ask another one.
    pub policy: Policy,
    pub request_timeout: Duration,
    /// Where the event log goes, if anywhere.
    pub history: Option<PathBuf>,
}

/// Why a router did not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Kv(#[from] KvError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot serve metrics: {0}")]
    Admin(std::io::Error),
    #[error("cannot write the history {0}: {1}")]
    History(PathBuf, std::io::Error),
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
    #[error("the engine panicked; the router cannot compute any more")]
    Engine,
    #[error("device = \"{0}\": {1}")]
    Device(Device, GpuStartError),
    #[error("the router cannot compute any more: {0}")]
    Gpu(GpuError),
}

/// Loads, binds, serves, and drains when `shutdown` is triggered: new requests
/// are refused, running ones finish.
pub async fn serve(config: Config, shutdown: Shutdown) -> Result<(), Error> {
    let readiness = Readiness::starting("loading the trunk");
    let registry = Metrics::default();
    let metrics = registry.register(RouterMetrics::new);
    let owner = tls::Owner { role: tls::Role::Router, id: None };
    let tls = tls::start(config.tls.as_ref(), owner, &registry, &shutdown)?;
    let listener = transport::bind(&config.listen).await?;
    let side = match &config.admin {
        Some(endpoint) => Some(transport::bind(endpoint).await?),
        None => None,
    };

    // Served from now on, so that whoever waits for the router can see how far it is.
    let side = side.map(|listener| {
        let (stop, ready) = (shutdown.clone(), readiness.clone());
        tokio::spawn(admin::serve(listener, registry, ready, async move { stop.wait().await }))
    });

    let alone = config.nodes.is_empty() && config.etcd.is_none();
    let Loaded { checkpoint, isa, trunk, device, pages, kv, steps } = loaded::load(&config, alone)?;
    let model = checkpoint.config();
    let compute = trunk.compute().clone();
    let sampling = Scratch::new(compute.kernels);
    let history = History::open(config.history.as_deref(), &config.id)
        .map_err(|error| Error::History(config.history.clone().unwrap_or_default(), error))?;

    let links = Links::new(config.nodes.iter().cloned());
    let grid = grid(&checkpoint)?;
    let placement = Arc::new(ArcSwap::from_pointee(Placement::empty(grid.experts.clone())));
    let (link_events, events) = mpsc::channel(LINK_EVENTS);
    let pump = Pump::new()?;
    let health = SharedHealth::new(config.policy, seed(&config.id), Instant::now());
    let experts = if alone {
        readiness.set(Ok(()));
        Experts::Local(Box::new(Local::load(&checkpoint, config.numerics, compute, config.wire)?))
    } else {
        readiness.set(Err("no expert node has answered yet".to_owned()));
        let shape = shape(&config, model);
        let patience = Patience { expert_wait: config.expert_wait, busy: BUSY_PAUSE };
        Experts::Remote(Box::new(Remote {
            lanes: std::array::from_fn(|lane| {
                let now = Instant::now();
                (Exchange::new(shape, patience, health.clone(), now, lane), now)
            }),
            links: links.clone(),
            events,
            looking: Looking::new(Instant::now()),
            pump: pump.clone(),
            coded: Default::default(),
            wire: Leaving::default(),
            placement: placement.clone(),
            metrics: metrics.clone(),
            epoch: Epoch(0),
            spin: Spin::default(),
            health: health.clone(),
            any_hung: false,
            counted: Counts::default(),
            history: history.clone(),
        }))
    };

    let gauges = Arc::new(Gauges::default());
    let (jobs, inbox) = mpsc::channel(config.max_waiting.max(1));
    let engine = Engine::new(engine::Parts {
        trunk,
        draws_on_device: config.device != Device::Cpu,
        kv,
        steps,
        experts,
        expert_wait: config.expert_wait,
        scheduler: Scheduler::new(limits(&config)),
        sampling,
        splitting: match config.micro_batches {
            // Processes of one host share its cores: whoever waits leaves them to the others.
            Splitting::Auto if alone || one_host(&config) => Splitting::Never,
            other => other,
        },
        jobs: inbox,
        pump: pump.clone(),
        gauges: gauges.clone(),
        metrics: metrics.clone(),
        history: history.clone(),
    });
    let (engine_ended, lost) = run_engine(engine)?;

    let view = Arc::new(View {
        intake: ArcSwapOption::empty(),
        gauges: gauges.clone(),
        links: links.clone(),
        placement: placement.clone(),
        health,
        readiness: readiness.clone(),
        metrics,
        shutdown: shutdown.clone(),
    });
    let class = config.device.trunk_class(config.numerics, isa, &checkpoint)?;
    // Experts inside the router are computed on the CPU, wherever the trunk is.
    let nodes = if alone { ExpertDevice::Cpu } else { config.expert_device };
    let experts = nodes.class(config.numerics, isa, &checkpoint)?;
    let combine = if alone { Combine::Router } else { config.combine };
    let facts = Facts {
        router_id: config.id.clone(),
        model_digest: checkpoint.digest(),
        numerics: exchange::class(mesh_class(&class, &experts), config.wire, combine),
        device,
        vocab: model.vocab,
        max_context: model.max_positions,
        kv_pages: pages,
        page_tokens: config.page_tokens,
        max_waiting: config.max_waiting,
        request_timeout: config.request_timeout,
    };
    let intake_parts = intake::IntakeParts {
        jobs,
        gauges,
        max_waiting: config.max_waiting,
        shutdown: shutdown.clone(),
        engine_ended: engine_ended.clone(),
    };
    let stands = config.controller && !alone;
    let office = (stands && config.etcd.is_some()).then(Office::default);
    let controller = stands.then(|| ControllerParts {
        settings: controller::core::Settings {
            grid,
            replicas: config.replicas,
            grace: config.replica_grace,
        },
        links: links.clone(),
        tls: tls.clone(),
        door: Door::new(config.replicas, office.clone()),
        history: history.clone(),
    });
    let operations = OperationsService {
        router_id: config.id.clone(),
        links: links.clone(),
        placement: placement.clone(),
        alone,
        controller: controller.as_ref().map(|parts| parts.door.clone()),
        checkpoint: checkpoint.clone(),
    };
    let registered = config.etcd.as_ref().map(|etcd| {
        let me = Member {
            role: tls::Role::Router,
            id: config.id.clone(),
            endpoint: config.advertise.clone().unwrap_or_else(|| listener.local()),
            model: facts.model_digest,
        };
        registered::start(etcd, me, links.clone(), office, &shutdown)
    });
    let fleet = fleet::FleetParts {
        links,
        placement,
        readiness: readiness.clone(),
        history,
        loss_grace: config.loss_grace,
        controller: FleetAddress::default(),
    };
    let actors = actors::start(actors::Cast {
        fleet: (!alone).then_some(fleet),
        controller,
        intake: Some((intake_parts, view.clone())),
        identity: Identity {
            model_digest: facts.model_digest.to_vec(),
            numerics: experts,
            hidden: model.hidden as u32,
        },
        link_events,
        pump: pump.handle(),
        tls: tls.clone(),
        shared_rows: config.shared_rows,
    })?;

    let service = InferenceServer::new(Service::new(facts, view.clone()))
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    tracing::info!(endpoint = %listener.local(), nodes = config.nodes.len(), "router serves");
    // Draining: the server refuses new connections and calls, and returns when
    // the running ones have ended.
    let stop = shutdown.clone();
    let operations = OperationsServer::new(operations).max_encoding_message_size(MAX_MESSAGE_BYTES);
    let routes = Routes::new(service).add_service(operations);
    transport::serve_grpc(listener, routes, tls.as_ref(), async move { stop.wait().await }).await?;
    if let Some(registered) = registered {
        registered.join_all().await;
    }
    let died = *engine_ended.borrow();
    actors.stop();
    if let Some(side) = side
        && let Ok(served) = side.await
    {
        served.map_err(Error::Admin)?;
    }
    match (lost.get(), died) {
        (Some(error), _) => Err(Error::Gpu(error.clone())),
        (None, true) => Err(Error::Engine),
        (None, false) => Ok(()),
    }
}

/// What of a layer goes to the nodes, and how.
fn shape(config: &Config, model: &model::Config) -> Shape {
    Shape {
        hidden: model.hidden as u32,
        dtype: match config.numerics {
            Numerics::F32 => Dtype::F32,
            Numerics::Bf16 => Dtype::Bf16,
        },
        top_k: model.top_k as u32,
        wire: config.wire,
        combine: config.combine,
    }
}

fn limits(config: &Config) -> Limits {
    Limits {
        step_tokens: config.step_tokens,
        prefill_chunk: config.prefill_chunk,
        max_running: config.max_running,
        page_tokens: config.page_tokens,
        tpot_target: config.tpot_target,
    }
}

/// Every node is a process of this host, as far as that is known.
fn one_host(config: &Config) -> bool {
    config.etcd.is_none() && config.nodes.iter().all(Endpoint::is_local)
}

/// What of the model matters for placing its experts.
fn grid(checkpoint: &Checkpoint) -> Result<Grid, LoadError> {
    let model = checkpoint.config();
    let mut bytes = Vec::new();
    for layer in model.moe_layers() {
        let each = checkpoint.expert_bytes(layer)? as u64;
        bytes.extend(std::iter::repeat_n(each, model.experts));
    }
    let layers = model.moe_layers().map(|layer| LayerId(layer as u32)).collect();
    let experts = ExpertGrid { layers, experts: model.experts as u32 };
    Ok(Grid { experts, group: model.experts / model.n_group.max(1), bytes })
}

/// Routers that share nodes should not all prefer the same ones.
fn seed(id: &str) -> u64 {
    id.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Runs the engine on its own thread; the receiver turns true when it has ended, and the cell says whether its device is why.
fn run_engine(
    mut engine: Engine,
) -> std::io::Result<(watch::Receiver<bool>, Arc<OnceLock<GpuError>>)> {
    let (ended, end) = watch::channel(false);
    let lost = Arc::new(OnceLock::new());
    let told = lost.clone();
    std::thread::Builder::new().name("engine".into()).spawn(move || {
        // Dropped on a panic too, which is when somebody must hear of it.
        let _ended = SetOnDrop(ended);
        if let Err(error) = engine.run() {
            told.get_or_init(|| error);
        }
    })?;
    Ok((end, lost))
}

struct SetOnDrop(watch::Sender<bool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}
