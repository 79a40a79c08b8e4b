//! A mesh of processes on this machine, from the first check to the last drain.
//! `up`, `generate` and `bench` run on one.

use std::net::TcpListener;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use mesh::tls::Role as TlsRole;
use mesh::transport::Endpoint;
use tokio::sync::mpsc;

use crate::certs::authority::Authority;
use crate::certs::operator::LOCAL_OPERATOR;
use crate::client::http::Server;
use crate::config::local::Local;
use crate::config::roles::Role;
use crate::up::console::{Console, Mode};
use crate::up::keeper::{Keeper, Stopped};
use crate::up::plan::{Planned, certificates, plan};
use crate::up::progress::{Progress, Stage};
use crate::up::runtime_dir::{Member, RuntimeDir, State};

/// How often readiness is asked for while the mesh comes up.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// How often somebody who waits is told for what.
const REMIND_EVERY: Duration = Duration::from_secs(10);
const ANSWER_WITHIN: Duration = Duration::from_secs(1);
/// How long a process may go on with what it has begun when it is told to end.
const GRACE: Duration = Duration::from_secs(20);
const SHORT_GRACE: Duration = Duration::from_secs(2);

/// Processes that are being kept running.
pub struct LocalMesh {
    keepers: Vec<Keeper>,
    given_up: mpsc::Receiver<String>,
    console: Console,
    /// Last, so that its files outlive the processes.
    _dir: RuntimeDir,
}

impl LocalMesh {
    /// Checks what can be checked without a process, then starts them all.
    ///
    /// # Errors
    /// An address in use, settings that a role refuses.
    pub fn start(
        local: &Local,
        model: &Path,
        console: &Console,
        log_filter: &str,
    ) -> anyhow::Result<Self> {
        let http = free_addresses(local)?;
        let dir = RuntimeDir::create().context("cannot make a directory for sockets")?;
        let planned = plan(local, model, dir.path(), &http, log_filter)?;
        for process in &planned {
            std::fs::write(&process.config_file, &process.config)
                .with_context(|| format!("cannot write {}", process.config_file.display()))?;
        }
        let mut state = state(model, &planned);
        if local.tls {
            certify(&certificates(dir.path()), &planned)?;
            state.certificates = Some(certificates(dir.path()).display().to_string());
        }
        dir.publish(&state).context("cannot write the state file")?;

        // One slot each: a keeper gives up once.
        let (giving_up, given_up) = mpsc::channel(planned.len());
        let keepers = planned
            .into_iter()
            .enumerate()
            .map(|(place, process)| {
                Keeper::start(process, place, console.clone(), giving_up.clone())
            })
            .collect();
        Ok(Self { keepers, given_up, console: console.clone(), _dir: dir })
    }

    /// Shows how loading goes, until every process is ready.
    ///
    /// # Errors
    /// The reason why a process was given up on.
    pub async fn ready(&mut self) -> anyhow::Result<()> {
        let mut progress =
            Progress::new(&self.console, self.keepers.iter().map(|k| k.planned.id.clone()));
        let mut patience = Instant::now();
        let mut waiting: Vec<usize> = (0..self.keepers.len()).collect();
        while !waiting.is_empty() {
            let mut still = Vec::new();
            for place in waiting {
                let keeper = &self.keepers[place];
                let stage = ask(&keeper.planned).await;
                if stage == Stage::Ready {
                    keeper.mark_ready();
                } else {
                    still.push(place);
                }
                progress.show(place, stage);
            }
            if let Some(&place) = still.first().filter(|_| patience.elapsed() > REMIND_EVERY) {
                progress.remind(place);
                patience = Instant::now();
            }
            waiting = still;
            tokio::select! {
                () = tokio::time::sleep(ASK_EVERY) => {}
                error = self.failed() => return Err(error),
            }
        }
        Ok(())
    }

    /// Resolves when a process is given up on, with the reason.
    pub async fn failed(&mut self) -> anyhow::Error {
        match self.given_up.recv().await {
            Some(reason) => anyhow!(reason),
            // Every keeper holds a sender while it keeps.
            None => anyhow!("every process of the mesh has ended"),
        }
    }

    /// The first gateway.
    pub fn server(&self) -> Server {
        let gateway = self.keepers.iter().find(|keeper| keeper.planned.role == Role::Gateway);
        let endpoint = gateway.map(|keeper| keeper.planned.endpoint.clone());
        Server::at(endpoint.expect("a plan has at least one gateway"))
    }

    /// Addresses of all gateways.
    pub fn addresses(&self) -> Vec<String> {
        let gateways = self.keepers.iter().filter(|k| k.planned.role == Role::Gateway);
        gateways.map(|keeper| keeper.planned.endpoint.to_string()).collect()
    }

    /// Stops the mesh from the front: gateways, when their requests have ended
    /// routers, and nodes last.
    ///
    /// # Errors
    /// Names the processes that did not end well; they are gone nevertheless.
    pub async fn drain(self) -> anyhow::Result<()> {
        self.stop(GRACE).await
    }

    /// Stops a mesh that never came up, or is not wanted any more, soon and
    /// without a word: there is something more important to say.
    pub async fn abandon(self) {
        self.console.set_mode(Mode::Keep);
        let _ = self.stop(SHORT_GRACE).await;
    }

    async fn stop(mut self, grace: Duration) -> anyhow::Result<()> {
        let mut badly = Vec::new();
        for role in Role::ALL {
            let (now, later) = self.keepers.into_iter().partition(|k| k.planned.role == role);
            self.keepers = later;
            let now: Vec<Keeper> = now;
            if now.is_empty() {
                continue;
            }
            let names: Vec<&str> = now.iter().map(|k| k.planned.id.as_str()).collect();
            self.console.say(&format!("draining {}", names.join(", ")));
            let began = Instant::now();
            let stopping: Vec<_> = now
                .into_iter()
                .map(|k| (k.planned.id.clone(), tokio::spawn(k.stop(grace))))
                .collect();
            for (id, stopping) in stopping {
                match stopping.await {
                    Ok(Stopped::Cleanly) => {
                        let took = began.elapsed().as_secs_f64();
                        self.console.say(&format!("{id} drained in {took:.1} s"));
                    }
                    Ok(Stopped::Otherwise(how)) => badly.push(format!("{id} {how}")),
                    Err(error) => badly.push(format!("{id}: {error}")),
                }
            }
        }
        if badly.is_empty() { Ok(()) } else { Err(anyhow!(badly.join("; "))) }
    }
}

/// The gateways' addresses, found free a moment ago. A port of 0 is replaced by
/// a free one.
fn free_addresses(local: &Local) -> anyhow::Result<Vec<Endpoint>> {
    let (host, first) = &local.http;
    // Held until all are found, so that no two are the same.
    let mut held = Vec::new();
    let mut addresses = Vec::new();
    for index in 0..local.gateways {
        let port = if *first == 0 { 0 } else { first + index as u16 };
        let asked = format!("{host}:{port}");
        let listener = TcpListener::bind(&asked).map_err(|error| match error.kind() {
            std::io::ErrorKind::AddrInUse => {
                anyhow!("address {asked} is in use: choose another with --http HOST:PORT")
            }
            _ => anyhow!("cannot listen on {asked}: {error}"),
        })?;
        let port = listener.local_addr().context("a listener without an address")?.port();
        addresses.push(Endpoint::Tcp(format!("{host}:{port}")));
        held.push(listener);
    }
    Ok(addresses)
}

fn state(model: &Path, planned: &[Planned]) -> State {
    let members = |role: Role| {
        let of_role = planned.iter().filter(|process| process.role == role);
        of_role
            .map(|process| Member {
                id: process.id.clone(),
                endpoint: process.endpoint.to_string(),
                admin: process.admin.to_string(),
            })
            .collect()
    };
    State {
        pid: std::process::id(),
        model: model.display().to_string(),
        certificates: None,
        gateways: members(Role::Gateway),
        routers: members(Role::Router),
        expert_nodes: members(Role::ExpertNode),
    }
}

/// Makes an authority for this mesh alone, and a certificate for each process and
/// for whoever operates it.
fn certify(dir: &Path, planned: &[Planned]) -> anyhow::Result<()> {
    const DAYS: u32 = 3650;
    let authority = Authority::create(dir, "local", DAYS, false)?;
    for process in planned {
        let role = match process.role {
            Role::Gateway => TlsRole::Gateway,
            Role::Router => TlsRole::Router,
            Role::ExpertNode => TlsRole::ExpertNode,
        };
        authority.issue(role, &process.id, DAYS, false)?;
    }
    authority.issue(TlsRole::Operator, LOCAL_OPERATOR, DAYS, false)?;
    Ok(())
}

async fn ask(process: &Planned) -> Stage {
    let server = Server::at(process.admin.clone());
    match tokio::time::timeout(ANSWER_WITHIN, server.readiness()).await {
        Ok(Ok(Ok(()))) => Stage::Ready,
        Ok(Ok(Err(reason))) => Stage::NotReady(reason),
        Ok(Err(_)) => Stage::Starting,
        Err(_) => Stage::NotReady("it does not answer".to_owned()),
    }
}
