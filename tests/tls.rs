//! Mutual TLS between real processes: the same answers as without it, strangers
//! refused, and certificates replaced under load.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mesh::tls::{Expected, Role, Socket, Tls};
use mesh::transport::{self, Endpoint, channel};
use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::expert_control_server::{ExpertControl, ExpertControlServer};
use proto::v1::expert_data_client::ExpertDataClient;
use proto::v1::inference_client::InferenceClient;
use proto::v1::{
    DescribeRequest, DrainReply, DrainRequest, GenerateRequest, NodeDescription, NodeStatus,
    NodeStatusRequest,
};
use serde_json::json;
use tokio::io::AsyncReadExt as _;
use tonic::{Code, Request, Response, Status};

use crate::support::http::{self, Address};
use crate::support::process::{free_port, moemesh, run};
use crate::support::sandbox::{identity, tls_settings};
use crate::support::{Fixture, Sandbox, Up, block_on};

/// A directory of certificates, removed at the end.
struct Certs(PathBuf);

impl Certs {
    /// As `moemesh certs all` makes them.
    fn new(extra: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("moecerts-{}-{count}", std::process::id()));
        let certs = Self(dir);
        let (ok, said, error) = run(moemesh().args(["certs", "all"]).arg(&certs.0).args(extra));
        assert!(ok, "{error}");
        assert!(said.contains("issued spiffe://moemesh/router/router-0"), "{said}");
        certs
    }

    fn issue(&self, role: &str, id: &str) {
        let (ok, _, error) = run(&mut self.command(role, id));
        assert!(ok, "{error}");
    }

    fn command(&self, role: &str, id: &str) -> Command {
        let mut command = moemesh();
        command.args(["certs", "issue"]).arg(&self.0);
        command.args(["--force", "--role", role, "--id", id]);
        command
    }

    fn of(&self, role: Role, id: &str) -> Tls {
        identity(&self.0, role, id)
    }
}

impl Drop for Certs {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn node_socket(mesh: &Sandbox, index: usize) -> Endpoint {
    Endpoint::Unix(mesh.socket(&format!("expert-node-{index}")))
}

#[test]
fn a_mesh_with_tls_answers_as_one_without() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let certs = Certs::new(&[]);
        let extra = || json!({ "max_tokens": 24, "return_token_ids": true, "logprobs": 3 });
        let plain = Sandbox::of(&fixture.dir).start().await;
        let secured = Sandbox::of(&fixture.dir).tls(&certs.0).start().await;
        for prompt in fixture.prompts.iter().take(4) {
            let want = plain.complete(&prompt.tokens, extra()).await;
            assert_eq!(secured.complete(&prompt.tokens, extra()).await, want);
        }
        let status = secured.router_status().await;
        assert!(status.nodes.iter().all(|node| node.connected), "{status:?}");
        let admin = Address::Unix(secured.socket("expert-node-0-admin"));
        let (_, metrics) = http::get(&admin, "/metrics").await.unwrap();
        for want in [
            "moemesh_tls_certificate_expiry_seconds{certificate=\"own\"} 31",
            "moemesh_tls_certificate_expiry_seconds{certificate=\"authority\"} 315",
            "moemesh_tls_denied_calls_total 0",
        ] {
            assert!(metrics.contains(want), "{want}: {metrics}");
        }
        secured.stop();
        plain.stop();
    });
}

/// What each caller is told who calls what is not his to call.
#[test]
fn calls_are_for_the_roles_in_the_table_only() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let certs = Certs::new(&[]);
        let mesh = Sandbox::of(&fixture.dir).tls(&certs.0).start().await;
        let gateway = certs.of(Role::Gateway, "gateway-0");
        let router = certs.of(Role::Router, "router-0");
        let node = certs.of(Role::ExpertNode, "expert-node-1");
        let operator = certs.of(Role::Operator, "operator-0");
        let to_node = |tls| {
            channel(&node_socket(&mesh, 0), Some(tls), Expected::any(Role::ExpertNode)).unwrap()
        };
        let router_socket = Endpoint::Unix(mesh.socket("router-0"));
        let to_router =
            |tls| channel(&router_socket, Some(tls), Expected::any(Role::Router)).unwrap();

        let mut denied = Vec::new();
        for tls in [&gateway, &node, &operator] {
            let frames = tokio_stream::iter(Vec::new());
            denied.push(ExpertDataClient::new(to_node(tls)).dispatch(frames).await.unwrap_err());
        }
        for tls in [&gateway, &node] {
            let mut control = ExpertControlClient::new(to_node(tls));
            denied.push(control.describe(DescribeRequest {}).await.unwrap_err());
            denied.push(control.status(NodeStatusRequest {}).await.unwrap_err());
            denied.push(control.drain(DrainRequest::default()).await.unwrap_err());
        }
        for tls in [&router, &node] {
            let mut inference = InferenceClient::new(to_router(tls));
            denied.push(inference.generate(GenerateRequest::default()).await.unwrap_err());
        }
        for status in &denied {
            assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
            assert!(status.message().contains(" may not call /moemesh.v1."), "{status:?}");
        }
        let want = "expert-node/expert-node-1 may not call /moemesh.v1.Inference/Generate, \
                    which is for gateway and operator";
        assert_eq!(denied.last().unwrap().message(), want);

        // What is allowed works: an operator may even generate.
        let request = GenerateRequest {
            request_id: "by-hand".to_owned(),
            tokens: fixture.prompts[0].tokens.clone(),
            max_tokens: 2,
            sampling: Some(proto::v1::Sampling::default()),
            ..Default::default()
        };
        let mut events = InferenceClient::new(to_router(&operator))
            .generate(request)
            .await
            .unwrap()
            .into_inner();
        assert!(events.message().await.unwrap().is_some());
        let about = ExpertControlClient::new(to_node(&operator)).status(NodeStatusRequest {}).await;
        assert!(about.is_ok());
        let admin = Address::Unix(mesh.socket("expert-node-0-admin"));
        let (_, metrics) = http::get(&admin, "/metrics").await.unwrap();
        assert!(metrics.contains("moemesh_tls_denied_calls_total 9"), "{metrics}");
        // Nobody was harmed.
        mesh.complete(&fixture.prompts[0].tokens, json!({ "max_tokens": 2 })).await;
    });
}

/// A node that says it is whoever it is told to.
struct Pretender(&'static str);

#[tonic::async_trait]
impl ExpertControl for Pretender {
    async fn describe(
        &self,
        _: Request<DescribeRequest>,
    ) -> Result<Response<NodeDescription>, Status> {
        Ok(Response::new(NodeDescription { node_id: self.0.to_owned(), ..Default::default() }))
    }

    async fn status(&self, _: Request<NodeStatusRequest>) -> Result<Response<NodeStatus>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Result<Response<DrainReply>, Status> {
        Err(Status::unimplemented(""))
    }
}

#[test]
fn a_router_refuses_nodes_that_are_not_who_they_should_be() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let (certs, strange) = (Certs::new(&[]), Certs::new(&[]));
        let cases = [
            (
                certs.of(Role::ExpertNode, "expert-node-0"),
                "expert-node-1",
                "it calls itself `expert-node-1`",
            ),
            (
                certs.of(Role::Router, "router-0"),
                "expert-node-0",
                "it is router/router-0, not a process of role expert-node",
            ),
            (
                strange.of(Role::ExpertNode, "expert-node-0"),
                "expert-node-0",
                "authority that is not in tls_ca",
            ),
        ];
        let mut endpoints = Vec::new();
        for (tls, says, _) in &cases {
            let listener = transport::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
            endpoints.push(listener.local().to_string());
            let service = ExpertControlServer::new(Pretender(says));
            let (routes, tls) = (tonic::service::Routes::new(service), tls.clone());
            tokio::spawn(async move {
                transport::serve_grpc(listener, routes, Some(&tls), std::future::pending()).await
            });
        }
        let nodes = format!("{endpoints:?}");
        let mesh = Sandbox::of(&fixture.dir).tls(&certs.0).router_nodes(nodes).spawn();
        let mut told = Vec::new();
        for _ in 0..1200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if !mesh.socket("router-0").exists() {
                continue;
            }
            told = mesh.router_status().await.nodes.into_iter().map(|node| node.detail).collect();
            if !told.is_empty() && told.iter().all(|detail| detail != "not connected yet") {
                break;
            }
        }
        assert_eq!(told.len(), cases.len());
        for ((_, _, want), told) in cases.iter().zip(&told) {
            assert!(told.contains(want), "{told}");
        }
    });
}

/// Another node of the same mesh and the same model takes over an address.
#[test]
fn another_node_at_a_known_address_is_refused_until_the_first_is_back() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let certs = Certs::new(&["--expert-nodes", "2"]);
        let mut mesh = Sandbox::of(&fixture.dir).expert_nodes(1).tls(&certs.0).start().await;
        let rewrite = |mesh: &Sandbox, from: &str, to: &str| {
            let path = mesh.dir.join("expert-node-0.toml");
            let text = std::fs::read_to_string(&path).unwrap();
            let id = |id: &str| format!("id = \"{id}\"");
            let text = text.replace(&id(from), &id(to));
            let text = text.replace(&tls_settings(&certs.0, from), &tls_settings(&certs.0, to));
            std::fs::write(path, text).unwrap();
        };
        mesh.nodes[0].kill();
        rewrite(&mesh, "expert-node-0", "expert-node-1");
        mesh.nodes[0].restart();
        let mut told = String::new();
        for _ in 0..1200 {
            tokio::time::sleep(Duration::from_millis(50)).await;
            let node = mesh.router_status().await.nodes.remove(0);
            assert!(!node.connected || node.node_id == "expert-node-0");
            told = node.detail;
            if told.contains("another node") {
                break;
            }
        }
        assert_eq!(
            told,
            "another node is at this address: it is expert-node/expert-node-1, \
             expected was expert-node/expert-node-0"
        );
        mesh.nodes[0].kill();
        rewrite(&mesh, "expert-node-1", "expert-node-0");
        mesh.nodes[0].restart();
        mesh.wait_ready().await;
        mesh.complete(&fixture.prompts[0].tokens, json!({ "max_tokens": 2 })).await;
    });
}

#[test]
fn certificates_are_replaced_while_streams_run_and_nothing_fails() {
    block_on(async {
        const STREAMS: usize = 8;
        const ROTATIONS: usize = 3;
        let fixture = Fixture::load("plain");
        let certs = Certs::new(&[]);
        let mesh = Sandbox::of(&fixture.dir).tls(&certs.0).start().await;
        let body = |prompt: &[u32]| {
            json!({
                "model": "test", "prompt": prompt, "temperature": 0, "max_tokens": 150,
                "ignore_eos": true, "return_token_ids": true,
            })
        };
        let mut want = Vec::new();
        for prompt in fixture.prompts.iter().take(STREAMS) {
            let (status, answer) =
                http::post(&mesh.http, "/v1/completions", &body(&prompt.tokens)).await;
            assert_eq!(status, 200, "{answer}");
            want.push(answer["choices"][0]["token_ids"].clone());
        }

        let rotating = Arc::new(std::sync::atomic::AtomicBool::new(true));
        let mut streams = tokio::task::JoinSet::new();
        for (prompt, want) in fixture.prompts.iter().zip(want) {
            let (address, body) = (mesh.http.clone(), body(&prompt.tokens));
            let rotating = rotating.clone();
            streams.spawn(async move {
                let mut served = 0;
                while served == 0 || rotating.load(Ordering::Relaxed) {
                    let (status, answer) = http::post(&address, "/v1/completions", &body).await;
                    assert_eq!(status, 200, "{answer}");
                    assert_eq!(answer["choices"][0]["token_ids"], want);
                    served += 1;
                }
                served
            });
        }
        let router = certs.of(Role::Router, "router-0");
        let mut before = presented(&mesh, &router).await;
        let roles = [
            ("gateway", "gateway-0"),
            ("router", "router-0"),
            ("expert-node", "expert-node-0"),
            ("expert-node", "expert-node-1"),
            ("expert-node", "expert-node-2"),
        ];
        for _ in 0..ROTATIONS {
            let running = mesh.router_status().await.running;
            for (role, id) in roles {
                certs.issue(role, id);
            }
            let mut tries = 0;
            loop {
                let now = presented(&mesh, &router).await;
                if now.iter().zip(&before).all(|(now, before)| now != before) {
                    before = now;
                    break;
                }
                assert!(tries < 1200, "the new certificates are not used");
                tries += 1;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            assert!(running > 0, "streams ran when the certificates were replaced");
        }
        // What cannot be used is not: the last good one stays.
        let file = certs.0.join("expert-node-0.pem");
        std::fs::write(&file, "-----BEGIN CERTIFICATE-----\n").unwrap();
        let admin = Address::Unix(mesh.socket("expert-node-0-admin"));
        let failed = async || {
            let (_, metrics) = http::get(&admin, "/metrics").await.unwrap();
            metrics.contains("moemesh_tls_failed_reloads_total 1\n")
        };
        while !failed().await {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(presented(&mesh, &router).await, before);

        rotating.store(false, Ordering::Relaxed);
        let mut served = 0;
        while let Some(stream) = streams.join_next().await {
            served += stream.unwrap();
        }
        assert!(served >= STREAMS);
        let status = mesh.wait_idle().await;
        assert!(status.nodes.iter().all(|node| node.connected && node.retries == 0), "{status:?}");
    });
}

/// The certificates that every serving process shows to a new connection.
async fn presented(mesh: &Sandbox, router: &Tls) -> Vec<Vec<u8>> {
    let router_socket = Endpoint::Unix(mesh.socket("router-0"));
    let mut all = vec![(router_socket, Role::Router)];
    all.extend((0..3).map(|index| (node_socket(mesh, index), Role::ExpertNode)));
    let mut shown = Vec::new();
    for (endpoint, role) in all {
        let socket = Socket::connect(&endpoint).await.unwrap();
        let (stream, _) = router.connect(socket, &Expected::any(role)).await.unwrap();
        shown.push(stream.get_ref().1.peer_certificates().unwrap()[0].to_vec());
    }
    shown
}

#[test]
fn up_with_tls_serves_and_lets_in_only_its_own() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let dir = Certs::new(&[]);
        let generate = |extra: &[&str]| {
            let mut command = moemesh();
            command.args([
                "generate",
                "1 2 3",
                "--max-tokens",
                "12",
                "--temperature",
                "0",
                "--model",
            ]);
            run(command.arg(&fixture.dir).args(extra).env("XDG_RUNTIME_DIR", &dir.0))
        };
        let (ok, plain, error) = generate(&[]);
        assert!(ok, "{error}");
        let (ok, secured, error) = generate(&["--tls"]);
        assert!(ok, "{error}");
        assert_eq!(secured, plain);

        let up = Up::start(&fixture.dir, &["--tls"], &[("XDG_RUNTIME_DIR", &dir.0)]).await;
        let status =
            |args: &[&str]| run(moemesh().arg("status").args(args).env("XDG_RUNTIME_DIR", &dir.0));
        let (ok, said, error) = status(&[]);
        assert!(ok, "{said}{error}");

        // The same socket without a certificate, with one of another authority, and
        // with half of one.
        let runtime = std::fs::read_dir(&dir.0).unwrap().map(|entry| entry.unwrap().path());
        let runtime = runtime.into_iter().find(|path| path.join("state.json").exists()).unwrap();
        let router = format!("unix:{}", runtime.join("router-0.sock").display());
        let (ok, said, _) = status(&["--router", &router]);
        assert!(!ok && said.contains("it accepts only mutual TLS"), "{said}");
        let file = |name: &str| dir.0.join(name).display().to_string();
        let (cert, key, ca) = (file("operator-0.pem"), file("operator-0.key"), file("ca.pem"));
        let foreign = ["--tls-cert", &cert, "--tls-key", &key, "--tls-ca", &ca];
        let (ok, said, _) = status(&[&["--router", router.as_str()], &foreign[..]].concat());
        assert!(!ok && said.contains("authority that is not in tls_ca"), "{said}");
        let (ok, _, error) = status(&["--router", &router, "--tls-cert", &cert, "--tls-ca", &ca]);
        assert!(!ok && error.contains("all three are needed, --tls-key is missing"), "{error}");
        // A socket that says nothing is no harm; the mesh still serves.
        let socket = Socket::connect(&router.parse().unwrap()).await.unwrap();
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(runtime.join("certs/ca.key")).unwrap().permissions(),
        );
        assert_eq!(mode & 0o777, 0o600);
        let (ok, _, error) = status(&[]);
        assert!(ok, "{error}");
        drop(socket);
        assert!(up.end("INT").success());
        assert!(!runtime.exists(), "the keys are gone with the mesh");
    });
}

#[test]
fn a_process_does_not_start_with_files_that_are_not_its_own() {
    let fixture = Fixture::load("plain");
    let certs = Certs::new(&[]);
    let strange = Certs::new(&[]);
    let start = |role: &str, settings: &[String]| {
        let mut command = moemesh();
        command.args([role, "--set", "listen=127.0.0.1:0"]);
        command.arg("--set").arg(format!("model_dir={}", fixture.dir.display()));
        for setting in settings {
            command.args(["--set", setting]);
        }
        let status = command.stdin(std::process::Stdio::null()).output().unwrap();
        (status.status.code(), String::from_utf8_lossy(&status.stderr).into_owned())
    };
    let files = |dir: &Path, id: &str| -> Vec<String> {
        let settings = tls_settings(dir, id).replace(" = ", "=").replace('"', "");
        settings.lines().map(str::to_owned).collect()
    };
    let mixed = |id: &str| -> Vec<String> {
        let (own, other) = (files(&certs.0, id), files(&strange.0, id));
        vec![own[0].clone(), own[1].clone(), other[2].clone()]
    };
    let one = |which: usize| vec![files(&certs.0, "router-0")[which].clone()];
    let open = |more: &[&str]| -> Vec<String> {
        ["listen=0.0.0.0:0"].iter().chain(more).map(|text| (*text).to_owned()).collect()
    };
    for (role, settings, want) in [
        ("router", files(&certs.0, "gateway-0"), "this process is of role router"),
        (
            "expert-node",
            files(&certs.0, "expert-node-1"),
            "this process is expert-node `expert-node-0`",
        ),
        ("router", mixed("router-0"), "authority that is not in tls_ca"),
        (
            "router",
            one(0),
            "key `tls_cert`: TLS needs tls_cert, tls_key and tls_ca; not set: tls_key and tls_ca",
        ),
        (
            "router",
            one(2),
            "key `tls_ca`: TLS needs tls_cert, tls_key and tls_ca; not set: tls_cert and tls_key",
        ),
        (
            "expert-node",
            open(&[]),
            "key `listen`: other machines reach 0.0.0.0:0, and without TLS anyone",
        ),
        ("router", open(&["insecure=false"]), "or insecure = true where the network is trusted"),
        ("router", open(&["insecure=maybe"]), "expected true or false, found `maybe`"),
    ] {
        let (code, said) = start(role, &settings);
        assert_eq!(code, Some(64), "{said}");
        assert!(said.contains(want), "{want}: {said}");
    }
}

/// Plain text on an address that others reach, where somebody asked for it; and
/// a socket that is opened and left alone is closed.
#[test]
fn insecure_is_possible_when_it_is_said() {
    block_on(async {
        let fixture = Fixture::load("plain");
        let port = free_port();
        let mut node = moemesh()
            .args(["expert-node", "--set", &format!("listen=0.0.0.0:{port}")])
            .args(["--set", "insecure=true", "--set"])
            .arg(format!("model_dir={}", fixture.dir.display()))
            .stdin(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let endpoint: Endpoint = format!("127.0.0.1:{port}").parse().unwrap();
        loop {
            let channel = channel(&endpoint, None, Expected::any(Role::ExpertNode)).unwrap();
            if ExpertControlClient::new(channel).describe(DescribeRequest {}).await.is_ok() {
                break;
            }
            assert!(node.try_wait().unwrap().is_none(), "the node ended");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        node.kill().unwrap();
        node.wait().unwrap();

        let certs = Certs::new(&[]);
        let mesh = Sandbox::of(&fixture.dir).tls(&certs.0).start().await;
        let mut silent = Socket::connect(&node_socket(&mesh, 0)).await.unwrap();
        assert_eq!(silent.read(&mut [0]).await.unwrap(), 0);
    });
}
