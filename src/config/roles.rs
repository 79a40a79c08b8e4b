//! The keys of the three roles, and from them the roles' own `Config`s. What a
//! key is for is said here once, for `--print-config` as for a reader.

mod expert_node;

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mesh::near::Shortcut;
use mesh::telemetry::{self, LogFormat};
use mesh::transport::Endpoint;
use model::Numerics;

use crate::config::ConfigError;
use crate::config::given::{File, Given};
use crate::config::reader::{Declared, Reader, describe, read};
use crate::config::{etcd, tls};

/// What a process of the mesh can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    Gateway,
    Router,
    ExpertNode,
}

impl Role {
    pub const ALL: [Self; 3] = [Self::Gateway, Self::Router, Self::ExpertNode];

    /// The subcommand, and the section of `moemesh up --config`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gateway => "gateway",
            Self::Router => "router",
            Self::ExpertNode => "expert-node",
        }
    }

    /// How the role's environment variables start.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::Gateway => "MOEMESH_GATEWAY_",
            Self::Router => "MOEMESH_ROUTER_",
            Self::ExpertNode => "MOEMESH_EXPERT_NODE_",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The typed configuration of one role.
#[derive(Debug)]
pub enum RoleConfig {
    Gateway(gateway::Config),
    Router(router::Config),
    ExpertNode(::expert_node::Config),
}

/// All that one process is told.
#[derive(Debug)]
pub struct Process {
    pub telemetry: telemetry::Config,
    pub role: RoleConfig,
}

/// Everything given for `role`, in order of precedence.
pub fn gather(
    role: Role,
    file: Option<&Path>,
    variables: impl IntoIterator<Item = (String, String)>,
    pairs: &[String],
) -> Result<Given, ConfigError> {
    let mut given = match file {
        Some(path) => {
            let File { top, sections } = File::read(path)?;
            if let Some((section, (origin, _))) = sections.into_iter().next() {
                return Err(ConfigError::Unknown { origin, key: section, known: keys(role)? });
            }
            top
        }
        None => Given::default(),
    };
    given.add_environment(role.prefix(), variables);
    given.add_pairs(pairs)?;
    Ok(given)
}

/// Checks what was given and builds the role's configuration.
pub fn resolve(role: Role, given: &Given) -> Result<(Process, Vec<Declared>), ConfigError> {
    read(given, role.prefix(), |reader| build(role, reader))
}

/// The role's keys with defaults and examples.
pub fn declared(role: Role) -> Result<Vec<Declared>, ConfigError> {
    describe(role.prefix(), |reader| build(role, reader))
}

fn keys(role: Role) -> Result<String, ConfigError> {
    let keys: Vec<&str> = declared(role)?.iter().map(|known| known.key).collect();
    Ok(keys.join(", "))
}

fn build(role: Role, reader: &mut Reader<'_>) -> Result<Process, ConfigError> {
    match role {
        Role::Gateway => gateway(reader),
        Role::Router => router(reader),
        Role::ExpertNode => expert_node::expert_node(reader),
    }
}

fn gateway(reader: &mut Reader<'_>) -> Result<Process, ConfigError> {
    let id = id(reader, "gateway-0")?;
    let listen: Endpoint = reader.required(
        "listen",
        "127.0.0.1:8080",
        "Where the OpenAI-compatible HTTP API is served, host:port.",
    )?;
    let Endpoint::Tcp(listen) = listen else {
        return Err(reader.refuse("listen", "a gateway listens on host:port"));
    };
    let tls = tls::files(reader)?;
    let insecure = tls::insecure(reader)?;
    let etcd = etcd::etcd(reader, tls.as_ref(), insecure)?;
    let about =
        "Routers that requests are sent to, host:port or unix:/path. Need not be set with etcd.";
    let routers: Vec<Endpoint> = match &etcd {
        Some(_) => reader.or("routers", Vec::new(), about)?,
        None => reader.required("routers", "127.0.0.1:7000", about)?,
    };
    if routers.is_empty() && etcd.is_none() {
        return Err(reader.refuse("routers", "at least one router is needed"));
    }
    let model_dir = model_dir(
        reader,
        "Directory of the checkpoint. A gateway reads its tokenizer, chat template and\n\
         generation defaults, no weights.",
    )?;
    let name = reader.optional(
        "model_name",
        "\"deepseek-v3\"",
        "Name the model is served under. Unset: the directory's name.",
    )?;
    let model_name = name.unwrap_or_else(|| directory_name(&model_dir));
    let config = gateway::Config {
        listen,
        routers,
        etcd,
        tls,
        model_name,
        model_dir,
        max_body_bytes: reader.within(
            "max_body_bytes",
            4 << 20,
            1024..=1 << 30,
            "Largest request body accepted, in bytes.",
        )?,
        max_concurrent: reader.within(
            "max_concurrent",
            256,
            1..=1 << 20,
            "Requests in progress at once; more are refused with 429.",
        )?,
        max_n: narrow(reader.within(
            "max_n",
            16,
            1..=1024,
            "Largest `n` a request may ask for.",
        )?),
        request_timeout: timeout(reader, "Longest a request may take, answer included.")?,
        max_logprobs: narrow(reader.within(
            "max_logprobs",
            20,
            0..=1000,
            "Most alternatives a request may ask log-probabilities of.",
        )?),
    };
    let telemetry = telemetry(reader, Role::Gateway, id)?;
    Ok(Process { telemetry, role: RoleConfig::Gateway(config) })
}

/// A number whose range was checked to fit.
fn narrow(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn router(reader: &mut Reader<'_>) -> Result<Process, ConfigError> {
    let id = id(reader, "router-0")?;
    let listen = listen(reader, "127.0.0.1:7000")?;
    let (tls, insecure) = tls::files_of_server(reader, &listen)?;
    let etcd = etcd::etcd(reader, tls.as_ref(), insecure)?;
    let elects = etcd.is_some();
    let config = router::Config {
        id,
        admin: admin(reader)?,
        tls,
        advertise: etcd::advertise(reader, &listen, elects)?,
        etcd,
        listen,
        model_dir: model_dir(reader, "Directory of the checkpoint, as published on Hugging Face.")?,
        numerics: numerics(reader)?,
        nodes: reader.or(
            "nodes",
            Vec::new(),
            "Expert nodes, host:port or unix:/path. Empty: those in etcd, or without etcd none, and\n\
             experts stay inside the router.",
        )?,
        threads: threads(reader)?,
        first_cpu: first_cpu(reader)?,
        isa: isa(reader)?,
        device: reader.or(
            "device",
            model::Device::Cpu,
            "What computes the trunk: cpu, or cuda:N for an NVIDIA GPU of the Hopper generation, which\n\
             has the weights and the KV cache then.",
        )?,
        expert_device: reader.or(
            "expert_device",
            model::ExpertDevice::Cpu,
            "What the nodes compute experts on: cpu or cuda. All nodes of a mesh have the same kind,\n\
             which is part of the numerics class.",
        )?,
        kv_tokens: reader.within(
            "kv_tokens",
            65_536,
            1..=1 << 32,
            "Capacity of the KV cache, in tokens over all sequences.",
        )?,
        page_tokens: reader.within("page_tokens", 64, 1..=4096, "Tokens in a page of it.")?,
        step_tokens: reader.within(
            "step_tokens",
            512,
            1..=65_536,
            "Most tokens in one step, prefill and decode together.",
        )?,
        prefill_chunk: reader.within(
            "prefill_chunk",
            512,
            1..=65_536,
            "Most tokens of one prompt in one step.",
        )?,
        tpot_target: reader.optional(
            "tpot_target",
            "\"50ms\"",
            "Time between two tokens of a running stream that prompts may not push it beyond.\n\
             Unset: prompts share a step's time with the streams in proportion to their number.",
        )?,
        micro_batches: reader.or(
            "micro_batches",
            router::Splitting::Auto,
            "Whether a step runs as two micro-batches, one computing while the other's rows are\n\
             with the experts: auto (over a network, where measured to be faster), always or never.",
        )?,
        wire: reader.or(
            "wire",
            router::Wire::Exact,
            "exact, or fp8: rows to the nodes as e4m3 with a scale per 128 values, results as bf16.\n\
             Half the bytes to the nodes; 2.7 % error (root mean square) on what the experts read.",
        )?,
        combine: reader.or(
            "combine",
            router::Combine::Router,
            "Who sums a token's results: router, or node, which returns one row for each token and\n\
             node in place of one for each expert. The bits then depend on who owns which expert.",
        )?,
        shared_rows: shared_rows(reader)?,
        max_running: reader.within("max_running", 64, 1..=65_536, "Sequences computed at once.")?,
        max_waiting: reader.within(
            "max_waiting",
            256,
            1..=1 << 20,
            "Requests that may wait for a place; more are refused.",
        )?,
        controller: reader.or(
            "controller",
            elects,
            "Whether this router decides which node owns which expert. One router of a mesh does;\n\
             without one, nodes keep what they start with. With etcd: whether it stands for election,\n\
             which is the default there.",
        )?,
        replicas: reader.within(
            "replicas",
            1,
            1..=1024,
            "Owners that the controller gives every expert, if there are as many nodes.",
        )?,
        replica_grace: reader.or(
            "replica_grace",
            Duration::from_secs(10),
            "How long an expert may have fewer owners before another node loads it. One that has\n\
             lost its last is loaded at once.",
        )?,
        loss_grace: reader.or(
            "loss_grace",
            Duration::from_secs(2),
            "How long requests are still taken when an expert has lost its last owner; they wait\n\
             for it to be loaded elsewhere.",
        )?,
        expert_wait: reader.or(
            "expert_wait",
            Duration::from_secs(30),
            "How long a sequence waits for an expert that has no live owner.",
        )?,
        policy: policy(reader)?,
        request_timeout: timeout(reader, "Longest a request may take.")?,
        history: reader.optional(
            "history",
            "\"/tmp/router-0.history\"",
            "File that frames, replies, placements and steps are logged to, as JSON lines, for\n\
             checking a run afterwards. Grows by about 1 MB a second of load. Unset: none.",
        )?,
    };
    let telemetry = telemetry(reader, Role::Router, config.id.clone())?;
    Ok(Process { telemetry, role: RoleConfig::Router(config) })
}

fn policy(reader: &mut Reader<'_>) -> Result<router::Policy, ConfigError> {
    let router::Policy { enabled, attempt, hedge } = router::Policy::default();
    Ok(router::Policy {
        attempt: reader.or(
            "attempt_timeout",
            attempt,
            "The longest a node may take over a small frame before another owner is asked. What\n\
             is usual for the node and the frame's size is measured, and shortens or, where it is\n\
             more than this, lengthens the time.",
        )?,
        hedge: reader.or(
            "hedge",
            hedge,
            "Whether a frame slower than 95 of 100 like it is sent to another owner as well.",
        )?,
        enabled: reader.or(
            "health",
            enabled,
            "Whether nodes that fail, are slow or hang are avoided. For comparisons only: without,\n\
             owners are asked in turn, and only attempt_timeout leads to another one.",
        )?,
    })
}

fn id(reader: &mut Reader<'_>, default: &str) -> Result<String, ConfigError> {
    reader.or("id", default.to_owned(), "The process's name in the mesh, in logs and in traces.")
}

fn listen(reader: &mut Reader<'_>, example: &str) -> Result<Endpoint, ConfigError> {
    reader.required("listen", example, "Where gRPC is served, host:port or unix:/path.")
}

fn admin(reader: &mut Reader<'_>) -> Result<Option<Endpoint>, ConfigError> {
    reader.optional(
        "admin",
        "\"127.0.0.1:9000\"",
        "Where /metrics, /healthz and /readyz are served. Unset: nowhere.",
    )
}

fn model_dir(reader: &mut Reader<'_>, about: &'static str) -> Result<PathBuf, ConfigError> {
    reader.required("model_dir", "/models/deepseek-v3", about)
}

fn numerics(reader: &mut Reader<'_>) -> Result<Numerics, ConfigError> {
    reader.or(
        "numerics",
        Numerics::Bf16,
        "bf16, or f32 for the reference class. The same on every process of a mesh.",
    )
}

/// CPUs this process may use, which respects affinity and cgroup limits.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn threads(reader: &mut Reader<'_>) -> Result<usize, ConfigError> {
    let about = "Threads that compute. Unset: as many as there are CPUs for this process.";
    let threads = reader.optional("threads", "4", about)?.unwrap_or_else(cpus);
    if !(1..=1024).contains(&threads) {
        return Err(reader.refuse("threads", format!("{threads} is not within 1 to 1024")));
    }
    Ok(threads)
}

fn first_cpu(reader: &mut Reader<'_>) -> Result<Option<usize>, ConfigError> {
    reader.optional(
        "first_cpu",
        "0",
        "Binds the computing threads to CPUs, one each, the first to the one at this place among\n\
         those that the process may use. Unset: the system places them.",
    )
}

fn isa(reader: &mut Reader<'_>) -> Result<Option<kernels::Isa>, ConfigError> {
    reader.optional(
        "isa",
        "\"scalar\"",
        "Instruction set of the kernels. Unset: the best this CPU has. With \"amx\", bf16 is a \
         class of its own (bf16+amx), which every process of the mesh must then have.",
    )
}

fn shared_rows(reader: &mut Reader<'_>) -> Result<Shortcut, ConfigError> {
    reader.or(
        "shared_rows",
        Shortcut::Auto,
        "Whether rows of large frames go between router and node through memory that both have, where\n\
         they are processes of one host without TLS: auto or off. Both have to want it.",
    )
}

fn timeout(reader: &mut Reader<'_>, about: &'static str) -> Result<Duration, ConfigError> {
    reader.or("request_timeout", Duration::from_secs(600), about)
}

fn telemetry(
    reader: &mut Reader<'_>,
    role: Role,
    id: String,
) -> Result<telemetry::Config, ConfigError> {
    Ok(telemetry::Config {
        role: role.name(),
        id,
        format: reader.or("log", LogFormat::Text, "Log lines as text or json.")?,
        filter: reader.or(
            "log_filter",
            "info".to_owned(),
            "What is logged, as in RUST_LOG: warn, or info,router=debug.",
        )?,
        otlp: reader.optional(
            "otlp",
            "\"http://127.0.0.1:4317\"",
            "OTLP gRPC endpoint that spans are exported to. Unset: none are made.",
        )?,
        sample: reader.within("trace_sample", 1.0, 0.0..=1.0, "Share of requests traced.")?,
    })
}

/// The last component of a path, which names the model it holds.
pub fn directory_name(dir: &Path) -> String {
    let whole = dir.canonicalize().unwrap_or_else(|_| dir.to_owned());
    whole.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}
