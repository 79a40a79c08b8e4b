//! What `moemesh certs` takes, and how an operator's command shows who it is.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use mesh::tls::{Principal, Role};

#[derive(Debug, Args)]
#[command(after_help = CERTS_EXAMPLES)]
pub struct CertsArgs {
    #[command(subcommand)]
    pub what: CertsCommand,
}

#[derive(Debug, Subcommand)]
pub enum CertsCommand {
    /// Make an authority: DIR/ca.pem, which every process trusts, and DIR/ca.key, which none needs
    Init(InitArgs),
    /// Issue one certificate: DIR/ID.pem and DIR/ID.key
    Issue(IssueArgs),
    /// Make an authority, if there is none, and every certificate that a mesh needs
    All(AllArgs),
    /// Say whose a certificate is and until when
    Show {
        /// A PEM file with certificates
        file: PathBuf,
    },
}

#[derive(Debug, Args)]
pub struct InitArgs {
    /// Directory of the authority; made if it is missing
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Name of the mesh, which stands in every certificate: lower-case letters, digits, . - _
    #[arg(long, value_name = "NAME", default_value = "moemesh", value_parser = mesh)]
    pub mesh: String,
    /// How long the authority is valid
    #[arg(long, value_name = "N", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub days: u32,
    /// Replace files that are there: certificates of the old authority are worth nothing then
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct IssueArgs {
    /// Directory of the authority
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// gateway, router, expert-node or operator: what its holder may be
    #[arg(long, value_name = "ROLE")]
    pub role: Role,
    /// Its holder's id; for an expert node the `id` of its configuration
    #[arg(long, value_name = "NAME", value_parser = id)]
    pub id: String,
    /// How long it is valid
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub days: u32,
    /// Replace files that are there; processes that use them take the new ones over
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Args)]
pub struct AllArgs {
    /// Directory of the authority; made if it is missing
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,
    /// Certificates gateway-0, gateway-1, …
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub gateways: usize,
    /// Certificates router-0, …
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub routers: usize,
    /// Certificates expert-node-0, …
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub expert_nodes: usize,
    /// Certificates operator-0, …
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub operators: usize,
    /// Name of the mesh, if its authority is to be made
    #[arg(long, value_name = "NAME", default_value = "moemesh", value_parser = mesh)]
    pub mesh: String,
    /// How long they are valid
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
    pub days: u32,
    /// Replace certificates that are there, but never the authority
    #[arg(long)]
    pub force: bool,
}

const CERTS_EXAMPLES: &str = "\
A certificate says who its holder is: spiffe://MESH/ROLE/ID. Set a process's `tls_cert` and
`tls_key` to its own files and `tls_ca` to ca.pem. Key files are readable by their owner only;
keep ca.key where no process of the mesh runs. Issued anew with --force (or by another
authority of yours), files are taken over by running processes within seconds.

Examples:
  moemesh certs all certs --expert-nodes 8
  moemesh certs init certs --mesh prod
  moemesh certs issue certs --role expert-node --id expert-node-8 --days 90
  moemesh certs show certs/expert-node-8.pem";

fn id(text: &str) -> Result<String, String> {
    Principal::new("mesh", Role::Operator, text).map(|it| it.id).map_err(|e| e.to_string())
}

fn mesh(text: &str) -> Result<String, String> {
    Principal::new(text, Role::Operator, "id").map(|it| it.mesh).map_err(|e| e.to_string())
}

/// Who an operator's command is, where the mesh speaks mutual TLS.
#[derive(Clone, Debug, Default, Args)]
pub struct TlsArgs {
    /// Certificate of role operator [default: that of the mesh which `moemesh up --tls` runs here]
    #[arg(long, value_name = "FILE", env = "MOEMESH_TLS_CERT")]
    pub tls_cert: Option<PathBuf>,
    /// Its private key
    #[arg(long, value_name = "FILE", env = "MOEMESH_TLS_KEY")]
    pub tls_key: Option<PathBuf>,
    /// Authorities to trust
    #[arg(long, value_name = "FILE", env = "MOEMESH_TLS_CA")]
    pub tls_ca: Option<PathBuf>,
}
