//! Certificates as an operator makes them.

use std::path::{Path, PathBuf};
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
        issue(&self.0, role, id);
    }

    pub fn of(&self, role: Role, id: &str) -> Tls {
        identity(&self.0, role, id)
    }
}

/// A new certificate for `id`, by the authority in `dir`, in place of the one it has.
pub fn issue(dir: &Path, role: &str, id: &str) {
    let mut command = moemesh();
    command.args(["certs", "issue"]).arg(dir).args(["--force", "--role", role, "--id", id]);
    let (ok, _, error) = run(&mut command);
    assert!(ok, "{error}");
}

impl Drop for Certs {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
