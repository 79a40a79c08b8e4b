//! `moemesh drain`, `rebalance`, `join` and `leave`: an operator's wishes, told to
//! the routers of a mesh. What is moved is decided by the one that is the
//! controller, which is found by asking.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail};
use mesh::tls::{Expected, Role, Tls};
use mesh::transport::{Endpoint, channel, explain};
use proto::v1::operations_client::OperationsClient;
use proto::v1::{
    DrainNodeRequest, DrainProgress, JoinRequest, LeaveRequest, Move, PlacementRequest,
    RebalanceRequest,
};
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::certs::operator::identity;
use crate::cli::{DrainArgs, MemberArgs, RebalanceArgs, TlsArgs};
use crate::status::table::bytes;
use crate::up::runtime_dir;

const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// A drain that something hinders is given up on when nothing has moved for so long.
const STUCK: Duration = Duration::from_secs(30);

type Client = OperationsClient<Channel>;

/// Empties a node; returns when it owns nothing.
///
/// # Errors
/// It cannot be emptied, or something hinders it for long.
pub async fn drain(args: DrainArgs) -> anyhow::Result<()> {
    let DrainArgs { node, cancel, router, tls } = args;
    let mut controller = Routers::find(router.as_deref(), &tls)?.controller().await?;
    let request = DrainNodeRequest { node: node.clone(), cancel };
    let mut reports = controller.drain(request).await.map_err(refused)?.into_inner();
    if cancel {
        println!("{node} is given experts again");
        return Ok(());
    }
    let mut last = None;
    let mut moved = Instant::now();
    while let Some(DrainProgress { left, done, detail }) =
        reports.message().await.map_err(refused)?
    {
        if done {
            println!("{node} owns no expert: it can be stopped");
            return Ok(());
        }
        if last != Some(left) {
            println!("{node}: {left} experts left");
            (last, moved) = (Some(left), Instant::now());
        }
        if moved.elapsed() > STUCK && !detail.is_empty() {
            bail!("{node} still owns {left} experts: {detail}");
        }
    }
    bail!("the router ended before {node} was empty; it goes on with another `moemesh drain`")
}

/// Evens out what nodes own and prints the moves.
///
/// # Errors
/// Something else is under way, or there is no controller.
pub async fn rebalance(args: RebalanceArgs) -> anyhow::Result<()> {
    let RebalanceArgs { dry_run, router, tls } = args;
    let mut controller = Routers::find(router.as_deref(), &tls)?.controller().await?;
    let request = timed(RebalanceRequest { dry_run });
    let moves = controller.rebalance(request).await.map_err(refused)?.into_inner().moves;
    for one in &moves {
        println!("{}", line(one));
    }
    let all: u64 = moves.iter().map(|one| one.bytes).sum();
    match (moves.len(), dry_run) {
        (0, _) => println!("nothing to move"),
        (count, true) => println!("{count} moves of {} in all; none was made", bytes(all)),
        (count, false) => {
            println!("{count} moves of {} in all are under way: see `moemesh status`", bytes(all));
        }
    }
    Ok(())
}

fn line(Move { layer, expert, from, to, bytes: size }: &Move) -> String {
    let how = match (from.as_str(), to.as_str()) {
        (from, "") => format!("given up by {from}"),
        ("", to) => format!("added to {to}"),
        (from, to) => format!("{from} -> {to}"),
    };
    format!("layer {layer} expert {expert}: {how}, {}", bytes(*size))
}

/// Tells routers of a node.
///
/// # Errors
/// A router refuses or does not answer.
pub async fn join(args: MemberArgs) -> anyhow::Result<()> {
    let routers = Routers::find(args.router.as_deref(), &args.tls)?;
    for router in &routers.endpoints {
        let request = timed(JoinRequest { endpoint: args.endpoint.clone() });
        let reply = routers.client(router)?.join(request).await.map_err(refused)?.into_inner();
        let how = if reply.added { "joins" } else { "is known already" };
        println!("{}: the node at {} {how}", reply.router_id, args.endpoint);
    }
    Ok(())
}

/// Has routers forget a node.
///
/// # Errors
/// It is the last owner of an expert, or a router does not answer.
pub async fn leave(args: MemberArgs) -> anyhow::Result<()> {
    let routers = Routers::find(args.router.as_deref(), &args.tls)?;
    for router in &routers.endpoints {
        let request = timed(LeaveRequest { endpoint: args.endpoint.clone() });
        let reply = routers.client(router)?.leave(request).await.map_err(refused)?.into_inner();
        let how = if reply.removed { "has left" } else { "was not known" };
        println!("{router}: the node at {} {how}", args.endpoint);
    }
    Ok(())
}

/// The routers to talk to, and as whom.
struct Routers {
    endpoints: Vec<Endpoint>,
    tls: Option<Tls>,
}

impl Routers {
    /// The one given, or all of the newest mesh that runs here.
    fn find(given: Option<&str>, tls: &TlsArgs) -> anyhow::Result<Self> {
        if let Some(router) = given {
            return Ok(Self { endpoints: vec![router.parse()?], tls: identity(tls, None)? });
        }
        let running = runtime_dir::running();
        let newest = running.first().ok_or_else(|| {
            anyhow!(
                "no mesh runs here: start one with `moemesh up`, or name a router with --router"
            )
        })?;
        let certificates = newest.certificates.as_deref().map(Path::new);
        let parse = |member: &runtime_dir::Member| Ok(member.endpoint.parse()?);
        let endpoints = newest.routers.iter().map(parse).collect::<anyhow::Result<_>>()?;
        Ok(Self { endpoints, tls: identity(tls, certificates)? })
    }

    /// The one that decides who owns what.
    async fn controller(&self) -> anyhow::Result<Client> {
        let mut problems = Vec::new();
        for router in &self.endpoints {
            let mut client = self.client(router)?;
            match client.placement(timed(PlacementRequest {})).await {
                Ok(reply) if reply.get_ref().controller.is_some() => return Ok(client),
                Ok(reply) => {
                    problems.push(format!("{} is not the controller", reply.get_ref().router_id));
                }
                Err(status) => problems.push(format!("{router}: {}", refused(status))),
            }
        }
        bail!("{}; one router of a mesh has `controller = true`", problems.join(", "))
    }

    fn client(&self, router: &Endpoint) -> anyhow::Result<Client> {
        let channel = channel(router, self.tls.as_ref(), Expected::any(Role::Router))
            .with_context(|| format!("cannot reach router {router}"))?;
        Ok(OperationsClient::new(channel))
    }
}

fn timed<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ANSWER_WITHIN);
    request
}

fn refused(status: Status) -> anyhow::Error {
    match status.code() {
        // The cause: who is not there, or is not who was expected.
        Code::Unavailable => anyhow!("{}", explain(&status)),
        _ => anyhow!("{}", status.message().replace('\n', " ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_move_is_one_line() {
        let one = |from: &str, to: &str| Move {
            layer: 3,
            expert: 7,
            from: from.to_owned(),
            to: to.to_owned(),
            bytes: 2048,
        };
        assert_eq!(line(&one("a", "b")), "layer 3 expert 7: a -> b, 2.0 KiB");
        assert_eq!(line(&one("", "b")), "layer 3 expert 7: added to b, 2.0 KiB");
        assert_eq!(line(&one("a", "")), "layer 3 expert 7: given up by a, 2.0 KiB");
    }
}
