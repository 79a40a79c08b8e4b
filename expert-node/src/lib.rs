//! The expert node: owns a set of (layer, expert) and answers `Dispatch`
//! streams from any number of routers. Nothing lives here but weights and load
//! counters, so a lost node costs its routers one re-send. Rooms, in the order
//! a frame meets them:
//!
//! - [`stream`]: frames in, replies out, read and written in place
//! - [`ports`]: streams whose frames come through shared memory, which the executor looks into
//! - [`service`]: frames checked, admitted or refused
//! - [`admission`]: the bound on queued rows
//! - [`batcher`]: regroups queued rows by expert, across frames and routers
//! - [`executor`]: computes, on the thread that serves the streams
//! - [`results`]: what a reply is made of
//! - [`device`]: what computes the experts: the CPU, or a GPU that they are brought to
//! - [`store`]: which experts are resident, and how much each has worked
//! - [`control`]: the control service: which experts are to be resident, fenced
//! - [`heads`], [`fetch`]: a checkpoint of which not all files are here, and experts from other nodes
//! - [`announce`]: tells routers of a running mesh that the node is there
//! - [`stub`]: a node without weights, to measure the way of a row

#![forbid(unsafe_code)]

pub mod admission;
pub mod announce;
pub mod batcher;
pub mod control;
pub mod device;
pub mod executor;
pub mod fetch;
pub mod heads;
pub mod metrics;
pub mod ports;
pub mod results;
pub mod service;
pub mod store;
pub mod stream;
pub mod stub;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use mesh::admin;
use mesh::lifecycle::{Readiness, Shutdown};
use mesh::metrics::Metrics;
use mesh::near::{self, Offer, Shortcut};
use mesh::pump::Pump;
use mesh::registry::{Etcd, Member};
use mesh::tls::{self, Tls, TlsError};
use mesh::transport::{self, Endpoint, Listener, TransportError};
use model::gpu::{GpuBudget, GpuStartError};
use model::{Experts, GpuError, LoadError, Numerics};
use proto::frame::Shape;
use proto::v1::expert_control_server::ExpertControlServer;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::sync::{mpsc, oneshot};
use tonic::service::Routes;

use crate::admission::Admission;
use crate::control::Control;
use crate::device::Device;
use crate::executor::{Executor, Job};
use crate::fetch::Fetcher;
use crate::metrics::NodeMetrics;
use crate::ports::Ports;
use crate::service::{Facts, Service};
use crate::store::{Store, StoreError};
use crate::stream::{ExpertData, Spare};

/// Which part of every layer's experts a node owns when it starts: share `index`
/// of `count`, and the `replicas - 1` shares before it. A count of 0 is nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    pub index: u16,
    pub count: u16,
    pub replicas: u16,
}

/// What an expert node is told.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node's name in the mesh.
    pub id: String,
    pub listen: Endpoint,
    /// Where `/metrics`, `/healthz` and `/readyz` are served, if anywhere.
    pub admin: Option<Endpoint>,
    /// This node's certificate, which has its id, and whom it trusts; `None` is
    /// plain text.
    pub tls: Option<tls::Files>,
    pub model_dir: PathBuf,
    pub numerics: Numerics,
    pub shard: Shard,
    /// Most bytes of experts it may own; `None` is no bound.
    pub memory_limit: Option<u64>,
    /// Routers that are told that the node is there.
    pub join: Vec<Endpoint>,
    /// Where the members of the mesh are kept, if not only in configurations.
    pub etcd: Option<Etcd>,
    /// Where routers reach it, if not at `listen`.
    pub advertise: Option<Endpoint>,
    pub threads: usize,
    /// Position of the CPU that the first of them is bound to; `None` leaves them free.
    pub first_cpu: Option<usize>,
    /// What computes the experts.
    pub device: Device,
    /// What experts on a GPU may take.
    pub gpu: GpuBudget,
    /// `None` takes the best the CPU has.
    pub isa: Option<kernels::Isa>,
    /// Rows × slots that may wait for the executor; more is refused as `BUSY`.
    pub max_queued_rows: usize,
    /// Whether it also listens on a Unix socket for routers on its host.
    pub local_socket: Shortcut,
    /// Whether large frames' rows stand in memory that routers of its host share with it.
    pub shared_rows: Shortcut,
}

/// Why a node did not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error("the experts that it is to start with do not fit: {0}")]
    Memory(StoreError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("cannot serve metrics: {0}")]
    Admin(std::io::Error),
    #[error("cannot start the executor thread: {0}")]
    Thread(std::io::Error),
    #[error("shard {0} of {1} does not exist")]
    Shard(u16, u16),
    #[error("the executor panicked; the node cannot compute any more")]
    Executor,
    #[error("device = \"{0}\": {1}")]
    Device(Device, GpuStartError),
    #[error("the node cannot compute any more: {0}")]
    Gpu(GpuError),
}

/// Loads, binds, serves, and drains when `shutdown` is triggered.
pub async fn serve(config: Config, shutdown: Shutdown) -> Result<(), Error> {
    let Shard { index, count, .. } = config.shard;
    if index >= count.max(1) {
        return Err(Error::Shard(index, count));
    }
    let readiness = Readiness::starting("loading experts");
    let metrics = Metrics::default();
    let owner = tls::Owner { role: tls::Role::ExpertNode, id: Some(config.id.clone()) };
    let tls = tls::start(config.tls.as_ref(), owner, &metrics, &shutdown)?;
    let listener = transport::bind(&config.listen).await?;
    let admin = match &config.admin {
        Some(endpoint) => Some(transport::bind(endpoint).await?),
        None => None,
    };

    let alive_at = admin.as_ref().map(Listener::local);
    // Served from now on, so that whoever waits for the node can see how far it is.
    let side = admin.map(|listener| {
        let (stop, ready, metrics) = (shutdown.clone(), readiness.clone(), metrics.clone());
        tokio::spawn(admin::serve(listener, metrics, ready, async move { stop.wait().await }))
    });

    let (named, etcd) = (&config.join[..], config.etcd.as_ref());
    let routers = heads::Routers { named, etcd, tls: tls.as_ref() };
    let opened = heads::open(&config.model_dir, routers, &readiness, &shutdown).await?;
    let Some(checkpoint) = opened else { return Ok(()) };
    let progress = |mapped, all| {
        readiness.set(Err(format!("{mapped} of {all} experts mapped")));
    };
    let mut store = match Store::load(&checkpoint, config.shard, config.memory_limit, progress) {
        Ok(store) => store,
        Err(StoreError::Load(error)) => return Err(Error::Load(error)),
        Err(other) => return Err(Error::Memory(other)),
    };
    let isa = config.isa.unwrap_or_else(kernels::Isa::detect);
    let opened = device::open(&config, &checkpoint, isa, &mut store)?;
    let store = Arc::new(store);
    tracing::info!(
        experts = store.len(),
        mib = store.bytes() >> 20,
        device = opened.name,
        endpoint = %listener.local(),
        "experts mapped"
    );

    let node = metrics.register(NodeMetrics::new);
    let admission = Arc::new(Admission::new(config.max_queued_rows));
    let facts = Facts {
        id: config.id,
        digest: checkpoint.digest(),
        numerics: config.numerics,
        class: opened.class,
        device: opened.name,
        shape: shape(checkpoint.config()),
        alive_at,
        partial: !checkpoint.is_whole(),
    };
    let compute = kernels::Compute::bound(isa, config.threads, config.first_cpu);
    let fetcher = Fetcher { checkpoint, tls: tls.clone(), metrics: node.clone() };
    let control = Control::new(Some(fetcher));
    let endpoint = config.advertise.unwrap_or_else(|| listener.local());
    let registering = config.etcd.map(|etcd| {
        let (role, id) = (tls::Role::ExpertNode, facts.id.clone());
        let me = Member { role, id, endpoint: endpoint.clone(), model: facts.digest };
        tokio::spawn(announce::register(etcd, me, readiness.clone(), shutdown.clone()))
    });
    let announcing = tokio::spawn(announce::keep(
        announce::Announcement { routers: config.join, endpoint, tls: tls.clone() },
        readiness.clone(),
        shutdown.clone(),
    ));
    // What is encrypted and authenticated stays so.
    let wanted = if tls.is_some() { Shortcut::Off } else { config.local_socket };
    let (offer, near) = near::beside(&listener, wanted).await;
    let run = Run {
        facts,
        compute,
        experts: opened.experts,
        store,
        control,
        admission: admission.clone(),
        node,
        tls,
        offer,
        shared_rows: config.shared_rows,
    };
    run.until((listener, near), shutdown, readiness).await?;
    // It ends with the shutdown that ended the serving.
    announcing.abort();
    if let Some(registering) = registering {
        // What it holds in etcd is given back; a panic there is no reason to fail.
        let _ = registering.await;
    }
    if let Some(Ok(served)) = match side {
        Some(side) => Some(side.await),
        None => None,
    } {
        served.map_err(Error::Admin)?;
    }
    tracing::info!(refused = admission.refused.load(Ordering::Relaxed), "drained");
    Ok(())
}

/// Where a node is reached, and where from its own host.
type Listeners = (Listener, Option<Listener>);

/// What frames for the model's experts are checked against.
fn shape(model: &model::Config) -> Shape {
    let [hidden, experts, top_k] = [model.hidden, model.experts, model.top_k].map(|n| n as u32);
    Shape { hidden, experts, top_k }
}

/// A node that has all it needs to answer.
struct Run {
    facts: Facts,
    compute: kernels::Compute,
    experts: Box<dyn Experts>,
    store: Arc<Store>,
    control: Control,
    admission: Arc<Admission>,
    node: NodeMetrics,
    offer: Offer,
    tls: Option<Tls>,
    shared_rows: Shortcut,
}

impl Run {
    /// Serves until told to drain and the streams have ended.
    async fn until(
        self,
        listeners: Listeners,
        shutdown: Shutdown,
        readiness: Readiness,
    ) -> Result<(), Error> {
        let Self { facts, compute, experts, store, control, admission, node, tls, offer, .. } =
            self;
        let (spare, ports) = (Spare::default(), Ports::default());
        let executor = Executor::new(executor::Parts {
            compute,
            experts,
            numerics: facts.numerics,
            hidden: facts.shape.hidden as usize,
            store: store.clone(),
            admission: admission.clone(),
            spare: spare.clone(),
            ports: ports.clone(),
            metrics: node.clone(),
        });
        // Jobs are bounded by admission, which counts rows; a job has at least one.
        let (queue, jobs) = mpsc::unbounded_channel();
        let parts = service::Parts { store, queue, admission, spare, metrics: node };
        let service = Service::new(facts, parts, (control, offer), &shutdown);
        let shared_rows = self.shared_rows;
        let routes = Routes::new(ExpertData { service: service.clone(), ports, shared_rows })
            .add_service(ExpertControlServer::new(service));

        readiness.set(Ok(()));
        let serving = compute_and_serve(listeners, executor, jobs, async move |listeners| {
            let serve = async |listener: Option<Listener>| {
                let Some(listener) = listener else { return Ok(()) };
                let (stop, readiness) = (shutdown.clone(), readiness.clone());
                let drained = async move {
                    stop.wait().await;
                    readiness.set(Err("draining".to_owned()));
                };
                transport::serve_grpc(listener, routes.clone(), tls.as_ref(), drained).await
            };
            let (listener, near) = listeners;
            tokio::try_join!(serve(Some(listener)), serve(near)).map(drop)
        })?;
        // Nothing is said by a thread that panicked.
        serving.await.unwrap_or(Err(Error::Executor))
    }
}

/// Starts the thread that serves and computes: a frame's way through the node
/// wakes no other. The receiver hears why it ended.
fn compute_and_serve(
    (listener, near): Listeners,
    executor: Executor,
    jobs: UnboundedReceiver<Job>,
    serve: impl AsyncFnOnce(Listeners) -> Result<(), TransportError> + Send + 'static,
) -> Result<oneshot::Receiver<Result<(), Error>>, Error> {
    let pump = Pump::new().map_err(Error::Thread)?;
    let (said, ended) = oneshot::channel();
    std::thread::Builder::new()
        .name("executor".into())
        .spawn(move || {
            let outcome = pump.run(async move {
                let computing = tokio::spawn(executor.run(jobs));
                let near = near.map(Listener::adopt).transpose().map_err(Error::Thread)?;
                let listeners = (listener.adopt().map_err(Error::Thread)?, near);
                tokio::select! {
                    served = serve(listeners) => served.map_err(Error::Transport),
                    // It ends only when the service's queue is dropped, by a panic, or without its device.
                    ended = computing => match ended {
                        Ok(Err(lost)) => Err(Error::Gpu(lost)),
                        _ => Err(Error::Executor),
                    },
                }
            });
            // Dropped by who waits only when the process ends anyway.
            let _ = said.send(outcome);
        })
        .map_err(Error::Thread)?;
    Ok(ended)
}
