//! Mutual TLS between the processes of a mesh. Every process has a certificate
//! that names its mesh, role and id; each end of a connection checks the other's.
//! TLS 1.3 only, without resumption, so that nothing outlives a certificate but
//! the connections that are open when it ends. Rooms:
//!
//! - [`principal`]: the identity in a certificate
//! - [`material`]: the files, read and checked; [`reload`]: replaced while running
//! - [`verify`]: what each end requires of the other
//! - [`accept`]: the server's handshakes, bounded; [`socket`]: what is beneath
//! - [`explain`]: failures in words; [`metrics`]; [`validity`]: dates
//!
//! What a caller may call is decided in [`crate::authz`].

mod accept;
mod explain;
mod material;
mod metrics;
mod principal;
mod reload;
mod socket;
#[cfg(test)]
mod tests;
mod validity;
mod verify;

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use arc_swap::{ArcSwap, Guard};
use parking_lot::Mutex;
use rustls::{CommonState, ServerConfig};
use rustls_pki_types::ServerName;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

pub(crate) use accept::incoming;
pub use accept::{Caller, Secured};
pub use explain::{duration, explain};
use material::Material;
pub use material::{Files, Owner, TlsError, certificates};
pub use metrics::TlsMetrics;
pub use principal::{Principal, PrincipalError, Role, authority_uri, mesh_of_authority};
pub use socket::Socket;
pub use validity::Validity;
pub use verify::{Expected, Refused};

use crate::lifecycle::Shutdown;
use crate::metrics::Metrics;

/// Complaints about refused connections that are logged, at most one in this time.
const COMPLAIN_EVERY: Duration = Duration::from_secs(1);

/// A process's identity and the authorities it trusts; clones are the same one.
#[derive(Clone, Debug)]
pub struct Tls(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    files: Files,
    owner: Owner,
    current: ArcSwap<Material>,
    metrics: TlsMetrics,
    /// When a refused connection was last logged, and how many were not since.
    complained: Mutex<(Option<Instant>, u64)>,
}

/// Loads what a serving process needs, shows it in `metrics` and keeps it up to
/// date until `shutdown`. Without files there is no TLS.
///
/// # Errors
/// Files that cannot be used, or that are not of this process.
pub fn start(
    files: Option<&Files>,
    owner: Owner,
    metrics: &Metrics,
    shutdown: &Shutdown,
) -> Result<Option<Tls>, TlsError> {
    let Some(files) = files else { return Ok(None) };
    let tls = Tls::load(files, owner)?;
    metrics.register(|registry| tls.0.metrics.register(registry, tls.clone()));
    tokio::spawn(reload::watch(tls.clone(), shutdown.clone()));
    let left = tls.material().validity.not_after.saturating_sub(now());
    let left = duration(u64::try_from(left).unwrap_or(0));
    tracing::info!(principal = %tls.principal(), left, "mutual TLS");
    Ok(Some(tls))
}

impl Tls {
    /// Reads and checks the files once.
    ///
    /// # Errors
    /// Files that cannot be used, or that are not of this owner.
    pub fn load(files: &Files, owner: Owner) -> Result<Self, TlsError> {
        let material = Material::read(files, &owner)?;
        Ok(Self(Arc::new(Inner {
            files: files.clone(),
            owner,
            current: ArcSwap::from_pointee(material),
            metrics: TlsMetrics::default(),
            complained: Mutex::default(),
        })))
    }

    /// Who this process is.
    pub fn principal(&self) -> Principal {
        self.material().principal.clone()
    }

    /// Takes over what the files hold now, if it can be used and names the same
    /// holder; otherwise everything stays as it was, and the log says why.
    pub fn reload(&self) -> bool {
        let Inner { files, owner, current, metrics, .. } = &*self.0;
        let read = Material::read(files, owner).and_then(|new| {
            let (path, want) = (files.certificate.clone(), self.principal());
            match new.principal == want {
                true => Ok(new),
                false => Err(TlsError::Owner { path, got: new.principal, want: want.to_string() }),
            }
        });
        metrics.reloaded(read.is_ok());
        match read {
            Ok(new) => {
                let left = new.validity.not_after.saturating_sub(now());
                let left = duration(u64::try_from(left).unwrap_or(0));
                tracing::info!(principal = %new.principal, left, "new certificate in use");
                current.store(Arc::new(new));
                true
            }
            Err(error) => {
                tracing::error!(%error, "new certificate files are unusable, the old ones stay in use");
                false
            }
        }
    }

    /// Shakes hands as a client with whom it expects.
    ///
    /// # Errors
    /// The other end is somebody else, or refuses this process. A server that
    /// refuses may say so only with the first answer.
    pub async fn connect(
        &self,
        socket: Socket,
        expected: &Expected,
    ) -> io::Result<(TlsStream<Socket>, Principal)> {
        let client = self.material().client(expected.clone()).map_err(io::Error::other)?;
        // Identities stand in certificates; names of hosts mean nothing.
        let name = ServerName::try_from("mesh").map_err(io::Error::other)?;
        let stream = TlsConnector::from(client).connect(name, socket).await?;
        let principal = peer_principal(stream.get_ref().1);
        // The verifier has read the same certificate.
        let principal = principal.ok_or(io::ErrorKind::InvalidData)?;
        Ok((stream, principal))
    }

    pub(crate) fn metrics(&self) -> &TlsMetrics {
        &self.0.metrics
    }

    fn files(&self) -> &Files {
        &self.0.files
    }

    fn material(&self) -> Guard<Arc<Material>> {
        self.0.current.load()
    }

    fn server(&self) -> Arc<ServerConfig> {
        self.material().server.clone()
    }

    /// Logs a refused connection, unless others were logged just now.
    fn complain(&self, peer: &str, why: &str) {
        let unsaid = {
            let mut complained = self.0.complained.lock();
            let (last, unsaid) = &mut *complained;
            if last.is_some_and(|last| last.elapsed() < COMPLAIN_EVERY) {
                *unsaid += 1;
                return;
            }
            *last = Some(Instant::now());
            std::mem::take(unsaid)
        };
        tracing::warn!(peer, why, unsaid, "connection refused");
    }
}

/// Who the other end has proved to be.
fn peer_principal(connection: &CommonState) -> Option<Principal> {
    Principal::of(connection.peer_certificates()?.first()?).ok()
}

/// Seconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    since.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}
