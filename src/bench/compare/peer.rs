//! The other engine: its command line, and its processes from start to end. What
//! it writes goes to a file, which is shown when it fails.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, Command};

use crate::bench::load::{Target, answer_for};
use crate::bench::procs::{self, Process};
use crate::cli::{BenchCompareArgs, PeerKind};
use crate::client::http::Server;
use crate::client::openai::first_model;
use crate::config::local::Local;

/// How long a peer may take until it answers.
const PATIENCE: Duration = Duration::from_secs(300);
const ASK_EVERY: Duration = Duration::from_millis(250);
/// Characters of a failed peer's output that are shown.
const LAST_WORDS: usize = 600;
/// Tokens of context beyond what a request needs.
const SLACK: usize = 64;

/// What starts a peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PeerCommand {
    pub name: String,
    variables: Vec<(String, String)>,
    program: PathBuf,
    arguments: Vec<String>,
    port: u16,
}

impl PeerCommand {
    /// As it would be typed.
    pub fn line(&self) -> String {
        let variables = self.variables.iter().map(|(name, value)| format!("{name}={value}"));
        let program = std::iter::once(self.program.display().to_string());
        let words = variables.chain(program).chain(self.arguments.iter().cloned());
        words.collect::<Vec<_>>().join(" ")
    }
}

/// The command line that was asked for, every placeholder filled in.
pub fn command(
    args: &BenchCompareArgs,
    local: &Local,
    model: &Path,
) -> anyhow::Result<PeerCommand> {
    let answer = answer_for(args.decode_tokens);
    let longest = (args.prompt_tokens + answer).max(args.prefill_tokens + 1);
    let streams = args.streams.iter().copied().max().unwrap_or(1).max(1);
    let port = std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
    let (name, template) = match (&args.peer, &args.peer_command) {
        (Some(kind), None) => (kind.name(), kind.template()),
        (None, Some(template)) => ("peer", template.as_str()),
        _ => bail!("name the other engine with --peer or --peer-command"),
    };
    let cpus = match &args.cpus {
        Some(cpus) => cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(","),
        None => format!("0-{}", crate::config::roles::cpus() - 1),
    };
    let model = args.peer_model.as_deref().unwrap_or(model);
    let values = [
        ("{model}", model.display().to_string()),
        ("{port}", port.to_string()),
        ("{threads}", local.threads.to_string()),
        ("{streams}", streams.to_string()),
        ("{context}", (longest + SLACK).to_string()),
        ("{total}", ((longest + SLACK) * streams).to_string()),
        ("{cpus}", cpus),
    ];
    // Split first: a value may hold spaces.
    let template = [Some(template), args.peer_args.as_deref()].into_iter().flatten();
    let mut words = template.flat_map(str::split_whitespace).map(|word| {
        values.iter().fold(word.to_owned(), |word, (name, value)| word.replace(name, value))
    });
    let mut variables = Vec::new();
    let program = loop {
        let Some(word) = words.next() else { bail!("--peer-command names no program") };
        match word.split_once('=') {
            Some((variable, value)) if !variable.contains('/') => {
                variables.push((variable.to_owned(), value.to_owned()));
            }
            _ => break word,
        }
    };
    let program = match (&args.peer_program, &args.peer) {
        (Some(program), _) => program.clone(),
        (None, Some(PeerKind::Moemesh)) => std::env::current_exe()?,
        (None, _) => program.into(),
    };
    let arguments = words.collect();
    Ok(PeerCommand { name: name.to_owned(), variables, program, arguments, port })
}

/// A running peer, killed with all its processes when dropped.
#[derive(Debug)]
pub struct Peer {
    child: Child,
    pid: u32,
    server: Server,
    log: PathBuf,
}

impl Peer {
    /// Starts it and waits until it lists its model.
    pub async fn start(command: &PeerCommand) -> anyhow::Result<Self> {
        let log = std::env::temp_dir().join(format!("moemesh-peer-{}.log", std::process::id()));
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = Command::new(&command.program)
            .args(&command.arguments)
            .envs(command.variables.iter().cloned())
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("cannot start {}", command.program.display()))?;
        let pid = child.id().context("a peer without a process")?;
        let server = Server::from_url(&format!("127.0.0.1:{}", command.port), None)?;
        let mut peer = Self { child, pid, server, log };
        let began = Instant::now();
        loop {
            tokio::time::sleep(ASK_EVERY).await;
            if let Some(status) = peer.child.try_wait()? {
                bail!("{} ended: {status}: {}", command.name, peer.last_words());
            }
            if first_model(&peer.server).await.is_ok() {
                return Ok(peer);
            }
            if began.elapsed() > PATIENCE {
                bail!("{} did not come up: {}", command.name, peer.last_words());
            }
        }
    }

    /// Asks it until it answers: some list a model before it is loaded.
    pub async fn target(&self, vocab: u32) -> anyhow::Result<Target> {
        let began = Instant::now();
        let name = first_model(&self.server).await?;
        loop {
            match Target::open(self.server.clone(), name.clone(), vocab).await {
                Ok(target) => return Ok(target),
                Err(error) if began.elapsed() > PATIENCE => {
                    return Err(error).context(self.last_words());
                }
                Err(_) => tokio::time::sleep(ASK_EVERY).await,
            }
        }
    }

    pub fn processes(&self) -> Vec<Process> {
        procs::tree(self.pid)
    }

    /// The end of what it wrote.
    fn last_words(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let skipped = text.trim_end().chars().count().saturating_sub(LAST_WORDS);
        text.trim_end().chars().skip(skipped).collect()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        for process in self.processes() {
            if let Some(pid) = i32::try_from(process.pid).ok().and_then(Pid::from_raw) {
                // Fails only when it is gone.
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ = std::fs::remove_file(&self.log);
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::{BenchCommand, Cli, Command as Top};

    fn parsed(line: &str) -> anyhow::Result<PeerCommand> {
        let words = "moemesh bench compare".split(' ').chain(line.split(' '));
        let Some(Top::Bench(bench)) = Cli::try_parse_from(words)?.command else { unreachable!() };
        let BenchCommand::Compare(args) = bench.what else { unreachable!() };
        command(&args, &Local::for_one_command(&args.mesh)?, Path::new("/models/a b"))
    }

    #[test]
    fn placeholders_are_filled_in_and_variables_set() {
        let line = "--streams 1,16 --threads 2 --cpus 0,1 --prompt-tokens 100 --decode-tokens 100 \
                    --prefill-tokens 512 --peer-command";
        let mut words: Vec<&str> = line.split_whitespace().collect();
        words.push("A={cpus} srv -m {model} -p {port} -t {threads} -n {streams} -c {total}");
        let cli = Cli::parse_from(["moemesh", "bench", "compare"].into_iter().chain(words));
        let Some(Top::Bench(bench)) = cli.command else { panic!("not bench") };
        let BenchCommand::Compare(args) = bench.what else { panic!("not compare") };
        let local = Local::for_one_command(&args.mesh).unwrap();
        let made = command(&args, &local, Path::new("/models/a b")).unwrap();
        assert_eq!(made.variables, [("A".to_owned(), "0,1".to_owned())]);
        assert_eq!(made.program, Path::new("srv"));
        let port = made.port.to_string();
        let total = (16 * (513 + SLACK)).to_string();
        let want = ["-m", "/models/a b", "-p", &port, "-t", "2", "-n", "16", "-c", &total];
        assert_eq!(made.arguments, want);
    }

    #[test]
    fn presets_know_their_arguments() {
        let llama = parsed("--peer llama.cpp --peer-model /m.gguf --peer-args --mlock").unwrap();
        assert_eq!(llama.program, Path::new("llama-server"));
        assert!(llama.line().contains("-m /m.gguf ") && llama.line().ends_with(" --mlock"));
        let vllm = parsed("--peer vllm --peer-program /venv/bin/python").unwrap();
        assert_eq!(vllm.program, Path::new("/venv/bin/python"));
        assert!(vllm.variables.iter().any(|(name, _)| name == "VLLM_CPU_OMP_THREADS_BIND"));
        assert!(parsed("--peer moemesh").unwrap().line().contains(" up --no-demo "));
        assert!(!llama.line().contains('{') && !vllm.line().contains('{'));
    }

    #[test]
    fn one_engine_has_to_be_named() {
        for line in ["--rounds 1", "--peer vllm --peer-command x", "--peer other"] {
            assert!(parsed(line).is_err(), "{line}");
        }
    }

    #[tokio::test]
    async fn a_peer_that_ends_says_why() {
        let mut made = parsed("--peer llama.cpp").unwrap();
        made.program = "sh".into();
        made.arguments = vec!["-c".to_owned(), "echo no such model; exit 3".to_owned()];
        let error = Peer::start(&made).await.unwrap_err().to_string();
        assert!(error.contains("no such model") && error.contains('3'), "{error}");
    }
}
