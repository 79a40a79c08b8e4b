//! A mesh of real processes on one machine, in a directory of its own.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mesh::tls::{Expected, Files, Owner, Role, Tls};
use proto::v1::inference_client::InferenceClient;
use proto::v1::{RouterStatus, RouterStatusRequest};
use serde_json::{Value, json};

use super::etcd::EtcdServer;
use super::faultproxy::FaultProxy;
use super::http::{self, Address};
use super::netns::Netns;
use super::process::{Launch, Process, free_port};

/// Long enough for a loaded machine; a mesh that is up is never waited for.
const READY_TRIES: u32 = 1200;
const PAUSE: Duration = Duration::from_millis(50);

/// What to build. `Sandbox::of(dir).numerics("f32").expert_nodes(3).start()`.
#[derive(Clone)]
pub struct Plan {
    model: PathBuf,
    numerics: &'static str,
    pub expert_nodes: usize,
    pub routers: usize,
    pub gateways: usize,
    pub replicas: usize,
    /// Nodes of another mesh, in place of its own.
    foreign: Option<String>,
    /// Role, key and value, as TOML.
    settings: Vec<(&'static str, String, String)>,
    /// Settings of routers and nodes alike.
    compute: Vec<(String, String)>,
    /// A directory of certificates (`moemesh certs all`).
    certificates: Option<PathBuf>,
    proxied: bool,
    history: bool,
    fail: bool,
    logged: bool,
    tcp: bool,
    netns: Option<Arc<Netns>>,
    /// Where processes find each other, if they are not told.
    etcd: Option<Arc<EtcdServer>>,
}

pub struct Sandbox {
    pub dir: PathBuf,
    /// The first gateway.
    pub http: Address,
    pub gateways: Vec<Process>,
    pub routers: Vec<Process>,
    pub nodes: Vec<Process>,
    /// Every gateway.
    pub addresses: Vec<Address>,
    /// A directory of its certificates.
    pub certificates: Option<PathBuf>,
    /// Whose certificate this program calls with.
    pub operator: Option<Tls>,
    /// One before each node, if the plan has them.
    pub proxies: Vec<FaultProxy>,
    pub etcd: Option<Arc<EtcdServer>>,
    /// Between this machine and the nodes, if they are on hosts of their own.
    pub netns: Option<Arc<Netns>>,
    /// What the configuration of every node says.
    common: String,
}

impl Sandbox {
    pub fn of(model: impl Into<PathBuf>) -> Plan {
        Plan {
            model: model.into(),
            numerics: "bf16",
            expert_nodes: 3,
            routers: 1,
            gateways: 1,
            replicas: 1,
            foreign: None,
            settings: Vec::new(),
            compute: vec![("threads".to_owned(), "1".to_owned())],
            certificates: None,
            proxied: false,
            history: false,
            fail: false,
            logged: false,
            tcp: false,
            netns: None,
            etcd: None,
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

    pub fn routers(mut self, count: usize) -> Self {
        self.routers = count;
        self
    }

    pub fn gateways(mut self, count: usize) -> Self {
        self.gateways = count;
        self
    }

    pub fn replicas(mut self, count: usize) -> Self {
        self.replicas = count;
        self
    }

    /// A setting of the routers' configuration files, as TOML.
    pub fn router(self, key: &str, value: impl ToString) -> Self {
        self.set("router", key, value)
    }

    /// A setting of a role's configuration files, as TOML.
    pub fn set(mut self, role: &'static str, key: &str, value: impl ToString) -> Self {
        self.settings.push((role, key.to_owned(), value.to_string()));
        self
    }

    /// A setting of every expert node's configuration file, as TOML.
    pub fn node(self, key: &str, value: impl ToString) -> Self {
        self.set("expert-node", key, value)
    }

    /// Expert nodes listen on host:port.
    pub fn tcp(mut self) -> Self {
        self.tcp = true;
        self
    }

    /// A setting of every process that computes, as TOML.
    pub fn compute(mut self, key: &str, value: impl ToString) -> Self {
        self.compute.retain(|(known, _)| known != key);
        self.compute.push((key.to_owned(), value.to_string()));
        self
    }

    /// Has every process speak mutual TLS with the certificates of this directory.
    pub fn tls(mut self, certificates: &Path) -> Self {
        self.certificates = Some(certificates.to_owned());
        self
    }

    /// Has the router talk to these nodes (a TOML array), and starts none.
    pub fn router_nodes(mut self, nodes: String) -> Self {
        (self.foreign, self.expert_nodes) = (Some(nodes), 0);
        self
    }

    /// Has processes find each other through etcd and through nothing else.
    pub fn etcd(mut self, server: &Arc<EtcdServer>) -> Self {
        self.etcd = Some(server.clone());
        self
    }

    /// Has every expert node on a host of its own.
    pub fn netns(mut self, net: &Arc<Netns>) -> Self {
        self.netns = Some(net.clone());
        self.node("insecure", true)
    }

    /// Puts a fault proxy before every expert node.
    pub fn proxied(mut self) -> Self {
        self.proxied = true;
        self
    }

    /// Has every router write its event log, `NAME.history`.
    pub fn history(mut self) -> Self {
        self.history = true;
        self
    }

    /// Has every process log to `NAME.log`, which is kept if the test fails.
    pub fn logged(mut self) -> Self {
        self.logged = true;
        self
    }

    /// Has every process look for failpoints in `NAME.fail`.
    pub fn failpoints(mut self) -> Self {
        self.fail = true;
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
        let mut model = format!("model_dir = {:?}\nlog_filter = \"warn\"\n", self.model);
        if let Some(etcd) = &self.etcd {
            writeln!(model, "etcd = {}", etcd.setting()).unwrap();
        }
        let listed = |key: &str, list: String| match &self.etcd {
            None => format!("{key} = {list}\n"),
            Some(_) => String::new(),
        };
        // Where nodes listen that are known by host:port.
        let hosts: Vec<String> = match &self.netns {
            Some(net) => (0..self.expert_nodes).map(|node| net.address(node)).collect(),
            None if self.tcp => {
                (0..self.expert_nodes).map(|_| format!("127.0.0.1:{}", free_port())).collect()
            }
            None => Vec::new(),
        };
        let mut class = format!("numerics = \"{}\"\n", self.numerics);
        for (key, value) in &self.compute {
            writeln!(class, "{key} = {value}").unwrap();
        }
        let certificates = self.certificates.as_deref();
        let start = |role: &str, index: usize, own: String| {
            let name = format!("{role}-{index}");
            let mut config = format!("id = \"{name}\"\n{model}{own}");
            if role != "gateway" {
                let admin = socket(&format!("{name}-admin"));
                let listen = match (role, hosts.get(index)) {
                    ("expert-node", Some(host)) => host.clone(),
                    _ => socket(&name),
                };
                write!(config, "listen = \"{listen}\"\nadmin = \"{admin}\"\n{class}").unwrap();
            }
            if let Some(dir) = certificates {
                config.push_str(&tls_settings(dir, &name));
            }
            if role == "router" && self.history {
                let path = dir.join(format!("{name}.history"));
                writeln!(config, "history = {path:?}").unwrap();
            }
            for (_, key, value) in self.settings.iter().filter(|(of, ..)| *of == role) {
                writeln!(config, "{key} = {value}").unwrap();
            }
            let mut launch = Launch { logged: self.logged, ..Launch::default() };
            if role == "expert-node" {
                launch.netns = self.netns.as_ref().map(|net| net.of(index));
            }
            if self.fail {
                let points = dir.join(format!("{name}.fail"));
                std::fs::create_dir_all(&points).unwrap();
                let points = points.display().to_string();
                launch.environment.push(("FAILPOINTS_DIR".to_owned(), points));
            }
            Process::start(&dir, &name, &config, launch)
        };

        let (count, replicas) = (self.expert_nodes, self.replicas);
        let mut nodes = Vec::new();
        for index in 0..count {
            let own = format!(
                "shard_index = {index}\nshard_count = {count}\nshard_replicas = {replicas}\n"
            );
            nodes.push(start("expert-node", index, own));
        }
        let mut endpoints: Vec<String> = nodes.iter().map(|node| socket(&node.name)).collect();
        if !hosts.is_empty() {
            endpoints = hosts.clone();
        }
        let mut proxies = Vec::new();
        if self.proxied {
            let target = |node: &Process| dir.join(format!("{}.sock", node.name));
            proxies.extend(nodes.iter().map(|node| FaultProxy::start(target(node))));
            endpoints = proxies.iter().map(|proxy| proxy.address.clone()).collect();
        }
        let list = self.foreign.clone().unwrap_or_else(|| format!("{endpoints:?}"));
        let routers: Vec<Process> = (0..self.routers)
            .map(|index| start("router", index, listed("nodes", list.clone())))
            .collect();
        let upstream: Vec<String> = routers.iter().map(|router| socket(&router.name)).collect();
        let mut addresses = Vec::new();
        let mut gateways = Vec::new();
        for index in 0..self.gateways {
            let address = format!("127.0.0.1:{}", free_port());
            let routers = listed("routers", format!("{upstream:?}"));
            let own = format!("listen = \"{address}\"\n{routers}model_name = \"test\"\n");
            gateways.push(start("gateway", index, own));
            addresses.push(Address::Tcp(address));
        }
        let http = addresses[0].clone();
        let operator = certificates.map(|dir| identity(dir, Role::Operator, "operator-0"));
        let common = format!("{model}{class}");
        let (etcd, netns) = (self.etcd, self.netns);
        Sandbox {
            dir,
            http,
            gateways,
            routers,
            nodes,
            addresses,
            certificates: self.certificates,
            operator,
            proxies,
            etcd,
            netns,
            common,
        }
    }
}

/// The lines of a configuration file that make a process `id`.
pub fn tls_settings(dir: &Path, id: &str) -> String {
    let file = |name: String| dir.join(name).display().to_string();
    let (cert, key) = (file(format!("{id}.pem")), file(format!("{id}.key")));
    format!("tls_cert = {cert:?}\ntls_key = {key:?}\ntls_ca = {:?}\n", file("ca.pem".into()))
}

/// Whoever `id`'s certificate in `dir` is.
pub fn identity(dir: &Path, role: Role, id: &str) -> Tls {
    let files = Files {
        certificate: dir.join(format!("{id}.pem")),
        key: dir.join(format!("{id}.key")),
        authorities: dir.join("ca.pem"),
    };
    Tls::load(&files, Owner { role, id: None }).unwrap()
}

impl Sandbox {
    /// Waits until every gateway is ready.
    pub async fn wait_ready(&self) {
        for address in &self.addresses {
            let mut last = String::new();
            let mut ready = false;
            for _ in 0..READY_TRIES {
                match http::get(address, "/readyz").await {
                    Ok((status, _)) if status == 200 => ready = true,
                    Ok((status, body)) => last = format!("{status} {body}"),
                    Err(error) => last = error.to_string(),
                }
                if ready {
                    break;
                }
                tokio::time::sleep(PAUSE).await;
            }
            assert!(ready, "the mesh never became ready: {last}");
        }
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

    /// The first router's own account of itself, over gRPC.
    pub async fn router_status(&self) -> RouterStatus {
        self.status_of(0).await.unwrap()
    }

    /// The Prometheus text of a router or an expert node.
    pub async fn metrics(&self, name: &str) -> String {
        let address = Address::Unix(self.socket(&format!("{name}-admin")));
        http::get(&address, "/metrics").await.unwrap().1
    }

    /// A number of theirs.
    pub async fn number(&self, name: &str, metric: &str) -> f64 {
        let text = self.metrics(name).await;
        let line = text.lines().find_map(|line| line.strip_prefix(metric)?.strip_prefix(' '));
        line.unwrap_or_else(|| panic!("{name} has no {metric}")).parse().unwrap()
    }

    /// A directory with nothing of the model but its configuration.
    pub fn bare(&self, model: &Path) -> PathBuf {
        let bare = self.dir.join("bare");
        std::fs::create_dir_all(&bare).unwrap();
        std::fs::copy(model.join("config.json"), bare.join("config.json")).unwrap();
        bare
    }

    /// Starts a further node, with settings of its own beside those of all.
    pub fn add_node(&mut self, name: &str, settings: &[(&str, String)]) {
        self.nodes.push(self.further(name, settings));
    }

    /// Starts a further router, with settings of its own beside those of all.
    pub fn add_router(&mut self, name: &str, settings: &[(&str, String)]) {
        self.routers.push(self.further(name, settings));
    }

    fn further(&self, name: &str, settings: &[(&str, String)]) -> Process {
        let listen = self.socket(name);
        let mut config = format!("id = \"{name}\"\nlisten = \"unix:{}\"\n", listen.display());
        let own =
            |line: &&str| settings.iter().any(|(key, _)| line.starts_with(&format!("{key} =")));
        for line in self.common.lines().filter(|line| !own(line)) {
            writeln!(config, "{line}").unwrap();
        }
        writeln!(config, "admin = \"unix:{}-admin.sock\"", self.dir.join(name).display()).unwrap();
        for (key, value) in settings {
            writeln!(config, "{key} = {value}").unwrap();
        }
        Process::start(&self.dir, name, &config, Launch::default())
    }

    /// A router's account of itself; an error while it is down.
    pub async fn status_of(&self, router: usize) -> Result<RouterStatus, tonic::Status> {
        let endpoint = mesh::transport::Endpoint::Unix(self.socket(&format!("router-{router}")));
        let (tls, expected) = (self.operator.as_ref(), Expected::any(Role::Router));
        let channel = mesh::transport::channel(&endpoint, tls, expected).unwrap();
        let request = RouterStatusRequest {};
        Ok(InferenceClient::new(channel).status(request).await?.into_inner())
    }

    /// Waits until no router runs, holds or awaits anything; the first one's status.
    pub async fn wait_idle(&self) -> RouterStatus {
        let mut first = None;
        for router in 0..self.routers.len() {
            let mut idle = None;
            for _ in 0..READY_TRIES {
                let now = self.status_of(router).await.unwrap();
                let busy = now.running + now.waiting + now.tickets_in_flight;
                if busy == 0 && now.kv_pages_used == 0 {
                    idle = Some(now);
                    break;
                }
                tokio::time::sleep(PAUSE).await;
            }
            match idle {
                Some(status) => first = first.or(Some(status)),
                None => panic!("never idle: {:?}", self.status_of(router).await),
            }
        }
        first.unwrap()
    }

    /// SIGTERM to the gateways, then the routers, then the nodes; every one must
    /// drain and exit with 0.
    pub fn stop(mut self) {
        let all = [&mut self.gateways, &mut self.routers, &mut self.nodes];
        for process in all.into_iter().flatten() {
            process.terminate();
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        // In this order, so that none complains of those behind it.
        self.gateways.clear();
        self.routers.clear();
        self.nodes.clear();
        if std::thread::panicking() {
            println!("what the mesh left is in {}", self.dir.display());
        } else {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}
