//! Experts that move while requests run: loaded where they were lost, given to
//! nodes that join, taken from nodes that are drained. No token changes.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use mesh::tls::{Expected, Role};
use mesh::transport::{Endpoint, channel};
use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::expert_data_client::ExpertDataClient;
use proto::v1::operations_client::OperationsClient;
use proto::v1::{
    DescribeRequest, DispatchFrame, DropRequest, Dtype, ErrorCode, FetchRequest, LayerExperts,
    LoadRequest, NodeDescription, Order, PlacementReply, PlacementRequest, Source, WatchRequest,
    fetch_part,
};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tonic::Code;
use tonic::transport::Channel;

use crate::support::process::{moemesh, run};
use crate::support::sandbox::Plan;
use crate::support::{Fixture, Sandbox, block_on, http};

fn to(mesh: &Sandbox, name: &str) -> Channel {
    let endpoint = Endpoint::Unix(mesh.socket(name));
    channel(&endpoint, None, Expected::any(Role::ExpertNode)).unwrap()
}

async fn placement(mesh: &Sandbox) -> PlacementReply {
    let mut router = OperationsClient::new(to(mesh, "router-0"));
    for _ in 0..1200 {
        if let Ok(placement) = router.placement(PlacementRequest {}).await {
            return placement.into_inner();
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("the router never answered");
}

/// Waits for a placement as `wanted`; long enough for a loaded machine.
async fn placed(mesh: &Sandbox, wanted: impl Fn(&PlacementReply) -> bool) -> PlacementReply {
    for _ in 0..1200 {
        let now = placement(mesh).await;
        if wanted(&now) {
            return now;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("never placed as wanted: {:?}", placement(mesh).await);
}

/// How many experts each node owns, by name.
fn counts(placement: &PlacementReply) -> BTreeMap<&str, usize> {
    let count = |owned: &[LayerExperts]| owned.iter().map(|of| of.experts.len()).sum();
    placement.nodes.iter().map(|node| (node.node_id.as_str(), count(&node.owned))).collect()
}

/// Every expert has one owner, and nothing is under way.
fn calm(placement: &PlacementReply) -> bool {
    let owned: usize = counts(placement).values().sum();
    placement.missing == 0 && owned == placement.experts as usize
}

fn plan(fixture: &Fixture, nodes: usize) -> Plan {
    Sandbox::of(&fixture.dir).expert_nodes(nodes).router("controller", true)
}

fn body(tokens: &[u32]) -> Value {
    json!({
        "model": "test", "prompt": tokens, "temperature": 0, "max_tokens": 200,
        "ignore_eos": true, "return_token_ids": true,
    })
}

/// Eight requests that run, and what an undisturbed mesh answers.
struct Streams {
    running: JoinSet<(usize, (hyper::StatusCode, Value))>,
    want: Vec<Value>,
}

impl Streams {
    async fn start(mesh: &Sandbox, fixture: &Fixture) -> Self {
        let prompts = || fixture.prompts.iter().take(8);
        let mut want = Vec::new();
        for prompt in prompts() {
            let (status, answer) =
                http::post(&mesh.http, "/v1/completions", &body(&prompt.tokens)).await;
            assert_eq!(status, 200, "{answer}");
            want.push(answer["choices"][0]["token_ids"].clone());
        }
        let mut running = JoinSet::new();
        for (index, prompt) in prompts().enumerate() {
            let (address, body) = (mesh.http.clone(), body(&prompt.tokens));
            running.spawn(
                async move { (index, http::post(&address, "/v1/completions", &body).await) },
            );
        }
        while mesh.router_status().await.running == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Self { running, want }
    }

    /// None failed, and every token is that of the undisturbed mesh.
    async fn end(mut self) {
        while let Some(one) = self.running.join_next().await {
            let (index, (status, answer)) = one.unwrap();
            assert_eq!(status, 200, "{answer}");
            assert_eq!(answer["choices"][0]["token_ids"], self.want[index], "stream {index}");
        }
    }
}

#[test]
fn survivors_load_what_a_killed_node_was_the_only_owner_of() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mut mesh = plan(&fixture, 3).start().await;
        let before = placement(&mesh).await;
        let streams = Streams::start(&mesh, &fixture).await;
        mesh.nodes[1].kill();
        let killed = Instant::now();
        assert!(mesh.router_status().await.running > 0, "it was killed while streams ran");
        let after = placed(&mesh, |now| now.missing == 0 && now.epoch > before.epoch).await;
        println!("healthy again after {:?}", killed.elapsed());
        assert!(!counts(&after).contains_key("expert-node-1"), "it is not connected");
        streams.end().await;
        assert!(mesh.router_status().await.ready);

        // It comes back with its share, and what is double is given up again.
        mesh.nodes[1].restart();
        let back = |now: &PlacementReply| calm(now) && counts(now).contains_key("expert-node-1");
        let back = placed(&mesh, back).await;
        assert!(counts(&back).values().all(|count| *count > 0), "{:?}", counts(&back));
        mesh.wait_idle().await;
        mesh.stop();
    });
}

#[test]
fn a_node_joins_another_is_drained_and_stopped_and_no_token_changes() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mut mesh = plan(&fixture, 2).start().await;
        let router = format!("unix:{}", mesh.socket("router-0").display());
        let operate = |arguments: &[&str]| {
            let done = run(moemesh().args(arguments).args(["--router", &router]));
            assert!(done.0, "{arguments:?}: {}", done.2);
            done.1
        };
        let streams = Streams::start(&mesh, &fixture).await;
        mesh.add_node("expert-node-2", &[("join", format!("[{router:?}]"))]);
        let joined = |now: &PlacementReply| {
            calm(now) && counts(now).get("expert-node-2").is_some_and(|count| *count > 0)
        };
        placed(&mesh, joined).await;
        streams.end().await;
        let before = placement(&mesh).await;
        let said = operate(&["rebalance", "--dry-run"]);
        assert!(said.ends_with("none was made\n") || said == "nothing to move\n", "{said}");
        assert_eq!(counts(&placement(&mesh).await), counts(&before));

        let streams = Streams::start(&mesh, &fixture).await;
        let said = operate(&["drain", "expert-node-0"]);
        assert!(said.ends_with("expert-node-0 owns no expert: it can be stopped\n"), "{said}");
        let drained = placement(&mesh).await;
        assert_eq!((drained.missing, counts(&drained)["expert-node-0"]), (0, 0));
        let status = run(moemesh().args(["status", "--router", &router])).1;
        assert!(status.contains("drained: expert-node-0"), "{status}");
        mesh.nodes.remove(0).terminate();
        streams.end().await;
        let gone = format!("unix:{}", mesh.socket("expert-node-0").display());
        assert!(operate(&["leave", &gone]).contains("has left"));
        assert_eq!(placement(&mesh).await.nodes.len(), 2);

        // Whoever is the last cannot be emptied, nor can one that nobody knows.
        operate(&["drain", "expert-node-1"]);
        for (node, why) in [("expert-node-2", "only one"), ("nobody", "expert-node-1")] {
            let (done, _, said) = run(moemesh().args(["drain", node, "--router", &router]));
            assert!(!done && said.contains(why), "{said}");
        }
        let left = format!("unix:{}", mesh.socket("expert-node-2").display());
        let (done, _, said) = run(moemesh().args(["leave", &left, "--router", &router]));
        assert!(!done && said.contains("last owner"), "{said}");
        mesh.wait_idle().await;
        mesh.stop();
    });
}

#[test]
fn a_node_stays_drained_when_the_controller_is_killed() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mut mesh = plan(&fixture, 3).start().await;
        let router = format!("unix:{}", mesh.socket("router-0").display());
        let drain = |more: &[&str]| {
            let arguments = ["drain", "expert-node-1", "--router", &router];
            let done = run(moemesh().args(arguments).args(more));
            assert!(done.0, "{}", done.2);
        };
        let drained = |now: &PlacementReply| {
            let found = now.nodes.iter().find(|node| node.node_id == "expert-node-1");
            found.is_some_and(|node| node.draining && node.owned.is_empty())
        };
        drain(&[]);
        assert!(drained(&placement(&mesh).await));
        mesh.routers[0].kill();
        mesh.routers[0].restart();
        mesh.wait_ready().await;
        // A node that was not drained, and comes back empty, is given experts: by then this one
        // would have been, too.
        mesh.nodes[2].kill();
        mesh.nodes[2].restart();
        placed(&mesh, |now| calm(now) && counts(now).get("expert-node-2").is_some_and(|n| *n > 0))
            .await;
        let after = placement(&mesh).await;
        assert!(drained(&after), "{:?}", after.nodes);
        drain(&["--cancel"]);
        let back = |now: &PlacementReply| calm(now) && counts(now)["expert-node-1"] > 0;
        assert!(!drained(&placed(&mesh, back).await));
        mesh.wait_idle().await;
        mesh.stop();
    });
}

fn layer(owned: &[LayerExperts], layer: u32) -> Vec<u32> {
    let found = owned.iter().find(|of| of.layer == layer);
    found.map(|of| of.experts.clone()).unwrap_or_default()
}

fn order(term: u64, epoch: u64) -> Option<Order> {
    Some(Order { term, epoch })
}

/// What a node answers to a frame for one expert of layer 1.
async fn ask(node: Channel, about: &NodeDescription, expert: u32) -> Result<usize, ErrorCode> {
    let frame = DispatchFrame {
        ticket: 1,
        layer: 1,
        dtype: Dtype::Bf16 as i32,
        hidden: about.hidden,
        slot_counts: vec![1],
        experts: vec![expert],
        rows: vec![0; about.hidden as usize * 2].into(),
        ..Default::default()
    };
    let mut replies = ExpertDataClient::new(node)
        .dispatch(tokio_stream::iter([frame]))
        .await
        .unwrap()
        .into_inner();
    let reply = replies.message().await.unwrap().unwrap();
    match reply.error {
        None => Ok(reply.rows.len()),
        Some(error) => Err(ErrorCode::try_from(error.code).unwrap()),
    }
}

#[test]
fn a_node_obeys_the_newest_order_and_no_older_one() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mut mesh = Sandbox::of(&fixture.dir).expert_nodes(1).start().await;
        let all = ExpertControlClient::new(to(&mesh, "expert-node-0"));
        let all = all.clone().describe(DescribeRequest {}).await.unwrap().into_inner();
        let (count, bytes) = (layer(&all.owned, 1).len() as u32, all.resident_bytes);
        let each = bytes / all.owned.iter().map(|of| of.experts.len() as u64).sum::<u64>();

        // It may hold three experts and starts with none.
        let limit = (3 * each).to_string();
        let settings = [("shard_count", "0".to_owned()), ("memory_limit", limit)];
        mesh.add_node("expert-node-9", &settings);
        let mut node = ExpertControlClient::new(to(&mesh, "expert-node-9"));
        let mut changes = loop {
            match node.watch(WatchRequest {}).await {
                Ok(changes) => break changes.into_inner(),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let about = changes.message().await.unwrap().unwrap();
        assert_eq!((about.owned.len(), about.capacity_bytes), (0, 3 * each));

        let some = |experts: &[u32]| vec![LayerExperts { layer: 1, experts: experts.to_vec() }];
        let load = |at, experts: &[u32]| LoadRequest {
            order: at,
            experts: some(experts),
            sources: Vec::new(),
        };
        let loaded = node.load(load(order(5, 1), &[0, 1])).await.unwrap().into_inner();
        assert_eq!((loaded.loaded, loaded.resident_bytes), (2, 2 * each));
        let about = changes.message().await.unwrap().unwrap();
        assert_eq!(layer(&about.owned, 1), [0, 1], "it says so by itself");
        let again = node.load(load(order(5, 1), &[1, 0])).await.unwrap().into_inner();
        assert_eq!(again.loaded, 0, "the same order twice is the same");
        assert!(ask(to(&mesh, "expert-node-9"), &about, 1).await.is_ok());

        // What does not fit is refused as a whole, by how much, and harms nobody.
        let full = node.load(load(order(5, 2), &[2, 3, 4])).await.unwrap_err();
        assert_eq!(full.code(), Code::ResourceExhausted);
        assert!(full.message().contains(&format!("{} are missing", 2 * each)), "{full}");
        assert_eq!(ask(to(&mesh, "expert-node-9"), &about, 2).await, Err(ErrorCode::NotResident));
        assert!(ask(to(&mesh, "expert-node-9"), &about, 0).await.is_ok());

        // Orders of the past and of nowhere.
        let old = node.load(load(order(4, 99), &[2])).await.unwrap_err();
        assert_eq!(old.code(), Code::FailedPrecondition);
        for named in ["term 4 epoch 99", "term 5 epoch 2"] {
            assert!(old.message().contains(named), "{old}");
        }
        let stale = DropRequest { order: order(5, 1), experts: some(&[0]) };
        assert_eq!(node.drop(stale).await.unwrap_err().code(), Code::FailedPrecondition);
        for (at, experts) in [(None, &[2][..]), (order(6, 0), &[count])] {
            let bad = node.load(load(at, experts)).await.unwrap_err();
            assert_eq!(bad.code(), Code::InvalidArgument, "{bad}");
        }

        let dropped = DropRequest { order: order(6, 1), experts: some(&[0, 7]) };
        let dropped = node.drop(dropped).await.unwrap().into_inner();
        assert_eq!((dropped.dropped, dropped.resident_bytes), (1, each));
        assert_eq!(ask(to(&mesh, "expert-node-9"), &about, 0).await, Err(ErrorCode::NotResident));
        assert!(ask(to(&mesh, "expert-node-9"), &about, 1).await.is_ok());
        loop {
            let about = changes.message().await.unwrap().unwrap();
            if about.resident_bytes == each {
                assert_eq!(layer(&about.owned, 1), [1]);
                assert_eq!(about.obeyed, order(6, 1));
                break;
            }
        }
        drop(changes);
        mesh.stop();
    });
}

#[test]
fn a_node_without_weights_is_given_experts_by_its_peers_and_no_token_changes() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mut mesh = plan(&fixture, 2).start().await;
        let before = placement(&mesh).await;
        let router = format!("unix:{}", mesh.socket("router-0").display());
        let bare = mesh.bare(&fixture.dir);
        let streams = Streams::start(&mesh, &fixture).await;
        let settings = [("join", format!("[{router:?}]")), ("model_dir", format!("{bare:?}"))];
        mesh.add_node("expert-node-2", &settings);
        let joined = |now: &PlacementReply| {
            calm(now) && counts(now).get("expert-node-2").is_some_and(|count| *count > 0)
        };
        let given = placed(&mesh, joined).await;
        streams.end().await;

        // What it serves is what came, and what came is what others gave.
        let number = |text: &str, name: &str| -> u64 {
            let line = text.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
            line.rsplit_once(' ').unwrap().1.parse().unwrap()
        };
        let member = given.nodes.iter().find(|node| node.node_id == "expert-node-2").unwrap();
        let mut node = ExpertControlClient::new(to(&mesh, "expert-node-2"));
        let about = node.describe(DescribeRequest {}).await.unwrap().into_inner();
        assert!(about.partial && about.resident_bytes >= member.resident_bytes);
        let fetched = "moemesh_expert_node_fetched_bytes_total";
        let given_bytes = "moemesh_expert_node_given_bytes_total";
        let came = number(&mesh.metrics("expert-node-2").await, fetched);
        let mut gave = 0;
        for peer in ["expert-node-0", "expert-node-1"] {
            gave += number(&mesh.metrics(peer).await, given_bytes);
        }
        assert_eq!((came, gave), (about.resident_bytes, about.resident_bytes));

        // It is the only owner of some, so these streams were computed by it.
        let streams = Streams::start(&mesh, &fixture).await;
        streams.end().await;
        assert!(number(&mesh.metrics("expert-node-2").await, "moemesh_expert_node_rows_total") > 0);
        assert!(given.epoch > before.epoch);
        mesh.wait_idle().await;
        mesh.stop();
    });
}

#[test]
fn weights_go_to_a_node_of_the_same_model_only_and_a_bad_source_changes_nothing() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let mut mesh = Sandbox::of(&fixture.dir).expert_nodes(1).start().await;
        let router = format!("unix:{}", mesh.socket("router-0").display());
        let bare = mesh.bare(&fixture.dir);
        let settings = [("join", format!("[{router:?}]")), ("model_dir", format!("{bare:?}"))];
        mesh.add_node("expert-node-7", &settings);
        let mut node = ExpertControlClient::new(to(&mesh, "expert-node-7"));
        let about = loop {
            match node.describe(DescribeRequest {}).await {
                Ok(about) => break about.into_inner(),
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        };
        let mut owner = ExpertControlClient::new(to(&mesh, "expert-node-0"));
        let other = FetchRequest { model_digest: vec![7; 32].into(), experts: Vec::new() };
        let refused = owner.fetch(other).await.unwrap_err();
        assert!(refused.message().contains("another model"), "{refused}");
        let some = |experts: &[u32]| vec![LayerExperts { layer: 1, experts: experts.to_vec() }];
        let theirs = FetchRequest { model_digest: about.model_digest.clone(), experts: some(&[1]) };
        let refused = node.fetch(theirs).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{refused}");

        let source = |name: &str, experts: &[u32]| Source {
            endpoint: format!("unix:{}", mesh.socket(name).display()),
            node_id: name.to_owned(),
            experts: some(experts),
        };
        let load = |epoch, sources| LoadRequest {
            order: order(9, epoch),
            experts: some(&[0, 1]),
            sources,
        };
        for (epoch, sources, code, why) in [
            (1, vec![], Code::NotFound, "layer 1 expert 0: its file is not here"),
            (2, vec![source("expert-node-0", &[0])], Code::NotFound, "layer 1 expert 1"),
            (3, vec![source("nobody", &[0, 1])], Code::Unavailable, "nobody at unix:"),
            // Half of it from one that has it, half from one that has not.
            (
                4,
                vec![source("expert-node-0", &[0]), source("expert-node-7", &[1])],
                Code::Unavailable,
                "layer 1 expert 1 is not resident here",
            ),
        ] {
            let refused = node.load(load(epoch, sources)).await.unwrap_err();
            assert_eq!(refused.code(), code, "{refused}");
            assert!(refused.message().contains(why), "{refused}");
            let now = node.describe(DescribeRequest {}).await.unwrap().into_inner();
            assert_eq!((now.owned.len(), now.resident_bytes), (0, 0), "all or nothing");
        }
        let loaded = node.load(load(5, vec![source("expert-node-0", &[0, 1])])).await.unwrap();
        assert_eq!(loaded.into_inner().loaded, 2);
        assert!(ask(to(&mesh, "expert-node-7"), &about, 1).await.is_ok());
        // What has come is given on.
        let again =
            FetchRequest { model_digest: about.model_digest.clone(), experts: some(&[0, 1]) };
        let mut parts = node.fetch(again).await.unwrap().into_inner();
        let mut digests = 0;
        while let Some(part) = parts.message().await.unwrap() {
            digests += usize::from(matches!(part.part, Some(fetch_part::Part::Sha256(_))));
        }
        assert_eq!(digests, 2);
        drop(parts);
        mesh.stop();
    });
}
