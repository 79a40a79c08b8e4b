//! A mesh of real processes on one machine, in a directory of its own.

use std::fmt::Write as _;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use proto::v1::inference_client::InferenceClient;
use proto::v1::{RouterStatus, RouterStatusRequest};
use serde_json::{Value, json};

use super::http::{self, Address};

/// Long enough for a loaded machine; a mesh that is up is never waited for.
const READY_TRIES: u32 = 1200;
const PAUSE: Duration = Duration::from_millis(50);

/// What to build. `Sandbox::of(dir).numerics("f32").expert_nodes(3).start()`.
pub struct Plan {
    model: PathBuf,
    numerics: &'static str,
    expert_nodes: usize,
    replicas: usize,
    /// Nodes of another mesh, in place of its own.
    foreign: Option<String>,
    router: Vec<(String, String)>,
    node: Vec<(String, String)>,
    tcp: bool,
}

pub struct Sandbox {
    pub dir: PathBuf,
    pub http: Address,
    gateway: Option<Process>,
    router: Option<Process>,
    pub nodes: Vec<Process>,
}

/// One process, killed when dropped.
pub struct Process {
    name: String,
    config: PathBuf,
    child: Child,
}

impl Sandbox {
    pub fn of(model: impl Into<PathBuf>) -> Plan {
        Plan {
            model: model.into(),
            numerics: "bf16",
            expert_nodes: 3,
            replicas: 1,
            foreign: None,
            router: Vec::new(),
            node: Vec::new(),
            tcp: false,
        }
    }
}

impl Plan {
    pub fn numerics(mut self, class: &'static str) -> Self {
        self.numerics = class;
        self
    }

    pub fn expert_nodes(mut self, count: usize) -> Self {
        self.expert_nodes = count;
        self
    }

    pub fn replicas(mut self, count: usize) -> Self {
        self.replicas = count;
        self
    }

    /// A setting of the router's configuration file, as TOML.
    pub fn router(mut self, key: &str, value: impl ToString) -> Self {
        self.router.push((key.to_owned(), value.to_string()));
        self
    }

    /// A setting of every expert node's configuration file, as TOML.
    pub fn node(mut self, key: &str, value: impl ToString) -> Self {
        self.node.push((key.to_owned(), value.to_string()));
        self
    }

    /// Expert nodes listen on host:port.
    pub fn tcp(mut self) -> Self {
        self.tcp = true;
        self
    }

    /// Has the router talk to these nodes (a TOML array), and starts none.
    pub fn router_nodes(mut self, nodes: String) -> Self {
        (self.foreign, self.expert_nodes) = (Some(nodes), 0);
        self
    }

    /// Starts every process and waits until the gateway says that it is ready.
    pub async fn start(self) -> Sandbox {
        let sandbox = self.spawn();
        sandbox.wait_ready().await;
        sandbox
    }

    /// Starts every process.
    pub fn spawn(self) -> Sandbox {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("moemesh-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let socket = |name: &str| format!("unix:{}", dir.join(format!("{name}.sock")).display());
        let model = format!("model_dir = {:?}\n", self.model);
        let class =
            format!("numerics = \"{}\"\nthreads = 1\nlog_filter = \"warn\"\n", self.numerics);

        let mut endpoints = Vec::new();
        let mut nodes = Vec::new();
        for index in 0..self.expert_nodes {
            let name = format!("expert-node-{index}");
            let endpoint = match self.tcp {
                true => format!("127.0.0.1:{}", free_port()),
                false => socket(&name),
            };
            let mut config = format!(
                "id = \"{name}\"\nlisten = \"{}\"\nadmin = \"{}\"\n{model}{class}\
                 shard_index = {index}\nshard_count = {}\nshard_replicas = {}\n",
                endpoint,
                socket(&format!("{name}-admin")),
                self.expert_nodes,
                self.replicas,
            );
            extend(&mut config, &self.node);
            endpoints.push(endpoint);
            nodes.push(Process::start(&dir, "expert-node", &name, &config));
        }

        let nodes_list = self.foreign.unwrap_or_else(|| format!("{endpoints:?}"));
        let mut config = format!(
            "id = \"router-0\"\nlisten = \"{}\"\nadmin = \"{}\"\n{model}{class}nodes = {nodes_list}\n",
            socket("router-0"),
            socket("router-0-admin"),
        );
        extend(&mut config, &self.router);
        let router = Process::start(&dir, "router", "router-0", &config);

        let port = free_port();
        let config = format!(
            "id = \"gateway-0\"\nlisten = \"127.0.0.1:{port}\"\nrouters = [\"{}\"]\n{model}\
             model_name = \"test\"\nlog_filter = \"warn\"\n",
            socket("router-0"),
        );
        let gateway = Process::start(&dir, "gateway", "gateway-0", &config);
        Sandbox {
            http: Address::Tcp(format!("127.0.0.1:{port}")),
            dir,
            gateway: Some(gateway),
            router: Some(router),
            nodes,
        }
    }
}

fn extend(config: &mut String, settings: &[(String, String)]) {
    for (key, value) in settings {
        writeln!(config, "{key} = {value}").unwrap();
    }
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// The binary under test.
pub fn moemesh() -> Command {
    Command::new(env!("CARGO_BIN_EXE_moemesh"))
}

impl Sandbox {
    pub async fn wait_ready(&self) {
        let mut last = String::new();
        for _ in 0..READY_TRIES {
            match http::get(&self.http, "/readyz").await {
                Ok((status, _)) if status == 200 => return,
                Ok((status, body)) => last = format!("{status} {body}"),
                Err(error) => last = error.to_string(),
            }
            tokio::time::sleep(PAUSE).await;
        }
        panic!("the mesh never became ready: {last}");
    }

    /// `/v1/completions` of one prompt of token ids; panics unless it is answered.
    pub async fn complete(&self, tokens: &[u32], extra: Value) -> Value {
        let mut body = json!({ "model": "test", "prompt": tokens, "temperature": 0 });
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let (status, answer) = http::post(&self.http, "/v1/completions", &body).await;
        assert_eq!(status, 200, "{answer}");
        answer["choices"][0].clone()
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.sock"))
    }

    /// The router's own account of itself, over gRPC.
    pub async fn router_status(&self) -> RouterStatus {
        let endpoint = mesh::transport::Endpoint::Unix(self.socket("router-0"));
        let channel = mesh::transport::channel(&endpoint).unwrap();
        let request = RouterStatusRequest {};
        InferenceClient::new(channel).status(request).await.unwrap().into_inner()
    }

    /// Waits until nothing is running, waiting, cached or in flight.
    pub async fn wait_idle(&self) -> RouterStatus {
        for _ in 0..READY_TRIES {
            let now = self.router_status().await;
            if now.running + now.waiting + now.tickets_in_flight == 0 && now.kv_pages_used == 0 {
                return now;
            }
            tokio::time::sleep(PAUSE).await;
        }
        panic!("the router never became idle: {:?}", self.router_status().await);
    }

    /// SIGTERM to the gateway, then the router, then the nodes; every one must
    /// drain and exit with 0.
    pub fn stop(mut self) {
        let first = [self.gateway.take(), self.router.take()];
        for process in first.into_iter().flatten().chain(self.nodes.drain(..)) {
            process.terminate();
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.gateway = None;
        self.router = None;
        self.nodes.clear();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Process {
    fn start(dir: &Path, role: &str, name: &str, config: &str) -> Self {
        let path = dir.join(format!("{name}.toml"));
        std::fs::write(&path, config).unwrap();
        let child = moemesh()
            .args([role, "--config"])
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self { name: name.to_owned(), config: path, child }
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again after [`Self::kill`].
    pub fn restart(&mut self) {
        let role = self.name.rsplit_once('-').unwrap().0.to_owned();
        let config = std::fs::read_to_string(&self.config).unwrap();
        *self = Self::start(self.config.parent().unwrap(), &role, &self.name.clone(), &config);
    }

    fn terminate(mut self) {
        signal(self.child.id(), "TERM");
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{} ended with {status}", self.name);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal by name to one process.
pub fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(sent.unwrap().success());
}

/// Runs a command to its end and returns (success, stdout, stderr).
pub fn run(command: &mut Command) -> (bool, String, String) {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).unwrap();
        text
    });
    let mut stdout = String::new();
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    let status = child.wait().unwrap();
    (status.success(), stdout, errors.join().unwrap())
}
