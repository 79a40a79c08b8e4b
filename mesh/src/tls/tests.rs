//! Real sockets: who is served, who is refused, and what both ends are told.

mod support;

use std::io;

use proto::v1::expert_control_client::ExpertControlClient;
use proto::v1::{DescribeRequest, DrainRequest};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tonic::Code;

use self::support::{Authority, Served, anonymous, owner};
use super::*;
use crate::transport::{self, Endpoint, channel, channel_and_peer};

const NODE: Role = Role::ExpertNode;

async fn describe(
    served: &Served,
    tls: Option<&Tls>,
    expected: Expected,
) -> Result<String, String> {
    let channel = channel(&served.endpoint, tls, expected).unwrap();
    let answer = ExpertControlClient::new(channel).describe(DescribeRequest {}).await;
    answer.map(|about| about.into_inner().node_id).map_err(|status| transport::explain(&status))
}

#[tokio::test]
async fn both_ends_know_each_other_on_tcp_and_unix_sockets() {
    let authority = Authority::new("m");
    let router = authority.load(Role::Router, "r0");
    let socket = authority.dir.join("n.sock");
    for endpoint in ["127.0.0.1:0".to_owned(), format!("unix:{}", socket.display())] {
        let served = Served::start(&endpoint, Some(authority.load(NODE, "n0"))).await;
        let expected = Expected { role: NODE, id: Some("n0".to_owned()) };
        let (channel, peer) = channel_and_peer(&served.endpoint, Some(&router), expected).unwrap();
        assert_eq!(peer.principal(), None);
        let answer = ExpertControlClient::new(channel).describe(DescribeRequest {}).await;
        assert_eq!(answer.unwrap().into_inner().node_id, "n0");
        assert_eq!(peer.principal().unwrap().to_string(), "spiffe://m/expert-node/n0");
        let health = channel_and_peer(&served.endpoint, Some(&router), Expected::any(NODE));
        let mut health = tonic_health::pb::health_client::HealthClient::new(health.unwrap().0);
        let asked = health.check(tonic_health::pb::HealthCheckRequest::default()).await;
        assert_eq!(asked.unwrap().into_inner().status, 1, "serving");
        served.stop().await;
    }
}

#[tokio::test]
async fn a_client_that_is_not_of_the_mesh_is_refused_at_both_ends() {
    let authority = Authority::new("m");
    let served = Served::start("127.0.0.1:0", Some(authority.load(NODE, "n0"))).await;
    let other = Authority::new("m");
    let neighbour = Authority::sharing_key("elsewhere", &authority);
    let cases = [
        // Its own files are in order, but of another authority of the same name.
        (other.trusting(Role::Router, "r0", &authority), "unknown_authority", "does not trust"),
        // Signed by our authority's key for another mesh.
        (neighbour.trusting(Role::Router, "r0", &authority), "identity", "whose log says why"),
        // Expired after it was loaded.
        (authority.expired(Role::Router, "r0"), "expired", "has expired"),
    ];
    for (client, reason, want) in cases {
        let told = describe(&served, Some(&client), Expected::any(NODE)).await.unwrap_err();
        assert!(told.contains(want), "{reason}: {told}");
        let counted = format!("moemesh_tls_refused_total{{reason=\"{reason}\"}} 1");
        assert!(served.metrics.encode().contains(&counted), "{}", served.metrics.encode());
    }
    // Without any certificate.
    let socket = TcpStream::connect(served.endpoint.to_string()).await.unwrap();
    let connected = anonymous(&authority, socket).await;
    let refused = match connected {
        Ok(mut stream) => stream.read(&mut [0; 1]).await.unwrap_err(),
        Err(error) => error,
    };
    let told = explain(&refused).unwrap();
    assert!(told.contains("is required by the other end"), "{told}");
    assert!(served.metrics.encode().contains("tls_refused_total{reason=\"no_certificate\"} 1"));
    // And everyone else is served.
    let router = authority.load(Role::Router, "r0");
    assert_eq!(describe(&served, Some(&router), Expected::any(NODE)).await.unwrap(), "n0");
    served.stop().await;
}

#[tokio::test]
async fn a_server_that_is_somebody_else_is_refused_by_name() {
    let authority = Authority::new("m");
    let router = authority.load(Role::Router, "r0");
    let want = |id: &str| Expected { role: NODE, id: Some(id.to_owned()) };
    let served = Served::start("127.0.0.1:0", Some(authority.load(NODE, "n0"))).await;
    let told = describe(&served, Some(&router), want("n7")).await.unwrap_err();
    assert_eq!(
        told,
        "another node is at this address: it is expert-node/n0, expected was expert-node/n7"
    );
    served.stop().await;

    let served = Served::start("127.0.0.1:0", Some(authority.load(Role::Router, "n0"))).await;
    let told = describe(&served, Some(&router), Expected::any(NODE)).await.unwrap_err();
    assert_eq!(told, "it is router/n0, not a process of role expert-node");
    served.stop().await;

    let other = Authority::new("m");
    let served = Served::start("127.0.0.1:0", Some(other.load(NODE, "n0"))).await;
    let told = describe(&served, Some(&router), Expected::any(NODE)).await.unwrap_err();
    assert_eq!(told, "its certificate is of an authority that is not in tls_ca");
    served.stop().await;

    let neighbour = Authority::sharing_key("elsewhere", &authority);
    let served = Served::start("127.0.0.1:0", Some(neighbour.load(NODE, "n0"))).await;
    let told = describe(&served, Some(&router), Expected::any(NODE)).await.unwrap_err();
    assert_eq!(told, "it belongs to the mesh `elsewhere`, this process to `m`");
    served.stop().await;

    let served = Served::start("127.0.0.1:0", Some(authority.expired(NODE, "n0"))).await;
    let told = describe(&served, Some(&router), Expected::any(NODE)).await.unwrap_err();
    assert!(told.starts_with("its certificate expired "), "{told}");
    served.stop().await;
}

#[tokio::test]
async fn a_caller_of_the_wrong_role_is_told_so_and_counted() {
    let authority = Authority::new("m");
    let served = Served::start("127.0.0.1:0", Some(authority.load(NODE, "n0"))).await;
    let gateway = authority.load(Role::Gateway, "g0");
    let channel = channel(&served.endpoint, Some(&gateway), Expected::any(NODE)).unwrap();
    let denied =
        ExpertControlClient::new(channel).drain(DrainRequest::default()).await.unwrap_err();
    assert_eq!(denied.code(), Code::PermissionDenied);
    assert_eq!(
        denied.message(),
        "gateway/g0 may not call /moemesh.v1.ExpertControl/Drain, which is for router and operator"
    );
    assert!(served.metrics.encode().contains("moemesh_tls_denied_calls_total 1"));
    served.stop().await;
}

#[tokio::test]
async fn plain_text_and_tls_do_not_meet_and_both_ends_say_why() {
    let authority = Authority::new("m");
    let socket = authority.dir.join("n.sock");
    for endpoint in ["127.0.0.1:0".to_owned(), format!("unix:{}", socket.display())] {
        let served = Served::start(&endpoint, Some(authority.load(NODE, "n0"))).await;
        let told = describe(&served, None, Expected::any(NODE)).await.unwrap_err();
        assert_eq!(told, "it accepts only mutual TLS: set tls_cert, tls_key and tls_ca");
        assert!(served.metrics.encode().contains("tls_refused_total{reason=\"plaintext\"} "));
        served.stop().await;

        let plain = Served::start(&endpoint, None).await;
        let router = authority.load(Role::Router, "r0");
        let told = describe(&plain, Some(&router), Expected::any(NODE)).await.unwrap_err();
        assert_eq!(told, "it does not speak TLS: set tls_cert, tls_key and tls_ca there too");
        plain.stop().await;
    }
    // HTTP/1.1, or anything else, meets a clean end.
    let served = Served::start("127.0.0.1:0", Some(authority.load(NODE, "n0"))).await;
    for greeting in [&b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"[..], &[0; 1000], b"\x16\x03\x01\xff\xff"]
    {
        let mut socket = TcpStream::connect(served.endpoint.to_string()).await.unwrap();
        socket.write_all(greeting).await.unwrap();
        socket.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let end = socket.read_to_end(&mut answer).await;
        assert!(end.is_ok(), "{greeting:?}: {end:?}");
    }
    served.stop().await;
}

#[tokio::test]
async fn who_does_not_shake_hands_keeps_nobody_out() {
    let authority = Authority::new("m");
    let served = Served::start("127.0.0.1:0", Some(authority.load(NODE, "n0"))).await;
    let address = served.endpoint.to_string();
    // Gone before, amidst and after their first bytes.
    for count in 0..1000 {
        let mut socket = TcpStream::connect(&address).await.unwrap();
        if count % 2 == 0 {
            socket.write_all(&[0x16, 3, 1]).await.unwrap();
        }
    }
    // More than may shake hands at one time, and they say nothing.
    let mut silent = Vec::new();
    for _ in 0..400 {
        silent.push(TcpStream::connect(&address).await.unwrap());
    }
    let router = authority.load(Role::Router, "r0");
    assert_eq!(describe(&served, Some(&router), Expected::any(NODE)).await.unwrap(), "n0");
    // The first was pushed out, the last runs out of time.
    for socket in [0, 399] {
        assert_eq!(silent[socket].read(&mut [0]).await.unwrap(), 0);
    }
    let metrics = served.metrics.encode();
    for reason in ["pushed_out", "slow"] {
        let series = format!("moemesh_tls_refused_total{{reason=\"{reason}\"}} ");
        assert!(metrics.contains(&series), "{metrics}");
    }
    served.stop().await;
}

#[tokio::test]
async fn new_files_are_used_by_new_connections_and_bad_ones_by_none() {
    let authority = Authority::new("m");
    let node = authority.load(NODE, "n0");
    let served = Served::start("127.0.0.1:0", Some(node.clone())).await;
    let router = authority.load(Role::Router, "r0");
    let present = async || -> Vec<u8> {
        let socket = Socket::connect(&served.endpoint).await.unwrap();
        let (stream, _) = router.connect(socket, &Expected::any(NODE)).await.unwrap();
        stream.get_ref().1.peer_certificates().unwrap()[0].to_vec()
    };
    let channel = channel(&served.endpoint, Some(&router), Expected::any(NODE)).unwrap();
    let mut open = ExpertControlClient::new(channel);
    open.describe(DescribeRequest {}).await.unwrap();
    let first = present().await;
    assert_eq!(present().await, first);

    authority.issue(NODE, "n0");
    assert_eq!(present().await, first, "not before it is told");
    assert!(node.reload());
    let second = present().await;
    assert_ne!(second, first);

    // Half written, of another holder, without its key: the old one stays.
    let files = authority.files(NODE, "n0");
    let owned = owner(NODE, "n0");
    let whole = std::fs::read(&files.certificate).unwrap();
    std::fs::write(&files.certificate, &whole[..whole.len() / 2]).unwrap();
    let told = Tls::load(&files, owned).unwrap_err().to_string();
    assert!(told.contains("it is cut short"), "{told}");
    assert!(!node.reload());
    let stranger = authority.issue(NODE, "n1");
    std::fs::copy(&stranger.certificate, &files.certificate).unwrap();
    std::fs::copy(&stranger.key, &files.key).unwrap();
    assert!(!node.reload());
    std::fs::write(&files.certificate, &whole).unwrap();
    assert!(!node.reload());
    assert_eq!(present().await, second);
    let metrics = served.metrics.encode();
    assert!(metrics.contains("moemesh_tls_reloads_total 1\n"), "{metrics}");
    assert!(metrics.contains("moemesh_tls_failed_reloads_total 3\n"), "{metrics}");
    // The connection from before all that has noticed nothing.
    open.describe(DescribeRequest {}).await.unwrap();
    assert_eq!(served.connections(), 1, "it is still the same one");
    served.stop().await;
}

#[tokio::test]
async fn how_long_certificates_last_can_be_read() {
    let authority = Authority::new("m");
    let served = Served::start("127.0.0.1:0", Some(authority.load(NODE, "n0"))).await;
    let metrics = served.metrics.encode();
    for of in ["own", "authority"] {
        let series = format!("moemesh_tls_certificate_expiry_seconds{{certificate=\"{of}\"}} ");
        let line = metrics.lines().find_map(|line| line.strip_prefix(&series)).unwrap();
        let left: i64 = line.parse().unwrap();
        assert_eq!(left > 86_400 * 365, of == "authority", "{line}");
        assert!(left > 0);
    }
    served.stop().await;
}

#[test]
fn files_that_cannot_be_used_are_named_with_the_reason() {
    let authority = Authority::new("m");
    let good = authority.issue(NODE, "n0");
    let elsewhere = Authority::new("m");
    let other = elsewhere.issue(NODE, "n0");
    let missing = authority.dir.join("missing");
    let refuse = |files: &Files, owner: Owner| Tls::load(files, owner).unwrap_err().to_string();
    let at = |edit: fn(&mut Files, &Files, &std::path::Path)| {
        let mut files = good.clone();
        edit(&mut files, &other, &missing);
        refuse(&files, owner(NODE, "n0"))
    };
    for (told, want) in [
        (at(|f, _, missing| f.certificate = missing.into()), "cannot read"),
        (at(|f, _, missing| f.key = missing.into()), "cannot read"),
        (at(|f, _, missing| f.authorities = missing.into()), "cannot read"),
        (at(|f, _, _| f.certificate = f.key.clone()), "holds no certificate"),
        (at(|f, _, _| f.key = f.certificate.clone()), "holds no private key"),
        (at(|f, other, _| f.key = other.key.clone()), "is not the key of"),
        (at(|f, other, _| f.certificate = other.certificate.clone()), "is not the key of"),
        (
            at(|f, other, _| {
                (f.certificate, f.key) = (other.certificate.clone(), other.key.clone());
            }),
            "not in tls_ca",
        ),
        (at(|f, _, _| f.certificate = f.authorities.clone()), "is not spiffe://<mesh>/<role>/<id>"),
        (refuse(&good, owner(NODE, "n1")), "this process is expert-node `n1`"),
        (refuse(&good, owner(Role::Router, "n0")), "this process is router `n0`"),
        (
            refuse(&good, Owner { role: Role::Gateway, id: None }),
            "is the certificate of spiffe://m/expert-node/n0, this process is of role gateway",
        ),
    ] {
        assert!(told.contains(want), "{told}");
        assert!(told.starts_with('/') || told.starts_with("cannot read /"), "names a file: {told}");
    }
    let (past, _) = authority.issue_expired(NODE, "n0");
    assert!(refuse(&past, owner(NODE, "n0")).contains("its certificate expired "));
}

#[tokio::test]
async fn an_endpoint_nobody_listens_on_is_no_matter_of_tls() {
    let authority = Authority::new("m");
    let router = authority.load(Role::Router, "r0");
    let nobody: Endpoint = format!("unix:{}", authority.dir.join("no").display()).parse().unwrap();
    let error = Socket::connect(&nobody).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::NotFound);
    let channel = channel(&nobody, Some(&router), Expected::any(NODE)).unwrap();
    let status = ExpertControlClient::new(channel).describe(DescribeRequest {}).await.unwrap_err();
    assert_eq!(explain(&status), None);
    assert!(transport::explain(&status).contains("No such file"), "{status:?}");
}
