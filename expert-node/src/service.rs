//! The node's judgement of frames, and its control service. A frame is checked,
//! admitted and queued here; every refusal is a typed reply on the stream, so
//! that one bad frame harms neither its neighbours nor the stream.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use bytes::Bytes;
use mesh::lifecycle::Shutdown;
use mesh::near::Offer;
use model::Numerics;
use proto::frame::{self, Shape};
use proto::v1::expert_control_server::ExpertControl;
use proto::v1::{
    DescribeRequest, DispatchFrame, DrainReply, DrainRequest, Dtype, ErrorCode, NodeDescription,
    NodeStatus, NodeStatusRequest,
};
use proto::{ExpertId, LayerId, MAX_MESSAGE_BYTES};
use tokio::sync::mpsc::{OwnedPermit, UnboundedSender};
use tonic::{Request, Response, Status};

use crate::admission::Admission;
use crate::executor::{Job, refusal, wire_dtype};
use crate::metrics::NodeMetrics;
use crate::store::Store;
use crate::stream::Spare;

/// Cheap to clone; one per gRPC service.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

/// What the service shares with the executor.
pub struct Parts {
    pub store: Arc<Store>,
    pub queue: UnboundedSender<Job>,
    pub admission: Arc<Admission>,
    pub spare: Spare,
    pub metrics: NodeMetrics,
}

/// Who the node is.
pub struct Facts {
    pub id: String,
    pub digest: [u8; 32],
    pub numerics: Numerics,
    pub isa: kernels::Isa,
    pub shape: Shape,
}

struct Inner {
    id: String,
    digest: [u8; 32],
    numerics: String,
    device: String,
    dtype: Dtype,
    shape: Shape,
    parts: Parts,
    offer: Offer,
    shutdown: Shutdown,
    draining: AtomicBool,
}

/// Which experts of a frame have been looked up; one per stream, used again.
#[derive(Default)]
pub struct Seen(Vec<bool>);

impl Service {
    pub fn new(facts: Facts, parts: Parts, offer: Offer, shutdown: &Shutdown) -> Self {
        Self(Arc::new(Inner {
            id: facts.id,
            digest: facts.digest,
            numerics: facts.numerics.class(facts.isa),
            device: format!("cpu/{}", facts.isa),
            dtype: wire_dtype(facts.numerics),
            shape: facts.shape,
            parts,
            offer,
            shutdown: shutdown.clone(),
            draining: AtomicBool::new(false),
        }))
    }
}

impl Inner {
    fn draining(&self) -> bool {
        self.draining.load(Ordering::Acquire) || self.shutdown.is_triggered()
    }

    /// Checks a frame; returns how many slots it asks for.
    fn admit(
        &self,
        frame: &DispatchFrame,
        Seen(seen): &mut Seen,
    ) -> Result<usize, (ErrorCode, String)> {
        if self.draining() {
            return Err((ErrorCode::Draining, format!("node {} is draining", self.id)));
        }
        let invalid = |why: String| (ErrorCode::Invalid, why);
        let (dtype, slots) =
            frame::check(frame, self.shape).map_err(|error| invalid(error.to_string()))?;
        if dtype != self.dtype && dtype != Dtype::Fp8 {
            let (got, want) = (dtype.as_str_name(), self.dtype.as_str_name());
            return Err(invalid(format!("rows are {got}, this node computes {want}")));
        }
        seen.clear();
        seen.resize(self.shape.experts as usize, false);
        for (slot, &expert) in frame.experts.iter().enumerate() {
            let version = frame.versions.get(slot).copied().unwrap_or(0);
            if frame.versions.is_empty() && std::mem::replace(&mut seen[expert as usize], true) {
                continue;
            }
            self.parts.store.get(LayerId(frame.layer), ExpertId(expert), version)?;
        }
        if !self.parts.admission.enter(slots) {
            return Err((
                ErrorCode::Busy,
                format!("{} rows are queued", self.parts.admission.queued()),
            ));
        }
        Ok(slots)
    }

    fn describe(&self) -> NodeDescription {
        NodeDescription {
            node_id: self.id.clone(),
            model_digest: self.digest.to_vec().into(),
            numerics: self.numerics.clone(),
            device: self.device.clone(),
            hidden: self.shape.hidden,
            owned: self.parts.store.owned(),
            max_frame_bytes: MAX_MESSAGE_BYTES as u64,
            draining: self.draining(),
            local_endpoint: self.offer.endpoint.clone(),
            instance: self.offer.instance.clone().into(),
        }
    }
}

impl Service {
    /// Judges a frame that arrived: queues it, or answers that it will not be computed.
    pub fn take(
        &self,
        frame: DispatchFrame,
        arrived: Instant,
        reply: OwnedPermit<Result<Bytes, Status>>,
        seen: &mut Seen,
    ) {
        let inner = &self.0;
        match inner.admit(&frame, seen) {
            Ok(slots) => {
                // Fails only after the executor is gone, and then the node goes down.
                let _ = inner.parts.queue.send(Job {
                    frame,
                    slots,
                    first: 0,
                    tainted: false,
                    arrived,
                    reply,
                });
            }
            Err((code, message)) => {
                inner.parts.metrics.refuse(code);
                reply.send(Ok(refusal(&frame, code, message)));
                inner.parts.spare.put(frame);
            }
        }
    }

    /// Where frames come from and go to when they are done with.
    pub fn spare(&self) -> &Spare {
        &self.0.parts.spare
    }

    /// Resolves when the node is told to end.
    pub async fn stopped(&self) {
        self.0.shutdown.wait().await;
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
        Ok(Response::new(DrainReply {}))
    }
}
