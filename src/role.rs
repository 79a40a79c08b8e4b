//! One process of a mesh: reads its configuration, installs telemetry, serves
//! its role until a signal, drains, and says by its exit code how it ended.

use std::io::Read as _;
use std::path::Path;
use std::time::Duration;

use mesh::lifecycle::Shutdown;
use mesh::telemetry;

use crate::config::given::variables;
use crate::config::reader;
use crate::config::roles::{self, Process, Role, RoleConfig};
use crate::exit::BadCheckpoint;

/// How long a process whose parent is gone may take to end.
const ORPHAN_GRACE: Duration = Duration::from_secs(3);

/// Prints an annotated configuration file: the defaults, with what was given in
/// their place.
pub fn print_config(role: Role, file: Option<&Path>, pairs: &[String]) -> anyhow::Result<()> {
    let given = roles::gather(role, file, variables(), pairs)?;
    let declared = if given.iter().next().is_none() {
        roles::declared(role)?
    } else {
        roles::resolve(role, &given)?.1
    };
    let title = format!("Configuration of `moemesh {role}`. Keys set to their defaults can go.");
    print!("{}", reader::print(&title, &declared));
    Ok(())
}

/// Serves one role. Ends by SIGINT or SIGTERM, or with the parent if `with_parent`.
pub async fn run(
    role: Role,
    file: Option<&Path>,
    pairs: &[String],
    with_parent: bool,
) -> anyhow::Result<()> {
    let given = roles::gather(role, file, variables(), pairs)?;
    let (Process { telemetry, role }, _) = roles::resolve(role, &given)?;
    let _flushed_at_the_end = telemetry::init(telemetry)?;
    let shutdown = Shutdown::new();
    shutdown.on_signals()?;
    if with_parent {
        end_with_parent(shutdown.clone())?;
    }
    match role {
        RoleConfig::Gateway(config) => match gateway::serve(config, shutdown).await {
            Err(gateway::Error::Load(error)) => Err(BadCheckpoint(error.to_string()).into()),
            served => Ok(served?),
        },
        RoleConfig::Router(config) => match router::serve(config, shutdown).await {
            Err(router::Error::Load(error)) => Err(BadCheckpoint(error.to_string()).into()),
            served => Ok(served?),
        },
        RoleConfig::ExpertNode(config) => match expert_node::serve(config, shutdown).await {
            Err(expert_node::Error::Load(error)) => Err(BadCheckpoint(error.to_string()).into()),
            served => Ok(served?),
        },
    }
}

/// Ends this process when standard input closes, which it does when the parent
/// that holds its other end is gone, however it went.
fn end_with_parent(shutdown: Shutdown) -> std::io::Result<()> {
    let watch = move || {
        let mut ignored = [0; 64];
        let mut input = std::io::stdin().lock();
        while matches!(input.read(&mut ignored), Ok(count) if count > 0) {}
        shutdown.trigger();
        // Nobody is left who would wait for a slow drain.
        std::thread::sleep(ORPHAN_GRACE);
        std::process::exit(1);
    };
    std::thread::Builder::new().name("parent".to_owned()).spawn(watch)?;
    Ok(())
}
