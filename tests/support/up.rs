//! `moemesh up` as its user starts it. Ended when dropped, and its children
//! with it, since they do not outlive it.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use super::http::{self, Address};
use super::process::{free_port, moemesh, signal};

const READY_TRIES: u32 = 1200;
const PAUSE: Duration = Duration::from_millis(50);

/// See the module's text.
pub struct Up {
    child: Child,
    pub http: Address,
}

impl Up {
    /// Starts it on `model` and waits until it is ready. `environment` adds to
    /// the caller's.
    pub async fn start(model: &Path, extra: &[&str], environment: &[(&str, &Path)]) -> Self {
        let address = format!("127.0.0.1:{}", free_port());
        let mut child = moemesh()
            .args(["up", "--no-demo", "--http", &address, "--model"])
            .arg(model)
            .args(extra)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn(move || while let Some(Ok(_)) = lines.next() {});
        let mut up = Self { child, http: Address::Tcp(address) };
        up.wait_ready().await;
        up
    }

    pub async fn wait_ready(&mut self) {
        for _ in 0..READY_TRIES {
            if http::get(&self.http, "/readyz").await.is_ok_and(|(status, _)| status == 200) {
                return;
            }
            assert!(self.child.try_wait().unwrap().is_none(), "the mesh ended");
            tokio::time::sleep(PAUSE).await;
        }
        panic!("never ready");
    }

    /// Process ids of the children whose command line names `role`.
    pub fn children(&self, role: &str) -> Vec<u32> {
        let own = self.child.id().to_string();
        let listed = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
            let pid: u32 = entry.unwrap().file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let parent = stat.rsplit_once(") ")?.1.split(' ').nth(1)?.to_owned();
            let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let named = command.split(|&byte| byte == 0).any(|word| word == role.as_bytes());
            (parent == own && named).then_some(pid)
        });
        listed.collect()
    }

    pub fn signal(&self, name: &str) {
        signal(self.child.id(), name);
    }

    /// How it ended.
    pub fn wait(mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Sends a signal and waits.
    pub fn end(self, name: &str) -> ExitStatus {
        self.signal(name);
        self.wait()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
