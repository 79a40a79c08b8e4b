//! Certificates over time and by command: replaced under load, made for `moemesh
//! up --tls`, and refused when they are not a process's own.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mesh::tls::{Expected, Role, Socket, Tls};
use mesh::transport::{Endpoint, channel};
use proto::v1::DescribeRequest;
use proto::v1::expert_control_client::ExpertControlClient;
use serde_json::json;
use tokio::io::AsyncReadExt as _;

use super::node_socket;
use crate::support::certs::Certs;
use crate::support::http::{self, Address};
use crate::support::process::{free_port, moemesh, run, signal};
use crate::support::sandbox::tls_settings;
use crate::support::{Fixture, Sandbox, block_on};

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

        let rotating = Arc::new(AtomicBool::new(true));
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
            let mut waited = 0;
            while mesh.router_status().await.running == 0 {
                waited += 1;
                assert!(waited < 10_000, "no stream runs when certificates are replaced");
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
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

        let address = format!("127.0.0.1:{}", free_port());
        let mut up = moemesh()
            .args(["up", "--tls", "--no-demo", "--http", &address, "--model"])
            .arg(&fixture.dir)
            .env("XDG_RUNTIME_DIR", &dir.0)
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let address = Address::Tcp(address);
        while !http::get(&address, "/readyz").await.is_ok_and(|(status, _)| status == 200) {
            assert!(up.try_wait().unwrap().is_none(), "the mesh ended");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
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
        signal(up.id(), "INT");
        assert!(up.wait().unwrap().success());
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
