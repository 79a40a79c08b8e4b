//! Meshes whose processes find each other, and elect their controller, through
//! etcd: what etcd is needed for, and that nothing else needs it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh::lifecycle::Shutdown;
use mesh::registry::Member;
use mesh::registry::office::Office;
use mesh::tls::{Expected, Role};
use mesh::transport::{Endpoint, channel};
use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::operations_client::OperationsClient;
use proto::v1::{
    DescribeRequest, DrainNodeRequest, LoadRequest, Order, PlacementReply, PlacementRequest,
};
use tonic::Code;
use tonic::transport::Channel;

use super::inflict::Halted;
use super::load::{Balancer, Clients, Outcome, Sample, asks};
use super::meta::usurpations_are_noticed;
use super::observe::{Figures, until};
use super::run::{alone, recorded, run};
use super::scenario::{Check, Fault, Faulting, Load, Scenario, When, is_long};
use crate::support::certs::Certs;
use crate::support::etcd::EtcdServer;
use crate::support::sandbox::Plan;
use crate::support::{Sandbox, http, tiny};

/// Long enough for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(90);
const TOKENS: usize = 64;

fn replicated(etcd: &Arc<EtcdServer>, nodes: usize, replicas: usize) -> Plan {
    let plan = Sandbox::of(tiny()).expert_nodes(nodes).replicas(replicas).etcd(etcd);
    plan.router("replicas", replicas).logged()
}

fn to(mesh: &Sandbox, name: &str) -> Channel {
    let role = if name.starts_with("router") { Role::Router } else { Role::ExpertNode };
    channel(&Endpoint::Unix(mesh.socket(name)), None, Expected::any(role)).unwrap()
}

/// What a router says of who owns what; nothing while it is down or stopped.
async fn placement(mesh: &Sandbox, router: &str) -> Option<PlacementReply> {
    let mut asked = tonic::Request::new(PlacementRequest {});
    asked.set_timeout(Duration::from_millis(500));
    Some(OperationsClient::new(to(mesh, router)).placement(asked).await.ok()?.into_inner())
}

/// The controller that says so of itself, as the router called `other` than `not`.
async fn controller(mesh: &Sandbox, not: &str) -> Option<(String, PlacementReply)> {
    for router in mesh.routers.iter().filter(|router| router.name != not) {
        let said = placement(mesh, &router.name).await;
        if let Some(said) = said.filter(|said| said.controller.is_some()) {
            return Some((router.name.clone(), said));
        }
    }
    None
}

/// Waits for a controller that is not `not`, and a placement as `wanted`.
async fn placed(
    mesh: &Sandbox,
    not: &str,
    wanted: impl Fn(&PlacementReply) -> bool,
) -> (String, PlacementReply) {
    let found = until(PATIENCE, async || {
        controller(mesh, not).await.is_some_and(|(_, said)| wanted(&said))
    });
    let last = || async { controller(mesh, not).await };
    assert!(found.await.is_some(), "never placed as wanted: {:?}", last().await);
    last().await.expect("it is still in office")
}

fn term(placement: &PlacementReply) -> u64 {
    placement.controller.as_ref().and_then(|of| of.order).map_or(0, |order| order.term)
}

fn counts(placement: &PlacementReply) -> BTreeMap<&str, usize> {
    let node = |node: &'_ proto::v1::MemberStatus| -> usize {
        node.owned.iter().map(|of| of.experts.len()).sum()
    };
    placement.nodes.iter().map(|of| (of.node_id.as_str(), node(of))).collect()
}

/// A load over every gateway, and what its streams say undisturbed.
pub struct Streams {
    expected: Vec<Option<String>>,
    clients: Clients,
    begun: Instant,
}

impl Streams {
    pub async fn start(mesh: &Sandbox, count: usize) -> Self {
        let (asks, balancer) = (Arc::new(asks(TOKENS)), Arc::new(Balancer::new(&mesh.addresses)));
        let calm = Clients::start(count, asks.clone(), balancer.clone());
        until(PATIENCE, async || {
            calm.answered().into_iter().collect::<BTreeSet<_>>().len() == asks.len()
        })
        .await;
        let mut expected = vec![None; asks.len()];
        for Sample { ask, outcome, .. } in calm.finish().await {
            if let Outcome::Whole(said) = outcome {
                expected[ask] = Some(said);
            }
        }
        assert!(expected.iter().all(Option::is_some), "undisturbed streams failed");
        let (clients, begun) = (Clients::start(count, asks, balancer), Instant::now());
        Self { expected, clients, begun }
    }

    /// None failed, and all said what they say undisturbed.
    pub async fn end(self) {
        until(PATIENCE, async || self.clients.ended() > 0).await;
        let samples = self.clients.finish().await;
        let figures = Figures::of(&samples, &self.expected, self.begun.elapsed());
        assert_eq!((figures.cut.len(), figures.refused), (0, 0), "{:?}", figures.cut);
        assert!(figures.answered > 0 && figures.different == 0, "{figures:?}");
    }
}

async fn running(mesh: &Sandbox, router: usize) -> u32 {
    mesh.status_of(router).await.map_or(0, |status| status.running)
}

#[test]
fn processes_find_each_other_and_come_and_go_under_load() {
    let Some(etcd) = EtcdServer::start() else { return };
    alone(async {
        // A router and a gateway that come first wait, and say for what.
        let mut mesh = replicated(&etcd, 0, 1).spawn();
        let waits = until(PATIENCE, async || {
            let said = http::get(&mesh.http, "/readyz").await;
            said.is_ok_and(|(_, body)| body.contains("waiting for nodes that own experts"))
        });
        assert!(waits.await.is_some(), "{:?}", http::get(&mesh.http, "/readyz").await);
        for index in 0..3 {
            let share = |key, value: usize| (key, value.to_string());
            let settings = [share("shard_index", index), share("shard_count", 3)];
            mesh.add_node(&format!("expert-node-{index}"), &settings);
        }
        mesh.wait_ready().await;

        let streams = Streams::start(&mesh, 8).await;
        // One that brings nothing, and has no weights, is given its share.
        let bare = ("model_dir", format!("{:?}", mesh.bare(&tiny())));
        mesh.add_node("expert-node-3", &[bare]);
        let shares =
            |now: &PlacementReply| counts(now).get("expert-node-3").is_some_and(|n| *n > 0);
        placed(&mesh, "", shares).await;
        assert!(
            mesh.number("expert-node-3", "moemesh_expert_node_fetched_bytes_total").await > 0.0
        );
        mesh.add_router("router-1", &[]);
        let shared = until(PATIENCE, async || running(&mesh, 1).await > 0);
        assert!(shared.await.is_some(), "the second router got no work");
        let names = |role| etcd.members(role);
        assert_eq!((names(Role::Router).await.len(), names(Role::ExpertNode).await.len()), (2, 4));
        // The first one leaves, and its streams and its office go to the second.
        mesh.routers.remove(0).terminate();
        let (name, _) = placed(&mesh, "router-0", |now| now.missing == 0).await;
        assert_eq!(name, "router-1");
        assert_eq!(names(Role::Router).await.len(), 1, "it has taken itself off the list");
        streams.end().await;
        mesh.routers[0].terminate();
    });
}

#[test]
fn another_router_takes_over_from_a_dead_controller() {
    let Some(etcd) = EtcdServer::start() else { return };
    alone(async {
        let mut mesh = replicated(&etcd, 3, 1).routers(2).history().start().await;
        let (first, before) = placed(&mesh, "", |now| now.missing == 0).await;
        let mut operations = OperationsClient::new(to(&mesh, &first));
        let drain = DrainNodeRequest { node: "expert-node-0".to_owned(), cancel: false };
        let mut drained = operations.drain(drain).await.unwrap().into_inner();
        while !drained.message().await.unwrap().is_some_and(|report| report.done) {}

        let streams = Streams::start(&mesh, 8).await;
        let at = mesh.routers.iter().position(|router| router.name == first).unwrap();
        while running(&mesh, at).await == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        mesh.routers[at].kill();
        mesh.nodes[1].kill();
        let killed = Instant::now();
        let whole = |now: &PlacementReply| now.missing == 0 && now.experts > 0;
        let (second, after) = placed(&mesh, &first, whole).await;
        println!(
            "{second} is controller and every expert has an owner after {:?}",
            killed.elapsed()
        );
        assert!(term(&after) > term(&before), "terms rise");
        // What was drained stays so under the new one.
        assert_eq!(counts(&after)["expert-node-0"], 0, "{:?}", counts(&after));
        let marked = |now: &PlacementReply| {
            now.nodes.iter().any(|node| node.node_id == "expert-node-0" && node.draining)
        };
        placed(&mesh, &first, marked).await;
        streams.end().await;
        let logs = mesh.routers.iter().map(|router| recorded(&mesh, &router.name).unwrap());
        usurpations_are_noticed(&logs.collect::<Vec<_>>());
    });
}

#[test]
fn a_controller_that_slept_past_its_term_moves_nothing() {
    let Some(etcd) = EtcdServer::start() else { return };
    alone(async {
        let mesh = replicated(&etcd, 3, 1).routers(2).start().await;
        let (first, before) = placed(&mesh, "", |now| now.missing == 0).await;
        let at = mesh.routers.iter().position(|router| router.name == first).unwrap();
        let halted = Halted::stop(mesh.routers[at].id());
        let (second, after) = placed(&mesh, &first, |now| now.missing == 0).await;
        assert!(term(&after) > term(&before));
        // Every node has heard of the new term before anything was moved.
        for node in &mesh.nodes {
            let mut control = ExpertControlClient::new(to(&mesh, &node.name));
            let heard = until(PATIENCE, async || {
                let about = control.clone().describe(DescribeRequest {}).await.unwrap();
                about.into_inner().obeyed.is_some_and(|order| order.term == term(&after))
            });
            assert!(heard.await.is_some(), "{} does not know the new term", node.name);
            let order = Some(Order { term: term(&before), epoch: 1_000_000 });
            let nothing = LoadRequest { order, ..LoadRequest::default() };
            let old = control.load(nothing).await.unwrap_err();
            assert_eq!(old.code(), Code::FailedPrecondition, "{old}");
        }
        drop(halted);
        // It wakes and knows by its own clock that its term is over.
        let mut operations = OperationsClient::new(to(&mesh, &first));
        let drain = DrainNodeRequest { node: "expert-node-0".to_owned(), cancel: false };
        let refused = operations.drain(drain).await.unwrap_err();
        assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
        let knows = until(PATIENCE, async || {
            let drain = DrainNodeRequest { node: "expert-node-0".to_owned(), cancel: false };
            let refused = operations.clone().drain(drain).await.unwrap_err();
            refused.message().contains(&format!("the controller is {second}"))
        });
        assert!(knows.await.is_some());
        let (_, last) = placed(&mesh, &first, |_| true).await;
        assert_eq!((term(&last), counts(&last)), (term(&after), counts(&after)));
    });
}

#[test]
fn without_etcd_members_stay_and_nothing_is_moved() {
    let Some(etcd) = EtcdServer::start() else { return };
    alone(async {
        let mut mesh = replicated(&etcd, 3, 2).routers(2).start().await;
        let (first, before) = placed(&mesh, "", |now| now.missing == 0).await;
        let streams = Streams::start(&mesh, 8).await;
        etcd.stop();
        // The term ends by the controller's own clock, and nobody else is elected.
        let over = until(PATIENCE, async || controller(&mesh, "").await.is_none());
        assert!(over.await.is_some(), "orders may still be given");
        let mut operations = OperationsClient::new(to(&mesh, &first));
        let drain = DrainNodeRequest { node: "expert-node-0".to_owned(), cancel: false };
        let refused = operations.drain(drain).await.unwrap_err();
        assert!(refused.message().contains("etcd does not"), "{refused}");
        // A node that dies meanwhile stays in the list, and is used when it is back.
        mesh.nodes[1].kill();
        let down = until(PATIENCE, async || {
            let said = mesh.status_of(0).await.unwrap();
            said.nodes.len() == 3 && said.nodes.iter().filter(|node| node.connected).count() == 2
        });
        assert!(down.await.is_some());
        mesh.nodes[1].restart();
        let back = until(PATIENCE, async || {
            let said = mesh.status_of(0).await.unwrap();
            said.ready && said.nodes.iter().all(|node| node.connected)
        });
        assert!(back.await.is_some(), "{:?}", mesh.status_of(0).await);
        assert!(controller(&mesh, "").await.is_none());
        etcd.go_on();
        let (_, after) = placed(&mesh, "", |now| now.missing == 0).await;
        assert!(term(&after) >= term(&before));
        let all = until(PATIENCE, async || {
            let (routers, nodes) = (etcd.members(Role::Router), etcd.members(Role::ExpertNode));
            (routers.await.len(), nodes.await.len()) == (2, 3)
        });
        assert!(all.await.is_some(), "not everybody has registered again");
        streams.end().await;
        mesh.stop();
    });
}

#[test]
fn a_name_is_one_process_and_a_term_is_had_once() {
    let Some(etcd) = EtcdServer::start() else { return };
    alone(async {
        let registered = |port: u16| {
            let endpoint = Endpoint::Tcp(format!("127.0.0.1:{port}"));
            let (role, id, model) = (Role::ExpertNode, "same".to_owned(), [0; 32]);
            let stop = Shutdown::new();
            let member = Member { role, id, endpoint, model };
            (tokio::spawn(etcd.client().register(member, stop.clone())), stop)
        };
        let is = async |port: u16| {
            let there = [format!("127.0.0.1:{port}")].into();
            until(PATIENCE, async || etcd.members(Role::ExpertNode).await == there).await.is_some()
        };
        let (first, stop_first) = registered(1);
        assert!(is(1).await);
        let (second, stop_second) = registered(2);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(is(1).await, "the name was taken over from a living process");
        stop_first.trigger();
        first.await.unwrap();
        assert!(is(2).await, "the name is free, and nobody takes it");
        stop_second.trigger();
        second.await.unwrap();

        // Two stand for the office; what nodes have obeyed is outbid by who holds it.
        let stand = |id: &str| {
            let (office, stop) = (Office::default(), Shutdown::new());
            let campaign = etcd.client().campaign(id.to_owned(), office.clone(), stop.clone());
            (tokio::spawn(campaign), office, stop)
        };
        let term = async |office: &Office, above: u64| {
            let now = || office.term(Instant::now()).unwrap_or(0);
            until(PATIENCE, async || now() > above).await.unwrap_or_else(|| panic!("no term"));
            now()
        };
        let (first, one, stop) = stand("one");
        let low = term(&one, 0).await;
        one.saw(5000);
        let high = term(&one, low).await;
        assert_eq!(high, 5001);
        let (_second, two, _stop) = stand("two");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(two.term(Instant::now()).unwrap_err().contains("the controller is one"));
        stop.trigger();
        first.await.unwrap();
        assert!(one.term(Instant::now()).is_err());
        assert_eq!(term(&two, 0).await, high + 1, "it has never heard of 5000 itself");
    });
}

#[test]
fn with_certificates_etcd_is_spoken_to_by_mutual_tls() {
    let certs = Certs::new(&["--routers", "2"]);
    let Some(etcd) = EtcdServer::secured(&certs.0) else { return };
    alone(async {
        let mesh = replicated(&etcd, 3, 1).routers(2).tls(&certs.0).start().await;
        let streams = Streams::start(&mesh, 4).await;
        streams.end().await;
        mesh.stop();
    });
}

/// The bar: three gateways, two routers, five nodes, and etcd away for a minute (in the
/// short form, for longer than a lease lasts).
fn placement_service_down(id: &'static str, title: &'static str, gone: bool) {
    let Some(etcd) = EtcdServer::start() else { return };
    let hold = Duration::from_secs(if is_long() { 60 } else { 8 });
    run(Scenario {
        id,
        title,
        mesh: replicated(&etcd, 5, 2).routers(2).gateways(3),
        load: Load { streams: 16, tokens: TOKENS, time: hold + Duration::from_secs(4) },
        faults: Faulting {
            when: When::Every(Duration::from_secs(3)),
            what: vec![Fault::Etcd { gone, hold }],
        },
        checks: vec![Check::NoneFailed, Check::Identical, Check::History],
    });
}

#[test]
fn r17_etcd_stopped() {
    placement_service_down("R17s", "etcd stopped; 3 gateways, 2 routers, 5 nodes", false);
}

#[test]
fn r17_etcd_restarted() {
    placement_service_down(
        "R17k",
        "etcd killed, later restarted; 3 gateways, 2 routers, 5 nodes",
        true,
    );
}
