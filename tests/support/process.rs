//! Processes of the binary under test: each is ended when its value is dropped,
//! so a failing assertion leaves nothing behind.

use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

/// One role of a mesh, killed when dropped.
pub struct Process {
    pub name: String,
    config: PathBuf,
    launch: Launch,
    child: Child,
}

/// How a process is started, the first time and again.
#[derive(Clone, Default)]
pub struct Launch {
    pub environment: Vec<(String, String)>,
    /// What it writes goes to `NAME.log` beside its configuration.
    pub logged: bool,
    /// The network namespace it is in, if not this program's.
    pub netns: Option<String>,
}

impl Process {
    /// Writes `config` into `dir` and starts `name`, such as `router-0`, with it.
    pub fn start(dir: &Path, name: &str, config: &str, launch: Launch) -> Self {
        let path = dir.join(format!("{name}.toml"));
        std::fs::write(&path, config).unwrap();
        let child = spawn(name, &path, &launch);
        Self { name: name.to_owned(), config: path, launch, child }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again after it has ended.
    pub fn restart(&mut self) {
        self.child = spawn(&self.name, &self.config, &self.launch);
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// SIGTERM, then waits; it must drain and end with 0.
    pub fn terminate(&mut self) {
        signal(self.child.id(), "TERM");
        let status = self.child.wait().unwrap();
        assert!(status.success(), "{} ended with {status}", self.name);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(name: &str, config: &Path, launch: &Launch) -> Child {
    let role = name.rsplit_once('-').unwrap().0;
    let mut command = moemesh();
    if let Some(netns) = &launch.netns {
        // Becomes the program, under the same process id.
        command = Command::new("ip");
        command.args(["netns", "exec", netns, env!("CARGO_BIN_EXE_moemesh")]);
    }
    command.args([role, "--config"]).arg(config).envs(launch.environment.iter().cloned());
    if launch.logged {
        let path = config.with_extension("log");
        command.stderr(File::options().create(true).append(true).open(path).unwrap());
    }
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

/// The binary under test.
pub fn moemesh() -> Command {
    Command::new(env!("CARGO_BIN_EXE_moemesh"))
}

/// A port that was free a moment ago.
pub fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Sends a signal by name to one process.
pub fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill").args([&format!("-{name}"), &pid.to_string()]).status();
    assert!(sent.unwrap().success());
}

/// Runs a command to its end and returns (success, stdout, stderr).
pub fn run(command: &mut Command) -> (bool, String, String) {
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stderr = child.stderr.take().unwrap();
    let errors = std::thread::spawn(move || {
        let mut text = String::new();
        stderr.read_to_string(&mut text).unwrap();
        text
    });
    let mut stdout = String::new();
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    let status = child.wait().unwrap();
    (status.success(), stdout, errors.join().unwrap())
}
