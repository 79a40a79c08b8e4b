//! A real etcd server, for as long as its value lives. Where the machine has none,
//! or the binary under test cannot talk to it, what needs it is left out and says so.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use mesh::registry::Etcd;
use mesh::tls::Role;
use parking_lot::Mutex;
use rcgen::{CertificateParams, DistinguishedName, DnType, Issuer, KeyPair};

use super::process::{free_port, signal};

/// How long one look at the members takes.
const LOOK: Duration = Duration::from_secs(1);

pub struct EtcdServer {
    dir: PathBuf,
    /// Of clients and of peers.
    ports: [u16; 2],
    /// A directory of certificates, its own among them.
    certificates: Option<PathBuf>,
    child: Mutex<Child>,
}

impl EtcdServer {
    /// A server with no keys; none where there is no etcd to be run.
    pub fn start() -> Option<Arc<Self>> {
        Self::with(None)
    }

    /// One that speaks mutual TLS, with a certificate of the authority in `certificates`.
    pub fn secured(certificates: &Path) -> Option<Arc<Self>> {
        certify(certificates);
        Self::with(Some(certificates.to_owned()))
    }

    fn with(certificates: Option<PathBuf>) -> Option<Arc<Self>> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        if !cfg!(feature = "etcd") {
            println!("left out: built without etcd (`cargo test --features etcd` has it)");
            return None;
        }
        if Command::new("etcd").arg("--version").stdout(Stdio::null()).status().is_err() {
            println!("left out: there is no etcd here (Debian: etcd-server)");
            return None;
        }
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("moemesh-etcd-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let ports = [free_port(), free_port()];
        let child = Mutex::new(spawn(&dir, ports, certificates.as_deref()));
        Some(Arc::new(Self { dir, ports, certificates, child }))
    }

    /// As in the key `etcd` of a configuration.
    pub fn setting(&self) -> String {
        format!("[{:?}]", url(self.ports[0], self.certificates.as_deref()))
    }

    /// SIGSTOP: it accepts connections and answers nobody.
    pub fn stop(&self) {
        signal(self.child.lock().id(), "STOP");
    }

    /// SIGCONT.
    pub fn go_on(&self) {
        signal(self.child.lock().id(), "CONT");
    }

    /// `kill -9`; its keys stay on disk.
    pub fn kill(&self) {
        let mut child = self.child.lock();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn restart(&self) {
        *self.child.lock() = spawn(&self.dir, self.ports, self.certificates.as_deref());
    }

    /// What a process of a mesh has of it.
    pub fn client(&self) -> Etcd {
        let server = url(self.ports[0], None).parse().unwrap();
        Etcd::new(vec![server], "default", None).unwrap()
    }

    /// The endpoints that are registered now.
    pub async fn members(&self, role: Role) -> BTreeSet<String> {
        let etcd = self.client();
        let heard = Mutex::new(BTreeSet::new());
        let hear = |at: &mesh::transport::Endpoint| _ = heard.lock().insert(at.to_string());
        let _ = tokio::time::timeout(LOOK, etcd.follow(role, hear)).await;
        heard.into_inner()
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn url(port: u16, certificates: Option<&Path>) -> String {
    format!("http{}://127.0.0.1:{port}", if certificates.is_some() { "s" } else { "" })
}

/// A server's certificate as other tools make them: for an address.
fn certify(dir: &Path) {
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    let mut authority = CertificateParams::default();
    authority.distinguished_name = DistinguishedName::new();
    authority.distinguished_name.push(DnType::CommonName, "moemesh authority of moemesh");
    let issuer = Issuer::new(authority, KeyPair::from_pem(&read("ca.key")).unwrap());
    let key = KeyPair::generate().unwrap();
    let own = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    let own = own.signed_by(&key, &issuer).unwrap();
    std::fs::write(dir.join("etcd.pem"), own.pem()).unwrap();
    std::fs::write(dir.join("etcd.key"), key.serialize_pem()).unwrap();
}

fn spawn(dir: &Path, [clients, peers]: [u16; 2], certificates: Option<&Path>) -> Child {
    let (clients, peers) = (url(clients, certificates), url(peers, None));
    let log = File::options().create(true).append(true).open(dir.join("log")).unwrap();
    let mut etcd = Command::new("etcd");
    if let Some(dir) = certificates {
        etcd.arg("--client-cert-auth").arg("--trusted-ca-file").arg(dir.join("ca.pem"));
        etcd.arg("--cert-file").arg(dir.join("etcd.pem"));
        etcd.arg("--key-file").arg(dir.join("etcd.key"));
    }
    etcd.arg("--data-dir")
        .arg(dir.join("data"))
        .args(["--listen-client-urls", &clients, "--advertise-client-urls", &clients])
        .args(["--listen-peer-urls", &peers, "--initial-advertise-peer-urls", &peers])
        .args(["--initial-cluster", &format!("default={peers}")])
        .stdin(Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .spawn()
        .unwrap()
}
