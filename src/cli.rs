//! The command line: what can be typed, and the help that teaches it. Values are
//! not judged here but in [`crate::config`], which is the only parser.

mod bench;
mod certs;
mod operate;
mod plan;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

pub use self::bench::*;
pub use self::certs::*;
pub use self::operate::*;
pub use self::plan::*;
use crate::config::local::Flag;

/// A service mesh for mixture-of-experts language models: experts are services,
/// addressed by layer and index, on many small replaceable processes.
#[derive(Debug, Parser)]
#[command(name = "moemesh", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Cli {
    /// Without one: `up` on the bundled tiny model.
    #[command(subcommand)]
    pub command: Option<Command>,
}

const EXAMPLES: &str = "\
Examples:
  moemesh                                   a whole mesh here, on the bundled tiny model
  moemesh up --model /models/deepseek-v3    the same on your checkpoint
  moemesh generate \"Once upon a time\"       one completion, then exit
  moemesh status                            how the mesh that runs here is doing

One process of a mesh over several machines:
  moemesh router --print-config > router.toml
  moemesh router --config router.toml
  moemesh router --config router.toml --set etcd=https://etcd-0:2379   find the others through etcd

Exit codes: 0 done, 1 failed, 64 bad command line or configuration, 65 bad checkpoint.";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a whole mesh on this machine until Ctrl-C
    Up(UpArgs),
    /// Stream one completion to standard output
    Generate(GenerateArgs),
    /// Serve the OpenAI-compatible HTTP API, in front of routers
    Gateway(RoleArgs),
    /// Serve the model's trunk: attention, KV cache, gate, scheduler, sampling
    Router(ComputingArgs),
    /// Serve experts to routers
    ExpertNode(ComputingArgs),
    /// Show how gateways, routers and expert nodes are doing
    Status(StatusArgs),
    /// Move all experts away from a node, so that it can be stopped
    Drain(DrainArgs),
    /// Even out what expert nodes own, by the load that they have measured
    Rebalance(RebalanceArgs),
    /// Tell routers of an expert node
    Join(MemberArgs),
    /// Have routers forget an expert node
    Leave(MemberArgs),
    /// Say how many devices of which size a model needs
    Plan(PlanArgs),
    /// Make a development authority and certificates for mutual TLS, or read one
    Certs(CertsArgs),
    /// Measure throughput and latency
    Bench(BenchArgs),
    /// Print a completion script
    Completions { shell: Shell },
}

/// The shape of a mesh on this machine.
#[derive(Debug, Default, Args)]
pub struct MeshArgs {
    /// Directory of a Hugging Face checkpoint [default: the bundled tiny model]
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Store projections as block-scaled FP8, half the bytes of bf16; the copy is
    /// made once and kept in the cache directory [default: stored]
    #[arg(long, value_name = "FORMAT", value_parser = ["stored", "fp8"])]
    pub weights: Option<String>,
    /// Gateway processes [default: 1]
    #[arg(long, value_name = "N")]
    pub gateways: Option<String>,
    /// Router processes, each with a KV cache of its own [default: 1]
    #[arg(long, value_name = "N")]
    pub routers: Option<String>,
    /// Expert node processes; 0 keeps the experts inside the router [default: 3]
    #[arg(long, value_name = "N")]
    pub expert_nodes: Option<String>,
    /// Expert nodes that own each expert [default: 1]
    #[arg(long, value_name = "N")]
    pub replicas: Option<String>,
    /// Mutual TLS between the processes, with an authority of its own
    #[arg(long)]
    pub tls: bool,
    /// What activations are rounded to; f32 is the reference class [default: bf16]
    #[arg(long, value_name = "CLASS", value_parser = ["bf16", "f32"])]
    pub numerics: Option<String>,
    /// Threads that compute: a router has all, a node up to twice its
    /// share [default: all CPUs]
    #[arg(long, value_name = "N")]
    pub threads: Option<String>,
    /// Settings file; flags win over it, and its sections [gateway], [router] and
    /// [expert-node] go to the processes of that role
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// OTLP gRPC endpoint that traces are exported to, such as http://127.0.0.1:4317
    #[arg(long, value_name = "URL")]
    pub otlp: Option<String>,
    /// How log lines look [default: text]
    #[arg(long, value_name = "FORMAT", value_parser = ["text", "json"])]
    pub log: Option<String>,
}

impl MeshArgs {
    /// The flags that were given, as keys of the configuration.
    pub fn flags(&self) -> Vec<Flag> {
        let model = self.model.as_ref().map(|dir| dir.to_string_lossy().into_owned());
        let tls = self.tls.then(|| "true".to_owned());
        let flags = [
            ("tls", "--tls", &tls),
            ("model", "--model", &model),
            ("weights", "--weights", &self.weights),
            ("gateways", "--gateways", &self.gateways),
            ("routers", "--routers", &self.routers),
            ("expert_nodes", "--expert-nodes", &self.expert_nodes),
            ("replicas", "--replicas", &self.replicas),
            ("numerics", "--numerics", &self.numerics),
            ("threads", "--threads", &self.threads),
            ("otlp", "--otlp", &self.otlp),
            ("log", "--log", &self.log),
        ];
        let given = |(key, flag, text): (_, _, &Option<String>)| Some((key, flag, text.clone()?));
        flags.into_iter().filter_map(given).collect()
    }
}

#[derive(Debug, Default, Args)]
#[command(after_help = UP_EXAMPLES)]
pub struct UpArgs {
    #[command(flatten)]
    pub mesh: MeshArgs,
    /// Where the first gateway listens; further ones take the next ports, and
    /// port 0 takes a free one [default: 127.0.0.1:8080]
    #[arg(long, value_name = "HOST:PORT")]
    pub http: Option<String>,
    /// Do not show a completion when the mesh is up
    #[arg(long)]
    pub no_demo: bool,
}

const UP_EXAMPLES: &str = "\
Examples:
  moemesh up                                       1 gateway, 1 router, 3 expert nodes
  moemesh up --expert-nodes 4 --replicas 2         every expert on two nodes
  moemesh up --expert-nodes 0                      no expert nodes: the baseline
  moemesh up --tls                                 mutual TLS between the processes
  moemesh up --http 0.0.0.0:8000 --gateways 2      reachable from outside, on 8000 and 8001
  MOEMESH_ROUTER_MAX_RUNNING=8 moemesh up          a setting for every router";

#[derive(Debug, Args)]
#[command(after_help = GENERATE_EXAMPLES)]
pub struct GenerateArgs {
    /// Text to continue, or the message with --chat; `-` reads standard input
    pub prompt: String,
    /// Ask this OpenAI-compatible server; without it a mesh is started for the
    /// occasion, and --model names the model in place of a directory
    #[arg(long, value_name = "URL")]
    pub url: Option<String>,
    /// Bearer token for --url
    #[arg(long, value_name = "KEY", env = "MOEMESH_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
    /// Most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub max_tokens: u32,
    /// 0 is greedy [default: the model's own]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f64>,
    /// The same seed gives the same text
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Ask through the model's chat template
    #[arg(long)]
    pub chat: bool,
    #[command(flatten)]
    pub mesh: MeshArgs,
}

const GENERATE_EXAMPLES: &str = "\
Examples:
  moemesh generate \"Once upon a time\" --max-tokens 40 --temperature 0
  moemesh generate --chat \"What is a gate?\" --url http://127.0.0.1:8080
  cat story.txt | moemesh generate -

The text goes to standard output, how fast it came to standard error.";

#[derive(Debug, Args)]
pub struct RoleArgs {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// One setting, over file and environment; lists are comma-separated
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Print a configuration file that explains every key, and exit
    #[arg(long)]
    pub print_config: bool,
    /// End when standard input closes
    #[arg(long, hide = true)]
    pub die_with_parent: bool,
}

/// A role's that computes, and what is worth a flag.
#[derive(Debug, Args)]
pub struct ComputingArgs {
    #[command(flatten)]
    pub role: RoleArgs,
    /// What computes trunk or experts: cpu, or cuda:N for an NVIDIA GPU of the Hopper
    /// generation [default: cpu]
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<String>,
}

#[derive(Debug, Args)]
#[command(after_help = STATUS_EXAMPLES)]
pub struct StatusArgs {
    /// Ask this gateway
    #[arg(long, value_name = "URL", conflicts_with = "router")]
    pub url: Option<String>,
    /// Ask this router and the nodes it knows, host:port or unix:/path
    #[arg(long, value_name = "ENDPOINT")]
    pub router: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub tls: TlsArgs,
}

const STATUS_EXAMPLES: &str = "\
Without a flag: the mesh that `moemesh up` runs here. Exit code 0 when every part is ready.

Examples:
  moemesh status
  moemesh status --router 10.0.0.7:7000 --json
  moemesh status --router 10.0.0.7:7000 --tls-cert operator-0.pem --tls-key operator-0.key --tls-ca ca.pem";

#[derive(Debug, Args)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: BenchCommand,
}

#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// Load a server or a mesh: throughput, latency, CPU and memory
    #[command(visible_alias = "text")]
    Serve(BenchServeArgs),
    /// Measure a mesh beside another engine, in alternating rounds
    Compare(BenchCompareArgs),
    /// Measure the round trip of a layer's rows beside a raw echo of the same bytes
    Dispatch(BenchDispatchArgs),
    /// Measure products and experts beside what the machine does at most
    Kernels(BenchKernelsArgs),
    /// Check and measure experts on a GPU beside what it does at most
    Device(BenchDeviceArgs),
    /// Write a checkpoint with random weights to measure with
    MakeCheckpoint(MakeCheckpointArgs),
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn only_flags_that_were_given_are_passed_on() {
        let cli = Cli::parse_from(["moemesh", "up", "--expert-nodes", "0", "--no-demo"]);
        let Some(Command::Up(up)) = cli.command else { panic!("not up") };
        assert_eq!(up.mesh.flags(), [("expert_nodes", "--expert-nodes", "0".to_owned())]);
        assert!(up.no_demo);
        assert!(Cli::parse_from(["moemesh"]).command.is_none());
    }
}
