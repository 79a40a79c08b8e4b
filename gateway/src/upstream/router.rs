//! One router: its channel, what it last said of itself, and how many sequences
//! this gateway has there. A router that does not answer is not ready.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use bytes::Bytes;
use mesh::tls::{self, Expected, Role, Tls};
use mesh::transport::{self, Endpoint, channel};
use parking_lot::Mutex;
use proto::v1::inference_client::InferenceClient;
use proto::v1::{GenerateEvent, GenerateRequest, RouterStatus, RouterStatusRequest};
use tokio::sync::watch;
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::pick::hash;
use crate::error::Error;

const STATUS_TIMEOUT: Duration = Duration::from_secs(1);
/// A router too busy to answer in time keeps its last status this long.
const STATUS_LIFE: Duration = Duration::from_secs(3);

/// What must be equal for a sequence to go on with the same tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Class {
    numerics: String,
    device: String,
    model_digest: Bytes,
}

impl Class {
    pub fn of(status: &RouterStatus) -> Self {
        Self {
            numerics: status.numerics.clone(),
            device: status.device.clone(),
            model_digest: status.model_digest.clone(),
        }
    }
}

/// One router.
pub struct Router {
    pub endpoint: Endpoint,
    /// Hash of the endpoint, the same on every gateway.
    pub id: u64,
    client: InferenceClient<Channel>,
    vocab_size: u32,
    state: ArcSwap<State>,
    /// True while it has not answered for [`STATUS_LIFE`].
    silent: watch::Sender<bool>,
    /// When it last answered or was named, if it was only learned of.
    heard: Mutex<Option<Instant>>,
    in_flight: AtomicU64,
}

struct State {
    status: Result<Arc<RouterStatus>, String>,
    /// What it said, where it is not ready only for want of some experts.
    degraded: Option<Arc<RouterStatus>>,
    /// When it was last ready.
    ready: Option<Instant>,
    at: Instant,
}

/// One sequence's place in [`Router::in_flight`].
pub struct Lease(Arc<Router>);

impl Drop for Lease {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Router {
    pub fn new(endpoint: &Endpoint, tls: Option<&Tls>, vocab_size: u32) -> Result<Self, Error> {
        let channel = channel(endpoint, tls, Expected::any(Role::Router))?;
        let client = InferenceClient::new(channel)
            .max_decoding_message_size(proto::MAX_MESSAGE_BYTES)
            .max_encoding_message_size(proto::MAX_MESSAGE_BYTES);
        Ok(Self {
            endpoint: endpoint.clone(),
            id: hash(endpoint.to_string().bytes()),
            client,
            vocab_size,
            state: ArcSwap::from_pointee(State {
                status: Err("not asked yet".to_owned()),
                degraded: None,
                ready: None,
                at: Instant::now(),
            }),
            silent: watch::Sender::new(false),
            heard: Mutex::default(),
            in_flight: AtomicU64::new(0),
        })
    }

    /// It is no router that was configured, but one that is learned of now.
    pub fn learned(&self) {
        *self.heard.lock() = Some(Instant::now());
    }

    /// It is named again, or answers.
    pub fn hear(&self) {
        if let Some(heard) = self.heard.lock().as_mut() {
            *heard = Instant::now();
        }
    }

    /// When it last answered or was named; none where it is configured.
    pub fn heard(&self) -> Option<Instant> {
        *self.heard.lock()
    }

    /// The last status, if it says ready; else why not.
    pub fn status(&self) -> Result<Arc<RouterStatus>, String> {
        self.state.load().status.clone()
    }

    /// The last status, if nothing but some experts is missing.
    pub fn degraded(&self) -> Option<Arc<RouterStatus>> {
        self.state.load().degraded.clone()
    }

    /// It was ready not longer ago than `time`.
    pub fn was_ready_within(&self, time: Duration) -> bool {
        self.state.load().ready.is_some_and(|ready| ready.elapsed() < time)
    }

    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Takes the router out until its next status.
    pub fn suspect(&self, reason: &Status) {
        self.set(Err(describe(reason)), None);
    }

    /// Asks for the status and keeps the answer.
    pub async fn refresh(&self) {
        let mut client = self.client.clone();
        let asked = client.status(RouterStatusRequest {});
        match tokio::time::timeout(STATUS_TIMEOUT, asked).await {
            Ok(Ok(answer)) => {
                self.hear();
                let answer = answer.into_inner();
                let ready = RouterStatus { ready: true, ..answer.clone() };
                let degraded = answer.degraded.then(|| self.judge(ready).ok()).flatten();
                self.set(self.judge(answer), degraded);
            }
            Ok(Err(status)) => self.set(Err(describe(&status)), None),
            Err(_) => {
                if self.state.load().at.elapsed() > STATUS_LIFE {
                    self.set(Err("does not answer".to_owned()), None);
                    self.silent.send_replace(true);
                }
                return;
            }
        }
        self.silent.send_replace(false);
    }

    /// Resolves while it is silent: it hangs, or cannot be reached, and its
    /// connections do not know yet.
    pub async fn silent(&self) {
        let mut heard = self.silent.subscribe();
        // The sender lives as long as `self`, so this cannot end early.
        let _ = heard.wait_for(|&silent| silent).await;
    }

    fn judge(&self, status: RouterStatus) -> Result<Arc<RouterStatus>, String> {
        if status.draining {
            return Err("draining".to_owned());
        }
        if !status.ready {
            let detail = if status.detail.is_empty() { "not ready" } else { &status.detail };
            return Err(detail.to_owned());
        }
        if status.vocab_size != self.vocab_size {
            let (theirs, ours) = (status.vocab_size, self.vocab_size);
            return Err(format!("serves a vocabulary of {theirs}, not {ours}: another model"));
        }
        Ok(Arc::new(status))
    }

    fn set(&self, status: Result<Arc<RouterStatus>, String>, degraded: Option<Arc<RouterStatus>>) {
        let at = Instant::now();
        let ready = if status.is_ok() { Some(at) } else { self.state.load().ready };
        let before = self.state.swap(Arc::new(State { status, degraded, ready, at }));
        match (&before.status, &self.state.load().status) {
            (Err(_), Ok(_)) => tracing::info!(router = %self.endpoint, "router is ready"),
            (Ok(_), Err(reason)) => {
                tracing::warn!(router = %self.endpoint, reason, "router is not ready");
            }
            _ => {}
        }
    }

    /// Starts a sequence. The lease counts it until dropped.
    pub async fn generate(
        self: &Arc<Self>,
        request: GenerateRequest,
    ) -> Result<(Streaming<GenerateEvent>, Lease), Status> {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        let lease = Lease(Arc::clone(self));
        let mut client = self.client.clone();
        let stream = client.generate(request).await?.into_inner();
        Ok((stream, lease))
    }
}

/// Short and in people's words.
fn describe(status: &Status) -> String {
    if let Some(told) = tls::explain(status) {
        return told;
    }
    match status.code() {
        Code::Unavailable => format!("unreachable: {}", transport::explain(status)),
        code => format!("{code:?}: {}", status.message()),
    }
}
