//! Commands that change a running mesh.

use clap::Args;

use super::TlsArgs;

#[derive(Debug, Args)]
#[command(after_help = DRAIN_EXAMPLES)]
pub struct DrainArgs {
    /// The node's name or endpoint
    pub node: String,
    /// Give the node experts again
    #[arg(long)]
    pub cancel: bool,
    /// Ask this router, host:port or unix:/path [default: those of the mesh that runs here]
    #[arg(long, value_name = "ENDPOINT")]
    pub router: Option<String>,
    #[command(flatten)]
    pub tls: TlsArgs,
}

const DRAIN_EXAMPLES: &str = "\
Returns when the node owns no expert: then it can be stopped and nothing fails.
Interrupting the command does not stop the drain. A node that is started anew is
given experts again.

Examples:
  moemesh drain expert-node-1
  moemesh drain expert-node-1 --cancel";

#[derive(Debug, Args)]
pub struct RebalanceArgs {
    /// Print what would be moved, and move nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Ask this router, host:port or unix:/path [default: those of the mesh that runs here]
    #[arg(long, value_name = "ENDPOINT")]
    pub router: Option<String>,
    #[command(flatten)]
    pub tls: TlsArgs,
}

#[derive(Debug, Args)]
pub struct MemberArgs {
    /// Where the node is reached, host:port or unix:/path
    pub endpoint: String,
    /// Tell this router [default: all of the mesh that runs here]
    #[arg(long, value_name = "ENDPOINT")]
    pub router: Option<String>,
    #[command(flatten)]
    pub tls: TlsArgs,
}
