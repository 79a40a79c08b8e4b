//! A router that says what a script tells it to, behind real gRPC.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mesh::lifecycle::Shutdown;
use mesh::transport::{self, Endpoint};
use parking_lot::Mutex;
use proto::v1::generate_event::Event;
use proto::v1::inference_server::{Inference, InferenceServer};
use proto::v1::{
    Alternative, FinishReason, Finished, GenerateEvent, GenerateRequest, PromptScores,
    RouterStatus, RouterStatusRequest, TokenEvent, TokenScore,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status};

/// What the router does with the next calls.
#[derive(Clone)]
pub struct Script {
    /// The sequence every prompt goes on with, then the end id.
    pub ids: Vec<u32>,
    pub pause: Duration,
    /// Calls to refuse before anything is emitted.
    pub refuse: Vec<Code>,
    /// Positions at which calls break off, one a call.
    pub break_at: Vec<u32>,
    /// The position at which a call and then the whole router hangs.
    pub hang_at: Option<u32>,
    pub hangs: bool,
    pub status: RouterStatus,
}

/// A running router. Stops when dropped.
pub struct FakeRouter {
    pub endpoint: Endpoint,
    pub script: Arc<Mutex<Script>>,
    pub seen: Arc<Mutex<Vec<GenerateRequest>>>,
    /// Sequences under way.
    pub live: Arc<AtomicU32>,
    shutdown: Shutdown,
}

impl Drop for FakeRouter {
    fn drop(&mut self) {
        self.shutdown.trigger();
    }
}

#[derive(Clone)]
struct Service {
    script: Arc<Mutex<Script>>,
    seen: Arc<Mutex<Vec<GenerateRequest>>>,
    live: Arc<AtomicU32>,
}

pub fn status() -> RouterStatus {
    RouterStatus {
        router_id: "fake".to_owned(),
        numerics: "f32".to_owned(),
        device: "cpu".to_owned(),
        ready: true,
        max_waiting: 8,
        max_context: 512,
        vocab_size: super::VOCAB,
        ..RouterStatus::default()
    }
}

/// Starts a router that goes on with `text`, one byte a token.
pub async fn start(text: &str) -> FakeRouter {
    let script = Arc::new(Mutex::new(Script {
        ids: text.bytes().map(u32::from).collect(),
        pause: Duration::ZERO,
        refuse: Vec::new(),
        break_at: Vec::new(),
        hang_at: None,
        hangs: false,
        status: status(),
    }));
    let (seen, live) = (Arc::default(), Arc::default());
    let service =
        Service { script: Arc::clone(&script), seen: Arc::clone(&seen), live: Arc::clone(&live) };
    let listener = transport::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
    let endpoint = listener.local();
    let shutdown = Shutdown::new();
    let stop = shutdown.clone();
    let routes = tonic::service::Routes::new(InferenceServer::new(service));
    tokio::spawn(async move {
        transport::serve_grpc(listener, routes, None, async move { stop.wait().await })
            .await
            .unwrap();
    });
    FakeRouter { endpoint, script, seen, live, shutdown }
}

/// Counts a sequence for as long as its task runs.
struct Live(Arc<AtomicU32>);

impl Drop for Live {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStream = ReceiverStream<Result<GenerateEvent, Status>>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let request = request.into_inner();
        self.seen.lock().push(request.clone());
        let (script, break_at) = {
            let mut script = self.script.lock();
            if let Some(code) = script.refuse.pop() {
                return Err(Status::new(code, "as scripted"));
            }
            (script.clone(), script.break_at.pop())
        };
        let shared = Arc::clone(&self.script);
        let (sender, receiver) = mpsc::channel(4);
        self.live.fetch_add(1, Ordering::SeqCst);
        let live = Live(Arc::clone(&self.live));
        tokio::spawn(async move {
            let _live = live;
            let hang_at = script.hang_at;
            tokio::select! {
                () = run(request, script, break_at, sender.clone()) => {
                    if hang_at.is_some() {
                        shared.lock().hangs = true;
                        sender.closed().await;
                    }
                }
                () = sender.closed() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn status(
        &self,
        _: Request<RouterStatusRequest>,
    ) -> Result<Response<RouterStatus>, Status> {
        let script = self.script.lock().clone();
        if script.hangs {
            std::future::pending::<()>().await;
        }
        Ok(Response::new(script.status))
    }
}

/// The id's score, with alternatives at ids 1, 2, ...
pub fn score(id: u32, alternatives: u32) -> TokenScore {
    let top =
        (1..=alternatives).map(|id| Alternative { id: id + 96, logprob: -(id as f32) }).collect();
    TokenScore { id, logprob: -(id as f32) / 100.0, top }
}

async fn run(
    request: GenerateRequest,
    script: Script,
    break_at: Option<u32>,
    sender: mpsc::Sender<Result<GenerateEvent, Status>>,
) {
    let send = async |event| {
        let event = GenerateEvent { event: Some(event) };
        sender.send(Ok(event)).await.is_ok()
    };
    let prompt = request.tokens.len() - request.emitted as usize;
    if let Some(alternatives) = request.prompt_logprobs {
        let scores = request.tokens[1..prompt].iter().map(|&id| score(id, alternatives));
        send(Event::Prompt(PromptScores { scores: scores.collect() })).await;
    }
    let mut reason = FinishReason::Length;
    for position in request.emitted..request.max_tokens {
        if script.hang_at == Some(position) {
            return;
        }
        if break_at == Some(position) {
            let _ = sender.send(Err(Status::unavailable("as scripted"))).await;
            return;
        }
        tokio::time::sleep(script.pause).await;
        let id = script.ids.get(position as usize).copied().unwrap_or(super::EOS);
        let score = request.logprobs.map(|alternatives| score(id, alternatives));
        if !send(Event::Token(TokenEvent { id, score })).await {
            return;
        }
        if request.stop_ids.contains(&id) {
            reason = FinishReason::Stop;
            break;
        }
    }
    let finished = Finished { reason: reason.into(), ..Finished::default() };
    send(Event::Finished(finished)).await;
}
