//! Certificates as an operator makes them.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use mesh::tls::{Role, Tls};

use super::process::{moemesh, run};
use super::sandbox::identity;

/// A directory of certificates, removed at the end.
pub struct Certs(pub PathBuf);

impl Certs {
    /// As `moemesh certs all` makes them.
    pub fn new(extra: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("moecerts-{}-{count}", std::process::id()));
        let certs = Self(dir);
        let (ok, said, error) = run(moemesh().args(["certs", "all"]).arg(&certs.0).args(extra));
        assert!(ok, "{error}");
        assert!(said.contains("issued spiffe://moemesh/router/router-0"), "{said}");
        certs
    }

    pub fn issue(&self, role: &str, id: &str) {
        let (ok, _, error) = run(&mut self.command(role, id));
        assert!(ok, "{error}");
    }

    fn command(&self, role: &str, id: &str) -> Command {
        let mut command = moemesh();
        command.args(["certs", "issue"]).arg(&self.0);
        command.args(["--force", "--role", role, "--id", id]);
        command
    }

    pub fn of(&self, role: Role, id: &str) -> Tls {
        identity(&self.0, role, id)
    }
}

impl Drop for Certs {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
