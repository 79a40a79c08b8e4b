//! Sources that answer what they should not: each is refused by name, and nothing is kept.

use mesh::lifecycle::Shutdown;
use mesh::metrics::Metrics;
use mesh::transport;
use model::synthetic::{Recipe, TempDir};
use parking_lot::Mutex;
use proto::v1::expert_control_server::{ExpertControl, ExpertControlServer};
use proto::v1::{
    DescribeRequest, DrainReply, DrainRequest, DropReply, DropRequest, LoadReply, LoadRequest,
    NodeDescription, NodeStatus, NodeStatusRequest, SetDrainedReply, SetDrainedRequest,
    WatchRequest,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::Routes;
use tonic::{Request, Response};

use super::*;

/// Answers every fetch with what it was given last, then hangs or ends.
#[derive(Clone, Default)]
struct Scripted(Arc<Mutex<(Vec<Part>, bool)>>);

type Answer<T> = Result<Response<T>, Status>;

#[tonic::async_trait]
impl ExpertControl for Scripted {
    type FetchStream = ReceiverStream<Result<FetchPart, Status>>;

    async fn fetch(&self, _: Request<FetchRequest>) -> Answer<Self::FetchStream> {
        let (parts, hang) = self.0.lock().clone();
        let (send, stream) = mpsc::channel(1);
        tokio::spawn(async move {
            for part in parts {
                let _ = send.send(Ok(FetchPart { part: Some(part) })).await;
            }
            if hang {
                send.closed().await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Answer<NodeDescription> {
        Err(Status::unimplemented(""))
    }

    async fn status(&self, _: Request<NodeStatusRequest>) -> Answer<NodeStatus> {
        Err(Status::unimplemented(""))
    }

    async fn drain(&self, _: Request<DrainRequest>) -> Answer<DrainReply> {
        Err(Status::unimplemented(""))
    }

    type WatchStream = tokio_stream::Empty<Result<NodeDescription, Status>>;

    async fn watch(&self, _: Request<WatchRequest>) -> Answer<Self::WatchStream> {
        Err(Status::unimplemented(""))
    }

    async fn load(&self, _: Request<LoadRequest>) -> Answer<LoadReply> {
        Err(Status::unimplemented(""))
    }

    async fn drop(&self, _: Request<DropRequest>) -> Answer<DropReply> {
        Err(Status::unimplemented(""))
    }

    async fn set_drained(&self, _: Request<SetDrainedRequest>) -> Answer<SetDrainedReply> {
        Err(Status::unimplemented(""))
    }
}

/// What a good source sends for expert `index` of layer 1.
fn good(checkpoint: &Arc<Checkpoint>, index: u32) -> Vec<Part> {
    let expert = Expert::load(checkpoint, 1, index as usize).unwrap();
    let head = ExpertHead { layer: 1, expert: index, length: expert.bytes() as u64 };
    let mut parts = vec![Part::Head(head)];
    let digest = expert.pass_on(1 << 10, |piece| {
        parts.push(Part::Bytes(piece.to_vec().into()));
        true
    });
    parts.push(Part::Sha256(digest.unwrap().to_vec().into()));
    parts
}

#[tokio::test]
async fn what_a_source_should_not_say_is_refused_by_name() {
    let dir = TempDir::with(&Recipe::small()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let fetcher = Fetcher {
        checkpoint: checkpoint.clone(),
        tls: None,
        metrics: Metrics::default().register(NodeMetrics::new),
    };
    let listener = transport::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let (endpoint, shutdown) = (listener.local().to_string(), Shutdown::new());
    let scripted = Scripted::default();
    let routes = Routes::new(ExpertControlServer::new(scripted.clone()));
    let stop = shutdown.clone();
    let serving = tokio::spawn(async move {
        let stop = async move { stop.wait().await };
        transport::serve_grpc(listener, routes, None, stop).await.unwrap();
    });
    let experts = vec![LayerExperts { layer: 1, experts: vec![3, 4] }];
    let sources = [Source { endpoint, node_id: "giver".to_owned(), experts }];
    let keys = [(LayerId(1), ExpertId(3)), (LayerId(1), ExpertId(4))];

    let right = [good(&checkpoint, 3), good(&checkpoint, 4)].concat();
    let last = right.len() - 1;
    *scripted.0.lock() = (right.clone(), false);
    let fetched = fetcher.fetch(&keys, &sources).await.unwrap();
    assert!(fetched.iter().map(|(key, _)| *key).eq(keys));
    let came = fetcher.metrics.fetched_bytes.get();
    assert_eq!(came, fetched.iter().map(|(_, expert)| expert.bytes() as u64).sum::<u64>());

    let other = good(&checkpoint, 5).pop().unwrap();
    type Spoil<'a> = &'a dyn Fn(&mut Vec<Part>);
    let cases: [(&str, bool, Spoil<'_>); 10] = [
        ("in place of ExpertHead", false, &|parts| drop(parts.remove(0))),
        ("in place of ExpertHead", false, &|parts| parts[0] = right[last / 2 + 1].clone()),
        ("length: 1099511627776", false, &|parts| {
            parts[0] = Part::Head(ExpertHead { layer: 1, expert: 3, length: 1 << 40 });
        }),
        ("9 bytes in place of a digest", false, &|parts| {
            let at = parts.len() - 1;
            parts.insert(at, Part::Bytes(vec![0; 9].into()));
        }),
        ("bytes where", false, &|parts| parts[1] = Part::Bytes(vec![0; 1 << 20].into())),
        ("0 bytes where", false, &|parts| parts.insert(1, Part::Bytes(Vec::new().into()))),
        ("expert 4, fetched: other bytes came", false, &|parts| parts[last] = other.clone()),
        ("a digest where", false, &|parts| drop(parts.remove(last - 1))),
        ("ended before all had come", false, &|parts| parts.truncate(last - 2)),
        ("it sent nothing for", true, &|parts| parts.truncate(last - 2)),
    ];
    for (want, hang, spoil) in cases {
        let mut parts = right.clone();
        spoil(&mut parts);
        *scripted.0.lock() = (parts, hang);
        let refused = fetcher.fetch(&keys, &sources).await.err().unwrap().to_string();
        assert!(
            refused.contains(want) && refused.starts_with("giver at 127.0.0.1:"),
            "{want}: {refused}"
        );
    }
    assert_eq!(fetcher.metrics.fetched_bytes.get(), came, "what was refused does not count");
    shutdown.trigger();
    serving.await.unwrap();
}
