//! `moemesh generate`: one completion, streamed to standard output. Without a
//! URL it comes from a mesh of its own, which lives as long as the command and
//! shows its log only when something goes wrong.

use std::io::{IsTerminal as _, Read as _};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use indicatif::ProgressBar;

use crate::client::http::Server;
use crate::client::openai::{Ask, Prompt, complete, first_model};
use crate::config::local::Local;
use crate::exit::Interrupted;
use crate::up::Signals;
use crate::up::console::{Console, Mode};
use crate::up::demo::{ShowError, speed, write};
use crate::up::mesh::LocalMesh;
use crate::weights;

/// What a quiet mesh logs.
pub const QUIET_FILTER: &str = "warn";

/// What is to be generated.
#[derive(Debug)]
pub struct Request {
    /// `-` reads standard input.
    pub prompt: String,
    pub chat: bool,
    pub max_tokens: u32,
    pub temperature: Option<f64>,
    pub seed: Option<u64>,
}

/// Asks the server at `url`, for `model` or the first that it lists.
pub async fn from_server(
    request: &Request,
    server: &Server,
    model: Option<PathBuf>,
) -> anyhow::Result<()> {
    let prompt = prompt(request)?;
    let mut signals = Signals::new()?;
    let model = model.map(|name| name.to_string_lossy().into_owned());
    tokio::select! {
        done = stream(request, prompt, server, model) => done,
        () = signals.any() => Err(Interrupted.into()),
    }
}

/// Starts a mesh, asks it, and drains it.
pub async fn from_own_mesh(request: &Request, local: &Local) -> anyhow::Result<()> {
    let prompt = prompt(request)?;
    with_quiet_mesh(local, async |server| stream(request, prompt, &server, None).await).await
}

/// Runs `work` against a mesh of its own, whose log is shown only if it fails.
pub async fn with_quiet_mesh<T>(
    local: &Local,
    work: impl AsyncFnOnce(Server) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let mut signals = Signals::new()?;
    let console = Console::quiet(local.log);
    let model = weights::model_dir(local, &console, &mut signals).await?;
    let mut mesh = LocalMesh::start(local, &model, &console, QUIET_FILTER)?;
    let server = mesh.server();
    let worked = tokio::select! {
        worked = async {
            come_up(&mut mesh).await?;
            tokio::select! {
                worked = work(server) => worked,
                error = mesh.failed() => Err(error),
            }
        } => worked,
        () = signals.any() => Err(Interrupted.into()),
    };
    let interrupted = worked.as_ref().is_err_and(|error| error.is::<Interrupted>());
    mesh.abandon().await;
    if worked.is_err() && !interrupted {
        console.set_mode(Mode::Show);
    }
    worked
}

async fn come_up(mesh: &mut LocalMesh) -> anyhow::Result<()> {
    let spinner = ProgressBar::new_spinner();
    if std::io::stderr().is_terminal() {
        spinner.set_message("starting a mesh");
        spinner.enable_steady_tick(Duration::from_millis(80));
    } else {
        spinner.set_draw_target(indicatif::ProgressDrawTarget::hidden());
    }
    let ready = mesh.ready().await;
    spinner.finish_and_clear();
    ready
}

async fn stream(
    request: &Request,
    prompt: String,
    server: &Server,
    model: Option<String>,
) -> anyhow::Result<()> {
    let model = match model {
        Some(model) => model,
        None => first_model(server).await?,
    };
    let ask = Ask {
        model,
        prompt: if request.chat { Prompt::Chat(prompt) } else { Prompt::Text(prompt) },
        max_tokens: request.max_tokens,
        temperature: request.temperature,
        seed: request.seed,
        ignore_eos: false,
        count_each: false,
    };
    let summary = match complete(server, &ask, write).await {
        // Whoever read the text has enough of it, as in `… | head -1`.
        Err(ShowError::Output(error)) if error.kind() == std::io::ErrorKind::BrokenPipe => {
            return Ok(());
        }
        done => done?,
    };
    write("\n")?;
    eprintln!("[{}]", speed(&summary));
    Ok(())
}

fn prompt(request: &Request) -> anyhow::Result<String> {
    if request.prompt != "-" {
        return Ok(request.prompt.clone());
    }
    let mut text = String::new();
    std::io::stdin().lock().read_to_string(&mut text).context("cannot read standard input")?;
    Ok(text)
}
