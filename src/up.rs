//! `moemesh up`: a whole mesh on one machine, each role in a process of its own.
//! Rooms, in the order they are entered:
//!
//! - [`plan`]: which processes, with which settings (pure)
//! - [`runtime_dir`]: their sockets and files; how `status` finds them
//! - [`mesh`]: start them, wait until they are ready, drain them
//! - [`keeper`]: one process kept running; [`lines`]: what it writes
//! - [`console`], [`progress`]: what the terminal shows
//! - [`demo`]: the proof that it works

pub mod console;
pub mod demo;
pub mod keeper;
pub mod lines;
pub mod mesh;
pub mod plan;
pub mod progress;
pub mod runtime_dir;

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::config::local::Local;
use crate::exit::Interrupted;
use crate::up::console::{Console, Mode};
use crate::up::mesh::LocalMesh;
use crate::weights;

/// What `up` logs unless `RUST_LOG` says otherwise.
const LOG_FILTER: &str = "info";

/// Runs a mesh until a signal or until it cannot go on.
pub async fn run(local: Local) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let console = Console::new(local.log);
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| LOG_FILTER.to_owned());
    let model = weights::model_dir(&local, &console, &mut signals).await?;
    let mut mesh = LocalMesh::start(&local, &model, &console, &filter)?;
    console.say(&format!(
        "starting {}, {}, {}",
        count(local.expert_nodes, "expert node"),
        count(local.routers, "router"),
        count(local.gateways, "gateway")
    ));
    let came_up = tokio::select! {
        came_up = mesh.ready() => came_up.map(|()| true),
        () = signals.any() => Ok(false),
    };
    let served = match came_up {
        Ok(true) => tokio::select! {
            error = serve(&mut mesh, &local, &console) => Err(error),
            () = signals.any() => Ok(()),
        },
        Ok(false) => Ok(()),
        Err(error) => {
            mesh.abandon().await;
            return Err(error);
        }
    };
    // Also undoes what a demonstration cut short left behind.
    console.set_mode(Mode::Show);
    // A second signal is for somebody in a hurry.
    let drained = tokio::select! {
        drained = mesh.drain() => drained,
        () = signals.any() => return Err(Interrupted.into()),
    };
    served.and(drained)
}

/// Returns only when the mesh cannot go on, with the reason.
async fn serve(mesh: &mut LocalMesh, local: &Local, console: &Console) -> anyhow::Error {
    if local.demo {
        console.set_mode(Mode::Keep);
        let server = mesh.server();
        let shown = tokio::select! {
            shown = demo::show(&server) => shown,
            error = mesh.failed() => return error,
        };
        console.set_mode(Mode::Show);
        if let Err(error) = shown {
            console.warn(&format!("the demonstration failed: {error}"));
        }
    }
    greet(mesh);
    mesh.failed().await
}

fn greet(mesh: &LocalMesh) {
    let addresses = mesh.addresses();
    let urls: Vec<String> = addresses.iter().map(|at| format!("http://{at}/v1")).collect();
    let first = &addresses[0];
    // Whoever closed standard output has no use for it; the mesh serves on.
    let _ = demo::write(&format!(
        "\nServing the OpenAI API at {}. Ctrl-C stops it.\n\n  \
         curl -N http://{first}/v1/completions -H 'content-type: application/json' \\\n    \
         -d '{{\"prompt\": \"Once upon a time\", \"max_tokens\": 64, \"stream\": true}}'\n\n",
        urls.join(", ")
    ));
}

fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// The signals that end a mesh.
pub struct Signals([Signal; 3]);

impl Signals {
    pub fn new() -> std::io::Result<Self> {
        Ok(Self([
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
            signal(SignalKind::hangup())?,
        ]))
    }

    /// Resolves when one of them arrives.
    pub async fn any(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
