//! A collector of traces that hangs, beside one that is well and none at all.

use std::convert::Infallible;
use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use mesh::transport;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::NamedService;

use super::load::{Balancer, Clients, asks};
use super::observe::{Figures, metric, ms};
use super::run::alone;
use super::scenario::{seconds, skipped};
use crate::support::http::Address;
use crate::support::sandbox::Plan;
use crate::support::{Sandbox, tiny};

const STREAMS: usize = 16;
const TOKENS: usize = 64;
/// Of requests that are traced.
const SHARE: f64 = 0.01;
/// Runs of each mesh.
const ROUNDS: usize = 5;
/// What a trace collector may cost where it hangs, to one that is well.
const BAR: f64 = 1.05;

/// Takes every export, and counts its bytes.
#[derive(Clone, Default)]
struct Collector(Arc<AtomicU64>);

impl NamedService for Collector {
    const NAME: &'static str = "opentelemetry.proto.collector.trace.v1.TraceService";
}

impl Service<http::Request<Body>> for Collector {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let taken = self.0.clone();
        Box::pin(async move {
            let export = request.into_body().collect().await.map(|all| all.to_bytes());
            taken.fetch_add(export.map_or(0, |bytes| bytes.len() as u64), Ordering::Relaxed);
            // An empty message: all spans were accepted.
            let reply = Full::new(Bytes::from_static(&[0; 5]));
            let ok = http::HeaderMap::from_iter([(
                http::HeaderName::from_static("grpc-status"),
                http::HeaderValue::from_static("0"),
            )]);
            let reply = Body::new(reply.with_trailers(std::future::ready(Some(Ok(ok)))));
            let mut response = http::Response::new(reply);
            let kind = http::HeaderValue::from_static("application/grpc");
            response.headers_mut().insert(http::header::CONTENT_TYPE, kind);
            Ok(response)
        })
    }
}

/// Every role sends its spans to `collector`.
fn traced(plan: Plan, collector: &str) -> Plan {
    ["gateway", "router", "expert-node"].into_iter().fold(plan, |plan, role| {
        let otlp = format!("\"http://{collector}\"");
        plan.set(role, "otlp", otlp).set(role, "trace_sample", SHARE)
    })
}

/// Spans that no collector got, of all processes that tell.
async fn lost(mesh: &Sandbox) -> f64 {
    let sides = mesh.routers.iter().chain(&mesh.nodes);
    let sides = sides.map(|of| Address::Unix(mesh.socket(&format!("{}-admin", of.name))));
    let mut sum = 0.0;
    for address in sides.chain(mesh.addresses.iter().cloned()) {
        sum += metric(&address, "moemesh_process_lost_spans_total").await;
    }
    sum
}

/// One load on one mesh: what was answered, and its 99th percentile of gaps.
async fn measure(mesh: &Sandbox, time: Duration) -> (usize, Duration) {
    let asks = Arc::new(asks(TOKENS));
    let kinds = asks.len();
    let clients = Clients::start(STREAMS, asks, Arc::new(Balancer::new(&mesh.addresses)));
    let begun = Instant::now();
    tokio::time::sleep(time).await;
    let samples = clients.finish().await;
    let figures = Figures::of(&samples, &vec![None; kinds], begun.elapsed());
    mesh.wait_idle().await;
    assert_eq!((figures.cut.len(), figures.refused), (0, 0), "{:?}", figures.cut);
    (figures.answered, figures.gap_p99)
}

#[test]
fn r17_collector_hangs() {
    if skipped("R17") {
        return;
    }
    alone(async {
        let plan = || Sandbox::of(tiny()).expert_nodes(4).replicas(2).logged();
        let (well, listener) = (Collector::default(), "127.0.0.1:0".parse().unwrap());
        let listener = transport::bind(&listener).await.unwrap();
        let at = listener.local().to_string();
        let routes = tonic::service::Routes::new(well.clone());
        tokio::spawn(transport::serve_grpc(listener, routes, None, std::future::pending()));
        // The kernel takes connections and what they send; nobody reads it.
        let deaf = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let hung = deaf.local_addr().unwrap().to_string();
        let meshes = [
            plan().start().await,
            traced(plan(), &at).start().await,
            traced(plan(), &hung).start().await,
        ];
        // In turns, so that what the machine does meanwhile meets all.
        let time = seconds(180, 180) / (meshes.len() * ROUNDS) as u32;
        let (mut p99, mut answered) = ([const { Vec::new() }; 3], [0; 3]);
        for round in 0..ROUNDS {
            for turn in 0..meshes.len() {
                // Nobody always follows the same one.
                let which = if round % 2 == 0 { turn } else { meshes.len() - 1 - turn };
                let (whole, gap) = measure(&meshes[which], time).await;
                answered[which] += whole;
                p99[which].push(gap);
            }
        }
        p99.iter_mut().for_each(|times| times.sort_unstable());
        let middle = |times: &[Duration]| times[times.len() / 2];
        let ratio = |one: usize, to: usize| {
            middle(&p99[one]).as_secs_f64() / middle(&p99[to]).as_secs_f64()
        };
        let shown: Vec<String> = p99
            .iter()
            .map(|times| times.iter().map(|t| ms(*t).to_string()).collect::<Vec<_>>().join(", "))
            .collect();
        println!(
            "| R17 | a trace collector that hangs, {SHARE} traced, {ROUNDS} runs each in turn | {} \
             answered, 0 cut ({} with one that is well, {} with none) | gap p99 {} ms, one that is \
             well {} ms, none {} ms | hung to well x{:.3}, well to none x{:.3} |",
            answered[2],
            answered[1],
            answered[0],
            shown[2],
            shown[1],
            shown[0],
            ratio(2, 1),
            ratio(1, 0),
        );
        println!(
            "{}",
            serde_json::json!({
                "id": "R17", "answered": answered, "hung_to_well": ratio(2, 1),
                "well_to_none": ratio(1, 0), "bytes_taken": well.0.load(Ordering::Relaxed),
            })
        );
        // It did happen: one got spans, and the other was sent some and took none.
        let mut sent = [0; 1024];
        let (mut waits, _) = deaf.accept().unwrap();
        assert!(waits.read(&mut sent).unwrap() > 0 && well.0.load(Ordering::Relaxed) > 0);
        let lost = lost(&meshes[2]).await;
        assert!(lost > 0.0, "every span is held somewhere");
        assert_eq!(self::lost(&meshes[1]).await, 0.0, "a collector that is well gets all");
        assert!(ratio(2, 1) <= BAR, "x{:.3}, bar x{BAR}: {p99:?}", ratio(2, 1));
        for mesh in meshes {
            mesh.stop();
        }
    });
}
