//! A router as it is deployed, a process with trunk, links and scheduler, in
//! front of stub nodes; asked over gRPC, without a gateway.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow, bail, ensure};
use mesh::tls::{Expected, Role};
use mesh::transport::{self, Endpoint};
use proto::v1::generate_event::Event;
use proto::v1::inference_client::InferenceClient;
use proto::v1::{GenerateRequest, Sampling};
use tokio::task::JoinSet;
use tonic::transport::Channel;

use crate::client::http::Server;
use crate::up::runtime_dir::RuntimeDir;

const READY_WITHIN: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Tokens that all sequences together may hold.
const KV_TOKENS: usize = 16_384;

/// Ends with this value.
pub struct RouterProcess {
    process: Child,
    client: InferenceClient<Channel>,
    side: Server,
    _dir: RuntimeDir,
}

/// What some tokens took.
#[derive(Clone, Copy, Debug)]
pub struct Used {
    pub tokens: u64,
    /// On all CPUs together.
    pub cpu: Duration,
    pub frames: u64,
    pub wall: Duration,
}

impl RouterProcess {
    /// Returns when it is ready to work.
    pub async fn start(model: &Path, nodes: &[String], threads: usize) -> anyhow::Result<Self> {
        let dir = RuntimeDir::create().context("cannot make a directory for sockets")?;
        let socket = |name: &str| Endpoint::Unix(dir.path().join(name));
        let (listen, admin) = (socket("router.sock"), socket("router.admin.sock"));
        let settings = [
            format!("listen={listen}"),
            format!("admin={admin}"),
            format!("model_dir={}", model.display()),
            format!("numerics={}", expert_node::stub::NUMERICS),
            format!("nodes={}", nodes.join(",")),
            format!("threads={threads}"),
            format!("kv_tokens={KV_TOKENS}"),
            "log_filter=error".to_owned(),
        ];
        let process = Command::new(std::env::current_exe()?)
            .args(["router", "--die-with-parent"])
            .args(settings.iter().flat_map(|setting| ["--set", setting]))
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .context("cannot start the router")?;
        let expected = Expected { role: Role::Router, id: None };
        let client = InferenceClient::new(transport::channel(&listen, None, expected)?);
        let mut router = Self { process, client, side: Server::at(admin), _dir: dir };
        router.get_ready().await?;
        Ok(router)
    }

    async fn get_ready(&mut self) -> anyhow::Result<()> {
        let began = Instant::now();
        loop {
            let reason = match self.side.readiness().await {
                Ok(Ok(())) => return Ok(()),
                Ok(Err(reason)) => reason,
                Err(error) => error.to_string(),
            };
            if let Some(status) = self.process.try_wait()? {
                bail!("the router ended while it started: {status}");
            }
            ensure!(began.elapsed() < READY_WITHIN, "the router is not ready: {reason}");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    /// Has `streams` sequences of `length` tokens each generated at once, after prompts
    /// of one token: every step is a step of decoding. They are sampled, so that tokens,
    /// and with them experts, vary.
    pub async fn generate(&self, streams: usize, length: u32, seed: u64) -> anyhow::Result<Used> {
        let (began, cpu, frames) = (Instant::now(), self.cpu()?, self.frames().await?);
        let mut running = JoinSet::new();
        for stream in 0..streams as u64 {
            let seed = (seed << 16) + stream;
            let request = GenerateRequest {
                request_id: format!("bench-{seed}"),
                tokens: vec![1 + stream as u32],
                max_tokens: length,
                sampling: Some(Sampling { temperature: 1.0, seed, ..Default::default() }),
                ..Default::default()
            };
            let mut client = self.client.clone();
            running.spawn(async move {
                let mut events = client.generate(request).await?.into_inner();
                let mut tokens = 0;
                while let Some(event) = events.message().await? {
                    tokens += u64::from(matches!(event.event, Some(Event::Token(_))));
                }
                Ok::<u64, tonic::Status>(tokens)
            });
        }
        let mut tokens = 0;
        while let Some(done) = running.join_next().await {
            tokens +=
                done?.map_err(|status| anyhow!("the router: {}", transport::explain(&status)))?;
        }
        ensure!(tokens == streams as u64 * u64::from(length), "only {tokens} tokens came");
        let (wall, cpu) = (began.elapsed(), self.cpu()? - cpu);
        Ok(Used { tokens, cpu, frames: self.frames().await? - frames, wall })
    }

    /// CPU time of all threads that live.
    fn cpu(&self) -> anyhow::Result<Duration> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.process.id()))?;
        threads.map(|thread| on_cpu(&thread?.path())).sum()
    }

    /// Frames that it has sent.
    async fn frames(&self) -> anyhow::Result<u64> {
        let (_, metrics) = self.side.get("/metrics").await?;
        let name = "router_dispatch_frames_total ";
        let value = metrics.lines().find_map(|line| line.split_once(name)).map(|(_, value)| value);
        value
            .context("the router does not say how many frames it sent")?
            .parse()
            .map_err(Into::into)
    }
}

/// Time on a CPU of the thread whose directory in `/proc` this is.
pub fn on_cpu(thread: &Path) -> anyhow::Result<Duration> {
    let text = fs::read_to_string(thread.join("schedstat"))?;
    let first = text.split_whitespace().next().context("schedstat is empty")?;
    Ok(Duration::from_nanos(first.parse()?))
}

impl Drop for RouterProcess {
    fn drop(&mut self) {
        drop(self.process.stdin.take());
        // Nothing is left of it that could be asked why.
        let _ = self.process.wait();
    }
}
