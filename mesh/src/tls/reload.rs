//! Certificates are replaced while a process runs: its files are looked at every
//! second, and new connections use what they hold. Connections that are open
//! stay as they are.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use super::Tls;
use super::explain::duration;
use super::material::Files;
use super::now;
use crate::lifecycle::Shutdown;

const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Own certificates that end sooner are worth a warning.
const SOON: i64 = 24 * 3600;

/// By what a replaced file is known: links are followed, so a directory that is
/// switched as a whole (as Kubernetes does) shows too.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stamp([Option<(i64, i64, u64, u64)>; 3]);

impl Stamp {
    fn of(files: &Files) -> Self {
        let one = |path: &Path| {
            let meta = fs::metadata(path).ok()?;
            Some((meta.mtime(), meta.mtime_nsec(), meta.ino(), meta.len()))
        };
        Self([one(&files.certificate), one(&files.key), one(&files.authorities)])
    }
}

/// Takes new files over until `shutdown`.
pub(super) async fn watch(tls: Tls, shutdown: Shutdown) {
    let mut used = Stamp::of(tls.files());
    let mut seen = used.clone();
    let mut warned = false;
    loop {
        tokio::select! {
            () = shutdown.wait() => return,
            () = tokio::time::sleep(LOOK_EVERY) => {}
        }
        let left = tls.material().validity.not_after.saturating_sub(now());
        if left < SOON && !warned {
            let left = duration(u64::try_from(left).unwrap_or(0));
            tracing::warn!(principal = %tls.principal(), left, "the certificate ends soon");
        }
        warned = left < SOON;
        let now = Stamp::of(tls.files());
        // Three files are not replaced in one moment: they must have come to rest.
        let at_rest = now == seen;
        seen = now;
        if !at_rest || seen == used {
            continue;
        }
        used = seen.clone();
        let reading = tls.clone();
        // A task that panicked has changed nothing.
        let _ = tokio::task::spawn_blocking(move || reading.reload()).await;
    }
}
