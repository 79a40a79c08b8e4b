//! The private directory of a local mesh: sockets, configuration files, and the
//! state file by which `moemesh status` finds it. Removed when the mesh ends;
//! what a killed `up` left behind is removed by the next one.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use rustix::process::{Pid, getuid, test_kill_process};
use serde::{Deserialize, Serialize};

const PREFIX: &str = "moemesh-";
const STATE_FILE: &str = "state.json";
/// A Unix socket's path holds 108 bytes, its end marker included.
const LONGEST_SOCKET_PATH: usize = 107;
/// The longest file name put into the directory.
const LONGEST_NAME: usize = "expert-node-999.admin.sock".len();

/// What a running local mesh says about itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// The process of `moemesh up`.
    pub pid: u32,
    pub model: String,
    /// Directory of the mesh's certificates, if it has any.
    #[serde(default)]
    pub certificates: Option<String>,
    pub gateways: Vec<Member>,
    pub routers: Vec<Member>,
    pub expert_nodes: Vec<Member>,
}

/// One process of the mesh. Endpoints are written as configuration files have them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub id: String,
    pub endpoint: String,
    pub admin: String,
}

/// A directory of mode 0700 that lives as long as this value.
#[derive(Debug)]
pub struct RuntimeDir(PathBuf);

impl RuntimeDir {
    /// Makes one under `$XDG_RUNTIME_DIR`, or else the temporary directory.
    pub fn create() -> io::Result<Self> {
        Self::create_in(&bases())
    }

    fn create_in(bases: &[PathBuf]) -> io::Result<Self> {
        let mut failure = io::Error::other("no directory's path is short enough for sockets");
        for base in bases {
            sweep(base);
            let path = base.join(format!("{PREFIX}{}-{:08x}", std::process::id(), unique()));
            if path.as_os_str().len() + 1 + LONGEST_NAME > LONGEST_SOCKET_PATH {
                continue;
            }
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Self(path)),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes the state file, whole or not at all.
    pub fn publish(&self, state: &State) -> io::Result<()> {
        let part = self.0.join("state.json.part");
        fs::write(&part, serde_json::to_vec_pretty(state)?)?;
        fs::rename(part, self.0.join(STATE_FILE))
    }
}

impl Drop for RuntimeDir {
    fn drop(&mut self) {
        // Nothing in it is needed again; a leftover is swept by the next `up`.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The local meshes of this user that are running, newest first.
pub fn running() -> Vec<State> {
    running_in(&bases())
}

fn running_in(bases: &[PathBuf]) -> Vec<State> {
    let mut found: Vec<_> = bases
        .iter()
        .flat_map(|base| ours(base))
        .filter_map(|dir| {
            let file = dir.join(STATE_FILE);
            let age = fs::metadata(&file).and_then(|meta| meta.modified()).ok()?;
            let state: State = serde_json::from_slice(&fs::read(file).ok()?).ok()?;
            is_alive(state.pid).then_some((age, state))
        })
        .collect();
    found.sort_by_key(|(age, _)| std::cmp::Reverse(*age));
    found.into_iter().map(|(_, state)| state).collect()
}

/// Removes what processes that are gone left behind.
fn sweep(base: &Path) {
    for dir in ours(base) {
        let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let pid = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if pid.and_then(|pid| pid.parse().ok()).is_some_and(|pid| !is_alive(pid)) {
            let _ = fs::remove_dir_all(dir);
        }
    }
}

/// Directories under `base` that look like ours and belong to this user: in a
/// shared temporary directory anyone can make one of that name.
fn ours(base: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(base) else { return Vec::new() };
    let user = getuid().as_raw();
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(PREFIX))
        .filter(|entry| entry.metadata().is_ok_and(|meta| meta.is_dir() && meta.uid() == user))
        .map(|entry| entry.path())
        .collect()
}

fn is_alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    // Being forbidden to signal it means that it lives, under another user.
    pid.is_some_and(|pid| test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// Tells apart the meshes that one process starts.
fn unique() -> u32 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.subsec_nanos())
}

fn bases() -> Vec<PathBuf> {
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").filter(|dir| !dir.is_empty());
    let mut bases: Vec<PathBuf> = runtime.map(PathBuf::from).into_iter().collect();
    for base in [std::env::temp_dir(), PathBuf::from("/tmp")] {
        if !bases.contains(&base) {
            bases.push(base);
        }
    }
    bases
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn state() -> State {
        let member = |id: &str| Member {
            id: id.to_owned(),
            endpoint: format!("unix:/x/{id}.sock"),
            admin: format!("unix:/x/{id}.admin.sock"),
        };
        State {
            pid: std::process::id(),
            model: "/models/tiny".to_owned(),
            certificates: None,
            gateways: vec![member("gateway-0")],
            routers: vec![member("router-0")],
            expert_nodes: vec![member("expert-node-0"), member("expert-node-1")],
        }
    }

    #[test]
    fn a_running_mesh_is_found_until_it_ends() {
        let base = std::env::temp_dir().join(format!("test-{}-{}", std::process::id(), unique()));
        fs::create_dir(&base).unwrap();
        let bases = [base.join("missing"), base.clone()];
        let dir = RuntimeDir::create_in(&bases).unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(running_in(&bases), []);
        dir.publish(&state()).unwrap();
        assert_eq!(running_in(&bases), [state()]);

        // A process id that no system hands out: its mesh is gone.
        let stale = base.join(format!("{PREFIX}{}-0", i32::MAX));
        fs::create_dir(&stale).unwrap();
        let gone = State { pid: i32::MAX as u32, ..state() };
        fs::write(stale.join(STATE_FILE), serde_json::to_vec(&gone).unwrap()).unwrap();
        assert_eq!(running_in(&bases), [state()]);
        sweep(&base);
        assert!(!stale.exists());
        assert!(dir.path().exists());

        drop(dir);
        assert_eq!(running_in(&bases), []);
        fs::remove_dir_all(base).unwrap();
    }

    #[test]
    fn a_path_too_long_for_a_socket_is_passed_over() {
        let long = PathBuf::from(format!("/tmp/{}", "x".repeat(100)));
        assert!(RuntimeDir::create_in(std::slice::from_ref(&long)).is_err());
        let dir = RuntimeDir::create_in(&[long, std::env::temp_dir()]).unwrap();
        assert!(dir.path().as_os_str().len() < LONGEST_SOCKET_PATH);
    }
}
