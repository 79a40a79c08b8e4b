//! The node's control service: who it is, what it owns, and the orders that
//! change what it owns. Orders are fenced: one that is older than one that was
//! obeyed is refused, so that a controller which has been replaced cannot undo
//! what its successor did.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use proto::v1::expert_control_server::ExpertControl;
use proto::v1::{
    DescribeRequest, DrainReply, DrainRequest, DropReply, DropRequest, FetchPart, FetchRequest,
    LayerExperts, LoadReply, LoadRequest, NodeDescription, NodeStatus, NodeStatusRequest, Order,
    SetDrainedReply, SetDrainedRequest, WatchRequest,
};
use proto::{ExpertId, LayerId};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::fetch::{self, FetchError, Fetcher, Served};
use crate::service::Service;
use crate::store::{Key, StoreError};

/// How often a drop looks whether the frames before it have been computed.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// What the control service keeps.
pub struct Control {
    /// Where experts come from, and the runtime that fetches them, beside the thread that
    /// computes; a stub has none.
    origin: Option<(Fetcher, Handle)>,
    served: Served,
    obeyed: Mutex<Order>,
    /// It is to own nothing.
    drained: AtomicBool,
    /// Held by the order that is being carried out.
    turn: Arc<tokio::sync::Mutex<()>>,
}

impl Control {
    /// Called on the runtime that is to fetch.
    pub fn new(fetcher: Option<Fetcher>) -> Self {
        let (obeyed, served) = (Mutex::new(Order::default()), Served::default());
        let origin = fetcher.map(|fetcher| (fetcher, Handle::current()));
        let (drained, turn) = (AtomicBool::new(false), Arc::default());
        Self { origin, served, obeyed, drained, turn }
    }

    fn origin(&self) -> Result<&(Fetcher, Handle), Status> {
        self.origin.as_ref().ok_or_else(|| Status::unimplemented("a stub's experts do not change"))
    }

    pub fn obeyed(&self) -> Order {
        *self.obeyed.lock()
    }

    pub fn drained(&self) -> bool {
        self.drained.load(Ordering::Acquire)
    }

    /// Obeys the order from now on, unless a newer one was obeyed; whether it is the
    /// first of its term.
    fn obey(&self, order: Order) -> Result<bool, Status> {
        let mut obeyed = self.obeyed.lock();
        if (order.term, order.epoch) < (obeyed.term, obeyed.epoch) {
            return Err(Status::failed_precondition(format!(
                "this order is of term {} epoch {}, but term {} epoch {} was obeyed",
                order.term, order.epoch, obeyed.term, obeyed.epoch
            )));
        }
        let rises = order.term > obeyed.term;
        *obeyed = order;
        Ok(rises)
    }
}

impl Service {
    /// The experts an order names, if the model has them all.
    fn keys(&self, layers: &[LayerExperts]) -> Result<Vec<Key>, Status> {
        let (fetcher, _) = self.0.control.origin()?;
        let model = fetcher.checkpoint.config();
        let named = |&LayerExperts { layer, ref experts }: &LayerExperts| {
            let mut keys = Vec::with_capacity(experts.len());
            for &expert in experts {
                if !model.is_moe(layer as usize) || expert as usize >= model.experts {
                    let why = format!("the model has no expert {expert} in layer {layer}");
                    return Err(Status::invalid_argument(why));
                }
                keys.push((LayerId(layer), ExpertId(expert)));
            }
            Ok(keys)
        };
        let mut keys = layers.iter().map(named).collect::<Result<Vec<_>, _>>()?.concat();
        keys.sort_unstable();
        keys.dedup();
        Ok(keys)
    }
}

fn of(order: Option<Order>) -> Result<Order, Status> {
    order.ok_or_else(|| Status::invalid_argument("order: it has to say when it was given"))
}

fn refused(error: &StoreError) -> Status {
    match error {
        StoreError::Full { .. } => Status::resource_exhausted(error.to_string()),
        StoreError::Load(_) => Status::not_found(error.to_string()),
    }
}

fn not_fetched(error: &FetchError) -> Status {
    match error {
        FetchError::NoSource(..) => Status::not_found(error.to_string()),
        _ => Status::unavailable(error.to_string()),
    }
}

#[tonic::async_trait]
impl ExpertControl for Service {
    async fn describe(
        &self,
        _: Request<DescribeRequest>,
    ) -> Result<Response<NodeDescription>, Status> {
        Ok(Response::new(self.0.describe()))
    }

    async fn status(&self, _: Request<NodeStatusRequest>) -> Result<Response<NodeStatus>, Status> {
        let inner = &self.0;
        Ok(Response::new(NodeStatus {
            description: Some(inner.describe()),
            frames: inner.parts.metrics.frames.get(),
            rows: inner.parts.metrics.rows.get(),
            refused: inner.parts.admission.refused.load(Ordering::Relaxed),
            queued_rows: inner.parts.admission.queued() as u64,
            resident_bytes: inner.parts.store.bytes(),
            loads: inner.parts.store.loads(),
        }))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        self.0.draining.store(true, Ordering::Release);
        self.0.parts.store.changed();
        Ok(Response::new(DrainReply {}))
    }

    type WatchStream = ReceiverStream<Result<NodeDescription, Status>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (send, stream) = mpsc::channel(1);
        let service = self.clone();
        tokio::spawn(async move {
            let mut changes = service.0.parts.store.changes();
            loop {
                // Marked as seen first: a change while it is described is described again.
                changes.mark_unchanged();
                let about = service.0.describe();
                let last = about.draining;
                // A server that stops waits for its calls, so this one ends.
                if send.send(Ok(about)).await.is_err() || last {
                    return;
                }
                tokio::select! {
                    changed = changes.changed() => if changed.is_err() { return },
                    () = send.closed() => return,
                    () = service.stopped() => {}
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn load(&self, request: Request<LoadRequest>) -> Result<Response<LoadReply>, Status> {
        let LoadRequest { order, experts, sources } = request.into_inner();
        let (order, keys) = (of(order)?, self.keys(&experts)?);
        let control = &self.0.control;
        let (fetcher, runtime) = control.origin()?.clone();
        let turn = control.turn.clone().lock_owned().await;
        if self.0.draining() {
            return Err(Status::unavailable(format!("node {} is draining", self.0.id)));
        }
        let is_first = control.obey(order)?;
        let store = self.0.parts.store.clone();
        let lacking = store.lacks(&fetcher.checkpoint, &keys).map_err(|error| refused(&error))?;
        let mut fetched = Vec::new();
        if !lacking.is_empty() {
            // Ends with this call: who asks no more gets no expert.
            let (fetcher, mut fetching) = (fetcher.clone(), JoinSet::new());
            let fetch = async move { fetcher.fetch(&lacking, &sources).await };
            fetching.spawn_on(fetch, &runtime);
            fetched = match fetching.join_next().await {
                Some(Ok(fetched)) => fetched.map_err(|error| not_fetched(&error))?,
                Some(Err(panic)) => {
                    return Err(Status::internal(format!("fetching failed: {panic}")));
                }
                None => fetched,
            };
        }
        // Mapping and reading happen beside the thread that computes. The turn ends
        // with them, also when nobody waits for the reply any more.
        let loading = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let loaded = store.take_in(&fetcher.checkpoint, &keys, fetched);
            if is_first {
                // Routers hear whom the node obeys.
                store.changed();
            }
            loaded.map(|loaded| (loaded as u32, store.bytes()))
        });
        match loading.await {
            Ok(Ok((loaded, resident_bytes))) => {
                tracing::info!(term = order.term, epoch = order.epoch, loaded, "experts loaded");
                Ok(Response::new(LoadReply { loaded, resident_bytes }))
            }
            Ok(Err(error)) => Err(refused(&error)),
            Err(panic) => Err(Status::internal(format!("loading failed: {panic}"))),
        }
    }

    async fn drop(&self, request: Request<DropRequest>) -> Result<Response<DropReply>, Status> {
        let DropRequest { order, experts } = request.into_inner();
        let (order, keys) = (of(order)?, self.keys(&experts)?);
        let control = &self.0.control;
        let turn = control.turn.clone().lock_owned().await;
        let is_first = control.obey(order)?;
        let inner = self.0.clone();
        // Carried to its end also when nobody waits for the reply any more.
        let dropping = tokio::spawn(async move {
            let _turn = turn;
            let retired = inner.parts.store.retire(&keys);
            let before = inner.parts.admission.entered();
            while inner.parts.admission.left() < before {
                tokio::time::sleep(LOOK_AGAIN).await;
            }
            inner.parts.store.forget(&retired);
            if is_first {
                inner.parts.store.changed();
            }
            (retired.len() as u32, inner.parts.store.bytes())
        });
        match dropping.await {
            Ok((dropped, resident_bytes)) => {
                tracing::info!(term = order.term, epoch = order.epoch, dropped, "experts dropped");
                Ok(Response::new(DropReply { dropped, resident_bytes }))
            }
            Err(panic) => Err(Status::internal(format!("dropping failed: {panic}"))),
        }
    }

    async fn set_drained(
        &self,
        request: Request<SetDrainedRequest>,
    ) -> Result<Response<SetDrainedReply>, Status> {
        let SetDrainedRequest { order, drained } = request.into_inner();
        let control = &self.0.control;
        control.obey(of(order)?)?;
        control.drained.store(drained, Ordering::Release);
        self.0.parts.store.changed();
        Ok(Response::new(SetDrainedReply {}))
    }

    type FetchStream = ReceiverStream<Result<FetchPart, Status>>;

    async fn fetch(
        &self,
        request: Request<FetchRequest>,
    ) -> Result<Response<Self::FetchStream>, Status> {
        let FetchRequest { model_digest, experts } = request.into_inner();
        if *model_digest != self.0.digest {
            let problem = format!("node {} serves another model", self.0.id);
            return Err(Status::failed_precondition(problem));
        }
        let parts = &self.0.parts;
        let held = |key: Key| match parts.store.held(key.0, key.1, 0) {
            Ok(resident) => Ok((key, resident)),
            Err((_, why)) => Err(Status::not_found(why)),
        };
        let keys = self.keys(&experts)?;
        let experts = keys.into_iter().map(held).collect::<Result<Vec<_>, _>>()?;
        let permit = self.0.control.served.enter()?;
        Ok(Response::new(ReceiverStream::new(fetch::send(experts, permit, parts.metrics.clone()))))
    }
}
