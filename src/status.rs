//! `moemesh status`: asks every process of a mesh how it is and prints what they
//! say, as tables or as JSON. Reads only. Rooms: [`ask`] gathers, [`table`] and
//! [`placement`] lay out.

mod ask;
mod placement;
pub mod table;

use std::path::Path;

use anyhow::{anyhow, bail};

use crate::certs::operator::identity;
use crate::cli::StatusArgs;
use crate::client::http::Server;
use crate::up::runtime_dir;

/// Prints the state of a mesh.
///
/// # Errors
/// When there is none to ask, or when a part of it is not ready.
pub async fn run(args: StatusArgs) -> anyhow::Result<()> {
    let seen = if let Some(url) = &args.url {
        ask::gateway_only(Server::from_url(url, None)?).await
    } else if let Some(router) = &args.router {
        ask::router_and_nodes(router.parse()?, identity(&args.tls, None)?.as_ref()).await
    } else {
        let running = runtime_dir::running();
        let newest = running.first().ok_or_else(|| {
            anyhow!(
                "no mesh runs here: start one with `moemesh up`, or name one with --url or --router"
            )
        })?;
        let certificates = newest.certificates.as_deref().map(Path::new);
        ask::all(newest, identity(&args.tls, certificates)?.as_ref()).await
    };
    let text = if args.json { seen.json() } else { table::render(&seen) };
    print!("{text}");
    let unready = seen.unready();
    if !unready.is_empty() {
        bail!("not ready: {}", unready.join(", "));
    }
    Ok(())
}
