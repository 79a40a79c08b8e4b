//! The keys of a mesh on one machine: the flags of `moemesh up`, its file and
//! its environment variables `MOEMESH_UP_<KEY>`. The file's `[gateway]`, `[router]`
//! and `[expert-node]` sections are settings for every process of that role.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use mesh::telemetry::LogFormat;
use mesh::transport::Endpoint;
use model::Numerics;

use crate::cli::{MeshArgs, UpArgs};
use crate::config::ConfigError;
use crate::config::given::{File, Given, Origin, Raw, variables};
use crate::config::reader::{Reader, read};
use crate::config::roles::{Role, cpus};
use crate::config::setting::Weights;

const PREFIX: &str = "MOEMESH_UP_";
/// More processes than this on one machine is a slip of the finger.
const MOST_PROCESSES: usize = 256;

/// A mesh on one machine.
#[derive(Debug)]
pub struct Local {
    /// `None` is the bundled tiny model.
    pub model: Option<PathBuf>,
    pub weights: Weights,
    pub gateways: usize,
    pub routers: usize,
    /// 0 keeps the experts inside the router.
    pub expert_nodes: usize,
    pub replicas: usize,
    /// Whether its processes speak mutual TLS, with certificates made for it.
    pub tls: bool,
    /// Where the first gateway listens; the others take the ports after it.
    pub http: (String, u16),
    pub numerics: Numerics,
    pub threads: usize,
    /// Whether these are bound to CPUs.
    pub bind: bool,
    pub otlp: Option<String>,
    pub log: LogFormat,
    /// Whether one completion is shown when the mesh is up.
    pub demo: bool,
    /// What was given for the processes of a role beyond all this.
    pub extra: BTreeMap<Role, Given>,
}

impl Local {
    /// What `moemesh up` was asked for.
    pub fn for_up(args: &UpArgs) -> Result<Self, ConfigError> {
        let mut flags = args.mesh.flags();
        flags.extend(args.http.iter().map(|address| ("http", "--http", address.clone())));
        let local = load(args.mesh.config.as_deref(), &variables(), flags)?;
        Ok(Self { demo: !args.no_demo, ..local })
    }

    /// A mesh that serves one command, with a gateway on a free port.
    pub fn for_one_command(args: &MeshArgs) -> Result<Self, ConfigError> {
        let local = load(args.config.as_deref(), &variables(), args.flags())?;
        Ok(Self { http: ("127.0.0.1".to_owned(), 0), demo: false, ..local })
    }
}

/// A flag as it was given: key, flag, text.
pub type Flag = (&'static str, &'static str, String);

/// Reads file, environment and flags.
pub fn load(
    file: Option<&Path>,
    variables: &[(String, String)],
    flags: Vec<Flag>,
) -> Result<Local, ConfigError> {
    let File { top: mut given, sections } = match file {
        Some(path) => File::read(path)?,
        None => File::default(),
    };
    given.add_environment(PREFIX, variables.iter().cloned());
    for (key, flag, text) in flags {
        given.put(key, Raw::Text(text), Origin::Flag(flag.to_owned()));
    }
    let extra = extras(sections, variables)?;
    let (mut local, _) = read(&given, PREFIX, build)?;
    local.extra = extra;
    Ok(local)
}

fn extras(
    mut sections: BTreeMap<String, (Origin, Given)>,
    variables: &[(String, String)],
) -> Result<BTreeMap<Role, Given>, ConfigError> {
    let mut extra = BTreeMap::new();
    for role in Role::ALL {
        let mut given =
            sections.remove(role.name()).map_or_else(Given::default, |(_, given)| given);
        given.add_environment(role.prefix(), variables.iter().cloned());
        extra.insert(role, given);
    }
    match sections.into_iter().next() {
        Some((key, (origin, _))) => {
            let known = Role::ALL.map(|role| format!("[{role}]")).join(", ");
            Err(ConfigError::Unknown { origin, key, known })
        }
        None => Ok(extra),
    }
}

fn build(reader: &mut Reader<'_>) -> Result<Local, ConfigError> {
    let model = reader.optional(
        "model",
        "\"/models/deepseek-v3\"",
        "Directory of the checkpoint. Unset: the bundled tiny model.",
    )?;
    let weights = reader.or(
        "weights",
        Weights::Stored,
        "stored, or fp8 for a copy with block-scaled FP8 projections.",
    )?;
    let gateways = reader.within("gateways", 1, 1..=MOST_PROCESSES, "Gateway processes.")?;
    let routers = reader.within("routers", 1, 1..=MOST_PROCESSES, "Router processes.")?;
    let expert_nodes = reader.within(
        "expert_nodes",
        3,
        0..=MOST_PROCESSES,
        "Expert node processes. 0 keeps the experts inside the router.",
    )?;
    let replicas = reader.within("replicas", 1, 1..=MOST_PROCESSES, "Owners of each expert.")?;
    if replicas > expert_nodes.max(1) {
        let problem = format!("{replicas} is more than there are expert nodes ({expert_nodes})");
        return Err(reader.refuse("replicas", problem));
    }
    let http = http(reader, gateways)?;
    let threads = reader.within("threads", cpus(), 1..=1024, "Threads that compute.")?;
    Ok(Local {
        model,
        weights,
        gateways,
        routers,
        expert_nodes,
        replicas,
        tls: reader.or(
            "tls",
            false,
            "Mutual TLS between the processes, with certificates that are made for this mesh.",
        )?,
        http,
        numerics: reader.or("numerics", Numerics::Bf16, "bf16, or f32 for the reference class.")?,
        threads,
        bind: reader.or(
            "bind",
            threads == cpus(),
            "Whether the computing threads are bound to CPUs, one each. Unset: if `threads` is all the\n\
             CPUs there are, which all processes then take turns on.",
        )?,
        otlp: reader.optional(
            "otlp",
            "\"http://127.0.0.1:4317\"",
            "OTLP gRPC endpoint that spans are exported to.",
        )?,
        log: reader.or("log", LogFormat::Text, "Log lines as text or json.")?,
        demo: true,
        extra: BTreeMap::new(),
    })
}

fn http(reader: &mut Reader<'_>, gateways: usize) -> Result<(String, u16), ConfigError> {
    let about = "Where the first gateway listens; further ones take the next ports.";
    let endpoint = reader.or("http", Endpoint::Tcp("127.0.0.1:8080".to_owned()), about)?;
    let Endpoint::Tcp(address) = &endpoint else {
        return Err(reader.refuse("http", "a gateway listens on host:port"));
    };
    let split = address.rsplit_once(':');
    let Some((host, Ok(port))) = split.map(|(host, port)| (host, port.parse::<u16>())) else {
        return Err(reader.refuse("http", format!("`{address}` is not host:port")));
    };
    if port != 0 && usize::from(port) + gateways - 1 > usize::from(u16::MAX) {
        return Err(reader.refuse("http", format!("no {gateways} ports from {port} up")));
    }
    Ok((host.to_owned(), port))
}
