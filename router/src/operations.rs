//! The router's gRPC face to operators, and to nodes that join: who is a member,
//! who owns what, and, on the controller, what is to be moved.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::Addr;
use arc_swap::ArcSwap;
use mesh::membership::Links;
use mesh::placement::Placement;
use mesh::transport::Endpoint;
use model::{Checkpoint, Head};
use proto::v1::operations_server::Operations;
use proto::v1::{
    ControllerStatus, DrainNodeRequest, DrainProgress, HeadsRequest, JoinReply, JoinRequest,
    LeaveReply, LeaveRequest, MemberStatus, PlacementReply, PlacementRequest, RebalanceReply,
    RebalanceRequest, WeightFile,
};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::controller::core::Refusal;
use crate::controller::{Controller, Door, DrainNode, Rebalance};

/// How often a drain is reported on.
const REPORT: Duration = Duration::from_millis(100);

/// What the service reads and asks.
#[derive(Clone)]
pub struct OperationsService {
    pub router_id: String,
    pub links: Links,
    pub placement: Arc<ArcSwap<Placement>>,
    /// Experts stay inside the router: no node may join.
    pub alone: bool,
    /// Set on the controller.
    pub controller: Option<Arc<Door>>,
    pub checkpoint: Arc<Checkpoint>,
}

type Reports = Pin<Box<dyn Stream<Item = Result<DrainProgress, Status>> + Send>>;

impl OperationsService {
    fn door(&self) -> Result<(&Arc<Door>, Arc<Addr<Controller>>), Status> {
        let Some(door) = &self.controller else {
            return Err(Status::failed_precondition(format!(
                "router {} is not the mesh's controller",
                self.router_id
            )));
        };
        door.in_office().map_err(|why| {
            let router = &self.router_id;
            Status::failed_precondition(format!("router {router} is not the controller: {why}"))
        })?;
        match door.address.load_full() {
            Some(address) => Ok((door, address)),
            None => Err(Status::unavailable("the controller is starting")),
        }
    }

    fn endpoint(text: &str) -> Result<Endpoint, Status> {
        text.parse().map_err(|error| Status::invalid_argument(format!("endpoint: {error}")))
    }

    /// How many experts the node at `endpoint` owns, and whether it knows that it is drained; `None`
    /// when it has gone.
    fn left(&self, endpoint: &str) -> Option<(u32, bool)> {
        let members = self.links.members();
        let link = members.iter().find(|link| link.endpoint.to_string() == endpoint);
        let about = link.and_then(|link| link.description())?;
        Some((about.owned.iter().map(|of| of.experts.len() as u32).sum(), about.drained))
    }
}

/// What the actor said, as a status.
fn answered<T>(said: Result<Result<T, Refusal>, actix::MailboxError>) -> Result<T, Status> {
    let said = said.map_err(|_| Status::unavailable("the controller is being rebuilt"))?;
    said.map_err(|refusal| match refusal {
        Refusal::Unknown { .. } => Status::not_found(refusal.to_string()),
        _ => Status::failed_precondition(refusal.to_string()),
    })
}

#[tonic::async_trait]
impl Operations for OperationsService {
    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinReply>, Status> {
        let endpoint = Self::endpoint(&request.get_ref().endpoint)?;
        if self.alone {
            return Err(Status::failed_precondition(format!(
                "router {} keeps its experts inside: it was started without nodes",
                self.router_id
            )));
        }
        let added = self
            .links
            .join(&endpoint, Instant::now())
            .map_err(|full| Status::resource_exhausted(full.to_string()))?;
        if added {
            tracing::info!(node = %endpoint, "a node joins");
        }
        Ok(Response::new(JoinReply { router_id: self.router_id.clone(), added }))
    }

    async fn leave(&self, request: Request<LeaveRequest>) -> Result<Response<LeaveReply>, Status> {
        let endpoint = Self::endpoint(&request.get_ref().endpoint)?;
        let members = self.links.members();
        let link = members.iter().find(|link| link.endpoint == endpoint);
        let sole = link.map_or(0, |link| self.placement.load().owned_only_by(link.node));
        if sole > 0 {
            return Err(Status::failed_precondition(format!(
                "the node at {endpoint} is the last owner of {sole} experts: drain it first"
            )));
        }
        let removed = self.links.leave(&endpoint);
        Ok(Response::new(LeaveReply { removed }))
    }

    async fn placement(
        &self,
        _: Request<PlacementRequest>,
    ) -> Result<Response<PlacementReply>, Status> {
        let placement = self.placement.load();
        let report = self.controller.as_ref().and_then(|door| door.account());
        let mut draining: HashMap<&str, ()> = HashMap::new();
        if let Some(report) = &report {
            draining.extend(report.draining.iter().map(|endpoint| (endpoint.as_str(), ())));
        }
        let member = |link: &Arc<mesh::link::LinkHandle>| {
            let (endpoint, about) = (link.endpoint.to_string(), link.description());
            let connected = about.is_some();
            let about = about.as_deref().cloned().unwrap_or_default();
            MemberStatus {
                node_id: about.node_id,
                connected,
                draining: about.draining
                    || about.drained
                    || draining.contains_key(endpoint.as_str()),
                endpoint,
                capacity_bytes: about.capacity_bytes,
                resident_bytes: about.resident_bytes,
                owned: about.owned,
            }
        };
        let controller =
            report.as_ref().zip(self.controller.as_ref()).map(|(report, door)| ControllerStatus {
                order: Some(report.progress.order),
                replicas: door.replicas as u32,
                to_load: report.progress.to_load,
                to_drop: report.progress.to_drop,
                detail: report.progress.detail.clone(),
            });
        Ok(Response::new(PlacementReply {
            router_id: self.router_id.clone(),
            epoch: placement.epoch().0,
            experts: placement.experts() as u32,
            missing: placement.missing().map_or(0, |(count, ..)| count as u32),
            nodes: self.links.members().iter().map(member).collect(),
            controller,
        }))
    }

    type DrainStream = Reports;

    async fn drain(&self, request: Request<DrainNodeRequest>) -> Result<Response<Reports>, Status> {
        let DrainNodeRequest { node, cancel } = request.into_inner();
        let (door, controller) = self.door()?;
        let endpoint = answered(controller.send(DrainNode { node, cancel }).await)?;
        let (send, reports) = mpsc::channel(1);
        let (service, door) = (self.clone(), door.clone());
        tokio::spawn(async move {
            loop {
                if let Err(why) = door.in_office() {
                    let why = format!("it goes on with the next controller: {why}");
                    let _ = send.send(Err(Status::aborted(why))).await;
                    return;
                }
                let (left, drained) = service.left(&endpoint).unwrap_or((0, !cancel));
                let detail = door.report.load().progress.detail.clone();
                let done = drained != cancel && (left == 0 || cancel);
                let report = DrainProgress { left, done, detail };
                // Whoever asked may go; the drain goes on.
                if send.send(Ok(report)).await.is_err() || done {
                    return;
                }
                tokio::time::sleep(REPORT).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(reports))))
    }

    async fn rebalance(
        &self,
        request: Request<RebalanceRequest>,
    ) -> Result<Response<RebalanceReply>, Status> {
        let (_, controller) = self.door()?;
        let wish = Rebalance { dry_run: request.get_ref().dry_run };
        let moves = answered(controller.send(wish).await)?;
        Ok(Response::new(RebalanceReply { moves }))
    }

    type HeadsStream = ReceiverStream<Result<WeightFile, Status>>;

    async fn heads(&self, _: Request<HeadsRequest>) -> Result<Response<Self::HeadsStream>, Status> {
        let (send, files) = mpsc::channel(1);
        let checkpoint = self.checkpoint.clone();
        tokio::spawn(async move {
            for Head { name, len, bytes } in checkpoint.heads() {
                let file = WeightFile { name, length: len, header: bytes.into() };
                if send.send(Ok(file)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(files)))
    }
}
