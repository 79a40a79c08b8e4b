//! The node's gRPC face. A frame is checked, admitted and queued here; every
//! refusal is a typed reply on the stream, so that one bad frame harms neither
//! its neighbours nor the stream. Nothing computes on these threads.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crossbeam_channel::Sender;
use mesh::lifecycle::Shutdown;
use model::Checkpoint;
use proto::frame::{self, Shape, all_finite};
use proto::v1::expert_control_server::ExpertControl;
use proto::v1::expert_data_server::ExpertData;
use proto::v1::{
    DescribeRequest, DispatchFrame, DispatchReply, DrainReply, DrainRequest, Dtype, ErrorCode,
    NodeDescription, NodeStatus, NodeStatusRequest,
};
use proto::{ExpertId, LayerId, MAX_MESSAGE_BYTES};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::Config;
use crate::admission::Admission;
use crate::executor::{Job, refusal, wire_dtype};
use crate::metrics::NodeMetrics;
use crate::store::Store;

/// Frames of one stream that may be in work; further ones are not read yet.
const FRAMES_IN_WORK: usize = 256;

/// Cheap to clone; one per gRPC service.
#[derive(Clone)]
pub struct Service(Arc<Inner>);

struct Inner {
    id: String,
    digest: [u8; 32],
    numerics: String,
    device: String,
    dtype: Dtype,
    shape: Shape,
    store: Arc<Store>,
    queue: Sender<Job>,
    admission: Arc<Admission>,
    metrics: NodeMetrics,
    shutdown: Shutdown,
    draining: AtomicBool,
}

impl Service {
    pub fn new(
        config: &Config,
        isa: kernels::Isa,
        checkpoint: &Checkpoint,
        store: Arc<Store>,
        queue: Sender<Job>,
        admission: Arc<Admission>,
        metrics: NodeMetrics,
        shutdown: &Shutdown,
    ) -> Self {
        let model = checkpoint.config();
        Self(Arc::new(Inner {
            id: config.id.clone(),
            digest: checkpoint.digest(),
            numerics: config.numerics.class(isa),
            device: format!("cpu/{isa}"),
            dtype: wire_dtype(config.numerics),
            shape: Shape {
                hidden: model.hidden as u32,
                experts: model.experts as u32,
                top_k: model.top_k as u32,
            },
            store,
            queue,
            admission,
            metrics,
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
    fn admit(&self, frame: &DispatchFrame) -> Result<usize, (ErrorCode, String)> {
        if self.draining() {
            return Err((ErrorCode::Draining, format!("node {} is draining", self.id)));
        }
        let invalid = |why: String| (ErrorCode::Invalid, why);
        let (dtype, slots) =
            frame::check(frame, self.shape).map_err(|error| invalid(error.to_string()))?;
        if dtype != self.dtype {
            let (got, want) = (dtype.as_str_name(), self.dtype.as_str_name());
            return Err(invalid(format!("rows are {got}, this node computes {want}")));
        }
        for (slot, &expert) in frame.experts.iter().enumerate() {
            let version = frame.versions.get(slot).copied().unwrap_or(0);
            self.store.get(LayerId(frame.layer), ExpertId(expert), version)?;
        }
        if !all_finite(&frame.rows, dtype) {
            let message = format!("layer {}: an input row is not finite", frame.layer);
            return Err((ErrorCode::NonFinite, message));
        }
        if !self.admission.enter(slots) {
            return Err((ErrorCode::Busy, format!("{} rows are queued", self.admission.queued())));
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
            owned: self.store.owned(),
            max_frame_bytes: MAX_MESSAGE_BYTES as u64,
            draining: self.draining(),
        }
    }
}

type ReplyStream = Pin<Box<dyn Stream<Item = Result<DispatchReply, Status>> + Send>>;

#[tonic::async_trait]
impl ExpertData for Service {
    type DispatchStream = ReplyStream;

    async fn dispatch(
        &self,
        request: Request<Streaming<DispatchFrame>>,
    ) -> Result<Response<ReplyStream>, Status> {
        let inner = self.0.clone();
        let mut frames = request.into_inner();
        let (replies, stream) = mpsc::channel(FRAMES_IN_WORK);
        tokio::spawn(async move {
            loop {
                // The permit comes first: what is read can always be answered.
                let Ok(permit) = replies.clone().reserve_owned().await else { return };
                let frame = tokio::select! {
                    frame = frames.message() => frame,
                    () = inner.shutdown.wait() => return,
                };
                match frame {
                    Ok(Some(frame)) => inner.take(frame, permit),
                    Ok(None) => return,
                    Err(status) => {
                        tracing::debug!(%status, "dispatch stream broke");
                        return;
                    }
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

impl Inner {
    fn take(&self, frame: DispatchFrame, reply: mpsc::OwnedPermit<Result<DispatchReply, Status>>) {
        let arrived = Instant::now();
        match self.admit(&frame) {
            Ok(slots) => {
                // Fails only after the executor is gone, and then the node goes down.
                let _ = self.queue.send(Job { frame, slots, arrived, reply });
            }
            Err((code, message)) => {
                self.metrics.refuse(code);
                reply.send(Ok(refusal(&frame, code, message)));
            }
        }
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
            frames: inner.metrics.frames.get(),
            rows: inner.metrics.rows.get(),
            refused: inner.admission.refused.load(Ordering::Relaxed),
            queued_rows: inner.admission.queued() as u64,
            resident_bytes: inner.store.bytes(),
            loads: inner.store.loads(),
        }))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        self.0.draining.store(true, Ordering::Release);
        Ok(Response::new(DrainReply {}))
    }
}
